"""What can go wrong with checkpoints, disks and interruptions: one message, a status, nothing lost, no traceback.

Bad files of a data set are in test_images.py and test_data.py.
"""

import dataclasses
import fcntl
import math
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from srlib import cli, data
from srlib import files as paths
from srlib.book import collection
from srlib.run import runs, train
from srlib.run.runs import RunConfig

QUICK = RunConfig(
    "mni152", steps=2, model="tiny", batch_size=1, patch_size=(36, 20, 20), warmup=0.5
)
OPTIONS = ("--model", "tiny", "--steps", "2", "--batch-size", "1", "--patch", "36", "20", "20")


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The folder of a finished run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SRLIB_RESULTS", str(tmp_path_factory.mktemp("trained")))
        return train.train(QUICK).run_dir


@pytest.fixture
def results(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("SRLIB_RESULTS", str(tmp_path / "results"))
    return tmp_path / "results"


class Malicious:
    """Leaves a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def a_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps(Malicious(path.parent / "code was run")))


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def of_another_network(path: Path) -> None:
    save_file({"weight": torch.zeros(3)}, path)


def of_another_version(path: Path) -> None:
    found = train.load_trained(path)
    about = {"config": {"dataset": "mni152", "wings": 2}, "dataset": {}}
    paths.save_tensors(path, found.weights, about)


def with_a_lost_bit(path: Path) -> None:
    found = bytearray(path.read_bytes())
    found[-1000] ^= 4
    path.write_bytes(found)


def changed(change):
    """Spoils a network before it is written, so that its checksum is right."""

    def spoil(path: Path) -> None:
        train.save_trained(path, change(train.load_trained(path)))

    return spoil


def with_weights(found: train.Trained, change) -> train.Trained:
    name = sorted(found.weights)[0]
    return found._replace(weights=found.weights | {name: change(found.weights[name])})


def with_unknown_normalisation(path: Path) -> None:
    tensors, about = paths.load_tensors(path)
    about["dataset"]["normalisation"] = ["by rank"]
    paths.save_tensors(path, tensors, about)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (changed(lambda t: with_weights(t, lambda w: w * math.nan)), "holds NaN or infinity"),
        (changed(lambda t: with_weights(t, lambda w: w / 0)), "holds NaN or infinity"),
        (changed(lambda t: with_weights(t, torch.Tensor.double)), "is torch.float64; expected"),
        (changed(lambda t: with_weights(t, torch.Tensor.cfloat)), "is torch.complex64; expected"),
        (changed(lambda t: with_weights(t, lambda w: w[:-1])), "not those of the network"),
        (changed(lambda t: t._replace(weights={})), "not those of the network"),
        (with_unknown_normalisation, "unknown normalisation 'by rank'"),
    ],
)
def test_a_network_that_would_give_wrong_masks_is_refused_by_name(
    trained, tmp_path, spoil, message
):
    file = tmp_path / "model.safetensors"
    shutil.copy(trained / file.name, file)
    spoil(file)
    result = CliRunner().invoke(
        cli.app, ["predict", str(file), str(tmp_path), "--out", str(tmp_path / "masks")]
    )
    assert result.exit_code == 2
    assert len(result.output.splitlines()) == 1
    assert f"{file}: " in result.output
    assert message in result.output


def test_other_versions_are_told_where_a_network_is_read(trained, tmp_path, caplog):
    found = train.load_trained(trained)
    assert not caplog.records
    assert set(found.versions) == {"srlib", "torch", "monai", "numpy"}
    file = tmp_path / "model.safetensors"
    train.save_trained(file, found._replace(versions=found.versions | {"torch": "1.0+cpu"}))
    train.load_trained(file)
    (line,) = caplog.messages
    assert line.startswith(
        f"{file}: trained with torch 1.0+cpu, here is {torch.__version__.partition('+')[0]}"
    )


@pytest.mark.parametrize("command", ["info", "evaluate", "predict"])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (Path.unlink, "no trained network here: "),
        (truncated, "not a whole file of safetensors"),
        (a_pickle, "not a whole file of safetensors"),
        (with_a_lost_bit, "its content has another checksum than was written"),
        (of_another_network, "its metadata are not those of this version of srlib"),
        (of_another_version, "its metadata hold no run of this version of srlib"),
    ],
)
def test_a_trained_network_that_cannot_be_used(trained, tmp_path, spoil, message, command):
    file = tmp_path / "model.safetensors"
    shutil.copy(trained / file.name, file)
    spoil(file)
    more = [tmp_path / "scan.nii", "--out", tmp_path / "masks"] if command == "predict" else []
    result = CliRunner().invoke(cli.app, [command, str(file), *map(str, more)])
    assert result.exit_code == 2
    assert len(result.output.splitlines()) == 1
    assert message in result.output
    assert str(file) in result.output
    assert not (tmp_path / "code was run").exists()
    assert not (tmp_path / "masks").exists()


@pytest.mark.parametrize(
    ("name", "lines", "message"),
    [
        ("nothing", 1, "no such file or folder"),
        ("empty", 2, "expected the files of one DICOM series, got 0"),
        ("text.nii", 2, "cannot be read"),
    ],
)
def test_a_scan_that_cannot_be_segmented(trained, tmp_path, name, lines, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.nii").write_text("not a scan")
    result = predict(trained, tmp_path / name, tmp_path / "masks")
    assert result.exit_code == 2
    assert f"{tmp_path / name}: {message}" in result.stderr
    assert len(result.stderr.splitlines()) == lines
    assert not list(tmp_path.glob("masks/*"))


def test_masks_that_cannot_be_written(trained, tmp_path):
    """Before anything is computed."""
    (tmp_path / "masks").write_text("not a folder")
    result = predict(trained, data.open("mni152").cases[0].image, tmp_path / "masks")
    assert result.exit_code == 2
    assert len(result.stderr.splitlines()) == 1
    assert str(tmp_path / "masks") in result.stderr


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError(), "virtual_01: out of memory: "),
        (OSError(28, "No space left on device"), "virtual_01: No space left on device; free"),
        (RuntimeError("ITK:\n cannot write"), "virtual_01: a fault of srlib: RuntimeError: ITK:"),
    ],
)
def test_one_scan_that_fails_does_not_end_the_others(
    trained, tmp_path, monkeypatch, error, message
):
    scans = [case.image for case in data.open("mni152").cases[:2]]

    def segment(segmenter, files, *options):
        if files[0] == scans[0]:
            raise error

    monkeypatch.setattr("srlib.run.predict.segment", segment)
    monkeypatch.setattr(
        "srlib.run.predict.write_mask", lambda mask, like, path, overwrite: path.touch()
    )
    result = predict(trained, *scans, tmp_path / "masks")
    assert result.exit_code == 2
    first, second = result.stderr.splitlines()
    assert first.startswith(message)
    assert second == "1 of 2 cases could not be segmented"
    assert [file.name for file in (tmp_path / "masks").iterdir()] == ["virtual_02.nii.gz"]


def test_a_training_that_diverges(results, monkeypatch):
    monkeypatch.setattr(train, "learning_rate", lambda config, step: math.inf)
    result = CliRunner().invoke(cli.app, ["train", *OPTIONS])
    assert result.exit_code == 2
    assert result.stderr.startswith("step 1: loss or weights are no finite numbers any more")
    assert len(result.stderr.splitlines()) == 1


def predict(trained: Path, *scans_and_out: Path):
    """What the command says."""
    *scans, out = map(str, scans_and_out)
    return CliRunner().invoke(cli.app, ["predict", str(trained), *scans, "--out", out])


def test_equal_networks_are_equal_files(trained, tmp_path):
    """So that files tell whether a resumed training ends as an undisturbed one."""
    found = train.load_trained(trained)
    for k in range(8):
        train.save_trained(tmp_path / f"{k}.safetensors", found)
    contents = {path.read_bytes() for path in tmp_path.iterdir()}
    assert contents == {(trained / "model.safetensors").read_bytes()}


def a_state(path: Path, config: RunConfig = QUICK) -> None:
    """The checkpoint of a run that was interrupted after one step."""
    network = train.build_model(config)
    optimizer = torch.optim.AdamW(network.parameters())
    history = torch.tensor([[0, 1.0, 1e-3, 0.1]], dtype=torch.float64)
    state = {"model": network.state_dict(), "optimizer": optimizer.state_dict(), "history": history}
    train.save_state(path, config, state)


def a_truncated_state(path: Path) -> None:
    a_state(path)
    truncated(path)


def a_state_of_another_configuration(path: Path) -> None:
    a_state(path, dataclasses.replace(cli_config(), seed=3, tom="none"))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (a_truncated_state, "not a whole checkpoint of srlib"),
        (a_pickle, "not a whole checkpoint of srlib"),
        (Path.touch, "not a whole checkpoint of srlib"),
        (
            a_state_of_another_configuration,
            "the checkpoint of another configuration, it differs in seed, tom; move it away",
        ),
    ],
)
def test_a_state_that_cannot_be_resumed_from_is_left_where_it_is(results, make, message):
    config = cli_config()
    path = runs.run_dir(config) / "checkpoint.pt"
    path.parent.mkdir(parents=True)
    make(path)
    before = path.read_bytes()
    result = CliRunner().invoke(cli.app, ["train", *OPTIONS])
    assert result.exit_code == 2
    assert f"{path}: {message}" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert path.read_bytes() == before
    assert not (path.parent / "code was run").exists()


def cli_config() -> RunConfig:
    """What the command trains with `OPTIONS`."""
    return runs.config_for(
        "default",
        "mni152",
        model="tiny",
        steps=2,
        batch_size=1,
        patch_size=(36, 20, 20),
    )


# --- Disks ----------------------------------------------------------------------------------------


def start(
    *command: str, results: Path, mount: str = "", where: str = "RESULTS", **options
) -> subprocess.Popen:
    """Start the program; with `mount`, on a disk of that kind in the place of its results, or of its cache."""
    program = [sys.executable, "-m", "srlib", *command]
    if mount:
        results.mkdir()
        script = f'mount -t tmpfs -o {mount} none "$0" && exec "$@"'
        program = [
            "unshare",
            "--map-root-user",
            "--mount",
            "sh",
            "-c",
            script,
            str(results),
            *program,
        ]
    environment = os.environ | {f"SRLIB_{where}": str(results), "PYTHONPATH": path_with_srlib()}
    return subprocess.Popen(
        program,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **options,
    )


def path_with_srlib() -> str:
    return os.pathsep.join([str(paths.ROOT), os.environ["PYTHONPATH"]])


def can_mount() -> bool:
    command = ["unshare", "--map-root-user", "--mount", "mount", "-t", "tmpfs", "none", "/mnt"]
    return (
        bool(shutil.which("unshare"))
        and not subprocess.run(command, capture_output=True).returncode
    )


@pytest.mark.skipif(not can_mount(), reason="this system lets a user mount no disk of their own")
@pytest.mark.parametrize(
    ("mount", "where", "message"),
    [
        ("size=500k", "RESULTS", "could not be written; is the disk full?"),
        ("ro", "RESULTS", "Read-only file system"),
        ("size=100k", "CACHE", "No space left on device; free some space"),
    ],
    ids=["full", "read-only", "full cache"],
)
def test_a_disk_that_cannot_be_written(tmp_path, mount, where, message):
    process = start("train", *OPTIONS, results=tmp_path / "results", mount=mount, where=where)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 2
    told = [line for line in errors.splitlines() if message in line]
    assert len(told) == 1
    assert str(tmp_path / "results") in told[0]
    assert "Traceback" not in errors


def test_the_message_of_a_full_disk_names_the_file(tmp_path):
    """Python's own does not, where a file is open already. The file from before stays."""
    table = tmp_path / "table.csv"
    table.write_text("before")
    told = pytest.raises(OSError, match=r"No space left on device: .*table\.csv")
    with told, paths.atomic_path(table):
        raise OSError(28, "No space left on device")
    assert [file.name for file in tmp_path.iterdir()] == ["table.csv"]
    assert table.read_text() == "before"


# --- Interruptions --------------------------------------------------------------------------------


def test_ctrl_c_stops_a_training_within_seconds(tmp_path):
    process = start(
        "train",
        *(*OPTIONS, "--steps", "100000"),
        results=tmp_path,
        # a shell's job in the background ignores interrupts, and what it starts inherits that
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        while not list(tmp_path.glob("runs/*/.lock")):
            assert process.poll() is None
            time.sleep(0.1)
        time.sleep(1)
        asked = time.monotonic()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert time.monotonic() - asked < 30
    assert process.returncode == 130
    assert errors.splitlines()[-1].startswith("stopped; what was finished is kept")
    assert "Traceback" not in errors


def test_a_second_process_waits_for_the_first_and_trains_nothing_again(results, trained, capsys):
    folder = runs.run_dir(QUICK)
    waiting = threading.Thread(target=train.train, args=(QUICK,))
    with paths.locked(folder):
        waiting.start()
        while "another process works on" not in (told := capsys.readouterr().err):
            assert waiting.is_alive()
            time.sleep(0.05)
        assert str(folder) in told
        assert not (folder / "run.json").exists()
        shutil.copytree(trained, folder, dirs_exist_ok=True)
    waiting.join(timeout=60)
    assert not waiting.is_alive()
    for name in ("history.csv", "model.safetensors"):
        assert (folder / name).read_bytes() == (trained / name).read_bytes()


def test_a_folder_that_is_never_let_go_is_not_waited_for_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "LONGEST_WAIT", 0.3)
    held, other = paths.locked(tmp_path), paths.locked(tmp_path)
    with held, pytest.raises(TimeoutError, match=f"{tmp_path}: another process has held it"), other:
        pass


def test_a_results_folder_belongs_to_one_process_at_a_time(results, monkeypatch):
    def execute(plan, notebook):
        with (plan.results / ".lock").open() as other, pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        executed.append(plan)
        return 1.0

    executed: list[collection.Collection] = []
    monkeypatch.setattr(collection, "execute", execute)
    plan = collection.plan("smoke", "mni152", ["00"])
    collection.run(plan)
    assert executed == [plan]
    with (plan.results / ".lock").open() as other:
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)  # given back
