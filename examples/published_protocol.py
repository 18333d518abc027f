"""How much the published protocol (BPDA, 20 steps of PGD) flatters neighbourhood OTAD (l = 0, K = 10).

    python examples/published_protocol.py --n 200 --eps 1.0

Trains on 4,000 of the 5,000 MNIST digits that ship in a package, attacks test digits with BPDA and with attacks that
know the whole pipeline, and prints what each leaves.
"""

import argparse

import torch

from otad import AttackerKnowledge, OTADClassifier, ThreatModel
from otad.attacks import run_attacks, worst_case
from otad.data import load

ATTACKS = {
    "bpda": {"steps": 20},
    "exact_gradient": {"losses": ("margin",), "n_targets": 3, "steps": 50},
    "retrieval": {"steps": 20, "refine_steps": 30},
    "joint": {"n_targets": 3, "steps": 20},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=200, help="test digits to attack")
    parser.add_argument("--eps", type=float, default=1.0, help="L2 budget, pixels in [0, 1]")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()

    data = load("mnist-5k", n_train=4000, n_test=1000, seed=chosen.seed)
    clf = OTADClassifier(
        interpolation="neighborhood",
        strong_convexity=0.0,
        smoothness=2.0,
        n_neighbors=10,
        random_state=chosen.seed,
    ).fit(data.x_train, data.y_train)
    x, y = torch.as_tensor(data.x_test[: chosen.n]), torch.as_tensor(data.y_test[: chosen.n]).long()
    knowledge = AttackerKnowledge(
        torch.as_tensor(data.x_train),
        torch.as_tensor(data.y_train).long(),
        clf.backbone_,
        clf.module_.smoothed,
        clf.module_.retrieval_space,
    )
    threat = ThreatModel("l2", chosen.eps, (0.0, 1.0))
    found = run_attacks(clf.module_, x, y, threat, ATTACKS, knowledge=knowledge, seed=chosen.seed)

    clean = float((clf.module_(x).argmax(1) == y).double().mean())
    print(f"MNIST, neighbourhood OTAD (l = 0, L = 2, K = 10), {len(x)} test digits, L2 {chosen.eps:g}")
    print(f"{'clean':<16}{100 * clean:6.1f} %")
    for name, outcome in found.items():
        print(f"{name:<16}{100 * float(outcome.survived.double().mean()):6.1f} %   {outcome.note}".rstrip())
    worst = float(worst_case(found).survived.double().mean())
    published = float(found["bpda"].survived.double().mean())
    print(f"{'worst case':<16}{100 * worst:6.1f} %")
    print(
        f"Attacks that know the pipeline leave {100 * (published - worst):.1f} points less than the published protocol."
    )


if __name__ == "__main__":
    main()
