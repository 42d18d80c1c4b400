"""SegResMamba, executable: the network of Das et al. (MIDL 2025), its tri-oriented scan, and the measurements."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from srlib.net.model import SegResMamba
    from srlib.net.tom import TriOrientedMamba
    from srlib.scan import selective_scan

__all__ = ["SegResMamba", "TriOrientedMamba", "selective_scan"]
__version__ = "0.1.0"

PLACES = {"SegResMamba": "net.model", "TriOrientedMamba": "net.tom", "selective_scan": "scan"}


def __getattr__(name: str) -> Any:
    """Import a public name when it is asked for: torch and MONAI take seconds, and help needs neither."""
    if name not in PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{PLACES[name]}"), name)
