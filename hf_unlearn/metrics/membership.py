"""Membership inference from per-row scores: AUC and PrivLeak.

A score is high for non-members: a mean NLL, or minus the mean of the lowest 40% of the token log-probabilities.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from hf_unlearn.metrics.arrays import is_share, rows


def mia_auc(member_scores: ArrayLike, nonmember_scores: ArrayLike) -> float:
    """Area under the ROC curve: P(non-member > member) + P(equal) / 2, by ranks.

    0.5 means that the attack cannot tell the two apart, 1 that all members score below all non-members (memorised), 0
    that members score above (over-forgotten).

    Args:
        member_scores (`ArrayLike`): scores `(n,)` of the rows to forget.
        nonmember_scores (`ArrayLike`): scores `(m,)` of held-out rows.

    Raises:
        `ValueError`: on an empty or NaN input.
    """
    from scipy.stats import rankdata  # half a second to import

    members, others = rows("member_scores", member_scores), rows("nonmember_scores", nonmember_scores)
    ranks = rankdata(np.concatenate([others, members]))
    m = len(others)
    return float((ranks[:m].sum() - m * (m + 1) / 2) / (m * len(members)))


def privleak(auc: float, reference_auc: float = 0.5) -> float:
    """PrivLeak (MUSE, arXiv 2407.06460): 100 ((1 - AUC) - (1 - AUC_ref)) / (1 - AUC_ref), in percent.

    0 is ideal, negative is under-unlearned, positive is over-unlearned. It diverges as AUC_ref -> 1, so report both
    AUCs beside it; at AUC_ref = 1 it is infinite, or 0 if the AUCs are equal.

    Args:
        auc (`float`): [`mia_auc`] of the unlearned model, forget rows as members.
        reference_auc (`float`, *optional*, defaults to `0.5`): the same of the retrained model.

    Raises:
        `ValueError`: if an AUC is not in [0, 1].
    """
    for name, value in (("auc", auc), ("reference_auc", reference_auc)):
        if not is_share(value):
            raise ValueError(f"{name} must be in [0, 1], got {value!r}.")
    if reference_auc == 1.0:
        return 0.0 if auc == 1.0 else math.inf
    return 100.0 * (reference_auc - auc) / (1.0 - reference_auc)
