"""Folders of foreign scans and the paper's data sets: layouts, plans, regions, and bad input."""

import dataclasses
import hashlib
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.apps import DecathlonDataset
from scan_files import (
    AFFINE,
    SHAPE,
    scan,
    write,
    write_brats,
    write_btcv,
    write_decathlon,
    write_nnunet,
    write_pairs,
)
from typer.testing import CliRunner

from srlib import cli, data, files
from srlib.data import catalog, labels, plans, scans
from srlib.data.catalog import Entry, tuples
from srlib.data.scans import Window
from srlib.files import DataError
from srlib.net import costs
from srlib.run import evaluate, runs, train


@pytest.fixture
def places(tmp_path, monkeypatch) -> Path:
    """An empty data root, cache and results; memory of a step as if it had been counted."""
    for name in ("DATA", "CACHE", "RESULTS"):
        monkeypatch.setenv(f"SRLIB_{name}", str(tmp_path / name.lower()))
    monkeypatch.setattr(catalog, "data_roots", lambda: [tmp_path / "data"])
    monkeypatch.setattr(runs, "step_memory", lambda *network: (0.1, 3e-7))
    return tmp_path


# --- Folders --------------------------------------------------------------------------------------


def _index(folder: Path) -> Path:
    """Images and labels, with a dataset.json that names them."""
    write_pairs(folder, values=(7, 255))
    stated = {"channel_names": {"0": "T2"}, "labels": {"background": 0, "b": 255, "a": 7}}
    (folder / "dataset.json").write_text(json.dumps(stated))
    return folder


def _unnumbered(folder: Path) -> Path:
    """A list of cases that leaves out the numbers of the images' files."""
    write_decathlon(folder, ("CT",))
    for image in (folder / "imagesTr").iterdir():
        image.rename(image.with_name(image.name.replace(".nii", "_0000.nii")))
    return folder


