"""Figures of comparisons, drawn from what the repository holds of the grids of runs.

`committed` reads it; where a grid has not been computed yet, its table is empty. Each figure takes a table with a
row for each run, case and class, computes its statistics with `srlib.statistics` and returns a `Figure`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.stats import spearmanr

from srlib import grid, statistics
from srlib.figures import (
    BLUE,
    CLASS_COLOURS,
    GREEN,
    GREY,
    MARKERS,
    METRICS,
    ORANGE,
    PURPLE,
    SKY,
    VERMILLION,
    subplots,
)

COLOURS = (BLUE, VERMILLION, GREEN, ORANGE, PURPLE, SKY, GREY)
LANE = 0.27  # of a row's intervals, below its points
NAMES = {"dice": "Dice", "nsd": "NSD", "hd95": "HD95 (mm)"}


def committed(*names: str) -> pd.DataFrame:
    """The finished runs of some grids: the columns of `srlib.grid.cases`, and `device`.

    A run that two grids hold comes once. For each grid a line says how much of it is there; where that is nothing,
    there are no rows.

    Args:
        names: of grids of one budget.
    """
    tables = []
    for name in names:
        try:
            cases, runs = grid.cases(name), grid.runs(name)
        except FileNotFoundError:  # what decides its steps or learning rates is not there yet
            print(f"grid {name}: the repository holds nothing of it yet")
            continue
        print(f"grid {name}: the repository holds {len(runs)} of {len(grid.planned(name))} runs")
        if len(cases):
            tables.append(cases.merge(runs[["dataset", "run", "device"]]))
    if not tables:
        return pd.DataFrame(columns=[*grid.KEY, *grid.COLUMNS, "device"])
    return pd.concat(tables, ignore_index=True).drop_duplicates(
        ["dataset", "run", "minutes", "case", "class"]
    )


def made_with(cases: pd.DataFrame) -> str:
    """What a table of `committed` was computed with, for the stamp of `srlib.plots.Record`."""
    steps = f"{cases['steps'].iloc[0]:,} steps"
    if cases["steps"].nunique() > 1:
        steps = f"the steps of {_span(cases['minutes'])} minutes"
    parts = [
        f"{'/'.join(cases['dataset'].unique())}, {cases['case'].nunique()} cases",
        f"fold {_span(cases['fold'])}, seed {_span(cases['seed'])}",
        steps,
        "/".join(cases["device"].unique()),
    ]
    return " | ".join(parts)


def _span(values: pd.Series) -> str:
    low, high = values.min(), values.max()
    return f"{low:g}" if low == high else f"{low:g}-{high:g}"


def interval_rows(cases: pd.DataFrame, name: str = "mean") -> Figure:
    """A row for each system: the mean over its cases with the 95 % interval, and the mean of each training.

    Args:
        cases: runs of one budget, at least one.
        name: the class.
    """
    table = statistics.summary(cases, list(METRICS)).query("`class` == @name")
    trainings = statistics.run_means(cases, list(METRICS)).query("`class` == @name")
    order = table[table["metric"] == "dice"].sort_values("mean", ascending=False)["system"]
    figure, axes = subplots(1, len(METRICS), height=0.3 * len(order) + 1.4, sharey=True)
    for axis, (metric, label) in zip(axes, METRICS.items(), strict=True):
        rows = table[table["metric"] == metric].set_index("system").loc[order]
        runs = trainings[trainings["metric"] == metric].set_index("system")["value"]
        near = _draw_intervals(axis, rows["mean"], rows["low"], rows["high"])
        for at, system in enumerate(order):
            if near[system]:
                values = runs.loc[[system]]
                axis.scatter(values, [at + 0.25] * len(values), 14, ORANGE, marker="D")
        axis.set(xlabel=label)
        axis.grid(axis="x", color="#DDDDDD", linewidth=0.6)
        axis.locator_params(axis="x", nbins=4)
    axes[0].scatter([], [], 14, ORANGE, marker="D", label="one training")
    _name_rows(axes[0], order, cases)
    _legend(figure, axes[0])
    return figure


def paired_rows(
    cases: pd.DataFrame, reference: str, metric: str = "dice", name: str = "mean"
) -> Figure:
    """A row for each system minus the reference: a point for each case, below them the mean with its 95 % intervals.

    The interval with caps speaks of other cases, the thin line of other cases and other seeds (`statistics.compare`).
    The grey bar reaches as far as mean differences that the cases could not have shown (`statistics.detectable`). The
    axis holds 96 % of the points and all intervals; a triangle at its rim is a point beyond. Beside p stands whether
    the thin line leaves out zero.

    Args:
        cases: runs of one budget, of the reference and of at least one other system.
        reference: the system that is subtracted.
        metric: the metric.
        name: the class.
    """
    table = statistics.compare(cases, reference, [metric], [name]).set_index("system")
    points = statistics.differences(cases, reference, [metric]).query("`class` == @name")
    table = table.sort_values("difference", ascending=False)
    figure, axis = subplots(height=0.5 * len(table) + 1.5)
    near = _draw_intervals(axis, table["difference"], table["low"], table["high"], LANE)
    shown = table[near]
    values = points[points["system"].isin(shown.index)].set_index("system")["difference"]
    bounds = shown[["low", "high", "low_all", "high_all", "detectable"]].to_numpy().ravel()
    bounds = np.concatenate([bounds, -shown["detectable"], np.percentile(values, (2, 98))])
    rim = float(np.nanmin(bounds)), float(np.nanmax(bounds))
    for at, found in enumerate(table.reset_index().to_dict("records")):
        p = f" p = {found['p_holm']:.2g}" if found["p_holm"] >= 0.001 else " p < 0.001"
        edge = axis.get_yaxis_transform()
        axis.text(1, at, f"{p}, {_verdict(found)}", size=8, va="center", transform=edge)
        if near[found["system"]]:
            reach = found["detectable"]
            axis.barh(at, 2 * reach, 0.8, -reach, color="#DDDDDD", label="too small to be shown")
            _draw_points(axis, values[[found["system"]]].to_numpy(), at, rim)
            ends = found["low_all"], found["high_all"]
            axis.hlines(at + LANE, *ends, "k", lw=1, label="other seeds, too")
    axis.axvline(0, color=GREY, linewidth=1, linestyle="--")
    base = dict(zip(cases["system"], cases["title"], strict=True))[reference]
    label = f"{NAMES[metric]}, minus that of {base} in the same case"
    axis.set(
        xlabel=f"{label}\np: Wilcoxon's, corrected over {len(table)} row{'s' * (len(table) > 1)} (Holm)"
    )
    axis.margins(x=0.03)
    _name_rows(axis, table.index, cases)
    _legend(figure, axis)
    return figure


def _verdict(found: Mapping[Any, Any]) -> str:
    """Of a row of `statistics.compare`: whether a difference is shown for other cases and other seeds."""
    if np.isnan(found["low_all"]):
        return "one seed"
    return "shown" if found["low_all"] * found["high_all"] > 0 else "open"


def _draw_points(axis: Axes, values: np.ndarray, at: int, rim: tuple[float, float]) -> None:
    """The cases of a row, above its intervals; those beyond the rim as triangles on it."""
    across = at + np.linspace(-0.35, 0.1, len(values))
    for beyond, x, marker in ((values < rim[0], rim[0], "<"), (values > rim[1], rim[1], ">")):
        axis.scatter([x] * beyond.sum(), across[beyond], 16, BLUE, marker=marker)
    inside = (values >= rim[0]) & (values <= rim[1])
    axis.scatter(values[inside], across[inside], 8, SKY, zorder=1.5, label="one case")


def _draw_intervals(
    axis: Axes, means: pd.Series, low: pd.Series, high: pd.Series, lane: float = 0
) -> pd.Series:
    """Means with their intervals, row by row; one far from all others is written at the edge instead.

    Args:
        axis: where they are drawn.
        means: by system.
        low: likewise.
        high: likewise.
        lane: how far below the middle of its row an interval lies.

    Returns:
        For each system whether it is near, that is, drawn.
    """
    margin = 10 * max((means - means.median()).abs().median(), (high - low).median())
    near = (means - means.median()).abs() <= margin
    edge: dict[str, Any] = {"size": 8, "va": "center", "transform": axis.get_yaxis_transform()}
    for at, (value, below, above) in enumerate(zip(means, low, high, strict=True)):
        if near.iloc[at]:
            reach = [[value - below], [above - value]]
            style: dict[str, Any] = {"fmt": "ok", "capsize": 3, "label": "mean, 95 % interval"}
            axis.errorbar(value, at + lane, xerr=reach, markersize=4 if lane else None, **style)
        elif value < means.median():
            axis.text(0, at, f" \N{LEFTWARDS ARROW} {value:.3g}, off the scale", **edge)
        else:
            axis.text(
                1, at, f"off the scale, {value:.3g} \N{RIGHTWARDS ARROW} ", ha="right", **edge
            )
    return near


def _legend(figure: Figure, axis: Axes) -> None:
    """One entry for each label above the figure, however often it was drawn."""
    keys = dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    figure.legend(keys.values(), keys.keys(), loc="outside upper right", ncols=len(keys))


def _name_rows(axis: Axes, systems: Collection[str], cases: pd.DataFrame) -> None:
    """Titles of the systems down the vertical axis."""
    titles = dict(zip(cases["system"], cases["title"], strict=True))
    axis.set_yticks(range(len(systems)), [titles[system] for system in systems])
    axis.set(ylim=(len(systems) - 0.4, -0.6))


def volume_ranks(cases: pd.DataFrame) -> dict[str, tuple[float, float]]:
    """For each class the rank correlation (Spearman) of 1 - Dice with the reference volume, and its p."""
    return {
        str(name): tuple(spearmanr(rows["volume_ref_ml"], 1 - rows["dice"]))
        for name, rows in cases.groupby("class", sort=False)
    }


def error_by_volume(cases: pd.DataFrame) -> Figure:
    """What is missing to a Dice of 1 against the structure's volume; medians of fifths of the cases as a line.

    Args:
        cases: each case and class once.
    """
    figure, axis = subplots(height=3.4)
    ranks = volume_ranks(cases)
    for at, (name, rows) in enumerate(cases.groupby("class", sort=False)):
        volume, error = rows["volume_ref_ml"], 1 - rows["dice"]
        colour = CLASS_COLOURS[at % 7]
        label = f"{name} (rank correlation {ranks[str(name)][0]:+.2f})"
        axis.scatter(volume, error, 14, colour, marker=MARKERS[at % 7], alpha=0.7, label=label)
        fifths = pd.qcut(volume.rank(method="first"), 5, labels=False)
        middle = pd.DataFrame({"volume": volume, "error": error}).groupby(fifths).median()
        axis.plot(middle["volume"], middle["error"], color="black", linewidth=3)
        axis.plot(middle["volume"], middle["error"], color=colour)
    axis.set(xlabel="reference volume (ml)", ylabel="1 - Dice (0: perfect)")
    figure.legend(loc="outside upper center", ncols=cases["class"].nunique())
    return figure


def reliability(bins: pd.DataFrame) -> Figure:
    """How often a class is there against the probability that it was given, and the voxels behind each point.

    Args:
        bins: sums over cases of `srlib.evaluate.probability_bins`.
    """
    figure, (left, right) = subplots(1, 2, height=3.4)
    for at, (name, rows) in enumerate(bins.groupby("class", sort=False)):
        filled = rows[rows["voxels"] > 0]
        said, found = (filled[column] / filled["voxels"] for column in ("predicted", "observed"))
        error = np.average(np.abs(said - found), weights=filled["voxels"])
        style = {"color": CLASS_COLOURS[at % 7], "marker": MARKERS[at % 7]}
        left.plot(said, found, **style, label=f"{name} (mean gap {error:.3f})")
        right.plot(said, filled["voxels"], **style)
    left.plot((0, 1), (0, 1), "--", color=GREY, linewidth=1, label="calibrated")
    left.set(ylabel="share of voxels that are of the class")
    right.set(ylabel="voxels", yscale="log")
    for axis in (left, right):
        axis.set(xlabel="probability of the class", xlim=(-0.03, 1.03))
    figure.legend(loc="outside upper center", ncols=bins["class"].nunique() + 1)
    return figure


def dice_over_minutes(
    cases: pd.DataFrame, panels: Mapping[str, Collection[str]], name: str = "mean"
) -> Figure:
    """Mean Dice with its 95 % interval against the minutes of training, a line for each system.

    The axis is made for the better half; a line that starts far below it comes from outside.

    Args:
        cases: runs of several budgets of time, at least one.
        panels: title -> keys of the systems in it; one of which there is no run is left out.
        name: the class.
    """
    rows = pd.concat(
        statistics.summary(runs, ["dice"]).assign(minutes=minutes)
        for minutes, runs in cases.groupby("minutes")
    ).query("`class` == @name")
    titles = dict(zip(cases["system"], cases["title"], strict=True))
    middle, top = rows["mean"].median(), rows["high"].max()
    ticks = sorted(rows["minutes"].unique())
    figure, axes = subplots(1, len(panels), height=4.4, sharey=True, squeeze=False)
    for axis, (title, systems) in zip(axes[0], panels.items(), strict=True):
        shown = [system for system in titles if system in systems]
        for at, system in enumerate(shown):
            points = rows[rows["system"] == system]
            beside = points["minutes"] * 1.03 ** (
                at - (len(shown) - 1) / 2
            )  # intervals side by side
            reach = [points["mean"] - points["low"], points["high"] - points["mean"]]
            style: dict[str, Any] = {"color": COLOURS[at % 7], "marker": MARKERS[at % 7]}
            axis.errorbar(beside, points["mean"], reach, capsize=2, label=titles[system], **style)
        axis.set(xscale="log", xlabel="minutes of training on a CPU")
        axis.set_xticks(ticks, [f"{minutes:g}" for minutes in ticks])
        axis.set_xticks([], minor=True)
        axis.legend(title=title, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)
    low = axes[0, 0].get_ylim()[0]
    axes[0, 0].set(
        ylabel="mean Dice (1: perfect)", ylim=(max(low, middle - 4 * (top - middle)), None)
    )
    return figure
