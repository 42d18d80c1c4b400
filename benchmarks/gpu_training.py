"""Accuracy that seconds of training on a GPU buy: SegResMamba with and without its Mamba layers, and two peers.

    python benchmarks/gpu_training.py OUT.csv [--seconds 90] [--seed 0] [--systems both,none,segresnet,nnunet]

Hippocampus, fold 0, the 52 held-out cases. Each system is trained by `srlib.train` in a run of the default profile
whose number of steps is what the given seconds hold: the median step of a short run says how many. So every system
goes through its whole learning-rate schedule. `srlib.evaluate` scores the result. A row is written as soon as it is
measured:

- `steps`, `batch_size`, `patch_size`, `learning_rate`, `seed`: of the run;
- `seconds`: of the training, samples included;
- `dice`: mean over classes, then cases; `dice_<class>`, `nsd`, `hd95`: means over cases (mm where that applies).
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path
from unittest.mock import patch

import pandas as pd
import torch
from torch import nn

from srlib import baselines, data, runs, train
from srlib.evaluate import METRICS, evaluate
from srlib.runs import RunConfig, config_for
from srlib.train import build_model

DATASET = "hippocampus"
PROBE = 40  # steps of the run that measures a step; the first half compiles and warms up

# SegResMamba by the value of `tom`, the others by their name in `srlib.baselines`.
SYSTEMS = {
    "both": "SegResMamba, both ToM layers",
    "none": "SegResMamba, no ToM layer",
    "segresnet": baselines.PEERS["segresnet"].title,
    "nnunet": baselines.PEERS["nnunet"].title,
}
PEER_LEARNING_RATE = 1e-3  # several times as many weights as `small`


def config_of(system: str, seed: int, steps: int) -> RunConfig:
    """The run of a system: the default profile's, its learning rate for SegResMamba only."""
    is_peer = system in baselines.PEERS
    own = {"learning_rate": PEER_LEARNING_RATE} if is_peer else {"tom": system}
    return config_for("default", DATASET, seed=seed, steps=steps, **own)


def network_of(system: str, config: RunConfig) -> nn.Module:
    """The untrained network of a system, with weights that only the seed decides."""
    if system not in baselines.PEERS:
        return build_model(config)
    dataset = data.get(DATASET)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return baselines.build(system, dataset.in_channels, dataset.out_channels, config.patch_size)


def row_of(system: str, seed: int, seconds: float) -> dict[str, object]:
    """Train a system for so many seconds and score it."""
    probe = config_of(system, seed, PROBE)
    step = train.train(probe).history["seconds"].diff().tail(PROBE // 2).median()
    config = config_of(system, seed, max(PROBE + 1, round(seconds / step)))
    result = train.train(config)
    table = evaluate(config)
    by_class = table.groupby("class", sort=False)["dice"].mean().add_prefix("dice_")
    settings = ("steps", "batch_size", "patch_size", "learning_rate", "precision", "fold", "seed")
    return {
        "system": SYSTEMS[system],
        "parameters": sum(p.numel() for p in result.model.parameters()),
        **{name: getattr(config, name) for name in settings},
        "seconds": result.history["seconds"].iloc[-1],
        "ms_per_step": 1000 * step,
        "cases": table["case"].nunique(),
        **table[list(METRICS)].mean(),
        **by_class,
    }


def main() -> None:
    """Train, score and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=90)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--systems", type=lambda names: names.split(","), default=[*SYSTEMS])
    options = parser.parse_args()
    if unknown := set(options.systems) - set(SYSTEMS):
        parser.error(f"unknown systems {', '.join(unknown)}; choose from {', '.join(SYSTEMS)}")
    on_gpu = runs.device().type == "cuda"
    made_with = {
        "device": torch.cuda.get_device_name() if on_gpu else runs.device().type,
        "torch": torch.__version__,
    }
    rows = []
    for system in options.systems:
        # A peer's run has no identity of its own, so each system has its own folder of runs.
        with (
            tempfile.TemporaryDirectory() as folder,
            patch.dict(os.environ, SRLIB_RESULTS=folder),
            patch.object(
                train, "build_model", lambda config, name=system: network_of(name, config)
            ),
        ):
            rows.append({**made_with, **row_of(system, options.seed, options.seconds)})
        pd.DataFrame(rows).to_csv(options.out, index=False, float_format="%.5g")
        print(pd.Series(rows[-1]).to_string(), flush=True)


if __name__ == "__main__":
    main()