FOLDERS = {
    "Decathlon": (write_decathlon, ("MRI",), ("front", "back"), (1, 2)),
    "Decathlon, 4D": (
        lambda f: write_decathlon(f, ("T1", "T2")),
        ("T1", "T2"),
        ("front", "back"),
        (1, 2),
    ),
    "nnU-Net": (write_nnunet, ("CT",), ("liver", "tumour"), (1, 2)),
    "nnU-Net, two channels": (
        lambda f: write_nnunet(f, ("CT", "PET"), ending=".mha"),
        ("CT", "PET"),
        ("liver", "tumour"),
        (1, 2),
    ),
    "nnU-Net's first version": (_unnumbered, ("CT",), ("front", "back"), (1, 2)),
    "pairs": (write_pairs, ("channel 0",), ("label 1", "label 2"), (1, 2)),
    "NRRD": (
        lambda f: write_pairs(f, ending=".nrrd"),
        ("channel 0",),
        ("label 1", "label 2"),
        (1, 2),
    ),
    "two channels": (
        lambda f: write_pairs(f, channels=2),
        ("channel 0", "channel 1"),
        ("label 1", "label 2"),
        (1, 2),
    ),
    "other values": (
        lambda f: write_pairs(f, values=(7, 255)),
        ("channel 0",),
        ("label 7", "label 255"),
        (7, 255),
    ),
    "numbers as names": (
        lambda f: write_nnunet(f, labels={"background": 0, "1": 2, "2": 1}),
        ("CT",),
        ("1", "2"),
        (2, 1),
    ),
    "named": (_index, ("T2",), ("b", "a"), (255, 7)),
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_folder_of_any_layout_is_a_data_set(places, kind):
    make, modalities, classes, values = FOLDERS[kind]
    folder = make(places / "ein Ordner äöü 日本")
    name = str(folder.resolve())
    entry = data.get(name)
    assert (entry.name, entry.modalities, entry.classes) == (name, modalities, classes)
    assert entry.values == values
    assert entry.spacing == (1.0, 1.0, 2.0)
    assert (entry.in_channels, entry.out_channels) == (len(modalities), 3)
    data.open(name).check()
    assert [case.id for case in data.open(name).cases] == [f"case_{n}" for n in range(5)]
    case = data.open(name).load("case_3")
    assert case["image"].shape == (len(modalities), *SHAPE)
    stored = scans.read(data.open(name).cases[3].label).array
    for label, value in enumerate(values, start=1):
        np.testing.assert_array_equal(case["label"][0] == label, stored == value)
    np.testing.assert_array_equal(labels.decode(case["label"][0].numpy(), entry), stored)
    assert len(data.open(name).summary()) == 5
    sample = data.TrainingSamples(
        data.open(name), data.open(name).split().train, (16, 16, 16), 1, 1, 0
    )[0]
    assert sample["image"].shape == (len(modalities), 16, 16, 16)


def test_a_plan_is_made_once_and_again_when_a_file_changed(places, monkeypatch):
    folder = write_nnunet(places / "scans")
    first = data.get(str(folder))
    assert Entry(**tuples(json.loads(json.dumps(dataclasses.asdict(first))))) == first
    with monkeypatch.context() as patch:
        patch.setattr(plans, "read_case", None)  # a second look would fail
        plans._loaded.cache_clear()
        assert data.get(str(folder)) == first
    with monkeypatch.context() as patch:
        patch.setattr(plans, "read_case", None)
        patch.setattr(plans, "RECIPE", 0)
        plans._loaded.cache_clear()
        with pytest.raises(TypeError):
            data.get(str(folder))
    image, label = scan(9)
    write(folder / "imagesTr" / "case_9_0000.nii.gz", image, AFFINE)
    write(folder / "labelsTr" / "case_9.nii.gz", label, AFFINE)
    assert data.get(str(folder)) != first
    assert len(data.open(str(folder)).cases) == 6


def test_only_what_is_stated_to_be_ct_has_one_scale_for_all_cases(places):
    folder = write_nnunet(places / "scans", ("CT", "PET"))
    window, other = data.get(str(folder)).normalisation
    foreground = np.concatenate([i[m > 0] for i, m in (scan(number) for number in range(5))])
    low, high = np.percentile(foreground, (0.5, 99.5))
    assert other == "scan"
    np.testing.assert_allclose(window, (low, high, *_moments(foreground, low, high)), rtol=0.02)


def _moments(values, low, high):
    clipped = np.clip(values, low, high)
    return clipped.mean(), clipped.std()


def test_spacing_is_the_median_after_turning_to_ras(places):
    folder = write_pairs(places / "scans")
    image, label = scan(0)
    turned = np.array([[0, 0, 3.0, 0], [-1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1]])  # axes A-, S, R
    for number in range(3):
        for array, name in ((image, "images"), (label, "labels")):
            write(folder / name / f"case_{number}.nii.gz", array, turned)
    assert data.get(str(folder)).spacing == (3.0, 1.0, 1.0)
    assert data.open(str(folder)).load("case_0")["image"].shape == (1, 18, 15, 22)


def test_patches_shrink_until_a_step_fits_the_memory():
    size = np.array([200, 300, 50])
    whole, needed = plans.patch_size(size, (0.1, 3e-7), 100)
    assert whole == (200, 304, 56)
    assert needed == pytest.approx(0.1 + 2 * 3e-7 * np.prod(whole))
    for memory in (4, 1):
        patch, needed = plans.patch_size(size, (0.1, 3e-7), memory)
        assert needed <= memory
        larger = np.add(patch, (8, 0, 0))
        assert 0.1 + 2 * 3e-7 * larger.prod() > memory or larger[0] > 200
    with pytest.raises(ValueError, match=r"takes 0\.14 GiB or more, allowed are 0\.1"):
        plans.patch_size(size, (0.1, 3e-7), 0.1)


def test_memory_of_a_step_is_counted_not_guessed():
    with pytest.raises(ValueError, match="network 'huge' is not one of paper, small, tiny"):
        costs.step_memory("huge", 1, 3)
    fixed, each = costs.step_memory("tiny", 1, 3)
    assert 0 < fixed < 0.1
    assert 1e-8 < each < 1e-5


def test_the_command_says_the_plan(places):
    folder = write_nnunet(places / "scans", ("CT", "PET"))
    write(folder / "labelsTr" / "case_4.nii.gz", np.zeros(SHAPE, np.uint8), AFFINE)
    result = CliRunner().invoke(cli.app, ["data", "plan", str(folder), "--memory", "1"])
    assert result.exit_code == 0
    for line in (
        "5 labelled cases, 1 of them without any class: case_4",
        "channel CT: CT, clipped to ",
        "channel PET: each scan on its own scale (not stated to be CT)",
        "class tumour: label 2, in 4 cases",
        "working voxels of 1 x 1 x 2 mm, the median; a median case has 15 x 22 x 18",
        "patches of 40 x 40 x 40 voxels: a training step of the network 'small' with 2 of them takes 0.14 GiB",
    ):
        assert line in result.output
    result = CliRunner().invoke(cli.app, ["data", "check", str(folder)])
    assert result.output.endswith("5 cases, all in order\n")


def test_a_folder_is_trained_and_evaluated_like_any_data_set(places):
    folder = write_pairs(places / "scans", values=(5, 9))
    config = runs.config_for(
        "default", str(folder), model="tiny", steps=2, batch_size=1, tom="none"
    )
    assert config.dataset == str(folder.resolve())
    assert config.patch_size == (40, 40, 40)  # larger than a case
    train.train(config)
    table = evaluate.evaluate(config)
    assert set(table["class"]) == {"label 5", "label 9"}
    assert not files.results_dir("smoke", config.dataset).is_relative_to(folder)


def test_folds_of_a_folder_stay_when_it_moves_and_are_as_many_as_cases(places):
    folder = write_pairs(places / "scans", cases=3)
    before = [data.open(str(folder)).split(fold) for fold in range(3)]
    assert sorted(i for fold in before for i in fold.test) == ["case_0", "case_1", "case_2"]
    with pytest.raises(ValueError, match=r"has the folds \[0, 1, 2\]"):
        data.open(str(folder)).split(3)
    moved = folder.rename(places / "elsewhere")
    assert [data.open(str(moved)).split(fold) for fold in range(3)] == before


def _untrained(folder: Path, config: runs.RunConfig) -> Path:
    """The file that a training of the folder as it is now would leave, but for the weights."""
    file = folder.parent / "model.safetensors"
    weights = train.build_model(config).state_dict()
    train.save_trained(
        file,
        train.about_to_train(config, data.open(config.dataset))._replace(weights=weights),
    )
    return file


def _more_cases(folder: Path) -> None:
    write_nnunet(folder, cases=8)


def _other_classes(folder: Path) -> None:
    write_nnunet(folder, labels={"background": 0, "tumour": 1, "liver": 2})


def _other_voxels(folder: Path) -> None:
    path = folder / "imagesTr" / "case_1_0000.nii.gz"
    write(path, scans.read(path).array + 1, AFFINE)


@pytest.mark.parametrize(
    ("change", "messages"),
    [
        (_more_cases, ["new training cases", "fingerprint"]),
        (_other_classes, ["classes ('liver', 'tumour') then, ('tumour', 'liver') now"]),
        (_other_voxels, ["fingerprint"]),
    ],
)
def test_held_out_means_held_out(places, change, messages):
    """A folder that is not what it was at the training is not scored by another split or other labels."""
    folder = write_nnunet(places / "scans")
    settings = {"model": "tiny", "tom": "none", "patch_size": (40, 24, 24)}
    config = runs.config_for("default", str(folder), **settings)
    file = _untrained(folder, config)
    table = evaluate.evaluate(config, checkpoint=file)
    assert set(table["case"]) == set(train.load_trained(file).split.test)
    before = (places / "metrics.csv").read_bytes()
    change(folder)
    with pytest.raises(DataError, match="is not what it was trained on") as refused:
        evaluate.evaluate(config, checkpoint=file)
    for message in (str(file), *messages):
        assert message in str(refused.value)
    assert (places / "metrics.csv").read_bytes() == before


def test_a_folder_that_states_something_else_is_another_run(places):
    """The voxels are the same; channels decide how they are scaled, labels what is learnt."""
    folder, found = places / "scans", []
    for channels, labels_ in (
        (("MRI",), {"background": 0, "a": 1, "b": 2}),
        (("CT",), {"background": 0, "a": 1, "b": 2}),
        (("CT",), {"background": 0, "whole": [1, 2], "b": [2]}),
    ):
        write_nnunet(folder, channels, labels_)
        config = runs.config_for("default", str(folder), patch_size=(40, 24, 24))
        found.append(runs.run_id(config))
        assert data.open(str(folder)).entry.stated
    assert len(set(found)) == 3
    assert not data.get("hippocampus").stated  # its runs keep their identities
    assert data.get("spleen").stated


@pytest.mark.parametrize(("share", "told"), [(0.0, "all have the value 40"), (0.001, None)])
def test_a_ct_window_without_width_is_not_taken(places, share, told):
    """It would make every voxel the same."""
    folder = write_nnunet(places / "scans")
    for label in (folder / "labelsTr").iterdir():
        path = folder / "imagesTr" / label.name.replace(".nii", "_0000.nii")
        image, inside = scans.read(path).array, np.flatnonzero(scans.read(label).array)
        image.flat[inside] = 40
        image.flat[inside[: round(share * len(inside))]] = 90
        write(path, image, AFFINE)
    if told:
        with pytest.raises(DataError, match=told):
            data.get(str(folder))
    else:
        assert data.get(str(folder)).normalisation[0][:2] == (40, 90)


@pytest.mark.parametrize("name", ["../case", "..", "a/b", "/case"])
def test_a_case_whose_name_is_a_path_is_refused(places, name):
    """What is computed of a case is written under its name: it could lie anywhere, also where its scan is."""
    folder = write_nnunet(places / "scans")
    stated = json.loads((folder / "dataset.json").read_text())
    files_ = {"images": ["imagesTr/case_0_0000.nii.gz"], "label": "labelsTr/case_0.nii.gz"}
    stated["dataset"] = {name: files_}
    (folder / "dataset.json").write_text(json.dumps(stated))
    with pytest.raises(DataError, match="expected a name, not a path"):
        data.open(str(folder))


def test_networks_that_lie_in_one_folder_keep_their_scores(places):
    folder = write_nnunet(places / "scans")
    settings = {"model": "tiny", "tom": "none", "patch_size": (40, 24, 24), "test_cases": 1}
    networks = [places / name for name in ("net.safetensors", "net.best", "net")]
    for seed, network in enumerate(networks):
        config = runs.config_for("default", str(folder), seed=seed, **settings)
        _untrained(folder, config).rename(network)
        evaluate.evaluate(config, checkpoint=network)
    for network in networks:
        assert (places / f"{network.name}.scores" / "metrics.csv").is_file()
        assert evaluate.stored_scores(network) is not None
    assert not (places / "metrics.csv").exists()


@pytest.mark.parametrize("step", [1, 3])
def test_a_file_that_changes_while_a_training_runs_ends_it(places, monkeypatch, step):
    folder = write_nnunet(places / "scans")
    settings = {"model": "tiny", "tom": "none", "patch_size": (40, 24, 24), "steps": 4}
    config = runs.config_for("default", str(folder), batch_size=1, **settings)
    rate = train.learning_rate

    def changing(config, now):
        if now == step:
            _other_voxels(folder)
        return rate(config, now)

    monkeypatch.setattr(train, "learning_rate", changing)
    name = runs.run_id(config)
    with pytest.raises(DataError, match=rf"case_1_0000\.nii\.gz: changed while run {name} trained"):
        train.train(config, checkpoint_seconds=0)
    assert [path.name for path in (places / "results" / "runs").iterdir()] == [name]
    left = {path.name for path in (places / "results" / "runs" / name).iterdir()}
    assert left == {".lock", "checkpoint.pt"}


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ('{"background": 0, "": 1}', "class ''; expected a name"),
        ('{"background": 0, "$x$": 1}', "class '$x$'; expected a name of printable"),
        ('{"background": 0, " x": 1}', "class ' x'; expected a name"),
        ('{"background": 0, "x\\ny": 1}', "expected a name of printable characters"),
        ('{"background": 0, "mean of classes": 1}', "expected another name"),
        ('{"background": 0, "x": 1, "x": 2}', "'x' comes 2 times"),
        ('{"0": "background", "1": "x", "2": "x"}', "two classes of the name 'x'"),
        ('{"background": 0, "x": 1, "y": 1}', "expected others for each class"),
    ],
)
def test_classes_that_no_table_or_figure_can_hold_are_refused_with_the_plan(
    places, labels, message
):
    folder = write_pairs(places / "scans")
    (folder / "dataset.json").write_text(f'{{"channel_names": {{"0": "MRI"}}, "labels": {labels}}}')
    result = CliRunner().invoke(cli.app, ["data", "plan", str(folder)])
    assert result.exit_code == 2
    assert str(folder) in result.output
    assert message in result.output


