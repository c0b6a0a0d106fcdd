"""Weights as the safetensors files that plain PyTorch and Hugging Face's `from_pretrained` load.

model.safetensors                          one file, or several of a bounded size:
model-00001-of-00002.safetensors
model.safetensors.index.json               which tensor lies in which of them
"""

import json
import logging
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fxzero.checkpoint.files import Saved
from fxzero.checkpoint.safetensors import give_back_room, save_streams
from fxzero.errors import CheckpointError

logger = logging.getLogger(__name__)

_SUFFIX = ".safetensors"
_UNITS = {
    "": 1,
    **{f"{name}B": 1000**power for power, name in enumerate("KMGT", 1)},
    **{f"{name}IB": 1024**power for power, name in enumerate("KMGT", 1)},
}
_OF_PEFT = re.compile(r"^base_model\.model\.|\.lora_[AB]\.|\.base_layer\.")
"""Found in names of parameters of models with adapters."""
_WEIGHTS = re.compile(r".*\.(safetensors|bin|pt|pth|ckpt|h5|msgpack|gguf|onnx)(\.index\.json)?")


def parse_size(size: int | str | None) -> int | None:
    """A number of bytes, or a text such as "5GB" (10^9 bytes each) or "5GiB" (2^30).

    Raises:
        ValueError: it is neither, or not positive.
    """
    if size is None:
        return None
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(size))
    unit = None if found is None else _UNITS.get(found[2].upper())
    if found is None or unit is None or float(found[1]) * unit < 1:
        raise ValueError(
            f"max_shard_size is {size!r}; it must be a number of bytes, or a text such as '5GB' or '5GiB'."
        )
    return int(float(found[1]) * unit)


def save_weights(
    target: Path,
    announced: Mapping[str, Tensor],
    tensors: Iterable[tuple[str, Tensor]],
    metadata: Mapping[str, str],
    max_bytes: int | None,
) -> None:
    """Write weights as they come, and remove what an earlier export under that name left.

    Args:
        target: a file, or a folder for `model.safetensors`.
        announced: tensors on the meta device, or others, with the shape and dtype of each tensor, in the order in which
            files are filled.
        tensors: as for `save_streams`.
        metadata: free text in each file.
        max_bytes: the size that a file may have, unless a single tensor is larger. None: one file.
    """
    path = target if target.suffix == _SUFFIX else target / f"model{_SUFFIX}"
    path.parent.mkdir(parents=True, exist_ok=True)
    files = _split(path, announced, max_bytes)
    try:
        save_streams(files, tensors, {"format": "pt", **metadata})
    except BaseException:
        for file in files:
            give_back_room(file)
        raise
    index = path.with_name(f"{path.name}.index.json")
    if len(files) > 1:
        total = sum(tensor.nbytes for tensor in announced.values())
        weight_map = {name: file.name for file, held in files.items() for name in held}
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2, sort_keys=True)
        index.write_text(text + "\n", encoding="utf-8")
    else:
        index.unlink(missing_ok=True)
    numbered = re.compile(re.escape(path.stem) + r"(-\d{5}-of-\d{5})?" + re.escape(_SUFFIX))
    for other in path.parent.iterdir():
        if numbered.fullmatch(other.name) and other not in files:
            other.unlink()


def files_beside(folder: Path) -> list[Path]:
    """The files of a model's folder that are no weights: configuration, tokenizer, code."""
    found = [path for path in sorted(folder.iterdir()) if path.is_file() and not path.name.startswith(".")]
    return [path for path in found if not _WEIGHTS.fullmatch(path.name)]


def _split(path: Path, announced: Mapping[str, Tensor], max_bytes: int | None) -> dict[Path, dict[str, Tensor]]:
    """What goes into each file, in order."""
    groups: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in announced.items():
        if groups[-1] and max_bytes is not None and size + tensor.nbytes > max_bytes:
            groups.append({})
            size = 0
        groups[-1][name] = tensor
        size += tensor.nbytes
    if len(groups) == 1:
        return {path: groups[0]}
    names = (f"{path.stem}-{number:05}-of-{len(groups):05}{_SUFFIX}" for number in range(1, len(groups) + 1))
    return {path.with_name(name): group for name, group in zip(names, groups, strict=True)}


# -- from a checkpoint ---------------------------------------------------------------------------------------------


def export(
    saved: Saved, target: Path, *, max_bytes: int | None, config: Path | None, dtype: torch.dtype | None
) -> None:
    """Write the weights and buffers of a checkpoint; see `fxzero.export`."""
    announced = {name: _announced(saved, full_name, dtype) for full_name, name in _weights_of(saved).items()}
    _refuse_adapters(saved.folder, announced)
    if config is not None:
        _check_config(config)
    tied = {name: first for name, first in saved.manifest["further_names"].items() if first in announced}
    tensors = (
        (name, saved.read(full_name).view(saved.shape_of(full_name)).to(announced[name].dtype))
        for full_name, name in _weights_of(saved).items()
    )
    save_weights(target, announced, tensors, tied, max_bytes)
    if config is not None:
        _copy_beside(config, target.parent if target.suffix == _SUFFIX else target, announced)
    if extra := saved.manifest["extra_states"]:
        logger.warning("left out, as safetensors has tensors alone: the extra state of %s", ", ".join(extra))


def _weights_of(saved: Saved) -> dict[str, str]:
    """Maps names in the checkpoint to those of the model."""
    kinds = ("model/", "buffer/")
    return {name: name.partition("/")[2] for name in saved.shapes if name.startswith(kinds)}


def _announced(saved: Saved, name: str, dtype: torch.dtype | None) -> Tensor:
    own = saved.dtype_of(name)
    return torch.empty(saved.shape_of(name), dtype=dtype if dtype and own.is_floating_point else own, device="meta")


def _refuse_adapters(folder: Path, names: Iterable[str]) -> None:
    adapted = next((name for name in names if _OF_PEFT.search(name)), None)
    if adapted is not None:
        raise CheckpointError(
            f"{folder} is of a model with adapters of peft ({adapted}), whose names from_pretrained does not know. "
            "Load it into the model, at one rank for example, and call zero.save_pretrained(folder), which writes the "
            "files of the adapter. Of a run of fxzero train, fxzero train --resume RUN --steps 1 writes them and the "
            "merged weights."
        )


def _check_config(config: Path) -> None:
    if not (config / "config.json").is_file():
        raise CheckpointError(f"{config} has no config.json. Name the folder of the model that was trained.")


def _copy_beside(config: Path, folder: Path, announced: Mapping[str, Tensor]) -> None:
    """Copy the files of a model's folder that are no weights, the dtype in its configuration corrected."""
    for path in files_beside(config):
        if not (folder / path.name).exists() or not path.samefile(folder / path.name):
            shutil.copyfile(path, folder / path.name)
    path = folder / "config.json"
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    bytes_of = Counter[torch.dtype]()
    for tensor in announced.values():
        bytes_of[tensor.dtype] += tensor.nbytes if tensor.is_floating_point() else 0
    (dtype, _), *_ = bytes_of.most_common(1) or [(torch.float32, 0)]
    for key in content.keys() & {"dtype", "torch_dtype"}:  # from_pretrained loads in this one
        content[key] = str(dtype).removeprefix("torch.")
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
