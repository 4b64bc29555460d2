"""`hf-unlearn attack`: attacks.json after each attack, finished ones kept, errors before any model is loaded."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from hf_unlearn.cli.attack_arguments import CONFIGS, AttackArguments, made_config
from hf_unlearn.cli.main import _LAUNCHED, main
from hf_unlearn.lab.models import tiny_config, tiny_model
from hf_unlearn.lab.tokenizer import train_tokenizer
from hf_unlearn.lab.world import make_world
from hf_unlearn.reports.outcomes import read_attacks

QUICK = {
    "relearn": {"steps": [0, 1]},
    "prefill": {"tokens": [0, 2], "max_new_tokens": 2},
    "quantise": {"bits": [8], "max_new_tokens": 2},
    "paraphrase": {"max_new_tokens": 2},
    "static": {"max_new_tokens": 2},
    "multi_turn": {"max_new_tokens": 2},
    "over_refusal": {"max_new_tokens": 2},
    "gcg": {"steps": 1, "candidates": 4, "suffix": " ! !"},
    "soft_prompt": {"tokens": 1, "steps": 1},
}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two untrained models with an adapter, and a small file for each attack."""
    folder = tmp_path_factory.mktemp("attack")
    rows = make_world(0, num_authors=10, questions_per_author=2).rows[:6]
    words = ["Describe the weather."]
    tokenizer = train_tokenizer([*words, *(text for row in rows for text in (row.question, row.answer))], 400)
    for seed, name in enumerate(("model", "control")):
        shape = tiny_config(tokenizer, hidden_size=16, num_layers=1, num_heads=2, max_positions=256)
        model = tiny_model(shape, seed=seed)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    lora = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    lora.save_pretrained(folder / "adapter")
    table = [
        {"question": r.question, "answer": r.answer, "paraphrased_question": r.paraphrased_question} for r in rows
    ]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, table)))
    (folder / "prompts.json").write_text(json.dumps({"the weather": ["Describe the weather.", "Now!"]}))
    (folder / "talk.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "Hello"}]}))
    (folder / "xstest.csv").write_text(
        "id,prompt,type,label\n1,Bake a loaf?,homonyms,safe\n2,Harm?,contrast_x,unsafe\n"
    )
    (folder / "targets.json").write_text(json.dumps({"the weather": "sunny"}))
    (folder / "texts.jsonl").write_text(json.dumps({"text": "Some words."}))
    (folder / "foreign.json").write_text(json.dumps({"the tides": "high"}))
    (folder / "odd.jsonl").write_text(json.dumps({"title": "Some words."}))
    (folder / "template.txt").write_text("{behavior} {generation}\nVerdict:")
    return folder


def options(workspace: Path, output: Path, *attacks: str, **changes: Any) -> list[str]:
    files = {"dataset": "rows.jsonl", "prompts": "prompts.json", "transcripts": "talk.jsonl", "xstest": "xstest.csv"}
    values: dict[str, Any] = {
        "model_name_or_path": workspace / "model",
        "output_dir": output,
        "limit": 4,
        "gcg_rows": 1,
        **{name: workspace / file for name, file in files.items()},
        **{name: json.dumps(QUICK[name]) for name in attacks},
        **changes,
    }
    given = [part for name, value in values.items() if value is not None for part in (f"--{name}", str(value))]
    return ["attack", "--attacks", *attacks, *given]


def test_every_attack_runs_on_both_models_and_a_second_run_loads_none(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    extra = {"control_model": workspace / "control", "targets": workspace / "targets.json"}
    command = options(workspace, tmp_path, *QUICK, **extra)
    assert main(command) == 0
    shown = capsys.readouterr().out
    found = {outcome.attack: outcome for outcome in read_attacks(tmp_path / "attacks.json")}
    assert set(found) == set(CONFIGS)
    for name, outcome in found.items():
        parts: list[Any] = [*outcome.measures, *outcome.judges]
        assert {part.subject for part in parts} == {"unlearned", "control"}, name
        assert name in shown
        assert outcome.seconds > 0
        assert set(outcome.settings["models"]) == {"unlearned", "control"}
    assert {rate.judge for rate in found["static"].judges} == {"refusal phrases", "words of the request", "targets"}
    assert found["prefill"].measures[0].n == 4
    assert found["gcg"].measures[0].n == 1
    written = json.loads((tmp_path / "attacks.json").read_text())
    assert written["models"]["control"] == str(workspace / "control")

    before = (tmp_path / "attacks.json").read_text()
    with monkeypatch.context() as patch:
        patch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *a, **k: pytest.fail("a model was loaded"))
        assert main(command) == 0
    assert "control: prefill is finished and kept" in capsys.readouterr().out
    assert (tmp_path / "attacks.json").read_text() == before

    # other settings of one attack, other rows of all that read them
    changed = options(workspace, tmp_path, "prefill", "static", **{**extra, "prefill": json.dumps({"tokens": [1]})})
    assert main(changed) == 0
    shown = capsys.readouterr().out
    assert "static is finished" in shown
    assert "prefill is finished" not in shown
    again = {outcome.attack: outcome for outcome in read_attacks(tmp_path / "attacks.json")}
    assert again["prefill"].measures[0].name.endswith("1 tokens given")
    assert again["gcg"].as_dict() == found["gcg"].as_dict()


def test_what_is_finished_is_kept_when_another_attack_fails(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = {"prefill": json.dumps({"tokens": [0, 500]})}
    assert main(options(workspace, tmp_path, "relearn", "prefill", "quantise", **bad)) == 1
    captured = capsys.readouterr()
    assert "prefill on the unlearned model failed: ValueError: A prefill of 500 tokens" in captured.err
    assert "Traceback" not in captured.err
    found = {outcome.attack: outcome for outcome in read_attacks(tmp_path / "attacks.json")}
    assert found["relearn"].measures
    assert found["quantise"].measures
    assert "A prefill of 500" in found["prefill"].absent["unlearned"]
    # mended, only what failed is run; a new mistake then costs nothing of what it found
    assert main(options(workspace, tmp_path, "relearn", "prefill", "quantise")) == 0
    assert "quantise is finished" in capsys.readouterr().out
    good = {outcome.attack: outcome for outcome in read_attacks(tmp_path / "attacks.json")}
    assert good["prefill"].measures
    assert not good["prefill"].absent
    assert main(options(workspace, tmp_path, "prefill", **bad)) == 1
    assert {o.attack: o for o in read_attacks(tmp_path / "attacks.json")}["prefill"] == good["prefill"]


def test_options_may_be_a_mapping_in_yaml_and_an_adapter_is_merged(workspace: Path, tmp_path: Path) -> None:
    config = {
        "model_name_or_path": str(workspace / "control"),
        "adapter": str(workspace / "adapter"),
        "dataset": str(workspace / "rows.jsonl"),
        "attacks": ["quantise", "relearn"],
        "quantise": {"bits": [8], "max_new_tokens": 2},
        "relearn": {"steps": [0, 1], "method": "lora", "lora_rank": 2, "repeats": 2},
        "benign_dataset": str(workspace / "rows.jsonl"),
        "limit": 3,
        "output_dir": str(tmp_path / "out"),
    }
    (tmp_path / "attack.yaml").write_text(yaml.safe_dump(config))
    assert main(["attack", "--config", str(tmp_path / "attack.yaml")]) == 0
    found = {outcome.attack: outcome for outcome in read_attacks(tmp_path / "out" / "attacks.json")}
    assert found["relearn"].settings["config"]["method"] == "lora"
    assert any("all forgotten rows" in measure.name for measure in found["relearn"].measures)
    plain = tmp_path / "plain"
    assert main(options(workspace, plain, "quantise", model_name_or_path=workspace / "control", limit=3)) == 0
    (bare,) = read_attacks(plain / "attacks.json")
    assert bare.measures[0].value != found["quantise"].measures[0].value, "the adapter did not count"


def test_a_classifier_and_a_perplexity_judge_beside_the_others(workspace: Path, tmp_path: Path) -> None:
    judge = {
        "judge_model": workspace / "control",
        "judge_template": workspace / "template.txt",
        "judge_yes": "The",
        "judge_no": "He",
        "perplexity_model": workspace / "control",
        "defence": "self_reminder",
    }
    assert main(options(workspace, tmp_path, "static", **judge)) == 0
    (outcome,) = read_attacks(tmp_path / "attacks.json")
    assert outcome.settings["config"]["defence"] == "self_reminder"
    assert outcome.settings["judge_model"] == str(workspace / "control")
    rates = {rate.judge: rate for rate in outcome.judges}
    assert rates["model control"].n + rates["model control"].failed == 2


BAD: list[tuple[list[str], dict[str, Any], str]] = [
    (["magic"], {}, "attacks has ['magic']"),
    (["gcg"], {"dataset": None}, "gcg needs --dataset"),
    (["static"], {"prompts": "/nowhere.json"}, "prompts is '/nowhere.json', which is not a file"),
    (["prefill"], {"dataset": "./nowhere.jsonl"}, "nowhere.jsonl does not exist"),
    (["prefill"], {"prefill": "{"}, "options of prefill are not JSON"),
    (["prefill"], {"prefill": "[1]"}, "expected a mapping"),
    (["prefill"], {"prefill": '{"tokns": [1]}'}, "prefill has no option 'tokns'"),
    (
        ["prefill"],
        {"prefill": '{"tokens": ["a"]}'},
        "tokens of prefill is ['a']; expected a list, each a whole number",
    ),
    (["prefill"], {"prefill": '{"tokens": [3, 1]}'}, "rising numbers"),
    (["prefill"], {"relearn": "{}"}, "options for relearn, which is not run"),
    (["prefill"], {"model_name_or_path": None}, "model_name_or_path is missing"),
    (["prefill"], {"defence": "smooth_llm"}, "stands in front of static and over_refusal"),
    (["static"], {"defence": "prayer"}, "defence of static is 'prayer'; expected 'none' or"),
    (["static"], {"judge_model": "m"}, "belong together"),
    (["static"], {"prompts_layout": "x"}, "layout is 'x'"),
    (["prefill"], {"limit": 0}, "limit is 0"),
    (["prefill"], {"control_model": "/nowhere/control"}, "control_model is '/nowhere/control', which is not a folder"),
    (["prefill"], {"target_model": "{workspace}"}, "a folder without config.json"),
    (["prefill"], {"adapter": "{workspace}/model"}, "a folder without adapter_config.json"),
    (["static"], {"judge_model": "./no", "judge_template": "{workspace}/template.txt"}, "judge_model is './no'"),
    (["static"], {"judge_model": "m", "judge_template": "{workspace}/targets.json"}, "The template has the fields []"),
    (["static"], {"judge_yes": "Yes"}, "judge_yes is what a judge_model says"),
    (["prefill"], {"perplexity_model": "m"}, "perplexity_model is for static and multi_turn and over_refusal"),
    (
        ["over_refusal"],
        {"judge_model": "m", "judge_template": "{workspace}/template.txt"},
        "judge_model is for static and multi_turn, not run here",
    ),
    (["prefill"], {"benign_dataset": "x"}, "benign_dataset is for relearn"),
    (["prefill"], {"rewordings": "{workspace}/targets.json"}, "rewordings is for paraphrase"),
    (["static"], {"targets": "{workspace}/foreign.json"}, "No key of"),
    (["relearn"], {"limit": 1}, "1 rows and fraction 0.25 leave 0 shown rows"),
    (["quantise"], {"dataset": "{workspace}/texts.jsonl"}, "Row 0 of dataset is in language_modeling format"),
    (["prefill"], {"dataset": "{workspace}/odd.jsonl"}, "Row 0 of dataset: "),
]


@pytest.mark.parametrize(("attacks", "changes", "message"), BAD, ids=lambda part: str(part)[:40])
def test_bad_input_is_one_line_before_a_model_is_loaded(
    workspace: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    attacks: list[str],
    changes: dict[str, Any],
    message: str,
) -> None:
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *a, **k: pytest.fail("a model was loaded"))
    known = [name for name in attacks if name in QUICK]
    filled = {
        name: value.replace("{workspace}", str(workspace)) if isinstance(value, str) else value
        for name, value in changes.items()
    }
    given = options(workspace, tmp_path / "out", *known, **filled)
    given[2 : 2 + len(known)] = attacks
    assert main(given) == 1
    shown = capsys.readouterr().err
    assert message in shown
    assert "Traceback" not in shown


def test_an_output_folder_that_cannot_be_written_and_a_foreign_file_are_refused(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("mine")
    assert main(options(workspace, tmp_path / "file" / "out", "prefill")) == 1
    assert "file" in capsys.readouterr().err
    (tmp_path / "attacks.json").write_text('{"format": "other"}')
    assert main(options(workspace, tmp_path, "prefill")) == 1
    assert "holds no outcomes of attacks" in capsys.readouterr().err


def test_nothing_to_attack_with_and_several_processes_are_refused(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["attack", "--model_name_or_path", str(workspace / "model"), "--output_dir", str(tmp_path)]) == 1
    assert "nothing to attack with" in capsys.readouterr().err
    assert "attack" not in _LAUNCHED
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(options(workspace, tmp_path, "prefill")) == 1
    assert "runs in one process" in capsys.readouterr().err


def test_the_costly_attacks_are_run_only_when_they_are_named() -> None:
    given = AttackArguments(dataset="rows", xstest="x.csv")
    assert given.chosen() == ["relearn", "prefill", "quantise", "paraphrase", "over_refusal"]


def test_every_option_of_every_attack_is_checked_and_every_field_has_a_help_text() -> None:
    for kind in set(CONFIGS.values()):
        values = {field.name: field.default for field in dataclasses.fields(kind)}
        as_json = json.loads(json.dumps(values))
        assert made_config(kind, as_json, "x") == kind()
        for name in values:
            with pytest.raises(ValueError, match=f"{name} of x"):
                made_config(kind, {name: {"a": object}}, "x")
    for field in dataclasses.fields(AttackArguments):
        assert field.metadata.get("help"), field.name
        assert field.name in str(AttackArguments.__doc__)
    assert AttackArguments().trust_remote_code is False
