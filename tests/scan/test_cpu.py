"""The CPU's back end: its vectors and how chunks are copied, its threads, and the processes around it."""

from __future__ import annotations

import math
import multiprocessing
import threading
import time

import numpy as np
import pytest
import torch
from scan_inputs import random_inputs, relative_error
from torch.utils.data import DataLoader, Dataset

from srlib.scan import backends, cpu, selective_scan, token_order

if not backends()["cpu"].available:
    pytest.skip(f"the cpu back end: {backends()['cpu'].reason}", allow_module_level=True)

import numba
from numba import njit

from srlib.scan import kernels
from srlib.scan.kernels import CHUNK, LANES

# --- Vectors and chunks ---------------------------------------------------------------------------


def _apply(function, values: np.ndarray) -> np.ndarray:
    @njit
    def run(tile, out):
        for row in range(len(tile)):
            kernels.store(out, row, function(kernels.load(tile, row)))

    tile = np.zeros((math.ceil(len(values) / 16), 16), np.float32)
    tile.flat[: len(values)] = values
    out = np.empty_like(tile)
    run(tile, out)
    return out.flat[: len(values)]


@pytest.mark.parametrize(
    ("function", "exact"),
    [
        (kernels.exp2, np.exp2),
        (kernels.sigmoid, lambda x: 1 / (1 + np.exp(-x))),
        (kernels.softplus, lambda x: np.logaddexp(x, 0)),
    ],
)
def test_vector_functions_are_exact_to_float32(function, exact):
    x = np.linspace(-10, 10, 10_001, dtype=np.float32)
    found, expected = _apply(function, x), exact(x.astype(np.float64))
    assert np.max(np.abs(found / expected - 1)) < 1e-6
    assert np.isnan(_apply(function, np.array([np.nan], np.float32)))[0]


def test_exp2_ends_in_zero_and_infinity():
    x = np.array([-np.inf, -1e30, -127, 128, 1e30, np.inf, 0, 1], np.float32)
    assert _apply(kernels.exp2, x).tolist() == [0, 0, 0, np.inf, np.inf, np.inf, 1, 2]


def test_dots_are_dot_products_of_rows():
    @njit
    def run(a, b, out):
        kernels.store(out, 0, kernels.dots(a, 0, b, 2))

    generator = np.random.default_rng(0)
    a, b = generator.random((2, 20, 16), np.float32)
    out = np.empty((1, 16), np.float32)
    run(a, b, out)
    np.testing.assert_allclose(out[0], (a[:16] * b[2:18]).sum(1), rtol=1e-6)


def test_bounds_of_vectors_are_checked_when_asked_for(monkeypatch):
    monkeypatch.setattr(numba.config, "BOUNDSCHECK", 1)

    @njit
    def copy_row(tile, row):
        kernels.store(tile, row, kernels.load(tile, 0))

    @njit
    def copy_lanes(array, row, channel):
        kernels.store(array, (row, channel), kernels.load(array, (0, 0)))

    tile, array = np.zeros((4, 16), np.float32), np.zeros((4, 40), np.float32)
    copy_row(tile, 3)
    copy_lanes(array, 3, 24)
    for row in (-1, 4):
        with pytest.raises(IndexError):
            copy_row(tile, row)
    for row, channel in ((4, 0), (0, 25), (-1, 0), (0, -1)):
        with pytest.raises(IndexError):
            copy_lanes(array, row, channel)
    with pytest.raises(IndexError, match="lanes"):
        copy_lanes(array[:, ::2], 0, 0)  # what lies between is another array's


def test_kernels_compile_where_no_cache_can_be_written(monkeypatch):
    def without_cache(*args, cache=False, **options):
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return njit(*args, **options)

    monkeypatch.setattr(kernels, "njit", without_cache)

    def double(values):
        for i in range(len(values)):  # a kernel allocates nothing
            values[i] *= 2

    values = np.ones(3, np.float32)
    kernels._Kernel(double, kernels.void(kernels.float32[:])).compiled(values)
    assert values.tolist() == [2, 2, 2]


