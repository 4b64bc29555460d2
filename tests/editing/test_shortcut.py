"""The last block's shortcut says what a forward pass says, or is not used."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_lab import SmallLab
from test_capture import FAMILIES, build

from hf_unlearn.editing import EditConfig, plan_edit, solve_pcr
from hf_unlearn.editing import pcr as planning
from hf_unlearn.editing.algebra.solve import Edit
from hf_unlearn.editing.directions import final_norm, unembedding_directions
from hf_unlearn.editing.odds import Pairs
from hf_unlearn.editing.passes import Places, Run
from hf_unlearn.editing.pcr import layer_edit
from hf_unlearn.editing.shortcut import LastBlock

ROWS: list[dict[str, list[int]]] = [
    {"input_ids": [1, 5, 6, 7, 9], "labels": [-100, -100, 6, 7, 9]},
    {"input_ids": [1, 8, 30], "labels": [-100, 8, 30]},
    {"input_ids": [1, 44, 3, 17, 21, 60, 2], "labels": [-100, 44, 3, 17, 21, 60, 2]},
]
PAIRS = Pairs.of([(0, 3, 11), (0, 3, 12), (0, 4, 11), (1, 2, 7), (2, 2, 17), (2, 6, 11), (0, 1, 6)])


def edited(run: Run, layer: int) -> tuple[LastBlock, Edit, Any]:
    """An edit of some size, the shortcut's view, and log-odds by a forward pass."""
    places, of_pair = PAIRS.places()
    read = run.at(ROWS, layer, Places(places), also=final_norm(run.model))
    edit = solve_pcr(read.inputs, read.outputs, unembedding_directions(run.model, [11, 17]), -3.0, kind="half_space")
    assert edit.certificate.rank > 0
    known = list(zip(read.rows.tolist(), read.tokens.tolist(), strict=True))
    at = torch.tensor([known.index(place) for place in places])[of_pair]
    real = run.odds(ROWS, PAIRS, [layer_edit(run.model, layer, edit)]).values
    view = LastBlock(run, PAIRS, read, at)
    torch.testing.assert_close(view.odds(), run.odds(ROWS, PAIRS).values, rtol=1e-5, atol=1e-5)  # in every family
    return view, edit, real


@pytest.mark.parametrize("family", FAMILIES)
def test_plain_blocks_agree_with_a_forward_pass_and_a_norm_after_the_mlp_is_seen(family: str) -> None:
    run = Run(model=build(family), pad_token_id=0, batch_size=2)
    for edit_last in (True, False):
        assert LastBlock.fits(run, 3 if edit_last else 2) == edit_last
    view, edit, real = edited(run, 3)
    found = view.odds(edit)
    if family == "gemma":  # Gemma 2 has a norm between its MLP and the residual stream
        assert not view.agrees(found, real)
    else:
        torch.testing.assert_close(found, real, rtol=1e-4, atol=1e-4)
        assert view.agrees(found, real)
        assert not view.agrees(found + 0.1, real)


def test_a_plan_is_the_same_with_and_without_it_and_takes_fewer_forward_passes(
    lab: SmallLab, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [row["answer"].split()[0] for row in lab.forget][:2]
    config = EditConfig(words=words, probability=1e-3, variants=1, generation_rounds=0)
    plans, passes = [], []
    for used in (True, False):
        count = [0]
        monkeypatch.setattr(planning.LastBlock, "fits", staticmethod(lambda run, layer, used=used: used))
        model = lab.model()
        handle = model.register_forward_pre_hook(lambda *given, count=count: count.__setitem__(0, count[0] + 1))
        plans.append(
            plan_edit(
                model, lab.tokenizer, lab.forget, config, retain_dataset=lab.retain, measure=False, progress=False
            )
        )
        handle.remove()
        passes.append(count[0])
    quick, slow = plans
    assert quick.edits[0].certificate["reached"]
    torch.testing.assert_close(quick.edits[0].delta(), slow.edits[0].delta(), rtol=1e-2, atol=1e-3)
    assert passes[0] < passes[1]


def test_weights_that_are_split_are_left_to_the_model() -> None:
    model = build("llama")
    run = Run(model=model, pad_token_id=0)
    assert LastBlock.fits(run, -1)
    model.lm_head.weight.ds_id = 1
    assert not LastBlock.fits(run, -1)
