"""The Triton kernels of sample_tokens_: from logits to tokens in two launches, whatever is asked for.

A row's CHUNKS programs have CHUNK ids each. The first launch leaves each chunk's highest score. The second one knows
the row's highest, so the masses, whole numbers; it counts and sums them by BINS even steps of the exponent, with atomic
additions of integers, which come to the same in any order. What may be kept goes to a list, in any order too: the k-th
highest of the chunks' maxima is at most the k-th highest score; and ids whose masses are below (1 - top_p) / V of all
could be left out of P together. Where neither top_k nor top_p is asked for there is no list.

The program of a row that counts itself last in ``state`` ends the choice, past the first cache: in the bins it finds
the one where top_k or top_p is reached, takes out its members, halves their range until one score is left, and among
equals one id; sums what is kept by chunk; finds the chunk that the draw falls in, and reads that one once more.

Bytes: B V of logits (and of ``seen``) from memory; the second launch finds them in the second cache. At V = 151,936 a
row is 297 KB (and 148 KB): 0.1 us at an H200's 4.3 TB/s, so that time goes into two launches and the trips to the
second cache that follow one another, some ten of 0.7 us with their barriers where few ids are kept: by this arithmetic
10 to 15 us a row, however many rows have a multiprocessor of their own. Not yet timed on any GPU.
"""

from __future__ import annotations

import math

import torch

from ..core.launching import cdiv, gdc_launch_dependents, gdc_wait, jit, launch, next_power_of_2, target_of, tl

#: A mass is a fraction of the highest one in so many bits.
BITS = 43
#: Ids of a program, and twice as many where a row would have more than 256 chunks.
CHUNK = 1024
#: Ids of a list that are read at a time.
LISTED = 512
#: Of the exponent, from 0 to -BITS.
BINS = 1024

_BITS = tl.constexpr(BITS)
_ONE = tl.constexpr(2.0**BITS)
_BINS = tl.constexpr(BINS)
# What halving looks for: the score of the top_k-th, the score that reaches top_p, the id that reaches it among equals.
_COUNT, _MASS, _TIES = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
_LOWEST, _HIGHEST = tl.constexpr(-(1 << 31)), tl.constexpr((1 << 31) - 1)
# Where a row's counters are: masses of the bins, counts of the bins, then these, then what is kept of each chunk.
_BEFORE_KEPT = 2 * BINS + 3
_FOUND, _ARRIVED, _TOTAL = tl.constexpr(2 * BINS), tl.constexpr(2 * BINS + 1), tl.constexpr(2 * BINS + 2)
_KEPT = tl.constexpr(_BEFORE_KEPT)


def exponent_scale(temperature: float) -> float:
    """What (score - highest) is multiplied with for the exponent of two, in the range where neither zero times it nor
    infinity times it is NaN."""
    return min(max(math.log2(math.e) / temperature, 2.0**-126), torch.finfo(torch.float32).max)


@jit
def _scores(logits, seen, banned, ids, vocabulary, penalty, BANNED: tl.constexpr, PENALISED: tl.constexpr):
    """float32, minus infinity for banned ids and past the vocabulary, infinity for NaN; no -0.0, which equals 0.0."""
    s = tl.load(logits + ids, mask=ids < vocabulary, other=float("-inf")).to(tl.float32)
    if PENALISED:
        marked = tl.load(seen + ids, mask=ids < vocabulary, other=0)
        s = tl.where(marked != 0, tl.where(s < 0, s * penalty, s / penalty), s)
    for n in range(BANNED):
        s = tl.where(ids == tl.load(banned + n), float("-inf"), s)
    s = tl.where(s == s, s, float("inf"))
    return tl.where(s == 0, 0.0, s)


@jit
def _key(s):
    """int32 in the order of the scores."""
    bits = s.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@jit
def _exponent(key, highest, scale):
    """Of two, at most 0. It is read off the key everywhere, so that no compiler computes it otherwise in one place. Of
    one infinity less the same one it is 0."""
    bits = key ^ ((key >> 31) & 0x7FFFFFFF)
    exponent = (bits.to(tl.float32, bitcast=True) - highest) * scale
    return tl.where(exponent == exponent, tl.minimum(exponent, 0.0), 0.0)


