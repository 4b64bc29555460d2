from __future__ import annotations

import io
import math
from typing import Any

import pytest
from rich.console import Console

from hf_unlearn.reports import formats, judge, markdown_constraints, markdown_table, results_table
from hf_unlearn.reports.overlap import leaked_words


def _answers(results: dict[str, Any]) -> list[str]:
    return [check.answer for check in judge(results).checks]


def test_a_good_run_is_told_so(sample: dict[str, Any]) -> None:
    verdict = judge(sample)
    assert verdict.answer == "yes"
    assert verdict.text == (
        "The model forgot what it should and kept the rest. A test could not tell it apart from a model that never "
        "saw the data. Whether attacks bring it back is not known."
    )
    assert _answers(sample) == [*["yes"] * 4, "unknown"]  # no attack was tried


@pytest.mark.parametrize(
    ("forget", "retain", "quality", "feasible", "expected", "headline"),
    [
        (0.9, 0.99, 1e-21, True, "no", "The model did not forget but kept the rest."),
        (0.3, 0.99, 1e-21, True, "partly", "The model forgot only a part of what it should but kept the rest."),
        (0.0, 0.99, 1e-9, True, "partly", "The model forgot what it should and kept the rest."),
        (0.0, 0.85, 0.4, True, "partly", "The model forgot what it should but lost a part of the rest."),
        (0.0, 0.0, 0.4, False, "no", "The model forgot what it should but lost the rest, with a constraint violated."),
        (0.9, 0.1, 0.4, True, "no", "The model did not forget and lost the rest."),
    ],
)
def test_the_headline_says_what_happened(
    sample: dict[str, Any],
    forget: float,
    retain: float,
    quality: float,
    feasible: bool,
    expected: str,
    headline: str,
) -> None:
    sample["unlearned"] |= {"forget_probability": forget, "retain_probability": retain}
    sample["constraints"][0]["feasible"] = feasible
    verdict = judge({**sample, "forget_quality": quality})
    assert (verdict.answer, verdict.headline) == (expected, headline)


def test_violated_constraints_are_named_with_their_numbers(sample: dict[str, Any]) -> None:
    sample["constraints"][1] |= {"loss": 0.5, "feasible": False}
    check = judge(sample).checks[2]
    assert (check.answer, check.reason) == ("no", "1 of 2 violated (world_facts: loss 0.5 > eps 0.03).")


def test_what_is_missing_is_unknown_not_zero(sample: dict[str, Any]) -> None:
    sample |= {"reference": None, "forget_quality": None, "constraints": []}
    sample["absent"] = {"forget_quality": "the reference logs are missing"}
    assert _answers(sample) == ["yes", "yes", "unknown", "unknown", "unknown"]
    assert "the reference logs are missing" in judge(sample).checks[3].reason
    sample["unlearned"]["retain_probability"] = math.nan
    assert judge(sample).answer == "unknown"


def test_a_target_that_knew_nothing_has_forgotten_nothing(sample: dict[str, Any]) -> None:
    sample["target"]["forget_probability"] = 0.002
    assert judge(sample).checks[0].answer == "unknown"
    assert judge(sample).answer == "unknown"


def test_markdown_table_is_one_row_a_metric(sample: dict[str, Any]) -> None:
    lines = markdown_table(sample).splitlines()
    assert lines[0] == "| Metric | Target | Unlearned | Reference | Should be |"
    assert lines[2] == "| Forget probability | 0.998 | 0.002 | 0.002 | as the reference |"
    assert "| Forget probability, questions reworded | 0.774 | 4.1e-04 | 5.0e-04 | as the reference |" in lines
    assert lines[-1] == "| Forget quality (KS p-value) |  | 0.42 |  | &gt; 0.05 |"
    assert len(lines) == 2 + 9 + 1


def test_markdown_constraints_escape_names(sample: dict[str, Any]) -> None:
    sample["constraints"] = [{"name": "a|b\n<i>", "eps": 0.1, "loss": 0.2, "multiplier": math.inf, "feasible": False}]
    assert markdown_constraints(sample).splitlines()[2] == "| a\\|b &lt;i&gt; | 0.1 | 0.2 | ∞ | no |"
    assert markdown_constraints({**sample, "constraints": []}) == ""


def test_terminal_table_has_scores_constraints_and_verdict(sample: dict[str, Any]) -> None:
    sample["constraints"][0] |= {"name": "[red]retain", "feasible": False}
    sample["unlearned"]["standard_error"] = {"retain_rouge": 0.01}
    stream = io.StringIO()
    Console(file=stream, width=140).print(results_table(sample))
    text = stream.getvalue()
    assert "Loss of [red]retain" in text
    assert "(violated)" in text
    assert "0.981 ± 0.010" in text
    assert "with a constraint violated" in text
    assert "3 min 14 s" in text


def test_metrics_nobody_described_are_shown_last(sample: dict[str, Any]) -> None:
    sample["unlearned"]["my_own_score"] = 12.5
    assert "| My own score | – | 12.500 | – |  |" in markdown_table(sample).splitlines()[-2]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0.000"), (1.0, "1.000"), (4e-5, "4.0e-05"), (None, "–"), (math.nan, "–"), (-math.inf, "-∞")],
)
def test_scores_are_written_alike(value: float | None, text: str) -> None:
    assert formats.score(value) == text


def test_other_numbers_are_written_alike() -> None:
    assert [formats.p_value(p) for p in (0.4216, 0.05, 1.8e-21, None)] == ["0.42", "0.05", "1.8e-21", "–"]
    assert formats.p_value(0.0, -400.2) == "1e-400"
    assert [formats.duration(s) for s in (3.21, 61.0, 194.0, 7260.0)] == ["3.2 s", "61 s", "3 min 14 s", "2 h 01 min"]
    assert formats.loss(0.0220001) == "0.022"
    assert formats.percent(0.9934) == "99.3%"


def test_marked_words_repeat_the_answer_and_not_the_question() -> None:
    pieces = leaked_words("Ilse Marandel was born in Torvik, 61.", "Born with luck in Torvik in 61", "Who is Ilse?")
    assert "".join(text for text, _ in pieces) == "Ilse Marandel was born in Torvik, 61."
    assert [text for text, marked in pieces if marked] == ["born", "Torvik", "61"]
    assert leaked_words("", "x", "y") == []
    assert leaked_words("Meridian Prize", "the Meridian Prize", "") == [("Meridian Prize", True)]


def test_over_forgetting_is_said_even_where_forget_quality_is_high(sample_factory):
    results = sample_factory()
    values = results if isinstance(results, dict) else results.as_dict()
    values["forget_quality"] = 0.5
    for auc, word in ((0.98, "less likely"), (0.02, "more likely")):
        values["unlearned"]["mia_auc"] = auc
        verdict = judge(values)
        (check,) = [check for check in verdict.checks if check.name == "indistinguishable"]
        assert check.answer == "partly"
        assert word in check.reason
        assert verdict.answer != "yes"
    values["unlearned"]["mia_auc"] = 0.55
    (check,) = [check for check in judge(values).checks if check.name == "indistinguishable"]
    assert check.answer == "yes"
