"""What has to hold, in numbers. `pytest test_models.py`: no download, no GPU, under three minutes.

Bounds are held against the exact evidence of a linear-Gaussian model, products and divergences
against grids and torch.distributions, estimators against their expectation, loops against
themselves, killed and resumed.
"""

import argparse
import ast
import contextlib
import csv
import difflib
import errno
import gzip
import io
import itertools
import json
import math
import os
import pickle
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
import types
import urllib.error
import warnings
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.distributions import Independent, MultivariateNormal, Normal, kl_divergence

import data
import eval as evaluation
import meme
import mmvae
import mvae
import nets
import svae
import vaevae

HERE = Path(__file__).parent
SCRIPTS = {"meme": meme, "svae": svae, "vaevae": vaevae, "mmvae": mmvae, "mvae": mvae}
CLASSES = {
    "meme": meme.MEME,
    "svae": svae.SVAE,
    "vaevae": vaevae.VAEVAE,
    "mmvae": mmvae.MMVAE,
    "mvae": mvae.MVAE,
}
NOISE = 0.7  # the standard deviation of every x given z in the linear-Gaussian models
L = 2
torch.set_num_threads(1)  # tiny models: threads would wait for each other
with warnings.catch_warnings():  # no configuration file declares the mark
    warnings.simplefilter("ignore")
    slow = pytest.mark.slow


@pytest.fixture(autouse=True)
def fast_unless_asked(request):
    if request.node.get_closest_marker("slow") and "slow" not in request.config.getoption("-m"):
        pytest.skip("slow: pytest test_models.py -m slow")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


# ------------------------------------------------------------------------- a model with an evidence


class Linear(nn.Module):
    """x -> W x + b, exp(logvar): an encoder whose posterior can be exact."""

    def __init__(self, latent_dim, size):
        super().__init__()
        self.mu = nn.Linear(size, latent_dim)
        self.logvar = nn.Parameter(torch.randn(latent_dim) * 0.3 - 1)

    def forward(self, x, running=False):
        return self.mu(x), self.logvar.expand(len(x), -1)


def linear_modalities(*sizes):
    return [
        nets.Modality(
            f"x{k}", (size,), lambda latent, size=size: Linear(latent, size),
            lambda latent, size=size: nn.Linear(latent, size), "normal", scale=NOISE,
        )
        for k, size in enumerate(sizes)
    ]  # fmt: skip


def linear_model(name, sizes=(3, 2), **options):
    torch.manual_seed(3)
    if name == "vaevae":
        options.setdefault("variant", "a")
    return CLASSES[name](linear_modalities(*sizes), L, **options)


def evidence(model, xs, mean=None, variance=None):
    """log of the integral of Π_m p(x_m|z) N(z; mean, variance), exactly. -> (B,)"""
    seen = [m for m, x in enumerate(xs) if x is not None]
    weight = torch.cat([model.decoders[m].weight for m in seen])
    bias = torch.cat([model.decoders[m].bias for m in seen])
    mean = torch.zeros(L) if mean is None else mean
    variance = torch.ones(L) if variance is None else variance
    covariance = weight @ torch.diag(variance) @ weight.T + NOISE**2 * torch.eye(len(weight))
    return MultivariateNormal(bias + mean @ weight.T, covariance).log_prob(
        torch.cat([xs[m] for m in seen], -1)
    )


def orthogonal(model):
    """Decoders with orthogonal columns: their exact posteriors are diagonal, so an encoder can have
    them."""
    for decode in model.decoders:
        decode.weight.data = torch.linalg.qr(torch.randn_like(decode.weight))[0] * torch.tensor(
            [1.3, 0.6]
        )


def exact(encode, decode, prior_share):
    """Make an encoder the Gaussian ∝ p(x|z) p(z)^prior_share; without a decoder, p(z)^prior_share
    alone."""
    precision = torch.full((L,), float(prior_share))
    if decode is not None:
        precision = precision + (decode.weight**2).sum(0) / NOISE**2
        encode.mu.weight.data = decode.weight.T / NOISE**2 / precision[:, None]
        encode.mu.bias.data = -encode.mu.weight @ decode.bias
    else:
        encode.mu.weight.data.zero_()
        encode.mu.bias.data.zero_()
    encode.logvar.data = -precision.log()


@pytest.fixture
def experts_as_encoded(monkeypatch):
    """Experts of any precision, without their floor: then posteriors can be exact, or flat."""
    for script in (svae, mvae):
        monkeypatch.setattr(script, "expert", lambda mu, logvar: (mu, logvar))


def pair(n=1, sizes=(3, 2)):
    """One example of each modality, n times."""
    torch.manual_seed(5)
    return [torch.randn(1, size).expand(n, size) for size in sizes]


def mean_and_error(values):
    return values.mean().item(), 4 * values.std().item() / len(values) ** 0.5


def images(name, n=2):
    return [torch.rand(n, *m.shape) for m in nets.modalities(name)]


# ------------------------------------------------------------------------------------------- bounds


@pytest.mark.parametrize("seen", [(0,), (1,), (0, 1)])
@torch.no_grad()
def test_mvae_elbo_lies_below_the_evidence(seen):
    model, xs = linear_model("mvae"), pair(20_000)
    xs = [x if m in seen else None for m, x in enumerate(xs)]
    bound, error = mean_and_error(model.elbo(seen, xs, model.encode(xs)))
    assert bound < evidence(model, xs)[0] + error


@torch.no_grad()
def test_mvae_elbo_of_the_exact_posterior_is_the_evidence(experts_as_encoded):
    model, xs = linear_model("mvae"), pair(20_000)
    orthogonal(model)
    for encode, decode in zip(model.encoders, model.decoders):
        exact(encode, decode, 0)  # the product has the prior, once
    for seen in [(0,), (1,), (0, 1)]:
        part = [x if m in seen else None for m, x in enumerate(xs)]
        bound, error = mean_and_error(model.elbo(seen, part, model.encode(part)))
        assert bound == pytest.approx(evidence(model, part)[0].item(), abs=error + 1e-4)


def test_mvae_has_no_more_subsets_than_there_are():
    xs = pair(4, (3, 2, 4))
    loss = linear_model("mvae", (3, 2, 4), subsets=3)([(1.0, xs)])
    assert loss.item() > linear_model("mvae", (3, 2, 4))([(1.0, xs)]).item()  # three bounds more
    for sizes in ((3, 2), (3, 2, 4)):
        with pytest.raises(ValueError, match="--subsets 4"):
            linear_model("mvae", sizes, subsets=4)


def test_bytes_stay_bytes_and_bits_bits_from_training_to_test(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (6, 1, 8, 8), np.uint8)
    dark = np.zeros((6, 1, 8, 8), np.uint8)
    dark[0, 0, 0, 0] = 1
    arrays = dict(train_0=images, test_0=dark, train_1=dark, test_1=dark)
    np.savez(tmp_path / "a.npz", **arrays)
    test = data.load(tmp_path / "a.npz").test
    assert test.take(0, 0).max() == 1 / 255 and test.take(1, 0).max() == 1
    np.savez(tmp_path / "a.npz", **arrays | {"test_1": images})
    with pytest.raises(ValueError, match="test_1"):
        data.load(tmp_path / "a.npz")


def test_bernoulli_is_refused_for_values_that_it_cannot_have():
    split = data.Split([torch.rand(4, 3), 5 * torch.rand(4, 2) + 1])
    shapes = {"0": [3], "1": [2]}
    toy = data.Dataset("toy", split, split, {"name": "npz", "shapes": shapes}, ("0", "1"))
    modalities = nets.modalities("npz", shapes=shapes, likelihoods=["bernoulli", "laplace"])
    data.refuse_values(toy, modalities)
    modalities = nets.modalities("npz", shapes=shapes, likelihoods=["laplace", "bernoulli"])
    with pytest.raises(ValueError, match="values in .0, 1., 1 has others"):
        data.refuse_values(toy, modalities)
    hidden = torch.tensor([[True, False]] * 4)  # what a mask hides may be anything
    data.refuse_values(toy._replace(mask=hidden), modalities)


def test_options_that_would_do_nothing_are_refused():
    with pytest.raises(ValueError, match="--explicit product"):
        linear_model("meme", explicit="product")
    with pytest.raises(ValueError, match="--tight"):
        linear_model("mmvae", objective="elbo", tight=True)


@pytest.mark.parametrize("script", [mvae, svae])
def test_flat_experts_keep_a_gradient(script):
    logvar = torch.tensor([-10.0, -1.0, 0.0, 5.0, 100.0, math.inf], requires_grad=True)
    precision = torch.exp(-script.expert(logvar, logvar)[1])
    known = torch.tensor([math.exp(10), math.e, 1, 1 / 6, 1 / 101, 0]) + 0.1
    torch.testing.assert_close(precision, known)
    precision[:5].sum().backward()
    assert (-logvar.grad[:5] > 0.9e-4).all()  # of exp(-logvar) it would be 4e-44 for the last

    model, xs = linear_model(script.__name__), pair(100)
    encode = model.encoders[0] if script is mvae else model.encoders[0][0]
    encode.logvar.data.fill_(100.0)
    model.objective(*xs).backward()
    assert encode.mu.weight.grad.abs().max() > 0.01


@pytest.mark.parametrize("k", [0, 1])
@torch.no_grad()
def test_svae_single_elbos_lie_below_the_evidence(k):
    model, xs = linear_model("svae"), pair(20_000)
    xs = [x if m == k else None for m, x in enumerate(xs)]
    bound, error = mean_and_error(model.bound((k,), xs, model.encode(xs)))
    assert bound < evidence(model, xs)[0] + error


@torch.no_grad()
def test_svae_conditional_term_lies_below_the_conditional_evidence():
    model, xs = linear_model("svae"), pair(20_000)
    q = model.encode(xs)
    (mu, logvar), given = q[0, 1][0], q[1,][0]
    z = mu + torch.exp(0.5 * logvar) * torch.randn_like(mu)
    term = model.log_p(0, z, xs[0]) - svae.kl_normal(mu, logvar, *given)
    bound, error = mean_and_error(term)
    assert bound < evidence(model, [xs[0], None], given[0][0], given[1][0].exp())[0] + error


@torch.no_grad()
def test_svae_of_exact_posteriors_is_twice_the_joint_evidence(experts_as_encoded):
    model, xs = linear_model("svae"), pair(20_000)
    orthogonal(model)
    for i, j in itertools.product(range(2), repeat=2):  # p(z) is shared out: half to each expert
        exact(model.encoders[i][j], model.decoders[j] if i == j else None, 0.5)
    q = model.encode(xs)
    total, error = mean_and_error(sum(model.bound(subset, xs, q) for subset in q))
    assert total == pytest.approx(2 * evidence(model, xs)[0].item(), abs=error + 1e-4)  # Eq. (23)
    assert model.objective(*xs).item() == pytest.approx(total, abs=2 * error)


@torch.no_grad()
def test_vaevae_of_exact_posteriors_is_both_conditional_evidences():
    model, xs = linear_model("vaevae", variant="a"), pair(20_000)
    orthogonal(model)
    for encode, decode in zip(model.encoders, model.decoders):
        exact(encode, decode, 1)
    joint = svae.product([encode(x) for encode, x in zip(model.encoders, xs)])
    precision = torch.exp(-joint[1]) - 1  # q(z|x_1) q(z|x_2) has the prior twice
    q = model.encode(xs) | {
        (0, 1): [(joint[0] * torch.exp(-joint[1]) / precision, -precision.log())]
    }
    total, error = mean_and_error(model.bound((0, 1), xs, q))
    singles = sum(
        evidence(model, [x if m == k else None for m, x in enumerate(xs)])[0] for k in range(2)
    )
    assert total == pytest.approx((2 * evidence(model, xs)[0] - singles).item(), abs=error + 1e-4)


@pytest.mark.parametrize(
    "options", [{"objective": "elbo"}, {}, {"tight": True}, {"posterior": "laplace"}]
)
def test_mmvae_bounds_lie_below_the_evidence(options):
    model, xs = linear_model("mmvae", samples=3, **options), pair(1_000)
    with torch.no_grad():
        bounds = torch.stack([model.objective(*xs) for _ in range(20)])
    bound, error = mean_and_error(bounds)
    if (
        options.get("posterior") == "laplace"
    ):  # then the prior is no Gaussian: the evidence by quadrature
        grid = torch.cartesian_prod(*[torch.linspace(-12, 12, 601)] * 2)
        log_p = sum(
            nets.log_prob(m, decode(grid), x[0])
            for m, decode, x in zip(model.modalities, model.decoders, xs)
        )
        exactly = (log_p + model.prior().log_prob(grid)).logsumexp(0) + 2 * math.log(24 / 600)
    else:
        exactly = evidence(model, xs)[0]
    assert bound < exactly + error


@torch.no_grad()
def test_mmvae_iwae_rises_with_samples_and_tight_is_tighter():
    values = []
    for options in (
        {"objective": "elbo"},
        {"samples": 1},
        {"samples": 5},
        {"samples": 50},
        {"samples": 50, "tight": True},
    ):
        values.append(linear_model("mmvae", **options).objective(*pair(20_000)).item())
    assert values[0] == pytest.approx(values[1], abs=0.1)  # K = 1 is the elbo
    assert values[1] < values[2] < values[3] < values[4]


@pytest.mark.parametrize("samples", [1, 3])
@torch.no_grad()
def test_meme_as_printed_lies_below_the_conditional_evidence(samples):
    model, xs = linear_model("meme", kl="sample", classifier_scale=1, samples=samples), pair(20_000)
    gaussians = model.encode(xs)
    for s, t in [(0, 1), (1, 0)]:
        bound, error = mean_and_error(model.bound(s, xs, gaussians))
        mu, logvar = gaussians[t]
        only_s = [x if m == s else None for m, x in enumerate(xs)]
        assert bound < evidence(model, only_s, mu[0], logvar[0].exp())[0] + error


@torch.no_grad()
def test_meme_marginal_bound_lies_below_the_evidence_under_its_mixture_prior():
    model, xs = linear_model("meme", pseudo_samples=3), pair(20_000)
    model.start_pseudo([3 * torch.randn(3, 3), 3 * torch.randn(3, 2)])
    for s in range(2):
        bound, error = mean_and_error(model.marginal_bound(s, xs[s], *model.encode(xs)[s]))
        mu, logvar = model.pseudo_prior(s)
        only_s = [x[:1] if m == s else None for m, x in enumerate(xs)]
        parts = [evidence(model, only_s, m, v.exp())[0] for m, v in zip(mu, logvar)]
        assert bound < torch.stack(parts).logsumexp(0) - math.log(3) + error


@torch.no_grad()
def test_meme_marginal_bound_with_one_pseudo_sample_is_a_kl_to_its_encoder():
    model, xs = linear_model("meme", pseudo_samples=1), pair(50_000)
    mu, logvar = model.encode(xs)[0]
    prior_mu, prior_logvar = model.encoders[1](model.pseudo[1])
    z = mu + torch.exp(0.5 * logvar) * torch.randn_like(mu)
    values = model.marginal_bound(0, xs[0], mu, logvar)
    closed = model.log_p(0, z, xs[0]) - meme.kl_normal(mu, logvar, prior_mu, prior_logvar)
    (a, error_a), (b, error_b) = mean_and_error(values), mean_and_error(closed)
    assert a == pytest.approx(b, abs=error_a + error_b)


@pytest.mark.parametrize("name", CLASSES)
def test_importance_sampling_finds_the_evidence(name):
    model = linear_model(name, **({"pseudo_samples": 1} if name == "meme" else {})).requires_grad_(
        False
    )
    for encode in model.modules():
        if isinstance(encode, Linear):
            encode.logvar.data.fill_(0.5)  # wide proposals, or the weights have no variance
    xs = pair(4)
    if name == "meme":  # eq. (4)'s prior with one pseudo-sample is the Gaussian of its encoder
        mu, logvar = model.encoders[1](model.pseudo[1])
        exactly = evidence(model, [xs[0], None], mu[0], logvar[0].exp())
    else:
        exactly = evidence(model, xs)
        torch.testing.assert_close(
            model.log_likelihood(*xs, samples=50_000), exactly, atol=0.1, rtol=0
        )
        exactly = evidence(model, [xs[0], None])
    torch.testing.assert_close(
        model.log_likelihood(xs[0], None, samples=50_000), exactly, atol=0.1, rtol=0
    )
    given = model.posterior(None, xs[1])
    if name not in ("mmvae",):
        base = given.base_dist
        exactly = evidence(model, [xs[0], None], base.loc[0], base.scale[0] ** 2)
        found = model.log_likelihood(xs[0], None, given=[None, xs[1]], samples=50_000)
        torch.testing.assert_close(found, exactly.expand(4), atol=0.1, rtol=0)


@pytest.mark.parametrize("name", CLASSES)
def test_likelihoods_are_without_the_weights_of_training(name):
    model, found = linear_model(name).requires_grad_(False), []
    for weight in (1.0, 7.0):
        model.modalities = [m._replace(weight=weight) for m in model.modalities]
        torch.manual_seed(0)
        found.append(model.log_likelihood(*pair(4), samples=10))
    torch.testing.assert_close(*found)


# --------------------------------------------------------------------------------------------- MEME


def test_meme_weights_are_positive_at_most_k_and_one_on_average():
    model = linear_model("meme", samples=10)
    log_q_t = 30 * torch.randn(10, 5_000)
    log_q_t_given_s, w = model.weigh(log_q_t)
    assert w.min() >= 0 and w.max() <= 10 * (1 + 1e-5)
    mean = torch.stack([model.weigh(log_q_t.roll(k, 0))[1] for k in range(10)]).mean(
        0
    )  # each z_k as z_1
    torch.testing.assert_close(mean, torch.ones(5_000))
    torch.testing.assert_close(
        log_q_t_given_s, log_q_t.exp().mean(0).log().where(log_q_t.max(0)[0] < 80, log_q_t_given_s)
    )


@pytest.mark.parametrize("full_gradient", [False, True])
def test_meme_at_c_1_gives_the_decoder_of_t_no_gradient_unless_w_has_one(
    monkeypatch, full_gradient
):
    model = linear_model(
        "meme", samples=5, kl="sample", classifier_scale=1, full_gradient=full_gradient
    )
    xs, noise = pair(4), torch.randn(5, 4, L)
    gradient = 0
    for k in range(5):  # exact when averaged over which k plays z_1
        monkeypatch.setattr(torch, "randn", lambda *a, k=k, **b: noise.roll(k, 0))
        bound = model.bound(0, xs, model.encode(xs)).sum()
        gradient = gradient + torch.autograd.grad(bound, model.decoders[1].weight)[0]
    size = gradient.abs().max().item()
    assert size > 0.1 if full_gradient else size < 1e-4


def test_meme_closed_and_sampled_forms_agree_where_w_is_one():
    xs, values = pair(50_000), {}
    for kl in ("closed", "sample"):
        model = linear_model("meme", kl=kl, samples=2, classifier_scale=0)
        model.decoders[1].weight.data.zero_()  # q(t|z) = q(t): w = 1
        values[kl] = mean_and_error(model.bound(0, xs, model.encode(xs)))
    assert values["closed"][0] == pytest.approx(
        values["sample"][0], abs=sum(v[1] for v in values.values())
    )


def test_meme_with_a_mixture_prior_of_equal_encoders_is_the_two_modality_bound():
    two = linear_model("meme", sizes=(3, 2), kl="sample", classifier_scale=1)
    three = linear_model("meme", sizes=(3, 2, 2), kl="sample", classifier_scale=1)
    three.encoders[2].load_state_dict(three.encoders[1].state_dict())
    for k in range(2):
        three.encoders[k].load_state_dict(two.encoders[k].state_dict())
        three.decoders[k].load_state_dict(two.decoders[k].state_dict())
    three.modalities[2] = three.modalities[2]._replace(weight=0)  # x_2 tells nothing of z
    xs = pair(6)
    torch.manual_seed(1)
    a = two.bound(0, xs, two.encode(xs))
    torch.manual_seed(1)
    b = three.bound(0, [*xs, xs[1]], three.encode([*xs, xs[1]]))
    torch.testing.assert_close(b, a)


def test_meme_starts_its_pseudo_samples_at_observed_examples():
    model = linear_model("meme", pseudo_samples=4)
    examples = [torch.full((2, 3), 7.0), torch.full((9, 2), 5.0)]
    model.start_pseudo(examples)
    assert (model.pseudo[0][:2] == 7).all() and not (model.pseudo[0][2:] == 7).any()
    assert (model.pseudo[1] == 5).all()


