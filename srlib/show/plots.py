"""Figures and tables of a notebook: written down with what they were computed with, and displayed.

`srlib.show.charts`, `volumes` and `views` draw the figures; what notebooks use of them can be imported here.
"""

from __future__ import annotations

import base64
import io
import textwrap
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import pandas as pd
from IPython.display import display
from matplotlib.figure import Figure
from PIL import Image

from srlib import data, machine, tables
from srlib.files import atomic_path, results_dir
from srlib.show.charts import *  # noqa: F403
from srlib.show.charts import GREY
from srlib.show.views import *  # noqa: F403
from srlib.show.volumes import *  # noqa: F403


def inline(figure: Figure) -> str:
    """A figure as the notebooks hold it: PNG at 200 dpi in Base64; of 256 colours, a third as large."""
    drawn, small = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", dpi=200)
    with Image.open(drawn) as image:
        image.convert("RGB").quantize(256).save(small, "PNG", optimize=True, dpi=(200, 200))
    return base64.b64encode(small.getvalue()).decode()


@dataclass(frozen=True)
class Record:
    """Folder of a notebook's figures and tables, and the stamp that they get.

    Args:
        profile: name of the profile that the notebook runs with.
        dataset: name of its data set in the catalogue.
        seed: the seed of what is shown.
        inputs: source of the shown numbers; `None` means the data set.
        reference: provenance of tables that the repository holds, which is stamped instead of all these.
    """

    profile: str
    dataset: str
    seed: int = 0
    inputs: str | None = None
    reference: str | None = None

    def __post_init__(self) -> None:
        mpl.style.use(Path(__file__).with_name("style.mplstyle"))

    def stamp(self) -> str:
        """Profile, data, device, seed and commit, as written on each figure and in each table."""
        smoke = ": a test, not a result" if self.profile == "smoke" else ""
        virtual = " (virtual cohort)" if data.get(self.dataset).virtual else ""
        inputs, device = self.inputs or self.dataset + virtual, machine.device().type.upper()
        head, changed = machine.commit()
        commit = f"commit {head[:8]}{'+changes' if changed else ''}"
        here = f"{self.profile} profile{smoke} | {inputs} | {device} | seed {self.seed}"
        return f"{self.reference or here} | {commit}"

    def show(self, figure: Figure, name: str, alt: str) -> None:
        """Stamp a figure, write it as PNG (300 dpi) and SVG, and display it in the notebook.

        Args:
            figure: as a function of those modules returns it.
            name: file name without suffix, unique in the collection, as in `04-cases`.
            alt: text for readers who do not see the figure; it goes into the files, the notebook and its page.

        Raises:
            ValueError: for an empty `alt`.
        """
        if not alt.strip():
            raise ValueError(f"figure {name!r} needs alt text that says what it shows")
        inch = 1 / figure.get_figheight()
        lines = textwrap.wrap(self.stamp(), 110)
        foot = (0.05 + 0.15 * len(lines)) * inch
        figure.set_layout_engine("constrained", rect=(0, foot, 1, 1 - foot))
        for up, line in enumerate(reversed(lines)):
            figure.text(0.01, (0.05 + 0.15 * up) * inch, line, size=8, color=GREY, parse_math=False)
        folder = results_dir(self.profile, self.dataset, self.seed) / "figures"
        about = {"Title": name, "Description": alt}
        with atomic_path(folder / f"{name}.png") as path:
            figure.savefig(path, dpi=300, metadata=about)
        with atomic_path(folder / f"{name}.svg") as path:
            figure.savefig(path, metadata=about | {"Date": None})
        bundle = {"image/png": inline(figure), "text/plain": alt}
        shown = {"alt": alt, "width": round(100 * figure.get_figwidth())}  # sharp on any screen
        display(bundle, raw=True, metadata={"image/png": shown})

    def table(
        self, table: pd.DataFrame, name: str, digits: int = 3, html: str | None = None
    ) -> None:
        """Write a table as CSV, the stamp in a first line that starts with `#`, and display it.

        Args:
            table: its index is not written; one that means something is made a column first.
            name: file name without suffix, unique in the collection.
            digits: decimals displayed; the file holds six significant digits.
            html: displayed instead of the plain form.
        """
        folder = results_dir(self.profile, self.dataset, self.seed) / "tables"
        tables.write(table, folder / f"{name}.csv", self.stamp())
        decimals = f"{{:,.{digits}f}}".format
        html = html or table.to_html(index=False, border=0, float_format=decimals)
        text = table.to_string(index=False, float_format=decimals)
        display({"text/html": html, "text/plain": text}, raw=True)
