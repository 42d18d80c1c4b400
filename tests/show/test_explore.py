"""The explorers, without a browser: what a control does to the picture."""

import base64
import io
import re

import numpy as np
import pytest
from PIL import Image

from srlib.show import explore
from srlib.show.volumes import CaseView

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


def test_each_control_has_a_label(cases, orders):
    for explorer in (cases, orders):
        labels = [control.description for control in explorer.controls.values()]
        assert all(labels)
        assert len(set(labels)) == len(labels)
