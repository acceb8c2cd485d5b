"""The mathematics of the five models in numbers, and one short run of each. No download, no GPU.

First the papers' formulas a second time: term by term, sample by sample, in float64, with
torch.distributions. A model's objective, and its gradient with respect to every parameter, must be
the formula's for the same noise. Then exact evidences, of decoders that are linear with Gaussian
noise. Then the papers' tables: settings, layers, likelihoods.
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
from torch.distributions import Bernoulli, Categorical, Independent, Laplace, MixtureSameFamily
from torch.distributions import MultivariateNormal, NegativeBinomial, Normal, Poisson
from torch.distributions import kl_divergence
from torch.testing import assert_close

import meme
import mvae
import nets
import svae
import vaevae

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "tests"))
from helpers import SCRIPTS, arrays, images, same, seeded, train, weights  # noqa: E402, F401

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
    """xs with all other modalities missing."""
    return [x if m in seen else None for m, x in enumerate(xs)]


def subsets(of):
    """All subsets but the empty one, small ones first."""
    return [s for size in range(1, len(of) + 1) for s in itertools.combinations(of, size)]


def recorded(call, *args):
    """-> call(*args), and the random numbers that it drew, in order."""
    drawn = []

    def recording(draw):
        return lambda *a, **b: drawn.append(draw(*a, **b)) or drawn[-1]

    with pytest.MonkeyPatch.context() as patch:
        for owner, draw in [(torch, "randn"), (torch, "randn_like"), (torch, "randperm"),
                            (Laplace, "sample")]:  # fmt: skip
            patch.setattr(owner, draw, recording(getattr(owner, draw)))
        return call(*args), drawn


def holds(formula, model, xs, **options):
    """Objective and gradient of every parameter are the formula's, for the same noise."""
    objective, drawn = recorded(model.objective, *xs)
    noise = iter(drawn)
    by_formula = formula(model, xs, noise, **options)
    assert next(noise, None) is None  # the formula uses all of it
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
    """An expert of a product: q itself, or its bounded form."""
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


def observed(xs):
    """The observed modalities."""
    return [m for m, x in enumerate(xs) if x is not None]


# --------------------------------------------------------------------------------------------- MEME


def meme_encoders(model, xs):
    """q(z|x_m), which is p(z|x_m) too. -> {m: one per example}"""
    return {m: gaussians(*model.encoders[m](xs[m])) for m in observed(xs)}


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
    seen, q, values = observed(xs), meme_encoders(model, xs), []
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
def test_meme_is_eq_6_averaged_over_directions(float64, count, options):
    model = small_model("meme", count, **options)
    for seen in subsets(range(count))[count:]:
        if options.get("direction") in (None, *(f"x{m}" for m in seen)):
            holds(meme_formula, model, only(batch(model), *seen), **options)


@pytest.mark.parametrize("count, pseudo_samples", [(2, 1), (2, 3), (3, 2)])
def test_meme_of_one_modality_is_eq_4(float64, count, pseudo_samples):
    model = small_model("meme", count, pseudo_samples=pseudo_samples)
    for s in range(count):
        holds(meme_formula, model, only(batch(model), s))


# ---------------------------------------------------------------------------------- SVAE and VAEVAE


def svae_posteriors(model, xs, prior_expert=False, experts="bounded", **_):
    """-> {subset: a list of products, each one per example}"""
    seen, every, q, found = observed(xs), range(len(xs)), {}, {}
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
    q = {(m,): [gaussians(*model.encoders[m](xs[m]))] for m in observed(xs)}
    for subset in subsets(observed(xs))[len(q) :]:
        if variant == "b":
            joint = model.joints[str(subset)]
            q[subset] = [gaussians(*joint([xs[m] for m in subset]))]
        else:
            q[subset] = [[product(*each) for each in zip(*(q[m,][0] for m in subset))]]
    return q


PRIOR, SINGLES, PAIRS = "p(z)", [(0,), (1,), (2,)], [(0, 1), (0, 2), (1, 2)]
REGULARISED_TO = {  # number of modalities -> subset: the p of its KL(q(z|subset) || p)
    2: {(0, 1): SINGLES[:2]}  # Eq. (19)
    | dict.fromkeys(SINGLES[:2], [PRIOR]),  # Eq. (20), (21)
    3: {(0, 1, 2): PAIRS}  # Eq. (29)
    | dict.fromkeys(PAIRS, [*SINGLES, PRIOR])  # Eq. (30)
    | dict.fromkeys(SINGLES, [PRIOR]),  # Eq. (31)
    4: {(0, 1, 2, 3): list(itertools.combinations(range(4), 3))}  # ours: the mean of these KLs
    | dict.fromkeys(
        [s for size in (2, 3) for s in itertools.combinations(range(4), size)],
        [*SINGLES, (3,), PRIOR],
    )
    | dict.fromkeys([*SINGLES, (3,)], [PRIOR]),
}


def sum_of_bounds(model, xs, noise, posteriors, objective, **options):
    """L(x_1, x_2), or of three L_123 + Σ L_ij + Σ L_i, eq. (32), of the observed modalities. Where
    q(z|x_i, x_j) is two products, f(q) is f of the one plus f of the other."""
    q = posteriors(model, xs, **options)
    q[PRIOR], total = [[unit()] * B], 0
    for subset in subsets(observed(xs)):
        if objective == "vaevae" and len(subset) == 1 < len(observed(xs)):
            continue  # only eq. (19) has L(x_1) + L(x_2)
        for q_s in q[subset]:
            eps = next(noise)
            for b in range(B):
                z = draw(q_s[b], eps[b])
                total += sum(log_p(model, m, xs[m][b], z) for m in subset) / B
                others = [p[b] for other in REGULARISED_TO[len(xs)][subset] for p in q.get(other, [])]
                kl = sum(kl_divergence(q_s[b], p) for p in others)
                total -= kl / B / (len(others) if len(xs) > 3 else 1)
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
def test_svae_is_the_sum_of_the_printed_bounds(float64, options, count):
    options = dict(objective="svae") | options
    holds_of_all_patterns(sum_of_bounds, "svae", count, options, posteriors=svae_posteriors)


