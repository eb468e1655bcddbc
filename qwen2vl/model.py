"""Qwen2-VL: the vision tower, the language model and the head in one call that takes transformers' names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from qwen2vl_kernels import mrope_positions

from . import hub, weights
from .cache import KVCache
from .config import Qwen2VLConfig
from .errors import CheckpointError, PromptError
from .files import read_json, write_json
from .layers import Linear
from .text import Decoder, Pack
from .vision import VisionTower

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
        #: generation_config.json as read, for :meth:`qwen2vl.generation.GenerationConfig.from_model`.
        self.generation_defaults: dict = {}

    # ---------------------------------------------------------------------------------------------- making and saving

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        device: torch.device | str | None = None,
        dtype: torch.dtype | str | None = None,
        progress: weights.Progress | None = None,
    ) -> Qwen2VL:
        """Load a checkpoint folder or a hub id.

        Args:
            name_or_path: a folder with config.json and safetensors (released layout, or re-saved by transformers
                4.x or 5.x), or ``"organisation/model"`` on the hub.
            device: default CUDA when there is one, else the CPU.
            dtype: default the checkpoint's own.
            progress: called with (tensors loaded, tensors in all).

        Raises :class:`CheckpointError`, listing every tensor that does not fit.
        """
        folder = hub.resolve(name_or_path)
        config = Qwen2VLConfig.from_pretrained(folder)
        with torch.device("meta"):
            model = cls(config)
        weights.load_weights(
            model,
            folder,
            device=_device(device),
            dtype=_dtype(config.torch_dtype if dtype is None else dtype),
            ignore=("lm_head.weight",) if config.text.tie_word_embeddings else (),
            progress=progress,
        )
        path = folder / "generation_config.json"
        if path.is_file():
            defaults = read_json(path)
            if not isinstance(defaults, dict):
                raise CheckpointError(f"{path}: must hold a JSON object, got {type(defaults).__name__}")
            model.generation_defaults = defaults
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
            model = cls(config).to(dtype)
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

        ``metadata``: for the header of the safetensors files.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {**self.config.to_dict(), "torch_dtype": str(self.dtype).removeprefix("torch.")}
        weights.save_weights(self, folder, max_shard_bytes, metadata)
        write_json(folder / "config.json", config)
        if self.generation_defaults:
            write_json(folder / "generation_config.json", self.generation_defaults)

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
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Vision features of all images and of all videos, ``(tokens, hidden)`` each, from one packed tower call."""
        given = _media(pixel_values, image_grid_thw, pixel_values_videos, video_grid_thw)
        if not given:
            return None, None
        tokens = self.visual(
            [rows for _, rows, _ in given],
            [grid for _, _, grid in given],
            max_patches=self.max_vision_patches,
        )
        if len(given) == 1:
            return (tokens, None) if given[0][0] == "pixel_values" else (None, tokens)
        merge = self.config.vision.spatial_merge_size**2
        image, video = tokens.split([rows.shape[0] // merge for _, rows, _ in given])
        return image, video

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
        features: tuple[torch.Tensor | None, torch.Tensor | None] | None = None,
        cache: KVCache | None = None,
        last_only: bool = False,
    ) -> torch.Tensor:
        """Logits of every token.

        Padding is cut away before the first layer and sequences run packed, so pads cost nothing and influence
        nothing, on either side.

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
        :class:`PromptError` when placeholders, grids and pixels disagree.
        """
        check_input_ids(input_ids, attention_mask)
        batch = input_ids.shape[0]
        if cache is not None and cache.batch != batch:
            raise PromptError(f"cache holds {cache.batch} sequences, input_ids has {batch}")
        if cache is not None and torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters()):
            raise PromptError("cache: keys and values are kept for inference; call the model under torch.no_grad()")
        if features is None:
            _media(pixel_values, image_grid_thw, pixel_values_videos, video_grid_thw)  # refuse before any work
        if attention_mask is None:
            kept, counts = None, [input_ids.shape[1]] * batch
            ids = input_ids.flatten().to(self.device)
        else:
            kept = attention_mask.bool().flatten().nonzero().squeeze(1).to(self.device)
            counts = attention_mask.bool().sum(1).tolist()
            ids = input_ids.to(self.device).flatten()[kept]
        if min(counts) == 0:
            raise PromptError(f"attention_mask: every sequence needs at least one token, got lengths {counts}")

        positions, following = self._positions(
            input_ids, attention_mask, kept, position_ids, image_grid_thw, video_grid_thw, cache
        )
        if features is None:
            features = self.encode_media(pixel_values, image_grid_thw, pixel_values_videos, video_grid_thw)
        hidden = self._embed(ids, features)

        slots = totals = None
        if cache is not None:
            slots = cache.slots(counts)
            totals = [have + new for have, new in zip(cache.lengths, counts, strict=True)]
        cu_seqlens = torch.tensor([0, *counts]).cumsum(0, dtype=torch.int32)  # on the host, as in the tower
        pack = Pack(positions, self.model.inv_freq(self.device), counts, cu_seqlens, cache, slots, totals)
        hidden = self.model(hidden, pack)  # (T, C)
        if cache is not None:
            cache.commit(counts, following)

        if last_only:
            return self._head(hidden[(cu_seqlens[1:].long() - 1).to(self.device)]).unsqueeze(1)
        if kept is not None:  # widen the hidden states, not the logits, which are a hundred times larger
            hidden = hidden.new_zeros((input_ids.numel(), hidden.shape[1])).index_copy(0, kept, hidden)
        return self._head(hidden).unflatten(0, tuple(input_ids.shape))

    def hidden_states(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        cu_seqlens: torch.Tensor,
        features: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None),
    ) -> torch.Tensor:
        """``(T, C)`` normed states of packed ``input_ids (T,)``, what the head is multiplied with; for training.

        ``positions (3, T)``; ``cu_seqlens (S + 1,)`` int32 on the host, bounds of the sequences, none empty;
        ``features`` from :meth:`encode_media`. Raises :class:`PromptError` when they and the placeholders disagree.
        """
        counts = cu_seqlens.diff().tolist()
        pack = Pack(positions, self.model.inv_freq(self.device), counts, cu_seqlens)
        return self.model(self._embed(input_ids, features), pack)

    @property
    def head_weight(self) -> torch.Tensor:
        """``(vocab, C)``: the embedding's own where the two are tied."""
        return self.model.embed_tokens.weight if self.config.text.tie_word_embeddings else self.lm_head.weight

    def _head(self, hidden: torch.Tensor) -> torch.Tensor:
        return F.linear(hidden, self.head_weight)

    def _embed(self, ids: torch.Tensor, features: tuple[torch.Tensor | None, torch.Tensor | None]) -> torch.Tensor:
        hidden = self.model.embed_tokens(ids)  # (T, C)
        tokens = (("image", self.config.image_token_id), ("video", self.config.video_token_id))
        for (kind, token), rows in zip(tokens, features, strict=True):
            places = ids == token
            have = 0 if rows is None else rows.shape[0]
            if (count := int(places.sum())) != have:
                raise PromptError(f"input_ids has {count} {kind} placeholders, the {kind}s given make {have} tokens")
            if rows is not None:
                hidden = hidden.masked_scatter(places.unsqueeze(1), rows.to(hidden.dtype))
        return hidden

    def _positions(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        kept: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        image_grid_thw: torch.Tensor | None,
        video_grid_thw: torch.Tensor | None,
        cache: KVCache | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Packed ``(3, T)`` positions, and the ``(B,)`` position that follows each sequence."""
        given = (position_ids, attention_mask, image_grid_thw, video_grid_thw)
        if cache is not None and any(cache.lengths) and all(x is None for x in given):
            # Plain text after a prompt, the step that decoding repeats.
            steps = torch.arange(input_ids.shape[1], device=self.device)
            position_ids = (cache.next_position[:, None] + steps).expand(3, -1, -1)
            return position_ids.flatten(1), cache.next_position + input_ids.shape[1]
        smallest, largest = (int(x) for x in input_ids.aminmax())
        if smallest < 0 or largest >= self.config.text.vocab_size:
            wrong = smallest if smallest < 0 else largest
            raise PromptError(f"input_ids must be in [0, {self.config.text.vocab_size}), got {wrong}")
        if position_ids is None:
            # On the host, where every placeholder is checked against its grid; a prompt's ids are a few kilobytes.
            host = [x if x is None else x.cpu() for x in (input_ids, image_grid_thw, video_grid_thw, attention_mask)]
            try:
                position_ids, delta = mrope_positions(
                    *host,  # type: ignore[arg-type]
                    image_token_id=self.config.image_token_id,
                    video_token_id=self.config.video_token_id,
                    spatial_merge_size=self.config.vision.spatial_merge_size,
                )
            except (TypeError, ValueError) as error:
                raise PromptError(str(error)) from None
            position_ids, delta = position_ids.to(self.device), delta.to(self.device)
            tokens = input_ids.shape[1] if attention_mask is None else attention_mask.bool().sum(1).to(self.device)
            following = delta + tokens  # delta counts from the number of real tokens
            if cache is not None:
                position_ids = position_ids + cache.next_position[None, :, None]
                following = following + cache.next_position
        else:
            if tuple(position_ids.shape) != (3, *input_ids.shape):
                raise PromptError(
                    f"position_ids must have shape {(3, *input_ids.shape)}, got {tuple(position_ids.shape)}"
                )
            position_ids = position_ids.to(self.device)
            real = position_ids if attention_mask is None else position_ids * attention_mask.to(self.device)
            following = real.amax((0, 2)) + 1
        flat = position_ids.flatten(1)
        return (flat if kept is None else flat[:, kept]), following


def check_input_ids(input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> None:
    """Raise :class:`PromptError` unless both are what the model's call takes."""
    if input_ids.ndim != 2 or input_ids.dtype not in (torch.int64, torch.int32) or not input_ids.numel():
        raise PromptError(
            f"input_ids must be integers of shape (B, L), not empty, got {input_ids.dtype} {tuple(input_ids.shape)}"
        )
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise PromptError(
            f"attention_mask must have input_ids' shape {tuple(input_ids.shape)}, got {tuple(attention_mask.shape)}"
        )


def _media(
    pixel_values: torch.Tensor | None,
    image_grid_thw: torch.Tensor | None,
    pixel_values_videos: torch.Tensor | None,
    video_grid_thw: torch.Tensor | None,
) -> list[tuple[str, torch.Tensor, torch.Tensor]]:
    """The kinds of media that are there, as (name, rows, grids)."""
    given = []
    for name, rows, grid_name, grid in (
        ("pixel_values", pixel_values, "image_grid_thw", image_grid_thw),
        ("pixel_values_videos", pixel_values_videos, "video_grid_thw", video_grid_thw),
    ):
        if (rows is None) != (grid is None):
            raise PromptError(f"{name} and {grid_name} must be given together")
        if rows is None or grid is None:
            continue
        if grid.ndim != 2 or grid.shape[1] != 3 or grid.dtype not in (torch.int64, torch.int32):
            raise PromptError(f"{grid_name} must be integers of shape (n, 3), got {grid.dtype} {tuple(grid.shape)}")
        if rows.shape[0] and not grid.shape[0]:
            raise PromptError(f"{name} has {rows.shape[0]} rows, but {grid_name} has no item")
        if grid.shape[0]:
            given.append((name, rows, grid))
    return given


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
