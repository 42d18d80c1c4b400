"""Trainers for unmodified nnU-Net (nnunetv2): SegResMamba by nnU-Net's own recipe, and what it is compared with.

| trainer | network |
|---|---|
| `nnUNetTrainerSegResMamba` | SegResMamba |
| `nnUNetTrainerSegResMambaNoToM` | without its ToM layers |
| `nnUNetTrainerSegResMambaConvForToM` | a 3x3x3 convolution in the place of the outer ToM layer, no inner one |
| `nnUNetTrainerOwn` | nnU-Net's own, from its plans |

Endings set size and budget: `nnUNetTrainerSegResMamba_tiny_100epochs_250iterations`. nnU-Net finds a trainer by its
name and calls the results' folder so, so each budget has a folder of its own. Without an ending it is the paper's size,
1000 epochs of 250 iterations as in nnU-Net.

What differs from nnU-Net's recipe: there is no deep supervision for SegResMamba, which has one output; torch.compile is
off for it, as most of its time is in kernels that cannot be fused further: on a GPU its passes are captured as CUDA
graphs instead (`srlib.run.captured`), the same kernels given at once; all four write their state after each epoch,
to a file that a reader sees whole, so that a training that is killed goes on where it was.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import Tensor, nn

from srlib.files import atomic_path
from srlib.net.model import FEATURES, SegResMamba
from srlib.run.captured import CapturedStep

NAME = re.compile(r"([A-Za-z]+)(?:_([a-z]+))?(?:_(\d+)epochs)?(?:_(\d+)iterations)?")


class nnUNetTrainerOwn(nnUNetTrainer):
    """nnU-Net's own network and recipe, with a budget, whose state is written after each epoch."""

    budget: tuple[str | None, str | None] = (None, None)  # epochs, iterations of an epoch
    deep_supervision = True

    def __init__(  # nnU-Net reads these names
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),  # noqa: B008
    ) -> None:
        super().__init__(plans, configuration, fold, dataset_json, device)
        epochs, iterations = self.budget
        if epochs:
            self.num_epochs = int(epochs)
        if iterations:
            self.num_iterations_per_epoch = int(iterations)
            self.num_val_iterations_per_epoch = max(1, int(iterations) // 5)
        self.save_every = 1
        self.enable_deep_supervision &= self.deep_supervision

    def save_checkpoint(self, filename: str) -> None:
        """Write the state, so that a reader sees the old file or the new one."""
        if self.local_rank != 0 or self.disable_checkpointing:
            super().save_checkpoint(filename)
            return
        with atomic_path(Path(filename)) as temporary:
            super().save_checkpoint(str(temporary))


class nnUNetTrainerSegResMamba(nnUNetTrainerOwn):
    """SegResMamba by nnU-Net's recipe, without deep supervision."""

    deep_supervision = False
    tom = "both"
    size = "paper"
    network: Any  # in a validation step, its captured forward pass

    @classmethod
    def build_network_architecture(
        cls,
        plans_manager: Any,
        configuration_manager: Any,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = False,
    ) -> nn.Module:
        """SegResMamba for the plans' channels and classes.

        Raises:
            ValueError: a configuration of two dimensions.
        """
        patch = configuration_manager.patch_size
        if len(patch) != 3:
            raise ValueError(
                f"patches of {patch} voxels; expected a 3D configuration, as 3d_fullres"
            )
        channels = num_input_channels, num_output_channels
        return SegResMamba(*channels, FEATURES[cls.size], tom=cls.tom)

    def initialize(self) -> None:
        """As nnU-Net's; capture what is launched kernel by kernel."""
        super().initialize()
        refusal = "several GPUs" if self.is_ddp else ""
        if self.label_manager.has_ignore_label:
            refusal = "the loss waits for the GPU where a label is ignored"
        self.passes = CapturedStep(self._passes, refusal)
        self.outputs = CapturedStep(self.network, refusal)

    def _passes(self, data: Tensor, target: Tensor) -> Tensor:
        """Both passes of a training step: leaves the scaled gradients, returns the loss."""
        # New gradients, as in nnU-Net; a graph's own stay where they are, and each replay writes them anew.
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, enabled=self.device.type == "cuda"):
            loss = self.loss(self.network(data), target)
        scaled = loss if self.grad_scaler is None else self.grad_scaler.scale(loss)
        scaled.backward()
        return loss.detach()

    def train_step(self, batch: dict) -> dict:
        """As nnU-Net's, with both passes captured; the optimizer's step asks the GPU for infinities and is not."""
        data, target = (batch[key].to(self.device, non_blocking=True) for key in ("data", "target"))
        loss, scaler = self.passes(data, target), self.grad_scaler
        if scaler is not None:
            scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.network.parameters(), 12)
        if scaler is None:
            self.optimizer.step()
        else:
            scaler.step(self.optimizer)
            scaler.update()
        return {"loss": loss.cpu().numpy()}

    def validation_step(self, batch: dict) -> dict:
        """nnU-Net's, with the forward pass captured."""
        network, self.network = self.network, self.outputs
        try:
            return super().validation_step(batch)
        finally:
            self.network = network

    def set_deep_supervision_enabled(self, enabled: bool) -> None:
        """Do nothing: the network has one output."""

    def _do_i_compile(self) -> bool:
        return False


class nnUNetTrainerSegResMambaNoToM(nnUNetTrainerSegResMamba):
    """SegResMamba without its ToM layers."""

    tom = "none"


class nnUNetTrainerSegResMambaConvForToM(nnUNetTrainerSegResMamba):
    """SegResMamba with a convolution for its outer ToM layer."""

    tom = "conv"


TRAINERS = {
    trainer.__name__: trainer
    for trainer in (
        nnUNetTrainerOwn,
        nnUNetTrainerSegResMamba,
        nnUNetTrainerSegResMambaNoToM,
        nnUNetTrainerSegResMambaConvForToM,
    )
}


def __getattr__(name: str) -> type:
    """A trainer of a size and budget, by its name."""
    found = NAME.fullmatch(name)
    trainer = TRAINERS.get(found[1]) if found else None
    sizes = FEATURES if trainer is not nnUNetTrainerOwn else ()
    if not found or trainer is None or (found[2] and found[2] not in sizes):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    settings: dict[str, Any] = {"budget": (found[3], found[4]), "__doc__": trainer.__doc__}
    if found[2]:
        settings["size"] = found[2]
    return type(name, (trainer,), settings)
