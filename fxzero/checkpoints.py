"""Weights and optimizers of a compiled model in files: `fxzero.save`, `load`, `load_pretrained` and `export`."""

import os
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import closing
from pathlib import Path
from typing import Any, TypeAlias

import torch

from fxzero.api import ZeroModule
from fxzero.checkpoint import export as exporting
from fxzero.checkpoint.files import Saved, newest
from fxzero.errors import CheckpointError
from fxzero.module.saved import load as loading
from fxzero.module.saved import pretrained
from fxzero.module.saved import save as saving

Optimizers: TypeAlias = torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None


def save(
    folder: str | os.PathLike[str],
    zero: ZeroModule,
    optimizer: Optimizers = None,
    *,
    extra: Any = None,
    keep: int | None = None,
) -> Path:
    """Save weights, optimizer state, random states and the layout as the newest checkpoint of a folder; a collective.

    Every rank writes its own slices, and no rank holds a full tensor. The checkpoint appears under its number when all
    of it is on the disk, so that a crash at any point leaves those before. The folder must be one that all ranks see.
    Gradients are not saved.

    Args:
        folder: gets a folder for each checkpoint: `000001`, `000002`, ...
        zero: what `fxzero.compile` returned.
        optimizer: the optimizer or optimizers of its parameters.
        extra: what else the training needs to go on (the state dict of a scheduler, the number of the step), of each
            rank: numbers, texts, None, bytes, tensors, and lists, tuples and dicts of them.
        keep: remove all but this many of the newest checkpoints afterwards.

    Returns:
        The folder of the checkpoint.

    Raises:
        CheckpointError: something is of a type that a checkpoint cannot have.
        OSError: a file cannot be written, on this rank; a RankMismatchError names it on the others.
        ValueError: keep is less than 1.
    """
    _check_keep(keep)
    return saving.save(zero._fxzero_engine, Path(folder), _as_tuple(optimizer), extra, keep)


def async_save(
    folder: str | os.PathLike[str],
    zero: ZeroModule,
    optimizer: Optimizers = None,
    *,
    extra: Any = None,
    keep: int | None = None,
) -> Future[Path]:
    """Save as `save` does, but in a thread: training goes on as soon as everything is copied; a collective.

    The copy takes as much memory of the host as this rank's slices, until it is written. A checkpoint that is still
    being written is waited for by the next save or load of the model, and by the end of the process. A failure, such as
    a full disk, is raised by the result; where nobody asks for it, the next save logs a warning and goes on.

    Args: as of `save`.

    Returns:
        The result, `.result()`, is the folder of the checkpoint, on all ranks once it is complete.

    Raises:
        CheckpointError, ValueError: as from `save`.
    """
    _check_keep(keep)
    return saving.async_save(zero._fxzero_engine, Path(folder), _as_tuple(optimizer), extra, keep)


def load(folder: str | os.PathLike[str], zero: ZeroModule, optimizer: Optimizers = None) -> Any:
    """Load a checkpoint of `save` at any number of ranks; a collective.

    Nothing changes in the model where a file is missing or damaged. If the layout is not fixed yet (no `example=`, no
    call before), it becomes that of the checkpoint: at the same number of ranks training then goes on bit for bit as in
    the run that saved, with its random states. Else slices are cut anew, and training goes on within rounding.

    Args:
        folder: the checkpoint, or a folder of checkpoints, of which the newest is meant.
        zero: what `fxzero.compile` returned, of the same model; it may be on the meta device.
        optimizer: the optimizers of the run that saved, in its order, with the same groups; None leaves state alone.

    Returns:
        What was saved as `extra` by the rank of the same number; at another number of ranks, by rank 0.

    Raises:
        CheckpointError: there is none, a file is damaged (it is named), or it does not fit the model or the optimizer.
    """
    saving.wait_for_pending(zero._fxzero_engine)
    return loading.load(zero._fxzero_engine, Path(folder), _as_tuple(optimizer))


def load_pretrained(zero: ZeroModule, folder: str | os.PathLike[str], *, strict: bool = True) -> Any:
    """Load safetensors files, as Hugging Face's `save_pretrained` writes them, straight into shards; a collective.

    Every rank reads the bytes of its own slices; no rank holds a full parameter. The model is best made on the meta
    device: `with torch.device("meta"): model = AutoModel.from_config(config)`.

    Args:
        zero: what `fxzero.compile` returned.
        folder: a folder with one file or several, or a single file. Names are those of the model; the prefix of the
            base model may be there or not.
        strict: raise if a name is missing or unexpected. False loads those that fit; parameters of a model on meta that
            are missing are initialised.

    Returns:
        The missing and the unexpected names, as `nn.Module.load_state_dict` returns them.

    Raises:
        CheckpointError: names or shapes do not fit, or a file is truncated or no safetensors file.
    """
    return pretrained.load_pretrained(zero._fxzero_engine.sharded, Path(folder), strict=strict)


def export(
    folder: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    max_shard_size: int | str | None = None,
    config: str | os.PathLike[str] | None = None,
    dtype: torch.dtype | None = None,
) -> Path:
    """Write the weights of a checkpoint of `save` as plain safetensors files, in one process without ranks.

    Tensor by tensor, so that no more than one is in memory. Names are those of the model. A tied parameter is stored
    once; the header of each file names the others, as safetensors' `load_model` expects.

    Args:
        folder: the checkpoint, or a folder of checkpoints, of which the newest is meant.
        target: a file that ends in `.safetensors`, or a folder for `model.safetensors`.
        max_shard_size: the size that a file may have, in bytes or as "5GB"; larger weights become several files and an
            index. Default: one file.
        config: a folder of Hugging Face with the configuration of the model, say that from which it was loaded. All
            files in it but weights are copied beside, so that `from_pretrained` loads what was written.
        dtype: cast floating-point tensors. Default: the dtypes of the shards.

    Returns:
        The target.

    Raises:
        CheckpointError: there is no checkpoint, a file of it is damaged, or the configuration does not fit.
        OSError: a file cannot be written; those of an earlier export are as they were.
        ValueError: max_shard_size is no size, or dtype no floating-point one.
    """
    source, max_bytes = newest(Path(folder)), exporting.parse_size(max_shard_size)
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"dtype is {dtype}; weights can be cast to floating-point dtypes.")
    if source is None:
        raise CheckpointError(f"There is no checkpoint in {folder}.")
    with closing(Saved(source)) as saved:
        beside = None if config is None else Path(config)
        exporting.export(saved, Path(target), max_bytes=max_bytes, config=beside, dtype=dtype)
    return Path(target)


def _check_keep(keep: int | None) -> None:
    if keep is not None and keep < 1:
        raise ValueError(f"keep is {keep}; at least one checkpoint must be kept.")


def _as_tuple(optimizer: Optimizers) -> tuple[torch.optim.Optimizer, ...]:
    if optimizer is None:
        return ()
    return tuple(optimizer) if isinstance(optimizer, Sequence) else (optimizer,)
