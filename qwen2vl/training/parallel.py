"""Processes that share the work: data parallel, FSDP2, and tensor parallel decoder layers, from torchrun's environment.

    mode none   one process
    mode ddp    every rank holds the whole model (DistributedDataParallel)
    mode fsdp   parameters, gradients and optimiser state are sharded over the data ranks (fully_shard, block by block)
    tensor > 1  that many neighbouring ranks split each decoder layer's heads and MLP columns, or its experts, and read
                the same packs

Tensor parallelism leaves the tower, the embedding and the head whole on each of its ranks; with fsdp they are still
sharded over the data ranks.
"""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.fx.experimental._config
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.utils.checkpoint import checkpoint

from ..adapter import adapted
from ..config import Qwen2VLConfig
from ..model import Qwen2VL
from ..moe import Experts, SparseMoE, routed
from ..parallel import rank_device, split_of, undivided
from .config import ParallelConfig
from .errors import TrainingConfigError
from .step import TrainingStep


@dataclass(frozen=True)
class Parallel:
    """This process among the others. ``data_rank`` of ``data_size`` says which packs are its own."""

    device: torch.device
    mode: str = "none"
    rank: int = 0
    world: int = 1
    data_rank: int = 0
    data_size: int = 1
    tensor: int = 1
    mesh: DeviceMesh | None = None  # ("data", "tensor")

    @property
    def data_group(self) -> dist.ProcessGroup | None:
        return None if self.mesh is None else self.mesh.get_group("data")

    def sum(self, *values: float) -> list[float]:
        """Each value summed over the data ranks; waits for all of them."""
        if self.mesh is None:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total, group=self.data_group)
        return total.tolist()

    def gather(self, thing: list[str]) -> list[str]:
        """The lists of all data ranks, joined in their order."""
        if self.mesh is None:
            return thing
        found: list[list[str]] = [[] for _ in range(self.data_size)]
        dist.all_gather_object(found, thing, group=self.data_group)
        return [item for one in found for item in one]

    def everywhere(self, text: str) -> list[str]:
        """The texts of all ranks, those that split the decoder's layers included, in their order."""
        if self.mesh is None:
            return [text]
        found = [""] * self.world
        dist.all_gather_object(found, text)
        return found

    def agree(self, number: int) -> bool:
        """Whether the ranks that split the decoder's layers all pass the same number, of 63 bits."""
        if self.mesh is None or self.tensor == 1:
            return True
        ends = torch.tensor([number, -number], dtype=torch.int64, device=self.device)
        dist.all_reduce(ends, op=dist.ReduceOp.MAX, group=self.mesh.get_group("tensor"))
        return int(ends[0]) == -int(ends[1])

    def barrier(self) -> None:
        if self.mesh is not None:
            dist.barrier()


