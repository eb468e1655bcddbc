"""Which backend serves a call of varlen_attention by default: on CUDA one literal table of what was measured.

A choice is a function of what the host knows (:class:`Call`): it reads nothing from a device, is the same while a CUDA
graph is captured and under ``torch.compile``, and does not guess from ``max_seqlen`` that lengths are equal. A backend
that builds a plan for each new shape may be in the table only where that costs under a millisecond; cuDNN's does not.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from operator import index

import torch

from . import attention_peers, attention_sm90
from .attention_peers import HALVES, PEERS, Call
from .backends import BackendError, forced, resolve, unavailable
from .launching import target_of
from .matmul import cpu_vendor, slow_on_cpu


@dataclass(frozen=True)
class Entry:
    """The order of backends for calls of one kind, and the committed result that it was read from.

    Attributes:
        capability: of the GPU, 90 for 9.0.
        dtypes, columns, causal, gradients: of the call; columns from the first to the second.
        rows: least ``max_seqlen``; the first entry that fits counts.
        backends: first choice first; "flash 3" is ``flash`` where it can take FlashAttention 3, "sm90" ours in CUDA
            C++.
        measured: under ``benchmarks/results``.
        note: at which commit, and what has changed since.
    """

    capability: int
    dtypes: tuple[torch.dtype, ...]
    columns: tuple[int, int]
    causal: bool
    gradients: bool
    rows: int
    backends: tuple[str, ...]
    measured: str
    note: str


_H200 = "nvidia-h200/attention.json"
_THEN = "at commit 3dc270fec4c9; the Triton kernels have changed since"

#: Measured in bf16 on heads of 80. float16 has the same matrix rate. Heads of 72 are the same programs: 64 + 16 columns
#: of ours, padded to 96 by FlashAttention 2 and 3. Heads of 64, 96 and 128, causal packs and grouped heads were not
#: measured, so no entry covers them, nor were packs whose longest segment has fewer than 256 rows: these go like 256.
TABLE: tuple[Entry, ...] = (
    Entry(
        90,
        HALVES,
        (72, 80),
        causal=False,
        gradients=True,
        rows=0,
        backends=("torch", "triton"),
        measured=_H200,
        note=_THEN,
    ),
    Entry(90, HALVES, (72, 80), False, False, 1024, ("flash 3", "triton", "torch"), _H200, _THEN),
    Entry(90, HALVES, (72, 80), False, False, 0, ("triton", "torch"), _H200, _THEN),
)

#: Our own kernels on a GPU: they take segments of any length, whatever ``max_seqlen`` says, and a segment has the same
#: bits twice and in every pack.
OURS = ("triton", "sm90")

#: What nobody measured, and what comes after an entry's backends: PyTorch's own kernel, then ours, then what serves.
UNMEASURED = ("torch", "triton", "sdpa", "eager")
#: The same for float32, which runs without matrix units in Triton.
_WITHOUT_MATRIX_UNITS = ("sdpa", "eager")

_CPU = "amd-epyc-2-threads/attention.json"
#: Whose CPU that is, in the words of /proc/cpuinfo.
CPU_VENDOR = "AuthenticAMD"
#: What that measured, in bf16: columns, causal, grouped.
CPU_MEASURED = ((80, False, False), (128, True, True))


@dataclass(frozen=True)
class Choice:
    """``backend``: a name of varlen_attention's; ``peer``: which of others' kernels that is, if it is one's."""

    backend: str
    peer: str | None
    measured: str | None
    why: str


def bucket(max_seqlen: int) -> int:
    """What the table tells lengths apart by: the largest ``rows`` of an entry that ``max_seqlen`` reaches."""
    return max(entry.rows for entry in TABLE if entry.rows <= max_seqlen)


def entry_of(call: Call) -> Entry | None:
    """The table's row for a call on CUDA, ``None`` where nobody measured."""
    for entry in TABLE:
        known = (entry.capability, entry.causal, entry.gradients) == (call.capability, call.causal, call.gradients)
        fits = call.dtype in entry.dtypes and entry.columns[0] <= call.columns <= entry.columns[1]
        packed = call.columns == call.value_columns and not (call.grouped or call.split)
        if known and fits and packed and call.rows >= entry.rows:
            return entry
    return None


