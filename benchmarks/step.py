"""A training step: its memory, arithmetic, time and energy, counted or measured, of every network.

    python benchmarks/step.py count            # results/reference/memory/counted.csv, levers.csv; no device is used
    python benchmarks/step.py measure          # results/reference/memory/measured_cpu.csv; memory, no times
    python benchmarks/step.py levers           # results/reference/memory/levers_cpu.csv; nothing else may run
    python benchmarks/step.py settings OUT.csv # results/reference/gpu/memory.csv
    python benchmarks/step.py gpu OUT.csv      # results/reference/gpu/step.csv; eager and captured steps on one GPU
    python benchmarks/step.py small OUT.csv    # results/reference/gpu/small.csv; the same of the comparisons' systems

A row is written as soon as it is measured.
"""

from __future__ import annotations

import gc
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, astuple, fields
from functools import partial
from itertools import product
from math import nan
from pathlib import Path
from statistics import median
from typing import Annotated, Any
from unittest.mock import patch

import pandas as pd
import psutil
import torch
import typer
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from srlib import data, files, machine, tables
from srlib.net.costs import GIB, LEVERS, Workload, count, loss_function, measure_apart
from srlib.net.peers import PEERS
from srlib.run import train
from srlib.run.captured import WARM_UP, CapturedStep, capturable
from srlib.study import grid
from srlib.study.published import PUBLISHED

app = typer.Typer(help=__doc__, rich_markup_mode=None)
FOLDER = files.REFERENCE / "memory"
SIZES = (64, 96, 128, 160)  # counted
Sizes = Annotated[list[int] | None, typer.Option(help="Voxels along an edge; may be repeated.")]
Peers = Annotated[list[str] | None, typer.Option("--peer", help="May be repeated.")]
Systems = Annotated[list[str] | None, typer.Option("--system", help="May be repeated.")]
Minutes = Annotated[float, typer.Option(help="After these no new row is begun.")]
Device = Annotated[str, typer.Option(help="cpu or cuda.")]


def write(rows: list[dict], file: Path) -> None:
    """Write the rows so far, and print the last one."""
    machine.write_table(pd.DataFrame(rows), file)
    print(*rows[-1].values(), flush=True)


# --- The tables of 05_memory ----------------------------------------------------------------------


@app.command("count")
def count_all() -> None:
    """Count every system, size and precision, with checkpoints at the paper's size; then SegResMamba's levers.

    Levers: GiB of activations after the loss and of the peak; `share` and `arithmetic` are of the first row's.
    """
    rows: list[dict] = []
    for checkpointing, size, precision, peer in product(
        (False, True), SIZES, ("fp32", "bf16"), PEERS
    ):
        if size == 128 or not checkpointing:
            work = Workload(peer, size, precision=precision, checkpointing=checkpointing)
            key = ("peer", "size", "precision", "checkpointing")
            rows.append({name: getattr(work, name) for name in key} | count(work).totals)
            write(rows, FOLDER / "counted.csv")
    rows = []
    for precision, (lever, options) in product(("fp32", "bf16"), LEVERS.items()):
        totals = count(Workload("segresmamba", precision=precision, **options)).totals
        kept, gmacs = totals["kept"] + totals["kept_by_loss"], totals["step_gmacs"]
        if not rows:
            all_kept, plain = kept, gmacs
        row = {"precision": precision, "lever": lever, "activations": kept, "peak": totals["peak"]}
        rows.append(row | {"share": kept / all_kept, "arithmetic": gmacs / plain})
        write(rows, FOLDER / "levers.csv")


@app.command()
def measure(device: Device = "cpu", size: Sizes = None) -> None:
    """Run every system in fp32, each in a fresh process; one that does not fit says how far it got."""
    limit = psutil.virtual_memory().available / GIB if device == "cpu" else None
    rows: list[dict] = []
    for edge, peer in product(size or [64], PEERS):
        found = measure_apart(Workload(peer, edge), device, steps=1, limit=limit)
        memory = {name: value for name, value in found.items() if not name.endswith("_s")}
        rows.append(
            {"device": machine.device_name(device), "peer": peer, "size": edge, "limit": limit}
            | memory
        )
        write(rows, FOLDER / f"measured_{device}.csv")


