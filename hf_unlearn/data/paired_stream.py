"""The stream twin of the paired dataset: forget rows, retain rows, or both, that can only be read in order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeGuard

from torch.utils.data import IterableDataset, get_worker_info

from .paired import EpochState, Rows
from .pairing import FORGET, cycled_row, permutation

# Rows read at once from a stream of the datasets library.
_READ = 32


class PairedIterableDataset(IterableDataset):
    """
    A stream of (forget row, retain rows), for when at least one side is an iterable dataset.

    An epoch is once through the forget side; items are as in [`PairedDataset`], with `index` the position in the
    forget stream, or the row's number if the forget side has a length. The rules:

    * A forget side with a length is read in an order drawn from (seed, epoch); a stream in its own order.
    * A retain side with a length: the row is a pure function of (seed, epoch, running index), each row used before
      any repeats within the epoch.
    * A retain stream is read along, and from its beginning when it ends and at every epoch: shuffle a long one with
      `dataset.shuffle(buffer_size=...)`, otherwise short epochs never see its tail.

    Every process and every worker reads the whole stream and keeps its share, so that who stands beside whom depends
    on neither. Over processes the share is taken by accelerate's `IterableDatasetShard`: with the HF Trainer this
    needs `accelerator_config={"dispatch_batches": False}`. Over workers it is taken here, `block_size` consecutive
    items at a time: with `block_size` = batch size x number of processes, the batches and their order are those of a
    run without workers. The price is that each worker tokenises the stream for itself.

    Args:
        forget (`Rows` or `Iterable`):
            Prepared rows to forget.
        retain (`Mapping[str, Rows | Iterable]`):
            Prepared rows to keep, by name. May be empty.
        seed (`int`):
            Non-negative seed.
        block_size (`int`, *optional*, defaults to `1`):
            Consecutive items that go to one DataLoader worker.

    Raises:
        ValueError: a retain set is called "forget", a negative seed, `block_size` below 1, or (while iterating) a
            stream that ends at once.
        TypeError: something that is neither indexable with a length nor iterable, or that can be read only once.
    """

    def __init__(
        self,
        forget: Rows | Iterable[Mapping[str, Any]],
        retain: Mapping[str, Rows | Iterable[Mapping[str, Any]]],
        *,
        seed: int,
        block_size: int = 1,
    ) -> None:
        if FORGET in retain:
            raise ValueError("A retain set is called 'forget'; rename it, that name is the forget set's.")
        if seed < 0:
            raise ValueError(f"seed is {seed}; expected a non-negative integer.")
        if block_size < 1:
            raise ValueError(f"block_size is {block_size}; expected at least 1.")
        for name, rows in {FORGET: forget, **retain}.items():
            if isinstance(rows, Iterator):
                raise TypeError(
                    f"The {name} side is {type(rows).__name__}, which can be read only once. Give a dataset, for "
                    "example `IterableDataset.from_generator(function)`."
                )
            if not (_is_sized(rows) or isinstance(rows, Iterable)):
                raise TypeError(f"The {name} side is {type(rows).__name__}; expected a map or an iterable dataset.")
            if _is_sized(rows) and len(rows) == 0:
                raise ValueError(f"Empty dataset: {name}. Every set needs at least one row.")
        self.forget = forget
        self.retain = dict(retain)
        self.seed = int(seed)
        self.block_size = int(block_size)
        self._epoch = EpochState()

    @property
    def epoch(self) -> int:
        """The epoch that the next iteration reads."""
        return self._epoch.get()

    def set_epoch(self, epoch: int) -> None:
        """Moves to another epoch, and with it the streams that shuffle by epoch."""
        self._epoch.set(epoch)
        for side in (self.forget, *self.retain.values()):
            if hasattr(side, "set_epoch"):
                side.set_epoch(int(epoch))

    def __len__(self) -> int:
        if not _is_sized(self.forget):
            raise TypeError("The forget side is a stream without a length: train with `max_steps`.")
        return len(self.forget)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        epoch = self.epoch
        worker = get_worker_info()
        share, shares = (worker.id, worker.num_workers) if worker is not None else (0, 1)
        streams = {name: _endless(side, name) for name, side in self.retain.items() if not _is_sized(side)}
        position = -1
        for position, (number, row) in enumerate(self._forget_rows(epoch)):
            beside = {name: next(stream) for name, stream in streams.items()}  # read along even if not our share
            if (position // self.block_size) % shares != share:
                continue
            partners = {
                name: beside[name] if name in beside else self._partner(name, epoch, position) for name in self.retain
            }
            yield {"forget": {**row, "index": number}, "retain": partners}
        if position < 0:
            raise ValueError("Empty dataset: the forget stream ended before its first row.")

    def _forget_rows(self, epoch: int) -> Iterator[tuple[int, Mapping[str, Any]]]:
        if _is_sized(self.forget):
            for number in permutation(self.seed, FORGET, len(self), epoch).tolist():
                yield number, self.forget[number]
        else:
            yield from enumerate(_read(self.forget))

    def _partner(self, name: str, epoch: int, position: int) -> Any:
        rows: Any = self.retain[name]
        return rows[cycled_row(self.seed, name, len(rows), position, epoch)]


def _is_sized(rows: Any) -> TypeGuard[Rows]:
    # A stream of torch or the datasets library may inherit an abstract __getitem__ (columns): ask for the kind first.
    return isinstance(rows, Rows) and not isinstance(rows, IterableDataset)


def _endless(rows: Any, name: str) -> Iterator[Mapping[str, Any]]:
    while True:
        empty = True
        for row in _read(rows):
            empty = False
            yield row
        if empty:
            raise ValueError(f"Empty dataset: the retain stream {name!r} ended before its first row.")


def _read(rows: Any) -> Iterator[Mapping[str, Any]]:
    """All rows of a stream, in a DataLoader worker too, where a stream of the datasets library would serve a part."""
    if not hasattr(rows, "iter"):
        yield from rows
        return
    # `iter(stream)` inside a worker yields only the shards of that worker (and none, if there are fewer shards than
    # workers); `stream.iter(batch_size)` reads everything.
    for batch in rows.iter(batch_size=_READ):
        columns = list(batch)
        for values in zip(*(batch[column] for column in columns), strict=True):
            yield dict(zip(columns, values, strict=True))
