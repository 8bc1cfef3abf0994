"""Kernels of a hardware team: numpy and the test vectors, nothing of torch. Every rule is from docs/integer_semantics.md."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np


def shaped(values, axis, rank):
    """One value per channel, along the channel axis."""
    return values.reshape([-1 if i == axis else 1 for i in range(rank)]) if values.ndim == 1 else values


def to_steps(acc, arrays, attributes, mode):
    """Requantization, before zero point and saturation."""
    axis = attributes.get("channel_axis")

    def constant(name):
        return shaped(arrays[f"const_{name}"], axis, acc.ndim)

    acc = acc.astype(np.int64)
    if mode == "float32":
        scaled = acc.astype(np.float32) * constant("ratio")
        return np.rint(scaled + np.float32(attributes.get("offset", 0.0))).astype(np.int64)
    if mode == "fixed_point":
        return fixed_point(acc, constant("multiplier"), constant("exponent"))
    if mode == "fixed_point_single_rounding":
        shift = constant("shift")
        return (acc * constant("multiplier") + (np.int64(1) << (shift - 1))) >> shift
    exponent = constant("exponent")
    return half_to_even(acc << np.maximum(exponent, 0), np.maximum(-exponent, 0))


def fixed_point(acc, multiplier, exponent):
    left, right = np.maximum(exponent, 0), np.maximum(-exponent, 0)
    x = np.clip(acc << left, -(2**31), 2**31 - 1)
    high = (x * multiplier + 2**30) >> 31
    half = np.where(right > 0, np.int64(1) << np.maximum(right - 1, 0), 0)
    return (high + half - ((high < 0) & (right > 0))) >> right


def half_to_even(x, shift):
    odd = np.where(shift > 0, (x >> shift) & 1, 0)
    half = np.where(shift > 0, (np.int64(1) << np.maximum(shift - 1, 0)) - 1, 0)
    return (x + odd + half) >> shift


def saturate(steps, attributes):
    return np.clip(steps + attributes["out_zero_point"], attributes["out_min"], attributes["out_max"])


def accumulate(op, arrays):
    """The sum of products or values of an op."""
    attributes = op["attributes"]
    x = arrays["in_x"].astype(np.int64) - attributes["zero_point"]
    if op["kind"] == "average":
        assert attributes["pool"] == "sum"
        return x.sum(tuple(attributes["dims"]), keepdims=attributes["keepdim"])
    if op["kind"] == "matmul":
        return x @ (arrays["in_y"].astype(np.int64) - attributes["zero_point_y"])
    weight = arrays["const_weight"].astype(np.int64)
    bias = arrays.get("const_bias", np.int64(0))
    zero = np.asarray(attributes["weight_zero_point"])
    if op["kind"] == "linear":
        return x @ (weight - zero.reshape(-1, 1)).T + bias
    weight = weight - zero.reshape(-1, 1, 1, 1)
    return convolution(x, weight, attributes) + np.reshape(bias, [1, -1, 1, 1])


def with_fraction(acc, arrays, attributes):
    """The sum with the fraction bits of its bias, where it has some."""
    bits = attributes.get("bias_fraction_bits", 0)
    if not bits:
        return acc
    return (acc << bits) + shaped(arrays["const_bias_fraction"], attributes["channel_axis"], acc.ndim)


def real(op, arrays):
    """A layer that answers in float: the sum is dequantized."""
    attributes, axis = op["attributes"], op["attributes"]["channel_axis"]
    if op["kind"] == "dynamic_linear":
        x = arrays["in_x"].astype(np.int64) - arrays["in_zero_point"]
        acc = x @ arrays["const_weight"].astype(np.int64).T
        scale = shaped(arrays["const_weight_scale"], axis, acc.ndim) * arrays["in_scale"].astype(np.float32)
    else:
        acc = accumulate({"kind": "linear", "attributes": attributes}, arrays)
        scale = shaped(arrays["const_scale"], axis, acc.ndim)
    np.testing.assert_array_equal(acc, arrays["accumulator"])
    acc = acc if op["kind"] == "dynamic_linear" else with_fraction(acc, arrays, attributes)
    out = acc.astype(np.float32) * scale
    return out + shaped(arrays["const_bias"], axis, acc.ndim) if op["kind"] == "dynamic_linear" else out


def convolution(x, weight, attributes):
    (sh, sw), (ph, pw), groups = attributes["stride"], attributes["padding"], attributes["groups"]
    padded = np.pad(x, [(0, 0), (0, 0), (ph, ph), (pw, pw)])
    kh, kw = weight.shape[2:]
    height, width = (padded.shape[2] - kh) // sh + 1, (padded.shape[3] - kw) // sw + 1
    out = np.zeros([len(x), len(weight), height, width], dtype=np.int64)
    per_group = len(weight) // groups
    for o in range(len(weight)):
        first = o // per_group * weight.shape[1]
        for c in range(weight.shape[1]):
            for i in range(kh):
                for j in range(kw):
                    taken = padded[:, first + c, i : i + sh * height : sh, j : j + sw * width : sw]
                    out[:, o] += taken[:, :height, :width] * weight[o, c, i, j]
    return out


def add(op, arrays, mode):
    attributes = op["attributes"]
    terms = [arrays[f"in_x{i}"].astype(np.int64) - z for i, z in enumerate(attributes["zero_points"])]
    if mode == "fixed_point" and attributes["narrow"]:
        parts = [
            sign * fixed_point(t << 20, arrays[f"const_multiplier_{i}"], arrays[f"const_exponent_{i}"])
            for i, (t, sign) in enumerate(zip(terms, attributes["signs"], strict=True))
        ]
        return fixed_point(sum(parts), arrays["const_multiplier"], arrays["const_exponent"])
    total = sum(t * arrays[f"const_multiplier_{i}"] for i, t in enumerate(terms))
    shift = arrays["const_shift"]
    return half_to_even(total, shift) if mode == "power_of_two" else (total + (1 << (shift - 1))) >> shift


def run(op, arrays, mode):
    """The result of one op; None for kinds this team has no kernel for."""
    attributes, kind = op["attributes"], op["kind"]
    if kind in ("convolution", "linear", "matmul", "average"):
        acc = accumulate(op, arrays)
        if "accumulator" in arrays:
            np.testing.assert_array_equal(acc, arrays["accumulator"])
        return saturate(to_steps(with_fraction(acc, arrays, attributes), arrays, attributes, mode), attributes)
    if kind in ("float_linear", "dynamic_linear"):
        return real(op, arrays)
    if kind == "thresholds":
        return arrays["const_values"][np.searchsorted(arrays["const_thresholds"], arrays["in_x"], side="right")]
    if kind == "pad":
        sizes = list(zip(attributes["pad"][::2], attributes["pad"][1::2], strict=True))[::-1]
        sizes = [(0, 0)] * (arrays["in_x"].ndim - len(sizes)) + sizes
        return np.pad(arrays["in_x"], sizes, constant_values=attributes["border"])
    if kind == "sum":
        return saturate(add(op, arrays, mode), attributes)
    if kind == "mul":
        zeros = attributes["zero_points"]
        acc = (arrays["in_x0"].astype(np.int64) - zeros[0]) * (arrays["in_x1"].astype(np.int64) - zeros[1])
        return saturate(to_steps(acc, arrays, attributes, mode), attributes)
    if kind == "requantize":
        acc = arrays["in_x"].astype(np.int64) - attributes["zero_point"]
        return saturate(to_steps(acc, arrays, attributes, mode), attributes)
    if kind == "clamp":
        return np.clip(arrays["in_x"], attributes["low"], attributes["high"])
    if kind in ("table", "lookup"):
        return arrays["const_table"][arrays["in_x"].astype(np.int64) - attributes.get("first", 0)]
    if kind == "cat":
        names = sorted(name for name in arrays if name.startswith("in_"))
        return np.concatenate([arrays[name] for name in names], attributes["dim"])
    return None


def check(index: Path) -> dict[str, int]:
    """Run every op of a dump; raises when a number differs. Returns how many of each kind were checked."""
    listing = json.loads(index.read_text())
    checked: dict[str, int] = {}
    for op in listing["ops"]:
        with np.load(index.parent / op["file"], allow_pickle=False) as arrays:
            out = run(op, dict(arrays), listing["requantization"])
            if out is None:
                continue
            np.testing.assert_array_equal(out, arrays["out"], err_msg=op["name"])
        checked[op["kind"]] = checked.get(op["kind"], 0) + 1
    return checked
