"""A user's own arrays: kinds and likelihoods, masks and missing entries, statistics, refusals."""

import json
import shutil
import tracemalloc

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import data
import nets
from helpers import SCRIPTS, refused, train
from loaders import arrays

RNG = np.random.default_rng(0)
N, TEST = 40, 24  # training and test examples


def both(draw):
    """draw(n, k) for the training split (k = 0) and the test split (k = 1)."""
    return draw(N, 0), draw(TEST, 1)


# name: its arrays, whose splits have other statistics; its kind; the type that it is held in
ARRAYS = {
    "photo": (
        both(lambda n, k: RNG.integers(9 * k, 256, (n, 3, 8, 9), np.uint8)),
        "bytes",
        "uint8",
    ),
    "scan": (both(lambda n, k: RNG.random((n, 9, 8)) / (1 + k)), "greys", "float32"),
    "sketch": (both(lambda n, k: RNG.integers(0, 2, (n, 1, 8, 8), np.uint8)), "bits", "bool"),
    "table": (
        both(lambda n, k: 1000 + 70 * k + 300 * RNG.normal(size=(n, 4))),
        "numbers",
        "float32",
    ),
    "signed": (both(lambda n, k: RNG.integers(-5, 9 + k, (n, 3))), "numbers", "float32"),
    "counts": (both(lambda n, k: RNG.integers(0, 9 + 5 * k, (n, 6))), "counts", "float32"),
    "small": (both(lambda n, k: RNG.integers(0, 200, (n, 3), np.uint8)), "counts", "float32"),
    "bits": (both(lambda n, k: RNG.random((n, 5)) > 0.5 + 0.2 * k), "bits", "bool"),
    "floats": (both(lambda n, k: 1.0 * RNG.integers(0, 2, (n, 5))), "bits", "bool"),
    "species": (both(lambda n, k: np.arange(n) % (4 + k)), "class", "int64"),
}


def save(path, pairs, **more):
    """An .npz of {name: (training array, test array)}, or of one array for both. -> its path"""
    pairs = {name: x if isinstance(x, tuple) else (x, x) for name, x in pairs.items()}
    contents = {f"train_{name}": train for name, (train, _) in pairs.items()}
    contents |= {f"test_{name}": test for name, (_, test) in pairs.items()}
    np.savez(path, **(contents | more))
    return str(path)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "a.npz"


@pytest.fixture
def kinds(path):
    pairs = {name: row[0] for name, row in ARRAYS.items()}
    return save(path, pairs, train_labels=np.arange(N), test_labels=np.arange(TEST) % 3)


# ---------------------------------------------------------------------------- kinds and likelihoods


def test_arrays_are_modalities_in_order_and_of_their_kind(kinds):
    dataset = data.load(kinds)
    facts = dataset.spec["arrays"]
    assert dataset.names == tuple(ARRAYS) == tuple(facts)
    splits = dataset.train, dataset.test
    for m, (name, (pair, kind, dtype)) in enumerate(ARRAYS.items()):
        assert facts[name]["kind"] == kind
        assert facts[name]["likelihood"] == arrays.KINDS[kind].likelihoods[0]
        for split, x in zip(splits, pair):
            assert str(split.bases[m].dtype) == f"torch.{dtype}"
            if "stats" not in facts[name]:
                assert np.array_equal(split.bases[m], x.reshape(split.bases[m].shape).astype("f4"))
    assert facts["scan"]["shape"] == [1, 9, 8] and facts["species"]["shape"] == []
    assert facts["species"]["classes"] == 5  # the fifth is in the test split alone
    assert dataset.train.labels.tolist() == list(range(N))
    assert dataset.test.labels.tolist() == [row % 3 for row in range(TEST)]
    modalities = nets.modalities(**json.loads(json.dumps(dataset.spec)))
    for modality, x in zip(modalities, dataset.test[torch.arange(TEST)], strict=True):
        assert x.shape == (TEST, *modality.shape)
        assert modality.likelihood == facts[modality.name]["likelihood"]
        assert modality.kind == facts[modality.name]["kind"]


