"""Splits, pairing, batches, the files of an .npz, and how files are written."""

import itertools
import os
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch

import data
from benchmarks import spectra
from helpers import MOLECULES, ROOT, record, shi, tiny

AB = "a", "b"


def test_pairs_are_drawn_at_random_and_the_rest_shared_out():
    names, everyone = ("a", "b", "c"), set(range(20))
    alone = [(True, False, False), (False, True, False), (False, False, True)]
    for unpaired in ("split", "rest", "all", "c", "none"):
        (shown, index), *others = data.pairing(20, names, 0.36, unpaired)  # 7.2 of 20: 7
        assert shown == (True,) * 3 and len(set(index.tolist())) == 7
        whole, sets = set(index.tolist()), [set(index.tolist()) for _, index in others]
        rest = everyone - whole
        assert [shown for shown, _ in others] == {"c": alone[2:], "none": []}.get(unpaired, alone)
        if unpaired == "split":
            assert [len(part) for part in sets] == [5, 4, 4] and set.union(*sets) == rest
        else:
            assert all(part == (everyone if unpaired == "all" else rest) for part in sets)
    drawn = [data.pairing(20, names, 0.2, "none", seed=k)[0][1] for k in range(200)]
    often = torch.cat(drawn).bincount(minlength=20)
    assert often.min() > 20 and often.max() < 65  # each of the 20 in a fifth of the 200: 40
    default = data.pairing(20, names)
    assert len(default) == 1 and torch.equal(default[0][1], torch.randperm(20, generator=zero()))
    assert [len(i) for _, i in data.pairing(20, AB, 0.5)] == [10, 5, 5]  # split
    assert len(data.pairing(2, names, 0.5)) == 2  # a stream without an example is none


def zero():
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize(
    "paired, unpaired, match",
    [
        (0, "split", "--paired must be a fraction"),
        (-0.1, "split", "--paired must be a fraction"),
        (1.01, "split", "--paired must be a fraction"),
        (0.5, "c", "--unpaired must be one of split, all, rest, none, a, b, not 'c'"),
        (0.04, "split", "0.04 of 10 examples leaves none"),
    ],
)
def test_a_pairing_that_cannot_be_is_refused(paired, unpaired, match):
    with pytest.raises(ValueError, match=match):
        data.pairing(10, AB, paired, unpaired)


def test_the_patterns_of_a_mask_are_streams_fullest_first():
    mask = torch.tensor([[1, 1], [0, 1], [1, 1], [1, 0]]).bool()
    streams = data.pairing(4, AB, mask=mask)
    assert streams[0][0] == (True, True) and streams[0][1].tolist() == [0, 2]
    assert {shown: index.tolist() for shown, index in streams[1:]} == {
        (False, True): [1],
        (True, False): [3],
    }
    every = list(itertools.product((False, True), repeat=6))[1:]
    found = [shown for shown, _ in data.patterns(torch.tensor(every))]
    assert found == sorted(every, key=lambda shown: -sum(shown))
    with pytest.raises(ValueError, match="row 1"):
        data.pairing(3, AB, mask=torch.tensor([[1, 0], [0, 0], [0, 1]]).bool())


def of_sizes(*sizes):
    return [((True, True), torch.arange(n)) for n in sizes]


