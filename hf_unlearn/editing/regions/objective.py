"""Losses of a bounded edit and their gradients, over all rows and all ranks.

Shapes: B rows of a batch, F free positions, V tokens that may be chosen, (d, m) shape of an edited matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from ...data import pad_rows
from ...losses import IGNORE_INDEX
from ...losses.rows import row_kl_to_reference
from ...losses.scores import Scores
from ...trainers.accounting import all_reduce_sums
from ...trainers.forward import ModelForward
from ...trainers.measure import rank_batches
from ..added import added_outputs
from .changes import Change
from .losses import region_loss
from .relaxed import MixedEmbeddings, attack, round_to_tokens, starts

Gradients = dict[int, list[Tensor]]


@dataclass(frozen=True, kw_only=True)
class Terms:
    """
    Means over all rows, in nats, the same on every rank.

    Args:
        region (`float`):
            The region's loss, capped.
        retain (`float`):
            KL divergence from the unedited model, per retain token; 0 without retain rows.
        total (`float`):
            What is minimised.
    """

    region: float
    retain: float
    total: float


class Objective:
    """
    `sign * mean region loss + retain_weight * mean KL(unedited || edited)` of the model with changes in force.

    The KL divergence, and not the likelihood of the retain rows: it and its slope are zero at the unedited model, so
    that it never asks for an edit of its own; what it compares with costs the hidden states of one forward pass.

    Args:
        model (`PreTrainedModel`, or what PEFT or an engine has made of it):
            The model, in evaluation mode, its parameters without gradient.
        rows (`Dataset`):
            From [`region_rows`].
        retain (`Dataset`, *optional*):
            From [`retain_dataset`].
        token_ids (`Sequence[int]`):
            K, or none.
        sign (`float`):
            1 for a region to go to, -1 for one to leave.
        cap (`float`):
            Nats above which a row has no gradient.
        retain_weight (`float`):
            Of the KL divergence.
        batch_size (`int`):
            Rows a forward pass.
        pad_token_id (`int`):
            Id to pad with.
        run (`Any`):
            The accelerator, or what stands for one.
    """

    def __init__(
        self,
        model: Any,
        rows: Dataset,
        retain: Dataset | None,
        *,
        token_ids: Sequence[int],
        sign: float,
        cap: float,
        retain_weight: float,
        batch_size: int,
        pad_token_id: int,
        run: Any,
    ) -> None:
        self.model, self.token_ids, self.run = model, tuple(token_ids), run
        self.sign, self.cap, self.retain_weight = sign, cap, retain_weight
        pad = partial(_pad, pad_token_id=pad_token_id)
        self.count = len(rows)
        self.batches = list(rank_batches(rows, batch_size, run, pad, None))
        self.retain_batches: list[dict[str, Tensor]] = []
        self.retain_count = 0
        self.forward = ModelForward(getattr(model, "module", model))
        self.forward.check(model, self.batches[0], run)
        self._references: list[Scores] = []
        if retain is not None:
            self.retain_count = sum(sum(label != IGNORE_INDEX for label in row[1:]) for row in retain["labels"])
            self.retain_batches = list(rank_batches(retain, batch_size, run, pad, None))
            with torch.no_grad():
                self._references = [self._scores(batch) for batch in self.retain_batches]

    def evaluate(self, changes: Mapping[int, Change], *, slopes: bool = True) -> tuple[Terms, Gradients]:
        """The terms at the changes, and the gradients of the total by layer in the order of its parameters."""
        parameters = [parameter for change in changes.values() for parameter in change.parameters]
        sums = {"region": 0.0, "retain": 0.0}
        total = [torch.zeros_like(parameter) for parameter in parameters]

        def add(name: str, loss: Tensor, weight: float) -> None:
            sums[name] += float(loss.detach())
            if not slopes:
                return
            found = torch.autograd.grad(loss, parameters, allow_unused=True)
            for into, gradient in zip(total, found, strict=True):
                if gradient is not None:
                    into.add_(gradient, alpha=weight)

        with torch.set_grad_enabled(slopes), added_outputs(self.model, terms_of(changes)):
            for number in range(len(self.batches)):
                add("region", self.region_sum(number), self.sign / self.count)
            for batch, reference in zip(self.retain_batches, self._references, strict=True):
                kl, _ = self._scores(batch).of_pairs(row_kl_to_reference, reference)
                add("retain", kl, self.retain_weight / self.retain_count)
        return self._terms(sums), _by_layer(changes, self._summed(total) if slopes else total)

    def region_sum(self, number: int) -> Tensor:
        """Sum of the capped losses of one of this rank's batches, within the context of an edit."""
        return region_loss(self._scores(self.batches[number]), self.token_ids, self.cap)[0]

    def mean_of_rows(self, values: Callable[[int], Tensor], changes: Mapping[int, Change]) -> float:
        """Mean over all rows of `values(number of the batch)` `(B,)` with the changes in force."""
        with added_outputs(self.model, terms_of(changes)):
            summed = sum(float(values(number).double().sum()) for number in range(len(self.batches)))
        return self._reduced({"sum": summed})["sum"] / self.count

    def row_losses(self, number: int) -> Tensor:
        """Losses `(B,)` of a batch without a cap; 0 for a row that only keeps the ranks in step."""
        with torch.no_grad():
            return region_loss(self._scores(self.batches[number]), self.token_ids)[1]

    def _scores(self, batch: Mapping[str, Tensor]) -> Scores:
        return self.forward(self.model, [batch])[0]

    def _terms(self, sums: Mapping[str, float]) -> Terms:
        summed = self._reduced(sums)
        region, retain = summed["region"] / self.count, summed["retain"] / max(self.retain_count, 1)
        return Terms(region=region, retain=retain, total=self.sign * region + self.retain_weight * retain)

    def _reduced(self, sums: Mapping[str, float]) -> dict[str, float]:
        found = {key: torch.tensor(value, dtype=torch.float64) for key, value in sums.items()}
        return {key: float(value) for key, value in all_reduce_sums(found, self.run).items()}

    def _summed(self, gradients: list[Tensor]) -> list[Tensor]:
        if self.run.num_processes == 1:
            return gradients
        return [self.run.reduce(gradient, reduction="sum") for gradient in gradients]


