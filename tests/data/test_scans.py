"""Scans of every format: one array, one affine, one message for each kind of bad file."""

import dataclasses
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nibabel.orientations import axcodes2ornt, inv_ornt_aff, ornt_transform
from scan_files import itk_image, write, write_dicom, write_nifti
from scipy.ndimage import map_coordinates

from srlib import data
from srlib.data import scans
from srlib.data.scans import Scan, Window
from srlib.files import DataError

SHAPE = (7, 6, 5)
VOXELS = np.random.default_rng(0).integers(0, 1000, SHAPE).astype(np.int16)


def oblique(spacing=(2.0, 1.5, 3.0), angle=0.3) -> np.ndarray:
    """An affine turned about two axes."""
    c, s = np.cos(angle), np.sin(angle)
    turn = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) @ [[1, 0, 0], [0, c, -s], [0, s, c]]
    affine = np.eye(4)
    affine[:3, :3] = turn * spacing
    affine[:3, 3] = (-20, 13, 40)
    return affine


@pytest.mark.parametrize(
    "affine", [np.diag([1.0, 2, 3, 1]), oblique()], ids=["straight", "oblique"]
)
@pytest.mark.parametrize("name", [f"scan{ending}" for ending in scans.ENDINGS] + ["series", "ä ö"])
def test_every_format_gives_the_same_array_and_ras_affine(tmp_path, name, affine):
    scan = scans.read(write(tmp_path / name, VOXELS, affine))
    assert scan.array.dtype == np.float32
    np.testing.assert_array_equal(scan.array, VOXELS)
    np.testing.assert_allclose(scan.affine, affine, atol=1e-4)


def _nifti(change):
    """A NIfTI file whose raw header or voxels `change` spoils."""

    def make(folder: Path) -> Path:
        image = nib.Nifti1Image(VOXELS.astype(np.float32), np.eye(4))
        image = change(image) or image
        nib.save(image, folder / "bad.nii.gz")
        return folder / "bad.nii.gz"

    return make


def _header(**fields):
    """A NIfTI file with these fields of the header set byte by byte, as no writer would."""
    return lambda folder: write_nifti(folder / "bad.nii", VOXELS, **fields)


def _voxel(value):
    return _nifti(lambda image: image.dataobj.__setitem__((1, 2, 3), value))


