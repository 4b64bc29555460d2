"""`hf-unlearn attack` a second time: what is reused, what must not be, and what a failure leaves."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from test_attack import options, workspace  # noqa: F401  # a fixture
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_unlearn.cli.attack_arguments import AttackArguments
from hf_unlearn.cli.attack_data import judge_settings, load_data
from hf_unlearn.cli.attack_store import AttackStore, model_identity
from hf_unlearn.cli.main import main
from hf_unlearn.reports.outcomes import AttackOutcome, Measure, Subject, read_attacks


def measured(attack: str, subject: Subject, value: float = 0.5) -> AttackOutcome:
    return AttackOutcome(attack=attack, measures=(Measure(name="m", subject=subject, value=value, n=1),))


def model_folder(place: Path) -> Path:
    place.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"):
        (place / name).write_text(name)
    return place


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"])
def test_a_model_that_was_written_again_in_place_is_another(tmp_path: Path, name: str) -> None:
    folder = model_folder(tmp_path / "m")
    before = model_identity(str(folder))
    assert model_identity(str(folder)) == before
    (folder / name).write_text("other, longer text")
    assert model_identity(str(folder)) != before


def test_what_is_written_beside_a_model_does_not_make_another_of_it(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "m")
    before = model_identity(str(folder))
    for name in ("attacks.json", "results.json", "evaluation.json", "trainer_state.json", "README.md"):
        (folder / name).write_text("{}")
    assert model_identity(str(folder)) == before


def test_a_model_under_an_adapter_counts_and_so_does_how_it_is_loaded(tmp_path: Path) -> None:
    base, adapter = model_folder(tmp_path / "base"), tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
    before = model_identity(str(adapter))
    assert model_identity(str(adapter), loading={"dtype": "bfloat16"}) != before
    (base / "model.safetensors").write_text("other, longer text")
    assert model_identity(str(adapter)) != before


def test_a_folder_is_one_model_under_all_its_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = model_folder(tmp_path / "m")
    monkeypatch.chdir(tmp_path)
    store = AttackStore(tmp_path / "attacks.json")
    store.put(measured("prefill", "unlearned"), "unlearned", model_identity("m"))
    for name in ("./m/", str(folder)):
        store.check_model("unlearned", model_identity(name))
        assert store.finished("prefill", "unlearned", {}, model_identity(name)), name
    model_folder(tmp_path / "n")
    with pytest.raises(ValueError, match="holds prefill on another unlearned model"):
        store.check_model("unlearned", model_identity("n"))


def test_findings_on_a_model_that_is_no_more_are_dropped_and_on_other_models_kept(tmp_path: Path) -> None:
    store = AttackStore(tmp_path / "attacks.json")
    old, new, control = ({"path": path, "files": files} for path, files in (("m", "1"), ("m", "2"), ("c", "1")))
    store.put(measured("prefill", "unlearned"), "unlearned", old)
    store.put(measured("prefill", "control"), "control", control)
    store.put(measured("quantise", "unlearned"), "unlearned", old)
    store.put(measured("relearn", "unlearned", 0.7), "unlearned", new)
    found = {outcome.attack: outcome for outcome in read_attacks(store.path)}
    assert set(found) == {"prefill", "relearn"}
    assert found["prefill"].subjects() == {"control"}
    assert store.finished("prefill", "control", {}, control)
    assert not store.finished("prefill", "unlearned", {}, old)
    # the same files in another type of weights: the same model
    store.put(measured("quantise", "unlearned"), "unlearned", {**new, "loading": {"dtype": "bfloat16"}})
    assert store.finished("relearn", "unlearned", {}, new)


def test_a_judge_named_as_a_model_keeps_its_failure_when_that_model_is_attacked_again(tmp_path: Path) -> None:
    store = AttackStore(tmp_path / "attacks.json")
    failed = dataclasses.replace(measured("static", "unlearned"), absent={"judge model control, unlearned": "why"})
    store.put(failed, "unlearned", {"path": "m", "files": "1"})
    for files in ("1", "2"):
        store.put(measured("static", "control"), "control", {"path": "c", "files": files})
    (found,) = read_attacks(store.path)
    assert found.absent == {"judge model control, unlearned": "why"}


def test_all_that_changes_what_a_judge_says_is_a_setting(tmp_path: Path) -> None:
    judge, template = model_folder(tmp_path / "judge"), tmp_path / "template.txt"
    template.write_text("{answer}?")
    given = AttackArguments(judge_model=str(judge), judge_template=str(template), perplexity_model=str(judge))
    seen = [judge_settings(given, "static")]
    assert judge_settings(given, "prefill") == {}
    assert set(judge_settings(given, "over_refusal")) == {"perplexity_model", "perplexity"}
    template.write_text("Is {answer} good?")
    seen.append(judge_settings(given, "static"))
    seen.append(judge_settings(dataclasses.replace(given, judge_yes="Sure"), "static"))
    (judge / "model.safetensors").write_text("other, longer text")
    seen.append(judge_settings(given, "static"))
    assert all(one != other for place, one in enumerate(seen) for other in seen[:place])


def test_the_same_folder_for_another_model_is_refused_before_one_is_loaded(
    workspace: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(options(workspace, tmp_path, "quantise")) == 0
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *a, **k: pytest.fail("a model was loaded"))
    assert main(options(workspace, tmp_path, "prefill", model_name_or_path=workspace / "control")) == 1
    assert "holds quantise on another unlearned model" in capsys.readouterr().err


def test_another_type_of_weights_or_tokenizer_is_run_again(
    workspace: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = tmp_path / "model"
    shutil.copytree(workspace / "model", model)
    for more, kept in (
        ({}, False),
        ({}, True),
        ({"dtype": "bfloat16"}, False),
        ({"tokenizer_name_or_path": model}, False),
    ):
        # its own folder as output: attacks.json there is no part of the model
        command = options(workspace, model, "quantise", model_name_or_path=model, **more)
        assert main(command) == 0
        assert ("quantise is finished" in capsys.readouterr().out) == kept, more


def test_a_model_that_cannot_be_loaded_and_a_template_that_raises_cost_only_themselves(
    workspace: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    broken, strict = tmp_path / "broken", tmp_path / "strict"
    shutil.copytree(workspace / "control", broken)
    (broken / "model.safetensors").write_bytes(b"no tensors")
    shutil.copytree(workspace / "model", strict)
    tokenizer = AutoTokenizer.from_pretrained(strict)
    tokenizer.chat_template = "{{ raise_exception('no system prompts') }}"
    tokenizer.save_pretrained(strict)
    out = tmp_path / "out"
    given = {"model_name_or_path": strict, "control_model": broken, "target_model": workspace / "model"}
    assert main(options(workspace, out, "prefill", "static", **given)) == 1
    errors = capsys.readouterr().err
    assert "the control model" in errors
    assert "no system prompts" in errors
    assert "Traceback" not in errors
    found = {outcome.attack: outcome for outcome in read_attacks(out / "attacks.json")}
    assert found["prefill"].subjects() == found["static"].subjects() == {"target"}
    assert "no system prompts" in found["static"].absent["unlearned"]


def test_no_table_and_no_file_are_named_where_no_model_could_be_loaded(
    workspace: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(workspace / "model", broken)
    (broken / "model.safetensors").write_bytes(b"no tensors")
    assert main(options(workspace, tmp_path / "out", "quantise", model_name_or_path=broken)) == 1
    captured = capsys.readouterr()
    assert "attacks.json" not in captured.out
    assert "could not be loaded" in captured.err


def test_rows_without_another_wording_are_attacked_otherwise_unless_paraphrase_is_asked_for(tmp_path: Path) -> None:
    rows = [json.dumps({"question": f"q{number}", "answer": "a"}) for number in range(8)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    given = AttackArguments(dataset=str(tmp_path / "rows.jsonl"))
    assert set(load_data(given, given.chosen())) == {"relearn", "prefill", "quantise"}
    for asked in (dataclasses.replace(given, attacks=["paraphrase"]), dataclasses.replace(given, paraphrase={})):
        with pytest.raises(ValueError, match="None of the 8 rows has another wording"):
            load_data(asked, asked.chosen())
    worded = dataclasses.replace(given, dataset=str(tmp_path / "worded.jsonl"))
    (tmp_path / "worded.jsonl").write_text(rows[0][:-1] + ', "paraphrased_question": "r"}')
    with pytest.raises(ValueError, match="1 rows and fraction"):
        load_data(worded, worded.chosen())
    assert set(load_data(worded, ["paraphrase"])) == {"paraphrase"}


def test_the_limit_is_of_each_half_of_xstest_and_of_all_rows_but_the_benign(tmp_path: Path) -> None:
    lines = [f"{number},Prompt {number}?,x,{'safe' if number < 6 else 'unsafe'}" for number in range(10)]
    (tmp_path / "x.csv").write_text("\n".join(["id,prompt,type,label", *lines]))
    rows = [json.dumps({"question": f"q{number}", "answer": "a"}) for number in range(8)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    data: Any = {name: str(tmp_path / "rows.jsonl") for name in ("dataset", "benign_dataset")}
    given = AttackArguments(
        attacks=["relearn", "gcg", "over_refusal"], xstest=str(tmp_path / "x.csv"), limit=4, **data
    )
    found = load_data(given, given.chosen())
    assert (len(found["over_refusal"].rows.safe), len(found["over_refusal"].rows.unsafe)) == (4, 4)
    assert (len(found["relearn"].rows), len(found["relearn"].options["benign"])) == (4, 8)
    assert len(found["gcg"].rows) == given.gcg_rows


@pytest.mark.parametrize("defence", ["none", "smooth_llm", "self_reminder"])
def test_a_defence_is_a_setting_of_static_and_over_refusal_alone(defence: str) -> None:
    given = AttackArguments(prompts="p", xstest="x", transcripts="t", defence=defence)
    configs = given.configurations()
    assert configs["static"].defence == configs["over_refusal"].defence == defence
    assert not hasattr(configs["multi_turn"], "defence")
    own = AttackArguments(prompts="p", xstest="x", defence=defence, static={"defence": "none"}).configurations()
    assert (own["static"].defence, own["over_refusal"].defence) == ("none", defence)