@EQUATIONS
@pytest.mark.parametrize("options", VAEVAES)
def test_vaevae_is_the_sum_of_the_printed_bounds(float64, options, count):
    options = dict(objective="vaevae") | options
    holds_of_all_patterns(sum_of_bounds, "vaevae", count, options, posteriors=vaevae_posteriors)


@pytest.mark.parametrize("name, options", [("svae", {}), ("vaevae", {"variant": "a"})])
def test_beyond_three_modalities_it_is_the_mean_of_the_kls(float64, name, options):
    posteriors = svae_posteriors if name == "svae" else vaevae_posteriors
    model, xs = linear_model(name, (2,) * 4, **options), list(torch.randn(4, B, 2))
    for seen in ([2], [0, 3], [0, 1, 3], [0, 1, 2, 3]):
        shown = only(xs, *seen)
        holds(sum_of_bounds, model, shown, posteriors=posteriors, objective=name, **options)


@pytest.mark.parametrize("name, options", [("svae", {}), ("vaevae", {"variant": "a"})])
def test_random_terms_have_the_mean_of_all(float64, name, options, monkeypatch):
    every, xs = linear_model(name, (2,) * 4, **options), list(torch.randn(4, B, 2))
    some = linear_model(name, (2,) * 4, subsets=5, **options)
    some.load_state_dict(every.state_dict())
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)
    for seen in ([0, 1, 2, 3], [0, 1, 3]):
        shown, found = only(xs, *seen), []
        terms = 2 ** len(seen) - 1 - (len(seen) if name == "vaevae" else 0)
        for k in range(terms):  # every term is drawn equally often
            monkeypatch.setattr(torch, "randperm", lambda n, k=k: torch.arange(n).roll(k))
            found.append(some.objective(*shown))
        assert_close(torch.stack(found).mean(), every.objective(*shown))
        assert terms <= 5 or len({round(value.item(), 6) for value in found}) > 1


# -------------------------------------------------------------------------------------------- MMVAE


def mmvae_experts(model, xs, posterior="normal", **_):
    """q_r(z|x_r) of the observed modalities, each one per example."""
    family, found = {"normal": Normal, "laplace": Laplace}[posterior], []
    for m in observed(xs):
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
    seen, total, eps = observed(xs), 0, next(noise)
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
def test_mmvae_is_its_bound_of_importance_weights(float64, options, count):
    holds_of_all_patterns(mmvae_formula, "mmvae", count, options)


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("tight", [False, True])
@pytest.mark.parametrize("posterior", ["normal", "laplace"])
def test_dreg_has_the_value_of_iwae_and_its_published_gradient(float64, posterior, tight, count):
    options = dict(objective="dreg", samples=3, tight=tight, posterior=posterior)
    holds_of_all_patterns(mmvae_formula, "mmvae", count, options)
    model = small_model("mmvae", count, **options)
    with torch.no_grad():  # as the loop logs it
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
    seen, total = observed(xs), 0
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
def test_mvae_sums_the_elbos_of_all_each_and_random_subsets(float64, count, options):
    holds_of_all_patterns(mvae_formula, "mvae", count, options)


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
    model, found = linear_model("mvae", (2,) * 4, subsets=10), []  # as many as there are
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
        return [mvae_product(model, xs, observed(xs), **options)]
    found = {"svae": svae_posteriors, "vaevae": vaevae_posteriors}[name](model, xs, **options)
    return found[tuple(observed(xs))]


FORMS = [(name, count, {}) for name in SCRIPTS for count in (2, 3)]
FORMS += [("meme", 3, dict(explicit="product")), ("mmvae", 3, dict(posterior="laplace")),
          ("vaevae", 3, dict(variant="a")), ("svae", 3, dict(prior_expert=True, experts="exact")),
          ("mvae", 3, dict(experts="exact"))]  # fmt: skip


@pytest.mark.parametrize("name, count, options", FORMS)
def test_posterior_and_prior_are_those_of_the_formulas(float64, name, count, options):
    model, z = small_model(name, count, **options).requires_grad_(False), torch.randn(3, B, L)
    for seen in [(), *subsets(range(count))]:
        prior = model.prior(*only(batch(model), *seen)) if seen else model.prior()
        assert prior.batch_shape == () and prior.event_shape == (L,)
        others = [m for m in range(count) if len(seen) != 1 or m not in seen]  # Eq. (4)
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
def test_decode_returns_the_mean_of_every_modality(float64, name):
    model, z = small_model(name, 3), torch.randn(5, 2, L)
    logits = [decode(z) for decode in model.decoders]
    for m, found in enumerate(model.decode(z)):
        assert_close(found, logits[m].sigmoid() if m == 1 else logits[m])
    one = SCRIPTS[name].MODEL(model.modalities, 1)  # a single latent dimension
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
def test_likelihoods_and_streams_have_their_weights(float64, name):
    model, z = small_model(name, 3).eval(), torch.randn(5, B, L)
    xs = batch(model)
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
        seen = observed(xs)
        others = [m for m in range(len(xs)) if len(seen) > 1 or m not in seen]
        return [[g for m in others for g in gaussians(*model.encoders[m](model.pseudo[m]))]] * B
    return [[mmvae_prior(model) if name == "mmvae" else unit()]] * B


@pytest.mark.parametrize("name, count, options", [f for f in FORMS if "posterior" not in f[2]])
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
    everything, asked, of = [torch.randn(B, size) / 2 for size in sizes], [], model.posterior
    monkeypatch.setattr(model, "posterior", lambda *xs: asked.append(observed(xs)) or of(*xs))
    for seen in subsets(range(count)):
        for known in [None, *subsets([m for m in range(count) if m not in seen])]:
            xs = only(everything, *seen)
            given = None if known is None else only(everything, *known)
            exactly = []
            for b, parts in enumerate(components(name, model, xs, given, **options)):
                x = {m: xs[m][b] for m in seen}
                exactly.append(log_mean([evidence(model, x, p) for p in parts]))
            found = log_likelihood(model, xs, 20_000, given)
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
    q = model.encode(xs, vaevae.all_subsets([0, 1])) | {(0, 1): [(mu * torch.exp(-logvar) / precision, -precision.log())]}
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
            bound = model.bound(0, xs, model.encode(xs)).sum()
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


