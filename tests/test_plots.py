"""Figures are readable, the same twice, and carry what they were computed with."""

import itertools

import case_tables
import matplotlib as mpl
import nbformat
import numpy as np
import pandas as pd
import pytest
from bs4 import BeautifulSoup
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.text import Text
from nbconvert import HTMLExporter
from nbformat.v4 import new_code_cell, new_notebook, new_output
from PIL import Image

from srlib.book import pages
from srlib.data import cue
from srlib.scan import ORDERS, token_order
from srlib.show import plots

SHAPE, CLASSES, SPACING = (8, 10, 6), ("grey matter", "white matter"), (1.0, 2.0, 3.0)
VOLUME = np.random.default_rng(0).normal(size=SHAPE)
LABELS = np.zeros(SHAPE, dtype=int)
LABELS[2:5, 3:8, 1:4], LABELS[5:7, 3:8, 1:4] = 1, 2
SHIFTED = np.roll(LABELS, 1, axis=1)


@pytest.fixture
def record(tmp_path, monkeypatch):
    monkeypatch.setenv("SRLIB_RESULTS", str(tmp_path))
    with mpl.rc_context():
        yield plots.Record("smoke", "mni152", seed=7)


@pytest.fixture
def displayed(monkeypatch):
    """What is displayed, as (bundle, metadata) pairs."""
    shown = []
    monkeypatch.setattr(
        plots, "display", lambda bundle, raw, metadata=None: shown.append((bundle, metadata))
    )
    return shown


def metrics_table():
    random = np.random.default_rng(1)
    rows = [
        {
            "case": f"case {case}",
            "class": name,
            "dice": random.uniform(),
            "nsd": random.uniform(),
            "hd95": 9 * random.uniform(),
            "volume_ref_ml": 1 + random.uniform(),
            "volume_pred_ml": 1 + random.uniform(),
        }
        for case in range(5)
        for name in CLASSES
    ]
    return pd.DataFrame(rows)


def draw_signals():
    x = np.linspace(0, 1, 50)
    panels = {"position (m)": {"exact": x, "Euler": x**2}, "force (N)": {"force": -x}}
    return plots.signals(x, panels, "time (s)")


def draw_heat_maps():
    pictures = {f"slice {k}": np.arange(16).reshape(4, 4) + 16 * k for k in range(4)}
    return plots.heat_maps({"forward": pictures, "reverse": pictures}, "step", "W", "H", True)


def draw_bars():
    table = pd.DataFrame({"ToM": [0.2, 0.3], "decoder": [1.0, 2.0]}, index=["stage 0", "stage 1"])
    return plots.stacked_bars(table, "parameters (millions)")


def draw_diagram():
    boxes = {f"b{k}": (k, -k, f"box {k}", plots.BLUE) for k in range(4)}
    return plots.diagram(boxes, [("b0", "b1", "first"), ("b1", "b3", "second")])


def draw_paths():
    return plots.scan_paths((4, 4, 4), {name: token_order(name, 64, 4) for name in ORDERS})


def draw_planes():
    items = [plots.Tile(plane, VOLUME, LABELS, plane) for plane in plots.PLANES]
    return plots.tiles(items, CLASSES, SPACING, columns=3)


def draw_gallery():
    cases = dict.fromkeys(("best", "median", "worst"), (VOLUME, LABELS, SHIFTED))
    return plots.gallery(cases, CLASSES, SPACING)


def draw_case():
    scan = plots.CaseView(VOLUME, {"reference": LABELS, "prediction": SHIFTED}, metrics_table()[:2])
    return plots.case_view(scan, CLASSES, SPACING)


def draw_order():
    orders = {name: token_order(name, 60, 3) for name in ORDERS}
    return plots.order_view((3, 4, 5), orders, "reverse", 40, ((0, 0, 0), (2, 3, 4)))


def draw_surface():
    distances = np.where(LABELS > 0, np.linspace(-2, 3, VOLUME.size).reshape(SHAPE), np.nan)
    return plots.surface_map(VOLUME, distances, SPACING)


def draw_minutes():
    tables = [case_tables.cases(SYSTEMS, n=8, minutes=minutes) for minutes in (1.5, 3)]
    panels = {"one": ["segresmamba", "conv"], "two": ["segresmamba", "none", "absent"]}
    return plots.dice_over_minutes(pd.concat(tables), panels)


