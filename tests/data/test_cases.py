"""Data sets: finding, folds, checks, preprocessing, samples, download. Faults are written here."""

import dataclasses
import hashlib
import io
import json
import os
import socket
import tarfile
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch
from monai import transforms
from monai.apps import DecathlonDataset
from safetensors.torch import load_file
from scipy.ndimage import affine_transform

from srlib import data
from srlib.data import cases, catalog, samples, scans, virtual
from srlib.files import data_roots

PATCH = (16, 24, 20)


def _real_data() -> bool:
    return any((root / "Task04_Hippocampus" / "dataset.json").is_file() for root in data_roots())


real_data = pytest.mark.skipif(not _real_data(), reason="no Task04_Hippocampus in $SRLIB_DATA")


def write_image(path: Path, array, affine=None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, np.eye(4) if affine is None else affine), path)


def write_task(folder: Path, cases: int = 5, shape=(15, 22, 18)) -> Path:
    """A tiny task in the Decathlon's layout: a bright box on noise, its halves the two classes."""
    random = np.random.default_rng(0)
    training = []
    for number in range(cases):
        label = np.zeros(shape, np.uint8)
        label[4:10, 5 : 9 + number, 6:12] = 1
        label[4:10, 9 + number : 16, 6:12] = 2
        image = (100.0 * (label > 0) + random.normal(50, 5, shape)) * 10**number
        item = {kind: f"./{kind}sTr/case_{number}.nii.gz" for kind in ("image", "label")}
        write_image(folder / item["image"], image.astype(np.float32))
        write_image(folder / item["label"], label)
        training.append(item)
    index = {"labels": {"0": "background", "1": "Anterior", "2": "Posterior"}, "training": training}
    (folder / "dataset.json").write_text(json.dumps(index))
    return folder


@pytest.fixture
def places(tmp_path, monkeypatch) -> Path:
    """An empty data root and an empty cache; returns the folder that holds both."""
    monkeypatch.setenv("SRLIB_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("SRLIB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(catalog, "data_roots", lambda: [tmp_path / "data"])  # not the user's
    return tmp_path


@pytest.fixture
def task(places) -> Path:
    """A tiny `hippocampus` data set; returns its folder."""
    return write_task(places / "data" / "Task04_Hippocampus")


# --- Registry, finding, folds ---------------------------------------------------------------------


def test_entries_are_whole():
    for name, entry in catalog.KNOWN.items():
        assert data.get(name) is entry
        assert entry.name == name
        assert entry.in_channels == len(entry.normalisation)
        assert entry.out_channels == len(entry.classes) + (name != "brats")
        assert entry.nsd_tolerance == max(entry.spacing)
        assert set(entry.flip_axes) <= {0, 1, 2}
        assert entry.virtual == ("virtual" in entry.title.lower())
        assert all((entry.licence, entry.citation, entry.source, entry.how_to_get))


def test_an_unknown_data_set_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="'spine'; choose from mni152, hippocampus"):
        data.get("spine")


def test_a_missing_data_set_says_where_it_was_looked_for_and_how_to_get_it(places):
    with pytest.raises(FileNotFoundError) as caught:
        data.open("hippocampus")
    assert str(places / "data" / "Task04_Hippocampus") in str(caught.value)
    assert "python -m srlib data get hippocampus" in str(caught.value)


def test_present_are_data_sets_with_files(task):
    assert data.present() == ["hippocampus"]


def test_the_first_data_root_wins(task, places, monkeypatch):
    other = write_task(places / "other" / "Task04_Hippocampus")
    roots = [places / "empty", other.parent, task.parent]
    monkeypatch.setattr(catalog, "data_roots", lambda: roots)
    assert data.open("hippocampus").folder == other


@pytest.mark.parametrize("text", ["", "[]", '{"training": []}', '{"training": [{"image": "a"}]}'])
def test_a_broken_index_names_the_file(task, text):
    (task / "dataset.json").write_text(text)
    with pytest.raises(data.DataError, match=r"Task04_Hippocampus/dataset\.json"):
        data.open("hippocampus")


def test_a_case_listed_twice_is_refused(task):
    index = json.loads((task / "dataset.json").read_text())
    index["training"].append(index["training"][0])
    (task / "dataset.json").write_text(json.dumps(index))
    with pytest.raises(data.DataError, match="two of one name"):
        data.open("hippocampus")


