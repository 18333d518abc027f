"""OTAD-T and OTAD-T-NN on CIFAR-10 in the published setting, and what attacks that know the whole pipeline leave.

    python examples/published_cifar10.py --data-dir DATA            # the published sizes: wants a GPU
    python examples/published_cifar10.py --data-dir DATA --small    # 45 minutes on one busy core

DATA/cifar-10-batches-bin (CIFAR-10's binary version, 50,000 + 10,000 images) is taken where it is there, else
DATA/cifar10_subset.npz (15,000 + 2,000). A Vision Transformer with 7 layers of width 384, 12 heads and 8 x 8 patches of
4 x 4 pixels beside a class token, hence a map of R^24960, is trained twice: as an ordinary network, and with the
transport cost. All OTAD rows share the second one. Neighbourhood OTAD with K = 10, l = 0, L = 2 finds its neighbours in
stem units ("Euclidean"), in the published kind of embedding ("learned") and in one with Lipschitz constant 1
("robust"); CIP-net (width 2048, 6 layers, 8 heads, 50,000 problems) stands in for the solver over learned neighbours,
as published. How the published backbone was trained is not known. Our settings are at the top of the file; at the
published sizes they are untried. There the points and features of 50,000 images alone take 20 GB in float64.

Every model is attacked on the same test images at L2 0.5 and Linf 8/255. "BPDA" is the published protocol: 20 steps of
PGD with the backbone's derivative in place of the model's; on a network without interpolation it is plain PGD. "worst
case" counts an image as kept only if it survives BPDA and every attack of the set "quick".

--small has 8,000 training images, 4 layers of width 64 with 4 heads (a map of R^4160), 8 channels in the learned
embedding, and a CIP-net of width 32 with 2 layers and 4 heads that learns from 10,000 problems; it attacks 100 images.
Patches, class token, K, l, L and the budgets stay. Its training (transport cost, margin, learning rate) was chosen on a
part of the training images.

The folder --out keeps the state of training after each epoch and every finished attack: after Ctrl-C the same command
goes on. At the end it holds table.txt and results.json.
"""

import argparse
import os
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from otad import AttackerKnowledge, OTADClassifier, ThreatModel, evaluate
from otad.attacks.sets import choose
from otad.cip import Regularity
from otad.data import Dataset, load
from otad.defense import OTAD, NeighborhoodInterpolation
from otad.files import write_json, write_text
from otad.nn import build_embedding
from otad.retrieval import Retrieval
from otad.train import fit_embedding
from otad.train.cip_net import imitate

K, l, L = 10, 0.0, 2.0
THREATS = {
    "L2 0.5": ThreatModel("l2", 0.5, (0.0, 1.0)),
    "Linf 8/255": ThreatModel("linf", 8 / 255, (0.0, 1.0)),
}
HEAD = "{:<26}{:>8}{:>10}{:>22}{:>22}{:>9}  {}"
ROW = "{:<26}{:>8}{:>10}{:>10}{:>12}{:>10}{:>12}{:>9}  {}"


@dataclass(frozen=True)
class Sizes:
    """What --small changes; options as of OTADClassifier, build_embedding and imitate."""

    n_train: int | None
    n_test: int | None
    attacked: int
    backbone: dict[str, Any]
    transport: dict[str, float]  # what the undefended network does without
    channels: int  # of the learned embedding
    network: dict[str, int]


PUBLISHED = Sizes(
    n_train=None,
    n_test=None,
    attacked=1000,
    backbone={
        "n_blocks": 7,
        "width": 384,
        "backbone_options": {"patch": 4, "heads": 12, "hidden": 384},
        "epochs": 50,
        "learning_rate": 1e-3,
    },
    transport={"alpha": 1e-2, "margin": 0.0},
    channels=64,
    network={"width": 2048, "layers": 6, "heads": 8, "n_problems": 50_000},
)
SMALL = Sizes(
    n_train=8000,
    n_test=2000,
    attacked=100,
    backbone={
        "n_blocks": 4,
        "width": 64,
        "backbone_options": {"patch": 4, "heads": 4, "hidden": 128},
        "epochs": 12,
        "batch_size": 64,
        "learning_rate": 3e-3,
    },
    transport={"alpha": 1e-2, "margin": 0.0},
    channels=8,
    network={"width": 32, "layers": 2, "heads": 4, "n_problems": 10_000},
)


@dataclass(frozen=True)
class Run:
    """What every step needs to know."""

    data: Dataset
    sizes: Sizes
    n: int  # test images attacked
    seed: int
    out: Path
    device: str

    @property
    def train(self) -> tuple[Tensor, Tensor]:
        """Training images and their classes."""
        return torch.as_tensor(self.data.x_train), torch.as_tensor(self.data.y_train).long()


