"""CUB: photos, captions, features and their cache; word vectors, correlations, the figure."""

import itertools
import math
import types
import urllib.request
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torchvision.datasets.utils import calculate_md5

import data
import eval as evaluation
from benchmarks import cub, npz
from helpers import Pooled, archive, originals, packed_originals, photo, shi


def test_captions_are_32_tokens_of_words_seen_four_times():
    tokens = ["the", "bird", "'s", "red-eyed", ",", "3", "inches", "!"]
    assert cub.tokenize("The bird's red-eyed, 3 inches!") == tokens
    words = cub.vocabulary([["red", "bird"]] * 3 + [["bird", "owl"]] * 4)
    assert words == ["<exc>", "<pad>", "<eos>", "bird", "owl"]  # red: three times only
    x = cub.encode_captions([["red", "bird"], ["owl"] * 40], words)
    assert x.dtype == torch.int64 and x.shape == (2, 32)
    assert x[0].tolist() == [0, 3, 2] + [1] * 29
    assert x[1].tolist() == [4] * 31 + [2]
    assert cub.caption_text(x[0], words) == "<exc> bird"
    assert cub.caption_text([4, 3], words) == "owl bird"  # without an end


@pytest.mark.parametrize("layout", [shi, originals])
def test_each_photo_has_its_ten_captions_in_both_layouts(tmp_path, small_net, layout):
    folder = layout(tmp_path)
    cub.prepare_cub(tmp_path, "none")
    dataset = data.load("cub", tmp_path)
    assert [len(split.bases[0]) for split in (dataset.train, dataset.test)] == [4, 2]
    assert (len(dataset.train), len(dataset.test)) == (40, 20)
    assert len(dataset.words) == dataset.spec["vocabulary"] and "random" in dataset.note
    image, caption = dataset.train[torch.arange(40)]
    assert image.shape == (40, 2048) and caption.shape == (40, 32)
    assert torch.equal(image[10:20], dataset.train.bases[0][1].expand(10, -1))
    if layout is originals:  # its captions name the photo they belong to
        text = cub.caption_text(caption[10], dataset.words)
        assert text.startswith("001 . albatross 1 this bird")
    names = [str(p.relative_to(folder)) for p in cub.cub_photos(tmp_path)["train"]]
    assert names == sorted(names) and len(names) == 4
    assert not list(folder.glob("*partial*")) and not list(folder.glob(".*"))


def test_features_and_captions_are_read_once(tmp_path, small_net, monkeypatch):
    folder, opened = shi(tmp_path), []
    cub.prepare_cub(tmp_path, "none")
    read_npz, read_lines = data.read_npz, cub.read_lines
    monkeypatch.setattr(
        data, "read_npz", lambda path, *a: opened.append(path) or read_npz(path, *a)
    )
    monkeypatch.setattr(cub, "read_lines", lambda path: opened.append(path) or read_lines(path))
    data.load("cub", tmp_path)
    names = "features.npz", "text_trainvalclasses.txt", "text_testclasses.txt"
    assert opened == [folder / name for name in names]


def test_an_unreadable_photo_is_skipped_with_its_captions(tmp_path, small_net, capsys):
    folder = shi(tmp_path)
    bad = folder / "train" / "001.Albatross" / "1.jpg"
    bad.write_bytes(bad.read_bytes()[:300])
    lines = [f"caption {i // 10}" for i in range(40)]
    (folder / "text_trainvalclasses.txt").write_text("\n".join(lines))
    args = types.SimpleNamespace(weights="none", no_normalise=False, features=None)
    cub.prepare(tmp_path, args)
    assert "train/001.Albatross/1.jpg" in capsys.readouterr().out
    dataset = data.load("cub", tmp_path)
    assert len(dataset.train.bases[0]) == 3 and len(dataset.train) == 30
    assert "unreadable photos left out: 1" in dataset.note
    texts = {cub.caption_text(c, dataset.words) for c in dataset.train.bases[1]}
    assert texts == {"caption 0", "caption 2", "caption 3"}
    assert [p.name for p in cub.cub_photos(tmp_path)["train"]] == ["0.jpg", "0.jpg", "1.jpg"]


