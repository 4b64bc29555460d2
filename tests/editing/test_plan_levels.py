"""PCR at given levels: points and directions keep their distances, levels come from what benign text does."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_lab import SmallLab
from test_plan_edit import WORDS, plan_of, said_at, word_probabilities

from hf_unlearn.editing import levels
from hf_unlearn.editing.added import edits_in_force
from hf_unlearn.editing.concepts import word_concepts
from hf_unlearn.editing.edit_rows import prompt_of
from hf_unlearn.editing.levels import calibrate_eps
from hf_unlearn.editing.mlp import mlp_output


@torch.no_grad()
def outputs_at(model: Any, ids: list[int], places: list[int], edits: Any = (), layer: int = 2) -> torch.Tensor:
    """What the edited matrix puts out at some places, one row alone."""
    taken: list[torch.Tensor] = []
    with edits_in_force(model, edits):  # before this hook, which then sees what the block gets
        handle = mlp_output(model, layer).module.register_forward_hook(lambda module, given, out: taken.append(out))
        model(input_ids=torch.tensor([ids]))
        handle.remove()
    return taken[0][0, places].double()


def before_words(model: Any, lab: SmallLab, edits: Any = ()) -> torch.Tensor:
    return torch.cat([outputs_at(model, before, [len(before) - 1], edits) for before, _ in said_at(lab)])


def retained(model: Any, lab: SmallLab) -> torch.Tensor:
    found = []
    for row in lab.rows("retain"):
        places = list(range(len(prompt_of(row)) - 1, len(row["input_ids"]) - 1))  # what predicts the answer
        found.append(outputs_at(model, row["input_ids"], places))
    return torch.cat(found)


def points(model: Any, lab: SmallLab, source: str) -> torch.Tensor:
    """The concepts, word by word, from their definition."""
    table = model.get_input_embeddings().weight.detach().double()
    found = []
    for concept in word_concepts(lab.tokenizer, WORDS):
        if source == "embedding":
            found.append(table[list(concept.spellings[0])].mean(0))
            continue
        said = []
        for row in lab.rows():
            ids = row["input_ids"]
            for spelling in concept.spellings:
                size = len(spelling)
                ends = [at + size - 1 for at in range(len(ids)) if tuple(ids[at : at + size]) == spelling]
                said += [(ids, end) for end in ends]
        assert said
        distinct = {(tuple(ids), end) for ids, end in said}
        found.append(torch.cat([outputs_at(model, list(ids), [end]) for ids, end in sorted(distinct)]).mean(0))
    return torch.stack(found)


def directions(model: Any, lab: SmallLab) -> torch.Tensor:
    head = model.lm_head.weight.detach().double()
    ids = sorted({token for concept in word_concepts(lab.tokenizer, WORDS) for token in concept.first})
    return (head[ids] - head.mean(0)) * model.model.norm.weight.detach().double()


@pytest.mark.parametrize("source", ["embedding", "activation"])
def test_every_output_keeps_the_distance_from_every_point(lab: SmallLab, source: str) -> None:
    model = lab.model()
    named = points(model, lab, source)
    eps = 1.05 * float(torch.cdist(before_words(model, lab), named).max())  # all pairs are too near
    plan = plan_of(lab, model, source=source, eps=eps, variants=0)
    distances = torch.cdist(before_words(model, lab, plan.edits), named)
    assert float(distances.min()) >= eps * (1 - 1e-5)
    assert plan.edits[0].certificate["feasible"]
    assert float(distances.min()) == pytest.approx(eps, rel=1e-4), "and no more than it has to"


def test_every_output_keeps_below_the_level_of_every_direction(lab: SmallLab) -> None:
    model = lab.model()
    products = before_words(model, lab) @ directions(model, lab).T
    level = float(products.median())
    plan = plan_of(lab, model, eps=level, variants=0)
    after = before_words(model, lab, plan.edits) @ directions(model, lab).T
    assert float(products.max()) > level + 0.1
    assert float(after.max()) <= level + 1e-4


@pytest.mark.parametrize("source", ["embedding", "activation", "unembedding"])
def test_a_percentile_is_what_retained_answers_do(lab: SmallLab, source: str) -> None:
    model = lab.model()
    plan = plan_of(lab, model, source=source, eps_percentile=30.0, variants=0)
    after, benign = before_words(model, lab, plan.edits), retained(model, lab)
    if source == "unembedding":
        named = directions(model, lab)
        limits = np.percentile((benign @ named.T).numpy(), 70.0, axis=0)
        assert ((after @ named.T).numpy() <= limits + 1e-4).all()
        before = (before_words(model, lab) @ named.T).numpy()
        assert (before > limits + 1e-3).any()
    else:
        named = points(model, lab, source)
        limits = np.percentile(torch.cdist(benign, named).numpy(), 30.0, axis=0)
        assert (torch.cdist(after, named).numpy() >= limits * (1 - 1e-4)).all()


@pytest.mark.parametrize("kind", ["ball", "half_space"])
def test_levels_are_percentiles_of_each_concept(kind: Any) -> None:
    g = torch.Generator().manual_seed(0)
    outputs, named = torch.randn(41, 3, generator=g), torch.randn(2, 3, generator=g)
    for percentile in (0.0, 25.0, 100.0):
        found = calibrate_eps(outputs, named, kind, percentile)
        for column, concept in enumerate(named):
            if kind == "ball":
                values = sorted(float((o - concept).norm()) for o in outputs)
                wanted = values[int(percentile / 100 * 40)]
            else:
                wanted = sorted((float(o @ concept) for o in outputs), reverse=True)[int(percentile / 100 * 40)]
            assert float(found[column]) == pytest.approx(wanted, rel=1e-5)


def test_a_soft_margin_pays_less_and_lacks_something(lab: SmallLab) -> None:
    model = lab.model()
    level = float((before_words(model, lab) @ directions(model, lab).T).median()) - 2.0
    hard = plan_of(lab, model, eps=level, variants=0).edits[0].certificate
    soft = plan_of(lab, model, eps=level, variants=0, soft_margin=1e-3).edits[0].certificate
    assert soft["cost"] < hard["cost"]
    assert soft["penalty"] > 0 == hard["penalty"]
    assert soft["smallest_margin"] < -1e-3 < hard["smallest_margin"]


@pytest.mark.parametrize("source", ["embedding", "activation"])
def test_distances_of_points_are_searched_for_the_probability(lab: SmallLab, source: str) -> None:
    model = lab.model()
    plan = plan_of(lab, model, source=source, probability=0.1, variants=0)
    with edits_in_force(model, plan.edits):
        assert max(word_probabilities(model, lab)) <= 0.1 * (1 + 1e-3)


def test_a_probability_that_points_do_not_reach_is_refused(lab: SmallLab) -> None:
    with pytest.raises(
        ValueError, match=r"Keeping 64 times the usual distance .* above 1e-30: outputs of blocks \[2\]"
    ):
        plan_of(lab, source="embedding", probability=1e-30, variants=0)


def test_levels_that_contradict_each_other_are_refused(lab: SmallLab, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the solver finds contradictory (tests of its own say when) is named, and no plan is made."""
    solve = levels.solve_pcr

    def contradicting(*given: Any, **options: Any) -> Any:
        edit = solve(*given, **options)
        return replace(edit, certificate=replace(edit.certificate, conflict=((0, 1), (2, 0))))

    monkeypatch.setattr(levels, "solve_pcr", contradicting)
    with pytest.raises(
        ValueError, match=r"No edit of block 2 satisfies all constraints: 2 pairs .* contradict each other"
    ):
        plan_of(lab, eps=0.0, variants=0)


