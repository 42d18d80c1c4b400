"""The diagnostic task: what its volumes hold, and that nothing but the own cue tells a target's class."""

import dataclasses
import json

import numpy as np
import pytest

from srlib import data
from srlib.data import cue, scans
from srlib.data.cue import RECIPES, Recipe

NEAR, FAR = Recipe(4), Recipe(64)
VOLUMES = range(40)


@pytest.mark.parametrize("recipe", (RECIPES | cue.ALONG).values(), ids=RECIPES | cue.ALONG)
def test_each_target_has_its_cue_at_exactly_that_distance_in_its_row(recipe):
    volume = cue.make_volume(3, dataclasses.replace(recipe, noise=0.0))
    assert volume[0].shape == recipe.size
    image, label = (np.moveaxis(array, recipe.axis, 2) for array in volume)
    bright = {1: 200, 2: -200}
    for x, y, target, mark, value in zip(*cue.rows_of(3, recipe), strict=True):
        assert abs(target - mark) == recipe.distance
        assert set(np.unique(image[x, y])) == {0, 100, bright[value]}
        assert np.flatnonzero(label[x, y]).mean() == target
        assert np.flatnonzero(image[x, y] == bright[value]).mean() == mark
    assert np.unique(label, return_counts=True)[1].tolist() == [54864, 8 * 27, 8 * 27]


def test_every_volume_has_one_histogram_whatever_the_classes():
    """So no statistic of a whole map, such as InstanceNorm's, tells anything."""
    quiet = dataclasses.replace(FAR, noise=0.0)
    histograms = {
        tuple(np.unique(cue.make_volume(number, quiet)[0], return_counts=True)[1])
        for number in VOLUMES
    }
    assert histograms == {(8 * 45, 24 * 24 * 96 - 16 * (27 + 45), 16 * 27, 8 * 45)}


def test_a_volume_is_the_same_for_every_distance_but_for_the_cues():
    (near, labels), (far, same) = (cue.make_volume(7, recipe) for recipe in (NEAR, FAR))
    np.testing.assert_array_equal(labels, same)
    assert np.count_nonzero(near != far) <= 2 * 16 * 45
    np.testing.assert_array_equal(near[labels > 0], far[labels > 0])


def test_along_another_axis_it_is_the_same_volume_turned():
    image, label = cue.make_volume(7, Recipe(32))
    for axis in range(3):
        turned, labels = cue.make_volume(7, cue.ALONG[f"cue-032-axis{axis}"])
        np.testing.assert_array_equal(np.moveaxis(turned, axis, 2), image)
        np.testing.assert_array_equal(np.moveaxis(labels, axis, 2), label)
    assert cue.ALONG["cue-032-axis1"].size == (24, 96, 24)


def test_the_axis_names_other_data_and_leaves_the_names_of_the_first():
    """As records of runs have them."""
    assert cue.fingerprint(Recipe(64)) == "1a35b75c02b3f2df"
    assert len({cue.fingerprint(Recipe(64, axis=axis)) for axis in range(3)}) == 3
    assert data.get("cue-064-axis0").title.endswith("cue at 64 voxels along axis 0")
    assert "cue-064-axis0" not in data.CATALOG


def test_classes_are_balanced_at_either_end_and_independent_of_place():
    rows = [cue.rows_of(number, FAR) for number in range(400)]
    for row in rows[:20]:
        at_start = row.target < FAR.shape[2] / 2
        assert np.bincount(2 * at_start + row.value - 1).tolist() == [4] * 4
    place = np.stack([np.stack([r.x, r.y, r.target]) for r in rows]).swapaxes(0, 1).reshape(3, -1)
    value = np.concatenate([r.value for r in rows])
    for axis in place:
        assert abs(np.corrcoef(axis, value)[0, 1]) < 4 / np.sqrt(len(value))


def test_no_cue_of_a_target_at_the_same_end_lies_nearer_than_distance_less_zone():
    for number in VOLUMES:
        row = cue.rows_of(number, FAR)
        start = row.target < FAR.shape[2] / 2
        for same_end in (start, ~start):
            apart = np.abs(row.target[same_end, None] - row.cue[same_end])
            assert apart.min() > FAR.distance - FAR.zone


@pytest.mark.parametrize(("recipe", "expected"), [(NEAR, 1.0), (FAR, 0.5)])
def test_the_nearest_mark_helps_only_where_it_is_the_own_one(recipe, expected):
    assert cue.nearest_mark(recipe) == pytest.approx(expected, abs=0.05)


def test_preprocessing_keeps_the_marks_apart_from_noise_and_targets():
    """More than half a percent of the voxels are bright cues: `normalise` does not clip them away."""
    image, label = cue.make_volume(0, FAR)
    row, scores = cue.rows_of(0, FAR), scans.normalise(image)
    level = [scores[x, y, z] for x, y, z in zip(row.x, row.y, row.cue, strict=True)]
    target = scores[label > 0].mean()
    noise = scores[:, :, 40:50].std()
    for value, mark in zip(row.value, level, strict=True):
        assert mark > target + 3 * noise if value == 1 else mark < -3 * noise


def test_the_registry_builds_it_once_and_trains_on_one_split(tmp_path, monkeypatch):
    monkeypatch.setenv("SRLIB_CACHE", str(tmp_path))
    monkeypatch.setitem(cue.RECIPES, "cue-008", Recipe(8, volumes=3))
    monkeypatch.setattr(cue, "HELD_OUT", 1)
    data.open("cue-008").check()
    assert data.open("cue-008").split() == (("volume_001", "volume_002"), ("volume_003",))
    case = data.open("cue-008").load("volume_003")
    np.testing.assert_array_equal(case["label"][0], cue.make_volume(2, Recipe(8))[1])
    index = json.loads((data.open("cue-008").folder / "dataset.json").read_text())
    assert index["recipe"]["distance"] == 8
    assert data.open("cue-008").fingerprint != data.open("cue-016").fingerprint
    monkeypatch.setattr(cue, "make_volume", None)  # a second build would now fail
    assert len(data.open("cue-008").cases) == 3


def test_the_first_volume_is_the_one_published():
    """Pins the random stream: what changes it needs another version of the recipe."""
    row = cue.rows_of(0, NEAR)
    places = [83, 14, 14, 87, 87, 15, 5, 86, 81, 4, 80, 80, 13, 5, 91, 13]
    assert row.target.tolist() == places
    assert row.value.tolist() == [1, 2, 2, 2, 1, 2, 2, 2, 2, 1, 1, 2, 1, 1, 1, 1]
