"""Runs quantizers of other libraries through their own flow and through ours; prints what happened as JSON.

A script, because importing these libraries changes global state: ``python guest_runner.py torchao|executorch|others``.
"""

import copy
import json
import operator
import sys
import warnings

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(__import__("pathlib").Path(__file__).parents[2]))

from quant2e.convert.convert import convert_pt2e
from quant2e.graph.captured.capture import capture
from quant2e.graph.qdq_ops import DEQUANTIZE
from quant2e.prepare.prepare import prepare_pt2e


def seq(*layers):
    return nn.Sequential(*layers)


class Fn(nn.Module):
    """A forward over named layers."""

    def __init__(self, forward, **layers):
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)
        self._forward = forward

    def forward(self, *args):
        return self._forward(self, *args)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x):
        batch, length, width = x.shape
        q, k, v = (layer(x).view(batch, length, 2, 4).transpose(1, 2) for layer in (self.q, self.k, self.v))
        scores = torch.softmax(q @ k.transpose(-1, -2) / 2.0, -1)
        return self.o((scores @ v).transpose(1, 2).reshape(batch, length, width)) + x


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.b(F.relu(self.a(x)))


def conv(i, o, k=3, **options):
    return nn.Conv2d(i, o, k, padding=k // 2, **options)


IMAGE = (2, 4, 8, 8)
MODELS = {
    "conv chain": (seq(conv(4, 8), nn.ReLU(), conv(8, 8, stride=2), nn.ReLU(), conv(8, 4, 1)), IMAGE),
    "conv bn relu": (seq(conv(4, 8, bias=False), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 8), nn.BatchNorm2d(8)), IMAGE),
    "conv in-place relu": (seq(conv(4, 8), nn.ReLU(inplace=True), conv(8, 4), nn.ReLU6(inplace=True)), IMAGE),
    "depthwise": (seq(conv(4, 4, groups=4), nn.BatchNorm2d(4), nn.Hardtanh(), conv(4, 8, 1)), IMAGE),
    "residual add": (Fn(lambda m, x: F.relu(m.b(F.relu(m.a(x))) + x), a=conv(4, 4), b=conv(4, 4)), IMAGE),
    "residual add in place": (Fn(lambda m, x: m.b(F.relu(m.a(x))).add_(m.a(x)), a=conv(4, 4), b=conv(4, 4)), IMAGE),
    "cat": (Fn(lambda m, x: m.c(torch.cat([m.a(x), m.b(x)], 1)), a=conv(4, 4), b=conv(4, 4), c=conv(8, 4)), IMAGE),
    "cat of one tensor": (Fn(lambda m, x: m.c(torch.cat([y := m.a(x), y], 1)), a=conv(4, 4), c=conv(8, 4)), IMAGE),
    "cat of cat": (
        Fn(lambda m, x: torch.cat([torch.cat([m.a(x), m.b(x)], 1), m.a(x)], 1), a=conv(4, 4), b=conv(4, 4)),
        IMAGE,
    ),
    "max pool": (seq(conv(4, 8), nn.ReLU(), nn.MaxPool2d(2), conv(8, 4)), IMAGE),
    "average pool": (seq(conv(4, 8), nn.AvgPool2d(2), conv(8, 4)), IMAGE),
    "adaptive pool": (seq(conv(4, 8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)), IMAGE),
    "mean": (Fn(lambda m, x: m.b(m.a(x).mean((2, 3))), a=conv(4, 8), b=nn.Linear(8, 3)), IMAGE),
    "transposed conv": (seq(conv(4, 8), nn.ConvTranspose2d(8, 4, 2, stride=2), nn.ReLU(), conv(4, 4)), IMAGE),
    "attention": (Attention(), (2, 5, 8)),
    "one module called twice": (Fn(lambda m, x: m.a(F.relu(m.a(x))), a=nn.Linear(8, 8)), (2, 8)),
    "tied weights": (Tied(), (2, 8)),
    "linear of any rank": (Fn(lambda m, x: m.a(x) + m.a(x[0, 0]), a=nn.Linear(8, 8)), (2, 3, 4, 8)),
    "linear without bias": (seq(nn.Linear(8, 8, bias=False), nn.ReLU(), nn.Linear(8, 4, bias=False)), (3, 8)),
    "conv1d": (seq(nn.Conv1d(4, 8, 3, padding=1), nn.ReLU(), nn.Conv1d(8, 4, 3)), (2, 4, 10)),
    "embedding": (
        Fn(lambda m, i: m.b(F.gelu(m.a(m.e(i)))), e=nn.Embedding(16, 8), a=nn.Linear(8, 8), b=nn.Linear(8, 4)),
        torch.arange(12).view(2, 6),
    ),
    "hardswish and silu": (seq(conv(4, 8), nn.Hardswish(), conv(8, 8), nn.SiLU(), conv(8, 4)), IMAGE),
    "scalars": (Fn(lambda m, x: m.b((m.a(x) * 0.5 + 1.0).clamp(min=0)) - 2, a=conv(4, 4), b=conv(4, 4)), IMAGE),
    "several outputs": (Fn(lambda m, x: (y := m.a(x), m.b(y), y * 2), a=nn.Linear(8, 8), b=nn.Linear(8, 4)), (2, 8)),
}


