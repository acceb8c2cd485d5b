"""The mathematics of the five models in numbers, and one short run of each. No download, no GPU.

First the papers' formulas a second time: term by term, sample by sample, in float64, with
torch.distributions. A model's objective, and its gradient with respect to every parameter, must be
the formula's for the same noise. Then exact evidences, of decoders that are linear with Gaussian
noise. Then what a model accepts, the papers' tables, and the layers and likelihoods of nets.py.
"""

import argparse
import itertools
import json
import math
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributions import Bernoulli, Categorical, Distribution, Independent, Laplace
from torch.distributions import MixtureSameFamily, MultivariateNormal, Normal, kl_divergence
from torch.testing import assert_close

import data
import meme
import mvae
import nets
import svae
import vaevae

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "tests"))
from helpers import SCRIPTS, arrays, content, images, log_of, plain_modality  # noqa: E402, F401
from helpers import same, seeded, train, weights  # noqa: E402, F401

B, L = 4, 2
NOISE = 0.7  # the standard deviation of every x given z where decoders are linear
MODELS = pytest.mark.parametrize("name", SCRIPTS)

# ----------------------------------------------------------------- small models, and the same noise


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    Distribution.set_default_validate_args(False)  # half the time
    yield
    Distribution.set_default_validate_args(True)
    torch.set_default_dtype(torch.float32)


def small_model(name, count, **options):
    """`count` modalities of three likelihoods, none of weight 1, the first with plain networks, all
    with BatchNorm and random parameters, so that nothing is near 0 or 1 by itself."""
    modalities = [plain_modality("x0", 3, "normal", weight=0.6, scale=0.7)]
    rows = [(2, "bernoulli", 2.0, 1.0), (4, "laplace", 1.5, 1.3)]
    for k, (size, likelihood, weight, scale) in enumerate(rows[: count - 1], 1):
        encoder = partial(nets.mlp_encoder, (size, 5), norm=True)
        decoder = partial(nets.mlp_decoder, (5, size), (size,), activation=nn.Tanh)
        modalities.append(
            nets.Modality(f"x{k}", (size,), encoder, decoder, likelihood, weight, scale)
        )
    model = SCRIPTS[name].MODEL(modalities, L, **options)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=min(0.5, 8 / parameter.shape[-1]))
    return model


def batch(model, n=B):
    """n examples of every modality."""
    examples = [(m.likelihood, torch.randn(n, *m.shape)) for m in model.modalities]
    return [(x > 0).to(x.dtype) if kind == "bernoulli" else x for kind, x in examples]


def only(xs, *observed):
    """xs with all other modalities missing."""
    return [x if m in observed else None for m, x in enumerate(xs)]


def subsets(members):
    """All subsets but the empty one, small ones first."""
    sizes = range(1, len(members) + 1)
    return [s for size in sizes for s in itertools.combinations(members, size)]


def recorded(call, *args):
    """-> call(*args), and the random numbers that it drew, in order."""
    noise = []

    def recording(draw):
        return lambda *a, **b: noise.append(draw(*a, **b)) or noise[-1]

    with pytest.MonkeyPatch.context() as patch:
        for owner, draw in [(torch, "randn"), (torch, "randn_like"), (torch, "randperm"),
                            (Laplace, "sample")]:  # fmt: skip
            patch.setattr(owner, draw, recording(getattr(owner, draw)))
        return call(*args), noise


def holds(formula, model, xs, **options):
    """Objective and gradient of every parameter are the formula's, for the same noise."""
    objective, recording = recorded(model.objective, *xs)
    noise = iter(recording)
    expected = formula(model, xs, noise, **options)
    assert next(noise, None) is None  # the formula uses all of it
    sides = []
    for value in (objective, expected):
        names, parameters = zip(*model.named_parameters())
        gradients = torch.autograd.grad(
            value, parameters, allow_unused=True, materialize_grads=True
        )
        sides.append({"objective": value} | dict(zip(names, gradients)))
    assert_close(*sides)


# ------------------------------------------ the formulas' symbols: distributions of z, (B,) of them


def gaussian(mu, logvar):
    """N(mu, exp(logvar))."""
    return Independent(Normal(mu, torch.exp(logvar / 2)), 1)


def unit():
    """p(z) = N(0, I)."""
    return gaussian(torch.zeros(L), torch.zeros(L))


def product(*experts):
    """The Gaussian proportional to the product of Gaussians."""
    precision = sum(1 / q.variance for q in experts)
    mean = sum(q.mean / q.variance for q in experts) / precision
    return Independent(Normal(mean, precision**-0.5), 1)


def mixture(*experts):
    """The equal mixture of distributions of z, of one family."""
    family = type(experts[0].base_dist)
    loc, scale = (
        torch.stack([getattr(q.base_dist, key) for q in experts], -2) for key in ("loc", "scale")
    )
    equal = Categorical(torch.ones(loc.shape[:-1]))
    return MixtureSameFamily(equal, Independent(family(loc, scale), 1))


def expert(q, experts):
    """An expert of a product: q itself, or its bounded form."""
    if experts == "exact":
        return q
    variance = torch.where(q.variance > 1, 1 + q.variance.log(), q.variance)
    return Independent(Normal(q.mean, (1 / variance + 0.1) ** -0.5), 1)


def draw(q, eps):
    """z ~ q(z), from standard noise."""
    return q.base_dist.loc + q.base_dist.scale * eps


def log_p(model, m, x, z):
    """log p(x_m|z) of each example, times the weight of its likelihood. z (B, L) -> (B,)"""
    modality, parameter = model.modalities[m], model.decoders[m](z)
    density = {
        "normal": lambda: Normal(parameter, modality.scale),
        "laplace": lambda: Laplace(parameter, modality.scale),
        "bernoulli": lambda: Bernoulli(logits=parameter),
    }[modality.likelihood]()
    return modality.weight * Independent(density, 1).log_prob(x[m])


def log_mean(logs):
    """log 1/n Σ exp."""
    return torch.stack(logs).exp().mean(0).log()


def observed(xs):
    """The observed modalities."""
    return [m for m, x in enumerate(xs) if x is not None]


# --------------------------------------------------------------------------------------------- MEME


def meme_encoders(model, xs):
    """q(z|x_m), which is p(z|x_m) too. -> {m: q}"""
    return {m: gaussian(*model.encoders[m](xs[m])) for m in observed(xs)}


def p_given(t, explicit):
    """p(z|t) of the encoders of t: App. E's mixture, or product."""
    return t[0] if len(t) == 1 else product(*t) if explicit == "product" else mixture(*t)


def pseudo_prior(model, others):
    """1/N Σ_i p(z|u_i), the u of the modalities `others`, by running statistics."""
    components = []
    for m in others:
        training = model.encoders[m].training
        components.append(model.encoders[m].eval()(model.pseudo[m]))
        model.encoders[m].train(training)
    mu, logvar = (torch.cat(parameters) for parameters in zip(*components))
    return MixtureSameFamily(Categorical(torch.ones(len(mu))), gaussian(mu, logvar))


def eq_4(model, s, x, q, prior, eps):
    """L(s) = E_q(z|s)[ log p(s|z) / q(z|s) + log 1/N Σ_i p(z|u_i) ]"""
    z = draw(q, eps)
    return log_p(model, s, x, z) - q.log_prob(z) + prior.log_prob(z)


def eq_6(model, s, x, q, eps, kl="closed", classifier_scale=10, full_gradient=False,
         explicit="mixture"):  # fmt: skip
    """L(s -> t) = E_q(z|s)[ q(t|z) / q(t|s) log p(s|z) p(z|t) / q(z|s) q(t|z) ] + log q(t|s)"""
    t = [m for m in q if m != s]
    z = [draw(q[s], eps_k) for eps_k in eps]  # K of them, z[0] under E
    log_q_t = [sum(log_p(model, m, x, z_k) for m in t) for z_k in z]
    log_q_t_given_s = log_mean(log_q_t)  # Eq. (8), App. D: z[0] is one of them
    w = torch.exp(log_q_t[0] - log_q_t_given_s)  # Eq. (10)
    if not full_gradient:
        w = w.detach()  # App. B: without the first term of eq. (7)
    log_p_s = log_p(model, s, x, z[0])
    p = p_given([q[m] for m in t], explicit)
    if kl == "closed" and not isinstance(p, MixtureSameFamily):
        expectation = w * (log_p_s - log_q_t[0]) - kl_divergence(q[s], p)
    else:
        expectation = w * (log_p_s + p.log_prob(z[0]) - q[s].log_prob(z[0]) - log_q_t[0])
    return expectation + classifier_scale * log_q_t_given_s


