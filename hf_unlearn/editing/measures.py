"""What a plan does, by real forward passes without and with its edits."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ..attacks.refusal import attack_succeeds, is_refusal
from ..metrics.generate import greedy, sample
from ..metrics.likelihood import mean_nll
from .added import edits_in_force
from .concepts import Concept, find_occurrences, word_pattern
from .edit_rows import Row, prompt_of
from .odds import Demands
from .passes import Run
from .plan import LayerEdit
from .reach import occurrence_pairs, reach_of

Judge = Callable[[str, str], bool]


def edited_answers(
    run: Run, tokenizer: Any, rows: Sequence[Row], edits: Sequence[LayerEdit], *, max_new_tokens: int
) -> list[str]:
    """The most likely answers to the prompts of rows, with edits in force; the same on every process."""
    with edits_in_force(run.model, edits):
        return greedy(
            run.model,
            tokenizer,
            [prompt_of(row) for row in rows],
            max_new_tokens=max_new_tokens,
            batch_size=run.batch_size,
            description="generating" if run.progress else None,
        )


def sampled_answers(
    run: Run,
    tokenizer: Any,
    rows: Sequence[Row],
    edits: Sequence[LayerEdit],
    *,
    count: int,
    max_new_tokens: int,
    seed: int,
) -> list[str]:
    """`count` answers to each prompt at temperature 1, with edits in force; the same on every process."""
    with edits_in_force(run.model, edits):
        return sample(
            run.model,
            tokenizer,
            [prompt_of(row) for row in rows for _ in range(count)],
            seed=seed,
            max_new_tokens=max_new_tokens,
            batch_size=run.batch_size,
            description="sampling" if run.progress else None,
        )


def says_a_word(text: str, concepts: Sequence[Concept]) -> bool:
    """Whether a text says one of the words, in any casing."""
    return any(word_pattern(concept.text).search(text) for concept in concepts if concept.spellings)


def response_probability(run: Run, rows: Sequence[Row], edits: Sequence[LayerEdit]) -> float:
    """Mean over rows of the geometric mean probability of a response token, with edits in force."""
    with edits_in_force(run.model, edits):
        nll = mean_nll(run.model, list(rows), pad_token_id=run.pad_token_id, batch_size=run.batch_size)
    return float(np.exp(-nll).mean())


def measure_edits(
    run: Run,
    tokenizer: Any,
    rows: Sequence[Row],
    concepts: Sequence[Concept],
    edits: Sequence[LayerEdit] | None,
    *,
    max_new_tokens: int,
    samples: int = 0,
    seed: int = 0,
    retain_rows: Sequence[Row] | None = None,
    attack_rows: Sequence[Row] | None = None,
    judge: Judge = attack_succeeds,
    demands: Demands | None = None,
    known: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """
    `constrained`: the largest probability at all places that the edit was made for, variants and generated answers
    included; where tokens share what a word has to lose, the one that they allow the word. `reach`: the words where
    the responses of the rows say them. `said`: rows whose greedy answer says a word. `sampled`: sampled answers that
    do. `retain_probability`: of the retain rows. `attack`: attack prompts whose
    answer is a success by the judge, and those that are refused. Each before and after; what there is nothing to
    measure on is left out.

    Args:
        run ([`Run`]):
            Model and forward passes.
        tokenizer (`PreTrainedTokenizerBase`):
            The model's tokenizer.
        rows (`Sequence[Row]`), concepts (`Sequence[Concept]`):
            Rows and words.
        edits (`Sequence[LayerEdit]`, *optional*):
            What is measured; None where the model has them in it already, and `known` tells what was before.
        max_new_tokens (`int`):
            Longest generated answer.
        samples (`int`, *optional*, defaults to `0`), seed (`int`, *optional*, defaults to `0`):
            Answers to each row that are sampled, and their seed.
        retain_rows (`Sequence[Row]`, *optional*):
            Rows whose answers should stay.
        attack_rows (`Sequence[Row]`, *optional*):
            Jailbreak prompts.
        judge (`Callable[[str, str], bool]`, *optional*):
            From a prompt and an answer: whether the attack has succeeded.
        demands ([`Demands`], *optional*):
            What PCR was asked to bring down.
        known (`Mapping`, *optional*):
            Measures whose `before` is taken over.
    """
    states: dict[str, Sequence[LayerEdit]] = {"after": edits or ()}
    if known is None:
        states = {"before": (), **states}
    found: dict[str, Any] = {}
    if demands is not None:
        found["constrained"] = {"pairs": len(demands.pairs)}
        for name, own in states.items():
            odds = run.odds(demands.rows, demands.pairs, own)
            found["constrained"][name] = float(demands.pairs.bounds(odds.values).max())
    occurrences = [one for one in find_occurrences(tokenizer, rows, concepts) if one.start > 0]
    if occurrences:
        pairs = occurrence_pairs(rows, occurrences)
        found["reach"] = {
            name: reach_of(rows, occurrences, pairs, run.odds(rows, pairs, own)).summary()
            for name, own in states.items()
        }
    concepts = [concept for concept in concepts if concept.spellings]
    rows = [row for row in rows if prompt_of(row)]  # text alone has nothing to answer
    if concepts and rows:
        found["said"] = {"rows": len(rows)}
        for name, own in states.items():
            texts = edited_answers(run, tokenizer, rows, own, max_new_tokens=max_new_tokens)
            found["said"][name] = sum(says_a_word(text, concepts) for text in texts)
    if concepts and rows and samples:
        found["sampled"] = {"answers": samples * len(rows)}
        for name, own in states.items():
            texts = sampled_answers(run, tokenizer, rows, own, count=samples, max_new_tokens=max_new_tokens, seed=seed)
            found["sampled"][name] = sum(says_a_word(text, concepts) for text in texts)
    if retain_rows:
        found["retain_probability"] = {
            "rows": len(retain_rows),
            **{name: response_probability(run, retain_rows, own) for name, own in states.items()},
        }
    if attack_rows:
        found["attack"] = {"prompts": len(attack_rows), "success": {}, "refused": {}}
        prompts = [tokenizer.decode(prompt_of(row), skip_special_tokens=True) for row in attack_rows]
        for name, own in states.items():
            texts = edited_answers(run, tokenizer, attack_rows, own, max_new_tokens=max_new_tokens)
            judged = zip(prompts, texts, strict=True)
            found["attack"]["success"][name] = sum(judge(prompt, text) for prompt, text in judged)
            found["attack"]["refused"][name] = sum(map(is_refusal, texts))
    return _with_before(found, known or {})


def _with_before(found: dict[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """`before` of what is known already, and how far the words' probability has fallen."""
    for name in {"constrained", "reach", "said", "sampled", "retain_probability"} & found.keys() & known.keys():
        if "before" in known[name]:
            found[name].setdefault("before", known[name]["before"])
    if "attack" in found and "attack" in known:
        for name in ("success", "refused"):
            found["attack"][name].setdefault("before", known["attack"][name]["before"])
    pair = [found.get("reach", {}).get(name, {}).get("log_probs", []) for name in ("before", "after")]
    if pair[0] and len(pair[0]) == len(pair[1]):
        falls = sorted(math.exp(min(high - low, 700.0)) for high, low in zip(*pair, strict=True))
        found["reach"] |= {"smallest_fall": falls[0], "median_fall": falls[len(falls) // 2]}
    return found
