"""Charts: curves, pictures, bars, diagrams, metrics of cases and comparisons of networks.

Each function takes arrays or a table and returns a `Figure`, which `srlib.show.plots.Record` writes down and shows. A
table of cases is as `srlib.study.grid.cases` returns it; the intervals come from `srlib.study.statistics`, as seaborn,
which draws the points, would compute others.
"""

from __future__ import annotations

import textwrap
from collections.abc import Collection, Mapping, Sequence
from itertools import cycle
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import Normalize, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle
from matplotlib.ticker import LogLocator, NullLocator
from numpy.typing import ArrayLike

from srlib.data import cue
from srlib.study import claims, statistics

ORANGE, SKY, GREEN, YELLOW = "#E69F00", "#56B4E9", "#009E73", "#F0E442"
BLUE, VERMILLION, PURPLE, GREY = "#0072B2", "#D55E00", "#CC79A7", "#595959"
# The first five are told apart without red or green cones too; what has more classes needs its markers or hatches.
CLASS_COLOURS = (VERMILLION, SKY, YELLOW, BLUE, GREEN, PURPLE, ORANGE)
COLOURS = (BLUE, VERMILLION, GREEN, ORANGE, PURPLE, SKY, GREY)  # lines: yellow is too pale
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", "--", ":", "-.")
METRIC_LABELS = {"dice": "Dice (1: perfect)", "nsd": "NSD (1: perfect)"}
METRIC_LABELS["hd95"] = "HD95 (mm, 0: perfect)"
COSTS = {"parameters": "parameters (millions)", "gmacs": "forward pass (GMACs)"}
COSTS["captured_ms"] = "step on a GPU (ms)"
LINE: dict[str, Any] = {"color": GREY, "linewidth": 1, "linestyle": "--"}  # for orientation

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
        for (name, y), dash in zip(curves.items(), cycle(DASHES)):
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
        label: meaning of the colour, with its unit.
        xlabel: label of a picture's horizontal axis.
        ylabel: label of a picture's vertical axis.
        annotate: write each pixel's value into it.
    """
    titles = list(next(iter(grid.values())))
    pictures = [np.asarray(v, dtype=float) for line in grid.values() for v in line.values()]
    norm = Normalize(min(map(np.min, pictures)), max(map(np.max, pictures)))
    tall, broad = pictures[0].shape
    height = len(grid) * (min(2.2, 5.2 / len(titles)) * tall / broad + 0.15) + 0.9
    figure, axes = subplots(len(grid), len(titles), height=height, squeeze=False)
    for axis, picture in zip(axes.flat, pictures, strict=True):
        drawn = axis.imshow(picture, cmap="viridis", norm=norm)
        axis.set(xticks=[], yticks=[])
        for (y, x), value in np.ndenumerate(picture) if annotate else ():
            ink = "white" if norm(value) < 0.6 else "black"
            axis.text(x, y, f"{value:g}", ha="center", va="center", size=8, color=ink)
    for axis, title in zip(axes[:, 0], grid, strict=True):
        axis.set_ylabel(f"{title}\n{ylabel}", linespacing=1.6)
    for top, bottom, title in zip(axes[0], axes[-1], titles, strict=True):
        top.set_title(title)
        bottom.set_xlabel(xlabel)
    figure.colorbar(drawn, ax=axes, label=label)
    return figure


def stacked_bars(table: pd.DataFrame, xlabel: str) -> Figure:
    """A bar for each row of the table, its columns stacked, the total written at the end."""
    figure, axis = subplots(height=0.34 * len(table) + 1.2)
    left = np.zeros(len(table))
    for column, colour, hatch in zip(table, CLASS_COLOURS, cycle(("", "///", "..."))):
        style = {"color": colour, "hatch": hatch, "edgecolor": "white", "label": column}
        bars = axis.barh(table.index.astype(str), table[column], left=left, **style)
        left += table[column]
    axis.bar_label(bars, [f"{total:,.3g}" for total in left], padding=3, size=8)
    axis.invert_yaxis()
    axis.set(xlabel=xlabel, xlim=(0, 1.12 * left.max()))
    _legend(figure, axis)
    return figure


def diagram(boxes: Mapping[str, tuple], arrows: Sequence[tuple[str, str, str]]) -> Figure:
    """Boxes, name -> (x, y, text, colour), one unit apart; arrows (from box, to box, text beside the arrow)."""
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


# --- Metrics of cases: a table with a row for each case and class ----------------------------------


def metric_strips(table: pd.DataFrame) -> Figure:
    """Dice, NSD and HD95 of each case as points, a column for each class, with a box of median and quartiles."""
    figure, axes = subplots(1, len(METRIC_LABELS), height=3.2)
    box: dict[str, Any] = {"widths": 0.6, "whis": 0, "showfliers": False, "showcaps": False}
    box |= {"medianprops": {"color": "black", "linewidth": 2}, "zorder": 3, "manage_ticks": False}
    dots: dict[str, Any] = {"size": 4, "legend": False, "warn_thresh": 1}
    dots["palette"] = _by_name(table["class"], CLASS_COLOURS)
    for axis, (metric, label) in zip(axes, METRIC_LABELS.items(), strict=True):
        sns.swarmplot(table, x="class", y=metric, hue="class", **dots, ax=axis)
        groups = [values for _, values in table.groupby("class", sort=False)[metric]]
        axis.boxplot(groups, positions=range(len(groups)), **box)
        axis.set(xlabel="", ylabel=label)
        if metric == "hd95":
            axis.set_ylim(0, 1.08 * max(1, table["hd95"].max()))
        axis.grid(axis="y", color="#DDDDDD", linewidth=0.6)
    return figure


def volume_agreement(table: pd.DataFrame) -> Figure:
    """Predicted against reference volume, and difference against mean (Bland and Altman 1986).

    Lines of a class: the mean difference, and around it the limits of agreement, 1.96 standard deviations away.
    """
    figure, (left, right) = subplots(1, 2, height=3.4)
    reference, predicted = table["volume_ref_ml"], table["volume_pred_ml"]
    table = table.assign(mean=(reference + predicted) / 2, difference=predicted - reference)
    looks = _looks(table, "class", CLASS_COLOURS)
    sns.scatterplot(**looks, x="volume_ref_ml", y="volume_pred_ml", **POINTS, ax=left)
    sns.scatterplot(**looks, x="mean", y="difference", **POINTS, legend=False, ax=right)
    for name, values in table.groupby("class")["difference"]:
        for limit, dash in ((-1.96, ":"), (0, "-"), (1.96, ":")):
            at = values.mean() + limit * values.std()
            right.axhline(at, color=looks["palette"][name], lw=1, ls=dash)
    left.axline((reference.mean(),) * 2, slope=1, label="equal", **LINE)
    right.axhline(0, **LINE)
    left.set(xlabel="reference volume (ml)", ylabel="predicted volume (ml)")
    right.set(xlabel="mean of both volumes (ml)", ylabel="predicted minus reference (ml)")
    _legend(figure, left)
    return figure


def error_by_volume(cases: pd.DataFrame) -> Figure:
    """One minus Dice against the structure's volume; medians of fifths of the cases as a line."""
    figure, axis = subplots(height=3.4)
    names = {
        name: f"{name} (rank correlation {rho:+.2f})"
        for name, (rho, _) in statistics.volume_ranks(cases).items()
    }
    table = cases.assign(**{"error": 1 - cases["dice"], "class": cases["class"].map(names)})
    looks = _looks(table, "class", CLASS_COLOURS)
    sns.scatterplot(**looks, x="volume_ref_ml", y="error", **POINTS, ax=axis)
    for name, rows in table.groupby("class"):
        fifths = pd.qcut(rows["volume_ref_ml"].rank(method="first"), 5, labels=False)
        middle = rows.groupby(fifths)[["volume_ref_ml", "error"]].median()
        for ink, width in (("black", 3.5), (looks["palette"][name], 1.5)):
            axis.plot(middle["volume_ref_ml"], middle["error"], color=ink, linewidth=width)
    axis.set(xlabel="reference volume (ml)", ylabel="1 - Dice (0: perfect)")
    _legend(figure, axis)
    return figure


