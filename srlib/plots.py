"""Figures and tables of the notebooks: one visual language, one way to write them down.

A `Record` says what a notebook works with; its `show` and `table` write a figure or a table, stamped,
and display it. The functions below it take arrays or tables and return a `Figure`. Volumes are arrays
(D, H, W) in the orientation of `srlib.data`: to the right, to the front, upwards.
"""

from __future__ import annotations

import base64
import io
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
import pandas as pd
from IPython.display import display
from matplotlib.axes import Axes
from matplotlib.colors import Normalize, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from mpl_toolkits.mplot3d.art3d import Line3DCollection
from numpy.typing import ArrayLike

from srlib import data, provenance, runs
from srlib.paths import atomic_path, results_dir

ORANGE, SKY, GREEN, YELLOW = "#E69F00", "#56B4E9", "#009E73", "#F0E442"
BLUE, VERMILLION, PURPLE, GREY = "#0072B2", "#D55E00", "#CC79A7", "#595959"
CLASS_COLOURS = (ORANGE, SKY, YELLOW, PURPLE, GREEN, VERMILLION, BLUE)
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
PLANES = {"sagittal": 0, "coronal": 1, "axial": 2}  # plane -> the array axis that it cuts
AXIS_LABELS = ("left to right, mm", "back to front, mm", "bottom to top, mm")
METRICS = {"dice": "Dice (1: perfect)", "nsd": "NSD (1: perfect)", "hd95": "HD95 (mm, 0: perfect)"}

Panels = Mapping[str, Mapping[str, ArrayLike]]


@dataclass(frozen=True)
class Record:
    """Where a notebook's figures and tables go, and what they are stamped with.

    Args:
        profile: name of the profile that the notebook runs with.
        dataset: name of its data set's entry in the registry.
        seed: the seed of what is shown.
        inputs: what the shown numbers come from; `None` means the data set.
    """

    profile: str
    dataset: str
    seed: int = 0
    inputs: str | None = None

    def __post_init__(self) -> None:
        mpl.style.use(Path(__file__).with_name("style.mplstyle"))

    def stamp(self) -> str:
        """Profile, data, device, seed and commit, as written on each figure and in each table."""
        smoke = ": a test, not a result" if self.profile == "smoke" else ""
        virtual = " (virtual cohort)" if data.get(self.dataset).virtual else ""
        inputs, device = self.inputs or self.dataset + virtual, runs.device().type.upper()
        head, changed = provenance.commit()
        commit = f"commit {head[:8]}{'+changes' if changed else ''}"
        return f"{self.profile} profile{smoke} | {inputs} | {device} | seed {self.seed} | {commit}"

    def show(self, figure: Figure, name: str, alt: str) -> None:
        """Stamp a figure, write it as PNG (300 dpi) and SVG, and display it in the notebook.

        Args:
            figure: what one of the functions below returned.
            name: file name without suffix, unique in the collection, as in `04-cases`.
            alt: what a reader who does not see the figure must be told; it goes into the files, the
                notebook and, through `with_alt_text`, its page.

        Raises:
            ValueError: for an empty `alt`.
        """
        if not alt.strip():
            raise ValueError(f"figure {name!r} needs alt text that says what it shows")
        inch = 1 / figure.get_figheight()
        figure.set_layout_engine("constrained", rect=(0, 0.2 * inch, 1, 1 - 0.2 * inch))
        figure.text(0.01, 0.05 * inch, self.stamp(), size=8, color=GREY)
        folder = results_dir(self.profile, self.dataset, self.seed) / "figures"
        about = {"Title": name, "Description": alt}
        with atomic_path(folder / f"{name}.png") as path:
            figure.savefig(path, dpi=300, metadata=about)
        with atomic_path(folder / f"{name}.svg") as path:
            figure.savefig(path, metadata=about | {"Date": None})
        inline = io.BytesIO()
        figure.savefig(inline, format="png", dpi=100)
        bundle = {"image/png": base64.b64encode(inline.getvalue()).decode(), "text/plain": alt}
        display(bundle, raw=True, metadata={"image/png": {"alt": alt}})

    def table(self, table: pd.DataFrame, name: str, digits: int = 3) -> None:
        """Write a table as CSV, the stamp in a first line that starts with `#`, and display it.

        Args:
            table: its index is not written; one that means something is made a column first.
            name: file name without suffix, unique in the collection.
            digits: decimals displayed; the file holds six significant digits.
        """
        folder = results_dir(self.profile, self.dataset, self.seed) / "tables"
        path = folder / f"{name}.csv"
        body = table.to_csv(index=False, float_format="%.6g", lineterminator="\n")
        with atomic_path(path) as temporary:
            temporary.write_text(f"# {self.stamp()}\n{body}", encoding="utf-8")
        decimals = f"{{:,.{digits}f}}".format
        html = table.to_html(index=False, border=0, float_format=decimals)
        text = table.to_string(index=False, float_format=decimals)
        display({"text/html": html, "text/plain": text}, raw=True)


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


