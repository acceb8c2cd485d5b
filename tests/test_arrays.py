"""A user's own arrays: kinds, likelihoods, standardised numbers, every model on every kind; a run's
folder, help and picture; a user's own features of CUB's photos."""

import json
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import SCRIPTS, originals, refused, save_arrays, shi, train
from PIL import Image
from torch.testing import assert_close

import data
import eval as evaluation
import mvae
import nets
from benchmarks import cub

RNG = np.random.default_rng(0)
N = 40
ARRAYS = {  # name: array, its kind, the type that it is held in
    "photo": (RNG.integers(0, 256, (N, 3, 8, 9), np.uint8), "bytes", torch.uint8),
    "scan": (RNG.random((N, 9, 8)), "greys", torch.float32),
    "drawing": (RNG.integers(0, 2, (N, 1, 8, 8)), "greys", torch.float32),
    "table": (1000 + 300 * RNG.normal(size=(N, 4)), "numbers", torch.float32),
    "below": (RNG.integers(-5, 9, (N, 3)), "numbers", torch.float32),
    "words": (RNG.integers(0, 9, (N, 6)), "counts", torch.float32),
    "bits": (RNG.random((N, 5)) > 0.5, "bits", torch.bool),
    "zeros": (RNG.integers(0, 2, (N, 5)), "bits", torch.bool),
    "species": (np.arange(N) % 4, "class", torch.int64),
}


def saved(path, arrays=None, **more):
    """An .npz with the same examples to train and to test with. -> its path, as text"""
    arrays = arrays or {name: row[0] for name, row in ARRAYS.items()}
    both = {f"{part}_{name}": x for part in ("train", "test") for name, x in arrays.items()}
    np.savez(path, **{name: x for name, x in (both | more).items() if x is not None})
    return str(path)


@pytest.fixture
def own(tmp_path):
    return saved(tmp_path / "kinds.npz", train_labels=np.arange(N))


# --------------------------------------------------------------------------- kinds, likelihoods, units


def test_arrays_are_modalities_in_order_and_of_their_kind(own):
    dataset = data.load(own)
    arrays = dataset.spec["arrays"]
    assert dataset.names == tuple(ARRAYS) == tuple(arrays)
    for (x, kind, dtype), spec, base in zip(
        ARRAYS.values(), arrays.values(), dataset.test.bases, strict=True
    ):
        assert data.kind_of(x[:, None] if x.ndim == 3 else x) == spec["kind"] == kind
        assert spec["likelihood"] == data.KINDS[kind].likelihoods[0]
        assert base.dtype == dtype
        if "stats" not in spec:
            assert np.allclose(base.numpy(), x.reshape(base.shape))
    assert arrays["scan"]["shape"] == [1, 9, 8] and arrays["species"]["shape"] == []
    assert arrays["species"]["classes"] == 4
    assert dataset.train.labels.tolist() == list(range(N)) and dataset.test.labels is None
    for m, x in zip(nets.modalities(**dataset.spec), dataset.train[torch.arange(N)]):
        assert x.shape == (N, *m.shape) and m.likelihood == arrays[m.name]["likelihood"]


COUNTS, BITS, REAL = np.array([[0, 1], [7, 2.0]]), np.array([[0, 1], [1, 1]]), np.eye(2) - 0.5
CHOSEN = [  # an array, the likelihood asked for, the kind that follows
    (COUNTS, "poisson", "counts"), (COUNTS, "normal", "numbers"), (BITS, "poisson", "counts"),
    (BITS, "laplace", "numbers"), (BITS, "bernoulli", "bits"), (REAL, "normal", "numbers"),
    (np.eye(2) / 2, "bernoulli", "greys"), (np.ones((2, 8, 8)), "normal", "greys"),
]  # fmt: skip
MISFITS = [  # an array, the likelihood asked for, what the error says
    (COUNTS / 2, "poisson", "must hold whole numbers from 0 on"),
    (REAL, "poisson", "must hold whole numbers from 0 on"),
    (COUNTS, "bernoulli", r"must hold bytes or floats in \[0, 1\]"),
    (COUNTS, "categorical", "needs the likelihood .* not 'categorical'"),
    (np.arange(2), "laplace", "needs the likelihood categorical, not 'laplace'"),
    (np.ones((2, 8, 8)), "poisson", "needs the likelihood bernoulli or laplace or normal"),
    (np.array([0, -1]), None, "must hold integers from 0 to C - 1"),
    (np.full((2, 8, 8), 7.0), None, r"must hold bytes or floats in \[0, 1\]"),
    (COUNTS, "nope", "nope"),
]  # fmt: skip


