"""cub: word vectors, sentence vectors, the pairs that are correlated, the sheet of examples."""

import itertools
import math
import types
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import data
from eval import CCA, aggregate_samples, cca
from evaluation import cub, figures
from helpers import shi
from loaders import cub as files

WORDS = [*files.SPECIALS, *"abcdefg"]


def test_a_caption_is_its_words_up_to_the_end():
    words = [*files.SPECIALS, "bird", "owl"]
    assert cub.caption_text([0, 3, files.EOS, 4], words) == "<exc> bird"
    assert cub.caption_text(torch.tensor([4, 3]), words) == "owl bird"  # without an end


# ------------------------------------------------------------------------------------ word vectors


def test_units_are_words_and_ngrams_of_3_to_6_letters():
    grams = {
        "wing": "<wing> <wi <win <wing ing ing> ng> win wing wing>",
        "wings": "<wings> <wi <win <wing <wings gs> ing ings ings> ngs ngs> win wing wings wings>",
        "a": "<a>",
        "feathers": "<feathers> <fe <fea <feat <feath ath athe ather athers eat eath eathe eather "
        "ers ers> fea feat feath feathe hers hers> her rs> the ther thers thers>",
    }
    units, transposed = cub.character_ngrams([*files.SPECIALS, *grams])
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
            sentence = []
            for w in (w for w in caption if w > 2):
                t = 1e-3 * len(words) / count[w]
                if next(chance) < math.sqrt(t) + t:  # word2vec.c
                    sentence.append(w)
            yield sentence


def test_skipgram_counts_have_dropped_words_and_random_windows():
    x = torch.tensor([[3, 4, 5, 6, 7, 2, 1, 1], [3, 0, 3, 4, 4, 3, 2, 1]])
    torch.manual_seed(1)  # the draws have a generator of their own, from seed 0
    pairs, frequency = cub.skipgram_counts(x.repeat(20, 1), 9)
    expected = torch.zeros(9, 9).double()
    for sentence in skipgram_draws(x.repeat(20, 1)):
        for at, distance in itertools.product(range(len(sentence)), (1, 2, 3)):
            if distance <= at:  # a window of 1, 2 or 3, each as often, reaches it
                one, other = sentence[at], sentence[at - distance]
                expected[one, other] += (4 - distance) / 3 / 10  # of 10 draws
                expected[other, one] += (4 - distance) / 3 / 10
    assert expected.sum() > 4 and torch.allclose(pairs, expected)
    assert frequency.tolist() == [0, 0, 0, 80, 60, 20, 20, 20, 0]
    pairs, _ = cub.skipgram_counts(x[:1], 8, sample=1e9)  # no word is dropped
    assert torch.allclose(pairs[3], torch.tensor([0, 0, 0, 0, 1, 2 / 3, 1 / 3, 0]).double())


@pytest.mark.parametrize("total, steps", [(8000.5, 3), (90, 1)])
def test_word_vectors_ascend_the_skipgram_objective(total, steps, monkeypatch):
    """Two epochs of Σ_ij n_ij log σ(h_i·o_j) + m_ij log σ(-h_i·o_j), m_ij = 5 (Σ_k n_ik) p_j with
    p ∝ frequency^¾, by autograd: it is the objective, not its gradient, that is written here."""
    words, rng = [*files.SPECIALS, "a", "bird", "red", "wing", "wings"], np.random.default_rng(0)
    often = np.concatenate([[0, 0, 0], np.logspace(0, 2, 5)])
    n = torch.from_numpy(np.outer(often, often) * rng.random((8, 8)))
    n, frequency = total * (n + n.T) / (n + n.T).sum(), torch.from_numpy(often)
    monkeypatch.setattr(cub, "skipgram_counts", lambda *args, **options: (n, frequency))
    found = cub.word_vectors(None, words, dim=20, epochs=2)
    m = 5 * n.sum(1, keepdim=True) * frequency**0.75 / (frequency**0.75).sum()
    units = cub.character_ngrams(words)[0].to_dense().double()
    share = units / units.sum(1, keepdim=True).clamp(min=1)
    generator = torch.Generator().manual_seed(0)
    e = (2 * torch.rand(units.shape[1], 20, generator=generator).double() - 1) / 20
    o = torch.zeros(8, 20).double()
    for step in range(2 * steps):  # steps of up to 4,000 pairs
        h, o = (share @ e).requires_grad_(), o.detach().requires_grad_()
        objective = n * F.logsigmoid(h @ o.T) + m * F.logsigmoid(-h @ o.T)
        grad_h, grad_o = torch.autograd.grad(objective.sum(), (h, o))
        rate = 0.025 * (1 - step / (2 * steps)) / steps
        # as by 160 pairs at most; every unit of a word takes the whole step
        e += units.T @ (grad_h * (4 / (n + m).sum(1)[:, None]).clamp(max=rate))
        o = o + grad_o * (4 / (n + m).sum(0)[:, None]).clamp(max=rate)
    assert found.dtype == np.float32 and not found[:3].any()
    assert np.allclose(found, share @ e, atol=1e-6)


