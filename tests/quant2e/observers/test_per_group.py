"""Scales per group of neighbours: the numbers, the ops they become, and what does not mix."""

import pytest
import torch
from torch import nn

from quant2e import AnnotationError, CalibrationError, PassError, capture, convert_pt2e, prepare_pt2e
from quant2e.annotation.plan import same_numbers
from quant2e.annotation.specs import ANNOTATION, QuantizationAnnotation, QuantizationSpec, group_size_of, spec_text
from quant2e.convert.legality import check_legality
from quant2e.graph.qdq_ops import qd
from quant2e.observers.encodings import PerGroupEncoding, encode
from quant2e.observers.measuring import PerChannelMinMaxObserver
from quant2e.observers.per_group import PerGroupMinMaxObserver

SYMMETRIC, AFFINE = torch.per_channel_symmetric, torch.per_channel_affine


def spec(size, qscheme=SYMMETRIC):
    return QuantizationSpec(torch.int8, PerGroupMinMaxObserver.with_args(group_size=size), -8, 7, qscheme, 0)


class Weights:
    """Quantizes the weights of linear layers."""

    def __init__(self, given):
        self.given = given

    def annotate(self, gm):
        for node in gm.graph.nodes:
            if node.target is torch.ops.aten.linear.default:
                node.meta[ANNOTATION] = QuantizationAnnotation({node.args[1]: self.given})
        return gm

    def validate(self, gm):
        pass


def converted(size, qscheme=SYMMETRIC):
    torch.manual_seed(0)
    model = nn.Linear(12, 3, bias=False).eval()
    return model, convert_pt2e(prepare_pt2e(capture(model, (torch.eye(12),)), Weights(spec(size, qscheme))))


def test_the_encoding():
    observer = PerGroupMinMaxObserver(group_size=2, dtype=torch.int8, quant_min=-8, quant_max=7, qscheme=SYMMETRIC)
    observer(torch.tensor([[1.0, -15.0, 0.5, 0.25], [0.0, 0.0, 7.5, -3.0]]))
    found = encode(observer)
    assert isinstance(found, PerGroupEncoding)
    assert torch.equal(found.scale[:, 0], torch.tensor([2.0, torch.finfo(torch.float32).eps]))
    assert torch.equal(found.scale[:, 1], torch.tensor([0.5 / 7.5, 1.0]))
    assert found.zero_point.tolist() == [[0, 0], [0, 0]]
    assert (found.zero_point.dtype, found.group_size, found.quant_min, found.quant_max) == (torch.int32, 2, -8, 7)


@pytest.mark.parametrize("qscheme", [SYMMETRIC, AFFINE])
def test_the_graph(qscheme):
    model, gm = converted(4, qscheme)
    (node,) = (n for n in gm.graph.nodes if n.target is qd.dequantize_per_channel_group.default)
    assert node.args[3:] == (-8, 7, torch.int8, 4, torch.float32)
    integers, scales = gm.get_buffer(node.args[0].target), gm.get_buffer(node.args[1].target)
    assert (integers.dtype, integers.min() >= -8, integers.max() <= 7) == (torch.int8, True, True)
    assert tuple(scales.shape) == (3, 3)
    check_legality(gm)
    error = (gm(torch.eye(12)).t() - model.weight).abs().unflatten(1, (3, 4))
    assert bool((error <= scales[..., None] * 0.5001).all())


def test_unfolded_weights_are_legal_too():
    model = nn.Linear(12, 3, bias=False).eval()
    prepared = prepare_pt2e(capture(model, (torch.eye(12),)), Weights(spec(4)))
    folded, unfolded = convert_pt2e(prepared), convert_pt2e(prepared, fold_quantize=False)
    assert qd.quantize_per_channel_group.default in {n.target for n in unfolded.graph.nodes}
    assert torch.equal(folded(torch.eye(12)), unfolded(torch.eye(12)))


def test_a_graph_with_too_few_scales_is_not_legal():
    _, gm = converted(4)
    (node,) = (n for n in gm.graph.nodes if n.target is qd.dequantize_per_channel_group.default)
    node.update_arg(6, 6)
    with pytest.raises(PassError, match="9 scales for 6 groups"):
        check_legality(gm)


def test_specs_of_other_groups_are_other_numbers():
    channel = QuantizationSpec(torch.int8, PerChannelMinMaxObserver.with_args(), -8, 7, SYMMETRIC, 0)
    assert [group_size_of(s) for s in (spec(4), channel, None)] == [4, None, None]
    assert same_numbers(spec(4), spec(4))
    assert not same_numbers(spec(4), spec(8))
    assert not same_numbers(spec(4), channel)
    assert spec_text(spec(4)) == "s8[-8, 7], per channel symmetric, axis 0, groups of 4, PerGroupMinMaxObserver"


def test_mistakes():
    with pytest.raises(AnnotationError, match="a group has at least 2 values"):
        PerGroupMinMaxObserver(group_size=1)
    with pytest.raises(
        CalibrationError, match=r"groups of 5 do not divide the last dimension of a tensor of shape \[3, 12\]"
    ):
        converted(5)