def meme_formula(model, xs, noise, direction=None, samples=10, **options):
    q, values = meme_encoders(model, xs), []
    if len(q) == 1:
        [s] = q
        prior = pseudo_prior(model, {*range(len(xs))} - {s})
        return eq_4(model, s, xs, q[s], prior, next(noise)).mean()
    for s in q if direction is None else [int(direction[1:])]:  # Eq. (2), (11): their mean
        eps = next(noise)
        assert eps.shape == (samples, B, L)
        values.append(eq_6(model, s, xs, q, eps, **options))
    return torch.stack(values).mean()


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
def test_meme_is_eq_6_averaged_over_directions(float64, count, options):
    model = small_model("meme", count, **options)
    for pattern in subsets(range(count))[count:]:
        if options.get("direction") in (None, *(f"x{m}" for m in pattern)):
            holds(meme_formula, model, only(batch(model), *pattern), **options)


@pytest.mark.parametrize("count, pseudo_samples", [(2, 1), (2, 3), (3, 2)])
def test_meme_of_one_modality_is_eq_4(float64, count, pseudo_samples):
    model = small_model("meme", count, pseudo_samples=pseudo_samples)
    for s in range(count):
        holds(meme_formula, model, only(batch(model), s))


# ---------------------------------------------------------------------------------- SVAE and VAEVAE


def svae_posteriors(model, xs, prior_expert=False, experts="bounded", **_):
    """-> {subset: a list of products}"""
    pattern, every, q, posteriors = observed(xs), range(len(xs)), {}, {}
    for i, j in itertools.product(
        every, pattern
    ):  # q_i^j(z|x_j): stands in for q_i where i is not j
        q[i, j] = expert(gaussian(*model.encoders[i][j](xs[j])), experts)
    prior = [unit()] if prior_expert else []
    for subset in subsets(pattern):
        own, missing = [q[m, m] for m in subset], [m for m in every if m not in subset]
        factors = [own + [q[k, j] for k in missing] for j in subset]  # Eq. (4), (5), (35)-(37)
        factors = factors if missing else [own]  # Eq. (3), (33)
        posteriors[subset] = [product(*f, *prior) for f in factors]
    return posteriors


def vaevae_posteriors(model, xs, variant="b", **_):
    q = {(m,): [gaussian(*model.encoders[m](xs[m]))] for m in observed(xs)}
    for subset in subsets(observed(xs))[len(q) :]:
        if variant == "b":
            joint = model.joints[str(subset)]
            q[subset] = [gaussian(*joint([xs[m] for m in subset]))]
        else:
            q[subset] = [product(*(q[m,][0] for m in subset))]
    return q


PRIOR, SINGLES, PAIRS = "p(z)", [(0,), (1,), (2,)], [(0, 1), (0, 2), (1, 2)]
FOUR = subsets(range(4))
REGULARISED_TO = {  # number of modalities -> subset: the p of its KL(q(z|subset) || p)
    2: {(0, 1): SINGLES[:2]}  # Eq. (19)
    | dict.fromkeys(SINGLES[:2], [PRIOR]),  # Eq. (20), (21)
    3: {(0, 1, 2): PAIRS}  # Eq. (29)
    | dict.fromkeys(PAIRS, [*SINGLES, PRIOR])  # Eq. (30)
    | dict.fromkeys(SINGLES, [PRIOR]),  # Eq. (31)
    4: dict.fromkeys(FOUR[:4], [PRIOR])  # ours, after the same pattern
    | dict.fromkeys(FOUR[4:14], [*FOUR[:4], PRIOR])
    | {FOUR[14]: FOUR[10:14]},
}


def sum_of_bounds(model, xs, noise, posteriors, objective, kl_terms=None, **options):
    """L(x_1, x_2), or of three L_123 + Σ L_ij + Σ L_i, eq. (32), of the observed modalities. Where
    q(z|x_i, x_j) is two products, f(q) is f of the one plus f of the other."""
    q, total = posteriors(model, xs, **options), 0
    q[PRIOR] = [unit()]
    for subset in subsets(observed(xs)):
        if objective == "vaevae" and len(subset) == 1 < len(observed(xs)):
            continue  # only eq. (19) has L(x_1) + L(x_2)
        for q_s in q[subset]:
            z = draw(q_s, next(noise))
            ps = [p for other in REGULARISED_TO[len(xs)][subset] for p in q.get(other, [])]
            kl = sum(kl_divergence(q_s, p) for p in ps)
            if kl_terms == "mean" or kl_terms is None and len(xs) > 3:
                kl = kl / len(ps)
            total += (sum(log_p(model, m, xs, z) for m in subset) - kl).mean()
    return total


def holds_for_all_patterns(formula, name, count, options, **more):
    model = small_model(name, count, **options)
    for pattern in subsets(range(count)):
        holds(formula, model, only(batch(model), *pattern), **options, **more)


SVAES = [{}, dict(kl_terms="mean"),
         *(dict(objective=objective, prior_expert=prior, experts=experts)
           for objective in ("svae", "vaevae") for prior in (False, True)
           for experts in ("exact", "bounded"))]  # fmt: skip
VAEVAES = [{}, dict(kl_terms="mean"),
           *(dict(objective=objective, variant=variant)
             for objective in ("svae", "vaevae") for variant in "ab")]  # fmt: skip
EQUATIONS = pytest.mark.parametrize("count", [2, 3], ids=["eq_19_to_21", "eq_29_to_32"])


@EQUATIONS
@pytest.mark.parametrize("options", SVAES)
def test_svae_is_the_sum_of_the_printed_bounds(float64, options, count):
    options = dict(objective="svae") | options
    holds_for_all_patterns(sum_of_bounds, "svae", count, options, posteriors=svae_posteriors)


@EQUATIONS
@pytest.mark.parametrize("options", VAEVAES)
def test_vaevae_is_the_sum_of_the_printed_bounds(float64, options, count):
    options = dict(objective="vaevae") | options
    holds_for_all_patterns(sum_of_bounds, "vaevae", count, options, posteriors=vaevae_posteriors)


@pytest.mark.parametrize("name, options", [
    ("svae", {}), ("svae", dict(kl_terms="sum")), ("vaevae", dict(variant="a"))
])  # fmt: skip
def test_beyond_three_modalities_it_is_the_mean_of_the_kls(float64, name, options):
    posteriors = svae_posteriors if name == "svae" else vaevae_posteriors
    model, xs = linear_model(name, (2,) * 4, **options), list(torch.randn(4, B, 2))
    for pattern in ([2], [0, 3], [0, 1, 3], [0, 1, 2, 3]):
        inputs = only(xs, *pattern)
        holds(sum_of_bounds, model, inputs, posteriors=posteriors, objective=name, **options)


@pytest.mark.parametrize("name, options", [("svae", {}), ("vaevae", dict(variant="a"))])
def test_random_terms_have_the_mean_of_all(float64, name, options, monkeypatch):
    every, xs = linear_model(name, (2,) * 4, **options), list(torch.randn(4, B, 2))
    some = linear_model(name, (2,) * 4, terms=5, **options)
    some.load_state_dict(every.state_dict())
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)
    for pattern in ([0, 1, 2, 3], [0, 1, 3]):
        inputs, values = only(xs, *pattern), []
        terms = 2 ** len(pattern) - 1 - (len(pattern) if name == "vaevae" else 0)
        for k in range(terms):  # every term is drawn equally often
            monkeypatch.setattr(torch, "randperm", lambda n, k=k: torch.arange(n).roll(k))
            values.append(some.objective(*inputs))
        assert_close(torch.stack(values).mean(), every.objective(*inputs))
        assert terms <= 5 or len({round(value.item(), 6) for value in values}) > 1
    three = linear_model(name, (2,) * 3, terms=1, **options)  # has an effect from four on alone
    posteriors = svae_posteriors if name == "svae" else vaevae_posteriors
    monkeypatch.undo()
    holds(sum_of_bounds, three, xs[:3], posteriors=posteriors, objective=name, **options)


# -------------------------------------------------------------------------------------------- MMVAE


def mmvae_experts(model, xs, family="normal", **_):
    """q_r(z|x_r) of the observed modalities."""
    kind, experts = {"normal": Normal, "laplace": Laplace}[family], []
    for m in observed(xs):
        mu, logvar = model.encoders[m](xs[m])
        experts.append(Independent(kind(mu, torch.exp(logvar / 2)), 1))  # Laplace: scale b
    return experts


def mmvae_prior(model, family="normal", **_):
    scale = torch.exp(model.prior_logvar / 2)
    return Independent({"normal": Normal, "laplace": Laplace}[family](torch.zeros(L), scale), 1)


def stopped(q):
    """q, with no gradient to its parameters."""
    family, loc, scale = type(q.base_dist), q.base_dist.loc, q.base_dist.scale
    return Independent(family(loc.detach(), scale.detach()), 1)


def log_w(model, xs, z, experts, prior):
    """log p(z) Π_m p(x_m|z) / 1/R Σ_r q_r(z|x_r)"""
    log_p_x = sum(log_p(model, m, xs, z) for m in observed(xs))
    return log_p_x + prior.log_prob(z) - mixture(*experts).log_prob(z)


