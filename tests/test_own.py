"""evaluation/own.py: how well the modalities of a user's own arrays are predicted."""

import itertools
import math
from functools import partial

import numpy as np
import pytest
import torch
from torch import distributions as dist

import data
import mvae
import nets
from eval import BUDGET, corrected_samples
from evaluation import own
from loaders import arrays

# ------------------------------------------------------------------------ a model that is exact


class Exact(torch.nn.Module):
    """x_m = z W_m + noise, with the exact posterior of two-dimensional z given observed entries."""

    resamples = False

    def __init__(self, modalities, noise=0.7):
        super().__init__()
        self.modalities, self.latent_dim, self.noise = modalities, 2, noise
        generator = torch.Generator().manual_seed(1)
        self.weights = torch.nn.ParameterList(
            torch.randn(2, *m.shape, generator=generator) for m in modalities
        )
        self.requires_grad_(False)
        self.decoders = [partial(self.parameter, weight) for weight in self.weights]

    def parameter(self, weight, z):
        mean = z @ weight
        return torch.stack([mean, torch.full_like(mean, math.log(self.noise))], -1)

    def prior(self, *xs):
        return dist.Independent(dist.Normal(torch.zeros(2), torch.ones(2)), 1)

    def posterior(self, *xs):
        n = next(len(x) for x in xs if x is not None)
        precision, pull = torch.eye(2).repeat(n, 1, 1), torch.zeros(n, 2)
        for x, weight in zip(xs, self.weights):
            if x is not None:
                present = (~x.isnan()).float() / self.noise**2
                precision = precision + torch.einsum("nd,id,jd->nij", present, weight, weight)
                pull = pull + (present * x.nan_to_num(0.0)) @ weight.T
        mean = torch.linalg.solve(precision, pull[..., None])[..., 0]
        return dist.MultivariateNormal(mean, precision_matrix=precision)

    def examples(self, n, seed):
        """n examples of every modality, as a split."""
        torch.manual_seed(seed)
        z = torch.randn(n, 2)
        return data.Split(
            [x + self.noise * torch.randn_like(x) for x in (z @ w for w in self.weights)]
        )


def exact(widths, n=400, mean=0.0, std=1.0, **more):
    """-> the model; a data set of it with n training and n test examples, standardised from this
    mean and deviation. more: of the Dataset"""
    facts = {"kind": "numbers", "likelihood": "normal"}
    spec = {"name": "npz", "arrays": {}}
    for k, width in enumerate(widths):
        stats = {"mean": [mean] * width, "std": [std] * width}
        spec["arrays"][f"x{k}"] = facts | {"shape": [width], "stats": stats}
    model = Exact(nets.modalities(**spec))
    splits = model.examples(n, 2), model.examples(n, 3)
    return model, data.Dataset("x.npz", *splits, spec, tuple(spec["arrays"]), **more)


def r2(x, prediction):
    """R² of each feature over the rows in which it is present."""
    prediction = np.where(np.isnan(x), np.nan, prediction)
    return 1 - np.nansum((x - prediction) ** 2, 0) / np.nansum((x - np.nanmean(x, 0)) ** 2, 0)


# ------------------------------------------------------------------------ arrays of every kind

KINDS = "picture", "floats", "bits", "counts", "kind"


def examples(n, seed, shift=0.0):
    """One array of every kind, which depend on two numbers a and b: pictures as bytes, floats of
    sizes from 1e-3 to 1000, bits, counts, four classes; sorted by a. shift: the mean of a and b."""
    rng = np.random.default_rng(seed)
    a, b = shift + rng.normal(size=(2, n))
    a.sort()
    grid = np.mgrid[:8, :10]
    spot = np.exp(-((grid[0] - 4 - 2 * np.tanh(a)[:, None, None]) ** 2) / 4)
    numbers = np.stack([a, b, a + b, a - b], 1) + 0.3 * rng.normal(size=(n, 4))
    return {
        "picture": (250 * spot).astype(np.uint8),
        "floats": numbers * (300, 1e-3, 1, 1) + (1000, 0, 0, 5),
        "bits": np.stack([a, b, -a], 1) > 0,
        "counts": rng.poisson(np.exp(1 + 0.5 * np.stack([a, b], 1))),
        "kind": 2 * (a > 0) + (b > 0),
        "labels": (a > 0).astype(int),
    }


