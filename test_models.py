"""What has to hold of the five models and their loop, in numbers, without a download or a GPU.

First the papers' formulas once more: term by term, sample by sample, in float64, with
torch.distributions. A model's objective has to be the formula's for the same noise, and so has its
gradient of every parameter. Then exact evidences, of decoders that are linear with Gaussian noise.
Then the loop against itself, resumed or in two processes.
"""

import argparse
import ast
import inspect
import itertools
import json
import math
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributions import Bernoulli, Categorical, Independent, Laplace, MixtureSameFamily
from torch.distributions import MultivariateNormal, Normal, Poisson, kl_divergence
from torch.testing import assert_close

import data
import meme
import mvae
import nets
import svae
import vaevae

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "tests"))
from helpers import SCRIPTS, arrays, checkpoint, ended, forked, free_port, images, refused
from helpers import same, seeded, train, weights

B, L = 4, 2
NOISE = 0.7  # the standard deviation of every x given z where decoders are linear
MODELS = pytest.mark.parametrize("name", SCRIPTS)

# ----------------------------------------------------------------- small models, and the same noise


@pytest.fixture
def float64(monkeypatch):
    """A test in float64 throughout: nets.py's float() too."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def small_model(name, count, **options):
    """`count` modalities of three likelihoods, none of weight 1, networks with BatchNorm and random
    parameters, so that nothing is near 0 or 1 by itself."""
    rows = [(3, "normal", 0.6, 0.7), (2, "bernoulli", 2.0, 1.0), (4, "laplace", 1.5, 1.3)]
    modalities = []
    for k, (size, kind, weight, scale) in enumerate(rows[:count]):
        encoder = partial(nets.mlp_encoder, (size, 5), norm=True)
        decoder = partial(nets.mlp_decoder, (5, size), (size,), activation=nn.Tanh)
        modalities.append(nets.Modality(f"x{k}", (size,), encoder, decoder, kind, weight, scale))
    model = SCRIPTS[name].MODEL(modalities, L, **options)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=min(0.5, 8 / parameter.shape[-1]))
    return model


def batch(model):
    """B examples of every modality."""
    kinds = [(m.likelihood, torch.randn(B, *m.shape)) for m in model.modalities]
    return [(x > 0).double() if kind == "bernoulli" else x for kind, x in kinds]


def only(xs, *seen):
    """xs with all others hidden."""
    return [x if m in seen else None for m, x in enumerate(xs)]


def subsets(of):
    """All but the empty one, small ones first."""
    return [s for size in range(1, len(of) + 1) for s in itertools.combinations(of, size)]


def recorded(call, *args):
    """-> call(*args), and what it drew at random, in order."""
    drawn = []

    def recording(draw):
        return lambda *a, **b: drawn.append(draw(*a, **b)) or drawn[-1]

    with pytest.MonkeyPatch.context() as patch:
        for owner, draw in [(torch, "randn"), (torch, "randn_like"), (torch, "randperm"),
                            (Laplace, "sample")]:  # fmt: skip
            patch.setattr(owner, draw, recording(getattr(owner, draw)))
        return call(*args), drawn


def holds(formula, model, xs, **options):
    """The objective and its gradient of every parameter are the formula's, for the same noise."""
    objective, drawn = recorded(model.objective, *xs)
    noise = iter(drawn)
    by_formula = formula(model, xs, noise, **options)
    assert next(noise, None) is None  # all of it is used
    sides = []
    for value in (objective, by_formula):
        names, of = zip(*model.named_parameters())
        gradients = torch.autograd.grad(value, of, allow_unused=True, materialize_grads=True)
        sides.append({"objective": value} | dict(zip(names, gradients)))
    assert_close(*sides)


# ---------------------------------------------------------------------------- the formulas' symbols


def gaussians(mu, logvar):
    """One example, one distribution of z: N(mu, exp(logvar))."""
    return [Independent(Normal(m, torch.exp(v / 2)), 1) for m, v in zip(mu, logvar)]


def unit():
    """p(z) = N(0, I)."""
    return gaussians(torch.zeros(1, L), torch.zeros(1, L))[0]


def product(*experts):
    """The Gaussian proportional to the product of Gaussians."""
    precision = sum(1 / q.variance for q in experts)
    mean = sum(q.mean / q.variance for q in experts) / precision
    return Independent(Normal(mean, precision**-0.5), 1)


def mixture(*experts):
    """The equal mixture of distributions of z."""
    family = type(experts[0].base_dist)
    loc, scale = (torch.stack([getattr(q.base_dist, k) for q in experts]) for k in ("loc", "scale"))
    equal = Categorical(torch.ones(len(experts)))
    return MixtureSameFamily(equal, Independent(family(loc, scale), 1))


def expert(q, kind):
    """An expert of a product: exactly q, or with a bound on its flatness."""
    if kind == "exact":
        return q
    variance = torch.where(q.variance > 1, 1 + q.variance.log(), q.variance)
    return Independent(Normal(q.mean, (1 / variance + 0.1) ** -0.5), 1)


def draw(q, eps):
    """z ~ q(z), from standard noise."""
    return q.base_dist.loc + q.base_dist.scale * eps


def log_p(model, m, x, z):
    """log p(x_m|z) of one example and one z, times the weight of its likelihood."""
    modality, parameter = model.modalities[m], model.decoders[m](z)
    density = {
        "normal": lambda: Normal(parameter, modality.scale),
        "laplace": lambda: Laplace(parameter, modality.scale),
        "bernoulli": lambda: Bernoulli(logits=parameter),
    }[modality.likelihood]()
    return modality.weight * density.log_prob(x).sum()


def log_mean(logs):
    """log 1/n Σ exp."""
    return torch.stack(logs).exp().mean().log()


def shown(xs):
    """The observed modalities."""
    return [m for m, x in enumerate(xs) if x is not None]


# --------------------------------------------------------------------------------------------- MEME