def dreg_gradient(z, log_w_held):
    """0, with the gradient of Tucker et al. (2019), where v_k = w_k / Σ w and the encoders' own
    density is held: Σ_k v_k d log w_k / dθ for decoders and prior, for the encoders
    Σ_k v_k² d log w_k / dz_k dz_k / dφ."""
    leaves = [z_k.detach().requires_grad_() for z_k in z]
    logs, total = [log_w_held(z=leaf) for leaf in leaves], 0
    for z_k, leaf, log, v_k in zip(z, leaves, logs, torch.stack(logs).detach().softmax(0)):
        [slope] = torch.autograd.grad(log.sum(), leaf, retain_graph=True)
        total = total + v_k * log + v_k**2 * (slope * z_k).sum(-1)
    return total - total.detach()


def mmvae_formula(model, xs, noise, objective="iwae", samples=10, tight=False, **options):
    experts, prior, eps = mmvae_experts(model, xs, **options), mmvae_prior(model, **options), None
    eps, bounds = next(noise), []
    assert eps.shape == (len(experts), samples, B, L)
    z = [[draw(q_r, eps_k) for eps_k in eps_r] for q_r, eps_r in zip(experts, eps)]
    for group in [sum(z, [])] if tight else z:  # all inside one log, or one for each expert
        logs = [log_w(model, xs, z_k, experts, prior) for z_k in group]
        if objective == "elbo":
            bound = sum(logs) / samples  # 1/R Σ_r E[ log w_r ]
        else:
            bound = log_mean(logs)  # 1/R Σ_r E[ log 1/K Σ_k w_r,k ], or log 1/RK ΣΣ
        if objective == "dreg":
            held = [stopped(q_r) for q_r in experts]
            log_w_held = partial(log_w, model, xs, experts=held, prior=prior)
            bound = bound.detach() + dreg_gradient(group, log_w_held)
        bounds.append(bound)
    return torch.stack(bounds).mean()


MMVAES = [{}, *(dict(objective=objective, samples=3, tight=tight, family=family)
                for family in ("normal", "laplace") for objective, tight in
                [("elbo", False), ("iwae", False), ("iwae", True), ("dreg", False),
                 ("dreg", True)])]  # fmt: skip


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("options", MMVAES)
def test_mmvae_is_its_bound_of_importance_weights(float64, options, count):
    holds_for_all_patterns(mmvae_formula, "mmvae", count, options)
    with torch.no_grad():  # DReG's hook needs a gradient
        model = small_model("mmvae", count, **options)
        assert model.objective(*batch(model)).isfinite()


@pytest.mark.parametrize("family, spread", [("normal", (2 / math.pi) ** 0.5), ("laplace", 1.0)])
def test_mmvae_draws_standard_noise(family, spread):
    model = small_model("mmvae", 2, family=family, samples=5_000)
    assert not linear_model("mmvae").prior_logvar.any()  # and p(z) starts as N(0, I), or Laplace
    eps = model.noise(7 + torch.randn(2, B, L))
    assert eps.shape == (2, 5_000, B, L)
    assert_close(eps.mean(1), torch.zeros(2, B, L), atol=0.1, rtol=0)
    assert_close(eps.abs().mean(1), torch.full((2, B, L), spread), atol=0.1, rtol=0)


# --------------------------------------------------------------------------------------------- MVAE


def mvae_product(model, xs, subset, experts="bounded", **_):
    """q(z|X) ∝ p(z) Π_m q_m(z|x_m)."""
    q = [expert(gaussian(*model.encoders[m](xs[m])), experts) for m in subset]
    return product(unit(), *q)


def mvae_formula(model, xs, noise, subsets=0, beta=1, **options):
    """L(X) = ELBO(X) + Σ_m ELBO(x_m) + ELBO of random subsets"""
    pattern, total = observed(xs), 0
    terms = [pattern, *([m] for m in pattern)] if len(pattern) > 1 else [pattern]
    for _ in range(subsets if len(pattern) > 2 else 0):
        terms.append([pattern[k] for k in next(noise)[:2]])  # of three a random subset has two
    for subset in terms:
        q = mvae_product(model, xs, subset, **options)
        z = draw(q, next(noise))
        log_p_x = sum(log_p(model, m, xs, z) for m in subset)
        total += (log_p_x - beta * kl_divergence(q, unit())).mean()
    return total


@pytest.mark.parametrize("count, options", [
    (2, dict()), (2, dict(experts="exact")), (3, dict()), (3, dict(experts="exact", subsets=2)),
    (3, dict(subsets=3)),
])  # fmt: skip
def test_mvae_sums_the_elbos_of_all_each_and_random_subsets(float64, count, options):
    holds_for_all_patterns(mvae_formula, "mvae", count, options)


def test_beta_rises_linearly_to_1(float64):
    model = small_model("mvae", 2, anneal=4)
    assert model.beta == 1  # before any epoch starts
    for epoch, beta in [(1, 0.25), (2, 0.5), (4, 1), (5, 1)]:
        model.start_epoch(epoch)
        holds(mvae_formula, model, batch(model), beta=beta)
    without = small_model("mvae", 2)
    without.start_epoch(1)
    assert without.beta == 1


def test_random_subsets_are_neither_single_nor_complete(monkeypatch):
    model, terms = linear_model("mvae", (2,) * 4, subsets=10), []  # as many as there are
    monkeypatch.setattr(model, "elbo", lambda subset, *_: terms.append(subset) or torch.zeros(1))
    for _ in range(20):
        model.objective(*torch.randn(4, 1, 2))
    random = [tuple(sorted(subset)) for k, subset in enumerate(terms) if k % 15 >= 5]
    assert set(random) == {s for s in subsets(range(4)) if len(s) in (2, 3)}
    assert 70 < sum(len(subset) == 2 for subset in random) < 130  # of 200: both sizes as often


# ------------------------------------------------------------------------------ posterior and prior


def posterior(name, model, xs, explicit="mixture", **options):
    """q(z|observed), the equal mixture of some Gaussians. -> a list of them"""
    if name == "meme":
        q = list(meme_encoders(model, xs).values())
        return [product(*q)] if explicit == "product" else q
    if name == "mmvae":
        return mmvae_experts(model, xs, **options)
    if name == "mvae":
        return [mvae_product(model, xs, observed(xs), **options)]
    posteriors = {"svae": svae_posteriors, "vaevae": vaevae_posteriors}[name]
    return posteriors(model, xs, **options)[tuple(observed(xs))]


FORMS = [(name, count, {}) for name in SCRIPTS for count in (2, 3)]
FORMS += [("meme", 3, dict(explicit="product")), ("mmvae", 3, dict(family="laplace")),
          ("vaevae", 3, dict(variant="a")), ("svae", 3, dict(prior_expert=True, experts="exact")),
          ("mvae", 3, dict(experts="exact"))]  # fmt: skip


@pytest.mark.parametrize("name, count, options", FORMS)
def test_posterior_and_prior_are_those_of_the_formulas(float64, name, count, options):
    model, z = small_model(name, count, **options).requires_grad_(False), torch.randn(3, B, L)
    for pattern in [(), *subsets(range(count))]:
        prior = model.prior(*only(batch(model), *pattern)) if pattern else model.prior()
        assert prior.batch_shape == () and prior.event_shape == (L,)
        others = [m for m in range(count) if len(pattern) != 1 or m not in pattern]  # Eq. (4)
        expected = {"meme": lambda: pseudo_prior(model, others),
                    "mmvae": lambda: mmvae_prior(model, **options)}.get(name, unit)()  # fmt: skip
        assert_close(prior.log_prob(z), expected.log_prob(z))
    for pattern in subsets(range(count)):
        xs = only(batch(model), *pattern)
        q, expected = model.posterior(*xs), mixture(*posterior(name, model, xs, **options))
        assert q.batch_shape == (B,) and q.event_shape == (L,)
        assert_close(q.log_prob(z), expected.log_prob(z))


@MODELS
def test_samples_of_one_modality_are_those_of_its_posterior(name):
    model, xs = small_model(name, 3), only(batch(small_model(name, 3)), 1)
    for n in (1, 3):
        z = same_noise(lambda: model.sample_posterior(xs, n))
        assert z.shape == (n, B, L) and not z.requires_grad
        assert_close(z, same_noise(lambda: model.posterior(*xs).sample((n,))))
    assert model.sample_posterior(xs).shape == (1, B, L)
    xs = batch(model)
    assert model.resamples == (name == "meme")  # else it is the same for several modalities
    z = same_noise(lambda: model.sample_posterior(xs, 2))
    alike = torch.equal(z, same_noise(lambda: model.posterior(*xs).sample((2,))))
    assert alike != model.resamples


@MODELS
def test_decode_returns_the_mean_of_every_modality(float64, name):
    model, z = small_model(name, 3), torch.randn(5, 2, L)
    parameters = [decode(z) for decode in model.decoders]
    for m, mean in enumerate(model.decode(z)):
        assert_close(mean, parameters[m].sigmoid() if m == 1 else parameters[m])
    one = SCRIPTS[name].MODEL(model.modalities, 1)  # a single latent dimension
    assert one.posterior(*only(batch(model), 0, 1)).sample().shape == (B, 1)


