"""What is measured takes nothing from the user: not a random number."""

import torch

from fxzero.cost.calibrate import measure_device


def test_measuring_leaves_the_generator_as_it_was() -> None:
    before = torch.get_rng_state()
    measure_device(torch.device("cpu"))
    assert torch.equal(torch.get_rng_state(), before)
