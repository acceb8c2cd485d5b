"""Metrics against their definitions, figures of a run and the command of eval.py."""

import functools
import json
import math
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

import data
import eval as evaluation
import meme
import nets
from benchmarks import drawing, figures, npz, tables
from helpers import READERS, ROOT, SCRIPTS, SHAPES, Perfect, Reader, toy

NUMPY_ALONE = """
import sys
for name in ("torch", "torchvision", "matplotlib", "scipy", "sklearn", "PIL"):
    sys.modules[name] = None
from eval import cca, linear_probe, w2
import numpy as np
x = np.arange(6.0).reshape(3, 2)
assert w2(x, x, x + 3, x).shape == (3,) and "data" not in sys.modules
"""


def test_the_numpy_functions_can_be_imported_without_torch():
    subprocess.run([sys.executable, "-c", NUMPY_ALONE], cwd=ROOT, check=True)


def planted(n, correlations, extra=3, seed=0):
    """x, y whose canonical correlations are known: mixed by random matrices, with noise
    dimensions."""
    rng, k = np.random.default_rng(seed), len(correlations)
    r = np.array(correlations)
    x, y = rng.standard_normal((n, k + extra)), rng.standard_normal((n, k + extra + 2))
    y[:, :k] = r * x[:, :k] + np.sqrt(1 - r**2) * y[:, :k]
    mix_x, mix_y = rng.standard_normal((k + extra,) * 2), rng.standard_normal((k + extra + 2,) * 2)
    return x @ mix_x + 5, y @ mix_y - 3


def test_cca_finds_planted_correlations_in_any_coordinates():
    x, y = planted(20_000, (0.9, 0.6, 0.3))
    fit = evaluation.cca(x, y, k=3, ridge=0)
    assert np.allclose(fit.correlations, (0.9, 0.6, 0.3), atol=0.02)
    px, py = (x - fit.mean_x) @ fit.wx, (y - fit.mean_y) @ fit.wy
    assert np.allclose(np.cov(px.T), np.eye(3), atol=1e-8)
    assert np.allclose(np.cov(px.T, py.T)[:3, 3:], np.diag(fit.correlations), atol=1e-8)
    twice = np.hstack([10 * x, x[:, ::-1]])  # half of its directions have no variance
    other = evaluation.cca(twice, y, k=3, ridge=0)
    assert np.allclose(other.correlations, fit.correlations, atol=1e-6)
    for units in 1e-7, 1e7:
        other = evaluation.cca(units * twice, y / units, k=3, ridge=0)
        assert np.allclose(other.correlations, fit.correlations, atol=1e-6)


def test_cca_has_40_pairs_and_a_ridge_by_default():
    rng = np.random.default_rng(0)
    mix_x, mix_y = rng.standard_normal((8, 42)), rng.standard_normal((8, 45))
    shared, scale = rng.standard_normal((60, 8)), np.logspace(-1, 1, 45)
    x = shared @ mix_x + scale[:42] * rng.standard_normal((60, 42)) + 5
    y = shared @ mix_y + scale * rng.standard_normal((60, 45)) - 3
    fit = evaluation.cca(x, y)
    cov = np.cov(x.T, y.T)
    ridge = [1e-3 * np.diag(c).mean() * np.eye(len(c)) for c in (cov[:42, :42], cov[42:, 42:])]
    cxx, cyy, cxy = cov[:42, :42] + ridge[0], cov[42:, 42:] + ridge[1], cov[:42, 42:]
    # S²: the 40 largest eigenvalues of Cxx^-1 Cxy Cyy^-1 Cyx
    squared = np.linalg.eigvals(np.linalg.solve(cxx, cxy) @ np.linalg.solve(cyy, cxy.T)).real
    assert np.allclose(fit.correlations**2, np.sort(squared)[::-1][:40])
    # wx' Cxx wx = wy' Cyy wy = I,  wx' Cxy wy = S
    for w, c in (fit.wx, cxx), (fit.wy, cyy):
        assert np.allclose(w.T @ c @ w, np.eye(40), atol=1e-8)
    assert np.allclose(fit.wx.T @ cxy @ fit.wy, np.diag(fit.correlations), atol=1e-8)
    assert np.allclose(fit.mean_x, x.mean(0)) and np.allclose(fit.mean_y, y.mean(0))


def test_correlations_are_means_of_eq_12_in_one_fit():
    x, y = planted(300, (0.9, 0.6), extra=43)
    fit, others = evaluation.cca(x, y), {"here": (x, y), "shifted": (x + 1, y[::-1] - 2)}
    found = evaluation.correlations((x, y), others)
    assert list(found) == ["correlation", "chance_correlation"]
    assert all(list(numbers) == ["here", "shifted"] for numbers in found.values())
    for name, (a, b) in others.items():
        a, b = (a - x.mean(0)) @ fit.wx, (b - y.mean(0)) @ fit.wy  # 40 pairs of 45
        cosine = a @ b.T / np.outer(np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=1))
        assert found["correlation"][name] == pytest.approx(cosine.diagonal().mean())
        assert found["chance_correlation"][name] == pytest.approx(cosine.mean())
    nothing = evaluation.correlation(fit, x.mean(0)[None], y[:1])  # no direction: no correlation
    assert nothing == pytest.approx(0)


def test_cca_without_whitening_solves_the_published_eigenproblem():
    scipy_linalg = pytest.importorskip("scipy.linalg")
    x, y = planted(3000, (0.9, 0.7, 0.5, 0.2))
    k, p = 4, x.shape[1]
    cov = np.cov(x.T, y.T)
    a, b = cov.copy(), cov.copy()
    a[:p, :p] = a[p:, p:] = 0
    b[:p, p:] = b[p:, :p] = 0
    eps = 1e-12 * np.eye(len(cov))
    values, vectors = scipy_linalg.eig(a + eps, b + eps)
    order = np.argsort(-values.real)[:k]
    vectors = vectors[:, order].real / np.linalg.norm(vectors[:, order].real, axis=0)
    fit = evaluation.cca(x, y, k=k, ridge=0, whiten=False)
    found = np.vstack([fit.wx, fit.wy])
    assert np.allclose(np.linalg.norm(found, axis=0), 1)
    assert np.allclose(np.abs((found * vectors).sum(0)), 1, atol=1e-6)
    assert np.allclose(fit.correlations, values.real[order], atol=1e-6)


