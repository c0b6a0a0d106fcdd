"""One persistent block of bytes, and views of it."""

import torch


class Arena:
    """One persistent block of bytes that all plans share. It grows in place: views of it stay valid."""

    def __init__(self, device: torch.device) -> None:
        self._storage = torch.empty(0, dtype=torch.uint8, device=device).untyped_storage()
        self.device = device
        self.num_grown = 0
        """How often it was made longer."""

    @property
    def nbytes(self) -> int:
        return self._storage.nbytes()

    def reserve(self, nbytes: int) -> bool:
        """Make the arena at least `nbytes` long; only while no bucket is in flight. True if it grew."""
        if nbytes <= self.nbytes:
            return False
        self._storage.resize_(nbytes)
        self.num_grown += 1
        return True

    def view(self, offset: int, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """`numel` elements at byte `offset`, as a flat tensor."""
        return storage_view(self._storage, offset, numel, dtype, self.device)


def storage_view(
    storage: torch.UntypedStorage, offset: int, numel: int, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """`numel` elements of `dtype` at byte `offset` of a storage, as a flat tensor that shares it."""
    return torch.empty(0, dtype=dtype, device=device).set_(storage, offset // dtype.itemsize, (numel,), (1,))
