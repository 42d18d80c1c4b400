"""Counted costs, held against other ways to find them: saved tensors, formulas, real runs."""

import multiprocessing
import sys
import time
from itertools import pairwise
from math import prod
from multiprocessing import Pipe
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from torch import nn

from srlib.files import REFERENCE
from srlib.net import costs
from srlib.net.costs import (
    LEVERS,
    PARTS,
    Workload,
    count,
    loss_function,
    measure,
    measure_apart,
    process_memory,
)

SMALL = Workload("unet", size=32, out_channels=4)  # four: the CPU pads channels to a multiple


@pytest.fixture(scope="module")
def counted():
    return count(SMALL)


def test_kept_activations_are_what_autograd_saves(counted):
    """The same from a real forward pass: saved tensors, each storage once, without the weights."""
    network, (image, label) = SMALL.network(), SMALL.batch("cpu")
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage  # held, so that no address is used twice
        return tensor

    def kept():
        weights = {p.untyped_storage().data_ptr() for p in network.parameters()}
        given = {t.untyped_storage().data_ptr() for t in (image, label)}
        return sum(s.nbytes() for at, s in storages.items() if at not in weights | given) / 2**30

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logits = network(image)
        before = kept()
        loss_function(logits, label)
    totals = counted.totals
    logits_gib = logits.untyped_storage().nbytes() / 2**30
    assert totals["kept"] == pytest.approx(before + logits_gib, rel=0.01)
    assert totals["kept"] + totals["kept_by_loss"] == pytest.approx(kept(), rel=0.01)


def test_macs_are_those_of_the_convolutions(counted):
    """Multiplications of a convolution: output voxels x inputs x kernel; of a transposed one, input voxels."""
    network, macs = SMALL.network(), []

    def note(module, inputs, output):
        transposed = isinstance(module, nn.ConvTranspose3d)
        voxels = prod((inputs[0] if transposed else output).shape[2:])
        macs.append(voxels * module.weight.numel())

    for module in network.modules():
        if isinstance(module, nn.Conv3d | nn.ConvTranspose3d):
            module.register_forward_hook(note)
    with torch.no_grad():
        network(SMALL.batch("cpu")[0])
    assert counted.totals["gmacs"] == pytest.approx(sum(macs) / 1e9, rel=1e-9)


