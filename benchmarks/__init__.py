"""What backs every claim of speed and memory; see README.md."""

from __future__ import annotations
