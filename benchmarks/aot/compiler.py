"""Compile recorded launches for GPUs that are not here, and read the machine code.

The launchers of the ops run on "meta" tensors of the released models' shapes; ``qwen2vl_kernels.core.launching.record``
collects what they would launch, with the strides, alignments and configurations of such a call. Each launch is
specialised as Triton's JIT does (divisibility by 16, the value 1) and compiled for every target.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from qwen2vl_kernels.core import launching
from qwen2vl_kernels.core.launching import Launch, Target, record

from . import sass

#: name -> what configurations are chosen for, architecture as Triton's compiler takes it, threads of a warp, bytes of
#: shared memory that one program may have.
TARGETS: dict[str, tuple[Target, Any, int, int]] = {
    "sm_80": (Target("cuda", 80), 80, 32, 163 << 10),
    "sm_90": (Target("cuda", 90), 90, 32, 227 << 10),
    "sm_100": (Target("cuda", 100), 100, 32, 227 << 10),
    "sm_120": (Target("cuda", 120), 120, 32, 99 << 10),
    "gfx942": (Target("hip", 0), "gfx942", 64, 64 << 10),
}

#: Where other versions of Triton are installed, each in a folder of its name (``make`` does it).
TRITONS = Path(__file__).resolve().parents[2] / "build" / "triton"

#: The version whose spills are gated on every target. On sm_90 every version's are.
NEWEST = "3.9."

_POINTERS = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.uint8: "u8",
    torch.bool: "i1",
    torch.int32: "i32",
    torch.int64: "i64",
}


@dataclass(frozen=True)
class Specimen:
    """A call of an op's launcher, and what its machine code must show beside no spills.

    Attributes:
        name: what the table shows.
        run: calls the launcher on tensors of the "meta" device.
        wide: least share, by bytes, of instructions on global memory that move 16 bytes a thread; 0 where the layout
            forbids them.
        matrix: whether every kernel of it must use the matrix units.
        further: whether it is a further form of kernels that other specimens of its group show. The test suite compiles
            these for sm_90 only, with the compiler that most people have.
    """

    name: str
    run: Callable[[], object]
    wide: float = 0.0
    matrix: bool = False
    further: bool = False


@dataclass(frozen=True)
class Report:
    """What one kernel became on one target. Memory in bytes."""

    specimen: str
    kernel: str
    target: str
    triton: str  # version of the compiler
    registers: int
    spilled: int
    shared: int
    wide: float | None  # share of the bytes that 16-byte instructions move, each counted once; None: no such access
    matrix: int  # instructions on the matrix units
    products: int  # multiply-adds of these in the program's text, all warps together; 0 where SASS does not tell
    failures: tuple[str, ...]


@dataclass(frozen=True)
class _Code:
    """What was read from the machine code of one kernel: all that the gates look at."""

    registers: int
    spilled: int
    shared: int
    widths: dict[int, int]  # bytes a thread moves to or from global memory -> instructions
    matrix: int
    products: int
    early: tuple[str, ...]  # reads of registers that nothing has written


def meta(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """A tensor that has everything but memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


