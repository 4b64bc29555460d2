"""GCG: a suffix of ordinary tokens, found by gradients and a random search, that makes a model say a target.

Shapes: l tokens of the suffix, T tokens of a whole sequence, C candidates of a step, d width, V rows of the embedding.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from hf_unlearn.attacks.gcg_frame import SuffixFrame
from hf_unlearn.attacks.soft_prompt import frozen
from hf_unlearn.losses import token_log_probs
from hf_unlearn.metrics.generate import stop_token_ids
from hf_unlearn.metrics.likelihood import base_model, evaluation_mode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from hf_unlearn.attacks.gcg_rows import GCGRowsResult

_CHUNK = 8192  # rows of the embedding at a time


@dataclass(frozen=True, kw_only=True)
class GCGConfig:
    """
    The attacker's means. Steps, candidates, top_k and the suffix are those of the paper (arXiv 2307.15043).

    Args:
        suffix (`str`, *optional*, defaults to twenty times `" !"`):
            What the search starts from. It keeps its number of tokens; start it with a space.
        steps (`int`, *optional*, defaults to `500`):
            Steps of the search.
        candidates (`int`, *optional*, defaults to `512`):
            Suffixes drawn at each step, each with one token replaced.
        top_k (`int`, *optional*, defaults to `256`):
            Tokens of the steepest descent at each position that replacements are drawn from.
        keep_best (`bool`, *optional*, defaults to `False`):
            A buffer of one: go on from the best suffix so far. By default the search goes on from the best of the
            last step's candidates even if it is worse, as in the paper.
        filter_ids (`bool`, *optional*, defaults to `True`):
            Whether suffixes count only if their text is tokenised, within the whole prompt, to the tokens that were
            optimised. Without it the result may be no text that can be sent.
        ascii_only (`bool`, *optional*, defaults to `True`):
            Whether replacements are limited to tokens of printable ASCII characters. Special tokens never are drawn.
        end_of_turn (`bool`, *optional*, defaults to `False`):
            Whether the target includes the tokens that end the answer.
        stop_probability (`float`, *optional*):
            The search ends once the target's probability reaches this.
        eval_batch_size (`int`, *optional*, defaults to `256`):
            Candidates a forward pass; lower it when memory runs out.
        seed (`int`, *optional*, defaults to `0`):
            Of all draws.
    """

    suffix: str = " !" * 20
    steps: int = 500
    candidates: int = 512
    top_k: int = 256
    keep_best: bool = False
    filter_ids: bool = True
    ascii_only: bool = True
    end_of_turn: bool = False
    stop_probability: float | None = None
    eval_batch_size: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        for name, low in (("steps", 0), ("candidates", 1), ("top_k", 1), ("eval_batch_size", 1)):
            if getattr(self, name) < low:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least {low}.")
        if not self.suffix.strip():
            raise ValueError(f"suffix is {self.suffix!r}; expected some text to start from, such as ' ! ! !'.")
        if self.stop_probability is not None and not 0 < self.stop_probability <= 1:
            raise ValueError(f"stop_probability is {self.stop_probability}; expected None or at most 1, above 0.")


@dataclass(frozen=True, kw_only=True)
class GCGResult:
    """
    The best suffix that was seen. Probabilities are geometric means over the target's tokens.

    Args:
        suffix (`str`):
            Text that goes behind the prompt as it is, a space in front included.
        suffix_ids (`tuple[int, ...]`):
            Its tokens.
        before (`float`):
            Probability of the target after the prompt alone.
        initial (`float`):
            With the suffix that the search started from.
        after (`float`):
            With the best suffix.
        losses (`tuple[float, ...]`):
            Mean NLL of the target, in nats, of the suffix that each step went on from; the first is the initial one.
        rejected (`float`):
            Share of the drawn suffixes that `filter_ids` refused; 0 without it.
    """

    suffix: str
    suffix_ids: tuple[int, ...] = field(repr=False)
    before: float
    initial: float
    after: float
    losses: tuple[float, ...] = field(repr=False)
    rejected: float


def gcg(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | Sequence[Mapping[str, str]],
    target: str,
    config: GCGConfig | None = None,
    *,
    description: str | None = None,
) -> GCGResult:
    """
    Greedy coordinate gradient: Algorithm 1 of arXiv 2307.15043.

    At each step the gradient of the target's NLL with respect to the one-hot vectors of the suffix ranks replacements
    of each token; of `candidates` random ones among the best `top_k` the one with the lowest NLL is taken. No weight,
    gradient, mode or `requires_grad` of the model is different afterwards, whatever happens, and the global random
    state is not used.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            The unlearned model, or the control; it must accept `inputs_embeds`.
        tokenizer (`PreTrainedTokenizerBase`):
            Its tokenizer.
        prompt (`str` or `Sequence[Mapping]`):
            A question, put into the chat template or behind "Question: " as everywhere; or messages, of which the
            last is the user's. The suffix goes behind the question, or the last message.
        target (`str`):
            What the model is to say.
        config ([`GCGConfig`], *optional*):
            The attacker's means.
        description (`str`, *optional*):
            Text of a progress bar; no bar without it.

    Raises:
        ValueError: an empty target, messages that do not end with the user's, a suffix that the tokenizer does not
            reproduce behind the prompt, no token to draw, or an NLL that is not finite.
    """
    config = config or GCGConfig()
    frame = SuffixFrame(tokenizer, prompt, target, config.suffix, config.filter_ids)
    goal = frame.target_ids(stop_token_ids(model, tokenizer), config.end_of_turn)
    allowed = allowed_tokens(tokenizer, ascii_only=config.ascii_only)
    generator = torch.Generator().manual_seed(config.seed)
    drawn = refused = 0
    with evaluation_mode(model), frozen(model):

        def nll(suffixes: Sequence[Sequence[int]]) -> list[float]:
            sequences = [[*frame.before, *suffix, *frame.after, *goal] for suffix in suffixes]
            return target_nll(model, sequences, len(goal), config.eval_batch_size).tolist()

        plain = target_nll(model, [[*frame.plain, *goal]], len(goal), 1).tolist()[0]
        best = (nll([frame.suffix])[0], tuple(frame.suffix))
        loss, current = best
        losses = [loss]
        for _ in tqdm(range(config.steps), desc=description, disable=description is None, leave=False):
            if config.stop_probability is not None and best[0] <= -math.log(config.stop_probability):
                break
            sequence = [*frame.before, *current, *frame.after, *goal]
            start = len(frame.before)
            gradient = token_gradients(model, sequence, range(start, start + len(current)), len(goal))
            fresh = draw_candidates(current, gradient, allowed, config.candidates, config.top_k, generator)
            drawn += len(fresh)
            if config.filter_ids:
                passed = [candidate for candidate in fresh if frame.reproduces(candidate)]
                refused += len(fresh) - len(passed)
                fresh = passed
            if fresh:  # else nothing drawn can be written; the next step draws others
                found = min(zip(nll(fresh), fresh, strict=True))
                best = min(best, found)
                loss, current = best if config.keep_best else found
            losses.append(loss)
    return GCGResult(
        suffix=frame.text(best[1]),
        suffix_ids=best[1],
        before=math.exp(-plain),
        initial=math.exp(-losses[0]),
        after=math.exp(-best[0]),
        losses=tuple(losses),
        rejected=refused / drawn if drawn else 0.0,
    )


def run(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Mapping[str, Any]],
    config: GCGConfig | None = None,
    *,
    description: str | None = None,
) -> GCGRowsResult:
    """The attack in the form that all attacks have: a search for each row, see [`gcg_rows`]."""
    from hf_unlearn.attacks.gcg_rows import gcg_rows  # which imports this module

    return gcg_rows(model, tokenizer, rows, config, description=description)


@torch.no_grad()
def target_nll(model: Any, sequences: Sequence[Sequence[int]], length: int, batch_size: int) -> Tensor:
    """
    Mean NLL of the last `length` tokens of each sequence, in nats.

    Args:
        model (`PreTrainedModel`):
            Causal language model, in evaluation mode.
        sequences (`Sequence[Sequence[int]]`):
            C sequences of one length T.
        length (`int`):
            Tokens of the target, at least 1 and less than T.
        batch_size (`int`):
            Sequences a pass.

    Returns:
        `Tensor`: `(C,)` float64 on the CPU.

    Raises:
        ValueError: an NLL that is not finite.
    """
    ids = torch.tensor(sequences)
    values = torch.cat([_nll(model, {"input_ids": part}, part, length) for part in ids.split(batch_size)])
    if not bool(torch.isfinite(values).all()):
        raise ValueError(
            f"The model gives an NLL that is not finite for {int((~torch.isfinite(values)).sum())} of {len(values)} "
            "sequences: its weights or activations have overflowed. Load it in bfloat16 or float32 instead of float16."
        )
    return values


def token_gradients(model: Any, sequence: Sequence[int], positions: range, length: int) -> Tensor:
    r"""
    Gradient of the target's mean NLL with respect to the one-hot vectors of some tokens. The embedding is linear in
    them, so that it is $E\, \partial L / \partial e_i$: one backward pass to the l embeddings, and their products
    with the rows of E.

    Args:
        model (`PreTrainedModel`):
            Causal language model, in evaluation mode.
        sequence (`Sequence[int]`):
            T token ids, the target last.
        positions (`range`):
            The l positions of the suffix.
        length (`int`):
            Tokens of the target.

    Returns:
        `Tensor`: `(l, V)` float32 on the model's device.
    """
    embeddings = model.get_input_embeddings()
    ids = torch.tensor([sequence])
    with torch.enable_grad():
        embedded = embeddings(ids.to(model.device)).detach()
        chosen = embedded[:, positions.start : positions.stop].clone().requires_grad_()
        parts = (embedded[:, : positions.start], chosen, embedded[:, positions.stop :])
        loss = _nll(model, {"inputs_embeds": torch.cat(parts, dim=1)}, ids, length)
        (slope,) = torch.autograd.grad(loss.sum(), chosen)
    with torch.no_grad():
        slope = slope[0].float()
        # through the module, not its weight: some scale what they look up
        rows = torch.arange(embeddings.weight.shape[0], device=model.device).split(_CHUNK)
        return torch.cat([slope @ embeddings(part).float().T for part in rows], dim=1)


def draw_candidates(
    current: Sequence[int], gradient: Tensor, allowed: Tensor, count: int, top_k: int, generator: torch.Generator
) -> list[tuple[int, ...]]:
    """
    Suffixes with one token replaced: a position uniformly, then one of its `top_k` tokens of the steepest descent.

    Args:
        current (`Sequence[int]`):
            l token ids.
        gradient (`Tensor`):
            `(l, V)`, of [`token_gradients`].
        allowed (`Tensor`):
            Ids that may be drawn, ascending.
        count (`int`), top_k (`int`):
            How many are drawn, and from how many at each position.
        generator (`torch.Generator`):
            On the CPU.

    Returns:
        `list[tuple[int, ...]]`: at most `count`, sorted: repetitions and `current` itself are left out.
    """
    slopes = gradient.cpu()[:, allowed]
    best = allowed[slopes.topk(min(top_k, len(allowed)), dim=1, largest=False).indices]
    places = torch.randint(len(current), (count,), generator=generator).tolist()
    ranks = torch.randint(best.shape[1], (count,), generator=generator).tolist()
    found = set()
    for place, rank in zip(places, ranks, strict=True):
        found.add((*current[:place], int(best[place, rank]), *current[place + 1 :]))
    return sorted(found - {tuple(current)})


def allowed_tokens(tokenizer: PreTrainedTokenizerBase, *, ascii_only: bool = True) -> Tensor:
    """
    Ids that a suffix may consist of, ascending: no special token and none without text; with `ascii_only` those of
    printable ASCII characters.

    Raises:
        ValueError: no token is left.
    """
    specials = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    specials |= set(tokenizer.all_special_ids)
    kept = []
    for token in range(len(tokenizer)):
        text = "" if token in specials else str(tokenizer.decode([token]))
        if text and (not ascii_only or (text.isascii() and text.isprintable())):
            kept.append(token)
    if not kept:
        raise ValueError(
            f"None of the {len(tokenizer)} tokens is printable ASCII text; pass ascii_only=False to draw from all."
        )
    return torch.tensor(kept)


def _nll(model: Any, inputs: Mapping[str, Tensor], ids: Tensor, length: int) -> Tensor:
    """Mean NLL `(B,)` float64 on the CPU of the last `length` tokens of ids `(B, T)`."""
    options: set[str] = {"logits_to_keep"} & set(inspect.signature(base_model(model).forward).parameters)
    kept = length + 1
    logits = model(
        **{name: value.to(model.device) for name, value in inputs.items()},
        attention_mask=torch.ones_like(ids).to(model.device),
        use_cache=False,
        **dict.fromkeys(options, kept),
    ).logits[:, -kept:]
    labels = ids[:, -kept:].to(logits.device)
    logps, _ = token_log_probs(logits, labels)
    return (-logps.mean(-1)).double().cpu()
