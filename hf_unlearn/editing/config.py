"""Options of an edit: one dataclass for [`plan_edit`], the callback and the command line."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from .directions import SOURCES
from .positions import PositionName

Method = Literal["pcr", "tsr", "arr"]
METHODS: tuple[Method, ...] = get_args(Method)
POSITIONS = ("occurrence", *get_args(PositionName))
TOKENS = ("distinct", "first")


@dataclass(kw_only=True)
class EditConfig:
    r"""
    Options of a constrained edit (arXiv 2510.03567).

    Args:
        method (`str`, *optional*, defaults to `"pcr"`):
            `"pcr"` (point-wise constrained regions: the smallest edit under which words are unreachable at given
            places), `"tsr"` (towards safer regions) or `"arr"` (away from risky regions), both by projected gradient.
        words (`list[str]`, *optional*):
            Words or phrases: what becomes unreachable (PCR), the harmful vocabulary (ARR), or the safe one (TSR).
        words_file (`str`, *optional*):
            A text file with one of them a line, in addition.
        texts (`dict` or `str`, *optional*):
            PCR with `source="activation"` and a level: example texts of concepts that no word names, as
            `{name: [text, ...]}` or a JSON lines file with `concept` and `text`. Their point is the block's mean
            output on them.
        layers (`list[int]`, *optional*):
            Blocks whose second MLP matrix is edited, from 1, or negative from the end; the last one by default.
        positions (`str`, *optional*, defaults to `"occurrence"`):
            PCR: at which tokens. `"occurrence"`: before every occurrence of a word in a response; `"last_prompt"`,
            `"response"`, `"predicting"` (whose outputs predict the response) or `"all"`: there, whatever the rows say.
        token (`str`, *optional*, defaults to `"distinct"`):
            PCR with `positions="occurrence"`: the token by which a word is stopped where a row says it. `"distinct"`:
            the one by which it differs from what retain rows say, see [`distinct_token`]; the first without retain
            rows, with levels, and with points. `"first"`: the first, so that the word cannot even begin.
        tokens_per_word (`int`, *optional*, defaults to `1`):
            With `token="distinct"`: so many tokens of a word share what it has to lose, where it has as many from
            there on: each of n may have the n-th root of `probability`. Cheaper than to ask all of one token, and it
            holds further; a single token is forbidden less.
        probability (`float`, *optional*, defaults to `1e-6`):
            PCR: the most that this token, and so the word, may have at its places, by a real forward pass. The levels
            of the constraints are searched for it. Not used with `eps` or `eps_percentile`.
        source (`str`, *optional*, defaults to `"unembedding"`):
            PCR: what words are in the space of a block's output: `"unembedding"` (directions of the output head),
            `"embedding"` (points: input embeddings, as in the paper) or `"activation"` (points: the block's own mean
            output where the word has just been said).
        eps (`float`, *optional*):
            PCR: distances of points, or levels of directions, as they are, in the units of the output.
        eps_percentile (`float`, *optional*):
            PCR: the same as a percentile of what retain activations have: that share of them is nearer (points) or
            above (directions).
        solver (`str`, *optional*, defaults to `"joint"`):
            PCR: `"joint"`, or `"greedy"`, the paper's.
        ridge (`float`, *optional*, defaults to `0.01`):
            PCR: weight of the edit's own norm beside the disturbance of retain outputs; see [`solve_pcr`].
        soft_margin (`float`, *optional*):
            PCR with `eps` or `eps_percentile`: price of what a margin lacks; hard constraints by default.
        variants (`int`, *optional*, defaults to `4`):
            PCR: copies of each row in whose prompt tokens are missing or others, constrained too, so that the edit
            holds for other wordings (see [`with_variants`]).
        generation_rounds (`int`, *optional*, defaults to `2`):
            PCR: after an edit is found, answers are generated with it; places where they still say a word are added
            and the edit is made anew, at most so often. 0: off.
        max_new_tokens (`int`, *optional*, defaults to `64`):
            Longest generated answer.
        samples (`int`, *optional*, defaults to `4`):
            Answers to each row that are drawn at temperature 1, before and after, to see whether they say a word.
        retain_examples (`int`, *optional*, defaults to `400`):
            At most so many retain rows are read.
        retain_positions (`int`, *optional*, defaults to `4096`):
            At most so many of their activations are weighed.
        weigh_retain (`bool`, *optional*, defaults to `False`):
            PCR with `probability` and directions: a first edit is made for the rows alone, and retain activations are
            then weighed by what it costs their answers, see [`retain_weights`]. Keeps more, takes longer.
        radius (`float`, *optional*, defaults to `0.05`):
            TSR, ARR: largest norm of the edit, as a share of the matrix's own (`radius_unit="relative"`) or as it is.
        radius_unit (`str`, *optional*, defaults to `"relative"`):
            `"relative"` or `"absolute"`.
        steps (`int`, *optional*, defaults to `100`):
            TSR, ARR: gradient steps.
        learning_rate (`float`, *optional*):
            TSR, ARR: see [`RegionConfig`], whose default applies.
        rank (`int`, *optional*):
            TSR, ARR: rank of the edit; a full matrix by default.
        retain_weight (`float`, *optional*, defaults to `1.0`):
            TSR, ARR: weight of the retain term.
        free_positions (`int`, *optional*, defaults to `4`):
            ARR: tokens of the relaxed prompt.
        max_length (`int`, *optional*, defaults to `1024`):
            Longest row in tokens.
        batch_size (`int`, *optional*, defaults to `16`):
            Rows a forward pass, on each rank.
        seed (`int`, *optional*, defaults to `0`):
            Of every choice.
    """

    method: str = field(default="pcr", metadata={"help": "How the edit is made.", "choices": list(METHODS)})
    words: list[str] | None = field(default=None, metadata={"help": "Words or phrases."})
    words_file: str | None = field(default=None, metadata={"help": "Text file with one word or phrase a line."})
    texts: dict | str | None = field(
        default=None, metadata={"help": "PCR: example texts of concepts, {name: [text, ...]} or a JSON lines file."}
    )
    layers: list[int] | None = field(default=None, metadata={"help": "Blocks to edit, from 1. Default: the last."})
    positions: str = field(default="occurrence", metadata={"help": "PCR: places.", "choices": list(POSITIONS)})
    token: str = field(default="distinct", metadata={"help": "PCR: token that stops a word.", "choices": list(TOKENS)})
    tokens_per_word: int = field(default=1, metadata={"help": "PCR: distinct tokens that share a word's fall."})
    probability: float = field(default=1e-6, metadata={"help": "PCR: the most that a word may have."})
    source: str = field(default="unembedding", metadata={"help": "PCR: what words are.", "choices": list(SOURCES)})
    eps: float | None = field(default=None, metadata={"help": "PCR: distance or level, instead of probability."})
    eps_percentile: float | None = field(default=None, metadata={"help": "PCR: the same by retain activations."})
    solver: str = field(default="joint", metadata={"help": "PCR: solver.", "choices": ["joint", "greedy"]})
    ridge: float = field(default=0.01, metadata={"help": "PCR: weight of the edit's own norm."})
    soft_margin: float | None = field(default=None, metadata={"help": "PCR: price of what a margin lacks."})
    variants: int = field(default=4, metadata={"help": "PCR: copies of rows with other tokens in their prompts."})
    generation_rounds: int = field(default=2, metadata={"help": "PCR: rounds of generating and adding places."})
    max_new_tokens: int = field(default=64, metadata={"help": "Longest generated answer."})
    samples: int = field(default=4, metadata={"help": "Answers to each row that are sampled to measure."})
    retain_examples: int = field(default=400, metadata={"help": "Retain rows that are read, at most."})
    retain_positions: int = field(default=4096, metadata={"help": "Retain activations, at most."})
    weigh_retain: bool = field(default=False, metadata={"help": "PCR: weigh retain tokens by what they would lose."})
    radius: float = field(default=0.05, metadata={"help": "TSR, ARR: largest norm of the edit."})
    radius_unit: str = field(
        default="relative", metadata={"help": "TSR, ARR: unit of radius.", "choices": ["relative", "absolute"]}
    )
    steps: int = field(default=100, metadata={"help": "TSR, ARR: gradient steps."})
    learning_rate: float | None = field(default=None, metadata={"help": "TSR, ARR: learning rate."})
    rank: int | None = field(default=None, metadata={"help": "TSR, ARR: rank. Default: a full matrix."})
    retain_weight: float = field(default=1.0, metadata={"help": "TSR, ARR: weight of the retain term."})
    free_positions: int = field(default=4, metadata={"help": "ARR: tokens of the relaxed prompt."})
    max_length: int = field(default=1024, metadata={"help": "Longest row in tokens."})
    batch_size: int = field(default=16, metadata={"help": "Rows a forward pass."})
    seed: int = field(default=0, metadata={"help": "Of every choice."})

    def __post_init__(self) -> None:
        choices = {
            "method": METHODS,
            "positions": POSITIONS,
            "token": TOKENS,
            "source": SOURCES,
            "solver": ("joint", "greedy"),
            "radius_unit": ("relative", "absolute"),
        }
        for name, allowed in choices.items():
            value = getattr(self, name)
            if value not in allowed and not (name == "positions" and callable(value)):
                raise ValueError(f"{name} is {value!r}; expected one of {', '.join(allowed)}.")
        if isinstance(self.words, str):
            raise ValueError(f"words is the string {self.words!r}; expected a list of words.")
        if not 0 < self.probability < 1:
            raise ValueError(f"probability is {self.probability}; expected a number between 0 and 1, both excluded.")
        by_odds = self.searches and self.source == "unembedding"
        if self.tokens_per_word > 1 and not (by_odds and self.token == "distinct" and self.positions == "occurrence"):
            raise ValueError(
                f"tokens_per_word is {self.tokens_per_word}, which is about tokens within words; it needs "
                "token='distinct' and positions='occurrence', and PCR with a probability and source='unembedding'."
            )
        if self.weigh_retain and not by_odds:
            raise ValueError(
                "weigh_retain weighs what an edit for a probability costs; it needs method='pcr' and "
                "source='unembedding', without eps and eps_percentile."
            )
        if self.eps is not None and self.eps_percentile is not None:
            raise ValueError("eps and eps_percentile are two ways to say the same; give one of them.")
        if self.eps_percentile is not None and not 0 < self.eps_percentile < 100:
            raise ValueError(f"eps_percentile is {self.eps_percentile}; expected a number between 0 and 100.")
        if self.texts is not None and (self.method != "pcr" or self.source != "activation" or not self.has_level):
            raise ValueError(
                "texts give points of a block's output, which no token belongs to; use method='pcr', "
                "set source='activation', and eps or eps_percentile."
            )
        if self.soft_margin is not None and not self.has_level:
            raise ValueError("soft_margin needs eps or eps_percentile: a wanted probability is a hard limit.")
        least = {
            "tokens_per_word": 1,
            "variants": 0,
            "generation_rounds": 0,
            "max_new_tokens": 1,
            "samples": 0,
            "retain_examples": 1,
            "retain_positions": 1,
            "steps": 1,
            "free_positions": 1,
            "max_length": 2,
            "batch_size": 1,
        }
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least {bound}.")

    @property
    def has_level(self) -> bool:
        """Whether PCR's levels are given and not searched."""
        return self.eps is not None or self.eps_percentile is not None

    @property
    def searches(self) -> bool:
        """Whether PCR's levels are searched for a wanted probability."""
        return self.method == "pcr" and not self.has_level

    def all_words(self) -> list[str]:
        """`words` and the lines of `words_file`."""
        found = list(self.words or [])
        if self.words_file is not None:
            path = Path(self.words_file).expanduser()
            if not path.is_file():
                raise ValueError(f"words_file is {self.words_file!r}, which is not a file; expected a word a line.")
            found += [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        return found

    def all_texts(self) -> dict[str, list[str]]:
        """`texts`, read from their file where they are in one."""
        if isinstance(self.texts, dict):
            found = {name: [texts] if isinstance(texts, str) else list(texts) for name, texts in self.texts.items()}
        elif self.texts is None:
            return {}
        else:
            path = Path(self.texts).expanduser()
            if not path.is_file():
                raise ValueError(f"texts is {self.texts!r}, which is not a file; expected JSON lines.")
            found = {}
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
                row = json.loads(line) if line.strip() else None
                if row is not None and not {"concept", "text"} <= set(row):
                    raise ValueError(f"Line {number} of {path} has {sorted(row)}; expected concept and text.")
                if row is not None:
                    found.setdefault(row["concept"], []).append(row["text"])
        if not found or not all(texts and all(text.strip() for text in texts) for texts in found.values()):
            raise ValueError("texts hold no text, or an empty one; expected at least one text for each concept.")
        return found

    def as_settings(self) -> dict[str, Any]:
        """What a plan keeps: the options, with the number of words instead of the words themselves."""
        kept = asdict(self)
        kept["words"] = None
        kept["words_file"] = None
        kept["texts"] = None
        kept["positions"] = self.positions if isinstance(self.positions, str) else "callable"
        return {**kept, "number_of_words": len(self.all_words()), "number_of_texts": len(self.all_texts())}
