"""The numpy functions of eval.py against other ways to compute them, and what they refuse."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributions import Normal

from eval import (
    cca,
    chance_correlation,
    correlation,
    correlations,
    linear_probe,
    logistic_regression,
    w2,
)
from helpers import ROOT

NUMPY_ALONE = """
import sys
for name in ("torch", "torchvision", "matplotlib", "scipy", "sklearn", "PIL"):
    sys.modules[name] = None
from eval import cca, chance_correlation, correlation, correlations, linear_probe, w2
import numpy as np
x = np.arange(12.0).reshape(6, 2) ** 2
fit = cca(x, x)
assert np.allclose(correlation(fit, x, x), 1) and chance_correlation(fit, x, x) < 1
assert correlations((x, x), {"same": (x, x)})["correlation"]["same"] > 0.999
assert linear_probe(x, [0, 0, 0, 1, 1, 1], x, [0, 0, 0, 1, 1, 0]) == 5 / 6
assert w2(0, 1, 3, 1) == 3 and "data" not in sys.modules
"""


def test_the_numpy_functions_need_numpy_alone():
    subprocess.run([sys.executable, "-c", NUMPY_ALONE], cwd=ROOT, check=True)


# --------------------------------------------------------------------------- canonical correlation


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
    fit = cca(x, y, k=3, ridge=0)
    assert np.allclose(fit.correlations, (0.9, 0.6, 0.3), atol=0.02)
    px, py = (x - fit.mean_x) @ fit.wx, (y - fit.mean_y) @ fit.wy
    assert np.allclose(np.cov(px.T), np.eye(3), atol=1e-8)
    assert np.allclose(np.cov(px.T, py.T)[:3, 3:], np.diag(fit.correlations), atol=1e-8)
    twice = np.hstack([10 * x, x[:, ::-1]])  # half of its directions have no variance
    for units in 1, 1e-7, 1e7:
        other = cca(units * twice, y / units, k=3, ridge=0)
        assert np.allclose(other.correlations, fit.correlations, atol=1e-6)


def test_cca_has_40_pairs_and_a_ridge_by_default():
    rng = np.random.default_rng(0)
    mix_x, mix_y = rng.standard_normal((8, 42)), rng.standard_normal((8, 45))
    shared, scale = rng.standard_normal((60, 8)), np.logspace(-1, 1, 45)
    x = shared @ mix_x + scale[:42] * rng.standard_normal((60, 42)) + 5
    y = shared @ mix_y + scale * rng.standard_normal((60, 45)) - 3
    fit = cca(x, y)
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


def test_the_ridge_depends_on_the_units_of_single_columns():
    x, y = planted(500, (0.9, 0.6))
    plain = cca(x, y, k=1).correlations
    assert np.allclose(cca(1000 * x, y / 1000, k=1).correlations, plain)
    one = x * [1, 1, 1, 1, 1000]
    assert abs(cca(one, y, k=1).correlations - plain) > 0.05
    bare = [cca(table, y, k=1, ridge=0).correlations for table in (x, one)]
    assert np.allclose(*bare)


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
    fit = cca(x, y, k=k, ridge=0, whiten=False)
    joint = np.vstack([fit.wx, fit.wy])
    assert np.allclose(np.linalg.norm(joint, axis=0), 1)
    assert np.allclose(np.abs((joint * vectors).sum(0)), 1, atol=1e-6)
    assert np.allclose(fit.correlations, values.real[order], atol=1e-6)


def test_pairs_beyond_the_rank_have_no_direction():
    x, y = planted(300, (0.9, 0.6), extra=0)
    y = y[:, :2]
    twice = np.hstack([x, x]), np.hstack([y, y])  # of rank 2
    for whiten in True, False:
        fit, full = cca(*twice, k=4, ridge=0, whiten=whiten), cca(x, y, k=2, whiten=whiten, ridge=0)
        assert len(fit.correlations) == 4 and np.allclose(fit.correlations[2:], 0, atol=1e-6)
        assert np.allclose(fit.correlations[:2], full.correlations)
        assert np.abs(fit.wx[:, 2:]).max() < 1e-6 * np.abs(fit.wx).max()


def test_correlation_is_a_cosine_centred_by_the_fit():
    x, y = planted(500, (0.9, 0.6))
    fit = cca(x, y, k=2)
    a, b = fit.wx.T @ (x[7] + 1 - x.mean(0)), fit.wy.T @ (y[7] + 2 - y.mean(0))
    expected = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
    assert np.isclose(correlation(fit, x[5:9] + 1, y[5:9] + 2)[2], expected)
    assert np.allclose(correlation(fit, x.tolist(), y.tolist()), correlation(fit, x, y))
    shuffled = correlation(fit, x, y[np.random.default_rng(0).permutation(500)])
    assert correlation(fit, x, y).mean() > 0.6 and abs(shuffled.mean()) < 0.1
    nothing = correlation(fit, fit.mean_x[None], y[:1])  # no direction: no correlation
    assert nothing == pytest.approx(0)


def test_correlations_are_means_of_eq_12_in_one_fit():
    x, y = planted(300, (0.9, 0.6), extra=43)
    fit, generated = cca(x, y), {"here": (x, y), "shifted": (x + 1, y[::-1] - 2)}
    metrics = correlations((x, y), generated)
    assert list(metrics) == ["correlation", "chance_correlation"]
    for name, (a, b) in generated.items():
        a, b = (a - x.mean(0)) @ fit.wx, (b - y.mean(0)) @ fit.wy  # 40 pairs of 45
        cosine = a @ b.T / np.outer(np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=1))
        assert metrics["correlation"][name] == pytest.approx(cosine.diagonal().mean())
        assert metrics["chance_correlation"][name] == pytest.approx(cosine.mean())
    cosines = [correlation(fit, np.tile(row, (7, 1)), y[:7]) for row in x[:9]]
    assert chance_correlation(fit, x[:9], y[:7]) == pytest.approx(np.mean(cosines))


# ------------------------------------------------------------------------------ Gaussian distances


def gaussians(d=4, n=2, seed=0):
    """Means (n, d) and covariances (n, d, d)."""
    rng = np.random.default_rng(seed)
    roots = rng.standard_normal((n, d, d))
    return rng.standard_normal((n, d)), roots @ np.swapaxes(roots, 1, 2)


def test_w2_of_numbers_is_the_distance_of_their_quantiles():
    """In one dimension W2² is the integral of (F1^-1(u) - F2^-1(u))²."""
    u = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    quantiles = [Normal(*parameters).icdf(u) for parameters in ((0.3, 0.5), (-1.0, 2.0))]
    expected = ((quantiles[0] - quantiles[1]) ** 2).mean().sqrt().item()
    assert w2(0.3, 0.5, -1.0, 2.0) == pytest.approx(expected, rel=1e-3)
    assert w2([0.3], [0.5], [-1.0], [2.0]) == pytest.approx(expected, rel=1e-3)
    assert w2([0.3], [[0.25]], [-1], [[4]]) == pytest.approx(expected, rel=1e-3)


def test_w2_of_covariances_has_the_trace_of_their_geometric_mean():
    (m1, m2), (s1, s2) = gaussians()
    product = np.linalg.eigvals(s1 @ s2)  # similar to Σ1^½ Σ2 Σ1^½
    squared = ((m1 - m2) ** 2).sum() + np.trace(s1 + s2) - 2 * np.sqrt(product.real).sum()
    assert w2(m1, s1, m2, s2) == pytest.approx(math.sqrt(squared))
    assert w2(m2, s2, m1, s1) == pytest.approx(math.sqrt(squared))
    sqrtm = pytest.importorskip("scipy.linalg").sqrtm
    root = sqrtm(s1)
    squared = ((m1 - m2) ** 2).sum() + np.trace(s1 + s2 - 2 * sqrtm(root @ s2 @ root)).real
    assert w2(m1, s1, m2, s2) == pytest.approx(math.sqrt(squared))


def test_w2_of_deviations_is_that_of_their_covariances():
    (m1, m2), _ = gaussians()
    std1, std2 = np.random.default_rng(1).random((2, 4))
    full = w2(m1, np.diag(std1**2), m2, np.diag(std2**2))
    assert w2(m1, std1, m2, std2) == pytest.approx(full)
    assert w2(m1, std1, m2, np.diag(std2**2)) == pytest.approx(full)  # one of each
    assert w2(m1, np.diag(std1**2), m2, std2) == pytest.approx(full)
    assert full == pytest.approx(math.sqrt(((m1 - m2) ** 2).sum() + ((std1 - std2) ** 2).sum()))
    assert w2(m1, std1, m1, std1) == 0
    assert w2(m1, std1, m1 + 3, std1) == pytest.approx(6)  # m1 - m2: a shift by 3 in 4-d
    assert w2(m1, std1, 0, 1) == pytest.approx(w2(m1, std1, np.zeros(4), np.ones(4)))
    assert w2(2, std1, 0, std2) == pytest.approx(w2(np.full(4, 2), std1, np.zeros(4), std2))
    assert w2([0, 0], [1, 1], [3, 4], [1, 1]) == w2(*torch.tensor([[0, 0], [1, 1], [3, 4], [1, 1]]))


def test_w2_of_singular_covariances_is_a_number():
    m = np.arange(4.0)
    line = np.outer(m, m)  # of rank 1: rounding may leave eigenvalues below 0
    assert w2(m, line, m, line) == pytest.approx(0, abs=1e-6)
    point = np.zeros((4, 4))  # the distance to a point is the root of the mean square
    assert w2(m, line, m, point) == pytest.approx(math.sqrt(np.trace(line)))


def test_w2_broadcasts_leading_axes():
    means, covariances = gaussians(n=3)
    d = w2(means[:, None], covariances[:, None], means, covariances)
    assert d.shape == (3, 3) and np.allclose(np.diag(d), 0, atol=1e-5)
    for i, j in (0, 1), (2, 0):
        pair = w2(means[i], covariances[i], means[j], covariances[j])
        assert d[i, j] == pytest.approx(pair)
    stds = np.abs(means) + 1
    d = w2(means[:, None], stds[:, None], means, stds)
    assert d[1, 2] == pytest.approx(w2(means[1], stds[1], means[2], stds[2]))
    shared = w2(means, stds[0], means[::-1], stds[0])  # one deviation for three means
    assert np.allclose(shared, np.linalg.norm(means - means[::-1], axis=1))


def test_open_scales_need_the_keyword():
    means, (scale, *_) = gaussians(n=4)
    scale = scale - 2 * scale.min() + 20 * np.eye(4)  # may be deviations and a covariance
    with pytest.raises(ValueError, match="covariance="):
        w2(means, scale, means[::-1], scale + np.eye(4))
    deviations = w2(means, scale, means[::-1], scale + np.eye(4), covariance=False)
    matrices = w2(means, scale, means[::-1], scale + np.eye(4), covariance=True)
    for k in range(4):
        expected = w2(means[k], scale[k], means[3 - k], scale[k] + np.eye(4)[k])
        assert deviations[k] == pytest.approx(expected)
        expected = w2(means[k], scale, means[3 - k], scale + np.eye(4))
        assert matrices[k] == pytest.approx(expected)
    assert not np.allclose(deviations, matrices, atol=0.01)
    several = w2(means[0], np.abs(means), means[0], 1, covariance=False)  # (4, 4) of one mean
    assert np.allclose(several, np.linalg.norm(np.abs(means) - 1, axis=1))


# ------------------------------------------------------------------------------------ linear probe


def blobs(n, seed=0, classes=4, dims=5):
    rng = np.random.default_rng(seed)
    y = rng.integers(classes, size=n)
    return rng.standard_normal((n, dims)) + np.eye(classes, dims)[y] * 1.5, y


def by_lbfgs(z, y, classes, l2):
    """Minimise mean cross entropy + l2/2 |A|² by torch's L-BFGS. -> loss, A (L, C), b (C,)"""
    z, y = torch.from_numpy(z), torch.from_numpy(y)
    a = torch.zeros(z.shape[1], classes, dtype=torch.float64, requires_grad=True)
    b = torch.zeros(classes, dtype=torch.float64, requires_grad=True)
    settings = {"max_iter": 200, "tolerance_grad": 1e-9, "line_search_fn": "strong_wolfe"}
    solver = torch.optim.LBFGS([a, b], **settings)

    def loss():
        solver.zero_grad()
        value = nn.functional.cross_entropy(z @ a + b, y) + 0.5 * l2 * (a**2).sum()
        value.backward()
        return value

    solver.step(loss)
    return loss().item(), a.detach().numpy(), b.detach().numpy()