@MODELS
def test_likelihoods_and_streams_have_their_weights(float64, name):
    model, z = small_model(name, 3).eval(), torch.randn(5, B, L)
    xs = batch(model)
    model.requires_grad_(False)
    for m in range(3):
        expected = torch.stack([log_p(model, m, xs, z_k) for z_k in z])
        assert_close(model.weighted_log_p(m, z, xs[m]), expected)
    streams = [(0.5, xs), (3.0, only(xs, 1))]
    expected = same_noise(lambda: [-weight * model.objective(*x) for weight, x in streams])
    assert_close(same_noise(model, streams), torch.stack(expected))


# ---------------------------------------------------------------------------------- exact evidences


class Linear(nn.Module):
    """x -> W x + b, exp(logvar): an encoder whose posterior can be exact."""

    def __init__(self, latent_dim, size):
        super().__init__()
        self.head = nn.Linear(size, latent_dim)
        self.logvar = nn.Parameter(torch.randn(latent_dim) * 0.3 - 1)

    def forward(self, x):
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


def examples_of(q):
    """A batch of Gaussians, one by one."""
    return [Independent(Normal(*each), 1) for each in zip(q.base_dist.loc, q.base_dist.scale)]


def components(name, model, xs, given, **options):
    """The prior of log_likelihood, as an equal mixture. -> Gaussians, for each example"""
    if given is not None:
        return list(zip(*map(examples_of, posterior(name, model, given, **options))))
    if (
        name == "meme"
    ):  # where one modality alone is pattern, eq. (4)'s prior, else all pseudo-samples
        pattern = observed(xs)
        others = [m for m in range(len(xs)) if len(pattern) > 1 or m not in pattern]
        priors = [gaussian(*model.encoders[m](model.pseudo[m])) for m in others]
        return [[p for prior in priors for p in examples_of(prior)]] * B
    return [[mmvae_prior(model) if name == "mmvae" else unit()]] * B


@pytest.mark.parametrize(
    "name, count, options", [f for f in FORMS if f[1] == 3 and "family" not in f[2]]
)
def test_log_likelihood_is_the_exact_evidence(float64, monkeypatch, name, count, options):
    from eval import log_likelihood

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
    everything, asked, original = [torch.randn(B, n) / 2 for n in sizes], [], model.posterior
    monkeypatch.setattr(model, "posterior", lambda *xs: asked.append(observed(xs)) or original(*xs))
    for pattern in subsets(range(count)):
        for condition in [None, *subsets([m for m in range(count) if m not in pattern])]:
            xs = only(everything, *pattern)
            given = None if condition is None else only(everything, *condition)
            exactly = []
            for b, parts in enumerate(components(name, model, xs, given, **options)):
                x = {m: xs[m][b] for m in pattern}
                exactly.append(log_mean([evidence(model, x, p) for p in parts]))
            estimate = log_likelihood(model, xs, 10_000, given)
            assert_close(estimate, torch.stack(exactly), atol=0.1, rtol=0)
            assert asked[0] == sorted({*pattern, *(condition or ())})  # z ~ the posterior of all
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


def same_noise(call, *args):
    """call(*args), with the same noise whenever it is asked for."""
    torch.manual_seed(1)
    return call(*args)


def equals(values, exactly):
    error = 4 * values.std().item() / len(values) ** 0.5
    assert values.mean().item() == pytest.approx(exactly.item(), abs=error + 1e-4)


def test_bounds_at_exact_posteriors_are_the_evidences():
    xs, both = pair(4_000), {m: x[0] for m, x in enumerate(pair())}
    model = exact_model("mvae", 0, experts="exact")  # the product has the prior, once
    equals(model.elbo((0, 1), xs, model.encode(xs)), evidence(model, both))
    model = linear_model("svae", experts="exact")
    orthogonal(model)
    for i, j in itertools.product(range(2), repeat=2):  # p(z) is shared out: half to each expert
        exact(model.encoders[i][j], model.decoders[j] if i == j else None, 0.5)
    q = model.encode(xs, svae.all_subsets([0, 1]))
    equals(sum(model.bound(s, xs, q) for s in q), 2 * evidence(model, both))  # Eq. (23)
    model = exact_model("vaevae", 1, variant="a")
    mu, logvar = vaevae.product([encode(x) for encode, x in zip(model.encoders, xs)])
    precision = torch.exp(-logvar) - 1  # q(z|x_1) q(z|x_2) has the prior twice
    q = model.encode(xs, vaevae.all_subsets([0, 1]))
    q[0, 1] = [(mu * torch.exp(-logvar) / precision, -precision.log())]
    alone = sum(evidence(model, {m: both[m]}) for m in both)  # both conditional evidences:
    equals(model.bound((0, 1), xs, q), 2 * evidence(model, both) - alone)


def test_importance_weights_are_at_most_k_with_mean_1():
    model, log_q_t = linear_model("meme", samples=10), 30 * torch.randn(10, 5_000)
    log_q_t_given_s, w = model.importance_weight(log_q_t)
    assert w.min() >= 0 and w.max() <= 10 * (1 + 1e-5)
    each = [model.importance_weight(log_q_t.roll(k, 0))[1] for k in range(10)]  # each z_k as z_1
    assert_close(torch.stack(each).mean(0), torch.ones(5_000))
    small = log_q_t.max(0)[0] < 80
    assert_close(log_q_t_given_s[small], log_q_t.exp().mean(0).log()[small])


def reconstruction_gradient(**options):
    """The gradient of L(s -> t) with respect to the decoder of t, averaged over which of the K
    samples is z_1."""
    model, xs, gradients = linear_model("meme", samples=5, **options), pair(4), []
    noise = torch.randn(5, 4, L)
    for k in range(5):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "randn", lambda *shape, **_: noise.roll(k, 0))
            q = {m: model.encode(m, x) for m, x in enumerate(xs)}
            bound = model.bound(0, xs, q).sum()
        gradients.append(torch.autograd.grad(bound, model.decoders[1].weight)[0])
    return torch.stack(gradients).mean(0)


@pytest.mark.parametrize("kl", ["closed", "sample"])
def test_s_to_t_has_no_expected_gradient_at_c_1(float64, kl):
    at_1, at_2, at_10 = (
        reconstruction_gradient(kl=kl, classifier_scale=c) for c in (1.0, 2.0, 10.0)
    )
    assert at_2.abs().max() > 0.1
    assert_close(at_1, torch.zeros_like(at_1), atol=1e-12, rtol=0)
    assert_close(at_10, 9 * at_2)  # c = 10 is the default
    full = reconstruction_gradient(kl=kl, classifier_scale=1.0, full_gradient=True)
    assert full.abs().max() > 0.1


@pytest.mark.parametrize("pattern, samples, length", [
    ((0,), 10, None), ((0, 1), 10, 0.4), ((0, 1), 30, 0.2),
])  # fmt: skip
def test_dreg_is_biased_for_two_experts_and_exact_for_one(pattern, samples, length):
    xs, gradients = only(pair(1_000), *pattern), {}
    for objective in ("iwae", "dreg"):
        model, draws = exact_model("mmvae", 1, objective=objective, samples=samples), []
        encoder = model.encoders[0]
        encoder.logvar.data += 0.3  # at the exact posterior the gradient has no noise
        for _ in range(40):  # each the mean over 1,000 draws of the noise
            parameters = [encoder.logvar, encoder.head.bias]
            draws.append(torch.cat(torch.autograd.grad(model.objective(*xs), parameters)))
        draws = torch.stack(draws)
        gradients[objective] = draws.mean(0), draws.std(0) / 40**0.5
    (iwae, iwae_error), (dreg, dreg_error) = gradients.values()
    errors = (iwae - dreg).abs() / (iwae_error**2 + dreg_error**2).sqrt()
    if len(pattern) == 1:
        assert errors.max() < 4 and dreg_error.mean() < 0.8 * iwae_error.mean()
    else:
        assert errors.max() > 8
        assert dreg.norm() / iwae.norm() == pytest.approx(length, abs=0.06)  # as departures.md says


class Fixed(nn.Module):
    """x -> (mu, logvar), the same for every x."""

    def __init__(self, mu, logvar):
        super().__init__()
        self.mu, self.logvar = torch.tensor([mu]), torch.tensor([logvar])

    def forward(self, x):
        return self.mu.expand(len(x), 1), self.logvar.expand(len(x), 1)


