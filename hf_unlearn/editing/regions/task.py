"""What TSR and ARR share around their descents: checks of the input, the ball, the model held still, the plan.

Shapes: d model width, m inner width of the MLP.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel
from tqdm.auto import tqdm

from ...reports.versions import library_versions
from ...trainers.sharding import whole_weights
from ..mlp import MlpOutput, mlp_output
from ..plan import EditPlan, LayerEdit, base_matrix, matrix_digest
from .changes import Ball
from .config import ARR_ONLY, RegionConfig
from .descent import Descent, descend
from .objective import Objective
from .rows import check_token_ids, retain_dataset

Measures = dict[str, float]


class RegionTask:
    """
    One call of [`plan_tsr`] or [`plan_arr`], checked.

    Args:
        model, token_ids, retain_rows, layers, config, accelerator, description:
            As in [`plan_tsr`].
    """

    def __init__(
        self,
        model: Any,
        token_ids: Sequence[int] | None,
        retain_rows: Sequence[Mapping[str, Any]] | None,
        layers: Sequence[int],
        config: RegionConfig | None,
        accelerator: Any,
        description: str | None,
    ) -> None:
        self.begin = time.perf_counter()
        # DDP would wait in its next forward pass for the gradients of parameters that are frozen here.
        self.model = model.module if isinstance(model, DistributedDataParallel) else model
        self.inner: Any = getattr(self.model, "module", self.model)
        self.config = config or RegionConfig()
        self.description = description
        self.run = accelerator or SimpleNamespace(
            num_processes=1, process_index=0, is_main_process=True, device=next(model.parameters()).device
        )
        self.matrices = _matrices(self.model, layers)
        self._check_rank()
        self.vocabulary = int(self.inner.config.get_text_config().vocab_size)
        self.token_ids = check_token_ids(token_ids, self.vocabulary)
        self.retain = retain_dataset(retain_rows)
        self.norms = {layer: _matrix_norm(found) for layer, found in self.matrices.items()}
        self.ball = Ball(self._radii(), self.config.joint_radius)

    def objective_options(self, pad_token_id: int) -> dict[str, Any]:
        """Options that all objectives of the task have."""
        return {
            "token_ids": self.token_ids,
            "retain_weight": self.config.retain_weight,
            "batch_size": self.config.batch_size,
            "pad_token_id": pad_token_id,
            "run": self.run,
        }

    def descend(self, objective: Objective) -> Descent:
        """Minimises over the ball, with a progress bar."""
        device = self.run.device
        zeros = {
            layer: torch.zeros(found.out_features, found.in_features, device=device)
            for layer, found in self.matrices.items()
        }
        options = self.config
        hidden = self.description is None or not self.run.is_main_process
        with tqdm(total=options.steps + 1, desc=self.description, disable=hidden, leave=False) as bar:
            return descend(
                objective.evaluate,
                zeros,
                self.ball,
                rank=options.rank,
                steps=options.steps,
                learning_rate=options.learning_rate,
                bar=bar,
            )

    def plan(
        self, method: str, found: Descent, step: int, before: Mapping[str, float], after: Mapping[str, float]
    ) -> EditPlan:
        """The changes as they are, with certificates. Collective on sharded models."""
        measures: dict[str, Any] = {key: {"before": before[key], "after": after[key]} for key in before}
        shared = {
            "method": method,
            "joint_radius": self.config.joint_radius,
            "steps": len(found.totals) - 1,
            "best_step": step,
            "converged": found.converged,
            **{
                f"{key}_{when}": values[key]
                for key in before
                for when, values in (("before", before), ("after", after))
            },
        }
        edits = []
        for layer, matrix in self.matrices.items():
            lora_a, lora_b = found.changes[layer].factors()
            norm = found.changes[layer].norm()
            weight = self.norms[layer]
            edits.append(
                LayerEdit(
                    layer=layer,
                    path=matrix.path,
                    lora_a=lora_a,
                    lora_b=lora_b,
                    transposed=matrix.transposed,
                    digest=matrix_digest(matrix),
                    certificate={
                        **shared,
                        "radius": self.ball.radius_of(layer),
                        "norm": norm,
                        "relative_norm": None if weight is None else norm / weight,
                        "seconds": time.perf_counter() - self.begin,
                    },
                )
            )
        settings = asdict(self.config)
        settings["excluded_token_ids"] = list(self.config.excluded_token_ids)
        if method == "tsr":
            settings = {key: value for key, value in settings.items() if key not in ARR_ONLY}
        settings.update(layers=list(self.matrices), mode="vocabulary" if self.token_ids else "response")
        settings.update(retain=self.retain is not None)
        return EditPlan(
            method=method,
            edits=tuple(edits),
            settings=settings,
            measures={**measures, "totals": found.totals},
            versions=library_versions(),
        )

    def _check_rank(self) -> None:
        rank = self.config.rank
        for layer, found in self.matrices.items():
            largest = min(found.in_features, found.out_features)
            if rank is not None and rank > largest:
                raise ValueError(
                    f"rank is {rank}, but the matrix of block {layer} is {found.out_features} x {found.in_features}; "
                    f"expected at most {largest}, or None for any rank."
                )

    def _radii(self) -> dict[int, float]:
        radius = self.config.radius
        if self.config.radius_unit == "absolute":
            share = radius / len(self.matrices) ** 0.5 if self.config.joint_radius else radius
            return dict.fromkeys(self.matrices, share)
        radii = {}
        for layer, norm in self.norms.items():
            if not norm:
                why = "packed (quantised) weights" if norm is None else "norm 0"
                raise ValueError(
                    f"The matrix of block {layer} has {why}, so that a relative radius says nothing; use "
                    "radius_unit='absolute'."
                )
            radii[layer] = radius * norm
        return radii


@contextmanager
def held_still(model: Any) -> Iterator[None]:
    """Context in which the model is in evaluation mode and its parameters gather no gradient; undone afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        model.eval()
        for parameter in wanted:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)
        for module, mode in modes:
            module.training = mode


def _matrices(model: Any, layers: Sequence[int]) -> dict[int, MlpOutput]:
    if not len(layers):
        raise ValueError("layers is empty; expected at least one block, like (-1,).")
    found = [mlp_output(model, layer) for layer in layers]
    numbers = [at.layer for at in found]
    if len(set(numbers)) < len(numbers):
        raise ValueError(f"layers {list(layers)} are blocks {numbers}; expected each once.")
    return {at.layer: at for at in sorted(found, key=lambda at: at.layer)}


def _matrix_norm(found: MlpOutput) -> float | None:
    """Frobenius norm of the weight, or None where it is packed. Collective on sharded models."""
    plain = base_matrix(found.module)
    with whole_weights(plain), torch.no_grad():
        weight = plain.weight.detach()
        if hasattr(weight, "full_tensor"):
            weight = weight.full_tensor()
        return float(weight.float().norm(dtype=torch.float64)) if weight.is_floating_point() else None
