"""Options in TOML files: `--config` reads one, and a run that can be resumed writes one."""

import argparse
import difflib
import json
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fxzero.commands.errors import CommandError


def read_toml(path: Path) -> dict[str, Any]:
    """The content of a file.

    Raises:
        CommandError: it is no TOML, or Python 3.10 has no library that reads it.
        OSError: it cannot be read.
    """
    library = next((name for name in ("tomllib", "tomli") if find_spec(name) is not None), None)
    if library is None:
        raise CommandError(f"{path} is read by Python 3.11, or by Python 3.10 with tomli: pip install tomli")
    try:
        return import_module(library).loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CommandError(f"{path} is no TOML file: {error}.") from error


def write_toml(path: Path, values: Mapping[str, Any]) -> None:
    """Write a flat table of texts, numbers, truth values and paths; None is left out."""
    kept = {name: value for name, value in values.items() if value is not None}
    plain = {name: str(value) if isinstance(value, Path) else value for name, value in kept.items()}
    lines = [f"{name} = {json.dumps(value, ensure_ascii=False)}" for name, value in plain.items()]
    path.write_text("\n".join([*lines, ""]), encoding="utf-8")


def as_options(path: Path, table: Mapping[str, Any], kinds: Mapping[str, Callable[[str], Any]]) -> dict[str, Any]:
    """The options in a table, by the names of their fields.

    Args:
        path: of the file, for errors.
        kinds: what makes a value of the text of each option.

    Raises:
        CommandError: a key is no option, or a value is none of that option.
    """
    options: dict[str, Any] = {}
    for key, value in table.items():
        name = key.replace("-", "_")
        if name not in kinds:
            close = difflib.get_close_matches(name, kinds, n=1, cutoff=0.0)
            raise CommandError(f"{path}: {key} is no option of this command; the nearest is {close[0]}.")
        options[name] = _value(path, key, value, kinds[name])
    return options


def _value(path: Path, key: str, value: Any, kind: Callable[[str], Any]) -> Any:
    if kind is bool and isinstance(value, bool):
        return value
    try:
        if kind is bool or isinstance(value, bool | list | dict):
            raise ValueError(value)
        return kind(str(value))
    except (ValueError, argparse.ArgumentTypeError) as error:
        wanted = {bool: "true or false", int: "a whole number", float: "a number"}.get(kind, "a value of this option")  # type: ignore[arg-type]
        raise CommandError(f"{path}: {key} is {value!r}; it must be {wanted}.") from error
