"""Composes quantizers of torchao and ExecuTorch with ours, in both directions; prints what each op became as JSON.

A script, because importing these libraries changes global state: ``python foreign_children.py``.
"""

import json
import sys
import warnings
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2]))

from quant2e import quantize
from quantizers import ComposableQuantizer, EmbeddingQuantizer, X86InductorQuantizer, XNNPACKQuantizer
from tests.quant2e.guest_runner import remember_patterns


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(16, 8)
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, ids):
        x = torch.relu(self.a(self.table(ids)))
        return self.c(self.b(x) + x)


def compositions():
    from executorch.backends.xnnpack.quantizer import xnnpack_quantizer as executorch
    from executorch.backends.xnnpack.quantizer import xnnpack_quantizer_utils
    from torchao.quantization.pt2e.quantizer import composable_quantizer, embedding_quantizer
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as torchao

    remember_patterns(xnnpack_quantizer_utils)

    def theirs(**options):
        return executorch.get_symmetric_quantization_config(is_per_channel=True, **options)

    u8 = torchao.get_default_x86_inductor_quantization_config()
    tables = embedding_quantizer.EmbeddingQuantizer
    return {
        "ours, executorch": [EmbeddingQuantizer(), executorch.XNNPACKQuantizer().set_global(theirs())],
        "torchao, ours": [tables(), XNNPACKQuantizer().set_global("w8a8")],
        "executorch dynamic, ours": [
            executorch.XNNPACKQuantizer().set_module_name("a", theirs(is_dynamic=True)),
            XNNPACKQuantizer().set_global("w8a8"),
        ],
        "ours dynamic, executorch": [
            XNNPACKQuantizer().set_module_name("a", "w8a8-dynamic"),
            executorch.XNNPACKQuantizer().set_global(theirs()),
        ],
        "torchao x86, ours": [
            torchao.X86InductorQuantizer().set_module_name_qconfig("b", u8),
            X86InductorQuantizer().set_global("w8a8"),
        ],
        "torchao's composition, ours": [
            composable_quantizer.ComposableQuantizer([tables()]),
            XNNPACKQuantizer().set_global("w8a8"),
        ],
        "ours in torchao's composition": composable_quantizer.ComposableQuantizer(
            [EmbeddingQuantizer(), XNNPACKQuantizer().set_global("w8a8")]
        ),
    }


def main():
    torch.manual_seed(0)
    net, ids = Net().eval(), (torch.arange(6).reshape(2, 3),)
    found = {}
    for name, children in compositions().items():
        quantizer = ComposableQuantizer(children) if isinstance(children, list) else children
        result = quantize(net, ids, quantizer, [ids])
        kinds = {verdict.op.name: verdict.kind for verdict in result.report.verdicts}
        found[name] = {**kinds, "error": float((result(*ids) - net(*ids)).abs().max())}
        if name == "executorch dynamic, ours":
            found["capabilities"] = [row.pattern for row in quantizer.quantization_capabilities().rows[:6]]
    return found


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    print(json.dumps(main()))
