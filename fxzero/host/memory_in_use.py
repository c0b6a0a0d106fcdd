"""How much memory is in use, as the allocator of CUDA or the operating system counts it."""

from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")


class MemoryInUse:
    """Reads the most bytes in use since it was made, over what was in use then."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before, self._most_before = self._read()

    def read(self) -> int | None:
        """None if the process was larger before, or where nobody counts."""
        _, most = self._read()
        return most - self._before if most > self._most_before else None

    def _read(self) -> tuple[int, int]:
        """Bytes in use now, and the most so far."""
        if self._device.type == "cuda":
            return torch.cuda.memory_allocated(self._device), torch.cuda.max_memory_allocated(self._device)
        if not _STATUS.exists():
            return 0, 0
        fields = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines() if line.startswith("Vm"))
        return tuple(int(fields[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))  # type: ignore[return-value]
