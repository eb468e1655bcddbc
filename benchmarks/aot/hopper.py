"""Attention in CUDA C++ for Hopper compiled ahead of time, by every ptxas that users have, and what it must become.

Users compile with their own nvcc, so what one version of ptxas makes of a kernel is not what another does. nvcc writes
each kernel's PTX once, every version assembles it, and its machine code must be what the kernel was written to be.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import wgmma
from qwen2vl_kernels.core import attention_sm90
from qwen2vl_kernels.core.attention_sm90 import Kernel

from . import sass
from .compiler import TRITONS, disassembled

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "csrc" / "cuda" / "attention_forward_one.cu"

#: Versions of ptxas besides nvcc's own, with the newest PTX that each reads and the target of make that brings it.
ASSEMBLERS = {
    "12.8": ("8.7", TRITONS / "3.6.0/triton/backends/nvidia/bin/ptxas", "build/triton/3.6.0"),
    "12.9": ("8.8", ROOT / "build/ptxas/12.9/nvidia/cuda_nvcc/bin/ptxas", "build/ptxas/12.9"),
}
NVCC = "nvcc"

_PRODUCT = re.compile(r"\bHGMMA\.64x(\d+)x16\.\S+ R\d+, (R\d+, )?gdesc\[UR\d+\](\.tnspB)?")
_DEALT = re.compile(r"\bUSETMAXREG\.(DEALLOC|TRY_ALLOC)\.CTAPOOL (?:UP\d+, )?(0x[0-9a-f]+)")
_REGISTERS = 65536 // 128  # of a multiprocessor, a thread of each warpgroup


@dataclass(frozen=True)
class Loop:
    """Machine code that one warp of a consumer runs again and again, without what waits for a barrier a second time."""

    instructions: tuple[str, ...]

    def count(self, pattern: str) -> int:
        """Instructions whose name matches."""
        return sum(re.match(pattern, name(text)) is not None for text in self.instructions)

    @property
    def products(self) -> Counter[tuple[str, int, bool]]:
        """HGMMA by ("q k" or "p v", N, whether the first operand is in registers)."""
        found: Counter[tuple[str, int, bool]] = Counter()
        for text in self.instructions:
            if (product := _PRODUCT.search(text)) is not None:
                found["p v" if product[3] else "q k", int(product[1]), product[2] is not None] += 1
        return found


@dataclass(frozen=True)
class Assembled:
    """What one ptxas made of one kernel. Registers are those of a thread that are used, and those it has."""

    kernel: Kernel
    ptxas: str
    producer: tuple[int, int]
    consumer: tuple[int, int]
    loops: tuple[Loop, ...]  # the masked one of a causal kernel first
    tile: Loop  # over the tiles, without the loops over keys
    failures: tuple[str, ...]


def name(text: str) -> str:
    """An instruction's name with its modifiers, without its predicate."""
    return re.sub(r"^@!?U?P\w+\s+", "", text).split()[0]


def kernels(heads: Iterable[int] | None = None, tried: bool = False) -> list[Kernel]:
    """What is built for these widths of heads, by default all, or all that the tuner tries.

    Raises ``ValueError`` for a width that there are no kernels for.
    """
    columns = list(attention_sm90.COLUMNS if heads is None else heads)
    if wrong := [one for one in columns if one not in attention_sm90.COLUMNS]:
        raise ValueError(f"no kernels for heads of {wrong[0]} columns; there are {attention_sm90.COLUMNS}")
    built = [kernel for kernel in attention_sm90.kernels() if kernel.columns in columns]
    if not tried:
        return built
    forms = dict.fromkeys((kernel.columns, kernel.dtype, kernel.causal) for kernel in built)
    return [Kernel(*form, config) for form in forms for config in attention_sm90.tried(form[0])]


def assemblers() -> list[str]:
    """The versions that are here, nvcc's own last."""
    return [version for version, (_, path, _) in ASSEMBLERS.items() if path.is_file()] + [NVCC]


