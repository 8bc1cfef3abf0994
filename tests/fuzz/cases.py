"""What was found wrong, as programs that ``python -m tests.fuzz`` printed: a row fails when its fault comes back."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Case:
    """``program``: as the fuzzer printed it, with the setting and the seed that it named; ``oracle``: what failed."""

    name: str
    oracle: str
    setting: str
    seed: int
    program: str


CASES: tuple[Case, ...] = (
    Case(
        "an op whose result nothing reads kept a convolution and its relu apart",
        "dead_code",
        "xnnpack",
        24,
        """
        x0: float32[2, 4, 8, 8] normal
        v0 = conv2d.padding(x0, weight[4, 1, 2, 2], None, [1, 1], 'same', [1, 1], 4)
        v1 = relu.default(v0)
        return v1
        """,
    ),
    Case(
        "observers that are on learn from what is evaluated, which the oracle has to leave out",
        "training",
        "xnnpack",
        3,
        """
        x0: float32[1, 3, 17] normal
        x1: float32[1, 1, 1] normal
        v0 = add.Tensor(x0, x1)
        return v0
        """,
    ),
    Case(
        "errors of products of few weights are one sample, which the mean of the model of noise does not cover",
        "rounding_noise",
        "x86-weights",
        673,
        """
        x0: float32[5, 7, 1] normal
        x1: float32[5, 7] positive
        batch varies
        v0 = linear.default(x0, weight[8, 1], None)
        v1 = linear.default(x1, weight[4, 7], bias[4])
        v2 = einsum.default('abc,cd->abd', [v0, weight[8, 4]])
        v3 = linear.default(v2, weight[4, 4], None)
        v4 = linear.default(v3, weight[8, 4], bias[8])
        v5 = relu_.default(v4)
        v6 = linear.default(x1, weight[4, 7], bias[4])
        return v1, v5, v6, v4
        """,
    ),
    Case(
        "observers in the body of a scan learned while a pass was watched",
        "training",
        "x86",
        38,
        """
        x0: float32[5, 1] normal
        x1: float32[3, 1, 7] negative
        v0 = recurrence(x0, weight[1, 1], weight[1, 1])
        v1 = einsum.default('abc,cd->abd', [x1, weight[7, 4]])
        return v0, v1
        """,
    ),
    Case(
        "a convolution took the stride of a dimension of size one for channels that come last",
        "layout",
        "x86",
        1218,
        """
        x0: float32[2, 7, 1] normal
        v0 = transpose.int(x0, -1, -2)
        v1 = conv_transpose1d.default(v0, weight[1, 2, 2], bias[2], [2], [1], [0], 1, [1])
        return v1
        """,
    ),
    Case(
        "a size at the end of its range that the graph itself cannot compute ended a lowering",
        "onnx",
        "composed",
        475,
        """
        x0: int64[5] below 16
        batch varies
        v0 = arange.start_step(0, 6, 3, dtype=torch.int64)
        v1 = embedding_bag.default(weight_negative[16, 8], x0, v0, False, 1)
        return v1
        """,
    ),
    Case(
        "a larger batch has numbers far beyond the six that were calibrated on",
        "other_batches",
        "xnnpack",
        2353,
        """
        x0: float32[2, 1] normal
        batch varies
        v0 = mul_.Tensor(x0, x0)
        v1 = linear.default(v0, weight[8, 1], bias[8])
        return v1
        """,
    ),
    Case(
        "XNNPACK's softmax behind a convolution was along the channels, which come last in memory",
        "executorch",
        "x86-weights",
        1852,
        """
        x0: float32[2, 4, 8, 8] normal
        v0 = conv_transpose2d.input(x0, weight[4, 2, 3, 3], bias[2], [1, 1], [0, 0], [0, 0], 1, [1, 1])
        v1 = softmax.int(v0, -1)
        return v1
        """,
    ),
)
