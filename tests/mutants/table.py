"""Planted bugs: each a small patch of the sources, with the tests that have to notice it.

``python -m tests.mutants`` plants them one at a time, in a copy of the tree.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Mutant:
    """``old`` becomes ``new`` in ``file``; ``tests``: files or folders, as pytest takes them."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


RANGES, OBSERVERS, INTEGER = "tests/quant2e/ranges", "tests/quant2e/observers", "tests/quant2e/integer"

MUTANTS: tuple[Mutant, ...] = (
    # ------------------------------------------------------------------------------------------ scales and zero points
    Mutant(
        "a scale for each input channel of a weight, not for each output",
        "quantizers/xnnpack/config.py",
        "ch_axis=0 if per_channel else None",
        "ch_axis=1 if per_channel else None",
        ("tests/quantizers/xnnpack/test_quantizer.py", "tests/quantizers/conformance"),
    ),
    Mutant(
        "the same on x86",
        "quantizers/x86/quantizer.py",
        "        ch_axis=0,\n    )\n    return QuantizationConfig(activation,",
        "        ch_axis=1,\n    )\n    return QuantizationConfig(activation,",
        ("tests/quantizers/x86/test_quantizer.py", "tests/quantizers/conformance"),
    ),
    Mutant(
        "a transposed convolution with the axis of a plain one",
        "quantizers/xnnpack/rules.py",
        'deconv = product | {"w": replace(weight, ch_axis=1) if per_channel else weight}',
        'deconv = product | {"w": weight}',
        ("tests/quantizers/xnnpack/test_quantizer.py", "tests/quantizers/conformance"),
    ),
    Mutant(
        "every axis is the first when an observer is encoded",
        "quant2e/observers/encodings.py",
        "axis=int(observer.ch_axis),",
        "axis=0,",
        (
            "tests/quant2e/convert/test_convert.py",
            "tests/quantizers/xnnpack/test_quantizer.py",
        ),
    ),
    Mutant(
        "zero point off by one",
        "quant2e/ranges/qparams.py",
        "zero_point = self.quant_min - torch.round(low / scale).to(torch.int64)",
        "zero_point = self.quant_min - torch.round(low / scale).to(torch.int64) + 1",
        (f"{RANGES}/test_qparams.py",),
    ),
    Mutant(
        "zero point by floor",
        "quant2e/ranges/qparams.py",
        "zero_point = self.quant_min - torch.round(low / scale).to(torch.int64)",
        "zero_point = self.quant_min - torch.floor(low / scale).to(torch.int64)",
        (f"{RANGES}/test_qparams.py",),
    ),
    Mutant(
        "a range that leaves out zero",
        "quant2e/ranges/qparams.py",
        "low, high = torch.clamp(low, max=0.0), torch.clamp(high, min=0.0)",
        "low, high = low, high",
        (f"{RANGES}/test_qparams.py",),
    ),
    Mutant(
        "a symmetric scale of the largest value only",
        "quant2e/ranges/qparams.py",
        "self._at_least_eps(torch.maximum(-low, high) / (steps / 2))",
        "self._at_least_eps(high / (steps / 2))",
        (f"{RANGES}/test_qparams.py",),
    ),
    Mutant(
        "a range of the last batch only",
        "quant2e/ranges/minmax.py",
        "low, high = torch.minimum(a.min_val, b.min_val), torch.maximum(a.max_val, b.max_val)",
        "low, high = b.min_val, b.max_val",
        (f"{RANGES}/test_minmax.py",),
    ),
    Mutant(
        "masks widen the range",
        "quant2e/ranges/minmax.py",
        "SENTINEL = 2.0**100",
        "SENTINEL = 2.0**127",
        (
            f"{RANGES}/test_minmax.py",
            f"{RANGES}/test_sentinels.py",
            f"{OBSERVERS}/test_measuring.py",
        ),
    ),
    Mutant(
        "a moving average that forgets at once",
        "quant2e/ranges/minmax.py",
        "moved = average + self.averaging_constant * (new - average)",
        "moved = average + (1 - self.averaging_constant) * (new - average)",
        (f"{RANGES}/test_minmax.py",),
    ),
    Mutant(
        "no reduced range where products would overflow",
        "quantizers/x86/quantizer.py",
        "quant_max=127 if reduce_range else 255,",
        "quant_max=255,",
        (
            "tests/quantizers/x86/test_range_policy.py",
            "tests/quantizers/x86/test_quantizer.py",
        ),
    ),
    Mutant(
        "the worst range wins",
        "quant2e/calibration/range_selection.py",
        "            if error < self.errors[best] * _CLEARLY:",
        "            if error * _CLEARLY > self.errors[best]:",
        ("tests/quant2e/calibration/test_range_selection.py",),
    ),
    # ---------------------------------------------------------------------------------------------- biases and rounding
    Mutant(
        "a bias in units of the input",
        "quantizers/kit/rule.py",
        "    scale = activation * weight\n",
        "    scale = activation * torch.ones_like(weight)\n",
        (
            "tests/quantizers/kit",
            "tests/quantizers/conformance",
        ),
    ),
    Mutant(
        "floor on the bias grid of an integer graph",
        "quant2e/integer/arithmetic/bias.py",
        "return torch.round(bias.to(torch.float32) * inverse)",
        "return torch.floor(bias.to(torch.float32) * inverse)",
        (
            f"{INTEGER}/test_bias.py",
            f"{INTEGER}/test_products.py",
            f"{INTEGER}/test_runtime.py",
            f"{INTEGER}/test_rewrite.py",
        ),
    ),
    Mutant(
        "floor on the bias grid of the accumulator",
        "quant2e/observers/straight_through.py",
        "steps = torch.round(x.to(torch.float32) * (1.0 / scale)).to(torch.float64)",
        "steps = torch.floor(x.to(torch.float32) * (1.0 / scale)).to(torch.float64)",
        (
            f"{OBSERVERS}/test_straight_through.py",
            "tests/quant2e/convert/test_convert.py",
        ),
    ),
    Mutant(
        "floor for round when constants become integers",
        "quant2e/integer/arithmetic/grid.py",
        "steps = torch.round(x.to(torch.float32) * (1.0 / self.scale)) + self.zero_point",
        "steps = torch.floor(x.to(torch.float32) * (1.0 / self.scale)) + self.zero_point",
        (
            f"{INTEGER}/test_grid.py",
            f"{INTEGER}/test_rewrite.py",
            f"{INTEGER}/test_elementwise.py",
        ),
    ),
    Mutant(
        "requantization without a clamp",
        "quant2e/integer/arithmetic/rescale.py",
        "    steps = b.cast(b.clamp(rounded, low, high), torch.int32)",
        "    steps = b.cast(rounded, torch.int32)",
        (
            f"{INTEGER}/test_products.py",
            f"{INTEGER}/test_runtime.py",
            f"{INTEGER}/test_rewrite.py",
        ),
    ),
    Mutant(
        "requantization by floor",
        "quant2e/integer/arithmetic/rescale.py",
        "    rounded = b.call(aten.round.default, product)",
        "    rounded = b.call(aten.floor.default, product)",
        (
            f"{INTEGER}/test_products.py",
            f"{INTEGER}/test_runtime.py",
            f"{INTEGER}/test_rewrite.py",
        ),
    ),
    Mutant(
        "ties away from zero where fixed point rounds twice",
        "quant2e/integer/arithmetic/rescale.py",
        'high = _shift(b, b.call(aten.add.Tensor, high, negative), _operand(b, right, term, f"{name}_right"))',
        'high = _shift(b, high, _operand(b, right, term, f"{name}_right"))',
        (
            f"{INTEGER}/test_products.py",
            f"{INTEGER}/test_runtime.py",
            f"{INTEGER}/test_rewrite.py",
        ),
    ),
    Mutant(
        "averages that count the padding",
        "quant2e/integer/ops/pooling.py",
        "if not override and (ceil or (any(padding) and not counted)):",
        "if not override and ceil:",
        (f"{INTEGER}/test_pooling.py",),
    ),
    Mutant(
        "a concatenation of integers on different scales",
        "quant2e/integer/ops/data_movement.py",
        "parts = [source.quantized(ctx, grid) for source in self.sources]",
        "parts = [source.quantized(ctx, source.grid or grid) for source in self.sources]",
        (
            f"{INTEGER}/test_rewrite.py",
            f"{INTEGER}/test_elementwise.py",
            f"{INTEGER}/test_graph.py",
        ),
    ),
    # ---------------------------------------------------------------------------------------------------------- graphs
    Mutant(
        "batch norm without eps",
        "quant2e/passes/fold_batch_norm.py",
        'value["running_var"], operand(norm, "eps")',
        'value["running_var"], 0.0',
        ("tests/quant2e/passes/test_fold_batch_norm.py",),
    ),
    Mutant(
        "a folded convolution whose result others read as well",
        "quant2e/passes/fold_batch_norm.py",
        "while isinstance(node, Node) and len(node.users) == 1 and",
        "while isinstance(node, Node) and",
        ("tests/quant2e/passes/test_fold_batch_norm.py",),
    ),
    Mutant(
        "shared observers are lost",
        "quant2e/annotation/plan.py",
        "            forest.union(point, anchor[point])",
        "            pass",
        ("tests/quant2e/annotation/test_plan.py",),
    ),
    Mutant(
        "implicit shares across uses that do not allow them",
        "quant2e/annotation/plan.py",
        "if any(isinstance(p, Edge) and p.dst in implicit for p in members):",
        "if members:",
        ("tests/quant2e/annotation/test_plan.py",),
    ),
    Mutant(
        "operands of a concatenation with scales of their own",
        "quantizers/xnnpack/rules.py",
        'Rule(f.cat(f.x), {"x": Follow(act, inputs=True)}, Same("x"), name="cat")',
        'Rule(f.cat(f.x), {"x": Follow(act, inputs=True)}, act, name="cat")',
        ("tests/quantizers/xnnpack/test_quantizer.py", "tests/quantizers/conformance"),
    ),
    Mutant(
        "stale metadata: the shape of the node in front",
        "quant2e/graph/edit.py",
        "    if (value := value_of_call(node)) is not None:",
        '    if (value := place.meta.get("val")) is not None:',
        (
            "tests/quant2e/graph/test_edit.py",
            "tests/quant2e/passes/test_rewrite.py",
        ),
    ),
    Mutant(
        "one dequantize for all readers",
        "quant2e/convert/insert_qdq.py",
        "    for user in list(call.users):\n        if user.target in SHAPE_READERS:",
        "    for user in list(call.users)[:1]:\n        call.replace_all_uses_with(user, lambda u: False)\n"
        "        if user.target in SHAPE_READERS:",
        ("tests/quant2e/convert/test_convert.py",),
    ),
    Mutant(
        "dead code that writes is removed",
        "quant2e/passes/dead_code.py",
        "if is_random(node) or observed_writes(node):",
        "if is_random(node):",
        ("tests/quant2e/passes/test_dead_code.py",),
    ),
    Mutant(
        "training writes to the model that was captured",
        "quant2e/prepare/prepare.py",
        "        own_tensors(own)\n",
        "",
        ("tests/quant2e/prepare/test_qat.py",),
    ),
    Mutant(
        "gradients outside of the range",
        "quant2e/observers/straight_through.py",
        "        ctx.save_for_backward((steps >= quant_min) & (steps <= quant_max))",
        "        ctx.save_for_backward(torch.ones_like(steps, dtype=torch.bool))",
        (f"{OBSERVERS}/test_straight_through.py",),
    ),
    # ----------------------------------------------------------------------------------------------------------- files
    Mutant(
        "bytes are not flushed to disk",
        "quant2e/files.py",
        "            os.fsync(written.fileno())",
        "            pass",
        ("tests/quant2e/test_files.py",),
    ),
    Mutant(
        "the move is not flushed to disk",
        "quant2e/files.py",
        "        _sync(target.parent)\n",
        "",
        ("tests/quant2e/test_files.py",),
    ),
    Mutant(
        "damaged records are not noticed",
        "quant2e/storage/file.py",
        "        hashed = check_manifest(archive.records)",
        "        hashed = True",
        (
            "tests/quant2e/storage/test_manifest.py",
            "tests/quant2e/storage/test_pt2.py",
        ),
    ),
    # ------------------------------------------------------------------------------------------------------- lowerings
    Mutant(
        "a verification that passes ten times the bound",
        "lowering/verify.py",
        "self.max_steps <= bound.steps or self.sqnr_db",
        "self.max_steps <= 10 * bound.steps or self.sqnr_db",
        ("tests/lowering/test_verify.py",),
    ),
    Mutant(
        "sums of two products that are taken to fit in 16 bits",
        "lowering/native/units/arithmetic.py",
        "    if _fit(weight, x.high, 2):",
        "    if x.high:",
        ("tests/lowering/native/test_sums.py",),
    ),
    Mutant(
        "AVX2 sums that saturate where they are exact for any bytes",
        "lowering/native/kernels/dot.h",
        "  if constexpr (kHow == kExact) {",
        "  if constexpr (kHow == 99) {",
        ("tests/lowering/native/test_sums.py",),
    ),
    Mutant(
        "sums of activations minus 128 that begin as those of activations",
        "lowering/native/kernels/dot.h",
        "constexpr bool kShifts = true;",
        "constexpr bool kShifts = false;",
        ("tests/lowering/native/test_sums.py",),
    ),
)
"""All of them; `tests/test_mutants.py` holds that each still finds its place."""
