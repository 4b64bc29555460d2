"""Scores a model on question-answer rows with paraphrases and wrong answers, as TOFU does (arXiv 2401.06121)."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hf_unlearn.data import tokenize_example, tokenize_prompt
from hf_unlearn.metrics.generate import greedy, padding_id
from hf_unlearn.metrics.likelihood import mean_nll
from hf_unlearn.metrics.parts import TofuPart, checked_rows, evenly_spaced
from hf_unlearn.metrics.scores import FORGET, RETAIN, PartScores, TofuScores

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from hf_unlearn.metrics.arrays import FloatArray

__all__ = ["PartScores", "TofuScores", "evaluate_part", "evaluate_tofu", "evenly_spaced"]


def evaluate_tofu(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    forget: Dataset | Sequence[Mapping[str, Any]],
    retain: Dataset | Sequence[Mapping[str, Any]],
    general: Mapping[str, Dataset | Sequence[Mapping[str, Any]]] | None = None,
    retain_limit: int | None = None,
    generate: bool = True,
    max_new_tokens: int = 200,
    batch_size: int = 32,
    max_length: int = 1024,
    description: str | None = None,
) -> TofuScores:
    """
    Scores a model on the forget set, the retain set and general knowledge.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            Causal language model.
        tokenizer (`PreTrainedTokenizerBase`):
            Its tokenizer.
        forget (`Dataset` or `Sequence[Mapping]`):
            Rows of [`evaluate_part`]; TOFU's `forget10_perturbed`.
        retain (`Dataset` or `Sequence[Mapping]`):
            TOFU's `retain_perturbed`.
        general (`Mapping[str, Dataset]`, *optional*):
            Parts by name, scored with the normalised probability: TOFU's `real_authors_perturbed` and
            `world_facts_perturbed`.
        retain_limit (`int`, *optional*):
            Scores only so many retain rows, evenly spaced.
        generate (`bool`, *optional*, defaults to `True`):
            Whether answers are generated; without them there is no ROUGE and no model utility.
        max_new_tokens, batch_size, max_length:
            As in [`evaluate_part`].
        description (`str`, *optional*):
            Text in front of the progress bars; no bars without it.

    Raises:
        ValueError: a general part named `"forget"` or `"retain"`, or any reason of [`evaluate_part`].
    """
    general = dict(general or {})
    taken = sorted({FORGET, RETAIN} & set(general))
    if taken:
        raise ValueError(f"general has a part named {taken[0]!r}; expected names other than 'forget' and 'retain'.")
    parts = {
        name: evaluate_part(
            model,
            tokenizer,
            rows,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            generate=generate,
            max_length=max_length,
            normalised=name in general,
            limit=retain_limit if name == RETAIN else None,
            description=None if description is None else f"{description} {name}",
        )
        for name, rows in {FORGET: forget, RETAIN: retain, **general}.items()
    }
    return TofuScores(parts=parts)


def evaluate_part(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset | Sequence[Mapping[str, Any]],
    *,
    max_new_tokens: int = 200,
    batch_size: int = 32,
    generate: bool = True,
    max_length: int = 1024,
    normalised: bool = False,
    limit: int | None = None,
    description: str | None = None,
) -> PartScores:
    """
    Probability, truth ratio and ROUGE of each row.

    Every answer, paraphrase and wrong answer of all rows is scored in one pass by [`mean_nll`]; prompts and labels are
    those of [`tokenize_example`], as in training. The result does not depend on `batch_size`.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            Causal language model.
        tokenizer (`PreTrainedTokenizerBase`):
            Its tokenizer; the chat template is used if it has one.
        rows (`Dataset` or `Sequence[Mapping]`):
            n rows with `question` and `answer`. Further columns are used if all rows have them: `perturbed_answer`
            (`list[str]`, for the truth ratio), `paraphrased_answer` (the truth ratio's correct answer; else `answer`)
            and `paraphrased_question`.
        max_new_tokens (`int`, *optional*, defaults to `200`):
            Longest generated answer in tokens.
        batch_size (`int`, *optional*, defaults to `32`):
            Sequences of a forward pass; twice as many prompts are answered at once.
        generate (`bool`, *optional*, defaults to `True`):
            Whether to generate answers and take their ROUGE-L recall.
        max_length (`int`, *optional*, defaults to `1024`):
            Longest prompt and answer in tokens; longer answers are cut with a warning.
        normalised (`bool`, *optional*, defaults to `False`):
            Whether `probability` is p_true / (p_true + sum_k p_wrong_k) over `perturbed_answer`.
        limit (`int`, *optional*):
            Scores only so many rows, those that [`evenly_spaced`] names.
        description (`str`, *optional*):
            Text in front of the progress bars; no bars without it.

    Raises:
        ValueError: no rows, a missing or partly filled column, an empty list of wrong answers, an `index` that several
            rows have, or an answer of which `max_length` leaves nothing.
        TypeError: a column with something other than text.
    """
    chosen = checked_rows([rows[index] for index in evenly_spaced(len(rows), limit)])
    if normalised and "perturbed_answer" not in chosen[0]:
        raise ValueError(
            f"normalised=True needs a `perturbed_answer` column, the rows have {sorted(chosen[0])}. Use a *_perturbed "
            "split, or normalised=False."
        )
    part = TofuPart(rows=chosen, normalised=normalised)
    nll = _score(model, tokenizer, part.texts, max_length=max_length, batch_size=batch_size, description=description)
    generations = None
    if generate:
        generations = greedy(
            model,
            tokenizer,
            [tokenize_prompt({"question": row["question"], "answer": row["answer"]}, tokenizer) for row in chosen],
            max_new_tokens=max_new_tokens,
            batch_size=2 * batch_size,
            description=None if description is None else f"{description}: answers",
        )
    return part.scores(nll, generations)


def _score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[tuple[str, str]],
    *,
    max_length: int,
    batch_size: int,
    description: str | None,
) -> FloatArray:
    """Mean NLL of each answer after its question."""
    encoded = [tokenize_example({"question": question, "answer": answer}, tokenizer) for question, answer in pairs]
    longer = [number for number, row in enumerate(encoded) if len(row["input_ids"]) > max_length]
    if longer:
        warnings.warn(
            f"{len(longer)} of {len(encoded)} sequences are longer than max_length={max_length} tokens and were cut: "
            "their scores are about the beginning of the answer only. Raise max_length if the model allows it.",
            stacklevel=3,
        )
    return mean_nll(
        model,
        [{name: ids[:max_length] for name, ids in row.items()} for row in encoded],
        pad_token_id=padding_id(tokenizer),
        batch_size=batch_size,
        description=None if description is None else f"{description}: likelihood",
    )
