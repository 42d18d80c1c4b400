"""The explorers, without a browser: what a control does to the picture."""

import base64
import io
import re
import sys

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image

from srlib.scan import ORDERS, token_order
from srlib.show import explore, views
from srlib.show.volumes import CaseView
from srlib.study.receptive import ScanMemory

CLASSES = ("grey matter", "white matter")


def load(case_id: str) -> CaseView:
    """Two cases of different shape."""
    shape = {"small": (6, 8, 10), "large": (12, 14, 16)}[case_id]
    labels = np.zeros(shape, dtype=int)
    labels[1:4, 2:6, 5], labels[4:6, 2:6, 5] = 1, 2
    image = np.random.default_rng(0).normal(size=shape)
    return CaseView(image, {"reference": labels, "prediction": np.roll(labels, 1, axis=0)})


@pytest.fixture
def cases():
    return explore.explore_cases(load, ("small", "large"), CLASSES, (1.0, 2.0, 3.0))


@pytest.fixture
def orders():
    return explore.explore_orders()


def memory(order: str, rate: float) -> ScanMemory:
    """Of a map (4, 6, 5) with two channels of one state, for which time passes evenly."""
    shape, length = (4, 6, 5), 120
    time = torch.arange(1.0, length + 1)[:, None].expand(-1, 2)
    written = torch.ones(length, 2, 1)
    return ScanMemory(
        shape, token_order(order, length, 4), written, time, torch.full((2, 1), -rate)
    )


@pytest.fixture
def steps():
    return explore.explore_steps(np.random.default_rng(0).normal(size=60), [5, 20, 40])


@pytest.fixture
def memories():
    image = np.random.default_rng(0).normal(size=(8, 12, 10))
    return explore.explore_memory(
        image, lambda order: {"slow": memory(order, 0.01), "fast": memory(order, 0.1)}
    )


@pytest.fixture
def influences():
    def of_voxel(voxel):
        asked.append(voxel)
        field = np.full((6, 8, 7), 1e-6)
        field[*voxel] = 1
        return field

    asked = []
    rows = {row: {"whole": of_voxel, "no ToM": of_voxel} for row in ("random", "trained")}
    explorer = explore.explore_influence(np.zeros((6, 8, 7)), rows, (3, 4, 3))
    explorer.asked = asked
    return explorer


def alt(explorer) -> str:
    return re.findall('alt="([^"]*)"', explorer.picture.value)[0]


def picture(explorer) -> np.ndarray:
    (data,) = re.findall('base64,([^"]*)', explorer.picture.value)
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"))


def changed(explorer, name, value) -> bool:
    """Set a control; tell whether the picture changed."""
    before = picture(explorer)
    explorer.controls[name].value = value
    return not np.array_equal(picture(explorer), before)


def test_each_control_changes_the_picture(cases, orders):
    values = {"case": "large", "plane": "coronal", "at": 4, "width": 1.0, "level": 2.0}
    for name, value in (values | {"grey matter": False, "prediction": False}).items():
        assert changed(cases, name, value), name
    for name, value in {
        "D": 5,
        "H": 3,
        "order": "reverse",
        "nslices": 2,
        "position": 7,
        "AW": 2,
    }.items():
        assert changed(orders, name, value), name


def test_each_control_of_the_course_changes_the_picture(steps, memories, influences):
    for name, value in {
        "on_mark": 1.0,
        "elsewhere": 0.1,
        "rate": 3.0,
        "mark": 30,
        "at": 25,
    }.items():
        assert changed(steps, name, value), name
    for name, value in {"step": 30, "order": "inter_slice"}.items():
        assert changed(memories, name, value), name
    for name, value in {"D": 1, "H": 6, "W": 2, "plane": "sagittal"}.items():
        assert changed(influences, name, value), name


def test_a_dragged_mask_changes_the_picture():
    overlap = explore.explore_overlap()
    for name, value in {"right": 6, "front": -3, "grow": 1, "tolerance": 4.0}.items():
        assert changed(overlap, name, value), name
    now = views.overlap("thin", 6, -3, 1, 4.0)
    assert f"thin: Dice {now['dice']:.2f}, NSD {now['nsd']:.2f}" in alt(overlap)


def test_an_influence_is_computed_once_for_each_voxel(influences):
    assert influences.asked == [(3, 4, 3)] * 4
    influences.controls["plane"].value = "coronal"
    assert len(influences.asked) == 4
    influences.controls["H"].value = 2
    assert influences.asked[4:] == [(3, 2, 3)] * 4


def test_memory_says_what_is_left(memories):
    memories.controls["step"].value = 50
    assert "Order forward, step 50 of 120" in alt(memories)
    left = f"slow {np.exp(-0.01 * 50):.2g}, fast {np.exp(-0.1 * 50):.2g}"
    assert f"still known 50 tokens back: {left}" in alt(memories)
    memories.controls["order"].value = ORDERS[1]
    assert "Order reverse" in alt(memories)


def test_another_case_or_plane_starts_where_there_is_most_to_see(cases):
    at = cases.controls["at"]
    assert (at.value, at.max) == (5, 9)
    at.value = 2
    assert alt(cases).startswith("Case small, axial slice 2, outlines: grey matter, white matter")
    cases.controls["case"].value = "large"
    assert (at.value, at.max) == (5, 15)
    assert alt(cases).startswith("Case large, axial slice 5")
    cases.controls["plane"].value = "sagittal"
    assert at.max == 11
    assert alt(cases).startswith(f"Case large, sagittal slice {at.value}")


def test_one_change_draws_one_picture(cases, monkeypatch):
    draw, drawn = cases.draw_figure, []

    def counted(**values):
        drawn.append(values["case"])
        return draw(**values)

    monkeypatch.setattr(cases, "draw_figure", counted)
    cases.controls["case"].value = "large"
    assert drawn == ["large"]


def test_voxels_and_position_stay_within_a_smaller_grid(orders):
    orders.controls["AD"].value = 3
    assert "forward: 32 apart" in alt(orders)
    orders.controls["D"].value = 2
    assert orders.controls["position"].value == 31
    assert "A = [1, 0, 0] and B = [1, 0, 0]: forward: 0 apart" in alt(orders)


def test_each_control_has_a_label(cases, orders, steps, memories, influences):
    for explorer in (cases, orders, steps, memories, influences, explore.explore_overlap()):
        labels = [control.description for control in explorer.controls.values()]
        assert all(labels)
        assert len(set(labels)) == len(labels)


def test_the_viewer_gets_a_file_of_the_image_and_one_of_the_labels():
    pytest.importorskip("ipyniivue", reason='needs the extra "view": ipyniivue')
    viewer = explore.view_case(load("small"), CLASSES, (1.0, 2.0, 3.0))
    image, labels = (nib.Nifti1Image.from_bytes(bytes(volume.data)) for volume in viewer.volumes)
    assert image.header.get_zooms() == labels.header.get_zooms() == (1, 2, 3)
    np.testing.assert_allclose(image.get_fdata(), load("small").image, rtol=1e-6)
    assert np.array_equal(labels.dataobj, load("small").labels["reference"])
    assert nib.aff2axcodes(image.affine) == ("R", "A", "S")
    assert viewer.opts.is_radiological_convention


def test_without_the_viewer_s_package_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ipyniivue", None)
    with pytest.raises(
        ImportError, match=r"view_case needs ipyniivue: pip install -e '\.\[view\]'"
    ):
        explore.view_case(load("small"), CLASSES, (1.0, 2.0, 3.0))