def loaded(folder, x, likelihood):
    """load_npz of x and something else."""
    path = save_arrays(folder / "a.npz", x, np.ones((2, 3)) / 2)
    return data.load(str(path), likelihoods=likelihood and [likelihood, "laplace"])


@pytest.mark.parametrize("x, likelihood, kind", CHOSEN)
def test_the_likelihood_asked_for_decides_the_kind(x, likelihood, kind, tmp_path):
    spec = loaded(tmp_path, x, likelihood).spec["arrays"]["0"]
    assert (spec["kind"], spec["likelihood"]) == (kind, likelihood)


@pytest.mark.parametrize("x, likelihood, says", MISFITS)
def test_values_a_likelihood_does_not_take_are_refused(x, likelihood, says, tmp_path):
    with pytest.raises(ValueError, match=f"a.npz: 0.*{says}"):
        loaded(tmp_path, x, likelihood)


def test_numbers_have_the_shown_training_examples_statistics(tmp_path):
    x, y = RNG.normal(size=(N, 3)) * [300, 1e-3, 1] + [1000, 0, 0], RNG.normal(size=(N, 2))
    x[:, 2] = 7  # constant
    mask = np.ones((N, 2), bool)
    mask[:5, 0] = False
    hidden = np.where(mask[:, :1], x, np.nan)
    path = saved(tmp_path / "a.npz", {"x": x, "y": y}, train_x=hidden, train_mask=mask)
    dataset = data.load(path, limit=30)
    stats, seen = dataset.spec["arrays"]["x"]["stats"], x[5:30]
    assert np.allclose(stats["mean"], seen.mean(0))
    assert np.allclose(stats["std"], [*seen.std(0)[:2], 1])
    base = dataset.train.bases[0][5:30]
    assert_close(base[:, :2].mean(0), torch.zeros(2), atol=1e-5, rtol=0)
    assert_close(base[:, :2].std(0, correction=0), torch.ones(2))
    assert (base[:, 2] == 0).all() and dataset.train.bases[0].isfinite().all()
    test = dataset.test.bases[0]
    for held in (test, test.numpy(), test.expand(2, N, 3)):  # in its units again, and back
        back = data.unstandardise(held, stats)
        assert type(back) is type(held) and back.shape == held.shape
        assert np.allclose(back, x, rtol=1e-5)
        assert np.allclose(data.standardise(back, stats), held, atol=1e-3)
    assert data.standardise(test, None) is test is data.unstandardise(test, None)
    plain = data.load(path, stats={})
    assert "stats" not in plain.spec["arrays"]["x"] and np.allclose(plain.test.bases[0], x)
    again = data.load(path, stats={"x": stats})  # as eval.py does, without limit
    assert torch.equal(again.test.bases[0], test)
    assert again.spec["arrays"]["x"]["stats"] == stats


def test_statistics_have_the_shape_of_a_feature():
    x = RNG.normal(size=(50, 2, 3)) + 5
    stats = data.feature_stats(x)
    assert np.array(stats["mean"]).shape == np.array(stats["std"]).shape == (2, 3)
    assert np.allclose(data.standardise(x, stats), (x - x.mean(0)) / x.std(0))


