"""A model with the data it belongs to: scaling and names of columns, units of radii."""

import json
import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

import numpy as np

from otad.data import Dataset, Features, Scaling, load, load_features
from otad.errors import DataError, ModelFolderError
from otad.estimator import OTADClassifier
from otad.files import replacing_folder, write_json

__all__ = ["DataCard", "check_free", "read_model", "write_model"]

CARD = "data.json"
FORMAT = "otad data card, version 1"


@dataclass(frozen=True, eq=False)
class DataCard:
    """What a model must know about its data to be used on other data: `Dataset` without the samples.

    Attributes:
        name, split, units, box, feature_names, scaling, class_names: as in `Dataset`.
        shape: shape of one sample.
        label: name of the label column.
        n_train, n_test, seed: as the data were read, so that the test samples can be had again.
    """

    name: str
    split: str
    units: str
    box: tuple[float, float] | None
    feature_names: tuple[str, ...]
    scaling: Scaling | None
    class_names: tuple[str, ...]
    shape: tuple[int, ...]
    label: str = "label"
    n_train: int | None = None
    n_test: int | None = None
    seed: int = 0

    @classmethod
    def of(cls, data: Dataset, *, label: str = "label", seed: int = 0) -> Self:
        """The card of the data a model was trained on."""
        return cls(
            name=data.name,
            split=data.split,
            units=data.units,
            box=data.box,
            feature_names=tuple(data.feature_names),
            scaling=data.scaling,
            class_names=tuple(data.class_names),
            shape=tuple(data.x_train.shape[1:]),
            label=label,
            n_train=len(data.x_train),
            n_test=len(data.x_test),
            seed=seed,
        )

    def features(
        self, source: str, *, data_dir: str | os.PathLike[str] | None = None, label: str | None = None
    ) -> Features:
        """All samples of a source, scaled and ordered as the model expects them.

        Raises:
            DataError: the source cannot be used, or its samples are not of the model's kind.
        """
        label = self.label if label is None else label
        names = self.feature_names
        found = load_features(source, scaling=self.scaling, feature_names=names, label=label, data_dir=data_dir)
        self._check(found.x, found.name)
        return found

    def test_part(self, source: str, *, data_dir: str | os.PathLike[str] | None = None) -> Features:
        """The test samples of the model's own data, as it was tested on them.

        Raises:
            DataError: the source cannot be read.
        """
        data = load(
            source,
            data_dir=data_dir,
            n_train=self.n_train,
            n_test=self.n_test,
            seed=self.seed,
            label=self.label,
            scale="none" if self.scaling is None else self.scaling,
            feature_names=self.feature_names,
        )
        self._check(data.x_test, data.name)
        return Features(data.x_test, data.y_test, data.name, self.feature_names, np.arange(len(data.x_test)))

    def class_name(self, label: Any) -> str:
        """How a reader calls a class."""
        known = self.class_names
        if known and isinstance(label, int | np.integer) and 0 <= label < len(known):
            return known[label]
        return str(label)

    def to_dict(self) -> dict[str, Any]:
        """The card in JSON types."""
        card = {f.name: getattr(self, f.name) for f in fields(self)}
        return {"format": FORMAT} | card | {"scaling": None if self.scaling is None else self.scaling.to_dict()}

    @classmethod
    def from_dict(cls, card: Any) -> Self:
        """The card that `to_dict` wrote.

        Raises:
            ModelFolderError: it is another file, or of another version.
        """
        if not isinstance(card, dict) or card.get("format") != FORMAT:
            raise ModelFolderError(f"{CARD} is no {FORMAT}: written by another program or version; train again")
        try:
            return cls(
                name=str(card["name"]),
                split=str(card["split"]),
                units=str(card["units"]),
                box=None if card["box"] is None else (float(card["box"][0]), float(card["box"][1])),
                feature_names=tuple(str(name) for name in card["feature_names"]),
                scaling=None if card["scaling"] is None else Scaling.from_dict(card["scaling"]),
                class_names=tuple(str(name) for name in card["class_names"]),
                shape=tuple(int(size) for size in card["shape"]),
                label=str(card["label"]),
                n_train=card["n_train"],
                n_test=card["n_test"],
                seed=int(card["seed"]),
            )
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise ModelFolderError(f"{CARD} is damaged ({error}); train again") from error

    def _check(self, x: np.ndarray, name: str) -> None:
        if x.shape[1:] != self.shape:
            raise DataError(
                f"{name}: its samples have shape {x.shape[1:]}, the model expects {self.shape} "
                f"({self.name}); give data of the same kind"
            )


def write_model(clf: OTADClassifier, card: DataCard, folder: str | os.PathLike[str]) -> None:
    """Save a fitted classifier and its data card, both or neither.

    Raises:
        ModelFolderError: the folder holds something else.
    """
    folder = Path(folder)
    check_free(folder)
    with replacing_folder(folder) as aside:
        clf.save(aside)
        write_json(aside / CARD, card.to_dict())


def check_free(folder: Path) -> None:
    """Refuse to replace a folder that is not a model of ours.

    Raises:
        ModelFolderError: it holds something else.
    """
    foreign = folder.exists() and not folder.is_dir()
    foreign |= folder.is_dir() and any(folder.iterdir()) and not (folder / CARD).is_file()
    if foreign:
        raise ModelFolderError(f"{folder} exists and is no otad model; give another run folder or move it away")


def read_model(path: str | os.PathLike[str]) -> tuple[OTADClassifier, DataCard]:
    """The classifier and the data card of a run folder or of the model/ folder in it.

    Raises:
        ModelFolderError: there is no model, or it is damaged or foreign.
    """
    path = Path(path)
    if not path.exists():
        raise ModelFolderError(f"{path}: no such folder; give a run folder or its model/ folder")
    folder = path / "model" if (path / "model").is_dir() else path
    if not (folder / CARD).is_file():
        raise ModelFolderError(f"{path}: no otad model here (no {CARD}); give a run folder or its model/ folder")
    try:
        card = json.loads((folder / CARD).read_text("utf-8"))
    except ValueError as error:
        raise ModelFolderError(f"{folder / CARD}: damaged ({error}); train again") from error
    return OTADClassifier.load(folder), DataCard.from_dict(card)