def main() -> None:
    run = set_up()
    data, began = run.data, time.perf_counter()
    sizes = f"{len(data.x_train):,} training and {len(data.x_test):,} test images, the first {run.n} attacked"
    print(f"{data.name}: {sizes}; seed {run.seed}, {run.device}", flush=True)
    ordinary = fit(run, "undefended", alpha=0.0, margin=0.0)
    undefended, health = ordinary.backbone_, {"without transport cost": ordinary.health_}
    del ordinary  # its map takes as much memory as that of the defence
    clf = fit(run, "transport", **run.sizes.transport)
    backbone, health["with transport cost"] = clf.backbone_.to(run.device), clf.health_
    defences = with_retrievals(run, clf)
    del clf
    defences["OTAD-T-NN, learned"], imitation = with_network(run, defences["OTAD-T, learned"])
    rows = [measure(run, "undefended ViT", undefended.to(run.device), undefended)]
    rows += [measure(run, "transport-trained ViT", backbone, backbone)]
    rows += [measure(run, name, model, backbone) for name, model in defences.items()]

    facts = {
        "data": data.name,
        "n_train": len(data.x_train),
        "n_test": len(data.x_test),
        "n_attacked": run.n,
        "seed": run.seed,
        "device": run.device,
        "sizes": asdict(run.sizes),
        "rows": rows,
        "health": health,
        "network": imitation,
        "peak_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "seconds": time.perf_counter() - began,
    }
    write_json(run.out / "results.json", facts)
    text = summary(facts)
    write_text(run.out / "table.txt", text + "\n")
    print(text)


