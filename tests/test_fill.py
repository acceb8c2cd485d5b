"""evaluation/fill.py: what new examples lack is filled in, and nothing else."""

import math
import tempfile

import numpy as np
import pytest
import torch
from torch.distributions import Independent, Normal

import data
import nets
from eval import BUDGET, corrected_samples
from evaluation import fill, own
from loaders import arrays
from test_own import KINDS, archive, exact, mask_of, untrained


def paths(folder):
    return folder / "new.npz", folder / "filled.npz"


def filled(model, folder, new, **options):
    """-> the arrays that are written for these new examples, {modality: Filled}"""
    path, out = paths(folder)
    np.savez(path, **new)
    summary = fill.fill(model, path, out, **options)
    written = dict(np.load(out))
    out.unlink()
    return written, summary


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """-> test arrays of every kind, of a data set without masks; the data set; a model"""
    path = tmp_path_factory.mktemp("fill") / "own.npz"
    kept = archive(path, masks=False)
    dataset = arrays.load(path)
    return {name: kept[f"test_{name}"] for name in KINDS}, dataset, untrained(dataset)


def means(model, xs, seed=0):
    """The mean of every modality given xs, over 50 samples of z. -> M arrays"""
    torch.manual_seed(seed)
    z = corrected_samples(model, xs, model.posterior(*xs), 50)
    return [
        nets.mean(m, decode(z)).mean(0).double().numpy()
        for m, decode in zip(model.modalities, model.decoders)
    ]


# ----------------------------------------------------------------------------------- what is shown

DTYPES = {
    "picture": (np.uint8, np.float32, np.float64),
    "floats": (np.float32, np.float64),
    "bits": (bool, np.uint8, np.float64),
    "counts": (np.int64, np.uint16, np.float32),
    "kind": (np.int64, np.int8),
}


@pytest.mark.parametrize("choice", range(3))
def test_shown_rows_and_entries_stay_to_the_bit(mixed, tmp_path, choice):
    """In the input's dtype, beside rows and, of floats, entries that are filled in."""
    test, _, model = mixed
    new = {}
    for name, dtypes in DTYPES.items():
        new[name] = test[name].astype(dtypes[choice % len(dtypes)])
    if new["picture"].dtype != np.uint8:
        new["picture"] /= 255
    mask = mask_of(len(new["kind"]), seed=9)
    written, _ = filled(model, tmp_path, new | {"mask": mask})
    for m, name in enumerate(KINDS):
        x, y, shown = new[name], written[name], mask[:, m]
        assert y.dtype == x.dtype and y.shape == x.shape and 5 < shown.sum() < len(x) - 5
        shown = shown.reshape(-1, *[1] * (x.ndim - 1)) & (x == x)
        assert np.array_equal(y[shown], x[shown])
        assert np.isfinite(y).all() and (name == "kind" or (y != x)[~shown].any())
    assert np.isnan(new["floats"]).any()


def test_missing_entries_and_rows_are_the_mean(mixed, tmp_path):
    """Given the rest of their row, in the data's units, rounded where the input holds integers."""
    test, dataset, model = mixed
    n = len(test["kind"])
    stats = dataset.spec["arrays"]["floats"]["stats"]
    bits = test["bits"].astype("u1")
    new = test | {"bits": bits, "mask": np.tile([1, 1, 0, 0, 1], (n, 1))}
    written, _ = filled(model, tmp_path, new, seed=4)
    gaps = np.isnan(test["floats"])
    torch.manual_seed(4)
    predicted = [[] for _ in KINDS]
    shown = [True, True, False, False, True]
    for index in torch.arange(n).split(100):
        xs = data.select(dataset.test, shown, index)
        z = corrected_samples(model, xs, model.posterior(*xs), 50)
        for m, decode in enumerate(model.decoders):
            predicted[m].append(nets.mean(model.modalities[m], decode(z)).mean(0).double().numpy())
    _, floats, p, rates, _ = [np.concatenate(parts) for parts in predicted]
    floats = floats * stats["std"] + stats["mean"]
    assert np.allclose(written["floats"], np.where(gaps, floats, test["floats"]), rtol=1e-5)
    assert np.array_equal(written["bits"], p > 0.5) and 0.1 < (p > 0.5).mean() < 0.9
    assert np.array_equal(written["counts"], np.rint(rates)) and rates.std(0).min() > 0.01
    floats = {"bits": bits.astype("f4"), "counts": test["counts"].astype("f8")}
    written, _ = filled(model, tmp_path, new | floats, seed=4)
    assert np.allclose(written["bits"], p, atol=1e-5)
    assert np.allclose(written["counts"], rates, rtol=1e-5)


