"""`hf-unlearn eval`: every benchmark from files to files, adapters, references, resuming, and errors before any model."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import ModelConfig, TrlParser

from hf_unlearn.cli.eval_arguments import EvalArguments
from hf_unlearn.cli.main import main
from hf_unlearn.data import load_tofu, pad_rows
from hf_unlearn.editing.edit_rows import edit_rows
from hf_unlearn.evaluation import session
from hf_unlearn.evaluation.record import Evaluation
from hf_unlearn.lab.models import tiny_config, tiny_model
from hf_unlearn.lab.tokenizer import train_tokenizer
from hf_unlearn.lab.world import make_world, world_data
from hf_unlearn.metrics.runner import evaluate_tofu
from hf_unlearn.reports.schema import read_results

TOFU_COLUMNS = ("question", "answer", "paraphrased_question", "paraphrased_answer", "perturbed_answer")
TOKENS = 12


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, an adapter on it, a reference, and a small file of every benchmark."""
    folder = tmp_path_factory.mktemp("eval")
    data = world_data(make_world(0, num_authors=10, questions_per_author=4))
    forget, retain = [
        [{name: row[name] for name in TOFU_COLUMNS} for row in part][:6]
        for part in (data.forget_eval, data.retain_eval)
    ]
    others = [{name: row[name] for name in ("question", "answer")} for row in data.retain_eval][6:12]
    tokenizer = train_tokenizer(data.texts(), 600)
    config = tiny_config(tokenizer, hidden_size=32, num_layers=2, num_heads=2)
    for name, rows in (("model", [*forget, *retain]), ("reference", retain)):
        model = tiny_model(config)
        learn(
            model,
            edit_rows(
                [{key: row[key] for key in ("question", "answer")} for row in rows],
                tokenizer,
                name=name,
                max_length=96,
            ),
        )
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder / "model"), LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    )
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(0))
    adapted.save_pretrained(folder / "adapter")
    files: dict[str, Any] = {
        "tofu/forget10_perturbed.json": forget,
        "tofu/retain_perturbed.json": retain,
        "tofu/world_facts_perturbed.json": [
            {**row, "perturbed_answer": row["perturbed_answer"][:3]} for row in retain[:3]
        ],
        "own.jsonl": [
            *({**row, "index": at} for at, row in enumerate(forget)),
            *({**row, "index": at, "part": "retain"} for at, row in enumerate(retain[:3])),
        ],
        "holdout.jsonl": others,
        "muse/verbmem/forget.json": [{"prompt": row["question"], "gt": row["answer"]} for row in forget],
        "muse/privleak/forget.json": [{"text": row["answer"]} for row in forget],
        "muse/privleak/holdout.json": [{"text": row["answer"]} for row in others],
        "choices.json": [
            {
                "question": row["question"],
                "choices": row["perturbed_answer"][:4],
                "answer": at % 4,
                "subject": "ab"[at % 2],
            }
            for at, row in enumerate(retain)
        ],
    }
    for name, rows in files.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return folder


def learn(model: Any, rows: list[dict[str, list[int]]]) -> None:
    batch = pad_rows(rows, pad_token_id=0)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(40):
        loss = model(**{key: batch[key] for key in ("input_ids", "attention_mask", "labels")}).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def options(workspace: Path, output: Path, **changes: Any) -> list[str]:
    values: dict[str, Any] = {
        "benchmark": "tofu",
        "data": workspace / "tofu",
        "model_name_or_path": workspace / "model",
        "output_dir": output,
        "max_new_tokens": TOKENS,
        **changes,
    }
    return ["eval", *(part for key, value in values.items() if value is not None for part in (f"--{key}", str(value)))]