def test_logistic_regression_agrees_with_lbfgs():
    z, y = blobs(1000)
    w = logistic_regression(z, y, 4, l2=1e-3)
    loss, a, b = by_lbfgs(z, y, 4, l2=1e-3)
    assert np.allclose(w[:-1], a, atol=1e-3)
    assert np.allclose(w[-1] - w[-1].mean(), b - b.mean(), atol=1e-3)
    log_p = torch.from_numpy(z @ w[:-1] + w[-1]).log_softmax(1).numpy()[np.arange(1000), y]
    assert -log_p.mean() + 0.5e-3 * (w[:-1] ** 2).sum() == pytest.approx(loss, abs=1e-8)


def gradient(z, y, w, l2):
    """1/N Σ_n z_n (softmax(W'z_n) - 1[y_n])' + l2 W, the biases without their l2."""
    p = torch.from_numpy(z @ w[:-1] + w[-1]).softmax(1).numpy() - np.eye(4)[y]
    return np.vstack([z.T @ p / len(z) + l2 * w[:-1], p.mean(0)])


def test_the_gradient_of_the_default_logistic_regression_vanishes():
    z, y = blobs(300)
    w = logistic_regression(z, y, 4)
    assert np.abs(gradient(z, y, w, 1e-4)).max() < 1e-6
    assert not logistic_regression(z, y, 4, tolerance=9).any()  # no step, W = 0


