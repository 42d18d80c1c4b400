"""Masks of foreign scans lie on the scans' own grids, in whatever orientation, size and format these come."""

import dataclasses
import itertools
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.inferers import sliding_window_inference
from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff
from scan_files import write
from scipy.spatial.transform import Rotation
from torch import nn

from srlib import data
from srlib.data import labels, scans
from srlib.run import predict, train

ORIENTATIONS = [
    "".join(codes)
    for order in itertools.permutations(("LR", "PA", "IS"))
    for codes in itertools.product(*order)
]
RAS = axcodes2ornt("RAS")


def segmenter(model=None, spacing=(1.5, 1.5, 2.0), channels=1, patch_size=(8, 10, 8)):
    """A network that knows bright from dark, or another one, for a data set of that working spacing."""
    entry = dataclasses.replace(
        data.get("hippocampus"),
        modalities=("MRI",) * channels,
        classes=tuple(f"class {k}" for k in range(1, 14)),
        spacing=spacing,
        normalisation=("scan",) * channels,
        flip_axes=(0,),
    )
    return predict.Segmenter(model or Brightness(), entry, patch_size)


class Brightness(nn.Module):
    """Scores (B, 2, ...) of dark and bright."""

    def forward(self, image):
        return torch.cat([torch.zeros_like(image[:, :1]), image[:, :1]], dim=1)


def random_network():
    """Scores (B, 5, ...) that depend on each voxel's neighbours, on each side differently."""
    torch.manual_seed(0)
    return nn.Conv3d(1, 5, 3, padding=1)


def block(shape, fill=1000):
    """A scan whose brightest third is a block that no symmetry maps to itself."""
    array = np.zeros(shape, np.int16)
    array[1 : 2 + shape[0] // 2, : 1 + shape[1] // 3, shape[2] // 4 :] = fill
    return array


def turned(array, affine, codes):
    """The same scan with its axes in another order and direction."""
    orientation = nib.orientations.ornt_transform(RAS, axcodes2ornt(codes))
    return apply_orientation(array, orientation), affine @ inv_ornt_aff(orientation, array.shape)


def mask_of(tmp_path, name, array, affine, **options):
    """The mask's file that the command would write for a scan, and the scan's."""
    scan = write(tmp_path / name, array, affine)
    path = predict.targets(tmp_path / "masks", {"mask": [scan]})["mask"]
    predict.write_mask(predict.segment(segmenter(**options), [scan]), scan, path)
    return path, scan


@pytest.mark.parametrize("codes", ORIENTATIONS)
def test_a_scan_gives_the_same_mask_in_every_orientation(tmp_path, codes):
    array = np.random.default_rng(1).integers(0, 900, (13, 9, 11)).astype(np.int16)
    affine = np.diag([1.0, 2.0, 2.5, 1.0])
    affine[:3, 3] = (-8, 4, 16)
    options = {"model": random_network()}
    straight, _ = mask_of(tmp_path / "straight", "scan.nii.gz", array, affine, **options)
    found, scan = mask_of(tmp_path / "turned", "scan.nii", *turned(array, affine, codes), **options)
    expected = nib.load(straight).get_fdata()
    assert len(np.unique(expected)) == 5
    np.testing.assert_array_equal(nib.as_closest_canonical(nib.load(found)).get_fdata(), expected)
    np.testing.assert_array_equal(nib.load(found).affine, nib.load(scan).affine)


@settings(max_examples=40, deadline=None)
@given(
    codes=st.sampled_from(ORIENTATIONS),
    turn=st.tuples(*[st.floats(-0.25, 0.25)] * 3),
    shear=st.floats(-0.2, 0.2),
    spacing=st.tuples(*[st.floats(0.5, 4)] * 3),
    shape=st.tuples(*[st.integers(4, 30)] * 3),
)
def test_a_mask_lies_on_its_scan_in_any_geometry(
    tmp_path_factory, codes, turn, shear, spacing, shape
):
    """What is bright is found where it is, whatever the orientation, the obliqueness, the voxels and the size."""
    affine = np.eye(4)
    shearing = np.array([[1, shear, 0], [0, 1, 0], [0, 0, 1]])
    affine[:3, :3] = Rotation.from_rotvec(turn).as_matrix() @ shearing * spacing
    affine[:3, 3] = (12.5, -80, 31)
    working = nib.affines.voxel_sizes(affine)
    array, affine = turned(block(shape), affine, codes)
    folder = tmp_path_factory.mktemp("geometry")
    path, scan = mask_of(folder, "scan.nii", array, affine, spacing=working)
    mask, given_scan = nib.load(path), nib.load(scan)
    assert mask.get_data_dtype() == np.uint8
    np.testing.assert_array_equal(mask.affine, given_scan.affine)
    for code in ("qform_code", "sform_code", "xyzt_units"):
        assert mask.header[code] == given_scan.header[code]
    np.testing.assert_array_equal(mask.get_fdata(), array > 0)


@settings(max_examples=20, deadline=None)
@given(
    codes=st.sampled_from(ORIENTATIONS),
    turn=st.tuples(*[st.floats(-0.25, 0.25)] * 3),
    ratio=st.tuples(*[st.floats(0.4, 2.5)] * 3),
)
def test_interpolation_keeps_to_the_place(tmp_path_factory, codes, turn, ratio):
    """On a ramp of brightness, a border between labels lies at one place in mm, whatever the working voxels."""
    spacing, shape = np.array([1.2, 0.8, 1.0]), (24, 30, 20)
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_rotvec(turn).as_matrix() * spacing
    ramp = sum(np.ogrid[tuple(slice(0, n, n * 1j) for n in shape)]).astype(np.float32)
    array, affine = turned(ramp, affine, codes)
    folder = tmp_path_factory.mktemp("ramp")
    path, _ = mask_of(folder, "scan.nii", array, affine, spacing=tuple(spacing * ratio))
    mask = nib.load(path).get_fdata() > 0
    step = array.max() / 20  # what the ramp changes by from a voxel to its neighbour, at most
    assert mask[array > np.median(array) + step].all()
    assert not mask[array < np.median(array) - step].any()


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("scan.nii", "mask.nii.gz"),
        ("scan.nrrd", "mask.nrrd"),
        ("scan.mha", "mask.mha"),
        ("series", "mask.nii.gz"),
    ],
)
def test_the_mask_has_the_format_and_the_grid_of_the_scan(tmp_path, name, written):
    affine = np.diag([-1.0, -1.5, 2.0, 1.0])
    affine[:3, 3] = (10.25, 20.5, -3)
    path, scan = mask_of(tmp_path, name, block((9, 12, 8)), affine, spacing=(1.0, 1.5, 2.0))
    assert path.name == written
    mask, expected = scans.read(path), scans.read(scan)
    np.testing.assert_array_equal(mask.affine, expected.affine)
    np.testing.assert_array_equal(mask.array, expected.array > 0)
    if scan.suffix in (".nrrd", ".mha"):
        one, other = sitk.ReadImage(str(scan)), sitk.ReadImage(str(path))
        for geometry in ("GetOrigin", "GetSpacing", "GetDirection", "GetSize"):
            assert getattr(one, geometry)() == getattr(other, geometry)()