def test_filled_arrays_have_the_scores_of_the_evaluation(mixed, tmp_path):
    test, dataset, model = mixed
    predictions = own.regenerate(model, dataset, (0,), range(1, 5), seed=5)
    scores = {
        KINDS[m]: own.scores(model.modalities[m], dataset.test, m, prediction).mean().item()
        for m, prediction in predictions.items()
    }
    written, summary = filled(model, tmp_path, {"picture": test["picture"]}, seed=5)
    for name in ("floats", "counts"):
        x, y = test[name].astype(float), written[name]
        r2 = 1 - np.nansum((x - y) ** 2, 0) / np.nansum((x - np.nanmean(x, 0)) ** 2, 0)
        assert r2.mean() == pytest.approx(scores[name], rel=1e-4, abs=1e-4)
    accuracy = {
        "bits": ((written["bits"] > 0.5) == test["bits"]).mean(),
        "kind": (written["kind"] == test["kind"]).mean(),
    }
    for name, expected in accuracy.items():
        assert scores[name] == pytest.approx(expected)
    p = written["kind_probabilities"]
    assert (written["kind"] == p.argmax(1)).all() and p.sum(1) == pytest.approx(np.ones(len(p)))
    log_p = np.log(p[np.arange(len(p)), test["kind"]])
    assert np.allclose(log_p, predictions[4].log_p, atol=1e-4)
    dtypes = {name: written[name].dtype for name in KINDS[1:]}
    assert dtypes == {
        "floats": np.float64,
        "bits": np.float32,
        "counts": np.float32,
        "kind": np.int64,
    }
    assert np.array_equal(written["picture"], test["picture"])
    assert summary["picture"] == (0, 0, 0) and summary["floats"] == (180, 720, 0)


def test_reconstruct_replaces_what_is_shown(mixed, tmp_path):
    test, dataset, model = mixed
    xs = dataset.test[torch.arange(100)]
    predicted = means(model, xs)
    written, summary = filled(
        model, tmp_path, {name: test[name][:100] for name in KINDS}, reconstruct=True
    )
    stats = dataset.spec["arrays"]["floats"]["stats"]
    expected = predicted[1] * stats["std"] + stats["mean"]
    assert np.allclose(written["floats"], expected, rtol=1e-5)
    assert np.allclose(written["bits"], predicted[2], atol=1e-5)
    assert np.allclose(written["counts"], predicted[3], rtol=1e-5)
    assert (written["counts"] % 1 > 0).any()
    assert np.array_equal(written["kind"], predicted[4].argmax(1))
    assert np.allclose(written["kind_probabilities"], predicted[4], atol=1e-5)
    assert np.array_equal(written["picture"], np.rint(255 * predicted[0][:, 0]))
    assert written["picture"].dtype == np.uint8 and summary["counts"] == (100, 200, 0)


def test_a_shown_class_has_probability_one(mixed, tmp_path):
    test, _, model = mixed
    mask = np.ones((len(test["kind"]), 5), bool)
    mask[::2, 4] = False
    written, _ = filled(model, tmp_path, test | {"mask": mask})
    p, kind = written["kind_probabilities"], test["kind"]
    assert np.array_equal(p[1::2], np.eye(4)[kind[1::2]])
    assert p[::2].max(1).min() < 0.9 and np.array_equal(written["kind"][::2], p[::2].argmax(1))


