"""MUSE (arXiv 2407.06460): verbatim memorisation, knowledge memorisation and privacy leakage, from lists of rows.

Shapes: n rows of a part, m held-out texts.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from hf_unlearn.metrics.arrays import FloatArray, rows
from hf_unlearn.metrics.functional import mia_auc, privleak, rouge_l_f1
from hf_unlearn.metrics.generate import greedy, padding_id
from hf_unlearn.metrics.membership_scores import min_k_scores
from hf_unlearn.metrics.token_scores import score_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

STOP_STRINGS = ("\n\n", "\nQuestion", "Question:")


@dataclass(frozen=True, kw_only=True, eq=False)
class MemorizationScores:
    """
    ROUGE-L F1 of what a model generates against what it was trained on, row by row, in the order of the rows.

    Args:
        rouge (`np.ndarray`): `(n,)`, in [0, 1] (MUSE's tables show 100 times its mean).
        generations (`list[str]`): n answers or continuations, as they were scored.
        references (`list[str]`): n expected texts, as they were scored.
    """

    rouge: FloatArray
    generations: list[str]
    references: list[str]

    @property
    def n(self) -> int:
        """Rows that were scored."""
        return len(self.rouge)

    @property
    def mean(self) -> float:
        """Mean over the rows, in [0, 1]."""
        return float(self.rouge.mean())

    @property
    def standard_error(self) -> float | None:
        """Standard error of the mean, `s / sqrt(n)` with divisor n - 1; None for a single row."""
        return None if self.n == 1 else float(self.rouge.std(ddof=1) / np.sqrt(self.n))


@dataclass(frozen=True, kw_only=True, eq=False)
class PrivacyLeakage:
    """
    PrivLeak with the AUCs it is made of, and the score of each text.

    Args:
        privleak (`float`):
            `100 (AUC_ref - AUC) / (1 - AUC_ref)`, percent; 0 is ideal, negative under-, positive over-unlearned.
        auc (`float`): P(holdout score > forget score), ties half: 0.5 cannot tell them apart, 1 all memorised.
        reference_auc (`float`): the same of the retrained model, or 0.5 where there is none.
        auc_standard_error (`float`, *optional*): DeLong's standard error of `auc`; None with a single text on a side.
        forget_scores (`np.ndarray`): `(n,)`, high for texts the model has not seen.
        holdout_scores (`np.ndarray`): `(m,)`, the same of held-out texts.
    """

    privleak: float
    auc: float
    reference_auc: float
    auc_standard_error: float | None
    forget_scores: FloatArray
    holdout_scores: FloatArray


def memorization_scores(generations: Sequence[str], references: Sequence[str]) -> MemorizationScores:
    """
    ROUGE-L F1 of each generation, without a model: for texts that were generated elsewhere.

    Args:
        generations (`Sequence[str]`): n generated texts, already cut where they should end.
        references (`Sequence[str]`): n expected texts.

    Raises:
        `ValueError`: no rows, or sequences of different lengths.
        `TypeError`: a string instead of a sequence of strings.
    """
    if isinstance(generations, str) or isinstance(references, str):
        raise TypeError("generations and references must be sequences of strings, one a row, got a string.")
    scores = rouge_l_f1(generations, references)
    return MemorizationScores(rouge=scores, generations=list(generations), references=list(references))


def privacy_leakage(
    forget_scores: ArrayLike, holdout_scores: ArrayLike, *, reference: PrivacyLeakage | float = 0.5
) -> PrivacyLeakage:
    """
    PrivLeak from the scores of single texts, without a model.

    Args:
        forget_scores (`ArrayLike`): `(n,)`, high for non-members (what [`text_min_k_scores`] gives), of forget texts.
        holdout_scores (`ArrayLike`): `(m,)`, of texts that the original model never saw.
        reference ([`PrivacyLeakage`] or `float`, *optional*, defaults to `0.5`):
            The result of the retrained model on the same texts, or its AUC.

    Raises:
        `ValueError`: an empty or NaN input, or a reference AUC outside [0, 1].
    """
    members, others = rows("forget_scores", forget_scores), rows("holdout_scores", holdout_scores)
    reference_auc = reference.auc if isinstance(reference, PrivacyLeakage) else float(reference)
    auc = mia_auc(members, others)
    return PrivacyLeakage(
        privleak=privleak(auc, reference_auc),
        auc=auc,
        reference_auc=reference_auc,
        auc_standard_error=_auc_standard_error(members, others),
        forget_scores=members,
        holdout_scores=others,
    )


def cut_at_stops(text: str, stops: Sequence[str] = STOP_STRINGS) -> str:
    """`text` up to the first of the stop strings, without surrounding white space."""
    for stop in stops:
        text = text.split(stop, 1)[0]
    return text.strip()


def knowledge_prompt(question: str, shots: Sequence[Mapping[str, Any]] = (), *, trailing_space: bool = False) -> str:
    r"""
    MUSE's prompt: `"Question: {q}\nAnswer: {a}\n\n"` for each shot, then `"Question: {question}\nAnswer:"`.

    Args:
        question (`str`): what is asked.
        shots (`Sequence[Mapping]`, *optional*, defaults to `()`): solved examples with `question` and `answer`.
        trailing_space (`bool`, *optional*, defaults to `False`):
            End with `"Answer: "`, as the benchmark's own code does. Most tokenizers put that space into the first
            token of the answer, so a model rarely sees it alone; use it to compare with published tables only.
    """
    solved = "".join(f"Question: {shot['question']}\nAnswer: {shot['answer']}\n\n" for shot in shots)
    return f"{solved}Question: {question}\nAnswer:{' ' if trailing_space else ''}"


def verbatim_memorization(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Mapping[str, Any]],
    *,
    max_new_tokens: int = 128,
    reference_with_specials: bool = False,
    batch_size: int = 32,
    description: str | None = None,
) -> MemorizationScores:
    """
    VerbMem: the beginning of a text is given, and the greedy continuation compared with the true one (MUSE).

    The text is raw, without a chat template; special tokens of the tokenizer (BOS) precede it.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            Causal language model.
        tokenizer (`PreTrainedTokenizerBase`):
            Its tokenizer.
        examples (`Sequence[Mapping]`):
            n rows with `prompt` and `gt`, the text that follows (MUSE's columns).
        max_new_tokens (`int`, *optional*, defaults to `128`):
            Tokens that are generated, and tokens of `gt` that they are compared with.
        reference_with_specials (`bool`, *optional*, defaults to `False`):
            Count the special tokens in front of `gt` among its first `max_new_tokens`, as the benchmark's own code
            does; with a BOS token the reference is then one token shorter.
        batch_size (`int`, *optional*, defaults to `32`):
            Prompts continued at once.
        description (`str`, *optional*):
            Text of a progress bar; no bar without it.

    Raises:
        ValueError: no rows, a row without `prompt` or `gt`, or one that is blank.
        TypeError: a column with something other than text.
    """
    prompts, references = encode_verbatim(
        tokenizer, examples, max_new_tokens=max_new_tokens, reference_with_specials=reference_with_specials
    )
    generations = greedy(
        model,
        tokenizer,
        prompts,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        description=description,
    )
    return memorization_scores(generations, references)


def encode_verbatim(
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Mapping[str, Any]],
    *,
    max_new_tokens: int = 128,
    reference_with_specials: bool = False,
) -> tuple[list[list[int]], list[str]]:
    """The n prompts of [`verbatim_memorization`] as token ids, and the n texts to compare continuations with."""
    prompts, wanted = _columns(examples, ("prompt", "gt"))
    cut = [tokenizer(text=text, add_special_tokens=reference_with_specials)["input_ids"] for text in wanted]
    references = [tokenizer.decode(ids[:max_new_tokens], skip_special_tokens=True).strip() for ids in cut]
    return [_open_ended(tokenizer, prompt) for prompt in prompts], references


def knowledge_memorization(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Mapping[str, Any]],
    *,
    shots: Sequence[Mapping[str, Any]] = (),
    max_new_tokens: int = 32,
    stops: Sequence[str] = STOP_STRINGS,
    trailing_space: bool = False,
    batch_size: int = 32,
    description: str | None = None,
) -> MemorizationScores:
    """
    KnowMem: greedy answers to questions about the texts, after solved examples (MUSE). On the forget set it
    measures what is left, on the retain set utility.

    White space in front of an answer is removed before the stop strings apply: an answer that begins with a blank line
    is scored, not cut to nothing.

    Args:
        model, tokenizer, batch_size, description:
            As in [`verbatim_memorization`].
        examples (`Sequence[Mapping]`):
            n rows with `question` and `answer`.
        shots (`Sequence[Mapping]`, *optional*, defaults to `()`):
            Solved examples with the same columns, put in front of every question (MUSE's `*_icl` files).
        max_new_tokens (`int`, *optional*, defaults to `32`):
            Longest answer in tokens.
        stops (`Sequence[str]`, *optional*):
            Where an answer is cut; by default a blank line and the beginning of a further question.
        trailing_space (`bool`, *optional*, defaults to `False`):
            As in [`knowledge_prompt`].

    Raises:
        ValueError: no rows, a row or shot without `question` or `answer`, or one that is blank.
        TypeError: a column with something other than text, or a single string as `stops`.
    """
    if isinstance(stops, str) or "" in stops:
        raise TypeError(f"stops is {stops!r}; expected a sequence of strings with text, such as {STOP_STRINGS}.")
    prompts, answers = encode_knowledge(tokenizer, examples, shots=shots, trailing_space=trailing_space)
    generations = greedy(
        model,
        tokenizer,
        prompts,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        description=description,
    )
    return memorization_scores([cut_at_stops(text, stops) for text in generations], answers)


def encode_knowledge(
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Mapping[str, Any]],
    *,
    shots: Sequence[Mapping[str, Any]] = (),
    trailing_space: bool = False,
) -> tuple[list[list[int]], list[str]]:
    """The n prompts of [`knowledge_memorization`] as token ids, and the n right answers."""
    questions, answers = _columns(examples, ("question", "answer"))
    if len(shots):
        _columns(shots, ("question", "answer"), name="shots")
    prompts = [knowledge_prompt(question, shots, trailing_space=trailing_space) for question in questions]
    return [_open_ended(tokenizer, prompt) for prompt in prompts], answers


def text_min_k_scores(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Mapping[str, Any]],
    *,
    share: float = 0.4,
    max_length: int = 2048,
    batch_size: int = 4,
    description: str | None = None,
) -> FloatArray:
    """
    Min-K% of whole texts `(n,)`: minus the mean of the lowest `share` of the token log-probabilities, in nats.

    Every token but the first counts (the first too, if the tokenizer puts a BOS token in front of it).

    Args:
        model, tokenizer, description:
            As in [`verbatim_memorization`].
        examples (`Sequence[Mapping]`):
            n rows with `text`.
        share (`float`, *optional*, defaults to `0.4`):
            MUSE's, in (0, 1].
        max_length (`int`, *optional*, defaults to `2048`):
            Longest text in tokens; longer ones are cut on the right, with a warning.
        batch_size (`int`, *optional*, defaults to `4`):
            Texts in a forward pass; they are long.

    Raises:
        ValueError: no rows, a row without text, a text of a single token, or `max_length` below 2.
        TypeError: a column with something other than text.
    """
    found = score_tokens(
        model,
        encode_texts(tokenizer, examples, max_length=max_length),
        pad_token_id=padding_id(tokenizer),
        batch_size=batch_size,
        description=description,
    )
    return min_k_scores(found.log_probs, share=share)


def encode_texts(
    tokenizer: PreTrainedTokenizerBase, examples: Sequence[Mapping[str, Any]], *, max_length: int = 2048
) -> list[dict[str, list[int]]]:
    """The rows that [`text_min_k_scores`] scores: `input_ids` and `labels` of whole texts, cut at `max_length`."""
    if max_length < 2:
        raise ValueError(f"max_length is {max_length}; expected at least 2, a token and one that it predicts.")
    (texts,) = _columns(examples, ("text",))
    encoded = [list(tokenizer(text=text)["input_ids"]) for text in texts]
    longer = sum(len(ids) > max_length for ids in encoded)
    if longer:
        warnings.warn(
            f"{longer} of {len(encoded)} texts are longer than max_length={max_length} tokens and were cut: forget "
            "and holdout texts should be cut alike. Raise max_length if the model allows it.",
            stacklevel=3,
        )
    return [{"input_ids": ids[:max_length], "labels": ids[:max_length]} for ids in encoded]


def _open_ended(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Token ids of a prompt; some tokenizers end every text with EOS, after which a model begins another one."""
    ids, end = list(tokenizer(text=prompt)["input_ids"]), tokenizer.eos_token_id
    added = end is not None and ids[-1:] == [end] and not prompt.endswith(str(tokenizer.eos_token))
    return ids[:-1] if added else ids


def _auc_standard_error(members: FloatArray, others: FloatArray) -> float | None:
    """DeLong, DeLong and Clarke-Pearson (Biometrics 44, 1988): from the share of the other side below each score."""
    if min(len(members), len(others)) < 2:
        return None
    wins = (others[None, :] > members[:, None]) + 0.5 * (others[None, :] == members[:, None])
    variance = wins.mean(1).var(ddof=1) / len(members) + wins.mean(0).var(ddof=1) / len(others)
    return float(np.sqrt(variance))


def _columns(
    examples: Sequence[Mapping[str, Any]], names: Sequence[str], *, name: str = "examples"
) -> list[list[str]]:
    """The texts of the named columns, one list a column."""
    if not len(examples):
        raise ValueError(f"{name} is empty; expected at least one row with {' and '.join(names)}.")
    for number, row in enumerate(examples):
        if not isinstance(row, Mapping):
            raise TypeError(f"Row {number} of {name} is a {type(row).__name__}; expected a mapping of column to text.")
        missing = [column for column in names if row.get(column) is None]
        if missing:
            raise ValueError(
                f"Row {number} of {name} has no `{missing[0]}`, it has {sorted(row)}; expected {' and '.join(names)}. "
                "Rename the columns."
            )
        for column in names:
            if not isinstance(row[column], str):
                raise TypeError(f"`{column}` of row {number} of {name} is {row[column]!r:.80}; expected a string.")
            if not row[column].strip():
                raise ValueError(f"`{column}` of row {number} of {name} is blank; expected text. Drop the row.")
    return [[row[column] for row in examples] for column in names]
