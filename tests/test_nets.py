"""Layers, likelihoods and the modalities of a data set. The networks of the papers' tables are in
test_models.py."""

import math

import pytest
import torch
from torch import nn
from torch.distributions import Bernoulli, Categorical, Laplace, NegativeBinomial, Normal, Poisson
from torch.testing import assert_close

import nets
from helpers import images, plain_modality, same

# ------------------------------------------------------------------------ a user's own arrays


@pytest.mark.parametrize("kind, shape, likelihood, more, parameter", [
    ("numbers", (3,), "normal", {}, (3, 2)), ("numbers", (100,), "laplace", {}, (100, 2)),
    ("counts", (5,), "negative-binomial", {}, (5, 2)), ("counts", (600,), "poisson", {}, (600,)),
    ("bits", (70,), "bernoulli", {}, (70,)), ("class", (), "categorical", dict(classes=80), (80,)),
])  # fmt: skip
def test_own_arrays_have_the_parameters_of_their_likelihood(
    kind, shape, likelihood, more, parameter
):
    m = nets.array_modality("x", kind, shape, likelihood, **more)
    facts = (m.name, m.kind, m.shape, m.likelihood, m.weight, m.classes, m.stats, m.unseen)
    assert facts == ("x", kind, shape, likelihood, 1, more.get("classes"), None, ())
    x = torch.ones(2, *shape, dtype=torch.int64 if kind == "class" else torch.float32)
    assert m.encoder(7)(x)[0].shape == (2, 7)
    p = m.decoder(7)(torch.randn(3, 2, 7))
    assert p.shape == (3, 2, *parameter) and nets.log_prob(m, p, x).shape == (3, 2)
    assert nets.mean(m, p).shape == (3, 2, *shape, *parameter[: kind == "class"])


def test_facts_of_an_own_array_are_those_of_its_modality():
    facts = dict(stats={"mean": [1.0], "std": [2.0]}, unseen=[2])
    for size, hidden in ((4, 64), (100, 100), (600, 512)):
        m = nets.array_modality("x", "numbers", [size], "normal", **facts)
        assert (m.shape, m.stats, m.unseen) == ((size,), facts["stats"], (2,))
        assert m.encoder(7).head.in_features == m.decoder(7).net[0].out_features == hidden


def test_own_images_have_the_networks_of_svhn():
    m = nets.array_modality("x", "greys", (1, 12, 20), "laplace")
    svhn = nets.modalities("mnist-svhn", ["laplace"] * 2)[1]
    pairs = (m.encoder(7).trunk, svhn.encoder(7).trunk), (m.decoder(7).net, svhn.decoder(7).net)
    for (ours, theirs), differ in zip(pairs, ([0], [0, 7])):  # channels; the size of the first map
        pairs = [(str(a), str(b)) for a, b in zip(ours, theirs, strict=True)]
        assert [k for k, (a, b) in enumerate(pairs) if a != b] == differ
    assert (m.kind, m.scale) == ("greys", 1)
    assert m.encoder(7).head.in_features == 128 * 1 * 2  # 12 x 20, halved three times
    x = m.decoder(7)(torch.randn(2, 7))
    assert x.shape == (2, 1, 12, 20) and 0 < x.min() and x.max() < 1
    assert m.encoder(7)(torch.rand(2, 1, 12, 20))[0].shape == (2, 7)