def mask_of(n, seed, share=0.8):
    """Random rows that each show something; the first three show all, one, all but one."""
    mask = np.random.default_rng(seed).random((n, 5)) < share
    mask[:3] = [[1, 1, 1, 1, 1], [0, 0, 1, 0, 0], [1, 1, 1, 0, 1]]
    mask[~mask.any(1), 3] = True
    return mask


def archive(path, n=160, masks=True):
    """An .npz of all kinds. The splits have other means, a test set of more than one batch that is
    sorted, missing entries, and hidden rows that hold other values. -> its arrays"""
    kept = {}
    for part, n, seed, shift in (("train", n, 0, 0.0), ("test", 180, 1, 0.4)):
        x = examples(n, seed, shift)
        rng = np.random.default_rng(seed + 5)
        x["floats"][rng.random((n, 4)) < 0.1] = np.nan
        mask = mask_of(n, seed + 3) if masks else np.ones((n, 5), bool)
        for m, name in enumerate(KINDS):
            x[name][~mask[:, m]] = x[name][::-1][~mask[:, m]]
        kept |= {f"{part}_{name}": x[name] for name in (*KINDS, "labels")} | {f"{part}_mask": mask}
    np.savez(path, **kept)
    return kept


def untrained(dataset, factor=3.0):
    """An MVAE with large random weights, so that its predictions differ from row to row; images
    have small networks."""
    torch.manual_seed(0)
    modalities = [
        m._replace(
            encoder=partial(nets.mlp_encoder, (math.prod(m.shape), 16)),
            decoder=partial(nets.mlp_decoder, (16, math.prod(m.shape)), m.shape),
        )
        if len(m.shape) == 3
        else m
        for m in nets.modalities(**dataset.spec)
    ]
    model = mvae.MVAE(modalities, 4).eval().requires_grad_(False)
    for m, modality in enumerate(modalities):
        parameters = list(model.encoders[m].parameters())
        if modality.kind != "counts":  # their rates are exponentials
            parameters += model.decoders[m].parameters()
        for weight in parameters:
            if weight.ndim > 1:
                weight.mul_(factor)
    return model


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """-> arrays of an .npz, its data set, a model"""
    path = tmp_path_factory.mktemp("own") / "own.npz"
    kept = archive(path)
    dataset = arrays.load(path)
    return kept, dataset, untrained(dataset)


@pytest.fixture(scope="module")
def metrics(mixed):
    return own.evaluate(mixed[2], mixed[1], seed=3)


def inputs_of(source, target):
    """The mask of a source of own.evaluate."""
    if source == "the others":
        return [name != target for name in KINDS]
    return [name == source for name in KINDS]


def regenerated(model, dataset, mask, rows, m, seed):
    """Modality m of these test rows from the modalities in `mask`, by the definitions.
    -> its decoder's parameters (50, N, ...)"""
    torch.manual_seed(seed)
    z = []
    for index in rows.split(100):
        xs = data.select(dataset.test, mask, index)
        z.append(corrected_samples(model, xs, model.posterior(*xs), 50))
    return model.decoders[m](torch.cat(z, 1))


def density(name, parameter, x):
    """log p(x|z) by torch.distributions, without NaN. -> (50, N)"""
    if name == "picture":
        return dist.Bernoulli(logits=parameter, validate_args=False).log_prob(x).sum((-3, -2, -1))
    if name == "floats":
        log_p = dist.Normal(parameter[..., 0], parameter[..., 1].exp()).log_prob(x.nan_to_num(0.0))
        return torch.where(x.isnan(), 0.0, log_p).sum(-1)
    if name == "bits":
        return dist.Bernoulli(logits=parameter).log_prob(x).sum(-1)
    if name == "counts":
        log_rate, log_r = parameter.unbind(-1)
        return dist.NegativeBinomial(log_r.exp(), logits=log_rate - log_r).log_prob(x).sum(-1)
    return dist.Categorical(logits=parameter).log_prob(x)


