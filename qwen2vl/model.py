"""Qwen2-VL: the vision tower, the language model and the head in one call that takes transformers' names."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from qwen2vl_kernels import mrope_positions, rms_norm_linear
from qwen2vl_kernels.core.matmul import linear

from . import weights
from .adapter import adapted, adapter_parameters, linear_layers, load_adapter, merge_layers, write_adapter
from .cache import KVCache
from .checks import Call, Features, Patches, check_call, check_features, check_media, placeholders
from .config import Qwen2VLConfig
from .errors import CheckpointError, PromptError
from .features import KeptFeatures
from .files import withdraw_json, write_json
from .hub import Checkpoint
from .layers import Linear
from .moe import separate
from .parallel import TensorParallel
from .parallel_layers import split
from .quantization import place, stored_so
from .sizes import check_sizes
from .stacked_fp8 import one_by_one
from .text import Decoder, Pack
from .tower_graph import replayed
from .vision import VisionTower

_NONE: Features = (None, None)
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Qwen2VL(nn.Module):
    """The thin model. Parameter names are those of the released checkpoints.

    ``max_vision_patches`` bounds the patches of one vision forward (``None``: all media of a call together); set it
    where many large images would not fit into memory at once.
    """

    def __init__(self, config: Qwen2VLConfig) -> None:
        super().__init__()
        self.config = config
        self.visual = VisionTower(config.vision)
        self.model = Decoder(config.text)
        if not config.text.tie_word_embeddings:
            self.lm_head = Linear(config.text.hidden_size, config.text.vocab_size, bias=False)
        self.max_vision_patches: int | None = None
        #: Where set, an image or video that comes again is not encoded again; see :mod:`qwen2vl.features`.
        self.kept_features: KeptFeatures | None = None
        #: Set where each rank holds a part; see :mod:`qwen2vl.parallel`.
        self.parallel: TensorParallel | None = None
        #: generation_config.json as read, for :meth:`qwen2vl.generation.GenerationConfig.from_model`.
        self.generation_defaults: dict = {}

    # ---------------------------------------------------------------------------------------------- making and saving

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str] | Checkpoint,
        device: torch.device | str | None = None,
        dtype: torch.dtype | str | None = None,
        progress: weights.Progress | None = None,
        adapter: str | os.PathLike[str] | None = None,
        parallel: TensorParallel | None = None,
    ) -> Qwen2VL:
        """Load a checkpoint.

        Args:
            name_or_path: a folder with config.json and safetensors (released layout, or re-saved by transformers
                4.x or 5.x), ``"organisation/model"`` on the hub, or a checkpoint that was found before.
            device: default CUDA when there is one, else the CPU; with ``parallel``, its own.
            dtype: default the checkpoint's own.
            progress: called with (tensors loaded, tensors in all).
            adapter: a LoRA adapter in peft's layout, folder or hub id, put beside the checkpoint's weights; see
                :mod:`qwen2vl.adapter` and :meth:`merge_adapter`. Needs the package peft.
            parallel: the ranks that hold the model together, for inference; each reads its own part, and all make the
                same calls. ``config`` is the whole model's.

        A head that differs from the embedding is loaded, and ``config`` of the model then says that it is not tied,
        whatever the checkpoint's says.

        Raises :class:`CheckpointError`, listing every tensor that does not fit, and :class:`Qwen2VLError` for a model
        whose heads cannot be split over the ranks, before any is read. What fails on one rank fails on all.
        """
        device = _device(device) if parallel is None else parallel.check_place(device, adapter)
        with nullcontext() if parallel is None else parallel.together():
            checkpoint = Checkpoint.find(name_or_path)
            folder, config = checkpoint.folder, checkpoint.config
            if parallel is not None:
                parallel.check_heads(config.text)
            if config.text.tie_word_embeddings and weights.holds_own_head(folder):
                # Its own head is what was trained, by a writer that left the flag of the base model as it was.
                config = replace(config, text=replace(config.text, tie_word_embeddings=False))
            check_sizes(config, folder)
            with torch.device("meta"):
                model = cls(config)
                if config.quantization is not None:
                    names = one_by_one(config.quantization, config.text, weights.stored_dtypes(folder))
                    found = stored_so(config.quantization, names)
                    separate(model.model.layers, found)
                    place(model, linear_layers(model), config.quantization, found)
            weights.load_weights(
                model,
                folder,
                device=device,
                dtype=_dtype(config.torch_dtype if dtype is None else dtype),
                ignore=(weights.HEAD_NAME,) if config.text.tie_word_embeddings else (),
                cuts={} if parallel is None else split(model, parallel),
                progress=progress,
            )
            model.generation_defaults = checkpoint.generation_defaults
        if adapter is not None:
            load_adapter(model, adapter)
        return model.eval()

    @classmethod
    def from_config(
        cls,
        config: Qwen2VLConfig | str,
        device: torch.device | str | None = None,
        dtype: torch.dtype | str | None = None,
        std: float = 0.02,
    ) -> Qwen2VL:
        """A model with random weights: normal with ``std``, biases zero, norms one; torch's global generator draws.

        ``config`` may be a preset's name. On ``device="meta"`` nothing is allocated.
        """
        config = Qwen2VLConfig.preset(config) if isinstance(config, str) else config
        dtype = _dtype(config.torch_dtype if dtype is None else dtype)
        with torch.device("meta"):
            model = cls(replace(config, quantization=None)).to(dtype)
        device = _device(device)
        if device.type != "meta":
            model.init_weights(device, std)
        return model.eval()

    def init_weights(self, device: torch.device, std: float = 0.02) -> None:
        """Make every parameter that is still on the meta device, as :meth:`from_config` says; others stay."""
        made: dict[torch.Tensor, nn.Parameter] = {}  # tied ones once
        for module in list(self.modules()):
            for name, meta in list(module.named_parameters(recurse=False, remove_duplicate=False)):
                if not meta.is_meta:
                    continue
                if meta not in made:
                    parameter = nn.Parameter(torch.empty_like(meta, device=device), requires_grad=meta.requires_grad)
                    if name.endswith("bias"):
                        nn.init.zeros_(parameter)
                    elif parameter.ndim == 1:
                        nn.init.ones_(parameter)
                    else:
                        nn.init.normal_(parameter, std=std)
                    made[meta] = parameter
                setattr(module, name, made[meta])

    def save_pretrained(
        self, folder: str | Path, max_shard_bytes: int = 5 * 10**9, metadata: Mapping[str, str] | None = None
    ) -> None:
        """Write config.json, generation_config.json and safetensors in the released layout into ``folder``.

        ``metadata``: for the header of the safetensors files. A save over another checkpoint that is cut short leaves
        that one, or what is refused when it is loaded, never some tensors of each. Raises :class:`CheckpointError` for
        a model with an adapter that is not merged, and where a file cannot be written.
        """
        if self.parallel is not None:
            raise CheckpointError("save_pretrained: each rank holds a part of the model; load it whole, then save it")
        if adapted(self):
            raise CheckpointError("save_pretrained: the model has an adapter; merge_adapter() first, or save_adapter()")
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {**self.config.to_dict(), "torch_dtype": str(self.dtype).removeprefix("torch.")}
        before = lambda: withdraw_json(folder / "config.json", config)  # noqa: E731
        weights.save_weights(self, folder, max_shard_bytes, metadata, before=before)
        write_json(folder / "config.json", config)
        if self.generation_defaults:
            write_json(folder / "generation_config.json", self.generation_defaults)

    def save_adapter(self, folder: str | os.PathLike[str], base: str | None = None) -> None:
        """Write the adapter in peft's layout into ``folder``; ``base``: name of the checkpoint that it adapts.

        Raises :class:`CheckpointError` for a model without one.
        """
        write_adapter(self, Path(folder), dict(adapter_parameters(self)), base=base)

    def merge_adapter(self) -> Qwen2VL:
        """Add the adapter, if there is one, to the weights, in their dtype; then the model is as any other."""
        merge_layers(self)
        return self

    @property
    def device(self) -> torch.device:
        return self.model.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.embed_tokens.weight.dtype

    # ------------------------------------------------------------------------------------------------------- running

    def encode_media(
        self,
        pixel_values: torch.Tensor | None = None,
        image_grid_thw: torch.Tensor | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        video_grid_thw: torch.Tensor | None = None,
        *,
        graphs: bool | None = None,
    ) -> Features:
        """Vision features of all images and of all videos, ``(tokens, hidden)`` each, from one packed tower call.

        The arguments are those of the model's call. ``graphs``: replay the tower as a CUDA graph, see
        :mod:`qwen2vl.tower_graph`; default where ``QWEN2VL_GRAPHS=1`` is set and it can be. Raises :class:`PromptError`
        when patches and grids disagree, and :class:`Qwen2VLError` for graphs that are asked for and cannot be.
        """
        given = (pixel_values, image_grid_thw, pixel_values_videos, video_grid_thw)
        return self.encode_patches(check_media(self.config.vision, *given), graphs)

    def encode_patches(self, media: Sequence[Patches], graphs: bool | None = None) -> Features:
        """As :meth:`encode_media`, of patches that :mod:`qwen2vl.checks` has checked."""
        if not media:
            return None, None

        def encode(media: Sequence[Patches]) -> torch.Tensor:
            run = replayed(self, graphs) if self.parallel is None else self.parallel.spread(self.visual)
            return self.visual(media, max_patches=self.max_vision_patches, encode=run)

        tokens = encode(media) if self.kept_features is None else self.kept_features.encode(self, media, encode)
        parts = tokens.split([one.tokens for one in media])
        found = {one.kind: part for one, part in zip(media, parts, strict=True)}
        return found.get("image"), found.get("video")

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_grid_thw: torch.Tensor | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        video_grid_thw: torch.Tensor | None = None,
        *,
        position_ids: torch.Tensor | None = None,
        mm_token_type_ids: torch.Tensor | None = None,
        features: Features | None = None,
        cache: KVCache | None = None,
        last_only: bool = False,
    ) -> torch.Tensor:
        """Logits of every token.

        Padding is cut away before the first layer and sequences run packed, so pads cost nothing and influence
        nothing, on either side. All arguments are checked before anything runs.

        Args:
            input_ids: ``(B, L)`` integers; each image or video stands as as many placeholder ids as it has tokens.
            attention_mask: ``(B, L)``, 0 marks padding anywhere; default no padding.
            pixel_values, pixel_values_videos: ``(patches, 1176)`` uint8 pixels, or floats normalised as transformers
                does; for images also ``(patches, 588)`` uint8, one of a still image's two equal frames. All items of
                the batch in order of appearance.
            image_grid_thw, video_grid_thw: ``(items, 3)``.
            position_ids: ``(3, B, L)``, default built from ids, grids and cache (arXiv 2409.12191, section 2.1).
            mm_token_type_ids: taken because transformers' processors return it, and not needed: the ids say it.
            features: the result of :meth:`encode_media`, to encode apart from the language model; the grids are
                still needed.
            cache: keys and values of earlier tokens; the new tokens are appended. New media continue at the
                position where the cache ends.
            last_only: only the last token of each sequence.

        Returns ``(B, L, vocab)``, zero at padding, or ``(B, 1, vocab)``, in the model's dtype. Raises
        :class:`PromptError` when placeholders, grids, pixels or features disagree, and :class:`ContextLengthError` when
        the cache has too little room.
        """
        call = check_call(
            self.config,
            input_ids,
            attention_mask,
            pixel_values,
            image_grid_thw,
            pixel_values_videos,
            video_grid_thw,
            position_ids=position_ids,
            features=features,
        )
        if cache is not None and cache.batch != len(call.counts):
            raise PromptError(f"cache holds {cache.batch} sequences, input_ids has {len(call.counts)}")
        if cache is not None and torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters()):
            raise PromptError("cache: keys and values are kept for inference; call the model under torch.no_grad()")
        return self.prefill(call, cache=cache, last_only=last_only)

    def prefill(
        self, call: Call, features: Features | None = None, cache: KVCache | None = None, *, last_only: bool = False
    ) -> torch.Tensor:
        """As calling the model, of inputs that :func:`qwen2vl.checks.check_call` has checked.

        ``features``: of the call's media, where they have been encoded.
        """
        slots = None if cache is None else cache.slots(call.counts)  # refused, if at all, before anything runs
        positions, following = self._positions(call, cache)
        if features is None:
            features = self.encode_patches(call.media) if call.features is None else call.features
        hidden = self._embed(call.packed.to(self.device), features)
        cu_seqlens = torch.tensor([0, *call.counts]).cumsum(0, dtype=torch.int32)  # on the host, as in the tower
        hidden = self._decode(hidden, positions, following, call.counts, cu_seqlens, cache, slots)  # (T, C)
        if last_only:
            return self._head(hidden[(cu_seqlens[1:].long() - 1).to(self.device)]).unsqueeze(1)
        if call.kept is not None:  # widen the hidden states, not the logits, which are a hundred times larger
            places = call.kept.to(self.device)
            hidden = hidden.new_zeros((call.ids.numel(), hidden.shape[1])).index_copy(0, places, hidden)
        return self._head(hidden).unflatten(0, tuple(call.ids.shape))

    def step(self, ids: torch.Tensor, cache: KVCache) -> torch.Tensor:
        """Logits ``(B, 1, vocab)`` that follow one more token of every sequence in ``cache``.

        ``ids (B, 1)`` on the model's device were chosen from this model's logits, so that nothing is checked, and
        nothing is read back from a device. They must be no placeholders. Raises :class:`ContextLengthError` when the
        cache has too little room.
        """
        after = cache.lengths_after_step()
        logits = self.step_on_device(ids, cache, None if cache.asynchronous(self.device) else after)
        cache.lengths = after
        return logits

    def step_on_device(self, ids: torch.Tensor, cache: KVCache, totals: list[int] | None = None) -> torch.Tensor:
        """As :meth:`step`, without the host's part: operations on tensors that stay where they are, whatever the
        lengths, so that they may be captured once and replayed. ``totals``: the tokens of each row with the new one,
        for attention that reads them on the host."""
        seqlens = cache.step_seqlens()
        x = self.model.embed_tokens(ids.flatten())
        if self.model.steps(x):
            # The embedding was an ordinary launch, so that the chain of those that read ahead begins behind it.
            self.model.step(x, cache, seqlens)
            norm = self.model.norm
            logits = rms_norm_linear(x, norm.weight, [self.head_weight], eps=norm.eps, prefetch=True)
            cache.commit_step()
            return logits.unsqueeze(1)
        slots = cache.step_slots(seqlens)
        pack = Pack(cache.next_position.expand(3, -1), cache.inv_freq, [1] * cache.batch, cache.bounds, cache, slots)
        pack.seqlens, pack.totals = seqlens, totals
        hidden = self.model(x, pack)
        cache.commit_step()
        return self._head(hidden).unsqueeze(1)

    def hidden_states(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        cu_seqlens: torch.Tensor,
        features: Features = _NONE,
        router_logits: list[torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """``(T, C)`` normed states of packed ``input_ids (T,)``, what the head is multiplied with; for training.

        ``positions (3, T)``; ``cu_seqlens (S + 1,)`` int32 on the host, bounds of the sequences, none empty;
        ``features`` from :meth:`encode_media`. Raises :class:`PromptError` when they and the placeholders disagree.
        """
        places = placeholders(self.config, input_ids)
        check_features(self.config, features, torch.stack([of_kind.sum() for of_kind in places]).tolist())
        counts = cu_seqlens.diff().tolist()
        pack = Pack(positions, self.model.inv_freq(self.device), counts, cu_seqlens)
        return self.model(self._embed(input_ids, features), pack, router_logits)

    @property
    def head_weight(self) -> torch.Tensor:
        """``(vocab, C)``: the embedding's own where the two are tied."""
        return self.model.embed_tokens.weight if self.config.text.tie_word_embeddings else self.lm_head.weight

    def _head(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = linear(hidden, self.head_weight)
        return logits if self.parallel is None else self.parallel.gather_logits(logits, self.config.text.vocab_size)

    def _embed(self, ids: torch.Tensor, features: Features) -> torch.Tensor:
        """``(T, C)`` embeddings of packed ids on the model's device, features in the places of placeholders."""
        hidden = self.model.embed_tokens(ids)
        for places, rows in zip(placeholders(self.config, ids), features, strict=True):
            if rows is not None:
                hidden = hidden.masked_scatter(places.unsqueeze(1), rows.to(hidden.dtype))
        return hidden

    def _decode(
        self,
        hidden: torch.Tensor,
        positions: torch.Tensor,
        following: torch.Tensor,
        counts: list[int],
        cu_seqlens: torch.Tensor,
        cache: KVCache | None,
        slots: torch.Tensor | None,
    ) -> torch.Tensor:
        """``(T, C)`` embeddings to normed hidden states; their keys and values go to ``slots`` of the cache."""
        totals = None if cache is None else [have + new for have, new in zip(cache.lengths, counts, strict=True)]
        pack = Pack(positions, self.model.inv_freq(self.device), counts, cu_seqlens, cache, slots, totals)
        hidden = self.model(hidden, pack)
        if cache is not None:
            cache.commit(counts, following)
        return hidden

    def _positions(self, call: Call, cache: KVCache | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Packed ``(3, T)`` positions, and the ``(B,)`` position that follows each sequence, on the model's device."""
        position_ids, mask, device = call.position_ids, call.mask, self.device
        if position_ids is None and mask is None and not call.media and cache is not None and any(cache.lengths):
            return self._next_positions(cache, call.ids.shape[1])
        if position_ids is None:
            position_ids, delta = mrope_positions(  # on the host
                call.ids,
                call.grid_thw("image"),
                call.grid_thw("video"),
                mask,
                image_token_id=self.config.image_token_id,
                video_token_id=self.config.video_token_id,
                spatial_merge_size=self.config.vision.spatial_merge_size,
            )
            # delta counts from the number of real tokens.
            position_ids, following = position_ids.to(device), (delta + torch.tensor(call.counts)).to(device)
            if cache is not None:
                position_ids = position_ids + cache.next_position[None, :, None]
                following = following + cache.next_position
        else:
            position_ids = position_ids.to(device)
            real = position_ids if mask is None else position_ids * mask.to(device)
            following = real.amax((0, 2)) + 1
        flat = position_ids.flatten(1)
        return (flat if call.kept is None else flat[:, call.kept.to(device)]), following

    def _next_positions(self, cache: KVCache, new: int) -> tuple[torch.Tensor, torch.Tensor]:
        """As :meth:`_positions`, of ``new`` tokens of plain text behind each sequence in the cache."""
        steps = torch.arange(new, device=self.device)
        positions = (cache.next_position[:, None] + steps).expand(3, -1, -1)
        return positions.flatten(1), cache.next_position + new


def _device(device: torch.device | str | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(device)


def _dtype(dtype: torch.dtype | str) -> torch.dtype:
    if isinstance(dtype, torch.dtype) and dtype in _DTYPES.values():
        return dtype
    if isinstance(dtype, str) and dtype in _DTYPES:
        return _DTYPES[dtype]
    raise CheckpointError(f"dtype must be one of {', '.join(_DTYPES)}, got {dtype!r}")
