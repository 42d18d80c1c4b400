"""The figures of the explorers against what is known of them."""

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg

from srlib.scan import token_order
from srlib.show import views
from srlib.study.receptive import ScanMemory

U = np.random.default_rng(0).normal(size=40)


def test_weights_of_the_tokens_make_the_state():
    delta = np.random.default_rng(1).uniform(0.01, 0.5, 40)
    state = views._scan_one(U, delta, -0.7, 0.3)
    for at in (0, 17, 39):
        weights = views.token_weights(delta, -0.7, 0.3, at)
        assert weights @ U == pytest.approx(state[at])
        assert not weights[at + 1 :].any()


def test_a_large_step_on_marks_keeps_the_last_one():
    figure = views.selective_view(U, [3, 20, 30], 5.0, 1e-4, -1.0, 25)
    title = figure.axes[2].get_title("left")
    assert title.startswith(
        "in the state after token 25: last marked token 1.00, marked ones before it 0.01"
    )
    all_read, marked = (line.get_xydata() for line in figure.axes[2].lines[:2])
    assert marked[:, 0].tolist() == [3, 20]  # the third has not been read yet
    assert all_read[all_read[:, 1].argmax()].tolist() == [20, pytest.approx(1, abs=0.01)]
    assert len(all_read) == 26
    constant = views.selective_view(U, [3, 20, 30], 0.3, 0.3, -1.0, 25)
    assert "last marked token 0.22" in constant.axes[2].get_title("left")  # exp(-5 * 0.3)


def test_before_the_first_mark_nothing_marked_is_in_the_state():
    title = views.selective_view(U, [30], 1.0, 0.1, -1.0, 10).axes[2].get_title("left")
    assert "last marked token 0.00, marked ones before it 0.00" in title


def test_memory_view_shows_the_image_where_the_scan_has_not_been():
    shape, length = (4, 6, 5), 120
    visits = token_order("forward", length, 4)
    time = torch.arange(1.0, length + 1)[:, None]
    memory = ScanMemory(shape, visits, torch.ones(length, 1, 1), time, torch.full((1, 1), -0.1))
    step = 2 * 30 + 3 * 5 + 2  # voxel (2, 3, 2)
    figure = views.memory_view(np.ones((8, 12, 10)), {"a": memory}, step)
    sagittal = figure.axes[1]
    assert sagittal.get_title() == "sagittal 2"
    left = np.ma.filled(sagittal.images[1].get_array(), np.nan).T  # (H, W)
    assert left[3, 2] == 0  # log10 of 1: the token itself
    assert np.isnan(left[3, 3])
    assert left[2, 2] == pytest.approx(np.log10(np.exp(-0.1 * 5)), abs=1e-5)
    assert len(sagittal.images) == 2


def test_influence_view_is_relative_to_the_largest_and_marks_the_voxel():
    field = np.full((6, 8, 7), 1e-9)
    field[2, 3, 4], field[2, 5, 4] = 0.5, 0.05
    figure = views.influence_view(np.zeros((6, 8, 7)), {"a": {"b": field}}, (2, 3, 4), "sagittal")
    shown = np.asarray(figure.axes[1].images[0].get_array()).T
    assert shown[3, 4] == 0
    assert shown[5, 4] == pytest.approx(-1)
    assert shown.min() == -views.FIELD_DECADES
    assert figure.axes[0].get_title() == "image, sagittal 2"


def test_a_mask_on_itself_is_perfect_and_a_thin_one_loses_dice_faster():
    for name in ("compact", "thin"):
        assert views.overlap(name, 0, 0, 0, 1.0) == {"dice": 1, "nsd": 1, "hd95": 0}
    compact, thin = (views.overlap(name, 4, 0, 0, 2.0) for name in ("compact", "thin"))
    assert thin["dice"] < compact["dice"] - 0.3
    assert abs(thin["hd95"] - compact["hd95"]) < 1
    assert views.overlap("thin", 0, 0, -2, 2.0)["dice"] == 0  # nothing is left of it


def test_a_mask_is_moved_by_its_voxels_and_none_is_lost():
    for mask in views.reference_masks().values():
        for right, front in ((views.REACH, -views.REACH), (-views.REACH, 0), (3, views.REACH)):
            there = views.moved(mask, right, front, 0)
            assert there.sum() == mask.sum()
            assert np.array_equal(np.roll(mask, (right, front), (0, 1)), there)


def test_axes_keep_their_place_when_a_figure_is_saved():
    """A stamped figure is laid out anew; these are for an explorer, too, where nothing may jump."""
    for figure in (views.overlap_view(4), views.selective_view(U, [3], 1.0, 0.1, -1.0, 10)):
        before = [axis.get_position().bounds for axis in figure.axes]
        figure.set_layout_engine("constrained", rect=(0, 0.1, 1, 0.9))
        FigureCanvasAgg(figure).draw()
        assert before == [axis.get_position().bounds for axis in figure.axes]
