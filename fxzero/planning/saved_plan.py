"""A plan as data: to read, to keep as JSON, and to compare with another. It is not for running.

zero.schedule.saved().write("plan.json")
print(fxzero.planner.diff(SavedPlan.read("before.json"), SavedPlan.read("after.json")))
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from fxzero.errors import PlanError
from fxzero.graph.names import format_bytes
from fxzero.graph.schedule_text import format_diff, format_schedule
from fxzero.graph.variant import Variant
from fxzero.planning.plan import Plan, VariantPlan

FORMAT = "fxzero plan 1"
Facts: TypeAlias = "dict[str, Any]"


@dataclass(frozen=True)
class SavedPlan:
    """What was decided about one kind of call."""

    sharding: Facts
    """The number of ranks, of nodes, and what nodes are to each other."""
    recipe: Facts
    devices: Facts
    variants: dict[str, Facts]
    """For each variant, by what it does with gradients: its schedule as text, the generated code, the offset of each
    buffer in the arena, and the events between two streams."""

    @classmethod
    def of(cls, plan: Plan) -> SavedPlan:
        """The data of a plan."""
        devices = {name: str(device) for name, device in vars(plan.devices).items()}
        variants: dict[str, Facts] = {}
        for variant, planned in plan.variants.items():
            variants.setdefault(_label(variant, plan), _facts(planned))
        sharding = dataclasses.asdict(plan.step.sharding)
        return cls(sharding, json.loads(plan.recipe.to_json()), devices, json.loads(json.dumps(variants)))

    @property
    def digest(self) -> str:
        """Equal for two plans exactly if all that was decided is equal."""
        return hashlib.sha256(json.dumps(self._facts(), sort_keys=True).encode()).hexdigest()[:16]

    def _facts(self) -> Facts:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def to_json(self) -> str:
        """The plan as JSON, with its digest."""
        return json.dumps({"format": FORMAT, "digest": self.digest, **self._facts()}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> SavedPlan:
        """The inverse of `to_json`.

        Raises:
            PlanError: it is no plan of this format, or was changed since.
        """
        try:
            data: dict[str, Any] = json.loads(text)
            format, digest = data.pop("format"), data.pop("digest")
            saved = cls(**data)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise PlanError(f"This is no saved plan: {error}") from error
        if format != FORMAT:
            raise PlanError(f"This is a plan of format {format!r}; this version reads {FORMAT!r}.")
        if digest != saved.digest:
            raise PlanError(f"This plan was changed since it was saved: its digest is {saved.digest}, not {digest}.")
        return saved

    def write(self, path: str | Path) -> None:
        """Save it as JSON."""
        Path(path).write_text(self.to_json() + "\n")

    @classmethod
    def read(cls, path: str | Path) -> SavedPlan:
        """Read what `write` saved.

        Raises:
            PlanError: names the file.
        """
        try:
            return cls.from_json(Path(path).read_text())
        except PlanError as error:
            raise PlanError(f"{path}: {error}") from error


def _label(variant: Variant, plan: Plan) -> str:
    return variant.label if plan.step.has_backward else "forward only"


def _facts(planned: VariantPlan) -> Facts:
    memory = planned.arena.memory
    placed = zip(memory.buffers, memory.offsets, strict=True)
    buffers = [[b.kind.value, b.name, b.nbytes, b.start, b.end, offset] for b, offset in placed]
    events = planned.events
    return {
        "schedule": format_schedule(planned.step),
        "code": planned.code.source,
        "arena_bytes": planned.arena.nbytes,
        "buffers": buffers,
        "events": None if events is None else [[edge.before, edge.after] for edge in events.edges],
    }


def diff(before: SavedPlan, after: SavedPlan) -> str:
    """What differs between two plans, for people; empty if nothing does.

    Fields of the recipe, then for each variant its schedule as a unified diff, its memory, and whether its code,
    offsets or events differ beside that.
    """
    lines: list[str] = []
    for name in ("sharding", "devices", "recipe"):
        lines += _changed(name, getattr(before, name), getattr(after, name))
    for label in dict.fromkeys((*before.variants, *after.variants)):
        old, new = before.variants.get(label), after.variants.get(label)
        if old is None or new is None:
            lines.append(f"{label}: only in the plan {'after' if old is None else 'before'}")
        elif old != new:
            lines += [f"{label}:", *_changed_variant(old, new)]
    return "\n".join(lines)


def _changed(name: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    keys = dict.fromkeys((*old, *new))
    return [f"{name}.{key}: {old.get(key)} -> {new.get(key)}" for key in keys if old.get(key) != new.get(key)]


def _changed_variant(old: Facts, new: Facts) -> list[str]:
    lines = format_diff(old["schedule"], new["schedule"]).splitlines()
    if old["arena_bytes"] != new["arena_bytes"]:
        lines.append(f"arena: {format_bytes(old['arena_bytes'])} -> {format_bytes(new['arena_bytes'])}")
    also = [name for name in ("code", "buffers", "events") if old[name] != new[name]]
    return [*lines, f"different: {', '.join(also)}"] if also else lines
