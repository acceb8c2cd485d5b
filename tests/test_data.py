"""Splits, pairing, batches, load, the files of a run, the types of flags, and `python data.py`."""

import argparse
import itertools
import json
import math
import os
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.distributions import Independent, Normal

import data
from helpers import every_pattern, save_arrays, shi, tiny, toy

AB, ABC = ("a", "b"), ("a", "b", "c")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# ------------------------------------------------------------------------------------------ pairing


@pytest.mark.parametrize("paired, pairs", [(0.36, 7), (0.39, 8), (0.03, 1), (0.99, 20), (1.0, 20)])
def test_the_number_of_pairs_is_the_nearest(paired, pairs):  # 7.2, 7.8, .6, 19.8 of 20
    assert len(data.pairing(20, AB, paired, "none")[0][1]) == pairs


@pytest.mark.parametrize("unpaired", ["split", "rest", "all", "c", "none"])
def test_examples_that_are_not_paired_are_shared_out(unpaired):
    everyone, alone = set(range(20)), [(True, False, False), (False, True, False)]
    alone.append((False, False, True))
    (mask, pairs), *others = data.pairing(20, ABC, 0.36, unpaired)
    assert mask == (True,) * 3 and len(set(pairs.tolist())) == 7
    rest, members = everyone - set(pairs.tolist()), [set(index.tolist()) for _, index in others]
    assert [mask for mask, _ in others] == {"c": alone[2:], "none": []}.get(unpaired, alone)
    if unpaired == "split":
        assert [len(part) for part in members] == [5, 4, 4] and set.union(*members) == rest
    else:
        assert all(part == (everyone if unpaired == "all" else rest) for part in members)


def test_pairs_are_drawn_at_random_by_the_seed():
    pairs = [data.pairing(20, ABC, 0.2, "none", seed=k)[0][1] for k in range(200)]
    often = torch.cat(pairs).bincount(minlength=20)
    assert often.min() > 20 and often.max() < 65  # each of the 20 in a fifth of the 200: 40
    [(_, order)] = data.pairing(20, ABC)
    assert torch.equal(order, torch.randperm(20, generator=generator(0)))  # paired 1, seed 0
    assert [len(index) for _, index in data.pairing(20, AB, 0.5)] == [10, 5, 5]  # split
    assert len(data.pairing(2, ABC, 0.5)) == 2  # a stream without an example is none


@pytest.mark.parametrize("paired, unpaired, match", [
    (0, "split", "--paired must be a fraction"), (-0.1, "split", "--paired must be a fraction"),
    (1.01, "split", "--paired must be a fraction"), (math.nan, "split", "--paired must be"),
    (0.5, "c", "--unpaired must be one of split, all, rest, none, a, b, not 'c'"),
    (0.04, "split", "0.04 of 10 examples leaves none"),
])  # fmt: skip
def test_a_pairing_that_cannot_be_is_refused(paired, unpaired, match):
    with pytest.raises(ValueError, match=match):
        data.pairing(10, AB, paired, unpaired)


def test_the_patterns_of_a_mask_are_streams_fullest_first():
    mask = torch.tensor([[1, 1], [0, 1], [1, 1], [1, 0]]).bool()
    streams = data.pairing(4, AB, mask=mask)
    assert streams[0][0] == (True, True) and streams[0][1].tolist() == [0, 2]
    others = {mask: index.tolist() for mask, index in streams[1:]}
    assert others == {(False, True): [1], (True, False): [3]}
    every = list(itertools.product((False, True), repeat=6))[1:]
    masks = [mask for mask, _ in data.patterns(torch.tensor(every))]
    assert masks == sorted(every, key=lambda mask: -sum(mask))
    with pytest.raises(ValueError, match="the mask hides everything in row 1"):
        data.pairing(3, AB, mask=torch.tensor([[1, 0], [0, 0], [0, 1]]).bool())
    with pytest.raises(ValueError, match="--paired must be left out"):
        data.pairing(4, AB, 0.5, mask=mask)


def group_labels(*counts):
    """Groups with these numbers of examples, their examples scattered."""
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    return labels[torch.randperm(len(labels), generator=generator())]


