"""Files that were spoilt are told apart, caches are made again, and what is visible is on the disk."""

import json
import os
import stat
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scan_files import write_pairs

from srlib import data, tables
from srlib import files as paths
from srlib.data import plans, scans
from srlib.run import predict, runs

CONTENT = {"b": [0.1, 1e-300], "a": "ä"}
TENSORS = {"x": torch.arange(64.0).view(8, 8), "y": torch.tensor(3)}


def damaged(file: Path, at: float = 0.5) -> None:
    """Eight bytes are others than were written."""
    found = bytearray(file.read_bytes())
    for k in range(8):
        found[int(at * (len(found) - 8)) + k] ^= 0xFF
    file.write_bytes(found)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-5])


def emptied(file: Path) -> None:
    file.write_bytes(b"")


SPOILT = [damaged, lambda file: damaged(file, 0.05), lambda file: damaged(file, 0.99), cut, emptied]


@pytest.mark.parametrize("spoil", SPOILT)
def test_a_file_that_was_spoilt_is_told(tmp_path, spoil):
    for file, save, load in (
        (
            tmp_path / "a.safetensors",
            lambda p: paths.save_tensors(p, TENSORS, CONTENT),
            paths.load_tensors,
        ),
        (tmp_path / "a.json", lambda p: paths.save_json(p, CONTENT), paths.load_json),
    ):
        save(file)
        load(file)
        spoil(file)
        with pytest.raises(paths.BrokenFile, match=file.name):
            load(file)


def test_what_is_written_comes_back(tmp_path):
    paths.save_json(tmp_path / "a", CONTENT)
    assert paths.load_json(tmp_path / "a") == CONTENT
    paths.save_tensors(tmp_path / "b", TENSORS, CONTENT)
    tensors, about = paths.load_tensors(tmp_path / "b")
    assert about == CONTENT
    assert all(torch.equal(tensors[name], TENSORS[name]) for name in TENSORS)


@pytest.mark.parametrize("spoil", SPOILT)
def test_every_cache_is_made_again_when_it_is_broken(tmp_path, monkeypatch, spoil, caplog):
    monkeypatch.setenv("SRLIB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(runs, "step_memory", lambda *network: (0.1, 3e-7))
    name = str(write_pairs(tmp_path / "scans", cases=2))

    def everything():
        plans._loaded.cache_clear()
        data.open(name).check()
        samples = data.TrainingSamples(
            data.open(name), [case.id for case in data.open(name).cases], (8, 8, 8), 1, 4, seed=0
        )
        arrays = [data.open(name).load("case_0")["image"], *(s["image"] for s in samples)]
        return (
            data.get(name),
            data.open(name).fingerprint,
            data.open(name).summary().to_dict(),
            arrays,
        )

    expected = everything()
    files = [file for file in (tmp_path / "cache").rglob("*") if file.is_file()]
    assert len(files) == 6  # plan, checks, fingerprint, summary, two cases
    for file in files:
        spoil(file)
    found = everything()
    assert found[:3] == expected[:3]
    assert all(torch.equal(*pair) for pair in zip(found[3], expected[3], strict=True))
    assert {file.name for file in files} == {
        Path(record.args[0].args[0].split(":")[0]).name for record in caplog.records
    }


def test_a_case_that_breaks_while_it_is_trained_on_is_made_again_of_the_same_files(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("SRLIB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(runs, "step_memory", lambda *network: (0.1, 3e-7))
    name = str(write_pairs(tmp_path / "scans", cases=2))
    before, samples, late = (
        data.TrainingSamples(data.open(name), ["case_0"], (8, 8, 8), 1, 4, seed=0) for _ in range(3)
    )
    before = before[1]["image"]
    (file,) = (tmp_path / "cache" / "cases").rglob("*.safetensors")
    damaged(file)
    assert torch.equal(samples[1]["image"], before)
    damaged(file)
    os.utime(tmp_path / "scans" / "images" / "case_0.nii.gz")
    with pytest.raises(scans.DataError, match=r"case_0\.nii\.gz: it or its label has changed"):
        late[1]


@pytest.mark.parametrize("spoil", [*SPOILT, Path.unlink])
def test_a_folder_of_a_cache_is_made_again_when_a_file_in_it_is_broken(
    tmp_path, monkeypatch, spoil
):
    def write(folder: Path) -> None:
        (folder / "in").mkdir()
        (folder / "in" / "scan").write_bytes(bytes(range(1, 200)))

    folder = paths.cached_folder(tmp_path / "set", write)
    before = (folder / "in" / "scan").stat().st_mtime_ns
    monkeypatch.setattr(paths, "_whole", set())  # another process
    paths.cached_folder(folder, write)
    assert (folder / "in" / "scan").stat().st_mtime_ns == before
    for name in ("in/scan", paths.LIST):
        spoil(folder / name)
        monkeypatch.setattr(paths, "_whole", set())
        paths.cached_folder(folder, write)
        assert (folder / "in" / "scan").read_bytes() == bytes(range(1, 200))


# --- Visible means on the disk --------------------------------------------------------------------


@pytest.fixture
def events(monkeypatch) -> list[tuple[str, str]]:
    """What is synced and renamed, in order, by name."""
    found: list[tuple[str, str]] = []
    sync, replace = os.fsync, Path.replace

    def fsync(handle):
        found.append(("sync", Path(f"/proc/self/fd/{handle}").readlink().name))
        sync(handle)

    def rename(self, target):
        found.append(("rename", Path(target).name))
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", rename)
    return found


needs_proc = pytest.mark.skipif(
    not Path("/proc/self/fd").is_dir(), reason="this system does not tell what a handle is open on"
)


@needs_proc
def test_a_file_is_on_the_disk_before_it_is_visible(tmp_path, events):
    with paths.atomic_path(tmp_path / "run.json") as temporary:
        temporary.write_text("{}")
    assert events == [("sync", temporary.name), ("rename", "run.json"), ("sync", tmp_path.name)]


@needs_proc
def test_a_folder_is_on_the_disk_before_it_is_visible(tmp_path, events):
    with paths.atomic_folder(tmp_path / "set") as partial:
        (partial / "in").mkdir()
        (partial / "in" / "scan").write_text("")
    names = [name for what, name in events[:3] if what == "sync"]
    assert sorted(names) == sorted([partial.name, "in", "scan"])
    assert events[3:] == [("rename", "set"), ("sync", tmp_path.name)]


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o002])
def test_files_have_the_rights_that_the_umask_leaves(tmp_path, mask):
    label = predict.Mask(np.zeros((4, 4, 4), np.uint8), np.eye(4))
    before = os.umask(mask)
    try:
        predict.write_mask(label, tmp_path, tmp_path / "mask.nii.gz")
        paths.save_tensors(tmp_path / "model.safetensors", TENSORS)
        paths.save_json(tmp_path / "fact", CONTENT)
        tables.write(pd.DataFrame({"a": [1]}), tmp_path / "table.csv")
        with paths.atomic_path(tmp_path / "checkpoint.pt") as temporary:
            torch.save(TENSORS, temporary)
        with paths.atomic_folder(tmp_path / "set"):
            pass
    finally:
        os.umask(before)
    rights = {file.name: stat.S_IMODE(file.stat().st_mode) for file in tmp_path.iterdir()}
    assert rights.pop("set") == 0o777 & ~mask
    assert rights == dict.fromkeys(rights, 0o666 & ~mask)
    assert len(rights) == 5
    assert json.loads((tmp_path / "fact").read_text())["content"] == CONTENT
