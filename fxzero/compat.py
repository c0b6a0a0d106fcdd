"""Every private torch symbol that fxzero uses, in one place, with the versions it was seen in."""

from __future__ import annotations

from typing import Any

import torch


def direct_call(op: Any) -> Any:
    """The builtin behind an operator overload: one Python call instead of two. `OpOverload._op`: 2.11 to 2.13."""
    return getattr(op, "_op", op)
