"""TOFU (arXiv 2401.06121): 200 fictitious authors, 20 question-answer pairs each, from the hub or a local folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datasets import Dataset

TOFU_HUB_ID = "locuslab/TOFU"
TOFU_SPLITS = (
    "full",
    "forget01",
    "forget05",
    "forget10",
    "retain99",
    "retain95",
    "retain90",
    "real_authors",
    "world_facts",
    "forget01_perturbed",
    "forget05_perturbed",
    "forget10_perturbed",
    "retain_perturbed",
    "real_authors_perturbed",
    "world_facts_perturbed",
)


def load_tofu(split: str, path_or_hub: str | Path = TOFU_HUB_ID) -> Dataset:
    """
    Loads one part of TOFU with its columns untouched.

    Args:
        split (`str`):
            One of [`TOFU_SPLITS`], e.g. `"forget10"` or `"forget10_perturbed"`.
        path_or_hub (`str` or `Path`, *optional*, defaults to `"locuslab/TOFU"`):
            A local folder that holds `{split}.json` or `{split}.jsonl` (JSON lines), or a dataset id on the hub whose
            configurations carry the split's name.

    Returns:
        `Dataset`: rows with `question` (`str`) and `answer` (`str`); the `*_perturbed` parts add `perturbed_answer`
        (`list[str]`) and, for the fictitious authors, `paraphrased_answer` and `paraphrased_question` (`str`).

    Raises:
        ValueError: the split is unknown.
        FileNotFoundError: `path_or_hub` is a local path without that split.
    """
    from datasets import Dataset, load_dataset

    if split not in TOFU_SPLITS:
        raise ValueError(f"Unknown TOFU split {split!r}; expected one of: {', '.join(TOFU_SPLITS)}.")
    folder = Path(path_or_hub).expanduser()
    looks_local = isinstance(path_or_hub, Path) or str(path_or_hub).startswith((".", "/", "~")) or folder.exists()
    if not looks_local:
        return load_dataset(str(path_or_hub), split, split="train")
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder. Give the folder that holds {split}.json, or a hub id.")
    for suffix in (".json", ".jsonl"):
        file = folder / f"{split}{suffix}"
        if file.is_file():
            return Dataset.from_list(_read_json_lines(file))
    raise FileNotFoundError(
        f"{folder} holds no {split}.json. "
        f"Files there: {', '.join(sorted(p.name for p in folder.iterdir())) or 'none'}."
    )


def _read_json_lines(file: Path) -> list[dict]:
    import json

    # Read by hand, not by the "json" builder: a local folder should leave no copy in the user's datasets cache.
    with file.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines if line.strip()]