def test_no_group_is_cut_in_two_by_any_seed():
    groups = group_labels(1, 9, 2, 17, 4, 30, 3, 8, 21, 5, 60, 2, 11, 6)
    n = len(groups)
    for seed, unpaired in itertools.product(range(20), ("split", "rest", "a", "none")):
        (_, pairs), *others = data.pairing(n, ABC, 0.4, unpaired, seed, groups=groups)
        streams = [pairs, *(index for _, index in others)]
        streams = streams[:2] if unpaired == "rest" else streams  # the others repeat the second
        members = [set(groups[index].tolist()) for index in streams]
        assert sum(map(len, members)) == len(set.union(*members)), (seed, unpaired)
        for groups_of_stream, index in zip(members, streams):
            assert len(index) == sum(int((groups == group).sum()) for group in groups_of_stream)
        if unpaired != "none":
            assert sorted(torch.cat(streams).tolist()) == list(range(n))


def test_whole_groups_give_the_nearest_counts():
    groups = group_labels(*[3] * 40)  # ends at multiples of 3
    expected = {0.4: [48, 36, 36], 0.41: [48, 36, 36], 0.42: [51, 36, 33]}  # 48, 49.2, 50.4 pairs
    for seed, paired in itertools.product(range(10), expected):
        streams = data.pairing(120, AB, paired, "split", seed, groups=groups)
        assert [len(index) for _, index in streams] == expected[paired]
    first, again, other = (
        data.pairing(120, AB, 0.4, "split", seed, groups=groups)[0][1] for seed in (0, 0, 1)
    )
    assert torch.equal(first, again) and set(first.tolist()) != set(other.tolist())
    with pytest.raises(ValueError, match="--paired 0.01 of 120 examples leaves none paired"):
        data.pairing(120, AB, 0.01, "split", groups=groups)  # 0 is nearer to 1.2 than 3
    for groups in (None, torch.arange(50)):  # groups of one give the counts without groups
        streams = data.pairing(50, AB, 0.3, "split", 1, groups=groups)
        assert [len(index) for _, index in streams] == [15, 18, 17]


def test_by_default_all_is_paired_by_seed_zero():
    ((mask, index),) = toy(n=40).streams()
    ((same, expected),) = data.pairing(40, AB, 1.0, "split", 0)
    assert mask == same == (True, True) and torch.equal(index, expected)


def test_a_data_set_pairs_by_its_own_mask_and_groups():
    dataset = toy(n=40)
    for key in ("mask", "groups"):
        more = {
            key: torch.from_numpy(every_pattern(40, 2))
            if key == "mask"
            else group_labels(*[4] * 10)
        }
        streams = dataset._replace(**more).streams(1.0 if key == "mask" else 0.3, "svhn", seed=2)
        paired = {} if key == "mask" else dict(paired=0.3, unpaired="svhn", seed=2)
        expected = data.pairing(40, ("mnist", "svhn"), **paired, **more)
        for (mask, index), (other, same) in zip(streams, expected, strict=True):
            assert mask == other and torch.equal(index, same)
        assert len(streams) == (3 if key == "mask" else 2)


# ----------------------------------------------------------------------------- steps of an epoch


def streams_of(*sizes):
    return [((True, True), torch.arange(n)) for n in sizes]


@pytest.mark.parametrize("sizes, batch_size, sampling, expected", [
    ((30, 50, 20), 10, "natural", ([3, 5, 2], 10)),  # 10 n_i / 100
    ((30, 51, 20), 10, "natural", ([3, 5, 2], 11)),  # 101 / 10, rounded up
    ((1, 99), 10, "natural", ([1, 10], 10)),  # at least one
    ((3, 5), 20, "natural", ([3, 5], 1)),  # at most all
    ((1, 98), 64, "natural", ([1, 63], 2)),
    ((3, 41, 8), 8, "balanced", ([3, 8, 8], 6)),  # 41 / 8, rounded up
    ((2, 3, 7, 8), 4, "natural", ([0.2, 0.45, 1.4, 1.6], 5)),  # min(4, n_i) n_i / 20, one per step
])  # fmt: skip
def test_sizes_of_a_step_and_steps_of_an_epoch(sizes, batch_size, sampling, expected):
    sizes, steps = data.batch_sizes(streams_of(*sizes), batch_size, sampling)
    assert (sizes, steps) == (pytest.approx(expected[0]), expected[1])