@pytest.mark.parametrize("seen, samples, length", [((0,), 10, None), ((0, 1), 10, 0.4), ((0, 1), 30, 0.2)])
def test_dreg_is_biased_for_two_experts_and_exact_for_one(seen, samples, length):
    xs, gradients = only(pair(1_000), *seen), {}
    for objective in ("iwae", "dreg"):
        model, draws = exact_model("mmvae", 1, objective=objective, samples=samples), []
        encoder = model.encoders[0]
        encoder.logvar.data += 0.3  # at the exact posterior the gradient has no noise
        for _ in range(40):  # each the mean over 1,000 draws of the noise
            of = torch.autograd.grad(model.objective(*xs), [encoder.logvar, encoder.head.bias])
            draws.append(torch.cat(of))
        draws = torch.stack(draws)
        gradients[objective] = draws.mean(0), draws.std(0) / 40**0.5
    (iwae, iwae_error), (dreg, dreg_error) = gradients.values()
    errors = (iwae - dreg).abs() / (iwae_error**2 + dreg_error**2).sqrt()
    if len(seen) == 1:
        assert errors.max() < 4 and dreg_error.mean() < 0.8 * iwae_error.mean()
    else:
        assert errors.max() > 8
        assert dreg.norm() / iwae.norm() == pytest.approx(length, abs=0.06)  # as departures.md says


@pytest.mark.parametrize("first", [0, 1])
def test_resampled_posterior_is_app_a_from_each_side_in_turn(first, float64, monkeypatch):
    model, xs = linear_model("meme"), pair(2_000)
    monkeypatch.setattr(torch, "randint", lambda most, shape: torch.tensor(first))
    model.modalities = [m._replace(weight=0.5) for m in model.modalities]  # counts, as in training
    z = model.resample(*xs, samples=3, candidates=200)
    assert z.shape == (3, 2_000, L) and not z.requires_grad
    assert model.resample(*pair(7), samples=1).shape == (1, 7, L)
    gaussians_of = model.encode(xs)
    for k, s in enumerate([first, 1 - first, first]):  # q(z|s) N(t; W z + b, noise² / weight) is a Gaussian
        (mu, logvar), decode, t = gaussians_of[s], model.decoders[1 - s], xs[1 - s][0]
        slope = 0.5 * decode.weight.T / NOISE**2
        covariance = torch.linalg.inv(torch.diag(torch.exp(-logvar[0])) + slope @ decode.weight)
        mean = covariance @ (mu[0] * torch.exp(-logvar[0]) + slope @ (t - decode.bias))
        assert_close(z[k].mean(0), mean, atol=0.06, rtol=0)
        assert_close(z[k].T.cov(), covariance, atol=0.06, rtol=0)


class Exact(nn.Module):
    """q(z|x) = N(x / (1 + v), v / (1 + v)): the posterior of z ~ N(0, 1), x ~ N(z, v)."""

    def __init__(self, v):
        super().__init__()
        self.v = v

    def forward(self, x, running=False):
        return x / (1 + self.v), torch.full_like(x, math.log(self.v / (1 + self.v)))


def test_resampled_posterior_is_the_exact_one_of_both():
    v = 0.5
    identity = nets.Decoder(nn.Identity(), (1,))
    modalities = [
        nets.Modality(name, (1,), lambda _: Exact(v), lambda _: identity, "normal", scale=v**0.5)
        for name in "st"
    ]
    model = meme.MEME(modalities, 1)
    s, t = torch.tensor([[0.5], [-2.0]]), torch.tensor([[1.0], [1.0]])
    z = model.resample(s, t, samples=4000, candidates=4000)  # (4000, 2, 1)
    precision = 1 + 2 / v  # of the prior and both likelihoods
    assert z.shape == (4000, 2, 1)
    assert_close(z.mean(0), (s + t) / v / precision, atol=0.05, rtol=0)
    assert_close(z.var(0), torch.full((2, 1), 1 / precision), atol=0.03, rtol=0)
    assert model.posterior(s, t).variance[1] > 5 / precision  # not so the equal mixture
    alone = model.resample(s, None, samples=4000)
    assert_close(alone.mean(0), s / (1 + v), atol=0.05, rtol=0)
    assert_close(alone.var(0), torch.full((2, 1), v / (1 + v)), atol=0.05, rtol=0)


def test_variances_grow_linearly_above_a_scale_of_10():
    cap = 2 * math.log(10)
    logvar = torch.tensor([-9.0, 4.6, cap + 1, cap + 30, cap + 1e4], requires_grad=True)
    capped = meme.soft_cap_logvar(None, logvar)[1]
    assert_close(capped.exp()[2:], 100 * torch.tensor([2, 31, 10_001.0]))
    assert (capped[:2] == logvar[:2]).all()
    capped.sum().backward()
    assert_close(logvar.grad, torch.tensor([1, 1, 1 / 2, 1 / 31, 1 / 10_001]))
    model, sides = linear_model("meme"), pair(100)
    alone = [(sides[0], None), (None, sides[1])]
    model.encoders[0].logvar.data.fill_(40.0)  # with exp(logvar) a KL of e^40 nats
    posterior = model.posterior(*alone[0]).base_dist
    assert_close(posterior.scale**2, torch.full_like(posterior.scale, 100 * (41 - cap)))
    assert (model.prior().component_distribution.base_dist.scale < 61).all()
    for xs in [sides, *alone]:
        assert model.objective(*xs) > -1e6