@pytest.mark.parametrize("kind, likelihood, marginal, start", [
    ("numbers", "normal", dict(mean=[1.0, -2.0], std=[0.5, 4.0]), [1.0, -2.0]),
    ("counts", "negative-binomial", dict(mean=[3.0, 0.0], std=[2.0, 0.0]), [3.0, 1e-3]),
    ("counts", "poisson", dict(mean=[3.0, 0.0], std=[2.0, 0.0]), [3.0, 1e-3]),
    ("bits", "bernoulli", dict(mean=[0.2, 1.0]), [0.2, 0.999]),
    ("bits", "bernoulli", dict(mean=[0.0, 0.9]), [0.001, 0.9]),
    ("class", "categorical", dict(mean=[0.25, 0.75]), [0.25, 0.75]),
    ("class", "categorical", dict(mean=[0.0, 1.0]), [1e-3 / 1.001, 1 / 1.001]),
])  # fmt: skip
def test_outputs_start_at_the_marginal(kind, likelihood, marginal, start):
    shape, more = ((), dict(classes=2)) if kind == "class" else ((2,), {})
    m = nets.array_modality("x", kind, shape, likelihood, marginal=marginal, **more)
    decoder = m.decoder(3)
    nn.init.zeros_(decoder.net[4].weight)
    parameter = decoder(torch.randn(1, 3))
    assert_close(nets.mean(m, parameter)[0], torch.tensor(start))
    if kind == "numbers":  # the floor of the scale, .01 of the deviation, is added
        assert m.scale is None
        assert_close(parameter[0, :, 1].exp(), 1.01 * torch.tensor(marginal["std"]))
        decoder.net[5].value.data.fill_(-50.0)
        assert_close(decoder(torch.randn(1, 3))[0, :, 1].exp(), torch.tensor([0.005, 0.04]))
    if m.likelihood != "poisson" and kind in ("numbers", "counts"):  # no two models share it
        assert decoder.net[5].value.data_ptr() != m.decoder(3).net[5].value.data_ptr()
    if kind == "counts":
        first, x = m.encoder(3).trunk[0], torch.tensor([[3.0, 0.0], [7.0, 0.0]])
        assert_close(first(x), torch.tensor([[0, 0], [2 * math.log(2), 0]]))
    if likelihood == "negative-binomial":  # variance 4 = mean 3 + 3² / r
        r = torch.tensor([9.0, 0.01]) + math.exp(-10)
        assert_close(parameter[0, :, 1].exp(), r)


def test_bits_of_spectra_start_at_their_frequencies():
    frequencies = torch.linspace(0, 1, 2149)
    fingerprint = nets.modalities("spectra", frequencies=frequencies.tolist())[1]
    decoder = fingerprint.decoder(3)
    nn.init.zeros_(decoder.net[-1].weight)
    start = nets.mean(fingerprint, decoder(torch.randn(3)))
    assert_close(start, frequencies.clamp(1e-3, 1 - 1e-3))


def test_counts_are_standardised_logs_and_pseudo_samples_have_gradients():
    first = nets.LogCounts(torch.tensor([3.0, 0.0]), torch.tensor([2.0, 0.5]))
    x = torch.tensor([[3.0, 0.0], [7.0, 1.0], [-3.0, -1.0]], requires_grad=True)
    h = first(x)
    log = math.log
    expected = [[0, 0], [2 * log(2), 2 * log(2)], [-4 * log(4), -2 * log(2)]]
    assert_close(h, torch.tensor(expected))
    h.sum().backward()
    assert_close(x.grad, torch.tensor([[0.5, 2.0], [0.25, 1.0], [0.5, 1.0]]))
    assert first(torch.ones(4, 2)).shape == (4, 2) and not list(first.state_dict())


def test_missing_numbers_are_0_to_encoders_and_not_scored():
    x = torch.tensor([[1.0, math.nan, 3.0], [math.nan] * 3])
    assert nets.NaNToZero()(x).tolist() == [[1, 0, 3], [0, 0, 0]]
    parameter = torch.randn(5, 2, 3, 2, requires_grad=True)
    for likelihood, family in (("normal", Normal), ("laplace", Laplace)):
        m = nets.Modality("x", (3,), None, None, likelihood, scale=None)
        log_p = nets.log_prob(m, parameter, x)
        location, log_scale = parameter.unbind(-1)
        each = family(location, log_scale.exp()).log_prob(torch.tensor([1.0, 0.0, 3.0]))
        assert_close(log_p, torch.stack([each[:, 0, 0] + each[:, 0, 2], torch.zeros(5)], 1))
        [gradient] = torch.autograd.grad(log_p.sum(), parameter)
        assert (gradient[:, 1] == 0).all() and (gradient[:, 0, 1] == 0).all()


