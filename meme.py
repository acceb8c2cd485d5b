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


def soft_cap_logvar(mu, logvar):
    """Above a scale of 10 the variance grows linearly in logvar, not exponentially. Nothing in MEME
    fixes the scale of z, so one wide posterior can blow up the KL."""
    return mu, logvar.clamp(max=LOGVAR_10) + F.relu(logvar - LOGVAR_10).log1p()


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
    """samples: K; kl: "sample", as in eq. (6), or "closed", outside w, which a mixture p(z|t) does
    not have; classifier_scale: c, the factor on log q(t|s); full_gradient: also through w (with
    kl="sample" all of eq. (7)); direction: the modality s of the only direction to train, which
    every example must show; pseudo_samples: N; explicit: p(z|t) where t is several modalities
    (App. E), the "mixture" or the "product" of their encoders."""

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
        if explicit == "product" and len(modalities) == 2:
            raise ValueError("explicit=product needs three modalities: of two, t is a single one")
        self.modalities, self.latent_dim, self.samples = modalities, latent_dim, samples
        self.kl, self.explicit, self.pseudo_samples = kl, explicit, pseudo_samples
        self.classifier_scale, self.full_gradient = classifier_scale, full_gradient
        self.direction = None if direction is None else names.index(direction)
        # Each network plays two roles: q(z|x_m) and p(z|x_m); p(x_m|z) and q(x_m|z)
        self.encoders = nn.ModuleList(m.encoder(latent_dim) for m in modalities)
        self.decoders = nn.ModuleList(m.decoder(latent_dim) for m in modalities)
        self.pseudo = nn.ParameterList()  # u_1..N of each modality, of x's shape; words as logits
        for m, decode in zip(modalities, self.decoders):
            shape = m.shape
            if m.likelihood == "categorical":  # a logit for each word or class
                shape = decode(torch.zeros(1, latent_dim)).shape[1:]
            u = torch.rand(pseudo_samples, *shape)
            if m.likelihood == "categorical":
                u = CERTAIN * F.one_hot(u.argmax(-1), u.shape[-1]).float()
            self.pseudo.append(nn.Parameter(u))

    @torch.no_grad()
    def init_pseudo_samples(self, examples):
        """Copy observed examples, one tensor per modality, over the first pseudo-samples; a word or
        class becomes logits."""
        for m, u, x in zip(self.modalities, self.pseudo, examples):
            if m.likelihood == "categorical":
                x = CERTAIN * F.one_hot(x, u.shape[-1]).float()
            u[: len(x)] = x[: len(u)]

    def encode(self, xs):
        """q(z|x_m), also p(z|x_m), of each modality. -> M times (mu, logvar), or None if missing"""
        each = zip(self.encoders, xs, strict=True)
        return [None if x is None else soft_cap_logvar(*encode(x)) for encode, x in each]

    def pseudo_prior(self, s=None):
        """p(z|u_i), the components of eq. (4)'s prior, for the u of all modalities but s.
        -> mu, logvar, each (n N, L) with n such modalities"""
        others = [m for m in range(len(self.modalities)) if m != s]
        gaussians = [
            soft_cap_logvar(*self.encoders[m](self.pseudo[m], running=True)) for m in others
        ]
        return [torch.cat(parameters) for parameters in zip(*gaussians)]

    def log_p(self, m, z, x):
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
        """L(s -> t), t being all other observed modalities. -> (B,), nats"""
        t = [m for m, x in enumerate(xs) if x is not None and m != s]
        mu, logvar = gaussians[s]
        eps = torch.randn(self.samples, *mu.shape, device=mu.device)  # (K, B, L)
        z = mu + torch.exp(0.5 * logvar) * eps  # ~ q(z|s)
        log_p_s = self.log_p(s, z[0], xs[s])  # (B,)
        log_q_t = sum(self.log_p(m, z, xs[m]) for m in t)  # (K, B)
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
        return self.log_p(s, z, x) + log_p_z - log_normal(z, mu, logvar)

    def objective(self, *xs):
        """The objective of examples of one pattern, to be maximised: mean over the batch, nats, scalar."""
        gaussians = self.encode(xs)
        seen = [m for m, x in enumerate(xs) if x is not None]
        if len(seen) == 1:
            s = seen[0]
            return self.marginal_bound(s, xs[s], *gaussians[s]).mean()
        starts = seen if self.direction is None else [self.direction]
        bounds = [self.bound(s, xs, gaussians) for s in starts]
        return torch.stack(bounds).mean()  # Eq. (2); eq. (11) for M = 3

    def forward(self, streams):
        """The loss of each stream (weight, xs): -weight * objective. -> (S,)"""
        return torch.stack([-weight * self.objective(*xs) for weight, xs in streams])

    def check_streams(self, masks):
        """ValueError where the only direction, s -> t, meets examples without s."""
        if self.direction is not None and not all(mask[self.direction] for mask in masks):
            name = self.modalities[self.direction].name
            raise ValueError(f"direction {name} needs {name} in every example")

    def trained_priors(self, masks):
        """The names of the modalities whose own prior, eq. (4), streams with these masks train:
        those that some stream shows alone."""
        alone = [mask.index(True) for mask in map(list, masks) if sum(mask) == 1]
        return tuple(m.name for k, m in enumerate(self.modalities) if k in alone)

    def posterior(self, *xs):
        """q(z|observed): the encoder of one modality; of several their mixture or product. Batch
        (B,), event (L,)."""
        seen = [gaussian for gaussian in self.encode(xs) if gaussian is not None]
        mu, logvar = self.conditional_prior(seen)  # (n, B, L)
        if len(mu) == 1:
            return normal(mu[0], logvar[0])
        return mixture(*(parameter.transpose(0, 1).contiguous() for parameter in (mu, logvar)))

    @torch.no_grad()
    def resample(self, *xs, samples=1, candidates=100):
        """App. A's q(z|s,t) = q(z|s) q(t|z) / q(t|s), for several observed modalities: draws
        `candidates` samples z ~ q(z|s) and resamples them with weights q(t|z); each modality takes
        the role of s in turn, the first one at random. -> (samples, B, L)"""
        seen = [m for m, x in enumerate(xs) if x is not None]
        if len(seen) == 1:
            return self.posterior(*xs).sample((samples,))
        gaussians, draws = self.encode(xs), [None] * samples
        first = int(torch.randint(len(seen), ()))
        for turn, s in enumerate([*seen[first:], *seen[:first]][:samples]):
            t = [m for m in seen if m != s]
            z = normal(*gaussians[s]).sample((candidates,))  # (candidates, B, L)
            parts = [sum(self.log_p(m, part, xs[m]) for m in t) for part in z.split(10)]
            log_q_t = torch.cat(parts)  # (candidates, B)
            count = len(range(turn, samples, len(seen)))
            k = Categorical(logits=log_q_t.T).sample((count,))  # (count, B)
            draws[turn :: len(seen)] = z[k, torch.arange(z.shape[1], device=z.device)]
        return torch.stack(draws)

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
    """The flags of this model: the keyword arguments of its constructor, which have the defaults."""
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
import sys
import time
from pathlib import Path

