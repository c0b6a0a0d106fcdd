"""LoRA adapters of peft in a Hugging Face model: put in on the meta device, written for peft, merged into the weights.

layers.0.q_proj.weight  ->  layers.0.q_proj.base_layer.weight          frozen
                            layers.0.q_proj.lora_A.default.weight      trained
                            layers.0.q_proj.lora_B.default.weight      trained
"""

import importlib
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from fxzero.checkpoint.safetensors import save_stream

ADAPTER_FOLDER = "adapter"
_ADAPTER_FILE = "adapter_model.safetensors"
_NAME = "default"
"""peft's name of the adapter."""
_BASE = ".base_layer"


class Adapters:
    """The adapters of all linear layers of a model but the head, which are all that is trained from now on."""

    def __init__(self, model: nn.Module, rank: int, base: Path) -> None:
        peft: Any = importlib.import_module("peft")

        self.config: Any = peft.LoraConfig(
            r=rank,
            lora_alpha=2 * rank,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
            base_model_name_or_path=str(base.absolute()),
        )
        with torch.device("meta"):
            peft.inject_adapter_in_model(self.config, model, adapter_name=_NAME)
        self.model = model
        named = model.named_modules()
        self._last = {id(module): f".lora_B.{_NAME}" in name for name, module in named if ".lora_" in name}
        """True for the second matrix of an adapter, False for the first, by module."""

    def initialize(self, module: nn.Module) -> None:
        """Initialise one module of an adapter as peft does: it adds nothing at first."""
        is_last = self._last.get(id(module))
        if is_last is None or not isinstance(module, nn.Linear):
            return
        if is_last:
            nn.init.zeros_(module.weight)
        else:
            nn.init.kaiming_uniform_(module.weight, a=math.sqrt(5))

    def is_of_adapter(self, name: str) -> bool:
        """True for the name of a trained parameter."""
        return ".lora_" in name

    def announced(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of the merged model, given those of the model with adapters."""
        return {_plain(name): tensor for name, tensor in state.items() if not self.is_of_adapter(name)}

    def merged(
        self, tensors: Iterable[tuple[str, Tensor]], adapters: Mapping[str, Tensor]
    ) -> Iterator[tuple[str, Tensor]]:
        """The tensors of the merged model, of the base's and those of adapters."""
        for name, tensor in tensors:
            if not self.is_of_adapter(name):
                yield _plain(name), tensor + self._delta(name, adapters) if f"{_BASE}.weight" in name else tensor

    def _delta(self, name: str, adapters: Mapping[str, Tensor]) -> Tensor:
        """What an adapter adds to the weight of its layer."""
        path = name.removesuffix(f"{_BASE}.weight")
        layer = cast(Any, self.model.get_submodule(path))
        first, last = (adapters[f"{path}.lora_{each}.{_NAME}.weight"] for each in "AB")
        delta = last @ first
        return (delta.T if layer.fan_in_fan_out else delta) * layer.scaling[_NAME]

    def write(self, out: Path, adapters: Mapping[str, Tensor]) -> None:
        """Write adapters as peft loads them, `PeftModel.from_pretrained(base, out / "adapter")`."""
        folder = out / ADAPTER_FOLDER
        folder.mkdir(exist_ok=True)
        self.config.inference_mode = True
        self.config.save_pretrained(str(folder))
        named = {f"base_model.model.{name.replace(f'.{_NAME}.', '.')}": tensor for name, tensor in adapters.items()}
        save_stream(folder / _ADAPTER_FILE, named, named.items(), {"format": "pt"})


def _plain(name: str) -> str:
    return name.replace(f"{_BASE}.", ".")