def test_channels_come_as_files_or_as_one(tmp_path):
    """The second channel alone is bright where the first is dark."""
    first, second = block((9, 8, 7)), 1000 - block((9, 8, 7))
    names = [
        write(tmp_path / f"case_000{k}.nii.gz", a, np.eye(4)) for k, a in enumerate((first, second))
    ]
    whole = tmp_path / "whole.nii.gz"
    nib.save(nib.Nifti1Image(np.stack([first, second], axis=-1), np.eye(4)), whole)
    cases = predict.find_cases([tmp_path], channels=2)
    assert cases == {"case": tuple(names), "whole": (whole,)}
    for files in cases.values():
        mask = predict.segment(segmenter(channels=2, spacing=(1, 1, 1)), files)
        np.testing.assert_array_equal(mask.array, first > 0)
    predict.write_mask(mask, whole, tmp_path / "mask.nii.gz")
    assert nib.load(tmp_path / "mask.nii.gz").shape == first.shape


def test_masks_of_regions_hold_the_values_of_the_training_s_files(tmp_path):
    """BraTS: core (1, 4), whole (1, 2, 4) and enhancing tumour (4), each region where its channel is bright."""
    entry = dataclasses.replace(data.get("brats"), normalisation=("scan",) * 4)
    expected = np.zeros((9, 8, 7), np.int16)
    expected[1:8, 1:7, 1:6], expected[2:7, 2:6, 2:5], expected[3:5, 3:5, 3:4] = 2, 1, 4
    of_regions = [np.isin(expected, values) for values in entry.label_values]
    scan = tmp_path / "case.nii.gz"
    channels = np.stack([*of_regions, expected > 0], axis=-1).astype(np.int16)
    nib.save(nib.Nifti1Image(channels, np.diag([-1.0, 1, 1, 1])), scan)
    network = labels.scoring(FirstThree(), entry)
    mask = predict.segment(predict.Segmenter(network, entry, (8, 10, 8)), [scan])
    np.testing.assert_array_equal(mask.array, expected)


