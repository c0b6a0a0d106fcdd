"""The text, its tokens and the batches of `fxzero train`."""

from pathlib import Path

import pytest
import torch

from fxzero.commands.errors import CommandError
from fxzero.commands.world import World
from fxzero.train.batches import IGNORED, Batches, Windows, generator_of, mask_tokens
from fxzero.train.corpus import Document, num_chars, read_corpus, split, stdlib_files
from fxzero.train.options import TrainOptions
from fxzero.train.text import BOS_ID, EOS_ID, MASK_ID, SPECIAL_TOKENS, encode, read_text, train_tokenizer

ALONE = World(rank=0, size=1, local_size=1, device=torch.device("cpu"))


def test_stdlib_has_sources_but_no_tests_and_no_packages() -> None:
    names = [name for name, _ in stdlib_files()]
    assert {"ast.py", "asyncio/events.py", "json/decoder.py"} <= set(names)
    assert names == sorted(names)
    folders = {part for name in names for part in name.split("/")[:-1]}
    assert not folders & {"test", "tests", "idle_test", "site-packages", "__pycache__"}


def test_split_keeps_whole_files_apart() -> None:
    documents = [Document(f"{index}.txt", "x" * (50 + index)) for index in range(200)]
    train, held_out = split(documents)
    assert sorted([*train, *held_out], key=lambda each: each.name) == sorted(documents, key=lambda each: each.name)
    assert 0.03 < num_chars(held_out) / num_chars(documents) < 0.08
    assert split(documents) == (train, held_out)
    assert split(documents[::-1])[1] == held_out[::-1]


def test_split_cuts_the_end_of_each_file_where_there_are_few() -> None:
    train, held_out = split([Document("one", "abcdefghij" * 10), Document("two", "klmnopqrst" * 10)])
    assert [len(each.text) for each in train] == [95, 95]
    assert [each.text for each in held_out] == ["fghij", "pqrst"]


def test_a_folder_is_read_without_hidden_and_binary_files(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / ".git").mkdir()
    (tmp_path / "sub" / "b.md").write_text("some text\n")
    (tmp_path / "a.txt").write_text("more text\n")
    (tmp_path / ".git" / "config").write_text("hidden\n")
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "binary").write_bytes(b"\x00\xff\xfe")
    corpus = read_corpus(tmp_path)
    assert [each.name for each in corpus.train] == ["a.txt", "sub/b.md"]
    assert "2 files" in corpus.describe()


def test_data_without_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\x00\xff\xfe")
    with pytest.raises(CommandError, match="has no text: no file in it is non-empty UTF-8"):
        read_corpus(tmp_path)


@pytest.mark.parametrize("vocab_size", [261, 300])
def test_tokenizer_gives_the_text_back(vocab_size: int) -> None:
    texts = ["def f(x):\n    return x  # caf\u00e9\n" * 20, "class A:\n\tpass\r\n"]
    tokenizer = train_tokenizer(texts, vocab_size)
    assert tokenizer.get_vocab_size() <= vocab_size
    assert [tokenizer.token_to_id(token) for token in SPECIAL_TOKENS] == list(range(5))
    ids = encode(tokenizer, texts)
    assert ids.dtype == torch.int32
    ends = (ids == EOS_ID).nonzero().flatten().tolist()
    assert ends[1:] == [len(ids) - 1]
    first, second = ids[: ends[0]].tolist(), ids[ends[0] + 1 : -1].tolist()
    assert [tokenizer.decode(first), tokenizer.decode(second)] == texts
    assert train_tokenizer(texts, vocab_size).to_str() == tokenizer.to_str()


def test_masks_are_fifteen_percent_of_which_most_are_the_mask_token() -> None:
    ids = torch.randint(5, 1000, (200_000,), generator=generator_of("ids"))
    ids[::100] = EOS_ID
    inputs, labels = mask_tokens(ids, 1000, generator_of("mask"))
    chosen = labels != IGNORED
    assert not chosen[::100].any()
    assert torch.equal(labels[chosen], ids[chosen])
    assert torch.equal(inputs[~chosen], ids[~chosen])
    assert float(chosen.sum()) / (ids != EOS_ID).sum() == pytest.approx(0.15, abs=0.003)
    assert float((inputs[chosen] == MASK_ID).float().mean()) == pytest.approx(0.8, abs=0.01)
    assert float((inputs[chosen] == ids[chosen]).float().mean()) == pytest.approx(0.1, abs=0.01)
    random = inputs[chosen & (inputs != MASK_ID) & (inputs != ids)]
    assert len(random) and int(random.min()) >= len(SPECIAL_TOKENS)


def test_at_least_one_token_is_masked() -> None:
    ids = torch.tensor([BOS_ID, 7, 8, 9, 10, 11, 12, 13])
    for key in range(50):
        _, labels = mask_tokens(ids, 20, generator_of(key))
        assert (labels != IGNORED).any()
        assert labels[0] == IGNORED


def _batches(rank: int, world_size: int, batch: int, seed: int = 0, masked: bool = True) -> Batches:
    windows = Windows(torch.arange(5, 1005, dtype=torch.int32), seq=9, seed=seed)
    return Batches(windows, batch, vocab_size=1005, masked=masked, rank=rank, world_size=world_size)


def test_batches_follow_from_seed_step_and_rank() -> None:
    first, again = _batches(1, 2, 4).batch_at(3), _batches(1, 2, 4).batch_at(3)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert first["input_ids"].shape == first["labels"].shape == (4, 9)
    for other in (_batches(0, 2, 4).batch_at(3), _batches(1, 2, 4).batch_at(4), _batches(1, 2, 4, seed=1).batch_at(3)):
        assert not torch.equal(first["input_ids"], other["input_ids"])


def test_the_samples_of_a_step_are_the_same_for_every_world_size() -> None:
    alone = _batches(0, 1, 6).batch_at(2)
    ranks = [_batches(rank, 3, 2).batch_at(2) for rank in range(3)]
    for name in alone:
        assert torch.equal(alone[name], torch.cat([rank[name] for rank in ranks]))


def test_an_epoch_has_each_sequence_once_and_the_next_another_order() -> None:
    windows = Windows(torch.arange(5, 1005, dtype=torch.int32), seq=9, seed=0)
    epochs = [
        torch.stack([windows.sequence(epoch * len(windows) + i) for i in range(len(windows))]) for epoch in (0, 1)
    ]
    for sequences in epochs:
        assert (sequences[:, 0] == BOS_ID).all()
        assert len(sequences[:, 1:].unique()) == len(windows) * 8
    assert not torch.equal(*epochs)


def test_causal_labels_are_the_inputs() -> None:
    batch = _batches(0, 1, 2, masked=False).batch_at(0)
    assert torch.equal(batch["input_ids"], batch["labels"])


def test_a_text_that_is_too_short_is_refused_with_numbers() -> None:
    windows = Windows(torch.arange(100), seq=33, seed=0)
    with pytest.raises(CommandError, match="held-out text has 100 tokens, which is 2 sequences of 33; 4 are needed"):
        windows.require(4, "held-out")


def test_text_is_read_once_and_split(tmp_path: Path) -> None:
    for index in range(40):
        (tmp_path / f"{index}.txt").write_text(f"line {index} of a text that repeats itself\n" * 20)
    text = read_text(TrainOptions(data=tmp_path, vocab_size=300), ALONE)
    assert text.vocab_size <= 300
    assert 0 < len(text.held_out) < len(text.train)
    assert "M tokens" in text.about
