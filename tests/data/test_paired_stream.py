from __future__ import annotations

import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from datasets import Dataset
from torch.utils.data import DataLoader

from hf_unlearn.data import PairedIterableDataset


def table(count, base=0):
    return Dataset.from_list([{"input_ids": [base + i], "labels": [base + i]} for i in range(count)])


def stream(count, base=0, shards=1):
    return table(count, base).to_iterable_dataset(num_shards=shards)


class TorchStream(torch.utils.data.IterableDataset):
    def __init__(self, count):
        self.count = count

    def __iter__(self):
        for i in range(self.count):
            yield {"input_ids": [i], "labels": [i]}


def names(item):
    return (item["forget"]["index"], item["forget"]["input_ids"][0], item["retain"]["retain"]["input_ids"][0])


def read(dataset):
    return [names(item) for item in dataset]


KINDS = {
    "stream + map": lambda **kw: PairedIterableDataset(stream(11), {"retain": table(4)}, seed=1, **kw),
    "stream + stream": lambda **kw: PairedIterableDataset(stream(11), {"retain": stream(4)}, seed=1, **kw),
    "map + stream": lambda **kw: PairedIterableDataset(table(11), {"retain": stream(4, shards=2)}, seed=1, **kw),
    "torch + map": lambda **kw: PairedIterableDataset(TorchStream(11), {"retain": table(4)}, seed=1, **kw),
}


@pytest.fixture(params=KINDS, ids=str)
def make(request):
    return KINDS[request.param]


def test_each_forget_row_comes_once_and_each_retain_row_before_any_repeats(make):
    items = read(make())
    assert sorted(forget for _, forget, _ in items) == list(range(11))
    assert all(index == forget for index, forget, _ in items)
    retain = [row for _, _, row in items]
    for start in (0, 4):
        assert sorted(retain[start : start + 4]) == [0, 1, 2, 3]


def test_reading_again_gives_the_same_and_skipping_gives_the_tail(make):
    straight = read(make())
    again = iter(make())
    for _ in range(5):
        next(again)
    assert [names(item) for item in again] == straight[5:]


@pytest.mark.parametrize("persistent", [True, False])
def test_batches_do_not_depend_on_workers_over_two_epochs(make, persistent):
    plain, shared = make(), make(block_size=3)
    one = DataLoader(plain, batch_size=3, collate_fn=read)
    two = DataLoader(shared, batch_size=3, collate_fn=read, num_workers=2, persistent_workers=persistent)
    for epoch in range(2):
        plain.set_epoch(epoch)
        shared.set_epoch(epoch)
        assert list(two) == list(one)


def test_without_a_block_size_workers_still_read_every_row_once_with_the_same_partner(make):
    workers = DataLoader(make(), batch_size=2, collate_fn=read, num_workers=2)
    assert sorted(item for batch in workers for item in batch) == sorted(read(make()))


def test_processes_take_disjoint_slices_of_one_stream(make):
    def part(rank):
        loader = DataLoader(make(), batch_size=2, collate_fn=read)
        return list(prepare_data_loader(loader, num_processes=2, process_index=rank, put_on_device=False))

    whole = read(make())
    steps = [left + right for left, right in zip(part(0), part(1), strict=True)]
    assert [item for step in steps for item in step][:11] == whole  # the last step is filled up from the first


def test_map_sides_change_their_order_with_the_epoch():
    dataset = KINDS["stream + map"]()
    orders = []
    for epoch in range(2):
        dataset.set_epoch(epoch)
        orders.append(read(dataset))
    assert [item[:2] for item in orders[0]] == [item[:2] for item in orders[1]]
    assert orders[0] != orders[1]
    forget = KINDS["map + stream"]()
    first = [item[1] for item in read(forget)]
    forget.set_epoch(1)
    assert [item[1] for item in read(forget)] != first


def test_a_shuffled_stream_is_reshuffled_by_the_epoch():
    dataset = PairedIterableDataset(stream(30).shuffle(seed=0, buffer_size=30), {"retain": table(3)}, seed=0)
    first = [item[1] for item in read(dataset)]
    dataset.set_epoch(1)
    second = [item[1] for item in read(dataset)]
    assert first != second
    assert sorted(first) == sorted(second) == list(range(30))


def test_length_is_known_only_with_a_sized_forget_side():
    assert len(KINDS["map + stream"]()) == 11
    with pytest.raises(TypeError, match="max_steps"):
        len(KINDS["stream + map"]())


def test_streams_that_end_at_once_are_errors_and_not_endless_loops():
    empty = stream(3).filter(lambda row: False)
    with pytest.raises(ValueError, match="retain stream 'retain' ended before its first row"):
        next(iter(PairedIterableDataset(stream(3), {"retain": empty}, seed=0)))
    with pytest.raises(ValueError, match="forget stream ended before its first row"):
        next(iter(PairedIterableDataset(empty, {"retain": stream(3)}, seed=0)))


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        (((), {"retain": []}, {}), ValueError, "Empty dataset: forget"),
        ((TorchStream(2), {"retain": []}, {}), ValueError, "Empty dataset: retain"),
        ((TorchStream(2), {"forget": TorchStream(2)}, {}), ValueError, "called 'forget'"),
        ((TorchStream(2), {}, {"seed": -1}), ValueError, "seed is -1"),
        ((TorchStream(2), {}, {"block_size": 0}), ValueError, "block_size is 0"),
        ((TorchStream(2), {"retain": 3}, {}), TypeError, "retain side is int"),
        ((iter([{}]), {}, {}), TypeError, "can be read only once"),
    ],
)
def test_bad_arguments_are_explained(arguments, error, match):
    forget, retain, options = arguments
    with pytest.raises(error, match=match):
        PairedIterableDataset(forget, retain, **{"seed": 0, **options})
