"""How likely a model finds given responses: one mean negative log-likelihood a row.

Shapes: n rows, B rows of a batch, T tokens, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm.auto import tqdm

from hf_unlearn.data import pad_rows
from hf_unlearn.losses import IGNORE_INDEX, token_log_probs
from hf_unlearn.metrics.arrays import FloatArray

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


@contextmanager
def evaluation_mode(model: torch.nn.Module) -> Iterator[None]:
    """Puts every module into evaluation mode and gives each its own mode back: some may have been frozen in eval."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def longest_first(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """
    Batches of row numbers by falling length (ties by number): little padding, and what does not fit into memory fails
    in the first batch.

    Raises:
        ValueError: `batch_size` is below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; expected at least 1.")
    order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


@torch.no_grad()
def mean_nll(
    model: PreTrainedModel,
    rows: Sequence[Mapping[str, Any]],
    *,
    pad_token_id: int,
    batch_size: int = 32,
    description: str | None = None,
) -> FloatArray:
    """
    Mean of `-log p(token)` over the response tokens of each row, in nats.

    The rows are scored longest first and padded on the right. Logits exist only from the first response position of a
    batch on, and log-probabilities only at response positions. The model runs on its own device, in its own data
    type, without gradients, in evaluation mode; each module's mode is restored.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            Causal language model.
        rows (`Sequence[Mapping]`):
            n rows with `input_ids` and `labels`, lists of one length, labels -100 outside the response (what
            [`tokenize_example`] returns).
        pad_token_id (`int`):
            Id to pad with; may be the id of EOS.
        batch_size (`int`, *optional*, defaults to `32`):
            Rows in a forward pass.
        description (`str`, *optional*):
            Text of a progress bar; no bar without it.

    Returns:
        `np.ndarray`: `(n,)` float64, in the order of `rows`.

    Raises:
        ValueError: no rows, a row without response tokens, no padding id, or a model whose outputs are NaN.
    """
    rows = list(rows)
    if not rows:
        raise ValueError("There are no rows to score; expected at least one.")
    if pad_token_id is None:
        raise ValueError("pad_token_id is None. Set `tokenizer.pad_token = tokenizer.eos_token` and pass its id.")
    for number, row in enumerate(rows):
        # the first token of a sequence has nothing before it that could predict it
        if all(label == IGNORE_INDEX for label in row["labels"][1:]):
            raise ValueError(
                f"Row {number} has no response token to score ({len(row['input_ids'])} tokens, all labels -100). Drop "
                "it, or raise max_length if truncation cut the response off."
            )
    values = np.empty(len(rows), dtype=np.float64)
    batches = longest_first([len(row["input_ids"]) for row in rows], batch_size)
    options = {"logits_to_keep"} & set(inspect.signature(base_model(model).forward).parameters)
    with evaluation_mode(model):
        for numbers in tqdm(batches, desc=description, disable=description is None, leave=False):
            batch = pad_rows([rows[number] for number in numbers], pad_token_id=pad_token_id)
            values[numbers] = _batch_nll(model, batch, options).numpy()
    if np.isnan(values).any():
        raise ValueError(
            f"The model gives NaN for {np.isnan(values).sum()} of {len(rows)} rows (first row "
            f"{np.flatnonzero(np.isnan(values))[0]}): its weights or activations have overflowed. Lower the learning "
            "rate, or load it in bfloat16 or float32 instead of float16."
        )
    return values


def _batch_nll(model: PreTrainedModel, batch: dict[str, Tensor], options: set[str]) -> Tensor:
    """Mean NLL `(B,)` float64 on the CPU."""
    labels = batch["labels"]
    first = int((labels[:, 1:] != IGNORE_INDEX).any(0).nonzero()[0])  # the first position that predicts a response
    kept = labels.shape[1] - first
    logits = model(
        input_ids=batch["input_ids"].to(model.device),
        attention_mask=batch["attention_mask"].to(model.device),
        use_cache=False,
        **dict.fromkeys(options, kept),
    ).logits
    logps, mask = token_log_probs(logits[:, -kept:], labels[:, -kept:].to(logits.device))
    return -logps.cpu().double().sum(-1) / mask.sum(-1).cpu()


def base_model(model: PreTrainedModel) -> PreTrainedModel:
    """The model inside PEFT's wrapper, whose own `forward` names no argument beyond the common ones."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
