"""The commands of fxzero: `fxzero COMMAND` or `python -m fxzero COMMAND`."""

import argparse
import contextlib
import io
import sys
from collections.abc import Sequence

from fxzero.commands.progress import Progress
from fxzero.commands.signals import ending_at_once


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status.

    Args:
        argv: the command and its options; by default those of the process.
    """
    with contextlib.ExitStack() as stack:
        if argv is None:
            stack.enter_context(ending_at_once())
            _print_any_name()
        argv = list(sys.argv[1:] if argv is None else argv)
        progress = Progress("train")
        stack.callback(progress.stop)
        if argv[:1] == ["train"] and not {"-h", "--help"} & {*argv}:
            progress.at("importing torch")  # takes seconds, more on a network's disk
        return _run(argv, progress)


def _run(argv: list[str], progress: Progress) -> int:
    from fxzero.commands import calibrate, export, verify
    from fxzero.train import command as train

    parser = argparse.ArgumentParser(prog="fxzero", description="PyTorch ZeRO-3, scheduled at compile time.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    train.add_arguments(commands.add_parser("train", help=train.HELP))
    calibrate.add_arguments(commands.add_parser("calibrate", help=calibrate.HELP))
    export.add_arguments(commands.add_parser("export", help=export.HELP))
    verify.add_arguments(commands.add_parser("verify", help=verify.HELP))
    arguments = parser.parse_args(argv)
    if arguments.command == "train":
        return train.run(arguments, argv, progress)
    if arguments.command == "export":
        return export.run(arguments)
    if arguments.command == "verify":
        return verify.run(arguments, argv)
    return calibrate.run(arguments, argv)


def _print_any_name() -> None:
    """Let file names be printed that are no text in the encoding of the screen."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


if __name__ == "__main__":
    sys.exit(main())