import data

# --resume may change these; every other setting is the run's
FREE = {"epochs", "lr", "decay", "clip", "device", "amp", "compile", "dataset", "data"}
FREE |= {"out", "resume"}

LEAST_EPOCHS, LEAST_STEPS = 100, 1500  # of a path.npz, where --epochs is not given


def parse_args(argv=None, saved=None):
    """saved: args.json of a run to resume, whose settings replace the defaults.
    -> the parser, the arguments"""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--dataset", default="glyphs")
    dataset = first.parse_known_args(argv)[0].dataset
    p = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        usage="%(prog)s [--dataset NAME] [--paired F] [options]",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
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
    flag("--epochs", type=int, help="passes over the training examples (of a path.npz: see README)")
    flag("--batch-size", type=int, help="examples per step, over all processes")
    flag("--lr", type=float, help="learning rate of Adam")
    flag("--decay", type=float, default=0.0, help="share of epochs, at the end, with a falling lr")
    flag("--clip", type=float, help="maximum gradient norm; 0 disables clipping")
    flag("--latent-dim", type=int, help="dimensions of the latent variable z")
    flag("--likelihoods", help="p(x|z), one per modality, as in laplace,bernoulli")
    flag("--weights", help="factors on log p(x|z) in training, one per modality, as in 3.9,1")
    flag("--standardise", action=switch, default=True, help="scale the numbers of a path.npz")
    flag("--width", type=float, default=1.0, help="factor on the layer sizes of spectra")
    flag("--seed", type=int, default=0, help="random seed")
    flag("--limit", type=int, help="train on the first LIMIT examples only")
    flag("--device", default=cuda, help="a torch device: cuda, cuda:1, mps, cpu")
    flag("--amp", action=switch, default=False, help="bfloat16 autocast")
    flag("--compile", action=switch, default=False, help="torch.compile (docs/robustness.md)")
    flag("--out", help="folder of the run, by default runs/MODEL-DATASET-...")
    flag("--resume", action="store_true", help="continue the run in its folder")
    options(p.add_argument_group(f"options of {MODEL.__name__}").add_argument)
    p.set_defaults(**MODEL.__init__.__kwdefaults__)
    p.set_defaults(**DEFAULTS.get(dataset, DEFAULTS["npz"]))
    args = p.parse_args(argv)
    for key in ("epochs", "batch_size", "lr", "latent_dim", "width", "limit"):
        value = getattr(args, key)
        if value is not None and not 0 < value < math.inf:
            p.error(f"--{key.replace('_', '-')} must be above 0, not {value}")
    if args.clip is not None and args.clip < 0:
        p.error(f"--clip must not be negative, not {args.clip}")
    if not 0 <= args.decay <= 1:
        p.error(f"--decay must be from 0 to 1, not {args.decay}")
    out = args.out or os.path.join("runs", run_name(p, args))
    if saved:
        kept = saved.keys() - {"device", "out", "resume"}
        p.set_defaults(**{key: saved[key] for key in vars(args).keys() & kept})
        args = p.parse_args(argv)
        for key in vars(args).keys() & saved.keys() - FREE:
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
    elsewhere = {"dataset", "paired", "unpaired", "seed", "data", "device", "amp", "compile"}
    for key, value in vars(args).items():
        if key not in elsewhere | {"out", "resume"} and value != p.get_default(key):
            flag = key.replace("_", "-")
            parts.append(f"no-{flag}" if value is False else f"{flag}={value}")
    return "-".join(parts)


