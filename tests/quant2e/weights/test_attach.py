"""Weights that stay in their files: what a model of them gives, and what files that do not fit are told."""

import copy
import pickle

import pytest
import torch
from torch import nn

import quant2e
from quant2e.documents import safetensors_file
from quant2e.errors import CaptureError, FileFormatError, Quant2eError
from quant2e.stored_tensor import StoredTensor
from quant2e.weights.short_form import Shortened, shortened
from quantizers import X86InductorQuantizer, XNNPACKQuantizer
from tests.quant2e.weights.checkpoints import write_safetensors, write_shards


class Words(nn.Module):
    """A table, two linears, a norm with a buffer that no file holds, and a head that may be the table."""

    def __init__(self, tied=True):
        super().__init__()
        self.table = nn.Embedding(48, 64)
        self.up, self.down = nn.Linear(64, 96), nn.Linear(96, 64, bias=False)
        self.norm, self.head = nn.LayerNorm(64), nn.Linear(64, 48, bias=False)
        self.register_buffer("factor", torch.full((64,), 0.5), persistent=False)
        self.register_buffer("offset", torch.zeros(64))
        if tied:
            self.head.weight = self.table.weight

    def forward(self, tokens):
        return self.head(self.norm(self.down(torch.relu(self.up(self.table(tokens) * self.factor + self.offset)))))


TOKENS = (torch.tensor([[3, 17, 5]]),)


def random(tied=True, dtype=torch.float32):
    torch.manual_seed(0)
    return Words(tied).eval().to(dtype)


def empty(tied=True, dtype=torch.float32):
    with quant2e.parameters_on_meta():
        return Words(tied).eval().to(dtype)


def short_ones(result):
    return {name for name, buffer in result.module.named_buffers() if shortened(buffer) is not None}


def tensors(model, *without):
    return {name: value for name, value in model.state_dict().items() if name not in without}


@pytest.fixture
def reads(monkeypatch):
    """How often each tensor was read."""
    counts = {}

    def counted(place, read=safetensors_file.read_tensor):
        counts[place.name] = counts.get(place.name, 0) + 1
        return read(place)

    monkeypatch.setattr(safetensors_file, "read_tensor", counted)
    return counts


def test_parameters_on_meta_take_no_memory_and_buffers_do():
    model = empty()
    assert all(parameter.is_meta for parameter in model.parameters())
    assert model.head.weight is model.table.weight
    assert not any(buffer.is_meta for buffer in model.buffers())
    assert not nn.Linear(2, 2).weight.is_meta


def test_the_model_runs_from_its_files_and_is_captured_without_reading_them(tmp_path, reads):
    plain = random()
    file = write_safetensors(tmp_path / "model.safetensors", tensors(plain, "head.weight"))
    model = quant2e.attach_weights(empty(), file)
    assert isinstance(model.up.weight, StoredTensor)
    assert isinstance(model.up.weight, nn.Parameter)
    assert type(model.up.bias) is nn.Parameter
    assert model.head.weight is model.table.weight
    captured = quant2e.capture(model, TOKENS)
    assert not reads
    assert torch.equal(model(*TOKENS), plain(*TOKENS))
    assert torch.equal(captured(*TOKENS), plain(*TOKENS))
    assert reads == {"table.weight": 4, "up.weight": 2, "down.weight": 2}


@pytest.mark.parametrize(("tied", "scheme", "dtype"), [(True, "w8", torch.bfloat16), (False, "w4-g32", torch.float32)])
def test_quantized_from_files_it_is_the_same_bit_for_bit(tmp_path, dtype, tied, scheme):
    plain = random(tied, dtype)
    folder = write_shards(tmp_path, tensors(plain, *(["head.weight"] if tied else [])))
    model = quant2e.attach_weights(empty(tied, dtype), folder)
    here = quant2e.quantize(plain, TOKENS, X86InductorQuantizer().set_global(scheme), min_sqnr_db=None)
    there = quant2e.quantize(model, TOKENS, X86InductorQuantizer().set_global(scheme), min_sqnr_db=None)
    assert str(there.report) == str(here.report)
    for result, name in ((here, "here.pt2"), (there, "there.pt2")):
        result.save(tmp_path / name)
    assert (tmp_path / "there.pt2").read_bytes() == (tmp_path / "here.pt2").read_bytes()
    loaded = quant2e.load(tmp_path / "there.pt2")
    assert torch.equal(loaded(*TOKENS), here(*TOKENS))
    held = {type(tensor.place) for tensor in there.module.state_dict().values() if isinstance(tensor, StoredTensor)}
    assert held <= {Shortened}
    assert ("up.weight_quantized" in short_ones(there)) == (scheme == "w4-g32")
    assert not short_ones(loaded)


@pytest.mark.slow
def test_activations_are_calibrated_from_files(tmp_path):
    plain = random()
    file = write_safetensors(tmp_path / "model.safetensors", tensors(plain, "head.weight"))
    data = [(torch.randint(48, (1, 3), generator=torch.Generator().manual_seed(seed)),) for seed in range(3)]
    results = [
        quant2e.quantize(model, TOKENS, XNNPACKQuantizer().set_global("w8a8"), data, min_sqnr_db=None)
        for model in (plain, quant2e.attach_weights(empty(), file))
    ]
    assert torch.equal(results[0](*TOKENS), results[1](*TOKENS))


