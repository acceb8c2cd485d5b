"""Metrics against their definitions, oracles, tables, figures and the command of eval.py."""

import functools
import itertools
import json
import math
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.distributions import Independent, MultivariateNormal, Normal, kl_divergence

import data
import eval as evaluation
import nets
from benchmarks import drawing, oracles
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


def test_correlation_is_the_cosine_of_eq_12():
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


@pytest.mark.parametrize("l2", [1e-4, 1e-8])
def test_logistic_regression_converges_on_separable_classes(l2):
    z = np.repeat(np.arange(4.0), 50)[:, None] + np.tile([0, 0.1], 100)[:, None]
    y = np.repeat(np.arange(4), 50)
    w = evaluation.logistic_regression(z, y, 4, l2=l2)
    assert ((z @ w[:-1] + w[-1]).argmax(1) == y).all()


def test_linear_probe_is_accurate_on_blobs_and_at_chance_on_noise():
    (z, y), (test_z, test_y) = blobs(4000), blobs(4000, seed=1)
    centres = np.eye(4, 5) * 1.5
    bayes = (((test_z[:, None] - centres) ** 2).sum(-1).argmin(1) == test_y).mean()
    assert abs(evaluation.linear_probe(z, y, test_z, test_y) - bayes) < 0.01
    scaled = evaluation.linear_probe(z * 1e-3 + 7, y + 3, test_z * 1e-3 + 7, test_y + 3)
    assert abs(scaled - bayes) < 0.01
    mean, std, shifted = z.mean(0), z.std(0), test_z + np.eye(5)[0]
    w = evaluation.logistic_regression((z - mean) / std, y, 4)
    right = (((shifted - mean) / std @ w[:-1] + w[-1]).argmax(1) == test_y).mean()
    assert evaluation.linear_probe(z, y, shifted, test_y) == right < bayes - 0.05
    noise = np.random.default_rng(2).standard_normal(z.shape)
    assert evaluation.linear_probe(noise, y, noise[::-1], y) < 0.3
    constant = np.hstack([z, np.ones((4000, 1))])
    assert abs(evaluation.linear_probe(constant, y, constant, y) - bayes) < 0.02


# ----------------- metrics of models that decode what they like, of images that spell their label


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
            assert given is None or [x is None for x in given] == [x is not None for x in xs]
            assert samples * sum(x.numel() for x in seen) <= 2**20
            sizes.append(samples * len(seen[0]))
            return torch.full((len(seen[0]),), math.log(samples))  # a block's mean of w is its size

    found = evaluation.log_likelihood(Counting(SHAPES), toy(), examples=25, samples=1000)
    assert sum(sizes) == 5 * 25 * 1000
    mean_w = (341**2 + 341**2 + 318**2) / 1000  # blocks of 2^20 / 3072 samples
    assert found["log_likelihood"]["svhn"] == pytest.approx(math.log(mean_w))
    assert found["log_likelihood"]["mnist"] == pytest.approx(math.log(1000))


def test_entropy_tells_a_constant_model_from_a_coherent_one():
    constant = Perfect(SHAPES, lambda m, digit: torch.ones_like(digit))
    metrics, _ = evaluation.joint_coherence(constant, toy(), READERS, samples=1000)
    assert metrics == {"joint_coherence": 1, "joint_entropy": 0}
    cross = evaluation.coherence(constant, toy(), READERS)[0]["cross_coherence"]
    assert all(0.05 < share < 0.15 for share in cross.values())


def test_coherence_names_its_direction():
    only_svhn = Perfect(SHAPES, lambda m, digit: digit if m == 1 else 0 * digit)
    metrics, _ = evaluation.coherence(only_svhn, toy(), READERS)
    cross, own = metrics["cross_coherence"], metrics["self_coherence"]
    assert cross["mnist->svhn"] == 1 > cross["svhn->mnist"] and own["svhn"] == 1 > own["mnist"]
    joint, _ = evaluation.joint_coherence(only_svhn, toy(), READERS, samples=2000)
    assert joint["joint_coherence"] < 0.15 and joint["joint_entropy"] == 0


