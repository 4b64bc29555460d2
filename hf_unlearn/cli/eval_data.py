"""The data of `hf-unlearn eval`: benchmarks, holdout rows, and the evaluations of other models, read and checked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.tofu import TOFU_HUB_ID
from ..evaluation.record import FILE, Evaluation
from .data_arguments import load_rows
from .eval_arguments import CHOICES, EvalArguments

if TYPE_CHECKING:
    from ..data.multiple_choice_files import ChoiceRow
    from ..data.muse_files import MuseFiles
    from ..evaluation.tofu_files import TofuEvaluation, TofuReference
    from ..reports.eval_rows import EvalRows


@dataclass(frozen=True, kw_only=True)
class EvalData:
    """
    Everything that `hf-unlearn eval` reads before the model; what a benchmark has no use for is None or empty.

    Args:
        parts (`Mapping`): TOFU's or the user's rows by part.
        muse ([`MuseFiles`], *optional*): MUSE's rows.
        choices (`list[ChoiceRow]`, *optional*): questions; None where lm-evaluation-harness reads its own.
        holdout (`Any`, *optional*): rows that no model has seen.
        reference ([`TofuReference`], *optional*): scores of the retain-only model.
        reference_evaluation (`Any`, *optional*): its whole evaluation, where the folder of one was named.
        target ([`TofuEvaluation`], *optional*): the evaluation of the model before unlearning.
    """

    parts: dict[str, Any] = field(default_factory=dict)
    muse: MuseFiles | None = None
    choices: list[ChoiceRow] | None = None
    holdout: Any = None
    reference: TofuReference | None = None
    reference_evaluation: TofuEvaluation | Evaluation | None = None
    target: TofuEvaluation | None = None


def load_data(given: EvalArguments) -> EvalData:
    """
    Reads and checks every file that is named, before a model is loaded.

    Raises:
        FileNotFoundError, ValueError, TypeError: a file is missing or holds something else.
    """
    if given.benchmark == "muse":
        from ..data.muse_files import load_muse

        assert given.data is not None
        other = None if given.reference is None else _muse_reference(given.reference)
        return EvalData(muse=load_muse(given.data), reference_evaluation=other)
    if given.benchmark in CHOICES:
        from ..data.multiple_choice_files import load_multiple_choice

        return EvalData(choices=None if given.data is None else load_multiple_choice(given.data))
    holdout = None
    if given.holdout_dataset is not None:
        holdout = load_rows(given.holdout_dataset, given.holdout_config, given.holdout_split)
        missing = sorted({"question", "answer"} - set(holdout.column_names))
        if missing or not len(holdout):
            raise ValueError(
                f"holdout_dataset {given.holdout_dataset!r} has {len(holdout)} rows with {holdout.column_names}; "
                "expected at least one, with `question` and `answer`."
            )
    parts = _tofu_parts(given) if given.benchmark == "tofu" else _own_parts(given)
    from ..evaluation.tofu_files import SCORES_FILE, load_reference
    from ..evaluation.tofu_scoring import check_holdout, holdout_rows, matching_reference

    models: dict[str, Any] = {}
    if given.reference is not None:
        place = _existing(given.reference, "reference")
        models["reference"] = _read(lambda: load_reference(place), "reference", given.reference)
        folder = place if place.is_dir() else place.parent
        # a copied scores.json lies beside no evaluation, or beside another one
        if (folder / FILE).is_file() and place in (folder, folder / SCORES_FILE):
            models["reference_evaluation"] = _evaluated(folder, "reference", given)
    if given.target is not None:
        models["target"] = _evaluated(_existing(given.target, "target"), "target", given)
    if "target" in models and models.get("reference_evaluation") is not None:
        _check_comparable(models["target"], models["reference_evaluation"], given)
    if given.run is not None:
        from ..evaluation.training_run import read_training_run

        read_training_run(Path(given.run).expanduser())
    # the evaluation checks the same once more; here no model has been loaded yet
    others = holdout_rows(holdout, given.limit)
    rows: EvalRows
    if given.benchmark == "rows":
        from ..evaluation.own_rows import OwnEvalRows, check_parts

        check_parts(parts, reference=models.get("reference"), holdout=holdout)
        rows = OwnEvalRows(parts, given.limit)
    else:
        from ..reports.eval_rows import EvalRows as TofuRows

        rows = TofuRows(parts, given.limit)
    check_holdout(rows, others)
    matching_reference(rows, models.get("reference"))
    return EvalData(parts=parts, holdout=holdout, **models)


def _check_comparable(target: TofuEvaluation, reference: TofuEvaluation, given: EvalArguments) -> None:
    """The report compares the target with the reference, where its own evaluation has not: on the same rows only."""
    if "forget_quality" in target.evaluation.metrics:
        return
    try:
        target.scores.mia_auc_against(reference.scores)
    except ValueError as error:
        raise ValueError(
            f"target {given.target!r} cannot be compared with reference {given.reference!r}: {error} Or evaluate the "
            "target with this reference."
        ) from error


def _evaluated(place: Path, kind: str, given: EvalArguments) -> TofuEvaluation:
    from ..evaluation.tofu_files import TofuEvaluation

    found = _read(lambda: TofuEvaluation.load(place), kind, getattr(given, kind))
    if found.evaluation.benchmark != given.benchmark:
        raise ValueError(
            f"{kind} is {str(place)!r}, an evaluation on {found.evaluation.benchmark!r}; expected one on "
            f"{given.benchmark!r}."
        )
    return found


def _existing(path: str, kind: str) -> Path:
    place = Path(path).expanduser()
    if not place.exists():
        raise FileNotFoundError(f"{kind} is {path!r}, which is not there; expected what hf-unlearn eval wrote.")
    return place


def _read(read: Callable[[], Any], kind: str, path: str) -> Any:
    try:
        return read()
    except (KeyError, TypeError, AttributeError) as error:  # a file that was edited by hand
        raise ValueError(
            f"{kind} is {path!r}, which cannot be read ({error!r}). Evaluate that model again."
        ) from error


def _tofu_parts(given: EvalArguments) -> dict[str, Any]:
    from ..data.tofu import load_tofu

    names = {
        "forget": f"{given.forget_split}_perturbed",
        "retain": "retain_perturbed",
        "real_authors": "real_authors_perturbed",
        "world_facts": "world_facts_perturbed",
    }
    place = TOFU_HUB_ID if given.data is None else given.data
    parts: dict[str, Any] = {}
    for part, split in names.items():
        try:
            parts[part] = load_tofu(split, place)
        except FileNotFoundError:
            # on the hub every part is there: what is not found is a network or a cache
            if part in ("forget", "retain") or given.data is None or not Path(given.data).expanduser().is_dir():
                raise
            # a folder without general knowledge: its metrics are absent, and say so
    return parts


def _own_parts(given: EvalArguments) -> dict[str, Any]:
    from ..data.own_rows import load_own_rows

    assert given.data is not None
    return dict(load_own_rows(given.data))


def _muse_reference(path: str) -> Evaluation:
    place = _existing(path, "reference")
    found: Evaluation = _read(lambda: Evaluation.load(place), "reference", path)
    if found.benchmark != "muse":
        raise ValueError(f"reference is {path!r}, an evaluation on {found.benchmark!r}; expected one on 'muse'.")
    return found
