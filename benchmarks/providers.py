"""Peers: which are importable here, in which version, and why the others are skipped."""

from __future__ import annotations

import importlib
from importlib import metadata

#: module -> (distribution, first version that the cases are written for). Older ones have other interfaces.
PEERS: dict[str, tuple[str, tuple[int, int]]] = {
    "transformers": ("transformers", (5, 23)),
    "torch": ("torch", (2, 10)),
    "vllm": ("vllm", (0, 10)),
    "flash_attn": ("flash-attn", (2, 7)),
    "flash_attn_interface": ("flash_attn_3", (3, 0)),
    "fa3_fwd_interface": ("fa3-fwd", (0, 0)),
    "flash_attn.cute": ("flash-attn-4", (4, 0)),
    "quack": ("quack-kernels", (0, 6)),
    "liger_kernel": ("liger-kernel", (0, 6)),
    "torchvision": ("torchvision", (0, 19)),
    "PIL": ("pillow", (10, 1)),
    "triton": ("triton", (3, 4)),
    "qwen_vl_utils": ("qwen-vl-utils", (0, 0)),
}


def why_not(module: str) -> str | None:
    """Why the peer in ``module`` cannot take part, or ``None`` when it can (it is imported then)."""
    distribution, first = PEERS[module]
    have = version(distribution)
    if have is None:
        return f"{distribution} is not installed"
    if release(have) < first:
        return f"{distribution} {have} is installed, {'.'.join(map(str, first))} or later is wanted"
    try:
        importlib.import_module(module)
    except Exception as error:  # built for another torch or CUDA, say: what that raises is anybody's guess
        return f"{distribution} {have} does not import: {error}"
    return None


def version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str]:
    """Installed versions of torch, ours and all peers."""
    names = ("torch", "qwen2vl", "safetensors", *(distribution for distribution, _ in PEERS.values()))
    found = {name: version(name) for name in names}
    return {name: have for name, have in found.items() if have is not None}


def release(version: str) -> tuple[int, int]:
    """The first two numbers of a version."""
    numbers = [int(part) for part in version.split("+")[0].split(".")[:2] if part.isdigit()]
    major, minor = [*numbers, 0, 0][:2]
    return major, minor
