"""The answer in plain words: did it forget, did it keep the rest, and can anyone tell?"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from . import formats
from .checks import Answer, Check
from .doubts import gibberish, least_kept, refuses_too_much, same_weights, still_known
from .further import rows_of
from .recovered import LEAST_SPAN
from .schema import ModelScores, Results, as_results
from .stays import stays_check, stays_headline
from .words import Words, words_of

FORGET_SLACK = 0.01
"""How far above the reference's forget probability still counts as forgotten (absolute)."""
KEEP_YES, KEEP_PARTLY = 0.95, 0.80
"""Shares of the target's scores that count as kept, and as partly kept."""
INDISTINGUISHABLE = 0.05
"""p-value of the KS test above which the models are not told apart (TOFU, arXiv 2401.06121)."""
FEW_ROWS = 40
"""Rows below which the headline says how few the test had: TOFU's smallest part to forget has 40."""
REWORDED = 0.01
"""Probability below which a word counts as unreachable also where nothing guarantees it."""
MEMBERSHIP_SLACK = 0.2
"""How far from 0.5 the membership AUC against the reference may be before it tells the models apart."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """A headline, what a reader should know next, the overall answer, and the checks behind it."""

    headline: str
    detail: str
    answer: Answer
    checks: tuple[Check, ...]

    @property
    def text(self) -> str:
        """Headline and detail as one line."""
        return f"{self.headline} {self.detail}".strip()


def judge(results: Results | Mapping[str, Any]) -> Verdict:
    """The verdict on a run.

    * forgotten: forget probability at most the reference's + 0.01; partly when at least half of the way there, or
      when the answers or reworded questions show more than half of what the target knew. Without a reference, the
      level that is asked for is 5% of the target's, and the answer to all is "partly" at best.
    * kept: retain probability, and where they were measured retain ROUGE and model utility (without it the
      probabilities of real authors and world facts), at least 95% (partly: 80%) of the target's; partly when many
      more harmless prompts are refused.
    * feasible: every constraint is.
    * indistinguishable: forget quality p > 0.05; partly when the membership AUC, where it was measured, is further
      than 0.2 from 0.5; no when the answers to forget questions are gibberish and the reference's are not.
    * stays: attacks bring back at most 10% (partly: 50%) of what was forgotten, beyond what a model that never saw
      it gets; see [`stays_check`].

    For an edit the first question is whether its words are unreachable (as wanted at its own places; partly when a
    word has more than 1% under other questions), and the fourth one is not asked.
    """
    results = as_results(results)
    words = words_of(results)
    if words is not None:
        return _judge_edit(results, words)
    first = _forgotten(results)
    checks = (
        first,
        _kept(results),
        _feasible(results),
        _indistinguishable(results),
        stays_check(results, forgotten=first.answer),
    )
    forgotten, kept, feasible, indistinguishable, stays = (check.answer for check in checks)
    counted = [check.answer for check in checks if check.answer != "unknown"]
    answer: Answer = "yes" if set(counted) == {"yes"} else "partly" if "yes" in counted else "no"
    if "unknown" in (forgotten, kept):
        answer = "unknown"
    compared = results.reference is not None and not math.isnan(results.reference.forget_probability)
    if answer == "yes" and not compared:
        answer = "partly"
    headline, detail = _headline(results, forgotten, kept, feasible, indistinguishable)
    if "unknown" not in (forgotten, kept) and forgotten != "no":
        more = [] if compared else ["There was no model to compare with that never saw the data."]
        more.append(stays_headline(results) if stays != "unknown" else "Whether attacks bring it back is not known.")
        detail = " ".join(part for part in (detail, *more) if part)
    return Verdict(
        headline=headline,
        detail=detail,
        answer="no" if "no" in (forgotten, kept) else answer,
        checks=checks,
    )


def _judge_edit(results: Results, words: Words) -> Verdict:
    checks = (_unreachable(results, words), _kept(results), _feasible(results), stays_check(results))
    unreachable, kept, feasible, stays = checks
    given = {check.answer for check in (unreachable, kept)}
    answer: Answer = "unknown" if "unknown" in given else "no" if "no" in given else "partly"
    if given == {"yes"} and feasible.answer == "yes" and stays.answer in ("yes", "unknown"):
        answer = "yes"
    first = {
        "yes": "The words became unreachable",
        "partly": "The words became unreachable where the edit constrains them, but not all of them elsewhere",
        "no": "The words can still be reached",
    }
    second = {"yes": "the rest was kept", "partly": "a part of the rest was lost", "no": "the rest was lost"}
    if answer == "unknown":
        headline, detail = "There is no verdict: what it would rest on is missing.", ""
    else:
        headline = f"{first[unreachable.answer]}; {second[kept.answer]}."
        detail = "Only the constrained places are guaranteed, and whoever has the weights can take the edit out."
    return Verdict(headline=headline, detail=detail, answer=answer, checks=checks)


def _unreachable(results: Results, words: Words) -> Check:
    question = "Are the words unreachable?"
    before, after = words.largest("own", "target"), words.largest("own", "unlearned")
    if before is None or after is None or not results.constraints:
        return Check(name="unreachable", question=question, answer="unknown", reason="It was not measured.")
    if math.isnan(before) or math.isnan(after):
        return Check(name="unreachable", question=question, answer="unknown", reason="It was not measured.")
    if before <= words.wanted:
        reason = (
            f"Before the edit the likeliest word had {formats.score(before)}; at most {formats.score(words.wanted)} "
            "was wanted: there was nothing to make unreachable."
        )
        return Check(name="unreachable", question=question, answer="unknown", reason=reason)
    reason = (
        f"Under the questions that the edit was made for, the likeliest word went from {formats.score(before)} to "
        f"{formats.score(after)}"
    )
    answer: Answer = "yes" if all(constraint.feasible for constraint in results.constraints) else "no"
    elsewhere = words.largest("reworded", "unlearned")
    if elsewhere is not None:
        reason += f"; under the same questions reworded from {formats.score(words.largest('reworded', 'target'))} to "
        reason += formats.score(elsewhere)
        answer = "partly" if answer == "yes" and not elsewhere <= REWORDED else answer
    return Check(name="unreachable", question=question, answer=answer, reason=f"{reason}.")


def _headline(
    results: Results, forgotten: Answer, kept: Answer, feasible: Answer, indistinguishable: Answer
) -> tuple[str, str]:
    if "unknown" in (forgotten, kept):
        return "There is no verdict: what it would rest on is missing.", ""
    first = {
        "yes": "The model forgot what it should",
        "partly": "The model forgot only a part of what it should",
        "no": "The model did not forget",
    }[forgotten]
    same_direction = (forgotten == "yes") == (kept == "yes")
    second = {
        "yes": "kept the rest",
        "partly": "lost a part of the rest",
        "no": "lost the rest",
    }[kept]
    text = f"{first} {'and' if same_direction else 'but'} {second}"
    if feasible == "no":
        text += ", with a constraint violated"
    if forgotten == "yes" and same_weights(results, "unlearned", "reference"):
        return f"{text}.", "It is the reference itself, so no test can tell the two apart."
    if forgotten != "no" and gibberish(results):
        return f"{text}.", "Its answers to the forget questions are gibberish, which gives it away."
    if forgotten == "yes" and indistinguishable == "no":
        return f"{text}.", "It can still be told apart from a model that never saw the data."
    if forgotten == "yes" and indistinguishable == "partly":
        return f"{text}.", (
            "By truth ratio a test cannot tell it from a model that never saw the data; by the likelihood of the "
            "forgotten answers it can."
        )
    if forgotten == kept == indistinguishable == "yes":
        count = _tested(results)
        test = f"A test on {count} rows" if 0 < count < FEW_ROWS else "A test"
        return f"{text}.", f"{test} could not tell it apart from a model that never saw the data."
    return f"{text}.", ""


def _forgotten(results: Results) -> Check:
    before, after = results.target.forget_probability, results.unlearned.forget_probability
    question = "Did it forget?"
    reference: ModelScores | None = results.reference
    level = math.nan if reference is None else reference.forget_probability
    measured = not math.isnan(level)
    goal = level if measured else 0.05 * before
    reason = f"The forget answers' probability went from {formats.score(before)} to {formats.score(after)}"
    without = "no reference model" if reference is None else "not measured on the reference"
    reason += f"; a model that never saw them gives {formats.score(level)}." if measured else f" ({without})."
    if not (math.isfinite(before) and math.isfinite(after)):
        return Check(name="forgotten", question=question, answer="unknown", reason="It was not measured.")
    slack = FORGET_SLACK if measured else 0.0
    if before - goal < LEAST_SPAN:
        reason = f"The target gives the forget answers probability {formats.score(before)}"
        reason += f", a model that never saw them {formats.score(level)}" if measured else ""
        reason = f"{reason}: there was nothing to forget."
        return Check(name="forgotten", question=question, answer="unknown", reason=reason)
    answer: Answer = "yes" if after <= goal + slack else "partly" if after <= (before + goal) / 2 else "no"
    doubts = still_known(results) if answer == "yes" else []
    answer = "partly" if doubts else answer
    return Check(name="forgotten", question=question, answer=answer, reason=" ".join([reason, *doubts]))


def _kept(results: Results) -> Check:
    before, after = results.target.retain_probability, results.unlearned.retain_probability
    question = "Did it keep the rest?"
    if not (math.isfinite(before) and math.isfinite(after)) or before <= 0:
        return Check(name="kept", question=question, answer="unknown", reason="It was not measured.")
    share = after / before
    reason = (
        f"The retain answers' probability went from {formats.score(before)} to {formats.score(after)}: "
        f"{formats.percent(share)} of it is left."
    )
    other, sentence = least_kept(results)
    if other < min(share, KEEP_YES):
        share, reason = other, f"{reason} {sentence}"
    answer: Answer = "yes" if share >= KEEP_YES else "partly" if share >= KEEP_PARTLY else "no"
    refusing = refuses_too_much(results)
    if refusing:
        answer, reason = "partly" if answer == "yes" else answer, f"{reason} {refusing}"
    return Check(name="kept", question=question, answer=answer, reason=reason)


def _feasible(results: Results) -> Check:
    question = "Is every constraint satisfied?"
    if not results.constraints:
        reason = "This run had no constraints: nothing limited what may be lost."
        return Check(name="feasible", question=question, answer="unknown", reason=reason)
    unmeasured = [constraint.name for constraint in results.constraints if math.isnan(constraint.loss)]
    violated = [c for c in results.constraints if not c.feasible and not math.isnan(c.loss)]
    if unmeasured and not violated:
        reason = f"The loss of {', '.join(unmeasured)} at the end was not recorded."
        return Check(name="feasible", question=question, answer="unknown", reason=reason)
    if violated:
        listed = "; ".join(f"{c.name}: loss {formats.loss(c.loss)} > eps {formats.loss(c.eps)}" for c in violated)
        reason = f"{len(violated)} of {len(results.constraints)} violated ({listed})."
        return Check(name="feasible", question=question, answer="no", reason=reason)
    if len(results.constraints) == 1:
        only = results.constraints[0]
        if only.multiplier is None:
            reason = f"Where the edit holds, a word is left at most {formats.score(only.loss)}; at most "
            reason += f"{formats.score(only.eps)} was wanted."
            return Check(name="feasible", question=question, answer="yes", reason=reason)
        reason = f"The retain loss ended at {formats.loss(only.loss)}, its limit eps is {formats.loss(only.eps)}."
    else:
        reason = f"Each of the {len(results.constraints)} retain losses ended at or below its limit eps."
    return Check(name="feasible", question=question, answer="yes", reason=reason)


def _indistinguishable(results: Results) -> Check:
    question = "Is it as if it had never seen the data?"
    quality = results.forget_quality
    babble = gibberish(results)
    if same_weights(results, "unlearned", "reference"):
        reason = "It is the reference: their weights have the same hash. That says nothing about a method."
        return Check(name="indistinguishable", question=question, answer="unknown", reason=reason)
    if quality is None or math.isnan(quality):
        why = results.absent.get("forget_quality", "it needs the truth ratios of a retain-only reference model")
        if babble:
            return Check(name="indistinguishable", question=question, answer="no", reason=babble)
        reason = f"Forget quality was not measured: {why}."
        return Check(name="indistinguishable", question=question, answer="unknown", reason=reason)
    shown = formats.p_value(quality, results.forget_quality_log10)
    count = _tested(results)
    shown += f" on {count} row{'s' * (count != 1)}" if count else ""
    if babble and quality > INDISTINGUISHABLE:
        reason = (
            f"Forget quality p = {shown}, above {INDISTINGUISHABLE}: by truth ratio it is. But it gives itself away. "
        )
        return Check(name="indistinguishable", question=question, answer="no", reason=reason + babble)
    auc = results.unlearned.extra.get("mia_auc", math.nan)
    if quality > INDISTINGUISHABLE and abs(auc - 0.5) > MEMBERSHIP_SLACK:
        reason = (
            f"Forget quality p = {shown}, above {INDISTINGUISHABLE}: by truth ratio it is. But the forgotten answers "
            f"are {'less' if auc > 0.5 else 'more'} likely than for the retain-only model (membership AUC "
            f"{formats.score(auc)}, 0.5 is no difference)."
        )
        return Check(name="indistinguishable", question=question, answer="partly", reason=reason)
    if quality > INDISTINGUISHABLE:
        reason = (
            f"Forget quality p = {shown}, above {INDISTINGUISHABLE}: by truth ratio, the test does not tell it from "
            "the retain-only model."
        )
        return Check(name="indistinguishable", question=question, answer="yes", reason=reason)
    reason = (
        f"Forget quality p = {shown}, not above {INDISTINGUISHABLE}: its truth ratios differ from those of the "
        f"retain-only model (too little or too much forgotten). {babble}".strip()
    )
    return Check(name="indistinguishable", question=question, answer="no", reason=reason)


def _tested(results: Results) -> int:
    """Rows that forget quality is over; 0 where the results do not say."""
    return len(results.truth_ratios.get("unlearned", ())) or rows_of(results).get("forget_quality", 0)
