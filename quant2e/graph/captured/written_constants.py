"""Written constants: a tensor that a graph writes is a buffer, under the name that the model has for it.

    copy_(lifted_tensor_0, x)        =>        copy_(cache, x)        where lifted_tensor_0 is the memory of ``cache``

torch.export takes tensors that a forward reaches through plain objects, the layers of a cache, for constants, also
where they are buffers of the module at the same time; and what writes to a constant cannot be exported again.
"""

from __future__ import annotations

from torch import Tensor
from torch.fx import GraphModule

from quant2e.graph.mutation import written_attributes


def written_constants_as_buffers(gm: GraphModule) -> int:
    """Make the constants that ``gm`` writes buffers of it, outside of the state dict; returns how many there were.

    One that is the same memory as a buffer of ``gm`` becomes that one.
    """
    written = written_attributes(gm)
    held = dict((*gm.named_parameters(), *gm.named_buffers()))
    constants = {path: tensor for path, tensor in written.items() if path not in held}
    for path, tensor in constants.items():
        twin = next((name for name, buffer in held.items() if _same(buffer, tensor)), None)
        prefix, _, leaf = path.rpartition(".")
        owner = gm.get_submodule(prefix)
        vars(owner).pop(leaf, None)
        if twin is None:
            owner.register_buffer(leaf, tensor, persistent=False)
            continue
        for node in gm.graph.nodes:
            if node.op == "get_attr" and node.target == path:
                node.target = twin
    return len(constants)


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same elements of the same memory."""
    return (
        one.data_ptr() == other.data_ptr() != 0
        and one.dtype == other.dtype
        and one.shape == other.shape
        and one.stride() == other.stride()
    )