def test_correlation_is_a_cosine_centred_by_the_fit():
    x, y = planted(500, (0.9, 0.6))
    fit = evaluation.cca(x, y, k=2)
    a, b = fit.wx.T @ (x[7] + 1 - x.mean(0)), fit.wy.T @ (y[7] + 2 - y.mean(0))
    expected = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
    assert np.isclose(evaluation.correlation(fit, x[5:9] + 1, y[5:9] + 2)[2], expected)
    shuffled = evaluation.correlation(fit, x, y[np.random.default_rng(0).permutation(500)])
    assert evaluation.correlation(fit, x, y).mean() > 0.6 and abs(shuffled.mean()) < 0.1
    assert np.isfinite(evaluation.correlation(fit, np.tile(fit.mean_x, (2, 1)), y[:2])).all()


def test_w2_agrees_with_matrix_square_roots_and_broadcasts():
    sqrtm = pytest.importorskip("scipy.linalg").sqrtm
    rng = np.random.default_rng(0)
    (m1, m2), roots = rng.standard_normal((2, 4)), rng.standard_normal((2, 4, 4))
    s1, s2 = roots @ roots.mT
    root = sqrtm(s1)
    squared = ((m1 - m2) ** 2).sum() + np.trace(s1 + s2 - 2 * sqrtm(root @ s2 @ root)).real
    assert np.isclose(evaluation.w2(m1, s1, m2, s2), math.sqrt(squared))
    std1, std2 = rng.random((2, 4))
    full = evaluation.w2(m1, np.diag(std1**2), m2, np.diag(std2**2))
    assert np.isclose(evaluation.w2(m1, std1, m2, std2), full)
    assert evaluation.w2(m1, std1, m1, std1) == 0
    assert np.isclose(evaluation.w2(m1, std1, m1 + 3, std1), 6)  # m1 - m2: a shift by 3 in 4-d
    line = np.outer(m1, m1)  # of rank 1: rounding may leave eigenvalues below 0
    assert evaluation.w2(m2, line, m2, line) == pytest.approx(0, abs=1e-6)
    means, covariances = np.stack([m1, m2]), np.stack([s1, s2])
    d = evaluation.w2(means[:, None], covariances[:, None], means, covariances)
    assert d.shape == (2, 2) and np.allclose(d, d.T) and np.allclose(np.diag(d), 0, atol=1e-5)
    assert np.isclose(d[0, 1], evaluation.w2(m1, s1, m2, s2))


def blobs(n, seed=0, classes=4, dims=5):
    rng = np.random.default_rng(seed)
    y = rng.integers(classes, size=n)
    return rng.standard_normal((n, dims)) + np.eye(classes, dims)[y] * 1.5, y


def test_logistic_regression_is_converged_and_agrees_with_lbfgs():
    z, y = blobs(1000)
    w = evaluation.logistic_regression(z, y, 4, l2=1e-3)
    zt, yt = torch.from_numpy(z), torch.from_numpy(y)
    a, b = (torch.from_numpy(part.copy()).requires_grad_() for part in (w[:-1], w[-1]))

    options = dict(max_iter=500, tolerance_grad=1e-9, line_search_fn="strong_wolfe")
    solver = torch.optim.LBFGS([a, b], **options)

    def loss():
        solver.zero_grad()
        value = nn.functional.cross_entropy(zt @ a + b, yt) + 0.5e-3 * (a**2).sum()
        value.backward()
        return value

    ours = loss()
    assert max(a.grad.abs().max(), b.grad.abs().max()) < 1e-6
    a.data.zero_(), b.data.zero_()
    solver.step(loss)
    assert torch.isclose(ours, loss(), atol=1e-10)
    assert np.allclose(w[:-1], a.detach(), atol=1e-3)


def gradient(z, y, w, l2):
    """1/N Σ_n z_n (softmax(W'z_n) - 1[y_n])' + l2 W, the biases without their l2."""
    p = torch.from_numpy(z @ w[:-1] + w[-1]).softmax(1).numpy() - np.eye(4)[y]
    return np.vstack([z.T @ p / len(z) + l2 * w[:-1], p.mean(0)])


def test_the_gradient_of_the_default_logistic_regression_vanishes():
    z, y = blobs(300)
    w = evaluation.logistic_regression(z, y, 4)
    assert np.abs(gradient(z, y, w, 1e-4)).max() < 1e-6
    assert not evaluation.logistic_regression(z, y, 4, tolerance=9).any()  # no step, W = 0


@pytest.mark.parametrize("l2, width", [(1e-4, 0.1), (1e-8, 0.1), (1e-8, 0.9)])
def test_logistic_regression_converges_on_separable_classes(l2, width):
    z = np.repeat(np.arange(4.0), 50)[:, None] + np.tile([0, width], 100)[:, None]
    z[-1] += 3  # so that logits reach a thousand
    y = np.repeat(np.arange(4), 50)
    w = evaluation.logistic_regression(z, y, 4, l2=l2)
    assert ((z @ w[:-1] + w[-1]).argmax(1) == y).all()
    assert np.abs(gradient(z, y, w, l2)).max() < 1e-5


def test_the_probe_standardises_by_the_training_samples(monkeypatch):
    given, w = [], np.array([[1.0, 0], [0, 1], [0, 0], [0.3, 0]])
    monkeypatch.setattr(evaluation, "logistic_regression", lambda *xs: given.append(xs) or w)
    rng = np.random.default_rng(0)
    z = rng.standard_normal((50, 3)) * [3, 4, 0] + 5
    # by the mean and the scale of training all are of class 7, by their own of class 3
    test_z = rng.standard_normal((40, 3)) * [0.05, 0.5, 1] + [8, 13, 5]
    y = np.where(rng.random(50) < 0.5, 3, 7)  # any labels
    found = evaluation.linear_probe(z.tolist(), y, test_z.tolist(), [3] * 10 + [7] * 30)
    evaluation.linear_probe(z, y, test_z, test_z[:, 0], l2=0.5)
    (scaled, index, classes, l2), second = given
    assert second[3] == 0.5
    std = z.std(0) + [0, 0, 1]  # the third does not vary
    assert np.allclose(scaled, (z - z.mean(0)) / std) and classes == 2 and l2 == 1e-4
    assert (np.array([3, 7])[index] == y).all()
    a, b = ((test_z - z.mean(0)) / std)[:, :2].T
    assert (a + 0.3 < b).all() and found == 0.75


