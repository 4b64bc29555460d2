"""Plans for the tiny models, what they compute, and everything that an undo has to bring back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft import get_peft_model as peft
from test_capture import rows
from torch import Tensor

from hf_unlearn.data import pad_rows
from hf_unlearn.editing.mlp import mlp_output
from hf_unlearn.editing.plan import EditPlan, LayerEdit, matrix_digest

RANKS = {1: 2, 2: 0, 3: 4}  # unequal, and nothing to do in the middle


def make_plan(model: Any, *, scale: float = 0.3, ranks: dict[int, int] | None = None) -> EditPlan:
    generator = torch.Generator().manual_seed(5)
    edits = []
    for layer, rank in (RANKS if ranks is None else ranks).items():
        at = mlp_output(model, layer)
        edits.append(
            LayerEdit(
                layer=layer,
                path=at.path,
                lora_a=scale * torch.randn(rank, at.in_features, generator=generator),
                lora_b=torch.randn(at.out_features, rank, generator=generator),
                transposed=at.transposed,
                digest=matrix_digest(at),
            )
        )
    return EditPlan(method="pcr", edits=tuple(edits))


@torch.no_grad()
def logits(model: Any) -> Tensor:
    batch = pad_rows(rows(), pad_token_id=0)
    return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.float()


def with_lora(model: Any, **changes: Any) -> Any:
    """A trained adapter, on the edited matrix and elsewhere."""
    targets = [mlp_output(model, 1).path, mlp_output(model, 2).path]
    config = LoraConfig(r=2, lora_alpha=4, lora_dropout=0.0, target_modules=targets, **changes)
    torch.manual_seed(3)
    model = peft(model, config).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_B" in name:
                value.normal_()
    return model


def close(one: Tensor, other: Tensor, tolerance: float = 1e-6) -> None:
    torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def state(model: Any, weights: Callable[[Any], Any] = lambda model: model.state_dict().items()) -> dict[str, Any]:
    """Everything that an undo has to bring back."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return {
        "classes": {name: type(module) for name, module in model.named_modules()},
        "modules": {name: id(module) for name, module in model.named_modules()},
        "training": {name: module.training for name, module in model.named_modules()},
        "hooks": sum(len(module._forward_hooks) for module in model.modules()),
        "weights": {name: (value.dtype, value.detach().clone()) for name, value in weights(model)},
        "requires_grad": {name: (id(value), value.requires_grad) for name, value in model.named_parameters()},
        "active": list(model.active_adapters) if isinstance(model, PeftModel) else None,
        "main": model.active_adapter if isinstance(model, PeftModel) else None,
        "layers": {name: list(m.active_adapters) for name, m in model.named_modules() if hasattr(m, "lora_A")},
        "config": base.config.to_dict(),
        "adapters": list(getattr(base, "peft_config", {})),
        "rng": torch.get_rng_state().tolist(),
    }


def same(one: dict[str, Any], other: dict[str, Any]) -> None:
    for key in one:
        if key != "weights":
            assert one[key] == other[key], key
    assert one["weights"].keys() == other["weights"].keys()
    for name, (dtype, value) in one["weights"].items():
        assert other["weights"][name][0] == dtype
        assert torch.equal(other["weights"][name][1].view(torch.uint8), value.view(torch.uint8)), name
