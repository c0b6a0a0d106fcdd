"""Lightning: strategies of its Trainer and of Fabric that leave compiled modules unwrapped, and save them whole.

    trainer = lightning.Trainer(strategy=ZeroStrategy(), ...)
    fabric = lightning.Fabric(strategy=FabricZeroStrategy(), ...)

A LightningModule is not compiled itself, since its steps log and read the trainer: its children with parameters are,
each by itself, before `configure_optimizers`. A child that is compiled already is left as it is. Under
`accumulate_grad_batches=` each backward reduces its gradients, since Lightning runs the last one inside of the
optimizer's step, where `no_sync()` may hold nothing.
"""

import weakref
from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

import fxzero
from fxzero.errors import InputMismatchError
from fxzero.host.extras import require
from fxzero.optimizers.classes import check_optimizer
from fxzero.optimizers.guard import hook_state_dicts
from fxzero.optimizers.state_dicts import whole_state_dict

require("fxzero.stacks.lightning", "stacks", "lightning")
from lightning.fabric.strategies.ddp import DDPStrategy as FabricDDPStrategy  # noqa: E402
from lightning.pytorch.strategies.ddp import DDPStrategy  # noqa: E402
from lightning.pytorch.trainer.states import TrainerFn  # noqa: E402


def compile_children(module: nn.Module, options: Mapping[str, Any]) -> None:
    """Compile each child of a LightningModule that has parameters.

    Raises:
        InputMismatchError: a parameter is the module's own, or two children share one.
    """
    own = next((name for name, _ in module.named_parameters(recurse=False)), None)
    if own is not None:
        raise InputMismatchError(
            f"{own} is a parameter of the LightningModule itself, which is not compiled: its steps log and read the "
            "trainer. Put it into a child module that uses it in its forward."
        )
    seen: dict[int, str] = {}
    for name, child in module.named_children():
        for param in child.parameters():
            other = seen.setdefault(id(param), name)
            if other != name:
                raise InputMismatchError(
                    f"{other} and {name} share a parameter, and are compiled each by itself. Put both into one module."
                )
    for name, child in list(module.named_children()):
        if next(child.parameters(), None) is not None and not isinstance(child, fxzero.ZeroModule):
            setattr(module, name, fxzero.compile(child, **options))


class ZeroStrategy(DDPStrategy):
    """Compiles the children of a LightningModule; checkpoints have full weights and optimizer state.

    Args:
        compile_options: keyword arguments of `fxzero.compile`, for each child.
        kwargs: as for Lightning's `DDPStrategy`, such as `process_group_backend=`.
    """

    strategy_name = "fxzero"

    def __init__(self, *, compile_options: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.compile_options = dict(compile_options or {})

    def setup(self, trainer: Any) -> None:
        """Compile the children, also for an evaluation alone, then go on as DDP does."""
        assert self.model is not None and self.accelerator is not None
        self.accelerator.setup(trainer)
        if trainer.state.fn == TrainerFn.FITTING and self._layer_sync:
            self.model = self._layer_sync.apply(self.model)
        compile_children(self.model, self.compile_options)
        self.precision_plugin.convert_module(self.model)
        self.model_to_device()
        if trainer.state.fn == TrainerFn.FITTING:
            self.setup_optimizers(trainer)
            is_vouched_for = bool(self.compile_options.get("elementwise_optimizer"))
            for optimizer in self.optimizers:  # the first step begins before there are shards to check it with
                check_optimizer(optimizer, elementwise_optimizer=is_vouched_for)
                hook_state_dicts(optimizer)
        self.setup_precision_plugin()

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """True: weights go into the compiled children."""
        return True

    def teardown(self) -> None:
        """End without moving the model to the CPU, since its shards stay where they are."""
        assert self.cluster_environment is not None and self.accelerator is not None
        self.cluster_environment.teardown()
        self.precision_plugin.teardown()
        self.accelerator.teardown()
        self.checkpoint_io.teardown()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Tensor]:
        """The state of an optimizer with whole tensors; a collective."""
        return whole_state_dict(getattr(optimizer, "_optimizer", optimizer))

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load full weights into the children."""
        assert self.model is not None
        weights = dict(checkpoint["state_dict"])
        for name, child in self.model.named_children():
            if isinstance(child, fxzero.ZeroModule):
                prefix = f"{name}."
                own = [key for key in weights if key.startswith(prefix)]
                child.load_state_dict({key.removeprefix(prefix): weights.pop(key) for key in own}, strict=strict)
        unexpected = self.model.load_state_dict(weights, strict=False).unexpected_keys if weights else []
        if strict and unexpected:
            raise fxzero.CheckpointError(f"The checkpoint has {unexpected[0]}, which the LightningModule lacks.")


class _SyncControl:
    """Tells Fabric how to hold gradients back."""

    def no_backward_sync(self, module: nn.Module, enabled: bool) -> AbstractContextManager[Any]:
        return module.no_sync() if enabled and isinstance(module, fxzero.ZeroModule) else ExitStack()


class FabricZeroStrategy(FabricDDPStrategy):
    """Compiles the module of `fabric.setup`, or keeps a compiled one; checkpoints have full weights and state.

    Args:
        compile_options: keyword arguments of `fxzero.compile`.
        kwargs: as for Fabric's `DDPStrategy`, such as `process_group_backend=`.
    """

    def __init__(self, *, compile_options: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.compile_options = dict(compile_options or {})
        self._backward_sync_control: Any = _SyncControl()
        self._compiled: weakref.WeakKeyDictionary[nn.Module, fxzero.ZeroModule] = weakref.WeakKeyDictionary()
        """Compiled modules by the plain ones, which Fabric passes where it saves and loads."""

    def setup_module(self, module: nn.Module) -> Any:
        """The compiled module."""
        return self._compile(module, [])

    def setup_module_and_optimizers(
        self, module: nn.Module, optimizers: list[Optimizer], scheduler: Any = None
    ) -> tuple[Any, list[Optimizer], Any]:
        """The compiled module; state that the optimizers have is cut."""
        zero = self._compile(module, optimizers)
        for optimizer in optimizers:
            hook_state_dicts(optimizer)
        return zero, optimizers, scheduler

    def _compile(self, module: nn.Module, optimizers: list[Optimizer]) -> fxzero.ZeroModule:
        if isinstance(module, fxzero.ZeroModule):
            return module
        self._compiled[module] = fxzero.compile(module, optimizer=optimizers, **self.compile_options)
        return self._compiled[module]

    def get_module_state_dict(self, module: nn.Module) -> dict[str, Any]:
        """The full weights; a collective."""
        return self._compiled.get(module, module).state_dict()

    def load_module_state_dict(self, module: nn.Module, state_dict: dict[str, Any], strict: bool = True) -> None:
        """Load full weights."""
        self._compiled.get(module, module).load_state_dict(state_dict, strict=strict)

    def get_optimizer_state(self, optimizer: Optimizer) -> dict[str, Tensor]:
        """The state of an optimizer with whole tensors; a collective."""
        return whole_state_dict(getattr(optimizer, "optimizer", optimizer))