def test_the_probe_is_fitted_on_what_is_observed_alone():
    dataset, mask = toy(), torch.ones(600, 2, dtype=torch.bool)
    mask[200:, 0] = False
    wrong = (dataset.train.labels[200:] + 1) % 10
    dataset.train.bases[0][200:] = 25 * wrong.byte()[:, None, None, None]
    share = evaluation.latent_accuracy(Perfect(SHAPES), dataset._replace(mask=mask))
    assert min(share["latent_accuracy"].values()) > 0.99
    assert evaluation.latent_accuracy(Perfect(SHAPES), dataset)["latent_accuracy"]["mnist"] < 0.9


@pytest.mark.parametrize("name", nets.BANDS)
def test_every_subset_of_the_parts_is_a_condition(name):
    dataset, three = toy(name), "top middle bottom top+middle top+bottom middle+bottom all"
    model = Perfect([x.shape[1:] for x in dataset.test.bases])
    metrics, disputed = evaluation.split_accuracy(model, dataset, {"image": Reader(7)})
    accuracy, sevens = metrics["accuracy"], (dataset.test.labels == 7).double().mean()
    assert disputed["accuracy"] == pytest.approx(dict.fromkeys(accuracy, sevens.item()))
    conditions = "top bottom both" if name == "mnist-split" else three
    assert list(accuracy) == conditions.split() and set(accuracy.values()) == {1}


def test_evaluation_is_a_function_of_the_seed():
    class Noisy(Perfect):
        def posterior(self, *xs):
            q = super().posterior(*xs)
            return Independent(Normal(q.mean, torch.ones_like(q.mean)), 1)

    dataset = toy(n=100)
    a, b, c = (evaluation.evaluate(Noisy(SHAPES), dataset, READERS, 0, seed=s) for s in (0, 0, 1))
    assert a == b != c


def test_the_share_in_dispute_is_that_of_its_number():
    dataset, judges = toy(), {"mnist": Reader(), "svhn": Reader(7)}
    model = Perfect(SHAPES, lambda m, digit: digit if m == 0 else 9 - digit)  # SVHN shows 9 - x
    _, disputed = evaluation.coherence(model, dataset, judges)
    share = {k: (dataset.test.labels == k).double().mean().item() for k in (2, 7)}
    assert disputed["cross_coherence"] == pytest.approx({"mnist->svhn": share[2], "svhn->mnist": 0})
    assert disputed["self_coherence"] == pytest.approx({"mnist": 0, "svhn": share[2]})
    _, disputed = evaluation.joint_coherence(model, dataset, judges, samples=2000)
    assert abs(disputed["joint_coherence"] - 0.1) < 0.03


def test_an_oracle_reads_its_members_mean_and_tells_where_they_differ():
    class Says(nn.Module):
        def __init__(self, p):
            super().__init__()
            self.logits = torch.tensor(p).log()

        def forward(self, x):
            return self.logits

    oracle = oracles.Oracle(1)
    one, other = [0.6, 0.4, 0.0], [0.1, 0.9, 0.0]  # the mean of the two is for the second digit
    oracle.members = nn.ModuleList([Says([one, one]), Says([other, one]), Says([one, one])])
    digits, disputed = oracle(None)
    assert digits.tolist() == [1, 0] and disputed.tolist() == [True, False]


def test_worn_images_are_blurred_pale_and_of_other_colours():
    x = torch.zeros(200, 3, 32, 32)
    x[:, 0, 12:20, 15:17] = 1  # a red stroke, two pixels wide
    y = oracles.worn(x)
    assert y.shape == x.shape
    assert y.amax((1, 2, 3)).median() < 0.8  # blurred and pale
    colour = (y.amax(1) - y.amin(1)).amax((1, 2))
    assert colour.min() < 0.3 < 0.4 < colour.max()  # grey to red, green or blue
    weights = oracles.smoothing(9, torch.tensor([0.2, 2.0]).view(2, 1, 1, 1))
    assert weights.sum(-1) == pytest.approx(torch.ones(2, 1, 9))
    assert weights[1, 0, 4, 6] / weights[1, 0, 4, 4] == pytest.approx(math.exp(-0.5))


