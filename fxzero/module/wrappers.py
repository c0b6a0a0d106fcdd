"""Refuse other data parallelism around a compiled module: it would take this rank's shards for whole weights.

DistributedDataParallel and the like register the module that they wrap before they touch its weights; a hook of
nn.Module sees that. `fully_shard` looks into a registry of the module first, and FSDP skips what is not composable.
"""

import functools
import sys
from typing import Any, NoReturn

import torch.distributed as dist
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from fxzero import torch_internals
from fxzero.errors import FxzeroError, InputMismatchError

_WRAPPERS = frozenset({"DistributedDataParallel", "DataParallel", "FullyShardedDataParallel"})
"""Names of the modules that train a copy, or a shard of their own, of the module in them."""


class _Composed(dict[str, object]):
    """The registry of a compiled module: no parallelism can be added, and those around the module skip it."""

    def __contains__(self, name: object) -> bool:
        if name in ("replicate", "FullyShardedDataParallel"):
            return True
        _refuse(str(name))


def _refuse(wrapper: str) -> NoReturn:
    raise FxzeroError(
        f"{wrapper} around a module of fxzero.compile would take this rank's shards for whole weights. The compiled "
        "module averages gradients and shards by itself: train it without a wrapper. Where Accelerate with "
        "mixed_precision=, the Trainer or Lightning adds one, take their form in fxzero.stacks (docs/migrating.md)."
    )


def refuse_wrappers(model: nn.Module) -> None:
    """Refuse to wrap a module, or a part of it, from now on."""
    _install_hook()
    for module in model.modules():
        module.__dict__[torch_internals.COMPOSED] = _Composed()


def allow_wrappers(model: nn.Module) -> None:
    """Undo `refuse_wrappers`."""
    for module in model.modules():
        module.__dict__.pop(torch_internals.COMPOSED, None)


@functools.cache
def _install_hook() -> None:
    """One hook serves all models, and is never removed."""
    register_module_module_registration_hook(_on_registration)


def _on_registration(module: nn.Module, name: str, submodule: Any) -> None:
    if type(module).__name__ == "OptimizedModule" and isinstance(submodule, nn.Module) and _is_refusing(submodule):
        raise FxzeroError(
            "torch.compile of a module of fxzero.compile would trace its schedule, which runs as it is. Call the "
            "module without torch.compile."
        )
    found = _WRAPPERS.intersection(cls.__name__ for cls in type(module).__mro__)
    if found and isinstance(submodule, nn.Module) and any(map(_is_refusing, submodule.modules())):
        _refuse(*found)


def is_kept_by_accelerate() -> bool:
    """True if `accelerator.prepare` may keep a compiled module as it is; it would not run it under autocast then.

    Raises:
        InputMismatchError: Accelerate does not know of all ranks.
    """
    state: Any = sys.modules.get("accelerate.state")
    if state is None or not state.is_initialized():
        return True
    shared = state.AcceleratorState()  # one for all accelerators of a process
    num_ranks = dist.get_world_size() if dist.is_initialized() else 1
    if num_ranks != shared.num_processes:
        raise InputMismatchError(
            f"torch.distributed has {num_ranks} ranks, and the Accelerator {shared.num_processes}: all ranks would "
            "train with the same data. Start the script by `accelerate launch` or torchrun."
        )
    return shared.mixed_precision == "no"


def _is_refusing(module: nn.Module) -> bool:
    return isinstance(module.__dict__.get(torch_internals.COMPOSED), _Composed)
