"""What the explorers of the course show: a signal, a scan, a voxel and a mask that a reader moves.

Each function returns a `Figure` for one position of the controls; `srlib.show.explore` has the controls.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray
from scipy.ndimage import binary_dilation, binary_erosion, shift

from srlib.run import evaluate
from srlib.scan import selective_scan
from srlib.show.charts import BLUE, GREY, METRIC_LABELS, ORANGE, VERMILLION, subplots
from srlib.show.volumes import AXIS_LABELS, PLANES
from srlib.study.receptive import ScanMemory

DECADES = 3  # of what a scan remembers that are told apart
FIELD_DECADES = 4  # of an influence map


# --- A signal ---------------------------------------------------------------------------------------


def token_weights(delta: ArrayLike, A: float, B: float, at: int) -> NDArray[np.float64]:
    """How much of each token is in the state after token `at`, (L,): the factor of u_j in h_t.

    Args:
        delta: (L,) step of each token.
        A, B: of one state.
        at: the token t, 0 to L - 1.
    """
    delta = np.asarray(delta, dtype=float)
    time = np.cumsum(delta)
    past = np.arange(len(delta)) <= at
    return np.where(past, np.exp(A * np.maximum(time[at] - time, 0)) * delta * B, 0)


def selective_view(
    values: ArrayLike, marked: Sequence[int], on_mark: float, elsewhere: float, A: float, at: int
) -> Figure:
    """A scan with one state over a signal with marks: input, state, and what of each token is in the state.

    B is one over the step on a mark, so that a marked token is written in with weight 1. Weights below 1e-5 are not
    drawn.

    Args:
        values: (L,) the signal u.
        marked: the marked tokens.
        on_mark, elsewhere: the step on a mark and on each other token.
        A: decay of the state, negative.
        at: the token after which the state is taken apart.
    """
    u = np.asarray(values, dtype=float)
    tokens = np.arange(len(u))
    delta = np.where(np.isin(tokens, marked), on_mark, elsewhere)
    weights = token_weights(delta, A, 1 / on_mark, at)
    state = _scan_one(u, delta, A, 1 / on_mark)
    past = sorted(j for j in set(marked) if j <= at)
    margins = {"left": 0.09, "right": 0.77, "top": 0.97, "bottom": 0.16, "hspace": 0.3}
    figure, axes = subplots(3, height=4.6, sharex=True, gridspec_kw=margins)
    axes[0].plot(tokens, u, drawstyle="steps-post")
    axes[0].plot(marked, u[list(marked)], "o", color=VERMILLION, label="marked")
    axes[1].plot(tokens, state, drawstyle="steps-post", color=BLUE, label="state h")
    if past:
        wanted = u[np.array(past)][np.searchsorted(past, tokens[past[0] :], side="right") - 1]
        style = {"color": ORANGE, "ls": "--", "drawstyle": "steps-post"}
        axes[1].plot(tokens[past[0] :], wanted, **style, label="the last marked value")
    for shown, colour in ((tokens <= at, BLUE), (np.isin(tokens, past), VERMILLION)):
        axes[2].plot(tokens[shown], weights[shown], "o", ms=4, color=colour)
    last = weights[past[-1]] if past else 0.0
    earlier = weights[past[:-1]].sum()
    rest = weights.sum() - last - earlier
    axes[2].set_title(
        f"in the state after token {at}: last marked token {last:.2f}, marked ones before it "
        f"{earlier:.2f}, all others together {rest:.2f}",
        loc="left",
    )
    for axis, label in zip(axes, ("input u", "state h", "weight in it"), strict=True):
        axis.axvline(at + 0.5, color=GREY, lw=1, ls=":")
        axis.set(ylabel=label)
    for axis in axes[:2]:
        axis.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    axes[2].set(xlabel="token", xlim=(0, len(u)), yscale="log", ylim=(1e-5, 5))
    return _fixed(figure)


def _scan_one(u: NDArray[np.float64], delta: NDArray[np.float64], A: float, B: float) -> Any:
    """`selective_scan` with one channel and one state that is the output."""
    ones = torch.ones(1, 1, len(u), dtype=torch.float64)
    inputs, steps = torch.from_numpy(u) * ones, torch.from_numpy(delta) * ones
    decay = torch.full((1, 1), A, dtype=torch.float64)
    y = selective_scan(inputs, steps, decay, B * ones, ones, delta_softplus=False)
    return y.flatten().numpy()


# --- A scan -----------------------------------------------------------------------------------------


def memory_view(image: ArrayLike, memories: Mapping[str, ScanMemory], step: int) -> Figure:
    """A scan at one step: the token in three planes, and how much of each voxel before it the state still remembers.

    Voxels that the scan has not read yet show the image.

    Args:
        image: (D, H, W), of any multiple of the map's size.
        memories: name of the network -> memory of the same scan in it.
        step: of the scan, 0 to L - 1.
    """
    first = next(iter(memories.values()))
    token = np.array(np.unravel_index(int(first.visits[step]), first.shape))
    grey = _coarse(np.asarray(image, dtype=float), first.shape)
    sides = {plane: [k for k in range(3) if k != cut] for plane, cut in PLANES.items()}
    widths = [first.shape[across] for across, _ in sides.values()]
    tall = max(first.shape[up] for _, up in sides.values()) * 3.9 / sum(widths) + 0.3  # inches
    height = tall * len(memories) + 1.55
    figure = Figure(figsize=(7.5, height))
    span = {"top": 1 - 0.3 / height, "bottom": 1.25 / height}
    planes = {"left": 0.09, "right": 0.66, "width_ratios": widths, "wspace": 0.3, "hspace": 0.1}
    grid = figure.add_gridspec(len(memories), 3, **planes, **span)
    ages = figure.add_subplot(figure.add_gridspec(1, 1, left=0.76, right=0.98, **span)[0])
    scale: dict[str, Any] = {"cmap": "viridis", "vmin": -DECADES, "vmax": 0, "origin": "lower"}
    window: dict[str, Any] = {
        "vmin": grey.min(),
        "vmax": grey.max(),
        "alpha": 0.6,
        "origin": "lower",
    }
    for row, (name, memory) in enumerate(memories.items()):
        left = np.log10(np.maximum(memory.as_map(step), 10.0**-DECADES))  # NaN stays
        for column, (plane, (across, up)) in enumerate(sides.items()):
            axis, cut = figure.add_subplot(grid[row, column]), PLANES[plane]
            axis.imshow(np.take(grey, token[cut], cut).T, **window)
            drawn = axis.imshow(np.take(left, token[cut], cut).T, **scale)
            axis.plot(token[across], token[up], "s", ms=5, mfc="none", mec=VERMILLION, mew=1.5)
            ylabel = f"{name}\n{_way(up)}" if column == 0 else _way(up)
            axis.set_ylabel(ylabel, linespacing=1.6)
            if row == 0:
                axis.set_title(f"{plane} {token[cut]}")
            if row == len(memories) - 1:
                axis.set_xlabel(_way(across))
            _bare(axis)
        kept = memory.remembered(step)[::-1]
        ages.plot(np.arange(1, len(kept) + 1), kept, label=name, lw=0.8)
    ages.set(xscale="log", yscale="log", xlim=(1, len(first.visits)), ylim=(10.0**-DECADES, 1.3))
    ages.set(xlabel="tokens back (1: itself)", ylabel="share still remembered")
    ages.legend(loc="upper right", borderaxespad=0)
    bar = figure.add_axes((0.15, 0.77 / height, 0.45, 0.1 / height))
    ticks = range(-DECADES, 1)
    figure.colorbar(drawn, cax=bar, orientation="horizontal", ticks=ticks)
    bar.set_xticklabels([f"{10.0**tick:g}" for tick in ticks])
    bar.set_xlabel("share still remembered", labelpad=1)
    return _fixed(figure)


def _coarse(volume: NDArray[np.float64], shape: Sequence[int]) -> NDArray[np.float64]:
    """Means over equal blocks, to an array of the shape."""
    blocks = [part for n, m in zip(shape, volume.shape, strict=True) for part in (n, m // n)]
    return volume.reshape(blocks).mean((1, 3, 5))


# --- A voxel ----------------------------------------------------------------------------------------


def influence_view(
    image: ArrayLike,
    fields: Mapping[str, Mapping[str, NDArray[np.float64]]],
    voxel: Sequence[int],
    plane: str = "axial",
) -> Figure:
    """What moves the decision at one voxel, network by network, in a plane through it.

    Args:
        image: (D, H, W).
        fields: row -> column -> influence (D, H, W), as from `srlib.study.receptive.influence`.
        voxel: (D, H, W).
        plane: one of `PLANES`.
    """
    cut = PLANES[plane]
    across, up = (k for k in range(3) if k != cut)
    columns = list(next(iter(fields.values())))
    height = 1.9 * len(fields) + 0.8
    figure = Figure(figsize=(7.5, height))
    margins = {"left": 0.05, "right": 0.87, "top": 1 - 0.3 / height, "bottom": 0.5 / height}
    grid = figure.add_gridspec(len(fields), len(columns) + 1, wspace=0.25, hspace=0.08, **margins)
    first = figure.add_subplot(grid[:, 0])
    first.imshow(np.take(np.asarray(image), voxel[cut], cut).T, origin="lower")
    first.set(title=f"image, {plane} {voxel[cut]}", xlabel=_way(across), ylabel=_way(up))
    scale: dict[str, Any] = {
        "cmap": "viridis",
        "vmin": -FIELD_DECADES,
        "vmax": 0,
        "origin": "lower",
    }
    for row, (name, of_row) in enumerate(fields.items()):
        for column, (title, field) in enumerate(of_row.items()):
            axis = figure.add_subplot(grid[row, column + 1])
            size = np.log10(np.maximum(field / field.max(), 10.0**-FIELD_DECADES))
            drawn = axis.imshow(np.take(size, voxel[cut], cut).T, **scale)
            axis.set(title="" if row else title, ylabel="" if column else name)
    for axis in figure.axes:
        _bare(axis)
        _cross(axis, voxel[across], voxel[up])
    bar = figure.add_axes((0.9, 0.75 / height, 0.015, 1 - 1.3 / height))
    figure.colorbar(drawn, cax=bar, label="influence, log10 (0: the largest)")
    return _fixed(figure)


def _cross(axis: Axes, x: int, y: int) -> None:
    """Four short lines about a voxel, which stays free."""
    gap, end = 2.5, 7
    for dx, dy in ((1, 0), (-1, 0), (0, 1), (0, -1)):
        xs, ys = (x + gap * dx, x + end * dx), (y + gap * dy, y + end * dy)
        axis.plot(xs, ys, color=ORANGE, lw=1.2, scalex=False, scaley=False)


# --- A mask -----------------------------------------------------------------------------------------

MASK_SHAPE = (64, 48, 21)  # voxels of 1 mm
REACH = 10  # mm that a mask can be moved


@lru_cache(maxsize=1)
def reference_masks() -> dict[str, NDArray[np.bool_]]:
    """A compact structure, a ball of 19 mm, and a thin one, a winding tube of 3 mm; (64, 48, 21) voxels of 1 mm."""
    x, y, z = np.meshgrid(*map(np.arange, MASK_SHAPE), indexing="ij")
    ball = (x - 32) ** 2 + (y - 24) ** 2 + (z - 10) ** 2 <= 86
    path = 24 + 8 * np.sin(2 * np.pi * (x - 12) / 40)
    tube = ((y - path) ** 2 + (z - 10) ** 2 <= 1.9**2) & (abs(x - 32) <= 20)
    return {"compact": ball, "thin": tube}


def moved(mask: NDArray[np.bool_], right: int, front: int, grow: int) -> NDArray[np.bool_]:
    """A mask moved by whole voxels and grown (or, below zero, shrunk) by layers of voxels."""
    if grow:
        mask = (binary_dilation if grow > 0 else binary_erosion)(mask, iterations=abs(grow))
    return shift(mask.astype(np.uint8), (right, front, 0), order=0).astype(bool)


@lru_cache(maxsize=4096)
def overlap(name: str, right: int, front: int, grow: int, tolerance: float) -> dict[str, float]:
    """Dice, NSD and HD95 (mm) of a reference mask against itself, moved and grown.

    Args:
        name: `compact` or `thin`.
        right, front: mm.
        grow: layers of voxels, negative shrinks.
        tolerance: of the NSD (mm).
    """
    reference = reference_masks()[name]
    masks = (moved(reference, right, front, grow), reference)
    ours, theirs = (torch.from_numpy(mask.astype(np.uint8)) for mask in masks)
    (row,) = evaluate.score(ours, theirs, (1.0, 1.0, 1.0), (name,), tolerance)
    return {metric: row[metric] for metric in METRIC_LABELS}


def overlap_view(right: int, front: int = 0, grow: int = 0, tolerance: float = 2.0) -> Figure:
    """One mask over another, for a compact and a thin structure, and the metrics along the way to the right.

    Arguments as in `overlap`.
    """
    figure = Figure(figsize=(7.5, 4.4))
    margins = {"left": 0.02, "right": 0.98, "top": 0.93, "bottom": 0.17}
    grid = figure.add_gridspec(6, 2, width_ratios=(1, 1.1), hspace=0.7, wspace=0.25, **margins)
    way = range(-REACH, REACH + 1, 2)
    curves = [figure.add_subplot(grid[2 * k : 2 * k + 2, 1]) for k in range(3)]
    looks = {"compact": (BLUE, "o", "-"), "thin": (ORANGE, "s", "--")}
    for k, (name, reference) in enumerate(reference_masks().items()):
        axis = figure.add_subplot(grid[3 * k : 3 * k + 3, 0])
        middle = MASK_SHAPE[2] // 2
        axis.imshow(1 - 0.35 * reference[:, :, middle].T, origin="lower", vmin=0, vmax=1)
        inside = np.pad(moved(reference, right, front, grow)[:, :, middle].T.astype(float), 1)
        xs, ys = (np.arange(n) - 1 for n in inside.shape[::-1])
        if inside.any():
            axis.contour(xs, ys, inside, [0.5], colors=VERMILLION, linewidths=1.8)
        axis.set_axis_off()
        now = overlap(name, right, front, grow, tolerance)
        axis.set_title(
            f"{name}: Dice {now['dice']:.2f}, NSD {now['nsd']:.2f}, HD95 {now['hd95']:.1f} mm"
        )
        colour, marker, dash = looks[name]
        rows = [overlap(name, x, front, grow, tolerance) for x in way]
        for axis, metric in zip(curves, METRIC_LABELS, strict=True):
            axis.plot(way, [row[metric] for row in rows], dash, color=colour, label=name)
            axis.plot(right, now[metric], marker, color=colour, ms=7)
    for axis, (metric, label) in zip(curves, METRIC_LABELS.items(), strict=True):
        axis.axvline(right, color=GREY, lw=1, ls=":")
        axis.set_ylabel(label.replace(" (", "\n("))
        if metric == "hd95":
            axis.set(xlabel="moved to the right (mm)", ylim=(0, None))
            axis.set_xticks(range(-REACH, REACH + 1, 5))
        else:
            axis.set(ylim=(0, 1.05))
            axis.set_xticks(range(-REACH, REACH + 1, 5), [])
    curves[1].legend(loc="upper right")
    return _fixed(figure)


# --- Parts ------------------------------------------------------------------------------------------


def _fixed(figure: Figure) -> Figure:
    """The figure with its axes where they are now, so that nothing moves while a reader drags a slider."""
    for axis in figure.axes:
        axis.set_position(axis.get_position())
    return figure


def _bare(axis: Axes) -> None:
    """A picture's axes without ticks and lines."""
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_visible(False)


def _way(k: int) -> str:
    """Direction of an array axis in the body."""
    return AXIS_LABELS[k].removesuffix(", mm")
