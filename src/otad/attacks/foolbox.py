"""Minimal-norm and decision-based attacks from the package foolbox, brought to our shapes, boxes and budgets."""

import importlib
import logging
import math
import warnings
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from otad.attacks.best import Best
from otad.attacks.exact_gradient import best_wrong_classes
from otad.attacks.frame import Frame, Framed
from otad.attacks.threat_model import ThreatModel
from otad.errors import MissingExtraError

__all__ = ["decision_based", "load_foolbox", "minimal_norm"]

logger = logging.getLogger(__name__)

# Foolbox holds all random directions of a step at once: (directions, rows, d) numbers.
NUMBERS_AT_ONCE = 2**26
EXACTNESS = 3e-3
QUERIES_AT_ONCE = 500
CALLS_A_STEP = 300  # far more than a search takes that comes to an end


def minimal_norm(
    model: nn.Module,
    x: Float[Tensor, "batch ..."],
    y: Int[Tensor, " batch"],
    threat: ThreatModel,
    *,
    steps: int = 100,
    n_targets: int = 0,
    seed: int = 0,
) -> Float[Tensor, "batch ..."]:
    """Fast minimum-norm attack: the smallest perturbation that it finds, kept where it lies within the budget.

    It starts from the sample; then, for what is left, aims at single classes; then starts from another sample that
    the model gives another label (a linear model's boundary can otherwise be met so exactly that rounding hides it).

    Args:
        model: inputs -> logits.
        x: samples, inside the box of the threat model.
        y: their true classes.
        threat: norm, budget, box.
        steps: gradient steps a run.
        n_targets: one run for each of so many wrong classes of highest logit.
        seed: of all random numbers; the global generator is left as it was.

    Returns:
        one input a row inside the budget and box, misclassified where the attack succeeded. Where the smallest
        perturbation found is larger than the budget, it is cut off there.

    Raises:
        MissingExtraError: foolbox is not installed.

    Source: Pintor et al., NeurIPS 2021, arXiv 2102.12827; package foolbox.
    """
    package = load_foolbox()
    best = Best(x, y)
    framed = _Foolbox(package, model, x, threat)
    # Steps of the budget's own size, as the published ones are meant for images in [0, 1]; Euclidean in both norms.
    length = 2 * threat.eps / framed.frame.width * (x[0].numel() ** 0.5 if threat.norm == "linf" else 1.0)
    attack = {"l2": package.attacks.L2FMNAttack, "linf": package.attacks.LInfFMNAttack}[threat.norm]
    attack = attack(steps=steps, max_stepsize=length)
    with _own_randomness(x, seed):
        rows = best.rows_left()
        framed.offer(best, rows, attack.run(framed.model, framed.frame.pack(x), y))
        for target in best_wrong_classes(model, x, y, n_targets).unbind(dim=1) if n_targets else ():
            rows = best.rows_left()
            if len(rows) == 0:
                return best.x_adv
            aim = package.criteria.TargetedMisclassification(target[rows])
            framed.offer(best, rows, attack.run(framed.model, framed.frame.pack(x[rows]), aim))
        rows = best.rows_left()
        starts, found = _starts(model, framed.frame, x[rows], y[rows], x, y)
        if bool(found.any()):
            packed = framed.frame.pack(x[rows[found]])
            moved = attack.run(framed.model, packed, y[rows[found]], starting_points=starts[found])
            framed.offer(best, rows[found], moved)
    return best.x_adv


