"""Each error that a user can meet: one line that names file or option and what was expected, status 2, no traceback."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from scan_files import AFFINE, scan, write, write_pairs
from typer.testing import CliRunner

from srlib import cli, data, errors, files
from srlib.book import collection
from srlib.data import plans, scans
from srlib.net import model
from srlib.run import runs, train
from srlib.study import grid

SMALL = ("--model", "tiny", "--steps", "2", "--batch-size", "1", "--patch", "36", "8", "8")


@pytest.fixture(scope="module")
def once(tmp_path_factory):
    """A folder of cases, a cache that knows it, and the run of a network that was trained on it."""
    root = tmp_path_factory.mktemp("errors")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("CACHE", "RESULTS"):
            patch.setenv(f"SRLIB_{name}", str(root / name.lower()))
        patch.setattr(runs, "step_memory", lambda *network: (0.1, 3e-7))
        write_pairs(root / "scans")
        said = invoke("train", "--data", root / "scans", *SMALL)
        assert said.exit_code == 0, said.output
        (run,) = root.glob("results/runs/*")
        yield root, run


@pytest.fixture
def place(once, tmp_path, monkeypatch):
    """A copy of all that is in `once`, to be spoiled."""
    root, run = once
    shutil.copytree(root, tmp_path, dirs_exist_ok=True)
    for name in ("CACHE", "RESULTS"):
        monkeypatch.setenv(f"SRLIB_{name}", str(tmp_path / name.lower()))
    monkeypatch.setenv("SRLIB_DATA", str(tmp_path))
    monkeypatch.setattr(runs, "step_memory", lambda *network: (0.1, 3e-7))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").symlink_to(tmp_path / run.relative_to(root))
    return tmp_path


def invoke(*arguments):
    return CliRunner().invoke(cli.app, list(map(str, arguments)))


def refused(result, *expected: str) -> None:
    """Assert that a command ended as this file's first line says."""
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    line = result.stderr.strip().splitlines()[0]
    assert all(word in line for word in expected), line
    print(line)  # pytest -rP shows how each is said


