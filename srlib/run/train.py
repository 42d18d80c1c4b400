"""Training: an explicit loop on Lightning Fabric whose budget is a number of optimizer steps.

Every sample is a function of (seed, step, index) and the learning rate a function of the step, so a run that was
interrupted and resumed computes the same weights as one that was not, bit for bit on the CPU.

Gradients are clipped to a norm of 1; AdamW's weight decay leaves out what mamba-ssm leaves out, vectors and the rates A
of forgetting. The trained network is an average over the steps: an exponential moving average of weights and buffers,
which at first forgets faster, so that nothing of the initial weights stays.

That is the recipe `default`. `authors` is the paper's authors', as their script for BraTS has it (the repository
badhandas/SegResMamba, brats_train.py and dataset_brats.py): Adam with weight decay on everything, the rate from its
peak to 0 by a cosine, Dice of sigmoids with squares in the denominator, mirroring along each axis, intensities scaled
and shifted by up to .1 in every sample, z-scores of what is not 0; no warm-up, no clipping, and the last weights. Three
things differ. It is computed in fp32, they use fp16 with scaled losses. The cosine falls by the step, not by the epoch.
They keep the epoch that is best on the cases that they report; nothing is chosen here.

Under torchrun the processes share each batch. As many samples each, loss and gradients of the batch are the means of
theirs; nothing in the networks or the loss looks across samples.

| file of a run | content |
|---|---|
| `checkpoint.pt` | weights, their average, optimizer and history of an unfinished run, and its configuration |
| `model.safetensors` | averaged weights; as metadata what was trained, on which data and cases, and with what |
| `history.csv`, `run.json` | loss and learning rate of each step; the record that marks the run as done |

No file is read as a pickle, which could run code: PyTorch loads the first with `weights_only`. Fabric's `save` is not
used: it renames a file that the system has not written to the disk yet, and holds it in memory once more.
"""

from __future__ import annotations

import json
import logging
import math
import multiprocessing
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from zipfile import is_zipfile

import pandas as pd
import torch
from torch import Tensor, nn
from torch.profiler import record_function
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from srlib import __version__, data, machine, tables
from srlib.data import labels
from srlib.data.catalog import STATED, tuples
from srlib.data.samples import AUTHORS, OURS, Augmentation
from srlib.files import (
    BrokenFile,
    atomic_path,
    load_tensors,
    locked,
    remove_temporaries,
    save_tensors,
)
from srlib.machine import device, is_first_process, processes
from srlib.net.model import FEATURES, SegResMamba
from srlib.net.peers import SMALL, build
from srlib.run.captured import CapturedStep, capturable, set_learning_rate
from srlib.run.runs import RunConfig, is_done, open_data, run_dir

if TYPE_CHECKING:
    from lightning_fabric import Fabric

# Types of weights: as trained, rounded as in the repository's small networks, and counters.
WEIGHTS = (torch.float32, torch.float16, torch.bfloat16, torch.int64)
BETAS = (0.9, 0.99)
CLIP = 1.0  # norm of all gradients together
AVERAGE = 0.998  # what a step keeps of the average


class Recipe(NamedTuple):
    """Numbers of a recipe: the largest norm of all gradients together, what a step keeps of the average, samples."""

    clip: float
    average: float
    augmentation: Augmentation


SETTINGS = {"default": Recipe(CLIP, AVERAGE, OURS), "authors": Recipe(math.inf, 0.0, AUTHORS)}
# A training has diverged when the mean of its last losses, some 20, is so many times its lowest value. A loss may end
# near 0, where one wrong voxel is many times as much.
LAST, DIVERGED, LOWEST = 20, 10.0, 0.05
logger = logging.getLogger("srlib")


class CheckpointError(ValueError):
    """A file of a training that cannot be used; the message names it and says why."""


@dataclass(frozen=True)
class TrainResult:
    """A finished run: its folder, the trained network in eval mode, and one history row a step."""

    run_dir: Path
    model: nn.Module
    history: pd.DataFrame


