"""Training: an explicit loop on Lightning Fabric whose budget is a number of optimizer steps.

Every sample is a function of (seed, step, index) and the learning rate a function of the step, so a run that was
interrupted and resumed computes the same weights as one that was not, bit for bit on the CPU.

Under torchrun the processes share each batch. As many samples each, loss and gradients of the batch are the means of
theirs; nothing in the networks or the loss looks across samples.
"""

from __future__ import annotations

import dataclasses
import json
import math
import multiprocessing
import os
import platform
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from torch import nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from srlib import data, tables
from srlib.data import labels
from srlib.files import atomic_path, locked, remove_temporaries
from srlib.machine import device, is_first_process, processes
from srlib.net.model import FEATURES, SegResMamba
from srlib.net.peers import SMALL, build
from srlib.run.captured import CapturedStep, capturable, set_learning_rate
from srlib.run.checkpoints import (
    CheckpointError,
    Trained,
    about_to_train,
    data_changes,
    load_state,
    load_trained,
    save_state,
    save_trained,
)
from srlib.run.runs import RunConfig, is_done, run_dir, run_id

if TYPE_CHECKING:
    from lightning_fabric import Fabric

HISTORY = ("step", "loss", "learning_rate", "seconds")


@dataclass(frozen=True)
class TrainResult:
    """A finished run: its folder, the trained network in eval mode, and one history row a step."""

    run_dir: Path
    model: nn.Module
    history: pd.DataFrame


def build_model(config: RunConfig, entry: data.Entry | None = None) -> nn.Module:
    """The untrained network of a run, with weights that only its seed decides.

    Args:
        config: of the run.
        entry: its data set's; `None` looks it up.
    """
    dataset = entry or data.get(config.dataset)
    channels = dataset.in_channels, dataset.out_channels
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        if config.model in SMALL:
            return build(config.model, *channels, config.patch_size, SMALL)
        return SegResMamba(
            *channels,
            FEATURES[config.model],
            nslices=config.nslices,
            tom=config.tom,
            tom_residual=config.tom_residual,
            scan_orders=config.scan_orders,
            recurrence=config.recurrence,
            extra_conv=config.extra_conv,
            block=config.block,
            variant=config.variant,
        )


def learning_rate(config: RunConfig, step: int) -> float:
    """Linear warm-up to the peak, then polynomial decay with exponent 0.9 (as nnU-Net's), for 0-based `step`."""
    if step < config.warmup:
        return config.learning_rate * (step + 1) / config.warmup
    remaining = (config.steps - step) / (config.steps - config.warmup)
    return config.learning_rate * remaining**0.9


def train(
    config: RunConfig, progress: bool | None = None, checkpoint_seconds: float = 60
) -> TrainResult:
    """Train a run, or resume it, or read it when it is done.

    One process trains a run; another one that is asked for it waits and reads what the first one wrote.

    Args:
        config: what to train.
        progress: show a bar with loss and remaining time; `None` shows it in a terminal only.
        checkpoint_seconds: how often the state is saved, so that a crash costs at most this much.

    Raises:
        ValueError: when the processes of torchrun cannot share a batch equally.
        srlib.files.DataError: before anything is computed, when a case cannot be trained on; while it trains, when
            the data set is not any more what it was.
        srlib.run.checkpoints.CheckpointError: the state to resume from is broken or another run's.
        OSError: nothing can be written, as on a full disk; what was written before stays.
        FloatingPointError: the training diverged; the state before stays.
    """
    if config.batch_size % processes():
        raise ValueError(
            f"batch_size {config.batch_size} cannot be shared equally by {processes()} processes"
        )
    folder = run_dir(config)
    if not is_done(config):
        fabric = launch(config)
        with fabric.rank_zero_first():  # the others find the cases checked
            data.open(config.dataset).check(config.fold)
        with locked(folder) if is_first_process() else nullcontext():
            if not fabric.broadcast(is_done(config)):
                _train(fabric, config, folder, progress, checkpoint_seconds)
    model = restore(load_trained(folder), folder)
    return TrainResult(folder, model, tables.read(folder / "history.csv"))


