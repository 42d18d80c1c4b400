"""CSV as this project writes and reads it: the one place for both.

Lines at the top that start with `#` say what a table was made with. An empty field is a missing value, and nothing
else is: `None`, `NA`, `nan` and `null` are names like any other. Cases and classes are text, also where all are digits.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import pandas as pd

from srlib.files import DataError, atomic_path

NAMES = ("case", "class")  # columns that hold what users call things
SHARES = ("dice", "nsd", "sensitivity")  # columns of scores, from 0 to 1
AMOUNTS = ("hd95", "volume_ref_ml", "volume_pred_ml")  # columns of scores, from 0 on


def write(table: pd.DataFrame, file: Path, stamp: str = "", digits: int | None = 6) -> None:
    """Write a table without its index.

    Args:
        table: its index is not written; one that means something is made a column first.
        file: where it goes.
        stamp: goes into a first line that starts with `#`.
        digits: significant ones; `None` writes every number whole.

    Raises:
        ValueError: a case or a class without a name.
    """
    for column in set(NAMES) & set(table):
        if (table[column].isna() | (table[column] == "")).any():
            raise ValueError(f"{file}: a {column} without a name")
    style: dict[str, Any] = {"float_format": digits and f"%.{digits}g", "lineterminator": "\n"}
    body = table.to_csv(index=False, **style)
    with atomic_path(file) as temporary:
        head = f"# {stamp}\n" if stamp else ""
        temporary.write_text(head + body, encoding="utf-8", newline="")


def read(file: Path, **options: Any) -> pd.DataFrame:
    """Read a table that `write` wrote.

    Args:
        file: where it is.
        options: further ones of `pandas.read_csv`.

    Raises:
        FileNotFoundError: there is no such file.
        DataError: no table.
    """
    with file.open(encoding="utf-8", newline="") as lines:
        text = lines.read()
    while text.startswith("#"):
        text = text.partition("\n")[2]
    missing: dict[str, Any] = {"keep_default_na": False, "na_values": [""]}
    try:
        return pd.read_csv(io.StringIO(text), dtype=dict.fromkeys(NAMES, str), **missing, **options)
    except ValueError as error:  # pandas' own are such
        raise DataError(f"{file}: not a table as srlib writes it ({error})") from error


def read_scores(file: Path) -> pd.DataFrame:
    """Read a table with a row for each case and class, perhaps of several runs, as `srlib.run.evaluate` writes it.

    Raises:
        FileNotFoundError: there is no such file.
        DataError: a column that is missing, a case's class that comes twice, a value that no metric can have.
    """
    table = read(file)
    if missing := {*NAMES, *SHARES, *AMOUNTS} - set(table):
        raise DataError(f"{file}: expected the columns {', '.join(sorted(missing))}")
    keys = [*NAMES, *({"run"} & set(table))]
    if table.empty or table[keys].isna().any(axis=None) or table.duplicated(keys).any():
        raise DataError(f"{file}: expected each case and class once, by name")
    for column in (*SHARES, *AMOUNTS):
        top = 1 if column in SHARES else sys.float_info.max
        wrong = ~pd.to_numeric(table[column], errors="coerce").between(0, top)
        for row in table[wrong].to_dict("records"):
            raise DataError(
                f"{file}: {column} of {row['case']}, {row['class']} is {row[column]!r};"
                f" expected a number {'from 0 to 1' if top == 1 else 'from 0 on'}"
            )
    return table
