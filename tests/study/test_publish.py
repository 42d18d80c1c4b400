"""The tables in docs/ of what fits where and of what the comparisons cost."""

import importlib.util

import pandas as pd
import pytest

from srlib.files import REFERENCE, ROOT
from srlib.study import grid


@pytest.fixture(scope="module")
def tables():
    spec = importlib.util.spec_from_file_location("t", ROOT / "benchmarks" / "publish.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_pages_have_the_tables_of_the_committed_numbers(tables):
    gpu = (ROOT / "docs" / "gpu.md").read_text()
    assert tables.markdown(tables.fits()) in gpu
    assert tables.markdown(tables.steps()) in gpu
    assert f"step has {grid.gpu_steps()['kernels']['segresmamba']:,} kernels in fp32" in gpu
    assert tables.markdown(tables.cost()) in (ROOT / "docs" / "scale-out.md").read_text()


def test_what_is_said_to_fit_was_counted_to_fit(tables):
    counted = pd.read_csv(REFERENCE / "memory" / "counted.csv").query("not checkpointing")
    peaks = counted.set_index(["peer", "precision", "size"])["peak"]
    assert tables.fits().loc["SegResMamba", "4 GiB"] == "128 / 160"
    assert peaks["segresmamba", "fp32", 128] <= 3 < peaks["segresmamba", "fp32", 160]
    assert peaks["segresmamba", "bf16", 160] <= 3


def test_the_second_plan_says_what_its_steps_take(tables):
    text = " ".join((ROOT / "docs" / "plan.md").read_text().split())
    seconds = {name: 3600 * hours for name, hours in tables.cost()["GPU hours"].items()}
    assert f"the steps of `curve` take {round(seconds['curve'], -2):,.0f} s" in text
    assert f"`authors` take {round(seconds['authors'], -2):,.0f} s" in text
    assert f"`distance` {round(seconds['distance'], -2):,.0f} s" in text


def test_the_cost_is_steps_by_milliseconds(tables):
    step = grid.plan_steps()[[*grid.TOM]]
    row = tables.cost().loc["tom"]
    assert (row["runs"], row["steps"]) == (12, 12 * grid.STEPS)
    assert row["GPU hours"] == pytest.approx(4 * grid.STEPS * step.sum() / 3.6e6)
