"""Schema of a program's JSON: every key that torch.export writes, with the kind of its value; anything else is refused.

The tables follow torch's own schema, version 8 (``torch/_export/serde/schema.py``): an *object* has named fields, a
*union* has exactly one of several keys, which says what its value is. Left out is what a plain program does not hold:
script objects, tokens, pickled payloads, kernels.
"""

from __future__ import annotations

import keyword
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from quant2e.errors import FileFormatError
from quant2e.storage.reader.schema_numbers import DTYPES, LAYOUTS, MEMORY_FORMATS

Check: TypeAlias = Callable[[Any], None]
"""Raises `_SchemaError` when a value is not of its kind."""

_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*", re.ASCII)
_PATH_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_:/+-]*", re.ASCII)
_LONGEST_NAME = 500
_DEEPEST_PATH = 64

_LOW, _HIGH = -(1 << 63), (1 << 63) - 1


class _SchemaError(Exception):
    """What is wrong, and the keys that lead there, from the innermost on."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.keys: list[str] = []


def check_schema(value: Any, kind: Check, what: str) -> None:
    """Raise `FileFormatError`, naming ``what`` and the place in it, unless ``value`` is of that kind."""
    try:
        kind(value)
    except _SchemaError as wrong:
        place = "".join(reversed(wrong.keys))
        raise FileFormatError(f"{what} is not one that is read: {place or 'it'} {wrong}") from wrong


def is_identifier(name: str) -> bool:
    """Whether a name can stand in Python source as it is, and means nothing else there."""
    return (
        _IDENTIFIER.fullmatch(name) is not None
        and len(name) <= _LONGEST_NAME
        and not keyword.iskeyword(name)
        and not (name.startswith("__") and name.endswith("__"))
    )


def is_path(text: str) -> bool:
    """Whether each part of a dotted path is an identifier, or the key of a module list or dict that is plain text."""
    parts = text.split(".")
    return len(parts) <= _DEEPEST_PATH and len(text) <= _LONGEST_NAME and all(map(_is_path_part, parts))


def _is_path_part(part: str) -> bool:
    return is_identifier(part) if part.isidentifier() else _PATH_PART.fullmatch(part) is not None


def _text(value: Any) -> None:
    if type(value) is not str:
        raise _SchemaError("is not text")


def _name(value: Any) -> None:
    if type(value) is not str or not is_identifier(value):
        raise _SchemaError(f"is {_brief(value)}, which is not a plain name")


def _path(value: Any) -> None:
    if type(value) is not str or not is_path(value):
        raise _SchemaError(f"is {_brief(value)}, which is not the path of an attribute")


def _integer(value: Any) -> None:
    if type(value) is not int or not _LOW <= value <= _HIGH:
        raise _SchemaError(f"is {_brief(value)}, not an integer of 64 bits")


def _number(value: Any) -> None:
    """A float; torch writes those that JSON has no word for as text."""
    if type(value) not in (float, int) and value not in ("Infinity", "-Infinity", "NaN"):
        raise _SchemaError(f"is {_brief(value)}, not a number")


def _boolean(value: Any) -> None:
    if type(value) is not bool:
        raise _SchemaError(f"is {_brief(value)}, not true or false")


def _true(value: Any) -> None:
    if value is not True:
        raise _SchemaError(f"is {_brief(value)}, not true")


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}…"


def one_of(*values: Any) -> Check:
    """One of a few plain values of one type."""
    allowed, kind = frozenset(values), type(values[0])

    def one(value: Any) -> None:
        if type(value) is not kind or value not in allowed:
            raise _SchemaError(f"is {_brief(value)}, which is not supported")

    return one


def optional(kind: Check) -> Check:
    """A value, or null."""
    return lambda value: None if value is None else kind(value)


def _inside(kind: Check, value: Any, form: str, key: Any) -> None:
    """Check a part of a value; ``form``: how ``key`` leads to it."""
    try:
        kind(value)
    except _SchemaError as wrong:
        wrong.keys.append(form.format(key if isinstance(key, int) else str(key)[:80]))
        raise


def each(kind: Check) -> Check:
    """A list."""

    def listed(value: Any) -> None:
        if type(value) is not list:
            raise _SchemaError(f"is {_brief(value)}, not a list")
        for index, item in enumerate(value):
            _inside(kind, item, "[{}]", index)

    return listed


def entries(key: Check, kind: Check) -> Check:
    """An object with any keys of one kind, and values of one kind."""

    def mapped(value: Any) -> None:
        if type(value) is not dict:
            raise _SchemaError(f"is {_brief(value)}, not an object")
        for name, item in value.items():
            _inside(key, name, "[{!r}]", name)
            _inside(kind, item, "[{!r}]", name)

    return mapped


def record(fields: Mapping[str, Check], more: Mapping[str, Check] | None = None) -> Check:
    """An object with all of ``fields``, any of the fields ``more``, and no others."""
    needed, known = frozenset(fields), {**fields, **(more or {})}

    def recorded(value: Any) -> None:
        if type(value) is not dict or not needed <= value.keys():
            missing = ", ".join(sorted(needed - value.keys())) if type(value) is dict else "everything"
            raise _SchemaError(f"lacks {missing}")
        for name, item in value.items():
            _inside(known.get(name, _no_such_key), item, ".{}", name)

    return recorded


def _no_such_key(_: Any) -> None:
    raise _SchemaError("is a key that no such file has")


def union(cases: Mapping[str, Check]) -> Check:
    """An object with exactly one key, which says of what kind its value is."""

    def united(value: Any) -> None:
        if type(value) is not dict or len(value) != 1:
            raise _SchemaError("is not one value of a known kind")
        ((name, item),) = value.items()
        _inside(cases.get(name, _no_such_kind), item, ".{}", name)

    return united


def _no_such_kind(_: Any) -> None:
    raise _SchemaError("is a kind of value that is not supported")


_later: dict[str, Check] = {}


def later(name: str) -> Check:
    """A kind that is defined further down."""

    def found(value: Any) -> None:
        _later[name](value)

    return found


_scalar_type, _layout, _memory_format = (one_of(*table.values()) for table in (DTYPES, LAYOUTS, MEMORY_FORMATS))
_device = record({"type": one_of("cpu", "cuda", "mps", "xpu")}, {"index": optional(one_of(*range(64)))})
_hint = union({"as_int": _integer, "as_bool": _boolean, "as_float": _number})
_expression = record({"expr_str": _text}, {"hint": optional(_hint)})
_sym_int = union({"as_expr": _expression, "as_int": _integer})
_sym_float = union({"as_expr": _expression, "as_float": _number})
_sym_bool = union({"as_expr": _expression, "as_bool": _boolean})
_tensor_meta = record(
    {
        "dtype": _scalar_type,
        "sizes": each(_sym_int),
        "requires_grad": _boolean,
        "device": _device,
        "strides": each(_sym_int),
        "storage_offset": _sym_int,
        "layout": _layout,
    }
)

_tensor = record({"name": _name})
_int_name = union({"as_name": _name, "as_int": _integer})
_float_name = union({"as_name": _name, "as_float": _number})
_bool_name = union({"as_name": _name, "as_bool": _boolean})
_optional_tensor = union({"as_tensor": _tensor, "as_none": _true})
_argument = union(
    {
        "as_none": _true,
        "as_tensor": _tensor,
        "as_tensors": each(_tensor),
        "as_int": _integer,
        "as_ints": each(_integer),
        "as_float": _number,
        "as_floats": each(_number),
        "as_string": _text,
        "as_strings": each(_text),
        "as_sym_int": _int_name,
        "as_sym_ints": each(_int_name),
        "as_scalar_type": _scalar_type,
        "as_memory_format": _memory_format,
        "as_layout": _layout,
        "as_device": _device,
        "as_bool": _boolean,
        "as_bools": each(_boolean),
        "as_sym_bool": _bool_name,
        "as_sym_bools": each(_bool_name),
        "as_graph": record({"name": _name, "graph": later("graph")}),
        "as_optional_tensors": each(_optional_tensor),
        "as_sym_float": _float_name,
        "as_sym_floats": each(_float_name),
        "as_complex": record({"real": _number, "imag": _number}),
        "as_nested_tensors": each(each(_tensor)),
        "as_int_lists": each(each(_integer)),
        "as_float_lists": each(each(_number)),
    }
)
_input = record({"name": optional(_text), "arg": _argument}, {"kind": optional(one_of(1, 2))})
_node = record(
    {
        "target": _text,
        "inputs": each(_input),
        "outputs": each(_argument),
        "metadata": entries(
            one_of("stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn", "custom", "from_node"), _text
        ),
    },
    {"is_hop_single_tensor_return": optional(_boolean), "name": optional(_name)},
)
_empty = entries(one_of(""), _true)
_graph = record(
    {
        "inputs": each(_argument),
        "outputs": each(_argument),
        "nodes": each(_node),
        "tensor_values": entries(_name, _tensor_meta),
        "sym_int_values": entries(_name, _sym_int),
        "sym_bool_values": entries(_name, _sym_bool),
    },
    {
        "is_single_tensor_return": _boolean,
        "custom_obj_values": _empty,
        "sym_float_values": entries(_name, _sym_float),
    },
)

_later["graph"] = _graph

_constant = union({"as_none": _true, "as_int": _integer, "as_float": _number, "as_string": _text, "as_bool": _boolean})
_input_spec = union(
    {
        "user_input": record({"arg": _argument}),
        "parameter": record({"arg": _tensor, "parameter_name": _path}),
        "buffer": record({"arg": _tensor, "buffer_name": _path, "persistent": _boolean}),
        "tensor_constant": record({"arg": _tensor, "tensor_constant_name": _path}),
        "constant_input": record({"name": _name, "value": _constant}),
    }
)
_output_spec = union(
    {
        "user_output": record({"arg": _argument}),
        "buffer_mutation": record({"arg": _tensor, "buffer_name": _path}),
        "parameter_mutation": record({"arg": _tensor, "parameter_name": _path}),
        "user_input_mutation": record({"arg": _tensor, "user_input_name": _name}),
    }
)
_call_signature = record(
    {"inputs": each(_argument), "outputs": each(_argument), "in_spec": _text, "out_spec": _text},
    {"forward_arg_names": optional(each(_name))},
)
_range = record({"min_val": optional(_integer), "max_val": optional(_integer)})

PROGRAM: Check = record(
    {
        "graph_module": record(
            {
                "graph": _graph,
                "signature": record({"input_specs": each(_input_spec), "output_specs": each(_output_spec)}),
                "module_call_graph": each(
                    record({"fqn": _text}, {"signature": optional(_call_signature)}),
                ),
            },
            {
                "metadata": entries(one_of("custom"), _text),
                "treespec_namedtuple_fields": entries(_text, record({"field_names": each(_name)})),
            },
        ),
        "opset_version": entries(one_of("aten"), _integer),
        "range_constraints": entries(_text, _range),
        "schema_version": record({"major": one_of(8), "minor": _integer}),
    },
    {"verifiers": each(_text), "torch_version": _text, "guards_code": each(_text)},
)
"""A program: graph, signature, calling convention, ranges of its sizes, versions."""

PAYLOADS: Check = record(
    {
        "config": entries(
            _path,
            record(
                {
                    "path_name": _text,
                    "is_param": _boolean,
                    "use_pickle": _boolean,
                    "tensor_meta": optional(_tensor_meta),
                }
            ),
        )
    }
)
"""Which tensor lies in which record, and how."""