def meme_encoders(model, xs):
    """q(z|x_m), which is p(z|x_m) too. -> {m: one per example}"""
    return {m: gaussians(*model.encoders[m](xs[m])) for m in shown(xs)}


def p_given(t, explicit):
    """p(z|t) of the encoders of t: App. E's mixture, or product."""
    return t[0] if len(t) == 1 else product(*t) if explicit == "product" else mixture(*t)


def pseudo_prior(model, others):
    """1/N Σ_i p(z|u_i), the u of the modalities `others`, by running statistics."""
    components = []
    for m in others:
        model.encoders[m].eval()
        components += gaussians(*model.encoders[m](model.pseudo[m]))
        model.encoders[m].train()
    return mixture(*components)


def eq_4(model, s, x, q, prior, eps):
    """L(s) = E_q(z|s)[ log p(s|z) / q(z|s) + log 1/N Σ_i p(z|u_i) ]"""
    z = draw(q, eps)
    return log_p(model, s, x, z) - q.log_prob(z) + prior.log_prob(z)


def eq_6(model, s, x, q, eps, kl="closed", classifier_scale=10, full_gradient=False,
         explicit="mixture"):  # fmt: skip
    """L(s -> t) = E_q(z|s)[ q(t|z) / q(t|s) log p(s|z) p(z|t) / q(z|s) q(t|z) ] + log q(t|s)"""
    t = [m for m in q if m != s]
    z = [draw(q[s], eps_k) for eps_k in eps]  # K of them, z[0] under E
    log_q_t = [sum(log_p(model, m, x[m], z_k) for m in t) for z_k in z]
    log_q_t_given_s = log_mean(log_q_t)  # Eq. (8), App. D: z[0] is one of them
    w = torch.exp(log_q_t[0] - log_q_t_given_s)  # Eq. (10)
    if not full_gradient:
        w = w.detach()  # App. B: without the first term of eq. (7)
    log_p_s = log_p(model, s, x[s], z[0])
    p = p_given([q[m] for m in t], explicit)
    if kl == "closed" and not isinstance(p, MixtureSameFamily):
        expectation = w * (log_p_s - log_q_t[0]) - kl_divergence(q[s], p)
    else:
        expectation = w * (log_p_s + p.log_prob(z[0]) - q[s].log_prob(z[0]) - log_q_t[0])
    return expectation + classifier_scale * log_q_t_given_s


def meme_formula(model, xs, noise, direction=None, samples=10, **options):
    seen, q, values = shown(xs), meme_encoders(model, xs), []
    if len(seen) == 1:
        [s] = seen
        eps, prior = next(noise), pseudo_prior(model, {*range(len(xs))} - {s})
        values = [eq_4(model, s, xs[s][b], q[s][b], prior, eps[b]) for b in range(B)]
    else:
        for s in seen if direction is None else [int(direction[1:])]:  # Eq. (2), (11): their mean
            eps = next(noise)
            assert eps.shape == (samples, B, L)
            for b in range(B):
                x, q_b = {m: xs[m][b] for m in seen}, {m: q[m][b] for m in seen}
                values.append(eq_6(model, s, x, q_b, eps[:, b], **options))
    return sum(values) / len(values)


@pytest.mark.parametrize("count, options", [
    (2, dict()),
    (2, dict(samples=3, kl="sample")),
    (2, dict(samples=1, kl="sample", classifier_scale=1)),
    (2, dict(samples=3, full_gradient=True)),
    (2, dict(samples=3, kl="sample", full_gradient=True, classifier_scale=0.5)),
    (2, dict(samples=3, direction="x1")),
    (3, dict(samples=3)),
    (3, dict(samples=3, full_gradient=True, direction="x2")),
    (3, dict(samples=3, explicit="product")),
    (3, dict(samples=3, explicit="product", kl="sample", classifier_scale=-1)),
])  # fmt: skip
def test_meme_is_the_mean_over_directions_of_eq_6_with_w_on_its_ratio(float64, count, options):
    model = small_model("meme", count, **options)
    for seen in subsets(range(count))[count:]:
        if options.get("direction") in (None, *(f"x{m}" for m in seen)):
            holds(meme_formula, model, only(batch(model), *seen), **options)


@pytest.mark.parametrize("count, pseudo_samples", [(2, 1), (2, 3), (3, 2)])
def test_meme_of_one_modality_is_eq_4_the_log_of_a_mean_over_pseudo_samples_by_running_statistics(
    float64, count, pseudo_samples
):
    model = small_model("meme", count, pseudo_samples=pseudo_samples)
    for s in range(count):
        holds(meme_formula, model, only(batch(model), s))


# ---------------------------------------------------------------------------------- SVAE and VAEVAE


def svae_posteriors(model, xs, prior_expert=False, experts="bounded", **_):
    """-> {subset: a list of products, each one per example}"""
    seen, every, q, found = shown(xs), range(len(xs)), {}, {}
    for i, j in itertools.product(every, seen):  # q_i^j(z|x_j): stands in for q_i where i is not j
        q[i, j] = [expert(q_b, experts) for q_b in gaussians(*model.encoders[i][j](xs[j]))]
    prior = [[unit()] * B] if prior_expert else []
    for subset in subsets(seen):
        own, missing = [q[m, m] for m in subset], [m for m in every if m not in subset]
        factors = [own + [q[k, j] for k in missing] for j in subset]  # Eq. (4), (5), (35)-(37)
        factors = factors if missing else [own]  # Eq. (3), (33)
        found[subset] = [[product(*each) for each in zip(*f, *prior)] for f in factors]
    return found


def vaevae_posteriors(model, xs, variant="b", **_):
    q = {(m,): [gaussians(*model.encoders[m](xs[m]))] for m in shown(xs)}
    for subset in subsets(shown(xs))[len(q) :]:
        if variant == "b":
            joint = model.joints[str(subset)]
            q[subset] = [gaussians(*joint([xs[m] for m in subset]))]
        else:
            q[subset] = [[product(*each) for each in zip(*(q[m,][0] for m in subset))]]
    return q


