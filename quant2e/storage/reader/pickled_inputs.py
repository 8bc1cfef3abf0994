"""Example inputs of older files, and of torch's: a pickle of tensors and containers, interpreted as data.

A pickle is a program for a small machine, of which a few instructions are needed for tuples, lists, dicts, numbers,
text and tensors. They are carried out here; a name in the pickle is compared with the few that stand for tensors, and
never imported. Any other instruction or name makes the file one that is refused.
"""

from __future__ import annotations

import pickletools
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from quant2e.errors import FileFormatError
from quant2e.storage.reader.archive import records_of
from quant2e.storage.reader.tensors import own_memory, strided

_MOST_VALUES = 100_000
_MARK = object()

_STORAGES: Mapping[str, torch.dtype] = {
    "FloatStorage": torch.float32, "DoubleStorage": torch.float64, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64, "ComplexDoubleStorage": torch.complex128,
}  # fmt: skip
_PLAIN_DTYPES = ("uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz")

_NUMBERS = ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "INT", "LONG")
_PUSHED: Mapping[str, Callable[[Any], Any]] = {
    **dict.fromkeys(_NUMBERS, lambda argument: argument),
    "EMPTY_TUPLE": lambda _: (), "EMPTY_LIST": lambda _: [], "EMPTY_DICT": lambda _: {}, "NONE": lambda _: None,
    "NEWTRUE": lambda _: True, "NEWFALSE": lambda _: False, "MARK": lambda _: _MARK,
    "GLOBAL": lambda argument: _Name(*argument.split(" ", 1)),
}  # fmt: skip
"""Instructions that put a value on the stack, and the value."""

_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class _Name(NamedTuple):
    """A name that a pickle would have imported."""

    module: str
    name: str


_FACTORIES: Mapping[Any, Any] = {
    _Name(module, kind.__name__): kind
    for kind in (list, dict, set, tuple, int, float, bool, str)
    for module in ("__builtin__", "builtins")
}
"""What a defaultdict may be told to make."""


class _Memory(NamedTuple):
    """Memory of tensors, and the dtype that its name gives it; None: the tensors say."""

    name: str
    data: memoryview
    dtype: torch.dtype | None


