"""A headless Chromium, spoken to over a pipe: no package and no open port is needed.

The protocol is Chromium's own (DevTools): messages in JSON, each ended by a zero byte.
"""

import base64
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

EXECUTABLE = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chrome")
_FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-dev-shm-usage", "--disable-background-networking", "--disable-component-update",
    "--disable-sync", "--disable-extensions", "--remote-debugging-pipe", "--hide-scrollbars",
    "--force-color-profile=srgb",
)  # fmt: skip


class Page:
    """One page; `requests` are the addresses it asked for, `problems` what its console reports."""

    def __init__(self, to_browser: int, from_browser: int) -> None:
        self._to, self._from, self._left, self._number = to_browser, from_browser, b"", 0
        self.requests: list[str] = []
        self.problems: list[str] = []
        self._session = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Network", "Runtime", "DOM", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params):
        """The answer to a command."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]

    def _next(self) -> dict:
        while b"\0" not in self._left:
            ready, _, _ = select.select([self._from], [], [], 60)
            assert ready, "the browser does not answer"
            block = os.read(self._from, 1 << 20)
            assert block, "the browser has ended"
            self._left += block
        text, self._left = self._left.split(b"\0", 1)
        message = json.loads(text)
        params = message.get("params", {})
        match message.get("method"):
            case "Network.requestWillBeSent":
                self.requests.append(params["request"]["url"])
            case "Network.webSocketCreated":
                self.requests.append(params["url"])
            case "Runtime.exceptionThrown":
                self.problems.append(str(params["exceptionDetails"]))
            case "Log.entryAdded" if params["entry"]["level"] == "error":
                self.problems.append(f"{params['entry']['text']} {params['entry'].get('url')}")
        return message

    def size(self, width: int, height: int) -> None:
        """The window, in CSS pixels."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height,
                  deviceScaleFactor=1, mobile=width < 600)  # fmt: skip

    def evaluate(self, script: str):
        """The value of an expression in the page."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait_for(self, script: str, *, seconds: float = 60):
        """The value of an expression as soon as it is true.

        A page draws its parts one after the other: whoever names an element waits for it
        (`?.`), also where its neighbour is already there.
        """
        end = time.monotonic() + seconds
        while not (value := self.evaluate(script)):
            assert time.monotonic() < end, f"never true: {script}\n{self.text()}"
            time.sleep(0.1)
        return value

    def wait_for_text(self, words: str) -> None:
        """Returns as soon as a reader sees the words."""
        self.wait_for(f"document.body?.innerText.includes({json.dumps(words)})")

    def text(self) -> str:
        """What a reader sees."""
        return self.evaluate("document.body?.innerText")

    def click(self, selector: str) -> None:
        """Clicks on an element as soon as it is there."""
        self.wait_for(f"(e => e && (e.click(), true))(document.querySelector('{selector}'))")

    def upload(self, selector: str, path: Path) -> None:
        """Gives a file to an input element as soon as that is there."""
        self.wait_for(f"document.querySelector('{selector}') !== null")
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", files=[str(path)], nodeId=node)

    def screenshot(self, path: Path, *, whole: bool = True) -> Path:
        """A PNG of the page."""
        picture = self.call("Page.captureScreenshot", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(picture["data"]))
        return path


@contextmanager
def chromium(profile: Path) -> Iterator[Page]:
    """A browser with a fresh profile; it ends with the block."""
    assert EXECUTABLE
    ours, theirs = os.pipe(), os.pipe()  # commands, answers
    # Chromium reads commands from descriptor 3 and answers on 4; the shell puts them there
    command = f'exec "$0" "$@" 3<&{ours[0]} 4>&{theirs[1]}'
    words = [EXECUTABLE, *_FLAGS, f"--user-data-dir={profile}", "about:blank"]
    browser = subprocess.Popen(
        ["bash", "-c", command, *words],
        pass_fds=(ours[0], theirs[1]),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    for end in (ours[0], theirs[1]):
        os.close(end)
    try:
        yield Page(ours[1], theirs[0])
    finally:
        os.close(ours[1])
        os.close(theirs[0])
        browser.kill()
        browser.wait()
