"""How nodes, buckets and bytes read in schedules and errors: FQNs, never fx node names."""

from collections.abc import Iterable

from torch import fx

from fxzero.graph.nodes import COLLECTIVES, Role, grad_fqn, info, members, role


def format_bytes(nbytes: float) -> str:
    """Bytes in the largest binary unit that keeps at least one digit before the point: '768 B', '1.5 MiB'."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if nbytes < 1024 or unit == "GiB":
            break
        nbytes /= 1024
    return f"{nbytes:.0f} {unit}" if nbytes >= 100 or float(nbytes).is_integer() else f"{nbytes:.1f} {unit}"


def format_ops(num_ops: int) -> str:
    """A number of operators, of equal width in singular and plural: '1 op ', '12 ops'."""
    return f"{num_ops} op " if num_ops == 1 else f"{num_ops} ops"


def printable(name: str) -> str:
    """A name of a module, parameter or buffer as one line of text: 'a\\nb' where it has a line break.

    Such a name may be any text without a dot. Two names stay two.
    """
    if name.isprintable() and "\\" not in name:
        return name
    escaped = (char if char.isprintable() and char != "\\" else _escape(char) for char in name)
    return "".join(escaped)


def _escape(char: str) -> str:
    return char.encode("unicode_escape").decode()


def bucket_label(fqns: tuple[str, ...]) -> str:
    """The first member of a bucket, which no other bucket has, and the number of other members: 'layers.0.w +3'."""
    first = printable(fqns[0])
    return first if len(fqns) == 1 else f"{first} +{len(fqns) - 1}"


def block_depth(fqns: Iterable[str]) -> int:
    """Number of parts of a path, 1 or 2, that name a block without an index: as many as stand before an index.

    It is 1 beside `layers.0`, and 2 beside `transformer.h.0` or `model.encoder.layer.0`.
    """
    positions = [next((i for i, part in enumerate(fqn.split(".")) if part.isdigit()), 2) for fqn in fqns]
    return max(1, min(positions, default=1))


def block_of(fqn: str, depth: int) -> str:
    """The block a module belongs to: its path up to the first index, else its first `depth` parts."""
    parts = fqn.split(".")
    for index, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[: index + 1])
    return ".".join(parts[:depth])


def describe(node: fx.Node) -> str:
    """A node as the schedule prints it: its role and FQN, in quotes."""
    kind = role(node)
    if kind in COLLECTIVES:
        return f"'{kind.value} {bucket_label(members(node))}'"
    if kind is Role.WRITE_GRAD:
        return f"'write_grad {printable(grad_fqn(node))}'"
    return f"'{kind.value} {printable(info(node).fqn)}'" if info(node).fqn else f"'{kind.value}'"
