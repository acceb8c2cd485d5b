"""MEME: each modality is the conditional prior of the other (Joy et al., ICLR 2022).

    p(s, z, t)  = p(s|z) p(z|t) p(t)                            generative model, and its mirror
    q(z|s, t)   = q(z|s) q(t|z) / q(t|s)                        posterior, by Bayes' rule
    L(s -> t)   = E_q(z|s)[ w log p(s|z) p(z|t) / q(z|s) q(t|z) ] + log q(t|s),
                  w = q(t|z) / q(t|s),  q(t|s) = E_q(z|s) q(t|z)                          Eq. (6)
    L(s, t)     = ½ [ L(s -> t) + L(t -> s) ]                                             Eq. (2)
    L(s)        = E_q(z|s)[ log p(s|z) - log q(z|s) + log 1/N Σ_i p(z|u_i) ]              Eq. (4)

The encoder of t is the prior p(z|t), the decoder of t is q(t|z) (App. C); u_i are learnable inputs
that stand in for a missing t. The constant log p(t) is left out. The defaults are not a bound: the
KL is in closed form, outside w, and log q(t|s) has the factor c = 10; see `bound`.
Shapes: B examples, K samples, L latent dimensions, N pseudo-samples. A missing modality is None.
Run:    python meme.py     # 1-2 minutes on two CPU cores; eval.py: cross coherence .999 .994
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

import nets

DEFAULTS = {
    "glyphs": dict(epochs=5, batch_size=64, lr=1e-3, latent_dim=20, samples=3),
    "mnist-split": dict(epochs=100, batch_size=128, lr=5e-4, latent_dim=64),
    "mnist-split3": dict(epochs=100, batch_size=128, lr=5e-4, latent_dim=64),
    "mnist-svhn": dict(epochs=100, batch_size=128, lr=5e-4, latent_dim=20),
    "cub": dict(epochs=300, batch_size=128, lr=1e-4, latent_dim=64, clip=1000.0),
    "spectra": dict(epochs=140, batch_size=128, lr=1e-4, latent_dim=300),
    "npz": dict(batch_size=128, lr=3e-3, decay=0.3, latent_dim=20, samples=3),
}

LOGVAR_10 = 2 * math.log(10)  # a scale of 10
CERTAIN = 8.0  # the logit of the observed word in a pseudo-sample


def soft_cap_logvar(logvar):
    """Above a scale of 10 the variance grows linearly in logvar, not exponentially. Nothing in MEME
    fixes the scale of z, so one wide posterior can blow up the KL."""
    return logvar.clamp(max=LOGVAR_10) + F.relu(logvar - LOGVAR_10).log1p()


def certain_words(x, classes):
    """Words or classes x as logits that are nearly certain, (..., classes)."""
    return CERTAIN * F.one_hot(x, classes).float()


def normal(mu, logvar):
    """A diagonal Gaussian as a distribution: event (L,)."""
    return Independent(Normal(mu, torch.exp(0.5 * logvar), validate_args=False), 1)


def mixture(mu, logvar):
    """The equal mixture of the Gaussians along the axis before the last: event (L,)."""
    weights = Categorical(torch.ones_like(mu[..., 0]), validate_args=False)
    return MixtureSameFamily(weights, normal(mu, logvar), validate_args=False)


def log_normal(z, mu, logvar):
    """log N(z; mu, exp(logvar)), summed over L."""
    return -0.5 * ((z - mu) ** 2 * torch.exp(-logvar) + logvar + math.log(2 * math.pi)).sum(-1)


def kl_normal(mu, logvar, prior_mu, prior_logvar):
    """KL of one diagonal Gaussian to another, summed over L."""
    error = ((mu - prior_mu) ** 2 + torch.exp(logvar)) * torch.exp(-prior_logvar)
    return 0.5 * (prior_logvar - logvar + error - 1).sum(-1)


class MEME(nn.Module):
    """Options:
    samples           K
    kl                "sample", as in eq. (6), or "closed", outside w, which a mixture p(z|t) does
                      not have
    classifier_scale  c, the factor on log q(t|s)
    full_gradient     differentiate w, too: with kl="sample" all of eq. (7)
    direction         the modality s of the only direction to train, which every example must show
    pseudo_samples    N
    explicit          p(z|t) where t is several modalities (App. E): the "mixture" or the "product"
                      of their encoders
    """

    resamples = True  # sample_posterior weighs its samples by the likelihood of what is observed
    random_on_host = False  # a CUDA graph can replay the objective

    def __init__(
        self,
        modalities,
        latent_dim,
        *,
        samples=10,
        kl="closed",
        classifier_scale=10.0,
        full_gradient=False,
        direction=None,
        pseudo_samples=128,
        explicit="mixture",
    ):
        super().__init__()
        names = [m.name for m in modalities]
        if direction not in (None, *names):
            raise ValueError(f"direction must be one of {', '.join(names)}, not {direction!r}")
        if samples < 1 or pseudo_samples < 1:
            raise ValueError("samples and pseudo_samples must be 1 or more")
        if kl not in ("closed", "sample") or explicit not in ("mixture", "product"):
            raise ValueError("kl must be closed or sample, explicit mixture or product")
        self.modalities, self.latent_dim = modalities, latent_dim
        self.samples = samples
        self.kl = kl
        self.classifier_scale = classifier_scale
        self.full_gradient = full_gradient
        self.pseudo_samples = pseudo_samples
        self.explicit = explicit
        self.direction = None if direction is None else names.index(direction)
        # Each network plays two roles: q(z|x_m) and p(z|x_m); p(x_m|z) and q(x_m|z)
        self.encoders = nn.ModuleList(m.encoder(latent_dim) for m in modalities)
        self.decoders = nn.ModuleList(m.decoder(latent_dim) for m in modalities)
        self.pseudo = nn.ParameterList()  # u_1..N of each modality, of x's shape; words as logits
        for m in modalities:
            u = torch.rand(pseudo_samples, *m.shape, *([m.classes] if m.classes else []))
            if m.classes:  # a logit for each word or class
                u = certain_words(u.argmax(-1), m.classes)
            self.pseudo.append(nn.Parameter(u))

    def start(self, train, streams):
        """Before training: the pseudo-samples become observed examples of the split `train`.
        ValueError where the only direction, s -> t, meets examples without s."""
        if self.direction is not None and not all(mask[self.direction] for mask, _ in streams):
            name = self.modalities[self.direction].name
            raise ValueError(f"direction {name} needs {name} in every example")
        self.init_pseudo_samples(train.distinct_examples(streams, self.pseudo_samples))

    @torch.no_grad()
    def init_pseudo_samples(self, examples):
        """Copy observed examples, one tensor per modality, over the first pseudo-samples; a word or
        class becomes logits."""
        for m, u, x in zip(self.modalities, self.pseudo, examples):
            x = certain_words(x, m.classes) if m.classes else x
            u[: len(x)] = x[: len(u)]

    def start_epoch(self, epoch):
        """Nothing of this model depends on the epoch."""

    def encode(self, m, x, running=False):
        """q(z|x_m), also p(z|x_m). -> mu, logvar, each (B, L)"""
        mu, logvar = nets.apply(self.encoders[m], x, running)
        return mu, soft_cap_logvar(logvar)

    def pseudo_prior(self, s=None):
        """p(z|u_i), the components of eq. (4)'s prior, for the u of all modalities but s.
        -> mu, logvar, each (n N, L) with n such modalities"""
        others = [m for m in range(len(self.modalities)) if m != s]
        gaussians = [self.encode(m, self.pseudo[m], running=True) for m in others]
        return [torch.cat(parameters) for parameters in zip(*gaussians)]

    def weighted_log_p(self, m, z, x):
        """log p(x_m|z), times the likelihood's weight. z (..., B, L) -> (..., B)"""
        modality = self.modalities[m]
        return modality.weight * nets.log_prob(modality, self.decoders[m](z), x)

    def importance_weight(self, log_q_t):
        """log q(t|s) and w, the weight of z_1, from log q(t|z_k), (K, B). -> (B,), (B,)"""
        # z_1 must be in this sum (App. D): without it w is unbounded and training collapses silently
        log_q_t_given_s = log_q_t.logsumexp(0) - math.log(len(log_q_t))  # Eq. (8), with its 1/K
        w = torch.exp(log_q_t[0] - log_q_t_given_s)  # Eq. (10): in (0, K], with mean 1
        if not self.full_gradient:
            w = w.detach()  # App. B: the gradient of w, the first term of eq. (7), is mostly noise
        return log_q_t_given_s, w

    def bound(self, s, xs, gaussians):
        """L(s -> t), t being all other observed modalities. gaussians: {m: encode(m, x_m)}.
        -> (B,), nats"""
        t = [m for m in gaussians if m != s]
        mu, logvar = gaussians[s]
        eps = torch.randn(self.samples, *mu.shape, device=mu.device, dtype=mu.dtype)  # (K, B, L)
        z = mu + torch.exp(0.5 * logvar) * eps  # ~ q(z|s)
        log_p_s = self.weighted_log_p(s, z[0], xs[s])  # (B,)
        log_q_t = sum(self.weighted_log_p(m, z, xs[m]) for m in t)  # (K, B)
        log_q_t_given_s, w = self.importance_weight(log_q_t)
        prior_mu, prior_logvar = self.conditional_prior([gaussians[m] for m in t])  # (n, B, L)
        # c = 10: with 1, and w detached, the expected gradient of s -> t reconstruction is zero
        if self.kl == "sample" or len(prior_mu) > 1:  # Eq. (6) if c = 1
            log_p_z = log_normal(z[0], prior_mu, prior_logvar).logsumexp(0)
            log_p_z = log_p_z - math.log(len(prior_mu))  # a mixture's density: it has no closed KL
            log_q_z = log_normal(z[0], mu, logvar)
            ratio = log_p_s + log_p_z - log_q_z - log_q_t[0]
            return w * ratio + self.classifier_scale * log_q_t_given_s
        # The KL in closed form, outside w, whose mean is 1: less noise, but not a bound
        kl = kl_normal(mu, logvar, prior_mu[0], prior_logvar[0])
        return w * (log_p_s - log_q_t[0]) - kl + self.classifier_scale * log_q_t_given_s

    def conditional_prior(self, gaussians):
        """p(z|t) (App. E): the components of the mixture of t's encoders, or their product as the
        only one. -> mu, logvar, each (n, B, L)"""
        mu, logvar = (torch.stack(parameters) for parameters in zip(*gaussians))  # (n, B, L)
        if self.explicit == "mixture" or len(mu) == 1:
            return mu, logvar
        precision = torch.exp(-logvar)
        total = precision.sum(0, keepdim=True)
        return (precision * mu).sum(0, keepdim=True) / total, -total.log()  # (1, B, L)

    def marginal_bound(self, s, x, mu, logvar):
        """L(s), eq. (4), where t is missing: p(z) is the mixture over t's pseudo-samples.
        -> (B,), nats"""
        z = mu + torch.exp(0.5 * logvar) * torch.randn_like(mu)
        prior_mu, prior_logvar = self.pseudo_prior(s)
        log_p_z_u = log_normal(z[:, None], prior_mu, prior_logvar)  # (B, N)
        log_p_z = log_p_z_u.logsumexp(1) - math.log(len(prior_mu))
        return self.weighted_log_p(s, z, x) + log_p_z - log_normal(z, mu, logvar)

    def objective(self, *xs):
        """The objective of examples with the same modalities observed, to be maximised: mean over the
        batch, nats, scalar."""
        gaussians = {m: self.encode(m, xs[m]) for m in nets.observed(self.modalities, xs)}
        if len(gaussians) == 1:
            ((s, gaussian),) = gaussians.items()
            return self.marginal_bound(s, xs[s], *gaussian).mean()
        starts = gaussians if self.direction is None else [self.direction]
        bounds = [self.bound(s, xs, gaussians) for s in starts]
        return torch.stack(bounds).mean()  # Eq. (2); eq. (11) for M = 3

    def forward(self, streams):
        """The loss of each stream (weight, xs): -weight * objective. -> (S,)"""
        return torch.stack([-weight * self.objective(*xs) for weight, xs in streams])

    def trained_priors(self, masks):
        """The names of the modalities whose own p(z), eq. (4), streams with these masks train: those
        that some stream shows alone."""
        alone = [mask.index(True) for mask in map(list, masks) if sum(mask) == 1]
        return tuple(m.name for k, m in enumerate(self.modalities) if k in alone)

    def posterior(self, *xs):
        """q(z|observed): the encoder of one modality; of several their mixture or product. Batch
        (B,), event (L,)."""
        gaussians = [self.encode(m, xs[m]) for m in nets.observed(self.modalities, xs)]
        mu, logvar = self.conditional_prior(gaussians)  # (n, B, L)
        if len(mu) == 1:
            return normal(mu[0], logvar[0])
        return mixture(*(parameter.transpose(0, 1).contiguous() for parameter in (mu, logvar)))

    @torch.no_grad()
    def sample_posterior(self, xs, n=1):
        """z ~ q(z|observed); of several modalities App. A's q(z|s,t) = q(z|s) q(t|z) / q(t|s),
        resampled from `candidates`; each modality takes the role of s in turn, the first one at
        random. -> (n, B, L)"""
        seen = nets.observed(self.modalities, xs)
        if len(seen) == 1:
            return self.posterior(*xs).sample((n,))
        draws, first = [None] * n, int(torch.randint(len(seen), ()))
        for turn, s in enumerate([*seen[first:], *seen[:first]][:n]):
            z, log_w = self.candidates(xs, s)
            count = len(range(turn, n, len(seen)))
            k = Categorical(logits=log_w.T).sample((count,))  # (count, B)
            draws[turn :: len(seen)] = z[k, torch.arange(z.shape[1], device=z.device)]
        return torch.stack(draws)

    @torch.no_grad()
    def candidates(self, xs, s, samples=60, steps=10):
        """Samples z of a proposal r, and log w = log q(z|s) q(t|z) / r(z), weights that make them
        samples of App. A's posterior; the likelihoods' weights count as in training.

        r is a Gaussian: the product of the encoders of s and t after `steps` natural-gradient steps
        on KL(r || posterior) (Khan & Rue 2023), each from two mirrored samples and bounded, since
        they are few. A step costs as much as decoding four samples. -> (K, B, L), (K, B)"""
        gaussians = {m: self.encode(m, x) for m, x in enumerate(xs) if x is not None}

        def log_p(z):  # q(z|s) q(t|z)
            log_q_t = sum(self.weighted_log_p(m, z, xs[m]) for m in gaussians if m != s)
            return log_normal(z, *gaussians[s]) + log_q_t

        mu, logvar = (torch.stack(parameters) for parameters in zip(*gaussians.values()))
        precision = torch.exp(-logvar).sum(0)
        mu = (mu * torch.exp(-logvar)).sum(0) / precision
        for _ in range(steps):
            eps = torch.randn_like(mu)
            eps = torch.stack([eps, -eps])  # (2, B, L)
            with torch.enable_grad():
                z = (mu + eps * precision.rsqrt()).requires_grad_()
                (gradient,) = torch.autograd.grad(log_p(z).sum(), z)
            curvature = -(gradient * eps).mean(0) * precision.sqrt()  # E[-d²log p/dz²], by Stein
            least = torch.maximum(precision / 2, torch.exp(-gaussians[s][1]))  # q(z|s) has as much
            precision = 0.6 * precision + 0.4 * curvature.clamp(least, 2 * precision)
            scale = precision.rsqrt()
            mu = mu + (0.4 * gradient.mean(0) / precision).clamp(-scale, scale)
        precision = 0.8 * precision  # a proposal must be wider than its target
        z = mu + precision.rsqrt() * torch.randn(
            samples, *mu.shape, device=mu.device, dtype=mu.dtype
        )
        log_p_z = torch.cat([log_p(part) for part in z.split(10)])
        return z, log_p_z - log_normal(z, mu, -precision.log())

    def prior(self, *xs):
        """p(z) of examples that show one modality alone, eq. (4); for several, or without xs, the
        mixture over all pseudo-samples, which is our choice. Event (L,)."""
        seen = [m for m, x in enumerate(xs) if x is not None]
        return mixture(*self.pseudo_prior(seen[0] if len(seen) == 1 else None))

    def decode(self, z):
        """The mean of each p(x_m|z): M tensors of shape z.shape[:-1] + x_m's shape."""
        return [nets.mean(m, decode(z)) for m, decode in zip(self.modalities, self.decoders)]


