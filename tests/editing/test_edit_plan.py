"""A plan on disk: the same again, without a word of what it was made for; and what cannot be loaded is refused."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from planned import close, make_plan
from safetensors.torch import load_file, save_file
from small_lab import SmallLab
from test_capture import build
from test_plan_edit import WORDS, plan_of

from hf_unlearn.editing import EditPlan
from hf_unlearn.editing.added import edits_in_force
from hf_unlearn.editing.plan import FACTORS_FILE, PLAN_FILE


def test_a_round_trip_is_exact(lab: SmallLab, tmp_path: Path) -> None:
    plan = plan_of(lab, layers=[1, 2], probability=1e-2)
    read = EditPlan.load(plan.save(tmp_path / "a" / "b"))
    for mine, other in zip(plan.edits, read.edits, strict=True):
        assert torch.equal(mine.lora_a, other.lora_a)
        assert torch.equal(mine.lora_b, other.lora_b)
    assert json.loads(json.dumps(read.as_dict())) == read.as_dict()
    assert EditPlan.load(read.save(tmp_path / "again")).as_dict() == read.as_dict()
    assert (tmp_path / "again" / FACTORS_FILE).read_bytes() == (tmp_path / "a" / "b" / FACTORS_FILE).read_bytes()
    assert sorted(path.name for path in (tmp_path / "again").iterdir()) == [FACTORS_FILE, PLAN_FILE]
    for key in ("method", "settings", "versions"):
        assert getattr(read, key) == getattr(plan, key)
    assert read.measures["reach"] == plan.measures["reach"]
    read.check_model(lab.model())


def test_no_file_holds_a_word_a_prompt_or_an_answer(lab: SmallLab, tmp_path: Path) -> None:
    listed = tmp_path / "my_secret_list.txt"
    listed.write_text("mother\n\n")
    attacks = [{"question": row["question"]} for row in lab.forget]
    from hf_unlearn.editing import EditConfig, plan_edit

    config = EditConfig(words=WORDS, words_file=str(listed), probability=1e-3, variants=1, generation_rounds=1)
    plan = plan_edit(
        lab.model(),
        lab.tokenizer,
        lab.forget,
        config,
        retain_dataset=lab.retain,
        attack_dataset=attacks,
        progress=False,
    )
    assert plan.settings["number_of_words"] == 4
    plan.save(tmp_path / "plan")
    plan.to_peft(tmp_path / "peft")
    secrets = {*WORDS, "mother", "secret"}
    secrets |= {word for row in lab.forget for text in row.values() for word in text.split() if len(word) > 6}
    files = [path for folder in ("plan", "peft") for path in (tmp_path / folder).rglob("*") if path.is_file()]
    assert len(files) >= 4
    for path in files:
        data = path.read_bytes().lower()
        assert not [word for word in secrets if word.lower().encode() in data], path


def test_numbers_that_json_does_not_have_survive_as_text(tmp_path: Path) -> None:
    plan = make_plan(build()).with_measures(a=math.inf, b=[-math.inf, {"c": math.nan}], d=(1, 2.5), e=True)
    read = EditPlan.load(plan.save(tmp_path))
    assert read.measures == {"a": "inf", "b": ["-inf", {"c": "nan"}], "d": [1, 2.5], "e": True}
    json.loads((tmp_path / PLAN_FILE).read_text(), parse_constant=lambda name: pytest.fail(name))


def broken(folder: Path, how: str) -> None:
    shown, factors = folder / PLAN_FILE, folder / FACTORS_FILE
    held = load_file(factors)
    name = next(key for key in held if key.endswith("2.mlp.down_proj.lora_a"))
    if how == "another format":
        shown.write_text(json.dumps({**json.loads(shown.read_text()), "format": 99}))
    elif how == "a list":
        shown.write_text("[]")
    elif how == "cut":
        shown.write_text(shown.read_text()[:100])
    elif how == "no json":
        shown.unlink()
    elif how == "no factors":
        factors.unlink()
    elif how == "cut factors":
        factors.write_bytes(factors.read_bytes()[:50])
    elif how == "a factor less":
        save_file({key: value for key, value in held.items() if key != name}, factors)
    elif how == "another rank":
        save_file({**held, name: held[name][:-1].contiguous()}, factors)
    elif how == "another width":
        save_file({**held, name: held[name][:, :-1].contiguous()}, factors)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("another format", r"has format 99; this version reads format 1"),
        ("a list", r"has format 'list'; this version reads"),
        ("cut", r"edit_plan.json is not readable as JSON"),
        ("no json", r"holds no edit plan \(edit_plan.json is missing\)"),
        ("no factors", r"holds no edit plan \(edit_factors.safetensors is missing\)"),
        ("cut factors", r"edit_factors.safetensors is not readable as safetensors"),
        ("a factor less", r"does not hold the factors of model.layers.2.mlp.down_proj"),
        ("another rank", r"does not hold the factors of model.layers.2.mlp.down_proj"),
        ("another width", r"does not hold the factors of model.layers.2.mlp.down_proj"),
    ],
)
def test_what_is_not_a_whole_plan_is_refused(tmp_path: Path, how: str, message: str) -> None:
    make_plan(build()).save(tmp_path)
    EditPlan.load(tmp_path)
    broken(tmp_path, how)
    with pytest.raises(ValueError, match=message):
        EditPlan.load(tmp_path)


def test_another_model_is_refused() -> None:
    plan = make_plan(build())
    plan.check_model(build())
    plan.check_model(build().bfloat16())  # the digest is of the weight as bfloat16 has it
    other = build()
    with torch.no_grad():
        other.model.layers[2].mlp.down_proj.weight[0, 0] += 1.0
    with pytest.raises(ValueError, match=r"made for another model: model.layers.2.mlp.down_proj has digest"):
        plan.check_model(other)
    with pytest.raises(ValueError, match=r"this model has gpt_neox.layers.0.mlp.dense_4h_to_h \(16, 24\) there"):
        plan.check_model(build("gpt_neox"))


def test_blocks_come_once_and_in_order() -> None:
    plan = make_plan(build())
    for edits in ((), plan.edits[::-1], (*plan.edits, plan.edits[-1])):
        with pytest.raises(ValueError, match="expected at least one, each once, ascending"):
            replace(plan, edits=tuple(edits))


def test_norm_and_delta_are_those_of_the_product() -> None:
    for edit in make_plan(build()).edits:
        product = sum((torch.outer(edit.lora_b[:, k], edit.lora_a[k]) for k in range(edit.rank)), torch.zeros(16, 24))
        close(edit.delta(), product, 1e-5)
        assert edit.norm() == pytest.approx(float(product.norm()), rel=1e-5)


def test_plain_peft_loads_a_plan_with_the_same_logits(lab: SmallLab, tmp_path: Path) -> None:
    model = lab.model()
    plan = plan_of(lab, model, layers=[1, 2], probability=1e-2)
    ids = torch.tensor([lab.rows()[0]["input_ids"]])
    with torch.no_grad():
        plain = model(input_ids=ids).logits
        with edits_in_force(model, plan.edits):
            wanted = model(input_ids=ids).logits
        loaded: Any = PeftModel.from_pretrained(lab.model(), plan.to_peft(tmp_path))
        found = loaded(input_ids=ids).logits
    assert (wanted - plain).abs().max() > 0.1
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=5e-6)
