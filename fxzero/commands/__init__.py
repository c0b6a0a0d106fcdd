"""The commands of `fxzero` beside `train`."""

from __future__ import annotations