def test_log_densities_keep_their_constants():
    z, mu, logvar = torch.randn(3, 4, L)
    assert_close(meme.log_normal(z, mu, logvar), meme.normal(mu, logvar).log_prob(z))
    for posterior in ("normal", "laplace"):
        model = small_model("mmvae", 2, posterior=posterior)
        expected = model.distribution(mu, logvar).log_prob(z)
        assert_close(model.log_density(z, mu, logvar), expected)


def test_pseudo_samples_start_as_observed_examples():
    model = linear_model("meme", pseudo_samples=4)
    before = [u.detach().clone() for u in model.pseudo]
    assert all(u.shape == (4, size) for u, size in zip(before, (3, 2)))
    model.init_pseudo_samples([torch.full((2, 3), 7.0), torch.arange(18.0).view(9, 2)])
    assert (model.pseudo[0][:2] == 7).all() and (model.pseudo[0][2:] == before[0][2:]).all()
    assert (model.pseudo[1] == torch.arange(8.0).view(4, 2)).all()


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


# ---------------------------------------------------------------------------- products and networks


def test_products_of_experts_are_the_published_vectors():
    given = [(torch.tensor([[m]]), 2 * torch.tensor([[s]]).log()) for m, s in [(1, 0.5), (-1, 0.1)]]
    several = linear_model("meme", (3, 2, 4), explicit="product").conditional_prior
    products = [(by, (-0.923, 0.0981)) for by in (svae.product, vaevae.product, several)]
    for by, expected in [*products, (linear_model("mvae").product, (-0.914, 0.0976))]:
        mu, logvar = by(given)
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


@MODELS
def test_a_step_updates_batchnorm_once_per_observed_encoder(float64, name):
    for seen in subsets(range(3)):
        model = small_model(name, 3)
        model([(1.0, only(batch(model), *seen))]).sum().backward()
        assert all(module.training for module in model.modules())
        encoders = model.encoders if name != "svae" else [e[0] for e in zip(*model.encoders)]
        for m, encoder in enumerate(encoders):
            [norm] = [n for n in encoder.modules() if isinstance(n, nn.BatchNorm1d)]
            assert norm.num_batches_tracked == (m in seen)  # pseudo-samples never count


@MODELS
def test_in_evaluation_examples_do_not_depend_on_their_batch(float64, name):
    model = small_model(name, 2)
    model([(1.0, batch(model))])  # its running statistics are not those it started with
    xs, z = batch(model), torch.randn(L)
    one = [x[:1] for x in xs]  # has no batch statistics
    training = model.posterior(*one).log_prob(z), model.prior().log_prob(z)
    model.eval()
    together = model.posterior(*xs).log_prob(z)
    alone = [model.posterior(*[x[b : b + 1] for x in xs]).log_prob(z)[0] for b in range(B)]
    assert_close(together, torch.stack(alone))
    assert_close(training, (together[:1], model.prior().log_prob(z)))  # nor have pseudo-samples


# ---------------------------------------------------------------------------------- what is refused

