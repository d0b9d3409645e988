"""The web application for tests: in the test's own process, behind a socket, in a browser."""

import shutil
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from fastapi.testclient import TestClient
from playwright.sync_api import Browser, expect, sync_playwright

from app import storage
from app.web.main import create_app
from tests import servers

BASE = "http://127.0.0.1:8000"
# Milliseconds for a page to become what is expected of it; the usual five seconds pass quickly on a
# busy machine.
expect.set_options(timeout=20_000)


def client(*, known: bool = True, app: Any = None) -> TestClient:
    """A browser that follows no redirects; `known`: it carries the token."""
    headers = {"Authorization": f"Bearer {storage.token()}"} if known else {}
    return TestClient(
        app or create_app(),
        base_url=BASE,
        follow_redirects=False,
        headers=headers,
        raise_server_exceptions=False,
    )


@contextmanager
def served() -> Iterator[str]:
    """The application behind uvicorn, in a thread; its address."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(64)
        config = uvicorn.Config(create_app(), log_level="warning", timeout_graceful_shutdown=1)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        server.should_exit = True
        thread.join(10)


@contextmanager
def chromium() -> Iterator[Browser]:
    """The system's Chromium without a window."""
    program = shutil.which("chromium") or shutil.which("chromium-browser")
    if program is None:
        servers.missing("Chromium", "install the package `chromium` of your system")
    with sync_playwright() as playwright:
        arguments = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        arguments += ["--disable-background-networking"]
        browser = playwright.chromium.launch(executable_path=program, args=arguments)
        yield browser
        browser.close()
