"""The quickstart and the comparison of methods, end to end on a world of minutes shrunk to seconds."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from hf_unlearn.attacks import RelearnConfig
from hf_unlearn.cli.lab import print_table
from hf_unlearn.lab import bench, edit_quickstart, methods, quickstart
from hf_unlearn.lab.finished import BenchRow
from hf_unlearn.lab.methods import LabMethod, method_by_name
from hf_unlearn.lab.recipe import LabData, LabRecipe
from hf_unlearn.lab.world import make_world, world_data
from hf_unlearn.reports import read_results, results_table

TINY = LabRecipe(vocab_size=500, hidden_size=32, num_layers=1, num_heads=2, intermediate_size=64, epochs=2)
SHORT: dict[str, Any] = {
    "num_train_epochs": 2,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-3,
    "logging_steps": 1,
}


@pytest.fixture(scope="module", autouse=True)
def small(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_UNLEARN_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(quickstart, "QUICKSTART_RECIPE", TINY)
        patch.setattr(quickstart, "make_world", lambda seed: make_world(seed, num_authors=10, questions_per_author=4))
        method = LabMethod(name="primal_dual", label="PrimalDualTrainer", trainer="primal-dual", arguments=SHORT)
        patch.setattr(quickstart, "QUICKSTART_METHOD", method)
        yield


def test_quickstart_writes_everything_it_promises(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    results = quickstart.run_quickstart(folder, seed=1)
    written = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    for name in ("target", "unlearned", "reference"):
        for score in ("forget_probability", "forget_rouge", "retain_probability", "retain_rouge"):
            assert 0 <= written[name][score] <= 1
    assert 0 <= written["forget_quality"] <= 1
    (constraint,) = written["constraints"]
    assert set(constraint) >= {"name", "eps", "loss", "multiplier", "feasible"}
    assert constraint["feasible"] == (constraint["loss"] <= constraint["eps"])
    assert written["seconds"]["total"] > 0
    assert "transformers" in written["versions"]
    assert {entry["part"] for entry in written["generations"]} == {"forget", "retain"}
    for name in ("forget_loss.png", "retain_loss.png", "dual.png"):
        assert (folder / "plots" / name).stat().st_size > 1000
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "<svg" in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    card = (folder / "model" / "README.md").read_text(encoding="utf-8")
    assert "PrimalDualTrainer" in card
    assert "Forget" in card
    assert str(tmp_path) not in card
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    assert len(AutoTokenizer.from_pretrained(folder / "model")) == model.config.vocab_size
    assert results.forget_quality == pytest.approx(written["forget_quality"])


def test_prism_takes_the_same_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The quickstart's own arguments of PRISM, with fewer epochs; two networks' first layers tell little apart."""
    known = quickstart.QUICKSTART_METHODS["prism"]
    fewer = {"num_train_epochs": 3, "eval_steps": 2, "save_steps": 2, "logging_steps": 1, "probe_min_accuracy": 0.05}
    short = replace(known, arguments={**known.arguments, **fewer})
    monkeypatch.setitem(quickstart.QUICKSTART_METHODS, "prism", short)
    results = quickstart.run_quickstart(tmp_path / "out", method="prism", seed=1)
    assert results.method == "PrismTrainer"
    logged = {key for entry in results.history for key in entry}
    assert {"loss/probe", "probe_confidence", "sharpness", "conflict_cosine", "dual/retain"} <= logged
    (constraint,) = results.constraints
    assert constraint.feasible == (constraint.loss <= constraint.eps)
    for name in ("forget_loss.png", "retain_loss.png", "dual.png"):
        assert (tmp_path / "out" / "plots" / name).stat().st_size > 1000
    assert "PrismTrainer" in (tmp_path / "out" / "model" / "README.md").read_text(encoding="utf-8")


