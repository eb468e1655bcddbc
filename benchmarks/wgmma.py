"""``python -m benchmarks wgmma``: rates of the warpgroup matrix product by width, on a Hopper card.

What attention's tiles are designed by: cycles of one multiprocessor for a product m64 nN k16, with A in shared memory
or in registers; each adding to the one before ("chained"), to another accumulator ("independent"), or waited for before
the next ("awaited"). The least that hardware could do stands beside: 2048 multiply-adds a cycle, and 128 bytes a cycle
from shared memory, which an operand of 64 rows there costs as well.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from .case import Case, Check, Context, Provider, Workload

SOURCE = Path(__file__).resolve().parent / "cuda" / "wgmma_rates.cu"
WIDTHS = (8, 16, 24, 32, 48, 64, 72, 80, 96, 128, 160, 192, 256)
QUICK_WIDTHS = (16, 80, 256)
FORMS = ("independent", "chained", "awaited")
#: The widest with two accumulators that ptxas keeps apart in a thread's registers, as in the source.
_INDEPENDENT = 128
_PRODUCTS = 16  # of an iteration, as in the source
#: ptxas' words for products that it makes wait for each other, or guards (C7510 to C7519), and for lack of registers.
_SERIALISED = re.compile(r"C75\d\d|Potential Performance Loss|instructions are serialized|warpgroup\.(?:wait|arrive)")
_SPILLED = re.compile(r"[1-9]\d* bytes spill (?:stores|loads)")


class BuildError(RuntimeError):
    """nvcc is not there, does not compile the source, or makes of it what is not to be measured."""


def header(widths: Sequence[int] = WIDTHS) -> str:
    """``wgmma_shapes.h``: the two instructions of every width, and their list.

    Raises ``ValueError`` for a width that no such instruction has.
    """
    lines = ["#pragma once", "template <int N> struct Wgmma;"]
    for n in widths:
        if n % 8 or not 8 <= n <= 256:
            raise ValueError(f"widths: {n} is none of wgmma's, which are multiples of 8 from 8 to 256")
        sums = n // 2
        d = ", ".join(f"%{i}" for i in range(sums))
        outputs = ", ".join(f'"+f"(d[{i}])' for i in range(sums))
        a = ", ".join(f"%{sums + i}" for i in range(4))
        inputs = ", ".join(f'"r"(a[{i}])' for i in range(4))
        name = f"wgmma.mma_async.sync.aligned.m64n{n}k16.f32.bf16.bf16"
        # After the operands: add to d, a and b as they are, and neither of those in shared memory transposed.
        lines += [
            f"template <> struct Wgmma<{n}> {{",
            f"  static __device__ void shared(float (&d)[{sums}], uint64_t a, uint64_t b) {{",
            f'    asm volatile("{name} {{{d}}}, %{sums}, %{sums + 1}, 1, 1, 1, 0, 0;"',
            f'                 : {outputs} : "l"(a), "l"(b));',
            "  }",
            f"  static __device__ void registers(float (&d)[{sums}], const uint32_t (&a)[4], uint64_t b) {{",
            f'    asm volatile("{name} {{{d}}}, {{{a}}}, %{sums + 4}, 1, 1, 1, 0;"',
            f'                 : {outputs} : {inputs}, "l"(b));',
            "  }",
            "};",
        ]
    lines.append(f"#define WGMMA_WIDTHS(X) {' '.join(f'X({n})' for n in widths)}")
    return "\n".join(lines) + "\n"


def nvcc() -> str | None:
    """CUDA's compiler: on the path, of ``CUDA_HOME``, or where it is installed by default."""
    places = (os.environ.get("CUDA_HOME"), "/usr/local/cuda")
    return shutil.which("nvcc") or next(
        (found for place in places if place and (found := shutil.which(f"{place}/bin/nvcc"))), None
    )