def draw_reliability():
    random = np.random.default_rng(0)
    sums = {"voxels": 9, "predicted": np.arange(9), "observed": 9 * random.uniform(size=9)}
    return plots.reliability(pd.DataFrame({"class": ["a"] * 5 + ["b"] * 4, **sums}))


def draw_claims():
    table = pd.DataFrame({"published": [0.4, 1.7], "here": [0.2, 0.7], "low": [0.1, 0.6]})
    table = table.assign(high=[0.3, np.nan]).set_axis(["SegMamba", "UNETR"])
    return plots.beside_bars({"memory, multiple of the rival's": (table, 0.5)}, log=True)


def costs():
    """Four networks of one cost, the last with an interval ten times as long."""
    rows = pd.DataFrame({"title": ["a", "b", "c", "d"], "points": [0.0, -1, 1, 2]})
    rows = rows.assign(low=[0.0, -1.3, 0.8, -8.0], high=[0.0, -0.7, 1.2, 12.0])
    return rows.assign(parameters=7.0, gmacs=1.5, step_seconds=0.4)


def accuracy():
    key = {"title": "SegResMamba", "system": "segresmamba", "found": 1.0}
    table = pd.DataFrame({"distance": [4, 4, 64, 64], "accuracy": [1.0, 0.9, 0.5, 0.6], **key})
    return table.assign(seed=[0, 1] * 2)


SYSTEMS = {"segresmamba": 0.0, "none": -0.01, "conv": 0.005}
CASES = case_tables.cases(SYSTEMS)
FIRST = CASES[(CASES["system"] == "segresmamba") & (CASES["seed"] == 0)]
FIGURES = {
    "signals": draw_signals,
    "heat_maps": draw_heat_maps,
    "stacked_bars": draw_bars,
    "diagram": draw_diagram,
    "scan_paths": draw_paths,
    "tiles": draw_planes,
    "gallery": draw_gallery,
    "case_view": draw_case,
    "order_view": draw_order,
    "metric_strips": lambda: plots.metric_strips(metrics_table()),
    "volume_agreement": lambda: plots.volume_agreement(metrics_table()),
    "surface_map": draw_surface,
    "interval_rows": lambda: plots.interval_rows(CASES),
    "paired_rows": lambda: plots.paired_rows(CASES, "segresmamba"),
    "error_by_volume": lambda: plots.error_by_volume(FIRST),
    "dice_over_minutes": draw_minutes,
    "reliability": draw_reliability,
    "cost_and_gain": lambda: plots.cost_and_gain(costs()),
    "cue_volumes": lambda: plots.cue_volumes((8, 64), number=2),
    "accuracy_by_distance": lambda: plots.accuracy_by_distance(accuracy()),
    "beside_bars": draw_claims,
}


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


def test_a_long_stamp_stays_within_the_figure(record, displayed, monkeypatch):
    monkeypatch.setattr(plots.Record, "stamp", lambda _: "fold 0, seed 0-2 | " * 9)
    figure = draw_signals()
    record.show(figure, "curves", alt="two curves")
    renderer = FigureCanvasAgg(figure).get_renderer()
    for line in figure.texts:
        assert figure.bbox.x1 > line.get_window_extent(renderer).x1
    assert len(figure.texts) == 2


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
        (plots.CLASS_COLOURS[:5], 20),
        (plots.CLASS_COLOURS, 15),  # with a marker or a hatch of its own as well
        ((plots.ORANGE, plots.SKY, plots.GREY), 20),  # of the diagrams
        ((plots.BLUE, plots.ORANGE, plots.SKY), 20),  # the first lines of a chart
    ],
)
def test_colours_are_told_apart_by_deuteranopes(palette, apart):
    for one, other in itertools.combinations(palette, 2):
        assert np.linalg.norm(seen(one) - seen(other)) > apart, (one, other)


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


def test_show_refuses_a_figure_without_alt_text(record, displayed, tmp_path):
    with pytest.raises(ValueError, match="'curves' needs alt text"):
        record.show(draw_signals(), "curves", alt=" ")
    assert not list(tmp_path.rglob("*.png"))
    assert not displayed


