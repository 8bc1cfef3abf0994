"""Ranges in data-parallel training: those of the whole batch, in every process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from quant2e import (
    FakeQuantize,
    HistogramObserver,
    LearnableFakeQuantize,
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    QuantizationConfig,
    QuantizationSpec,
    capture,
    convert_pt2e,
    prepare_qat_pt2e,
)
from quantizers import XNNPACKQuantizer, get_symmetric_quantization_config

STEPS = 3
OBSERVERS = {
    "fused": None,
    "average": FakeQuantize.with_args(observer=MovingAverageMinMaxObserver),
    "minmax": FakeQuantize.with_args(observer=MinMaxObserver),
    "histogram": FakeQuantize.with_args(observer=HistogramObserver),
    "learned": LearnableFakeQuantize.with_args(observer=MovingAverageMinMaxObserver),
}


def prepared(kind):
    torch.manual_seed(0)
    config = get_symmetric_quantization_config(is_per_channel=True, is_qat=True)
    if (factory := OBSERVERS[kind]) is not None:
        act = QuantizationSpec(torch.int8, factory, -128, 127, torch.per_tensor_affine)
        config = QuantizationConfig(act, act, config.weight, None, is_qat=True)
    model = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3)).train()
    captured = capture(model, (shard(0, 0),), dynamic_shapes=({0: torch.export.Dim("batch", max=64)},))
    return prepare_qat_pt2e(captured, XNNPACKQuantizer().set_global(config))


def shard(step, rank):
    """Rank 1 sees ten times larger values."""
    return 10.0**rank * torch.randn(8, 5, generator=torch.Generator().manual_seed(10 * step + rank))


def train(model, batches):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for x in batches:
        optimizer.zero_grad()
        (model(x) ** 2).mean().backward()
        optimizer.step()


def statistics(model):
    return {
        name: value.tolist()
        for name, value in model.state_dict().items()
        if "activation_post_process" in name and not name.endswith("enabled")
    }


def on_this_rank(rank):
    found = {}
    for kind in OBSERVERS:
        model = prepared(kind)
        train(nn.parallel.DistributedDataParallel(model), [shard(step, rank) for step in range(STEPS)])
        found[kind] = statistics(model)
        model.eval()
        if rank == 0:  # evaluation asks nobody else
            model(shard(9, 0))
            convert_pt2e(model)(shard(9, 0))
    return found


WORKER = """
import json, sys
import torch.distributed as dist
sys.path.insert(0, sys.argv[1])
from test_data_parallel import on_this_rank
rank = int(sys.argv[3])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
print(json.dumps(on_this_rank(rank)))
"""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    store = tmp_path_factory.mktemp("ranks") / "store"
    command = [sys.executable, "-c", WORKER, str(Path(__file__).parent), str(store)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen([*command, str(rank)], stdout=subprocess.PIPE, text=True, env=environment) for rank in range(2)
    ]
    return [json.loads(process.communicate(timeout=240)[0]) for process in running]


@pytest.mark.parametrize("kind", OBSERVERS)
def test_ranges_are_those_of_the_whole_batch(ranks, kind):
    alone = prepared("average" if kind == "fused" else kind)
    train(alone, [torch.cat([shard(step, rank) for rank in range(2)]) for step in range(STEPS)])
    expected, found = json.loads(json.dumps(statistics(alone))), ranks[0][kind]
    assert found == ranks[1][kind]
    assert found.keys() == expected.keys()
    first = next(str(n.target) for n in alone.graph.nodes if n.op == "call_module" and n.args[0].op == "placeholder")
    assert max(expected[f"{first}.activation_post_process.max_val"], 10) > 10
    for name, value in expected.items():
        if name.startswith(f"{first}."):
            assert found[name] == value, name
        elif "histogram" not in name:  # a product of 8 rows and one of 16 round differently
            torch.testing.assert_close(torch.tensor(found[name]), torch.tensor(value), rtol=1e-5, atol=1e-6)
