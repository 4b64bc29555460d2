"""One number of several metrics, by which a checkpoint is chosen."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from transformers import TrainingArguments

from ..metrics.functional import harmonic_mean

Composite = Callable[[dict[str, float]], float] | Sequence[str]
PREFIX = "unlearn/"
COMPLEMENT = "1-"
# Not in [0, 1], or (mia_auc) best in the middle: no parts of a harmonic mean.
_NOT_AVERAGED = ("forget_nll", "forget_quality_log10", "mia_auc")


def compose(composite: Composite, values: Mapping[str, float]) -> float:
    """
    The composite of metrics.

    Args:
        composite (`Callable[[dict[str, float]], float]` or `Sequence[str]`):
            A function of all metrics by name, or the names of those whose harmonic mean is taken (0 if any is 0), each
            alone or as `"1-name"` for its complement.
        values (`Mapping[str, float]`):
            The metrics by name.

    Raises:
        TypeError: the function returned something other than a number.
        ValueError: it returned NaN.
    """
    if callable(composite):
        result = composite(dict(values))
        try:
            number = float(result)
        except (TypeError, ValueError) as error:
            raise TypeError(f"composite returned {result!r:.80}; expected one number.") from error
        if math.isnan(number):  # nothing is better than NaN: a checkpoint that has it would stay the best one
            raise ValueError(f"composite returned NaN for {dict(values)}; return -inf for what must not be chosen.")
        return number
    chosen = [(name.startswith(COMPLEMENT), values[name.removeprefix(COMPLEMENT)]) for name in composite]
    return harmonic_mean([1.0 - value if complement else value for complement, value in chosen])


def check_composite(composite: Composite, names: Sequence[str]) -> None:
    """
    Refuses a composite that could not be computed from metrics of these names.

    Raises:
        TypeError: neither a function nor names, or a function that returns no number.
        ValueError: no names, or names of metrics that will not be there or are not in [0, 1].
    """
    if callable(composite):
        compose(composite, dict.fromkeys(names, 0.5))
        return
    if not isinstance(composite, Sequence) or not all(isinstance(name, str) for name in composite):
        raise TypeError(f"composite is {composite!r:.80}; expected a function of the metrics, or names of metrics.")
    if not composite:
        raise ValueError("composite names no metric; expected at least one, or None.")
    allowed = [name for name in names if name not in _NOT_AVERAGED]
    unknown = [name for name in composite if name.removeprefix(COMPLEMENT) not in allowed]
    if unknown:
        missing = "forget_quality" in {name.removeprefix(COMPLEMENT) for name in unknown}
        raise ValueError(
            f"composite names {unknown}; expected metrics in [0, 1] that there are with these rows and options, each "
            f"alone or as '1-name': {', '.join(allowed)}.{' Forget quality needs a reference.' if missing else ''}"
        )


def check_best(args: TrainingArguments, names: Sequence[str], *, at_evaluate: bool) -> None:
    """
    Refuses a best metric of the callback that no evaluation would have, or that is compared the wrong way round.

    Args:
        args (`TrainingArguments`):
            Arguments of the run.
        names (`Sequence[str]`):
            The callback's metrics.
        at_evaluate (`bool`):
            Whether the metrics are there at every evaluation of the trainer.

    Raises:
        ValueError: as above; other metrics than the callback's are left to the trainer.
    """
    asked = (args.metric_for_best_model or "").removeprefix("eval_")
    if not asked.startswith(PREFIX):
        return
    name = asked.removeprefix(PREFIX)
    if name not in names:
        reason = ", but the callback has no composite" if name == "composite" else ""
        raise ValueError(
            f"metric_for_best_model is {args.metric_for_best_model!r}{reason}; UnlearningEvalCallback has: "
            f"{', '.join(PREFIX + known for known in names)}."
        )
    if not at_evaluate:
        raise ValueError(
            f"metric_for_best_model={args.metric_for_best_model!r} needs the metric at every evaluation of the "
            "trainer. Leave at_evaluate=True."
        )
    less = name.startswith("forget_") and name.endswith(("probability", "rouge"))
    if bool(args.greater_is_better) == less and name != "mia_auc":
        raise ValueError(
            f"greater_is_better is {args.greater_is_better}, but of {args.metric_for_best_model!r} "
            f"{'less' if less else 'more'} is better. Set greater_is_better={not less}."
        )
