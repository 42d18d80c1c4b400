"""The collection as web pages, one small book: `index.html` in front, a page for each notebook, glossary and search.

They need no network and work from the file system. Each picture has its alt text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd
from bs4 import BeautifulSoup
from jinja2 import Environment, PackageLoader
from latex2mathml.converter import convert
from nbformat import NotebookNode
from PIL import Image

from srlib import data, tables
from srlib.book import glossary
from srlib.files import atomic_path
from srlib.show import charts, plots
from srlib.study import claims

TEMPLATES = Environment(loader=PackageLoader("srlib.book", "."), autoescape=True, trim_blocks=True)
README_FIGURES = ("00-real-case.png", "07-claims.png")
STRIPS, SENTENCE = "published and measured", "in a sentence"
CLAIMS = "tables/07-claims.csv"  # the verdicts, which the notebook about the claims writes


def read_notebook(file: Path) -> NotebookNode:
    """Read a notebook, in format 4.

    Raises:
        ValueError: an empty or cut file, or of another type; names the file.
    """
    try:
        notebook = nbformat.read(file, as_version=4)
        nbformat.validate(notebook)
    except (ValueError, AttributeError, TypeError, KeyError, nbformat.ValidationError) as error:
        said = str(error).splitlines()[0][:100]
        raise ValueError(f"{file}: expected a notebook of Jupyter ({said}); remove it") from error
    return notebook


def to_html(source: str) -> str:
    """Markdown as HTML, as nbconvert makes it, but for formulas: MathML, which browsers draw by themselves."""
    from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath

    class MathML(IPythonRenderer):
        """The renderer of nbconvert leaves TeX to a script from the network."""

        def block_math(self, body: str) -> str:
            return convert(body, display="block")

        def inline_math(self, body: str) -> str:
            return convert(body)

    return MarkdownWithMath(renderer=MathML(escape=False)).render(source)


def write_page(executed: Path) -> None:
    """Write an executed notebook as an HTML page beside it, with links to the glossary, without its navigation."""
    from nbconvert import HTMLExporter

    notebook, linked = read_notebook(executed), set[str]()
    style = TEMPLATES.get_template("book.html.j2").module.style()  # type: ignore[attr-defined]
    name = _title(notebook, executed.stem)
    resources = {"metadata": {"name": name}, "book_style": style}
    exporter = HTMLExporter(template_file=str(Path(__file__).with_name("notebook.html.j2")))
    exporter.register_filter("markdown2html", lambda text: glossary.link(to_html(text), linked))
    html, _ = exporter.from_notebook_node(notebook, resources)
    # Page links to page; all of them are in one folder, the solutions' too.
    html = re.sub(r'href="(?:\.\./)?(\d\d_\w+)\.ipynb', r'href="\1.html', html)
    html = html.replace("<th></th>", "<td></td>")  # the corner of pandas' tables heads nothing
    _write(executed.with_suffix(".html"), html)


def write_index(results: Path, manifest: Mapping[str, Any]) -> Path:
    """Write the front page of a results folder: the claims when they are there, each notebook and its figures.

    Args:
        results: the folder of one run of the collection.
        manifest: what `srlib.book.collection` wrote down about it.

    Returns:
        The page, `index.html` in that folder.
    """
    verdicts, done = results / CLAIMS, manifest["notebooks"]
    # Solutions come last: who reads on from a notebook does not want them next.
    names = sorted(done, key=lambda name: (name.endswith("_solutions"), name))
    chapters = [_describe(results, name, done[name]) for name in names]
    page = TEMPLATES.get_template("index.html.j2").render(
        run=manifest,
        virtual=data.get(manifest["dataset"]).virtual,
        time=duration(sum(entry["seconds"] for entry in done.values())),
        claims=tables.read(verdicts).to_dict("records") if verdicts.is_file() else [],
        signs=charts.SIGNS,
        notebooks=chapters,
    )
    _bind(results, chapters)
    _write(results / "index.html", page)
    return results / "index.html"


def _bind(results: Path, chapters: Sequence[Mapping[str, Any]]) -> None:
    """Give the notebooks' pages their navigation; write the glossary, the search and its index."""
    book = TEMPLATES.get_template("book.html.j2").module
    index = []
    for k, chapter in enumerate(chapters):
        file = results / "notebooks" / f"{chapter['name']}.html"
        sections = _sections(read_notebook(file.with_suffix(".ipynb")))
        index += [
            (f"notebooks/{file.name}{anchor and f'#{anchor}'}", chapter["title"], heading, text)
            for level, anchor, heading, text in sections
        ]
        within = [(anchor, heading) for level, anchor, heading, _ in sections if level == 2]
        before, after = chapters[k - 1] if k else None, (*chapters[k + 1 :], None)[0]
        parts = {
            "top": book.top("../", chapters, chapter["name"], within),  # type: ignore[attr-defined]
            "foot": book.foot(before, after),  # type: ignore[attr-defined]
        }
        html = file.read_text(encoding="utf-8") if file.is_file() else ""
        if not all(f"<!--{name}-->" in html for name in parts):  # an older version's page
            write_page(file.with_suffix(".ipynb"))
            html = file.read_text(encoding="utf-8")
        for name, part in parts.items():
            marks = f"<!--{name}-->", f"<!--/{name}-->"
            start, rest = html.split(marks[0], 1)
            html = start + marks[0] + str(part) + marks[1] + rest.split(marks[1], 1)[1]
        _write(file, html)

    text = _glossary({chapter["name"] for chapter in chapters})
    for term in dict.fromkeys(glossary.terms().values()):
        name = next(name for name, other in glossary.terms().items() if other == term)
        index.append((f"glossary.html#{term.anchor}", "Glossary", name, term.text))
    for name, more in (("glossary", {"text": text}), ("search", {})):
        template = TEMPLATES.get_template(f"{name}.html.j2")
        _write(results / f"{name}.html", template.render(chapters=chapters, **more))
    # A script and no JSON: from the file system a browser reads no other kind.
    listed = json.dumps(index, ensure_ascii=False, separators=(",", ":"))
    _write(results / "search-index.js", f"const SECTIONS = {listed};\n")