def test_names_that_mean_a_missing_value_elsewhere_are_names(places):
    """From the folder to the tables: no case and no class is lost or merged."""
    folder = write_nnunet(places / "scans", labels={"background": 0, "NA": 1, "mean": 2}, cases=4)
    for path in [*folder.glob("*/case_0*"), *folder.glob("*/case_1*"), *folder.glob("*/case_2*")]:
        name = {"0": "None", "1": "nan", "2": "$x$"}[path.name[5]]
        path.rename(path.with_name(path.name.replace(path.name[:6], name)))
    assert [case.id for case in data.open(str(folder)).cases] == ["$x$", "None", "case_3", "nan"]
    assert data.open(str(folder)).summary()["case"].tolist() == ["$x$", "None", "case_3", "nan"]
    settings = {"model": "tiny", "tom": "none", "patch_size": (40, 24, 24)}
    for fold in range(4):
        config = runs.config_for("default", str(folder), fold, **settings)
        table = evaluate.evaluate(config, checkpoint=_untrained(folder, config))
        held_out = evaluate.test_cases(config)
        assert list(table[["case", "class"]].itertuples(index=False, name=None)) == [
            (case, name) for case in held_out for name in ("NA", "mean")
        ]
    assert len(evaluate.summarise(table, ["dice"])["class"].unique()) == 3


