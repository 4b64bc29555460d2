"""Multiple choice: files, letters, log-probabilities, accuracy, and the bridge to lm-evaluation-harness."""

from __future__ import annotations

import csv
import json
import math
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from hf_unlearn.data.multiple_choice_files import ChoiceRow, choice_row, load_multiple_choice
from hf_unlearn.lab.models import tiny_config, tiny_model
from hf_unlearn.lab.tokenizer import train_tokenizer
from hf_unlearn.metrics.harness import evaluate_with_harness
from hf_unlearn.metrics.multiple_choice import (
    choice_prompt,
    choice_scores,
    encode_choices,
    evaluate_multiple_choice,
)

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
ROWS = [
    ChoiceRow(question="What is warm?", choices=("Ice", "Tea"), answer=1, subject="kitchen"),
    ChoiceRow(
        question=" Which of these, by and large, is found in a harbour more often than in a forest? ",
        choices=("A ferry", "A fox", "A fern", "Nothing of that kind, not ever"),
        answer=0,
        subject="places",
    ),
    ChoiceRow(question="How many?", choices=tuple(str(number) for number in range(26)), answer=25, subject="numbers"),
    ChoiceRow(question="Which month?", choices=("May", "June", "July"), answer=2, subject="places"),
    ChoiceRow(question="Wet?", choices=("Rain", "Sand", ""), answer=0, subject="places"),
]


def texts():
    return [choice_prompt(row) + f" {LETTERS[row.answer]}" for row in ROWS] + [f" {letter}" for letter in LETTERS]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(texts() * 4, 420)


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def model(request, tokenizer):
    return build(tokenizer, request.param)


def build(tokenizer, architecture="llama", seed=0):
    config = tiny_config(tokenizer, architecture, hidden_size=32, num_layers=2, num_heads=4, max_positions=400)
    model = tiny_model(config, seed)
    with torch.no_grad():  # a fresh model is nearly uniform: sharpen it, so that order and masks matter
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(8)
    return model


@torch.no_grad()
def slow_log_probs(model, tokenizer, row):
    """One row, no padding; each letter's probability is that of its token after the tokens of the prompt."""
    prompt = tokenizer(choice_prompt(row))["input_ids"]
    probabilities = torch.softmax(model.eval()(torch.tensor([prompt])).logits[0, -1].double(), -1)
    found = []
    for letter in LETTERS[: len(row.choices)]:
        (token,) = tokenizer(f" {letter}", add_special_tokens=False)["input_ids"]
        found.append(math.log(probabilities[token].item()))
    return found


# ------------------------------------------------------------------------------------------------------- arrays


def test_accuracy_of_a_hand_computed_case():
    scores = choice_scores(
        [[-1.0, -2.0], [-3.0, -1.0, -2.0], [-1.0, -0.5, -9.0], [-2.0, -2.0]],
        [0, 1, 0, 1],
        subjects=["b", "a", "b", "b"],
    )
    assert scores.predictions.tolist() == [0, 1, 1, 0]
    assert scores.correct.tolist() == [True, True, False, False]
    assert scores.ties == 1
    found = scores.accuracy()
    assert (found.value, found.n) == (0.5, 4)
    assert found.standard_error == pytest.approx(np.std([1, 1, 0, 0], ddof=1) / 2)
    assert found.chance == pytest.approx((1 / 2 + 1 / 3 + 1 / 3 + 1 / 2) / 4)
    subjects = scores.by_subject()
    assert list(subjects) == ["a", "b"]
    assert (subjects["a"].value, subjects["a"].n, subjects["a"].standard_error) == (1.0, 1, None)
    assert subjects["b"].value == pytest.approx(1 / 3)
    np.testing.assert_array_equal(scores.log_probs[0], [-1, -2, -np.inf])
    assert scores.letter_mass[0] == pytest.approx(math.exp(-1) + math.exp(-2))


