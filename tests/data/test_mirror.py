"""The half-real diagnostic task: what its volumes hold, and that nothing but the own mark tells a convention."""

import dataclasses

import numpy as np
import pytest

from srlib import data
from srlib.data import catalog, mirror, virtual
from srlib.data.mirror import RECIPES, Recipe

QUIET = dataclasses.replace(Recipe(48), noise=0.0)


def made_up_crop(seed: int) -> mirror.Crop:
    """Noise with a body of two parts in it, one behind the other along the second axis."""
    rng = np.random.default_rng(seed)
    size = rng.integers((16, 22, 13), (23, 31, 25))
    labels = np.zeros(size, np.uint8)
    labels[4:-4, 4:11, 2:-3] = 2
    labels[4:-4, 11:-4, 2:-3] = 1
    return rng.uniform(-2, 3, size), labels


CROPS = [made_up_crop(seed) for seed in range(9)]


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_each_crop_has_its_mark_at_exactly_that_distance_in_its_lane(recipe):
    image, label = mirror.make_volume(3, dataclasses.replace(recipe, noise=0.0), CROPS)
    lanes = mirror.lanes_of(3, recipe, len(CROPS))
    assert image.shape == label.shape == recipe.size
    for lane, (crop, first_end, bright) in enumerate(zip(*lanes, strict=True)):
        x, y = divmod(lane, 2)
        there = slice(24 * x, 24 * (x + 1)), slice(32 * y, 32 * (y + 1))
        part, marks = label[there], np.abs(image[there]) == 400
        value = 400 if bright else -400
        assert np.unique(image[there][marks]).tolist() == [value]
        assert marks.sum() == np.prod(recipe.mark)
        body, mark = (np.flatnonzero(of.any(axis=(0, 1))) for of in (part, marks))
        assert first_end == (body[0] < mark[0])
        gap = mark[0] - body[-1] if first_end else body[0] - mark[-1]
        assert gap == recipe.distance
        anatomy = CROPS[crop][1]
        same = np.bincount(part.ravel(), minlength=3)[[1, 2]]
        parts = np.bincount(anatomy.ravel(), minlength=3)[[1, 2] if bright else [2, 1]]
        assert same.tolist() == parts.tolist()


def test_a_volume_has_one_histogram_whatever_the_conventions(monkeypatch):
    """So no statistic of a whole map, such as InstanceNorm's, tells anything."""
    image, label = mirror.make_volume(5, QUIET, CROPS)
    noise, lanes = mirror._draw(5, QUIET, len(CROPS))
    swapped = lanes._replace(bright=~lanes.bright)
    monkeypatch.setattr(mirror, "_draw", lambda *_: (noise, swapped))
    other, labels = mirror.make_volume(5, QUIET, CROPS)
    np.testing.assert_array_equal(np.sort(image, axis=None), np.sort(other, axis=None))
    np.testing.assert_array_equal(labels, np.array([0, 2, 1])[label])
    assert np.count_nonzero(image != other) == 4 * np.prod(QUIET.mark)


def test_either_end_has_one_crop_of_each_convention():
    lanes = [mirror.lanes_of(number, QUIET, 9) for number in range(400)]
    for lane in lanes[:40]:
        assert np.bincount(2 * lane.first_end + lane.bright).tolist() == [1] * 4
        assert len(set(lane.crop)) == 4
    bright = np.stack([lane.bright for lane in lanes]).mean(axis=0)
    assert np.abs(bright - 0.5).max() < 0.1  # in no lane more often than in another


@pytest.mark.parametrize(("distance", "least", "most"), [(8, 0.95, 1.0), (48, 0.3, 0.6)])
def test_the_nearest_mark_helps_only_where_it_is_the_own_one(distance, least, most):
    recipe, right = dataclasses.replace(Recipe(distance), noise=0.0), []
    for number in range(30):
        image, label = mirror.make_volume(number, recipe, CROPS)
        marks = np.argwhere(np.abs(image) == 400)
        for lane, bright in enumerate(mirror.lanes_of(number, recipe, len(CROPS)).bright):
            x, y = np.multiply(divmod(lane, 2), recipe.lane)
            body = label.copy()
            body[:x], body[x + 24 :], body[:, :y], body[:, y + 32 :] = 0, 0, 0, 0
            apart = np.linalg.norm(marks - np.argwhere(body).mean(axis=0), axis=1)
            right.append((image[tuple(marks[apart.argmin()])] > 0) == bright)
    assert least <= np.mean(right) <= most


def test_voxels_twice_as_large_hold_means_and_the_most_frequent_label():
    scores, labels = np.arange(8.0).reshape(2, 2, 2), np.zeros((2, 2, 2))
    labels[0], labels[1, 0, 0] = 2, 1
    assert [part.item() for part in mirror.halve(scores, labels)] == [3.5, 2]
    assert mirror.halve(np.ones((5, 4, 3)), np.ones((5, 4, 3)))[1].tolist() == [[[1] * 2] * 2] * 3


def test_it_is_built_from_hippocampus_once(tmp_path, monkeypatch):
    monkeypatch.setenv("SRLIB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(catalog, "data_roots", lambda: [tmp_path / "data"])
    with pytest.raises(FileNotFoundError, match=r"made from Hippocampus: .*data get hippocampus"):
        data.open("mirror-024")
    cases = [(np.round(100 * image), labels) for image, labels in map(made_up_crop, range(20))]
    folder = tmp_path / "data" / "Task04_Hippocampus"
    folder.mkdir(parents=True)
    about = ("case_{:02d}", cases, ("anterior", "posterior"), np.eye(4), {"modality": {"0": "MRI"}})
    virtual.write_task(folder, *about)
    monkeypatch.setitem(mirror.RECIPES, "mirror-024", Recipe(24, volumes=3))
    monkeypatch.setattr(mirror, "HELD_OUT", 1)
    built = data.open("mirror-024")
    built.check()
    assert built.split() == (("volume_001", "volume_002"), ("volume_003",))
    source = data.open("hippocampus")
    held_out = [mirror._crop(source, case) for case in source.split(mirror.FOLD).test]
    image, label = mirror.make_volume(2, Recipe(24, volumes=3), held_out)
    case = built.load("volume_003")
    np.testing.assert_array_equal(case["label"][0], label)
    np.testing.assert_allclose(case["image"][0], image / 100, rtol=1e-6)
    assert "mirror-024" not in data.CATALOG
    assert data.get("mirror-024").licence == data.get("hippocampus").licence == "CC BY-SA 4.0"
