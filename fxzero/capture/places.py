"""Places of Python state that are no dict, seen as one: a variable of a closure, attributes of a class, slots."""

import types
import weakref
from typing import Any

_HEAP_TYPE = 1 << 9
"""Bit of `type.__flags__`: the class was made by a class statement."""


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


class SlotsOf(Place):
    """The attributes that an object has in `__slots__`."""

    def __init__(self, obj: Any) -> None:
        super().__init__()
        self._obj = obj

    def __contains__(self, key: object) -> bool:
        return hasattr(self._obj, str(key))

    def __getitem__(self, key: Any) -> Any:
        return getattr(self._obj, key)

    def __setitem__(self, key: Any, value: Any) -> None:
        object.__setattr__(self._obj, key, value)  # also where the class is frozen

    def pop(self, key: Any, default: Any = None) -> Any:
        value = self.get(key, default)
        if key in self:
            object.__delattr__(self._obj, key)
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


def slots_of(obj: Any) -> SlotsOf:
    """The attributes that an object has in `__slots__`."""
    place = _known.get(id(obj))
    if not isinstance(place, SlotsOf):
        _known[id(obj)] = place = SlotsOf(obj)
    return place


def names_of_slots(kind: type) -> list[str]:
    """The names of the `__slots__` of a class and of those that it derives from."""
    return [
        name
        for base in kind.__mro__
        for name, value in vars(base).items()
        if isinstance(value, types.MemberDescriptorType) and base.__flags__ & _HEAP_TYPE
    ]