def test_meme_starts_its_pseudo_samples_at_different_images_though_examples_share_them():
    photos = torch.arange(20.0)[:, None]
    split = data.Split([photos, photos], [torch.arange(200) // 10, torch.arange(200) % 20], None)
    first, second = data.observed(split, [((True, True), torch.arange(100, 200))], 5)
    assert first.flatten().tolist() == [10, 12, 14, 16, 19]
    assert len(second.unique()) == 5
    few, none = data.observed(split, [((True, False), torch.arange(15))], 5)
    assert few.flatten().tolist() == [0, 1] and len(none) == 0


def test_meme_trains_one_direction_alone():
    model, xs = linear_model("meme", direction="x0"), pair(4)
    torch.manual_seed(1)
    whole = model.objective(*xs)
    torch.manual_seed(1)
    torch.testing.assert_close(whole, model.bound(0, xs, model.encode(xs)).mean())
    model.refuse_untrained([(True, True), (True, False)])
    with pytest.raises(ValueError, match="x0"):
        model.refuse_untrained([(True, True), (False, True)])


# ------------------------------------------------------------------------- products and divergences


def grid_product(gaussians):
    z = torch.linspace(-20, 20, 400_001, dtype=torch.float64)
    log_p = sum(Normal(m, s).log_prob(z) for m, s in gaussians)
    p = (log_p - log_p.max()).exp()
    mean = (p * z).sum() / p.sum()
    return mean.item(), ((p * (z - mean) ** 2).sum() / p.sum()).sqrt().item()


def as_parameters(gaussians):
    return [(torch.tensor([[m]]), 2 * torch.tensor([[s]]).log()) for m, s in gaussians]


def test_products_are_those_of_a_grid_and_of_the_published_vectors():
    experts = [(1.0, 0.5), (-1.0, 0.1)]
    for product, extra, known in [
        (svae.product, [], (-0.923, 0.0981)),
        (vaevae.product, [], (-0.923, 0.0981)),
        (linear_model("mvae").product, [(0.0, 1.0)], (-0.914, 0.0976)),
        (
            linear_model("meme", (3, 2, 4), explicit="product").conditional_prior,
            [],
            (-0.923, 0.0981),
        ),
    ]:
        mu, logvar = product(as_parameters(experts))
        found = mu.item(), (0.5 * logvar).exp().item()
        assert found == pytest.approx(grid_product(experts + extra), abs=1e-4)
        assert found == pytest.approx(known, abs=6e-4)


def test_svae_products_with_the_prior_expert_have_it_once():
    plain, with_prior = linear_model("svae"), linear_model("svae", prior_expert=True)
    xs = pair(1)
    for subset in [(0,), (1,), (0, 1)]:
        (mu, logvar), (found_mu, found_logvar) = (
            plain.encode(xs)[subset][0],
            with_prior.encode(xs)[subset][0],
        )
        for k in range(L):
            expert = mu[0, k].item(), (0.5 * logvar[0, k]).exp().item()
            found = found_mu[0, k].item(), (0.5 * found_logvar[0, k]).exp().item()
            assert found == pytest.approx(grid_product([expert, (0.0, 1.0)]), abs=1e-4)


def test_products_of_flat_experts_stay_finite():
    for flatness in (80.0, math.inf):
        flat = svae.expert(torch.ones(1, L), torch.full((1, L), flatness))
        mu, logvar = svae.product([flat] * 2)
        assert mu.tolist() == [[1.0] * L] and logvar.exp().max() <= 5 * (1 + 1e-5)


def test_divergences_and_densities_are_those_of_torch():
    mu, logvar, prior_mu, prior_logvar, z = torch.randn(5, 4, L)
    q, p = (
        Independent(Normal(m, (0.5 * v).exp()), 1)
        for m, v in [(mu, logvar), (prior_mu, prior_logvar)]
    )
    for script in (meme, svae, vaevae):
        torch.testing.assert_close(
            script.kl_normal(mu, logvar, prior_mu, prior_logvar), kl_divergence(q, p)
        )
    unit = Independent(Normal(torch.zeros(4, L), torch.ones(4, L)), 1)
    torch.testing.assert_close(mvae.kl_to_prior(mu, logvar), kl_divergence(q, unit))
    torch.testing.assert_close(meme.log_normal(z, mu, logvar), q.log_prob(z))
    for posterior in ("normal", "laplace"):
        model = linear_model("mmvae", posterior=posterior)
        torch.testing.assert_close(
            model.log_density(z, mu, logvar), model.distribution(mu, logvar).log_prob(z)
        )


@pytest.mark.parametrize("objective", ["svae", "vaevae"])
def test_svae_with_flat_replacements_is_vaevae_a(objective, experts_as_encoded):
    a, b = (
        linear_model("svae", objective=objective),
        linear_model("vaevae", objective=objective, variant="a"),
    )
    for k in range(2):
        b.encoders[k].load_state_dict(a.encoders[k][k].state_dict())
        b.decoders[k].load_state_dict(a.decoders[k].state_dict())
        a.encoders[1 - k][k].logvar.data.fill_(math.inf)
    for xs in (pair(7), [pair(7)[0], None], [None, pair(7)[1]]):
        torch.manual_seed(1)
        one = a.objective(*xs)
        torch.manual_seed(1)
        torch.testing.assert_close(one, b.objective(*xs))


def test_vaevae_without_marginal_bounds_asks_for_streams_of_one_modality():
    for name in ("svae", "vaevae"):
        model = linear_model(name, objective="vaevae")
        model.refuse_untrained([(True, True), (True, False), (False, True)])
        with pytest.raises(ValueError, match="x1"):
            model.refuse_untrained([(True, True), (True, False)])
        linear_model(name, objective="svae").refuse_untrained([(True, True)])


def test_vaevae_asks_for_examples_of_every_subset_that_has_a_network():
    pairs = [(True, True, False), (True, False, True), (False, True, True)]
    modalities = nets.modalities("npz", shapes={"x0": (3,), "x1": (2,), "x2": (4,)})
    model = vaevae.VAEVAE(modalities, 2, objective="svae")
    model.refuse_untrained([(True, True, True)])
    with pytest.raises(ValueError, match="x0 and x1 and x2"):
        model.refuse_untrained(pairs)
    with pytest.raises(ValueError, match="x1 and x2"):
        model.refuse_untrained(pairs[:2])
    vaevae.VAEVAE(modalities, 2, objective="svae", variant="a").refuse_untrained(pairs)


def test_parameter_counts_grow_as_figure_2_counts_them():
    names = nets.modalities("mnist-split3")
    encoder = sum(w.numel() for w in names[0].encoder(64).trunk.parameters())
    trunks = {}
    for name, cls in [("svae", svae.SVAE), ("vaevae", vaevae.VAEVAE)]:
        model = cls(nets.modalities("mnist-split3"), 64)
        found = [m.trunk for m in model.modules() if isinstance(m, nets.Encoder)]
        found += [t for m in model.modules() if isinstance(m, nets.Joint) for t in m.trunks]
        trunks[name] = len(found)
        assert {sum(w.numel() for w in t.parameters()) for t in found} == {encoder}
    assert trunks == {"svae": 3**2, "vaevae": 3 * 2**2}


# --------------------------------------------------------------------------------------------- DReG


def encoder_gradients(objective, xs, draws):
    """The gradient of a nearly exact encoder, draw by draw. -> mean, standard deviation of the
    mean"""
    torch.manual_seed(1)
    model, found = linear_model("mmvae", objective=objective, samples=10), []
    orthogonal(model)
    for encode, decode in zip(model.encoders, model.decoders):
        exact(encode, decode, 1)
        encode.logvar.data += 0.3
    for _ in range(draws):
        grads = torch.autograd.grad(model.objective(*xs), list(model.encoders[0].parameters()))
        found.append(torch.cat([g.flatten() for g in grads]))
    found = torch.stack(found)
    return found.mean(0), found.std(0) / draws**0.5


def test_dreg_is_unbiased_and_less_noisy_for_one_modality_and_biased_for_two():
    for xs, biased in (([pair(64)[0], None], False), (pair(64), True)):
        (a, error_a), (b, error_b) = [encoder_gradients(o, xs, 400) for o in ("iwae", "dreg")]
        far = (a - b).abs() > 5 * (error_a**2 + error_b**2).sqrt()
        assert far.any() == biased
        if not biased:
            assert error_b.mean() < 0.8 * error_a.mean()


def test_dreg_has_the_value_of_iwae_and_its_decoder_gradient():
    for tight, xs in itertools.product((False, True), ([pair(9)[0], None], pair(9))):
        found = []
        for objective in ("iwae", "dreg"):
            model = linear_model("mmvae", objective=objective, tight=tight, samples=4)
            torch.manual_seed(1)
            value = model.objective(*xs)
            found.append(
                (value, *torch.autograd.grad(value, [model.decoders[0].weight, model.prior_logvar]))
            )
        for a, b in zip(*found):
            torch.testing.assert_close(a, b)


# --------------------------------------------------------------------------- patterns of modalities


def three_from_two(name, **options):
    two, three = linear_model(name, (3, 2), **options), linear_model(name, (3, 2, 4), **options)
    for k in range(2):
        three.encoders[k].load_state_dict(two.encoders[k].state_dict())
        three.decoders[k].load_state_dict(two.decoders[k].state_dict())
    return two, three


@pytest.mark.parametrize("name", ["mvae", "mmvae", "meme"])
def test_three_modalities_without_the_third_are_two(name):
    two, three = three_from_two(name)
    xs = pair(6)
    torch.manual_seed(1)
    a = two.objective(*xs)
    torch.manual_seed(1)
    torch.testing.assert_close(a, three.objective(*xs, None))


def test_eq_29_is_the_paired_loss_of_two_when_the_third_adds_nothing():
    two, three = three_from_two("vaevae", variant="a")
    xs = [*pair(6), torch.randn(6, 4)]
    q = three.encode(xs)
    q[0, 1, 2], q[0, 2], q[1, 2] = q[0, 1], q[0,], q[1,]
    torch.manual_seed(1)
    found = three.bound((0, 1, 2), xs, q)
    torch.manual_seed(1)
    mu, logvar = q[0, 1][0]
    z = mu + torch.exp(0.5 * logvar) * torch.randn_like(mu)
    torch.manual_seed(1)
    expected = two.bound((0, 1), xs[:2], two.encode(xs[:2])) + three.log_p(2, z, xs[2])
    torch.testing.assert_close(found, expected)


def test_eq_30_draws_a_pair_to_all_single_posteriors_and_the_prior():
    model = linear_model("vaevae", (3, 2, 4), variant="a")
    xs = [*pair(6), torch.randn(6, 4)]
    q = model.encode(xs)
    (mu, logvar), zero = q[0, 1][0], torch.zeros(L)
    torch.manual_seed(1)
    found = model.bound((0, 1), xs, q)
    torch.manual_seed(1)
    z = mu + torch.exp(0.5 * logvar) * torch.randn_like(mu)
    kls = [svae.kl_normal(mu, logvar, *q[k,][0]) for k in range(3)] + [
        svae.kl_normal(mu, logvar, zero, zero)
    ]
    torch.testing.assert_close(
        found, model.log_p(0, z, xs[0]) + model.log_p(1, z, xs[1]) - sum(kls)
    )


def test_svae_has_two_products_for_a_pair_of_three():
    model = linear_model("svae", (3, 2, 4))
    xs = [*pair(1), torch.randn(1, 4)]
    q = model.encode(xs)
    assert {subset: len(found) for subset, found in q.items()} == {
        (0,): 1, (1,): 1, (2,): 1, (0, 1): 2, (0, 2): 2, (1, 2): 2, (0, 1, 2): 1,
    }  # fmt: skip
    experts = [svae.expert(*model.encoders[i][j](xs[j])) for i, j in [(0, 0), (1, 1), (2, 1)]]
    torch.testing.assert_close(q[0, 1][1], svae.product(experts))  # Eq. (36)


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("sizes", [(3, 2), (3, 2, 4)])
def test_objectives_do_not_depend_on_the_order_of_modalities(name, sizes, monkeypatch):
    options = dict(subsets=0) if name == "mvae" else {}
    order = [2, 0, 1][-len(sizes) :] if len(sizes) == 3 else [1, 0]
    a, b = (
        linear_model(name, sizes, **options),
        linear_model(name, [sizes[k] for k in order], **options),
    )
    for new, old in enumerate(order):
        b.decoders[new].load_state_dict(a.decoders[old].state_dict())
        if name == "svae":
            for i, j in enumerate(order):
                b.encoders[i][new].load_state_dict(a.encoders[j][old].state_dict())
        else:
            b.encoders[new].load_state_dict(a.encoders[old].state_dict())
        if name == "meme":
            b.pseudo[new].data = a.pseudo[old].data
    if name == "vaevae":
        a.variant = b.variant = "a"
    monkeypatch.setattr(
        torch, "randn", lambda *shape, **_: torch.zeros(shape[0] if len(shape) == 1 else shape)
    )
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)
    xs = [torch.linspace(-1, 1, 5 * size).view(5, size) for size in sizes]
    for hidden in [(), *[(k,) for k in range(len(sizes))]]:
        seen = [None if m in hidden else x for m, x in enumerate(xs)]
        torch.testing.assert_close(a.objective(*seen), b.objective(*[seen[k] for k in order]))


@pytest.mark.parametrize("name", CLASSES)
def test_a_stream_of_one_modality_moves_exactly_the_parameters_it_should(name):
    model = CLASSES[name](nets.modalities("glyphs"), 4)
    model.objective(images("glyphs")[0], None).backward()
    moved = {
        key.rsplit(".", 1)[0] if "pseudo" not in key else key
        for key, w in model.named_parameters()
        if w.grad is not None and w.grad.abs().max() > 0
    }
    tops = {
        ".".join(key.split(".")[: 3 if name == "svae" and "encoders" in key else 2])
        for key in moved
    }
    expected = {
        "meme": {"encoders.0", "encoders.1", "decoders.0", "pseudo.1"},  # section 3.3
        "svae": {"encoders.0.0", "encoders.1.0", "decoders.0"},
        "vaevae": {"encoders.0", "decoders.0"},
        "mmvae": {"encoders.0", "decoders.0", "prior_logvar"},
        "mvae": {"encoders.0", "decoders.0"},
    }
    if name == "mmvae" and model.prior_logvar.grad is not None:
        tops.add("prior_logvar")
    assert {t for t in tops if t} == expected[name]


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("dataset", ["glyphs", "mnist-split", "mnist-split3"])
def test_every_pattern_trains_and_every_method_has_its_shapes(name, dataset):
    modalities = nets.modalities(dataset)
    model = CLASSES[name](modalities, 4)
    xs = images(dataset, 3)
    for size in range(1, len(xs) + 1):
        for seen in itertools.combinations(range(len(xs)), size):
            part = [x if m in seen else None for m, x in enumerate(xs)]
            loss = model([(0.5, part), (1.0, part)])
            assert loss.shape == (2,) and loss.isfinite().all()
            posterior = model.posterior(*part)
            assert posterior.batch_shape == (3,) and posterior.event_shape == (4,)
            assert posterior.sample().isfinite().all()
            assert model.log_likelihood(*part, samples=3).shape == (3,)
    z = model.prior().sample((5, 2))
    assert [tuple(x.shape) for x in model.decode(z)] == [(5, 2, *m.shape) for m in modalities]
    assert all(0 <= x.min() and x.max() <= 1 for x in model.decode(z))


def test_encoders_and_decoders_run_no_more_than_they_must():
    least = {
        "meme": 4,
        "mmvae": 6,
        "svae": 2,
        "vaevae": 1,
        "mvae": 2,
    }  # decodings per example at K = 3
    for name, cls in CLASSES.items():
        model = cls(
            nets.modalities("glyphs"), 4, **({"samples": 3} if name in ("meme", "mmvae") else {})
        )
        rows = {}
        for key, module in model.named_modules():
            if isinstance(module, (nets.Encoder, nets.Joint, nets.Decoder)):
                module.register_forward_pre_hook(
                    lambda m, args, key=key: rows.update(
                        {
                            key: rows.get(key, 0)
                            + (args[0][..., 0].numel() if isinstance(m, nets.Decoder) else 5)
                        }
                    )
                )
        model.objective(*images("glyphs", 5))
        assert max(n for key, n in rows.items() if "decoders" not in key) == 5
        assert max(n for key, n in rows.items() if "decoders" in key) == 5 * least[name]


# ------------------------------------------------------------------------- networks and likelihoods


def test_likelihoods_are_those_of_torch():
    z, x = torch.randn(3, 4, 5), torch.rand(4, 5)
    for kind, density in {
        "normal": Normal(z, 0.3),
        "laplace": torch.distributions.Laplace(z, 0.3),
        "bernoulli": torch.distributions.Bernoulli(logits=z),
    }.items():
        target = x.round() if kind == "bernoulli" else x
        found = nets.log_prob(nets.Modality("x", (5,), None, None, kind, scale=0.3), z, target)
        torch.testing.assert_close(found, density.log_prob(target).sum(-1))


def test_padding_is_not_scored_and_unknown_words_are():
    modality = nets.modalities("cub", vocabulary=7)[1]
    logits, x = torch.randn(2, 1, 32, 7), torch.full((1, 32), nets.PAD)
    assert (nets.log_prob(modality, logits, x) == 0).all()
    x[0, 3] = 0  # <exc>
    torch.testing.assert_close(
        nets.log_prob(modality, logits, x), logits.log_softmax(-1)[:, :, 3, 0]
    )


def test_scales_are_floored():
    mu, logvar = nets.gaussian(torch.tensor([[0.0, -200.0], [0.0, 3.0]]))
    assert (0.5 * logvar).exp()[0] >= 0.999e-3 and logvar[1] == pytest.approx(3.0, abs=1e-4)


def test_batchnorm_takes_one_example_and_pseudo_samples_by_its_running_statistics():
    encode = nets.modalities("spectra", width=0.001)[0].encoder(3).train()
    x = torch.rand(4, 11000)
    before = {k: v.clone() for k, v in encode.state_dict().items() if "running" in k}
    encode(x, running=True), encode(x[:1])
    assert all(torch.equal(v, encode.state_dict()[k]) for k, v in before.items())
    encode(x)
    assert not all(torch.equal(v, encode.state_dict()[k]) for k, v in before.items())


def test_a_later_batch_does_not_change_the_gradient_of_pseudo_samples():
    encode, gradients = nets.modalities("spectra", width=0.001)[0].encoder(3).train(), []
    u, x = torch.rand(4, 11000, requires_grad=True), torch.rand(6, 11000)
    state = {k: v.clone() for k, v in encode.state_dict().items()}
    for later in (False, True):
        encode.load_state_dict(state)
        mu, _ = encode(u, running=True)
        if later:
            encode(x)  # moves the running statistics before backward
        gradients.append(torch.autograd.grad(mu.sum(), u)[0])
    torch.testing.assert_close(*gradients)


def test_likelihoods_and_weights_can_be_chosen_and_are_checked():
    first, second = nets.modalities(
        "glyphs", likelihoods=["laplace", "bernoulli"], weights=["2", "1"]
    )
    assert (first.likelihood, first.weight) == ("laplace", 2)
    location = first.decoder(3)(100 * torch.randn(2, 3))
    assert 0 <= location.min() and location.max() <= 1
    for options in (
        dict(likelihoods=["laplace"]),
        dict(likelihoods=["x", "x"]),
        dict(weights=["-1", "1"]),
        dict(weights=["a", "1"]),
    ):
        with pytest.raises(ValueError):
            nets.modalities("glyphs", **options)


# --------------------------------------------------------------------------------------------- data


@pytest.mark.parametrize(
    "unpaired, extra",
    [
        ("split", [250, 250]),
        ("b", [500]),
        ("all", [1000, 1000]),
        ("rest", [500, 500]),
        ("none", []),
    ],
)
def test_pairing_counts(unpaired, extra):
    streams = data.pairing(1000, ("a", "b"), 0.5, unpaired, seed=1)
    assert [len(index) for _, index in streams] == [500, *extra]
    assert streams[0][0] == (True, True) and all(sum(mask) == 1 for mask, _ in streams[1:])
    again = data.pairing(1000, ("a", "b"), 0.5, unpaired, seed=1)
    other = data.pairing(1000, ("a", "b"), 0.5, unpaired, seed=2)
    assert all(torch.equal(a[1], b[1]) for a, b in zip(streams, again))
    assert not torch.equal(streams[0][1], other[0][1])
    rest = torch.cat([index for _, index in streams[1:]]) if extra else torch.empty(0)
    overlap = torch.isin(rest, streams[0][1]).any()
    assert overlap == (unpaired == "all")


def test_a_mask_of_the_data_makes_its_patterns_the_streams():
    mask = torch.tensor([[1, 1], [0, 1], [1, 1], [1, 0]]).bool()
    streams = {shown: index.tolist() for shown, index in data.pairing(4, ("a", "b"), mask=mask)}
    assert streams == {(True, True): [0, 2], (False, True): [1], (True, False): [3]}
    with pytest.raises(ValueError, match="example 1"):
        data.pairing(2, ("a", "b"), mask=torch.tensor([[1, 0], [0, 0]]).bool())


def tiny(n=10):
    return data.Split([torch.arange(n).float()[:, None], 100 + torch.arange(n).float()[:, None]])


@pytest.mark.parametrize("world", [1, 3])
def test_natural_sampling_is_unbiased(world):
    split, streams = tiny(10), data.pairing(10, ("a", "b"), 0.3, "a", seed=0)
    value = {(True, True): 1.0, (True, False): 10.0}
    exactly = (
        sum(value[shown] * split.bases[0][index].sum() for shown, index in streams).item() / 10
    )
    steps = []
    for seed in range(400):
        for rank in range(world):
            for step in data.batches(
                split, streams, 4, "natural", torch.Generator().manual_seed(seed), rank, world
            ):
                steps.append(
                    sum(
                        w * value[tuple(x is not None for x in xs)] * xs[0].mean() for w, xs in step
                    )
                )
    assert torch.stack(steps).sum() / (400 * world * 3) == pytest.approx(
        exactly, rel=0.02
    )  # 3 steps an epoch


def test_ranks_share_a_step_out_without_loss():
    split, streams = tiny(10), data.pairing(10, ("a", "b"), 0.3, "split", seed=0)
    for sampling in ("natural", "balanced"):
        one = list(data.batches(split, streams, 4, sampling, torch.Generator().manual_seed(0)))
        many = [
            list(data.batches(split, streams, 4, sampling, torch.Generator().manual_seed(0), r, 3))
            for r in range(3)
        ]
        for step, parts in zip(one, zip(*many), strict=True):
            assert all(parts)  # no rank goes without
            for weight, xs in step:
                mine = [
                    (w, ys)
                    for part in parts
                    for w, ys in part
                    if [y is None for y in ys] == [x is None for x in xs]
                ]
                m = 0 if xs[0] is not None else 1
                assert torch.cat([ys[m] for _, ys in mine]).sort(0)[0].equal(xs[m].sort(0)[0])
                mean = sum(w * ys[m].mean() for w, ys in mine) / 3
                assert mean == pytest.approx(weight * xs[m].mean().item(), rel=1e-5)


def test_a_rank_without_an_example_gets_one_of_no_weight():
    for n, size, sampling in ((10, 8, "balanced"), (9, 4, "natural")):
        split = tiny(n)
        streams = data.pairing(n, ("a", "b"), 1 / 3 if n == 9 else 1.0, "split", seed=0)
        ranks = [
            list(data.batches(split, streams, size, sampling, rank=r, world=4)) for r in range(4)
        ]
        for parts in zip(*ranks, strict=True):
            assert all(parts)
            shares = sum(w for part in parts for w, _ in part) / 4
            assert shares == pytest.approx(len(streams) if sampling == "balanced" else 1)


def test_balanced_sampling_is_one_pass_over_the_largest_stream():
    split, streams = tiny(10), data.pairing(10, ("a", "b"), 0.2, "all", seed=0)
    steps = list(data.batches(split, streams, 4, "balanced", torch.Generator().manual_seed(0)))
    assert [[len(next(x for x in xs if x is not None)) for _, xs in step] for step in steps] == [
        [2, 4, 4],
        [2, 4, 4],
        [2, 2, 2],
    ]
    assert all(weight == 1 for step in steps for weight, _ in step)
    seen = torch.cat([step[1][1][0] for step in steps])
    assert seen.flatten().sort()[0].tolist() == list(range(10))


def test_what_a_mask_hides_is_never_read():
    hidden = data.Split([torch.zeros(4, 1), torch.full((4, 1), math.nan)])
    for _, xs in (
        entry
        for step in data.batches(hidden, [((True, False), torch.arange(4))], 2)
        for entry in step
    ):
        assert xs[1] is None and xs[0].isfinite().all()


def test_glyphs_are_the_same_digit_twice_and_the_same_each_time():
    a, b = data.load("glyphs", limit=50), data.glyphs(10_000, seed=0)
    assert len(a.train) == 50 and len(a.test) == 2000
    for x, y, shape in zip(
        a.train[torch.arange(50)], b[torch.arange(50)], [(1, 28, 28), (3, 32, 32)]
    ):
        assert x.shape == (50, *shape) and torch.equal(x, y) and 0 <= x.min() and x.max() <= 1
    assert set(a.train.labels.tolist()) == set(range(10))


def write_idx(folder, stem, images, labels):
    folder.mkdir(parents=True, exist_ok=True)
    n, h, w = images.shape
    head = np.array([0x803, n, h, w], ">i4").tobytes()
    (folder / f"{stem}-images-idx3-ubyte").write_bytes(head + images.tobytes())
    (folder / f"{stem}-labels-idx1-ubyte").write_bytes(
        np.array([0x801, n], ">i4").tobytes() + labels.tobytes()
    )


@pytest.fixture
def small_root(tmp_path):
    """A data folder with 60 + 20 digits of noise, as MNIST and SVHN are laid out."""
    rng = np.random.default_rng(0)
    for stem, n in (("train", 60), ("t10k", 20)):
        labels = np.arange(n, dtype=np.uint8) % 10
        write_idx(
            tmp_path / "MNIST" / "raw", stem, rng.integers(0, 256, (n, 28, 28), np.uint8), labels
        )
    arrays = {}
    for part, n in (("train", 45), ("test", 30)):
        arrays |= {
            f"{part}_x": rng.integers(0, 256, (n, 3, 32, 32), np.uint8),
            f"{part}_y": np.arange(n) % 10,
        }
    np.savez(tmp_path / "svhn.npz", **arrays)
    return tmp_path


def test_pairs_of_mnist_and_svhn_show_the_same_digit(small_root):
    dataset = data.load("mnist-svhn", small_root)
    assert (len(dataset.train), len(dataset.test)) == (45, 20)  # per class the fewer of both
    digits = np.arange(60) % 10, np.arange(45) % 10
    for labels, rows in zip(digits, dataset.train.rows):
        assert (labels[rows] == dataset.train.labels.numpy()).all()
        assert len(rows.unique()) == 45
    assert len(data.load_mnist_svhn(small_root, repeats=3).train) == 135


def test_bands_put_together_are_the_image(small_root):
    images = data.mnist(small_root, True)[0]
    for name, height in (("mnist-split", 28), ("mnist-split3", 27)):
        xs = data.load(name, small_root).train[torch.arange(60)]
        torch.testing.assert_close(torch.cat(xs, 2), images[:, :, :height].float() / 255)


def test_files_that_are_not_what_they_should_be_are_refused_in_a_sentence(
    small_root, tmp_path, monkeypatch
):
    raw = small_root / "MNIST" / "raw" / "train-images-idx3-ubyte"
    raw.write_bytes(raw.read_bytes()[:-100])
    with pytest.raises(ValueError, match="train-images-idx3-ubyte is damaged"):
        data.load("mnist-split", small_root)

    def offline(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr("torchvision.datasets.MNIST.download", offline)
    monkeypatch.setattr("torchvision.datasets.SVHN.download", offline)
    with pytest.raises(ValueError, match="could not be downloaded"):
        data.load("mnist-split", tmp_path / "none")
    with pytest.raises(ValueError, match="could not be downloaded"):
        data.load("mnist-svhn", tmp_path / "none")
    assert not (tmp_path / "none" / "MNIST").exists()
    with pytest.raises(ValueError, match="there is no data set"):
        data.load("nope")
    good = dict(
        train_0=np.zeros((4, 3), np.float32),
        train_1=np.ones((4, 2)),
        test_0=np.zeros((2, 3)),
        test_1=np.ones((2, 2)),
    )
    for change, match in [
        ({"train_1": None}, "train_1"), ({"extra": np.zeros(1)}, "unknown array 'extra'"),
        ({"train_1": np.ones((5, 2))}, "the 4 examples"), ({"test_1": np.ones((2, 9))}, "does not fit"),
        ({"train_0": np.full((4, 3), np.nan)}, "not finite"), ({"train_mask": np.ones((4, 3), bool)}, "train_mask"),
        ({"train_mask": np.ones((2, 4), bool)}, "train_mask .* the 4 examples"),
        ({"train_labels": np.ones(3, int)}, "train_labels"), ({"train_0": np.array([["a"]] * 4)}, "numbers"),
        ({"train_0": np.array([[None]] * 4)}, "plain arrays"),
    ]:  # fmt: skip
        np.savez(
            tmp_path / "bad.npz", **{k: v for k, v in (good | change).items() if v is not None}
        )
        with pytest.raises(ValueError, match=match):
            data.load(str(tmp_path / "bad.npz"))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "bad.npz").read_bytes()[:200])
    with pytest.raises(ValueError, match="damaged"):
        data.load(str(tmp_path / "cut.npz"))
    with pytest.raises(ValueError, match="no file"):
        data.load(str(tmp_path / "absent.npz"))


