"""Real data: images, tables and cells, by name or from files."""

from otad.data.dataset import Dataset, Features
from otad.data.loading import load, load_features
from otad.data.named import NAMES
from otad.data.scaling import Scaling

__all__ = ["NAMES", "Dataset", "Features", "Scaling", "load", "load_features"]
