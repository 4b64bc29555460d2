"""The quickstart of constrained edits: names that a model has learned become unreachable, and nothing is trained."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..editing.settled import ROUNDING
from ..reports import Results, Words, library_versions, save_plots, write_report, write_results
from ..reports.edit_card import write_edit_card
from .quickstart import Stopwatch, describe, generations, score_lab_model
from .training import LabModel
from .world import World, WorldRow, world_data

if TYPE_CHECKING:
    from datasets import Dataset

    from ..editing.constrained import EditResult
    from ..editing.pcr import Run
    from ..metrics.scores import TofuScores
    from .recipe import LabData

# Slots of a row's facts that hold a person's name: the author's own, and those of people around them.
NAMES = ("name", "translator", "editor", "mentor")
LIMITS = "it is for methods that imitate a model which never saw the data; an edit only takes words away"

PROBABILITY = 3e-6  # the most that a name may have where an answer says it
VARIANTS = 96  # of few and short prompts (docs/benchmarks.md)
TOKENS_PER_WORD = 2
_ALL = 10**6  # answers to keep are few and short: none of their activations is left out


def names_given_away(row: WorldRow) -> list[str]:
    """Names of people that a row's answer says and its question does not."""
    return [
        row.facts[slot]
        for slot in NAMES
        if slot in row.facts and row.facts[slot] in row.answer and row.facts[slot] not in row.question
    ]


def asked_data(world: World) -> tuple[LabData, list[str], Dataset]:
    """
    The world with only those forget rows that ask for a name, the names, and the other forget rows.

    Raises:
        ValueError: no forget row asks for a name.
    """
    data = world_data(world)
    rows = world.rows_of("forget10")
    asking = [number for number, row in enumerate(rows) if names_given_away(row)]
    if not asking:
        raise ValueError(f"No question about the forgotten authors of seed {world.seed} asks for a name.")
    names = sorted({name for number in asking for name in names_given_away(rows[number])})
    others = data.forget.select([number for number in range(len(rows)) if number not in asking])
    data = replace(data, forget=data.forget.select(asking), forget_eval=data.forget_eval.select(asking))
    return data, names, others


def run_edit_quickstart(
    folder: Path, world: World, target: LabModel, reference: LabModel, clock: Stopwatch, *, seed: int
) -> Results:
    """
    Edits the target so that the names that answers about its forgotten authors give away are unreachable, merges the
    edit into the weights, and compares before, after and reference.

    Args:
        folder (`Path`):
            Receives `model/` (merged, with its card), `plan/`, `results.json`, `report.html` and `plots/`.
        world ([`World`]):
            The world that the models were trained on.
        target, reference ([`LabModel`]):
            The model that knows the names, and the one that never saw them.
        clock ([`Stopwatch`]):
            Times phases.
        seed (`int`):
            Of the edit.
    """
    from ..editing import EditConfig, constrained_edit

    data, names, others = asked_data(world)
    scores: dict[str, TofuScores] = {}
    found: dict[str, dict[str, list[float]]] = {"own": {}, "reworded": {}}
    neighbours: dict[str, float] = {}

    def evaluate(name: str, model: Any) -> None:
        with clock("evaluate"):
            scores[name] = score_lab_model(model, target, data, name)
            neighbours[name] = _neighbours(model, target.tokenizer, others)
            for wording, question in (("own", "question"), ("reworded", "paraphrased_question")):
                rows = [{"question": row[question], "answer": row["answer"]} for row in data.forget_eval]
                found[wording][name] = word_probabilities(model, target.tokenizer, rows, names)

    evaluate("target", target.model)
    evaluate("reference", reference.model)
    config = EditConfig(
        words=names,
        seed=seed,
        probability=PROBABILITY,
        layers=list(range(1, target.model.config.num_hidden_layers + 1)),  # less for each of them to do
        retain_examples=len(data.retain),
        retain_positions=_ALL,
        variants=VARIANTS,
        tokens_per_word=TOKENS_PER_WORD,
        weigh_retain=True,
    )
    with clock("edit"):
        done = constrained_edit(
            target.model, target.tokenizer, data.forget, config, retain_dataset=data.retain, merge=True
        )
    evaluate("unlearned", done.model)
    words = {"wanted": config.probability, "probabilities": found}
    clock.seconds["total"] = time.perf_counter() - clock.started
    flat: dict[str, dict[str, Any]] = {
        name: {
            **score.summary(),
            **Words.from_dict(words).scores(name),
            "neighbour_probability": neighbours[name],
        }
        for name, score in scores.items()
    }
    plan = done.plan.as_dict()
    results = Results.from_dict(
        {
            "method": "constrained edit (PCR)",
            **flat,
            "forget_quality": None,
            "absent": {"forget_quality": LIMITS},
            "constraints": [reach_constraint(done, config.probability)],
            "seconds": clock.seconds,
            "versions": library_versions(),
            "settings": plan["settings"],
            "seed": seed,
            "generations": generations(scores, data),
            "model": describe(target),
            "dataset": data.name,
            "words": words,
            "edit": {"measures": plan["measures"], "edits": plan["edits"]},
        }
    )
    write_edit_run(folder, done, target.tokenizer, results)
    return results


def reach_constraint(done: EditResult, wanted: float) -> dict[str, Any]:
    """The edit's limit as a constraint of results.json: the largest probability of what it was made for."""
    reached = done.plan.measures["constrained"]["after"]
    return {
        "name": "reach",
        "eps": wanted,
        "loss": reached,
        "multiplier": None,
        "feasible": reached <= wanted * ROUNDING,
    }


def word_probabilities(model: Any, tokenizer: Any, rows: list[dict[str, str]], words: list[str]) -> list[float]:
    """The probability of each word, by a real forward pass, wherever the answers of the rows say one."""
    from ..editing.concepts import find_occurrences, word_concepts
    from ..editing.edit_rows import edit_rows
    from ..editing.reach import occurrence_pairs, reach_of

    run = _run(model, tokenizer)
    tokens = edit_rows(rows, tokenizer, name="edit", max_length=1024)
    found = find_occurrences(tokenizer, tokens, word_concepts(tokenizer, words))
    pairs = occurrence_pairs(tokens, found)
    return reach_of(tokens, found, pairs, run.odds(tokens, pairs)).log_probs.exp().tolist()


def _neighbours(model: Any, tokenizer: Any, others: Dataset) -> float:
    from ..editing.edit_rows import edit_rows
    from ..editing.measures import response_probability

    if not len(others):
        return float("nan")
    return response_probability(
        _run(model, tokenizer), edit_rows(others, tokenizer, name="other", max_length=1024), ()
    )


def _run(model: Any, tokenizer: Any) -> Run:
    from ..editing.pcr import Run
    from ..metrics.generate import padding_id

    return Run(model=model, pad_token_id=padding_id(tokenizer), batch_size=64)


def write_edit_run(folder: Path, done: EditResult, tokenizer: Any, results: Results) -> None:
    """Writes the merged model with its card, the plan, `results.json`, the plot and the page."""
    from ..reports import markdown_table, words_of

    done.model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    done.plan.save(folder / "plan")
    write_edit_card(
        folder / "model",
        done.plan,
        name=f"{results.dataset} after {results.method}",
        merged=True,
        wanted=results.constraints[0].eps,
        results_table=markdown_table(results),
    )
    save_plots((), (), folder / "plots", words=words_of(results))
    write_results(folder / "results.json", results)
    write_report(folder / "report.html", results)