def load_model(config: RunConfig) -> nn.Module:
    """The trained network of a finished run, as `restore` gives it."""
    if not is_done(config):
        raise FileNotFoundError(f"run {run_id(config)} is not trained here: {run_dir(config)}")
    return restore(load_trained(run_dir(config)), run_dir(config))


def restore(trained: Trained, file: Path) -> nn.Module:
    """A trained network from what its file holds, in eval mode on this machine's device.

    Its largest output is the label, also where it was trained on overlapping regions.

    Raises:
        srlib.run.checkpoints.CheckpointError: naming `file`, when its weights are not those of its configuration.
    """
    model = build_model(trained.config, trained.entry)
    try:
        model.load_state_dict(trained.weights)
    except RuntimeError as error:  # a line for the network, then one for each difference
        reason = str(error).splitlines()[1].strip()
        raise CheckpointError(
            f"{file}: its weights are not those of the network that it describes: {reason:.200}"
        ) from error
    return labels.scoring(model, trained.entry).to(device()).eval()


def launch(config: RunConfig) -> Fabric:
    """The run's device or, under torchrun, those of its processes."""
    from lightning_fabric import Fabric
    from lightning_fabric.strategies import DDPStrategy

    used = device()
    where: dict[str, Any] = {"devices": 1 if used.index is None else [used.index]}
    if processes() > 1:
        local = int(os.environ["LOCAL_WORLD_SIZE"])
        # A static graph may hold parameters without a gradient, as UNETR's does.
        strategy = DDPStrategy(static_graph=True)
        where = {"devices": local, "num_nodes": processes() // local, "strategy": strategy}
    fabric = Fabric(accelerator=used.type, precision=config.precision, **where)  # type: ignore[arg-type]
    fabric.launch()
    return fabric


def _train(
    fabric: Fabric, config: RunConfig, folder: Path, progress: bool | None, interval: float
) -> None:
    if fabric.is_global_zero:
        remove_temporaries(folder)
    dataset = data.open(config.dataset)
    origin, files = about_to_train(config, dataset), dataset.file_states()
    _require_same_data(folder, origin, files)
    network = build_model(config)
    adamw = torch.optim.AdamW(network.parameters(), weight_decay=config.weight_decay, fused=True)
    model, optimizer = fabric.setup(network, adamw)
    history = _load_checkpoint(fabric, config, folder / "checkpoint.pt", network, adamw)
    if fabric.device.type == "cuda":
        capturable(adamw)
    loss_function = labels.loss_function(dataset.entry)

    first_step = len(history)
    with fabric.rank_zero_first():  # the others find the cases preprocessed
        batches = _batches(config, dataset, first_step, fabric.global_rank)
    loader = fabric.setup_dataloaders(batches, use_distributed_sampler=False)
    bar = tqdm(
        loader,
        desc=f"training {run_id(config)}",
        initial=first_step,
        total=config.steps,
        disable=not fabric.is_global_zero or (None if progress is None else not progress),
    )
    model.train()

    def forward_and_back(image: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        optimizer.zero_grad()
        loss = loss_function(model(image), label)
        fabric.backward(loss)
        optimizer.step()
        return loss.detach()

    several = "several processes exchange gradients" if processes() > 1 else ""
    take_step = CapturedStep(forward_and_back, several)
    start = time.perf_counter() - (history[-1][3] if history else 0.0)
    saved = time.perf_counter()
    for step, batch in enumerate(bar, start=first_step):
        set_learning_rate(adamw, learning_rate(config, step))
        loss = take_step(batch["image"], batch["label"])
        mean: Any = fabric.all_reduce(loss, reduce_op="mean")  # of the processes
        of_batch = float(mean)
        _check_finite(config, step, math.isfinite(of_batch))
        now = time.perf_counter()
        history.append((step, of_batch, learning_rate(config, step), now - start))
        bar.set_postfix(loss=f"{of_batch:.3f}", refresh=False)
        if fabric.is_global_zero and now - saved > interval:
            _check_finite(config, step, _has_finite_weights(network))
            _require_same_data(folder, origin, files)
            _save_checkpoint(config, folder / "checkpoint.pt", network, adamw, history)
            saved = now
    if fabric.is_global_zero:
        _check_finite(config, config.steps - 1, _has_finite_weights(network))
        _require_same_data(folder, origin, files)
        _save_result(origin._replace(weights=network.state_dict()), folder, history)
    fabric.barrier()  # what comes next reads it


def _require_same_data(folder: Path, origin: Trained, files: dict[Path, str]) -> None:
    """`DataError` when the data is not any more what the run, which its folder is named for, began with."""
    changes, now = data_changes(origin), data.open(origin.config.dataset).file_states()
    if changes or run_dir(origin.config) != folder:
        changed = sorted(path for path, _ in files.items() ^ now.items())
        names = ", ".join(dict.fromkeys(map(str, changed[:5]))) or origin.config.dataset
        raise data.DataError(
            f"{names}: changed while run {folder.name} trained on it ({'; '.join(changes)});"
            " nothing more is saved; put the files back to go on, or train anew"
        )


def _check_finite(config: RunConfig, step: int, finite: bool) -> None:
    if not finite:
        raise FloatingPointError(
            f"step {step}: loss or weights are no finite numbers any more, and nothing more is saved;"
            f" try a lower learning rate than {config.learning_rate:g}"
        )


def _has_finite_weights(network: nn.Module) -> bool:
    return all(bool(weight.isfinite().all()) for weight in network.parameters())


def _batches(config: RunConfig, dataset: data.Dataset, first_step: int, rank: int) -> DataLoader:
    """This process's share of the remaining batches, in order; each sample knows its own step."""
    samples = data.TrainingSamples(
        dataset,
        dataset.split(config.fold).train,
        config.patch_size,
        config.batch_size,
        config.steps - first_step,
        config.seed,
        augment=config.augment,
        first_step=first_step,
    )
    share = config.batch_size // processes()
    starts = range(rank * share, len(samples), config.batch_size)
    batches = ([*range(start, start + share)] for start in starts)  # made as they are needed
    return DataLoader(samples, batch_sampler=batches, num_workers=_loading_processes())


def _loading_processes() -> int:
    """How many processes prepare samples beside a GPU; on the CPU the training itself needs the cores."""
    is_daemon = multiprocessing.current_process().daemon  # as Dask's workers; they may start none
    return 0 if device().type == "cpu" or is_daemon else min(4, os.cpu_count() or 1)


def _save_checkpoint(
    config: RunConfig,
    path: Path,
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    history: list[tuple],
) -> None:
    state = {
        "model": network.state_dict(),
        "optimizer": optimizer.state_dict(),
        "history": torch.tensor(history, dtype=torch.float64),
    }
    save_state(path, config, state)


def _load_checkpoint(
    fabric: Fabric,
    config: RunConfig,
    path: Path,
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
) -> list:
    """Restore the state of an interrupted run; returns its history, empty for a new run."""
    found = fabric.is_global_zero and path.is_file()
    state = fabric.broadcast(load_state(path, config) if found else None)
    if state is None:
        return []
    network.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return [tuple(row) for row in state["history"].tolist()]


def _save_result(trained: Trained, folder: Path, history: list[tuple]) -> None:
    """Write weights, history and, last, the record that marks the run as done; drop the checkpoint."""
    table = pd.DataFrame(history, columns=list(HISTORY)).astype({"step": int})
    tables.write(table, folder / "history.csv", digits=None)
    save_trained(folder / "model.safetensors", trained)
    record = {
        "run": folder.name,
        "config": dataclasses.asdict(trained.config),
        "data_fingerprint": trained.fingerprint,
        "device": device().type,
        "machine": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "processes": processes(),
        "versions": trained.versions,
        "training_seconds": history[-1][3],
    }
    with atomic_path(folder / "run.json") as temporary:
        temporary.write_text(json.dumps(record, indent=1))
    (folder / "checkpoint.pt").unlink(missing_ok=True)