def reliability(bins: pd.DataFrame) -> Figure:
    """Observed frequency of a class against its predicted probability, and the voxels behind each point.

    `bins` are sums over cases of `srlib.run.evaluate.probability_bins`.
    """
    figure, (left, right) = subplots(1, 2, height=3.4)
    left.plot((0, 1), (0, 1), label="calibrated", **LINE)
    for k, (name, rows) in enumerate(bins.groupby("class", sort=False)):
        filled = rows[rows["voxels"] > 0]
        said, found = (filled[column] / filled["voxels"] for column in ("predicted", "observed"))
        error = np.average(np.abs(said - found), weights=filled["voxels"])
        # Hollow, so that the class below is seen.
        style = _style(k, CLASS_COLOURS) | {"ls": DASHES[k % 4], "markerfacecolor": "none"}
        left.plot(said, found, **style, label=f"{name} (mean gap {error:.3f})")
        right.plot(said, filled["voxels"], **style)
    left.set(ylabel="share of voxels that are of the class")
    right.set(ylabel="voxels", yscale="log")
    for axis in (left, right):
        axis.set(xlabel="probability of the class", xlim=(-0.03, 1.03))
    _legend(figure, left)
    return figure


# --- Comparisons of networks: cases of runs of one budget, or what was computed from them ----------