def bits_model(*weights):
    """MEME of bits, one latent dimension: x_m ~ Bernoulli(sigmoid(slope z + offset))."""
    encoders = [Fixed(0.8, 0.5), Fixed(-1.5, 0.1), Fixed(0.0, -0.4)]
    decoders = [nn.Linear(1, 2 + m) for m in range(3)]
    generator = torch.Generator().manual_seed(2)
    for decode in decoders:
        decode.weight.data = 3 * torch.randn(decode.weight.shape, generator=generator)
        decode.bias.data = torch.randn(decode.bias.shape, generator=generator)

    def modality(m, weight):
        networks = lambda _: encoders[m], lambda _: decoders[m]  # noqa: E731
        return nets.Modality(f"x{m}", (2 + m,), *networks, "bernoulli", weight=weight)

    return meme.MEME([modality(*each) for each in enumerate(weights)], 1, pseudo_samples=1).eval()


GRID = torch.linspace(-12, 12, 20_001, dtype=torch.float64)


def app_a(model, xs, s):
    """The integral of q(z|s) Π_t q(t|z)^weight over a grid, and that density's mean and variance."""
    z, encoder = GRID[:, None, None].float(), model.encoders[s]
    log_p = torch.distributions.Normal(encoder.mu, torch.exp(0.5 * encoder.logvar)).log_prob(z)[..., 0]
    for m, x in enumerate(xs):
        if x is not None and m != s:
            logits = model.decoders[m](z)  # (grid, 1, features)
            log_q = torch.distributions.Bernoulli(logits=logits).log_prob(x[:1]).sum(-1)
            log_p = log_p + model.modalities[m].weight * log_q
    p = log_p[:, 0].double().exp()
    total = torch.trapezoid(p, GRID)
    mean = torch.trapezoid(p * GRID, GRID) / total
    return total, mean, torch.trapezoid(p * (GRID - mean) ** 2, GRID) / total


CASES = [((0.5, 3.0), (0, 1)), ((2.0, 0.3, 1.5), (0, 1, 2)), ((2.0, 0.3, 1.5), (0, 2))]


def bits(model, seen, n):
    rows = [torch.tensor([1.0, 0.0, 1.0, 1.0])[: 2 + m] for m in range(len(model.modalities))]
    return [x.expand(n, -1) if m in seen else None for m, x in enumerate(rows)]


@pytest.mark.parametrize("weights, seen", CASES)
def test_weights_of_candidates_integrate_to_log_q_t_given_s(weights, seen):
    """With likelihood weights other than 1, from every side, against quadrature."""
    torch.manual_seed(0)
    model = bits_model(*weights)
    xs = bits(model, seen, 4000)
    for s in seen:
        total, mean, variance = app_a(model, xs, s)
        z, log_w = model.candidates(xs, s)
        assert z.shape == (60, 4000, 1) and log_w.shape == (60, 4000) and not z.requires_grad
        w = log_w.double().exp()
        assert_close(w.mean(), total, rtol=0.01, atol=0)
        assert_close((w * z[..., 0]).sum() / w.sum(), mean, rtol=0, atol=0.02)
        size = 1 / (log_w.softmax(0) ** 2).sum(0)
        assert size.median() > 40  # of 60: the proposal has met the posterior
        assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("weights, seen", CASES)
def test_resampled_posterior_is_app_a_from_each_side_in_turn(weights, seen, monkeypatch):
    torch.manual_seed(0)
    model = bits_model(*weights)
    xs, count = bits(model, seen, 6000), len(seen)
    monkeypatch.setattr(torch, "randint", lambda most, shape: torch.tensor(count - 1))
    z = model.sample_posterior(xs, count + 1)
    assert z.shape == (count + 1, 6000, 1) and not z.requires_grad
    for k, s in enumerate([seen[-1], *seen]):  # the first at random
        _, mean, variance = app_a(model, xs, s)
        assert_close(z[k].mean().double(), mean, atol=0.03, rtol=0)
        assert_close(z[k].var().double(), variance, atol=0.03, rtol=0.05)
    assert model.sample_posterior([xs[0][:7], *xs[1:]][:1] + [None] * (len(xs) - 1), 2).shape == (2, 7, 1)


def test_draws_of_one_side_are_independent_choices():
    torch.manual_seed(0)
    model = bits_model(0.5, 3.0)
    z = model.sample_posterior(bits(model, (0, 1), 200), 40)
    assert min(len(column.unique()) for column in z[::2, :, 0].T) > 8


def test_variances_grow_linearly_above_a_scale_of_10():
    cap = 2 * math.log(10)
    logvar = torch.tensor([-9.0, 4.6, cap + 1, cap + 30, cap + 1e4], requires_grad=True)
    capped = meme.soft_cap_logvar(logvar)
    assert_close(capped.exp()[2:], 100 * torch.tensor([2, 31, 10_001.0]))
    assert (capped[:2] == logvar[:2]).all()
    capped.sum().backward()
    assert_close(logvar.grad, torch.tensor([1, 1, 1 / 2, 1 / 31, 1 / 10_001]))
    model, sides = linear_model("meme"), pair(100)
    model.encoders[0].logvar.data.fill_(40.0)  # with exp(logvar) a KL of e^40 nats
    posterior = model.posterior(sides[0], None).base_dist
    assert_close(posterior.scale**2, torch.full_like(posterior.scale, 100 * (41 - cap)))
    assert (model.prior().component_distribution.base_dist.scale < 61).all()
    for xs in [sides, only(sides, 0), only(sides, 1)]:
        assert model.objective(*xs) > -1e6


# ----------------------------------------------------------------------------------- pseudo-samples


def test_pseudo_samples_start_as_observed_examples():
    model = linear_model("meme", pseudo_samples=4)
    before = [u.detach().clone() for u in model.pseudo]
    assert all(u.shape == (4, size) for u, size in zip(before, (3, 2)))
    train = data.Split([torch.arange(30.0).view(10, 3), 100 + torch.arange(20.0).view(10, 2)])
    streams = [((True, True), torch.tensor([5, 3])), ((False, True), torch.arange(6, 10))]
    model.start(train, streams)
    assert torch.equal(model.pseudo[0][:2], train.bases[0][[3, 5]])  # as many as there are
    assert torch.equal(model.pseudo[0][2:], before[0][2:])
    assert torch.equal(model.pseudo[1], train.bases[1][[3, 5, 7, 9]])  # 4 of 6, spread


def test_pseudo_words_are_logits_of_8():
    model = meme.MEME(nets.modalities("cub", vocabulary=7), 4, pseudo_samples=5)
    features, words = model.pseudo
    assert features.shape == (5, 2048) and 0 <= features.min() and features.max() <= 1
    assert words.shape == (5, 32, 7) and len(words.argmax(-1).unique()) == 7
    for copied in (False, True):
        if copied:
            caption = torch.randint(7, (2, 32))
            model.init_pseudo_samples([torch.zeros(2, 2048), caption])
            assert (features[:2] == 0).all() and (words[:2].argmax(-1) == caption).all()
        assert ((words == 0) | (words == 8)).all() and (words.sum(-1) == 8).all()


# ---------------------------------------------------------------------------- products and experts


def test_products_of_experts_are_the_published_vectors():
    experts = [
        (torch.tensor([[m]]), 2 * torch.tensor([[s]]).log()) for m, s in [(1, 0.5), (-1, 0.1)]
    ]
    several = linear_model("meme", (3, 2, 4), explicit="product").conditional_prior
    products = [(by, (-0.923, 0.0981)) for by in (svae.product, vaevae.product, several)]
    for by, expected in [*products, (linear_model("mvae").product, (-0.914, 0.0976))]:
        mu, logvar = by(experts)
        assert (mu.item(), (0.5 * logvar).exp().item()) == pytest.approx(expected, abs=6e-4)


@pytest.mark.parametrize("script", [mvae, svae])
def test_bounded_experts_keep_a_gradient_where_exact_ones_die(script):
    logvar = torch.tensor([-10.0, -1.0, 0.0, 5.0, 100.0, math.inf], requires_grad=True)
    precision = torch.exp(-script.bounded_expert(logvar, logvar)[1])
    expected = torch.tensor([math.exp(10), math.e, 1, 1 / 6, 1 / 101, 0]) + 0.1
    assert_close(precision, expected)
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
    for logvar in (80.0, math.inf):  # products of very wide experts stay finite
        wide = script.bounded_expert(torch.ones(1, L), torch.full((1, L), logvar))
        mu, logvar = svae.product([wide] * 2)
        assert mu.tolist() == [[1.0] * L] and logvar.exp().max() <= 5 * (1 + 1e-5)


@pytest.mark.parametrize("name, options, trunks", [
    ("svae", {}, 3**2), ("vaevae", {}, 3 * 2**2), ("vaevae", dict(variant="a"), 3),
])  # fmt: skip
def test_encoders_are_as_many_as_figure_2_counts(name, options, trunks):
    with torch.device("meta"):
        model = SCRIPTS[name].MODEL(nets.modalities("mnist-split3"), 64, **options)
    encoders = [m.trunk for m in model.modules() if isinstance(m, nets.Encoder)]
    joints = [t for m in model.modules() if isinstance(m, nets.Joint) for t in m.trunks]
    assert len(encoders) + len(joints) == trunks
    assert len(set(map(str, encoders + joints))) == 1  # all of one shape


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


