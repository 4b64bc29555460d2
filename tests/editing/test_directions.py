"""Directions of tokens: along them a final state moves their logits above the mean, in every family."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_capture import FAMILIES, build
from test_capture import rows as five_rows
from torch import nn

from hf_unlearn.editing.directions import embedding_points, final_norm, unembedding_directions

LAYER_NORM = {"phi", "gpt_neox", "opt", "gpt2"}
IDS = [3, 60, 0, 17]


def uneven(family: str) -> Any:
    """Random weights and biases of the final norm and of the head; no cap, which bends logits."""
    model = build(family)
    model.config.final_logit_softcapping = None
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for module in (final_norm(model), model.get_output_embeddings()):
            for name, value in module.named_parameters():
                noise = torch.randn(value.shape, generator=generator)
                value.copy_(noise + 1.0 if name == "weight" else noise)
    return model


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_directions_times_the_final_state_are_the_logits_above_their_mean(family: str) -> None:
    model = uneven(family)
    norm = final_norm(model)
    states: list[torch.Tensor] = []
    handle = norm.register_forward_pre_hook(lambda module, arguments: states.append(arguments[0]))
    logits = model(input_ids=torch.tensor([five_rows()[2]["input_ids"]])).logits[0].double()
    handle.remove()
    # what biases add, whatever the state
    constant = model.get_output_embeddings()(norm(torch.zeros(1, 1, 16)))[0, 0].double()
    above = logits - constant
    above = (above - above.mean(1, keepdim=True))[:, IDS]
    products = states[0][0].double() @ unembedding_directions(model, IDS).double().T
    factors = (above * products).sum(1) / products.square().sum(1)
    assert (factors > 0).all()
    torch.testing.assert_close(above, factors[:, None] * products, rtol=1e-4, atol=1e-4)
    # the factor is that of the norm, one over the size of the state (and a little less, by its epsilon)
    state = states[0][0].double()
    if family in LAYER_NORM:
        state = state - state.mean(1, keepdim=True)
    torch.testing.assert_close(factors * state.square().mean(1).sqrt(), torch.ones(12).double(), rtol=5e-2, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_where_the_norm_centres_so_do_the_directions(family: str) -> None:
    means = unembedding_directions(uneven(family), IDS).mean(1)
    assert (means.abs() < 1e-5).all() == (family in LAYER_NORM)


@pytest.mark.parametrize("family", ["llama", "gemma", "gpt2"])
def test_the_norm_is_asked_in_float32_and_left_as_it_is(family: str) -> None:
    model = uneven(family).bfloat16()
    norm = final_norm(model)
    before = {name: (id(value), value.detach().clone()) for name, value in norm.named_parameters()}
    found = unembedding_directions(model, IDS)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, unembedding_directions(uneven(family).bfloat16().float(), IDS))
    for name, value in norm.named_parameters():
        assert id(value) == before[name][0]
        assert torch.equal(value, before[name][1])


def test_an_adapter_does_not_hide_norm_or_head() -> None:
    model = uneven("llama")
    wanted = unembedding_directions(model, IDS)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["down_proj", "lm_head"]))
    torch.testing.assert_close(unembedding_directions(adapted, IDS), wanted)


def test_points_are_rows_of_the_input_embedding() -> None:
    model = build()
    assert torch.equal(embedding_points(model, IDS), model.model.embed_tokens.weight[IDS])


def test_a_model_without_a_known_norm_is_refused() -> None:
    model = build()
    model.model.norm = nn.Identity()
    with pytest.raises(ValueError, match="LlamaModel has no final norm that is known here"):
        unembedding_directions(model, IDS)
