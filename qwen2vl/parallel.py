"""Tensor parallelism: processes of torchrun that hold one model together, each a slice of every decoder layer.

Heads of the attention and columns of the MLP are split, so that a layer takes two all-reduces; so are the rows of the
embedding and of the head, by vocabulary (Shoeybi et al. 2019, arXiv 1909.08053, section 3). A key-value head is held by
several ranks where there are fewer than ranks. The vision tower is whole on every rank and the patches of a call are
spread over them. :data:`SPLIT` is what training (:mod:`qwen2vl.training.parallel`) cuts decoder layers by, too.

Of routed experts each rank has some, whole (as GShard, arXiv 2006.16668); a shared one is split as an MLP, and both are
parts of one sum. Routers are whole, so that all ranks choose alike. To cut every expert's inner width instead would
read as many bytes and give every rank the same work, where now a step of few rows waits for the rank that holds most of
the chosen experts. But matrices would get narrow, groups of 128 in 1408 columns (Qwen1.5-MoE) are not to be cut in two
nor in 768 (Qwen3-VL-MoE) in four, and training, whose gradients follow the experts, splits them so, too.

All ranks run the same program; what they sum and gather is the same on all of them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist

from .checks import Grid
from .config import TextConfig
from .errors import PromptError, Qwen2VLError
from .moe import held_elsewhere
from .quantised_slices import Slice
from .vision import Encode, VisionTower, frame_pairs, rows_between

if TYPE_CHECKING:
    from .choosing import Chooser
    from .generation import GenerationConfig
    from .model import Qwen2VL
    from .progress import Row

#: What of a decoder layer is cut: "columns" of outputs, or "rows" of inputs, whose products are summed over the ranks.
SPLIT = {
    "self_attn.q_proj": "columns",
    "self_attn.k_proj": "columns",
    "self_attn.v_proj": "columns",
    "self_attn.o_proj": "rows",
    "mlp.gate_proj": "columns",
    "mlp.up_proj": "columns",
    "mlp.down_proj": "rows",
}
#: How long a rank waits for what rank 0 wants next, as between two questions of a person.
PATIENCE = timedelta(days=30)


def undivided(text: TextConfig, ranks: int, *, repeat: bool) -> str:
    """What of a decoder cannot be split over so many ranks, "" where all can.

    ``repeat``: whether a key-value head may be held by several ranks.
    """
    heads = text.num_key_value_heads
    if not (repeat and ranks % heads == 0) and heads % ranks:
        return f"num_key_value_heads, {heads}"
    dense = any(text.experts(layer) is None for layer in range(text.num_hidden_layers))
    for name in ("num_attention_heads", "intermediate_size") if dense else ("num_attention_heads",):
        if getattr(text, name) % ranks:
            return f"{name}, {getattr(text, name)}"
    for name in ("num_experts", "shared_expert_intermediate_size") if text.moe is not None else ():
        if getattr(text.moe, name) % ranks:
            return f"{name}, {getattr(text.moe, name)}"
    return ""


def rank_device() -> torch.device:
    """The device of this one of torchrun's processes: its own GPU, where there are any."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local, count = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if local >= count:
        raise Qwen2VLError(f"nproc-per-node: wants a GPU for each process, got {count} for number {local + 1}")
    return torch.device("cuda", local)


