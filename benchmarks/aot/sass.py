"""Machine code as instructions with their registers and the ways through them, and what is wrong with it.

That is, registers that some way reads before anything has written them: a compiler that forgets a write makes a kernel
that is wrong only where that way is taken, and no interpreter sees it. ptxas 12.8.93 (Triton 3.6) multiplied by
shared-memory descriptors out of uniform registers that nothing had written. ``nvdisasm -plr`` says what every
instruction reads and writes, of general, predicate, uniform and uniform predicate registers; here the ways are
followed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

#: A register: its file as nvdisasm calls it, and its number.
Register = tuple[str, int]

_PREFIX = {"GPR": "R", "PRED": "P", "UGPR": "UR", "UPRED": "UP"}
#: Where the bits of each file begin in a number that says what is written: four a general register, a bit a byte.
_FIRST = {"GPR": 0, "PRED": 1024, "UGPR": 1040, "UPRED": 1296}
_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?);\s*$")
_LABEL = re.compile(r"^([\w.$]+):\s*$")
_COPY = re.compile(r"^(?:R2UR|MOV|UMOV)(?:\.\w+)* U?R\d+, U?R\d+$|^IMAD(?:\.MOV)?\.U32 R\d+, RZ, RZ, U?R\d+$")
_TARGET = re.compile(r"`\(([\w.$]+)\)")
_EVERY_FIRST_BYTE = sum(1 << 4 * number for number in range(256))
#: Instructions whose result has each byte from bytes of their operands, with the operands that matter.
_PERMUTED = re.compile(r"^PRMT R(\d+), (\w+), (0x[0-9a-f]+), (\w+)$")
_LOGICAL = re.compile(r"^LOP3\.LUT R(\d+), (\w+), (\w+), (\w+), (0x[0-9a-f]+), !PT$")


@dataclass
class Instruction:
    """An instruction, ``place`` bytes from its kernel's start; registers by file and number."""

    place: int
    text: str
    reads: frozenset[Register]
    writes: frozenset[Register]
    copy: bool  # of one register to another
    bytewise: tuple[int, ...] | None  # bits that each byte of the result comes from, if it is of such an instruction
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
    ``ValueError`` as :func:`kernels` does.
    """
    return [read for code in kernels(listing) for read in _follow(code)]


def kernels(listing: str) -> list[list[Instruction]]:
    """The instructions of each kernel of such a disassembly, in order, connected.

    Raises ``ValueError`` for text without instructions or without the columns of registers.
    """
    sections = re.split(r"(?m)^(?=\s*\.section\s+\.text)", listing)[1:]
    if not sections:
        raise ValueError("the disassembly has no .text section")
    found = []
    for section in sections:
        code, labels = _parse(section)
        _connect(code, labels)
        found.append(code)
    return found


def reached(code: list[Instruction], first: int) -> set[int]:
    """The instructions that may run from the one of index ``first`` on, by index."""
    seen, waiting = {first}, [first]
    while waiting:
        instruction = code[waiting.pop()]
        for following in (*instruction.next, *(() if instruction.call is None else (instruction.call,))):
            if following not in seen:
                seen.add(following)
                waiting.append(following)
    return seen


def loops(code: list[Instruction]) -> list[set[int]]:
    """The instructions of each loop, by index: what can come back to where all ways into the loop begin."""
    before: list[list[int]] = [[] for _ in code]
    for n, instruction in enumerate(code):
        for following in instruction.next:
            before[following].append(n)
    found: dict[int, set[int]] = {}
    for n, instruction in enumerate(code):
        for target in instruction.next:
            body, waiting = {target}, [n]
            while target <= n and waiting:
                at = waiting.pop()
                if at not in body:
                    body.add(at)
                    waiting += before[at]
            # From the kernel's start on, something comes here past the target: code that stands aside, and no loop.
            if target <= n and 0 not in body - {target}:
                found.setdefault(target, set()).update(body)
    return list(found.values())


def _parse(section: str) -> tuple[list[Instruction], dict[str, int]]:
    """The instructions of a section in order, and the index of the one that each label stands before."""
    code: list[Instruction] = []
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
            reads -= _unread(words)
            code.append(Instruction(int(found[1], 16), words, reads, writes, copy, _bytewise(words, reads)))
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


def _bits(registers: Iterable[Register]) -> int:
    """The bits of whole registers."""
    whole = {"GPR": (4, 15)}
    found = 0
    for file, number in registers:
        width, ones = whole.get(file, (1, 1))
        found |= ones << (_FIRST[file] + width * number)
    return found


def _bytewise(text: str, reads: frozenset[Register]) -> tuple[int, ...] | None:
    """The bits that each byte of the result of PRMT or LOP3 comes from, ``None`` for other instructions.

    Compilers pack small numbers into words with bytes that nobody has written and nobody takes out again.
    """
    if (found := _PERMUTED.match(text)) is not None and all(file == "GPR" for file, _ in reads):
        selector, sources = int(found[3], 16), (found[2], found[4])
        taken = [(selector >> 4 * byte) & 7 for byte in range(4)]  # the fourth bit of each repeats a sign
        return tuple(_byte(sources[at // 4], at % 4, reads) for at in taken)
    if (found := _LOGICAL.match(text)) is not None and all(file == "GPR" for file, _ in reads):
        names, table = found.groups()[1:4], int(found[5], 16)
        constant = int(names[1], 16) if names[1].startswith("0x") else None
        # What a constant settles does not depend on the other operand: 0 in an "and", ones in an "or".
        settles = {0xC0: 0x00, 0xFC: 0xFF}.get(table) if constant is not None and names[2] == "RZ" else None
        return tuple(
            0
            if settles is not None and (constant or 0) >> 8 * byte & 0xFF == settles
            else _byte(names[0], byte, reads) | _byte(names[1], byte, reads) | _byte(names[2], byte, reads)
            for byte in range(4)
        )
    return None


def _byte(name: str, byte: int, reads: frozenset[Register]) -> int:
    """The bit of a register's byte; none of what is no register, or not counted as read."""
    register = ("GPR", int(name[1:])) if re.fullmatch(r"R\d+", name) else None
    return 1 << (4 * register[1] + byte) if register in reads else 0


def _connect(code: list[Instruction], labels: dict[str, int]) -> None:
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


def _join(code: list[Instruction], labels: dict[str, int]) -> None:
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


def _follow(code: list[Instruction]) -> list[EarlyRead]:
    """What is surely written before each instruction, by the meet over all paths, and what is read without being."""
    written_by_calls = {
        first: _bits(register for n in reached(code, first) for register in code[n].writes)
        for first in {instruction.call for instruction in code if instruction.call is not None}
    }
    before: list[int | None] = [None] * len(code)
    before[0] = 0
    waiting = [0]

    def reach(n: int, written: int) -> None:
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
        if written is not None and not instruction.copy and instruction.bytewise is None
        for file, number in sorted(instruction.reads)
        if _bits([(file, number)]) & ~written
    ]


def _after(instruction: Instruction, known: int) -> int:
    """What is written behind an instruction. A copy of what is not is no use of it, as when half of a pair is spilled,
    but then its target is not written either; of bytes, the bytes that were copied."""
    writes = _bits(instruction.writes)
    if instruction.copy and _bits(instruction.reads) & ~known:
        return known & ~writes
    if instruction.bytewise is not None:
        for byte, source in enumerate(instruction.bytewise):
            if source & ~known:
                writes &= ~(_EVERY_FIRST_BYTE << byte)
        return known & ~_bits(instruction.writes) | writes
    return known | writes
