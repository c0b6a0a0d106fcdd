"""The commands of fxzero: `fxzero COMMAND` or `python -m fxzero COMMAND`."""

import argparse
import sys
from collections.abc import Sequence

from fxzero.commands import calibrate
from fxzero.train import command as train_command

_COMMANDS = {"train": train_command, "calibrate": calibrate}
"""Each a module with HELP, `add_arguments(parser)` and `run(arguments, argv) -> exit status`."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status.

    Args:
        argv: the command and its options; by default those of the process.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="fxzero", description="PyTorch ZeRO-3, scheduled at compile time.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in _COMMANDS.items():
        command.add_arguments(commands.add_parser(name, help=command.HELP))
    arguments = parser.parse_args(argv)
    return _COMMANDS[arguments.command].run(arguments, argv)


if __name__ == "__main__":
    sys.exit(main())
