"""Toy and reference models: plain nn.Module, nothing of fxzero. Import them as fxzero.models."""

from .gpt import GPT, GPT_PRESETS, GPTConfig
from .llama import LLAMA_PRESETS, Llama, LlamaConfig
from .mlp import MLP, MLP_PRESETS, MLPConfig
from .parts import LMOutput
from .roberta import ROBERTA_PRESETS, RobertaConfig, RobertaForMaskedLM

__all__ = [
    "GPT",
    "GPT_PRESETS",
    "LLAMA_PRESETS",
    "MLP",
    "MLP_PRESETS",
    "ROBERTA_PRESETS",
    "GPTConfig",
    "LMOutput",
    "Llama",
    "LlamaConfig",
    "MLPConfig",
    "RobertaConfig",
    "RobertaForMaskedLM",
]
