"""A headless Chromium, driven through its pipe: no port, and no package beside the browser."""

import base64
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--disable-quic", "--remote-debugging-pipe"),
)
PATIENCE = 60  # seconds


class Page:
    """A tab of the browser."""

    def __init__(self, send: Any, receive: Any, url: str, width: int, height: int) -> None:
        self._send, self._receive, self._count = send, receive, 0
        self._session: str | None = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)[
            "sessionId"
        ]
        self.resize(width, height)
        self.call("Page.enable")
        self.call("Page.navigate", url=url)

    def call(self, method: str, **params: Any) -> Any:
        """Call a method of the DevTools protocol and return its result."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": params}
        message |= {"sessionId": self._session} if self._session else {}
        self._send.write(json.dumps(message).encode() + b"\0")
        self._send.flush()
        while True:
            answer = json.loads(self._message())
            if (answer.get("id"), answer.get("sessionId")) == (self._count, self._session):
                assert "error" not in answer, answer
                return answer["result"]

    def _message(self) -> bytes:
        message = bytearray()
        while (byte := self._receive.read(1)) != b"\0":
            assert byte, "the browser has ended"
            message += byte
        return bytes(message)

    def resize(self, width: int, height: int) -> None:
        """Set the size of the window; below 500 it is a phone's."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 500,
        )

    def run(self, script: str) -> Any:
        """Return the value of JavaScript on the page."""
        answer = self.call(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def wait_for(self, script: str) -> None:
        """Wait until JavaScript on the page is true."""
        end = time.monotonic() + PATIENCE
        while not self.run(f"Boolean({script})"):
            assert time.monotonic() < end, f"never true: {script}"
            time.sleep(0.05)

    def type(self, text: str) -> None:
        """Type a text into the field that has the focus."""
        self.call("Input.insertText", text=text)

    def move_to(self, selector: str) -> None:
        """Move the mouse to the middle of an element."""
        box = self.run(
            f"(() => {{const b = document.querySelector({json.dumps(selector)})"
            ".getBoundingClientRect(); return [b.x + b.width / 2, b.y + b.height / 2]})()"
        )
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=box[0], y=box[1])

    def png(self) -> bytes:
        """Return a picture of the window."""
        return base64.b64decode(self.call("Page.captureScreenshot")["data"])


@contextmanager
def browser(folder: Path) -> Iterator[Any]:
    """Start the browser with a profile below `folder`; yields `open(url, width, height)`."""
    (to_read, send), (receive, to_write) = os.pipe(), os.pipe()
    # The browser reads its descriptor 3 and writes to 4.
    command = ["bash", "-c", f'exec "$@" 3<&{to_read} 4>&{to_write}', "bash", str(CHROMIUM), *FLAGS]
    process = subprocess.Popen(
        [*command, f"--user-data-dir={folder / 'profile'}"],
        pass_fds=(to_read, to_write),
        stderr=subprocess.DEVNULL,
    )
    os.close(to_read)
    os.close(to_write)
    with os.fdopen(send, "wb") as sender, os.fdopen(receive, "rb") as receiver:

        def open_(url: str, width: int = 1200, height: int = 800) -> Page:
            return Page(sender, receiver, url, width, height)

        try:
            yield open_
        finally:
            process.terminate()
            process.wait()
