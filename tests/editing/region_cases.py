"""Models, rows and slow twins of the tests of TSR and ARR."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from test_capture import build, rows
from torch import Tensor
from torch.func import functional_call

from hf_unlearn.editing.mlp import mlp_output

FEW: dict[str, Any] = {"steps": 12, "attack_steps": 8, "inner_steps": 3, "free_positions": 2, "restart_every": 4}
RUN = SimpleNamespace(num_processes=1, process_index=0, is_main_process=True, device=torch.device("cpu"))


def strong(family: str = "llama") -> Any:
    """A model whose next tokens depend on its prompts."""
    model = build(family)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)
    return model


def prompts() -> list[dict[str, list[int]]]:
    return [{"input_ids": row["input_ids"][:length], "labels": [-100] * length} for row, length in zip(rows(), (4, 5, 3, 2, 6), strict=True)]  # fmt: skip


def responses() -> list[dict[str, list[int]]]:
    return rows()[:4]


def merged(model: Any, deltas: dict[int, Tensor]) -> dict[str, Tensor]:
    """All weights, with the changes added to the second matrices."""
    weights = {name: value.detach() for name, value in model.named_parameters()}
    for layer, delta in deltas.items():
        found = mlp_output(model, layer)
        name = f"{found.path}.weight"
        weights[name] = weights[name] + (delta.T if found.transposed else delta)
    return weights


def twin(model: Any, deltas: dict[int, Tensor], given: list[dict[str, list[int]]], token_ids: list[int] | None) -> Tensor:  # fmt: skip
    """Mean loss of the rows, one plain forward pass each, with merged weights."""
    losses = []
    for row in given:
        prompt = next((at for at, label in enumerate(row["labels"]) if label != -100), len(row["labels"]))
        ids = torch.tensor([row["input_ids"][:prompt] if token_ids else row["input_ids"]])
        logits = functional_call(model, merged(model, deltas), kwargs={"input_ids": ids}).logits[0]
        logp = logits.log_softmax(-1)
        if token_ids:
            losses.append(-logp[-1].exp()[token_ids].sum().log())
        else:
            losses.append(-torch.stack([logp[at - 1, ids[0, at]] for at in range(prompt, ids.shape[1])]).mean())
    return torch.stack(losses).mean()


def state(model: Any) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def assert_untouched(model: Any, before: dict[str, Tensor]) -> None:
    for name, value in model.named_parameters():
        assert torch.equal(value, before[name]), name
        assert value.grad is None, name
        assert value.requires_grad, name
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