COUNTS, BITS, REAL = np.array([[0, 1], [7, 2.0]]), np.array([[0, 1], [1, 1]]), np.eye(2) - 0.5
DARK, IMAGE = np.eye(8, dtype="u1")[None].repeat(2, 0), np.full((2, 8, 8), 200, "u1")
CHOSEN = [  # an array, the likelihood asked for, the kind that follows
    (COUNTS, "poisson", "counts"), (COUNTS, "normal", "numbers"), (BITS, "poisson", "counts"),
    (BITS, "laplace", "numbers"), (BITS, "bernoulli", "bits"), (REAL, "normal", "numbers"),
    (np.eye(2) / 2, "bernoulli", "greys"), (np.ones((2, 8, 8)), "normal", "greys"),
    (COUNTS.astype("u1"), "bernoulli", "bytes"), (COUNTS.astype("i2"), None, "counts"),
    (IMAGE, "laplace", "bytes"), (np.ones((2, 8, 8)), None, "greys"),
    (DARK, "laplace", "greys"), (DARK > 0, "bernoulli", "bits"),
]  # fmt: skip
MISFITS = [  # an array, the likelihood asked for, what the error says
    (COUNTS / 2, "poisson", "must hold whole numbers from 0 on.* or name another likelihood"),
    (REAL, "poisson", "must hold whole numbers from 0 on"),
    (np.array([[1.0], [np.inf]]), "poisson", "must hold whole numbers from 0 on"),
    (COUNTS, "bernoulli", r"must hold bytes or floats in \[0, 1\]"),
    (COUNTS, "categorical", "needs the likelihood .* not 'categorical'"),
    (np.arange(2), "laplace", "needs the likelihood categorical, not 'laplace'"),
    (np.ones((2, 8, 8)), "poisson", "needs the likelihood bernoulli or laplace or normal"),
    (np.array([0, -1]), None, "must hold integers from 0 to C - 1, .* train_mask$"),
    (np.array([0, 2**16]), None, "must hold integers from 0 to C - 1"),
    (np.array([0.0, 1.0]), None, "a class is an integer"),
    (np.full((2, 8, 8), 7.0), None, r"must hold bytes or floats in \[0, 1\]"),
    (np.linspace(-0.5, 1, 128).reshape(2, 8, 8), None, r"must hold bytes or floats in \[0, 1\]"),
    (np.full((2, 1), np.inf), None, "must hold numbers that are finite"),
    (np.array([[1.5], [np.inf]]), None, "must hold numbers that are finite"),
    (COUNTS, "nope", "nope"),
]  # fmt: skip


def load_beside_floats(path, x, likelihood=None):
    """The data set of x and another array. likelihood: the one of x."""
    asked = likelihood and [likelihood, "laplace"]
    return data.load(save(path, {"x": x, "y": np.ones((len(x), 3)) / 2}), likelihoods=asked)


@pytest.mark.parametrize("x, likelihood, kind", CHOSEN)
def test_the_likelihood_asked_for_decides_the_kind(x, likelihood, kind, path):
    facts = load_beside_floats(path, x, likelihood).spec["arrays"]["x"]
    assert facts["kind"] == kind
    assert facts["likelihood"] == (likelihood or arrays.KINDS[kind].likelihoods[0])


@pytest.mark.parametrize("x, likelihood, error", MISFITS)
def test_values_a_likelihood_does_not_take_are_refused(x, likelihood, error, path):
    with pytest.raises(ValueError, match=f"a.npz: x.*{error}"):
        load_beside_floats(path, x, likelihood)


@pytest.mark.parametrize("part", ["train", "test"])
def test_each_split_must_hold_the_values_of_the_kind(part, path):
    wrong = {f"{part}_x": np.array([[0, 3], [-1, 2]])}
    pairs = {"x": np.array([[0, 3], [1, 2]]), "y": REAL}
    with pytest.raises(ValueError, match=f"x must hold whole numbers .* the {part} split"):
        data.load(save(path, pairs, **wrong), likelihoods=["poisson", "normal"])


