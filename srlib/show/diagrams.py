"""Diagrams of the network and its parts: what stands in their boxes comes from the shapes that the code reports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

from matplotlib.figure import Figure

from srlib.scan import ORDERS
from srlib.show.charts import GREY, ORANGE, SKY, YELLOW, diagram

Box = tuple[float, float, str, str]  # x, y, text, colour: what `diagram` takes


def network_diagram(size: Sequence[int], shapes: Sequence[Sequence[int]]) -> Figure:
    """The U: stem, encoder, decoder and skips, with channels x edge³ in each box.

    Args:
        size: (D, H, W) of the image, of which the last is written.
        shapes: (C, D, H, W) of each stage, the finest first.
    """
    stages, deepest = len(shapes), len(shapes) - 1
    stem = (shapes[0][0], *(edge // 2 for edge in size))
    boxes: dict[str, Box] = {
        "image": (-0.6, 0, _sized("image", (1, *size)), GREY),
        "stem": (0.1, -1, _sized("stem", stem), GREY),
        "logits": (7, 0, _sized("logits", (3, *size)), GREY),
    }
    for s, shape in enumerate(shapes):
        at = 3.5 if s == deepest else 1.1 + s * 0.7
        boxes[f"stage {s}"] = (at, -1 - s, _sized(f"stage {s}", shape), ORANGE)
        if s < deepest:
            boxes[f"decoder {s}"] = (6.5 - s * 0.8, -1 - s, _sized(f"decoder {s}", shape), SKY)
    way = ["image", "stem", *(f"stage {s}" for s in range(stages))]
    way += [*(f"decoder {s}" for s in reversed(range(deepest))), "logits"]
    arrows = [(a, b, "") for a, b in pairwise(way)]
    return diagram(boxes, arrows + [(f"stage {s}", f"decoder {s}", "skip") for s in range(deepest)])


def tom_diagram() -> Figure:
    """The tri-oriented Mamba layer: shared projections, a branch for each order, their sum and the gate."""
    boxes: dict[str, Box] = {
        "z": (0, 0, "tokens z\n(B, L, C)", GREY),
        "in": (1.15, 0, "in_proj\nC to 2E", GREY),
        "sum": (4.6, 0, "sum", SKY),
        "gate": (1.15, -2, "gate\nE channels", SKY),
        "SiLU": (5.65, -2, "SiLU", SKY),
        "times": (5.65, 0, "times", SKY),
        "out": (6.8, 0, "out_proj\nE to C", GREY),
    }
    arrows = [("z", "in"), ("in", "gate"), ("gate", "SiLU"), ("SiLU", "times")]
    arrows += [("sum", "times"), ("times", "out")]
    for name, y in zip(ORDERS, (1, 0, -1), strict=True):
        boxes[name] = (2.3, y, f"{name}\norder", YELLOW)
        boxes[f"scan {name}"] = (3.45, y, "conv1d, SiLU\nscan, undo", ORANGE)
        arrows += [("in", name), (name, f"scan {name}"), (f"scan {name}", "sum")]
    return diagram(boxes, [(a, b, "") for a, b in arrows])


def cmmb_diagram(shapes: Mapping[str, Sequence[int]]) -> Figure:
    """The mixed block, step by step; shapes (C, D, H, W) of X, F1 to F6 and F_out."""
    kinds = ["input", "conv 5", "conv 3", "ToM", "conv 3", "convT 5", "sum", "ToM"]
    colours = {"ToM": ORANGE, "input": GREY, "sum": GREY}
    boxes: dict[str, Box] = {}
    for k, ((name, shape), kind) in enumerate(zip(shapes.items(), kinds, strict=True)):
        y = 0 if name in ("X", "F6", "F_out") else -1
        boxes[name] = (0.98 * k, y, _sized(f"{name}: {kind}", shape), colours.get(kind, SKY))
    return diagram(boxes, [*((a, b, "") for a, b in pairwise(shapes)), ("X", "F6", "")])


def _sized(name: str, shape: Sequence[int]) -> str:
    """A box's text for a map (C, D, H, W)."""
    return f"{name}\n{shape[0]} x {shape[-1]}³"
