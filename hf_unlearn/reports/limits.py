"""What a report does not show: only what was really not tested."""

from __future__ import annotations

from .attack_words import KNOWN, outcomes_of
from .schema import Results


def untested(results: Results) -> list[tuple[str, str]]:
    """Title and text of each limit of these results, for the section "What this does not show"."""
    # an attack that failed, or that was run on other models alone, tested nothing
    tried = {outcome.attack for outcome in outcomes_of(results) if "unlearned" in outcome.subjects()}
    limits = [("Depth", _depth(tried))]
    by_prompt = [words for words in KNOWN if words.untested]
    missing = [words.untested for words in by_prompt if words.name not in tried]
    if len(missing) == len(by_prompt):
        text = "Rewritten prompts, given first words and optimised suffixes can recover what plain questions do not."
        limits.append(("Attacks", text))
    elif missing:
        limits.append(("Attacks", f"Not tested here: {', '.join(missing)}."))
    text = "The scores hold for the examples that were scored. Knowledge that is in no retain set is not protected "
    limits.append(("Other data", text + "by any constraint."))
    if "over_refusal" not in tried and tried & {"static", "multi_turn"}:
        limits.append(("Over-refusal", "Whether harmless prompts are refused was not tested here."))
    text = "A test that finds no difference is no proof that there is none, and no certificate of deletion."
    return [*limits, ("Proof", text)]


def _depth(tried: set[str]) -> str:
    hidden = "Knowledge can be hidden instead of removed."
    relearning = "Whether a little fine-tuning brings it back (relearning) was not tested here"
    if "relearn" not in tried:
        return (
            f"{hidden} {relearning}{'.' if 'quantise' in tried else ', and neither was quantisation of the weights.'}"
        )
    stronger = "Fine-tuning with more steps, more rows or other rates than those tested may bring back more."
    if "quantise" not in tried:
        return f"{hidden} {stronger} Quantisation of the weights was not tested here."
    return f"{hidden} {stronger}"