# ------------------------------------------------------------------------- what every model accepts

VARIANTS = [(name, {}) for name in SCRIPTS]
VARIANTS += [("vaevae", dict(variant="a")), ("vaevae", dict(objective="svae")),
             ("svae", dict(objective="vaevae", experts="exact", prior_expert=True)),
             ("meme", dict(explicit="product", kl="sample", full_gradient=True)),
             ("mmvae", dict(family="laplace", objective="elbo")), ("mmvae", dict(objective="dreg")),
             ("mvae", dict(experts="exact", subsets=2))]  # fmt: skip
ALL_MODELS = pytest.mark.parametrize("name, options", VARIANTS)


def plain_model(name, count=3, **options):
    """Three modalities, all networks plain modules."""
    likelihoods = ("normal", "bernoulli", "laplace")
    modalities = [plain_modality(f"x{m}", m + 2, likelihoods[m]) for m in range(count)]
    return SCRIPTS[name].MODEL(modalities, L, **options)


@ALL_MODELS
def test_any_module_to_mu_and_logvar_trains_in_every_model(name, options):
    model = plain_model(name, **options)
    optimizer, xs = torch.optim.Adam(model.parameters(), 3e-3), batch(model, n=8)
    one = [x[:1] for x in xs]
    patterns = [xs, only(xs, 0, 2), only(xs, 1), one, only(one, 0)]  # alone: pseudo-samples
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        losses.append(same_noise(model, [(1.0, pattern) for pattern in patterns]))
        losses[-1].sum().backward()
        optimizer.step()
    assert all(w.isfinite().all() for w in model.parameters())
    assert losses[-1].sum() < losses[0].sum() - 0.5  # nats


@ALL_MODELS
def test_a_batch_of_one_has_the_running_statistics(name, options):
    model = plain_model(name, **options)
    model([(1.0, batch(model))])  # its running statistics are not those it started with
    state = {key: x.clone() for key, x in model.state_dict().items()}
    xs, z = batch(model), torch.randn(L)
    for pattern in ([0, 1, 2], [1]):
        inputs = only(xs, *pattern)
        one = [x if x is None else x[:1] for x in inputs]
        in_training = same_noise(model.objective, *one), model.posterior(*one).log_prob(z)
        assert same(state, model.state_dict()) and model.training
        model.eval()
        assert_close(in_training[0], same_noise(model.objective, *one))
        each = [[x if x is None else x[b : b + 1] for x in inputs] for b in range(B)]
        alone = torch.cat([model.posterior(*one).log_prob(z) for one in each])
        assert_close(in_training[1], alone[:1])
        assert_close(model.posterior(*inputs).log_prob(z), alone)  # no example sees another
        model.train()
    prior = model.prior().log_prob(z)  # nor do pseudo-samples
    assert_close(prior, model.eval().prior().log_prob(z))


@MODELS
def test_a_step_updates_batchnorm_once_per_observed_encoder(float64, name):
    for pattern in subsets(range(3)):
        model = small_model(name, 3)
        model([(1.0, only(batch(model), *pattern))]).sum().backward()
        assert all(module.training for module in model.modules())
        encoders = model.encoders if name != "svae" else [e[0] for e in zip(*model.encoders)]
        for m, encoder in enumerate(encoders):
            [norm] = [n for n in encoder.modules() if isinstance(n, nn.BatchNorm1d)]
            assert norm.num_batches_tracked == (m in pattern)  # pseudo-samples never count


@ALL_MODELS
def test_every_parameter_is_trained(name, options):
    model = small_model(name, 3, **options)
    before = {key: x.clone() for key, x in model.state_dict().items()}
    optimizer, xs = torch.optim.Adam(model.parameters(), 1e-2), batch(model, n=8)
    streams = [(1.0, only(xs, *pattern)) for pattern in subsets(range(3))]
    model(streams).sum().backward()
    optimizer.step()
    moved = {key for key, x in model.state_dict().items() if not torch.equal(x, before[key])}
    fixed = {"zero", "beta"} if name != "mmvae" else set()
    assert model.state_dict().keys() - moved == fixed & model.state_dict().keys()
    of_networks = ("encoders.", "decoders.", "joints.")
    others = {key for key in moved if not key.startswith(of_networks)}
    pseudo = {f"pseudo.{m}" for m in range(3)}
    assert others == {"mmvae": {"prior_logvar"}, "meme": pseudo}.get(name, set())


def kinds_model(name, **options):
    """One modality of each kind of value."""
    rows = [("numbers", (3,), "normal", {}), ("counts", (2,), "negative-binomial", {}),
            ("class", (), "categorical", dict(classes=4)), ("bits", (5,), "bernoulli", {}),
            ("greys", (1, 8, 8), "laplace", {})]  # fmt: skip
    modalities = [nets.array_modality(row[0], *row[:3], **row[3]) for row in rows]
    more = dict(pseudo_samples=3) if name == "meme" else {}
    return SCRIPTS[name].MODEL(modalities, L, **more, **options)


def kinds_batch(n=B):
    numbers = torch.randn(n, 3)
    numbers[0, 1] = math.nan
    bits, counts = torch.randint(2, (n, 5)).float(), torch.randint(5, (n, 2)).float()
    return [numbers, counts, torch.randint(4, (n,)), bits, torch.rand(n, 1, 8, 8)]


@MODELS
def test_double_has_the_value_of_float32_to_rounding(name, monkeypatch):
    randn, randn_like = torch.randn, torch.randn_like
    monkeypatch.setattr(  # the same noise in both
        torch, "randn", lambda *shape, device=None, dtype=None: randn(*shape).to(dtype)
    )
    monkeypatch.setattr(torch, "randn_like", lambda x: randn_like(x.float()).to(x.dtype))
    model, xs = kinds_model(name), kinds_batch()
    wide = [x.double() if x.is_floating_point() else x for x in xs]
    patterns = [range(5), [0, 2], *([m] for m in range(5))]
    values = []
    for xs in (xs, wide):
        values.append(same_noise(model, [(1.0, only(xs, *pattern)) for pattern in patterns]))
        z = same_noise(lambda: model.posterior(*xs).rsample() if 0 else model.sample_posterior(xs))
        assert {x.dtype for x in (z, *model.decode(z), model.prior().sample())} == {xs[0].dtype}
        model.double()
    assert values[1].dtype == torch.float64
    assert_close(values[0].double(), values[1], rtol=1e-5, atol=0)


MISTAKES = [  # modality, its examples, the sentence
    ("numbers", torch.zeros(0, 3), "numbers must have the shape ('B > 0', 3), not (0, 3)"),
    ("numbers", torch.zeros(4, 2), "numbers must have the shape ('B > 0', 3), not (4, 2)"),
    ("numbers", torch.zeros(3), "numbers must have the shape ('B > 0', 3), not (3,)"),
    ("greys", torch.zeros(4, 8, 8), "greys must have the shape ('B > 0', 1, 8, 8), not (4, 8, 8)"),
    ("numbers", torch.zeros(4, 3).long(), "numbers must hold floats (normal), not torch.int64"),
    ("bits", torch.ones(4, 5) > 0, "bits must hold floats (bernoulli), not torch.bool"),
    ("class", torch.ones(4), "class must hold integers (categorical), not torch.float32"),
    ("class", torch.ones(4) > 0, "class must hold integers (categorical), not torch.bool"),
    (
        "class",
        torch.tensor([0, 1, 2, 4]),
        "class must hold integers from 0 to 3 (categorical), not 0 to 4",
    ),
    (
        "class",
        torch.tensor([0, 1, 2, -1]),
        "class must hold integers from 0 to 3 (categorical), not -1 to 2",
    ),
    ("bits", 255 * torch.eye(4, 5), "bits must hold values in [0, 1] (bernoulli), not 0 to 255"),
    (
        "bits",
        1.5 * torch.eye(4, 5) - 0.5,
        "bits must hold values in [0, 1] (bernoulli), not -0.5 to 1",
    ),
    (
        "counts",
        2 * torch.eye(4, 2) - 1,
        "counts must hold counts from 0 on (negative-binomial), not -1 to 1",
    ),
]


@MODELS
def test_values_that_do_not_fit_are_one_sentence(name):
    model = kinds_model(name)
    names = [m.name for m in model.modalities]
    nothing = "no modality is observed: at least one must be a tensor, not None"
    wrong = [([None] * 5, nothing), (kinds_batch()[:4], "the model has 5 modalities, not 4")]
    wrong.append(([*kinds_batch(), None], "the model has 5 modalities, not 6"))
    for modality, x, sentence in MISTAKES:
        m = names.index(modality)
        for xs in (kinds_batch(), [None] * 5):  # beside the others, and alone
            wrong.append(([*xs[:m], x, *xs[m + 1 :]], sentence))
    uses = {
        "objective": lambda xs: model.objective(*xs),
        "forward": lambda xs: model([(0.0, xs), (1.0, kinds_batch())]),
        "posterior": lambda xs: model.posterior(*xs),
        "sample_posterior": lambda xs: model.sample_posterior(xs),
    }
    for xs, sentence in wrong:
        for use in uses.values():
            with pytest.raises(ValueError) as refusal:
                use(xs)
            assert str(refusal.value) == sentence
    limits = kinds_batch()
    limits[3] = torch.tensor([[0.0, 1, 0, 1, 0]] * B)
    limits[1], limits[2] = torch.tensor([[0.0, 1e6]] * B), torch.tensor([0, 3, 0, 3])
    assert model.objective(*limits).isfinite()  # the limits are inside


