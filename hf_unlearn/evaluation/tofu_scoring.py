"""The passes over TOFU's rows that its metrics are made of, and the checks before the first one.

Shapes: n forget rows, m holdout rows.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..data import tokenize_example
from ..losses import IGNORE_INDEX
from ..metrics.arrays import FloatArray
from ..metrics.functional import (
    exact_memorization,
    extraction_strength,
    loss_scores,
    min_k_plus_plus_scores,
    min_k_scores,
    zlib_scores,
)
from ..metrics.parts import checked_rows, evenly_spaced, fingerprint
from ..metrics.scores import FORGET, RETAIN, PartScores, TofuScores
from ..metrics.token_scores import TokenScores
from ..reports.eval_rows import EncodedRows, EvalRows, Limits
from .session import Session
from .tofu_files import ForgetDetails, TofuEvaluation, TofuReference, load_reference
from .values import positions_of, template_digest

HOLDOUT = "holdout"
MIN_K = 0.4
EXAMPLES_PER_PART = 10

ReferenceLike = str | os.PathLike[str] | TofuReference | TofuScores | TofuEvaluation


@dataclass(frozen=True, kw_only=True, eq=False)
class Prepared:
    """
    What is checked and tokenised before anything is computed.

    Args:
        encoded ([`EncodedRows`]): texts and prompts of all parts.
        others (`list[dict]`): m holdout rows.
        other_texts (`list[dict]`): the same, tokenised.
        compared ([`TofuReference`], *optional*): the reference, cut to the rows that are scored.
        differs (`list[str]`): what the reference was scored with otherwise, see [`settings_apart`].
    """

    encoded: EncodedRows
    others: list[dict[str, Any]]
    other_texts: list[dict[str, list[int]]]
    compared: TofuReference | None
    differs: list[str]

    def on_record(self) -> dict[str, Any]:
        """What of it belongs into the settings of an evaluation."""
        compared = self.compared
        return {
            "reference": "" if compared is None else compared.name,
            "reference_digest": "" if compared is None else compared.digest,
            "reference_differs": self.differs,
        }


def prepare(
    model: Any,
    tokenizer: Any,
    rows: EvalRows,
    *,
    holdout: Any,
    holdout_limit: int | None,
    reference: ReferenceLike | None,
    max_length: int,
    max_new_tokens: int,
) -> Prepared:
    """
    Checks rows, holdout rows and reference against each other, and texts against the model; tokenises.

    Args:
        model, tokenizer:
            What will be evaluated.
        rows ([`EvalRows`]):
            The parts.
        holdout, holdout_limit, reference, max_length:
            As in [`run_tofu`].
        max_new_tokens (`int`):
            Longest generated answer; 0 where none are generated.

    Raises:
        ValueError, TypeError, FileNotFoundError: as in [`run_tofu`], before anything is computed.
    """
    others = holdout_rows(holdout, holdout_limit)
    check_holdout(rows, others)
    compared = matching_reference(rows, reference)
    encoded = rows.tokenized(tokenizer, max_length=max_length)
    differs = settings_apart(compared, tokenizer, encoded)
    other_texts = [encoded_row(row, tokenizer, max_length) for row in others]
    longest = max([encoded.longest, *(len(text["input_ids"]) for text in other_texts)])
    check_lengths(model, replace(encoded, longest=longest), max_new_tokens)
    return Prepared(encoded=encoded, others=others, other_texts=other_texts, compared=compared, differs=differs)


def part_losses(session: Session, rows: EvalRows, encoded: EncodedRows) -> dict[str, FloatArray]:
    """Mean NLL of all texts, part by part."""
    found, start = {}, 0
    for name, part in rows.parts.items():
        stop = start + len(part.texts)
        found[name] = session.nll(f"{name} likelihoods", encoded.texts[start:stop])
        start = stop
    return found


def part_answers(
    session: Session, rows: EvalRows, encoded: EncodedRows, max_new_tokens: int | None
) -> Iterator[tuple[str, list[str] | None]]:
    """The greedy answers of each part; None for each where none are wanted."""
    start = 0
    for name, part in rows.parts.items():
        prompts = encoded.prompts[start : start + len(part.rows)]
        start += len(part.rows)
        if max_new_tokens is None:
            yield name, None
        else:
            yield name, session.answers(f"{name} answers", prompts, max_new_tokens=max_new_tokens)


def forget_details(
    session: Session,
    rows: EvalRows,
    encoded: EncodedRows,
    others: list[dict[str, Any]],
    other_texts: list[dict[str, list[int]]],
) -> ForgetDetails:
    """Token scores of the forget and holdout answers, and what is made of them."""
    forget = rows.parts[FORGET].rows
    members = session.token_scores("forget tokens", encoded.texts[: len(forget)])
    holdout: dict[str, FloatArray] = {}
    if others:
        tokens = session.token_scores("holdout tokens", other_texts)
        holdout = _attacks(tokens, [row["answer"] for row in others])
    return ForgetDetails(
        exact_memorization=_each(exact_memorization, members),
        extraction_strength=_each(extraction_strength, members),
        membership=_attacks(members, [row["answer"] for row in forget]),
        holdout=holdout,
        fingerprint=fingerprint(forget),
        holdout_fingerprint=fingerprint(others) if others else "",
    )


def examples_of(rows: EvalRows, parts: Mapping[str, PartScores]) -> tuple[dict[str, str], ...]:
    """Up to ten answers of each of forget and retain, evenly spaced, with question and right answer."""
    found: list[dict[str, str]] = []
    for name in (FORGET, RETAIN):
        answers = parts[name].generations
        for number in evenly_spaced(len(answers or ()), EXAMPLES_PER_PART):
            row = rows.parts[name].rows[number]
            assert answers is not None
            texts = {"question": row["question"], "answer": row["answer"], "generated": answers[number]}
            found.append({"part": name, **texts})
    return tuple(found)


def _attacks(tokens: TokenScores, texts: Sequence[str]) -> dict[str, FloatArray]:
    """Membership scores of each row by attack, high for what was not seen."""
    return {
        "loss": loss_scores(tokens.log_probs),
        "zlib": zlib_scores(tokens.log_probs, texts),
        "min_k": min_k_scores(tokens.log_probs, share=MIN_K),
        "min_k_plus_plus": min_k_plus_plus_scores(tokens.log_probs, tokens.mu, tokens.sigma, share=MIN_K),
    }


def _each(metric: Callable[..., float], tokens: TokenScores) -> FloatArray:
    pairs = zip(tokens.predictions, tokens.labels, strict=True)
    return np.array([metric(predictions, labels) for predictions, labels in pairs], dtype=np.float64)


# ---------------------------------------------------------------------------------------------- before the first pass


def split_limits(limits: Limits, parts: Sequence[str], holdout: bool) -> tuple[Limits, int | None]:
    """The limits of the parts, and that of the holdout rows."""
    if not isinstance(limits, Mapping):
        return limits, limits if holdout else None
    named = dict(limits)
    of_holdout = named.pop(HOLDOUT, None)
    if HOLDOUT in limits and not holdout:
        raise ValueError("limits names 'holdout', but there are no holdout rows.")
    unknown = sorted(set(named) - set(parts))
    if unknown:
        raise ValueError(f"limits names {unknown}, but the parts are {sorted(parts)}.")
    return named, of_holdout


def holdout_rows(holdout: Any, limit: int | None) -> list[dict[str, Any]]:
    """Question and answer of the holdout rows; none without any."""
    if holdout is None:
        return []
    if not hasattr(holdout, "__len__") or not hasattr(holdout, "__getitem__") or isinstance(holdout, str | Mapping):
        raise TypeError(
            f"holdout is a {type(holdout).__name__}; expected a Dataset or a list of rows with `question` and "
            "`answer`."
        )
    chosen = [holdout[number] for number in evenly_spaced(len(holdout), limit)]
    broken = [number for number, row in enumerate(chosen) if not isinstance(row, Mapping)]
    if broken:
        raise TypeError(f"Holdout row {broken[0]} is {chosen[broken[0]]!r:.60}; expected a mapping of column to text.")
    try:
        checked = checked_rows([{name: row.get(name) for name in ("question", "answer", "index")} for row in chosen])
    except (TypeError, ValueError) as error:
        raise type(error)(f"The holdout rows: {error}") from error
    return [{name: row[name] for name in ("question", "answer")} for row in checked]


def check_holdout(rows: EvalRows, others: Sequence[Mapping[str, Any]]) -> None:
    """
    Refuses holdout rows that a model was trained on: their AUC would say nothing, and look like privacy.

    Raises:
        ValueError: a holdout row is a row of the forget or the retain part.
    """
    for name in (part for part in (FORGET, RETAIN) if part in rows.parts):
        known = {(row["question"], row["answer"]) for row in rows.parts[name].rows}
        found = [number for number, row in enumerate(others) if (row["question"], row["answer"]) in known]
        if found:
            raise ValueError(
                f"{len(found)} of the {len(others)} holdout rows (first {found[0]}) are rows of the {name} part; "
                "expected rows that neither model was trained on. Leave these out."
            )


def matching_reference(rows: EvalRows, given: ReferenceLike | None) -> TofuReference | None:
    """
    The retain-only model's scores of the rows that are scored here.

    Other forget rows are an error, not a missing metric: whoever gives a reference wants to be compared with it, and
    nothing has been computed yet.

    Raises:
        FileNotFoundError, ValueError: it cannot be read, or is of other forget rows.
        TypeError: it is something else.
    """
    if given is None:
        return None
    if isinstance(given, TofuEvaluation):
        evaluation = given.evaluation
        given = TofuReference(
            scores=given.scores, details=given.details, name=evaluation.model, settings=evaluation.settings
        )
    elif isinstance(given, TofuScores):
        given = TofuReference(scores=given)
    elif isinstance(given, (str, os.PathLike)):
        given = load_reference(given)
    elif not isinstance(given, TofuReference):
        raise TypeError(f"reference is a {type(given).__name__}; expected a folder, a file, or TofuScores.")
    theirs, details = given.scores.parts[FORGET], given.details
    if details is not None and details.fingerprint != theirs.fingerprint:
        raise ValueError(
            f"The reference's scores and details are of different rows ({theirs.fingerprint!r} and "
            f"{details.fingerprint!r}); expected both of one evaluation. Give that evaluation's folder."
        )
    chosen = rows.chosen_of(theirs)
    mine = fingerprint(rows.parts[FORGET].rows)
    if chosen is not None and details is not None:
        details = details.take(chosen, fingerprint=mine)
    cut = replace(given, scores=rows.matching(given.scores), details=details)
    rows.example(generate=False).mia_auc_against(cut.scores)  # refuses other rows
    return cut


def settings_apart(reference: TofuReference | None, tokenizer: Any, encoded: EncodedRows) -> list[str]:
    """
    What the reference was scored with otherwise, by name, with a warning; nothing where it does not say how.

    Not an error: models that were trained on different templates are each asked in their own.
    """
    if reference is None:
        return []
    digest, theirs = template_digest(tokenizer), reference.settings.get("max_length", encoded.max_length)
    apart = []
    if reference.settings.get("template_digest", digest) != digest:
        apart.append("template_digest")
    if theirs != encoded.max_length and encoded.longest > min(theirs, encoded.max_length):
        apart.append("max_length")
    if apart:
        what = {"template_digest": "another tokenizer or chat template", "max_length": f"max_length={theirs}"}
        warnings.warn(
            f"The reference {reference.name!r} was scored with {' and '.join(what[name] for name in apart)}: its "
            "losses are of other tokens than those of this model, and forget quality and privacy compare them. "
            "Evaluate it again in the same way, unless the two models were trained differently on purpose.",
            stacklevel=4,
        )
    return apart


def check_lengths(model: Any, encoded: EncodedRows, max_new_tokens: int) -> None:
    """
    Whether texts, and prompts with their answers, fit into the model's positions.

    Raises:
        ValueError: they do not.
    """
    if encoded.longest > encoded.max_length:
        warnings.warn(
            f"The longest text has {encoded.longest} tokens and is cut to max_length={encoded.max_length}; its score "
            "is about the beginning of the answer only. Raise max_length if the model allows it.",
            stacklevel=4,
        )
    positions = positions_of(model)
    if positions is None:
        return
    longest = min(encoded.longest, encoded.max_length)
    if longest > positions:
        raise ValueError(
            f"A text has {longest} tokens, but {type(model).__name__} has {positions} positions. Set "
            f"max_length={positions}, or leave long rows out."
        )
    prompt = max(map(len, encoded.prompts))
    if max_new_tokens and prompt + max_new_tokens > positions:
        raise ValueError(
            f"A prompt of {prompt} tokens and an answer of max_new_tokens={max_new_tokens} do not fit into the "
            f"{positions} positions of {type(model).__name__}. Set max_new_tokens to at most {positions - prompt}."
        )


def encoded_row(row: Mapping[str, Any], tokenizer: Any, max_length: int) -> dict[str, list[int]]:
    """
    A question and its answer as tokens, cut.

    Raises:
        ValueError: `max_length` leaves nothing of the answer.
    """
    encoded = tokenize_example({"question": row["question"], "answer": row["answer"]}, tokenizer)
    cut = {name: ids[:max_length] for name, ids in encoded.items()}
    if all(label == IGNORE_INDEX for label in cut["labels"][1:]):
        raise ValueError(
            f"No token of the holdout answer {row['answer']!r:.60} is left within max_length={max_length} tokens. "
            "Raise max_length, or drop the row."
        )
    return cut
