"""AdamW or Muon, with float32 masters of 16-bit parameters, one rate a part, and a cosine with warm-up.

PyTorch's optimizers do the arithmetic, on plain tensors: the local part of each parameter. A sharded model holds
parameters on meshes of different dimensions (tensor-parallel ones on two, norms on one), which their loops over many
tensors refuse to mix; what is elementwise needs no mesh. Only the gradients' norm crosses ranks, here. Muon is not
elementwise, its updates are orthogonal matrices, and so it takes whole parameters alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Partial, Replicate

from .config import OptimizerConfig
from .errors import TrainingConfigError
from .stages import PARTS, part_of


def lr_factor(step: int, *, steps: int | None, warmup: int, minimum: float, passed: float = 0.0) -> float:
    """Share of the peak rate in step ``step`` (from 0): up in a line for ``warmup`` steps, down in half a cosine.

    The step after the last of ``steps`` would have ``minimum``: no step is taken with a rate of zero. Where the number
    of steps is not known beforehand, ``passed`` is the share of the run that lies behind.
    """
    if step < warmup:
        return (step + 1) / warmup
    through = passed if steps is None else (step - warmup + 1) / (steps - warmup + 1)
    return minimum + (1 - minimum) * 0.5 * (1 + math.cos(math.pi * min(1.0, through)))


@dataclass
class _Entry:
    name: str
    parameter: nn.Parameter
    local: torch.Tensor  # the parameter's local part, same storage
    master: torch.Tensor  # what is updated; ``local`` itself without a copy in float32

    @property
    def gradient(self) -> torch.Tensor | None:
        grad = self.parameter.grad
        return grad.to_local() if isinstance(grad, DTensor) else grad


class Optimizer:
    """AdamW for the parameters that learn; or, with ``config.kind`` "muon", Muon (Jordan 2024) for the matrices of
    blocks and layers, scaled so that a rate moves them as far as AdamW would (arXiv 2502.16982); AdamW for the rest.

    Args:
        named_parameters: of the model, sharded or not, names as in a checkpoint.
        master_weights: keep float32 copies of parameters of 16 bits, and add up their gradients in float32.

    Raises :class:`TrainingConfigError` for Muon with a sharded model.
    """

    def __init__(
        self, named_parameters: Iterable[tuple[str, nn.Parameter]], config: OptimizerConfig, *, master_weights: bool
    ) -> None:
        self.config = config
        self.entries: list[_Entry] = []
        groups: dict[tuple[str, str, bool], list[torch.Tensor]] = {}
        for name, parameter in named_parameters:
            if not parameter.requires_grad:
                continue
            whole = parameter.detach()
            local = whole.to_local() if isinstance(whole, DTensor) else whole
            copied = master_weights and local.dtype != torch.float32 and local.dtype != torch.float64
            master = local.float() if copied else local
            kind = "muon" if config.kind == "muon" and _is_layer(name, parameter) else "adamw"
            if kind == "muon" and isinstance(whole, DTensor):
                raise TrainingConfigError(
                    f"optimizer.kind: muon needs whole matrices and {name} is sharded; use parallel.mode none or ddp, "
                    "or adamw"
                )
            self.entries.append(_Entry(name, parameter, local, master))
            groups.setdefault((kind, part_of(name), parameter.ndim > 1), []).append(master)
        peaks = {part: getattr(config, f"lr_{part}") for part in PARTS}
        self.peaks = {part: config.lr if peak is None else peak for part, peak in peaks.items()}
        self.optimizers = [
            _make(
                kind,
                [
                    {"params": found, "part": part, "weight_decay": config.weight_decay if decays else 0.0}
                    for (of, part, decays), found in groups.items()
                    if of == kind
                ],
                config,
            )
            for kind in sorted({kind for kind, _, _ in groups})
        ]
        self._state = {tensor: own for one in self.optimizers for tensor, own in one.state.items()}
        #: Whether gradients are taken over into float32 after every backward.
        self.collects = any(e.master is not e.local for e in self.entries)

    def collect(self) -> None:
        """After a backward: move gradients of 16 bits into their float32 sums."""
        for entry in self.entries:
            if entry.master is entry.local or (grad := entry.gradient) is None:
                continue
            if entry.master.grad is None:
                entry.master.grad = grad.float()
            else:
                entry.master.grad.add_(grad)
            entry.parameter.grad = None

    @torch.no_grad()
    def step(self, factor: float) -> torch.Tensor:
        """Clip, update with ``factor`` times the peak rates, clear gradients; returns the norm before clipping.

        Where the norm is not finite nothing is changed and the gradients stay, for :meth:`not_finite` to look at.
        """
        for entry in self.entries:
            if entry.master is entry.local:
                entry.master.grad = entry.gradient
        norm = self._norm()
        if not torch.isfinite(norm):  # the same on every rank
            return norm
        gradients = [e.master.grad for e in self.entries if e.master.grad is not None]
        if self.config.clip is not None and gradients:
            scale = (self.config.clip / (norm + 1e-6)).clamp(max=1.0)
            torch._foreach_mul_(gradients, scale)  # pyright: ignore[reportPrivateImportUsage]
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = factor * self.peaks[group["part"]]
            optimizer.step()
        for entry in self.entries:
            if entry.master is not entry.local:
                entry.local.copy_(entry.master)
            entry.parameter.grad = entry.master.grad = None
        return norm

    def not_finite(self) -> list[str]:
        """Names of the parameters whose gradients, this rank's part of them, are not finite."""
        return [e.name for e in self.entries if e.master.grad is not None and not e.master.grad.isfinite().all()]

    def _norm(self) -> torch.Tensor:
        """Norm of the whole model's gradient, the same on every rank."""
        sums: dict[tuple[dist.ProcessGroup, ...], list[torch.Tensor]] = {(): []}
        for entry in self.entries:
            found = sums.setdefault(_sharing_groups(entry.parameter), [])
            if entry.master.grad is not None:
                found.append(torch.linalg.vector_norm(entry.master.grad, dtype=torch.float32).square())
        device = self.entries[0].local.device if self.entries else "cpu"
        total = torch.zeros((), device=device)
        for groups, found in sums.items():
            part = torch.stack(found).sum() if found else torch.zeros((), device=device)
            for group in groups:
                dist.all_reduce(part, group=group)
            total = total + part
        return total.sqrt()

    def state(self) -> dict[str, torch.Tensor]:
        """Masters and moments by name, as shards of the whole that share storage with the optimiser's own."""
        found: dict[str, torch.Tensor] = {}
        for entry in self.entries:
            tensors = dict(self._state[entry.master])
            if entry.master is not entry.local:
                tensors["master"] = entry.master
            for key, tensor in tensors.items():
                found[f"{entry.name}.{key}"] = tensor if key == "step" else _shard_like(entry.parameter, tensor)
        return found


