"""What all systems train: a masked language model and random batches, the same for the same seed."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.network.systems import Shape

MASK, FIRST_WORD = 3, 4
MASKED_SHARE = 0.15


class Block(nn.Module):
    """Attention and an MLP, each followed by its residual and layer norm."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        width = shape.hidden
        self.heads = shape.heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        batch, seq, width = x.shape
        q, k, v = self.qkv(x).view(batch, seq, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, seq, width)
        x = self.norm1(x + self.out(mixed))
        return self.norm2(x + self.down(F.gelu(self.up(x))))


class Encoder(nn.Module):
    """A masked language model with a head of its own; its loss is the mean over the masked positions."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        width = shape.hidden
        self.token, self.position = nn.Embedding(shape.vocab, width), nn.Embedding(shape.seq, width)
        self.norm = nn.LayerNorm(width)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.dense, self.head_norm = nn.Linear(width, width), nn.LayerNorm(width)
        self.head = nn.Linear(width, shape.vocab)
        for param in self.parameters():
            if param.dim() > 1:
                nn.init.normal_(param, std=0.02)

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        x = self.norm(self.token(ids) + self.position.weight[None])
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.head_norm(F.gelu(self.dense(x))))
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)


def init_weights(module: nn.Module) -> None:
    """Initialise one module of a model that was made on the meta device."""
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
    if isinstance(module, nn.LayerNorm):
        module.reset_parameters()


def make_batch(shape: Shape, step: int, rank: int) -> tuple[Tensor, Tensor]:
    """Ids and labels [batch, seq] of a rank's step.

    Every sample has the same number of masked positions, so that the mean over ranks is the mean over the whole batch.
    """
    generator = torch.Generator().manual_seed(1000 * step + rank)
    ids = torch.randint(FIRST_WORD, shape.vocab, (shape.batch, shape.seq), generator=generator)
    count = max(1, int(MASKED_SHARE * shape.seq))
    where = torch.rand(shape.batch, shape.seq, generator=generator).argsort(1)[:, :count]
    labels = torch.full_like(ids, -100).scatter(1, where, ids.gather(1, where))
    return ids.scatter(1, where, MASK), labels