def set_up() -> Run:
    """The command line, and the data it names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, help="where CIFAR-10 lies; default: the variable OTAD_DATA")
    parser.add_argument("--small", action="store_true", help="the same pipeline, small")
    parser.add_argument("--n", type=int, help="test images to attack; default 1000, --small: 100")
    parser.add_argument("--n-train", type=int, help="training images; default: all, --small: 8000")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="default: runs/published-cifar10, --small: runs/small-cifar10")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    chosen = parser.parse_args()
    if chosen.data_dir is None and "OTAD_DATA" not in os.environ:
        parser.error("where is CIFAR-10? Give --data-dir or set OTAD_DATA")
    folder = chosen.data_dir or Path(os.environ["OTAD_DATA"])
    sizes = SMALL if chosen.small else PUBLISHED
    whole = folder / "cifar-10-batches-bin"
    data = load(
        whole if whole.is_dir() else "cifar10",
        data_dir=folder,
        n_train=chosen.n_train or sizes.n_train,
        n_test=sizes.n_test,
        seed=chosen.seed,
    )
    out = chosen.out or Path("runs/small-cifar10" if chosen.small else "runs/published-cifar10")
    return Run(data, sizes, chosen.n or sizes.attacked, chosen.seed, out, chosen.device)


def fit(run: Run, name: str, *, alpha: float, margin: float) -> OTADClassifier:
    """The Transformer, its transport map, and OTAD over Euclidean neighbours."""
    clf = OTADClassifier(
        "neighborhood",
        backbone="transformer",
        alpha=alpha,
        margin=margin,
        strong_convexity=l,
        smoothness=L,
        n_neighbors=K,
        checkpoint=run.out / name,
        resume=True,
        device=run.device,
        verbose=True,
        random_state=run.seed,
        **run.sizes.backbone,
    )
    return clf.fit(run.data.x_train, run.data.y_train)


def with_retrievals(run: Run, clf: OTADClassifier) -> dict[str, OTAD]:
    """The same map, its neighbours found in three ways."""
    x, y = run.train
    euclidean, points = clf.module_.to(run.device), x[clf.transport_.samples].to(run.device)
    inner, found = euclidean.interpolation, {"OTAD-T, Euclidean": euclidean}
    assert isinstance(inner, NeighborhoodInterpolation)
    for kind in ("learned", "robust"):
        torch.manual_seed(run.seed)
        embedding = build_embedding(kind, x.mean(0), run.sizes.channels if kind == "learned" else None)
        options = {"checkpoint": run.out / kind, "resume": True, "device": run.device, "progress": True}
        fit_embedding(embedding, x, y, seed=run.seed, **options)
        retrieval = Retrieval.of(embedding.to(run.device), points)
        # The first one's tensors, not copies: at d = 24,960 they are most of the memory.
        options = {"k": K, "retrieval": retrieval, "regularity": Regularity(l, L)}
        interpolation = NeighborhoodInterpolation(inner.x, inner.z, **options)
        found[f"OTAD-T, {kind}"] = OTAD(euclidean.stem, interpolation, euclidean.head)
    return found


def with_network(run: Run, exact: OTAD) -> tuple[OTAD, dict[str, dict[str, float]]]:
    """CIP-net in place of the solver, and how near it comes on problems that it has not seen."""
    solver = exact.interpolation
    assert isinstance(solver, NeighborhoodInterpolation)
    inverse: Callable[[Tensor], Tensor] = exact.stem.inverse  # type: ignore[assignment]
    interpolation, found, _ = imitate(
        solver,
        exact.head,
        coordinates=lambda points: exact.coordinates(inverse(points)),
        seed=run.seed,
        checkpoint=run.out / "network",
        resume=True,
        device=run.device,
        progress=True,
        **run.sizes.network,
    )
    return OTAD(exact.stem, interpolation, exact.head), {kind: near.to_dict() for kind, near in found.items()}


def measure(run: Run, name: str, model: nn.Module, backbone: nn.Module) -> dict[str, Any]:
    """One row of the table; the attacker knows the model, its backbone, and what CIP-net imitates."""
    knowledge = AttackerKnowledge(*run.train, backbone)
    if isinstance(model, OTAD):
        solved = model.solved()
        relatives = () if solved is model else (solved,)
        knowledge = AttackerKnowledge(*run.train, backbone, model.smoothed, relatives=relatives)
    quick, left_out = choose("quick", knowledge.about(model))
    x, y = torch.as_tensor(run.data.x_test), torch.as_tensor(run.data.y_test).long()
    report = evaluate(
        model,
        x,
        y,
        list(THREATS.values()),
        attacks={**quick, "bpda": {"steps": 20}},
        seed=run.seed,
        knowledge=knowledge,
        name=name,
        n_attacked=run.n,
        results_dir=run.out / "attacks",
        examples=False,
        progress=True,
    )
    attacked = report.extra.get("attacked_subset", {"clean_accuracy": report.clean_accuracy})
    return {
        "name": name,
        "clean": report.clean_accuracy,
        "clean_attacked": attacked["clean_accuracy"],
        "robust": {words: report.robust_accuracy[threat.key] for words, threat in THREATS.items()},
        "failed_checks": [check for check, found in report.audit.items() if found.passed is False],
        "audit": {check: [found.passed, found.value] for check, found in report.audit.items()},
        "milliseconds": milliseconds(model, x[:100].to(run.device)),
        "attacks_left_out": left_out,
        "seconds": report.seconds,
    }


def milliseconds(model: nn.Module, x: Tensor) -> float:
    """Median time of a prediction, all of x in one batch."""
    laps = []
    with torch.no_grad():
        model(x)
        for _ in range(5):
            began = time.perf_counter()
            model(x).cpu()  # waits for the device
            laps.append(time.perf_counter() - began)
    return 1e3 * statistics.median(laps) / len(x)


def summary(facts: dict[str, Any]) -> str:
    """The table, and what is to be known beside it."""
    n, (l2, linf) = facts["n_attacked"], THREATS
    lines = [
        f"per cent; clean over {facts['n_test']:,} test images and over the {n} that were attacked",
        HEAD.format("", "clean", f"of {n}", "BPDA, 20 steps*", "worst case", "ms each", "failed audit checks"),
        ROW.format("", "", "", l2, linf, l2, linf, "", ""),
    ]
    for row in facts["rows"]:
        bpda, worst = ([row["robust"][words][attack] for words in THREATS] for attack in ("bpda", "worst_case"))
        shares = [f"{100 * share:.1f}" for share in (row["clean"], row["clean_attacked"], *bpda, *worst)]
        failed = ", ".join(row["failed_checks"]) or "none"
        lines.append(ROW.format(row["name"], *shares, f"{row['milliseconds']:.2f}", failed))
    lines.append("* published protocol, weak: for comparison only")
    for words, health in facts["health"].items():
        feasible = f"{health['feasible']:.1%} of {health['neighborhoods']} neighbourhoods feasible"
        lines.append(f"the map {words}: median smallest L {health['median']:.3g}, {feasible}")
    without, with_cost = (100 * row["clean"] for row in facts["rows"][:2])
    lines.append(f"clean accuracy of the ViT: {without:.1f} % without transport cost, {with_cost:.1f} % with it")
    for queries, near in facts["network"].items():
        agreement = f"same label as the exact solution {near['label_agreement']:.1%}"
        lines.append(f"CIP-net on {queries}: feature error {near['feature_error']:.1%}, {agreement}")
    return "\n".join([*lines, f"peak memory {facts['peak_memory_gib']:.1f} GiB, {facts['seconds'] / 60:.0f} minutes"])


if __name__ == "__main__":
    main()
