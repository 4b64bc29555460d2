"""One limit on a retain loss, absolute or relative to the loss of the model that is about to be unlearned."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace


def check_number(owner: str, field: str, value: float | None, *, positive: bool = False) -> None:
    """Raise unless `value` is None or a finite number that is >= 0 (> 0 with `positive`)."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{owner}: {field} must be a number, got {value!r} of type {type(value).__name__}.")
    if not math.isfinite(value) or value < 0 or (positive and value == 0):
        raise ValueError(f"{owner}: {field} must be finite and {'> 0' if positive else '>= 0'}, got {value!r}.")


@dataclass(frozen=True, kw_only=True)
class RetainConstraint:
    r"""One limit on a retain loss: `loss <= eps`.

    Args:
        name (`str`):
            Name of the retain set, the key of its loss in every mapping and of its logged metrics.
        eps (`float`, *optional*):
            Absolute limit, in the units of the loss (nats per token for cross-entropy).
        tolerance (`float`, *optional*):
            Relative limit: `eps = (1 + tolerance) * reference loss`, where the reference loss is measured with the
            model that is about to be unlearned. Exactly one of `eps` and `tolerance` must be given.
        multiplier (`float`, *optional*):
            Initial multiplier lambda_0, in place of the one shared by all constraints.
        step_size (`float`, *optional*):
            Step eta of the ascent, in place of the one shared by all constraints.

    Raises:
        `ValueError`: if neither or both limits are given, or a number is negative, NaN or infinite.
        `TypeError`: if a value is not a number.
    """

    name: str
    eps: float | None = None
    tolerance: float | None = None
    multiplier: float | None = None
    step_size: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise ValueError(f"RetainConstraint: name must be a non-empty string, got {self.name!r}.")
        owner = f"RetainConstraint {self.name!r}"
        if (self.eps is None) == (self.tolerance is None):
            raise ValueError(
                f"{owner}: give exactly one of eps (absolute) and tolerance (relative to the reference loss), "
                f"got eps={self.eps!r} and tolerance={self.tolerance!r}."
            )
        check_number(owner, "eps", self.eps)
        check_number(owner, "tolerance", self.tolerance)
        check_number(owner, "multiplier", self.multiplier)
        check_number(owner, "step_size", self.step_size, positive=True)

    def calibrated(self, reference_loss: float) -> RetainConstraint:
        """Return the constraint with an absolute limit.

        Args:
            reference_loss (`float`):
                Token-mean loss of the reference model on this retain set, over all ranks. Ignored where
                `eps` is given.

        Raises:
            `ValueError`: if the reference loss is not a finite number above zero, so that no relative limit exists.
        """
        if self.tolerance is None:
            return self
        if not math.isfinite(reference_loss) or reference_loss <= 0:
            raise ValueError(
                f"RetainConstraint {self.name!r}: a relative limit needs a finite reference loss above 0, got "
                f"{reference_loss!r}. Check the retain set's labels, or give an absolute eps (a divergence from the "
                "reference model is 0 at the start, so it always needs one)."
            )
        return replace(self, eps=(1.0 + self.tolerance) * float(reference_loss), tolerance=None)