def test_numbers_too_large_for_float32_are_refused(path):
    x = np.array([[1e39], [3e39]])
    base = data.load(save(path, {"x": x, "y": REAL})).train.bases[0]
    assert base.flatten().tolist() == [-1, 1]  # standardised, they fit
    with pytest.raises(ValueError, match="x must hold numbers that are finite in float32"):
        data.load(str(path), standardise=False)


def test_class_codes_far_above_their_number_are_refused(path):
    codes = np.array([0, 7, 60_000, 7])
    for x in (codes, np.array([1, 30, 2])):  # an output for each code: more than ten times as many
        with pytest.raises(ValueError, match="x has 3 classes with codes up to .*0: .*np.unique"):
            load_beside_floats(path, x)
    for x in (np.unique(codes, return_inverse=True)[1], np.array([1, 29, 2])):
        facts = load_beside_floats(path, x).spec["arrays"]["x"]
        assert facts["classes"] == x.max() + 1


# --------------------------------------------------------------------------------------- statistics


def test_numbers_have_the_statistics_of_shown_training_examples(path):
    x, mask = tuple(x.copy() for x in ARRAYS["table"][0]), np.ones((N, 2), bool)
    x[0][:, 2] = 7  # constant in training
    mask[:5, 0] = False
    hidden = np.where(mask[:, :1], x[0], np.nan), x[1]
    save(path, {"x": hidden, "y": both(lambda n, k: RNG.normal(size=(n, 2)))}, train_mask=mask)
    dataset = data.load(str(path), limit=30)
    stats, examples = dataset.spec["arrays"]["x"]["stats"], x[0][5:30]
    mean, std = examples.mean(0), examples.std(0)
    std[2] = 1
    assert_close(torch.tensor(stats["mean"]), torch.from_numpy(mean).float())
    assert_close(torch.tensor(stats["std"]), torch.from_numpy(std).float())
    for split, values, rows in (dataset.train, x[0], range(5, 30)), (dataset.test, x[1], range(24)):
        expected = torch.from_numpy((values - mean) / std).float()
        assert_close(split.bases[0][rows], expected[rows], atol=1e-5, rtol=1e-5)
    assert "marginal" not in dataset.spec["arrays"]["x"]


def test_numbers_stay_as_they_are_without_standardising(path):
    x, y = ARRAYS["table"][0], both(lambda n, k: RNG.normal(size=(n, 2)))
    dataset = data.load(save(path, {"x": x, "y": y}), limit=30, standardise=False)
    facts = dataset.spec["arrays"]["x"]
    assert np.array_equal(dataset.test.bases[0], x[1].astype("f4"))
    assert "stats" not in facts
    assert np.allclose(facts["marginal"]["mean"], x[0][:30].mean(0))
    assert np.allclose(facts["marginal"]["std"], x[0][:30].std(0))


def test_other_arrays_have_their_training_marginal(path):
    names = "counts", "small", "bits", "species"
    mask = np.arange(N)[:, None] % 5 != np.arange(4)
    dataset = data.load(save(path, {n: ARRAYS[n][0] for n in names}, train_mask=mask), limit=33)
    for m, name in enumerate(names):
        x = ARRAYS[name][0][0][:33][mask[:33, m]]
        marginal = dataset.spec["arrays"][name]["marginal"]
        if name == "species":
            assert marginal == {"mean": [(x == c).mean() for c in range(5)]}
        else:
            assert np.allclose(marginal["mean"], x.mean(0))
            assert np.allclose(marginal["std"], x.std(0))
    table = ARRAYS["small"][0]
    asked = ["bernoulli", "categorical"]
    dataset = data.load(save(path, {"x": table, "y": ARRAYS["species"][0]}), likelihoods=asked)
    assert np.allclose(dataset.spec["arrays"]["x"]["marginal"]["mean"], table[0].mean(0) / 255)


