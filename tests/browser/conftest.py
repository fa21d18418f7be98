"""The built page on a loopback server, and Debian's Chromium to open it: shared by the tests of the page."""

from __future__ import annotations

import http.server
import importlib.util
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from .node_runner import PAGE

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    "--no-sandbox",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
WITHOUT_GPU = [*FLAGS, "--disable-gpu"]
WITH_WEBGPU = [*FLAGS, "--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader"]


def export_assets() -> ModuleType:
    """examples/browser/export_assets.py as a module."""
    spec = importlib.util.spec_from_file_location("export_assets", PAGE / "export_assets.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that export_assets.py writes, made once."""
    pytest.importorskip("sklearn", reason="scikit-learn's digits are not installed")
    folder = tmp_path_factory.mktemp("public") / "assets"
    export_assets().write_assets(folder)
    return folder


@pytest.fixture(scope="session")
def built_page(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page as `npm run build` builds it, with the assets, in a folder of its own."""
    vite = PAGE / "node_modules" / "vite" / "bin" / "vite.js"
    node = shutil.which("node")
    if node is None or not vite.is_file():
        pytest.skip("needs Node.js and the page's packages: npm ci --prefix examples/browser")
    assets: Path = request.getfixturevalue("assets")  # only now: it takes a while
    folder = tmp_path_factory.mktemp("dist")
    done = subprocess.run(
        [node, str(vite), "build", "--outDir", str(folder), "--emptyOutDir", "--logLevel", "warn"],
        cwd=PAGE,
        env={**os.environ, "CONVGRAD_PUBLIC": str(assets.parent)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return folder


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        """Nothing on standard error."""


@pytest.fixture(scope="session")
def url(built_page: Path) -> Iterator[str]:
    """Address of the built page on the loopback interface."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(built_page))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/"
        server.shutdown()


@pytest.fixture(scope="session")
def playwright() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install '.[browser]'")
    if CHROMIUM is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    with sync_api.sync_playwright() as running:
        yield running


@pytest.fixture(scope="session")
def browser(playwright: Any) -> Iterator[Any]:
    """Chromium without a GPU; each test opens a context of its own, so storage starts empty."""
    chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=WITHOUT_GPU)
    yield chromium
    chromium.close()


@pytest.fixture
def context(browser: Any) -> Iterator[Any]:
    made = browser.new_context(viewport={"width": 1240, "height": 860}, color_scheme="light")
    yield made
    made.close()
