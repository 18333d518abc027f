"""From arrays to predictions that provably do not flip: run with `python examples/quickstart.py`."""

import numpy as np
from sklearn.datasets import load_digits

import otad

X, y = load_digits(return_X_y=True)
X = X.reshape(-1, 1, 8, 8) / 16  # images as (n, c, h, w) in [0, 1]

clf = otad.OTADClassifier(interpolation="global", random_state=0)
clf.fit(X[:1400], y[:1400])
print("accuracy", clf.score(X[1400:], y[1400:]))

certificate = clf.certify(X[1400:])  # label, L2 radius and kind of proof, one row per sample
print("certified at 0.3:", np.mean((certificate.label == y[1400:]) & (certificate.radius > 0.3)))

explanation = clf.explain(X[1400:1401], k=3)  # the training samples that make up the feature
print("made of training samples", explanation.indices[0], "with weights", explanation.weights[0].round(2))

report = otad.evaluate(
    clf.module_,
    X[1400:].astype("float32"),
    y[1400:],
    threats=[otad.ThreatModel("l2", 0.3, box=(0.0, 1.0))],
    attacks=["exact_gradient"],
    certificate=certificate,
)
print(report.table())

clf.save("runs/quickstart-model")
assert (otad.OTADClassifier.load("runs/quickstart-model").predict(X[1400:]) == clf.predict(X[1400:])).all()
