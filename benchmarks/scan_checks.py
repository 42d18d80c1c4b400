"""Scan and mixer held to their definition, in float64: every order up to a length, and random problems.

    python benchmarks/scan_checks.py sweep [--longest 600]
    python benchmarks/scan_checks.py fuzz --operator cpu [--minutes 10] [--seed 0]

`sweep` takes the scan on the CPU and the fused mixer through all pairs of length and number of slices; pairs with
the same order of tokens are computed once. It adds a row a length to results/reference/cpu/scan_gradients.csv and
goes on after the last one there:

- `operator`, `length`, `pairs`: what was computed, for numbers of slices from 1 to the length;
- `error`: the largest of output and gradients: difference over the largest expected value of that tensor.

`fuzz` draws problems until the time is over: sizes, optional tensors, order, slices, types, strides, threads. Its row
of results/reference/cpu/scan_fuzz.csv says how many, the largest error in float32, and how many were beyond what the
type allows; these are printed, with the seed that draws them again.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from srlib import machine, tables
from srlib.files import REFERENCE
from srlib.scan import ORDERS, Weights, mamba_mixer, mixer, selective_scan, token_order, triton
from srlib.scan.definition import reference
from srlib.scan.inputs import Options, ScanInputs

FOLDER = REFERENCE / "cpu"
ALLOWED = {  # of an error; sums of a few numbers may cancel to little
    torch.float64: 1e-9,
    torch.float32: 1e-4,
    torch.bfloat16: 4 * torch.finfo(torch.bfloat16).eps,
    torch.float16: 4 * torch.finfo(torch.float16).eps,
}
Tensors = dict[str, Tensor]
TOKENS = {"u": 2, "delta": 2, "B": 2, "C": 2, "z": 2, "x": 1, "y": 2}  # the axis of tokens


def scan_inputs(batch: int, channels: int, length: int, states: int) -> Tensors:
    """Tensors of a scan from torch's seed, sequences as views of (B, L, ...) memory."""
    widths = {"u": channels, "delta": channels, "B": states, "C": states, "z": channels}
    sequences = {name: torch.randn(batch, length, n).mT for name, n in widths.items()}
    A = -4 * torch.rand(channels, states) - 0.05
    return sequences | {"A": A, "D": torch.randn(channels), "delta_bias": torch.randn(channels)}


def mixer_inputs(
    batch: int, channels: int, length: int, states: int, rank: int = 2, taps: int = 4
) -> Tensors:
    """Tensors of a mixer from torch's seed."""
    return {
        "x": torch.randn(batch, length, channels),
        "conv_weight": torch.randn(channels, taps),
        "conv_bias": torch.randn(channels),
        "x_proj": torch.randn(rank + 2 * states, channels) / channels**0.5,
        "dt_proj": torch.randn(channels, rank) / rank**0.5,
        "dt_bias": torch.randn(channels),
        "A": -4 * torch.rand(channels, states) - 0.05,
        "D": torch.randn(channels),
    }


def mixed(x: Tensor, order: str = "forward", nslices: int = 1, **weights: Tensor) -> Tensor:
    """`mamba_mixer` of tensors by name."""
    return mamba_mixer(x, Weights(**weights), order, nslices)


def mixer_by_definition(x: Tensor, **weights: Tensor) -> Tensor:
    """The mixer over tokens (B, L, E) in the order of visit, each sequence with weights of its own (B, ...)."""
    conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A, D = Weights(**weights)
    taps, length = conv_weight.shape[2], x.shape[1]
    history = F.pad(x, (0, 0, taps - 1, 0))
    before = sum(history[:, k : k + length] * conv_weight[:, None, :, k] for k in range(taps))
    u = F.silu(before + conv_bias[:, None])
    sizes = [dt_proj.shape[2], A.shape[2], A.shape[2]]
    dt, B, C = torch.einsum("ble,bre->blr", u, x_proj).split(sizes, dim=-1)
    delta = torch.einsum("blr,ber->ble", dt, dt_proj)
    return reference(u.mT, delta.mT, A, B.mT, C.mT, D, None, dt_bias).mT


def with_gradients(function: Callable[..., Tensor], inputs: Tensors, grad: Tensor) -> Tensors:
    """Output and gradients by name."""
    given = {name: t.detach().requires_grad_() for name, t in inputs.items()}
    y = function(**given)
    found = torch.autograd.grad(y, list(given.values()), grad.to(y.dtype))
    return {"y": y.detach(), **dict(zip(given, found, strict=True))}