def assembler(version: str) -> tuple[str, Path]:
    """The newest PTX that a version of ptxas reads, and where it is. Raises ``ValueError`` where it is not."""
    if version == NVCC:
        return "", Path(_nvcc())
    if version not in ASSEMBLERS:
        raise ValueError(f"no ptxas is called {version!r}; there are {', '.join((*ASSEMBLERS, NVCC))}")
    newest, path, target = ASSEMBLERS[version]
    if not path.is_file():
        raise ValueError(f"ptxas {version} is not here: make {target} brings it")
    return newest, path


def ptx(kernel: Kernel, folder: Path, source: Path = SOURCE) -> Path:
    """The kernel's PTX. Raises ``RuntimeError`` with what nvcc said where it does not compile."""
    columns, element, causal, consumers, keys, share, p_shared, block, across = kernel.key
    macros = {"HEAD": columns, "FP16": element, "CAUSAL": int(causal), "CONSUMERS": consumers, "KEYS": keys}
    macros |= {"SHARE": share, "P_SHARED": int(p_shared), "COLUMNS": block, "ACROSS": across}
    out = folder / f"{kernel.label}.ptx"
    flags = [f"-DQWEN2VL_{key}={value}" for key, value in macros.items()]
    _run(_nvcc(), "-std=c++17", "-O3", "-arch=compute_90a", "-ptx", *flags, "-I", source.parents[1], source, "-o", out)
    return out


def assemble(text: Path, version: str) -> tuple[Path, str]:
    """The cubin that a version of ptxas makes of PTX, beside it, and what it said.

    Raises ``ValueError`` where that version is not here, and ``RuntimeError`` where it refuses.
    """
    cubin = text.with_suffix(f".{version}.cubin")
    newest, path = assembler(version)
    if version == NVCC:
        only = ("-gencode", "arch=compute_90a,code=sm_90a", "-Xptxas", "-v", "-cubin")
        return cubin, _run(_nvcc(), *only, text, "-o", cubin)
    lowered = text.with_suffix(f".{version}.ptx")
    lowered.write_text(lower(text.read_text(), newest))
    return cubin, _run(path, "-v", "-arch=sm_90a", lowered, "-o", cubin)


def lower(text: str, newest: str) -> str:
    """PTX that says to be of version ``newest`` if it says to be of a later one; nothing else changes.

    ptxas refuses a version that it does not know before it reads anything, and what it knows no instruction of later.
    """
    found = re.findall(r"(?m)^\.version (\d+)\.(\d+)$", text)
    if len(found) != 1:
        raise ValueError(f"PTX has one line .version, got {len(found)}")
    (said,) = found
    if tuple(map(int, said)) <= tuple(map(int, newest.split("."))):
        return text
    return re.sub(r"(?m)^\.version \d+\.\d+$", f".version {newest}", text)


def judge(kernel: Kernel, version: str, said: str, listing: str) -> Assembled:
    """The gates, on what ptxas said and on the disassembly of what it made."""
    code = next(found for found in sass.kernels(listing) if any("HGMMA" in one.text for one in found))
    failures = [*complaints(said), *(str(read) for read in sass.early_reads(listing))]
    if local := [one.text for one in code if re.match(r"(LDL|STL)\b", name(one.text))]:
        failures.append(f"{len(local)} instructions on local memory, the first {local[0]}")
    producer, consumer, registers = _registers(code, kernel.config.consumers)
    loops, tile = _bodies(code)
    failures += registers + _loops(kernel, loops) + _outside(kernel, code)
    return Assembled(kernel, version, producer, consumer, loops, tile, tuple(failures))


def complaints(said: str) -> list[str]:
    """What ``ptxas -v`` tells in passing: products that wait for each other, and what does not fit into registers."""
    slow = r"Potential Performance Loss|warpgroup\.wait is injected|\(C75(?:12|14|15)\)"
    found = [line.partition(": ")[2].strip() for line in said.splitlines() if re.search(slow, line)]
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", said)
    if not frames:
        found.append("ptxas does not tell what it spills")
    for frame, stores, loads in frames:
        if any(map(int, (frame, stores, loads))):
            found.append(f"{frame} bytes of local memory, {stores} spilled")
    return found


