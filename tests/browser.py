"""Headless Chromium, driven over its DevTools protocol: a page, what it says, asks and draws.

https://chromedevtools.github.io/devtools-protocol/ — JSON with NUL between messages, over two pipes
(--remote-debugging-pipe: the browser reads from descriptor 3 and writes to 4).
"""

from __future__ import annotations

import base64
import json
import os
import queue
import shutil
import subprocess
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
)
WAIT_S = 60.0


def chromium() -> str:
    """Return the browser's path, or skip the test: CI counts that as a failure."""
    found = shutil.which("chromium") or shutil.which("google-chrome")
    if found is None:
        pytest.skip("no Chromium is installed: the browser cannot be tested here")
    return found


class Browser:
    """One browser process; its profile lies in a folder of its own."""

    def __init__(self, profile: Path) -> None:
        down, to_browser = os.pipe()
        from_browser, up = os.pipe()
        command = 'exec "$@" 3<&"$IN" 4>&"$OUT"'
        self.process = subprocess.Popen(
            ["bash", "-c", command, "-", chromium(), *FLAGS, f"--user-data-dir={profile}"],
            env=os.environ | {"IN": str(down), "OUT": str(up)},
            pass_fds=(down, up),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(down)
        os.close(up)
        self._to = os.fdopen(to_browser, "wb", buffering=0)
        self._from = os.fdopen(from_browser, "rb")
        self._numbers = count(1)
        self._answers: dict[int, queue.Queue[dict[str, Any]]] = {}
        self._pages: dict[str, Page] = {}
        self._reader = Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        self._reader.join()
        self._to.close()
        self._from.close()

    def page(self, width: int, height: int, *, dark: bool = False) -> Page:
        """Return a new page of this size, in CSS pixels."""
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = self._pages[session] = Page(self, session, target)
        for domain in ("Page", "Runtime", "Log", "Network"):
            page.send(f"{domain}.enable")
        page.send(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        page.send("Emulation.setEmulatedMedia", features=[scheme])
        return page

    def close_pages(self) -> None:
        """Close all pages: six lines to one server are all that a browser opens."""
        for page in list(self._pages.values()):
            self.send("Target.closeTarget", targetId=page.target)
        self._pages.clear()

    def send(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        """Call a method and return its result; RuntimeError if the browser refuses."""
        number = next(self._numbers)
        answer = self._answers[number] = queue.Queue()
        message = {"id": number, "method": method, "params": params}
        if session is not None:
            message["sessionId"] = session
        self._to.write(json.dumps(message).encode() + b"\0")
        got = answer.get(timeout=WAIT_S)
        del self._answers[number]
        if "error" in got:
            raise RuntimeError(f"{method}: {got['error']}")
        return dict(got["result"])

    def _read(self) -> None:
        rest = b""
        while piece := self._from.read1(1 << 16):
            *whole, rest = (rest + piece).split(b"\0")
            for text in whole:
                message = json.loads(text)
                if "id" in message:
                    self._answers[message["id"]].put(message)
                elif message.get("sessionId") in self._pages:
                    self._pages[message["sessionId"]].take(message["method"], message["params"])


@dataclass
class Page:
    """One tab, and what came of it."""

    browser: Browser
    session: str
    target: str
    complaints: list[str] = field(default_factory=list)  # console errors and warnings, exceptions
    requests: list[str] = field(default_factory=list)  # addresses, without those inside the page

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        return self.browser.send(method, self.session, **params)

    def open(self, url: str) -> None:
        self.send("Page.navigate", url=url)

    def value(self, expression: str) -> Any:
        """Return what an expression is in the page; promises are waited for."""
        got = self.send(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        if "exceptionDetails" in got:
            raise RuntimeError(f"{expression}: {got['exceptionDetails']}")
        return got["result"].get("value")

    def until(self, expression: str) -> None:
        """Wait until an expression is true in the page, looking whenever it draws."""
        look = f"() => {{ try {{ return !!({expression}) }} catch {{ return false }} }}"
        wait = (
            "new Promise((done) => { const look = " + look + ";"
            "const again = () => look() ? done(true) : setTimeout(again, 20); again() })"
        )
        while True:
            try:
                self.value(wait)
                return
            except RuntimeError as error:  # the page was replaced by another one
                if "context" not in str(error) and "navigated" not in str(error):
                    raise

    def picture(self) -> bytes:
        """Return a PNG of what is to be seen."""
        return base64.b64decode(self.send("Page.captureScreenshot", format="png")["data"])

    def take(self, method: str, params: dict[str, Any]) -> None:
        if method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning"):
            self.complaints.append(json.dumps(params["args"]))
        elif method == "Runtime.exceptionThrown":
            self.complaints.append(json.dumps(params["exceptionDetails"]))
        elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.complaints.append(json.dumps(params["entry"]))
        elif method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