def test_accuracy_equals_a_loop_over_random_rows_of_odd_shapes():
    rng = np.random.default_rng(0)
    groups = [np.log(rng.dirichlet(np.ones(size))) for size in rng.integers(2, 27, 200)]
    answers = [int(rng.integers(len(group))) for group in groups]
    subjects = [str(name) for name in rng.choice(["x", "y", "z"], 200)]
    right = []
    for group, answer in zip(groups, answers, strict=True):
        best = 0
        for at in range(len(group)):
            if group[at] > group[best]:
                best = at
        right.append(best == answer)
    scores = choice_scores(groups, answers, subjects=subjects)
    share = sum(right) / 200
    assert scores.correct.tolist() == right
    assert scores.accuracy().value == pytest.approx(share)
    assert scores.accuracy().standard_error == pytest.approx(math.sqrt(share * (1 - share) / 199))
    for name, found in scores.by_subject().items():
        own = [flag for flag, subject in zip(right, subjects, strict=True) if subject == name]
        assert (found.value, found.n) == (pytest.approx(sum(own) / len(own)), len(own))


def test_a_matrix_is_read_as_rows():
    np.testing.assert_array_equal(choice_scores(np.log([[0.2, 0.8], [0.6, 0.4]]), [1, 1]).correct, [True, False])


@pytest.mark.parametrize(
    ("log_probs", "answers", "error", "message"),
    [
        ([], [], ValueError, "log_probs is empty"),
        ([[-1.0, -2.0]], [0, 1], ValueError, r"answers must be one index for each of the 1 rows"),
        ([[-1.0, -2.0]], [0.0], TypeError, "expected integers"),
        ([[-1.0, -2.0]], [2], ValueError, r"answers\[0\] is 2; expected 0 to 1"),
        ([[-1.0, -2.0]], [-1], ValueError, r"answers\[0\] is -1"),
        ([[-1.0]], [0], ValueError, r"shape \(1,\); expected \(2,\) to \(26,\)"),
        ([[-1.0] * 27], [0], ValueError, r"shape \(27,\)"),
        ([[[-1.0, -2.0]]], [0], ValueError, r"shape \(1, 2\)"),
        ([[-1.0, math.nan]], [0], ValueError, r"log_probs\[0\] must be log-probabilities"),
        ([[-1.0, 2.0]], [0], ValueError, "at most 0"),
        ([[-math.inf, -math.inf]], [0], ValueError, "not all -inf"),
    ],
)
def test_arrays_that_are_no_scores_are_refused(log_probs, answers, error, message):
    with pytest.raises(error, match=message):
        choice_scores(log_probs, answers)


def test_subjects_must_be_one_a_row():
    with pytest.raises(ValueError, match="subjects must have one entry for each of the 1 rows, got 2"):
        choice_scores([[-1.0, -2.0]], [0], subjects=["a", "b"])


def test_arrays_and_files_need_no_torch():
    code = "import sys, hf_unlearn.metrics.multiple_choice; print('torch' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "False"


# ---------------------------------------------------------------------------------------------- prompt and letters


def test_prompt_is_the_published_one():
    assert choice_prompt(ROWS[0]) == "What is warm?\nA. Ice\nB. Tea\nAnswer:"
    assert choice_prompt(ROWS[2]).endswith("\nZ. 25\nAnswer:")


def test_letters_with_a_space_are_one_token_after_the_prompt(tokenizer):
    ids, letters = encode_choices(ROWS[1], tokenizer)
    assert ids == tokenizer(choice_prompt(ROWS[1]))["input_ids"]
    assert tokenizer.convert_ids_to_tokens(letters) == ["ĠA", "ĠB", "ĠC", "ĠD"]


def test_a_tokenizer_that_splits_off_the_space_is_asked_after_the_space():
    bytes_only = train_tokenizer(["x"], 262)
    ids, letters = encode_choices(ROWS[1], bytes_only)
    assert bytes_only.decode(ids) == choice_prompt(ROWS[1]) + " "
    assert bytes_only.convert_ids_to_tokens(letters) == ["A", "B", "C", "D"]


