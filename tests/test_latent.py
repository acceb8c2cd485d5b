"""evaluation/latent.py: distances, points and gradients against other ways to compute them."""

import numpy as np
import pytest
import torch
from torch.distributions import Independent, Normal

import data
import meme
import nets
from evaluation import latent
from helpers import SHAPES, Perfect, Sampled, every_pattern, pattern, toy


def test_latent_points_are_samples_of_each_modality_in_turn():
    dataset, model = toy(n=2004), Sampled(SHAPES)
    z, labels = latent.latent_points(model, dataset)
    assert [mask for mask, _ in model.asked] == [(True, False)] * 10 + [(False, True)] * 10
    expected = dataset.test.labels[:1000].repeat(2)
    assert np.allclose(z[:, 0], expected) and (labels == expected.numpy()).all()
    assert len(latent.latent_points(model, dataset, n=3)[0]) == 6
    assert len(latent.latent_points(model, toy(n=40), n=30)[0]) == 2 * 20


def test_latent_points_are_of_rows_that_have_the_modality():
    test_mask = torch.ones(300, 2, dtype=torch.bool)
    test_mask[:50, 0] = test_mask[100:120, 1] = False
    dataset, model = toy(n=600)._replace(test_mask=test_mask), Sampled(SHAPES)
    z, labels = latent.latent_points(model, dataset, n=270)
    rows = [test_mask[:, m].nonzero()[:250, 0] for m in (0, 1)]  # as many of each: 250
    expected = np.concatenate([dataset.test.labels[index] for index in rows])
    assert (labels == expected).all() and np.allclose(z[:, 0], expected)


class Wide(Perfect):
    """N(digit, 1) of the first modality, N(3 digit, 2²) of the second, N(5 digit, 3²) of the third;
    two latent dimensions."""

    def posterior(self, *xs):
        m = pattern(xs).index(True)
        mean = super().posterior(*xs).mean * (1, 3, 5)[m]
        return Independent(Normal(mean, torch.full_like(mean, m + 1.0)), 1)


