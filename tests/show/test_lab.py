"""JupyterLab as its user meets it: a headless Chromium runs a notebook and moves the explorers' sliders.

Chromium is the system's own (Debian: `apt-get install chromium`); Playwright's download is not used.
"""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from srlib import files

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
EXPLORERS = """import numpy as np
from srlib.show.explore import explore_cases, explore_orders, explore_overlap
from srlib.show.volumes import CaseView
labels = np.pad(np.ones((4, 4, 4), int), 3)
display(explore_cases(lambda _: CaseView(labels, {"reference": labels}), ["one"], ["cube"], (1, 1, 1)))
display(explore_orders())
display(explore_overlap())"""
PARAMETERS = """import json
(cell,) = (c for c in json.load(open("00_start_here.ipynb"))["cells"] if "parameters" in c["metadata"].get("tags", []))
exec("".join(cell["source"]))
print(INTERACTIVE)"""


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """The address of a JupyterLab, as `run_all.sh lab` starts it, on the first notebook and one with both explorers."""
    folder = tmp_path_factory.mktemp("lab") / "notebooks"
    folder.mkdir()
    shutil.copy(files.NOTEBOOKS / "00_start_here.ipynb", folder)
    python = {"kernelspec": {"name": "python3", "display_name": "any", "language": "python"}}
    cells = [new_code_cell(EXPLORERS), new_code_cell(PARAMETERS)]
    explorers = new_notebook(cells=cells, metadata=python)
    nbformat.write(explorers, folder / "explorers.ipynb")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "srlib", "lab", "--no-browser", "--allow-root"]
    command += [f"--ServerApp.root_dir={folder}", f"--ServerApp.port={port}"]
    command += ["--IdentityProvider.token=", "--LabApp.expose_app_in_browser=True"]
    environment = {name: value for name, value in os.environ.items() if name != "SRLIB_INTERACTIVE"}
    environment |= {"PYTHONPATH": str(files.ROOT), "SRLIB_PROFILE": "smoke"}
    log = (folder.parent / "log").open("w")
    server = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            assert server.poll() is None, (folder.parent / "log").read_text()
            with contextlib.suppress(urllib.error.URLError, TimeoutError):
                urllib.request.urlopen(f"{address}/api", timeout=5)
                break
            time.sleep(0.5)
        yield address
    finally:
        server.terminate()
        server.wait(timeout=60)
        log.close()


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


def move(tab, slider: str, key: str) -> tuple[str, str]:
    """Press a key on an explorer's slider; the picture's alt text before and after."""
    row = tab.locator(".widget-slider", has=tab.get_by_text(slider, exact=True))
    explorer = tab.locator(".jp-OutputArea-child .widget-vbox", has=row)
    picture = explorer.locator("img")
    before = picture.get_attribute("alt"), picture.get_attribute("src")
    row.locator(".noUi-handle").press(key)
    playwright.expect(picture).not_to_have_attribute("src", before[1], timeout=60_000)
    playwright.expect(picture).not_to_have_attribute("alt", before[0], timeout=60_000)
    return before[0], picture.get_attribute("alt")


def test_lab_opens_at_the_start(tab):
    tab.goto("/")
    tab.wait_for_selector(".jp-RenderedHTMLCommon h1")
    assert tab.locator(".jp-RenderedHTMLCommon h1").first.inner_text().startswith("00 Start here")
    assert tab.url.endswith("/lab/tree/00_start_here.ipynb")
    assert tab.locator(".lm-DockPanel-tabBar .lm-TabBar-tab").count() == 1


def test_the_explorers_follow_their_sliders(tab):
    tab.goto("/lab/tree/explorers.ipynb?reset")
    tab.wait_for_function(CONNECTED)
    cell, opened = tab.evaluate(RUN_ALL)
    assert [output["output_type"] for output in cell["outputs"]] == ["display_data"] * 3
    assert [output["text"] for output in opened["outputs"]] == ["True\n"]  # no variable is set
    before, after = move(tab, "position", "ArrowLeft")
    assert before.startswith("Order inter_slice up to step 63 in a grid of [4, 4, 4]")
    assert after.startswith("Order inter_slice up to step 62 in a grid of [4, 4, 4]")
    before, after = move(tab, "slice", "ArrowRight")
    assert before.startswith("Case one, axial slice 3")
    assert after.startswith("Case one, axial slice 4")
    before, after = move(tab, "right (mm)", "ArrowRight")
    assert before.startswith("Moved 4 mm right and 0 mm front; compact: Dice 0.")
    assert after.startswith("Moved 5 mm right and 0 mm front; compact: Dice 0.")
    assert tab.complaints == []
