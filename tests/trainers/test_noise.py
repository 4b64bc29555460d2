"""Noise before step 0: how far the weights move, what is measured before it, and what is refused."""

from __future__ import annotations

import zlib

import pytest
import torch
from kit import config, difference, logged, parameters, primal_dual, unlearning
from peft import LoraConfig

from hf_unlearn.trainers import noise
from hf_unlearn.trainers.noise import add_weight_noise


def twin(before: dict[str, torch.Tensor], share: float, seed: int, deviation: float) -> dict[str, torch.Tensor]:
    """The same, number by number."""
    moved = {}
    for name, value in before.items():
        moved[name] = value.clone()
        if value.dim() > 1:
            stream = torch.Generator().manual_seed((seed * 1_000_003 + zlib.crc32(name.encode())) % 2**63)
            moved[name] = (1 - share) * value + share * deviation * torch.randn(value.shape, generator=stream)
    return moved


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_matrices_move_towards_a_fresh_initialisation_and_norms_stay(lab, share: float) -> None:
    model = lab.model(trained=True)
    before = parameters(model)
    add_weight_noise(model, share, seed=3)
    assert difference(twin(before, share, 3, model.config.initializer_range), parameters(model)) < 1e-6
    assert model.lm_head.weight is model.model.embed_tokens.weight, "tied weights stay tied, and move once"


def test_the_scale_is_the_configs_and_a_seed_gives_one_noise(lab) -> None:
    found = []
    for seed, deviation in ((0, 0.02), (0, 0.02), (1, 0.02), (0, 0.5)):
        model = lab.model()
        model.config.initializer_range = deviation
        add_weight_noise(model, 1.0, seed=seed)
        found.append(parameters(model))
    assert difference(found[0], found[1]) == 0.0
    assert difference(found[0], found[2]) > 0.01
    name = "model.layers.0.mlp.up_proj.weight"
    assert found[3][name].std() == pytest.approx(0.5, rel=0.1)
    assert found[0][name].std() == pytest.approx(0.02, rel=0.1)


def test_limits_level_and_reference_are_those_of_the_model_before_the_noise(lab, tmp_path) -> None:
    plain, noisy = (
        primal_dual(lab, tmp_path, max_steps=1, retain_margin=0.5, weight_noise=share) for share in (0.0, 0.5)
    )
    for trainer in (plain, noisy):
        trainer.train()
    assert noisy.duals.eps == plain.duals.eps
    assert noisy.target is not None
    assert noisy.target == plain.target
    assert logged(noisy, "loss/retain/people")[0] > 10 * logged(plain, "loss/retain/people")[0]


def test_the_divergence_is_from_the_model_before_the_noise_and_training_makes_it_smaller(lab, tmp_path) -> None:
    trainer = unlearning(
        lab,
        tmp_path,
        inputs={"retain_dataset": lab.retain},
        forget_weight=0.0,
        retain_loss="kl",
        weight_noise=0.5,
        learning_rate=1e-2,
        cycle="retain",
        max_steps=-1,
        num_train_epochs=15,
    )
    trainer.train()
    distances = logged(trainer, "loss/retain/retain")
    assert distances[0] > 1.0
    assert distances[-1] < 0.1 * distances[0]


def test_a_run_that_is_resumed_gets_its_noise_once(lab, tmp_path) -> None:
    saving = {"max_steps": 4, "weight_noise": 0.3, "save_strategy": "steps", "save_steps": 2}
    whole, rest = (unlearning(lab, tmp_path / folder, **saving) for folder in ("whole", "rest"))
    whole.train()
    rest.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert difference(parameters(whole.model), parameters(rest.model)) == 0.0


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan")])
def test_a_share_outside_of_zero_and_one_is_refused_before_any_row_is_read(tmp_path, share: float) -> None:
    with pytest.raises(ValueError, match=rf"weight_noise is {share}; expected a share between 0"):
        config(tmp_path, weight_noise=share)


def test_an_adapter_and_frozen_weights_are_refused_because_they_would_keep_what_is_to_go(lab, tmp_path) -> None:
    with pytest.raises(ValueError, match="an adapter leaves them as they are"):
        unlearning(lab, tmp_path, weight_noise=0.3, peft_config=LoraConfig())
    model = lab.model()
    model.model.layers[0].requires_grad_(False)
    with pytest.raises(ValueError, match=r"7 of them are frozen \(model.layers.0.self_attn.q_proj.weight"):
        unlearning(lab, tmp_path, model=model, weight_noise=0.3)


def test_rows_that_are_held_out_of_training_are_warned_of(lab, tmp_path, caplog, monkeypatch) -> None:
    monkeypatch.setattr(noise.logger, "propagate", True)
    monkeypatch.setattr(noise.logger.parent, "propagate", True)
    for size, warned in ((4, True), (0, False)):
        caplog.clear()
        unlearning(lab, tmp_path, weight_noise=0.3, retain_eval_size=size)
        assert ("what only they say will be gone" in caplog.text) == warned


def test_the_card_names_the_noise_and_says_which_rows_the_limits_were_measured_on(lab, tmp_path) -> None:
    for size, wanted in ((0, "also trained on during unlearning"), (4, "held out of unlearning")):
        trainer = primal_dual(lab, tmp_path, max_steps=1, weight_noise=0.3, retain_eval_size=size)
        trainer.train()
        trainer.create_model_card()
        card = (tmp_path / "README.md").read_text(encoding="utf-8")
        assert "| Share of the weights replaced by noise before training | 0.3 |" in card
        assert f"measured on retain rows that were {wanted}." in card