def test_word_vectors_are_cached_until_the_captions_change(tmp_path, monkeypatch):
    tokens, calls = torch.randint(3, 10, (50, 4)), []

    def trained(captions, words, device):
        calls.append(len(captions))
        return np.full((len(words), 300), len(captions), np.float32)

    monkeypatch.setattr(cub, "word_vectors", trained)
    (tmp_path / "cub").mkdir()
    for captions in (tokens, tokens, tokens[:40]):
        vectors = cub.cached_word_vectors(tmp_path, captions, WORDS)
        assert vectors.shape == (10, 300) and (vectors == len(captions)).all()
    (tmp_path / "cub" / "words.npz").write_bytes(b"PK")
    assert (cub.cached_word_vectors(tmp_path, tokens[:40], WORDS) == 40).all()
    assert calls == [50, 40, 40]


def test_a_sentence_vector_averages_the_words_before_the_end():
    words = ["<exc>", "<pad>", "<eos>", "red", "blue"]
    vectors = np.array([[9.0], [9], [9], [1], [3]])
    tokens = np.array([[3, 4, 2, 4], [0, 3, 3, 2], [2, 3, 3, 3], [4, 1, 3, 4], [4, 2, 1, 1]])
    x = cub.sentence_vectors(tokens, words, vectors)
    assert np.allclose(x[:, 0], [2, 1, 0, 7 / 3, 3])


# ------------------------------------------------------------------------------------ correlations


class Turned(nn.Module):
    """Its posterior samples z from the input and decodes z; its mean is another z."""

    def __init__(self, n_words):
        super().__init__()
        self.nothing = nn.Parameter(torch.zeros(1))
        self.n_words, self.priors, self.sizes = n_words, [], []

    def posterior(self, image, caption):
        self.sizes.append(len(caption if image is None else image))
        z = caption[:, :1] + 20.0 if image is None else image[:, :1]
        return types.SimpleNamespace(sample=lambda shape=(): z.expand(*shape, *z.shape), mean=-z)

    def sample_posterior(self, xs, n=1):
        return self.posterior(*xs).sample((n,))

    def prior(self):
        def sample(shape):
            self.priors.append(shape[0])
            return torch.arange(shape[0])[:, None] + 100.0 * len(self.priors)

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
    assert model.sizes == [256, 256, 256, 256, 88, 88]
    features, captions = cub.joint_generate(model, model.prior().sample((600,)))
    assert features.shape == (600, 5) and captions.shape == (600, 4)
    assert (features[:, 0] % 70 == captions[:, 0]).all()
    assert len(cub.joint_generate(model, model.prior().sample((7,)), 5)[0]) == 7


