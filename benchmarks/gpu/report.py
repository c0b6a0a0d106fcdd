"""The tables as Markdown, with the ratio of each row to the first row of its kind that is not fxzero."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tabulate import tabulate

_COLUMNS = ("ms", "host_ms", "first_s", "peak_mib", "retries")


def baseline(rows: Sequence[dict[str, Any]], row: dict[str, Any]) -> float | None:
    """The milliseconds that a row is compared with: of torch.compile or FSDP2, else the first other system."""
    kind = row["system"].partition(":")[2]
    peers = [each for each in rows if "ms" in each and not each["system"].startswith("fxzero")]
    alike = [each for each in peers if each["system"].partition(":")[2] == kind] or peers
    first = ("compile_ro", "compile", "fsdp2compile", "fsdp2")
    alike.sort(key=lambda each: first.index(base) if (base := each["system"].split(":")[0]) in first else len(first))
    return alike[0]["ms"] if alike else None


def markdown(title: str, rows: Sequence[dict[str, Any]]) -> str:
    """One table."""
    lines: list[list[Any]] = []
    for row in rows:
        if "left_out" in row:
            lines.append([row["system"], row["left_out"]])
            continue
        peer = baseline(rows, row)
        ratio = f"{row['ms'] / peer:.2f}" if peer else ""
        lines.append([row["system"], *(row.get(column, "") for column in _COLUMNS), ratio])
    headers = ("system", "ms", "host ms", "first s", "peak MiB", "retries", "ms / peer's")
    return f"## {title}\n\n{tabulate(lines, headers=headers, tablefmt='github')}\n"