def of_cases(name, ids) -> data.Dataset:
    """A data set of which only the cases' names are there."""
    dataset = object.__new__(data.Dataset)
    dataset.entry, dataset._by_id = data.get(name), dict.fromkeys(ids)
    return dataset


def test_folds_deal_out_all_cases_by_a_rule_that_stays():
    ids = [f"case_{number:03d}" for number in range(260)]
    hippocampus = of_cases("hippocampus", ids)
    folds = [hippocampus.split(fold) for fold in range(5)]
    assert sorted(i for fold in folds for i in fold.test) == ids
    for fold in folds:
        assert len(fold.test) == 52
        assert sorted((*fold.train, *fold.test)) == ids
    assert folds[0].test[:4] == ("case_002", "case_003", "case_004", "case_009")
    for wrong in (5, -1, "0"):
        with pytest.raises(ValueError, match=r"folds \[0, 1, 2, 3, 4\]"):
            hippocampus.split(wrong)


def test_the_virtual_cohort_has_one_split():
    ids = [f"virtual_{number:02d}" for number in range(1, 33)]
    cohort = of_cases("mni152", ids)
    assert cohort.split() == (tuple(ids[:24]), tuple(ids[24:]))
    with pytest.raises(ValueError, match=r"folds \[0\], got 1"):
        cohort.split(1)


def test_the_virtual_cohort_goes_the_same_way_as_files(places, monkeypatch):
    recipe = virtual.Recipe(subjects=2, spacing=6.0, shape=(32, 38, 32))
    monkeypatch.setattr(virtual, "RECIPE", recipe)
    data.open("mni152").check()
    assert data.open("mni152").fingerprint == virtual.fingerprint(recipe)
    assert [case.id for case in data.open("mni152").cases] == ["virtual_01", "virtual_02"]
    case = data.open("mni152").load("virtual_02")
    assert case["image"].shape == case["label"].shape == (1, 63, 75, 63)  # 6 mm files, 3 mm grid
    assert case["label"].unique().tolist() == [0, 1, 2]


# --- Checks ---------------------------------------------------------------------------------------


def _rewrite(path: Path, change) -> None:
    nifti = nib.load(path)
    array = np.asarray(nifti.dataobj).copy()
    write_image(path, *change(array, nifti.affine))


def _put(value, kind=None):
    def change(array, affine):
        array = array.astype(kind or array.dtype)
        array[1, 2, 3] = value
        return array, affine

    return change