REFUSED = {
    "meme": [dict(explicit="product"), dict(explicit="x"), dict(kl="x"), dict(direction="x7"),
             dict(samples=0), dict(pseudo_samples=0)],
    "mmvae": [dict(samples=0), dict(objective="x"), dict(tight=True, objective="elbo"),
              dict(posterior="x")],
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
    flags, known = argparse.ArgumentParser(), SCRIPTS[name].MODEL.__init__.__kwdefaults__
    SCRIPTS[name].options(flags.add_argument)
    assert vars(flags.parse_args([])).keys() == known.keys()
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
    options = (dict(variant="b") if name == "vaevae" else {}) | options
    model = linear_model(name, (2,) * len(good[0]), **options)
    model.check_streams(good)
    if bad:
        with pytest.raises(ValueError, match=words):
            model.check_streams(bad)


def test_a_prior_is_trained_by_examples_of_one_modality():
    model = linear_model("meme", (2,) * 3)
    assert model.trained_priors([THREE, *TWOS]) == ()
    assert model.trained_priors([THREE, (False, False, True), (True, False, False)]) == ("x0", "x2")
    assert model.trained_priors(torch.eye(3).bool().tolist()) == ("x0", "x1", "x2")


# ------------------------------------------------------------------------ settings of the papers

# [meme] App. K: lr and epochs on mnist-svhn and cub; batch and K of its code. [poe] App. A: lr,
# epochs and L of svae and vaevae; batch sizes of its code. mmvae: its authors' commands, mvae: its
# authors' code, where [meme] and [poe] do not say otherwise (glyphs, npz, and what meme, mmvae and
# mvae do on halves and spectra, are our own choice).
SETTINGS = """
meme    glyphs         5   64  1e-3   20  samples=3
meme    mnist-split  100  128  5e-4   64
meme    mnist-split3 100  128  5e-4   64
meme    mnist-svhn   100  128  5e-4   20
meme    cub          300  128  1e-4   64  clip=1000.0
meme    spectra      140  128  1e-4  300
meme    npz            -  128  3e-3   20  samples=3 decay=0.3
svae    glyphs         5   64  1e-3   20  unpaired=all sampling=balanced experts=exact
svae    mnist-split  200  100  2e-4   64  unpaired=all sampling=balanced experts=exact
svae    mnist-split3  50  100  2e-4   64  unpaired=all sampling=balanced
svae    mnist-svhn    50  256  1e-4   20  unpaired=all sampling=balanced
svae    cub          200  100  1e-4   64  unpaired=all sampling=balanced
svae    spectra      140  100  1e-4  300  unpaired=all sampling=balanced
svae    npz            -  128  1e-3   20  unpaired=all sampling=natural decay=0.3 subsets=2
vaevae  glyphs         5   64  1e-3   20  unpaired=all sampling=balanced
vaevae  mnist-split  200  100  2e-4   64  unpaired=all sampling=balanced
vaevae  mnist-split3  50  100  2e-4   64  unpaired=all sampling=balanced
vaevae  mnist-svhn    50  256  1e-3   20  unpaired=all sampling=balanced
vaevae  cub          200  100  1e-4   64  unpaired=all sampling=balanced
vaevae  spectra      140  100  1e-4  300  unpaired=all sampling=balanced
vaevae  npz            -  128  1e-3   20  unpaired=all sampling=natural decay=0.3 subsets=4
mmvae   glyphs         5   64  1e-3   20  samples=3
mmvae   mnist-split  100  128  1e-3   64
mmvae   mnist-split3  50  128  1e-3   64
mmvae   mnist-svhn    30  128  1e-3   20  samples=30 weights=3.9183673469387754,1
mmvae   cub           50   64  1e-3   64  samples=50
mmvae   spectra      140  128  1e-4  300
mmvae   npz            -  128  1e-3   20  samples=3 decay=0.3
mvae    glyphs         5   64  1e-3   20  experts=exact
mvae    mnist-split  200  100  1e-3   64
mvae    mnist-split3  50  100  1e-3   64
mvae    mnist-svhn   100  100  1e-3   20
mvae    cub          300  100  1e-3   64
mvae    spectra      140  100  1e-4  300
mvae    npz            -  128  3e-3   20  decay=0.3 anneal=25
"""
OPTIONS = {
    "meme": dict(samples=10, kl="closed", classifier_scale=10.0, full_gradient=False,
                 direction=None, pseudo_samples=128, explicit="mixture"),
    "svae": dict(objective="svae", prior_expert=False, experts="bounded", subsets=0),  # eq. (19)
    "vaevae": dict(objective="vaevae", variant="b", subsets=0),
    "mmvae": dict(objective="iwae", samples=10, tight=False, posterior="normal"),
    "mvae": dict(subsets=0, anneal=0, experts="bounded"),
}  # fmt: skip


@MODELS
def test_defaults_are_the_settings_of_the_papers(name):
    expected = {}
    for line in SETTINGS.strip().splitlines():
        script, dataset, epochs, batch_size, lr, latent_dim, *others = line.split()
        row = dict(batch_size=batch_size, lr=lr, latent_dim=latent_dim)
        row |= {} if epochs == "-" else dict(epochs=epochs)  # npz: from the number of examples
        row |= dict(other.split("=") for other in others)
        if script == name:
            expected[dataset] = row
    numbers = {"epochs": int, "batch_size": int, "lr": float, "latent_dim": int, "samples": int,
               "clip": float, "decay": float, "subsets": int, "anneal": int}  # fmt: skip
    for row in expected.values():
        row |= {key: numbers[key](row[key]) for key in row.keys() & numbers.keys()}
    assert SCRIPTS[name].DEFAULTS == expected
    assert SCRIPTS[name].MODEL.__init__.__kwdefaults__ == OPTIONS[name]


def layer(module):
    """One line: what the module is, with all that decides what it computes."""
    if isinstance(module, nn.Linear):
        return f"fc {module.in_features} {module.out_features}" + " no bias" * (module.bias is None)
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        name = "conv" if isinstance(module, nn.Conv2d) else "upconv"
        (h, w), (a, b), (c, d) = module.kernel_size, module.stride, module.padding
        text = (
            f"{name} {module.in_channels} {module.out_channels} {h}x{w} stride {a}x{b} pad {c}x{d}"
        )
        return text + " no bias" * (module.bias is None)
    if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
        return f"norm {module.num_features}"
    if isinstance(module, nets.Map):
        h, w, c = module.size
        return f"map {c} {h}x{w}"
    if isinstance(module, nets.Crop):
        return f"crop {module.height}x{module.width}"
    return type(module).__name__


def layers(text):
    """Lines, without empty ones and indentation."""
    return [line.strip() for line in text.strip().splitlines()]


A_3 = ("Flatten\nfc 784 400\nReLU", "fc L 400\nReLU\nfc 400 784")
BAND = """
    conv 1 64 4x4 stride 2x2 pad 1x1 no bias
    ReLU
    conv 64 128 4x4 stride 2x2 pad 1x1 no bias
    ReLU
    conv 128 256 4x4 stride 2x2 pad 1x1 no bias
    ReLU
    Flatten
    fc 768 512
    ReLU
"""
UP_BAND = """
    fc L 512
    ReLU
    fc 512 112
    ReLU
    map 112 1x1
    upconv 112 56 {} stride 2x2 pad 0x0
    ReLU
    upconv 56 28 {} stride 2x2 pad 0x0
    ReLU
    upconv 28 1 {} stride 2x2 pad 0x0
"""
NETWORKS = {  # data set, modality: encoder's trunk and width, decoder
    ("mnist-split", "top"): (BAND, 512, UP_BAND.format("3x5", "3x5", "2x4")),  # [poe] Table A.2
    ("mnist-split", "bottom"): (BAND, 512, UP_BAND.format("3x5", "3x5", "2x4")),
    ("mnist-split3", "top"): (BAND, 512, UP_BAND.format("2x5", "2x5", "3x4")),  # [poe] Table A.7
    ("mnist-split3", "middle"): (BAND, 512, UP_BAND.format("2x5", "2x5", "3x4")),
    ("mnist-split3", "bottom"): (BAND, 512, UP_BAND.format("2x5", "2x5", "3x4")),
    # [meme] Table 8a, [poe] Table A.3
    ("mnist-svhn", "mnist"): (
        "Flatten\nfc 784 400\nReLU", 400, "fc L 400\nReLU\nfc 400 784"
    ),
    # [meme] Table 8b, [poe] Table A.4
    ("mnist-svhn", "svhn"): (
        """conv 3 32 4x4 stride 2x2 pad 1x1
        ReLU
        conv 32 64 4x4 stride 2x2 pad 1x1
        ReLU
        conv 64 128 4x4 stride 2x2 pad 1x1
        ReLU
        Flatten""",
        128 * 4 * 4,
        """fc L 2048
        ReLU
        map 128 4x4
        upconv 128 64 4x4 stride 2x2 pad 1x1
        ReLU
        upconv 64 32 4x4 stride 2x2 pad 1x1
        ReLU
        upconv 32 3 4x4 stride 2x2 pad 1x1
        crop 32x32""",
    ),
    # [meme] Table 8c, [poe] Table A.6
    ("cub", "image"): (
        "Flatten\nfc 2048 1024\nELU\nfc 1024 512\nELU\nfc 512 256\nELU",
        256,
        "fc L 256\nELU\nfc 256 512\nELU\nfc 512 1024\nELU\nfc 1024 2048",
    ),
    # [meme] Table 8d, [poe] Table A.5
    ("cub", "caption"): (
        """WordEmbedding
        conv 1 32 4x4 stride 2x2 pad 1x1 no bias
        norm 32
        ReLU
        conv 32 64 4x4 stride 2x2 pad 1x1 no bias
        norm 64
        ReLU
        conv 64 128 4x4 stride 2x2 pad 1x1 no bias
        norm 128
        ReLU
        conv 128 256 1x4 stride 1x2 pad 0x1 no bias
        norm 256
        ReLU
        conv 256 512 1x4 stride 1x2 pad 0x1 no bias
        norm 512
        ReLU
        Flatten""",
        512 * 4 * 4,
        """fc L 8192
        ReLU
        map 512 4x4
        upconv 512 256 1x4 stride 1x2 pad 0x1 no bias
        norm 256
        ReLU
        upconv 256 128 1x4 stride 1x2 pad 0x1 no bias
        norm 128
        ReLU
        upconv 128 64 4x4 stride 2x2 pad 1x1 no bias
        norm 64
        ReLU
        upconv 64 32 4x4 stride 2x2 pad 1x1 no bias
        norm 32
        ReLU
        upconv 32 1 4x4 stride 2x2 pad 1x1
        ReLU
        WordLogits""",
    ),
    # [poe] Table A.8
    ("spectra", "spectrum"): (
        """Flatten
        fc 11000 10000
        norm 10000
        ReLU
        fc 10000 5000
        norm 5000
        ReLU
        fc 5000 2048
        norm 2048
        ReLU""",
        2048,
        """fc L 3000
        norm 3000
        ReLU
        fc 3000 5000
        norm 5000
        ReLU
        fc 5000 10000
        norm 10000
        ReLU
        fc 10000 11000""",
    ),
    # [poe] Table A.9
    ("spectra", "fingerprint"): (
        "Flatten\nfc 2149 1024\nReLU\nfc 1024 1000\nReLU",
        1000,
        "fc L 500\nReLU\nfc 500 1024\nReLU\nfc 1024 2149",
    ),
    # Our own: both sides as mnist's
    ("glyphs", "grey"): ("Flatten\nfc 784 400\nReLU", 400, "fc L 400\nReLU\nfc 400 784"),
    ("glyphs", "colour"): ("Flatten\nfc 3072 400\nReLU", 400, "fc L 400\nReLU\nfc 400 3072"),
}  # fmt: skip
# name, shape, likelihood, weight, scale. cub's image as in the code of [poe] and of mmvae's authors
LIKELIHOODS = {
    "mnist-split": [("top", (1, 14, 28), "bernoulli", 1, 1),
                    ("bottom", (1, 14, 28), "bernoulli", 1, 1)],
    "mnist-split3": [(part, (1, 9, 28), "bernoulli", 1, 1) for part in ("top", "middle", "bottom")],
    "mnist-svhn": [("mnist", (1, 28, 28), "bernoulli", 1, 1),
                   ("svhn", (3, 32, 32), "bernoulli", 1, 1)],
    "glyphs": [("grey", (1, 28, 28), "bernoulli", 1, 1),
               ("colour", (3, 32, 32), "bernoulli", 1, 1)],
    "cub": [("image", (2048,), "laplace", 0.002, 0.01), ("caption", (32,), "categorical", 1, 1)],
    "spectra": [("spectrum", (11000,), "bernoulli", 1, 1),
                ("fingerprint", (2149,), "bernoulli", 1, 1)],
}  # fmt: skip
WORDS = 1590


@pytest.mark.parametrize("dataset", LIKELIHOODS)
def test_networks_and_likelihoods_are_the_papers_tables(dataset):
    with torch.device("meta"):  # shapes alone: a spectrum's encoder has 171 million weights
        modalities = nets.modalities(dataset, vocabulary=WORDS)
        found = [(m.name, m.shape, m.likelihood, m.weight, m.scale) for m in modalities]
        assert found == LIKELIHOODS[dataset]
        for m in modalities:
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


def test_width_scales_the_hidden_layers_of_spectra():
    with torch.device("meta"):
        spectrum = nets.modalities("spectra", width=0.1)[0]
        trunk, net = spectrum.encoder(7).trunk, spectrum.decoder(7).net
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


def test_features_of_another_network_change_the_outer_layers():
    with torch.device("meta"):
        image = nets.modalities("cub", shapes={"image": [960]}, vocabulary=9)[0]
        assert image.shape == (960,)
        assert layer(image.encoder(4).trunk[1]) == "fc 960 1024"
        assert layer(image.decoder(4).net[-1]) == "fc 1024 960"


# ------------------------------------------------------------------------ a user's own arrays

OWN = [  # kind, shape, likelihood, further arguments -> hidden width, first module, parameter's shape
    ("numbers", (3,), "normal", {}, 64, "Observed", (3, 2)),
    ("numbers", (100,), "laplace", {}, 100, "Observed", (100, 2)),
    ("counts", (5,), "negative-binomial", {}, 64, "LogCounts", (5, 2)),
    ("counts", (600,), "poisson", {}, 512, "LogCounts", (600,)),
    ("bits", (70,), "bernoulli", {}, 70, "Flatten", (70,)),
    ("class", (), "categorical", dict(classes=80), 80, "OneHot", (80,)),
]


@pytest.mark.parametrize("kind, shape, likelihood, more, hidden, first, parameter", OWN)
def test_own_arrays_have_two_hidden_layers_of_their_width(
    kind, shape, likelihood, more, hidden, first, parameter
):
    m = nets.user_array("x", kind, shape, likelihood, **more)
    size, encoder, decoder = more.get("classes") or math.prod(shape), m.encoder(7), m.decoder(7)
    assert [*map(layer, encoder.trunk)] == [
        first, f"fc {size} {hidden}", "ReLU", f"fc {hidden} {hidden}", "ReLU"
    ]  # fmt: skip
    up = [f"fc 7 {hidden}", "ReLU", f"fc {hidden} {hidden}", "ReLU", f"fc {hidden} {size}"]
    assert [*map(layer, decoder.net)][:5] == up
    assert len(decoder.net) == 5 + (len(parameter) > len(shape) and kind != "class")
    assert (m.name, m.shape, m.likelihood, m.weight) == ("x", shape, likelihood, 1)
    assert decoder(torch.randn(3, 2, 7)).shape == (3, 2, *parameter)
    x = torch.ones(2, *shape, dtype=torch.int64 if kind == "class" else torch.float32)
    assert encoder(x)[0].shape == (2, 7)
    assert nets.log_prob(m, decoder(torch.randn(3, 2, 7)), x).shape == (3, 2)
    assert nets.mean(m, decoder(torch.randn(2, 7))).shape == (
        2,
        *shape,
        *parameter[: kind == "class"],
    )


def test_own_images_have_the_networks_of_svhn():
    m = nets.user_array("x", "greys", (1, 12, 20), "laplace")
    trunk, _, up = NETWORKS["mnist-svhn", "svhn"]
    encoder, decoder = m.encoder(7), m.decoder(7)
    assert [*map(layer, encoder.trunk)] == layers(trunk.replace("conv 3 32", "conv 1 32"))
    assert layer(encoder.head) == f"fc {128 * 1 * 2} 14"
    up = up.replace("fc L 2048", "fc 7 768").replace("128 4x4\n", "128 2x3\n")
    up = up.replace("32 3 4x4", "32 1 4x4").replace("crop 32x32", "crop 12x20\nSigmoid")
    assert [*map(layer, decoder.net)] == layers(up)
    assert m.scale == 1 and decoder(torch.randn(2, 7)).shape == (2, 1, 12, 20)
    assert encoder(torch.rand(2, 1, 12, 20))[0].shape == (2, 7)


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
    m = nets.user_array("x", kind, shape, likelihood, marginal=marginal, **more)
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
    assert nets.Observed()(x).tolist() == [[1, 0, 3], [0, 0, 0]]
    parameter = torch.randn(5, 2, 3, 2, requires_grad=True)
    for kind, family in (("normal", Normal), ("laplace", Laplace)):
        m = nets.Modality("x", (3,), None, None, kind, scale=None)
        found = nets.log_prob(m, parameter, x)
        location, log_scale = parameter.unbind(-1)
        each = family(location, log_scale.exp()).log_prob(torch.tensor([1.0, 0.0, 3.0]))
        assert_close(found, torch.stack([each[:, 0, 0] + each[:, 0, 2], torch.zeros(5)], 1))
        [gradient] = torch.autograd.grad(found.sum(), parameter)
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
    for kind, parameter, density, x, scale in cases:
        modality = nets.Modality("x", (2, 5), None, None, kind, weight=9.0, scale=scale)
        found = nets.log_prob(modality, parameter, x)
        assert_close(found, density.log_prob(x).sum((-1, -2)))
        assert_close(nets.mean(modality, parameter), density.mean)
        assert nets.log_prob(modality, parameter.bfloat16(), x).dtype == torch.float32
    grey = nets.Modality("x", (2, 5), None, None, "bernoulli")
    logits, x = torch.randn(4, 2, 5), torch.rand(4, 2, 5)
    expected = x * logits.sigmoid().log() + (1 - x) * (-logits).sigmoid().log()
    assert_close(nets.log_prob(grey, logits, x), expected.sum((1, 2)))
    with pytest.raises(ValueError, match="must be one of bernoulli, .* not 'x'"):
        nets.log_prob(grey._replace(likelihood="x"), logits, x)


@pytest.mark.parametrize("kind, scale", [
    ("bernoulli", 1.0), ("laplace", 1.0), ("normal", 1.0), ("poisson", 1.0), ("laplace", None),
    ("normal", None), ("negative-binomial", 1.0), ("categorical", 1.0),
])  # fmt: skip
def test_samples_have_the_mean_and_spread_of_the_likelihood(kind, scale):
    parameter = torch.tensor([[0.3, -0.5], [-1.0, 0.4]])  # two features, two numbers each
    modality = nets.Modality("x", (2,), None, None, kind, scale=scale and 0.5)
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
    }[kind]()
    x = nets.sample(modality, parameter.expand(40_000, *parameter.shape))
    assert x.shape == (40_000, 2)
    x = x.float()
    assert_close(x.mean(0), density.mean, atol=0.04, rtol=0)
    assert_close(x.std(0), density.stddev, atol=0.05, rtol=0.03)
    if kind in ("laplace", "normal"):
        spread = (x - density.mean).abs().mean(0) / density.stddev
        expected = 0.5**0.5 if kind == "laplace" else (2 / math.pi) ** 0.5
        assert_close(spread, torch.full((2,), expected), atol=0.02, rtol=0)


