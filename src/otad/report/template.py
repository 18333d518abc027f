"""What the HTML pages share: templates, their filters, plots inside the page."""

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from otad.report.thumbnails import svg_uri
from otad.report.wording import number, percent, radius_words

__all__ = ["radius", "render", "uri"]


def render(name: str, **values: Any) -> str:
    """The template of this name, filled in; values are escaped."""
    environment = Environment(
        loader=PackageLoader("otad.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "number": number, "radius": radius}
    return environment.get_template(name).render(**values)


def radius(key: str) -> str:
    """The words of a radius on one line: "L2" and its number stay together."""
    return radius_words(key).replace(" ", "\N{NO-BREAK SPACE}")


def uri(svg: str | None) -> Markup | None:
    """A plot as a data URI; None where there is none."""
    # Base64 holds no character that needs escaping.
    return None if svg is None else Markup(svg_uri(svg))