def test_a_class_is_one_hot_or_the_softmax_of_logits():
    first, logits = nets.OneHot(3), torch.randn(2, 3)
    assert first(torch.tensor([2, 0])).tolist() == [[0, 0, 1], [1, 0, 0]]
    assert_close(first(logits), logits.softmax(-1))


# ------------------------------------------------------------------------- networks and likelihoods


def test_likelihoods_and_means_are_those_of_torch():
    parameter, x = torch.randn(3, 4, 2, 5), torch.rand(4, 2, 5)
    two, count = torch.randn(3, 4, 2, 5, 2), (5 * x).round()
    a, b = two.unbind(-1)
    r = b.exp()
    cases = [
        ("normal", parameter, Normal(parameter, 0.3), x, 0.3),
        ("laplace", parameter, Laplace(parameter, 0.3), x, 0.3),
        ("normal", two, Normal(a, r), x, None),
        ("laplace", two, Laplace(a, r), x, None),
        ("bernoulli", parameter, Bernoulli(logits=parameter), x.round(), 1.0),
        ("poisson", parameter, Poisson(parameter.exp()), count, 1.0),
        ("negative-binomial", two, NegativeBinomial(r, logits=a - b), count, 1.0),
    ]
    for likelihood, parameter, density, x, scale in cases:
        modality = nets.Modality("x", (2, 5), None, None, likelihood, weight=9.0, scale=scale)
        log_p = nets.log_prob(modality, parameter, x)
        assert_close(log_p, density.log_prob(x).sum((-1, -2)))
        assert_close(nets.mean(modality, parameter), density.mean)
        assert nets.log_prob(modality, parameter.bfloat16(), x).dtype == torch.float32
    grey = nets.Modality("x", (2, 5), None, None, "bernoulli")
    logits, x = torch.randn(4, 2, 5), torch.rand(4, 2, 5)
    expected = x * logits.sigmoid().log() + (1 - x) * (-logits).sigmoid().log()
    assert_close(nets.log_prob(grey, logits, x), expected.sum((1, 2)))
    with pytest.raises(ValueError, match="must be one of bernoulli, .* not 'x'"):
        nets.log_prob(grey._replace(likelihood="x"), logits, x)


ALL_LIKELIHOODS = pytest.mark.parametrize("likelihood, scale", [
    ("bernoulli", 1.0), ("laplace", 1.0), ("normal", 1.0), ("poisson", 1.0), ("laplace", None),
    ("normal", None), ("negative-binomial", 1.0), ("categorical", 1.0),
])  # fmt: skip


@ALL_LIKELIHOODS
def test_samples_have_the_mean_and_spread_of_the_likelihood(likelihood, scale):
    parameter = torch.tensor([[0.3, -0.5], [-1.0, 0.4]])  # two features, two numbers each
    modality = nets.Modality("x", (2,), None, None, likelihood, scale=scale and 0.5)
    if not nets.extra_axis(modality):
        parameter = parameter[:, 0]
    a, b = (parameter[:, 0], parameter[:, 1].exp()) if parameter.ndim == 2 else (parameter, 0.5)
    density = {
        "bernoulli": lambda: Bernoulli(logits=a),
        "laplace": lambda: Laplace(a, b),
        "normal": lambda: Normal(a, b),
        "poisson": lambda: Poisson(a.exp()),
        "negative-binomial": lambda: NegativeBinomial(b, logits=a - b.log()),
        "categorical": lambda: Bernoulli(logits=parameter[:, 1] - parameter[:, 0]),
    }[likelihood]()
    x = nets.sample(modality, parameter.expand(40_000, *parameter.shape))
    assert x.shape == (40_000, 2)
    x = x.float()
    assert_close(x.mean(0), density.mean, atol=0.04, rtol=0)
    assert_close(x.std(0), density.stddev, atol=0.05, rtol=0.03)
    if likelihood in ("laplace", "normal"):
        spread = (x - density.mean).abs().mean(0) / density.stddev
        expected = 0.5**0.5 if likelihood == "laplace" else (2 / math.pi) ** 0.5
        assert_close(spread, torch.full((2,), expected), atol=0.02, rtol=0)


