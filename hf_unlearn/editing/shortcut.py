"""Log-odds with an edit of the last block in force, from states that were read once: what comes after it is short.

Shapes: K pairs of a place and a token, N places, m and d widths of the edited matrix.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..probes.taps import resolve_layer
from ..trainers.forward import output_head
from .algebra.solve import Edit
from .capture import Captured
from .directions import final_norm
from .odds import Pairs, log_odds
from .passes import Run

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
        pairs ([`Pairs`]):
            Places and next tokens.
        read ([`Captured`]):
            h and x at the places, with the edits of blocks below in force.
        at (`Tensor`):
            `(K,)`, where each pair's place is in them.
    """

    def __init__(self, run: Run, pairs: Pairs, read: Captured, at: Tensor) -> None:
        assert read.states is not None, "read with also=final_norm(model)"
        places, of_pair = pairs.places()
        order = torch.zeros(len(places), dtype=torch.int64).index_copy(0, of_pair, at)
        self.of_pair, self.ids = of_pair.tolist(), pairs.ids
        self.inputs, self.states = read.inputs[order].float(), read.states[order.to(read.states.device)]
        self.norm: Any = final_norm(run.model)
        self.head = output_head(run.model)

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
    def odds(self, edit: Edit | None = None) -> Tensor:
        """`(K,)` float64: log-odds with the edit in force, by the head alone; without one they are the model's own."""
        states = self.states
        if edit is not None:
            moved = (self.inputs @ edit.lora_a.float().T) @ edit.lora_b.float().T
            states = (states.float() + moved.to(states.device)).to(states.dtype)
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
