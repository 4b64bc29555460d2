"""The steps that are timed: primal-dual, NPO and plain fine-tuning, through the fused head or through whole logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from hf_unlearn.losses.scores import Scores
from hf_unlearn.trainers.forward import ModelForward
from hf_unlearn.trainers.objective import ForgetBatch, ForgetObjective, ForgetTarget, retain_loss, targeted_forget_loss


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A model and a batch: `rows` forget rows and as many retain rows, the first half of each a prompt."""

    name: str
    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    rows: int
    tokens: int
    tied: bool = True


ISSUE = Shape(
    name="d512-L4-V128k",
    vocabulary=128_256,
    hidden=512,
    intermediate=1_376,
    layers=4,
    heads=8,
    kv_heads=8,
    rows=8,
    tokens=128,
)
LLAMA_1B = Shape(
    name="Llama-3.2-1B",
    vocabulary=128_256,
    hidden=2_048,
    intermediate=8_192,
    layers=16,
    heads=32,
    kv_heads=8,
    rows=16,
    tokens=256,
)
LLAMA_8B = Shape(
    name="Llama-3.1-8B",
    vocabulary=128_256,
    hidden=4_096,
    intermediate=14_336,
    layers=32,
    heads=32,
    kv_heads=8,
    rows=8,
    tokens=256,
    tied=False,
)


def build(shape: Shape, dtype: torch.dtype, device: str, *, lora: bool = False) -> Any:
    """A model of this shape with random weights; with `lora` only an adapter (r = 16, all linear layers) is trained."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=2_048,
        tie_word_embeddings=shape.tied,
        pad_token_id=0,
    )
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(config)
    finally:
        torch.set_default_dtype(previous)
    return get_peft_model(model, LoraConfig(r=16, target_modules="all-linear")) if lora else model


def model_flops(model: Any, shape: Shape, *, lora: bool) -> float:
    """
    Floating-point operations of a step by the usual count: 6 for each weight and token (4 where the base is frozen),
    the head at every position. What a form saves shows as utilisation.
    """
    weights = sum(value.numel() for name, value in model.named_parameters() if "lora_" not in name)
    if not shape.tied:
        weights -= shape.vocabulary * shape.hidden  # looking up an embedding multiplies nothing
    return (4.0 if lora else 6.0) * weights * 2 * shape.rows * shape.tokens


def batch(shape: Shape, device: str) -> list[dict[str, Tensor]]:
    """A forget and a retain batch without padding, half of the positions masked."""
    generator = torch.Generator().manual_seed(1)
    parts = []
    for _ in range(2):
        ids = torch.randint(1, shape.vocabulary, (shape.rows, shape.tokens), generator=generator)
        labels = ids.clone()
        labels[:, : shape.tokens // 2] = -100
        ahead = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
        part = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "labels": labels,
            "response_positions": (ahead != -100).flatten().nonzero().squeeze(-1),
        }
        parts.append({key: value.to(device) for key, value in part.items()})
    return parts


def steps(model: Any, parts: list[dict[str, Tensor]]) -> dict[str, Callable[[], Tensor]]:
    """
    Forward and backward of each form on the same tokens; every call returns its detached loss.

    "plain" is the textbook form on `(B, T, V)` logits: the token cross-entropy as transformers computes it, and LMF at
    every position, masked afterwards. "whole logits" is this library without the fused head: it gathers the response
    positions first. `primal_dual` is the default: LMF with a token gate, plus a multiplier times the retain loss. `sft` is the
    cross-entropy over both batches, `npo` has cached reference log-probabilities.
    """
    forwards = {"fused": ModelForward(model), "whole logits": ModelForward(model, fused=False)}
    with torch.no_grad():
        scores = forwards["fused"](model, parts)[0]
        cached = scores.row_sums(scores.log_probs())

    def run(forward: ModelForward, loss: Callable[[list[Scores]], Tensor]) -> Tensor:
        model.zero_grad(set_to_none=True)
        value = loss(forward(model, parts))
        value.backward()
        return value.detach()

    def primal_dual(scores: list[Scores]) -> Tensor:
        target = ForgetTarget(level=1e3, by="token")  # above every NLL: all positions are flattened, the dearest case
        forget = targeted_forget_loss(ForgetObjective(name="lmf"), ForgetBatch(scores=scores[0]), target)
        return forget.loss + 1.7 * retain_loss("nll", scores[1], None).loss

    def npo(scores: list[Scores]) -> Tensor:
        forget = ForgetObjective(name="npo")(ForgetBatch(scores=scores[0], ref_logps=cached))
        return forget.loss + retain_loss("nll", scores[1], None).loss

    def sft(scores: list[Scores]) -> Tensor:
        return retain_loss("nll", scores[0], None).loss + retain_loss("nll", scores[1], None).loss

    def plain(loss: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        model.zero_grad(set_to_none=True)
        stacked = {key: torch.cat([part[key] for part in parts]) for key in ("input_ids", "attention_mask", "labels")}
        labels = stacked.pop("labels")
        value = loss(model(**stacked, use_cache=False).logits, labels)
        value.backward()
        return value.detach()

    def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)

    def plain_primal_dual(logits: Tensor, labels: Tensor) -> Tensor:
        rows = len(parts[0]["labels"])
        z, following = logits[:rows, :-1].float(), labels[:rows, 1:]
        mask = following != -100
        with torch.no_grad():
            nll = -z.log_softmax(-1).gather(-1, following.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        squared = (z.max(-1).values - z.mean(-1)).square()
        forget = (squared * mask * (nll < 1e3)).sum() / mask.sum()
        return forget + 1.7 * cross_entropy(logits[rows:], labels[rows:])

    def plain_npo(logits: Tensor, labels: Tensor) -> Tensor:
        rows = len(parts[0]["labels"])
        logp, following = logits[:rows, :-1].float().log_softmax(-1), labels[:rows, 1:]
        chosen = logp.gather(-1, following.clamp(min=0).unsqueeze(-1)).squeeze(-1) * (following != -100)
        forget = -(2.0 / 0.1) * F.logsigmoid(-0.1 * (chosen.sum(-1) - cached)).mean()
        return forget + cross_entropy(logits[rows:], labels[rows:])

    def plain_sft(logits: Tensor, labels: Tensor) -> Tensor:
        rows = len(parts[0]["labels"])
        return cross_entropy(logits[:rows], labels[:rows]) + cross_entropy(logits[rows:], labels[rows:])

    losses = {"primal-dual": primal_dual, "npo": npo, "sft": sft}
    naive = {"primal-dual": plain_primal_dual, "npo": plain_npo, "sft": plain_sft}
    forms: dict[str, Callable[[], Tensor]] = {f"{name}, plain": partial(plain, loss) for name, loss in naive.items()}
    return forms | {
        f"{name}, {way}": partial(run, forward, loss)
        for name, loss in losses.items()
        for way, forward in forwards.items()
    }