def label(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def compile_for(specimen: Specimen, target: str) -> Iterator[Report]:
    """Compile what ``specimen`` launches for ``target``, one report a kernel that differs from those before."""
    if (missing := launching.reason("cuda")) is not None:
        raise RuntimeError(missing)
    if launching.INTERPRETED:
        raise RuntimeError("kernels are interpreted in this process; unset TRITON_INTERPRET to compile them")
    chosen, arch, warp, shared_limit = TARGETS[target]
    with record(chosen) as launches, torch.no_grad():
        specimen.run()
    if not launches:
        raise ValueError(f"{specimen.name}: nothing was launched")
    seen = set()
    for launch in launches:
        source, key = _source(launch)
        if key in seen:
            continue
        seen.add(key)
        yield _judge(specimen, launch, target, _code(source, key, launch, chosen.backend, arch, warp), shared_limit)


def _source(launch: Launch) -> tuple[Any, object]:
    """The kernel specialised to the launch's arguments, and what identifies the result."""
    from triton.compiler import ASTSource

    signature: dict[str, str] = {}
    constexprs: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list] = {}
    for place, parameter in enumerate(launch.kernel.params):
        name = parameter.name
        value = launch.arguments[name]
        kind = "constexpr" if parameter.is_constexpr or value is None else _kind(value)
        special = not parameter.do_not_specialize
        if isinstance(value, int) and not isinstance(value, bool) and special and value == 1:
            kind = "constexpr"
        signature[name] = kind
        if kind == "constexpr":
            constexprs[(place,)] = value
        elif isinstance(value, torch.Tensor) or (isinstance(value, int) and special and value % 16 == 0):
            attributes[(place,)] = [["tt.divisibility", 16]]
    if leftover := launch.arguments.keys() - signature.keys():
        raise ValueError(f"{launch.kernel.__name__} has no arguments {sorted(leftover)}")
    key = (launch.kernel.__name__, str(signature), str(constexprs), str(attributes), str(launch.options))
    return ASTSource(fn=launch.kernel, signature=signature, constexprs=constexprs, attrs=attributes), key