FAULTS = {
    "missing": ("image", lambda path: path.unlink(), "no such file"),
    "truncated": ("image", lambda p: p.write_bytes(p.read_bytes()[:2000]), "cannot be read"),
    "not gzip": ("label", lambda path: path.write_bytes(b"no image" * 99), "cannot be read"),
    "empty file": ("label", lambda path: path.write_bytes(b""), "cannot be read"),
    "2D": ("label", lambda p: _rewrite(p, lambda a, m: (a[0], m)), "expected 3 dimensions"),
    "4D": (
        "image",
        lambda p: _rewrite(p, lambda a, m: (np.stack([a, a], -1), m)),
        "expected 3 dimensions",
    ),
    "shape": ("label", lambda p: _rewrite(p, lambda a, m: (a[1:], m)), "its shape is (14, 22, 18)"),
    "affine": ("label", lambda p: _rewrite(p, lambda a, m: (a, np.diag([2, 1, 1, 1]))), "affine"),
    "NaN": ("image", lambda p: _rewrite(p, _put(np.nan)), "1 voxels are NaN or infinite"),
    "infinite": ("image", lambda p: _rewrite(p, _put(np.inf)), "1 voxels are NaN or infinite"),
    "constant": ("image", lambda p: _rewrite(p, lambda a, m: (0 * a, m)), "the same value"),
    "label": ("label", lambda p: _rewrite(p, _put(7)), "[7]; expected 0 background, 1 anterior"),
    "fraction": ("label", lambda p: _rewrite(p, _put(0.5, np.float32)), "label values [0.5]"),
    "NaN label": ("label", lambda p: _rewrite(p, _put(np.nan, np.float32)), "NaN or infinite"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_check_names_the_bad_file_and_what_is_wrong(task, fault):
    kind, spoil, message = FAULTS[fault]
    path = task / f"{kind}sTr" / "case_1.nii.gz"
    spoil(path)
    with pytest.raises(data.DataError) as caught:
        data.open("hippocampus").check()
    lines = str(caught.value).splitlines()[1:]
    assert any(line.startswith(f"{path}:") and message in line for line in lines)
    assert all("case_1" in line for line in lines)


def test_a_singular_affine_is_a_fault(task):
    for kind in ("image", "label"):
        path = task / f"{kind}sTr" / "case_1.nii.gz"
        nifti = nib.load(path)
        nifti.header["sform_code"], nifti.header["qform_code"] = 1, 0
        for row in ("srow_x", "srow_y", "srow_z"):
            nifti.header[row] = 0
        raw = nib.Nifti1Image(np.asarray(nifti.dataobj), None, nifti.header)
        nib.save(raw, path)
    with pytest.raises(data.DataError, match="singular"):
        data.open("hippocampus").check()


def test_one_error_lists_every_bad_file(task):
    for number in (0, 2, 4):
        _rewrite(task / "labelsTr" / f"case_{number}.nii.gz", _put(9))
    (task / "imagesTr" / "case_3.nii.gz").unlink()
    with pytest.raises(data.DataError) as caught:
        data.open("hippocampus").check()
    first, *lines = str(caught.value).splitlines()
    assert "4 fault(s)" in first
    assert [next(n for n in range(5) if f"case_{n}" in line) for line in lines] == [0, 2, 3, 4]


def _no_reading(*args):
    raise AssertionError("read again")


def test_success_is_remembered_until_a_file_changes(task, monkeypatch):
    data.open("hippocampus").check()
    with monkeypatch.context() as patch:
        patch.setattr(scans, "read", _no_reading)
        data.open("hippocampus").check()
    _rewrite(task / "labelsTr" / "case_0.nii.gz", _put(9))
    for _ in range(2):  # a failure is never remembered
        with pytest.raises(data.DataError, match="case_0"):
            data.open("hippocampus").check()


def test_float_labels_with_whole_values_are_accepted(task):
    _rewrite(task / "labelsTr" / "case_0.nii.gz", lambda a, m: (a.astype(np.float32), m))
    data.open("hippocampus").check()
    assert data.open("hippocampus").load("case_0")["label"].dtype == torch.int64


def test_fingerprint_is_of_the_voxels_not_of_the_files(task, monkeypatch):
    before = data.open("hippocampus").fingerprint
    for path in task.glob("*Tr/*.nii.gz"):  # other bytes, same voxels
        nifti = nib.load(path)
        nifti.header["descrip"] = b"copied"
        nib.save(nib.Nifti1Image(np.asarray(nifti.dataobj), nifti.affine, nifti.header), path)
    assert data.open("hippocampus").fingerprint == before
    with monkeypatch.context() as patch:
        patch.setattr(scans, "read", _no_reading)
        assert data.open("hippocampus").fingerprint == before
    _rewrite(task / "imagesTr" / "case_0.nii.gz", _put(0))
    assert data.open("hippocampus").fingerprint != before


def test_summary_has_sizes_intensities_and_volumes(task, monkeypatch):
    path = task / "imagesTr" / "case_2.nii.gz"
    for file in (path, task / "labelsTr" / path.name):
        _rewrite(file, lambda array, _: (array, np.diag([2, 1, 0.5, 1])))
    table = data.open("hippocampus").summary().set_index("case")
    assert table.index.tolist() == [case.id for case in data.open("hippocampus").cases]
    row = table.loc["case_2"]
    assert row[["voxels_x", "voxels_y", "voxels_z"]].tolist() == [15, 22, 18]
    assert row[["spacing_x_mm", "spacing_y_mm", "spacing_z_mm"]].tolist() == [2, 1, 0.5]
    assert row["anterior (ml)"] == pytest.approx(6 * 6 * 6 / 1000)
    assert row["posterior (ml)"] == pytest.approx(6 * 5 * 6 / 1000)
    assert row["intensity_max"] == pytest.approx(nib.load(path).get_fdata().max(), rel=1e-6)
    monkeypatch.setattr(scans, "read", _no_reading)
    assert data.open("hippocampus").summary().set_index("case").equals(table)


# --- Preprocessing --------------------------------------------------------------------------------


def test_normalise_knows_no_unit_and_no_outlier():
    random = np.random.default_rng(0)
    image = random.gamma(2, size=(20, 30, 25)).astype(np.float32)
    scores = scans.normalise(image)
    assert scores.dtype == np.float32
    assert abs(scores.mean()) < 1e-6
    assert abs(scores.std() - 1) < 1e-6
    np.testing.assert_allclose(scans.normalise(1e6 * image + 7), scores, atol=1e-4)
    image[0, 0, 0] = 1e9
    np.testing.assert_allclose(scans.normalise(image)[1:], scores[1:], atol=1e-2)
    assert not scans.normalise(np.full((3, 3, 3), 5)).any()


def test_load_case_gives_normalised_tensors_on_the_files_grid(task):
    case = data.open("hippocampus").load("case_3")
    label = np.asarray(nib.load(task / "labelsTr" / "case_3.nii.gz").dataobj)
    image = np.asarray(nib.load(task / "imagesTr" / "case_3.nii.gz").dataobj)
    assert case["id"] == "case_3"
    assert case["spacing"] == (1.0, 1.0, 1.0)
    assert case["image"].dtype == torch.float32
    assert type(case["image"]) is torch.Tensor
    np.testing.assert_array_equal(case["label"][0], label)
    np.testing.assert_array_equal(case["image"][0], scans.normalise(image))
    np.testing.assert_array_equal(case["affine"], np.eye(4))
    with pytest.raises(ValueError, match="no case 'case_9'"):
        data.open("hippocampus").load("case_9")


def test_load_case_turns_and_resamples_to_the_working_grid(task):
    expected = data.open("hippocampus").load("case_0")
    shape = np.array(expected["label"].shape[1:])
    for kind in ("image", "label"):  # same place in the world: first axis to the left, second last
        path = task / f"{kind}sTr" / "case_0.nii.gz"
        affine = np.array([[-1, 0, 0, shape[0] - 1], [0, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 1.0]])
        _rewrite(path, lambda array, _, m=affine: (array[::-1].swapaxes(1, 2), m))
    turned = data.open("hippocampus").load("case_0")
    for key in ("image", "label", "affine"):
        torch.testing.assert_close(turned[key], expected[key], rtol=0, atol=1e-6)

    for kind in ("image", "label"):
        path = task / f"{kind}sTr" / "case_1.nii.gz"
        _rewrite(path, lambda array, _: (array, np.diag([2.0, 1, 1, 1])))
    stretched = data.open("hippocampus").load("case_1")
    assert stretched["spacing"] == (1.0, 1.0, 1.0)
    assert stretched["label"].shape[2:] == (22, 18)
    assert stretched["label"].shape[1] in (29, 30)
    volume = np.count_nonzero(nib.load(task / "labelsTr" / "case_1.nii.gz").dataobj) * 2
    assert torch.count_nonzero(stretched["label"]) == pytest.approx(volume, rel=0.1)


def test_a_case_is_preprocessed_once_and_again_when_its_file_changed(task, places, monkeypatch):
    data.open("hippocampus").load("case_0")
    files = list((places / "cache" / "cases").rglob("*.safetensors"))
    assert len(files) == 1
    assert set(load_file(files[0])) == {"image", "label", "affine"}
    with monkeypatch.context() as patch:
        patch.setattr(scans, "prepare", _no_reading)
        data.open("hippocampus").load("case_0")
    _rewrite(task / "labelsTr" / "case_0.nii.gz", _put(2))
    assert data.open("hippocampus").load("case_0")["label"][0, 1, 2, 3] == 2


def test_what_is_cached_is_made_again_for_another_recipe(task, monkeypatch):
    data.open("hippocampus").load("case_0")
    monkeypatch.setattr(cases, "RECIPE", 0)
    monkeypatch.setattr(scans, "prepare", _no_reading)
    with pytest.raises(AssertionError, match="read again"):
        data.open("hippocampus").load("case_0")


def test_preprocessing_does_not_depend_on_the_number_of_threads(task, places, monkeypatch):
    threads = torch.get_num_threads()
    results = []
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            monkeypatch.setenv("SRLIB_CACHE", str(places / f"cache-{number}"))
            results.append(data.open("hippocampus").load("case_4")["image"])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*results)


# --- Samples --------------------------------------------------------------------------------------


def _samples(steps=4, seed=1, cases=3, **options) -> data.TrainingSamples:
    ids = [f"case_{number}" for number in range(cases)]
    options.setdefault("patch_size", PATCH)
    return data.TrainingSamples(
        data.open("hippocampus"), ids, batch_size=2, steps=steps, seed=seed, **options
    )


def _equal(one, other) -> bool:
    return all(torch.equal(one[key], other[key]) for key in ("image", "label"))


def test_a_sample_is_a_function_of_seed_step_and_index(task):
    samples = list(_samples())
    assert len(samples) == 8
    for sample in samples:
        assert sample["image"].shape == sample["label"].shape == (1, *PATCH)
        assert (sample["image"].dtype, sample["label"].dtype) == (torch.float32, torch.int64)
        assert type(sample["image"]) is type(sample["label"]) is torch.Tensor
    again = _samples()
    assert all(_equal(again[item], samples[item]) for item in (5, 0, 7, 5))
    resumed = _samples(steps=2, first_step=2)
    assert all(_equal(resumed[item], samples[4 + item]) for item in range(4))
    pairs = [(a, b) for a in range(8) for b in range(a)]
    assert not any(_equal(samples[a], samples[b]) for a, b in pairs)
    assert not any(_equal(a, b) for a, b in zip(_samples(seed=2), samples, strict=True))


def test_samples_are_the_same_from_worker_processes(task):
    direct = list(_samples())
    loader = torch.utils.data.DataLoader(_samples(), batch_size=None, num_workers=2)
    assert all(_equal(a, b) for a, b in zip(loader, direct, strict=True))


def test_random_numbers_elsewhere_neither_change_samples_nor_are_changed(task):
    np.random.seed(3)  # noqa: NPY002 - the state that must stay as it is
    torch.manual_seed(3)
    states = np.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002
    first = list(_samples())
    assert np.array_equal(states[0], np.random.get_state()[1])  # noqa: NPY002
    assert torch.equal(states[1], torch.get_rng_state())
    torch.manual_seed(99)
    assert all(_equal(a, b) for a, b in zip(_samples(), first, strict=True))


def test_every_case_comes_once_before_any_comes_again(task):
    cases = [data.open("hippocampus").load(f"case_{number}") for number in range(5)]
    sizes = [int((case["label"] == 1).sum()) for case in cases]  # tells the cases apart
    large = _samples(steps=10, cases=5, patch_size=(24, 24, 24), augment=False)
    seen = [sizes.index(int((sample["label"] == 1).sum())) for sample in large]
    for epoch in range(4):
        assert sorted(seen[5 * epoch : 5 * epoch + 5]) == [0, 1, 2, 3, 4]
    assert seen[:5] != seen[5:10]


def test_plain_samples_are_crops_or_lie_whole_in_the_patch(task):
    cases = [data.open("hippocampus").load(f"case_{number}") for number in range(3)]
    places = set()
    for sample in _samples(steps=10, patch_size=(24, 30, 20), augment=False):
        filled = torch.nonzero(sample["image"][0])
        start, stop = filled.min(0).values, filled.max(0).values + 1
        box = tuple(slice(a, b) for a, b in zip(start, stop, strict=True))
        assert any(torch.equal(sample["image"][0][box], case["image"][0]) for case in cases)
        places.add(tuple(start.tolist()))
    assert len(places) > 5

    crops = _samples(steps=10, patch_size=(8, 8, 8), augment=False)
    windows = [case["image"][0].unfold(0, 8, 1).unfold(1, 8, 1).unfold(2, 8, 1) for case in cases]
    foreground = 0
    for sample in crops:
        assert any((w == sample["image"][0]).flatten(3).all(-1).any() for w in windows)
        foreground += bool(sample["label"].any())
    assert foreground >= 14  # of 20: two of three are centred on a labelled voxel


def test_augmentation_keeps_image_and_label_together(task):
    for number in range(3):
        path = task / "labelsTr" / f"case_{number}.nii.gz"
        label = np.asarray(nib.load(path).dataobj)
        write_image(task / "imagesTr" / path.name, (label > 0).astype(np.float32))
    changed = 0
    for sample in _samples(steps=20, patch_size=(24, 30, 24)):
        inside = sample["label"] > 0
        bright = sample["image"] > (sample["image"].max() + sample["image"].min()) / 2
        dice = 2 * (bright & inside).sum() / (bright.sum() + inside.sum())
        assert dice > 0.85
        changed += int(inside.sum()) != 6 * 11 * 6
    assert 10 <= changed < 40


def test_mirroring_happens_only_where_the_entry_allows_it(task, monkeypatch):
    ramp = np.broadcast_to(np.arange(15)[:, None, None], (15, 22, 18))
    for number in range(3):
        write_image(task / "imagesTr" / f"case_{number}.nii.gz", ramp.astype(np.float32))
        write_image(task / "labelsTr" / f"case_{number}.nii.gz", (ramp > 7).astype(np.uint8))

    def directions() -> set[bool]:
        samples = _samples(steps=10, patch_size=(15, 8, 8))
        for sample in samples:  # the label goes with the image
            image, label = sample["image"], sample["label"]
            assert image[label == 1].mean() > image[label == 0].mean()
        return {bool(s["image"][0, -4:].mean() > s["image"][0, :4].mean()) for s in samples}

    assert data.get("hippocampus").flip_axes == ()
    assert directions() == {True}
    mirrored = dataclasses.replace(data.get("hippocampus"), flip_axes=(0,))
    monkeypatch.setitem(data.CATALOG, "hippocampus", mirrored)
    assert directions() == {True, False}


def test_turned_patch_is_the_affine_map_it_says():
    """Against SciPy: output voxel x comes from middle + R S (x - centre of the patch)."""
    random = np.random.default_rng(0)
    label = (random.random((17, 23, 19)) > 0.5).astype(np.uint8)
    image = random.normal(size=label.shape).astype(np.float32)
    corner, patch, angles, factors = np.array([3, -2, 1]), (12, 18, 14), (9, -13, 5), (0.9, 1.1, 1)
    x, y, z = np.deg2rad(angles)
    about_x = [[1, 0, 0], [0, np.cos(x), -np.sin(x)], [0, np.sin(x), np.cos(x)]]
    about_y = [[np.cos(y), 0, np.sin(y)], [0, 1, 0], [-np.sin(y), 0, np.cos(y)]]
    about_z = [[np.cos(z), -np.sin(z), 0], [np.sin(z), np.cos(z), 0], [0, 0, 1]]
    linear = np.array(about_x) @ about_y @ about_z @ np.diag(factors)
    drawn = iter([*angles, *factors])  # degrees about each axis, then the factors
    random = SimpleNamespace(uniform=lambda low, high: next(drawn))
    np.testing.assert_allclose(samples._turn(random, (3, 3, 3)), linear, atol=1e-6)
    drawn, to_voxels = iter([*angles, *factors]), np.diag([1 / 0.7, 1 / 0.7, 1 / 5])
    of_mm = to_voxels @ linear @ np.linalg.inv(to_voxels)
    np.testing.assert_allclose(samples._turn(random, (0.7, 0.7, 5)), of_mm, atol=1e-6)
    image, label = torch.from_numpy(image)[None], torch.from_numpy(label)[None]
    turned, labels = samples._turned_patch(image, label, corner, patch, linear)
    half = (np.array(patch) - 1) / 2
    offset = corner + half - linear @ half
    options = {"offset": offset, "output_shape": patch, "mode": "grid-constant"}
    expected = affine_transform(image[0], linear, order=1, **options)
    np.testing.assert_allclose(turned[0], expected, atol=2e-5)
    nearest = affine_transform(label[0], linear, order=0, **options)
    assert np.mean(labels[0].numpy() != nearest) < 2e-3  # ties at rounding

    plain = samples._turned_patch(image, label, corner, patch, np.eye(3))
    expected = samples._patch(image, corner, patch)
    torch.testing.assert_close(plain[0], expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("augmentation", "changes", "least"),
    [
        (
            samples.OURS,
            [
                transforms.RandScaleIntensityd("image", factors=0.15, prob=0.5),
                transforms.RandShiftIntensityd("image", offsets=0.15, prob=0.5),
                transforms.RandAdjustContrastd("image", gamma=(0.7, 1.5), prob=0.3),
                transforms.RandGaussianNoised("image", std=0.1, prob=0.3),
            ],
            9,
        ),
        (
            samples.AUTHORS,
            [
                transforms.RandScaleIntensityd("image", factors=0.1, prob=1.0),
                transforms.RandShiftIntensityd("image", offsets=0.1, prob=1.0),
            ],
            1,
        ),
    ],
    ids=["ours", "the authors'"],
)
def test_intensities_change_as_monais_random_transforms_change_them(augmentation, changes, least):
    intensity = transforms.Compose(changes)
    image, patch = torch.randn(2, 9, 8, 7), (9, 8, 7)
    prepared = samples._Prepared(image, torch.zeros(1, 9, 8, 7), np.array([]))
    combinations = set()
    for seed in range(60):
        monais, ours = (np.random.RandomState(seed) for _ in range(2))
        samples._corner(prepared, patch, monais)
        turned = monais.rand() < augmentation.turned
        draw = samples._draw(
            prepared, patch, (), (1, 1, 1), augmentation, ours, np.random.RandomState(0)
        )
        combinations.add(tuple(draw.changes))
        if not turned:
            intensity.set_random_state(state=monais)
            expected = intensity({"image": image})["image"].as_tensor()
            assert torch.equal(samples._make(prepared, draw, patch)[0], expected)
    assert len(combinations) >= least


def test_samples_of_cases_that_stay_are_those_of_cases_that_are_read(task, monkeypatch):
    read, staying = _samples(steps=8), _samples(steps=8, device=torch.device("cpu"))
    assert read.staying is None
    assert len(staying.staying) == 3
    assert all(_equal(a, b) for a, b in zip(staying, read, strict=True))
    monkeypatch.setattr(samples, "STAYING", 100)  # too little for them
    many = _samples(steps=8, device=torch.device("cpu"))
    assert many.staying is None
    assert _equal(many[3], read[3])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: nothing is made there")
def test_a_gpu_makes_the_samples_of_the_cpu(task, monkeypatch):
    """Within what interpolation rounds; the noise, which it draws itself, by its deviation."""
    for noise in (0.0, 1.0):
        monkeypatch.setitem(samples.INTENSITIES, "noise", (noise, 0.1, 0.1))
        there = _samples(steps=40, device=torch.device("cuda"))
        again = _samples(steps=40, device=torch.device("cuda"))
        for one, other, cpu in zip(there, again, _samples(steps=40), strict=True):
            assert _equal(one, other)
            assert (one["label"].cpu() != cpu["label"]).float().mean() < 2e-3  # ties at rounding
            difference = one["image"].cpu() - cpu["image"]
            if noise:
                assert 0.12 < difference.std() < 0.16  # of two independent ones
            else:
                assert difference.abs().max() < 1e-3 * (1 + cpu["image"].abs().max())


def test_a_case_without_foreground_can_be_sampled(task):
    for number in range(3):
        _rewrite(task / "labelsTr" / f"case_{number}.nii.gz", lambda array, m: (0 * array, m))
    assert not any(sample["label"].any() for sample in _samples())


def test_wrong_requests_are_refused(task):
    with pytest.raises(ValueError, match="no case 'case_7'"):
        data.TrainingSamples(
            data.open("hippocampus"), ["case_7", "case_0", "case_8"], PATCH, 2, 1, 0
        )
    with pytest.raises(ValueError, match="expected cases"):
        data.TrainingSamples(data.open("hippocampus"), [], PATCH, 2, 1, 0)
    with pytest.raises(ValueError, match="3 patch sizes"):
        _samples(patch_size=(16, 16))
    with pytest.raises(IndexError, match="item 8 of 8"):
        _samples()[8]


# --- Download -------------------------------------------------------------------------------------


@pytest.fixture
def source(places, monkeypatch):
    """Makes the official address a local archive, with its right checksum unless another is given."""

    def publish(members: dict[str, tarfile.TarInfo | bytes], md5: str | None = None) -> Path:
        archive = places / "Task04_Hippocampus.tar"
        with tarfile.open(archive, "w") as tar:
            for name, content in members.items():
                member = content if isinstance(content, tarfile.TarInfo) else tarfile.TarInfo(name)
                if isinstance(content, bytes):
                    member.size = len(content)
                tar.addfile(member, io.BytesIO(content) if isinstance(content, bytes) else None)
        md5 = md5 or hashlib.md5(archive.read_bytes(), usedforsecurity=False).hexdigest()
        url = archive.as_uri()
        monkeypatch.setitem(DecathlonDataset.resource, "Task04_Hippocampus", url)
        monkeypatch.setitem(DecathlonDataset.md5, "Task04_Hippocampus", md5)
        return archive

    return publish


def _members(places: Path) -> dict[str, tarfile.TarInfo | bytes]:
    folder = write_task(places / "original" / "Task04_Hippocampus", cases=2)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder.parent)): path.read_bytes() for path in files}


