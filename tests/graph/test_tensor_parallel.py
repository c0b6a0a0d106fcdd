"""Chunks of tensor parallelism lie where `torch.chunk` puts them."""

import pytest
import torch

from fxzero.graph.tensor_parallel import offsets_of_chunk


@pytest.mark.parametrize(("size", "num_ranks"), [(8, 2), (7, 3), (3, 4), (1, 2), (10, 4)])
@pytest.mark.parametrize("dim", [0, 1])
def test_offsets_are_those_of_chunks(size: int, num_ranks: int, dim: int) -> None:
    shape = (size, 5) if dim == 0 else (5, size)
    chunks = torch.arange(size * 5).view(shape).chunk(num_ranks, dim)
    for rank in range(num_ranks):
        offset = offsets_of_chunk(shape, dim, rank, num_ranks)
        assert offset[1 - dim] == 0
        assert offset[dim] == sum(chunk.shape[dim] for chunk in chunks[:rank])
