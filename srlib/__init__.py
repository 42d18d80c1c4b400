"""SegResMamba, executable: the network of Das et al. (MIDL 2025), its tri-oriented scan, and the measurements."""

from srlib.model import SegResMamba
from srlib.scan import selective_scan
from srlib.tom import TriOrientedMamba

__all__ = ["SegResMamba", "TriOrientedMamba", "selective_scan"]
__version__ = "0.1.0"
