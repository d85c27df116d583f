"""Headless Chromium, driven through chromedriver's HTTP interface (W3C WebDriver)."""

import base64
import json
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ppvision.engine.dashboard import find_free_port

_FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    "--lang=en-US",
)


class Browser:
    """One window of a session."""

    def __init__(self, url: str) -> None:
        self._url = url

    def _call(self, method: str, path: str, body: dict | None = None) -> object:
        request = urllib.request.Request(
            f"{self._url}/{path}".rstrip("/"),
            data=None if body is None else json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
            method=method,
        )
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            raise RuntimeError(f"chromedriver: {error.read().decode()[:500]}") from error

    def open(self, url: str) -> None:
        self._call("POST", "url", {"url": url})

    def run(self, script: str, *arguments: object) -> object:
        """The value that a script in the page returns."""
        return self._call("POST", "execute/sync", {"script": script, "args": list(arguments)})

    def text(self) -> str:
        return self.run("return document.body.innerText")

    def move_to(self, x: int, y: int) -> None:
        """Move the mouse to a point of the window."""
        move = {"type": "pointerMove", "duration": 50, "x": x, "y": y}
        pointer = {"type": "pointer", "id": "mouse", "actions": [move]}
        self._call("POST", "actions", {"actions": [pointer]})

    def wait_for(self, condition: Callable[[], object], seconds: float = 60) -> object:
        """The first true value of a condition.

        Raises:
            TimeoutError: none in time; shows the page's text.
        """
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if found := condition():
                return found
            time.sleep(0.3)
        raise TimeoutError(f"the page shows:\n{self.text()[:2000]}")

    def screenshot(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(base64.b64decode(self._call("GET", "screenshot")))


@contextmanager
def chromium(folder: Path, width: int = 1360, height: int = 900) -> Iterator[Browser]:
    """A browser with a new profile inside `folder`."""
    port = find_free_port()
    driver = subprocess.Popen(
        [shutil.which("chromedriver"), f"--port={port}"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    url = f"http://127.0.0.1:{port}"
    arguments = [*_FLAGS, f"--user-data-dir={folder}/profile", f"--window-size={width},{height}"]
    options = {"binary": shutil.which("chromium"), "args": arguments}
    waits = {"script": 120_000, "pageLoad": 300_000}  # milliseconds
    wanted = {"capabilities": {"alwaysMatch": {"goog:chromeOptions": options, "timeouts": waits}}}
    starting = Browser(url)
    try:
        for _ in range(100):
            try:
                starting._call("GET", "status")
                break
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.1)
        session = starting._call("POST", "session", wanted)["sessionId"]
        browser = Browser(f"{url}/session/{session}")
        yield browser
        browser._call("DELETE", "")
    finally:
        driver.terminate()
        driver.wait()
