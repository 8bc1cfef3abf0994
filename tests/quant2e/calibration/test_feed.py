"""Batches of training scripts: what is no input of the model is left out and noted, or the error says what to do."""

from collections import UserDict

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import quant2e
from quant2e.calibration.batches import check_batch
from quant2e.calibration.feed import Feed
from quant2e.errors import CalibrationError, CaptureError
from quant2e.graph.captured.calls import Call
from quantizers import XNNPACKQuantizer, get_symmetric_quantization_config


class Encoder(nn.Module):
    """Token numbers and their mask [n, 6] → [n, 5]."""

    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(50, 16), nn.Linear(16, 5)

    def forward(self, input_ids, attention_mask):
        x = self.table(input_ids) * attention_mask[..., None]
        return self.head(x.sum(1))


def images(n):
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(n))


def classifier():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)).eval()


def tokens(n):
    return torch.randint(0, 50, (n, 6), generator=torch.Generator().manual_seed(n))


def quantizer():
    return XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))


LABELS = torch.arange(40) % 4


def read(graph, data, **options):
    feed = Feed(data, graph, **options)
    return list(feed), feed.notes


def test_labels_beside_images_are_left_out():
    graph = quant2e.capture(classifier(), images(8))
    loader = DataLoader(TensorDataset(images(40), LABELS), batch_size=8)
    calls, notes = read(graph, loader, name="calibration")
    assert len(Feed(loader, graph)) == len(calls) == 5
    for call, (batch, _) in zip(calls, loader, strict=True):
        assert torch.equal(*call.args, batch)
    assert notes == ("item 1 of each calibration batch is no input of the model: it was left out",)


def test_items_in_any_place_and_dicts_beside_labels():
    graph = quant2e.capture(classifier(), images(8))
    calls, notes = read(graph, [(torch.tensor(3), LABELS[:8], images(8))])
    assert torch.equal(calls[0].args[0], images(8))
    assert notes == tuple(f"item {i} of each batch is no input of the model: it was left out" for i in (0, 1))
    ids, mask = tokens(4), torch.ones(4, 6)
    encoder = quant2e.capture(Encoder().eval(), {"input_ids": ids, "attention_mask": mask})
    batch = UserDict(input_ids=ids, attention_mask=mask, labels=LABELS[:4], idx=["a"])
    for data, more in ([batch], ()), ([(dict(batch), LABELS[:4])], ("item 1",)), ([[batch]], ()):
        calls, notes = read(encoder, data)
        assert calls[0].args == ()
        assert list(calls[0].kwargs) == ["input_ids", "attention_mask"]
        left_out = (*more, "'labels'", "'idx'")
        assert notes == tuple(f"{part} of each batch is no input of the model: it was left out" for part in left_out)


def test_what_fits_is_handed_on_as_it_is():
    graph = quant2e.capture(classifier(), images(8))
    call = quant2e.Call((images(8),), {})
    for batch in (images(8), (images(8),), [images(8)], {"input": images(8)}, call):
        calls, notes = read(graph, [batch])
        assert notes == ()
        assert sum(len(part) for part in calls[0]) == 1
    assert read(graph, [call])[0][0] is call
    assert read(None, [(images(8), LABELS)])[0][0].args[1] is LABELS  # a program without a graph takes all


def test_where_several_choices_fit_the_error_says_what_to_write():
    graph = quant2e.capture(nn.Embedding(50, 4).eval(), tokens(4))
    pairs = [(tokens(4), tokens(5)[:4])]
    with pytest.raises(CalibrationError, match=r"batch 0 has 2 items .*takes \(input\): 2 choices .*\(batch\[0\],\)"):
        read(graph, pairs)
    calls, notes = read(graph, pairs, transform=lambda batch: batch[1])
    assert torch.equal(calls[0].args[0], pairs[0][1])
    assert notes == ()


def test_a_transform_that_fails_is_named():
    graph = quant2e.capture(classifier(), images(8))
    with pytest.raises(CalibrationError, match=r"failed on calibration batch 0 \(float32\[8, 3, 8, 8\]\): KeyE"):
        read(graph, [images(8)], name="calibration", transform=lambda batch: {}["x"])
    with pytest.raises(CalibrationError, match="transform is a int"):
        Feed([], graph, transform=3)
    with pytest.raises(CalibrationError, match="batch 0 is a str"):
        read(graph, [images(8)], transform=lambda batch: "x")


def test_a_smaller_last_batch_is_left_out_and_a_smaller_one_before_fails():
    graph = quant2e.capture(classifier(), images(8))
    calls, notes = read(graph, [images(8), images(8), images(5)])
    assert [len(call.args[0]) for call in calls] == [8, 8]
    assert notes == (
        "the last batch has 5 samples and the model was captured for 8: it was left out; dynamic_batch=True takes it",
    )
    for data in ([images(5)], [images(5), images(8)], [images(8), images(5), images(8)], [images(8), images(9)]):
        calls, notes = read(graph, data)
        assert [len(call.args[0]) for call in calls] == [len(x) for x in data]
        assert notes == ()
    prepared = quant2e.prepare_pt2e(graph, quantizer())
    with pytest.raises(CalibrationError, match=r"calibration batch 1 .*size\(\)\[0\] == 8.*got input=tensor\(5"):
        quant2e.calibrate(prepared, [images(8), images(5), images(8)])
    varying = quant2e.capture(classifier(), images(8), dynamic_batch=True)
    calls, notes = read(varying, [images(8), images(5)])
    assert [len(call.args[0]) for call in calls] == [8, 5]
    assert notes == ()


