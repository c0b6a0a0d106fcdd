"""The tokens of a run, read by rank 0 and the same on every rank."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from tokenizers import Tokenizer

from fxzero.commands.world import World
from fxzero.train.corpus import read_corpus
from fxzero.train.options import TrainOptions
from fxzero.train.tokenizer import encode, train_tokenizer


@dataclass(frozen=True)
class Text:
    """What there is to train on and to evaluate on."""

    about: str
    """One line on where it comes from and how much it is."""
    tokenizer: Tokenizer
    train: torch.Tensor
    """int32 `[num_tokens]`"""
    held_out: torch.Tensor
    """int32 `[num_tokens]`"""

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.get_vocab_size()


def read_text(options: TrainOptions, world: World) -> Text:
    """Rank 0 reads the text and learns the tokenizer; the others need no such files, they are given the tokens.

    Raises:
        CommandError: on every rank, if there is no text.
    """
    tokens: list[torch.Tensor | None] = [None, None]

    def read() -> tuple[str, str, int, int]:
        corpus = read_corpus(options.data)
        tokenizer = train_tokenizer((each.text for each in corpus.train), options.vocab_size)
        train = encode(tokenizer, (each.text for each in corpus.train))
        held_out = encode(tokenizer, (each.text for each in corpus.held_out))
        tokens[:] = train, held_out
        return corpus.describe(), tokenizer.to_str(), len(train), len(held_out)

    about, tokenizer, num_train, num_held_out = world.share(read)
    return Text(
        f"{about}; {num_train / 1e6:.2f} M tokens",
        Tokenizer.from_str(tokenizer),
        world.share_tensor(tokens[0], num_train),
        world.share_tensor(tokens[1], num_held_out),
    )