def test_an_edit_writes_the_same_objects_and_draws_no_empty_curves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(quickstart, "make_world", lambda seed: make_world(seed, num_authors=10))
    monkeypatch.setattr(quickstart, "QUICKSTART_RECIPE", replace(TINY, hidden_size=64, epochs=8, learning_rate=5e-3))
    monkeypatch.setattr(edit_quickstart, "PROBABILITY", 1e-6)  # the tiny model's head bounds how low a name can get
    folder = tmp_path / "out"
    results = quickstart.run_quickstart(folder, method="edit", seed=1)
    written = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    for name in ("target", "unlearned", "reference"):
        for score in ("forget_probability", "retain_probability", "words_largest_probability"):
            assert 0 <= written[name][score] <= 1
        assert 0 <= written[name]["words_reworded_median_probability"] <= 1
    (constraint,) = written["constraints"]
    assert set(constraint) == {"name", "eps", "loss", "multiplier", "feasible"}
    assert (constraint["name"], constraint["eps"], constraint["multiplier"]) == ("reach", 1e-6, None)
    assert constraint["feasible"] == (constraint["loss"] <= constraint["eps"] * 1.001)
    assert results.unlearned.extra["words_largest_probability"] < results.target.extra["words_largest_probability"]
    assert written["forget_quality"] is None
    assert "forget_quality" in written["absent"]
    assert read_results(folder / "results.json") == results
    assert [path.name for path in (folder / "plots").iterdir()] == ["words.png"]
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert page.count("<figure") == page.count("<svg") == 1
    assert "Nothing was recorded" not in page
    assert "Multiplier" not in page
    assert "Questions that ask for the words" in page
    Console(width=140).print(results_table(results))
    shown = capsys.readouterr().out
    assert "Likeliest word, questions reworded" in shown
    assert "Edited" in shown
    assert "Most left to a word" in shown
    assert not constraint["feasible"] or "a word is left at most" in page
    assert "Forget quality" not in shown
    card = (folder / "model" / "README.md").read_text(encoding="utf-8")
    assert "n tokens of a word, up to 2, have at most the n-th root of that each" in card
    assert str(tmp_path) not in card
    for name in edit_quickstart.asked_data(make_world(1, num_authors=10))[1]:
        assert name not in card
        assert name not in (folder / "plan" / "edit_plan.json").read_text(encoding="utf-8")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    data, names, _ = edit_quickstart.asked_data(make_world(1, num_authors=10))
    rows = [{"question": row["question"], "answer": row["answer"]} for row in data.forget]
    again = edit_quickstart.word_probabilities(model, tokenizer, rows, names)
    assert again == pytest.approx(written["words"]["probabilities"]["own"]["unlearned"], rel=1e-3)


def test_an_edit_asks_only_for_names_that_the_question_does_not_say() -> None:
    world = make_world(0)
    data, names, others = edit_quickstart.asked_data(world)
    assert len(data.forget) + len(others) == len(world.forget)
    assert data.forget["question"] == data.forget_eval["question"]
    for row in data.forget:
        assert any(name in row["answer"] and name not in row["question"] for name in names)


def test_quickstart_is_the_same_twice(tmp_path: Path) -> None:
    first = quickstart.run_quickstart(tmp_path / "a", seed=1)
    second = quickstart.run_quickstart(tmp_path / "b", seed=1)
    assert first.unlearned == second.unlearned
    assert first.constraints == second.constraints


def test_an_unwritable_output_is_found_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(quickstart, "train_target", lambda *a, **k: pytest.fail("trained before checking the folder"))
    with pytest.raises(OSError, match="file"):
        quickstart.run_quickstart(tmp_path / "file" / "out")


