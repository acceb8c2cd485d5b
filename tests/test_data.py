"""Pairing masks, batches, the data sets of digits, a user's own arrays, archives and downloads."""

import io
import itertools
import tarfile

import numpy as np
import pytest
import torch

import data
from benchmarks import digits
from benchmarks.glyphs import glyphs
from helpers import MOLECULES, archive, offline, record, shi, tiny

AB = "a", "b"


def test_who_is_paired_is_drawn_at_random_and_the_rest_is_shared_out():
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
        (0, "split", "paired is the fraction"),
        (-0.1, "split", "paired is the fraction"),
        (1.01, "split", "paired is the fraction"),
        (0.5, "c", "one of a, b, not 'c'"),
        (0.04, "split", "0.04 of 10 examples leaves none"),
    ],
)
def test_a_pairing_that_cannot_be_is_refused(paired, unpaired, match):
    with pytest.raises(ValueError, match=match):
        data.pairing(10, AB, paired, unpaired)


def test_a_mask_of_the_data_makes_its_patterns_the_streams_the_fullest_first():
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
    with pytest.raises(ValueError, match="example 1"):
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
def test_the_shares_of_a_step(sizes, batch_size, sampling, expected):
    assert data.shares(of_sizes(*sizes), batch_size, sampling) == expected


def test_a_split_holds_its_bases_once_and_shows_them_as_numbers():
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
    shown = data.show(split, (False, True, False), torch.tensor([0, 2]))
    assert shown[0] is None and shown[2] is None and shown[1].tolist() == [[0], [1]]
    assert [x.tolist() for x in data.Split(iter(bases), iter(rows))[0]] == [[1], [0], [7]]
    bare = data.Split(iter(bases[::2]))
    assert len(bare) == 3 and bare.first(2).labels is None and bare.to("meta").labels is None
    assert bare[torch.tensor([2])][1].tolist() == [[9]]
    away = split.to("meta")
    for there, here in zip((*away.bases, *away.rows, away.labels), (*bases, *rows, split.labels)):
        assert there.device.type == "meta"
        assert (there.shape, there.dtype) == (here.shape, here.dtype)


def test_observed_takes_different_examples_spread_over_the_rows_of_what_is_shown():
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


def test_a_stream_that_runs_out_is_shuffled_again_and_its_order_is_the_generator_s():
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
def test_a_rank_without_an_example_gets_one_of_no_weight(case):
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


def test_glyphs_are_the_same_digit_twice_and_the_same_each_time():
    a, b = data.load("glyphs", limit=50), glyphs(10_000, seed=0)
    assert len(a.train) == 50 and len(a.test) == 2000
    index, shapes = torch.arange(50), [(1, 28, 28), (3, 32, 32)]
    for x, y, shape in zip(a.train[index], b[index], shapes, strict=True):
        assert x.shape == (50, *shape) and torch.equal(x, y) and 0 <= x.min() and x.max() <= 1
    assert set(a.train.labels.tolist()) == set(range(10))


def test_glyphs_have_six_hues_on_dark_opposites_that_say_nothing_of_the_digit():
    split = glyphs(4000, seed=3)
    x = split[torch.arange(4000)][1].flatten(2)  # (n, 3, 1024)
    ink, paper = x.quantile(0.97, -1), x.quantile(0.03, -1)  # of each channel
    assert paper.max() < 0.35 and ink.amax(1).min() > 0.8 and ink.amin(1).max() < 0.4
    hue = ((ink > 0.6) * torch.tensor([1, 2, 4])).sum(1)
    assert ((paper > 0.15) * torch.tensor([1, 2, 4])).sum(1).equal(7 - hue)
    table = torch.zeros(10, 8).index_put_((split.labels, hue), torch.ones(4000), accumulate=True)
    table = table[:, 1:7]
    expected = table.sum(1, keepdim=True) * table.sum(0) / 4000
    assert table.sum() == 4000 and table.min() > 30
    assert ((table - expected) ** 2 / expected).sum() < 95  # 45 degrees of freedom: p < 1e-4


def test_pairs_of_mnist_and_svhn_show_the_same_digit(small_root):
    arrays = data.read_npz(small_root / "svhn.npz")
    arrays["train_y"][arrays["train_y"] == 0] = 10  # as SVHN's own files call it
    np.savez(small_root / "svhn.npz", **arrays)
    dataset = data.load("mnist-svhn", small_root)
    assert (len(dataset.train), len(dataset.test)) == (45, 20)  # per class the fewer of both
    for labels, rows in zip((np.arange(60) % 10, np.arange(45) % 10), dataset.train.rows):
        assert (labels[rows] == dataset.train.labels.numpy()).all()
        assert len(rows.unique()) == 45
    assert len(digits.load_mnist_svhn(small_root, repeats=3).train) == 135


@pytest.mark.parametrize("name, height", [("mnist-split", 28), ("mnist-split3", 27)])
def test_bands_put_together_are_the_image(small_root, name, height):
    images = digits.mnist(small_root, True)[0]
    xs = data.load(name, small_root).train[torch.arange(60)]
    torch.testing.assert_close(torch.cat(xs, 2), images[:, :, :height].float() / 255)