@pytest.mark.parametrize("kind, scale", [
    ("bernoulli", 1.0), ("laplace", 1.0), ("normal", 1.0), ("poisson", 1.0), ("laplace", None),
    ("normal", None), ("negative-binomial", 1.0), ("categorical", 1.0),
])  # fmt: skip
def test_a_likelihood_never_broadcasts(kind, scale):
    def log_prob(shape, parameter, x):
        modality = nets.Modality("age", shape, None, None, kind, scale=scale)
        last = {"categorical": (4,)}.get(kind, (2,) if nets.extra_axis(modality) else ())
        x = torch.ones(x, dtype=torch.int64 if kind == "categorical" else torch.float32)
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


@MODELS
def test_images_without_their_channel_are_refused(name):
    model = SCRIPTS[name].MODEL(nets.modalities("glyphs"), 4)
    grey, colour = images("glyphs", 3)
    with pytest.raises(ValueError, match="grey must have the shape"):
        model([(1.0, [grey[:, 0], colour])])


def test_padding_is_not_scored_and_every_other_word_is():
    modality = nets.modalities("cub", vocabulary=4)[1]
    logits, x = torch.randn(3, 2, 32, 4), torch.randint(4, (2, 32))
    each = Categorical(logits=logits).log_prob(x)  # words 0 to 3, of which 1 is <pad>
    expected = torch.where(x == 1, 0, each).sum(-1)
    assert_close(nets.log_prob(modality, logits, x), expected)
    assert_close(nets.log_prob(modality, logits[0], x), expected[0])
    assert nets.log_prob(modality, logits.bfloat16(), x).dtype == torch.float32
    assert_close(nets.mean(modality, logits), logits.softmax(-1))


