"""The pages: complete, readable without a network, accessible."""

import base64
import json
import re
import shutil
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from bs4 import BeautifulSoup
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from PIL import Image, PngImagePlugin

from srlib.book import pages

ALT = 'a "small" figure & <more>'
LINKS = "## Next\n\n[The second](01_second.ipynb#Next), back to [the first](../00_first.ipynb)."
CODE = "# a comment\n@decorate\ndef f(x):\n    return 1 + x**0.5 if x in [2] else 'text'"
TABLES = ["tables/00-one.csv"]
OTHERS = ("notebooks/00_first.html", "notebooks/01_second.html", "glossary.html", "search.html")
FIGURES = ["figures/00-one.png", "figures/00-one.svg"]


@pytest.fixture
def results(tmp_path):
    """A results folder of two notebooks, the first with a figure; their pages and the claims are written."""
    for name in ("figures", "notebooks", "tables"):
        (tmp_path / name).mkdir()
    about = PngImagePlugin.PngInfo()
    about.add_text("Description", ALT)
    Image.new("RGB", (8, 6)).save(tmp_path / FIGURES[0], pnginfo=about)
    png = base64.b64encode((tmp_path / FIGURES[0]).read_bytes()).decode()
    table = {"text/html": pd.DataFrame({"a": [1, 2]}).to_html()}
    outputs = [new_output("execute_result", data=table, execution_count=1)]
    shown = {"image/png": {"alt": ALT, "width": 750}}
    outputs.append(
        new_output("display_data", {"image/png": png, "text/plain": ALT}, metadata=shown)
    )
    for name, title in (("00_first", "00 First & foremost"), ("01_second", "01 Second")):
        code = new_code_cell(CODE, outputs=outputs, execution_count=1)
        cells = [new_markdown_cell(f"# {title}\n\nText."), new_markdown_cell(LINKS), code]
        file = tmp_path / "notebooks" / f"{name}.ipynb"
        nbformat.write(new_notebook(cells=cells), file)
        pages.write_page(file)
    (tmp_path / pages.CLAIMS).write_text("# stamp\nclaim,verdict\nless memory,holds <in part>\n")
    (tmp_path / "manifest.json").touch()
    return tmp_path


def _manifest() -> dict:
    entry = {"device": "a CPU, 2 threads", "commit": "0123456789abcdef", "outputs": []}
    entry |= {"finished": "2026-01-02T03:04:05+00:00", "dirty": True, "seconds": 7}
    first = entry | {"seconds": 65.2, "outputs": FIGURES + TABLES, "dirty": False}
    manifest = {"profile": "smoke", "dataset": "mni152", "seed": 0}
    return manifest | {"notebooks": {"00_first": first, "01_second": entry}}


@pytest.fixture
def index(results):
    return pages.write_index(results, _manifest())


def read(page: Path) -> BeautifulSoup:
    return BeautifulSoup(page.read_text(), "html.parser")


def test_index_has_the_claims_and_each_notebook_s_title_time_and_figures(index):
    claims, first, second = read(index).select("section")
    assert [cell.text for cell in claims.select("th[scope=col]")] == ["claim", "verdict"]
    assert [cell.text for cell in claims.select("th[scope=row]")] == ["less memory"]
    assert [cell.text for cell in claims.select("td")] == ["holds <in part>"]
    assert first.h2.text == "00 First & foremost"
    assert "1 min 05 s" in first.p.text
    assert "1 tables, 1 figures" in first.p.text
    assert [picture["alt"] for picture in first.select("img")] == [ALT]
    assert "commit 01234567+changes, 2026-01-02." in second.p.text
    assert not second.select("img")
    assert "a test of the machinery" in read(index).main.text
    assert "virtual" in read(index).main.text


def test_index_leads_to_files_that_are_there_and_nowhere_else(index):
    page = read(index)
    targets = [tag["href"] for tag in page.select("[href]")]
    targets += [tag["src"] for tag in page.select("[src]")]
    assert {"notebooks/00_first.html", "notebooks/01_second.html", FIGURES[0]} < set(targets)
    for target in targets:
        assert (index.parent / target).is_file(), target
    assert not page.select("script")


def test_a_notebook_s_page_loads_nothing_and_links_to_pages(results):
    page = read(results / "notebooks" / "00_first.html")
    assert not page.select("[src^=http], link[href^=http]")
    assert not [s for s in page.select("script") if re.search("https?://", s.text)]
    links = [link["href"] for link in page.select("main a:not(.anchor-link)")]
    assert links == ["01_second.html#Next", "00_first.html"]
    (picture,) = page.select("main img")
    assert (picture["alt"], picture["width"]) == (ALT, "750")


def test_each_page_leads_to_the_others(index, results):
    first, second = (
        read(results / "notebooks" / f"{name}.html") for name in ("00_first", "01_second")
    )
    assert [a["href"] for a in first.select("nav ol > li > a")][:2] == [
        "../notebooks/00_first.html",
        "#Next",
    ]
    assert first.select_one("nav [aria-current]").text == "00 First & foremost"
    assert [a["href"] for a in first.select("a[rel]")] == ["01_second.html"]
    assert [a["href"] for a in second.select("a[rel]")] == ["00_first.html"]
    for name in OTHERS:
        page = read(results / name)
        assert page.title.text
        for target in page.select("[href], [src], [action]"):
            address = target.get("href") or target.get("src") or target.get("action")
            file, _, anchor = address.partition("#")
            if file.startswith(("https://", "data:")):
                continue
            there = (results / name).parent / file if file else results / name
            assert there.is_file(), address
            assert not anchor or read(there).find(id=anchor), address


