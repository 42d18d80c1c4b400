"""Trains the small networks that come with the repository, and writes their model cards.

    python benchmarks/pretrained.py hippocampus [--steps 1500]    # results/reference/hippocampus/tiny.*

`tiny` on fold 0; its weights are rounded to half precision, and the card's numbers are those of the rounded weights on
the held-out cases.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import pandas as pd

from srlib import data, evaluate, pretrained, provenance, runs, train
from srlib.checkpoints import load_trained, save_trained
from srlib.model import FEATURES
from srlib.paths import atomic_path
from srlib.runs import RunConfig

CARD = """# `tiny` for {name}

SegResMamba with {features} channels ({parameters:,} parameters, half precision), for {title}.

- **Use**: `python -m srlib predict {file} SCAN... --out DIR`, and `00_start_here`. It shows what the network does; it
  is no medical device, and no result of the collection rests on it.
- **Input**: {modalities}, resampled to {spacing} mm, robust z-scores. **Output**: background, {classes}.
- **Trained on** {training} cases of fold 0 (data fingerprint {fingerprint}), seed {seed}: {steps} steps of
  {batch} patches of {patch} voxels, AdamW, learning rate {rate}; on {device}, torch {torch}, commit {commit}.
- **Held-out** {held_out} cases of fold 0, mean (standard deviation over cases): {scores}.
- **Limits**: {limits}
- **Data and licence of the data**: {source}; {licence}. {citation}.
"""
VIRTUAL = "trained on a virtual cohort of one deformed template: it has never seen a patient."
REAL = "one data set, crops around the structure; whole heads and other scanners were never seen."


def config_of(dataset: str, steps: int) -> RunConfig:
    """The training of a data set's small network."""
    return runs.config_for("default", dataset, steps=steps, model="tiny", learning_rate=4e-3)


def main() -> None:
    """Train, round, score, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("dataset", choices=("hippocampus", "mni152"))
    parser.add_argument("--steps", type=int, default=1500)
    options = parser.parse_args()
    config = config_of(options.dataset, options.steps)
    folder = train.train(config).run_dir
    trained = load_trained(folder)
    rounded = trained._replace(weights={k: v.half() for k, v in trained.weights.items()})
    with tempfile.TemporaryDirectory() as scratch:  # where the predictions go
        save_trained(Path(scratch, "tiny.safetensors"), rounded)
        scores = evaluate.evaluate(config, checkpoint=Path(scratch, "tiny.safetensors"))
    parameters = sum(tensor.numel() for tensor in rounded.weights.values())
    file = pretrained.file(options.dataset)
    save_trained(file, rounded)
    with atomic_path(file.with_suffix(".md")) as temporary:
        temporary.write_text(card(config, parameters, scores))
    print(file.with_suffix(".md").read_text())


def card(config: RunConfig, parameters: int, scores: pd.DataFrame) -> str:
    """The model card, from what was done and found."""
    file, entry = pretrained.file(config.dataset), data.get(config.dataset)
    split, by_class = data.split(config.dataset, config.fold), scores.groupby("class", sort=False)
    means = [
        f"Dice {name} {table['dice'].mean():.3f} ({table['dice'].std():.3f}), "
        f"HD95 {table['hd95'].mean():.1f} mm ({table['hd95'].std():.1f})"
        for name, table in by_class
    ]
    facts = provenance.describe()
    return CARD.format(
        name=config.dataset,
        features=", ".join(map(str, FEATURES["tiny"])),
        parameters=parameters,
        title=f"{entry.title} ({entry.task})",
        file=f"results/reference/{config.dataset}/{file.name}",
        modalities=", ".join(entry.modalities),
        spacing="x".join(f"{mm:g}" for mm in entry.spacing),
        classes=", ".join(entry.classes),
        training=len(split.train),
        held_out=scores["case"].nunique(),
        fingerprint=data.fingerprint(config.dataset),
        seed=config.seed,
        steps=config.steps,
        batch=config.batch_size,
        patch="x".join(map(str, config.patch_size)),
        rate=config.learning_rate,
        device=facts["device"],
        torch=facts["versions"]["torch"],
        commit=facts["commit"][:8],
        scores="; ".join(means),
        limits=VIRTUAL if entry.virtual else REAL,
        source=entry.source,
        licence=entry.licence,
        citation=entry.citation,
    )


if __name__ == "__main__":
    main()