MODEL = MEME


def options(flag):
    """The flags of this model: its constructor's keyword arguments, whose defaults they have."""
    flag("--samples", type=int, help="samples of z per example (K)")
    flag("--kl", choices=["closed", "sample"], help="KL in closed form, or of eq. (6)'s sample")
    flag("--classifier-scale", type=float, help="c, the factor on log q(t|s)")
    flag("--full-gradient", action="store_true", help="differentiate the weights w, too (eq. 7)")
    flag("--direction", metavar="NAME", help="train only L(s -> t), s being NAME")
    flag("--pseudo-samples", type=int, help="learnable inputs per modality (N)")
    flag("--explicit", choices=["mixture", "product"], help="p(z|t) of several modalities t")


# ----------------------------------------------------- the training loop, identical in five scripts

import argparse
import json
import os
import shlex
import sys
import time
from collections import Counter
from pathlib import Path

import data

# Where and how a run is computed: no part of its name, and --resume may change it
PLACE = {"data", "dataset", "device", "amp", "compile", "graph", "out", "resume"}
MAY_CHANGE = PLACE | {"epochs", "lr", "decay", "clip"}  # at --resume; the rest is the run's


def parse_args(argv=None, saved=None):
    """saved: the flags of a run to resume, which replace the defaults.
    -> the parser, the arguments"""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--dataset", default="glyphs")
    dataset = first.parse_known_args(argv)[0].dataset
    p = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        usage="%(prog)s [--dataset NAME] [--paired F] [options]",
        formatter_class=data.Help,
        allow_abbrev=False,
    )
    p.suggest_on_error = True  # Python 3.14 and newer
    flag, switch = p.add_argument, argparse.BooleanOptionalAction
    cuda = "cuda" if torch.cuda.is_available() else "cpu"
    flag("--dataset", default="glyphs", help=f"{', '.join(data.DATASETS)}, or a path.npz")
    flag("--data", default="./data", help="folder of the data sets")
    flag("--paired", type=float, default=1.0, help="fraction of examples with all modalities")
    flag("--unpaired", default="split", help="the others show: split, all, rest, none, or a NAME")
    flag("--sampling", default="natural", choices=data.SAMPLING, help="how a batch mixes streams")
    flag("--epochs", type=data.count, help="passes over the training examples")
    flag("--batch-size", type=data.count, help="examples per step, over all processes")
    flag("--lr", type=data.factor, help="learning rate of Adam")
    flag("--decay", type=data.factor, default=0.0, help="final share of epochs with a falling lr")
    flag("--clip", type=data.factor, default=0.0, help="maximum gradient norm; 0 disables clipping")
    flag("--latent-dim", type=data.count, help="dimensions of the latent variable z")
    flag("--likelihoods", type=data.names, help="p(x|z), one per modality: laplace,bernoulli")
    flag("--weights", type=data.factors, help="factors on log p(x|z), one per modality: 3.9,1")
    flag("--standardise", action=switch, default=True, help="scale the numbers of a path.npz")
    flag("--width", type=data.factor, default=1.0, help="factor on the layer sizes of spectra")
    flag("--seed", type=int, default=0, help="random seed")
    flag("--limit", type=data.count, help="train on the first LIMIT examples only")
    flag("--device", default=cuda, help="a torch device: cuda, cuda:1, mps, cpu")
    flag("--amp", action=switch, default=False, help="bfloat16 autocast")
    flag("--compile", action=switch, default=False, help="torch.compile (docs/robustness.md)")
    graph = "replay each step from a CUDA graph (one process; not yet tried on a GPU)"
    flag("--graph", action=switch, default=False, help=graph)
    flag("--out", help="folder of the run, by default runs/MODEL-DATASET-...")
    flag("--resume", metavar="RUN", nargs="?", const="", help="continue the run in its folder")
    options(p.add_argument_group(f"options of {MODEL.__name__}").add_argument)
    p.set_defaults(**MODEL.__init__.__kwdefaults__)  # the options have the constructor's defaults
    p.set_defaults(**DEFAULTS.get(dataset, DEFAULTS["npz"]))
    args = p.parse_args(argv)
    out = args.resume or args.out or os.path.join("runs", run_name(p, args))
    if saved:
        settings = vars(args).keys() & saved.keys() - {"device", "out", "resume"}
        p.set_defaults(**{key: saved[key] for key in settings})
        args = p.parse_args(argv)
        for key in settings - MAY_CHANGE:
            if getattr(args, key) != saved[key]:
                p.error(f"{out} has --{key.replace('_', '-')} {saved[key]}: --resume keeps it")
    args.out, args.data = out, os.path.abspath(args.data)
    if args.dataset.endswith(".npz"):
        args.dataset = os.path.abspath(args.dataset)
    return p, args


