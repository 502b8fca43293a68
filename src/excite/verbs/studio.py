"""``studio``: a local page on which an image can be dropped, to see what the attention of a network does with it."""

from __future__ import annotations

import contextlib
import socket
import threading
import webbrowser
from collections.abc import Callable
from pathlib import Path

from torch import nn

from excite.errors import ExciteError, UsageError
from excite.verbs.explain_image import Viewer

HOST = "127.0.0.1"
"""The only address that it listens on: nobody else's machine reaches it."""


def studio(
    source: str | Path | nn.Module,
    *,
    weights: str | Path | None = None,
    statistics: str | Path | None = None,
    port: int = 0,
    browser: bool = True,
    device: str = "auto",
    ready: Callable[[str], object] = print,
) -> None:
    """Serve the page until it is interrupted (Ctrl+C).

    Args:
        source: a run's folder, a network spec (with ``weights``), or a module.
        weights: for a spec: a file of weights, or the tag of published ones such as ``imagenet``.
        statistics: the ``explain.npz`` that ``excite explain`` wrote for this network: what its gates are held
            against. By default the one in the run's ``reports``, where there is one.
        port: where it listens, on 127.0.0.1 alone; 0 for any that is free.
        browser: open the page in the browser.
        device: ``auto``, ``cpu``, ``cuda`` …
        ready: is told the page's address once it can be opened.

    Raises:
        UsageError: FastAPI, uvicorn or captum are not installed, the port is taken, neither a finished run nor a spec
            with weights, a network without a unit, or statistics of another network.
        ExciteError: the weights cannot be read or fetched.
    """
    try:
        import captum  # noqa: F401
        import uvicorn

        from excite.verbs.studio_app import studio_app
    except ImportError as error:
        raise UsageError(f"The studio needs the package {error.name}: pip install 'excite[studio]'.") from None
    with contextlib.closing(_listening(port)) as listener:
        app = studio_app(Viewer(source, weights=weights, statistics=statistics, device=device))
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False, timeout_keep_alive=30))
        address = f"http://{HOST}:{listener.getsockname()[1]}/"
        ready(address)
        if browser:
            # Some browsers return only when they are closed.
            threading.Thread(target=webbrowser.open, args=(address,), daemon=True).start()
        with contextlib.suppress(KeyboardInterrupt):
            server.run(sockets=[listener])


def _listening(port: int) -> socket.socket:
    """A socket that takes connections on the port; they wait until they are answered.

    Raises:
        UsageError: the port cannot be had.
    """
    if not 0 <= port < 65536:
        raise UsageError(f"port is {port}: choose one from 1024 to 65535, or 0 for any that is free.")
    listener = socket.socket()
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((HOST, port))
        listener.listen()
    except OSError as error:
        listener.close()
        if port == 0:
            raise ExciteError(f"No port of {HOST} can be listened on: {error.strerror}.") from error
        why = (error.strerror or str(error)).lower()
        raise UsageError(f"Port {port} cannot be had ({why}): choose another, or 0 for any that is free.") from error
    return listener