# ------------------------------------------------------------------------- options and streams

REFUSED = {
    "meme": [dict(explicit="x"), dict(kl="x"), dict(direction="x7"), dict(samples=0),
             dict(pseudo_samples=0)],
    "mmvae": [dict(samples=0), dict(objective="x"), dict(tight=True, objective="elbo"),
              dict(family="x")],
    "svae": [dict(objective="x"), dict(experts="x")],
    "vaevae": [dict(objective="x"), dict(variant="x")],
    "mvae": [dict(subsets=1), dict(subsets=-1), dict(subsets=4, sizes=(3, 2, 4)), dict(anneal=-1),
             dict(experts="x")],
}  # fmt: skip


@MODELS
def test_options_that_are_wrong_or_without_effect_are_refused(name):
    for options in REFUSED[name]:
        with pytest.raises(ValueError, match=next(iter(options))):
            linear_model(name, **options)
    if name in ("meme", "mmvae"):
        assert linear_model(name, samples=1).samples == 1


@MODELS
def test_flags_are_the_keyword_arguments_of_the_constructor(name):
    flags, defaults = argparse.ArgumentParser(), SCRIPTS[name].MODEL.__init__.__kwdefaults__
    SCRIPTS[name].options(flags.add_argument)
    assert vars(flags.parse_args([])).keys() == defaults.keys()
    for key, default in defaults.items():
        typed = [f"--{key.replace('_', '-')}", *([] if default is False else [str(default)])]
        if default is None:
            typed = [typed[0], "sum" if key == "kl_terms" else "x0"]
        value = vars(flags.parse_args(typed))[key]
        assert value == (typed[1] if default is None else True if default is False else default)


ALL, ONE, TWO = (True, True), (True, False), (False, True)
THREE, TWOS = (True,) * 3, [(True, True, False), (True, False, True), (False, True, True)]
UNTRAINED = [
    ("meme", dict(direction="x0"), [ALL, ONE], [ALL, TWO], "direction x0 needs x0"),
    ("meme", {}, [ALL, TWO], None, ""),
    ("svae", dict(objective="vaevae"), [ALL, ONE, TWO], [ALL, ONE], r"trains q\(z\|x1\)"),
    ("svae", dict(objective="svae"), [ALL], None, ""),
    ("vaevae", dict(objective="vaevae"), [ALL, ONE, TWO], [ALL, ONE], r"trains q\(z\|x1\)"),
    ("vaevae", dict(objective="svae"), [ALL], [ONE, TWO], "shows x0 and x1 together"),
    ("vaevae", dict(objective="svae"), [THREE], TWOS, "shows x0 and x1 and x2 together"),
    ("vaevae", dict(objective="svae"), [THREE], TWOS[:2], "shows x1 and x2 together"),
    ("vaevae", dict(objective="svae", variant="a"), TWOS, None, ""),
    ("mmvae", {}, [ONE], None, ""),
    ("mvae", {}, [ONE], None, ""),
]


@pytest.mark.parametrize("name, options, good, bad, words", UNTRAINED)
def test_streams_that_leave_a_posterior_untrained_are_refused(name, options, good, bad, words):
    options = (dict(variant="b") if name == "vaevae" else {}) | options
    sizes = (2,) * len(good[0])
    model, train = linear_model(name, sizes, **options), data.Split(torch.randn(len(sizes), 9, 2))
    model.start(train, [(mask, torch.arange(9)) for mask in good])
    if bad:
        with pytest.raises(ValueError, match=words):
            model.start(train, [(mask, torch.arange(9)) for mask in bad])


@MODELS
def test_own_priors_are_trained_by_examples_of_one_modality(name):
    model = linear_model(name, (2,) * 3)
    some = [THREE, (False, False, True), (True, False, False)]
    priors = [model.trained_priors(masks) for masks in ([THREE, *TWOS], some)]
    assert priors == ([(), ("x0", "x2")] if name == "meme" else [("x0", "x1", "x2")] * 2)
    assert model.trained_priors(torch.eye(3).bool().tolist()) == ("x0", "x1", "x2")


# ------------------------------------------------------------------------ settings of the papers

# [meme] App. K: lr and epochs of meme; batch and K of its code. [poe] App. A: lr, epochs and L of
# svae and vaevae; batch sizes of its code. mmvae: its authors' commands; mvae: its authors' code.
SETTINGS = """
meme    mnist-svhn   epochs=100 batch_size=128 lr=5e-4 latent_dim=20
meme    cub          epochs=300 batch_size=128 lr=1e-4 latent_dim=64
svae    mnist-split  epochs=200 batch_size=100 lr=2e-4 latent_dim=64  unpaired=all sampling=balanced
svae    mnist-split3 epochs=50  batch_size=100 lr=2e-4 latent_dim=64  unpaired=all sampling=balanced
svae    mnist-svhn   epochs=50  batch_size=256 lr=1e-4 latent_dim=20  unpaired=all sampling=balanced
svae    cub          epochs=200 batch_size=100 lr=1e-4 latent_dim=64  unpaired=all sampling=balanced
svae    spectra      epochs=140 batch_size=100 lr=1e-4 latent_dim=300 unpaired=all sampling=balanced
vaevae  mnist-split  epochs=200 batch_size=100 lr=2e-4 latent_dim=64  unpaired=all sampling=balanced
vaevae  mnist-split3 epochs=50  batch_size=100 lr=2e-4 latent_dim=64  unpaired=all sampling=balanced
vaevae  mnist-svhn   epochs=50  batch_size=256 lr=1e-3 latent_dim=20  unpaired=all sampling=balanced
vaevae  cub          epochs=200 batch_size=100 lr=1e-4 latent_dim=64  unpaired=all sampling=balanced
vaevae  spectra      epochs=140 batch_size=100 lr=1e-4 latent_dim=300 unpaired=all sampling=balanced
mmvae   mnist-svhn   epochs=30  batch_size=128 lr=1e-3 latent_dim=20  samples=30
mmvae   cub          epochs=50  batch_size=64  lr=1e-3 latent_dim=64  samples=50
mvae    mnist-svhn   epochs=100 batch_size=100 lr=1e-3 latent_dim=20
mvae    cub          epochs=300 batch_size=100 lr=1e-3 latent_dim=64
"""


@MODELS
def test_defaults_are_the_settings_of_the_papers(name):
    defaults = SCRIPTS[name].DEFAULTS
    assert defaults.keys() == {*data.DATASETS, "npz"}
    for line in SETTINGS.strip().splitlines():
        script, dataset, *pairs = line.split()
        if script == name:
            row = dict(pair.split("=") for pair in pairs)
            settings = {key: defaults[dataset][key] for key in row}
            assert settings == {key: type(settings[key])(text) for key, text in row.items()}
    if name == "mmvae":  # MNIST's log-likelihood counts as if it had as many values as SVHN's
        assert defaults["mnist-svhn"]["weights"] == pytest.approx([3.9184, 1], abs=1e-4)
    samples = SCRIPTS[name].MODEL.__init__.__kwdefaults__.get("samples")
    assert samples == (10 if name in ("meme", "mmvae") else None)  # K, where no row has another


def layer(module):
    """One line: what the module is, with all that decides what it computes."""
    if isinstance(module, nn.Linear):
        return f"fc {module.in_features} {module.out_features}" + " no bias" * (module.bias is None)
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        name = "conv" if isinstance(module, nn.Conv2d) else "upconv"
        (h, w), (a, b), (c, d) = module.kernel_size, module.stride, module.padding
        text = f"{name} {module.in_channels} {module.out_channels} {h}x{w}"
        return f"{text} stride {a}x{b} pad {c}x{d}" + " no bias" * (module.bias is None)
    if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
        return f"norm {module.num_features}"
    if isinstance(module, nets.Map):
        h, w, c = module.size
        return f"map {c} {h}x{w}"
    if isinstance(module, nets.Crop):
        return f"crop {module.height}x{module.width}"
    return type(module).__name__


def layers(text):
    """One layer each, without indentation."""
    return [part.strip() for part in text.replace("\n", ",").split(",") if part.strip()]


BAND = """conv 1 64 4x4 stride 2x2 pad 1x1 no bias, ReLU,
    conv 64 128 4x4 stride 2x2 pad 1x1 no bias, ReLU, conv 128 256 4x4 stride 2x2 pad 1x1 no bias, ReLU, Flatten, fc 768 512, ReLU"""