def test_statistics_leave_out_nan_and_masked_rows_block_by_block(monkeypatch):
    x = np.sort(RNG.normal(size=(50, 2, 3)), 0) + 5  # sorted: every block has another mean
    x[RNG.random(x.shape) < 0.2] = np.nan
    mask = RNG.random(50) < 0.7
    for values in (arrays.BLOCK, 36):
        monkeypatch.setattr(arrays, "BLOCK", values)
        for rows in (None, mask):
            stats = arrays.feature_stats(x, rows)
            part = x if rows is None else x[rows]
            assert np.allclose(stats["mean"], np.nanmean(part, 0))
            assert np.allclose(stats["std"], np.nanstd(part, 0))
    x[:, 1, 2] = np.nan
    stats = arrays.feature_stats(x)
    assert stats["mean"][1][2] == 0 and stats["std"][1][2] == 1


def test_rounding_is_no_deviation_of_a_feature():
    x = RNG.normal(size=(1000, 3)) * [1, 1e-13, 1e-3] + [0, 1, 1000]
    assert arrays.feature_stats(x)["std"] == pytest.approx([x[:, 0].std(), 1, x[:, 2].std()])
    shares = RNG.random((1000, 3))
    total = (shares / shares.sum(1, keepdims=True)).sum(1, keepdims=True)
    assert total.std() > 0 and arrays.feature_stats(total)["std"] == [1]
    assert arrays.feature_stats(total.astype("f4"))["std"] == [1]
    assert arrays.feature_stats((1000 + RNG.normal(size=(1000, 1))).astype("f4"))["std"][0] < 1.2


@pytest.mark.parametrize("as_type", [np.array, torch.tensor])
def test_unstandardising_is_the_inverse(as_type):
    stats = {"mean": [1.0, -2.0], "std": [3.0, 0.5]}
    x = as_type([[[4.0, -1.0], [1.0, -2.5]]])  # any leading axes
    standardised = arrays.standardise(x, stats)
    assert standardised.tolist() == [[[1, 2], [0, -1]]] and type(standardised) is type(x)
    assert arrays.unstandardise(standardised, stats).tolist() == x.tolist()
    assert arrays.standardise(x, None) is x is arrays.unstandardise(x, None)


def test_a_saved_run_s_facts_replace_those_of_the_arrays(path):
    pairs = {
        "x": ARRAYS["table"][0],
        "y": ARRAYS["counts"][0],
        "z": both(lambda n, k: np.arange(n) % (5 - k)),
    }
    saved = data.load(save(path, pairs), likelihoods=["laplace", "poisson", "categorical"]).spec
    saved["arrays"]["x"]["stats"]["mean"][0] += 100
    pairs["y"] = both(lambda n, k: RNG.integers(0, 2, (n, 6)))  # bits by themselves
    pairs["z"] = both(lambda n, k: np.arange(n) % 3)
    again = data.load(save(path, pairs), spec=saved, standardise=False)
    assert again.spec == {"name": "npz", "arrays": saved["arrays"]}
    stats = saved["arrays"]["x"]["stats"]
    expected = arrays.standardise(pairs["x"][1], stats).astype("f4")
    assert np.array_equal(again.test.bases[0], expected)
    assert again.train.bases[1].dtype == torch.float32
    unscaled = data.load(str(path), standardise=False).spec
    assert np.array_equal(
        data.load(str(path), spec=unscaled).test.bases[0], pairs["x"][1].astype("f4")
    )


@pytest.mark.parametrize(
    "name, x, error",
    [
        ("z", np.arange(N), "does not have the arrays that the run began with: x, y"),
        ("x", np.ones((N, 5)), "x does not have the features that the run began with"),
        ("y", np.arange(N) % 5, "y must be below 4, not 4"),
        ("y", -np.ones(N, int), "y must hold integers from 0"),
        ("x", np.arange(4 * N).reshape(N, 4), "x must hold 0 and 1"),
    ],
)
def test_arrays_that_do_not_fit_a_saved_run_are_refused(name, x, error, path):
    pairs = {"x": RNG.normal(size=(N, 4)) > 0, "y": np.arange(N) % 4}
    saved = data.load(save(path, pairs)).spec
    with pytest.raises(ValueError, match=error):
        data.load(save(path, pairs | {name: x}), spec=saved)


