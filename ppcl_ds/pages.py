"""What reports and cards are made of: rendered templates, plots as PNG, PNGs that a page holds in itself."""

from __future__ import annotations

import base64
import io
import os
from typing import TYPE_CHECKING, Any

import jinja2

if TYPE_CHECKING:
    from matplotlib.figure import Figure

os.environ["MPLBACKEND"] = "Agg"  # no display, wherever figures are drawn; matplotlib itself takes a second to import


def render(package: str, template: str, **values: Any) -> str:
    """A template filled in.

    Args:
        package: in whose folder the template lies, such as `ppcl_ds.probing`.
        template: `NAME.html.jinja`, where values are escaped; or of plain text, where lines with a tag alone vanish.
    """
    page = template.endswith(".html.jinja")
    loader = jinja2.PackageLoader(package, ".")
    environment = jinja2.Environment(loader=loader, autoescape=page, trim_blocks=not page, lstrip_blocks=not page)
    return environment.get_template(template).render(**values)


def as_png(figure: Figure) -> bytes:
    """A figure as the bytes of a PNG; the figure is closed."""
    import matplotlib.pyplot as plt

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    plt.close(figure)
    return buffer.getvalue()


def inline(png: bytes) -> str:
    """A PNG as an address that a page can hold in itself."""
    return "data:image/png;base64," + base64.b64encode(png).decode()