PREDICT = ("predict", "run", "--out", "masks")
TRAIN = ("train", "--data", "scans", *SMALL)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((*TRAIN, "--seed", "-1"), ["'--seed'", "0"]),
        (("collection", "--seed", "-1"), ["'--seed'", "0"]),
        ((*TRAIN, "--patch", "-36", "8", "8"), ["patch_size", "three positive numbers"]),
        ((*TRAIN, "--patch", "8", "8", "8"), ["(8, 8, 8)", "at least one axis", "33 voxels"]),
        ((*TRAIN, "--batch-size", "0"), ["'--batch-size'", "1"]),
        ((*TRAIN, "--patch", "8"), ["'--patch'", "3 arguments"]),
        (("train", "--data", "loop"), ["loop"]),
        (("data", "plan", "loop"), ["loop"]),
        ((*PREDICT, "loop"), ["loop: no such file"]),
        (("trian",), ["'trian'", "'train'"]),
        (("predict", "run", "scan.nii"), ["'--out'", "predict -h"]),
    ],
    ids=lambda value: " ".join(map(str, value)),
)
def test_a_wrong_option_or_path(place, arguments, expected):
    (place / "loop").symlink_to("loop")
    refused(invoke(*arguments), *expected)


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ("cuda", "0 CUDA device(s)"),
        ("cuda:1", "0 CUDA device(s)"),
        ("gpu", "expected cpu, cuda or cuda:N"),
    ],
)
def test_a_device_that_is_not_here(place, monkeypatch, asked, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("SRLIB_DEVICE", asked)
    write(place / "scan.nii", scan(0)[0], AFFINE)
    for command in (TRAIN, (*PREDICT, "scan.nii"), ("evaluate", "run")):
        refused(invoke(*command), f"SRLIB_DEVICE={asked}", expected)


OUT_OF_MEMORY = [
    MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"),
    RuntimeError("could not create a primitive"),  # oneDNN
    RuntimeError("std::bad_alloc"),
    OSError(12, "Cannot allocate memory"),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has"),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=str)
def test_out_of_memory(place, monkeypatch, error):
    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr(train, "_train", fail)
    refused(
        invoke(*TRAIN, "--steps", "3"), "out of memory", "lower --patch or --batch-size", "--model"
    )
    write(place / "scan.nii", scan(0)[0], AFFINE)
    monkeypatch.setattr("srlib.run.predict.scores_by_slab", fail)
    refused(invoke(*PREDICT, "scan.nii"), "scan: out of memory", "smaller --patch or --model")


def test_more_memory_than_any_machine_has(place):
    patch = ("--patch", "400000", "400000", "40000")
    refused(invoke(*TRAIN, *patch), "out of memory", "lower --patch")


def test_steps_without_end_begin_at_once(place, monkeypatch):
    """Nothing that is made beforehand is as long as the training."""

    def begun(config, step):
        raise OSError(f"step {step}")

    monkeypatch.setattr(train, "learning_rate", begun)
    started = time.monotonic()
    refused(invoke(*TRAIN, "--steps", "200000000"), "step 0")
    assert time.monotonic() - started < 20


def not_a_notebook(path: Path) -> None:
    path.write_text("[1, 2]")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def binary(path: Path) -> None:
    path.write_bytes(bytes(range(256)))


@pytest.mark.parametrize("spoil", [empty, cut, binary, not_a_notebook])
@pytest.mark.parametrize(
    ("pattern", "arguments"),
    [
        ("cache/plans/*.json", ("data", "check", "scans")),
        ("run/evaluation.json", ("evaluate", "run")),
    ],
)
def test_a_broken_cache_is_named_and_made_again(place, pattern, arguments, spoil, caplog):
    assert invoke(*arguments).exit_code == 0  # makes it
    file = max(place.glob(pattern), key=lambda made: made.stat().st_mtime_ns)
    before = file.read_bytes()
    spoil(file)
    plans._loaded.cache_clear()
    caplog.clear()
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    (said,) = [record.getMessage() for record in caplog.records if record.name == "srlib"]
    assert file.name in said
    assert said.endswith("it is made again")
    assert file.read_bytes() == before


@pytest.mark.parametrize("change", ["missing", "of another shape"])
def test_weights_that_are_not_the_networks(place, change):
    file = place / "run" / "model.safetensors"
    weights, about = files.load_tensors(file)
    name = next(iter(weights))
    weights |= {name: torch.zeros(3)}
    if change == "missing":
        del weights[name]
    files.save_tensors(file, weights, about)
    write(place / "scan.nii", scan(0)[0], AFFINE)
    refused(
        invoke(*PREDICT, "scan.nii"),
        f"run/{file.name}",
        "weights are not those",
        name,
        "Missing key" if change == "missing" else "size mismatch",
    )


@pytest.fixture(scope="module")
def collected(tmp_path_factory):
    """A run of the collection with one small notebook, as `srlib.book.collection` leaves it."""
    root = tmp_path_factory.mktemp("collected")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SRLIB_RESULTS", str(root))
        plan = collection.plan("smoke", "mni152", ["00"])
        entry = {"stamp": "0", "seconds": 1.0, "outputs": []}
        plan.executed(plan.notebooks[0]).parent.mkdir(parents=True)
        shutil.copy(plan.notebooks[0], plan.executed(plan.notebooks[0]))
        collection._record(plan, plan.notebooks[0], entry)
    return root


@pytest.mark.parametrize("spoil", [empty, cut, binary, not_a_notebook])
@pytest.mark.parametrize("name", ["manifest.json", "notebooks/00_start_here.ipynb"])
def test_what_the_collection_reads_again(collected, tmp_path, monkeypatch, name, spoil):
    shutil.copytree(collected, tmp_path, dirs_exist_ok=True)
    monkeypatch.setenv("SRLIB_RESULTS", str(tmp_path))
    monkeypatch.setattr(collection, "stamp", lambda *arguments: "0")
    monkeypatch.setattr(collection, "execute", lambda *arguments: 1.0)
    monkeypatch.setattr(data.Dataset, "check", lambda *arguments: None)
    file = tmp_path / "smoke" / "mni152" / name
    spoil(file)
    what = "notebook" if file.suffix == ".ipynb" else "manifest"
    refused(
        invoke("collection", "--profile", "smoke", "--only", "00"),
        f"{file}: expected a {what}",
        "remove it",
    )


def test_a_manifest_whose_entry_lacks_something(collected, tmp_path, monkeypatch):
    shutil.copytree(collected, tmp_path, dirs_exist_ok=True)
    monkeypatch.setenv("SRLIB_RESULTS", str(tmp_path))
    file = tmp_path / "smoke" / "mni152" / "manifest.json"
    manifest = json.loads(file.read_text())
    del manifest["notebooks"]["00_start_here"]["stamp"]
    file.write_text(json.dumps(manifest))
    refused(invoke("verify", "--profile", "smoke"), f"{file}: expected", "'stamp', a str")


def test_the_folder_of_a_dicom_series_is_named_by_a_dot(place, monkeypatch):
    write(place / "series", scan(0)[0].astype(np.int16), AFFINE)
    monkeypatch.chdir(place / "series")
    result = invoke("predict", place / "run", ".", "--out", place / "masks")
    assert result.exit_code == 0, result.output
    assert [file.name for file in (place / "masks").iterdir()] == ["series.nii.gz"]


def test_names_that_are_not_utf_8(place):
    """Before anything is computed."""
    bad = os.fsdecode(b"bad-\xff.nii")
    image, label = scan(0)
    write(place / "scan.nii", image, AFFINE).rename(place / bad)
    refused(invoke(*PREDICT, bad), r"bad-\udcff.nii", "expected a name in UTF-8")
    for folder, array in (("images", image), ("labels", label)):
        write(place / "scan.nii", array, AFFINE).rename(place / "scans" / folder / bad)
    refused(invoke(*TRAIN), r"bad-\udcff.nii", "expected a name in UTF-8")
    (place / "scans").rename(place / os.fsdecode(b"\xff"))
    refused(
        invoke("train", "--data", os.fsdecode(b"\xff"), *SMALL),
        r"\udcff",
        "expected a name in UTF-8",
    )


def test_images_that_are_removed_during_a_training(place, monkeypatch):
    before = train.learning_rate

    def remove(config, step):
        if step:
            shutil.rmtree(place / "cache" / "cases", ignore_errors=True)
            shutil.rmtree(place / "scans")
        return before(config, min(step, 1))

    monkeypatch.setattr(train, "learning_rate", remove)
    refused(invoke(*TRAIN, "--steps", "3"), str(place))


@pytest.mark.parametrize(
    ("ending", "key"),
    [
        (".nhdr", "data file: "),
        (".nhdr", "datafile: "),
        (".nhdr", "data file: LIST\n"),
        (".mhd", "ElementDataFile = "),
        (".mhd", " ElementDataFile: "),
        (".mhd", "ElementDataFile = LIST\n"),
    ],
)
@pytest.mark.parametrize("elsewhere", ["../secret.raw", "{}/secret.raw", "x/../../secret.raw"])
def test_a_header_whose_voxels_are_elsewhere(tmp_path, ending, key, elsewhere):
    """Only what is beside a header is read: a data set could show a file of the user's as its image."""
    header = write(tmp_path / "in" / f"scan{ending}", scan(0)[0], AFFINE)
    lines = header.read_text().splitlines(keepends=True)
    assert scans.read(header).array.shape == scan(0)[0].shape
    (raw,) = set(header.parent.iterdir()) - {header}
    shutil.move(raw, tmp_path / "secret.raw")
    named = elsewhere.format(tmp_path)
    header.write_text("".join([*lines[:-1], key, named, "\n"]))
    with pytest.raises(scans.DataError, match=r"expected a file beside it") as refusal:
        scans.read(header)
    assert str(header) in str(refusal.value)
    assert named in str(refusal.value)


def test_an_empty_batch():
    network = model.SegResMamba(1, 2, model.FEATURES["tiny"])
    with pytest.raises(ValueError, match="B > 0"):
        network(torch.zeros(0, 1, 36, 8, 8))


def test_slurm_without_its_programs(monkeypatch, tmp_path):
    pytest.importorskip("submitit")
    monkeypatch.setenv("PATH", str(tmp_path))
    refused(invoke("grid", "rates", "--executor", "slurm"), "--executor slurm", "sbatch")


def test_a_full_disk_in_the_words_of_a_library(tmp_path, monkeypatch):
    """PyTorch, ITK and safetensors say neither that the disk is full nor which file they wrote."""
    monkeypatch.setattr(files, "SPARE", shutil.disk_usage(tmp_path).total)
    with (
        pytest.raises(OSError, match="No space left on device") as refusal,
        files.atomic_path(tmp_path / "x.nrrd"),
    ):
        raise RuntimeError("writing failed")
    assert (
        errors.line(refusal.value)
        == f"{tmp_path / 'x.nrrd'}: No space left on device; free some space"
    )


# --- What is not known ----------------------------------------------------------------------------


def test_a_fault_of_ours_leaves_a_report(place, monkeypatch):
    monkeypatch.setattr("srlib.run.predict.load", lambda path: np.zeros(2) @ np.zeros(3))
    result = invoke(*PREDICT, "scan.nii")
    assert result.exit_code == 1
    (said,) = result.stderr.splitlines()
    (report,) = place.glob("results/error-*.txt")
    assert said.startswith("a fault of srlib: ValueError: matmul: ")
    assert said.endswith(f"; report: {report}")
    text = report.read_text()
    assert str(list(map(str, (*PREDICT, "scan.nii")))) in text
    assert "Traceback" in text
    assert f"torch {torch.__version__}" in text
    assert len(text) < 20_000


def test_a_report_goes_where_it_can_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("SRLIB_RESULTS", str(tmp_path / "file"))
    monkeypatch.setattr(errors.tempfile, "gettempdir", lambda: str(tmp_path))
    assert errors.tell(KeyError("x"), ["info"]) == 1
    (report,) = tmp_path.glob("error-*.txt")
    assert "KeyError" in report.read_text()


def test_what_a_loading_process_hands_on_is_its_last_line():
    error = OSError(
        "Caught OSError in process 0.\nTraceback (most recent call last):\n  x\nOSError: gone"
    )
    assert errors.line(error) == "OSError: gone"


# --- Ctrl-C ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ImportError("broken off")])
def test_ctrl_c_within_a_command(monkeypatch, error):
    """Also where it broke off something else."""

    def fail(*arguments):
        try:
            raise KeyboardInterrupt
        finally:
            raise error

    monkeypatch.setattr("srlib.machine.describe", fail)
    result = invoke("info")
    assert result.exit_code == 130
    assert result.stderr == f"{errors.STOPPED}\n"


def test_ctrl_c_while_modules_are_imported(tmp_path):
    """From the first module of the program on, here one that stands for a slow one."""
    (tmp_path / "typer").mkdir()
    (tmp_path / "typer" / "__init__.py").write_text(
        "import time; print(1, flush=True); time.sleep(60)"
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "srlib", "info"],
        cwd=files.ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(files.ROOT)])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stdout.readline() == "1\n"
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said == f"{errors.STOPPED}\n"


@pytest.mark.parametrize("spoil", [cut, binary, not_a_notebook])
def test_records_of_runs_that_are_broken(tmp_path, monkeypatch, spoil):
    monkeypatch.setattr(files, "REFERENCE", tmp_path)
    (tmp_path / grid.DATASET).mkdir()
    for name in ("runs.jsonl", "runs.csv"):
        (tmp_path / grid.DATASET / name).write_text('{"run": "a"}\n')
    spoil(tmp_path / grid.DATASET / "runs.jsonl")
    refused(
        invoke("grid", "rates", "--list"),
        f"{tmp_path}/{grid.DATASET}/runs.jsonl: expected the records of finished runs",
    )


@pytest.mark.parametrize("spoil", [empty, cut, binary, not_a_notebook])
def test_the_record_of_a_run_that_is_broken(place, spoil):
    spoil(place / "run" / "run.json")
    with pytest.raises(ValueError, match=r"run\.json: expected the record of a run"):
        files.read_json(place / "run" / "run.json", "the record of a run", run=str)
