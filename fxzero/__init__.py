"""fxzero: ZeRO-3 training whose every communication is scheduled at compile time.

zero = fxzero.compile(model, optimizer=optimizer)
loss = zero(**batch).loss
loss.backward()
"""

from fxzero.api import Schedule, ZeroModule, compile
from fxzero.cost.model import Cluster, Device, Link
from fxzero.errors import (
    CaptureError,
    CheckpointError,
    CommunicationError,
    FxzeroError,
    InputMismatchError,
    MissingExtraError,
    OptimizerError,
    PlanError,
    RankMismatchError,
    ScheduleError,
    StaleBackwardError,
    StepLeftOutError,
)
from fxzero.host.allocator import keep_freed_memory

__version__ = "0.1.0"

__all__ = [
    "CaptureError",
    "CheckpointError",
    "Cluster",
    "CommunicationError",
    "Device",
    "FxzeroError",
    "InputMismatchError",
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
    "compile",
    "keep_freed_memory",
]