@pytest.mark.parametrize("n, batch_size, epochs", [
    (96, 128, 1500), (900, 128, 188), (1790, 128, 108), (1920, 128, 100), (100_000, 128, 100),
])  # fmt: skip
def test_small_tables_get_1500_steps_and_100_epochs_at_least(n, batch_size, epochs):
    assert data.default_epochs(streams_of(n), batch_size, "natural") == epochs


# --------------------------------------------------------------------------------------- splits


def test_a_split_holds_its_bases_once_and_gives_numbers():
    bases = [torch.tensor([[0], [51], [255]]).byte(), torch.tensor([[True], [False]])]
    bases.append(torch.tensor([[7], [8], [9]]))
    rows = [torch.tensor([2, 1, 1, 0]), torch.tensor([1, 0, 0, 0]), torch.tensor([0, 1, 2, 0])]
    split = data.Split(bases, rows, torch.tensor([5, 6, 7, 8]))
    assert len(split) == 4
    x, bits, words = split[torch.tensor([0, 1, 3])]
    assert torch.equal(x, torch.tensor([[1], [0.2], [0]])) and x.dtype == torch.float32
    assert torch.equal(bits, torch.tensor([[0.0], [1], [1]])) and bits.dtype == torch.float32
    assert words.tolist() == [[7], [8], [7]] and words.dtype == torch.int64
    few = split.first(2)
    assert len(few) == 2 and [r.tolist() for r in few.rows] == [[2, 1], [1, 0], [0, 1]]
    assert few.labels.tolist() == [5, 6] and few.bases[0] is bases[0]
    xs = data.select(split, (False, True, False), torch.tensor([0, 2]))
    assert xs[0] is None and xs[2] is None and xs[1].tolist() == [[0], [1]]
    bare = data.Split(iter(bases[::2]))
    assert len(bare) == 3 and bare.first(2).labels is None and bare.to("meta").labels is None
    assert bare[torch.tensor([2])][1].tolist() == [[9]]
    away = split.to("meta")
    for there, here in zip((*away.bases, *away.rows, away.labels), (*bases, *rows, split.labels)):
        assert there.device.type == "meta"
        assert (there.shape, there.dtype) == (here.shape, here.dtype)