def test_a_percentile_needs_retained_rows(lab: SmallLab) -> None:
    with pytest.raises(ValueError, match="eps_percentile is measured on retain rows; give retain_dataset"):
        plan_of(lab, retain=None, eps_percentile=10.0)


def test_a_word_that_no_row_says_has_no_activation(lab: SmallLab) -> None:
    with pytest.raises(ValueError, match="No row says 'zebra', so its activation is not known"):
        plan_of(lab, words=[*WORDS, "zebra"], source="activation", eps=1.0, variants=0)


def test_example_texts_are_points_that_the_named_places_keep_away_from(lab: SmallLab, tmp_path: Path) -> None:
    texts = {"kitchens": ["a golden greyhound", "fed on pepper"], "music": ["the onyx tuba every week"]}
    model = lab.model()
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps({"concept": n, "text": t}) + "\n" for n, own in texts.items() for t in own))
    plans = [
        plan_of(lab, model, words=None, texts=given, source="activation", positions="last_prompt", eps_percentile=60.0)
        for given in (texts, str(file))
    ]
    assert torch.equal(plans[0].edits[0].lora_b, plans[1].edits[0].lora_b)
    assert plans[0].settings["number_of_texts"] == 2
    assert plans[0].settings["texts"] is None
    wanted = []
    for own in texts.values():
        found = [lab.tokenizer(text)["input_ids"] for text in own]
        states = [outputs_at(model, ids, list(range(len(ids))), ()) for ids in found]
        wanted.append(torch.cat(states).mean(0))
    kept = retained(model, lab)
    for point in wanted:
        level = torch.linalg.vector_norm(kept - point, dim=1).double().quantile(0.6)
        for row in lab.rows():
            place = len(prompt_of(row)) - 1
            after = outputs_at(model, row["input_ids"], [place], plans[0].edits)[0]
            assert float(torch.linalg.vector_norm(after - point)) >= float(level) * (1 - 1e-4)
    assert "reach" not in plans[0].measures


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"source": "unembedding", "eps": 1.0}, "set source='activation'"),
        ({"source": "activation"}, "and eps or"),
        ({"source": "activation", "eps": 1.0, "positions": "occurrence"}, "texts are said nowhere"),
        ({"source": "activation", "eps": 1.0, "texts": {"a": []}}, "hold no text"),
        ({"source": "activation", "eps": 1.0, "texts": "/nowhere.jsonl"}, "which is not a file"),
    ],
)
def test_texts_that_cannot_be_used_are_refused(lab: SmallLab, changes: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        plan_of(lab, **{"words": None, "texts": {"a": ["text"]}, "positions": "last_prompt", **changes})
