"""Bad input: each case ends in a clear error before compute is spent, or in a documented rule."""

from __future__ import annotations

import pytest
from datasets import Dataset, DatasetDict
from kit import build, config, pd_config, stream
from peft import LoraConfig, get_peft_model
from transformers import AutoModel

from hf_unlearn.lab.models import tiny_config, tiny_model
from hf_unlearn.trainers import PrimalDualConfig, UnlearningConfig, UnlearningTrainer

# ---- datasets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["forget_dataset", "retain_dataset", "holdout_dataset"])
def test_an_empty_dataset_is_named(lab, tmp_path, side):
    with pytest.raises(ValueError, match=f"The {side} dataset is empty; expected at least one row"):
        build(lab, tmp_path, **{side: lab.forget.select([])})


def test_an_empty_set_among_several_is_named(lab, tmp_path):
    with pytest.raises(ValueError, match=r"retain_dataset\['facts'\] dataset is empty"):
        build(lab, tmp_path, retain_dataset={"people": lab.retain, "facts": lab.facts.select([])})


def test_missing_datasets_are_named(lab, tmp_path):
    with pytest.raises(ValueError, match="forget_dataset is missing"):
        build(lab, tmp_path, forget_dataset=None)
    with pytest.raises(ValueError, match="retain_dataset is missing"):
        build(lab, tmp_path, retain_dataset=None)
    with pytest.raises(ValueError, match='retain_loss="kl" needs a retain_dataset'):
        build(lab, tmp_path, UnlearningTrainer, retain_dataset=None, retain_loss="kl")


@pytest.mark.parametrize("side", ["forget_dataset", "retain_dataset"])
def test_missing_columns_are_listed_with_what_is_accepted(lab, tmp_path, side):
    rows = lab.forget.rename_column("answer", "reply")
    with pytest.raises(ValueError, match=rf"{side}.*question.*reply"):
        build(lab, tmp_path, **{side: rows})


def test_rows_whose_labels_are_all_masked_are_counted(lab, tmp_path):
    rows = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [5, 6, 7], "labels": [-100] * 3}]
    with pytest.raises(ValueError, match=r"All labels are masked in 1 of the 2 rows .*forget_dataset.*row 1"):
        build(lab, tmp_path, forget_dataset=Dataset.from_list(rows))
    with pytest.raises(ValueError, match="prompt alone fills max_length=5"):
        build(lab, tmp_path, max_length=5)


def test_a_dataset_dict_stands_for_its_only_split_whatever_its_name(lab, tmp_path):
    trainer = build(
        lab,
        tmp_path,
        forget_dataset=DatasetDict({"forget10": lab.forget}),
        retain_dataset=DatasetDict({"train": lab.retain, "test": lab.facts}),
    )
    assert len(trainer.data.forget) == 10
    assert list(trainer.data.retain) == ["retain"]
    assert len(trainer.data.retain["retain"]) + len(trainer.data.retain_eval["retain"]) == 16
    with pytest.raises(ValueError, match=r"splits \['a', 'b'\] and none is called 'train'"):
        build(lab, tmp_path, forget_dataset=DatasetDict({"a": lab.forget, "b": lab.facts}))


@pytest.mark.parametrize("name", ["", "a/b", 3])
def test_names_of_retain_sets_must_fit_into_metric_names(lab, tmp_path, name):
    with pytest.raises(ValueError, match="retain_dataset has the name"):
        build(lab, tmp_path, retain_dataset={name: lab.retain})


@pytest.mark.parametrize("argument", ["retain_dataset", "eval_dataset"])
def test_no_other_set_can_be_called_forget(lab, tmp_path, argument):
    """Its losses would be logged under the names of the forget set's."""
    with pytest.raises(ValueError, match=f"{argument} has the name 'forget'"):
        build(lab, tmp_path, **{argument: {"forget": lab.retain}})


def test_something_that_is_no_dataset_is_a_type_error(lab, tmp_path):
    with pytest.raises(TypeError, match=r"expected a dataset\. Load it first"):
        build(lab, tmp_path, forget_dataset="locuslab/TOFU")


