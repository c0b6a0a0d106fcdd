"""Places of Python state that are no dict, seen as one: the variable of a closure, and the attributes of a class."""

import types
import weakref
from typing import Any


class Place(dict[Any, Any]):
    """A dict that holds nothing itself: its entries are elsewhere."""

    def get(self, key: Any, default: Any = None) -> Any:
        if key in self:
            return self[key]
        return default


class ClosureVariable(Place):
    """A variable of a function, which its inner functions read and set; the only key is its name."""

    def __init__(self, cell: types.CellType) -> None:
        super().__init__()
        self._cell = cell

    def __contains__(self, key: object) -> bool:
        try:
            self._cell.cell_contents  # noqa: B018 (raises where the cell is empty)
        except ValueError:
            return False
        return True

    def __getitem__(self, key: Any) -> Any:
        return self._cell.cell_contents

    def __setitem__(self, key: Any, value: Any) -> None:
        self._cell.cell_contents = value

    def pop(self, key: Any, default: Any = None) -> Any:
        value = self.get(key, default)
        if key in self:
            del self._cell.cell_contents
        return value


class ClassAttributes(Place):
    """The attributes that a class has of its own."""

    def __init__(self, kind: type) -> None:
        super().__init__()
        self.kind = kind

    def __contains__(self, key: object) -> bool:
        return key in vars(self.kind)

    def __getitem__(self, key: Any) -> Any:
        return vars(self.kind)[key]

    def __setitem__(self, key: Any, value: Any) -> None:
        setattr(self.kind, key, value)

    def pop(self, key: Any, default: Any = None) -> Any:
        value = self.get(key, default)
        if key in self:
            delattr(self.kind, key)
        return value


_known = weakref.WeakValueDictionary[int, Place]()
"""Places by the id of what they stand for, which they hold: a place is known by its own id."""


def variable_in(cell: types.CellType) -> ClosureVariable:
    """The variable that a cell holds."""
    place = _known.get(id(cell))
    if not isinstance(place, ClosureVariable):
        _known[id(cell)] = place = ClosureVariable(cell)
    return place


def attributes_of(kind: type) -> ClassAttributes:
    """The attributes that a class has of its own."""
    place = _known.get(id(kind))
    if not isinstance(place, ClassAttributes):
        _known[id(kind)] = place = ClassAttributes(kind)
    return place
