"""Self-contained HTML pages: templates beside this file, pictures inside the page."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from numpy.typing import NDArray
from PIL import Image


def render(template: str, **values: Any) -> str:
    """The page of a template in this folder; a value that it lacks is an error."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["figure"] = lambda value: "-" if value is None else f"{value:.3f}"
    environment.filters["signed"] = lambda value: "-" if value is None else f"{value:+.3f}"
    return environment.get_template(template).render(**values)


def data_uri(pixels: NDArray[np.uint8], kind: str, longer_side: int) -> str:
    """A picture [H, W, 3] as a `data:` URL, made smaller where a side is longer than `longer_side` pixels.

    Args:
        kind: `JPEG` for photographs, `PNG` for painted masks.
    """
    image = Image.fromarray(pixels)
    image.thumbnail((longer_side, longer_side))
    buffer = io.BytesIO()
    image.save(buffer, format=kind, optimize=True)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
