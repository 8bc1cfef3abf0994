"""Structures of inputs and outputs: the text of a nesting becomes a ``TreeSpec``, and nothing is imported or called.

    [1, {"type": "builtins.dict", "context": "['x']", "children_spec": [leaf]}]   =>   the nesting of {"x": leaf}

Torch reads such a text by importing what it names: the factory of a defaultdict, the class of an enum. Here a type is
one of a few containers, or one that the process itself has registered with ``torch.utils._pytree`` under that name.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict, deque, namedtuple
from collections.abc import Callable, Mapping
from typing import Any

from torch.utils import _pytree as pytree

from quant2e.documents.json_text import read_json
from quant2e.errors import FileFormatError

_FACTORIES: Mapping[str, Any] = {
    "list": list, "dict": dict, "set": set, "tuple": tuple, "int": int, "float": float, "bool": bool, "str": str,
}  # fmt: skip
"""What a defaultdict may be told to make."""

_PROTOCOL = 1
_WHAT = "the structure of the inputs and outputs"


def read_structure(text: str) -> pytree.TreeSpec:
    """The nesting that ``torch.utils._pytree.treespec_dumps`` wrote down. Raises `FileFormatError`."""
    found = read_json(text, _WHAT)
    if type(found) is not list or len(found) != 2 or found[0] != _PROTOCOL:
        raise FileFormatError(f"{_WHAT} has a form that is not read")
    return _spec(found[1])


def _spec(data: Any) -> pytree.TreeSpec:
    if type(data) is not dict or data.keys() != {"type", "context", "children_spec"}:
        raise FileFormatError(f"{_WHAT} has a form that is not read")
    name, context, children = data["type"], data["context"], data["children_spec"]
    if name is None and context is None and children == []:
        return pytree.treespec_leaf()
    if type(name) is not str or type(children) is not list:
        raise FileFormatError(f"{_WHAT} has a form that is not read")
    specs = [_spec(child) for child in children]
    kind, read = _CONTAINERS.get(name) or _own_type(_registered(name))
    return pytree.TreeSpec(kind, read(context, len(specs)), specs)


def _registered(name: str) -> Any:
    """A type of the process, registered under that name."""
    kind = pytree.SERIALIZED_TYPE_TO_PYTHON_TYPE.get(name)
    if kind is None or name == pytree.NO_SERIALIZED_TYPE_NAME_FOUND:  # whichever type without a name came last
        raise FileFormatError(
            f"its inputs or outputs hold a '{name[:80]}', a type that this process has not registered with "
            "torch.utils._pytree: import the library that does, and load again"
        )
    return kind


def _own_type(kind: Any) -> tuple[Any, Callable[[Any, int], Any]]:
    """A registered type, and how it reads what is written about an instance: plain data, or by its own function."""
    own = pytree.SUPPORTED_SERIALIZED_TYPES[kind].from_dumpable_context
    if own is None:
        return kind, lambda context, _: _plain(read_json(_string(context), _WHAT))
    if own.__module__ == pytree.__name__:  # of a named tuple; that of a defaultdict would import what is named
        return kind, _tuple_class
    return kind, lambda context, _: own(_plain(context))


def _none(context: Any, _: int) -> None:
    if context not in ("null", None):
        raise FileFormatError(f"{_WHAT} describes a list or tuple with {str(context)[:80]!r}")


def _keys(context: Any, count: int) -> list[Any]:
    return _checked_keys(read_json(_string(context), _WHAT), count)


def _checked_keys(keys: Any, count: int) -> list[Any]:
    plain = type(keys) is list and all(key is None or type(key) in (str, int, float, bool) for key in keys)
    if not plain or len(keys) != count or len(set(keys)) != count:
        raise FileFormatError(f"{_WHAT} has a dict without a plain key for each of its {count} entries")
    return list(keys)


def _factory_and_keys(context: Any, count: int) -> list[Any]:
    fields = {"default_factory_module", "default_factory_name", "dict_context"}
    if type(context) is not dict or context.keys() != fields:
        raise FileFormatError(f"{_WHAT} has a form that is not read")
    factory = context["default_factory_name"]
    if context["default_factory_module"] != "builtins" or type(factory) is not str or factory not in _FACTORIES:
        raise FileFormatError(f"it names code to call in the structure of its inputs: {str(factory)[:80]!r}")
    return [_FACTORIES[factory], _checked_keys(context["dict_context"], count)]


def _length(context: Any, count: int) -> int | None:
    limit = read_json(_string(context), _WHAT)
    if limit is not None and (type(limit) is not int or limit < count):
        raise FileFormatError(f"{_WHAT} has a deque of at most {str(limit)[:20]} for {count} entries")
    return limit


def _tuple_class(context: Any, count: int) -> Any:
    kind = _registered(_string(context))
    if not pytree.is_namedtuple_class(kind) or len(kind._fields) != count:
        raise FileFormatError(f"{_WHAT} names {kind.__name__}, which is no named tuple of {count} fields")
    return kind


def _plain(found: Any) -> Any:
    """What a type has written about an instance, when nothing in it names code."""
    pending = [found]
    while pending:
        value = pending.pop()
        if isinstance(value, dict):
            if "__enum__" in value:
                raise FileFormatError("it names code to import in the structure of its inputs: an enum")
            pending.extend(value.values())
        elif isinstance(value, list):
            pending.extend(value)
    return found


def _string(context: Any) -> str:
    if type(context) is not str:
        raise FileFormatError(f"{_WHAT} has a form that is not read")
    return context


_CONTAINERS: Mapping[str, tuple[Any, Callable[[Any, int], Any]]] = {
    "builtins.tuple": (tuple, _none),
    "builtins.list": (list, _none),
    "builtins.dict": (dict, _keys),
    "collections.OrderedDict": (OrderedDict, _keys),
    "collections.defaultdict": (defaultdict, _factory_and_keys),
    "collections.deque": (deque, _length),
    "collections.namedtuple": (namedtuple, _tuple_class),  # noqa: PYI024  # the function is torch's name for all of them
}
"""Containers of Python: their type, and how what is written beside their entries is read."""
