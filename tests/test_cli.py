"""The command line and run_all.sh."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from srlib import cli, data, files

RUN_ALL = files.ROOT / "run_all.sh"


def invoke(*arguments: str):
    return CliRunner().invoke(cli.app, list(arguments))


def run_all(*arguments: str, **options) -> subprocess.CompletedProcess:
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    options = {"env": environment, "capture_output": True, "text": True, **options}
    return subprocess.run([str(RUN_ALL), *arguments], **options, check=False)


def test_info_tells_versions_device_scan_back_ends_and_data(monkeypatch, tmp_path):
    monkeypatch.setenv("SRLIB_DATA", str(tmp_path))
    result = invoke("info")
    assert result.exit_code == 0
    lines = [line.split(maxsplit=1) for line in result.output.splitlines()]
    assert {"python", "torch", "monai", "commit", "device", "threads", "scan"} <= {
        k for k, _ in lines
    }
    assert ["results", str(files.results_root())] in lines
    assert any(line[1].startswith("reference: can run") for line in lines)
    assert f"data root     {tmp_path}\n" in result.output
    for name in data.CATALOG:
        assert f"data set      {name}: " in result.output


def test_data_list_names_every_data_set_and_its_licence():
    output = invoke("data", "list").output
    for name, entry in data.CATALOG.items():
        assert f"{name}: {entry.title}" in output
        assert entry.licence in output


def test_data_check_passes_the_embedded_cohort():
    result = invoke("data", "check", "mni152")
    assert result.exit_code == 0
    assert result.output == "mni152: 32 cases, all in order\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("data", "check", "spine"), "unknown data set 'spine'"),
        (("data", "get", "spine"), "unknown data set 'spine'"),
        (("collection", "--profile", "fast"), "'fast' is not one of smoke, default, full"),
        (("collection", "--only", "77"), "'77' is not one of "),
    ],
)
def test_a_users_mistake_is_one_message_and_status_2(arguments, message):
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert message in result.output
    assert "Traceback" not in result.output


def test_run_all_help_names_every_option_and_command_without_an_environment(tmp_path):
    (tmp_path / "python3").symlink_to("/bin/false")
    (tmp_path / "python").symlink_to("/bin/false")
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    result = run_all("-h", cwd=tmp_path, env=environment)
    assert result.returncode == 0
    commands = typer.main.get_command(cli.app).commands
    options = {option for p in commands["collection"].params for option in p.opts}
    for name in (*options, "test", "lab", "info", "data", "train", "evaluate", "predict"):
        assert name in result.stdout
    assert not (files.ROOT / ".venv" / "none").exists()


def test_run_all_refuses_a_wrong_name_from_any_directory(tmp_path):
    result = run_all("--profile", "fast", cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr.strip() == "profile 'fast' is not one of smoke, default, full"


@pytest.fixture
def bare_machine(tmp_path):
    """A checkout, and a Python that lacks everything: it notes what it is asked to do in `calls`."""
    root = tmp_path / "a checkout"
    (root / "srlib").mkdir(parents=True)
    for name in ("run_all.sh", "requirements.lock", "pyproject.toml", "srlib/__main__.py"):
        shutil.copy(files.ROOT / name, root / name)
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin" / "python3"
    python.write_text(
        "#!/bin/sh\n"
        'case "$1 $2" in\n'
        '"- "*) exit 1 ;;\n'  # is everything installed? no
        f'"-c "*) exec \'{sys.executable}\' "$@" ;;\n'
        '"-m venv") sleep 1; mkdir "$3/bin" && cp "$0" "$3/bin/python" ;;\n'
        f"*) echo \"$@\" >>'{tmp_path}/calls' ;;\n"
        "esac\n"
    )
    python.chmod(0o755)
    shutil.copy(python, python.with_name("python"))
    return root


def start_bare(script: Path, *arguments: str, **environment: str) -> subprocess.Popen:
    """Start run_all.sh, or a link to it, from another folder, where there is that Python and no other."""
    bin_ = next(parent / "bin" for parent in script.parents if (parent / "bin").is_dir())
    return subprocess.Popen(
        [script, *arguments],
        env=environment | {"PATH": f"{bin_}:/usr/bin:/bin"},
        cwd=bin_.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run_bare(script: Path, *arguments: str, **environment: str) -> tuple[list[str], str, str]:
    """What that Python was asked to do, and what run_all.sh said."""
    calls = script.parents[1] / "calls"
    calls.write_text("")
    output, errors = start_bare(script, *arguments, **environment).communicate(timeout=60)
    return calls.read_text().splitlines(), output, errors


INSTALL = "-I -m pip install --quiet --disable-pip-version-check"


def test_run_all_makes_the_environment_from_the_lock_once(bare_machine):
    script = bare_machine / "run_all.sh"
    calls, output, _ = run_bare(script, "--profile", "smoke")
    assert calls == [
        f"{INSTALL} --no-deps --require-hashes -r {bare_machine}/requirements.lock",
        f"{INSTALL} --no-warn-conflicts -r {bare_machine}/requirements-torch.lock",
        f"{INSTALL} --no-deps -e {bare_machine}",
        "-m srlib collection --profile smoke",
    ]
    assert "making .venv" in output
    assert ".venv is ready after" in output

    assert run_bare(script, "test") == (["-m srlib test"], "", "")

    with (bare_machine / "requirements.lock").open("a") as lock:
        lock.write("# changed\n")
    (bare_machine / ".venv" / "old").touch()
    calls, *_ = run_bare(script)
    assert calls[0].startswith(INSTALL)
    assert calls[-1] == "-m srlib collection"
    assert not (bare_machine / ".venv" / "old").exists()


def test_run_all_makes_an_environment_again_that_was_not_finished(bare_machine):
    (bare_machine / ".venv" / "bin").mkdir(parents=True)
    (bare_machine / ".venv" / "made-by-run_all").touch()
    assert len(run_bare(bare_machine / "run_all.sh")[0]) == 4


@pytest.mark.parametrize("link", [False, True])
def test_run_all_keeps_an_environment_that_it_did_not_make(bare_machine, link):
    venv = bare_machine / ".venv"
    mine = bare_machine.parent / "mine" if link else venv
    mine.mkdir()
    (mine / "work").touch()
    if link:
        venv.symlink_to(mine)
    calls, _, errors = run_bare(bare_machine / "run_all.sh")
    assert calls == []
    assert f"{venv} was not made by this script" in errors
    assert (mine / "work").exists()


def test_run_all_finds_its_checkout_through_links_and_whatever_cdpath_holds(bare_machine):
    mine = bare_machine.parent / "mine"
    (mine / ".venv").mkdir(parents=True)
    (mine / "first").symlink_to(Path("..", bare_machine.name, "run_all.sh"))
    (mine / "second").symlink_to("first")
    (mine / bare_machine.name).mkdir()  # where a "cd" with this CDPATH would go
    calls, *_ = run_bare(mine / "second", "info", CDPATH=str(mine))
    assert calls[0].endswith(f" -r {bare_machine}/requirements.lock")
    assert [file.name for file in (mine / ".venv").iterdir()] == []


def test_run_all_refuses_to_run_where_it_is_copied_to(bare_machine):
    copy = shutil.copy(bare_machine / "run_all.sh", bare_machine.parent)
    done = subprocess.run([copy, "info"], capture_output=True, text=True)
    assert done.returncode == 2
    assert f"{bare_machine.parent} is no checkout of srlib" in done.stderr


def test_run_all_refuses_a_checkout_that_no_path_of_python_can_hold(bare_machine):
    done = subprocess.run(
        [bare_machine.rename(bare_machine.with_name("a:b")) / "run_all.sh", "info"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "a:b: Python's path cannot hold a folder with ':'" in done.stderr


def test_two_run_alls_make_one_environment(bare_machine):
    started = [start_bare(bare_machine / "run_all.sh", "info") for _ in range(2)]
    outputs = [process.communicate(timeout=60)[0] for process in started]
    calls = (bare_machine.parent / "calls").read_text().splitlines()
    assert sorted(call[:4] for call in calls) == ["-I -"] * 3 + ["-m s"] * 2
    assert sum("waiting for it" in output for output in outputs) == 1


def test_files_in_the_working_directory_are_not_imported(tmp_path):
    """Not by run_all.sh's own Python, and not by srlib; `ran` lies there when one was."""
    for name in ("json", "nibabel", "packaging", "tomllib", "torch", "typer", "srlib"):
        (tmp_path / f"{name}.py").write_text("open('ran', 'w').close(); raise SystemExit(7)")
    for path in ("", ":", "."):
        environment = os.environ | {"PYTHONPATH": path}
        environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        done = run_all("data", "list", cwd=tmp_path, env=environment)
        assert done.returncode == 0, done.stderr
        assert not (tmp_path / "ran").exists(), path


