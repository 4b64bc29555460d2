"""No micro-batch makes the host wait for the device more often than transformers' own Trainer does."""

from __future__ import annotations

from collections import Counter
from functools import partial

import pytest
import torch
from kit import primal_dual, unlearning
from transformers import Trainer, TrainingArguments
from waits import Waits

from hf_unlearn.data import UnlearningCollator, prepare_dataset
from hf_unlearn.losses.scores import Scores

ACCUMULATION = 4
# What the end of a step may wait for: one copy of "stop?", "finite?" and the number of tokens (base._close_step).
END_OF_STEP = Counter({"Tensor.tolist": 1})

CASES = {
    "lmf, target by token": partial(primal_dual, forget_target_by="token"),
    "lmf, target by example": partial(primal_dual, forget_target_by="example"),
    "lmf, target by both": partial(primal_dual, forget_target_by="both"),
    "lmf, annealed": partial(primal_dual, forget_target_mode="anneal"),
    "lmf, two-sided": partial(primal_dual, forget_target_mode="two_sided"),
    "lmf, no target": partial(unlearning, forget_loss="lmf"),
    "grad_ascent": partial(unlearning, forget_loss="grad_ascent"),
    "wga": partial(unlearning, forget_loss="wga"),
    "satimp": partial(unlearning, forget_loss="satimp"),
    "entropy": partial(unlearning, forget_loss="entropy"),
    "kl_uniform": partial(unlearning, forget_loss="kl_uniform"),
    "npo": partial(unlearning, forget_loss="npo"),
    "simnpo": partial(unlearning, forget_loss="simnpo"),
    "dpo": partial(unlearning, forget_loss="dpo"),
    "idk_nll": partial(unlearning, forget_loss="idk_nll"),
    "rmu, no reference": partial(unlearning, forget_loss="rmu", forget_loss_kwargs={"layers": [1]}),
}
# These run the reference model beside the trained one in every micro-batch.
WITH_REFERENCE = {
    "undial": partial(unlearning, forget_loss="undial"),
    "kl": partial(unlearning, forget_loss="npo", retain_loss="kl"),
    "kl, primal-dual": partial(primal_dual, retain_loss="kl", retain_eps=0.1),
    "rmu": partial(unlearning, forget_loss="rmu", forget_loss_kwargs={"layers": [1]}, retain_loss="rmu"),
    "rerouting": partial(
        unlearning, forget_loss="rerouting", forget_loss_kwargs={"layers": [1, 2]}, retain_loss="rerouting"
    ),
}


def watch(trainer):
    """The waits of every micro-batch of a step, and of fetching and counting its micro-batches."""
    steps, fetches = [], []
    training_step, get_batch_samples = trainer.training_step, trainer.get_batch_samples

    def watched_step(*args, **kwargs):
        waits = Waits()
        with waits.watching():
            loss = training_step(*args, **kwargs)
        steps.append(waits.count)
        return loss

    def watched_fetch(batches, *args, **kwargs):
        waits = Waits()
        with waits.watching():
            fetched = get_batch_samples(waits.unwatched(batches), *args, **kwargs)
        fetches.append(waits.count)
        return fetched

    trainer.training_step, trainer.get_batch_samples = watched_step, watched_fetch
    trainer.train()
    assert len(steps) == ACCUMULATION
    assert len(fetches) == 1
    return steps, fetches


def settings(**kwargs):
    return {"per_device_train_batch_size": 2, "gradient_accumulation_steps": ACCUMULATION, "max_steps": 1, **kwargs}


@pytest.fixture(scope="module")
def plain(lab, tmp_path_factory):
    """What transformers' Trainer waits for in a micro-batch, with the same model and padded rows."""
    args = TrainingArguments(
        output_dir=str(tmp_path_factory.mktemp("plain")),
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        **settings(),
    )
    trainer = Trainer(
        model=lab.model(trained=True),
        args=args,
        train_dataset=prepare_dataset(lab.retain, lab.tokenizer, name="plain"),
        data_collator=UnlearningCollator(pad_token_id=lab.tokenizer.pad_token_id),
    )
    steps, fetches = watch(trainer)
    assert len({tuple(sorted(count.items())) for count in steps}) == 1
    return steps[0], fetches[0]


