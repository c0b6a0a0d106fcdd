"""Weights of a compiled model as Hugging Face's `save_pretrained` leaves them: rank 0 writes what is gathered."""

import itertools
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fxzero.checkpoint.export import files_beside, save_weights
from fxzero.comm import agree
from fxzero.module.first_fill import fix_layout_without_trace
from fxzero.module.registered_tensors import standing_in
from fxzero.module.saved.parts import TOPIC, buffers, further_names, position, refuse_ignored
from fxzero.module.sharded_model import ShardedModel
from fxzero.module.weights import full_copies, full_params


def is_of_transformers(model: nn.Module) -> bool:
    """True if the model's `save_pretrained` is that of transformers."""
    kind = _class_of("transformers", "PreTrainedModel")
    return kind is not None and getattr(type(model), "save_pretrained", None) is kind.save_pretrained


def has_adapters(model: nn.Module) -> bool:
    """True if `save_pretrained` of the model writes adapters of peft, and not the model."""
    kind = _class_of("peft", "PeftModel")
    is_peft = kind is not None and isinstance(model, kind)
    return is_peft or (is_of_transformers(model) and bool(getattr(model, "_hf_peft_config_loaded", False)))


def _class_of(library: str, name: str) -> Any:
    """A class of a library; None if nothing has imported the library."""
    return getattr(sys.modules.get(library), name, None)


def save_pretrained(sharded: ShardedModel, folder: Path, max_bytes: int | None, options: dict[str, Any]) -> None:
    """Write a folder for `from_pretrained`; a collective. See `ZeroModule.save_pretrained`."""
    refuse_ignored(sharded, "save_pretrained", "zero.state_dict()")
    if has_adapters(sharded.model):
        _save_adapters(sharded, folder, options)
    else:
        _save_weights(sharded, folder, max_bytes, options)


def _save_weights(sharded: ShardedModel, folder: Path, max_bytes: int | None, options: dict[str, Any]) -> None:
    model = sharded.model
    with sharded.phases.phase("save_pretrained"):
        fix_layout_without_trace(sharded)
    left_out: Collection[str] = getattr(model, "_keys_to_ignore_on_save", None) or ()
    saved = _without_values(sharded) | buffers(sharded)
    announced = {fqn: tensor for fqn, tensor in saved.items() if fqn not in left_out}
    gathered = full_params(sharded, rank0_only=True, word="weights to save")

    def write() -> None:
        if is_of_transformers(model):
            _write_beside(sharded, folder, options)
        tensors = itertools.chain(_present(gathered), buffers(sharded).items())
        wanted = ((fqn, tensor) for fqn, tensor in tensors if fqn in announced)
        save_weights(folder, announced, wanted, further_names(sharded), max_bytes)

    _on_rank0(sharded, write, gathered)


def _write_beside(sharded: ShardedModel, folder: Path, options: dict[str, Any]) -> None:
    """Let transformers write all but weights: the configuration, that of `generate`, the model's own code."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as aside:
        _call_own_method(sharded, Path(aside), {}, options)
        for path in files_beside(Path(aside)):
            path.replace(folder / path.name)


def _save_adapters(sharded: ShardedModel, folder: Path, options: dict[str, Any]) -> None:
    copies = full_copies(sharded, rank0_only=True, of=_parts_of_adapters(sharded), phase="save_pretrained")
    names = {**{fqn: fqn for fqn in copies}, **further_names(sharded)}
    state = {name: copies[fqn] for name, fqn in names.items() if fqn in copies}
    _on_rank0(sharded, lambda: _call_own_method(sharded, folder, state, options, copies), iter(()))


def _parts_of_adapters(sharded: ShardedModel) -> set[str]:
    """The parameters that peft may save: those of adapters, all that are trained, and embeddings."""
    model: Any = sharded.model
    adapters = {*model.peft_config}
    parts = {fqn for fqn in sharded.params if not adapters.isdisjoint(fqn.split("."))}
    parts |= {fqn for fqn, param in sharded.params.items() if param.requires_grad}
    embeddings = [each for each in (model.get_input_embeddings(), model.get_output_embeddings()) if each is not None]
    ids = {id(param) for each in embeddings for param in each.parameters()}
    return parts | {fqn for fqn, param in sharded.params.items() if id(param) in ids}


def _call_own_method(
    sharded: ShardedModel,
    folder: Path,
    state: dict[str, Tensor],
    options: dict[str, Any],
    copies: Mapping[str, Tensor] | None = None,
) -> None:
    """Call `save_pretrained` of the model's class, which looks at shapes and names, and saves what is in the state.

    Args:
        copies: full parameters that the method may compute with, as peft does for the embeddings of prompts.
    """
    model: Any = sharded.model
    with standing_in(model, {**_without_values(sharded), **(copies or {})}):
        model.save_pretrained(folder, state_dict=state, **options)


def _without_values(sharded: ShardedModel) -> dict[str, Tensor]:
    """The full parameters on the meta device."""
    return {fqn: torch.empty(spec.whole_shape, dtype=spec.dtype, device="meta") for fqn, spec in sharded.specs.items()}


def _present(gathered: Iterator[tuple[str, Tensor | None]]) -> Iterator[tuple[str, Tensor]]:
    return ((fqn, tensor) for fqn, tensor in gathered if tensor is not None)


def _on_rank0(
    sharded: ShardedModel, write: Callable[[], object], gathered: Iterator[tuple[str, Tensor | None]]
) -> None:
    """Let rank 0 write, while all take part in what is gathered; returns on all ranks once it is written."""
    failure: Exception | None = None
    if sharded.is_rank0 and position(sharded.group) == 0:
        try:
            write()
        except Exception as error:
            failure = error
    for _ in gathered:  # the other ranks take part in each, and so does rank 0 after a failure
        pass
    with sharded.phases.phase("save_pretrained"):
        for group in (sharded.group, *(each.mesh.get_group() for each in [*sharded.parallel.values()][:1])):
            with agree.reporting_failure(group, TOPIC):
                if failure is not None:
                    raise failure
                agree.agree(group, TOPIC, ["written"], timeout=sharded.timeout)
