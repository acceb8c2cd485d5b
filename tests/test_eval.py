"""Metrics against their definitions, oracles, tables, figures and the command of eval.py."""

import functools
import itertools
import json
import math
import re
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.distributions import Categorical, Independent, MultivariateNormal, Normal, kl_divergence

import data
import eval as evaluation
import meme
import nets
from benchmarks import drawing, oracles, tables
from benchmarks.glyphs import glyphs
from helpers import READERS, SHAPES, Perfect, Reader, toy


def planted(n, correlations, extra=3, seed=0):
    """x, y whose canonical correlations are known: mixed by random matrices, with noise
    dimensions."""
    rng, k = np.random.default_rng(seed), len(correlations)
    r = np.array(correlations)
    x, y = rng.standard_normal((n, k + extra)), rng.standard_normal((n, k + extra + 2))
    y[:, :k] = r * x[:, :k] + np.sqrt(1 - r**2) * y[:, :k]
    mix_x, mix_y = rng.standard_normal((k + extra,) * 2), rng.standard_normal((k + extra + 2,) * 2)
    return x @ mix_x + 5, y @ mix_y - 3


def test_cca_finds_planted_correlations_whatever_the_coordinates():
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


def test_cca_by_default_has_40_pairs_and_a_ridge_of_a_thousandth_of_the_mean_variance():
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


def test_correlations_are_means_of_eq_12_of_other_pairs_in_one_fit_centred_by_its_means():
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


def test_cca_without_whitening_solves_the_eigenproblem_of_the_published_code():
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


def test_correlation_is_the_cosine_of_eq_12_centred_by_the_fit_and_not_by_what_is_judged():
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


def test_the_probe_scales_test_samples_by_training_s_and_penalises_by_a_ten_thousandth(monkeypatch):
    given, w = [], np.array([[1.0, 0], [0, 1], [0, 0], [0.3, 0]])
    monkeypatch.setattr(evaluation, "logistic_regression", lambda *xs: given.append(xs) or w)
    rng = np.random.default_rng(0)
    z, test_z = rng.standard_normal((50, 3)) * [3, 4, 0] + 5, rng.standard_normal((40, 3)) + 6
    y = np.where(rng.random(50) < 0.5, 3, 7)  # any labels
    found = evaluation.linear_probe(z.tolist(), y, test_z.tolist(), [3] * 20 + [7] * 20)
    evaluation.linear_probe(z, y, test_z, test_z[:, 0], l2=0.5)
    (scaled, index, classes, l2), second = given
    assert second[3] == 0.5
    std = z.std(0) + [0, 0, 1]  # the third does not vary
    assert np.allclose(scaled, (z - z.mean(0)) / std) and classes == 2 and l2 == 1e-4
    assert (np.array([3, 7])[index] == y).all()
    a, b = ((test_z - z.mean(0)) / std)[:, :2].T
    assert found == (np.where(a + 0.3 >= b, 3, 7) == [3] * 20 + [7] * 20).mean()


# ----------------- metrics of models that decode what they like, of images that spell their label


def pattern(xs):
    return tuple(x is not None for x in xs)


