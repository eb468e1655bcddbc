"""The emulation of Hopper (host/cuda/sm90.cuh) itself: right products, and each broken rule is noticed."""

from __future__ import annotations

import os
import re
import subprocess

import pytest

from tests.kernels.on_host import HERE, SANITIZERS, build_on_host

TIMES = ["early", "late", *map(str, range(6))]

#: What a missing order shows as depends on who comes first.
RACE = "does not wait for what|is not ordered behind|deadlock"
#: What host/sm90_rules.cpp can break, and the words that say so.
RULES = {
    # mbarriers
    "mbarrier not aligned": "not aligned to 8 bytes",
    "initialised twice": "is initialised twice",
    "not initialised": "no mbarrier was initialised",
    "no fence of the initialisation": "before its fence.mbarrier_init",
    "no __syncthreads": "not ordered behind the initialisation|no mbarrier was initialised",
    "too many arrivals": "arrivals had come|deadlock",
    "never released": "deadlock.*mbarrier_wait.*parity 0",
    "wrong parity": RACE,
    # copies
    "map of an odd address": "the address is not a multiple of 16",
    "map of an odd stride": "a stride that is not a multiple of 16",
    "map of a narrow box": "as wide as the swizzle",
    "map of a long box": "a box that is not in 1 .. 256",
    "copy not aligned": "destination at .* is not aligned to 512 bytes",
    "copy leaves memory": "leaves the .* bytes of shared memory",
    "two copies to one place": "the copy at .* does not wait for what the copy",
    "fewer bytes expected": RACE,
    "before the tensor": "wrong sum in row 0, column 0",
    "no wait for the copy": RACE,
    "no wait for room": RACE,
    "released too early": RACE,
    # shared memory and its proxies
    "no wait for zeros": "wgmma at .* does not wait for what the copy",
    "no proxy fence": "sees no fence.proxy.async after what thread",
    "no __syncwarp": "is not ordered behind what thread",
    "no proxy fence behind stmatrix": "wgmma at .* sees no fence.proxy.async after what thread",
    "no barrier behind stmatrix": "wgmma at .* is not ordered behind what thread",
    "no __syncwarp behind a store": "is not ordered behind (what )?thread",
    "no barrier behind a load": "is not ordered behind (what )?thread",
    "stmatrix not aligned": "stmatrix at .* is not aligned to 16 bytes",
    "load not aligned": "the load at .* is not aligned to 16 bytes",
    "load leaves memory": "the load at .* leaves the .* bytes",
    "load of an mbarrier": "the load touches the mbarrier",
    "pointer into shared memory": "SEGV",
    # wgmma
    "different descriptors": "different wgmma",
    "base offset": "a base offset",
    "operand leaves memory": "wgmma touches the mbarrier|leaves the .* bytes",
    "no wgmma_fence": "d is not named by the last wgmma_fence",
    "accumulators not named": "d is not named by the last wgmma_fence",
    "accumulators changed before": "d has changed since the wgmma_fence",
    "accumulators changed": "accumulator 3 of the wgmma .* was changed while in flight",
    "another shape in flight": "accumulators in flight of another shape",
    "a not named": "a is not named by the last wgmma_fence",
    "a of nobody": "a is not named by the last wgmma_fence",
    "a changed before": "a has changed since the wgmma_fence",
    "a changed in flight": "a of the wgmma .* was changed while in flight",
    "read in flight": "wrong sum in row 0, column 0",
    "not committed": "accumulators of the wgmma .* are not named|not ordered behind wgmma",
    "waits for too little": "accumulators of the wgmma .* are not named|not ordered behind wgmma",
    "wait without names": "accumulators of the wgmma .* are not named",
    "ends in flight": "ends with 1 wgmma in flight",
    # warps, barriers, registers
    "lanes part": "deadlock.*lanes ffff0000 of the warp have not come|lanes .* of this warp are at",
    "more than 16 barriers": "barrier 16, a block has 16",
    "barrier's threads": "different barriers or numbers of threads",
    "two counts at a barrier": "barrier 3 waits for .* threads, this warp says",
    "nobody waits at a barrier": "all 128 threads only arrive at barrier 3",
    "barrier 0": "deadlock.*barrier 0 has|barrier 0 waits for",
    "too many registers": "deadlock.*registers for its warp",
    "fewer registers by inc": "setmaxnreg.inc to 40 from 168",
    "registers that nobody took": "registers that nobody took",
}


def run(program, *arguments: str, options: str = "") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "QWEN2VL_ON_HOST": options}
    return subprocess.run([program, *arguments], capture_output=True, text=True, env=environment, timeout=300)


def test_products_of_all_layouts() -> None:
    """N of 64 to 128, both types, a and b in all the ways that they lie, against plain loops."""
    ran = run(build_on_host("sm90_products"), *TIMES)
    assert ran.returncode == 0, ran.stdout[-500:] + ran.stderr
    assert ran.stdout.count("error 0\n") == ran.stdout.count("\n") == 36 * len(TIMES)


@pytest.mark.parametrize("change", ["swizzle", "stride", "leading"])
def test_products_of_a_wrong_layout(change: str) -> None:
    ran = run(build_on_host("sm90_products"), "early", options=f"mutate={change}")
    assert ran.returncode in (1, 9)


@pytest.fixture(scope="module")
def rules():
    return build_on_host("sm90_rules", *SANITIZERS)


def test_a_right_kernel(rules) -> None:
    ran = run(rules, "none", *TIMES)
    assert ran.returncode == 0, ran.stderr


@pytest.mark.parametrize("rule", RULES)
def test_a_broken_rule(rules, rule: str) -> None:
    for time in ("early", "late", "1"):
        ran = run(rules, rule, time)
        assert ran.returncode in (1, 9), f"not noticed at time {time}"
        assert re.search(RULES[rule], ran.stderr, re.DOTALL), f"time {time}: {ran.stderr[:2000]}"


def test_every_breakable_rule_is_tested() -> None:
    source = (HERE / "host" / "sm90_rules.cpp").read_text()
    assert set(re.findall(r'breaks\("([^"]*)"\)', source)) == set(RULES)


def test_a_seed_is_one_order_of_events(rules) -> None:
    """What fails does so again in the same words."""
    first, second = (run(rules, "no wait for room", "7").stderr for _ in range(2))
    assert "time 7" in first and first == second


def test_calls_are_left_out_by_name(rules) -> None:
    listed = run(rules, "none", "1", options="list").stdout.splitlines()
    fences = [line.split() for line in listed if " fence_proxy_async " in line]
    assert len(fences) == 2
    for _, file, call, line in fences:
        for option in (f"drop={call}:{line}", f"drop={file}:{call}:{line}"):
            assert "sees no fence.proxy.async" in run(rules, "none", "1", options=option).stderr
    assert run(rules, "none", "1", options="drop=fence_proxy_async:1").returncode == 0


def test_words_that_mean_nothing_are_refused(rules) -> None:
    """Else a mutation that was misspelt would count as survived, or a time as another."""
    for options in ("drops=wgmma:1", "mutate=nothing", "nonsense"):
        assert run(rules, "none", "1", options=options).returncode == 2
    for time in ("", "soon", "early x", "-1"):
        assert run(rules, "none", time).returncode == 2