def inert_inputs(data: memoryview) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Positional and keyword inputs from what ``torch.save`` wrote; None: an empty record. Raises `FileFormatError`."""
    if not data:
        return None
    try:
        records = records_of(data)
        inputs = _Machine(records, len(data)).run(records["data.pkl"])
    except FileFormatError as error:
        raise FileFormatError(f"its example inputs are not plain tensors, numbers and containers: {error}") from error
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError, OverflowError) as error:
        # pickletools, and torch for a tensor that cannot be, refuse in their own words
        raise FileFormatError(f"its example inputs are damaged: {error}") from error
    if type(inputs) is not tuple or len(inputs) != 2 or type(inputs[0]) is not tuple or type(inputs[1]) is not dict:
        raise FileFormatError("its example inputs are not positional and keyword inputs")
    if not all(type(name) is str for name in inputs[1]):
        raise FileFormatError("its example inputs have names that are no text")
    return inputs


class _Machine:
    """The stack, the memo, and the records that hold the memory of tensors."""

    def __init__(self, records: Mapping[str, memoryview], size: int) -> None:
        self._records, self._size = records, size
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self._memories: dict[str, Tensor] = {}

    def run(self, pickle: memoryview) -> Any:
        """The value that a pickle stands for."""
        made = 0
        for count, (opcode, argument, _) in enumerate(pickletools.genops(bytes(pickle))):
            made += opcode.name.startswith("EMPTY_") or opcode.name in ("TUPLE", *_TUPLES)
            if count > 20 * _MOST_VALUES or made > _MOST_VALUES:
                raise FileFormatError("they are too many")
            if opcode.name == "STOP":
                (value,) = self._stack
                return self._checked(value)
            self._step(opcode.name, argument)
        raise FileFormatError("they end too early")

    def _step(self, name: str, argument: Any) -> None:
        """Carry out one instruction: it puts a value on the stack, or changes what lies there."""
        if name in _PUSHED:
            self._stack.append(_PUSHED[name](argument))
        elif name in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
            self._memo[len(self._memo) if name == "MEMOIZE" else argument] = self._stack[-1]
        elif name in ("APPEND", "APPENDS", "SETITEM", "SETITEMS"):
            self._fill(name)
        elif name in ("BINGET", "LONG_BINGET"):
            self._stack.append(self._memo[argument])
        elif name not in ("PROTO", "FRAME"):
            self._stack.append(self._made(name))

    def _made(self, name: str) -> Any:
        """What an instruction makes of the values on top of the stack."""
        if name in _TUPLES:
            return tuple(self._pop(_TUPLES[name]))
        if name == "TUPLE":
            return tuple(self._to_mark())
        if name == "BINPERSID":
            return self._memory(*self._pop(1))
        if name == "REDUCE":
            return self._call(*self._pop(2))
        raise FileFormatError(f"they hold the instruction {name}")

    def _pop(self, count: int) -> list[Any]:
        found = self._stack[-count:]
        if len(found) != count or any(value is _MARK for value in found):
            raise FileFormatError("they are damaged")
        del self._stack[-count:]
        return found

    def _to_mark(self) -> list[Any]:
        found = []
        while (value := self._stack.pop()) is not _MARK:
            found.append(value)
        return found[::-1]

    def _fill(self, name: str) -> None:
        values = self._to_mark() if name.endswith("S") else self._pop(1 if name == "APPEND" else 2)
        owner = self._stack[-1]
        if name.startswith("APPEND") and type(owner) is list:
            owner.extend(values)
        elif name.startswith("SETITEM") and type(owner) in (dict, OrderedDict, defaultdict):
            keys, held = values[::2], values[1::2]
            if not all(type(key) in (str, int, float, bool) for key in keys):
                raise FileFormatError("they hold a dict with keys that are no text or numbers")
            owner.update(zip(keys, held, strict=True))
        else:
            raise FileFormatError("they are damaged")

    def _checked(self, value: Any) -> Any:
        """A value without names and memories left over in it.

        What is shared is counted as often as it is seen: a few hundred bytes can share their way to a billion leaves.
        """
        pending, left = [value], _MOST_VALUES
        while pending:
            each = pending.pop()
            left -= 1
            if left < 0:
                raise FileFormatError(f"they are more than {_MOST_VALUES}")
            if isinstance(each, (_Name, _Memory)) or each is _MARK:
                raise FileFormatError("they hold something else than inputs")
            if isinstance(each, dict):
                pending.extend(each.values())
            elif isinstance(each, (tuple, list)):
                pending.extend(each)
        return value

    def _memory(self, key: Any) -> _Memory:
        kind, storage, name, location, _ = key
        if kind != "storage" or not isinstance(storage, _Name) or location != "cpu" or not str(name).isdigit():
            raise FileFormatError("they hold memory of an unknown kind")
        if storage == _Name("torch.storage", "UntypedStorage"):
            return _Memory(str(name), self._records[f"data/{name}"], None)
        if storage.module != "torch" or storage.name not in _STORAGES:
            raise FileFormatError(f"they hold {storage.module}.{storage.name}"[:120])
        return _Memory(str(name), self._records[f"data/{name}"], _STORAGES[storage.name])

    def _call(self, function: Any, arguments: Any) -> Any:
        if function == _Name("collections", "OrderedDict") and arguments == ():
            return OrderedDict()
        if function == _Name("collections", "defaultdict") and len(arguments) == 1 and arguments[0] in _FACTORIES:
            return defaultdict(_FACTORIES[arguments[0]])
        if function == _Name("torch._utils", "_rebuild_tensor_v2") and len(arguments) in (6, 7):
            memory, offset, sizes, strides, grad, hooks, *_ = arguments
            return self._tensor(memory, memory.dtype, offset, sizes, strides, grad, hooks)
        if function == _Name("torch._utils", "_rebuild_tensor_v3") and len(arguments) in (7, 8):
            memory, offset, sizes, strides, grad, hooks, dtype, *_ = arguments
            if not isinstance(dtype, _Name) or dtype.module != "torch" or dtype.name not in _PLAIN_DTYPES:
                raise FileFormatError("they hold a tensor of an unknown dtype")
            return self._tensor(memory, getattr(torch, dtype.name), offset, sizes, strides, grad, hooks)
        if function == _Name("torch._utils", "_rebuild_parameter") and len(arguments) == 3:
            tensor, grad, hooks = arguments
            if isinstance(tensor, Tensor) and type(grad) is bool and not hooks:
                return torch.nn.Parameter(tensor, requires_grad=grad and tensor.is_floating_point())
        named = f"{function.module}.{function.name}" if isinstance(function, _Name) else "something"
        raise FileFormatError(f"they would call {named}"[:120])

    def _tensor(self, memory: Any, dtype: Any, offset: Any, sizes: Any, strides: Any, grad: Any, hooks: Any) -> Tensor:
        plain = type(sizes) is tuple and type(strides) is tuple and type(grad) is bool and not hooks
        if not isinstance(memory, _Memory) or not plain or not all(type(n) is int for n in (offset, *sizes, *strides)):
            raise FileFormatError("they hold a tensor that is damaged")
        held = self._memories.get(memory.name)
        if held is None:
            held = self._memories[memory.name] = own_memory(memory.data, dtype)
        if held.dtype != dtype:
            raise FileFormatError("they hold one memory as tensors of several dtypes")
        tensor = strided(held, sizes, strides, offset, "a tensor", self._size)
        return tensor.requires_grad_(grad and tensor.is_floating_point())
