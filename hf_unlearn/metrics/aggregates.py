"""Aggregates of several metrics: one number for memorisation, privacy, utility, and for all of them.

Memorisation, privacy, utility and their aggregate follow OpenUnlearning (arXiv 2506.12618), the Unlearn Score PRISM
(arXiv 2509.23362). All are in [0, 1], higher is better, and 0 as soon as one part is 0: no part can make up for
another. Report the parts beside them.

Shapes: n rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike

from hf_unlearn.metrics.arrays import FloatArray, is_share, rows
from hf_unlearn.metrics.utility import harmonic_mean


def truth_share(log_truth_ratio: ArrayLike) -> FloatArray:
    """Share `(n,)` of the correct answer, `correct / (correct + wrong) = 1 / (1 + TR)`.

    1 where only the correct answer is likely, 1/2 where the wrong ones are as likely.

    Args:
        log_truth_ratio (`ArrayLike`):
            Natural logarithm of the truth ratio TR = wrong / correct, `(n,)` ([`log_truth_ratio`]). Infinite where
            one side has probability 0.

    Raises:
        `ValueError`: on an empty or NaN input.
    """
    values = rows("log_truth_ratio", log_truth_ratio)
    small = np.exp(-np.abs(values))  # never overflows
    return np.where(values > 0, small, 1.0) / (1.0 + small)


def memorization_score(
    *, extraction_strength: float, exact_memorization: float, paraphrase_probability: float, truth_share: float
) -> float:
    """How little is left of the forget set: harmonic mean of 1 - ES, 1 - EM, 1 - paraphrase probability and 1 - TR.

    The truth ratio of this formula is high for a model that remembers: the share of the correct answer. The mean of
    min(TR, 1/TR) of TOFU ([`forget_truth_ratio`]) is high for one that forgot, and would turn the score around.

    Args:
        extraction_strength (`float`): mean [`extraction_strength`] of the forget rows, in [0, 1].
        exact_memorization (`float`): mean [`exact_memorization`] of the forget rows, in [0, 1].
        paraphrase_probability (`float`): mean probability of the paraphrased answers, in [0, 1].
        truth_share (`float`): mean [`truth_share`] of the forget rows, in [0, 1]; 1/2 for a model without knowledge.

    Raises:
        `ValueError`: naming the parts that are NaN or outside [0, 1].
    """
    parts = {
        "extraction_strength": extraction_strength,
        "exact_memorization": exact_memorization,
        "paraphrase_probability": paraphrase_probability,
        "truth_share": truth_share,
    }
    return harmonic_mean([1.0 - value for value in _unit("memorization_score", parts)])


def mia_closeness(auc: float, reference_auc: float) -> float:
    """How close an attack's AUC is to that on the retrained model: 1 - |AUC - AUC_ref| / max(AUC_ref, 1 - AUC_ref).

    1 where the attack does as well on both, 0 where the difference is the largest that is possible. Both signs of the
    difference lower it: over-forgetting shows as much as memory.

    Args:
        auc (`float`): [`mia_auc`] on the unlearned model, forget rows as members, in [0, 1].
        reference_auc (`float`): the same on the retrained model, with the same rows.

    Raises:
        `ValueError`: if an AUC is NaN or outside [0, 1].
    """
    auc, reference = _unit("mia_closeness", {"auc": auc, "reference_auc": reference_auc})
    return 1.0 - abs(auc - reference) / max(reference, 1.0 - reference)


def privacy_score(aucs: Mapping[str, float], reference_aucs: Mapping[str, float]) -> float:
    """Harmonic mean of [`mia_closeness`] over attacks.

    Args:
        aucs (`Mapping[str, float]`): AUC on the unlearned model by attack; theirs are loss, zlib, min-k, min-k++.
        reference_aucs (`Mapping[str, float]`): the same attacks on the retrained model.

    Raises:
        `ValueError`: no attacks, not the same attacks on both sides, or an AUC outside [0, 1].
    """
    if not aucs:
        raise ValueError("privacy_score needs the AUC of at least one attack, got none.")
    if aucs.keys() != reference_aucs.keys():
        raise ValueError(
            f"Both models must be attacked alike, got {sorted(aucs)} and {sorted(reference_aucs)} for the reference."
        )
    for name, values in (("aucs", aucs), ("reference_aucs", reference_aucs)):
        _unit(name, values)
    return harmonic_mean([mia_closeness(auc, reference_aucs[attack]) for attack, auc in aucs.items()])


def utility_score(*, model_utility: float, fluency: float) -> float:
    """Harmonic mean of model utility and fluency.

    Args:
        model_utility (`float`): [`model_utility`], in [0, 1].
        fluency (`float`): share of the answers to forget questions that are no gibberish, in [0, 1].

    Raises:
        `ValueError`: naming the parts that are NaN or outside [0, 1].
    """
    return harmonic_mean(_unit("utility_score", {"model_utility": model_utility, "fluency": fluency}))


def aggregate_score(*, memorization: float, privacy: float, utility: float) -> float:
    """Harmonic mean of [`memorization_score`], [`privacy_score`] and [`utility_score`].

    Args:
        memorization (`float`): [`memorization_score`], in [0, 1].
        privacy (`float`): [`privacy_score`], in [0, 1].
        utility (`float`): [`utility_score`], in [0, 1].

    Raises:
        `ValueError`: naming the parts that are NaN or outside [0, 1].
    """
    parts = {"memorization": memorization, "privacy": privacy, "utility": utility}
    return harmonic_mean(_unit("aggregate_score", parts))


def unlearn_score(*, utility: float, effectiveness: float, privacy: float) -> float:
    """Unlearn Score of PRISM (arXiv 2509.23362): geometric mean of three normalised scores, 0 if any is 0.

    Args:
        utility (`float`): normalised to [0, 1], 1 where nothing of the utility was lost.
        effectiveness (`float`): normalised to [0, 1], 1 where everything was forgotten.
        privacy (`float`): normalised to [0, 1], 1 where no attack sees the forget set.

    Raises:
        `ValueError`: naming the parts that are NaN or outside [0, 1].
    """
    parts = _unit("unlearn_score", {"utility": utility, "effectiveness": effectiveness, "privacy": privacy})
    # the cube roots one by one: the product of small scores underflows
    return math.prod(value ** (1.0 / 3.0) for value in parts)


def _unit(name: str, parts: Mapping[str, float]) -> list[float]:
    bad = {part: value for part, value in parts.items() if not is_share(value)}
    if bad:
        raise ValueError(f"Every part of {name} must be in [0, 1], got {bad}.")
    return [float(value) for value in parts.values()]
