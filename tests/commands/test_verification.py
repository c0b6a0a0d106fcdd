"""`fxzero.verify`, and the command: equal, different and why, refused."""

import re

import pytest
import torch
from torch import nn

import fxzero
from fxzero.__main__ import main
from fxzero.errors import DifferentNumbersError, InputMismatchError
from fxzero.testing import run_ranks
from tests.distributed import verification_workers
from tests.distributed.verification_workers import Counting, Mixed

WORKERS = "tests.distributed.verification_workers"


def test_ranks_compare_with_replicated_training() -> None:
    texts = run_ranks(3, verification_workers.verify)
    assert len({*texts}) == 1
    assert texts[0].startswith(
        "Mixed on 3 ranks, against plain PyTorch:\n"
        "  loss                     1 of 1 equal\n"
        "  gradients                6 of 6 equal\n"
        "  parameters after a step  6 of 6 equal\n"
        "  buffers                  3 of 3 equal\n"
        "All are equal, bit for bit.\n"
    )
    assert re.search(r"The first that differs on rank \d: gradient of \S+ differs in \d+ of \d+ elements", texts[0])
    assert "Why it may: reduce_dtype=torch.bfloat16 computes or sends in narrower types." in texts[0]


def test_what_differs_is_named() -> None:
    result = fxzero.verify(Counting(), torch.ones(2, 4))
    assert not result.ok
    assert (result.differences[0].kind, result.differences[0].rank) == ("loss", 0)
    with pytest.raises(DifferentNumbersError, match="plain PyTorch differs from itself in two runs"):
        result.raise_if_different()


def test_what_cannot_be_compared_is_refused() -> None:
    model = Mixed()
    with pytest.raises(ValueError, match="returns no scalar that requires grad: pass loss="):
        fxzero.verify(nn.Linear(3, 2), torch.ones(2, 3))
    assert fxzero.verify(nn.Linear(3, 2), torch.ones(2, 3), loss=torch.Tensor.sum).ok
    with pytest.raises(ValueError, match="verify takes no resume="):
        fxzero.verify(model, torch.ones(2, 7), resume="folder")
    with pytest.raises(InputMismatchError, match="is on the meta device"):
        fxzero.verify(model.to("meta"), torch.ones(2, 7))
    with pytest.raises(InputMismatchError, match="pass the plain model"):
        fxzero.verify(fxzero.compile(Mixed()), torch.ones(2, 7))


def test_the_command_tells_by_its_status(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", f"{WORKERS}:build", "--device", "cpu"]) == 0
    assert "All are equal, bit for bit." in capsys.readouterr().out
    assert main(["verify", f"{verification_workers.__file__}:build_counting", "--device", "cpu"]) == 1
    assert "The first that differs: loss" in capsys.readouterr().out
    assert main(["verify", f"{WORKERS}:nothing"]) == 2
    assert main(["verify", "build"]) == 2
    printed = capsys.readouterr().err
    assert "has no function nothing" in printed
    assert "'build' must name a function" in printed