# ------------------------------------------------- metrics of models whose samples are known


def pattern(xs):
    return tuple(x is not None for x in xs)


class Sampled(Perfect):
    """A sample of its posterior is the digit shown, the mean is not. asked: the masks and sizes."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.asked = []

    def posterior(self, *xs):
        self.asked.append((pattern(xs), len(next(x for x in xs if x is not None))))
        z = super().posterior(*xs).mean
        return SimpleNamespace(
            sample=lambda shape=(): z.expand(*shape, *z.shape),
            mean=0 * z - 1,
            stddev=torch.ones_like(z),
        )


def flipped(m, digit):
    """The first modality shows the digit, the others 9 - digit."""
    return digit if m == 0 else 9 - digit


def test_subsets_and_views_of_a_data_set():
    assert evaluation.subsets(("a", "b")) == {
        "a": (True, False),
        "b": (False, True),
        "both": (True, True),
    }
    three = evaluation.subsets(("a", "b", "c"))
    assert list(three) == ["a", "b", "c", "a+b", "a+c", "b+c", "all"]
    assert three["a+c"] == (True, False, True) and three["all"] == (True,) * 3
    assert evaluation.singles("abc") == {k: three[k] for k in "abc"}
    xs = torch.zeros(2, 1, 14, 28), torch.ones(2, 1, 14, 28)
    (name, whole), *more = evaluation.views(toy("mnist-split")).items()
    assert name == "image" and not more and torch.equal(whole(xs), torch.cat(xs, 2))
    assert [view(xs) is x for view, x in zip(evaluation.views(toy()).values(), xs)] == [True, True]
    assert list(evaluation.views(toy())) == ["mnist", "svhn"]
    own = evaluation.views(toy()._replace(name="own.npz", names=("p", "q")))
    assert list(own) == ["p", "q"] and own["q"](xs) is xs[1]
    assert [evaluation.in_parts(toy(name)) for name in ("mnist-svhn", *nets.BANDS)] == [0, 1, 1]


def test_coherence_judges_samples_of_every_test_example():
    dataset = toy(n=1300)  # 650 to test: two parts, of unequal size
    labels = dataset.test.labels
    labels[:500] = 9 - labels[:500]  # now the wrong ones
    right, wrong = 150 / 650, 500 / 650
    model = Sampled(SHAPES, flipped)
    found, disagreement = evaluation.coherence(
        model, dataset, {"mnist": Reader(3), "svhn": Reader(4)}
    )
    shown = {"mnist": (True, False), "svhn": (False, True)}
    assert model.asked == [(shown[m], n) for m in ("mnist", "svhn") for n in (500, 150)]
    assert found == {
        "cross_coherence": {"mnist->svhn": wrong, "svhn->mnist": right},
        "self_coherence": {"mnist": right, "svhn": wrong},
    }
    digits = torch.cat([9 - labels[:500], labels[500:]])  # that the images show
    doubt = {"mnist": digits == 3, "svhn": 9 - digits == 4}
    doubt = {view: x.double().mean().item() for view, x in doubt.items()}
    assert disagreement == {
        "cross_coherence": {"mnist->svhn": doubt["svhn"], "svhn->mnist": doubt["mnist"]},
        "self_coherence": doubt,
    }


@pytest.mark.parametrize("name", nets.BANDS)
def test_a_split_image_is_judged_whole_from_every_subset(name):
    dataset, three = toy(name, n=80), "top middle bottom top+middle top+bottom middle+bottom all"
    sevens = (dataset.test.labels == 7).double().mean().item()
    dataset.test.labels[:10] += 1
    model = Sampled([x.shape[1:] for x in dataset.test.bases])
    found, disagreement = evaluation.split_accuracy(model, dataset, {"image": Reader(7)})
    conditions = "top bottom both" if name == "mnist-split" else three
    assert found == {"accuracy": dict.fromkeys(conditions.split(), 0.75)}  # of 40 examples
    assert disagreement == {"accuracy": pytest.approx(dict.fromkeys(conditions.split(), sevens))}
    assert model.asked == [(shown, 40) for shown in evaluation.subsets(dataset.names).values()]


def test_joint_coherence_is_of_samples_of_the_prior():
    def says(m, digit):
        return digit if m == 0 else digit.clamp(max=2)

    class Cycles(Perfect):
        """Its prior is 0 0 0 1 2 3 4 4, over and over."""

        done = 0

        def prior(self):
            def sample(shape):
                at = torch.arange(self.done, self.done + shape[0]) % 8
                self.done += shape[0]
                digits = torch.tensor([0.0, 0, 0, 1, 2, 3, 4, 4])[at]
                return torch.stack([digits, 0 * digits], 1)

            return SimpleNamespace(sample=sample)

    shapes = [(1, 4, 4), (3, 2, 6)]
    model, oracles = Cycles(shapes, says), {"mnist": Reader(4), "svhn": Reader(2)}
    dataset = toy()
    metrics, disagreement = evaluation.joint_coherence(model, dataset, oracles)
    assert model.done == 10_000
    assert metrics["joint_coherence"] == 5 / 8  # both show 0, 0, 0, 1 or 2
    training = dataset.train.labels[npz.spread(len(dataset.train), 128)]
    agree = (training <= 2).double().mean().item()
    assert metrics["aggregate_coherence"] == pytest.approx(agree, abs=0.01)
    entropy = -(0.6 * math.log(0.6) + 2 * 0.2 * math.log(0.2))  # of 3/5, 1/5, 1/5
    assert metrics["joint_entropy"] == pytest.approx(entropy)
    assert disagreement["joint_coherence"] == 4 / 8  # svhn shows 2 four times, mnist 4 two of them
    seen = (training >= 2).double().mean().item()
    assert disagreement["aggregate_coherence"] == pytest.approx(seen, abs=0.01)
    for agree, share in (-1, 0), (3, 1 / 8):  # on nothing; on one of eight samples
        model = Cycles(shapes, lambda m, digit: digit + m * (digit != agree))
        metrics, _ = evaluation.joint_coherence(model, toy(), oracles, samples=8)
        assert metrics["joint_coherence"] == share and metrics["joint_entropy"] == 0
        assert model.done == 8


def test_mutual_information_is_the_mean_over_the_first_images():
    class Doubled(Reader):
        def information(self, x):
            return 2 * super().information(x)

    dataset, model = toy(n=2004), Sampled([(1, 4, 4), (3, 2, 6)], flipped)
    oracles = {"mnist": Reader(), "svhn": Doubled()}
    found = evaluation.mutual_information(model, dataset, oracles)["mutual_information"]
    grey = dataset.test.labels[:1000].double().mean().item() * 25 / 255  # Reader.information
    other = 9 * 25 / 255 - grey
    expected = {"mnist": grey, "mnist->svhn": 2 * other, "svhn->mnist": grey, "svhn": 2 * other}
    assert found == pytest.approx(expected, rel=1e-4)
    assert model.asked == [((True, False), 1000), ((False, True), 1000)]


def test_latent_accuracy_is_of_samples_and_not_of_means():
    accuracy = evaluation.latent_accuracy(Sampled(SHAPES), toy())["latent_accuracy"]
    assert accuracy == {"mnist": 1, "svhn": 1}


def test_the_probe_is_fit_on_every_training_image_once(monkeypatch):
    dataset, given = toy(n=40), []
    rows = torch.randperm(78) // 2  # every image twice
    late = sum(rows.tolist().index(k) >= 30 for k in range(39))
    train = data.Split(dataset.train.bases, [rows, rows], dataset.train.labels[rows])
    mask = torch.ones(78, 2, dtype=torch.bool)
    mask[:30, 1] = False
    dataset = dataset._replace(train=train, mask=mask)
    monkeypatch.setattr(evaluation, "linear_probe", lambda *xs: given.append(xs) or len(given))
    model = Sampled(SHAPES)
    assert evaluation.latent_accuracy(model, dataset)["latent_accuracy"] == {"mnist": 1, "svhn": 2}
    first, second = (True, False), (False, True)
    assert model.asked == [(first, 39), (first, 20), (second, late), (second, 20)]
    for train_z, train_y, test_z, test_y in given:
        assert np.allclose(train_z[:, 0], train_y) and np.allclose(test_z[:, 0], test_y)
        assert (test_y == dataset.test.labels.numpy()).all()


def test_latent_points_are_samples_of_each_modality_in_turn():
    dataset, model = toy(n=2004), Sampled(SHAPES)
    args = evaluation.subsets(dataset.names), evaluation.latent_samples
    z, labels = figures.latent_points(model, dataset, *args)
    shown = [(True, False)] * 2 + [(False, True)] * 2
    assert model.asked == [(which, 500) for which in shown]
    expected = dataset.test.labels[:1000].repeat(2)
    assert np.allclose(z[:, 0], expected) and (labels == expected.numpy()).all()
    assert len(figures.latent_points(model, dataset, *args, n=3)[0]) == 6
    assert len(figures.latent_points(model, toy(n=40), *args, n=30)[0]) == 2 * 20


def test_relatedness_is_w2_between_the_posteriors_of_two_modalities():
    class Wide(Perfect):
        """N(digit, 1) of the first modality, N(3 digit, 2²) of the second."""

        def posterior(self, *xs):
            m = pattern(xs).index(True)
            mean = super().posterior(*xs).mean * (1, 3)[m]
            return Independent(Normal(mean, torch.full_like(mean, m + 1.0)), 1)

    bases = toy(n=1100).test.bases
    split = data.Split(bases, [torch.randperm(1100) // 2, torch.randperm(1100) // 2])
    d, index = figures.distances(Wide(SHAPES), split, 0, 1, evaluation.w2)
    assert d.shape == (500, 500) and index[:9].diff().min() < 0
    assert len(split.rows[0][index].unique()) == 500  # of the first all different
    a, b = (x.mean((1, 2, 3)).numpy() * 255 / 25 for x in split[index])
    expected = np.sqrt((a[:, None] - 3 * b) ** 2 + 2 * (1 - 2) ** 2)
    assert np.allclose(d, expected, atol=1e-3)


def numbers(**widths):
    """Modalities of a user's tables of numbers."""
    array = {"kind": "numbers", "likelihood": "normal"}
    return nets.modalities(
        "npz", arrays={name: array | {"shape": [width]} for name, width in widths.items()}
    )


