"""`fxzero train`: trains a reference model on real text, from the command line.

corpus -> tokenizer -> text (shared by rank 0) -> batches -> loop -> report, export
options, world and launch say what is asked for and which ranks there are; command is the command line.
"""

from __future__ import annotations

from fxzero.train.models import load

__all__ = ["load"]
