"""Slow forms of what fxzero does, to measure against; nothing else imports them but the options."""

from __future__ import annotations
