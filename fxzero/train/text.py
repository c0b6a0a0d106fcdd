"""The tokens of a run, read by rank 0 and equal on every rank.

Their tokenizer is that of a Hugging Face folder, or a byte-level BPE that is learned from the text itself. This one has
RoBERTa's special tokens. At the smallest vocabulary, 256 bytes and the special tokens, it has no merges.
"""

import itertools
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from fxzero.commands.world import World
from fxzero.train.corpus import Document, read_corpus
from fxzero.train.hf_folder import read_tokenizer
from fxzero.train.options import TrainOptions

SPECIAL_TOKENS = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
BOS_ID, PAD_ID, EOS_ID, UNK_ID, MASK_ID = range(len(SPECIAL_TOKENS))
"""Ids of the special tokens: those of RoBERTa, except for the mask, which RoBERTa puts last."""

_TEXTS_AT_ONCE = 16
"""Texts that are encoded together: an encoding takes many times the memory of its text."""


@dataclass(frozen=True)
class Text:
    """The tokens to train on, and the held-out ones to evaluate on."""

    about: str
    """One line about the source of the text and its size."""
    tokenizer: Tokenizer
    train: torch.Tensor
    """int32 `[num_tokens]`"""
    held_out: torch.Tensor
    """int32 `[num_tokens]`"""
    bos_id: int | None = BOS_ID
    """The token that begins a sequence; None for none."""

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.get_vocab_size()


def read_text(options: TrainOptions, world: World) -> Text:
    """Read the text and learn its tokenizer on rank 0, and send both to all ranks.

    Raises:
        CommandError: on every rank, if there is no text.
    """
    tokens: list[torch.Tensor | None] = [None, None]

    def read() -> tuple[str, str, int | None, int, int]:
        corpus = read_corpus(options.data)
        if options.hf is None:
            tokenizer, bos_id, eos_id = train_tokenizer(_texts(corpus.train), options.vocab_size), BOS_ID, EOS_ID
        else:
            found = read_tokenizer(options.hf)
            tokenizer, bos_id, eos_id = found.tokenizer, found.bos_id, found.eos_id
        train, held_out = (encode(tokenizer, _texts(each), eos_id) for each in (corpus.train, corpus.held_out))
        tokens[:] = train, held_out
        return corpus.describe(), tokenizer.to_str(), bos_id, len(train), len(held_out)

    about, tokenizer, bos_id, num_train, num_held_out = world.share(read)
    return Text(
        f"{about}; {num_train / 1e6:.2f} M tokens",
        Tokenizer.from_str(tokenizer),
        world.share_tensor(tokens[0], num_train),
        world.share_tensor(tokens[1], num_held_out),
        bos_id,
    )


def _texts(documents: Iterable[Document]) -> Iterable[str]:
    return (each.text for each in documents)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Learn at most `vocab_size` tokens from texts; equal texts give equal tokenizers."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, texts: Iterable[str], eos_id: int | None = EOS_ID) -> torch.Tensor:
    """All texts in one stream of ids, each ended by `eos_id`: int32 `[num_tokens]`."""
    end = [] if eos_id is None else [eos_id]
    streams: list[torch.Tensor] = []
    remaining = iter(texts)
    while some := list(itertools.islice(remaining, _TEXTS_AT_ONCE)):
        encodings = tokenizer.encode_batch(some, add_special_tokens=False)
        streams.extend(torch.tensor([*encoding.ids, *end], dtype=torch.int32) for encoding in encodings)
    return torch.cat(streams)
