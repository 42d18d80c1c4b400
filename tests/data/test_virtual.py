"""The virtual cohort: same everywhere, plausible, one-to-one maps, built once and whole."""

import dataclasses
import json
import socket
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from srlib.data import virtual
from srlib.data.virtual import RECIPE, Recipe

COARSE = Recipe(subjects=3, spacing=6.0, shape=(32, 38, 32))


@pytest.fixture(scope="module")
def subjects():
    return [virtual.make_subject(number, COARSE) for number in range(COARSE.subjects)]


def test_a_subject_is_a_function_of_recipe_and_number(subjects):
    for number in (2, 0):  # in another order than before, and of a larger cohort
        again = virtual.make_subject(number, dataclasses.replace(COARSE, subjects=9))
        for array, expected in zip(again, subjects[number], strict=True):
            np.testing.assert_array_equal(array, expected)


def test_first_subject_of_the_recipe_is_the_one_published():
    """Pins the random stream and the recipe; counts, since rounding may move single voxels."""
    image, label = virtual.make_subject(0, RECIPE)
    assert image.shape == label.shape == RECIPE.shape
    np.testing.assert_allclose(np.bincount(label.ravel()), [241732, 44130, 25434], rtol=1e-3)
    np.testing.assert_allclose(image.mean(), 132.546, rtol=1e-3)


def test_subjects_differ_in_anatomy_and_contrast(subjects):
    (image, label), (other_image, other_label), _ = subjects
    brain, other = label > 0, other_label > 0
    overlap = 2 * np.count_nonzero(brain & other) / (brain.sum() + other.sum())
    assert 0.7 < overlap < 0.97
    assert not np.array_equal(image, other_image)


def test_tissues_have_the_volume_and_the_order_of_brightness_of_a_t1_image(subjects):
    for image, label in subjects:
        grey, white = (np.count_nonzero(label == k) * COARSE.spacing**3 / 1e6 for k in (1, 2))
        assert 0.8 < grey < 1.6  # litres
        assert 0.35 < white < 0.9
        air, grey_level, white_level = (np.median(image[label == k]) for k in (0, 1, 2))
        assert 4 * air < grey_level < white_level


def test_brains_lie_inside_of_the_grid(subjects):
    inside = (slice(1, -1),) * 3
    for _, label in subjects:
        assert np.count_nonzero(label[inside]) == np.count_nonzero(label)


def test_deformations_are_one_to_one():
    for number in range(6):
        points = virtual.deformation(np.random.default_rng([RECIPE.seed, number]), RECIPE)
        jacobian = np.array([np.gradient(axis, RECIPE.spacing) for axis in points])
        assert np.linalg.det(np.moveaxis(jacobian, (0, 1), (-2, -1))).min() > 0


def test_fingerprint_is_of_the_recipe(monkeypatch):
    assert virtual.fingerprint(COARSE) == virtual.fingerprint(dataclasses.replace(COARSE))
    changed = [dataclasses.replace(COARSE, noise=(0.0, 0.1)), dataclasses.replace(COARSE, seed=1)]
    assert len({virtual.fingerprint(recipe) for recipe in (COARSE, RECIPE, *changed)}) == 4
    monkeypatch.setattr(virtual, "files", None)  # the template is not read again
    virtual.fingerprint(RECIPE)


def test_build_writes_the_decathlons_layout_without_a_network(tmp_path, monkeypatch, subjects):
    def no_network(*args, **kwargs):
        raise AssertionError("the cohort must not open a socket")

    monkeypatch.setattr(socket, "socket", no_network)
    folder = virtual.build(tmp_path / "cohort", COARSE)
    index = json.loads((folder / "dataset.json").read_text())
    assert list(index["labels"].values()) == ["background", *virtual.CLASSES]
    assert len(index["training"]) == 3
    for item, arrays in zip(index["training"], subjects, strict=True):
        for kind, expected in zip(("image", "label"), arrays, strict=True):
            nifti = nib.load(folder / item[kind])
            np.testing.assert_array_equal(np.asarray(nifti.dataobj), expected)
            np.testing.assert_array_equal(nifti.affine, virtual.grid_affine(COARSE))
            assert nib.aff2axcodes(nifti.affine) == ("R", "A", "S")


def test_build_happens_once_and_leaves_nothing_when_it_fails(tmp_path, monkeypatch):
    folder = tmp_path / "cache" / "cohort"

    def broken(number, recipe):
        if number == 1:
            raise OSError("no space left on device")
        return np.ones((2, 2, 2), np.int16), np.ones((2, 2, 2), np.uint8)

    monkeypatch.setattr(virtual, "make_subject", broken)
    with pytest.raises(OSError, match="no space"):
        virtual.build(folder, COARSE)
    assert list(folder.parent.iterdir()) == []

    one = dataclasses.replace(COARSE, subjects=1)
    virtual.build(folder, one)
    monkeypatch.setattr(virtual, "make_subject", None)  # a second build would now fail
    assert virtual.build(folder, one) == folder


def test_the_slower_of_two_builds_takes_the_other_ones_result(tmp_path, monkeypatch):
    folder = tmp_path / "cohort"

    def overtaken(partial: Path, recipe: Recipe) -> None:
        (partial / "dataset.json").write_text("slower")
        folder.mkdir()
        (folder / "dataset.json").write_text("faster")

    monkeypatch.setattr(virtual, "_write", overtaken)
    assert virtual.build(folder, COARSE) == folder
    assert (folder / "dataset.json").read_text() == "faster"
    assert list(tmp_path.iterdir()) == [folder]