def test_stamp_says_what_it_was_computed_with(record):
    smoke = record.stamp()
    assert "smoke profile: a test, not a result" in smoke
    assert "mni152 (virtual cohort)" in smoke
    assert "seed 7" in smoke
    assert "virtual" not in plots.Record("default", "hippocampus").stamp()
    assert "random weights" in plots.Record("default", "mni152", inputs="random weights").stamp()
    reference = plots.Record("smoke", "mni152", reference="hippocampus, fold 0, an H100").stamp()
    assert reference.startswith("hippocampus, fold 0, an H100 | commit ")


def test_table_is_stamped_and_read_back(record, displayed, tmp_path):
    table = metrics_table()
    record.table(table, "metrics", digits=1)
    file = tmp_path / "smoke" / "mni152-seed-7" / "tables" / "metrics.csv"
    assert file.read_text().splitlines()[0] == f"# {record.stamp()}"
    pd.testing.assert_frame_equal(pd.read_csv(file, comment="#"), table, rtol=1e-5)
    (bundle, _), *rest = displayed
    assert not rest
    assert "<td>case 4</td>" in bundle["text/html"]
    assert f"{table['hd95'][0]:.1f}" in bundle["text/plain"]


def test_alt_text_reaches_the_page(record, displayed):
    record.show(draw_bars(), "bars", alt='bars of "ToM" < decoder')
    bundle, metadata = displayed[0]
    output = new_output("display_data", data=bundle, metadata=metadata)
    notebook = new_notebook(cells=[new_code_cell("draw()", outputs=[output])])
    nbformat.validate(notebook)
    page, _ = HTMLExporter().from_notebook_node(pages.with_alt_text(notebook))
    (picture,) = BeautifulSoup(page, "html.parser").select("main img")
    assert picture["alt"] == 'bars of "ToM" < decoder'


def test_fullest_finds_the_slices_with_most_foreground():
    labels = np.zeros((5, 6, 7))
    labels[4, 1:3, 2] = 1
    labels[3, 2, 2] = 2
    assert plots.fullest(labels) == (4, 2, 2)
    assert plots.fullest(np.zeros((5, 6, 7))) == (2, 3, 3)


def test_outline_encloses_a_structure_at_the_border_in_mm():
    labels = np.zeros(SHAPE, dtype=int)
    labels[:2, :3, 2] = 1
    figure = plots.tiles([plots.Tile("corner", VOLUME, labels)], CLASSES, SPACING, columns=1)
    (outline,) = [path for path in figure.axes[0].collections[0].get_paths() if len(path.vertices)]
    assert np.allclose(outline.vertices[0], outline.vertices[-1])
    low, high = outline.vertices.min(axis=0), outline.vertices.max(axis=0)
    assert np.allclose(low, 0, atol=1e-9)
    assert np.allclose(high, [2 * SPACING[0], 3 * SPACING[1]])


def test_case_view_draws_the_slice_window_and_outlines_that_are_asked_for():
    labels = LABELS.copy()
    labels[6, 8, 4] = 1
    scan = plots.CaseView(VOLUME, {"reference": labels, "prediction": SHIFTED})
    view = plots.case_view(scan, CLASSES, SPACING, "coronal", 8, window=(2, 5))
    axis = view.axes[0]
    (picture,) = axis.images
    assert np.array_equal(picture.get_array(), VOLUME[:, 8, :].T)
    assert picture.get_clim() == (4, 6)
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("left to right, mm", "bottom to top, mm")
    assert len(axis.collections) == 3  # one voxel of the reference, both classes of the prediction
    one = plots.case_view(
        scan, CLASSES, SPACING, "coronal", 8, shown=["prediction", "white matter"]
    )
    assert len(one.axes[0].collections) == 1
    legend = [text.get_text() for text in one.legends[0].get_texts()]
    assert legend == ["white matter", "prediction"]


def test_order_view_tells_how_far_apart_two_voxels_are():
    shape, pair = (4, 4, 4), ((0, 1, 2), (1, 1, 2))
    orders = {name: token_order(name, 64, 4) for name in ORDERS}
    figure = plots.order_view(shape, orders, "inter_slice", 10, pair)
    path, lanes = figure.axes
    said = [text.get_text() for text in lanes.texts]
    assert said == ["forward: 16 apart", "reverse: 16 apart", "inter_slice: 1 apart"]
    assert lanes.get_title() == "A and B: 1 apart in the volume"
    FigureCanvasAgg(figure).draw()
    steps = sum(len(lines.get_segments()) for lines in path.collections[:2])
    assert steps == 10


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_metric_strips_show_each_case_and_the_quartiles():
    table = metrics_table()
    axis = plots.metric_strips(table).axes[0]
    for name, points in zip(CLASSES, axis.collections, strict=True):
        values = table.loc[table["class"] == name, "dice"]
        assert sorted(points.get_offsets()[:, 1]) == pytest.approx(sorted(values))
        low, middle, high = np.percentile(values, (25, 50, 75))
        drawn = [line.get_ydata() for line in axis.lines]
        assert any(np.allclose(y, [low, low, high, high, low]) for y in drawn if len(y) == 5)
        assert any(np.allclose(y, middle) for y in drawn)


