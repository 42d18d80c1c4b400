"""A MONAI bundle: MONAI verifies it, and runs it to the masks of `predict`."""

import gzip
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import monai.bundle
import nibabel as nib
import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from typer.testing import CliRunner

from srlib import cli, data
from srlib.export import bundle
from srlib.files import ROOT
from srlib.run import predict, train

TINY = predict.provided("hippocampus")
TEXT, OBJECT = {"type": "string"}, {"type": "object"}
VERSION = {"type": "string", "pattern": r"^\d+\.\d+\.\d+$"}
FORMAT = {
    "type": "object",
    "additionalProperties": {
        "type": "object",
        "properties": {
            "type": {"enum": ["image"]},
            "format": {"enum": ["magnitude", "labels", "classes"]},
            "num_channels": {"type": "integer", "minimum": 1},
            "spatial_shape": {"type": "array", "items": {"type": "integer"}, "minItems": 3},
            "dtype": TEXT,
            "value_range": {"type": "array"},
            "is_patch_data": {"type": "boolean"},
            "channel_def": {"type": "object", "additionalProperties": TEXT},
        },
    },
}
FORMAT["additionalProperties"]["required"] = [*FORMAT["additionalProperties"]["properties"]]
PROPERTIES = {
    "schema": TEXT,
    "version": VERSION,
    "monai_version": VERSION,
    "pytorch_version": VERSION,
    "numpy_version": VERSION,
    "optional_packages_version": OBJECT,
    "required_packages_version": OBJECT,
    "changelog": OBJECT,
    "task": TEXT,
    "description": TEXT,
    "authors": TEXT,
    "copyright": TEXT,
    "network_data_format": {
        "type": "object",
        "properties": {"inputs": FORMAT, "outputs": FORMAT},
        "required": ["inputs", "outputs"],
    },
}
# MONAI's specification of bundles as a schema. MONAI's own is a file on the web, which a test must not need.
SCHEMA = {"type": "object", "properties": PROPERTIES, "required": [*PROPERTIES]}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundle") / "tiny"
    said = CliRunner().invoke(cli.app, ["export", str(TINY), str(folder), "--to", "bundle"])
    assert said.exit_code == 0, said.output
    return folder


def run(folder: Path, config: str, *options: str) -> subprocess.CompletedProcess:
    """`python -m monai.bundle run` in the bundle, as its users do."""
    where = ["--config_file", f"configs/{config}.json", "--bundle_root", "."]
    command = [sys.executable, "-m", "monai.bundle", "run", *where, *options]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_monai_verifies_the_metadata_and_the_network(made, tmp_path):
    configs, schema = made / "configs", tmp_path / "schema.json"
    meta = str(configs / "metadata.json")
    schema.write_text(json.dumps(SCHEMA))
    monai.bundle.verify_metadata(meta_file=meta, filepath=str(schema))  # it is not downloaded again
    schema.write_text(json.dumps(SCHEMA | {"required": ["wings"]}))
    with pytest.raises(ValueError, match="schema"):
        monai.bundle.verify_metadata(meta_file=meta, filepath=str(schema))
    config = str(configs / "inference.json")
    monai.bundle.verify_net_in_out("network_def", meta_file=meta, config_file=config, device="cpu")
    wrong = {"_meta_#network_data_format#outputs#pred#num_channels": 4}
    with pytest.raises(ValueError, match="channel"):
        monai.bundle.verify_net_in_out(
            "network_def", meta_file=meta, config_file=config, device="cpu", **wrong
        )


