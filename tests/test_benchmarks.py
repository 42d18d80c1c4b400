"""The benchmarks of GPUs write their tables here too, with what a CPU can measure."""

from __future__ import annotations

import importlib.util
import json
import math
from types import ModuleType

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from srlib import files, tables
from srlib.run import train
from srlib.run.runs import config_for, run_dir


def benchmark(name: str) -> ModuleType:
    """A script of `benchmarks/` as a module."""
    spec = importlib.util.spec_from_file_location(name, files.ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def step() -> ModuleType:
    return benchmark("step")


def invoke(module, *words):
    ended = CliRunner().invoke(module.app, [*map(str, words)], catch_exceptions=False)
    assert ended.exit_code == 0, ended.output


def test_steps_of_a_network_are_rows(step, tmp_path, monkeypatch):
    monkeypatch.setattr(step, "EAGER", 1)
    invoke(step, "gpu", tmp_path / "step.csv", "--size", 32, "--peer", "unet")
    rows = tables.read(tmp_path / "step.csv")
    assert rows[["precision", "recomputation"]].agg(" ".join, axis=1).tolist() == [
        "bf16 off", "bf16 on", "fp32 off", "fp32 on",
    ]  # fmt: skip
    assert (rows["eager_ms"] > 0).all()


def test_steps_of_a_system_are_rows(step, tmp_path, monkeypatch):
    monkeypatch.setattr(step, "EAGER", 1)
    monkeypatch.setattr(step.data, "present", list)
    monkeypatch.setattr(step.train, "build_model", lambda *_: nn.Conv3d(1, 3, 1))
    words = ("--system", "none", "--system", "forward", "--batch-size", 1)
    invoke(step, "small", tmp_path / "small.csv", *words)
    rows = tables.read(tmp_path / "small.csv")
    assert [*zip(rows["system"], rows["precision"], strict=True)] == [
        ("none", "fp32"), ("forward", "fp32"), ("none", "bf16"),
    ]  # fmt: skip
    assert (rows["eager_ms"] > 0).all()


def test_energy_is_counted_from_move_to_move(step):
    counts = [1000 * (7 * k // 30) for k in range(5, 300)]  # 7 J in 30 calls, by whole joules
    assert step.by_moves(counts) == pytest.approx(7 / 30, rel=0.02)
    assert math.isnan(step.by_moves([1, 1, 2, 2]))


def test_only_rows_that_are_missing_or_failed_are_measured(step, tmp_path, monkeypatch):
    out, measured, broken = tmp_path / "step.csv", [], ["unetr"]

    def fake(work):
        measured.append((work.peer, work.precision))
        yield {"eager_ms": 1.5}
        if work.peer in broken:
            raise RuntimeError("two\nlines")

    monkeypatch.setattr(step, "measure_gpu", fake)
    words = ("gpu", out, "--peer", "unet", "--peer", "unetr")
    invoke(step, *words)
    rows = tables.read(out)
    assert len(rows) == len(measured) == 8
    assert rows.query("network == 'unetr'")["error"].unique() == ["RuntimeError: two lines"]
    assert rows.query("network == 'unet'")["error"].isna().all()

    kept = rows.query("precision == 'bf16'").drop(columns=["device", "commit"])
    tables.write(kept, out)
    measured.clear(), broken.clear()
    invoke(step, *words)
    assert measured == [("unetr", "bf16")] * 2 + [("unet", "fp32"), ("unetr", "fp32")] * 2
    assert len(tables.read(out)) == 8
    measured.clear()
    invoke(step, *words, "--size", 96)
    assert len(measured) == 8


def test_a_training_is_the_same_again(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    flags, take = [], train.training_step

    def training_step(*given):
        flags.append(torch.backends.cudnn.deterministic)
        return take(*given)

    monkeypatch.setattr(train, "training_step", training_step)
    fill = torch.utils.deterministic.fill_uninitialized_memory
    once, config = benchmark("train").train_once, config_for("smoke", "mni152", steps=4)
    try:
        usual, cudnn = once(config, "usual"), once(config, "cudnn")
        again = once(config, "deterministic")
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = fill
    assert (
        usual["sha256"]
        == cudnn["sha256"]
        == again["sha256"]
        != once(config_for("smoke", "mni152", steps=2), "usual")["sha256"]
    )
    assert flags[:2] == [False, True]
    assert usual["ms_per_step"] > 0


def test_scores_of_the_default_profile_are_means_over_classes_then_cases(tmp_path, monkeypatch):
    monkeypatch.setenv("SRLIB_RESULTS", str(tmp_path))
    train = benchmark("train")
    scores = "case,class,dice\n1,a,0.5\n1,b,0.7\n2,a,0.9\n2,b,1.0\n"

    def compute_run(config):
        run_dir(config).mkdir(parents=True)
        (run_dir(config) / "metrics.csv").write_text(scores)
        return "", {"device_name": "a CPU"}

    monkeypatch.setattr(train.grid, "compute_run", compute_run)
    invoke(train, "default", tmp_path / "default.csv", "--dataset", "mni152", "--seeds", 2)
    rows = tables.read(tmp_path / "default.csv")
    assert rows["dice"].tolist() == pytest.approx([0.775, 0.775])
    assert rows["seed"].tolist() == [0, 1]
    assert (rows["cpu_minutes"] >= 0).all()


def test_several_processes_are_compared_with_one(tmp_path, monkeypatch):
    train = benchmark("train")
    config = config_for("smoke", "mni152", steps=2)
    monkeypatch.setattr(train, "TIMES", [config])
    monkeypatch.setattr(train, "LOSSES", [config])
    monkeypatch.setattr(train, "STEPS", 1)
    monkeypatch.setattr(train, "WARM_UP", 0)
    invoke(train, "worker", tmp_path)
    alone, several = (json.loads((tmp_path / "found.json").read_text()) for _ in range(2))
    assert alone[0]["eager_ms"] > 0
    alone[0]["captured_ms"], several[0]["captured_ms"] = 3.0, 2.0
    several[1]["losses"][0][1] += 0.5
    with pytest.raises(KeyError):
        train.compared(alone, [{**several[0], "model": "paper"}])
    table = train.compared(alone, several)
    assert table["speedup"].dropna().tolist() == [1, 1.5]
    assert table["loss_difference"].dropna().tolist() == pytest.approx([0, 0.5])
    assert len(table["first_losses"][1].split()) == 2


def test_bytes_and_exponentials_of_kernels_are_counted_from_their_launches():
    """Two images of 27 tokens, 32 with whole tiles, in 2 chunks; 3 orders; 64 channels in 2 blocks; 16 states."""
    counts = benchmark("scan").kernel_counts((2, 64, 27, 16), torch.float32)
    x, sequence, rates, vector = 2 * 27 * 64 * 4, 3 * 2 * 32 * 64 * 4, 3 * 16 * 64 * 4, 3 * 64 * 4
    weights, totals, elements = 3 * 2 * 32 * 16 * 4, 3 * 2 * 2 * 64 * 4, 3 * 2 * 32 * 64
    states, tiles = 16 * totals, 3 * 2 * 4 * 16 * 64 * 4
    for kernel, launches, moved, exponentials in (
        ("forward convolve", 1, x + sequence + 5 * vector, elements),
        ("forward join", 1, 2 * states + totals + rates, 16 * 3 * 2 * 2 * 64),
        (
            "forward walk_orders",
            2,
            4 * sequence + 3 * weights + 2 * rates + 4 * vector + 2 * states + totals + 3 * x,
            2 * 17 * elements,
        ),
        (
            "backward gradients_of_orders",
            1,
            2 * sequence + 2 * weights + x + rates + 2 * vector + tiles + states  # read
            + 2 * sequence + 2 * weights + 18 * totals,  # written, the gradient by B for both blocks
            18 * elements,
        ),
        ("backward rates", 1, 3 * rates, 3 * 16 * 64),
    ):  # fmt: skip
        expected = {"launches": launches, "bytes": moved, "exponentials": exponentials}
        assert counts[tuple(kernel.split())] == expected, kernel
