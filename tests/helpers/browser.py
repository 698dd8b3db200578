"""A headless Chromium, driven through the WebDriver protocol."""

import base64
import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the key of element references, fixed by the W3C recommendation


def missing_browser() -> str | None:
    """Why no browser can be driven here, or None."""
    missing = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
    return f"needs {' and '.join(missing)} (Debian: chromium chromium-driver)" if missing else None


class Browser:
    """One window."""

    def __init__(self, address: str) -> None:
        self._address = address
        options = {"args": ["--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1200,900"]}
        capabilities = {"alwaysMatch": {"browserName": "chrome", "goog:chromeOptions": options}}
        self._session = f"/session/{self._call('POST', '/session', capabilities=capabilities)['sessionId']}"

    def _call(self, method: str, path: str, **body: Any) -> Any:
        data = json.dumps(body).encode() if method == "POST" else None
        request = urllib.request.Request(self._address + path, data=data, method=method)
        with urllib.request.urlopen(request, timeout=120) as response:
            return json.load(response)["value"]

    def open(self, file: Path) -> None:
        """Show a file."""
        self._call("POST", f"{self._session}/url", url=file.resolve().as_uri())

    def run(self, script: str, *args: Any) -> Any:
        """What a script returns; `arguments[i]` are its arguments."""
        return self._call("POST", f"{self._session}/execute/sync", script=script, args=list(args))

    def click(self, selector: str, x: int = 0, y: int = 0) -> None:
        """Click an element, `x` and `y` CSS pixels from its centre."""
        element = self._call("POST", f"{self._session}/element", using="css selector", value=selector)[_ELEMENT]
        moves = [
            {"type": "pointerMove", "origin": {_ELEMENT: element}, "x": x, "y": y, "duration": 50},
            {"type": "pointerDown", "button": 0},
            {"type": "pointerUp", "button": 0},
        ]
        self._call("POST", f"{self._session}/actions", actions=[{"type": "pointer", "id": "mouse", "actions": moves}])

    def screenshot(self, file: Path) -> None:
        """Write what is seen, PNG."""
        file.write_bytes(base64.b64decode(self._call("GET", f"{self._session}/screenshot")))

    def close(self) -> None:
        """End the session."""
        self._call("DELETE", self._session)


@contextmanager
def open_browser() -> Iterator[Browser]:
    """A window while the block runs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    driver = subprocess.Popen(["chromedriver", f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        browser = Browser(_wait(f"http://127.0.0.1:{port}"))
        try:
            yield browser
        finally:
            browser.close()
    finally:
        driver.terminate()
        driver.wait(30)


def _wait(address: str) -> str:
    for _ in range(120):
        try:
            with urllib.request.urlopen(f"{address}/status", timeout=5):
                return address
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.25)
    raise TimeoutError(f"chromedriver does not answer at {address}")
