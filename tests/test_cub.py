"""CUB: photos, captions, features and their cache; word vectors, what is judged and drawn."""

import shutil
import tarfile
import types

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import data
import eval as evaluation
from benchmarks import cub
from helpers import Pooled, archive, originals, packed_originals, photo, shi


def test_captions_become_32_tokens_of_the_words_seen_more_than_three_times():
    tokens = ["the", "bird", "'s", "red-eyed", ",", "3", "inches", "!"]
    assert cub.tokenize("The bird's red-eyed, 3 inches!") == tokens
    words = cub.vocabulary([["red", "bird"]] * 3 + [["bird", "owl"]] * 4)
    assert words == ["<exc>", "<pad>", "<eos>", "bird", "owl"]  # red: three times only
    x = cub.encode_captions([["red", "bird"], ["owl"] * 40], words)
    assert x.dtype == torch.int64 and x.shape == (2, 32)
    assert x[0].tolist() == [0, 3, 2] + [1] * 29
    assert x[1].tolist() == [4] * 31 + [2]
    assert cub.caption_text(x[0], words) == "<exc> bird"


@pytest.mark.parametrize("layout", [shi, originals])
def test_each_photo_is_paired_with_its_ten_captions_in_both_layouts(tmp_path, small_net, layout):
    folder = layout(tmp_path)
    sizes = cub.prepare_cub(tmp_path, "none")
    assert sizes["photos"] == {"train": 4, "test": 2}
    assert sizes["captions"] == {"train": 40, "test": 20}
    dataset = data.load("cub", tmp_path)
    assert sizes["vocabulary"] == len(dataset.words) == dataset.spec["vocabulary"]
    assert "random" in dataset.note
    image, caption = dataset.train[torch.arange(40)]
    assert image.shape == (40, 2048) and caption.shape == (40, 32)
    assert torch.equal(image[10:20], dataset.train.bases[0][1].expand(10, -1))
    if layout is originals:  # its captions name the photo they belong to
        text = cub.caption_text(caption[10], dataset.words)
        assert text.startswith("001 . albatross 1 this bird")
    names = [str(p.relative_to(folder)) for p in cub.cub_photos(tmp_path)["train"]]
    assert names == sorted(names) and len(names) == 4
    assert not list(folder.glob("*partial*")) and not list(folder.glob(".*"))


def test_an_unreadable_photo_is_skipped_with_its_captions(tmp_path, small_net):
    folder = shi(tmp_path)
    bad = folder / "train" / "001.Albatross" / "1.jpg"
    bad.write_bytes(bad.read_bytes()[:300])
    lines = [f"caption {i // 10}" for i in range(40)]
    (folder / "text_trainvalclasses.txt").write_text("\n".join(lines))
    sizes = cub.prepare_cub(tmp_path, "none")
    assert sizes["photos"]["train"] == 3 and sizes["captions"]["train"] == 30
    assert sizes["unreadable"] == ["train/001.Albatross/1.jpg"]
    dataset = data.load("cub", tmp_path)
    assert "unreadable photos left out: 1" in dataset.note
    texts = {cub.caption_text(c, dataset.words) for c in dataset.train.bases[1]}
    assert texts == {"caption 0", "caption 2", "caption 3"}


def test_an_interrupted_extraction_goes_on_where_it_was(tmp_path, monkeypatch):
    folder, read, count = shi(tmp_path), cub.read_photo, []
    files = cub.list_photos(folder, "train") + cub.list_photos(folder, "test")

    def extract(net):
        options = dict(weights="IMAGENET1K_V1", normalise=True, device="cpu", batch_size=2)
        return cub.extract(folder, folder / "features.npz", files, 4, net, **options, every=-1)

    def interrupted(path, transform):
        count.append(path)
        if len(count) > 4:
            raise KeyboardInterrupt
        return read(path, transform)

    whole, net = extract(Pooled().eval()), Pooled().eval()
    (folder / "features.partial.npz").unlink()
    monkeypatch.setattr(cub, "read_photo", interrupted)
    with pytest.raises(KeyboardInterrupt):
        extract(Pooled().eval())
    monkeypatch.setattr(cub, "read_photo", read)
    assert np.array_equal(whole["x"], extract(net)["x"]) and net.seen == 2  # of six photos


