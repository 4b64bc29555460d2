"""Where the command line's datasets come from: the hub, a local folder, or a file."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_BUILDERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}


@dataclass
class DataArguments:
    """
    Datasets of `hf-unlearn primal-dual` and `hf-unlearn unlearn`.

    A dataset is a hub id with an optional configuration, a local file (JSON, JSON lines, CSV, Parquet, text), a folder
    written by `save_to_disk`, or a folder that holds `{config}.json` or `{config}.jsonl`, as TOFU's.

    Args:
        forget_dataset, forget_config, forget_split (`str`):
            Rows to forget.
        retain_dataset, retain_config, retain_split (`str`, *optional*):
            Rows to keep.
        retain_datasets (`dict` or JSON, *optional*):
            Several retain sets: `{name: {"path": ..., "config": ..., "split": ...}}`. Instead of `retain_dataset`.
        holdout_dataset, holdout_config, holdout_split (`str`, *optional*):
            Rows the model has never seen.
        eval_dataset, eval_config, eval_split (`str`, *optional*):
            Further rows whose loss is reported.
        chunk_text (`bool`, *optional*, defaults to `False`):
            Join the `text` column of a dataset and cut the stream of tokens into rows of `max_length`: for books and
            corpora, whose rows are far longer than the model can read.
        tokenizer_name_or_path (`str`, *optional*):
            Tokenizer, where the model's folder has none.
    """

    forget_dataset: str = field(metadata={"help": "Rows to forget: hub id, folder or file."})
    forget_config: str | None = field(default=None, metadata={"help": "Its configuration."})
    forget_split: str = field(default="train", metadata={"help": "Its split."})
    retain_dataset: str | None = field(default=None, metadata={"help": "Rows to keep: hub id, folder or file."})
    retain_config: str | None = field(default=None, metadata={"help": "Its configuration."})
    retain_split: str = field(default="train", metadata={"help": "Its split."})
    retain_datasets: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Several retain sets as JSON: {name: {path, config, split}}."}
    )
    holdout_dataset: str | None = field(default=None, metadata={"help": "Rows that the model has never seen."})
    holdout_config: str | None = field(default=None, metadata={"help": "Its configuration."})
    holdout_split: str = field(default="train", metadata={"help": "Its split."})
    eval_dataset: str | None = field(default=None, metadata={"help": "Further rows to report the loss of."})
    eval_config: str | None = field(default=None, metadata={"help": "Its configuration."})
    eval_split: str = field(default="train", metadata={"help": "Its split."})
    chunk_text: bool = field(default=False, metadata={"help": "Join the text and cut it into rows of max_length."})
    tokenizer_name_or_path: str | None = field(default=None, metadata={"help": "Tokenizer, if not the model's."})

    def __post_init__(self) -> None:
        if isinstance(self.retain_datasets, str):
            try:
                self.retain_datasets = json.loads(self.retain_datasets)
            except json.JSONDecodeError as error:
                raise ValueError(f"retain_datasets is not JSON ({error}): {self.retain_datasets!r}") from error
        if self.retain_datasets is not None:
            _check_sets(self.retain_datasets)
            if self.retain_dataset is not None:
                raise ValueError("retain_dataset and retain_datasets are both given; expected one of them.")

    def load(self, kind: str) -> Any:
        """
        The dataset of `kind`: `"forget"`, `"retain"` (one dataset, or a dict of several), `"holdout"` or `"eval"`.
        """
        if kind == "retain" and self.retain_datasets:
            assert isinstance(self.retain_datasets, dict)
            return {
                name: load_rows(spec["path"], spec.get("config"), spec.get("split", "train"))
                for name, spec in self.retain_datasets.items()
            }
        path = getattr(self, f"{kind}_dataset")
        return (
            None if path is None else load_rows(path, getattr(self, f"{kind}_config"), getattr(self, f"{kind}_split"))
        )


def _check_sets(sets: Any) -> None:
    good = isinstance(sets, dict) and all(
        isinstance(spec, dict) and "path" in spec and set(spec) <= {"path", "config", "split"}
        for spec in sets.values()
    )
    if not good or not sets:
        raise ValueError(
            f'retain_datasets is {sets!r}; expected {{"name": {{"path": "...", "config": "...", "split": "train"}}}}.'
        )


def load_rows(path: str, config: str | None = None, split: str = "train") -> Any:
    """
    One dataset from the hub, a folder or a file.

    Raises:
        FileNotFoundError: a local path that is not there.
        ValueError: a folder or file that no rule reads.
    """
    from datasets import Dataset, DatasetDict, load_dataset, load_from_disk

    place = Path(path).expanduser()
    if place.is_file():
        builder = _BUILDERS.get(place.suffix)
        if builder is None:
            raise ValueError(f"{place} has the ending {place.suffix!r}; expected one of {', '.join(_BUILDERS)}.")
        return load_dataset(builder, data_files=str(place), split="train")
    if place.is_dir():
        for suffix in (".json", ".jsonl"):
            if config is not None and (place / f"{config}{suffix}").is_file():
                return load_dataset("json", data_files=str(place / f"{config}{suffix}"), split="train")
        if (place / "dataset_info.json").is_file() or (place / "dataset_dict.json").is_file():
            loaded = load_from_disk(str(place))
            if isinstance(loaded, DatasetDict):
                return loaded[split]
            assert isinstance(loaded, Dataset)
            return loaded
        names = ", ".join(sorted(entry.name for entry in place.iterdir())[:10]) or "nothing"
        raise ValueError(
            f"{place} holds {names}; expected {config or '<config>'}.json, or a folder written by save_to_disk."
        )
    if path.startswith((".", "/", "~")):
        raise FileNotFoundError(f"{place} does not exist. Give an existing file or folder, or a hub id.")
    return load_dataset(path, config, split=split)
