"""Places of Python state that are no dict, seen as one: of closures and contexts, classes and slots."""

import contextvars
import types
import weakref
from collections.abc import Callable
from typing import Any, TypeVar, cast

from fxzero.capture.code.users_code import is_of_a_class_statement

PlaceType = TypeVar("PlaceType", bound="Place")


class Place(dict[Any, Any]):
    """A dict that holds nothing itself: its entries are elsewhere."""

    def get(self, key: Any, default: Any = None) -> Any:
        if key in self:
            return self[key]
        return default

    def pop(self, key: Any, default: Any = None) -> Any:
        value = self.get(key, default)
        if key in self:
            del self[key]
        return value


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

    def __delitem__(self, key: Any) -> None:
        del self._cell.cell_contents


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

    def __delitem__(self, key: Any) -> None:
        delattr(self.kind, key)


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

    def __delitem__(self, key: Any) -> None:
        object.__delattr__(self._obj, key)


class ContextValue(Place):
    """The value of a context variable; the only key is its name."""

    def __init__(self, variable: contextvars.ContextVar[Any]) -> None:
        super().__init__()
        self._variable = variable

    def __contains__(self, key: object) -> bool:
        try:
            self._variable.get()
        except LookupError:
            return False
        return True

    def __getitem__(self, key: Any) -> Any:
        return self._variable.get()

    def __setitem__(self, key: Any, value: Any) -> None:
        self._variable.set(value)


class ItemsIn(Place):
    """The items of a tuple, list or dict that an entry holds, whichever one that is; keys are indices, or its keys."""

    def __init__(self, owner: dict[Any, Any], key: Any) -> None:
        super().__init__()
        self._owner, self._key = owner, key

    def __contains__(self, key: object) -> bool:
        items = self._owner.get(self._key)
        return key in items if isinstance(items, dict) else items is not None and key in range(len(items))

    def __getitem__(self, key: Any) -> Any:
        return self._owner[self._key][key]

    def __setitem__(self, key: Any, value: Any) -> None:
        """Let the entry hold a copy with another item."""
        items = self._owner[self._key]
        if isinstance(items, dict):
            self._owner[self._key] = {**items, key: value}
        else:
            others = [value if index == key else each for index, each in enumerate(items)]
            self._owner[self._key] = type(items)(*others) if hasattr(items, "_fields") else type(items)(others)


_known = weakref.WeakValueDictionary[tuple[Any, Any], Place]()
"""Places by their class and the id of what they stand for, which they hold: a place is known by its own id."""


def _place_of(kind: Callable[[Any], PlaceType], target: Any) -> PlaceType:
    place = _known.get((kind, id(target)))
    if place is None:
        _known[kind, id(target)] = place = kind(target)
    return cast("PlaceType", place)


def variable_in(cell: types.CellType) -> ClosureVariable:
    """The variable that a cell holds."""
    return _place_of(ClosureVariable, cell)


def value_of(variable: contextvars.ContextVar[Any]) -> ContextValue:
    """The value of a context variable."""
    return _place_of(ContextValue, variable)


def attributes_of(kind: type) -> ClassAttributes:
    """The attributes that a class has of its own."""
    return _place_of(ClassAttributes, kind)


def slots_of(obj: Any) -> SlotsOf:
    """The attributes that an object has in `__slots__`."""
    return _place_of(SlotsOf, obj)


def items_in(owner: dict[Any, Any], key: Any) -> ItemsIn:
    """The items of the tuple, list or dict that an entry holds."""
    known = ItemsIn, (id(owner), key)
    place = _known.get(known)
    if place is None:
        _known[known] = place = ItemsIn(owner, key)
    return cast("ItemsIn", place)


def names_of_slots(kind: type) -> list[str]:
    """The names of the `__slots__` of a class and of those that it derives from."""
    return [
        name
        for base in kind.__mro__
        for name, value in vars(base).items()
        if isinstance(value, types.MemberDescriptorType) and is_of_a_class_statement(base)
    ]