@pytest.mark.parametrize("l2, width", [(1e-4, 0.1), (1e-8, 0.1), (1e-8, 0.9)])
def test_logistic_regression_converges_on_separable_classes(l2, width):
    z = np.repeat(np.arange(4.0), 50)[:, None] + np.tile([0, width], 100)[:, None]
    z[-1] += 3  # so that logits reach a thousand
    y = np.repeat(np.arange(4), 50)
    w = logistic_regression(z, y, 4, l2=l2)
    assert ((z @ w[:-1] + w[-1]).argmax(1) == y).all()
    assert np.abs(gradient(z, y, w, l2)).max() < 1e-5


def probe_data():
    """Training and test rows of different means and scales; labels 3, 7, 8, 9."""
    (z, y), (test_z, test_y) = blobs(300), blobs(200, seed=1)
    scale, labels = np.array([1, 1e-3, 30, 2, 1]), np.array([3, 7, 8, 9])
    test_z = test_z * [0.3, 1, 4, 1, 2] + 0.5
    return z * scale + 5, labels[y], test_z * scale + 5, labels[test_y]


@pytest.mark.parametrize("l2", [1e-4, 0.3])
def test_the_probe_standardises_by_the_training_rows(l2):
    train_z, train_y, test_z, test_y = probe_data()
    mean, std = train_z.mean(0), train_z.std(0)
    index = np.searchsorted([3, 7, 8, 9], train_y)
    _, a, b = by_lbfgs((train_z - mean) / std, index, 4, l2)
    prediction = np.array([3, 7, 8, 9])[((test_z - mean) / std @ a + b).argmax(1)]
    accuracy = (prediction == test_y).mean()
    assert 0.4 < accuracy < 0.9
    more = {} if l2 == 1e-4 else {"l2": l2}  # the default
    assert linear_probe(train_z, train_y, test_z, test_y, **more) == pytest.approx(accuracy)