def test_distinct_examples_are_spread_over_the_rows():
    bases = [torch.arange(10.0)[:, None], 100 + torch.arange(40.0)[:, None]]
    rows = [torch.arange(40) // 4, torch.arange(40)]  # four examples share a row of the first
    split = data.Split(bases, rows)
    streams = [((True, True), torch.arange(8, 16)), ((True, False), torch.arange(20, 40))]
    # shown are the first's rows 2, 3, 5, 6, 7, 8, 9 and the second's 8 to 15
    a, b = split.distinct_examples(streams, 4)
    assert a.flatten().tolist() == [2, 5, 7, 9] and b.flatten().tolist() == [108, 110, 112, 115]
    a, b = split.distinct_examples(streams, 100)
    assert a.flatten().tolist() == [2, 3, 5, 6, 7, 8, 9] and len(b) == 8
    assert len(split.distinct_examples(streams[1:], 3)[1]) == 0  # the second is never shown
    bases[0][2] = math.nan  # a missing entry is the mean
    assert split.distinct_examples(streams, 4)[0].flatten().tolist() == [0, 5, 7, 9]


# -------------------------------------------------------------------------------------- batches


def epoch(n, paired, unpaired, size, sampling, rank=0, world=1, seed=0):
    """Steps of [(weight, xs, mask of xs), ...] of tiny(n)."""
    streams = data.pairing(n, AB, paired, unpaired, seed=0)
    steps = data.batches(tiny(n), streams, size, sampling, generator(seed), rank, world)
    return [[(w, xs, tuple(x is not None for x in xs)) for w, xs in step] for step in steps]


def test_by_default_a_process_takes_all_of_a_step():
    streams = data.pairing(10, AB, 0.3, "a", seed=0)
    steps = [list(data.batches(tiny(10), streams, 4, "natural", generator(0), *place))
             for place in ((), (0, 1))]  # fmt: skip
    for one, other in zip(*steps, strict=True):
        assert [w for w, _ in one] == [w for w, _ in other]
        assert all(torch.equal(xs[0], ys[0]) for (_, xs), (_, ys) in zip(one, other))


@pytest.mark.parametrize("world", [1, 3])
def test_natural_sampling_is_unbiased(world):
    split, streams = tiny(10), data.pairing(10, AB, 0.3, "a", seed=0)
    steps = [[(len(xs[0]), w) for w, xs, _ in step] for step in epoch(10, 0.3, "a", 4, "natural")]
    assert steps == [[(1, 0.3), (3, 0.7)]] * 3  # shared out by the sizes of the streams
    value, total = {(True, True): 1.0, (True, False): 10.0}, 0
    exactly = sum(value[mask] * split.bases[0][index].sum() for mask, index in streams) / 10
    for seed, rank in itertools.product(range(250), range(world)):
        for step in epoch(10, 0.3, "a", 4, "natural", rank, world, seed):
            total += sum(w * value[mask] * xs[0].mean() for w, xs, mask in step)
    assert total / (250 * world * len(steps)) == pytest.approx(exactly.item(), rel=0.02)


@pytest.mark.parametrize("world", [1, 2])
def test_steps_of_one_pattern_are_unbiased(world):
    split = tiny(20)
    streams = [((True, True), torch.arange(2)), ((True, False), torch.arange(2, 5))]
    streams += [((False, True), torch.arange(5, 12)), ((True, True), torch.arange(12, 20))]
    assert data.one_pattern_per_step(streams, "natural")
    assert not data.one_pattern_per_step(streams, "balanced")
    assert not data.one_pattern_per_step(streams[:3], "natural")  # M + 1 streams
    value = {(True, True): 1.0, (True, False): 10.0, (False, True): 100.0}
    exactly = sum(value[mask] * split.bases[mask.index(True)][k].sum() for mask, k in streams) / 20
    total, kinds = 0, set()
    for seed, rank in itertools.product(range(600), range(world)):
        for step in data.batches(split, streams, 4, "natural", generator(seed), rank, world):
            ((w, xs),) = step
            mask = tuple(x is not None for x in xs)
            kinds.add((mask, len(xs[mask.index(True)])))
            total += w * value[mask] * xs[mask.index(True)].mean()
    assert total / (600 * world * 5) == pytest.approx(exactly.item(), rel=0.04)
    if world == 1:  # batch_size of a pattern, or as many as it has
        both, first, second = (True, True), (True, False), (False, True)
        assert kinds == {(both, 2), (both, 4), (first, 3), (second, 4)}


@pytest.mark.parametrize("sampling", ["natural", "balanced"])
def test_ranks_share_a_step_out_without_loss(sampling):
    one = epoch(10, 0.3, "split", 4, sampling)
    many = [epoch(10, 0.3, "split", 4, sampling, rank, 3) for rank in range(3)]
    for step, parts in zip(one, zip(*many, strict=True), strict=True):
        assert all(parts)  # no rank goes without
        for weight, xs, mask in step:
            m = mask.index(True)
            mine = [(w, ys[m]) for part in parts for w, ys, other in part if other == mask]
            assert torch.cat([y for _, y in mine]).sort(0)[0].equal(xs[m].sort(0)[0])
            mean = sum(w * y.mean() for w, y in mine) / 3
            assert mean == pytest.approx(weight * xs[m].mean().item(), rel=1e-5)


def test_an_exhausted_stream_is_shuffled_again_by_the_generator():
    def examples(seed, sampling="natural"):  # 3 paired, in passes of 3; 9 alone
        steps = epoch(12, 0.25, "a", 4, sampling, seed=seed)
        for stream in range(2):
            xs = [step[stream][1][0].flatten() for step in steps]
            assert len({len(x) for x in xs}) == 1 or sampling == "balanced"
            yield torch.cat(xs).int().tolist()

    whole, alone = examples(0)
    pairs = data.pairing(12, AB, 0.25, "a")[0][1].tolist()
    assert sorted(whole) == sorted(pairs) and sorted(alone) == sorted(set(range(12)) - set(pairs))
    assert [whole, alone] == list(examples(0)) != list(examples(1))
    torch.manual_seed(1)
    assert [whole, alone] == list(examples(0))
    whole, alone = examples(0, "balanced")
    assert len(whole) == 9 and all(sorted(whole[k : k + 3]) == sorted(pairs) for k in (0, 3, 6))
    assert len({tuple(whole[k : k + 3]) for k in (0, 3, 6)}) > 1  # not the same order again
    assert sorted(alone) == sorted(set(range(12)) - set(pairs))


def test_the_ranks_take_every_third_example_of_a_step():
    split, streams = tiny(20), [((True, True), torch.arange(7))]
    streams.append(((True, False), torch.arange(7, 20)))
    ranks = [data.batches(split, streams, 20, "natural", generator(), k, 3) for k in range(3)]
    (one,) = data.batches(split, streams, 20, "natural", generator())
    order = torch.cat([xs[0] for _, xs in one]).flatten().tolist()
    for rank, (step,) in enumerate(ranks):
        assert torch.cat([xs[0] for _, xs in step]).flatten().tolist() == order[rank::3]
        for (weight, xs), n in zip(step, (7, 13)):  # n / 20, three ranks, its part of the n
            assert weight == pytest.approx(n / 20 * 3 * len(xs[0]) / n)
    (default,) = data.batches(split, streams, 20)
    assert [weight for weight, _ in default] == [7 / 20, 13 / 20]


@pytest.mark.parametrize(
    "case", [(10, 1, "split", 8, "balanced"), (9, 1 / 3, "split", 4, "natural")]
)
def test_a_rank_without_an_example_gets_one_of_weight_0(case):
    for parts in zip(*(epoch(*case, rank, 4) for rank in range(4)), strict=True):
        assert all(parts)
        for _, xs, mask in (entry for part in parts for entry in part if entry[0] == 0):
            assert mask == (True, True) and len(xs[0]) == 1
        assert sum(w for part in parts for w, _, _ in part) / 4 == pytest.approx(1)


def test_balanced_sampling_is_one_pass_over_the_largest_stream():
    steps = epoch(10, 0.2, "all", 4, "balanced")
    sizes = [[len(xs[mask.index(True)]) for _, xs, mask in step] for step in steps]
    assert sizes == [[2, 4, 4], [2, 4, 4], [2, 2, 2]]
    assert all(weight == 1 for step in steps for weight, _, _ in step)
    uneven = data.batches(tiny(10), streams_of(10, 5), 4, "balanced")
    assert [[len(xs[0]) for _, xs in step] for step in uneven] == [[4, 4], [4, 4], [2, 4]]
    examples = torch.cat([step[1][1][0] for step in steps])
    assert examples.flatten().sort()[0].tolist() == list(range(10))


# ------------------------------------------------------------------------------------------ load


def test_limit_takes_the_first_training_examples(arrays, small_root):
    whole = np.load(arrays)
    mask = every_pattern(96, 2)
    save_arrays(arrays, whole["train_0"], whole["train_1"], test=(whole["test_0"], whole["test_1"]),
                train_mask=mask, train_labels=np.arange(96), test_labels=np.arange(32))  # fmt: skip
    dataset = data.load(arrays, limit=10, standardise=False)
    x, _ = dataset.train[torch.arange(len(dataset.train))]
    expected = torch.from_numpy(whole["train_0"][:10] * mask[:10, :1])  # hidden ones are zero
    assert torch.equal(x, expected) and dataset.train.labels.tolist() == list(range(10))
    assert torch.equal(dataset.mask, torch.from_numpy(mask[:10])) and len(dataset.test) == 32
    short, full = data.load("mnist-svhn", small_root, limit=7), data.load("mnist-svhn", small_root)
    for a, b in zip(short.train[torch.arange(7)], full.train[torch.arange(7)]):
        assert torch.equal(a, b)
    assert (len(short.train), len(short.test)) == (7, len(full.test)) and len(full.train) > 7
    assert torch.equal(short.train.labels, full.train.labels[:7])


def test_limit_takes_the_groups_of_its_examples(monkeypatch):
    groups = torch.arange(40) // 3
    dataset = toy(n=40)._replace(groups=groups)
    monkeypatch.setattr("loaders.digits.load", lambda name, root: dataset)
    limited = data.load("mnist-svhn", limit=8)
    assert torch.equal(limited.groups, groups[:8]) and limited.mask is None


def test_likelihoods_join_the_arguments_of_the_networks(small_root):
    dataset = data.load("mnist-split", small_root, likelihoods=["laplace", "bernoulli"])
    assert dataset.spec == {"name": "mnist-split", "likelihoods": ["laplace", "bernoulli"]}
    assert data.load("mnist-split", small_root).spec == {"name": "mnist-split"}


def test_bernoulli_is_refused_for_values_outside_its_range(monkeypatch):
    low, high = torch.tensor([[-0.1], [0.5]]), torch.tensor([[0.5], [1.1]])
    inside = torch.tensor([[0.0], [1.0]])
    for train, test in ((inside, low), (high, inside), (inside, inside)):
        splits = (data.Split([inside, x]) for x in (train, test))
        dataset = data.Dataset("glyphs", *splits, {}, AB)
        monkeypatch.setattr("loaders.glyphs.load", lambda name, root, d=dataset: d)
        data.load("glyphs", likelihoods=["bernoulli", "laplace"])
        if train is inside and test is inside:
            data.load("glyphs", likelihoods=["bernoulli", "bernoulli"])
            continue
        with pytest.raises(ValueError, match=r"--likelihoods: b must be in \[0, 1\] for bernoulli"):
            data.load("glyphs", likelihoods=["bernoulli", "bernoulli"])


def test_an_unknown_data_set_and_a_missing_folder_are_named(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="--dataset must be glyphs, .* or a path.npz, not 'nope'"):
        data.load("nope")
    monkeypatch.setattr(data, "__file__", str(tmp_path / "data.py"))
    with pytest.raises(ValueError, match="data.py needs the folder loaders/ beside it"):
        data.load("glyphs")


# ----------------------------------------------------------------------------------------- files


def test_a_file_that_is_cut_or_not_there_is_named(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.ones(2), y=np.ones(1))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:200])
    for name in ("cut.npz", "absent.npz"):
        with pytest.raises(ValueError, match=f"{name} cannot be read: "):
            data.read_npz(tmp_path / name)
    assert list(data.read_npz(tmp_path / "a.npz", ["y"])) == ["x", "y"]
    with pytest.raises(ValueError, match="a.npz has no array 'z', only x, y"):
        data.read_npz(tmp_path / "a.npz", ["x", "z"])
    np.savez(tmp_path / "b.npz", x=np.array([{}]))  # would run code
    with pytest.raises(ValueError, match="b.npz cannot be read"):
        data.read_npz(tmp_path / "b.npz")