def test_predictions_are_scored_by_the_definitions(mixed, metrics):
    """In the data's units, over the rows that show both, by the mean over samples of z."""
    (kept, dataset, model), found = mixed, metrics
    mask = torch.tensor(kept["test_mask"])
    stats = dataset.spec["arrays"]["floats"]["stats"]
    assert set(found["regenerated_r2"]) == {
        f"{a}->{b}"
        for a in (*KINDS, "the others", "training mean")
        for b in ("picture", "floats", "counts")
    }
    for source, target in itertools.product((*KINDS, "the others"), KINDS):
        m, inputs = KINDS.index(target), torch.tensor(inputs_of(source, target))
        rows = mask[:, inputs].all(1).nonzero()[:, 0]
        parameter = regenerated(model, dataset, inputs.tolist(), rows, m, seed=3)
        both = mask[rows, m]
        rows, parameter = rows[both], parameter[:, both]
        key, x, truth = f"{source}->{target}", dataset.test.take(m, rows), kept[f"test_{target}"]
        truth = truth[rows].astype(float)
        assert len(rows) > 30
        log_p = density(target, parameter, x).logsumexp(0).mean().item() - math.log(50)
        if target == "kind":
            p = parameter.softmax(-1).mean(0).numpy()
            assert found["regenerated_accuracy"][key] == pytest.approx(
                (p.argmax(1) == truth).mean()
            )
            assert found["regenerated_log_loss"][key] == pytest.approx(-log_p, rel=1e-5)
            continue
        assert found["regenerated_log_p"][key] == pytest.approx(log_p, rel=1e-5)
        if target == "bits":
            p = parameter.sigmoid().mean(0).numpy()
            assert len(np.unique(p > 0.5, axis=0)) > 1
            expected = ((p > 0.5) == truth).mean()
            assert found["regenerated_accuracy"][key] == pytest.approx(expected)
            continue
        if target == "picture":
            x, p = truth[:, None] / 255, parameter.sigmoid().mean(0).numpy()
            expected = 1 - ((x - p) ** 2).sum() / ((x - x.mean(0)) ** 2).sum()
        elif target == "floats":
            p = parameter[..., 0].mean(0).numpy() * stats["std"] + stats["mean"]
            expected = r2(truth, p).mean()
        else:
            expected = r2(truth, parameter[..., 0].exp().mean(0).numpy()).mean()
        assert found["regenerated_r2"][key] == pytest.approx(expected, abs=1e-4, rel=1e-5)


def test_the_training_mean_is_that_of_what_training_shows(mixed):
    kept, dataset, model = mixed
    streams = dataset.streams()[1:4]  # a part of the patterns of train_mask
    found = own.evaluate(model, dataset, 0, streams)
    for m, name in enumerate(KINDS):
        rows = torch.cat([index for mask, index in streams if mask[m]]).numpy()
        train = kept[f"train_{name}"][rows].astype(float)
        test = kept[f"test_{name}"][kept["test_mask"][:, m]].astype(float)
        key = f"training mean->{name}"
        if name == "kind":
            share = np.maximum(np.bincount(train.astype(int), minlength=4), 1) / len(rows)
            wrong = -np.log(share[test.astype(int)]).mean()
            assert found["regenerated_log_loss"][key] == pytest.approx(wrong)
            expected = (test == share.argmax()).mean()
            assert found["regenerated_accuracy"][key] == pytest.approx(expected)
        elif name == "bits":
            expected = ((train.mean(0) > 0.5) == test).mean()
            assert found["regenerated_accuracy"][key] == pytest.approx(expected)
        elif name == "picture":
            error = ((test - train.mean(0)) ** 2).sum() / ((test - test.mean(0)) ** 2).sum()
            assert found["regenerated_r2"][key] == pytest.approx(1 - error, abs=1e-5)
        else:
            expected = r2(test, np.nanmean(train, 0)).mean()
            assert found["regenerated_r2"][key] == pytest.approx(expected, abs=1e-5)
        assert key not in found["regenerated_log_p"]


def test_a_class_without_training_rows_counts_as_one():
    """Its log loss would be infinite."""
    modality = nets.Modality("k", (), None, None, "categorical", kind="class", classes=3)
    split = data.Split([torch.tensor([0, 0, 1, 0, 2])])
    mean = own.training_mean(modality, split, 0, torch.arange(4))
    assert mean.tolist() == [3 / 4, 1 / 4, 1 / 4]


