"""Integer types of ONNX that torch has no dtype or op for: rewrites of the exported ONNX graph.

    constant of 8 bits whose values have 4       =  INT4 constant
    q(x, scale, zero point of dql(x))            =  dql(x)                                  DynamicQuantizeLinear
    matmul(dq(dql(x)), dq(w))                    =  float(matmul_integer(dql(x), w)) · s_x·s_w
    x @ dq(w, blocks along rows)ᵀ                =  x @ dq(wᵀ, blocks along columns)

The third is what onnxruntime's own dynamic quantization writes, and what it runs in one kernel; the last is what it
multiplies with weights of four bits as they are.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from lowering.onnx.qdq_form import INT4


def use_integers(model: Any, *, unsigned: bool, four_bits: bool = True, run_time: bool = True) -> None:
    """Apply all rewrites to an ``onnx_ir.Model``, in place.

    ``unsigned``: the target takes u8 weights as well. ``four_bits``: this version of ONNX has integers of four bits.
    ``run_time``: the target has kernels for ranges found at run time.
    """
    for node in list(model.graph):
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            _retype(node)
        if four_bits and node.op_type == "DequantizeLinear":
            _pack(model.graph, node)
        if node.op_type == "QuantizeLinear":
            _reuse_dynamic(node)
    for node in list(model.graph):
        if run_time and node.op_type == "MatMul":
            _integer_product(model.graph, node)
        if node.op_type in ("Gemm", "MatMul"):
            _blocked_product(model.graph, node)
    _clean(model)
    if unsigned:
        _shared_as_unsigned(model.graph)
    _separate_zero_points(model.graph)
    _clean(model)


def _shared_as_unsigned(graph: Any) -> None:
    """A weight that several products read as u8, with zero points of 128: the same values.

    onnxruntime makes u8 of s8 weights itself on processors without VNNI, under a name that exists once per weight.
    """
    from onnxscript import ir

    for value in list(graph.initializers.values()):
        readers = [(user, place) for user, place in value.uses() if place == _WEIGHT.get(user.op_type)]
        products = sum(len(list(u.outputs[0].uses())) if u.op_type == "DequantizeLinear" else 1 for u, _ in readers)
        if value.dtype is not ir.DataType.INT8 or products < 2 or len(readers) < len(list(value.uses())):
            continue
        if any(_zero_point(user) is not None and _zero_point(user).const_value is None for user, _ in readers):
            continue
        moved = _moved(graph, value, value)
        for user, place in readers:
            user.replace_input_with(place, moved)
            _move_zero_point(graph, user, value)


_WEIGHT = {"DequantizeLinear": 0, "MatMulInteger": 1}
"""Op → which input is the weight."""
_ZERO_POINT = {"DequantizeLinear": 2, "MatMulInteger": 3}
"""Op → which input is the zero point of its weight."""


def _zero_point(node: Any) -> Any:
    place = _ZERO_POINT[node.op_type]
    return node.inputs[place] if place < len(node.inputs) else None


def _moved(graph: Any, value: Any, of: Any) -> Any:
    """The constant plus 128, as u8; one for all that read it."""
    from onnxscript import ir

    name = f"{value.name}_u8"
    if (known := graph.initializers.get(name)) is not None and value is of:
        return known
    array = (value.const_value.numpy().astype(np.int16) + 128).astype(np.uint8)
    name = name if value is of else f"{name}_{of.name}"
    return graph.initializers.get(name) or _initializer(graph, name, ir.tensor(array, name=name))


def _move_zero_point(graph: Any, node: Any, weight: Any) -> None:
    from onnxscript import ir

    place, zeros = _ZERO_POINT[node.op_type], _zero_point(node)
    if zeros is not None:
        node.replace_input_with(place, _moved(graph, zeros, weight))
        return
    scale = node.inputs[1]
    shape = scale.shape.numpy() if node.op_type == "DequantizeLinear" else ()
    made = _initializer(graph, f"{weight.name}_zero_point_{node.name}", ir.tensor(np.full(shape, 128, np.uint8)))
    node.resize_inputs(place + 1)
    node.replace_input_with(place, made)


def _separate_zero_points(graph: Any) -> None:
    """A zero point of its own for each constant: onnxruntime names what it makes of one after it, and names collide."""
    taken: set[int] = set()
    for node in list(graph):
        if node.op_type not in _WEIGHT or node.inputs[_WEIGHT[node.op_type]].const_value is None:
            continue
        value = _zero_point(node)
        if value is None or value.const_value is None:
            continue
        if id(value) in taken:
            name = next(n for i in itertools.count(1) if (n := f"{value.name}_{i}") not in graph.initializers)
            value = _initializer(graph, name, value.const_value)
            node.replace_input_with(_ZERO_POINT[node.op_type], value)
        taken.add(id(value))


def _retype(node: Any) -> None:
    """Parameters found at run time are float32 and 8-bit integers here; torch computes them as float64 and int64."""
    from onnxscript import ir

    integers = node.inputs[0] if node.op_type == "DequantizeLinear" else node.outputs[0]
    scale, zero_point = (*node.inputs[1:], None)[:2]
    for value, dtype in ((scale, ir.DataType.FLOAT), (zero_point, integers.dtype)):
        if value is not None and value.const_value is None:
            value.type, value.shape = ir.TensorType(dtype), ir.Shape([])


def _pack(graph: Any, node: Any) -> None:
    """Give the constants of a dequantize op that are marked so four bits."""
    stored = node.inputs[0]
    if stored is None or INT4 not in str(stored.name) or stored.const_value is None:
        return
    for place in (0, 2):
        value = node.inputs[place] if place < len(node.inputs) else None
        if value is not None and value.const_value is not None:
            node.replace_input_with(place, _narrow(graph, value))


def _narrow(graph: Any, value: Any) -> Any:
    """The same constant as INT4, two to a byte; one for all that read it."""
    from onnxscript import ir

    name = f"{value.name}_packed"
    if (known := graph.initializers.get(name)) is not None:
        return known
    array = value.const_value.numpy().astype(ir.DataType.INT4.numpy())
    return _initializer(graph, name, ir.Tensor(array, dtype=ir.DataType.INT4, name=name))


def _initializer(graph: Any, name: str, tensor: Any) -> Any:
    from onnxscript import ir

    value = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


def _reuse_dynamic(node: Any) -> None:
    """A quantize op with the parameters that a dynamic one found for the same tensor is that op."""
    x, scale, zero_point = (*node.inputs, None, None)[:3]
    chosen = None if scale is None else scale.producer()
    if chosen is None or chosen.op_type != "DynamicQuantizeLinear" or chosen.inputs[0] is not x:
        return
    if zero_point is chosen.outputs[2]:
        for user, place in list(node.outputs[0].uses()):
            user.replace_input_with(place, chosen.outputs[0])


def _integer_product(graph: Any, node: Any) -> None:
    """A product of a dynamically quantized tensor and a constant of 8 bits, on integers."""
    from onnxscript import ir

    left, right = (value.producer() for value in node.inputs)
    if left is None or right is None or {left.op_type, right.op_type} != {"DequantizeLinear"}:
        return
    chosen = left.inputs[0].producer()
    weight, scale = right.inputs[:2]
    fits = weight.const_value is not None and weight.dtype in (ir.DataType.INT8, ir.DataType.UINT8)
    zeros = right.inputs[2] if len(right.inputs) > 2 else None
    if chosen is None or chosen.op_type != "DynamicQuantizeLinear" or not fits:
        return
    if zeros is not None and zeros.const_value is None:
        return
    is_zero = zeros is None or not zeros.const_value.numpy().any()
    inputs = [left.inputs[0], weight, left.inputs[2], *([] if is_zero else [zeros])]
    made = ir.node("MatMulInteger", inputs)
    as_float = ir.node("Cast", made.outputs, attributes={"to": ir.DataType.FLOAT.value})
    unit = ir.node("Mul", [left.inputs[1], scale])
    product = ir.node("Mul", [as_float.outputs[0], unit.outputs[0]])
    graph.insert_before(node, [made, as_float, unit, product])
    _replace(graph, node.outputs[0], product.outputs[0])


def _replace(graph: Any, old: Any, new: Any) -> None:
    """Let ``new`` stand for ``old`` everywhere, under its name where the model returns it."""
    new.shape, new.type = old.shape, old.type
    for user, place in list(old.uses()):
        user.replace_input_with(place, new)
    for place, output in enumerate(graph.outputs):
        if output is old:
            new.name, old.name = old.name, f"{old.name}_before"
            graph.outputs[place] = new


def _blocked_product(graph: Any, node: Any) -> None:
    """A product with the transpose of a weight in blocks along its rows, as one with blocks along its columns."""
    from onnxscript import ir

    weight = node.inputs[1].producer()
    turned = weight is not None and weight.op_type == "Transpose"
    if node.op_type == "Gemm":
        plain = all(getattr(node.attributes.get(n), "value", 1.0) == 1.0 for n in ("alpha", "beta"))
        turned = plain and getattr(node.attributes.get("transB"), "value", 0) == 1
    elif turned:
        weight = weight.inputs[0].producer()
    block = None if weight is None else weight.attributes.get("block_size")
    if not turned or block is None or block.value == 0 or any(v.const_value is None for v in weight.inputs if v):
        return
    inputs = [_transposed(graph, value) for value in weight.inputs]
    made = ir.node("DequantizeLinear", inputs, attributes={"axis": 0, "block_size": block.value})
    product = ir.node("MatMul", [node.inputs[0], made.outputs[0]], name=node.name)
    bias = node.inputs[2] if node.op_type == "Gemm" and len(node.inputs) > 2 else None
    total = [] if bias is None else [ir.node("Add", [product.outputs[0], bias])]
    graph.insert_before(node, [made, product, *total])
    _replace(graph, node.outputs[0], (total or [product])[0].outputs[0])


def _transposed(graph: Any, value: Any) -> Any:
    from onnxscript import ir

    name = f"{value.name}_transposed"
    if (known := graph.initializers.get(name)) is not None:
        return known
    array = np.ascontiguousarray(value.const_value.numpy().T)
    return _initializer(graph, name, ir.Tensor(array, dtype=value.const_value.dtype, name=name))


def _clean(model: Any) -> None:
    """Remove nodes and constants that nothing reads any more, and traces of this machine's sources."""
    from onnxscript.ir.passes import common as passes

    passes.RemoveUnusedNodesPass()(model)
    passes.ClearMetadataAndDocStringPass()(model)


def sizes(model: Any) -> dict[str, int]:
    """Bytes of the model's constants by dtype."""
    found: dict[str, int] = {}
    for value in model.graph.initializers.values():
        if (tensor := value.const_value) is not None:
            name = str(tensor.dtype.name).lower()
            found[name] = found.get(name, 0) + int(np.ceil(tensor.nbytes))
    return found
