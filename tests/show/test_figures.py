"""Figures are readable, the same twice, and carry what they were computed with."""

import itertools

import case_tables
import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.text import Text
from PIL import Image

from srlib.data import cue
from srlib.scan import ORDERS, token_order
from srlib.show import charts, diagrams, plots, views, volumes
from srlib.study import claims
from srlib.study.receptive import ScanMemory

SHAPE, CLASSES, SPACING = (8, 10, 6), ("grey matter", "white matter"), (1.0, 2.0, 3.0)
RANDOM = np.random.default_rng(0)
VOLUME = RANDOM.normal(size=SHAPE)
LABELS = np.zeros(SHAPE, dtype=int)
LABELS[2:5, 3:8, 1:4], LABELS[5:7, 3:8, 1:4] = 1, 2
SHIFTED = np.roll(LABELS, 1, axis=1)
CASE = volumes.CaseView(VOLUME, {"reference": LABELS, "prediction": SHIFTED})
DISTANCES = np.where(LABELS > 0, np.linspace(-2, 3, VOLUME.size).reshape(SHAPE), np.nan)
METRICS = ["dice", "nsd", "hd95", "volume_ref_ml", "volume_pred_ml"]
TABLE = pd.DataFrame(RANDOM.uniform(1, 9, (10, 5)), columns=METRICS)
TABLE = TABLE.assign(case=[f"case {k // 2}" for k in range(10)], **{"class": CLASSES * 5})

SYSTEMS = {"segresmamba": 0.0, "none": -0.01, "conv": 0.005}
CASES = case_tables.cases(SYSTEMS)
FIRST = CASES[(CASES["system"] == "segresmamba") & (CASES["seed"] == 0)]
COSTS = pd.DataFrame({"title": ["a", "b", "c", "d"], "points": [0.0, -1, 1, 2]})
COSTS = COSTS.assign(low=[0.0, -1.3, 0.8, -8.0], high=[0.0, -0.7, 1.2, 12.0])
COSTS = COSTS.assign(parameters=7.0, gmacs=1.5, captured_ms=14.0)
ACCURACY = pd.DataFrame({"distance": [4, 4, 64, 64], "accuracy": [1.0, 0.9, 0.5, 0.6]})
ACCURACY = ACCURACY.assign(seed=[0, 1] * 2, title="SegResMamba", system="segresmamba", found=1.0)
ACCURACY = ACCURACY.assign(task="cue", axis=2)
TRAININGS = pd.DataFrame({"seconds": [15, 15, 30, 30] * 2, "dice": np.linspace(0.86, 0.89, 8)})
TRAININGS = TRAININGS.assign(
    fold=[1, 2] * 4,
    title=["SegResMamba"] * 4 + ["no ToM"] * 4,
    whole=[True, True, False, False] * 2,
)
BINS = {"voxels": 9, "predicted": np.arange(9), "observed": 9 * RANDOM.uniform(size=9)}
RIVALS = pd.DataFrame({"here": [0.2, 0.7], "low": [0.1, 0.6], "high": [0.3, 0.7]})
MEMORY, *_, ABSTRACT = claims.CLAIMS
ANSWERS = {
    MEMORY: claims.Finding(claims.PART, "in part", RIVALS.set_axis(["SegMamba", "UNETR"])),
    ABSTRACT: claims.Finding(claims.FAILS, "no"),
}


def draw_signals():
    x = np.linspace(0, 1, 50)
    panels = {"position (m)": {"exact": x, "Euler": x**2}, "force (N)": {"force": -x}}
    return charts.signals(x, panels, "time (s)")


def draw_heat_maps():
    pictures = {f"slice {k}": np.arange(16).reshape(4, 4) + 16 * k for k in range(4)}
    return charts.heat_maps({"forward": pictures, "reverse": pictures}, "step", "W", "H", True)


def draw_bars():
    table = pd.DataFrame({"ToM": [0.2, 0.3], "decoder": [1.0, 2.0]}, index=["stage 0", "stage 1"])
    return charts.stacked_bars(table, "parameters (millions)")


def draw_diagram():
    boxes = {f"b{k}": (k, -k, f"box {k}", charts.BLUE) for k in range(4)}
    return charts.diagram(boxes, [("b0", "b1", "first"), ("b1", "b3", "second")])


