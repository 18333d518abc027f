"""The scikit-learn face: fit, predict, certify, explain, save, load."""

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, check_random_state, validate_data
from torch import Tensor

from otad.certificate import ROUNDING, Certificate, certify
from otad.cip import BrenierPotential, Regularity
from otad.defense import OTAD, GlobalInterpolation, NeighborhoodInterpolation, NetworkInterpolation
from otad.errors import DataError, OTADError
from otad.nn import BACKBONES, Backbone, EncodedStem, MaxMinEncoder, build_backbone
from otad.nn.cip_net import CIPNet, Imitation
from otad.nn.embedding import build_embedding
from otad.retrieval import Retrieval
from otad.storage import SavedClassifier, describing_damage, read_classifier, write_classifier
from otad.train import Deformations, anchored_potential, fit_backbone, fit_embedding, refine
from otad.train.cip_net import compare, imitate
from otad.transport import health, read_transport_map

__all__ = ["Explanation", "OTADClassifier", "load_model"]

logger = logging.getLogger(__name__)

PIECES = 500  # of a refined potential
ENCODED = 256  # units of the encoder under it, at most
ANCHORS = 3.0  # length of the features that its pieces start with, in target radii

ALLOWED = {
    "interpolation": ("global", "neighborhood", "network"),
    "backbone": tuple(BACKBONES),
    "branch": (None, "lower", "upper", "mean"),
    "infeasible": ("relax", "raise"),
    "retrieval": ("euclidean", "learned", "robust"),
}


@dataclass(frozen=True)
class Explanation:
    """The training samples that make up each feature.

    Attributes:
        indices: of training samples, most weight first, shape (n, k).
        weights: their convex weights, shape (n, k); rows sum to 1 where k is large enough to hold all active samples.
    """

    indices: np.ndarray
    weights: np.ndarray