# --- The paper's data sets ------------------------------------------------------------------------


def test_spleen_is_the_decathlons_task_with_a_ct_window(places):
    write_decathlon(places / "data" / "Task09_Spleen", values=(1,))
    data.open("spleen").check()
    case = data.open("spleen").load("case_0")
    assert case["spacing"] == (1.5, 1.5, 2.0)
    assert 0.3 < case["image"].min() < 0.5  # 50 and some noise, of -57 to 164
    assert 0.9 < case["image"].max() <= 1


def test_spleen_is_downloaded_checked_and_unpacked(places, monkeypatch):
    """From a tiny archive in the layout of the Decathlon's, with what macOS adds to it."""
    folder = write_decathlon(places / "Task09_Spleen", values=(1,))
    (folder / "imagesTr" / "._case_0.nii.gz").write_bytes(b"Mac OS X")
    (folder / "labelsTr" / "._case_0.nii.gz").write_bytes(b"Mac OS X")
    archive = places / "Task09_Spleen.tar"
    with tarfile.open(archive, "w") as tar:
        tar.add(folder, folder.name)
    md5 = hashlib.md5(archive.read_bytes(), usedforsecurity=False).hexdigest()
    monkeypatch.setitem(DecathlonDataset.resource, "Task09_Spleen", archive.as_uri())
    monkeypatch.setitem(DecathlonDataset.md5, "Task09_Spleen", "0" * 32)
    with pytest.raises(DataError, match="hash check"):
        data.download("spleen")
    monkeypatch.setitem(DecathlonDataset.md5, "Task09_Spleen", md5)
    assert data.download("spleen") == places / "data" / "Task09_Spleen"
    data.open("spleen").check()
    assert len([case.id for case in data.open("spleen").cases]) == 5
    assert [len(data.open("spleen").split(fold).test) for fold in range(5)] == [1] * 5