def test_features_are_cut_before_the_last_layer_and_batchnorm_statistics_frozen(tmp_path):
    folder = shi(tmp_path)
    files = [f"train/001.Albatross/{k}.jpg" for k in range(2)] + ["test/003.Auklet/0.jpg"]
    torch.manual_seed(1)
    net = cub.resnet("none")
    torch.manual_seed(2)
    assert torch.equal(net.conv1.weight, cub.resnet("none").conv1.weight)
    x = cub.extract(folder, folder / "features.npz", files, 2, net, "none", True, "cpu")["x"]
    assert x.shape == (3, 2048) and not net.training and x.max() < 100
    assert all(m.num_batches_tracked == 1 for m in net.modules() if hasattr(m, "running_mean"))
    small, batches = Pooled(), torch.rand(2, 5, 3, 30, 30)
    cub.estimate_batchnorm(small, batches, "cpu")
    assert torch.allclose(small.norm.running_mean, batches.mean((0, 1, 3, 4)), atol=1e-6)


def test_features_of_a_read_only_folder_are_kept_below_data(tmp_path, small_net, monkeypatch):
    folder, here = shi(tmp_path), tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    folder.chmod(0o555)
    cub.prepare_cub(tmp_path, "none")
    assert len(data.load("cub", tmp_path).train) == 40
    folder.chmod(0o755)
    assert [p.name for p in (here / "data" / "cub").iterdir()] == ["features.npz"]
    assert not list(folder.glob("*.npz"))


def holds(name, text):
    return lambda folder: (folder / name).write_text(text)


def lacks(name):
    return lambda folder: (folder / name).unlink()


def one_more_photo(folder):
    cub.prepare_cub(folder.parent)
    photo(folder / "test" / "003.Auklet" / "2.jpg", 0)
    (folder / "text_testclasses.txt").write_text("a bird\n" * 30)


def no_photo(folder):
    for path in (folder / "test").rglob("*.jpg"):
        path.write_bytes(b"not a photo")


DRIVE = ["0B0ywwgffWnLLZW9uVHNjb2JmNlE", "0-8y2UVmBHAlG26HafWYNoFQ"]  # where captions are
TRAIN, NINE, OTHERS = "text_trainvalclasses.txt", "a bird\n" * 9, "003.Auklet\n004.Crow\n"


