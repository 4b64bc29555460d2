"""A planned edit: low-rank factors with their certificates, apart from the model, on disk as safetensors and JSON.

Shapes: r rank of an edit, m inner width of the MLP, d model width.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..trainers.sharding import whole_weights
from .mlp import MlpOutput, mlp_output

if TYPE_CHECKING:
    from .odds import Demands

PLAN_FILE = "edit_plan.json"
FACTORS_FILE = "edit_factors.safetensors"
FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class LayerEdit:
    """
    The edit of one matrix, `Delta = lora_b @ lora_a`.

    Args:
        layer (`int`):
            Number of the block, from 1.
        path (`str`):
            The matrix's path in the base model.
        lora_a (`Tensor`):
            `(r, m)`, float32, on the CPU; r is 0 where nothing was to be done.
        lora_b (`Tensor`):
            `(d, r)`.
        transposed (`bool`):
            Whether the model stores the matrix as `(m, d)` (Conv1D).
        digest (`str`):
            SHA-256 of the matrix that the edit was made for, see [`matrix_digest`].
        certificate (`dict`):
            What the method proves or measures about this edit, plain values.
    """

    layer: int
    path: str
    lora_a: Tensor
    lora_b: Tensor
    transposed: bool
    digest: str
    certificate: dict[str, Any] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        """r."""
        return len(self.lora_a)

    def delta(self) -> Tensor:
        """The edit as one matrix `(d, m)`."""
        return self.lora_b @ self.lora_a

    def norm(self) -> float:
        """Frobenius norm of the edit, without forming it."""
        return float(((self.lora_b.T @ self.lora_b) * (self.lora_a @ self.lora_a.T)).sum().clamp(min=0.0).sqrt())


@dataclass(frozen=True, kw_only=True)
class EditPlan:
    """
    Edits of one or several matrices, in ascending order of their blocks, and how they came about.

    A plan lists neither the words nor the prompts that it was made for. Its factors still tell: with the base model at
    hand, the output directions that they span name a token of each word.

    Args:
        method (`str`):
            `"pcr"`, `"tsr"` or `"arr"`.
        edits (`tuple[LayerEdit, ...]`):
            One for each matrix.
        settings (`dict`):
            The options, plain values.
        measures (`dict`):
            What was measured by real forward passes, before and after, plain values.
        versions (`dict`):
            Versions of the libraries.
        demands ([`Demands`], *optional*):
            The places and tokens that PCR was asked to bring down, while the plan is in memory; never written.
    """

    method: str
    edits: tuple[LayerEdit, ...]
    settings: dict[str, Any] = field(default_factory=dict)
    measures: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    demands: Demands | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        layers = [edit.layer for edit in self.edits]
        if not layers or layers != sorted(set(layers)):
            raise ValueError(f"A plan has edits of blocks {layers}; expected at least one, each once, ascending.")

    @property
    def rank(self) -> int:
        """The largest rank of its edits."""
        return max(edit.rank for edit in self.edits)

    def with_measures(self, **measures: Any) -> EditPlan:
        """A copy with more measurements."""
        return replace(self, measures={**self.measures, **measures})

    def as_dict(self) -> dict[str, Any]:
        """Everything but the factors, plain values."""
        return {
            "format": FORMAT,
            "method": self.method,
            "settings": self.settings,
            "measures": self.measures,
            "versions": self.versions,
            "edits": [
                {
                    "layer": edit.layer,
                    "path": edit.path,
                    "rank": edit.rank,
                    "shape": [edit.lora_b.shape[0], edit.lora_a.shape[1]],
                    "norm": edit.norm(),
                    "transposed": edit.transposed,
                    "digest": edit.digest,
                    "certificate": edit.certificate,
                }
                for edit in self.edits
            ],
        }

    def save(self, folder: str | Path) -> Path:
        """
        Writes `edit_factors.safetensors` and, last, `edit_plan.json` into `folder`; each file is complete or absent.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        factors = {}
        for edit in self.edits:
            factors[f"{edit.path}.lora_a"] = edit.lora_a.float().contiguous()
            factors[f"{edit.path}.lora_b"] = edit.lora_b.float().contiguous()
        save_file(factors, folder / f"{FACTORS_FILE}.part")
        text = json.dumps(_finite(self.as_dict()), indent=2, allow_nan=False)
        (folder / f"{PLAN_FILE}.part").write_text(text + "\n", encoding="utf-8")
        for name in (FACTORS_FILE, PLAN_FILE):
            os.replace(folder / f"{name}.part", folder / name)
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> EditPlan:
        """
        Reads what [`save`] has written.

        Raises:
            ValueError: no plan there, one of another format, or factors that do not belong to it.
        """
        folder = Path(folder)
        for name in (PLAN_FILE, FACTORS_FILE):
            if not (folder / name).is_file():
                raise ValueError(f"{folder} holds no edit plan ({name} is missing).")
        try:
            found = json.loads((folder / PLAN_FILE).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{folder / PLAN_FILE} is not readable as JSON: {error}.") from error
        try:
            factors = load_file(folder / FACTORS_FILE)
        except SafetensorError as error:
            raise ValueError(f"{folder / FACTORS_FILE} is not readable as safetensors: {error}.") from error
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            given = found.get("format") if isinstance(found, dict) else type(found).__name__
            raise ValueError(f"{folder / PLAN_FILE} has format {given!r}; this version reads format {FORMAT}.")
        edits = []
        for entry in found["edits"]:
            a, b = (factors.get(f"{entry['path']}.{name}") for name in ("lora_a", "lora_b"))
            wanted = [entry["rank"], *entry["shape"]]
            if a is None or b is None or [len(a), len(b), a.shape[1]] != wanted or b.shape[1] != entry["rank"]:
                raise ValueError(f"{folder / FACTORS_FILE} does not hold the factors of {entry['path']} in the plan.")
            kept = {key: entry[key] for key in ("layer", "path", "transposed", "digest", "certificate")}
            edits.append(LayerEdit(lora_a=a, lora_b=b, **kept))
        return cls(
            method=found["method"],
            edits=tuple(edits),
            settings=found["settings"],
            measures=found["measures"],
            versions=found["versions"],
        )

    def to_peft(self, folder: str | Path, *, base_model_name_or_path: str | None = None) -> Path:
        """
        Writes a standard LoRA folder, which `PeftModel.from_pretrained(base, folder)` loads: all edits padded with
        zeros to one rank r, `lora_alpha = r`.
        """
        from .peft_folder import to_peft

        return to_peft(self, folder, base_model_name_or_path=base_model_name_or_path)

    def check_model(self, model: Any) -> list[MlpOutput]:
        """
        The matrices that the plan edits, in its order. Collective on sharded models.

        Raises:
            ValueError: a block, a shape or a weight that is not the one the plan was made for.
        """
        found = []
        for edit in self.edits:
            at = mlp_output(model, edit.layer)
            shape, wanted = (at.out_features, at.in_features), (len(edit.lora_b), edit.lora_a.shape[1])
            if at.path != edit.path or shape != wanted:
                raise ValueError(
                    f"The plan edits {edit.path} {wanted}; this model has {at.path} {shape} there. It was made for "
                    "another model."
                )
            digest = matrix_digest(at)
            if digest != edit.digest:
                raise ValueError(
                    f"The plan was made for another model: {edit.path} has digest {digest[:12]}, the plan expects "
                    f"{edit.digest[:12]}. Load the weights that it was made for, or plan anew."
                )
            found.append(at)
        return found


def matrix_digest(found: MlpOutput) -> str:
    """
    SHA-256 of a weight, rounded to bfloat16 (so that it is the same in every type that a bfloat16 checkpoint is loaded
    in); of the packed numbers where it is quantised. Collective on sharded models, and the same on every rank.
    """
    plain = base_matrix(found.module)
    with whole_weights(plain), torch.no_grad():
        weight = plain.weight.detach()
        if hasattr(weight, "full_tensor"):
            weight = weight.full_tensor()
        if weight.is_floating_point():
            weight = weight.to(torch.bfloat16)
        data = weight.contiguous().view(torch.uint8).cpu().numpy()
    return hashlib.sha256(data.tobytes()).hexdigest()


def base_matrix(module: nn.Module) -> Any:
    """The linear layer itself, without an adapter around it."""
    return getattr(module, "base_layer", module)


def _finite(value: Any) -> Any:
    """Infinite numbers as strings: JSON has none."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    if (isinstance(value, float) and value != value) or value in (float("inf"), float("-inf")):
        return str(value)
    return value