def test_btcv_is_read_as_its_archive_unpacks(places):
    write_btcv(places / "data" / "BTCV")
    data.open("btcv").check()
    assert [case.id for case in data.open("btcv").cases] == ["img0001", "img0002", "img0003"]
    case = data.open("btcv").load("img0002")
    assert case["image"].shape == (1, *SHAPE)
    assert case["label"].unique().tolist() == list(range(14))
    assert case["affine"][0, 0] > 0  # the file's first axis points left
    assert 0 <= case["image"].min() < case["image"].max() <= 1


def test_brats_regions_overlap(places):
    write_brats(places / "data" / "BraTS2021_Training_Data")
    data.open("brats").check()
    entry = data.get("brats")
    assert (entry.in_channels, entry.out_channels, entry.regions) == (4, 3, True)
    case = data.open("brats").load("BraTS2021_00001")
    assert not case["image"][:, :3].any()  # what was 0 stays 0
    assert case["image"][0, 3:].std() == pytest.approx(1, abs=1e-3)
    stored = scans.read(data.open("brats").cases[1].label).array
    masks = labels.class_masks(case["label"][None], entry.members)[0].numpy()
    for mask, values in zip(masks, ((1, 4), (1, 2, 4), (4,)), strict=True):
        np.testing.assert_array_equal(mask, np.isin(stored, values))
    np.testing.assert_array_equal(labels.decode(case["label"][0].numpy(), entry), stored)
    volumes = data.open("brats").summary().set_index("case").loc["BraTS2021_00001"]
    assert volumes["whole tumour (ml)"] == np.isin(stored, (1, 2, 4)).sum() / 1000


def test_regions_are_trained_by_sigmoid_and_evaluated_as_they_overlap(places):
    write_brats(places / "data" / "BraTS2021_Training_Data")
    config = runs.RunConfig(
        "brats",
        steps=2,
        model="tiny",
        tom="none",
        batch_size=1,
        patch_size=(40, 24, 24),
        warmup=0.5,
    )
    network = train.train(config).model
    scores = network(torch.randn(1, 4, 40, 24, 24))
    assert scores.shape[1] == 4  # background and the three values
    table = evaluate.evaluate(config).set_index("class")
    case = table[table["case"] == evaluate.test_cases(config)[0]]
    reference = case["volume_ref_ml"]
    assert reference["whole tumour"] > reference["tumour core"] > reference["enhancing tumour"] > 0


