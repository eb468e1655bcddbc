"""``python -m tests.kernels.one_of_each``: every kernel once on a small ragged shape, for compute-sanitizer."""

from __future__ import annotations

import torch

import qwen2vl_kernels as K
from qwen2vl_kernels.core.backends import PREFERENCE, unavailable
from qwen2vl_kernels.triton import tail


def main(device: str = "cuda") -> list[str]:
    """Runs what can run on ``device`` and returns the ops' names."""

    def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.randn(shape, device=device).to(dtype).requires_grad_()

    def backward(*outputs: torch.Tensor) -> None:
        torch.autograd.backward(outputs, [torch.ones_like(o) for o in outputs])

    x, weight, bias = random(37, 1280), random(1280), random(1280)
    q, k, v = random(37, 3, 128), random(37, 2, 128), random(37, 2, 128)
    positions = torch.arange(37, device=device).expand(3, -1)
    inv_freq, section = torch.rand(64, device=device), (16, 24, 24)
    grid = torch.tensor([[1, 4, 6], [3, 2, 2]], device=device)
    ids = torch.tensor([[5, *[7] * 6, 5, *[8] * 3, 5]], device=device)
    tokens = {"image_token_id": 7, "video_token_id": 8}
    merger = [random(*s) for s in ((1280,), (1280,), (128, 5120), (128,), (72, 128), (72,))]
    pixels = torch.randint(0, 256, (37, 588), dtype=torch.uint8, device=device)
    photo = torch.randint(0, 256, (61, 83, 3), dtype=torch.uint8, device=device)

    def mrope(backend: str) -> None:
        backward(*K.mrope(q, k, positions, inv_freq, section, backend=backend))
        K.mrope_(q.detach().clone(), k.detach().clone(), positions, inv_freq, section, backend=backend)

    def vision_rope(backend: str) -> None:
        cos, sin = K.vision_rope_tables(positions[:2].T, inv_freq[:20], backend=backend)
        backward(*K.vision_rope(random(37, 2, 80), random(37, 2, 80), cos, sin, backend=backend))
        K.vision_rope_qkv_(random(37, 3, 2, 80).detach(), cos, sin, backend=backend)

    def append_kv(backend: str) -> None:
        caches = [torch.zeros(3, 16, 2, 128, dtype=torch.bfloat16, device=device) for _ in range(2)]
        slots = torch.arange(37, device=device) + 11
        given = {"q": q.detach().clone(), "positions": positions, "inv_freq": inv_freq, "section": section}
        K.append_kv(k.detach(), v.detach(), *caches, slots, **given, backend=backend)
        K.append_kv(k.detach(), v.detach(), *caches, slots - 40, backend=backend)

    def decode(backend: str) -> None:
        lengths = torch.tensor([37, 0, 99], dtype=torch.int32, device=device)
        for heads, columns in ((6, 128), (2, 80)):
            caches = [random(3, 90, 2, columns).detach() for _ in range(2)]
            q, table = random(3, heads, columns).detach(), torch.arange(6, dtype=torch.int32, device=device).view(3, 2)
            K.kvcache_attention(q, *caches, None, lengths, backend=backend)
            pages = (cache.view(6, 45, 2, columns) for cache in caches)
            K.kvcache_attention(q, *pages, None, lengths, block_table=table, backend=backend)

    def step_attention(backend: str) -> None:
        lengths, given = torch.tensor([37, 0, 90], dtype=torch.int32, device=device), (random(3, 10, 128).detach(),)
        q, k, v = given[0].split([6, 2, 2], 1)
        caches, counts = [random(3, 90, 2, 128).detach() for _ in range(2)], torch.zeros(3, 2, device=device).int()
        for prefetch in (False, True):
            given = (lengths, positions[0, :3], inv_freq, counts)
            K.decode_attention_(q, k, v, *caches, *given, prefetch=prefetch, backend=backend)

    def few_rows(backend: str) -> None:
        rows, wide = random(5, 1280).detach(), [random(n, 1280).detach() for n in (1280, 37)]
        for prefetch in (False, True):
            given = {"prefetch": prefetch, "backend": backend}
            K.rms_norm_linear(rows, weight.detach(), wide, [bias.detach(), None], **given)
            K.rms_norm_swiglu(rows, weight.detach(), wide[1], wide[1], **given)
            K.linear_add_(rows, rows.clone(), wide[0], **given)

    def choice(backend: str) -> None:
        seen, banned = torch.zeros(2, 1100, dtype=torch.bool, device=device), torch.tensor([7, 8], device=device)
        numbers = torch.rand(2, dtype=torch.float64, device=device)
        for given in ({}, {"top_k": 20, "top_p": 0.9}, {"top_p": 0.9}):
            logits = random(2, 1100).detach()
            K.sample_tokens_(logits, numbers, seen, banned, repetition_penalty=1.1, **given, backend=backend)
        K.sample_tokens_(logits, backend=backend)

    def norms(backend: str) -> None:
        backward(K.rms_norm(x, weight, backend=backend), *K.add_rms_norm(x, x, weight, backend=backend))

    def layer_norms(backend: str) -> None:
        backward(K.layer_norm(x, weight, bias, backend=backend), *K.add_layer_norm(x, x, weight, bias, backend=backend))

    def activations(backend: str) -> None:
        backward(K.quick_gelu(x, bias, backend=backend))
        K.quick_gelu_(x.detach().clone(), backend=backend)

    def swiglu(backend: str) -> None:
        backward(K.swiglu(x, random(37, 1280), backend=backend), K.swiglu(x, backend=backend))
        K.swiglu_(x.detach().clone(), x.detach(), backend=backend)

    def patch_embed(backend: str) -> None:
        backward(K.patch_embed(pixels, random(72, 588), random(72), backend=backend))
        backward(K.patch_embed(random(37, 588), random(72, 588), backend=backend))

    def patch_merge(backend: str) -> None:
        backward(K.patch_merge(x[:36], *merger, order="raster", grid_thw=grid, backend=backend))

    def attention(backend: str) -> None:
        cu_seqlens = torch.tensor([0, 20, 20, 35], dtype=torch.int32)
        for causal, heads in ((False, 2), (True, 1)):
            q, k, v = random(37, 2, 80), random(37, heads, 80), random(37, heads, 80)
            angles = torch.rand(37, 40, device=device)
            for rope in (None, (angles.cos(), angles.sin())):
                backward(K.varlen_attention(q, k, v, cu_seqlens, 20, causal=causal, rope=rope, backend=backend))
            of_keys = torch.tensor([0, 9, 12, 37], dtype=torch.int32)
            own = {"cu_seqlens_q": cu_seqlens, "max_seqlen_q": 20, "cu_seqlens_k": of_keys, "max_seqlen_k": 25}
            backward(K.varlen_attention(q, k, v, **own, causal=causal, backend=backend))
        plan = K.plan_tiles(cu_seqlens, 37, device=device, padded=True)
        tail.zero_behind(random(37, 2, 80).detach(), plan.queries)  # after others' attention

    def linear_cross_entropy(backend: str) -> None:
        target = torch.arange(37, device=device) - 5
        target[target < 0] = -100
        for reduction, smoothing in (("mean", 0.0), ("none", 0.1)):
            given = {"reduction": reduction, "label_smoothing": smoothing, "chunk_rows": 16, "backend": backend}
            backward(K.linear_cross_entropy(x, random(9001, 1280), target, random(9001), **given))

    def experts(backend: str) -> None:
        order, _, bounds = K.group_by_expert(positions.T.remainder(5), 6, backend=backend)
        backward(K.grouped_linear(x[order // 3], random(6, 72, 1280), bounds, backend=backend))

    def quant_linear(backend: str) -> None:
        fp8 = random(40, 256).detach().to(torch.float8_e4m3fn)
        integers = torch.randint(0, 256, (40, 256), device=device).byte()
        for weight, block in ((fp8, (16, 128)), (integers, (1, 128)), (integers[:, :128], (1, 128))):
            scales = torch.rand(-(-40 // block[0]), 2, device=device)
            for rows in (1, 5, 37):
                backward(K.quant_linear(x[:rows, :256], weight, scales, block=block, backend=backend))

    def quantised_experts(backend: str) -> None:
        order, _, bounds = K.group_by_expert(positions.T.remainder(5), 6, backend=backend)
        fp8 = random(6, 40, 256).detach().to(torch.float8_e4m3fn)
        integers = torch.randint(0, 256, (6, 40, 256), device=device).byte()
        some = x.detach()[order // 3, :256].bfloat16().requires_grad_()
        for weight, block in ((fp8, (16, 128)), (integers, (1, 128)), (integers[..., :128], (1, 128))):
            scales = torch.rand(6, -(-40 // block[0]), 2, device=device)
            given = {"block": block, "backend": backend}
            backward(K.grouped_quant_linear(some, weight, scales, bounds, **given))  # in small tiles
            one = torch.tensor([0, len(some)], dtype=torch.int32, device=device)
            columns = torch.randperm(256, device=device)[None]
            backward(K.grouped_quant_linear(some, weight[:1], scales[:1], one, **given, order=columns))

    def positions_of(backend: str) -> None:
        K.mrope_positions(ids, grid[:1], grid[1:], **tokens, backend=backend)
        K.mrope_positions_chunk(ids[:, :4], grid[:1], None, **tokens, backend=backend)

    runs = {
        "mrope": mrope,
        "vision_rope": vision_rope,
        "append_kv": append_kv,
        "varlen_attention": attention,
        "kvcache_attention_decode": decode,
        "decode_attention": step_attention,
        "rms_norm_linear": few_rows,
        "rms_norm_swiglu": few_rows,
        "linear_add": few_rows,
        "sample_tokens": choice,
        "rms_norm": norms,
        "layer_norm": layer_norms,
        "quick_gelu": activations,
        "swiglu": swiglu,
        "patch_embed": patch_embed,
        "patch_merge": patch_merge,
        "linear_cross_entropy": linear_cross_entropy,
        "group_by_expert": experts,
        "grouped_linear": experts,
        "quant_linear": quant_linear,
        "grouped_quant_linear": quantised_experts,
        "mrope_positions": positions_of,
        "vision_positions": lambda backend: K.vision_positions(grid, num_patches=36, backend=backend),
        "image_to_patches": lambda backend: K.image_to_patches(photo, 56, 84, backend=backend),
    }
    done = []
    for op, run in runs.items():
        for backend in PREFERENCE[op][device]:
            if backend in ("triton", "cuda", "sm90") and unavailable(backend, device) is None:
                run(backend)
                done.append(op)
    if device == "cuda":
        torch.cuda.synchronize()
    return done


if __name__ == "__main__":
    print("one of each:", ", ".join(main()))
