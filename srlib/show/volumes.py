"""Drawings of volumes: slices with outlines, and scan orders as paths through a grid of voxels.

Volumes are arrays (D, H, W) in the orientation of `srlib.data.cases`: to the right, to the front, upwards. `classes`
are the names of the labels 1, 2, ...; `spacing` is that of the voxels, in mm; `orders` are name -> (L,) the tokens in
the order visited, as indices into a row-major grid.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from mpl_toolkits.mplot3d import Axes3D
from mpl_toolkits.mplot3d.art3d import Line3DCollection
from numpy.typing import ArrayLike

from srlib.show.charts import BLUE, CLASS_COLOURS, GREEN, GREY, PURPLE, VERMILLION, subplots

PLANES = {"sagittal": 0, "coronal": 1, "axial": 2}  # plane -> the array axis that it cuts
AXIS_LABELS = ("left to right, mm", "back to front, mm", "bottom to top, mm")
EDGES = (("L", "R"), ("P", "A"), ("I", "S"))  # where each axis begins and ends
GRID_AXES = ("D (L to R)", "H (P to A)", "W (I to S)")
OUTLINES: tuple[Any, Any] = ("-", (0, (3, 1.5)))  # of the first and the second label map of a case


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


class CaseView(NamedTuple):
    """A case to look at.

    Attributes:
        image: (D, H, W).
        labels: name, as `reference` -> label map (D, H, W); outlines of the first are solid, of the second dashed.
        metrics: a row for each class as from `srlib.run.evaluate`, or `None`.
    """

    image: ArrayLike
    labels: Mapping[str, ArrayLike]
    metrics: pd.DataFrame | None = None


def tiles(
    items: Sequence[Tile], classes: Sequence[str], spacing: Sequence[float], columns: int
) -> Figure:
    """Slices side by side, row by row; with up to three in a row their axes are in mm, else edges have letters."""
    ruled, rows = columns <= 3, -(-len(items) // columns)
    extent = np.array(np.shape(items[0].image)) * spacing
    sides = [np.delete(extent, PLANES[item.plane]) for item in items]
    size = (7.3 / columns - 0.55 * ruled) * max(up / across for across, up in sides)
    height = rows * (size + 0.25 + 0.65 * ruled) + 0.5
    figure, axes = subplots(rows, columns, height=height, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, item in zip(axes.flat, items, strict=False):
        cut = PLANES[item.plane]
        labels = np.zeros(np.shape(item.image)) if item.labels is None else item.labels
        plane = _Plane(cut, fullest(labels)[cut] if item.at is None else item.at, spacing)
        plane.draw_image(axis, item.image, full_window(item.image))
        style = {} if item.filled else {"linewidths": 1.5 if columns <= 4 else 1}
        plane.draw_labels(axis, labels, range(len(classes)), item.filled, **style)
        axis.set_title(item.title, parse_math=False)  # a case may be called $x$
        axis.axison = ruled
        if not ruled:
            plane.name_edges(axis)
    figure.legend(handles=_key(classes), loc="outside upper center", ncols=len(classes))
    return figure


def case_view(
    case: CaseView,
    classes: Sequence[str],
    spacing: Sequence[float],
    plane: str = "axial",
    at: int | None = None,
    window: tuple[float, float] | None = None,
    shown: Collection[str] | None = None,
) -> Figure:
    """One slice of a case with outlines of its label maps, its metrics beside it.

    Args:
        plane: one of `PLANES`.
        at: index of the slice; `None` takes the one with most of the first label map.
        window: width and level (its centre) of the intensities from black to white; `None` takes `full_window`.
        shown: the classes and the label maps that are outlined, by name; `None` means all.
    """
    cut = PLANES[plane]
    at = fullest(next(iter(case.labels.values())))[cut] if at is None else at
    view = _Plane(cut, at, spacing)
    figure, axis = subplots(height=4.2)
    axis.set_position((0.1, 0.16, 0.56, 0.76))  # the same for every slice
    axis.locator_params(nbins=5)
    view.draw_image(axis, case.image, window or full_window(case.image))
    visible = {*classes, *case.labels} if shown is None else set(shown)
    outlined = [k for k, name in enumerate(classes) if name in visible]
    key = [handle for handle in _key(classes) if handle.get_label() in visible]
    for (name, labels), dash in zip(case.labels.items(), OUTLINES, strict=False):
        if name in visible:
            view.draw_labels(axis, labels, outlined, False, linestyles=[dash])
            key.append(Line2D([], [], color=GREY, linestyle=dash, label=name))
    axis.set(title=f"{plane} slice {at} (0 to {np.shape(case.image)[cut] - 1})")
    figure.legend(handles=key, loc="upper left", bbox_to_anchor=(0.68, 0.94))
    lines = [
        f"{row['class']}\n  Dice {row['dice']:.3f}\n  NSD {row['nsd']:.3f}\n  HD95 {row['hd95']:.1f} mm\n"
        f"  {row['volume_pred_ml']:.4g} ml, reference {row['volume_ref_ml']:.4g} ml\n"
        for row in ([] if case.metrics is None else case.metrics.to_dict("records"))
    ]
    figure.text(0.69, 0.14, "\n".join(lines), size=8, va="bottom", linespacing=1.4)
    return figure


def gallery(
    cases: Mapping[str, tuple[ArrayLike, ArrayLike, ArrayLike]],
    classes: Sequence[str],
    spacing: Sequence[float],
) -> Figure:
    """Rows of title -> (image, reference, prediction), and the voxels in which the latter two differ."""
    items = []
    for title, (image, reference, prediction) in cases.items():
        at = fullest(reference)[PLANES["axial"]]
        differs = np.not_equal(reference, prediction) * (len(classes) + 1)
        columns = {title: None, "reference": reference, "prediction": prediction}
        items += [Tile(name, image, labels, at=at) for name, labels in columns.items()]
        items.append(Tile("difference", image, differs, at=at, filled=True))
    return tiles(items, [*classes, "reference and prediction differ"], spacing, columns=4)


def surface_map(image: ArrayLike, distances: ArrayLike, spacing: Sequence[float]) -> Figure:
    """A predicted surface in three planes through its worst voxel, coloured by its distance from the reference's.

    The planes are cut to the surface and the image is dimmed: a surface voxel without an error is almost white. A
    circle marks the worst voxel, and a histogram shows all distances.

    Args:
        image: (D, H, W).
        distances: (D, H, W) in mm, NaN off the surface, as from `srlib.run.evaluate.surface_distances`.
    """
    values = np.asarray(distances)
    at = np.array(np.unravel_index(np.nanargmax(np.abs(values)), values.shape))
    reach = max(abs(values[tuple(at)]), min(spacing))  # a perfect surface has a scale, too
    found = np.argwhere(~np.isnan(values))
    low, high = (found.min(axis=0) - 2) * spacing, (found.max(axis=0) + 3) * spacing
    width, level = full_window(image)
    dim = 2.5 * width, level + 0.75 * width  # as dark at its lower end, grey at its upper one
    colours: dict[str, Any] = {"cmap": "PuOr_r", "norm": Normalize(-reach, reach)}
    figure, axes = subplots(2, 2, height=6.2)
    for axis, (name, cut) in zip(axes.flat, PLANES.items(), strict=False):
        plane = _Plane(cut, at[cut], spacing)
        plane.draw_image(axis, image, dim)
        box = (*axis.get_xlim(), *axis.get_ylim())
        drawn = axis.imshow(plane.of(values), origin="lower", extent=box, **colours)
        across, up = plane.sides
        worst = (at[plane.sides] + 0.5) * np.take(spacing, plane.sides)
        axis.plot(*worst, "o", markersize=11, markerfacecolor="none", color=GREEN)
        axis.set(xlim=(low[across], high[across]), ylim=(low[up], high[up]))
        axis.set(title=f"{name} slice {at[cut]}")
        axis.locator_params(nbins=4)
    shares = np.full(len(found), 100 / len(found))
    axes[1, 1].hist(values[tuple(found.T)], 40, weights=shares, color=GREY)
    axes[1, 1].set(xlabel="distance (mm)", ylabel="share of the surface's voxels (%)", yscale="log")
    label = "mm, inside (-) or outside (+); circle: the worst voxel"
    figure.colorbar(drawn, ax=axes, label=label, location="bottom", shrink=0.5)
    return figure


def fullest(labels: ArrayLike) -> tuple[int, ...]:
    """For each axis the slice that cuts most foreground, the middle one when there is none."""
    inside = np.asarray(labels) > 0
    if not inside.any():
        return tuple(n // 2 for n in inside.shape)
    return tuple(int(inside.sum(axis=tuple({0, 1, 2} - {k})).argmax()) for k in range(3))


def full_window(image: ArrayLike) -> tuple[float, float]:
    """Width and level (its centre) of the intensities between the 0.5 and 99.5 percentiles."""
    low, high = np.percentile(np.asarray(image), (0.5, 99.5))
    return float(high - low), float(high + low) / 2


def _key(classes: Sequence[str]) -> list[Line2D]:
    """Legend entries of the classes."""
    colours = itertools.cycle(CLASS_COLOURS)
    return [Line2D([], [], color=next(colours), label=name) for name in classes]


class _Plane(NamedTuple):
    """Slice `at` along the array axis `cut` of volumes with that spacing, in mm."""

    cut: int
    at: int
    spacing: Sequence[float]

    @property
    def sides(self) -> list[int]:
        """The array axes across and up."""
        return [k for k in range(3) if k != self.cut]

    def of(self, volume: ArrayLike) -> np.ndarray:
        """The slice of a volume, (up, across)."""
        return np.take(np.asarray(volume), self.at, axis=self.cut).T

    def draw_image(self, axis: Axes, image: ArrayLike, window: tuple[float, float]) -> None:
        """The slice in grey, its axes in mm, black to white over the window (width, level)."""
        values, (across, up), (width, level) = self.of(image), self.sides, window
        right, top = values.shape[1] * self.spacing[across], values.shape[0] * self.spacing[up]
        grey: dict[str, Any] = {"vmin": level - width / 2, "vmax": level + width / 2}
        axis.imshow(values, origin="lower", extent=(0, right, 0, top), **grey)
        axis.set(xlabel=AXIS_LABELS[across], ylabel=AXIS_LABELS[up], xlim=(0, right), ylim=(0, top))

    def name_edges(self, axis: Axes) -> None:
        """Letters at the left, right, lower and upper edge: where the patient's left, front, ... is."""
        style: dict[str, Any] = {"color": "white", "size": 8, "transform": axis.transAxes}
        style |= {"ha": "center", "va": "center"}
        for side, along in zip(self.sides, ((1, 0), (0, 1)), strict=True):
            for letter, far in zip(EDGES[side], (0.04, 0.96), strict=True):
                x, y = (far if here else 0.5 for here in along)
                axis.text(x, y, letter, **style)

    def draw_labels(
        self, axis: Axes, labels: ArrayLike, classes: Iterable[int], filled: bool, **style: Any
    ) -> None:
        """The classes (label minus one) of the slice as outlines, or filled; options as in `Axes.contour`."""
        framed = np.pad(self.of(labels), 1)  # closes outlines at the border
        dx, dy = (self.spacing[k] for k in self.sides)
        x, y = (np.arange(framed.shape[1]) - 0.5) * dx, (np.arange(framed.shape[0]) - 0.5) * dy
        draw = axis.contourf if filled else axis.contour
        for k in classes:
            if (framed == k + 1).any():
                draw(x, y, framed == k + 1, [0.5, 1.5], colors=CLASS_COLOURS[k % 7], **style)


