"""Who asks for a state dict: torch.distributed.checkpoint, which wants pieces, or somebody else, who wants tensors."""

import inspect


def is_asked_by_checkpoint() -> bool:
    """True inside of a function of torch.distributed.checkpoint: `dcp.save`, `get_state_dict`, and the like."""
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_globals.get("__name__", "").startswith("torch.distributed.checkpoint"):
            return True
        frame = frame.f_back
    return False