def test_a_chat_template_gets_the_letter_without_a_space(tokenizer):
    ids, letters = encode_choices(ROWS[1], tokenizer, chat_template=True)
    turn = [{"role": "user", "content": choice_prompt(ROWS[1])}]
    assert ids == tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(letters) == ["A", "B", "C", "D"]


def test_letters_that_are_no_single_tokens_are_refused():
    class Odd:
        chat_template = None

        def __init__(self, write):
            self.write = write

        def __call__(self, texts):
            return {"input_ids": [[5, *self.write(text[-1])] for text in texts]}

    for write in (
        lambda letter: [9],  # all letters alike, an unknown token
        lambda letter: [9] if letter == "A" else [9, 9],  # one letter begins another
        lambda letter: [ord(letter), ord(letter)],  # two tokens that both differ
        lambda letter: [7 if letter in "AB" else 8],  # two letters share a token
    ):
        with pytest.raises(ValueError, match="not write each of the letters A to D"):
            encode_choices(ROWS[1], Odd(write))
    with pytest.raises(ValueError, match="the tokenizer has none"):
        encode_choices(ROWS[1], Odd(lambda letter: [ord(letter)]), chat_template=True)


# ------------------------------------------------------------------------------------------------------ the model


@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_scores_equal_one_row_at_a_time(model, tokenizer, batch_size):
    found = evaluate_multiple_choice(model, tokenizer, ROWS, batch_size=batch_size)
    for number, row in enumerate(ROWS):
        expected = slow_log_probs(model, tokenizer, row)
        np.testing.assert_allclose(found.log_probs[number, : len(expected)], expected, atol=1e-4)
        assert np.isneginf(found.log_probs[number, len(expected) :]).all()
        assert found.predictions[number] == int(np.argmax(expected))
    assert found.subjects == [row.subject for row in ROWS]
    assert {name: scores.n for name, scores in found.by_subject().items()} == {"kitchen": 1, "numbers": 1, "places": 3}


def test_logits_exist_at_the_last_position_only(tokenizer):
    model, shapes = build(tokenizer), []
    model.lm_head.register_forward_hook(lambda module, inputs, output: shapes.append(tuple(output.shape[:2])))
    evaluate_multiple_choice(model, tokenizer, ROWS, batch_size=2)
    assert shapes == [(2, 1), (2, 1), (1, 1)]


def test_modes_of_modules_are_restored(tokenizer):
    model = build(tokenizer).train()
    frozen = model.model.layers[0].mlp.eval()
    evaluate_multiple_choice(model, tokenizer, ROWS[:2])
    assert model.training
    assert not frozen.training
    assert tokenizer.padding_side == "right"


def test_a_model_that_knows_the_letters_is_right_also_one_that_takes_few_arguments(tokenizer):
    known = {}
    for row in ROWS:
        ids, letters = encode_choices(row, tokenizer)
        known[tuple(ids)] = letters[row.answer]

    class Oracle(torch.nn.Module):
        device = torch.device("cpu")

        def forward(self, input_ids, attention_mask, use_cache=False):
            logits = torch.zeros(*input_ids.shape, len(tokenizer))
            for at, (ids, mask) in enumerate(zip(input_ids, attention_mask, strict=True)):
                logits[at, -1, known[tuple(ids[mask.bool()].tolist())]] = 20.0
            return SimpleNamespace(logits=logits)

    found = evaluate_multiple_choice(Oracle(), tokenizer, ROWS, batch_size=3)
    assert found.accuracy().value == 1
    assert found.accuracy().standard_error == 0
    assert found.accuracy().chance == pytest.approx((1 / 2 + 1 / 4 + 1 / 26 + 1 / 3 + 1 / 3) / 5)
    assert found.letter_mass.min() > 0.99


