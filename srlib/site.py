"""The collection as web pages that need no other file and no network."""

from __future__ import annotations

import itertools
import re
from html import escape
from pathlib import Path
from typing import Any

import nbformat

from srlib.paths import atomic_path


def with_alt_text(notebook: Any) -> Any:
    """Turn a notebook's pictures into HTML with their alt text, which nbconvert would drop.

    Args:
        notebook: as read by nbformat; changed in place and returned.
    """
    for output in itertools.chain(*(cell.get("outputs", []) for cell in notebook.cells)):
        alt = output.get("metadata", {}).get("image/png", {}).get("alt")
        if alt:
            source = "data:image/png;base64," + "".join(output["data"]["image/png"]).strip()
            output["data"] = {"text/html": f'<img alt="{escape(alt)}" src="{source}">'}
    return notebook


def write_page(executed: Path) -> None:
    """Write an executed notebook as an HTML page beside it that needs no other file."""
    from nbconvert import HTMLExporter

    resources = {"metadata": {"name": executed.stem}}
    notebook = with_alt_text(nbformat.read(executed, as_version=4))
    html, _ = HTMLExporter().from_notebook_node(notebook, resources)
    html = re.sub(r'href="(\d\d_\w+)\.ipynb', r'href="\1.html', html)  # page links to page
    with atomic_path(executed.with_suffix(".html")) as temporary:
        temporary.write_text(html, encoding="utf-8")