def build(args, saved):
    """saved: args.json of a run to resume, or {}. -> dataset, streams, model, the new args.json;
    ValueError for a mistake of the user"""
    try:
        torch.zeros(1, device=args.device)
    except (RuntimeError, AssertionError):  # torch was built without it, or it is not there
        raise ValueError(f"--device {args.device} is not available here") from None

    # data
    stats = None if args.standardise else {}
    if saved:  # those the run began with: on another machine the last digit may differ
        arrays = saved["spec"].get("arrays", {})
        stats = {name: array.get("stats", {}) for name, array in arrays.items()}
    likelihoods = args.likelihoods and args.likelihoods.split(",")
    dataset = data.load(args.dataset, args.data, args.limit, likelihoods, stats)
    streams = data.pairing(
        len(dataset.train),
        dataset.names,
        args.paired,
        args.unpaired,
        seed=args.seed,
        mask=dataset.mask,
        groups=dataset.groups,
    )

    if args.epochs is None:  # a path.npz: small tables need more passes
        _, steps = data.batch_sizes(streams, args.batch_size, args.sampling)
        args.epochs = max(LEAST_EPOCHS, -(-LEAST_STEPS // steps))

    # model
    spec = dataset.spec | {"width": args.width}
    if args.weights:
        spec["weights"] = args.weights.split(",")
    own = {key: getattr(args, key) for key in MODEL.__init__.__kwdefaults__}
    torch.manual_seed(args.seed)
    model = MODEL(nets.modalities(**spec), args.latent_dim, **own)
    if hasattr(model, "check_streams"):
        model.check_streams([mask for mask, _ in streams])

    record = {"version": 1, "script": Path(__file__).stem, "model": MODEL.__name__} | vars(args)
    record |= {"options": own, "spec": spec, "note": dataset.note, "examples": len(dataset.train)}
    record["digest"] = dataset.digest
    if saved.get("model", MODEL.__name__) != MODEL.__name__:
        raise ValueError(f"{args.out} is a run of {saved['model']}, not of {MODEL.__name__}")
    for key in ("note", "examples", "digest" if dataset.digest else "spec"):
        if saved.get(key, record[key]) != record[key]:
            raise ValueError(f"{args.dataset} does not hold the data that {args.out} began with")
    return dataset, streams, model, record


def main(argv=None):
    p, args = parse_args(argv)
    run, saved, state = Path(args.out), {}, {"epoch": 0, "log": []}
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    try:  # a mistake of the user is one sentence and exit code 2, before anything is written
        if args.resume:
            saved, state = data.read_run(run)
            p, args = parse_args(argv, saved)
        elif rank == 0 and (run / "checkpoint.pt").exists():
            raise ValueError(f"{run} holds a run: add --resume, or name another folder with --out")
        dataset, streams, model, record = build(args, saved)
        run.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        p.error(str(error))

    # distributed
    device = torch.device(args.device)
    if world > 1 and device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    if device.type == "cuda" and device.index is not None:  # else the current one
        torch.cuda.set_device(device)
    if world > 1:
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")

    # optimizer
    train, net = dataset.train.to(device), model.to(device)
    optimizer = torch.optim.Adam(model.parameters(), args.lr, fused=True)
    if saved:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        optimizer.param_groups[0]["lr"] = args.lr
    elif hasattr(model, "init_pseudo_samples"):
        model.init_pseudo_samples(data.observed(train, streams, model.pseudo_samples))
    if world > 1:  # a stream of one modality leaves the other decoders unused
        net = nn.parallel.DistributedDataParallel(net, find_unused_parameters=True)
    if args.compile:
        net = torch.compile(net)
    if rank == 0:
        save(run, record, model, optimizer, state["epoch"], state["log"])
        size = sum(w.numel() for w in model.parameters())
        print(f"{run}  {size:,} weights  {len(train):,} examples  {dataset.note}", flush=True)
        for line in data.describe(dataset.spec):
            print(line, flush=True)

    # train
    sizes, steps = data.batch_sizes(streams, args.batch_size, args.sampling)
    mask, index = streams[0]
    sample = data.select(train, mask, index[:256].to(device))  # for log p(x|z) in log.csv
    first, log, started = state["epoch"] + 1, state["log"], time.perf_counter()
    for epoch in range(first, args.epochs + 1):
        seed = 1_000_003 * args.seed + epoch
        torch.manual_seed(4_099 * seed + rank)  # noise: different on every rank
        order = torch.Generator().manual_seed(seed)  # batches: the same on every rank
        if hasattr(model, "start_epoch"):
            model.start_epoch(epoch)
        if args.decay:  # the learning rate falls linearly, towards 0
            left = (args.epochs + 1 - epoch) / (args.decay * args.epochs)
            optimizer.param_groups[0]["lr"] = args.lr * min(1.0, left)
        losses, total, epoch_started, tick = [], 0.0, time.perf_counter(), 0.0
        batches = data.batches(train, streams, args.batch_size, args.sampling, order, rank, world)
        for step, batch in enumerate(batches, 1):
            with torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
                loss = net(batch)  # (S,)
            optimizer.zero_grad(set_to_none=True)
            loss.sum().backward()
            if args.clip:
                nn.utils.clip_grad_norm_(model.parameters(), args.clip)
            optimizer.step()

            losses.append(loss.detach())
            now = time.perf_counter()
            if now > tick + 1 or step == steps:  # reads the losses: the only synchronisation
                for at, values in enumerate(losses, step + 1 - len(losses)):
                    for value in values.tolist():
                        total += value
                    check_finite(total, run, epoch, at)
                losses, tick = [], now
                if rank == 0 and sys.stdout.isatty():
                    left = (now - epoch_started) / step * (steps - step)
                    print(f"\repoch {epoch}, step {step} of {steps}, {left:.0f} s left", end=" ")
        if world > 1:  # the mean over ranks is the objective of the union of their batches
            total = torch.tensor(total, device=device)
            torch.distributed.all_reduce(total)
            total = total.item() / world
        if rank == 0:
            now = time.perf_counter()
            objective, log_px = log_px_z(model, sample)
            check_finite(objective, run, epoch, steps)  # also after the last step
            row = {"objective": -total / steps} | log_px
            pace = sum(sizes) * steps / (now - epoch_started)
            seconds = {"examples_per_second": pace, "seconds": now - epoch_started}
            log.append({"epoch": epoch} | row | seconds)
            save(run, record, model, optimizer, epoch, log)
            minutes = (now - started) / (epoch - first + 1) * (args.epochs - epoch) / 60
            numbers = "  ".join(f"{key} {value:.2f}" for key, value in row.items())
            line = f"{numbers}  {pace:.0f} examples/s  {minutes:.1f} minutes left"
            print(f"\repoch {epoch} of {args.epochs}  {line}", flush=True)
    if rank == 0:
        save_examples(model, dataset, run / "examples.png")
        print(f"python eval.py {run}")
    if world > 1:
        torch.distributed.destroy_process_group()


def save(run, record, model, optimizer, epoch, log):
    """args.json; checkpoint.pt, tensors and numbers only, which torch.load reads with
    weights_only=True; log.csv, a row per epoch."""
    text = json.dumps(record, indent=1).encode()
    data.atomic_write(run / "args.json", lambda file: file.write(text))
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    state |= {"epoch": epoch, "log": log}
    data.atomic_write(run / "checkpoint.pt", lambda file: torch.save(state, file))
    data.write_csv(run / "log.csv", log)


def check_finite(loss, run, epoch, step):
    """Stop the run, whose last checkpoint is kept, where a loss is not finite."""
    if not math.isfinite(loss):
        print(f"\n{run}: the loss is {loss} in epoch {epoch}, step {step}", file=sys.stderr)
        print(f"go on with --out {run} --resume and a lower --lr, or a --clip", file=sys.stderr)
        sys.exit(2)


@torch.no_grad()
def log_px_z(model, xs):
    """The objective of some examples, and the mean log p(x_m|z) of each modality, unweighted, at
    one z ~ q(z|xs), in nats. -> objective, {"log_p_NAME": number}; NaN for a missing modality"""
    model.eval()
    objective, log_px = model.objective(*xs).item(), {}
    if not math.isfinite(objective):  # such a posterior may have no samples
        return objective, log_px
    z = model.posterior(*xs).sample()
    for m, decode, x in zip(model.modalities, model.decoders, xs):
        log_p = math.nan if x is None else nets.log_prob(m, decode(z), x).mean().item()
        log_px[f"log_p_{m.name}"] = log_p
    model.train()
    return objective, log_px


@torch.no_grad()
def save_examples(model, dataset, path, n=10):
    """A PNG with a column for each of n test examples, one per label where there are as few labels.
    Rows: the images of each modality and what one z of that modality alone generates."""
    model.eval()
    test, names = dataset.test, dataset.names
    index = torch.linspace(0, len(test) - 1, min(n, len(test))).long()
    if test.labels is not None and len(labels := test.labels.unique()) <= n:
        index = torch.stack([(test.labels == label).nonzero()[0, 0] for label in labels])
    device, rows = next(model.parameters()).device, {}
    xs = [x.to(device) for x in test[index]]
    for m, x in enumerate(xs):
        alone = [x if k == m else None for k in range(len(xs))]
        means = model.decode(model.posterior(*alone).sample())
        rows[names[m]] = x
        rows |= {f"{names[m]} -> {name}": mean for name, mean in zip(names, means)}
    rows = {name: x for name, x in rows.items() if data.is_image(x)}
    if rows and data.save_grid(list(rows.values())[:12], path):
        print(f"{path} has rows of test examples: {', '.join(list(rows)[:12])}")


if __name__ == "__main__":
    main()
