"""A real headless Chromium for tests, spoken to over its debugging pipe: no driver, no port, no Python package."""

import base64
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def find_browser() -> str:
    """Its path. Without one the test is skipped, and under CI=true it fails."""
    path = next((found for name in NAMES if (found := shutil.which(name))), None)
    if path:
        return path
    missing = "no Chromium here; apt-get install -y --no-install-recommends chromium"
    if os.environ.get("CI") == "true":
        pytest.fail(missing, pytrace=False)
    pytest.skip(missing)


class Browser:
    """One page. `errors` holds what the console and the network complained of since it was opened."""

    def __init__(self, folder: Path) -> None:
        to_read, self.to = os.pipe()
        self.back, to_write = os.pipe()
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"]
        command = [find_browser(), *flags, f"--user-data-dir={folder}", "--remote-debugging-pipe", "about:blank"]
        self.process = subprocess.Popen(
            ["bash", "-c", f'exec "$0" "$@" 3<&{to_read} 4>&{to_write}', *command],
            pass_fds=(to_read, to_write),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_read), os.close(to_write)
        self.errors: list[str] = []
        self.requests: list[str] = []
        self.events: list[dict[str, Any]] = []
        self.unread, self.count, self.target = b"", 0, None
        pages = [t for t in self.call("Target.getTargets")["targetInfos"] if t["type"] == "page"]
        found = self.call("Target.attachToTarget", targetId=pages[0]["targetId"], flatten=True)
        self.target = found["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self.count += 1
        message = {"id": self.count, "method": method, "params": parameters}
        if self.target:
            message["sessionId"] = self.target
        os.write(self.to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self.count:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]

    def _next(self, timeout: float = 60) -> dict[str, Any]:
        end = time.monotonic() + timeout
        while b"\0" not in self.unread:
            ready, _, _ = select.select([self.back], [], [], max(end - time.monotonic(), 0))
            chunk = os.read(self.back, 1 << 20) if ready else b""
            assert chunk, f"the browser said nothing for {timeout} s (exit code {self.process.poll()})"
            self.unread += chunk
        line, _, self.unread = self.unread.partition(b"\0")
        message = json.loads(line)
        self._note(message)
        return message

    def _note(self, message: dict[str, Any]) -> None:
        method, p = message.get("method", ""), message.get("params", {})
        self.events.append(message)
        if method == "Runtime.exceptionThrown":
            self.errors.append(str(p["exceptionDetails"].get("exception", p["exceptionDetails"])))
        elif method == "Runtime.consoleAPICalled" and p["type"] in ("error", "warning", "assert"):
            self.errors.append(str(p["args"]))
        elif method == "Log.entryAdded" and p["entry"]["level"] in ("error", "warning"):
            self.errors.append(p["entry"]["text"] + " " + p["entry"].get("url", ""))
        elif method == "Network.loadingFailed":
            self.errors.append(f"not loaded: {p['errorText']}")
        elif method == "Network.requestWillBeSent":
            self.requests.append(p["request"]["url"])

    def open(self, path: Path, width: int = 1280, height: int = 900, dark: bool = False, printed: bool = False) -> None:
        """Load a file and wait until the page and its pictures are there."""
        self.errors.clear(), self.requests.clear(), self.events.clear()
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", media="print" if printed else "", features=scheme)
        self.call("Page.navigate", url=path.resolve().as_uri())
        while not any(e.get("method") == "Page.loadEventFired" for e in self.events):
            self._next()

    def js(self, expression: str) -> Any:
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def screenshot(self, path: Path, whole: bool = True) -> None:
        shot = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(shot["data"]))

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.to), os.close(self.back)
        self.process.terminate()
        self.process.wait(20)


def table(page: Browser, name: str) -> list[list]:
    """Full values of a table on the page: floats, pairs, or the text of a cell without a number."""
    cells = page.js(
        f"[...document.querySelectorAll('#table-{name} tbody tr')].map(r => [...r.cells].map("
        "c => [c.dataset.v ?? null, c.innerText]))"
    )
    return [[_value(v, text) for v, text in row] for row in cells]


def _value(v, text):
    if v is None:
        return text
    numbers = [float(x) for x in v.split()]
    return numbers[0] if len(numbers) == 1 else tuple(numbers)
