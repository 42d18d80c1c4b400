"""Settings of all tests, the notebooks' cells under nbval among them."""

import os
import tempfile

import pytest
import torch


def pytest_configure(config: pytest.Config) -> None:
    """Results of tests go to a folder of their own: nothing is reused, nothing of the user's is touched."""
    folder = tempfile.TemporaryDirectory(prefix="srlib-test-results-")
    config.add_cleanup(folder.cleanup)
    os.environ["SRLIB_RESULTS"] = folder.name
    os.environ["MPLBACKEND"] = "agg"
    # Triton decides at its import, which torch may do, whether it compiles or interprets its kernels.
    os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")