def test_holding_out_all_retain_rows_leaves_nothing_to_train_on(lab, tmp_path):
    with pytest.raises(ValueError, match="retain_eval_size is 16, but the retain set has 16 rows"):
        build(lab, tmp_path, retain_eval_size=16)


def test_a_stream_needs_max_steps_and_warm_up_steps(lab, tmp_path):
    with pytest.raises(ValueError, match="A stream has no length: set max_steps"):
        build(lab, tmp_path, retain_dataset=stream(lab.retain), dual_warmup_steps=0, max_steps=-1, num_train_epochs=1)
    with pytest.raises(ValueError, match="set dual_warmup_steps"):
        build(lab, tmp_path, retain_dataset=stream(lab.retain))
    trainer = build(lab, tmp_path, UnlearningTrainer, forget_dataset=stream(lab.forget), forget_loss="npo")
    with pytest.raises(ValueError, match="a stream has no row numbers"):
        trainer.train()


# ---- lengths -----------------------------------------------------------------------------------------------------------


def test_a_max_length_above_the_models_positions_is_refused_if_asked_for(lab, tmp_path):
    with pytest.raises(ValueError, match="max_length is 500, but LlamaForCausalLM has 128 positions"):
        build(lab, tmp_path, max_length=500)


def test_the_default_max_length_is_lowered_to_the_models_positions(lab, tmp_path):
    model = tiny_model(tiny_config(lab.tokenizer, hidden_size=32, num_layers=1, num_heads=4, max_positions=50))
    with pytest.warns(UserWarning, match=r"of the 10 rows of the forget_dataset .*max_length=50"):
        trainer = build(lab, tmp_path, model=model, max_length=1024)
    assert trainer.args.max_length == 50
    assert max(map(len, trainer.data.forget["input_ids"])) == 50
    trainer.train()


def test_rows_longer_than_the_model_are_refused_when_nothing_may_be_cut(lab, tmp_path):
    model = tiny_model(tiny_config(lab.tokenizer, hidden_size=32, num_layers=1, num_heads=4, max_positions=50))
    with pytest.raises(ValueError, match="50 positions"):
        build(lab, tmp_path, model=model, max_length=None)


# ---- limits and multipliers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"dual_lr": -0.5}, "dual_lr is -0.5; expected a finite number above 0"),
        ({"dual_lr": float("nan")}, "dual_lr is nan"),
        ({"dual_init": -1.0}, "dual_init is -1.0"),
        ({"dual_max": 0.0}, "dual_max is 0.0"),
        ({"dual_smoothing": 1.0}, "dual_smoothing is 1.0; .* below 1.0"),
        ({"dual_warmup_epochs": -1.0}, "dual_warmup_epochs is -1.0"),
        ({"dual_warmup_steps": -1}, "dual_warmup_steps is -1"),
        ({"dual_update": "batch"}, "dual_update is 'batch'; expected one of: step, epoch"),
        ({"retain_eps": 0.3, "retain_margin": 0.1}, "retain_eps and retain_margin are given; expected one of"),
        ({"retain_eps": 0.3, "retain_tolerance": 0.1}, "retain_eps and retain_tolerance are given"),
        ({"retain_eps": "a lot"}, "retain_eps is 'a lot'; expected a number"),
        ({"retain_eps": {"retain": "a lot"}}, "retain_eps is .*expected a number"),
        ({"forget_target": "soon"}, "forget_target is 'soon'; expected"),
        ({"forget_target": -2.0}, "forget_target is -2.0"),
        ({"forget_target_by": "word"}, "forget_target_by is 'word'"),
        ({"forget_target_mode": "stop"}, "forget_target_mode is 'stop'; expected one of: gate"),
        ({"forget_target_band": 0.0}, "forget_target_band is 0.0"),
        ({"feasibility_slack": -0.1}, "feasibility_slack is -0.1"),
        ({"forget_loss": "gradient"}, "forget_loss is 'gradient'; expected one of: lmf"),
        ({"retain_loss": "mse"}, "retain_loss is 'mse'; expected one of: nll, kl"),
        ({"cycle": "both"}, "cycle is 'both'"),
        ({"reference_policy": "none"}, "reference_policy is 'none'"),
        ({"max_length": 1}, "max_length is 1"),
        ({"retain_eval_size": -1}, "retain_eval_size is -1"),
        ({"forget_eval_size": 0}, "forget_eval_size is 0"),
        ({"forget_weight": -1.0}, "must not be negative"),
        ({"remove_unused_columns": True}, "remove_unused_columns=True cannot work here"),
    ],
)
def test_settings_out_of_range_are_refused_by_the_configuration(tmp_path, kwargs, message):
    with pytest.raises(ValueError, match=message):
        pd_config(tmp_path, **kwargs)