@pytest.mark.parametrize(
    "sizes, batch_size, sampling, expected",
    [
        ((30, 50, 20), 10, "natural", ([3, 5, 2], 10)),  # 10 n_i / 100
        ((30, 51, 20), 10, "natural", ([3, 5, 2], 11)),  # 101 / 10, rounded up
        ((1, 99), 10, "natural", ([1, 10], 10)),  # at least one
        ((3, 5), 20, "natural", ([3, 5], 1)),  # at most all
        ((1, 98), 64, "natural", ([1, 63], 2)),
        ((3, 41, 8), 8, "balanced", ([3, 8, 8], 6)),  # 41 / 8, rounded up
    ],
)
def test_sizes_of_a_step_and_steps_of_an_epoch(sizes, batch_size, sampling, expected):
    assert data.batch_sizes(of_sizes(*sizes), batch_size, sampling) == expected


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
    shown = data.select(split, (False, True, False), torch.tensor([0, 2]))
    assert shown[0] is None and shown[2] is None and shown[1].tolist() == [[0], [1]]
    assert [x.tolist() for x in data.Split(iter(bases), iter(rows))[0]] == [[1], [0], [7]]
    bare = data.Split(iter(bases[::2]))
    assert len(bare) == 3 and bare.first(2).labels is None and bare.to("meta").labels is None
    assert bare[torch.tensor([2])][1].tolist() == [[9]]
    away = split.to("meta")
    for there, here in zip((*away.bases, *away.rows, away.labels), (*bases, *rows, split.labels)):
        assert there.device.type == "meta"
        assert (there.shape, there.dtype) == (here.shape, here.dtype)