def test_digits_that_are_damaged_or_cannot_be_had_are_one_sentence(small_root, monkeypatch):
    raw = small_root / "MNIST" / "raw" / "train-images-idx3-ubyte"
    raw.write_bytes(raw.read_bytes()[:-100])
    with pytest.raises(ValueError, match="train-images-idx3-ubyte is damaged"):
        data.load("mnist-split", small_root)
    for name in ("MNIST", "SVHN"):
        monkeypatch.setattr(f"torchvision.datasets.{name}.download", offline)
    for name in ("mnist-split", "mnist-svhn"):
        with pytest.raises(ValueError, match="could not be downloaded .*no network") as error:
            data.load(name, small_root / "none")
        assert "\n" not in str(error.value) and not (small_root / "none").exists()
    with pytest.raises(ValueError, match="there is no data set 'nope'"):
        data.load("nope")


GOOD = {"train_0": np.zeros((4, 3), "f4"), "train_1": np.ones((4, 2))}
GOOD |= {"test_0": np.zeros((2, 3)), "test_1": np.ones((2, 2))}


@pytest.mark.parametrize(
    "change, match",
    [
        ({"train_1": None}, "'train_1'"),
        ({"extra": np.zeros(1)}, "unknown array 'extra'"),
        ({"train_1": np.ones((5, 2))}, "train_1 .* the 4 examples"),
        ({"test_1": np.ones((2, 9))}, "test_1 .* does not fit"),
        ({"train_0": np.full((4, 3), np.nan)}, "train_0 .* not finite"),
        ({"train_mask": np.ones((4, 3), bool)}, "train_mask"),
        ({"train_mask": np.ones((2, 4), bool)}, "train_mask .* the 4 examples"),
        ({"train_labels": np.ones(3, int)}, "train_labels"),
        ({"train_0": np.array([["a"]] * 4)}, "train_0 .* numbers"),
        ({"train_0": np.array([[None]] * 4)}, "plain arrays"),
        ({"train_0": np.zeros((4, 3, 3, 3))}, "train_0 .* smaller than 8 x 8"),
        ({"train_0": np.full((4, 8, 8), 7.0)}, "train_0 .* neither bytes nor"),
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
    for name, match in ("cut.npz", "damaged"), ("absent.npz", "no file"):
        with pytest.raises(ValueError, match=match) as error:
            data.load(str(tmp_path / name))
        assert name in str(error.value)


def test_archives_cannot_leave_their_folder_or_make_links(tmp_path):
    def member(name, kind=tarfile.REGTYPE, target="", size=0):
        info = tarfile.TarInfo(name)
        info.type, info.linkname, info.size = kind, target, size
        return info

    def unpacked(name, folder):
        data.unpack(tmp_path / name, tmp_path / "cub" / folder, ".", ".txt")

    for name in ("../out.txt", "a/../../out.txt", str(tmp_path / "out.txt")):
        archive(tmp_path / "out.tgz", None, [(member(name, size=2), b"hi")])
        with pytest.raises(ValueError, match="outside"):
            unpacked("out.tgz", "x")
    links = [(member(name, tarfile.SYMTYPE, str(tmp_path)), None) for name in ("away", "away.txt")]
    archive(tmp_path / "link.tgz", None, [*links, (member("away/out.txt", size=2), b"hi")])
    unpacked("link.tgz", "y")
    assert (tmp_path / "cub" / "y" / "away" / "out.txt").read_text() == "hi"
    assert not (tmp_path / "out.txt").exists()
    assert not any(p.is_symlink() for p in (tmp_path / "cub").rglob("*"))
    (tmp_path / "cut.tgz").write_bytes((tmp_path / "link.tgz").read_bytes()[:60])
    for bad in ("cut.tgz", "none.tgz"):
        with pytest.raises(ValueError, match="cannot be unpacked"):
            unpacked(bad, "z")
    assert sorted(p.name for p in (tmp_path / "cub").iterdir()) == ["y"]


def test_a_download_that_fails_is_one_sentence_and_leaves_nothing(tmp_path, monkeypatch):
    def short(url, timeout):
        connection = io.BytesIO(b"abc")
        connection.headers = {"Content-Length": "10"}
        return connection

    for answer, reason in (offline, "no network"), (short, "3 of 10 bytes"):
        monkeypatch.setattr("urllib.request.urlopen", answer)
        with pytest.raises(ValueError, match=f"{reason}.*put it at .*a.msp by hand"):
            data.download("https://localhost/a.msp", tmp_path / "spectra" / "a.msp")
        assert not list(tmp_path.rglob("*a.msp*"))


def test_data_py_prepares_and_says_what_there_is(tmp_path, small_net, monkeypatch, capsys):
    pytest.importorskip("rdkit")
    monkeypatch.chdir(tmp_path)
    shi(tmp_path / "new")
    (tmp_path / "a.msp").write_text("".join(map(record, MOLECULES)))
    for flags, sizes in [
        (["cub", "--weights", "none"], "40 examples to train, 20 to test"),
        (["spectra", "--msp", "a.msp"], "5 examples to train, 1 to test"),
        (["glyphs"], "10,000 examples to train, 2,000 to test"),
    ]:
        data.main([*flags, "--data", "new"])
        assert sizes in capsys.readouterr().out
    assert (tmp_path / "preview-glyphs.png").stat().st_size > 5000
    with pytest.raises(SystemExit) as stop:
        data.main(["cub", "--data", "absent"])
    message = capsys.readouterr().err
    assert stop.value.code == 2 and message.count("\n") == 1 and "absent" in message
    assert not (tmp_path / "absent").exists()
