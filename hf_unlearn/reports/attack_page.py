"""What the page says of attacks: curves, success by judge, over-refusal, and examples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from . import formats
from .attack_plots import ORDER, curve_figures, judge_figure
from .attack_words import OVER_REFUSAL, SUBJECT_TITLES, attack_words, outcomes_of
from .outcomes import AttackOutcome, Curve, JudgeRate, Measure
from .page import Plot, make_plot
from .schema import Results

SHOWN_EXAMPLES = 4
"""Examples of each attack on the page; attacks.json has them all."""
CLASSES = {"target": "target", "unlearned": "unlearned", "control": "reference"}
"""The control is drawn as the reference is: neither has seen what was forgotten."""


def attack_sections(results: Results) -> dict[str, Any]:
    """
    The context of the sections on attacks.

    Returns:
        `dict`: `overview` (the figure of all judges, or None), `attacks` and `refusing` (one dict an attack, empty
        where there was none).
    """
    outcomes = outcomes_of(results)
    attacks = [outcome for outcome in outcomes if outcome.attack != OVER_REFUSAL]
    refusing = [outcome for outcome in outcomes if outcome.attack == OVER_REFUSAL]
    figure = judge_figure(attacks)
    caption = (
        "Success is what a judge takes for one, gibberish apart; bars at the dots are standard errors. What the "
        "control reaches is no success of the attack: it knows nothing that could be brought back."
    )
    label = f"Attack success by attack and judge. {_judged_in_words(attacks)}"
    overview = (
        None
        if figure is None
        else make_plot("attack-success", "Attack success by attack and judge", caption, figure, label=label)
    )
    return {
        "overview": overview,
        "attacks": [_section(outcome, f"attack-{number}") for number, outcome in enumerate(attacks, 1)],
        "refusing": [_section(outcome, f"refusal-{number}") for number, outcome in enumerate(refusing, 1)],
        "subjects": [{"name": CLASSES[key], "title": SUBJECT_TITLES[key]} for key in ORDER],
    }


def _section(outcome: AttackOutcome, anchor: str) -> dict[str, Any]:
    words = attack_words(outcome.attack)
    return {
        "anchor": anchor,
        "title": words.title,
        "meaning": words.meaning,
        "plots": _plots(outcome, anchor),
        "measures": measure_rows(outcome.measures),
        # what is refused is among the measures already
        "judges_fold": outcome.attack == OVER_REFUSAL and bool(outcome.measures),
        "success": "Answered" if outcome.attack == OVER_REFUSAL else "Success",
        "judges": judge_rows(outcome.judges),
        "examples": [_example(example) for example in outcome.examples[:SHOWN_EXAMPLES]],
        "more": max(0, len(outcome.examples) - SHOWN_EXAMPLES),
        "absent": dict(outcome.absent),
        "seconds": formats.duration(outcome.seconds) if math.isfinite(outcome.seconds) else "",
        "settings": [(key, formats.plain_setting(value)) for key, value in outcome.settings.items()],
    }


def measure_rows(measures: Sequence[Measure]) -> list[dict[str, Any]]:
    """A row for each measure: its cells by class of the model, how many rows it is over, dots for shares."""
    rows = []
    for name in dict.fromkeys(measure.name for measure in measures):
        found = {measure.subject: measure for measure in measures if measure.name == name}
        cells, dots = {}, []
        for subject in ("control", "target", "unlearned"):  # the last one lies on top
            measure = found.get(subject)
            value = None if measure is None else formats.with_error(measure.value, measure.standard_error)
            cells[CLASSES[subject]] = value or formats.MISSING
            if measure is not None and 0 <= measure.value <= 1:
                dots.append({"subject": CLASSES[subject], "left": f"{100 * measure.value:.1f}"})
        sizes = sorted({measure.n for measure in found.values()})
        rows.append(
            {"name": name, "cells": cells, "dots": dots, "n": " to ".join(map(str, sizes[:1] + sizes[1:][-1:]))}
        )
    return rows


def judge_rows(judges: Sequence[JudgeRate]) -> list[dict[str, Any]]:
    """For each judge what it says of each model's answers."""
    groups = []
    for judge in dict.fromkeys(rate.judge for rate in judges):
        own = sorted((rate for rate in judges if rate.judge == judge), key=lambda rate: ORDER.index(rate.subject))
        groups.append(
            {
                "judge": judge,
                "rows": [
                    {
                        "subject": CLASSES[rate.subject],
                        "title": SUBJECT_TITLES[rate.subject],
                        "success": formats.with_error(rate.success, rate.standard_error),
                        "refusal": formats.score(rate.refusal),
                        "degenerate": formats.score(rate.degenerate),
                        "n": str(rate.n),
                        "failed": rate.failed,
                    }
                    for rate in own
                ],
            }
        )
    return groups


def _plots(outcome: AttackOutcome, anchor: str) -> list[Plot]:
    plots = []
    title = attack_words(outcome.attack).title
    for number, (x_label, figure) in enumerate(curve_figures(outcome), 1):
        text = _curves_in_words([curve for curve in outcome.curves if curve.x_label == x_label])
        heading = f"{title}, by {x_label}"
        caption = "Bands: one standard error to each side, or the range over seeds where there are several."
        plots.append(make_plot(f"{anchor}-curve-{number}", heading, caption, figure, label=f"{heading}. {text}"))
    return plots


def _curves_in_words(curves: Sequence[Curve]) -> str:
    return " ".join(
        f"{curve.name}, {curve.subject}: {formats.score(curve.y[0])} to {formats.score(curve.y[-1])}."
        for curve in curves
    )


def _judged_in_words(outcomes: Sequence[AttackOutcome]) -> str:
    return " ".join(
        f"{attack_words(outcome.attack).title}, {rate.judge}, {rate.subject}: {formats.score(rate.success)}."
        for outcome in outcomes
        for rate in outcome.judges
    )


def _example(example: Any) -> dict[str, Any]:
    return {
        "prompt": example.prompt,
        "answer": example.answer,
        "empty": not example.answer.strip(),
        "subject": CLASSES[example.subject],
        "title": SUBJECT_TITLES[example.subject],
        "judged": [{"judge": judge, "success": success} for judge, success in example.success.items()],
    }
