"""A classifier model as a judge, and a reference model's perplexity: both look at answers that another model gave."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from hf_unlearn.attacks.judges import Verdict
from hf_unlearn.metrics.generate import padding_id
from hf_unlearn.metrics.likelihood import evaluation_mode, longest_first, mean_nll

_FIELD = re.compile(r"\{(prompt|behavior|answer|generation)\}")


@dataclass(frozen=True, kw_only=True, eq=False)
class ModelJudge:
    """
    A language model that is asked about each answer and says yes or no, as HarmBench's classifiers do (arXiv
    2402.04249). It is not decoded: the next token's probabilities of yes and of no are compared.

    What a classifier was trained to see it sees, in the language and for the lengths it was trained on; an answer may
    be written to mislead it.

    Args:
        model (`PreTrainedModel`):
            The classifier.
        tokenizer (`PreTrainedTokenizerBase`):
            Its tokenizer.
        template (`str`):
            What it reads, with `{prompt}` (or `{behavior}`) and `{answer}` (or `{generation}`); ends where it is to
            say yes or no. Taken as it is: no chat template is put around it.
        yes (`tuple[str, ...]`, *optional*, defaults to `("Yes", " Yes", "yes", " yes")`):
            What it says for a success, by the first token of each that is not one of `no`'s.
        no (`tuple[str, ...]`, *optional*, defaults to `("No", " No", "no", " no")`):
            What it says otherwise.
        min_mass (`float`, *optional*, defaults to `0.1`):
            Smallest probability of yes and no together. Below it the template does not fit the model, and the answer
            counts as not judged.
        batch_size (`int`, *optional*, defaults to `16`):
            Answers a pass.

    Raises:
        ValueError: a template without a field for the answer, yes and no that begin alike, or (on judging) an answer
            too long for the model, or one on which it says neither yes nor no.
    """

    model: Any
    tokenizer: Any
    template: str
    yes: tuple[str, ...] = ("Yes", " Yes", "yes", " yes")
    no: tuple[str, ...] = ("No", " No", "no", " no")
    min_mass: float = 0.1
    batch_size: int = 16

    def __post_init__(self) -> None:
        check_template(self.template)
        yes, no = self._tokens()
        if not yes or not no:
            raise ValueError(
                f"yes={self.yes} and no={self.no} begin with the same tokens, or with none; expected words that this "
                "tokenizer tells apart by their first token."
            )
        if not 0 <= self.min_mass <= 1:
            raise ValueError(f"min_mass is {self.min_mass}; expected a probability.")

    def __call__(self, prompt: str, answer: str) -> Verdict:
        """The verdict on one answer; whether it refuses is not told."""
        return self.judge_all([prompt], [answer])[0]

    @torch.no_grad()
    def judge_all(
        self, prompts: Sequence[str], answers: Sequence[str], *, description: str | None = None
    ) -> list[Verdict]:
        """
        Verdicts on n answers, in batches.

        Raises:
            ValueError: an answer too long for the model, or one on which it says neither yes nor no.
        """
        inputs = [self._encode(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
        longest = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        for number, ids in enumerate(inputs):
            if longest and len(ids) > longest:
                raise ValueError(
                    f"Answer {number} makes {len(ids)} tokens with the template, the judge reads {longest}. Lower "
                    "max_new_tokens of the attack."
                )
        yes, no = (torch.tensor(sorted(tokens)) for tokens in self._tokens())
        scores = np.empty((len(inputs), 2))
        batches = longest_first([len(ids) for ids in inputs], self.batch_size)
        with evaluation_mode(self.model):
            for numbers in tqdm(batches, desc=description, disable=description is None, leave=False):
                logps = self._next_log_probs([inputs[number] for number in numbers])
                scores[numbers] = np.stack([logps[:, part].exp().sum(-1).numpy() for part in (yes, no)], axis=1)
        for number, mass in enumerate(scores.sum(1)):
            if not mass >= self.min_mass:
                raise ValueError(
                    f"The judge gives yes and no a probability of {mass:.2g} together on answer {number}, below "
                    f"min_mass={self.min_mass}: check the template, `yes` and `no`."
                )
        return [Verdict(success=bool(row[0] > row[1])) for row in scores]

    def _next_log_probs(self, inputs: Sequence[Sequence[int]]) -> torch.Tensor:
        """Log-probabilities `(B, V)` float64 on the CPU of what follows; right padding, read at each last token."""
        width = max(map(len, inputs))
        ids = torch.full((len(inputs), width), padding_id(self.tokenizer))
        mask = torch.zeros_like(ids)
        for row, tokens in enumerate(inputs):
            ids[row, : len(tokens)] = torch.tensor(tokens)
            mask[row, : len(tokens)] = 1
        device = self.model.device
        logits = self.model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False).logits
        last = logits[torch.arange(len(inputs), device=device), mask.sum(1).to(device) - 1]
        return last.cpu().double().log_softmax(-1)

    def _encode(self, prompt: str, answer: str) -> list[int]:
        """
        Token ids of the template with its fields. Prompt and answer are never read as special tokens: an answer that
        closes the judge's turn and speaks in its place stays text.
        """
        values = {"prompt": prompt, "behavior": prompt, "answer": answer, "generation": answer}
        first = self.tokenizer.bos_token_id
        ids: list[int] = []
        # re.split gives text, field, text, ...; one pass, so that a field's text that looks like a field is left alone
        for place, part in enumerate(_FIELD.split(self.template)):
            text = values[part] if place % 2 else part
            ids += self.tokenizer(text, add_special_tokens=False, split_special_tokens=bool(place % 2))["input_ids"]
        return ids if first is None or ids[:1] == [first] else [first, *ids]

    def _tokens(self) -> tuple[set[int], set[int]]:
        """First tokens of yes and of no, without those of both: some tokenizers make a token of the space in front."""
        yes, no = self._first_tokens(self.yes), self._first_tokens(self.no)
        return yes - no, no - yes

    def _first_tokens(self, words: Sequence[str]) -> set[int]:
        encoded = [self.tokenizer(word, add_special_tokens=False)["input_ids"] for word in words]
        return {ids[0] for ids in encoded if ids}


def check_template(template: str) -> None:
    """
    Refuses a template that shows the judge no answer.

    Raises:
        ValueError: it has no field for the answer.
    """
    fields = set(_FIELD.findall(template))
    if not fields & {"answer", "generation"}:
        raise ValueError(
            f"The template has the fields {sorted(fields)}; expected {{answer}} (or {{generation}}), and "
            "{prompt} (or {behavior}) where the classifier reads it."
        )


def load_model_judge(
    path: str | Path, *, template: str, trust_remote_code: bool = False, dtype: str = "auto", **options: Any
) -> ModelJudge:
    """
    A [`ModelJudge`] from a folder or a hub id, on the accelerator if there is one.

    Args:
        path (`str` or `Path`):
            Model and tokenizer.
        template (`str`):
            As in [`ModelJudge`].
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether code from the hub may run.
        dtype (`str`, *optional*, defaults to `"auto"`):
            Type of the weights.
        options:
            Further arguments of [`ModelJudge`].
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    model: Any = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=trust_remote_code, dtype=dtype)
    if torch.accelerator.is_available():
        model = model.to(torch.accelerator.current_accelerator())
    return ModelJudge(model=model.eval(), tokenizer=tokenizer, template=template, **options)


def answer_perplexities(model: Any, tokenizer: Any, answers: Sequence[str], *, batch_size: int = 32) -> list[float]:
    """
    Perplexity of each answer by itself under a model that was not unlearned; 1 for an empty one.

    Args:
        model, tokenizer:
            The reference model.
        answers (`Sequence[str]`):
            n texts.
        batch_size (`int`, *optional*, defaults to `32`):
            Answers a pass.
    """
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    encoded = [
        tokenizer(answer, add_special_tokens=False, split_special_tokens=True)["input_ids"] for answer in answers
    ]
    places = [place for place, ids in enumerate(encoded) if ids]
    values = [1.0] * len(answers)
    if places:
        rows = [{"input_ids": [start, *encoded[place]], "labels": [-100, *encoded[place]]} for place in places]
        nll = mean_nll(model, rows, pad_token_id=padding_id(tokenizer), batch_size=batch_size)
        for place, value in zip(places, nll, strict=True):
            values[place] = float(np.exp(min(float(value), 700.0)))
    return values
