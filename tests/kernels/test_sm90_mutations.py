"""What the emulation of Hopper would not let pass: attention's kernel with one call, flip or offset less or other.

A mutation is caught where the program ends with a broken rule, or other results, at some moment that a seed draws.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import replace
from pathlib import Path

import pytest

from tests.kernels.attention_on_host import Case, Shape, run_program
from tests.kernels.on_host import CSRC, ROOT, build_on_host
from tests.kernels.test_sm90_attention import packed

pytestmark = pytest.mark.long

SHAPE = Shape()
TIMES = ["late", "early", *map(str, range(8))]
KEYS = packed([0, 0, 50, 140])
#: Several tiles a block with several steps each, tails of two lengths, and rows that see no key of a step.
CASES = [
    replace(packed([0, 130, 403, 407], heads=2, kv_heads=1), causal=True, blocks=2),
    replace(packed([0, 300, 310]), blocks=1),
    # Queries without keys, too: their tiles have no step.
    replace(packed([0, 7, 7, 107]), k=KEYS.k, v=KEYS.v, cu_seqlens_k=KEYS.cu_seqlens, causal=True, blocks=1),
]

#: Calls whose value is used, which no run can be without.
VALUES = {"load_shared", "__ballot_sync", "__shfl_sync", "__shfl_xor_sync"}
#: Calls without which results are the same, and what they are for.
FOR_SPEED = {
    "named_barrier_sync": "a consumer's turn at the tensor cores",
    "setmaxnreg_inc": "registers, which ptxas counts",
}

_KERNEL, _PRODUCER = "attention_forward.cuh", "attention_producer.cuh"
_SHAPE, _SOFTMAX = "attention_shape.h", "attention_softmax.cuh"
#: (file, text, what takes the place of its first occurrence)
TEXTS = {
    "rings keep their parity": (_PRODUCER, "      parity ^= 1;", ""),
    "the producer's parity of q": (_PRODUCER, "    q_parity ^= 1;\n    if (leads) {", "    if (leads) {"),
    "the consumers' parity of q": (_KERNEL, "    q_parity ^= 1;\n    const AttentionTile", "    const AttentionTile"),
    "the parity of tails": (_PRODUCER, "tail_parity ^= 1;", ""),
    "tails are left": (_PRODUCER, "tail_rows < kKeys", "tail_rows < 0"),
    "one row too few is zeroed": (_PRODUCER, "key_bytes(), tail_rows)", "key_bytes(), tail_rows + 1)"),
    "q is released by one warp of four": (_PRODUCER, "4 * kConsumers);", "kConsumers);"),
    "all lanes arrive": (_KERNEL, "if (lane == 0) sm90::mbarrier_arrive", "sm90::mbarrier_arrive"),
    "p v is waited for too late": (_KERNEL, "wgmma_wait_group<0>(o, p);", "wgmma_wait_group<1>(o, p);"),
    "p is changed in flight": (_KERNEL, "        sm90::wgmma_wait_group<0>(o, p);\n", ""),
    "another swizzle of q and k": (_KERNEL, "depth_operand<shape.row_bytes()>(shape, k", "depth_operand<64>(shape, k"),
    "another swizzle of v": (_KERNEL, "across_operand<shape.row_bytes()>", "across_operand<64>"),
    "the blocks of v are too near": (
        _KERNEL,
        "block_bytes(rows), shape",
        "block_bytes(rows) - shape.group_bytes(), shape",
    ),
    "fewer bytes are waited for": (_PRODUCER, "shape.q_bytes());", "shape.q_bytes() - 16);"),
    "one row more than is there": (_KERNEL, "if (row + own < tile.own_end)", "if (row + own <= tile.own_end)"),
    "scores are one group off": (_SHAPE, "+ 32 * step % row_bytes()", "+ 32 * step % row_bytes() + group_bytes()"),
    "scores are one block off": (_SHAPE, "16 * step / columns * block", "(16 * step / columns + 1) * block"),
    "values are one step off": (_SHAPE, "2 * step * group_bytes();", "2 * (step + 1) * group_bytes();"),
    "one key more is seen": (_SOFTMAX, ">= seen[", "> seen["),
}


def caught(program: Path, told: str = "") -> str | None:
    """By what time a mutation is caught, ``None`` if by none."""
    for time in TIMES:
        for number in range(len(CASES)):
            made, result = run_program(program, SHAPE, CASES[number], time, told)
            if result.returncode != 0 or made != right(number):
                return time
    return None


_right: dict[int, bytes] = {}


def right(number: int) -> bytes:
    if number not in _right:
        made, result = run_program(SHAPE.program(), SHAPE, CASES[number])
        assert result.returncode == 0, result.stderr
        _right[number] = made
    return _right[number]


def passed_calls(case: Case) -> set[str]:
    _, result = run_program(SHAPE.program(), SHAPE, case, told="list")
    assert result.returncode == 0, result.stderr
    return {":".join(line.split()[1:]) for line in result.stdout.splitlines() if line.startswith("site ")}


def test_every_call_is_missed() -> None:
    """Each call of the layer that the kernel passes, left out for all threads."""
    calls = set().union(*map(passed_calls, CASES))
    assert len(calls) > 60
    survived, tried = [], 0
    for call in sorted(calls):
        name = call.split(":")[1]
        if name in VALUES:
            continue
        tried += 1
        if caught(SHAPE.program(), f"drop={call}") is None:
            survived.append(name)
    print(f"{tried} calls left out, {tried - len(survived)} of them caught")
    assert set(survived) == set(FOR_SPEED), survived


@pytest.mark.parametrize("name", TEXTS)
def test_other_words_are_noticed(name: str) -> None:
    file, text, other = TEXTS[name]
    sources = {path: (CSRC / path).read_text() for path in _sources()}
    changed = sources[f"cuda/{file}"].replace(text, other, 1)
    assert changed != sources[f"cuda/{file}"], f"{file} has no {text!r}"
    sources[f"cuda/{file}"] = changed
    folder = ROOT / "build" / "on_host" / f"mutated-{hashlib.sha256(repr(sources).encode()).hexdigest()[:16]}"
    for path, words in sources.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(words)
    program = build_on_host("attention_forward", "-I", str(folder), f"-DQWEN2VL_CONFIG={SHAPE.numbers}")
    assert caught(program) is not None


def _sources() -> list[str]:
    """What the kernel is made of, but for the layer that the host has its own of."""
    found = [path.relative_to(CSRC) for path in CSRC.glob("cuda/attention*") if path.suffix in (".h", ".cuh")]
    texts = "".join((CSRC / path).read_text() for path in found)
    shared = re.findall(r'#include "\.\./(common/\w+\.h)"', texts)
    return [*map(str, found), *dict.fromkeys(shared)]
