"""JupyterLab as its user meets it: a headless Chromium runs notebooks and moves the explorers' sliders.

Chromium is the system's own (Debian: `apt-get install chromium`); Playwright's download is not used.
"""

import os
import shutil
import socket
import subprocess
import sys
import urllib.error
import urllib.request

import pytest

from srlib import paths

playwright = pytest.importorskip("playwright.sync_api", reason='needs the extra "dev": playwright')
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        CHROMIUM is None, reason="no Chromium on this machine (Debian: apt-get install chromium)"
    ),
]
# Runs every cell of the open notebook; returns what its cells then hold.
RUN_ALL = """async () => {
    const lab = window.jupyterapp;
    await lab.commands.execute("notebook:clear-all-cell-outputs");
    await lab.commands.execute("notebook:run-all-cells");
    return lab.shell.currentWidget.content.model.toJSON().cells;
}"""
CONNECTED = """() => window.jupyterapp?.shell.currentWidget?.sessionContext
    ?.session?.kernel?.connectionStatus === 'connected'"""
# A long notebook holds only those cells in the page that are near; layout may move them away again.
GO_TO = """index => {
    const notebook = window.jupyterapp.shell.currentWidget.content;
    notebook.activeCellIndex = index;
    return notebook.scrollToItem(index, "start");
}"""


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """The address of a JupyterLab, as `run_all.sh lab` starts it, on a copy of the notebooks."""
    folder = tmp_path_factory.mktemp("lab") / "notebooks"
    shutil.copytree(paths.NOTEBOOKS, folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "srlib", "lab", "--no-browser", "--allow-root"]
    command += [f"--ServerApp.root_dir={folder}", f"--ServerApp.port={port}"]
    command += ["--IdentityProvider.token=", "--LabApp.expose_app_in_browser=True"]
    environment = os.environ | {"PYTHONPATH": str(paths.ROOT), "SRLIB_PROFILE": "smoke"}
    log = (folder.parent / "log").open("w")
    server = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(f"{address}/api", timeout=5)
                break
            except (urllib.error.URLError, TimeoutError):
                assert server.poll() is None, (folder.parent / "log").read_text()
                server_wait(server)
        yield address
    finally:
        server.terminate()
        server.wait(timeout=60)
        log.close()


def server_wait(server: subprocess.Popen) -> None:
    """Half a second, or less when the server ends."""
    try:
        server.wait(timeout=0.5)
    except subprocess.TimeoutExpired:
        return


@pytest.fixture
def tab(lab):
    """A browser's tab whose errors are collected in `tab.complaints`."""
    with playwright.sync_playwright() as engine:
        browser = engine.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": 1400, "height": 1000}, base_url=lab)
        tab.set_default_timeout(120_000)
        tab.complaints = []
        tab.on("pageerror", lambda error: tab.complaints.append(str(error)))
        tab.on("console", lambda said: said.type == "error" and tab.complaints.append(said.text))
        yield tab
        browser.close()


def run_all(tab, notebook: str) -> list[dict]:
    """Open a notebook in a fresh workspace and run its cells."""
    tab.goto(f"/lab/tree/{notebook}?reset")
    tab.wait_for_function(CONNECTED)
    return tab.evaluate(RUN_ALL)


def move(tab, cells: list[dict], slider: str, key: str) -> tuple[str, str]:
    """Press a key on an explorer's slider; the picture's alt text before and after."""
    (at,) = [k for k, cell in enumerate(cells) if "explore_" in "".join(cell["source"])]
    explorer = tab.locator(".widget-vbox", has=tab.locator(".noUi-handle"))
    for _ in range(60):
        tab.evaluate(GO_TO, at)
        tab.wait_for_timeout(500)
        if explorer.count():
            break
    picture = explorer.locator("img")
    before = picture.get_attribute("alt"), picture.get_attribute("src")
    row = explorer.locator(".widget-slider", has=tab.get_by_text(slider, exact=True))
    row.locator(".noUi-handle").press(key)
    playwright.expect(picture).not_to_have_attribute("src", before[1], timeout=60_000)
    playwright.expect(picture).not_to_have_attribute("alt", before[0], timeout=60_000)
    return before[0], picture.get_attribute("alt")


def check_outcome(tab, cells: list[dict]) -> None:
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    errors = [
        output for cell in code for output in cell["outputs"] if output["output_type"] == "error"
    ]
    assert errors == []
    assert tab.complaints == []


def keep(tab, name: str) -> None:
    """A screenshot for those who want to look: into `$SRLIB_SCREENSHOTS`."""
    if folder := os.environ.get("SRLIB_SCREENSHOTS"):
        tab.screenshot(path=f"{folder}/{name}.png")


def test_lab_opens_at_the_start(tab):
    tab.goto("/")
    tab.wait_for_selector(".jp-RenderedHTMLCommon h1")
    assert tab.locator(".jp-RenderedHTMLCommon h1").first.inner_text().startswith("00 Start here")
    assert tab.url.endswith("/lab/tree/00_start_here.ipynb")
    assert tab.locator(".lm-DockPanel-tabBar .lm-TabBar-tab").count() == 1
    keep(tab, "start")


def test_the_architecture_runs_and_its_path_is_walked(tab):
    cells = run_all(tab, "01_architecture.ipynb")
    before, after = move(tab, cells, "position", "ArrowLeft")
    keep(tab, "orders")
    assert before.startswith("Order inter_slice up to step 63 in a grid of [4, 4, 4]")
    assert after.startswith("Order inter_slice up to step 62 in a grid of [4, 4, 4]")
    check_outcome(tab, cells)


def test_the_evaluation_runs_and_its_cases_are_leafed_through(tab):
    cells = run_all(tab, "04_evaluation.ipynb")
    before, after = move(tab, cells, "slice", "ArrowRight")
    keep(tab, "evaluation")
    assert before != after
    assert ", axial slice " in after
    check_outcome(tab, cells)
