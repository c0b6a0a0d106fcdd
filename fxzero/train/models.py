"""The models that can be trained, with their presets, and loading the model of a finished run."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from fxzero import models
from fxzero.commands.errors import CommandError
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


def write_config(out: Path, model: str, preset: str, config: Any) -> None:
    """Write the model, the preset and the configuration of the weights to a file."""
    about = {"model": model, "preset": preset, "config": dataclasses.asdict(config)}
    (out / CONFIG_FILE).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


def load(out_dir: str | Path) -> nn.Module:
    """The plain model that a run of `fxzero train` wrote to `out_dir`, in eval mode on the CPU.

    Its tokenizer is `tokenizers.Tokenizer.from_file(out_dir + "/tokenizer.json")`.

    Raises:
        MissingExtraError: safetensors is not installed.
    """
    require("fxzero.train.load", "train", "safetensors")
    from safetensors.torch import load_model

    out = Path(out_dir)
    about = json.loads((out / CONFIG_FILE).read_text(encoding="utf-8"))
    architecture = ARCHITECTURES[about["model"]]
    model = architecture.build(architecture.config(**about["config"]))
    load_model(model, out / WEIGHTS_FILE)
    return model.eval()