@pytest.mark.parametrize(
    "paired, unpaired, mask, trained",
    [
        (1, "split", None, False),
        (1, "all", None, True),
        (0.5, "none", None, False),
        (0.5, "split", None, True),
        (1, "split", [[True, True]], False),
        (1, "split", [[True, True], [False, True]], True),
    ],
)
def test_what_needs_a_prior_is_left_out_where_it_was_not_trained(paired, unpaired, mask, trained):
    dataset, args = toy(n=20), dict(paired=paired, unpaired=unpaired)
    dataset = dataset._replace(mask=None if mask is None else torch.tensor(mask))
    model = Perfect(SHAPES)
    assert evaluation.has_prior(model, args, dataset)  # a model without pseudo-samples
    model.pseudo = []
    assert evaluation.has_prior(model, args, dataset) == trained
    metrics = evaluation.evaluate(model, toy(n=20), READERS, examples=5, samples=2, prior=trained)
    assert ("joint_coherence" in metrics) == trained == ("mnist" in metrics["log_likelihood"])
    assert "mnist|svhn" in metrics["log_likelihood"] and "cross_coherence" in metrics


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
    """A Gaussian process of two classes whose inducing points are random."""
    found = oracles.GaussianProcess(3, classes=2, points=points)
    found.inducing.data.normal_()
    return found


def test_the_gaussian_process_starts_at_its_prior_and_has_the_kl_of_its_gaussians():
    some, h, y = process(4), torch.randn(7, 3), torch.zeros(7).long()
    mean, std = some(h)
    assert torch.allclose(mean, torch.zeros(7, 2))
    assert torch.allclose(std, torch.full((7, 2), 3.0), atol=1e-3)
    assert some.elbo(h, y, n=0).abs() < 1e-5  # n = 0 leaves the KL, which is zero at the prior
    some.mean.data.normal_(), some.root.data.normal_()
    root = some.root.tril().detach()
    q = MultivariateNormal(some.mean.detach(), root @ root.mT)
    kl = kl_divergence(q, MultivariateNormal(torch.zeros(4), torch.eye(4))).sum()
    assert torch.isclose(-some.elbo(h, y, n=0), kl, rtol=1e-3)


def test_information_is_what_samples_of_the_process_disagree_on():
    sure = process(5)
    sure.root.data *= 1e-3  # f is known to be 0 at the inducing points: p = 1/2, nothing to learn
    known, unknown = sure.inducing.detach(), torch.full((5, 3), 50.0)
    with torch.no_grad():
        assert sure.information(known).abs().max() < 1e-2
        assert sure.information(unknown).min() > 0.2  # f ~ N(0, 9), each sample is certain


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


def test_rows_are_named_after_the_options_that_differ():
    text = evaluation.table([result(kl="closed"), result(kl="sample"), result("MVAE", anneal=0)])
    assert "MEME kl=closed |" in text and "MEME kl=sample |" in text and "| MVAE |" in text
    assert "kl=" not in evaluation.table([result(kl="closed"), result(kl="closed", paired=0.5)])


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
    row = evaluation.paper_row(run, ["mnist→svhn", "latent mnist"])
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
    of_runs = {f"run{k}-{what}.png" for k in range(3) for what in ("latent", "relatedness")}
    assert {p.name for p in (tmp_path / "figures").iterdir()} == {"own-paired.png"} | of_runs


def test_without_matplotlib_the_table_is_printed_all_the_same(runs, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit):
        evaluate(runs[0], "--no-likelihoods", "--figures", tmp_path)
    out, err = capsys.readouterr()
    assert "| MVAE |" in out and "pip install matplotlib" in err


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
    monkeypatch.undo()
    plt.close("all")
