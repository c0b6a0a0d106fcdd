"""What a function's code names outside of its own variables: globals, attributes of modules and classes, imports.

SCALE, settings.SCALE, import settings; settings.SCALE, from settings import SCALE      one slot is read
getattr(settings, name), vars(settings), globals()                                       the whole module is read
"""

import dis
import importlib.util
import os
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from fxzero.capture.code.users_code import is_guarded_class, is_users_class, is_users_module
from fxzero.capture.places import attributes_of
from fxzero.capture.slots import Kind, Read, class_with, held

_OF_ATTRIBUTES = ("LOAD_ATTR", "LOAD_METHOD", "STORE_ATTR", "DELETE_ATTR")
_BETWEEN = ("PRECALL", "CACHE", "EXTENDED_ARG", "COPY", "DUP_TOP")
"""Instructions that may lie between an object and the use of its attribute."""


def of_global(space: dict[str, Any], name: str) -> Read:
    """The read of a global."""
    return Read(space, name, Kind.GLOBAL, *held(space[name]), str(space.get("__name__", "")))


def of_module(space: dict[str, Any]) -> list[Read]:
    """The reads of all values that a module holds."""
    return [
        of_global(space, name)
        for name, value in list(space.items())
        if not (name.startswith("__") or callable(value) or isinstance(value, types.ModuleType))
    ]


@dataclass
class NamedByCode:
    """What one code object names; made anew if a module was not imported yet."""

    code: types.CodeType
    space: dict[str, Any]
    """The globals of the code."""
    reads: list[Read] = field(default_factory=list[Read])
    stores: list[tuple[dict[Any, Any], str, str]] = field(default_factory=list[Any])
    """The dict, the key and the name of each global or attribute that it sets."""
    cells: set[str] = field(default_factory=set[str])
    """The variables of its closure that it sets."""
    is_complete: bool = True
    """False if it imports a module that is not imported yet."""

    def __post_init__(self) -> None:
        self._locals: dict[str, Any] = {}
        """Variables that hold a module or something of it."""
        self._imported: Any = None
        self._is_dotted = False
        """True after `import a.b as c`, which takes b from a."""
        self._loaded: list[Any] = []
        owner: Any = None
        instructions = [each for each in dis.get_instructions(self.code) if each.opname not in _BETWEEN]
        for index, each in enumerate(instructions):
            following = instructions[index + 1].opname if index + 1 < len(instructions) else ""
            owner = self._step(each, owner, instructions[max(index - 2, 0) : index])
            if is_users_module(owner) and following not in (*_OF_ATTRIBUTES, "STORE_FAST", "IMPORT_FROM"):
                self._whole(vars(owner))

    def _step(self, each: dis.Instruction, owner: Any, before: list[dis.Instruction]) -> Any:
        """The object that an instruction brings forth, if it is a module, a class or something of them."""
        name, kind = each.argval, each.opname
        if kind in ("LOAD_GLOBAL", "LOAD_NAME") and name in self.space:
            self.reads.append(of_global(self.space, name))
            self._loaded.append(self.space[name])
            return self.space[name]
        if kind == "LOAD_GLOBAL" and name == "globals":
            self._whole(self.space)
        elif kind == "STORE_GLOBAL":
            self.stores.append((self.space, name, f"{self.space.get('__name__', '')}.{name} (global)"))
        elif kind == "STORE_DEREF" and name in self.code.co_freevars:
            self.cells.add(name)
        elif kind == "STORE_ATTR":
            self.stores += [
                (place, name, f"{path}.{name}") for value in self._loaded for place, path in self._of(value)
            ]
        elif kind == "IMPORT_NAME":
            return self._import(name, before)
        elif kind == "IMPORT_FROM":
            found = self._attribute(self._imported, name)
            self._imported = found if isinstance(found, types.ModuleType) and self._is_dotted else self._imported
            return found
        elif kind == "STORE_FAST":
            self._locals[name] = owner
        elif kind.startswith("LOAD_FAST") and isinstance(name, str):
            if (found := self._locals.get(name)) is not None:
                self._loaded.append(found)
            return found
        elif kind in ("LOAD_ATTR", "LOAD_METHOD"):
            return self._attribute(owner, name)
        return None

    def _import(self, name: str, before: list[dis.Instruction]) -> Any:
        level, wanted = (each.argval for each in before)
        full = importlib.util.resolve_name("." * level + name, self.space.get("__package__")) if level else name
        self._is_dotted = not wanted
        found = sys.modules.get(full if wanted else full.partition(".")[0])
        self.is_complete &= full in sys.modules
        self._imported = found
        return found

    def _attribute(self, owner: Any, name: str) -> Any:
        if isinstance(owner, types.ModuleType):
            found = vars(owner).get(name)
            if is_users_module(owner) and name == "__dict__":
                self._whole(vars(owner))
            elif owner is os and name in ("environ", "getenv"):
                self.reads.append(
                    Read(os.environ, "_data", Kind.ATTRIBUTE, *held(vars(os.environ)["_data"]), "os.environ")
                )
            elif name in vars(owner) and (is_users_module(owner) or callable(found)):
                self.reads.append(of_global(vars(owner), name))
            return found
        if isinstance(owner, type) and not name.startswith("__"):
            base = class_with(owner, name)
            if base is not None and is_guarded_class(base):
                self.reads.append(Read(owner, name, Kind.CLASS, *held(vars(base)[name]), owner.__qualname__))
        return None

    def _whole(self, space: dict[str, Any]) -> None:
        for read in of_module(space):
            self.reads.append(read)
            self.stores.append((space, read.name, f"{read.path}.{read.name}"))

    def _of(self, value: Any) -> Iterator[tuple[dict[Any, Any], str]]:
        """The attributes of a user's module or class, and its name; nothing for other values."""
        if is_users_module(value):
            yield vars(value), value.__name__
        elif isinstance(value, type) and is_users_class(value):
            yield attributes_of(value), value.__qualname__


def function_of(frame: types.FrameType) -> types.FunctionType | None:
    """The function that runs, if it is a method of its first argument or a global; None if it is not found there."""
    code = frame.f_code
    places: list[Any] = [frame.f_globals]
    if code.co_argcount:
        first = frame.f_locals.get(code.co_varnames[0])
        places += map(vars, (first if isinstance(first, type) else type(first)).__mro__)
    for place in places:
        found = place.get(code.co_name)
        found = getattr(found, "__func__", getattr(found, "fget", found))
        if isinstance(found, types.FunctionType) and found.__code__ is code:
            return found
    return None
