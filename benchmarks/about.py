"""What makes a measurement repeatable: command, date, machine, versions."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def about(program: str) -> dict[str, Any]:
    """As JSON can hold it; `program` is what the arguments of this process were given to."""
    return {
        "command": " ".join([program, *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "machine": _processor(),
        "kernel": platform.release(),
        "versions": {"fxzero": _commit(), "python": platform.python_version(), **_packages("torch", "deepspeed")},
    }


def one_line(described: dict[str, Any]) -> str:
    """Date, machine and versions in print."""
    versions = ", ".join(f"{package} {number}" for package, number in described["versions"].items())
    return f"{described['date']}, {described['machine']}, Linux {described['kernel']}, {versions}."


def heading(program: str) -> str:
    """What stands above a table in print."""
    described = about(program)
    return f"{one_line(described)}\n\n    {described['command']}\n"


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores"


def _commit() -> str:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return "of an unknown commit"
    return done.stdout.strip() or "of an unknown commit"


def _packages(*names: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
