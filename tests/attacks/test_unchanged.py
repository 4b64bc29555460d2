"""No attack leaves a trace: not in the model it was given, and not in the caller's random numbers."""

from __future__ import annotations

import copy
import random
from importlib import import_module
from typing import Any

import numpy as np
import pytest
import rich.style  # draws from `random` when it is first imported, by rouge-score or a progress bar
import torch
from peft import LoraConfig, get_peft_model
from small_models import AttackLab
from transformers import GPT2Config, GPT2LMHeadModel

from hf_unlearn.attacks import (
    GCGConfig,
    MultiTurnConfig,
    ParaphraseConfig,
    PrefillConfig,
    PromptConfig,
    RelearnConfig,
    RoundingConfig,
    SoftPromptConfig,
    Transcript,
)
from hf_unlearn.cli.attack_arguments import CONFIGS
from hf_unlearn.data.prompts_files import PromptRow, XSTestPrompts

PROMPTS = [PromptRow(id="0", prompt="Hello", behavior="greet", safe=True, source="xstest")]
TALK = Transcript(messages=({"role": "user", "content": "Hello"},), behavior="greet")


@pytest.fixture(scope="module")
def model(attack_lab: AttackLab) -> Any:
    """Tied head, Conv1D and dropout; in training, but for one module, with gradients, and with settings to generate."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        shape = GPT2Config(
            vocab_size=len(attack_lab.tokenizer), n_positions=256, n_embd=16, n_layer=1, n_head=2,
            bos_token_id=None, eos_token_id=attack_lab.tokenizer.eos_token_id,
        )  # fmt: skip
        made = GPT2LMHeadModel(shape).train()
    made.transformer.ln_f.eval()
    made.transformer.wpe.weight.requires_grad_(False)
    made.transformer.ln_f.weight.grad = torch.ones(16)
    made.generation_config.repetition_penalty = 1.5
    made.generation_config.do_sample = True
    return made


def everything(model: Any) -> dict[str, Any]:
    """All that an attack may not change, as plain values."""
    parameters = dict(model.named_parameters())
    return {
        "weights": {name: value.tolist() for name, value in model.state_dict().items()},
        "modes": {name: module.training for name, module in model.named_modules()},
        "differentiated": {name: value.requires_grad for name, value in parameters.items()},
        "gradients": {name: value.grad.tolist() for name, value in parameters.items() if value.grad is not None},
        "identities": {name: id(value) for name, value in parameters.items()},
        "generation": model.generation_config.to_dict(),
        "config": model.config.to_dict(),
        "adapters": hasattr(model, "peft_config"),
        "torch": torch.get_rng_state().tolist(),
        "numpy": repr(np.random.get_state()),  # the caller may well use the global one
        "python": (rich.style.Style, random.getstate()),
    }


@pytest.mark.parametrize("name", [*CONFIGS, "relearn lora", "static smooth_llm", "quantise head"])
def test_an_attack_changes_nothing_and_says_the_same_again(attack_lab: AttackLab, model: Any, name: str) -> None:
    rows = attack_lab.forget[:4]
    calls: dict[str, tuple[Any, Any]] = {
        "relearn": (rows, RelearnConfig(steps=(0, 2), learning_rate=1e-2)),
        "relearn lora": (rows, RelearnConfig(steps=(0, 2), learning_rate=1e-2, method="lora", lora_rank=2)),
        "prefill": (rows, PrefillConfig(tokens=(0, 2), max_new_tokens=3)),
        "quantise": (rows, RoundingConfig(bits=(3,), max_new_tokens=3)),
        "quantise head": (rows, RoundingConfig(bits=(3,), max_new_tokens=3, head=True)),
        "paraphrase": (rows, ParaphraseConfig(max_new_tokens=3)),
        "static": (PROMPTS, PromptConfig(max_new_tokens=3)),
        "static smooth_llm": (PROMPTS, PromptConfig(max_new_tokens=3, defence="smooth_llm", copies=3)),
        "multi_turn": ([TALK], MultiTurnConfig(max_new_tokens=3)),
        "over_refusal": (XSTestPrompts(safe=PROMPTS, unsafe=PROMPTS), PromptConfig(max_new_tokens=3)),
        "gcg": (rows[:1], GCGConfig(steps=1, candidates=4, suffix=" ! !", filter_ids=False)),
        "soft_prompt": (rows, SoftPromptConfig(tokens=1, steps=2)),
    }
    module = import_module(f"hf_unlearn.attacks.{name.split()[0]}")
    shown = import_module("hf_unlearn.attacks.gcg_rows") if name == "gcg" else module
    before, tokenizer = everything(model), copy.deepcopy(attack_lab.tokenizer)
    data, config = calls[name]
    first = module.run(model, attack_lab.tokenizer, data, config)
    after = everything(model)
    for what, value in before.items():
        assert after[what] == value, what
    assert attack_lab.tokenizer.padding_side == tokenizer.padding_side
    torch.rand(1)  # other random numbers than before
    second = module.run(model, attack_lab.tokenizer, data, config)
    assert repr(shown.outcome(first).as_dict()) == repr(shown.outcome(second).as_dict())


@pytest.mark.parametrize("name", ["relearn", "prefill", "quantise", "soft_prompt"])
def test_an_adapter_stays_beside_its_model_and_counts_as_if_it_were_merged(attack_lab: AttackLab, name: str) -> None:
    rows = attack_lab.forget[:4]
    lora = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = get_peft_model(copy.deepcopy(attack_lab.knows), lora)
    config = {
        "relearn": RelearnConfig(steps=(0, 2)),
        "prefill": PrefillConfig(tokens=(0, 2), max_new_tokens=3),
        "quantise": RoundingConfig(bits=(3,), max_new_tokens=3),
        "soft_prompt": SoftPromptConfig(tokens=1, steps=2),
    }[name]
    module: Any = import_module(f"hf_unlearn.attacks.{name}")
    before = everything(model)
    found = module.outcome(module.run(model, attack_lab.tokenizer, rows, config))
    assert everything(model) == before
    merged = copy.deepcopy(model).merge_and_unload()
    again = module.outcome(module.run(merged, attack_lab.tokenizer, rows, config))
    values = [measure.value for measure in again.measures]
    assert [measure.value for measure in found.measures] == pytest.approx(values, rel=1e-3, abs=1e-6)
    plain = module.outcome(module.run(attack_lab.knows, attack_lab.tokenizer, rows, config))
    assert plain.measures[0].value != pytest.approx(values[0], rel=1e-2)