def decision_based(
    model: nn.Module,
    x: Float[Tensor, "batch ..."],
    y: Int[Tensor, " batch"],
    threat: ThreatModel,
    *,
    queries: int = 2000,
    x_train: Float[Tensor, "n ..."] | None = None,
    y_train: Int[Tensor, " n"] | None = None,
    seed: int = 0,
) -> Float[Tensor, "batch ..."]:
    """HopSkipJump: sees labels only, never a logit or a gradient.

    It starts from an input that the model gives another label: the nearest of the training samples of other classes,
    else of the other samples of the batch, else uniform noise; rows without any of these are left as they are.

    Args:
        model: inputs -> logits.
        x: samples, inside the box of the threat model.
        y: their true classes.
        threat: norm, budget, box.
        queries: about so many labels are asked for each sample.
        x_train: training samples to start from.
        y_train: their classes.
        seed: of all random numbers; the global generator is left as it was.

    Returns:
        one input a row inside the budget and box, misclassified where the attack succeeded.

    Raises:
        MissingExtraError: foolbox is not installed.
        ValueError: queries below 100.

    Source: Chen, Jordan, Wainwright, IEEE S&P 2020, arXiv 1904.02144; package foolbox.
    """
    if queries < 100:
        raise ValueError(f"queries must be at least 100, not {queries}")
    package = load_foolbox()
    framed = _Foolbox(package, model, x, threat)
    best = Best(x, y)
    steps, first = _schedule(queries)
    attack = _hop_skip_jump(package)(
        steps=steps,
        initial_gradient_eval_steps=first,
        constraint=threat.norm,
        # How exactly the boundary is found again, gamma / d^1.5 of the distance: too coarse with few dimensions.
        gamma=min(1.0, EXACTNESS * x[0].numel() ** 1.5),
    )
    attack.model = framed.model
    with _own_randomness(x, seed), torch.no_grad():
        points = x_train if x_train is not None else x
        labels = y_train if y_train is not None else y
        starts, found = _starts(model, framed.frame, x, y, points, labels)
        most = max(1, int(NUMBERS_AT_ONCE // (first * steps**0.5 * x[0].numel())))
        for rows in found.nonzero().squeeze(1).split(most) if bool(found.any()) else ():
            attack.labels, attack.latest = y[rows], starts[rows]
            per_step = CALLS_A_STEP + math.ceil(len(rows) * first * steps**0.5 / QUERIES_AT_ONCE)
            framed.limited.calls_left = per_step * (steps + 1)
            try:
                attack.run(framed.model, framed.frame.pack(x[rows]), y[rows], starting_points=starts[rows])
            except (AssertionError, _TooManyCalls):
                # The package checks again what it has seen before; a model that then answers otherwise stops it.
                logger.warning("HopSkipJump ended early: the model gave one input different labels")
            framed.offer(best, rows, attack.latest)
    return best.x_adv


def load_foolbox() -> Any:
    """The package, imported at first use.

    Raises:
        MissingExtraError: it is not installed, or cannot be imported (it needs git on the path).
    """
    try:
        with warnings.catch_warnings():
            # It imports names that SciPy has moved.
            warnings.simplefilter("ignore", DeprecationWarning)
            return importlib.import_module("foolbox")
    except ImportError as error:
        raise MissingExtraError("foolbox", "attacks") from error


def _hop_skip_jump(package: Any) -> Any:
    """The package's attack with its estimate of the normal mended.

    The package divides the estimates of all rows by one common norm, so that steps shrink with the size of the batch,
    and asks for one direction at a time.
    """
    eagerpy = importlib.import_module("eagerpy")

    class HopSkipJump(package.attacks.HopSkipJumpAttack):
        model: Any
        labels: Tensor
        latest: Tensor

        def _binary_search(self, is_adversarial: Any, originals: Any, perturbed: Any) -> Any:
            found = super()._binary_search(is_adversarial, originals, perturbed)
            self.latest = found.raw
            return found

        def approximate_gradients(self, is_adversarial: Any, x_advs: Any, steps: int, delta: Any) -> Any:
            x = x_advs.raw
            reach = (delta.raw + 1e-8).view(-1, *([1] * (x.ndim - 1)))
            ways = torch.randn(steps, *x.shape, device=x.device) if self.constraint == "l2" else None
            ways = 2 * torch.rand(steps, *x.shape, device=x.device) - 1 if ways is None else ways
            ways = ways / ways.flatten(2).norm(dim=2).view(steps, -1, *([1] * (x.ndim - 1)))
            points = (x + reach * ways).clamp(0, 1)
            ways = (points - x) / reach
            answers = [self.model(part).argmax(dim=1) for part in points.flatten(0, 1).split(QUERIES_AT_ONCE)]
            votes = 2.0 * (torch.cat(answers).view(steps, -1) != self.labels) - 1
            mean = votes.mean(dim=0)
            votes = torch.where(mean.abs() == 1, votes, votes - mean)
            normal = (votes.view(steps, -1, *([1] * (x.ndim - 1))) * ways).mean(dim=0)
            length = normal.flatten(1).norm(dim=1).clamp_min(1e-12)
            return eagerpy.astensor(normal / length.view(-1, *([1] * (x.ndim - 1))))

    return HopSkipJump


class _Foolbox:
    """The model and its frame as foolbox wants them."""

    def __init__(self, package: Any, model: nn.Module, x: Tensor, threat: ThreatModel) -> None:
        self.frame = Frame.around(x, threat, pad=False)
        self.true, self.threat = model, threat
        with torch.no_grad():
            n_classes = model(x[:1]).shape[1]
        framed = Framed(model, self.frame, n_classes, x.dtype)
        self.limited = _Limited(framed).eval()
        self.model = package.PyTorchModel(self.limited, bounds=(0.0, 1.0), device=x.device)

    def offer(self, best: Best, rows: Tensor, moved: Tensor) -> None:
        """Show the model what foolbox found, brought back into the budget."""
        candidates = self.threat.project(self.frame.unpack(moved).to(best.x), best.x[rows])
        with torch.no_grad():
            best.offer(rows, candidates, self.true(candidates))


class _TooManyCalls(Exception):
    """Raised inside the package to end a search that would not."""


class _Limited(nn.Module):
    """The model, for so many calls; without end until told otherwise."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.calls_left = model, math.inf

    def forward(self, u: Tensor) -> Tensor:
        self.calls_left -= 1
        if self.calls_left < 0:
            raise _TooManyCalls
        return self.model(u)


class _own_randomness:
    """The global generator with our seed inside the block, as it was after it."""

    def __init__(self, x: Tensor, seed: int) -> None:
        self._fork = torch.random.fork_rng(devices=[x.device] if x.device.type == "cuda" else [])
        self._seed = seed

    def __enter__(self) -> None:
        self._fork.__enter__()
        torch.manual_seed(self._seed)

    def __exit__(self, *error: object) -> None:
        self._fork.__exit__(*error)  # pyright: ignore[reportArgumentType]


def _schedule(queries: int) -> tuple[int, int]:
    """Steps and directions of the first step that take about so many queries.

    Step t looks in first * sqrt(t + 1) directions, and takes some 20 queries more to find the boundary again.
    """
    steps = max(2, round((queries / 100) ** (2 / 3)))
    spent = sum((t + 1) ** 0.5 for t in range(steps))
    return steps, max(10, round((queries - 20 * steps) / spent))


def _starts(
    model: nn.Module, frame: Frame, x: Tensor, y: Tensor, points: Tensor, labels: Tensor, *, tries: int = 5
) -> tuple[Float[Tensor, "batch ..."], Bool[Tensor, " batch"]]:
    """A misclassified input for each row, in the frame, and whether there is one."""
    starts, found = frame.pack(x).clone(), torch.zeros(len(x), dtype=torch.bool, device=x.device)
    if len(x) == 0:
        return starts, found
    distance = torch.cdist(x.flatten(1), points.to(x).flatten(1))
    distance = distance.masked_fill(labels.to(y.device)[None] == y[:, None], torch.inf)
    order = distance.topk(min(tries, len(points)), dim=1, largest=False).indices
    for column in range(order.shape[1] + tries):
        rows = (~found).nonzero().squeeze(1)
        if len(rows) == 0:
            break
        if column < order.shape[1]:
            candidates = frame.pack(points[order[rows, column]].to(x))
        else:
            candidates = torch.rand_like(starts[rows])
        wrong = model(frame.unpack(candidates).to(x)).argmax(dim=1) != y[rows]
        starts[rows[wrong]], found[rows[wrong]] = candidates[wrong], True
    return starts, found