@pytest.mark.parametrize("budget", [own.BUDGET, 2 * 60])
def test_squares_are_about_the_mean_of_all_scored_rows(budget, monkeypatch):
    """Not about that of the first batch, or of the first block of 60 rows, of sorted rows."""
    monkeypatch.setattr(own, "BUDGET", budget)
    model, dataset = exact((3, 2), n=350)
    order = dataset.test.bases[1][:, 0].argsort()
    dataset = dataset._replace(test=data.Split([x[order] for x in dataset.test.bases]))
    x = dataset.test.bases[1]
    parameter = regenerated(model, dataset, [True, False], torch.arange(350), 1, seed=0)
    expected = r2(x.numpy(), parameter[..., 0].mean(0).numpy())
    assert abs(x[:100, 0].mean()) > 1
    found = own.evaluate(model, dataset)["regenerated_r2"]
    assert found["x0->x1"] == pytest.approx(expected.mean(), abs=1e-5)
    assert own.feature_scores(model, dataset)["x1"]["model"] == pytest.approx(expected, abs=1e-5)


def test_log_p_is_the_predictive_density():
    """In closed form: x1|x0 is normal, with the posterior's covariance and the noise."""
    model, dataset = exact((3, 2), n=200)
    x0, x1 = dataset.test.bases
    q = model.posterior(x0, None)
    weight, noise = model.weights[1], model.noise**2 * torch.eye(2)
    covariance = torch.einsum("id,nij,je->nde", weight, q.covariance_matrix, weight) + noise
    expected = dist.MultivariateNormal(q.mean @ weight, covariance).log_prob(x1)
    torch.manual_seed(0)
    z = q.sample((20_000,))
    mean, log_p = own.expectation_and_density(model.modalities[1], model.decoders[1], z, x1)
    assert torch.allclose(log_p, expected, atol=0.06)
    assert torch.allclose(mean, q.mean @ weight, atol=0.05)
    found = own.evaluate(model, dataset)["regenerated_log_p"]["x0->x1"]
    assert found == pytest.approx(expected.mean().item(), abs=0.1)  # of 50 samples, a little less
    mean_of_logs = nets.log_prob(model.modalities[1], model.decoders[1](z), x1).mean().item()
    assert found > mean_of_logs + 0.3


def test_missing_entries_and_unseen_features_are_not_scored():
    modality = nets.Modality("x", (3,), None, None, "normal", scale=None, unseen=(2,))
    nan = float("nan")
    split = data.Split([torch.tensor([[1.0, 2, nan], [3, nan, nan], [5, 6, nan], [9, 9, nan]])])
    guess = torch.tensor([[1.0, 2, 0], [4, 4, 0], [5, 5, 0]])
    prediction = own.predict_rows(modality, split, 0, torch.arange(3), lambda index: guess[index])
    assert prediction.errors.tolist() == [1, 1, 0]
    # squares 8 about 3, and 8 about 4
    scores = own.scores(modality, split, 0, prediction)
    assert scores[:2].tolist() == [1 - 1 / 8, 1 - 1 / 8] and scores[2].isnan()
    assert scores.nanmean() == 1 - 1 / 8
    assert own.training_mean(modality, split, 0, torch.tensor([0, 1])).tolist() == [2, 2, 0]


def test_an_unseen_feature_leaves_the_score_of_its_table(tmp_path):
    """A sensor that came after the training rows, and the same table without it."""
    rng, found = np.random.default_rng(0), {}
    z = rng.normal(size=(400, 2))
    a, b = (z @ rng.normal(size=(2, d)) + 0.1 * rng.normal(size=(400, d)) for d in (5, 4))
    late = a.copy()
    late[:, 2] += 50
    late[:300, 2] = np.nan
    for name, x in (("late", late), ("without", np.delete(late, 2, 1))):
        path = tmp_path / f"{name}.npz"
        np.savez(path, train_a=x[:300], test_a=x[300:], train_b=b[:300], test_b=b[300:])
        dataset = arrays.load(path)
        found[name] = own.evaluate(untrained(dataset, 0.0), dataset)
    for section, key in (("regenerated_r2", "b->a"), ("ridge_r2", "b->a"), ("ridge_r2", "a->b")):
        expected = found["without"][section][key]
        assert found["late"][section][key] == pytest.approx(expected, abs=0.01)
    assert found["late"]["ridge_r2"]["b->a"] > 0.5


