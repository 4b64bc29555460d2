"""
The metrics as modules of Hugging Face `evaluate`: a folder each, thin over the plain functions.

`evaluate.load(module_path("rouge_l"))` and `load_metric("rouge_l")` give the same metric; neither needs a network. All
of them work in `evaluate.combine`. `evaluate` is optional: `pip install "hf-unlearn[evaluate]"`.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

if TYPE_CHECKING:
    from hf_unlearn.metrics.modules.base import UnlearningMetric

ModuleName = Literal[
    "exact_memorization",
    "extraction_strength",
    "forget_quality",
    "mia_auc",
    "min_k",
    "min_k_plus_plus",
    "model_utility",
    "normalised_probability",
    "privleak",
    "probability",
    "rouge_l",
    "truth_ratio",
    "zlib",
]
MODULES: tuple[ModuleName, ...] = get_args(ModuleName)


def module_path(name: ModuleName) -> str:
    """Folder of a metric, for `evaluate.load(path)` and for `evaluate.combine([path, ...])`.

    Raises:
        `ValueError`: there is no such metric.
    """
    if name not in MODULES:
        raise ValueError(f"There is no metric {name!r}; expected one of {', '.join(MODULES)}.")
    return str(Path(__file__).parent / name)


def load_metric(name: ModuleName, **options: Any) -> UnlearningMetric:
    """A metric, constructed without `evaluate.load`, which copies the module into the cache first.

    Args:
        name (`str`): as in [`module_path`].
        options (`Any`):
            Settings of the metric (`drop_last=True`), which hold unless [`compute`] is given others, and arguments of
            `evaluate.Metric` (`keep_in_memory=True`, `num_process`, `process_id`, `experiment_id`, `cache_dir`).

    Raises:
        `ValueError`: there is no such metric.
        `TypeError`: it has no such setting.
        `ImportError`: `evaluate` is not installed.
    """
    module_path(name)  # refuses what is no metric
    if find_spec("evaluate") is None:
        raise ImportError(
            "load_metric needs the package `evaluate`, which is not installed; run "
            '`pip install "hf-unlearn[evaluate]"`, or call the plain function of hf_unlearn.metrics.'
        )
    module = import_module(f"{__name__}.{name}.{name}")
    metric: type[UnlearningMetric] = getattr(module, "".join(part.capitalize() for part in name.split("_")))
    return metric(**options)
