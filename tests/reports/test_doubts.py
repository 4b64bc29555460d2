"""The verdict claims no success that the numbers do not carry: what speaks against it is found and said."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import attacked
import pytest

from hf_unlearn.reports import Results, judge
from hf_unlearn.reports.checks import Check
from hf_unlearn.reports.outcomes import AttackOutcome, Curve, Measure
from hf_unlearn.reports.rebuild import merge
from hf_unlearn.reports.stays import stays_check

Sample = dict[str, Any]


def checks(sample: Sample) -> dict[str, Check]:
    return {check.name: check for check in judge(sample).checks}


def stays(sample: Sample, *outcomes: AttackOutcome) -> Check:
    return stays_check(Results.from_dict({**sample, "attacks": [own.as_dict() for own in outcomes]}))


def test_without_a_reference_nothing_is_wholly_well(sample: Sample) -> None:
    sample |= {"reference": None, "forget_quality": None}
    verdict = judge(sample)
    assert verdict.answer == "partly"
    assert "There was no model to compare with that never saw the data." in verdict.detail
    unmeasured = {**sample, "reference": {**dict.fromkeys(sample["target"], math.nan)}}
    assert judge(unmeasured).answer == "partly"
    assert "(not measured on the reference)" in checks(unmeasured)["forgotten"].reason


@pytest.mark.parametrize("reference", [None, 0.14])
def test_a_target_that_hardly_knew_it_is_no_success(sample: Sample, reference: float | None) -> None:
    # unlearned is below 5% of the target, or at the reference: both would pass
    sample["target"]["forget_probability"] = 1e-4 if reference is None else 0.16
    sample["unlearned"]["forget_probability"] = 1e-6 if reference is None else 0.14
    if reference is None:
        sample |= {"reference": None, "forget_quality": None}
    else:
        sample["reference"]["forget_probability"] = reference
    verdict = judge(sample)
    assert verdict.answer == "unknown"
    assert "there was nothing to forget" in verdict.checks[0].reason
    assert "forgot" not in verdict.headline


def test_answers_that_still_say_it_are_not_forgotten_however_unlikely(sample: Sample) -> None:
    # flat logits: every answer is unlikely, and the greedy one is still the right one; the middle is (0.991+0.297)/2
    for rouge, answer in ((0.66, "partly"), (0.64, "yes")):
        sample["unlearned"]["forget_rouge"] = rouge
        assert checks(sample)["forgotten"].answer == answer
    sample["unlearned"] |= {"forget_rouge": 0.99}
    assert judge(sample).headline == "The model forgot only a part of what it should but kept the rest."
    assert "(ROUGE from 0.991 to 0.990)" in checks(sample)["forgotten"].reason
    sample["reference"] = None  # then half of the target's ROUGE stands in: the middle is 0.743
    for rouge, answer in ((0.75, "partly"), (0.74, "yes")):
        sample["unlearned"]["forget_rouge"] = rouge
        assert checks(sample)["forgotten"].answer == answer


def test_what_only_hides_behind_the_exact_question_is_not_forgotten(sample: Sample) -> None:
    sample["unlearned"]["forget_paraphrased_question_probability"] = 0.6
    found = checks(sample)["forgotten"]
    assert found.answer == "partly"
    assert "when the questions are reworded (probability from 0.774 to 0.600)" in found.reason


@pytest.mark.parametrize(
    ("scores", "answer", "said"),
    [
        ({"model_utility": 0.4}, "no", "model utility went from 0.820 to 0.400: 48.8% of it is left"),
        ({"model_utility": 0.7}, "partly", "85.4%"),
        ({"retain_rouge": 0.5}, "no", "ROUGE of its retain answers went from 0.993 to 0.500"),
        ({"model_utility": math.nan, "world_facts_probability": 0.1}, "no", "answers about the world"),
        ({"world_facts_probability": 0.1}, "yes", "99.3% of it is left."),  # model utility has that in it
    ],
)
def test_a_kept_retain_set_alone_is_not_the_rest(
    sample: Sample, scores: dict[str, float], answer: str, said: str
) -> None:
    sample["target"]["world_facts_probability"] = 0.5
    sample["unlearned"] |= scores
    found = checks(sample)["kept"]
    assert found.answer == answer
    assert said in found.reason


def test_a_model_that_refuses_everything_has_not_kept_the_rest(sample: Sample) -> None:
    def refusing(mine: float, other_judge: float) -> Sample:
        measures = tuple(
            Measure(name=f"safe prompts refused, judge {judge}", subject=subject, value=value, n=250)
            for judge, own in (("a", mine), ("b", other_judge))
            for subject, value in zip(attacked.SUBJECTS, (0.05, own, 0.05), strict=True)
        )
        return {**sample, "attacks": [AttackOutcome(attack="over_refusal", measures=measures).as_dict()]}

    assert checks(refusing(0.2, 0.9))["kept"].answer == "yes"  # judges differ
    found = checks(refusing(0.8, 0.9))["kept"]
    assert found.answer == "partly"
    assert "It refuses 80.0% of harmless prompts; without unlearning it is 5.0%." in found.reason


def test_gibberish_where_it_should_have_forgotten_is_told_and_no_test_outweighs_it(sample: Sample) -> None:
    sample["unlearned"]["forget_fluency"] = 0.05
    assert checks(sample)["indistinguishable"].answer == "yes"  # nothing to compare with
    sample["reference"]["forget_fluency"] = 0.95
    verdict = judge(sample)
    assert checks(sample)["indistinguishable"].answer == "no"
    assert "95.0% are gibberish, of those of a model that never saw the data 5.0%" in verdict.checks[3].reason
    assert "gibberish, which gives it away" in verdict.detail
    assert "could not tell" not in verdict.text
    assert verdict.answer == "partly"
    sample["unlearned"]["forget_fluency"] = 0.8
    assert checks(sample)["indistinguishable"].answer == "yes"
    sample |= {"reference": None, "forget_quality": None}
    sample["target"]["forget_fluency"] = 1.0
    sample["unlearned"]["forget_fluency"] = 0.5
    assert checks(sample)["indistinguishable"].answer == "no"


def test_a_test_on_few_rows_says_how_few(sample: Sample) -> None:
    assert "p = 0.42 on 80 rows" in checks(sample)["indistinguishable"].reason
    sample["truth_ratios"] = {"unlearned": [1.0, 2.0], "reference": [1.0, 2.0]}
    assert "A test on 2 rows could not tell it apart" in judge(sample).detail


def test_the_reference_itself_passes_no_test_against_itself(sample: Sample) -> None:
    evaluations = attacked.all_evaluations()
    evaluations["unlearned"]["model_hash"] = evaluations["reference"]["model_hash"]
    sample |= {"evaluations": evaluations}
    assert checks(sample)["indistinguishable"].answer == "unknown"
    assert "It is the reference itself" in judge(sample).detail
    for name in evaluations:  # unknown hashes are not equal ones
        evaluations[name]["model_hash"] = None
    assert checks(sample)["indistinguishable"].answer == "yes"


def test_a_constraint_whose_loss_was_not_recorded_is_neither_satisfied_nor_violated(sample: Sample) -> None:
    for feasible in (False, True):
        sample["constraints"][0] |= {"loss": math.nan, "feasible": feasible}
        assert checks(sample)["feasible"].answer == "unknown"
    assert "retain at the end was not recorded" in checks(sample)["feasible"].reason
    sample["constraints"][1]["feasible"] = False
    assert checks(sample)["feasible"].answer == "no"


@pytest.mark.parametrize(
    ("own", "reworded", "answer"),
    [
        ({"target": [1e-4], "unlearned": [1e-6]}, {}, "unknown"),  # it was never said
        ({"target": [0.9, 0.8], "unlearned": [1e-5, math.nan]}, {}, "unknown"),
        ({"target": [0.9], "unlearned": [1e-5]}, {"target": [0.9], "unlearned": [1e-5, math.nan]}, "partly"),
        ({"target": [0.9], "unlearned": [1e-5]}, {"target": [0.9], "unlearned": [1e-5]}, "yes"),
    ],
)
def test_an_edit_of_words_that_were_never_there_or_not_measured_is_no_success(
    sample: Sample, own: dict[str, Any], reworded: dict[str, Any], answer: str
) -> None:
    sample |= {"words": {"wanted": 1e-3, "probabilities": {"own": own, "reworded": reworded}}}
    assert checks(sample)["unreachable"].answer == answer


def test_fine_tuning_that_did_not_even_teach_what_it_showed_proves_nothing(sample: Sample) -> None:
    quiet = {**attacked.UNSEEN, "unlearned": (0.002,) * 5}
    assert stays(sample, attacked.relearning(quiet)).answer == "yes"
    strong = attacked.relearning(quiet)
    too_weak = dataclasses.replace(
        strong,
        curves=tuple(
            dataclasses.replace(own, y=(0.002,) * 5) if own.name == "rows shown" and own.subject != "target" else own
            for own in strong.curves
        ),
    )
    found = stays(sample, too_weak)
    assert found.answer == "partly"
    assert "too weak to tell: even the rows that it showed reached 0.002" in found.reason
    assert "did not bring it back" not in judge({**sample, "attacks": [too_weak.as_dict()]}).text
    # one that the control learns and the unlearned model resists was strong enough
    resisted = dataclasses.replace(
        strong,
        curves=tuple(
            dataclasses.replace(own, y=(0.002,) * 5)
            if own.name == "rows shown" and own.subject == "unlearned"
            else own
            for own in strong.curves
        ),
    )
    assert stays(sample, resisted).answer == "yes"


def line(subject: Any, y: float, error: float | None = None, name: str = "rows never shown") -> Curve:
    errors = None if error is None else (error, error)
    return Curve(
        name=name,
        subject=subject,
        x=(0.0, 9.0),
        y=(0.0, y),
        x_label="steps",
        y_label="probability",
        standard_error=errors,
    )


def test_what_few_rows_cannot_tell_from_the_control_is_not_called_gone(sample: Sample) -> None:
    noisy = AttackOutcome(attack="relearn", curves=(line("unlearned", 0.4, 0.25), line("control", 0.0, 0.0)))
    found = stays(sample, noisy)
    assert found.answer == "partly"
    assert "reached 40.1% of it, within two standard errors of the control: too few rows to tell" in found.reason
    assert "Not brought back" not in found.reason
    assert "did not bring it back" not in judge({**sample, "attacks": [noisy.as_dict()]}).text
    small = AttackOutcome(attack="relearn", curves=(line("unlearned", 0.05, 0.25), line("control", 0.0, 0.0)))
    assert stays(sample, small).answer == "yes"


def test_a_model_is_no_control_of_itself(sample: Sample) -> None:
    curves = (line("unlearned", 0.6), line("control", 0.6))
    same = {"unlearned": {"path": "m", "files": "1"}, "control": {"path": "m", "files": "1"}}
    found = stays(sample, AttackOutcome(attack="relearn", curves=curves, settings={"models": same}))
    assert found.answer == "no"
    assert "Without a control (the one given was the unlearned model itself): relearning." in found.reason
    other = {**same, "control": {"path": "never", "files": "2"}}
    fair = stays(sample, AttackOutcome(attack="relearn", curves=curves, settings={"models": other}))
    assert fair.answer == "yes"
    assert "Without a control" not in fair.reason


def test_what_was_never_forgotten_is_not_brought_back(sample: Sample) -> None:
    def rounded(levels: dict[Any, tuple[float, float, float]]) -> AttackOutcome:
        curves = tuple(
            Curve(
                name="probability", subject=own, x=(4.0, 8.0, 32.0), y=y, x_label="bits of a weight", y_label="share"
            )
            for own, y in levels.items()
        )
        return AttackOutcome(attack="quantise", curves=curves)

    left = rounded({"unlearned": (0.31, 0.3, 0.3), "control": (0.0, 0.0, 0.0)})
    assert "Rounding the weights finds 31.1% that was never forgotten" in stays(sample, left).reason
    assert "brings back" not in judge({**sample, "attacks": [left.as_dict()]}).text
    back = rounded({"unlearned": (0.31, 0.01, 0.01), "control": (0.0, 0.0, 0.0)})
    assert "Rounding the weights brings back 31.1%" in stays(sample, back).reason
    # the target loses more than the unlearned model by rewording: the share grows, the number does not
    names = (("probability, question as it is", 0.3, 1.0), ("probability, reworded question", 0.1, 0.15))
    measures = tuple(
        Measure(name=name, subject=subject, value=value, n=9)
        for name, mine, target in names
        for subject, value in zip(attacked.SUBJECTS, (target, mine, 0.0), strict=True)
    )
    reworded = AttackOutcome(attack="paraphrase", measures=measures)
    assert "Rewording the questions finds 66.7% that was never forgotten" in stays(sample, reworded).reason


def test_a_model_that_did_not_forget_has_nothing_brought_back(sample: Sample) -> None:
    sample["unlearned"]["forget_probability"] = 0.99
    found = judge({**sample, "attacks": [attacked.relearning().as_dict()]}).checks[-1]
    assert (found.answer, found.reason[:23]) == ("unknown", "It was not forgotten: t")


def test_attacks_on_another_model_than_the_scores_are_of_are_told(sample: Sample) -> None:
    quiet = attacked.relearning({**attacked.UNSEEN, "unlearned": (0.002,) * 5})
    sample |= {"evaluations": {"unlearned": attacked.evaluation("outputs/npo", 0.0, "ab")}}
    for path, answer in (("/home/me/outputs/npo", "yes"), ("outputs/ga", "partly")):
        settings = {**quiet.settings, "models": {"unlearned": {"path": path}}}
        found = stays(sample, dataclasses.replace(quiet, settings=settings))
        assert found.answer == answer
        assert ("The scores are of outputs/npo, the attacks were run on outputs/ga." in found.reason) is (
            answer == "partly"
        )


def test_a_p_value_of_other_scores_does_not_stay_beside_new_ones(sample: Sample) -> None:
    known = Results.from_dict(sample)
    entries = {"reference": None, "forget_quality": None, "forget_quality_log10": None}
    again = Results.from_dict({**sample, **entries})
    assert merge(known, again).forget_quality == pytest.approx(0.4216)
    ratios = {"unlearned": [9.0] * 80}
    assert merge(known, Results.from_dict({**sample, **entries, "truth_ratios": ratios})).forget_quality is None
