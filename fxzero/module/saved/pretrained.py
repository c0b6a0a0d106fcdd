"""Weights of safetensors files straight into shards: every rank reads the bytes that it keeps."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fxzero import torch_internals
from fxzero.checkpoint.safetensors import StoredTensor, stored_tensors
from fxzero.comm import agree
from fxzero.errors import CheckpointError
from fxzero.graph.layout import ParamSpec, Slice
from fxzero.module.first_fill import fix_layout_without_trace
from fxzero.module.registered_tensors import entries
from fxzero.module.saved.parts import TOPIC, buffers, refuse_ignored
from fxzero.module.sharded_model import ShardedModel

logger = logging.getLogger(__name__)


def load_pretrained(sharded: ShardedModel, path: Path, *, strict: bool) -> Any:
    """See `fxzero.load_pretrained`; a collective."""
    refuse_ignored(sharded, "fxzero.load_pretrained", "zero.load_state_dict(...)")
    with sharded.phases.phase("load_pretrained"):
        with agree.reporting_failure(sharded.group, TOPIC):
            given, unexpected = _by_canonical_name(sharded, stored_tensors(path))
            missing = [fqn for fqn in [*sharded.params, *buffers(sharded)] if fqn not in given]
            if strict and (missing or unexpected):
                raise CheckpointError(
                    f"{path} does not fit the model: missing {missing[:5] or 'nothing'}, unexpected "
                    f"{unexpected[:5] or 'nothing'}. Pass strict=False to load what fits."
                )
            _check_shapes(sharded, given)
        lines = [f"{fqn} {tensor.shape} of {tensor.path.name}" for fqn, tensor in sorted(given.items())]
        agree.agree(sharded.group, TOPIC, lines, timeout=sharded.timeout)
        fix_layout_without_trace(sharded, loaded=given.keys())
        shards = sharded.held_shards()
        with torch.no_grad():
            for fqn, param in sharded.params.items():
                if fqn in given:
                    shard = shards[id(param)]
                    param.copy_(_read(given[fqn], shard.spec, shard.part).view(param.shape))
            for fqn, buffer in buffers(sharded).items():
                if fqn in given:
                    buffer.copy_(given[fqn].read().view(buffer.shape))
    if missing or unexpected:
        logger.info("%s: missing %s, unexpected %s", path, missing or "nothing", unexpected or "nothing")
    return torch_internals.incompatible_keys(missing, unexpected)


def _read(stored: StoredTensor, spec: ParamSpec, part: Slice) -> Tensor:
    """This rank's slice of a parameter: all of it is read where tensor parallelism cuts it."""
    if not spec.is_cut:
        return stored.read(part.start, part.stop)
    return spec.local_of(stored.read().view(spec.whole_shape)).reshape(-1)[part.start : part.stop]


def _by_canonical_name(
    sharded: ShardedModel, stored: Mapping[str, StoredTensor]
) -> tuple[dict[str, StoredTensor], list[str]]:
    """The tensors that the model has, and the names of others.

    Names may lack the prefix of a library's base model, or have it, as in files of a model with another head. Layers
    that peft has wrapped are found under their names before.
    """
    saved = {*sharded.params, *buffers(sharded)}
    names = {slot.fqn: entry.fqn for entry in entries(sharded.model) if entry.fqn in saved for slot in entry.slots}
    names = {_before_peft(name): fqn for name, fqn in names.items()} | names
    prefix = f"{getattr(sharded.model, 'base_model_prefix', '')}."
    given: dict[str, StoredTensor] = {}
    unexpected: list[str] = []
    for name, tensor in stored.items():
        tried = (name, f"{prefix}{name}", name.removeprefix(prefix))
        found = next((names[each] for each in tried if each in names), None)
        if found is None:
            unexpected.append(name)
        else:
            given[found] = tensor
    return given, unexpected


def _before_peft(name: str) -> str:
    return name.replace(".base_layer.", ".").removeprefix("base_model.model.")


def _check_shapes(sharded: ShardedModel, given: Mapping[str, StoredTensor]) -> None:
    shapes = {fqn: spec.whole_shape for fqn, spec in sharded.specs.items()}
    shapes |= {fqn: tuple(buffer.shape) for fqn, buffer in buffers(sharded).items()}
    for fqn, tensor in given.items():
        if tensor.shape != shapes[fqn]:
            raise CheckpointError(f"{fqn} is {tensor.shape} in {tensor.path} and {shapes[fqn]} in the model.")