RARE = {
    **{name: MODELS[name] for name in ("residual add", "attention")},
    "norms": (
        Fn(lambda m, x: torch._softmax(m.a(x), -1, False), a=seq(nn.Linear(8, 8), nn.RMSNorm(8), nn.LayerNorm(8))),
        (2, 5, 8),
    ),
    "conv1d bn relu": (
        seq(nn.Conv1d(4, 8, 3), nn.BatchNorm1d(8), nn.ReLU(), nn.Conv1d(8, 4, 3), nn.ReLU()),
        (2, 4, 10),
    ),
    "weights alone": (
        Fn(lambda m, x: m.b(m.a(x).transpose(1, 2))[0], a=nn.Conv1d(4, 8, 3), b=nn.GRU(8, 8, batch_first=True)),
        (2, 4, 3),
    ),
    "one row": (seq(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)), (1, 8)),
}
"""Small models on which each of the other quantizers finds something.
They are exported strictly: Cadence needs the sources.
"""


def torchao_guests():
    from torchao.quantization.pt2e.quantizer.embedding_quantizer import EmbeddingQuantizer
    from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
        X86InductorQuantizer,
        get_default_x86_inductor_quantization_config,
    )

    def x86(**options):
        return lambda: X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config(**options))

    return {"x86 static": x86(), "x86 dynamic": x86(is_dynamic=True), "embedding": EmbeddingQuantizer}


def remember_patterns(utils):
    """A quantizer that exports its patterns anew for each model takes seconds;
    the same pattern gives the same graph.
    """
    export, known = utils._get_aten_graph_module_for_pattern, {}

    def identity(value):
        if isinstance(value, nn.Module):
            return type(value).__qualname__, identity(value.forward)
        if hasattr(value, "__code__"):
            return value.__code__, tuple(identity(cell.cell_contents) for cell in value.__closure__ or ())
        return value

    def remembered(pattern, example_inputs, is_cuda=False):
        key = (identity(pattern), tuple(x.shape for x in example_inputs), is_cuda)
        if key not in known:
            known[key] = export(pattern, example_inputs, is_cuda)
        return copy.deepcopy(known[key])  # the matcher changes it

    utils._get_aten_graph_module_for_pattern = remembered


def executorch_guests():
    from executorch.backends.xnnpack.quantizer import xnnpack_quantizer_utils
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )

    remember_patterns(xnnpack_quantizer_utils)

    def xnnpack(**options):
        return lambda: XNNPACKQuantizer().set_global(get_symmetric_quantization_config(**options))

    return {
        "xnnpack per tensor": xnnpack(),
        "xnnpack per channel": xnnpack(is_per_channel=True),
        "xnnpack dynamic": xnnpack(is_per_channel=True, is_dynamic=True),
    }


def other_guests():
    """Every other quantizer that imports."""
    from executorch.backends.cadence.aot.quantizer import quantizer as cadence
    from executorch.backends.example.example_quantizer import ExampleQuantizer
    from executorch.backends.samsung.quantizer.quantizer import EnnQuantizer
    from executorch.backends.vulkan.quantizer import vulkan_quantizer as vulkan
    from torchao.quantization.pt2e.quantizer import arm_inductor_quantizer as arm
    from torchao.quantization.pt2e.quantizer import xpu_inductor_quantizer as xpu
    from torchao.quantization.pt2e.quantizer.composable_quantizer import ComposableQuantizer

    def set_global(quantizer, config, **options):
        return lambda: quantizer().set_global(config(**options))

    known = torchao_guests()
    cadences = (
        "Default",
        "Nop",
        "RmsNormNop",
        "WithLayerNorm",
        "WakeWord",
        "FusedConvRelu",
        "W8A32Mixed",
        "WithSoftmax",
    )
    cadences += tuple(f"With16Bit{op}Activations" for op in ("Linear", "Conv", "Matmul"))
    return {
        "arm static": set_global(arm.ArmInductorQuantizer, arm.get_default_arm_inductor_quantization_config),
        "arm dynamic": set_global(
            arm.ArmInductorQuantizer, arm.get_default_arm_inductor_quantization_config, is_dynamic=True
        ),
        "xpu": set_global(xpu.XPUInductorQuantizer, xpu.get_default_xpu_inductor_quantization_config),
        "composable": lambda: ComposableQuantizer([known["embedding"](), known["x86 static"]()]),
        "coreml": coreml(),
        "example": ExampleQuantizer,
        "enn": EnnQuantizer,
        "vulkan": set_global(vulkan.VulkanQuantizer, vulkan.get_symmetric_quantization_config),
        "vulkan dynamic": set_global(vulkan.VulkanQuantizer, vulkan.get_symmetric_quantization_config, is_dynamic=True),
        **{f"cadence {name}": getattr(cadence, f"Cadence{name}Quantizer") for name in cadences},
    }


