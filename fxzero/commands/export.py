"""The command line of `fxzero export`: a checkpoint of `fxzero.save` as plain safetensors files."""

import argparse
from pathlib import Path

import torch

from fxzero.checkpoints import export
from fxzero.commands.errors import CommandError, report
from fxzero.errors import CheckpointError

HELP = "write the weights of a checkpoint as safetensors, for plain PyTorch and transformers"
_DESCRIPTION = """\
Writes the weights of a checkpoint that fxzero.save made, tensor by tensor, in one process.

  fxzero export run model.safetensors           the newest checkpoint in run/, as one file
  fxzero export run/000003 hf --config base     a folder for from_pretrained, with configuration and tokenizer of base
"""
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.description = _DESCRIPTION
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("checkpoint", type=Path, metavar="DIR", help="a checkpoint; of a folder or a run the newest")
    parser.add_argument("target", type=Path, metavar="TARGET", help="a file NAME.safetensors, or a folder")
    parser.add_argument("--max-shard-size", metavar="SIZE", help="several files of at most this size, such as 5GB")
    parser.add_argument("--config", type=Path, metavar="DIR", help="copy all but weights from this folder of a model")
    parser.add_argument("--dtype", choices=_DTYPES, help="cast the weights")


def run(arguments: argparse.Namespace) -> int:
    """Write the files; returns the exit status."""
    try:
        return _run(arguments)
    except (CheckpointError, ValueError) as error:
        return report("export", CommandError(str(error)))
    except OSError as error:
        where = error.filename or arguments.target
        return report("export", CommandError(f"{where} cannot be written or read: {error.strerror}."))


def _run(arguments: argparse.Namespace) -> int:
    target = export(
        arguments.checkpoint,
        arguments.target,
        max_shard_size=arguments.max_shard_size,
        config=arguments.config,
        dtype=None if arguments.dtype is None else _DTYPES[arguments.dtype],
    )
    print(f"fxzero export: wrote {target}", flush=True)
    return 0