def subplots(rows: int = 1, columns: int = 1, height: float = 3, **options: Any) -> tuple:
    """A figure 7.5 inches wide and its axes; options as in `Figure.subplots`."""
    figure = Figure(figsize=(7.5, height))
    return figure, figure.subplots(rows, columns, **options)


def signals(x: ArrayLike, panels: Panels, xlabel: str, step: bool = False) -> Figure:
    """Curves over one axis, a panel for each quantity.

    Args:
        x: (n,) positions.
        panels: label of the vertical axis, with its unit -> name of the curve -> (n,) values.
        xlabel: label of the horizontal axis, with its unit.
        step: draw each value as constant until the next position.
    """
    height = max(2.6, 1.5 * len(panels) + 0.6)
    figure, axes = subplots(len(panels), height=height, sharex=True, squeeze=False)
    for axis, (ylabel, curves) in zip(axes[:, 0], panels.items(), strict=True):
        for (name, y), dash in zip(curves.items(), itertools.cycle(("-", "--", ":", "-."))):
            axis.plot(x, y, dash, label=name, drawstyle="steps-post" if step else "default")
        axis.set(ylabel=ylabel)
        if len(curves) > 1:
            axis.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    axes[-1, 0].set(xlabel=xlabel)
    figure.align_ylabels()
    return figure


def heat_maps(grid: Panels, label: str, xlabel: str, ylabel: str, annotate: bool = False) -> Figure:
    """Small pictures in rows and columns that share one colour scale.

    Args:
        grid: title of the row -> title of the column -> picture (height, width).
        label: what the colour means, with its unit.
        xlabel: what runs across a picture.
        ylabel: what runs down a picture.
        annotate: write each pixel's value into it.
    """
    pictures = [[np.asarray(v, dtype=float) for v in line.values()] for line in grid.values()]
    values = np.concatenate([picture.ravel() for line in pictures for picture in line])
    norm = Normalize(values.min(), values.max())
    tall, broad = pictures[0][0].shape
    height = len(grid) * (min(2.2, 5.2 / len(pictures[0])) * tall / broad + 0.15) + 0.9
    figure, axes = subplots(len(grid), len(pictures[0]), height=height, squeeze=False)
    for axis, picture in zip(axes.flat, itertools.chain(*pictures), strict=True):
        drawn = axis.imshow(picture, cmap="viridis", norm=norm)
        axis.set(xticks=[], yticks=[])
        for (y, x), value in np.ndenumerate(picture) if annotate else ():
            ink = "white" if norm(value) < 0.6 else "black"
            axis.text(x, y, f"{value:g}", ha="center", va="center", size=8, color=ink)
    for axis, title in zip(axes[:, 0], grid, strict=True):
        axis.set_ylabel(f"{title}\n{ylabel}", linespacing=1.6)
    for top, bottom, title in zip(axes[0], axes[-1], next(iter(grid.values())), strict=True):
        top.set_title(title)
        bottom.set_xlabel(xlabel)
    figure.colorbar(drawn, ax=axes, label=label)
    return figure


