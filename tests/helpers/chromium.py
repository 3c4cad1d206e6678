"""A page in headless Chromium by its debugging protocol: what it asks for, what it logs, what scripts find in it."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

SECONDS = 60  # for anything that the browser is asked


@dataclass
class Visit:
    """What happened while a page was open."""

    requests: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    values: list[Any] = field(default_factory=list)


def program() -> str | None:
    """Where Chromium is, if it is."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def visit(page: Path, scripts: Sequence[str], *, width: int = 1440, scheme: str = "light") -> Visit:
    """Open a page at a width, in a colour scheme, and run scripts in it one after the other; what they give is kept."""
    return asyncio.run(_visit(page, scripts, width, scheme))


async def _visit(page: Path, scripts: Sequence[str], width: int, scheme: str) -> Visit:
    found = Visit()
    async with _tab(found) as call:
        for domain in ("Network", "Page", "Runtime", "Log"):
            await call(f"{domain}.enable")
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        await call("Emulation.setDeviceMetricsOverride", **size)
        await call("Emulation.setFocusEmulationEnabled", enabled=True)  # else nothing is told of a change of focus
        feature = {"name": "prefers-color-scheme", "value": scheme}
        await call("Emulation.setEmulatedMedia", features=[feature])
        await call("Page.navigate", url=page.resolve().as_uri())
        await call("Runtime.evaluate", expression="new Promise(r => setTimeout(r, 500))", awaitPromise=True)
        for script in scripts:
            answer = await call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
            assert "exceptionDetails" not in answer, answer
            found.values.append(answer["result"].get("value"))
    return found


@asynccontextmanager
async def _tab(found: Visit) -> AsyncIterator[Any]:
    """A way to call the protocol of a new browser's one tab; the browser ends with the block."""
    chromium = program()
    assert chromium is not None
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--remote-debugging-port=0"]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        command = [chromium, *flags, f"--user-data-dir={folder}", "about:blank"]
        browser = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            port = await asyncio.wait_for(_port(Path(folder)), SECONDS)
            async with aiohttp.ClientSession() as session:
                async with session.get(f"http://127.0.0.1:{port}/json") as answer:
                    tabs = await answer.json()
                address = next(tab["webSocketDebuggerUrl"] for tab in tabs if tab["type"] == "page")
                async with session.ws_connect(address, max_msg_size=0) as socket:
                    yield lambda method, **given: asyncio.wait_for(_call(socket, found, method, given), SECONDS)
        finally:
            browser.terminate()
            browser.wait(timeout=SECONDS)


async def _port(folder: Path) -> str:
    """The port that the browser chose, once it has."""
    path = folder / "DevToolsActivePort"
    while not (path.is_file() and path.read_text().count("\n")):
        await asyncio.sleep(0.05)
    return path.read_text().split()[0]


async def _call(socket: aiohttp.ClientWebSocketResponse, found: Visit, method: str, given: dict[str, Any]) -> Any:
    await socket.send_json({"id": 1, "method": method, "params": given})
    while True:
        message = await socket.receive_json()
        told = message.get("params", {})
        if message.get("method") == "Network.requestWillBeSent":
            found.requests.append(told["request"]["url"])
        if message.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded"):
            found.errors.append(str(told))
        if message.get("id") == 1:
            assert "error" not in message, message
            return message["result"]