def _file(name: str, content: bytes):
    def make(folder: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return make


def _truncated(name: str):
    def make(folder: Path) -> Path:
        path = write(folder / name, np.tile(VOXELS, (4, 4, 4)), np.eye(4))
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
        return path

    return make


def _nrrd(spacings: str):
    text = f"NRRD0004\ntype: uchar\ndimension: 3\nsizes: 2 2 2\nspacings: {spacings}\nencoding: raw\n\n"
    return _file("bad.nrrd", text.encode() + bytes(8))


def _series(**options):
    def make(folder: Path) -> Path:
        write_dicom(folder / "bad", itk_image(VOXELS, np.eye(4)), **options)
        return folder / "bad"

    return make


def _two_series(folder: Path) -> Path:
    _series()(folder)
    return _series(series="1.2.4")(folder)


def _empty_folder(folder: Path) -> Path:
    (folder / "bad").mkdir()
    return folder / "bad"


def _colour(folder: Path) -> Path:
    sitk.WriteImage(sitk.Image([3, 3, 3], sitk.sitkVectorUInt8, 3), str(folder / "bad.mha"))
    return folder / "bad.mha"


def _flat(ending: str):
    def make(folder: Path) -> Path:
        sitk.WriteImage(sitk.Image([3, 3], sitk.sitkInt16), str(folder / f"bad{ending}"))
        return folder / f"bad{ending}"

    return make


BAD_FILES = {
    "not there": (lambda folder: folder / "bad.nii.gz", "no such file"),
    "another format": (_file("bad.png", b"\x89PNG"), "expected one of .nii.gz, .nii, .nrrd"),
    "empty": (_file("bad.nii.gz", b""), "cannot be read"),
    "no gzip": (_file("bad.nii.gz", b"no image" * 99), "cannot be read"),
    "truncated gzip": (_truncated("bad.nii.gz"), "cannot be read"),
    "truncated": (_truncated("bad.nii"), "cannot be read"),
    "truncated NRRD": (_truncated("bad.nrrd"), "cannot be read"),
    "truncated MetaImage": (_truncated("bad.mha"), "its voxels are not whole"),
    "wrong magic": (_header(magic=b"abc"), "cannot be read"),
    "NRRD without magic": (_file("bad.nrrd", b"no image" * 99), "cannot be read"),
    "2D": (_nifti(lambda image: nib.Nifti1Image(VOXELS[0], np.eye(4))), "expected 3 dimensions"),
    "4D": (_nifti(lambda i: nib.Nifti1Image(VOXELS[None], np.eye(4))), "expected 3 dimensions"),
    "2D MetaImage": (_flat(".mha"), "expected 3 dimensions, got shape (3, 3)"),
    "colour": (_colour, "expected one number a voxel"),
    "complex": (
        _nifti(lambda i: nib.Nifti1Image(VOXELS.astype(np.complex64), np.eye(4))),
        "expected one number a voxel",
    ),
    "NaN": (_voxel(np.nan), "1 voxels are NaN or infinite"),
    "infinite": (_voxel(-np.inf), "1 voxels are NaN or infinite"),
    "zero spacing": (_header(pixdim=[1, 0, 1, 1, 0, 0, 0, 0]), "voxel sizes above 0 mm"),
    "negative spacing": (_header(pixdim=[1, 1, -2, 1, 0, 0, 0, 0]), "voxel sizes above 0 mm"),
    "NaN spacing": (_header(pixdim=[1, 1, np.nan, 1, 0, 0, 0, 0]), "voxel sizes above 0 mm"),
    "zero spacing of NRRD": (_nrrd("1 0 1"), ""),
    "singular affine": (_header(srow_x=[0, 0, 0, 0]), "singular or not finite"),
    "NaN affine": (_header(srow_x=[np.nan, 0, 0, 0]), "singular or not finite"),
    "folder without series": (_empty_folder, "expected the files of one DICOM series, got 0"),
    "two series": (_two_series, "expected the files of one DICOM series, got 2"),
    "missing slice": (_series(places=[0, 1, 2, 4, 5]), "expected equal steps"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_a_bad_file_is_one_message_that_names_it(tmp_path, kind):
    make, message = BAD_FILES[kind]
    path = make(tmp_path)
    with pytest.raises(DataError) as caught:
        scans.read(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_negative_spacing_of_nrrd_is_an_axis_that_points_the_other_way(tmp_path):
    """So says ITK, whose format's spacing may have a sign; NIfTI's may not."""
    np.testing.assert_array_equal(
        scans.read(_nrrd("1 -1 1")(tmp_path)).affine, np.diag([-1, 1, 1, 1])
    )


def test_channels_are_files_on_one_grid_or_one_4d_file(tmp_path):
    paths = [tmp_path / "a.nii.gz", tmp_path / "b.mha"]
    for path in paths:
        write(path, VOXELS, oblique())
    assert [s.array.shape for s in scans.read_channels(paths, 2)] == [SHAPE, SHAPE]
    whole = write(tmp_path / "4d.nii.gz", np.stack([VOXELS, 2 * VOXELS], axis=-1), oblique())
    first, second = scans.read_channels([whole], 2)
    np.testing.assert_array_equal(2 * first.array, second.array)

    with pytest.raises(DataError, match=r"4d\.nii\.gz: expected 3 channels, got 2"):
        scans.read_channels([whole], 3)
    with pytest.raises(DataError, match=r"a\.nii\.gz: expected 3 channels, got 2 files"):
        scans.read_channels(paths, 3)
    write(paths[1], VOXELS[1:], oblique())
    with pytest.raises(DataError, match=r"b\.mha: its shape is \(6, 6, 5\)"):
        scans.read_channels(paths, 2)
    write(paths[1], VOXELS, oblique(angle=0.31))
    with pytest.raises(DataError, match=r"b\.mha: its affine is not that of .*a\.nii\.gz"):
        scans.read_channels(paths, 2)


# --- Preparation ----------------------------------------------------------------------------------

ORIENTATIONS = st.sampled_from([f"{a}{b}{c}" for a in "RL" for b in "AP" for c in "SI"])


@settings(max_examples=40, deadline=None)
@given(ORIENTATIONS, st.permutations(range(3)), st.integers(1, 9), st.integers(1, 9))
def test_the_working_grid_does_not_depend_on_the_order_of_voxels_in_the_file(codes, order, nx, ny):
    """A scan stored in any of the 48 orientations is prepared as the one stored as RAS."""
    array = np.arange(nx * ny * 4, dtype=np.float32).reshape(nx, ny, 4)
    affine = np.diag([1.0, 2, 3, 1])
    codes = "".join(codes[axis] for axis in order)
    turn = ornt_transform(axcodes2ornt("RAS"), axcodes2ornt(codes))
    stored = Scan(
        nib.orientations.apply_orientation(array, turn), affine @ inv_ornt_aff(turn, array.shape)
    )
    assert nib.aff2axcodes(stored.affine) == tuple(codes)
    back = scans.regrid(stored, (1, 2, 3))
    np.testing.assert_array_equal(back.array, array)
    np.testing.assert_allclose(back.affine, affine, atol=1e-9)


@settings(max_examples=40, deadline=None)
@given(
    st.tuples(*[st.integers(1, 12)] * 3),
    st.tuples(*[st.floats(0.4, 4)] * 3),
    st.tuples(*[st.floats(0.4, 4)] * 3),
)
def test_resampling_keeps_values_at_their_place_in_the_world(shape, old, new):
    """A linear function of the place, sampled on one grid, is that function on the other, within the scan."""
    affine = oblique(old)
    x, y, z = np.indices(shape)
    scan = Scan((x * old[0] + 2 * y * old[1] - z * old[2]).astype(np.float32), affine)
    result = scans.regrid(scan, new)
    spacing = np.linalg.norm(result.affine[:3, :3], axis=0)
    if not np.allclose(old, new, rtol=1e-3):
        np.testing.assert_allclose(spacing, new)
    voxels = np.indices(result.array.shape).reshape(3, -1)
    world = result.affine[:3, :3] @ voxels + result.affine[:3, 3:]
    back = np.linalg.inv(affine)[:3] @ np.vstack([world, np.ones(voxels.shape[1])])
    expected = map_coordinates(scan.array, back, order=1, mode="nearest")
    np.testing.assert_allclose(result.array.ravel(), expected, atol=2e-3)
    assert (np.abs(back.max(1) - np.array(shape) + 1) <= np.array(new) / old / 2 + 1e-6).all()


def test_labels_are_resampled_without_new_values():
    labels = Scan((VOXELS % 3 * 5).astype(np.float32), np.eye(4))
    assert set(np.unique(scans.regrid(labels, (0.7, 1.3, 0.4), labels=True).array)) <= {0, 5, 10}


def test_normalisations():
    image = VOXELS.astype(np.float32)
    image[:3] = 0
    window = scans.normalise(image, Window(100, 500, 100, 400))
    np.testing.assert_allclose(window, (np.clip(image, 100, 500) - 100) / 400, atol=1e-6)
    inside = scans.normalise(image, "nonzero")
    assert not inside[image == 0].any()
    values = inside[image != 0]
    assert abs(values.mean()) < 1e-6
    assert abs(values.std() - 1) < 1e-6
    for how in ("scan", "nonzero"):
        assert not scans.normalise(np.zeros(SHAPE), how).any()


def test_prepare_gives_channels_each_on_its_own_scale():
    scan = Scan(VOXELS.astype(np.float32), np.diag([2.0, 2, 2, 1]))
    image, affine = scans.prepare([scan, scan], (1, 1, 1), ("scan", Window(0, 1000, 0, 1000)))
    assert image.dtype == torch.float32
    assert image.shape == (2, 13, 11, 9)
    assert image.is_contiguous()
    assert 0 <= image[1].min() < image[1].max() <= 1
    np.testing.assert_array_equal(affine, np.eye(4))
    for few in (["scan"], ["scan"] * 3):
        with pytest.raises(ValueError, match="normalisations of"):
            scans.prepare([scan, scan], (1, 1, 1), few)


@pytest.mark.parametrize(
    "how", ["by rank", "", (0.0, 1.0, 0.0, 0.0), (0.0, 1.0, float("nan"), 1.0), (0.0, 1.0)]
)
def test_an_unknown_normalisation_is_refused(how):
    with pytest.raises(ValueError, match="unknown normalisation"):
        scans.normalise(np.zeros((2, 2, 2)), how)
    with pytest.raises(ValueError, match="unknown normalisation"):
        dataclasses.replace(data.get("hippocampus"), normalisation=(how,))
