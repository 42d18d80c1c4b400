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
    assert tables.markdown(tables.fits()) in (ROOT / "docs" / "gpu.md").read_text()
    assert tables.markdown(tables.cost()) in (ROOT / "docs" / "scale-out.md").read_text()


def test_what_is_said_to_fit_was_counted_to_fit(tables):
    counted = pd.read_csv(REFERENCE / "memory" / "counted.csv").query("not checkpointing")
    peaks = counted.set_index(["peer", "precision", "size"])["peak"]
    assert tables.fits().loc["SegResMamba", "4 GiB"] == "128 / 160"
    assert peaks["segresmamba", "fp32", 128] <= 3 < peaks["segresmamba", "fp32", 160]
    assert peaks["segresmamba", "bf16", 160] <= 3


def test_the_cost_is_steps_by_seconds(tables):
    step = grid.systems()["step_seconds"]["segresmamba"]
    (config,) = grid.configs("long")
    row = tables.cost().loc["long"]
    assert (row["runs"], row["steps"]) == (1, config.steps)
    assert row["CPU hours"] == pytest.approx(config.steps * step / 3600)
