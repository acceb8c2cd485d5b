"""A user's own arrays in eval.py: metrics, --fill, figures, text."""

import itertools
import json
import math
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.distributions import (
    Bernoulli,
    Categorical,
    Independent,
    MultivariateNormal,
    NegativeBinomial,
    Normal,
)

import data
import eval as evaluation
import nets
from benchmarks import drawing, figures, npz, tables
from helpers import train

MODALITIES = "picture", "floats", "bits", "counts", "kind"


def examples(n, seed):
    """One array of every kind, which depend on two numbers: pictures as bytes, floats of size 1000
    and 1e-3, bits, counts, four classes; and two labels."""
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(2, n))
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


def save(path, kept=MODALITIES, n=120, **more):
    """An .npz of the modalities `kept`. -> its test arrays by name"""
    splits = {"train": examples(n, 0), "test": examples(n // 2, 1)}
    named = {f"{part}_{k}": x[k] for k in (*kept, "labels") for part, x in splits.items()}
    np.savez(path, **named | more)
    return splits["test"]


def brief(tmp_path, script="mvae", kept=MODALITIES, epochs=1, more=(), **flags):
    """A short run on such an .npz. -> its folder, the test arrays"""
    test = save(tmp_path / "own.npz", kept, **dict(more))
    run = tmp_path / "run"
    sizes = dict(epochs=epochs, latent_dim=4)
    train(script, dataset=tmp_path / "own.npz", out=run, **sizes | flags)
    return run, test


def evaluate(*arguments):
    evaluation.main([*map(str, arguments), "--device", "cpu"])


def metrics_of(run):
    return json.loads((run / "metrics.json").read_text())


# ----------------------------------------------------------------------------------------- metrics


def loaded(run):
    """-> the run, its data set as eval.py prepares it"""
    found = evaluation.load_run(run)
    found.model.requires_grad_(False)
    return found, evaluation.prepare(found.args["dataset"], ".", "cpu", found.args["spec"])[0]


def r2(x, guess):
    """R² of each feature, against the mean of x."""
    return 1 - ((x - guess) ** 2).sum(0) / ((x - x.mean(0)) ** 2).sum(0)


def stats_of(run, name):
    return run.args["spec"]["arrays"][name]["stats"]


def test_regenerated_arrays_are_scored_by_the_definitions(tmp_path):
    """R² and accuracy in the data's units, of the mean over samples of z; log p(x|z) by
    torch.distributions; from itself, each other one, the others together and the training mean."""
    mask = np.random.default_rng(2).random((120, 5)) < 0.7
    mask[:5] = np.eye(5)
    run, test = brief(tmp_path, more={"train_mask": mask})
    own, dataset = loaded(run)
    found, seen = npz.evaluate(own.model, dataset, seed=3), examples(120, 0)
    r2s, rights, nats = (found[f"regenerated_{k}"] for k in ("r2", "accuracy", "log_p"))
    targets = {"picture", "floats", "counts"}, {"bits", "kind"}
    sources = [*MODALITIES, "the others", "training mean"]
    for scores, names in zip((r2s, rights), targets):
        assert set(scores) == {f"{a}->{b}" for a in sources for b in names}
    assert set(nats) == {f"{a}->{b}" for a in sources for b in MODALITIES}
    whole = dataset.test[torch.arange(60)]
    for source, target in itertools.product((*MODALITIES, "the others"), MODALITIES):
        shown = [
            (source == name) != (source == "the others" and name != target) for name in MODALITIES
        ]
        xs = data.select(dataset.test, shown, torch.arange(60))
        m, key = MODALITIES.index(target), f"{source}->{target}"
        torch.manual_seed(3)
        z = npz.corrected_samples(own.model, xs, own.model.posterior(*xs), 50)
        guess, x = own.model.decode(z)[m].mean(0).numpy(), test[target].astype(float)
        parameter = own.model.decoders[m](z)
        if target == "floats":
            guess = data.unstandardise(guess.astype(float), stats_of(own, "floats"))
            p = Normal(parameter[..., 0], parameter[..., 1].exp())
        if target == "counts":
            p = NegativeBinomial(
                parameter[..., 1].exp(), logits=parameter[..., 0] - parameter[..., 1]
            )
        if target in ("floats", "counts"):
            assert r2s[key] == pytest.approx(r2(x, guess).mean(), abs=1e-5)
        if target == "picture":
            x = test["picture"][:, None] / 255
            pixels = ((x - guess) ** 2).sum() / ((x - x.mean(0)) ** 2).sum()
            assert r2s[key] == pytest.approx(1 - pixels, abs=1e-5)
            continue
        if target == "bits":
            assert rights[key] == pytest.approx(((guess > 0.5) == test["bits"]).mean())
            p = Bernoulli(logits=parameter)
        if target == "kind":
            assert rights[key] == pytest.approx((guess.argmax(1) == test["kind"]).mean())
            p = Categorical(logits=parameter)
        log_p = p.log_prob(whole[m])
        log_p = (log_p if target == "kind" else log_p.sum(-1)).mean().item()
        assert nats[key] == pytest.approx(log_p, rel=1e-4)
    mean = {name: seen[name][mask[:, m]].mean(0) for m, name in enumerate(MODALITIES)}
    for name in ("floats", "counts"):
        expected = r2(test[name].astype(float), mean[name]).mean()
        assert r2s[f"training mean->{name}"] == pytest.approx(expected, abs=1e-5)
    right = ((mean["bits"] > 0.5) == test["bits"]).mean()
    assert rights["training mean->bits"] == pytest.approx(right)
    usual = np.bincount(seen["kind"][mask[:, 4]]) / mask[:, 4].sum()
    right = (test["kind"] == usual.argmax()).mean()
    assert rights["training mean->kind"] == pytest.approx(right)
    expected = {
        "kind": np.log(usual[test["kind"]]).mean(),
        "bits": Bernoulli(torch.tensor(mean["bits"])).log_prob(torch.tensor(test["bits"]).double()),
        "counts": negative_binomial(seen["counts"][mask[:, 3]]).log_prob(
            torch.tensor(test["counts"])
        ),
    }
    for name, log_p in expected.items():
        log_p = log_p.sum(-1).mean().item() if name != "kind" else log_p
        assert nats[f"training mean->{name}"] == pytest.approx(log_p, rel=1e-3)


def negative_binomial(x):
    """The distribution with the mean and the variance of the counts x (N, features)."""
    mean, variance = torch.tensor(x.mean(0)), torch.tensor(x.var(0))
    r = (mean**2 / (variance - mean).clamp_min(1e-6)).clamp(1e-2, 1e4)
    return NegativeBinomial(r, logits=mean.log() - r.log())


def test_ridge_is_least_squares_with_a_penalty():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(200, 3)), rng.normal(size=(200, 2))
    y += 3 * x[:, :2]
    tensors = [torch.from_numpy(a.astype("f4")) for a in (x, y)]
    split = data.Split(tensors)
    modalities = [nets.Modality(n, (d,), None, None, "normal") for n, d in (("x", 3), ("y", 2))]
    dataset = data.Dataset("a.npz", split, split, {}, ("x", "y"))
    shown = torch.ones(200, 2, dtype=torch.bool)
    guess = npz.ridge(dataset, modalities, [0], 1, shown, torch.arange(200))
    z, t = ((a - a.mean(0)) / a.std(0) for a in (x, y))
    errors, guesses = [], []
    for penalty in np.logspace(-2, 5, 15):
        hat = z @ np.linalg.solve(z.T @ z + penalty * np.eye(3), z.T)
        errors.append(((t - hat @ t) ** 2).mean() / (1 - np.trace(hat) / 200) ** 2)
        guesses.append(hat @ t * y.std(0) + y.mean(0))
    assert np.allclose(guess, guesses[np.argmin(errors)], atol=1e-4)
    assert 0 < np.argmin(errors) < 14


def test_missing_entries_and_rows_are_not_scored():
    base = torch.tensor([[1.0, 2], [3, float("nan")], [5, 6], [9, 9]])
    modality = nets.Modality("x", (2,), None, None, "normal", scale=None)
    score = npz.Score()
    score.add(modality, base, base[:3], torch.tensor([[1.0, 2], [4, 4], [5, 5]]))
    # errors 0 1 0 around 3, and 0 1 around 4
    assert score.accuracy_or_r2(modality, base) == pytest.approx(((1 - 1 / 8) + (1 - 1 / 8)) / 2)
    mask = torch.tensor([[1, 1], [0, 1], [1, 0]], dtype=torch.bool)
    assert npz.rows_that_show(mask, {0}, 3).tolist() == [0, 2]
    assert npz.rows_that_show(mask, {0, 1}, 3).tolist() == [0]


def test_a_conformal_quantile_is_that_of_n_plus_1():
    errors = np.array([[5, 1.0], [3, 2], [4, np.nan], [1, 3], [2, np.nan]])
    assert npz.conformal(errors, 0.5).tolist() == [
        3,
        2,
    ]  # 6 / 2 = 3rd of five, 4 / 2 = 2nd of three
    assert npz.conformal(errors, 0.8).tolist() == [5, np.inf]  # the 5th; the 4th of three
    rng, covered = np.random.default_rng(0), []
    for _ in range(400):
        width = npz.conformal(np.abs(rng.normal(size=(40, 1))), 0.9)
        covered.append((np.abs(rng.normal(size=200)) <= width).mean())
    assert np.mean(covered) == pytest.approx(37 / 41, abs=0.01)


def test_intervals_cover_nine_of_ten_new_values(tmp_path, capsys):
    run, _ = brief(tmp_path, kept=("floats", "bits", "counts"), epochs=4, more={"n": 600})
    new = examples(2000, 2)
    np.savez(tmp_path / "new.npz", bits=new["bits"], counts=new["counts"])
    _, out = paths(tmp_path)
    for level in (0.9, 0.5):
        evaluate(run, "--fill", tmp_path / "new.npz", "--out", out, "--interval", level)
        filled = dict(np.load(out))
        out.unlink()
        for name in ("floats", "counts"):
            low, high = filled[f"{name}_low"], filled[f"{name}_high"]
            inside = (low <= new[name]) & (new[name] <= high)
            assert inside.mean(0) == pytest.approx(level * np.ones(inside.shape[1]), abs=0.07)
        assert (filled["counts_low"] >= 0).all() and "bits_low" not in filled
    assert "test rows" not in capsys.readouterr().err


def test_few_test_rows_share_their_intervals_and_say_so(tmp_path, capsys):
    test_mask = np.ones((60, 2), bool)
    test_mask[10:, 1] = False  # ten rows show the bits
    run, test = brief(tmp_path, kept=("floats", "bits"), more={"test_mask": test_mask})
    np.savez(tmp_path / "new.npz", bits=test["bits"])
    evaluate(run, "--fill", tmp_path / "new.npz", "--out", tmp_path / "filled.npz")
    assert "only 10 test rows show bits" in capsys.readouterr().err
    assert np.isfinite(np.load(tmp_path / "filled.npz")["floats_high"]).all()


class Exact(torch.nn.Module):
    """x_m = z W_m + noise, with the exact posterior of two-dimensional z given observed entries."""

    def __init__(self, widths, noise=0.7):
        super().__init__()
        self.modalities, self.latent_dim, self.noise = numbers(widths), 2, noise
        generator = torch.Generator().manual_seed(1)
        for k, width in enumerate(widths):
            self.register_parameter(
                f"w{k}", torch.nn.Parameter(torch.randn(2, width, generator=generator))
            )
        self.decoders = [partial(self.parameter, k) for k in range(len(widths))]

    def weights(self):
        return [weight.detach() for weight in self.parameters()]

    def parameter(self, k, z):
        mean = z @ self.weights()[k]
        return torch.stack([mean, torch.full_like(mean, math.log(self.noise))], -1)

    def decode(self, z):
        return [z @ weight for weight in self.weights()]

    def prior(self, *xs):
        return Independent(Normal(torch.zeros(2), torch.ones(2)), 1)

    def posterior(self, *xs):
        n = next(len(x) for x in xs if x is not None)
        precision, pulled = torch.eye(2).repeat(n, 1, 1), torch.zeros(n, 2)
        for x, weight in zip(xs, self.weights()):
            if x is not None:
                seen = (~x.isnan()).float() / self.noise**2
                precision = precision + torch.einsum("nd,id,jd->nij", seen, weight, weight)
                pulled = pulled + (seen * x.nan_to_num(0.0)) @ weight.T
        mean = torch.linalg.solve(precision, pulled[..., None])[..., 0]
        return MultivariateNormal(mean, precision_matrix=precision)

    def draw(self, n, seed):
        """n examples of every modality, as a split."""
        torch.manual_seed(seed)
        z = torch.randn(n, 2)
        return data.Split([x + self.noise * torch.randn_like(x) for x in self.decode(z)])


def numbers(widths):
    array = {"kind": "numbers", "likelihood": "normal"}
    arrays = {f"x{k}": array | {"shape": [width]} for k, width in enumerate(widths)}
    return nets.modalities("npz", arrays=arrays)


def exact(widths, n=400, test_mask=None):
    """-> the model; a data set of it, with n test examples"""
    model = Exact(widths)
    names = tuple(m.name for m in model.modalities)
    spec = {"name": "npz", "arrays": {name: {"kind": "numbers"} for name in names}}
    parts = model.draw(n, 2), model.draw(n, 3)
    return model, data.Dataset("x.npz", *parts, spec, names, test_mask=test_mask)


def test_intervals_of_an_exact_posterior_cover_nine_of_ten(tmp_path):
    model, dataset = exact((5, 4, 3))
    new = model.draw(4000, 4)
    truth, path, out = [x.numpy() for x in new.bases], *paths(tmp_path)
    holes = np.random.default_rng(0).random(truth[0].shape) < 0.1
    mask = np.tile([[1, 1, 0], [1, 0, 1]], (2000, 1))
    given = {"x0": np.where(holes, np.float32("nan"), truth[0]), "x1": truth[1], "x2": truth[2]}
    np.savez(path, **given, mask=mask)
    npz.fill(model, dataset.spec, path, out, dataset=dataset)
    filled = np.load(out)
    groups = {"shown": ~holes, "missing": holes}
    for k in range(3):
        x, low, high = truth[k], filled[f"x{k}_low"], filled[f"x{k}_high"]
        inside = (low <= x) & (x <= high)
        if k:
            groups = {"shown": mask[:, k] == 1, "hidden": mask[:, k] == 0}
        for rows in groups.values():
            assert inside[rows].mean() == pytest.approx(0.9, abs=0.03)
    width = (filled["x0_high"] - filled["x0_low"])[:, 0]  # wider where the entry is missing
    assert width[holes[:, 0]].min() > width[~holes[:, 0]].max()


def test_few_test_rows_hide_what_the_new_ones_do(tmp_path):
    """Elsewhere the target is shown, and nothing else: its own errors are no residuals."""
    mask = torch.zeros(400, 3, dtype=torch.bool)
    mask[:, 0], mask[:9, 1], mask[200:, 2] = True, True, True
    model, dataset = exact((5, 4, 3), test_mask=mask)
    groups = npz.partly(dataset, (False, True, False), 0)
    assert [(shown, len(rows)) for shown, rows in groups] == [
        ((False, False, True), 200),
        ((False, True, False), 9),
    ]
    new, (path, out) = model.draw(2000, 4), paths(tmp_path)
    np.savez(path, x1=new.bases[1].numpy())
    npz.fill(model, dataset.spec, path, out, dataset=dataset)
    filled, x = np.load(out), new.bases[0].numpy()
    assert ((filled["x0_low"] <= x) & (x <= filled["x0_high"])).mean() > 0.8


def test_test_rows_need_not_show_everything(capsys):
    mask = torch.eye(2, dtype=torch.bool).repeat(30, 1)
    model, dataset = exact((3, 3), n=60, test_mask=mask)
    metrics = evaluation.evaluate(model, dataset, {})
    assert set(metrics["regenerated_r2"]) == {
        "x0->x0", "training mean->x0", "x1->x1", "training mean->x1"
    }  # fmt: skip
    assert (
        "log_likelihood" not in metrics and "no test example shows every" in capsys.readouterr().err
    )


def test_ridge_is_fitted_to_what_the_run_was_shown():
    model, dataset = exact((3, 2), n=60)
    streams = data.pairing(60, dataset.names, 0.2, "rest")
    seen, together = npz.shown_in(streams, 60)
    assert seen.all() and together.sum().item() == 2 * 12
    found = npz.evaluate(model, dataset, 0, streams)["ridge_r2"]["x0->x1"]
    few = dataset._replace(train=data.Split([x[streams[0][1]] for x in dataset.train.bases]))
    shown = torch.ones(12, 2, dtype=torch.bool)
    guess = npz.ridge(few, model.modalities, [0], 1, shown, torch.arange(60)).numpy()
    assert found == pytest.approx(r2(dataset.test.bases[1].numpy(), guess).mean(), abs=0.02)
    assert npz.evaluate(model, dataset)["ridge_r2"]["x0->x1"] > found


def test_features_that_vary_by_rounding_are_not_scored(tmp_path):
    rng, arrays = np.random.default_rng(0), {}
    for part in ("train", "test"):
        x = rng.normal(size=(80, 3))
        total = np.abs(x) / np.abs(x).sum(1, keepdims=True)
        arrays[f"{part}_x"] = np.c_[x, total.sum(1), 1e5 + x[:, :1]]  # a constant; a large mean
        arrays[f"{part}_y"] = x[:, :2]
    assert 0 < arrays["train_x"][:, 3].std() < 1e-15
    np.savez(tmp_path / "own.npz", **arrays)
    for flags in ({}, {"no_standardise": True}):
        run = tmp_path / f"run{len(flags)}"
        train("mvae", dataset=tmp_path / "own.npz", out=run, epochs=1, latent_dim=2, **flags)
        own, dataset = loaded(run)
        found = npz.evaluate(own.model, dataset)
        assert abs(found["regenerated_r2"]["training mean->x"]) < 0.1
        assert -1 < found["ridge_r2"]["x->y"] and found["ridge_r2"]["y->x"] > 0.5


def test_a_missing_entry_is_filled_in_as_the_others_of_its_row(tmp_path):
    run, test = brief(tmp_path, kept=("floats", "bits"))
    floats = test["floats"].copy()
    floats[3, 1], floats[5] = math.nan, math.nan
    np.savez(tmp_path / "new.npz", floats=floats, bits=test["bits"])
    evaluate(run, "--fill", tmp_path / "new.npz", "--out", tmp_path / "filled.npz")
    filled = np.load(tmp_path / "filled.npz")
    assert np.isfinite(filled["floats"]).all()
    own, dataset = loaded(run)
    floats, bits = dataset.test[torch.tensor([3, 5])]
    floats[0, 1] = math.nan
    q = own.model.posterior(floats[:1], bits[:1])
    assert np.allclose(filled["latent_mean"][3], q.mean[0], atol=1e-5)
    q = own.model.posterior(None, bits[1:])  # a row of NaN is a hidden row
    assert np.allclose(filled["latent_mean"][5], q.mean[0], atol=1e-5)


def test_hidden_bytes_change_nothing(tmp_path):
    run, test = brief(tmp_path, kept=("floats", "bits"))
    mask, filled = np.ones((60, 2), bool), []
    mask[0, 1] = False
    new, out = paths(tmp_path)
    for hidden in (0, 9, 255):
        bits = test["bits"].astype("u1")
        bits[0] = hidden
        np.savez(new, floats=test["floats"], bits=bits, mask=mask)
        evaluate(run, "--fill", new, "--out", out)
        filled.append(dict(np.load(out)))
        out.unlink()
    for other in filled[1:]:
        assert all(np.array_equal(filled[0][name], other[name]) for name in other)


def test_a_moved_archive_is_named_by_dataset(tmp_path, capsys):
    run, _ = brief(tmp_path, kept=("floats", "bits"))
    (tmp_path / "own.npz").rename(tmp_path / "moved.npz")
    with pytest.raises(SystemExit):
        evaluate(run, "--no-likelihoods")
    assert "own.npz: --dataset NEW.npz says where" in capsys.readouterr().err
    evaluate(run, "--no-likelihoods", "--dataset", tmp_path / "moved.npz")
    assert metrics_of(run)["regenerated_r2"]
    save(tmp_path / "moved.npz", ("floats", "bits"), n=100)
    with pytest.raises(SystemExit):
        evaluate(run, "--no-likelihoods", "--dataset", tmp_path / "moved.npz")
    assert "moved.npz does not hold the data" in capsys.readouterr().err


def test_many_labels_leave_out_the_classifier_alone(tmp_path, capsys):
    labels = np.arange(120) * 3
    own, dataset = loaded(brief(tmp_path, kept=("floats", "bits"))[0])
    train = data.Split(dataset.train.bases, labels=torch.tensor(labels).repeat(2)[:120])
    for most, there in ((200, True), (100, False)):
        evaluation_most = evaluation.MOST_LABELS
        evaluation.MOST_LABELS = most
        try:
            metrics = evaluation.evaluate(own.model, dataset._replace(train=train), {}, examples=0)
        finally:
            evaluation.MOST_LABELS = evaluation_most
        assert ("latent_accuracy" in metrics) == there and metrics["regenerated_r2"]
    assert evaluation.MOST_LABELS == 200 and "no classifier of z" in capsys.readouterr().err


def test_examples_may_share_a_row_of_a_base(tmp_path):
    own, dataset = loaded(brief(tmp_path, kept=("floats", "bits"))[0])
    rows = [torch.arange(60), torch.arange(60) % 7]
    shared = data.Split([base[: 60 - 53 * m] for m, base in enumerate(dataset.test.bases)], rows)
    whole = data.Split([base[row] for base, row in zip(dataset.test.bases, rows)])
    found = [npz.evaluate(own.model, dataset._replace(test=test)) for test in (shared, whole)]
    assert found[0] == found[1]
    assert 0 <= min(found[0]["regenerated_accuracy"].values())


def test_a_linear_relation_is_found_as_by_least_squares(tmp_path):
    rng = np.random.default_rng(0)
    weights, arrays = rng.normal(size=(4, 3)), {}
    for part, n in (("train", 2000), ("test", 500)):
        x = rng.normal(size=(n, 4))
        arrays[f"{part}_x"] = 300 * x + 1000
        arrays[f"{part}_y"] = 1e-3 * (x @ weights + rng.normal(size=(n, 3)))
    np.savez(tmp_path / "own.npz", **arrays)
    flags = dict(epochs=50, latent_dim=4, lr=1e-3, batch_size=128)
    train("vaevae", dataset=tmp_path / "own.npz", out=tmp_path / "run", **flags)
    evaluate(tmp_path / "run", "--no-likelihoods")
    xs = [np.hstack([arrays[f"{part}_x"], np.ones((n, 1))]) for part, n in PARTS]
    fit = np.linalg.lstsq(xs[0], arrays["train_y"], rcond=None)[0]
    best = r2(arrays["test_y"], xs[1] @ fit).mean()
    found = metrics_of(tmp_path / "run")["regenerated_r2"]
    assert 0.5 < best - 0.05 < found["x->y"] < best + 0.05
    assert found["x->x"] > 0.9 and abs(found["training mean->y"]) < 0.02


PARTS = ("train", 2000), ("test", 500)


# ----------------------------------------------------------------------------------------- filled


def test_samples_are_those_of_the_decoders_posterior():
    """Not of q, where their weights allow it."""
    model = Exact((2, 3))
    exact = model.posterior
    model.posterior = lambda *xs: Independent(Normal(torch.zeros(len(xs[0]), 2), 1.5), 1)
    xs = [torch.tensor([[0.3, -0.4], [50.0, 50.0]]), None]
    torch.manual_seed(0)
    z = npz.corrected_samples(model, xs, model.posterior(*xs), 20_000)
    q = exact(*xs)
    assert torch.allclose(z.mean(0)[0], q.mean[0], atol=0.03)
    assert torch.allclose(z.var(0)[0], q.variance[0], atol=0.03)
    assert torch.allclose(z.mean(0)[1], torch.zeros(2), atol=0.05)  # too far off: those of q
    assert torch.allclose(z.std(0)[1], torch.full((2,), 1.5), atol=0.05)


def test_filled_arrays_have_the_errors_of_the_evaluation(tmp_path, capsys):
    run, test = brief(tmp_path, epochs=3)
    evaluate(run, "--no-likelihoods", "--seed", 5)
    metrics = metrics_of(run)
    r2s, rights = metrics["regenerated_r2"], metrics["regenerated_accuracy"]
    new, out = tmp_path / "new.npz", tmp_path / "sub" / "filled.npz"
    for given in ("absent", "hidden"):
        floats = np.full_like(test["floats"], math.nan)  # hidden entries may hold anything
        rest = {name: test[name] for name in MODALITIES} | {"floats": floats}
        rest |= {"mask": np.tile([1, 0, 0, 0, 0], (60, 1))}
        np.savez(new, **({"picture": test["picture"]} if given == "absent" else rest))
        evaluate(run, "--fill", new, "--out", out, "--seed", 5)
        filled = dict(np.load(out))
        out.unlink()
        intervals = {f"{name}_{end}" for name in ("floats", "counts") for end in ("low", "high")}
        written = {*MODALITIES, *intervals, "kind_probabilities", "latent_mean", "latent_std"}
        assert set(filled) == written
        for name in ("floats", "counts"):
            expected = r2s[f"picture->{name}"]
            assert r2(test[name], filled[name]).mean() == pytest.approx(expected, abs=1e-4)
        right = ((filled["bits"] > 0.5) == test["bits"]).mean()
        assert right == pytest.approx(rights["picture->bits"])
        assert (filled["kind"] == test["kind"]).mean() == pytest.approx(rights["picture->kind"])
        assert (filled["kind"] == filled["kind_probabilities"].argmax(1)).all()
        assert filled["picture"].dtype == np.uint8 and filled["picture"].shape == (60, 8, 10)
        x, y = test["picture"].astype(float), filled["picture"]
        pixels = ((x - y) ** 2).sum() / ((x - x.mean(0)) ** 2).sum()
        assert 1 - pixels == pytest.approx(r2s["picture->picture"], abs=5e-3)  # bytes are rounded
    assert "floats, shown in 0 rows, filled in in 60" in capsys.readouterr().out


def test_each_row_is_filled_in_given_its_own_mask(tmp_path):
    """latent_mean and latent_std are those of q(z|shown), for any masks of the other rows."""
    run, test = brief(tmp_path)
    own, dataset = loaded(run)
    mask = np.random.default_rng(0).random((60, 5)) < 0.5
    mask[0], mask[1], mask[2:5, 2] = [0, 1, 0, 0, 0], True, True
    mask[~mask.any(1), 3] = True
    np.savez(tmp_path / "new.npz", **{n: test[n] for n in MODALITIES}, mask=mask)
    shown = npz.fill(own.model, own.args["spec"], *paths(tmp_path))
    assert (shown == mask).all()
    filled = np.load(tmp_path / "filled.npz")
    for row in (0, 1, 2, 33):
        xs = data.select(dataset.test, mask[row].tolist(), torch.tensor([row]))
        q = own.model.posterior(*xs)
        assert np.allclose(filled["latent_mean"][row], q.mean[0], atol=1e-5)
        assert np.allclose(filled["latent_std"][row], q.stddev[0], atol=1e-5)


def paths(folder):
    return folder / "new.npz", folder / "filled.npz"


def test_filled_samples_have_the_noise_of_the_likelihood(tmp_path):
    run, test = brief(tmp_path, kept=("floats", "kind", "counts"), epochs=3)
    np.savez(tmp_path / "new.npz", kind=test["kind"])
    new, out = paths(tmp_path)
    evaluate(run, "--fill", new, "--out", out, "--samples", 800)
    drawn = dict(np.load(out))
    assert drawn["floats"].shape == (800, 60, 4) and drawn["latent_mean"].ndim == 2
    assert drawn["kind"].shape == (800, 60) and drawn["kind"].dtype == np.int64
    own, _ = loaded(run)
    z = own.model.posterior(None, torch.from_numpy(test["kind"]), None).sample((2000,))
    location, log_scale = own.model.decoders[0](z).unbind(-1)
    scale = np.array(stats_of(own, "floats")["std"])
    variance = (location.var(0) + (2 * log_scale).exp().mean(0)).sqrt().numpy() * scale
    assert np.median(drawn["floats"].std(0) / variance) == pytest.approx(1, abs=0.03)
    log_rate, log_r = own.model.decoders[2](z).unbind(-1)
    rate = log_rate.exp()
    variance = (rate.var(0) + (rate + rate**2 / log_r.exp()).mean(0)).sqrt().numpy()
    assert np.median(drawn["counts"].std(0) / variance) == pytest.approx(1, abs=0.03)
    assert (drawn["counts"] % 1 == 0).all()
    p = own.model.decode(z)[1].mean(0)[:, 0].numpy()
    assert np.abs((drawn["kind"] == 0).mean(0) - p).max() < 0.1


def test_filled_images_stay_bytes_or_floats(tmp_path):
    train("mvae", epochs=1, limit=64, latent_dim=4, data=tmp_path, out=tmp_path / "run")
    grey = np.random.default_rng(0).integers(0, 256, (7, 28, 28), np.uint8)
    found = []
    for images in (grey, grey[:, None].astype("f4") / 255):
        np.savez(tmp_path / "new.npz", grey=images)
        new, out = paths(tmp_path)
        evaluate(tmp_path / "run", "--fill", new, "--out", out)
        found.append(dict(np.load(out)))
        out.unlink()
    as_bytes, as_floats = found
    assert as_bytes["grey"].dtype == np.uint8 and as_bytes["grey"].shape == (7, 28, 28)
    assert as_floats["grey"].dtype == np.float32 and as_floats["grey"].shape == (7, 1, 28, 28)
    assert np.abs(as_bytes["grey"] / 255 - as_floats["grey"][:, 0]).max() < 0.51 / 255 + 1e-3
    for filled in found:
        assert filled["colour"].dtype == np.float32 and filled["colour"].shape == (7, 3, 32, 32)
        assert 0 <= filled["colour"].min() < filled["colour"].max() <= 1
    assert np.allclose(as_bytes["latent_mean"], as_floats["latent_mean"], atol=1e-5)


def changed(**arrays):
    return lambda test: {name: test[name] for name in MODALITIES} | arrays


WRONG = {
    "a name": (changed(zzz=np.zeros((60, 4))), "not zzz"),
    "no modality": (lambda test: {"mask": np.ones((60, 5))}, "must hold arrays named picture"),
    "a width": (changed(floats=np.zeros((60, 5))), "must have the shape (examples, 4)"),
    "an image": (changed(picture=np.zeros((60, 8, 9))), "must have the shape (examples, 1, 8, 10)"),
    "unequal lengths": (changed(bits=np.zeros((59, 3))), "as many rows each"),
    "a mask": (changed(mask=np.ones((60, 4))), "with shape (60, 5)"),
    "a mask with NaN": (changed(mask=np.full((60, 5), math.nan)), "mask must hold 0 and 1"),
    "text": (changed(bits=np.full((60, 3), "yes")), "bits must be numeric"),
    "infinity": (changed(floats=np.full((60, 4), math.inf)), "floats must hold numbers that are"),
    "greys": (changed(picture=np.full((60, 8, 10), 2.0)), "bytes or floats in [0, 1]"),
    "no bits": (changed(bits=np.full((60, 3), 2)), "must hold 0 and 1"),
    "no counts": (changed(counts=np.full((60, 2), 0.5)), "whole numbers from 0 on"),
    "no class": (changed(kind=np.full(60, 4)), "must be below 4"),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return brief(tmp_path_factory.mktemp("trained"))


@pytest.mark.parametrize("what", WRONG)
def test_unsuitable_arrays_are_one_sentence(trained, what, tmp_path, capsys):
    (run, test), (change, said) = trained, WRONG[what]
    new, out = paths(tmp_path)
    np.savez(new, **change(test))
    with pytest.raises(SystemExit) as stop:
        evaluate(run, "--fill", new, "--out", out)
    err = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(err) == 1 and said in err[0] and str(new) in err[0]
    assert [path.name for path in tmp_path.iterdir()] == ["new.npz"]


def test_a_row_that_shows_nothing_is_refused(trained, tmp_path, capsys):
    (run, test), (new, out) = trained, paths(tmp_path)
    np.savez(new, **changed(mask=np.arange(60)[:, None].repeat(5, 1) != 7)(test))
    with pytest.raises(SystemExit) as stop:
        evaluate(run, "--fill", new, "--out", out)
    assert stop.value.code == 2 and "row 7" in capsys.readouterr().err and not out.exists()


@pytest.mark.parametrize("hidden", [0, 255, 9])
def test_hidden_bits_and_bytes_may_hold_anything(trained, tmp_path, hidden):
    (run, test), (new, out) = trained, paths(tmp_path)
    bits, picture = test["bits"].astype("u1"), test["picture"].copy()
    mask = np.ones((60, 5), int)
    mask[0, [0, 2]] = 0
    found = []
    for fill in (1, hidden):
        bits[0], picture[0] = fill, fill
        np.savez(new, **changed(bits=bits, picture=picture, mask=mask)(test))
        evaluate(run, "--fill", new, "--out", out)
        found.append(dict(np.load(out)))
        out.unlink()
    assert found[0]["bits"].dtype == np.float32 and found[0]["picture"].dtype == np.uint8
    assert all(np.array_equal(found[0][key], found[1][key]) for key in found[0])


def test_dark_bytes_stay_bytes(trained, tmp_path):
    """A picture of 0 and 1 is nearly black, not white."""
    (run, test), (new, out) = trained, paths(tmp_path)
    dark, latent = (test["picture"] > 100).astype("u1"), []
    for picture in (dark, dark / np.float32(255)):
        np.savez(new, picture=picture)
        evaluate(run, "--fill", new, "--out", out)
        latent.append(np.load(out)["latent_mean"])
        out.unlink()
    assert np.allclose(*latent, atol=1e-5)


def test_an_existing_file_is_not_overwritten(trained, tmp_path, capsys):
    (run, test), (new, out) = trained, paths(tmp_path)
    np.savez(new, bits=test["bits"])
    for target, said in ((new, "exists: choose another --out"), (new / "x.npz", "new.npz")):
        before = new.read_bytes()
        with pytest.raises(SystemExit) as stop:
            evaluate(run, "--fill", new, "--out", target)
        assert stop.value.code == 2 and said in capsys.readouterr().err
        assert new.read_bytes() == before and list(tmp_path.iterdir()) == [new]
    for flags in (["--fill", new], ["--out", out]):
        with pytest.raises(SystemExit):
            evaluate(run, *flags)
        assert "must be given together" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        evaluate(run, tmp_path / "other", "--fill", new, "--out", out)
    assert "one run, not 2" in capsys.readouterr().err


# ------------------------------------------------------------------------------- text and figures


def test_the_report_of_a_run_defines_its_metrics(trained, capsys):
    run, _ = trained
    evaluate(run, "--samples", 3)
    printed, metrics = capsys.readouterr(), metrics_of(run)
    lines = printed.out.splitlines()
    assert "log-likelihoods of 60 examples, 3 samples" in printed.err
    at = lines.index("Accuracy of regenerated bits or classes")
    own = metrics["regenerated_accuracy"]["bits->bits"]
    assert lines[at + 1].split("→")[0].strip() == "bits" and lines[at + 1].endswith(f"{own:.3f}")
    assert any(line.startswith("    training mean → kind ") for line in lines)
    assert "Log-likelihoods of floats are of standardised features." in lines
    assert max(map(len, lines)) < 300 and not any(line.startswith("|") for line in lines)


def test_a_run_without_a_checkpoint_is_shown_from_its_metrics(trained, tmp_path, capsys):
    run, _ = trained
    evaluate(run, "--no-likelihoods")
    first = capsys.readouterr().out
    text = (run / "metrics.json").read_text(encoding="utf-8")
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "metrics.json").write_text(text, encoding="utf-8")
    evaluate(tmp_path / "kept")
    kept = capsys.readouterr()
    assert kept.out == first.replace(str(run), str(tmp_path / "kept")) and "checkpoint" in kept.err
    evaluate(tmp_path / "kept", run, "--no-likelihoods")
    assert "| MVAE | 1 | split | 1 | 1 |" in capsys.readouterr().out  # two runs are a table
    (tmp_path / "kept" / "metrics.json").write_text(text[:100], encoding="utf-8")
    with pytest.raises(SystemExit) as stop:
        evaluate(tmp_path / "kept")
    assert stop.value.code == 2 and "metrics.json cannot be read" in capsys.readouterr().err


def test_a_masked_run_is_called_masked(tmp_path, capsys):
    mask = np.random.default_rng(0).random((120, 2)) < 0.5
    mask[~mask.any(1)] = True
    run, _ = brief(tmp_path, kept=("floats", "bits"), more={"train_mask": mask})
    evaluate(run, "--no-likelihoods")
    assert "\nmasked, seed 0, " in capsys.readouterr().out
    own = evaluation.load_run(run)
    assert drawing.title(own) == "MVAE · own.npz · masked"
    result = metrics_of(run)
    assert "| MVAE | masked | – | 1 | 1 |" in tables.table([result])
    assert not figures.curves([result, result | {"epoch": 9}])  # it is no point at f = 1


def test_few_examples_are_balanced_over_the_classes():
    labels = torch.tensor([3, 3, 3, 1, 1, 2, 3])
    assert npz.few(labels, 7, most=4).tolist() == [3, 4, 5, 0]
    assert npz.few(labels, 7, most=2).tolist() == [3, 5]
    assert npz.few(None, 7, most=4).tolist() == [0, 1, 2, 3]
    assert npz.few(torch.arange(200), 200).tolist() == list(range(10))


def figure(monkeypatch, draw):
    """The figure that draw() makes, as matplotlib's."""
    plt, kept = pytest.importorskip("matplotlib.pyplot"), []
    monkeypatch.setattr(drawing, "finish", lambda figure, *rest, **options: kept.append(figure))
    draw()
    monkeypatch.undo()
    plt.close(kept[0])
    return kept[0]


def test_every_modality_is_drawn_from_each_source(trained, monkeypatch):
    own, dataset = loaded(trained[0])
    blocks, hues = figures.regenerated(own, dataset)
    drawn = figure(monkeypatch, lambda: drawing.examples(blocks, hues, "heading", None))
    rows = [ax.get_ylabel() for ax in drawn.axes]
    others = ["from floats", "from bits", "from counts", "from kind", "from all"]
    assert rows[:7] == ["input", "from picture", *others]
    assert len(rows) == 5 * 7 and rows[7:9] == ["input", "from floats"]
    titles = [text.get_text() for text in drawn.texts]
    assert titles[0] == "picture" and titles[2] == "bits: 0 to 1"
    assert titles[1].startswith("floats, in standard deviations from the training mean: -")
    picture, floats = drawn.axes[0], drawn.axes[7]
    assert len(picture.images) == 10  # examples
    x = dataset.test[npz.few(dataset.test.labels, 60)]
    assert np.allclose(picture.images[4].get_array(), x[0][4, 0])
    heights = np.array([bar.get_height() for bar in floats.patches])  # (10 x 4,)
    assert np.corrcoef(heights, x[1].flatten())[0, 1] > 0.999
    colours = [ax.patches[0].get_facecolor() for ax in drawn.axes[7:14]]
    assert len(set(colours)) == 7
    assert {ax.patches[0].get_facecolor() for ax in drawn.axes[14:] if "floats" in ax.get_ylabel()}
    assert drawn.axes[15].get_ylabel() == "from bits" != rows[16]


def test_tiles_have_64_pixels_and_pages_ten_columns(tmp_path):
    pytest.importorskip("matplotlib")
    for shape in ((1, 8, 80), (3, 28, 28), (2, 8, 8), (5,), (2000,)):
        assert min(drawing.tile(torch.zeros(3, *shape))) >= 64
    x = torch.rand(10, 1, 8, 200)
    blocks = {"wide": [("input", x), ("from a", x)], "long": [("input", torch.rand(10, 500))]}
    drawing.examples(blocks, {"input": "k", "from a": "r"}, "examples", tmp_path / "page.png")
    assert Image.open(tmp_path / "page.png").size[0] <= 3300
    labels = torch.arange(200)
    split = data.Split([torch.rand(200, 1, 8, 8), torch.rand(200, 1, 8, 8)], labels=labels)
    dataset = data.Dataset("x.npz", split, split, {}, ("a", "b"))
    model = SimpleNamespace(
        posterior=lambda *xs: SimpleNamespace(sample=lambda shape: torch.zeros(shape)),
        decode=lambda z: [split[labels][0]] * 2,
    )
    masks, views = evaluation.subsets(dataset.names), evaluation.views(dataset)
    rows = figures.generations(model, dataset, masks, views)
    assert len(rows[0][1]) == 10
    drawing.page([(name, images[:10]) for name, images in rows], "page", tmp_path / "small.png")
    across, down = Image.open(tmp_path / "small.png").size
    assert 640 < across < 1600 and down > 6 * 64


def test_modalities_and_classes_have_different_colours(monkeypatch):
    z, labels = np.random.default_rng(0).normal(size=(60, 4)), np.tile(np.arange(20) % 3, 3)
    drawn = figure(
        monkeypatch, lambda: drawing.latent_map(z, labels, ("0", "1", "2"), "heading", None)
    )
    left, right = drawn.axes
    names = [text.get_text() for text in left.get_legend().get_texts()]
    assert names == ["modality 0", "modality 1", "modality 2"]
    points = [tuple(c.get_facecolor()[0, :3]) for c in left.collections]
    classes = [tuple(c.get_facecolor()[0, :3]) for c in right.collections]
    assert len(set(points)) == len(set(classes)) == 3 and not set(points) & set(classes)


def test_relatedness_has_a_row_for_every_pair(trained, tmp_path, monkeypatch):
    own, dataset = loaded(trained[0])
    seen = []
    monkeypatch.setattr(drawing, "relatedness", lambda pairs, *rest: seen.extend(pairs))
    evaluation.draw(own, dataset, {}, tmp_path, ".")
    monkeypatch.undo()
    assert [names for names, _, _ in seen][:5] == [
        ("picture", other) for other in ("floats", "bits", "counts", "kind")
    ] + [("floats", "bits")]
    assert len(seen) == 10
    drawn = figure(monkeypatch, lambda: drawing.relatedness(seen[:3], "heading", None))
    histograms = [ax for ax in drawn.axes if ax.get_xlabel().startswith("W2 of")]
    assert [ax.get_xlabel() for ax in histograms][1] == "W2 of q(z|picture), q(z|bits)"
    assert (
        len({ax.get_xlim() for ax in histograms}) == len({ax.get_ylim() for ax in histograms}) == 1
    )
