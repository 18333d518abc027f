"""What can be proven of neighbourhood OTAD, by which argument, and with which retrieval.

    python examples/neighborhood_certificates.py --n 100 --data mnist pbmc68k

Neighbourhood OTAD (l = 0, K = 10) with Euclidean retrieval and with a robust embedding. Two sound arguments: the set of
neighbours provably stays ("neighborhood"), and every set within the radius has features of one class only
("unanimous"). Prints the share of all test samples that each certifies at two radii, and beside the larger of the two
what an attack on the first samples leaves; stops if an attack broke a certified one.
"""

import argparse

import numpy as np
import torch

from otad import AttackerKnowledge, OTADClassifier, ThreatModel, evaluate
from otad.certificate import certify
from otad.data import Dataset, load

SIZES = {"mnist": (4000, 1000), "pbmc68k": (None, None)}
RADII = {"mnist": (0.1, 0.5), "pbmc68k": (0.5, 2.5)}
RETRIEVALS = ("euclidean", "robust")
ARGUMENTS = {"neighborhood": ["neighborhood"], "unanimous": ["unanimous"], "either": ["neighborhood", "unanimous"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", default=sorted(RADII), choices=sorted(RADII))
    parser.add_argument("--n", type=int, default=200, help="test samples to attack")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    for name in chosen.data:
        n_train, n_test = SIZES[name]
        data = load(name, n_train=n_train, n_test=n_test, seed=chosen.seed)
        print(f"\n{data.name}: {len(data.x_train)} training, {len(data.x_test)} test samples; L2 in {data.units}")
        print(
            f"{'retrieval':<12}{'clean':>8}{'radius':>8}"
            + "".join(f"{a:>14}" for a in ARGUMENTS)
            + "  | first samples:"
        )
        for retrieval in RETRIEVALS:
            measure(data, retrieval, RADII[name], chosen.n, chosen.seed)


def measure(data: Dataset, retrieval: str, radii: tuple[float, ...], n: int, seed: int) -> None:
    clf = OTADClassifier(interpolation="neighborhood", retrieval=retrieval, random_state=seed)
    clf.fit(data.x_train, data.y_train)
    x = torch.as_tensor(data.x_test)
    y = np.searchsorted(clf.classes_, data.y_test)
    proofs = {name: certify(clf.module_, x, arguments=arguments) for name, arguments in ARGUMENTS.items()}
    either = proofs["either"]
    threats = [ThreatModel("l2", radius, data.box) for radius in radii]
    report = evaluate(
        clf.module_,
        x,
        torch.as_tensor(y),
        threats,
        attacks="quick",
        seed=seed,
        certificate=either,
        knowledge=AttackerKnowledge(
            torch.as_tensor(data.x_train),
            torch.as_tensor(np.searchsorted(clf.classes_, data.y_train)),
            clf.backbone_,
            clf.module_.smoothed,
            clf.module_.retrieval_space,
        ),
        n_attacked=n,
    )
    assert report.examples is not None
    for radius, threat in zip(radii, threats, strict=True):
        survived = report.examples.survived[threat.key]["worst_case"]
        proven = ((either.label == y) & (either.radius > radius))[:n]
        assert not (proven & ~survived).any(), "an attack broke a certified sample"
        shares = "".join(f"{100 * proof.certified(radius, y):>14.1f}" for proof in proofs.values())
        left = f"certified {100 * proven.mean():.1f} <= worst case {100 * survived.mean():.1f}"
        print(f"{retrieval:<12}{100 * report.clean_accuracy:>8.1f}{radius:>8g}{shares}  | {left}", flush=True)


if __name__ == "__main__":
    main()