def why_not(device: torch.device) -> str | None:
    """Why it cannot be measured on ``device``, or ``None``."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return "it takes a GPU of capability 9.0, and PyTorch sees no CUDA device"
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) != (9, 0):
        return f"wgmma is an instruction of capability 9.0, {torch.cuda.get_device_name(device)} has {major}.{minor}"
    return None if nvcc() is not None else "nvcc, CUDA's compiler, is not installed"


def build(folder: Path, widths: Sequence[int] = WIDTHS, target: str = "shared") -> Path:
    """Compile for ``widths`` into ``folder``: a library, or with ``target="cubin"`` the machine code alone.

    What is there and newer than the source is kept.

    Raises :class:`BuildError` where there is no nvcc, it fails, spills, or makes products wait for each other.
    """
    compiler = nvcc()
    if compiler is None:
        raise BuildError("nvcc, CUDA's compiler, is not installed")
    folder.mkdir(parents=True, exist_ok=True)
    shapes, wanted = folder / "wgmma_shapes.h", header(widths)
    built = folder / ("libwgmma_rates.so" if target == "shared" else "wgmma_rates.cubin")
    newest = max(path.stat().st_mtime for path in (SOURCE, Path(__file__)))
    same = shapes.is_file() and shapes.read_text(encoding="utf-8") == wanted
    if same and built.is_file() and built.stat().st_mtime > newest:
        return built
    shapes.write_text(wanted, encoding="utf-8")
    kind = ("--shared", "--compiler-options", "-fPIC") if target == "shared" else ("--cubin",)
    command = [compiler, "-O3", "--std=c++17", "-gencode=arch=compute_90a,code=sm_90a", "-Xptxas", "-v", *kind]
    done = subprocess.run(
        [*command, "-I", str(folder), str(SOURCE), "-o", str(built)], capture_output=True, text=True, check=False
    )
    told = done.stdout + done.stderr
    if done.returncode:
        raise BuildError(f"nvcc does not compile {SOURCE.name}:\n{told}")
    for what, found in (("makes products wait", _SERIALISED), ("spills", _SPILLED)):
        if (line := next((line for line in told.splitlines() if found.search(line)), None)) is not None:
            built.unlink()
            raise BuildError(f"{SOURCE.name}: ptxas {what}: {line.strip()}")
    return built


def least_cycles(width: int, registers: bool) -> float:
    """Cycles of one product on one multiprocessor: those of the tensor cores or of the reads from shared memory."""
    tensor = 64 * width * 16 / 2048
    read = 2 * 16 * (width + (0 if registers else 64)) / 128
    return max(tensor, read)


class _Sample(ctypes.Structure):
    _fields_ = (
        ("seconds", ctypes.c_double),
        ("cycles", ctypes.c_double),
        ("wrong", ctypes.c_int),
        ("multiprocessors", ctypes.c_int),
        ("clock_hz", ctypes.c_double),
    )


class Library:
    """The built library."""

    def __init__(self, path: Path) -> None:
        self._rate = ctypes.CDLL(str(path)).wgmma_rate
        self._rate.restype = ctypes.c_char_p
        self._rate.argtypes = (*[ctypes.c_int] * 7, ctypes.POINTER(_Sample))

    def sample(
        self,
        width: int,
        registers: bool,
        form: str,
        groups: int,
        wide: bool,
        *,
        ones: bool = False,
        cycles: int = 2 << 20,
    ) -> _Sample:
        """One launch of about ``cycles`` on every multiprocessor. Raises ``RuntimeError`` for what CUDA refuses."""
        iterations = max(1, int(cycles / (_PRODUCTS * groups * max(least_cycles(width, registers), 16))))
        taken = _Sample()
        words = (width, registers, FORMS.index(form), groups, iterations, ones, wide)
        error = self._rate(*map(int, words), ctypes.byref(taken))
        if error is not None:
            raise RuntimeError(f"m64n{width}k16, {form}: {error.decode()}")
        products = _PRODUCTS * groups * iterations
        taken.cycles /= products
        taken.seconds /= products
        return taken

    def rate(self, width: int, registers: bool, form: str, groups: int, wide: bool) -> dict[str, float]:
        """What a provider returns: cycles of a product, the whole card's rate, and elements that ones make wrong."""
        taken = self.sample(width, registers, form, groups, wide)
        flops = 2 * 64 * width * 16 * taken.multiprocessors
        wrong = self.sample(width, registers, form, groups, wide, ones=True, cycles=1 << 14).wrong
        return {"cycles": taken.cycles, "rate": flops / taken.seconds / 1e12, "wrong": wrong}

    def least(self, width: int, registers: bool) -> dict[str, float]:
        """The same of hardware that loses nothing, at the card's highest clock."""
        known = self.sample(width, registers, "chained", 1, False, cycles=1 << 10)
        cycles = least_cycles(width, registers)
        rate = 2 * 64 * width * 16 * known.multiprocessors * known.clock_hz / cycles / 1e12
        return {"cycles": cycles, "rate": rate, "wrong": 0.0}