def draw_planes():
    items = [volumes.Tile(plane, VOLUME, LABELS, plane) for plane in volumes.PLANES]
    return volumes.tiles(items, CLASSES, SPACING, columns=3)


def draw_gallery():
    cases = dict.fromkeys(("best", "median", "worst"), (VOLUME, LABELS, SHIFTED))
    return volumes.gallery(cases, CLASSES, SPACING)


def draw_order():
    orders = {name: token_order(name, 60, 3) for name in ORDERS}
    return volumes.order_view((3, 4, 5), orders, "reverse", 40, ((0, 0, 0), (2, 3, 4)))


def draw_reliability():
    return charts.reliability(pd.DataFrame({"class": ["a"] * 5 + ["b"] * 4, **BINS}))


def draw_paths():
    return volumes.scan_paths((4, 4, 4), {name: token_order(name, 64, 4) for name in ORDERS})


def draw_memory():
    time = torch.arange(1.0, 121)[:, None]
    visits, ones = token_order("forward", 120, 4), torch.ones(120, 1, 1)
    memory = ScanMemory((4, 6, 5), visits, ones, time, torch.full((1, 1), -0.1))
    return views.memory_view(VOLUME[:, :6, :5], dict.fromkeys(("random", "trained"), memory), 60)


def draw_influence():
    fields = {"whole": np.abs(VOLUME), "no ToM": VOLUME**2}
    return views.influence_view(VOLUME, dict.fromkeys(("random", "trained"), fields), (3, 4, 2))


