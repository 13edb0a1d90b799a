"""The dashboards live in a real JupyterLab, driven by a real browser: the notebooks are opened, run, and their controls moved."""
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

pytestmark = [pytest.mark.browser, pytest.mark.timeout(1200)]
ROOT = Path(__file__).parent.parent
NOTEBOOKS = {"01a_tokenization": "Tokenizers compared", "02b_gpt": "Attention by layer and head", "02e_sizing": "Model sizing", "03b_optimizers": "Learning-rate schedules"}
LONG = {"01a_tokenization", "02b_gpt", "03b_optimizers"}  # the same class of dashboard, behind minutes of other cells


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    "A JupyterLab on a copy of the notebooks, with every cell on the page instead of only those in sight."
    pytest.importorskip("jupyterlab", reason="JupyterLab is not installed: pip install 'llmbook[dev]'")
    folder, settings = tmp_path_factory.mktemp("lab"), tmp_path_factory.mktemp("settings")
    for name in [*NOTEBOOKS, "01c_playground"]: shutil.copy(ROOT / "nbs" / f"{name}.ipynb", folder)
    for extension, values in (("notebook-extension/tracker", {"windowingMode": "none"}), ("apputils-extension/notification", {"fetchNews": "false", "checkForUpdates": False})):
        path = settings / "@jupyterlab" / f"{extension}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values))
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--ServerApp.port={port}", "--ServerApp.port_retries=0",
               "--IdentityProvider.token=", "--ServerApp.disable_check_xsrf=True", "--ServerApp.ip=127.0.0.1", f"--ServerApp.root_dir={folder}"]
    with open(folder / "lab.log", "w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder, env={**os.environ, "JUPYTERLAB_SETTINGS_DIR": str(settings), "JUPYTER_PREFER_ENV_PATH": "1"})
    try:
        for _ in range(240):
            try: urllib.request.urlopen(f"http://127.0.0.1:{port}/api", timeout=2); break
            except OSError:
                if server.poll() is not None: pytest.fail((folder / "lab.log").read_text()[-2000:])
                time.sleep(0.25)
        yield f"http://127.0.0.1:{port}/"
    finally:
        server.terminate()
        server.wait(20)


def shown(board) -> str:
    "What the live dashboard's parts show: traces of figures, text of the rest."
    return board.evaluate("""el => JSON.stringify([[...el.querySelectorAll('.js-plotly-plot')].map(p => [p._fullLayout.title.text, p.data.map(t => [t.type, Object.keys(t).length, t.z || t.y || t.x])]),
                             [...el.querySelectorAll('.widget-html-content')].map(h => h.innerText)])""")


def changed(board, states, what) -> str:
    "What is shown once it differs from the last state; a dashboard may compute for a while."
    for _ in range(120):
        if (now := shown(board)) != states[-1]: return now
        board.page.wait_for_timeout(250)
    pytest.fail(f"{what} changed nothing")


def run_all(page, name, cells=None):
    "Run every cell, once all of them stand on the page; again where a kernel that was only just starting lost the request."
    cells = cells or sum(c["cell_type"] == "code" for c in json.loads((ROOT / "nbs" / f"{name}.ipynb").read_text())["cells"])
    page.wait_for_function("n => document.querySelectorAll('.jp-CodeCell').length >= n", arg=cells, timeout=60_000)
    for _ in range(4):
        page.wait_for_timeout(1000)
        page.keyboard.press("Escape")
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.locator(".lm-Menu-item[data-command='runmenu:run-all']").click()
        for _ in range(40):
            page.wait_for_timeout(500)
            if page.evaluate("[...document.querySelectorAll('.jp-InputPrompt')].some(p => /\\[\\d+\\]/.test(p.textContent))"): return
    pytest.fail("the kernel ran nothing")


def end_kernels(lab):
    "Stop what the test has started, so that the next one has the machine to itself."
    for session in json.load(urllib.request.urlopen(f"{lab}api/sessions")):
        urllib.request.urlopen(urllib.request.Request(f"{lab}api/sessions/{session['id']}", method="DELETE"))


def open_and_run(v, lab, name, cells=None):
    "Open a notebook and run all of it; of one that isn't the book's, so many code cells."
    page = v.page
    page.goto(f"{lab}lab/workspaces/{name}/tree/{name}.ipynb")
    page.locator(".jp-Notebook .jp-CodeCell").first.wait_for(timeout=60_000)
    page.locator(".jp-Notebook-ExecutionIndicator[data-status=idle]").wait_for(timeout=60_000)
    run_all(page, name, cells)
    return page


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] if name in LONG else []) for name in NOTEBOOKS])
def test_dashboard_is_live(lab, visit, name):
    v = visit(lab)
    page = open_and_run(v, lab, name)
    board = page.locator(".jp-OutputArea-output .widget-vbox").filter(has=page.locator("b", has_text=NOTEBOOKS[name])).first
    board.locator(".js-plotly-plot .main-svg").first.wait_for(state="attached", timeout=600_000)
    board.scroll_into_view_if_needed()
    states = [shown(board)]
    board.locator(".noUi-handle").first.focus()
    page.keyboard.press("ArrowRight")
    states.append(changed(board, states, "a key on the slider"))
    box = board.locator(".noUi-target").first.bounding_box()
    page.mouse.click(box["x"] + 2, box["y"] + box["height"] / 2)
    states.append(changed(board, states, "the mouse on the slider"))
    select = board.locator("select").first
    select.select_option(index=0 if select.evaluate("s => s.selectedIndex") else 1)
    changed(board, states, "another choice in the list")
    assert [f for f in v.faults if f.startswith(("script error", "remote"))] == []
    page.close()
    end_kernels(lab)


def test_playground_is_live(lab, visit):
    "Typing into the text, choosing a method and stepping through merges call Python."
    v = visit(lab)
    page = open_and_run(v, lab, "01c_playground")
    board = page.locator(".jp-OutputArea-output .widget-vbox").filter(has=page.locator("b", has_text="Tokenizer playground")).first
    board.locator("textarea").wait_for(timeout=180_000)
    board.scroll_into_view_if_needed()
    text = lambda: board.locator(".widget-html-content").evaluate_all("els => els.map(e => [e.innerText, e.querySelectorAll('span').length])")
    states = [text()]

    def changed_text(what):
        for _ in range(120):
            if (now := text()) != states[-1]: return states.append(now)
            page.wait_for_timeout(250)
        pytest.fail(f"{what} changed nothing")
    board.locator("textarea").fill("Tokenizers <b>everywhere</b>")
    changed_text("typing")
    assert any("<b>" in part for part, _ in states[-1]), "what is typed is text, not HTML"
    page.wait_for_timeout(1000)
    states.append(text())
    board.locator(".noUi-handle").first.focus()
    page.keyboard.press("ArrowLeft")
    changed_text("a key on the slider")
    board.locator("select").first.select_option(label="Unigram")
    changed_text("another method")
    assert [f for f in v.faults if f.startswith(("script error", "remote"))] == []
    page.close()
    end_kernels(lab)