#: Name of a provider: whether A is in registers, warpgroups, rows of 128 bytes instead of blocks of 32.
_PLACES: dict[str, tuple[bool, int, bool]] = {
    "A shared, 1 warpgroup": (False, 1, False),
    "A shared, 2 warpgroups": (False, 2, False),
    "A shared, 2 warpgroups, 128-byte swizzle": (False, 2, True),
    "A registers, 1 warpgroup": (True, 1, False),
    "A registers, 2 warpgroups": (True, 2, False),
    "A registers, 2 warpgroups, 128-byte swizzle": (True, 2, True),
}


def case(library: Library, widths: Sequence[int] = WIDTHS) -> Case:
    """A workload for every width and form; its gate: products of ones are right in every element."""

    def workloads(context: Context) -> Iterator[Workload]:
        for width in widths:
            for form in FORMS:
                if form == "independent" and width > _INDEPENDENT:
                    continue
                measured = [
                    Provider(name, partial(library.rate, width, registers, form, groups, wide))
                    for name, (registers, groups, wide) in _PLACES.items()
                ]
                least = [
                    Provider(f"least, A {place}", partial(library.least, width, place == "registers"), peer=True)
                    for place in ("shared", "registers")
                ]
                yield Workload(
                    f"m64n{width}k16, {form}", [*measured, *least], gate=_gate, dtype=torch.bfloat16,
                    units={"cycles": "cycles", "rate": "TFLOP/s"}, series=form, size=width, max_rounds=5,
                )  # fmt: skip

    return Case("wgmma", "Warpgroup matrix products by width: cycles of one, rate of the card", workloads)


def _gate(outputs: Mapping[str, Any]) -> list[Check]:
    return [
        Check(f"{name}: elements that ones make wrong", output["wrong"], 0, name) for name, output in outputs.items()
    ]


def table(result: Mapping[str, Any]) -> Table:
    """Cycles of a product, two warpgroups, by width: least, then by form and where A is; the best rate behind it."""
    shown = Table("N", title=f"Cycles of one wgmma m64nNk16 on one multiprocessor, {result['device']}")
    columns: list[tuple[str, Callable[[str], bool]]] = []
    for place in ("shared", "registers"):
        columns.append((f"{place}: least", lambda name, p=place: name == f"least, A {p}"))
        columns += [(f"{place}, {form}", lambda name, p=place: name == f"A {p}, 2 warpgroups") for form in FORMS]
    for heading, _ in columns:
        shown.add_column(heading, justify="right")
    shown.add_column("most TFLOP/s", justify="right")
    by_width: dict[int, list[dict[str, Any]]] = {}
    for row in result["rows"]:
        by_width.setdefault(row["size"], []).append(row)
    for width, rows in by_width.items():
        cells = []
        for heading, wanted in columns:
            form = heading.rpartition(", ")[2]
            found = [r["median"] for r in rows if r["metric"] == "cycles" and wanted(r["provider"])
                     and (form not in FORMS or r["series"] == form)]  # fmt: skip
            cells.append(f"{found[0]:.1f}" if found else "")
        rates = [r["median"] for r in rows if r["metric"] == "rate" and not r["peer"]]
        shown.add_row(str(width), *cells, f"{max(rates):.0f}")
    return shown