# ------------------------------------------------------------------------ masks and missing entries


def test_what_a_mask_hides_may_be_anything_and_changes_nothing(path):
    pairs = {
        "numbers": both(lambda n, k: RNG.normal(size=(n, 2)) + k),
        "floats": both(lambda n, k: RNG.integers(0, 9, (n, 3)).astype("f4")),
        "counts": both(lambda n, k: RNG.integers(0, 9 + k, (n, 3))),
        "bits": both(lambda n, k: RNG.integers(0, 2, (n, 4))),
        "class": both(lambda n, k: np.arange(n) % (3 + k)),
    }
    wild = {"numbers": np.inf, "floats": np.nan, "counts": -7, "bits": 9, "class": 20}
    masks = both(lambda n, k: np.arange(n)[:, None] % (6 + k) != np.arange(5))
    hidden = {
        name: tuple(
            np.where(mask[:, m].reshape(-1, *[1] * (x.ndim - 1)), x, wild[name])
            for x, mask in zip(pair, masks)
        )
        for m, (name, pair) in enumerate(pairs.items())
    }
    both_masks = {"train_mask": masks[0].astype(int), "test_mask": masks[1]}
    a, b = (data.load(save(path, xs, **both_masks)) for xs in (pairs, hidden))
    kinds = ["numbers", "numbers", "counts", "bits", "class"]
    assert [facts["kind"] for facts in a.spec["arrays"].values()] == kinds
    assert a.spec == b.spec and a.lines == b.lines
    assert a.note == b.note == f"train_mask hides {1 - masks[0].mean():.0%} of the arrays"
    assert np.array_equal(a.mask, masks[0]) and np.array_equal(a.test_mask, masks[1])
    for split, other, mask in (a.train, b.train, masks[0]), (a.test, b.test, masks[1]):
        for m in range(5):
            assert torch.equal(split.bases[m], other.bases[m])
            assert not split.bases[m][~mask[:, m]].any()


def test_nan_is_a_missing_entry_or_a_missing_row(path):
    x, y = both(lambda n, k: RNG.normal(size=(n, 3)) + 5 + k), both(lambda n, k: RNG.random((n, 2)))
    x[0][3, 1], x[0][7], y[0][9, 0], x[1][2] = np.nan, np.nan, np.nan, np.nan
    dataset = data.load(save(path, {"x": x, "y": y}))
    assert dataset.mask.tolist() == [[row != 7, True] for row in range(N)]
    assert dataset.test_mask.tolist() == [[row != 2, True] for row in range(TEST)]
    stats = dataset.spec["arrays"]["x"]["stats"]
    assert np.allclose(stats["mean"], np.nanmean(x[0], 0))
    assert np.allclose(stats["std"], np.nanstd(x[0], 0))
    base = dataset.train.bases[0]
    assert base.isnan().nonzero().tolist() == [[3, 1]] and not base[7].any()
    assert dataset.lines[0].endswith(f"; {1 / 3 / 39:.1%} missing")  # of 39 rows of 3


