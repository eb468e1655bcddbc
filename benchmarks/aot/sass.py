"""Registers that some path through a kernel's machine code reads before anything has written them.

A compiler that forgets a write makes a kernel that is wrong only where that path is taken, and no interpreter sees it:
ptxas 12.8.93 (Triton 3.6) multiplied by shared-memory descriptors out of uniform registers that nothing had written.
``nvdisasm -plr`` says what every instruction reads and writes, of general, predicate, uniform and uniform predicate
registers; the paths are followed here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

#: A register: its file as nvdisasm calls it, and its number.
Register = tuple[str, int]

_PREFIX = {"GPR": "R", "PRED": "P", "UGPR": "UR", "UPRED": "UP"}
_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?);\s*$")
_LABEL = re.compile(r"^([\w.$]+):\s*$")
_COPY = re.compile(r"^(?:R2UR|MOV|UMOV)(?:\.\w+)* U?R\d+, U?R\d+$|^IMAD(?:\.MOV)?\.U32 R\d+, RZ, RZ, U?R\d+$")
_TARGET = re.compile(r"`\(([\w.$]+)\)")


@dataclass
class _Instruction:
    place: int
    text: str
    reads: frozenset[Register]
    writes: frozenset[Register]
    copy: bool  # of one register to another
    next: list[int] = field(default_factory=list)  # indices of those that may follow
    call: int | None = None  # of a subroutine's first instruction


@dataclass(frozen=True)
class EarlyRead:
    """``register`` (as the disassembly names it) is read at ``place``, bytes from the kernel's start, by ``text``."""

    register: str
    place: int
    text: str

    def __str__(self) -> str:
        return f"reads {self.register} before anything writes it: {self.text} at {self.place:#x}"


def early_reads(listing: str) -> list[EarlyRead]:
    """The reads that some path reaches before a write, of ``nvdisasm -c -plr -lrm narrow``'s output.

    A write under a predicate counts as a write: that its readers stand under the same one is not followed. Raises
    ``ValueError`` for text without instructions or without the columns of registers.
    """
    found: list[EarlyRead] = []
    sections = re.split(r"(?m)^(?=\s*\.section\s+\.text)", listing)[1:]
    for section in sections:
        code, labels = _parse(section)
        _connect(code, labels)
        found += _follow(code)
    if not sections:
        raise ValueError("the disassembly has no .text section")
    return found


def _parse(section: str) -> tuple[list[_Instruction], dict[str, int]]:
    """The instructions of a section in order, and the index of the one that each label stands before."""
    code: list[_Instruction] = []
    labels: dict[str, int] = {}
    columns: dict[int, Register] = {}
    rows: list[str] = []  # of the heading
    for line in section.splitlines():
        text, bar, cells = [*re.split(r"// ([|+])", line, maxsplit=1), "", ""][:3]
        if bar == "|" and not columns:
            if text.strip():
                columns = _columns(rows)
            else:
                rows.append(cells)
        if (label := _LABEL.match(text.rstrip())) is not None:
            labels[label[1]] = len(code)
        elif (found := _INSTRUCTION.match(text)) is not None:
            marks = [(columns[n], mark) for n, mark in enumerate(cells) if mark in "^vx" and n in columns]
            reads = frozenset(register for register, mark in marks if mark in "vx")
            writes = frozenset(register for register, mark in marks if mark in "^x")
            words = re.sub(r"(?:\s+[?&]\S+)+$", "", found[2].strip().replace(".reuse", ""))  # without scheduling hints
            # Where nobody reads what it writes, nvdisasm marks no write.
            copy = _COPY.match(words) is not None and len(reads) == 1 and len(writes) <= 1
            code.append(_Instruction(int(found[1], 16), words, reads - _unread(words), writes, copy))
    if not code or not columns:
        raise ValueError("the disassembly has no instructions with columns of registers: was it made with -plr?")
    return code, labels


def _columns(rows: list[str]) -> dict[int, Register]:
    """Position in a line -> register, from the heading: files between bars, then numbers written downwards."""
    names = next(row for row in rows if "GPR" in row)
    digits = rows[rows.index(names) + 1 :]
    found = {}
    begin = 0
    for part in names.split("|"):
        for place in range(begin, begin + len(part)):
            number = "".join(row[place] for row in digits if place < len(row)).strip()
            if number.isdigit():
                found[place] = (part.strip(), int(number))
        begin += len(part) + 1
    return found


def _unread(text: str) -> frozenset[Register]:
    """What nvdisasm counts as read and the hardware does not look at."""
    # With A in registers a product has one descriptor, and it stands in the last two of the four uniform registers.
    if (found := re.search(r"\b\w?GMMA\.\S+ R\d+, R\d+, gdesc\[UR(\d+)\]", text)) is not None:
        first = int(found[1])
        return frozenset({("UGPR", first), ("UGPR", first + 1)})
    # The way in which ptxas writes half a word: what the other half holds is nobody's.
    if (found := re.search(r"\bPRMT R(\d+), (?:R\d+|RZ), 0x[0-9a-f]+, R\1$", text)) is not None:
        return frozenset({("GPR", int(found[1]))})
    # And the one in which it keeps predicates that it has too few registers for: one bit of a word is made 0.
    found = re.search(r"\bLOP3\.LUT R(\d+), R\1, (0x[0-9a-f]+), RZ, 0xc0, !PT$", text)
    if found is not None and (int(found[2], 16) ^ 0xFFFFFFFF).bit_count() == 1:
        return frozenset({("GPR", int(found[1]))})
    return frozenset()


