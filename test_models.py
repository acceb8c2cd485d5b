"""What has to hold, in numbers. `pytest test_models.py`: no download, no GPU, under three minutes.

Bounds are held against the exact evidence of a linear-Gaussian model, products and divergences against grids and
torch.distributions, estimators against their expectation, loops against themselves, killed and resumed.
"""

import ast
import itertools
import json
import math
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributions import Independent, MultivariateNormal, Normal, kl_divergence

import data
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


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


# ------------------------------------------------------------------------------------------ a model with an evidence


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
    """Decoders with orthogonal columns: their exact posteriors are diagonal, so an encoder can have them."""
    for decode in model.decoders:
        decode.weight.data = torch.linalg.qr(torch.randn_like(decode.weight))[0] * torch.tensor(
            [1.3, 0.6]
        )


def exact(encode, decode, prior_share):
    """Make an encoder the Gaussian ∝ p(x|z) p(z)^prior_share; without a decoder, p(z)^prior_share alone."""
    precision = torch.full((L,), float(prior_share))
    if decode is not None:
        precision = precision + (decode.weight**2).sum(0) / NOISE**2
        encode.mu.weight.data = decode.weight.T / NOISE**2 / precision[:, None]
        encode.mu.bias.data = -encode.mu.weight @ decode.bias
    else:
        encode.mu.weight.data.zero_()
        encode.mu.bias.data.zero_()
    encode.logvar.data = -precision.log()


def pair(n=1, sizes=(3, 2)):
    """One example of each modality, n times."""
    torch.manual_seed(5)
    return [torch.randn(1, size).expand(n, size) for size in sizes]


def mean_and_error(values):
    return values.mean().item(), 4 * values.std().item() / len(values) ** 0.5


def images(name, n=2):
    return [torch.rand(n, *m.shape) for m in nets.modalities(name)]


# ------------------------------------------------------------------------------------------ bounds


@pytest.mark.parametrize("seen", [(0,), (1,), (0, 1)])
@torch.no_grad()
def test_mvae_elbo_lies_below_the_evidence(seen):
    model, xs = linear_model("mvae"), pair(20_000)
    xs = [x if m in seen else None for m, x in enumerate(xs)]
    bound, error = mean_and_error(model.elbo(seen, xs, model.encode(xs)))
    assert bound < evidence(model, xs)[0] + error


@torch.no_grad()
def test_mvae_elbo_of_the_exact_posterior_is_the_evidence():
    model, xs = linear_model("mvae"), pair(20_000)
    orthogonal(model)
    for encode, decode in zip(model.encoders, model.decoders):
        exact(encode, decode, 0)  # the product has the prior, once
    for seen in [(0,), (1,), (0, 1)]:
        part = [x if m in seen else None for m, x in enumerate(xs)]
        bound, error = mean_and_error(model.elbo(seen, part, model.encode(part)))
        assert bound == pytest.approx(evidence(model, part)[0].item(), abs=error + 1e-4)


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
def test_svae_of_exact_posteriors_is_twice_the_joint_evidence():
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


# ------------------------------------------------------------------------------------------ MEME


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


def test_meme_trains_one_direction_alone():
    model, xs = linear_model("meme", direction="x0"), pair(4)
    torch.manual_seed(1)
    whole = model.objective(*xs)
    torch.manual_seed(1)
    torch.testing.assert_close(whole, model.bound(0, xs, model.encode(xs)).mean())
    model.refuse_untrained([(True, True), (True, False)])
    with pytest.raises(ValueError, match="x0"):
        model.refuse_untrained([(True, True), (False, True)])


# ------------------------------------------------------------------------------------------ products and divergences


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
    flat = [(torch.zeros(1, L), torch.full((1, L), 80.0))] * 2
    mu, logvar = svae.product(flat)
    assert mu.isfinite().all() and logvar.exp().max() <= 1e4 * (1 + 1e-5)
    infinite = [(torch.zeros(1, L), torch.full((1, L), math.inf))] * 2
    assert svae.product(infinite)[1].isfinite().all()


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
def test_svae_with_flat_replacements_is_vaevae_a(objective):
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


# ------------------------------------------------------------------------------------------ DReG


def encoder_gradients(objective, xs, draws):
    """The gradient of a nearly exact encoder, draw by draw. -> mean, standard deviation of the mean"""
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


# ------------------------------------------------------------------------------------------ patterns of modalities


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
    experts = [
        model.encoders[0][0](xs[0]),
        model.encoders[1][1](xs[1]),
        model.encoders[2][1](xs[1]),
    ]
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


# ------------------------------------------------------------------------------------------ networks and likelihoods


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
    ):
        with pytest.raises(ValueError):
            nets.modalities("glyphs", **options)


# ------------------------------------------------------------------------------------------ data


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
        ({"train_1": np.ones((5, 2))}, "does not fit"), ({"test_1": np.ones((2, 9))}, "does not fit"),
        ({"train_0": np.full((4, 3), np.nan)}, "not finite"), ({"train_mask": np.ones((4, 3), bool)}, "train_mask"),
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


# ------------------------------------------------------------------------------------------ the loop


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


def test_the_data_s_own_mask_is_used_and_refuses_a_fraction(tmp_path, capsys):
    rng = np.random.default_rng(0)
    mask = np.array([[1, 1]] * 10 + [[1, 0]] * 10 + [[0, 1]] * 10, bool)
    hidden = rng.normal(size=(30, 5))
    hidden[10:20] = np.nan  # hidden entries may be anything
    np.savez(tmp_path / "m.npz", train_0=rng.normal(size=(30, 4)), train_1=hidden, train_mask=mask,
             test_0=rng.normal(size=(5, 4)), test_1=rng.normal(size=(5, 5)))  # fmt: skip
    train("mvae", "--dataset", tmp_path / "m.npz", "--epochs", 1, "--out", tmp_path / "run")
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
for batch in data.batches(split, streams, 7, "natural", torch.Generator().manual_seed(1), rank, world):
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


# ------------------------------------------------------------------------------------------ the text itself


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


def test_scripts_import_torch_nets_data_and_the_standard_library_alone():
    for script in [*SCRIPTS, "nets", "data"]:
        for node in ast.parse((HERE / f"{script}.py").read_text()).body:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                allowed = {"torch", "nets", "data", *(["numpy"] if script == "data" else [])}
                assert name.split(".")[0] in allowed | set(sys.stdlib_module_names)
