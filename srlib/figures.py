"""Charts in the collection's visual language: curves, pictures, bars, diagrams and metrics.

Each function takes arrays or a table and returns a `Figure`; `srlib.plots` writes it down and shows it.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axis import Axis
from matplotlib.colors import Normalize, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from matplotlib.ticker import LogLocator, NullLocator
from numpy.typing import ArrayLike

ORANGE, SKY, GREEN, YELLOW = "#E69F00", "#56B4E9", "#009E73", "#F0E442"
BLUE, VERMILLION, PURPLE, GREY = "#0072B2", "#D55E00", "#CC79A7", "#595959"
# The first five are told apart without red or green cones too; what has more classes needs its markers or hatches.
CLASS_COLOURS = (VERMILLION, SKY, YELLOW, BLUE, GREEN, PURPLE, ORANGE)
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
METRICS = {"dice": "Dice (1: perfect)", "nsd": "NSD (1: perfect)", "hd95": "HD95 (mm, 0: perfect)"}

Panels = Mapping[str, Mapping[str, ArrayLike]]


def subplots(rows: int = 1, columns: int = 1, height: float = 3, **options: Any) -> tuple:
    """A figure 7.5 inches wide and its axes; options as in `Figure.subplots`."""
    figure = Figure(figsize=(7.5, height))
    return figure, figure.subplots(rows, columns, **options)


def plain_ticks(axis: Axis) -> None:
    """Label a logarithmic axis with 1, 2, 5, 10, 20, ... instead of powers."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_locator(NullLocator())


def signals(x: ArrayLike, panels: Panels, xlabel: str, step: bool = False) -> Figure:
    """Curves over one axis, a panel for each quantity; a legend where the curves' names are not those above.

    Args:
        x: (n,) positions.
        panels: label of the vertical axis, with its unit -> name of the curve -> (n,) values.
        xlabel: label of the horizontal axis, with its unit.
        step: draw each value as constant until the next position.
    """
    height = max(2.6, 1.5 * len(panels) + 0.6)
    figure, axes = subplots(len(panels), height=height, sharex=True, squeeze=False)
    above: list[str] = []
    for axis, (ylabel, curves) in zip(axes[:, 0], panels.items(), strict=True):
        for (name, y), dash in zip(curves.items(), itertools.cycle(("-", "--", ":", "-."))):
            axis.plot(x, y, dash, label=name, drawstyle="steps-post" if step else "default")
        axis.set(ylabel=ylabel)
        if len(curves) > 1 and list(curves) != above:
            axis.legend(loc="center left", bbox_to_anchor=(1, 0.5))
        above = list(curves)
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


def metric_strips(table: pd.DataFrame) -> Figure:
    """Each case as a point, a column for each class, median and quartiles beside it; distances start at zero.

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
        if metric == "hd95":
            axis.set_ylim(0, 1.08 * max(1, table["hd95"].max()))
        axis.grid(axis="y", color="#DDDDDD", linewidth=0.6)
    return figure


def volume_agreement(table: pd.DataFrame) -> Figure:
    """Predicted against reference volume, and difference against mean (Bland and Altman 1986).

    Lines of a class: the mean difference, and around it the limits of agreement, 1.96 standard deviations away.

    Args:
        table: columns `class`, `volume_ref_ml`, `volume_pred_ml`; a row for each case and class.
    """
    figure, (left, right) = subplots(1, 2, height=3.4)
    for at, (name, rows) in enumerate(table.groupby("class", sort=False)):
        style = {"s": 22, "color": CLASS_COLOURS[at % 7], "marker": MARKERS[at % 7]}
        reference, predicted = rows["volume_ref_ml"], rows["volume_pred_ml"]
        left.scatter(reference, predicted, **style, label=str(name))
        right.scatter((reference + predicted) / 2, predicted - reference, **style)
        bias, sd = (predicted - reference).mean(), (predicted - reference).std()
        right.axhline(bias, color=style["color"], linewidth=1)
        for limit in (bias - 1.96 * sd, bias + 1.96 * sd):
            right.axhline(limit, color=style["color"], linewidth=1, linestyle=":")
    left.axline(
        (reference.mean(),) * 2, slope=1, color=GREY, linewidth=1, linestyle="--", label="equal"
    )
    right.axhline(0, color=GREY, linewidth=1, linestyle="--")
    left.set(xlabel="reference volume (ml)", ylabel="predicted volume (ml)")
    right.set(xlabel="mean of both volumes (ml)", ylabel="predicted minus reference (ml)")
    figure.legend(loc="outside upper center", ncols=table["class"].nunique() + 1)
    return figure


def beside_bars(panels: Mapping[str, tuple[pd.DataFrame, float]], log: bool = False) -> Figure:
    """What is published and what was found, a panel for each quantity, with the bar that a claim sets.

    Args:
        panels: label of the horizontal axis, with its unit -> a row for each rival with columns `published`, `here`,
            `low`, `high` (NaN: not there), and the bar.
        log: a logarithmic axis, for ratios.
    """
    counts = [len(table) for table, _ in panels.values()]
    ratios = {"height_ratios": [n + 1 for n in counts]}
    height = 0.27 * sum(counts) + 0.75 * len(counts) + 0.5
    options: dict[str, Any] = {"sharex": True, "squeeze": False, "gridspec_kw": ratios}
    figure, axes = subplots(len(panels), height=height, **options)
    for axis, (label, (table, bar)) in zip(axes[:, 0], panels.items(), strict=True):
        rows = np.arange(len(table))
        reach = [table["here"] - table["low"], table["high"] - table["here"]]
        style = {"fmt": "o", "color": BLUE, "capsize": 3}
        axis.errorbar(table["here"], rows, xerr=reach, label="here, and its reach", **style)
        hollow = {"facecolor": "white", "edgecolor": ORANGE, "linewidth": 1.6}
        axis.scatter(table["published"], rows - 0.22, 34, marker="D", label="published", **hollow)
        axis.axvline(bar, color=GREY, linestyle="--", linewidth=1, label="what is claimed")
        axis.set(xlabel=label, xscale="log" if log else "linear", ylim=(len(table) - 0.4, -0.8))
        axis.set_yticks(rows, table.index)
        axis.tick_params(labelbottom=True)
    if log:
        plain_ticks(axis.xaxis)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return figure
