"""What has to hold of the five models and their loop, in numbers, without a download or a GPU.

Bounds are held against the exact evidence of a linear-Gaussian model, products and divergences
against grids and torch.distributions, the loop against itself, resumed or in two processes.
"""

import ast
import itertools
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributions import Bernoulli, Independent, Laplace, MultivariateNormal, Normal
from torch.distributions import kl_divergence
from torch.testing import assert_close

import data
import meme
import mvae
import nets
import svae
import vaevae

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "tests"))
from helpers import SCRIPTS, arrays, ended, forked, free_port, images, refused, same, seeded
from helpers import train, weights

NOISE = 0.7  # the standard deviation of every x given z in the linear-Gaussian models
L = 2
MODELS = pytest.mark.parametrize("name", SCRIPTS)

# ------------------------------------------------------------------------- a model with an evidence


class Linear(nn.Module):
    """x -> W x + b, exp(logvar): an encoder whose posterior can be exact."""

    def __init__(self, latent_dim, size):
        super().__init__()
        self.mu = nn.Linear(size, latent_dim)
        self.logvar = nn.Parameter(torch.randn(latent_dim) * 0.3 - 1)

    def forward(self, x, running=False):
        return self.mu(x), self.logvar.expand(len(x), -1)


def linear_model(name, sizes=(3, 2), **options):
    def modality(k, size):
        networks = lambda latent: Linear(latent, size), lambda latent: nn.Linear(latent, size)
        return nets.Modality(f"x{k}", (size,), *networks, "normal", scale=NOISE)

    torch.manual_seed(3)
    options |= {"variant": "a"} if name == "vaevae" and "variant" not in options else {}
    return SCRIPTS[name].MODEL([modality(*each) for each in enumerate(sizes)], L, **options)


def evidence(model, xs, mean=torch.zeros(L), variance=torch.ones(L)):
    """log of the integral of Π_m p(x_m|z) N(z; mean, variance), exactly. -> (B,)"""
    seen = [m for m, x in enumerate(xs) if x is not None]
    weight = torch.cat([model.decoders[m].weight for m in seen])
    bias = torch.cat([model.decoders[m].bias for m in seen])
    covariance = weight @ torch.diag(variance) @ weight.T + NOISE**2 * torch.eye(len(weight))
    exactly = MultivariateNormal(bias + mean @ weight.T, covariance)
    return exactly.log_prob(torch.cat([xs[m] for m in seen], -1))


def orthogonal(model):
    """Decoders with orthogonal columns: their exact posteriors are diagonal, so an encoder can have
    them."""
    for decode in model.decoders:
        columns = torch.linalg.qr(torch.randn_like(decode.weight))[0]
        decode.weight.data = columns * torch.tensor([1.3, 0.6])


def exact(encode, decode, share):
    """Make an encoder the Gaussian ∝ p(x|z) p(z)^share; without a decoder, p(z)^share alone."""
    precision = torch.full((L,), float(share))
    encode.mu.weight.data.zero_(), encode.mu.bias.data.zero_()
    if decode is not None:
        precision = precision + (decode.weight**2).sum(0) / NOISE**2
        encode.mu.weight.data = decode.weight.T / NOISE**2 / precision[:, None]
        encode.mu.bias.data = -encode.mu.weight @ decode.bias
    encode.logvar.data = -precision.log()


def exact_model(name, share, **options):
    model = linear_model(name, **options)
    orthogonal(model)
    for encode, decode in zip(model.encoders, model.decoders):
        exact(encode, decode, share)
    return model


def pair(n=1, sizes=(3, 2)):
    """One example of each modality, n times."""
    torch.manual_seed(5)
    return [torch.randn(1, size).expand(n, size) for size in sizes]


def only(xs, *seen):
    """xs with all others hidden."""
    return [x if m in seen else None for m, x in enumerate(xs)]


def drawn(call, *args):
    """call(*args), with the same noise whenever it is asked for."""
    torch.manual_seed(1)
    return call(*args)


def mean_and_error(values):
    return values.mean().item(), 4 * values.std().item() / len(values) ** 0.5


def lies_below(values, exactly):
    mean, error = mean_and_error(values)
    assert mean < exactly + error


def equals(values, exactly):
    mean, error = mean_and_error(values)
    assert mean == pytest.approx(exactly.item(), abs=error + 1e-4)


def sample(mu, logvar):
    return mu + torch.exp(0.5 * logvar) * torch.randn_like(mu)


def copy(source, target):
    target.load_state_dict(source.state_dict())


# ------------------------------------------------------------------------------------------- bounds


def test_single_elbos_lie_below_the_evidence_and_of_the_exact_posterior_are_it():
    exactly = exact_model("mvae", 0, experts="exact")  # the product has the prior, once
    for seen in [(0,), (1,), (0, 1)]:
        xs = only(pair(20_000), *seen)
        equals(exactly.elbo(seen, xs, exactly.encode(xs)), evidence(exactly, xs)[0])
        model = linear_model("mvae")
        lies_below(model.elbo(seen, xs, model.encode(xs)), evidence(model, xs)[0])
        model = linear_model("svae")
        if len(seen) == 1:  # Eq. (19) is no bound
            lies_below(model.bound(seen, xs, model.encode(xs)), evidence(model, xs)[0])


def test_mvae_adds_the_bounds_of_its_subsets():
    sizes = 3, 2, 4
    loss = linear_model("mvae", sizes, subsets=3)([(1.0, pair(4, sizes))])
    assert loss.item() > linear_model("mvae", sizes)([(1.0, pair(4, sizes))]).item()


def test_svae_conditional_term_lies_below_the_conditional_evidence():
    model, xs = linear_model("svae"), pair(20_000)
    q = model.encode(xs)
    (mu, logvar), given = q[0, 1][0], q[1,][0]
    term = model.log_p(0, sample(mu, logvar), xs[0]) - svae.kl_normal(mu, logvar, *given)
    lies_below(term, evidence(model, only(xs, 0), given[0][0], given[1][0].exp())[0])


