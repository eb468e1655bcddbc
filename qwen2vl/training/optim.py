"""AdamW over local shards, with float32 masters of 16-bit parameters, one rate a part, and a cosine with warm-up.

PyTorch's AdamW does the arithmetic, on plain tensors: the local part of each parameter. A sharded model holds
parameters on meshes of different dimensions (tensor-parallel ones on two, norms on one), which its loops over many
tensors refuse to mix; what is elementwise needs no mesh. Only the gradients' norm crosses ranks, here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Partial, Replicate

from .config import OptimizerConfig
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
    master: torch.Tensor  # what AdamW updates; ``local`` itself without a copy in float32

    @property
    def gradient(self) -> torch.Tensor | None:
        grad = self.parameter.grad
        return grad.to_local() if isinstance(grad, DTensor) else grad


class Optimizer:
    """AdamW for the parameters that learn.

    Args:
        named_parameters: of the model, sharded or not, names as in a checkpoint.
        master_weights: keep float32 copies of parameters of 16 bits, and add up their gradients in float32.
    """

    def __init__(
        self, named_parameters: Iterable[tuple[str, nn.Parameter]], config: OptimizerConfig, *, master_weights: bool
    ) -> None:
        self.config = config
        self.entries: list[_Entry] = []
        groups: dict[tuple[str, bool], list[torch.Tensor]] = {}
        for name, parameter in named_parameters:
            if not parameter.requires_grad:
                continue
            whole = parameter.detach()
            local = whole.to_local() if isinstance(whole, DTensor) else whole
            copied = master_weights and local.dtype != torch.float32 and local.dtype != torch.float64
            master = local.float() if copied else local
            self.entries.append(_Entry(name, parameter, local, master))
            groups.setdefault((part_of(name), parameter.ndim > 1), []).append(master)
        peaks = {part: getattr(config, f"lr_{part}") for part in PARTS}
        self.peaks = {part: config.lr if peak is None else peak for part, peak in peaks.items()}
        on_cpu = all(e.master.device.type == "cpu" for e in self.entries)
        self._adamw = torch.optim.AdamW(
            [
                {"params": found, "part": part, "weight_decay": config.weight_decay if decays else 0.0}
                for (part, decays), found in groups.items()
            ],
            lr=config.lr,
            betas=config.betas,
            eps=config.eps,
            # On a CPU one pass over each tensor takes a quarter of the time of a dozen over all of them. There the
            # fused loops take a step count on the host, as it is made below.
            fused=on_cpu,
            foreach=not on_cpu,
        )
        for entry in self.entries:  # made here, not in the first step, so that a checkpoint has a place to load into
            self._adamw.state[entry.master] = {
                "step": torch.zeros((), dtype=torch.float32),
                "exp_avg": torch.zeros_like(entry.master),
                "exp_avg_sq": torch.zeros_like(entry.master),
            }
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
        for group in self._adamw.param_groups:
            group["lr"] = factor * self.peaks[group["part"]]
        self._adamw.step()
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
            own = self._adamw.state[entry.master]
            tensors = {"exp_avg": own["exp_avg"], "exp_avg_sq": own["exp_avg_sq"], "step": own["step"]}
            if entry.master is not entry.local:
                tensors["master"] = entry.master
            for key, tensor in tensors.items():
                found[f"{entry.name}.{key}"] = tensor if key == "step" else _shard_like(entry.parameter, tensor)
        return found


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