def test_observed_examples_are_different_and_spread_over_the_rows():
    bases = [torch.arange(10.0)[:, None], 100 + torch.arange(40.0)[:, None]]
    rows = [torch.arange(40) // 4, torch.arange(40)]  # four examples share a row of the first
    split = data.Split(bases, rows)
    streams = [((True, True), torch.arange(8, 16)), ((True, False), torch.arange(20, 40))]
    # shown are the first's rows 2, 3, 5, 6, 7, 8, 9 and the second's 8 to 15
    a, b = data.observed(split, streams, 4)
    assert a.flatten().tolist() == [2, 5, 7, 9] and b.flatten().tolist() == [108, 110, 112, 115]
    a, b = data.observed(split, streams, 100)
    assert a.flatten().tolist() == [2, 3, 5, 6, 7, 8, 9] and len(b) == 8
    assert len(data.observed(split, streams[1:], 3)[1]) == 0  # the second is never shown


def epoch(n, paired, unpaired, size, sampling, rank=0, world=1, seed=0):
    """Steps of [(weight, xs, what xs shows), ...] of tiny(n)."""
    streams = data.pairing(n, AB, paired, unpaired, seed=0)
    generator = torch.Generator().manual_seed(seed)
    steps = data.batches(tiny(n), streams, size, sampling, generator, rank, world)
    return [[(w, xs, tuple(x is not None for x in xs)) for w, xs in step] for step in steps]


@pytest.mark.parametrize("world", [1, 3])
def test_natural_sampling_is_unbiased(world):
    split, streams = tiny(10), data.pairing(10, AB, 0.3, "a", seed=0)
    steps = [[(len(xs[0]), w) for w, xs, _ in step] for step in epoch(10, 0.3, "a", 4, "natural")]
    assert steps == [[(1, 0.3), (3, 0.7)]] * 3  # shared out by the sizes of the streams
    value, total = {(True, True): 1.0, (True, False): 10.0}, 0
    exactly = sum(value[shown] * split.bases[0][index].sum() for shown, index in streams) / 10
    for seed, rank in itertools.product(range(400), range(world)):
        for step in epoch(10, 0.3, "a", 4, "natural", rank, world, seed):
            total += sum(w * value[shown] * xs[0].mean() for w, xs, shown in step)
    assert total / (400 * world * len(steps)) == pytest.approx(exactly.item(), rel=0.02)


@pytest.mark.parametrize("world", [1, 2])
def test_steps_of_one_pattern_are_unbiased(world):
    split = tiny(20)
    mask = torch.ones(20, 2, dtype=torch.bool)
    streams = [((True, True), torch.arange(2)), ((True, False), torch.arange(2, 5))]
    streams += [((False, True), torch.arange(5, 12)), ((True, True), torch.arange(12, 20))]
    assert data.one_pattern_per_step(streams, "natural") and not data.one_pattern_per_step(
        streams[:3], "natural"
    )
    sizes, steps = data.batch_sizes(streams, 4, "natural")
    assert steps == 5 and sum(sizes) == pytest.approx((2 * 2 + 3 * 3 + 4 * 7 + 4 * 8) / 20)
    value = {(True, True): 1.0, (True, False): 10.0, (False, True): 100.0}
    exactly = sum(value[mask] * split.bases[mask.index(True)][k].sum() for mask, k in streams) / 20
    total, seen = 0, set()
    for seed, rank in itertools.product(range(1000), range(world)):
        generator = torch.Generator().manual_seed(seed)
        for step in data.batches(split, streams, 4, "natural", generator, rank, world):
            ((w, xs),) = step
            mask = tuple(x is not None for x in xs)
            seen.add((mask, len(xs[mask.index(True)])))
            total += w * value[mask] * xs[mask.index(True)].mean()
    assert total / (1000 * world * steps) == pytest.approx(exactly.item(), rel=0.03)
    if world == 1:  # batch_size of a pattern, or as many as it has
        assert seen == {
            ((True, True), 2),
            ((True, True), 4),
            ((True, False), 3),
            ((False, True), 4),
        }


@pytest.mark.parametrize("sampling", ["natural", "balanced"])
def test_ranks_share_a_step_out_without_loss(sampling):
    one = epoch(10, 0.3, "split", 4, sampling)
    many = [epoch(10, 0.3, "split", 4, sampling, rank, 3) for rank in range(3)]
    for step, parts in zip(one, zip(*many, strict=True), strict=True):
        assert all(parts)  # no rank goes without
        for weight, xs, shown in step:
            m = shown.index(True)
            mine = [(w, ys[m]) for part in parts for w, ys, seen in part if seen == shown]
            assert torch.cat([y for _, y in mine]).sort(0)[0].equal(xs[m].sort(0)[0])
            mean = sum(w * y.mean() for w, y in mine) / 3
            assert mean == pytest.approx(weight * xs[m].mean().item(), rel=1e-5)


def test_an_exhausted_stream_is_shuffled_again_by_the_generator():
    def drawn(seed, sampling="natural", **rank):  # 3 paired, in passes of 3; 9 alone
        steps = epoch(12, 0.25, "a", 4, sampling, seed=seed, **rank)
        for stream in range(2):
            xs = [step[stream][1][0].flatten() for step in steps]
            assert len({len(x) for x in xs}) == 1 or sampling == "balanced"
            yield torch.cat(xs).int().tolist()

    whole, alone = drawn(0)
    pairs = data.pairing(12, AB, 0.25, "a")[0][1].tolist()
    assert sorted(whole) == sorted(pairs) and sorted(alone) == sorted(set(range(12)) - set(pairs))
    assert [whole, alone] == list(drawn(0)) != list(drawn(1))
    torch.manual_seed(1)
    assert [whole, alone] == list(drawn(0))
    whole, alone = drawn(0, "balanced")
    assert len(whole) == 9 and all(sorted(whole[k : k + 3]) == sorted(pairs) for k in (0, 3, 6))
    assert len({tuple(whole[k : k + 3]) for k in (0, 3, 6)}) > 1  # not the same order again
    assert sorted(alone) == sorted(set(range(12)) - set(pairs))


def test_the_ranks_are_dealt_a_step_like_cards():
    split, streams = (
        tiny(20),
        [((True, True), torch.arange(7)), ((True, False), torch.arange(7, 20))],
    )
    ranks = [data.batches(split, streams, 20, "natural", zero(), k, 3) for k in range(3)]
    (one,) = data.batches(split, streams, 20, "natural", zero())
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
        for _, xs, shown in (entry for part in parts for entry in part if entry[0] == 0):
            assert shown == (True, True) and len(xs[0]) == 1
        assert sum(w for part in parts for w, _, _ in part) / 4 == pytest.approx(1)


def test_balanced_sampling_is_one_pass_over_the_largest_stream():
    steps = epoch(10, 0.2, "all", 4, "balanced")
    sizes = [[len(xs[shown.index(True)]) for _, xs, shown in step] for step in steps]
    assert sizes == [[2, 4, 4], [2, 4, 4], [2, 2, 2]]
    assert all(weight == 1 for step in steps for weight, _, _ in step)
    uneven = data.batches(tiny(10), of_sizes(10, 5), 4, "balanced")
    assert [[len(xs[0]) for _, xs in step] for step in uneven] == [[4, 4], [4, 4], [2, 4]]
    seen = torch.cat([step[1][1][0] for step in steps])
    assert seen.flatten().sort()[0].tolist() == list(range(10))


@pytest.mark.parametrize("sampling, other", [("natural", "balanced"), ("balanced", "natural")])
def test_docs_sampling_swaps_the_weights_and_keeps_the_batches(sampling, other):
    script = runpy.run_path(str(ROOT / "docs" / "sampling.py"))
    streams = data.pairing(20, AB, 0.2, "rest")

    def one_epoch(batches, sampling):
        return list(batches(tiny(20), streams, 4, sampling, zero()))

    theirs = one_epoch(data.batches, other)[0]
    expected, found = (one_epoch(b, sampling) for b in (data.batches, script["swapped"]))
    assert len(found) == len(expected) > 1
    for step, swapped in zip(expected, found):
        assert [w for w, _ in swapped] == [w for w, _ in theirs] != [w for w, _ in step]
        torch.testing.assert_close([xs for _, xs in swapped], [xs for _, xs in step])


# ------------------------------------------------------------------------------------------- groups


def sizes(*counts):
    """Groups with these numbers of examples, their examples scattered."""
    groups = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    return groups[torch.randperm(len(groups), generator=zero())]


def test_no_group_is_cut_in_two_by_any_seed():
    groups = sizes(1, 9, 2, 17, 4, 30, 3, 8, 21, 5, 60, 2, 11, 6)
    n = len(groups)
    for seed, unpaired in itertools.product(range(50), ("split", "rest", "a", "none")):
        (_, pairs), *others = data.pairing(n, ("a", "b", "c"), 0.4, unpaired, seed, groups=groups)
        streams = [pairs, *(index for _, index in others)]
        streams = streams[:2] if unpaired == "rest" else streams  # the others repeat the second
        members = [set(groups[index].tolist()) for index in streams]
        assert sum(map(len, members)) == len(set.union(*members)), (seed, unpaired)
        for found, index in zip(members, streams):
            assert len(index) == sum(int((groups == group).sum()) for group in found)
        if unpaired != "none":
            assert sorted(torch.cat(streams).tolist()) == list(range(n))


def test_whole_groups_give_the_nearest_counts():
    groups = sizes(*[3] * 40)  # ends at multiples of 3
    for seed in range(10):
        streams = data.pairing(120, ("a", "b"), 0.4, "split", seed, groups=groups)
        assert [len(index) for _, index in streams] == [48, 36, 36]
        streams = data.pairing(120, ("a", "b"), 0.41, "split", seed, groups=groups)  # 49.2
        assert [len(index) for _, index in streams] == [48, 36, 36]
        streams = data.pairing(120, ("a", "b"), 0.42, "split", seed, groups=groups)  # 50.4
        assert len(streams[0][1]) == 51
    first, again, other = (
        data.pairing(120, ("a", "b"), 0.4, "split", seed, groups=groups)[0][1] for seed in (0, 0, 1)
    )
    assert torch.equal(first, again) and set(first.tolist()) != set(other.tolist())


def test_groups_of_one_give_the_counts_without_groups():
    for groups in (None, torch.arange(50)):
        streams = data.pairing(50, ("a", "b"), 0.3, "split", 1, groups=groups)
        assert [len(index) for _, index in streams] == [15, 18, 17]


def test_a_fingerprint_is_hidden_in_all_spectra_of_its_compound(tmp_path):
    pytest.importorskip("rdkit")
    peaks = ["57.07 100\n71.08 25", "60.1 3\n99.2 9", "61.1 3\n98.2 9"]
    (tmp_path / "a.msp").write_text("".join(record(s, p) for p in peaks for s in MOLECULES))
    spectra.prepare_spectra(tmp_path, tmp_path / "a.msp")
    dataset = data.load("spectra", tmp_path)
    assert torch.equal(dataset.groups, dataset.train.rows[1])
    assert len(data.load("spectra", tmp_path, limit=12).groups) == 12
    fixed = 1, dataset.mask, dataset.groups
    (_, pairs), (_, alone) = data.pairing(15, dataset.names, 0.5, "spectrum", *fixed)
    shown, hidden = (set(dataset.train.rows[1][index].tolist()) for index in (pairs, alone))
    assert (len(pairs), len(alone)) == (9, 6) and not shown & hidden


# -------------------------------------------------------------------------------------------- files

GOOD = {"train_0": np.zeros((4, 3), "f4"), "train_1": np.ones((4, 2))}
GOOD |= {"test_0": np.zeros((2, 3)), "test_1": np.ones((2, 2))}


@pytest.mark.parametrize(
    "change, match",
    [
        ({"train_1": None}, "train_1"),
        ({"test_1": None}, "test_1"),
        ({"extra": np.zeros(1)}, "an array 'extra'"),
        ({"train_1": None, "test_1": None}, "two modalities or more, not 1"),
        ({"train_split": np.ones(4), "test_split": np.ones(2)}, "called 'split'"),
        ({"train_a,b": np.ones(4), "test_a,b": np.ones(2)}, "called 'a,b'"),
        ({"train_1": np.ones((5, 2))}, "as many rows"),
        ({"train_1": np.ones((0, 2))}, "train_1 must be numeric"),
        ({"test_1": np.ones((2, 9))}, r"1 is \(4, 2\) in training, \(2, 9\) in the test"),
        ({"train_mask": np.ones((4, 3), bool)}, r"train_mask .*\(4, 2\)"),
        ({"train_mask": np.ones((2, 4), bool)}, "as many rows"),
        ({"train_mask": np.full((4, 2), 0.5)}, "train_mask must hold 0 and 1"),
        ({"train_mask": np.array([[1, 0]] * 4)}, "no .*example.* shows 1"),
        ({"train_labels": np.ones(3, int)}, "as many rows"),
        ({"train_labels": np.ones(4)}, "train_labels must hold one integer"),
        ({"train_0": np.array([["a"]] * 4)}, "train_0 must be numeric"),
        ({"train_0": np.array([[None]] * 4)}, "cannot be read"),
        ({"train_0": np.zeros((4, 3, 3, 3)), "test_0": np.zeros((2, 3, 3, 3))}, "smaller than 8 x"),
    ],
)
def test_arrays_that_do_not_fit_are_refused_by_name(tmp_path, change, match):
    path, arrays = tmp_path / "bad.npz", GOOD | change
    np.savez(path, **GOOD)
    assert len(data.load(str(path)).train) == 4
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    with pytest.raises(ValueError, match=match) as error:
        data.load(str(path))
    assert "bad.npz" in str(error.value) and "\n" not in str(error.value)


def test_a_file_that_is_cut_or_not_there_is_named(tmp_path):
    np.savez(tmp_path / "cut.npz", **GOOD)
    (tmp_path / "cut.npz").write_bytes((tmp_path / "cut.npz").read_bytes()[:200])
    for name in "cut.npz", "absent.npz":
        with pytest.raises(ValueError, match=f"{name} cannot be read: "):
            data.load(str(tmp_path / name))
    np.savez(tmp_path / "a.npz", x=np.ones(2), y=np.ones(1))
    assert list(data.read_npz(tmp_path / "a.npz", ["y"])) == ["x", "y"]
    with pytest.raises(ValueError, match="a.npz has no array 'z', only x, y"):
        data.read_npz(tmp_path / "a.npz", ["x", "z"])


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "new" / "a.npz"
    data.save_npz(path, x=np.arange(3))
    before = path.read_bytes()

    def half(file):
        file.write(before[:50])
        raise OSError(28, "No space left on device")

    for write in (half, lambda file: os.remove("absent")):
        with pytest.raises(OSError):
            data.atomic_write(path, write)
        assert path.read_bytes() == before and os.listdir(path.parent) == ["a.npz"]
    data.atomic_write(path, lambda file: file.write(b"other"))
    assert path.read_bytes() == b"other" and os.listdir(path.parent) == ["a.npz"]
    data.write_csv(tmp_path / "a.csv", [{"epoch": 1, "b": 0.5}, {"epoch": 2, "b": float("nan")}])
    assert (tmp_path / "a.csv").read_bytes() == b"epoch,b\r\n1,0.5\r\n2,nan\r\n"


def test_prepared_files_of_a_read_only_root_go_to_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "root" / "cub").mkdir(parents=True)
    inside = tmp_path / "root" / "cub" / "features.npz"
    assert data.prepared(tmp_path / "root", "cub", "features.npz") == inside
    (tmp_path / "root" / "cub").chmod(0o555)
    assert data.prepared(tmp_path / "root", "cub", "features.npz") == Path("data/cub/features.npz")
    (tmp_path / "root" / "cub").chmod(0o755)