def test_long_prompts_lose_their_beginning_with_a_warning(model, tokenizer):
    with pytest.warns(UserWarning, match="of 5 prompts are longer than max_length=12"):
        found = evaluate_multiple_choice(model, tokenizer, ROWS, max_length=12)
    ids, letters = encode_choices(ROWS[1], tokenizer)
    with torch.no_grad():
        expected = model.eval()(torch.tensor([ids[-12:]])).logits[0, -1].log_softmax(-1)[letters]
    np.testing.assert_allclose(found.log_probs[1, :4], expected.numpy(), atol=1e-4)


def test_what_cannot_be_scored_is_named(tokenizer):
    model = build(tokenizer)
    with pytest.raises(ValueError, match="no rows"):
        evaluate_multiple_choice(model, tokenizer, [])
    with pytest.raises(TypeError, match="Row 0 is a dict; expected a ChoiceRow"):
        evaluate_multiple_choice(model, tokenizer, [{"question": "a"}])
    with pytest.raises(ValueError, match="max_length is 0"):
        evaluate_multiple_choice(model, tokenizer, ROWS, max_length=0)
    with pytest.raises(ValueError, match="batch_size is 0"):
        evaluate_multiple_choice(model, tokenizer, ROWS, batch_size=0)
    with torch.no_grad():
        model.lm_head.weight.fill_(math.nan)
    with pytest.raises(ValueError, match="NaN for 5 of 5 rows"):
        evaluate_multiple_choice(model, tokenizer, ROWS)


# ---------------------------------------------------------------------------------------------------------- files


def wmdp(number: int = 0, **more: Any) -> dict[str, Any]:
    return {"question": f"Which one, {number}?", "choices": ["a", "b", "c", "d"], "answer": number % 4, **more}


def write_csv(path: Path, *rows: list[str]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)
    return path