def test_each_row_is_filled_in_given_its_own_mask(mixed, tmp_path):
    """latent_mean and latent_std are those of q(z|what the row shows), entries included."""
    test, dataset, model = mixed
    mask = mask_of(len(test["kind"]), seed=4, share=0.5)
    written, _ = filled(model, tmp_path, test | {"mask": mask})
    for row in (0, 1, 2, 33, 150):
        xs = data.select(dataset.test, mask[row].tolist(), torch.tensor([row]))
        q = model.posterior(*xs)
        assert np.allclose(written["latent_mean"][row], q.mean[0], atol=1e-5)
        assert np.allclose(written["latent_std"][row], q.stddev[0], atol=1e-5)


def test_a_row_of_missing_entries_is_a_hidden_row(mixed, tmp_path):
    test, dataset, model = mixed
    floats = test["floats"].copy()
    floats[5] = math.nan
    written, summary = filled(model, tmp_path, {"floats": floats, "bits": test["bits"]})
    q = model.posterior(None, None, dataset.test.take(2, torch.tensor([5])), None, None)
    assert np.allclose(written["latent_mean"][5], q.mean[0], atol=1e-5)
    assert np.isfinite(written["floats"][5]).all()
    gaps = np.isnan(floats)
    assert summary["floats"] == (gaps.any(1).sum(), gaps.sum(), 0)
    assert summary["bits"] == (0, 0, 0) and summary["picture"] == (180, 180 * 80, 0)


@pytest.mark.parametrize("value", [0, 255, 9])
def test_hidden_rows_may_hold_anything(mixed, tmp_path, value):
    """Bits are filled in as bits, and all else as if there were others."""
    test, _, model = mixed
    mask = np.ones((180, 5), int)
    mask[0, [0, 2]] = 0
    found = []
    for hidden in (1, value):
        bits, picture = test["bits"].astype("u1"), test["picture"].copy()
        bits[0], picture[0] = hidden, hidden
        new = test | {"bits": bits, "picture": picture, "mask": mask}
        found.append(filled(model, tmp_path, new)[0])
    assert all(np.array_equal(x, found[1][key]) for key, x in found[0].items())
    assert set(np.unique(found[0]["bits"])) == {0, 1}


def test_integers_stay_in_the_range_of_their_dtype(tmp_path):
    """Counts of a mean above 255 in bytes."""
    rng, kept = np.random.default_rng(0), {}
    for part in ("train", "test"):
        kept |= {f"{part}_n": rng.poisson(900, (50, 2)), f"{part}_b": rng.random((50, 3)) > 0.5}
    np.savez(tmp_path / "own.npz", **kept)
    dataset = arrays.load(tmp_path / "own.npz")
    new = {"n": np.full((4, 2), 200, np.uint8), "b": kept["test_b"][:4], "mask": np.ones((4, 2))}
    new["mask"][:2, 0] = 0
    for draws in (None, 3):
        written, _ = filled(untrained(dataset, 0.1), tmp_path, new, draws=draws)
        assert written["n"].dtype == np.uint8
        assert (written["n"][..., :2, :] == 255).all() and (written["n"][..., 2:, :] == 200).all()


def test_dark_bytes_stay_bytes(mixed, tmp_path):
    """A picture of 0 and 1 is nearly black, not white; as floats it is the same picture."""
    test, _, model = mixed
    dark = (test["picture"] > 100).astype("u1")
    bytes_, floats = (
        filled(model, tmp_path, {"picture": x})[0]["latent_mean"] for x in (dark, dark / 255)
    )
    assert np.allclose(bytes_, floats, atol=1e-5)


def test_grey_images_keep_their_axes(mixed, tmp_path):
    test, _, model = mixed
    grey = test["picture"].astype("f4") / 255
    for x in (grey, grey[:, None]):
        written, _ = filled(model, tmp_path, {"picture": x, "kind": test["kind"]})
        assert written["picture"].shape == x.shape
    written, _ = filled(model, tmp_path, {"kind": test["kind"]})
    assert written["picture"].shape == (180, 1, 8, 10) and written["picture"].dtype == np.float32
    assert 0 <= written["picture"].min() < written["picture"].max() <= 1