def test_gradient_ratios_are_mean_over_deviation_of_the_gradients():
    model = meme.MEME(numbers(a=3, b=2), 2, samples=2)
    before = {key: x.clone() for key, x in model.state_dict().items()}
    xs = torch.randn(4, 3), torch.randn(4, 2)
    torch.manual_seed(1)
    found = figures.gradient_ratios(model, xs)
    assert (model.kl, model.full_gradient) == ("closed", False)
    assert all(x.equal(before[key]) for key, x in model.state_dict().items())
    assert all(x.grad is None for x in model.parameters())
    torch.manual_seed(1)
    for name, full in ("w detached", False), ("eq. (7)", True):
        model.kl, model.full_gradient = "sample", full
        gradients = []
        for _ in range(30):
            model.zero_grad()
            model.objective(*xs).backward()
            parts = model.encoders.parameters(), model.decoders.parameters()
            drawn = (torch.cat([w.grad.flatten() for w in part]).double() for part in parts)
            gradients.append([gradient.numpy() for gradient in drawn])
        for part, draws in zip(("encoders", "decoders"), map(np.stack, zip(*gradients))):
            mean, std = draws.mean(0), draws.std(0)
            with np.errstate(divide="ignore"):
                expected = np.log10(np.abs(mean[std > 1e-12]) / std[std > 1e-12]).clip(-4, 2)
            assert found[name][part].numpy() == pytest.approx(expected, abs=1e-3)


def stub_likelihood(model, xs, samples, given=None):
    x = next(x for x in xs if x is not None)
    return torch.full((len(x),), -1.0 if given is None else -0.5)


