"""A training step as a CUDA graph: the GPU is given all kernels of a step at once, not one by one from Python."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

logger = logging.getLogger("srlib")
WARM_UP = 3  # steps before the capture: kernels are compiled, libraries make their handles


class CapturedStep:
    """A training step that runs as a CUDA graph once it has been captured; until then, and elsewhere, as it is.

    The first calls are steps as any other, so that nothing has to be undone: the weights are those of as many steps
    without a graph, bit for bit where the kernels are deterministic.

    Args:
        step: a whole step on the images and labels it is given, from `zero_grad` to the optimizer's step; returns the
            loss. What it reads besides must stay where it is: a learning rate that changes has to be a tensor. It may
            wait for nothing on the GPU.
        refusal: why the step cannot be captured, empty where it can.

    Attributes:
        reason: why steps are not captured, empty as long as nothing stands against it.
    """

    def __init__(self, step: Callable[..., Tensor], refusal: str = "") -> None:
        self.step, self.reason = step, refusal
        self.calls = 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.inputs: list[Tensor] = []
        self.loss: Tensor | None = None
        self.stream: torch.cuda.Stream | None = None

    def __call__(self, *inputs: Tensor) -> Tensor:
        """One step; the loss is overwritten by the next one."""
        if not self.reason:
            self.reason = self._obstacle(inputs)
        if self.reason:
            if self.calls == 0 or self.graph is not None:
                logger.info("training steps are not captured: %s", self.reason)
            self.calls, self.graph = self.calls + 1, None
            return self.step(*inputs)
        self.calls += 1
        if self.calls <= WARM_UP:
            return self._beside(inputs)
        if self.graph is None and not self._capture(inputs):
            return self.step(*inputs)
        assert self.graph is not None
        assert self.loss is not None
        for mine, given in zip(self.inputs, inputs, strict=True):
            mine.copy_(given, non_blocking=True)
        self.graph.replay()
        return self.loss

    def _obstacle(self, inputs: tuple[Tensor, ...]) -> str:
        if inputs[0].device.type != "cuda":
            return f"tensors are on {inputs[0].device}"
        if self.inputs and [t.shape for t in inputs] != [t.shape for t in self.inputs]:
            then, now = self.inputs[0].shape, inputs[0].shape
            return f"the first tensor's shape changed from {then} to {now}"
        return ""

    def _beside(self, inputs: tuple[Tensor, ...]) -> Tensor:
        """A step on a stream of its own, as torch asks for before a capture."""
        stream = self.stream = self.stream or torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            loss = self.step(*inputs)
        torch.cuda.current_stream().wait_stream(stream)
        return loss

    def _capture(self, inputs: tuple[Tensor, ...]) -> bool:
        """Record a step, which does not run it."""
        self.inputs = [t.clone() for t in inputs]
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads, as NCCL's watchdog, may ask the GPU for its state meanwhile.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self.loss = self.step(*self.inputs)
        except Exception as error:  # torch and its libraries refuse in many ways
            torch.cuda.synchronize()
            self.reason = f"{type(error).__name__}: {error}"
            logger.warning("training steps are not captured: %s", self.reason)
            return False
        self.graph = graph
        return True


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of all parameters; where it is a tensor, as a captured step reads it, within it."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def capturable(optimizer: torch.optim.Optimizer) -> None:
    """Make an AdamW on a GPU read its learning rate where a captured step finds it."""
    for group in optimizer.param_groups:
        place = group["params"][0].device
        group["lr"] = torch.as_tensor(group["lr"], dtype=torch.float32).to(place).clone()
        group["capturable"] = True
