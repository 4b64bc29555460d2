"""One forward pass over several batches, up to the scores of their response positions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

from ..losses.fused import WeightTap
from ..losses.head import OutputHead
from ..losses.scores import FullScores, FusedScores, Scores
from .sharding import is_collective, unshard, whole_weights

logger = logging.get_logger(__name__)

# Largest difference of a log-probability that rounding explains, in nats, by the width of the model's numbers.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 0.15, torch.float16: 0.05}


class ModelForward:
    """
    The forward pass of a causal language model, with the output head on response positions only.

    Hidden states are taken where the model hands them to its head, so that any decoder works; what its config says
    about scaling and capping logits is applied afterwards, and [`check`] compares the result with the model's own
    logits before the first step.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            The model, before the engine wraps it.
        fused (`bool`, *optional*, defaults to `True`):
            Whether to go around the model's own head at all.
        chunk_size (`int`, *optional*):
            Rows of logits at once; see [`OutputHead`].
    """

    def __init__(self, model: Any, *, fused: bool = True, chunk_size: int | None = None) -> None:
        self.head = output_head(model, chunk_size) if fused else None

    def __call__(self, model: Any, parts: Sequence[Mapping[str, Any]]) -> list[Scores]:
        """
        Scores of every part, from one forward pass: every engine sees one forward for one backward.

        Args:
            model (`Module`):
                The model as the engine wrapped it.
            parts (`Sequence[Mapping]`):
                Batches with `input_ids`, `attention_mask` and `labels` `(B_i, T_i)`, padded on the right, and
                `response_positions` `(N_i,)` where the collator counted them.
        """
        if self.head is None:
            logits = _split(_forward(model, parts), parts)
            return [FullScores(*arguments) for arguments in _with_labels(logits, parts)]
        with _hidden_states(self.head.module) as taken:
            _forward(model, parts)
        if len(taken) != 1:
            raise RuntimeError(
                f"The model called its output head {len(taken)} times in one forward pass; expected once. "
                "Set fused_head=False."
            )
        unshard(model, self.head.module)
        hidden = _split(taken[0], parts)
        tap = self._tap()
        return [FusedScores(self.head, *arguments, tap=tap) for arguments in _with_labels(hidden, parts)]

    def _tap(self) -> WeightTap | None:
        """One buffer for the gradient of the head's weight; not under ZeRO-3, where the weight is whole by turns."""
        linear = None if self.head is None else self.head.linear
        if linear is None or not linear.weight.requires_grad or not torch.is_grad_enabled() or is_collective(linear):
            return None
        return WeightTap(linear.weight)

    @torch.no_grad()
    def check(self, model: Any, part: Mapping[str, Any], accelerator: Any) -> None:
        """
        Compares both ways on one batch `(B, T)`; where they differ on any rank, all ranks use whole logits from then
        on, with one warning.
        """
        if self.head is None:
            return
        was_training = model.training
        model.eval()
        reason = "on another rank"
        try:
            # Both forward passes run on every rank, whatever comes out: sharded engines need all of them.
            logits = _forward(model, [part])
            wanted = FullScores(logits, part["labels"], part.get("response_positions")).log_probs()
            try:
                found: Tensor | None = self(model, [part])[0].log_probs()
            except (RuntimeError, TypeError, IndexError, AttributeError) as error:
                found, reason = None, f"{type(error).__name__}: {error}"
        finally:
            model.train(was_training)
        worst = float("inf")
        if found is not None:  # a broken model is not the head's fault: NaN is reported where it is measured
            worst = float((found.to(wanted) - wanted).abs().nan_to_num(nan=0.0).amax()) if len(wanted) else 0.0
        tolerance = _TOLERANCE.get(_working_dtype(logits), 1e-3)
        bad = torch.tensor([0.0 if worst <= tolerance else 1.0], device=accelerator.device)
        if accelerator.num_processes > 1:
            bad = accelerator.reduce(bad, reduction="sum")
        if bad.item():
            if found is not None:
                reason = f"log-probabilities differ by up to {worst:.3g} nats"
            self.head = None
            logger.warning_once(
                f"The output head is unusual ({reason}), so losses are computed from whole logits: more memory, the "
                "same result. fused_head=False silences this."
            )


def _working_dtype(logits: Tensor) -> torch.dtype:
    # accelerate hands out float32 copies of what autocast has computed in half
    device = logits.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else logits.dtype


def output_head(model: Any, chunk_size: int | None = None) -> OutputHead:
    """The head of a causal language model, with the scale and the cap that its config names."""
    config = model.config.get_text_config()
    scale = float(getattr(config, "logit_scale", None) or 1.0)
    divisor = float(getattr(config, "logits_scaling", None) or 1.0)
    cap = getattr(config, "final_logit_softcapping", None)
    module = model.get_output_embeddings()
    return OutputHead(
        module=module,
        whole=lambda: whole_weights(module),
        sharded=lambda: is_collective(module),
        scale=scale / divisor,
        cap=None if cap is None else float(cap),
        chunk_size=chunk_size,
    )


@contextmanager
def _hidden_states(head: torch.nn.Module) -> Iterator[list[Tensor]]:
    """Collects what the head is called with, and lets it compute a single position."""
    taken: list[Tensor] = []

    def take(module: torch.nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        taken.append(arguments[0])
        return (arguments[0][:1, :1], *arguments[1:])

    # first of all hooks: DeepSpeed's would tie the hidden states to a backward pass of the head that does not come
    handle = head.register_forward_pre_hook(take, prepend=True)
    try:
        yield taken
    finally:
        handle.remove()


def _forward(model: Any, parts: Sequence[Mapping[str, Any]]) -> Tensor:
    width = max(part["input_ids"].shape[1] for part in parts)

    def stack(key: str) -> Tensor:
        return torch.cat([torch.nn.functional.pad(part[key], (0, width - part[key].shape[1])) for part in parts])

    return model(input_ids=stack("input_ids"), attention_mask=stack("attention_mask"), use_cache=False).logits


def _split(values: Tensor, parts: Sequence[Mapping[str, Any]]) -> list[Tensor]:
    rows = values.split([part["input_ids"].shape[0] for part in parts])
    return [chunk[:, : part["input_ids"].shape[1]] for chunk, part in zip(rows, parts, strict=True)]


def _with_labels(values: Sequence[Any], parts: Sequence[Mapping[str, Any]]) -> Iterator[tuple[Any, Tensor, Any]]:
    for value, part in zip(values, parts, strict=True):
        yield value, part["labels"], part.get("response_positions")
