"""The pages: complete, readable without a network, accessible."""

import re
import shutil
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from bs4 import BeautifulSoup
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from PIL import Image, PngImagePlugin

from srlib.book import pages as site

ENTRY = {
    "device": "a CPU, 2 threads",
    "commit": "0123456789abcdef",
    "dirty": False,
    "finished": "2026-01-02T03:04:05+00:00",
}


def write_picture(file: Path, alt: str) -> None:
    about = PngImagePlugin.PngInfo()
    about.add_text("Description", alt)
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 6)).save(file, pnginfo=about)


@pytest.fixture
def results(tmp_path):
    """A results folder of two notebooks, the first with a figure and a table; its pages are written."""
    folder = tmp_path / "smoke" / "mni152"
    write_picture(folder / "figures" / "00-one.png", 'a "small" figure & more')
    (folder / "notebooks").mkdir()
    text = (
        "## Next\n\nSee [the second](01_second.ipynb#part), back to [the first](../00_first.ipynb)."
    )
    shown = "# a comment\n@decorate\ndef f(x):\n    return 1 + x**0.5 if x in [2] else 'text'"
    table = pd.DataFrame({"a": [1, 2]}).to_html()
    output = new_output("execute_result", data={"text/html": table}, execution_count=1)
    for name, title in (("00_first", "00 First & foremost"), ("01_second", "01 Second")):
        code = new_code_cell(shown, outputs=[output], execution_count=1)
        cells = [new_markdown_cell(f"# {title}\n\nText."), new_markdown_cell(text), code]
        python = {"language_info": {"name": "python", "pygments_lexer": "ipython3"}}
        nbformat.write(
            new_notebook(cells=cells, metadata=python), folder / "notebooks" / f"{name}.ipynb"
        )
        site.write_page(folder / "notebooks" / f"{name}.ipynb")
    return folder


@pytest.fixture
def manifest():
    outputs = ["figures/00-one.png", "figures/00-one.svg", "tables/00-one.csv"]
    notebooks = {
        "00_first": {"seconds": 65.2, "outputs": outputs, **ENTRY},
        "01_second": {"seconds": 7, "outputs": [], **ENTRY, "dirty": True},
    }
    return {"profile": "smoke", "dataset": "mni152", "seed": 0, "notebooks": notebooks}


def read(page: Path) -> BeautifulSoup:
    return BeautifulSoup(page.read_text(), "html.parser")


def test_index_has_each_notebook_s_title_time_and_figures(results, manifest):
    page = read(site.write_index(results, manifest))
    first, second = page.select("section")
    assert first.h2.text == "00 First & foremost"
    assert "1 min 05 s" in first.p.text
    assert "1 tables, 1 figures" in first.p.text
    assert [picture["alt"] for picture in first.select("img")] == ['a "small" figure & more']
    assert "commit 01234567+changes" in second.p.text
    assert not second.select("img")
    assert "a test of the machinery" in page.header.text
    assert "virtual" in page.header.text


def test_index_leads_to_files_that_are_there_and_nowhere_else(results, manifest):
    (results / "manifest.json").touch()
    page = read(site.write_index(results, manifest))
    targets = [tag["href"] for tag in page.select("[href]")] + [
        i["src"] for i in page.select("img")
    ]
    assert {"notebooks/00_first.html", "notebooks/01_second.html"} < set(targets)
    for target in targets:
        assert (results / target).is_file(), target
    assert not page.select("script")


def test_index_shows_the_claims_when_they_are_there(results, manifest):
    assert "claims" not in site.write_index(results, manifest).read_text()
    (results / "tables").mkdir()
    (results / site.CLAIMS).write_text("# stamp\nclaim,verdict\nless memory,holds <in part>\n")
    page = read(site.write_index(results, manifest))
    assert [cell.text for cell in page.select("th[scope=col]")] == ["claim", "verdict"]
    assert [cell.text for cell in page.select("th[scope=row]")] == ["less memory"]
    assert [cell.text for cell in page.select("td")] == ["holds <in part>"]


def test_a_notebook_s_page_loads_nothing_and_links_to_pages(results):
    page = read(results / "notebooks" / "00_first.html")
    assert not page.select("[src^=http], link[href^=http]")
    assert not [s for s in page.select("script") if re.search("https?://", s.text)]
    links = [link["href"] for link in page.select("main a:not(.anchor-link)")]
    assert links == ["01_second.html#part", "00_first.html"]


def test_axe_finds_nothing(results, manifest):
    """axe-core's rules on the front page and a notebook's page, in Chromium, without a network."""
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("no Chromium on this machine (Debian: apt-get install chromium)")
    from axe_playwright_python.sync_playwright import Axe
    from playwright.sync_api import sync_playwright

    (results / "tables").mkdir()
    (results / site.CLAIMS).write_text("# stamp\nclaim,verdict\nless memory,holds\n")
    pages = [site.write_index(results, manifest), results / "notebooks" / "00_first.html"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        tab = browser.new_page()
        complaints = []
        tab.on("requestfailed", lambda request: complaints.append(request.url))
        tab.on("console", lambda message: complaints.append(message.text))
        for page in pages:
            tab.goto(page.as_uri())
            found = Axe().run(tab).response["violations"]
            complaints += [f"{page.name}: {v['id']}: {v['nodes'][0]['html']}" for v in found]
        browser.close()
    assert complaints == []


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 s"),
        (59.6, "1 min 00 s"),
        (65, "1 min 05 s"),
        (3599.7, "1 h 00 min"),
        (12000, "3 h 20 min"),
    ],
)
def test_duration(seconds, text):
    assert site.duration(seconds) == text


def test_the_readme_s_figure_is_copied_smaller(tmp_path):
    site.store_figure(tmp_path, tmp_path / "kept")  # not there, as without real data
    assert not (tmp_path / "kept").exists()
    (tmp_path / "figures").mkdir()
    Image.new("RGB", (3000, 1500), "white").save(tmp_path / "figures" / site.README_FIGURE)
    site.store_figure(tmp_path, tmp_path / "kept")
    with Image.open(tmp_path / "kept" / site.README_FIGURE) as image:
        assert image.size == (1400, 700)
