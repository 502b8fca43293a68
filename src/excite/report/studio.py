"""The page of the studio, whose figures its script draws from the answers of the local server."""

from __future__ import annotations

import functools
from importlib import resources
from typing import Any

import jinja2
import numpy as np

from excite.report.palette import heat

FILES = {
    "studio.js": "text/javascript; charset=utf-8",
    "studio.css": "text/css; charset=utf-8",
    "page.css": "text/css; charset=utf-8",
}
"""What the page asks for beside itself, with its media type."""

MAX_SCALE = 2.0
"""How far the slider goes: the largest enlargement of the paper (Li et al. 2019, Sect. 4.4)."""


def studio_page(about: dict[str, Any]) -> str:
    """The page as HTML text.

    Args:
        about: ``network``, ``run`` (or None), ``classes``, ``size`` (pixels), ``units`` (``name``, ``kind``,
            ``channels``, ``size``, ``range``, ``kernels``, ``branches``: the places of the smallest and the largest
            kernel), ``statistics`` (a file or None), ``report`` (whether there is one), ``max_bytes``.
    """
    kinds = [unit["kind"] for unit in about["units"]]
    named = {"se": "squeeze-and-excitation", "sk": "selective kernel"}
    units = " + ".join(f"{kinds.count(kind)} {name}" for kind, name in named.items() if kind in kinds)
    return (
        _templates()
        .get_template("studio.html")
        .render(
            about=about,
            facts=[
                ("Run", about["run"] or "none"),
                ("Units", units),
                ("Classes", f"{len(about['classes']):,}"),
                ("Input", f"{about['size']} × {about['size']} pixels"),
            ],
            has_se="se" in kinds,
            has_sk="sk" in kinds,
            max_scale=MAX_SCALE,
            max_megabytes=about["max_bytes"] // 1_000_000,
            data={**about, "heat": heat(np.linspace(0, 1, 64)).tolist()},
        )
    )


def studio_file(name: str) -> bytes:
    """The content of one of ``FILES``."""
    return resources.files("excite.report").joinpath("templates", name).read_bytes()


@functools.cache
def _templates() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("excite.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