FIGURES = {
    "signals": draw_signals,
    "heat_maps": draw_heat_maps,
    "stacked_bars": draw_bars,
    "diagram": draw_diagram,
    "metric_strips": lambda: charts.metric_strips(TABLE),
    "volume_agreement": lambda: charts.volume_agreement(TABLE),
    "error_by_volume": lambda: charts.error_by_volume(FIRST),
    "reliability": draw_reliability,
    "interval_rows": lambda: charts.interval_rows(CASES),
    "paired_rows": lambda: charts.paired_rows(CASES, "segresmamba"),
    "cost_and_gain": lambda: charts.cost_and_gain(COSTS),
    "cue_volumes": lambda: charts.cue_volumes((8, 64), number=2),
    "accuracy_by_distance": lambda: charts.accuracy_by_distance(ACCURACY),
    "dice_by_seconds": lambda: charts.dice_by_seconds(TRAININGS, cpu_hours=0.05),
    "strip": lambda: charts.strip(MEMORY, ANSWERS[MEMORY]),
    "claims_picture": lambda: charts.claims_picture(ANSWERS),
    "tiles": draw_planes,
    "case_view": lambda: volumes.case_view(CASE._replace(metrics=TABLE[:2]), CLASSES, SPACING),
    "gallery": draw_gallery,
    "surface_map": lambda: volumes.surface_map(VOLUME, DISTANCES, SPACING),
    "scan_paths": draw_paths,
    "order_view": draw_order,
    "network_diagram": lambda: diagrams.network_diagram(
        (48,) * 3, [(8 * 2**s, *[24 // 2**s] * 3) for s in range(4)]
    ),
    "tom_diagram": diagrams.tom_diagram,
    "cmmb_diagram": lambda: diagrams.cmmb_diagram(
        dict.fromkeys(("X", "F1", "F2", "F3", "F4", "F5", "F6", "F_out"), (8, 12, 12, 12))
    ),
    "selective_view": lambda: views.selective_view(VOLUME.ravel()[:60], [5, 30], 5, 0.01, -1, 50),
    "memory_view": draw_memory,
    "influence_view": draw_influence,
    "overlap_view": lambda: views.overlap_view(4, grow=1),
}


@pytest.fixture
def record(tmp_path, monkeypatch):
    monkeypatch.setenv("SRLIB_RESULTS", str(tmp_path))
    with mpl.rc_context():
        yield plots.Record("smoke", "mni152", seed=7)


@pytest.fixture
def displayed(monkeypatch):
    """Pairs of bundle and metadata that are displayed."""
    shown = []

    def display(bundle, raw, metadata=None):
        shown.append((bundle, metadata))

    monkeypatch.setattr(plots, "display", display)
    return shown


def test_each_figure_is_drawn_here():
    found = [pair for of in (charts, diagrams, volumes, views) for pair in vars(of).items()]
    annotated = {name: getattr(value, "__annotations__", {}) for name, value in found}
    drawing = {name for name, kinds in annotated.items() if kinds.get("return") == "Figure"}
    assert {name for name in drawing if not name.startswith("_")} == set(FIGURES)


@pytest.mark.parametrize("name", FIGURES)
def test_each_figure_is_readable(name, record, monkeypatch):
    problems, draw = [], Text.draw

    def checked_draw(text, renderer):
        draw(text, renderer)
        if not text.get_text().strip() or not text.get_visible():
            return
        box, page = text.get_window_extent(renderer), text.figure.bbox.padded(1)
        if not (page.contains(box.x0, box.y0) and page.contains(box.x1, box.y1)):
            problems.append(f"{text.get_text()!r} leaves the figure")
        if text.get_fontsize() < 8:
            problems.append(f"{text.get_text()!r} is too small")

    monkeypatch.setattr(Text, "draw", checked_draw)
    FigureCanvasAgg(FIGURES[name]()).draw()
    assert not problems


# Linear RGB as it is seen without green cones (Machado, Oliveira and Fernandes 2009, severity 1), and as CIE XYZ.
DEUTERANOPIA = np.array(
    [[0.3673, 0.8606, -0.2280], [0.2801, 0.6725, 0.0474], [-0.0118, 0.0429, 0.9689]]
)
XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])


def seen(colour: str) -> np.ndarray:
    """The colour as a deuteranope sees it, in CIELAB, where two are hard to mix up from a distance of 20 on."""
    rgb = np.array(to_rgb(colour))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    x, y, z = np.cbrt(XYZ @ (DEUTERANOPIA @ linear).clip(0, 1) / XYZ.sum(axis=1))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize(
    ("palette", "apart"),
    [
        (charts.CLASS_COLOURS[:5], 20),
        (charts.CLASS_COLOURS, 15),  # with a marker or a hatch of its own as well
        ((charts.ORANGE, charts.SKY, charts.GREY), 20),  # of the diagrams
        ((charts.BLUE, charts.ORANGE, charts.SKY), 20),  # the first lines of a chart
    ],
)
def test_colours_are_told_apart_by_deuteranopes(palette, apart):
    for one, other in itertools.combinations(palette, 2):
        assert np.linalg.norm(seen(one) - seen(other)) > apart, (one, other)


# --- What is written down --------------------------------------------------------------------------


def test_show_writes_the_same_files_twice(record, displayed, tmp_path):
    folder = tmp_path / "smoke" / "mni152-seed-7" / "figures"
    written = []
    for _ in range(2):
        record.show(draw_signals(), "curves", alt="two curves")
        written.append([(folder / f"curves.{kind}").read_bytes() for kind in ("png", "svg")])
    assert written[0] == written[1]
    with Image.open(folder / "curves.png") as png:
        assert png.info["Description"] == "two curves"
        assert png.width == round(7.5 * 300)
    assert sorted(file.name for file in folder.iterdir()) == ["curves.png", "curves.svg"]
    bundle, metadata = displayed[0]
    assert bundle["text/plain"] == metadata["image/png"]["alt"] == "two curves"


def test_show_refuses_a_figure_without_alt_text(record, displayed, tmp_path):
    with pytest.raises(ValueError, match="'curves' needs alt text"):
        record.show(draw_signals(), "curves", alt=" ")
    assert not list(tmp_path.rglob("*.png"))
    assert not displayed


def test_stamp_says_what_it_was_computed_with(record):
    for part in ("smoke profile: a test, not a result", "mni152 (virtual cohort)", "seed 7"):
        assert part in record.stamp()
    assert "virtual" not in plots.Record("default", "hippocampus").stamp()
    assert "random weights" in plots.Record("default", "mni152", inputs="random weights").stamp()
    reference = plots.Record("smoke", "mni152", reference="hippocampus, fold 0, an H100").stamp()
    assert reference.startswith("hippocampus, fold 0, an H100 | commit ")


def test_a_long_stamp_stays_within_the_figure(record, displayed, monkeypatch):
    monkeypatch.setattr(plots.Record, "stamp", lambda _: "fold 0, seed 0-2 | " * 9)
    figure = draw_signals()
    record.show(figure, "curves", alt="two curves")
    renderer = FigureCanvasAgg(figure).get_renderer()
    assert len(figure.texts) == 2
    assert all(figure.bbox.x1 > line.get_window_extent(renderer).x1 for line in figure.texts)


def test_table_is_stamped_and_read_back(record, displayed, tmp_path):
    record.table(TABLE, "metrics", digits=1)
    file = tmp_path / "smoke" / "mni152-seed-7" / "tables" / "metrics.csv"
    assert file.read_text().splitlines()[0] == f"# {record.stamp()}"
    pd.testing.assert_frame_equal(pd.read_csv(file, comment="#"), TABLE, rtol=1e-5)
    ((bundle, _),) = displayed
    assert "<td>case 4</td>" in bundle["text/html"]
    assert f"{TABLE['hd95'][0]:.1f}" in bundle["text/plain"]


# --- What single figures show ----------------------------------------------------------------------


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_metric_strips_show_each_case_and_the_quartiles():
    axis = charts.metric_strips(TABLE).axes[0]
    for name, points in zip(CLASSES, axis.collections, strict=True):
        values = TABLE.loc[TABLE["class"] == name, "dice"]
        assert sorted(points.get_offsets()[:, 1]) == pytest.approx(sorted(values))
        low, middle, high = np.percentile(values, (25, 50, 75))
        drawn = [line.get_ydata() for line in axis.lines]
        assert any(np.allclose(y, [low, low, high, high, low]) for y in drawn if len(y) == 5)
        assert any(np.allclose(y, middle) for y in drawn)


def test_paired_rows_show_every_case_once_as_a_point_or_counted_at_the_rim():
    cases = case_tables.cases({"segresmamba": 0.0, "none": -0.01}, n=60)
    failed = (cases["system"] == "none") & (cases["case"] == cases["case"].iloc[0])
    cases.loc[failed, "dice"] -= 0.5
    figure = charts.paired_rows(cases, "segresmamba")
    (axis,) = figure.axes
    FigureCanvasAgg(figure).draw()
    texts = [text.get_text() for text in axis.texts]
    counted = sum(int(text.strip("◂▸")) for text in texts if "◂" in text or "▸" in text)
    (points,) = [c for c in axis.collections if len(c.get_offsets()) > 1]
    assert len(points.get_offsets()) + counted == 60
    assert axis.get_xlim()[0] > -0.3
    expected = {"one case", "other seeds, too, corrected", "mean, 95 % interval"}
    assert {*legend(figure)} == {*expected, "may be missed by so many cases"}


def test_cost_and_gain_has_each_network_in_each_panel():
    figure = charts.cost_and_gain(COSTS)
    assert legend(figure) == ["a", "b", "c", "d"]
    assert [len(axis.containers) for axis in figure.axes] == [4, 4, 4]


def test_cue_volumes_frame_the_cubes_in_the_colour_of_their_class():
    rows = cue.rows_of(2, cue.Recipe(8))
    for axis in charts.cue_volumes((8, 64), number=2).axes:
        frames = [(p.get_x() + 1.5, p.get_y() + 1.5, p.get_edgecolor()) for p in axis.patches[:4]]
        assert [(x, y) for x, y, _ in frames] == list(zip(rows.target[:4], rows.y[:4], strict=True))
        assert len({colour for *_, colour in frames}) == len(set(rows.value[:4]))


def test_accuracy_by_distance_draws_means_over_seeds():
    (axis,) = charts.accuracy_by_distance(ACCURACY).axes
    assert axis.lines[0].get_ydata().tolist() == pytest.approx([0.95, 0.55])
    assert sum(len(points.get_offsets()) for points in axis.collections) == 4
    both = charts.accuracy_by_distance(pd.concat([ACCURACY, ACCURACY.assign(task="mirror")]))
    assert [axis.get_title() for axis in both.axes] == [
        "cue, along axis 2",
        "mirror, along axis 2",
    ]
    rules = ["rule: the nearest mark" in {line.get_label() for line in a.lines} for a in both.axes]
    assert rules == [True, False]


def test_dice_by_seconds_joins_means_of_whole_budgets_only():
    figure = charts.dice_by_seconds(pd.concat([TRAININGS, TRAININGS.assign(seconds=60)]), 0.05)
    axis = figure.axes[0]
    assert legend(figure) == ["SegResMamba", "no ToM"]
    assert sum(len(points.get_offsets()) for points in axis.collections) == 16
    assert [text.get_text() for text in axis.texts] == ["1", "2"] * 8
    drawn = [line.get_ydata() for line in axis.lines if len(line.get_xdata()) == 3]
    for rows, means in zip((slice(0, 2), slice(4, 6)), drawn, strict=True):
        mean = TRAININGS["dice"][rows].mean()
        # of 15 s and of the half of 60 s; 30 s breaks the line
        assert means.tolist() == pytest.approx([mean, np.nan, mean], nan_ok=True)
    (above,) = axis.child_axes
    assert [label.get_text() for label in above.get_xticklabels()] == ["0.75", "1.5", "3"]
    none = charts.dice_by_seconds(TRAININGS.assign(whole=False), 0.05)
    assert all(np.isnan(line.get_ydata()).all() for line in none.axes[0].lines)


def test_dice_by_seconds_keeps_what_failed_trainings_would_flatten():
    dice = TRAININGS["dice"].where(TRAININGS.index > 1, 0.31 + 0.1 * TRAININGS.index)
    (axis, *_) = charts.dice_by_seconds(TRAININGS.assign(dice=dice), 0.05).axes
    # of one network and budget, so at one place
    assert [t.get_text() for t in axis.texts if "↓" in t.get_text()] == ["1 ↓ 0.310\n2 ↓ 0.410"]
    assert dice.median() - 0.04 < axis.get_ylim()[0] < dice.median() - 0.03
    drawn = next(line.get_ydata() for line in axis.lines if len(line.get_xdata()) == 2)
    assert drawn[0] == pytest.approx(dice[:2].mean())  # not that of the marks as they stand


def test_outline_encloses_a_structure_at_the_border_in_mm():
    labels = np.zeros(SHAPE, dtype=int)
    labels[:2, :3, 2] = 1
    figure = volumes.tiles([volumes.Tile("corner", VOLUME, labels)], CLASSES, SPACING, columns=1)
    (outline,) = [path for path in figure.axes[0].collections[0].get_paths() if len(path.vertices)]
    assert np.allclose(outline.vertices[0], outline.vertices[-1])
    assert np.allclose(outline.vertices.min(axis=0), 0, atol=1e-9)
    assert np.allclose(outline.vertices.max(axis=0), [2 * SPACING[0], 3 * SPACING[1]])


def test_case_view_draws_the_slice_window_and_outlines_that_are_asked_for():
    labels = LABELS.copy()
    labels[6, 8, 4] = 1
    case = CASE._replace(labels={"reference": labels, "prediction": SHIFTED})
    options = {"plane": "coronal", "at": 8, "window": (2, 5)}
    axis = volumes.case_view(case, CLASSES, SPACING, **options).axes[0]
    (picture,) = axis.images
    assert np.array_equal(picture.get_array(), VOLUME[:, 8, :].T)
    assert picture.get_clim() == (4, 6)
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("left to right, mm", "bottom to top, mm")
    assert len(axis.collections) == 3  # one voxel of the reference, both classes of the prediction
    shown = ["prediction", "white matter"]
    one = volumes.case_view(case, CLASSES, SPACING, **options, shown=shown)
    assert len(one.axes[0].collections) == 1
    assert legend(one) == ["white matter", "prediction"]


def test_the_surface_map_is_cut_to_the_surface_and_marks_its_worst_voxel():
    distances = np.full((20, 24, 16), np.nan)
    distances[5:9, 6:9, 3:7] = 0.5
    distances[8, 7, 4] = -3
    figure = volumes.surface_map(np.zeros_like(distances), distances, SPACING)
    sagittal, coronal, axial, histogram, _ = figure.axes
    assert sagittal.get_title() == "sagittal slice 8"
    assert axial.lines[0].get_xydata().tolist() == [[8.5, 15.0]]  # mm
    assert coronal.get_xlim() == (3, 11)
    assert sum(bar.get_height() for bar in histogram.patches) == pytest.approx(100)


def test_order_view_tells_how_far_apart_two_voxels_are():
    orders = {name: token_order(name, 64, 4) for name in ORDERS}
    figure = volumes.order_view((4, 4, 4), orders, "inter_slice", 10, ((0, 1, 2), (1, 1, 2)))
    path, lanes = figure.axes
    said = [text.get_text() for text in lanes.texts]
    assert said == ["forward: 16 apart", "reverse: 16 apart", "inter_slice: 1 apart"]
    assert lanes.get_title() == "A and B: 1 apart in the volume"
    FigureCanvasAgg(figure).draw()
    assert sum(len(lines.get_segments()) for lines in path.collections[:2]) == 10
