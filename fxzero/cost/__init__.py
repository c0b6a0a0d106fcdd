"""Seconds: of operators and collectives, of a whole step, the least that a step can take, and what to choose by them."""

from __future__ import annotations
