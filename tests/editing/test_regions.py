"""TSR and ARR: losses and gradients against merged weights, the ball and the rank, the model left as it was."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from region_cases import FEW, RUN, assert_untouched, merged, prompts, responses, state, strong, twin
from regions_worker import run
from test_capture import build
from torch.func import functional_call

from hf_unlearn.editing.plan import EditPlan
from hf_unlearn.editing.regions.changes import Ball, FullChange, LowRankChange
from hf_unlearn.editing.regions.config import RegionConfig as PlainConfig
from hf_unlearn.editing.regions.losses import region_loss, set_nll
from hf_unlearn.editing.regions.objective import Objective
from hf_unlearn.editing.regions.plans import RegionConfig, plan_arr, plan_tsr
from hf_unlearn.editing.regions.rows import region_rows, retain_dataset
from hf_unlearn.losses.scores import FullScores


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma", "opt"])
@pytest.mark.parametrize("token_ids", [[7], [5, 30, 6], None])
def test_loss_and_gradient_are_those_of_merged_weights(family: str, token_ids: list[int] | None) -> None:
    model = strong(family)
    given = prompts() if token_ids else responses()
    generator = torch.Generator().manual_seed(3)
    changes = {layer: FullChange([0.05 * torch.randn(16, 24, generator=generator)]) for layer in (2, 3)}
    objective = Objective(
        model, region_rows(given, token_ids or []), None, token_ids=token_ids or [], sign=1.0, cap=math.inf,
        retain_weight=0.0, batch_size=2, pad_token_id=0, run=RUN,
    )  # fmt: skip
    terms, gradients = objective.evaluate(changes)
    deltas = {layer: change.parameters[0].detach().clone().requires_grad_() for layer, change in changes.items()}
    wanted = twin(model, deltas, given, token_ids)
    assert terms.region == pytest.approx(wanted.item(), rel=1e-5)
    for layer, gradient in zip(deltas, torch.autograd.grad(wanted, list(deltas.values())), strict=True):
        torch.testing.assert_close(gradients[layer][0], gradient, rtol=1e-3, atol=1e-5)


def test_the_retain_term_is_the_mean_kl_from_the_unedited_model() -> None:
    model = strong()
    change = FullChange([0.1 * torch.randn(16, 24, generator=torch.Generator().manual_seed(3))])
    objective = Objective(
        model, region_rows(prompts(), [7]), retain_dataset(responses()), token_ids=[7], sign=1.0, cap=math.inf,
        retain_weight=2.0, batch_size=3, pad_token_id=0, run=RUN,
    )  # fmt: skip
    delta = change.parameters[0].detach().clone().requires_grad_()
    parts = []
    for row in responses():
        ids = torch.tensor([row["input_ids"]])
        old = model(input_ids=ids).logits[0].detach().log_softmax(-1)
        new = functional_call(model, merged(model, {3: delta}), kwargs={"input_ids": ids}).logits[0].log_softmax(-1)
        parts += [(old[at - 1].exp() * (old[at - 1] - new[at - 1])).sum() for at in range(4, ids.shape[1])]
    wanted = torch.stack(parts).mean()
    terms, gradients = objective.evaluate({3: change})
    assert terms.retain == pytest.approx(wanted.item(), rel=1e-4)
    total = 2.0 * wanted + twin(model, {3: delta}, prompts(), [7])
    assert terms.total == pytest.approx(total.item(), rel=1e-5)
    torch.testing.assert_close(gradients[3][0], torch.autograd.grad(total, delta)[0], rtol=1e-3, atol=1e-5)


def test_float64_gradients_of_the_losses() -> None:
    logits = torch.randn(3, 5, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    labels = torch.tensor([[-100, -100, 3, 4, 5], [-100, 2, -100, -100, -100], [-100] * 5])
    single = torch.tensor([[-100, -100, 3, -100, -100], [-100, 2, -100, -100, -100], [-100] * 5])
    assert torch.autograd.gradcheck(lambda z: region_loss(FullScores(z, labels), [])[0], logits)
    assert torch.autograd.gradcheck(lambda z: region_loss(FullScores(z, single), [1, 4])[0], logits)
    lowest = float(region_loss(FullScores(logits, labels), [])[1][:2].min())
    assert torch.autograd.gradcheck(lambda z: region_loss(FullScores(z, labels), [], lowest + 0.1)[0], logits)
    total, losses = region_loss(FullScores(logits, labels), [])
    assert losses[2] == 0
    assert total.item() == pytest.approx(losses.sum().item())


@pytest.mark.parametrize("token_ids", [[], [1, 4]])
def test_above_the_cap_the_gradient_is_zero_and_an_empty_mask_gives_zero(token_ids: list[int]) -> None:
    logits = torch.randn(2, 4, 11, generator=torch.Generator().manual_seed(0)).requires_grad_()
    labels = torch.tensor([[-100, 3, -100, -100], [-100, -100, 2, -100]])
    free = region_loss(FullScores(logits, labels), token_ids)[1]
    cap = float(free.mean())
    total, losses = region_loss(FullScores(logits, labels), token_ids, cap)
    torch.testing.assert_close(losses, free.clamp(max=cap))
    assert total.item() == pytest.approx(losses.sum().item())
    (gradient,) = torch.autograd.grad(total, logits)
    assert (gradient.flatten(1).norm(dim=1) > 0).tolist() == (free < cap).tolist()
    empty, none = region_loss(FullScores(logits, torch.full_like(labels, -100)), token_ids)
    assert empty.item() == 0
    assert none.tolist() == [0, 0]
    assert torch.autograd.grad(empty, logits)[0].abs().sum() == 0


def test_the_whole_vocabulary_is_certain_and_half_logits_are_read_in_float32() -> None:
    logits = torch.randn(3, 11).to(torch.bfloat16)
    assert set_nll(range(11))(logits).abs().max() < 1e-6
    assert set_nll([2])(logits).dtype == torch.float32


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("rank", [None, 1, 3])
@pytest.mark.parametrize("token_ids", [[5, 6], None])
def test_tsr_falls_as_merged_weights_say_within_the_ball_and_the_rank(family: str, rank: int | None, token_ids: list[int] | None) -> None:  # fmt: skip
    model = strong(family)
    before = state(model)
    given = prompts() if token_ids else responses()
    config = RegionConfig(radius=0.2, steps=15, rank=rank, batch_size=2)
    plan = plan_tsr(model, given, token_ids=token_ids, layers=(-1, 2), config=config, pad_token_id=0)
    assert_untouched(model, before)
    assert [edit.layer for edit in plan.edits] == [2, 3]
    deltas = {edit.layer: edit.delta() for edit in plan.edits}
    loss = plan.measures["loss"]
    assert loss["before"] == pytest.approx(twin(model, {}, given, token_ids).item(), rel=1e-5)
    assert loss["after"] == pytest.approx(twin(model, deltas, given, token_ids).item(), rel=1e-4)
    assert loss["after"] < loss["before"] - 0.2
    for edit in plan.edits:
        weight = model.get_submodule(edit.path).weight
        assert edit.certificate["radius"] == pytest.approx(0.2 * float(weight.detach().norm()), rel=1e-6)
        assert float(edit.delta().norm()) <= edit.certificate["radius"] * (1 + 1e-6)
        assert edit.certificate["norm"] == pytest.approx(float(edit.delta().norm()), rel=1e-5)
        assert edit.rank == (rank or 16)
        values = torch.linalg.svdvals(edit.delta())
        assert (values[rank or 16 :] < 1e-5 * values[0]).all()


@pytest.mark.parametrize("unit", ["relative", "absolute"])
@pytest.mark.parametrize("joint", [False, True])
def test_every_form_of_the_radius_is_kept_and_used(unit: Any, joint: bool) -> None:
    model = strong()
    config = RegionConfig(radius=0.15, radius_unit=unit, joint_radius=joint, steps=10)
    plan = plan_tsr(model, prompts(), token_ids=[5], layers=(1, 3), config=config, pad_token_id=0)
    norms = [edit.norm() for edit in plan.edits]
    weights = [float(model.get_submodule(edit.path).weight.detach().norm()) for edit in plan.edits]
    limits = [0.15 * w for w in weights] if unit == "relative" else [0.15, 0.15]
    if joint:
        limit = math.hypot(*limits) if unit == "relative" else 0.15
        assert math.hypot(*norms) == pytest.approx(limit, rel=1e-5)
        assert math.hypot(*norms) <= limit * (1 + 1e-6)
        assert [edit.certificate["radius"] for edit in plan.edits] == pytest.approx([limit] * 2)
    else:
        assert norms == pytest.approx(limits, rel=1e-5)


def test_with_one_linear_term_the_descent_ends_at_the_exact_solution() -> None:
    """min <G, Delta> over a ball is -R G / |G|, and over rank 1 along the leading singular vectors."""
    from tqdm.auto import tqdm

    from hf_unlearn.editing.regions.descent import descend
    from hf_unlearn.editing.regions.objective import Terms

    slope = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))

    def evaluate(changes: Any) -> Any:
        loss = (slope * changes[1].added(torch.eye(7)).T).sum()
        return (
            Terms(region=loss.item(), retain=0.0, total=loss.item()),
            {1: list(torch.autograd.grad(loss, changes[1].parameters))},
        )

    for rank, wanted in ((None, -2.0 * slope.norm()), (1, -2.0 * torch.linalg.svdvals(slope)[0])):
        with tqdm(disable=True) as bar:
            found = descend(
                evaluate,
                {1: torch.zeros(5, 7)},
                Ball({1: 2.0}, False),
                rank=rank,
                steps=40,
                learning_rate=0.3,
                bar=bar,
            )
        assert min(found.totals) == pytest.approx(float(wanted), rel=1e-4)
        assert found.totals[0] == 0.0


def test_low_rank_changes_know_their_norm_their_speed_and_the_nearest_matrix() -> None:
    matrix = torch.randn(6, 9, generator=torch.Generator().manual_seed(1))
    change = LowRankChange.nearest(matrix, 2)
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    a, b = change.factors()
    torch.testing.assert_close(b @ a, (u[:, :2] * s[:2]) @ v[:2], rtol=1e-4, atol=1e-5)
    assert change.norm() == pytest.approx(float((b @ a).norm()), rel=1e-5)
    along = [torch.randn_like(part) for part in change.parameters]
    assert change.speed(along) == pytest.approx(float((along[0] @ a + b @ along[1]).norm()), rel=1e-5)
    change.scale(0.25)
    assert change.norm() == pytest.approx(0.25 * float((b @ a).norm()), rel=1e-5)


def test_a_retain_term_protects_the_retained_rows() -> None:
    model = strong()
    kl = []
    for weight in (0.0, 100.0):
        config = RegionConfig(radius=0.3, steps=30, retain_weight=weight)
        plan = plan_tsr(
            model, prompts()[:2], token_ids=[5], retain_rows=responses()[2:], config=config, pad_token_id=0
        )
        kl.append(plan.measures["retain_kl"]["after"])
        assert plan.measures["loss"]["after"] < plan.measures["loss"]["before"]
    assert kl[1] < 0.5 * kl[0]


@pytest.mark.parametrize("plan_of", [plan_tsr, plan_arr])
def test_plans_are_deterministic_and_do_not_depend_on_batches(plan_of: Any, tmp_path: Path) -> None:
    model = strong().train()
    config = {"radius": 0.2, "start": "random", **FEW}
    shared: dict[str, Any] = {"token_ids": [5, 6, 5], "retain_rows": responses()[:2], "pad_token_id": 0}
    one, same, other = (
        plan_of(model, prompts(), config=RegionConfig(**config, batch_size=size), **shared) for size in (2, 2, 5)
    )
    assert model.training
    assert torch.equal(one.edits[0].lora_a, same.edits[0].lora_a)
    assert one.measures == same.measures
    torch.testing.assert_close(one.edits[0].lora_a, other.edits[0].lora_a, rtol=1e-2, atol=1e-3)
    read = EditPlan.load(one.save(tmp_path))
    assert read.as_dict() == one.as_dict()
    assert read.settings["mode"] == "vocabulary"
    read.check_model(model)


def test_an_adapter_takes_part_and_stays_trainable_as_it_was() -> None:
    model = get_peft_model(strong(), LoraConfig(r=2, target_modules=["down_proj", "q_proj"]))
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_B" in name:
                value.normal_(std=0.3, generator=torch.Generator().manual_seed(0))
    wanted = {name: value.requires_grad for name, value in model.named_parameters()}
    plan = plan_tsr(model, prompts(), token_ids=[5], config=RegionConfig(steps=8, radius=0.3), pad_token_id=0)
    arr = plan_arr(model, prompts(), token_ids=[5], config=RegionConfig(radius=0.3, **FEW), pad_token_id=0)
    assert {name: value.requires_grad for name, value in model.named_parameters()} == wanted
    assert arr.edits[0].path == "model.layers.2.mlp.down_proj"
    with model.disable_adapter():
        bare = plan_tsr(model, prompts(), token_ids=[5], config=RegionConfig(steps=1), pad_token_id=0)
    assert abs(bare.measures["loss"]["before"] - plan.measures["loss"]["before"]) > 0.01
    whole = model.merge_and_unload()
    assert plan.measures["loss"]["after"] == pytest.approx(
        twin(whole, {3: plan.edits[0].delta()}, prompts(), [5]).item(), rel=1e-3
    )


@pytest.mark.parametrize("plan_of", [plan_tsr, plan_arr])
def test_the_model_is_as_it_was_after_an_error_that_names_term_and_step(plan_of: Any) -> None:
    model = strong().train()
    model.model.embed_tokens.requires_grad_(False)
    with torch.no_grad():
        model.lm_head.weight[7] = float("nan")
    with pytest.raises(ValueError, match=r"The region term is nan at step 0"):
        plan_of(model, prompts(), token_ids=[5], config=RegionConfig(**FEW), pad_token_id=0)
    assert model.training
    assert [name for name, value in model.named_parameters() if not value.requires_grad] == [
        "model.embed_tokens.weight"
    ]
    assert all(value.grad is None for value in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": []}, "Got 0 rows"),
        ({"token_ids": None}, "Row 0 is a prompt alone .* token_ids is None"),
        ({"token_ids": []}, "token_ids is empty"),
        ({"token_ids": [3, 61, -1]}, r"token_ids holds \[-1, 61\], but the model's vocabulary has ids 0 to 60"),
        ({"token_ids": [1.5]}, "expected whole numbers"),
        ({"layers": []}, "layers is empty"),
        ({"layers": [4]}, "the model has 3 blocks; expected 1 to 3"),
        ({"layers": [3, -1]}, r"are blocks \[3, 3\]; expected each once"),
        ({"config": RegionConfig(rank=17)}, "rank is 17, but the matrix of block 3 is 16 x 24; expected at most 16"),
        ({"retain_rows": []}, "The 0 retain_rows have no response token"),
        ({"retain_rows": [{"input_ids": [1, 2], "labels": [-100, -100]}]}, "The 1 retain_rows have no response token"),
        ({"rows": [{"input_ids": [1, 2], "labels": [-100]}]}, "2 input_ids and 1 labels"),
        ({"rows": [{"input_ids": [1, 2], "labels": [1, 2]}]}, "Row 0 has no prompt"),
    ],
)
@pytest.mark.parametrize("plan_of", [plan_tsr, plan_arr])
def test_bad_input_says_what_was_expected(plan_of: Any, changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"rows": prompts(), "token_ids": [5], "pad_token_id": 0, **changes}
    with pytest.raises((ValueError, TypeError), match=message):
        plan_of(build(), arguments.pop("rows"), **arguments)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, value) for name in ("radius", "learning_rate", "loss_cap") for value in (0, -1.0, math.nan, math.inf)),
        *((name, value) for name in ("steps", "batch_size", "free_positions", "restart_every", "rank") for value in (0, 1.5, True)),
        ("radius_unit", "percent"),
        ("start", "zero"),
        ("retain_weight", -1),
        ("seed", -1),
    ],
)  # fmt: skip
def test_an_option_out_of_range_is_refused(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name} is {value!r}; expected"):
        PlainConfig(**{name: value})


@pytest.mark.distributed
def test_two_ranks_find_the_plan_of_one(tmp_path: Path) -> None:
    here = Path(__file__).parent
    path = os.pathsep.join([str(here), str(here.parents[1]), os.environ.get("PYTHONPATH", "")])
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    shown = subprocess.run(
        [*launcher, str(here / "regions_worker.py"), str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert shown.returncode == 0, shown.stderr[-4000:]
    run(tmp_path, None)
    for name in ("tsr", "rank", "arr"):
        one, first, second = (EditPlan.load(tmp_path / f"{name}-{ranks}") for ranks in ("1-0", "2-0", "2-1"))
        for mine, other, alone in zip(first.edits, second.edits, one.edits, strict=True):
            assert torch.equal(mine.lora_a, other.lora_a), name
            assert torch.equal(mine.lora_b, other.lora_b), name
            torch.testing.assert_close(mine.delta(), alone.delta(), rtol=1e-2, atol=1e-4)
        assert first.measures == second.measures
        assert first.measures["totals"] == pytest.approx(one.measures["totals"], rel=1e-4)
