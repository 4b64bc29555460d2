"""Which retain row stands beside which forget row: a pure function of (seed, epoch, index)."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from functools import lru_cache
from typing import Literal

import numpy as np

Cycle = Literal["forget", "retain", "longest", "shortest"]
CYCLES: tuple[Cycle, ...] = ("forget", "retain", "longest", "shortest")
FORGET = "forget"


# 16 permutations cover two passes of eight sets; the cache is per process and holds nothing that matters.
@lru_cache(maxsize=16)
def permutation(seed: int, name: str, size: int, *turn: int) -> np.ndarray:
    """
    A permutation of `range(size)` that depends on (seed, name, turn) only: not on the process, Python's hash seed, or
    what was drawn before.

    Args:
        seed (`int`):
            Non-negative seed.
        name (`str`):
            What is permuted, so that two sets of one size get different orders.
        size (`int`):
            Number of rows N.
        turn (`int`):
            The pass over the set, or any further non-negative coordinates.

    Returns:
        `np.ndarray` of shape (N,), read-only.
    """
    stream = np.random.Philox(np.random.SeedSequence([seed, zlib.crc32(name.encode()), *turn]))
    # Sorting raw output: numpy keeps bit streams fixed across versions, but not what `permutation` makes of them, and
    # a run has to resume under another numpy.
    order = np.argsort(stream.random_raw(size), kind="stable")
    order = order.astype(np.int32 if size < 2**31 else np.int64)
    order.flags.writeable = False
    return order


class Pairing:
    r"""
    The rows of every set that make up item `index` of an epoch.

    The side that sets the length is *anchored* if it is the forget side: its row is `index`. Every other set is read
    pass by pass. With N rows in set k and L items in an epoch,

    $$g = \text{epoch} \cdot L + \text{index}, \quad \text{row} = \pi_{k,\lfloor g/N \rfloor}(g \bmod N)$$

    where $\pi_{k,p}$ is a permutation drawn from (seed, k, p). So at the end of any epoch the number of times that
    two rows of a set were used differs by at most one: each is used before any repeats, across epochs too. (Within
    an epoch this is the order of `index`; a shuffling sampler visits it in its own order.) Nothing depends on the
    rank, the number of workers or earlier calls, hence two ranks that hold different indices of one pass hold
    different retain rows, and a run resumes by skipping indices.

    Args:
        sizes (`Mapping[str, int]`):
            Rows of each set: `"forget"` and the names of the retain sets.
        cycle (`Literal["forget", "retain", "longest", "shortest"]`, *optional*, defaults to `"forget"`):
            What an epoch is: once through the forget set; once through the longest retain set; once through the
            longest set of all; or once through the shortest. The sets that are shorter repeat, those that are longer
            continue in the next epoch.
        seed (`int`):
            Non-negative seed.

    Raises:
        ValueError: no forget set, an empty set, an unknown `cycle`, `cycle="retain"` without a retain set, or a
            negative seed.

    Examples:

    ```python
    >>> pairing = Pairing(sizes={"forget": 2, "retain": 4}, seed=0)
    >>> sorted(pairing.rows(epoch, i)["retain"] for epoch in range(2) for i in range(2))
    [0, 1, 2, 3]
    ```
    """

    def __init__(self, *, sizes: Mapping[str, int], cycle: Cycle = "forget", seed: int) -> None:
        if FORGET not in sizes:
            raise ValueError(f"sizes has {sorted(sizes)}; expected the key 'forget' and a key for each retain set.")
        empty = [name for name, size in sizes.items() if size < 1]
        if empty:
            raise ValueError(f"Empty dataset: {', '.join(empty)}. Every set needs at least one row.")
        if cycle not in CYCLES:
            raise ValueError(f"cycle is {cycle!r}; expected one of {', '.join(map(repr, CYCLES))}.")
        if seed < 0:
            raise ValueError(f"seed is {seed}; expected a non-negative integer.")
        retain = [size for name, size in sizes.items() if name != FORGET]
        if cycle == "retain" and not retain:
            raise ValueError("cycle='retain' needs a retain dataset; give one, or use cycle='forget'.")
        self.sizes = {name: int(size) for name, size in sizes.items()}
        self.cycle = cycle
        self.seed = int(seed)
        if cycle == "forget":
            self.length = self.sizes[FORGET]
        elif cycle == "retain":
            self.length = max(retain)
        else:
            self.length = max(self.sizes.values()) if cycle == "longest" else min(self.sizes.values())

    def __len__(self) -> int:
        return self.length

    def rows(self, epoch: int, index: int) -> dict[str, int]:
        """
        The row of every set at item `index` of an epoch.

        Args:
            epoch (`int`):
                Epoch, from 0.
            index (`int`):
                Item within the epoch, in `range(length)`.

        Raises:
            IndexError: `index` is outside the epoch.
        """
        return {name: self.row(epoch, index, name) for name in self.sizes}

    def row(self, epoch: int, index: int, name: str) -> int:
        """[`rows`] of a single set."""
        if not 0 <= index < self.length:
            raise IndexError(f"index {index} is outside an epoch of {self.length} items.")
        size = self.sizes[name]
        if name == FORGET and size == self.length:  # anchored
            return index
        return cycled_row(self.seed, name, size, epoch * self.length + index)


def cycled_row(seed: int, name: str, size: int, position: int, *turn: int) -> int:
    """Row of a set of `size` at `position` of an endless reading, each pass over the set in an order of its own."""
    number, offset = divmod(position, size)
    return int(permutation(seed, name, size, *turn, number)[offset])
