"""What several tests share: a real browser that may talk to this machine only, and the site built from the stored notebooks."""
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

ROOT = Path(__file__).resolve().parent.parent


def chromium() -> str | None:
    "Path of a Chromium on this machine."
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


@pytest.fixture(scope="session")
def browser():
    "Headless Chromium. Without one the test is skipped, except in CI, which can install it."
    path = chromium()
    if path is None:
        message = "no Chromium on this machine: install one (Debian: apt-get install chromium)"
        pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


class Visit:
    "A page in a browser context that refuses every request to another machine and notes whatever goes wrong."

    def __init__(self, browser, base: str, **context):
        self.base, self.faults = base, []
        self.context = browser.new_context(**{"viewport": {"width": 1400, "height": 900}, **context})
        self.context.route("**/*", self.only_local)
        self.page = self.context.new_page()
        self.page.on("console", lambda m: self.faults.append(f"console {m.type}: {m.text}") if m.type == "error" else None)
        self.page.on("pageerror", lambda e: self.faults.append(f"script error: {e}"))
        self.page.on("requestfailed", lambda r: self.faults.append(f"failed: {r.url}"))
        self.page.on("response", lambda r: self.faults.append(f"{r.status}: {r.url}") if r.status >= 400 else None)

    def only_local(self, route):
        url = route.request.url
        if url.startswith((self.base, "data:", "blob:")): return route.continue_()
        self.faults.append(f"remote: {url}")
        route.abort()

    def open(self, name: str):
        self.page.goto(self.base + name)
        self.page.wait_for_load_state("networkidle")
        return self.page


@pytest.fixture
def visit(browser):
    "Opens a `Visit`; closed after the test."
    opened = []

    def make(base, **context):
        opened.append(Visit(browser, base, **context))
        return opened[-1]
    yield make
    for v in opened: v.context.close()


def made_once(base: Path, name: str, make: Callable[[Path], None]) -> Path:
    "A folder that all of pytest-xdist's processes use and the first one to want it fills; the others wait for it."
    folder = base / name
    with FileLock(base / f"{name}.lock"):
        if not (whole := base / f"{name}.whole").exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            make(folder)
            whole.touch()
    return folder


def project_with_site(copy: Path):
    "Copy what the site is made from, and build it there."
    from llmbook.site import build_site
    for name in ("settings.ini", "_quarto.yml"): shutil.copy(ROOT / name, copy)
    shutil.copytree(ROOT / "nbs", copy / "nbs", ignore=shutil.ignore_patterns("_*", ".*"))
    before = Path.cwd()
    os.chdir(copy)
    try: build_site(progress=False)
    finally: os.chdir(before)


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    "The site built from the stored notebooks in a copy of the project, and its address; one copy for all processes."
    from llmbook.site import serve
    base = tmp_path_factory.getbasetemp()
    copy = made_once(base.parent if "PYTEST_XDIST_WORKER" in os.environ else base, "project", project_with_site)
    server = serve(copy / "_docs")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield copy / "_docs", f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