def test_features_that_vary_by_rounding_are_not_scored(tmp_path):
    rng, kept = np.random.default_rng(0), {}
    for part in ("train", "test"):
        x = rng.normal(size=(80, 3))
        total = np.abs(x) / np.abs(x).sum(1, keepdims=True)
        kept[f"{part}_x"] = np.c_[x, total.sum(1), 1e5 + x[:, :1]]  # a constant; a large mean
        kept[f"{part}_y"] = x[:, :2]
    assert 0 < kept["train_x"][:, 3].std() < 1e-15
    np.savez(tmp_path / "own.npz", **kept)
    for standardise in (True, False):
        dataset = arrays.load(tmp_path / "own.npz", standardise=standardise)
        model = untrained(dataset)
        found = own.evaluate(model, dataset)
        assert abs(found["regenerated_r2"]["training mean->x"]) < 0.1
        assert -1 < found["ridge_r2"]["x->y"] and found["ridge_r2"]["y->x"] > 0.5
        scores = own.feature_scores(model, dataset)["x"]["model"]
        assert np.isnan(scores).tolist() == [False, False, False, True, False]


def test_test_rows_need_not_show_everything():
    model, dataset = exact((3, 3), n=60, test_mask=torch.eye(2, dtype=torch.bool).repeat(30, 1))
    found = own.evaluate(model, dataset)
    assert set(found["regenerated_r2"]) == {
        "x0->x0", "training mean->x0", "x1->x1", "training mean->x1"
    }  # fmt: skip
    assert "ridge_r2" not in found and not own.feature_scores(model, dataset)


