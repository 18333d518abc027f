"""What it costs that neighbours are found in a learned metric, and what a known Lipschitz constant gives back.

    python examples/retrieval_attack.py --n 200 --eps 1.0
    python examples/retrieval_attack.py --data mnist          official test digits, from the data folder

One backbone and three retrievals: Euclidean; a learned embedding, as published; an embedding with a Lipschitz constant
of 1. Neighbourhood OTAD with l = 0, L = 2, K = 10 on MNIST digits. Every attack knows the
embedding and goes through it. Prints for each retrieval the share of test digits classified correctly, without attack
and under each; the share certified at two radii; and how often a vote of the ten nearest is right, which tells the
embeddings apart without OTAD.
"""

import argparse
import time

import torch
from torch import Tensor

from otad import AttackerKnowledge, OTADClassifier, ThreatModel
from otad.attacks import run_attacks, worst_case
from otad.certificate import certify
from otad.cip import Regularity
from otad.data import load
from otad.defense import OTAD, NeighborhoodInterpolation
from otad.nn import build_embedding
from otad.retrieval import Retrieval
from otad.train import fit_embedding

ATTACKS = {
    "exact_gradient": {"losses": ("margin",), "n_targets": 2, "steps": 20},
    "retrieval": {"n_targets": 2, "steps": 10, "refine_steps": 10},
    "joint": {"n_targets": 2, "steps": 10},
}
BOUNDS = Regularity(0.0, 2.0)
K = 10
COLUMNS = ("clean", "10-NN", *ATTACKS, "worst case", "cert. 0.1", "cert. 0.5")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=("mnist-5k", "mnist"), default="mnist-5k", help="mnist-5k ships in a package")
    parser.add_argument("--n", type=int, default=200, help="test digits to attack")
    parser.add_argument("--n-train", type=int, default=2000)
    parser.add_argument("--eps", type=float, default=1.0, help="L2 budget, pixels in [0, 1]")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()

    data = load(chosen.data, n_train=chosen.n_train, n_test=1000, seed=chosen.seed)
    train = torch.as_tensor(data.x_train), torch.as_tensor(data.y_train).long()
    x, y = torch.as_tensor(data.x_test[: chosen.n]), torch.as_tensor(data.y_test[: chosen.n]).long()
    bounds = {"strong_convexity": BOUNDS.l, "smoothness": BOUNDS.L, "n_neighbors": K}
    clf = OTADClassifier(interpolation="neighborhood", epochs=12, random_state=chosen.seed, **bounds)
    clf.fit(data.x_train, data.y_train)
    print(f"{data.name}, {len(train[0])} training digits, {len(x)} test digits, attacks at L2 {chosen.eps:g}; per cent")
    print(f"{'retrieval':<12}" + "".join(f"{name:>16}" for name in COLUMNS) + "    embedding")
    for kind in ("euclidean", "learned", "robust"):
        began = time.process_time()
        model = clf.module_ if kind == "euclidean" else with_retrieval(clf, kind, *train, chosen.seed)
        seconds = time.process_time() - began
        shares = measure(model, clf, x, y, ThreatModel("l2", chosen.eps, (0.0, 1.0)), train, chosen.seed)
        row = "".join(f"{100 * share:>16.1f}" for share in shares)
        print(f"{kind:<12}{row}{seconds:>11.0f} s", flush=True)


def with_retrieval(clf: OTADClassifier, kind: str, x: Tensor, y: Tensor, seed: int) -> OTAD:
    """The same backbone, its neighbours found in an embedding: what OTADClassifier(retrieval=kind) fits."""
    torch.manual_seed(seed)
    embedding = build_embedding(kind, x.mean(0))
    fit_embedding(embedding, x, y, seed=seed)
    transport = clf.transport_
    retrieval = Retrieval.of(embedding, x[transport.samples])
    interpolation = NeighborhoodInterpolation(transport.x, transport.z, k=K, retrieval=retrieval, regularity=BOUNDS)
    return OTAD(clf.backbone_.stem, interpolation, clf.backbone_.head)


def measure(
    model: OTAD,
    clf: OTADClassifier,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    train: tuple[Tensor, Tensor],
    seed: int,
) -> list[float]:
    """One share for each of the columns."""
    with torch.no_grad():
        found = model.features(x)
        clean = model.head(found.value).argmax(1) == y
    votes = torch.nn.functional.one_hot(clf.transport_.y[found.stats["indices"]], len(clf.classes_)).sum(1)
    knowledge = AttackerKnowledge(*train, clf.backbone_, model.smoothed)
    outcomes = run_attacks(model, x, y, threat, ATTACKS, knowledge=knowledge, seed=seed)
    survived = [*(outcomes[name].survived for name in ATTACKS), worst_case(outcomes).survived]
    certificate = certify(model, x)
    certified = [certificate.certified(radius, y.numpy()) for radius in (0.1, 0.5)]
    return [float(s.double().mean()) for s in (clean, votes.argmax(1) == y, *survived)] + certified


if __name__ == "__main__":
    main()