@app.command()
def levers(device: Device = "cpu", size: Sizes = None, steps: int = 3) -> None:
    """Time SegResMamba's steps with its levers: fp32 on the CPU, where most emulate bf16, both on CUDA."""
    precisions = ("fp32", "bf16") if device == "cuda" else ("fp32",)
    rows: list[dict] = []
    for edge, precision, (lever, options) in product(size or [64], precisions, LEVERS.items()):
        work = Workload("segresmamba", edge, precision=precision, **options)
        key = {
            "device": machine.device_name(device),
            "precision": precision,
            "lever": lever,
            "size": edge,
        }
        rows.append(key | measure_apart(work, device, steps))
        write(rows, FOLDER / f"levers_{device}.csv")


@app.command()
def settings(
    out: Path, minutes: Minutes = 9, peer: Peers = None, device: Device = "cuda", steps: int = 3
) -> None:
    """Measure memory and time in the settings of the paper's table 8, each network in a fresh process.

    Batch 1; BTCV and BraTS 128^3, Spleen 96^3, in fp32 and in bf16 autocast, then BTCV with checkpoints. A network that
    does not fit is a row that says how far it got. Rows that OUT.csv has already stay, so the same command goes on
    where it ended.
    """
    start, key = time.monotonic(), [field.name for field in fields(Workload)]
    rows = tables.read(out).to_dict("records") if out.exists() else []
    there = {tuple(row.get(name, ()) for name in ("setting", *key)) for row in rows}
    for checkpointing, (name, setting), precision, network in product(
        (False, True), PUBLISHED["settings"].items(), ("fp32", "bf16"), peer or PEERS
    ):
        work = Workload(network, **setting, precision=precision, checkpointing=checkpointing)
        if (checkpointing and name != "btcv_128") or (name, *astuple(work)) in there:
            continue
        if time.monotonic() - start > 60 * minutes:
            print("out of time before", name, work)
            break
        row = {"setting": name, **asdict(work), **measure_apart(work, device, steps)}
        del row["settings"]
        rows.append(row | {"device": machine.device_name(device), "torch": torch.__version__})
        write(rows, out)


# --- Eager and captured steps on one GPU ----------------------------------------------------------

VARIANTS = ("none", "inner", "outer")  # beside SegResMamba with both ToM layers
OURS = ("segresmamba", "segmamba")  # names of what has `recompute` begin so
EAGER, CAPTURED = 10, 50  # steps
ENERGY = 2500  # ms of steps whose energy is read
PRECISIONS = {"fp32": "32-true", "bf16": "bf16-mixed"}  # and Lightning Fabric's names
Step = Callable[[Tensor, Tensor], Tensor]
Row = tuple[dict[str, Any], Callable[[], Iterable[dict[str, float]]]]  # its key, what measures it


@app.command()
def gpu(out: Path, minutes: Minutes = 9, size: int = 128, peer: Peers = None) -> None:
    """Measure time, kernels, memory and energy of a step of every network on one GPU, in one process.

    The networks of `srlib.net.peers` and SegResMamba with fewer ToM layers, with one random image of one channel, 14
    classes; forward pass, Dice and cross-entropy, backward pass, AdamW. A row for each precision and each way to keep
    activations: `recomputation` off keeps what autograd asks for; on is `recompute` for SegResMamba and SegMamba,
    checkpoints around blocks for the others (`srlib.net.peers.with_checkpoints`).

    `eager_ms`, `captured_ms`: medians of 10 and 50 steps, launched from Python and replayed as a CUDA graph; `busy_ms`,
    `kernels`: the sum over a step's kernels, copies and fills, and their number, by torch's profiler; `peak_gib`: most
    memory allocated in eager steps; `joules`: a captured step's, by the board's counter; `error`: why there is nothing.

    Rows without an error that OUT.csv has already stay, so the same command goes on where it ended.
    """
    write_missing(out, minutes, gpu_rows(peer or [*PEERS], size))


