"""Attention for Hopper compiled by the versions of ptxas that users have: gates, each shown to fail, and the budget."""

from __future__ import annotations

import re
import shutil

import pytest
import torch
from typer.testing import CliRunner, Result

pytest.importorskip("triton", reason="Triton is not installed, which brings a disassembler")

from benchmarks import wgmma
from benchmarks.__main__ import app
from benchmarks.aot import budget, hopper, sass
from benchmarks.aot.compiler import disassembled
from qwen2vl_kernels.core import attention_sm90, native
from qwen2vl_kernels.core.attention_sm90 import Kernel, Sm90Config

CSRC = hopper.SOURCE.parents[1]
BF16 = torch.bfloat16
needs_nvcc = pytest.mark.skipif(wgmma.nvcc() is None, reason="nvcc is not installed")


def _kernel(columns: int, consumers: int, keys: int, causal: bool = False, dtype: torch.dtype = BF16) -> Kernel:
    return Kernel(columns, dtype, causal, Sm90Config(consumers, keys))


LONG = _kernel(80, 3, 96)
#: Of both kinds of segments, both masks, both dtypes and all ranks of copies. ``make aot`` has all.
SOME = [LONG, _kernel(128, 2, 128, causal=True), _kernel(72, 2, 128, dtype=torch.float16)]


def test_what_is_compiled_is_what_calls_take():
    """The lists in C++ are those of the Python that chooses from them, and what the tuner tries is behind a switch."""
    for columns in attention_sm90.COLUMNS:
        text = (CSRC / "cuda" / f"attention_forward_{columns}.cu").read_text()
        built, tried = (_configs(part) for part in text.split("QWEN2VL_TRIED"))
        taken = dict.fromkeys(attention_sm90.configs(columns)[1:])
        assert built == [(columns, config) for config in taken]
        assert {*built, *tried} == {(columns, config) for config in attention_sm90.tried(columns)}
        assert len(built) + len(tried) == len(attention_sm90.tried(columns))


def test_what_is_linked_is_what_calls_take():
    if (extension := native._cuda) is None:
        pytest.skip(f"no CUDA extension: {native._cuda_reason}")
    built = native.build_info()["sm90"]
    linked = [tuple(key) for key in extension.attention_built()]
    wanted = hopper.kernels(tried=built.endswith("with every tile")) if built.startswith("built") else []
    assert len(linked) == len(wanted)
    assert set(linked) == {kernel.key for kernel in wanted}


def _configs(text: str) -> list[tuple[int, Sm90Config]]:
    found = []
    for numbers in re.findall(r"AttentionConfig<([^>]+)>", text):
        columns, consumers, keys, *rest = re.split(r",\s*", numbers)
        share, p_shared, block, across = (*rest, *("0", "false", "0", "0")[len(rest) :])
        numbers = int(consumers), int(keys), int(share), p_shared == "true", int(block), int(across)
        config = Sm90Config(*numbers)
        found.append((int(columns), config))
    return found


def test_ptx_is_lowered_by_its_version_alone():
    text = "//\n.version 9.0\n.target sm_90a\n// .version 9.0 is above\n"
    assert hopper.lower(text, "8.7") == text.replace("\n.version 9.0", "\n.version 8.7")
    assert hopper.lower(text, "9.0") == text and hopper.lower(text, "9.1") == text
    for wrong in ("", text + text):
        with pytest.raises(ValueError, match=r"one line \.version, got [02]"):
            hopper.lower(wrong, "8.7")


def test_a_version_that_is_not_there_is_told(tmp_path, monkeypatch):
    monkeypatch.setitem(hopper.ASSEMBLERS, "12.8", ("8.7", tmp_path / "ptxas", "build/triton/3.6.0"))
    assert hopper.assemblers()[-1] == "nvcc" and "12.8" not in hopper.assemblers()
    with pytest.raises(ValueError, match=r"ptxas 12\.8 is not here: make build/triton/3\.6\.0 brings it"):
        hopper.assemble(tmp_path / "x.ptx", "12.8")
    with pytest.raises(ValueError, match=r"no ptxas is called '11\.0'; there are 12\.8, 12\.9, nvcc"):
        hopper.assemble(tmp_path / "x.ptx", "11.0")
    with pytest.raises(ValueError, match=r"no kernels for heads of 88 columns"):
        hopper.kernels([88])


@pytest.fixture(scope="module")
def long_kernel(tmp_path_factory):
    """PTX, what nvcc's ptxas says of it, and the disassembly."""
    if wgmma.nvcc() is None:
        pytest.skip("nvcc is not installed")
    text = hopper.ptx(LONG, tmp_path_factory.mktemp("long"))
    cubin, said = hopper.assemble(text, "nvcc")
    return text, said, disassembled(cubin)