def stacked_bars(table: pd.DataFrame, xlabel: str) -> Figure:
    """A bar for each row of the table, its columns stacked, the total written at the end."""
    figure, axis = subplots(height=0.34 * len(table) + 1.2)
    left = np.zeros(len(table))
    for column, colour, hatch in zip(table, CLASS_COLOURS, itertools.cycle(("", "///", "..."))):
        style = {"color": colour, "hatch": hatch, "edgecolor": "white", "label": column}
        axis.barh(table.index.astype(str), table[column], left=left, **style)
        left += table[column]
    for row, total in enumerate(left):
        axis.text(total, row, f" {total:,.3g}", va="center", size=8)
    axis.invert_yaxis()
    axis.set(xlabel=xlabel, xlim=(0, 1.12 * left.max()))
    figure.legend(loc="outside upper center", ncols=len(table.columns))
    return figure


def diagram(boxes: Mapping[str, tuple], arrows: Sequence[tuple[str, str, str]]) -> Figure:
    """Boxes and arrows.

    Args:
        boxes: name -> (x, y, text, colour); one unit is the place of one box.
        arrows: (from box, to box, text beside the arrow).
    """
    xs, ys = zip(*(box[:2] for box in boxes.values()), strict=True)
    figure, axis = subplots(height=0.62 * (max(ys) - min(ys) + 1) + 0.3)
    shapes = {}
    for name, (x, y, text, colour) in boxes.items():
        tint = [0.6 + 0.4 * channel for channel in to_rgb(colour)]
        box = FancyBboxPatch((x - 0.42, y - 0.34), 0.84, 0.68, "round,pad=0,rounding_size=0.1")
        shapes[name] = axis.add_patch(box)
        box.set(facecolor=tint, edgecolor=colour)
        axis.text(x, y, text, ha="center", va="center", size=8)
    for start, end, text in arrows:
        (x0, y0), (x1, y1) = boxes[start][:2], boxes[end][:2]
        style = {"arrowstyle": "-|>", "color": GREY, "shrinkA": 0, "shrinkB": 0}
        style |= {"patchA": shapes[start], "patchB": shapes[end]}
        axis.annotate("", (x1, y1), (x0, y0), arrowprops=style)
        axis.text((x0 + x1) / 2, (y0 + y1) / 2 + 0.06, text, size=8, color=GREY, ha="center")
    axis.set(xlim=(min(xs) - 0.5, max(xs) + 0.5), ylim=(min(ys) - 0.45, max(ys) + 0.45))
    axis.set_axis_off()
    return figure


