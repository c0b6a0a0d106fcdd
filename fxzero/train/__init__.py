"""`fxzero train`: trains a reference model on real text, from the command line.

corpus -> text (tokens, sent by rank 0) -> batches -> loop -> report, export
job.py runs all of it on one rank, as options.py asks; command.py is the command line. `fxzero.commands` starts ranks.
"""

from fxzero.train.models import load

__all__ = ["load"]
