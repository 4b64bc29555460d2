"""Map-style dataset of (forget row, retain rows), and the sampler that orders it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch.utils.data import Dataset, Sampler

from .pairing import FORGET, Pairing, permutation


@runtime_checkable
class Rows(Protocol):
    """A sized collection of rows: a `datasets.Dataset`, a list of dicts, a torch map-style dataset."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


class EpochState:
    """
    The epoch, in shared memory: persistent DataLoader workers are forked once and still see the current value.
    """

    def __init__(self) -> None:
        self._value = torch.zeros((), dtype=torch.int64).share_memory_()

    def get(self) -> int:
        """The current epoch."""
        return int(self._value)

    def set(self, epoch: int) -> None:
        """Sets the epoch, in every process that shares this object."""
        self._value.fill_(int(epoch))


class PairedDataset(Dataset):
    """
    A forget row together with a row of each retain set.

    Item `i` is `{"forget": {"input_ids", "labels", ..., "index"}, "retain": {name: {"input_ids", "labels"}}}`, where
    `index` is the row's number in the forget set (the key of anything cached per forget row). A tuple instead of `i`
    takes each set's row from an item of its own, in the order of [`names`].

    Args:
        forget (`Rows`):
            Prepared rows to forget.
        retain (`Mapping[str, Rows]`):
            Prepared rows to keep, by name. May be empty.
        pairing ([`Pairing`]):
            Its `sizes` must be those of the sets given here.

    Raises:
        ValueError: a retain set is called "forget", or the sizes are not the pairing's.
    """

    def __init__(self, forget: Rows, retain: Mapping[str, Rows], pairing: Pairing) -> None:
        if FORGET in retain:
            raise ValueError("A retain set is called 'forget'; rename it, that name is the forget set's.")
        sizes = {FORGET: len(forget), **{name: len(rows) for name, rows in retain.items()}}
        if sizes != pairing.sizes:
            raise ValueError(f"The pairing was made for the sizes {pairing.sizes}, but the datasets have {sizes}.")
        self.forget = forget
        self.retain = dict(retain)
        self.pairing = pairing
        self._epoch = EpochState()

    @property
    def epoch(self) -> int:
        """The epoch whose pairs are served."""
        return self._epoch.get()

    def set_epoch(self, epoch: int) -> None:
        """Moves to another epoch; accelerate's data loader calls this at the start of each."""
        self._epoch.set(epoch)

    def __len__(self) -> int:
        return self.pairing.length

    def __getitem__(self, index: int | tuple[int, ...]) -> dict[str, Any]:
        items = index if isinstance(index, tuple) else (index,) * len(self.names)
        rows = {
            name: self.pairing.row(self.epoch, int(item), name) for name, item in zip(self.names, items, strict=True)
        }
        return {
            "forget": {**self.forget[rows[FORGET]], "index": rows[FORGET]},
            "retain": {name: self.retain[name][rows[name]] for name in self.retain},
        }

    @property
    def names(self) -> tuple[str, ...]:
        """The sets: `"forget"`, then the retain sets."""
        return (FORGET, *self.retain)

    def lengths(self, name: str) -> list[int]:
        """Tokens of a set's row at each item of the epoch, for samplers that group by length."""
        rows = self.forget if name == FORGET else self.retain[name]
        return [len(rows[self.pairing.row(self.epoch, item, name)]["input_ids"]) for item in range(len(self))]


class EpochSampler(Sampler[int | tuple[int, ...]]):
    """
    Shuffles a dataset by a permutation of (seed, the dataset's epoch): the same on every rank, and after a resume.

    It has no `set_epoch` of its own, on purpose. accelerate's loader (seen in 1.15) forwards the epoch to the
    *dataset* only if it finds no sampler with `set_epoch`: with its own seedable sampler and several processes the
    dataset would stay at epoch 0 for ever, and with a loader resumed in mid-epoch the sampler would. Here the dataset
    is the one owner of the epoch, and it is always told.

    Args:
        dataset ([`PairedDataset`]):
            Anything with a length and an `epoch`.
        seed (`int`):
            Non-negative seed.
        shuffle (`bool`, *optional*, defaults to `True`):
            `False` reads in order.
        group (`int`, *optional*):
            Sorts the rows of every set by length, longest first, within runs of this many shuffled items, so that
            batches need little padding; long rows of one set then stand beside long rows of the others, which share
            their forward pass. Each run keeps its rows. A multiple of the rows of a step.
    """

    def __init__(self, dataset: PairedDataset, seed: int, *, shuffle: bool = True, group: int | None = None) -> None:
        self.dataset = dataset
        self.seed = seed
        self.shuffle = shuffle
        self.group = group

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[int | tuple[int, ...]]:
        size = len(self.dataset)
        if not self.shuffle:
            yield from range(size)
            return
        order = permutation(self.seed, "order of items", size, self.dataset.epoch).tolist()
        if self.group is None:
            yield from order
            return
        lengths = [self.dataset.lengths(name) for name in self.dataset.names]
        for start in range(0, size, self.group):
            run = order[start : start + self.group]
            yield from zip(*(sorted(run, key=tokens.__getitem__, reverse=True) for tokens in lengths), strict=True)