def choose(call: Call, invariant: bool = False) -> Choice:
    """What serves ``call`` where nobody named a backend. Raises ``LookupError`` where nothing ``invariant`` does."""
    if call.device_type != "cuda":
        return _choose_on_cpu(call)
    if invariant or call.repeatable:
        reason = serves("triton", call)[1]
        if reason is None:
            return Choice("triton", None, None, "the same bits twice and in every pack are demanded")
        if invariant:
            raise LookupError(reason)
    entry = entry_of(call)
    listed = () if entry is None else entry.backends
    if call.replaced is not None and "torch" in listed:  # FlashAttention 2 was measured, and is not what runs
        entry, listed = None, ()
    passed = []
    for name in dict.fromkeys((*listed, *(UNMEASURED if call.dtype in HALVES else _WITHOUT_MATRIX_UNITS))):
        peer, reason = serves(name, call)
        if reason is None:
            why, measured = "nobody measured such calls", None
            if entry is not None and name in listed:
                why, measured = f"first of what was measured {entry.note}", entry.measured
            return Choice(name.split()[0], peer, measured, "; ".join((why, *passed)))
        passed.append(f"{name}: {reason}")
    raise AssertionError("eager serves every call")


def serves(name: str, call: Call) -> tuple[str | None, str | None]:
    """``(peer, None)`` where the backend ``name`` can serve ``call``, else ``(None, why not)``."""
    if name in ("torch", "cudnn") or name.startswith("flash"):
        if call.device_type != "cuda":
            return None, f"it does not serve {call.device_type} tensors"
        peer, reason = attention_peers.peer_of(name, call)
        return peer, reason if peer is None else None
    if name == "triton":
        wide = max(call.columns, call.value_columns) > 256
        reason = "a head of more than 256 columns fits no program's registers" if wide else None
        return None, unavailable(name, call.device_type) or reason
    if name == "sm90":
        return None, attention_sm90.reason(call)
    if call.statistics and name != "eager":
        return None, _no_statistics(name, call)
    return None, None


def _no_statistics(name: str, call: Call) -> str | None:
    """Why a backend made of PyTorch's operations does not give the logs of the sums, or ``None``."""
    if name != "sdpa" or call.device_type != "cpu" or call.columns != call.value_columns:
        return "return_lse: it keeps no logs of the sums for such a call"
    return "return_lse: its backward takes no gradient of them" if call.gradients else None


def _choose_on_cpu(call: Call) -> Choice:
    if call.device_type != "cpu":
        return Choice("eager", None, None, f"nothing else serves {call.device_type} tensors")
    if call.statistics:
        if serves("sdpa", call)[1] is None:
            return Choice("sdpa", None, None, "PyTorch's fused attention keeps the logs of its sums")
        return Choice("eager", None, None, "nothing else gives the logs of the sums for such heads, or takes gradients")
    known = (call.columns, call.causal, call.grouped) in CPU_MEASURED and call.columns == call.value_columns
    measured = _CPU if known and call.dtype == torch.bfloat16 else None
    if call.dtype == torch.bfloat16 and not call.gradients:
        if slow_on_cpu(call.dtype):
            why = "this CPU has no matrix products of bf16, and PyTorch's attention makes them in float32"
            return Choice("sdpa", None, None, why)
        if cpu_vendor() != CPU_VENDOR:
            why = "matrix products in blocks are faster on AMD's CPUs; on a Xeon they took up to 1.35 times as long"
            return Choice("sdpa", None, None, why)
        why = "matrix products in blocks measured faster than PyTorch's attention"
        return Choice("blocked", None, measured, why if known else f"{why} on heads of 80 and of 128")
    return Choice("sdpa", None, measured, "PyTorch's fused attention, once for every run of equal segments")


# ----------------------------------------------------------------------------------------------- of a call of the op


def chosen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    max_seqlen: int,
    *,
    causal: bool = False,
    invariant: bool = False,
    segments: int = 1,
    split: bool = False,
    statistics: bool = False,
    backend: str | None = None,
) -> str:
    """The backend, or the peer, that serves such a call. Raises :class:`BackendError` where the one named does not."""
    tracked = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    repeatable, kind = torch.are_deterministic_algorithms_enabled(), q.device.type
    (rows, heads, columns), (_, kv_heads, value_columns) = q.shape, v.shape
    widths = index(columns), index(value_columns)
    facts = (kind, q.device.index, q.dtype, *widths, _settled(heads != kv_heads), causal, tracked)
    if kind == "cuda":
        empty = _settled(segments < 1 or rows == 0 or heads == 0)
        aligned, farthest = True, heads * columns
        mapped = _settled(rows < 2**31 and k.shape[0] < 2**31)
        for x in (q, k, v):
            of_rows, of_heads, _ = x.stride()
            aligned = aligned and _settled(of_rows % 8 == 0 and of_heads % 8 == 0)
            mapped = mapped and _settled(of_rows != 0 and of_heads != 0)
            farthest = max(farthest, of_rows)
        facts += (bucket(max_seqlen), aligned or empty, _settled(rows * farthest >= 2**31), empty)
        facts += (_settled(segments > attention_peers.MOST_BLOCKS), mapped or empty)
    else:
        facts += (0, True, False, False, False, True)
    requested = backend if backend is not None else forced("varlen_attention")
    name = _answer(*facts, split, statistics, repeatable, invariant, requested)
    if name.startswith(_REFUSED):
        raise BackendError(name.removeprefix(_REFUSED))
    return name