def start(config: ParallelConfig, shape: Qwen2VLConfig) -> Parallel:
    """Join the processes that torchrun started, or stand alone.

    Raises :class:`TrainingConfigError` when the configuration and the processes, or the model, do not fit.
    """
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    started = "WORLD_SIZE" in os.environ and "RANK" in os.environ
    mode = config.mode or ("fsdp" if started and world > 1 else "none")
    if mode == "none" and (world > 1 or config.tensor > 1):
        raise TrainingConfigError(f"parallel.mode: 'none' is one process, there are {world} and tensor {config.tensor}")
    if mode != "none" and not started:
        raise TrainingConfigError(f"parallel.mode: {mode!r} needs processes: start with torchrun")
    if world % config.tensor:
        raise TrainingConfigError(f"parallel.tensor: {config.tensor} does not divide the {world} processes")
    if mode == "ddp" and config.tensor > 1:
        raise TrainingConfigError("parallel.tensor: goes with mode 'fsdp', got 'ddp'")
    if reason := undivided(shape.text, config.tensor, repeat=False):
        raise TrainingConfigError(f"parallel.tensor: {config.tensor} does not divide {reason}")
    device = rank_device()
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.set_device(device)
    if mode == "none":
        return Parallel(device)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(seconds=config.timeout))
    mesh = init_device_mesh(device.type, (world // config.tensor, config.tensor), mesh_dim_names=("data", "tensor"))
    return Parallel(
        device, mode, rank, world, rank // config.tensor, world // config.tensor, config.tensor, mesh
    )  # fmt: skip


def blocks(model: Qwen2VL) -> list[nn.Module]:
    """The repeated parts: what is sharded, checkpointed and compiled one at a time."""
    return [*model.visual.blocks, *model.model.layers]


def wrap_blocks(model: Qwen2VL, *, checkpoint_activations: bool, compiled: bool, backend: str = "inductor") -> None:
    """Compile each block's forward, keep only its inputs for the backward, or both.

    The forward alone is changed, so that what a sharded block does around it (gathering parameters) stays outside.
    Blocks are compiled for packs of any size from the first: twice in each tower, as the first block gets no residual.
    """
    if compiled:
        # Sizes that happen to be equal in the first pack (segments and a width) need not be in the next.
        torch.fx.experimental._config.use_duck_shape = False
    for block in blocks(model):
        forward = block.forward
        if compiled:
            forward = torch.compile(forward, backend=backend, dynamic=True)
        if checkpoint_activations:
            forward = functools.partial(checkpoint, forward, use_reentrant=False)
        block.forward = forward  # type: ignore[method-assign]


def split_decoder(model: Qwen2VL, mesh: DeviceMesh) -> None:
    """Tensor parallelism: heads of the attention and columns of the MLP, two all-reduces a layer and direction. Of
    routed experts each rank has its own; a shared one is split by columns, and routers are whole.

    The ops see plain tensors: a layer's input becomes one DTensor for all projections that read it (so its gradient is
    reduced once), and each projection gives back its local part, whose number of heads the attention reads off.
    """
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        PrepareModuleInput,
        RowwiseParallel,
        parallelize_module,
    )

    whole = Replicate()
    style = lambda cut: ColwiseParallel() if cut == "columns" else RowwiseParallel()  # noqa: E731
    for n, layer in enumerate(model.model.layers):
        cuts, plan = split_of(model.config.text, n), {}
        for name, cut in cuts.items():
            part = name.rpartition(".")[0]
            given = (whole, None) if part == "self_attn" else whole
            plan[part] = PrepareModuleInput(input_layouts=given, desired_input_layouts=given)
            plan[name] = style(cut)
        if isinstance(layer.mlp, SparseMoE) and isinstance(layer.mlp.experts, Experts):
            _split_experts(layer.mlp.experts, mesh)
        parallelize_module(layer, mesh, plan)


def _split_experts(experts: Experts, mesh: DeviceMesh) -> None:
    """Give each rank its share of the experts, which it takes every token to; sums over ranks are the whole."""
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

    for name, parameter in list(experts.named_parameters()):
        split = nn.Parameter(distribute_tensor(parameter.detach(), mesh, [Shard(0)]), parameter.requires_grad)
        experts.register_parameter(name, split)

    def enter(x: torch.Tensor) -> torch.Tensor:
        """The same on every rank; its gradient is the sum of theirs."""
        return DTensor.from_local(x, mesh, [Replicate()], run_check=False).to_local(grad_placements=[Partial()])

    def forward(x: torch.Tensor, weights: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        own = [parameter.to_local() for parameter in (experts.gate_up_proj, experts.down_proj)]  # type: ignore[operator]
        y = routed(enter(x), enter(weights), chosen - mesh.get_local_rank() * own[0].shape[0], *own)
        parts = DTensor.from_local(y, mesh, [Partial()], run_check=False)
        return parts.redistribute(placements=[Replicate()]).to_local()

    experts.forward = forward  # type: ignore[method-assign]


def distribute(step: TrainingStep, parallel: Parallel) -> nn.Module:
    """The step as every rank calls it: on its device, split and sharded as ``parallel`` says."""
    model = step.model
    if parallel.mesh is None:
        return step.to(parallel.device)
    if parallel.tensor > 1:
        split_decoder(model, parallel.mesh["tensor"])
    refuse_sharded(model, parallel.mode)
    if parallel.mode == "ddp":
        devices = [parallel.device.index] if parallel.device.type == "cuda" else None
        step.to(parallel.device)
        return nn.parallel.DistributedDataParallel(step, device_ids=devices, process_group=parallel.data_group)
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    # Gradients of 16 bits are summed over ranks in float32.
    settings = {"mesh": parallel.mesh["data"], "mp_policy": MixedPrecisionPolicy(reduce_dtype=torch.float32)}
    for block in blocks(model):
        fully_shard(block, **settings)  # type: ignore[arg-type]
    fully_shard(step, **settings)  # type: ignore[arg-type]
    return step


def refuse_sharded(model: Qwen2VL, mode: str) -> None:
    """Raises :class:`TrainingConfigError` where adapters of experts, which are summed with whole weights, are to be
    sharded."""
    if mode == "fsdp" and any(".mlp.experts" in name for name in adapted(model)):
        raise TrainingConfigError("lora.experts: goes with parallel.mode 'none' and 'ddp', got 'fsdp'")


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A parameter with the parts of all ranks, on each of them; all must call this together."""
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