def test_examples_may_share_a_row_of_a_base():
    model, dataset = exact((3, 2, 2), n=120)
    rows, found = [torch.arange(120) // (1 + m) for m in range(3)], []
    for split in (dataset.train, dataset.test):
        shared = data.Split([base[: 120 // (1 + m)] for m, base in enumerate(split.bases)], rows)
        whole = data.Split([base[row] for base, row in zip(split.bases, rows)])
        found.append((shared, whole))
    (train, whole_train), (test, whole_test) = found
    found = own.evaluate(model, dataset._replace(train=train, test=test))
    assert found == own.evaluate(model, dataset._replace(train=whole_train, test=whole_test))
    assert found != own.evaluate(model, dataset)


# ------------------------------------------------------------------------------- linear baselines


def hat_matrix(x, penalty):
    """Of ridge regression with an intercept: fits are H y."""
    x = x - x.mean(0)
    gram = x.T @ x + penalty * np.eye(x.shape[1])
    return 1 / len(x) + x @ np.linalg.solve(gram, x.T)


def wide(n, p):
    """x (n, p) and y (n, 2) that depend on four numbers."""
    rng = np.random.default_rng(n + p)
    z = rng.normal(size=(n, 4))
    x = z @ rng.normal(size=(4, p)) + rng.normal(size=(n, p)) + 5
    return x, 1e-3 * (z @ rng.normal(size=(4, 2)) + rng.normal(size=(n, 2)) - 7)


SIZES = [(60, 10), (60, 60), (60, 90)]


@pytest.mark.parametrize("n, p", SIZES)
def test_ridge_takes_the_penalty_of_leave_one_out(n, p):
    x, y = wide(n, p)
    left_out, generalised = [], []
    for penalty in own.PENALTIES:
        hat = hat_matrix(x, penalty)
        residuals = y - hat @ y
        left_out.append(((residuals / (1 - np.diag(hat))[:, None]) ** 2).mean())
        generalised.append((residuals**2).mean() / (1 - np.trace(hat) / n) ** 2)
    weights, intercept, penalty = own.ridge(x, y)
    assert penalty == own.PENALTIES[np.argmin(generalised)]
    assert abs(np.argmin(generalised) - np.argmin(left_out)) <= 1
    assert 1 < penalty < own.PENALTIES[-1]  # without the intercept's 1 the least one, for p >= n
    fit = hat_matrix(x, penalty) @ y
    assert np.allclose(x @ weights + intercept, fit, atol=1e-8)
    rest = np.delete(np.arange(n), 7)  # the closed form of leave-one-out, by leaving one out
    weights = np.linalg.solve(
        (x[rest] - x[rest].mean(0)).T @ (x[rest] - x[rest].mean(0)) + penalty * np.eye(p),
        (x[rest] - x[rest].mean(0)).T @ y[rest],
    )
    guess = y[rest].mean(0) + (x[7] - x[rest].mean(0)) @ weights
    leverage = hat_matrix(x, penalty)[7, 7]
    assert np.allclose(y[7] - guess, (y[7] - fit[7]) / (1 - leverage))


@pytest.mark.parametrize("n, p", SIZES)
def test_ridge_equals_scikit_learns(n, p):
    linear_model = pytest.importorskip("sklearn.linear_model")
    x, y = wide(n, p)
    weights, intercept, penalty = own.ridge(x, y)
    theirs = linear_model.RidgeCV(alphas=own.PENALTIES).fit(x, y)
    assert abs(np.log10(theirs.alpha_ / penalty)) < 0.51  # leave-one-out, at most one step away
    theirs = linear_model.Ridge(alpha=penalty).fit(x, y)
    assert np.allclose(theirs.coef_.T, weights) and np.allclose(theirs.intercept_, intercept)


def test_logistic_regression_is_at_its_optimum():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(90, 120)), rng.integers(0, 4, 90)
    weights, intercept = own.logistic(x, y, 5)
    assert weights.dtype == intercept.dtype == np.float64
    logits = x @ weights + intercept
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    surplus = p - np.eye(5)[y]
    assert np.abs(x.T @ surplus + weights).max() < 1e-3  # C = 1: the sum of log losses + |w|²/2
    assert np.abs(surplus[:, :4].sum(0)).max() < 1e-3 and np.abs(weights).max() > 0.05
    linear_model = pytest.importorskip("sklearn.linear_model")
    theirs = linear_model.LogisticRegression(tol=1e-8, max_iter=2000).fit(x, y)
    assert np.allclose(theirs.predict_proba(x), p[:, :4], atol=1e-3)


def design(kept, source, rows, test_rows):
    """The inputs of own.Ridge by the definition. -> those of the training and of the test rows"""
    tables = [], []
    for name in source:
        x, new = (kept[f"{part}_{name}"].astype(float) for part in ("train", "test"))
        x, new, std = x[rows], new[test_rows], 1
        shown = kept["train_mask"][rows][:, KINDS.index(name)]
        if name == "kind":
            x, new = np.eye(4)[x.astype(int)], np.eye(4)[new.astype(int)]
        x, new = x.reshape(len(x), -1), new.reshape(len(new), -1)
        if name != "kind":
            std = np.nanstd(x[shown], 0)
        mean = np.nanmean(x[shown], 0)
        x[~shown] = mean
        for table, part in zip(tables, (x, new)):
            table.append(np.nan_to_num((part - mean) / np.where(std == 0, 1, std)))
    return [np.hstack(table) for table in tables]


@pytest.mark.parametrize("target, source", [("counts", "bits"), ("floats", "kind"), ("kind", None)])
def test_ridge_sees_what_the_run_saw_and_nothing_else(mixed, metrics, target, source):
    """Rows that show the target and an input together, scaled by themselves; the other split, and
    values that training hid, are others."""
    (kept, _, _), m = mixed, KINDS.index(target)
    key = f"{source or 'the others'}->{target}"
    source = [source] if source else [name for name in KINDS if name != target]
    inputs = [KINDS.index(name) for name in source]
    train, test = kept["train_mask"], kept["test_mask"]
    rows = np.flatnonzero(train[:, m] & train[:, inputs].any(1))
    test_rows = np.flatnonzero(test[:, m] & test[:, inputs].all(1))
    x, new = design(kept, source, rows, test_rows)
    y, truth = kept[f"train_{target}"][rows], kept[f"test_{target}"][test_rows]
    if target == "kind":
        weights, intercept = own.logistic(x, y, 4)
        log_p = torch.from_numpy(new @ weights + intercept).log_softmax(1).numpy()
        loss = -log_p[np.arange(len(truth)), truth].mean()
        assert metrics["ridge_log_loss"][key] == pytest.approx(loss, abs=0.01)
        accuracy = (log_p.argmax(1) == truth).mean()
        assert metrics["ridge_accuracy"][key] == pytest.approx(accuracy, abs=0.01)
        return
    mean, std = np.nanmean(y, 0), np.nanstd(y, 0)
    weights, intercept, _ = own.ridge(x, np.nan_to_num((y - mean) / std))
    expected = r2(truth.astype(float), (new @ weights + intercept) * std + mean).mean()
    assert metrics["ridge_r2"][key] == pytest.approx(expected, abs=1e-4)


def test_ridge_is_not_fitted_to_targets_that_training_hid():
    """Half of the rows show the inputs and hide the target, which holds nonsense."""
    mask = torch.ones(200, 3, dtype=torch.bool)
    mask[::2, 2] = False
    model, dataset = exact((3, 4, 2), n=200, mask=mask)
    found = own.evaluate(model, dataset)
    bases = [base.clone() for base in dataset.train.bases]
    bases[2][::2] = 1000.0
    other = own.evaluate(model, dataset._replace(train=data.Split(bases)))
    assert found == other
    few = data.Split([base[1::2] for base in bases])
    same = own.evaluate(model, dataset._replace(train=few, mask=None))
    for key in ("x0->x2", "the others->x2"):
        assert found["ridge_r2"][key] == pytest.approx(same["ridge_r2"][key], abs=1e-9)
    key = "training mean->x2"
    assert found["regenerated_r2"][key] == pytest.approx(same["regenerated_r2"][key], abs=1e-9)


def test_inputs_that_training_hid_are_at_their_mean():
    mask = torch.ones(200, 3, dtype=torch.bool)
    mask[::2, 0] = False  # these rows show x1 and the target x2
    model, dataset = exact((3, 4, 2), n=200, mask=mask)
    found = own.evaluate(model, dataset)["ridge_r2"]
    bases = [base.clone() for base in dataset.train.bases]
    bases[0][::2] = 1000.0
    assert own.evaluate(model, dataset._replace(train=data.Split(bases)))["ridge_r2"] == found
    bases[0][::2] = bases[0][1::2].mean(0)
    filled = dataset._replace(train=data.Split(bases), mask=None)
    filled = own.evaluate(model, filled)["ridge_r2"]["the others->x2"]
    assert found["the others->x2"] == pytest.approx(filled, abs=1e-6)


@pytest.mark.parametrize("seed, unpaired", [(1, "x0"), (7, "rest")])
def test_baselines_use_the_streams_of_the_run(seed, unpaired):
    """12 of 60 pairs, drawn by the run's seed; the training mean also sees the unpaired rows."""
    model, dataset = exact((3, 2), n=60)
    streams = dataset.streams(paired=0.2, unpaired=unpaired, seed=seed)
    pairs, everything = streams[0][1], torch.arange(60)
    assert len(pairs) == 12
    found = own.evaluate(model, dataset, 0, streams)
    few = dataset._replace(train=data.Split([x[pairs] for x in dataset.train.bases]))
    few = own.evaluate(model, few)
    assert found["ridge_r2"] == pytest.approx(few["ridge_r2"], abs=1e-9)
    x0, x1 = dataset.test.bases
    shown = pairs if unpaired == "x0" else everything
    for x, key, rows in ((x0, "x0", everything), (x1, "x1", shown)):
        train = dataset.train.bases[int(key[1])][rows]
        expected = r2(x.numpy(), train.mean(0).numpy()).mean()
        assert found["regenerated_r2"][f"training mean->{key}"] == pytest.approx(expected, abs=1e-5)
    default = own.evaluate(model, dataset)["ridge_r2"]["x0->x1"]
    assert default > found["ridge_r2"]["x0->x1"] + 0.01
    assert own.feature_scores(model, dataset, 0, streams)["x1"]["ridge"].mean() == pytest.approx(
        found["ridge_r2"]["x0->x1"]
    )


def test_ridge_leaves_out_arrays_that_are_too_wide(monkeypatch):
    model, dataset = exact((6, 2), n=50)
    monkeypatch.setattr(own, "LARGEST", 5)
    assert "ridge_r2" not in own.evaluate(model, dataset)
    found = own.feature_scores(model, dataset)
    assert found["x1"]["ridge"] is None and found["x1"]["model"].shape == (2,)


def test_features_of_a_regression_have_the_deviation_one(mixed):
    """Also those that the run has not standardised, and a constant one."""
    x = torch.tensor([[1, 100, 3], [3, 500, 3], [2, 300, 3]])
    modality = nets.Modality("counts", (3,), None, None, "poisson", kind="counts")
    dataset = mixed[1]._replace(train=data.Split([x, x]), test=data.Split([x, x]))
    both = torch.ones(3, 2, dtype=torch.bool)
    regression = own.ridge_of(dataset, [modality] * 2, (0,), 1, both)
    table = {0: own.features(modality, x)}
    expected = math.sqrt(3 / 2) * np.array([[-1, -1, 0], [1, 1, 0], [0, 0, 0]])
    assert np.allclose(regression.design(table), expected)
    both[1:, 0] = False
    assert own.ridge_of(dataset, [modality] * 2, (0,), 1, both) is None  # one row alone
    x = torch.arange(90).reshape(30, 3) ** 2  # deviations of 2,300 to 2,400
    dataset = dataset._replace(train=data.Split([x, x]), test=data.Split([x, x]))
    both = torch.ones(30, 2, dtype=torch.bool)
    copy = own.ridge_of(dataset, [modality] * 2, (0,), 1, both)(torch.arange(30))
    assert np.allclose(copy, x, rtol=0.01, atol=100)


def test_ridge_of_many_rows_is_fitted_to_some(monkeypatch):
    model, dataset = exact((6, 2), n=3000)
    mask, fitted, ridge = torch.ones(3000, 2, dtype=torch.bool), [], own.ridge
    monkeypatch.setattr(own, "ridge", lambda x, y: fitted.append(len(x)) or ridge(x, y))
    whole = own.Ridge(dataset, model.modalities, (0,), 1, mask).weights
    monkeypatch.setattr(own, "WORK", 36 * 1200)
    part = own.Ridge(dataset, model.modalities, (0,), 1, mask).weights
    assert fitted == [3000, 1200]
    assert (part != whole).all() and np.abs(part - whole).max() < 0.1
    classes = nets.Modality("k", (), None, None, "categorical", kind="class", classes=5)
    x, logistic = dataset.train.bases[0], own.logistic
    split = data.Split([x, x.argmax(1).clamp_max(4)])
    monkeypatch.setattr(own, "logistic", lambda x, y, c: fitted.append(len(x)) or logistic(x, y, c))
    monkeypatch.setattr(own, "WORK", 6 * 5 * 100 * 1500)
    own.Ridge(dataset._replace(train=split), [model.modalities[0], classes], (0,), 1, mask)
    assert fitted[-1] == 1500


# ------------------------------------------------------------------------- features, memory, notes


def test_feature_scores_average_to_the_metrics(mixed, metrics):
    _, dataset, model = mixed
    found = own.feature_scores(model, dataset, seed=3)
    sizes = {"picture": 1, "floats": 4, "bits": 3, "counts": 2, "kind": 1}
    assert {name: scores["model"].shape for name, scores in found.items()} == {
        name: (size,) for name, size in sizes.items()
    }
    for name, scores in found.items():
        section = "accuracy" if name in ("bits", "kind") else "r2"
        for key, prefix in (("model", "regenerated"), ("ridge", "ridge")):
            expected = metrics[f"{prefix}_{section}"][f"the others->{name}"]
            assert scores[key].mean() == pytest.approx(expected)


def test_of_two_modalities_features_come_from_the_other():
    model, dataset = exact((3, 2), n=80)
    found, metrics = own.feature_scores(model, dataset), own.evaluate(model, dataset)
    assert found["x1"]["model"].mean() == pytest.approx(metrics["regenerated_r2"]["x0->x1"])
    assert found["x0"]["ridge"].mean() == pytest.approx(metrics["ridge_r2"]["x1->x0"])
    assert not any("the others" in key for key in metrics["regenerated_r2"])


def test_wide_tables_are_decoded_in_blocks(monkeypatch):
    model, dataset = exact((3, 2000), n=120)
    sizes, decoder = [], model.decoders[1]

    def counted(z):
        parameter = decoder(z)
        sizes.append(parameter.numel())
        return parameter

    model.decoders[1] = counted
    (found,) = own.regenerate(model, dataset, (0,), [1]).values()
    assert max(sizes) <= BUDGET and sum(sizes) == 50 * 120 * 2000 * 2
    monkeypatch.setattr("eval.BUDGET", 10**9)
    (whole,) = own.regenerate(model, dataset, (0,), [1]).values()
    assert torch.allclose(found.errors, whole.errors, rtol=1e-4)
    assert torch.allclose(found.log_p, whole.log_p, rtol=1e-5) and max(sizes) > BUDGET


def test_notes_name_the_standardised_arrays():
    def result(**stats):
        run = {"spec": {"name": "npz", "arrays": {k: {"stats": v} for k, v in stats.items()}}}
        return {"regenerated_r2": {"a->b": 0.5}, "run": run}

    lines = own.notes([result(a={"mean": [0]}, b=None), result(c={"mean": [0]})])
    assert "50 samples of z" in lines[0] and "of a, c are of standardised" in lines[1]
    assert len(own.notes([result(a=None)])) == 1
    assert own.notes([{"accuracy": {"top": 0.9}, "run": {"spec": {"name": "mnist-split"}}}]) == []
