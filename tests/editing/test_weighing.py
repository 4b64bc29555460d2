"""Weights of retain activations, against one row and one token at a time in a model that has the edit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_lab import SmallLab
from test_plan_edit import plan_of

from hf_unlearn.editing.added import edits_in_force
from hf_unlearn.editing.edit_rows import prompt_of
from hf_unlearn.editing.passes import Run
from hf_unlearn.editing.pcr import retain_metric
from hf_unlearn.editing.plan import LayerEdit
from hf_unlearn.editing.weighing import drawn, retain_weights


def run_of(model: Any, lab: SmallLab) -> Run:
    return Run(model=model, pad_token_id=lab.tokenizer.pad_token_id, batch_size=5)


@torch.no_grad()
def losses(model: Any, lab: SmallLab) -> torch.Tensor:
    """Of every retained token, row after row."""
    found = []
    for row in lab.rows("retain"):
        begin = len(prompt_of(row))
        logp = model(input_ids=torch.tensor([row["input_ids"]])).logits[0].double().log_softmax(-1)
        found += [-float(logp[at - 1, row["input_ids"][at]]) for at in range(begin, len(row["input_ids"]))]
    return torch.tensor(found, dtype=torch.float64)


@torch.no_grad()
def moves(model: Any, lab: SmallLab, edits: tuple[LayerEdit, ...]) -> torch.Tensor:
    """How far edits move what predicts those tokens, squared: the matrix's inputs in the edited model times Delta."""
    found = []
    for row in lab.rows("retain"):
        begin = len(prompt_of(row))
        inputs: dict[int, torch.Tensor] = {}

        def keep(layer: int, inputs: dict[int, torch.Tensor] = inputs) -> Any:
            return lambda module, given: inputs.__setitem__(layer, given[0][0].double())

        hooks = [model.get_submodule(edit.path).register_forward_pre_hook(keep(edit.layer)) for edit in edits]
        model(input_ids=torch.tensor([row["input_ids"]]))
        for hook in hooks:
            hook.remove()
        for at in range(begin, len(row["input_ids"])):
            found.append(
                sum(float((edit.delta().double() @ inputs[edit.layer][at - 1]).square().sum()) for edit in edits)
            )
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.parametrize("layers", [[2], [1, 2]])
def test_weights_are_the_loss_over_the_move_token_by_token(lab: SmallLab, layers: list[int]) -> None:
    model = lab.model()
    edits = plan_of(lab, model, layers=layers).edits
    found = retain_weights(run_of(model, lab), lab.rows("retain"), edits)
    before = losses(model, lab)
    with edits_in_force(model, edits):
        lost, moved = (losses(model, lab) - before).clamp(min=0.0), moves(model, lab, edits)
    assert found.shape == before.shape
    curvature = lost / (moved + moved.sum() / len(moved))
    torch.testing.assert_close(found, 0.5 + 0.5 * curvature / (curvature.sum() / len(curvature)), rtol=1e-3, atol=1e-4)
    assert float(found.mean()) == pytest.approx(1.0)
    assert float(found.min()) >= 0.5
    assert float(found.max()) > 2.0


def test_an_edit_that_does_nothing_leaves_all_weights_alike(lab: SmallLab) -> None:
    model = lab.model()
    (edit,) = plan_of(lab, model).edits
    empty = LayerEdit(
        layer=edit.layer,
        path=edit.path,
        lora_a=edit.lora_a[:0],
        lora_b=edit.lora_b[:, :0],
        transposed=edit.transposed,
        digest=edit.digest,
    )
    rows = lab.rows("retain")
    assert bool((retain_weights(run_of(model, lab), rows, [empty]) == 1.0).all())


def test_a_weight_counts_an_activation_so_often(lab: SmallLab) -> None:
    read = run_of(lab.model(), lab).at(lab.rows("retain")[:3], 2, "predicting")
    count = len(read.inputs)
    often = torch.arange(count) % 3
    weighed = retain_metric(read, limit=10**6, ridge=0.01, seed=0, weights=often.double())
    chosen = read.inputs.repeat_interleave(often, dim=0).double()
    a, b = torch.randn(2, read.inputs.shape[1]).double(), torch.randn(5, 2).double()
    expected = float((chosen @ a.T @ b.T).square().sum()) / count
    assert weighed.disturbance(a, b) == pytest.approx(expected, rel=1e-5)
    few = retain_metric(read, limit=7, ridge=0.1, seed=3, weights=often.double())
    some, own = drawn(often.double(), 7, 3)
    assert few.disturbance(a, b) == pytest.approx(
        float(((read.inputs[some].double() @ a.T @ b.T).square().sum(1) * own).sum()) / 7, rel=1e-5
    )


def test_heavy_activations_are_drawn_first_and_the_mean_stays() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = torch.cat([torch.tensor([40.0, 9.0, 9.0]), torch.rand(57, generator=generator) + 0.1]).double()
    weights = weights[torch.randperm(60, generator=generator)]
    values = torch.randn(60, generator=generator).double()
    limit, times = 20, 4_000
    often, means = torch.zeros(60), []
    for seed in range(times):
        chosen, own = drawn(weights, limit, seed)
        assert len(chosen) == limit
        assert chosen.tolist() == sorted(set(chosen.tolist()))
        often[chosen] += 1
        means.append(float((own * values[chosen]).sum()) / limit)
    # by bisection: the factor at which as many are expected as are wanted
    low, high = 0.0, 1e3
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if float((middle * weights).clamp(max=1.0).sum()) < limit else (low, middle)
    chance = (low * weights).clamp(max=1.0)
    assert bool((often[chance == 1.0] == times).all())
    assert int((chance == 1.0).sum()) >= 3
    torch.testing.assert_close(often.double() / times, chance, atol=0.04, rtol=0.0)
    found = torch.tensor(means)
    error = float(found.std()) / times**0.5
    assert abs(float(found.mean()) - float((weights * values).mean())) < 4 * error
    assert torch.equal(drawn(weights, limit, 5)[0], drawn(weights, limit, 5)[0])


def test_all_are_taken_where_there_are_few_and_none_that_weighs_nothing() -> None:
    weights = torch.tensor([1.0, 0.0, 2.0, 0.5], dtype=torch.float64)
    chosen, own = drawn(weights, 4, 0)
    assert chosen.tolist() == [0, 1, 2, 3]
    assert torch.equal(own, weights)
    for seed in range(20):
        assert drawn(weights, 3, seed)[0].tolist() == [0, 2, 3]
    assert all(len(drawn(torch.ones(9).double(), 4, seed)[0]) == 4 for seed in range(20))


def test_weights_without_retain_rows_are_refused(lab: SmallLab) -> None:
    with pytest.raises(ValueError, match="weigh_retain weighs retain activations, and there are none"):
        plan_of(lab, retain=None, weigh_retain=True)


def test_more_is_kept_for_the_same_fall(lab: SmallLab) -> None:
    kept = []
    for weigh in (False, True):
        model = lab.model()
        plan = plan_of(lab, model, weigh_retain=weigh, variants=4)
        assert plan.measures["constrained"]["after"] <= 1e-4 * (1 + 1e-3)
        with edits_in_force(model, plan.edits):
            kept.append(float((losses(model, lab)).mean()))
        assert plan.settings["weigh_retain"] is weigh
    assert kept[1] < kept[0]
