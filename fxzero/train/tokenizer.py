"""A byte-level BPE trained on the text itself, with RoBERTa's special tokens.

At the smallest vocabulary (256 bytes and the special tokens) it has no merges: bytes.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

SPECIAL_TOKENS = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
BOS_ID, PAD_ID, EOS_ID, UNK_ID, MASK_ID = range(len(SPECIAL_TOKENS))
"""Ids as in RoBERTa, but for the mask, which RoBERTa puts last."""

_TEXTS_AT_ONCE = 16
"""An encoding is many times as large as its text."""


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Learn at most `vocab_size` tokens from texts; the same texts give the same tokenizer."""
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


def encode(tokenizer: Tokenizer, texts: Iterable[str]) -> torch.Tensor:
    """All texts in one stream of ids, each ended by `</s>`: int32 `[num_tokens]`."""
    streams: list[torch.Tensor] = []
    remaining = iter(texts)
    while some := list(itertools.islice(remaining, _TEXTS_AT_ONCE)):
        encodings = tokenizer.encode_batch(some, add_special_tokens=False)
        streams.extend(torch.tensor([*encoding.ids, EOS_ID], dtype=torch.int32) for encoding in encodings)
    return torch.cat(streams)