def scan_paths(shape: Sequence[int], orders: Mapping[str, ArrayLike]) -> Figure:
    """Scan orders as paths through a small grid of voxels, from dark to light; jumps are dashed.

    Args:
        shape: (D, H, W) of the grid.
        orders: name -> (L,) the tokens in the order visited, indices into the row-major grid.
    """
    options = {"subplot_kw": {"projection": "3d"}, "squeeze": False}
    figure, axes = subplots(1, len(orders), height=3.4, **options)
    for axis, (name, order) in zip(axes[0], orders.items(), strict=True):
        points = np.stack(np.unravel_index(np.asarray(order), tuple(shape)), axis=1)  # (L, 3)
        steps = np.stack([points[:-1], points[1:]], axis=1)  # (L - 1, 2, 3)
        jumps = np.abs(steps[:, 1] - steps[:, 0]).sum(axis=1) > 1
        for far, dash, width in ((False, "-", 2.2), (True, (0, (2, 2)), 0.8)):
            lines = Line3DCollection(steps[jumps == far], linewidths=width, linestyles=dash)
            lines.set(array=np.flatnonzero(jumps == far), clim=(0, len(points) - 1), cmap="viridis")
            axis.add_collection(lines)
        axis.scatter(*points.T, color="#BBBBBB", s=8, depthshade=False)
        axis.scatter(*points[0], color=VERMILLION, s=45, depthshade=False, label="first")
        axis.scatter(*points[-1], color=BLUE, s=45, marker="s", depthshade=False, label="last")
        axis.set(xlabel="D", ylabel="H", zlabel="W", title=name)
        axis.set(xticks=range(shape[0]), yticks=range(shape[1]), zticks=range(shape[2]))
        axis.set_box_aspect(tuple(shape), zoom=0.95)
        for ruler in (axis.xaxis, axis.yaxis, axis.zaxis):
            ruler.set_tick_params(pad=-3)
            ruler.labelpad = -7
    figure.legend(*axis.get_legend_handles_labels(), loc="outside upper right", ncols=2)
    figure.colorbar(lines, ax=axes, label="step", shrink=0.6, location="bottom", aspect=40)
    return figure


class Tile(NamedTuple):
    """A slice of a volume (D, H, W), with the labels (D, H, W) as outlines, or `filled`.

    Without `at` it lies where the plane cuts most foreground, or in the middle.
    """

    title: str
    image: ArrayLike
    labels: ArrayLike | None = None
    plane: str = "axial"
    at: int | None = None
    filled: bool = False


def tiles(
    items: Sequence[Tile], classes: Sequence[str], spacing: Sequence[float], columns: int
) -> Figure:
    """Slices side by side.

    Args:
        items: the slices, row by row.
        classes: names of the labels 1, 2, ...
        spacing: of the voxels, in mm.
        columns: slices in a row; up to three are drawn with axes in mm.
    """
    ruled, rows = columns <= 3, -(-len(items) // columns)
    extent = np.array(np.shape(items[0].image)) * spacing
    sides = [np.delete(extent, PLANES[item.plane]) for item in items]
    size = (7.3 / columns - 0.55 * ruled) * max(up / across for across, up in sides)
    height = rows * (size + 0.25 + 0.65 * ruled) + 0.5
    figure, axes = subplots(rows, columns, height=height, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, item in zip(axes.flat, items, strict=False):
        _draw_slice(axis, item, spacing, len(classes))
        axis.axison = ruled
    legend = zip(classes, itertools.cycle(CLASS_COLOURS))
    handles = [mpl.lines.Line2D([], [], color=colour, label=name) for name, colour in legend]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles))
    return figure


def _draw_slice(axis: Axes, item: Tile, spacing: Sequence[float], n_classes: int) -> None:
    image, cut = np.asarray(item.image), PLANES[item.plane]
    labels = np.zeros(image.shape) if item.labels is None else np.asarray(item.labels)
    at = fullest(labels)[cut] if item.at is None else item.at
    across, up = (k for k in range(3) if k != cut)
    dx, dy = spacing[across], spacing[up]
    extent = (0, image.shape[across] * dx, 0, image.shape[up] * dy)
    low, high = np.percentile(image, (0.5, 99.5))
    axis.imshow(np.take(image, at, axis=cut).T, origin="lower", extent=extent, vmin=low, vmax=high)
    framed = np.pad(np.take(labels, at, axis=cut).T, 1)  # closes outlines that run along the border
    x, y = (np.arange(framed.shape[1]) - 0.5) * dx, (np.arange(framed.shape[0]) - 0.5) * dy
    draw = axis.contourf if item.filled else axis.contour
    for k in range(n_classes):
        if (framed == k + 1).any():
            draw(x, y, framed == k + 1, [0.5, 1.5], colors=CLASS_COLOURS[k % 7])
    axis.set(title=item.title, xlabel=AXIS_LABELS[across], ylabel=AXIS_LABELS[up])
    axis.set(xlim=extent[:2], ylim=extent[2:])