PRIOR, SINGLES, PAIRS = "p(z)", [(0,), (1,), (2,)], [(0, 1), (0, 2), (1, 2)]
DRAWN_TO = {  # the second arguments of the divergences of q(z|subset), by the number of modalities
    2: {(0, 1): SINGLES[:2]}  # Eq. (19)
    | dict.fromkeys(SINGLES[:2], [PRIOR]),  # Eq. (20), (21)
    3: {(0, 1, 2): PAIRS}  # Eq. (29)
    | dict.fromkeys(PAIRS, [*SINGLES, PRIOR])  # Eq. (30)
    | dict.fromkeys(SINGLES, [PRIOR]),  # Eq. (31)
}


def sum_of_bounds(model, xs, noise, posteriors, objective, **options):
    """L(x_1, x_2), or of three L_123 + Σ L_ij + Σ L_i, eq. (32), of the observed modalities. Where
    q(z|x_i, x_j) is two products, f(q) is f of the one plus f of the other."""
    q = posteriors(model, xs, **options)
    q[PRIOR], total = [[unit()] * B], 0
    for subset in subsets(shown(xs)):
        if objective == "vaevae" and len(subset) == 1 < len(shown(xs)):
            continue  # only eq. (19) has L(x_1) + L(x_2)
        for q_s in q[subset]:
            eps = next(noise)
            for b in range(B):
                z = draw(q_s[b], eps[b])
                total += sum(log_p(model, m, xs[m][b], z) for m in subset) / B
                for other in DRAWN_TO[len(xs)][subset]:
                    total -= sum(kl_divergence(q_s[b], p[b]) for p in q.get(other, [])) / B
    return total


def holds_of_all_patterns(formula, name, count, options, **more):
    model = small_model(name, count, **options)
    for seen in subsets(range(count)):
        holds(formula, model, only(batch(model), *seen), **options, **more)


SVAES = [{}, *(dict(objective=objective, prior_expert=prior, experts=experts)
               for objective in ("svae", "vaevae") for prior in (False, True)
               for experts in ("exact", "bounded"))]  # fmt: skip
VAEVAES = [{}, *(dict(objective=objective, variant=variant)
                 for objective in ("svae", "vaevae") for variant in "ab")]  # fmt: skip
EQUATIONS = pytest.mark.parametrize("count", [2, 3], ids=["eq_19_to_21", "eq_29_to_32"])


@EQUATIONS
@pytest.mark.parametrize("options", SVAES)
def test_svae_sums_the_printed_bounds_each_drawn_to_all_that_is_printed(float64, options, count):
    options = dict(objective="svae") | options
    holds_of_all_patterns(sum_of_bounds, "svae", count, options, posteriors=svae_posteriors)


@EQUATIONS
@pytest.mark.parametrize("options", VAEVAES)
def test_vaevae_sums_the_printed_bounds_those_of_pairs_of_three_too(float64, options, count):
    options = dict(objective="vaevae") | options
    holds_of_all_patterns(sum_of_bounds, "vaevae", count, options, posteriors=vaevae_posteriors)


# -------------------------------------------------------------------------------------------- MMVAE


def mmvae_experts(model, xs, posterior="normal", **_):
    """q_r(z|x_r) of the observed modalities, each one per example."""
    family, found = {"normal": Normal, "laplace": Laplace}[posterior], []
    for m in shown(xs):
        each = gaussians(*model.encoders[m](xs[m]))
        found.append([Independent(family(q.mean, q.stddev), 1) for q in each])  # Laplace: scale b
    return found


def mmvae_prior(model, posterior="normal", **_):
    scale = torch.exp(model.prior_logvar / 2)
    return Independent({"normal": Normal, "laplace": Laplace}[posterior](torch.zeros(L), scale), 1)


def stopped(q):
    """q, with no gradient to its parameters."""
    family, loc, scale = type(q.base_dist), q.base_dist.loc, q.base_dist.scale
    return Independent(family(loc.detach(), scale.detach()), 1)


def log_w(model, x, z, experts, prior):
    """log p(z) Π_m p(x_m|z) / 1/R Σ_r q_r(z|x_r)"""
    log_p_x = sum(log_p(model, m, x_m, z) for m, x_m in x.items())
    return log_p_x + prior.log_prob(z) - mixture(*experts).log_prob(z)


def dreg_gradient(z, log_w_held):
    """0, with the gradient of Tucker et al. (2019), where v_k = w_k / Σ w and the encoders' own
    density is held: Σ_k v_k d log w_k / dθ for decoders and prior, for the encoders
    Σ_k v_k² d log w_k / dz_k dz_k / dφ."""
    leaves = [z_k.detach().requires_grad_() for z_k in z]
    logs, total = [log_w_held(leaf) for leaf in leaves], 0
    for z_k, leaf, log, v_k in zip(z, leaves, logs, torch.stack(logs).detach().softmax(0)):
        [slope] = torch.autograd.grad(log, leaf, retain_graph=True)
        total = total + v_k * log + v_k**2 * (slope * z_k).sum()
    return total - total.detach()


def mmvae_formula(model, xs, noise, objective="iwae", samples=10, tight=False, **options):
    seen, total, eps = shown(xs), 0, next(noise)
    q, prior, R = mmvae_experts(model, xs, **options), mmvae_prior(model, **options), len(seen)
    assert eps.shape == (R, samples, B, L)
    for b in range(B):
        x, experts = {m: xs[m][b] for m in seen}, [q_r[b] for q_r in q]
        z = [[draw(experts[r], eps[r, k, b]) for k in range(samples)] for r in range(R)]
        groups = [sum(z, [])] if tight else z  # all inside one log, or one for each expert
        for group in groups:
            logs = [log_w(model, x, z_k, experts, prior) for z_k in group]
            if objective == "elbo":
                bound = sum(logs) / samples  # 1/R Σ_r E[ log w_r ]
            else:
                bound = log_mean(logs)  # 1/R Σ_r E[ log 1/K Σ_k w_r,k ], or log 1/RK ΣΣ
            if objective == "dreg":
                held = [stopped(q_r) for q_r in experts]
                of_z = partial(log_w, model, x, experts=held, prior=prior)
                bound = bound.detach() + dreg_gradient(group, of_z)
            total += bound / len(groups) / B
    return total


