"""The models that can be trained, with their presets, and loading the model of a finished run."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from fxzero import models
from fxzero.commands.errors import CommandError
from fxzero.errors import CheckpointError
from fxzero.host.extras import require

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"


@dataclass(frozen=True)
class Architecture:
    """A model class with its configurations and its task."""

    build: type[nn.Module]
    config: type[Any]
    presets: Mapping[str, Any]
    masked: bool
    """True for masked language modelling, False for the next token."""


# Small enough to learn from its text within minutes on two cores, which no other preset is.
_ROBERTA_MICRO = models.RobertaConfig(
    vocab_size=261, max_positions=258, hidden_size=128, ffn_size=512, num_layers=2, num_heads=8, dropout=0.0
)
_GPT_MICRO = models.GPTConfig(
    vocab_size=261, max_positions=256, hidden_size=128, num_layers=2, num_heads=8, dropout=0.0
)
_LLAMA_MICRO = models.LlamaConfig(
    vocab_size=261, max_positions=256, hidden_size=128, ffn_size=344, num_layers=2, num_heads=8, num_kv_heads=8
)

ARCHITECTURES: Mapping[str, Architecture] = {
    "roberta": Architecture(
        models.RobertaForMaskedLM,
        models.RobertaConfig,
        {"micro": _ROBERTA_MICRO, **models.ROBERTA_PRESETS},
        masked=True,
    ),
    "gpt": Architecture(models.GPT, models.GPTConfig, {"micro": _GPT_MICRO, **models.GPT_PRESETS}, masked=False),
    "llama": Architecture(
        models.Llama, models.LlamaConfig, {"micro": _LLAMA_MICRO, **models.LLAMA_PRESETS}, masked=False
    ),
}


def config_of(model: str, preset: str, seq: int) -> Any:
    """The configuration of a preset.

    Raises:
        CommandError: no such preset, or its positions are fewer than `seq`.
    """
    presets = ARCHITECTURES[model].presets
    if preset not in presets:
        raise CommandError(f"--preset {preset} is not known for {model}; choose one of: {', '.join(presets)}.")
    config = presets[preset]
    longest = getattr(config, "max_tokens", config.max_positions)
    if seq > longest:
        raise CommandError(f"--seq {seq} is more than {model} {preset} has positions for; at most {longest}.")
    return config


def build(model: str, config: Any) -> nn.Module:
    """A model on the meta device, which allocates nothing."""
    with torch.device("meta"):
        return ARCHITECTURES[model].build(config)


def initializer(vocab_size: int) -> Callable[[nn.Module], None]:
    """An initialiser like that of the models, except that the deviation of linears here depends on their width.

    The 0.02 of BERT and GPT-2 suits a width of 768. At 128 attention hardly begins to learn with it: on one rank, 1000
    steps of the micro RoBERTa on bytes ended at a held-out loss of 2.70 with 0.02 and of 2.42 with 0.06.
    """

    def initialize(module: nn.Module) -> None:
        if hasattr(module, "reset_parameters"):
            cast(Any, module).reset_parameters()
        if isinstance(module, nn.Linear) and module.out_features != vocab_size:  # all but the head
            nn.init.normal_(module.weight, std=module.in_features**-0.5)

    return initialize


def default_lr(config: Any) -> float:
    """A learning rate that suits a model of this size, also a post-norm one: less the wider and deeper it is."""
    return 3e-3 * 256 / (config.hidden_size * config.num_layers)


def write_config(out: Path, model: str, preset: str, config: Any, files: Iterable[str] = ()) -> None:
    """Write the model, the preset and the configuration of the weights to a file.

    Args:
        files: names of other files in the folder, all complete, whose checksums are written as well.
    """
    about: dict[str, Any] = {"model": model, "preset": preset, "config": dataclasses.asdict(config)}
    if files:
        about[_CHECKSUMS] = {name: _sha256(out / name) for name in files}
        about[_CHECKSUMS][CONFIG_FILE] = _sha256_of_config(about)
    partial = out / f"{CONFIG_FILE}.partial"
    partial.write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, out / CONFIG_FILE)


def load(out_dir: str | Path) -> nn.Module:
    """The plain model that a run of `fxzero train` wrote to `out_dir`, in eval mode on the CPU.

    Its tokenizer is `tokenizers.Tokenizer.from_file(out_dir + "/tokenizer.json")`. All files of the folder that a
    checksum was written for are read, and compared with it.

    Raises:
        CheckpointError: a file is missing, is not what was written, or does not fit the others; the message names it.
        MissingExtraError: safetensors is not installed.
    """
    require("fxzero.train.load", "train", "safetensors")
    from safetensors import SafetensorError
    from safetensors.torch import load_model

    out = Path(out_dir)
    about = _read_config(out / CONFIG_FILE)
    weights = out / WEIGHTS_FILE
    with _naming(weights):
        weights.open("rb").close()
    for name, checksum in about.get(_CHECKSUMS, {}).items():
        if name != CONFIG_FILE and (out / name).exists():
            with _naming(out / name):
                if _sha256(out / name) != checksum:
                    raise CheckpointError(f"{out / name} is not what was written: {_DAMAGED}")
    with _naming(out / CONFIG_FILE, KeyError, TypeError, ValueError, RuntimeError):
        architecture = ARCHITECTURES[about["model"]]
        model = architecture.build(architecture.config(**about["config"]))
    with _naming(weights, SafetensorError, KeyError, ValueError, RuntimeError):
        load_model(model, weights)
    return model.eval()


_CHECKSUMS = "sha256"
_DAMAGED = "its checksum differs from the one of the run. Copy the folder again, or train again."


def _read_config(path: Path) -> dict[str, Any]:
    """The contents of a configuration that is whole.

    Raises:
        CheckpointError: it is not.
    """
    with _naming(path, ValueError):
        about: Any = json.loads(path.read_text(encoding="utf-8"))
    entries = {"model", "preset", "config"}
    if not isinstance(about, dict) or about.keys() - {_CHECKSUMS} != entries:  # pyright: ignore[reportUnknownMemberType]
        raise CheckpointError(
            f"{path} is not what was written: it has other entries than a run of fxzero train writes."
        )
    found = cast("dict[str, Any]", about)
    if _CHECKSUMS in found:
        checksums = found[_CHECKSUMS]
        if not isinstance(checksums, dict) or checksums.get(CONFIG_FILE) != _sha256_of_config(found):  # pyright: ignore[reportUnknownMemberType]
            raise CheckpointError(f"{path} is not what was written: {_DAMAGED}")
    return found


def _sha256_of_config(about: dict[str, Any]) -> str:
    """The checksum of a configuration and of the checksums in it, but for its own."""
    checksums = {name: checksum for name, checksum in about[_CHECKSUMS].items() if name != CONFIG_FILE}
    return hashlib.sha256(json.dumps({**about, _CHECKSUMS: checksums}, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


@contextmanager
def _naming(path: Path, *errors: type[Exception]) -> Generator[None]:
    """Raise CheckpointError with the file for an OSError of the block, or for one of other errors."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read: {error.strerror or error}. Is it the folder of a run?"
        ) from error
    except errors as error:
        reason = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{path} is not what a run of fxzero train writes: {reason}") from error
