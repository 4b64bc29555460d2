"""How much of a batch is padding: TOFU at 16 rows a side, in random order or grouped by length.

python tests/benchmarks/padding.py TOFU_FOLDER
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from datasets.utils.logging import disable_progress_bar

from hf_unlearn.lab.models import tiny_config, tiny_model
from hf_unlearn.lab.tofu import tofu_data
from hf_unlearn.lab.tokenizer import train_tokenizer
from hf_unlearn.trainers import UnlearningConfig, UnlearningTrainer

ROWS = 16
EPOCHS = 3
STRATEGIES = ("random", "group_by_length")
# The share that is allowed, for batches grouped by length.
ALLOWED = 0.10


def shares(batches: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """
    Padding as a share of all positions: of each part of the batches, each padded to its own longest row, and of the
    one forward pass over all of them (`"forward"`), where they are padded to the longest row of any.
    """
    real: dict[str, int] = {}
    positions: dict[str, int] = {}
    for batch in batches:
        masks = {"forget": batch["forget"]["attention_mask"]}
        masks |= {name: part["attention_mask"] for name, part in batch["retain"].items()}
        width = max(mask.shape[1] for mask in masks.values())
        for name, mask in masks.items():
            tokens = int(mask.sum())
            for key, size in ((name, mask.numel()), ("forward", mask.shape[0] * width)):
                real[key] = real.get(key, 0) + tokens
                positions[key] = positions.get(key, 0) + size
    return {key: 1.0 - real[key] / positions[key] for key in real}


def batches(trainer: UnlearningTrainer) -> Iterable[Mapping[str, Any]]:
    """What the trainer would train on in a few epochs."""
    loader = trainer.get_train_dataloader()
    for epoch in range(EPOCHS):
        loader.set_epoch(epoch)
        yield from loader


def measure(folder: str | Path) -> dict[str, dict[str, dict[str, float]]]:
    """[`shares`] by retain sets and by sampling strategy."""
    disable_progress_bar()
    data = tofu_data(folder)
    tokenizer = train_tokenizer(data.texts(), 4096)
    model = tiny_model(tiny_config(tokenizer, hidden_size=16, num_layers=1, num_heads=1))
    sets = {"forget10 + retain90": {"retain": data.retain}}
    sets["forget10 + retain90 + general knowledge"] = {"retain": data.retain, **data.general}
    found: dict[str, dict[str, dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name, retain in sets.items():
            found[name] = {}
            for strategy in STRATEGIES:
                args = UnlearningConfig(
                    output_dir=scratch,
                    per_device_train_batch_size=ROWS,
                    train_sampling_strategy=strategy,
                    eval_strategy="no",
                    save_strategy="no",
                    load_best_model_at_end=False,
                    report_to="none",
                    disable_tqdm=True,
                    use_cpu=True,
                )
                trainer = UnlearningTrainer(
                    model=model,
                    args=args,
                    forget_dataset=data.forget,
                    retain_dataset=retain,
                    processing_class=tokenizer,
                )
                found[name][strategy] = shares(batches(trainer))
    return found


def lines(found: Mapping[str, Mapping[str, Mapping[str, float]]]) -> list[str]:
    """The measured shares, a line each."""
    text = []
    for sets, strategies in found.items():
        for strategy, parts in strategies.items():
            each = ", ".join(f"{name} {share:.1%}" for name, share in parts.items() if name != "forward")
            text.append(f"padding, {sets}, {strategy}: {parts['forward']:.1%} of the forward pass ({each})")
    return text


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    print("\n".join(lines(measure(parser.parse_args().folder))))