class RelaxedObjective(Objective):
    """
    The same where each row's loss is the least over its relaxed prompts; the adversary goes on from where it was.

    The gradient of a minimum is that of the loss at the minimiser (Danskin), so that the adversary's point is held
    fixed while the edit's gradient is taken.

    Args:
        mixing ([`MixedEmbeddings`]):
            Of the model.
        positions (`int`):
            F; the rows have room for them.
        inner_steps (`int`):
            Steps of the adversary before each gradient of the edit.
        attack_steps, restart_every (`int`):
            At every `restart_every`-th gradient the adversary makes `attack_steps` steps, and as many from its first
            points too: an edit else learns to defend against the one point that the adversary is stuck at.
        length (`float`):
            Of its first step.
        random, seed:
            As in [`starts`].
        *arguments, **options:
            As in [`Objective`].
    """

    def __init__(
        self,
        *arguments: Any,
        mixing: MixedEmbeddings,
        positions: int,
        inner_steps: int,
        attack_steps: int,
        restart_every: int,
        length: float,
        random: bool,
        seed: int,
        **options: Any,
    ) -> None:
        super().__init__(*arguments, **options)
        self.mixing, self.positions = mixing, positions
        self.inner_steps, self.length = inner_steps, length
        self.attack_steps, self.restart_every = attack_steps, restart_every
        self.random, self.seed = random, seed
        self._gradients = 0
        # on the CPU: (rows of this rank, F, V) numbers
        self.points = [self._start(number) for number in range(len(self.batches))]

    def evaluate(self, changes: Mapping[int, Change], *, slopes: bool = True) -> tuple[Terms, Gradients]:
        """As in [`Objective`]."""
        if slopes:
            if self._gradients and self._gradients % self.restart_every == 0:
                self.harden(changes, self.attack_steps, fresh=True)
            self._gradients += 1
        return super().evaluate(changes, slopes=slopes)

    def region_sum(self, number: int) -> Tensor:
        """As in [`Objective`], after some steps of the adversary."""
        if self.inner_steps:
            self.points[number] = self._attacked(number, self.points[number], self.inner_steps)[0]
        with self.mixing.mixed(self._columns(number), self.points[number]):
            return super().region_sum(number)

    def at_points(self, changes: Mapping[int, Change]) -> Terms:
        """The terms at the adversary's points as they are."""
        kept, self.inner_steps = self.inner_steps, 0
        try:
            return self.evaluate(changes, slopes=False)[0]
        finally:
            self.inner_steps = kept

    def harden(self, changes: Mapping[int, Change], steps: int, *, fresh: bool) -> None:
        """
        Moves the adversary on by `steps` steps at the changes; with `fresh` it tries its first points again too, and
        keeps what is better for each row.
        """
        with added_outputs(self.model, terms_of(changes)):
            for number in range(len(self.batches)):
                best, lowest = self._attacked(number, self.points[number], steps)
                if fresh:
                    other, losses = self._attacked(number, self._start(number), steps)
                    best = torch.where((losses < lowest).cpu()[:, None, None], other, best)
                self.points[number] = best

    def relaxed_losses(self, number: int) -> Tensor:
        """Losses `(B,)` at the adversary's points, without a cap."""
        with self.mixing.mixed(self._columns(number), self.points[number]):
            return self.row_losses(number)

    def rounded_losses(self, number: int) -> Tensor:
        """Losses `(B,)` with the likeliest token at each free position, without a cap."""
        with self.mixing.mixed(self._columns(number), round_to_tokens(self.points[number])):
            return self.row_losses(number)

    def _attacked(self, number: int, start: Tensor, steps: int) -> tuple[Tensor, Tensor]:
        columns = self._columns(number)

        def evaluate(mixtures: Tensor) -> tuple[Tensor, Tensor]:
            with torch.enable_grad():
                mixtures = mixtures.detach().requires_grad_()
                with self.mixing.mixed(columns, mixtures):
                    total, losses = region_loss(self._scores(self.batches[number]), self.token_ids)
                (gradient,) = torch.autograd.grad(total, mixtures)
            return losses, gradient

        best, losses = attack(evaluate, start.to(self.run.device), steps=steps, length=self.length)
        return best.cpu(), losses

    def _columns(self, number: int) -> Tensor:
        free_at = self.batches[number]["free_at"]
        return free_at[:, None] + torch.arange(self.positions, device=free_at.device)

    def _start(self, number: int) -> Tensor:
        rows = self.batches[number]["index"].tolist()
        return starts(rows, self.positions, self.mixing.choices, random=self.random, seed=self.seed)


def terms_of(changes: Mapping[int, Change]) -> dict[int, Callable[[Tensor], Tensor]]:
    """What the changes add to the outputs of their matrices."""
    return {layer: change.added for layer, change in changes.items()}


def _pad(rows: Sequence[Mapping[str, Any]], pad_token_id: int) -> dict[str, Tensor]:
    batch = pad_rows(rows, pad_token_id=pad_token_id)
    batch["index"] = torch.tensor([row["index"] for row in rows])
    if "free_at" in rows[0]:
        batch["free_at"] = torch.tensor([row["free_at"] for row in rows])
    return batch


def _by_layer(changes: Mapping[int, Change], gradients: Sequence[Tensor]) -> Gradients:
    left = iter(gradients)
    return {layer: [next(left) for _ in change.parameters] for layer, change in changes.items()}