def test_an_npz_takes_every_name(tmp_path):
    arrays = {"file": np.arange(3), "path": np.ones((2, 2), "f4"), "a/b c": np.array("text")}
    data.save_npz(tmp_path / "new" / "a.npz", arrays)
    with np.load(tmp_path / "new" / "a.npz") as archive:
        assert archive.files == list(arrays)
        for name, x in arrays.items():
            assert archive[name].dtype == x.dtype and np.array_equal(archive[name], x)


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.npz"
    data.save_npz(path, {"x": np.arange(3)})
    before = path.read_bytes()

    def half(file):
        file.write(before[:50])
        raise OSError(28, "No space left on device")

    for write, reason in ((half, "No space left"), (lambda file: os.remove("absent"), "No such")):
        with pytest.raises(OSError, match=rf"a\.npz cannot be written: {reason}"):
            data.atomic_write(path, write)
        assert path.read_bytes() == before and os.listdir(tmp_path) == ["a.npz"]
    data.atomic_write(path, lambda file: file.write(b"other"))
    assert path.read_bytes() == b"other" and os.listdir(tmp_path) == ["a.npz"]


def test_a_log_is_a_table_with_a_header(tmp_path):
    data.write_csv(tmp_path / "a.csv", [{"epoch": 1, "ä": 0.5}, {"epoch": 2, "ä": math.nan}])
    assert (tmp_path / "a.csv").read_bytes().decode() == "epoch,ä\r\n1,0.5\r\n2,nan\r\n"
    data.write_csv(tmp_path / "a.csv", [])
    assert (tmp_path / "a.csv").read_bytes() == b"epoch\r\n"


