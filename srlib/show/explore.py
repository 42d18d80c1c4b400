"""Explorers for JupyterLab: controls above a figure that follows them.

Each is a thin shell of ipywidgets over a function of `srlib.show.volumes` or `views` that returns a figure; without a
browser the notebooks show that figure. Every control has a label and is reached and moved by keyboard: Tab goes on
to the next, arrow keys move a slider. The picture is replaced in one piece, with alt text, and keeps its place.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from html import escape
from math import prod
from typing import Any

import ipywidgets as widgets
import nibabel as nib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure

from srlib.scan import ORDERS, token_order
from srlib.show.charts import CLASS_COLOURS
from srlib.show.views import REACH, influence_view, memory_view, overlap_view, selective_view
from srlib.show.volumes import (
    AXIS_LABELS,
    PLANES,
    CaseView,
    case_view,
    full_window,
    fullest,
    order_view,
)
from srlib.study.receptive import Influence, ScanMemory

AXES = "DHW"
WIDE = {"style": {"description_width": "initial"}, "layout": widgets.Layout(width="25em")}


class Explorer(widgets.VBox):
    """Controls and a picture that is drawn again whenever one of them changes.

    Args:
        controls: name -> the widget whose `value` is handed to `draw` under that name.
        rows: the controls as they are laid out, row by row.
        draw: takes the controls' values by name; returns the figure and its alt text.
        adjust: takes the name of a control that was changed, before drawing; sets others that depend on it.
    """

    def __init__(
        self,
        controls: Mapping[str, Any],
        rows: Sequence[Iterable[Any]],
        draw: Callable[..., tuple[Figure, str]],
        adjust: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.controls, self.draw_figure, self.adjust = controls, draw, adjust
        self.picture, self.adjusting = widgets.HTML(), False
        layout = widgets.Layout(flex_flow="row wrap")
        super().__init__([*(widgets.HBox(list(row), layout=layout) for row in rows), self.picture])
        for name, control in controls.items():
            control.observe(lambda _, name=name: self._changed(name), names="value")
        self._draw()

    def _changed(self, name: str) -> None:
        if self.adjusting:  # one picture for all that follows from one change
            return
        self.adjusting = True
        try:
            self.adjust(name)
        finally:
            self.adjusting = False
        self._draw()

    def _draw(self) -> None:
        values = {name: control.value for name, control in self.controls.items()}
        figure, alt = self.draw_figure(**values)
        figure.set_layout_engine("none")  # quick, and the axes stay in place
        png = io.BytesIO()
        FigureCanvasAgg(figure).print_png(png, pil_kwargs={"compress_level": 1})
        data = base64.b64encode(png.getvalue()).decode()
        fit = 'style="max-width: 100%; height: auto"'
        self.picture.value = f'<img {fit} alt="{escape(alt)}" src="data:image/png;base64,{data}">'


def explore_cases(
    load: Callable[[str], CaseView],
    case_ids: Sequence[str],
    classes: Sequence[str],
    spacing: Sequence[float],
) -> Explorer:
    """Slices of cases with outlines and metrics: `case_view` with controls.

    Args:
        load: a case's name -> the case; the last few that were looked at are kept.
        case_ids: the cases to choose from.
        classes: names of the labels 1, 2, ...
        spacing: of the voxels, in mm.
    """
    load = lru_cache(maxsize=4)(load)
    case = widgets.Dropdown(options=case_ids, description="case")
    plane = widgets.Dropdown(options=list(PLANES), value="axial", description="plane")
    at = widgets.IntSlider(description="slice")
    width = widgets.FloatSlider(description="window", min=0.1, max=10, step=0.1)
    level = widgets.FloatSlider(description="level", min=-5, max=5, step=0.1)
    names = [*classes, *load(case_ids[0]).labels]
    style = {"indent": False, "layout": widgets.Layout(width="auto", margin="2px 1em")}
    toggles = {name: widgets.Checkbox(True, description=name, **style) for name in names}

    def adjust(name: str) -> None:
        scan, cut = load(case.value), PLANES[plane.value]
        if name in {"case", "plane"}:  # go where there is most to see
            at.max = np.shape(scan.image)[cut] - 1
            at.value = fullest(next(iter(scan.labels.values())))[cut]
        if name == "case":
            width.value, level.value = full_window(scan.image)

    def draw(case: str, plane: str, at: int, width: float, level: float, **shown: bool) -> tuple:
        chosen = [name for name, on in shown.items() if on]
        figure = case_view(load(case), classes, spacing, plane, at, (width, level), chosen)
        return figure, f"Case {case}, {plane} slice {at}, outlines: {', '.join(chosen) or 'none'}"

    adjust("case")
    controls = {"case": case, "plane": plane, "at": at, "width": width, "level": level, **toggles}
    return Explorer(controls, [(case, plane, at), (width, level), toggles.values()], draw, adjust)


def view_case(case: CaseView, classes: Sequence[str], spacing: Sequence[float]) -> Any:
    """The first label map over its image in a radiological viewer: crosshair, three planes and 3D (ipyniivue).

    The viewer comes with its package and fetches nothing. As in a radiology department, the patient's right is on the
    left; dragging with the right mouse button sets the window.

    Args:
        case: image and labels (D, H, W) in RAS order.
        classes: names of the labels 1, 2, ...
        spacing: of the voxels, in mm.

    Raises:
        ImportError: without the extra `view`.
    """
    try:
        from ipyniivue import NiiVue, ShowRender, SliceType
    except ImportError as error:
        raise ImportError("view_case needs ipyniivue: pip install -e '.[view]'") from error
    width, level = full_window(case.image)
    labels = np.asarray(next(iter(case.labels.values())), dtype=np.uint8)
    image = {"name": "image.nii", "data": _nifti(np.asarray(case.image, np.float32), spacing)}
    window = {"cal_min": level - width / 2, "cal_max": level + width / 2}
    over = {"name": "labels.nii", "data": _nifti(labels, spacing), "opacity": 0.4}
    viewer = NiiVue(height=480, multiplanar_show_render=ShowRender.ALWAYS)
    viewer.opts.is_radiological_convention = True
    viewer.load_volumes([image | window, over])
    colours = [to_rgba(CLASS_COLOURS[k % 7]) for k in range(len(classes))]
    table = np.round(255 * np.array([(0, 0, 0, 0), *colours])).astype(int).T
    lookup: dict[str, Any] = dict(zip("RGBA", table.tolist(), strict=True))
    viewer.volumes[1].set_colormap_label(lookup | {"labels": ["background", *classes]})
    viewer.set_slice_type(SliceType.MULTIPLANAR)
    return viewer


def _nifti(volume: np.ndarray, spacing: Sequence[float]) -> bytes:
    """A NIfTI file of a volume in RAS order."""
    return nib.Nifti1Image(volume, np.diag([*spacing, 1.0])).to_bytes()


def explore_orders(shape: Sequence[int] = (4, 4, 4)) -> Explorer:
    """Scan orders as paths through a grid (D, H, W), and the distance of two voxels: `order_view` with controls."""
    size = {axis: _whole(f"grid {axis}", n, 2, 8) for axis, n in zip(AXES, shape, strict=True)}
    order = widgets.Dropdown(options=ORDERS, value="inter_slice", description="order")
    nslices = _whole("slices S", shape[0], 1, 8)
    position = widgets.IntSlider(prod(shape) - 1, 0, prod(shape) - 1, description="position")
    ends = {
        end + axis: _whole(f"{end}: {axis}", int(end + axis == "BD"), 0, size[axis].value - 1)
        for end in "AB"
        for axis in AXES
    }

    def adjust(name: str) -> None:
        if name in size:  # keep within the grid
            position.max = prod(control.value for control in size.values()) - 1
            for end in "AB":
                ends[end + name].max = size[name].value - 1

    def draw(order: str, nslices: int, position: int, **values: int) -> tuple[Figure, str]:
        shape = [values[axis] for axis in AXES]
        pair = [[values[end + axis] for axis in AXES] for end in "AB"]
        orders = {name: token_order(name, prod(shape), nslices) for name in ORDERS}
        figure = order_view(shape, orders, order, position, pair)
        far = "; ".join(text.get_text() for text in figure.axes[1].texts)
        path = f"Order {order} up to step {position} in a grid of {shape}"
        return figure, f"{path}; A = {pair[0]} and B = {pair[1]}: {far}"

    path, fields = {"order": order, "nslices": nslices, "position": position}, list(ends.values())
    rows = [size.values(), path.values(), fields[:3], fields[3:]]
    return Explorer({**size, **path, **ends}, rows, draw, adjust)


def explore_steps(values: Any, marked: Sequence[int]) -> Explorer:
    """What a scan keeps of a signal (L,) with marked tokens: `selective_view` with controls; the last mark moves."""
    last = len(values) - 1
    controls = {
        "on_mark": _log("Δ on a mark", 5, -2, 1),
        "elsewhere": _log("Δ elsewhere", 1e-4, -4, 0),
        "rate": _log("rate -A", 1, -2, 1),
        "mark": widgets.IntSlider(marked[-1], 0, last, description="last mark at", **WIDE),
        "at": widgets.IntSlider(last, 0, last, description="look after token", **WIDE),
    }

    def draw(on_mark: float, elsewhere: float, rate: float, mark: int, at: int) -> tuple:
        figure = selective_view(values, [*marked[:-1], mark], on_mark, elsewhere, -rate, at)
        steps = f"Steps {on_mark:.3g} on a mark and {elsewhere:.3g} elsewhere, A = -{rate:.3g}"
        return figure, f"{steps}; {figure.axes[2].get_title('left')}"

    fields = list(controls.values())
    return Explorer(controls, [fields[:3], fields[3:]], draw)


def explore_memory(image: Any, memories: Callable[[str], Mapping[str, ScanMemory]]) -> Explorer:
    """A scan played back over a volume (D, H, W): `memory_view` with controls.

    Args:
        image: of a multiple of the map's size.
        memories: an order's name -> name of the network -> memory of that scan; each order is asked for once.
    """
    memories = lru_cache(memories)
    first = next(iter(memories(ORDERS[0]).values()))
    length, middle = (
        len(first.visits),
        np.ravel_multi_index([n // 2 for n in first.shape], first.shape),
    )
    start = int((first.visits == int(middle)).nonzero())  # in the middle there is something to see
    order = widgets.Dropdown(options=ORDERS, description="order")
    step = widgets.IntSlider(start, 0, length - 1, description="step", **WIDE)
    play = widgets.Play(max=length - 1, value=start, step=length // 150 or 1, interval=400)
    widgets.jslink((play, "value"), (step, "value"))

    def draw(order: str, step: int) -> tuple:
        found = memories(order)
        figure = memory_view(image, found, step)
        back = min(100, step)
        left = ", ".join(f"{n} {m.remembered(step)[-1 - back]:.2g}" for n, m in found.items())
        return (
            figure,
            f"Order {order}, step {step} of {length}; still known {back} tokens back: {left}",
        )

    return Explorer({"order": order, "step": step}, [(order, play, step)], draw)


def explore_influence(
    image: Any, influences: Mapping[str, Mapping[str, Influence]], voxel: Sequence[int]
) -> Explorer:
    """What moves the decision at a voxel of an image (D, H, W): `influence_view` with controls.

    Args:
        image: what the networks were asked about.
        influences: row -> column -> function as from `srlib.study.receptive.influence`.
        voxel: the one to begin with.
    """

    @lru_cache(maxsize=8)
    def fields(voxel: tuple[int, ...]) -> dict:
        return {
            row: {name: of_voxel(voxel) for name, of_voxel in columns.items()}
            for row, columns in influences.items()
        }

    plane = widgets.Dropdown(options=list(PLANES), value="axial", description="plane")
    sliders = {
        axis: widgets.IntSlider(
            at, 0, n - 1, description=way.removesuffix(", mm"), continuous_update=False, **WIDE
        )
        for axis, at, n, way in zip(AXES, voxel, np.shape(image), AXIS_LABELS, strict=True)
    }

    def draw(plane: str, **at: int) -> tuple:
        voxel = tuple(at[axis] for axis in AXES)
        figure = influence_view(image, fields(voxel), voxel, plane)
        return figure, f"What moves the decision at voxel {voxel}, {plane} plane"

    return Explorer({"plane": plane, **sliders}, [(plane,), sliders.values()], draw)


def explore_overlap() -> Explorer:
    """One mask dragged over another, thin and compact: `overlap_view` with controls."""
    controls = {
        "right": widgets.IntSlider(4, -REACH, REACH, description="right (mm)", **WIDE),
        "front": widgets.IntSlider(0, -REACH, REACH, description="front (mm)", **WIDE),
        "grow": widgets.IntSlider(0, -2, 3, description="grow (voxels)", **WIDE),
        "tolerance": widgets.FloatSlider(
            2, min=0.5, max=5, step=0.5, description="tolerance of NSD (mm)", **WIDE
        ),
    }

    def draw(**values: Any) -> tuple:
        figure = overlap_view(**values)
        said = "; ".join(axis.get_title() for axis in figure.axes if axis.get_title())
        return figure, f"Moved {values['right']} mm right and {values['front']} mm front; {said}"

    fields = list(controls.values())
    return Explorer(controls, [fields[:2], fields[2:]], draw)


def _log(name: str, value: float, low: int, high: int) -> Any:
    """A slider from 10^low to 10^high."""
    return widgets.FloatLogSlider(value, min=low, max=high, description=name, **WIDE)


def _whole(name: str, value: int, low: int, high: int) -> Any:
    """A narrow field for a whole number."""
    layout = widgets.Layout(width="10em")
    return widgets.BoundedIntText(value, min=low, max=high, description=name, layout=layout)
