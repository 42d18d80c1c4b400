"""The network in ONNX, in torch.export and in torch.compile: the same logits, for windows of any size."""

from dataclasses import replace

import onnx
import pytest
import torch

from srlib import SegResMamba, data
from srlib.export import onnx as exported
from srlib.run import predict, train
from srlib.run.evaluate import score

TINY = predict.provided("hippocampus")
SMALL = {"features": (8, 16, 32, 64), "d_state": 4}


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("onnx") / "tiny.onnx"
    exported.write(TINY, path)  # some 20 s
    return path


def image(*size: int) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("size", [(1, 1, 48, 64, 48), (2, 1, 33, 9, 20), (1, 1, 40, 37, 81)])
def test_windows_of_any_size_and_number(file, size):
    network = predict.load(TINY).model
    with torch.inference_mode():
        expected = network(image(*size))
    torch.testing.assert_close(exported.load(file).model(image(*size)), expected, rtol=0, atol=1e-4)


def test_slices_along_another_axis(tmp_path):
    trained, path = train.load_trained(TINY), tmp_path / "model.safetensors"
    train.save_trained(path, trained._replace(config=replace(trained.config, slice_axis=1)))
    exported.write(path, tmp_path / "model.onnx")
    with torch.inference_mode():
        expected = predict.load(path).model(image(1, 1, 40, 37, 81))
        differs = (expected - predict.load(TINY).model(image(1, 1, 40, 37, 81))).abs().max()
    found = exported.load(tmp_path / "model.onnx").model(image(1, 1, 40, 37, 81))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert differs > 1


def test_the_file_says_nothing_of_the_machine_that_wrote_it(file):
    assert b".py" not in file.read_bytes()
    assert exported.load(str(file)).patch_size == predict.load(TINY).patch_size


def test_the_file_is_onnx_s_own_operators_and_names_its_sizes(file):
    model = onnx.load(file)
    onnx.checker.check_model(model, full_check=True)
    assert {opset.domain for opset in model.opset_import} <= {"", "pkg.onnxscript.torch_lib.common"}
    (given,), (made,) = model.graph.input, model.graph.output
    assert (given.name, made.name) == ("image", "logits")
    known = [dim.dim_value for dim in given.type.tensor_type.shape.dim]
    assert known == [0, 1, 0, 0, 0]  # 0: decided at each call


@pytest.mark.skipif("hippocampus" not in data.catalog.present(), reason="hippocampus is not here")
def test_ten_cases_have_the_same_logits_and_dice(file):
    dataset, entry = data.open("hippocampus"), data.get("hippocampus")
    networks = predict.load(TINY), exported.load(file)
    assert networks[1].entry == networks[0].entry
    for case_id in train.load_trained(TINY).split.test[:10]:
        case = dataset.load(case_id)
        ours, theirs = (
            torch.cat([*predict.scores_by_slab(of.model, case["image"], of.patch_size)], dim=1)
            for of in networks
        )
        torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-4)
        about = (case["label"][0], entry.spacing, entry.classes, entry.nsd_tolerance)
        dice = [
            [row["dice"] for row in score(scores.argmax(0), *about)] for scores in (ours, theirs)
        ]
        assert dice[0] == dice[1]


def test_a_network_whose_orders_have_no_form_is_refused(tmp_path):
    trained = train.load_trained(TINY)
    for change, expected in (({"nslices": 3}, "nslices=3"), ({"model": "unet"}, "is a peer")):
        network = trained._replace(config=replace(trained.config, **change))
        train.save_trained(tmp_path / "model.safetensors", network)
        with pytest.raises(ValueError, match=expected):
            exported.write(tmp_path / "model.safetensors", tmp_path / "model.onnx")
    assert not (tmp_path / "model.onnx").exists()


@pytest.mark.parametrize(
    "settings", [{"variant": "released"}, {"extra_conv": False}, {"slice_axis": 1}], ids=str
)
@pytest.mark.parametrize("size", [(1, 2, 48, 40, 33), (1, 2, 35, 18, 5)])
def test_the_exported_form_computes_the_same(settings, size):
    network = SegResMamba(2, 3, **SMALL, **settings).eval()
    with torch.inference_mode():
        expected = network(image(*size))
        found = exported.exportable(network)(image(*size))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_torch_export_holds_the_whole_network():
    network = SegResMamba(1, 2, **SMALL).eval()
    program = torch.export.export(network, (image(1, 1, 33, 24, 20),))
    targets = {str(node.target) for node in program.graph.nodes}
    assert "srlib.fused_mixer.default" in targets  # one node a mixer, not what it does
    with torch.inference_mode():
        expected = network(image(1, 1, 33, 24, 20))
        torch.testing.assert_close(program.module()(image(1, 1, 33, 24, 20)), expected)


def test_torch_compile_takes_the_whole_network():
    """Forward and backward in one graph; `aot_eager` needs no C++ compiler."""
    network = SegResMamba(1, 2, **SMALL)
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    gradients = []
    for function in (network, compiled):
        network.zero_grad()
        logits = function(image(1, 1, 33, 24, 20))
        logits.square().mean().backward()
        gradients.append([logits, *(p.grad for p in network.parameters() if p.grad is not None)])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(theirs, ours, rtol=1e-3, atol=1e-4)