def test_every_class_is_scored_the_second_too():
    modality = nets.user_array("x", "class", (), "categorical", classes=3)
    logits, x = torch.randn(5, 4, 3), torch.tensor([0, 1, 2, 1])
    assert_close(nets.log_prob(modality, logits, x), Categorical(logits=logits).log_prob(x))


def test_variances_are_floored_smoothly_at_1e_6():
    h = torch.tensor([[0.5, -1.0, -200.0, 3.0], [2.0, 0.0, -13.0, -14.0]])
    mu, logvar = nets.gaussian(h.bfloat16())
    assert mu.dtype == logvar.dtype == torch.float32
    assert mu.tolist() == h[:, :2].tolist()
    assert_close(logvar, (1e-6 + h[:, 2:].exp()).log())


def test_batchnorm_takes_single_examples_and_pseudo_samples_by_running_statistics():
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


def test_building_blocks_compute_what_they_say():
    modalities = [m._replace(name="x") for m in nets.modalities("glyphs")]
    joint, xs = nets.Joint(modalities, 3), images("glyphs", 4)
    h = [trunk(x) for trunk, x in zip(joint.trunks, xs)]
    h = torch.cat([(h_m @ layer[0].weight.T + layer[0].bias).relu()
                   for h_m, layer in zip(h, joint.layers)], 1)  # fmt: skip
    assert h.shape == (4, 2 * 512)
    assert_close(joint(xs), nets.gaussian(joint.head(h)))
    channels_last = torch.arange(30).view(1, 3, 5, 2)
    assert_close(nets.Map(2, 3, 5)(channels_last.flatten(1)), channels_last.permute(0, 3, 1, 2))
    grid = torch.arange(30).view(1, 5, 6)
    assert_close(nets.Crop(2, 3)(grid), torch.tensor([[[0, 1, 2], [6, 7, 8]]]))
    with torch.autocast("cpu", torch.bfloat16):
        assert modalities[0].decoder(3)(torch.randn(5, 3)).dtype == torch.float32
    weight, words = torch.randn(7, 128), torch.randint(7, (2, 32))
    embed, logits = nets.WordEmbedding(weight), nets.WordLogits(nn.Parameter(weight))
    h = embed(words)
    assert h.shape == (2, 1, 32, 128) and (h[1, 0, 5] == weight[words[1, 5]]).all()
    soft = torch.randn(2, 32, 7)
    assert_close(embed(soft)[:, 0], soft.softmax(-1) @ weight)
    nn.init.normal_(logits.bias)
    assert_close(logits(h), h[:, 0] @ weight.T + logits.bias)