MMVAES = [{}, *(dict(objective=objective, samples=3, tight=tight, posterior=posterior)
                for posterior in ("normal", "laplace") for objective, tight in
                [("elbo", False), ("iwae", False), ("iwae", True)])]  # fmt: skip


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("options", MMVAES)
def test_mmvae_weighs_by_the_mixture_over_m_inside_and_outside_the_log(float64, options, count):
    holds_of_all_patterns(mmvae_formula, "mmvae", count, options)


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("tight", [False, True])
@pytest.mark.parametrize("posterior", ["normal", "laplace"])
def test_dreg_has_iwae_s_value_and_squared_weights_for_the_encoders(
    float64, posterior, tight, count
):
    options = dict(objective="dreg", samples=3, tight=tight, posterior=posterior)
    holds_of_all_patterns(mmvae_formula, "mmvae", count, options)
    model = small_model("mmvae", count, **options)
    with torch.no_grad():  # as the loop reports it
        assert model.objective(*batch(model)).isfinite()


@pytest.mark.parametrize("posterior, spread", [("normal", (2 / math.pi) ** 0.5), ("laplace", 1.0)])
def test_mmvae_draws_standard_noise(posterior, spread):
    model = small_model("mmvae", 2, posterior=posterior, samples=5_000)
    assert not linear_model("mmvae").prior_logvar.any()  # and p(z) starts as N(0, I), or Laplace
    eps = model.noise(7 + torch.randn(2, B, L))
    assert eps.shape == (2, 5_000, B, L)
    assert_close(eps.mean(1), torch.zeros(2, B, L), atol=0.1, rtol=0)
    assert_close(eps.abs().mean(1), torch.full((2, B, L), spread), atol=0.1, rtol=0)


# --------------------------------------------------------------------------------------------- MVAE


def mvae_product(model, xs, subset, experts="bounded", **_):
    """q(z|X) ∝ p(z) Π_m q_m(z|x_m), one per example."""
    q = [[expert(q_b, experts) for q_b in gaussians(*model.encoders[m](xs[m]))] for m in subset]
    return [product(unit(), *each) for each in zip(*q)]


def mvae_formula(model, xs, noise, subsets=0, beta=1, **options):
    """L(X) = ELBO(X) + Σ_m ELBO(x_m) + ELBO of random subsets"""
    seen, total = shown(xs), 0
    terms = [seen, *([m] for m in seen)] if len(seen) > 1 else [seen]
    for _ in range(subsets if len(seen) > 2 else 0):
        terms.append([seen[k] for k in next(noise)[:2]])  # of three a random subset has two
    for subset in terms:
        q, eps = mvae_product(model, xs, subset, **options), next(noise)
        for b in range(B):
            z = draw(q[b], eps[b])
            log_p_x = sum(log_p(model, m, xs[m][b], z) for m in subset)
            total += (log_p_x - beta * kl_divergence(q[b], unit())) / B
    return total


@pytest.mark.parametrize("count, options", [
    (2, dict()), (2, dict(experts="exact")), (3, dict()), (3, dict(experts="exact", subsets=2)),
    (3, dict(subsets=3)),
])  # fmt: skip
def test_mvae_adds_the_elbos_of_all_of_each_and_of_random_subsets(float64, count, options):
    holds_of_all_patterns(mvae_formula, "mvae", count, options)


def test_mvae_s_beta_rises_linearly_to_1(float64):
    model = small_model("mvae", 2, anneal=4)
    assert model.beta == 1  # where no epoch starts
    for epoch, beta in [(1, 0.25), (2, 0.5), (4, 1), (5, 1)]:
        model.start_epoch(epoch)
        holds(mvae_formula, model, batch(model), beta=beta)
    without = small_model("mvae", 2)
    without.start_epoch(1)
    assert without.beta == 1


def test_mvae_s_random_subsets_are_neither_one_nor_all(monkeypatch):
    modalities, found = nets.modalities("npz", shapes={f"x{k}": (2,) for k in range(4)}), []
    model = mvae.MVAE(modalities, L, subsets=10)  # as many as there are
    monkeypatch.setattr(model, "elbo", lambda subset, *_: found.append(subset) or torch.zeros(1))
    for _ in range(20):
        model.objective(*torch.randn(4, 1, 2))
    drawn = [tuple(sorted(subset)) for k, subset in enumerate(found) if k % 15 >= 5]
    assert set(drawn) == {s for s in subsets(range(4)) if len(s) in (2, 3)}
    assert 70 < sum(len(subset) == 2 for subset in drawn) < 130  # of 200: both sizes as often


# ------------------------------------------------------------------------------ posterior and prior


def posterior(name, model, xs, explicit="mixture", **options):
    """q(z|observed), the equal mixture of some Gaussians. -> a list of them, each one per example"""
    if name == "meme":
        q = list(meme_encoders(model, xs).values())
        return [[product(*each) for each in zip(*q)]] if explicit == "product" else q
    if name == "mmvae":
        return mmvae_experts(model, xs, **options)
    if name == "mvae":
        return [mvae_product(model, xs, shown(xs), **options)]
    found = {"svae": svae_posteriors, "vaevae": vaevae_posteriors}[name](model, xs, **options)
    return found[tuple(shown(xs))]


FORMS = [(name, count, {}) for name in SCRIPTS for count in (2, 3)]
FORMS += [("meme", 3, dict(explicit="product")), ("mmvae", 3, dict(posterior="laplace")),
          ("vaevae", 3, dict(variant="a")), ("svae", 3, dict(prior_expert=True, experts="exact")),
          ("mvae", 3, dict(experts="exact"))]  # fmt: skip