UP_BAND = """fc L 512, ReLU, fc 512 112, ReLU, map 112 1x1, upconv 112 56 {} stride 2x2 pad 0x0,
    ReLU, upconv 56 28 {} stride 2x2 pad 0x0, ReLU, upconv 28 1 {} stride 2x2 pad 0x0"""
NETWORKS = {  # data set, modality: encoder's trunk and width, decoder
    # [poe] Table A.2
    ("mnist-split", "top"): (BAND, 512, UP_BAND.format("3x5", "3x5", "2x4")),
    ("mnist-split", "bottom"): (BAND, 512, UP_BAND.format("3x5", "3x5", "2x4")),
    # [poe] Table A.7
    ("mnist-split3", "top"): (BAND, 512, UP_BAND.format("2x5", "2x5", "3x4")),
    ("mnist-split3", "middle"): (BAND, 512, UP_BAND.format("2x5", "2x5", "3x4")),
    ("mnist-split3", "bottom"): (BAND, 512, UP_BAND.format("2x5", "2x5", "3x4")),
    # [meme] Table 8a, [poe] Table A.3
    ("mnist-svhn", "mnist"): ("Flatten, fc 784 400, ReLU", 400, "fc L 400, ReLU, fc 400 784"),
    # [meme] Table 8b, [poe] Table A.4
    ("mnist-svhn", "svhn"): (
        """conv 3 32 4x4 stride 2x2 pad 1x1, ReLU, conv 32 64 4x4 stride 2x2 pad 1x1, ReLU,
        conv 64 128 4x4 stride 2x2 pad 1x1, ReLU, Flatten""",
        128 * 4 * 4,
        """fc L 2048, ReLU, map 128 4x4, upconv 128 64 4x4 stride 2x2 pad 1x1, ReLU,
        upconv 64 32 4x4 stride 2x2 pad 1x1, ReLU, upconv 32 3 4x4 stride 2x2 pad 1x1,
        crop 32x32""",
    ),
    # [meme] Table 8c, [poe] Table A.6
    ("cub", "image"): (
        "Flatten, fc 2048 1024, ELU, fc 1024 512, ELU, fc 512 256, ELU",
        256,
        "fc L 256, ELU, fc 256 512, ELU, fc 512 1024, ELU, fc 1024 2048",
    ),
    # [meme] Table 8d, [poe] Table A.5
    ("cub", "caption"): (
        """WordEmbedding, conv 1 32 4x4 stride 2x2 pad 1x1 no bias, norm 32, ReLU,
        conv 32 64 4x4 stride 2x2 pad 1x1 no bias, norm 64, ReLU,
        conv 64 128 4x4 stride 2x2 pad 1x1 no bias, norm 128, ReLU,
        conv 128 256 1x4 stride 1x2 pad 0x1 no bias, norm 256, ReLU,
        conv 256 512 1x4 stride 1x2 pad 0x1 no bias, norm 512, ReLU, Flatten""",
        512 * 4 * 4,
        """fc L 8192, ReLU, map 512 4x4,
        upconv 512 256 1x4 stride 1x2 pad 0x1 no bias, norm 256, ReLU,
        upconv 256 128 1x4 stride 1x2 pad 0x1 no bias, norm 128, ReLU,
        upconv 128 64 4x4 stride 2x2 pad 1x1 no bias, norm 64, ReLU,
        upconv 64 32 4x4 stride 2x2 pad 1x1 no bias, norm 32, ReLU,
        upconv 32 1 4x4 stride 2x2 pad 1x1, ReLU, WordLogits""",
    ),
    # [poe] Table A.8
    ("spectra", "spectrum"): (
        """Flatten, fc 11000 10000, norm 10000, ReLU, fc 10000 5000, norm 5000, ReLU,
        fc 5000 2048, norm 2048, ReLU""",
        2048,
        """fc L 3000, norm 3000, ReLU, fc 3000 5000, norm 5000, ReLU, fc 5000 10000, norm 10000,
        ReLU, fc 10000 11000""",
    ),
    # [poe] Table A.9
    ("spectra", "fingerprint"): (
        "Flatten, fc 2149 1024, ReLU, fc 1024 1000, ReLU",
        1000,
        "fc L 500, ReLU, fc 500 1024, ReLU, fc 1024 2149",
    ),
}
SHAPES = {  # of the papers' data; bernoulli with weight 1 unless said
    "mnist-split": {"top": (1, 14, 28), "bottom": (1, 14, 28)},
    "mnist-split3": {"top": (1, 9, 28), "middle": (1, 9, 28), "bottom": (1, 9, 28)},
    "mnist-svhn": {"mnist": (1, 28, 28), "svhn": (3, 32, 32)},
    "cub": {"image": (2048,), "caption": (32,)},
    "spectra": {"spectrum": (11000,), "fingerprint": (2149,)},
}
LIKELIHOODS = {  # cub's image as in the code of [poe] and of mmvae's authors
    "image": ("laplace", 0.002, 0.01),
    "caption": ("categorical", 1, 1),
}
WORDS = 1590


@pytest.mark.parametrize("dataset", SHAPES)
def test_networks_and_likelihoods_are_the_papers_tables(dataset):
    with torch.device("meta"):  # shapes alone: a spectrum's encoder has 171 million weights
        modalities = nets.modalities(dataset, vocabulary=WORDS)
        assert {m.name: m.shape for m in modalities} == SHAPES[dataset]
        for m in modalities:
            likelihood = LIKELIHOODS.get(m.name, ("bernoulli", 1, 1))
            assert (m.likelihood, m.weight, m.scale) == likelihood
            trunk, width, up = NETWORKS[dataset, m.name]
            encoder, decoder = m.encoder(7), m.decoder(7)
            assert [*map(layer, encoder.trunk)] == layers(trunk)
            assert layer(encoder.head) == f"fc {width} 14" and encoder.width == width
            assert [*map(layer, decoder.net)] == layers(up.replace("fc L", "fc 7"))
            caption = m.name == "caption"
            x = torch.zeros(2, *m.shape, dtype=torch.int64 if caption else torch.float32)
            assert [parameter.shape for parameter in encoder(x)] == [(2, 7)] * 2
            shape = (3, 2, *m.shape, *((WORDS,) if caption else ()))
            assert decoder(torch.zeros(3, 2, 7)).shape == shape


def test_width_and_features_scale_the_layers_that_they_should():
    with torch.device("meta"):
        spectrum = nets.modalities("spectra", width=0.1)[0]
        trunk, net = spectrum.encoder(7).trunk, spectrum.decoder(7).net
        image = nets.modalities("cub", features=960, vocabulary=9)[0]
        assert image.shape == (960,)
        assert layer(image.encoder(4).trunk[1]) == "fc 960 1024"
        assert layer(image.decoder(4).net[-1]) == "fc 1024 960"
    assert [m.out_features for m in trunk if isinstance(m, nn.Linear)] == [1000, 500, 205]
    assert [m.out_features for m in net if isinstance(m, nn.Linear)] == [300, 500, 1000, 11000]


@pytest.mark.parametrize("name", ["meme", "svae", "vaevae"])
def test_words_are_read_and_written_by_one_embedding(name):
    with torch.device("meta"):
        model = SCRIPTS[name].MODEL(nets.modalities("cub", vocabulary=9), 4)
    tied = [m for m in model.modules() if isinstance(m, (nets.WordEmbedding, nets.WordLogits))]
    assert len(tied) == {"meme": 2, "svae": 3, "vaevae": 3}[name]
    assert all(m.weight is tied[0].weight for m in tied)
    assert isinstance(tied[0].weight, nn.Parameter) and tied[0].weight.shape == (9, 128)
    assert sum(w is tied[0].weight for w in model.parameters()) == 1  # trained, once


# ----------------------------------------------------------------------------------------- the loop


@MODELS
def test_a_script_trains_and_resumes_to_the_same_bits(name, arrays, tmp_path, capsys):  # noqa: F811
    flags, run = dict(dataset=arrays, paired=0.5, batch_size=32, lr=1e-2, clip=5), tmp_path / "a"
    train(name, **flags, epochs=3, out=run)
    assert f"python eval.py {run}" in capsys.readouterr().out
    rows = log_of(run)
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    assert rows[2]["objective"] > rows[0]["objective"]  # it learns
    args = json.loads((run / "args.json").read_text())
    assert (args["script"], args["spec"]["name"], args["examples"]) == (name, "npz", 96)
    cls = getattr(SCRIPTS[name], args["model"])
    model = cls(nets.modalities(**args["spec"]), args["latent_dim"], **args["options"])
    model.load_state_dict(weights(run))
    train(name, **flags, epochs=1, out=tmp_path / "b")
    train(name, epochs=3, resume=tmp_path / "b")  # with the run's own flags
    (whole, *log), (parts, *again) = content(run), content(tmp_path / "b")
    assert same(whole, parts) and log == again
