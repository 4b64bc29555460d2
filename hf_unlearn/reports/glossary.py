"""What each score is called, what it means and where it should end: shared by every table."""

from __future__ import annotations

from dataclasses import replace

from .formats import plain_words
from .further_glossary import further_metrics
from .metric_words import GOALS, Metric
from .schema import SUBJECTS, Results
from .words import words_of

__all__ = ["GOALS", "KNOWN", "Metric", "metric", "metrics_of"]

_PROBABILITY = "Mean over examples of exp(-NLL), NLL the mean negative log-likelihood of the right answer's tokens"

_WORD = "Probability of a word that an edit was to make unreachable, where the right answer says it"

_HEADLINES: tuple[Metric, ...] = (
    Metric(
        name="words_largest_probability",
        label="Likeliest word, questions as edited",
        meaning=f"{_WORD}: the largest, under the questions that the edit was made for.",
        goal="low",
    ),
    Metric(
        name="words_median_probability",
        label="Median word, questions as edited",
        meaning=f"{_WORD}: the median, under the questions that the edit was made for.",
        goal="low",
    ),
    Metric(
        name="words_reworded_largest_probability",
        label="Likeliest word, questions reworded",
        meaning=f"{_WORD}: the largest, when the questions are asked in other words. Nothing guarantees it.",
        goal="low",
    ),
    Metric(
        name="words_reworded_median_probability",
        label="Median word, questions reworded",
        meaning=f"{_WORD}: the median, when the questions are asked in other words. Nothing guarantees it.",
        goal="low",
    ),
    Metric(
        name="neighbour_probability",
        label="Other facts of the same authors",
        meaning=f"{_PROBABILITY}, on questions about the same authors whose answers say none of the words: an edit "
        "should leave them as they are.",
        goal="target",
    ),
    Metric(
        name="forget_probability",
        label="Forget probability",
        meaning=f"{_PROBABILITY}, on what is to be forgotten.",
        goal="reference",
    ),
    Metric(
        name="forget_rouge",
        label="Forget ROUGE",
        meaning="ROUGE-L recall of the greedy answer against the right one: the share of the right answer's words "
        "that the model still says, in order. Rarely 0: a fluent answer shares small words with the right one.",
        goal="reference",
    ),
    Metric(
        name="forget_truth_ratio",
        label="Forget truth ratio",
        meaning="Truth ratio TR = likelihood of wrong answers over that of the right one, paraphrased; here the mean "
        "of min(TR, 1/TR), which is highest when right and wrong answers are equally likely.",
        goal="reference",
    ),
    Metric(
        name="forget_paraphrased_question_probability",
        label="Forget probability, questions reworded",
        meaning=f"{_PROBABILITY}, when the forget questions are asked in other words: knowledge that only "
        "hides behind the exact question shows here.",
        goal="reference",
    ),
    Metric(
        name="forget_nll",
        label="Forget NLL, nats per token",
        meaning="Mean over the forget answers of their mean negative log-likelihood; far above the reference's is "
        "over-forgotten.",
        goal="reference",
        unit_interval=False,
    ),
    Metric(
        name="mia_auc",
        label="Membership inference AUC",
        meaning="How well the losses on the forget answers tell the model from the reference that never saw them. 0.5 "
        "is a guess; below it they are still better known, above it they are over-forgotten.",
        goal="reference",
    ),
    Metric(
        name="retain_probability",
        label="Retain probability",
        meaning=f"{_PROBABILITY}, on what is to be kept.",
        goal="target",
    ),
    Metric(
        name="retain_rouge",
        label="Retain ROUGE",
        meaning="ROUGE-L recall of the greedy answers on what is to be kept.",
        goal="target",
    ),
    Metric(
        name="retain_truth_ratio",
        label="Retain truth ratio",
        meaning="Mean of max(0, 1 - TR) on what is to be kept: high when right answers are likelier than wrong ones.",
        goal="target",
    ),
    Metric(
        name="real_authors_probability",
        label="Real authors probability",
        meaning="Probability of right answers about real authors: knowledge next to what is forgotten.",
        goal="target",
    ),
    Metric(
        name="world_facts_probability",
        label="World facts probability",
        meaning="Probability of right answers about the world: knowledge far from what is forgotten.",
        goal="target",
    ),
    Metric(
        name="model_utility",
        label="Model utility",
        meaning="Harmonic mean of probability, ROUGE and truth ratio over the parts to be kept; 0 if any is 0.",
        goal="target",
    ),
)
KNOWN: tuple[Metric, ...] = (*_HEADLINES, *further_metrics())
_BY_NAME = {metric.name: metric for metric in KNOWN}


def metric(name: str) -> Metric:
    """The metric of that name; one that nobody described is shown under its own name, without a goal."""
    if name in _BY_NAME:
        return _BY_NAME[name]
    return Metric(name=name, label=plain_words(name), meaning="", goal="", unit_interval=False, headline=False)


def metrics_of(results: Results) -> tuple[Metric, ...]:
    """
    The metrics that at least one model of `results` has: known ones in the order above, then the others. An edit does
    not aim at scoring on the forget set as the reference does: there they have no goal.
    """
    names = {
        name: None
        for subject in SUBJECTS
        if (scores := results.scores()[subject]) is not None
        for name in scores.as_dict()
        if name != "standard_error"
    }
    found = (*(entry for entry in KNOWN if entry.name in names), *(metric(n) for n in names if n not in _BY_NAME))
    if words_of(results) is None:
        return found
    return tuple(replace(entry, goal="") if entry.goal == "reference" else entry for entry in found)