def test_features_of_no_training_row_are_unseen(path):
    x, y = both(lambda n, k: RNG.normal(size=(n, 4)) + 9), both(lambda n, k: RNG.random((n, 2)))
    mask = np.ones((N, 2), bool)
    mask[4, 0] = False
    x[0][:30, 2] = np.nan  # shown beyond the limit alone,
    x[0][4, 2] = 1  # or in a row that the mask hides
    x[0][:3, 1] = np.nan  # a feature that some rows lack is not unseen
    x[1][5, [0, 1, 3]] = np.nan  # this test row has the unseen feature alone
    save(path, {"x": x, "y": y}, train_mask=mask)
    dataset = data.load(str(path), limit=30)
    facts, rows = dataset.spec["arrays"]["x"], [row != 5 for row in range(TEST)]
    assert facts["unseen"] == [2] and "unseen" not in dataset.spec["arrays"]["y"]
    assert nets.modalities(**dataset.spec)[0].unseen == (2,)
    assert (facts["stats"]["mean"][2], facts["stats"]["std"][2]) == (0, 1)
    assert dataset.test_mask.tolist() == [[row, True] for row in rows]
    train, test = dataset.train.bases[0][:30], dataset.test.bases[0]
    assert train[mask[:30, 0], 2].isnan().all() and test[rows, 2].isnan().all()
    assert test[rows][:, [0, 1, 3]].isfinite().all() and not test[5].any()
    again = data.load(str(path), spec=dataset.spec)  # without the limit
    assert torch.equal(again.test.bases[0].nan_to_num(7), test.nan_to_num(7))
    assert again.train.bases[0][35, 2].isnan()
    plain = data.load(str(path), limit=30, standardise=False)
    assert plain.test.bases[0][rows, 2].isnan().all()
    assert "unseen" not in data.load(str(path)).spec["arrays"]["x"]


def test_an_array_without_training_examples_is_refused(path):
    pairs, mask = {"x": ARRAYS["table"][0], "y": ARRAYS["species"][0]}, np.ones((N, 2), bool)
    mask[:30, 1] = False
    save(path, pairs, train_mask=mask)
    assert len(data.load(str(path), limit=31).train) == 31
    with pytest.raises(ValueError, match="y: no training example, or no test example, shows it"):
        data.load(str(path), limit=30)


def test_a_row_that_shows_nothing_is_refused(path):
    pairs = {"x": both(lambda n, k: RNG.normal(size=(n, 3))), "y": ARRAYS["species"][0]}
    for part, rows in (("train", N), ("test", TEST)):
        mask = np.ones((rows, 2), bool)
        mask[5] = False
        mask[3, 1] = False
        with pytest.raises(ValueError, match=f"a.npz: row 5 of the {part} split shows nothing"):
            data.load(save(path, pairs, **{f"{part}_mask": mask}))


# -------------------------------------------------------------------------------------- the archive

GOOD = {"train_0": np.zeros((4, 3), "f4"), "train_1": np.ones((4, 2))}
GOOD |= {"test_0": np.zeros((2, 3)), "test_1": np.ones((2, 2))}


@pytest.mark.parametrize(
    "change, match",
    [
        ({"train_1": None}, "train_1"),
        ({"test_1": None}, "test_1"),
        ({"extra": np.zeros(1)}, "an array 'extra'"),
        ({"extra_x": np.zeros(1)}, "an array 'extra_x'"),
        ({"train_": np.zeros(4), "test_": np.zeros(2)}, "an array 'train_'"),
        ({"train_1": None, "test_1": None}, "two modalities or more, not 1"),
        ({"train_1": np.ones((5, 2))}, "as many rows"),
        ({"train_1": np.ones((0, 2))}, "train_1 must be numeric"),
        ({"test_1": np.ones((2, 9))}, r"1 is \(4, 2\) in training, \(2, 9\) in the test"),
        ({"train_mask": np.ones((4, 3), bool)}, r"train_mask .*\(4, 2\)"),
        ({"train_mask": np.ones((2, 4), bool)}, "as many rows"),
        ({"train_mask": np.full((4, 2), 0.5)}, "train_mask must hold 0 and 1"),
        ({"test_mask": np.array([[1, np.nan]] * 2)}, "test_mask must hold 0 and 1"),
        ({"train_mask": np.array([[1, 0]] * 4)}, "1: no training example, or .* shows it"),
        ({"test_mask": np.array([[0, 1]] * 2)}, "0: no training example, or .* shows it"),
        (
            {"train_mask": np.array([[1, 0]] * 4)}
            | {f"{part}_1": np.ones((n, 2), int) for part, n in (("train", 4), ("test", 2))},
            "1: no training example, or .* shows it",
        ),
        ({"train_labels": np.ones(3, int)}, "as many rows"),
        ({"train_labels": np.ones(4)}, "train_labels must hold one integer"),
        ({"train_0": np.array([["a"]] * 4)}, "train_0 must be numeric"),
        ({"train_0": np.array([[None]] * 4)}, "cannot be read"),
        ({"train_0": np.zeros((4, 3, 3, 3)), "test_0": np.zeros((2, 3, 3, 3))}, "smaller than 8 x"),
        ({"train_0": np.zeros((4, 3, 7, 9)), "test_0": np.zeros((2, 3, 7, 9))}, "smaller than 8 x"),
    ],
)
def test_arrays_that_do_not_fit_are_refused_by_name(change, match, path):
    np.savez(path, **GOOD)
    assert len(data.load(str(path)).train) == 4
    np.savez(path, **{name: x for name, x in (GOOD | change).items() if x is not None})
    with pytest.raises(ValueError, match=match) as error:
        data.load(str(path))
    assert "a.npz" in str(error.value) and "\n" not in str(error.value)


