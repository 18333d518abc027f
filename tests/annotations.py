"""The checker behind every annotation of otad while tests run."""

from typing import Any

from beartype import BeartypeConf, beartype
from beartype.roar import BeartypeDecorHintPep673Exception

__all__ = ["check"]

# An int is a fine float, as Python and pyright have it.
_checked = beartype(conf=BeartypeConf(is_pep484_tower=True))


def check(thing: Any) -> Any:
    """`thing` with its annotations checked at every call."""
    if getattr(thing, "__qualname__", "") == "OTADClassifier.__init__":
        # A scikit-learn constructor only stores what it is given; fit is what judges it.
        return thing
    try:
        return _checked(thing)
    except BeartypeDecorHintPep673Exception:
        # The hook decorates methods before their class exists, where beartype cannot know what Self is.
        return thing