@needs_nvcc
@pytest.mark.parametrize("kernel", SOME, ids=lambda kernel: kernel.label)
def test_the_kernels_pass_the_gates(kernel):
    """By the compiler that most people have, and by nvcc's own."""
    found = hopper.compile_kernel(kernel, [version for version in hopper.assemblers() if version != "12.9"])
    assert [one.failures for one in found] == [()] * len(found)
    assert all(len(one.loops) == 1 + kernel.causal for one in found)


@needs_nvcc
@pytest.mark.long
@pytest.mark.parametrize("columns", attention_sm90.COLUMNS)
def test_every_kernel_passes_the_gates(columns):
    found = hopper.compile_all(hopper.kernels([columns]), jobs=1)
    assert not [(one.kernel.label, one.ptxas, one.failures) for one in found if one.failures]


@needs_nvcc
def test_lowered_ptx_becomes_the_same_code(long_kernel):
    text, _, listing = long_kernel
    lowered = text.with_name("lowered.ptx")
    lowered.write_text(hopper.lower(text.read_text(), "8.7"))
    cubin, _ = hopper.assemble(lowered, "nvcc")
    (code,), (other,) = sass.kernels(listing), sass.kernels(disassembled(cubin))
    assert [one.text for one in code] == [one.text for one in other]


WAIT = """        if (step > 0) sm90::mbarrier_wait(barriers.k_full(k_ring.stage), k_ring.parity);
        sm90::wgmma_wait_group<0>(o, p);
"""
ADVANCE = """        if (leads) sm90::mbarrier_arrive(barriers.v_empty(v_ring.stage));
        v_ring.advance();
        rescale(o, alpha);
"""
#: What is done to the sources, and what the gates say of it.
MUTATIONS = {
    "exponentials behind all products": (
        ("attention_forward.cuh", WAIT, "        sm90::wgmma_wait_group<0>(o, p);\n"),
        [r"50 exponentials of a step are not between its two waits"],
    ),
    "sums that are touched while products are in flight": (
        (
            "attention_forward.cuh",
            WAIT + ADVANCE,
            "        rescale(o, alpha);\n        sm90::pin(o);\n" + WAIT + ADVANCE,
        ),
        [r"\(C7514\) Potential Performance Loss", r"waits for products: .*0x0.*0x0.*0x0"],
    ),
    "one step of columns less": (
        ("attention_forward.cuh", "step < shape.depth()", "step < shape.depth() - 1"),
        [r"products of a step: 4 of 64x96x16 \(q k, from shared memory\)", "20 products in all, wanted 22"],
    ),
    "too few registers": (
        ("attention_shape.h", "consumers == 3 ? 160", "consumers == 3 ? 136"),
        [
            r"\(C7512\) Potential Performance Loss",
            r"32 bytes of local memory, 48 spilled",
            "instructions on local memory",
        ],
    ),
    "too many registers": (
        ("attention_shape.h", "consumers == 3 ? 160", "consumers == 3 ? 168"),
        [r"536 registers are dealt out, a multiprocessor has 512"],
    ),
    "sums that nothing sets": (
        ("attention_forward.cuh", "o[i] = 0.0f;", ";"),
        [r"reads R\d+ before anything writes it: HGMMA"],
    ),
    "no copies": (
        ("sm90.cuh", '"cp.async.bulk.tensor.4d', '"// cp.async.bulk.tensor.4d'),
        [r"copies by TMA: \{\}, wanted q, k and v by UTMALDG\.4D"],
    ),
    "another element": (
        ("attention_forward_one.cu", "QWEN2VL_FP16 ?", "!QWEN2VL_FP16 ?"),
        [r"22 products of other elements: HGMMA\.64x96x16\.F32 "],
    ),
    "another share of polynomials": (
        ("attention_softmax.cuh", "i / 4 % 8 < Share", "i / 4 % 8 < Share + 1"),
        [r"42 exponentials a step, wanted 50"],
    ),
}


@needs_nvcc
@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_kernel_that_breaks_them_fails_the_gates(tmp_path, mutation):
    (name, old, new), wanted = MUTATIONS[mutation]
    shutil.copytree(CSRC, tmp_path / "csrc")
    file = tmp_path / "csrc" / "cuda" / name
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))
    cubin, said = hopper.assemble(hopper.ptx(LONG, tmp_path, file.with_name(hopper.SOURCE.name)), "nvcc")
    _assert_told(hopper.judge(LONG, "nvcc", said, disassembled(cubin)).failures, wanted)


