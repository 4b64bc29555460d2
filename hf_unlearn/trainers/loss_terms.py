"""From a collated batch to its loss terms: a forward pass of the model, and one of the reference where needed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import Trainer

from ..losses import (
    IGNORE_INDEX,
    LossOutput,
    control_vector,
    rerouting_loss,
    rerouting_retain_loss,
    rmu_forget_loss,
    rmu_retain_loss,
)
from ..losses.scores import Scores
from ..probes.taps import Layer, hidden_states, resolve_layer
from .accounting import ASCENDED, FORGET, FORGET_NLL, FORGET_SEQUENCES, FORGET_TOKENS
from .objective import HIDDEN_FORGET, HIDDEN_RETAIN, ForgetBatch, ForgetObjective, retain_loss, targeted_forget_loss

if TYPE_CHECKING:
    from .base import UnlearningTrainer

States = dict[Layer, list[Tensor]]
"""Hidden states `(B_i, T_i, d)` of each part of a batch, by layer."""
_RETAIN: dict[str, Callable[..., LossOutput]] = {
    "rmu": rmu_retain_loss,
    "rerouting": rerouting_retain_loss,
}


@dataclass(frozen=True, kw_only=True)
class HiddenLosses:
    """
    RMU and representation rerouting on chosen layers: means over the layers of the losses of each.

    Args:
        layers (`tuple`):
            Layers, as for [`~hf_unlearn.probes.hidden_states`].
        control (`Tensor`, *optional*):
            RMU's control vector `(d,)`.
    """

    layers: tuple[Layer, ...]
    control: Tensor | None = None

    @classmethod
    def of(cls, objective: ForgetObjective, retain: str, model: Any) -> HiddenLosses | None:
        """
        What the chosen losses ask for; None where neither looks at hidden states.

        Raises:
            ValueError: no layers, one that the model does not have, or a retain loss without a forget loss that names
                layers.
        """
        if objective.name not in HIDDEN_FORGET:
            if retain in HIDDEN_RETAIN:
                raise ValueError(
                    f'retain_loss="{retain}" keeps the states of the layers that the forget loss names, and '
                    f'forget_loss="{objective.name}" names none. Use retain_loss="nll" or "kl", or a forget_loss of '
                    f"{', '.join(HIDDEN_FORGET)}."
                )
            return None
        layers = objective.kwargs.get("layers")
        if not isinstance(layers, list | tuple) or not layers:
            raise ValueError(
                f'forget_loss="{objective.name}" needs its layers, such as forget_loss_kwargs={{"layers": [7]}}; got '
                f"{layers!r}."
            )
        found = tuple(resolve_layer(model, layer) for layer in layers)
        if objective.name == "rerouting":
            return cls(layers=found)
        width = model.config.get_text_config().hidden_size
        scale, seed = float(objective.kwargs.get("scale", 6.5)), int(objective.kwargs.get("seed", 0))
        return cls(layers=found, control=control_vector(width, scale=scale, seed=seed))

    def forget(self, states: States, frozen: States, rows: Mapping[str, Tensor]) -> LossOutput:
        """The forget loss of part 0, at its response tokens."""
        at = _tokens(rows)
        if self.control is not None:
            control = self.control
            return _mean([rmu_forget_loss(states[k][0], control, **at) for k in self.layers])
        return _mean([rerouting_loss(states[k][0], frozen[k][0], **at) for k in self.layers])

    def retain(self, name: str, part: int, states: States, frozen: States, rows: Mapping[str, Tensor]) -> LossOutput:
        """The retain loss of a part, at its response tokens."""
        at = _tokens(rows)
        return _mean([_RETAIN[name](states[k][part], frozen[k][part], **at) for k in self.layers])


class LossTerms(Trainer):
    """The part of [`UnlearningTrainer`] that computes losses."""

    def watched_layers(self: UnlearningTrainer) -> list[Layer]:
        """Layers whose hidden states the losses look at."""
        return [] if self.hidden is None else list(self.hidden.layers)

    def _watch(
        self: UnlearningTrainer, model: Any, parts: Sequence[Mapping[str, Any]], layers: Sequence[Layer]
    ) -> tuple[list[Scores], States]:
        """Scores of every part under the model that is trained, and its hidden states."""
        if not layers:
            return self.forward(model, parts), {}
        with hidden_states(model, layers) as taken:
            scores = self.forward(model, parts)
        return scores, split_states(taken, parts)

    def _watch_reference(
        self: UnlearningTrainer, model: Any, parts: Sequence[Mapping[str, Any]], layers: Sequence[Layer]
    ) -> tuple[list[Scores | None], States]:
        if self.reference is None:
            return [None] * len(parts), {}
        whole = [dict(part) for part in parts]
        scores, taken = self.reference.scores(model, self.accelerator.unwrap_model(model), whole, layers)
        return list(scores), split_states(taken, parts)

    def _loss_terms(
        self: UnlearningTrainer, model: Any, inputs: Mapping[str, Any]
    ) -> tuple[LossOutput, dict[str, LossOutput]]:
        """Forward pass and loss terms of a collated batch; `metrics["nll_total"]` sums the forget rows' NLL."""
        forget, retain = inputs["forget"], inputs.get("retain", {})
        parts = [forget, *retain.values()]
        if self.objective.needs_alternative:
            parts.append(forget["alternative"])
        scores, states = self._watch(model, parts, self.watched_layers())
        ref, frozen = self._watch_reference(model, parts, [] if self.hidden is None else self.hidden.layers)
        answers = scores[0]
        batch = ForgetBatch(
            scores=answers,
            ref=ref[0],
            ref_logps=self._cached("answer", forget, answers),
            alternative=scores[-1] if self.objective.needs_alternative else None,
            ref_alternative_logps=self._cached("alternative", forget, answers),
        )
        if self.hidden is not None:
            term = self.hidden.forget(states, frozen, forget)
        elif self.target is not None:
            term = targeted_forget_loss(self.objective, batch, self.target, self.normalizer)
        else:
            term = self.objective(batch)
        nll = -answers.log_probs()
        term.metrics["nll_total"] = nll.sum()
        term.metrics["nll_rows"] = answers.row_sums(nll) / answers.lengths.clamp(min=1)
        self.watch_forget(term, forget, {layer: kept[0] for layer, kept in states.items()})
        retains = {
            name: self._retain_loss(1 + i, scores, ref, states, frozen, part)
            for i, (name, part) in enumerate(retain.items())
        }
        return term, retains

    def watch_forget(
        self: UnlearningTrainer, term: LossOutput, forget: Mapping[str, Any], states: Mapping[Layer, Tensor]
    ) -> None:
        """Hook: what a method adds to the metrics of the forget term, from the forget rows' states `(B, T, d)`."""

    def _retain_terms(
        self: UnlearningTrainer, model: Any, batches: Mapping[str, Mapping[str, Any]]
    ) -> dict[str, LossOutput]:
        """Retain losses of padded batches by set, from one forward pass."""
        parts = list(batches.values())
        hidden = self.hidden is not None and self.args.retain_loss in HIDDEN_RETAIN
        layers = list(self.hidden.layers) if hidden and self.hidden is not None else []
        scores, states = self._watch(model, parts, layers)
        ref: list[Scores | None] = [None] * len(parts)
        frozen: States = {}
        if hidden or self.args.retain_loss == "kl":
            ref, frozen = self._watch_reference(model, parts, layers)
        return {
            name: self._retain_loss(i, scores, ref, states, frozen, part)
            for i, (name, part) in enumerate(batches.items())
        }

    def _retain_loss(
        self: UnlearningTrainer,
        number: int,
        scores: Sequence[Scores],
        ref: Sequence[Scores | None],
        states: States,
        frozen: States,
        part: Mapping[str, Any],
    ) -> LossOutput:
        name = self.args.retain_loss
        if name in HIDDEN_RETAIN:
            assert self.hidden is not None
            return self.hidden.retain(name, number, states, frozen, part)
        return retain_loss(name, scores[number], ref[number])

    def _cached(self: UnlearningTrainer, kind: str, forget: Mapping[str, Tensor], like: Scores) -> Tensor | None:
        cache = self.reference_logps.get(kind)
        if cache is None:
            return None
        if cache.device != like.index.device:
            cache = self.reference_logps[kind] = cache.to(like.index.device)
        return cache[forget["index"]]

    def _unit(self: UnlearningTrainer, key: str) -> str:
        key = FORGET if key == ASCENDED else key
        if key == FORGET and self.objective.counts_sequences:
            return FORGET_SEQUENCES
        return FORGET_TOKENS if key == FORGET_NLL else key


def split_states(taken: Mapping[Layer, Tensor], parts: Sequence[Mapping[str, Any]]) -> States:
    """States `(sum B_i, T, d)` of one forward pass as those of its parts `(B_i, T_i, d)`, without joint padding."""
    rows = [part["input_ids"].shape[0] for part in parts]
    return {
        layer: [chunk[:, : part["input_ids"].shape[1]] for chunk, part in zip(states.split(rows), parts, strict=True)]
        for layer, states in taken.items()
    }


def _tokens(rows: Mapping[str, Tensor]) -> dict[str, Any]:
    """Mask and positions of response tokens as they are counted: a label in the first column is never predicted."""
    mask = rows["labels"] != IGNORE_INDEX
    ahead = rows.get("response_positions")  # where the logits are that predict the tokens
    return {
        "mask": torch.cat([torch.zeros_like(mask[:, :1]), mask[:, 1:]], dim=1),
        "positions": None if ahead is None else ahead + 1,
    }


def _mean(outputs: Sequence[LossOutput]) -> LossOutput:
    total = torch.stack([output.total for output in outputs]).mean()
    count = outputs[0].count
    return LossOutput(loss=total / count.clamp(min=1.0), total=total, count=count, metrics={})
