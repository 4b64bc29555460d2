"""Where GCG's suffix stands: the tokens of a prompt around it, and whether its own tokens survive being text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hf_unlearn.data import tokenize_example, tokenize_prompt
from hf_unlearn.losses import IGNORE_INDEX


class SuffixFrame:
    """The prompt around the suffix, as the tokenizer and its chat template make it."""

    def __init__(
        self, tokenizer: Any, prompt: str | Sequence[Mapping[str, str]], target: str, suffix: str, strict: bool
    ) -> None:
        if not target.strip():
            raise ValueError(f"target is {target!r}; expected what the model is to say.")
        if not isinstance(prompt, str) and (not prompt or prompt[-1]["role"] != "user"):
            roles = [message["role"] for message in prompt]
            raise ValueError(f"The messages have the roles {roles}; expected the last to be the user's.")
        self.tokenizer, self.prompt, self.target, self.start = tokenizer, prompt, target, suffix
        self.plain = self._encode("")
        whole = self._encode(suffix)
        head = _shared(self.plain, whole, len(self.plain))
        tail = _shared(self.plain[::-1], whole[::-1], len(self.plain) - head)
        self.before, self.suffix = whole[:head], whole[head : len(whole) - tail]
        self.after = whole[len(whole) - tail :]
        # a tokenizer that marks the start of a word drops the space in front when it decodes
        for self.gap in ("", " "):
            if self.suffix and self.reproduces(self.suffix):
                return
        self.gap = ""
        if not self.suffix or strict:
            raise ValueError(
                f"The suffix {suffix!r} does not come back from its own {len(self.suffix)} tokens behind this "
                "prompt. Choose another that starts with a space, such as ' ! ! !', or pass filter_ids=False."
            )

    def text(self, suffix: Sequence[int]) -> str:
        """What goes behind the prompt."""
        return self.gap + str(self.tokenizer.decode(list(suffix), clean_up_tokenization_spaces=False))

    def reproduces(self, suffix: Sequence[int]) -> bool:
        """Whether the text of these tokens, within the prompt, is tokenised to them."""
        return self._encode(self.text(suffix)) == [*self.before, *suffix, *self.after]

    def target_ids(self, stops: Sequence[int], end_of_turn: bool) -> list[int]:
        """Tokens of the answer, without those that end it unless they are wanted."""
        row = tokenize_example(self._row(self.start), self.tokenizer)
        ids = [label for label in row["labels"] if label != IGNORE_INDEX]
        if not end_of_turn:
            ends = [place for place, token in enumerate(ids) if token in stops]
            ids = ids[: ends[0]] if ends else ids
        if not ids:
            raise ValueError(f"target {self.target!r} has no tokens before the end of the answer; expected some text.")
        return ids

    def _encode(self, suffix: str) -> list[int]:
        return tokenize_prompt(self._row(suffix), self.tokenizer)

    def _row(self, suffix: str) -> dict[str, Any]:
        if isinstance(self.prompt, str):
            return {"question": self.prompt + suffix, "answer": self.target}
        last = {**self.prompt[-1], "content": self.prompt[-1]["content"] + suffix}
        return {
            "prompt": [*(dict(message) for message in self.prompt[:-1]), last],
            "completion": [{"role": "assistant", "content": self.target}],
        }


def _shared(one: Sequence[int], other: Sequence[int], most: int) -> int:
    """Length of the common beginning, at most `most`."""
    for place, (left, right) in enumerate(zip(one, other, strict=False)):
        if left != right or place == most:
            return place
    return min(len(one), len(other), most)