@pytest.mark.parametrize("authors", [False, True])
def test_the_loss_of_regions_falls_as_each_mask_is_met(authors):
    entry = data.get("brats")
    label = torch.randint(0, 4, (2, 1, 6, 5, 4))
    masks = labels.class_masks(label, entry.members).float()
    loss = labels.loss_function(entry, authors)
    losses = [float(loss((2 * masks - 1) * k, label)) for k in (-5, 0, 1, 20)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 1e-3


def test_scores_of_regions_are_thresholds_where_the_regions_lie_inside_each_other():
    entry = data.get("brats")
    label = torch.randint(0, 4, (1, 1, 6, 5, 4))
    masks = labels.class_masks(label, entry.members).float()
    outputs = (2 * masks - 1) * torch.rand_like(masks).clamp(min=0.1)
    found = labels.label_scores(outputs, entry).argmax(1, keepdim=True)
    assert torch.equal(found, label)
    assert torch.equal(labels.label_scores(outputs, data.get("btcv")), outputs)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.lists(st.integers(1, 300), min_size=1, max_size=3, unique=True),
        min_size=1,
        max_size=5,
        unique_by=tuple,  # two names of one value are refused
    )
)
def test_values_of_files_come_back_whatever_the_classes(values):
    entry = dataclasses.replace(
        data.get("hippocampus"),
        classes=tuple(f"class {k}" for k in range(len(values))),
        label_values=tuple(map(tuple, values)),
    )
    stored = np.resize([0, *entry.values], (3, 4, 5))
    encoded = labels.encode(stored, entry)
    np.testing.assert_array_equal(labels.decode(encoded, entry), stored)
    masks = labels.class_masks(torch.from_numpy(encoded)[None, None], entry.members)[0]
    for mask, of in zip(masks, values, strict=True):
        np.testing.assert_array_equal(mask, np.isin(stored, of))


# --- Bad input ------------------------------------------------------------------------------------


def _edit(name: str, change):
    """A folder in which one case's file was changed: `change` gets array and affine and returns both."""

    def spoil(folder: Path) -> None:
        path = folder / name
        array, affine = scans.read(path)
        write(path, *change(array, affine))

    return spoil


def _set(value):
    def change(array, affine):
        array[1, 2, 3] = value
        return array, affine

    return change


def _json(**changes):
    def spoil(folder: Path) -> None:
        stated = json.loads((folder / "dataset.json").read_text()) | changes
        (folder / "dataset.json").write_text(json.dumps(stated))

    return spoil


def _write(name: str, content: bytes = b""):
    def spoil(folder: Path) -> None:
        (folder / name).write_bytes(content)

    return spoil


def _truncate(name: str):
    def spoil(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])

    return spoil


def _remove(*names: str):
    def spoil(folder: Path) -> None:
        for name in names:
            for path in folder.glob(name):
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    return spoil


def _copy(name: str, to: str):
    return lambda folder: shutil.copy(folder / name, folder / to)