def test_likelihoods_and_weights_can_be_chosen_and_are_checked():
    chosen = dict(likelihoods=["laplace", "bernoulli"], weights=["2", "0"])
    first, second = nets.modalities("glyphs", **chosen)
    assert (first.likelihood, first.weight) == ("laplace", 2)
    assert (second.likelihood, second.weight) == ("bernoulli", 0)
    assert [*map(layer, first.decoder(3).net)][-2:] == ["fc 400 784", "Sigmoid"]  # [poe] Table A.3
    assert layer(second.decoder(3).net[-1]) == "fc 400 3072"
    for dataset in ("mnist-svhn", "mnist-split"):
        [last] = {layer(m.decoder(3).net[-1])
                  for m in nets.modalities(dataset, likelihoods=["laplace"] * 2)}  # fmt: skip
        assert last == "Sigmoid"
    features = nets.modalities("cub", vocabulary=5, likelihoods=["normal", "categorical"])[0]
    assert features.likelihood == "normal"
    assert layer(features.decoder(3).net[-1]) == "fc 1024 2048"  # features are not in (0, 1)
    for key, values in [("likelihoods", ["laplace"]), ("likelihoods", ["x", "x"]),
                        ("likelihoods", ["categorical", "bernoulli"]),
                        ("likelihoods", ["poisson", "bernoulli"]),
                        ("likelihoods", ["negative-binomial", "bernoulli"]),
                        ("weights", ["-1", "1"]), ("weights", ["a", "1"]),
                        ("weights", ["inf", "1"]), ("weights", ["1"])]:  # fmt: skip
        with pytest.raises(ValueError):
            nets.modalities("glyphs", **{key: values})
    with pytest.raises(ValueError, match="caption cannot"):
        nets.modalities("cub", vocabulary=5, likelihoods=["laplace", "normal"])
    with pytest.raises(ValueError, match="'nope'"):
        nets.modalities("nope")


# ----------------------------------------------------------------------------------------- the loop


@MODELS
def test_a_script_trains_and_resumes_to_the_same_bits(name, arrays, tmp_path, capsys):  # noqa: F811
    flags, run = dict(dataset=arrays, paired=0.5, batch_size=16, lr=1e-2), tmp_path / "a"
    train(name, **flags, epochs=3, out=run)
    assert f"python eval.py {run}" in capsys.readouterr().out
    rows = (run / "log.csv").read_text().splitlines()
    assert rows[0].startswith("epoch,objective,log_p_0,log_p_1") and len(rows) == 4
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