class OTADClassifier(ClassifierMixin, BaseEstimator):
    """A classifier that reproduces its backbone's training features and comes with certificates.

    A backbone is trained under a transport cost until it is nearly an optimal-transport map; that map is then
    interpolated by convex integration, so that its Lipschitz constant is known.

    Args:
        interpolation: "global" (one potential for all training points), "neighborhood" (the published OTAD) or
            "network" (the published OTAD-NN: a network guesses what "neighborhood" solves; no certificate).
        backbone: "mlp", "resnet" (images only) or "transformer".
        n_blocks, width: residual blocks (layers of a Transformer) and their hidden units (channels of a ResNet's first
            stage, coordinates of a token); None: chosen for the network and the data.
        backbone_options: what only this network has, see `otad.nn.build_backbone`, such as {"patch": 4, "heads": 12}.
        alpha: weight of the transport cost; 0 trains an ordinary network, whose map has no small Lipschitz constant.
        margin: weight of the margin that counts the map's Lipschitz quotient while training.
        epochs: of training; None takes 12, or more where the data set is so small that this is under 500 steps.
        batch_size, learning_rate: of training.
        strong_convexity, smoothness: l and L; both None searches the smallest feasible L for the ratio. The published
            neighbourhood setting is 0 and 2.
        ratio: l / L in that search; None is -1 for "global" and 0 for "neighborhood".
        smoothness_factor: the smallest L is multiplied by this ("neighborhood").
        branch: "lower", "upper", "mean"; None is "mean" for "global" and "lower" for "neighborhood".
        target_radius: train another global potential for certificates of this L2 radius ("refinement"): pieces that
            start at training samples, on an orthogonal encoder, all of it 1-Lipschitz. Gives up the exact fit of the
            training set and evaluates the "lower" branch. None interpolates the transport map.
        n_neighbors: K of "neighborhood" and "network".
        network_width, network_layers, network_heads: size of "network", see `CIPNet` (published: 2048, 6, 8).
        network_problems: solved problems that it learns from (published: 50,000).
        infeasible: "relax" or "raise", see `NeighborhoodInterpolation`.
        retrieval: the metric that chooses the neighbours of "neighborhood" and "network": "euclidean" (in stem units),
            "learned" (published: an embedding trained by triplets; no certificate but the trivial one), "robust" (the
            same with a known Lipschitz constant, hence certificates of "neighborhood").
        embedding_epochs, embedding_width: of that embedding; None for the defaults of `fit_embedding` and
            `build_embedding`.
        checkpoint: folder for the state of training after each epoch.
        resume: go on from that state.
        device: "cpu", "cuda", or None to leave it to accelerate. The fitted module lies on the CPU.
        mixed_precision: "no", "bf16" or "fp16", for training.
        verbose: progress bars.
        random_state: seed of weights and batch order.

    Attributes:
        classes_, n_features_in_, input_shape_: as seen in fit.
        module_: `OTAD`, inputs as given to fit -> logits.
        backbone_: the undefended network, inputs -> logits.
        transport_: `TransportMap`.
        embedding_history_: one dict per epoch of the embedding, where `retrieval` has one.
        stem_, head_: of `module_`; the backbone's, unless refined.
        history_: one dict per epoch; health_: see `otad.transport.health`; seconds_: per stage.
        regularity_, lipschitz_: of the global potential (fixed bounds or None for the others).
        refinement_: with `target_radius`, accuracy, certified accuracy and feature error on the training set "before"
            and "after", and one dict per epoch in "history"; else None.
        network_error_: how near "network" comes to the exact solutions of held-out problems, {kind of query: {figure:
            value}} (see `otad.nn.cip_net.Imitation`); empty for the others. network_history_: one dict per epoch.

    Example:
        >>> from sklearn.datasets import load_digits
        >>> from otad import OTADClassifier
        >>> X, y = load_digits(return_X_y=True)
        >>> clf = OTADClassifier(epochs=20).fit(X[:1000] / 16, y[:1000])
        >>> certificate = clf.certify(X[1000:] / 16)

    Source: Gai, Wang, Zhang, arXiv 2408.00329.
    """

    n_features_in_: int
    feature_names_in_: np.ndarray

    def __init__(
        self,
        interpolation: str = "global",
        *,
        backbone: str = "mlp",
        n_blocks: int | None = None,
        width: int | None = None,
        backbone_options: dict[str, Any] | None = None,
        alpha: float = 1e-3,
        margin: float = 0.5,
        epochs: int | None = None,
        batch_size: int = 128,
        learning_rate: float = 1e-3,
        strong_convexity: float | None = None,
        smoothness: float | None = None,
        ratio: float | None = None,
        smoothness_factor: float = 1.0,
        branch: str | None = None,
        target_radius: float | None = None,
        n_neighbors: int = 10,
        infeasible: str = "relax",
        retrieval: str = "euclidean",
        embedding_epochs: int | None = None,
        embedding_width: int | None = None,
        network_width: int = 32,
        network_layers: int = 2,
        network_heads: int = 4,
        network_problems: int = 50_000,
        checkpoint: str | Path | None = None,
        resume: bool = False,
        device: str | None = None,
        mixed_precision: str = "no",
        verbose: bool = False,
        random_state: Any = None,
    ) -> None:
        self.interpolation = interpolation
        self.backbone = backbone
        self.n_blocks = n_blocks
        self.width = width
        self.backbone_options = backbone_options
        self.alpha = alpha
        self.margin = margin
        self.epochs = epochs
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.strong_convexity = strong_convexity
        self.smoothness = smoothness
        self.ratio = ratio
        self.smoothness_factor = smoothness_factor
        self.branch = branch
        self.target_radius = target_radius
        self.n_neighbors = n_neighbors
        self.infeasible = infeasible
        self.network_width = network_width
        self.network_layers = network_layers
        self.network_heads = network_heads
        self.network_problems = network_problems
        self.retrieval = retrieval
        self.embedding_epochs = embedding_epochs
        self.embedding_width = embedding_width
        self.checkpoint = checkpoint
        self.resume = resume
        self.device = device
        self.mixed_precision = mixed_precision
        self.verbose = verbose
        self.random_state = random_state

    def fit(self, X: Any, y: Any) -> "OTADClassifier":
        """Train the backbone, read off the transport map, fit the potential.

        Args:
            X: (n, features), or images (n, c, h, w) in [0, 1]; arrays or a data frame. Certificates are in the units
                of X,
                so bring columns to comparable scales first.
            y: (n,) labels of at least two classes.

        Raises:
            ValueError: data that cannot be used, or a parameter out of its range.
        """
        self._check_parameters()
        X, y = validate_data(self, X, y, dtype=np.float32, allow_nd=True, ensure_min_samples=2)
        check_classification_targets(y)
        self.input_shape_ = tuple(X.shape[1:])
        self.classes_, encoded = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise DataError(f"fit needs samples of at least 2 classes; y has only one class, {self.classes_[0]!r}")
        seed = self.seed_ = int(check_random_state(self.random_state).randint(2**31 - 1))
        inputs, labels = torch.from_numpy(np.ascontiguousarray(X)), torch.from_numpy(encoded.astype(np.int64))

        self.seconds_: dict[str, float] = {}
        started = time.perf_counter()
        self._train(inputs, labels, seed)
        started = self._lap("train", started)
        self.transport_ = read_transport_map(self.backbone_, inputs, labels)
        if not self.transport_.z.isfinite().all():
            raise OTADError("training diverged: features are not finite; lower learning_rate or scale the columns of X")
        if self.transport_.conflicts:
            logger.warning("%d points carry samples of different classes", self.transport_.conflicts)
        self.health_ = health(self.transport_)
        started = self._lap("transport map", started)
        retrieval = self._learn_retrieval(inputs, labels, seed)
        started = self._lap("retrieval", started)
        self.stem_, self.head_, self.pieces_, self.refinement_ = self.backbone_.stem, self.backbone_.head, None, None
        potential = None if self.target_radius is None else self._refined(inputs, labels, seed)
        self.module_ = self._defended(potential, retrieval)
        started = self._lap("potential", started)
        self.network_error_, self.network_history_ = {}, []
        if self.interpolation == "network":
            self._imitate(seed)
            self._lap("network", started)
        return self

    def _train(self, inputs: Tensor, labels: Tensor, seed: int) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.backbone_ = self._untrained(inputs.mean(0))
        history = fit_backbone(
            self.backbone_,
            inputs,
            labels,
            alpha=self.alpha,
            margin=self.margin,
            epochs=self._epochs(len(inputs)),
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            **self._run_options(seed),
        )
        self.history_ = [vars(epoch).copy() for epoch in history]

    def _imitate(self, seed: int) -> None:
        """Put a network in place of the solver that the module holds.

        What it learns from is drawn in stem space; a learned or robust retrieval embeds the inputs of these points, by
        `stem.inverse`, so that their neighbours are chosen as those of any input are.
        """
        solver, head = self.module_.interpolation, self.backbone_.head
        assert isinstance(solver, NeighborhoodInterpolation)
        inverse: Callable[[Tensor], Tensor] = self.backbone_.stem.inverse  # type: ignore[assignment]
        interpolation, found, history = imitate(
            solver,
            head,
            coordinates=lambda points: self.module_.coordinates(inverse(points)),
            width=self.network_width,
            layers=self.network_layers,
            heads=self.network_heads,
            n_problems=self.network_problems,
            seed=seed,
            checkpoint=Path(self.checkpoint) if self.checkpoint is not None else None,
            resume=self.resume,
            device=self.device,
            progress=self.verbose,
        )
        self.network_error_ = {queries: imitation.to_dict() for queries, imitation in found.items()}
        self.network_history_ = [vars(epoch).copy() for epoch in history]
        for queries, imitation in found.items():
            if imitation.near:
                logger.info("CIP-net on %s: %s", queries, imitation)
            else:
                logger.warning("the network is far from the exact solution on %s: %s", queries, imitation)
        self.module_ = OTAD(self.backbone_.stem, interpolation, head)

    def _untrained(self, mean: Tensor) -> Backbone:
        sizes = {"n_blocks": self.n_blocks, "width": self.width, "options": self.backbone_options}
        return build_backbone(self.backbone, mean, len(self.classes_), **sizes)

    def _learn_retrieval(self, inputs: Tensor, labels: Tensor, seed: int) -> Retrieval | None:
        if self.retrieval == "euclidean":
            return None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            embedding = build_embedding(self.retrieval, inputs.mean(0), self.embedding_width)
        history = fit_embedding(embedding, inputs, labels, epochs=self.embedding_epochs, **self._run_options(seed))
        self.embedding_history_ = [vars(epoch).copy() for epoch in history]
        retrieval = Retrieval.of(embedding, inputs[self.transport_.samples])
        if not retrieval.points.isfinite().all():
            raise OTADError("training the embedding diverged: coordinates are not finite; scale the columns of X")
        return retrieval

    def _run_options(self, seed: int) -> dict[str, Any]:
        """Of every training loop."""
        return {
            "seed": seed,
            "checkpoint": Path(self.checkpoint) if self.checkpoint is not None else None,
            "resume": self.resume,
            "device": self.device,
            "mixed_precision": self.mixed_precision,
            "progress": self.verbose,
        }

    def _epochs(self, n: int) -> int:
        if self.epochs is not None:
            return self.epochs
        return max(12, math.ceil(500 / math.ceil(n / self.batch_size)))

    def _lap(self, stage: str, started: float) -> float:
        now = time.perf_counter()
        self.seconds_[stage] = now - started
        return now

    def _bounds(self) -> Regularity | None:
        if self.smoothness is None:
            return None
        return Regularity(self.strong_convexity if self.strong_convexity is not None else 0.0, self.smoothness)

    def _refined(self, inputs: Tensor, labels: Tensor, seed: int) -> BrenierPotential:
        """A potential trained on all samples, on an encoder trained along; its pieces start at some of the samples."""
        radius = float(self.target_radius)  # type: ignore[arg-type]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.stem_, self.head_ = self._encoded()
            self.pieces_ = torch.randperm(len(self.transport_.x))[:PIECES]
        chosen = self.transport_.samples[self.pieces_]
        with torch.no_grad():
            start = anchored_potential(
                self.stem_(inputs[chosen]), self.transport_.y[self.pieces_], self.head_, ANCHORS * radius
            )
        found = refine(
            start,
            self.head_,
            self.stem_,
            inputs,
            labels,
            target_radius=radius,
            augment=Deformations() if inputs.ndim == 4 else None,
            seed=seed,
            checkpoint=Path(self.checkpoint) if self.checkpoint is not None else None,
            resume=self.resume,
            progress=self.verbose,
        )
        history = [vars(epoch).copy() for epoch in found.history]
        self.refinement_ = {"before": found.before, "after": found.after, "history": history}
        return found.potential

    def _encoded(self) -> tuple[EncodedStem, torch.nn.Linear]:
        """A stem with an encoder, and a head of orthonormal rows that is not trained."""
        d = math.prod(self.input_shape_)
        width = min(ENCODED, max(2, d - d % 2))
        head = torch.nn.Linear(width, len(self.classes_)).requires_grad_(False)
        torch.nn.init.orthogonal_(head.weight)
        torch.nn.init.zeros_(head.bias)
        return EncodedStem(self.backbone_.stem, MaxMinEncoder(d, width)), head

    def _defended(self, potential: BrenierPotential | None = None, retrieval: Retrieval | None = None) -> OTAD:
        transport, regularity = self.transport_, self._bounds()
        interpolation: torch.nn.Module
        if self.interpolation == "global":
            ratio = -1.0 if self.ratio is None else self.ratio
            if potential is None:
                potential = BrenierPotential.fit(transport.x, transport.z, ratio, regularity=regularity)
            # A refined potential has learned its lower branch; the upper one would be another function.
            branch = "lower" if self.pieces_ is not None else self.branch or "mean"
            interpolation = GlobalInterpolation(potential, branch)  # type: ignore[arg-type]
            self.regularity_, self.lipschitz_ = potential.regularity, potential.lipschitz
        else:
            interpolation = NeighborhoodInterpolation(
                transport.x,
                transport.z,
                k=self.n_neighbors,
                retrieval=retrieval,
                regularity=regularity,
                ratio=0.0 if self.ratio is None else self.ratio,
                factor=self.smoothness_factor,
                branch=self.branch or "lower",  # type: ignore[arg-type]
                infeasible=self.infeasible,  # type: ignore[arg-type]
            )
            self.regularity_, self.lipschitz_ = regularity, None
        return OTAD(self.stem_, interpolation, self.head_)

    def decision_function(self, X: Any) -> np.ndarray:
        """Logits (n, classes); for two classes their difference (n,), positive for classes_[1]."""
        logits = self._logits(X).numpy()
        return logits[:, 1] - logits[:, 0] if len(self.classes_) == 2 else logits

    def predict(self, X: Any) -> np.ndarray:
        """Labels (n,)."""
        chosen = self._logits(X).argmax(1).numpy()
        return self.classes_[chosen]

    def predict_proba(self, X: Any) -> np.ndarray:
        """Softmax of the logits (n, classes); not calibrated."""
        return self._logits(X).softmax(1).numpy()

    def certify(self, X: Any, *, rounding: float = ROUNDING) -> Certificate:
        """Radii within which `predict` provably does not change; see `otad.certificate.certify`."""
        found = certify(self.module_, self._inputs(X), rounding=rounding)
        return Certificate(self.classes_[found.label], found.radius, found.kind)

    def explain(self, X: Any, k: int = 10) -> Explanation:
        """The k training samples with the largest weights in each feature.

        Args:
            X: as in `predict`.
            k: samples to name.
        """
        inputs = self._inputs(X)
        rows = [self._explain(part, k) for part in inputs.split(256)]
        return Explanation(np.concatenate([r[0] for r in rows]), np.concatenate([r[1] for r in rows]))

    def _explain(self, inputs: Tensor, k: int) -> tuple[np.ndarray, np.ndarray]:
        with torch.no_grad():
            stats = self.module_.features(inputs).stats
        # A point may carry weight in the lower and in the upper potential: add them up.
        samples = self.transport_.samples if self.pieces_ is None else self.transport_.samples[self.pieces_]
        dense = torch.zeros(len(inputs), len(samples), dtype=torch.float64)
        dense.scatter_add_(1, stats["indices"], stats["weights"])
        best = dense.topk(min(k, dense.shape[1]), dim=1)
        return samples[best.indices].numpy(), best.values.numpy()

    def measure_network(self, X: Any) -> dict[str, float]:
        """How near the network comes to the exact solution at these samples; see `network_error_`.

        Args:
            X: as in `predict`.

        Raises:
            ValueError: the interpolation is no network.
        """
        inputs, module = self._inputs(X), self.module_
        interpolation = module.interpolation
        if not isinstance(interpolation, NetworkInterpolation):
            raise ValueError(f"interpolation={self.interpolation!r} has no network to measure")
        solver = interpolation.solver

        def query(part: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            x = module.stem(part).double()
            return x, *solver.neighbors(x, module.coordinates(part))[:2]

        return compare(solver, interpolation.net, module.head, map(query, inputs.split(256))).to_dict()

    def training_fit(self) -> dict[str, float]:
        """How exactly the interpolant reproduces the training set.

        Returns:
            "feature_error", the largest |z(x_i) - z_i| in any coordinate; "agreement", the share of training points
            that the classifier labels as the backbone does; "train_accuracy", "backbone_train_accuracy".

        Raises:
            ValueError: the potential was refined, hence interpolates nothing.
        """
        check_is_fitted(self)
        if self.pieces_ is not None:
            raise ValueError("a refined potential interpolates nothing; see refinement_ for its fit before and after")
        transport, head, interpolation = self.transport_, self.backbone_.head, self.module_.interpolation
        parts = transport.x.split(256)
        retrieval = interpolation.retrieval
        where = [None] * len(parts) if retrieval is None else retrieval.points.split(256)  # type: ignore[union-attr]
        with torch.no_grad():
            z = torch.cat([interpolation(part, at).value for part, at in zip(parts, where)])
            ours, theirs = head(z).argmax(1), head(transport.z).argmax(1)
        weight = transport.counts.double() / transport.counts.sum()
        return {
            "feature_error": float((z - transport.z).abs().amax()),
            "agreement": float((weight * (ours == theirs)).sum()),
            "train_accuracy": float((weight * (ours == transport.y)).sum()),
            "backbone_train_accuracy": float((weight * (theirs == transport.y)).sum()),
        }

    def save(self, folder: str | Path) -> None:
        """Write the fitted classifier as safetensors and JSON; the folder appears whole or not at all."""
        check_is_fitted(self)
        interpolation = self.module_.interpolation
        potential, retrieval = getattr(interpolation, "potential", None), interpolation.retrieval
        modules = {"backbone": self.backbone_.state_dict()}
        learned = {name: getattr(self, f"{name}_") for name in LEARNED}
        learned |= {"network_error": self.network_error_, "network_history": self.network_history_}
        if isinstance(retrieval, Retrieval):
            modules["retrieval"] = retrieval.state_dict()
            learned["embedding_history"] = self.embedding_history_
        if isinstance(interpolation, NetworkInterpolation):
            modules["network"] = interpolation.net.state_dict()
        if hasattr(self, "feature_names_in_"):
            learned["feature_names_in"] = self.feature_names_in_
        if isinstance(self.stem_, EncodedStem):
            modules |= {"encoders": self.stem_.encoders.state_dict(), "head": self.head_.state_dict()}
        saved = SavedClassifier(
            parameters=self.get_params() | {"random_state": _number(self.random_state)},
            learned=learned,
            modules=modules,
            transport=self.transport_,
            potential=potential if isinstance(potential, BrenierPotential) else None,
            pieces=self.pieces_,
        )
        write_classifier(Path(folder), saved)

    @classmethod
    def load(cls, folder: str | Path) -> "OTADClassifier":
        """Read a classifier that `save` wrote.

        Raises:
            ModelFolderError: the folder is missing, damaged, or of something else.
        """
        saved = read_classifier(Path(folder))
        with describing_damage(Path(folder)), torch.random.fork_rng(devices=[]):
            self = cls(**saved.parameters)
            self._check_parameters()
            self.network_error_, self.network_history_ = {}, []  # in models saved before there was a network
            for name in {*LEARNED, *saved.learned}:
                setattr(self, f"{name}_", saved.learned[name])
            self.transport_ = saved.transport
            self.backbone_ = self._untrained(torch.zeros(self.input_shape_))
            self.backbone_.load_state_dict(saved.modules["backbone"])
            self.backbone_.eval().requires_grad_(False)
            self.stem_, self.head_, self.pieces_ = self.backbone_.stem, self.backbone_.head, saved.pieces
            if self.pieces_ is not None:
                self.stem_, self.head_ = self._encoded()
                self.stem_.encoders.load_state_dict(saved.modules["encoders"])
                self.head_.load_state_dict(saved.modules["head"])
            self.module_ = self._defended(saved.potential, self._restored_retrieval(saved.modules))
            if self.interpolation == "network":
                self._restore_network(saved.modules["network"])
        return self

    def _restore_network(self, weights: dict[str, Tensor]) -> None:
        """Put a saved network in place of the solver that the module holds."""
        net = CIPNet(self.network_width, self.network_layers, self.network_heads)
        net.load_state_dict(weights)
        imitation = Imitation(**self.network_error_["new samples"])  # type: ignore[arg-type]
        interpolation = NetworkInterpolation(self.module_.interpolation, net, imitation)  # type: ignore[arg-type]
        self.module_ = OTAD(self.backbone_.stem, interpolation, self.backbone_.head)

    def _restored_retrieval(self, modules: dict[str, dict[str, Tensor]]) -> Retrieval | None:
        if self.retrieval == "euclidean":
            return None
        state = dict(modules["retrieval"])
        points = state.pop("points")
        embedding = build_embedding(self.retrieval, torch.zeros(self.input_shape_), self.embedding_width)
        weights = {name.removeprefix("embedding."): value for name, value in state.items()}
        embedding.load_state_dict(weights, assign=True)  # in the precision of the file
        return Retrieval(embedding, points)

    def _logits(self, X: Any) -> Tensor:
        with torch.no_grad():
            logits = torch.cat([self.module_(part) for part in self._inputs(X).split(256)])
        if not logits.isfinite().all():
            raise OTADError("the model's logits are not finite; its weights are damaged or X is far out of range")
        return logits

    def _inputs(self, X: Any) -> Tensor:
        check_is_fitted(self)
        X = validate_data(self, X, reset=False, dtype=np.float32, allow_nd=True)
        if X.shape[1:] != self.input_shape_:
            raise DataError(f"X has samples of shape {X.shape[1:]}, but fit saw samples of shape {self.input_shape_}")
        return torch.from_numpy(np.ascontiguousarray(X))

    def _check_parameters(self) -> None:
        for name, allowed in ALLOWED.items():
            if getattr(self, name) not in allowed:
                options = ", ".join(map(repr, allowed))
                raise ValueError(f"{name} must be one of {options}; got {getattr(self, name)!r}")
        optional = ("epochs", "n_blocks", "embedding_epochs", "embedding_width")
        sizes = ("network_width", "network_layers", "network_heads", "network_problems")
        for name in ("batch_size", "n_neighbors", *optional, *sizes):
            value = getattr(self, name)
            if name in optional and value is None:
                continue
            if not (isinstance(value, int | np.integer) and value >= 1):
                raise ValueError(f"{name} must be a whole number of at least 1; got {value!r}")
        for name, least in {"alpha": 0, "margin": 0, "smoothness_factor": 1}.items():
            if not least <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a number of at least {least}; got {getattr(self, name)!r}")
        if self.ratio is not None and not -math.inf < self.ratio <= 0:
            raise ValueError(f"ratio = l / L must be a number of at most 0; got {self.ratio!r}")
        if self.smoothness is None and self.strong_convexity is not None:
            raise ValueError(
                "strong_convexity needs smoothness beside it; or give ratio = l / L to search the smallest L"
            )
        if self.interpolation == "global" and self.smoothness_factor != 1:
            raise ValueError("smoothness_factor belongs to interpolation='neighborhood'; give smoothness for 'global'")
        if self.interpolation == "network":
            with torch.device("meta"):  # for its checks alone
                CIPNet(self.network_width, self.network_layers, self.network_heads)
            if (
                self.branch not in (None, "lower")
                or self.ratio not in (None, 0)
                or self.strong_convexity not in (None, 0)
            ):
                raise ValueError("interpolation='network' imitates branch 'lower' with l = 0: leave branch, ratio out")
        if self.interpolation == "global" and self.retrieval != "euclidean":
            raise ValueError(
                f"retrieval={self.retrieval!r} chooses neighbours, and interpolation='global' has none; "
                "give interpolation='neighborhood' or 'network'"
            )
        if self.retrieval == "euclidean" and (self.embedding_epochs, self.embedding_width) != (None, None):
            raise ValueError("embedding_epochs and embedding_width belong to retrieval='learned' or 'robust'")
        if self.retrieval == "robust" and (self.embedding_width or 2) % 2:
            raise ValueError(f"embedding_width must be even for retrieval='robust'; got {self.embedding_width!r}")
        if self.target_radius is not None:
            if not 0 < self.target_radius < math.inf:
                raise ValueError(f"target_radius must be a positive number or None; got {self.target_radius!r}")
            if self.interpolation != "global" or self.branch not in (None, "lower") or self.smoothness is not None:
                raise ValueError("target_radius needs interpolation='global', branch None or 'lower', smoothness None")
        if self.width is not None and not self.width >= 1:
            raise ValueError(f"width must be at least 1; got {self.width!r}")
        if self.device not in DEVICES:
            raise ValueError(f"device must be one of {', '.join(map(repr, DEVICES))}; got {self.device!r}")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device 'cuda' was asked for, but PyTorch finds no CUDA device; leave it out or use 'cpu'")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be positive; got {self.learning_rate!r}")
        self._bounds()


def load_model(folder: str | Path) -> OTAD:
    """The defended module of a saved classifier: inputs as given to fit -> logits, frozen, in evaluation mode.

    For tools that want a `torch.nn.Module` and nothing else, as RobustBench's function of this name gives one.

    Args:
        folder: what `OTADClassifier.save` wrote, or a run folder, which has it in model/.

    Raises:
        ModelFolderError: the folder is missing, damaged, or of something else.
    """
    folder = Path(folder)
    return OTADClassifier.load(folder / "model" if (folder / "model").is_dir() else folder).module_


def _number(random_state: Any) -> int | None:
    """What of a random state JSON can hold; the seed drawn from it is kept beside."""
    return int(random_state) if isinstance(random_state, int | np.integer) else None


DEVICES = (None, "cpu", "cuda")
LEARNED = ("classes", "n_features_in", "input_shape", "seed", "history", "health", "seconds", "refinement")