class FirstThree(nn.Module):
    """Outputs (B, 3, ...) for three regions: the first three channels."""

    def forward(self, image):
        return image[:, :3]


def test_flips_average_over_mirrored_images(tmp_path):
    class Side(nn.Module):
        """Says `1` on the left half of its window."""

        def forward(self, image):
            left = torch.linspace(1, -1, image.shape[2]).view(-1, 1, 1).expand_as(image)
            return torch.cat([torch.zeros_like(left), left], dim=1)

    scan = write(tmp_path / "scan.nii", block((8, 10, 8)), np.diag([1.5, 1.5, 2.0, 1]))
    plain, flipped = (
        predict.segment(segmenter(Side()), [scan], flips=flips).array for flips in (False, True)
    )
    assert plain.any()
    assert not flipped.any()  # left and right cancel
    one_sided = segmenter()._replace(entry=data.get("hippocampus"))
    with pytest.raises(ValueError, match="states no axis along which cases may be mirrored"):
        predict.segment(one_sided, [scan], flips=True)


def test_find_cases_knows_files_folders_and_series(tmp_path):
    one = write(tmp_path / "a" / "one.nii.gz", block((4, 4, 4)), np.eye(4))
    two = write(tmp_path / "a" / "two.mha", block((4, 4, 4)), np.eye(4))
    series = write(tmp_path / "series", block((4, 4, 4)), np.eye(4))
    (tmp_path / "a" / "notes.txt").write_text("not a scan")
    found = predict.find_cases([tmp_path / "a", series], channels=1)
    assert found == {"one": (one,), "series": (series,), "two": (two,)}


def test_numbers_of_cases_are_no_channels_of_a_network_of_one(tmp_path):
    files = [write(tmp_path / f"a_{k:04d}.nii", block((4, 4, 4)), np.eye(4)) for k in (1, 2)]
    found = predict.find_cases([tmp_path], channels=1)
    assert found == {"a_0001": (files[0],), "a_0002": (files[1],)}
    whole = write(tmp_path / "a.nii", block((4, 4, 4)), np.eye(4))
    (tmp_path / "._a.nii").touch()  # as macOS leaves it beside
    assert predict.find_cases([tmp_path], channels=1) == {"a": (whole,), **found}


@pytest.mark.parametrize(
    ("names", "channels", "message"),
    [
        (["a.nii", "a.nrrd"], 1, "would give one mask, 'a'"),
        (["a_0000.nii"], 2, r"a: expected 2 channel\(s\), a_0000 on; got a_0000.nii"),
        (["a_0000.nii", "a_0001.nii"], 1, r"expected 1 channel\(s\).*; got a_0000.nii, a_0001.nii"),
        (["a.nii", "a_0000.nii"], 1, r"expected 1 channel\(s\).*; got a.nii, a_0000.nii"),
        (["a_0001.nii", "a_0001_0000.nii"], 1, r"a_0001: expected 1 channel\(s\)"),
    ],
)
def test_cases_that_cannot_be_told_apart_or_are_not_whole_are_refused(
    tmp_path, names, channels, message
):
    for name in names:
        write(tmp_path / name, block((4, 4, 4)), np.eye(4))
    with pytest.raises(data.DataError, match=message):
        predict.find_cases([tmp_path], channels)


@pytest.mark.parametrize("kind", ["file", "link to a folder", "link to a file", "hard link"])
def test_no_way_leads_a_mask_over_a_scan_or_a_label(tmp_path, kind):
    """Not by a link of the scan's, of the folder's, or of the mask's; not with `overwrite` either."""
    scan = write(tmp_path / "imagesTr" / "scan.nii.gz", block((4, 4, 4)), np.eye(4))
    (tmp_path / "labelsTr").mkdir()
    given, out = scan, scan.parent
    if kind == "link to a folder":
        out = tmp_path / "masks"
        out.symlink_to(scan.parent)
    if kind == "link to a file":
        given = tmp_path / "in" / "scan.nii.gz"
        given.parent.mkdir()
        given.symlink_to(scan)
    if kind == "hard link":
        out = tmp_path / "masks"
        out.mkdir()
        (out / "scan.nii.gz").hardlink_to(scan)
    message = "is the scan itself" if kind == "hard link" else "holds the scans or their labels"
    for overwrite in (False, True):
        with pytest.raises(data.DataError, match=message):
            predict.targets(out, {"scan": [given]}, overwrite)
    with pytest.raises(data.DataError, match="holds the scans or their labels"):
        predict.targets(tmp_path / "labelsTr", {"scan": [given]})
    assert predict.targets(tmp_path, {"scan": [given]}) == {"scan": tmp_path / "scan.nii.gz"}


