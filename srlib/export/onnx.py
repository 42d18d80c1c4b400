"""A trained SegResMamba as an ONNX file: windows (B, C, D, H, W) of any size in, scores out.

torch's exporter writes the file. Where the network as it is trained stands in its way, `exportable` puts the same
function in another form:

| of the network | stands in the way | here |
|---|---|---|
| a Mamba mixer | `srlib::fused_mixer`, an operator of ours | its composition, with ONNX's Scan (`onnx_scan`) |
| `Restore` | ONNX fixes `output_padding`, which the parity of the size decides | the even size, then cut |
| `Downsample` | pads where a size is odd, a branch | always pads; the stride drops a plane too many |
"""

from __future__ import annotations

import copy
import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from srlib import data
from srlib.data.catalog import tuples
from srlib.export.hub import published
from srlib.files import atomic_path
from srlib.net.model import Downsample, Restore, SegResMamba
from srlib.net.tom import TriOrientedMamba
from srlib.run.predict import Segmenter
from srlib.run.train import load_trained, network_arguments, restore

ELEMENTS = 2**16  # of the states of all segments of a scan, which stay in a core's cache
OPSET = 18


class _Restore(Restore):
    def upsample(self, x: Tensor, size: Any) -> Tensor:
        even = self.conv(x, output_size=[2 * n for n in x.shape[2:]])
        depth, height, width = even.shape[2:] if self.released else size
        return even[..., :depth, :height, :width]


class _Downsample(Downsample):
    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(self.norm(self.extra(x)), (0, 1) * 3, mode="replicate"))


FORMS = {Restore: _Restore, Downsample: _Downsample}


def exportable(network: nn.Module) -> nn.Module:
    """A copy of a SegResMamba that computes the same in the forms of this module."""
    made = copy.deepcopy(network)
    for module in made.modules():
        module.__class__ = FORMS.get(type(module), type(module))
        if isinstance(module, TriOrientedMamba):
            module.fused = True
    return made.eval()


def program(network: nn.Module, elements: int = ELEMENTS) -> Any:
    """`torch.onnx.ONNXProgram` of a network.

    Args:
        network: SegResMamba, perhaps within `srlib.data.labels.Scoring`.
        elements: see `ELEMENTS`; 1 is one segment, ONNX's Scan over the tokens.
    """
    from srlib.export.onnx_scan import translated

    (inner,) = (part for part in network.modules() if isinstance(part, SegResMamba))
    axes = dict.fromkeys((0, 2, 3, 4), torch.export.Dim.DYNAMIC)
    window = torch.zeros(2, inner.in_channels, 48, 64, 80)
    mixer = torch.ops.srlib.fused_mixer.default
    with torch.no_grad(), _quiet():
        traced = torch.export.export(
            exportable(network), (window,), dynamic_shapes=(axes,), strict=False
        )
        return torch.onnx.export(
            traced,
            input_names=["image"],
            output_names=["logits"],
            opset_version=OPSET,
            custom_translation_table={mixer: translated(elements)},
            verbose=False,
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave out what the exporter says of operators that are not used and of constants that it does not fold."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logging.disable(before)


def write(checkpoint: Path, file: Path) -> None:
    """Write a trained SegResMamba as an ONNX file, and as its metadata what `load` needs to know.

    Raises:
        ValueError: the network is a peer, or its `nslices` is fixed: where these do not divide the tokens, their order
            has no form for every size.
    """
    trained = load_trained(checkpoint)
    if network_arguments(trained.config, trained.entry)["nslices"] is not None:
        raise ValueError(
            f"{checkpoint}: nslices={trained.config.nslices}; expected None, for windows of any size"
        )
    made = program(restore(trained, checkpoint).cpu())
    known = published(trained)
    about = {"config": asdict(known.config), "dataset": asdict(known.entry)}
    _forget_source(made.model)
    made.model.metadata_props["srlib"] = json.dumps(about)
    with atomic_path(file) as temporary:
        made.save(temporary, external_data=False)


def _forget_source(model: Any) -> None:
    """Take out what the exporter notes of each node: stack traces, with paths of the machine that exported."""
    for graph in (model.graph, *(function.graph for function in model.functions.values())):
        for node in graph.all_nodes():
            node.metadata_props.clear()
            node.doc_string = None
            for value in node.outputs:
                value.metadata_props.clear()


class Session(nn.Module):
    """An ONNX file in onnxruntime on the CPU, with as many threads as torch has, as a network of torch's."""

    def __init__(self, file: Path) -> None:
        import onnxruntime

        super().__init__()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        providers = ["CPUExecutionProvider"]
        self.session = onnxruntime.InferenceSession(str(file), options, providers=providers)

    def forward(self, x: Tensor) -> Tensor:
        """Windows (B, C, D, H, W) -> logits (B, K, D, H, W)."""
        (logits,) = self.session.run(None, {"image": x.cpu().numpy()})
        return torch.from_numpy(logits).to(x.device)


def load(file: Path) -> Segmenter:
    """What `write` wrote, for `srlib.run.predict.segment` on the CPU; ValueError for another network's file."""
    network = Session(Path(file))
    known = network.session.get_modelmeta().custom_metadata_map
    if "srlib" not in known:
        raise ValueError(f"{file}: has no metadata of srlib; expected a file that `export` wrote")
    about = tuples(json.loads(known["srlib"]))
    return Segmenter(network, data.Entry(**about["dataset"]), about["config"]["patch_size"])
