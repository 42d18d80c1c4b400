"""The glossary: what it says of the notebooks, and its links from a page."""

import re

import nbformat
import pytest
from bs4 import BeautifulSoup

from srlib.book import glossary
from srlib.files import NOTEBOOKS

TEXT = glossary.FILE.read_text()


def test_terms_are_told_once_and_each_name_leads_to_its_entry():
    names = [name.strip() for names, _ in glossary.ITEM.findall(TEXT) for name in names.split(",")]
    assert len(names) == len(set(names))
    assert 40 <= len(set(glossary.terms().values())) <= 65
    assert glossary.terms()["folds"] == glossary.terms()["fold"]
    assert glossary.terms()["fold"].anchor == "fold"
    assert glossary.terms()["zero-order hold"].text.endswith("(01).")
    items = TEXT.split("## Further reading")[0].count("\n- ")
    assert items == len(glossary.ITEM.findall(TEXT))


@pytest.mark.parametrize(("names", "text"), glossary.ITEM.findall(TEXT))
def test_the_notebooks_named_use_the_term(names, text):
    spelled = {"delta": "delta|Δ", "scan order": "three orders"}
    found = re.findall(r"\.\./notebooks/(\w+)\.ipynb", text)
    for notebook in found:
        cells = nbformat.read(NOTEBOOKS / f"{notebook}.ipynb", as_version=4).cells
        used = " ".join(" ".join(cell.source.split()) for cell in cells)
        words = "|".join(spelled.get(n.strip(), re.escape(n.strip())) for n in names.split(","))
        assert re.search(words, used, re.IGNORECASE), notebook
    assert found or "](" in text, "says where it is explained"


def test_the_first_use_of_a_term_is_linked_and_nothing_in_code_links_or_formulas():
    html = "<h2>Dice</h2><p>A <code>Dice</code> and <a href='x'>Dice</a>: Dice, Dice; Tokens &lt; 3.</p>"
    seen = set()
    page = BeautifulSoup(glossary.link(html, seen), "html.parser")
    links = [(a.text, a["href"]) for a in page.select("a.term")]
    assert links == [("Dice", "../glossary.html#dice"), ("Tokens", "../glossary.html#token")]
    assert page.select("a.term")[0]["title"] == glossary.terms()["Dice"].text
    assert page.get_text() == BeautifulSoup(html, "html.parser").get_text()
    assert seen == {"dice", "token"}
    assert glossary.link("<p>Dice again</p>", seen) == "<p>Dice again</p>"


def test_longer_terms_come_first_and_parts_of_words_are_none():
    (link,) = BeautifulSoup(glossary.link("<p>a selective scan</p>", set()), "html.parser").select(
        "a"
    )
    assert link.text == "selective scan"
    for text in ("stepwise seeded unfold", "dice", "virtual-cohort"):
        assert glossary.link(f"<p>{text}</p>", set()) == f"<p>{text}</p>"
