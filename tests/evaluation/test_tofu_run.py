"""TOFU on a model: every number against the plain functions, and what is missing has a reason."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tofu_kit import ANSWER, build, parts, run, tokenizer

from hf_unlearn.attacks.degeneracy import degeneracy
from hf_unlearn.data import tokenize_example
from hf_unlearn.evaluation import session as session_module
from hf_unlearn.evaluation.record import Evaluation
from hf_unlearn.evaluation.tofu_files import TofuEvaluation, TofuReference
from hf_unlearn.evaluation.tofu_metrics import tofu_metrics
from hf_unlearn.metrics import evaluate_tofu, score_tokens
from hf_unlearn.metrics import functional as f
from hf_unlearn.metrics.scores import PartScores, TofuScores

ATTACKS = ("loss", "zlib", "min_k", "min_k_plus_plus")


# ------------------------------------------------------------------------------------------------- the numbers


@pytest.fixture(scope="module")
def twin() -> TofuScores:
    given = {name: rows for name, rows in parts().items() if name != "holdout"}
    return evaluate_tofu(build(), tokenizer(), **given, max_new_tokens=ANSWER, batch_size=1)


def test_scores_of_rows_are_those_of_the_plain_function(compared: TofuEvaluation, twin: TofuScores) -> None:
    assert list(compared.scores.parts) == list(twin.parts) == ["forget", "retain", "real_authors", "world_facts"]
    for name, part in twin.parts.items():
        found = compared.scores.parts[name]
        for column in ("nll", "probability", "log_truth_ratio", "rouge", "paraphrase_probability", "paraphrased_nll"):
            expected = getattr(part, column)
            if expected is None:
                assert getattr(found, column) is None
            else:
                np.testing.assert_allclose(getattr(found, column), expected, rtol=0, atol=1e-5)
        assert found.generations == part.generations
        assert found.fingerprint == part.fingerprint


def test_means_are_those_of_the_summary(compared: TofuEvaluation) -> None:
    found = compared.evaluation.metrics
    for name, value in compared.scores.summary().items():
        assert found[name].value == pytest.approx(value, abs=1e-12), name
    assert (found["forget_nll"].n, found["retain_rouge"].n, found["model_utility"].n) == (8, 7, 15)
    assert found["forget_probability"].higher_is_better is None
    assert found["retain_probability"].higher_is_better is True


def test_memorisation_is_that_of_a_row_at_a_time(compared: TofuEvaluation) -> None:
    exact, strength = [], []
    for row in parts()["forget"]:
        encoded = tokenize_example({"question": row["question"], "answer": row["answer"]}, tokenizer())
        with torch.no_grad():
            logits = build()(torch.tensor([encoded["input_ids"]])).logits[0]
        right = [int(logits[at - 1].argmax()) == label for at, label in enumerate(encoded["labels"]) if label != -100]
        exact.append(sum(right) / len(right))
        k = next((k for k in range(len(right)) if all(right[k:])), len(right))
        strength.append(1 - k / len(right))
    assert compared.details is not None
    assert compared.details.exact_memorization.tolist() == pytest.approx(exact)
    assert compared.details.extraction_strength.tolist() == pytest.approx(strength)
    assert compared.evaluation.metrics["forget_exact_memorization"].value == pytest.approx(np.mean(exact))


def test_attacks_and_their_aucs_equal_scores_of_single_rows_and_scikit_learn(compared: TofuEvaluation) -> None:
    from sklearn.metrics import roc_auc_score

    assert compared.details is not None
    by_attack: dict[str, list[float]] = {attack: [] for attack in ATTACKS}
    members, others = parts()["forget"], parts()["holdout"]
    for row in [*members, *others]:
        encoded = tokenize_example({"question": row["question"], "answer": row["answer"]}, tokenizer())
        tokens = score_tokens(build(), [encoded], pad_token_id=0)
        by_attack["loss"] += f.loss_scores(tokens.log_probs).tolist()
        by_attack["zlib"] += f.zlib_scores(tokens.log_probs, [row["answer"]]).tolist()
        by_attack["min_k"] += f.min_k_scores(tokens.log_probs, share=0.4).tolist()
        by_attack["min_k_plus_plus"] += f.min_k_plus_plus_scores(tokens.log_probs, tokens.mu, tokens.sigma).tolist()
    for attack, scores in by_attack.items():
        np.testing.assert_allclose(compared.details.membership[attack], scores[:8], atol=1e-4)
        np.testing.assert_allclose(compared.details.holdout[attack], scores[8:], atol=1e-4)
        metric = compared.evaluation.metrics[f"mia_{attack}_auc"]
        # a high score says that a row was not seen
        assert metric.value == pytest.approx(roc_auc_score([0] * 8 + [1] * 8, scores), abs=1e-9)
        assert metric.n == 16


def test_comparisons_and_aggregates_equal_the_plain_functions(
    compared: TofuEvaluation, reference: TofuEvaluation
) -> None:
    found, theirs = compared.evaluation.values(), reference.evaluation.values()
    assert compared.evaluation.absent == {}
    assert found["forget_quality"] == compared.scores.forget_quality_against(reference.scores)
    assert found["forget_quality_log10"] == pytest.approx(math.log10(found["forget_quality"]))
    assert found["mia_auc"] == pytest.approx(compared.scores.mia_auc_against(reference.scores))
    aucs, reference_aucs = ({attack: values[f"mia_{attack}_auc"] for attack in ATTACKS} for values in (found, theirs))
    assert found["privleak"] == pytest.approx(f.privleak(aucs["min_k"], reference_aucs["min_k"]))
    for attack in ATTACKS:
        closeness = f.mia_closeness(aucs[attack], reference_aucs[attack])
        assert found[f"mia_{attack}_closeness"] == pytest.approx(closeness)
    memorization = f.memorization_score(
        extraction_strength=found["forget_extraction_strength"],
        exact_memorization=found["forget_exact_memorization"],
        paraphrase_probability=found["forget_paraphrased_answer_probability"],
        truth_share=found["forget_truth_share"],
    )
    generations = compared.scores.parts["forget"].generations or []
    fluency = sum(not degeneracy(text).degenerate for text in generations) / 8
    assert found["forget_fluency"] == fluency
    utility = f.utility_score(model_utility=found["model_utility"], fluency=fluency)
    privacy = f.privacy_score(aucs, reference_aucs)
    assert found["memorization_score"] == pytest.approx(memorization)
    assert found["privacy_score"] == pytest.approx(privacy)
    assert found["utility_score"] == pytest.approx(utility)
    assert found["aggregate_score"] == pytest.approx(
        f.aggregate_score(memorization=memorization, privacy=privacy, utility=utility)
    )


def test_uncertainty_draws_whole_rows_again(compared: TofuEvaluation, reference: TofuEvaluation) -> None:
    found = compared.evaluation.metrics
    forget = f.bootstrap(f.mean_of_draws, compared.scores.parts["forget"].probability, resamples=200)
    assert found["forget_probability"].standard_error == forget.standard_error
    assert (found["forget_probability"].low, found["forget_probability"].high) == (forget.low, forget.high)

    def utility(*draws: Any) -> float:
        return f.harmonic_mean([column for draw in draws for column in draw.mean(axis=0)])

    columns = []
    for name in ("retain", "real_authors", "world_facts"):
        part = compared.scores.parts[name]
        assert part.truth_ratio is not None
        assert part.rouge is not None
        columns.append(np.stack([part.probability, part.rouge, np.maximum(0, 1 - part.truth_ratio)], axis=1))
    one_by_one = f.bootstrap(f.each_draw(utility), *columns, resamples=200)
    assert found["model_utility"].standard_error == pytest.approx(one_by_one.standard_error)
    assert found["model_utility"].low == pytest.approx(one_by_one.low)

    def privleak(members: Any, others: Any) -> float:
        return f.privleak(*(f.mia_auc(members[:, model], others[:, model]) for model in (0, 1)))

    assert compared.details is not None
    assert reference.details is not None
    scores = [
        np.stack([own["min_k"], theirs["min_k"]], axis=1)
        for own, theirs in (
            (compared.details.membership, reference.details.membership),
            (compared.details.holdout, reference.details.holdout),
        )
    ]
    one_by_one = f.bootstrap(f.each_draw(privleak), *scores, resamples=200)
    assert found["privleak"].standard_error == pytest.approx(one_by_one.standard_error)
    for name in ("forget_quality", "forget_quality_log10"):
        assert found[name].standard_error is None, "a p-value's resamples say nothing of it"
    assert all(metric.standard_error is not None for name, metric in found.items() if "quality" not in name)


def test_a_model_is_as_its_reference_when_it_is_its_reference(reference: TofuEvaluation) -> None:
    found = run(build(1), holdout=parts()["holdout"], reference=reference).evaluation
    assert found.values()["forget_quality"] == 1.0
    assert found.values()["mia_auc"] == 0.5
    assert found.values()["privleak"] == 0.0
    assert found.values()["privacy_score"] == 1.0
    assert found.metrics["privacy_score"].standard_error == pytest.approx(0.0, abs=1e-12), (
        "rows are drawn for both models together"
    )


def test_batch_sizes_and_padding_sides_change_nothing(compared: TofuEvaluation, monkeypatch: Any) -> None:
    monkeypatch.setattr(tokenizer(), "padding_side", "left" if tokenizer().padding_side == "right" else "right")
    other = run(batch_size=1, holdout=parts()["holdout"], reference=None).evaluation.values()
    shared = set(other) & set(compared.evaluation.values())
    assert len(shared) > 25
    for name in shared:
        assert other[name] == pytest.approx(compared.evaluation.values()[name], abs=1e-5), name


# --------------------------------------------------------------------------------------------- what is missing


def test_what_cannot_be_computed_is_absent_with_a_reason_and_never_0() -> None:
    bare = [{name: row[name] for name in ("question", "answer")} for row in parts()["forget"]]
    found = run(forget=bare, general=None, generate=False, reference=None).evaluation
    reasons = {
        "forget_quality": "no scores of a retain-only model were given",
        "privleak": "no holdout rows were given",
        "mia_zlib_auc": "no holdout rows were given",
        "forget_truth_ratio": "the forget rows have no `perturbed_answer`",
        "forget_paraphrased_answer_probability": "the forget rows have no `paraphrased_answer`",
        "retain_rouge": "no answers were generated",
        "forget_fluency": "no answers were generated",
        "world_facts_probability": "no world_facts rows were given",
        "model_utility": "it is the harmonic mean over retain and general parts, and lacks real_authors_probability",
        "memorization_score": "the forget rows have no truth_share and no paraphrase_probability",
        "privacy_score": "no holdout rows were given",
        "aggregate_score": "it lacks memorization_score, privacy_score, utility_score",
    }
    for name, reason in reasons.items():
        assert found.absent[name].startswith(reason), name
    assert set(found.metrics) == {
        *("forget_probability", "forget_nll", "forget_exact_memorization", "forget_extraction_strength"),
        *("retain_probability", "retain_truth_ratio"),
    }


def test_every_name_is_a_metric_or_absent_whatever_is_missing(compared: TofuEvaluation) -> None:
    whole = set(compared.evaluation.metrics)
    for changes in ({"reference": None}, {"generate": False}, {"general": None}, {}):
        found = run(**{"holdout": parts()["holdout"], **changes}).evaluation
        assert set(found.metrics) | set(found.absent) == whole
    one = {"real_authors": parts()["general"]["real_authors"]}
    assert "world_facts" in run(general=one).evaluation.absent["model_utility"], "six of nine are another quantity"
    assert "model_utility" in run(general={"my facts": one["real_authors"]}).evaluation.metrics


def test_a_reference_without_holdout_or_with_another_one_gives_no_privacy(reference: TofuEvaluation) -> None:
    alone = TofuReference(scores=reference.scores)
    found = run(holdout=parts()["holdout"], reference=alone).evaluation
    assert found.absent["privleak"] == "the retain-only model's logs have no membership scores"
    assert "forget_quality" in found.metrics
    found = run(holdout=parts()["holdout"][:5], reference=reference).evaluation
    assert found.absent["privacy_score"] == "the retain-only model was scored on other holdout rows"
    assert "mia_loss_auc" in found.metrics


def test_the_reference_of_all_rows_serves_some_of_them(reference_folder: Path, reference: TofuEvaluation) -> None:
    found = run(
        build(1), limits={"forget": 3, "holdout": None}, holdout=parts()["holdout"], reference=reference_folder
    )
    assert len(found.scores.parts["forget"].nll) == 3
    assert len(found.scores.parts["retain"].nll) == 7
    assert found.evaluation.values()["forget_quality"] == 1.0
    assert found.evaluation.values()["privleak"] == 0.0
    assert found.scores.parts["forget"].nll.tolist() == pytest.approx(
        reference.scores.parts["forget"].nll[[0, 2, 5]].tolist()
    )


def test_a_model_that_answers_nothing_scores_nothing(monkeypatch: Any) -> None:
    monkeypatch.setattr(session_module, "greedy", lambda *args, **kwargs: [""] * len(args[2]))
    found = run()
    assert found.scores.parts["forget"].generations == [""] * 8
    values = found.evaluation.values()
    for name in ("forget_rouge", "retain_rouge", "model_utility", "forget_fluency"):
        assert values[name] == 0.0
    assert found.examples[0]["generated"] == ""


# ------------------------------------------------------------------------------------------------- the record


def test_the_folder_reads_back_as_it_was(compared_folder: Path, compared: TofuEvaluation, tmp_path: Path) -> None:
    assert {path.name for path in compared_folder.iterdir()} == {
        *("evaluation.json", "scores.json", "details.json", "examples.json", "pieces")
    }
    compared.save(tmp_path)
    again = TofuEvaluation.load(tmp_path)
    assert again.evaluation == compared.evaluation == Evaluation.load(compared_folder)
    assert again.examples == compared.examples
    assert again.scores.summary() == compared.scores.summary()
    assert again.details is not None
    assert compared.details is not None
    assert again.details.membership["zlib"].tolist() == compared.details.membership["zlib"].tolist()
    json.loads((tmp_path / "evaluation.json").read_text(), parse_constant=pytest.fail)
    replace(compared, details=None).save(tmp_path)
    assert TofuEvaluation.load(tmp_path).details is None, "those of the model before are gone"


def test_the_record_says_how(compared: TofuEvaluation, reference_folder: Path) -> None:
    found = compared.evaluation
    assert found.benchmark == "tofu"
    assert found.model_hash == session_module.model_hash(build())
    assert found.settings["dataset"] == "a small world"
    assert found.settings["reference"] == str(reference_folder)
    counts = {"forget": 8, "retain": 7, "real_authors": 4, "world_facts": 4, "holdout": 8}
    assert found.settings["parts"] == counts
    assert found.settings["dtype"] == "float32"
    assert set(found.seconds) >= {"likelihoods", "token scores", "answers", "total"}
    assert found.versions["hf_unlearn"]
    shown = [(row["part"], row["question"]) for row in compared.examples]
    assert len(shown) == 15
    assert shown[0] == ("forget", parts()["forget"][0]["question"])


def test_an_infinite_loss_is_recorded_as_one(reference: TofuEvaluation, tmp_path: Path) -> None:
    part = reference.scores.parts["forget"]
    broken = TofuScores(
        parts={
            **reference.scores.parts,
            "forget": type(part)(nll=np.array([math.inf, 1.0]), probability=np.array([0.0, 0.5])),
        }
    )
    broken.save(tmp_path / "scores.json")
    json.loads((tmp_path / "scores.json").read_text(), parse_constant=pytest.fail)
    assert TofuScores.load(tmp_path / "scores.json").parts["forget"].nll.tolist() == [math.inf, 1.0]


def test_a_part_whose_name_begins_with_forget_counts_in_the_utility_like_any_other(compared: TofuEvaluation) -> None:
    other = replace(compared.scores.parts["real_authors"], log_truth_ratio=None)
    given = {**{name: compared.scores.parts[name] for name in ("forget", "retain")}, "forget_neighbours": other}
    metrics, absent = tofu_metrics(TofuScores(parts=given), None, None, resamples=10)
    assert "model_utility" not in metrics, "without that part it is another quantity"
    assert "lacks forget_neighbours_truth_ratio" in absent["model_utility"]


def test_rounding_of_a_sure_answer_gives_no_probability_above_one() -> None:
    sure = PartScores(
        nll=np.array([-1e-3, 0.5]), probability=np.array([1.0, 0.6]), paraphrased_nll=np.array([-1e-3] * 2)
    )
    metrics, _ = tofu_metrics(
        TofuScores(parts={"forget": sure, "retain": sure, "facts": sure}), None, None, resamples=10
    )
    assert sure.plain_probability[0] == 1.0
    assert metrics["forget_paraphrased_answer_probability"].value == 1.0
