"""Which reads of registers nothing has written yet are found in a disassembly, and which are none."""

from __future__ import annotations

import re

import pytest

from benchmarks.aot.sass import early_reads

FILES = {"R": "GPR", "P": "PRED", "UR": "UGPR", "UP": "UPRED"}


def _listing(*lines: str) -> str:
    """Such a disassembly: a line is a label, or ``text ; registers read > registers written``."""
    place, body, places = 0, [], {}
    used = sorted({name for line in lines for name in re.findall(r"\bU?[RP]\d+\b", line.partition(";")[2])})
    names = tens = units = ""
    for kind, file in FILES.items():
        own = [name for name in used if re.fullmatch(rf"{kind}\d+", name)]
        numbers = [name[len(kind) :].rjust(2) for name in own]
        width = max(len(file), len(own))
        places |= {name: len(names) + 3 + n for n, name in enumerate(own)}
        names += " | " + file.ljust(width)
        tens += " | " + "".join(number[0] for number in numbers).ljust(width)
        units += " | " + "".join(number[1] for number in numbers).ljust(width)
    for line in lines:
        text, has, marks = line.partition(" ;")
        if not has:
            body.append(f"{line}:        // +....")
            continue
        reads, _, writes = marks.partition(">")
        cells = [" "] * len(names)
        for name in reads.split():
            cells[places[name]] = "v"
        for name in writes.split():
            cells[places[name]] = "x" if cells[places[name]] == "v" else "^"
        body.append(f"        /*{place:04x}*/    {text} ;    // |{''.join(cells)}")
        place += 16
    heading = "\n".join(f"    // |{row}" for row in (names, tens, units))
    return f'\t.section\t.text.kernel,"ax"\n    // +---\n{heading}\n    // +---\n.text.kernel:    // |\n' + "\n".join(
        body
    )


def _found(*lines: str) -> list[str]:
    return [read.register for read in early_reads(_listing(*lines))]


def test_the_first_read_decides():
    lines = ("IADD3 R2, R3, R3, RZ ; R3 > R2", "IADD3 R12, R2, R2, RZ ; R2 > R12", "EXIT ;")
    (read,) = early_reads(_listing(*lines))
    assert (read.register, read.place) == ("R3", 0)
    assert str(read) == "reads R3 before anything writes it: IADD3 R2, R3, R3, RZ at 0x0"
    assert _found("MOV R3, 0x1 ; > R3", *lines) == []


def test_a_copy_is_no_use_but_carries_what_is_missing():
    """Half of a pair that is spilled and filled may hold nothing: what counts is who works with it."""
    copies = ("R2UR UR11, R55 ; R55 > UR11", "IMAD.U32 R7, RZ, RZ, UR11 ; UR11 > R7", "MOV.SPILL R8, R7 ; R7 > R8")
    assert _found(*copies, "EXIT ;") == []
    assert _found("R2UR UR73, R61 ; R61 >", "EXIT ;") == []
    assert _found(*copies, "STG R8 ; R8 >", "EXIT ;") == ["R8"]
    assert _found("MOV R55, 0x1 ; > R55", *copies, "STG R8 ; R8 >", "EXIT ;") == []
    assert _found("MOV R8, 0x1 ; > R8", *copies, "STG R8 ; R8 >", "EXIT ;") == ["R8"]


@pytest.mark.parametrize("name", ["R7", "P1", "UR38", "UP0"])
def test_every_file_of_registers_counts(name):
    assert _found(f"OP ; {name} >", "EXIT ;") == [name]
    assert _found(f"OP ; > {name}", f"OP ; {name} >", "EXIT ;") == []


def test_one_path_without_a_write_is_enough():
    branch = ("ISETP P0 ; > P0", "@P0 BRA `(.L_x_1) ; P0 >", "{0} ; > R4", ".L_x_1", "STG R4 ; R4 >", "EXIT ;")
    assert _found(*(line.replace("{0}", "MOV R4, 0x1") for line in branch)) == ["R4"]
    assert _found("CS2R R4, SRZ ; > R4", *branch) == []
    both = ("ISETP P0 ; > P0", "@P0 BRA `(.L_x_1) ; P0 >", "MOV R4, 0x1 ; > R4", "BRA `(.L_x_2) ;")
    assert _found(*both, ".L_x_1", "MOV R4, 0x2 ; > R4", ".L_x_2", "STG R4 ; R4 >", "EXIT ;") == []


def test_what_a_loop_writes_is_not_there_the_first_time():
    """The fault of ptxas 12.8: a descriptor that each step reads and increments, and nobody set."""
    loop = (".L_x_1", "UIADD3 UR38, UP0, UR38, 0x20, URZ ; UR38 > UR38 UP0", "@P0 BRA `(.L_x_1) ; P0 >", "EXIT ;")
    assert _found("ISETP P0 ; > P0", *loop) == ["UR38"]
    assert _found("ISETP P0 ; > P0", "UMOV UR38, 0x1 ; > UR38", *loop) == []


def test_a_conditional_branch_may_name_its_predicate_among_the_operands():
    lines = (
        "UISETP ; > UP0",
        "BRA.U UP0, `(.L_x_1) ; UP0 >",
        "MOV R4, 0x1 ; > R4",
        ".L_x_1",
        "STG R4 ; R4 >",
        "EXIT ;",
    )
    assert _found(*lines) == ["R4"]
    assert _found("UISETP ; > UP0", "BRA `(.L_x_1) ;", "STG R4 ; R4 >", ".L_x_1", "EXIT ;") == []  # nobody comes there