@pytest.mark.parametrize(
    "layout, spoil, words",
    [
        (shi, lacks("text_testclasses.txt"), ["text_testclasses.txt", "missing"]),
        (shi, holds(TRAIN, "a bird\n" * 39), [TRAIN, "39 captions", "4 photos", "40 lines"]),
        (shi, lambda at: cub.prepare_cub(at.parent, "none"), ["weights none", "IMAGENET1K_V1"]),
        (shi, holds("features.npz", "PK\x03\x04 and no more"), ["features.npz", "damaged"]),
        (shi, one_more_photo, ["features.npz", "(6)", "(7)"]),
        (shi, no_photo, ["2 test photos", "cub"]),
        (originals, holds("text_c10/002.Ani/1.txt", NINE), ["1.txt", "9 captions", "ten"]),
        (originals, lacks("text_c10/002.Ani/1.txt"), ["1.txt", "missing"]),
        (originals, lacks("testclasses.txt"), ["testclasses.txt"]),
        (originals, lacks("trainclasses.txt"), ["trainvalclasses.txt"]),
        (originals, holds("testclasses.txt", "002.Ani\n"), ["002.Ani", "training and"]),
        (originals, holds("testclasses.txt", OTHERS), ["004.Crow"]),
        (lambda root: (root / "cub").mkdir(), lambda at: None, DRIVE),
    ],
)
def test_bad_folders_get_one_sentence(tmp_path, small_net, layout, spoil, words):
    spoil(layout(tmp_path))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError) as error:
        cub.prepare_cub(tmp_path)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_weights_that_cannot_be_downloaded_get_one_sentence(tmp_path, monkeypatch):
    shi(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    for name in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with pytest.raises(ValueError, match="--weights none") as error:
        cub.prepare_cub(tmp_path)
    assert str(tmp_path / "home" / "hub" / "checkpoints") in str(error.value)
    with pytest.raises(ValueError, match="no_such"):
        cub.prepare_cub(tmp_path, "no_such")
    assert not (tmp_path / "cub" / "features.npz").exists()


def test_archives_are_downloaded_checked_and_unpacked(tmp_path, small_net, monkeypatch):
    source, folder, photos = packed_originals(tmp_path), tmp_path / "cub", tmp_path / "photos.tgz"
    folder.mkdir()
    archive(folder / "cvpr2016_cub.tar.gz", source / "cvpr2016_cub")
    archive(photos, source / "CUB_200_2011")
    monkeypatch.setattr(cub, "CUB_PHOTOS", photos.as_uri())
    with pytest.raises(ValueError, match="MD5"):
        cub.prepare_cub(tmp_path, "none")
    assert not list(folder.glob("CUB*"))
    (folder / "CUB_200_2011.tgz").write_bytes(photos.read_bytes()[:-9])
    with pytest.raises(ValueError, match="CUB_200_2011.tgz is damaged"):
        cub.prepare_cub(tmp_path, "none")
    (folder / "CUB_200_2011.tgz").unlink()
    monkeypatch.setattr(cub, "CUB_MD5", data.md5(photos))
    assert cub.prepare_cub(tmp_path, "none")["photos"] == {"train": 4, "test": 2}
    assert not [p for p in folder.iterdir() if "part" in p.name or p.name.count(".") > 2]
    shutil.rmtree(folder / "cvpr2016_cub")
    assert len(data.load("cub", tmp_path).train) == 40  # unpacked again
    archive(folder / "cvpr2016_cub.tar.gz", None, [(tarfile.TarInfo("nothing.txt"), b"")])
    shutil.rmtree(folder / "cvpr2016_cub")
    with pytest.raises(ValueError, match="has no text_c10/"):
        data.load("cub", tmp_path)
    assert not (folder / "cvpr2016_cub").exists()


# ----------------------------------------------------------------- word vectors and correlations

COLOURS, PARTS = ("red", "blue", "grey", "pink"), ("beak", "wing", "tail", "eye")


def sentences(n):
    """Two kinds of bird, each of its own colours and parts, in sentences of one form.
    -> tokens (n, 32), words"""
    drawn = np.random.default_rng(0).integers(2, size=(n, 3)) @ [[2, 2], [1, 0], [0, 1]]
    captions = [["a", "bird", "with", COLOURS[c], PARTS[p]] for c, p in drawn]
    words = cub.vocabulary(captions)
    return cub.encode_captions(captions, words), words


def test_word_vectors_of_words_in_the_same_company_are_alike():
    tokens, words = sentences(2000)
    vectors = cub.word_vectors(tokens, words, dim=20)
    unit = dict(zip(words[3:], vectors[3:] / np.linalg.norm(vectors[3:], axis=1, keepdims=True)))
    assert unit["red"] @ unit["blue"] > unit["red"] @ unit["grey"]
    assert unit["tail"] @ unit["eye"] > unit["tail"] @ unit["beak"]
    assert not vectors[:3].any()
    assert np.array_equal(vectors, cub.word_vectors(tokens, words, dim=20))


def test_units_are_the_word_and_its_ngrams():
    units, transposed = cub.character_ngrams(["<exc>", "<pad>", "<eos>", "beak", "a"])
    dense = units.to_dense()
    # <beak>: 4 of 3 letters, 3 of 4, 2 of 5, and itself; <a> is its only one
    assert dense.sum(1).tolist() == [0, 0, 0, 10, 1] and dense.max() == 1
    assert torch.equal(transposed.to_dense(), dense.t())


def test_skipgram_counts_are_those_of_the_window():
    x = torch.tensor([[3, 4, 5, 6, 7, 2, 1, 1]])
    pairs, frequency = cub.skipgram_counts(x, 8, window=3, sample=1e9)
    assert torch.allclose(pairs[3], torch.tensor([0, 0, 0, 0, 1, 2 / 3, 1 / 3, 0]).double())
    assert torch.equal(pairs, pairs.t()) and frequency.tolist() == [0, 0, 0, 1, 1, 1, 1, 1]


def test_word_vectors_are_kept_and_a_damaged_file_is_replaced(tmp_path, monkeypatch):
    (tokens, words), calls = sentences(50), []

    def trained(captions, words, device):
        calls.append(len(captions))
        return np.ones((len(words), 300), np.float32)

    monkeypatch.setattr(cub, "word_vectors", trained)
    (tmp_path / "cub").mkdir()
    for captions in (tokens, tokens, tokens[:40]):
        cub.cached_word_vectors(tmp_path, captions, words)
    (tmp_path / "cub" / "words.npz").write_bytes(b"PK")
    assert cub.cached_word_vectors(tmp_path, tokens[:40], words).shape == (len(words), 300)
    assert calls == [50, 40, 40]
    assert [p.name for p in (tmp_path / "cub").iterdir()] == ["words.npz"]
    assert cub.cached_word_vectors(tmp_path / "nowhere", tokens, words).any()


def test_sentence_vectors_average_the_words_before_the_end():
    words = ["<exc>", "<pad>", "<eos>", "red", "blue"]
    vectors = np.array([[9.0], [9], [9], [1], [3]])
    tokens = np.array([[3, 4, 2, 4], [0, 3, 3, 2], [2, 3, 3, 3], [4, 1, 3, 4]])
    x = cub.sentence_vectors(tokens, words, vectors)
    assert np.allclose(x[:, 0], [2, 1, 0, 7 / 3])


class Faithful(nn.Module):
    """z holds what was observed: the row of the test split that comes nearest. reads: captions"""

    def __init__(self, dataset, reads=True):
        super().__init__()
        self.reads = reads
        self.nothing = nn.Parameter(torch.zeros(1))
        self.image, self.caption = dataset.test[torch.arange(len(dataset.test))]
        self.n_words = len(dataset.words)

    def posterior(self, image, caption):
        if image is not None:
            z = torch.cdist(image, self.image).argmin(1)
        else:
            z = (caption[:, None] == self.caption).float().mean(2).argmax(1) * self.reads
        z = z[:, None].float()
        return types.SimpleNamespace(sample=lambda: z, mean=z, stddev=torch.ones_like(z))

    def prior(self):
        n = len(self.image)
        return types.SimpleNamespace(sample=lambda shape: torch.randint(n, (*shape, 1)))

    def decode(self, z):
        at = z[..., 0].long()
        return [self.image[at], nn.functional.one_hot(self.caption[at], self.n_words).float()]


def planted_birds(n):
    """Features are a noisy linear map of the word counts of the photo's ten captions."""
    names = [f"{a}{b}" for a in ("ruf", "cer", "ash", "oli", "jet") for b in ("ous", "ine", "en")]
    rng, words, splits = np.random.default_rng(0), None, []
    map_ = rng.normal(size=(len(names), 128))
    for photos in (n, n // 3):
        kinds = rng.dirichlet(np.full(len(names), 0.3), photos)
        drawn = np.stack([rng.choice(len(names), (10, 8), p=kind) for kind in kinds])
        x = np.eye(len(names))[drawn].sum((1, 2)) / 10 @ map_  # (photos, 128)
        x += 0.3 * x.std() * rng.normal(size=x.shape)
        captions = [[names[i] for i in caption] for caption in drawn.reshape(-1, 8)]
        words, index = words or cub.vocabulary(captions), torch.arange(10 * photos)
        bases = [torch.from_numpy(x.astype("f4")), cub.encode_captions(captions, words)]
        splits.append(data.Split(bases, [index // 10, index]))
    return data.Dataset("cub", *splits, {}, ("image", "caption"), words=words)


def test_the_true_correlation_of_a_planted_set_is_far_above_that_of_shuffles(tmp_path):
    dataset = planted_birds(150)
    (tmp_path / "cub").mkdir()
    models = Faithful(dataset), Faithful(dataset, reads=False)
    found, unread = (evaluation.evaluate(m, dataset, {}, root=tmp_path) for m in models)
    found, unread = found["correlation"], unread["correlation"]
    assert list(found) == ["image->caption", "caption->image", "joint", "truth"]
    vectors = cub.cached_word_vectors(tmp_path, dataset.train.bases[1], dataset.words)

    def real(split):
        image, caption = split[torch.arange(len(split))]
        return image.numpy(), cub.sentence_vectors(caption, dataset.words, vectors)

    fit, (image, caption) = evaluation.cca(*real(dataset.train), k=40), real(dataset.test)
    assert found["truth"] == pytest.approx(evaluation.correlation(fit, image, caption).mean())
    x, y = (image - fit.mean_x) @ fit.wx, (caption - fit.mean_y) @ fit.wy
    x, y = (a / np.linalg.norm(a, axis=1, keepdims=True) for a in (x, y))
    generator = np.random.default_rng(0)
    shuffles = [(x * y[generator.permutation(len(y))]).sum(1).mean() for _ in range(1000)]
    assert found["truth"] > np.percentile(shuffles, 99) + 0.1
    # this model gives a true caption of the photo, and the true photo of the caption
    assert found["caption->image"] == pytest.approx(found["truth"])
    assert found["image->caption"] == pytest.approx(found["truth"], abs=0.1)
    assert found["joint"] == pytest.approx(found["truth"], abs=0.1)
    assert unread["image->caption"] == found["image->caption"] > unread["caption->image"] + 0.1


def test_the_figure_shows_the_nearest_training_photo(tmp_path, small_net):
    shi(tmp_path)
    cub.prepare_cub(tmp_path, "none")
    dataset = data.load("cub", tmp_path)
    x = dataset.train.bases[0]
    assert cub.nearest_photos(x[[2, 0]] + 1e-3, x).tolist() == [2, 0]
    pytest.importorskip("matplotlib")
    args = dict(model="MEME", dataset="cub", paired=1)
    run = evaluation.Run(tmp_path, args, 0, 0.0, Faithful(dataset))
    cub.draw(run, dataset, tmp_path, tmp_path / "cub.png", n=2)
    assert Image.open(tmp_path / "cub.png").size[0] > 800


def test_relatedness_compares_different_photos_only():
    dataset = planted_birds(9)
    d, index = evaluation.distances(Faithful(dataset), dataset.test, 0, 1, n=3)
    assert len(dataset.test.rows[0][index].unique()) == 3
    assert np.allclose(d.diagonal(), 0) and (d[~np.eye(3, dtype=bool)] >= 10).all()
