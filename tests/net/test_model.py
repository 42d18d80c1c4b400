"""SegResMamba: the authors' network to rounding, the paper's counts, every size, every variant."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from srlib import files
from srlib.net.model import FEATURES, SegResMamba, _even, load_released_state_dict
from srlib.net.peers import with_checkpoints
from srlib.run.train import build_model, load_trained

ORACLE = Path(__file__).parents[1] / "oracles" / "released_segresmamba_f8.npz"
TINY = FEATURES["tiny"]


def filled(k: int, name: str, shape: list[int]) -> torch.Tensor:
    """The oracle's fill rule for the k-th parameter."""
    wave = torch.sin(0.7 * torch.arange(np.prod(shape), dtype=torch.float64) + 1.3 * k)
    if len(shape) > 1:
        return (wave / np.sqrt(np.prod(shape[1:]))).view(shape)
    return 0.1 * wave + name.endswith("weight")


@pytest.fixture(scope="module")
def oracle():
    with np.load(ORACLE) as arrays:
        keys, live = json.loads(str(arrays["keys"])), json.loads(str(arrays["live"]))
        state = {name: filled(k, name, shape) for k, (name, shape) in enumerate(keys)}
        return {**arrays, "state": state, "live": live}


def test_released_variant_equals_the_authors_network(oracle):
    model = SegResMamba(1, 3, TINY, variant="released").double()
    left_out = load_released_state_dict(model, oracle["state"])
    assert set(left_out) == set(oracle["state"]) - set(oracle["live"])

    n = torch.arange(64 * 32 * 48, dtype=torch.float64).view(1, 1, 64, 32, 48)
    y = model(torch.sin(0.11 * n) + 0.5 * torch.cos(0.0137 * n)).detach()
    scale = np.abs(oracle["y"]).max()
    assert np.abs(y[:, :, ::4, ::4, ::4].numpy() - oracle["y"]).max() / scale < 1e-9
    np.testing.assert_allclose(y.mean(dim=(0, 2, 3, 4)), oracle["y_mean"], rtol=1e-9)
    np.testing.assert_allclose(y.std(dim=(0, 2, 3, 4)), oracle["y_std"], rtol=1e-9)


def test_released_weights_are_refused_where_they_do_not_fit(oracle):
    state = oracle["state"]
    with pytest.raises(ValueError, match="variant='released'"):
        load_released_state_dict(SegResMamba(1, 3, TINY, tom="none"), state)
    with pytest.raises(ValueError, match=r"vit.downsample_layers.0.0.weight: shape"):
        load_released_state_dict(SegResMamba(2, 3, TINY, variant="released"), state)
    incomplete = {name: value for name, value in state.items() if name != "out.bias"}
    with pytest.raises(ValueError, match=r"lacks 1 names.*'out.bias'"):
        load_released_state_dict(SegResMamba(1, 3, TINY, variant="released"), incomplete)


def test_dataparallel_prefix_is_taken_off(oracle):
    model = SegResMamba(1, 3, TINY, variant="released").double()
    load_released_state_dict(model, {f"module.{k}": v for k, v in oracle["state"].items()})
    torch.testing.assert_close(model.head.bias.data, oracle["state"]["out.bias"])


# --- Weights: names and random numbers --------------------------------------------------------------


def former(name: str, tom: str) -> str:
    """A parameter's name in files from before the mixed block's layers had the paper's."""
    f4 = "inner.3" if tom in ("both", "inner") else "inner.2"
    old = {"f1": "inner.0", "f2": "inner.1", "f3": "inner.2", "f4": f4, "f5": "restore"}
    first, stage, layer, *rest = [*name.split("."), "", ""]
    if first != "blocks":
        return name
    return ".".join([first, stage, {**old, "tom": "outer"}[layer], *rest]).rstrip(".")


@pytest.mark.parametrize("tom", ["both", "inner", "outer", "none", "conv"])
def test_state_dicts_with_the_former_names_load(tom):
    wanted = SegResMamba(1, 2, TINY, tom=tom).state_dict()
    model = SegResMamba(1, 2, TINY, tom=tom)
    wrapped = nn.ModuleDict({"network": model})  # as in a network that holds this one
    wrapped.load_state_dict({f"network.{former(k, tom)}": v for k, v in wanted.items()})
    torch.testing.assert_close(model.state_dict(), wanted, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        model.load_state_dict({**wanted, "blocks.0.inner.4.0.weight": torch.zeros(1)})


@pytest.mark.parametrize("name", ["hippocampus/tiny", "hippocampus/small", "mni152/tiny"])
def test_published_networks_load(name):
    trained = load_trained(files.REFERENCE / f"{name}.safetensors")
    model = build_model(trained.config, trained.entry)
    model.load_state_dict(trained.weights)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, trained.weights[name].float()), name