def test_what_a_mask_hides_may_be_anything_and_changes_nothing(tmp_path):
    mask = np.arange(N)[:, None] % 4 != [0, 1]  # every kind of value, where it is hidden
    x, y = RNG.integers(0, 9, (N, 3)).astype("f4"), np.arange(N) % 3
    wild = np.where(mask[:, :1], x, np.nan), np.where(mask[:, 1], y, -7)
    datasets = []
    for hidden in ((x, y), wild):
        both = dict(train_x=hidden[0], train_y=hidden[1], train_mask=mask)
        path = saved(tmp_path / "a.npz", {"x": x, "y": y}, **both)
        datasets.append(data.load(path, likelihoods=["poisson", "categorical"]))
    a, b = datasets
    assert a.spec == b.spec and a.note == b.note == "train_mask hides 25% of the arrays"
    for m in (0, 1):
        shown = torch.from_numpy(mask[:, m])
        assert torch.equal(a.train.bases[m][shown], b.train.bases[m][shown])
        assert not b.train.bases[m][~shown].any()


def test_integers_of_any_width_are_counts(tmp_path):
    counts = RNG.integers(0, 200, (N, 3))
    for dtype in ("u1", "i2", "i8"):
        path = saved(tmp_path / "a.npz", {"x": counts.astype(dtype), "y": RNG.normal(size=(N, 2))})
        dataset = data.load(path)
        spec = dataset.spec["arrays"]["x"]
        assert (spec["kind"], spec["likelihood"]) == ("counts", "negative-binomial")
        assert_close(dataset.test.bases[0], torch.from_numpy(counts).float())


def test_rounding_is_no_deviation_of_a_feature():
    x = RNG.normal(size=(1000, 3)) * [1, 1e-13, 1e-3] + [0, 1, 1000]
    assert data.feature_stats(x)["std"] == pytest.approx([x[:, 0].std(), 1, x[:, 2].std()])
    shares = RNG.random((1000, 3))
    total = (shares / shares.sum(1, keepdims=True)).sum(1, keepdims=True)
    assert total.std() > 0 and data.feature_stats(total)["std"] == [1]
    assert data.feature_stats(total.astype("f4"))["std"] == [1]
    assert data.feature_stats((1000 + RNG.normal(size=(1000, 1))).astype("f4"))["std"][0] < 1.2


def test_nan_is_a_missing_entry_or_a_missing_row(tmp_path):
    x, y = RNG.normal(size=(N, 3)) + 5, RNG.normal(size=(N, 2))
    x[3, 1], x[7], y[9, 0] = np.nan, np.nan, np.nan
    dataset = data.load(saved(tmp_path / "a.npz", {"x": x, "y": y}))
    assert dataset.mask.tolist() == [[row != 7, True] for row in range(N)]
    assert torch.equal(dataset.test_mask, dataset.mask)
    stats = dataset.spec["arrays"]["x"]["stats"]
    assert np.allclose(stats["mean"], np.nanmean(x, 0))
    assert np.allclose(stats["std"], np.nanstd(x, 0))
    base = dataset.train.bases[0]
    assert base.isnan().nonzero().tolist() == [[3, 1]] and not base[7].any()
    # the encoder sees 0, the mean, and the entry is not scored
    (modality, _) = nets.modalities(**dataset.spec)
    encode, decode = modality.encoder(2), modality.decoder(2)
    zero = base[3:4].nan_to_num(0.0)
    assert_close(encode(base[3:4]), encode(zero))
    parameter = decode(torch.randn(1, 2))
    location, log_scale = parameter.unbind(-1)
    normal = torch.distributions.Normal(location, log_scale.exp()).log_prob(zero)[0]
    nats = nets.log_prob(modality, parameter, base[3:4])
    assert_close(nats[0], normal[0] + normal[2])
    nats.sum().backward()
    assert all(w.grad.isfinite().all() for w in decode.parameters())
    x[:, 0] = np.inf
    with pytest.raises(ValueError, match="a.npz: x must hold numbers that are finite"):
        data.load(saved(tmp_path / "a.npz", {"x": x, "y": y}))


