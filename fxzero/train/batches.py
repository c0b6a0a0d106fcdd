"""Batches by index: each sample of a batch follows from the seed and the index of the sample alone.

index = (step * accumulate + micro_step) * world_size * batch + rank * batch + row

A step has one set of samples for every number of ranks, and a run can be resumed at any step.
"""

import functools
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch.nn.functional import pad

from fxzero.commands.errors import CommandError
from fxzero.train.text import BOS_ID, MASK_ID, SPECIAL_TOKENS

MASKED_FRACTION = 0.15
IGNORED = -100
"""The label of a position that the loss does not count."""


@dataclass
class Windows:
    """Sequences of one length cut from a stream of tokens, each with a token of its own at its begin, if there is one.

    The places of the cuts and the order of the sequences are drawn anew in each epoch.
    """

    tokens: torch.Tensor
    """`[num_tokens]`"""
    seq: int
    seed: int
    bos_id: int | None = BOS_ID
    """The token at the begin of each sequence; None for none."""
    _orders: dict[int, tuple[int, torch.Tensor]] = field(
        default_factory=dict[int, tuple[int, torch.Tensor]], repr=False
    )

    def __len__(self) -> int:
        """Sequences per epoch."""
        return max(0, (len(self.tokens) - self.seq) // self._stride)

    @property
    def _stride(self) -> int:
        """Tokens of the text in a sequence."""
        return self.seq if self.bos_id is None else self.seq - 1

    def require(self, num_sequences: int, what: str) -> None:
        """Refuse a text that is too short.

        Raises:
            CommandError: there are fewer sequences than `num_sequences`.
        """
        if len(self) < num_sequences:
            raise CommandError(
                f"The {what} text has {len(self.tokens)} tokens, which is {len(self)} sequences of {self.seq}; "
                f"{num_sequences} are needed. Give more text with --data, or lower --batch, --seq or --eval-batches."
            )

    def sequence(self, index: int) -> torch.Tensor:
        """The sample of an index, which counts on through the epochs: int64 `[seq]`."""
        epoch, position = divmod(index, len(self))
        if epoch not in self._orders:
            generator = generator_of("order", self.seed, epoch)
            offset = int(torch.randint(self._stride, (), generator=generator))
            self._orders = {epoch: (offset, torch.randperm(len(self), generator=generator))}
        offset, order = self._orders[epoch]
        start = offset + int(order[position]) * self._stride
        tokens = self.tokens[start : start + self._stride].long()
        return tokens if self.bos_id is None else pad(tokens, (1, 0), value=self.bos_id)


def generator_of(*key: object) -> torch.Generator:
    """A random generator that is seeded with a key of strings and numbers."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def mask_tokens(ids: torch.Tensor, vocab_size: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Mask one sequence as BERT does: of the 15 % to be predicted, 80 % become the mask and 10 % a random token.

    At least one position is chosen, and never that of a special token.

    Args:
        ids: `[seq]`, not changed.
        vocab_size: bound on the random tokens, none of which is a special one.
        generator: the source of the draws.

    Returns:
        The inputs `[seq]`, and the labels `[seq]`, which are IGNORED where nothing is to be predicted.

    Source: BERT (arXiv:1810.04805) section 3.1; as in RoBERTa (arXiv:1907.11692) drawn anew each time.
    """
    ordinary = ids >= len(SPECIAL_TOKENS)
    draws = torch.rand(ids.shape, generator=generator).masked_fill(~ordinary, 1.0)
    chosen = ((draws < MASKED_FRACTION) | (draws == draws.min())) & ordinary
    labels = ids.masked_fill(~chosen, IGNORED)
    how = torch.rand(ids.shape, generator=generator)
    noise = torch.randint(len(SPECIAL_TOKENS), vocab_size, ids.shape, generator=generator)
    inputs = torch.where(chosen & (how < 0.8), MASK_ID, ids)
    inputs = torch.where(chosen & (how >= 0.8) & (how < 0.9), noise, inputs)
    return inputs, labels


@dataclass(frozen=True)
class Batches:
    """The batches of one rank."""

    windows: Windows
    batch: int
    vocab_size: int
    masked: bool
    """True for masked language modelling; False for causal: the labels are the inputs, which the model shifts."""
    rank: int
    world_size: int

    def batch_at(self, index: int) -> dict[str, torch.Tensor]:
        """The arguments of the model for the `index`-th micro-step of this rank: ids and labels, `[batch, seq]`."""
        return self.batch_from(index * self.world_size * self.batch)

    def batch_from(self, sample: int) -> dict[str, torch.Tensor]:
        """As `batch_at`, where the first sample of all ranks is given."""
        first = sample + self.rank * self.batch
        samples = [self._sample(index) for index in range(first, first + self.batch)]
        inputs, labels = map(torch.stack, zip(*samples, strict=True))
        return {"input_ids": inputs, "labels": labels}

    def _sample(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        ids = self.windows.sequence(index)
        if not self.masked:
            return ids, ids
        return mask_tokens(ids, self.vocab_size, generator_of("mask", self.windows.seed, index))


class BatchStream:
    """The batches of this rank one after another, without an end; it resumes as torchdata's StatefulDataLoader does.

    Epochs follow each other inside of a batch, so that no sequence is left out at their ends. The state is a number of
    samples over all ranks: at another number of ranks, or another size of the batch, the samples that follow are equal.
    """

    def __init__(self, batches: Batches) -> None:
        self.batches = batches
        self.samples = 0
        """Samples that all ranks have had."""

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        return self

    def __next__(self) -> dict[str, torch.Tensor]:
        batch = self.batches.batch_from(self.samples)
        self.samples += self.batches.world_size * self.batches.batch
        return batch

    def state_dict(self) -> dict[str, int]:
        """The position, and what it is a position in."""
        return {"samples": self.samples, **self._source}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on from a position.

        Raises:
            CommandError: it is one in other data.
        """
        for name, value in self._source.items():
            if state[name] != value:
                raise CommandError(
                    f"The checkpoint has a position in other data: its {_SOURCE[name]} was {state[name]}, and is "
                    f"{value}. Resume with the text, --seq and --seed of that run."
                )
        self.samples = state["samples"]

    @functools.cached_property
    def _source(self) -> dict[str, int]:
        """What a position is a position in."""
        windows = self.batches.windows
        digest = hashlib.blake2b(windows.tokens.numpy().data, digest_size=6).digest()
        return {"seq": windows.seq, "seed": windows.seed, "text": int.from_bytes(digest, "little")}


_SOURCE = {"seq": "--seq", "seed": "--seed", "text": "digest of the text"}