@pytest.mark.parametrize("name, count, options", FORMS)
def test_posterior_and_prior_are_the_distributions_of_the_formulas(float64, name, count, options):
    model, z = small_model(name, count, **options).requires_grad_(False), torch.randn(3, B, L)
    priors = {(): model.prior()}
    if name == "meme":
        priors |= {(s,): model.prior(s) for s in range(count)}
    for hidden, prior in priors.items():
        assert prior.batch_shape == () and prior.event_shape == (L,)
        others = [m for m in range(count) if m not in hidden]
        known = {"meme": lambda: pseudo_prior(model, others),
                 "mmvae": lambda: mmvae_prior(model, **options)}.get(name, unit)()  # fmt: skip
        assert_close(prior.log_prob(z), known.log_prob(z))
    for seen in subsets(range(count)):
        xs = only(batch(model), *seen)
        found, q = model.posterior(*xs), posterior(name, model, xs, **options)
        assert found.batch_shape == (B,) and found.event_shape == (L,)
        by_example = [mixture(*each) for each in zip(*q)]
        known = [[q_b.log_prob(z[k, b]) for b, q_b in enumerate(by_example)] for k in range(3)]
        assert_close(found.log_prob(z), torch.tensor(known))


@MODELS
def test_decode_gives_the_mean_of_every_modality(float64, name):
    model, z = small_model(name, 3), torch.randn(5, 2, L)
    logits = [decode(z) for decode in model.decoders]
    for m, found in enumerate(model.decode(z)):
        assert_close(found, logits[m].sigmoid() if m == 1 else logits[m])
    one = SCRIPTS[name].MODEL(model.modalities, 1)  # latent dimension: then mu[..., 1] is not there
    assert one.posterior(*only(batch(model), 0, 1)).sample().shape == (B, 1)


@MODELS
def test_one_modality_too_few_or_too_many_is_refused(float64, name):
    model = small_model(name, 3)
    xs = batch(model)
    for wrong in (xs[:2], (*xs, xs[0])):
        for use in (model.posterior, model.objective):
            with pytest.raises(ValueError, match="shorter|longer"):
                use(*wrong)


@MODELS
def test_every_likelihood_has_its_weight_and_every_stream(float64, name):
    model, z = small_model(name, 3).eval(), torch.randn(5, B, L)
    xs = batch(model)
    assert not model.log_likelihood(*xs, samples=2).requires_grad
    model.requires_grad_(False)
    for m in range(3):
        known = [[log_p(model, m, xs[m][b], z[k, b]) for b in range(B)] for k in range(5)]
        assert_close(model.log_p(m, z, xs[m]), torch.tensor(known))
    streams = [(0.5, xs), (3.0, only(xs, 1))]
    known = drawn(lambda: [-weight * model.objective(*x) for weight, x in streams])
    assert_close(drawn(model, streams), torch.stack(known))


# ---------------------------------------------------------------------------------- exact evidences


class Linear(nn.Module):
    """x -> W x + b, exp(logvar): an encoder whose posterior can be exact."""

    def __init__(self, latent_dim, size):
        super().__init__()
        self.trunk, self.width = nn.Identity(), size  # for nets.Joint
        self.head = nn.Linear(size, latent_dim)
        self.logvar = nn.Parameter(torch.randn(latent_dim) * 0.3 - 1)

    def forward(self, x, running=False):
        return self.head(x), self.logvar.expand(len(x), -1)


def linear_model(name, sizes=(3, 2), **options):
    """x_m = W_m z + b_m + noise: its evidence is a Gaussian's."""

    def modality(k, size):
        networks = lambda latent: Linear(latent, size), lambda latent: nn.Linear(latent, size)
        return nets.Modality(f"x{k}", (size,), *networks, "normal", scale=NOISE)

    torch.manual_seed(3)
    options |= {"variant": "a"} if name == "vaevae" and "variant" not in options else {}
    return SCRIPTS[name].MODEL([modality(*each) for each in enumerate(sizes)], L, **options)


def evidence(model, x, p=None):
    """log of the integral of Π_m p(x_m|z) p(z), exactly, of one example {m: x_m}; p is Gaussian."""
    p = unit() if p is None else p
    weight = torch.cat([model.decoders[m].weight for m in x])
    bias = torch.cat([model.decoders[m].bias for m in x])
    covariance = weight @ torch.diag(p.variance) @ weight.T + NOISE**2 * torch.eye(len(weight))
    exactly = MultivariateNormal(bias + weight @ p.mean, covariance)
    return exactly.log_prob(torch.cat(list(x.values())))


def components(name, model, xs, given, **options):
    """The prior of log_likelihood, as an equal mixture. -> Gaussians, for each example"""
    if given is not None:
        return list(zip(*posterior(name, model, given, **options)))
    if name == "meme":  # where one modality alone is seen, eq. (4)'s prior, else all pseudo-samples
        seen = shown(xs)
        others = [m for m in range(len(xs)) if len(seen) > 1 or m not in seen]
        return [[g for m in others for g in gaussians(*model.encoders[m](model.pseudo[m]))]] * B
    return [[mmvae_prior(model) if name == "mmvae" else unit()]] * B


