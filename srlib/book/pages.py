"""The collection as web pages: a page for each notebook, and `index.html`, the front page of a results folder.

They need no network and work from the file system. Each picture has its alt text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd
from jinja2 import Environment, PackageLoader
from latex2mathml.converter import convert
from nbformat import NotebookNode
from PIL import Image

from srlib import data, tables
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


def write_page(executed: Path) -> None:
    """Write an executed notebook as an HTML page beside it that needs no other file."""
    from nbconvert import HTMLExporter
    from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath

    class MathML(IPythonRenderer):
        """Formulas as MathML, which browsers draw by themselves; nbconvert leaves TeX to a script from the network."""

        def block_math(self, body: str) -> str:
            return convert(body, display="block")

        def inline_math(self, body: str) -> str:
            return convert(body)

    def to_html(source: str) -> str:
        return MarkdownWithMath(renderer=MathML(escape=False)).render(source)

    resources = {"metadata": {"name": executed.stem}}
    exporter = HTMLExporter(template_file=str(Path(__file__).with_name("notebook.html.j2")))
    exporter.register_filter("markdown2html", to_html)
    html, _ = exporter.from_notebook_node(read_notebook(executed), resources)
    # Page links to page; all of them are in one folder, the solutions' too.
    html = re.sub(r'href="(?:\.\./)?(\d\d_\w+)\.ipynb', r'href="\1.html', html)
    html = html.replace("<th></th>", "<td></td>")  # the corner of pandas' tables heads nothing
    with atomic_path(executed.with_suffix(".html")) as temporary:
        temporary.write_text(html, encoding="utf-8")


def write_index(results: Path, manifest: Mapping[str, Any]) -> Path:
    """Write the front page of a results folder: the claims when they are there, each notebook and its figures.

    Args:
        results: the folder of one run of the collection.
        manifest: what `srlib.book.collection` wrote down about it.

    Returns:
        The page, `index.html` in that folder.
    """
    verdicts, done = results / CLAIMS, manifest["notebooks"]
    page = TEMPLATES.get_template("index.html.j2").render(
        run=manifest,
        virtual=data.get(manifest["dataset"]).virtual,
        time=duration(sum(entry["seconds"] for entry in done.values())),
        claims=tables.read(verdicts).to_dict("records") if verdicts.is_file() else [],
        signs=charts.SIGNS,
        notebooks=[_describe(results, name, done[name]) for name in sorted(done)],
    )
    with atomic_path(results / "index.html") as temporary:
        temporary.write_text(page, encoding="utf-8")
    return results / "index.html"


def _describe(results: Path, name: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    """A notebook's entry in the manifest with its name, title, time in words and the alt text of its figures."""
    cells = read_notebook(results / "notebooks" / f"{name}.ipynb").cells
    heading = re.search(r"(?m)^# (.+)", "\n".join(c.source for c in cells if c.cell_type != "code"))
    figures = {}
    for file in entry["outputs"]:
        if file.endswith(".png"):
            with Image.open(results / file) as image:  # as `Record.show` wrote it
                figures[file] = image.info["Description"]
    return {
        **entry,
        "name": name,
        "title": heading[1] if heading else name,
        "time": duration(entry["seconds"]),
        "tables": sum(file.endswith(".csv") for file in entry["outputs"]),
        "figures": figures,
    }


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
        reach = "{low:.2f} to {high:.2f}".format(**values) if values["low"] < values["high"] else ""
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