def _registers(code: list[sass.Instruction], consumers: int) -> tuple[tuple[int, int], tuple[int, int], list[str]]:
    """(used, had) of the producer and of a consumer, which setmaxnreg deals out, and what is wrong with these."""
    found: dict[str, tuple[int, int]] = {}
    for n, one in enumerate(code):
        if (dealt := _DEALT.search(one.text)) is not None:
            touched = (register for m in sass.reached(code, n + 1) for register in code[m].reads | code[m].writes)
            used = 1 + max((number for file, number in touched if file == "GPR"), default=-1)
            found[dealt[1]] = max(found.get(dealt[1], (0, 0)), (used, int(dealt[2], 16)))
    if len(found) != 2:
        return (0, 0), (0, 0), [f"setmaxnreg is there for {len(found)} of producer and consumers"]
    parts = {"producer": found["DEALLOC"], "consumer": found["TRY_ALLOC"]}
    wrong = [f"a {who} uses {used} registers of {had}" for who, (used, had) in parts.items() if used > had]
    dealt_out = parts["producer"][1] + consumers * parts["consumer"][1]
    if dealt_out > _REGISTERS:
        wrong.append(f"{dealt_out} registers are dealt out, a multiprocessor has {_REGISTERS}")
    return parts["producer"], parts["consumer"], wrong


def _bodies(code: list[sass.Instruction]) -> tuple[tuple[Loop, ...], Loop]:
    """The loops over keys, which are the innermost ones of products, and what else the loop over tiles has."""
    every = sass.loops(code)
    steps = [loop for loop in every if any("HGMMA" in code[n].text for n in loop)]
    inner = sorted((loop for loop in steps if not any(other < loop for other in steps)), key=min)
    outer = min((loop for loop in steps if loop not in inner), key=len, default=set())

    def body(loop: set[int]) -> Loop:
        nested = set().union(*(other for other in every if other < loop))
        first = min(loop, default=0)
        last = max((n for n in loop if first in code[n].next), default=0)
        return Loop(tuple(code[n].text for n in sorted(loop - nested) if n <= last))

    return tuple(map(body, inner)), body(outer)


