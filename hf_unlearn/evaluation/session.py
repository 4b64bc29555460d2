"""Scoring that several processes share and that a kill does not undo: likelihoods, token scores and answers.

Shapes: n items (rows or prompts), in the order they were given.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils import extract_model_from_parallel, gather_object, reduce

from ..metrics.arrays import FloatArray
from ..metrics.generate import greedy, padding_id, stop_token_ids
from ..metrics.likelihood import evaluation_mode, longest_first, mean_nll
from ..metrics.token_scores import TokenScores, score_tokens
from ..reports.eval_rows import EncodedRows
from ..reports.eval_spread import from_main, is_sharded, on_all, spread_nll
from .model_hash import hash_obstacle, model_hash, model_settings
from .pieces import Pieces, fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Rows = Sequence[Mapping[str, Any]]
Prompts = Sequence[Sequence[int]]
_TOKEN_COLUMNS = ("log_probs", "mu", "sigma", "predictions", "labels")


class Session:
    """
    One model, scored on as much as a benchmark needs.

    Items are scored longest first, in pieces of a few batches. With an `output_dir` a finished piece is a file there,
    and whoever starts again with the same model, items and settings goes on after the last one: with any number of
    processes and any batch size, neither of which changes a score. Every process holds the whole model, takes a part
    of each batch's items, and gets all scores.

    A model whose weights are sharded (ZeRO-3, FSDP) has [`nll`] only, and keeps no pieces: its weights cannot be
    told from others.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            Causal language model, on its device; neither its weights nor its modes change.
        tokenizer (`PreTrainedTokenizerBase`):
            Its tokenizer.
        output_dir (`str` or `os.PathLike`, *optional*):
            Folder of the benchmark; pieces go to `pieces/` in it. Without it nothing is kept. Of several processes
            the first one reads and writes.
        accelerator (`Accelerator`, *optional*):
            The processes that share the work. Default: those of `torch.distributed` where it runs, else this one.
        batch_size (`int`, *optional*, defaults to `32`):
            Rows in a forward pass of a process; twice as many prompts are answered at once.
        piece_batches (`int`, *optional*, defaults to `4`):
            Batches of each process in a piece, which is what a kill can lose.
        description (`str`, *optional*):
            Text in front of the progress bars; no bars without it.

    Attributes:
        model_hash (`str`, *optional*): see [`model_hash`].
        hash_obstacle (`str`, *optional*): why there is no hash.
        sharded (`bool`): whether the weights are.

    Raises:
        ValueError: `batch_size` or `piece_batches` below 1, processes with different weights.
        OSError: `output_dir` cannot be written; before anything is computed, and on all processes.

    Example:
        ```python
        session = Session(model, tokenizer, output_dir="outputs/eval", description="muse")
        rows = [tokenize_example({"question": q, "answer": a}, tokenizer, max_length=1024) for q, a in pairs]
        losses = session.nll("retain", rows)
        tokens = session.token_scores("forget", rows)  # tokens.log_probs, .mu, .sigma, .hits, ...
        answers = session.answers("forget answers", [tokenize_prompt(row, tokenizer) for row in asked])
        ```
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        output_dir: str | os.PathLike[str] | None = None,
        accelerator: Any = None,
        batch_size: int = 32,
        piece_batches: int = 4,
        description: str | None = None,
    ) -> None:
        for name, number in (("batch_size", batch_size), ("piece_batches", piece_batches)):
            if number < 1:
                raise ValueError(f"{name} is {number}; expected at least 1.")
        self.sharded = is_sharded(model)
        self.model = model if self.sharded else extract_model_from_parallel(model)
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.piece_batches = piece_batches
        self.description = description
        self.processes = _processes(model) if accelerator is None else accelerator
        # an unwritable folder is an error before the model is even hashed
        self._pieces = on_all(partial(Pieces.open, output_dir, write=self.is_main), self.processes)
        self.hash_obstacle = hash_obstacle(self.model)
        self.model_hash = on_all(partial(model_hash, self.model), self.processes)
        if self._count > 1 and len(set(gather_object([self.model_hash]))) > 1:
            raise ValueError("The processes hold models with different weights; expected the same on each of them.")

    @property
    def is_main(self) -> bool:
        """Whether this process writes."""
        return bool(self.processes.is_main_process)

    @property
    def _count(self) -> int:
        return int(self.processes.num_processes)

    def nll(self, name: str, rows: Rows) -> FloatArray:
        """
        Mean of `-log p(token)` over the response tokens of each row, in nats ([`mean_nll`]).

        Args:
            name (`str`):
                What is scored, for the progress bar and the files of the pieces.
            rows (`Sequence[Mapping]`):
                n rows with `input_ids` and `labels` (what [`tokenize_example`] returns), cut to what the model takes.

        Returns:
            `np.ndarray`: `(n,)` float64, the same on every process.

        Raises:
            ValueError: no rows, a row without response tokens, or a model whose outputs are NaN.
            RuntimeError: scoring failed on another process.
        """
        pad = padding_id(self.tokenizer)
        if self.sharded:
            encoded = EncodedRows(
                texts=[dict(row) for row in rows], prompts=[], pad_token_id=pad, longest=0, max_length=0
            )
            if not encoded.texts:
                raise ValueError(f"{name}: there is nothing to score; expected at least one row.")
            with evaluation_mode(self.model):
                values = spread_nll(
                    self.model,
                    encoded,
                    batch_size=self.batch_size,
                    accelerator=self.processes,
                    description=self._text(name),
                )
            if np.isnan(values).any():
                raise ValueError(
                    f"{name}: {np.isnan(values).sum()} of {len(values)} rows (first row "
                    f"{np.flatnonzero(np.isnan(values))[0]}) have no likelihood: rows without response tokens, or a "
                    "model that has overflowed. Drop these rows, or load it in bfloat16 or float32."
                )
            return values

        def score(items: list[Any], text: str | None) -> list[Any]:
            values = mean_nll(self.model, items, pad_token_id=pad, batch_size=self.batch_size, description=text)
            return [float(value) for value in values]

        kept = [{key: list(row[key]) for key in ("input_ids", "labels")} for row in rows]
        lengths = [len(row["input_ids"]) for row in kept]
        return np.array(self.map(name, kept, score, lengths=lengths, settings={"kind": "nll"}), dtype=np.float64)

    def token_scores(self, name: str, rows: Rows) -> TokenScores:
        """
        Log-probability, mean and deviation over the vocabulary, prediction and label at every response position
        ([`score_tokens`]): what min-k, min-k++, exact memorisation and extraction strength are made of.

        Args:
            name, rows:
                As in [`nll`].

        Raises:
            ValueError: as in [`nll`], or sharded weights.
            RuntimeError: scoring failed on another process.
        """
        self._whole("Token scores")
        pad = padding_id(self.tokenizer)

        def score(items: list[Any], text: str | None) -> list[Any]:
            found = score_tokens(self.model, items, pad_token_id=pad, batch_size=self.batch_size, description=text)
            columns = [getattr(found, column) for column in _TOKEN_COLUMNS]
            return [[values.tolist() for values in row] for row in zip(*columns, strict=True)]

        kept = [{key: list(row[key]) for key in ("input_ids", "labels")} for row in rows]
        lengths = [len(row["input_ids"]) for row in kept]
        found = self.map(name, kept, score, lengths=lengths, settings={"kind": "tokens"})
        columns: dict[str, Any] = {}
        for number, column in enumerate(_TOKEN_COLUMNS):
            kind = np.int64 if column in ("predictions", "labels") else np.float64
            columns[column] = [np.array(row[number], dtype=kind) for row in found]
        return TokenScores(**columns)

    def answers(
        self, name: str, prompts: Prompts, *, max_new_tokens: int = 200, batch_size: int | None = None
    ) -> list[str]:
        """
        Greedy answers ([`greedy`]), cut at the end of the turn and stripped.

        Args:
            name (`str`):
                As in [`nll`].
            prompts (`Sequence[Sequence[int]]`):
                n lists of token ids (what [`tokenize_prompt`] returns).
            max_new_tokens (`int`, *optional*, defaults to `200`):
                Longest answer in tokens.
            batch_size (`int`, *optional*):
                Prompts answered at once. Default: twice that of the session.

        Raises:
            ValueError: no prompts, an empty one, `max_new_tokens` below 1, or sharded weights.
            RuntimeError: generation failed on another process.
        """
        self._whole("Answers")
        at_once = batch_size or 2 * self.batch_size

        def score(items: list[Any], text: str | None) -> list[Any]:
            return greedy(
                self.model,
                self.tokenizer,
                items,
                max_new_tokens=max_new_tokens,
                batch_size=at_once,
                description=text,
            )

        stops = stop_token_ids(self.model, self.tokenizer)
        settings = {"kind": "answers", "max_new_tokens": max_new_tokens, "stops": stops}
        kept = [list(prompt) for prompt in prompts]
        lengths = [len(prompt) for prompt in kept]
        return self.map(name, kept, score, lengths=lengths, settings=settings, batch_size=at_once)

    def map(
        self,
        name: str,
        items: Sequence[Any],
        score: Callable[[list[Any], str | None], list[Any]],
        *,
        lengths: Sequence[int],
        settings: Mapping[str, Any],
        batch_size: int | None = None,
    ) -> list[Any]:
        """
        One value for each item, by any function: what the methods above are made of.

        Args:
            name (`str`):
                As in [`nll`].
            items (`Sequence`):
                n items in plain JSON (token ids, texts): with `settings` and the model they name the pieces.
            score (`Callable[[list, str | None], list]`):
                From some items of this process, and the text of a progress bar, to a value in plain JSON for each; no
                collective operations in it.
            lengths (`Sequence[int]`):
                n lengths: items are scored longest first, so that neighbours need little padding and what does not
                fit into memory fails in the first batch.
            settings (`Mapping[str, Any]`):
                Everything else that changes a value, in plain JSON.
            batch_size (`int`, *optional*):
                Items in a forward pass of a process, for the size of pieces.

        Returns:
            `list`: n values in the order of `items`, the same on every process.

        Raises:
            RuntimeError: it failed on another process; on the one where it failed its own error is raised.
            OSError: a piece could not be written; earlier pieces are kept.
        """
        if not items:
            raise ValueError(f"{name}: there is nothing to score; expected at least one row.")
        mark = None if self.model_hash is None else fingerprint(self._key(items, settings))
        read = partial(self._pieces.read, name, mark, len(items)) if self.is_main else dict
        done: dict[int, Any] = from_main(on_all(read, self.processes), self.processes)
        order = [number for batch in longest_first(lengths, 1) for number in batch if number not in done]
        size = self.piece_batches * self._count * (batch_size or self.batch_size)
        starts = range(0, len(order), size)
        for count, start in enumerate(starts, start=1):
            piece = order[start : start + size]
            mine = piece[self.processes.process_index :: self._count]
            text = self._text(name if len(starts) == 1 else f"{name} {count}/{len(starts)}")
            chosen = [items[number] for number in mine]
            values = on_all(partial(score, chosen, text) if mine else list, self.processes)
            found = dict(zip(mine, values, strict=True))
            if self._count > 1:
                found = {number: value for part in gather_object([found]) for number, value in part.items()}
            assert sorted(found) == sorted(piece), "every item is scored by one process"
            write = partial(self._pieces.write, name, mark, found) if self.is_main else bool
            on_all(write, self.processes)
            done |= found
        return [done[number] for number in range(len(items))]

    def _key(self, items: Sequence[Any], settings: Mapping[str, Any]) -> dict[str, Any]:
        return {"model": self.model_hash, "config": model_settings(self.model), "settings": settings, "items": items}

    def _text(self, name: str) -> str | None:
        return None if self.description is None or not self.is_main else f"{self.description}: {name}"

    def _whole(self, what: str) -> None:
        if self.sharded:
            raise ValueError(
                f"{what} need whole weights on every process, but the model's are sharded (ZeRO-3, FSDP). Save the "
                "model, load it with from_pretrained, and evaluate that."
            )


class _Processes:
    """What scoring asks of an `Accelerator`, where none was made."""

    def __init__(self, device: torch.device) -> None:
        running = torch.distributed.is_available() and torch.distributed.is_initialized()
        self.num_processes = torch.distributed.get_world_size() if running else 1
        self.process_index = torch.distributed.get_rank() if running else 0
        self.is_main_process = self.process_index == 0
        self.device = device
        self.reduce = reduce


def _processes(model: PreTrainedModel) -> Any:
    return _Processes(next(model.parameters()).device)
