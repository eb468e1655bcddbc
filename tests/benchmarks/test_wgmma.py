"""The microbenchmark of warpgroup products: what it compiles to, what it counts, and why it cannot run here."""

import re
import subprocess
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from benchmarks import wgmma
from benchmarks.__main__ import app
from benchmarks.case import Context
from benchmarks.run import run_case


@pytest.fixture(scope="module")
def cubin(tmp_path_factory):
    if wgmma.nvcc() is None:
        pytest.skip("nvcc, CUDA's compiler, is not installed")
    return wgmma.build(tmp_path_factory.mktemp("wgmma"), wgmma.QUICK_WIDTHS, target="cubin")


def test_every_shape_is_one_instruction_and_nothing_waits(cubin):
    """In the machine code: 16 products a loop of each of six kernels, chained ones with nothing between them."""
    triton = pytest.importorskip("triton", reason="Triton, which brings nvdisasm, is not installed")
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    sass = subprocess.run([str(tool), "-c", str(cubin)], check=True, capture_output=True, text=True).stdout
    kernels = re.split(r"^\.text\.", sass, flags=re.MULTILINE)[1:]
    seen = {}
    for kernel in kernels:
        width, registers, form = map(int, re.match(r"\S*ILi(\d+)ELb([01])ELN\w*FormE(\d)E", kernel).groups())
        instructions = [
            line.split("*/")[1].strip() for line in kernel.splitlines() if re.search(r"/\*[0-9a-f]{4}\*/", line)
        ]
        products = [n for n, text in enumerate(instructions) if "HGMMA" in text]
        assert len(products) == 16
        for n in products:
            operands = re.fullmatch(
                r"HGMMA\.64x(\d+)x16\.F32\.BF16 R\d+, (R\d+, )?gdesc.*", instructions[n].rstrip(" ;")
            )
            assert (int(operands[1]), operands[2] is not None) == (width, bool(registers))
        waits = sum("WARPGROUP.DEPBAR" in text for text in instructions[products[0] : products[-1]])
        assert waits == (15 if wgmma.FORMS[form] == "awaited" else 0)
        assert not re.search(r"\b(?:LDL|STL)\b", kernel), "registers are spilled"
        seen[width, registers, wgmma.FORMS[form]] = True
    wanted = [(w, r, f) for w in wgmma.QUICK_WIDTHS for r in (0, 1) for f in wgmma.FORMS]
    assert set(seen) == {key for key in wanted if key[2] != "independent" or key[0] <= 128}


def test_the_build_refuses_what_waits_or_spills(tmp_path, monkeypatch):
    """By ptxas' own words, which a compiler stands in for that says them."""
    compiler = tmp_path / "nvcc"
    monkeypatch.setattr(wgmma, "nvcc", lambda: str(compiler))
    waits = "makes products wait"
    for words, reason in (
        ("ptxas info : (C7515) Potential Performance Loss: wgmma.mma_async instructions are serialized", waits),
        ("ptxas info : (C7510) something new", waits),
        ("0 bytes stack frame, 48 bytes spill stores, 0 bytes spill loads", "spills"),
    ):
        compiler.write_text(f'#!/bin/sh\nfor last; do :; done\ntouch "$last"\necho "{words}" >&2\n')
        compiler.chmod(0o755)
        with pytest.raises(wgmma.BuildError, match=reason):
            wgmma.build(tmp_path / "out", (80,))
    compiler.write_text("#!/bin/sh\necho 'no such architecture' >&2\nexit 1\n")
    with pytest.raises(wgmma.BuildError, match="no such architecture"):
        wgmma.build(tmp_path / "out", (80,))


def test_the_least_cycles():
    """2048 multiply-adds a cycle bind wide products; reading 64 rows of A as well binds narrow ones."""
    assert [wgmma.least_cycles(n, True) for n in (16, 80, 256)] == [8, 40, 128]
    assert [wgmma.least_cycles(n, False) for n in (16, 64, 80, 256)] == [20, 32, 40, 128]


def test_widths_that_no_instruction_has_are_refused():
    with pytest.raises(ValueError, match="widths: 20 is none of wgmma's"):
        wgmma.header((16, 20))


class Counted:
    """In place of the library: cycles that the least ones are 80 % of, and a wrong element at one width."""

    def __init__(self, wrong_at: int | None = None) -> None:
        self.wrong_at = wrong_at

    def rate(self, width, registers, form, groups, wide):
        cycles = wgmma.least_cycles(width, registers) / 0.8
        return {"cycles": cycles, "rate": 2 * width, "wrong": float(width == self.wrong_at)}

    def least(self, width, registers):
        return {"cycles": wgmma.least_cycles(width, registers), "rate": 3 * width, "wrong": 0.0}


def test_rows_stand_beside_the_least_there_could_be():
    with Context(device=torch.device("cpu"), rounds=2) as context:
        result = run_case(wgmma.case(Counted(wrong_at=16), (16, 80, 256)), context)
    assert len(result["red"]) == 3 and "A shared, 1 warpgroup: elements that ones make wrong" in result["red"][0]
    rows = {(r["workload"], r["provider"], r["metric"]): r for r in result["rows"]}
    row = rows["m64n80k16, chained", "A registers, 2 warpgroups", "cycles"]
    assert row["median"] == pytest.approx(50) and row["ratios"]["least, A registers"]["median"] == pytest.approx(0.8)
    assert not any("m64n16k16" in workload for workload, *_ in rows), "what is wrong is not timed"
    assert ("m64n256k16, independent", "A shared, 1 warpgroup", "cycles") not in rows
    table = wgmma.table({**result, "device": "H200"})
    cells = [list(column.cells) for column in table.columns]
    assert cells[0] == ["80", "256"] and cells[1] == ["40.0", "128.0"] and cells[3] == ["50.0", "160.0"]
    assert cells[2] == ["50.0", ""] and cells[-1] == ["160", "512"]


def test_the_command_says_why_nothing_is_measured():
    reason = wgmma.why_not(torch.device("cuda"))
    if reason is None:
        pytest.skip("there is a Hopper card")
    done = CliRunner().invoke(app, ["wgmma"])
    assert done.exit_code == 0 and "not measured: it takes a GPU of capability 9.0" in done.output


@pytest.mark.gpu
def test_products_of_ones_are_right_and_no_faster_than_the_tensor_cores(tmp_path):
    if (reason := wgmma.why_not(torch.device("cuda"))) is not None:
        pytest.skip(reason)
    library = wgmma.Library(wgmma.build(tmp_path, (16, 80)))
    for width in (16, 80):
        for registers in (False, True):
            for form in wgmma.FORMS:
                for wide in (False, True):
                    taken = library.sample(width, registers, form, 2, wide, ones=True, cycles=1 << 16)
                    assert taken.wrong == 0
                    assert taken.cycles >= 0.95 * 64 * width * 16 / 2048