def test_code_behind_an_exit_is_reached_by_those_that_do_not_take_it():
    assert _found("ISETP P0 ; > P0", "@P0 EXIT ; P0 >", "STG R4 ; R4 >", "EXIT ;") == ["R4"]
    assert _found("EXIT ;", "STG R4 ; R4 >", "EXIT ;") == []


def test_barriers_join_where_their_last_entry_said():
    def region(n: int, register: str) -> tuple[str, ...]:
        skip = (f"BSSY B0, `(.L_x_{n}) ;", f"@P0 BRA `(.L_x_{n + 1}) ; P0 >", f"MOV {register}, 0x1 ; > {register}")
        return *skip, f".L_x_{n + 1}", "BSYNC B0 ;", f".L_x_{n}"

    lines = ("ISETP P0 ; > P0", *region(0, "R4"), "MOV R5, 0x1 ; > R5", *region(2, "R6"), "STG R5 ; R5 >", "EXIT ;")
    assert _found(*lines) == []
    assert _found(*lines[:-1], "STG R6 ; R6 >", "EXIT ;") == ["R6"]


def test_a_subroutine_reads_what_its_callers_wrote():
    call = (
        "CALL.REL.NOINC `($div) ;",
        "STG R9 ; R9 >",
        "EXIT ;",
        "$div",
        "FADD R9, R8, R8 ; R8 > R9",
        "RET.REL.NODEC R2 ;",
    )
    assert _found(*call) == ["R8"]
    assert _found("MOV R8, 0x1 ; > R8", *call) == []


def test_descriptors_are_read_as_the_hardware_reads_them():
    rest = "R24 R25 > R24 R25"
    both = "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24 ; UR4 UR5 UR6 UR7"
    assert _found("OP ; > R24 R25 R4", f"{both} {rest}", "EXIT ;") == ["UR4", "UR5", "UR6", "UR7"]
    one = "HGMMA.64x64x16.F32.BF16 R24, R4, gdesc[UR4].tnspB, R24, gsb0 ; R4 UR4 UR5 UR6 UR7"
    assert _found("OP ; > R24 R25 R4", f"{one} {rest}", "EXIT ;") == ["UR6", "UR7"]


def test_parts_of_words_may_be_nobodys():
    assert _found("MOV R4, 0x1 ; > R4", "PRMT R5, R4, 0x7632, R5 ; R4 R5 > R5", "EXIT ;") == []
    assert _found("MOV R4, 0x1 ; > R4", "PRMT R5, R4, 0x7632, R5  &req={3}  ?trans1 ; R4 R5 > R5", "EXIT ;") == []
    use = "IADD3 R12, R6, R6, RZ ; R6 > R12"
    assert _found("MOV R4, 0x1 ; > R4", "PRMT R6, R4, 0x7632, R5 ; R4 R5 > R6", use, "EXIT ;") == ["R6"]
    assert _found("LOP3.LUT R5, R5, 0xfffffbff, RZ, 0xc0, !PT ; R5 > R5", "EXIT ;") == []
    assert _found("LOP3.LUT R6, R5, 0xff, RZ, 0xc0, !PT ; R5 > R6", use, "EXIT ;") == ["R6"]


def test_bytes_that_nobody_takes_out_of_a_word_may_be_nobodys():
    """Three small numbers in a word, as LLVM packs them: what Triton 3.7.1 made of rotary sections on capability 10."""
    packed = (
        "MOV R31, 0x7 ; > R31",
        "PRMT R2, R31, 0x3340, R0 ; R0 R31 > R2",
        "PRMT R3, R31, 0x3340, R31 ; R31 > R3",
        "PRMT R4, R3, 0x5410, R2 ; R2 R3 > R4",
        "LOP3.LUT R8, R4, 0x50607, RZ, 0xfc, !PT ; R4 > R8",
    )
    use = "IADD3 R12, R6, R6, RZ ; R6 > R12"
    for byte in range(4):
        taken = f"PRMT R6, R8, 0x777{byte}, RZ ; R8 > R6"
        assert _found(*packed, taken, use, "EXIT ;") == (["R6"] if byte == 3 else []), byte
    assert _found(*packed, "STG.E desc[UR4][R12.64], R8 ; R8 >", "EXIT ;") == ["R8"], "the whole word"
    masked = "LOP3.LUT R6, R8, 0xffffff, RZ, 0xc0, !PT ; R8 > R6"
    assert _found(*packed, masked, use, "EXIT ;") == [], "an and with zeros settles the byte"
    signed = "PRMT R6, R8, 0xbbbb, RZ ; R8 > R6"
    assert _found(*packed, signed, use, "EXIT ;") == ["R6"], "the sign of the missing byte"
    other = "LOP3.LUT R6, R8, 0xffffff, R31, 0xc0, !PT ; R8 R31 > R6"
    assert _found(*packed, other, use, "EXIT ;") == ["R6"], "another table of three operands"


def test_what_it_cannot_follow_is_refused():
    with pytest.raises(ValueError, match=r"no \.text section"):
        early_reads("nvdisasm error")
    with pytest.raises(ValueError, match="was it made with -plr"):
        early_reads('\t.section\t.text.kernel,"ax"\n.text.kernel:\n')
    with pytest.raises(ValueError, match="targets are not known here"):
        _found("BRX R2 -0x10 ; R2 >", "EXIT ;")