def test_bench_compares_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = world_data(make_world(0, num_authors=10, questions_per_author=4))
    compared = [
        LabMethod(
            name=name, label=name, trainer=method_by_name(name).trainer, arguments={**extra, **SHORT}, use_retain=r
        )
        for name, extra, r in (
            ("grad_ascent", {"forget_loss": "grad_ascent"}, False),
            ("npo", {"forget_loss": "npo"}, True),
            ("primal_dual", {}, True),
        )
    ]
    lines: list[str] = []
    options: dict[str, Any] = {"recipe": TINY, "max_new_tokens": 8, "report": lines.append}
    options["relearning"] = [RelearnConfig(fraction=share, steps=(0, 2), batch_size=4) for share in (0.5, 0.25)]
    rows = bench.run_bench(data, compared, tmp_path, **options)
    assert [row.name for row in rows] == ["target", "reference", "grad_ascent", "npo", "primal_dual"]
    assert rows[1].values["forget_quality"] == pytest.approx(1.0)
    assert rows[1].values["mia_auc"] == pytest.approx(0.5)
    assert len(rows[4].constraints) == 1
    table = (tmp_path / "table.md").read_text(encoding="utf-8").splitlines()
    assert len(table) == 2 + len(rows)
    assert len({line.count("|") for line in table}) == 1
    shown = ["25% shown, 0 steps", "25% shown, 2 steps", "50% shown, 0 steps", "50% shown, 2 steps"]
    assert [cell.strip() for cell in table[0].split("|")][-5:-1] == shown
    assert [key for key in rows[0].values if key.startswith("recovery")] == [], "the target has nothing to recover"
    for row in rows[1:]:
        assert 0 < row.values["recovery_25_2"] < 1
        assert row.values["recovery_25_2"] != row.values["recovery_25_0"]
    monkeypatch.setattr(bench, "run_method", lambda *a, **k: pytest.fail("a complete run was repeated"))
    again = bench.run_bench(data, compared, tmp_path, **options)
    assert [row.values for row in again[2:]] == [row.values for row in rows[2:]]
    fewer = bench.run_bench(data, compared[1:2], tmp_path, **options)
    assert [row.name for row in fewer] == ["target", "reference", "npo", "grad_ascent", "primal_dual"], "none is lost"
    for train in ("train_target", "train_retain_only"):
        monkeypatch.setattr(bench, train, lambda *a, **k: pytest.fail("trained before looking at what is there"))
    other = [replace(compared[0], arguments={**compared[0].arguments, "learning_rate": 0.5})]
    with pytest.raises(
        ValueError, match=r"grad_ascent-seed0\.json is a run with other settings \(arguments\.learning"
    ):
        bench.run_bench(data, other, tmp_path, **options)
    with pytest.raises(ValueError, match=r"other settings \(relearning\).*Give another output_dir"):
        bench.run_bench(data, compared, tmp_path, **{**options, "relearning": []})
    with pytest.raises(ValueError, match=r"other settings \(max_new_tokens\)"):
        bench.run_bench(data, compared, tmp_path, **{**options, "max_new_tokens": 9})
    with pytest.raises(ValueError, match=r"other settings \(reference, target\)"):
        bench.run_bench(data, compared, tmp_path, **{**options, "recipe": replace(TINY, seed=5)})


def test_the_printed_table_fits_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    values = {key: 0.123456 for key, _ in bench.COLUMNS}
    rows = [
        BenchRow(name="target", label="target (LlamaForCausalLM, 2.6 M parameters)", seed=None, values=values),
        BenchRow(name="primal_dual", label="primal-dual, default", seed=3, values={**values, "score": 1e-7}),
    ]
    shown = {}
    for width in (80, 250):
        print_table(Console(width=width), rows)
        shown[width] = capsys.readouterr().out
        assert max(map(len, shown[width].splitlines())) <= width
        assert "\u2026" not in shown[width], "no number is cut short"
        assert "1.0e-07" in shown[width]
    assert "peak MiB" in shown[250]
    assert "peak MiB" not in shown[80]


def test_general_knowledge_is_part_of_the_retain_set_where_a_method_asks_for_it() -> None:
    data = world_data(make_world(0, num_authors=10, questions_per_author=4))
    general = {"capitals": data.retain.select(range(3)), "rivers": data.retain.select(range(2))}
    data = LabData(**{**data.__dict__, "general": general})
    method = LabMethod(name="x", label="x", trainer="unlearning")
    assert methods._retain_rows(method, data) is data.retain
    with_general = methods._retain_rows(replace(method, with_general=True), data)
    wanted = [data.retain[i]["question"] for i in [*range(len(data.retain)), 0, 1, 2, 0, 1]]
    assert [row["question"] for row in with_general] == wanted
    assert methods._retain_rows(replace(method, use_retain=False), data) is None


def test_methods_are_found_by_name() -> None:
    assert method_by_name("npo").arguments["forget_loss"] == "npo"
    with pytest.raises(ValueError, match="expected one of: grad_ascent"):
        method_by_name("magic")