class Trained(NamedTuple):
    """A trained network as its file holds it.

    Attributes:
        config: what was trained.
        entry: the data set that it was trained on: channels, classes, spacing, normalisation.
        weights: the network's state dict, on the CPU.
        fingerprint: of the data that it was trained on (`srlib.data.Dataset.fingerprint`).
        split: the cases that it was trained on, and those that were held out.
        versions: of what it was trained with.
    """

    config: RunConfig
    entry: data.Entry
    weights: dict[str, Tensor]
    fingerprint: str
    split: data.Split
    versions: dict[str, str]


def build_model(config: RunConfig, entry: data.Entry | None = None) -> nn.Module:
    """The untrained network of a run, with weights that only its seed decides.

    Args:
        config: of the run.
        entry: its data set's; `None` looks it up.
    """
    entry = entry or data.get(config.dataset)
    channels = entry.in_channels, entry.out_channels
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        if config.model in SMALL:
            return build(config.model, *channels, config.patch_size, SMALL)
        return SegResMamba(**network_arguments(config, entry))


def network_arguments(config: RunConfig, entry: data.Entry) -> dict[str, Any]:
    """Arguments of `SegResMamba` that make a run's network.

    Raises:
        ValueError: the run's network is a peer.
    """
    if config.model not in FEATURES:
        raise ValueError(f"{config.model!r} is a peer; expected a run of SegResMamba")
    names = ("nslices", "slice_axis", "tom", "tom_residual", "scan_orders", "recurrence")
    settings = {name: getattr(config, name) for name in (*names, "extra_conv", "block", "variant")}
    channels = {"in_channels": entry.in_channels, "out_channels": entry.out_channels}
    return channels | {"features": FEATURES[config.model]} | settings


