"""A headless Chromium for tests of pages: opened, clicked on, dropped on and looked at over its own protocol.

https://chromedevtools.github.io/devtools-protocol/ over ``--remote-debugging-pipe``: one JSON object after the other,
each ended by a zero byte, on the browser's file descriptors 3 (to it) and 4 (from it).
"""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import os
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
SECONDS = 60.0


class Chromium:
    """One page in a browser of its own.

    Attributes:
        problems: what its console complained of, and exceptions that nothing caught.
        requested: the addresses that the page asked for.
    """

    def __init__(self, to_browser: int, from_browser: int) -> None:
        self.to_browser, self.from_browser = to_browser, from_browser
        self.numbers, self.rest = itertools.count(1), b""
        self.problems: list[str] = []
        self.requested: list[str] = []
        self.events: list[str] = []
        self.session: str | None = None
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network", "DOM"):
            self.ask(f"{domain}.enable")

    def open(self, address: str, width: int = 1200, height: int = 900, *, dark: bool = False) -> None:
        """Load a page at the size of a screen and wait for it."""
        self.ask(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = "dark" if dark else "light"
        self.ask("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.events.clear()
        failed = self.ask("Page.navigate", url=address).get("errorText")
        assert not failed, failed
        while "Page.loadEventFired" not in self.events:
            self._read()

    def run(self, script: str) -> Any:
        """The value of an expression, of what it promises where it is a promise."""
        answer = self.ask("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait(self, condition: str) -> None:
        """Until an expression is true."""
        end = time.monotonic() + SECONDS
        while not self.run(condition):
            assert time.monotonic() < end, f"never true: {condition}; problems: {self.problems}"
            time.sleep(0.02)

    def click(self, selector: str) -> None:
        """With the mouse, on the middle of the first element that a selector finds."""
        x, y = self._middle(selector)
        for kind in ("mousePressed", "mouseReleased"):
            self.ask("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def move(self, selector: str) -> None:
        """The mouse to the middle of an element."""
        x, y = self._middle(selector)
        self.ask("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def drop(self, selector: str, *files: Path) -> None:
        """Files from outside on an element."""
        x, y = self._middle(selector)
        data = {"items": [], "files": [str(file) for file in files], "dragOperationsMask": 1}
        for kind in ("dragEnter", "dragOver", "drop"):
            self.ask("Input.dispatchDragEvent", type=kind, x=x, y=y, data=data)

    def choose(self, selector: str, *files: Path) -> None:
        """Files in a file input, as in its dialogue."""
        root = self.ask("DOM.getDocument")["root"]["nodeId"]
        node = self.ask("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.ask("DOM.setFileInputFiles", nodeId=node, files=[str(file) for file in files])

    def picture(self, file: Path) -> Path:
        """A screenshot of the whole page."""
        size = self.ask("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        shot = self.ask("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)
        file.write_bytes(base64.b64decode(shot["data"]))
        return file

    def printed(self, file: Path) -> Path:
        """The page as PDF."""
        file.write_bytes(base64.b64decode(self.ask("Page.printToPDF", printBackground=True)["data"]))
        return file

    def ask(self, method: str, **arguments: Any) -> dict[str, Any]:
        """One command of the protocol."""
        number = next(self.numbers)
        message: dict[str, Any] = {"id": number, "method": method, "params": arguments}
        if self.session:
            message["sessionId"] = self.session
        content = json.dumps(message).encode() + b"\0"
        while content:
            content = content[os.write(self.to_browser, content) :]
        while True:
            answer = self._read()
            if answer.get("id") == number:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]

    def _middle(self, selector: str) -> tuple[float, float]:
        box = self.run(
            f"(() => {{ const found = document.querySelector({json.dumps(selector)});"
            " found.scrollIntoView({ block: 'center' }); const box = found.getBoundingClientRect();"
            " return [box.x + box.width / 2, box.y + box.height / 2]; })()"
        )
        return box[0], box[1]

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self.rest:
            ready, _, _ = select.select([self.from_browser], [], [], SECONDS)
            assert ready, "the browser says nothing"
            block = os.read(self.from_browser, 1 << 20)
            assert block, "the browser has ended"
            self.rest += block
        content, _, self.rest = self.rest.partition(b"\0")
        message: dict[str, Any] = json.loads(content)
        self._note(message.get("method", ""), message.get("params", {}))
        return message

    def _note(self, event: str, what: dict[str, Any]) -> None:
        self.events.append(event)
        if event == "Runtime.exceptionThrown":
            self.problems.append(str(what["exceptionDetails"].get("exception", {}).get("description")))
        elif event == "Log.entryAdded" and what["entry"]["level"] in ("error", "warning"):
            self.problems.append(f"{what['entry']['text']} {what['entry'].get('url', '')}")
        elif event == "Runtime.consoleAPICalled" and what["type"] in ("error", "warning", "assert"):
            self.problems.append(" ".join(str(part.get("value")) for part in what["args"]))
        elif event == "Network.requestWillBeSent":
            self.requested.append(what["request"]["url"])


@contextlib.contextmanager
def chromium(folder: Path) -> Iterator[Chromium]:
    """A browser whose profile lies in ``folder``; a test that needs one is skipped where none is installed."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} is installed")
    in_read, in_write = os.pipe()
    out_read, out_write = os.pipe()
    switches = [
        "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync", "--hide-scrollbars",
        "--disable-background-networking", "--disable-component-update", "--disable-extensions",
        f"--user-data-dir={folder / 'profile'}", "--remote-debugging-pipe",
    ]  # fmt: skip
    # The shell gives the pipes the numbers that the browser looks for.
    command = f'exec 3<&{in_read} 4>&{out_write}; exec "$@"'
    process = subprocess.Popen(
        ["bash", "-c", command, "browser", browser, *switches],
        pass_fds=(in_read, out_write),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"HOME": str(folder)},
        start_new_session=True,
    )
    os.close(in_read)
    os.close(out_write)
    try:
        yield Chromium(in_write, out_read)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # it, and the processes that it started
        process.wait()
        os.close(in_write)
        os.close(out_read)
