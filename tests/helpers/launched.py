"""What a launcher such as torchrun tells a process, for libraries that ask for it."""

import os
from collections.abc import Generator
from contextlib import contextmanager


@contextmanager
def launched(rank: int, world_size: int) -> Generator[None]:
    """Set the environment of a rank of torchrun inside of the block."""
    before = dict(os.environ)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "ACCELERATE_USE_CPU": "true"}
    os.environ |= {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