def interval_rows(cases: pd.DataFrame) -> Figure:
    """A row for each system: the mean over its cases and classes with the 95 % interval, and that of each training."""
    metrics = list(METRIC_LABELS)
    table = statistics.summary(cases, metrics).query("`class` == @statistics.MEAN")
    trainings = statistics.run_means(cases, metrics).query("`class` == @statistics.MEAN")
    best_first = table[table["metric"] == "dice"].sort_values("mean", ascending=False)
    places = {system: row for row, system in enumerate(best_first["system"])}
    figure, axes = subplots(1, len(metrics), height=0.3 * len(places) + 1.4, sharey=True)
    for axis, metric in zip(axes, metrics, strict=True):
        rows, runs = (found[found["metric"] == metric] for found in (table, trainings))
        _intervals(axis, rows, "mean", rows["system"].map(places))
        beside = runs["system"].map(places) + 0.25
        axis.scatter(runs["value"], beside, 14, ORANGE, marker="D", label="one training")
        axis.set(xlabel=METRIC_LABELS[metric])
        axis.grid(axis="x", color="#DDDDDD", linewidth=0.6)
        axis.locator_params(axis="x", nbins=4)
    _name_rows(axes[0], places, cases)
    _legend(figure, axes[0])
    return figure


def paired_rows(cases: pd.DataFrame, reference: str) -> Figure:
    """A row for each system minus the reference in Dice: a point for each case, below them the mean's intervals.

    The interval with caps is that for other cases, the thin line the corrected one for other cases and other seeds
    (`statistics.compare`); beside it stand the verdict and p. A mean inside the grey bar may be missed by these cases
    (`statistics.detectable`). The axis holds 96 % of the points and all intervals; how many cases lie beyond is
    written at its rim.

    Args:
        cases: runs of one budget, of the reference and of at least one other system.
        reference: the system that is subtracted.
    """
    table = statistics.compare(cases, reference, ["dice"], [statistics.MEAN])
    table = table.sort_values("difference", ascending=False, ignore_index=True)
    points = statistics.differences(cases, reference, ["dice"]).query("`class` == @statistics.MEAN")
    figure, axis = subplots(height=0.55 * len(table) + 1.5)
    reach, below = table["detectable"], table.index + 0.36
    ends = table[["low", "high", "low_all", "high_all"]].to_numpy().ravel()
    bounds = [*ends, *reach, *-reach, *np.percentile(points["difference"], (2, 98))]
    low, high = float(np.nanmin(bounds)), float(np.nanmax(bounds))
    small: dict[str, Any] = {"color": "#DDDDDD", "label": "may be missed by so many cases"}
    axis.barh(table.index, 2 * reach, 0.9, -reach, **small)
    dots = {"color": SKY, "size": 3, "warn_thresh": 1, "label": "one case", "ax": axis}
    inside = points[points["difference"].between(low, high)]
    sns.swarmplot(inside, x="difference", y="system", order=table["system"], **dots)
    _intervals(axis, table, "difference", below)
    corrected = ""
    if table["p_holm"].notna().any():  # else no two trainings differ in their seed only
        reached = (below, table["low_all"], table["high_all"], "k")
        axis.hlines(*reached, lw=1, label="other seeds, too, corrected")
        corrected = f"\np: for other cases and seeds, corrected over {len(table)} rows (Holm)"
    axis.axvline(0, **LINE)
    edge: dict[str, Any] = {"size": 8, "va": "center"}
    for at, row in enumerate(table.to_dict("records")):
        p = f"p = {row['p_holm']:.2g}" if row["p_holm"] >= 0.001 else "p < 0.001"
        words = f"  {statistics.effect(row)}\n  {'' if np.isnan(row['p_holm']) else p}"
        axis.text(1.03, at, words, transform=axis.get_yaxis_transform(), **edge)
        values = points.loc[points["system"] == row["system"], "difference"]
        if left := (values < low).sum():
            axis.text(low, at, f"◂{left}", ha="right", color=BLUE, **edge)
        if right := (values > high).sum():
            axis.text(high, at, f"{right}▸", ha="left", color=BLUE, **edge)
    axis.margins(x=0.1)
    base = _titles(cases)[reference]
    axis.set(xlabel=f"Dice, minus that of {base} in the same case{corrected}")
    _name_rows(axis, table["system"], cases)
    _legend(figure, axis)
    return figure