class Sampled(Perfect):
    """The sample of its posterior is the digit shown, the mean is not. `asked`: what was shown."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.asked = []

    def posterior(self, *xs):
        self.asked.append((pattern(xs), len(next(x for x in xs if x is not None))))
        z = super().posterior(*xs).mean
        return SimpleNamespace(sample=lambda: z, mean=0 * z - 1, stddev=torch.ones_like(z))


def flipped(m, digit):
    """The first modality shows the digit, the others 9 - digit."""
    return digit if m == 0 else 9 - digit


def test_what_can_be_shown_and_what_is_judged():
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


def test_digits_are_judged_in_what_is_decoded_from_samples_of_every_test_example():
    dataset = toy(n=1300)  # 650 to test: two parts, of unequal size
    labels = dataset.test.labels
    labels[:500] = 9 - labels[:500]  # now the wrong ones
    right, wrong = 150 / 650, 500 / 650
    model = Sampled(SHAPES, flipped)
    found, disputed = evaluation.coherence(model, dataset, {"mnist": Reader(3), "svhn": Reader(4)})
    shown = {"mnist": (True, False), "svhn": (False, True)}
    assert model.asked == [(shown[m], n) for m in ("mnist", "svhn") for n in (500, 150)]
    assert found == {
        "cross_coherence": {"mnist->svhn": wrong, "svhn->mnist": right},
        "self_coherence": {"mnist": right, "svhn": wrong},
    }
    digits = torch.cat([9 - labels[:500], labels[500:]])  # that the images show
    doubt = {"mnist": digits == 3, "svhn": 9 - digits == 4}
    doubt = {view: found.double().mean().item() for view, found in doubt.items()}
    assert disputed == {
        "cross_coherence": {"mnist->svhn": doubt["svhn"], "svhn->mnist": doubt["mnist"]},
        "self_coherence": doubt,
    }


@pytest.mark.parametrize("name", nets.BANDS)
def test_a_split_image_is_judged_whole_from_samples_of_each_subset_of_its_parts(name):
    dataset, three = toy(name, n=80), "top middle bottom top+middle top+bottom middle+bottom all"
    sevens = (dataset.test.labels == 7).double().mean().item()
    dataset.test.labels[:10] += 1
    model = Sampled([x.shape[1:] for x in dataset.test.bases])
    found, disputed = evaluation.split_accuracy(model, dataset, {"image": Reader(7)})
    conditions = "top bottom both" if name == "mnist-split" else three
    assert found == {"accuracy": dict.fromkeys(conditions.split(), 0.75)}  # of 40 examples
    assert disputed == {"accuracy": pytest.approx(dict.fromkeys(conditions.split(), sevens))}
    assert model.asked == [(shown, 40) for shown in evaluation.subsets(dataset.names).values()]


def test_joint_coherence_entropy_and_dispute_are_those_of_the_samples_of_the_prior():
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

    model, oracles = Cycles([(1, 4, 4)] * 2, says), {"mnist": Reader(4), "svhn": Reader(2)}
    metrics, disputed = evaluation.joint_coherence(model, toy(), oracles)
    assert model.done == 10_000
    assert metrics["joint_coherence"] == 5 / 8  # both show 0, 0, 0, 1 or 2
    entropy = -(0.6 * math.log(0.6) + 2 * 0.2 * math.log(0.2))  # of 3/5, 1/5, 1/5
    assert metrics["joint_entropy"] == pytest.approx(entropy)
    assert disputed == {"joint_coherence": 4 / 8}  # svhn shows 2 four times, mnist 4 two of them
    for agree, share in (-1, 0), (3, 1 / 8):  # on nothing; on one of eight samples
        model = Cycles([(1, 4, 4)] * 2, lambda m, digit: digit + m * (digit != agree))
        metrics, _ = evaluation.joint_coherence(model, toy(), oracles, samples=8)
        assert metrics == {"joint_coherence": share, "joint_entropy": 0} and model.done == 8


def test_mutual_information_is_the_mean_over_the_first_images_generated_from_samples():
    class Doubled(Reader):
        def information(self, x):
            return 2 * super().information(x)

    dataset, model = toy(n=2004), Sampled([(1, 4, 4)] * 2, flipped)
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


def test_the_probe_is_fitted_on_every_training_image_once_and_tested_on_all_examples(monkeypatch):
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


def test_latent_points_are_samples_of_one_modality_after_the_other_with_their_labels():
    dataset, model = toy(n=2004), Sampled(SHAPES)
    z, labels = evaluation.latent_points(model, dataset)
    shown = [(True, False)] * 2 + [(False, True)] * 2
    assert model.asked == [(which, 500) for which in shown]
    expected = dataset.test.labels[:1000].repeat(2)
    assert np.allclose(z[:, 0], expected) and (labels == expected.numpy()).all()
    assert len(evaluation.latent_points(model, dataset, n=3)[0]) == 6
    assert len(evaluation.latent_points(model, toy(n=40), n=30)[0]) == 2 * 20


def test_relatedness_is_w2_from_the_first_modality_s_posterior_to_the_second_s():
    class Wide(Perfect):
        """N(digit, 1) of the first modality, N(3 digit, 2²) of the second."""

        def posterior(self, *xs):
            m = pattern(xs).index(True)
            mean = super().posterior(*xs).mean * (1, 3)[m]
            return Independent(Normal(mean, torch.full_like(mean, m + 1.0)), 1)

    bases = toy(n=1100).test.bases
    split = data.Split(bases, [torch.randperm(1100) // 2, torch.randperm(1100) // 2])
    d, index = evaluation.distances(Wide(SHAPES), split, 0, 1)
    assert d.shape == (500, 500) and index[:9].diff().min() < 0
    assert len(split.rows[0][index].unique()) == 500  # of the first all different
    a, b = (x.mean((1, 2, 3)).numpy() * 255 / 25 for x in split[index])
    expected = np.sqrt((a[:, None] - 3 * b) ** 2 + 2 * (1 - 2) ** 2)
    assert np.allclose(d, expected, atol=1e-3)


def test_gradient_ratios_are_the_mean_over_the_deviation_of_meme_s_gradients():
    modalities = nets.modalities("npz", shapes={"a": (3,), "b": (2,)})
    model = meme.MEME(modalities, 2, samples=2)
    xs = torch.randn(4, 3), torch.randn(4, 2)
    torch.manual_seed(1)
    found = evaluation.gradient_ratios(model, xs)
    assert (model.kl, model.full_gradient) == ("closed", False)
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


def test_coherence_of_a_perfect_model_is_one_with_full_entropy():
    metrics = evaluation.evaluate(Perfect(SHAPES), toy(), READERS)
    assert metrics["cross_coherence"] == {"mnist->svhn": 1, "svhn->mnist": 1}
    assert metrics["self_coherence"] == {"mnist": 1, "svhn": 1}
    assert metrics["joint_coherence"] == 1
    disputed = metrics["disputed"]
    assert disputed.pop("joint_coherence") == 0 and disputed == {
        key: dict.fromkeys(metrics[key], 0) for key in ("cross_coherence", "self_coherence")
    }
    assert abs(metrics["joint_entropy"] - math.log(10)) < 0.01
    assert min(metrics["latent_accuracy"].values()) > 0.99
    alone, given = ("mnist", "svhn", "mnist,svhn"), ("mnist|svhn", "svhn|mnist")
    expected = dict.fromkeys(alone, -1) | dict.fromkeys(given, -0.5)
    assert metrics["log_likelihood"] == pytest.approx(expected)


def test_likelihoods_come_in_blocks_of_4_mib_and_are_those_of_all_samples():
    sizes = []

    class Counting(Perfect):
        def log_likelihood(self, *xs, samples, given=None):
            seen = [x for x in xs if x is not None]
            assert samples * sum(x.numel() for x in seen) <= 2**20
            sizes.append(samples * len(seen[0]))
            return torch.full((len(seen[0]),), math.log(samples))  # a block's mean of w is its size

    found = evaluation.log_likelihood(Counting(SHAPES), toy())
    assert sum(sizes) == 5 * 100 * 1000
    mean_w = (341**2 + 341**2 + 318**2) / 1000  # blocks of 2^20 / 3072 samples
    assert found["log_likelihood"]["svhn"] == pytest.approx(math.log(mean_w))
    assert found["log_likelihood"]["mnist"] == pytest.approx(math.log(1000))
    assert sizes.count(1000) == 100 + 100  # 2^20 / (1000 * 784): one example of mnist at a time

    class Large(Counting):
        def decode(self, z):
            return [torch.zeros(1).expand(len(z), n) for n in (2**21, 1)]

        def log_likelihood(self, *xs, samples, given=None):
            sizes.append((pattern(xs), samples, len(xs[1] if xs[0] is None else xs[0])))
            return torch.zeros(sizes[-1][-1])

    large = data.Split([torch.zeros(1).expand(2, 2**21), torch.zeros(2, 1)])
    dataset = toy(n=4)._replace(test=large, names=("a", "b"))
    sizes.clear()
    evaluation.log_likelihood(Large(SHAPES), dataset, samples=3)
    assert sizes.count(((True, False), 1, 1)) == 2 * 2 * 3  # a sample of an example, p(a), p(a|b)

    class Mixed(Perfect):  # p(z) has 2,048 components
        pseudo = [torch.zeros(1024)] * 2

        def log_likelihood(self, *xs, samples, given=None):
            n, found = len(xs[1] if xs[0] is None else xs[0]), self.prior().sample((1,))
            assert given or samples * n * 2048 * found.shape[-1] <= 2**20
            sizes.append(samples * n)
            return torch.zeros(n)

    sizes.clear()
    evaluation.log_likelihood(Mixed(SHAPES), toy(n=4), examples=2)
    assert sum(sizes) == 5 * 2 * 1000


def asked(examples=5, **options):
    """What a model of three bands is asked for, by initials. -> {name: (what, given)}, {name: nats}"""
    dataset, calls = toy("mnist-split3", n=14), []
    first = dataset.test[torch.arange(min(examples, 7))]

    def initials(xs):
        assert all(x is None or torch.equal(x, all_) for x, all_ in zip(xs, first))
        return "".join(letter for letter, x in zip("TMB", xs) if x is not None)

    class Asked(Perfect):
        def log_likelihood(self, *xs, samples, given=None):
            assert samples == 2
            calls.append((initials(xs), given and initials(given)))
            return -10.0 * len(calls) - torch.arange(len(first[0])).float()

    model = Asked([x.shape[1:] for x in dataset.test.bases])
    found = evaluation.log_likelihood(model, dataset, examples, samples=2, **options)
    return dict(zip(found["log_likelihood"], calls, strict=True)), found["log_likelihood"]


CONDITIONAL = {
    "top|middle,bottom": ("T", "MB"),
    "middle|top,bottom": ("M", "TB"),
    "bottom|top,middle": ("B", "TM"),
}


def test_what_is_given_to_a_likelihood_never_contains_its_target():
    found, _ = asked()
    assert [name for name, (_, given) in found.items() if given] == list(CONDITIONAL)
    assert not [name for name, (what, given) in found.items() if given and set(what) & set(given)]


def test_the_prior_of_a_conditional_likelihood_is_the_posterior_of_all_others_and_else_p_z():
    found, nats = asked()
    alone = {"top": ("T", None), "middle": ("M", None), "bottom": ("B", None)}
    assert found == alone | {"top,middle,bottom": ("TMB", None)} | CONDITIONAL
    assert list(nats.values()) == pytest.approx([-10 * k - 2 for k in range(1, 8)])  # the mean
    assert asked(priors=())[0] == CONDITIONAL
    assert asked(priors=("middle",))[0] == {"middle": ("M", None)} | CONDITIONAL
    assert asked(examples=99)[1]["top"] == -10 - 3  # of all seven


def test_each_data_set_gets_its_metrics_and_they_get_the_options(monkeypatch):
    names = "split_accuracy coherence joint_coherence mutual_information latent_accuracy"
    calls, model, oracles = {}, Perfect(SHAPES), {"a": 0}
    model.train()
    for name in [*names.split(), "log_likelihood"]:

        def metric(*arguments, name=name):
            assert not model.training and arguments[0] is model
            calls[name] = (*arguments[1:], torch.rand(1).item())  # of the seed
            found = {name: 0}
            judged = name.endswith(("coherence", "split_accuracy"))
            return (found, {f"{name} disputed": 1}) if judged else found

        monkeypatch.setattr(evaluation, name, metric)
    monkeypatch.setattr(evaluation.npz, "evaluate", lambda *arguments: {"regenerated": arguments})

    def metrics(dataset, oracles, *options, **more):
        calls.clear()
        return evaluation.evaluate(model, dataset, oracles, *options, **more)

    pairs, split, own = toy(n=4), toy("mnist-split", n=4), toy(n=4)._replace(name="own.npz")
    found = metrics(pairs, oracles)
    assert list(found) == ["coherence", "joint_coherence", "disputed", *names.split()[3:]] + [
        "log_likelihood"
    ]
    assert found["disputed"] == {"coherence disputed": 1, "joint_coherence disputed": 1}
    torch.manual_seed(0)
    assert calls["coherence"] == (pairs, oracles, torch.rand(1).item())
    assert all(calls[k][:2] == (pairs, oracles) for k in names.split()[1:4])
    assert calls["latent_accuracy"][:-1] == (pairs,)
    assert calls["log_likelihood"][:-1] == (pairs, 100, 1000, None)
    found = metrics(pairs, oracles, 7, 8, 9, priors=("svhn",))
    assert "joint_coherence" not in found and found["disputed"] == {"coherence disputed": 1}
    assert calls["log_likelihood"][:-1] == (pairs, 7, 8, ("svhn",))
    torch.manual_seed(9)
    assert calls["coherence"][-1] == torch.rand(1).item()
    found = metrics(split, oracles, examples=0)
    assert list(found) == ["split_accuracy", "disputed", "latent_accuracy"]
    assert found["disputed"] == {"split_accuracy disputed": 1}
    found = metrics(own, {}, seed=9)
    assert list(found) == ["regenerated", "latent_accuracy", "log_likelihood"]
    assert found["regenerated"] == (model, own, 9)
    for part in ("train", "test"):
        bare = own._replace(**{part: data.Split(getattr(own, part).bases)})
        assert list(metrics(bare, {})) == ["regenerated", "log_likelihood"]


def test_birds_are_correlated_and_spectra_ranked_in_place_of_all_else(monkeypatch):
    rng, model = np.random.default_rng(0), Perfect(SHAPES)
    x, y = rng.standard_normal((2, 50, 3))
    fit, judged = (x, y), {"truth": (x, y), "joint": (y, x)}
    asked = []
    monkeypatch.setattr("benchmarks.cub.correlated", lambda *xs: asked.append(xs) or (fit, judged))
    birds = toy()._replace(name="cub")
    found = evaluation.evaluate(model, birds, {}, root="there")
    assert found == evaluation.correlations(fit, judged) and asked == [(model, birds, "there")]
    found = evaluation.evaluate(model, birds, {}, priors=())
    assert list(found["correlation"]) == ["truth"] and asked[1][2] == "./data"
    monkeypatch.setattr("benchmarks.spectra.evaluate", lambda *xs: xs)
    named = toy()._replace(name="spectra")
    assert evaluation.evaluate(model, named, {}, 1, 2, 3, "there") == (model, named, "there", 3)


def test_a_number_is_its_mean_and_sample_deviation_over_what_is_finite():
    assert tables.number([0.1, 0.2, 0.6]) == "0.300 ± 0.265"  # √((.04 + .01 + .09) / 2)
    assert tables.number([-9.0, -10.0, math.nan]) == "-9.5 ± 0.7"
    assert tables.number([9.99]) == "9.990" and tables.number([-math.inf]) == "–"


def test_greys_are_pseudo_likelihoods_of_a_bernoulli_and_bits_are_not():
    grey, bits = toy(n=2), toy(n=2)
    bits.test.bases = [x > 9 for x in bits.test.bases]

    def of(*kinds):
        return SimpleNamespace(modalities=[SimpleNamespace(likelihood=kind) for kind in kinds])

    assert evaluation.grey_bernoulli(of("laplace", "bernoulli"), grey)
    assert not evaluation.grey_bernoulli(of("laplace", "normal"), grey)
    assert not evaluation.grey_bernoulli(of("laplace", "bernoulli"), bits)


def test_an_oracle_reads_its_members_mean_and_tells_where_they_differ():
    class Says(nn.Module):
        def __init__(self, p):
            super().__init__()
            self.logits = torch.tensor(p).log()

        def forward(self, x):
            return self.logits

    oracle = oracles.Oracle(1)
    assert len(oracle.members) == 3
    # of the first example: the mean (.53, .46, .01) says 0, the mean of logs and the last say 1
    sure, other = [0.79, 0.2, 0.01], [0.02, 0.97, 0.01]
    say = [[sure, sure, sure, other], [sure, sure, [0.79, 0.01, 0.2], other]]
    say.append([other, sure, sure, [0.1, 0.1, 0.8]])
    oracle.members = nn.ModuleList(map(Says, say))
    digits, disputed = oracle(None)
    assert digits.tolist() == [0, 0, 0, 1] and disputed.tolist() == [True, False, False, True]


def test_a_classifier_sees_one_contrast_through_three_convolutions():
    net, x = oracles.Classifier(2).double().eval(), torch.rand(3, 2, 28, 30).double()
    for weight in net.state_dict().values():
        if weight.is_floating_point():
            weight.uniform_(0.1, 1) if weight.ndim < 2 else weight.normal_()
    h = torch.stack([(image - image.mean()) / (image.std() + 0.05) for image in x])
    for convolution, norm, width in zip(net.trunk[0:9:3], net.trunk[1:9:3], (16, 32, 64)):
        assert convolution.weight.shape[0] == width and convolution.bias is None
        h = F.conv2d(h, convolution.weight, stride=2, padding=1)  # 4 x 4 pixels
        assert convolution.weight.shape[2:] == (4, 4)
        mean, var = norm.running_mean[:, None, None], norm.running_var[:, None, None]
        h = (h - mean) / (var + norm.eps).sqrt() * norm.weight[:, None, None]
        h = (h + norm.bias[:, None, None]).relu()
    assert h.shape == (3, 64, 3, 3)  # of 28 x 30 pixels; of more, the largest in each ninth
    dropout, linear = net.head
    assert torch.allclose(net.features(x), h.flatten(1)) and dropout.p == 0.3
    assert torch.allclose(net(x), h.flatten(1) @ linear.weight.T + linear.bias)
    assert net(x).shape == (3, 10)
    large = torch.rand(1, 2, 48, 48).double()
    ninths = net.trunk[:9]((large - large.mean()) / (large.std() + 0.05))[0].unfold(1, 2, 2)
    ninths = ninths.unfold(2, 2, 2).amax((3, 4))
    assert torch.allclose(net.features(large)[0], ninths.flatten())


@pytest.mark.parametrize("seed", range(8))  # of various shifts
def test_worn_images_are_mixed_with_grey_blurred_faded_noisy_and_shifted(seed):
    x = torch.rand(4, 3, 9, 7)
    torch.manual_seed(seed)
    found = oracles.worn(x)
    torch.manual_seed(seed)  # the same draws, used image by image
    order, keep, sigma = torch.randperm(3), torch.rand(4), 0.1 + 2.3 * torch.rand(4)
    fade, loud, noise = 0.2 + 0.8 * torch.rand(4), 0.1 * torch.rand(4), torch.randn(4, 3, 9, 7)
    top, left = torch.randint(5, (2,)) - 2
    for k, y in enumerate(x[:, order]):
        y = y.mean(0) + keep[k] * (y - y.mean(0))
        for axis in (1, 2):  # a mean of all places, weighted by exp(-distance²/2σ²)
            at = torch.arange(y.shape[axis])
            weights = torch.exp(-((at[:, None] - at) ** 2) / (2 * sigma[k] ** 2))
            weights = weights / weights.sum(1, keepdim=True)
            y = torch.tensordot(weights, y, ([1], [axis])).movedim(0, axis)
        y = y.mean() + fade[k] * (y - y.mean()) + loud[k] * noise[k]
        rows, columns = (torch.arange(9) + top).clamp(0, 8), (torch.arange(7) + left).clamp(0, 6)
        assert torch.allclose(found[k], y[:, rows][:, :, columns], atol=1e-5)


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
def test_what_needs_a_prior_is_left_out_where_it_was_not_trained(paired, unpaired, mask, trained):
    dataset, args = toy(n=20), dict(paired=paired, unpaired=unpaired)
    dataset = dataset._replace(mask=None if mask is None else torch.tensor(mask))
    model = Perfect(SHAPES)
    every = evaluation.trained_priors(model, args, dataset)
    assert every == dataset.names  # a model without pseudo-samples
    model.pseudo = []
    assert evaluation.trained_priors(model, args, dataset) == trained
    metrics = evaluation.evaluate(model, toy(n=20), READERS, examples=5, samples=2, priors=trained)
    joint = ["mnist,svhn"] if trained == every else []
    known = [*trained, *joint, "mnist|svhn", "svhn|mnist"]
    assert list(metrics["log_likelihood"]) == known
    assert ("joint_coherence" in metrics) == bool(joint) and "cross_coherence" in metrics


def test_the_members_of_an_oracle_are_trained_one_by_one_on_draws_of_worn_images(monkeypatch):
    class Tiny(nn.Module):
        def __init__(self, channels):
            super().__init__()
            self.gain = nn.Parameter(torch.rand(channels))
            self.head = nn.Sequential(nn.Dropout(0.5), nn.Linear(channels, 10))

        def features(self, x):
            return self.gain * x.mean((2, 3))

        def forward(self, x):
            return self.head(self.features(x))

    labels, fits = torch.randint(10, (10_050,)), []
    digits = (25 * labels).byte()[:, None, None, None]
    split = data.Split([digits, digits.expand(-1, 3, 2, 2)], labels=labels)
    monkeypatch.setattr(oracles, "Classifier", Tiny)
    monkeypatch.setattr(oracles, "worn", lambda x: x + torch.rand(len(x), 3, 1, 1))
    monkeypatch.setattr(oracles.GaussianProcess, "fit", lambda self, *xs: fits.append(xs))
    view = oracles.each(("mnist", "svhn"))["svhn"]
    torch.manual_seed(1)
    found = oracles.train_oracle(split, view, steps=9)
    torch.manual_seed(0)
    replayed = oracles.Oracle(3)
    for member in replayed.members:
        optimizer = torch.optim.AdamW(member.parameters())
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.01, total_steps=9)
        for _ in range(9):
            index = torch.randint(10_050, (128,))
            optimizer.zero_grad()
            logits = member(split.take(1, index) + torch.rand(128, 3, 1, 1))
            F.cross_entropy(logits, split.labels[index]).backward()
            optimizer.step()
            schedule.step()
    for key, value in replayed.state_dict().items():
        assert torch.allclose(found.state_dict()[key], value, atol=1e-6)
    assert not found.training
    ((h, y, steps),) = fits  # the process on the first's features of 10,000 unworn images
    assert steps == 9 and len(h) == len(y) == 10_000 and y.bincount().min() > 800
    assert torch.allclose(h, found.members[0].gain * (y[:, None] * 25 / 255), atol=1e-4)


def test_an_oracle_is_kept_and_made_anew_when_the_images_change(tmp_path):
    dataset, path = toy(n=64), tmp_path / "oracles" / "mnist-svhn-mnist.pt"
    load = functools.partial(oracles.load_oracle, dataset, "mnist", tmp_path, steps=3)
    oracle, accuracy = load()
    made = path.stat().st_mtime_ns
    again, same = load()
    x = torch.rand(5, 1, 28, 28)
    assert path.stat().st_mtime_ns == made and same == accuracy
    assert torch.equal(oracle.members[2](x), again.members[2](x)) and not again.training
    dataset.train.bases[0][5, 0, 3, 3] += 1
    load()
    assert path.stat().st_mtime_ns != made
    path.write_bytes(path.read_bytes()[:100])
    load()
    assert len(path.read_bytes()) > 100 and load()[1] >= 0
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize(
    "name, n, steps, off, times",
    [
        ("grey", 1000, 40, 0.02, 2),
        pytest.param("grey", 10_000, None, 0.01, 4, marks=pytest.mark.slow),
        pytest.param("colour", 10_000, None, 0.01, 4, marks=pytest.mark.slow),
    ],
)
def test_an_oracle_s_process_reads_as_it_does_and_doubts_noise(
    name, n, steps, off, times, tmp_path
):
    train, test = glyphs(n, seed=0), glyphs(max(300, n // 10), seed=1)
    dataset = data.Dataset("glyphs", train, test, {}, ("grey", "colour"))
    oracle, accuracy = oracles.load_oracle(dataset, name, tmp_path, steps=steps)
    x, test_x = (s[torch.arange(len(s))][dataset.names.index(name)] for s in (train, test))
    if steps == 40:  # too few for the process
        oracle.process.fit(oracle.members[0].features(x).detach(), train.labels, steps=100)
    with torch.no_grad():
        guess = oracle.process(oracle.members[0].features(test_x))[0].argmax(-1)
        seen, noise = oracle.information(test_x), oracle.information(torch.rand_like(test_x))
    assert accuracy > 0.9 and abs((guess == test.labels).double().mean() - accuracy) < off
    assert seen.min() > -1e-6 and noise.max() < math.log(10)
    assert noise.mean() > times * seen.mean() and noise.min() > seen.median()


def process(points):
    """A Gaussian process of two classes, all of its parameters random, in float64."""
    found = oracles.GaussianProcess(3, classes=2, points=points).double()
    for parameter in found.parameters():
        parameter.data.normal_()
    return found


def kl_to_the_prior(some):
    """Σ_c KL( N(m_c, S_c S_c') || N(0, I) )"""
    root, points = some.root.tril(), len(some.inducing)
    q = MultivariateNormal(some.mean, scale_tril=root * root.diagonal(0, 1, 2).sign()[:, None])
    p = MultivariateNormal(torch.zeros(points).double(), torch.eye(points).double())
    return kl_divergence(q, p).sum()


@torch.no_grad()
def test_the_gaussian_process_predicts_by_its_formula_with_no_factor_transposed():
    """N(k_hZ K⁻¹ L m,  k_hh - k_hZ K⁻¹ k_Zh + k_hZ K⁻¹ L S S' L' K⁻¹ k_Zh),  K = k_ZZ = L L'"""
    some, h = process(4), torch.randn(7, 3).double()
    z, s2, l2 = some.inducing, some.log_scale.exp() ** 2, some.log_length.exp() ** 2

    def k(a, b):  # s² exp(-|a - b|² / 2l²)
        return s2 * torch.exp(-((a[:, None] - b) ** 2).sum(-1) / (2 * l2))

    assert torch.allclose(some.kernel(h, z), k(h, z))
    mean, std = some(h)
    kzz = k(z, z) + 1e-4 * s2 * torch.eye(4).double()  # the jitter
    factor = torch.linalg.cholesky(kzz)  # L
    gain = k(h, z) @ torch.linalg.inv(kzz)  # k_hZ K⁻¹
    for c in range(2):
        root = factor @ some.root[c].tril()  # L S
        cov = k(h, h) - gain @ k(z, h) + gain @ root @ root.T @ gain.T
        assert torch.allclose(mean[:, c], gain @ factor @ some.mean[c])
        assert torch.allclose(std[:, c], cov.diagonal().sqrt(), rtol=1e-4)
    some.log_scale.fill_(-9), some.root.zero_()
    assert some(z)[1].eq(1e-3).all()  # rounding must not leave a negative variance
    new = oracles.GaussianProcess(3)
    mean, std = new(h.float())
    assert new.mean.shape == (10, 100) and not mean.any()  # q is the prior
    assert torch.allclose(std, torch.full((7, 10), 3.0), atol=1e-3)


def test_the_process_s_elbo_is_n_times_the_mean_log_p_less_the_kl_of_its_gaussians():
    """N E_q(f)[ log softmax(f)_y ] - Σ_c KL( N(m_c, S_c S_c') || N(0, I) )"""
    some, h, y = process(4), torch.randn(7, 3).double(), torch.arange(7) % 2
    torch.manual_seed(3)
    found = some.elbo(h, y, 50)
    torch.manual_seed(3)
    mean, std = some(h)
    f = mean + std * torch.randn(5, 7, 2)  # five samples
    log_p = sum(f[k, b].softmax(0)[y[b]].log() for k in range(5) for b in range(7)) / (5 * 7)
    assert torch.isclose(found, 50 * log_p - kl_to_the_prior(some))
    assert torch.isclose(some.elbo(h, y, n=0), -kl_to_the_prior(some))


@torch.no_grad()
def test_information_is_the_entropy_of_the_mean_less_the_mean_entropy():
    """H[ E p(y|f) ] - E H[ p(y|f) ], over 100 samples of f"""
    oracle, x = oracles.Oracle(1).eval(), torch.rand(5, 1, 28, 28)
    oracle.process.mean.normal_()
    h = oracle.members[0].features(x)
    oracle.process.inducing.copy_(h[torch.arange(100) % 4] + torch.randn(100, 576))
    oracle.process.log_length.fill_(3)
    torch.manual_seed(1)
    found = oracle.information(x)
    torch.manual_seed(1)
    mean, std = oracle.process(h)
    p = (mean + std * torch.randn(100, 5, 10)).softmax(-1)
    expected = Categorical(p.mean(0)).entropy() - Categorical(p).entropy().mean(0)
    assert torch.allclose(found, expected, atol=1e-5) and found.max() > found.min() + 0.1


def test_the_process_is_fitted_from_training_features_by_adam_on_its_elbo():
    h, y = torch.randn(40, 3).double(), torch.arange(40) % 2
    for points in (50, 20):
        some, replayed = process(points), process(points)
        replayed.load_state_dict(some.state_dict())
        torch.manual_seed(2)
        some.fit(h, y, steps=3)
        torch.manual_seed(2)
        chosen = h[torch.randperm(40)[:points]]
        replayed.inducing.data[:40] = chosen  # the rest stay
        distances = [(a - b).norm() for a, b in itertools.combinations(chosen, 2)]
        replayed.log_length.data = torch.stack(distances).median().log()
        optimizer = torch.optim.Adam(replayed.parameters(), lr=0.01)
        for _ in range(3):
            index = torch.randint(40, (500,))
            optimizer.zero_grad()
            (-replayed.elbo(h[index], y[index], n=40) / 40).backward()
            optimizer.step()
        for key, value in replayed.state_dict().items():
            assert torch.allclose(some.state_dict()[key], value)
    some.fit(h / 1000, y, steps=0)
    assert some.log_length == 0  # at least 1


# ------------------------------------------------------------------------------------------- tables


def result(model="MEME", seed=0, paired=1.0, share=0.5, dataset="glyphs", **options):
    run = {"model": model, "dataset": dataset, "paired": paired, "unpaired": "split", "epochs": 5}
    run |= {"seed": seed, "out": f"somewhere/{seed}", "options": options, **options}
    metrics = {"cross_coherence": {"grey->colour": share}, "log_likelihood": {"grey": -123.44}}
    about = {"oracle": {"grey": 0.999}, "data": dataset, "run": run, "epoch": run["epochs"]}
    about |= {"minutes": 2 + seed, "samples": 1000, "examples": 100, "pseudo": True}
    return metrics | about


def test_the_table_is_mean_and_std_over_the_seeds():
    results = [result(seed=0, share=0.5), result(seed=1, share=0.7), result("MVAE", share=0.1)]
    text = evaluation.table(results)
    assert "| paired | unpaired | epochs | seeds | minutes | grey→colour | log p(grey) |\n" in text
    assert "\n| MEME | 1 | split | 5 | 2 | 2.5 | 0.600 ± 0.141 | -123.4 ± 0.0 |\n" in text
    assert "\n| MVAE | 1 | split | 5 | 1 | 2.0 | 0.100 | -123.4 |\n" in text
    assert "grey 0.999" in text and "pseudo-likelihood" in text and "K = 1,000" in text


def test_rows_stand_by_model_and_from_whole_pairs_down():
    found = [("MVAE", 0.25), ("MEME", 0.5), ("MVAE", 1), ("MEME", 1)]
    lines = evaluation.table([result(model, paired=f) for model, f in found]).splitlines()
    rows = [line.split(" | ")[:2] for line in lines if " | split | " in line]
    assert rows == [["| MVAE", "1"], ["| MVAE", "0.25"], ["| MEME", "1"], ["| MEME", "0.5"]]


def test_rows_are_named_after_the_options_that_differ():
    text = evaluation.table([result(kl="closed"), result(kl="sample"), result("MVAE", anneal=0)])
    assert "MEME kl=closed |" in text and "MEME kl=sample |" in text and "| MVAE |" in text
    assert "kl=" not in evaluation.table([result(kl="closed"), result(kl="closed", paired=0.5)])
    own, other = (result("VAEVAE", objective=o) for o in ("vaevae", "svae"))
    text = evaluation.table([other, own, result("MMVAE", objective="iwae")])
    assert re.findall(r"^\| (\S+) \| 1", text, re.M) == ["VAEVAE*", "VAEVAE", "MMVAE"]


def test_a_flag_that_is_not_set_is_none_that_a_run_is_too_old_for():
    text = evaluation.table([result(clip=None), result(seed=1), result(seed=2, clip=9.0)])
    assert re.findall(r"^\| (MEME.*?) \|", text, re.M) == ["MEME", "MEME clip=9.0"]
    assert "| 5 | 2 | 2.5 |" in text


def test_every_oracle_that_read_a_row_is_named():
    other = result("MVAE") | {"oracle": {"grey": 0.99}}
    text = evaluation.table([result(), result(seed=1), other])
    assert "oracles: grey 0.999; or grey 0.990.\n" in text


def test_the_share_in_dispute_stands_beside_its_number_and_above_5_percent_is_said():
    sure, unsure = ({"disputed": {"cross_coherence": {"grey->colour": s}}} for s in (0.01, 0.07))
    assert "| 0.500 (1.0%) |" in evaluation.table([result() | sure])
    assert "in doubt" not in evaluation.table([result() | sure])
    text = evaluation.table([result() | sure, result("MVAE") | unsure])
    assert "| 0.500 (7.0%) |" in text and "in doubt: grey→colour" in text
    assert "pseudo-samples" in evaluation.table([result() | {"prior": False}])


def test_missing_numbers_leave_a_dash():
    bare, broken = result(seed=3, paired=0.25), result(paired=0.5, share=math.nan)
    del bare["log_likelihood"]
    lines = evaluation.table([result(), bare, broken]).splitlines()
    assert "| MEME | 0.25 | split | 5 | 1 | 5.0 | 0.500 | – |" in lines
    assert "| MEME | 0.5 | split | 5 | 1 | 2.0 | – | -123.4 |" in lines
    assert json.loads(json.dumps(evaluation.finite(broken), allow_nan=False))


def test_the_papers_rows_stand_under_ours():
    run = result("SVAE", dataset="mnist-split")
    run["accuracy"] = {"top": 0.5, "bottom": 0.5, "both": 0.5}
    row = [x for x in evaluation.table([run], paper=True).splitlines() if "SVAE, paper" in x]
    assert row == ["| SVAE, paper | 1 |  |  |  |  |  | 0.872 | 0.816 | 0.948 |  |"]
    assert "paper" not in evaluation.table([run])
    run |= {"run": run["run"] | {"limit": 256}, "folder": "runs/few"}
    text = evaluation.table([run], paper=True)
    assert "SVAE, paper (other data)" in text and "first 256 examples only (--limit): few." in text


@pytest.mark.parametrize(
    "setting, shown",
    [
        (dict(), "MEME, paper 1 0.625 0.908"),
        (dict(paired=0.25), "MEME, paper 0.25 0.503 0.893"),
        (dict(paired=0.25, unpaired="mnist"), "MEME, paper 0.25 0.485 0.844"),
        (dict(paired=0.25, unpaired="none"), ""),  # in a figure alone
        (dict(paired=0.3), ""),
        (dict(options={"direction": "mnist"}), ""),
        (dict(model="MMVAE"), "MMVAE, paper 1 0.581 0.886"),
        (dict(model="MMVAE", options={"posterior": "laplace"}), "MMVAE, Laplace, paper 1 0.652 "),
        (dict(model="SVAE"), ""),
    ],
)
def test_the_papers_row_is_that_of_the_setting(setting, shown):
    run = result(dataset="mnist-svhn")["run"] | setting
    row = tables.paper_row(run, ["mnist→svhn", "latent mnist"])
    assert " ".join(row[:2] + row[6:]) == shown


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


def edit(name, change):
    return lambda run: (run / name).write_bytes(change((run / name).read_bytes()))


def swap(old, new):
    return edit("args.json", lambda content: content.replace(old, new))


DAMAGE = {
    "no folder": shutil.rmtree,
    "a file": lambda run: [shutil.rmtree(run), run.write_text("")],
    "nothing in it": lambda run: [shutil.rmtree(run), run.mkdir()],
    "no args": lambda run: (run / "args.json").unlink(),
    "no checkpoint": lambda run: (run / "checkpoint.pt").unlink(),
    "empty checkpoint": edit("checkpoint.pt", lambda content: b""),
    "cut checkpoint": edit("checkpoint.pt", lambda content: content[:1000]),
    "cut args": edit("args.json", lambda content: content[:40]),
    "args that are a list": edit("args.json", lambda content: b"[1]"),
    "args of a wrong type": swap(b'"paired": 1.0', b'"paired": "all"'),
    "args of another version": swap(b'"version": 1', b'"version": 2'),
    "args of another size": swap(b'"latent_dim": 4', b'"latent_dim": 5'),
    "args without options": swap(b'"options"', b'"choices"'),
    "args of an unknown script": swap(b'"mvae"', b'"nope"'),
    "args without data": swap(b"own.npz", b"gone.npz"),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_a_bad_run_is_one_sentence_and_the_others_are_evaluated(runs, capsys, how):
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


def test_without_matplotlib_the_table_is_printed_all_the_same(runs, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit):
        evaluate(runs[0], "--no-likelihoods", "--figures", tmp_path)
    out, err = capsys.readouterr()
    assert "MVAE on" in out and "pip install matplotlib" in err


@pytest.mark.parametrize("name", ["mnist-svhn", *nets.BANDS])
def test_grids_have_a_column_per_digit(name, tmp_path):
    dataset = toy(name)
    rows = evaluation.generations(Perfect([x.shape[1:] for x in dataset.test.bases]), dataset)
    assert len(rows) == {"mnist-svhn": 6, "mnist-split": 6, "mnist-split3": 14}[name]
    for label, images in rows:
        if "→" in label:  # generated: 0 to 9
            assert torch.allclose(255 * images[:, 0, 14, 14], 25 * torch.arange(10.0), atol=1e-3)
    pytest.importorskip("matplotlib")
    drawing.page(rows, "digits", tmp_path / "generation.png")
    assert Image.open(tmp_path / "generation.png").size[0] > 600


def test_models_stand_below_the_same_input():
    right = evaluation.generations(Perfect(SHAPES), toy())
    wrong = evaluation.generations(Perfect(SHAPES, lambda m, digit: 9 - digit), toy())
    rows = drawing.side_by_side({"A": right, "B": wrong})
    labels = ["mnist", "svhn, A", "svhn, B", "svhn", "mnist, A", "mnist, B"]
    assert [label for label, _ in rows] == labels
    assert torch.equal(rows[1][1], right[2][1]) and torch.equal(rows[2][1], wrong[2][1])
    assert not torch.equal(rows[1][1], rows[2][1])


def test_joint_samples_stand_beside_what_the_oracles_read(tmp_path):
    second = Perfect(SHAPES, lambda m, digit: digit if m == 0 else torch.full_like(digit, 3))
    rows, read = evaluation.joint_samples(second, toy(), READERS, columns=20, lines=2)
    assert [label for label, _ in rows] == ["mnist", "svhn"] * 2
    for (_, images), (digits, _) in zip(rows, read):
        assert torch.equal((255 * images[:, 0, 9, 9] / 25).round().long(), digits)
    (first, agree), (threes, same) = read[:2]
    assert (threes == 3).all() and torch.equal(agree, first == 3) and torch.equal(same, agree)
    assert evaluation.joint_samples(second, toy(), {})[1] is None
    pytest.importorskip("matplotlib")
    drawing.page(rows, "samples", tmp_path / "joint.png", read)
    assert (tmp_path / "joint.png").stat().st_size > 5000


def test_a_curve_has_a_line_per_model_setting_and_fraction(tmp_path, monkeypatch):
    plt = pytest.importorskip("matplotlib.pyplot")
    monkeypatch.setattr(plt, "close", lambda figure: None)

    def lines(results, **options):
        evaluation.curves(results, tmp_path, **options)
        ax = plt.gcf().axes[0]
        return {a.get_label(): (a.get_color(), *map(tuple, a.get_data())) for a in ax.lines}

    grid = itertools.product(("MEME", "MVAE"), (0, 2), (0.25, 1))
    found = lines([result(model, seed, f, f / 2 + seed / 100) for model, seed, f in grid])
    assert found["MEME split"] == (drawing.COLOURS["MEME"], (0.25, 1), (0.135, 0.51))
    assert found["MVAE split"][0] == drawing.COLOURS["MVAE"] and len(found) == 2
    runs = [(1.0, 0.7, "none", 5), (0.5, 0.6, "none", 5), (1.0, 0.9, "all", 5)]
    runs += [(0.5, 0.8, "all", 5), (0.5, 0.1, "all", 1), (0.5, 0.2, "split", 5)]
    found = lines([result("SVAE", 0, f, share, unpaired=u, epochs=e) for f, share, u, e in runs])
    assert {label: line[1:] for label, line in found.items()} == {
        "SVAE epoch=5 all": ((0.5, 1), (0.8, 0.9)),
        "SVAE epoch=1 all": ((0.5,), (0.1,)),
        "SVAE epoch=5 none": ((0.5, 1), (0.6, 0.7)),
        "SVAE epoch=5 split": ((0.5, 1), (0.2, 0.7)),  # the end is that of none
    }
    pseudo = [result(paired=f, share=f / n, pseudo_samples=n) for f in (0.25, 0.5) for n in (1, 10)]
    found = lines(pseudo, against="pseudo_samples")
    assert found["MEME split f = 0.25"][1:] == ((1, 10), (0.25, 0.025))
    assert found["MEME split f = 0.5"][1:] == ((1, 10), (0.5, 0.05))
    epochs = [result(share=0.1 * n, epochs=n) for n in (1, 2)]
    assert lines(epochs, against="epochs")["MEME split f = 1"][1:] == ((1, 2), (0.1, 0.2))
    for flag in ("spec", "nothing", "unpaired"):
        with pytest.raises(ValueError, match=f"--against {flag}"):
            lines(pseudo, against=flag)
    assert [*map(drawing.fraction, (0, 0.015625, 0.1, 0.5, 1, 30))] == "0 1/64 0.1 1/2 1 30".split()
    monkeypatch.undo()
    plt.close("all")
