"""What `hf-unlearn edit` takes beside the options of the edit and of the model, and what it refuses before loading."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .data_arguments import load_rows

if TYPE_CHECKING:
    from ..editing.config import EditConfig


@dataclass
class EditArguments:
    """
    Datasets and output of `hf-unlearn edit`. A dataset is what the other commands take, see [`DataArguments`].

    Args:
        dataset, dataset_config, dataset_split (`str`):
            Rows that say the words (in any format that the trainers take), or prompts alone.
        retain_dataset, retain_config, retain_split (`str`, *optional*):
            Rows whose answers should stay.
        attack_dataset, attack_config, attack_split (`str`, *optional*):
            Jailbreak prompts, only measured on.
        output_dir (`str`, *optional*, defaults to `"outputs/edit"`):
            Receives the adapter (or the merged model), its card, `edit.json` and `plan/`. Must be empty or absent.
        merge (`bool`, *optional*, defaults to `False`):
            Write a merged model with its tokenizer instead of an adapter.
        tokenizer_name_or_path (`str`, *optional*):
            Tokenizer, where the model's folder has none.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether code from the hub may run.
    """

    dataset: str | None = field(default=None, metadata={"help": "Rows that say the words: hub id, folder or file."})
    dataset_config: str | None = field(default=None, metadata={"help": "Its configuration."})
    dataset_split: str = field(default="train", metadata={"help": "Its split."})
    retain_dataset: str | None = field(default=None, metadata={"help": "Rows to keep: hub id, folder or file."})
    retain_config: str | None = field(default=None, metadata={"help": "Its configuration."})
    retain_split: str = field(default="train", metadata={"help": "Its split."})
    attack_dataset: str | None = field(default=None, metadata={"help": "Jailbreak prompts, only measured on."})
    attack_config: str | None = field(default=None, metadata={"help": "Its configuration."})
    attack_split: str = field(default="train", metadata={"help": "Its split."})
    output_dir: str = field(default="outputs/edit", metadata={"help": "Output folder, empty or absent."})
    merge: bool = field(default=False, metadata={"help": "Write a merged model instead of an adapter."})
    tokenizer_name_or_path: str | None = field(default=None, metadata={"help": "Tokenizer, if not the model's."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Whether code from the hub may run."})

    def load(self, kind: str) -> Any:
        """The dataset of `kind`, `"dataset"`, `"retain"` or `"attack"`; None where there is none."""
        path, prefix = (self.dataset, "dataset") if kind == "dataset" else (getattr(self, f"{kind}_dataset"), kind)
        if path is None:
            return None
        rows = load_rows(path, getattr(self, f"{prefix}_config"), getattr(self, f"{prefix}_split"))
        if not len(rows):
            raise ValueError(f"{'dataset' if kind == 'dataset' else f'{kind}_dataset'} is {path!r}, without a row.")
        return rows


def check_request(given: EditArguments, config: EditConfig, model_args: Any) -> None:
    """
    Refuses what cannot work, before a model is loaded; makes the output folder.

    Raises:
        ValueError: what is missing or does not go together.
        OSError: the output folder cannot be written.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("hf-unlearn edit runs in one process; start it without accelerate launch or torchrun.")
    if model_args.model_name_or_path is None:
        raise ValueError("model_name_or_path is missing: the id or the folder of the model to edit.")
    if given.dataset is None:
        raise ValueError("dataset is missing: rows that say the words, or prompts (hub id, folder or file).")
    if config.method == "pcr" and not config.all_words() and not config.all_texts():
        raise ValueError("There are no words to make unreachable; give --words, or --words_file (one a line).")
    config.all_words()  # of the other methods too: a file that is not there is an error
    if model_args.use_peft:
        raise ValueError("use_peft is for training; an edit is written as an adapter unless --merge is given.")
    if given.merge and (model_args.load_in_4bit or model_args.load_in_8bit):
        raise ValueError("An edit cannot be merged into quantised weights; leave out --merge, or load_in_4bit/8bit.")
    points = config.source != "unembedding" and config.searches
    if config.method == "pcr" and given.retain_dataset is None and (points or config.eps_percentile is not None):
        wanted = "eps_percentile" if config.eps_percentile is not None else f"source={config.source!r} without eps"
        raise ValueError(f"{wanted} measures distances on retain rows; give retain_dataset.")
    prepare_output(given.output_dir)


def prepare_output(output_dir: str) -> Path:
    """
    Makes a folder to write into.

    Raises:
        ValueError: it holds something.
        OSError: it cannot be made or written.
    """
    folder = Path(output_dir).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    held = sorted(entry.name for entry in folder.iterdir())
    if held:
        raise ValueError(
            f"output_dir {output_dir!r} holds {', '.join(held[:5])}; a model and an adapter of two runs in one folder "
            "would be neither. Give an empty or a new folder."
        )
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"output_dir {output_dir!r} cannot be written.")
    return folder