def coreml():
    """Core ML's quantizer, which looks for ReLU alone: its patterns of every activation take minutes to export."""
    from coremltools.optimize.torch.quantization.quantization_config import (
        LinearQuantizerConfig,
        ModuleLinearQuantizerConfig,
        QuantizationScheme,
    )
    from executorch.backends.apple.coreml.quantizer import CoreMLQuantizer, _coreml_quantizer_utils

    _coreml_quantizer_utils._supported_activations = (F.relu,)
    _coreml_quantizer_utils._supported_activations_no_inplace = ()
    remember_patterns(_coreml_quantizer_utils)
    scheme = ModuleLinearQuantizerConfig(quantization_scheme=QuantizationScheme.symmetric)
    return lambda: CoreMLQuantizer(LinearQuantizerConfig(global_config=scheme))


def data(shape):
    if isinstance(shape, torch.Tensor):
        return [(shape,), (shape.flip(0),), (shape * 7 % 16,)]
    return [(torch.randn(shape) * scale,) for scale in (1.0, 2.0, 0.5)]


def theirs(program, quantizer, batches):
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    prepared = prepare_pt2e(program.module(), quantizer)
    for batch in batches[:2]:
        prepared(*batch)
    return convert_pt2e(prepared)


def ours(captured, quantizer, batches):
    prepared = prepare_pt2e(captured, quantizer)
    for batch in batches[:2]:
        prepared(*batch)
    return convert_pt2e(prepared)


def attempt(flow, *args):
    """The result, and the last line of the error."""
    try:
        return flow(*args), ""
    except Exception as error:  # noqa: BLE001  # whatever a guest raises is its result
        return None, f"{type(error).__name__}: {error}".splitlines()[0]


def parameters(module):
    """What the dequantize nodes of a converted module say: scale, zero point, range and dtype."""

    def value(argument):
        if not isinstance(argument, torch.fx.Node):
            return str(argument)
        return str(operator.attrgetter(argument.target)(module).tolist()) if argument.op == "get_attr" else "computed"

    nodes = (node for node in module.graph.nodes if "dequantize_per" in str(node.target))
    return {tuple(map(value, node.args[1:])) for node in nodes}


def compare(program, captured, make, batches):
    torch.manual_seed(1)
    mine, my_error = attempt(ours, captured, make(), batches)
    torch.manual_seed(1)
    peer, peer_error = attempt(theirs, program, make(), batches)
    facts = {"ours": my_error, "theirs": peer_error, "quantized": 0, "equal": False}
    if mine is not None:
        facts["quantized"] = sum(node.target in DEQUANTIZE for node in mine.graph.nodes)
    if mine is not None and peer is not None:
        with torch.no_grad():
            pairs = [
                (a, b)
                for batch in batches
                for a, b in zip(*(torch.utils._pytree.tree_leaves(m(*batch)) for m in (mine, peer)), strict=True)
            ]
        facts["equal"] = all(torch.equal(a, b) for a, b in pairs)
        facts["parameters"] = parameters(mine) == parameters(peer)
        facts["difference"] = max(float((a - b).abs().max()) for a, b in pairs)
    return facts


def initialize(model):
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.uniform_(parameter, -0.5, 0.5)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2.0)


def main(guests, models=MODELS, strict=False):
    results = {}
    for name, (model, shape) in models.items():
        initialize(model)
        batches = data(shape)
        model.eval()
        program = torch.export.export(model, batches[0], strict=strict)
        captured = capture(program if strict else model, batches[0])
        for guest, make in guests.items():
            if guest == "embedding" and name != "embedding":
                continue
            results[f"{guest}: {name}"] = compare(program, captured, make, batches)
    return results


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    library = sys.argv[1]
    if library == "others":
        print(json.dumps(main(other_guests(), RARE, strict=True)))
    else:
        print(json.dumps(main({"torchao": torchao_guests, "executorch": executorch_guests}[library]())))