@ALL_LIKELIHOODS
def test_a_likelihood_never_broadcasts(likelihood, scale):
    def log_prob(shape, parameter, x):
        modality = nets.Modality("age", shape, None, None, likelihood, scale=scale)
        last = {"categorical": (4,)}.get(likelihood, (2,) if nets.extra_axis(modality) else ())
        x = torch.ones(x, dtype=torch.int64 if likelihood == "categorical" else torch.float32)
        return nets.log_prob(modality, torch.zeros(*parameter, *last), x)

    assert log_prob((1,), (5, 3, 1), (3, 1)).shape == (5, 3)
    assert log_prob((6,), (3, 6), (3, 6)).shape == (3,)
    assert log_prob((3,), (3, 3), (3, 3)).shape == (3,)
    for shape, parameter, x in [
        ((1,), (3, 1), (3,)),  # x has no feature axis
        ((), (3, 1), (3,)),  # nor should it have one
        ((1,), (3,), (3, 1)),
        ((6,), (3, 1), (3, 6)),  # a decoder narrower than x
        ((1,), (3, 6), (3, 1)),
        ((6,), (1, 6), (3, 6)),
        ((6,), (3, 6), (1, 6)),
        ((1, 4, 5), (3, 1, 4, 5), (3, 4, 5)),  # an image without its channel
    ]:
        with pytest.raises(ValueError, match=r"age must have the shape \('B'.*parameter is"):
            log_prob(shape, parameter, x)


def test_padding_is_not_scored_but_every_word_and_class():
    modality = nets.modalities("cub", vocabulary=4)[1]
    logits, x = torch.randn(3, 2, 32, 4), torch.randint(4, (2, 32))
    each = Categorical(logits=logits).log_prob(x)  # words 0 to 3, of which 1 is <pad>
    expected = torch.where(x == 1, 0, each).sum(-1)
    assert_close(nets.log_prob(modality, logits, x), expected)
    assert_close(nets.log_prob(modality, logits[0], x), expected[0])
    assert nets.log_prob(modality, logits.bfloat16(), x).dtype == torch.float32
    assert_close(nets.mean(modality, logits), logits.softmax(-1))
    modality = nets.array_modality("x", "class", (), "categorical", classes=120)
    logits, x = torch.randn(5, 120, 120), torch.arange(120)  # class 1, too
    assert_close(nets.log_prob(modality, logits, x), Categorical(logits=logits).log_prob(x))


def test_variances_are_floored_smoothly_at_1e_6():
    h = torch.tensor([[0.5, -1.0, -200.0, 3.0], [2.0, 0.0, -13.0, -14.0]])
    mu, logvar = nets.gaussian(h.bfloat16())
    assert mu.dtype == logvar.dtype == torch.float32
    assert mu.tolist() == h[:, :2].tolist()
    assert_close(logvar, (1e-6 + h[:, 2:].exp()).log())


def test_later_batches_leave_the_gradient_of_pseudo_samples():
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh())
    net(5 + torch.randn(6, 3))  # its statistics are not those that it starts with
    state = {key: value.clone() for key, value in net.state_dict().items()}
    u, x = torch.randn(4, 3, requires_grad=True), torch.randn(6, 3)
    expected, gradients = net.eval()(u), []
    for later in (False, True):
        net.train().load_state_dict(state)
        h = nets.apply(net, u, running=True)
        assert_close(h, expected)
        assert same(state, net.state_dict()) and net[1].training
        if later:
            nets.apply(net, x)
            assert not same(state, net.state_dict())
        gradients.append(torch.autograd.grad(h.square().sum(), u)[0])
    assert_close(*gradients)
    nets.apply(net.eval(), u[:1])
    assert not net[1].training