def _loops(kernel: Kernel, loops: Sequence[Loop]) -> list[str]:
    """What is wrong with a step's products and exponentials."""
    config, values = kernel.config, ("p v", kernel.across, not kernel.config.p_shared)
    wanted = {("q k", config.keys, False): depth_of(kernel.columns), values: config.keys // 16}
    if len(loops) != (2 if kernel.causal else 1):
        return [f"{len(loops)} loops over keys"]
    wrong = []
    for n, loop in enumerate(loops):
        masked = kernel.causal and n == 0
        if loop.products != wanted:
            wrong.append(f"products of a step: {_told(loop.products)}; wanted {_told(wanted)}")
        # Groups of 8 keys, whose exponentials two rows of a thread share out: 4 each.
        special = sum(masked or group % 8 >= config.share for group in range(config.keys // 8))
        if (found := loop.count(r"MUFU\.EX2")) != 4 * special + 2:
            wrong.append(f"{found} exponentials a step, wanted {4 * special + 2}")
        names = [name(text) for text in loop.instructions]
        waits = [at for at, text in enumerate(loop.instructions) if "WARPGROUP.DEPBAR" in text]
        if [loop.instructions[at].split()[-1] for at in waits] != ["0x1", "0x0"]:
            wrong.append(f"waits for products: {[loop.instructions[at] for at in waits]}")
            continue
        aside = sum(word == "MUFU.EX2" and not waits[0] < at < waits[1] for at, word in enumerate(names))
        if aside:
            wrong.append(f"{aside} exponentials of a step are not between its two waits, where p v runs beside them")
        late = sum(word.startswith("HGMMA") and at > waits[0] for at, word in enumerate(names))
        if late:
            wrong.append(f"{late} products of a step come after its first wait")
    return wrong


def _outside(kernel: Kernel, code: list[sass.Instruction]) -> list[str]:
    """What is wrong with the products and copies of the whole kernel."""
    wrong = []
    every = [text for one in code if "HGMMA" in (text := one.text)]
    # Every loop, the first q k^T before them and the last p v behind them.
    wanted = (depth_of(kernel.columns) + kernel.config.keys // 16) * (3 if kernel.causal else 2)
    if len(every) != wanted:
        wrong.append(f"{len(every)} products in all, wanted {wanted}")
    element = ".F32.BF16" if kernel.dtype == torch.bfloat16 else ".F32"
    if other := [text for text in every if not name(text).endswith(f"x16{element}")]:
        wrong.append(f"{len(other)} products of other elements: {other[0]}")
    copies = Counter(name(one.text) for one in code if "UTMALDG" in one.text)
    rank = "3D" if kernel.columns % kernel.block else "4D"
    if set(copies) != {f"UTMALDG.{rank}"} or copies.total() < 3:
        wrong.append(f"copies by TMA: {dict(copies)}, wanted q, k and v by UTMALDG.{rank}")
    return wrong


def depth_of(columns: int) -> int:
    """Steps of q k^T, of 16 columns each; behind a head of 72 the last has zeros."""
    return -(-columns // 16)


def _told(products: dict[tuple[str, int, bool], int]) -> str:
    places = {True: "registers", False: "shared memory"}
    parts = (f"{count} of 64x{n}x16 ({what}, from {places[held]})" for (what, n, held), count in products.items())
    return ", ".join(parts) or "none"


def compile_kernel(kernel: Kernel, versions: Sequence[str], keep: Path | None = None) -> list[Assembled]:
    """One kernel by each version of ptxas; nvcc's, if no gate fails, is kept in ``keep`` under the kernel's label."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        text = ptx(kernel, Path(folder))
        for version in versions:
            cubin, said = assemble(text, version)
            found.append(judge(kernel, version, said, disassembled(cubin)))
            if keep is not None and version == NVCC and not found[-1].failures:
                (keep / f"{kernel.label}.cubin").write_bytes(cubin.read_bytes())
    return found


def compile_all(
    wanted: Sequence[Kernel], versions: Sequence[str] | None = None, jobs: int | None = None, keep: Path | None = None
) -> list[Assembled]:
    """Every kernel by every version, by default those that are here, in ``jobs`` processes.

    Raises ``ValueError`` for a version that is not here and ``RuntimeError`` where nvcc or ptxas refuses.
    """
    versions = versions or assemblers()
    for version in versions:
        assembler(version)
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
    work = [(kernel, versions, keep) for kernel in wanted]
    jobs = min(jobs or os.cpu_count() or 1, len(work))
    if jobs == 1:
        return [found for part in work for found in compile_kernel(*part)]
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        return [found for part in pool.starmap(compile_kernel, work, chunksize=1) for found in part]


def show(found: Sequence[Assembled], console: Console) -> None:
    """A table with one row for each kernel and version of ptxas."""
    table = Table(title="Attention for Hopper, ahead of time")
    for heading in ("kernel", "ptxas", "producer", "consumer", "a step", "fails"):
        table.add_column(heading, justify="right" if heading in ("producer", "consumer", "a step") else "left")
    for one in found:
        registers = (f"{used} of {had}" for used, had in (one.producer, one.consumer))
        steps = " + ".join(str(len(loop.instructions)) for loop in one.loops)
        row = (one.kernel.label, one.ptxas, *registers, steps, "; ".join(one.failures))
        table.add_row(*row, style="red" if one.failures else None)
    console.print(table)


@cache
def _nvcc() -> str:
    if (found := wgmma.nvcc()) is None:
        raise RuntimeError("nvcc, CUDA's compiler, is not installed")
    return found


def _run(*command: object) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{Path(str(command[0])).name} fails:\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr
