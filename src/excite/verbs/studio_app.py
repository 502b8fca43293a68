"""The application behind the studio: a page, and an answer for each image that is dropped on it.

It is for the person at this machine alone. Whoever else reaches it, through a page that the browser has open or a
name that was made to point here (DNS rebinding), is refused: by the Host header, by the Origin header, and by never
allowing a page of another origin to read an answer. Nothing that is uploaded is written anywhere.
"""

from __future__ import annotations

import io
import logging
import threading
from collections.abc import Awaitable, Callable
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from excite.data.images import BrokenImageError
from excite.errors import ExciteError, UsageError
from excite.report.studio import FILES, studio_file, studio_page
from excite.verbs.explain_image import Viewer

log = logging.getLogger(__name__)

MAX_BYTES = 20_000_000
MAX_PIXELS = 50_000_000
MAX_SCALE = 4.0
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
"""What is taken: Pillow's other formats start programs, or are not what a browser hands over."""
HOSTS = ("127.0.0.1", "localhost")
REPORT = "explain.html"
"""What ``excite explain`` leaves in a run's ``reports``."""

_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src data: blob:; connect-src 'self'; "
    "frame-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
# The report is whole in itself and brings its own policy; here it may only stand in the studio's frame.
_REPORT_POLICY = "frame-ancestors 'self'"

Next = Callable[[Request], Awaitable[Response]]


def studio_app(viewer: Viewer) -> FastAPI:
    """The application, which answers with:

    * ``GET /``, the page, and ``GET /studio.js``, ``/studio.css``, ``/page.css`` for it;
    * ``POST /look?scale=1.5&target=3`` with an image file as the body: what :meth:`Viewer.look` gives, as JSON;
    * ``GET /explain``: the run's ``reports/explain.html``, where ``excite explain`` has written it.

    What is refused is answered with a status of 400 to 499 and ``{"error": a sentence}``.

    Args:
        viewer: the network.
    """
    app = FastAPI(title="excite studio", docs_url=None, redoc_url=None, openapi_url=None)
    report = viewer.folder / "reports" / REPORT if viewer.folder else None
    # Hooks read the gates of one run of the network at a time.
    one_at_a_time = threading.Lock()

    @app.middleware("http")
    async def only_from_here(request: Request, call_next: Next) -> Response:
        refused = refusal(request.headers.get("host"), request.headers.get("origin"))
        response = _error(403, refused) if refused else await call_next(request)
        for name, value in _headers(request.url.path).items():
            response.headers[name] = value
        return response

    @app.get("/")
    def page() -> Response:
        has_report = report is not None and report.is_file()
        return Response(studio_page(about(viewer, has_report)), media_type="text/html")

    @app.get("/explain")
    def explained() -> Response:
        if report is None or not report.is_file():
            return _error(404, "There is no reports/explain.html yet: make it with excite explain.")
        return FileResponse(report, media_type="text/html")

    @app.get("/{name}")
    def part(name: str) -> Response:
        if name not in FILES:
            return _error(404, "There is nothing of that name.")
        return Response(studio_file(name), media_type=FILES[name])

    @app.post("/look")
    async def look(
        request: Request,
        scale: Annotated[float, Query(ge=1, le=MAX_SCALE)] = 1.0,
        target: Annotated[int | None, Query(ge=0)] = None,
    ) -> Response:
        content = await _body(request)
        if content is None:
            return _error(413, f"The file is larger than the {MAX_BYTES // 1_000_000} MB that are taken: shrink it.")
        return await run_in_threadpool(_answer, viewer, one_at_a_time, content, scale, target)

    @app.exception_handler(RequestValidationError)
    async def misasked(request: Request, error: RequestValidationError) -> Response:
        return _error(400, f"The scale goes from 1 to {MAX_SCALE:g}, and the target is the number of a class.")

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> Response:
        return _error(error.status_code, f"{error.detail}.")

    return app


def about(viewer: Viewer, has_report: bool) -> dict[str, Any]:
    """What the page is to know before an image is there."""
    return {
        "network": viewer.name,
        "run": str(viewer.folder) if viewer.folder else None,
        "classes": list(viewer.classes),
        "size": viewer.preprocessing.size,
        "units": [
            {
                "name": gate.name,
                "kind": gate.kind,
                "channels": gate.channels,
                "size": list(gate.size),
                "range": list(gate.range),
                "kernels": [kernel.name for kernel in gate.kernels],
                "branches": list(gate.branches) if gate.kernels else [],
            }
            for gate in viewer.gates
        ],
        "statistics": str(viewer.statistics_file) if viewer.statistics_file else None,
        "report": has_report,
        "max_bytes": MAX_BYTES,
    }


def refusal(host: str | None, origin: str | None) -> str | None:
    """Why a request is not answered, by its headers; None where it is.

    Args:
        host: what the browser believes to be talking to, with or without a port.
        origin: of the page that asks, where the browser says so.
    """
    name = (host or "").rpartition(":")[0] or (host or "")
    if name.lower() not in HOSTS:
        return "The studio answers on this machine alone: open it as http://127.0.0.1 with the port that it named."
    if origin is not None and origin.lower() != f"http://{host}".lower():
        return "The studio answers its own page alone."
    return None


async def _body(request: Request) -> bytes | None:
    """What was uploaded; None for more than is taken, of which no more than that is held."""
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > MAX_BYTES:
        return None
    content = bytearray()
    async for block in request.stream():
        content += block
        if len(content) > MAX_BYTES:
            return None
    return bytes(content)


def _answer(viewer: Viewer, lock: threading.Lock, content: bytes, scale: float, target: int | None) -> Response:
    try:
        if (pixels := _pixels(content)) > MAX_PIXELS:
            limit = f"{MAX_PIXELS // 1_000_000} million"
            return _error(
                413, f"The image has {pixels / 1e6:.0f} million pixels, more than the {limit} that are taken."
            )
        with lock:  # also for decoding: one large image in memory at a time
            return JSONResponse(viewer.look(viewer.decode(content), scale, target))
    except BrokenImageError as error:
        return _error(415, f"This is no image that can be read: {error}.")
    except UsageError as error:
        return _error(400, str(error))
    except ExciteError as error:
        return _error(422, str(error))
    except Exception:  # whatever an image brings about, the next one is to be answered
        log.exception("An image could not be answered")
        return _error(500, "The image could not be answered; the terminal says why.")


def _pixels(content: bytes) -> int:
    """How many pixels an image file would be decoded to, by its header alone.

    Raises:
        BrokenImageError: it is none of the formats that are taken.
    """
    import warnings

    from PIL import Image

    if not content:
        raise BrokenImageError("the file is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(content), formats=FORMATS) as image:
                return image.width * image.height
    except Image.DecompressionBombError:
        return 2 * Image.MAX_IMAGE_PIXELS if Image.MAX_IMAGE_PIXELS else MAX_PIXELS + 1
    except Exception as error:  # Pillow's readers raise nearly anything on bad input
        raise BrokenImageError("expected PNG, JPEG, WebP, GIF, BMP, TIFF or PPM") from error


def _error(status: int, sentence: str) -> JSONResponse:
    return JSONResponse({"error": sentence}, status)


def _headers(path: str) -> dict[str, str]:
    return {
        "Content-Security-Policy": _REPORT_POLICY if path == "/explain" else _POLICY,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cross-Origin-Resource-Policy": "same-origin",
        "Cache-Control": "no-store",
    }