# ---------------------------------------------------------------------------------------------- CUB

CAPTIONS = ["this bird has a Red belly, and red-tipped wings.", "the bird's beak is small."]
SPECIES = {"train": ("001.Albatross", "002.Ani"), "test": ("003.Auklet",)}


def photo(path, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 10, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((100, 80)).save(path)


def shi(root):
    """Three species with two photos each, Shi et al.'s layout."""
    cub = root / "cub"
    for split, species in SPECIES.items():
        for name in species:
            for k in range(2):
                photo(cub / split / name / f"{k}.jpg", 10 * int(name[:3]) + k)
    (cub / "text_trainvalclasses.txt").write_text("\n".join(CAPTIONS * 20) + "\n")
    (cub / "text_testclasses.txt").write_text("\n".join(CAPTIONS * 10) + "\n")
    return cub


def originals(root):
    """The same in the layout of the original archives."""
    cub = root / "cub"
    for species in SPECIES.values():
        for name in species:
            for k in range(2):
                photo(cub / "CUB_200_2011" / "images" / name / f"{k}.jpg", 10 * int(name[:3]) + k)
                text = cub / "text_c10" / name / f"{k}.txt"
                text.parent.mkdir(parents=True, exist_ok=True)
                text.write_text("\n".join(f"{name} {k} {line}" for line in CAPTIONS * 5) + "\n")
    (cub / "trainclasses.txt").write_text("001.Albatross\n")
    (cub / "valclasses.txt").write_text("002.Ani\r\n")
    (cub / "testclasses.txt").write_text("003.Auklet\n")
    return cub


class Pooled(torch.nn.Module):
    """In the place of ResNet-101: 2,048 numbers of a photo, with a BatchNorm."""

    def __init__(self):
        super().__init__()
        self.norm = torch.nn.BatchNorm2d(3)
        self.seen = 0

    def forward(self, x):
        self.seen += len(x)
        h = torch.nn.functional.adaptive_avg_pool2d(self.norm(x), 26).flatten(1)
        return torch.cat([h, h[:, :20]], 1)


@pytest.fixture
def small_net(monkeypatch):
    nets = []

    def resnet(weights):
        nets.append(Pooled().eval())
        return nets[-1]

    monkeypatch.setattr(data, "resnet", resnet)
    return nets


def test_captions_become_32_tokens_of_the_words_seen_more_than_three_times():
    assert data.tokenize("The bird's red-eyed, 3 inches!") == [
        *("the", "bird", "'s", "red-eyed", ",", "3", "inches", "!")
    ]
    captions = [["red", "bird"]] * 3 + [["bird", "owl"]] * 4
    words = data.vocabulary(captions)
    assert words == ["<exc>", "<pad>", "<eos>", "bird", "owl"]  # red: three times only
    x = data.encode_captions([["red", "bird"], ["owl"] * 40], words)
    assert x.dtype == torch.int64 and x.shape == (2, 32)
    assert x[0].tolist() == [0, 3, 2] + [1] * 29
    assert x[1].tolist() == [4] * 31 + [2]
    assert evaluation.caption_text(x[0], words) == "<exc> bird"


@pytest.mark.parametrize("layout", [shi, originals])
def test_cub_pairs_each_photo_with_its_ten_captions_in_both_layouts(tmp_path, small_net, layout):
    cub = layout(tmp_path)
    sizes = data.prepare_cub(tmp_path, "none")
    assert sizes["photos"] == {"train": 4, "test": 2}
    assert sizes["captions"] == {"train": 40, "test": 20}
    dataset = data.load_cub(tmp_path)
    assert sizes["vocabulary"] == len(dataset.words) == dataset.spec["vocabulary"]
    assert "random" in dataset.note
    image, caption = dataset.train[torch.arange(40)]
    assert image.shape == (40, 2048) and caption.shape == (40, 32)
    assert torch.equal(image[10:20], dataset.train.bases[0][1].expand(10, -1))
    if layout is originals:  # its captions name the photo they belong to
        text = evaluation.caption_text(caption[10], dataset.words)
        assert text.startswith("001 . albatross 1 this bird")
    names = [str(p.relative_to(cub)) for p in data.cub_photos(tmp_path)["train"]]
    assert names == sorted(names) and len(names) == 4
    assert not list(cub.glob("*partial*")) and not list(cub.glob(".*"))


def test_an_unreadable_photo_is_skipped_with_its_captions(tmp_path, small_net):
    cub = shi(tmp_path)
    bad = cub / "train" / "001.Albatross" / "1.jpg"
    bad.write_bytes(bad.read_bytes()[:300])
    lines = [f"caption {i // 10}" for i in range(40)]
    (cub / "text_trainvalclasses.txt").write_text("\n".join(lines))
    sizes = data.prepare_cub(tmp_path, "none")
    assert sizes["photos"]["train"] == 3 and sizes["captions"]["train"] == 30
    assert sizes["unreadable"] == ["train/001.Albatross/1.jpg"]
    dataset = data.load_cub(tmp_path)
    assert "unreadable photos left out: 1" in dataset.note
    texts = {evaluation.caption_text(c, dataset.words) for c in dataset.train.bases[1]}
    assert texts == {"caption 0", "caption 2", "caption 3"}


def test_an_interrupted_extraction_goes_on_where_it_was(tmp_path, small_net, monkeypatch):
    cub = shi(tmp_path)
    files = data.list_photos(cub, "train") + data.list_photos(cub, "test")
    options = dict(weights="IMAGENET1K_V1", normalise=True, device="cpu", batch_size=2, every=-1)
    whole = data.extract(cub, cub / "features.npz", files, 4, Pooled().eval(), **options)
    (cub / "features.partial.npz").unlink()
    read, count = data.read_photo, []

    def interrupted(path, transform):
        count.append(path)
        if len(count) > 4:
            raise KeyboardInterrupt
        return read(path, transform)

    monkeypatch.setattr(data, "read_photo", interrupted)
    with pytest.raises(KeyboardInterrupt):
        data.extract(cub, cub / "features.npz", files, 4, Pooled().eval(), **options)
    monkeypatch.setattr(data, "read_photo", read)
    net = Pooled().eval()
    again = data.extract(cub, cub / "features.npz", files, 4, net, **options)
    assert net.seen == 2  # of six photos
    assert np.array_equal(whole["x"], again["x"])


def test_features_are_cut_before_the_last_layer_and_batchnorm_statistics_frozen(tmp_path):
    cub = shi(tmp_path)
    files = [f"train/001.Albatross/{k}.jpg" for k in range(2)] + ["test/003.Auklet/0.jpg"]
    torch.manual_seed(1)
    net = data.resnet("none")
    torch.manual_seed(2)
    assert torch.equal(net.conv1.weight, data.resnet("none").conv1.weight)
    x = data.extract(cub, cub / "features.npz", files, 2, net, "none", True, "cpu")["x"]
    assert x.shape == (3, 2048) and not net.training and x.max() < 100
    assert all(m.num_batches_tracked == 1 for m in net.modules() if hasattr(m, "running_mean"))


def without(name):
    def change(cub):
        os.remove(cub / name)

    return change


def nine_lines(cub):
    path = cub / "text_c10" / "002.Ani" / "1.txt"
    path.write_text("a bird\n" * 9)


def cut_file(cub):
    path = cub / "text_trainvalclasses.txt"
    path.write_text("a bird\n" * 39)


def other_cache(cub):
    data.prepare_cub(cub.parent, "none")


def damaged_cache(cub):
    (cub / "features.npz").write_bytes(b"PK\x03\x04 and no more")


def one_more_photo(cub):
    data.prepare_cub(cub.parent, "IMAGENET1K_V1")
    photo(cub / "test" / "003.Auklet" / "2.jpg", 0)
    (cub / "text_testclasses.txt").write_text("a bird\n" * 30)


def all_unreadable(cub):
    for path in (cub / "test").rglob("*.jpg"):
        path.write_bytes(b"not a photo")


def in_both(cub):
    (cub / "testclasses.txt").write_text("002.Ani\n003.Auklet\n")


def no_photos_of(cub):
    (cub / "testclasses.txt").write_text("003.Auklet\n004.Crow\n")


def test_features_of_a_read_only_folder_are_kept_below_data(tmp_path, small_net, monkeypatch):
    cub = shi(tmp_path)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    cub.chmod(0o555)
    data.prepare_cub(tmp_path, "none")
    assert len(data.load("cub", tmp_path).train) == 40
    cub.chmod(0o755)
    assert [p.name for p in (tmp_path / "here" / "data" / "cub").iterdir()] == ["features.npz"]
    assert not list(cub.glob("*.npz"))


@pytest.mark.parametrize(
    "layout, spoil, words",
    [
        (shi, without("text_testclasses.txt"), ["text_testclasses.txt", "missing"]),
        (shi, cut_file, ["text_trainvalclasses.txt", "39 captions", "4 photos", "40 lines"]),
        (shi, other_cache, ["features.npz", "weights none", "IMAGENET1K_V1"]),
        (shi, damaged_cache, ["features.npz", "damaged"]),
        (shi, one_more_photo, ["other photos", "6", "7"]),
        (shi, all_unreadable, ["none of the 2 test photos"]),
        (originals, nine_lines, ["1.txt", "9 captions", "ten"]),
        (originals, without("text_c10/002.Ani/1.txt"), ["1.txt", "missing"]),
        (originals, without("testclasses.txt"), ["testclasses.txt"]),
        (originals, without("trainclasses.txt"), ["trainvalclasses.txt"]),
        (originals, in_both, ["002.Ani", "training and in the test"]),
        (originals, no_photos_of, ["004.Crow"]),
    ],
)
def test_bad_cub_folders_get_one_sentence(tmp_path, small_net, layout, spoil, words):
    cub = layout(tmp_path)
    spoil(cub)
    before = sorted(tmp_path.rglob("*"))
    try:
        with pytest.raises(ValueError) as error:
            data.prepare_cub(tmp_path)
    finally:
        cub.chmod(0o755)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_missing_captions_say_where_a_person_gets_them(tmp_path):
    (tmp_path / "cub").mkdir()
    for call in (data.load_cub, data.prepare_cub):
        with pytest.raises(
            ValueError, match="0B0ywwgffWnLLZW9uVHNjb2JmNlE.*0-8y2UVmBHAlG26HafWYNoFQ"
        ):
            call(tmp_path)
    assert not list((tmp_path / "cub").iterdir())


def test_weights_that_cannot_be_downloaded_get_one_sentence(tmp_path, monkeypatch):
    shi(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    for name in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with pytest.raises(ValueError, match="--weights none") as error:
        data.prepare_cub(tmp_path)
    assert str(tmp_path / "home" / "hub" / "checkpoints") in str(error.value)
    with pytest.raises(ValueError, match="no_such"):
        data.prepare_cub(tmp_path, "no_such")
    assert not (tmp_path / "cub" / "features.npz").exists()


def archive(path, folder, extra=()):
    with tarfile.open(path, "w:gz") as tar:
        if folder is not None:
            tar.add(folder, folder.name)
        for member, content in extra:
            tar.addfile(member, None if content is None else io.BytesIO(content))


def test_archives_are_downloaded_checked_and_unpacked(tmp_path, small_net, monkeypatch):
    source = originals(tmp_path / "source")
    (source / "cvpr2016_cub").mkdir()
    for path in [source / "text_c10", *source.glob("*classes.txt")]:
        path.rename(source / "cvpr2016_cub" / path.name)
    cub = tmp_path / "cub"
    cub.mkdir()
    archive(cub / "cvpr2016_cub.tar.gz", source / "cvpr2016_cub")
    archive(tmp_path / "photos.tgz", source / "CUB_200_2011")
    monkeypatch.setattr(data, "CUB_PHOTOS", (tmp_path / "photos.tgz").as_uri())
    with pytest.raises(ValueError, match="MD5"):
        data.prepare_cub(tmp_path, "none")
    assert not list(cub.glob("CUB*"))
    monkeypatch.setattr(data, "CUB_MD5", data.md5(tmp_path / "photos.tgz"))
    assert data.prepare_cub(tmp_path, "none")["photos"] == {"train": 4, "test": 2}
    assert not [p for p in cub.iterdir() if "part" in p.name or p.name.count(".") > 2]
    shutil.rmtree(cub / "cvpr2016_cub")
    assert len(data.load_cub(tmp_path).train) == 40  # unpacked again
    archive(cub / "cvpr2016_cub.tar.gz", None, [(tarfile.TarInfo("nothing.txt"), b"")])
    shutil.rmtree(cub / "cvpr2016_cub")
    with pytest.raises(ValueError, match="has no text_c10/"):
        data.load_cub(tmp_path)
    assert not (cub / "cvpr2016_cub").exists()


def test_archives_cannot_leave_their_folder_or_make_links(tmp_path):
    def member(name, kind=tarfile.REGTYPE, target="", size=0):
        info = tarfile.TarInfo(name)
        info.type, info.linkname, info.size = kind, target, size
        return info

    for k, name in enumerate(("../out.txt", "a/../../out.txt", str(tmp_path / "out.txt"))):
        archive(tmp_path / f"{k}.tgz", None, [(member(name, size=2), b"hi")])
        with pytest.raises(ValueError, match="outside"):
            data.unpack(tmp_path / f"{k}.tgz", tmp_path / "cub" / "x", ".", ".txt")
    link = member("away", tarfile.SYMTYPE, str(tmp_path))
    through = member("away/out.txt", size=2)
    archive(tmp_path / "link.tgz", None, [(link, None), (through, b"hi")])
    data.unpack(tmp_path / "link.tgz", tmp_path / "cub" / "y", ".", ".txt")
    assert (tmp_path / "cub" / "y" / "away" / "out.txt").read_text() == "hi"
    assert not (tmp_path / "out.txt").exists()
    assert not any(p.is_symlink() for p in (tmp_path / "cub").rglob("*"))
    (tmp_path / "cut.tgz").write_bytes((tmp_path / "link.tgz").read_bytes()[:60])
    for bad in ("cut.tgz", "none.tgz"):
        with pytest.raises(ValueError, match="cannot be unpacked"):
            data.unpack(tmp_path / bad, tmp_path / "cub" / "z", ".", ".txt")
    assert sorted(p.name for p in (tmp_path / "cub").iterdir()) == ["y"]


# word vectors and correlations

COLOURS, PARTS = ("red", "blue", "grey", "pink"), ("beak", "wing", "tail", "eye")


def sentences(n, seed=0):
    """Two kinds of bird: each has its own colours and parts, in sentences of one form."""
    generator, captions = np.random.default_rng(seed), []
    for _ in range(n):
        k = 2 * generator.integers(2)
        colour, part = (generator.choice(names[k : k + 2]) for names in (COLOURS, PARTS))
        captions.append(["a", "bird", "with", str(colour), str(part)])
    return captions


def test_word_vectors_of_words_in_the_same_company_are_alike():
    captions = sentences(2000)
    words = data.vocabulary(captions)
    tokens = data.encode_captions(captions, words)
    vectors = evaluation.word_vectors(tokens, words, dim=20)
    unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)
    alike = lambda a, b: unit[words.index(a)] @ unit[words.index(b)]  # noqa: E731
    assert alike("red", "blue") > alike("red", "grey") and alike("tail", "eye") > alike(
        "tail", "beak"
    )
    assert not vectors[:3].any()
    assert np.array_equal(vectors, evaluation.word_vectors(tokens, words, dim=20))


def test_units_are_the_word_and_its_ngrams():
    units, transposed = evaluation.character_ngrams(["<exc>", "<pad>", "<eos>", "beak", "a"])
    dense = (
        units.to_dense()
    )  # <beak>: 4 of 3 letters, 3 of 4, 2 of 5, and itself; <a> is its only one
    assert dense.sum(1).tolist() == [0, 0, 0, 10, 1] and dense.max() == 1
    assert torch.equal(transposed.to_dense(), dense.t())


def test_skipgram_counts_are_those_of_the_window():
    x = torch.tensor([[3, 4, 5, 6, 7, 2, 1, 1]])
    pairs, frequency = evaluation.skipgram_counts(x, 8, window=3, sample=1e9)
    assert torch.allclose(pairs[3], torch.tensor([0, 0, 0, 0, 1, 2 / 3, 1 / 3, 0]).double())
    assert torch.equal(pairs, pairs.t()) and frequency.tolist() == [0, 0, 0, 1, 1, 1, 1, 1]


def test_word_vectors_are_kept_and_a_damaged_file_is_replaced(tmp_path, monkeypatch):
    captions = sentences(50)
    words = data.vocabulary(captions)
    tokens, calls = data.encode_captions(captions, words), []

    def trained(captions, words, device):
        calls.append(len(captions))
        return np.ones((len(words), 300), np.float32)

    monkeypatch.setattr(evaluation, "word_vectors", trained)
    (tmp_path / "cub").mkdir()
    for _ in range(2):
        evaluation.cached_word_vectors(tmp_path, tokens, words)
    evaluation.cached_word_vectors(tmp_path, tokens[:40], words)
    (tmp_path / "cub" / "words.npz").write_bytes(b"PK")
    assert evaluation.cached_word_vectors(tmp_path, tokens[:40], words).shape == (len(words), 300)
    assert calls == [50, 40, 40]
    assert [p.name for p in (tmp_path / "cub").iterdir()] == ["words.npz"]
    assert evaluation.cached_word_vectors(tmp_path / "nowhere", tokens, words).any()


def test_sentence_vectors_average_the_words_before_the_end():
    words = ["<exc>", "<pad>", "<eos>", "red", "blue"]
    vectors = np.array([[9.0], [9], [9], [1], [3]])
    tokens = np.array([[3, 4, 2, 4], [0, 3, 3, 2], [2, 3, 3, 3], [4, 1, 3, 4]])
    x = evaluation.sentence_vectors(tokens, words, vectors)
    assert np.allclose(x[:, 0], [2, 1, 0, 7 / 3])


class Faithful(torch.nn.Module):
    """z holds what was observed: the row of the test split that comes nearest."""

    def __init__(self, dataset):
        super().__init__()
        self.nothing = torch.nn.Parameter(torch.zeros(1))
        self.image, self.caption = dataset.test[torch.arange(len(dataset.test))]
        self.n_words = len(dataset.words)

    def posterior(self, image, caption):
        if image is not None:
            z = torch.cdist(image, self.image).argmin(1)
        else:
            z = (caption[:, None] == self.caption).float().mean(2).argmax(1)
        z = z[:, None].float()
        return types.SimpleNamespace(sample=lambda: z, mean=z, stddev=torch.ones_like(z))

    def prior(self):
        def sample(shape):
            return torch.randint(len(self.image), (*shape, 1)).float()

        return types.SimpleNamespace(sample=sample)

    def decode(self, z):
        at = z[..., 0].long()
        one_hot = torch.nn.functional.one_hot(self.caption[at], self.n_words)
        return [self.image[at], one_hot.float()]


def planted_birds(n, seed=0, noise=0.3):
    """Features are a noisy linear map of the word counts of the photo's ten captions."""
    names = [f"{a}{b}" for a in ("ruf", "cer", "ash", "oli", "jet") for b in ("ous", "ine", "en")]
    generator = np.random.default_rng(seed)
    map_ = generator.normal(size=(len(names), 128))

    def split(photos, generator):
        counts, captions = [], []
        for _ in range(photos):
            kind = generator.dirichlet(np.full(len(names), 0.3))
            ten = [generator.choice(len(names), 8, p=kind) for _ in range(10)]
            counts.append(sum(np.bincount(c, minlength=len(names)) for c in ten) / 10)
            captions += [[names[i] for i in c] for c in ten]
        x = np.array(counts) @ map_
        x += noise * x.std() * generator.normal(size=x.shape)
        return torch.from_numpy(x.astype(np.float32)), captions

    (x, captions), (x_test, captions_test) = split(n, generator), split(n // 3, generator)
    words = data.vocabulary(captions)
    splits = []
    for features, texts in ((x, captions), (x_test, captions_test)):
        index = torch.arange(len(texts))
        bases = [features, data.encode_captions(texts, words)]
        splits.append(data.Split(bases, [index // 10, index]))
    return data.Dataset("cub", *splits, {}, ("image", "caption"), words=words)


def test_the_true_correlation_of_a_planted_set_is_far_above_that_of_shuffles(tmp_path):
    dataset = planted_birds(150)
    (tmp_path / "cub").mkdir()
    model = Faithful(dataset)
    found = evaluation.evaluate_cub(model, dataset, tmp_path, samples=200)["correlation"]
    assert list(found) == ["image->caption", "caption->image", "joint", "truth"]
    vectors = evaluation.cached_word_vectors(tmp_path, dataset.train.bases[1], dataset.words)
    image, caption = dataset.train[torch.arange(len(dataset.train))]
    embed = lambda c: evaluation.sentence_vectors(c, dataset.words, vectors)  # noqa: E731
    fit = evaluation.cca(image.numpy(), embed(caption), k=40)
    image, caption = dataset.test[torch.arange(len(dataset.test))]
    image, caption = image.numpy(), embed(caption)
    assert found["truth"] == pytest.approx(evaluation.correlation(fit, image, caption).mean())
    x, y = (image - fit.mean_x) @ fit.wx, (caption - fit.mean_y) @ fit.wy
    x, y = (a / np.linalg.norm(a, axis=1, keepdims=True) for a in (x, y))
    generator = np.random.default_rng(0)
    shuffles = [(x * y[generator.permutation(len(y))]).sum(1).mean() for _ in range(1000)]
    assert found["truth"] > np.percentile(shuffles, 99) + 0.1
    # this model gives a true caption of the photo, and the true photo of the caption
    assert found["caption->image"] == pytest.approx(found["truth"])
    assert found["image->caption"] == pytest.approx(found["truth"], abs=0.1)
    assert found["joint"] == pytest.approx(found["truth"], abs=0.1)


def test_the_figure_shows_the_nearest_training_photo(tmp_path, small_net):
    shi(tmp_path)
    data.prepare_cub(tmp_path, "none")
    dataset = data.load_cub(tmp_path)
    x = dataset.train.bases[0]
    assert evaluation.nearest_photos(x[[2, 0]] + 1e-3, x).tolist() == [2, 0]
    pytest.importorskip("matplotlib")
    args = dict(model="MEME", dataset="cub", paired=1)
    run = evaluation.Run(tmp_path, args, 0, 0.0, Faithful(dataset))
    evaluation.draw_cub(run, dataset, tmp_path / "cub.png", tmp_path, n=2)
    with Image.open(tmp_path / "cub.png") as figure:
        assert figure.size[0] > 800


def test_relatedness_compares_different_photos_only():
    dataset = planted_birds(9)
    d, index = evaluation.distances(Faithful(dataset), dataset.test, 0, 1, n=3)
    assert len(dataset.test.rows[0][index].unique()) == 3
    assert np.allclose(d.diagonal(), 0) and (d[~np.eye(3, dtype=bool)] >= 10).all()


# ------------------------------------------------------------------------------------------ spectra

MOLECULES = {  # SMILES of small molecules with their real InChIKeys
    "CCO": "LFQSCWFLJHTTHZ-UHFFFAOYSA-N",
    "CC(=O)O": "QTBSBXVTEAMEQO-UHFFFAOYSA-N",
    "c1ccccc1": "UHOVQNZJYSORNB-UHFFFAOYSA-N",
    "CC(N)C(=O)O": "QNAYBMKLOCPYGJ-UHFFFAOYSA-N",
    "CN1C=NC2=C1C(=O)N(C(=O)N2C)C": "RYYVLZVUVIJVGH-UHFFFAOYSA-N",
    "CC(C)=O": "CSCPPACGZOOCGX-UHFFFAOYSA-N",
}
RECORD = """Name: made up
InChIKey: {key}
SMILES: {smiles}
Precursor_type: [M+H]+
Spectrum_type: MS2
Instrument_type: LC-ESI-QFT
Ion_mode: P
Num Peaks: {n}
{peaks}

"""


def record(smiles, peaks="57.07 100\n71.08 25", key=None, **changed):
    key = MOLECULES.get(smiles, "") if key is None else key
    text = RECORD.format(smiles=smiles, key=key, peaks=peaks, n=len(peaks.splitlines()))
    for field, value in changed.items():
        lines = text.splitlines(keepends=True)
        text = "".join(f"{field}: {value}\n" if x.startswith(f"{field}:") else x for x in lines)
    return text


def challenge_files(folder, ids=("A", "B"), candidate_ids=None, truth="CCO"):
    """Challenges of the true compound `truth`, each with three candidates, two of them
    stereoisomers."""
    (folder / "c.mgf").write_text(
        "".join(f"BEGIN IONS\nTITLE={i}\nPEPMASS=47\n57.07 10\n1200 5\nEND IONS\n\n" for i in ids)
    )
    (folder / "truth.csv").write_text(
        "id,inchikey\n" + "".join(f"{i},{MOLECULES[truth]}\n" for i in ids)
    )
    rows = [
        ("C[C@H](N)C(=O)O", "QNAYBMKLOCPYGJ-REOHCLBHSA-N"),
        (truth, MOLECULES[truth]),
        ("C[C@@H](N)C(=O)O", "QNAYBMKLOCPYGJ-UWTATZPHSA-N"),
        ("c1ccccc1", MOLECULES["c1ccccc1"]),
        ("C1CC(", "ZZZZZZZZZZZZZZ-UHFFFAOYSA-N"),
    ]
    (folder / "candidates.csv").write_text(
        "id,inchikey,smiles\n"
        + "".join(f"{i},{key},{s}\n" for i in candidate_ids or ids for s, key in rows)
    )
    return {
        "mgf": folder / "c.mgf",
        "candidates": folder / "candidates.csv",
        "truth": folder / "truth.csv",
    }


# ---------------------------------------------------------------------------------- sparse matrices


def test_sparse_rows_equal_the_dense_matrix():
    generator = np.random.default_rng(0)
    dense = generator.random((9, 40)).astype(np.float32) * (generator.random((9, 40)) < 0.2)
    dense[[0, 4, 8]] = 0
    sparse = sparse_of(dense)
    assert sparse.shape == (9, 40) and len(sparse) == 9
    dense = torch.from_numpy(dense)
    for rows in (
        torch.tensor([3, 0, 8, 3]),
        torch.tensor([], dtype=torch.long),
        slice(2, 7),
        slice(None),
        torch.arange(9) % 2 == 0,
        5,
        torch.tensor(5),
    ):
        assert sparse[rows].equal(dense[rows]) and sparse.to("cpu")[rows].equal(dense[rows])
    assert sparse_of(np.zeros((3, 7), np.float32))[torch.tensor([2, 1])].equal(torch.zeros(2, 7))


def sparse_of(dense):
    rows = [(np.flatnonzero(x).astype(np.int16), x[x > 0].astype(np.float32)) for x in dense]
    return data.Sparse(*map(torch.from_numpy, data.csr(rows)), dense.shape[1])


# ------------------------------------------------------------------------------------------ reading


def test_msp_in_the_ways_it_is_written_reads_the_same(tmp_path):
    head, peaks = "Name: x\nNum Peaks: 3\n", [[41.5, 10], [57.07, 2e3], [71.1, 0.5]]
    bodies = (
        "41.5 10\n57.07 2e3\n71.1 .5\n",
        "41.5\t10\n57.07\t2e3\n71.1\t.5\n",
        '41.5 10 "C3H5+; 2 ppm"\n57.07 2e3\n71.1 .5 "?"\n',
        "41.5 10; 57.07 2e3; 71.1 .5;\n",
        "41.5 10;\n57.07 2e3;\n71.1 .5;\n",
    )
    for between in ("\n", "", "\r\n\n"):
        path = tmp_path / "a.msp"
        path.write_text(between.join(head + body for body in bodies))
        found = list(data.read_msp(path))
        assert len(found) == len(bodies)
        for fields, read in found:
            assert fields == {"name": "x", "num peaks": "3"} and np.array_equal(read, peaks)
    packed = tmp_path / "a.msp.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    for (fields, a), (other, b) in zip(data.read_msp(path), data.read_msp(packed), strict=True):
        assert fields == other and np.array_equal(a, b)


def test_msp_with_records_without_peaks_or_with_words_for_peaks(tmp_path):
    path = tmp_path / "a.msp"
    path.write_text("Name: a\nNum Peaks: 0\n\nName: b\nNum Peaks: 1\n5 many\n\nName: c\nName: d\n")
    (a, none), (b, words), (c, last) = data.read_msp(path)
    assert none.shape == (0, 2) and words is None and last.shape == (0, 2)
    assert a["name"] == "a" and c["name"] == "c"  # the first of a repeated key


def test_mona_s_smiles_is_found_among_the_comments():
    comments = '"SMILES=CCO" "author=A, B" "computed SMILES=OCC"'
    assert data.smiles_of({"comments": comments}) == "CCO"
    assert data.smiles_of({"smiles": "N/A", "comments": '"computed SMILES=C=C"'}) == "C=C"
    assert data.smiles_of({"comments": "Parent=57.1"}) == ""


def test_mgf(tmp_path):
    path = tmp_path / "a.mgf"
    path.write_text(
        "# made up\n\nBEGIN IONS\nTITLE=one=1\nCHARGE=1+\n50.5 3\n60 4\nEND IONS\n"
        "BEGIN IONS\nTITLE=two\nEND IONS\nBEGIN IONS\nTITLE=cut off\n50 1\n"
    )
    (one, peaks), (two, none) = data.read_mgf(path)
    assert one == {"title": "one=1", "charge": "1+"} and peaks.tolist() == [[50.5, 3], [60, 4]]
    assert two == {"title": "two"} and none.shape == (0, 2)


def test_a_truncated_or_absent_file_is_one_sentence(tmp_path):
    whole = gzip.compress(record("CCO").encode() * 50)
    for name, content in ("cut.gz", whole[:-20]), ("bad.gz", whole[:12] + b"\xff" * 30):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} is a truncated or damaged .gz file"):
            list(data.read_msp(tmp_path / name))
    for path in (tmp_path / "absent.msp", tmp_path):
        with pytest.raises(ValueError, match="cannot be read"):
            list(data.read_mgf(path))


def test_peaks_are_binned_added_and_square_rooted():
    peaks = np.array([[57.07, 60], [57.01, 40], [0, 25], [1099.99, 4]])
    outside = np.array(
        [[1100, 9], [-1, 9], [np.nan, 9], [80, 0], [81, -3], [82, np.inf], [83, np.nan]]
    )
    for given in peaks, np.concatenate([outside, peaks]):
        bins, values = data.bin_peaks(given)
        assert bins.tolist() == [0, 570, 10999]
        assert values == pytest.approx([0.5, 1, 0.2])
        assert bins.dtype == np.int16 and values.dtype == np.float32
    assert len(data.bin_peaks(outside)[0]) == 0


# ---------------------------------------------------------------------------------------- preparing


def test_without_rdkit_one_sentence_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "rdkit", None)
    with pytest.raises(ValueError, match="pip install rdkit"):
        data.prepare_spectra(tmp_path, tmp_path / "a.msp")
    assert not list(tmp_path.iterdir())


def test_fingerprints_have_2149_bits_and_no_stereochemistry(capfd):
    pytest.importorskip("rdkit")
    from rdkit import Chem
    from rdkit.Chem import AllChem

    bits = data.fingerprint("c1ccccc1O")
    assert bits.shape == (167 + 1982,) and bits.dtype == bool
    assert bits[162] and bits[165]  # MACCS: aromatic, a ring
    old = AllChem.GetMorganFingerprintAsBitVect(Chem.MolFromSmiles("c1ccccc1O"), 2, nBits=1982)
    assert np.array_equal(np.flatnonzero(bits[167:]), list(old.GetOnBits()))
    left, right = (data.fingerprint(s) for s in ("C[C@H](N)C(=O)O", "C[C@@H](N)C(=O)O"))
    assert np.array_equal(left, right) and not np.array_equal(left, bits)
    capfd.readouterr()
    assert all(data.fingerprint(s) is None for s in ("", "C1CC(", "c1ccc1c", "N/A"))
    assert capfd.readouterr() == ("", "")


def test_spectra_are_prepared_split_by_compound_and_what_does_not_fit_is_counted(tmp_path, capsys):
    pytest.importorskip("rdkit")
    good = "".join(record(s, f"57.07 100\n{80 + k} 25") for s in MOLECULES for k in range(3))
    bad = (
        record("CCO", "")
        + record("CCO", "5 many")
        + record("CCO", "57 1", **{"Num Peaks": 3})
        + record("CCO", "1500 7")
        + record("C1CC(")
        + record("C1CC(", key="ABCDEFGHIJKLMN-UHFFFAOYSA-N")
        + record("")
        + record("CCO", Ion_mode="N")
        + record("CCO", Instrument_type="LC-ESI-QTOF")
        + record("CCO", Precursor_type="[M+Na]+")
        + record("CCO", Spectrum_type="MS3")
    )
    # Kept: without an InChIKey (taken from the SMILES), with a peak beyond the range, and without
    # what [M+H]+ implies.
    kept = record("OCC", key="") + record("CC(C)=O", "1100.5 7\n57.07 7")
    kept = kept.replace("Ion_mode: P\nNum", "Num").replace("Spectrum_type: MS2\n", "")
    path = tmp_path / "a.msp.gz"
    path.write_bytes(gzip.compress((good + bad + kept).encode()))
    files = challenge_files(tmp_path, candidate_ids=("A", "B", "unknown"))
    counts = data.prepare_spectra(tmp_path / "new", path, **files)
    assert [p.name for p in (tmp_path / "new" / "spectra").iterdir()] == ["spectra.npz"]
    assert counts["records"] == 18 + 11 + 2 and counts["peaks_beyond_range"] == 1
    assert counts["skipped"] == {
        "without peaks": 1,
        "with peaks that are no numbers": 1,
        "with fewer peaks than announced": 1,
        "without peaks in the range": 1,
        "whose SMILES rdkit refuses": 2,
        "without a SMILES": 1,
        "in negative mode": 1,
        "of another instrument": 1,
        "with another precursor than [M+H]+": 1,
        "that are not MS2": 1,
        "of the challenges' compounds": 4,  # ethanol, once without its InChIKey
    }
    assert counts["compounds"] == 5 and counts["removed_compounds"] == 1
    assert counts["train"] + counts["test"] == 16 and counts["challenges"] == 2
    assert counts["challenges_skipped"] == {
        "candidates of an unknown id": 5,
        "candidates of a compound listed before": 2,
        "candidates whose SMILES rdkit refuses": 2,
    }
    assert "skipped 4 of the challenges' compounds" in capsys.readouterr().out

    dataset = data.load_spectra(tmp_path / "new")
    with np.load(tmp_path / "new" / "spectra" / "spectra.npz", allow_pickle=False) as arrays:
        blocks = [set(arrays[f"{part}_compounds"]) for part in ("train", "test")]
    assert not blocks[0] & blocks[1] and len(blocks[1]) == 1  # max(1, a tenth)
    assert blocks[0] | blocks[1] == {key[:14] for s, key in MOLECULES.items() if s != "CCO"}
    assert len(dataset.train.bases[1]) == 4  # fingerprints are held once per compound
    spectra, fingerprints = dataset.train[torch.arange(len(dataset.train))]
    assert spectra.shape == (counts["train"], 11000) and spectra.dtype == torch.float32
    assert spectra.amax(1).eq(1).all() and spectra[:, 570].eq(1).all()
    expected = {data.fingerprint(s).tobytes() for s in MOLECULES}
    assert {x.numpy().astype(bool).tobytes() for x in fingerprints} < expected

    challenges = data.load_challenges(tmp_path / "new")
    assert challenges.ids == ["A", "B"] and challenges.offsets.tolist() == [0, 3, 6]
    assert challenges.truth.tolist() == [1, 1] and challenges.bits.shape == (6, 269)
    bits = np.unpackbits(challenges.bits, axis=1, count=2149).astype(bool)
    assert np.array_equal(bits[4], data.fingerprint("CCO"))
    assert challenges.spectra[:].nonzero().tolist() == [[0, 570], [1, 570]]


def test_the_split_depends_on_the_compounds_and_the_seed_alone(tmp_path):
    pytest.importorskip("rdkit")
    records = [record(s) for s in MOLECULES]
    held_out = []
    for order, seed in (records, 0), (records[::-1] + records, 0), (records, 1), (records, 2):
        (tmp_path / "a.msp").write_text("".join(order))
        data.prepare_spectra(tmp_path, tmp_path / "a.msp", seed=seed)
        with np.load(tmp_path / "spectra" / "spectra.npz") as arrays:
            held_out.append(arrays["test_compounds"].tolist())
    assert held_out[0] == held_out[1] and len({*map(tuple, held_out)}) > 1
    assert data.load_challenges(tmp_path) is None


def test_what_leaves_no_spectra_is_one_sentence_and_writes_nothing(tmp_path, monkeypatch):
    pytest.importorskip("rdkit")
    source, root = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    msp, files = source / "a.msp", challenge_files(source)
    msp.write_text("".join(map(record, MOLECULES)))

    def refused(match, msp=msp, **changed):
        with pytest.raises(ValueError, match=match) as caught:
            data.prepare_spectra(root, msp, **changed)
        assert "\n" not in str(caught.value) and not root.exists()

    refused("too few .* 6 of another instrument .* has LC-ESI-QFT", instrument="LC-ESI-QTOF")
    refused("cannot be read", msp=source / "absent.msp")
    (source / "empty").write_text("")
    refused("leaves 0 compounds", msp=source / "empty")
    refused("challenges need all three", mgf=files["mgf"])
    (source / "other.csv").write_text("id,smiles\nA,C\n")
    refused("other.csv has no column 'inchikey'", **files | {"candidates": source / "other.csv"})
    refused("other.csv has no column 'inchikey'", **files | {"truth": source / "other.csv"})
    refused("no id of .* skipped 15 candidates", **challenge_files(source, candidate_ids="CDE"))
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "locked").mkdir()
    may = os.access  # root may write into any folder, so the mode would not lock it
    monkeypatch.setattr(os, "access", lambda path, mode: path.name != "locked" and may(path, mode))
    for barred in ("file", "locked"):
        with pytest.raises(ValueError, match="cannot be written: choose another --data"):
            data.prepare_spectra(tmp_path / barred, msp)
    made = root / "spectra" / "spectra.npz"
    made.parent.mkdir(parents=True)
    np.savez(made, version=1)
    with pytest.raises(ValueError, match="spectra.npz has no array 'train_offsets'"):
        data.load_spectra(root)
    data.prepare_spectra(root, msp)
    made.write_bytes(made.read_bytes()[:-30])
    with pytest.raises(ValueError, match="spectra.npz is damaged"):
        data.load_challenges(root)
    with pytest.raises(ValueError, match="make it with python data.py spectra"):
        data.load_spectra(tmp_path)


def test_a_download_that_fails_is_one_sentence_and_leaves_nothing(tmp_path, monkeypatch):
    class Short:
        headers, blocks = {"Content-Length": "10"}, [b"abc"]

        def read(self, n):
            return self.blocks.pop() if self.blocks else b""

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

    def offline(url, timeout):
        raise urllib.error.URLError("no network")

    for answer in offline, lambda url, timeout: Short():
        monkeypatch.setattr("urllib.request.urlopen", answer)
        with pytest.raises(ValueError, match="put it at .*a.msp by hand"):
            data.download("https://localhost/a.msp", tmp_path / "spectra" / "a.msp")
        assert not list(tmp_path.rglob("*a.msp*"))


# ------------------------------------------------------------------------------------------ ranking


def test_bit_cross_entropy_equals_its_formula():
    generator = np.random.default_rng(0)
    p, bits = generator.random(21), generator.random((5, 21)) < 0.5
    found = evaluation.bit_cross_entropy(p, np.packbits(bits, axis=1), block=2)
    assert found == pytest.approx(-np.log(np.where(bits, p, 1 - p)).sum(1))
    certain = evaluation.bit_cross_entropy(np.ones(3), np.packbits([[1, 1, 0]], axis=1))
    assert certain == pytest.approx(-np.log(evaluation.CERTAIN), abs=1e-3)


def test_equal_scores_share_their_mean_rank():
    scores = np.array([3.0, 1.0, 3.0, 2.0, 3.0])
    assert [evaluation.rank_of(scores, k) for k in range(5)] == [4, 1, 4, 2, 4]
    assert evaluation.rank_of(np.zeros(10), 7) == 5.5


def test_random_top_k_is_the_mean_over_random_orders():
    generator, sizes = np.random.default_rng(0), np.array([3, 10, 200])
    ranks = 1 + generator.integers(0, sizes, (20_000, 3))
    found = [evaluation.top_k(row, [1, 5, 20]) for row in ranks[:2000]]
    assert np.mean(found, 0) == pytest.approx(evaluation.random_top_k(sizes, [1, 5, 20]), abs=0.02)
    assert evaluation.random_top_k(sizes, [200]) == [1]


def test_tanimoto():
    a = np.array([[1, 1, 0], [0, 0, 0], [1, 0, 0]], bool)
    b = np.array([[1, 0, 1], [0, 0, 0], [0, 1, 0]], bool)
    assert evaluation.tanimoto(a, b) == pytest.approx([1 / 3, 1, 0])


class Lookup(torch.nn.Module):
    """A stand-in for a model: z is the spectrum, and decodes to the bits that `answers` has for its
    first bin."""

    def __init__(self, answers, noise=0.0):
        super().__init__()
        self.answers = torch.nn.Parameter(answers)  # (n, 2149)
        self.modalities = [types.SimpleNamespace(likelihood="normal")] * 2  # a mean as it is
        self.decoders = [None, lambda z: self.answers[z[..., 0].round().long()]]
        self.noise = noise

    def posterior(self, x, missing):
        assert missing is None and not self.training
        return torch.distributions.Normal(x.argmax(1, keepdim=True).float(), self.noise + 1e-6)


def spectra_to_name(n=4, candidates=30):
    """Spectrum i has its one peak in bin i; fingerprints are random. -> Dataset, Challenges,
    fingerprints (n, 2149)"""
    generator = np.random.default_rng(0)
    peaks = [(np.array([i], np.int16), np.ones(1, np.float32)) for i in range(n)]
    spectra = data.Sparse(*map(torch.from_numpy, data.csr(peaks)), data.BINS)
    bits = torch.from_numpy(generator.random((n, data.BITS)) < 0.1)
    split = data.Split([spectra, bits])
    dataset = data.Dataset(
        "spectra", split, split, {"name": "spectra"}, ("spectrum", "fingerprint")
    )
    lists = generator.random((n, candidates, data.BITS)) < 0.1
    lists[:, 3] = bits
    packed = np.packbits(lists.reshape(-1, data.BITS), axis=1)
    offsets, truth = np.arange(n + 1) * candidates, np.full(n, 3)
    ids = [f"c{i}" for i in range(n)]
    return dataset, data.Challenges(ids, spectra, truth, offsets, packed), bits.float()


def test_a_model_that_knows_the_fingerprints_ranks_first_and_a_constant_one_in_the_middle(tmp_path):
    dataset, challenges, bits = spectra_to_name()
    found = evaluation.evaluate_spectra(Lookup(bits), dataset, challenges, batch_size=3)
    assert found["rank"] == {"top1": 1, "top5": 1, "top10": 1, "top20": 1, "median": 1}
    assert found["bits"]["accuracy"] == 1 and found["bits"]["tanimoto"] == 1
    assert found["bits"]["cross_entropy"] == pytest.approx(2149e-4, rel=1e-2)
    assert found["ranks"] == {f"c{i}": 1 for i in range(4)} and set(found["sizes"].values()) == {30}
    assert found["random"]["rank"] == pytest.approx(
        {"top1": 1 / 30, "top5": 5 / 30, "top10": 1 / 3, "top20": 2 / 3, "median": 15}
    )
    frequency = bits.mean(0)
    constant = evaluation.evaluate_spectra(Lookup(frequency.expand(4, -1)), dataset, challenges)
    for key in ("rank", "ranks", "bits"):
        assert constant[key] == pytest.approx(found["frequency"][key], rel=1e-4)
    half = evaluation.evaluate_spectra(Lookup(torch.full_like(bits, 0.5)), dataset, challenges)
    assert half["rank"]["median"] == 15.5  # all equal: everyone has the mean rank
    assert half["bits"]["cross_entropy"] == pytest.approx(2149 * np.log(2))

    pytest.importorskip("matplotlib")
    evaluation.top_k_figure({"known": found, "constant": constant}, tmp_path / "curve.png")
    args = dict(model="SVAE", dataset="spectra", paired=1)
    run = evaluation.Run(tmp_path, args, 0, 0.0, Lookup(bits).eval())
    evaluation.draw_spectra(run, dataset, tmp_path / "spectra.png", n=2)
    assert all((tmp_path / f"{name}.png").stat().st_size > 5000 for name in ("curve", "spectra"))


def test_the_mean_over_samples_is_that_of_the_probabilities():
    dataset, challenges, bits = spectra_to_name()
    model = Lookup(bits.mean(0).expand(4, -1).contiguous())
    one, many = (
        evaluation.evaluate_spectra(model, dataset, samples=samples) for samples in (1, 50)
    )
    assert many["bits"] == pytest.approx(one["bits"]) and "rank" not in one
    torch.manual_seed(0)
    noisy, index = Lookup(bits, noise=0.7), torch.tensor([1])
    noisy.answers.data = torch.cat([bits, bits.flip(0)])[:, :8]
    noisy.eval()
    found = evaluation.predict_bits(noisy, lambda i: dataset.test.take(0, index), 1, samples=999)
    z = torch.distributions.Normal(1.0, 0.7)
    weights = [float(z.cdf(torch.tensor(k + 0.5)) - z.cdf(torch.tensor(k - 0.5))) for k in range(4)]
    assert found[0] == pytest.approx((torch.tensor(weights) @ bits[:, :8]).numpy(), abs=0.06)


# ------------------------------------------------------------------------------------------ metrics


def planted(n, correlations, extra=3, seed=0):
    """x, y whose canonical correlations are known: mixed by random matrices, with noise
    dimensions."""
    rng, k = np.random.default_rng(seed), len(correlations)
    r = np.array(correlations)
    x, y = rng.standard_normal((n, k + extra)), rng.standard_normal((n, k + extra + 2))
    y[:, :k] = r * x[:, :k] + np.sqrt(1 - r**2) * y[:, :k]
    mix_x, mix_y = rng.standard_normal((k + extra,) * 2), rng.standard_normal((k + extra + 2,) * 2)
    return x @ mix_x + 5, y @ mix_y - 3


def test_cca_finds_planted_correlations():
    x, y = planted(20_000, (0.9, 0.6, 0.3))
    fit = evaluation.cca(x, y, k=3, ridge=0)
    assert np.allclose(fit.correlations, (0.9, 0.6, 0.3), atol=0.02)
    px, py = (x - fit.mean_x) @ fit.wx, (y - fit.mean_y) @ fit.wy
    assert np.allclose(np.cov(px.T), np.eye(3), atol=1e-8)
    assert np.allclose(np.cov(px.T, py.T)[:3, 3:], np.diag(fit.correlations), atol=1e-8)


def test_cca_is_linear_invariant_without_ridge_and_drops_null_directions():
    x, y = planted(2000, (0.8, 0.4))
    twice = np.hstack([x, x[:, :1] - x[:, 1:2]])  # a rank short of its width
    a, b = evaluation.cca(x, y, k=2, ridge=0), evaluation.cca(10 * twice, y, k=2, ridge=0)
    assert np.allclose(a.correlations, b.correlations, atol=1e-6)


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
    a, b = fit.wx.T @ (x[7] - x.mean(0)), fit.wy.T @ (y[7] - y.mean(0))
    expected = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
    assert np.isclose(evaluation.correlation(fit, x, y)[7], expected)
    shuffled = evaluation.correlation(fit, x, y[np.random.default_rng(0).permutation(500)])
    assert evaluation.correlation(fit, x, y).mean() > 0.6 and abs(shuffled.mean()) < 0.1
    assert np.isfinite(evaluation.correlation(fit, np.tile(fit.mean_x, (2, 1)), y[:2])).all()


def covariance(rng, d):
    a = rng.standard_normal((d, d))
    return a @ a.T


def test_w2_agrees_with_matrix_square_roots():
    sqrtm = pytest.importorskip("scipy.linalg").sqrtm
    rng = np.random.default_rng(0)
    m1, m2 = rng.standard_normal((2, 4))
    s1, s2 = covariance(rng, 4), covariance(rng, 4)
    root = sqrtm(s1)
    squared = ((m1 - m2) ** 2).sum() + np.trace(s1 + s2 - 2 * sqrtm(root @ s2 @ root)).real
    assert np.isclose(evaluation.w2(m1, s1, m2, s2), math.sqrt(squared))
    std1, std2 = rng.random((2, 4))
    full = evaluation.w2(m1, np.diag(std1**2), m2, np.diag(std2**2))
    assert np.isclose(evaluation.w2(m1, std1, m2, std2), full)
    assert evaluation.w2(m1, std1, m1, std1) == 0
    assert np.isclose(
        evaluation.w2(m1, std1, m1 + 3, std1), 6
    )  # the minus sign: a shift by 3 in 4-d


def test_w2_broadcasts_over_pairs():
    rng = np.random.default_rng(0)
    means, covs = rng.standard_normal((3, 2)), np.stack([covariance(rng, 2) for _ in range(3)])
    d = evaluation.w2(means[:, None], covs[:, None], means, covs)
    assert d.shape == (3, 3) and np.allclose(d, d.T) and np.allclose(np.diag(d), 0, atol=1e-5)
    assert np.isclose(d[0, 2], evaluation.w2(means[0], covs[0], means[2], covs[2]))


def blobs(n, seed=0, classes=4, dims=5):
    rng = np.random.default_rng(seed)
    y = rng.integers(classes, size=n)
    return rng.standard_normal((n, dims)) + np.eye(classes, dims)[y] * 1.5, y


def test_logistic_regression_is_converged_and_agrees_with_lbfgs():
    z, y = blobs(1000)
    w = evaluation.logistic_regression(z, y, 4, l2=1e-3)
    zt, yt = torch.from_numpy(z), torch.from_numpy(y)
    a = torch.zeros(5, 4, dtype=torch.double, requires_grad=True)
    b = torch.zeros(4, dtype=torch.double, requires_grad=True)

    def loss():
        return nn.functional.cross_entropy(zt @ a + b, yt) + 0.5e-3 * (a**2).sum()

    with torch.no_grad():
        a.copy_(torch.from_numpy(w[:-1])), b.copy_(torch.from_numpy(w[-1]))
    ours = loss()
    assert max(g.abs().max() for g in torch.autograd.grad(ours, (a, b))) < 1e-6
    with torch.no_grad():
        a.zero_(), b.zero_()
    solver = torch.optim.LBFGS(
        [a, b], max_iter=500, tolerance_grad=1e-9, line_search_fn="strong_wolfe"
    )

    def closure():
        solver.zero_grad()
        value = loss()
        value.backward()
        return value

    solver.step(closure)
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
    noise = np.random.default_rng(2).standard_normal(z.shape)
    assert evaluation.linear_probe(noise, y, noise[::-1], y) < 0.3
    constant = np.hstack([z, np.ones((4000, 1))])
    assert abs(evaluation.linear_probe(constant, y, constant, y) - bayes) < 0.02


# A data set whose pixels spell the label, an oracle that reads it, and models that decode what they
# like.


def toy(name="mnist-svhn", n=600, seed=0):
    def split(n, seed):
        labels = torch.randint(10, (n,), generator=torch.Generator().manual_seed(seed))
        shapes = {
            "mnist-svhn": [(1, 28, 28), (3, 32, 32)],
            "mnist-split": [(1, 14, 28)] * 2,
            "mnist-split3": [(1, 9, 28)] * 3,
        }[name]
        bases = [(25 * labels).byte()[:, None, None, None].expand(-1, *s) for s in shapes]
        return data.Split([b.clone() for b in bases], labels=labels)

    names = {"mnist-svhn": ("mnist", "svhn"), **nets.BANDS}[name]
    return data.Dataset(name, split(n, seed), split(n // 2, seed + 1), {"name": name}, names)


class Reader(nn.Module):
    """An oracle of toy images: mean grey / 25 * 255 is the digit."""

    def forward(self, x):
        digit = (x.mean((1, 2, 3)) * 255 / 25).round()
        return -((digit[:, None] - torch.arange(10)) ** 2)

    def information(self, x):
        return x.mean((1, 2, 3))


class Perfect(nn.Module):
    """z[0] is the label, exactly; `says` maps it to what modality m shows."""

    def __init__(self, shapes, says=lambda m, digit: digit):
        super().__init__()
        self.shapes, self.says = shapes, says

    def posterior(self, *xs):
        seen = [x for x in xs if x is not None]
        digit = seen[0].mean((1, 2, 3)) * 255 / 25
        mean = torch.stack([digit, torch.zeros_like(digit)], 1)
        return Independent(Normal(mean, torch.tensor([1e-3, 1.0]).expand_as(mean)), 1)

    def prior(self):
        class Digits:
            def sample(self, shape):
                return torch.stack([torch.randint(10, shape).float(), torch.randn(shape)], -1)

        return Digits()

    def decode(self, z):
        said = [self.says(m, z[..., 0].round()) * 25 / 255 for m in range(len(self.shapes))]
        return [
            s[..., None, None, None].expand(*s.shape, *shape) for s, shape in zip(said, self.shapes)
        ]

    def log_likelihood(self, *xs, samples, given=None):
        x = next(x for x in xs if x is not None)
        return torch.full((len(x),), -1.0 if given is None else -0.5)


SHAPES = [(1, 28, 28), (3, 32, 32)]
READERS = {"mnist": Reader(), "svhn": Reader()}


def test_coherence_of_a_perfect_model_is_one_with_full_entropy():
    metrics = evaluation.evaluate(Perfect(SHAPES), toy(), READERS)
    assert metrics["cross_coherence"] == {"mnist->svhn": 1, "svhn->mnist": 1}
    assert metrics["self_coherence"] == {"mnist": 1, "svhn": 1}
    assert metrics["joint_coherence"] == 1
    assert abs(metrics["joint_entropy"] - math.log(10)) < 0.01
    assert min(metrics["latent_accuracy"].values()) > 0.99
    assert metrics["log_likelihood"] == pytest.approx(
        {"mnist": -1, "svhn": -1, "mnist,svhn": -1, "mnist|svhn": -0.5, "svhn|mnist": -0.5}
    )


def test_likelihoods_come_in_blocks_of_4_mib_and_are_those_of_all_samples():
    sizes = []

    class Counting(Perfect):
        def log_likelihood(self, *xs, samples, given=None):
            seen = [x for x in xs if x is not None]
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
    metrics = evaluation.joint_coherence(constant, toy(), READERS, samples=1000)
    assert metrics == {"joint_coherence": 1, "joint_entropy": 0}
    cross = evaluation.coherence(constant, toy(), READERS)["cross_coherence"]
    assert all(0.05 < share < 0.15 for share in cross.values())


def test_coherence_names_its_direction():
    only_svhn = Perfect(SHAPES, lambda m, digit: digit if m == 1 else 0 * digit)
    metrics = evaluation.coherence(only_svhn, toy(), READERS)
    assert (
        metrics["cross_coherence"]["mnist->svhn"] == 1 > metrics["cross_coherence"]["svhn->mnist"]
    )
    assert metrics["self_coherence"]["svhn"] == 1 > metrics["self_coherence"]["mnist"]
    joint = evaluation.joint_coherence(only_svhn, toy(), READERS, samples=2000)
    assert joint["joint_coherence"] < 0.15 and joint["joint_entropy"] == 0


def test_the_probe_is_fitted_on_what_is_observed_alone():
    dataset = toy()
    mask = torch.ones(600, 2, dtype=torch.bool)
    mask[200:, 0] = False
    wrong = (dataset.train.labels[200:] + 1) % 10
    dataset.train.bases[0][200:] = 25 * wrong.byte()[:, None, None, None]
    share = evaluation.latent_accuracy(Perfect(SHAPES), dataset._replace(mask=mask))[
        "latent_accuracy"
    ]
    assert min(share.values()) > 0.99
    assert evaluation.latent_accuracy(Perfect(SHAPES), dataset)["latent_accuracy"]["mnist"] < 0.9


@pytest.mark.parametrize("name", nets.BANDS)
def test_every_subset_of_the_parts_is_a_condition(name):
    dataset = toy(name)
    model = Perfect([x.shape[1:] for x in dataset.test.bases])
    accuracy = evaluation.split_accuracy(model, dataset, {"image": Reader()})["accuracy"]
    two, three = ["top", "bottom", "both"], ["top", "middle", "bottom"]
    three += ["top+middle", "top+bottom", "middle+bottom", "all"]
    assert list(accuracy) == (two if name == "mnist-split" else three)
    assert set(accuracy.values()) == {1}


def test_evaluation_is_a_function_of_the_seed():
    class Noisy(Perfect):
        def posterior(self, *xs):
            q = super().posterior(*xs)
            return Independent(Normal(q.mean, torch.ones_like(q.mean)), 1)

    dataset = toy(n=100)
    a, b, c = (evaluation.evaluate(Noisy(SHAPES), dataset, READERS, 0, seed=s) for s in (0, 0, 1))
    assert a == b != c


def test_an_oracle_is_kept_and_made_anew_when_the_images_change(tmp_path):
    dataset = toy(n=64)
    oracle, accuracy = evaluation.load_oracle(dataset, "mnist", tmp_path, steps=3)
    path = tmp_path / "oracles" / "mnist-svhn-mnist.pt"
    made = path.stat().st_mtime_ns
    again, same = evaluation.load_oracle(dataset, "mnist", tmp_path, steps=3)
    x = torch.rand(5, 1, 28, 28)
    assert path.stat().st_mtime_ns == made and same == accuracy
    assert torch.equal(oracle(x), again(x)) and not again.training
    dataset.train.bases[0][5, 0, 3, 3] += 1
    evaluation.load_oracle(dataset, "mnist", tmp_path, steps=3)
    assert path.stat().st_mtime_ns != made
    path.write_bytes(path.read_bytes()[:100])
    evaluation.load_oracle(dataset, "mnist", tmp_path, steps=3)
    assert evaluation.load_oracle(dataset, "mnist", tmp_path, steps=3)[1] >= 0
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_an_oracle_learns_and_its_gaussian_process_knows_noise_when_it_sees_it(tmp_path):
    train, test = data.glyphs(1000, seed=0), data.glyphs(300, seed=1)
    dataset = data.Dataset("glyphs", train, test, {}, ("grey", "colour"))
    oracle, accuracy = evaluation.load_oracle(dataset, "grey", tmp_path, steps=40)
    assert accuracy > 0.9
    torch.manual_seed(0)
    with torch.no_grad():
        h, test_h = (
            oracle.features(split.take(0, torch.arange(len(split)))) for split in (train, test)
        )
    oracle.process.fit(h, train.labels, steps=100)
    with torch.no_grad():
        guess = oracle.process(test_h)[0].argmax(-1)
        seen, noise = (
            oracle.process.information(test_h),
            oracle.information(torch.rand(300, 1, 28, 28)),
        )
    assert abs((guess == test.labels).float().mean() - accuracy) < 0.02
    assert seen.min() > -1e-6 and noise.max() < math.log(10) and noise.mean() > 3 * seen.mean()


@slow
@pytest.mark.parametrize("m, name", [(0, "grey"), (1, "colour")])
def test_the_full_recipe_s_process_reads_as_the_oracle_and_doubts_noise(m, name, tmp_path):
    dataset = data.load("glyphs", tmp_path)
    oracle, accuracy = evaluation.load_oracle(dataset, name, tmp_path)
    torch.manual_seed(0)
    x = dataset.test.take(m, torch.arange(1000))
    with torch.no_grad():
        guess = oracle.process(oracle.features(x))[0].argmax(-1)
        seen, noise = oracle.information(x), oracle.information(torch.rand_like(x))
    assert abs((guess == dataset.test.labels[:1000]).double().mean() - accuracy) < 0.01
    assert noise.mean() > 5 * seen.mean() and noise.min() > seen.median()


def test_the_gaussian_process_at_its_prior_is_the_prior():
    process = evaluation.GaussianProcess(3, classes=2, points=5)
    torch.manual_seed(0)
    process.inducing.data.normal_()
    mean, std = process(torch.randn(7, 3))
    assert torch.allclose(mean, torch.zeros(7, 2))
    assert torch.allclose(std, torch.full((7, 2), 3.0), atol=1e-3)
    log_p = process.elbo(torch.randn(7, 3), torch.zeros(7).long(), n=0)
    assert abs(log_p.item()) < 1e-5  # n = 0 leaves the KL, which is zero there


def test_information_is_what_samples_of_the_process_disagree_on():
    process = evaluation.GaussianProcess(3, classes=2, points=5)
    torch.manual_seed(0)
    process.inducing.data.normal_()
    process.root.data *= (
        1e-3  # f is known to be 0 at the inducing points: p = 1/2, nothing to learn
    )
    known, unknown = process.inducing.detach(), torch.full((5, 3), 50.0)
    with torch.no_grad():
        assert process.information(known).abs().max() < 1e-2
        assert process.information(unknown).min() > 0.2  # f ~ N(0, 9), each sample is certain


def test_the_kl_of_the_gaussian_process_is_that_of_its_gaussians():
    process = evaluation.GaussianProcess(3, classes=2, points=4)
    torch.manual_seed(0)
    process.inducing.data.normal_(), process.mean.data.normal_(), process.root.data.normal_()
    root = process.root.tril().detach()
    q = torch.distributions.MultivariateNormal(process.mean.detach(), root @ root.mT)
    p = torch.distributions.MultivariateNormal(torch.zeros(4), torch.eye(4))
    kl = torch.distributions.kl_divergence(q, p).sum()
    assert torch.isclose(
        -process.elbo(torch.randn(7, 3), torch.zeros(7).long(), n=0), kl, rtol=1e-3
    )


def result(model="MEME", seed=0, paired=1.0, share=0.5, **options):
    run = {"model": model, "dataset": "glyphs", "paired": paired, "unpaired": "split", "epochs": 5}
    run |= {"seed": seed, "out": f"somewhere/{seed}", "options": options, **options}
    metrics = {"cross_coherence": {"grey->colour": share}, "log_likelihood": {"grey": -123.44}}
    extra = {
        "oracle": {"grey": 0.999},
        "data": "glyphs",
        "run": run,
        "epoch": 5,
        "minutes": 2 + seed,
    }
    return metrics | extra | {"samples": 1000, "examples": 100, "pseudo": True}


def test_the_table_is_mean_and_std_over_the_seeds():
    text = evaluation.table(
        [result(seed=0, share=0.5), result(seed=1, share=0.7), result("MVAE", share=0.1)]
    )
    lines = text.splitlines()
    assert (
        "| model | paired | unpaired | epochs | seeds | minutes | grey→colour | log p(grey) |"
        in lines
    )
    assert "| MEME | 1 | split | 5 | 2 | 2.5 | 0.600 ± 0.141 | -123.4 ± 0.0 |" in lines
    assert "| MVAE | 1 | split | 5 | 1 | 2.0 | 0.100 | -123.4 |" in lines
    assert "grey 0.999" in text and "pseudo-likelihood" in text and "K = 1,000" in text


def test_rows_are_named_after_the_options_that_differ():
    text = evaluation.table([result(kl="closed"), result(kl="sample"), result("MVAE", anneal=0)])
    assert "MEME kl=closed |" in text and "MEME kl=sample |" in text and "| MVAE |" in text
    assert "kl=" not in evaluation.table([result(kl="closed"), result(kl="closed", paired=0.5)])


def test_missing_numbers_leave_a_dash():
    bare = result(seed=3, paired=0.25)
    del bare["log_likelihood"]
    broken = result(paired=0.5, share=math.nan)
    lines = evaluation.table([result(), bare, broken]).splitlines()
    assert "| MEME | 0.25 | split | 5 | 1 | 5.0 | 0.500 | – |" in lines
    assert "| MEME | 0.5 | split | 5 | 1 | 2.0 | – | -123.4 |" in lines
    assert json.loads(json.dumps(evaluation.finite(broken), allow_nan=False))


# main, on a data set of eight numbers and a model that was not trained.


@pytest.fixture
def runs(tmp_path):
    """Two runs of one setting and a third with half of the pairs, of a labelled .npz."""
    import mvae

    rng = np.random.default_rng(0)
    arrays = {f"{part}_labels": rng.integers(3, size=60) for part in ("train", "test")}
    for part in ("train", "test"):
        for m, width in enumerate((3, 5)):
            noise = rng.standard_normal((60, width)).astype("f4")
            arrays[f"{part}_{m}"] = noise + 3 * arrays[f"{part}_labels"][:, None]
    np.savez(tmp_path / "own.npz", **arrays)
    dataset = data.load(str(tmp_path / "own.npz"))
    folders = []
    for k, (seed, paired) in enumerate([(0, 1.0), (1, 1.0), (0, 0.5)]):
        torch.manual_seed(k)
        model = mvae.MVAE(nets.modalities(**dataset.spec), 4)
        args = {
            "version": 1,
            "script": "mvae",
            "model": "MVAE",
            "dataset": str(tmp_path / "own.npz"),
        }
        args |= {"data": str(tmp_path), "spec": dataset.spec, "note": "", "latent_dim": 4}
        args |= {"options": {}, "paired": paired, "unpaired": "split", "epochs": 2, "seed": seed}
        folder = tmp_path / f"run{k}"
        folder.mkdir()
        (folder / "args.json").write_text(json.dumps(args))
        state = {"model": model.state_dict(), "optimizer": {}, "epoch": 2, "log": []}
        torch.save(state, folder / "checkpoint.pt")
        folders.append(folder)
    return folders


def test_main_writes_metrics_and_prints_one_table(runs, capsys):
    evaluation.main([*map(str, runs), "--samples", "20", "--device", "cpu"])
    printed = capsys.readouterr().out
    rows = [line for line in printed.splitlines() if line.startswith("| MVAE")]
    assert len(rows) == 2 and "| 1 | split | 2 | 2 |" in rows[0] and " ± " in rows[0]
    assert "| 0.5 | split | 2 | 1 |" in rows[1] and "log p(0\\|1)" in printed
    metrics = json.loads((runs[0] / "metrics.json").read_text())
    assert set(metrics["latent_accuracy"]) == {"0", "1"} and metrics["run"]["model"] == "MVAE"
    assert set(metrics["log_likelihood"]) == {"0", "1", "0,1", "0|1", "1|0"}
    assert "pseudo" not in printed  # the data are no greys
    assert sorted(p.name for p in runs[0].iterdir()) == [
        "args.json",
        "checkpoint.pt",
        "metrics.json",
    ]


def damage(folder, how):
    path = folder / ("args.json" if "args" in how else "checkpoint.pt")
    if how == "no folder":
        shutil.rmtree(folder)
    elif how == "a file":
        shutil.rmtree(folder)
        folder.write_text("")
    elif how == "nothing in it":
        shutil.rmtree(folder)
        folder.mkdir()
    elif how.startswith("no"):
        path.unlink()
    elif how == "empty checkpoint":
        path.write_bytes(b"")
    elif how == "args of a wrong type":
        path.write_text(path.read_text().replace('"paired": 1.0', '"paired": "all"'))
    elif how == "args of another version":
        path.write_text(path.read_text().replace('"version": 1', '"version": 2'))
    elif how == "args of another size":
        path.write_text(path.read_text().replace('"latent_dim": 4', '"latent_dim": 5'))
    elif how == "args without options":
        path.write_text(path.read_text().replace('"options"', '"choices"'))
    elif how == "args of an unknown script":
        path.write_text(path.read_text().replace('"mvae"', '"nope"'))
    elif how == "args without data":
        path.write_text(path.read_text().replace("own.npz", "gone.npz"))
    elif how == "args that are a list":
        path.write_text("[1]")
    else:
        path.write_bytes(path.read_bytes()[: 1000 if how == "cut checkpoint" else 40])


@pytest.mark.parametrize(
    "how",
    [
        "no folder",
        "a file",
        "nothing in it",
        "no args",
        "no checkpoint",
        "empty checkpoint",
        "args of a wrong type",
        "cut args",
        "cut checkpoint",
        "args of another version",
        "args of another size",
        "args without options",
        "args of an unknown script",
        "args without data",
        "args that are a list",
    ],
)
def test_a_bad_run_is_one_sentence_and_the_others_are_evaluated(runs, capsys, how):
    damage(runs[0], how)
    with pytest.raises(SystemExit) as stop:
        evaluation.main([*map(str, runs[:2]), "--no-likelihoods", "--device", "cpu"])
    out, err = capsys.readouterr()
    complaints = [line for line in err.splitlines() if not line.startswith("evaluating")]
    assert stop.value.code == 2 and len(complaints) == 1
    assert ("gone.npz" if how == "args without data" else str(runs[0])) in complaints[0]
    assert "| MVAE |" in out and (runs[1] / "metrics.json").exists()
    assert not (runs[0] / "metrics.json").exists()


def test_figures_of_runs_and_their_curve(runs, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    flags = ["--samples", "5", "--figures", str(tmp_path / "figures"), "--device", "cpu"]
    evaluation.main([*map(str, runs), *flags])
    made = {p.name for p in (tmp_path / "figures").iterdir()}
    assert made == {"own-paired.png"} | {
        f"run{k}-{w}.png" for k in range(3) for w in ("latent", "relatedness")
    }


def test_without_matplotlib_the_table_is_printed_all_the_same(runs, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(SystemExit):
        evaluation.main(
            [str(runs[0]), "--no-likelihoods", "--figures", str(tmp_path), "--device", "cpu"]
        )
    out, err = capsys.readouterr()
    assert "| MVAE |" in out and "pip install matplotlib" in err


@pytest.mark.parametrize("name", ["mnist-svhn", *nets.BANDS])
def test_grids_have_a_column_per_digit(name, tmp_path):
    dataset = toy(name)
    model = Perfect([x.shape[1:] for x in dataset.test.bases])
    rows = evaluation.generations(model, dataset)
    assert len(rows) == {"mnist-svhn": 6, "mnist-split": 6, "mnist-split3": 14}[name]
    for label, images in rows:
        if "→" in label:  # generated: 0 to 9
            assert torch.allclose(255 * images[:, 0, 14, 14], 25 * torch.arange(10.0), atol=1e-3)
    pytest.importorskip("matplotlib")
    evaluation.page(rows, "digits", tmp_path / "generation.png")
    assert Image.open(tmp_path / "generation.png").size[0] > 600


def test_models_stand_below_the_same_input():
    right = evaluation.generations(Perfect(SHAPES), toy())
    wrong = evaluation.generations(Perfect(SHAPES, lambda m, digit: 9 - digit), toy())
    rows = evaluation.side_by_side({"A": right, "B": wrong})
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
    evaluation.page(rows, "samples", tmp_path / "joint.png", read)
    assert (tmp_path / "joint.png").stat().st_size > 5000


def test_the_papers_rows_stand_under_ours():
    run = result("SVAE")
    run["run"]["dataset"] = run["data"] = "mnist-split"
    run["accuracy"] = {"top": 0.5, "bottom": 0.5, "both": 0.5}
    row = [
        line for line in evaluation.table([run], paper=True).splitlines() if "SVAE, paper" in line
    ]
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
    run = result()["run"] | {"dataset": "mnist-svhn", "options": {}} | setting
    row = evaluation.paper_row(run, ["mnist→svhn", "latent mnist"])
    assert " ".join(row[:2] + row[6:]) == shown


def test_a_curve_has_a_line_per_model_setting_and_fraction(tmp_path, monkeypatch):
    plt = pytest.importorskip("matplotlib.pyplot")
    monkeypatch.setattr(plt, "close", lambda figure: None)

    def lines(results, **options):
        evaluation.curves(results, tmp_path, **options)
        ax = plt.gcf().axes[0]
        return {a.get_label(): (a.get_color(), *map(tuple, a.get_data())) for a in ax.lines}

    fractions = [result(m, s, f, f / 2 + s / 100) for m in ("MEME", "MVAE") for s in (0, 2)
                 for f in (0.25, 1)]  # fmt: skip
    found = lines(fractions)
    assert found["MEME split"] == (evaluation.COLOURS["MEME"], (0.25, 1), (0.135, 0.51))
    assert found["MVAE split"][0] == evaluation.COLOURS["MVAE"] and len(found) == 2
    runs = [(1.0, 0.9, "all", 5), (0.5, 0.8, "all", 5), (0.5, 0.1, "all", 1), (1.0, 0.7, "none", 5)]
    runs += [(0.5, 0.6, "none", 5), (0.5, 0.2, "split", 5)]
    unlike = [
        result("SVAE", 0, f, share, unpaired=u, epochs=e) | {"epoch": e} for f, share, u, e in runs
    ]
    found = lines(unlike)
    assert found["SVAE epoch=5 all"][1:] == ((0.5, 1), (0.8, 0.9))
    assert found["SVAE epoch=1 all"][1:] == ((0.5,), (0.1,))
    assert found["SVAE epoch=5 none"][1:] == ((0.5, 1), (0.6, 0.7))
    assert found["SVAE epoch=5 split"][1:] == ((0.5, 1), (0.2, 0.7))  # the end is that of none
    pseudo = [result(paired=f, share=f / n, pseudo_samples=n) for f in (0.25, 0.5) for n in (1, 10)]
    found = lines(pseudo, against="pseudo_samples")
    assert found["MEME split f = 0.25"][1:] == ((1, 10), (0.25, 0.025))
    assert found["MEME split f = 0.5"][1:] == ((1, 10), (0.5, 0.05))
    epochs = [result(share=0.1 * n, epochs=n) | {"epoch": n} for n in (1, 2)]
    assert lines(epochs, against="epochs")["MEME split f = 1"][1:] == ((1, 2), (0.1, 0.2))
    for flag in ("spec", "nothing", "unpaired"):
        with pytest.raises(ValueError, match=f"--against {flag}"):
            lines(pseudo, against=flag)
    plt.close("all")


# ----------------------------------------------------------------------------------------- the loop


@pytest.fixture
def arrays(tmp_path):
    """A user's data of two modalities: 5 floats and 4 bits that depend on one latent number."""
    rng = np.random.default_rng(0)
    z = {part: rng.normal(size=(n, 1)) for part, n in (("train", 96), ("test", 32))}
    path = tmp_path / "own.npz"
    np.savez(path, **{f"{p}_0": (v + 0.1 * rng.normal(size=(len(v), 5))).astype(np.float32) for p, v in z.items()},
             **{f"{p}_1": v + 0.1 * rng.normal(size=(len(v), 4)) > 0 for p, v in z.items()})  # fmt: skip
    return path


def train(script, *flags):
    SCRIPTS[script].main([str(flag) for flag in flags])


def weights(run):
    return torch.load(Path(run) / "checkpoint.pt", weights_only=True)["model"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_each_script_trains_and_writes_its_run(script, arrays, tmp_path, capsys):
    run = tmp_path / "run"
    train(
        script,
        "--dataset",
        arrays,
        "--paired",
        0.5,
        "--epochs",
        3,
        "--batch-size",
        16,
        "--lr",
        1e-2,
        "--out",
        run,
    )
    rows = (run / "log.csv").read_text().splitlines()
    assert rows[0].startswith("epoch,objective,nats_0,nats_1") and len(rows) == 4
    values = [float(row.split(",")[1]) for row in rows[1:]]
    assert values[2] > values[0]  # it learns
    args = json.loads((run / "args.json").read_text())
    assert args["script"] == script and args["spec"]["name"] == "npz"
    model = getattr(SCRIPTS[script], args["model"])(
        nets.modalities(**args["spec"]), args["latent_dim"], **args["options"]
    )
    model.load_state_dict(weights(run))
    assert "python eval.py" in capsys.readouterr().out


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_resumed_run_ends_with_the_same_bits(script, arrays, tmp_path):
    flags = ["--dataset", arrays, "--paired", 0.5, "--batch-size", 32]
    train(script, *flags, "--epochs", 3, "--out", tmp_path / "a")
    train(script, *flags, "--epochs", 1, "--out", tmp_path / "b")
    train(script, *flags, "--epochs", 3, "--out", tmp_path / "b", "--resume")
    a, b = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert all(torch.equal(a[key], b[key]) for key in a)
    refused(script, *flags, "--epochs", 2, "--out", tmp_path / "b", "--resume")  # it has three
    assert json.loads((tmp_path / "b" / "args.json").read_text())["epochs"] == 3
    train(script, *flags, "--epochs", 3, "--out", tmp_path / "c", "--seed", 1)
    c = weights(tmp_path / "c")
    assert not all(torch.equal(a[key], c[key]) for key in a)


def refused(script, *flags, code=2):
    with pytest.raises(SystemExit) as stopped:
        train(script, *flags)
    assert stopped.value.code == code


def test_every_mistake_is_one_sentence_and_loses_nothing(arrays, tmp_path, capsys):
    run = tmp_path / "run"
    train("meme", "--dataset", arrays, "--epochs", 1, "--out", run)
    before = (run / "checkpoint.pt").read_bytes()
    for flags, match in [
        (["--paired", 0], "--paired"), (["--paired", 1.5], "--paired"), (["--paired", "nan"], "--paired"),
        (["--unpaired", "nope"], "--unpaired"), (["--dataset", "nope"], "no data set"), (["--epochs", 0], "--epochs"),
        (["--lr", "inf"], "--lr"), (["--seed", -1], "--seed"), (["--likelihoods", "laplace"], "--likelihoods"),
        (["--likelihoods", "laplace,nope"], "no likelihood"), (["--weights", "1,x"], "x"), (["--nope"], "--nope"),
        (["--direction", "nope"], "--direction"), (["--paired", 0.001], "none paired"), ([], "holds a run"),
        (["--out", tmp_path / "absent", "--resume"], "no run to resume"), (["--seed", 1, "--resume"], "seed"),
        (["--direction", "0", "--paired", 0.5, "--out", tmp_path / "new"], "--direction 0"),
    ]:  # fmt: skip
        out = run if "holds" in match or "--resume" in flags else tmp_path / "new"
        refused("meme", "--dataset", arrays, "--out", out, *flags)
        message = capsys.readouterr().err
        assert match in message and "Traceback" not in message
    refused("mvae", "--dataset", arrays, "--out", run, "--resume")
    assert "script" in capsys.readouterr().err
    refused("vaevae", "--dataset", arrays, "--out", tmp_path / "new", "--unpaired", "split")
    assert "--unpaired all" in capsys.readouterr().err
    assert not (tmp_path / "new").exists() and not (tmp_path / "absent").exists()
    assert (run / "checkpoint.pt").read_bytes() == before


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_epoch(arrays, tmp_path, capsys):
    run, flags = tmp_path / "run", ["--dataset", arrays, "--paired", 0.5]
    train("mvae", *flags, "--epochs", 1, "--out", run)
    good = weights(run)
    refused("mvae", *flags, "--epochs", 30, "--lr", 1e20, "--out", run, "--resume")
    message = capsys.readouterr().err
    assert "epoch" in message and "step" in message and "--resume" in message
    kept = torch.load(run / "checkpoint.pt", weights_only=True)
    assert all(w.isfinite().all() for w in kept["model"].values())
    assert kept["epoch"] > 1 or all(torch.equal(good[key], kept["model"][key]) for key in good)
    train("mvae", *flags, "--epochs", kept["epoch"] + 1, "--lr", 1e-4, "--out", run, "--resume")


def test_tiny_cases_give_sensible_numbers(arrays, tmp_path):
    for script in SCRIPTS:  # batches of one, a stream smaller than its share, K = 1, L = 1
        flags = ["--dataset", arrays, "--paired", 0.1, "--unpaired", "all", "--limit", 20]
        flags += ["--batch-size", 1, "--latent-dim", 1, "--epochs", 1, "--out", tmp_path / script]
        train(script, *flags, *(["--samples", 1] if script in ("meme", "mmvae") else []))
        row = (tmp_path / script / "log.csv").read_text().splitlines()[1].split(",")
        assert all(math.isfinite(float(value)) for value in row)


@pytest.mark.parametrize("unpaired", ["split", "0", "all", "rest", "none"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_one_percent_of_pairs_trains_or_is_refused_in_a_sentence(
    script, unpaired, arrays, tmp_path, capsys
):
    flags = ["--dataset", arrays, "--paired", 0.01, "--unpaired", unpaired, "--batch-size", 5]
    flags += ["--epochs", 1, "--out", tmp_path / "run"]
    if script == "vaevae" and unpaired in ("0", "none"):  # no stream of modality 1 alone
        refused(script, *flags)
        assert "--objective svae" in capsys.readouterr().err
    else:
        train(script, *flags)
        assert all(w.isfinite().all() for w in weights(tmp_path / "run").values())


def test_the_data_s_own_mask_is_used_and_refuses_a_fraction(tmp_path, capsys):
    rng = np.random.default_rng(0)
    mask = np.array([[1, 1]] * 10 + [[1, 0]] * 10 + [[0, 1]] * 10, bool)
    hidden = rng.normal(size=(30, 5))
    hidden[10:20] = np.nan  # hidden entries may be anything
    np.savez(tmp_path / "m.npz", train_0=rng.normal(size=(30, 4)), train_1=hidden, train_mask=mask,
             test_0=rng.normal(size=(5, 4)), test_1=rng.normal(size=(5, 5)))  # fmt: skip
    train("mvae", "--dataset", tmp_path / "m.npz", "--epochs", 1, "--out", tmp_path / "run")
    args = json.loads((tmp_path / "run" / "args.json").read_text())
    assert args["note"] == "train_mask hides 33% of the arrays"
    refused("mvae", "--dataset", tmp_path / "m.npz", "--paired", 0.5, "--out", tmp_path / "other")
    assert "train_mask" in capsys.readouterr().err


def test_amp_is_within_one_percent_of_float32(arrays, tmp_path):
    model, xs = meme.MEME(nets.modalities("glyphs"), 4, samples=3), images("glyphs", 8)
    torch.manual_seed(1)
    plain = model([(1.0, xs)])
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model([(1.0, xs)])
    assert mixed.dtype == torch.float32
    assert mixed.item() == pytest.approx(plain.item(), rel=0.01)
    train("mvae", "--dataset", arrays, "--epochs", 1, "--amp", "--out", tmp_path / "run")


RANK = """
import sys, torch
sys.path.insert(0, {here!r})
import data, mvae, nets
rank, world, seed = int(sys.argv[1]), int(sys.argv[2]), 3
torch.set_num_threads(1)
torch.distributed.init_process_group("gloo", init_method={url!r}, rank=rank, world_size=world)
torch.randn_like = torch.zeros_like
split = data.Split([torch.linspace(-1, 1, 33).view(11, 3), torch.linspace(-2, 1, 22).view(11, 2)])
streams = data.pairing(11, ("0", "1"), 0.5, "split")
torch.manual_seed(0)
model = mvae.MVAE(nets.modalities("npz", shapes=dict([("0", [3]), ("1", [2])])), 2)
net = torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
for batch in data.batches(split, streams, 7, "natural", torch.Generator().manual_seed(1), rank,
world):
    net(batch).sum().backward()
if rank == 0:
    torch.save([w.grad for w in model.parameters()], {out!r})
"""


def test_two_processes_give_the_gradients_of_one(tmp_path):
    found = []
    for world in (1, 2):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            url = f"tcp://127.0.0.1:{free.getsockname()[1]}"
        out = str(tmp_path / f"{world}.pt")
        code = RANK.format(here=str(HERE), url=url, out=out)
        ranks = [
            subprocess.Popen([sys.executable, "-c", code, str(r), str(world)]) for r in range(world)
        ]
        assert [p.wait(120) for p in ranks] == [0] * world
        found.append(torch.load(out, weights_only=True))
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_a_script_trains_with_everything_optional_missing(arrays, tmp_path):
    code = (
        "import sys\n"
        "for name in ('scipy', 'matplotlib', 'sklearn', 'rdkit', 'torchvision', 'PIL'):\n"
        "    sys.modules[name] = None\n"
        f"sys.path.insert(0, {str(HERE)!r})\n"
        "import meme\n"
        f"meme.main(['--dataset', {str(arrays)!r}, '--epochs', '1', '--out', {str(tmp_path / 'run')!r}])\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    assert (tmp_path / "run" / "checkpoint.pt").exists()


# -------------------------------------------------------------------- nothing lost, nothing let in

KILLER = """
import json, os, random, shutil, signal, sys, time, traceback
sys.path.insert(0, {here!r})
import torch
import torch._dynamo  # Adam imports it: once, before the forks
import {script} as script

torch.set_num_threads(1)
world, rng = {world}, random.Random({seed})


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def inside(how, call):
    '''Dies in the call-th write of a file: in the middle of it, or around its renaming.'''
    write, replace, count = script.write, os.replace, [0]

    def torn(path, content):
        count[0] += 1
        if count[0] == call and how == "middle":
            with open(path.with_name(path.name + ".part"), "wb") as file:
                file.write(content[: len(content) // 2])
            die()
        write(path, content)

    def renamed(a, b):
        if count[0] == call and how == "before":
            die()
        replace(a, b)
        if count[0] == call and how == "after":
            die()

    script.write, os.replace = torn, renamed


def start(run, port, *more, prepare=lambda: None):
    ranks = []
    for rank in range(world):
        ranks.append(os.fork())
        if ranks[-1]:
            continue
        if world > 1:
            os.environ |= dict(RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        sys.stdout, sys.stderr = open(os.devnull, "w"), open(run + ".err", "a")
        code = 1
        try:
            if rank == 0:
                prepare()
            script.main([*{flags!r}, "--out", run, *more])
            code = 0
        except SystemExit as end:
            code = end.code
        except BaseException:
            traceback.print_exc()
        sys.stderr.flush()
        os._exit(code)
    return ranks


def ends(ranks):
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in ranks]


def content(run):
    saved = torch.load(os.path.join(run, "checkpoint.pt"), weights_only=True)
    tensors = list(saved["model"].values())
    for state in saved["optimizer"]["state"].values():
        tensors += state.values()
    log = [[v for k, v in row.items() if "second" not in k] for row in saved["log"]]
    return tensors, [saved["epoch"], log]


def same(a, b):
    return a[1] == b[1] and len(a[0]) == len(b[0]) and all(map(torch.equal, a[0], b[0]))


ports = iter({ports!r})
began = time.time()
assert ends(start({out!r} + "/whole", next(ports))) == [0] * world
whole, seconds = content({out!r} + "/whole"), time.time() - began
held, killed, codes = 0, 0, []
for k in range({kills}):
    run = {out!r} + f"/{{k}}"
    if {how!r} == "inside":
        point = ["middle", "before", "after"][k % 3], 1 + k // 3 % 9
        ranks = start(run, next(ports), prepare=lambda: inside(*point))
        while os.waitpid(ranks[0], os.WNOHANG) == (0, 0):
            time.sleep(0.005)
        ranks = ranks[1:]
        killed += 1
    else:
        ranks = start(run, next(ports))
        time.sleep(rng.uniform(0, seconds))
    found = []
    for pid in ranks:
        try:
            os.kill(pid, signal.SIGTERM if {how!r} == "term" else signal.SIGKILL)
        except ProcessLookupError:
            pass
        found.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    killed += any(found)
    codes.append(found)
    resume = ["--resume"] if os.path.exists(run + "/args.json") else []
    good = ends(start(run, next(ports), *resume)) == [0] * world and same(content(run), whole)
    good = good and sorted(os.listdir(run)) == ["args.json", "checkpoint.pt", "log.csv"]
    held += good
    if not good:
        print(run, found, open(run + ".err").read()[-2000:], file=sys.stderr)
print(json.dumps([held, killed, codes, "".join(open({out!r} + f"/{{k}}.err").read() for k in range({kills}))]))
"""


def killed_and_resumed(script, arrays, tmp_path, how, kills, world=1):
    """How many of `kills` runs, killed and resumed, end with the bits of one that was not. -> held,
    killed before their end, exit codes, all that was said"""
    flags = ["--dataset", str(arrays), "--paired", "0.5", "--batch-size", "8", "--epochs", "4"]
    flags += ["--device", "cpu"]
    ports = []
    for _ in range(2 * kills + 1 if world > 1 else 0):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            ports.append(free.getsockname()[1])
    code = KILLER.format(
        here=str(HERE), script=script, world=world, flags=flags, out=str(tmp_path), how=how,
        kills=kills, seed=kills + world, ports=ports or [0] * (2 * kills + 1),
    )  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    held, killed, codes, said = json.loads(done.stdout.splitlines()[-1])
    assert held == kills, done.stderr
    print(
        f"{script}, {world} rank(s), {how}: {held} of {kills} held, {killed} killed before the end"
    )
    return killed, codes, said


def test_a_run_killed_at_any_moment_and_resumed_ends_with_the_same_bits(arrays, tmp_path):
    killed_and_resumed("mvae", arrays, tmp_path, "inside", 3)


@slow
@pytest.mark.parametrize("how", ["moment", "inside"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_thirty_runs_killed_and_resumed_end_with_the_same_bits(script, how, arrays, tmp_path):
    killed, _, _ = killed_and_resumed(script, arrays, tmp_path, how, 30)
    assert killed >= 15  # the others were faster


@slow
@pytest.mark.parametrize("how", ["moment", "inside"])
def test_thirty_runs_of_two_ranks_killed_and_resumed_end_with_the_same_bits(how, arrays, tmp_path):
    killed, _, _ = killed_and_resumed("mvae", arrays, tmp_path, how, 30, world=2)
    assert killed >= 15


@slow
def test_a_terminated_run_says_so_and_goes_on_to_the_same_bits(arrays, tmp_path):
    killed, codes, said = killed_and_resumed("mvae", arrays, tmp_path, "term", 30)
    assert "Traceback" not in said and killed >= 15
    assert said.count("stopped") == codes.count([130]) >= 15


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_says_how_to_go_on(number, arrays, tmp_path, capsys, monkeypatch):
    flags = ["--dataset", arrays, "--batch-size", 8, "--out", tmp_path / "run"]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job has none
    train("mvae", *flags[:-1], tmp_path / "whole", "--epochs", 3)
    drawn, count = data.batches, []

    def struck(*args):
        for batch in drawn(*args):
            count.append(1)
            if len(count) == 20:
                signal.raise_signal(number)
            yield batch

    monkeypatch.setattr(data, "batches", struck)
    refused("mvae", *flags, "--epochs", 3, code=130)
    signal.signal(signal.SIGINT, before)
    assert "stopped in epoch 2; add --resume" in capsys.readouterr().err
    train("mvae", *flags, "--epochs", 3, "--resume")
    a, b = weights(tmp_path / "whole"), weights(tmp_path / "run")
    assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("call", ["open", "os.fsync", "os.replace"])
def test_a_write_that_fails_keeps_the_last_checkpoint_whole(
    call, arrays, tmp_path, capsys, monkeypatch
):
    flags, run = ["--dataset", arrays, "--batch-size", 48], tmp_path / "run"
    train("mvae", *flags, "--epochs", 3, "--out", tmp_path / "whole")
    train("mvae", *flags, "--epochs", 1, "--out", tmp_path / "first")
    module, name = (os, call[3:]) if call.startswith("os.") else (mvae, call)
    usual = getattr(module, name, open)
    for at in range(1, 8):  # args.json; then checkpoint.pt and log.csv, at first and in each epoch
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(tmp_path / "first", run)
        count = []

        def fails(*args, at=at, count=count):
            if call != "open" or args[1] == "wb":
                count.append(1)
                if len(count) >= at:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return usual(*args)

        monkeypatch.setattr(module, name, fails, raising=False)
        refused("mvae", *flags, "--epochs", 3, "--out", run, "--resume")
        monkeypatch.setattr(module, name, usual, raising=False)
        message = capsys.readouterr().err
        assert str(run) in message and "No space left" in message and "Traceback" not in message
        kept = torch.load(run / "checkpoint.pt", weights_only=True)
        assert kept["epoch"] == 1 + max(0, (at - 3) // 2) == len(kept["log"])
        assert sorted(p.name for p in run.iterdir()) == ["args.json", "checkpoint.pt", "log.csv"]
    train("mvae", *flags, "--epochs", 3, "--out", run, "--resume")
    a, b = weights(tmp_path / "whole"), weights(run)
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_a_file_that_may_not_grow_keeps_the_last_checkpoint_whole(arrays, tmp_path, capsys):
    resource = pytest.importorskip("resource")
    run = tmp_path / "run"
    train("mvae", "--dataset", arrays, "--epochs", 1, "--out", run)
    before = (run / "checkpoint.pt").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:  # the kernel refuses, in the middle of the file
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
        refused("mvae", "--dataset", arrays, "--epochs", 2, "--out", run, "--resume")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(run) in capsys.readouterr().err
    assert (run / "checkpoint.pt").read_bytes() == before
    assert not list(run.glob("*.part"))


def test_a_folder_that_may_not_be_written_is_named(arrays, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    refused("mvae", "--dataset", arrays, "--out", tmp_path / "file" / "run")
    assert str(tmp_path / "file" / "run") in capsys.readouterr().err
    with tempfile.TemporaryDirectory() as open_to_all:
        os.chmod(open_to_all, 0o755)
        run, own = Path(open_to_all, "run"), shutil.copy(arrays, open_to_all)
        os.chmod(own, 0o644)
        train("mvae", "--dataset", own, "--epochs", 1, "--out", run)
        before, user = (run / "checkpoint.pt").read_bytes(), os.geteuid()
        os.chmod(run, 0o555)
        try:
            if user == 0:  # whom mode bits do not bind
                os.seteuid(65534)
            refused("mvae", "--dataset", own, "--epochs", 2, "--out", run, "--resume")
        finally:
            os.seteuid(user)
            os.chmod(run, 0o755)
        message = capsys.readouterr().err
        assert str(run) in message and "Permission denied" in message
        assert (run / "checkpoint.pt").read_bytes() == before


@slow
def test_a_full_disk_keeps_the_last_checkpoint_whole(arrays, tmp_path, capsys):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small disk")
    try:
        flags = ["--dataset", arrays, "--latent-dim", 2, "--out", disk / "run"]
        train("mvae", *flags, "--epochs", 1)
        before = (disk / "run" / "checkpoint.pt").read_bytes()
        with pytest.raises(OSError), open(disk / "rest", "wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        refused("mvae", *flags, "--epochs", 2, "--resume")
        message = capsys.readouterr().err
        assert str(disk / "run") in message and "No space left" in message
        assert (disk / "run" / "checkpoint.pt").read_bytes() == before
        (disk / "rest").unlink()
        train("mvae", *flags, "--epochs", 2, "--resume")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize(
    "script, lr", [("meme", 1e3), ("vaevae", 1e3), ("mmvae", 1e3), ("svae", 1e5), ("mvae", 1e20)]
)
def test_a_run_that_diverges_goes_on_from_its_last_finite_epoch(
    script, lr, arrays, tmp_path, capsys
):
    flags = ["--dataset", arrays, "--paired", 0.5, "--batch-size", 16, "--out", tmp_path / "run"]
    flags += ["--unpaired", "all"]
    train(script, *flags, "--epochs", 1)
    good = weights(tmp_path / "run")
    refused(script, *flags, "--epochs", 8, "--lr", lr, "--resume")
    said = r"epoch 2: the loss of (0|1|0\+1) is -?(nan|inf) in step \d+; epoch 1 is kept: --resume --lr"
    assert re.search(said, capsys.readouterr().err)
    kept = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert kept["epoch"] == 1 and all(torch.equal(good[k], w) for k, w in kept["model"].items())
    train(script, *flags, "--epochs", 3, "--lr", 1e-4, "--resume")
    rows = (tmp_path / "run" / "log.csv").read_text().splitlines()[1:]
    values = [float(row.split(",")[1]) for row in rows]
    assert len(values) == 3 and all(map(math.isfinite, values))


def test_a_loss_that_is_not_finite_is_named_by_epoch_step_and_stream(
    arrays, tmp_path, capsys, monkeypatch
):
    objective, count = mvae.MVAE.objective, []

    def poisoned(self, *xs):
        count.append(xs[0] is None)
        return objective(self, *xs) * (math.nan if sum(count) == 14 and xs[0] is None else 1)

    flags = ["--dataset", arrays, "--paired", 0.5, "--batch-size", 8, "--out", tmp_path / "run"]
    monkeypatch.setattr(mvae.MVAE, "objective", poisoned)
    refused("mvae", *flags, "--epochs", 2)  # twelve steps an epoch
    assert "epoch 2: the loss of 1 is nan in step 2; epoch 1 is kept" in capsys.readouterr().err


class Code:
    """Pickled, it makes a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_nothing_that_is_loaded_executes_code(runs, arrays, tmp_path, capsys):
    run, bad = tmp_path / "run", Code(tmp_path / "executed")
    train("mvae", "--dataset", arrays, "--epochs", 1, "--out", run)
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    for put in (lambda f: torch.save(state | {"log": bad}, f), lambda f: pickle.dump(bad, f)):
        with open(run / "checkpoint.pt", "wb") as file:
            put(file)
        refused("mvae", "--dataset", arrays, "--out", run, "--resume")
        assert f"{run} holds no run to resume" in capsys.readouterr().err
        with pytest.raises(ValueError, match="cannot be loaded"):
            evaluation.load_run(run)
    (runs[0] / "args.json").write_text(
        (runs[0] / "args.json").read_text().replace('"mvae"', '"this"')
    )
    with pytest.raises(ValueError, match="no script 'this'"):
        evaluation.load_run(runs[0])
    assert "this" not in sys.modules
    objects = np.array([bad], object)
    for name, keys in [
        ("own.npz", ["train_0", "train_1", "test_0", "test_1"]),
        ("svhn.npz", ["train_x", "train_y", "test_x", "test_y"]),
        ("features.npz", ["weights", "normalise", "files", "train", "readable", "x"]),
        ("spectra.npz", ["version", *(f"{p}_{k}" for p in ("train", "test")
                                      for k in ("offsets", "columns", "values", "rows", "bits"))]),
    ]:  # fmt: skip
        path = tmp_path / "data" / ("spectra" if name == "spectra.npz" else "") / name
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, **{key: objects for key in keys})
        load = {"own.npz": data.load_npz, "features.npz": data.read_features}.get(name)
        with pytest.raises(ValueError, match="plain arrays"):
            load(path) if load else {"svhn.npz": data.svhn, "spectra.npz": data.load_spectra}[name](
                tmp_path / "data"
            )
    words = tmp_path / "data" / "cub" / "words.npz"
    words.parent.mkdir()
    np.savez(words, digest=objects, vectors=objects)
    captions = torch.tensor([[3, 4, 3, 4, 2] + [1] * 27] * 20)
    evaluation.cached_word_vectors(tmp_path / "data", captions, [*data.SPECIALS, "a", "b"])
    assert not (tmp_path / "executed").exists()


def npy(shape, dtype="<f4", content=b""):
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        file, {"descr": dtype, "fortran_order": False, "shape": shape}
    )
    return file.getvalue() + content


def test_bombs_are_refused_before_they_fill_the_memory(tmp_path, monkeypatch):
    path, content = tmp_path / "own.npz", npy((4, 4), content=bytes(64))
    for shape in [(1 << 40, 4), (1 << 31, 1 << 31, 1 << 31), (1 << 28, 1)]:
        with zipfile.ZipFile(path, "w") as packed:
            for name in ("train_0", "train_1", "test_0", "test_1"):
                packed.writestr(f"{name}.npy", npy(shape) if name == "train_1" else content)
        with pytest.raises(ValueError, match="own.npz"):
            data.load(str(path))
    monkeypatch.setattr(data, "MOST_BYTES", 2**20)
    arrays = dict(train_0=np.zeros((1024, 1024), np.float32), train_1=np.zeros((1024, 1)))
    np.savez_compressed(path, **arrays, test_0=np.zeros((2, 1024)), test_1=np.zeros((2, 1)))
    assert path.stat().st_size < 6000
    with pytest.raises(ValueError, match="unpack to 4,"):
        data.load(str(path))
    monkeypatch.setattr(data, "MOST_UNPACKED", 100_000)
    info = tarfile.TarInfo("a.txt")
    info.size = 200_000
    archive(tmp_path / "bomb.tgz", None, [(info, bytes(info.size))])
    with pytest.raises(ValueError, match="unpacks to more than"):
        data.unpack(tmp_path / "bomb.tgz", tmp_path / "cub" / "x", ".", ".txt")
    assert not list((tmp_path / "cub").iterdir())
    Image.new("1", (1, 60_000)).save(tmp_path / "strip.png")  # scaled to 224 pixels' width: 9 GB
    assert data.read_photo(tmp_path / "strip.png", lambda image: 1 / 0) is None


def test_a_checkpoint_that_is_not_of_this_run_is_refused_with_the_difference(
    arrays, tmp_path, capsys
):
    flags = ["--dataset", arrays, "--epochs", 1, "--out"]
    train("mvae", *flags, tmp_path / "run", "--latent-dim", 4)
    train("mvae", *flags, tmp_path / "size", "--latent-dim", 5)
    train("mmvae", *flags, tmp_path / "script", "--latent-dim", 4)
    other = shutil.copy(arrays, tmp_path / "other.npz")
    for more, words in [
        (["--dataset", other], ["dataset", "other.npz", "own.npz"]), (["--latent-dim", 5], ["latent_dim 4, not 5"]),
        (["--anneal", 2], ["anneal 0, not 2"]), (["--limit", 20], ["limit None, not 20"]),
    ]:  # fmt: skip
        refused("mvae", *flags, tmp_path / "run", "--resume", *more)
        assert all(word in capsys.readouterr().err for word in words[:1]), words
    refused("svae", *flags, tmp_path / "run", "--resume")
    assert "script mvae, not svae" in capsys.readouterr().err
    for name, words in [("size", "decoders.0.net.0.weight"), ("script", "Missing key")]:
        shutil.copy(tmp_path / name / "checkpoint.pt", tmp_path / "run")
        refused("mvae", *flags, tmp_path / "run", "--resume")
        message = capsys.readouterr().err
        assert "does not fit this model" in message and len(message.splitlines()) == 2
        assert "size mismatch" in message if name == "size" else words in message


@pytest.mark.parametrize("count", [20, pytest.param(1000, marks=slow)])
def test_a_checkpoint_with_a_flipped_bit_is_refused_or_the_same(count, arrays, tmp_path):
    run, rng = tmp_path / "run", np.random.default_rng(0)
    train("mvae", "--dataset", arrays, "--epochs", 1, "--out", run)
    good, before = (run / "checkpoint.pt").read_bytes(), weights(run)
    refusals = 0
    for _ in range(count):
        bad = bytearray(good)
        bad[rng.integers(len(bad))] ^= 1 << rng.integers(8)
        (run / "checkpoint.pt").write_bytes(bad)
        try:
            train("mvae", "--dataset", arrays, "--epochs", 1, "--out", run, "--resume")
        except SystemExit as stopped:
            assert stopped.code == 2
            refusals += 1
        else:
            after = weights(run)
            assert all(torch.equal(before[key], after[key]) for key in before)
    assert refusals > 0.8 * count


def forked(call):
    """A process that does it. -> its id; its end: 0, or 2 after a ValueError"""
    pid = os.fork()
    if not pid:
        code = 1
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            call()
            code = 0
        except ValueError:
            code = 2
        finally:
            os._exit(code)
    return pid


def ended(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def packed_birds(tmp_path, monkeypatch):
    source, root = originals(tmp_path / "source"), tmp_path / "root"
    (source / "cvpr2016_cub").mkdir()
    for path in [source / "text_c10", *source.glob("*classes.txt")]:
        path.rename(source / "cvpr2016_cub" / path.name)
    (root / "cub").mkdir(parents=True)
    archive(root / "cub" / "cvpr2016_cub.tar.gz", source / "cvpr2016_cub")
    archive(root / "cub" / "CUB_200_2011.tgz", source / "CUB_200_2011")
    monkeypatch.setattr(data, "CUB_MD5", data.md5(root / "cub" / "CUB_200_2011.tgz"))
    return root


@pytest.mark.parametrize("count", [3, pytest.param(30, marks=slow)])
def test_processes_that_prepare_the_same_data_at_once_all_end_with_it(
    count, tmp_path, small_net, monkeypatch
):
    root = packed_birds(tmp_path, monkeypatch)
    extract = data.extract
    monkeypatch.setattr(data, "extract", lambda *a, **k: extract(*a, **k, every=-1, batch_size=2))
    for _ in range(count):
        shutil.copytree(root, tmp_path / "copy")
        pids = [forked(lambda: data.prepare_cub(tmp_path / "copy", "none")) for _ in range(3)]
        assert [ended(pid) for pid in pids] == [0, 0, 0]
        found = sorted(p.name for p in (tmp_path / "copy" / "cub").iterdir())
        assert [n for n in found if n != "features.partial.npz"] == [
            "CUB_200_2011", "CUB_200_2011.tgz", "cvpr2016_cub", "cvpr2016_cub.tar.gz", "features.npz",
        ]  # fmt: skip
        assert len(data.load("cub", tmp_path / "copy").train) == 40
        shutil.rmtree(tmp_path / "copy")


@pytest.mark.parametrize("count", [5, pytest.param(60, marks=slow)])
def test_a_preparation_killed_at_any_moment_leaves_a_whole_file_or_none(
    count, tmp_path, small_net, monkeypatch
):
    root, rng = packed_birds(tmp_path, monkeypatch), np.random.default_rng(0)
    extract = data.extract
    monkeypatch.setattr(data, "extract", lambda *a, **k: extract(*a, **k, every=-1, batch_size=2))
    shutil.copytree(root, tmp_path / "copy")
    began = time.perf_counter()
    assert ended(forked(lambda: data.prepare_cub(tmp_path / "copy", "none"))) == 0
    seconds = time.perf_counter() - began
    whole = data.read_features(tmp_path / "copy" / "cub" / "features.npz")
    for _ in range(count):
        shutil.rmtree(tmp_path / "copy")
        shutil.copytree(root, tmp_path / "copy")
        pid = forked(lambda: data.prepare_cub(tmp_path / "copy", "none"))
        time.sleep(rng.uniform(0, seconds))
        os.kill(pid, signal.SIGKILL)
        ended(pid)
        cub = tmp_path / "copy" / "cub"
        for path in cub.glob("features*.npz"):
            data.read_features(path)
        for folder, names in (("CUB_200_2011", "images/*/*.jpg"), ("cvpr2016_cub", "text_c10/*/*")):
            assert len(list((cub / folder).glob(names))) in (0, 6)
        data.prepare_cub(tmp_path / "copy", "none")
        again = data.read_features(cub / "features.npz")
        assert all(np.array_equal(whole[key], again[key]) for key in whole)


def test_mnist_appears_when_all_of_it_is_there(small_root, tmp_path, monkeypatch):
    import torchvision

    source = {p.name: p.read_bytes() for p in (small_root / "MNIST" / "raw").iterdir()}

    def slowly(self):
        for name, content in source.items():
            (Path(self.raw_folder) / name).write_bytes(content[: len(content) // 2])
            if len(made) == 2 and name == list(source)[2]:
                raise KeyboardInterrupt
            (Path(self.raw_folder) / name).write_bytes(content)
            made.append(name)

    made, root = [], tmp_path / "new"
    monkeypatch.setattr(torchvision.datasets.MNIST, "download", slowly)
    monkeypatch.setattr(torchvision.datasets.MNIST, "_check_exists", lambda self: True)
    monkeypatch.setattr(torchvision.datasets.MNIST, "_load_data", lambda self: (None, None))
    with pytest.raises(KeyboardInterrupt):
        data.load("mnist-split", root)
    assert not [p for p in root.rglob("*") if p.is_file()]
    assert len(data.load("mnist-split", root).train) == 60
    assert sorted(p.name for p in (root / "MNIST" / "raw").iterdir()) == sorted(source)


# Fuzzing: whatever the arguments and the files, a step or a sentence.

WHOLE = [
    "1",
    "2",
    "3",
    "7",
    "0",
    "-1",
    "2147483647",
    "2147483648",
    "1e3",
    "x",
    "",
    "1_0",
    "nan",
    "9" * 20,
]
REAL = [
    "1",
    "0.5",
    "0",
    "-1",
    "nan",
    "inf",
    "-inf",
    "1e-320",
    "1e320",
    "x",
    "",
    "1e3",
    "1e38",
    "0.1",
]
FLAGS = {
    "--dataset": ["own.npz", "own.npz", "three.npz", "mask.npz", "cut.npz", "dir.npz", "none.npz",
                  "nope", "", "glyphs", "mnist-split", "mnist-svhn", "cub", "spectra", "a" * 300 + ".npz"],
    "--data": [".", "none", "file", "", "a" * 300],
    "--paired": [*REAL, "0.5", "0.5"], "--sampling": ["natural", "balanced", "x"],
    "--unpaired": ["split", "all", "rest", "none", "0", "1", "2", "nope", "", "a/b", "--"],
    "--epochs": WHOLE, "--batch-size": WHOLE, "--lr": REAL, "--latent-dim": WHOLE, "--width": REAL,
    "--likelihoods": ["laplace,laplace", "bernoulli,bernoulli", "normal", "categorical,laplace", "",
                      ",", "laplace,normal,laplace", "x,y"],
    "--weights": ["1,1", "0,0", "nan,1", "1", "-1,1", "", "1e38,1e38", "x,1", "1,2,3", "inf,1"],
    "--seed": WHOLE, "--limit": WHOLE, "--device": ["cpu", "cuda", "x"], "--amp": [None],
    "--no-amp": [None], "--compile": [None], "--resume": [None], "--nope": [None, "1"], "stray": [None],
    "--out": ["file", "file/x", "a" * 300, "", "dir.npz", "deep/er/x", "new"],
}  # fmt: skip
OWN_FLAGS = {
    "meme": {"--samples": WHOLE, "--kl": ["closed", "sample", "x"], "--classifier-scale": REAL,
             "--full-gradient": [None], "--direction": ["0", "1", "2", "x", ""],
             "--pseudo-samples": WHOLE, "--explicit": ["mixture", "product", "x"]},
    "svae": {"--objective": ["svae", "vaevae", "x"], "--prior-expert": [None]},
    "vaevae": {"--objective": ["svae", "vaevae", "x"], "--variant": ["a", "b", "x"]},
    "mmvae": {"--objective": ["iwae", "elbo", "dreg", "x"], "--samples": WHOLE, "--tight": [None],
              "--posterior": ["normal", "laplace", "x"]},
    "mvae": {"--subsets": WHOLE, "--anneal": WHOLE},
}  # fmt: skip


@pytest.fixture
def odd_folder(tmp_path, monkeypatch):
    """Data sets good and bad in the current folder; no network; runs that end after a step."""
    rng = np.random.default_rng(0)
    for name, m in (("own", 2), ("three", 3), ("mask", 2)):
        found = {}
        for part in ("train", "test"):
            xs = rng.normal(size=(24, 5)), rng.random((24, 4)) > 0.5, rng.normal(size=(24, 3))
            found |= {f"{part}_{k}": xs[k] for k in range(m)}
        mask = (
            {"train_mask": np.array([[1, 1], [1, 0], [0, 1]] * 8, bool)} if name == "mask" else {}
        )
        np.savez(tmp_path / f"{name}.npz", **found, **mask)
    (tmp_path / "cut.npz").write_bytes((tmp_path / "own.npz").read_bytes()[:200])
    (tmp_path / "dir.npz").mkdir()
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    drawn, digits, made = data.batches, data.glyphs, {}

    def one(*args):
        yield next(drawn(*args))
        raise KeyboardInterrupt

    def offline(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(data, "batches", one)
    monkeypatch.setattr(data, "glyphs", lambda n, seed: made.setdefault(seed, digits(40, seed)))
    monkeypatch.setattr(torch, "compile", lambda net: net)
    monkeypatch.setattr("torchvision.datasets.MNIST.download", offline)
    monkeypatch.setattr("torchvision.datasets.SVHN.download", offline)


@pytest.mark.parametrize("count", [25, pytest.param(1000, marks=slow)])
@pytest.mark.parametrize("script", SCRIPTS)
def test_any_command_line_trains_a_step_or_ends_in_a_sentence(script, count, odd_folder, capsys):
    rng, ends, flags = random.Random(count), Counter(), FLAGS | OWN_FLAGS[script]
    for k in range(count):
        argv = ["--dataset", rng.choice(["own.npz", "own.npz", "three.npz", "mask.npz"])]
        for flag in rng.sample(list(flags), rng.choice([0, 1, 1, 2, 2, 3, 5])):
            value = rng.choice(flags[flag])
            argv += [flag] if value is None else [flag, value]
        argv += [] if "--out" in argv else ["--out", f"run{k}"]
        with limited_memory(), pytest.raises(SystemExit) as stopped:
            SCRIPTS[script].main(argv)
        said = [line for line in capsys.readouterr().err.splitlines() if line]
        said = [line for line in said if not line.startswith("usage:")]
        assert stopped.value.code in (2, 130) and len(said) == 1, (argv, said)
        assert (stopped.value.code == 130) == ("stopped in epoch" in said[0]), argv
        ends[stopped.value.code] += 1
    assert min(ends[2], ends[130]) > 0.1 * count
    print(f"{script}: {count} command lines, {ends[130]} trained, {ends[2]} refused")


@contextlib.contextmanager
def limited_memory(gigabytes=16):
    """What needs more fails, as on a machine that has no more."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_AS)
    try:
        resource.setrlimit(resource.RLIMIT_AS, (gigabytes << 30, limits[1]))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def mutated(content, rng):
    """Bytes with a few changes: bits flipped, cut, doubled, left out, put in."""
    content = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 5])):
        k, n = rng.randrange(len(content) + 1), rng.choice([1, 1, 4, 50])
        how = rng.choice(["flip", "flip", "head", "cut", "copy", "drop", "insert"])
        if how == "cut":
            del content[k:]
        elif how == "copy":
            content[k:k] = content[k : k + n] * rng.choice([1, 3])
        elif how == "drop":
            del content[k : k + n]
        elif how == "insert":
            noise = bytes(rng.randrange(256) for _ in range(n))
            content[k:k] = rng.choice(
                [noise, b"9" * n, b"\0" * n, b"\n", b'"', b",", b"e308", b"-1", b"nan"]
            )
        elif content:
            k %= min(len(content), 64) if how == "head" else len(content)
            content[k] ^= 1 << rng.randrange(8)
    return bytes(content)


def mutated_arrays(arrays, rng):
    """Arrays of which one has another type, shape or entry, or is gone."""
    arrays = dict(arrays)
    key = rng.choice(sorted(arrays))
    array = np.asarray(arrays.pop(key))
    how = rng.choice(
        ["gone", "type", "entry", "entry", "less", "more", "axis", "scalar", "bytes", "none"]
    )
    if how == "type":
        kind = rng.choice(
            ["u1", "i8", ">i4", "f2", ">f8", "?", "c8", "U3", "S2", "f8", "u4", "M8[s]", "g"]
        )
        with contextlib.suppress(ValueError, TypeError):
            array = array.astype(kind)
    elif how == "entry" and array.size and array.dtype.kind in "buif":
        array = array.copy()
        value = rng.choice([-1, 0, 1, 2, 127, 200, 1 << 40, math.nan, math.inf, -math.inf, 1e300])
        with contextlib.suppress(ValueError, OverflowError):
            array.reshape(-1)[rng.randrange(array.size)] = value
    elif how in ("less", "more") and array.ndim:
        array = array[:-1] if how == "less" else np.concatenate([array, array[:1]])
    elif how == "axis" and array.ndim:
        array = rng.choice(
            [array[None], array[..., None], array.reshape(-1), array[..., :0], array.T]
        )
    elif how == "scalar":
        array = np.array(rng.choice([0, 1.5, "x"]))
    elif how == "none":
        array = array[:0] if array.ndim else array
    if how != "gone":
        arrays[rng.choice([key] * 9 + ["other"])] = array
    file = io.BytesIO()
    np.savez(file, **arrays)
    if how == "bytes":  # a member that is no array, its check sum right
        with zipfile.ZipFile(file, "a") as packed:
            packed.writestr(f"{key}.npy", mutated(npy((2, 3), content=bytes(24)), rng))
    return file.getvalue()


def mutations(path, count, seed=0):
    """`count` times another file in the place of a good one, which is put back."""
    rng, good = random.Random(seed), path.read_bytes()
    arrays = dict(np.load(path)) if path.suffix == ".npz" else None
    for k in range(count):
        path.write_bytes(mutated_arrays(arrays, rng) if arrays and k % 2 else mutated(good, rng))
        yield k
    path.write_bytes(good)


def held(read, path, count):
    """Each mutation is read, or refused in a sentence; none takes long, much memory or a file."""
    folder, ends, before = path.parent, Counter(), sorted(path.parent.iterdir())
    for k in mutations(path, count):
        began = time.perf_counter()
        try:
            with warnings.catch_warnings(), limited_memory(8):
                warnings.simplefilter("ignore")  # of Pillow, on sizes
                read()
            ends["read"] += 1
        except ValueError as error:
            said = str(error)
            assert said and "\n" not in said and len(said) < 700, said
            ends["refused"] += 1
        except Exception:
            shutil.copy(path, folder.parent / f"failed{path.suffix}")
            raise
        assert time.perf_counter() - began < 20
    assert sorted(folder.iterdir()) == before and sum(ends.values()) == count
    print(f"{path.name}: {count} mutations, {dict(ends)}")
    return ends


COUNT = pytest.mark.parametrize("count", [40, pytest.param(1000, marks=slow)])


def used(dataset):
    """Reads every example of a data set, as training and evaluation do."""
    for split in (dataset.train, dataset.test):
        for x in split[torch.arange(len(split))]:
            assert len(x) == len(split)
            assert dataset.mask is not None or not x.is_floating_point() or x.isfinite().all()


@COUNT
@pytest.mark.parametrize("stem", ["train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"])
def test_idx_files_are_read_or_refused(stem, count, small_root):
    path = small_root / "MNIST" / "raw" / stem
    ends = held(lambda: used(data.load("mnist-split", small_root)), path, count)
    assert ends["refused"] > 0.1 * count and ends["read"] > 0.02 * count


@COUNT
def test_svhn_files_are_read_or_refused(count, small_root):
    ends = held(lambda: used(data.load("mnist-svhn", small_root)), small_root / "svhn.npz", count)
    assert ends["refused"] > 0.5 * count


@COUNT
@pytest.mark.parametrize("kind", ["floats", "images", "mask"])
def test_own_arrays_are_read_or_refused(kind, count, tmp_path):
    rng, found = np.random.default_rng(0), {}
    for part in ("train", "test"):
        found |= {f"{part}_0": rng.normal(size=(6, 3)), f"{part}_1": rng.random((6, 4)) > 0.5}
        if kind == "images":
            found[f"{part}_0"] = rng.integers(0, 256, (6, 1, 8, 8), np.uint8)
            found |= {f"{part}_1": rng.random((6, 3, 8, 9)), f"{part}_labels": np.arange(6)}
    if kind == "mask":
        found["train_mask"] = np.array([[1, 1], [1, 0], [0, 1]] * 2, bool)
    np.savez(tmp_path / "own.npz", **found)

    def read():
        dataset = data.load(str(tmp_path / "own.npz"))
        used(dataset)
        mvae.MVAE(nets.modalities(**dataset.spec), 2)(
            [(1.0, data.show(dataset.train, shown, index[:2]))
             for shown, index in data.pairing(len(dataset.train), dataset.names, mask=dataset.mask)]
        )  # fmt: skip

    ends = held(read, tmp_path / "own.npz", count)
    assert ends["refused"] > 0.3 * count and ends["read"] > 0.05 * count


@COUNT
def test_features_and_captions_are_read_or_refused(count, tmp_path, small_net):
    cub = shi(tmp_path)
    data.prepare_cub(tmp_path, "none")
    ends = held(lambda: used(data.load("cub", tmp_path)), cub / "features.npz", count)
    assert ends["refused"] > 0.5 * count
    ends = held(lambda: used(data.load("cub", tmp_path)), cub / "text_testclasses.txt", count)
    assert ends["read"] > 0.3 * count and ends["refused"] > 0.05 * count


@COUNT
def test_photos_are_read_or_skipped(count, tmp_path):
    cub = shi(tmp_path)
    with Image.open(cub / "test" / "003.Auklet" / "0.jpg") as image:
        image.save(cub / "test" / "003.Auklet" / "2.png")
    from torchvision import transforms

    steps = transforms.Compose(
        [transforms.Resize(224), transforms.CenterCrop(224), transforms.ToTensor()]
    )
    for name in ("0.jpg", "2.png"):
        path, found = cub / "test" / "003.Auklet" / name, Counter()

        def read():
            x = data.read_photo(path, steps)
            found["skipped" if x is None else "read"] += 1
            assert x is None or x.shape == (3, 224, 224)

        assert held(read, path, count)["refused"] == 0
        assert found["skipped"] > 0.1 * count


@COUNT
def test_archives_are_unpacked_or_refused(count, tmp_path):
    source = originals(tmp_path / "source")
    for name, mode in (("a.tar", "w"), ("a.tgz", "w:gz"), ("a.tar.xz", "w:xz")):
        (tmp_path / name).mkdir()
        path = tmp_path / name / name
        with tarfile.open(path, mode) as tar:
            tar.add(source / "text_c10", "text_c10")

        def read():
            try:
                data.unpack(path, tmp_path / name / "out" / "x", "text_c10", ".txt")
            finally:
                assert [p.name for p in (tmp_path / name / "out").iterdir()] in ([], ["x"])
                shutil.rmtree(tmp_path / name / "out")

        assert held(read, path, count)["refused"] > 0.1 * count


@pytest.fixture
def no_rdkit(monkeypatch):
    """Fingerprints of letters, so that the readers can be tried without it."""

    def fingerprint(smiles):
        return None if not smiles.isascii() else np.arange(data.BITS) % 7 < len(smiles) % 7

    monkeypatch.setattr(data, "molecule", lambda smiles: smiles)
    monkeypatch.setattr(data, "fingerprint", fingerprint)
    monkeypatch.setattr(data, "inchikey_of", lambda smiles: (smiles.upper() + "A" * 14)[:14])


@COUNT
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ["a.msp", "c.mgf", "candidates.csv", "truth.csv"])
def test_spectra_and_tables_are_read_or_refused(name, packed, count, tmp_path, no_rdkit, capsys):
    folder = tmp_path / "in"
    folder.mkdir()
    files = {"msp": folder / "a.msp"} | challenge_files(folder)
    peaks = ["57.07 100\n71.08 25", "57.07 10; 71.1 2;", '80.1 5 "note"\n99 1']
    files["msp"].write_text("".join(record(s, peaks[k % 3]) for k, s in enumerate(MOLECULES)) * 2)
    path = folder / name
    if packed:
        path.write_bytes(gzip.compress(path.read_bytes()))

    def read():
        shutil.rmtree(tmp_path / "spectra", ignore_errors=True)
        counts = data.prepare_spectra(tmp_path, **files)
        assert (
            counts["train"] + counts["test"] + sum(counts["skipped"].values()) == counts["records"]
        )
        used(data.load("spectra", tmp_path))

    ends = held(read, path, count)
    assert ends["refused" if packed else "read"] > 0.1 * count


@COUNT
def test_prepared_spectra_are_read_or_refused(count, tmp_path, no_rdkit, capsys):
    (tmp_path / "a.msp").write_text("".join(map(record, MOLECULES)))
    data.prepare_spectra(tmp_path, tmp_path / "a.msp", **challenge_files(tmp_path))

    def read():
        used(data.load("spectra", tmp_path))
        found = data.load_challenges(tmp_path)
        if found is not None:
            assert found.spectra[torch.arange(len(found.ids))].isfinite().all()
            assert [found.bits[found.offsets[k] + t].shape for k, t in enumerate(found.truth)]

    ends = held(read, tmp_path / "spectra" / "spectra.npz", count)
    assert ends["refused"] > 0.3 * count


# Small and odd cases


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_seed_gives_its_bits_twice_and_another_seed_others(script, arrays, tmp_path):
    flags = ["--dataset", arrays, "--paired", 0.5, "--batch-size", 48, "--epochs", 1, "--out"]
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        train(script, *flags, tmp_path / name, "--seed", seed)
    a, b, c = (weights(tmp_path / name) for name in "abc")
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not any(torch.equal(a[key], c[key]) for key in a if key.startswith("encoders"))


@pytest.mark.parametrize(
    "script", ["mvae", *(pytest.param(name, marks=slow) for name in SCRIPTS if name != "mvae")]
)
def test_constant_data_gives_finite_numbers(script, tmp_path):
    xs = np.zeros((12, 1, 8, 8), np.uint8), np.full((12, 3, 8, 8), 255, np.uint8)
    np.savez(
        tmp_path / "c.npz", **{f"{p}_{k}": x for p in ("train", "test") for k, x in enumerate(xs)}
    )
    train(script, "--dataset", tmp_path / "c.npz", "--epochs", 30, "--batch-size", 4, "--lr", 1e-2,
          "--latent-dim", 1, "--out", tmp_path / "run", *(["--samples", 1] if script[:2] == "mm" else []))  # fmt: skip
    rows = (tmp_path / "run" / "log.csv").read_text().splitlines()[1:]
    first, last = (list(map(float, rows[k].split(",")[:4])) for k in (0, -1))
    assert all(map(math.isfinite, last)) and last[2] > first[2] and last[3] > first[3]
    assert last[3] > -10  # nats of 192 pixels that are always 1


@pytest.mark.parametrize(
    "script", ["mvae", *(pytest.param(name, marks=slow) for name in SCRIPTS if name != "mvae")]
)
def test_captions_of_unknown_words_alone_train(script, tmp_path, small_net):
    cub = shi(tmp_path)
    for name, photos in (("text_trainvalclasses.txt", 4), ("text_testclasses.txt", 2)):
        (cub / name).write_text("\n".join(f"word{k}" for k in range(10 * photos)) + "\n")
    data.prepare_cub(tmp_path)
    dataset = data.load_cub(tmp_path)
    assert dataset.words == list(data.SPECIALS)
    assert (dataset.train[torch.arange(40)][1][:, :3] == torch.tensor([0, 2, 1])).all()
    flags = ["--dataset", "cub", "--data", tmp_path, "--epochs", 1, "--batch-size", 20]
    train(script, *flags, "--latent-dim", 2, "--out", tmp_path / "run")
    row = (tmp_path / "run" / "log.csv").read_text().splitlines()[1].split(",")
    assert all(math.isfinite(float(value)) for value in row)


def test_a_digit_that_the_test_split_lacks_leaves_the_other_numbers_as_they_are(small_root):
    raw = small_root / "MNIST" / "raw" / "t10k-labels-idx1-ubyte"
    labels = np.frombuffer(raw.read_bytes()[8:], np.uint8).copy()
    labels[labels == 3] = 4
    raw.write_bytes(raw.read_bytes()[:8] + labels.tobytes())
    dataset = data.load("mnist-svhn", small_root)
    assert sorted(set(dataset.test.labels.tolist())) == [0, 1, 2, 4, 5, 6, 7, 8, 9]
    assert len(dataset.test) == 2 * 8 + 3
    whole = toy()
    index = (whole.test.labels != 3).nonzero()[:, 0]
    rows = [r[index] for r in whole.test.rows]
    lacking = whole._replace(test=data.Split(whole.test.bases, rows, whole.test.labels[index]))
    metrics = evaluation.evaluate(Perfect(SHAPES), lacking, READERS)
    assert metrics["cross_coherence"] == {"mnist->svhn": 1, "svhn->mnist": 1}
    assert metrics["joint_coherence"] == 1 and min(metrics["latent_accuracy"].values()) > 0.99


# ---------------------------------------------------------------------------------- the text itself


def functions(script):
    text = (HERE / f"{script}.py").read_text()
    found = {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef):
            lines = text.splitlines()[node.lineno - 1 : node.end_lineno]
            found[node.name] = [line for line in lines if not line.endswith("# this script only")]
    return found


def test_main_is_one_text_and_helpers_of_one_name_have_one_body():
    texts = {}
    for script in SCRIPTS:
        for name, lines in functions(script).items():
            assert texts.setdefault(name, lines) == lines, f"{name} of {script}.py differs"


def halves(script):
    """The model half of a script: all above its loop."""
    lines = (HERE / f"{script}.py").read_text().splitlines()
    return lines[: next(k for k, line in enumerate(lines) if "the loop, one text" in line)]


def test_readme_has_the_sizes_of_the_diffs():
    text = (HERE / "README.md").read_text()
    for a, b in itertools.combinations(SCRIPTS, 2):
        found = difflib.unified_diff(halves(a), halves(b), n=0)
        changed = sum(line[0] in "+-" and line[:3] not in ("+++", "---") for line in found)
        assert f"| {a}.py – {b}.py | {changed} |" in text


def readme_commands():
    text = (HERE / "README.md").read_text()
    for line in re.findall(r"^    (?:pip .* && )?(?:python|torchrun \S+ \d+) (.*)", text, re.M):
        script, *flags = line.split()
        if script.removesuffix(".py") in SCRIPTS and "results/" not in line:
            yield script.removesuffix(".py"), flags


def result_commands():
    """Those that train the runs in results/, as a shell expands them."""
    section = (HERE / "README.md").read_text().split("\n## Results\n")[1].split("\n## ")[0]
    blocks = "".join(re.findall(r"^    .*\n", section, re.M))
    shell = ["bash", "-euc", 'python() { echo "$@"; }\n' + blocks]
    expanded = subprocess.run(shell, capture_output=True, text=True, check=True).stdout
    for line in expanded.splitlines():
        script, *flags = line.split()
        if script.removesuffix(".py") in SCRIPTS:
            yield script.removesuffix(".py"), flags


def table_commands():
    """Those that train what is in the papers' tables and figures."""
    text = (HERE / "README.md").read_text()
    rows = "".join(re.findall(r"^\| \[(?:MEME|PoE)\] .*", text, re.M))
    for script, flags in dict.fromkeys(re.findall(r"`python (\w+)\.py ([^`]*)`", rows)):
        yield script, flags.split()


def test_readme_says_how_to_make_every_table_and_figure():
    text, named = (HERE / "README.md").read_text(), set()
    for paper, results in re.findall(r"^\| \[(MEME|PoE)\] ([^|]*) \|", text, re.M):
        for kind, numbers in re.findall(r"(Table|Fig\.) (\d+(?:, \d+)*)", results):
            named |= {(paper, kind, int(n)) for n in numbers.split(", ")}
    assert named == {("MEME", "Table", n) for n in range(2, 8)} | {
        ("MEME", "Fig.", n) for n in range(3, 23)
    } | {("PoE", "Table", 1)} | {("PoE", "Fig.", n) for n in range(3, 12)}


def test_every_result_has_its_commands_in_readme_and_its_whole_log(monkeypatch):
    class Parsed(Exception):
        pass

    parse = argparse.ArgumentParser.parse_args

    def stop(parser, argv):
        parsed = vars(parse(parser, argv))
        if argv:
            raise Parsed(parsed)
        return argparse.Namespace(**parsed)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    asked = {}
    for script, flags in result_commands():
        with pytest.raises(Parsed) as found:
            SCRIPTS[script].main(flags)
        new = found.value.args[0]
        out, resumed = new["out"], new["resume"]
        assert resumed == (out in asked)
        free = SCRIPTS[script].FREE if resumed else new  # the flags that --resume may change
        asked[out] = asked.get(out, {"script": script}) | {k: new[k] for k in free}
    assert asked.keys() == {f"results/{folder.name}" for folder in (HERE / "results").iterdir()}
    for out, flags in asked.items():
        args, metrics = (
            json.loads((HERE / out / f"{name}.json").read_text()) for name in ("args", "metrics")
        )
        for key in flags.keys() - {"device", "resume"}:  # a run may have been stopped
            assert args[key] == flags[key], f"{out}: {key}"
        rows = list(csv.DictReader((HERE / out / "log.csv").open()))
        assert [int(row["epoch"]) for row in rows] == [*range(1, args["epochs"] + 1)]
        assert metrics["run"] == args and metrics["epoch"] == args["epochs"]
        minutes = sum(float(row["seconds"]) for row in rows) / 60
        assert metrics["minutes"] == pytest.approx(minutes)


def test_the_tables_of_results_in_readme_are_what_eval_prints_of_their_metrics():
    text, folders = (HERE / "README.md").read_text(), sorted((HERE / "results").iterdir())
    for group in sorted({folder.name.split("-")[0] for folder in folders}):
        runs = [folder for folder in folders if folder.name.split("-")[0] == group]
        results = [json.loads((run / "metrics.json").read_text()) for run in runs]
        printed = evaluation.table(results, paper=True).splitlines()
        table = "\n".join(line for line in printed if line.startswith("|"))
        assert table in text, f"README has another table for results/{group}-*"


def run_briefly(commands, root):
    ran = 0
    for k, (script, flags) in enumerate(commands):
        if "spectra" not in flags and "--compile" not in flags:
            short = ["--epochs", 1, "--limit", 256, "--data", root, "--out", f"run{k}"]
            train(script, *flags, *short)
            ran += 1
    return ran


def test_the_commands_of_readme_train(small_root, small_net, arrays, tmp_path, monkeypatch):
    shi(small_root)
    data.prepare_cub(small_root, "none")
    os.rename(arrays, tmp_path / "my.npz")
    monkeypatch.chdir(tmp_path)
    assert run_briefly(readme_commands(), small_root) >= 5


def test_one_command_of_each_kind_of_the_papers_table_trains(small_root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    kinds = {}  # those of one script with the same flags differ in their values
    for script, flags in table_commands():
        if not {"cub", "spectra"} & set(flags):
            kinds.setdefault((script, *flags[::2]), (script, flags))
    assert run_briefly(kinds.values(), small_root) >= 10


@slow
def test_every_command_of_the_papers_table_trains(small_root, small_net, tmp_path, monkeypatch):
    shi(small_root)
    data.prepare_cub(small_root, "none")
    monkeypatch.chdir(tmp_path)
    assert run_briefly(table_commands(), small_root) >= 40


def test_the_code_of_readme_runs():
    for code in re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.S):
        found = {}
        exec(code, found)
        assert found["loss"].isfinite() and found["generated"].shape == (8, 3, 32, 32)
        assert found["nats"].shape == (8,)


def test_scripts_import_torch_nets_data_and_the_standard_library_alone():
    for script in [*SCRIPTS, "nets", "data"]:
        for node in ast.parse((HERE / f"{script}.py").read_text()).body:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                allowed = {"torch", "nets", "data", *(["numpy"] if script == "data" else [])}
                assert name.split(".")[0] in allowed | set(sys.stdlib_module_names)