def test_the_loader_of_a_training_script_in_every_function():
    model, loader = classifier(), DataLoader(TensorDataset(images(40), LABELS), batch_size=16)
    left_out = "item 1 of each {}batch is no input of the model: it was left out"
    result = quant2e.quantize(model, images(16), quantizer(), loader)
    notes = result.report.notes
    assert left_out.format("calibration ") in notes
    assert any("the last calibration batch has 8 samples" in note for note in notes)
    plain = quant2e.quantize(model, images(16), quantizer(), [x for x, _ in loader][:2])
    assert result.encodings == plain.encodings
    mended = quant2e.quantize(model, images(16), quantizer(), loader, algorithms="auto")
    assert left_out.format("calibration ") in mended.report.notes
    assert left_out.format("") in quant2e.compare(model, result, loader).notes
    assert left_out.format("calibration ") in quant2e.sensitivity(model, images(16), quantizer(), loader).notes
    prepared = quant2e.prepare_pt2e(quant2e.capture(model, images(16)), quantizer())
    quant2e.calibrate(prepared, loader)
    assert left_out.format("calibration ") in quant2e.report_of(prepared).notes
    assert left_out.format("") in quant2e.sensitivity(prepared, data=loader).notes
    assert quant2e.select_ranges(prepared, loader) is not None
    assert quant2e.check_data(quant2e.capture(model, images(16)), loader).batches == 2


def test_a_dynamic_batch_from_the_first_call_on(tmp_path):
    model, loader = classifier(), DataLoader(TensorDataset(images(40), LABELS), batch_size=16)
    for example in (images(16), images(1), {"input": images(16)}):
        result = quant2e.quantize(model, example, quantizer(), loader, dynamic_batch=True)
        assert not any("samples and the model" in note for note in result.report.notes)
        result.save(tmp_path / "model.pt2")
        again = quant2e.load(tmp_path / "model.pt2")
        for n in (1, 3, 16, 40):
            assert torch.equal(again(images(n)), result(images(n)))
    bounded = quant2e.quantize(model, images(1), quantizer(), loader, dynamic_batch=20)
    assert torch.equal(bounded(images(16)), result(images(16)))
    with pytest.raises(CaptureError, match=r"size\(\)\[0\] <= 20"):
        bounded(images(21))
    encoder = Encoder().eval()
    call = {"input_ids": tokens(4), "attention_mask": torch.ones(4, 6)}
    assert quant2e.capture(encoder, call, dynamic_batch=True)(tokens(7), torch.ones(7, 6)).shape == (7, 5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: quant2e.capture(m, (tokens(4), torch.ones(1, 6)), dynamic_batch=True), "those are 1, 4. Say which"),
        (lambda m: quant2e.capture(m, (3, 4), dynamic_batch=True), "no input has a dimension"),
        (
            lambda m: quant2e.capture(m, (tokens(4), torch.ones(4, 6)), dynamic_batch=True, dynamic_shapes={}),
            "leave dynamic_shapes out",
        ),
        (lambda m: quant2e.capture(m, (tokens(4), torch.ones(4, 6)), dynamic_batch=3), "example inputs have 4 samples"),
        (lambda m: quant2e.capture(m, (tokens(4), torch.ones(4, 6)), dynamic_batch=1), "dynamic_batch=1: True, or the"),
        (lambda m: quant2e.capture(m, tokens(4), dynamic_batch=True), "missing a required argument: 'attention_mask'"),
        (
            lambda m: quant2e.capture(
                quant2e.capture(m, (tokens(4), torch.ones(4, 6))), (tokens(4), torch.ones(4, 6)), dynamic_batch=True
            ),
            "already captured: give dynamic_shapes when exporting",
        ),
    ],
)
def test_a_dynamic_batch_that_cannot_be(call, message):
    with pytest.raises(CaptureError, match=message):
        call(Encoder().eval())


class Nested(nn.Module):
    def forward(self, x, states, *, scale):
        return x * scale["k"] + states[0][1]


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda bad, good: Call((bad, [(good, good)]), {"scale": {"k": good}}), "its input 'x':"),
        (lambda bad, good: Call((good, [(good, bad)]), {"scale": {"k": good}}), r"its input 'states\[0\]\[1\]':"),
        (lambda bad, good: Call((good, [(good, good)]), {"scale": {"k": bad}}), r"its input 'scale\['k'\]':"),
        (lambda bad, good: Call((good, good, good, bad), {}), "its input 3:"),  # the graph takes none there
    ],
)
def test_nan_is_said_to_be_in_the_argument_that_holds_it(call, said):
    good = torch.ones(2, 3)
    graph = quant2e.capture(Nested(), (good, [(good, good)]), {"scale": {"k": good}})
    assert check_batch(call(good, good), "batch 3", graph) == call(good, good)
    with pytest.raises(CalibrationError, match=f"^batch 3 holds NaN in {said} clean the data"):
        check_batch(call(good * float("nan"), good), "batch 3", graph)
    with pytest.raises(CalibrationError, match="^batch 3 holds NaN in its input "):
        check_batch(call(good * float("nan"), good), "batch 3")


def test_a_batch_that_the_model_fails_on_is_named_as_the_user_counts_it():
    data = [images(2) for _ in range(12)]
    data[11] = images(2)[:, :2]
    with pytest.raises(CalibrationError, match="the model failed on calibration batch 11 "):
        quant2e.quantize(classifier(), (data[0],), quantizer(), data)
