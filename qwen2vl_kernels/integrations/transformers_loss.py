"""Training losses of transformers' Qwen2-VL, Qwen2.5-VL and Qwen3-VL without the logits.

Stock's own forward runs, for a stand-in of the model whose head hands the hidden states on and whose loss computes
both. So what goes to the language model, to the loss and into the output is what that version of transformers says.
``logits`` of the output is ``None`` then, as with Liger's kernel of this kind.

Stock's forward runs untouched in evaluation, without labels, where more of the output is asked for (``logits_to_keep``,
``output_hidden_states``, ``output_attentions``, ``return_dict=False``), with a loss function of the user's, and where
the head is not a plain linear layer with its whole weight: adapted (LoRA, ``modules_to_save``), quantised, offloaded,
sharded by itself, hooked.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..ops.linear_cross_entropy import linear_cross_entropy
from ._modules import parameters_after, plain


class _Headless:
    """A model as its class's forward sees it: all its attributes, but for the head and the loss function."""

    def __init__(self, model: Any) -> None:
        self.whole = model
        self.handed_on: torch.Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.whole, name)

    def lm_head(self, hidden_states: torch.Tensor) -> torch.Tensor:
        self.handed_on = hidden_states
        return hidden_states

    def loss_function(
        self,
        logits: torch.Tensor,
        labels: torch.Tensor,
        vocab_size: int,
        num_items_in_batch: torch.Tensor | int | None = None,
        ignore_index: int = -100,
        shift_labels: torch.Tensor | None = None,
        **_: Any,
    ) -> torch.Tensor:
        """``ForCausalLMLoss`` of transformers, its ``logits`` being the hidden states ``(B, L, C)``."""
        if logits is not self.handed_on:
            raise RuntimeError(
                "loss: this version of transformers computes with the logits before its loss function sees them; "
                "apply the other features alone"
            )
        if shift_labels is None:
            shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        head, rows = self.whole.lm_head, logits.flatten(0, -2)
        reduction = "mean" if num_items_in_batch is None else "sum"
        loss = linear_cross_entropy(
            rows, head.weight, shift_labels.reshape(-1).to(rows.device), head.bias,
            ignore_index=ignore_index, reduction=reduction,
        )  # fmt: skip
        if num_items_in_batch is None:
            return loss
        return loss / (
            num_items_in_batch.to(loss.device) if torch.is_tensor(num_items_in_batch) else num_items_in_batch
        )


def causal_lm(stock: Callable) -> Callable:
    """``forward`` of the model with its head, which computes the training loss in chunks where all is stock's."""
    from transformers.loss.loss_utils import ForCausalLMLoss

    names = parameters_after(stock, 1)

    def fits(model: Any, given: dict[str, Any]) -> bool:
        labels, kept = given.get("labels"), given.get("logits_to_keep", 0)
        if not model.training or labels is None or labels.dtype != torch.int64 or torch.is_tensor(kept) or kept:
            return False
        for name in ("output_hidden_states", "output_attentions"):  # which 4.57 collects by the class of what runs
            asked = given.get(name)
            if getattr(model.config, name, False) if asked is None else asked:
                return False
        if given.get("return_dict") is False or not model.config.return_dict:
            return False
        return model.loss_function is ForCausalLMLoss and _plain_head(
            model.lm_head, model.config.text_config.vocab_size
        )

    @wraps(stock)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not fits(self, dict(zip(names, args, strict=False)) | kwargs):
            return stock(self, *args, **kwargs)
        output = stock(_Headless(self), *args, **kwargs)
        return type(output)(**{name: value for name, value in output.items() if name != "logits"})

    return forward


def _plain_head(head: nn.Module, vocabulary: int) -> bool:
    """Whether nothing is lost by reading the head's parameters instead of calling it."""
    if not plain(head, nn.Linear) or head._backward_hooks or head._backward_pre_hooks:
        return False
    weight: Any = head.weight
    return type(weight) in (nn.Parameter, torch.Tensor) and weight.ndim == 2 and weight.shape[0] == vocabulary