def test_the_kernels_take_from_and_bring_to_every_orders_places():
    """Steps are numbered, and each way of copying a chunk is held to numpy's indexing.

    An order is the same for all numbers of slices of the same length: one of each is taken.
    """

    @njit
    def travel(orders, by_token, by_channel, copies, sums, states):
        tile = np.zeros((CHUNK, LANES), np.float32)
        for k in range(len(orders)):
            for start in range(0, orders.shape[1], CHUNK):
                places = orders[k, start : start + CHUNK]
                kernels._gather(tile, by_token, 0, 0, places)
                kernels._scatter(copies[k : k + 1], tile, 0, 0, places)
                kernels._gather(tile, by_channel, 0, 0, places)
                kernels._scatter(copies[k : k + 1, LANES : 2 * LANES], tile, 0, 0, places)
                in_vectors = kernels._whole_and_consecutive(places)
                row = start // LANES
                kernels._scatter_tokens(states[k : k + 1], sums[row:], 0, 0, places, in_vectors)

    numbers = np.arange(1024, dtype=np.float32)
    for length in range(1, 601):
        _, first = np.unique(-(-length // np.arange(1, length + 1)), return_index=True)
        orders = [token_order("inter_slice", length, n).numpy() for n in (first + 1).tolist()]
        orders = np.stack([*orders, orders[0][::-1]])
        by_channel = np.arange(LANES * length, dtype=np.float32).reshape(1, LANES, length)
        by_token = by_channel.swapaxes(1, 2).copy().swapaxes(1, 2)
        copies = np.full((len(orders), length, 2 * LANES), -1, np.float32).swapaxes(1, 2)
        states = np.full((len(orders), 1, length), -1, np.float32)
        travel(orders, by_token, by_channel, copies, numbers.reshape(-1, LANES), states)
        assert (copies == np.tile(by_channel, (1, 2, 1))).all()
        steps = np.take_along_axis(states[:, 0], orders, 1)
        assert (steps == numbers[:length]).all(), length


# --- Threads and processes ------------------------------------------------------------------------


@pytest.fixture(params=["torch's threads", "a pool"])
def team(request, monkeypatch):
    """Both places where tasks can run; a torch without GNU's OpenMP has only the second."""
    if request.param == "a pool":
        monkeypatch.setattr(cpu, "_gnu_openmp", lambda: None)
    elif cpu._gnu_openmp() is None:
        pytest.skip("this torch comes without GNU's OpenMP")
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_torchs_number_of_threads_is_kept_to(monkeypatch, team):
    used, run = set(), cpu.on_threads

    def watched(task, shares):
        def work(*share):
            used.add(threading.get_ident())
            time.sleep(0.01)  # time for others to take a share
            task(*share)

        run(work, shares)

    monkeypatch.setattr(cpu, "on_threads", watched)
    inputs = random_inputs(1, 64, 90, 5)
    results = {}
    for number in (1, 2, 3):
        torch.set_num_threads(number)
        used.clear()
        y = selective_scan(**inputs, backend="cpu")
        results[number] = torch.autograd.grad(y.sum(), list(inputs.values()))
        assert len(used) == number
    for number in (2, 3):
        for a, b in zip(results[number], results[1], strict=True):
            assert relative_error(a, b) < 1e-6


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_what_a_thread_raises_reaches_the_caller(error, team):
    torch.set_num_threads(2)
    done = []

    def task(share):
        if share == 1:
            raise error("in a thread")
        done.append(share)

    with pytest.raises(error, match="in a thread"):
        cpu.on_threads(task, [(share,) for share in range(3)])
    assert done == [0, 2]


class ScannedSamples(Dataset):
    """Samples that are scanned where they are made, on two threads."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, item: int) -> torch.Tensor:
        torch.set_num_threads(2)
        torch.manual_seed(item)
        inputs = random_inputs(1, 48, 70, 4)
        return torch.autograd.grad(selective_scan(**inputs).sum(), inputs["u"])[0]


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_scan_after_their_parent_has_scanned(start):
    if start not in multiprocessing.get_all_start_methods():
        pytest.skip(f"this system cannot {start} processes")
    if start == "fork" and torch.version.cuda:
        pytest.skip("PyTorch built for CUDA refuses gradients in a forked process")
    before = torch.get_num_threads()
    samples = ScannedSamples()
    try:
        expected = [samples[0], samples[1]]
    finally:
        torch.set_num_threads(before)
    loader = DataLoader(samples, batch_size=None, num_workers=1, multiprocessing_context=start)
    for found, value in zip(loader, expected, strict=True):
        assert torch.equal(found, value)