@pytest.mark.parametrize("option", ["retain_eps", "retain_tolerance", "retain_margin"])
def test_names_in_a_limit_must_be_those_of_the_retain_sets(lab, tmp_path, option):
    with pytest.raises(ValueError, match=rf"{option} names \['people'\], but the retain sets are \['retain'\]"):
        build(lab, tmp_path, **{option: {"people": 0.1}})


def test_names_in_the_weights_must_be_those_of_the_retain_sets(lab, tmp_path):
    with pytest.raises(ValueError, match=r"retain_weight names \['people'\], but the retain sets are \['retain'\]"):
        build(lab, tmp_path, UnlearningTrainer, retain_weight={"people": 0.1})


def test_weights_are_learned_by_the_primal_dual_method(lab, tmp_path):
    with pytest.raises(ValueError, match="retain_weight is learned"):
        build(lab, tmp_path, retain_weight=2.0)


def test_relative_limits_on_a_divergence_mean_nothing(lab, tmp_path):
    with pytest.raises(ValueError, match="give retain_eps, the divergence"):
        build(lab, tmp_path, retain_loss="kl", retain_tolerance=0.1)


def test_an_eps_that_cannot_be_reached_warns_and_the_run_ends_infeasible(lab, tmp_path, caplog):
    trainer = build(lab, tmp_path, retain_eps=1e-3, max_steps=3)
    with caplog.at_level("WARNING"):
        output = trainer.train()
    assert "eps = 0.001 is below half of the loss before step 0" in caplog.text
    assert "Infeasible: the loss on retain set 'retain' is" in caplog.text
    assert trainer.state.global_step == 3
    assert output.metrics["final_feasible"] == 0.0
    assert trainer.feasibility[0]["feasible"] is False


# ---- losses ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["npo", "simnpo", "dpo", "undial", "idk_nll"])
@pytest.mark.parametrize("target", ["holdout", 5.0])
def test_a_forget_target_needs_a_loss_with_a_value_for_each_token(lab, tmp_path, name, target):
    with pytest.raises(ValueError, match=f'gates a loss that has a value for each token; forget_loss="{name}"'):
        build(lab, tmp_path, forget_loss=name, forget_target=target)


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("lmf", {"beta": 1.0}, r"\['beta'\], which forget_loss='lmf' does not take; it takes: no parameters"),
        ("npo", {"betta": 1.0}, r"\['betta'\], which forget_loss='npo' does not take; it takes: beta"),
        ("simnpo", {"delta": 0}, "it takes: beta, gamma"),
        ("npo", {"logps": 0}, r"\['logps'\]"),
    ],
)
def test_unknown_parameters_of_a_loss_are_refused(lab, tmp_path, name, kwargs, message):
    with pytest.raises(ValueError, match=message):
        build(lab, tmp_path, UnlearningTrainer, forget_loss=name, forget_loss_kwargs=kwargs)


def test_refusals_need_a_prompt(lab, tmp_path):
    rows = Dataset.from_list([{"text": "A sentence about nothing."}, {"text": "Another sentence."}])
    with pytest.raises(ValueError, match="Refusals answer a prompt"):
        build(lab, tmp_path, UnlearningTrainer, forget_loss="dpo", forget_dataset=rows)


def test_a_holdout_level_needs_prompts_or_a_holdout_dataset(lab, tmp_path):
    rows = Dataset.from_list([{"text": f"Sentence number {n} about nothing."} for n in range(30)])
    with pytest.raises(ValueError, match="pass a holdout_dataset, or give forget_target as a number"):
        build(lab, tmp_path, retain_dataset=rows)
    same = Dataset.from_list([{"question": f"What is {n}?", "answer": "A number."} for n in range(30)])
    with pytest.raises(ValueError, match="they are all the same"):
        build(lab, tmp_path, retain_dataset=same)


