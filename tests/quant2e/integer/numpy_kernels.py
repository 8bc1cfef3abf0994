"""Kernels of a hardware team: numpy and the test vectors, nothing of torch.
Every rule is from docs/integer_semantics.md.
"""

from __future__ import annotations

import itertools
import json
import math
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
    if attributes["transposed"]:
        acc = transposed_convolution(x, weight - zero.reshape(1, -1, 1, 1), attributes)
    else:
        acc = convolution(x, weight - zero.reshape(-1, 1, 1, 1), attributes)
    return acc + np.reshape(bias, [1, -1, 1, 1])


def bags(arrays):
    """The sum of the rows in each bag."""
    acc = np.zeros(arrays["out"].shape, dtype=np.int64)
    np.add.at(acc, arrays["in_bag"], arrays["const_table"].astype(np.int64)[arrays["in_x"]])
    return acc


def counted(op, arrays):
    """Which indices are in a bag at all."""
    return arrays["in_x"] != op["attributes"].get("padding_index", -1)


def largest(op, arrays):
    """The maximum of the rows in each bag; zeros where there are none."""
    acc = np.zeros(arrays["out"].shape, dtype=np.int64)
    for bag in range(len(acc)):
        inside = arrays["in_x"][(arrays["in_bag"] == bag) & counted(op, arrays)]
        if len(inside):
            acc[bag] = arrays["const_table"].astype(np.int64)[inside].max(0)
    return acc