def _connect(code: list[_Instruction], labels: dict[str, int]) -> None:
    """Fill in which instructions may follow each."""
    for n, instruction in enumerate(code):
        words = instruction.text.split()
        guarded = words[0].startswith("@") and words[0] not in ("@PT", "@UPT")
        name = words[1] if words[0].startswith("@") else words[0]
        kind = name.partition(".")[0]
        target = found[1] if (found := _TARGET.search(instruction.text)) is not None else None
        after = [n + 1] if n + 1 < len(code) else []
        if kind in ("BRA", "JMP"):
            if target is None or target not in labels:
                raise ValueError(f"a jump to an unknown place: {instruction.text}")
            # A second predicate stands among the operands, and some forms ask the warp: BRA.U UP0, BRA.DIV UR4.
            surely = not guarded and instruction.text.split("`")[0].split()[-1] == name
            instruction.next = [labels[target], *([] if surely else after)]
        elif kind == "CALL":
            if target is None or target not in labels:
                raise ValueError(f"a call of an unknown place: {instruction.text}")
            instruction.call, instruction.next = labels[target], after
        elif kind in ("EXIT", "RET", "KILL"):
            instruction.next = after if guarded else []
        elif kind in ("BRX", "JMX", "BRXU", "JMXU"):
            raise ValueError(f"a jump by a register, whose targets are not known here: {instruction.text}")
        else:
            instruction.next = after
    _join(code, labels)


def _join(code: list[_Instruction], labels: dict[str, int]) -> None:
    """Send whoever waits at a convergence barrier to where the last BSSY of that barrier said, on each path."""
    barrier = re.compile(r"\b(BSSY|BSYNC)(?:\.\w+)* (B\d+)(?:, `\(([\w.$]+)\))?")
    before: list[dict[str, frozenset[int]] | None] = [None] * len(code)
    before[0] = {}
    waiting = [0]
    while waiting:
        n = waiting.pop()
        instruction, known = code[n], before[n]
        assert known is not None
        if (found := barrier.search(instruction.text)) is not None and found[1] == "BSSY":
            known = {**known, found[2]: frozenset({labels[found[3]]})}
        elif found is not None:
            after = instruction.next if instruction.text.startswith("@") else []
            instruction.next = sorted({*known.get(found[2], frozenset()), *after})
        for following in (*instruction.next, *(() if instruction.call is None else (instruction.call,))):
            there = before[following]
            joined = {
                name: known.get(name, frozenset()) | (there or {}).get(name, frozenset())
                for name in {*known, *(there or {})}
            }
            if joined != there:
                before[following] = joined
                waiting.append(following)


def _subroutine(code: list[_Instruction], first: int) -> Iterator[int]:
    """The instructions that a subroutine may run."""
    seen, waiting = {first}, [first]
    while waiting:
        n = waiting.pop()
        yield n
        for following in code[n].next:
            if following not in seen:
                seen.add(following)
                waiting.append(following)


def _follow(code: list[_Instruction]) -> list[EarlyRead]:
    """What is surely written before each instruction, by the meet over all paths, and what is read without being."""
    written_by_calls = {
        first: frozenset().union(*(code[n].writes for n in _subroutine(code, first)))
        for first in {instruction.call for instruction in code if instruction.call is not None}
    }
    before: list[frozenset[Register] | None] = [None] * len(code)
    before[0] = frozenset()
    waiting = [0]

    def reach(n: int, written: frozenset[Register]) -> None:
        known = before[n]
        met = written if known is None else known & written
        if met != known:
            before[n] = met
            waiting.append(n)

    while waiting:
        n = waiting.pop()
        instruction, known = code[n], before[n]
        assert known is not None
        written = _after(instruction, known)
        if instruction.call is not None:
            reach(instruction.call, written)
            written |= written_by_calls[instruction.call]
        for following in instruction.next:
            reach(following, written)
    return [
        EarlyRead(f"{_PREFIX[file]}{number}", instruction.place, instruction.text)
        for instruction, written in zip(code, before, strict=True)
        if written is not None and not instruction.copy
        for file, number in sorted(instruction.reads - written)
    ]


def _after(instruction: _Instruction, known: frozenset[Register]) -> frozenset[Register]:
    """What is written behind an instruction. A copy of what is not is no use of it, as when half of a pair is spilled,
    but then its target is not written either."""
    if instruction.copy and not instruction.reads <= known:
        return known - instruction.writes
    return known | instruction.writes