@app.command()
def small(
    out: Path, minutes: Minutes = 9, system: Systems = None, batch_size: int = grid.BATCH
) -> None:
    """Measure the same of the systems of `srlib.study.grid`, with its patches of one channel and 3 classes.

    The step is the training's (`srlib.run.train.training_step`), without the average of weights. In fp32 all; in bf16
    not the ablations, apart from no ToM and the convolution. `with_samples_ms`, of SegResMamba and no ToM: the median
    step of a training of 150 steps on hippocampus, its samples included, without the first 30 steps; empty where the
    data is not there. `results/reference/cpu/step.csv` is of this command without a GPU (and without the data).
    """
    write_missing(out, minutes, small_rows(system or [*grid.SYSTEMS], batch_size))


def write_missing(out: Path, minutes: float, rows: Iterable[Row]) -> None:
    """Measure the rows that the table lacks, until the minutes are over; one that fails says why."""
    start, done = time.monotonic(), []
    if out.exists():
        done = [row for row in tables.read(out).to_dict("records") if pd.isna(row.get("error"))]
    for key, measured in rows:
        if any(key.items() <= row.items() for row in done):
            continue
        if time.monotonic() - start > 60 * minutes:
            print("out of time before", *key.values())
            break
        row = dict(key)
        try:
            for numbers in measured():
                row |= numbers
        except Exception as error:  # the others are measured all the same
            row["error"] = " ".join(f"{type(error).__name__}: {error}".split())
        done.append(row | {"device": machine.device_name(), "commit": machine.commit()[0]})
        write(done, out)


def gpu_rows(peers: list[str], size: int) -> Iterator[Row]:
    """The rows of `gpu`."""
    variants = [(f"segresmamba_{tom}", {"tom": tom}) for tom in VARIANTS if "segresmamba" in peers]
    for precision, again in product(("bf16", "fp32"), (False, True)):
        for name, settings in [*((peer, {}) for peer in peers), *variants]:
            ours = name.startswith(OURS)
            work = Workload(
                "segresmamba" if settings else name,
                size,
                precision=precision,
                checkpointing=again and not ours,
                settings=tuple((settings | ({"recompute": again} if ours else {})).items()),
            )
            key = {"network": name, "size": size, "precision": precision}
            yield key | {"recomputation": "on" if again else "off"}, partial(measure_gpu, work)


def measure_gpu(work: Workload) -> Iterator[dict[str, float]]:
    """One row's numbers."""
    device = machine.device().type

    def make() -> Step:
        network = work.network().to(device).train()
        options = {"lr": 1e-4, "fused": True, "capturable": device == "cuda"}
        optimizer = torch.optim.AdamW(network.parameters(), **options)

        def step(image: Tensor, label: Tensor) -> Tensor:
            optimizer.zero_grad()
            with work.autocast(device):
                loss = loss_function(network(image), label)
            loss.backward()
            optimizer.step()
            return loss.detach()

        return step

    yield measure_step(make, lambda: work.batch(device))


def small_rows(systems: list[str], batch_size: int) -> Iterator[Row]:
    """The rows of `small`, the fp32 ones first."""
    for precision, system in product(PRECISIONS, systems):
        if precision == "fp32" or system not in grid.ABLATIONS:
            yield (
                {"system": system, "precision": precision, "batch_size": batch_size},
                partial(measure_small, system, precision, batch_size),
            )


