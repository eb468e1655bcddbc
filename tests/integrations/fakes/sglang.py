"""What the adapter touches of SGLang 0.5.23, with its names and parameters and formulas of our own."""

from __future__ import annotations

import functools
import pkgutil
import sys
from enum import Enum
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from .modules import install


def install_sglang(monkeypatch: pytest.MonkeyPatch, version: str = "0.5.23") -> SimpleNamespace:
    """Put the fake into ``sys.modules``; returns its modules and what decides about a backend.

    ``default`` is what ``_determine_attention_backend`` finds for the machine, ``mm`` the server's arguments.
    """
    mm = SimpleNamespace(mm_attention_backend=None)
    here = SimpleNamespace(mm=mm, default="triton_attn", eager_rope=False)
    layers = _layers()
    vision = {"SingletonCache": SingletonCache, **_attention(here), **layers["layers.rotary_embedding"]}
    context = {"get_mm": lambda: here.mm}
    modules = {"plugins.hook_registry": _hooks(), "runtime_context": context, "layers.attention.vision": vision}
    found = {f"sglang.srt.{name}": attributes for name, attributes in (layers | modules).items()}
    install(monkeypatch, {"sglang": {"__version__": version}, **found})
    here.modules = {name: sys.modules[name] for name in found}
    here.vision, here.rotary = (
        sys.modules[f"sglang.srt.layers.{n}"] for n in ("attention.vision", "rotary_embedding.utils")
    )
    here.package = sys.modules["sglang.srt.layers.rotary_embedding"]
    here.QuickGELU, here.VisionAttention = layers["layers.activation"]["QuickGELU"], vision["VisionAttention"]
    here.HookRegistry, here.HookType = modules["plugins.hook_registry"].values()
    return here


class SingletonCache:
    """What a tower passes instead of boundaries that its first layer is to make."""

    def __init__(self, data: torch.Tensor | None = None) -> None:
        self.data = data


def _hooks() -> dict[str, Any]:
    class HookType(Enum):
        BEFORE = "before"
        AFTER = "after"
        AROUND = "around"
        REPLACE = "replace"

    def wrap(inner: Any, hook: Any, kind: HookType) -> Any:
        @functools.wraps(inner)
        def hooked(*args, **kwargs):
            if kind is HookType.REPLACE:
                return hook(*args, **kwargs)
            if kind is HookType.AROUND:
                return hook(inner, *args, **kwargs)
            result = inner(*args, **kwargs)
            changed = hook(result, *args, **kwargs)
            return result if changed is None else changed

        return hooked

    class HookRegistry:
        _hooks: dict[str, list[tuple]] = {}  # noqa: RUF012
        _patched: set[str] = set()  # noqa: RUF012

        @classmethod
        def register(cls, target, hook, hook_type=HookType.AFTER, *, source=None):
            cls._hooks.setdefault(target, []).append((hook_type, hook, source))

        @classmethod
        def apply_hooks(cls):
            """Set each target once; one that fails is only logged, as SGLang does."""
            for target, hooks in cls._hooks.items():
                if target in cls._patched:
                    continue
                path, _, name = target.rpartition(".")
                try:
                    owner = pkgutil.resolve_name(path)
                    stock = wrapped = getattr(owner, name)
                except AttributeError:
                    continue
                for kind, hook, _ in sorted(hooks, key=lambda entry: entry[0] is not HookType.REPLACE):
                    wrapped = wrap(wrapped, hook, kind)
                setattr(owner, name, wrapped)
                cls._patched.add(target)
                others = [m for m in list(sys.modules.values()) if isinstance(m, ModuleType) and m is not owner]
                for holder in others if wrapped is not stock else ():
                    for key in [key for key, value in vars(holder).items() if value is stock]:
                        setattr(holder, key, wrapped)

    return {"HookRegistry": HookRegistry, "HookType": HookType}


