"""Who asks for a state dict, which says in what form it is wanted.

who asks                        form
torch.distributed.checkpoint    pieces
Accelerate's save_state         whole tensors, since only one rank writes them
somebody else                   what a rank holds
"""

import inspect


def is_asked_by_checkpoint() -> bool:
    """True inside of a function of torch.distributed.checkpoint: `dcp.save`, `get_state_dict`, and the like."""
    return _is_inside("torch.distributed.checkpoint")


def is_asked_for_whole() -> bool:
    """True inside of `accelerator.save_state`, which all ranks call, and which writes the optimizer of one."""
    return _is_inside("accelerate.checkpointing")


def _is_inside(module: str) -> bool:
    """True if a function of a module, or of one in that package, is running."""
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_globals.get("__name__", "").startswith(module):
            return True
        frame = frame.f_back
    return False
