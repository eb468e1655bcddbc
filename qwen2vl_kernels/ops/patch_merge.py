"""The 2x2 token merger: LayerNorm each patch, concatenate a block's patches, two linear layers with GELU between.

    h = layer_norm(x)                                  (T, C)
    h = the m*m patches of every merge block, row by row, side by side      (T / m^2, m^2 C)
    y = gelu(h @ fc1^T + b1) @ fc2^T + b2              (T / m^2, H), gelu(x) = x Phi(x)  (erf form)

(Qwen2-VL, arXiv 2409.12191, section 2: adjacent 2x2 tokens compressed by an MLP.) ``order="block"``: the rows of x
already come block by block, so gathering is a view. ``order="raster"``: rows run over each frame row by row, and
``grid_thw`` says where frames begin. dtypes: float32, bfloat16, float16. The kernels are in
``triton.norm``, which gathers as it reads, and ``triton.gemm``, whose epilogue adds the bias and applies GELU.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..core.backends import resolve
from ..core.checks import INTS, Checker
from ..core.library import register_composite
from ..core.matmul import in_autocast_dtype, linear
from ..triton.gemm import MATRIX_DTYPES, gemm
from ..triton.norm import norm


def gather_blocks_ref(x: torch.Tensor, grid_thw: torch.Tensor, merge_size: int = 2) -> torch.Tensor:
    """Rows of ``x (T, C)`` from raster order to block order, item by item."""
    m, start, parts = merge_size, 0, []
    for t, h, w in grid_thw.tolist():
        item = x[start : start + t * h * w].view(t, h // m, m, w // m, m, -1)
        parts.append(item.transpose(2, 3).reshape(t * h * w, -1))
        start += t * h * w
    return torch.cat(parts) if parts else x


def patch_merge_ref(
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    fc1_weight: torch.Tensor,
    fc1_bias: torch.Tensor,
    fc2_weight: torch.Tensor,
    fc2_bias: torch.Tensor,
    grid_thw: torch.Tensor | None = None,
    merge_size: int = 2,
    eps: float = 1e-6,
) -> torch.Tensor:
    """The formula in the working dtype. ``grid_thw`` given: x is in raster order."""
    if grid_thw is not None:
        x = gather_blocks_ref(x, grid_thw, merge_size)
    h = F.layer_norm(x, (x.shape[-1],), norm_weight, norm_bias, eps)
    h = h.reshape(-1, merge_size * merge_size * x.shape[-1])
    return linear(F.gelu(linear(h, fc1_weight, fc1_bias)), fc2_weight, fc2_bias)


def block_order(grid_thw: torch.Tensor, rows: int, merge_size: int) -> torch.Tensor:
    """For each of ``rows`` patches in block order its row in raster order, ``(rows,)`` int64 on grid_thw's device.

    Nothing is read on the host, and no contents lead outside of the rows.
    """
    m, grids = merge_size, grid_thw.long()
    sizes = grids.prod(1)
    ends = sizes.cumsum(0)
    patch = torch.arange(rows, device=grid_thw.device)
    item = torch.searchsorted(ends, patch, right=True).clamp_(max=grids.shape[0] - 1)
    start, height, width = (ends - sizes)[item], grids[item, 1].clamp(min=1), grids[item, 2].clamp(min=m)
    inside = (patch - start) % (height * width)
    frame = patch - inside
    block, place = inside // (m * m), inside % (m * m)
    row = block // (width // m) * m + place // m
    column = block % (width // m) * m + place % m
    return (frame + row * width + column).clamp_(0, max(rows - 1, 0))


def patch_merge(
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    fc1_weight: torch.Tensor,
    fc1_bias: torch.Tensor,
    fc2_weight: torch.Tensor,
    fc2_bias: torch.Tensor,
    *,
    order: str = "block",
    grid_thw: torch.Tensor | None = None,
    merge_size: int = 2,
    eps: float = 1e-6,
    backend: str | None = None,
) -> torch.Tensor:
    """Merge blocks of patches into language-model tokens.

    Args:
        x: ``(T, C)`` patches, T a multiple of ``merge_size ** 2``.
        norm_weight, norm_bias: ``(C,)``.
        fc1_weight, fc1_bias: ``(F, merge_size^2 C)``, ``(F,)``.
        fc2_weight, fc2_bias: ``(H, F)``, ``(H,)``.
        order: ``"block"``, or ``"raster"``, which needs ``grid_thw``.
        grid_thw: ``(n, 3)`` patches of every item in time, height and width; its products sum to T.
        eps: of the LayerNorm.
        backend: ``None`` (choose), ``"triton"``, ``"eager"`` (reads ``grid_thw`` on the host in raster order).

    Under autocast all are taken in its dtype, as PyTorch does for matrix products; sums of the norm stay float32.

    Returns ``(T / merge_size^2, H)``. Raises ``TypeError``/``ValueError`` naming the argument that does not fit.
    """
    x, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias = in_autocast_dtype(
        x, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias
    )
    check = Checker("patch_merge")
    check.tensor("x", x, ("T", "C"))
    check.tensor("norm_weight", norm_weight, ("C",), like=x)
    check.tensor("norm_bias", norm_bias, ("C",), like=x)
    block = merge_size * merge_size
    check.tensor("fc1_weight", fc1_weight, ("F", block * x.shape[1]), like=x)
    check.tensor("fc1_bias", fc1_bias, ("F",), like=x)
    check.tensor("fc2_weight", fc2_weight, ("H", "F"), like=x)
    check.tensor("fc2_bias", fc2_bias, ("H",), like=x)
    check.require(x.shape[0] % block == 0, f"x must have a multiple of {block} rows, got {x.shape[0]}")
    check.require(order in ("block", "raster"), f"order must be 'block' or 'raster', got {order!r}")
    if order == "raster":
        check.tensor("grid_thw", grid_thw, ("n", 3), dtypes=INTS, any_device=True)
        assert grid_thw is not None
        if grid_thw.device.type == "cpu" and type(grid_thw) is torch.Tensor and not torch.compiler.is_compiling():
            rows = int(grid_thw.prod(1).sum())
            check.require(rows == x.shape[0], f"grid_thw describes {rows} patches, but x has {x.shape[0]} rows")
            ok = bool((grid_thw[:, 1:] % merge_size == 0).all())
            check.require(
                ok,
                f"grid_thw's heights and widths must be multiples of {merge_size}, got {grid_thw.tolist()}",
            )
    grid_thw = grid_thw if order == "raster" else None
    # The library's product is faster where the matrix units do not take the dtype.
    prefer = None if x.dtype in MATRIX_DTYPES else "eager"
    if resolve("patch_merge", x.device.type, backend, prefer) == "eager":
        weights = (norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias)
        return patch_merge_ref(x, *weights, grid_thw, merge_size, eps)
    rows = None
    if grid_thw is not None and x.shape[0]:
        rows = block_order(grid_thw.to(x.device, non_blocking=True), x.shape[0], merge_size)
    h, _ = norm(x, None, norm_weight, norm_bias, eps, centred=True, order=rows)  # which gathers as it reads
    h = h.view(-1, block * x.shape[1])
    return gemm(gemm(h, fc1_weight, fc1_bias, gelu=True), fc2_weight, fc2_bias)


register_composite(
    "patch_merge(Tensor x, Tensor norm_weight, Tensor norm_bias, Tensor fc1_weight, Tensor fc1_bias,"
    ' Tensor fc2_weight, Tensor fc2_bias, *, str order="block", Tensor? grid_thw=None, int merge_size=2,'
    " float eps=1e-6) -> Tensor",
    patch_merge,
)
