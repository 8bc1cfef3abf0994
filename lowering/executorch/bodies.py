"""Bodies of control flow as ExecuTorch's kernels run them.

cond(p, f, g, x)  =  cond(p, f', g', x)        where f' and g' are f and g in core ATen ops

Partitioners ask for some ops to be left whole (linear, max_pool2d), and look for them in the outer graph only; what is
left whole in a body has no kernel.
"""

from __future__ import annotations

import torch
from torch._decomp import core_aten_decompositions
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from quant2e.graph.control_flow import bodies
from quant2e.graph.fake_values import fake_mode


def decompose_bodies(gm: GraphModule) -> int:
    """A pass: trace the bodies of ``gm``, and the bodies in them, as core ATen ops; returns how many."""
    count = 0
    for node in list(gm.graph.nodes):
        for path, body in bodies(node).items():
            inputs = [each.meta["val"] for each in body.graph.nodes if each.op == "placeholder"]
            mode = fake_mode(node)
            assert mode is not None, "exported graphs have fake values"
            with mode, torch.no_grad():
                traced = make_fx(body, dict(core_aten_decompositions()), _allow_non_fake_inputs=True)(*inputs)
            gm.add_submodule(path, traced)
            count += 1
    return count