@pytest.mark.parametrize("name, count, options", [f for f in FORMS if "posterior" not in f[2]])
def test_log_likelihood_is_the_evidence_of_every_seen_under_every_given_prior(
    float64, monkeypatch, name, count, options
):
    more = {"meme": dict(pseudo_samples=2), "vaevae": {"variant": "b"}}.get(name, {})
    options, sizes = more | options, (3, 2, 2)[:count]
    model = linear_model(name, sizes, **options).requires_grad_(False)
    model.modalities = [m._replace(weight=7.0) for m in model.modalities]  # of training alone
    for key, parameter in model.named_parameters():  # wide proposals: the weights vary little
        if key.endswith("weight"):
            parameter *= 0.7 if "decoders" in key else 0.1
        if key.endswith("head.bias"):
            mu, logvar = (3 if name == "meme" else 0.7) * torch.randn(L), 2 * torch.ones(L)
            parameter[:] = torch.cat([mu, logvar])[: len(parameter)]
        if key.endswith("logvar"):
            parameter[:] = torch.tensor([0.5, -0.5]) if name == "mmvae" and "prior" in key else 2
    everything, asked, of = [torch.randn(B, size) / 2 for size in sizes], [], model.posterior
    monkeypatch.setattr(model, "posterior", lambda *xs: asked.append(shown(xs)) or of(*xs))
    for seen in subsets(range(count)):
        for known in [None, *subsets([m for m in range(count) if m not in seen])]:
            xs = only(everything, *seen)
            given = None if known is None else only(everything, *known)
            exactly = []
            for b, parts in enumerate(components(name, model, xs, given, **options)):
                x = {m: xs[m][b] for m in seen}
                exactly.append(log_mean([evidence(model, x, p) for p in parts]))
            found = model.log_likelihood(*xs, samples=20_000, given=given)
            assert_close(found, torch.stack(exactly), atol=0.08, rtol=0)
            assert asked[0] == sorted({*seen, *(known or ())})  # drawn from the posterior of all
            asked.clear()


def orthogonal(model):
    """Decoders with orthogonal columns: their exact posteriors are diagonal, so an encoder can have
    them."""
    for decode in model.decoders:
        columns = torch.linalg.qr(torch.randn_like(decode.weight))[0]
        decode.weight.data = columns * torch.tensor([1.3, 0.6])


def exact(encode, decode, share):
    """Make an encoder the Gaussian ∝ p(x|z) p(z)^share; without a decoder, p(z)^share alone."""
    precision = torch.full((L,), float(share))
    encode.head.weight.data.zero_(), encode.head.bias.data.zero_()
    if decode is not None:
        precision = precision + (decode.weight**2).sum(0) / NOISE**2
        encode.head.weight.data = decode.weight.T / NOISE**2 / precision[:, None]
        encode.head.bias.data = -encode.head.weight @ decode.bias
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


def drawn(call, *args):
    """call(*args), with the same noise whenever it is asked for."""
    torch.manual_seed(1)
    return call(*args)


def equals(values, exactly):
    error = 4 * values.std().item() / len(values) ** 0.5
    assert values.mean().item() == pytest.approx(exactly.item(), abs=error + 1e-4)


def test_bounds_of_exact_posteriors_are_their_evidences():
    xs, both = pair(4_000), {m: x[0] for m, x in enumerate(pair())}
    model = exact_model("mvae", 0, experts="exact")  # the product has the prior, once
    equals(model.elbo((0, 1), xs, model.encode(xs)), evidence(model, both))
    model = linear_model("svae", experts="exact")
    orthogonal(model)
    for i, j in itertools.product(range(2), repeat=2):  # p(z) is shared out: half to each expert
        exact(model.encoders[i][j], model.decoders[j] if i == j else None, 0.5)
    q = model.encode(xs)
    equals(sum(model.bound(s, xs, q) for s in q), 2 * evidence(model, both))  # Eq. (23)
    model = exact_model("vaevae", 1, variant="a")
    mu, logvar = vaevae.product([encode(x) for encode, x in zip(model.encoders, xs)])
    precision = torch.exp(-logvar) - 1  # q(z|x_1) q(z|x_2) has the prior twice
    q = model.encode(xs) | {(0, 1): [(mu * torch.exp(-logvar) / precision, -precision.log())]}
    alone = sum(evidence(model, {m: both[m]}) for m in both)  # both conditional evidences:
    equals(model.bound((0, 1), xs, q), 2 * evidence(model, both) - alone)


def test_meme_weights_are_positive_at_most_k_and_one_on_average():
    model, log_q_t = linear_model("meme", samples=10), 30 * torch.randn(10, 5_000)
    log_q_t_given_s, w = model.weigh(log_q_t)
    assert w.min() >= 0 and w.max() <= 10 * (1 + 1e-5)
    each = [model.weigh(log_q_t.roll(k, 0))[1] for k in range(10)]  # each z_k as z_1
    assert_close(torch.stack(each).mean(0), torch.ones(5_000))
    small = log_q_t.max(0)[0] < 80
    assert_close(log_q_t_given_s[small], log_q_t.exp().mean(0).log()[small])


def test_meme_s_variances_grow_linearly_above_a_scale_of_10():
    cut = 2 * math.log(10)
    logvar = torch.tensor([-9.0, 4.6, cut + 1, cut + 30, cut + 1e4], requires_grad=True)
    assert_close(meme.slowed(None, logvar)[1].exp()[2:], 100 * torch.tensor([2, 31, 10_001.0]))
    assert (meme.slowed(None, logvar)[1][:2] == logvar[:2]).all()
    meme.slowed(None, logvar)[1].sum().backward()
    assert_close(logvar.grad, torch.tensor([1, 1, 1 / 2, 1 / 31, 1 / 10_001]))
    model, sides = linear_model("meme"), pair(100)
    alone = [(sides[0], None), (None, sides[1])]
    model.encoders[0].logvar.data.fill_(40.0)  # with exp(logvar) a KL of e^40 nats
    posterior = model.posterior(*alone[0]).base_dist
    assert_close(posterior.scale**2, torch.full_like(posterior.scale, 100 * (41 - cut)))
    assert (model.prior().component_distribution.base_dist.scale < 61).all()
    for xs in [sides, *alone]:
        assert model.objective(*xs) > -1e6


def test_densities_keep_the_constants_that_cancel_in_objectives():
    z, mu, logvar = torch.randn(3, 4, L)
    assert_close(meme.log_normal(z, mu, logvar), meme.normal(mu, logvar).log_prob(z))
    for posterior in ("normal", "laplace"):
        model = small_model("mmvae", 2, posterior=posterior)
        known = model.distribution(mu, logvar).log_prob(z)
        assert_close(model.log_density(z, mu, logvar), known)


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