@pytest.mark.parametrize(
    ("options", "fingerprint"),
    [
        ({}, 13897555.9004842),
        ({"tom": "inner"}, 5139374.7455090135),
        ({"tom": "outer"}, 5108484.911049077),
        ({"tom": "none"}, 702251.224032158),
        ({"block": "segmamba"}, 12541120.421968738),
        ({"variant": "released"}, 888404.2230016094),
        ({"scan_orders": ("reverse",), "extra_conv": False}, 3869116.8246996617),
    ],
    ids=str,
)
def test_a_seed_draws_the_same_weights_as_ever(options, fingerprint):
    torch.manual_seed(0)
    weights = SegResMamba(1, 2, TINY, **options).parameters()
    found = sum(k * w.double().abs().sum().item() for k, w in enumerate(weights, 1))
    assert found == pytest.approx(fingerprint, rel=1e-7)  # other seeds are 1e-4 away


# --- Variants and sizes ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variant", "in_channels", "out_channels", "expected"),
    [("paper", 1, 14, 68_259_950), ("released", 4, 3, 70_471_587)],
)
def test_parameter_counts(variant, in_channels, out_channels, expected):
    """The released count is what the authors' code gives a gradient (shared facts of the paper)."""
    with torch.device("meta"):
        model = SegResMamba(in_channels, out_channels, variant=variant)
    assert sum(p.numel() for p in model.parameters()) == expected


VARIANTS = [
    {},
    {"tom": "inner"},
    {"tom": "outer"},
    {"tom": "none"},
    {"tom": "conv"},
    {"tom_residual": True},
    {"scan_orders": ("forward",)},
    {"scan_orders": ("reverse", "inter_slice")},
    {"nslices": 4},
    {"slice_axis": 2},
    {"recurrence": False},
    {"extra_conv": False},
    {"block": "segmamba"},
    {"block": "segmamba", "extra_conv": False},
    {"variant": "released"},
]


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_every_parameter_of_every_variant_is_used(options):
    torch.manual_seed(0)
    model = SegResMamba(1, 2, TINY, **options)
    model(torch.randn(1, 1, 33, 9, 8)).square().mean().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


def test_variants_count_their_tom_layers():
    def layers(**options):
        names = dict(SegResMamba(1, 2, TINY, **options).named_modules())
        return sum(name.endswith(".mamba") for name in names)

    assert [layers(tom=tom) for tom in ("both", "inner", "outer", "none", "conv")] == [
        8,
        4,
        4,
        0,
        0,
    ]
    assert layers(variant="released") == 0


@pytest.mark.parametrize(
    "size", [(33, 1, 1), (33, 17, 21), (35, 50, 36), (47, 47, 47), (64, 32, 48)]
)
def test_output_has_the_input_size(size):
    model = SegResMamba(1, 3, TINY).eval()
    with torch.no_grad():
        y = model(torch.randn(1, 1, *size))
    assert y.shape == (1, 3, *size)
    assert torch.isfinite(y).all()


def test_every_input_voxel_of_an_odd_size_reaches_the_output():
    torch.manual_seed(0)
    model = SegResMamba(1, 2, TINY, tom="none").double()
    x = torch.randn(1, 1, 35, 33, 37, dtype=torch.float64, requires_grad=True)
    model(x).square().mean().backward()
    assert (x.grad != 0).all()