def test_svae_of_exact_posteriors_is_twice_the_joint_evidence():
    model, xs = linear_model("svae", experts="exact"), pair(20_000)
    orthogonal(model)
    for i, j in itertools.product(range(2), repeat=2):  # p(z) is shared out: half to each expert
        exact(model.encoders[i][j], model.decoders[j] if i == j else None, 0.5)
    q = model.encode(xs)
    bounds = sum(model.bound(subset, xs, q) for subset in q)
    equals(bounds, 2 * evidence(model, xs)[0])  # Eq. (23)
    equals(bounds - bounds.mean() + model.objective(*xs), 2 * evidence(model, xs)[0])


def test_vaevae_of_exact_posteriors_is_both_conditional_evidences():
    model, xs = exact_model("vaevae", 1, variant="a"), pair(20_000)
    mu, logvar = svae.product([encode(x) for encode, x in zip(model.encoders, xs)])
    precision = torch.exp(-logvar) - 1  # q(z|x_1) q(z|x_2) has the prior twice
    both = mu * torch.exp(-logvar) / precision, -precision.log()
    singles = sum(evidence(model, only(xs, k))[0] for k in range(2))
    bounds = model.bound((0, 1), xs, model.encode(xs) | {(0, 1): [both]})
    equals(bounds, 2 * evidence(model, xs)[0] - singles)


def test_mmvae_bounds_lie_below_the_evidence():
    xs = pair(1_000)
    for options in (dict(objective="elbo"), {}, dict(tight=True), dict(posterior="laplace")):
        model = linear_model("mmvae", samples=3, **options)
        exactly = evidence(model, xs)[0]
        if "posterior" in options:  # then the prior is no Gaussian: the evidence by quadrature
            grid = torch.cartesian_prod(*[torch.linspace(-12, 12, 601)] * 2)
            terms = zip(model.modalities, model.decoders, xs)
            log_p = sum(nets.log_prob(m, decode(grid), x[0]) for m, decode, x in terms)
            exactly = (log_p + model.prior().log_prob(grid)).logsumexp(0) + 2 * math.log(24 / 600)
        lies_below(torch.stack([model.objective(*xs) for _ in range(20)]), exactly)


def test_mmvae_iwae_rises_with_samples_and_tight_is_tighter():
    forms = [dict(objective="elbo"), dict(samples=1), dict(samples=5), dict(samples=50)]
    forms.append(dict(samples=50, tight=True))
    values = [linear_model("mmvae", **f).objective(*pair(20_000)).item() for f in forms]
    assert values[0] == pytest.approx(values[1], abs=0.1)  # K = 1 is the elbo
    assert values[1] < values[2] < values[3] < values[4]


@pytest.mark.parametrize("samples", [1, 3])
def test_meme_as_printed_lies_below_the_conditional_evidence(samples):
    model, xs = linear_model("meme", kl="sample", classifier_scale=1, samples=samples), pair(20_000)
    gaussians = model.encode(xs)
    for s, (mu, logvar) in enumerate(gaussians[::-1]):
        exactly = evidence(model, only(xs, s), mu[0], logvar[0].exp())[0]
        lies_below(model.bound(s, xs, gaussians), exactly)


def test_meme_marginal_bound_lies_below_the_evidence_under_its_mixture_prior():
    model, xs = linear_model("meme", pseudo_samples=3), pair(20_000)
    model.start_pseudo([3 * torch.randn(3, 3), 3 * torch.randn(3, 2)])
    for s in range(2):
        parts = [evidence(model, only(pair(), s), mu, logvar.exp())[0]
                 for mu, logvar in zip(*model.pseudo_prior(s))]  # fmt: skip
        exactly = torch.stack(parts).logsumexp(0) - math.log(3)
        lies_below(model.marginal_bound(s, xs[s], *model.encode(xs)[s]), exactly)


def test_meme_marginal_bound_with_one_pseudo_sample_is_a_kl_to_its_encoder():
    model, xs = linear_model("meme", pseudo_samples=1), pair(50_000)
    mu, logvar = model.encode(xs)[0]
    kl = meme.kl_normal(mu, logvar, *model.encoders[1](model.pseudo[1]))
    a, error_a = mean_and_error(model.marginal_bound(0, xs[0], mu, logvar))
    b, error_b = mean_and_error(model.log_p(0, sample(mu, logvar), xs[0]) - kl)
    assert a == pytest.approx(b, abs=error_a + error_b)


@MODELS
def test_importance_sampling_finds_the_evidence_whatever_the_weights_of_training(name):
    model, xs = linear_model(name, **({"pseudo_samples": 1} if name == "meme" else {})), pair(4)
    model.modalities = [m._replace(weight=7.0) for m in model.modalities]
    for encode in model.requires_grad_(False).modules():
        if isinstance(encode, Linear):
            encode.logvar.data.fill_(0.5)  # wide proposals, or the weights have no variance

    def check(exactly, *observed, **given):
        found = model.log_likelihood(*observed, samples=50_000, **given)
        assert_close(found, exactly.expand(4), atol=0.1, rtol=0)

    if name == "meme":  # eq. (4)'s prior with one pseudo-sample is the Gaussian of its encoder
        mu, logvar = model.encoders[1](model.pseudo[1])
        check(evidence(model, only(xs, 0), mu[0], logvar[0].exp()), xs[0], None)
    else:
        check(evidence(model, xs), *xs)
        check(evidence(model, only(xs, 0)), xs[0], None)
    if name != "mmvae":
        base = model.posterior(None, xs[1]).base_dist
        exactly = evidence(model, only(xs, 0), base.loc[0], base.scale[0] ** 2)
        check(exactly, xs[0], None, given=[None, xs[1]])


