"""Runs our quantizers in torchao's flow and in ours; prints what differs as JSON.
A script: torchao changes global state.
"""

import json
import sys
import warnings
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from quant2e import capture
from quant2e.graph.qdq_ops import DEQUANTIZE
from quantizers import (
    X86InductorQuantizer,
    XNNPACKQuantizer,
    get_default_x86_inductor_quantization_config,
    get_symmetric_quantization_config,
)
from quantizers.torchao import as_torchao
from tests.quant2e.guest_runner import MODELS, attempt, data, initialize, ours, theirs
from tests.quantizers.conformance.broken import Sound


def xnnpack(**options):
    return XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True, **options))


def in_groups():
    return xnnpack(is_dynamic=True, weight_qmin=-8, weight_qmax=7, group_size=32)


QUANTIZERS = {
    "XNNPACK": xnnpack,
    "XNNPACK, dynamic": lambda: xnnpack(is_dynamic=True),
    "x86": lambda: X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config()),
    "int32 bias": Sound,
}
WIDE = (torch.nn.Sequential(torch.nn.Linear(64, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4)), (2, 64))
"""A linear with two groups of 32 inputs, and one with too few."""
NETS = ("conv bn relu", "residual add", "cat", "cat of one tensor", "adaptive pool", "linear without bias")


def scales(gm):
    """Every dequantize op: its parameters, where they are numbers."""
    return sorted(str(n.args[1:]) for n in gm.graph.nodes if n.target in DEQUANTIZE and isinstance(n.args[1], float))


def main():
    found = {}
    for net, (model, shape) in {**{net: MODELS[net] for net in NETS}, "wide": WIDE}.items():
        initialize(model)
        batches = data(shape)
        program, captured = torch.export.export(model.eval(), batches[0]), capture(model, batches[0])
        for name, make in QUANTIZERS.items() if net in NETS else [("XNNPACK, groups", in_groups)]:
            mine, my_error = attempt(ours, captured, make(), batches)
            peer, peer_error = attempt(theirs, program, as_torchao(make()), batches)
            facts = {"ours": my_error, "theirs": peer_error}
            if mine is not None and peer is not None:
                with torch.no_grad():
                    pairs = [torch.utils._pytree.tree_leaves((mine(*b), peer(*b))) for b in batches]
                facts["equal"] = all(torch.equal(a, b) for a, b in pairs)
                facts["scales"] = scales(mine) == scales(peer)
                facts["quantized"] = sum(n.target in DEQUANTIZE for n in peer.graph.nodes)
            found[f"{name}: {net}"] = facts
    return found


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    print(json.dumps(main()))
