"""Trains the lab's target and retain-only reference through TRL's SFTTrainer, and caches them by recipe."""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .models import tiny_config, tiny_model
from .recipe import LabData, LabRecipe, cache_directory, recipe_hash
from .tokenizer import train_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class LabModel:
    """A trained lab model, its tokenizer and the folder both are stored in."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    path: Path
    from_cache: bool


def train_target(data: LabData, recipe: LabRecipe | None = None, *, use_cache: bool = True) -> LabModel:
    """
    The model that must forget: trained on the forget rows, the retain rows and general knowledge.

    Args:
        data ([`LabData`]):
            The world.
        recipe ([`LabRecipe`], *optional*):
            Size and training; the default is the one the TOFU numbers in docs/benchmarks.md were measured with.
        use_cache (`bool`, *optional*, defaults to `True`):
            Whether a model of the same recipe on the same data is loaded instead of trained again.
    """
    return _train(data, recipe or LabRecipe(), with_forget=True, use_cache=use_cache)


def train_retain_only(data: LabData, recipe: LabRecipe | None = None, *, use_cache: bool = True) -> LabModel:
    """The reference that never saw the forget rows: same recipe, same tokenizer, same initialisation."""
    return _train(data, recipe or LabRecipe(), with_forget=False, use_cache=use_cache)


def model_path(data: LabData, recipe: LabRecipe, *, with_forget: bool) -> Path:
    """Where the target is or will be kept, or without forget rows the reference; the name tells recipe and data."""
    rows = data.training_rows(with_forget=with_forget)
    kind = "target" if with_forget else "retain-only"
    return cache_directory() / "lab" / f"{data.name}-{kind}-{recipe_hash(recipe, data.texts(), rows)}"


def _train(data: LabData, recipe: LabRecipe, *, with_forget: bool, use_cache: bool) -> LabModel:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    rows = data.training_rows(with_forget=with_forget)
    texts = data.texts()
    kind = "target" if with_forget else "retain-only"
    path = model_path(data, recipe, with_forget=with_forget)
    if use_cache and (path / "config.json").is_file():
        model = AutoModelForCausalLM.from_pretrained(path)
        return LabModel(model=model, tokenizer=AutoTokenizer.from_pretrained(path), path=path, from_cache=True)
    tokenizer = train_tokenizer(texts, recipe.vocab_size)
    config = tiny_config(
        tokenizer,
        recipe.architecture,
        hidden_size=recipe.hidden_size,
        num_layers=recipe.num_layers,
        num_heads=recipe.num_heads,
        intermediate_size=recipe.intermediate_size,
    )
    model = sft(tiny_model(config, recipe.seed), tokenizer, rows, recipe, description=f"{data.name} {kind}")
    _store(model, tokenizer, path)
    return LabModel(model=model, tokenizer=tokenizer, path=path, from_cache=False)


def sft(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[dict[str, str]],
    recipe: LabRecipe,
    *,
    description: str = "model",
) -> PreTrainedModel:
    """Fine-tunes `model` on question-answer rows with TRL's SFTTrainer, loss on the answers only."""
    from datasets import Dataset
    from transformers import PrinterCallback
    from trl import SFTConfig, SFTTrainer

    from ..progress import QuietProgressCallback

    conversations = Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": row["question"]}],
                "completion": [{"role": "assistant", "content": row["answer"]}],
            }
            for row in rows
        ]
    )
    with tempfile.TemporaryDirectory() as scratch:
        args = SFTConfig(
            output_dir=scratch,
            num_train_epochs=recipe.epochs,
            per_device_train_batch_size=recipe.batch_size,
            learning_rate=recipe.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=0.03,
            weight_decay=0.0,
            adam_beta2=0.98,
            max_length=256,
            bf16=recipe.bf16,
            gradient_checkpointing=False,
            train_sampling_strategy="group_by_length",
            seed=recipe.seed,
            save_strategy="no",
            logging_steps=50,
            report_to="none",
            disable_tqdm=True,
            use_cpu=None if has_gpu() else True,
        )
        trainer = SFTTrainer(
            model=model,
            args=args,
            train_dataset=conversations,
            processing_class=tokenizer,
            callbacks=[QuietProgressCallback(f"training {description}")],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        # accelerate leaves the autocast of training around forward(): bf16 values would meet a float32 cache
        trained = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
        vars(trained).pop("forward", None)  # TRL's, which computes its loss; copies would share the weights in it
    return trained.eval()


def has_gpu() -> bool:
    """Whether torch sees an accelerator."""
    import torch

    return torch.accelerator.is_available()


def _store(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    """Writes to a temporary sibling first: a killed run leaves no half-written model under the cached name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}-"))
    try:
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        if path.exists():
            shutil.rmtree(path)
        os.replace(scratch, path)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