def _is_layer(name: str, parameter: torch.Tensor) -> bool:
    """Whether a parameter is a matrix of the tower's blocks or the decoder's layers, which Muon is for."""
    return parameter.ndim == 2 and (name.startswith("model.layers.") or name.startswith("visual.blocks."))


def _make(kind: str, groups: list[dict[str, Any]], config: OptimizerConfig) -> torch.optim.Optimizer:
    """PyTorch's optimizer of a kind, with the state that it would else make in its first step: a checkpoint needs a
    place to load into."""
    tensors = [tensor for group in groups for tensor in group["params"]]
    if kind == "muon":
        muon = torch.optim.Muon(groups, lr=config.lr, adjust_lr_fn="match_rms_adamw")
        for tensor in tensors:
            muon.state[tensor] = {"momentum_buffer": torch.zeros_like(tensor)}
        return muon
    on_cpu = all(tensor.device.type == "cpu" for tensor in tensors)
    # On a CPU one pass over each tensor takes a quarter of the time of a dozen over all of them. There the fused loops
    # take a step count on the host, as it is made below.
    adamw = torch.optim.AdamW(
        groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=on_cpu, foreach=not on_cpu
    )
    for tensor in tensors:
        adamw.state[tensor] = {
            "step": torch.zeros((), dtype=torch.float32),
            "exp_avg": torch.zeros_like(tensor),
            "exp_avg_sq": torch.zeros_like(tensor),
        }
    return adamw


def _sharing_groups(parameter: torch.Tensor) -> tuple[dist.ProcessGroup, ...]:
    """The groups whose ranks hold different parts of a parameter."""
    if not isinstance(parameter, DTensor):
        return ()
    mesh = parameter.device_mesh
    return tuple(
        mesh.get_group(dim) for dim, p in enumerate(parameter.placements) if not isinstance(p, (Replicate, Partial))
    )


def _shard_like(parameter: torch.Tensor, local: torch.Tensor) -> torch.Tensor:
    if not isinstance(parameter, DTensor):
        return local
    return DTensor.from_local(
        local,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
