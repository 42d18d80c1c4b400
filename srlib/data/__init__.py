"""Data: `open` gives a data set, and that its cases, folds and samples. The parts are modules of this package."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from srlib.data.cases import Dataset, Split, get, open
    from srlib.data.catalog import CATALOG, Entry, download, present
    from srlib.data.samples import TrainingSamples
    from srlib.files import DataError

PLACES = {
    **dict.fromkeys(("Dataset", "Split", "get", "open"), "srlib.data.cases"),
    "TrainingSamples": "srlib.data.samples",
    **dict.fromkeys(("CATALOG", "Entry", "download", "present"), "srlib.data.catalog"),
    "DataError": "srlib.files",
}
__all__ = [
    "CATALOG", "DataError", "Dataset", "Entry", "Split", "TrainingSamples", "download", "get", "open", "present",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Import a public name when it is asked for: the list of data sets needs no torch."""
    if name not in PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(PLACES[name]), name)
