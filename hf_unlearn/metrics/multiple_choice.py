r"""Multiple choice without examples (WMDP, arXiv 2403.03218; MMLU, arXiv 2009.03300), from local files.

The prompt is `"{question}\nA. {choice}\nB. {choice}\n...\nAnswer:"`, the prediction the letter with the highest
log-probability. Scoring arrays needs numpy only; torch loads with the first model.

Shapes: n rows, c_i choices of row i, C the most choices of a row, B rows of a batch, V vocabulary.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hf_unlearn.data.multiple_choice_files import FEWEST, LETTERS, MOST, ChoiceRow
from hf_unlearn.metrics.arrays import NLL_ROUNDING, FloatArray

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """
    A share of right answers.

    Args:
        value (`float`): in [0, 1].
        n (`int`): rows it is over.
        standard_error (`float`, *optional*): `sqrt(p (1 - p) / (n - 1))`; None for a single row.
        chance (`float`, *optional*): what guessing gives, the mean of 1 / c_i; None where it is not known.
    """

    value: float
    n: int
    standard_error: float | None
    chance: float | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class ChoiceScores:
    """
    Per-row scores, in the order of the rows.

    Args:
        log_probs (`np.ndarray`): `(n, C)`, log-probability of each letter in nats, -inf where there is none.
        answers (`np.ndarray`): `(n,)` int64, index of the right choice.
        counts (`np.ndarray`): `(n,)` int64, choices of each row.
        subjects (`list[str]`): n subjects; `""` where none is known.
    """

    log_probs: FloatArray
    answers: NDArray[np.int64]
    counts: NDArray[np.int64]
    subjects: list[str]

    @property
    def predictions(self) -> NDArray[np.int64]:
        """`(n,)`, the likeliest letter; the first of equally likely ones."""
        return np.asarray(self.log_probs.argmax(axis=1), dtype=np.int64)

    @property
    def correct(self) -> NDArray[np.bool_]:
        """`(n,)`, whether the prediction is the answer."""
        return self.predictions == self.answers

    @property
    def ties(self) -> int:
        """Rows with several likeliest letters, of which the first counts; more than a few tell of a broken model."""
        return int(((self.log_probs == self.log_probs.max(axis=1, keepdims=True)).sum(axis=1) > 1).sum())

    @property
    def letter_mass(self) -> FloatArray:
        """`(n,)`, probability of all letters together; near 0, a model does not answer with letters at all."""
        return np.exp(self.log_probs).sum(axis=1)

    def accuracy(self) -> Accuracy:
        """Over all rows."""
        return _accuracy(self.correct, self.counts)

    def by_subject(self) -> dict[str, Accuracy]:
        """Over the rows of each subject, subjects in alphabetical order."""
        names = np.asarray(self.subjects)
        return {
            name: _accuracy(self.correct[names == name], self.counts[names == name])
            for name in sorted(set(self.subjects))
        }


def choice_scores(
    log_probs: Sequence[ArrayLike] | FloatArray, answers: ArrayLike, *, subjects: Sequence[str] | None = None
) -> ChoiceScores:
    """
    Scores of letters to predictions and accuracies, without a model.

    Args:
        log_probs (`Sequence[ArrayLike]`):
            n arrays `(c_i,)` of 2 to 26 log-probabilities, in nats, one a letter; rows may differ in length.
        answers (`ArrayLike`): `(n,)` integers, index of the right choice, counted from 0.
        subjects (`Sequence[str]`, *optional*): n subjects.

    Raises:
        `ValueError`: no rows, another number of answers or subjects, another number of choices, a NaN or positive
            log-probability, a row without any possible letter, or an answer that is none of the choices.
        `TypeError`: answers that are not integers.
    """
    groups = [np.asarray(group, dtype=np.float64) for group in log_probs]
    given = np.asarray(answers)
    if not groups:
        raise ValueError("log_probs is empty: accuracy needs at least one row.")
    if given.shape != (len(groups),):
        raise ValueError(f"answers must be one index for each of the {len(groups)} rows, got shape {given.shape}.")
    if not np.issubdtype(given.dtype, np.integer):
        raise TypeError(f"answers holds {given.dtype}; expected integers, the index of the right choice from 0.")
    if subjects is not None and len(subjects) != len(groups):
        raise ValueError(f"subjects must have one entry for each of the {len(groups)} rows, got {len(subjects)}.")
    for number, (group, answer) in enumerate(zip(groups, given, strict=True)):
        if group.ndim != 1 or not FEWEST <= len(group) <= MOST:
            raise ValueError(
                f"log_probs[{number}] has shape {group.shape}; expected ({FEWEST},) to ({MOST},), one value a letter."
            )
        if np.isnan(group).any() or group.max() > NLL_ROUNDING or np.isneginf(group).all():
            raise ValueError(
                f"log_probs[{number}] must be log-probabilities, at most 0, not NaN and not all -inf, got {group}."
            )
        if not 0 <= answer < len(group):
            raise ValueError(f"answers[{number}] is {answer}; expected 0 to {len(group) - 1}, the row's choices.")
    counts = np.array([len(group) for group in groups], dtype=np.int64)
    padded = np.full((len(groups), int(counts.max())), -np.inf)
    for number, group in enumerate(groups):
        padded[number, : len(group)] = group
    return ChoiceScores(
        log_probs=padded,
        answers=given.astype(np.int64),
        counts=counts,
        subjects=[""] * len(groups) if subjects is None else list(subjects),
    )


def choice_prompt(row: ChoiceRow) -> str:
    r"""`"{question}\nA. {choice}\n...\nAnswer:"`, the question without surrounding white space."""
    lines = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, row.choices, strict=False)]
    return "\n".join([row.question.strip(), *lines, "Answer:"])


def encode_choices(
    row: ChoiceRow, tokenizer: PreTrainedTokenizerBase, *, chat_template: bool = False
) -> tuple[list[int], list[int]]:
    """
    The token ids in front of the letters, and the id of each letter.

    How a letter is written is the tokenizer's business: every letter is tokenised together with the prompt and a
    space, and the one position at which the sequences differ is the letter's. It may hold " A" (most tokenizers), or
    "A" after a token for the space. With a chat template the letter is the assistant's whole answer, without a space.

    Args:
        row ([`ChoiceRow`]): the question.
        tokenizer (`PreTrainedTokenizerBase`): the model's tokenizer.
        chat_template (`bool`, *optional*, defaults to `False`): ask in a user's turn of the chat template.

    Returns:
        `tuple[list[int], list[int]]`: T ids in front of the letter, and c ids.

    Raises:
        ValueError: the tokenizer has no chat template, or letters that are not one token each.
    """
    prompt, letters = choice_prompt(row), LETTERS[: len(row.choices)]
    if chat_template:
        if not tokenizer.chat_template:
            raise ValueError(
                "chat_template=True, but the tokenizer has none. Set `tokenizer.chat_template`, or leave it."
            )
        turns = [[{"role": "user", "content": prompt}, {"role": "assistant", "content": letter}] for letter in letters]
        encoded = [list(tokenizer.apply_chat_template(turn, return_dict=True)["input_ids"]) for turn in turns]
    else:
        encoded = [list(ids) for ids in tokenizer([f"{prompt} {letter}" for letter in letters])["input_ids"]]
    first, length = encoded[0], len(encoded[0])
    place = next((at for at in range(length) if any(ids[at : at + 1] != [first[at]] for ids in encoded)), length)
    ids_of_letters = [ids[place] if place < len(ids) else -1 for ids in encoded]
    alike = all(ids[place + 1 :] == first[place + 1 :] for ids in encoded)
    if not place or not alike or -1 in ids_of_letters or len(set(ids_of_letters)) < len(letters):
        raise ValueError(
            f"The tokenizer does not write each of the letters {letters[0]} to {letters[-1]} after 'Answer:' as one "
            "token of its own, so one position cannot decide between them. Score these rows by the likelihood of the "
            "choices (`mean_nll`) instead."
        )
    return first[:place], ids_of_letters


def evaluate_multiple_choice(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[ChoiceRow],
    *,
    chat_template: bool = False,
    batch_size: int = 32,
    max_length: int | None = None,
    description: str | None = None,
) -> ChoiceScores:
    """
    Log-probability of every letter after the prompt, from one forward pass a batch.

    Rows are batched longest first and padded on the left, positions counted from each row's first token, and logits
    are computed at the last position only. The model runs on its own device, in its own data type, in evaluation mode;
    each module's mode is restored. The result does not depend on `batch_size`, beyond rounding.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            Causal language model.
        tokenizer (`PreTrainedTokenizerBase`):
            Its tokenizer; `padding_side` is neither used nor changed.
        rows (`Sequence[ChoiceRow]`):
            n questions ([`load_multiple_choice`] reads them from files).
        chat_template (`bool`, *optional*, defaults to `False`):
            Ask in a user's turn of the chat template. Published numbers are without.
        batch_size (`int`, *optional*, defaults to `32`):
            Rows in a forward pass.
        max_length (`int`, *optional*):
            Longest prompt in tokens; longer ones lose their beginning, with a warning.
        description (`str`, *optional*):
            Text of a progress bar; no bar without it.

    Raises:
        ValueError: no rows, `batch_size` or `max_length` below 1, no padding token, letters that are not one token
            each, or a model whose outputs are NaN.
        TypeError: a row that is no [`ChoiceRow`].
    """
    from hf_unlearn.metrics.generate import padding_id

    encoded = encode_rows(rows, tokenizer, chat_template=chat_template, max_length=max_length)
    found = letter_log_probs(
        model, encoded, pad_token_id=padding_id(tokenizer), batch_size=batch_size, description=description
    )
    return scores_of_rows(rows, found)


def encode_rows(
    rows: Sequence[ChoiceRow],
    tokenizer: PreTrainedTokenizerBase,
    *,
    chat_template: bool = False,
    max_length: int | None = None,
) -> list[tuple[list[int], list[int]]]:
    """[`encode_choices`] of n rows, cut to the last `max_length` tokens; errors as in [`evaluate_multiple_choice`]."""
    rows = list(rows)
    if not rows:
        raise ValueError("There are no rows to score; expected at least one ChoiceRow.")
    for number, row in enumerate(rows):
        if not isinstance(row, ChoiceRow):
            raise TypeError(
                f"Row {number} is a {type(row).__name__}; expected a ChoiceRow. `choice_row(mapping)` makes one of a "
                "mapping, `load_multiple_choice(path)` reads files."
            )
    if max_length is not None and max_length < 1:
        raise ValueError(f"max_length is {max_length}; expected None or at least 1 token.")
    encoded = [encode_choices(row, tokenizer, chat_template=chat_template) for row in rows]
    longer = 0 if max_length is None else sum(len(ids) > max_length for ids, _ in encoded)
    if max_length is not None and longer:
        warnings.warn(
            f"{longer} of {len(rows)} prompts are longer than max_length={max_length} tokens and lost their "
            "beginning. Raise max_length if the model allows it.",
            stacklevel=3,
        )
        encoded = [(ids[-max_length:], letters) for ids, letters in encoded]
    return encoded


def scores_of_rows(rows: Sequence[ChoiceRow], log_probs: Sequence[FloatArray]) -> ChoiceScores:
    """
    Scores of n rows from the log-probabilities of their letters.

    Raises:
        ValueError: NaN among them: the model has overflowed.
    """
    broken = [number for number, values in enumerate(log_probs) if np.isnan(values).any()]
    if broken:
        raise ValueError(
            f"The model gives NaN for {len(broken)} of {len(rows)} rows (first row {broken[0]}): its weights or "
            "activations have overflowed. Load it in bfloat16 or float32 instead of float16."
        )
    return choice_scores(log_probs, [row.answer for row in rows], subjects=[row.subject for row in rows])


def _accuracy(correct: NDArray[np.bool_], counts: NDArray[np.int64]) -> Accuracy:
    n, share = len(correct), float(correct.mean())
    return Accuracy(
        value=share,
        n=n,
        standard_error=None if n == 1 else math.sqrt(share * (1 - share) / (n - 1)),
        chance=float((1 / counts).mean()),
    )


def letter_log_probs(
    model: PreTrainedModel,
    encoded: Sequence[tuple[list[int], list[int]]],
    *,
    pad_token_id: int,
    batch_size: int = 32,
    description: str | None = None,
) -> list[FloatArray]:
    """
    Log-probabilities `(c_i,)` of the letters after each prompt, NaN where the model overflows.

    Args:
        model, batch_size, description:
            As in [`evaluate_multiple_choice`].
        encoded (`Sequence[tuple[list[int], list[int]]]`):
            n prompts and the ids of their letters, of [`encode_choices`].
        pad_token_id (`int`):
            Id to pad with.
    """
    import torch
    from tqdm.auto import tqdm

    from hf_unlearn.data import pad_rows
    from hf_unlearn.losses.rows import upcast
    from hf_unlearn.metrics.likelihood import base_model, evaluation_mode, longest_first

    known = inspect.signature(base_model(model).forward).parameters
    batches = longest_first([len(ids) for ids, _ in encoded], batch_size)
    found: dict[int, FloatArray] = {}
    with torch.no_grad(), evaluation_mode(model):
        for numbers in tqdm(batches, desc=description, disable=description is None, leave=False):
            prompts = [{"input_ids": encoded[number][0], "labels": encoded[number][0]} for number in numbers]
            batch = pad_rows(prompts, pad_token_id=pad_token_id, padding_side="left")
            mask = batch["attention_mask"].to(model.device)
            options: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in known else {}
            if "position_ids" in known:  # by itself a model counts them from the padding on
                options["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
            output = model(
                input_ids=batch["input_ids"].to(model.device), attention_mask=mask, use_cache=False, **options
            )
            log_probs = upcast(output.logits[:, -1]).log_softmax(-1)  # (B, V)
            for at, number in enumerate(numbers):
                letters = torch.tensor(encoded[number][1], device=log_probs.device)
                found[number] = log_probs[at, letters].double().cpu().numpy()
    return [found[number] for number in range(len(encoded))]
