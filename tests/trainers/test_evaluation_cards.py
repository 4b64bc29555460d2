"""What is measured, logged, kept and told: evaluation, logs, checkpoints, model cards, the hub."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import yaml
from kit import (
    Recorder,
    difference,
    folders,
    logged,
    lora,
    mean_nll,
    parameters,
    pd_config,
    primal_dual,
    unlearning,
)
from transformers import AutoModelForCausalLM

from hf_unlearn.trainers import PrimalDualTrainer

# ---- evaluation and logs -------------------------------------------------------------------------------------------


def test_evaluation_before_training_measures_the_model_as_it_came(lab, tmp_path):
    trainer = primal_dual(lab, tmp_path)
    metrics = trainer.evaluate()
    model = lab.model(trained=True)
    assert metrics["eval_forget_nll"] == pytest.approx(mean_nll(model, trainer.data.forget)[1], rel=1e-5)
    for name, rows in trainer.data.retain_eval.items():
        assert metrics[f"eval_loss/retain/{name}"] == pytest.approx(mean_nll(model, rows)[0], rel=1e-5)
    assert not any("feasible" in key for key in metrics), "no limit has been calibrated yet"


@pytest.mark.parametrize(("forget_loss", "retain_loss"), [("npo", "nll"), ("dpo", "kl"), ("undial", "kl")])
def test_evaluation_before_training_knows_its_reference(lab, tmp_path, forget_loss, retain_loss):
    trainer = unlearning(lab, tmp_path, forget_loss=forget_loss, retain_loss=retain_loss)
    metrics = trainer.evaluate()
    if forget_loss != "undial":
        assert metrics["eval_loss/forget"] == pytest.approx(20 * 0.6931472, rel=1e-5)
    if retain_loss == "kl":
        assert metrics["eval_loss/retain/people"] == pytest.approx(0.0, abs=1e-6)
    trainer.train()
    assert logged(trainer, "loss/forget")[0] == pytest.approx(metrics["eval_loss/forget"], rel=0.2)


def test_evaluation_reports_losses_limits_and_feasibility(lab, tmp_path):
    trainer = primal_dual(
        lab, tmp_path, inputs={"eval_dataset": {"held": lab.holdout}}, eval_strategy="steps", eval_steps=3
    )
    trainer.train()
    (metrics,) = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert set(metrics) == {
        "epoch",
        "step",
        "eval_loss",
        "eval_loss/forget",
        "eval_forget_nll",
        "eval_loss/held",
        "eval_feasible",
        "eval_selection_score",
        *(f"eval_{kind}/{name}" for kind in ("loss/retain", "violation", "dual") for name in ("people", "facts")),
    }
    eps = trainer.duals.eps
    for name in ("people", "facts"):
        violation = metrics[f"eval_loss/retain/{name}"] - eps[name]
        assert metrics[f"eval_violation/{name}"] == pytest.approx(violation, abs=1e-9)
        (row,) = [row for row in trainer.feasibility if row["name"] == name]
        assert row["feasible"] == (violation <= 0)
    weights = dict(zip(eps, trainer.duals.multipliers.tolist(), strict=True))
    total = metrics["eval_loss/forget"] + sum(weights[name] * metrics[f"eval_loss/retain/{name}"] for name in eps)
    assert metrics["eval_loss"] == pytest.approx(total, rel=1e-6)
    model = trainer.model
    model.eval()
    assert metrics["eval_loss/held"] == pytest.approx(mean_nll(model, trainer.data.evaluation["held"])[0], rel=1e-5)


def test_evaluating_in_between_does_not_change_the_training(lab, tmp_path):
    runs = []
    for when in ({}, {"eval_strategy": "steps", "eval_steps": 1}):
        trainer = primal_dual(lab, tmp_path, peft_config=lora(lora_dropout=0.2), dual_warmup_steps=0, **when)
        trainer.train()
        runs.append(trainer)
    assert difference(parameters(runs[0].model), parameters(runs[1].model)) == 0
    assert runs[0].duals.multipliers.tolist() == runs[1].duals.multipliers.tolist()


def test_further_datasets_and_metrics_can_be_evaluated(lab, tmp_path):
    trainer = primal_dual(
        lab,
        tmp_path,
        inputs={"eval_dataset": lab.facts, "compute_metrics": lambda metrics: {"ratio": metrics["forget_nll"] / 2}},
    )
    metrics = trainer.evaluate()
    assert metrics["eval_ratio"] == metrics["eval_forget_nll"] / 2
    assert "eval_loss/eval" in metrics
    other = trainer.evaluate({"unseen": lab.holdout}, metric_key_prefix="test")
    assert "test_loss/unseen" in other
    assert "test_loss/eval" not in other


def test_slack_decides_what_counts_as_feasible(lab, tmp_path):
    for slack, feasible in ((0.0, 0.0), (1.0, 1.0)):
        trainer = primal_dual(lab, tmp_path, retain_eps=1e-3, feasibility_slack=slack, learning_rate=1e-4)
        assert trainer.train().metrics["final_feasible"] == feasible


def test_a_step_logs_its_losses_multipliers_violations_and_tokens(lab, tmp_path):
    recorder = Recorder(lab.tokenizer)
    trainer = primal_dual(lab, tmp_path, inputs={"data_collator": recorder}, gradient_accumulation_steps=2)
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "learning_rate" in entry]
    assert len(steps) == 3
    for entry in steps:
        assert set(entry) == {
            "epoch",
            "step",
            "loss",
            "grad_norm",
            "learning_rate",
            "loss/forget",
            "forget_nll",
            "num_tokens",
            *(f"{kind}/{name}" for kind in ("loss/retain", "dual", "violation") for name in ("people", "facts")),
        }
        total = entry["loss/forget"] + sum(
            entry[f"dual/{name}"] * entry[f"loss/retain/{name}"] for name in ("people", "facts")
        )
        assert entry["loss"] == pytest.approx(total, rel=1e-5)
        for name, eps in trainer.duals.eps.items():
            assert entry[f"violation/{name}"] == pytest.approx(entry[f"loss/retain/{name}"] - eps, abs=1e-6)
    items = [item for batch in recorder.batches[:2] for item in batch]
    rows = [row for item in items for row in (item["forget"], *item["retain"].values())]
    assert steps[0]["num_tokens"] == sum(len(row["input_ids"]) for row in rows)
    calibration = [entry for entry in trainer.state.log_history if "eps/people" in entry]
    assert [entry["step"] for entry in calibration] == [0]


# ---- checkpoints, cards and the hub --------------------------------------------------------------------------------


def test_the_defaults_keep_the_best_and_the_last_checkpoint(lab, tmp_path):
    trainer = PrimalDualTrainer(
        model=lab.model(trained=True),
        args=pd_config(tmp_path, checkpoints=True, num_train_epochs=3, per_device_train_batch_size=5),
        forget_dataset=lab.forget,
        retain_dataset=lab.retain,
        processing_class=lab.tokenizer,
    )
    trainer.train()
    kept = folders(tmp_path)
    assert 1 <= len(kept) <= 2
    assert trainer.state.best_model_checkpoint.endswith(tuple(kept))
    best = AutoModelForCausalLM.from_pretrained(trainer.state.best_model_checkpoint)
    assert difference(parameters(trainer.model), parameters(best)) == 0


def card(folder):
    text = (folder / "README.md").read_text(encoding="utf-8")
    _, front, body = text.split("---\n", 2)
    return yaml.safe_load(front), body


def test_the_model_card_says_what_was_done_and_whether_the_limits_hold(lab, tmp_path):
    lab.target.save_pretrained(tmp_path / "start")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "start")
    trainer = primal_dual(lab, tmp_path / "out", model=model, retain_eps=1e-3, hub_token="hf_secret")
    trainer.train()
    trainer.create_model_card(model_name="forgetful", dataset_name="authors", tags="extra")
    front, body = card(tmp_path / "out")
    assert front["library_name"] == "transformers"
    assert {"hf_unlearn", "unlearning", "primal-dual", "extra"} <= set(front["tags"])
    assert len(front["tags"]) == len(set(front["tags"]))
    assert front["datasets"] == "authors"
    assert "# forgetful" in body
    for part in ("PrimalDualTrainer", "lmf", "Forget level", "2506.05314", "transformers:", "hf_unlearn:"):
        assert part in body, part
    for row in trainer.feasibility:
        assert f"| {row['name']} | 0.001 | {row['loss']:.4g} | {row['multiplier']:.4g} | **no** |" in body
    assert "did not find a feasible model" in body
    whole = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert str(tmp_path) not in whole, "no path of this machine"
    assert not re.search(r"(?<![\w.:/])/(home|root|tmp|Users|var)/", whole)
    assert "hf_secret" not in whole


def test_the_model_card_of_a_feasible_run_does_not_cry_wolf(lab, tmp_path):
    trainer = primal_dual(lab, tmp_path, retain_eps=3.0)
    trainer.train()
    trainer.create_model_card()
    _, body = card(tmp_path)
    assert body.count("| yes |") == 2
    assert "violated" not in body


def test_a_model_card_without_constraints(lab, tmp_path):
    trainer = unlearning(lab, tmp_path, forget_loss="npo", forget_loss_kwargs={"beta": 0.2})
    trainer.train()
    trainer.create_model_card()
    front, body = card(tmp_path)
    assert "unlearning" in front["tags"]
    assert "base_model" not in front
    assert "`npo` {'beta': 0.2}" in body
    assert "## Constraints" not in body


def test_saving_with_push_to_hub_uploads_once_with_card_and_state(lab, tmp_path, monkeypatch):
    import transformers.trainer as module

    uploads = []

    class Hub:
        def create_repo(self, name, **kwargs):
            return SimpleNamespace(repo_id=f"me/{name}")

        def upload_folder(self, **kwargs):
            uploads.append(kwargs)
            files = {path.name for path in tmp_path.iterdir()}
            assert {"model.safetensors", "README.md", "unlearning_state.json", "tokenizer.json"} <= files

    monkeypatch.setattr(module, "hf_api", Hub)
    trainer = primal_dual(lab, tmp_path, push_to_hub=True, hub_model_id="forgetful")
    trainer.train()
    uploads.clear()
    trainer.save_model()
    assert [upload["repo_id"] for upload in uploads] == ["me/forgetful"]
    front, body = card(tmp_path)
    assert "primal-dual" in front["tags"]
    assert "# forgetful" in body