def test_scans_are_counted():
    """Three orders in a block's outer and inner layer, each 7 FLOP a token, channel and state and 3 without state."""
    tokens = [(32 >> s) ** 3 for s in range(5)]  # of the stages, and of the last one's inner layer
    channels = [96 << s for s in range(4)]  # inner width E of the ToM layers
    layers = [(e, n) for e, pair in zip(channels, pairwise(tokens), strict=True) for n in pair]
    scans = sum(3 * n * e * (7 * 16 + 3) / 2 for e, n in layers)
    ranks = [-(-e // 32) for e in channels for _ in range(2)]
    taps_and_projections = sum(
        3 * n * e * (4 + 2 * rank + 2 * 16) for (e, n), rank in zip(layers, ranks, strict=True)
    )
    shared = sum(n * e * e * 3 // 2 for e, n in layers)  # into 2 E and out of E, from and to E / 2
    operators = count(Workload("segresmamba", size=64)).operators
    mixed = sum(gmacs for name, gmacs in operators.items() if name != "convolution")
    depthwise = sum(3 * 4 * n * e for e, n in layers)  # a convolution where it is not fused
    expected = (scans + taps_and_projections + shared) / 1e9
    assert expected - depthwise / 1e9 <= mixed * 1.0001
    assert mixed <= expected * 1.0001


def test_parts_add_up(counted):
    totals = counted.totals
    assert totals["peak"] == pytest.approx(sum(totals[part] for part in PARTS))
    assert totals["weights"] == pytest.approx(4 * totals["parameters"] / 2**30, rel=0.01)
    assert totals["optimizer"] == pytest.approx(2 * totals["weights"], rel=0.01)
    assert totals["trained"] == totals["parameters"]


def test_parameters_that_no_gradient_reaches_are_found():
    totals = count(Workload("unetr", size=32)).totals
    assert totals["parameters"] - totals["trained"] == 18_432


def test_stages_add_up():
    work = Workload("segresmamba_released", size=64)
    found = count(work)
    assert found.stages["parameters"].sum() == found.totals["parameters"]
    assert found.stages["gmacs"].sum() == pytest.approx(found.totals["gmacs"])
    assert found.stages["kept"].sum() == pytest.approx(found.totals["kept"], rel=0.1)


def test_bf16_and_checkpoints_keep_less():
    full = count(Workload("nnunet", size=64)).totals
    half = count(Workload("nnunet", size=64, precision="bf16")).totals
    again = count(Workload("nnunet", size=64, checkpointing=True)).totals
    assert half["kept"] < 0.7 * full["kept"]
    assert again["kept"] < 0.5 * full["kept"]
    assert again["gmacs"] == full["gmacs"]
    assert again["step_gmacs"] > 1.2 * full["step_gmacs"]


def test_measured_memory_is_the_counted_and_what_operators_use_inside(counted):
    measured, totals = measure(SMALL, steps=1), counted.totals
    for part in ("weights", "optimizer", "input"):
        assert measured[part] == pytest.approx(totals[part], rel=0.01), part
    kept = totals["kept"] + totals["kept_by_loss"]
    assert measured["activations"] == pytest.approx(kept, rel=0.05)
    assert measured["allocated"] >= 0.99 * totals["peak"]
    assert measured["step_s"] > measured["inference_s"] > 0
    assert measured["resident"] > 0


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_is_computed_again_is_counted_as_freed_after_its_use(precision):
    """nnU-Net's operators need little scratch: a GPU's allocator gave what is counted."""
    gpu = pd.read_csv(REFERENCE / "gpu" / "memory.csv").query("setting == 'btcv_128'")
    measured = gpu.query("peer == 'nnunet' and checkpointing").set_index("precision")["allocated"]
    counted = count(Workload("nnunet", precision=precision, checkpointing=True)).totals
    assert counted["peak"] == pytest.approx(measured[precision], rel=0.01)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux enforces a limit on data")
def test_what_does_not_fit_says_how_far_it_got():
    """The limit stands there too: who runs short decides how it is put, and oneDNN does not name memory."""
    result = measure_apart(Workload("unet", size=128), limit=1.0)
    assert list(result) == ["failed"]
    assert result["failed"].startswith("first step: ")
    assert result["failed"].endswith("(at most 1 GiB of data)")


def says_nothing(*_):
    time.sleep(60)


def test_a_process_that_says_nothing_is_ended(monkeypatch):
    monkeypatch.setattr(costs, "_child", says_nothing)
    monkeypatch.setattr(costs, "SILENCE", 1.0)
    assert measure_apart(SMALL) == {"failed": "starting: nothing was heard of it for 1 s"}
    assert not multiprocessing.active_children()


def test_samples_that_end_early_are_no_measurement(monkeypatch):
    class Process:
        def __init__(self):
            self.rss = iter([1])

        def memory_info(self):
            return SimpleNamespace(
                rss=next(self.rss)
            )  # then StopIteration, as MemoryError where there is none left

    monkeypatch.setattr(costs.psutil, "Process", Process)
    monkeypatch.setattr("threading.excepthook", lambda _: None)
    with pytest.raises(MemoryError, match="sampled to the end"), process_memory("cpu"):
        time.sleep(0.5)


def test_an_error_without_words_is_told(monkeypatch):
    def measure(*arguments):
        raise MemoryError

    monkeypatch.setattr(costs, "measure", measure)
    receiver, sender = Pipe(duplex=False)
    costs._child(SMALL, "cpu", 1, None, sender)
    assert receiver.recv() == {"failed": "MemoryError: "}


def test_unknown_precision_is_refused():
    with pytest.raises(ValueError, match="fp32 or bf16, got 'fp8'"):
        Workload("unet", precision="fp8")


def test_each_lever_keeps_less():
    works = [Workload("segresmamba", 64, **options) for options in LEVERS.values()]
    totals = [count(work).totals for work in works]
    kept = [found["kept"] + found["kept_by_loss"] for found in totals]
    assert kept == sorted(set(kept), reverse=True)
    assert kept[2] < 0.5 * kept[0]