def test_modalities_may_be_called_path_file_and_mask(tmp_path):
    rng, names = np.random.default_rng(0), ("path", "file", "allow_pickle", "self")
    kept = {
        f"{part}_{name}": rng.normal(size=(30, 2)) for part in ("train", "test") for name in names
    }
    np.savez(tmp_path / "own.npz", **kept)
    dataset = arrays.load(tmp_path / "own.npz")
    path, out = paths(tmp_path)
    data.save_npz(path, {"path": kept["test_path"]})
    summary = fill.fill(untrained(dataset), path, out, dataset=dataset)
    assert {*names, "file_low", "path_high"} < set(np.load(out).files)
    assert summary["allow_pickle"] == (30, 60, 0)


def test_an_unseen_feature_is_filled_in_with_nan(tmp_path):
    """Where it is shown it stays, and the model does not see it."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(120, 3)), rng.normal(size=(120, 4))
    a[:80, 1] = np.nan
    kept = {"train_a": a[:80], "test_a": a[80:], "train_b": b[:80], "test_b": b[80:]}
    np.savez(tmp_path / "own.npz", **kept)
    dataset = arrays.load(tmp_path / "own.npz")
    model, new = untrained(dataset), a[80:].copy()
    new[:10], new[10:20, 1], new[20:25, [0, 2]] = np.nan, np.nan, np.nan
    written, summary = filled(model, tmp_path, {"a": new, "b": b[80:]}, dataset=dataset)
    missing = np.isnan(new)
    for key in ("a", "a_low", "a_high"):
        assert np.array_equal(written[key][~missing], new[~missing])
        assert np.isnan(written[key][:20, 1]).all()
        assert np.isfinite(np.delete(written[key], 1, 1)).all()
    assert summary["a"] == (25, 2 * 10 + 2 * 5, 20)
    q = model.posterior(None, dataset.test.take(1, torch.arange(20, 25)))  # nothing else is shown
    assert np.allclose(written["latent_mean"][20:25], q.mean, atol=1e-5)
    written, _ = filled(model, tmp_path, {"b": b[80:]}, reconstruct=True)
    assert np.isnan(written["a"][:, 1]).all()


# --------------------------------------------------------------------------------------- intervals


def test_intervals_cover_nine_of_ten_hidden_values(tmp_path):
    """Where a modality is hidden, and where an entry is; of what is shown they are the value."""
    model, dataset = exact((5, 4, 3), mean=100.0, std=20.0)
    new = model.examples(2000, 4)
    truth = [x.numpy() * 20 + 100 for x in new.bases]
    gaps = np.random.default_rng(0).random(truth[0].shape) < 0.1
    mask = np.tile([[1, 1, 0], [1, 0, 1]], (1000, 1)).astype(bool)
    given = {"x0": np.where(gaps, np.float32("nan"), truth[0]), "x1": truth[1], "x2": truth[2]}
    written, _ = filled(model, tmp_path, given | {"mask": mask}, dataset=dataset)
    for k, missing in enumerate((gaps, ~mask[:, 1], ~mask[:, 2])):
        x, low, high = truth[k], written[f"x{k}_low"], written[f"x{k}_high"]
        assert low.dtype == written[f"x{k}"].dtype == x.dtype
        inside = ((low <= x) & (x <= high))[missing].mean()
        assert inside == pytest.approx(0.9, abs=0.03)
        assert np.array_equal(low[~missing], x[~missing])
        assert np.array_equal(high[~missing], x[~missing])
        middle = (low + high)[missing] / 2
        assert np.allclose(middle, written[f"x{k}"][missing], rtol=1e-4)
    width = fill.half_widths(model, dataset, (True, False, True), [1], 0.6, seed=0)[1]
    other = fill.half_widths(model, dataset, (True, False, True), [1], 0.6, seed=1)[1]
    assert (width != other).all() and np.allclose(width, other, rtol=0.2)
    errors = np.abs(truth[1] - written["x1"])[~mask[:, 1]]
    assert (errors <= width).mean() == pytest.approx(0.6, abs=0.04)


def test_intervals_of_counts_start_at_zero(mixed, tmp_path):
    test, dataset, model = mixed
    written, _ = filled(model, tmp_path, {"kind": test["kind"]}, dataset=dataset)
    low, high = written["counts_low"], written["counts_high"]
    assert low.min() == 0 < high.min() and (low <= written["counts"]).all()
    assert {key for key in written if key.endswith("_low")} == {"floats_low", "counts_low"}
    width = (written["floats_high"] - written["floats_low"]).mean(0)
    assert width[0] > 100 * width[2] > 1000 * width[1]  # in the data's units


def test_intervals_of_reconstructions_are_around_the_mean(tmp_path):
    """Narrow for an entry that the model sees, wide for one that it does not."""
    model, dataset = exact((5, 4))
    x = dataset.test.bases[0].numpy().copy()
    gaps = np.random.default_rng(0).random(x.shape) < 0.1
    truth, x[gaps] = x.copy(), np.nan
    new = {"x0": x, "x1": dataset.test.bases[1].numpy()}
    written, _ = filled(model, tmp_path, new, dataset=dataset, reconstruct=True)
    low, high = written["x0_low"], written["x0_high"]
    inside = (low <= truth) & (truth <= high)
    for part in (gaps, ~gaps):
        assert inside[part].mean() == pytest.approx(0.9, abs=0.04)
    width = (high - low)[:, 0]
    assert width[gaps[:, 0]].min() > width[~gaps[:, 0]].max()


def test_hidden_test_rows_are_no_residuals_of_zero(tmp_path):
    """Half of the test rows hide the target, stored as 0, and show the input."""
    mask = torch.ones(400, 2, dtype=torch.bool)
    mask[::2, 1] = False
    model, dataset = exact((5, 3), test_mask=mask)
    bases = [base.clone() for base in dataset.test.bases]
    bases[1][::2] = model.parameter(model.weights[1], model.posterior(bases[0], None).mean)[
        ::2, :, 0
    ]
    dataset = dataset._replace(test=data.Split(bases))  # as it is predicted: a residual of about 0
    new = model.examples(1000, 4)
    for gaps, given in ((False, {"x0": new.bases[0]}), (True, {"x1": new.bases[1]})):
        given = {key: x.numpy().copy() for key, x in given.items()}
        if gaps:
            given["x1"][:, 0] = np.nan
        written, _ = filled(model, tmp_path, given, dataset=dataset)
        x, low, high = new.bases[1].numpy()[:, 0], written["x1_low"], written["x1_high"]
        inside = (low[:, 0] <= x) & (x <= high[:, 0])
        assert inside.mean() == pytest.approx(0.9, abs=0.05)
        shown = data.Split([base[1::2] for base in bases])  # what they would be without these rows
        half, _ = filled(
            model, tmp_path, given, dataset=dataset._replace(test=shown, test_mask=None)
        )
        assert np.allclose((high - low)[:, 0], (half["x1_high"] - half["x1_low"])[:, 0], rtol=0.1)


def test_few_test_rows_share_their_intervals_and_say_so(tmp_path, capsys):
    mask = torch.ones(60, 2, dtype=torch.bool)
    mask[10:, 1] = False
    model, dataset = exact((4, 3), n=60, test_mask=mask)
    new = {"x1": dataset.test.bases[1].numpy()}
    written, _ = filled(model, tmp_path, new, dataset=dataset)
    assert "only 10 test rows show x1: their intervals" in capsys.readouterr().err
    assert np.isfinite(written["x0_high"]).all()
    written, _ = filled(model, tmp_path, new, dataset=dataset, level=0.95)
    assert np.isinf(written["x0_high"]).all()  # of ten residuals none is the 11th
    capsys.readouterr()
    mask[10:30, 1] = True
    written, _ = filled(model, tmp_path, new, dataset=dataset._replace(test_mask=mask))
    assert not capsys.readouterr().err and np.isfinite(written["x0_high"]).all()
    filled(model, tmp_path, new, dataset=dataset._replace(test_mask=mask), level=0.99)
    assert "only 30 test rows" in capsys.readouterr().err  # 99 are needed


def test_rows_that_show_a_part_hide_what_new_ones_do():
    """Elsewhere the target is shown, and nothing else: its own errors are no residuals."""
    mask = torch.zeros(400, 3, dtype=torch.bool)
    mask[:, 0], mask[:9, 1], mask[200:, 2] = True, True, True
    model, dataset = exact((5, 4, 3), test_mask=mask)
    groups = fill.groups_that_show(dataset, (False, True, False), 0)
    assert [(shown, rows.tolist()) for shown, rows in groups] == [
        ((False, False, True), list(range(200, 400))),
        ((False, True, False), list(range(9))),
    ]
    groups = fill.groups_that_show(dataset, (True, True, False), 0)
    assert [(shown, len(rows)) for shown, rows in groups] == [
        ((True, True, False), 9),
        ((True, False, False), 391),
    ]
    widths = fill.half_widths(model, dataset, (False, True, False), [0], 0.9, seed=0)[0]
    errors = [fill.residuals(model, dataset, *group, [0], 0)[0] for group in
              fill.groups_that_show(dataset, (False, True, False), 0)]  # fmt: skip
    assert np.allclose(widths, np.sort(np.concatenate(errors), 0)[math.ceil(0.9 * 210) - 1])


def test_residuals_of_an_entry_hide_it_and_a_tenth(tmp_path):
    """Each feature is missing once, in the pass in which its error is taken."""
    model, dataset = exact((12, 3), n=150)
    x0, x1 = dataset.test.bases
    errors = fill.residuals(model, dataset, (True, True), torch.arange(150), [0], 0, gaps=True)[0]
    for turn in range(10):
        features = list(range(turn, 12, 10))
        given = x0.clone()
        given[:, features] = math.nan
        mean = model.posterior(given, x1).mean @ model.weights[0]
        expected = (x0 - mean).abs()[:, features].numpy()
        assert np.abs(errors[:, features] - expected).mean() < 0.2
        seen = (x0 - model.posterior(x0, x1).mean @ model.weights[0]).abs()[:, features].numpy()
        assert (
            np.abs(errors[:, features] - expected).mean()
            < np.abs(errors[:, features] - seen).mean()
        )
    assert not np.isnan(errors).any()


def test_a_conformal_quantile_is_that_of_n_plus_1():
    errors = np.array([[5, 1.0], [3, 2], [4, np.nan], [1, 3], [2, np.nan]])
    assert fill.conformal(errors, 0.5).tolist() == [3, 2]  # 3rd of five, 2nd of three
    assert fill.conformal(errors, 0.8).tolist() == [5, np.inf]  # the 5th; the 4th of three
    assert fill.conformal(np.empty((0, 2)), 0.5).tolist() == [np.inf, np.inf]
    rng, covered = np.random.default_rng(0), []
    for _ in range(400):
        width = fill.conformal(np.abs(rng.normal(size=(40, 1))), 0.9)
        covered.append((np.abs(rng.normal(size=200)) <= width).mean())
    assert np.mean(covered) == pytest.approx(37 / 41, abs=0.01)


# ------------------------------------------------------------------------------------------- draws


def test_draws_have_the_noise_of_the_likelihood(mixed, tmp_path):
    test, dataset, model = mixed
    new = {"picture": test["picture"][:30]}
    drawn, _ = filled(model, tmp_path, new, draws=800, dataset=dataset)
    assert drawn["floats"].shape == (800, 30, 4) and drawn["latent_mean"].shape == (30, 4)
    x = torch.from_numpy(new["picture"][:, None] / np.float32(255))
    z = model.posterior(x, None, None, None, None).sample((4000,))
    location, log_scale = model.decoders[1](z).unbind(-1)
    scale = np.array(dataset.spec["arrays"]["floats"]["stats"]["std"])
    deviation = (location.var(0) + (2 * log_scale).exp().mean(0)).sqrt().numpy() * scale
    assert np.median(drawn["floats"].std(0) / deviation) == pytest.approx(1, abs=0.03)
    log_rate, log_r = model.decoders[3](z).unbind(-1)
    rate = log_rate.exp()
    deviation = (rate.var(0) + (rate + rate**2 / log_r.exp()).mean(0)).sqrt().numpy()
    assert np.median(drawn["counts"].std(0) / deviation) == pytest.approx(1, abs=0.03)
    assert (drawn["counts"] % 1 == 0).all()
    p = model.decoders[2](z).sigmoid().mean(0).numpy()
    assert set(np.unique(drawn["bits"])) == {0, 1} and np.abs(drawn["bits"].mean(0) - p).max() < 0.1
    p = model.decoders[4](z).softmax(-1).mean(0)[:, 0].numpy()
    assert drawn["kind"].shape == (800, 30) and drawn["kind"].dtype == np.int64
    assert np.abs((drawn["kind"] == 0).mean(0) - p).max() < 0.1
    assert not {"floats_low", "kind_probabilities"} & set(drawn)


def test_drawn_images_are_the_mean_at_each_z(mixed, tmp_path):
    """Pixels would be noise."""
    test, _, model = mixed
    drawn, _ = filled(model, tmp_path, {"kind": test["kind"][:20]}, draws=60)
    x = drawn["picture"]
    assert x.shape == (60, 20, 1, 8, 10) and ((x > 0) & (x < 1)).mean() > 0.99
    assert x.std(0).min() > 1e-3


def test_shown_entries_stay_in_every_draw(mixed, tmp_path):
    test, _, model = mixed
    mask = mask_of(180, seed=6)
    new = test | {"mask": mask}
    drawn, summary = filled(model, tmp_path, new, draws=60)
    mean, means_of = filled(model, tmp_path, new)
    assert summary == means_of
    for m, name in enumerate(KINDS):
        x, shown = test[name], mask[:, m].reshape(-1, *[1] * (test[name].ndim - 1))
        shown = np.broadcast_to(shown & (x == x), x.shape)
        assert drawn[name].shape == (60, *x.shape) and drawn[name].dtype == x.dtype
        assert (drawn[name][:, shown] == x[shown]).all()
        assert (drawn[name][:, ~shown].std(0) > 0).mean() > 0.5
        assert np.isfinite(drawn[name]).all()
    given = mean["latent_mean"], drawn["latent_mean"]
    assert np.array_equal(*given)


# -------------------------------------------------------------------------------- refused, memory


def without(test, *names, **changed):
    return {name: x for name, x in test.items() if name not in names} | changed


WRONG = {
    "a name": (dict(zzz=np.zeros((180, 4))), "not zzz"),
    "a width": (dict(floats=np.zeros((180, 5))), "must have the shape (examples, 4)"),
    "an image": (dict(picture=np.zeros((180, 8, 9))), "must have the shape (examples, 1, 8, 10)"),
    "unequal lengths": (dict(bits=np.zeros((179, 3))), "as many rows each"),
    "a mask": (dict(mask=np.ones((180, 4))), "with shape (180, 5)"),
    "a mask with NaN": (dict(mask=np.full((180, 5), math.nan)), "mask must hold 0 and 1"),
    "a mask with 2": (dict(mask=np.full((180, 5), 2)), "mask must hold 0 and 1"),
    "a hidden row": (dict(mask=np.arange(180)[:, None].repeat(5, 1) != 7), "in row 7"),
    "text": (dict(bits=np.full((180, 3), "yes")), "bits must be numeric"),
    "infinity": (dict(floats=np.full((180, 4), math.inf)), "floats must hold numbers that are"),
    "large numbers": (dict(floats=np.full((180, 4), 1e300)), "floats must hold numbers that are"),
    "greys": (dict(picture=np.full((180, 8, 10), 2.0)), "bytes or floats in [0, 1]"),
    "no bits": (dict(bits=np.full((180, 3), 2)), "must hold 0 and 1"),
    "no counts": (dict(counts=np.full((180, 2), 0.5)), "whole numbers from 0 on"),
    "no class": (dict(kind=np.arange(180) % 5), "must be below 4, as in training, not 4"),
}


@pytest.mark.parametrize("change", WRONG)
def test_unsuitable_arrays_are_refused_before_the_work(mixed, monkeypatch, tmp_path, change):
    test, _, model = mixed
    (arrays_, expected), (path, out) = WRONG[change], paths(tmp_path)
    np.savez(path, **test | arrays_)
    monkeypatch.setattr(fill, "posterior_batches", None)
    with pytest.raises(ValueError) as error:
        fill.fill(model, path, out)
    assert (
        expected in str(error.value) and str(path) in str(error.value) or change == "a hidden row"
    )
    assert expected in str(error.value) and list(tmp_path.iterdir()) == [path]


def test_an_input_without_modalities_is_refused(mixed, tmp_path):
    path, out = paths(tmp_path)
    np.savez(path, mask=np.ones((3, 5)))
    with pytest.raises(ValueError, match="must hold arrays named picture, floats.* not none"):
        fill.check(mixed[2], path, out)


def test_an_output_that_cannot_be_written_is_refused(mixed, monkeypatch, tmp_path):
    """Before the input is read: nothing is computed for nothing."""
    path, _ = paths(tmp_path)
    path.write_bytes(b"kept")
    for out, expected in (
        (path, "exists: choose another --out"),
        (tmp_path / "filled.csv", "must end in .npz, not .*filled.csv"),
        (path / "filled.npz", "filled.npz cannot be written: .*new.npz: Not a directory"),
    ):
        with pytest.raises(ValueError, match=expected):
            fill.check(mixed[2], path, out)

    def read_only(dir):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(tempfile, "TemporaryFile", read_only)
    for out in (tmp_path / "filled.npz", tmp_path / "sub" / "filled.npz"):
        with pytest.raises(ValueError, match=f"cannot be written: {tmp_path}: Read-only"):
            fill.check(mixed[2], path, out)
    assert path.read_bytes() == b"kept" and list(tmp_path.iterdir()) == [path]


def test_a_missing_folder_is_made(mixed, tmp_path):
    path = tmp_path / "new.npz"
    np.savez(path, kind=mixed[0]["kind"])
    fill.fill(mixed[2], path, tmp_path / "a" / "b" / "filled.npz")
    assert (tmp_path / "a" / "b" / "filled.npz").exists()


def test_wide_tables_are_filled_in_by_blocks(tmp_path, monkeypatch):
    model, dataset = exact((3, 2000), n=60)
    sizes, decoder = [], model.decoders[1]

    def counted(z):
        parameter = decoder(z)
        sizes.append(parameter.numel())
        return parameter

    model.decoders[1] = counted
    new = {"x0": dataset.test.bases[0].numpy()}
    written, _ = filled(model, tmp_path, new, dataset=dataset)
    assert max(sizes) <= BUDGET < 50 * 60 * 2000 * 2
    drawn, _ = filled(model, tmp_path, new, draws=70)
    assert max(sizes) <= BUDGET and drawn["x1"].shape == (70, 60, 2000)
    assert (np.abs(drawn["x1"].mean(0) - written["x1"]) < 6 / np.sqrt(70)).mean() > 0.99
    monkeypatch.setattr("eval.BUDGET", 10**9)
    whole, _ = filled(model, tmp_path, new, dataset=dataset)
    assert max(sizes) > BUDGET
    for key, x in whole.items():
        assert np.allclose(x, written[key], rtol=1e-4, atol=1e-5)


def test_wide_tables_take_fewer_residuals(monkeypatch):
    model, dataset = exact((3, 40), n=120)
    monkeypatch.setattr(fill, "RESIDUALS", 40 * 30)
    errors = fill.residuals(model, dataset, (True, False), torch.arange(120), [1], 0)[1]
    assert errors.shape == (30, 40)
    assert fill.residuals(model, dataset, (False, True), torch.arange(120), [0], 0)[0].shape == (
        120,
        3,
    )


def test_intervals_of_a_biased_posterior_still_cover(tmp_path):
    """Residuals are those of the run, whatever its posterior."""
    model, dataset = exact((5, 4))
    model.posterior = lambda *xs: Independent(
        Normal(torch.zeros(next(len(x) for x in xs if x is not None), 2), 0.05), 1
    )
    new = model.examples(2000, 4)
    given, x = {"x1": new.bases[1].numpy()}, new.bases[0].numpy()
    for level in (0.9, 0.6):
        written, _ = filled(model, tmp_path, given, dataset=dataset, level=level)
        inside = (written["x0_low"] <= x) & (x <= written["x0_high"])
        assert inside.mean() == pytest.approx(level, abs=0.03)
