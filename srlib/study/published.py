"""The paper's tables as printed, from `published.json`, which says where they stand."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd

PUBLISHED = json.loads(Path(__file__).with_name("published.json").read_text())


def published(table: str) -> pd.DataFrame:
    """A table of the paper, indexed by the systems' names."""
    rows, columns = PUBLISHED[table]["rows"], PUBLISHED[table]["columns"]
    return pd.DataFrame.from_dict(rows, orient="index", columns=columns)
