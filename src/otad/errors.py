"""The error tree. Every message says what is wrong, where, and what to do.

OTADError
├── DataError (ValueError)         input that cannot be used: a file, a column, a value
├── InfeasibleError (ValueError)   no potential of the asked regularity fits the points
├── ContradictionError             results that cannot all be true, such as a proof that an attack refutes
├── ModelFolderError (ValueError)  a saved model that is damaged, foreign or of another version
└── MissingExtraError (ImportError) an optional package that is not installed
"""

__all__ = ["ContradictionError", "DataError", "InfeasibleError", "MissingExtraError", "ModelFolderError", "OTADError"]


class OTADError(Exception):
    """Base of all errors that otad raises on purpose."""


class DataError(OTADError, ValueError):
    """Input data that cannot be used."""


class InfeasibleError(OTADError, ValueError):
    """No potential with the asked curvature bounds fits the points."""


class ContradictionError(OTADError):
    """Results that cannot all be true."""


class ModelFolderError(OTADError, ValueError):
    """A model folder that cannot be read."""


class MissingExtraError(OTADError, ImportError):
    """An optional package is needed and not installed."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"the package {package} is needed here; install it with: pip install 'otad[{extra}]'")