def run_name(p, args):
    """<model>-<dataset>-paired<f>-<unpaired>-seed<s> and every setting that is not the default."""
    parts = [Path(__file__).stem, Path(args.dataset).stem, f"paired{args.paired:g}", args.unpaired]
    parts.append(f"seed{args.seed}")
    for key, value in vars(args).items():
        if key not in PLACE | {"paired", "unpaired", "seed"} and value != p.get_default(key):
            flag = key.replace("_", "-")
            text = ",".join(map(str, value)) if isinstance(value, list) else value
            parts.append(f"no-{flag}" if value is False else f"{flag}={text}")
    return "-".join(parts)


def build(args, saved):
    """saved: args.json of a run to resume, or {}. -> dataset, streams, model, the new args.json;
    ValueError for a mistake of the user"""
    dataset = data.load(
        args.dataset,
        args.data,
        limit=args.limit,
        likelihoods=args.likelihoods,
        standardise=args.standardise,
        spec=saved.get("spec"),
    )
    streams = dataset.streams(args.paired, args.unpaired, args.seed)
    if args.epochs is None:
        args.epochs = data.default_epochs(streams, args.batch_size, args.sampling)

    spec = dataset.spec | {"weights": args.weights, "width": args.width}
    chosen = {key: getattr(args, key) for key in MODEL.__init__.__kwdefaults__}
    torch.manual_seed(args.seed)
    model = MODEL(nets.modalities(**spec), args.latent_dim, **chosen)
    model.start(dataset.train, streams)

    record = {"script": Path(__file__).stem, "model": MODEL.__name__}
    record |= {key: value for key, value in vars(args).items() if key not in chosen}
    record |= {"options": chosen, "spec": spec, "masked": dataset.mask is not None}
    record |= {"note": dataset.note, "examples": len(dataset.train), "digest": dataset.digest}
    if saved.get("model", MODEL.__name__) != MODEL.__name__:
        raise ValueError(f"{args.out} is a run of {saved['model']}, not of {MODEL.__name__}")
    for key in ("spec", "note", "examples", "digest"):
        if saved and saved[key] != record[key]:
            raise ValueError(f"{args.dataset} does not hold the data that {args.out} began with")
    return dataset, streams, model, record


