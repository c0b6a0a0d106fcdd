"""Freed memory that the process keeps: counted in page faults, in a process of its own."""

import ctypes
import subprocess
import sys

import pytest

import fxzero
from fxzero.host.allocator import _apply

ALLOCATE = """
import resource
import torch
import fxzero

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def step():  # 27 MiB that live together, and then a block larger than glibc ever keeps by itself
    blocks = [torch.ones(mib << 18) for mib in (1, 8, 2, 4, 8, 1, 3)]
    blocks.clear()
    torch.ones(40 << 18)

def faults_of_steps():
    for _ in range(3):
        step()
    before = faults()
    for _ in range(5):
        step()
    return faults() - before

print(faults_of_steps())
assert fxzero.keep_freed_memory()
assert fxzero.keep_freed_memory()
print(faults_of_steps())
"""

is_glibc = sys.platform == "linux" and hasattr(ctypes.CDLL(None), "gnu_get_libc_version")


@pytest.mark.skipif(not is_glibc, reason="the C library is not glibc")
@pytest.mark.exhaustive
def test_steps_cost_a_tenth_of_the_page_faults_when_freed_memory_is_kept():
    done = subprocess.run([sys.executable, "-c", ALLOCATE], capture_output=True, text=True, check=True)
    default, kept = map(int, done.stdout.split())
    assert default > 10_000
    assert kept * 10 <= default


class Refusing:
    """A glibc that takes no setting."""

    gnu_get_libc_version = None

    def mallopt(self, parameter: int, value: int) -> int:
        """Returns 0, which is failure."""
        return 0


@pytest.mark.parametrize("libc", [None, object(), Refusing()], ids=["no libc", "no mallopt", "refuses"])
def test_nothing_applies_when_the_c_library_has_no_such_setting(libc: object):
    assert _apply(libc) is False


def test_result_says_whether_the_c_library_is_glibc():
    if not is_glibc:
        assert fxzero.keep_freed_memory() is False