def test_what_is_there_is_replaced_only_when_asked_and_never_through_a_link(tmp_path):
    scan = write(tmp_path / "in" / "scan.nii.gz", block((4, 4, 4)), np.eye(4))
    out, other = tmp_path / "masks", tmp_path / "other.nii.gz"
    mask = predict.segment(segmenter(), [scan])
    out.mkdir()
    other.write_text("the user's")
    for make in (
        Path.touch,
        lambda path: path.symlink_to(other),
        lambda path: path.symlink_to("no"),
    ):
        path = predict.targets(out, {"scan": [scan]})["scan"]
        make(path)
        with pytest.raises(data.DataError, match=r"scan\.nii\.gz: is there already; --overwrite"):
            predict.targets(out, {"scan": [scan]})
        with pytest.raises(FileExistsError, match=r"scan\.nii\.gz: is there already"):
            predict.write_mask(mask, scan, path)
        predict.targets(out, {"scan": [scan]}, overwrite=True)
        predict.write_mask(mask, scan, path, overwrite=True)
        assert not path.is_symlink()
        assert nib.load(path).shape == (4, 4, 4)
        path.unlink()
    assert other.read_text() == "the user's"
    assert not (out / "no").exists()


# --- Windows ---------------------------------------------------------------------------------------


def scores_of(windows):
    """Scores (n, 3, ...) of windows (n, 1, ...) that depend on the place within them."""
    ramp = torch.linspace(-1, 1, windows[0].numel()).view_as(windows[:1]).expand_as(windows)
    return torch.cat([windows, windows * ramp, ramp.sin()], dim=1)


def whole(image, patch_size, overlap):
    """MONAI's scores of the whole image at once, with the same weights."""
    weights = torch.ones(())
    for k, n in enumerate(patch_size):
        shape = [-1 if j == k else 1 for j in range(3)]
        weights = weights * predict._gaussian(n).view(shape)
    return sliding_window_inference(
        image[None], patch_size, 1, scores_of, overlap, roi_weight_map=weights[None, None]
    )[0]


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize(
    ("size", "overlap"), [((23, 11, 17), 0.5), ((30, 8, 9), 0.7), ((5, 20, 12), 0.25)]
)
def test_slabs_are_what_monai_computes_at_once(size, overlap, axis):
    """Also where the image is smaller than the window, along the walked axis or another."""
    image, patch_size, seen = torch.randn(1, *size), (8, 8, 8), []

    def counted(windows):
        assert len(windows) <= predict.AT_ONCE
        seen.extend(windows)
        return scores_of(windows)

    slabs = list(predict.scores_by_slab(counted, image, patch_size, "cpu", axis, overlap))
    assert len(seen) == predict.window_count(size, patch_size, overlap)
    expected = whole(image, patch_size, overlap)
    torch.testing.assert_close(torch.cat(slabs, dim=1 + axis), expected, rtol=1e-4, atol=1e-5)


def test_mirrored_averages_over_all_mirrorings():
    window = torch.randn(1, 1, 4, 5, 6)
    kernel = torch.randn(2, 1, 3, 3, 3)

    def predictor(x):
        return torch.conv3d(x, kernel, padding=1)

    dims = [(), (2,), (4,), (2, 4)]
    expected = sum(predictor(window.flip(d)).flip(d) for d in dims) / 4
    torch.testing.assert_close(predict.mirrored(predictor, (0, 2))(window), expected)
    assert torch.equal(predict.mirrored(predictor, ())(window), predictor(window))


# --- The small networks of the repository ----------------------------------------------------------


@pytest.mark.parametrize("name", ["mni152", "hippocampus"])
def test_a_network_s_file_and_its_card_agree_with_the_data(name):
    try:
        data.open(name)
    except FileNotFoundError:
        pytest.skip(f"no {name} here")
    file = predict.provided(name)
    found, card = train.load_trained(file), file.with_suffix(".md").read_text()
    assert train.data_changes(found) == []
    assert f"fingerprint {found.fingerprint}." in card
    assert f"{len(found.split.train)} training cases, {len(found.split.test)} held-out" in card
    assert f"over {len(found.split.test)} held-out cases" in card
    assert f"torch {found.versions['torch']}" in card