def test_a_test_mask_says_what_test_rows_show(tmp_path):
    arrays = {"x": RNG.normal(size=(N, 3)), "y": np.arange(N) % 3}
    mask = np.arange(N)[:, None] % 4 != [0, 1]
    dataset = data.load(saved(tmp_path / "a.npz", arrays, test_mask=mask))
    assert dataset.mask is None and dataset.test_mask.tolist() == mask.tolist()
    for bad in (mask[:, :1], np.where(mask, 1, np.nan)):
        with pytest.raises(ValueError, match="test_mask must hold 0 and 1"):
            data.load(saved(tmp_path / "a.npz", arrays, test_mask=bad))
    nothing = mask & (np.arange(N) != 5)[:, None]
    with pytest.raises(ValueError, match="row 5 of the test split shows nothing"):
        data.load(saved(tmp_path / "a.npz", arrays, test_mask=nothing))


@pytest.mark.parametrize("name", ["latent_mean", "x_low", "x_high", "x_probabilities", "all"])
def test_names_that_fill_writes_itself_are_refused(name, tmp_path):
    arrays = {"x": RNG.normal(size=(N, 3)), name: RNG.normal(size=(N, 3))}
    with pytest.raises(ValueError, match=f"cannot be called '{name}'"):
        data.load(saved(tmp_path / "a.npz", arrays))


def test_a_moved_archive_continues_its_run(arrays, tmp_path, capsys):
    run, moved = tmp_path / "run", tmp_path / "moved.npz"
    train("mvae", dataset=arrays, batch_size=16, epochs=1, out=run)
    Path(arrays).rename(moved)
    train("mvae", dataset=moved, batch_size=16, epochs=2, out=run, resume=True)
    kept = dict(np.load(moved))
    kept["test_0"] = kept["test_0"] + 1
    np.savez(moved, **kept)
    refused("mvae", dataset=moved, batch_size=16, epochs=3, out=run, resume=True)
    assert "moved.npz does not hold the data" in capsys.readouterr().err


def test_a_run_says_what_each_array_was_taken_for(arrays, tmp_path, capsys):
    train("mvae", dataset=arrays, epochs=1, out=tmp_path / "run")
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("0: numbers (5), normal, standardised (--no-standardise); --like")
    assert lines[2].startswith("1: bits (4), bernoulli; --likelihoods changes it")