def by_definition(inputs: Tensors, grad: Tensor, orders: Tensor, softplus: bool = True) -> Tensors:
    """Output and gradients (orders, ...) of one sequence, for each of the orders of its tokens (orders, L).

    All are one batch for the definition, which then takes as many steps as one.
    """
    count, mixing = len(orders), "x" in inputs
    axes = {**TOKENS, "y": 1} if mixing else TOKENS

    def visited(t: Tensor, axis: int) -> Tensor:  # (1, ...) -> (orders, ...)
        taken = t.double().index_select(axis, orders.flatten())
        return taken.unflatten(axis, (count, -1)).movedim(axis, 0)[:, 0]

    wide = {
        name: visited(t, axes[name]) if name in axes else t.double().expand(count, *t.shape)
        for name, t in inputs.items()
    }
    function = mixer_by_definition if mixing else partial(reference, delta_softplus=softplus)
    found = with_gradients(function, wide, visited(grad, axes["y"]))
    for name in found.keys() & axes.keys():
        axis, t = axes[name], found[name]
        places = orders[:, None] if axis == 2 else orders[:, :, None]
        found[name] = torch.empty_like(t).scatter_(axis, places.expand_as(t), t)
    return found


def errors(found: Tensors, expected: Tensors) -> dict[str, float]:
    """Largest difference over the largest expected value, by name; infinite for what is not a number."""
    result = {}
    for name, value in expected.items():
        difference = (found[name].double() - value).abs().max() / value.abs().max().clamp_min(1e-30)
        result[name] = float(difference.nan_to_num(nan=torch.inf))
    return result