def measure_small(system: str, precision: str, batch_size: int) -> Iterator[dict[str, float]]:
    """One row's numbers, those of a training last."""
    settings: dict[str, Any] = {"patch_size": grid.PATCH, "batch_size": batch_size}
    settings["precision"] = PRECISIONS[precision]
    config, entry = grid.config_of(system, **settings), data.get(grid.DATASET)

    def make() -> Step:
        _, optimizer, step = train.training_step(train.launch(config), config, entry)
        if machine.device().type == "cuda":
            capturable(optimizer)
        return step

    def batch() -> tuple[Tensor, Tensor]:
        shape, where = config.patch_size, machine.device()
        image = torch.randn(batch_size, entry.in_channels, *shape, device=where)
        return image, torch.randint(entry.out_channels, (batch_size, 1, *shape), device=where)

    yield measure_step(make, batch)
    if system in ("segresmamba", "none"):
        if grid.DATASET in data.present():
            taken = step_seconds(system, first=30, steps=150, **settings)
            yield {"with_samples_ms": 1000 * median(taken)}
        else:
            print(f"with_samples_ms is left out: {grid.DATASET} is not here ($SRLIB_DATA)")


def step_seconds(system: str, first: int, steps: int, **settings: Any) -> list[float]:
    """Seconds of each step of a short training, samples included, without the first ones."""
    with tempfile.TemporaryDirectory() as folder, patch.dict(os.environ, SRLIB_RESULTS=folder):
        history = train.train(grid.config_of(system, steps=steps, **settings)).history
    return history["seconds"].diff()[first:].tolist()


def milliseconds(function: Callable[[], object], number: int) -> float:
    """The median of `number` calls, each waited for."""
    times = []
    for _ in range(number):
        start = time.perf_counter()
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - start))
    return median(times)


@train.same_bits()
def measure_step(
    make: Callable[[], Step], draw: Callable[[], tuple[Tensor, Tensor]]
) -> dict[str, float]:
    """A row's numbers; elsewhere than on a GPU `eager_ms` alone.

    Args:
        make: makes a network and what takes its training step.
        draw: makes an image and a label on the device.
    """
    on_gpu, before = machine.device().type == "cuda", 0
    if on_gpu:
        gc.collect()
        torch._C._cuda_clearCublasWorkspaces()  # one for each stream of the rows before, 32 MiB
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
    torch.manual_seed(0)
    step = make()
    batch = draw()
    for _ in range(WARM_UP):
        step(*batch)
    if not on_gpu:
        return {"eager_ms": milliseconds(lambda: step(*batch), EAGER)}
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    found = {"eager_ms": milliseconds(lambda: step(*batch), EAGER)}
    found["peak_gib"] = (torch.cuda.max_memory_allocated() - before) / GIB
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        step(*batch)
        torch.cuda.synchronize()
    kernels = [e for e in profiled.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    found |= {"busy_ms": sum(e.device_time for e in kernels) / 1000, "kernels": len(kernels)}
    captured = CapturedStep(step)
    for _ in range(WARM_UP + 2):
        captured(*batch)
    if captured.graph is None:
        print("not captured:", captured.reason)
        return found
    found["captured_ms"] = milliseconds(lambda: captured(*batch), CAPTURED)
    return found | {
        "joules": joules(lambda: captured(*batch), round(ENERGY / found["captured_ms"]))
    }


def joules(function: Callable[[], object], number: int) -> float:
    """Energy of one of so many calls, by the board's counter, between the first and the last call that moved it.

    The counter moves some ten times a second and less: what lies before its first move and after its last one would
    be counted wrongly, by up to half for calls that take milliseconds.
    """
    import pynvml

    pynvml.nvmlInit()
    # By UUID: with $CUDA_VISIBLE_DEVICES NVML's index may be another board's.
    uuid = torch.cuda.get_device_properties().uuid
    board = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
    counts = [pynvml.nvmlDeviceGetTotalEnergyConsumption(board)]
    for _ in range(number):
        function()
        torch.cuda.synchronize()
        counts.append(pynvml.nvmlDeviceGetTotalEnergyConsumption(board))
    return by_moves(counts)


def by_moves(counts: list[int]) -> float:
    """Joules a call, from a counter's mJ before the first call and after each; NaN if it moved less than twice."""
    moves = [k for k in range(1, len(counts)) if counts[k] != counts[k - 1]]
    if len(moves) < 2:
        return nan
    first, last = moves[0], moves[-1]
    return (counts[last] - counts[first]) / (last - first) / 1000


if __name__ == "__main__":
    app()