# ---- models, adapters, configurations --------------------------------------------------------------------------------------


def test_a_model_without_a_head_is_refused(lab, tmp_path):
    model = AutoModel.from_config(lab.blank.config)
    with pytest.raises(ValueError, match="LlamaModel has no language-modelling head"):
        build(lab, tmp_path, model=model)


def test_something_that_is_no_model_is_a_type_error(lab, tmp_path):
    with pytest.raises(TypeError, match="model must be a name or a PreTrainedModel, got int"):
        build(lab, tmp_path, model=3)
    with pytest.raises(ValueError, match=r"model_init_kwargs .* an instance of LlamaForCausalLM was given"):
        build(lab, tmp_path, model_init_kwargs={"dtype": "float32"})


def test_an_adapter_that_fits_nowhere_is_refused(lab, tmp_path):
    with pytest.raises(ValueError, match=r"The adapter does not fit LlamaForCausalLM.*all-linear"):
        build(lab, tmp_path, peft_config=LoraConfig(target_modules=["query_key_value"]))
    with pytest.raises(TypeError, match=r"peft_config must be a peft\.PeftConfig such as LoraConfig, got dict"):
        build(lab, tmp_path, peft_config={"r": 4})


def test_an_adapter_on_top_of_an_adapter_is_refused(lab, tmp_path):
    model = get_peft_model(lab.model(), LoraConfig(r=2, target_modules="all-linear"))
    with pytest.raises(ValueError, match="already has an adapter and peft_config asks for another"):
        build(lab, tmp_path, model=model, peft_config=LoraConfig(r=2, target_modules="all-linear"))


def test_an_adapter_that_came_with_the_model_cannot_be_switched_off_for_a_reference(lab, tmp_path):
    model = get_peft_model(lab.model(), LoraConfig(r=2, target_modules="all-linear"))
    with pytest.raises(ValueError, match="the adapter was trained before, so its base is another model"):
        build(lab, tmp_path, UnlearningTrainer, model=model, retain_loss="kl", reference_policy="adapter")
    with pytest.raises(ValueError, match="there is no adapter"):
        build(lab, tmp_path, UnlearningTrainer, retain_loss="kl", reference_policy="adapter")


def test_a_model_without_trainable_parameters_is_refused(lab, tmp_path):
    with pytest.raises(ValueError, match="No parameter of the model is trainable"):
        build(lab, tmp_path, model=lab.model().requires_grad_(False))


def test_a_tokenizer_must_be_given_and_must_fit(lab, tmp_path):
    with pytest.raises(ValueError, match="processing_class is missing"):
        build(lab, tmp_path, processing_class=None)
    with pytest.raises(TypeError, match="processing_class must be a tokenizer, got int"):
        build(lab, tmp_path, processing_class=3)
    small = tiny_config(lab.tokenizer, hidden_size=32, num_layers=1)
    small.vocab_size = 100
    with pytest.raises(ValueError, match="The tokenizer has 600 tokens, the model embeds 100"):
        build(lab, tmp_path, model=tiny_model(small))


def test_the_configuration_must_be_the_trainers_own(lab, tmp_path):
    with pytest.raises(TypeError, match="args must be a PrimalDualConfig, got UnlearningConfig"):
        build(lab, tmp_path, args=config(tmp_path))


def test_unknown_settings_are_errors():
    for settings in (UnlearningConfig, PrimalDualConfig):
        with pytest.raises(TypeError, match="unexpected keyword argument 'retain_limit'"):
            settings(output_dir="x", retain_limit=0.3)


@pytest.mark.parametrize("field", ["forget_loss_kwargs", "model_init_kwargs"])
def test_an_option_that_is_no_json_object_says_what_was_expected(tmp_path, field):
    with pytest.raises(ValueError, match=f"{field} is 'beta=0.1'; expected a dict, or JSON"):
        UnlearningConfig(output_dir=str(tmp_path), use_cpu=True, **{field: "beta=0.1"})
