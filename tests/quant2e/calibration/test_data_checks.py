import pytest
import torch
from torch import nn

import quant2e
from quant2e.calibration.data_checks import check_data
from quant2e.errors import CalibrationError


def kinds(model, batches):
    captured = quant2e.capture(model.eval(), (batches[0],))
    return {(f.kind, f.place.split(" ")[0]): str(f) for f in check_data(captured, batches)}


def images(n=8, batch=8):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(batch, 3, 8, 8, generator=g) for _ in range(n)]


def trained():
    """A conv net whose running statistics fit normalised images."""
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, momentum=None), nn.ReLU()).train()
    with torch.no_grad():
        for x in images():
            net(x)
    return net.eval()


def test_good_data_has_no_findings():
    assert kinds(trained(), images()) == {}


def test_too_few_samples():
    found = kinds(trained(), images(2, 3))
    assert found[("few", "")].startswith("only 6 samples in 2 batches")


def test_inputs_that_are_not_normalised():
    bytes_like = [x * 58 + 114 for x in images()]
    ((kind, _), text), *_ = kinds(trained(), bytes_like).items()
    assert kind == "unnormalised"
    assert "is the data normalised as it was in training?" in text


def test_one_batch_owns_the_range():
    batches = images()
    batches[5] = batches[5] * 30
    texts = [text for (kind, _), text in kinds(nn.Conv2d(3, 4, 3), batches).items() if kind == "owner"]
    assert len(texts) == 2
    assert "the input 'input': batch 5 alone decides the range" in texts[0]


def test_dead_and_saturated_channels():
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU6())
    with torch.no_grad():
        net[0].bias.copy_(torch.tensor([0.0, -100, 0, 100, -100, 0]))
    texts = [
        t for (k, _), t in kinds(net, [torch.randn(32, 4) for _ in range(4)]).items() if k in ("dead", "saturated")
    ]
    assert "2 of 6 channels (1, 4) are zero throughout" in texts[0]
    assert "1 of 6 channels (3) is at the upper bound for more than half of the values" in texts[1]


def test_non_finite_values_are_named_and_masks_are_not():
    x = torch.randn(64, 4)
    x[3, 2] = float("nan")
    x[5] = -float("inf")
    found = kinds(nn.Identity(), [x])
    assert {kind for kind, _ in found} == {"non-finite"}
    assert "1 values are NaN or +inf" in next(iter(found.values()))


def test_no_data_is_an_error_and_the_model_is_left_alone():
    model = trained()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    captured = quant2e.capture(model, (images()[0],))
    check_data(captured, images(), num_batches=2)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    with pytest.raises(CalibrationError, match="held no batch"):
        check_data(captured, [])


def test_inputs_are_named_as_the_model_names_them():
    """``input`` is a function of Python, so that the node has another name."""
    graph = quant2e.capture(nn.Linear(4, 4), (torch.zeros(2, 4),))
    bad = torch.full((40, 4), float("nan"))
    found = [finding.place for finding in quant2e.check_data(graph, [bad]) if finding.kind == "non-finite"]
    assert found[0] == "the input 'input'"
    with pytest.raises(quant2e.CaptureError, match="input 'input' has dtype torch.int64.*pass input.to"):
        quant2e.compare(graph, graph, [torch.zeros(2, 4, dtype=torch.int64)])
