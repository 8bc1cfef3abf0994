"""What OpenVINO runs on integers: the ops that a model says are quantized, and the kernels that the CPU runs for them.

An op is quantized where every tensor that it computes on is: an activation that a FakeQuantize made, or a constant of
integers that is dequantized. Its kernel is found in the graph that OpenVINO compiled, which names what it fused.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from lowering.openvino.sums import LEVELS

PRODUCTS = frozenset(
    {
        "Convolution",
        "ConvolutionBackpropData",
        "GroupConvolution",
        "GroupConvolutionBackpropData",
        "MatMul",
    }
)
"""Ops of a model that multiply tensors."""

_COMPUTE = PRODUCTS | {"Add", "Multiply", "Subtract", "AvgPool", "MaxPool", "ReduceMean", "Concat", "Clamp", "Relu"}
"""Ops that OpenVINO has integer kernels for, or fuses into those."""

_MOVES = frozenset(
    {"Reshape", "Transpose", "Squeeze", "Unsqueeze", "StridedSlice", "Slice", "Pad", "Gather", "VariadicSplit", "Split"}
)
"""Ops whose result holds the values of their first input."""

_INTEGERS = frozenset({"u8", "i8", "u4", "i4"})
_STEPS = 12
"""How far behind an op what it was fused into is looked for."""

Kind = Literal["activation", "weight", "run time", "wide"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOp:
    """A quantized op and what runs it. ``layer``, ``kernel``, ``precision``: as OpenVINO calls them, "FullyConnected",
    "jit_gemm_I8" and "u8"; ``reason``: why it computes in float; empty where it computes on integers.

    ``weights``: dtype of a weight that is read as it is stored, where the weight alone is quantized; else empty.
    """

    name: str
    layer: str
    kernel: str
    precision: str
    reason: str = ""
    weights: str = ""

    @property
    def on_integers(self) -> bool:
        """Whether its kernel computes on integers."""
        return not self.reason and not self.weights


def run_ops(model: Any, compiled: Any) -> tuple[RunOp, ...]:
    """The quantized ops of an ``openvino.Model``, in order, with what runs them in a ``CompiledModel`` of it."""
    layers = _layers(compiled)
    return tuple(_run_op(op, kinds, layers) for op, kinds in _quantized(model))


def _quantized(model: Any) -> Iterator[tuple[Any, list[Kind]]]:
    """Ops that compute on quantized tensors, with how each of those is quantized."""
    scaling = _scaling_of_integers(model)
    for op in model.get_ordered_ops():
        if op.get_type_name() not in _COMPUTE or op.get_friendly_name() in scaling:
            continue
        kinds = [_kind(value) for value in op.input_values() if not _is_index(op, value)]
        by_its_weight = op.get_type_name() in PRODUCTS and "weight" in kinds
        if by_its_weight or (kinds and all(kinds) and set(kinds) != {"weight"}):
            yield op, [kind for kind in kinds if kind is not None]


def _is_index(op: Any, value: Any) -> bool:
    """An operand that says where, and holds no values: axes, say."""
    return op.get_type_name() not in PRODUCTS and value.get_element_type().get_type_name() in {"i32", "i64"}


def _scaling_of_integers(model: Any) -> set[str]:
    """Names of the Subtract and Multiply ops that are part of dequantizing."""
    found = set()
    for op in model.get_ordered_ops():
        if op.get_type_name() == "Multiply" and _dequantized(op) is not None:
            found |= {op.get_friendly_name(), op.input_value(0).get_node().get_friendly_name()}
    return found


def _dequantized(multiply: Any) -> Any:
    """The integers of ``(convert(x) [- zero]) · scale``, as an output; None for another Multiply."""
    node = multiply.input_value(0).get_node()
    if node.get_type_name() == "Subtract":
        node = node.input_value(0).get_node()
    if node.get_type_name() != "Convert":
        return None
    integers = node.input_value(0)
    return integers if integers.get_element_type().get_type_name() in _INTEGERS | {"i16", "u16"} else None


def _kind(value: Any) -> Kind | None:
    """How a tensor is quantized; None where it is not."""
    node = value.get_node()
    for _ in range(_STEPS):
        if node.get_type_name() not in _MOVES or (node.get_type_name() == "Gather" and _constant(node.input_value(0))):
            break
        node = node.input_value(0).get_node()
    if node.get_type_name() == "FakeQuantize":
        levels = node.get_attributes()["levels"]
        return None if levels == LEVELS else "wide" if levels > 256 else "activation"
    if node.get_type_name() != "Multiply" or (integers := _dequantized(node)) is None:
        return None
    if integers.get_element_type().get_type_name() not in _INTEGERS:
        return "wide"
    if _constant(integers):
        return "weight"
    return "activation" if _constant(node.input_value(1)) else "run time"


def _constant(value: Any) -> bool:
    """Whether a tensor is a constant, also behind ops that only move or convert it."""
    node = value.get_node()
    for _ in range(_STEPS):
        if node.get_type_name() not in _MOVES | {"Convert"}:
            break
        node = node.input_value(0).get_node()
    return bool(node.get_type_name() == "Constant")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layer:
    """An op of the compiled graph. ``reads``: element types of its constants."""

    layer: str
    kernel: str
    precision: str
    reads: frozenset[str]


def _layers(compiled: Any) -> dict[str, _Layer]:
    """What runs each op, by the names of all that were fused into it."""
    found: dict[str, _Layer] = {}
    for op in compiled.get_runtime_model().get_ordered_ops():
        about = op.get_rt_info()
        said = {name: _text(about, name) for name in ("layerType", "primitiveType", "runtimePrecision")}
        if said["layerType"] in {"Const", "Input", "Output", "Reorder"}:
            continue
        reads = {value.get_element_type().get_type_name() for value in op.input_values()}
        layer = _Layer(
            layer=said["layerType"],
            kernel=said["primitiveType"],
            precision=said["runtimePrecision"],
            reads=frozenset(reads & _INTEGERS),
        )
        for name in filter(None, _text(about, "originalLayersNames").split(",")):
            if layer.layer in {"Transpose", "Reshape"} and name in found:
                continue  # of a weight, under the name of the product that it was fused into
            found[name] = found[name.partition("/")[0]] = layer
    return found


def _text(about: Any, name: str) -> str:
    return str(about[name].astype(str)) if name in about else ""


def _run_op(op: Any, kinds: list[Kind], layers: Mapping[str, _Layer]) -> RunOp:
    name = op.get_friendly_name().partition("/")[0]
    layer = _layer_of(op, layers)
    weights = next(iter(sorted(layer.reads)), "") if kinds == ["weight"] and op.get_type_name() in PRODUCTS else ""
    return RunOp(
        name=name.removeprefix("node_"),
        layer=layer.layer,
        kernel=layer.kernel,
        precision=layer.precision,
        reason="" if weights else _reason(kinds, layer),
        weights=weights,
    )


def _layer_of(op: Any, layers: Mapping[str, _Layer]) -> _Layer:
    """What runs an op, or the one behind it that it was fused into."""
    for _ in range(_STEPS):
        name = op.get_friendly_name()
        for known in (name, name.partition("/")[0]):
            if known in layers:
                return layers[known]
        readers = [target.get_node() for target in op.output(0).get_target_inputs()]
        if len(readers) != 1:
            break
        op = readers[0]
    return _Layer(layer="?", kernel="?", precision="?", reads=frozenset())


def _reason(kinds: list[Kind], layer: _Layer) -> str:
    """Why an op computes in float; empty where it does not."""
    if "run time" in kinds:
        return "its activations have ranges that are found at run time, which OpenVINO computes in float"
    if "wide" in kinds:
        return "it is quantized to 16 bits, and OpenVINO's kernels take 8"
    if layer.precision in {"u8", "i8"} and layer.kernel.upper().endswith("I8"):
        return ""
    if kinds == ["weight"]:
        return "its weights are quantized and its activations are not, and OpenVINO made floats of the weights"
    if layer.kernel == "?":
        return "OpenVINO does not say what runs it"
    if layer.precision in {"u8", "i8"}:
        return f"{layer.layer} ({layer.kernel}) reads integers and computes in float"
    return f"OpenVINO runs it as {layer.layer} ({layer.kernel}) in {layer.precision}"


def integer_kernels_of(ops: tuple[RunOp, ...]) -> dict[str, int]:
    """How many quantized ops run as which kernel on integers."""
    return dict(Counter(f"{op.layer} {op.kernel}" for op in ops if op.on_integers))
