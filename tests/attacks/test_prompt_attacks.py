"""Prompts, conversations and wordings: what reaches the model, who is judged by what, and what is refused."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path

import pytest

from hf_unlearn.attacks import (
    MultiTurnConfig,
    ParaphraseConfig,
    PrefillConfig,
    PromptConfig,
    RefusalJudge,
    RelearnConfig,
    RoundingConfig,
    SoftPromptConfig,
    TargetJudge,
    Transcript,
    load_prompts,
    load_transcripts,
    multi_turn,
    over_refusal,
    paraphrase,
    prompts,
    static,
)
from hf_unlearn.attacks.multi_turn import outcome as multi_turn_outcome
from hf_unlearn.attacks.multi_turn import transcript_judges
from hf_unlearn.attacks.over_refusal import outcome as over_refusal_outcome
from hf_unlearn.attacks.paraphrase import outcome as paraphrase_outcome
from hf_unlearn.attacks.static import outcome as static_outcome
from hf_unlearn.attacks.summary import joined
from hf_unlearn.data import tokenize_prompt
from hf_unlearn.data.prompts_files import PromptRow, XSTestPrompts, load_xstest
from hf_unlearn.metrics.generate import greedy
from hf_unlearn.reports.outcomes import read_attacks, write_attacks

over_refusal_module = import_module("hf_unlearn.attacks.over_refusal")  # the function of that name hides it
SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"


def row(prompt: str, behavior: str, number: int = 0, safe: bool = False) -> PromptRow:
    return PromptRow(id=f"{behavior}/{number}", prompt=prompt, behavior=behavior, safe=safe, source="behaviors")


def asked(lab, rows, model=None, tokens=30):
    ids = [tokenize_prompt({"question": r, "answer": ""}, lab.tokenizer) for r in rows]
    return greedy(model or lab.knows, lab.tokenizer, ids, max_new_tokens=tokens)


def test_judges_are_told_the_behaviour_and_the_model_the_prompt(attack_lab):
    lab = attack_lab
    questions = [lab.rows[number]["question"] for number in (10, 11, 12)]
    rows = [row(questions[0], "first"), row(questions[1], "first", 1), row(questions[2], "second")]
    seen = []

    def own(prompt: str, answer: str) -> bool:
        seen.append((prompt, answer))
        return answer == lab.rows[11]["answer"]

    found = static(lab.knows, lab.tokenizer, rows, PromptConfig(max_new_tokens=40), judges={"own": own})
    assert list(found.answers) == asked(lab, questions, tokens=40)
    assert found.answers[1] == lab.rows[11]["answer"], "the lab's model does not know its rows"
    assert [prompt for prompt, _ in seen] == ["first", "first", "second"]
    result = static_outcome(found, "target", seconds=1.0)
    assert result.judges[0].success == pytest.approx(1 / 3)
    # of the two behaviours the first has a prompt that succeeds
    assert result.measures[0].name == "behaviours for which a prompt succeeds, judge own"
    assert result.measures[0].value == pytest.approx(1 / 2)
    assert result.examples[0].answer == lab.rows[11]["answer"]  # a success comes first
    assert result.examples[0].success == {"own": True}


@pytest.mark.parametrize("defence", ["smooth_llm", "self_reminder"])
def test_a_defence_stands_in_front_of_the_model(attack_lab, monkeypatch, defence):
    calls = []

    def fake(model, tokenizer, texts, *rest, **options):
        calls.append((list(texts), rest, options))
        return ["I cannot."] * len(texts)

    monkeypatch.setattr(prompts, defence, fake)
    config = PromptConfig(defence=defence, copies=3, swapped=0.2, max_new_tokens=5, seed=4)
    found = static(None, attack_lab.tokenizer, [row("Hello there", "greet")], config)
    assert found.answers == ("I cannot.",)
    texts, rest, options = calls[0]
    assert texts == ["Hello there"]
    if defence == "smooth_llm":
        assert (rest[0].copies, rest[0].share, rest[0].seed, rest[0].max_new_tokens) == (3, 0.2, 4, 5)
    else:
        assert options["max_new_tokens"] == 5


def test_the_halves_of_xstest_are_apart(attack_lab, monkeypatch):
    def refuses(model, tokenizer, texts, config, description=None):
        return ["I cannot do that." if "kill" in text else f"Sure, {text}." for text in texts]

    monkeypatch.setattr(over_refusal_module, "answer_prompts", refuses)
    halves = XSTestPrompts(
        safe=[row("how to kill a process", "a", safe=True), row("how to bake a loaf", "b", safe=True)],
        unsafe=[row("how to kill x", "c")],
    )
    found = over_refusal(None, attack_lab.tokenizer, halves)
    measures = {measure.name: measure for measure in over_refusal_outcome(found).measures}
    assert measures["safe prompts refused, judge refusal phrases"].value == 0.5
    assert measures["safe prompts refused, judge refusal phrases"].n == 2
    assert measures["unsafe prompts refused, judge refusal phrases anywhere"].value == 1.0
    turned = XSTestPrompts(safe=halves.safe[::-1], unsafe=[])
    shown = over_refusal_outcome(over_refusal(None, attack_lab.tokenizer, turned)).examples
    assert [example.answer[:8] for example in shown] == ["I cannot", "Sure, ho"]  # what is refused comes first
    half = over_refusal(None, attack_lab.tokenizer, XSTestPrompts(safe=halves.safe, unsafe=[]))
    assert half.unsafe is None
    assert {rate.judge for rate in over_refusal_outcome(half).judges} == {
        "refusal phrases, safe prompts",
        "refusal phrases anywhere, safe prompts",
    }
    with pytest.raises(ValueError, match="no prompts"):
        over_refusal(None, attack_lab.tokenizer, XSTestPrompts(safe=[], unsafe=[]))


@pytest.mark.skipif(not (SHARED / "xstest").is_dir(), reason="no ../shared/data/xstest next to the clone")
def test_the_published_file_has_250_safe_and_200_unsafe_prompts(attack_lab, monkeypatch):
    monkeypatch.setattr(
        over_refusal_module,
        "answer_prompts",
        lambda m, t, texts, c, description=None: ["I cannot."] * len(texts),
    )
    found = over_refusal(None, None, load_xstest(SHARED / "xstest" / "xstest_prompts.csv"))
    counts = {measure.name: (measure.n, measure.value) for measure in over_refusal_outcome(found).measures}
    assert counts["safe prompts refused, judge refusal phrases"] == (250, 1.0)
    assert counts["unsafe prompts refused, judge refusal phrases"] == (200, 1.0)


def talk(*contents, behavior="b", targets=()):
    """User, assistant, user, ... with None for a turn to generate."""
    roles = ["user", "assistant"] * len(contents)
    messages = tuple({"role": role, "content": content} for role, content in zip(roles, contents, strict=False))
    return Transcript(messages=messages, behavior=behavior, targets=targets)


@pytest.mark.parametrize("assistant", ["given", "generated"])
def test_a_conversation_is_held_turn_by_turn(attack_lab, assistant):
    """A slow twin: one conversation at a time, one turn at a time."""
    lab = attack_lab
    first, second = lab.rows[10]["question"], lab.rows[20]["question"]
    rows = [talk(first, "Given words.", second), talk(first, None, second, None, first), talk(second)]
    config = MultiTurnConfig(assistant=assistant, max_new_tokens=12)
    found = multi_turn(lab.knows, lab.tokenizer, rows, config)
    for transcript, answer in zip(rows, found.answers, strict=True):
        held: list[dict] = []
        for message in transcript.messages:
            if message["role"] == "assistant" and (assistant == "generated" or message["content"] is None):
                ids = lab.tokenizer.apply_chat_template(held, add_generation_prompt=True, return_dict=False)
                held.append(
                    {"role": "assistant", "content": greedy(lab.knows, lab.tokenizer, [ids], max_new_tokens=12)[0]}
                )
            else:
                held.append(dict(message))
        ids = lab.tokenizer.apply_chat_template(held, add_generation_prompt=True, return_dict=False)
        assert answer == greedy(lab.knows, lab.tokenizer, [ids], max_new_tokens=12)[0]


def test_only_the_last_answer_of_a_conversation_is_judged(attack_lab):
    rows = [talk("Hi", "the secret word is tulip", "And now?", behavior="say it", targets=("tulip",))]
    found = multi_turn(attack_lab.knows, attack_lab.tokenizer, rows, MultiTurnConfig(max_new_tokens=3))
    assert found.judgement.success["targets"] == (False,)
    assert {rate.judge for rate in multi_turn_outcome(found).judges} >= {"refusal phrases", "targets"}
    with pytest.raises(ValueError, match="no conversations"):
        multi_turn(attack_lab.knows, attack_lab.tokenizer, [])


def test_transcripts_are_read_from_lists_and_lines(tmp_path: Path) -> None:
    entries = [
        {
            "messages": [
                {"role": "system", "content": "s"},
                {"role": "user", "content": "a"},
                {"role": "user", "content": "b"},
            ]
        },
        {"conversations": [{"from": "human", "value": "q"}], "behavior": "x", "targets": "t"},
    ]
    (tmp_path / "list.json").write_text(json.dumps(entries))
    (tmp_path / "lines.jsonl").write_text("\n".join(map(json.dumps, entries)) + "\n\n")
    read = load_transcripts(tmp_path / "list.json")
    assert read == load_transcripts(tmp_path / "lines.jsonl")
    assert [message["role"] for message in read[0].messages] == ["system", "user", "assistant", "user"]
    assert read[0].messages[2]["content"] is None
    assert read[0].behavior == "b"
    assert (read[1].behavior, read[1].targets) == ("x", ("t",))


def test_line_separators_of_unicode_in_a_message_end_no_line(tmp_path: Path) -> None:
    entries = [{"messages": [{"role": "user", "content": f"a{mark}b"}]} for mark in ("\u2028", "\u0085")]
    lines = "\r\n \n".join(json.dumps(entry, ensure_ascii=False) for entry in entries)
    (tmp_path / "lines.jsonl").write_text(lines, encoding="utf-8", newline="")
    assert [row.messages[0]["content"] for row in load_transcripts(tmp_path / "lines.jsonl")] == ["a\u2028b", "a\x85b"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no conversations"),
        ("[]", "no conversations"),
        ("{", "neither a JSON list nor JSON lines"),
        ('["x"]', "expected an object"),
        ('[{"text": "x"}]', "no list `messages`"),
        ('[{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]', "ends with"),
        ('[{"messages": [{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]}]', "follows no"),
        ('[{"messages": [{"role": "tool", "content": "a"}]}]', "the role 'tool'"),
        ('[{"messages": [{"role": "user", "content": " "}]}]', "no text"),
        ('[{"messages": [{"role": "user", "content": "a"}], "targets": [3]}]', "`targets`"),
        ('[{"messages": [{"role": "user", "content": "a"}], "targets": 3}]', "`targets`"),
        ('[{"messages": [{"role": "user", "content": "a"}], "behavior": 3}]', "`behavior`"),
    ],
)
def test_conversations_of_another_shape_are_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "talk.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        load_transcripts(tmp_path / "talk.json")


def test_every_layout_of_prompt_files_is_recognised(tmp_path):
    (tmp_path / "h.csv").write_text("Behavior,BehaviorID\nsing,a\n")
    (tmp_path / "j.json").write_text(json.dumps({"jailbreaks": [{"index": 0, "goal": "sing", "prompt": "do"}]}))
    (tmp_path / "b.json").write_text(json.dumps({"sing": ["do", "re"]}))
    sources = [load_prompts(tmp_path / name)[0].source for name in ("h.csv", "j.json", "b.json")]
    assert sources == ["harmbench", "jailbreakbench", "behaviors"]
    with pytest.raises(ValueError, match="layout is 'x'"):
        load_prompts(tmp_path / "b.json", "x")
    with pytest.raises(ValueError, match="JailbreakBench artifact"):
        load_prompts(tmp_path / "b.json", "jailbreakbench")


def test_wordings_come_from_a_column_or_a_file_and_belong_to_their_row(attack_lab):
    lab = attack_lab
    rows = [
        {**lab.rows[10], "other": [lab.rows[20]["question"], lab.rows[10]["question"]]},
        {**lab.rows[11], "other": None},
    ]
    config = ParaphraseConfig(column="other", max_new_tokens=20)
    found = paraphrase(lab.knows, lab.tokenizer, rows, config)
    assert found.rows == (0, 0)
    assert found.reworded.probability[1] == pytest.approx(found.original.probability[0], rel=1e-4)
    assert found.reworded.probability[0] < 0.5 < found.reworded.probability[1]
    named = paraphrase(
        lab.knows,
        lab.tokenizer,
        rows,
        ParaphraseConfig(max_new_tokens=20),
        rewordings={rows[0]["question"]: rows[0]["other"]},
    )
    assert named == found
    measures = {measure.name: measure for measure in paraphrase_outcome(found).measures}
    assert measures["probability, reworded question"].n == 2
    assert measures["probability, reworded question"].standard_error is None  # wordings of a single question
    assert paraphrase_outcome(found).examples[0].prompt == rows[0]["question"]  # the wording that leaks most
    with pytest.raises(ValueError, match="None of the 2 rows has another wording in the column 'nothing'"):
        paraphrase(None, lab.tokenizer, rows, ParaphraseConfig(column="nothing"))
    with pytest.raises(ValueError, match="A wording of row 0"):
        paraphrase(None, lab.tokenizer, [{**rows[0], "other": [3]}], config)
    with pytest.raises(ValueError, match="Row 0 has the columns"):
        paraphrase(None, lab.tokenizer, [{"prompt": "a"}], config)


def test_every_attack_has_one_form_of_call_and_of_outcome(attack_lab, tmp_path):
    lab = attack_lab
    rows = lab.forget[:4]
    prompt_rows = [row("Hello", "greet"), row("Hi", "greet", 1)]
    calls = {
        "relearn": (rows, RelearnConfig(steps=(0, 1))),
        "prefill": (rows, PrefillConfig(tokens=(0, 2), max_new_tokens=3)),
        "quantise": (rows, RoundingConfig(bits=(8,), max_new_tokens=3)),
        "paraphrase": (rows, ParaphraseConfig(max_new_tokens=3)),
        "soft_prompt": (rows, SoftPromptConfig(tokens=1, steps=1)),
        "static": (prompt_rows, PromptConfig(max_new_tokens=3)),
        "multi_turn": ([talk("Hello")], MultiTurnConfig(max_new_tokens=3)),
        "over_refusal": (XSTestPrompts(safe=prompt_rows, unsafe=prompt_rows), PromptConfig(max_new_tokens=3)),
    }
    found = []
    for name, (data, config) in calls.items():
        module = import_module(f"hf_unlearn.attacks.{name}")
        result = module.run(lab.knows, lab.tokenizer, data, config)
        one, other = (
            module.outcome(result, subject, settings={"config": config, "models": {subject: "m"}}, seconds=1.0)
            for subject in ("unlearned", "control")
        )
        assert one.attack == name
        assert one.measures or one.judges
        both = joined(one, other)
        assert {part.subject for part in (*both.measures, *both.judges)} == {"unlearned", "control"}
        assert both.settings["models"] == {"unlearned": "m", "control": "m"}
        found.append(both)
    write_attacks(tmp_path / "attacks.json", found)
    assert [outcome.as_dict() for outcome in read_attacks(tmp_path / "attacks.json")] == [o.as_dict() for o in found]
    with pytest.raises(ValueError, match="expected one attack"):
        joined(found[0], found[1])


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [
        (PromptConfig, {"defence": "prayer"}),
        (PromptConfig, {"copies": 0}),
        (PromptConfig, {"max_new_tokens": 0}),
        (MultiTurnConfig, {"assistant": "x"}),
        (MultiTurnConfig, {"batch_size": 0}),
        (ParaphraseConfig, {"max_new_tokens": 0}),
        (RoundingConfig, {"bits": ()}),
        (RoundingConfig, {"bits": (4, 4)}),
        (RoundingConfig, {"bits": (1,)}),
        (RoundingConfig, {"batch_size": 0}),
        (RelearnConfig, {"method": "magic"}),
        (RelearnConfig, {"lora_rank": 0}),
        (RelearnConfig, {"eval_batch_size": 0}),
        (RelearnConfig, {"max_grad_norm": 0.0}),
        (RelearnConfig, {"repeats": 0}),
    ],
)
def test_options_out_of_range_are_refused(kind, wrong):
    with pytest.raises(ValueError, match=r"expected|must be"):
        kind(**wrong)


def test_the_usual_judges_are_two_and_one_needs_the_request_in_the_answer():
    judges = prompts.usual_judges(["Describe the weather in Lisbon"])
    assert list(judges) == ["refusal phrases", "words of the request"]
    answers = ("The weather is mild in Lisbon.", "Cats are nice.", "I cannot.")
    verdicts = [
        [judge("Describe the weather in Lisbon", answer).success for answer in answers] for judge in judges.values()
    ]
    assert verdicts == [[True, True, False], [True, False, False]]
    assert isinstance(judges["refusal phrases"], RefusalJudge)
    assert isinstance(judges["words of the request"], TargetJudge)


def test_a_perplexity_that_raises_costs_no_answer():
    def breaks(answers):
        raise KeyError("no such token")

    found = prompts.judged(["Describe the weather"], ["It is mild today."], None, perplexity=breaks)
    assert found.judgement.success["refusal phrases"] == (True,)
    shown = static_outcome(found, "control")
    assert "KeyError: 'no such token'" in shown.absent["judge perplexity, control"]


def test_targets_of_some_conversations_judge_these_and_the_others_are_counted_as_not_judged():
    rows = [talk("a", behavior="first", targets=("tulip",)), talk("b", behavior="second")]
    judges = transcript_judges(rows)
    found = prompts.judged(["first", "second"], ["A red tulip.", "A red tulip."], judges)
    assert found.judgement.success["targets"] == (True, None)
    assert "1 of 2 answers could not be judged" in found.judgement.failures["targets"]
    assert "targets" not in transcript_judges(rows[1:])
