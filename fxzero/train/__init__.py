"""`fxzero train`: trains a reference model on real text, from the command line.

corpus -> tokenizer -> text (shared by rank 0) -> batches -> loop -> report, export
options says what is asked for; command is the command line. The ranks are those of `fxzero.commands`.
"""

from __future__ import annotations

from fxzero.train.models import load

__all__ = ["load"]
