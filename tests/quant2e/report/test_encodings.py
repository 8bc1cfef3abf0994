"""The difference of two records of encodings reads like a review."""

from dataclasses import replace

from quant2e.documents.review import change_of
from quant2e.report.encodings import Encodings, GroupEncoding

INT8 = {"encoding": "per_tensor", "dtype": "int8", "quant_min": -128, "quant_max": 127}
OLD = Encodings(
    "XNNPACKQuantizer",
    (
        GroupEncoding(("x -> conv",), **INT8, scale=(0.5,), zero_point=(0,)),
        GroupEncoding(
            ("w -> conv",), **{**INT8, "encoding": "per_channel"}, axis=0, scale=(0.5, 0.25), zero_point=(0, 0)
        ),
        GroupEncoding(("relu", "relu -> fc"), **INT8, scale=(0.1,), zero_point=(-128,)),
        *(GroupEncoding((f"add_{i}",), **INT8, scale=(0.1,), zero_point=(1,)) for i in range(6)),
        GroupEncoding(("fc",), **INT8, scale=(0.1,), zero_point=(1,)),
    ),
)


def test_the_same():
    assert OLD.diff(OLD) == "encodings: 10 -> 10 groups of points\nno difference"


def test_a_review():
    x, w, relu, *adds, fc = OLD.groups
    new = Encodings(
        "X86InductorQuantizer",
        (
            replace(x, scale=(0.55,), zero_point=(-3,)),
            replace(w, scale=(0.5, 1.0)),
            replace(relu, points=("relu",)),
            *(replace(add, encoding="float", scale=(), zero_point=()) for add in adds),
            GroupEncoding(("gelu",), **{**INT8, "encoding": "dynamic"}),
        ),
    )
    assert OLD.diff(new).splitlines() == [
        "encodings by XNNPACKQuantizer -> X86InductorQuantizer: 10 -> 10 groups of points",
        "removed (1):",
        "  (fc): per_tensor int8[-128, 127]",
        "added (1):",
        "  (gelu): dynamic int8[-128, 127]",
        "other kind (6):",
        "  (add_0), (add_1), (add_2), (add_3) and 2 more: per_tensor int8[-128, 127] -> float",
        "other numbers (2):",
        "  (x -> conv): scale 0.5 -> 0.55 (+10 %), zero point 0 -> -3",
        "  (w -> conv): 1 of 2 scales, most in number 1: 0.25 -> 1 (×4)",
        "other shares (1):",
        "  (relu): no longer shares with relu -> fc",
    ]


def test_changes():
    assert change_of(1.0, 0.5) == "1 -> 0.5 (÷2)"
    assert change_of(1.0, 0.9) == "1 -> 0.9 (-10 %)"
    assert change_of(0.0, 0.9) == "0 -> 0.9"
    assert change_of(3, 4) == "3 -> 4"