IMAGE, LABEL = "imagesTr/case_1_0000.nii.gz", "labelsTr/case_1.nii.gz"
LONG = "labelsTr/" + 42 * "ä日" + ".nii.gz"
BAD_FOLDERS = {
    "truncated gzip": (_truncate(IMAGE), f"{IMAGE}: cannot be read"),
    "wrong magic": (_write(IMAGE, b"no image" * 99), f"{IMAGE}: cannot be read"),
    "empty file": (_write(LABEL), f"{LABEL}: cannot be read"),
    "unreadable": (
        lambda folder: (_remove(LABEL)(folder), (folder / LABEL).mkdir()),
        f"{LABEL}: expected the files of one DICOM series, got 0",
    ),
    "link to nothing": (
        lambda folder: (_remove(LABEL)(folder), (folder / LABEL).symlink_to("nowhere")),
        f"{LABEL}: no such file",
    ),
    "2D": (_edit(LABEL, lambda a, m: (a[0], m)), f"{LABEL}: expected 3 dimensions"),
    "4D": (_edit(IMAGE, lambda a, m: (np.stack([a, a], -1), m)), f"{IMAGE}: expected 3 dimensions"),
    "shapes differ": (_edit(LABEL, lambda a, m: (a[1:], m)), f"{LABEL}: its shape is (14, 22, 18)"),
    "affines differ": (
        _edit(LABEL, lambda a, m: (a, 2 * m)),
        f"{LABEL}: its affine is not that of",
    ),
    "NaN": (_edit(IMAGE, _set(np.nan)), f"{IMAGE}: 1 voxels are NaN or infinite"),
    "infinite": (_edit(IMAGE, _set(np.inf)), f"{IMAGE}: 1 voxels are NaN or infinite"),
    "constant": (_edit(IMAGE, lambda a, m: (0 * a, m)), f"{IMAGE}: every voxel has the same value"),
    "unknown label": (
        _edit(LABEL, _set(7)),
        f"{LABEL}: unknown label values [7]; expected 0 background, 1 liver, 2 tumour",
    ),
    "fraction": (
        _edit(LABEL, _set(0.5)),
        f"{LABEL}: unknown label values [0.5]; expected 0 background",
    ),
    "negative label": (_edit(LABEL, _set(-1)), f"{LABEL}: unknown label values [-1]"),
    "image for label": (
        lambda folder: (_copy(IMAGE, LABEL)(folder), _remove("dataset.json")(folder)),
        f"{LABEL}: unknown label values",
    ),
    "two of one name": (_copy(LABEL, "labelsTr/case_1.nii"), "two files of one name"),
    "label without image": (_remove(IMAGE), f"{LABEL}: no image of this name in"),
    "image without label": (_remove(LABEL), f"{IMAGE}: no label of this name in"),
    "channel missing": (
        _json(channel_names={"0": "T1", "1": "T2"}),
        "case_0_0000.nii.gz: expected 2 channels; case_0_0001 missing",
    ),
    "channels with a gap": (
        _copy(IMAGE, IMAGE.replace("_0000", "_0002")),
        f"{LABEL}: expected images case_1_0000, case_1_0001 and so on; got case_1_0000",
    ),
    "no images": (_remove("imagesTr"), "imagesTr: no such folder beside"),
    "very long name": (_copy(LABEL, LONG), f"{LONG}: no image of this name"),
    "name too long": (
        lambda f: (_copy(LABEL, LONG)(f), _copy(IMAGE, LONG.replace("labels", "images"))(f)),
        f"{LONG}: expected the name of a scan with at most 200 bytes",
    ),
    "empty folder": (_remove("*"), "expected imagesTr/ and labelsTr/, images/ and labels/, or"),
    "no cases": (_remove("*Tr/*"), "no labelled cases"),
    "one case": (_remove("*Tr/case_[1-4]*"), "expected two cases or more"),
    "a class that no case has": (
        _json(labels={"background": 0, "liver": 1, "tumour": 2, "cyst": 3}),
        "no case has cyst",
    ),
    "empty masks": (
        lambda folder: [
            _edit(f"labelsTr/case_{n}.nii.gz", lambda a, m: (0 * a, m))(folder) for n in range(5)
        ],
        "no case has liver, tumour",
    ),
    "no JSON": (_write("dataset.json", b"{"), "dataset.json: expected JSON"),
    "JSON of another kind": (_write("dataset.json", b"[]"), "dataset.json: expected an object"),
    "labels of another kind": (_json(labels=[1, 2]), "not as the Decathlon or nnU-Net write it"),
    "label to ignore": (
        _json(labels={"background": 0, "liver": 1, "tumour": 2, "ignore": 3}),
        "'ignore' is not supported",
    ),
}


@pytest.mark.parametrize("kind", BAD_FOLDERS)
def test_a_bad_folder_is_one_message_that_names_the_file_and_status_2(places, kind):
    spoil, message = BAD_FOLDERS[kind]
    folder = write_nnunet(places / "scans")
    spoil(folder)
    with pytest.raises(DataError) as caught:
        data.get(str(folder))
    assert message in str(caught.value)
    assert str(folder) in str(caught.value)
    result = CliRunner().invoke(cli.app, ["data", "check", str(folder)])
    assert (result.exit_code, result.output) == (2, f"{caught.value}\n")
    assert not (places / "results").exists()


