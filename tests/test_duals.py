"""The dual variable: its rules, its state, and that no update waits for the device."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_unlearn.duals import DualVariables, RetainConstraint


def make(eps: float = 0.5, **kwargs: Any) -> DualVariables:
    return DualVariables([RetainConstraint(name="retain", eps=eps)], **kwargs)


def two(**kwargs: Any) -> DualVariables:
    constraints = [
        RetainConstraint(name="retain", eps=0.5),
        RetainConstraint(name="facts", eps=0.25, multiplier=3.0, step_size=2.0),
    ]
    return DualVariables(constraints, **kwargs)


# --- RetainConstraint ---


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({}, "exactly one of eps"),
        ({"eps": 0.1, "tolerance": 0.1}, "exactly one of eps"),
        ({"eps": -0.1}, "eps must be finite and >= 0, got -0.1"),
        ({"eps": math.nan}, "eps must be finite"),
        ({"eps": math.inf}, "eps must be finite"),
        ({"tolerance": -0.5}, "tolerance must be finite and >= 0"),
        ({"eps": 0.1, "step_size": -1.0}, "step_size must be finite and > 0, got -1.0"),
        ({"eps": 0.1, "step_size": 0.0}, "step_size must be finite and > 0"),
        ({"eps": 0.1, "multiplier": -1.0}, "multiplier must be finite and >= 0"),
        ({"eps": 0.1, "name": ""}, "name must be a non-empty string"),
    ],
)
def test_bad_constraint_says_what_was_given(kwargs: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        RetainConstraint(**{"name": "retain", **kwargs})


def test_bad_type_is_a_type_error() -> None:
    with pytest.raises(TypeError, match=r"eps must be a number, got '0\.3'"):
        RetainConstraint(name="retain", eps="0.3")  # type: ignore[arg-type]  # the wrong value is the point
    with pytest.raises(TypeError, match="got True"):
        RetainConstraint(name="retain", eps=True)


def test_calibration_makes_a_relative_limit_absolute_and_leaves_an_absolute_one() -> None:
    relative = RetainConstraint(name="retain", tolerance=0.5, multiplier=2.0)
    assert relative.calibrated(0.2) == RetainConstraint(name="retain", eps=1.5 * 0.2, multiplier=2.0)
    absolute = RetainConstraint(name="retain", eps=0.3)
    assert absolute.calibrated(9.0) is absolute
    for bad in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="finite reference loss above 0"):
            relative.calibrated(bad)


# --- DualVariables: construction ---


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"step_size": -0.1}, "step_size must be finite and > 0, got -0.1"),
        ({"multiplier": -1.0}, "multiplier must be finite and >= 0"),
        ({"max_multiplier": 0.0}, "max_multiplier must be finite and > 0"),
        ({"multiplier": 5.0, "max_multiplier": 4.0}, "above max_multiplier=4.0"),
        ({"smoothing": 1.0}, r"smoothing must be in \[0, 1\)"),
        ({"warmup_updates": -1}, "warmup_updates must be an integer >= 0"),
        ({"warmup_updates": 1.5}, "warmup_updates must be an integer >= 0"),
        ({"eps": 0.0, "normalize": True}, "divides by eps, which is 0 for 'retain'"),
    ],
)
def test_bad_settings_say_what_was_given(kwargs: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make(**kwargs)


def test_names_and_limits_are_checked() -> None:
    same = RetainConstraint(name="a", eps=1.0)
    with pytest.raises(ValueError, match="names must differ"):
        DualVariables([same, same])
    with pytest.raises(ValueError, match=r"'b' has a relative limit.*calibrated"):
        DualVariables([RetainConstraint(name="b", tolerance=0.1)])
    for call in (make().ascend, make().violations, make().lagrangian, make().feasible, make().summary):
        with pytest.raises(ValueError, match=r"No constraint is named \['retian'\]"):
            call({"retian": torch.tensor(1.0)})
    with pytest.raises(ValueError, match="No constraint is named"):
        make().multiplier("retian")


def test_no_constraints_is_a_plain_objective() -> None:
    duals = DualVariables([])
    duals.ascend({})
    assert len(duals) == 0
    assert float(duals.lagrangian({})) == 0
    assert duals.feasible({})
    assert duals.summary() == []


# --- the update ---


def slow_twin(
    losses: list[float], *, eps: float, lam: float, eta: float, cap: float, warmup: int, s: float, normalize: bool
) -> list[float]:
    path, average = [], None
    for step, loss in enumerate(losses):
        average = loss if average is None else s * average + (1 - s) * loss
        if step >= warmup:
            violation = (average - eps) / eps if normalize else average - eps
            lam = min(max(lam + eta * violation, 0.0), cap)
        path.append(lam)
    return path


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("warmup", [0, 4])
def test_update_equals_a_slow_twin(normalize: bool, smoothing: float, warmup: int) -> None:
    losses = (torch.rand(40, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2).tolist()
    losses[10:20] = [0.0] * 10  # long enough below the limit to reach the lower end
    duals = make(
        eps=0.6, step_size=0.4, max_multiplier=1.3, warmup_updates=warmup, smoothing=smoothing, normalize=normalize
    )
    path = []
    for loss in losses:
        duals.ascend({"retain": torch.tensor(loss, dtype=torch.float64)})
        path.append(float(duals.multiplier("retain")))
    twin = slow_twin(losses, eps=0.6, lam=1.0, eta=0.4, cap=1.3, warmup=warmup, s=smoothing, normalize=normalize)
    assert path == pytest.approx(twin, rel=1e-12, abs=1e-12)
    assert max(path) == 1.3
    assert smoothing == 0.9 or min(path) == 0.0


def test_overrides_of_one_constraint_stay_with_it() -> None:
    duals = two()
    duals.ascend({"retain": 1.5, "facts": 1.25})
    assert duals.multipliers.tolist() == [1.0 + 0.5 * 1.0, 3.0 + 2.0 * 1.0]


def test_warm_start_holds_the_multipliers_for_exactly_that_many_updates() -> None:
    duals = make(warmup_updates=2)
    seen = []
    for _ in range(4):
        seen.append((duals.warming_up, float(duals.multiplier("retain"))))
        duals.ascend({"retain": 1.5})
    assert seen == [(True, 1.0), (True, 1.0), (False, 1.0), (False, 1.5)]


def test_constraint_without_a_loss_or_without_labels_is_left_alone() -> None:
    duals = two(smoothing=0.5)
    duals.ascend({"retain": 1.5, "facts": None})
    duals.ascend({"retain": None})
    assert duals.multiplier("facts").item() == 3.0
    assert duals.multiplier("retain").item() == 1.5
    # an empty mask: the mean over no token is 0 or NaN, and the count decides
    for empty in (0.0, math.nan):
        duals.ascend(
            {"retain": torch.tensor(empty), "facts": 0.25}, counts={"retain": torch.tensor(0.0), "facts": 7.0}
        )
    assert duals.multiplier("retain").item() == 1.5
    assert duals.updates == 4
    duals.check_finite()
    duals.ascend({"retain": 0.5})  # the average went on from the last measured 1.5
    assert duals.state_dict()["smoothed"][0] == 1.0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_non_finite_loss_is_reported_and_poisons_nothing(bad: float) -> None:
    duals = two(smoothing=0.5)
    duals.ascend({"retain": 1.5, "facts": torch.tensor(bad)})
    duals.ascend({"retain": 0.5, "facts": 0.25})
    assert duals.multipliers.tolist() == [1.75, 3.0]
    with pytest.raises(ValueError, match=r"\{'facts': 1\}"):
        duals.check_finite()
    json.dumps(duals.state_dict(), allow_nan=False)


def test_updates_of_large_and_small_size_add_up_in_64_bits() -> None:
    duals = make(eps=0.0, multiplier=1e6, step_size=1e-4)
    for _ in range(100):
        duals.ascend({"retain": torch.tensor(1.0, dtype=torch.bfloat16)})
    assert duals.multiplier("retain").item() == pytest.approx(1e6 + 1e-2, abs=1e-8)


def test_ascend_and_lagrangian_copy_nothing_to_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    duals = two(smoothing=0.5, max_multiplier=10.0, normalize=True)
    losses = {"retain": torch.tensor(1.5, requires_grad=True), "facts": torch.tensor(2.0)}
    counts = {"retain": torch.tensor(3.0), "facts": torch.tensor(0.0)}

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the update waited for the device")

    with monkeypatch.context() as patch:
        for method in ("item", "tolist", "cpu", "numpy", "__float__", "__bool__", "__int__", "__index__", "nonzero"):
            patch.setattr(torch.Tensor, method, refuse)
        for _ in range(3):
            duals.ascend(losses, counts)
            duals.lagrangian(losses)
            duals.violations(losses)
    assert duals.multiplier("facts").item() == 3.0
    assert duals.multiplier("retain").item() == 1.0 + 3 * 0.5 * 2.0


# --- the Lagrangian ---


@pytest.mark.parametrize("normalize", [False, True])
def test_lagrangian_has_the_weights_as_gradient_and_keeps_lambda_constant(normalize: bool) -> None:
    duals = two(normalize=normalize)
    losses = {name: torch.tensor(value, requires_grad=True) for name, value in (("retain", 2.0), ("facts", 1.0))}
    total = duals.lagrangian(losses)
    scale = {"retain": 0.5, "facts": 0.25} if normalize else {"retain": 1.0, "facts": 1.0}
    assert total.item() == pytest.approx(1.0 * 1.5 / scale["retain"] + 3.0 * 0.75 / scale["facts"])
    assert total.dtype == torch.float32
    total.backward()
    for name, weight in duals.weights().items():
        gradient = losses[name].grad
        assert gradient is not None
        assert gradient.item() == pytest.approx(weight.item())
        assert not weight.requires_grad
    violations = duals.violations(losses)
    assert {k: v.item() for k, v in violations.items()} == {
        "retain": 1.5 / scale["retain"],
        "facts": 0.75 / scale["facts"],
    }
    assert not violations["retain"].requires_grad


def test_lagrangian_of_half_precision_losses_is_summed_in_32_bits() -> None:
    loss = torch.tensor(1.5, dtype=torch.bfloat16, requires_grad=True)
    total = two().lagrangian({"retain": loss})
    assert total.dtype == torch.float32
    total.backward()
    assert loss.grad is not None
    assert loss.grad.item() == 1.0
    assert two().lagrangian({"retain": None}).item() == 0.0


# --- reports ---


def test_feasibility_needs_every_loss_and_rejects_nan() -> None:
    duals = two()
    assert duals.feasible({"retain": 0.5, "facts": torch.tensor(0.25)})
    assert not duals.feasible({"retain": 0.51, "facts": 0.2})
    assert duals.feasible({"retain": 0.51, "facts": 0.2}, slack=0.02)
    assert not duals.feasible({"retain": math.nan, "facts": 0.2})
    for partial in ({"retain": 0.1}, {"retain": 0.1, "facts": None}):
        with pytest.raises(ValueError, match=r"no loss was given for \['facts'\]"):
            duals.feasible(partial)


def test_summary_has_a_row_for_each_constraint() -> None:
    duals = two()
    duals.ascend({"retain": 1.5})
    assert duals.summary() == [
        {"name": "retain", "eps": 0.5, "loss": 1.5, "multiplier": 1.5, "feasible": False},
        {"name": "facts", "eps": 0.25, "loss": None, "multiplier": 3.0, "feasible": None},
    ]
    assert [row["feasible"] for row in duals.summary({"retain": 0.1, "facts": 0.3})] == [True, False]


# --- state ---


def test_resumed_run_continues_bit_for_bit_through_json() -> None:
    generator = torch.Generator().manual_seed(3)
    losses: list[dict[str, Tensor | None]] = [
        {"retain": a, "facts": b} for a, b in torch.rand(60, 2, generator=generator).unbind(0)
    ]
    losses[7]["facts"] = None
    kwargs = {"smoothing": 0.7, "warmup_updates": 5, "max_multiplier": 4.0, "step_size": 0.1}
    for stop in (0, 3, 20):
        whole, first, second = two(**kwargs), two(**kwargs), two(**kwargs)
        for loss in losses:
            whole.ascend(loss)
        for loss in losses[:stop]:
            first.ascend(loss)
        second.load_state_dict(json.loads(json.dumps(first.state_dict(), allow_nan=False)))
        for loss in losses[stop:]:
            second.ascend(loss)
        assert torch.equal(whole.multipliers, second.multipliers)
        assert whole.state_dict() == second.state_dict()


def test_saved_limits_win_with_a_warning() -> None:
    duals, other = make(eps=0.3), make(eps=0.4)
    with pytest.warns(UserWarning, match="replace"):
        other.load_state_dict(duals.state_dict())
    assert other.eps == {"retain": 0.3}
    other.ascend({"retain": 1.3})
    assert other.multiplier("retain").item() == 1.5


def test_state_of_other_constraints_is_refused() -> None:
    with pytest.raises(ValueError, match=r"missing: \['facts'\], unexpected: \[\]"):
        two().load_state_dict(make().state_dict())
    with pytest.raises(ValueError, match="expected a state of version 1, got None"):
        two().load_state_dict({"names": ["retain", "facts"]})