def test_monai_runs_it_to_the_masks_of_predict(made, tmp_path):
    scans = tmp_path / "scans"
    scans.mkdir()
    noise = gaussian_filter(np.random.default_rng(0).standard_normal((40, 52, 36)), 3)
    affine = np.array([[0, 1.2, 0, 3], [-1, 0, 0, 2], [0, 0, 0.9, 1], [0, 0, 0, 1]])
    nib.save(nib.Nifti1Image(noise.astype(np.float32), affine), scans / "blobs.nii.gz")
    if "hippocampus" in data.catalog.present():
        images = data.catalog.find(data.get("hippocampus")) / "imagesTr"
        for case_id in train.load_trained(TINY).split.test[:2]:
            name = f"{case_id}.nii.gz"
            (scans / name).symlink_to(images / name)
    done = run(made, "inference", "--scans", str(scans), "--masks", str(tmp_path / "bundle"))
    assert done.returncode == 0, done.stderr[-3000:]
    ours = ["predict", str(TINY), str(scans), "--out", str(tmp_path / "predict")]
    assert CliRunner().invoke(cli.app, ours).exit_code == 0
    names = sorted(path.name for path in (tmp_path / "predict").iterdir())
    assert names == sorted(path.name for path in scans.iterdir())
    assert names == sorted(path.name for path in (tmp_path / "bundle").iterdir())
    for name in names:  # gzip's header has the time
        masks = [
            gzip.decompress((tmp_path / who / name).read_bytes()) for who in ("bundle", "predict")
        ]
        assert masks[0] == masks[1]
        assert np.unique(nib.load(tmp_path / "bundle" / name).dataobj).size > 1


def test_its_weights_are_plain_and_its_card_names_the_command(made):
    state = torch.load(made / "models" / "model.pt", weights_only=True)
    assert state.keys() == train.load_trained(TINY).weights.keys()
    assert "monai.bundle run" in (made / "docs" / "README.md").read_text()


def test_the_training_can_be_begun_again(made, monkeypatch, tmp_path):
    seen = []
    result = train.TrainResult(tmp_path, torch.nn.Identity(), None)
    monkeypatch.setattr(bundle, "train", lambda config: seen.append(config) or result)
    monai.bundle.run(config_file=str(made / "configs" / "train.json"), **{"config#steps": 3})
    assert seen == [replace(train.load_trained(TINY).config, steps=3)]


def test_regions_and_private_folders(tmp_path):
    trained = train.load_trained(TINY)
    entry = replace(trained.entry, label_values=((1, 2), (2,)), folder="/clinic", source="/clinic")
    config = replace(trained.config, dataset="/clinic")
    weights = {
        name: tensor[:, :2]
        if name == "head.weight"
        else tensor[:2]
        if name == "head.bias"
        else tensor
        for name, tensor in trained.weights.items()
    }
    known = trained._replace(config=config, entry=entry, weights=weights)
    train.save_trained(tmp_path / "model.safetensors", known)
    bundle.write(tmp_path / "model.safetensors", tmp_path / "bundle")
    texts = [
        path.read_text() for path in (tmp_path / "bundle").rglob("*.*") if path.suffix != ".pt"
    ]
    assert len(texts) == 4
    assert not any("clinic" in text for text in texts)
    about = json.loads((tmp_path / "bundle" / "configs" / "metadata.json").read_text())
    pred = about["network_data_format"]["outputs"]["pred"]
    assert (pred["format"], pred["channel_def"]) == ("classes", {"0": "anterior", "1": "posterior"})


@pytest.mark.parametrize("text", ["$__import__('os').abort()", "@network_def", "%5x"])
def test_a_text_that_monai_would_run_or_look_up_is_refused(tmp_path, text):
    trained = train.load_trained(TINY)
    for change in (
        {"entry": replace(trained.entry, modalities=(text,))},
        {"config": replace(trained.config, dataset=text)},
    ):
        file = tmp_path / "model.safetensors"
        train.save_trained(file, trained._replace(**change))
        with pytest.raises(ValueError, match="take for code or a reference"):
            bundle.write(file, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_what_cannot_be_segmented_ends_with_one_line(tmp_path):
    bundle.write(TINY, tmp_path / "bundle")
    known = json.loads((tmp_path / "bundle" / "configs" / "inference.json").read_text())
    model = predict.load(TINY).model
    arguments = model, model.state_dict(), torch.device("cpu"), known["data"], known["patch_size"]
    with pytest.raises(SystemExit, match=r"none\.nii\.gz"):
        bundle.infer(*arguments, str(tmp_path / "none.nii.gz"), str(tmp_path / "masks"))