def test_floats_of_a_file_may_be_narrower_than_the_model(tmp_path):
    half = random(dtype=torch.bfloat16)
    file = write_safetensors(tmp_path / "model.safetensors", tensors(half, "head.weight"))
    model = quant2e.attach_weights(empty(), file)
    assert model.up.weight.dtype is model.norm.weight.dtype is torch.float32
    assert torch.equal(model(*TOKENS), half.float()(*TOKENS))
    wide = write_safetensors(tmp_path / "wide.safetensors", tensors(random(), "head.weight"))
    with pytest.raises(Quant2eError, match=r"'table.weight' is torch.float32, and torch.bfloat16 in the model: build"):
        quant2e.attach_weights(empty(dtype=torch.bfloat16), wide)


def test_stored_weights_are_copied_pickled_and_never_written_to(tmp_path):
    file = write_safetensors(tmp_path / "model.safetensors", tensors(random(), "head.weight"))
    model = quant2e.attach_weights(empty(), file)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert isinstance(other.up.weight, StoredTensor)
        assert other.head.weight is other.table.weight
        assert torch.equal(other(*TOKENS), model(*TOKENS))
    with torch.no_grad(), pytest.raises(Quant2eError, match=r"mul_.* writes to 'up.weight' in .*model.safetensors"):
        model.up.weight.mul_(2)
    assert "StoredTensor('up.weight' in" in repr(model.up.weight)
    file.write_bytes(file.read_bytes() + b"x")
    with pytest.raises(FileFormatError, match="changed after its header was read"):
        model(*TOKENS)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop("up.weight"), r"1 tensors of the model are not in the files:\n  'up.weight'"),
        (lambda t: t.update({"tabel.weight": t.pop("table.weight")}), r"'table.weight'; did you mean 'tabel.weight'"),
        (lambda t: t.update(extra=torch.zeros(2)), r"1 tensors of the files have no place in the model:\n  'extra'"),
        (lambda t: t.update({"up.bias": torch.zeros(5)}), r"'up.bias' has the shape \[5\], and \[96\] in the model"),
        (lambda t: t.update({"up.bias": torch.zeros(96, dtype=torch.int32)}), "'up.bias' is torch.int32, and"),
        (lambda t: t.update({"head.weight": torch.zeros(48, 64)}), "'table.weight' and 'head.weight' are one tensor"),
    ],
)
def test_files_that_do_not_fit_are_refused_before_anything_changes(tmp_path, change, said):
    given = tensors(random(), "head.weight")
    change(given)
    file = write_safetensors(tmp_path / "model.safetensors", given)
    model = empty()
    with pytest.raises(Quant2eError, match=said):
        quant2e.attach_weights(model, file)
    assert all(parameter.is_meta for parameter in model.parameters())


def test_names_that_the_model_does_without_are_left_out_by_a_pattern(tmp_path):
    given = tensors(random()) | {"layers.0.inv_freq": torch.zeros(2)}  # with the head, equal to the table
    file = write_safetensors(tmp_path / "model.safetensors", given)
    model = quant2e.attach_weights(empty(), file, ignore=("*.inv_freq",))
    assert torch.equal(model(*TOKENS), random()(*TOKENS))
    with pytest.raises(Quant2eError, match=r"ignore='\*.freq_inv' names no tensor of the files"):
        quant2e.attach_weights(empty(), file, ignore=("*.freq_inv",))


def test_what_has_no_values_says_so(tmp_path):
    with torch.device("meta"):
        model = Words().eval()
    with pytest.raises(CaptureError, match=r"'table.weight' and \d+ more of Words are on the meta device"):
        quant2e.capture(model, TOKENS)
    file = write_safetensors(tmp_path / "model.safetensors", tensors(random(), "head.weight"))
    with pytest.raises(Quant2eError, match=r"buffers are on the meta device and in no file:\n  'factor'"):
        quant2e.attach_weights(model, file)
    with pytest.raises(Quant2eError, match="takes an nn.Module, not a dict"):
        quant2e.attach_weights({}, file)


@pytest.mark.slow
def test_algorithms_work_on_weights_in_memory(tmp_path):
    file = write_safetensors(tmp_path / "model.safetensors", tensors(random(), "head.weight"))
    model = quant2e.attach_weights(empty(), file)
    data = [(torch.randint(48, (1, 3), generator=torch.Generator().manual_seed(seed)),) for seed in range(4)]
    quantizer = X86InductorQuantizer().set_global("w8")
    options = {"algorithms": ["gptq"], "min_sqnr_db": None}
    there = quant2e.quantize(model, TOKENS, quantizer, data, **options)
    here = quant2e.quantize(random(), TOKENS, quantizer, data, **options)
    assert torch.equal(there(*TOKENS), here(*TOKENS))
    assert isinstance(model.up.weight, StoredTensor)