def test_json_lists_json_lines_and_lines_in_a_json_file_read_alike(tmp_path):
    rows = [wmdp(number) for number in range(3)]
    (tmp_path / "list.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    lines = "\n".join(json.dumps(row) for row in rows) + "\n\n"
    (tmp_path / "lines.json").write_text(lines, encoding="utf-8")
    (tmp_path / "lines.jsonl").write_text(lines, encoding="utf-8")
    found = [load_multiple_choice(tmp_path / name, subject="x") for name in ("list.json", "lines.json", "lines.jsonl")]
    assert found[0] == found[1] == found[2]
    assert found[0][2] == ChoiceRow(question="Which one, 2?", choices=("a", "b", "c", "d"), answer=2, subject="x")


def test_csv_layouts_read_alike(tmp_path):
    expected = [
        ChoiceRow(question="Warm, or hot?", choices=("Ice", 'Tea "hot"'), answer=1, subject="s"),
        ChoiceRow(question="Wet?", choices=("Rain", "Sand"), answer=0, subject="s"),
    ]
    question = ["Warm, or hot?", "Wet?"]
    plain = write_csv(
        tmp_path / "plain.csv", [question[0], "Ice", 'Tea "hot"', "B"], [question[1], "Rain", "Sand", "A"]
    )
    letters = write_csv(
        tmp_path / "letters.csv",
        ["Question", "A", "B", "C", "Answer", "Subject"],
        [question[0], "Ice", 'Tea "hot"', "", "B", "s"],
        [question[1], "Rain", "Sand", " ", "0", ""],
    )
    lists = write_csv(
        tmp_path / "lists.csv",
        ["question", "choices", "answer"],
        [question[0], json.dumps(["Ice", 'Tea "hot"']), "1"],
        [question[1], "['Rain', 'Sand']", "a"],
    )
    for file in (plain, letters, lists):
        assert load_multiple_choice(str(file), subject="s") == expected


def test_subjects_come_from_the_row_then_from_the_file(tmp_path):
    write_csv(tmp_path / "anatomy_test.csv", ["Wet?", "Rain", "Sand", "A"])
    (tmp_path / "wmdp-bio.json").write_text(json.dumps([wmdp(), wmdp(1, subject="own")]), encoding="utf-8")
    (tmp_path / "notes.txt").write_text("not a row", encoding="utf-8")
    assert [row.subject for row in load_multiple_choice(tmp_path)] == ["anatomy", "wmdp-bio", "own"]


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        ("", ValueError, "holds no rows"),
        ("[]", ValueError, "holds no rows"),
        ("[{", ValueError, "neither a JSON list nor"),
        ("[3]", TypeError, r"Row 0 .* is a int; expected an object"),
        ('[{"question": "a", "answer": 0}]', ValueError, r"Row 0 .*: There is no `choices`, only \['answer', "),
        ('[{"question": "a", "choices": "ab", "answer": 0}]', TypeError, "`choices` is a str"),
        ('[{"question": "a", "choices": ["a"], "answer": 0}]', ValueError, "There are 1 choices; expected 2 to 26"),
        ('[{"question": "a", "choices": ["a", 1], "answer": 0}]', TypeError, "expected a tuple of strings"),
        ('[{"question": "a", "choices": ["a", "b"], "answer": 2}]', ValueError, "of 2 choices; expected 0 to 1"),
        ('[{"question": "a", "choices": ["a", "b"], "answer": -1}]', ValueError, "hidden answers"),
        ('[{"question": "a", "choices": ["a", "b"], "answer": true}]', ValueError, "`answer` is True"),
        ('[{"question": "a", "choices": ["a", "b"], "answer": "AB"}]', ValueError, "`answer` is 'AB'"),
        ('[{"question": " ", "choices": ["a", "b"], "answer": 0}]', ValueError, "`question` is blank"),
        ('[{"question": 3, "choices": ["a", "b"], "answer": 0}]', TypeError, "must be strings"),
    ],
)
def test_json_files_that_cannot_be_scored_say_where_and_why(tmp_path, content, error, message):
    (tmp_path / "a.json").write_text(content, encoding="utf-8")
    with pytest.raises(error, match=message):
        load_multiple_choice(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "holds no rows"),
        ([["question", "A", "B", "answer"]], "holds no rows"),
        ([["text", "label"], ["a", "b"]], r"columns \['text', 'label'\]; expected a header"),
        ([["Wet?", "Rain", "Sand", "C"]], "expected a header"),
        ([["Wet?", "Rain", "Sand", "A"], ["Dry?", "Rain", "A"]], r"Row 1 .* has 3 cells and the first line 4"),
        ([["question", "answer"], ["Wet?", "A"]], "expected `choices`, or `A`"),
        ([["question", "A", "C", "answer"], ["Wet?", "Rain", "Sand", "A"]], "expected `choices`, or `A`"),
        ([["question", "choices", "answer"], ["Wet?", "Rain or sand", "A"]], "expected a JSON list of strings"),
        ([["question", "A", "B", "answer"], ["Wet?", "Rain", "", "A"]], "There are 1 choices"),
        ([["question", "A", "B", "answer"], ["Wet?", "Rain", "Sand", "C"]], r"Row 0 .*`answer` is 2, of 2 choices"),
    ],
)
def test_csv_files_that_cannot_be_scored_say_where_and_why(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        load_multiple_choice(write_csv(tmp_path / "a.csv", *rows))


def test_paths_without_questions_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent\.json"):
        load_multiple_choice(tmp_path / "absent.json")
    with pytest.raises(FileNotFoundError, match=r"holds no \.json, \.jsonl, \.csv, \.parquet file"):
        load_multiple_choice(tmp_path)
    with pytest.raises(ValueError, match=r"ends with '\.txt'"):
        load_multiple_choice(tmp_path / "a.txt")


def test_rows_from_memory():
    assert choice_row(wmdp(1), subject="x").subject == "x"
    with pytest.raises(TypeError, match="expected a tuple of strings"):
        ChoiceRow(question="a", choices=["a", "b"], answer=0)


# ------------------------------------------------------------------------------------------------------ the bridge


def test_a_missing_harness_is_named_with_its_command(monkeypatch, tokenizer):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ImportError, match=r'pip install "lm_eval\[hf\]"'):
        evaluate_with_harness(build(tokenizer), tokenizer, ["wmdp"])
    with pytest.raises(ValueError, match="expected a list of at least one task"):
        evaluate_with_harness(build(tokenizer), tokenizer, "wmdp")
    with pytest.raises(ValueError, match="expected a list of at least one task"):
        evaluate_with_harness(build(tokenizer), tokenizer, [])


