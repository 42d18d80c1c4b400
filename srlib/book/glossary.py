"""The glossary, `docs/glossary.md`: its terms, and links to them from the pages.

A term is an item of a list that begins with it in bold: `- **Dice**: ...`. Several names of one thing are
separated by commas: `- **token, tokens**: ...`.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import NamedTuple

from bs4 import BeautifulSoup, NavigableString

from srlib.files import ROOT

FILE = ROOT / "docs" / "glossary.md"
ITEM = re.compile(r"(?m)^- \*\*(.+?)\*\*: (.+(?:\n  .+)*)")
# Where no term is linked: links in links, code, formulas, headings, hints that open.
UNLINKED = {"a", "code", "pre", "math", "summary", "h1", "h2", "h3", "h4"}


class Term(NamedTuple):
    """An entry of the glossary: its anchor on the page and what it says, as plain text."""

    anchor: str
    text: str


@lru_cache(maxsize=1)
def terms() -> dict[str, Term]:
    """Each name in the glossary -> its entry."""
    found: dict[str, Term] = {}
    for names, text in ITEM.findall(FILE.read_text(encoding="utf-8")):
        plain = re.sub(r"\[([^]]+)\]\([^)]*\)", r"\1", " ".join(text.split())).replace("`", "")
        term = Term(anchor(names), plain.replace("*", ""))
        found |= {name.strip(): term for name in names.split(",")}
    return found


def anchor(names: str) -> str:
    """The anchor of an entry: its first name in small letters, with hyphens."""
    return re.sub(r"\W+", "-", names.split(",")[0].strip().lower()).strip("-")


@lru_cache(maxsize=1)
def _pattern() -> re.Pattern[str]:
    """All names, the longest first; a name in small letters may begin a sentence."""
    names = []
    for name in sorted(terms(), key=len, reverse=True):
        either = f"[{name[0]}{name[0].upper()}]" if name.islower() else re.escape(name[0])
        names.append(either + re.escape(name[1:]))
    return re.compile(rf"(?<![\w-])(?:{'|'.join(names)})(?![\w-])")


def link(html: str, seen: set[str], page: str = "../glossary.html") -> str:
    """HTML with links to the glossary from the first use of each term.

    Args:
        html: a fragment.
        seen: anchors of the terms that the page has linked already; those of this fragment are added.
        page: address of the glossary, from the fragment's page.
    """
    soup = BeautifulSoup(html, "html.parser")
    before = len(seen)
    for text in soup.find_all(string=True):
        if UNLINKED & {parent.name for parent in text.parents}:
            continue
        parts: list = []
        at = 0
        for found in _pattern().finditer(text):
            name = found[0] if found[0] in terms() else found[0][0].lower() + found[0][1:]
            term = terms()[name]
            if term.anchor in seen:
                continue
            seen.add(term.anchor)
            to = {"href": f"{page}#{term.anchor}", "class": "term", "title": term.text}
            tag = soup.new_tag("a", attrs=to)
            tag.string = found[0]
            parts += [NavigableString(text[at : found.start()]), tag]
            at = found.end()
        if parts:
            text.replace_with(*parts, NavigableString(text[at:]))
    return str(soup) if len(seen) > before else html
