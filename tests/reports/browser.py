"""Headless Chromium over the DevTools protocol on a pipe: needs no driver, no WebSocket and no port."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
OPTIONS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--disable-default-apps", "--disable-extensions"),
    *("--disable-dev-shm-usage", "--hide-scrollbars", "--mute-audio", "--remote-debugging-pipe"),
    "--host-resolver-rules=MAP * ~NOTFOUND",
)
# the protocol is spoken on file descriptors 3 and 4, which another program of ours has to set up
LAUNCHER = (
    "import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4); os.execv(sys.argv[3], sys.argv[3:])"
)
PATIENCE = 60.0


def find_chromium() -> str | None:
    """The program, from `CHROMIUM` or the PATH."""
    named = os.environ.get("CHROMIUM")
    return named or next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """One browser with one page; what it logs and requests is kept until the next `open`."""

    def __init__(self, program: str, folder: Path) -> None:
        self.messages: list[dict[str, Any]] = []
        self.errors: list[str] = []
        self.requests: list[str] = []
        self._number, self._buffer = 0, b""
        ours_out, theirs_in, theirs_out, ours_in = self._pipes()
        self._write, self._read = ours_out, ours_in
        command = [sys.executable, "-c", LAUNCHER, str(theirs_in), str(theirs_out), program]
        self._process = subprocess.Popen(
            [*command, *OPTIONS, f"--user-data-dir={folder}", "about:blank"],
            pass_fds=(theirs_in, theirs_out),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        target = self._send("Target.createTarget", {"url": "about:blank"}, session=None)["targetId"]
        attached = self._send("Target.attachToTarget", {"targetId": target, "flatten": True}, session=None)
        self._session: str = attached["sessionId"]
        for domain in ("Page", "Network", "Log", "Runtime"):
            self._send(f"{domain}.enable")

    def __enter__(self) -> Browser:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)  # a session of its own: helpers end with it
        self._process.wait()
        os.close(self._write)
        os.close(self._read)

    def open(self, page: Path, *, width: int, height: int = 900, dark: bool = False) -> None:
        """Loads a file at a width, in light or dark."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self._send("Emulation.setDeviceMetricsOverride", metrics)
        theme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._send("Emulation.setEmulatedMedia", {"features": [theme]})
        self.errors, self.requests = [], []
        self._send("Page.navigate", {"url": page.resolve().as_uri()})
        self._until("Page.loadEventFired")

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page."""
        found = self._send("Runtime.evaluate", {"expression": expression, "returnByValue": True})
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def screenshot(self, file: Path) -> Path:
        """The whole page as PNG."""
        found = self._send("Page.captureScreenshot", {"captureBeyondViewport": True, "format": "png"})
        file.write_bytes(base64.b64decode(found["data"]))
        return file

    @staticmethod
    def _pipes() -> tuple[int, int, int, int]:
        numbers = []
        for there in (os.pipe(), os.pipe()):
            read, write = (fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in there)  # out of the way of 3 and 4
            for end in there:
                os.close(end)
            numbers += [read, write]
        command_read, command_write, event_read, event_write = numbers
        return command_write, command_read, event_write, event_read

    def _send(self, method: str, values: dict[str, Any] | None = None, session: str | None = "own") -> Any:
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": values or {}}
        if session is not None:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next(method)
            if answer.get("id") == self._number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]

    def _until(self, event: str) -> None:
        while self._next(event).get("method") != event:
            pass

    def _next(self, waiting_for: str) -> dict[str, Any]:
        deadline = time.monotonic() + PATIENCE
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._read], [], [], max(0.0, deadline - time.monotonic()))
            read = os.read(self._read, 1 << 20) if ready else b""
            if not read:
                raise TimeoutError(f"Chromium said nothing for {PATIENCE:g} s, or ended; waiting for {waiting_for}.")
            self._buffer += read
        text, _, self._buffer = self._buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(text)
        self._note(message.get("method", ""), message.get("params", {}))
        return message

    def _note(self, event: str, values: dict[str, Any]) -> None:
        if event == "Network.requestWillBeSent":
            self.requests.append(values["request"]["url"])
        elif event == "Log.entryAdded" and values["entry"]["level"] in ("error", "warning"):
            self.errors.append(values["entry"]["text"])
        elif event == "Runtime.consoleAPICalled" and values["type"] in ("error", "warning", "assert"):
            self.errors.append(str(values["args"]))
        elif event == "Runtime.exceptionThrown":
            self.errors.append(str(values["exceptionDetails"]))
