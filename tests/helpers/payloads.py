"""Payloads of two parameters, values for them, and a reduction with exactly the scratch that it asks for."""

from typing import Any

import torch

from fxzero.comm.base import Comm
from fxzero.graph.layout import Bucket, ParamSpec, Payload


def make_payload(num_ranks: int, dtype: torch.dtype = torch.float32, name: str = "w", numel: int = 1001) -> Payload:
    params = (ParamSpec(f"{name}.first", (numel,), dtype, True), ParamSpec(f"{name}.last", (7, 3), dtype, True))
    return Bucket(params, num_ranks).gradients


def one_payload(num_ranks: int, *shape: int, name: str = "w") -> Payload:
    """That of a bucket of one parameter."""
    return Bucket((ParamSpec(name, shape, torch.float32, True),), num_ranks).gradients


def values(payload: Payload, seed: int) -> torch.Tensor:
    """Random values that every rank can make for every rank."""
    return torch.randn(payload.numel, generator=torch.Generator().manual_seed(seed)).to(payload.dtype)


def call(function: Any) -> None:
    if function is not None:
        function()


def poisoned(numel: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.full((numel,), float("nan"), dtype=dtype)


def reduced(comm: Comm, payload: Payload, full: torch.Tensor, shard: torch.Tensor, *, accumulate: bool) -> torch.Tensor:
    """Reduce with exactly the scratch that was asked for."""
    needed = comm.reduce_scratch_numel(payload, accumulate=accumulate)
    scratch = poisoned(needed, payload.dtype) if needed else None
    start, wait = comm.bind_reduce(payload, full, scratch, shard, accumulate=accumulate)
    call(start)
    call(wait)
    comm.drain()
    return shard
