"""A report made anew from what lies in folders: results.json, attacks.json, evaluations, a trainer's output."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from . import formats
from .attack_words import OVER_REFUSAL, SUBJECT_TITLES, attack_words, outcomes_of
from .further import evaluations_of, further_rows
from .html import render_report
from .outcomes import AttackOutcome, read_attacks
from .plots import save_plots
from .schema import SUBJECTS, Results, read_results, write_results, write_text
from .tables import escape_cell, markdown, markdown_constraints, markdown_table, titles
from .verdict import judge
from .words import words_of

RESULTS, ATTACKS, EVALUATION, REPORT, TABLE = (
    *("results.json", "attacks.json", "evaluation.json", "report.html", "table.md"),
)
PathLike = str | os.PathLike[str]


def gather(
    folder: PathLike,
    *,
    attacks: Sequence[PathLike] = (),
    unlearned: PathLike | None = None,
    target: PathLike | None = None,
    reference: PathLike | None = None,
    run: PathLike | None = None,
) -> Results:
    """
    Everything that a report is made of.

    Args:
        folder (`str` or `os.PathLike`): with results.json, or with the evaluation of the unlearned model.
        attacks (`Sequence`, *optional*): files with outcomes of attacks, or folders with an attacks.json; by default
            the folder's own, where it has one.
        unlearned, target, reference (`str` or `os.PathLike`, *optional*): folders with evaluations of these models.
            What the folder's results have beyond them (curves, constraints, generations) is kept.
        run (`str` or `os.PathLike`, *optional*): a trainer's output folder, for curves and constraints.

    Raises:
        FileNotFoundError: something named is not there; the message says what to do.
        ValueError: a file is something else.
    """
    folder = Path(folder)
    outcomes = _outcomes(folder, attacks)
    known = read_results(folder / RESULTS) if (folder / RESULTS).is_file() else None
    if unlearned is None and (known is None or target is not None or reference is not None or run is not None):
        if not (folder / EVALUATION).is_file():
            raise FileNotFoundError(_nothing(folder, known, target=target, reference=reference, run=run))
        unlearned = folder
    if unlearned is None:
        assert known is not None
        return replace(known, extra=_extra(known, outcomes))
    own = _evaluated(unlearned, "unlearned")
    before = None if target is None else _evaluated(target, "target")
    never = None if reference is None else _evaluated(reference, "reference")
    trained = None if run is None else _there(run, "run", "a trainer's output folder")
    from ..evaluation.to_results import results_of  # it needs torch

    made = results_of(own, before, never, run_folder=trained, attacks=outcomes)
    merged = made if known is None else merge(known, made)
    return replace(merged, extra=_extra(merged, outcomes))


def write_all(folder: PathLike, results: Results) -> list[Path]:
    """
    Writes results.json, report.html, table.md and the plots into a folder, which is made.

    Raises:
        OSError: it cannot be written.
    """
    out = Path(folder)
    table, page = markdown_report(results), render_report(results)  # what cannot be shown is not written either
    files = [write_results(out / RESULTS, results), write_text(out / TABLE, table), write_text(out / REPORT, page)]
    return files + save_plots(
        results.history,
        results.constraints,
        out / "plots",
        forget_level=results.forget_level,
        truth_ratios=results.truth_ratios,
        words=words_of(results),
    )


def markdown_report(results: Results) -> str:
    """
    Tables for a model card: scores, further metrics with n, constraints, and what attacks found.
    """
    parts = [markdown_table(results, headlines=True)]
    further = _further(results)
    attacks = markdown_attacks(results)
    constraints = markdown_constraints(results)
    parts += [f"### Constraints\n\n{constraints}"] if constraints else []
    if attacks:
        # the tables have the last step of an attack, and a model card the worst
        (stays,) = (check for check in judge(results).checks if check.name == "stays")
        parts.append(f"### Under attack\n\n{attacks}\n{stays.question} {escape_cell(stays.reason)}\n")
    parts += [f"### All metrics\n\n{further}"] if further else []
    return "\n".join(parts)


def markdown_attacks(results: Results) -> str:
    """A row for each measure and judge of each attack, with ± and n; empty text where there was no attack."""
    rows = []
    for outcome in outcomes_of(results):
        title = attack_words(outcome.attack).title
        for name in dict.fromkeys(measure.name for measure in outcome.measures):
            found = {
                own.subject: (own.value, own.standard_error, own.n) for own in outcome.measures if own.name == name
            }
            rows.append([title, name, *_cells(found)])
        for name in dict.fromkeys(rate.judge for rate in outcome.judges):
            rates = {
                own.subject: (own.success, own.standard_error, own.n) for own in outcome.judges if own.judge == name
            }
            what = "answered" if outcome.attack == OVER_REFUSAL else "success"
            rows.append([title, f"{what}, judge {name}", *_cells(rates)])
        if not outcome.measures and not outcome.judges:
            rows += [[title, *row] for row in _ends(outcome)]
    if not rows:
        return ""
    return markdown(["Attack", "Measure", *SUBJECT_TITLES.values(), "n"], rows, align="llrrrr")


def merge(known: Results, made: Results) -> Results:
    """What evaluations say, with what only the results of a run have: curves, constraints, settings, answers."""
    kept: dict[str, Any] = {
        name: getattr(made, name) or getattr(known, name)
        for name in ("constraints", "history", "generations", "truth_ratios")
    }
    # what the evaluations were asked to do stays with them
    kept |= {name: getattr(known, name) or getattr(made, name) for name in ("settings", "model", "dataset")}
    for name in ("seed", "forget_level", "reference"):
        own = getattr(made, name)
        kept[name] = getattr(known, name) if own is None else own
    # a p-value of other scores than those beside it would be read as theirs
    if made.forget_quality is None and made.reference is None and _same_scores(known, made):
        kept |= {"forget_quality": known.forget_quality, "forget_quality_log10": known.forget_quality_log10}
    evaluated = evaluations_of(made)
    if "target" not in evaluated:
        kept["target"] = known.target
    absent = {
        name: reason
        for name, reason in made.absent.items()
        if name in evaluated or name not in SUBJECTS or known.scores()[name] is None
    }
    return replace(
        made,
        **kept,
        method=known.method,
        seconds={**known.seconds, **made.seconds, "total": known.seconds["total"] + made.seconds["total"]},
        absent=absent,
        extra={**known.extra, **made.extra},
    )


def _same_scores(known: Results, made: Results) -> bool:
    """Whether the unlearned model's truth ratios (or else its forget probability) are what they were."""
    old, new = (own.truth_ratios.get("unlearned") for own in (known, made))
    if old and new:
        return len(old) == len(new) and all(math.isclose(a, b, rel_tol=1e-3) for a, b in zip(old, new, strict=True))
    return math.isclose(known.unlearned.forget_probability, made.unlearned.forget_probability, rel_tol=1e-3)