def slices(text: TextConfig, rank: int, ranks: int) -> dict[str, Slice]:
    """What a rank holds of every weight and bias that is split, by the parameter's name.

    Raises :class:`Qwen2VLError` where heads or columns cannot be split evenly.
    """
    if reason := undivided(text, ranks, repeat=True):
        raise Qwen2VLError(f"parallel: {ranks} ranks do not divide {reason}")
    if text.vocab_size < ranks:
        raise Qwen2VLError(f"parallel: {ranks} ranks share a vocabulary of {text.vocab_size}")
    heads = text.num_key_value_heads
    # The query heads of a rank belong to key-value heads of its own, or all to one that it shares with its neighbours.
    held = range(rank * heads // ranks, max(rank * heads // ranks + 1, (rank + 1) * heads // ranks))
    key_value = (held.start * text.head_dim, held.stop * text.head_dim, heads * text.head_dim)
    query = _even(text.hidden_size, rank, ranks)
    cuts = {"q_proj": query, "k_proj": key_value, "v_proj": key_value, "o_proj": query}
    found = {name: Slice(0, *_even(text.vocab_size, rank, ranks)) for name in ("model.embed_tokens", "lm_head")}
    experts: dict[str, Slice] = {}
    for layer in range(text.num_hidden_layers):
        moe, prefix = text.experts(layer), f"model.layers.{layer}"
        inner = _even(text.intermediate_size if moe is None else moe.shared_expert_intermediate_size, rank, ranks)
        for name, how in split_of(text, layer).items():
            cut = cuts.get(name.partition(".")[2], inner)
            found[f"{prefix}.{name}"] = Slice(0 if how == "columns" else 1, *cut)
        if moe is not None:
            of_all = Slice(0, *_even(moe.num_experts, rank, ranks))
            experts |= {f"{prefix}.mlp.experts.{name}": of_all for name in ("gate_up_proj", "down_proj")}
    # Only what is cut by columns has a bias, which is cut with them.
    biases = {f"{name}.bias": cut for name, cut in found.items() if cut.dim == 0}
    return biases | {f"{name}.weight": cut for name, cut in found.items()} | experts


def split_of(text: TextConfig, layer: int) -> dict[str, str]:
    """:data:`SPLIT` of one layer, whose MLP, where it has experts, is the shared one, if it has that."""
    moe = text.experts(layer)
    if moe is None:
        return SPLIT
    shared = "mlp.shared_expert." if moe.shared_expert_intermediate_size else ""
    found = {name.replace("mlp.", shared): how for name, how in SPLIT.items()}
    return found if shared else {name: how for name, how in found.items() if name.startswith("self_attn.")}


def _even(count: int, rank: int, ranks: int) -> tuple[int, int, int]:
    return rank * count // ranks, (rank + 1) * count // ranks, count


class Asked(NamedTuple):
    """What ``generate`` was given on rank 0; ``keeps``: with a conversation."""

    inputs: dict[str, Any]
    config: GenerationConfig
    keeps: bool


class TensorParallel:
    """This process among those that hold a model together, for ``Qwen2VL.from_pretrained(..., parallel=)``.

    ``rank`` of ``ranks``, on ``device``. Under torchrun :meth:`start` makes it; a program with process groups of its
    own gives one of them.

    Args:
        group: of ``torch.distributed``, default all processes.
        device: default the GPU of this process, where there is one.

    Raises :class:`Qwen2VLError` where ``torch.distributed`` has not been initialised.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, device: torch.device | str | None = None) -> None:
        if not dist.is_initialized():
            raise Qwen2VLError("parallel: wants torch.distributed; TensorParallel.start() joins torchrun's processes")
        self.group = group
        self.device = rank_device() if device is None else torch.device(device)
        self.rank, self.ranks = dist.get_rank(self.group), dist.get_world_size(self.group)
        members = dist.get_process_group_ranks(self.group)
        # What the hosts tell each other waits for people, and must not hold up a GPU.
        self._hosts: Any = dist.new_group(members, PATIENCE, "gloo", use_local_synchronization=True)
        self._busy = False
        self._follows = False

    @classmethod
    def start(cls, device: torch.device | str | None = None) -> TensorParallel:
        """Join the processes that torchrun started. Raises :class:`Qwen2VLError` where it started none, and where it
        started more than there are GPUs."""
        if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
            raise Qwen2VLError("parallel: wants processes: start with torchrun --nproc-per-node N")
        place = rank_device() if device is None else torch.device(device)
        if place.type == "cuda":
            torch.cuda.set_device(place)
        if not dist.is_initialized():
            dist.init_process_group("nccl" if place.type == "cuda" else "gloo")
        return cls(device=place)

    def check_place(self, device: torch.device | str | None, adapter: object) -> torch.device:
        """Where a model is loaded. Raises :class:`Qwen2VLError` for another device, and for an adapter."""
        if adapter is not None:
            raise Qwen2VLError("adapter: wants a whole model; merge it (qwen2vl merge) and load the result in parallel")
        given = self.device if device is None else torch.device(device)
        if given.type != self.device.type or given.index not in (None, self.device.index):
            raise Qwen2VLError(f"device: wants that of parallel, {self.device}, got {device}")
        return self.device

    def check_heads(self, text: TextConfig) -> None:
        """Raises :class:`Qwen2VLError` where a model of these sizes cannot be split over the ranks."""
        slices(text, self.rank, self.ranks)

    # --------------------------------------------------------------------------------------------------- tensors

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` summed over the ranks, in place. Raises :class:`Qwen2VLError` where gradients are wanted."""
        _refuse_gradients(x)
        dist.all_reduce(x, group=self.group)
        return x

    def gather(self, x: torch.Tensor, counts: Sequence[int], dim: int) -> torch.Tensor:
        """The parts of all ranks, of ``counts`` entries in ``dim``, one behind the other; the same on all of them."""
        _refuse_gradients(x)
        most = max(counts)
        if idle := most - x.shape[dim]:
            x = torch.cat([x, x.new_zeros([idle if n == dim else size for n, size in enumerate(x.shape)])], dim)
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in counts]
        dist.all_gather(parts, x.contiguous(), group=self.group)
        return torch.cat([part.narrow(dim, 0, count) for part, count in zip(parts, counts, strict=True)], dim)

    def gather_logits(self, logits: torch.Tensor, vocab_size: int) -> torch.Tensor:
        """``(T, own rows of the head)`` to ``(T, vocab_size)``."""
        counts = [end - begin for begin, end, _ in (_even(vocab_size, n, self.ranks) for n in range(self.ranks))]
        return self.gather(logits, counts, 1)

    def from_first(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` of rank 0, in place."""
        dist.broadcast(x, group=self.group, group_src=0)
        return x

    def spread(self, tower: VisionTower) -> Encode:
        """``tower.encode``, of which each rank runs a share of the frame pairs and has all of the tokens."""
        shape, dtype = tower.config, tower.merger.ln_q.weight.dtype

        def encode(kinds: list[torch.Tensor], grids: list[Grid]) -> torch.Tensor:
            _refuse_gradients(*kinds)  # on every rank, those that have nothing to encode among them
            pairs = frame_pairs(grids)
            sizes = torch.tensor([h * w for _, h, w in pairs], dtype=torch.float64)
            middles, total = sizes.cumsum(0) - sizes / 2, sizes.sum()
            owners = (middles * self.ranks / total).long().tolist()
            counts = [sum(h * w for (_, h, w), owner in zip(pairs, owners, strict=True) if owner == n)
                      for n in range(self.ranks)]  # fmt: skip
            own = [pair for pair, owner in zip(pairs, owners, strict=True) if owner == self.rank]
            tokens = torch.empty((0, shape.hidden_size), dtype=dtype, device=self.device)
            if own:
                begin = sum(counts[: self.rank])
                tokens = tower.encode(rows_between(kinds, begin, begin + counts[self.rank]), own)
            return self.gather(tokens, [count // shape.spatial_merge_size**2 for count in counts], 0)

        return encode

    # ----------------------------------------------------------------------------------------------------- hosts

    def share(self, thing: Any) -> Any:
        """``thing`` of rank 0, on every rank."""
        found = [thing]
        dist.broadcast_object_list(found, group=self._hosts, group_src=0)
        return found[0]

    @contextmanager
    def together(self) -> Iterator[None]:
        """What raises on one rank inside raises on all of them, so that none waits for it; all must enter this."""
        problem: Exception | None = None
        try:
            yield
        except Exception as error:
            problem = error
        found: list[str | None] = [None] * self.ranks
        told = None if problem is None else str(problem) or type(problem).__name__
        dist.all_gather_object(found, told, group=self._hosts)
        if problem is not None:
            raise problem
        for rank, message in enumerate(found):
            if message is not None:
                raise Qwen2VLError(f"rank {rank}: {message}")

    @property
    def busy(self) -> bool:
        """Whether an answer is being made. After an error in the middle of one this stays so: the ranks are out of
        step, and no other can be made."""
        return self._busy

    def begin(self, inputs: Mapping[str, Any], config: GenerationConfig, choose: Chooser, keeps: bool) -> None:
        """An answer begins, with rank 0's seed on all ranks. ``keeps``: whether it is one of a conversation.

        Raises :class:`PromptError` on all ranks where they were given different prompts or configurations, and
        :class:`Qwen2VLError` in the middle of another answer.
        """
        if self._busy:
            raise Qwen2VLError("parallel: an answer is being made, or an error has left the ranks out of step")
        self._busy = True
        if self._follows:
            return
        given = None
        if self.rank == 0:
            tensors = {name: _on_host(value) for name, value in inputs.items()}
            given = Asked(tensors, replace(config, seed=choose.seeded), keeps)
        told: Asked = self.share(given)
        if not self.least(self.rank == 0 or _same(told, inputs, config, keeps)):
            self._busy = False
            raise PromptError("generate: the ranks were given different prompts or configurations")
        if (seed := told.config.seed) is not None:
            choose.seed(seed)

    def end_of_step(self, over: bool, rows: Sequence[Row]) -> bool:
        """Whether the answer is over, and in ``rows`` which of them have ended, by the word of rank 0, which alone may
        look for stop strings.

        Raises :class:`Qwen2VLError` where this rank wants no more of an answer that rank 0 goes on with.
        """
        told = torch.tensor([over, *(bool(row.reason) for row in rows)], dtype=torch.uint8)
        dist.broadcast(told, group=self._hosts, group_src=0)
        said, *ended = told.bool().tolist()
        if over and not said:
            raise Qwen2VLError("parallel: this rank wants no more of an answer that rank 0 goes on with")
        for row, gone in zip(rows, ended, strict=True):
            if gone and not row.reason:
                row.reason = "stop_string"
        self._busy = not said
        return said

    def asked(self) -> Iterator[Asked]:
        """For other ranks than 0: every answer that rank 0 begins, to be made here as well, until it calls
        :meth:`end`."""
        self._follows = True
        try:
            while (told := self.share(None)) is not None:
                self.least(True)
                yield told
        finally:
            self._follows = False

    def end(self) -> None:
        """For rank 0: let those go that wait for the next answer."""
        self.share(None)

    def least(self, number: int) -> int:
        """The smallest of the ranks' numbers."""
        every = torch.tensor(number, dtype=torch.int64)
        dist.all_reduce(every, op=dist.ReduceOp.MIN, group=self._hosts)
        return int(every)


def _refuse_gradients(*tensors: torch.Tensor) -> None:
    if any(one.requires_grad for one in tensors):
        raise Qwen2VLError("parallel: a model that is split for inference has no gradients; use torch.no_grad()")


def _on_host(value: Any) -> Any:
    return value.cpu() if isinstance(value, torch.Tensor) else value


def _same(told: Asked, inputs: Mapping[str, Any], config: GenerationConfig, keeps: bool) -> bool:
    """Whether this rank was given what rank 0 was, but for the seed."""
    theirs, settings, kept = told
    if theirs.keys() != inputs.keys() or kept != keeps:
        return False
    for field in fields(config):
        one, other = getattr(settings, field.name), getattr(config, field.name)
        if field.name != "seed" and one != other:
            return False
    pairs = ((theirs[name], _on_host(value)) for name, value in inputs.items())
    return all(
        a.dtype == b.dtype and torch.equal(a, b) if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) else
        type(a) is type(b) and (a is None or a == b)
        for a, b in pairs
    )  # fmt: skip


def bytes_per_rank(model: Qwen2VL, ranks: int, tokens: int = 0) -> list[int]:
    """Bytes of weights and of the keys and values of ``tokens`` that each rank holds, without activations, nor what
    fills up the blocks of columns in the order of activations.

    ``model`` may be on the meta device: ``Qwen2VL.from_config("72B", device="meta")``. Raises :class:`Qwen2VLError`
    where it cannot be split so.
    """
    text, found = model.config.text, []
    for rank in range(ranks):
        cuts = slices(text, rank, ranks)
        total = 0
        for name, parameter in model.named_parameters():
            if held_elsewhere(name, cuts):
                continue
            prefix, _, kind = name.rpartition(".")
            values, cut = parameter.numel(), cuts.get(name)
            if cut is None and kind != "bias":  # of a quantised layer, which has other names for its parts
                cut = cuts.get(f"{prefix}.weight", cuts.get(prefix))
            total += (values if cut is None else values * cut.count // cut.whole) * parameter.element_size()
        keys = cuts["model.layers.0.self_attn.k_proj.weight"].count * text.num_hidden_layers
        found.append(total + 2 * keys * tokens * model.dtype.itemsize)
    return found
