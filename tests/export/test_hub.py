"""A folder for a model hub: it is the network, says what was measured, and names nothing private."""

import hashlib
import json
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from srlib import SegResMamba, cli, files
from srlib.export import hub
from srlib.run import predict, train
from srlib.run.evaluate import stored_scores

TINY = predict.provided("hippocampus")


def export(*arguments):
    return CliRunner().invoke(cli.app, ["export", *map(str, arguments)])


@pytest.fixture
def folder(tmp_path):
    assert export(TINY, tmp_path / "hub", "--to", "hub").exit_code == 0
    return tmp_path / "hub"


def test_the_folder_is_the_network(folder):
    network, original = SegResMamba.from_pretrained(folder), predict.load(TINY).model
    assert not network.training
    image = torch.randn(1, 1, 40, 24, 33, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.equal(network(image), original(image))
    assert predict.load(folder).entry.classes == ("anterior", "posterior")  # `predict` takes it too


def test_the_card_says_what_was_measured_and_when_nothing_was(folder, tmp_path):
    assert hub.NOT_MEASURED in (folder / "README.md").read_text()
    for part in ("CC BY-SA 4.0", "Apache-2.0", "208 training cases", "no medical device"):
        assert part in (folder / "README.md").read_text()

    network = tmp_path / "run" / "model.safetensors"
    network.parent.mkdir()
    network.write_bytes(TINY.read_bytes())
    rows = [
        {"case": case, "class": name, "dice": dice, "nsd": 0.5, "hd95": 2.0}
        for name in ("anterior", "posterior")
        for case, dice in (("a", 0.25), ("b", 0.75))
    ]
    weights = hashlib.sha256(network.read_bytes()).hexdigest()
    for made_with, found in (({"network": weights}, True), ({"network": "another"}, False)):
        content = {"made_with": made_with | {"cases": ["a", "b"]}, "rows": rows}
        files.save_json(network.parent / "evaluation.json", content)
        assert (stored_scores(network) is not None) == found
        hub.write(network, tmp_path / str(found))
        text = (tmp_path / str(found) / "README.md").read_text()
        assert ("| anterior | 0.500 (0.354) | 0.500 (0.000) | 2.000 (0.000) |" in text) == found
    files.save_json(network.parent / "evaluation.json", content | {"rows": []})
    assert stored_scores(network) is None  # of an evaluation that was interrupted


@pytest.mark.parametrize("named", ["/clinic/Smith", "Smith"])  # as configured, perhaps relative
def test_a_private_folder_s_path_and_cases_are_not_published(tmp_path, named):
    trained = train.load_trained(TINY)
    config = replace(trained.config, dataset=named)
    place = dict.fromkeys(("name", "folder", "source"), "/clinic/Smith")
    entry = replace(trained.entry, title="folder Smith", how_to_get="/clinic/Smith", **place)
    file = tmp_path / "model.safetensors"
    train.save_trained(file, trained._replace(config=config, entry=entry))
    hub.write(file, tmp_path / "hub")
    for written in (tmp_path / "hub").iterdir():
        content = written.read_bytes()
        assert b"Smith" not in content, written.name
        assert b"hippocampus_" not in content, written.name  # its cases' names
    assert b"208 training cases" in (tmp_path / "hub" / "README.md").read_bytes()
    assert SegResMamba.from_pretrained(tmp_path / "hub")


def test_what_cannot_be_exported_is_refused(folder, tmp_path):
    for arguments, expected in (
        ((TINY, folder, "--to", "hub"), "is there already"),
        ((TINY, tmp_path / "x"), "--to hub"),
        ((TINY, tmp_path / "x", "--to", "keras"), "--to hub"),
        ((TINY, tmp_path / "x.onnx", "--to", "hub"), "--to hub"),
        ((tmp_path / "none", tmp_path / "x", "--to", "hub"), "no trained network"),
    ):
        result = export(*arguments)
        assert result.exit_code == 2
        assert expected in result.stderr
    trained = train.load_trained(TINY)
    peer = trained._replace(config=replace(trained.config, model="unet"))
    train.save_trained(tmp_path / "model.safetensors", peer)
    with pytest.raises(ValueError, match="'unet' is a peer"):
        hub.write(tmp_path / "model.safetensors", tmp_path / "x")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("name", "change", "expected"),
    [
        ("config.json", lambda file: file.unlink(), "config.json"),
        ("config.json", lambda file: file.write_text("{"), "config.json: expected arguments"),
        ("config.json", lambda file: changed(file, features=[16, 32, 64, 128]), "does not fit"),
        ("config.json", lambda file: changed(file, wings=2), "'wings'"),
        ("config.json", lambda file: changed(file, tom="none"), "tom is 'none', was None"),
        ("config.json", lambda file: changed(file, tom_residual=True), "tom_residual is True"),
        ("config.json", lambda file: changed(file, nslices=5), "nslices is 5, was None"),
        ("config.json", lambda file: changed(file, slice_axis=1), "slice_axis is 1, was 0"),
        (
            "config.json",
            lambda file: changed(file, expand=10**7),
            "does not fit",
        ),  # without its memory
        ("model.safetensors", lambda file: poisoned(file), "holds NaN or infinity"),
        ("model.safetensors", lambda file: file.write_bytes(file.read_bytes()[:999]), "model.safe"),
    ],
)
def test_a_folder_that_is_broken_is_named(folder, name, change, expected):
    change(folder / name)
    with pytest.raises((ValueError, FileNotFoundError), match=expected):
        SegResMamba.from_pretrained(folder)


def poisoned(file):
    weights, about = files.load_tensors(file)
    next(iter(weights.values())).view(-1)[0] = torch.nan
    files.save_tensors(file, weights, about)


@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_a_folder_of_somebody_else_is_left_and_told(tmp_path, monkeypatch, when):
    target = tmp_path / "hub"

    def theirs(*_):
        target.mkdir()
        (target / "theirs").touch()

    if when == "before":
        theirs()
    else:
        monkeypatch.setattr(hub, "save_trained", theirs)
    with pytest.raises(FileExistsError, match=r"hub: (is there already|was made meanwhile)"):
        hub.write(TINY, target)
    assert [path.name for path in target.iterdir()] == ["theirs"]
    assert [path.name for path in tmp_path.iterdir()] == ["hub"]


def changed(file, **arguments):
    file.write_text(json.dumps(json.loads(file.read_text()) | arguments))