def test_relatedness_is_w2_between_the_posteriors_of_two_modalities():
    bases = toy(n=1100).test.bases
    split = data.Split(bases, [torch.randperm(1100) // 2, torch.randperm(1100) // 2])
    d, index = latent.distances(Wide(SHAPES), split, 0, 1)
    assert d.shape == (500, 500) and index[:9].diff().min() < 0
    assert len(split.rows[0][index].unique()) == 500  # of the first all different
    a, b = (x.mean((1, 2, 3)).numpy() * 255 / 25 for x in split[index])
    expected = np.sqrt((a[:, None] - 3 * b) ** 2 + 2 * (1 - 2) ** 2)
    assert np.allclose(d, expected, atol=1e-3)


def test_relatedness_of_as_many_rows_as_dimensions_has_deviations():
    split = toy(n=40).test
    _, index = latent.distances(Wide(SHAPES), split, 0, 1)
    assert sorted(index.tolist()) == list(range(20)) and index.diff().min() < 0  # in random order
    twice = data.Split(split.bases, [torch.arange(40) // 2] * 2, split.labels.repeat_interleave(2))
    d, index = latent.distances(Wide(SHAPES), twice, 0, 1, torch.tensor([1, 2, 3]))
    assert sorted(index.tolist()) == [1, 2] and d.shape == (2, 2)  # 2 and 3 are the same image
    digits = twice.labels[index].double().numpy()
    assert np.allclose(d, np.sqrt((digits[:, None] - 3 * digits) ** 2 + 2), atol=1e-3)


def test_distances_are_of_examples_that_show_both(monkeypatch):
    bands, distances, asked = toy("mnist-split3", n=200), latent.distances, []
    mask = torch.from_numpy(every_pattern(100, 3))
    dataset = bands._replace(test_mask=mask)

    def recorded(model, split, a, b, rows):
        asked.append(rows)
        return distances(model, split, a, b, rows=rows)

    monkeypatch.setattr(latent, "distances", recorded)
    pairs = latent.posterior_distances(Wide([(1, 9, 28)] * 3), dataset)
    assert [a + " " + b for (a, b), _, _ in pairs] == ["top middle", "top bottom", "middle bottom"]
    for a, b, (_, d, labels), rows in zip((0, 0, 1), (1, 2, 2), pairs, asked, strict=True):
        assert rows.tolist() == [k for k in range(100) if mask[k, a] and mask[k, b]]
        means = (2 * a + 1) * labels[:, None] - (2 * b + 1) * labels
        assert np.allclose(d, np.hypot(means, np.sqrt(2) * (b - a)), atol=1e-3)
    unlabelled = dataset._replace(test=data.Split(bands.test.bases))
    for _, _, labels in latent.posterior_distances(Wide([(1, 9, 28)] * 3), unlabelled):
        assert len(set(labels)) == len(labels)


def test_the_overlap_is_the_area_below_both_histograms():
    labels = np.array([7, 7, 4])
    d = np.array([[0.0, 0.19, 0.21], [1.01, 1.01, 0.1], [1.19, 5.0, 10.0]])  # bins of 0.2
    # shares of related distances: 2/5 in the bin of 0, 2/5 in that of 1.01, 1/5 in that of 10; of
    # unrelated ones: 1/4 in those of 0.1, 0.21, 1.19 and 5
    other = np.array([[10.0, 0.19, 0.21], [1.01, 0.0, 1.19], [0.1, 3.0, 5.0]])
    # 2/5, 1/5, 1/5 and 1/5 in the bins of 0, 1.01, 5 and 10; 1/4 in those of 0.1, 0.21, 1.19 and 3
    pairs = [(("a", "b"), d, labels), (("a", "c"), 100 * other, labels)]
    shares = latent.w2_overlap(pairs)
    assert shares == {"a,b": pytest.approx(1 / 4 + 1 / 4), "a,c": pytest.approx(1 / 4 + 1 / 5)}


def test_the_overlap_of_equal_sets_is_one_and_of_disjoint_ones_zero():
    labels = np.array([3, 8, 3, 8])
    equal = np.tile([1.0, 1.0, 2.0, 2.0], (4, 1))
    disjoint = np.where(labels[:, None] == labels, 1.0, 2.0)  # also within a label
    pairs = [(("a", "b"), equal, labels), (("b", "c"), disjoint, labels)]
    assert latent.w2_overlap(pairs) == {"a,b": 1, "b,c": 0}


# ---------------------------------------------------------------------------------------- gradients


def numbers(**widths):
    """Modalities of a user's tables of numbers."""
    array = {"kind": "numbers", "likelihood": "normal"}
    arrays = {name: array | {"shape": [width]} for name, width in widths.items()}
    return nets.modalities("npz", arrays=arrays)


def test_gradient_ratios_are_mean_over_deviation_of_the_gradients():
    model = meme.MEME(numbers(a=3, b=2), 2, samples=2)
    before = {key: x.clone() for key, x in model.state_dict().items()}
    train, test = (data.Split([torch.randn(80, 3), torch.randn(80, 2)]) for _ in range(2))
    complete = torch.arange(80) % 7 > 0
    mask = torch.stack([complete, torch.ones(80, dtype=torch.bool)], 1)
    dataset = data.Dataset("own.npz", train, test, {}, ("a", "b"), test_mask=mask)
    xs = test[complete.nonzero()[:64, 0]]
    torch.manual_seed(1)
    ratios = latent.gradient_ratios(model, dataset)
    assert (model.kl, model.full_gradient) == ("closed", False)
    assert all(x.equal(before[key]) for key, x in model.state_dict().items())
    assert all(x.grad is None for x in model.parameters())
    assert latent.gradient_ratios(model, dataset, draws=2)["eq. (7)"]["encoders"].max() == 2
    torch.manual_seed(1)
    for name, full in ("w detached", False), ("eq. (7)", True):
        model.kl, model.full_gradient = "sample", full
        gradients = []
        for _ in range(30):
            model.zero_grad()
            model.objective(*xs).backward()
            parts = model.encoders.parameters(), model.decoders.parameters()
            flat = (torch.cat([w.grad.flatten() for w in part]).double() for part in parts)
            gradients.append([gradient.numpy() for gradient in flat])
        for part, draws in zip(("encoders", "decoders"), map(np.stack, zip(*gradients))):
            mean, std = draws.mean(0), draws.std(0)
            with np.errstate(divide="ignore"):
                expected = np.log10(np.abs(mean[std > 1e-12]) / std[std > 1e-12]).clip(-4, 2)
            assert ratios[name][part].numpy() == pytest.approx(expected, abs=1e-3)


def test_there_are_no_gradient_ratios_of_large_models_or_without_pairs(monkeypatch):
    model = meme.MEME(numbers(a=3, b=2), 2, samples=2)
    split = data.Split([torch.randn(9, 3), torch.randn(9, 2)])
    dataset = data.Dataset("own.npz", split, split, {}, ("a", "b"))
    weights = sum(weight.numel() for weight in model.parameters())
    for most, found in (weights, True), (weights - 1, False):
        monkeypatch.setattr(latent, "MOST_WEIGHTS", most)
        assert bool(latent.gradient_ratios(model, dataset, draws=2)) == found
    monkeypatch.setattr(latent, "MOST_WEIGHTS", weights)
    single = dataset._replace(test_mask=torch.tensor([True, False]).expand(9, 2))
    assert latent.gradient_ratios(model, single) == {}


def test_the_signal_to_noise_is_the_median_of_each_part():
    ratios = {
        "w detached": {"encoders": torch.tensor([2.0, -4, 0]), "decoders": torch.tensor([1.0])},
        "eq. (7)": {"encoders": torch.tensor([-1.0, -4, 2]), "decoders": torch.tensor([-2.0])},
    }
    assert list(latent.signal_to_noise(ratios).items()) == [
        ("encoders, w detached", 1),
        ("encoders, eq. (7)", 0.1),
        ("decoders, w detached", 10),
        ("decoders, eq. (7)", 0.01),
    ]
