"""A headless Chromium, driven by chromedriver: W3C WebDriver over HTTP."""

from __future__ import annotations

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

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
FLAGS = [
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--disable-quic"),
    "--disable-dev-shm-usage",
]
ALL = "\ue009a\ue000\ue003"  # Control-A, and Backspace
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the name of an element's reference in WebDriver


class Browser:
    """One page. Errors of WebDriver are raised as AssertionErrors with their message."""

    def __init__(self, address: str, session: str = ""):
        self.address, self.session = address, session

    def send(self, method: str, path: str, body: dict | None = None) -> Any:
        request = urllib.request.Request(
            f"{self.address}/session{self.session}{path}",
            None if method == "GET" else json.dumps(body or {}).encode(),
            {"Content-Type": "application/json"},
            method=method,
        )
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            raise AssertionError(json.load(error)["value"]["message"][:500]) from None

    def open(self, url: str) -> None:
        self.send("POST", "/url", {"url": url})

    def devtools(self, command: str, **parameters: Any) -> Any:
        return self.send("POST", "/goog/cdp/execute", {"cmd": command, "params": parameters})

    def size(self, width: int, height: int = 900) -> None:
        """A window of any width, as of a phone."""
        self.devtools(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )

    def theme(self, name: str) -> None:
        """light or dark, as the system's setting."""
        feature = {"name": "prefers-color-scheme", "value": name}
        self.devtools("Emulation.setEmulatedMedia", features=[feature])

    def run(self, script: str, *arguments: Any) -> Any:
        """What a piece of JavaScript returns."""
        return self.send("POST", "/execute/sync", {"script": script, "args": list(arguments)})

    def until(self, script: str, *arguments: Any, seconds: float = 60) -> Any:
        """What a piece of JavaScript returns, once it is true."""
        end = time.monotonic() + seconds
        while not (value := self.run(script, *arguments)):
            assert time.monotonic() < end, f"never true: {script}\n{self.text()[:3000]}"
            time.sleep(0.1)
        return value

    def text(self) -> str:
        return self.run("return document.body.innerText")

    def element(self, selector: str) -> str:
        found = self.send("POST", "/element", {"using": "css selector", "value": selector})
        return f"/element/{found[ELEMENT]}"

    def click(self, selector: str) -> None:
        self.run("document.querySelector(arguments[0]).scrollIntoView({block: 'center'})", selector)
        self.send("POST", f"{self.element(selector)}/click")

    def type(self, selector: str, text: str, clear: bool = True) -> None:
        """Type a text in place of what is there. The path of a file chooses this file."""
        keys = f"{ALL}{text}" if clear else text
        self.send("POST", f"{self.element(selector)}/value", {"text": keys})

    def picture(self, path: Path, whole: bool = False) -> None:
        """A screenshot, of the whole page or of what is seen."""
        if whole:
            shot = self.devtools("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        else:
            shot = self.send("GET", "/screenshot")
        path.write_bytes(base64.b64decode(shot))

    def console(self) -> list[str]:
        """The errors on the console since the last call."""
        lines = self.send("POST", "/se/log", {"type": "browser"})
        return [line["message"] for line in lines if line["level"] == "SEVERE"]

    def requested(self) -> list[str]:
        """The addresses that were asked for since the last call, pages and sockets alike."""
        names = ("Network.requestWillBeSent", "Network.webSocketCreated")
        urls = []
        for line in self.send("POST", "/se/log", {"type": "performance"}):
            event = json.loads(line["message"])["message"]
            if event["method"] in names:
                parameters = event["params"]
                urls.append(parameters.get("request", parameters)["url"])
        return urls


@contextmanager
def chromium(downloads: Path) -> Iterator[Browser]:
    """A browser that keeps what it downloads in a folder, ended with the block."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    driver = subprocess.Popen(
        [DRIVER, f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    browser = Browser(f"http://127.0.0.1:{port}")
    options = {
        "binary": CHROMIUM,
        "args": FLAGS,
        "prefs": {"download.default_directory": str(downloads)},
    }
    wanted = {
        "goog:chromeOptions": options,
        "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"},
    }
    try:
        for _ in range(100):
            try:
                begun = browser.send("POST", "", {"capabilities": {"alwaysMatch": wanted}})
                break
            except OSError:  # it does not listen yet
                time.sleep(0.1)
        browser.session = f"/{begun['sessionId']}"
        yield browser
    finally:
        if browser.session:
            browser.send("DELETE", "")
        driver.terminate()
        driver.wait(30)
