"""Datasets to the rows an edit works on, and the pairs of a place and a token that are to become unlikely."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..data import pad_rows, prepare_rows, tokenize_prompt
from ..losses import IGNORE_INDEX
from .concepts import Concept, find_occurrences
from .distinct import SaidText, distinct_tokens
from .odds import Pairs
from .positions import position_mask

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Row = dict[str, list[int]]


def edit_rows(dataset: Any, tokenizer: PreTrainedTokenizerBase, *, name: str, max_length: int) -> list[Row]:
    """
    Tokenised rows of any format that the trainers take, or prompts alone (a column `prompt` without `completion`, or
    `question` without `answer`): those have no label.

    Raises:
        ValueError: no rows, or rows that cannot be read.
    """
    check_sized(dataset, name)
    if not len(dataset):
        raise ValueError(f"The {name} dataset has no rows; expected at least one.")
    first = dataset[0]
    for prompt, answer in (("prompt", "completion"), ("question", "answer")):
        if prompt in first and not {answer, "input_ids", "messages", "text"} & set(first):
            blank = [{"role": "assistant", "content": ""}] if isinstance(first[prompt], list) else ""
            rows = [tokenize_prompt({**row, answer: blank}, tokenizer)[-max_length:] for row in dataset]
            return [{"input_ids": ids, "labels": [IGNORE_INDEX] * len(ids)} for ids in rows]
    return prepare_rows(dataset, tokenizer, name=name, max_length=max_length)


def check_sized(dataset: Any, name: str) -> None:
    """Raises TypeError for a stream, a dict of splits or a name: rows are counted, drawn and read more than once."""
    if not hasattr(dataset, "__len__") or isinstance(dataset, str | Mapping):
        raise TypeError(
            f"The {name} dataset is a {type(dataset).__name__}; expected a Dataset or a list of rows (take one split; "
            "of a stream, list(stream.take(n)))."
        )


def prompt_of(row: Mapping[str, Sequence[int]]) -> list[int]:
    """The tokens before the first label; all of a row without labels."""
    labels = list(row["labels"])
    end = next((place for place, label in enumerate(labels) if label != IGNORE_INDEX), len(labels))
    return list(row["input_ids"])[:end]


def word_pairs(
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    concepts: Sequence[Concept],
    positions: str | Callable[..., Any],
    bos_token_id: int | None,
    kept: SaidText | None = None,
    tokens_per_word: int = 1,
) -> Pairs:
    """
    Where the words must not go on. `"occurrence"`: within each occurrence in a response, with the token that it has
    there, the first or, given what has to stay, those of [`distinct_tokens`], which share what the word has to lose;
    and with those that other spellings of the word have after the same beginning, with the same share, or all that is
    left where such a token ends the word. Otherwise all first tokens of all words at each place.

    Raises:
        ValueError: no place is found.
    """
    if positions == "occurrence":
        shares: dict[tuple[int, int, int], float] = {}
        for one in find_occurrences(tokenizer, rows, concepts):
            ids = rows[one.row]["input_ids"]
            own = [0] if kept is None else distinct_tokens(ids[one.start : one.stop], kept, tokens_per_word)
            # nothing to edit before the first token, and nothing is edited at BOS
            least = 2 if ids[0] == bos_token_id else 1
            places = [one.start + at for at in own if one.start + at >= least]
            for number, place in enumerate(places):
                said, concept = ids[one.start : place + 1], concepts[one.concept]
                ends = {spelling[-1] for spelling in concept.spellings if spelling[:-1] == tuple(said[:-1])}
                for token in _continuations(said, concept):
                    whole = token in ends and token != said[-1]
                    share = (float(len(places) - number) if whole else 1.0) / len(places)
                    triple = (one.row, place - 1, token)
                    shares[triple] = max(share, shares.get(triple, 0.0))
        if not shares:
            raise ValueError(
                f"No activation found: none of the {len(concepts)} words occurs in a response (where one begins with "
                "the word, the prompt must be more than a BOS token). Give rows that say them, or "
                "positions='last_prompt'."
            )
        return Pairs.shared(shares)
    tokens = sorted({token for concept in concepts for token in concept.first})
    named = named_places(rows, positions, bos_token_id)
    return Pairs.of([(row, place, token) for row, place in named for token in tokens])


def _continuations(said: Sequence[int], concept: Concept) -> set[int]:
    """The last of the given tokens, and those that spellings of the word have after the others."""
    *begun, token = map(int, said)
    others = (spelling for spelling in concept.spellings if len(spelling) > len(begun))
    return {token, *(spelling[len(begun)] for spelling in others if list(spelling[: len(begun)]) == begun)}


def named_places(
    rows: Sequence[Row], positions: str | Callable[..., Any], bos_token_id: int | None
) -> list[tuple[int, int]]:
    """
    The chosen tokens (row, place) of rows; see [`position_mask`].

    Raises:
        ValueError: there are none.
    """
    found = []
    for number, row in enumerate(rows):
        batch = pad_rows([row], pad_token_id=0)
        batch["index"] = torch.tensor([number])
        mask = position_mask(batch, positions, bos_token_id)
        found += [(number, place) for place in mask[0].nonzero().squeeze(1).tolist()]
    if not found:
        raise ValueError(
            f"No activation found: positions={positions!r} names no token in any of the {len(rows)} rows."
        )
    return found
