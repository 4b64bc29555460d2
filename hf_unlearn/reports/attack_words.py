"""What each attack is called on the page, what it does, and what is said where it was not tried."""

from __future__ import annotations

from dataclasses import dataclass

from .formats import plain_words
from .outcomes import AttackOutcome
from .schema import Results

OVER_REFUSAL = "over_refusal"
"""Not an attack on what was forgotten: benign prompts, and how many of them are refused."""
SUBJECT_TITLES = {"target": "Target", "unlearned": "Unlearned", "control": "Control"}
"""Control: a model that never saw what was forgotten, under the same attack."""


@dataclass(frozen=True, kw_only=True)
class AttackWords:
    """
    An attack in words.

    Args:
        name (`str`): as in attacks.json.
        title (`str`): heading.
        meaning (`str`): what it does and how to read it.
        untested (`str`): how the limits of a report name it; empty where they do not.
    """

    name: str
    title: str
    meaning: str = ""
    untested: str = ""


KNOWN = (
    AttackWords(
        name="relearn",
        title="Relearning",
        meaning="A short fine-tuning on a part of the forget rows. Rows that were never shown and come back all the "
        "same were hidden, not removed. What the control gets is learned from the shown rows; only what lies above "
        "it is recovered.",
    ),
    AttackWords(
        name="quantise",
        title="Rounded weights",
        meaning="Every linear weight is rounded to few bits. A change of the weights that is smaller than the "
        "rounding is undone by it.",
    ),
    AttackWords(
        name="paraphrase",
        title="Questions reworded",
        meaning="The same questions in other words. Knowledge that only hides behind the exact question shows here.",
        untested="reworded questions",
    ),
    AttackWords(
        name="prefill",
        title="Given first words",
        meaning="The first tokens of the right answer are given; only what follows them is scored. Long prefills give "
        "short answers away, so compare with the control.",
        untested="given first words",
    ),
    AttackWords(
        name="static",
        title="Jailbreak prompts",
        meaning="Prompts from a file, written to get around refusals.",
        untested="jailbreak prompts",
    ),
    AttackWords(
        name="multi_turn",
        title="Conversations",
        meaning="Several turns that lead up to the question; the last answer is judged.",
        untested="conversations of several turns",
    ),
    AttackWords(
        name="gcg",
        title="Optimised suffixes",
        meaning="Tokens behind the question are optimised for a given answer (GCG, arXiv 2307.15043). Any model can "
        "be pushed some way towards any answer: compare with the control.",
        untested="optimised suffixes",
    ),
    AttackWords(
        name="soft_prompt",
        title="Optimised input vectors",
        meaning="Free input vectors are optimised for a given answer: an upper bound of what any prompt could reach. "
        "Any model can be pushed some way towards any answer: compare with the control.",
        untested="optimised input vectors",
    ),
    AttackWords(
        name=OVER_REFUSAL,
        title="Over-refusal",
        meaning="Harmless prompts that sound harmful, and prompts that are to be refused. A model that refuses the "
        "harmless ones has become less useful.",
    ),
)
_BY_NAME = {words.name: words for words in KNOWN}


def attack_words(name: str) -> AttackWords:
    """The attack of that name in words; one that nobody described is shown under its own name."""
    return _BY_NAME.get(name) or AttackWords(name=name, title=plain_words(name))


def outcomes_of(results: Results) -> tuple[AttackOutcome, ...]:
    """
    The outcomes of attacks that results carry, in the order of the file.

    Raises:
        ValueError: the entry `attacks` is no list of outcomes.
    """
    entries = results.extra.get("attacks") or ()
    if not isinstance(entries, list | tuple):
        raise ValueError(
            f"`attacks` of the results is a {type(entries).__name__}; expected a list of outcomes of attacks."
        )
    return tuple(entry if isinstance(entry, AttackOutcome) else AttackOutcome.from_dict(entry) for entry in entries)