def test_meme_s_words_are_logits_8_for_themselves():
    model = meme.MEME(nets.modalities("cub", vocabulary=7), 4, pseudo_samples=5)
    features, words = model.pseudo
    assert features.shape == (5, 2048) and 0 <= features.min() and features.max() <= 1
    assert words.shape == (5, 32, 7) and len(words.argmax(-1).unique()) == 7
    for started in (False, True):
        if started:
            caption = torch.randint(7, (2, 32))
            model.start_pseudo([torch.zeros(2, 2048), caption])
            assert (features[:2] == 0).all() and (words[:2].argmax(-1) == caption).all()
        assert ((words == 0) | (words == 8)).all() and (words.sum(-1) == 8).all()


# ---------------------------------------------------------------------------- products and networks


def test_products_are_the_published_vectors():
    given = [(torch.tensor([[m]]), 2 * torch.tensor([[s]]).log()) for m, s in [(1, 0.5), (-1, 0.1)]]
    several = linear_model("meme", (3, 2, 4), explicit="product").conditional_prior
    products = [(by, (-0.923, 0.0981)) for by in (svae.product, vaevae.product, several)]
    for by, known in [*products, (linear_model("mvae").product, (-0.914, 0.0976))]:  # and the prior
        mu, logvar = by(given)
        assert (mu.item(), (0.5 * logvar).exp().item()) == pytest.approx(known, abs=6e-4)


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
        gradients[experts] = encode.head.weight.grad.abs().max()
    assert gradients["bounded"] > 0.01 and not gradients["exact"] > 1e-9
    for flatness in (80.0, math.inf):  # products of them stay finite
        flat = script.bounded(torch.ones(1, L), torch.full((1, L), flatness))
        mu, logvar = svae.product([flat] * 2)
        assert mu.tolist() == [[1.0] * L] and logvar.exp().max() <= 5 * (1 + 1e-5)


@pytest.mark.parametrize("name, options, trunks", [
    ("svae", {}, 3**2), ("vaevae", {}, 3 * 2**2), ("vaevae", dict(variant="a"), 3),
])  # fmt: skip
def test_parameter_counts_grow_as_figure_2_counts_them(name, options, trunks):
    def size(module):
        return sum(w.numel() for w in module.parameters())

    modules = list(SCRIPTS[name].MODEL(nets.modalities("mnist-split3"), 64, **options).modules())
    found = [m.trunk for m in modules if isinstance(m, nets.Encoder)]
    found += [t for m in modules if isinstance(m, nets.Joint) for t in m.trunks]
    one = size(nets.modalities("mnist-split3")[0].encoder(64).trunk)
    assert [size(trunk) for trunk in found] == [one] * trunks


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
             dict(samples=0), dict(samples=2**31), dict(pseudo_samples=0),
             dict(pseudo_samples=2**31), dict(classifier_scale=math.nan)],
    "mmvae": [dict(samples=0), dict(samples=2**31), dict(objective="x"),
              dict(tight=True, objective="elbo"), dict(posterior="x")],
    "svae": [dict(objective="x"), dict(experts="x")],
    "vaevae": [dict(objective="x"), dict(variant="x")],
    "mvae": [dict(subsets=1), dict(subsets=-1), dict(subsets=4, sizes=(3, 2, 4)), dict(anneal=-1),
             dict(experts="x")],
}  # fmt: skip


@MODELS
def test_options_that_cannot_be_or_would_do_nothing_are_refused(name):
    for options in REFUSED[name]:
        with pytest.raises(ValueError, match=next(iter(options))):
            linear_model(name, **options)
    if name in ("meme", "mmvae"):
        assert linear_model(name, samples=2**31 - 1).samples == 2**31 - 1


@MODELS
def test_flags_are_the_constructor_s_arguments_and_defaults(name):
    flags, signature = argparse.ArgumentParser(), inspect.signature(SCRIPTS[name].MODEL)
    SCRIPTS[name].options(flags.add_argument)
    known = {key: p.default for key, p in signature.parameters.items() if p.default is not p.empty}
    assert vars(flags.parse_args([])) == known
    for key, default in known.items():
        typed = [f"--{key.replace('_', '-')}", *([] if default is False else [str(default)])]
        found = vars(flags.parse_args(typed))[key]
        assert found == (str(default) if default is None else True if default is False else default)