TEXT = np.array(["", "", "", "three", "", "", "", "seven", "8", "nine"])
FORMS = {
    "lists": lambda z, y: (z.tolist(), y.tolist()),
    "columns": lambda z, y: (z, y[:, None]),
    "tensors": lambda z, y: (torch.from_numpy(z), torch.from_numpy(y)),
    "floats": lambda z, y: (z, y.astype("f4")),
    "objects": lambda z, y: (z.astype(object), y.astype(object)),
    "text": lambda z, y: (z, TEXT[y]),
    "a column of text": lambda z, y: (z, TEXT[y].astype(object)[:, None]),
}


@pytest.mark.parametrize("form", FORMS)
def test_labels_may_be_numbers_text_or_a_column(form):
    train_z, train_y, test_z, test_y = probe_data()
    plain = linear_probe(train_z, train_y, test_z, test_y)
    train, test = FORMS[form](train_z, train_y), FORMS[form](test_z, test_y)
    assert linear_probe(*train, *test) == plain
    if form in ("columns", "floats", "objects"):
        assert linear_probe(train_z, train_y, *test) == plain


def test_labels_may_be_booleans():
    train_z, train_y, test_z, test_y = probe_data()
    plain = linear_probe(train_z, train_y // 8, test_z, test_y // 8)
    assert linear_probe(train_z, train_y > 7, test_z, test_y > 7) == plain


def test_a_test_label_that_training_lacks_is_an_error():
    train_z, train_y, test_z, test_y = probe_data()
    accuracy, missing = linear_probe(train_z, train_y, test_z, test_y), test_y.copy()
    right = [linear_probe(train_z, train_y, test_z[k : k + 1], test_y[k : k + 1]) for k in (0, 1)]
    missing[:2] = 100
    expected = accuracy - sum(right) / len(test_y)
    assert linear_probe(train_z, train_y, test_z, missing) == pytest.approx(expected)


@pytest.mark.parametrize("constant", [0, 0.1, 1e6])
def test_a_constant_training_column_is_ignored(constant):
    train_z, train_y, test_z, test_y = probe_data()
    more = np.full((300, 1), constant), np.linspace(-9, 9, 200)[:, None]
    both = np.hstack([train_z, more[0]]), train_y, np.hstack([test_z, more[1]]), test_y
    assert linear_probe(*both) == linear_probe(train_z, train_y, test_z, test_y)


# ---------------------------------------------------------------- arguments that do not make sense

X, Y = planted(50, (0.9,))  # (50, 4), (50, 6)
FIT = cca(X, Y, k=2)
Z = probe_data()
HOLE = np.where(np.arange(200).reshape(50, 4) == 7, np.nan, X)
STD = np.abs(X)


def probe(**changed):
    return linear_probe(**dict(zip(("train_z", "train_y", "test_z", "test_y"), Z)) | changed)


REFUSED = {
    "x.*NaN": [
        lambda: cca(HOLE, Y),
        lambda: cca(np.where(np.isnan(HOLE), np.inf, HOLE), Y),
        lambda: cca(np.ma.masked_invalid(HOLE), Y),
        lambda: cca([[None], [1]], Y[:2]),
        lambda: correlation(FIT, HOLE, Y),
        lambda: chance_correlation(FIT, HOLE, Y),
    ],
    "y.*NaN": [
        lambda: cca(Y, HOLE),
        lambda: correlation(cca(Y, X), Y, HOLE),
        lambda: chance_correlation(cca(Y, X), Y, HOLE),
    ],
    "x must be an array of numbers": [
        lambda: cca([["a", "b"], ["c", "d"]], Y[:2]),
        lambda: cca([[1, 2], [3]], Y[:2]),
        lambda: cca(torch.from_numpy(X).requires_grad_(), Y),
    ],
    "x must have the shape": [
        lambda: cca(X[:, 0], Y),
        lambda: cca(X[:0], Y[:0]),
        lambda: cca(X[None], Y[None]),
        lambda: correlation(FIT, X[:, :1], Y),  # would be broadcast
        lambda: correlation(FIT, X[0], Y[0]),
        lambda: correlation(FIT, X[:0], Y[:0]),
        lambda: chance_correlation(FIT, X[:, :1], Y),
        lambda: chance_correlation(FIT, X[:0], Y),
    ],
    "y must have the shape": [
        lambda: cca(X, Y[:40]),
        lambda: correlation(FIT, X[:1], Y),
        lambda: correlation(FIT, X, Y[:, :1]),
        lambda: chance_correlation(FIT, X, X),
    ],
    "two different rows": [
        lambda: cca(X[:1], Y[:1]),
        lambda: cca(np.full((50, 3), 0.1), Y),
        lambda: cca(X, np.full((50, 3), 0.1)),
    ],
    "k must be": [lambda: cca(X, Y, k=0), lambda: cca(X, Y, k=2.5), lambda: cca(X, Y, k="many")],
    "ridge 0 or more": [lambda: cca(X, Y, ridge=-1)],
    "ridge must": [lambda: cca(X, Y, ridge=np.nan), lambda: cca(X, Y, ridge=[1, 2])],
    "train_z.*NaN": [lambda: probe(train_z=np.where(Z[0] > Z[0].min(), Z[0], np.nan))],
    "test_z.*NaN": [lambda: probe(test_z=np.where(Z[2] > Z[2].min(), Z[2], np.nan))],
    "train_z must have the shape": [lambda: probe(train_z=Z[0][:, 0])],
    "test_z must have the shape": [
        lambda: probe(test_z=Z[2][:, :1]),
        lambda: probe(test_z=Z[2][:0], test_y=[]),
    ],
    "train_y.*label for each": [
        lambda: probe(train_y=Z[1][:-1]),
        lambda: probe(train_y=Z[1][None]),
        lambda: probe(train_y=np.eye(10)[Z[1]]),
    ],
    "test_y.*label for each": [
        lambda: probe(test_y=Z[3][:-1]),
        lambda: probe(test_y=Z[3][0]),
        lambda: probe(test_y=np.eye(10)[Z[3]]),
    ],
    "train_y.*(NaN|number)": [
        lambda: probe(train_y=np.where(Z[1] == 3, np.nan, Z[1])),
        lambda: probe(train_y=np.where(Z[1] == 3, None, Z[1])),
        lambda: probe(train_y=np.where(Z[1] == 3, np.nan, TEXT[Z[1]].astype(object))),
        lambda: probe(train_y=np.ma.masked_equal(Z[1], 3)),
    ],
    "train_y must hold classes": [lambda: probe(train_y=Z[0][:, 0])],
    "at least two classes, not 1": [
        lambda: probe(train_y=0 * Z[1]),
        lambda: probe(train_z=Z[0][:1], train_y=Z[1][:1]),
    ],
    "both be text": [lambda: probe(train_y=TEXT[Z[1]]), lambda: probe(test_y=TEXT[Z[3]])],
    "l2 must": [lambda: probe(l2=-1), lambda: probe(l2=np.nan), lambda: probe(l2="none")],
    "mean1.*NaN": [lambda: w2(HOLE, STD, X, STD)],
    "scale2.*NaN": [lambda: w2(X, STD, X, np.abs(HOLE))],
    "last axes": [lambda: w2(X, STD, X[:, :1], STD[:, :1]), lambda: w2(X, STD[:, :1], X, STD)],
    "could not be broadcast": [
        lambda: w2(X, STD, X[:3], STD[:3]),
        lambda: w2(X[0], np.stack([np.eye(4)] * 3), X[0], np.stack([np.eye(4)] * 2)),
    ],
    "scale1.*negative": [
        lambda: w2(X, X - 9, X, STD),
        lambda: w2(X[0], np.eye(4) - 0.4, X[0], np.eye(4)),  # not positive definite
    ],
    "scale2.*symmetric": [lambda: w2(X[0], np.eye(4), X[0], np.tril(np.ones((4, 4))))],
    "scale1 must have the shape": [
        lambda: w2(X[0], STD, X[0], STD[0]),  # 50 deviations of one mean: by covariance=False
        lambda: w2(X, STD, X, STD, covariance=True),
    ],
    "scale1.*covariance=": [
        lambda: w2(X[:4], np.eye(4), X[0], np.eye(4)),
        lambda: w2(X, np.eye(4), X, STD),
    ],
    "scale2.*covariance=": [lambda: w2(X[0], np.eye(4), X[:4], STD[:4])],
}


@pytest.mark.parametrize("sentence", REFUSED)
def test_arguments_without_a_meaning_are_one_sentence(sentence):
    for call in REFUSED[sentence]:
        with pytest.raises(ValueError, match=sentence) as error:
            call()
        assert "\n" not in str(error.value)