def test_download_verifies_and_unpacks(places, source, monkeypatch):
    source(_members(places))
    folder = data.download("hippocampus")
    assert folder == places / "data" / "Task04_Hippocampus"
    assert list(folder.parent.iterdir()) == [folder]  # no archive, no temporary folder
    data.open("hippocampus").check()
    assert [case.id for case in data.open("hippocampus").cases] == ["case_0", "case_1"]
    monkeypatch.setattr("monai.apps.download_url", None)  # a second download would now fail
    assert data.download("hippocampus") == folder


def test_a_source_that_sends_nothing_is_given_up(places, monkeypatch):
    monkeypatch.setattr(catalog, "STALLED", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/x.tar"
        monkeypatch.setitem(DecathlonDataset.resource, "Task04_Hippocampus", url)
        with pytest.raises(data.DataError, match="timed out"):
            data.download("hippocampus")
    assert socket.getdefaulttimeout() is None


def _link(name: str, target: str, kind: bytes) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


INSIDE = "Task04_Hippocampus/x"
UNSAFE = {
    "parent": {"../escaped": b"x"},
    "hidden parent": {"Task04_Hippocampus/../../escaped": b"x"},
    "absolute": {f"{os.sep}escaped-from-archive": b"x"},
    "symbolic link": {INSIDE: _link(INSIDE, "../..", tarfile.SYMTYPE)},
    "hard link": {INSIDE: _link(INSIDE, "/etc/hostname", tarfile.LNKTYPE)},
    "device": {INSIDE: _link(INSIDE, "", tarfile.FIFOTYPE)},
}


@pytest.mark.parametrize("kind", UNSAFE)
def test_an_unsafe_archive_is_refused_as_a_whole(places, source, kind):
    archive = source(_members(places) | UNSAFE[kind])
    with pytest.raises(data.DataError, match=r"in archive|in the archive|traversal") as caught:
        data.download("hippocampus")
    assert archive.as_uri() in str(caught.value)
    assert list((places / "data").iterdir()) == []
    assert not (places / "escaped").exists()
    assert not Path(f"{os.sep}escaped-from-archive").exists()


def test_a_failed_download_leaves_nothing(places, source):
    archive = source(_members(places), md5="0" * 32)
    with pytest.raises(data.DataError, match="hash check"):
        data.download("hippocampus")
    source({"Other/dataset.json": b"{}"})
    with pytest.raises(data.DataError, match="Task04_Hippocampus"):
        data.download("hippocampus")
    archive.write_bytes(b"no archive")
    md5 = hashlib.md5(b"no archive", usedforsecurity=False).hexdigest()
    DecathlonDataset.md5["Task04_Hippocampus"] = md5
    with pytest.raises(data.DataError, match="ReadError"):
        data.download("hippocampus")
    archive.unlink()
    with pytest.raises(data.DataError, match=str(archive)):
        data.download("hippocampus")
    assert list((places / "data").iterdir()) == []


def test_download_does_not_touch_what_is_in_its_place(places, source):
    source(_members(places))
    precious = places / "data" / "Task04_Hippocampus" / "notes.txt"
    precious.parent.mkdir(parents=True)
    precious.write_text("mine")
    with pytest.raises(data.DataError, match="move it away"):
        data.download("hippocampus")
    assert precious.read_text() == "mine"


# --- The real hippocampus data --------------------------------------------------------------------


@real_data
def test_real_hippocampus_is_whole_and_split_as_published():
    data.open("hippocampus").check()
    assert len([case.id for case in data.open("hippocampus").cases]) == 260
    split = data.open("hippocampus").split()
    assert (len(split.train), len(split.test)) == (208, 52)
    assert hashlib.sha256(" ".join(split.test).encode()).hexdigest()[:16] == "f62451d1718d1610"
    assert data.open("hippocampus").fingerprint == "b424438cee0aa4e8"


@real_data
def test_real_hippocampi_all_have_one_handedness():
    """Why `flip_axes` is empty: each is more like the mean than its mirror image is."""
    stack = []
    for case in data.open("hippocampus").cases:
        label = np.asarray(nib.load(case.label).dataobj) > 0
        centre = np.argwhere(label).mean(0).round().astype(int)
        padded = np.pad(label, 25)  # the centre's voxel c is now c + 25
        stack.append(padded[tuple(slice(c + 25 - 20, c + 25 + 21) for c in centre)])
    mean = np.mean(stack, axis=0)
    for shape in stack:
        assert np.vdot(shape, mean) > np.vdot(shape[::-1], mean)