def fullest(labels: ArrayLike) -> tuple[int, ...]:
    """For each axis the slice that cuts most foreground, the middle one when there is none."""
    inside = np.asarray(labels) > 0
    if not inside.any():
        return tuple(n // 2 for n in inside.shape)
    return tuple(int(inside.sum(axis=tuple({0, 1, 2} - {k})).argmax()) for k in range(3))


def gallery(
    cases: Mapping[str, tuple[ArrayLike, ArrayLike, ArrayLike]],
    classes: Sequence[str],
    spacing: Sequence[float],
) -> Figure:
    """Cases as rows: image, reference, prediction, and the voxels in which the two differ.

    Args:
        cases: title -> (image, reference, prediction), each (D, H, W).
        classes: names of the labels 1, 2, ...
        spacing: of the voxels, in mm.
    """
    items = []
    for title, (image, *both) in cases.items():
        reference, prediction = (np.asarray(labels) for labels in both)
        at = fullest(reference)[PLANES["axial"]]
        differs = np.where(reference != prediction, len(classes) + 1, 0)
        columns = {title: None, "reference": reference, "prediction": prediction}
        items += [Tile(name, image, labels, at=at) for name, labels in columns.items()]
        items.append(Tile("difference", image, differs, at=at, filled=True))
    return tiles(items, [*classes, "reference and prediction differ"], spacing, columns=4)


def metric_strips(table: pd.DataFrame) -> Figure:
    """Each case as a point, a column for each class, median and quartiles beside it.

    Args:
        table: columns `class`, `dice`, `nsd`, `hd95`; a row for each case and class.
    """
    figure, axes = subplots(1, len(METRICS), height=3.2)
    for axis, (metric, label) in zip(axes, METRICS.items(), strict=True):
        groups = table.groupby("class", sort=False)[metric]
        for at, (_, values) in enumerate(groups):
            across = at + np.linspace(-0.12, 0.12, len(values))
            axis.scatter(across, values, 16, CLASS_COLOURS[at % 7], marker=MARKERS[at % 7])
            low, middle, high = np.percentile(values, (25, 50, 75))
            axis.errorbar(at + 0.27, middle, [[middle - low], [high - middle]], fmt="ok", capsize=3)
        axis.set(
            xticks=range(len(groups)), xticklabels=groups.groups, xlim=(-0.5, len(groups) - 0.4)
        )
        axis.set(ylabel=label)
        axis.grid(axis="y", color="#DDDDDD", linewidth=0.6)
    return figure


def volume_agreement(table: pd.DataFrame) -> Figure:
    """Predicted against reference volume, and difference against mean (Bland and Altman 1986).

    Args:
        table: columns `class`, `volume_ref_ml`, `volume_pred_ml`; a row for each case and class.
    """
    figure, (left, right) = subplots(1, 2, height=3.4)
    for at, (name, rows) in enumerate(table.groupby("class", sort=False)):
        style = {"s": 22, "color": CLASS_COLOURS[at % 7], "marker": MARKERS[at % 7]}
        reference, predicted = rows["volume_ref_ml"], rows["volume_pred_ml"]
        left.scatter(reference, predicted, **style, label=str(name))
        right.scatter((reference + predicted) / 2, predicted - reference, **style)
        right.axhline((predicted - reference).mean(), color=style["color"], linewidth=1)
    left.axline(
        (reference.mean(),) * 2, slope=1, color=GREY, linewidth=1, linestyle="--", label="equal"
    )
    right.axhline(0, color=GREY, linewidth=1, linestyle="--")
    left.set(xlabel="reference volume (ml)", ylabel="predicted volume (ml)")
    right.set(xlabel="mean of both volumes (ml)", ylabel="predicted minus reference (ml)")
    figure.legend(loc="outside upper center", ncols=table["class"].nunique() + 1)
    return figure