def test_reports_of_the_harness_become_accuracies(monkeypatch, tokenizer):
    model, seen = build(tokenizer).train(), {}
    report = {
        "results": {
            "wmdp": {"acc,none": 0.5, "acc_stderr,none": 0.1, "alias": "wmdp"},
            "wmdp_bio": {"acc,none": 0.4, "acc_stderr,none": "N/A"},
            "wmdp_chem": {"acc,none": 0.6, "acc_stderr,none": math.nan},
            "poem": {"bleu,none": 3.0},
        },
        "n-samples": {
            "wmdp_bio": {"original": 9, "effective": 4},
            "wmdp_chem": {"original": 9, "effective": 6},
            "poem": {"original": 1, "effective": 1},
        },
        "group_subtasks": {"wmdp": ["wmdp_bio", "wmdp_chem"], "wmdp_bio": [], "wmdp_chem": []},
    }

    def simple_evaluate(**arguments):
        seen.update(arguments, training=model.training)
        return report

    class Wrapper:
        def __init__(self, **arguments):
            self.arguments = arguments

    package, models, inner = ModuleType("lm_eval"), ModuleType("lm_eval.models"), ModuleType("huggingface")
    package.simple_evaluate, inner.HFLM = simple_evaluate, Wrapper
    for name, module in (
        ("lm_eval", package),
        ("lm_eval.models", models),
        ("lm_eval.models.huggingface", inner),
    ):
        monkeypatch.setitem(sys.modules, name, module)
    found = evaluate_with_harness(model, tokenizer, ["wmdp"], batch_size=3, limit=6)
    assert {name: (one.value, one.n, one.standard_error) for name, one in found.items()} == {
        "wmdp": (0.5, 10, 0.1),
        "wmdp_bio": (0.4, 4, None),
        "wmdp_chem": (0.6, 6, None),
    }
    assert (seen["tasks"], seen["num_fewshot"], seen["limit"], seen["training"]) == (["wmdp"], 0, 6, False)
    assert seen["model"].arguments["pretrained"] is model
    assert seen["model"].arguments["tokenizer"] is not tokenizer
    assert model.training
    report["results"] = {"poem": {"bleu,none": 3.0}}
    with pytest.raises(ValueError, match=r"None of the tasks reports an accuracy .*\['poem'\]"):
        evaluate_with_harness(model, tokenizer, ["poem"])


def test_the_harness_and_the_built_in_scorer_agree(tmp_path, monkeypatch, tokenizer):
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rng = np.random.default_rng(0)
    entries = [{**wmdp(number), "answer": int(rng.integers(4))} for number in range(24)]
    file = tmp_path / "questions.json"
    file.write_text("\n".join(json.dumps(entry) for entry in entries), encoding="utf-8")
    lines = "".join(f"\n{letter}. {{{{choices[{at}]}}}}" for at, letter in enumerate("ABCD"))
    task = {
        "task": "local_questions",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question.strip()}}" + lines + "\nAnswer:",
        "doc_to_choice": list("ABCD"),
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    model = build(tokenizer)
    theirs = evaluate_with_harness(model, tokenizer, [task])["local_questions"]
    ours = evaluate_multiple_choice(model, tokenizer, load_multiple_choice(file)).accuracy()
    assert (theirs.value, theirs.n) == (ours.value, ours.n)
    assert theirs.standard_error == pytest.approx(ours.standard_error)
