"""The Hugging Face Trainer: one that compiles its model, with all else as in `transformers.Trainer`.

The Trainer gets the plain model, and reads its signature, config and class. It compiles the model where another one
would wrap it. `ZeroTrainerMixin` does so for subclasses of the Trainer: `class Mine(ZeroTrainerMixin, SFTTrainer)`.

what is saved              by all ranks             file
`save_model`, the weights  gathered on rank 0       as `save_pretrained` writes them, adapters alone for a PEFT model
a checkpoint adds          slices of each rank      `checkpoint-10/fxzero`, as `fxzero.save` writes it
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fxzero
from fxzero.host.extras import require
from fxzero.module.registered_tensors import standing_in

require("fxzero.stacks.transformers", "hf", "transformers")
require("fxzero.stacks.transformers", "stacks", "accelerate")
import transformers  # noqa: E402

SLICES = "fxzero"
"""Folder in a checkpoint of the Trainer with the slices of each rank."""


class ZeroTrainerMixin:
    """Compiles the model of a Trainer, and saves and loads it; put it before the Trainer among the bases.

    Args:
        args: as for the Trainer.
        compile_options: keyword arguments of `fxzero.compile`.
        kwargs: as for the Trainer.

    Raises:
        ValueError: the arguments ask for FSDP or DeepSpeed as well.
    """

    zero: fxzero.ZeroModule | None = None
    """The compiled model: there from the first `train()` or `evaluate()` on."""
    _weights_to_load: str | None = None
    """A checkpoint of another Trainer, whose weights the compiled model is about to get."""

    def __init__(self, *args: Any, compile_options: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        self.compile_options = dict(compile_options or {})
        super().__init__(*args, **kwargs)
        trainer: Any = self
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            raise ValueError("fsdp= and deepspeed= of the arguments shard the model as fxzero does. Leave them out.")
        if isinstance(trainer.model, fxzero.ZeroModule):
            raise ValueError("The Trainer compiles its model: pass the plain one, and compile_options=.")

    def compile_model(self, model: nn.Module, optimizer: torch.optim.Optimizer | None) -> fxzero.ZeroModule:
        """Compile the model; override it to do more, such as `fxzero.load_pretrained`.

        Args:
            model: the plain model.
            optimizer: that of the training; None where evaluation comes first.
        """
        trainer: Any = self
        placed = {"device": trainer.args.device} if is_on_meta(model) else {}
        return fxzero.compile(model, optimizer=optimizer, **(placed | self.compile_options))

    # -- what the Trainer calls ----------------------------------------------------------------------------------

    def _wrap_model(self, model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        trainer: Any = self
        if self.zero is None or self.zero._fxzero_model is not trainer.model:  # model_init= makes new ones
            self._num_counted = num_counted(trainer.model)
            self.zero = self.compile_model(trainer.model, unwrapped(trainer.optimizer))
            trainer.accelerator.prepare_model(self.zero, evaluation_mode=True)
        return self.zero

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        if not is_on_meta(model):
            super()._move_model_to_device(model, device)  # type: ignore[misc]

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Operations of a batch, from the sizes of whole parameters."""
        counted = super().floating_point_ops(inputs)  # type: ignore[misc]
        local = 0 if self.zero is None else num_counted(self.zero._fxzero_model)
        return counted // local * self._num_counted if local else counted

    # -- saving and loading --------------------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model as `save_pretrained` does, with config and tokenizer; all ranks call it."""
        trainer: Any = self
        if self.zero is None:
            super().save_model(output_dir, _internal_call)  # type: ignore[misc]
            return
        weights = self.zero.state_dict(rank0_only=not trainer.args.save_on_each_node)
        if trainer.args.should_save:
            with standing_in(self.zero._fxzero_model, weights):  # peft asks modules for more than their names
                trainer._save(output_dir, state_dict=weights)
        if trainer.args.push_to_hub and not _internal_call:
            trainer.push_to_hub(commit_message="Model save", revision=trainer.args.hub_revision)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        trainer: Any = self
        assert self.zero is not None
        fxzero.save(Path(output_dir) / SLICES, self.zero, unwrapped(trainer.optimizer), keep=1)
        if trainer.args.should_save:
            torch.save(trainer.lr_scheduler.state_dict(), os.path.join(output_dir, "scheduler.pt"))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        trainer: Any = self
        if has_slices(resume_from_checkpoint):  # they are loaded with the optimizer
            return
        if self.zero is not None or is_on_meta(trainer.model):
            self._weights_to_load = resume_from_checkpoint  # once the model is compiled
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        trainer: Any = self
        if self._weights_to_load is not None:
            assert self.zero is not None
            fxzero.load_pretrained(self.zero, self._weights_to_load)
            self._weights_to_load = None
        if checkpoint is None or not has_slices(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
            return
        assert self.zero is not None
        fxzero.load(Path(checkpoint) / SLICES, self.zero, unwrapped(trainer.optimizer))
        state = torch.load(os.path.join(checkpoint, "scheduler.pt"), weights_only=True)
        trainer.lr_scheduler.load_state_dict(state)

    def _load_best_model(self) -> None:
        trainer: Any = self
        best = trainer.state.best_model_checkpoint
        if self.zero is None:
            super()._load_best_model()  # type: ignore[misc]
        elif has_slices(best):
            fxzero.load(Path(best) / SLICES, self.zero)
        else:
            fxzero.load_pretrained(self.zero, best, strict=False)


class Trainer(ZeroTrainerMixin, transformers.Trainer):
    """`transformers.Trainer` on a compiled model; takes `compile_options=` beside its arguments."""


def is_on_meta(model: nn.Module) -> bool:
    """True if parameters of a model have no values yet."""
    return any(param.is_meta for param in model.parameters())


def unwrapped(optimizer: Any) -> Any:
    """The user's optimizer in that of Accelerate."""
    return getattr(optimizer, "optimizer", optimizer)


def has_slices(checkpoint: str) -> bool:
    """True if a checkpoint of the Trainer has the slices of a compiled model."""
    return (Path(checkpoint) / SLICES).is_dir()


def num_counted(model: Any) -> int:
    """Elements of a model that the Trainer counts operations by; of a compiled one those of this rank."""
    return model.num_parameters(exclude_embeddings=True) if hasattr(model, "num_parameters") else 0