# --------------------------------------------------------------------------------- python data.py


def test_a_grid_has_the_images_of_each_row(tmp_path):
    from PIL import Image

    rows = [torch.rand(3, 1, 14, 28), torch.rand(3, 3, 32, 32)]
    assert [data.is_image(x) for x in (*rows, torch.rand(3, 2, 8, 8), torch.rand(3, 4))] == [
        True, True, False, False
    ]  # fmt: skip
    assert data.save_grid(rows, tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        pixels = np.asarray(image)[::2, ::2] / 255  # tiles of 64 pixels and more: twice as large
    assert pixels.shape == (2 * 34 + 2, 3 * 34 + 2, 3)
    for k in range(3):
        left = 2 + 34 * k
        grey, colour = pixels[2:16, left : left + 28], pixels[36:68, left : left + 32]
        assert abs(grey - rows[0][k].permute(1, 2, 0).numpy()).max() < 0.003
        assert abs(colour - rows[1][k].permute(1, 2, 0).numpy()).max() < 0.003


def test_data_py_prepares_a_data_set_and_prints_its_sizes(tmp_path, small_net, monkeypatch, capsys):
    pytest.importorskip("rdkit")
    monkeypatch.chdir(tmp_path)
    shi(tmp_path / "new")
    (tmp_path / "a.msp").write_text("".join(map(record, MOLECULES)))
    np.savez("own.npz", **GOOD)
    for flags, sizes in [
        (["cub", "--weights", "none"], "40 examples to train, 20 to test"),
        (["spectra", "--msp", "a.msp"], "5 examples to train, 1 to test"),
        (["glyphs"], "10,000 examples to train, 2,000 to test"),
        (["own.npz"], "4 examples to train, 2 to test"),
    ]:
        data.main([*flags, "--data", "new"])
        assert sizes in capsys.readouterr().out
    assert (tmp_path / "preview-glyphs.png").stat().st_size > 5000
    for bad in (["cub", "--data", "absent"], ["nope"]):
        with pytest.raises(SystemExit) as stop:
            data.main(bad)
        said = [x for x in capsys.readouterr().err.splitlines() if not x.startswith("usage:")]
        assert stop.value.code == 2 and bad[-1] in said[-1]
    assert not (tmp_path / "absent").exists()
