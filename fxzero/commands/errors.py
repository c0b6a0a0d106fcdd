"""How a command ends when the user has to change something."""

import os
import sys

from fxzero.errors import FxzeroError

ERROR_STATUS = 2
"""The exit status after `report`."""


class CommandError(Exception):
    """The command cannot go on for a reason that is the user's to change; the message says which and how."""


class OwnError(CommandError):
    """A CommandError that the other ranks on this machine need not have."""


def report(command: str, error: CommandError | FxzeroError) -> int:
    """Print an error: on the first rank of each machine, or on any that has it for itself.

    Returns:
        The exit status of the command.
    """
    if isinstance(error, OwnError) or os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"fxzero {command}: {error}", file=sys.stderr, flush=True)
    return ERROR_STATUS