@pytest.fixture(scope="module")
def reference(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The evaluation of the retain-only model."""
    folder = tmp_path_factory.mktemp("out") / "reference"
    changes = {"model_name_or_path": workspace / "reference", "holdout_dataset": workspace / "holdout.jsonl"}
    assert main(options(workspace, folder, **changes)) == 0
    return folder


@pytest.fixture(scope="module")
def target(workspace: Path, reference: Path) -> Path:
    """That of the full model against it, by a file of options."""
    folder = reference.parent / "target"
    recipe = reference.parent / "eval.yaml"
    recipe.write_text(
        yaml.safe_dump({"holdout_dataset": str(workspace / "holdout.jsonl"), "batch_size": 2, "limit": 1}),
        encoding="utf-8",
    )
    assert main([*options(workspace, folder, config=recipe, reference=reference), "--limit", "100"]) == 0
    return folder


def test_tofu_from_a_file_of_options_has_the_plain_functions_numbers(workspace: Path, target: Path) -> None:
    found = Evaluation.load(target)
    model = AutoModelForCausalLM.from_pretrained(workspace / "model")
    tokenizer = AutoTokenizer.from_pretrained(workspace / "model")
    parts = {
        name: load_tofu(f"{name}_perturbed", workspace / "tofu") for name in ("forget10", "retain", "world_facts")
    }
    plain = evaluate_tofu(
        model,
        tokenizer,
        forget=parts["forget10"],
        retain=parts["retain"],
        general={"world_facts": parts["world_facts"]},
        max_new_tokens=TOKENS,
    ).summary()
    assert plain["forget_probability"] > 0.3, "the model has learned nothing that could be measured"
    for name in set(plain) - {"model_utility"}:
        assert found.metrics[name].value == pytest.approx(plain[name], abs=1e-5), name
    assert found.settings["limits"] == 100, "the command line wins over the file"
    assert found.settings["batch_size"] == 2
    assert {"forget_quality", "mia_min_k_auc", "privleak"} <= set(found.metrics)
    assert "real_authors" in found.absent["real_authors_probability"]
    assert "real_authors" in found.absent["model_utility"]


def test_an_adapter_is_evaluated_beside_target_and_reference(
    workspace: Path,
    reference: Path,
    target: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    changes = {
        "model_name_or_path": workspace / "adapter",
        "reference": reference,
        "target": target,
        "holdout_dataset": workspace / "holdout.jsonl",
        "run": tmp_path / "run",
    }
    (tmp_path / "run").mkdir()
    state = {"log_history": [{"step": 1, "loss": 2.5}]}
    (tmp_path / "run" / "trainer_state.json").write_text(json.dumps(state), encoding="utf-8")
    assert main(options(workspace, tmp_path / "out", **changes)) == 0
    shown = capsys.readouterr().out
    found = Evaluation.load(tmp_path / "out")
    first = Evaluation.load(target)
    assert found.model_hash not in (first.model_hash, Evaluation.load(reference).model_hash, None)
    assert found.metrics["forget_probability"].value != first.metrics["forget_probability"].value
    for text in ("value ± SE", "target", "reference", "forget_paraphrased_question_probability", "Absent: "):
        assert text in shown
    metric = found.metrics["forget_probability"]
    assert f"{metric.value:.3f} ± {metric.standard_error:.3f}" in shown
    results = read_results(tmp_path / "out" / "results.json")
    assert results.reference is not None
    assert results.target.forget_probability == first.metrics["forget_probability"].value
    assert results.forget_quality == found.metrics["forget_quality"].value
    assert results.history == ({"step": 1, "loss": 2.5},)
    assert set(results.extra["evaluations"]) == {"target", "unlearned", "reference"}
    table = (tmp_path / "out" / "table.md").read_text(encoding="utf-8")
    assert "| Forget probability |" in table
    assert f"{metric.value:.3f} ± {metric.standard_error:.3f}" in table
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert page.lstrip().lower().startswith("<!doctype html>")
    assert page.rstrip().endswith("</html>")

    named = {**changes, "model_name_or_path": workspace / "model", "adapter": workspace / "adapter"}
    assert main(options(workspace, tmp_path / "named", **named)) == 0
    again = Evaluation.load(tmp_path / "named")
    assert again.metrics == found.metrics
    assert again.model_hash == found.model_hash
    assert again.model == f"{workspace / 'model'} + {workspace / 'adapter'}"


def test_a_second_call_generates_nothing_again_and_another_model_is_refused(
    workspace: Path, reference: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = Evaluation.load(reference)
    for name in ("greedy", "mean_nll", "score_tokens"):
        monkeypatch.setattr(session, name, lambda *a, **k: pytest.fail("something was computed again"))
    changes = {"model_name_or_path": workspace / "reference", "holdout_dataset": workspace / "holdout.jsonl"}
    assert main(options(workspace, reference, **changes)) == 0
    assert Evaluation.load(reference).metrics == before.metrics
    assert "for a first look" not in capsys.readouterr().out
    assert main(options(workspace, reference)) == 1
    assert re.search(r"holds an evaluation with model '.*reference', not '.*model'", capsys.readouterr().err)
    assert Evaluation.load(reference).model == before.model


def test_muse_and_its_reference(workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    muse = {"benchmark": "muse", "data": workspace / "muse"}
    assert main(options(workspace, tmp_path / "first", model_name_or_path=workspace / "reference", **muse)) == 0
    assert main(options(workspace, tmp_path / "second", reference=tmp_path / "first", **muse)) == 0
    found, other = (Evaluation.load(tmp_path / name) for name in ("second", "first"))
    assert found.metrics["privleak_reference_auc"] == other.metrics["privleak_auc"]
    assert found.settings["max_new_tokens"] == TOKENS
    assert (found.settings["dataset"], found.settings["dtype"]) == (str(workspace / "muse"), "float32")
    assert "no knowmem/forget_qa.json" in found.absent["knowmem_f"]
    assert "Absent: knowmem_f: there is no knowmem/forget_qa.json" in capsys.readouterr().out
    assert "| verbmem_f |" in (tmp_path / "second" / "table.md").read_text(encoding="utf-8")
    assert not (tmp_path / "second" / "report.html").exists()


def test_multiple_choice_and_own_rows(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    choices = {"benchmark": "mmlu", "data": workspace / "choices.json", "max_new_tokens": None}
    assert main(options(workspace, tmp_path / "choices", **choices)) == 0
    found = Evaluation.load(tmp_path / "choices")
    assert {"accuracy", "accuracy_a", "accuracy_b", "ties", "chance"} <= set(found.metrics)
    assert found.metrics["accuracy"].n == 6
    assert "mmlu: " in capsys.readouterr().out
    own = {"benchmark": "rows", "data": workspace / "own.jsonl"}
    assert main([*options(workspace, tmp_path / "own", **own), "--no_generate"]) == 0
    found = Evaluation.load(tmp_path / "own")
    assert found.metrics["forget_probability"].n == 4
    assert "forget_rouge" in found.absent
    assert read_results(tmp_path / "own" / "results.json").unlearned.forget_probability > 0
    for name in ("rows.jsonl", "scores.json", "table.md", "report.html"):
        assert (tmp_path / "own" / name).is_file()


BAD: list[tuple[dict[str, Any], list[str], str]] = [
    ({"benchmark": "nope"}, [], "invalid choice: 'nope'"),
    ({"benchmark": None}, [], "required: --benchmark"),
    ({"benchmark": "rows", "data": None}, [], "data is missing: a .jsonl file"),
    ({"benchmark": "muse", "data": None}, [], "data is missing: the folder of one corpus"),
    ({"data": "./nowhere"}, [], "nowhere is not a folder"),
    ({"forget_split": "forget05"}, [], "holds no forget05_perturbed.json"),
    ({"benchmark": "muse"}, [], "expected at least one of verbmem/forget.json"),
    ({"benchmark": "rows"}, [], "expected .jsonl"),
    ({"benchmark": "wmdp", "data": None, "max_new_tokens": None}, [], "needs lm-evaluation-harness"),
    ({"benchmark": "wmdp", "data": "x.json"}, [], "max_new_tokens has no meaning for benchmark 'wmdp'"),
    ({"benchmark": "muse", "target": "x"}, [], "target has no meaning for benchmark 'muse', only for tofu, rows"),
    ({"harness_tasks": "wmdp_bio"}, [], "harness_tasks has no meaning for benchmark 'tofu'"),
    ({"reference": "./nowhere"}, [], "reference is './nowhere', which is not there"),
    ({"run": "./nowhere"}, [], "run is './nowhere', which is not a folder"),
    ({"holdout_split": "test"}, [], "holdout_split is given without holdout_dataset"),
    ({"holdout_config": "x"}, [], "holdout_config is given without holdout_dataset"),
    (
        {"benchmark": "wmdp", "data": None, "max_new_tokens": None, "max_length": 99},
        [],
        "max_length has no meaning for lm-evaluation-harness",
    ),
    ({"limit": 0}, [], "limit is 0; expected at least 1"),
    ({"model_name_or_path": None}, [], "model_name_or_path is missing"),
    ({"model_name_or_path": "./nowhere"}, [], "model_name_or_path is './nowhere', which is not a folder"),
    ({"adapter": "./nowhere"}, [], "adapter is './nowhere', which is not a folder"),
    ({}, ["--use_peft"], "give an adapter that exists as --adapter"),
    ({}, ["--bechmark", "tofu"], "--bechmark"),
]


@pytest.mark.parametrize(("changes", "extra", "message"), BAD, ids=[f"{one[2][:40]}" for one in BAD])
def test_bad_input_is_one_line_before_a_model_is_loaded(
    workspace: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any],
    extra: list[str],
    message: str,
) -> None:
    refuse(monkeypatch)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    try:
        code = main([*options(workspace, tmp_path / "out", **changes), *extra])
    except SystemExit as stop:  # argparse's own way out
        code = int(stop.code or 0)
    shown = capsys.readouterr().err
    assert code != 0
    assert message in shown
    assert "Traceback" not in shown
    assert not (tmp_path / "out").exists(), "a request that is refused leaves no folder"


def refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *a, **k: pytest.fail("a model was loaded"))


def write(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return file


def test_bad_files_are_named_before_a_model_is_loaded(
    workspace: Path,
    reference: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    refuse(monkeypatch)
    rows = [json.loads(line) for line in (workspace / "own.jsonl").read_text("utf-8").splitlines()]
    own = {"benchmark": "rows", "data": tmp_path / "own.jsonl"}
    write(tmp_path / "own.jsonl", [*rows, rows[0]])
    cases: list[tuple[dict[str, Any], str]] = [(own, "`index` of line 8 of")]
    forget = [
        json.loads(line) for line in (workspace / "tofu/forget10_perturbed.json").read_text("utf-8").splitlines()
    ]
    for name, changed in (("shorter", forget[:-1]), ("twice", [{**row, "index": 1} for row in forget])):
        write(tmp_path / name / "forget10_perturbed.json", changed)
        write(tmp_path / name / "retain_perturbed.json", forget)
    cases.append(({"data": tmp_path / "shorter", "reference": reference}, "scored on different forget rows"))
    cases.append(({"data": tmp_path / "twice"}, "Rows 0 and 1 both have index 1"))
    (tmp_path / "empty").mkdir()
    cases.append(({"data": tmp_path / "empty"}, "holds no forget10_perturbed.json. Files there: none"))
    cases.append(({"reference": tmp_path / "empty"}, "holds no scores.json"))
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "adapter_config.json").write_text("{}")
    (tmp_path / "pickled" / "adapter_model.bin").write_text("no")
    cases.append(({"adapter": tmp_path / "pickled"}, "no adapter_model.safetensors; expected a PEFT adapter in safet"))
    write(tmp_path / "known.jsonl", forget[:2])
    cases.append(({"holdout_dataset": tmp_path / "known.jsonl"}, "are rows of the forget part"))
    cases.append(({"run": tmp_path / "empty"}, "holds neither trainer_state.json nor"))
    cases.append(({"output_dir": tmp_path / "own.jsonl" / "out"}, "own.jsonl/out' cannot be made"))
    for changes, message in cases:
        output = changes.pop("output_dir", tmp_path / "out")
        assert main(options(workspace, output, **changes)) == 1
        assert message in capsys.readouterr().err


def test_a_part_that_the_hub_does_not_give_is_an_error_and_not_an_absent_metric(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    refuse(monkeypatch)

    def from_hub(split: str, place: Any) -> Any:
        if split == "world_facts_perturbed":
            raise FileNotFoundError("the network is down")
        return load_tofu("retain_perturbed", workspace / "tofu")

    monkeypatch.setattr("hf_unlearn.data.tofu.load_tofu", from_hub)
    assert main(options(workspace, tmp_path / "out", data=None)) == 1
    assert "the network is down" in capsys.readouterr().err


def test_a_target_of_other_rows_than_the_reference_is_refused_before_anything_is_computed(
    workspace: Path,
    reference: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([*options(workspace, tmp_path / "first", limit=2), "--no_generate"]) == 0
    assert "At most 2 rows of each part: for a first look" in capsys.readouterr().out
    refuse(monkeypatch)
    assert main(options(workspace, tmp_path / "out", target=tmp_path / "first", reference=reference)) == 1
    assert "cannot be compared with reference" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("variable", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"])
def test_sharding_engines_are_refused(
    workspace: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    variable: str,
) -> None:
    refuse(monkeypatch)
    monkeypatch.setenv(variable, "true")
    assert main(options(workspace, tmp_path / "out")) == 1
    assert "expected --accelerate_config ddp or single" in capsys.readouterr().err


@pytest.mark.distributed
def test_two_processes_find_the_same_and_report_once(workspace: Path, tmp_path: Path) -> None:
    choices = {"benchmark": "wmdp", "data": workspace / "choices.json", "max_new_tokens": None}
    assert main(options(workspace, tmp_path / "one", **choices)) == 0
    launch = ["--accelerate_config", "ddp", "--num_processes", "2"]
    result = subprocess.run(
        [sys.executable, "-m", "hf_unlearn.cli.main", *options(workspace, tmp_path / "two", **choices), *launch],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("evaluation.json, choices.jsonl, table.md: ") == 1, "only the first process reports"
    one, two = Evaluation.load(tmp_path / "one"), Evaluation.load(tmp_path / "two")
    assert two.settings["processes"] == 2
    assert two.values() == pytest.approx(one.values(), abs=1e-5)


def test_every_field_has_a_help_text_and_an_entry_and_remote_code_is_off() -> None:
    assert EvalArguments.__doc__ is not None
    for field in dataclasses.fields(EvalArguments):
        assert field.metadata.get("help"), field.name
        assert re.search(rf"\b{field.name}\b", EvalArguments.__doc__), field.name
    assert EvalArguments(benchmark="tofu").trust_remote_code is False


def test_help_names_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["eval", "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    for field in dataclasses.fields(EvalArguments):
        assert f"--{field.name}" in shown
    assert "{tofu,muse,wmdp,mmlu,multiple_choice,rows}" in shown


def test_the_options_on_the_documentation_page_parse() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "cli.md").read_text(encoding="utf-8")
    text = page.split("\n## Evaluating\n")[1].split("```yaml\n")[1].split("```")[0]
    parser = TrlParser((EvalArguments, ModelConfig))
    given, model_args = parser.parse_dict(yaml.safe_load(text))
    assert (given.benchmark, given.forget_split, model_args.dtype) == ("tofu", "forget10", "bfloat16")