def different_slices(length: int) -> list[int]:
    """The smallest number of slices for each order that there is: slices of as many tokens are one order."""
    first: dict[int, int] = {}
    for slices in range(1, length + 1):
        first.setdefault(-(-length // slices), slices)
    return list(first.values())


def length_errors(length: int, channels: int = 17, states: int = 2) -> dict[str, list[dict]]:
    """Errors of scan and fused mixer, for each different order of so many tokens and for reverse."""
    torch.manual_seed(length)
    chosen = [("inter_slice", slices) for slices in different_slices(length)] + [("reverse", 1)]
    orders = torch.stack([token_order(order, length, slices) for order, slices in chosen])
    result = {}
    for name, function, inputs in (
        ("cpu", partial(selective_scan, backend="cpu"), scan_inputs(1, channels, length, states)),
        ("fused mixer", mixed, mixer_inputs(1, channels, length, states)),
    ):
        grad = torch.randn_like(inputs["u" if "u" in inputs else "x"])
        expected = by_definition(inputs, grad, orders)
        result[name] = []
        for k, (order, slices) in enumerate(chosen):
            run = partial(function, order=order, nslices=slices)
            found = with_gradients(run, inputs, grad)
            for sequence in found.keys() & TOKENS.keys():
                found[sequence] = found[sequence][0]
            result[name].append(errors(found, {key: t[k] for key, t in expected.items()}))
    return result


def sweep(longest: int) -> bool:
    """Add the lengths that the table does not have; whether no error is larger than float32 allows."""
    file = FOLDER / "scan_gradients.csv"
    table = tables.read(file) if file.is_file() else pd.DataFrame(columns=["length"])
    for length in range(1, longest + 1):
        if length not in set(table["length"]):
            rows = [
                {
                    "operator": name,
                    "length": length,
                    "pairs": length,
                    "error": max(map(largest, found)),
                }
                for name, found in length_errors(length).items()
            ]
            table = pd.concat([table, pd.DataFrame(rows)]) if len(table) else pd.DataFrame(rows)
            if length % 20 == 0 or length == longest:
                machine.write_table(table, file)
    print(table.groupby("operator").agg({"length": "max", "pairs": "sum", "error": "max"}))
    return bool((table["error"] < ALLOWED[torch.float32]).all())


def largest(found: dict[str, float]) -> float:
    """The largest of the errors of one problem."""
    return max(found.values())


def strided(t: Tensor, rng: np.random.Generator) -> Tensor:
    """The same numbers in another memory layout: dense, with gaps, of other strides, beginning later."""
    kind = rng.integers(4)
    if kind == 0 or t.ndim == 1:
        return t.contiguous()
    if kind == 1:  # every second of the last axis
        return torch.stack([t, t], -1).flatten(-2)[..., ::2]
    if kind == 2:  # a slice of wider rows, as of a projection's output
        return F.pad(t, (3, 2))[..., 3:-2]
    return t.transpose(-1, -2).contiguous().transpose(-1, -2)


def problem(operator: str, rng: np.random.Generator) -> tuple[Callable, Tensors, dict, torch.dtype]:
    """A function with its inputs, its options as they are drawn, and the type that it computes in."""
    short = operator == "triton"  # its interpreter takes milliseconds for an instruction
    border = rng.choice([8, 16, 32] if short else [16, 64, 128, 192])
    length = int(rng.choice([border + rng.integers(-2, 3), rng.integers(1, 40 if short else 250)]))
    sizes = {"batch": rng.integers(1, 4), "channels": rng.integers(1, 6 if short else 41)}
    sizes |= {"length": length, "states": rng.integers(1, 5 if short else 21)}
    sizes = {name: int(size) for name, size in sizes.items()}
    options = {"order": str(rng.choice(ORDERS)), "nslices": int(rng.integers(1, length + 4))}
    torch.set_num_threads(int(rng.integers(1, 4)))
    if operator == "fused mixer":
        more = {"rank": int(rng.integers(1, 4)), "taps": int(rng.integers(1, 5))}
        mixer.STRETCH = int(rng.choice([1, 2**12, 2**19]))
        return mixed, mixer_inputs(**sizes, **more), options, torch.float32
    inputs = scan_inputs(**sizes)
    for name in ("D", "z", "delta_bias"):
        if rng.random() < 0.3:
            del inputs[name]
    options["delta_softplus"] = bool(rng.random() < 0.8)
    if not options["delta_softplus"]:  # negative steps would let the states grow without bounds
        inputs["delta"] = inputs["delta"].abs() + 3
    types = [torch.float32] * 6 + [torch.bfloat16, torch.float16]
    types += [] if short else [torch.float64]
    dtype = types[rng.integers(len(types))]
    function = by_triton if short else partial(selective_scan, backend=operator)
    where = "cuda" if short and torch.cuda.is_available() else "cpu"
    return function, {name: t.to(where, dtype) for name, t in inputs.items()}, options, dtype


class _Triton(torch.autograd.Function):
    """Triton's kernels, interpreted where there is no GPU, which the choice of a back end would ask for."""

    @staticmethod
    def forward(ctx, options: Options, names: tuple[str, ...], *tensors: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        given = dict(zip(names, tensors, strict=True))
        ctx.inputs = ScanInputs(**{name: given.get(name) for name in ScanInputs._fields})
        ctx.options, ctx.names = options, names
        shape = triton.states_shape(given["u"], given["A"])
        ctx.states = torch.full(shape, torch.nan, device=given["u"].device)
        return triton.forward(ctx.inputs, options, ctx.states)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        found = triton.backward(ctx.inputs, ctx.options, ctx.states, grad)
        return None, None, *(found[name] for name in ctx.names)


def by_triton(order: str, nslices: int, delta_softplus: bool, **inputs: Tensor) -> Tensor:
    """The scan by Triton's kernels."""
    return _Triton.apply(Options(delta_softplus, order, nslices), tuple(inputs), *inputs.values())


def fuzz(operator: str, minutes: float, seed: int) -> bool:
    """Add the row of this operator; whether nothing was found."""
    end, first = time.monotonic() + 60 * minutes, seed
    found, worst = 0, 0.0
    while time.monotonic() < end:
        rng = np.random.default_rng(seed)
        torch.manual_seed(seed)
        function, inputs, options, dtype = problem(operator, rng)
        inputs = {name: strided(t, rng) for name, t in inputs.items()}
        like = inputs["x" if "x" in inputs else "u"]
        grad = strided(torch.randn(like.shape).to(like.device, dtype), rng)
        result = with_gradients(partial(function, **options), inputs, grad)
        error = errors(result, expected(inputs, options, grad))
        if dtype == torch.float32:
            worst = max(worst, largest(error))
        if largest(error) > ALLOWED[dtype]:
            found += 1
            sizes = {name: (tuple(t.shape), t.stride()) for name, t in inputs.items()}
            print(f"seed {seed}: {error} for {sizes}, {options}, {dtype}", flush=True)
        seed += 1
    row = {"operator": operator, "minutes": minutes, "first_seed": first, "problems": seed - first}
    row |= {"error_float32": worst, "findings": found}
    print(row)
    file = FOLDER / "scan_fuzz.csv"
    table = tables.read(file) if file.is_file() else pd.DataFrame(columns=list(row))
    kept = table[table["operator"] != operator]
    rows = [*kept.to_dict("records"), row]
    machine.write_table(pd.DataFrame(rows).sort_values("operator"), file)
    return not found


def expected(inputs: Tensors, options: dict, grad: Tensor) -> Tensors:
    """Output and gradients of a problem by the definition, the parameters' summed over its sequences."""
    order = token_order(
        options["order"], grad.shape[TOKENS["y"] if "u" in inputs else 1], options["nslices"]
    )
    order, softplus = order.to(grad.device), options.get("delta_softplus", True)
    rows = [
        by_definition(
            {name: t[b : b + 1] if name in TOKENS else t for name, t in inputs.items()},
            grad[b : b + 1],
            order[None],
            softplus,
        )
        for b in range(len(grad))
    ]
    joined = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
    return {name: t if name in TOKENS else t.sum(0) for name, t in joined.items()}


def main() -> None:
    """Run the check that is asked for; status 1 when an error is too large."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("check", choices=("sweep", "fuzz"))
    parser.add_argument("--longest", type=int, default=600)
    parser.add_argument(
        "--operator", choices=("cpu", "chunked", "fused mixer", "triton"), default="cpu"
    )
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    fine = (
        sweep(options.longest)
        if options.check == "sweep"
        else fuzz(options.operator, options.minutes, options.seed)
    )
    sys.exit(not fine)


if __name__ == "__main__":
    main()