def build(lab, tmp_path, make, **kwargs):
    """A trainer with 16 rows to forget: its step has all its micro-batches, padded ones among them."""
    inputs = {"forget_dataset": lab.retain, "retain_dataset": {"people": lab.forget, "facts": lab.facts}}
    return make(lab, tmp_path, inputs=inputs, **settings(**kwargs))


def check(trainer, plain, forwards=1):
    steps, fetches = watch(trainer)
    allowed = Counter({name: forwards * count for name, count in plain[0].items()})
    for number, count in enumerate(steps, start=1):
        ends = number % ACCUMULATION == 0
        assert count - allowed == (END_OF_STEP if ends else Counter()), f"micro-batch {number}"
    for count in fetches:
        assert count - plain[1] == Counter()


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "whole logits"])
@pytest.mark.parametrize("name", CASES)
def test_a_micro_batch_waits_no_more_than_plain_fine_tuning(lab, tmp_path, plain, name, fused):
    check(build(lab, tmp_path, CASES[name], fused_head=fused), plain)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "whole logits"])
@pytest.mark.parametrize("name", WITH_REFERENCE)
def test_a_reference_adds_what_its_forward_pass_waits_for(lab, tmp_path, plain, name, fused):
    """transformers looks at the mask once in each forward pass of any model, and a reference is a second model."""
    check(build(lab, tmp_path, WITH_REFERENCE[name], fused_head=fused), plain, forwards=2)


@pytest.mark.parametrize(
    "wait",
    [
        lambda scores: scores.index.sum().item(),
        lambda scores: bool(scores.mask.any()),
        lambda scores: float(scores.lengths.sum()),
        lambda scores: scores.lengths.tolist(),
        lambda scores: scores.mask[scores.mask],
        lambda scores: scores.mask.nonzero(),
        lambda scores: scores.index.unique(),
        lambda scores: scores.index.cpu(),
        lambda scores: scores.index.to("cpu"),
        lambda scores: torch.equal(scores.index, scores.index),
        lambda scores: torch.repeat_interleave(scores.lengths),
        lambda scores: torch.tensor(1.0, device=scores.index.device),
        lambda scores: scores.lengths.new_tensor(1),
    ],
    ids=lambda wait: wait.__code__.co_names[-1],
)
def test_one_wait_in_the_loss_path_is_noticed(lab, tmp_path, plain, monkeypatch, wait):
    row_sums = Scores.row_sums

    def with_a_wait(scores, values):
        wait(scores)
        return row_sums(scores, values)

    monkeypatch.setattr(Scores, "row_sums", with_a_wait)
    with pytest.raises(AssertionError, match="micro-batch 1"):
        check(build(lab, tmp_path, primal_dual), plain)


def test_a_step_of_several_gradients_waits_once_for_all_of_them(lab, tmp_path):
    """The first step is checked (is the move felt?) and may wait; afterwards micro-batches only gather."""
    trainer = unlearning(
        lab,
        tmp_path,
        forget_loss="npo",
        sam_rho=0.05,
        gradient_projection="tensor",
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=3,
    )
    steps, training_step = [], trainer.training_step

    def watched_step(*args, **kwargs):
        waits = Waits()
        with waits.watching():
            loss = training_step(*args, **kwargs)
        steps.append(waits.count)
        return loss

    trainer.training_step = watched_step
    trainer.train()
    assert len(steps) >= 5
    assert sum(steps[0].values()) == 0
    assert steps[2] == Counter()
    waits, batch = Waits(), torch.ones(2, 5, dtype=torch.int64)
    mask = torch.tensor([[1] * 5, [1, 1, 1, 0, 0]])
    with waits.watching():  # transformers looks at the mask in every forward pass
        trainer.model(input_ids=batch, attention_mask=mask)
    forward_passes = 3 * 2  # forget, forget after the ascent, retain; two micro-batches
    allowed = Counter({name: count * forward_passes for name, count in waits.count.items()})
    assert steps[3] == END_OF_STEP + allowed