def main(argv=None):
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    p, args = parse_args(argv)
    run, saved, state = Path(args.out), {}, {"epoch": 0, "log": []}
    try:  # a mistake of the user is one sentence and exit code 2, before anything is written
        device = data.find_device(args.device)
        if args.resume is not None:
            saved, state = data.read_run(run)
            p, args = parse_args(argv, saved | saved["options"])
        elif rank == 0 and (run / "checkpoint.pt").exists():
            raise ValueError(f"{run} holds a run: add --resume, or name another folder with --out")
        dataset, streams, model, record = build(args, saved)
        run.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        p.error(str(error))
    if state["epoch"] >= args.epochs:
        print(f"{run} is finished, with {state['epoch']} epochs; --epochs N goes on to N")
        return

    # distributed
    if world > 1 and device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    if device.type == "cuda" and device.index is not None:  # else the current one
        torch.cuda.set_device(device)
    if world > 1:
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")

    # optimizer
    train, net = dataset.train.to(device), model.to(device)
    graph = args.graph and can_capture(device) and world == 1 and not model.random_on_host
    lr = torch.tensor(args.lr, device=device) if graph else args.lr  # a graph reads it again
    optimizer = torch.optim.Adam(model.parameters(), lr, fused=True, capturable=graph)
    if saved:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        optimizer.param_groups[0] |= {"lr": lr, "capturable": graph}  # of this device
    if world > 1:  # a stream of one modality leaves the other decoders unused
        net = nn.parallel.DistributedDataParallel(net, find_unused_parameters=True)
    if args.compile:
        # without it mnist-split fails on CUDA: https://github.com/pytorch/pytorch/issues/171622
        net = torch.compile(net, options={"layout_optimization": False})
    if rank == 0:
        text = json.dumps(record, indent=1).encode()
        data.atomic_write(run / "args.json", lambda file: file.write(text))
        data.save_run(run, model, optimizer, state["epoch"], state["log"])
        size = sum(w.numel() for w in model.parameters())
        print(f"{run}: {size:,} weights, {len(train):,} examples", *dataset.lines, sep="\n")
        if dataset.note:
            print(f"note: {dataset.note}", flush=True)

    def step(batch):
        """One step of Adam. -> the loss, which stays on the device"""
        with torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
            loss = net(batch).sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if args.clip:
            nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        optimizer.step()
        return loss.detach()

    if graph:
        step = Graphs(step)

    # train
    sizes, steps = data.batch_sizes(streams, args.batch_size, args.sampling)
    one_pattern = data.one_pattern_per_step(streams, args.sampling)
    mask, index = streams[0]
    watched = data.select(train, mask, index[:256].to(device))  # for log p(x|z) in log.csv
    log, terminal, started = state["log"], sys.stdout.isatty(), time.perf_counter()
    first, all_steps = state["epoch"] + 1, (args.epochs - state["epoch"]) * steps
    for epoch in range(first, args.epochs + 1):
        seed = 1_000_003 * args.seed + epoch
        torch.manual_seed(4_099 * seed + rank)  # noise: different on every rank
        order = torch.Generator().manual_seed(seed)  # batches: the same on every rank
        model.start_epoch(epoch)
        if args.decay:  # the learning rate falls linearly, towards 0
            left = (args.epochs + 1 - epoch) / (args.decay * args.epochs)
            new = args.lr * min(1.0, left)
            optimizer.param_groups[0]["lr"] = lr.fill_(new) if graph else new
        losses, epoch_started, tick = 0.0, time.perf_counter(), time.perf_counter()
        batches = data.batches(train, streams, args.batch_size, args.sampling, order, rank, world)
        for k, batch in enumerate(batches, 1):
            losses += step(batch)
            now = time.perf_counter()
            if now > tick + 1 or k == steps:  # reads the losses: the only synchronisation
                total, tick = losses.item(), now
                check_finite(total, run, epoch, k)
                if rank == 0 and terminal:
                    done = (epoch - first) * steps + k
                    left = data.duration((now - started) / done * (all_steps - done))
                    print(f"\repoch {epoch}, step {k} of {steps}, {left} left".ljust(79), end="")
        if world > 1:  # the mean over ranks is the objective of the union of their batches
            total = torch.tensor(total, device=device)
            torch.distributed.all_reduce(total)
            total = total.item() / world
        if rank == 0:
            now = time.perf_counter()
            model.eval()
            with torch.no_grad():  # the last step may have spoilt the weights
                check_finite(model.objective(*watched).item(), run, epoch, steps)
            log_p = log_px_z(model, watched)
            model.train()
            row = {"epoch": epoch, "objective": -total / steps}
            row |= {f"log_p_{name}": nats for name, nats in log_p.items()}
            row["examples_per_second"] = sum(sizes) * steps / (now - epoch_started)
            log.append(row | {"seconds": now - epoch_started})
            data.save_run(run, model, optimizer, epoch, log)
            parts = [f"{name} {nats:.1f}" for name, nats in log_p.items()]
            left = (now - started) / (epoch - first + 1) * (args.epochs - epoch)
            # the objective of a few random patterns is not that of the next epoch's
            objective = "" if one_pattern else f"objective {row['objective']:.1f}, "
            line = f"{objective}log p: {', '.join(parts)}, {data.duration(left)} left"
            line = f"epoch {epoch}/{args.epochs}: {line}"
            print(("\r" if terminal else "") + line.ljust(79 if terminal else 0), flush=True)
    if rank == 0:
        data.save_examples(model, dataset, run / "examples.png")
        print(f"python eval.py {shlex.quote(str(run))}")
    if world > 1:
        torch.distributed.destroy_process_group()