def test_an_interrupted_extraction_is_resumed(tmp_path, monkeypatch):
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


def test_random_features_have_fixed_batchnorm_statistics(tmp_path):
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


def test_features_of_a_read_only_folder_go_to_data(tmp_path, small_net, monkeypatch):
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


def no_photo(folder):
    for path in (folder / "test").rglob("*.jpg"):
        path.write_bytes(b"not a photo")


DRIVE = ["0B0ywwgffWnLLZW9uVHNjb2JmNlE", "0-8y2UVmBHAlG26HafWYNoFQ"]  # where captions are
TRAIN, NINE, OTHERS = "text_trainvalclasses.txt", "a bird\n" * 9, "003.Auklet\n004.Crow\n"


@pytest.mark.parametrize(
    "layout, spoil, words",
    [
        (shi, lacks("text_testclasses.txt"), ["text_testclasses.txt cannot be read"]),
        (shi, holds(TRAIN, "a bird\n" * 39), [TRAIN, "40 lines for 4 photos, not 39"]),
        (shi, lambda at: cub.prepare_cub(at.parent, "none"), ["'none'", "'IMAGENET1K_V1'"]),
        (shi, holds("features.npz", "PK\x03\x04 and no more"), ["features.npz cannot be read"]),
        (shi, one_more_photo, ["features.npz", "6 photos", "the 7 in"]),
        (shi, no_photo, ["none of the 2 test photos"]),
        (originals, holds("text_c10/002.Ani/1.txt", NINE), ["1.txt must have ten", "not 9"]),
        (originals, lacks("text_c10/002.Ani/1.txt"), ["1.txt cannot be read"]),
        (originals, lacks("testclasses.txt"), ["testclasses.txt cannot be read"]),
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


def test_missing_weights_get_one_sentence(tmp_path, monkeypatch):
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
    retrieve = "torchvision.datasets.utils._urlretrieve"  # the one that shows progress by HTTP
    monkeypatch.setattr(retrieve, lambda url, path: urllib.request.urlretrieve(url, path))
    with pytest.raises(ValueError, match="cannot be downloaded: .*corrupted"):
        cub.prepare_cub(tmp_path, "none")
    monkeypatch.setattr(cub, "CUB_MD5", calculate_md5(photos))
    (folder / "CUB_200_2011.tgz").write_bytes(photos.read_bytes()[:-9])  # it is fetched again
    cub.prepare_cub(tmp_path, "none")
    dataset = data.load("cub", tmp_path)
    assert [len(split.bases[0]) for split in (dataset.train, dataset.test)] == [4, 2]
    names = {"CUB_200_2011", "CUB_200_2011.tgz", "cvpr2016_cub", "cvpr2016_cub.tar.gz"}
    assert {p.name for p in folder.iterdir()} == names | {"features.npz"}


@pytest.mark.parametrize("spoiled", ["truncated", "another"])
def test_a_bad_archive_leaves_no_folder(spoiled, tmp_path):
    source, folder = packed_originals(tmp_path), tmp_path / "cub"
    folder.mkdir()
    path = folder / "cvpr2016_cub.tar.gz"
    if spoiled == "truncated":
        archive(path, source / "cvpr2016_cub")
        path.write_bytes(path.read_bytes()[:-100])
    else:
        archive(path, source / "CUB_200_2011")
    with pytest.raises(ValueError, match="cvpr2016_cub.tar.gz (cannot be read|must hold)"):
        data.load("cub", tmp_path)
    assert list(folder.iterdir()) == [path]


# ----------------------------------------------------------------- word vectors and correlations

COLOURS, PARTS = ("red", "blue", "grey", "pink"), ("beak", "wing", "tail", "eye")


def sentences(n):
    """Two kinds of bird, each of its own colours and parts, in sentences of one form.
    -> tokens (n, 32), words"""
    drawn = np.random.default_rng(0).integers(2, size=(n, 3)) @ [[2, 2], [1, 0], [0, 1]]
    captions = [["a", "bird", "with", COLOURS[c], PARTS[p]] for c, p in drawn]
    words = cub.vocabulary(captions)
    return cub.encode_captions(captions, words), words


def test_units_are_words_and_ngrams_of_3_to_6_letters():
    grams = {
        "wing": "<wing> <wi <win <wing ing ing> ng> win wing wing>",
        "wings": "<wings> <wi <win <wing <wings gs> ing ings ings> ngs ngs> win wing wings wings>",
        "a": "<a>",
        "feathers": "<feathers> <fe <fea <feat <feath ath athe ather athers eat eath eathe eather "
        "ers ers> fea feat feath feathe hers hers> her rs> the ther thers thers>",
    }
    units, transposed = cub.character_ngrams(["<exc>", "<pad>", "<eos>", *grams])
    expected, index = torch.zeros(7, 10 + 9 + 1 + 27), {}
    for row, text in enumerate(grams.values(), 3):
        whole, *others = text.split()
        for gram in (whole, *sorted(others)):
            expected[row, index.setdefault(gram, len(index))] = 1
    assert torch.equal(units.to_dense(), expected)
    assert torch.equal(transposed.to_dense(), expected.t())


def skipgram_draws(captions, draws=10, seed=0):
    """Sentences as word2vec samples them: frequent words are dropped at random. Yields lists."""
    words = [w for caption in captions.tolist() for w in caption if w > 2]  # 0 to 2: specials
    count, generator = Counter(words), torch.Generator().manual_seed(seed)
    for _ in range(draws):
        chance = iter(torch.rand(len(words), generator=generator).tolist())
        for caption in captions.tolist():
            kept = []
            for w in (w for w in caption if w > 2):
                t = 1e-3 * len(words) / count[w]
                if next(chance) < math.sqrt(t) + t:  # word2vec.c
                    kept.append(w)
            yield kept


def test_skipgram_counts_have_dropped_words_and_random_windows():
    x = torch.tensor([[3, 4, 5, 6, 7, 2, 1, 1], [3, 0, 3, 4, 4, 3, 2, 1]])
    torch.manual_seed(1)  # the draws have a generator of their own, from seed 0
    pairs, frequency = cub.skipgram_counts(x.repeat(20, 1), 9)
    expected = torch.zeros(9, 9).double()
    for kept in skipgram_draws(x.repeat(20, 1)):
        for at, distance in itertools.product(range(len(kept)), (1, 2, 3)):
            if distance <= at:  # a window of 1, 2 or 3, each as often, reaches it
                one, other = kept[at], kept[at - distance]
                expected[one, other] += (4 - distance) / 3 / 10  # of 10 draws
                expected[other, one] += (4 - distance) / 3 / 10
    assert expected.sum() > 4 and torch.allclose(pairs, expected)
    assert frequency.tolist() == [0, 0, 0, 80, 60, 20, 20, 20, 0]
    pairs, _ = cub.skipgram_counts(x[:1], 8, sample=1e9)  # all are kept
    assert torch.allclose(pairs[3], torch.tensor([0, 0, 0, 0, 1, 2 / 3, 1 / 3, 0]).double())


@pytest.mark.parametrize("total, steps", [(8000.5, 3), (7998.5, 2), (90, 1)])
def test_word_vectors_are_gradient_ascent_on_the_skipgram_objective(total, steps, monkeypatch):
    """Σ_ij n_ij log σ(h_i·o_j) + m_ij log σ(-h_i·o_j),  m_ij = 5 (Σ_k n_ik) p_j, p ∝ frequency^¾"""
    tokens, words = sentences(60)
    v, rng, asked = len(words), np.random.default_rng(0), []
    often = np.concatenate([[0, 0, 0], np.logspace(0, 2, v - 3)])
    n = torch.from_numpy(np.outer(often, often) * rng.random((v, v)))
    n, frequency = total * (n + n.T) / (n + n.T).sum(), torch.from_numpy(rng.permutation(often) + 1)
    frequency[:3] = 0

    def counts(captions, n_words, window, draws, seed):
        asked.append((captions is tokens, n_words, window, draws, seed))
        return n, frequency

    monkeypatch.setattr(cub, "skipgram_counts", counts)
    torch.manual_seed(1)
    found = cub.word_vectors(tokens, words)
    assert asked == [(True, v, 3, 10, 0)] and found.dtype == np.float32 and not found[:3].any()
    m = 5 * n.sum(1, keepdim=True) * frequency**0.75 / (frequency**0.75).sum()
    units = cub.character_ngrams(words)[0].to_dense().double()
    share = units / units.sum(1, keepdim=True).clamp(min=1)
    generator = torch.Generator().manual_seed(0)
    e = (2 * torch.rand(units.shape[1], 300, generator=generator).double() - 1) / 300
    o = torch.zeros(v, 300).double()
    for step in range(10 * steps):  # 10 epochs, steps of up to 4,000 pairs
        h, o = (share @ e).requires_grad_(), o.detach().requires_grad_()
        objective = n * F.logsigmoid(h @ o.T) + m * F.logsigmoid(-h @ o.T)
        grad_h, grad_o = torch.autograd.grad(objective.sum(), (h, o))
        rate = 0.025 * (1 - step / (10 * steps)) / steps
        # as by 160 pairs at most; every unit of a word takes the whole step
        e += units.T @ (grad_h * (4 / (n + m).sum(1)[:, None]).clamp(max=rate))
        o = o + grad_o * (4 / (n + m).sum(0)[:, None]).clamp(max=rate)
    assert np.allclose(found, share @ e, atol=1e-4)


def sampled_vectors(tokens, words, dim, epochs, lr, negative=5):
    """Skip-gram with negative sampling as it is usually written: pair by pair, word by word."""
    rng, units = np.random.default_rng(0), cub.character_ngrams(words)[0].to_dense().numpy()
    of = [np.flatnonzero(row) for row in units]
    e = (2 * rng.random((units.shape[1], dim)) - 1) / dim
    o = np.zeros((len(words), dim))
    frequency = tokens.flatten().bincount(minlength=len(words)).double().numpy() ** 0.75
    frequency[:3] = 0
    bounds = np.cumsum(frequency / frequency.sum())
    texts = list(skipgram_draws(tokens, draws=epochs))
    for done, kept in enumerate(texts):
        for at, width in enumerate(rng.integers(1, 4, len(kept))):
            for other in kept[max(0, at - width) : at] + kept[at + 1 : at + width + 1]:
                h = e[of[kept[at]]].mean(0)
                drawn = np.append(other, np.searchsorted(bounds, rng.random(negative)))
                is_true = np.arange(negative + 1) == 0
                step = lr * (1 - done / len(texts)) * (is_true - 1 / (1 + np.exp(-o[drawn] @ h)))
                step_h = step @ o[drawn]
                np.add.at(o, drawn, step[:, None] * h)
                e[of[kept[at]]] += step_h
    return np.stack([e[row].mean(0) if len(row) else np.zeros(dim) for row in of])


def test_word_vectors_resemble_those_of_five_sampled_negatives():
    tokens, words = sentences(40)
    options = dict(dim=8, epochs=600, lr=0.2)  # small steps, in which samples are as expected
    found, sampled = (
        cub.word_vectors(tokens, words, **options),
        sampled_vectors(tokens, words, **options),
    )
    one, two = (x[3:] / np.linalg.norm(x[3:], axis=1, keepdims=True) for x in (found, sampled))
    # .07 between two samples; .25 with one negative in place of five, .75 with none
    assert np.abs(one @ one.T - two @ two.T).mean() < 0.15


def test_word_vectors_are_cached_until_the_captions_change(tmp_path, monkeypatch):
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


def test_a_sentence_vector_averages_the_words_before_the_end():
    words = ["<exc>", "<pad>", "<eos>", "red", "blue"]
    vectors = np.array([[9.0], [9], [9], [1], [3]])
    tokens = np.array([[3, 4, 2, 4], [0, 3, 3, 2], [2, 3, 3, 3], [4, 1, 3, 4], [4, 2, 1, 1]])
    x = cub.sentence_vectors(tokens, words, vectors)
    assert np.allclose(x[:, 0], [2, 1, 0, 7 / 3, 3])


class Turned(nn.Module):
    """Its posterior samples z from the input and decodes z; its mean is another z."""

    def __init__(self, n_words):
        super().__init__()
        self.nothing = nn.Parameter(torch.zeros(1))
        self.n_words, self.drawn, self.seen = n_words, [], []

    def posterior(self, image, caption):
        self.seen.append(len(caption if image is None else image))
        z = caption[:, :1] + 20.0 if image is None else image[:, :1]
        return types.SimpleNamespace(sample=lambda shape=(): z.expand(*shape, *z.shape), mean=-z)

    def prior(self):
        def sample(shape):
            self.drawn.append(shape[0])
            return torch.arange(shape[0])[:, None] + 100.0 * len(self.drawn)

        return types.SimpleNamespace(sample=sample)

    def decode(self, z):
        says = (z.long() + torch.arange(4)) % self.n_words  # the first of four words is z's
        return [z.repeat(1, 5), nn.functional.one_hot(says, self.n_words).float()]


def test_each_modality_is_generated_from_a_sample_given_the_other():
    index = torch.arange(600)
    bases = [torch.arange(60.0)[:, None], torch.stack([(7 * index) % 11 + 3] * 4, 1)]
    split = data.Split(bases, [index // 10, index])
    model = Turned(n_words=70)
    features, captions = cub.cross_generate(model, split)
    assert torch.equal(torch.from_numpy(features), bases[1][:, :1].repeat(1, 5) + 20.0)
    assert captions[:, 0].tolist() == (index // 10).tolist()
    assert captions[0].tolist() == [0, 1, 2, 3]
    assert model.seen == [256, 256, 256, 256, 88, 88]
    features, captions = cub.joint_generate(model, model.prior().sample((600,)))
    assert features.shape == (600, 5) and captions.shape == (600, 4)
    assert (features[:, 0] % 70 == captions[:, 0]).all()
    assert len(cub.joint_generate(model, model.prior().sample((7,)), 5)[0]) == 7


def test_correlations_are_fit_on_training_and_measured_on_generated_pairs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [*cub.SPECIALS, *"abcdefg"]
    rng, splits = np.random.default_rng(0), []
    for n in (4, 2):
        bases = [torch.from_numpy(rng.random((n, 3), "f4")), torch.randint(3, 10, (10 * n, 4))]
        splits.append(data.Split(bases, [torch.arange(10 * n) // 10, torch.arange(10 * n)]))
    dataset = data.Dataset("cub", *splits, {}, ("image", "caption"), words=words)
    (tmp_path / "data" / "cub").mkdir(parents=True)
    torch.manual_seed(0)
    (train_x, fit_y), found = cub.correlated(Turned(10), dataset, samples=7)
    assert (tmp_path / "data" / "cub" / "words.npz").exists()
    vectors = cub.cached_word_vectors("data", dataset.train.bases[1], words)

    def embed(tokens):
        return cub.sentence_vectors(tokens, words, vectors)

    (x, y), (test_x, test_y) = (split[torch.arange(len(split))] for split in splits)
    assert np.array_equal(train_x, x) and np.array_equal(fit_y, embed(y))
    features, captions = cub.cross_generate(Turned(10), dataset.test)
    joint_x, joint_y = cub.joint_generate(Turned(10), Turned(10).prior().sample((7,)))
    torch.manual_seed(0)
    aggregate = npz.aggregate_samples(Turned(10), dataset.train, 7)
    aggregate_x, aggregate_y = cub.joint_generate(Turned(10), aggregate)
    expected = {
        "image->caption": (test_x, embed(captions)),
        "caption->image": (features, embed(test_y)),
        "joint": (joint_x, embed(joint_y)),
        "aggregate": (aggregate_x, embed(aggregate_y)),
        "truth": (test_x, embed(test_y)),
    }
    assert list(found) == list(expected)
    for name, (a, b) in expected.items():
        assert np.array_equal(found[name][0], a) and np.array_equal(found[name][1], b)


def test_the_nearest_photo_is_the_euclidean_one():
    features, photos = torch.randn(1100, 3), torch.randn(40, 3) * torch.tensor([1, 2, 9])
    distances = ((features[:, None] - photos) ** 2).sum(-1)
    found = cub.nearest_photos(features.numpy(), photos.numpy())
    assert (found == distances.argmin(1).numpy()).all()


class Faithful(nn.Module):
    """z is the row of the test split nearest to the input; reads=False: captions are ignored."""

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