# --- Scan orders -----------------------------------------------------------------------------------


def scan_paths(shape: Sequence[int], orders: Mapping[str, ArrayLike]) -> Figure:
    """Scan orders as paths through a small grid (D, H, W) of voxels, from dark to light; jumps are dashed."""
    options = {"subplot_kw": {"projection": "3d"}, "squeeze": False}
    figure, axes = subplots(1, len(orders), height=3.4, **options)
    for axis, (name, order) in zip(axes[0], orders.items(), strict=True):
        points, lines = _draw_path(axis, shape, order)
        axis.scatter(*points[0], color=VERMILLION, s=45, depthshade=False, label="first")
        axis.scatter(*points[-1], color=BLUE, s=45, marker="s", depthshade=False, label="last")
        axis.set(title=name)
    figure.legend(*axis.get_legend_handles_labels(), loc="outside upper right", ncols=2)
    figure.colorbar(lines, ax=axes, label="step", shrink=0.6, location="bottom", aspect=40)
    return figure


def order_view(
    shape: Sequence[int],
    orders: Mapping[str, ArrayLike],
    name: str,
    position: int,
    pair: Sequence[Sequence[int]],
) -> Figure:
    """One scan order as a path up to a position, and how far apart two voxels lie in every order.

    Args:
        shape: (D, H, W) of the grid.
        name: the order whose path is drawn.
        position: the step up to which it is drawn, 0 to L - 1.
        pair: the two voxels, (D, H, W) each.
    """
    figure = Figure(figsize=(7.5, 4))
    axis, lanes = figure.add_subplot(1, 2, 1, projection="3d"), figure.add_subplot(1, 2, 2)
    points, _ = _draw_path(axis, shape, orders[name], position)
    marks = list(zip("AB", pair, (VERMILLION, BLUE), "os", strict=True))
    for letter, voxel, colour, marker in marks:
        axis.scatter(*voxel, color=colour, marker=marker, s=50, depthshade=False, label=letter)
    now = {"color": PURPLE, "marker": "D", "label": f"step {position}"}
    axis.scatter(*points[position], s=40, depthshade=False, **now)
    axis.set(title=f"{name}, steps 0 to {position}")
    figure.legend(*axis.get_legend_handles_labels(), loc="outside upper right", ncols=3)

    for row, (label, order) in enumerate(orders.items()):
        step = np.argsort(np.asarray(order)).reshape(tuple(shape))  # voxel -> when it is visited
        ends = [int(step[tuple(voxel)]) for voxel in pair]
        lanes.hlines(row, 0, step.size - 1, color="#BBBBBB", linewidth=1)
        lanes.hlines(row, min(ends), max(ends), color="black", linewidth=2.5)
        for end, (_, _, colour, marker) in zip(ends, marks, strict=True):
            lanes.plot(end, row, color=colour, marker=marker, markersize=7)
        if label == name:
            lanes.plot(position, row, color=PURPLE, marker="D", markersize=6)
        far = f"{label}: {abs(ends[0] - ends[1])} apart"
        lanes.text(0, row - 0.2, far, size=9, weight="bold" if label == name else "normal")
    lanes.set(yticks=[], ylim=(len(orders) - 0.6, -0.6), xlabel="step of the sequence")
    apart = sum(abs(a - b) for a, b in zip(*pair, strict=True))
    lanes.set(title=f"A and B: {apart} apart in the volume")
    lanes.spines["left"].set_visible(False)
    return figure


