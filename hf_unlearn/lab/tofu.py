"""The TOFU lab: the real benchmark's rows as a world for a small model."""

from __future__ import annotations

from pathlib import Path

from ..data.tofu import TOFU_HUB_ID, load_tofu
from .recipe import LabData

_RETAIN_OF = {"forget01": "retain99", "forget05": "retain95", "forget10": "retain90"}


def tofu_data(path_or_hub: str | Path = TOFU_HUB_ID, forget_split: str = "forget10") -> LabData:
    """
    TOFU with real authors and world facts as general knowledge.

    Args:
        path_or_hub (`str` or `Path`, *optional*, defaults to `"locuslab/TOFU"`):
            A local folder of JSON lines or the hub id; see [`load_tofu`].
        forget_split (`str`, *optional*, defaults to `"forget10"`):
            `"forget01"`, `"forget05"` or `"forget10"`.

    Raises:
        ValueError: another `forget_split`.
    """
    if forget_split not in _RETAIN_OF:
        raise ValueError(f"forget_split is {forget_split!r}; expected one of {', '.join(_RETAIN_OF)}.")
    general = ("real_authors", "world_facts")
    retain_eval = load_tofu("retain_perturbed", path_or_hub)
    # TOFU has no authors that no model has seen. Wrong answers to retain questions are such text: no model is trained
    # on them, and they are written like the answers. (Not on the forget questions: those are what is evaluated.)
    holdout = retain_eval.map(
        lambda row: {"question": row["question"], "answer": row["perturbed_answer"][0]},
        remove_columns=retain_eval.column_names,
    )
    return LabData(
        name=f"tofu-{forget_split}",
        forget=load_tofu(forget_split, path_or_hub),
        retain=load_tofu(_RETAIN_OF[forget_split], path_or_hub),
        forget_eval=load_tofu(f"{forget_split}_perturbed", path_or_hub),
        retain_eval=retain_eval,
        general={name: load_tofu(name, path_or_hub) for name in general},
        general_eval={name: load_tofu(f"{name}_perturbed", path_or_hub) for name in general},
        holdout=holdout,
    )
