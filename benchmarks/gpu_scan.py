"""Selective scan on a GPU: every back end's error against float64, time, bandwidth and memory.

    python benchmarks/gpu_scan.py [--out results/reference/gpu/scan.csv]

Writes one row for each size, type, layout, back end, order and pass:

- `ms`: median of repeated calls between two device events, the queue filled beforehand so that the host
  is not timed (`chunked`, thousands of small kernels, stays bound by it), caches overwritten before each;
- `bytes`: each input read once and each output written once; `bandwidth` is bytes / ms over what a large
  copy reaches, counting bytes read and written;
- `error`: ||result - expected|| / ||expected||, expected computed in float64 from the same inputs; for the
  backward pass the largest over all gradients;
- `memory_mib`: MiB allocated at the peak beyond the inputs, outputs and gradients included.

Tensors are those of ToM's scans: u and delta with weights A, B, C, D and a bias, no gate.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from srlib import provenance
from srlib.scan import backends, selective_scan

SIZES = [(1, 96, 262144, 16), (1, 192, 32768, 16), (2, 384, 4096, 16)]  # (B, D, L, N)
ORDERS = [("forward", 1), ("reverse", 1), ("inter_slice", 64)]


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
    return statistics.median(times)


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


def measure(
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
            measured = measure(inputs, grad, expected, name, order, nslices)
            rows += [{"backend": name, **case, "layout": layout, **row} for row in measured]
    return rows


def main() -> None:
    """Measure everything, write the table, print it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("results/reference/gpu/scan.csv"))
    arguments = parser.parse_args()
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
    table["bandwidth"] = table["bytes"] / table["ms"] * 1000 / bandwidth
    table.insert(0, "copy_tb_per_s", bandwidth / 1e12)
    provenance.write_table(table, arguments.out)
    shown = table.drop(columns=["copy_tb_per_s", "batch", "states", "bytes"])
    print(shown.to_string(index=False, float_format="%.4g"))


if __name__ == "__main__":
    main()