def test_meme_of_three_with_product_has_one_prior_in_training_and_after_it():
    sizes = (3, 2, 2)
    model, xs = linear_model("meme", sizes, explicit="product", pseudo_samples=1), pair(4, sizes)
    for encode in model.requires_grad_(False).modules():
        if isinstance(encode, Linear):
            encode.logvar.data.fill_(0.5)
    gaussians = model.encode(xs)[1:]
    precision = sum((-logvar).exp() for _, logvar in gaussians)  # of p(z|x_2, x_3), the product
    mu = sum(mu * (-logvar).exp() for mu, logvar in gaussians) / precision
    found = model.posterior(None, *xs[1:])
    assert_close(found.mean, mu)
    assert_close(found.variance, 1 / precision)
    exactly = evidence(model, only(xs, 0), mu[0], 1 / precision[0])
    seen = model.log_likelihood(xs[0], None, None, samples=50_000, given=[None, *xs[1:]])
    assert_close(seen, exactly.expand(4), atol=0.1, rtol=0)


# --------------------------------------------------------------------------------------------- MEME


def test_meme_weights_are_positive_at_most_k_and_one_on_average():
    model, log_q_t = linear_model("meme", samples=10), 30 * torch.randn(10, 5_000)
    log_q_t_given_s, w = model.weigh(log_q_t)
    assert w.min() >= 0 and w.max() <= 10 * (1 + 1e-5)
    each = [model.weigh(log_q_t.roll(k, 0))[1] for k in range(10)]  # each z_k as z_1
    assert_close(torch.stack(each).mean(0), torch.ones(5_000))
    small = log_q_t.max(0)[0] < 80
    assert_close(log_q_t_given_s[small], log_q_t.exp().mean(0).log()[small])


@pytest.mark.parametrize("full", [False, True])
def test_meme_at_c_1_gives_the_decoder_of_t_no_gradient_unless_w_has_one(monkeypatch, full):
    options = dict(samples=5, kl="sample", classifier_scale=1, full_gradient=full)
    model, xs, noise, gradient = linear_model("meme", **options), pair(4), torch.randn(5, 4, L), 0
    for k in range(5):  # exact when averaged over which k plays z_1
        monkeypatch.setattr(torch, "randn", lambda *a, k=k, **b: noise.roll(k, 0))
        bound = model.bound(0, xs, model.encode(xs)).sum()
        gradient = gradient + torch.autograd.grad(bound, model.decoders[1].weight)[0]
    size = gradient.abs().max().item()
    assert size > 0.1 if full else size < 1e-4


def test_meme_closed_and_sampled_forms_agree_where_w_is_one():
    xs, values = pair(50_000), []
    for kl in ("closed", "sample"):
        model = linear_model("meme", kl=kl, samples=2, classifier_scale=0)
        model.decoders[1].weight.data.zero_()  # q(t|z) = q(t): w = 1
        values.append(mean_and_error(model.bound(0, xs, model.encode(xs))))
    (a, error_a), (b, error_b) = values
    assert a == pytest.approx(b, abs=error_a + error_b)


def test_meme_with_a_mixture_prior_of_equal_encoders_is_the_two_modality_bound():
    two, three = three_from_two("meme", (3, 2, 2), kl="sample", classifier_scale=1)
    copy(three.encoders[1], three.encoders[2])
    three.modalities[2] = three.modalities[2]._replace(weight=0)  # x_2 tells nothing of z
    xs = pair(6)
    a = drawn(two.bound, 0, xs, two.encode(xs))
    xs = [*xs, xs[1]]
    assert_close(drawn(three.bound, 0, xs, three.encode(xs)), a)


