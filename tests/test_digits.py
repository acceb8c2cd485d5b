"""Glyphs, MNIST's bands and the pairs of MNIST and SVHN."""

import numpy as np
import pytest
import torch

import data
from helpers import offline, write_idx
from loaders import digits, glyphs


def test_glyphs_are_the_same_each_time(monkeypatch):
    a, b, other = (glyphs.glyphs(60, seed) for seed in (0, 0, 1))
    for x, y, shape in zip(a[:], b[:], [(1, 28, 28), (3, 32, 32)], strict=True):
        assert x.shape == (60, *shape) and torch.equal(x, y) and 0 <= x.min() and x.max() <= 1
    assert torch.equal(a.labels, b.labels) and not torch.equal(a.labels, other.labels)
    assert set(a.labels.tolist()) == set(range(10))
    monkeypatch.setattr(glyphs, "glyphs", lambda n, seed: (n, seed))
    dataset = data.load("glyphs")
    assert (dataset.train, dataset.test) == ((10_000, 0), (2_000, 1))
    assert dataset.views == {"grey": (0,), "colour": (1,)} and dataset.names == ("grey", "colour")


def test_hues_are_complementary_and_independent_of_the_digit():
    split = glyphs.glyphs(2000, seed=3)
    x = split[torch.arange(2000)][1].flatten(2)  # (n, 3, 1024)
    ink, paper = x.quantile(0.97, -1), x.quantile(0.03, -1)  # of each channel
    assert paper.max() < 0.35 and ink.amax(1).min() > 0.8 and ink.amin(1).max() < 0.4
    hue = ((ink > 0.6) * torch.tensor([1, 2, 4])).sum(1)
    assert ((paper > 0.15) * torch.tensor([1, 2, 4])).sum(1).equal(7 - hue)
    table = torch.zeros(10, 8).index_put_((split.labels, hue), torch.ones(2000), accumulate=True)
    table = table[:, 1:7]
    expected = table.sum(1, keepdim=True) * table.sum(0) / 2000
    assert table.sum() == 2000 and table.min() > 12
    assert ((table - expected) ** 2 / expected).sum() < 95  # 45 degrees of freedom: p < 1e-4


def test_both_images_of_a_glyph_are_of_its_label():
    split = glyphs.glyphs(1000, seed=5)
    for x in split[torch.arange(1000)]:
        shape = (x - x.mean((1, 2, 3), keepdim=True)).norm(dim=1)  # (n, H, W)
        means = torch.stack([shape[split.labels == digit].mean(0) for digit in range(10)])
        nearest = torch.cdist(shape.flatten(1), means.flatten(1)).argmin(1)
        assert (nearest == split.labels).float().mean() > 0.9


def test_mnist_svhn_pairs_show_the_same_digit(small_root):
    arrays = data.read_npz(small_root / "svhn.npz")
    arrays["train_y"][arrays["train_y"] == 0] = 10  # as in SVHN's own files
    np.savez(small_root / "svhn.npz", **arrays)
    dataset = data.load("mnist-svhn", small_root)
    assert (len(dataset.train), len(dataset.test)) == (45, 20)  # per digit the smaller count
    for labels, rows in zip((np.arange(60) % 10, np.arange(45) % 10), dataset.train.rows):
        assert (labels[rows] == dataset.train.labels.numpy()).all()
        assert len(rows.unique()) == 45
    for split, part in (dataset.train, "train"), (dataset.test, "test"):
        images, _ = digits.mnist(small_root, part == "train")
        assert torch.equal(split.bases[0], images)
        assert np.array_equal(split.bases[1], arrays[f"{part}_x"])
    assert len(digits.load_mnist_svhn(small_root, repeats=3).train) == 135
    assert "45 training crops, not the standard 73,257" in dataset.note
    assert dataset.views == {"mnist": (0,), "svhn": (1,)} and dataset.names == ("mnist", "svhn")


def test_pairs_are_those_of_seed_0(small_root):
    generator = torch.Generator().manual_seed(0)
    dataset = data.load("mnist-svhn", small_root)
    for split, sizes in ((dataset.train, (60, 45)), (dataset.test, (20, 30))):
        rows = [], []
        for digit in range(10):
            members = [torch.arange(digit, size, 10) for size in sizes]
            n = min(map(len, members))
            for side, m in zip(rows, members):
                side.append(m[:n][torch.randperm(n, generator=generator)])
        order = torch.randperm(sum(map(len, rows[0])), generator=generator)
        for found, side in zip(split.rows, rows):
            assert torch.equal(found, torch.cat(side)[order])


@pytest.mark.parametrize("name, height", [("mnist-split", 14), ("mnist-split3", 9)])
def test_bands_put_together_are_the_image(small_root, name, height):
    dataset = data.load(name, small_root)
    m = len(dataset.names)
    assert dataset.views == {"image": tuple(range(m))}
    for split, train, n in (dataset.train, True, 60), (dataset.test, False, 20):
        images, labels = digits.mnist(small_root, train)
        xs = split[torch.arange(n)]
        assert [x.shape for x in xs] == [(n, 1, height, 28)] * m
        torch.testing.assert_close(torch.cat(xs, 2), images[:, :, : m * height].float() / 255)
        assert torch.equal(split.labels, labels)


def test_svhn_npz_is_made_from_torchvision_once(small_root, monkeypatch):
    arrays, asked = data.read_npz(small_root / "svhn.npz"), []

    class SVHN:
        def __init__(self, root, split, download):
            asked.append((root, split, download))
            self.data, self.labels = arrays[f"{split}_x"], arrays[f"{split}_y"]

    monkeypatch.setattr(digits, "SVHN", SVHN)
    whole = data.load("mnist-svhn", small_root)
    assert not asked
    (small_root / "svhn.npz").unlink()
    again = data.load("mnist-svhn", small_root)
    assert asked == [(small_root / "svhn", part, True) for part in ("train", "test")]
    for split, other in (again.train, whole.train), (again.test, whole.test):
        assert torch.equal(split.bases[1], other.bases[1])
        assert torch.equal(split.rows[1], other.rows[1])
    data.load("mnist-svhn", small_root)
    assert len(asked) == 2


@pytest.mark.parametrize("name", ["mnist-split", "mnist-svhn"])
def test_unreadable_images_get_one_sentence(small_root, monkeypatch, name):
    for module in ("mnist.download_and_extract_archive", "svhn.download_url"):
        monkeypatch.setattr(f"torchvision.datasets.{module}", offline)
    with pytest.raises(ValueError, match="cannot be read: no network.*--data") as error:
        data.load(name, small_root / "none")
    assert "\n" not in str(error.value)
    raw = small_root / "MNIST" / "raw" / "train-images-idx3-ubyte"
    raw.write_bytes(raw.read_bytes()[:-100])
    with pytest.raises(ValueError, match=f"{raw.parent} cannot be read") as error:
        data.load(name, small_root)
    assert "\n" not in str(error.value)


def test_images_of_another_shape_are_refused(small_root):
    flat = np.zeros((60, 14, 56), np.uint8)  # as many pixels as 28 x 28
    write_idx(small_root / "MNIST" / "raw", "train", flat, np.arange(60, dtype=np.uint8) % 10)
    with pytest.raises(ValueError, match="14, 56"):
        data.load("mnist-split", small_root)
    arrays = data.read_npz(small_root / "svhn.npz")
    arrays["test_x"] = arrays["test_x"].transpose(0, 2, 3, 1)
    np.savez(small_root / "svhn.npz", **arrays)
    with pytest.raises(ValueError, match=r"test_x must be uint8 \(N, 3, 32, 32\)"):
        digits.svhn(small_root)
