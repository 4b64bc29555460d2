from __future__ import annotations

import pytest
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from datasets import Dataset
from torch.utils.data import DataLoader

from hf_unlearn.data import EpochSampler, PairedDataset, Pairing


def rows(count, base):
    return Dataset.from_list(
        [{"input_ids": [base + i] * (i % 3 + 1), "labels": [base + i] * (i % 3 + 1)} for i in range(count)]
    )


def paired(forget=10, retain=14, facts=3, cycle="forget", seed=0):
    pairing = Pairing(sizes={"forget": forget, "retain": retain, "facts": facts}, cycle=cycle, seed=seed)
    return PairedDataset(rows(forget, 1000), {"retain": rows(retain, 2000), "facts": rows(facts, 3000)}, pairing)


def names(item):
    """(forget row, retain row, facts row) of an item."""
    return (
        item["forget"]["index"],
        item["retain"]["retain"]["input_ids"][0] - 2000,
        item["retain"]["facts"]["input_ids"][0] - 3000,
    )


def batches(loader):
    return [[names(item) for item in batch] for batch in loader]


@pytest.mark.parametrize("cycle", ["forget", "longest"])
def test_items_are_the_rows_of_the_pairing(cycle):
    dataset = paired(cycle=cycle)
    for epoch in range(3):
        dataset.set_epoch(epoch)
        for index in range(len(dataset)):
            expected = dataset.pairing.rows(epoch, index)
            assert names(dataset[index]) == (expected["forget"], expected["retain"], expected["facts"])
            assert dataset[index]["forget"]["input_ids"][0] == 1000 + expected["forget"]
    items = [dataset[index] for index in range(len(dataset))]
    assert dataset.lengths("forget") == [len(item["forget"]["input_ids"]) for item in items]
    assert dataset.lengths("facts") == [len(item["retain"]["facts"]["input_ids"]) for item in items]


@pytest.mark.parametrize("persistent", [True, False])
def test_workers_serve_the_same_batches_as_the_main_process_in_every_epoch(persistent):
    plain, workers = paired(), paired()
    one = DataLoader(plain, batch_size=3, sampler=EpochSampler(plain, 7), collate_fn=list)
    two = DataLoader(
        workers,
        batch_size=3,
        sampler=EpochSampler(workers, 7),
        collate_fn=list,
        num_workers=2,
        persistent_workers=persistent,
    )
    seen = []
    for epoch in range(2):
        plain.set_epoch(epoch)
        workers.set_epoch(epoch)
        seen.append(batches(one))
        assert seen[-1] == batches(two)
    assert seen[0] != seen[1]


def loader(rank, ranks, batch_size=2):
    dataset = paired(forget=16, retain=16)
    plain = DataLoader(dataset, batch_size=batch_size, sampler=EpochSampler(dataset, 7), collate_fn=list)
    return prepare_data_loader(plain, num_processes=ranks, process_index=rank, put_on_device=False)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_accelerate_tells_the_dataset_the_epoch_and_ranks_partition_each_step(ranks):
    # with accelerate's own seedable sampler and 2 ranks the dataset is never told: partners would repeat every epoch
    single = loader(0, 1, batch_size=2 * ranks)
    loaders = [loader(rank, ranks) for rank in range(ranks)]
    for epoch in (0, 1, 5):
        for each in (single, *loaders):
            each.set_epoch(epoch)
        whole, parts = batches(single), [batches(each) for each in loaders]
        for step, batch in enumerate(whole):
            together = [item for part in parts for item in part[step]]
            assert together == batch
            assert len({retain for _, retain, _ in together}) == len(together)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_resumed_in_mid_epoch_reads_the_rest_of_that_epoch(ranks):
    full = loader(0, ranks)
    full.set_epoch(3)
    resumed = skip_first_batches(loader(0, ranks), 2)
    resumed.set_epoch(3)
    assert batches(resumed) == batches(full)[2:]


def test_the_sampler_shuffles_by_seed_and_epoch_and_reads_in_order_on_request():
    dataset = paired()
    first = list(EpochSampler(dataset, 0))
    assert sorted(first) == list(range(10))
    assert list(EpochSampler(dataset, 0)) == first
    assert list(EpochSampler(dataset, 1)) != first
    assert list(EpochSampler(dataset, 0, shuffle=False)) == list(range(10))
    dataset.set_epoch(1)
    assert list(EpochSampler(dataset, 0)) != first


def test_grouping_sorts_every_set_by_length_and_keeps_the_rows_of_each_run():
    dataset = paired(forget=12)
    plain = [names(dataset[item]) for item in EpochSampler(dataset, 0)]
    grouped = [names(dataset[items]) for items in EpochSampler(dataset, 0, group=6)]
    assert grouped != plain
    for start in (0, 6):
        before, after = (zip(*order[start : start + 6], strict=True) for order in (plain, grouped))
        for rows_before, rows_after in zip(before, after, strict=True):
            assert sorted(rows_after) == sorted(rows_before)
            lengths = [row % 3 + 1 for row in rows_after]
            assert lengths == sorted(lengths, reverse=True)


def test_a_forget_set_alone_needs_no_retain_set():
    dataset = PairedDataset(rows(3, 0), {}, Pairing(sizes={"forget": 3}, seed=0))
    assert dataset[2]["retain"] == {}


def test_bad_arguments_are_explained():
    with pytest.raises(ValueError, match="called 'forget'"):
        PairedDataset(rows(3, 0), {"forget": rows(3, 0)}, Pairing(sizes={"forget": 3}, seed=0))
    with pytest.raises(ValueError, match=r"made for the sizes .*but the datasets have"):
        PairedDataset(rows(3, 0), {}, Pairing(sizes={"forget": 4}, seed=0))