def test_a_likelihood_is_needed_for_each_modality(path):
    with pytest.raises(ValueError, match="--likelihoods needs one for each of x, y, not 3"):
        data.load(save(path, {"x": REAL, "y": REAL}), likelihoods=["normal"] * 3)


RESERVED = ["latent_mean", "latent_std", "x_low", "x_high", "x_probabilities", "all", "a,b", "a/b"]


@pytest.mark.parametrize("name", RESERVED)
def test_names_with_another_meaning_are_refused(name, path):
    with pytest.raises(ValueError, match=f"cannot be called '{name}'"):
        data.load(save(path, {"x": REAL, name: REAL}))


def test_the_digest_is_that_of_the_contents(path, tmp_path):
    first = data.load(save(path, {"x": REAL, "y": COUNTS}))
    shutil.copy(path, tmp_path / "b.npz")
    moved = data.load(str(tmp_path / "b.npz"))
    other = data.load(save(path, {"x": REAL, "y": COUNTS + 1}))
    assert first.digest == moved.digest != other.digest and len(first.digest) == 64


def test_memory_stays_below_two_and_a_half_times_the_arrays(path, monkeypatch):
    monkeypatch.setattr(arrays, "BLOCK", 2**14)
    x = RNG.normal(size=(50_000, 25)).astype("f4"), RNG.normal(size=(100, 25)).astype("f4")
    y = RNG.integers(0, 256, (50_000, 1, 10, 10), np.uint8), np.full((100, 1, 10, 10), 9, "u1")
    save(path, {"x": x, "y": y})
    tracemalloc.start()
    data.load(str(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2.5 * sum(a.nbytes for a in (*x, *y))


# --------------------------------------------------------------------------------- "taken as" lines

TABLE = np.arange(12.0).reshape(4, 3) + 0.5
GAPS, UNSEEN, CONSTANT, ONCE = (TABLE.copy() for _ in range(4))
GAPS[0, 1], UNSEEN[:, 2], CONSTANT[:, :2], ONCE[1:, 2] = np.nan, np.nan, 7, np.nan
NUMBERS = "x: numbers (3), normal (--likelihoods), standardised (--no-standardise)"
LINES = [
    (TABLE, NUMBERS),
    (GAPS, f"{NUMBERS}; 8.3% missing"),
    (UNSEEN, f"{NUMBERS}; no training row has feature 2 (not scored)"),
    (CONSTANT, f"{NUMBERS}; constant: features 0, 1"),
    (ONCE, f"{NUMBERS}; 25.0% missing; constant: feature 2"),
    (TABLE // 1, f"{NUMBERS}; whole numbers: as integers they would be counts"),
    (TABLE // 1 - 20, NUMBERS),
    ((TABLE - 3).astype(int), f"{NUMBERS}; integers, but below 0"),
    (TABLE.astype(int), "x: counts (3), negative-binomial (--likelihoods)"),
    (
        TABLE[:, :1].astype(int),
        "x: counts (1), negative-binomial (--likelihoods); a class must have the shape (examples,)",
    ),
    (
        np.hstack([np.zeros((4, 5), int), np.eye(4, 2, dtype=int)]),
        "x: bits (7), bernoulli (--likelihoods); constant: 5 features (0, 1, 2, ...)",
    ),
    (np.array([3, 1, 2, 1]), "x: class (one of 4), categorical; 1 of them in no training row"),
    (np.array([0, 1, 2, 1]), "x: class (one of 3), categorical"),
    (DARK.repeat(2, 0), "x: bits (1 x 8 x 8), bernoulli (--likelihoods); bytes of 0 and 1"),
    (
        np.full((4, 9, 8, 8), 0.5),
        "x: greys (9 x 8 x 8), bernoulli (--likelihoods); "
        "the order must be (examples, channels, height, width)",
    ),
]


@pytest.mark.parametrize("x, line", LINES)
def test_a_line_says_what_an_array_was_taken_for(x, line, path):
    lines = data.load(save(path, {"x": x, "y": TABLE}), limit=4).lines
    assert lines == (line, NUMBERS.replace("x:", "y:"))
    assert all(len(line) <= 120 for line in lines)


def test_what_was_asked_for_is_not_odd(path):
    save(path, {"x": TABLE // 1, "y": (TABLE - 3).astype(int)})
    lines = data.load(str(path), likelihoods=["normal", "normal"]).lines
    assert lines == (NUMBERS, NUMBERS.replace("x:", "y:"))
    assert (
        data.load(str(path), standardise=False)
        .lines[0]
        .startswith("x: numbers (3), normal (--likelihoods); whole")
    )


# ---------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("names", [("table", "counts", "species"), ("photo", "sketch", "floats")])
@pytest.mark.parametrize("script", SCRIPTS)
def test_every_model_trains_on_every_kind_with_any_missing(script, names, path):
    dataset = data.load(save(path, {name: ARRAYS[name][0] for name in names}))
    streams = dataset.streams(paired=0.4, unpaired="all")
    model = SCRIPTS[script].MODEL(nets.modalities(**dataset.spec), 3)
    model.start(dataset.train, streams)
    (batch, *_) = data.batches(dataset.train, streams, 16)
    assert [[x is not None for x in xs] for _, xs in batch] == [list(mask) for mask, _ in streams]
    loss = model(batch)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert all(w.grad is None or w.grad.isfinite().all() for w in model.parameters())
    for _, xs in batch:
        z = model.sample_posterior(xs, 2)
        for x, m in zip(model.decode(z), model.modalities, strict=True):
            assert x.shape == (*z.shape[:2], *m.shape, *((m.classes,) if m.classes else ()))


def test_a_run_keeps_its_statistics_wherever_the_archive_lies(path, tmp_path, capsys):
    run, moved = tmp_path / "run", tmp_path / "moved.npz"
    pairs = {name: ARRAYS[name][0] for name in ("table", "bits")}
    flags = dict(batch_size=16, out=run, latent_dim=2)
    train("mvae", dataset=save(path, pairs), epochs=1, **flags)
    assert set(data.load(str(path)).lines) <= {*capsys.readouterr().out.splitlines()}
    args = json.loads((run / "args.json").read_text(encoding="utf-8"))
    args["spec"]["arrays"]["table"]["stats"]["mean"][0] += 1e-13  # another machine's sum
    (run / "args.json").write_text(json.dumps(args), encoding="utf-8")
    path.rename(moved)
    train("mvae", dataset=moved, epochs=2, resume=True, **flags)
    again = json.loads((run / "args.json").read_text(encoding="utf-8"))
    assert again["spec"] == args["spec"] and again["epochs"] == 2
    save(moved, pairs | {"table": tuple(x + 1 for x in pairs["table"])})
    refused("mvae", dataset=moved, epochs=3, resume=True, **flags)
    assert "moved.npz does not hold the data" in capsys.readouterr().err