def test_joint_networks_have_a_layer_of_512_per_modality():
    modalities = [*nets.modalities("glyphs"), plain_modality("plain", 5, "normal")]
    joint, xs = nets.Joint(modalities, 3), [*images("glyphs", 4), torch.randn(4, 5)]
    grey, colour, plain = joint.trunks
    h = [grey(xs[0]), colour(xs[1]), torch.cat(plain.encoder(xs[2]), 1)]  # mu and logvar: 2 L
    assert h[2].shape == (4, 6)
    h = [(x @ layer[0].weight.T + layer[0].bias).relu() for x, layer in zip(h, joint.layers)]
    h = torch.cat(h, 1)
    assert h.shape == (4, 3 * 512)
    assert_close(joint(xs), nets.gaussian(joint.head(h)))


def test_building_blocks_compute_what_they_say():
    channels_last = torch.arange(30).view(1, 3, 5, 2)
    assert_close(nets.Map(2, 3, 5)(channels_last.flatten(1)), channels_last.permute(0, 3, 1, 2))
    grid = torch.arange(30).view(1, 5, 6)
    assert_close(nets.Crop(2, 3)(grid), torch.tensor([[[0, 1, 2], [6, 7, 8]]]))
    with torch.autocast("cpu", torch.bfloat16):
        assert nets.modalities("glyphs")[0].decoder(3)(torch.randn(5, 3)).dtype == torch.float32
    weight, words = torch.randn(7, 128), torch.randint(7, (2, 32))
    embed, logits = nets.WordEmbedding(weight), nets.WordLogits(nn.Parameter(weight))
    h = embed(words)
    assert h.shape == (2, 1, 32, 128) and (h[1, 0, 5] == weight[words[1, 5]]).all()
    soft = torch.randn(2, 32, 7)
    assert_close(embed(soft)[:, 0], soft.softmax(-1) @ weight)
    nn.init.normal_(logits.bias)
    assert_close(logits(h), h[:, 0] @ weight.T + logits.bias)


def test_likelihoods_and_weights_can_be_chosen_and_are_checked():
    first, second = nets.modalities("glyphs", ["laplace", "bernoulli"], [2.0, 0.0])
    assert (first.likelihood, first.weight) == ("laplace", 2)
    assert (second.likelihood, second.weight) == ("bernoulli", 0)
    assert isinstance(first.decoder(3).net[-1], nn.Sigmoid)  # [poe] Table A.3
    assert second.decoder(3).net[-1].out_features == 3072
    for dataset in ("mnist-svhn", "mnist-split"):
        for m in nets.modalities(dataset, likelihoods=["laplace"] * 2):
            assert isinstance(m.decoder(3).net[-1], nn.Sigmoid)
    features = nets.modalities("cub", vocabulary=5, likelihoods=["normal", "categorical"])[0]
    assert features.likelihood == "normal"
    assert features.decoder(3).net[-1].out_features == 2048  # features are not in (0, 1)
    for key, values in [("likelihoods", ["laplace"]), ("likelihoods", ["x", "x"]),
                        ("likelihoods", ["categorical", "bernoulli"]),
                        ("likelihoods", ["poisson", "bernoulli"]),
                        ("likelihoods", ["negative-binomial", "bernoulli"]),
                        ("weights", [-1.0, 1.0]), ("weights", [math.nan, 1.0]),
                        ("weights", [math.inf, 1.0]), ("weights", [1.0])]:  # fmt: skip
        with pytest.raises(ValueError):
            nets.modalities("glyphs", **{key: values})
    with pytest.raises(ValueError, match="caption cannot"):
        nets.modalities("cub", vocabulary=5, likelihoods=["laplace", "normal"])
    with pytest.raises(ValueError, match="'nope'"):
        nets.modalities("nope")