def test_neither_are_they_without_run_all_nor_by_what_is_started(tmp_path):
    """Of `python -m srlib` Python itself looks for srlib there; all else is found elsewhere."""
    for name in ("json", "nibabel", "typer", "torch"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit(7)")
    environment = os.environ | {"PYTHONPATH": f":{files.ROOT}"}
    command = [sys.executable, "-m", "srlib", "test", "--version"]  # starts pytest
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout.startswith("pytest "), done.stderr


def test_help_needs_neither_torch_nor_monai():
    heavy = {
        "torch",
        "monai",
        "pandas",
        "scipy.ndimage",
        "numba",
        "matplotlib",
        "nbformat",
        "SimpleITK",
    }
    code = (
        "import sys; from typer.testing import CliRunner; from srlib import cli\n"
        "for words in (['-h'], ['data', 'list'], ['train', '-h'], ['collection', '--profile', 'x']):\n"
        "    CliRunner().invoke(cli.app, words)\n"
        f"    assert not {heavy} & sys.modules.keys(), words"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", ["train", "evaluate", "predict", "info", "data"])
def test_help_has_an_example(command):
    result = invoke(command, "-h")
    assert result.exit_code == 0
    assert "Example" in result.output


def test_train_evaluate_predict_and_info_in_a_row(tmp_path, monkeypatch):
    """The trained network's file is all that prediction needs: no data set, no results."""
    monkeypatch.setenv("SRLIB_RESULTS", str(tmp_path))
    small = ("--model", "tiny", "--steps", "2", "--batch-size", "1", "--patch", "40", "48", "40")
    result = invoke("train", *small)
    assert result.exit_code == 0, result.output
    (run,) = tmp_path.glob("runs/*")
    assert f"run: {run}\n" in result.output
    assert f"trained: {run / 'model.safetensors'}\n" in result.output

    result = invoke("evaluate", str(run))
    assert result.exit_code == 0, result.output
    assert "mni152, fold 0: 8 held-out cases" in result.output
    assert "grey matter" in result.output
    assert (run / "metrics.csv").is_file()

    moved = (run / "model.safetensors").rename(tmp_path / "network.safetensors")
    scan = data.open("mni152").cases[24].image
    monkeypatch.setenv("SRLIB_CACHE", str(tmp_path / "no cache"))
    told = invoke("info", str(moved)).output
    assert "spacing         (3.0, 3.0, 3.0)\n" in told
    assert "patch_size      (40, 48, 40)\n" in told
    bad = tmp_path / "bad.nii"
    bad.write_text("not a scan")
    result = invoke("predict", str(moved), str(bad), str(scan), "--out", str(tmp_path / "masks"))
    assert result.exit_code == 2
    assert f"{bad}: cannot be read" in result.stderr
    assert result.stderr.endswith("1 of 2 cases could not be segmented\n")
    mask = nib.load(tmp_path / "masks" / scan.name)
    expected = nib.load(run / "predictions" / scan.name)
    np.testing.assert_array_equal(mask.get_fdata(), expected.get_fdata())
    assert not (tmp_path / "no cache").exists()
