"""Accelerate: an `Accelerator` that runs compiled modules under autocast.

`accelerate.Accelerator` keeps a compiled module as it is, and saves and loads it. With `mixed_precision=` and several
ranks it would wrap it, which is refused: this one casts and does not wrap.
"""

from typing import Any

from torch import nn

from fxzero.api import ZeroModule
from fxzero.host.extras import require

require("fxzero.stacks.accelerate", "stacks", "accelerate")
import accelerate  # noqa: E402


class Accelerator(accelerate.Accelerator):
    """An Accelerator that takes modules of `fxzero.compile`, with the arguments and methods of Accelerate's own."""

    def prepare_model(
        self, model: nn.Module, device_placement: bool | None = None, evaluation_mode: bool = False
    ) -> Any:
        """Prepare a model as Accelerate does; a compiled one gets autocast at most."""
        return super().prepare_model(model, device_placement, evaluation_mode or isinstance(model, ZeroModule))
