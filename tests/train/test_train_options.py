"""Options of `fxzero train` from files: which one counts, and what is told of those that are none."""

from pathlib import Path

import pytest

from fxzero.commands.errors import CommandError
from fxzero.train.command import options_of
from fxzero.train.options import TrainOptions, parse_budget, parse_bytes, parse_recompute
from fxzero.train.resume import check_out, checkpoint_of, run_folder, write_options


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "file.toml"


def test_the_command_line_wins_over_the_file_and_the_file_over_the_run_that_goes_on(tmp_path: Path, file: Path) -> None:
    before = TrainOptions(steps=5, batch=3, lr=0.5, data=Path("te xt"), memory_budget=100, nproc=4, tensorboard=True)
    write_options(tmp_path, before.to_keep())
    file.write_text('batch = 7\nsave-every = 2\nmemory_budget = "1 GiB"\nlr = 1\n')
    options = options_of({"config": file, "resume": str(tmp_path), "lr": 0.25})
    assert (options.steps, options.batch, options.save_every, options.lr) == (5, 7, 2, 0.25)
    assert (options.memory_budget, options.data, options.nproc) == (2**30, Path("te xt"), None)
    assert options.tensorboard
    assert options_of({}) == TrainOptions()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("stpes = 4", "stpes is no option of this command; the nearest is steps."),
        ("steps = 4.5", "steps is 4.5; it must be a whole number."),
        ("lr = true", "lr is True; it must be a number."),
        ('tensorboard = "yes"', "tensorboard is 'yes'; it must be true or false."),
        ('recompute = "some"', "recompute is 'some'; it must be a value of this option."),
        ("steps = ", "is no TOML file"),
    ],
)
def test_what_is_no_option_is_told(text: str, told: str, file: Path) -> None:
    pytest.importorskip("tomllib")
    file.write_text(text)
    with pytest.raises(CommandError) as error:
        options_of({"config": file})
    assert told in str(error.value)
    with pytest.raises(CommandError, match="--config .*missing.toml cannot be read: No such file or directory"):
        options_of({"config": file.with_name("missing.toml")})


def test_bytes_have_units() -> None:
    assert [parse_bytes(text) for text in ("1000", "2k", "3MiB", "1.5 GB", "1e3")] == [
        1000,
        2048,
        3 << 20,
        3 << 29,
        1000,
    ]
    assert (parse_budget("auto"), parse_recompute("none"), parse_recompute("1M")) == ("auto", "none", 1 << 20)
    for text in ("", "GiB", "-1", "much"):
        with pytest.raises(ValueError):
            parse_bytes(text)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (TrainOptions(precision="int8"), "--precision int8 is not known; choose one of: fp32, bf16, fp16."),
        (TrainOptions(lora=4), "--lora 4 adapts the model of a Hugging Face folder; give it with --hf."),
        (TrainOptions(resume="auto"), "--resume auto goes on with the run in the folder of --out"),
        (
            TrainOptions(hf=Path("x"), model="gpt", vocab_size=300),
            "--hf brings its own model and tokenizer; leave out --model, --vocab-size.",
        ),
        (TrainOptions(keep=0), "--keep 0 must be at least 1."),
    ],
)
def test_options_that_contradict_each_other_are_refused(options: TrainOptions, told: str) -> None:
    with pytest.raises(CommandError) as error:
        options.validate()
    assert str(error.value).startswith(told)


def test_the_folder_to_go_on_from_is_found_or_told(tmp_path: Path) -> None:
    run = tmp_path / "run"
    checkpoint = run / "checkpoints" / "000002"
    checkpoint.mkdir(parents=True)
    assert {run_folder(str(path)) for path in (run, checkpoint.parent, checkpoint)} == {run}
    assert checkpoint_of(run, "auto") is None
    with pytest.raises(CommandError, match="--resume .*run has no checkpoint. Name the folder of a run"):
        checkpoint_of(None, str(run))
    with pytest.raises(CommandError, match="--resume nowhere does not exist"):
        checkpoint_of(None, "nowhere")
    (checkpoint / "manifest.json").write_text("")
    assert (
        checkpoint_of(run, "auto")
        == checkpoint_of(None, str(run))
        == checkpoint_of(None, str(checkpoint))
        == checkpoint
    )
    check_out(run, "auto")
    check_out(run, str(checkpoint))
    with pytest.raises(CommandError, match="has a run already. Go on with it by --resume"):
        check_out(run, None)
    with pytest.raises(CommandError, match="exists already and is not empty"):
        check_out(tmp_path, "auto")
