"""Uncertainty of numbers made of several means: whole rows are drawn again, with all their scores.

Shapes: r draws, n rows of a sample.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from ..metrics.arrays import FloatArray
from ..metrics.uncertainty import Estimate, auc_of_draws, bootstrap

Columns = Mapping[str, FloatArray]
Samples = Mapping[str, Columns]
"""By sample and column the score of each row `(n,)`; in a statistic of draws `(r, n)`."""


def joint_bootstrap(
    statistic: Callable[[Samples], FloatArray], samples: Samples, *, resamples: int = 1000, seed: int = 0
) -> Estimate:
    """
    Standard error and interval of a statistic of several samples ([`bootstrap`]): a row that is drawn brings all its
    columns along, for example its scores under the model and under the reference. Samples are drawn on their own.

    Args:
        statistic (`Callable[[Samples], np.ndarray]`):
            From draws by sample and column, each `(r, n)`, to `(r,)`.
        samples (`Mapping[str, Mapping[str, np.ndarray]]`):
            Columns `(n,)` by name, of each sample.
        resamples, seed (`int`, *optional*):
            As in [`bootstrap`].
    """
    names = {sample: list(columns) for sample, columns in samples.items()}
    arrays = [np.stack(list(columns.values()), axis=-1) for columns in samples.values()]

    def named(*draws: FloatArray) -> FloatArray:
        view = {
            sample: {column: draw[..., number] for number, column in enumerate(columns)}
            for (sample, columns), draw in zip(names.items(), draws, strict=True)
        }
        return statistic(view)

    return bootstrap(named, *arrays, resamples=resamples, seed=seed)


def harmonic(values: Sequence[FloatArray]) -> FloatArray:
    """Harmonic mean `(r,)` of scores in [0, 1], each `(r,)`; 0 where one of them is 0."""
    stacked = np.stack(list(values), axis=-1)
    with np.errstate(divide="ignore", over="ignore"):
        return stacked.shape[-1] / (1.0 / stacked).sum(axis=-1)


def utility_of_draws(samples: Samples, parts: Sequence[str]) -> FloatArray:
    """[`model_utility`] `(r,)`: harmonic mean of the means of every column of these samples."""
    return harmonic([values.mean(axis=-1) for part in parts for values in samples[part].values()])


def memorization_of_draws(samples: Samples, sample: str) -> FloatArray:
    """[`memorization_score`] `(r,)` from its four columns of a sample."""
    columns = ("extraction_strength", "exact_memorization", "paraphrase_probability", "truth_share")
    return harmonic([1.0 - samples[sample][column].mean(axis=-1) for column in columns])


def aucs_of_draws(samples: Samples, attack: str) -> tuple[FloatArray, FloatArray]:
    """[`mia_auc`] `(r,)` of the model and of the reference, from an attack's columns of "forget" and "holdout"."""
    members, others = samples["forget"], samples["holdout"]
    own, theirs = (
        auc_of_draws(members[column], others[column]) for column in (f"mia_{attack}", f"reference_mia_{attack}")
    )
    return own, theirs


def closeness_of_draws(samples: Samples, attack: str) -> FloatArray:
    """[`mia_closeness`] `(r,)`."""
    auc, reference = aucs_of_draws(samples, attack)
    return 1.0 - np.abs(auc - reference) / np.maximum(reference, 1.0 - reference)


def privleak_of_draws(samples: Samples, attack: str) -> FloatArray:
    """[`privleak`] `(r,)`, infinite where the reference's AUC is 1 and the model's is not."""
    auc, reference = aucs_of_draws(samples, attack)
    certain = reference == 1.0
    with np.errstate(divide="ignore", invalid="ignore"):
        leak = 100.0 * ((1.0 - auc) / (1.0 - reference) - 1.0)  # in this form exactly -100 at an AUC of 1
    return np.where(certain, np.where(auc == 1.0, 0.0, np.inf), leak)