def _assert_told(failures: tuple[str, ...], wanted: list[str]) -> None:
    for pattern in wanted:
        assert any(re.search(pattern, failure) for failure in failures), (pattern, failures)


def test_machine_code_that_is_not_what_was_meant_fails_the_gates(long_kernel):
    """What no mutation of the source brings about, in the text of the disassembly."""
    _, said, listing = long_kernel

    def told(text: str, *wanted: str, words: str = said) -> None:
        assert text != listing or words != said
        _assert_told(hopper.judge(LONG, "nvcc", words, text).failures, list(wanted))

    assert hopper.judge(LONG, "nvcc", said, listing).failures == ()
    told(listing.replace("UP0, 0xa0", "UP0, 0x80"), r"a consumer uses \d+ registers of 128")
    told(re.sub(r"(DEALLOC\.CTAPOOL) 0x20", r"\1 0x8", listing), r"a producer uses \d+ registers of 8")
    told(re.sub(r"USETMAXREG\.DEALLOC\.CTAPOOL", "NOP.DEALLOC", listing), "setmaxnreg is there for 1 of")
    told(listing, "ptxas does not tell what it spills", words="")
    # The last product of a step and its first wait change places.
    wait = "WARPGROUP.DEPBAR.LE gsb0, 0x1"
    before, _, after = listing.partition(wait)
    at = before.rindex("HGMMA.64x80x16")
    product = before[at : before.index(";", at)].strip()
    swapped = before[:at] + wait + before[at + len(product) :] + product + after
    told(swapped, "1 products of a step come after its first wait")


@needs_nvcc
def test_the_command_keeps_machine_code_and_tells_a_failure(tmp_path, monkeypatch):
    """``make sm90-cubins`` and ``make aot`` go by it."""

    def run(kernel: Kernel) -> Result:
        monkeypatch.setattr(hopper, "kernels", lambda heads, tried: [kernel])
        command = ["sm90", "--jobs", "1", "--ptxas", "nvcc", "--failures", "--cubins", str(tmp_path)]
        return CliRunner().invoke(app, command)

    done = run(LONG)
    assert (done.exit_code, done.output) == (0, "1 kernels compiled, 0 fail a gate\n")
    done = run(_kernel(80, 3, 128))
    assert done.exit_code == 1 and "1 kernels compiled, 1 fail a gate" in done.output and "C7512" in done.output
    assert [path.name for path in tmp_path.iterdir()] == ["80-bf16-full-3x96-0-registers.cubin"]
    assert (tmp_path / f"{LONG.label}.cubin").read_bytes().startswith(b"\x7fELF")
    for wrong, told in (("88", "no kernels for heads of 88 columns"), ("--ptxas=11.0", "no ptxas is called '11.0'")):
        monkeypatch.undo()
        done = CliRunner().invoke(app, ["sm90", wrong])
        assert done.exit_code == 2 and told in " ".join(done.output.split())


@needs_nvcc
def test_the_budget_is_that_of_the_formula(long_kernel):
    """Cycles of three consumers of 64 queries that take 96 keys, by the width of 80, and what follows from them."""
    _, said, listing = long_kernel
    found = hopper.judge(LONG, "nvcc", said, listing)
    counted = budget.budget(found)
    assert sum(counted.classes.values()) == len(found.loops[0].instructions)
    assert (counted.classes["HGMMA"], counted.classes["MUFU"]) == (5 + 6, 96 // 2 + 2)
    assert counted.tensor == 2 * 192 * 96 * 80 / 2048
    assert counted.special == 12 * 50 * 2
    assert counted.shared == 3 * (5 * (16 + 24) + 6 * 20) + 2 * 96 * 80 * 2 / 128
    assert counted.bound == "tensor" and counted.tensor <= counted.period < 1.2 * counted.tensor
    by_rows = {one.rows: one for one in budget.predict(found)}
    assert by_rows[16384].executed == pytest.approx(86 * 192 / 16384 * 171 * 96 / 16384)
    assert by_rows[256].executed == pytest.approx(384 / 256 * 288 / 256) and not by_rows[256].chosen
    # No faster than the tensor cores, and slower where tiles have few steps.
    most = 4 * 192 * 96 * 80 / counted.tensor * budget.MULTIPROCESSORS * budget.CLOCK * budget.HELD / 1e12
    assert by_rows[256].tflops < by_rows[1024].tflops < by_rows[4096].tflops < by_rows[16384].tflops < most
    with pytest.raises(ValueError, match="it is causal"):
        budget.budget(hopper.Assembled(_kernel(80, 3, 96, causal=True), "nvcc", (0, 0), (0, 0), (), found.tile, ()))
