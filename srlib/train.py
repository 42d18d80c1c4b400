"""Training: an explicit loop on Lightning Fabric whose budget is a number of optimizer steps.

Every sample is a function of (seed, step, index) and the learning rate a function of the step, so a run that was
interrupted and resumed computes the same weights as one that was not, bit for bit on the CPU.
"""

from __future__ import annotations

import dataclasses
import json
import platform
import time
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from lightning_fabric import Fabric
from monai.losses import DiceCELoss
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from srlib import data
from srlib.model import FEATURES, SegResMamba
from srlib.paths import atomic_path
from srlib.runs import RunConfig, device, is_done, run_dir, run_id

HISTORY = ("step", "loss", "learning_rate", "seconds")


@dataclass(frozen=True)
class TrainResult:
    """A finished run: its folder, the trained network in eval mode, and one history row a step."""

    run_dir: Path
    model: nn.Module
    history: pd.DataFrame


def build_model(config: RunConfig) -> SegResMamba:
    """The untrained network of a run, with weights that only its seed decides."""
    dataset = data.get(config.dataset)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return SegResMamba(
            dataset.in_channels,
            dataset.out_channels,
            FEATURES[config.model],
            nslices=config.nslices,
            tom=config.tom,
            tom_residual=config.tom_residual,
            scan_orders=config.scan_orders,
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

    Args:
        config: what to train.
        progress: show a bar with loss and remaining time; `None` shows it in a terminal only.
        checkpoint_seconds: how often the state is saved, so that a crash costs at most this much.

    Raises:
        srlib.data.DataError: before anything is computed, when a case cannot be trained on.
    """
    folder = run_dir(config)
    if not is_done(config):
        data.check(config.dataset)
        _train(config, folder, progress, checkpoint_seconds)
    return TrainResult(folder, load_model(config), pd.read_csv(folder / "history.csv"))


def load_model(config: RunConfig) -> SegResMamba:
    """The trained network of a finished run, in eval mode on the run's device."""
    if not is_done(config):
        raise FileNotFoundError(f"run {run_id(config)} is not trained here: {run_dir(config)}")
    model = build_model(config)
    model.load_state_dict(load_file(run_dir(config) / "model.safetensors"))
    return model.to(device()).eval()


def _train(config: RunConfig, folder: Path, progress: bool | None, interval: float) -> None:
    fabric = Fabric(accelerator=device().type, devices=1, precision=config.precision)  # type: ignore[arg-type]
    network = build_model(config)
    adamw = torch.optim.AdamW(network.parameters(), weight_decay=config.weight_decay, fused=True)
    history = _load_checkpoint(folder / "checkpoint.pt", network, adamw)
    model, optimizer = fabric.setup(network, adamw)
    loss_function = DiceCELoss(to_onehot_y=True, softmax=True, include_background=False)

    first_step = len(history)
    loader = fabric.setup_dataloaders(_batches(config, first_step))
    bar = tqdm(
        loader,
        desc=f"training {run_id(config)}",
        initial=first_step,
        total=config.steps,
        disable=None if progress is None else not progress,
    )
    model.train()
    start = time.perf_counter() - (history[-1][3] if history else 0.0)
    saved = time.perf_counter()
    for step, batch in enumerate(bar, start=first_step):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step)
        loss = loss_function(model(batch["image"]), batch["label"])
        optimizer.zero_grad()
        fabric.backward(loss)
        optimizer.step()

        now = time.perf_counter()
        history.append((step, loss.item(), learning_rate(config, step), now - start))
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
        if now - saved > interval:
            _save_checkpoint(folder / "checkpoint.pt", network, adamw, history)
            saved = now
    _save_result(config, folder, network, history)


def _batches(config: RunConfig, first_step: int) -> DataLoader:
    """Batches of the remaining steps, in order; each sample knows its own step."""
    samples = data.TrainingSamples(
        config.dataset,
        data.split(config.dataset, config.fold).train,
        config.patch_size,
        config.batch_size,
        config.steps - first_step,
        config.seed,
        augment=config.augment,
        first_step=first_step,
    )
    return DataLoader(samples, batch_size=config.batch_size)


def _save_checkpoint(
    path: Path, network: nn.Module, optimizer: torch.optim.Optimizer, history: list[tuple]
) -> None:
    state = {
        "model": network.state_dict(),
        "optimizer": optimizer.state_dict(),
        "history": torch.tensor(history, dtype=torch.float64),
    }
    with atomic_path(path) as temporary:
        torch.save(state, temporary)


def _load_checkpoint(path: Path, network: nn.Module, optimizer: torch.optim.Optimizer) -> list:
    """Restore the state of an interrupted run; returns its history, empty for a new run."""
    if not path.is_file():
        return []
    state = torch.load(path, map_location="cpu", weights_only=True)
    network.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return [tuple(row) for row in state["history"].tolist()]


def _save_result(config: RunConfig, folder: Path, network: nn.Module, history: list[tuple]) -> None:
    """Write weights, history and, last, the record that marks the run as done; drop the checkpoint."""
    table = pd.DataFrame(history, columns=list(HISTORY)).astype({"step": int})
    with atomic_path(folder / "history.csv") as temporary:
        table.to_csv(temporary, index=False)
    weights: dict[str, Tensor] = {k: v.cpu().contiguous() for k, v in network.state_dict().items()}
    with atomic_path(folder / "model.safetensors") as temporary:
        save_file(weights, temporary, metadata={"config": config.to_json()})
    record = {
        "run": run_id(config),
        "config": dataclasses.asdict(config),
        "data_fingerprint": data.fingerprint(config.dataset),
        "device": device().type,
        "machine": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "training_seconds": history[-1][3],
    }
    with atomic_path(folder / "run.json") as temporary:
        temporary.write_text(json.dumps(record, indent=1))
    (folder / "checkpoint.pt").unlink(missing_ok=True)