def test_coherence_of_a_perfect_model_is_one_with_full_entropy(monkeypatch):
    monkeypatch.setattr(evaluation, "log_likelihood", stub_likelihood)
    metrics = evaluation.evaluate(Perfect(SHAPES), toy(), READERS)
    assert metrics["cross_coherence"] == {"mnist->svhn": 1, "svhn->mnist": 1}
    assert metrics["self_coherence"] == {"mnist": 1, "svhn": 1}
    assert metrics["joint_coherence"] == metrics["aggregate_coherence"] == 1
    disagreement = metrics["disagreement"]
    assert disagreement.pop("joint_coherence") == disagreement.pop("aggregate_coherence") == 0
    assert disagreement == {
        key: dict.fromkeys(metrics[key], 0) for key in ("cross_coherence", "self_coherence")
    }
    assert abs(metrics["joint_entropy"] - math.log(10)) < 0.01
    assert min(metrics["latent_accuracy"].values()) > 0.99
    alone, given = ("mnist", "svhn", "mnist,svhn"), ("mnist|svhn", "svhn|mnist")
    expected = dict.fromkeys(alone, -1) | dict.fromkeys(given, -0.5)
    assert metrics["log_likelihood"] == pytest.approx(expected)


@pytest.mark.parametrize("script", SCRIPTS)
@torch.no_grad()
def test_log_likelihood_is_importance_weighted_by_its_formula(script):
    """log 1/K Σ_k p(xs|z_k) p(z_k) / q(z_k), without the weights of the likelihoods"""
    modalities = [m._replace(weight=7.0) for m in numbers(a=3, b=2, c=4)]
    model = SCRIPTS[script].MODEL(modalities, 2)
    a, b, c = torch.randn(5, 3), torch.randn(5, 2), torch.randn(5, 4)
    cases = [
        ([a, None, None], None, model.posterior(a, None, None), model.prior(a, None, None)),
        ([a, None, c], None, model.posterior(a, None, c), model.prior()),
        ([None, b, None], [a, None, c], model.posterior(a, b, c), model.posterior(a, None, c)),
    ]
    for xs, given, q, p in cases:
        torch.manual_seed(3)
        found = evaluation.log_likelihood(model, xs, samples=6, given=given)
        torch.manual_seed(3)
        z = q.sample((6,))
        log_w = p.log_prob(z) - q.log_prob(z)
        for x, decode in zip(xs, model.decoders):
            if x is not None:
                location, log_scale = decode(z).unbind(-1)
                log_w = log_w + Normal(location, log_scale.exp()).log_prob(x).sum(-1)
        assert torch.allclose(found, log_w.exp().mean(0).log(), rtol=1e-4)


def test_likelihoods_in_blocks_are_those_of_all_samples(monkeypatch):
    calls = []  # of log_likelihood: the mask, samples, examples

    def counting(model, xs, samples, given=None):
        seen = [x for x in xs if x is not None]
        calls.append((pattern(xs), samples, len(seen[0])))
        held = samples * sum(x.numel() for x in seen)
        assert held <= 2**20 or samples == len(seen[0]) == 1
        return torch.full((len(seen[0]),), math.log(samples))  # the mean of w is a block's size

    def counts():
        return [samples * examples for _, samples, examples in calls]

    monkeypatch.setattr(evaluation, "log_likelihood", counting)
    found = evaluation.log_likelihoods(Perfect(SHAPES), toy())["log_likelihood"]
    assert sum(counts()) == 5 * 100 * 1000
    # Tenths of 100 samples, three examples of svhn at a time: 2^20 / (100 * 3072)
    assert found["svhn"] == found["mnist"] == pytest.approx(math.log(100))
    assert counts().count(1300) == 10 * 2 * 7  # of mnist 13: 7 times 13 and 9 are 100

    class Large(Perfect):
        def decode(self, z):
            return [torch.zeros(1).expand(len(z), n) for n in (2**21, 1)]

    large = data.Split([torch.zeros(1).expand(2, 2**21), torch.zeros(2, 1)])
    dataset = toy(n=4)._replace(test=large, names=("a", "b"))
    calls.clear()
    evaluation.log_likelihoods(Large(SHAPES), dataset, samples=3)
    assert calls.count(((True, False), 1, 1)) == 2 * 2 * 3  # a sample of an example, p(a), p(a|b)


def test_likelihoods_under_a_mixture_prior_count_its_components(monkeypatch):
    class Mixed(Perfect):
        def prior(self):
            components = Independent(Normal(torch.zeros(2048, 2), 1), 1)
            return MixtureSameFamily(Categorical(torch.ones(2048)), components)

    held = []

    def counting(model, xs, samples, given=None):
        n = len(next(x for x in xs if x is not None))
        if given is None:
            held.append(samples * n * 2048 * 2)
        return torch.zeros(n)

    monkeypatch.setattr(evaluation, "log_likelihood", counting)
    evaluation.log_likelihoods(Mixed(SHAPES), toy(n=4), examples=2)
    assert 2**19 < max(held) <= 2**20 and sum(held) == 3 * 2 * 1000 * 2048 * 2


def asked(examples=5, **options):
    """The calls of log_likelihood for a model of three bands, by their initials.
    -> {name: (target, given)}, {name: nats}"""
    dataset, calls = toy("mnist-split3", n=14), []
    first = dataset.test[npz.spread(7, examples)]

    def initials(xs):
        assert all(x is None or torch.equal(x, all_) for x, all_ in zip(xs, first))
        return "".join(letter for letter, x in zip("TMB", xs) if x is not None)

    def log_likelihood(model, xs, samples, given=None):
        assert samples == 1
        calls.append((initials(xs), given and initials(given)))
        return -10.0 * len(calls) - torch.arange(len(first[0])).float()

    model = Perfect([x.shape[1:] for x in dataset.test.bases])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "log_likelihood", log_likelihood)
        found = evaluation.log_likelihoods(model, dataset, examples, samples=1, **options)
    return dict(zip(found["log_likelihood"], calls, strict=True)), found["log_likelihood"]


CONDITIONAL = {
    "top|middle,bottom": ("T", "MB"),
    "middle|top,bottom": ("M", "TB"),
    "bottom|top,middle": ("B", "TM"),
}