def _outcomes(folder: Path, attacks: Sequence[PathLike]) -> list[AttackOutcome]:
    files = [Path(given) / ATTACKS if Path(given).is_dir() else Path(given) for given in attacks]
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{file} is not there; expected an attacks.json, which hf-unlearn attack writes.")
    if not files and (folder / ATTACKS).is_file():
        files = [folder / ATTACKS]
    return [outcome for file in files for outcome in read_attacks(file)]


def _extra(results: Results, outcomes: Sequence[AttackOutcome]) -> dict[str, Any]:
    extra = dict(results.extra)
    if outcomes:  # else those that the results had
        extra["attacks"] = [outcome.as_dict() for outcome in outcomes]
    return extra


def _evaluated(folder: PathLike, option: str) -> Path:
    found = _there(folder, option, "a folder with an evaluation.json")
    if found.is_dir() and not (found / EVALUATION).is_file():
        raise FileNotFoundError(
            f"--{option} {found} has no {EVALUATION}; expected a folder that hf-unlearn eval --output_dir wrote."
        )
    return found


def _there(path: PathLike, option: str, what: str) -> Path:
    found = Path(path)
    if not found.exists():
        raise FileNotFoundError(f"--{option} {found} is not there; expected {what}.")
    return found


def _nothing(folder: Path, known: Results | None, **given: PathLike | None) -> str:
    if not folder.is_dir():
        return f"{folder} is not there; expected a folder with a {RESULTS} or an {EVALUATION}."
    if known is not None:
        named = ", ".join(f"--{name}" for name, value in given.items() if value is not None)
        return (
            f"{named} was given, and {folder} has no {EVALUATION} of the unlearned model to put it beside; give "
            "--unlearned DIR, a folder that hf-unlearn eval wrote."
        )
    return (
        f"{folder} has no {RESULTS} and no {EVALUATION}; evaluate the model first (hf-unlearn eval --output_dir "
        f"{folder}), or give --unlearned DIR with an evaluation."
    )


def _further(results: Results) -> str:
    evaluations = list(evaluations_of(results))
    rows = []
    for row in further_rows(results):
        cells = [row["cells"].get(subject) for subject in SUBJECTS if subject in evaluations]
        shown = [
            f"{cell['value']} ({cell['note']})" if cell and cell["note"] else (cell or {}).get("value")
            for cell in cells
        ]
        rows.append([row["label"], *(text or formats.MISSING for text in shown)])
    if not rows:
        return ""
    header = ["Metric", *(titles(results)[subject] for subject in SUBJECTS if subject in evaluations)]
    note = "After ±, the standard error; in brackets the 95% interval and the number of rows.\n"
    return markdown(header, rows, align="l" + "r" * (len(header) - 1)) + "\n" + note


def _ends(outcome: AttackOutcome) -> list[list[str]]:
    """The last point of each curve, for attacks that give nothing else."""
    rows = []
    for name, y_label, x_label in dict.fromkeys((own.name, own.y_label, own.x_label) for own in outcome.curves):
        found = {
            own.subject: (own.y[-1], own.standard_error[-1] if own.standard_error else None, None)
            for own in outcome.curves
            if (own.name, own.y_label, own.x_label) == (name, y_label, x_label)
        }
        last = max(own.x[-1] for own in outcome.curves if own.name == name)
        rows.append([f"{y_label}, {name}, {last:g} {x_label}", *_cells(found)])
    return rows


def _cells(found: Mapping[Any, tuple[float, float | None, int | None]]) -> list[str]:
    shown = [
        formats.with_error(*found[subject][:2]) if subject in found else formats.MISSING for subject in SUBJECT_TITLES
    ]
    sizes = sorted({n for _, _, n in found.values() if n is not None})
    return [*shown, " to ".join(map(str, sizes[:1] + sizes[1:][-1:])) or formats.MISSING]