class Graphs:
    """step(batch) -> loss, replayed from a CUDA graph for each kind of batch, that is the weights,
    masks and shapes of its streams; for the 32 kinds that are complete first. A graph keeps what it
    read when it was captured, but for tensors that change in place: the inputs, which are copied
    into its own, parameters, β and the learning rate."""

    def __init__(self, step):
        self.step, self.graphs, self.counts = step, {}, Counter()

    def __call__(self, batch):
        kind = tuple((w, *(None if x is None else x.shape for x in xs)) for w, xs in batch)
        self.counts[kind] += 1
        if kind not in self.graphs:
            # The first steps create Adam's state, which must not lie in the memory of a graph
            if self.counts[kind] <= 3 or len(self.graphs) == 32:
                return self.step(batch)
            inputs = [(w, [x if x is None else x.clone() for x in xs]) for w, xs in batch]
            self.graphs[kind] = inputs, *capture(self.step, inputs)
        inputs, replay, loss = self.graphs[kind]
        for (_, old), (_, new) in zip(inputs, batch):
            for x, y in zip(old, new):
                if x is not None:
                    x.copy_(y)
        replay()
        return loss.clone()  # the next replay overwrites it


def can_capture(device):
    return device.type == "cuda"


def capture(step, inputs):
    """Record step(inputs), without running it. -> replay(), and the loss that it writes"""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step(inputs)
    return graph.replay, loss


