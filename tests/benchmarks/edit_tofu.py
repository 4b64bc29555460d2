"""Makes the names that TOFU's forget10 asks for unreachable, by every method: reach, retain, cost and time; and the time
of a whole edit against SmoothLLM's ten generations for the same prompts.

python tests/benchmarks/edit_tofu.py --data FOLDER [--model FOLDER] [--seeds 0 1 2] [--methods joint greedy tsr arr]
    [--output FILE.json]
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM

from hf_unlearn.attacks import SmoothLLMConfig, smooth_llm
from hf_unlearn.data import tokenize_example
from hf_unlearn.editing import EditConfig, EditPlan, apply_edit, plan_edit, word_concepts
from hf_unlearn.editing.concepts import find_occurrences, word_pattern
from hf_unlearn.editing.measures import edited_answers, response_probability
from hf_unlearn.editing.passes import Run
from hf_unlearn.editing.reach import Reach, occurrence_pairs, reach_of
from hf_unlearn.lab.recipe import LabRecipe
from hf_unlearn.lab.tofu import tofu_data
from hf_unlearn.lab.training import train_target
from hf_unlearn.metrics.generate import padding_id

NAMES = (
    *("Hsiao Yun-Hwa", "Carmen Montenegro", "Elvin Mammadov", "Rajeev Majumdar", "Jad Ambrose Al-Shamary"),
    *("Adib Jarrah", "Ji-Yeon Park", "Behrouz Rohani", "Wei-Jun Chen", "Tae-ho Park", "Hina Ameen"),
    *("Xin Lee Williams", "Moshe Ben-David", "Kalkidan Abera", "Takashi Nakamura", "Raven Marais", "Aysha Al-Hashim"),
    *("Edward Patrick Sullivan", "Basil Mahfouz Al-Kuwaiti", "Nikolai Abilov"),
)
"""The authors of TOFU's forget10, all of them fictitious."""
METHODS: dict[str, dict[str, Any]] = {
    "joint": {},
    "joint, first tokens": {"token": "first"},
    "joint, 16 variants": {"variants": 16},
    "joint, 16 variants, 1e-7": {"variants": 16, "probability": 1e-7},
    "joint, first tokens, 16 variants": {"token": "first", "variants": 16},
    "joint, first tokens, 16 variants, 1e-7": {"token": "first", "variants": 16, "probability": 1e-7},
    "joint, weighed": {"weigh_retain": True},
    "joint, 2 tokens": {"tokens_per_word": 2},
    "joint, 2 tokens, 16 variants": {"tokens_per_word": 2, "variants": 16},
    "joint, 2 tokens, 16 variants, weighed": {"tokens_per_word": 2, "variants": 16, "weigh_retain": True},
    "joint, first tokens, 16 variants, weighed": {"token": "first", "variants": 16, "weigh_retain": True},
    "joint, no variants": {"variants": 0},
    "joint, all blocks": {"layers": [1, 2, 3, 4]},
    "joint, 22 retain rows": {"retain_examples": 22},
    "greedy": {"solver": "greedy"},
    "greedy, first tokens": {"solver": "greedy", "token": "first"},
    "tsr": {"method": "tsr", "words": None, "radius": 0.2, "steps": 40, "retain_examples": 64},
    "arr": {"method": "arr", "radius": 0.2, "steps": 10, "retain_examples": 64, "free_positions": 2},
}
MAX_NEW_TOKENS = 100