def test_meme_starts_its_pseudo_samples_at_different_images_though_examples_share_them():
    model = linear_model("meme", pseudo_samples=4)
    model.start_pseudo([torch.full((2, 3), 7.0), torch.full((9, 2), 5.0)])
    assert (model.pseudo[0][:2] == 7).all() and not (model.pseudo[0][2:] == 7).any()
    assert (model.pseudo[1] == 5).all()
    photos = torch.arange(20.0)[:, None]
    split = data.Split([photos, photos], [torch.arange(200) // 10, torch.arange(200) % 20], None)
    first, second = data.observed(split, [((True, True), torch.arange(100, 200))], 5)
    assert first.flatten().tolist() == [10, 12, 14, 16, 19]
    assert len(second.unique()) == 5
    few, none = data.observed(split, [((True, False), torch.arange(15))], 5)
    assert few.flatten().tolist() == [0, 1] and len(none) == 0


def test_meme_trains_one_direction_alone():
    model, xs = linear_model("meme", direction="x0"), pair(4)
    bound = drawn(model.bound, 0, xs, model.encode(xs))
    assert_close(drawn(model.objective, *xs), bound.mean())


# ------------------------------------------------------------------------- products and divergences


def grid_product(gaussians):
    z = torch.linspace(-20, 20, 400_001, dtype=torch.float64)
    log_p = sum(Normal(m, s).log_prob(z) for m, s in gaussians)
    p = (log_p - log_p.max()).exp()
    mean = (p * z).sum() / p.sum()
    return mean.item(), ((p * (z - mean) ** 2).sum() / p.sum()).sqrt().item()


def test_products_are_those_of_a_grid_and_of_the_published_vectors():
    experts, several = (
        [(1.0, 0.5), (-1.0, 0.1)],
        linear_model("meme", (3, 2, 4), explicit="product"),
    )
    given = [(torch.tensor([[m]]), 2 * torch.tensor([[s]]).log()) for m, s in experts]
    for product, extra, known in [
        (svae.product, [], (-0.923, 0.0981)),
        (vaevae.product, [], (-0.923, 0.0981)),
        (linear_model("mvae").product, [(0.0, 1.0)], (-0.914, 0.0976)),
        (several.conditional_prior, [], (-0.923, 0.0981)),
    ]:
        mu, logvar = product(given)
        found = mu.item(), (0.5 * logvar).exp().item()
        assert found == pytest.approx(grid_product(experts + extra), abs=1e-4)
        assert found == pytest.approx(known, abs=6e-4)


def test_svae_products_with_the_prior_expert_have_it_once():
    plain, with_prior = linear_model("svae"), linear_model("svae", prior_expert=True)
    for subset, [(mu, logvar)] in plain.encode(pair(1)).items():
        found_mu, found_logvar = with_prior.encode(pair(1))[subset][0]
        for k in range(L):
            expert = mu[0, k].item(), (0.5 * logvar[0, k]).exp().item()
            found = found_mu[0, k].item(), (0.5 * found_logvar[0, k]).exp().item()
            assert found == pytest.approx(grid_product([expert, (0.0, 1.0)]), abs=1e-4)


@pytest.mark.parametrize("script", [mvae, svae])
def test_bounded_experts_keep_a_gradient_where_exact_ones_die(script):
    logvar = torch.tensor([-10.0, -1.0, 0.0, 5.0, 100.0, math.inf], requires_grad=True)
    precision = torch.exp(-script.bounded(logvar, logvar)[1])
    known = torch.tensor([math.exp(10), math.e, 1, 1 / 6, 1 / 101, 0]) + 0.1
    assert_close(precision, known)
    precision[:5].sum().backward()
    assert (-logvar.grad[:5] > 0.9e-4).all()  # of exp(-logvar) it would be 4e-44 for the last
    gradients = {}
    for experts in ("bounded", "exact"):
        model = linear_model(script.__name__, experts=experts)
        encode = model.encoders[0] if script is mvae else model.encoders[0][0]
        encode.logvar.data.fill_(100.0)
        model.objective(*pair(100)).backward()
        gradients[experts] = encode.mu.weight.grad.abs().max()
    assert gradients["bounded"] > 0.01 and not gradients["exact"] > 1e-9
    for flatness in (80.0, math.inf):  # products of them stay finite
        flat = script.bounded(torch.ones(1, L), torch.full((1, L), flatness))
        mu, logvar = svae.product([flat] * 2)
        assert mu.tolist() == [[1.0] * L] and logvar.exp().max() <= 5 * (1 + 1e-5)


def test_divergences_and_densities_are_those_of_torch():
    mu, logvar, prior_mu, prior_logvar, z = torch.randn(5, 4, L)
    q = Independent(Normal(mu, (0.5 * logvar).exp()), 1)
    p = Independent(Normal(prior_mu, (0.5 * prior_logvar).exp()), 1)
    unit = Independent(Normal(torch.zeros(4, L), torch.ones(4, L)), 1)
    for script in (meme, svae, vaevae):
        found = script.kl_normal(mu, logvar, prior_mu, prior_logvar)
        assert_close(found, kl_divergence(q, p))
    assert_close(mvae.kl_to_prior(mu, logvar), kl_divergence(q, unit))
    assert_close(meme.log_normal(z, mu, logvar), q.log_prob(z))
    for posterior in ("normal", "laplace"):
        model = linear_model("mmvae", posterior=posterior)
        expected = model.distribution(mu, logvar).log_prob(z)
        assert_close(model.log_density(z, mu, logvar), expected)


@pytest.mark.parametrize("objective", ["svae", "vaevae"])
def test_svae_with_flat_replacements_is_vaevae_a(objective):
    a = linear_model("svae", objective=objective, experts="exact")
    b = linear_model("vaevae", objective=objective, variant="a")
    for k in range(2):
        copy(a.encoders[k][k], b.encoders[k])
        copy(a.decoders[k], b.decoders[k])
        a.encoders[1 - k][k].logvar.data.fill_(math.inf)
    for seen in [(0, 1), (0,), (1,)]:
        xs = only(pair(7), *seen)
        assert_close(drawn(a.objective, *xs), drawn(b.objective, *xs))


@pytest.mark.parametrize("name, trunks", [("svae", 3**2), ("vaevae", 3 * 2**2)])
def test_parameter_counts_grow_as_figure_2_counts_them(name, trunks):
    def size(module):
        return sum(w.numel() for w in module.parameters())

    modules = list(SCRIPTS[name].MODEL(nets.modalities("mnist-split3"), 64).modules())
    found = [m.trunk for m in modules if isinstance(m, nets.Encoder)]
    found += [t for m in modules if isinstance(m, nets.Joint) for t in m.trunks]
    one = size(nets.modalities("mnist-split3")[0].encoder(64).trunk)
    assert [size(trunk) for trunk in found] == [one] * trunks


# --------------------------------------------------------------------------------------------- DReG


def encoder_gradients(objective, xs, draws):
    """The gradient of a nearly exact encoder, draw by draw. -> mean, standard deviation of the
    mean"""
    model, found = exact_model("mmvae", 1, objective=objective, samples=10), []
    for encode in model.encoders:
        encode.logvar.data += 0.3
    for _ in range(draws):
        grads = torch.autograd.grad(model.objective(*xs), list(model.encoders[0].parameters()))
        found.append(torch.cat([g.flatten() for g in grads]))
    found = torch.stack(found)
    return found.mean(0), found.std(0) / draws**0.5


@pytest.mark.parametrize("biased", [False, True])
def test_dreg_is_unbiased_and_less_noisy_for_one_modality_and_biased_for_two(biased):
    xs = pair(64) if biased else only(pair(64), 0)
    (a, error_a), (b, error_b) = [encoder_gradients(o, xs, 400) for o in ("iwae", "dreg")]
    far = (a - b).abs() > 5 * (error_a**2 + error_b**2).sqrt()
    assert far.any() == biased
    assert biased or error_b.mean() < 0.8 * error_a.mean()


def test_dreg_has_the_value_of_iwae_and_its_decoder_gradient():
    for tight, xs in itertools.product((False, True), (only(pair(9), 0), pair(9))):
        found = []
        for objective in ("iwae", "dreg"):
            model = linear_model("mmvae", objective=objective, tight=tight, samples=4)
            value = drawn(model.objective, *xs)
            of = [model.decoders[0].weight, model.prior_logvar]
            found.append((value, *torch.autograd.grad(value, of)))
        assert_close(*found)


# --------------------------------------------------------------------------- patterns of modalities


def three_from_two(name, sizes=(3, 2, 4), **options):
    two, three = linear_model(name, sizes[:2], **options), linear_model(name, sizes, **options)
    for k in range(2):
        copy(two.encoders[k], three.encoders[k])
        copy(two.decoders[k], three.decoders[k])
    return two, three


@pytest.mark.parametrize("name", ["mvae", "mmvae", "meme"])
def test_three_modalities_without_the_third_are_two(name):
    two, three = three_from_two(name)
    xs = pair(6)
    assert_close(drawn(two.objective, *xs), drawn(three.objective, *xs, None))


def test_eq_29_is_the_paired_loss_of_two_when_the_third_adds_nothing():
    two, three = three_from_two("vaevae", variant="a")
    xs = [*pair(6), torch.randn(6, 4)]
    q = three.encode(xs)
    q[0, 1, 2], q[0, 2], q[1, 2] = q[0, 1], q[0,], q[1,]
    z = drawn(sample, *q[0, 1][0])
    paired = drawn(two.bound, (0, 1), xs[:2], two.encode(xs[:2]))
    assert_close(drawn(three.bound, (0, 1, 2), xs, q), paired + three.log_p(2, z, xs[2]))


def test_eq_30_draws_a_pair_to_all_single_posteriors_and_the_prior():
    model, zero = linear_model("vaevae", (3, 2, 4), variant="a"), torch.zeros(L)
    xs = [*pair(6), torch.randn(6, 4)]
    q = model.encode(xs)
    mu, logvar = q[0, 1][0]
    z = drawn(sample, mu, logvar)
    priors = [q[0,][0], q[1,][0], q[2,][0], (zero, zero)]
    kl = sum(svae.kl_normal(mu, logvar, *prior) for prior in priors)
    expected = model.log_p(0, z, xs[0]) + model.log_p(1, z, xs[1]) - kl
    assert_close(drawn(model.bound, (0, 1), xs, q), expected)


def test_svae_has_two_products_for_a_pair_of_three():
    model, xs = linear_model("svae", (3, 2, 4)), [*pair(1), torch.randn(1, 4)]
    q = model.encode(xs)
    products = {(0,): 1, (1,): 1, (2,): 1, (0, 1): 2, (0, 2): 2, (1, 2): 2, (0, 1, 2): 1}
    assert {subset: len(found) for subset, found in q.items()} == products
    experts = [svae.bounded(*model.encoders[i][j](xs[j])) for i, j in [(0, 0), (1, 1), (2, 1)]]
    assert_close(q[0, 1][1], svae.product(experts))  # Eq. (36)


@MODELS
@pytest.mark.parametrize("order", [(1, 0), (2, 0, 1)])
def test_objectives_do_not_depend_on_the_order_of_modalities(name, order, monkeypatch):
    def zeros(*shape, **_):
        return torch.zeros(shape[0] if len(shape) == 1 else shape)

    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)
    sizes = (3, 2, 4)[: len(order)]
    a, b = linear_model(name, sizes), linear_model(name, [sizes[k] for k in order])
    for new, old in enumerate(order):
        copy(a.decoders[old], b.decoders[new])
        if name == "svae":
            for i, j in enumerate(order):
                copy(a.encoders[j][old], b.encoders[i][new])
        else:
            copy(a.encoders[old], b.encoders[new])
        if name == "meme":
            b.pseudo[new].data = a.pseudo[old].data
    monkeypatch.setattr(torch, "randn", zeros)
    xs = [torch.linspace(-1, 1, 5 * size).view(5, size) for size in sizes]
    for hidden in [None, *range(len(sizes))]:
        seen = [None if m == hidden else x for m, x in enumerate(xs)]
        assert_close(a.objective(*seen), b.objective(*[seen[k] for k in order]))


@MODELS
def test_a_stream_of_one_modality_moves_exactly_the_parameters_it_should(name):
    model, found = SCRIPTS[name].MODEL(nets.modalities("glyphs"), 4), set()
    model.objective(images("glyphs")[0], None).backward()
    for key, w in model.named_parameters():
        if w.grad is not None and w.grad.abs().max() > 0:
            depth = 3 if name == "svae" and "encoders" in key else 2
            found.add(".".join(key.split(".")[:depth]))
    encoders = {"encoders.0.0", "encoders.1.0"} if name == "svae" else {"encoders.0"}
    more = {"meme": {"encoders.1", "pseudo.1"}, "mmvae": {"prior_logvar"}}  # [meme] section 3.3
    assert found == {"decoders.0"} | encoders | more.get(name, set())


@MODELS
@pytest.mark.parametrize("dataset", ["glyphs", "mnist-split", "mnist-split3"])
def test_every_pattern_trains_and_every_method_has_its_shapes(name, dataset):
    modalities = nets.modalities(dataset)
    model, xs = SCRIPTS[name].MODEL(modalities, 4), images(dataset, 3)
    for shown in itertools.product([True, False], repeat=len(xs)):
        if any(shown):
            part = [x if seen else None for x, seen in zip(xs, shown)]
            loss, posterior = model([(0.5, part), (1.0, part)]), model.posterior(*part)
            assert loss.shape == (2,) and loss.isfinite().all()
            assert posterior.batch_shape == (3,) and posterior.event_shape == (4,)
            assert posterior.sample().isfinite().all()
            assert model.log_likelihood(*part, samples=3).shape == (3,)
    decoded = model.decode(model.prior().sample((5, 2)))
    assert [tuple(x.shape) for x in decoded] == [(5, 2, *m.shape) for m in modalities]
    assert all(0 <= x.min() and x.max() <= 1 for x in decoded)


@MODELS
def test_encoders_and_decoders_run_no_more_than_they_must(name):
    options, rows = ({"samples": 3} if name in ("meme", "mmvae") else {}), {}
    model = SCRIPTS[name].MODEL(nets.modalities("glyphs"), 4, **options)

    def count(module, args):
        n = args[0][..., 0].numel() if isinstance(module, nets.Decoder) else 5
        rows[module] = rows.get(module, 0) + n

    for module in model.modules():
        if isinstance(module, (nets.Encoder, nets.Joint, nets.Decoder)):
            module.register_forward_pre_hook(count)
    model.objective(*images("glyphs", 5))
    assert max(n for module, n in rows.items() if not isinstance(module, nets.Decoder)) == 5
    decodings = {"meme": 4, "mmvae": 6, "svae": 2, "vaevae": 1, "mvae": 2}[name]
    assert max(rows[module] for module in model.decoders) == 5 * decodings


# ---------------------------------------------------------------------------------- what is refused

REFUSED = {
    "meme": [dict(explicit="product"), dict(explicit="x"), dict(kl="x"), dict(direction="x7"),
             dict(samples=0), dict(pseudo_samples=2**31), dict(classifier_scale=math.nan)],
    "mmvae": [dict(samples=-1), dict(objective="x"), dict(tight=True, objective="elbo"),
              dict(posterior="x")],
    "svae": [dict(objective="x"), dict(experts="x")],
    "vaevae": [dict(objective="x"), dict(variant="x")],
    "mvae": [dict(subsets=4), dict(subsets=4, sizes=(3, 2, 4)), dict(anneal=-1), dict(experts="x")],
}  # fmt: skip


@MODELS
def test_options_that_cannot_be_or_would_do_nothing_are_refused(name):
    for options in REFUSED[name]:
        with pytest.raises(ValueError, match=next(iter(options))):
            linear_model(name, **options)


ALL, ONE, TWO = (True, True), (True, False), (False, True)
THREE, PAIRS = (True,) * 3, [(True, True, False), (True, False, True), (False, True, True)]
UNTRAINED = [
    ("meme", dict(direction="x0"), [ALL, ONE], [ALL, TWO], "x0"),
    ("svae", dict(objective="vaevae"), [ALL, ONE, TWO], [ALL, ONE], "x1"),
    ("svae", dict(objective="svae"), [ALL], None, ""),
    ("vaevae", dict(objective="vaevae"), [ALL, ONE, TWO], [ALL, ONE], "x1"),
    ("vaevae", dict(objective="svae"), [ALL], None, ""),
    ("vaevae", dict(objective="svae"), [THREE], PAIRS, "x0 and x1 and x2"),
    ("vaevae", dict(objective="svae"), [THREE], PAIRS[:2], "x1 and x2"),
    ("vaevae", dict(objective="svae", variant="a"), PAIRS, None, ""),
]


@pytest.mark.parametrize("name, options, good, bad, words", UNTRAINED)
def test_streams_that_leave_a_posterior_untrained_are_refused(name, options, good, bad, words):
    shapes = {f"x{k}": (2,) for k in range(len(good[0]))}
    model = SCRIPTS[name].MODEL(nets.modalities("npz", shapes=shapes), L, **options)
    model.refuse_untrained(good)
    if bad:
        with pytest.raises(ValueError, match=words):
            model.refuse_untrained(bad)


def test_bernoulli_is_refused_for_values_that_it_cannot_have():
    split = data.Split([torch.rand(4, 3), 5 * torch.rand(4, 2) + 1])
    spec = {"name": "npz", "shapes": {"0": [3], "1": [2]}}
    toy = data.Dataset("toy", split, split, spec, ("0", "1"))
    data.refuse_values(toy, nets.modalities(**spec, likelihoods=["bernoulli", "laplace"]))
    modalities = nets.modalities(**spec, likelihoods=["laplace", "bernoulli"])
    with pytest.raises(ValueError, match="values in .0, 1., 1 has others"):
        data.refuse_values(toy, modalities)
    hidden = torch.tensor([[True, False]] * 4)  # what a mask hides may be anything
    data.refuse_values(toy._replace(mask=hidden), modalities)


# ------------------------------------------------------------------------- networks and likelihoods


def test_likelihoods_are_those_of_torch():
    z, x = torch.randn(3, 4, 5), torch.rand(4, 5)
    densities = [("normal", Normal(z, 0.3), x), ("laplace", Laplace(z, 0.3), x)]
    for kind, density, target in [*densities, ("bernoulli", Bernoulli(logits=z), x.round())]:
        found = nets.log_prob(nets.Modality("x", (5,), None, None, kind, scale=0.3), z, target)
        assert_close(found, density.log_prob(target).sum(-1))
    modality = nets.modalities("cub", vocabulary=7)[1]
    logits, x = torch.randn(2, 1, 32, 7), torch.full((1, 32), nets.PAD)
    assert (nets.log_prob(modality, logits, x) == 0).all()  # padding is not scored
    x[0, 3] = 0  # <exc>, which is
    assert_close(nets.log_prob(modality, logits, x), logits.log_softmax(-1)[:, :, 3, 0])


def test_scales_are_floored():
    mu, logvar = nets.gaussian(torch.tensor([[0.0, -200.0], [0.0, 3.0]]))
    assert (0.5 * logvar).exp()[0] >= 0.999e-3 and logvar[1] == pytest.approx(3.0, abs=1e-4)


def test_batchnorm_takes_one_example_and_pseudo_samples_by_its_running_statistics():
    encode, gradients = nets.modalities("spectra", width=0.001)[0].encoder(3).train(), []
    u, x = torch.rand(4, 11000, requires_grad=True), torch.rand(6, 11000)
    state = {k: v.clone() for k, v in encode.state_dict().items()}
    encode(u, running=True), encode(x[:1])
    assert same(state, encode.state_dict())
    for later in (False, True):  # a later batch does not change the gradient of pseudo-samples
        encode.load_state_dict(state)
        mu, _ = encode(u, running=True)
        if later:
            encode(x)  # moves the running statistics before backward
            assert not same(state, encode.state_dict())
        gradients.append(torch.autograd.grad(mu.sum(), u)[0])
    assert_close(*gradients)


def test_likelihoods_and_weights_can_be_chosen_and_are_checked():
    chosen = dict(likelihoods=["laplace", "bernoulli"], weights=["2", "1"])
    first, second = nets.modalities("glyphs", **chosen)
    assert (first.likelihood, first.weight) == ("laplace", 2)
    location = first.decoder(3)(100 * torch.randn(2, 3))
    assert 0 <= location.min() and location.max() <= 1
    for key, values in [("likelihoods", ["laplace"]), ("likelihoods", ["x", "x"]),
                        ("weights", ["-1", "1"]), ("weights", ["a", "1"])]:  # fmt: skip
        with pytest.raises(ValueError):
            nets.modalities("glyphs", **{key: values})


# ----------------------------------------------------------------------------------------- the loop


@MODELS
def test_a_script_writes_its_run_and_ends_resumed_with_the_same_bits(
    name, arrays, tmp_path, capsys
):
    flags, run = dict(dataset=arrays, paired=0.5, batch_size=16, lr=1e-2), tmp_path / "a"
    train(name, **flags, epochs=3, out=run)
    assert "python eval.py" in capsys.readouterr().out
    rows = (run / "log.csv").read_text().splitlines()
    assert rows[0].startswith("epoch,objective,nats_0,nats_1") and len(rows) == 4
    values = [float(row.split(",")[1]) for row in rows[1:]]
    assert values[2] > values[0]  # it learns
    args = json.loads((run / "args.json").read_text())
    assert args["script"] == name and args["spec"]["name"] == "npz"
    cls = getattr(SCRIPTS[name], args["model"])
    model = cls(nets.modalities(**args["spec"]), args["latent_dim"], **args["options"])
    model.load_state_dict(weights(run))
    train(name, **flags, epochs=1, out=tmp_path / "b")
    train(name, **flags, epochs=3, out=tmp_path / "b", resume=True)
    assert same(weights(run), weights(tmp_path / "b"))
    refused(name, **flags, epochs=2, out=tmp_path / "b", resume=True)  # it has three
    assert json.loads((tmp_path / "b" / "args.json").read_text())["epochs"] == 3
    train(name, **flags, epochs=3, out=tmp_path / "c", seed=1)
    a, c = weights(run), weights(tmp_path / "c")
    assert not any(torch.equal(a[key], c[key]) for key in a if key.startswith("encoders"))


MISTAKES = [
    ("--paired 0", "--paired"), ("--paired 1.5", "--paired"), ("--paired nan", "--paired"),
    ("--paired 0.001", "none paired"), ("--unpaired nope", "--unpaired"), ("--seed -1", "--seed"),
    ("--dataset nope", "no data set"), ("--epochs 0", "--epochs"), ("--lr inf", "--lr"),
    ("--likelihoods laplace", "--likelihoods"), ("--likelihoods laplace,nope", "no likelihood"),
    ("--weights 1,x", "x"), ("--nope", "--nope"), ("--direction nope", "direction"),
    ("--direction 0 --paired 0.5", "direction 0"), ("--kl nope", "kl"), ("--samples 0", "samples"),
    ("--out run", "holds a run"), ("--out absent --resume", "no run to resume"),
    ("--out run --seed 1 --resume", "seed"), ("--out run --resume --latent-dim 5", "latent_dim"),
    ("--out run --resume --limit 20", "limit"), ("--out run --resume --samples 3", "samples"),
    ("--out run --resume --dataset other.npz", "other.npz"),
]  # fmt: skip


def test_every_mistake_is_one_sentence_and_loses_nothing(arrays, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train("meme", dataset=arrays, epochs=1, out="run")
    shutil.copy(arrays, "other.npz")
    before = Path("run", "checkpoint.pt").read_bytes()
    capsys.readouterr()
    others = [("mvae", "--out run --resume", "script"), ("vaevae", "--unpaired split", "alone")]
    for script, typed, word in [*(("meme", *mistake) for mistake in MISTAKES), *others]:
        refused(script, "--dataset", arrays, "--out", "new", *typed.split())
        said = capsys.readouterr().err.splitlines()
        assert word in said[-1] and sum(not line.startswith("usage:") for line in said) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other.npz", "own.npz", "run"]
    assert Path("run", "checkpoint.pt").read_bytes() == before


@pytest.mark.parametrize("unpaired, size", [("split", 5), ("0", 1), ("all", 5), ("all", 1),
                                            ("rest", 5), ("none", 5)])  # fmt: skip
@MODELS
def test_one_pair_in_a_hundred_trains_or_is_refused(name, unpaired, size, arrays, tmp_path, capsys):
    flags = dict(dataset=arrays, paired=0.01, unpaired=unpaired, batch_size=size, epochs=1)
    if size == 1:  # of all that there is
        flags |= dict(paired=0.1, limit=20, latent_dim=1)
        flags |= dict(samples=1) if name in ("meme", "mmvae") else {}
    if name == "vaevae" and unpaired in ("0", "none"):  # no stream of modality 1 alone
        refused(name, **flags, out=tmp_path / "run")
        assert "use svae" in capsys.readouterr().err
    else:
        train(name, **flags, out=tmp_path / "run")
        assert all(w.isfinite().all() for w in weights(tmp_path / "run").values())
        row = (tmp_path / "run" / "log.csv").read_text().splitlines()[1].split(",")
        assert all(math.isfinite(float(value)) for value in row)


def test_the_data_s_own_mask_is_used_and_refuses_a_fraction(tmp_path, capsys):
    rng, found = np.random.default_rng(0), {}
    for part, n in (("train", 30), ("test", 5)):
        found |= {f"{part}_{k}": rng.normal(size=(n, 4 + k)) for k in (0, 1)}
    found["train_1"][10:20] = np.nan  # hidden entries may be anything
    found["train_mask"] = np.array([[1, 1]] * 10 + [[1, 0]] * 10 + [[0, 1]] * 10, bool)
    np.savez(tmp_path / "m.npz", **found)
    train("mvae", dataset=tmp_path / "m.npz", epochs=1, out=tmp_path / "run")
    args = json.loads((tmp_path / "run" / "args.json").read_text())
    assert args["note"] == "train_mask hides 33% of the arrays"
    refused("mvae", dataset=tmp_path / "m.npz", paired=0.5, out=tmp_path / "other")
    assert "train_mask" in capsys.readouterr().err


def test_amp_is_within_one_percent_of_float32(arrays, tmp_path):
    model, xs = meme.MEME(nets.modalities("glyphs"), 4, samples=3), images("glyphs", 8)
    plain = drawn(model, [(1.0, xs)])
    with torch.autocast("cpu", torch.bfloat16):
        mixed = drawn(model, [(1.0, xs)])
    assert mixed.dtype == torch.float32
    assert mixed.item() == pytest.approx(plain.item(), rel=0.01)
    train("mvae", dataset=arrays, epochs=1, amp=True, out=tmp_path / "run")


def one_rank(rank, world, url, out):
    torch.distributed.init_process_group("gloo", init_method=url, rank=rank, world_size=world)
    torch.randn_like = torch.zeros_like
    split = data.Split(
        [torch.linspace(-1, 1, 33).view(11, 3), torch.linspace(-2, 1, 22).view(11, 2)]
    )
    streams = data.pairing(11, ("0", "1"), 0.5, "split")
    model = linear_model("mvae")
    net = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    order = torch.Generator().manual_seed(1)
    for batch in data.batches(split, streams, 7, "natural", order, rank, world):
        net(batch).sum().backward()
    if rank == 0:
        torch.save([w.grad for w in model.parameters()], out)


def test_two_processes_give_the_gradients_of_one(tmp_path):
    for world in (1, 2):
        of = world, f"tcp://127.0.0.1:{free_port()}", tmp_path / f"{world}.pt"
        assert ended(*[forked(one_rank, rank, *of) for rank in range(world)]) == [0] * world
    one, two = (torch.load(tmp_path / f"{world}.pt", weights_only=True) for world in (1, 2))
    assert_close(one, two, atol=1e-5, rtol=1e-4)


# ---------------------------------------------------------------------------------- the text itself


def halves(script):
    """The text of a script, above its line and below it."""
    text = (HERE / f"{script}.py").read_text()
    above, below = re.split(r"^# -+ the loop: one text in all five scripts\n", text, flags=re.M)
    return above, below


def test_the_lower_halves_are_one_text_in_short_functions():
    [loop] = {halves(script)[1] for script in SCRIPTS}
    assert len(loop.splitlines()) <= 240
    functions = [node for node in ast.parse(loop).body if isinstance(node, ast.FunctionDef)]
    assert max(node.end_lineno - node.lineno + 1 for node in functions) <= 70


ALONE = """
import argparse, importlib, sys, torch
import nets
for name in sys.argv[1:]:
    script, p = importlib.import_module(name), argparse.ArgumentParser()
    script.options(p.add_argument)
    torch.manual_seed(0)
    model = script.MODEL(nets.modalities("glyphs"), 4, **vars(p.parse_args([])))
    xs = [torch.rand(8, *m.shape) for m in model.modalities]
    streams = [(0.5, xs), (0.25, [xs[0], None]), (0.25, [None, xs[1]])]
    weights, losses = list(model.parameters()), []
    for step in range(10):
        torch.manual_seed(1)  # the same noise, so that the loss falls
        loss = model(streams).sum()
        gradients = torch.autograd.grad(loss, weights, allow_unused=True)
        with torch.no_grad():
            for w, g in zip(weights, gradients):
                w -= 0 if g is None else 1e-3 * g.sign()
        losses.append(loss.item())
    assert losses[-1] < losses[0], (name, losses)
assert not {"data", "eval", "benchmarks"} & set(sys.modules)
"""
BARE = """import sys
sys.modules |= dict.fromkeys("scipy matplotlib sklearn rdkit torchvision PIL".split())
import meme
meme.main(sys.argv[1:])
"""


def run_alone(folder, code, *argv):
    """Python in a folder that has no other of our files beside it."""
    command = [sys.executable, "-c", code, *map(str, argv)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)


def test_the_upper_half_and_nets_alone_train_a_model(tmp_path):
    shutil.copy(HERE / "nets.py", tmp_path)
    for script in SCRIPTS:
        (tmp_path / f"{script}.py").write_text(halves(script)[0])
    done = run_alone(tmp_path, ALONE, *SCRIPTS)
    assert done.returncode == 0, done.stderr


def test_three_files_alone_train_on_an_npz_with_all_that_is_optional_missing(arrays, tmp_path):
    (folder := tmp_path / "alone").mkdir()
    for file in ("meme.py", "nets.py", "data.py"):
        shutil.copy(HERE / file, folder)
    done = run_alone(folder, BARE, "--dataset", arrays, "--epochs", 1, "--out", "run")
    assert done.returncode == 0, done.stderr
    assert (folder / "run" / "checkpoint.pt").exists()
    done = run_alone(folder, BARE, "--dataset", "glyphs")
    said = [line for line in done.stderr.splitlines() if not line.startswith("usage:")]
    assert done.returncode == 2 and len(said) == 1 and "benchmarks/" in said[0]


def imported(text, everywhere=True):
    """The names of the modules that a text imports, anywhere or at its top level."""
    tree, found = ast.parse(text), set()
    for node in ast.walk(tree) if everywhere else tree.body:
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module.split(".")[0])
    return found


def test_imports_go_one_way():
    standard, late = set(sys.stdlib_module_names), {"matplotlib", "rdkit", "scipy", "sklearn"}
    ours = {*SCRIPTS, "nets", "data", "eval", "benchmarks"}
    texts = {path.stem: path.read_text() for path in HERE.glob("*.py")}
    for script in SCRIPTS:
        assert imported(halves(script)[0]) <= {"torch", "nets", "math", "itertools"}
        assert imported(halves(script)[1]) <= {"data"} | standard
    assert imported(texts["nets"]) <= {"torch"} | standard
    assert imported(texts["data"], False) <= {"torch", "numpy"} | standard
    assert not imported(texts["data"]) & ours
    for path in (HERE / "benchmarks").glob("*.py"):
        assert imported(path.read_text()) & ours <= {"nets", "data", "benchmarks"}
        assert not imported(path.read_text(), False) & late
    assert not imported(texts["eval"], False) & (late | set(SCRIPTS))