def learning_rate(config: RunConfig, step: int) -> float:
    """Linear warm-up to the peak, then polynomial decay with exponent 0.9 (as nnU-Net's), for 0-based `step`.

    By the authors' recipe half a cosine from the peak to 0.
    """
    if config.recipe == "authors":
        return config.learning_rate * (1 + math.cos(math.pi * step / config.steps)) / 2
    warmup = round(config.warmup * config.steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    remaining = (config.steps - step) / (config.steps - warmup)
    return config.learning_rate * remaining**0.9


def parameter_groups(network: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameters for AdamW in two groups: without weight decay are vectors, and what mamba-ssm marks, A_log.

    A decay pulls a norm's scale, a bias or a rate of forgetting towards a value that means nothing.
    """
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for parameter in network.parameters():
        exempt = parameter.ndim < 2 or getattr(parameter, "_no_weight_decay", False)
        groups[not exempt].append(parameter)
    return [
        {"params": of, "weight_decay": weight_decay * decays} for decays, of in groups.items() if of
    ]


def make_optimizer(network: nn.Module, config: RunConfig) -> torch.optim.Adam:
    """Make the optimizer of a run's network, whose rate is set at each step."""
    if config.recipe == "authors":
        return torch.optim.Adam(network.parameters(), weight_decay=config.weight_decay, fused=True)
    groups = parameter_groups(network, config.weight_decay)
    return torch.optim.AdamW(groups, betas=BETAS, fused=True)


class WeightAverage:
    """Exponential moving average of a network's weights and floating-point buffers.

    Step n (from 0) keeps min(0.998, (1 + n) / (10 + n)) of it, as TensorFlow's `ExponentialMovingAverage` does.

    Args:
        network: stays where it is; its tensors are read.
        most: what a step keeps at most; with 0 the average is the last weights.

    Attributes:
        values: name -> averaged tensor; counters are the network's own.
    """

    def __init__(self, network: nn.Module, most: float = AVERAGE) -> None:
        self.most = most
        now = network.state_dict()  # shares the network's memory
        floats = [name for name, tensor in now.items() if tensor.is_floating_point()]
        self.values = now | {name: now[name].clone() for name in floats}
        self._mine = [self.values[name] for name in floats]
        self._now = [now[name] for name in floats]

    def update(self, step: int) -> None:
        """Take the weights after step `step` in."""
        kept = min(self.most, (1 + step) / (10 + step))
        torch._foreach_lerp_(self._mine, self._now, 1 - kept)

    def load(self, values: Mapping[str, Tensor]) -> None:
        """Go on from the average that a checkpoint holds."""
        for name, tensor in self.values.items():
            tensor.copy_(values[name])


class Divergence:
    """The running mean of a training's losses, held against its lowest value so far."""

    def __init__(self) -> None:
        self.mean = self.lowest = math.inf

    def add(self, loss: float) -> bool:
        """Take the loss of the next step in; tell whether the training has diverged."""
        self.mean = loss if math.isinf(self.mean) else self.mean + (loss - self.mean) / LAST
        self.lowest = min(self.lowest, max(self.mean, LOWEST))
        return self.mean > DIVERGED * self.lowest


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
        CheckpointError: the state to resume from is broken or another run's.
        OSError: nothing can be written, as on a full disk; what was written before stays.
        FloatingPointError: the training diverged: the mean of some 20 losses rose tenfold, or a number is
            not finite any more; the state before stays.
    """
    if config.batch_size % processes():
        raise ValueError(
            f"batch_size {config.batch_size} cannot be shared equally by {processes()} processes"
        )
    folder = run_dir(config)
    if not is_done(config):
        fabric, dataset = launch(config), open_data(config)
        with fabric.rank_zero_first():  # the others find the cases checked
            dataset.check(config.fold)
        with locked(folder) if is_first_process() else nullcontext(), same_bits():
            if not fabric.broadcast(is_done(config)):
                _train(fabric, config, dataset, folder, progress, checkpoint_seconds)
    model = restore(load_trained(folder), folder)
    return TrainResult(folder, model, tables.read(folder / "history.csv"))


def restore(trained: Trained, file: Path) -> nn.Module:
    """A trained network from what its file holds, in eval mode on this machine's device.

    Its largest output is the label, also where it was trained on overlapping regions.

    Raises:
        CheckpointError: naming `file`, when its weights are not those of its configuration.
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


@contextmanager
def same_bits() -> Iterator[None]:
    """Have cuDNN take deterministic algorithms only, with which SegResMamba's training on a GPU can be repeated."""
    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    try:
        yield
    finally:
        torch.backends.cudnn.deterministic = before


def launch(config: RunConfig) -> Fabric:
    """The run's device or, under torchrun, those of its processes."""
    from lightning_fabric import Fabric
    from lightning_fabric.strategies import DDPStrategy

    used = device()
    where: dict[str, Any] = {"devices": 1 if used.index is None else [used.index]}
    if processes() > 1:

        class Processes(DDPStrategy):
            """Processes without `DistributedDataParallel`: the training step averages the gradients itself."""

            def setup_module(self, module: nn.Module) -> Any:
                """Leave the network as it is."""
                return module

        local = int(os.environ["LOCAL_WORLD_SIZE"])
        where = {"devices": local, "num_nodes": processes() // local, "strategy": Processes()}
    fabric = Fabric(accelerator=used.type, precision=config.precision, **where)  # type: ignore[arg-type]
    fabric.launch()
    return fabric


def training_step(
    fabric: Fabric, config: RunConfig, entry: data.Entry
) -> tuple[nn.Module, torch.optim.Adam, Callable[[Tensor, Tensor], Tensor]]:
    """Make a run's untrained network on its device, its optimizer and its training step.

    Args:
        fabric: from `launch`.
        config: of the run.
        entry: its data set's.

    Returns:
        The network, the optimizer, and the step: image (B, C, D, H, W) and label (B, 1, D, H, W) of this process -> the
        loss of all processes. They have equal weights before and after it.
    """
    network = build_model(config, entry)
    adam = make_optimizer(network, config)
    model, optimizer = fabric.setup(network, adam)
    model.train()
    loss_function = labels.loss_function(entry, config.recipe == "authors")

    def step(image: Tensor, label: Tensor) -> Tensor:
        optimizer.zero_grad()
        with record_function("forward pass and loss"):
            loss = loss_function(model(image), label)
        with record_function("backward pass"):
            fabric.backward(loss)
        loss = loss.detach()
        # UNETR has parameters without a gradient.
        _average([loss, *(p.grad for p in network.parameters() if p.grad is not None)])
        with record_function("clipping and optimizer"):
            clip = SETTINGS[config.recipe].clip
            nn.utils.clip_grad_norm_(network.parameters(), clip, foreach=True)
            optimizer.step()
        return loss

    return network, adam, step


def _average(tensors: list[Tensor]) -> None:
    """Replace tensors by their means over the processes, in one exchange, which a CUDA graph may hold."""
    if processes() > 1:
        together = torch.cat([t.flatten() for t in tensors])
        torch.distributed.all_reduce(together)
        means = (together / processes()).split([t.numel() for t in tensors])
        torch._foreach_copy_(tensors, [m.view_as(t) for m, t in zip(means, tensors, strict=True)])


def _train(
    fabric: Fabric,
    config: RunConfig,
    dataset: data.Dataset,
    folder: Path,
    progress: bool | None,
    interval: float,
) -> None:
    checkpoint, history = folder / "checkpoint.pt", []
    if fabric.is_global_zero:
        remove_temporaries(folder)
    origin, files = about_to_train(config, dataset), dataset.file_states()
    _require_unchanged(origin, files, folder)
    network, adam, step_with = training_step(fabric, config, dataset.entry)
    recipe, divergence = SETTINGS[config.recipe], Divergence()
    average = WeightAverage(network, recipe.average)
    found = fabric.is_global_zero and checkpoint.is_file()
    if state := fabric.broadcast(load_state(checkpoint, config) if found else None):
        network.load_state_dict(state["model"])
        average.load(state["average"])
        adam.load_state_dict(state["optimizer"])
        history = [tuple(row) for row in state["history"].tolist()]
        for row in history:
            divergence.add(row[1])
    if fabric.device.type == "cuda":
        capturable(adam)

    first_step = len(history)
    with fabric.rank_zero_first():  # the others find the cases preprocessed
        batches = _batches(config, dataset, first_step, fabric.global_rank)
    loader = fabric.setup_dataloaders(batches, use_distributed_sampler=False)
    bar = tqdm(
        desc=f"training {folder.name}",
        initial=first_step,
        total=config.steps,
        disable=not fabric.is_global_zero or (None if progress is None else not progress),
    )

    def require(fine: bool, step: int, what: str) -> None:
        if not fine:
            raise FloatingPointError(
                f"step {step}: {what}, and nothing more is saved;"
                f" try a lower learning rate than {config.learning_rate:g}"
            )

    no_numbers = "loss or weights are no finite numbers any more"

    def check_before_saving(step: int) -> None:
        require(all(bool(w.isfinite().all()) for w in network.parameters()), step, no_numbers)
        _require_unchanged(origin, files, folder)

    take_step = CapturedStep(step_with)
    start = time.perf_counter() - (history[-1][3] if history else 0.0)
    saved = time.perf_counter()
    coming: Iterator[dict[str, Tensor]] = iter(loader)  # type: ignore[arg-type]
    batch = next(coming, {})
    for step in range(first_step, config.steps):
        set_learning_rate(adam, learning_rate(config, step))
        loss = take_step(batch["image"], batch["label"])
        batch = next(coming, {})  # is made while a GPU takes the step
        of_batch = float(loss)
        require(math.isfinite(of_batch), step, no_numbers)
        diverged = divergence.add(of_batch)
        rise = f"the loss rose from {divergence.lowest:.3g} to {divergence.mean:.3g}, the training diverged"
        require(not diverged, step, rise)
        average.update(step)
        now = time.perf_counter()
        history.append((step, of_batch, learning_rate(config, step), now - start))
        bar.set_postfix(loss=f"{of_batch:.3f}", refresh=False)
        bar.update()
        if fabric.is_global_zero and now - saved > interval:
            check_before_saving(step)
            reached = {"model": network.state_dict(), "average": average.values}
            reached["optimizer"] = adam.state_dict()
            rows = torch.tensor(history, dtype=torch.float64)
            save_state(checkpoint, config, reached | {"history": rows})
            saved = now
    bar.close()
    if fabric.is_global_zero:
        check_before_saving(config.steps - 1)
        _save_result(origin._replace(weights=average.values), folder, history)
    fabric.barrier()  # what comes next reads it


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
        device=device() if device().type == "cuda" else None,
        augmentation=SETTINGS[config.recipe].augmentation,
    )
    share = config.batch_size // processes()
    starts = range(rank * share, len(samples), config.batch_size)
    batches = ([*range(start, start + share)] for start in starts)  # made as they are needed
    if samples.staying:
        return DataLoader(samples, batch_sampler=batches)
    pinned = device().type == "cuda"  # copied to the GPU while it computes
    return DataLoader(
        samples, batch_sampler=batches, num_workers=_loading_processes(), pin_memory=pinned
    )


def _loading_processes() -> int:
    """Number of processes that make samples beside a GPU; on the CPU the training itself needs the cores."""
    is_daemon = multiprocessing.current_process().daemon  # as Dask's workers; they may start none
    return 0 if device().type == "cpu" or is_daemon else min(4, os.cpu_count() or 1)


def _save_result(trained: Trained, folder: Path, history: list[tuple]) -> None:
    """Write weights, history and, last, the record that marks the run as done; drop the checkpoint."""
    columns = ["step", "loss", "learning_rate", "seconds"]
    table = pd.DataFrame(history, columns=columns).astype({"step": int})
    tables.write(table, folder / "history.csv", digits=None)
    save_trained(folder / "model.safetensors", trained)
    record = {
        "run": folder.name,
        "config": asdict(trained.config),
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


# --- The data set, then and now ------------------------------------------------------------------


def about_to_train(config: RunConfig, dataset: data.Dataset) -> Trained:
    """State what will be known of a network that is trained here and now, without its weights."""
    facts = dataset.fingerprint, dataset.split(config.fold), _versions()
    return Trained(config, dataset.entry, {}, *facts)


def data_changes(trained: Trained) -> list[str]:
    """Say how the data set, as it is now, differs from the one of a training."""
    dataset = open_data(trained.config)
    entry, split = dataset.entry, dataset.split(trained.config.fold)
    found = [
        f"{field} {getattr(trained.entry, field)} then, {getattr(entry, field)} now"
        for field in STATED
        if getattr(trained.entry, field) != getattr(entry, field)
    ]
    for kind, then, now in zip(("training", "held-out"), trained.split, split, strict=True):
        for what, ids in (("new", set(now) - set(then)), ("missing", set(then) - set(now))):
            if ids:
                listed = ", ".join(sorted(ids)[:5]) + (", ..." if len(ids) > 5 else "")
                found.append(f"{len(ids)} {what} {kind} cases ({listed})")
    if (fingerprint := dataset.fingerprint) != trained.fingerprint:
        found.append(f"fingerprint {trained.fingerprint} then, {fingerprint} now")
    return found


def require_same_data(trained: Trained, file: Path) -> None:
    """`DataError` when the data set is not as it was when the network in `file` was trained."""
    if changes := data_changes(trained):
        raise data.DataError(
            f"{file}: {trained.config.dataset} is not what it was trained on: {'; '.join(changes)}"
        )


def _require_unchanged(origin: Trained, files: dict[Path, str], folder: Path) -> None:
    """`DataError`, naming files, when the data is not any more what the run, which names its folder, began with."""
    changes = data_changes(origin)
    if changes or run_dir(origin.config) != folder:
        now = data.open(origin.config.dataset).file_states()
        changed = sorted(path for path, _ in files.items() ^ now.items())
        names = ", ".join(dict.fromkeys(map(str, changed[:5]))) or origin.config.dataset
        raise data.DataError(
            f"{names}: changed while run {folder.name} trained on it ({'; '.join(changes)});"
            " nothing more is saved; put the files back to go on, or train anew"
        )


# --- Files of a training --------------------------------------------------------------------------


def save_state(path: Path, config: RunConfig, state: Mapping[str, Any]) -> None:
    """Write the state of an unfinished run; tensors and plain values only."""
    with atomic_path(path) as temporary:
        try:
            torch.save({"config": config.to_json(), **state}, temporary)
        except RuntimeError as error:  # which does not name a full disk as Python does
            raise OSError(f"{path}: could not be written; is the disk full? ({error})") from error


def load_state(path: Path, config: RunConfig) -> dict[str, Any]:
    """Read what `save_state` wrote for the same configuration.

    Raises:
        CheckpointError: a file that is cut short or no checkpoint, or one of another configuration.
    """
    try:
        if not is_zipfile(path):
            raise ValueError("neither torch's format nor whole")
        state = torch.load(path, map_location="cpu", weights_only=True)
        then = json.loads(state.pop("config"))
    except Exception as error:  # torch, zip and pickle know many kinds of broken file
        raise CheckpointError(
            f"{path}: not a whole checkpoint of srlib ({type(error).__name__});"
            " move it away to train this run from its start"
        ) from error
    now = json.loads(config.to_json())
    if then != now:
        names = sorted(key for key in then.keys() | now if then.get(key) != now.get(key))
        raise CheckpointError(
            f"{path}: the checkpoint of another configuration, it differs in"
            f" {', '.join(names)}; move it away to train from the start"
        )
    return state


def save_trained(path: Path, trained: Trained) -> None:
    """Write a trained network and all that a prediction needs to know of it."""
    # cloned, since DynUNet has one tensor under two names, which safetensors refuses
    weights = {name: tensor.cpu().clone() for name, tensor in trained.weights.items()}
    about = {"config": asdict(trained.config), "dataset": asdict(trained.entry)}
    facts = {"fingerprint": trained.fingerprint, "split": trained.split._asdict()}
    save_tensors(path, weights, about | facts | {"versions": trained.versions})


def network_file(path: Path) -> Path:
    """The file of a trained network: `path`, or `model.safetensors` where that is the folder of a run."""
    return path / "model.safetensors" if path.is_dir() else path


def load_trained(path: Path) -> Trained:
    """Read a trained network: the file, or the folder of its run; versions that differ from those here are logged.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: a file that is cut short, changed, of another kind, or without what prediction needs;
            weights that are no finite numbers, or of another type than trainings leave.
    """
    path = network_file(path)
    if not path.is_file():
        raise FileNotFoundError(f"no trained network here: {path}")
    try:
        weights, metadata = load_tensors(path)
    except BrokenFile as error:
        raise CheckpointError(str(error)) from error
    try:
        about = tuples(metadata)
        facts = about["fingerprint"], data.Split(**about["split"]), about["versions"]
        about["dataset"].pop("patch_size", None)  # of networks from before it was planned apart
        if about["config"]["warmup"] >= 1:  # of networks from before it was a share
            about["config"]["warmup"] /= about["config"]["steps"]
        config, entry = RunConfig(**about["config"]), data.Entry(**about["dataset"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path}: its metadata hold no run of this version of srlib ({error})"
        ) from error
    types = (*WEIGHTS, torch.float64) if config.precision == "64-true" else WEIGHTS
    for name, tensor in weights.items():
        if tensor.dtype not in types:
            raise CheckpointError(f"{path}: {name} is {tensor.dtype}; expected one of {types}")
        if not tensor.isfinite().all():
            raise CheckpointError(f"{path}: {name} holds NaN or infinity; expected finite weights")
    trained, here = Trained(config, entry, weights, *facts), _versions()
    for name, then in trained.versions.items():
        # the build, as +cpu, is the device's
        if then.partition("+")[0] != here[name].partition("+")[0]:
            logger.warning("%s: trained with %s %s, here is %s", path, name, then, here[name])
    return trained


def _versions() -> dict[str, str]:
    """Versions of what trained weights depend on, as they are recorded with a run."""
    known = machine.versions()
    return {"srlib": __version__} | {name: known[name] for name in ("torch", "monai", "numpy")}