def windows(x, outputs, attributes):
    """The sum over each window of an image, and how many values that is, without padding."""
    lines = []
    for i, (n, o) in enumerate(zip(x.shape[-len(outputs) :], outputs, strict=True)):
        if attributes["pool"] == "adaptive":
            lines.append([(j * n // o, -(-(j + 1) * n // o)) for j in range(o)])
        else:
            kernel, stride, padding = (attributes[name][i] for name in ("kernel", "stride", "padding"))
            starts = [j * stride - padding for j in range(o)]
            lines.append([(max(start, 0), min(start + kernel, n)) for start in starts])
    acc, count = (np.zeros([*x.shape[: -len(outputs)], *outputs], dtype=np.int64) for _ in range(2))
    for at in itertools.product(*map(range, outputs)):
        ends = [line[j] for line, j in zip(lines, at, strict=True)]
        taken = x[(..., *(slice(*pair) for pair in ends))]
        acc[(..., *at)] = taken.sum(tuple(range(-len(outputs), 0)))
        count[(..., *at)] = math.prod(stop - start for start, stop in ends)
    return acc, count


def quotient(op, arrays):
    """An average over a number of values that is known at run time: an integer division."""
    attributes = op["attributes"]
    if attributes["pool"] == "bag":
        lengths = np.bincount(arrays["in_bag"][counted(op, arrays)], minlength=len(arrays["out"]))
        acc, count = bags(arrays), np.maximum(lengths, 1).reshape(-1, 1)
    else:
        x = arrays["in_x"].astype(np.int64) - attributes["zero_point"]
        if attributes["pool"] == "sum":
            dims = tuple(attributes["dims"])
            acc, count = x.sum(dims, keepdims=attributes["keepdim"]), math.prod(x.shape[d] for d in dims)
        else:
            spatial = len(attributes.get("output_size") or attributes["kernel"])
            acc, count = windows(x, arrays["out"].shape[-spatial:], attributes)
    np.testing.assert_array_equal(acc, arrays["accumulator"])
    whole = count * 2 ** attributes["shift"]
    return (2 * acc * attributes["multiplier"] + whole) // (2 * whole)


def group_sums(x, arrays, attributes):
    """A product for each group of inputs."""
    weight, size = arrays["const_weight"].astype(np.int64), attributes["group_size"]
    groups = [slice(first, first + size) for first in range(0, weight.shape[1], size)]
    return [x[..., group] @ weight[:, group].T for group in groups]


def grouped(arrays, attributes, mode):
    """The sum of the groups on the scale of the output."""
    sums = group_sums(arrays["in_x"].astype(np.int64) - attributes["zero_point"], arrays, attributes)
    sums[0] = with_fraction(sums[0] + arrays.get("const_bias", 0), arrays, attributes)
    return weighted(sums, arrays, mode) if len(sums) > 1 else to_steps(sums[0], arrays, attributes, mode)


def grouped_in_float(arrays, attributes):
    """The sum of the groups, dequantized."""
    sums = group_sums(arrays["in_x"].astype(np.int64) - arrays["in_zero_point"], arrays, attributes)
    out = sum(acc.astype(np.float32) * scale for acc, scale in zip(sums, arrays["const_weight_scale"].T, strict=True))
    return out * arrays["in_scale"].astype(np.float32) + arrays.get("const_bias", np.float32(0))


def looked_up(arrays, groups):
    """Rows of a table in float: each group of a row has a scale."""
    table, scale, zero = (arrays[f"const_{name}"] for name in ("table", "scale", "zero_point"))
    size = table.shape[1] // groups
    values = (table - np.repeat(zero, size, 1)).astype(np.float32) * np.repeat(scale, size, 1)
    return values[arrays["in_x"]]


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


def transposed_convolution(x, weight, attributes):
    """Each input is spread over the outputs it reaches; then the padding is cut off."""
    names = ("stride", "padding", "output_padding", "dilation")
    (sh, sw), (ph, pw), (eh, ew), (dh, dw) = (attributes[name] for name in names)
    (height, width), (kh, kw) = x.shape[2:], weight.shape[2:]
    size = [(height - 1) * sh + dh * (kh - 1) + 1 + eh, (width - 1) * sw + dw * (kw - 1) + 1 + ew]
    groups, per_group = attributes["groups"], weight.shape[1]
    out = np.zeros([len(x), groups * per_group, *size], dtype=np.int64)
    for c, o, i, j in np.ndindex(*weight.shape):
        place = out[:, c // (len(weight) // groups) * per_group + o, i * dh :: sh, j * dw :: sw]
        place[:, :height, :width] += x[:, c] * weight[c, o, i, j]
    return out[:, :, ph : size[0] - ph, pw : size[1] - pw]


def weighted(terms, arrays, mode):
    """Terms of different scales, each times its multiplier."""
    total = sum(t * arrays[f"const_multiplier_{i}"] for i, t in enumerate(terms))
    shift = arrays["const_shift"]
    return half_to_even(total, shift) if mode == "power_of_two" else (total + (1 << (shift - 1))) >> shift


def add(op, arrays, mode):
    attributes = op["attributes"]
    terms = [arrays[f"in_x{i}"].astype(np.int64) - z for i, z in enumerate(attributes["zero_points"])]
    if mode == "fixed_point" and attributes["narrow"]:
        parts = [
            sign * fixed_point(t << 20, arrays[f"const_multiplier_{i}"], arrays[f"const_exponent_{i}"])
            for i, (t, sign) in enumerate(zip(terms, attributes["signs"], strict=True))
        ]
        return fixed_point(sum(parts), arrays["const_multiplier"], arrays["const_exponent"])
    return weighted(terms, arrays, mode)


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
    if kind == "dynamic_grouped_linear":
        return grouped_in_float(arrays, attributes)
    if kind == "grouped_linear":
        return saturate(grouped(arrays, attributes, mode), attributes)
    if kind == "quotient":
        return saturate(quotient(op, arrays), attributes)
    if kind == "bag":
        return saturate(to_steps(bags(arrays), arrays, attributes, mode), attributes)
    if kind == "bag_maximum":
        return saturate(to_steps(largest(op, arrays), arrays, attributes, mode), attributes)
    if kind == "float_lookup":
        return looked_up(arrays, attributes["groups"])
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
