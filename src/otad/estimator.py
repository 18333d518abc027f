"""The scikit-learn face: fit, predict, certify, explain, save, load."""

import copy
import time
from collections.abc import Iterator
from contextlib import contextmanager
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
from otad.defense import OTAD, CellInterpolation
from otad.errors import DataError, OTADError
from otad.explanation import Explanation, explain, explain_encoded
from otad.fitting import (
    check_parameters,
    fit_network,
    fit_refined,
    fit_retrieval,
    fixed_regularity,
    interpolated,
    measured_network,
    network_state,
    restored_backbone,
    restored_network,
    restored_refined,
    restored_retrieval,
    retrieval_state,
    train_backbone,
    training_fit,
    training_options,
    transport_of,
)
from otad.nn import EncodedStem
from otad.storage import SavedClassifier, describing_damage, read_classifier, write_classifier
from otad.transport import health

__all__ = ["Explanation", "OTADClassifier", "load_model"]

AT_ONCE = 256

# What is saved by its name and an underscore; models saved before there was one of the later have the value given.
LEARNED = ("classes", "n_features_in", "input_shape", "seed", "history", "health", "seconds")
LATER = {"refinement": None, "network_error": {}, "network_history": [], "embedding_history": []}


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
        epochs: of the backbone (what is trained after it has numbers of its own); None takes 12, or more where the data
            set is so small that this is under 500 steps.
        batch_size, learning_rate: of the backbone.
        strong_convexity, smoothness: l and L; both None searches the smallest feasible L for the ratio. The published
            neighbourhood setting is 0 and 2.
        ratio: l / L in that search; None is -1 for "global" and 0 for "neighborhood".
        smoothness_factor: the smallest L is multiplied by this ("neighborhood").
        branch: "lower", "upper", "mean"; None is "mean" for "global" and "lower" for "neighborhood".
        target_radius: train for certificates of this L2 radius ("refinement"), with pieces that start at training
            samples, instead of interpolating the transport map. Gives up the exact fit of the training set.
        refinement: what is trained with `target_radius`: "cells" (a power diagram, whose distance to other classes'
            cells is computed) or "potential" (a smooth potential on an orthogonal encoder, 1-Lipschitz).
        encoder: of cells: orthogonal layers below them, trained along: "dense", or "patches" (convolutions, of images);
            None trains the pieces on the inputs as they are, where images are certified within [0, 1]. Photographs and
            some tables want an encoder; digits and clothes do not.
        components: of cells: train them in so many principal components of the training samples (tables), so that
            noise in the other directions is not learned by heart. None, or as many as there are columns: all.
        deform: shift, turn and bend images a little while refining: helps digits, hurts clothes. Each piece of grey
            images without an encoder then comes in nine poses, too, which it need not learn, see `Poses`.
        refinement_options: of cells, what else may be chosen, as `otad compare` does: "pieces" of a class in the mean,
            the number of "poses" of each (images without an encoder; 1: as they are), "temperature" and "ramp" of the
            loss, "learning_rate" and "epochs" (see `refine_diagram`), "noise" on samples of tables with all their
            columns (see `Noise`).
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
        seed_: drawn from `random_state`, of all that is random in fit.
        refined_: with `target_radius`, the learned pieces and the stem below them; else None.
        refinement_: with `target_radius`, on the training set "before" and "after", accuracy, the share beyond it as
            training estimates it ("certified") and, of a potential, feature error, and one dict per epoch in "history";
            else None.
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
        refinement: str = "cells",
        encoder: str | None = None,
        components: int | None = None,
        deform: bool = True,
        refinement_options: dict[str, Any] | None = None,
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
        self.refinement = refinement
        self.encoder = encoder
        self.components = components
        self.deform = deform
        self.refinement_options = refinement_options
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
                of X, so bring columns to comparable scales first.
            y: (n,) labels of at least two classes.

        Raises:
            ValueError: data that cannot be used, or a parameter out of its range.
        """
        parameters = self.get_params(deep=False)
        check_parameters(parameters)
        inputs, labels = self._training_set(X, y)
        if self.encoder == "patches" and inputs.ndim != 4:
            raise ValueError(
                f"encoder='patches' needs images (n, c, h, w); X has shape {tuple(inputs.shape)}; take 'dense'"
            )
        if self.components is not None and inputs.ndim != 2:
            raise ValueError(f"components belong to tables (n, features); X has shape {tuple(inputs.shape)}")
        if (self.refinement_options or {}).get("poses", 1) > 1 and inputs.ndim != 4:
            raise ValueError("refinement_options: poses belong to images; leave them out")
        if "noise" in (self.refinement_options or {}) and inputs.ndim != 2:
            raise ValueError("noise belongs to tables (n, features); images are deformed, see deform")
        self.seed_ = int(check_random_state(self.random_state).randint(2**31 - 1))
        training = training_options(parameters, self.seed_)
        self.seconds_: dict[str, float] = {}
        with self._stage("train"):
            self.backbone_, self.history_ = train_backbone(parameters, inputs, labels, len(self.classes_), training)
        with self._stage("transport map"):
            self.transport_ = transport = transport_of(self.backbone_, inputs, labels)
            self.health_ = health(transport)
        with self._stage("retrieval"):
            found = fit_retrieval(parameters, inputs, labels, transport.samples, training)
            retrieval, self.embedding_history_ = found
        self.refined_, self.refinement_, self.network_error_, self.network_history_ = None, None, {}, []
        with self._stage("potential"):
            if self.target_radius is None:
                module = interpolated(parameters, self.backbone_, transport, retrieval)
            else:
                found = fit_refined(parameters, self.backbone_, transport, inputs, labels, training)
                self.refined_, self.refinement_ = found
                module = self.refined_.module()
        if self.interpolation == "network":
            with self._stage("network"):
                found = fit_network(parameters, module, training)
                module, self.network_error_, self.network_history_ = found
        self._keep(module)
        return self

    def _training_set(self, X: Any, y: Any) -> tuple[Tensor, Tensor]:
        X, y = validate_data(self, X, y, dtype=np.float32, allow_nd=True, ensure_min_samples=2)
        check_classification_targets(y)
        self.input_shape_ = tuple(X.shape[1:])
        self.classes_, encoded = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise DataError(f"fit needs samples of at least 2 classes; y has only one class, {self.classes_[0]!r}")
        return torch.from_numpy(np.ascontiguousarray(X)), torch.from_numpy(encoded.astype(np.int64))

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds_[name] = time.perf_counter() - started

    def _keep(self, module: OTAD) -> None:
        """The module, and what is known of it."""
        self.module_, self.stem_, self.head_ = module, module.stem, module.head
        potential = getattr(module.interpolation, "potential", None)
        bounds = fixed_regularity(self.get_params(deep=False))
        self.regularity_: Regularity | None = bounds if potential is None else potential.regularity
        self.lipschitz_: float | None = None if potential is None else potential.lipschitz

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

    def certify(self, X: Any, *, rounding: float = ROUNDING, box: tuple[float, float] | None = None) -> Certificate:
        """Radii within which `predict` provably does not change; see `otad.certificate.certify`.

        Args:
            X: as in `predict`.
            rounding: see `certify`.
            box: (0, 1) where only images count, which have no values outside of it; None for any perturbation.
        """
        found = certify(self.module_, self._inputs(X), rounding=rounding, box=box)
        return Certificate(self.classes_[found.label], found.radius, found.kind)

    def explain(self, X: Any, k: int = 10) -> Explanation:
        """The k training samples with the largest weights in each feature.

        Cells on an encoder are made of no samples; then the k nearest ones of the predicted class, in the points of the
        encoder, at equal weights.

        Args:
            X: as in `predict`.
            k: samples to name.
        """
        inputs, samples = self._inputs(X), self.transport_.samples
        if isinstance(self.module_.interpolation, CellInterpolation) and isinstance(self.module_.stem, EncodedStem):
            return explain_encoded(self.module_, self.transport_, inputs, k)
        return explain(self.module_, samples if self.refined_ is None else samples[self.refined_.pieces], inputs, k)

    def measure_network(self, X: Any) -> dict[str, float]:
        """How near the network comes to the exact solution at these samples; see `network_error_`.

        Args:
            X: as in `predict`.

        Raises:
            ValueError: the interpolation is no network.
        """
        return measured_network(self.module_, self._inputs(X))

    def interpolated(self) -> OTAD:
        """The transport map with its global potential, whatever was refined since: it is fitted anew."""
        check_is_fitted(self)
        return interpolated(self.get_params(deep=False), self.backbone_, self.transport_)

    def training_fit(self, module: OTAD | None = None) -> dict[str, float]:
        """How well the classifier fits the training set.

        Args:
            module: another one on the same transport map, such as `interpolated()`.

        Returns:
            "agreement", the share of training points that the classifier labels as the backbone does;
            "train_accuracy", "backbone_train_accuracy"; and unless refined, "feature_error", the largest
            |z(x_i) - z_i| in any coordinate. A refined potential reproduces no features; see `refinement_`.
        """
        check_is_fitted(self)
        return training_fit(self.module_ if module is None else module, self.backbone_, self.transport_)

    def save(self, folder: str | Path) -> None:
        """Write the fitted classifier as safetensors and JSON; the folder appears whole or not at all."""
        check_is_fitted(self)
        interpolation, refined = self.module_.interpolation, self.refined_
        names = [*LEARNED, *LATER, *(["feature_names_in"] if hasattr(self, "feature_names_in_") else [])]
        modules = {"backbone": self.backbone_.state_dict()}
        modules |= retrieval_state(interpolation) | network_state(interpolation)
        potential = getattr(interpolation, "potential", None)
        saved = SavedClassifier(
            parameters=self.get_params() | {"random_state": _number(self.random_state)},
            learned={name: getattr(self, f"{name}_") for name in names},
            modules=modules | ({} if refined is None else refined.state()),
            transport=self.transport_,
            potential=potential if isinstance(potential, BrenierPotential) else None,
            pieces=None if refined is None else refined.pieces,
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
            parameters = self.get_params(deep=False)
            check_parameters(parameters)
            learned = copy.deepcopy(LATER) | saved.learned
            for name in {*LEARNED, *learned}:
                setattr(self, f"{name}_", learned[name])
            self.transport_ = saved.transport
            self.backbone_ = restored_backbone(parameters, self.input_shape_, len(self.classes_), saved.modules)
            self.refined_ = restored_refined(self.backbone_, saved)
            if self.refined_ is not None and saved.potential is not None:
                self.refinement = "potential"  # folders from before there were cells do not say so
            if self.refined_ is None:
                retrieval = restored_retrieval(parameters, self.input_shape_, saved.modules)
                module = interpolated(parameters, self.backbone_, saved.transport, retrieval, saved.potential)
            else:
                module = self.refined_.module()
            if self.interpolation == "network":
                module = restored_network(parameters, module, self.network_error_, saved.modules)
            self._keep(module)
        return self

    def _logits(self, X: Any) -> Tensor:
        with torch.no_grad():
            logits = torch.cat([self.module_(part) for part in self._inputs(X).split(AT_ONCE)])
        if not logits.isfinite().all():
            raise OTADError("the model's logits are not finite; its weights are damaged or X is far out of range")
        return logits

    def _inputs(self, X: Any) -> Tensor:
        check_is_fitted(self)
        X = validate_data(self, X, reset=False, dtype=np.float32, allow_nd=True)
        if X.shape[1:] != self.input_shape_:
            raise DataError(f"X has samples of shape {X.shape[1:]}, but fit saw samples of shape {self.input_shape_}")
        return torch.from_numpy(np.ascontiguousarray(X))


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