def _draw_path(
    axis: Axes3D, shape: Sequence[int], order: ArrayLike, last: int | None = None
) -> tuple[np.ndarray, Line3DCollection]:
    """The path of a scan order up to step `last`; its voxels (L, 3) and what a colour bar needs."""
    points = np.stack(np.unravel_index(np.asarray(order), tuple(shape)), axis=1)  # (L, 3)
    steps = np.stack([points[:-1], points[1:]], axis=1)[:last]  # (L - 1, 2, 3)
    jumps = np.abs(steps[:, 1] - steps[:, 0]).sum(axis=1) > 1
    for far, dash, width in ((False, "-", 2.2), (True, (0, (2, 2)), 0.8)):
        lines = Line3DCollection(steps[jumps == far], linewidths=width, linestyles=dash)
        lines.set(array=np.flatnonzero(jumps == far), clim=(0, len(points) - 1), cmap="viridis")
        axis.add_collection(lines)
    axis.scatter(*points.T, color="#BBBBBB", s=8, depthshade=False)
    axis.set(**dict(zip(("xlabel", "ylabel", "zlabel"), GRID_AXES, strict=True)))
    axis.set(xticks=range(shape[0]), yticks=range(shape[1]), zticks=range(shape[2]))
    axis.set_box_aspect(tuple(shape), zoom=1.0)
    for ruler in (axis.xaxis, axis.yaxis, axis.zaxis):
        ruler.set_tick_params(pad=-3)
        ruler.labelpad = -7
    return points, lines
