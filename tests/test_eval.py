"""eval.py: samples of z and metrics of models against other ways to compute them."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributions import (
    Categorical,
    Independent,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
)

import data
import eval as evaluation
import nets
from helpers import READERS, SHAPES, Perfect, Reader, Sampled, pattern, toy


# ------------------------------------------------- a model whose evidences and posteriors are known


class Linear(nn.Module):
    """x_m = W_m z + b_m + noise; p(z) has the mean k where k modalities are observed. The posterior
    is the exact one with twice the standard deviation, and without correlations."""

    resamples = False

    def __init__(self, sizes=(3, 2, 2), latent_dim=2):
        super().__init__()
        generator = torch.Generator().manual_seed(4)
        self.modalities, self.latent_dim = [], latent_dim
        self.decoders = nn.ModuleList(nn.Linear(latent_dim, size) for size in sizes)
        for m, (size, decode) in enumerate(zip(sizes, self.decoders)):
            more = {"likelihood": "normal", "weight": 7.0, "scale": 0.8 + 0.3 * m}  # of training: 7
            self.modalities.append(nets.Modality(f"x{m}", (size,), None, None, **more))
            for parameter in decode.parameters():
                parameter.data = torch.randn(parameter.shape, generator=generator)

    def prior(self, *xs):
        observed = float(sum(x is not None for x in xs))
        return Independent(Normal(torch.tensor([observed, 0.0]), torch.tensor([1.5, 0.7])), 1)

    def exact(self, *xs):
        p, m = self.prior(*xs), [m for m, x in enumerate(xs) if x is not None]
        precision, total = torch.diag(1 / p.variance), p.mean / p.variance
        for m, x in enumerate(xs):
            if x is not None:
                weight = self.decoders[m].weight / self.modalities[m].scale
                precision = precision + weight.T @ weight
                total = total + (x - self.decoders[m].bias) / self.modalities[m].scale @ weight
        return MultivariateNormal(total @ precision.inverse(), precision.inverse())

    def posterior(self, *xs):
        q = self.exact(*xs)
        return Independent(Normal(q.mean, 2 * q.variance.sqrt().expand_as(q.mean)), 1)

    def sample_posterior(self, xs, n=1):
        return self.posterior(*xs).sample((n,))

    def decode(self, z):
        return [decode(z) for decode in self.decoders]

    def evidence(self, xs, p):
        """log of the integral of Π_m p(x_m|z) p(z) over z: a Gaussian marginal. -> (B,)"""
        parts = [part for part in zip(self.modalities, self.decoders, xs) if part[2] is not None]
        weight = torch.cat([decode.weight for _, decode, _ in parts])
        noise = torch.cat([torch.full_like(decode.bias, m.scale) for m, decode, _ in parts])
        bias = torch.cat([decode.bias for _, decode, _ in parts])
        covariance = (weight * p.variance[..., None, :]) @ weight.T + torch.diag(noise**2)
        marginal = MultivariateNormal(p.mean @ weight.T + bias, covariance)
        return marginal.log_prob(torch.cat([x for _, _, x in parts], -1))


def only(xs, mask):
    return [x if observed else None for x, observed in zip(xs, mask)]


def examples(n, sizes=(3, 2, 2), seed=1):
    """Examples whose mean grows along the rows."""
    generator = torch.Generator().manual_seed(seed)
    trend = torch.linspace(-1, 2, n)[:, None]
    return [torch.randn(n, size, generator=generator) + trend for size in sizes]


def linear_data(n=40, seed=1, names=("x0", "x1", "x2"), **more):
    """Splits of different means; labels of three classes in training, of two in the test rows."""
    train, test = examples(2 * n, seed=seed), [x - 0.5 for x in examples(n, seed=seed + 1)]
    splits = [
        data.Split(bases[: len(names)], labels=torch.arange(len(bases[0])) % classes)
        for bases, classes in ((train, 3), (test, 2))
    ]
    return data.Dataset("own.npz", *splits, spec={}, names=names, **more)


MASKS = [mask for mask in evaluation.subsets("abc").values()]


@pytest.mark.parametrize("mask", MASKS)
def test_log_likelihood_meets_the_exact_evidence(mask):
    """Of every subset, alone and given every subset of the others."""
    model, xs = Linear(), examples(4)
    torch.manual_seed(0)
    target = only(xs, mask)
    likelihood = evaluation.log_likelihood(model, target, 20_000)
    assert likelihood.shape == (4,) and not likelihood.requires_grad
    exact = model.evidence(target, model.prior(*target))
    assert torch.allclose(likelihood, exact, atol=0.06)
    for others in MASKS:
        if not any(a and b for a, b in zip(mask, others)):
            given = only(xs, others)
            likelihood = evaluation.log_likelihood(model, target, 20_000, given)
            exact = model.evidence(target, model.posterior(*given))
            assert torch.allclose(likelihood, exact, atol=0.06)


def test_log_likelihood_samples_the_posterior_of_everything():
    model, xs, asked = Linear(), examples(4), []
    exact = model.posterior
    model.posterior = lambda *xs: asked.append(pattern(xs)) or exact(*xs)
    evaluation.log_likelihood(model, only(xs, (1, 0, 0)), 10, only(xs, (0, 1, 0)))
    assert asked == [(True, True, False), (False, True, False)]


# ------------------------------------------------------------------------------------- samples of z


def test_corrected_samples_are_those_of_the_exact_posterior():
    model, xs = Linear(), examples(3)
    for mask in (True, False, False), (False, True, True):
        observed = only(xs, mask)
        torch.manual_seed(0)
        z = evaluation.corrected_samples(model, observed, model.posterior(*observed), 20_000)
        exact = model.exact(*observed)
        assert z.shape == (20_000, 3, 2) and not z.requires_grad
        assert torch.allclose(z.mean(0), exact.mean, atol=0.05)
        for b in range(3):
            assert torch.allclose(z[:, b].T.cov(), exact.covariance_matrix, atol=0.06)


def test_samples_stay_those_of_q_below_20_effective_ones():
    """The share of a candidate in the draws: its weight, or 1/200 where few have all the weight."""
    model, xs = Linear((1,)), [torch.tensor([[0.0], [2.0], [4.0]])]
    q = Independent(Normal(torch.zeros(3, 2), 0.3), 1)
    for offset in 0.0, 40.0, math.nan:
        xs[0][2] = offset
        torch.manual_seed(1)
        z = evaluation.corrected_samples(model, xs, q, 20_000)
        torch.manual_seed(1)
        candidates = q.sample((20_000,))
        w = torch.stack([model.prior(*xs).log_prob(candidates) - q.log_prob(candidates)])[0]
        mean, scale = model.decoders[0](candidates)[..., 0], model.modalities[0].scale
        w = (w + Normal(mean, scale).log_prob(xs[0][:, 0].nan_to_num())).softmax(0)
        size = 1 / (w**2).sum(0)
        if math.isnan(offset):
            size[2] = math.nan
        w[:, ~(size >= 20)] = 1 / 20_000
        assert torch.allclose(z.mean(0), (w[..., None] * candidates).sum(0), atol=0.02)
        assert offset == 0.0 or not size[2] >= 20


def test_images_and_models_that_resample_are_not_corrected():
    model = Perfect([(1, 14, 28)])  # without decoders: nothing can be weighed
    q = Independent(Normal(torch.full((5, 2), 7.0), 1e-3), 1)
    images = [torch.rand(5, 1, 14, 28), None]
    z = evaluation.corrected_samples(model, images, q, 6)
    assert z.shape == (6, 5, 2) and torch.allclose(z, torch.tensor(7.0), atol=0.1)
    model.resamples, model.sample_posterior = True, lambda xs, n: (xs, n)
    assert evaluation.corrected_samples(model, images, q, 6) == (images, 6)


def test_posterior_batches_cover_every_row_from_one_seed():
    model, xs = Linear(), examples(230)
    mask = (True, False, True)

    def take(index):
        return only([x[index] for x in xs], mask)

    batches = list(evaluation.posterior_batches(model, 230, take, draws=7, seed=3))
    assert [index.tolist() for index, _, _ in batches] == [
        [*range(100)],
        [*range(100, 200)],
        [*range(200, 230)],
    ]
    torch.manual_seed(3)
    for index, q, z in batches:
        expected = model.posterior(*take(index))
        assert torch.equal(q.mean, expected.mean) and not q.mean.requires_grad
        again = evaluation.corrected_samples(model, take(index), expected, 7)
        assert torch.equal(z, again)
    ((_, _, z), *_) = evaluation.posterior_batches(model, 1, take)
    assert len(z) == 50


def test_memory_is_bounded_by_blocks_of_samples(monkeypatch):
    """The samples and weights of blocks are those of all samples at once."""
    model, xs = Linear((300, 2, 2)), examples(20, (300, 2, 2))
    model.decoders[0].weight.data *= 0.03  # so that no single sample has all the weight
    results, sizes = [], []
    model.decoders[0].register_forward_hook(lambda *call: sizes.append(call[2].numel()))
    for budget in 10**9, 50_000:
        monkeypatch.setattr(evaluation, "BUDGET", budget)
        sizes.clear()
        torch.manual_seed(0)
        q = model.posterior(*xs)
        z = evaluation.corrected_samples(model, xs, q, 60)
        likelihood = evaluation.log_likelihood(model, only(xs, (1, 0, 0)), 30, only(xs, (0, 1, 1)))
        results.append((z, likelihood))
        assert max(sizes) == (200 * 20 * 300 if budget == 10**9 else 8 * 20 * 300)
        assert sum(sizes) == 230 * 20 * 300
    (z, likelihood), (z_blocks, likelihood_blocks) = results
    assert (z == z_blocks).float().mean() > 0.99  # rounding may change a draw
    assert torch.allclose(likelihood, likelihood_blocks, atol=1e-3)


def test_blocks_count_classes_and_mixture_components(monkeypatch):
    monkeypatch.setattr(evaluation, "BUDGET", 6400)
    blocks, model, x = [], Linear((2,)), torch.zeros(4, 2)
    model.decoders[0].register_forward_hook(lambda *call: blocks.append(len(call[2])))
    prior = model.prior()
    evaluation.log_likelihood(model, [x], 100)
    means = torch.zeros(50, 2)
    mixture = MixtureSameFamily(Categorical(torch.ones(50)), Independent(Normal(means, 1.0), 1))
    model.prior = lambda *xs: mixture
    evaluation.log_likelihood(model, [x], 100)
    model.prior, words = lambda *xs: prior, nn.Linear(2, 2 * 80)
    model.decoders = nn.ModuleList([nn.Sequential(words, nn.Unflatten(-1, (2, 80)))])
    model.decoders[0].register_forward_hook(lambda *call: blocks.append(len(call[2])))
    model.modalities = [nets.Modality("w", (2,), None, None, "categorical", classes=80)]
    model.posterior = lambda *xs: Independent(Normal(torch.zeros(4, 2), 1.0), 1)
    evaluation.log_likelihood(model, [x.long()], 100)
    assert blocks == [100] + [6400 // (4 * 50 * 2)] * 6 + [4] + [10] * 10


def test_the_aggregate_posterior_is_that_of_training_pairs():
    model, dataset = Perfect(SHAPES), toy(n=1000)
    digits = torch.arange(1000) % 100 // 10
    dataset.train.bases = [
        (25 * digits).byte()[:, None, None, None].expand(-1, *shape).clone() for shape in SHAPES
    ]
    dataset.test.bases = [torch.zeros_like(x[:500]) for x in dataset.train.bases]
    asked, posterior = [], model.posterior
    model.posterior = lambda *xs: asked.append((pattern(xs), len(xs[0]))) or posterior(*xs)
    torch.manual_seed(0)
    z = evaluation.aggregate_samples(model, dataset.train, 256 * 3 - 5)
    assert z.shape == (256 * 3 - 5, 2) and asked == [((True, True), 128)]
    expected = digits[torch.linspace(0, 999, 128).long()].bincount(minlength=10) * 6
    counts = z[:, 0].round().long().bincount(minlength=10)
    assert (expected - counts).min() >= 0 and (expected - counts).sum() == 5
    in_order = digits[torch.linspace(0, 999, 128).long()]
    assert (z[:128, 0].round() == in_order).float().mean() < 0.5
    few = evaluation.aggregate_samples(model, dataset.train.first(4), 10)
    assert few[:, 0].round().unique().tolist() == [0]


def test_spread_rows_reach_from_the_first_to_the_last():
    assert evaluation.spread(10, 4).tolist() == [0, 3, 6, 9]
    assert evaluation.spread(3, 100).tolist() == [0, 1, 2]
    assert evaluation.spread(100, 1).tolist() == [0]


def test_rows_have_all_of_the_modalities():
    mask = torch.tensor([[1, 1, 0], [1, 0, 1], [0, 1, 1], [1, 1, 1]]).bool()
    assert evaluation.rows_with(mask, [0], 4).tolist() == [0, 1, 3]
    assert evaluation.rows_with(mask, {0, 1}, 4).tolist() == [0, 3]
    assert evaluation.rows_with(mask, range(3), 4).tolist() == [3]
    assert evaluation.rows_with(None, [0, 1], 4).tolist() == [0, 1, 2, 3]


# ---------------------------------------------------------------------------- images and oracles


def flipped(m, digit):
    """The first modality shows the digit, the others 9 - digit."""
    return digit if m == 0 else 9 - digit


def test_subsets_have_the_names_of_their_modalities():
    assert evaluation.subsets(("a", "b")) == {
        "a": (True, False),
        "b": (False, True),
        "both": (True, True),
    }
    three = evaluation.subsets(("a", "b", "c"))
    assert list(three) == ["a", "b", "c", "a+b", "a+c", "b+c", "all"]
    assert three["a+c"] == (True, False, True) and three["all"] == (True,) * 3
    assert evaluation.singles("abc") == {k: three[k] for k in "abc"}


def test_a_view_stacks_its_parts():
    top, middle, bottom = (torch.full((2, 1, 9, 28), k) for k in range(3))
    image = evaluation.view([top, middle, bottom], (0, 2))
    assert image.shape == (2, 1, 18, 28)
    assert (image[:, :, :9] == 0).all() and (image[:, :, 9:] == 2).all()
    assert torch.equal(evaluation.view([top, middle], (1,)), middle)


def test_coherence_judges_samples_of_every_test_example():
    dataset = toy(n=1300)  # 650 to test: two parts, of unequal size
    labels = dataset.test.labels
    labels[:500] = 9 - labels[:500]  # now the wrong ones
    right, wrong = 150 / 650, 500 / 650
    model = Sampled(SHAPES, flipped)
    oracles = {"mnist": Reader(3), "svhn": Reader(4)}
    metrics, disagreement = evaluation.coherence(model, dataset, oracles)
    masks = {"mnist": (True, False), "svhn": (False, True)}
    assert model.asked == [(masks[m], n) for m in ("mnist", "svhn") for n in (500, 150)]
    assert metrics == {
        "cross_coherence": {"mnist->svhn": wrong, "svhn->mnist": right},
        "self_coherence": {"mnist": right, "svhn": wrong},
    }
    digits = torch.cat([9 - labels[:500], labels[500:]])  # of the images
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
    metrics, disagreement = evaluation.split_accuracy(model, dataset, {"image": Reader(7)})
    conditions = "top bottom both" if name == "mnist-split" else three
    assert metrics == {"accuracy": dict.fromkeys(conditions.split(), 0.75)}  # of 40 examples
    assert disagreement == {"accuracy": pytest.approx(dict.fromkeys(conditions.split(), sevens))}
    assert model.asked == [(mask, 40) for mask in evaluation.subsets(dataset.names).values()]


class Resampling(Sampled):
    """Its weights are equal among digit + 2 candidates, of the second modality among twice as many,
    and 0 elsewhere."""

    resamples = True

    def candidates(self, xs, source):
        digit = (next(x for x in xs if x is not None).mean((1, 2, 3)) * 255 / 25).round()
        count = (digit + 2) * (1 + source)
        log_w = torch.where(torch.arange(100)[:, None] < count, 5.0, -math.inf)  # (K, B)
        return torch.zeros(100, len(digit), 2), log_w


def test_the_effective_sample_size_is_a_median_over_examples():
    dataset = toy("mnist-split", n=2000)
    digits = dataset.test.labels // 2
    digits[torch.linspace(0, 999, 50).long()] = 9  # of 500 rows a tenth
    dataset.test.bases = [
        0 * x + 25 * digits.byte()[:, None, None, None] for x in dataset.test.bases
    ]
    model = Resampling([x.shape[1:] for x in dataset.test.bases])
    metrics, disagreement = evaluation.split_accuracy(model, dataset, {"image": Reader()})
    assert list(metrics["accuracy"]) == ["top", "bottom", "both"] and list(disagreement) == [
        "accuracy"
    ]
    counts = digits[torch.linspace(0, 999, 500).long()] + 2
    expected = torch.cat([counts, 2 * counts]).median().item()
    assert metrics["effective_sample_size"] == {"both": pytest.approx(expected, rel=1e-4)}
    three = toy("mnist-split3", n=20)
    model = Resampling([x.shape[1:] for x in three.test.bases])
    metrics, _ = evaluation.split_accuracy(model, three, {"image": Reader()})
    sizes = metrics["effective_sample_size"]
    assert list(sizes) == ["top+middle", "top+bottom", "middle+bottom", "all"]
    counts = three.test.labels + 2
    for name, sources in ("top+bottom", (0, 2)), ("middle+bottom", (1, 2)), ("all", (0, 1, 2)):
        expected = torch.cat([counts * (1 + source) for source in sources]).median().item()
        assert sizes[name] == pytest.approx(expected, rel=1e-4)


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


def test_joint_coherence_is_of_samples_of_the_prior():
    def says(m, digit):
        return digit if m == 0 else digit.clamp(max=2)

    model, oracles = Cycles([(1, 4, 4), (3, 2, 6)], says), {"mnist": Reader(4), "svhn": Reader(2)}
    dataset = toy()
    metrics, disagreement = evaluation.joint_coherence(model, dataset, oracles)
    assert model.done == 10_000
    assert metrics["joint_coherence"] == 5 / 8  # both read 0, 0, 0, 1 or 2
    training = dataset.train.labels[evaluation.spread(len(dataset.train), 128)]
    agree = (training <= 2).double().mean().item()
    assert metrics["aggregate_coherence"] == pytest.approx(agree, abs=0.01)
    entropy = -(0.6 * math.log(0.6) + 2 * 0.2 * math.log(0.2))  # of 3/5, 1/5, 1/5
    assert metrics["joint_entropy"] == pytest.approx(entropy)
    share = training[training <= 2].bincount() / (training <= 2).sum()
    entropy = -(share * share.log()).sum().item()
    assert metrics["aggregate_entropy"] == pytest.approx(entropy, abs=0.01)
    assert disagreement["joint_coherence"] == 4 / 8  # svhn shows 2 four times, mnist 4 two of them
    doubt = (training >= 2).double().mean().item()
    assert disagreement["aggregate_coherence"] == pytest.approx(doubt, abs=0.01)


@pytest.mark.parametrize("digit, share", [(-1, 0), (3, 1 / 8)])
def test_the_entropy_of_one_digit_or_none_is_zero(digit, share):
    """The oracles agree on no sample, or on one of eight."""
    model = Cycles([(1, 4, 4), (3, 2, 6)], lambda m, z: z + m * (z != digit))
    metrics, _ = evaluation.joint_coherence(model, toy(), READERS, samples=8)
    assert metrics["joint_coherence"] == share and metrics["joint_entropy"] == 0
    assert model.done == 8


def test_mutual_information_is_the_mean_over_the_first_images():
    class Doubled(Reader):
        def information(self, x):
            return 2 * super().information(x)

    dataset, model = toy(n=2004), Sampled([(1, 4, 4), (3, 2, 6)], flipped)
    oracles = {"mnist": Reader(), "svhn": Doubled()}
    nats = evaluation.mutual_information(model, dataset, oracles)["mutual_information"]
    grey = dataset.test.labels[:1000].double().mean().item() * 25 / 255  # Reader.information
    other = 9 * 25 / 255 - grey
    expected = {"mnist": grey, "mnist->svhn": 2 * other, "svhn->mnist": grey, "svhn": 2 * other}
    assert nats == pytest.approx(expected, rel=1e-4)
    assert model.asked == [((True, False), 1000), ((False, True), 1000)]


# ------------------------------------------------------------------------------ labels and latents


def test_latent_accuracy_is_of_samples_and_not_of_means():
    accuracy = evaluation.latent_accuracy(Sampled(SHAPES), toy())["latent_accuracy"]
    assert accuracy == {"mnist": 1, "svhn": 1}


def test_the_probe_is_fit_on_every_training_image_once(monkeypatch):
    dataset, calls = toy(n=40), []
    rows = torch.randperm(78) // 2  # every image twice
    train = data.Split(dataset.train.bases, [rows, rows.flip(0)], dataset.train.labels[rows])
    monkeypatch.setattr(evaluation, "linear_probe", lambda *xs: calls.append(xs) or len(calls))
    model = Sampled(SHAPES)
    metrics = evaluation.latent_accuracy(model, dataset._replace(train=train))
    assert metrics == {"latent_accuracy": {"mnist": 1, "svhn": 2}}
    assert model.asked == [(mask, n) for mask in ((True, False), (False, True)) for n in (39, 20)]
    for train_z, _, test_z, test_y in calls:
        images = dataset.train.bases[0][:39, 0, 0, 0] / 25
        assert np.allclose(np.sort(train_z[:, 0]), images.sort().values)
        assert np.allclose(test_z[:, 0], test_y) and (test_y == dataset.test.labels.numpy()).all()
    assert np.allclose(calls[0][0][:, 0], calls[0][1])  # labels belong to their images


def test_the_probe_leaves_out_hidden_rows(monkeypatch):
    """Hidden in training or in test, of this modality: neither all nor any decide."""
    mask = torch.tensor([[1, 1, 0], [1, 0, 1], [0, 1, 1], [1, 0, 0]]).bool().repeat(20, 1)
    test_mask = torch.tensor([[0, 1, 0], [1, 0, 0], [0, 1, 1], [1, 1, 0]]).bool().repeat(10, 1)
    dataset, calls = linear_data(40, mask=mask, test_mask=test_mask), []
    monkeypatch.setattr(evaluation, "linear_probe", lambda *xs: calls.append(xs) or 0)
    evaluation.latent_accuracy(Linear(), dataset)
    sizes = [[len(x) for x in call] for call in calls]
    assert sizes == [[60, 60, 20, 20], [40, 40, 30, 30], [40, 40, 10, 10]]
    for m, (_, train_y, _, test_y) in enumerate(calls):
        assert (train_y == dataset.train.labels.numpy()[mask[:, m]]).all()
        assert (test_y == dataset.test.labels.numpy()[test_mask[:, m]]).all()


def test_modalities_without_classes_or_test_rows_have_no_probe():
    dataset = linear_data(40)
    mask = (dataset.train.labels[:, None] == torch.tensor([[0, 1, 2]])) | torch.tensor([1, 0, 1])
    test_mask = torch.tensor([1, 1, 0]).bool().expand(40, 3)
    metrics = evaluation.latent_accuracy(
        Linear(), dataset._replace(mask=mask.bool(), test_mask=test_mask)
    )
    assert list(metrics["latent_accuracy"]) == ["x0"]  # x1: one class, x2: no test row
    dataset.train.labels[:] = 1
    assert evaluation.latent_accuracy(Linear(), dataset) == {}


# -------------------------------------------------------------------------------------- likelihoods


def recorded(model, dataset, monkeypatch, **options):
    """log_likelihoods, and the log weights of which it is made. -> metrics, [(pattern, log_w)]"""
    log_weights, record = evaluation.log_weights, []

    def recording(model, xs, p, q, z):
        log_w = log_weights(model, xs, p, q, z)
        record.append((pattern(xs), log_w.double().numpy()))
        return log_w

    monkeypatch.setattr(evaluation, "log_weights", recording)
    return evaluation.log_likelihoods(model, dataset, **options), record


@pytest.mark.parametrize("samples", [40, 25, 3])
def test_the_rise_takes_no_mean_inside_the_log(samples, monkeypatch):
    """A tenth of the samples has a lower log of the mean of w than all of them, on average."""
    dataset = linear_data(30, names=("x0", "x1"))
    metrics, record = recorded(Linear((3, 2)), dataset, monkeypatch, examples=30, samples=samples)
    tenths = min(10, samples)
    assert len(record) == 5 * tenths
    for k, case in enumerate(["x0", "x1", "x0,x1", "x0|x1", "x1|x0"]):
        parts = [w for _, w in record[k * tenths : (k + 1) * tenths]]  # each (K / 10, 30)
        assert sum(map(len, parts)) == samples and parts[0].shape[1] == 30
        nats = np.log(np.exp(np.concatenate(parts)).mean(0)).mean()
        fewer = np.mean([np.log(np.exp(part).mean(0)).mean() for part in parts])
        assert metrics["log_likelihood"][case] == pytest.approx(nats, abs=1e-4)
        assert metrics["log_likelihood_rise"][case] == pytest.approx(nats - fewer, abs=1e-4)
        assert metrics["log_likelihood_rise"][case] > 0.01


def test_log_likelihoods_are_means_of_exact_evidences():
    """Of more than one batch, whose means differ."""
    dataset = linear_data(250)
    model = Linear()
    metrics = evaluation.log_likelihoods(model, dataset, examples=230, samples=500)
    xs = dataset.test[torch.linspace(0, 249, 230).long()]
    cases = {"x0": (1, 0, 0), "x1": (0, 1, 0), "x2": (0, 0, 1), "x0,x1,x2": (1, 1, 1)}
    for name, mask in cases.items():
        target = only(xs, mask)
        exact = model.evidence(target, model.prior(*target)).mean().item()
        assert metrics["log_likelihood"][name] == pytest.approx(exact, abs=0.03)
    cases = {"x0|x1,x2": (1, 0, 0), "x1|x0,x2": (0, 1, 0), "x2|x0,x1": (0, 0, 1)}
    for name, mask in cases.items():
        given = only(xs, [not target for target in mask])
        exact = model.evidence(only(xs, mask), model.posterior(*given)).mean().item()
        assert metrics["log_likelihood"][name] == pytest.approx(exact, abs=0.03)
    assert len(metrics["log_likelihood"]) == 7
    assert 0 < max(metrics["log_likelihood_rise"].values()) < 0.03


def test_likelihoods_are_of_rows_that_show_every_modality(monkeypatch):
    test_mask = torch.ones(40, 3, dtype=torch.bool)
    test_mask[::2, 0] = test_mask[1, 1] = test_mask[39, 2] = False
    dataset = linear_data(40, test_mask=test_mask)
    seen = []

    def log_likelihood(model, xs, samples, given=None):
        seen.append(next(x for x in xs if x is not None))
        return torch.zeros(len(seen[-1]))

    monkeypatch.setattr(evaluation, "log_likelihood", log_likelihood)
    evaluation.log_likelihoods(Linear(), dataset, examples=5, samples=1)
    rows = torch.arange(3, 39, 2)  # 18 rows, of which 5 at equal distances
    expected = dataset.test.bases[0][rows[torch.linspace(0, 17, 5).long()]]
    assert torch.equal(seen[0], expected)
    hidden = dataset._replace(test_mask=test_mask & torch.tensor([True, False, True]))
    assert evaluation.log_likelihoods(Linear(), hidden) == {}


def test_likelihoods_of_untrained_priors_are_left_out():
    model, dataset = Linear(), linear_data(9)
    conditional = ["x0|x1,x2", "x1|x0,x2", "x2|x0,x1"]
    cases = {(): [], ("x1",): ["x1"], ("x1", "x2"): ["x1", "x2", "x0,x1,x2"]}
    for priors, names in cases.items():
        metrics = evaluation.log_likelihoods(model, dataset, 5, 2, priors)
        assert list(metrics["log_likelihood"]) == names + conditional