def test_conditional_likelihoods_are_never_given_their_target():
    found, _ = asked()
    assert [name for name, (_, given) in found.items() if given] == list(CONDITIONAL)
    assert not [name for name, (what, given) in found.items() if given and set(what) & set(given)]


def test_conditional_likelihoods_are_given_all_other_modalities():
    found, nats = asked()
    alone = {"top": ("T", None), "middle": ("M", None), "bottom": ("B", None)}
    assert found == alone | {"top,middle,bottom": ("TMB", None)} | CONDITIONAL
    assert list(nats.values()) == pytest.approx([-10 * k - 2 for k in range(1, 8)])  # the mean
    assert asked(priors=())[0] == CONDITIONAL
    assert asked(priors=("middle",))[0] == {"middle": ("M", None)} | CONDITIONAL
    assert asked(examples=99)[1]["top"] == -10 - 3  # of all seven


def test_each_data_set_gets_its_metrics_with_the_options(monkeypatch):
    names = "split_accuracy coherence joint_coherence mutual_information latent_accuracy"
    calls, model, oracles = {}, Perfect(SHAPES), {"a": 0}
    model.train()
    for name in [*names.split(), "log_likelihoods"]:

        def metric(*arguments, name=name):
            assert not model.training and arguments[0] is model
            calls[name] = (*arguments[1:], torch.rand(1).item())  # of the seed
            found = {name: 0}
            judged = name.endswith(("coherence", "split_accuracy"))
            return (found, {f"{name} disagreement": 1}) if judged else found

        monkeypatch.setattr(evaluation, name, metric)
    monkeypatch.setattr(evaluation.npz, "evaluate", lambda *arguments: {"regenerated": arguments})

    def metrics(dataset, oracles, *options, **more):
        calls.clear()
        return evaluation.evaluate(model, dataset, oracles, *options, **more)

    pairs, split, own = toy(n=4), toy("mnist-split", n=4), toy(n=4)._replace(name="own.npz")
    found = metrics(pairs, oracles)
    assert list(found) == ["coherence", "joint_coherence", "disagreement", *names.split()[3:]] + [
        "log_likelihoods"
    ]
    assert found["disagreement"] == {"coherence disagreement": 1, "joint_coherence disagreement": 1}
    torch.manual_seed(0)
    assert calls["coherence"] == (pairs, oracles, torch.rand(1).item())
    assert all(calls[k][:2] == (pairs, oracles) for k in names.split()[1:4])
    assert calls["latent_accuracy"][:-1] == (pairs,)
    assert calls["log_likelihoods"][:-1] == (pairs, 100, 1000, None)
    found = metrics(pairs, oracles, 7, 8, 9, priors=("svhn",))
    assert "joint_coherence" in found
    assert calls["log_likelihoods"][:-1] == (pairs, 7, 8, ("svhn",))
    torch.manual_seed(9)
    assert calls["coherence"][-1] == torch.rand(1).item()
    found = metrics(split, oracles, examples=0)
    assert list(found) == ["split_accuracy", "disagreement", "latent_accuracy"]
    assert found["disagreement"] == {"split_accuracy disagreement": 1}
    found = metrics(own, {}, seed=9)
    assert list(found) == ["regenerated", "latent_accuracy", "log_likelihoods"]
    assert found["regenerated"] == (model, own, 9, None)
    for part in ("train", "test"):
        bare = own._replace(**{part: data.Split(getattr(own, part).bases)})
        assert list(metrics(bare, {})) == ["regenerated", "log_likelihoods"]


def test_birds_are_correlated_and_spectra_ranked_only(monkeypatch):
    rng, model = np.random.default_rng(0), Perfect(SHAPES)
    x, y = rng.standard_normal((2, 50, 3))
    fit, judged = (x, y), {"truth": (x, y), "joint": (y, x)}
    asked = []
    monkeypatch.setattr("benchmarks.cub.correlated", lambda *xs: asked.append(xs) or (fit, judged))
    birds = toy()._replace(name="cub")
    found = evaluation.evaluate(model, birds, {}, root="there")
    assert found == evaluation.correlations(fit, judged) and asked == [(model, birds, "there")]
    evaluation.evaluate(model, birds, {}, priors=())
    assert asked[1][2] == "./data"
    monkeypatch.setattr("benchmarks.spectra.evaluate", lambda *xs: xs)
    named = toy()._replace(name="spectra")
    assert evaluation.evaluate(model, named, {}, 1, 2, 3, "there") == (model, named, "there", 3)


def test_a_bernoulli_of_greys_is_a_pseudo_likelihood():
    grey, bits = toy(n=2), toy(n=2)
    bits.test.bases = [x > 9 for x in bits.test.bases]

    def of(*kinds):
        return SimpleNamespace(modalities=[SimpleNamespace(likelihood=kind) for kind in kinds])

    assert evaluation.grey_bernoulli(of("laplace", "bernoulli"), grey)
    assert not evaluation.grey_bernoulli(of("laplace", "normal"), grey)
    assert not evaluation.grey_bernoulli(of("laplace", "bernoulli"), bits)


@pytest.mark.parametrize(
    "paired, unpaired, mask, trained",
    [
        (1, "split", None, ()),
        (1, "mnist", None, ()),
        (1, "all", None, ("mnist", "svhn")),
        (0.5, "none", None, ()),
        (0.5, "split", None, ("mnist", "svhn")),
        (0.5, "rest", None, ("mnist", "svhn")),
        (0.5, "svhn", None, ("svhn",)),
        (1, "split", [[True, True]], ()),
        (1, "split", [[True, True], [False, True]], ("svhn",)),
        (1, "split", [[True, False], [False, True]], ("mnist", "svhn")),
    ],
)
def test_likelihoods_of_an_untrained_prior_are_left_out(
    paired, unpaired, mask, trained, monkeypatch
):
    monkeypatch.setattr(evaluation, "log_likelihood", stub_likelihood)
    dataset, args = toy(n=20), dict(paired=paired, unpaired=unpaired)
    dataset = dataset._replace(mask=None if mask is None else torch.tensor(mask))
    model = Perfect(SHAPES)
    every = evaluation.trained_priors(model, args, dataset)
    assert every == dataset.names  # a model without such priors
    model.modalities = nets.modalities("mnist-svhn")
    model.trained_priors = functools.partial(meme.MEME.trained_priors, model)
    assert evaluation.trained_priors(model, args, dataset) == trained
    metrics = evaluation.evaluate(model, toy(n=20), READERS, examples=5, samples=2, priors=trained)
    joint = ["mnist,svhn"] if trained == every else []
    known = [*trained, *joint, "mnist|svhn", "svhn|mnist"]
    assert list(metrics["log_likelihood"]) == known
    assert list(metrics["log_likelihood_rise"]) == known
    assert {"joint_coherence", "aggregate_coherence", "cross_coherence"} <= set(metrics)


