"""Figures and words of 06_ablations: what a change costs and gives, and the diagnostic task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isnan
from typing import Any

import pandas as pd
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch.utils.flop_counter import FlopCounterMode

from srlib import cue, grid, runs, train
from srlib.comparisons import COLOURS
from srlib.figures import CLASS_COLOURS, GREY, MARKERS, subplots

COSTS = {
    "parameters": "parameters (millions)",
    "gmacs": "forward pass (GMACs)",
    "step_seconds": "CPU step (s)",
}


def cost(system: str) -> dict[str, float]:
    """Parameters of a system of `srlib.grid`, and GMACs of one forward pass of one patch of the default profile."""
    config = runs.config_for("default", grid.DATASET, **grid.SYSTEMS[system].settings)
    network = train.build_model(config)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(torch.zeros(1, 1, *config.patch_size))
    parameters = sum(p.numel() for p in network.parameters())
    return {"parameters": parameters, "gmacs": counter.get_total_flops() / 2e9}


def interval(row: Mapping[str, Any]) -> tuple[float, float]:
    """A difference's 95 % interval in Dice points: for other cases and seeds, of one seed for other cases alone."""
    over = "" if isnan(row["se_seeds"]) else "_all"
    return 100 * row[f"low{over}"], 100 * row[f"high{over}"]


def effect(row: Mapping[str, Any]) -> str:
    """In words, what a row of `statistics.compare` shows of a change of the network."""
    if isnan(row["se_seeds"]):
        return "one seed only"
    if row["low_all"] <= 0 <= row["high_all"]:
        return "no difference shown"
    return "better" if row["difference"] > 0 else "worse"


def cost_and_gain(rows: pd.DataFrame) -> Figure:
    """The difference from the whole network against what each one costs.

    Args:
        rows: columns `title`, `points`, `low`, `high` (difference in Dice points and its interval) and `COSTS`, with
            parameters in millions; the whole network is the row of zeros.
    """
    figure, axes = subplots(1, len(COSTS), height=4, sharey=True)
    for axis, (column, label) in zip(axes, COSTS.items(), strict=True):
        for k, row in enumerate(rows.to_dict("records")):
            style = {"color": COLOURS[k % 7], "marker": MARKERS[(k + k // 7) % 7], "capsize": 2}
            bars = [[row["points"] - row["low"]], [row["high"] - row["points"]]]
            axis.errorbar(row[column], row["points"], bars, **style, ls="", label=row["title"])
        axis.axhline(0, color=GREY, linewidth=1, linestyle="--")
        axis.set(xlabel=label)
    axes[0].set(ylabel="difference from SegResMamba (Dice points)")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    return figure


def cue_volumes(distances: Sequence[int], number: int = 0) -> Figure:
    """One plane of a volume of the diagnostic task for each distance: targets with their class, cues joined to them."""
    figure, axes = subplots(len(distances), height=1.9 * len(distances) + 0.5, squeeze=False)
    for axis, distance in zip(axes[:, 0], distances, strict=True):
        recipe = cue.Recipe(distance)
        image, _ = cue.make_volume(number, recipe)
        rows = cue.rows_of(number, recipe)
        plane = recipe.shape[0] // recipe.rows // 2  # through the first rows
        axis.imshow(image[plane], cmap="gray", vmin=-200, vmax=200)
        for row in range(recipe.rows):
            y, target, mark = rows.y[row], rows.target[row], rows.cue[row]
            colour = CLASS_COLOURS[rows.value[row] - 1]
            axis.add_patch(
                Rectangle((target - 1.5, y - 1.5), 3, 3, fill=False, edgecolor=colour, lw=2)
            )
            outwards = target + (4 if target > mark else -4)
            name = cue.CLASSES[rows.value[row] - 1]
            axis.text(outwards, y, name, color="white", weight="bold", ha="center", va="center")
            arrow = {"arrowstyle": "->", "color": colour, "shrinkB": 6}
            axis.annotate("", (target, y), (mark, y), arrowprops=arrow)
        axis.set(ylabel="second axis", yticks=(), title=f"cue at {distance} voxels")
    axes[-1, 0].set(xlabel="last axis (voxels)")
    return figure


def accuracy_by_distance(table: pd.DataFrame) -> Figure:
    """Accuracy of each system against the cue's distance: the mean over seeds as a line, each seed as a point.

    A dotted line shows what `cue.nearest_mark` reaches.

    Args:
        table: as `srlib.cue.accuracy` returns it.
    """
    figure, axis = subplots(height=3.6)
    places = {distance: k for k, distance in enumerate(sorted(table["distance"].unique()))}
    for k, (_, rows) in enumerate(table.groupby("system", sort=False)):
        style = {"color": COLOURS[k % 7], "marker": MARKERS[k % 7]}
        x = rows["distance"].map(places) + 0.07 * (k - 1.5)
        axis.scatter(x, rows["accuracy"], 14, alpha=0.6, **style)
        mean = rows.groupby("distance")["accuracy"].mean()
        at = [places[distance] + 0.07 * (k - 1.5) for distance in mean.index]
        axis.plot(at, mean, label=rows["title"].iloc[0], **style)
    near = [cue.nearest_mark(cue.Recipe(distance)) for distance in places]
    axis.plot(places.values(), near, ":", color=GREY, label="rule: the nearest mark")
    axis.axhline(0.5, color=GREY, lw=1, ls="--", label="found, not told apart")
    axis.set(xlabel="distance of the cue (voxels)", ylabel="voxels called right (1: all)")
    axis.set(
        xticks=range(len(places)),
        xticklabels=places,
        ylim=(min(0.45, table["accuracy"].min() - 0.02), 1.02),
    )
    figure.legend(loc="outside upper center", ncols=4)
    return figure