@pytest.mark.parametrize("size", [*itertools.product((1, 2, 3, 4), repeat=3)], ids=str)
def test_odd_sizes_are_padded_by_their_last_planes(size):
    """Held against torch's padding, whose gradient has no fixed order on a GPU."""
    x = torch.randn(2, 3, *size, dtype=torch.float64, requires_grad=True)
    ends = [number for n in reversed(size) for number in (0, n % 2)]
    found, expected = _even(x), F.pad(x, ends, mode="replicate")
    assert torch.equal(found, expected)
    weights = torch.randn_like(expected)
    gradients = [torch.autograd.grad((y * weights).sum(), x)[0] for y in (found, expected)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_no_operator_adds_in_any_order_on_a_gpu(options):
    """Of the operators that torch lists under `use_deterministic_algorithms`, those a network may be tempted by."""
    used = set()

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            used.add(function.name())
            return function(*args, **(kwargs or {}))

    with Names():
        model = SegResMamba(1, 2, TINY, **options)
        model(torch.randn(1, 1, 35, 33, 9)).square().mean().backward()
    # Upsampling's is torch's on a CPU only; `srlib::double` has its own on a GPU.
    adding = ("pad3d_backward", "pool3d_backward", "index_add", "index_put", "scatter")
    assert "aten::convolution_backward" in used
    assert [name for name in used if any(word in name for word in adding)] == []


# --- One function, computed in several ways --------------------------------------------------------


def step(size: tuple[int, ...], checkpoints: bool = False, **options) -> dict[str, torch.Tensor]:
    """Logits and gradients of a network with the same weights, whatever the options that do not change it."""
    torch.manual_seed(0)
    model = SegResMamba(2, 3, TINY, **options)
    names = dict(model.named_parameters())
    x = torch.randn(1, 2, *size, requires_grad=True)
    y = with_checkpoints(model)(x) if checkpoints else model(x)
    gradients = torch.autograd.grad(y.square().mean(), [x, *names.values()])
    return {"y": y, **dict(zip(["x", *names], gradients, strict=True))}


@pytest.mark.parametrize("options", [{}, {"tom": "none"}, {"variant": "released"}], ids=str)
@pytest.mark.parametrize("size", [(64, 32, 48), (37, 35, 34)])
def test_recomputation_changes_no_output_and_no_gradient(options, size):
    """Bit for bit what autograd makes of all that it keeps."""
    kept = step(size, recompute=False, **options)
    torch.testing.assert_close(step(size, recompute=True, **options), kept, rtol=0, atol=0)


@pytest.mark.parametrize("way", [{"fused": False}, {"checkpoints": True}], ids=str)
@pytest.mark.parametrize("recompute", [True, False])
def test_other_ways_give_the_same_gradients(way, recompute):
    expected = {name: t.detach() for name, t in step((40, 33, 34)).items()}
    logits = float(expected["y"].abs().max())
    largest = max(float(t.abs().max()) for name, t in expected.items() if name != "y")
    for name, found in step((40, 33, 34), recompute=recompute, **way).items():
        off = float((found.detach() - expected[name]).abs().max())
        assert off < 1e-4 * (logits if name == "y" else largest), name  # 1.1e-5 was seen


# --- Calls -----------------------------------------------------------------------------------------


def test_encode_then_decode_is_forward():
    model = SegResMamba(2, 3, TINY).eval()
    x = torch.randn(1, 2, 40, 36, 33)
    with torch.no_grad():
        skips = model.encode(x)
        assert [tuple(s.shape[1:]) for s in skips] == [
            (8, 20, 18, 17),
            (16, 10, 9, 9),
            (32, 5, 5, 5),
            (64, 3, 3, 3),
        ]
        torch.testing.assert_close(model.decode(skips, x.shape[2:]), model(x))


@pytest.mark.parametrize("options", [{}, {"nslices": 5}, {"fused": False}], ids=str)
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_slices_lie_along_any_axis(axis, options):
    networks = [SegResMamba(1, 3, TINY, slice_axis=a, **options).eval() for a in (0, axis)]
    networks[1].load_state_dict(networks[0].state_dict())
    x = torch.randn(1, 1, 35, 29, 41)
    moved, back = x.movedim(2 + axis, 2), (2, 2 + axis)
    with torch.no_grad():
        skips = [skip.movedim(*back) for skip in networks[0].encode(moved)]
        torch.testing.assert_close(networks[1].encode(x), skips)
        y = networks[1](x)
        torch.testing.assert_close(y, networks[0](moved).movedim(*back))
        assert torch.allclose(y, networks[0](x), atol=1e-3) == (axis == 0)


def test_bad_inputs_are_named():
    model = SegResMamba(2, 3, TINY)
    with pytest.raises(ValueError, match="at least one axis must have 33 voxels"):
        model(torch.zeros(1, 2, 32, 32, 32))
    with pytest.raises(ValueError, match=r"in_channels = 2, got rank 5 with shape \(1, 1, 40"):
        model(torch.zeros(1, 1, 40, 40, 40))
    with pytest.raises(ValueError, match="in_channels = 2, got rank 4"):
        model(torch.zeros(2, 40, 40, 40))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "other"}, "variant must be one of"),
        ({"tom": "all"}, "tom must be one of"),
        ({"block": "resnet"}, "block must be one of"),
        ({"block": "segmamba", "tom": "inner"}, "block must be one of"),
        ({"variant": "released", "tom": "both"}, "released variant runs no ToM"),
        ({"features": (8, 16, 32)}, "features must be four numbers"),
        ({"slice_axis": 3}, "slice_axis must be 0, 1 or 2, got 3"),
        ({"recompute": "never"}, "recompute must be True, False or 'auto'"),
        ({"features": (12, 24, 48, 96)}, "features must be four numbers"),
        ({"features": (8, 16, 32, 48)}, "features must be four numbers"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        SegResMamba(1, 2, **{"features": TINY, **options})


@pytest.mark.parametrize("size", [(40, 33, 34), (48, 64, 48), (40, 6, 5)])
def test_bf16_autocast_trains_without_nan(size):
    torch.manual_seed(0)
    model = SegResMamba(1, 2, TINY)
    for _ in range(
        3
    ):  # the memory that a faulty convolution leaves unset differs from call to call
        with torch.autocast("cpu", torch.bfloat16):
            y = model(torch.randn(1, 1, *size))
        y.float().square().mean().backward()
        assert torch.isfinite(y).all()
        assert [n for n, p in model.named_parameters() if not torch.isfinite(p.grad).all()] == []