# ----------------------------------------------------------------------------- the command, figures


def evaluate(*arguments):
    evaluation.main([*map(str, arguments), "--device", "cpu"])


def test_main_writes_metrics_and_prints_one_table(runs, capsys):
    evaluate(*runs, "--samples", 20)
    printed = capsys.readouterr().out
    rows = [line for line in printed.splitlines() if line.startswith("| MVAE")]
    assert len(rows) == 2 and "| 1 | split | 2 | 2 |" in rows[0] and " ± " in rows[0]
    assert "| 0.5 | split | 2 | 1 |" in rows[1] and "log p(0\\|1)" in printed
    metrics = json.loads((runs[0] / "metrics.json").read_text())
    assert set(metrics["latent_accuracy"]) == {"0", "1"} and metrics["run"]["model"] == "MVAE"
    assert set(metrics["log_likelihood"]) == {"0", "1", "0,1", "0|1", "1|0"}
    assert "pseudo" not in printed  # the data are no greys
    assert {p.name for p in runs[0].iterdir()} == {"args.json", "checkpoint.pt", "metrics.json"}


def test_a_saved_run_is_appended_or_replaces_its_line(runs, tmp_path, capsys):
    saved = tmp_path / "results" / "own.jsonl"
    for run in runs[:2]:
        evaluate(run, "--no-likelihoods", "--save", saved)
    first = tables.read_results(saved)
    assert [r["folder"] for r in first] == ["run0", "run1"]
    log = torch.load(runs[0] / "checkpoint.pt", weights_only=True)["log"]
    assert first[0]["log"] == log and "log_p_0" in log[0]
    kept = {key: value for key, value in first[0].items() if key not in ("log", "folder")}
    written = json.loads((runs[0] / "metrics.json").read_text())
    assert written.pop("folder") == str(runs[0]) and written == kept
    evaluate(runs[0], "--no-likelihoods", "--seed", 1, "--save", saved)
    again = tables.read_results(saved)
    assert [r["folder"] for r in again] == ["run0", "run1"] and again[1] == first[1]
    assert again[0]["latent_accuracy"] != first[0]["latent_accuracy"]
    for run in runs[:2]:
        shutil.rmtree(run)
    capsys.readouterr()
    evaluate(saved)
    assert "| MVAE | 1 | split | 2 | 2 |" in capsys.readouterr().out


def test_columns_of_an_older_log_are_renamed(runs):
    state = torch.load(runs[0] / "checkpoint.pt", weights_only=True)
    for row in state["log"]:
        row["nats_0"] = row.pop("log_p_0")
    torch.save(state, runs[0] / "checkpoint.pt")
    run = evaluation.load_run(runs[0])
    assert run.log[1]["log_p_0"] == state["log"][1]["nats_0"] and "nats_0" not in run.log[1]


def test_a_terminal_without_arrows_gets_the_metrics(runs):
    command = [sys.executable, ROOT / "eval.py", runs[0], "--no-likelihoods", "--device", "cpu"]
    environment = {"PYTHONIOENCODING": "cp1252", "PYTHONUTF8": "0", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*map(str, command)], env=os.environ | environment, capture_output=True, check=True
    )
    assert b"modality 0 ? modality 1" in done.stdout