def test_small_tables_get_1500_steps_and_large_ones_100_epochs(arrays, tmp_path, monkeypatch):
    for script in SCRIPTS.values():
        assert (script.LEAST_EPOCHS, script.LEAST_STEPS) == (100, 1500)
    for least, rows in ((30, 32), (4, 96)):
        monkeypatch.setattr(mvae, "LEAST_STEPS", least)
        monkeypatch.setattr(mvae, "LEAST_EPOCHS", 3)
        run = tmp_path / str(rows)
        train("mvae", dataset=arrays, limit=rows, batch_size=16, out=run)
        epochs = json.loads((run / "args.json").read_text(encoding="utf-8"))["epochs"]
        assert epochs == max(3, -(-least // (rows // 16)))


# ------------------------------------------------------------ learned scales, outputs at the marginal


def test_a_learned_scale_is_that_of_the_distribution():
    location, log_scale = torch.randn(3, 4, 2), torch.randn(3, 4, 2)
    x, parameter = torch.randn(4, 2), torch.stack([location, log_scale], -1)
    for name, family in (
        ("normal", torch.distributions.Normal),
        ("laplace", torch.distributions.Laplace),
    ):
        modality = nets.Modality("x", (2,), None, None, name, scale=None)
        expected = family(location, log_scale.exp()).log_prob(x).sum(-1)
        assert_close(nets.log_prob(modality, parameter, x), expected)
        assert_close(nets.mean(modality, parameter), location)


def test_counts_have_the_negative_binomial_s_probabilities():
    modality = nets.Modality("c", (2,), None, None, "negative-binomial")
    log_rate, log_r = torch.randn(3, 4, 2), torch.randn(3, 4, 2)
    x, parameter = torch.poisson(torch.full((4, 2), 3.0)), torch.stack([log_rate, log_r], -1)
    expected = torch.distributions.NegativeBinomial(log_r.exp(), logits=log_rate - log_r)
    assert_close(nets.log_prob(modality, parameter, x), expected.log_prob(x).sum(-1))
    assert_close(nets.mean(modality, parameter), expected.mean)


@pytest.mark.parametrize("likelihood", nets.LIKELIHOODS)
def test_draws_have_the_moments_of_the_likelihood(likelihood):
    p = torch.tensor([[0.4, -1.0], [1.2, -0.3]])  # (features, location and log scale), or logits
    scale = None if likelihood in ("normal", "laplace") else 1.0
    shape = () if likelihood == "categorical" else (2,)
    modality = nets.Modality("x", shape, None, None, likelihood, scale=scale)
    parameter = p if nets.extra_axis(modality) else p[:, 0]
    x = nets.sample(modality, parameter.expand(40_000, *parameter.shape)).double()
    rate, second = p[:, 0].exp(), p[:, 1].exp()
    prob = p[:, 0].sigmoid()
    mean, variance = {
        "bernoulli": (prob, prob * (1 - prob)),
        "normal": (p[:, 0], second**2),
        "laplace": (p[:, 0], 2 * second**2),
        "poisson": (rate, rate),
        "negative-binomial": (rate, rate + rate**2 / second),
        "categorical": (p.softmax(-1)[:, 1], p.softmax(-1).prod(-1)),
    }[likelihood]
    assert_close(x.mean(0).float(), mean, atol=0.1, rtol=0.02)
    assert_close(x.var(0).float(), variance, atol=0.05, rtol=0.1)


def test_outputs_and_scales_start_at_the_training_marginal(tmp_path):
    counts = RNG.poisson([3, 1000], (400, 2)) * np.array([1, 2])  # the second is over-dispersed
    bits, kinds = RNG.random((400, 2)) < [0.1, 0.7], RNG.choice(3, 400, p=[0.2, 0.5, 0.3])
    numbers = RNG.normal(size=(400, 2)) * [3, 0.01] + [100, 5]
    arrays = {"counts": counts, "bits": bits, "kinds": kinds, "numbers": numbers}
    for standardised in (None, {}):
        dataset = data.load(saved(tmp_path / "a.npz", arrays), stats=standardised)
        modalities = {m.name: m for m in nets.modalities(**dataset.spec)}
        last = {}
        for name, modality in modalities.items():
            layers = modality.decoder(3).net
            last[name] = (
                layers[-2].bias
                if nets.extra_axis(modality) and name != "kinds"
                else layers[-1].bias
            )
            if name in ("counts", "numbers"):
                last[f"{name} scale"] = layers[-1](torch.zeros(1, 2))[0, :, 1]
        assert_close(last["counts"].exp(), torch.tensor(counts.mean(0)).float())
        assert_close(last["bits"].sigmoid(), torch.tensor(bits.mean(0)).float())
        assert_close(last["kinds"].softmax(-1), torch.tensor(np.bincount(kinds) / 400).float())
        mean, std = (numbers.mean(0), numbers.std(0)) if standardised == {} else (0.0, 1.0)
        assert_close(last["numbers"], torch.zeros(2) + torch.tensor(mean).float())
        expected = torch.zeros(2) + torch.tensor(std).float()
        assert_close(last["numbers scale"].exp(), expected, rtol=0.011, atol=0)
        mean, var = torch.tensor(counts.mean(0)), torch.tensor(counts.var(0))
        r = last["counts scale"].exp()[1].item()
        assert r == pytest.approx((mean**2 / (var - mean))[1].item(), rel=0.01)


def test_a_scale_stays_above_a_hundredth_of_the_deviation():
    learned = nets.Learned(torch.tensor([0.0, 2.0]), torch.tensor([0.0, 2.0]) + np.log(1e-2))
    learned.value.data -= 100
    assert_close(learned(torch.zeros(1, 2))[0, :, 1].exp(), torch.tensor([0.0, 2.0]).exp() / 100)


# -------------------------------------------------------------------------------- counts and classes


def test_encoders_of_counts_and_classes_take_pseudo_samples(own):
    modalities = dict(zip(ARRAYS, nets.modalities(**data.load(own).spec)))
    u = torch.tensor([[-5.0, -1, -0.5, 0, 1, 2]], requires_grad=True)  # as they may become
    torch.cat(modalities["words"].encoder(3)(u)).sum().backward()
    assert u.grad.isfinite().all() and (u.grad != 0).all()
    one_hot, logits = nets.OneHot(4), torch.randn(2, 4)
    assert one_hot(torch.tensor([2, 0])).tolist() == [[0, 0, 1, 0], [1, 0, 0, 0]]
    assert_close(one_hot(logits), logits.softmax(-1))
    species, certain = modalities["species"].encoder(3), torch.tensor([[0, 0, 100.0, 0]])
    assert_close(species(certain), species(torch.tensor([2])))


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_model_trains_on_every_kind_with_any_missing(script, own):
    dataset = data.load(own)
    names = "table", "words", "species"
    kept = {name: dataset.spec["arrays"][name] for name in names}
    modalities = nets.modalities("npz", arrays=kept)
    whole = dataset.train[torch.arange(8)]
    xs = [whole[list(ARRAYS).index(name)] for name in names]
    model = SCRIPTS[script].MODEL(modalities, 3)
    if script == "meme":
        model.init_pseudo_samples(xs)
        assert_close(model.pseudo[2][:8].argmax(-1), xs[2])  # a class as logits
    alone = [[x if k == m else None for k, x in enumerate(xs)] for m in range(3)]
    model([(1.0, xs), *((1.0, each) for each in alone)]).sum().backward()
    assert all(w.grad is None or w.grad.isfinite().all() for w in model.parameters())
    for each in (xs, *alone):
        z = model.posterior(*each).sample((2,))
        assert [x.shape for x in model.decode(z)] == [(2, 8, 4), (2, 8, 6), (2, 8, 4)]
        assert evaluation.log_likelihood(model, each, samples=3).isfinite().all()


# ------------------------------------------------------------------ a run's folder, help and picture


def folder_of(script, *flags):
    return SCRIPTS[script].parse_args(list(flags))[1].out


def test_another_setting_is_another_folder(own):
    usual = "runs/meme-glyphs-paired1-split-seed0"
    assert folder_of("meme") == folder_of("meme", "--epochs", "5", "--data", "x") == usual
    typed = "--batch-size 8 --lr 0.01 --latent-dim 3 --limit 300 --sampling balanced --device cuda"
    name = folder_of("meme", *typed.split())
    shown = "limit=300 batch-size=8 lr=0.01 latent-dim=3 sampling=balanced".split()
    assert name.startswith(usual) and len(name) == len(usual) + sum(1 + len(x) for x in shown)
    assert all(f"-{x}" in name for x in shown)
    more = "--weights 2,1 --likelihoods normal,laplace --width 0.5 --no-standardise --full-gradient"
    name = folder_of("meme", *more.split())
    for part in "weights=2,1 likelihoods=normal,laplace width=0.5 no-standardise".split():
        assert f"-{part}" in name and "full-gradient" in name
    named = folder_of("meme", *"--kl sample --paired 0.25 --unpaired grey --seed 3".split())
    assert named == "runs/meme-glyphs-paired0.25-grey-seed3-kl=sample"
    assert folder_of("svae", "--dataset", own) == "runs/svae-kinds-paired1-all-seed0"
    assert folder_of("svae", "--out", "here") == "here"


def test_a_run_continues_with_the_statistics_that_it_began_with(arrays, tmp_path):
    run, flags = tmp_path / "run", dict(dataset=arrays, batch_size=16, out=tmp_path / "run")
    train("mvae", **flags, epochs=1)
    args = json.loads((run / "args.json").read_text(encoding="utf-8"))
    args["spec"]["arrays"]["0"]["stats"]["mean"][0] += 1e-16  # another machine's sum
    (run / "args.json").write_text(json.dumps(args), encoding="utf-8")
    train("mvae", **flags, epochs=2, resume=True)
    assert json.loads((run / "args.json").read_text(encoding="utf-8"))["spec"] == args["spec"]
    refused("mvae", "--no-standardise", **flags, epochs=3, resume=True)


@pytest.mark.parametrize("other", [lambda x: x[:20], lambda x: x[:, :3], lambda x: x > 0])
def test_a_run_is_not_continued_on_other_data(other, arrays, tmp_path, capsys):
    flags = dict(dataset=arrays, batch_size=16, out=tmp_path / "run")
    train("mvae", **flags, epochs=1)
    np.savez(arrays, **{name: other(x) for name, x in np.load(arrays).items()})
    refused("mvae", **flags, epochs=2, resume=True)
    assert re.search(r"own.npz.* does not (hold|have) .* began with", capsys.readouterr().err)


def test_a_table_s_run_of_an_earlier_version_is_refused(arrays, tmp_path):
    train("mvae", dataset=arrays, epochs=1, out=tmp_path)
    args = json.loads((tmp_path / "args.json").read_text(encoding="utf-8"))
    args["spec"] = {"name": "npz", "shapes": {"0": [5], "1": [4]}}
    (tmp_path / "args.json").write_text(json.dumps(args), encoding="utf-8")
    with pytest.raises(ValueError, match="of an earlier version"):
        data.read_run(tmp_path)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_explains_every_flag_with_the_data_set_s_defaults(script, capsys):
    module = SCRIPTS[script]
    for dataset, defaults in module.DEFAULTS.items():
        with pytest.raises(SystemExit) as stopped:
            module.main(["--dataset", dataset, "--help"])
        text = re.sub(r"\s+", " ", capsys.readouterr().out)
        assert stopped.value.code == 0
        for value in defaults.values():
            assert f"(default: {value})" in text, (dataset, value)
    actions = module.parse_args([])[0]._actions
    assert all(action.help and len(action.help) > 8 for action in actions)


@pytest.fixture
def few_glyphs(monkeypatch):
    """The glyphs are 20 random images with 5 labels. -> the split"""
    pixels = [torch.rand(20, 1, 28, 28), torch.rand(20, 3, 32, 32)]
    split = data.Split(pixels, labels=torch.arange(20) % 5)
    monkeypatch.setattr(data.benchmark("glyphs"), "glyphs", lambda n, seed: split)
    return split


def test_a_run_ends_with_a_picture_of_generated_test_examples(few_glyphs, tmp_path, capsys):
    out = tmp_path / "run"
    train("mvae", epochs=1, batch_size=10, out=out)
    *_, line, command = capsys.readouterr().out.splitlines()
    rows = "grey, grey -> grey, grey -> colour, colour, colour -> grey, colour -> colour"
    assert line == f"{out / 'examples.png'} has rows of test examples: {rows}"
    assert command == f"python eval.py {out}"
    with Image.open(out / "examples.png") as image:
        pixels = np.asarray(image)
    assert pixels.shape == (2 * (6 * 34 + 2), 2 * (5 * 34 + 2), 3)  # a column for each label
    for k in range(5):  # the first of each, enlarged
        tile = pixels[4 : 4 + 56 : 2, 4 + 68 * k : 4 + 68 * k + 56 : 2]
        assert abs(tile[..., 0] / 255 - few_glyphs.bases[0][k, 0].numpy()).max() < 0.003
        colour = pixels[4 + 3 * 68 : 68 * 4 : 2, 4 + 68 * k : 68 + 68 * k : 2]
        assert abs(colour / 255 - few_glyphs.bases[1][k].numpy().transpose(1, 2, 0)).max() < 0.003


def test_a_row_is_generated_from_its_modality_in_eval_mode(few_glyphs, tmp_path, monkeypatch):
    class Coloured:  # decodes what it is shown: .25 for grey, .75 for colour; in eval mode only
        modalities, training = nets.modalities("glyphs"), True

        def eval(self):
            self.training = False

        def parameters(self):
            return iter([torch.zeros(1)])

        def posterior(self, grey, colour):
            assert not self.training and (grey is None) != (colour is None)
            shown = 0.25 if colour is None else 0.75
            return torch.distributions.Normal(torch.full((5, 1), shown), 1e-9)

        def decode(self, z):
            return [z[..., None, None].expand(-1, *m.shape) for m in self.modalities]

    rows = []
    monkeypatch.setattr(data, "save_grid", lambda found, path: rows.extend(found) or True)
    mvae.save_examples(Coloured(), data.load("glyphs"), tmp_path / "a.png")
    assert torch.equal(rows[0], few_glyphs.bases[0][:5])
    assert torch.equal(rows[3], few_glyphs.bases[1][:5])
    means = [round(rows[k].mean().item(), 4) for k in (1, 2, 4, 5)]
    assert means == [0.25, 0.25, 0.75, 0.75]


def test_nothing_is_drawn_without_images_or_torchvision(arrays, own, tmp_path, capsys, monkeypatch):
    train("mvae", dataset=arrays, epochs=1, out=tmp_path / "a")
    assert "rows of test" not in capsys.readouterr().out
    monkeypatch.setitem(sys.modules, "torchvision.utils", None)
    train("mvae", dataset=own, epochs=1, out=tmp_path / "b")
    assert "rows of test" not in capsys.readouterr().out
    for run in ("a", "b"):
        assert len(list((tmp_path / run).iterdir())) == 3


# --------------------------------------------------------------------------- features of one's own


@pytest.mark.parametrize("layout", [shi, originals])
def test_cub_takes_a_user_s_own_features_of_any_width(layout, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder = layout(tmp_path)
    files = cub.list_photos(folder, "train") + cub.list_photos(folder, "test")
    x = RNG.normal(size=(6, 5)).astype(np.float16) * 100
    np.savez("own.npz", x=x)
    data.main(["cub", "--data", ".", "--features", "own.npz"])
    assert "5 features per photo, from own.npz (MD5 " in capsys.readouterr().out
    dataset = data.load("cub", ".")
    wide = x.astype(np.float64)
    expected = (wide - wide[:4].mean(0)) / wide[:4].std(0)
    assert np.allclose(dataset.train.bases[0], expected[:4], atol=1e-5)
    assert np.allclose(dataset.test.bases[0], expected[4:], atol=1e-5)
    model = mvae.MVAE(nets.modalities(**dataset.spec), 2)
    assert model.decode(torch.zeros(3, 2))[0].shape == (3, 5)
    train("mvae", dataset="cub", data=".", epochs=1, batch_size=20, latent_dim=2, out="run")
    assert json.loads(Path("run/args.json").read_text())["note"] == dataset.note
    os.remove("cub/features.npz")
    order = RNG.permutation(6)  # named, they may be in any order, and in another folder
    names = np.array(["elsewhere/" + "/".join(Path(files[k]).parts[-2:]) for k in order])
    np.savez("named.npz", x=x[order], files=names)
    cub.prepare_cub(tmp_path, "from named.npz", features="named.npz")
    assert torch.equal(data.load("cub", ".").train.bases[0], dataset.train.bases[0])


@pytest.mark.parametrize(
    "arrays, says",
    [
        ({"y": np.ones((6, 2))}, "no array 'x'"),
        ({"x": np.ones(6)}, "x must be numeric .photos, features."),
        ({"x": np.ones((5, 2))}, "features of the 6 photos, not of 5, or their names"),
        ({"x": np.ones((6, 2)), "files": np.array(["a/b.jpg"] * 6)}, "no features of 6 of the 6"),
        ({"x": np.ones((6, 2)), "files": np.arange(6)}, "a name for each of the 6 rows"),
        ({"x": np.full((6, 2), np.nan)}, "x must be finite"),
    ],
)
def test_features_that_do_not_fit_the_photos_are_refused(arrays, says, tmp_path, capsys):
    shi(tmp_path)
    np.savez(tmp_path / "own.npz", **arrays)
    with pytest.raises(SystemExit) as stopped:
        data.main(["cub", "--data", str(tmp_path), "--features", str(tmp_path / "own.npz")])
    error = capsys.readouterr().err.splitlines()[-1]
    assert stopped.value.code == 2 and re.search(says, error)
    assert not (tmp_path / "cub" / "features.npz").exists()