@jit
def _mass(exponent):
    return (tl.exp2(exponent) * _ONE).to(tl.int64)


@jit
def _bin(exponent):
    return tl.minimum(exponent * (-_BINS / _BITS), _BINS - 1.0).to(tl.int32)


@jit
def _take_out(keys, ids, found, part_keys, part_ids, which, highest, scale, BLOCK: tl.constexpr):
    """Copies the members of one bin out of the list; returns how many they are."""
    tl.debug_barrier()  # nobody reads those of another bin any more
    members = tl.zeros((), tl.int32)
    for start in range(0, found, BLOCK):
        at = start + tl.arange(0, BLOCK)
        key = tl.load(keys + at, mask=at < found, other=0, cache_modifier=".cg")
        own = (at < found) & (_bin(_exponent(key, highest, scale)) == which)
        place = members + tl.cumsum(own.to(tl.int32), 0) - 1
        tl.store(part_keys + place, key, mask=own)
        tl.store(part_ids + place, tl.load(ids + at, mask=own, other=0, cache_modifier=".cg"), mask=own)
        members += tl.sum(own.to(tl.int32), 0)
    tl.debug_barrier()
    return members


@jit
def _weighed(part_keys, part_ids, start, members, edge, highest, scale, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """``(values, weights)`` of a block of members, weight 0 where they do not count."""
    at = start + tl.arange(0, BLOCK)
    key = tl.load(part_keys + at, mask=at < members, other=0, cache_modifier=".cg")
    if KIND == _TIES:
        value = -tl.load(part_ids + at, mask=at < members, other=0, cache_modifier=".cg")
        weight = ((at < members) & (key == edge)).to(tl.int64)
    else:
        value = key
        weight = ((at < members) & (key >= edge)).to(tl.int64)
        if KIND == _MASS:
            weight *= _mass(_exponent(key, highest, scale))
    return value, weight


@jit
def _reaching(part_keys, part_ids, members, need, edge, highest, scale, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """The highest value whose members, with those of higher values, weigh ``need`` together."""
    low, high = tl.full((), _HIGHEST, tl.int64), tl.full((), _LOWEST, tl.int64)
    for start in range(0, members, BLOCK):
        value, weight = _weighed(part_keys, part_ids, start, members, edge, highest, scale, KIND, BLOCK)
        low = tl.minimum(low, tl.min(tl.where(weight > 0, value, _HIGHEST), 0))
        high = tl.maximum(high, tl.max(tl.where(weight > 0, value, _LOWEST), 0))
    while low < high:
        middle = low + (high - low + 1) // 2
        reached, least, most = tl.zeros((), tl.int64), high, low
        for start in range(0, members, BLOCK):
            value, weight = _weighed(part_keys, part_ids, start, members, edge, highest, scale, KIND, BLOCK)
            above = (weight > 0) & (value >= middle)
            reached += tl.sum(tl.where(above, weight, 0), 0)
            # Values that some member has: few steps are left where there are few of them.
            least = tl.minimum(least, tl.min(tl.where(above, value, _HIGHEST), 0))
            below = (weight > 0) & (value < middle)
            most = tl.maximum(most, tl.max(tl.where(below, value, _LOWEST), 0))
        low = tl.where(reached >= need, least, low)
        high = tl.where(reached >= need, high, most)
    return low


@jit
def _mass_from(part_keys, part_ids, members, edge, highest, scale, BLOCK: tl.constexpr):
    """Of the members whose keys are at least ``edge``."""
    total = tl.zeros((), tl.int64)
    for start in range(0, members, BLOCK):
        total += tl.sum(_weighed(part_keys, part_ids, start, members, edge, highest, scale, _MASS, BLOCK)[1], 0)
    return total


@jit
def _maxima_kernel(
    logits,
    seen,
    banned,
    maxima,
    state,
    vocabulary,
    penalty,
    logits_row,
    seen_row,
    BANNED: tl.constexpr,
    PENALISED: tl.constexpr,
    CHUNKS: tl.constexpr,
    LANES: tl.constexpr,
    STATE: tl.constexpr,
    CHUNK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    row = (tl.program_id(0) // CHUNKS).to(tl.int64)
    chunk = tl.program_id(0) % CHUNKS
    if DEPENDENT:
        gdc_wait()
        gdc_launch_dependents()
    ids = chunk * CHUNK + tl.arange(0, CHUNK)
    s = _scores(logits + row * logits_row, seen + row * seen_row, banned, ids, vocabulary, penalty, BANNED, PENALISED)
    tl.store(maxima + row * LANES + chunk, tl.max(s, 0))
    for start in range(chunk * CHUNK, STATE, CHUNKS * CHUNK):
        at = start + tl.arange(0, CHUNK)
        tl.store(state + row * STATE + at, tl.zeros((CHUNK,), tl.int64), mask=at < STATE)


@jit(do_not_specialize=["top_k", "top_p", "uniforms_row"])
def _choice_kernel(
    logits,
    seen,
    banned,
    uniforms,
    maxima,
    state,
    keys,
    listed,
    part_keys,
    part_ids,
    tokens,
    vocabulary,
    penalty,
    scale,
    top_k,
    top_p,
    logits_row,
    seen_row,
    uniforms_row,
    BANNED: tl.constexpr,
    PENALISED: tl.constexpr,
    DRAWN: tl.constexpr,
    TOP_K: tl.constexpr,
    TOP_P: tl.constexpr,
    CHUNKS: tl.constexpr,
    LANES: tl.constexpr,
    STATE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    row = (tl.program_id(0) // CHUNKS).to(tl.int64)
    chunk = tl.program_id(0) % CHUNKS
    logits += row * logits_row
    seen += row * seen_row
    state += row * STATE
    for_lists = row * CHUNKS * CHUNK
    keys, listed = keys + for_lists, listed + for_lists
    part_keys, part_ids = part_keys + for_lists, part_ids + for_lists
    if DEPENDENT:
        gdc_wait()
        gdc_launch_dependents()
    lane = tl.arange(0, LANES)
    of_chunks = tl.load(maxima + row * LANES + lane, mask=lane < CHUNKS, other=float("-inf"))
    highest = tl.max(of_chunks, 0)
    ids = chunk * CHUNK + tl.arange(0, CHUNK)
    key = _key(_scores(logits, seen, banned, ids, vocabulary, penalty, BANNED, PENALISED))
    exponent = _exponent(key, highest, scale)
    mass = _mass(exponent)
    if DRAWN:
        mass = tl.where(tl.abs(highest) < float("inf"), mass, 0)
    # Of 2^-62, so that a number of 64 bits holds all that a double does.
    share = top_p.to(tl.float64) * (1.0 / (1 << 62))
    if TOP_K or TOP_P:
        if TOP_K:
            as_high = tl.zeros((LANES,), tl.int32)
            for start in range(0, CHUNKS, 8):
                other = start + tl.arange(0, 8)
                others = tl.load(maxima + row * LANES + other, mask=other < CHUNKS, other=float("-inf"))
                as_high += tl.sum((others[None, :] >= of_chunks[:, None]).to(tl.int32), 1)
            bound = tl.max(tl.where(as_high >= top_k, of_chunks, float("-inf")), 0)
            wanted = (mass > 0) & (key >= _key(bound))
        else:
            at_least = tl.sum(tl.exp2(_exponent(_key(of_chunks), highest, scale)), 0)  # of the row's masses
            # A hundredth of an octave is far more than these few roundings are.
            bound = tl.log2((1.0 - share).to(tl.float32) * at_least / vocabulary) - 0.01
            wanted = (mass > 0) & (exponent >= bound)
            tl.atomic_add(state + _TOTAL, tl.sum(mass, 0), sem="relaxed")
        count = tl.sum(wanted.to(tl.int32), 0)
        begin = tl.atomic_add(state + _FOUND, count.to(tl.int64), sem="relaxed")
        place = begin + tl.cumsum(wanted.to(tl.int32), 0) - 1
        tl.store(keys + place, key, mask=wanted)
        tl.store(listed + place, ids, mask=wanted)
        at_bin = _bin(exponent)
        tl.atomic_add(state + at_bin, mass, mask=wanted, sem="relaxed")
        if TOP_K:
            tl.atomic_add(state + _BINS + at_bin, wanted.to(tl.int64), mask=wanted, sem="relaxed")
    else:
        tl.store(state + _KEPT + chunk, tl.sum(mass, 0))
    tl.debug_barrier()  # all of it, before the one thread counts
    if tl.atomic_add(state + _ARRIVED, 1, sem="acq_rel", scope="gpu") == CHUNKS - 1:
        # What is kept are higher keys, and of equal ones the ids up to the last.
        edge, last = tl.full((), _LOWEST, tl.int64), vocabulary
        if TOP_K or TOP_P:
            found = tl.load(state + _FOUND, cache_modifier=".cg").to(tl.int32)
            step = tl.arange(0, _BINS)
            masses = tl.load(state + step, cache_modifier=".cg")
            total = tl.load(state + _TOTAL, cache_modifier=".cg")
            if TOP_K:
                counts = tl.load(state + _BINS + step, cache_modifier=".cg")
                need = tl.minimum(top_k.to(tl.int64), found)
                which = tl.sum((tl.cumsum(counts, 0) < need).to(tl.int32), 0)
                need -= tl.sum(tl.where(step < which, counts, 0), 0)
                members = _take_out(keys, listed, found, part_keys, part_ids, which, highest, scale, BLOCK)
                edge = _reaching(part_keys, part_ids, members, need, edge, highest, scale, _COUNT, BLOCK)
                rest = _mass_from(part_keys, part_ids, members, edge, highest, scale, BLOCK)
                masses = tl.where(step < which, masses, tl.where(step == which, rest, 0))
                total = tl.sum(masses, 0)
            if TOP_P:
                need = tl.ceil(share * total.to(tl.float64)).to(tl.int64)
                need = tl.maximum(tl.minimum(need, total), 1)
                which = tl.sum((tl.cumsum(masses, 0) < need).to(tl.int32), 0)
                need -= tl.sum(tl.where(step < which, masses, 0), 0)
                members = _take_out(keys, listed, found, part_keys, part_ids, which, highest, scale, BLOCK)
                edge = _reaching(part_keys, part_ids, members, need, edge, highest, scale, _MASS, BLOCK)
                need -= _mass_from(part_keys, part_ids, members, edge + 1, highest, scale, BLOCK)
                each = tl.maximum(_mass(_exponent(edge.to(tl.int32), highest, scale)), 1)
                equals = (need + each - 1) // each
                last = -_reaching(part_keys, part_ids, members, equals, edge, highest, scale, _TIES, BLOCK)
            for start in range(0, found, BLOCK):
                at = start + tl.arange(0, BLOCK)
                own = tl.load(keys + at, mask=at < found, other=0, cache_modifier=".cg")
                number = tl.load(listed + at, mask=at < found, other=0, cache_modifier=".cg")
                keeps = (at < found) & ((own > edge) | ((own == edge) & (number <= last)))
                part = _mass(_exponent(own, highest, scale))
                tl.atomic_add(state + _KEPT + number // CHUNK, part, mask=keeps, sem="relaxed")
            tl.debug_barrier()
        kept = tl.load(state + _KEPT + lane, mask=lane < CHUNKS, other=0, cache_modifier=".cg")
        total = tl.sum(kept, 0)
        point = tl.zeros((), tl.int64)
        if DRAWN:
            fraction = tl.load(uniforms + row * uniforms_row)
            # A product that rounds up may be the sum itself. Of no masses at all the first id passes -1.
            below = total - 1  # pyright: ignore[reportOperatorIssue]
            point = tl.minimum((fraction * total.to(tl.float64)).to(tl.int64), below)
        chosen = tl.minimum(tl.sum((tl.cumsum(kept, 0) <= point).to(tl.int32), 0), CHUNKS - 1)
        before = tl.sum(tl.where(lane < chosen, kept, 0), 0)
        ids = chosen * CHUNK + tl.arange(0, CHUNK)
        key = _key(_scores(logits, seen, banned, ids, vocabulary, penalty, BANNED, PENALISED))
        mass = _mass(_exponent(key, highest, scale))
        if TOP_K or TOP_P:
            mass = tl.where((key > edge) | ((key == edge) & (ids <= last)), mass, 0)
        token = chosen * CHUNK + tl.sum((before + tl.cumsum(mass, 0) <= point).to(tl.int32), 0)
        token = tl.minimum(token, vocabulary - 1)
        tl.store(tokens + row, token.to(tl.int64))
        if PENALISED:
            tl.debug_barrier()  # others read them still
            tl.store(seen + token, 1)


def chunk_of(columns: int) -> int:
    """Ids of a program."""
    return max(CHUNK, next_power_of_2(cdiv(columns, 256)))


def launch_sampling(
    logits: torch.Tensor,
    uniforms: torch.Tensor | None,
    seen: torch.Tensor | None,
    banned: torch.Tensor | None,
    temperature: float,
    top_k: int,
    top_p: float,
    repetition_penalty: float,
) -> torch.Tensor:
    """``(B,)`` int64; shapes as :func:`qwen2vl_kernels.sample_tokens_` has them."""
    (rows, columns), device, target = logits.shape, logits.device, target_of(logits.device)
    if uniforms is None:  # the first of the highest: drawn at 0 from the top one and its equals
        temperature, top_k, top_p = 1.0, 1, 1.0
    elif top_k >= columns:
        top_k = 0
    block = chunk_of(columns)
    chunks = cdiv(columns, block)
    lanes, width = next_power_of_2(chunks), _BEFORE_KEPT + chunks
    tokens = torch.empty(rows, dtype=torch.int64, device=device)
    state = torch.empty((rows, width), dtype=torch.int64, device=device)
    maxima = torch.empty((rows, lanes), dtype=torch.float32, device=device)
    lists = torch.empty((4, rows, chunks * block if top_k or top_p < 1 else 0), dtype=torch.int32, device=device)
    # A kernel has a pointer for what is not there too, and does not read it.
    marks = tokens if seen is None else seen.view(torch.uint8)
    shared = {
        "logits": logits,
        "seen": marks,
        "banned": tokens if banned is None else banned,
        "maxima": maxima,
        "state": state,
        "vocabulary": columns,
        "penalty": float(repetition_penalty),
        "logits_row": logits.stride(0),
        "seen_row": 0 if seen is None else marks.stride(0),
        "BANNED": 0 if banned is None else banned.numel(),
        "PENALISED": seen is not None,
        "CHUNKS": chunks,
        "LANES": lanes,
        "STATE": width,
        "CHUNK": block,
        "DEPENDENT": target.dependent,
        "num_warps": target.warps(128),
    }
    launch(_maxima_kernel, (rows * chunks,), device, **shared)
    launch(
        _choice_kernel,
        (rows * chunks,),
        device,
        **shared,
        uniforms=tokens if uniforms is None else uniforms,
        keys=lists[0],
        listed=lists[1],
        part_keys=lists[2],
        part_ids=lists[3],
        tokens=tokens,
        scale=exponent_scale(temperature),
        top_k=top_k,
        # At least 2^-31, which keeps one id as less does, so that Triton always takes the number for one of 64 bits.
        top_p=max(1 << 31, round(top_p * (1 << 62))),
        uniforms_row=0 if uniforms is None else uniforms.stride(0),
        DRAWN=uniforms is not None,
        TOP_K=top_k > 0,
        TOP_P=top_p < 1,
        max_registers=168,  # three programs at a time
        BLOCK=min(block, LISTED),
    )
    return tokens
