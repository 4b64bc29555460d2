"""Log-odds with an edit of the last block in force, from states that were read once: what comes after it is short.

Shapes: K pairs of a place and a token, N places, m and d widths of the edited matrix.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn

from ..data import pad_rows
from ..metrics.likelihood import evaluation_mode
from ..probes.taps import resolve_layer
from ..trainers.forward import ModelForward, output_head
from ..trainers.measure import rank_batches
from .added import edits_in_force
from .algebra.solve import Edit
from .directions import final_norm
from .odds import Pairs, local_run, log_odds
from .passes import Places, Run
from .plan import LayerEdit

_AGREES = 1e-2  # nats between this and a forward pass of the model up to which they are the same
_AGREES_HALF = 0.04  # with 16-bit states; searches aim 0.05 nats beyond their target
_CHUNK = 256  # pairs whose logits exist at once


class LastBlock:
    """
    The head's view of an edit of the last block, `head(norm(x + Delta h))`, with x the state before the final norm and
    h the matrix's input at each place: a search then needs no forward passes of the model. Plain blocks add what their
    MLP puts out to the residual stream; [`agrees`] asks the model whether this one does.

    Args:
        run ([`Run`]):
            Model and forward passes.
        rows (`Sequence[Mapping]`), pairs ([`Pairs`]):
            Tokenised rows, places and next tokens.
        inputs (`Tensor`), at (`Tensor`):
            h, `(N, m)`, and for each pair `(K,)` its row in it.
        below (`Sequence[LayerEdit]`):
            Edits of blocks below, in force.
    """

    def __init__(
        self,
        run: Run,
        rows: Sequence[Mapping[str, Any]],
        pairs: Pairs,
        inputs: Tensor,
        at: Tensor,
        below: Sequence[LayerEdit],
    ) -> None:
        places, of_pair = pairs.places()
        self.of_pair, self.ids = of_pair.tolist(), pairs.ids
        self.inputs = torch.zeros(len(places), inputs.shape[1]).index_copy(0, of_pair, inputs[at].float())
        self.norm: Any = final_norm(run.model)
        self.head = output_head(run.model)
        with edits_in_force(run.model, below):
            self.states = _states(run, rows, places, self.norm)

    @staticmethod
    def fits(run: Run, layer: int) -> bool:
        """Whether the block is the last, and norm and head are whole, on one process and plain numbers."""
        if run.accelerator is not None and run.accelerator.num_processes > 1:
            return False
        if resolve_layer(run.model, layer) != resolve_layer(run.model, -1):
            return False
        try:
            held = [*final_norm(run.model).parameters(), *run.model.get_output_embeddings().parameters()]
        except ValueError:
            return False
        return all(value.is_floating_point() and not _is_split(value) for value in held)

    @torch.no_grad()
    def odds(self, edit: Edit) -> Tensor:
        """`(K,)` float64: log-odds with the edit in force, by the head alone."""
        moved = (self.inputs @ edit.lora_a.float().T) @ edit.lora_b.float().T
        device, dtype = self.states.device, self.states.dtype
        states = (self.states.float() + moved.to(device)).to(dtype)
        found = []
        for start in range(0, len(self.of_pair), _CHUNK):
            own = slice(start, start + _CHUNK)
            places = sorted(set(self.of_pair[own]))
            at = {place: number for number, place in enumerate(places)}
            logits = self.head.logits(self.norm(states[places])).double()
            found.append(log_odds(logits, [at[place] for place in self.of_pair[own]], self.ids[own])[0])
        return torch.cat(found)

    def agrees(self, expected: Tensor, measured: Tensor) -> bool:
        """Whether log-odds `(K,)` that a forward pass of the model has given are those that were expected."""
        likely = measured > -30.0  # below that, 16-bit logits are too coarse to compare
        tolerance = _AGREES if self.states.dtype == torch.float32 else _AGREES_HALF
        return not bool(likely.any()) or float((expected - measured)[likely].abs().max()) <= tolerance


def _is_split(value: Tensor) -> bool:
    return hasattr(value, "ds_id") or hasattr(value, "device_mesh") or value.device.type == "meta"


@torch.no_grad()
def _states(run: Run, rows: Sequence[Mapping[str, Any]], places: list[tuple[int, int]], norm: nn.Module) -> Tensor:
    """`(N, d)`: what the final norm is called with at sorted places."""
    wanted = sorted({row for row, _ in places})
    table = Dataset.from_list(
        [
            {"input_ids": list(rows[row]["input_ids"]), "labels": list(rows[row]["input_ids"]), "index": row}
            for row in wanted
        ]
    )
    choose, forward = Places(places), ModelForward(run.model)
    found: dict[tuple[int, int], Tensor] = {}
    taken: list[Tensor] = []
    handle = norm.register_forward_pre_hook(lambda module, arguments: taken.append(arguments[0]))
    collate = partial(pad_rows, pad_token_id=run.pad_token_id)
    try:
        with evaluation_mode(run.model):
            for batch in rank_batches(table, run.batch_size, local_run(run.model), collate, None):
                taken.clear()
                forward(run.model, [batch])
                mask = choose(batch)
                first = batch["attention_mask"].argmax(1)
                numbers = mask.nonzero()
                states = taken[0].reshape(*mask.shape, -1)[mask.to(taken[0].device)]
                for (at, column), state in zip(numbers.tolist(), states, strict=True):
                    found[int(batch["index"][at]), column - int(first[at])] = state
    finally:
        handle.remove()
    return torch.stack([found[place] for place in places])
