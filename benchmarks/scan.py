"""Selective scan on a CPU and on a GPU: time, memory and errors of the back ends, their peers and networks with them.

python -m srlib bench scan cpu [--quick]    # results/reference/cpu/scan.csv; nothing else may run
python -m srlib bench scan gpu              # results/reference/gpu/scan.csv
python -m srlib bench scan kernels          # results/reference/gpu/kernels.csv
"""

from __future__ import annotations

import importlib.util
import itertools
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Annotated, Any
from unittest.mock import patch

import pandas as pd
import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.profiler import ProfilerActivity, profile

from srlib import machine
from srlib.files import REFERENCE
from srlib.net.costs import process_memory
from srlib.net.model import FEATURES, SegResMamba
from srlib.net.tom import TriOrientedMamba
from srlib.scan import backends, cpu, operator, selective_scan, token_order, triton, triton_mixer

Shape = tuple[int, int, int, int]  # B, D, L, N
Step = Callable[[], Any]

app = typer.Typer(help=__doc__, rich_markup_mode=None)

# --- On a CPU -------------------------------------------------------------------------------------


@app.command("cpu")
def on_cpu(
    out: Path = REFERENCE / "cpu" / "scan.csv",
    quick: Annotated[bool, typer.Option("--quick", help="Small; nothing is stored.")] = False,
) -> None:
    """Measure back ends, peers, layers and networks on this CPU.

    Each measurement runs in a fresh process, so that none finds the memory, threads or compiled code of another. Tidy
    rows: case, method, threads, metric, value, unit. An *element* is one token of one channel in one state: the scan
    of a (B, D, L, N) problem has B D L N. Memory is what the process takes beyond its inputs, sampled every 2 ms in the
    first call. Peers are measured where they can be imported (`pip install --no-deps mambapy`) or compiled (torch's
    associative scan wants a C++ compiler).
    """
    table = measure_cpu(quick)
    print(table.to_string(index=False))
    if not quick:
        machine.write_table(table, out)


def measure_cpu(quick: bool) -> pd.DataFrame:
    """The whole table; small problems only when `quick`, to see that everything runs."""
    rows = [*_first_calls()]
    for case, method, threads, function, arguments in _plan(quick):
        with ProcessPoolExecutor(1, get_context("spawn")) as process:
            found = process.submit(_in_process, threads, function, arguments).result()
        print(f"{case}, {method}, {threads} threads: {found}", flush=True)
        rows += [(case, method, threads, *metric) for metric in found]
    return pd.DataFrame(rows, columns=["case", "method", "threads", "metric", "value", "unit"])


