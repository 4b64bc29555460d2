"""The hash of a model's weights: every change of them shows, and nothing else does."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
import torch
from tofu_kit import build
from torch import nn

from hf_unlearn.evaluation import model_hash as module
from hf_unlearn.evaluation.model_hash import hash_obstacle, model_hash, model_settings


class Small(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(3, 2, dtype=dtype)
        self.scale = nn.Parameter(torch.tensor(2.0, dtype=dtype))
        self.register_buffer("kept", torch.arange(3))
        self.register_buffer("passing", torch.arange(3), persistent=False)


def twin(model: nn.Module) -> str:
    """All at once, from the list of names that the small model is known to have."""
    text = b""
    for name in ("first.bias", "first.weight", "kept", "scale"):
        value = model.get_parameter(name) if name != "kept" else model.get_buffer(name)
        raw = value.detach().view(torch.int16).numpy() if value.dtype == torch.bfloat16 else value.detach().numpy()
        text += f"{name}\0{tuple(value.shape)}\0{value.dtype}\0".encode() + raw.tobytes()
    return hashlib.sha256(text).hexdigest()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_hash_equals_a_twin_that_reads_everything_at_once(dtype: torch.dtype, monkeypatch: Any) -> None:
    model = Small(dtype)
    assert model_hash(model) == twin(model)
    monkeypatch.setattr(module, "_CHUNK_BYTES", 5)
    assert model_hash(model) == twin(model), "pieces are not cut at the bounds of numbers"


def test_every_change_of_the_weights_shows_and_nothing_else_does() -> None:
    first = model_hash(Small())
    assert model_hash(Small()) == first
    assert model_hash(Small().train().requires_grad_(False)) == first
    changed = []
    for name in ("first.weight", "first.bias", "scale", "kept"):
        model = Small()
        model.state_dict()[name].view(-1)[:1].add_(1)
        changed.append(model_hash(model))
    reshaped = Small()
    reshaped.first.weight = nn.Parameter(reshaped.first.weight.detach().reshape(3, 2))
    renamed = nn.ModuleDict({"inner": Small()})
    changed += [model_hash(Small(torch.float64)), model_hash(reshaped), model_hash(renamed)]
    assert len({first, *changed}) == len(changed) + 1
    passing = Small()
    passing.get_buffer("passing").add_(1)
    assert model_hash(passing) == first, "what is not saved with the model is no weight of it"


def test_views_and_transposed_weights_count_by_their_values() -> None:
    model = Small()
    model.first.weight = nn.Parameter(model.first.weight.detach().t().contiguous().t())
    assert not model.first.weight.is_contiguous()
    assert model_hash(model) == model_hash(Small())


def test_tied_weights_count_once_and_survive_a_round_trip(tmp_path: Any) -> None:
    from transformers import AutoModelForCausalLM

    model = build()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    assert model_hash(AutoModelForCausalLM.from_pretrained(tmp_path)) == model_hash(model)
    untied = build()
    untied.lm_head.weight = nn.Parameter(untied.lm_head.weight.detach().clone())
    assert model_hash(untied) != model_hash(model)


def test_an_adapter_counts_and_so_do_its_scale_and_whether_it_is_on() -> None:
    from peft import LoraConfig, get_peft_model

    base = model_hash(build())
    adapted = get_peft_model(build(), LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"]))
    assert model_hash(adapted) != base
    hashed, before = model_hash(adapted), model_settings(adapted)
    with adapted.disable_adapter():
        assert model_hash(adapted) == hashed
        assert model_settings(adapted) != before
    assert model_settings(adapted) == before
    for layer in adapted.modules():
        if isinstance(getattr(layer, "scaling", None), dict):
            layer.scaling["default"] = 7.0
    assert model_settings(adapted) != before


def test_settings_do_not_depend_on_where_a_model_came_from() -> None:
    model, other = build(), build()
    other.config._name_or_path = "elsewhere"
    assert model_settings(model) == model_settings(other)
    other.config.rope_parameters = {"rope_type": "default", "rope_theta": 5.0}
    assert model_settings(model) != model_settings(other)


def test_weights_that_are_not_all_here_have_no_hash_and_a_reason() -> None:
    sharded: Any = Small()
    sharded.first.weight.ds_id = 0  # what ZeRO-3 marks a part of a weight with
    assert model_hash(sharded) is None
    assert "sharded" in str(hash_obstacle(sharded))
    with torch.device("meta"):
        away = nn.Linear(2, 2)
    assert model_hash(away) is None
    assert "offloaded" in str(hash_obstacle(away))
    assert hash_obstacle(Small()) is None