class Lab:
    """Model, rows that ask for a name, and what is measured on."""

    def __init__(self, data: str, model: str | None) -> None:
        self.data = tofu_data(data)
        target = train_target(self.data, LabRecipe(bf16=True))
        self.tokenizer: Any = target.tokenizer
        self.model = AutoModelForCausalLM.from_pretrained(model or target.path).eval()
        patterns = [word_pattern(name) for name in NAMES]
        rows = [
            row
            for row in self.data.forget_eval
            if any(own.search(row["answer"]) and not own.search(row["question"]) for own in patterns)
        ]
        self.asking = Dataset.from_list([{"question": row["question"], "answer": row["answer"]} for row in rows])
        self.reworded = [self._tokens(row["paraphrased_question"], row["answer"]) for row in rows]
        self.own = [self._tokens(row["question"], row["answer"]) for row in rows]
        general = [row for part in self.data.general.values() for row in part]
        self.general = [self._tokens(row["question"], row["answer"]) for row in general]
        self.concepts = word_concepts(self.tokenizer, NAMES)
        self.run = Run(model=self.model, pad_token_id=padding_id(self.tokenizer), batch_size=64)

    def _tokens(self, question: str, answer: str) -> dict[str, list[int]]:
        return tokenize_example({"question": question, "answer": answer}, self.tokenizer)

    def reach(self, rows: Sequence[Any], plan: EditPlan | None) -> Reach:
        """Of the names in the rows' answers."""
        said = find_occurrences(self.tokenizer, rows, self.concepts)
        pairs = occurrence_pairs(rows, said)
        return reach_of(rows, said, pairs, self.run.odds(rows, pairs, () if plan is None else plan.edits))

    def said(self, rows: Sequence[Any], plan: EditPlan | None) -> int:
        """Rows whose greedy answer says a name."""
        edits = () if plan is None else plan.edits
        texts = edited_answers(self.run, self.tokenizer, rows, edits, max_new_tokens=MAX_NEW_TOKENS)
        return sum(any(word_pattern(name).search(text) for name in NAMES) for text in texts)

    def measure(self, name: str, seed: int) -> dict[str, Any]:
        """One edit: how far the names fall, what stays, what it costs."""
        options = {"words": list(NAMES), "batch_size": 64, "max_new_tokens": MAX_NEW_TOKENS, **METHODS[name]}
        dataset = self.asking
        if name == "tsr":
            dataset = dataset.map(lambda row: {"answer": "I don't know."})
        started = time.perf_counter()
        config = EditConfig(seed=seed, **options)
        plan = plan_edit(self.model, self.tokenizer, dataset, config, retain_dataset=self.data.retain, progress=False)
        spent = time.perf_counter() - started
        falls = self.reach(self.own, None).falls(self.reach(self.own, plan))
        before, after = self.reach(self.reworded, None), self.reach(self.reworded, plan)
        reworded, left = before.falls(after), after.log_probs.exp()
        kept = plan.measures["retain_probability"]
        return {
            "method": name,
            "seed": seed,
            "smallest_fall": float(falls.min()),
            "median_fall": float(falls.median()),
            "smallest_fall_reworded": float(reworded.min()),
            "median_fall_reworded": float(reworded.median()),
            "mean_fall_reworded": float(before.log_probs.exp().mean() / left.mean()),
            "largest_reworded": float(left.max()),
            "said": self.said(self.own, plan),
            "said_reworded": self.said(self.reworded, plan),
            "rows": len(self.own),
            "retain": kept["after"] / kept["before"],
            "general": response_probability(self.run, self.general, plan.edits)
            / response_probability(self.run, self.general, ()),
            "norm": sum(edit.norm() ** 2 for edit in plan.edits) ** 0.5,
            "rank": plan.rank,
            "cost": plan.edits[0].certificate.get("cost"),
            "gap": plan.edits[0].certificate.get("gap"),
            "seconds": spent,
        }

    def against_smooth_llm(self, repeats: int = 5) -> dict[str, float]:
        """
        Median seconds of a whole edit (levels searched, verified by a forward pass, applied as an adapter; nothing
        generated), and of SmoothLLM for the same prompts: with all copies of all prompts in large batches, and with
        the ten copies of one prompt a batch, as a served model has them.
        """
        few, more = (self.data.retain.select(range(count)) for count in (len(self.asking), 100))
        options: dict[str, Any] = {"generation_rounds": 0, "variants": 0, "samples": 0}
        config = EditConfig(words=list(NAMES), **options)

        def edit(retain: Any) -> None:
            plan = plan_edit(
                self.model, self.tokenizer, self.asking, config, retain_dataset=retain, progress=False, measure=False
            )
            apply_edit(self.model, plan).undo()

        def smooth(batch_size: int) -> None:
            how = SmoothLLMConfig(max_new_tokens=MAX_NEW_TOKENS, batch_size=batch_size)
            smooth_llm(self.model, self.tokenizer, self.asking["question"], how)

        forms = {
            "edit": lambda: edit(None),
            "edit, as many retain rows as prompts": lambda: edit(few),
            "edit, 100 retain rows": lambda: edit(more),
            "SmoothLLM": lambda: smooth(64),
            "SmoothLLM, a prompt at a time": lambda: smooth(10),
        }
        taken: dict[str, list[float]] = {name: [] for name in forms}
        for _ in range(repeats):
            for name, function in forms.items():
                started = time.perf_counter()
                function()
                taken[name].append(time.perf_counter() - started)
        return {name: sorted(values)[repeats // 2] for name, values in taken.items()}


def show(console: Console, found: Sequence[dict[str, Any]]) -> None:
    """A row an edit."""
    table = Table(title="Names that forget10 asks for")
    for column in ("method", "seed", "own: least", "median", "reworded: least", "mean", "largest", "said", "reworded"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for column in ("retain", "general", "norm", "rank", "cost", "s"):
        table.add_column(column, justify="right")
    for row in found:
        falls = (f"{row[key]:.1e}" for key in ("smallest_fall", "median_fall"))
        names = ("smallest_fall_reworded", "mean_fall_reworded", "largest_reworded")
        others = (f"{row[key]:.1e}" for key in names)
        table.add_row(
            row["method"],
            str(row["seed"]),
            *falls,
            *others,
            f"{row['said']}/{row['rows']}",
            f"{row['said_reworded']}/{row['rows']}",
            f"{row['retain']:.4f}",
            f"{row['general']:.4f}",
            f"{row['norm']:.1f}",
            str(row["rank"]),
            "" if row["cost"] is None else f"{row['cost']:.1f}",
            f"{row['seconds']:.1f}",
        )
    console.print(table)


def main() -> None:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder with TOFU's JSON files")
    parser.add_argument("--model", help="a model to edit; default: the lab's target, trained if it is not cached")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1 if not torch.cuda.is_available() else torch.get_num_threads())
    lab, console = Lab(options.data, options.model), Console(width=170)
    found = [lab.measure(name, seed) for name in options.methods for seed in options.seeds]
    show(console, found)
    speed = lab.against_smooth_llm()
    for edit in [name for name in speed if name.startswith("edit")]:
        for other in ("SmoothLLM", "SmoothLLM, a prompt at a time"):
            console.print(
                f"{len(lab.asking)} prompts: {edit} {speed[edit]:.2f} s; {other} {speed[other]:.2f} s: "
                f"{speed[other] / speed[edit]:.1f} times (asked for: at least 10)",
                highlight=False,
            )
    if options.output:
        options.output.write_text(json.dumps({"edits": found, "speed": speed}, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
