"""fxzero: ZeRO-3 training whose every communication is scheduled at compile time.

zero = fxzero.compile(model, optimizer=optimizer)
loss = zero(**batch).loss
loss.backward()
"""

import importlib
import importlib.util
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fxzero.api import Schedule, ZeroModule, compile
    from fxzero.checkpoints import async_save, export, load, load_pretrained, save
    from fxzero.comm.rendezvous import init_process_group
    from fxzero.commands.verification import verify
    from fxzero.cost.model import Cluster, Device, Link
    from fxzero.errors import (
        CaptureError,
        CheckpointError,
        CommunicationError,
        DifferentNumbersError,
        FxzeroError,
        InputMismatchError,
        IslandError,
        MissingExtraError,
        OptimizerError,
        PlanError,
        RankMismatchError,
        ScheduleError,
        StaleBackwardError,
        StepLeftOutError,
    )
    from fxzero.host.allocator import keep_freed_memory
    from fxzero.optimizers.classes import whole_matrices

__version__ = "0.1.0"

__all__ = [
    "CaptureError",
    "CheckpointError",
    "Cluster",
    "CommunicationError",
    "Device",
    "DifferentNumbersError",
    "FxzeroError",
    "InputMismatchError",
    "IslandError",
    "Link",
    "MissingExtraError",
    "OptimizerError",
    "PlanError",
    "RankMismatchError",
    "Schedule",
    "ScheduleError",
    "StaleBackwardError",
    "StepLeftOutError",
    "ZeroModule",
    "async_save",
    "compile",
    "export",
    "init_process_group",
    "keep_freed_memory",
    "load",
    "load_pretrained",
    "save",
    "verify",
    "whole_matrices",
]

_MODULE_OF = {
    "Cluster": "fxzero.cost.model",
    "Device": "fxzero.cost.model",
    "Link": "fxzero.cost.model",
    "Schedule": "fxzero.api",
    "ZeroModule": "fxzero.api",
    "async_save": "fxzero.checkpoints",
    "compile": "fxzero.api",
    "export": "fxzero.checkpoints",
    "init_process_group": "fxzero.comm.rendezvous",
    "keep_freed_memory": "fxzero.host.allocator",
    "load": "fxzero.checkpoints",
    "load_pretrained": "fxzero.checkpoints",
    "save": "fxzero.checkpoints",
    "verify": "fxzero.commands.verification",
    "whole_matrices": "fxzero.optimizers.classes",
}
"""Maps names in `__all__` to their modules; the others are errors."""


def __getattr__(name: str) -> Any:
    """A public name, or a module of the package, which is imported when it is asked for."""
    module = _MODULE_OF.get(name, "fxzero.errors") if name in __all__ else f"fxzero.{name}"
    if name.startswith("_") or importlib.util.find_spec(module) is None:
        raise AttributeError(f"module 'fxzero' has no attribute {name!r}")
    found = importlib.import_module(module)
    globals()[name] = getattr(found, name) if name in __all__ else found
    return globals()[name]


if "torch" in sys.modules:  # else later, so that the command line can say a word before it imports torch
    for _name in __all__:
        __getattr__(_name)