def check_finite(loss, run, epoch, step):
    """Stop the run, whose last checkpoint is kept, where the sum of losses is not finite."""
    if not math.isfinite(loss):
        print(f"\n{run}: the loss is not finite in epoch {epoch}, by step {step}", file=sys.stderr)
        command = f"--out {shlex.quote(str(run))} --resume"
        print(f"go on with {command} and a lower --lr, or a --clip", file=sys.stderr)
        sys.exit(2)


@torch.no_grad()
def log_px_z(model, xs):
    """The mean log p(x_m|z) of each modality, unweighted, at one z ~ q(z|xs), in nats.
    -> {modality: number}, NaN for a missing one"""
    z, log_p = model.posterior(*xs).sample(), {}
    for m, decode, x in zip(model.modalities, model.decoders, xs):
        missing = x is None
        log_p[m.name] = math.nan if missing else nets.log_prob(m, decode(z), x).mean().item()
    return log_p


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a terminal may lack a letter of a folder's name
    try:
        main()
    except KeyboardInterrupt:
        resume = [] if "--resume" in sys.argv else ["--resume"]
        command = shlex.join(["python", *sys.argv, *resume])
        print(f"\ninterrupted; to go on from the last whole epoch: {command}", file=sys.stderr)
        sys.exit(130)
    except OSError as error:  # a full disk, say; the last checkpoint is kept
        print(f"\n{error}", file=sys.stderr)
        sys.exit(2)
