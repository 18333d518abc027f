"""What it costs that neighbours are found in a learned metric, and what a known Lipschitz constant gives back.

    python examples/retrieval_attack.py --n 200 --eps 1.0

One backbone and three retrievals: Euclidean; a learned embedding, as published; an embedding with a Lipschitz constant
of 1. Neighbourhood OTAD with l = 0, L = 2, K = 10 on MNIST digits that ship in a package. Every attack knows the
embedding and goes through it. Prints for each retrieval the share of test digits classified correctly, without attack
and under each; the share certified at two radii; and how often a vote of the ten nearest is right, which tells the
embeddings apart without OTAD.
"""

import argparse
import time

import numpy as np
import torch

from otad import AttackerKnowledge, OTADClassifier, ThreatModel
from otad.attacks import run_attacks, worst_case
from otad.data import load

ATTACKS = {
    "exact_gradient": {"losses": ("margin",), "n_targets": 2, "steps": 20},
    "retrieval": {"n_targets": 2, "steps": 10, "refine_steps": 10},
    "joint": {"n_targets": 2, "steps": 10},
}
PUBLISHED = {"interpolation": "neighborhood", "strong_convexity": 0.0, "smoothness": 2.0, "n_neighbors": 10}
COLUMNS = ("retrieval", "clean", "10-NN", *ATTACKS, "worst", "cert 0.1", "cert 0.5", "seconds")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=200, help="test digits to attack")
    parser.add_argument("--n-train", type=int, default=2000)
    parser.add_argument("--eps", type=float, default=1.0, help="L2 budget, pixels in [0, 1]")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()

    data = load("mnist-5k", n_train=chosen.n_train, n_test=1000, seed=chosen.seed)
    train = torch.as_tensor(data.x_train), torch.as_tensor(data.y_train).long()
    x, y = torch.as_tensor(data.x_test[: chosen.n]), torch.as_tensor(data.y_test[: chosen.n]).long()
    threat = ThreatModel("l2", chosen.eps, (0.0, 1.0))
    print(f"MNIST, {len(train[0])} training digits, {len(x)} test digits, attacks at L2 {chosen.eps:g}; per cent")
    print("".join(f"{name:>15}" for name in COLUMNS))
    for retrieval in ("euclidean", "learned", "robust"):
        began = time.perf_counter()
        clf = OTADClassifier(retrieval=retrieval, random_state=chosen.seed, **PUBLISHED)
        clf.fit(data.x_train, data.y_train)
        certificate = clf.certify(x.numpy())
        knowledge = AttackerKnowledge(*train, clf.backbone_, clf.module_.smoothed)
        found = run_attacks(clf.module_, x, y, threat, ATTACKS, knowledge=knowledge, seed=chosen.seed)
        survived = [found[name].survived for name in ATTACKS] + [worst_case(found).survived]
        shares = [
            float(np.mean(clf.predict(x.numpy()) == data.y_test[: chosen.n])),
            ten_nearest(clf, x, y),
            *(float(s.double().mean()) for s in survived),
            *(certificate.certified(radius, data.y_test[: chosen.n]) for radius in (0.1, 0.5)),
        ]
        seconds = time.perf_counter() - began
        print(
            f"{retrieval:>15}" + "".join(f"{100 * share:>15.1f}" for share in shares) + f"{seconds:>15.0f}", flush=True
        )


def ten_nearest(clf: OTADClassifier, x: torch.Tensor, y: torch.Tensor) -> float:
    """Accuracy of a vote of the ten nearest training points, in the metric of the model."""
    with torch.no_grad():
        indices = clf.module_.features(x).stats["indices"]
    votes = torch.nn.functional.one_hot(clf.transport_.y[indices], len(clf.classes_)).sum(1)
    return float((votes.argmax(1) == y).double().mean())


if __name__ == "__main__":
    main()