def test_a_class_that_only_a_held_out_case_has_is_refused_before_training(places):
    folder = write_pairs(places / "scans", values=(1,))
    (held_out,) = data.open(str(folder)).split().test
    _, label = scan(9, values=(1, 2))
    write(folder / "labels" / f"{held_out}.nii.gz", label, AFFINE)
    plans._loaded.cache_clear()  # as in a new process, which looks at the files again
    config = runs.RunConfig(str(folder), steps=1)
    data.open(str(folder)).check()
    with pytest.raises(
        DataError, match="no training case of fold 0 has label 2; expected each class"
    ):
        train.train(config)
    assert not runs.run_dir(config).exists()


def test_one_empty_mask_is_no_fault(places):
    folder = write_pairs(places / "scans")
    write(folder / "labels" / "case_0.nii.gz", np.zeros(SHAPE, np.uint8), AFFINE)
    data.open(str(folder)).check()
    assert not data.open(str(folder)).load("case_0")["label"].any()


def test_names_of_any_script_and_of_200_bytes_work(places):
    folder = write_pairs(places / "scans", cases=2)
    for number, name in enumerate(("日本語 ß", "1." + 31 * "日本" + "_long_ä")):
        for kind in ("images", "labels"):
            path = folder / kind / f"case_{number}.nii.gz"
            path.rename(path.with_name(f"{name}.nii.gz"))
    for case_id in [case.id for case in data.open(str(folder)).cases]:
        assert data.open(str(folder)).load(case_id)["image"].shape == (1, *SHAPE)


def test_numbers_that_begin_with_0_are_names(places):
    folder = write_pairs(places / "scans", cases=2)
    for path in sorted(folder.glob("*/*")):
        path.rename(path.with_name(path.name.replace("case_", "00")))
    assert data.open(str(folder)).summary()["case"].tolist() == ["000", "001"]


def test_as_many_labels_as_eight_bits_hold(tmp_path):
    label = scans.Scan(np.arange(256.0), np.eye(4))
    assert labels.values_in(tmp_path, label) == [*range(1, 256)]
    with pytest.raises(DataError, match="expected whole numbers, one for each of a few classes"):
        labels.values_in(tmp_path, label._replace(array=np.arange(1, 257.0)))


@pytest.mark.parametrize("name", ["spine", "no/such/folder"])
def test_neither_a_name_nor_a_folder(places, name):
    with pytest.raises(
        ValueError, match=f"unknown data set '{name}'; choose from mni152, .* or give"
    ):
        data.get(name)


@pytest.mark.parametrize("name", ["brats", "btcv"])
def test_what_cannot_be_downloaded_says_how_to_get_it(places, name):
    with pytest.raises(DataError, match="register at Synapse"):
        data.download(name)
    with pytest.raises(FileNotFoundError, match="register at Synapse"):
        data.open(name)


FAULTY = st.sampled_from(["shape", "affine", "value", "fraction", "nan", "constant"])


@settings(max_examples=25, deadline=None)
@given(faults=st.dictionaries(st.integers(0, 3), FAULTY, max_size=4))
def test_check_finds_exactly_the_spoiled_cases(faults, tmp_path_factory):
    """Whatever is wrong with whichever cases: each has its line, and no other has one."""
    folder = write_pairs(tmp_path_factory.mktemp("scans"), cases=4)
    changes = {
        "shape": ("labels", lambda a, m: (a[:-1], m)),
        "affine": ("labels", lambda a, m: (a, m + np.eye(4, k=3))),
        "value": ("labels", _set(3.0)),
        "fraction": ("labels", _set(0.25)),
        "nan": ("images", _set(np.nan)),
        "constant": ("images", lambda a, m: (0 * a + 3, m)),
    }
    for number, fault in faults.items():
        kind, change = changes[fault]
        _edit(f"{kind}/case_{number}.nii.gz", change)(folder)
    known = {1: "a", 2: "b"}
    found, lines = set(), []
    for number, case in enumerate(plans.standard(folder).cases):
        try:
            _, label = scans.read_case(case.images, case.label, 1)
            labels.values_in(case.label, label, known)
        except DataError as error:
            found.add(number)
            lines += [(number, line) for line in str(error).splitlines()]
    assert found == set(faults)
    assert all(f"case_{number}" in line for number, line in lines)


def test_windows_survive_json():
    entry = data.get("spleen")
    again = Entry(**tuples(json.loads(json.dumps(dataclasses.asdict(entry)))))
    assert Window(*again.normalisation[0]) == entry.normalisation[0]
    image = np.linspace(-100, 200, 27).reshape(3, 3, 3)
    for one, other in zip(entry.normalisation, again.normalisation, strict=True):
        np.testing.assert_array_equal(scans.normalise(image, one), scans.normalise(image, other))