def test_metrics_are_read_as_utf_8_in_any_locale(runs, tmp_path):
    evaluate(runs[0], "--no-likelihoods")
    text = (runs[0] / "metrics.json").read_text(encoding="utf-8")
    (tmp_path / "kept").mkdir()
    kept = tmp_path / "kept" / "metrics.json"
    kept.write_text(text.replace("own.npz", "größe.npz"), encoding="utf-8")
    locale = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}
    command = [sys.executable, str(ROOT / "eval.py"), str(tmp_path / "kept")]
    environment = os.environ | locale | {"PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(command, env=environment, capture_output=True, check=True)
    assert "größe.npz" in done.stdout.decode()


def batchnorm_run(folder):
    """A run of networks with BatchNorm, untrained, in a folder."""
    spec = {"name": "spectra", "width": 0.001}
    torch.manual_seed(0)
    model = SCRIPTS["mvae"].MODEL(nets.modalities(**spec), 3)
    for x in torch.rand(3, 20, 11000):  # so that the running statistics are not those of a batch
        model.posterior(x, None)
    args = {"version": 1, "script": "mvae", "model": "MVAE", "dataset": "spectra", "spec": spec}
    args |= {"latent_dim": 3, "options": {}, "note": "", "paired": 1.0, "unpaired": "split"}
    folder.mkdir()
    (folder / "args.json").write_text(json.dumps(args))
    state = {"model": model.state_dict(), "optimizer": {}, "epoch": 0, "log": []}
    torch.save(state, folder / "checkpoint.pt")
    return folder


def test_a_loaded_run_is_filled_in_eval_mode(tmp_path):
    run, filled = batchnorm_run(tmp_path / "run"), []
    assert not any(module.training for module in evaluation.load_run(run).model.modules())
    spectra = np.random.default_rng(0).random((6, 11000)).astype("f4")
    for n in (6, 2):
        np.savez(tmp_path / "new.npz", spectrum=spectra[:n])
        evaluate(run, "--fill", tmp_path / "new.npz", "--out", tmp_path / f"{n}.npz")
        filled.append(np.load(tmp_path / f"{n}.npz"))
    for key in ("latent_mean", "latent_std"):
        assert np.allclose(filled[0][key][:2], filled[1][key], atol=1e-6)


def test_a_model_is_evaluated_in_eval_mode(tmp_path, monkeypatch):
    model = evaluation.load_run(batchnorm_run(tmp_path / "run")).model
    split = data.Split([torch.rand(4, 11000), torch.rand(4, 2149) > 0.5])
    dataset = data.Dataset("own.npz", split, split, {}, ("spectrum", "fingerprint"))
    model.train()
    before = {key: x.clone() for key, x in model.state_dict().items()}
    first = evaluation.evaluate(model, dataset, {}, examples=3, samples=5)
    assert all(x.equal(before[key]) for key, x in model.state_dict().items())
    assert first == evaluation.evaluate(model.eval(), dataset, {}, examples=3, samples=5)
    with pytest.MonkeyPatch.context() as patch:  # the test can tell the two modes apart
        patch.setattr(model, "eval", lambda: None)
        assert first != evaluation.evaluate(model.train(), dataset, {}, examples=3, samples=5)


def edit(name, change):
    return lambda run: (run / name).write_bytes(change((run / name).read_bytes()))


def swap(old, new):
    return edit("args.json", lambda content: content.replace(old, new))


DAMAGE = {
    "no folder": shutil.rmtree,
    "nothing in it": lambda run: [shutil.rmtree(run), run.mkdir()],
    "no checkpoint": lambda run: (run / "checkpoint.pt").unlink(),
    "cut checkpoint": edit("checkpoint.pt", lambda content: content[:1000]),
    "cut args": edit("args.json", lambda content: content[:40]),
    "args of another size": swap(b'"latent_dim": 4', b'"latent_dim": 5'),
    "args of an unknown script": swap(b'"mvae"', b'"nope"'),
    "args without data": swap(b"own.npz", b"gone.npz"),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_a_bad_run_leaves_the_others(runs, capsys, how):
    DAMAGE[how](runs[0])
    with pytest.raises(SystemExit) as stop:
        evaluate(*runs[:2], "--no-likelihoods")
    out, err = capsys.readouterr()
    complaints = [line for line in err.splitlines() if not line.startswith("evaluating")]
    assert stop.value.code == 2 and len(complaints) == 1
    assert ("gone.npz" if how == "args without data" else str(runs[0])) in complaints[0]
    assert "| MVAE |" in out and (runs[1] / "metrics.json").exists()
    assert not (runs[0] / "metrics.json").exists()


def test_figures_of_runs_and_their_curve(runs, tmp_path):
    pytest.importorskip("matplotlib")
    evaluate(*runs, "--samples", 5, "--figures", tmp_path / "figures")
    drawn = "generation", "latent", "relatedness"
    of_runs = {f"run{k}-{what}.png" for k in range(3) for what in drawn}
    assert {p.name for p in (tmp_path / "figures").iterdir()} == {"own-paired.png"} | of_runs
    for run in runs:  # the curve needs no more than their metrics
        (run / "checkpoint.pt").unlink()
    evaluate(*runs, "--figures", tmp_path / "curve")
    assert [p.name for p in (tmp_path / "curve").iterdir()] == ["own-paired.png"]


def test_a_failing_figure_leaves_the_others(runs, tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")

    def failing(*args):
        raise ValueError("no plane")

    monkeypatch.setattr(drawing, "latent_map", failing)
    with pytest.raises(SystemExit) as stop:
        evaluate(runs[0], "--no-likelihoods", "--figures", tmp_path / "figures")
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and "run0-latent.png cannot be drawn: no plane" in err
    assert "MVAE on" in out
    drawn = {path.name for path in (tmp_path / "figures").iterdir()}
    assert drawn == {"run0-generation.png", "run0-relatedness.png"}


def test_without_matplotlib_nothing_is_evaluated(runs, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit) as stop:
        evaluate(runs[0], "--no-likelihoods", "--figures", tmp_path)
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and not out and "pip install matplotlib" in err
    assert not (runs[0] / "metrics.json").exists()


def generations(model, dataset):
    masks, views = evaluation.subsets(dataset.names), evaluation.views(dataset)
    return figures.generations(model, dataset, masks, views)


@pytest.mark.parametrize("name", ["mnist-svhn", *nets.BANDS])
def test_grids_have_a_column_per_digit(name, tmp_path):
    dataset = toy(name)
    rows = generations(Perfect([x.shape[1:] for x in dataset.test.bases]), dataset)
    assert len(rows) == {"mnist-svhn": 6, "mnist-split": 6, "mnist-split3": 14}[name]
    for label, images in rows:
        if "→" in label:  # generated: 0 to 9
            assert torch.allclose(255 * images[:, 0, 14, 14], 25 * torch.arange(10.0), atol=1e-3)
    pytest.importorskip("matplotlib")
    drawing.page(rows, "digits", tmp_path / "generation.png")
    assert Image.open(tmp_path / "generation.png").size[0] > 600


def test_models_are_compared_on_the_same_input():
    right = generations(Perfect(SHAPES), toy())
    wrong = generations(Perfect(SHAPES, lambda m, digit: 9 - digit), toy())
    rows = drawing.side_by_side({"A": right, "B": wrong})
    labels = ["mnist", "svhn, A", "svhn, B", "svhn", "mnist, A", "mnist, B"]
    assert [label for label, _ in rows] == labels
    assert torch.equal(rows[1][1], right[2][1]) and torch.equal(rows[2][1], wrong[2][1])
    assert not torch.equal(rows[1][1], rows[2][1])


def test_joint_samples_have_the_oracles_predictions(tmp_path):
    second = Perfect(SHAPES, lambda m, digit: digit if m == 0 else torch.full_like(digit, 3))
    dataset = toy()
    views = evaluation.views(dataset)
    predict = functools.partial(evaluation.predict, dataset=dataset, oracles=READERS)
    rows, read = figures.joint_samples(second, views, predict, columns=20, lines=2)
    assert [label for label, _ in rows] == ["mnist", "svhn"] * 2
    for (_, images), (digits, _) in zip(rows, read):
        assert torch.equal((255 * images[:, 0, 9, 9] / 25).round().long(), digits)
    (first, agree), (threes, same) = read[:2]
    assert (threes == 3).all() and torch.equal(agree, first == 3) and torch.equal(same, agree)
    assert figures.joint_samples(second, views)[1] is None
    pytest.importorskip("matplotlib")
    drawing.page(rows, "samples", tmp_path / "joint.png", read)
    assert (tmp_path / "joint.png").stat().st_size > 5000