def _plan(quick: bool) -> Iterator[tuple[str, str, int, Callable, tuple]]:
    """A measurement: case, method, threads, function and its arguments."""
    lengths = (256, 512, 1024) if quick else (4096, 32768, 262144)
    short, middle, long = ((1, 96, length, 16) for length in lengths)
    for shape, methods in (
        (short, ("cpu", "chunked", "reference", "mambapy", "associative_scan")),
        (middle, ("cpu", "cpu, contiguous", "chunked", "mambapy")),
        (long, ("cpu",)),
    ):
        for method in methods:
            if not (missing := _missing(method)):
                yield f"scan {shape}", method, 1, _scan, (shape, method)
            else:
                print(f"not measured: {method} ({missing})")
    yield f"scan {middle}", "cpu", 2, _scan, (middle, "cpu")
    for order in ("reverse", "inter_slice"):
        for method in ("cpu", "cpu, permuted copies"):
            yield f"scan {middle}, {order}", method, 1, _scan, (middle, method, order)
    size, volume = ("tiny", (40, 40, 40)) if quick else ("small", (48, 64, 48))
    tokens = (2, *(n // 2 for n in volume), FEATURES[size][0])
    for method in ("fused", "permuted copies"):
        yield f"ToM layer {tokens}", method, 2, _layer, (tokens, method)
    for tom in ("both", "none"):
        yield (
            f"step of {size}, {volume}, batch 2",
            f"tom={tom}",
            2,
            _network,
            (size, 1, 2, volume, tom),
        )
    size, volume = ("tiny", (32, 32, 32)) if quick else ("paper", (128, 128, 128))
    for method in ("fused", "plain torch"):
        case = f"step of {size}, {volume}, batch 1"
        yield case, method, 2, _network, (size, 4, 1, volume, "both", method)


def _missing(method: str) -> str:
    """Why a peer cannot be measured here; empty when it can."""
    if method == "mambapy" and not importlib.util.find_spec("mambapy"):
        return "mambapy is not installed"
    if method == "associative_scan" and not any(map(shutil.which, ("g++", "clang++", "cl"))):
        return "no C++ compiler"
    return ""


def _in_process(threads: int, measure: Callable, arguments: tuple) -> list[tuple]:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    return measure(*arguments)


def _measured(step: Step, once: bool = False) -> list[tuple[str, float, str]]:
    """Memory of the first call; least and median time of the others, or of the first when `once`."""
    times: list[float] = []

    def timed() -> None:
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)

    with process_memory("cpu") as memory:
        timed()
    if not once:
        times.clear()
        while len(times) < 3 or sum(times) < 3.0:
            timed()
    return [
        ("time, minimum", min(times), "s"),
        ("time, median", median(times), "s"),
        ("extra memory", memory["resident"] * 1024, "MiB"),
    ]


def _first_calls() -> Iterator[tuple]:
    """The first scan, forward and backward, of a process: with an empty and with a filled cache."""
    script = (
        "import time, torch; from srlib.scan import selective_scan; start = time.perf_counter();"
        "x = [torch.ones(s, requires_grad=True) for s in ((1, 32, 64),) * 2 + ((32, 16),)"
        " + ((1, 16, 64),) * 2]; selective_scan(*x).sum().backward();"
        "print(time.perf_counter() - start)"
    )
    with tempfile.TemporaryDirectory() as folder:
        for method in ("empty cache", "warm cache"):
            environment = {**os.environ, "NUMBA_CACHE_DIR": folder}
            command = [sys.executable, "-c", script]
            run = subprocess.run(
                command, env=environment, capture_output=True, text=True, check=True
            )
            yield (
                "first call of a process",
                method,
                torch.get_num_threads(),
                "time",
                float(run.stdout),
                "s",
            )


def _inputs(shape: Shape, channels_last: bool) -> dict[str, Any]:
    batch, channels, length, states = shape

    def sequence(width: int) -> Tensor:
        tokens = torch.randn(batch, length, width)
        return tokens.mT if channels_last else tokens.mT.contiguous()

    inputs = {"u": sequence(channels), "delta": sequence(channels)}
    inputs |= {"A": -torch.rand(channels, states), "B": sequence(states), "C": sequence(states)}
    inputs |= {"D": torch.randn(channels), "z": sequence(channels)}
    inputs["delta_bias"] = torch.randn(channels)
    return {name: t.requires_grad_() for name, t in inputs.items()}


def _scan(shape: Shape, method: str, order: str = "forward") -> list[tuple[str, float, str]]:
    """Forward and backward of one scan; inputs are (B, L, D) in memory unless `contiguous`."""
    inputs = _inputs(shape, channels_last="contiguous" not in method)
    grad = torch.randn(shape[0], shape[2], shape[1]).mT
    call = _METHODS.get(method, _by_operator(method.partition(",")[0], order))
    if "permuted" in method:
        call = _permuted(order)
    if method == "associative_scan":
        call = torch.compile(call)

    def step() -> None:
        call(**inputs).backward(grad)
        for t in inputs.values():
            t.grad = None

    if method == "associative_scan":
        step()  # compiles, for this shape
    elif method.startswith("cpu"):
        _by_operator("cpu", order)(**_inputs((1, 16, 64, 16), True)).sum().backward()
    found = _measured(step, once=method in ("reference", "mambapy"))
    per_element = found[0][1] / math.prod(shape) * 1e9
    return [*found, ("time an element", per_element, "ns")]


def _by_operator(backend: str, order: str) -> Callable[..., Tensor]:
    def call(**inputs: Any) -> Tensor:
        return selective_scan(**inputs, backend=backend, order=order, nslices=32)

    return call


def _permuted(order: str) -> Callable[..., Tensor]:
    """The scan in an order of visit by permuted copies of the sequences, as SegMamba does it."""

    def call(**inputs: Any) -> Tensor:
        visit = token_order(order, inputs["u"].shape[2], 32)
        back = visit.argsort()
        sequences = {name: inputs[name].mT[:, visit].mT for name in ("u", "delta", "B", "C", "z")}
        return selective_scan(**{**inputs, **sequences}, backend="cpu").mT[:, back].mT

    return call


def _states(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, delta_bias: Tensor
) -> tuple[Tensor, ...]:
    """Decay and input of every state, (B, L, D, N): what scans of a plain recurrence start from."""
    dt = F.softplus(delta + delta_bias[:, None]).mT[..., None]
    return torch.exp(dt * A), dt * B.mT[:, :, None] * u.mT[..., None]


def _output(h: Tensor, u: Tensor, C: Tensor, D: Tensor, z: Tensor) -> Tensor:
    y = torch.einsum("bldn,bnl->bdl", h, C) + D[:, None] * u
    return y * F.silu(z)


def _mambapy(u, delta, A, B, C, D, z, delta_bias) -> Tensor:  # type: ignore[no-untyped-def]
    from mambapy.pscan import pscan  # type: ignore[import-not-found]

    return _output(pscan(*_states(u, delta, A, B, delta_bias)), u, C, D, z)


def _associative_scan(u, delta, A, B, C, D, z, delta_bias) -> Tensor:  # type: ignore[no-untyped-def]
    from torch._higher_order_ops.associative_scan import associative_scan

    def combine(first: tuple, second: tuple) -> tuple:
        return first[0] * second[0], first[1] * second[0] + second[1]

    states = _states(u, delta, A, B, delta_bias)
    return _output(associative_scan(combine, states, 1, combine_mode="generic")[1], u, C, D, z)


_METHODS = {"mambapy": _mambapy, "associative_scan": _associative_scan}  # the second is compiled


def _scanning(method: str) -> AbstractContextManager:
    """Composed ToM layers scan on the CPU by its kernels ("permuted copies") or by torch ("plain torch")."""
    return patch.dict(operator.PREFERRED, {"cpu": ("chunked",)} if method == "plain torch" else {})


def _layer(tokens: tuple[int, ...], method: str) -> list[tuple[str, float, str]]:
    """Forward and backward of one tri-oriented Mamba over tokens (B, D, H, W, C)."""
    layer = TriOrientedMamba(tokens[-1], fused=method == "fused")
    x = torch.randn(tokens).flatten(1, 3).requires_grad_()
    layer(x[:, :64], depth=4).sum().backward()
    with _scanning(method):
        return _measured(lambda: layer(x, depth=tokens[1]).sum().backward())


def _network(
    size: str, modalities: int, batch: int, volume: tuple[int, ...], tom: str, method: str = "fused"
) -> list[tuple[str, float, str]]:
    """A training step: forward, backward, AdamW; with the share of its time that the scans take."""
    fused = method == "fused"
    network: nn.Module = SegResMamba(modalities, 3, FEATURES[size], tom=tom, fused=fused)
    optimizer = torch.optim.AdamW(network.parameters(), fused=True)
    x = torch.randn(batch, modalities, *volume)
    in_scans: list[float] = []

    def step() -> None:
        in_scans.clear()
        network(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    def timed(function: Callable) -> Callable:
        def call(*args: Any) -> Any:
            start = time.perf_counter()
            result = function(*args)
            in_scans.append(time.perf_counter() - start)
            return result

        return call

    with ExitStack() as patches:
        patches.enter_context(_scanning(method))
        for name in ("forward", "backward"):
            function = timed(getattr(cpu.ScanPass, name))
            patches.enter_context(patch.object(cpu.ScanPass, name, function))
        if method == "plain torch":
            return _measured(step, once=True)
        found = _measured(step)
        start = time.perf_counter()
        step()
        share = sum(in_scans) / (time.perf_counter() - start)
    return [*found, ("share of scans", share, "")] if in_scans else found


# --- On a GPU -------------------------------------------------------------------------------------

SIZES = [(1, 96, 262144, 16), (1, 192, 32768, 16), (2, 384, 4096, 16)]  # (B, D, L, N)
ORDERS = [("forward", 1), ("reverse", 1), ("inter_slice", 64)]


@app.command("gpu")
def on_gpu(out: Path = REFERENCE / "gpu" / "scan.csv") -> None:
    """Measure every back end on this GPU: error against float64, time, bandwidth and memory.

    One row for each size, type, layout, back end, order and pass. `ms`: median of repeated calls between two device
    events, the queue filled beforehand so that the host is not timed (`chunked`, thousands of small kernels, stays
    bound by it), caches overwritten before each; `bytes`: each input read once and each output written once;
    `ps_per_element`: ms over the B D L N elements; `bandwidth` is bytes / ms over what a large copy reaches, counting
    bytes read and written; `error`: ||result - expected|| / ||expected||, expected computed in float64 from the same
    inputs, for the backward pass the largest over all gradients; `memory_mib`: MiB allocated at the peak beyond the
    inputs, outputs and gradients included. Tensors are those of ToM's scans: u and delta with weights A, B, C, D and a
    bias, no gate.
    """
    states = backends()
    for name, state in states.items():
        print(name, "runs" if state.available else f"cannot run: {state.reason}")
    names = [name for name in ("chunked", "triton", "mamba_ssm") if states[name].available]
    torch.manual_seed(0)
    bandwidth = copy_bandwidth()
    rows = []
    for size, dtype, order in itertools.product(SIZES, (torch.float32, torch.bfloat16), ORDERS):
        rows += rows_of(size, dtype, *order, names)
    table = pd.DataFrame(rows)
    elements = table[["batch", "channels", "length", "states"]].prod(axis=1)
    table["ps_per_element"] = table["ms"] / elements * 1e9
    table["bandwidth"] = table["bytes"] / table["ms"] * 1000 / bandwidth
    table.insert(0, "copy_tb_per_s", bandwidth / 1e12)
    machine.write_table(table, out)
    shown = table.drop(columns=["copy_tb_per_s", "batch", "states", "bytes"])
    print(shown.to_string(index=False, float_format="%.4g"))


def inputs_of(size: tuple[int, int, int, int], dtype: torch.dtype) -> dict[str, Tensor]:
    """Random inputs, channels last in memory; A and the step sizes spread as in an untrained Mamba."""
    batch, channels, length, states = size

    def sequence(width: int) -> Tensor:
        return torch.randn(batch, length, width, device="cuda", dtype=dtype).transpose(1, 2)

    step = torch.logspace(-3, -1, channels, device="cuda")
    inputs = {
        "u": sequence(channels),
        "delta": sequence(channels),
        "A": -torch.arange(1.0, states + 1, device="cuda").repeat(channels, 1),
        "B": sequence(states),
        "C": sequence(states),
        "D": torch.ones(channels, device="cuda"),
        "delta_bias": step + torch.log(-torch.expm1(-step)),  # softplus(bias) = step
    }
    return {name: t.requires_grad_() for name, t in inputs.items()}


def relative(value: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what is expected."""
    return float((value.double() - expected).norm() / expected.norm())


def milliseconds(call: Callable[[], object], repeats: int) -> float:
    """Median time of `call` on the device."""
    overwritten = torch.empty(2**28, dtype=torch.int8, device="cuda")
    times = []
    for repeat in range(repeats + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(4_000_000)  # about 2 ms, in which the host queues what follows
        overwritten.zero_()
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        if repeat >= 2:
            times.append(start.elapsed_time(end))
    return median(times)


def copy_bandwidth() -> float:
    """Bytes read and written in a second by a large copy."""
    source = torch.empty(2**30, dtype=torch.float32, device="cuda").normal_()
    target = torch.empty_like(source)
    return 2 * source.nbytes / milliseconds(lambda: target.copy_(source), 20) * 1000


def expected_of(inputs: dict[str, Tensor], grad: Tensor, order: str, nslices: int) -> dict:
    """Output and gradients in float64."""
    wide = {name: t.detach().double().requires_grad_() for name, t in inputs.items()}
    y = selective_scan(**wide, backend="chunked", order=order, nslices=nslices)
    gradients = torch.autograd.grad(y, list(wide.values()), grad.double())
    return {"y": y.detach(), **dict(zip(wide, gradients, strict=True))}


def measure_gpu(
    inputs: dict, grad: Tensor, expected: dict, backend: str, order: str, nslices: int
) -> list[dict]:
    """The rows of one back end: forward alone, then forward and backward."""
    tensors = list(inputs.values())
    options = {"backend": backend, "order": order, "nslices": nslices}

    def forward() -> Tensor:
        with torch.no_grad():
            return selective_scan(**inputs, **options)

    def both() -> tuple[Tensor, ...]:
        y = selective_scan(**inputs, **options)
        return y.detach(), *torch.autograd.grad(y, tensors, grad)

    read = sum(t.nbytes for t in tensors)
    moved = {"forward": read + grad.nbytes, "forward and backward": 3 * read + 2 * grad.nbytes}
    rows = []
    for name, call in (("forward", forward), ("forward and backward", both)):
        results = call()
        if name == "forward":
            error = relative(results, expected["y"])
        else:
            error = max(relative(t, e) for t, e in zip(results, expected.values(), strict=True))
        del results
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        memory = (torch.cuda.max_memory_allocated() - before) / 2**20
        ms = milliseconds(call, 5 if backend == "chunked" else 30)
        row = {"pass": name, "ms": ms, "bytes": moved[name], "error": error, "memory_mib": memory}
        rows.append(row)
    return rows


def rows_of(size: tuple, dtype: torch.dtype, order: str, nslices: int, names: list[str]) -> list:
    """The rows of all back ends: channels last in every order, tokens last in the forward one."""
    inputs = inputs_of(size, dtype)
    grad = torch.randn_like(inputs["u"])
    expected = expected_of(inputs, grad, order, nslices)
    case = dict(zip(("batch", "channels", "length", "states"), size, strict=True))
    case |= {"dtype": str(dtype).removeprefix("torch."), "order": order}
    rows = []
    for layout in ("channels_last", "tokens_last") if order == "forward" else ("channels_last",):
        if layout == "tokens_last":
            inputs = {name: t.detach().contiguous().requires_grad_() for name, t in inputs.items()}
            grad = grad.contiguous()
        for name in names:
            if name == "chunked" and (layout, order) != ("channels_last", "forward"):
                continue  # it takes minutes in all and gathers its tokens whatever they lie like
            measured = measure_gpu(inputs, grad, expected, name, order, nslices)
            rows += [{"backend": name, **case, "layout": layout, **row} for row in measured]
    return rows


# --- The kernels of a ToM layer beside their floors -----------------------------------------------

# Inner maps (B, E, L, N) of the paper's four stages, of an image of 128^3; and the last one of SIZES.
LAYERS = [(1, 96, 262144, 16), (1, 192, 32768, 16), (1, 384, 4096, 16), (1, 768, 512, 16), SIZES[2]]
EXPONENTIALS = 16  # an SM and clock: CUDA C++ Programming Guide, arithmetic instructions, 9.0
# Kernels with an exponential a state, and how many more an element; those with one an element of which argument.
STATES_IN = {"walk_orders": 1, "carries_of_orders": 1, "gradients_of_orders": 2}
ONE_OF = {"rates": 2, "convolve": 2, "join": 0, "gate": 0, "gate_backward": 0, "through_silu": 2}
Kernel = tuple[str, str]  # pass and name


@app.command()
def kernels(out: Path = REFERENCE / "gpu" / "kernels.csv", repeats: int = 10) -> None:
    """Time every Triton kernel of a ToM layer on this GPU, beside what it must take at least.

    `us`: of the `launches` of a pass together, by torch's profiler, the mean of some passes, caches overwritten before
    each; `bytes`, `exponentials`: see `kernel_counts`; `floor_us`: the larger of the bytes at the bandwidth of a large
    copy and the exponentials at 16 an SM and clock, at the board's highest clock (`mhz`).
    """
    import pynvml

    pynvml.nvmlInit()
    board = pynvml.nvmlDeviceGetHandleByIndex(torch.cuda.current_device())
    mhz = pynvml.nvmlDeviceGetMaxClockInfo(board, pynvml.NVML_CLOCK_SM)
    bandwidth = copy_bandwidth()
    rate = EXPONENTIALS * torch.cuda.get_device_properties().multi_processor_count * mhz * 1e6
    rows = []
    for size, dtype in itertools.product(LAYERS, (torch.float32, torch.bfloat16)):
        case = dict(zip(("batch", "channels", "length", "states"), size, strict=True))
        case |= {"dtype": str(dtype).removeprefix("torch.")}
        counts, times = kernel_counts(size, dtype), kernel_times(size, dtype, repeats)
        for kernel, of in counts.items():
            floor = max(of["bytes"] / bandwidth, of["exponentials"] / rate)
            key = dict(zip(("pass", "kernel"), kernel, strict=True))
            rows.append({**case, **key, **of, "floor_us": 1e6 * floor, "us": times[kernel]})
    table = pd.DataFrame(rows)
    print(table.to_string(index=False, float_format="%.4g"))
    machine.write_table(table.assign(copy_tb_per_s=bandwidth / 1e12, mhz=mhz), out)


def layer_passes(size: Shape, dtype: torch.dtype, device: str) -> dict[str, Callable[[], object]]:
    """Both passes of a ToM layer of three orders by its Triton kernels and the mixers' matrix products."""
    batch, channels, length, states = size
    width, rank, names = channels // 2, -(-channels // 32), ",".join(name for name, _ in ORDERS)
    slices = round(length ** (1 / 3))

    def random(*shape: int, **options: Any) -> Tensor:
        return torch.randn(shape, device=device, **options) / 8

    x, z = random(batch, length, 2 * channels, dtype=dtype).chunk(2, -1)
    norm = random(batch, width, length, dtype=dtype), random(width), random(width), 1e-5, dtype
    shapes = [(channels, 4), (channels,), (rank + 2 * states, channels), (channels, rank)]
    first = [random(*shape) for shape in (*shapes, (channels,)) for _ in ORDERS]
    logs, Ds = [random(channels, states) for _ in ORDERS], [random(channels) for _ in ORDERS]
    mixed = x, [*first, *(-log.exp() for log in logs), *Ds], names, slices
    room = x.new_empty(triton_mixer._states_shape(*mixed), dtype=torch.float32)
    y, grad = torch.empty_like(x), random(batch, length, channels, dtype=dtype)

    def forward() -> None:
        triton_mixer._norm(*norm, room)
        triton_mixer._launch_rates(logs, None)
        triton_mixer._forward(*mixed, room)
        triton_mixer._gate(y, z, room)

    def backward() -> None:
        triton_mixer._gate_backward(grad, room, y, z)
        triton_mixer._backward(grad, room, *mixed)
        triton_mixer._launch_rates(logs, random(len(logs), channels, states))
        triton_mixer._norm_backward(grad.view(batch, 2 * length, width)[:, :length], room, *norm)

    return {"forward": forward, "backward": backward}


def kernel_counts(size: Shape, dtype: torch.dtype) -> dict[Kernel, Counter[str]]:
    """What each Triton kernel of a ToM layer (B, E, L, N) does in a pass, from the sizes of what it is launched with.

    Returns:
        By pass and kernel, launches, bytes and exponentials. Bytes: each tensor of a launch, or the part of it that is
        used, once where it is read and once where it is written, however often that is. Exponentials: one a decay, a
        step size and a sigmoid.
    """
    launched: list[tuple[str, dict[str, int]]] = []
    found: defaultdict[Kernel, Counter[str]] = defaultdict(Counter)

    def record(kernel: str, _: object, __: Tensor, *given: Any, **more: Any) -> None:
        tensors = [t for a in given for t in (a if isinstance(a, tuple) else (a,))]
        nbytes = [t.nbytes if isinstance(t, Tensor) else 0 for t in tensors]
        moved, exponentials = sum(nbytes), _exponentials(kernel, given, size[3])
        if kernel in STATES_IN:  # of the rows that x_proj yields B, and but for the first walk C
            used = size[3] if kernel == "walk_orders" and given[6] is None else 2 * size[3]
            moved -= nbytes[2] // more["ROW"] * (more["ROW"] - used)
        if kernel == "gradients_of_orders":  # delta's gradient takes its place; dC is there already
            moved += nbytes[1] - nbytes[10] // 2
        if kernel == "through_silu":  # in place
            moved += nbytes[2]
        launched.append((kernel, {"launches": 1, "bytes": moved, "exponentials": exponentials}))

    class Names:  # in place of the kernels, which want Triton
        def __getattr__(self, kernel: str) -> str:
            return kernel

    with FakeTensorMode(), ExitStack() as patches:
        for module in (triton, triton_mixer):
            patches.enter_context(patch.object(module, "launch", record))
            patches.enter_context(patch.object(module, "_kernels", Names))
        for name, run in layer_passes(size, dtype, "cpu").items():
            run()
            while launched:
                kernel, numbers = launched.pop(0)
                found[name, kernel].update(numbers)
    return found


def _exponentials(kernel: str, given: tuple, states: int) -> int:
    """Those of a launch with these arguments."""
    if kernel in STATES_IN:
        return given[0].numel() * (states + STATES_IN[kernel])
    if kernel not in ONE_OF or (kernel == "gate" and given[1] is None):  # the sum over orders
        return 0
    return given[ONE_OF[kernel]].numel()


def kernel_times(size: Shape, dtype: torch.dtype, repeats: int) -> dict[Kernel, float]:
    """Microseconds of each Triton kernel of a ToM layer in a pass, by their names."""
    overwritten = torch.empty(2**28, dtype=torch.int8, device="cuda")
    found: defaultdict[Kernel, float] = defaultdict(float)
    passes = layer_passes(size, dtype, "cuda")
    for run in passes.values():
        run()  # compiles
    for name, run in passes.items():
        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            for _ in range(repeats):
                overwritten.zero_()
                run()
            torch.cuda.synchronize()
        for event in profiled.events():
            if event.device_type == torch.autograd.DeviceType.CUDA:
                found[name, event.name] += event.device_time / repeats
    return dict(found)


if __name__ == "__main__":
    app()