@pytest.fixture
def pairs(tmp_path):
    """Photos and captions of two splits of other statistics, and the vectors of their words."""
    rng, splits = np.random.default_rng(0), []
    for n, shift in ((40, 0), (20, 2)):
        image = rng.random((n, 5), "f4") + shift
        caption = torch.from_numpy(rng.integers(3 + shift, 10, (10 * n, 4)))
        rows = [torch.arange(10 * n) // 10, torch.arange(10 * n)]
        splits.append(data.Split([torch.from_numpy(image), caption], rows))
    vectors = rng.normal(size=(10, 6)).astype("f4")
    vectors[:3] = 0
    return data.Dataset("cub", *splits, {}, ("image", "caption"), words=WORDS), vectors


def test_correlations_are_fit_on_training_and_measured_on_generated_pairs(pairs, monkeypatch):
    dataset, vectors = pairs
    trained = []

    def word_vectors(root, captions, words, device):
        trained.append((root, captions, words))
        return vectors

    monkeypatch.setattr(cub, "cached_word_vectors", word_vectors)
    model = Turned(10).train()
    found = cub.evaluate(model, dataset, "there", seed=3)
    assert not model.training
    assert trained == [("there", dataset.train.bases[1], WORDS)]

    def embed(tokens):
        rows = []
        for caption in np.asarray(tokens):
            words = itertools.takewhile(lambda token: token != files.EOS, caption)
            rows.append(np.mean([vectors[w] for w in words if w > 2] or [np.zeros(6)], axis=0))
        return np.stack(rows)

    (train_x, train_y), (test_x, test_y) = (
        s[torch.arange(len(s))] for s in (dataset.train, dataset.test)
    )
    features, captions = cub.cross_generate(Turned(10), dataset.test)
    joint_x, joint_y = cub.joint_generate(Turned(10), Turned(10).prior().sample((1000,)))
    torch.manual_seed(3)
    z = aggregate_samples(Turned(10), dataset.train, 1000)
    aggregate_x, aggregate_y = cub.joint_generate(Turned(10), z)
    compared = {
        "image->caption": (test_x, captions),
        "caption->image": (features, test_y),
        "joint": (joint_x, joint_y),
        "aggregate": (aggregate_x, aggregate_y),
        "truth": (test_x, test_y),
    }
    fit = CCA(*cca(train_x.numpy(), embed(train_y), k=40))
    assert list(found["correlation"]) == list(found["chance_correlation"]) == list(compared)
    for name, (x, y) in compared.items():
        x = (np.asarray(x, float) - fit.mean_x) @ fit.wx
        y = (embed(y).astype(float) - fit.mean_y) @ fit.wy
        cosine = x @ y.T / np.outer(np.linalg.norm(x, axis=1), np.linalg.norm(y, axis=1))
        assert found["correlation"][name] == pytest.approx(np.diag(cosine).mean(), abs=1e-4)
        assert found["chance_correlation"][name] == pytest.approx(cosine.mean(), abs=1e-4)


# ---------------------------------------------------------------------------------------- the figure


def test_the_nearest_photo_is_the_euclidean_one():
    features, photos = torch.randn(1100, 3), torch.randn(40, 3) * torch.tensor([1, 2, 9])
    distances = ((features[:, None] - photos) ** 2).sum(-1)
    found = cub.nearest_photos(features.numpy(), photos.numpy())
    assert (found == distances.argmin(1).numpy()).all()


class Faithful(nn.Module):
    """z is the row of the training split whose photo or caption is nearest to the input."""

    def __init__(self, dataset):
        super().__init__()
        self.nothing = nn.Parameter(torch.zeros(1))
        self.image, self.caption = dataset.train[torch.arange(len(dataset.train))]
        self.n_words, self.modalities = len(dataset.words), []

    def posterior(self, image, caption):
        if image is not None:
            z = torch.cdist(image, self.image).argmin(1)
        else:
            z = (caption[:, None] == self.caption).float().mean(2).argmax(1)
        return types.SimpleNamespace(sample=lambda: z[:, None].float())

    def decode(self, z):
        at = z[..., 0].long()
        return [self.image[at], nn.functional.one_hot(self.caption[at], self.n_words).float()]


def test_the_sheet_shows_inputs_and_nearest_training_photos(tmp_path, small_net, monkeypatch):
    folder = shi(tmp_path)
    lines = [f"{word} owl {word}" for word in "abcd" for _ in range(10)]
    (folder / "text_trainvalclasses.txt").write_text("\n".join(lines))
    (folder / "text_testclasses.txt").write_text("\n".join(lines[10:30]))  # b and c
    files.write_features(tmp_path)
    dataset, sheets = data.load("cub", tmp_path), []
    monkeypatch.setattr(
        cub, "sheet", lambda columns, heading, path: sheets.append((columns, heading))
    )
    args = {"model": "MEME", "dataset": "cub", "paired": 1, "unpaired": "split", "masked": False}
    run = types.SimpleNamespace(args=args, model=Faithful(dataset))
    cub.draw(run, dataset, tmp_path, None, n=2)
    ((columns, heading),) = sheets
    assert heading == "MEME · cub · f = 1"
    heads, contents = zip(*columns)
    assert (
        heads[1]
        == heads[4].replace("caption", "image", 1)
        == "image → image:\nnearest training photo"
    )
    photos, nearest, told, captions, drawn, repeated = contents
    train, test = (cub.cub_photos(tmp_path)[part] for part in ("train", "test"))
    assert photos == test and captions == ["b owl b", "c owl c"] == repeated
    assert drawn == train[1:3]  # the photos whose captions these are
    x = torch.cdist(dataset.test.bases[0], dataset.train.bases[0]).argmin(1).tolist()
    assert nearest == [train[k] for k in x] and told == [f"{'abcd'[k]} owl {'abcd'[k]}" for k in x]


def test_a_sheet_has_photos_and_wrapped_texts(tmp_path, monkeypatch):
    axes = []
    monkeypatch.setattr(figures, "finish", lambda figure, *_, **__: axes.extend(figure.axes))
    shi(tmp_path)
    photo = tmp_path / "cub" / "train" / "001.Albatross" / "0.jpg"
    cub.sheet(
        [("photo", [photo, Path("gone.jpg")]), ("text", ["a bird " * 9, "owl"])], "heading", None
    )
    assert axes[0].images[0].get_array().shape == (80, 100, 3) and axes[0].get_title() == "photo"
    assert axes[2].texts[0].get_text() == "gone.jpg\nnot found"
    assert max(map(len, axes[1].texts[0].get_text().splitlines())) <= 24
    figures.pyplot().close("all")