def _settled(condition: bool) -> bool:
    """A compiler that traces sizes makes code for this answer; as for ``index`` of a width above."""
    if condition:  # noqa: SIM103
        return True
    return False


_REFUSED = "refused: "


def _answer(kind, *facts) -> str:
    """A backend, or why there is none: what is raised here would be an error of the compiler's."""
    try:
        if kind == "cuda":
            return _known(kind, *facts, replaced=attention_peers.replaced())
        return _decide(kind, *facts)
    except BackendError as error:
        return f"{_REFUSED}{error}"


# This is what torch.compiler.assume_constant_result sets, which imports all of Dynamo. What is asked here are modules,
# a driver and a table, and the answer is the same for all calls that are alike.
_answer._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


def _decide(
    kind, ordinal, dtype, columns, value_columns, grouped, causal, tracked, rows, aligned, wide, empty, many,
    mapped, split, statistics, repeatable, invariant, requested, replaced=None,
) -> str:  # fmt: skip
    device = torch.device(kind, ordinal) if kind == "cuda" else torch.device(kind)
    target = target_of(device)
    call = Call(
        kind, target.capability if kind == "cuda" else 0, dtype, columns, value_columns, grouped, causal, tracked, rows,
        aligned, wide, empty, many, split, statistics, repeatable, replaced, mapped,
    )  # fmt: skip
    if requested is None:
        try:
            choice = choose(call, invariant)
        except LookupError as error:
            raise BackendError(
                f"varlen_attention: invariant=True has only Triton's kernels here, and {error}"
            ) from None
        return choice.peer or choice.backend
    if invariant and kind == "cuda" and requested not in OURS:
        raise BackendError(
            f"varlen_attention: invariant=True asks for the same bits twice and in every pack, which backend "
            f"{requested!r} does not promise; {' and '.join(map(repr, OURS))} do"
        )
    name = resolve("varlen_attention", kind, requested)
    if name == "blocked" and tracked:
        raise BackendError("varlen_attention: backend 'blocked' has no backward; q, k and v must not require grad")
    if statistics and name in ("sdpa", "blocked") and (reason := _no_statistics(name, call)) is not None:
        raise BackendError(f"varlen_attention: backend {name!r} does not serve this call: {reason}")
    if name in ("torch", "flash", "cudnn", "sm90"):
        peer, reason = serves(name, call)
        if reason is not None:
            raise BackendError(f"varlen_attention: backend {name!r} does not serve this call: {reason}")
        return peer or name
    return name


_known = cache(_decide)  # modules and GPUs stay what they are


def reads_host(backend: str) -> bool:
    """Whether a backend reads ``cu_seqlens`` on the host, and waits for the device where it lies there."""
    return backend in ("eager", "sdpa", "blocked")


def by_max_seqlen(backend: str) -> bool:
    """Whether a backend launches programs for ``max_seqlen`` rows in every segment."""
    return backend in PEERS


#: Calls that :func:`choices` tells of: ``max_seqlen``, and what of :class:`Call` is not as in a tower's inference.
KINDS: dict[str, tuple[int, dict[str, bool]]] = {
    "inference": (0, {}),
    "long": (4096, {}),
    "training": (4096, {"gradients": True}),
    "prefill": (4096, {"causal": True, "grouped": True}),
}


def choices(device_type: str) -> list[dict[str, object]]:
    """What serves each of :data:`KINDS` on such tensors, where it was measured and why, for ``qwen2vl info``."""
    rows: list[dict[str, object]] = []
    capability = 0
    if device_type == "cuda" and torch.cuda.is_available():
        capability = target_of(torch.device("cuda", torch.cuda.current_device())).capability
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for columns in (64, 72, 80, 128, 512):
            row: dict[str, object] = {"dtype": str(dtype).removeprefix("torch."), "head_dim": columns}
            for kind, (longest, facts) in KINDS.items():
                rows_ = bucket(longest)
                known = Call(device_type, capability, dtype, columns, columns, rows=rows_)
                call = replace(known, replaced=attention_peers.replaced(), **facts)
                choice = choose(call)
                row[kind] = {"backend": choice.backend, "measured": choice.measured, "why": choice.why}
            rows.append(row)
    return rows
