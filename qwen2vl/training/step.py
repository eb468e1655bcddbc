"""From a pack to its loss in one module call, the unit that is sharded, replicated and compiled."""

from __future__ import annotations

import torch
from torch import nn

from ..model import Qwen2VL
from ..moe import SparseMoE, load_balancing_loss
from .loss import sample_losses, summed_loss
from .packing import Batch


class TrainingStep(nn.Module):
    """``step(batch, scale)``: ``scale`` times the summed loss of a pack's supervised tokens; where routers learn, plus
    ``share`` times their load-balancing loss over the pack's tokens, weighted by ``router_aux_loss_coef``.

    A module of its own because sharding gathers parameters when a module is called: inside this call the head's weight
    is whole for the loss, which does not go through the head's own forward.
    """

    def __init__(self, model: Qwen2VL, *, loss: str = "chunked", chunk_rows: int | None = None) -> None:
        super().__init__()
        self.model = model
        self.loss = loss
        self.chunk_rows = chunk_rows

    def forward(self, batch: Batch, scale: float = 1.0, share: float = 1.0, *, by_sample: bool = False) -> torch.Tensor:
        """A scalar, or with ``by_sample`` the ``(S,)`` losses of the samples, unscaled and without gradients."""
        features, logits = self._features(batch), []
        hidden = self.model.hidden_states(batch.input_ids, batch.positions, batch.cu_seqlens, features, logits)
        weight = self.model.head_weight
        if by_sample:
            return sample_losses(hidden, weight, batch.targets, batch.cu_seqlens, chunk_rows=self.chunk_rows)
        loss = summed_loss(hidden, weight, batch.targets, scale=scale, kind=self.loss, chunk_rows=self.chunk_rows)
        moe = self.model.config.text.moe
        if moe is None or not moe.router_aux_loss_coef or not self._routers_learn():
            return loss
        return loss + share * moe.router_aux_loss_coef * load_balancing_loss(logits, moe.num_experts_per_tok)

    def _routers_learn(self) -> bool:
        routers = (one.gate for one in self.model.modules() if isinstance(one, SparseMoE))
        return any(parameter.requires_grad for router in routers for parameter in router.parameters())

    def _features(self, batch: Batch) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """All images and videos in one call of the tower; a frozen tower keeps nothing for a backward."""
        trained = any(p.requires_grad for p in self.model.visual.parameters())
        with torch.set_grad_enabled(trained and torch.is_grad_enabled()):
            return self.model.encode_media(
                batch.pixel_values, batch.image_grid_thw, batch.pixel_values_videos, batch.video_grid_thw
            )
