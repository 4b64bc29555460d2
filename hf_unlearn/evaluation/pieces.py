"""Finished pieces of a scoring as JSON files: complete or absent, and never taken for those of something else."""

from __future__ import annotations

import hashlib
import json
import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .._version import __version__
from ..reports.plain import pull_non_finite, put_non_finite
from ..reports.schema import write_text

FOLDER = "pieces"
FORMAT, FORMAT_VERSION = "hf_unlearn.piece", 1


@dataclass(frozen=True)
class Pieces:
    """
    The folder of finished pieces, or nowhere.

    Args:
        folder (`Path`, *optional*):
            `<output_dir>/pieces`; None keeps nothing.
    """

    folder: Path | None

    @classmethod
    def open(cls, output_dir: str | os.PathLike[str] | None, *, write: bool) -> Pieces:
        """
        Makes the folder, and checks that files can be written there.

        Args:
            output_dir (`str` or `os.PathLike`, *optional*):
                Folder of the benchmark.
            write (`bool`):
                Whether this process is the one that writes.

        Raises:
            OSError: it cannot be made or written.
        """
        if output_dir is None:
            return cls(None)
        folder = Path(output_dir) / FOLDER
        if write:
            try:
                write_text(folder / "writable", "")
                (folder / "writable").unlink()
            except OSError as error:
                raise type(error)(
                    f"output_dir {str(output_dir)!r} cannot be written ({error}); expected a folder that can, because "
                    "finished parts are kept there. Nothing has been computed."
                ) from error
        return cls(folder)

    def read(self, name: str, mark: str | None, count: int) -> dict[int, Any]:
        """
        Values of finished items by their number, from all pieces with this mark.

        Args:
            name (`str`):
                What was scored.
            mark (`str`, *optional*):
                [`fingerprint`] of everything that changes a value; None where the model has no hash: nothing is kept.
            count (`int`):
                Number of items.
        """
        if self.folder is None or mark is None:
            return {}
        found: dict[int, Any] = {}
        for path in sorted(self.folder.glob(f"{_stem(name, mark)}-*.json")):
            content = _content(path)
            if content is None or content.get("fingerprint") != mark:
                continue
            values = {int(number): value for number, value in content["values"].items()}
            found |= {number: value for number, value in values.items() if 0 <= number < count}
        return found

    def write(self, name: str, mark: str | None, values: Mapping[int, Any]) -> None:
        """
        Keeps the values of some items.

        Raises:
            OSError: the file cannot be written; earlier pieces are as they were.
        """
        if self.folder is None or mark is None or not values:
            return
        content = {"format": FORMAT, "version": FORMAT_VERSION, "name": name, "fingerprint": mark}
        plain, non_finite = pull_non_finite({**content, "values": {str(at): values[at] for at in sorted(values)}})
        text = json.dumps({**plain, "non_finite": non_finite}, ensure_ascii=False, allow_nan=False)
        # the first item names the piece: an item is in one piece only
        write_text(self.folder / f"{_stem(name, mark)}-{min(values):06d}.json", text)


def fingerprint(key: Mapping[str, Any]) -> str:
    """SHA-256 over a key in plain JSON and the library's version, in hexadecimal digits."""
    text = json.dumps([FORMAT_VERSION, __version__, key], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def _stem(name: str, mark: str) -> str:
    return f"{re.sub(r'[^A-Za-z0-9_.]+', '_', name)}-{mark[:16]}"


def _content(path: Path) -> dict[str, Any] | None:
    """A piece, or None with a warning: what cannot be read is computed again."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        warnings.warn(f"{path} cannot be read ({error}); its items are scored again.", stacklevel=2)
        return None
    if not isinstance(content, dict) or content.get("format") != FORMAT or content.get("version") != FORMAT_VERSION:
        return None
    put_non_finite(content, content.pop("non_finite", {}))
    return content
