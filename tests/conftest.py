"""Settings of all tests, the notebooks' cells under nbval among them."""

import locale
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

NO_NETWORK = str(Path(__file__).parent / "no_network")


def pytest_configure(config: pytest.Config) -> None:
    """Results of tests go to a folder of their own: nothing is reused, nothing of the user's is touched.

    Nothing reaches another machine either, from here or from what is started here. Workers of xdist are that too.
    """
    sys.path.insert(0, NO_NETWORK)
    sys.modules.pop("sitecustomize", None)  # another one that Python may have found
    import sitecustomize  # noqa: F401

    if hasattr(config, "workerinput"):  # of xdist
        return
    inherited = filter(None, [NO_NETWORK, os.environ.get("PYTHONPATH")])
    os.environ["PYTHONPATH"] = os.pathsep.join(inherited)
    folder = tempfile.TemporaryDirectory(prefix="srlib-test-results-")
    config.add_cleanup(folder.cleanup)
    os.environ["SRLIB_RESULTS"] = folder.name
    os.environ["MPLBACKEND"] = "agg"
    os.fsync = lambda handle: None  # no test's files have to outlive a loss of power
    # Triton decides at its import, which torch may do, whether it compiles or interprets its kernels.
    os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")


@pytest.fixture(autouse=True)
def locale_kept() -> Iterator[None]:
    """What writes DICOM files for a test, ITK, leaves the locale "C"; the next test would read text as ASCII."""
    before = locale.setlocale(locale.LC_ALL)
    yield
    locale.setlocale(locale.LC_ALL, before)
