"""Cutting regions out of a graph: which there are, what becomes of them, and why an op is in none."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from torch.fx import GraphModule

from lowering.native.calls import call_regions
from lowering.native.kernels.op import load_region_op
from lowering.native.regions import WrittenRegion, find_units, grouped, write
from lowering.native.units.products import PRODUCTS
from lowering.native.units.rows import straighten_rows
from lowering.native.units.sequences import widen_sequences
from lowering.native.units.spelled_out import read_spelled_out
from lowering.native.writes import keep_writes
from lowering.rewrites.moves import quantized_before_moves
from quant2e.graph.mutation import written_attributes

WRITES = "the graph writes to its buffers: what reads them keeps its place, op by op"
GIVEN = "another engine computes it"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """What became of a graph: ``regions`` that it calls now, and why each op is in none, by name."""

    regions: tuple[WrittenRegion, ...]
    refused: Mapping[str, str]


NO_CUT = Cut(regions=(), refused={})


def cut_regions(gm: GraphModule, besides: Collection[str] = ()) -> Cut:
    """Let ``gm`` call the int8 regions that it has, where this machine has kernels for them.

    ``besides``: names of ops that stay out of all regions.
    """
    op = load_region_op()
    if op is None:
        return NO_CUT
    if written_attributes(gm):
        return Cut(regions=(), refused={node.name: WRITES for node in gm.graph.nodes})
    writes = keep_writes(gm)
    if not writes.writers:  # what is read and computed elsewhere has no other value there
        read_spelled_out(gm)
        straighten_rows(gm)
        quantized_before_moves(gm, PRODUCTS)
        widen_sequences(gm)
    found = find_units(gm, besides, writes)
    refused, regions = dict(found.refused), []
    for units in grouped(gm, found):
        written = write(gm, units)
        if isinstance(written, WrittenRegion):
            regions.append(written)
        else:
            refused.update({node.name: written for unit in units for node in unit.nodes})
    call_regions(gm, regions, op, writes)
    return Cut(regions=tuple(regions), refused={**refused, **dict.fromkeys(besides, GIVEN)})
