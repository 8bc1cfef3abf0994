"""The team of threads that computes a region, on pools of threads that do not do what one hopes for."""

import subprocess
from pathlib import Path

import pytest

from lowering.native.kernels.shipped import KERNELS
from quant2e.observers.native.build import compiler

POOLS = ("side by side", "in turn", "one", "halves", "slow")
SOURCE = Path(__file__).parent / "team_test.cpp"


def expected(threads, steps=3000):
    values = list(range(64))
    for _ in range(steps):
        values = [(a * 31 + b + 7) % 1000003 for a, b in zip(values, reversed(values), strict=True)]
    total = 0
    for value in values:
        total = (total * 31 + value) % 1000003
    return f"{steps} steps, {total}, "


@pytest.fixture(scope="module")
def team(tmp_path_factory):
    program = compiler()
    if program is None:
        pytest.skip("no C++ compiler")
    made = tmp_path_factory.mktemp("team") / "team_test"
    flags = ("-O2", "-std=c++17", "-pthread", "-D_GLIBCXX_ASSERTIONS", f"-I{KERNELS}")
    subprocess.run([program, *flags, SOURCE, "-o", made], check=True)

    def run(pool, threads, fails_at=-1):
        command = [made, pool, str(threads), str(fails_at)]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.strip()

    return run


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
@pytest.mark.parametrize("pool", POOLS)
def test_every_part_of_every_step_is_computed_once_and_in_order(team, pool, threads):
    assert team(pool, threads) == expected(threads) + "done"


@pytest.mark.parametrize("pool", POOLS)
def test_a_part_that_fails_ends_the_steps_with_its_error(team, pool):
    assert team(pool, 4, fails_at=1003) == expected(4, 1003) + "a part failed"


def test_a_pool_that_does_not_begin_is_an_error(team):
    assert team("none", 2).endswith("torch could not begin a parallel loop")