def cost_and_gain(rows: pd.DataFrame) -> Figure:
    """Difference from the whole network against the cost of each one.

    Args:
        rows: columns `title`, `points`, `low`, `high` (difference in Dice points and its interval) and `COSTS`, with
            parameters in millions; the whole network is the row of zeros.
    """
    figure, axes = subplots(1, len(COSTS), height=4.4, sharey=True)
    for axis, (column, label) in zip(axes, COSTS.items(), strict=True):
        for k, (_, row) in enumerate(rows.iterrows()):
            style = {"color": COLOURS[k % 7], "marker": MARKERS[(k + k // 7) % 7], "capsize": 2}
            reach = np.reshape(_reach(row, "points"), (2, 1))
            axis.errorbar(row[column], row["points"], reach, ls="", label=row["title"], **style)
        axis.axhline(0, **LINE)
        axis.set(xlabel=label)
    axes[0].set(ylabel="difference from SegResMamba (Dice points)")
    _legend(figure, axes[0], 4)
    return figure


def cue_volumes(distances: Sequence[int], number: int = 0) -> Figure:
    """One plane of a volume of the diagnostic task for each distance: targets with their class, cues joined to them."""
    figure, axes = subplots(len(distances), height=1.9 * len(distances) + 0.5, squeeze=False)
    for axis, distance in zip(axes[:, 0], distances, strict=True):
        recipe = cue.Recipe(distance)
        plane = recipe.shape[0] // recipe.rows // 2  # through the first rows
        axis.imshow(cue.make_volume(number, recipe)[0][plane], cmap="gray", vmin=-200, vmax=200)
        first = [part[: recipe.rows] for part in cue.rows_of(number, recipe)]
        for _, y, x, mark, value in zip(*first, strict=True):
            colour = CLASS_COLOURS[value - 1]
            frame: dict[str, Any] = {"fill": False, "edgecolor": colour, "linewidth": 2}
            axis.add_patch(Rectangle((x - 1.5, y - 1.5), 3, 3, **frame))
            text = {"color": "white", "weight": "bold", "ha": "center", "va": "center"}
            axis.text(x + (4 if x > mark else -4), y, cue.CLASSES[value - 1], **text)
            arrow = {"arrowstyle": "->", "color": colour, "shrinkB": 6}
            axis.annotate("", (x, y), (mark, y), arrowprops=arrow)
        axis.set(ylabel="second axis", yticks=(), title=f"cue at {distance} voxels")
    axes[-1, 0].set(xlabel="last axis (voxels)")
    return figure


def accuracy_by_distance(table: pd.DataFrame) -> Figure:
    """Accuracy (`srlib.study.statistics.cue_accuracy`) against the mark's distance: means over seeds, and each seed.

    A panel for each task and axis. A dotted line shows what `cue.nearest_mark` reaches.
    """
    panels, names = table.groupby(["task", "axis"]), list(table["title"].unique())
    figure, axes = subplots(len(panels), height=1 + 2.6 * len(panels), squeeze=False)
    looks = _looks(table, "title", COLOURS) | {"x": "at", "y": "accuracy"}
    for axis, ((task, along), rows) in zip(axes[:, 0], panels, strict=True):
        distances = sorted(rows["distance"].unique())
        apart = 0.3 * ((rows["title"].map(names.index) + 0.5) / len(names) - 0.5)
        looks |= {"ax": axis, "data": rows.assign(at=rows["distance"].map(distances.index) + apart)}
        legend = "auto" if axis is axes[0, 0] else False
        line: dict[str, Any] = {"dashes": False, "errorbar": None, "legend": legend}
        sns.lineplot(**looks, **line, markersize=7, markeredgewidth=0)
        sns.scatterplot(**looks, **POINTS, legend=False)
        if task == "cue":
            near = [cue.nearest_mark(cue.Recipe(distance)) for distance in distances]
            axis.plot(range(len(distances)), near, ":", color=GREY, label="rule: the nearest mark")
            axis.axhline(0.5, label="found, not told apart", **LINE)
        mark = "cue" if task == "cue" else "hippocampus's mark"
        axis.set(xlabel=f"distance of the {mark} (voxels)", ylabel="voxels called right (1: all)")
        if len(panels) > 1:
            axis.set_title(f"{task}, along axis {along}")
        axis.set_xticks(range(len(distances)), distances)
        axis.set_ylim(min(0.45, rows["accuracy"].min() - 0.02), 1.02)
    _legend(figure, axes[0, 0], 4)
    return figure


DEPTH = 0.03  # of the picture below the median Dice; deeper marks stand on its lower edge


def dice_by_seconds(trainings: pd.DataFrame, cpu_hours: float) -> Figure:
    """Mean Dice against the seconds of a GPU that a training was given; each with its fold, means where all are there.

    Trainings more than 0.03 below the median stand on the lower edge, beside them their folds and Dice.

    Args:
        trainings: one row each, columns `title`, `fold`, `seconds`, `dice`, and `whole`: whether its budget has all.
        cpu_hours: what a CPU takes for one such second, the upper axis.
    """
    figure, axis = subplots(height=4.2)
    names, seconds = list(trainings["title"].unique()), sorted(trainings["seconds"].unique())
    apart = 2 ** (0.75 * ((trainings["title"].map(names.index) + 0.5) / len(names) - 0.5))
    edge = trainings["dice"].median() - DEPTH
    places = {"at": trainings["seconds"] * apart, "shown": trainings["dice"].clip(lower=edge)}
    looks = _looks(trainings.assign(**places), "title", COLOURS)
    looks |= {"x": "at", "y": "shown", "ax": axis}
    sns.scatterplot(**looks, **POINTS | {"s": 110, "alpha": 0.4})
    middle: dict[str, Any] = {"ha": "center", "va": "center_baseline", "zorder": 1.5}  # below means
    low = looks["data"]["dice"] < edge
    for row in looks["data"][~low].itertuples():
        axis.text(row.at, row.dice, f"{row.fold}", size=8, **middle)
    for at, rows in looks["data"][low].groupby("at"):
        said = "\n".join(f"{row.fold} ↓ {row.dice:.3f}" for row in rows.itertuples())
        beside: dict[str, Any] = {"textcoords": "offset points", "ha": "right", "va": "bottom"}
        axis.annotate(said, (at, edge), (-7, -4), size=8, **beside)
        axis.set_ylim(bottom=edge - DEPTH / 20)
    means = looks["data"][trainings["whole"]].groupby(["title", "seconds"])[["at", "dice"]].mean()
    for k, name in enumerate(names):
        # a budget without a mean breaks the line
        of = means.reindex([(name, s) for s in seconds])
        axis.plot(of["at"], of["dice"], **_style(k, COLOURS), markersize=7)
    axis.set_xscale("log", base=2)
    axis.set_xticks(seconds, [f"{s:g}" for s in seconds])
    axis.set(xlabel="seconds of a GPU alone", ylabel="mean Dice of a fold's cases (1: perfect)")
    hours = (lambda s: s * cpu_hours, lambda h: h / cpu_hours)
    above = axis.secondary_xaxis("top", functions=hours)
    above.set_xticks([s * cpu_hours for s in seconds], [f"{s * cpu_hours:.2g}" for s in seconds])
    above.set(xlabel="hours of one CPU core, for SegResMamba's steps")
    for ticks in (axis.xaxis, above.xaxis):
        ticks.set_minor_locator(NullLocator())
    _legend(figure, axis, 3)
    return figure


# Verdict -> sign and colour; white letters on it can be read.
SIGNS = {
    claims.HOLDS: ("✓", "#00664B"),
    claims.PART: ("◐", "#8A5A00"),
    claims.FAILS: ("✗", "#A63603"),
    claims.OPEN: ("?", "#0B5C8F"),
    claims.UNTESTED: ("–", GREY),
}


def strip(claim: str, answer: claims.Finding) -> Figure:
    """Published and measured numbers of a claim on one axis, beside what is claimed; measured ones with their reach."""
    figure = Figure(figsize=(3.6, _strip_height(claim, answer)), layout="constrained")
    _strip(figure.subplots(), claim, answer)
    return figure


def claims_picture(answers: Mapping[str, claims.Finding]) -> Figure:
    """Claims with their verdicts (`srlib.study.claims.findings`), and a strip of numbers beside each (`strip`)."""
    lines = {claim: textwrap.wrap(claim, 38) for claim in answers}
    heights = [max(0.19 * len(lines[k]) + 0.35, _strip_height(k, a)) for k, a in answers.items()]
    figure = Figure(figsize=(7.5, sum(heights) + 0.4))
    options: dict[str, Any] = {"height_ratios": heights, "width_ratios": (3.3, 4.2)}
    axes = figure.subplots(len(heights), 2, squeeze=False, **options)
    for (claim, answer), (left, right) in zip(answers.items(), axes, strict=True):
        sign, colour = SIGNS[answer.verdict]
        left.set_axis_off()
        at: dict[str, Any] = {"xycoords": "axes fraction", "textcoords": "offset points"}
        left.annotate("\n".join(lines[claim]), (0, 1), (0, 0), va="top", size=9, **at)
        box = {"facecolor": colour, "edgecolor": colour, "boxstyle": "round,pad=0.25"}
        at |= {"size": 9, "weight": "bold", "color": "white", "bbox": box, "va": "top"}
        left.annotate(f"{sign} {answer.verdict}", (0, 1), (3, -13 * len(lines[claim]) - 5), **at)
        _strip(right, claim, answer)
    _legend(figure, axes[0, 1])
    return figure


# --- Parts of figures ------------------------------------------------------------------------------

POINTS: dict[str, Any] = {"s": 22, "linewidth": 0, "alpha": 0.7}  # one for each case


def _strip_height(claim: str, answer: claims.Finding) -> float:
    return 0.135 * len(claims.side_by_side(claim, answer)) + 0.28


def _strip(axis: Axes, claim: str, answer: claims.Finding) -> None:
    """Draw a claim's strip: diamonds are published, dots measured, with their interval or the reach of all settings."""
    table, (printed, claimed, unit, _) = claims.side_by_side(claim, answer), claims.CLAIMS[claim]
    if table.empty:
        axis.set_axis_off()
        return
    rows = np.arange(len(table))
    multiples = claimed[0] == 0 and claimed[1] < np.inf
    for column in printed:
        hollow: dict[str, Any] = {"facecolor": "none", "edgecolor": VERMILLION, "linewidth": 1.1}
        axis.scatter(table[column], rows, 22, marker="D", label="published", **hollow)
    _intervals(axis, table, "here", rows, color=BLUE, label="measured here")
    axis.set_yticks(rows, table.index, size=8)
    axis.set(ylim=(len(table) - 0.5, -0.5), xscale="log" if multiples else "linear")
    axis.tick_params(axis="x", labelsize=8)
    below: dict[str, Any] = {"xycoords": "axes fraction", "textcoords": "offset points"}
    axis.annotate(unit, (0, 0), (-14, -5), va="top", ha="right", size=8, color=GREY, **below)
    axis.margins(x=0.06)
    low, high = axis.get_xlim()
    span = max(low, claimed[0]), min(high, claimed[1])
    axis.axvspan(*span, color="#CFE8DD", zorder=0, label="claimed")
    for end in claimed:
        if np.isfinite(end) and end:
            axis.axvline(end, **LINE)
    axis.set_xlim(low, high)
    if multiples:
        plain_ticks(axis.xaxis)
    axis.spines[["left", "top", "right"]].set_visible(False)
    axis.tick_params(axis="y", length=0)


def _style(k: int, colours: Sequence[str]) -> dict[str, Any]:
    """Colour and marker of the k-th group."""
    return {"color": colours[k % 7], "marker": MARKERS[k % 7]}


def _by_name(names: pd.Series, values: Sequence[str]) -> dict[str, str]:
    """The k-th value for the k-th name; begins again after the last."""
    return dict(zip(names.unique(), cycle(values)))


def _looks(table: pd.DataFrame, group: str, colours: Sequence[str]) -> dict[str, Any]:
    """The table with a colour and a marker for each group, as seaborn takes them."""
    looks: dict[str, Any] = {"data": table, "hue": group, "style": group}
    looks["palette"] = _by_name(table[group], colours)
    return looks | {"markers": _by_name(table[group], MARKERS)}


def _reach(rows: Any, middle: str) -> list:
    """Distances of `low` and `high` from the middle, as `errorbar` takes them."""
    return [rows[middle] - rows["low"], rows["high"] - rows[middle]]


def _intervals(axis: Axes, rows: pd.DataFrame, middle: str, at: ArrayLike, **style: Any) -> None:
    """Lying intervals from `low` to `high`, a dot in the middle."""
    style = {"color": "black", "label": "mean, 95 % interval"} | style
    style |= {"fmt": "o", "capsize": 3, "markersize": 4}
    axis.errorbar(rows[middle], at, xerr=_reach(rows, middle), **style)


def _titles(cases: pd.DataFrame) -> dict[str, str]:
    """Key of a system -> its title."""
    return dict(zip(cases["system"], cases["title"], strict=True))


def _name_rows(axis: Axes, systems: Collection[str], cases: pd.DataFrame) -> None:
    """Titles of the systems down the vertical axis."""
    axis.set_yticks(range(len(systems)), [_titles(cases)[system] for system in systems])
    axis.set(ylim=(len(systems) - 0.4, -0.6), ylabel="")


def _legend(place: Any, axis: Axes, ncols: int | None = None, **options: Any) -> None:
    """One legend, above a figure or in axes, with an entry for each label however often it was drawn."""
    keys = dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    if (drawn := axis.get_legend()) is not None:
        drawn.remove()
    options = {"loc": "outside upper center", "ncols": ncols or len(keys)} | options
    place.legend(keys.values(), keys.keys(), **options)
