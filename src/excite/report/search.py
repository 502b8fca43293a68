"""The page of a search: the query and what was found, as pictures; one self-contained HTML file."""

from __future__ import annotations

import base64
import io
import os
import re
from pathlib import Path
from typing import Any

from PIL import Image

from excite.data.images import BrokenImageError, decode
from excite.report import wording
from excite.report.page import templates

_STEERING = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all control characters but tabs and ends of lines

SIDE = 480
"""The longer side of a picture on the page, in pixels."""


def search_page(result: dict[str, Any]) -> str:
    """The whole page as HTML text, with the pictures in it.

    A picture that has gone, or cannot be read any more, is told in its place.

    Args:
        result: what :func:`excite.verbs.search.search` gives.
    """
    query = result["query"]
    cards = [_card(hit) for hit in result["hits"]]
    template = templates().get_template("search.html")
    return template.render(
        title=legible(query.get("text") or Path(query["image"]).name),
        text=legible(query["text"]) if "text" in query else None,
        picture=_picture(query["image"]) if "image" in query else None,
        cards=cards,
        facts=_facts(result),
        plotly_js="",
    )


def legible(text: str) -> str:
    """A text without what cannot be written, and without what would steer a terminal.

    The name of a file may hold bytes that are no letters.
    """
    return _STEERING.sub("�", text.encode(errors="replace").decode())


def _facts(result: dict[str, Any]) -> list[tuple[str, str]]:
    kinds = " and ".join(f"{kind}s" for kind in result["among"])
    return [
        ("Index", legible(result["index"])),
        ("Searched", f"{result['items']:,} {kinds}"),
        ("Search took", wording.milliseconds(result["search_ms"])),
    ]


def _card(hit: dict[str, Any]) -> dict[str, Any]:
    path = hit["path"]
    return {
        "rank": hit["rank"],
        "score": wording.fixed(hit["score"], 3),
        "share": round(100 * max(0.0, min(1.0, hit["score"])), 1),
        "kind": hit["kind"],
        "name": legible(Path(path).name) if path else None,
        "path": legible(path) if path else None,
        "text": legible(hit["text"]) if hit["text"] else None,
        "picture": _picture(path) if path else None,
    }


def _picture(path: str) -> dict[str, Any]:
    """A small version as a data URI with its size, or why there is none."""
    # A folder cannot be read, and a pipe or a device might have no end.
    if os.path.exists(path) and not os.path.isfile(path):
        return {"missing": "is not a file"}
    try:
        pixels = decode(Path(path).read_bytes())
    except BrokenImageError as error:
        return {"missing": f"cannot be read: {error}"}
    except FileNotFoundError:
        return {"missing": "is not there any more"}
    except OSError as error:
        return {"missing": f"cannot be read: {(error.strerror or str(error)).lower()}"}
    image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    content = io.BytesIO()
    # What was photographed is smaller as JPEG, what was drawn is kept as it is.
    small = image.width * image.height < 1 << 14
    image.save(content, "PNG") if small else image.save(content, "JPEG", quality=84)
    data = base64.b64encode(content.getvalue()).decode()
    return {
        "uri": f"data:image/{'png' if small else 'jpeg'};base64,{data}",
        "width": image.width,
        "height": image.height,
    }