def _sections(notebook: NotebookNode) -> list[tuple[int, str, str, str]]:
    """Level, anchor, heading and text (with the code) of each section; the first is the notebook's own."""
    sections: list[tuple[int, str, str, list[str]]] = [(1, "", "", [])]
    for cell in notebook.cells:
        if cell.cell_type == "code":
            sections[-1][3].append(cell.source.removeprefix("# NBVAL_CHECK_OUTPUT"))
            continue
        for part in BeautifulSoup(to_html(cell.source), "html.parser").find_all(recursive=False):
            if (part.name or "") in ("h1", "h2", "h3") and part.get("id"):
                heading = part.get_text().removesuffix("¶")
                sections.append((int(part.name[1]), str(part["id"]), heading, []))
            else:
                sections[-1][3].append(part.get_text(" "))
    return [
        (level, anchor, heading, " ".join(" ".join(text).split()))
        for level, anchor, heading, text in sections
        if heading
    ]


def _glossary(pages: Collection[str]) -> str:
    """The glossary as HTML: an anchor for each term; links to those of its pages that are there."""
    soup = BeautifulSoup(to_html(glossary.FILE.read_text(encoding="utf-8")), "html.parser")
    for item in soup.select("li:has(> strong:first-child)"):
        item["id"] = glossary.anchor(item.strong.get_text())  # type: ignore[union-attr]
    for mark in soup.select("a.anchor-link"):
        mark.decompose()
    for link in soup.find_all("a", href=True):
        to = str(link["href"])
        if inside := re.match(r"\.\./notebooks/(?:solutions/)?(\w+)\.ipynb", to):
            if inside[1] in pages:
                link["href"] = f"notebooks/{inside[1]}.html"
            else:
                link.unwrap()
        elif not to.startswith(("https://", "#")):
            link.unwrap()  # a page of the repository's documentation
    return str(soup)


def _describe(results: Path, name: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    """A notebook's entry in the manifest with its name, title, time in words and the alt text of its figures."""
    notebook = read_notebook(results / "notebooks" / f"{name}.ipynb")
    figures = {}
    for file in entry["outputs"]:
        if file.endswith(".png"):
            with Image.open(results / file) as image:  # as `Record.show` wrote it
                figures[file] = image.info["Description"]
    return {
        **entry,
        "name": name,
        "title": _title(notebook, name),
        "time": duration(entry["seconds"]),
        "tables": sum(file.endswith(".csv") for file in entry["outputs"]),
        "figures": figures,
    }


def _title(notebook: NotebookNode, name: str) -> str:
    """The first heading of a notebook, or its name."""
    texts = "\n".join(cell.source for cell in notebook.cells if cell.cell_type != "code")
    heading = re.search(r"(?m)^# (.+)", texts)
    return heading[1] if heading else name


def _write(file: Path, text: str) -> None:
    with atomic_path(file) as temporary:
        temporary.write_text(text, encoding="utf-8")


def claims_page(answers: Mapping[str, claims.Finding]) -> str:
    """Claims (`srlib.study.claims.findings`) as HTML for wide and narrow screens: a row each, its numbers fold out."""
    rows = []
    for claim, answer in answers.items():
        numbers, unit = claims.side_by_side(claim, answer), claims.CLAIMS[claim].unit
        about = f"Strip of published and measured numbers, {unit}; the details beside it hold them"
        row: dict[str, Any] = {"claim": claim, "verdict": answer.verdict, STRIPS: ""}
        row[SENTENCE] = {"text": answer.sentence}
        if len(numbers):
            row[STRIPS] = {"alt": about, "png": plots.inline(charts.strip(claim, answer))}
            lines = {name: _numbers(values.dropna()) for name, values in numbers.iterrows()}
            row[SENTENCE] |= {"unit": unit, "lines": lines}
        rows.append(row)
    template = TEMPLATES.get_template("claims.html.j2")
    note = "Diamonds: published. Dots: measured here, of Dice with intervals for other cases and seeds (corrected),"
    note += (
        f" else with the range of all settings. Green: what is claimed. Dice: {claims.evidence()}."
    )
    return str(template.module.table(rows, charts.SIGNS, note))  # type: ignore[attr-defined]


def _numbers(values: pd.Series) -> str:
    """A rival's numbers in words."""
    printed = values.drop(["here", "low", "high"], errors="ignore")
    said = [f"{table}: {value:.2f}" for table, value in printed.items()]
    if "here" in values:
        there = {"low", "high"} <= {*values.index} and values["low"] < values["high"]
        reach = "{low:.2f} to {high:.2f}".format(**values) if there else ""
        said.append(f"here: {values['here']:.2f}" + (f" ({reach})" if reach else ""))
    return "; ".join(said)


def duration(seconds: float) -> str:
    """Seconds as people read them: `7 s`, `2 min 05 s`, `3 h 20 min`."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def store_figures(results: Path, target: Path) -> None:
    """Copy the README's figures, made smaller, from the figures of a results folder; those that are there."""
    for name in README_FIGURES:  # the notebook of the first one needs real data
        if (source := results / "figures" / name).is_file():
            with Image.open(source) as image, atomic_path(target / name) as temporary:
                image.thumbnail((1400, 2000))
                image.convert("RGB").quantize(256).save(temporary, format="PNG", optimize=True)