ALL, ONE, TWO = (True, True), (True, False), (False, True)
THREE, TWOS = (True,) * 3, [(True, True, False), (True, False, True), (False, True, True)]
UNTRAINED = [
    ("meme", dict(direction="x0"), [ALL, ONE], [ALL, TWO], "x0"),
    ("meme", {}, [ALL, TWO], None, ""),
    ("svae", dict(objective="vaevae"), [ALL, ONE, TWO], [ALL, ONE], "x1"),
    ("svae", dict(objective="svae"), [ALL], None, ""),
    ("vaevae", dict(objective="vaevae"), [ALL, ONE, TWO], [ALL, ONE], "x1"),
    ("vaevae", dict(objective="svae"), [ALL], [ONE, TWO], "shows x0 and x1"),
    ("vaevae", dict(objective="svae"), [THREE], TWOS, "shows x0 and x1 and x2"),
    ("vaevae", dict(objective="svae"), [THREE], TWOS[:2], "shows x1 and x2"),
    ("vaevae", dict(objective="svae", variant="a"), TWOS, None, ""),
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


def test_likelihoods_and_means_are_those_of_torch():
    parameter, x = torch.randn(3, 4, 2, 5), torch.rand(4, 2, 5)
    densities = [("normal", Normal(parameter, 0.3), x), ("laplace", Laplace(parameter, 0.3), x)]
    densities += [("bernoulli", Bernoulli(logits=parameter), x.round())]
    densities += [("poisson", Poisson(parameter.exp()), (5 * x).round())]
    for kind, density, x in densities:
        modality = nets.Modality("x", (2, 5), None, None, kind, weight=9.0, scale=0.3)
        found = nets.log_prob(modality, parameter, x)
        assert_close(found, density.log_prob(x).sum((-1, -2)))
        assert_close(nets.mean(modality, parameter), density.mean)
    known = "none of bernoulli, laplace, normal, poisson, categorical"
    with pytest.raises(ValueError, match=known):
        nets.log_prob(modality._replace(likelihood="x"), parameter, x)


def test_padding_is_not_scored_and_every_other_word_is():
    modality = nets.modalities("cub", vocabulary=4)[1]
    logits, x = torch.randn(3, 2, 32, 4), torch.randint(4, (2, 32))
    each = Categorical(logits=logits).log_prob(x)  # words 0 to 3, of which 1 is <pad>
    known = torch.where(x == 1, 0, each).sum(-1)
    assert_close(nets.log_prob(modality, logits, x), known)
    assert_close(nets.log_prob(modality, logits[0], x), known[0])
    assert nets.log_prob(modality, logits.bfloat16(), x).dtype == torch.float32
    assert_close(nets.mean(modality, logits), logits.softmax(-1))


def test_variances_are_floored_smoothly_at_1e_6():
    h = torch.tensor([[0.5, -1.0, -200.0, 3.0], [2.0, 0.0, -13.0, -14.0]])
    mu, logvar = nets.gaussian(h.bfloat16())
    assert mu.dtype == logvar.dtype == torch.float32
    assert mu.tolist() == h[:, :2].tolist()
    assert_close(logvar, (1e-6 + h[:, 2:].exp()).log())


def test_batchnorm_takes_one_example_and_pseudo_samples_by_its_running_statistics():
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh())
    net(5 + torch.randn(6, 3))  # its statistics are not those that it starts with
    state = {key: value.clone() for key, value in net.state_dict().items()}
    u, x = torch.randn(4, 3, requires_grad=True), torch.randn(6, 3)
    by_running, gradients = net.eval()(u), []
    assert_close(nets.apply(net, u), by_running)
    nets.apply(net, u[:1])
    assert not net[1].training
    net.train()
    assert_close(nets.apply(net, u[:1]), by_running[:1])
    assert_close(nets.apply(net, u, running=True), by_running)
    assert same(state, net.state_dict()) and net[1].training
    for later in (False, True):  # a later batch does not change the gradient of pseudo-samples
        net.load_state_dict(state)
        h = nets.apply(net, u, running=True)
        if later:
            nets.apply(net, x)
            assert not same(state, net.state_dict())
        gradients.append(torch.autograd.grad(h.square().sum(), u)[0])
    assert_close(*gradients)
    net.load_state_dict(state)
    by_batch = nets.apply(net, x)
    net.load_state_dict(state)
    assert_close(by_batch, net(x))


def test_networks_are_what_they_are_called():
    modalities = [m._replace(name="x") for m in nets.modalities("glyphs")]
    joint, xs = nets.Joint(modalities, 3), images("glyphs", 4)
    h = [trunk(x) for trunk, x in zip(joint.trunks, xs)]
    h = torch.cat([(h_m @ layer[0].weight.T + layer[0].bias).relu()
                   for h_m, layer in zip(h, joint.layers)], 1)  # fmt: skip
    assert h.shape == (4, 2 * 512)
    assert_close(joint(xs), nets.gaussian(joint.head(h)))
    channels_last = torch.arange(30).view(1, 3, 5, 2)
    assert_close(nets.Map(2, 3, 5)(channels_last.flatten(1)), channels_last.permute(0, 3, 1, 2))
    with torch.autocast("cpu", torch.bfloat16):
        assert modalities[0].decoder(3)(torch.randn(5, 3)).dtype == torch.float32
    weight, words = torch.randn(7, 128), torch.randint(7, (2, 32))
    embed, logits = nets.WordEmbedding(weight), nets.WordLogits(nn.Parameter(weight))
    h = embed(words)
    assert h.shape == (2, 1, 32, 128) and (h[1, 0, 5] == weight[words[1, 5]]).all()
    assert_close(embed(100 * nn.functional.one_hot(words, 7).float()), h)
    nn.init.normal_(logits.bias)
    assert_close(logits(h), h[:, 0] @ weight.T + logits.bias)


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
    ("--clip -1", "--clip"), ("--weights 1,x", "x"), ("--likelihoods laplace", "--likelihoods"),
    ("--likelihoods laplace,nope", "no likelihood"), ("--nope", "--nope"),
    ("--direction nope", "direction"), ("--direction 0 --paired 0.5", "direction 0"),
    ("--kl nope", "kl"), ("--samples 0", "samples"), ("--out run", "holds a run"),
    ("--out absent --resume", "no run to resume"), ("--out run --seed 1 --resume", "seed"),
    ("--out run --resume --latent-dim 5", "latent_dim"), ("--out run --resume --limit 20", "limit"),
    ("--out run --resume --samples 3", "samples"),
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


@MODELS
def test_clip_scales_the_whole_gradient_down_to_its_norm_and_leaves_smaller_ones(
    name, arrays, tmp_path
):
    def gradient(**clip):  # of a run's only step: a tenth of it is Adam's first mean
        run = tmp_path / str(len(list(tmp_path.iterdir())))
        train(name, dataset=arrays, limit=16, batch_size=16, epochs=1, out=run, **clip)
        state = checkpoint(run)["optimizer"]["state"]
        return torch.cat([10 * of["exp_avg"].flatten() for of in state.values()])

    free = gradient()
    assert torch.equal(gradient(clip=1.01 * free.norm().item()), free)
    assert torch.equal(gradient(clip=0), free)
    assert_close(gradient(clip=0.5), 0.5 * free / free.norm())


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
                w -= 0 if g is None else 1e-4 * g.sign()
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
