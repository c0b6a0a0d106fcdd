"""Llama: a pre-norm decoder with RMSNorm, rotary positions, grouped-query attention and a SwiGLU MLP; no biases.

tokens -> num_layers x Layer -> norm -> head -> next-token loss
Layer:  x + attention(norm(x)),  then  x + mlp(norm(x))

Source: Touvron et al. 2023 (arXiv:2307.09288) and, for the 8b preset, the Llama 3 herd (arXiv:2407.21783).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .parts import IGNORED_LABEL, Embedding, Linear, LMOutput, language_model_loss


@dataclass(frozen=True)
class LlamaConfig:
    """Sizes and options of a Llama."""

    vocab_size: int = 32000
    max_positions: int = 4096
    hidden_size: int = 4096
    ffn_size: int = 11008
    num_layers: int = 32
    num_heads: int = 32
    num_kv_heads: int = 32
    """Heads of keys and values; each serves `num_heads / num_kv_heads` heads of queries."""
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    tied: bool = False
    """The head uses the weight of the token embedding."""

    def __post_init__(self) -> None:
        if self.hidden_size % (2 * self.num_heads):
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of 2 * num_heads {self.num_heads}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}")

    @property
    def head_size(self) -> int:
        """Width of one head."""
        return self.hidden_size // self.num_heads


LLAMA_PRESETS: Mapping[str, LlamaConfig] = {
    "tiny": LlamaConfig(
        vocab_size=128, max_positions=32, hidden_size=32, ffn_size=88, num_layers=2, num_heads=4, num_kv_heads=2
    ),
    "mini": LlamaConfig(
        vocab_size=4096, max_positions=256, hidden_size=256, ffn_size=688, num_layers=4, num_heads=4, num_kv_heads=2
    ),
    "7b": LlamaConfig(),
    "8b": LlamaConfig(vocab_size=128256, max_positions=8192, ffn_size=14336, num_kv_heads=8, rope_theta=500000.0),
}


class Llama(nn.Module):
    """Llama with its language-model head."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.token_embedding = Embedding(config.vocab_size, config.hidden_size)
        self.rotary = Rotary(config)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.norm_eps)
        self.head = Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tied:
            self.head.weight = self.token_embedding.weight

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> LMOutput:
        """Predicts each next token.

        Args:
            input_ids: `[batch, sequence]`.
            labels: `[batch, sequence]`, usually `input_ids` itself, shifted in here; -100 is ignored.
        """
        length = input_ids.shape[1]
        if length > self.config.max_positions:
            raise ValueError(f"{length} tokens; this model has {self.config.max_positions} positions")
        x = self.token_embedding(input_ids)
        cos, sin = self.rotary(length)
        for layer in self.layers:
            x = layer(x, cos, sin)
        logits = self.head(self.norm(x))
        if labels is None:
            return LMOutput(None, logits)
        next_labels = F.pad(labels[:, 1:], (0, 1), value=IGNORED_LABEL)
        return LMOutput(language_model_loss(logits, next_labels), logits)


class Rotary(nn.Module):
    """The cosines and sines by which queries and keys are turned, `[max_positions, head_size]` each.

    Not saved: they follow from the config, and `reset_parameters` computes them.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.theta = config.rope_theta
        self.register_buffer("cos", torch.empty(config.max_positions, config.head_size), persistent=False)
        self.register_buffer("sin", torch.empty(config.max_positions, config.head_size), persistent=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Fill both tables in place."""
        max_positions, head_size = self.cos.shape
        device = self.cos.device
        exponents = torch.arange(0, head_size, 2, device=device, dtype=torch.float32) / head_size
        positions = torch.arange(max_positions, device=device, dtype=torch.float32)
        angles = torch.outer(positions, 1.0 / self.theta**exponents).repeat(1, 2)
        self.cos.copy_(angles.cos())
        self.sin.copy_(angles.sin())

    def forward(self, length: int) -> tuple[Tensor, Tensor]:
        """The first `length` rows of both."""
        return self.cos[:length], self.sin[:length]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x[i], x[i + head_size/2]) by its position's angle; x is `[batch, heads, sequence, head_size]`."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class Layer(nn.Module):
    """Attention and MLP, each normalised before and added after."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.hidden_size, config.norm_eps)
        self.attention = Attention(config)
        self.mlp_norm = nn.RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """`[batch, sequence, hidden_size]` to the same."""
        x = x + self.attention(self.attention_norm(x), cos, sin)
        return x + self.mlp(self.mlp_norm(x))


class Attention(nn.Module):
    """Causal self-attention in which several query heads share one head of keys and values."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.head_size = config.head_size
        self.queries_per_kv = config.num_heads // config.num_kv_heads
        kv_size = config.num_kv_heads * config.head_size
        self.q = Linear(config.hidden_size, config.hidden_size, bias=False)
        self.k = Linear(config.hidden_size, kv_size, bias=False)
        self.v = Linear(config.hidden_size, kv_size, bias=False)
        self.o = Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """`[batch, sequence, hidden_size]` to the same."""
        q = rotate(self._split_heads(self.q(x)), cos, sin)
        k = rotate(self._split_heads(self.k(x)), cos, sin).repeat_interleave(self.queries_per_kv, dim=1)
        v = self._split_heads(self.v(x)).repeat_interleave(self.queries_per_kv, dim=1)
        heads = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(heads.transpose(1, 2).flatten(2))

    def _split_heads(self, x: Tensor) -> Tensor:
        """`[batch, sequence, heads * head_size]` to `[batch, heads, sequence, head_size]`."""
        return x.unflatten(-1, (-1, self.head_size)).transpose(1, 2)


class MLP(nn.Module):
    """SwiGLU: one linear gates another."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate = Linear(config.hidden_size, config.ffn_size, bias=False)
        self.up = Linear(config.hidden_size, config.ffn_size, bias=False)
        self.down = Linear(config.ffn_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`[batch, sequence, hidden_size]` to the same."""
        return self.down(F.silu(self.gate(x)) * self.up(x))