def _kind(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return f"*{_POINTERS[value.dtype]}"
    if isinstance(value, bool):
        return "u1"
    if isinstance(value, int):
        return "i32" if -(1 << 31) <= value < 1 << 31 else "i64"
    if isinstance(value, float):
        return "fp32"
    raise TypeError(f"no kernel takes {type(value).__name__}")


def _code(source: Any, key: object, launch: Launch, backend: str, arch: Any, warp: int) -> _Code:
    """The kernel's code, from the cache of what neither the kernel nor compiler nor reader has changed."""
    import triton
    from triton import knobs

    known = (triton.__version__, _readers(), source.hash(), key, backend, arch, os.environ.get("TRITON_PTXAS_PATH"))
    folder = Path(knobs.cache.dir) / "qwen2vl-aot"
    path = folder / f"{hashlib.sha256(str(known).encode()).hexdigest()}.json"
    if path.is_file():
        found = json.loads(path.read_text())
        widths = {int(width): count for width, count in found["widths"].items()}
        return _Code(**{**found, "widths": widths, "early": tuple(found["early"])})
    compiled = _compile(source, launch, backend, arch, warp)
    code = (_read_gcn if "amdgcn" in compiled.asm else _read_sass)(compiled, launch.options["num_warps"])
    folder.mkdir(parents=True, exist_ok=True)
    written = path.with_suffix(f".{os.getpid()}")
    written.write_text(json.dumps(asdict(code)))
    written.replace(path)
    return code


@cache
def _readers() -> str:
    """What the readers of machine code are: another text of them may read something else."""
    return hashlib.sha256(b"".join(Path(module).read_bytes() for module in (__file__, sass.__file__))).hexdigest()


def _compile(source: Any, launch: Launch, backend: str, arch: Any, warp: int) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget

    return triton.compile(source, target=GPUTarget(backend, arch, warp), options=dict(launch.options))


def _judge(specimen: Specimen, launch: Launch, target: str, code: _Code, shared_limit: int) -> Report:
    import triton

    moved = sum(width * count for width, count in code.widths.items())
    wide = sum(width * count for width, count in code.widths.items() if width >= 16) / moved if moved else None
    failures = list(code.early)
    if code.spilled and (target == "sm_90" or triton.__version__.startswith(NEWEST)):
        failures.append(f"{code.spilled} bytes spilled")
    if code.shared > shared_limit:
        failures.append(f"{code.shared} bytes of shared memory, {shared_limit} at most")
    if wide is not None and wide < specimen.wide:
        failures.append(f"{wide:.0%} of the bytes in 16-byte accesses, {specimen.wide:.0%} wanted: {code.widths}")
    if specimen.matrix and not code.matrix:
        failures.append("no instruction on the matrix units")
    return Report(
        specimen.name,
        launch.kernel.__name__.strip("_"),
        target,
        triton.__version__,
        code.registers,
        code.spilled,
        code.shared,
        wide,
        code.matrix,
        code.products,
        tuple(failures),
    )


def _read_sass(compiled: Any, warps: int) -> _Code:
    """``warps``: of a program."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(compiled.asm["cubin"])
        usage = _output(tools / "cuobjdump", "--dump-resource-usage", path)
        listing = disassembled(path)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump does not tell the registers: {usage}")
    registers, stack, local = map(int, found.groups())
    text = re.sub(r"// [|+].*", "", listing)
    widths: Counter[int] = Counter()
    for modifiers in re.findall(r"\b(?:LDGSTS|LDG|STG)\b((?:\.\w+)*)", text):
        bits = re.search(r"\.(?:U8|S8|8)\b|\.(?:U16|S16|16)\b|\.(64|128|256)\b", modifiers)
        widths[4 if bits is None else int(bits[1]) // 8 if bits[1] else 1 if "8" in bits[0] else 2] += 1
    matrix = len(re.findall(r"\b(?:HMMA|IMMA|HGMMA|QGMMA|IGMMA|UTCHMMA|UTCQMMA|OMMA|QMMA|DMMA)\b", text))
    small = {"16816": 16 * 8 * 16, "1688": 16 * 8 * 8}  # of a warp
    products = sum(small[shape] * warps for shape in re.findall(r"\bHMMA\.(16816|1688)\b", text))
    for m, n, k in re.findall(r"\bHGMMA\.(\d+)x(\d+)x(\d+)\b", text):  # of four warps
        products += int(m) * int(n) * int(k) * warps // 4
    early = tuple(str(read) for read in sass.early_reads(listing))
    return _Code(registers, stack + local, compiled.metadata.shared, dict(widths), matrix, products, early)


def disassembled(cubin: Path) -> str:
    """The machine code with what each instruction reads and writes.

    A disassembler follows no code in the format that older or newer ones write: that of ptxas 12, which Triton 3.9
    still takes for capability 8, needs the one of Triton 3.6.
    """
    import triton

    # 12.8's takes 255 registers for more than there are. The number is told beside the code and changes nothing in it.
    most = re.compile(rb"(\x04\x2f\x08\x00.{4})\xff(?=\x00{3})", re.DOTALL)
    lowered = cubin.with_suffix(".254.cubin")
    lowered.write_bytes(most.sub(lambda found: found[1] + b"\xfe", cubin.read_bytes()))
    problems = []
    for package in (Path(triton.__file__).parent, *sorted(TRITONS.glob("*/triton"))):
        tool = package / "backends" / "nvidia" / "bin" / "nvdisasm"
        for path in (cubin, lowered):
            command = [str(part) for part in (tool, "-c", "-plr", "-lrm", "narrow", path)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode == 0:
                return done.stdout
            problems.append(f"{tool.parent}: {done.stderr.strip()}")
            if "register count" not in done.stderr:
                break
    raise RuntimeError(
        "no nvdisasm here tells what the instructions read and write; make build/triton/3.6.0 brings one that may:\n"
        + "\n".join(problems)
    )


def _read_gcn(compiled: Any, warps: int) -> _Code:
    text = compiled.asm["amdgcn"]

    def number(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", text)
        return int(found[1]) if found else 0

    widths: Counter[int] = Counter()
    sizes = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4, "ushort": 2, "short": 2, "ubyte": 1, "byte": 1}
    for kind in re.findall(r"\b(?:global|buffer)_(?:load|store)_(dwordx[234]|dword|ushort|short|ubyte|byte)", text):
        widths[sizes[kind]] += 1
    spilled = 4 * number("vgpr_spill_count") + number("private_segment_fixed_size")
    matrix = len(re.findall(r"\bv_mfma_", text))
    return _Code(number("vgpr_count"), spilled, compiled.metadata.shared, dict(widths), matrix, 0, ())


def _output(*command: object) -> str:
    return subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True).stdout