def test_navigation_is_filled_in_once_however_often_the_collection_runs(index, results):
    page = results / "notebooks" / "00_first.html"
    before = page.read_text()
    entry = {"seconds": 1, "outputs": [], "device": "", "commit": "", "finished": ""}
    manifest = {
        "profile": "smoke",
        "dataset": "mni152",
        "seed": 0,
        "notebooks": {"00_first": entry},
    }
    pages.write_index(results, manifest)
    assert len(page.read_text()) < len(before)  # the second notebook is none of this run's
    assert len(read(page).select("header.book")) == 1


def test_solutions_come_after_the_notebooks(index, results):
    for kind in ("ipynb", "html"):
        shutil.copy(
            results / f"notebooks/00_first.{kind}", results / f"notebooks/00_first_solutions.{kind}"
        )
    entry = {"seconds": 1, "outputs": [], "device": "", "commit": "", "finished": ""}
    done = dict.fromkeys(("00_first", "00_first_solutions", "01_second"), entry)
    pages.write_index(
        results, {"profile": "smoke", "dataset": "mni152", "seed": 0, "notebooks": done}
    )
    (link,) = read(results / "notebooks" / "00_first.html").select("a[rel=next]")
    assert link["href"] == "01_second.html"


def test_the_glossary_links_to_the_notebooks_that_are_there(index, results):
    page = read(results / "glossary.html")
    assert page.find(id="dice").strong.text == "Dice"
    links = [a["href"] for a in page.select("main a")]
    assert links  # further reading
    assert all(link.startswith("https://") for link in links)
    assert "(04)" in page.find(id="dice").text
    assert "Further reading" in page.text


def test_the_index_of_the_search_has_each_section_with_its_code(index, results):
    text = (results / "search-index.js").read_text().removeprefix("const SECTIONS = ")
    sections = json.loads(text.rstrip(";\n"))
    assert ["notebooks/00_first.html#Next", "00 First & foremost", "Next"] in [
        s[:3] for s in sections
    ]
    (found,) = (s[3] for s in sections if s[0] == "notebooks/01_second.html#Next")
    assert "back to the first" in found
    assert "@decorate" in found
    assert ["glossary.html#cmmb", "Glossary", "CMMB"] in [s[:3] for s in sections]
    for address, *_ in sections:
        file, _, anchor = address.partition("#")
        assert read(results / file).find(id=anchor), address


@pytest.fixture
def tab():
    """A page of Chromium; without one the test is skipped and says so."""
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("no Chromium on this machine (Debian: apt-get install chromium)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser.new_page()
        browser.close()


def test_the_search_finds_sections_from_the_file_system(index, results, tab):
    tab.goto((results / "notebooks" / "00_first.html").as_uri())
    tab.get_by_label("Search all pages").fill("back SECOND")
    tab.get_by_role("button", name="Search").click()
    tab.wait_for_selector("#found li")
    links = [a.get_attribute("href") for a in tab.locator("#found a").all()]
    assert links == ["notebooks/01_second.html#Next", "notebooks/00_first.html#Next"]
    assert "2 sections with: back, second" in tab.locator("#said").inner_text()
    assert tab.locator("#found mark").first.inner_text().lower() in ("back", "second")
    tab.goto((results / "search.html").as_uri() + "?q=%3Cimg%20src%3Dx%3E")
    assert tab.locator("#said").inner_text().startswith("0 sections with: <img, src=x>")
    assert tab.locator("main img").count() == 0


def test_axe_finds_nothing(index, results, tab):
    """axe-core's rules on the front page and a notebook's page, in Chromium, without a network."""
    from axe_playwright_python.sync_playwright import Axe

    complaints = []
    tab.on("requestfailed", lambda request: complaints.append(request.url))
    tab.on("console", lambda message: complaints.append(message.text))
    for page in (index, *(results / name for name in OTHERS)):
        tab.goto(page.as_uri())
        found = Axe().run(tab).response["violations"]
        complaints += [f"{page.name}: {v['id']}: {v['nodes'][0]['html']}" for v in found]
    assert complaints == []


def test_duration():
    said = [pages.duration(seconds) for seconds in (0.4, 59.6, 65, 3599.7, 12000)]
    assert said == ["0 s", "1 min 00 s", "1 min 05 s", "1 h 00 min", "3 h 20 min"]


def test_the_readme_s_figures_are_copied_smaller(tmp_path):
    pages.store_figures(tmp_path, tmp_path / "kept")  # not there, as without real data
    assert not (tmp_path / "kept").exists()
    (tmp_path / "figures").mkdir()
    for name in pages.README_FIGURES:
        Image.new("RGB", (3000, 1500), "white").save(tmp_path / "figures" / name)
    pages.store_figures(tmp_path, tmp_path / "kept")
    for name in pages.README_FIGURES:
        with Image.open(tmp_path / "kept" / name) as image:
            assert image.size == (1400, 700)


def test_formulas_are_mathml(tmp_path):
    text = r"A rate $\bar A = e^{\Delta A}$:" + "\n\n" + r"$$\int_0^1 x\,dx$$"
    file = tmp_path / "00_formulas.ipynb"
    nbformat.write(new_notebook(cells=[new_markdown_cell(f"# 00 Formulas\n\n{text}")]), file)
    pages.write_page(file)
    page = read(file.with_suffix(".html"))
    formulas = page.select("math")
    assert [formula.get("display") for formula in formulas] == ["inline", "block"]
    assert "∫" in formulas[-1].text
    assert "$$" not in page.text


def test_pages_of_an_older_version_are_written_again(results, index):
    page = results / "notebooks" / "00_first.html"
    new = page.read_text()
    for older in ("<html>without navigation</html>", None):
        page.unlink() if older is None else page.write_text(older)
        pages.write_index(results, _manifest())
        assert page.read_text() == new
