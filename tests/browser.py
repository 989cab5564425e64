"""A headless Chromium for tests of pages: opens a file, tells what the console said and what was loaded."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import re
import shutil
import tempfile
from asyncio.subprocess import DEVNULL, PIPE
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

import aiohttp

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "chrome-headless-shell")
FLAGS = "--headless=new --disable-gpu --no-first-run --disable-extensions --disable-background-networking --mute-audio"
FLAGS += " --disable-component-update --disable-sync --no-default-browser-check --hide-scrollbars"
PATIENCE = 60  # seconds for the slowest machine; nothing is measured by it
LISTENING = re.compile(r"DevTools listening on (ws://\S+)")


def find_browser() -> str | None:
    """Return the path of a Chromium, if there is one; CHROME in the environment names another."""
    return os.environ.get("CHROME") or next(filter(None, map(shutil.which, NAMES)), None)


@dataclass
class Page:
    """A page in a tab of its own."""

    socket: aiohttp.ClientWebSocketResponse
    session: str = ""
    console: list[str] = field(default_factory=list)  # warnings, errors, exceptions
    loaded: list[str] = field(default_factory=list)  # addresses that were asked for
    events: list[dict[str, Any]] = field(default_factory=list)
    sent: int = 0

    async def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the DevTools protocol."""
        self.sent += 1
        message = {"id": self.sent, "method": method, "params": parameters}
        await self.socket.send_str(json.dumps(message | ({"sessionId": self.session} if self.session else {})))
        while True:
            reply = await self.receive()
            if reply.get("id") == self.sent:
                assert "error" not in reply, reply
                result: dict[str, Any] = reply["result"]
                return result

    async def receive(self) -> dict[str, Any]:
        """Take the next message, and note what events tell."""
        message: dict[str, Any] = json.loads((await self.socket.receive(PATIENCE)).data)
        told, method = message.get("params", {}), message.get("method")
        if method == "Network.requestWillBeSent":
            self.loaded.append(told["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            self.console.append(str(told["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled" and told["type"] in ("error", "warning", "assert"):
            self.console.append(str(told["args"]))
        elif method == "Log.entryAdded" and told["entry"]["level"] in ("error", "warning"):
            self.console.append(told["entry"]["text"])
        return message

    async def open(self, url: str, *, width: int = 1280, dark: bool = False) -> None:
        """Open an address in a window of that width, and wait until its plots are drawn."""
        await self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False
        )
        features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        await self.call("Emulation.setEmulatedMedia", features=features)
        await self.call("Page.navigate", url=url)
        async with asyncio.timeout(PATIENCE):
            while not await self.run("document.documentElement.dataset.plots === 'drawn'"):  # noqa: ASYNC110
                await asyncio.sleep(0.02)

    async def run(self, code: str) -> Any:
        """Give the value of an expression in the page."""
        result = await self.call("Runtime.evaluate", expression=code, returnByValue=True, awaitPromise=True)
        return result["result"].get("value")

    async def screenshot(self) -> bytes:
        """Give a PNG of the whole page."""
        shot = await self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        return base64.b64decode(shot["data"])

    async def print(self) -> bytes:
        """Give the page as PDF, as it would be printed."""
        return base64.b64decode((await self.call("Page.printToPDF", preferCSSPageSize=True))["data"])

    @classmethod
    async def attach(cls, socket: aiohttp.ClientWebSocketResponse) -> Self:
        """Make a tab."""
        page = cls(socket)
        target = await page.call("Target.createTarget", url="about:blank")
        attached = await page.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        page.session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            await page.call(f"{domain}.enable")
        return page


@contextlib.asynccontextmanager
async def new_page() -> AsyncIterator[Page]:
    """Start a browser with a fresh profile and give a page."""
    program = find_browser()
    assert program, "there is no Chromium"
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []
        command = [program, *FLAGS.split(), *sandbox, f"--user-data-dir={profile}", "--remote-debugging-port=0"]
        browser = await asyncio.create_subprocess_exec(*command, stdout=DEVNULL, stderr=PIPE, limit=1 << 20)
        assert browser.stderr
        try:
            async with asyncio.timeout(PATIENCE):
                while not (found := LISTENING.search((await browser.stderr.readline()).decode(errors="replace"))):
                    assert browser.returncode is None, "Chromium does not start"
            async with aiohttp.ClientSession() as session, session.ws_connect(found[1], max_msg_size=0) as socket:
                yield await Page.attach(socket)
        finally:
            browser.terminate()
            await browser.wait()