def test_a_run_is_read_as_it_was_saved(tmp_path):
    model = nn.Linear(2, 1)
    optimizer = torch.optim.Adam(model.parameters())
    refused = pytest.raises(ValueError, match="holds no run: it has no args.json and checkpoint.pt")
    with refused:
        data.read_run(tmp_path)
    data.save_run(tmp_path, model, optimizer, 3, [{"epoch": 3, "objective": -1.5}])
    with refused:  # args.json is missing
        data.read_run(tmp_path)
    (tmp_path / "args.json").write_text(
        json.dumps({"masked": False, "note": "ä"}), encoding="utf-8"
    )
    args, state = data.read_run(str(tmp_path))
    assert args == {"masked": False, "note": "ä"} and state["epoch"] == 3
    assert state["log"] == [{"epoch": 3, "objective": -1.5}]
    assert torch.equal(state["model"]["weight"], model.weight)
    assert state["optimizer"] == optimizer.state_dict()
    assert (tmp_path / "log.csv").read_text() == "epoch,objective\n3,-1.5\n"
    for text, reason in (
        ("{}", "is a run of an earlier version"),
        ("{", "cannot be read as a run"),
    ):
        (tmp_path / "args.json").write_text(text)
        with pytest.raises(ValueError, match=reason):
            data.read_run(tmp_path)


