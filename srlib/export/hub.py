"""A folder that is ready for a model hub: weights, the network's arguments, and a card. Nothing is uploaded.

| file | content |
|---|---|
| `model.safetensors` | as a run's: `python -m srlib predict` takes the folder |
| `config.json` | arguments of `SegResMamba`, which `SegResMamba.from_pretrained(folder)` reads |
| `README.md` | metadata that a hub reads, and the card: data, metrics and how they were measured, limits, licences |
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pandas as pd

from srlib import __version__, data
from srlib.data.scans import Normalisation
from srlib.files import atomic_folder
from srlib.run.evaluate import METRICS, stored_scores
from srlib.run.train import Trained, load_trained, network_arguments, save_trained

FRONT = """---
library_name: srlib
tags: [medical, 3d, segmentation, segresmamba]
---

"""
CARD = """# SegResMamba for {entry.title}

SegResMamba (Das et al., MIDL 2025, arXiv:2503.07766), size `{config.model}`, {parameters:,} parameters, trained for:
{entry.task}.

- **Use**: {use}
- **Input**: {modalities}, resampled to {spacing} mm, normalised as {normalisation}, in windows of {patch} voxels.
  `predict` does all of it, and gives masks on each scan's own grid.
- **Output**: {outputs}.

## Data

{entry.source}. {training} training cases, {held_out} held-out ones (fold {config.fold}), fingerprint {fingerprint}.
{entry.citation}

Seed {config.seed}, {config.steps} steps of {config.batch_size} patches, {optimizer},
learning rate {config.learning_rate:g}, {config.precision}; with {versions}.
Written by srlib {here}.

## Metrics

{metrics}

## Limits

{limits} It is no medical device, and nothing about it was tested for use on patients.

## Licences

- Code: srlib, Apache-2.0.
- Data that it was trained on: {entry.licence}.
- These weights: {weights}.
"""
MEASURED = """Mean (standard deviation) over {n} held-out cases, on the grid of {spacing} mm, of masks from windows that
overlap by half, by `monai.metrics` (`python -m srlib evaluate`; empty structures have documented values). NSD:
share of both surfaces within {tolerance:g} mm; HD95: 95th percentile of the surface distance.

{table}"""
UNSTATED = "for whoever publishes them to state, within the licence of the data"
USE = """`SegResMamba.from_pretrained(FOLDER)` in Python (srlib), or
  `python -m srlib predict FOLDER SCAN... --out DIR`"""
NOT_MEASURED = (
    "Not measured: nothing that `python -m srlib evaluate` wrote lies beside the network."
)
VIRTUAL = "Trained on a virtual cohort that a computer made: it has never seen a patient."
REAL = (
    "Trained and measured on one data set: other scanners, protocols, populations and diseases were never seen, and "
    "numbers for them can be anything."
)


def write(checkpoint: Path, folder: Path) -> None:
    """Write the folder for a trained SegResMamba.

    Args:
        checkpoint: file of the trained network; what `evaluate` wrote beside it goes into the card.
        folder: must not be there.

    Raises:
        ValueError: the network is a peer.
        FileExistsError: the folder is there, perhaps only since the export was begun.
    """
    trained = load_trained(checkpoint)
    arguments = network_arguments(trained.config, trained.entry)
    text = card(trained, stored_scores(checkpoint), USE)
    with new_folder(folder) as made:
        save_trained(made / "model.safetensors", published(trained))
        (made / "config.json").write_text(json.dumps(arguments, indent=1) + "\n")
        (made / "README.md").write_text(FRONT + text, encoding="utf-8")


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes `folder` when the block succeeds; FileExistsError where that is there."""
    if os.path.lexists(folder):
        raise FileExistsError(f"{folder}: is there already; expected a new folder")
    with atomic_folder(folder) as made:
        yield made
        mine = made.stat().st_ino
    if folder.stat().st_ino != mine:
        raise FileExistsError(f"{folder}: was made meanwhile by another; nothing was exported")


def published(trained: Trained) -> Trained:
    """A trained network without what a stranger must not learn: of a folder, its path and the names of its cases."""
    if not Path(trained.entry.folder).is_absolute():  # a name; the configuration may be relative
        return trained
    name = "private"
    entry = replace(
        trained.entry,
        name=name,
        folder=name,
        title="scans of its owner",
        source="Cases of its owner",
        how_to_get="not public",
    )
    config = replace(trained.config, dataset=name)
    return trained._replace(config=config, entry=entry, split=data.Split((), ()))


def card(trained: Trained, scores: pd.DataFrame | None, use: str, weights: str = UNSTATED) -> str:
    """The model card in Markdown.

    Args:
        trained: the network.
        scores: its table from `srlib.run.evaluate`; `None` says that it was not measured.
        use: how it is used, in Markdown.
        weights: the licence of the weights.
    """
    config, entry = trained.config, published(trained).entry
    spacing = " x ".join(f"{mm:g}" for mm in entry.spacing)
    return CARD.format(
        config=config,
        entry=entry,
        use=use,
        weights=weights,
        parameters=sum(tensor.numel() for tensor in trained.weights.values()),
        modalities=", ".join(entry.modalities),
        spacing=spacing,
        normalisation="; ".join(dict.fromkeys(map(_in_words, entry.normalisation))),
        patch=" x ".join(map(str, config.patch_size)),
        outputs=", ".join([*([] if entry.regions else ["background"]), *entry.classes]),
        training=len(trained.split.train),
        held_out=len(trained.split.test),
        fingerprint=trained.fingerprint,
        versions=", ".join(f"{name} {number}" for name, number in trained.versions.items()),
        here=__version__,
        metrics=NOT_MEASURED if scores is None else _metrics(trained, scores, spacing),
        optimizer="Adam" if config.recipe == "authors" else "AdamW",
        limits=VIRTUAL if entry.virtual else REAL,
    )


def _in_words(how: Normalisation) -> str:
    if not isinstance(how, str):
        low, high, mean, deviation = how
        return f"values from {low:g} to {high:g}, less {mean:g}, over {deviation:g}"
    voxels = (
        "between its percentiles 0.5 and 99.5" if how == "scan" else "over voxels that are not 0"
    )
    return f"z-scores of each scan {voxels}"


def _metrics(trained: Trained, scores: pd.DataFrame, spacing: str) -> str:
    lines = ["| class | Dice | NSD | HD95 (mm) |", "|---|---|---|---|"]
    for name, rows in scores.groupby("class", sort=False):
        cells = [f"{rows[metric].mean():.3f} ({rows[metric].std():.3f})" for metric in METRICS]
        lines.append(" | ".join([f"| {name}", *cells]) + " |")
    about = {"n": scores["case"].nunique(), "tolerance": trained.entry.nsd_tolerance}
    return MEASURED.format(**about, spacing=spacing, table="\n".join(lines))