def test_paired_rows_show_every_case_once_as_a_point_or_counted_at_the_rim():
    cases = case_tables.cases({"segresmamba": 0.0, "none": -0.01}, n=60)
    for seed in (0, 1, 2):  # one case in which the other network fails
        failed = (cases["system"] == "none") & (cases["case"] == cases["case"].iloc[0])
        cases.loc[failed & (cases["seed"] == seed), "dice"] -= 0.5
    figure = plots.paired_rows(cases, "segresmamba")
    axis = figure.axes[0]
    FigureCanvasAgg(figure).draw()
    counted = [
        t.get_text()[1:]
        for t in axis.texts
        if t.get_text()[0] == "\N{BLACK LEFT-POINTING SMALL TRIANGLE}"
    ]
    counted += [
        t.get_text()[:-1]
        for t in axis.texts
        if t.get_text()[-1] == "\N{BLACK RIGHT-POINTING SMALL TRIANGLE}"
    ]
    (points,) = [c for c in axis.collections if len(c.get_offsets()) > 1]
    assert len(points.get_offsets()) + sum(map(int, counted)) == 60
    assert axis.get_xlim()[0] > -0.3
    assert sorted(legend(figure)) == sorted(
        ["one case", "other seeds, too", "mean, 95 % interval", "too small for these cases to show"]
    )


def test_a_long_training_is_not_joined_to_the_budgets_of_the_curve():
    tables = [
        case_tables.cases({"segresmamba": 0.0}, n=8, minutes=minutes) for minutes in (3, 12, 60)
    ]
    (axis,) = plots.dice_over_minutes(pd.concat(tables), {"": ["segresmamba"]}).axes
    assert [len(bars.lines[0].get_xdata()) for bars in axis.containers] == [1, 2]


def test_an_interval_that_would_set_the_scale_is_cut_and_named():
    figure = plots.cost_and_gain(costs())
    assert legend(figure) == ["a", "b", "c", "d (-8.0 to +12.0)"]
    assert [len(axis.containers) for axis in figure.axes] == [4, 4, 4]
    assert figure.axes[0].get_ylim()[1] < 3


def test_cue_volumes_frame_the_cubes_in_the_colour_of_their_class():
    rows = cue.rows_of(2, cue.Recipe(8))
    for axis in plots.cue_volumes((8, 64), number=2).axes:
        frames = [(p.get_x() + 1.5, p.get_y() + 1.5, p.get_edgecolor()) for p in axis.patches[:4]]
        assert [(x, y) for x, y, _ in frames] == list(zip(rows.target[:4], rows.y[:4], strict=True))
        assert len({colour for *_, colour in frames}) == len(set(rows.value[:4]))


def test_accuracy_by_distance_draws_means_over_seeds():
    (axis,) = plots.accuracy_by_distance(accuracy()).axes
    assert axis.lines[0].get_ydata().tolist() == pytest.approx([0.95, 0.55])
    assert sum(len(points.get_offsets()) for points in axis.collections) == 4


def test_the_surface_map_is_cut_to_the_surface_and_marks_its_worst_voxel():
    distances = np.full((20, 24, 16), np.nan)
    distances[5:9, 6:9, 3:7] = 0.5
    distances[8, 7, 4] = -3
    figure = plots.surface_map(np.zeros_like(distances), distances, SPACING)
    sagittal, coronal, axial, histogram, _ = figure.axes
    assert sagittal.get_title() == "sagittal slice 8"
    assert axial.lines[0].get_xydata().tolist() == [[8.5, 15.0]]  # mm
    assert coronal.get_xlim() == (3, 11)
    assert sum(bar.get_height() for bar in histogram.patches) == pytest.approx(100)