def _layers() -> dict[str, dict[str, Any]]:
    def apply_rotary_pos_emb_native_eager(q, k, cos, sin, unsqueeze_dim=1):
        cos, sin = (t.unsqueeze(unsqueeze_dim).float() for t in (cos, sin))

        def turn(x):
            a, b = x.float().chunk(2, -1)
            return (x.float() * cos + torch.cat((-b, a), -1) * sin).to(x.dtype)

        return turn(q), turn(k)

    def apply_rotary_pos_emb_native(q, k, cos, sin, unsqueeze_dim=1):
        return apply_rotary_pos_emb_native_eager(q, k, cos, sin, unsqueeze_dim)

    class QuickGELU(nn.Module):
        def __init__(self):
            super().__init__()
            self._forward_method = self.forward_native  # bound when a model is built; forward_cuda on a GPU

        def forward(self, x):
            return self._forward_method(x)

        def forward_native(self, x):
            return x * torch.sigmoid(1.702 * x)

        def forward_cuda(self, x):
            return self.forward_native(x)

    eager, native = apply_rotary_pos_emb_native_eager, apply_rotary_pos_emb_native
    imported = {"apply_rotary_pos_emb": native, "apply_rotary_pos_emb_native_eager": eager}
    return {
        "layers.rotary_embedding.utils": {**imported, "apply_rotary_pos_emb_native": native},
        "layers.rotary_embedding": imported,  # which imports them by name, and from it the vision module
        "layers.activation": {"QuickGELU": QuickGELU},
    }


def _attention(here: SimpleNamespace) -> dict[str, Any]:
    def resolve_seqlens(cu_seqlens, bsz, seq_len, *, device):
        if isinstance(cu_seqlens, SingletonCache):
            cu_seqlens = cu_seqlens.data
        if cu_seqlens is None:
            return torch.arange(0, (bsz + 1) * seq_len, seq_len, dtype=torch.int32, device=device)
        return cu_seqlens

    class VisionTritonAttention(nn.Module):
        def __init__(self, **kwargs):
            super().__init__()

        def forward(
            self, q, k, v, cu_seqlens, bsz, seq_len, softmax_scale=None, forward_metadata=None, **kwargs
        ):  # fmt: skip
            if forward_metadata is not None:
                bounds = forward_metadata.cu_seqlens
            else:
                bounds = resolve_seqlens(cu_seqlens, bsz, seq_len, device=q.device)
            out = torch.zeros_like(q)
            for a, b in zip(bounds.tolist(), bounds.tolist()[1:], strict=False):
                parts = (x[a:b].transpose(0, 1)[None] for x in (q, k, v))
                out[a:b] = F.scaled_dot_product_attention(*parts, scale=softmax_scale)[0].transpose(0, 1)
            return out

    class Linear(nn.Linear):
        def forward(self, x):
            return super().forward(x), None

    class VisionAttention(nn.Module):
        def __init__(self, embed_dim, num_heads, qkv_backend=None):
            super().__init__()
            vision = here.vision
            self.heads, self.head_size = num_heads, embed_dim // num_heads
            self.qkv_backend_name = self._determine_attention_backend(qkv_backend)
            self.qkv_backend = vision.QKV_BACKEND_IMPL[self.qkv_backend_name](
                head_dim=self.head_size, num_heads=num_heads
            )
            self.pass_strided_qkv = self.qkv_backend_name in vision.STRIDED_QKV_BACKENDS
            self.qkv_proj, self.proj = Linear(embed_dim, 3 * embed_dim), Linear(embed_dim, embed_dim)

        def _determine_attention_backend(self, passed_backend):
            return here.mm.mm_attention_backend or passed_backend or here.default

        def forward(self, x, cu_seqlens=None, position_embeddings=None, forward_metadata=None, **kwargs):
            bsz, rows, _ = x.shape
            parts = (part.reshape(bsz * rows, self.heads, -1) for part in self.qkv_proj(x)[0].chunk(3, -1))
            q, k, v = parts if self.pass_strided_qkv else (part.contiguous() for part in parts)
            name = "apply_rotary_pos_emb" + ("_native_eager" if here.eager_rope else "")
            rotary = getattr(here.vision, name)  # looked up among the globals of its module
            q, k = rotary(q, k, *position_embeddings)
            out = self.qkv_backend.forward(
                q=q, k=k, v=v, bsz=bsz, seq_len=rows, cu_seqlens=cu_seqlens, softmax_scale=None,
                forward_metadata=forward_metadata, window_size=(-1, -1), s_aux=None, **kwargs,
            )  # fmt: skip
            return self.proj(out.reshape(bsz, rows, -1))[0]

    return {
        "QKV_BACKEND_IMPL": dict.fromkeys(("triton_attn", "fa3", "sdpa"), VisionTritonAttention),
        "STRIDED_QKV_BACKENDS": frozenset({"triton_attn", "fa3"}),
        "resolve_seqlens": resolve_seqlens,
        "VisionTritonAttention": VisionTritonAttention,
        "VisionAttention": VisionAttention,
    }