def pixels(path, height, width):
    """The tiles of a grid, of which each row is a list. -> rows of arrays (height, width, 3)"""
    with Image.open(path) as image:
        image = np.asarray(image) / 255
    scale = -(-64 // min(height, width))  # tiles of 64 pixels and more
    image = image[::scale, ::scale]
    tops, lefts = (range(2, n - 2, size + 2) for n, size in zip(image.shape, (height, width)))
    return [[image[a : a + height, b : b + width] for b in lefts] for a in tops]


def test_a_grid_has_the_images_of_each_row(tmp_path, monkeypatch):
    rows = [torch.rand(3, 1, 14, 28), torch.rand(3, 3, 32, 32) * 2 - 0.5]
    assert [data.is_image(x) for x in (*rows, torch.rand(3, 2, 8, 8), torch.rand(3, 4))] == [
        True, True, False, False
    ]  # fmt: skip
    assert data.save_grid(rows, tmp_path / "a.png")
    grey, colour = pixels(tmp_path / "a.png", 32, 32)
    for k in range(3):
        assert abs(grey[k][:14, :28] - rows[0][k].permute(1, 2, 0).numpy()).max() < 0.003
        assert abs(grey[k][14:] - 0.5).max() < 0.003  # padding
        assert abs(colour[k] - rows[1][k].clamp(0, 1).permute(1, 2, 0).numpy()).max() < 0.003
    monkeypatch.setitem(sys.modules, "torchvision.utils", None)  # not installed
    assert data.save_grid(rows, tmp_path / "b.png") is False and not (tmp_path / "b.png").exists()


class Stub(nn.Module):
    """A model of toy images: z is the digit, plus 10 if the colour image alone is observed. Grey
    images are z / 25, those in colour z / 50."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def posterior(self, *xs):
        [m] = [m for m, x in enumerate(xs) if x is not None]
        digit = (xs[m].mean((1, 2, 3)) * 255 / 25).round()
        return Independent(Normal((digit + 10 * m)[:, None], 1e-6), 1)

    def decode(self, z):
        grey = z[:, :, None, None] / 25
        return [grey.expand(-1, 1, 28, 28), grey.expand(-1, 3, 32, 32) / 2]


@pytest.mark.parametrize("labels", [True, False])
def test_examples_are_test_images_and_what_each_generates(labels, tmp_path, capsys):
    dataset = toy(n=200)
    digits = dataset.test.labels
    if labels:  # one per label
        columns = digits.unique().tolist()
        assert len(columns) == 10
    else:  # spread over the split
        columns = digits[torch.linspace(0, 99, 10).long()].tolist()
        dataset = dataset._replace(test=data.Split(dataset.test.bases))
    data.save_examples(Stub().train(), dataset, tmp_path / "a.png")
    rows = ["mnist", "mnist -> mnist", "mnist -> svhn", "svhn", "svhn -> mnist", "svhn -> svhn"]
    assert capsys.readouterr().out == f"{tmp_path / 'a.png'}, from the top: {', '.join(rows)}\n"
    columns = np.array(columns)
    expected = [
        columns * 25 / 255,
        columns / 25,
        columns / 50,
        columns * 25 / 255,
        (columns + 10) / 25,
    ]
    expected.append((columns + 10) / 50)
    for tiles, grey in zip(pixels(tmp_path / "a.png", 32, 32), expected, strict=True):
        assert [tile[5, 5, 0] for tile in tiles] == pytest.approx(list(grey), abs=0.003)


# --------------------------------------------------------------------------------- command line


@pytest.mark.parametrize("kind, text, value", [
    (data.count, "12", 12), (data.count, "0", None), (data.count, "-1", None),
    (data.count, "1.5", None), (data.count, "x", None), (data.factor, "0", 0.0),
    (data.factor, "1e-3", 0.001), (data.factor, "-1", None), (data.factor, "inf", None),
    (data.factor, "nan", None), (data.factor, "x", None), (data.names, "a,b", ["a", "b"]),
    (data.factors, "3.9,1", [3.9, 1.0]), (data.factors, "3.9", [3.9]),
    (data.factors, "1,-1", None), (data.factors, "1,", None),
])  # fmt: skip
def test_flags_take_values_that_can_be_meant(kind, text, value):
    if value is not None:
        assert kind(text) == value
        return
    with pytest.raises((argparse.ArgumentTypeError, ValueError)):
        kind(text)


def test_help_shows_the_defaults_that_there_are(capsys):
    p = argparse.ArgumentParser(formatter_class=data.Help)
    p.add_argument("--lr", default=0.5, help="rate")
    p.add_argument("--out", help="folder")
    assert "rate (default: 0.5)" in p.format_help() and "folder\n" in p.format_help()


def test_durations_have_at_most_three_digits():
    texts = {0.4: "0 s", 99: "99 s", 100: "2 min", 5_900: "98 min", 6_000: "1.7 h", 3e5: "83.3 h"}
    assert {seconds: data.duration(seconds) for seconds in texts} == texts


def test_a_device_that_is_not_here_is_named():
    assert data.find_device("cpu") == torch.device("cpu")
    for name in ("nope", "cuda:9"):
        with pytest.raises(ValueError, match=f"--device {name} is not available here"):
            data.find_device(name)


def test_data_py_prepares_a_data_set_and_prints_its_sizes(
    tmp_path, small_net, small_root, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    shi(small_root)
    x, y = np.arange(12.0).reshape(4, 3), np.ones((4, 2), int)
    path = save_arrays(tmp_path / "own.npz", x, y, test=(x[:2], y[:2]))
    for flags, lines in [
        (["cub", "--no-normalise"], ["image: (2048,) float32, 4 to train with",
                                     "40 examples to train, 20 to test",
                                     "note: features without ImageNet normalisation"]),
        (["mnist-split"], ["top: (1, 14, 28) uint8, 60 to train with",
                           "60 examples to train, 20 to test", "preview: preview-mnist-split.png"]),
        ([str(path)], ["0: (3,) float32, 4 to train with", "4 examples to train, 2 to test"]),
    ]:  # fmt: skip
        data.main([*flags, "--data", str(small_root)])
        out = capsys.readouterr().out.splitlines()
        assert [line for line in lines if line not in out] == []
    assert out[0].startswith("0: numbers (3), normal")
    top, bottom = pixels("preview-mnist-split.png", 14, 28)
    digits = data.load("mnist-split", small_root).train[torch.arange(10)]
    for tiles, images in zip((top, bottom), digits):
        for tile, image in zip(tiles, images, strict=True):
            assert abs(tile - image.permute(1, 2, 0).numpy()).max() < 0.003


def test_data_py_names_a_mistake_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for mistake, words in [(["cub", "--data", "absent"], "absent"), (["nope"], "nope"),
                           (["glyphs", "--no-normalise"], "--no-normalise")]:  # fmt: skip
        with pytest.raises(SystemExit) as stop:
            data.main(mistake)
        lines = capsys.readouterr().err.splitlines()
        [line] = [line for line in lines if not line.startswith("usage:")]
        assert stop.value.code == 2 and words in line
    assert not list(tmp_path.iterdir())
    with pytest.raises(SystemExit):
        data.main(["--help"])
    text = capsys.readouterr().out
    assert "--no-normalise" in text and "--msp" in text  # of every data set that is prepared
