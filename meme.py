"""MEME: each modality is the conditional prior of the other (Joy et al., ICLR 2022).

    p(s, z, t)  = p(s|z) p(z|t) p(t)                            generative model, and its mirror
    q(z|s, t)   = q(z|s) q(t|z) / q(t|s)                        posterior, by Bayes' rule
    L(s -> t)   = E_q(z|s)[ w log p(s|z) p(z|t) / q(z|s) q(t|z) ] + log q(t|s),
                  w = q(t|z) / q(t|s),  q(t|s) = E_q(z|s) q(t|z)                          Eq. (6)
    L(s, t)     = ½ [ L(s -> t) + L(t -> s) ]                                             Eq. (2)
    L(s)        = E_q(z|s)[ log p(s|z) - log q(z|s) + log 1/N Σ_i p(z|u_i) ]              Eq. (4)

The encoder of t is the prior p(z|t), the decoder of t is q(t|z) (App. C); u_i are learnable inputs
that stand in for a missing t. Log p(t), a constant, is left out. The defaults are no bound: a KL in
closed form, outside w, and c = 10 on log q(t|s); the reasons stand beside them.
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
    "npz": dict(epochs=100, batch_size=128, lr=1e-3, latent_dim=20),
}

LOGVAR_10 = 2 * math.log(10)  # a scale of 10


def slowed(mu, logvar):
    """Above a scale of 10 the variance grows linearly, as the softplus of MEME's authors lets
    scales: z is anchored nowhere, and with exp(logvar) one wide posterior's KL can wreck a run."""
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
    """samples: K; kl: "closed", outside w, or "sample", as in eq. (6); classifier_scale: c, on
    log q(t|s); full_gradient: also through w (with "sample" all of eq. (7)); direction: the
    modality s, shown by every example, of the one direction to train, instead of all;
    pseudo_samples: N; explicit: "mixture" or "product" of encoders, as p(z|t) when t is several
    modalities (App. E)."""

    def __init__(
        self,
        modalities,
        latent_dim,
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
            raise ValueError(f"direction is one of {', '.join(names)}, not {direction!r}")
        if not 0 < samples < 2**31 or not 0 < pseudo_samples < 2**31:
            raise ValueError("samples and pseudo_samples are integers from 1 on")
        if not math.isfinite(classifier_scale):
            raise ValueError(f"classifier_scale is a finite number, not {classifier_scale}")
        if kl not in ("closed", "sample") or explicit not in ("mixture", "product"):
            raise ValueError("kl is closed or sample, explicit is mixture or product")
        if explicit == "product" and len(modalities) == 2:
            raise ValueError("explicit = product is for three modalities or more: of two, t is one")
        self.modalities, self.latent_dim, self.samples = modalities, latent_dim, samples
        self.kl, self.explicit = kl, explicit
        self.classifier_scale, self.full_gradient = classifier_scale, full_gradient
        self.only = None if direction is None else names.index(direction)
        # each is two things: q(z|x_m) and p(z|x_m); p(x_m|z) and q(x_m|z)
        self.encoders = nn.ModuleList(m.encoder(latent_dim) for m in modalities)
        self.decoders = nn.ModuleList(m.decoder(latent_dim) for m in modalities)
        self.pseudo = nn.ParameterList()  # u_1..N of each modality, of x's shape; words as logits
        for m, decode in zip(modalities, self.decoders):
            u = torch.rand(pseudo_samples, *decode(torch.zeros(1, latent_dim)).shape[1:])
            if m.likelihood == "categorical":
                u = 8 * F.one_hot(u.argmax(-1), u.shape[-1]).float()
            self.pseudo.append(nn.Parameter(u))

    @torch.no_grad()
    def start_pseudo(self, examples):
        """Copy observed examples, one tensor per modality, over the first pseudo-samples; a word
        becomes logits, 8 for itself."""
        for m, u, x in zip(self.modalities, self.pseudo, examples):
            if m.likelihood == "categorical":
                x = 8 * F.one_hot(x, u.shape[-1]).float()
            u[: len(x)] = x[: len(u)]

    def encode(self, xs):
        """q(z|x_m), which is p(z|x_m) too, for each observed modality. -> M times mu, logvar"""
        each = zip(self.encoders, xs, strict=True)
        return [None if x is None else slowed(*encode(x)) for encode, x in each]

    def pseudo_prior(self, s=None):
        """The components of eq. (4)'s prior, p(z|u_i), for the u of all modalities but s.
        -> mu, logvar, each (n N, L) for n such modalities"""
        others = [m for m in range(len(self.modalities)) if m != s]
        gaussians = [slowed(*self.encoders[m](self.pseudo[m], running=True)) for m in others]
        return [torch.cat(parameters) for parameters in zip(*gaussians)]

    def log_p(self, m, z, x):
        """log p(x_m|z), times the likelihood's weight. z (..., B, L) -> (..., B)"""
        modality = self.modalities[m]
        return modality.weight * nets.log_prob(modality, self.decoders[m](z), x)

    def weigh(self, log_q_t):
        """log q(t|s) and w, the weight of z_1, from log q(t|z_k), (K, B). -> (B,), (B,)"""
        # z_1 has to be in this sum (App. D): else w is unbounded, and training silently collapses
        log_q_t_given_s = log_q_t.logsumexp(0) - math.log(len(log_q_t))  # Eq. (8), with its 1/K
        w = torch.exp(log_q_t[0] - log_q_t_given_s)  # Eq. (10): in (0, K], its mean is 1
        # App. B: the gradient of w, the first term of eq. (7), is mostly noise
        return log_q_t_given_s, w if self.full_gradient else w.detach()

    def bound(self, s, xs, gaussians):
        """L(s -> t), t being all other observed modalities. -> (B,), nats"""
        t = [m for m, x in enumerate(xs) if x is not None and m != s]
        mu, logvar = gaussians[s]
        eps = torch.randn(self.samples, *mu.shape, device=mu.device)  # (K, B, L)
        z = mu + torch.exp(0.5 * logvar) * eps  # ~ q(z|s)
        log_p_s = self.log_p(s, z[0], xs[s])  # (B,)
        log_q_t = sum(self.log_p(m, z, xs[m]) for m in t)  # (K, B)
        log_q_t_given_s, w = self.weigh(log_q_t)
        prior_mu, prior_logvar = self.conditional_prior([gaussians[m] for m in t])  # (n, B, L)
        # c = 10: with 1, w detached, the expected gradient of s -> t reconstruction is zero
        if self.kl == "closed" and len(prior_mu) == 1:  # Eq. (6), its KL outside w: less noise
            kl = kl_normal(mu, logvar, prior_mu[0], prior_logvar[0])
            return w * (log_p_s - log_q_t[0]) - kl + self.classifier_scale * log_q_t_given_s
        log_p_z = log_normal(z[0], prior_mu, prior_logvar).logsumexp(0) - math.log(len(prior_mu))
        log_q_z = log_normal(z[0], mu, logvar)
        ratio = log_p_s + log_p_z - log_q_z - log_q_t[0]
        return w * ratio + self.classifier_scale * log_q_t_given_s  # Eq. (6), where c is 1

    def conditional_prior(self, gaussians):
        """p(z|t): the components of a mixture of t's encoders, or their product alone (App. E)."""
        mu, logvar = (torch.stack(parameters) for parameters in zip(*gaussians))  # (n, B, L)
        if self.explicit == "mixture" or len(mu) == 1:
            return mu, logvar
        precision = torch.exp(-logvar)
        total = precision.sum(0, keepdim=True)
        return (precision * mu).sum(0, keepdim=True) / total, -total.log()  # (1, B, L)

    def marginal_bound(self, s, x, mu, logvar):
        """L(s), eq. (4): t is missing, p(z) is the mixture over its pseudo-samples.
        -> (B,), nats"""
        z = mu + torch.exp(0.5 * logvar) * torch.randn_like(mu)
        prior_mu, prior_logvar = self.pseudo_prior(s)
        log_p_z_u = log_normal(z[:, None], prior_mu, prior_logvar)  # (B, N)
        log_p_z = log_p_z_u.logsumexp(1) - math.log(len(prior_mu))
        return self.log_p(s, z, x) + log_p_z - log_normal(z, mu, logvar)

    def objective(self, *xs):
        """What is maximised for examples of one pattern: the mean over the batch, nats, scalar."""
        gaussians = self.encode(xs)
        seen = [m for m, x in enumerate(xs) if x is not None]
        if len(seen) == 1:
            s = seen[0]
            return self.marginal_bound(s, xs[s], *gaussians[s]).mean()
        starts = seen if self.only is None else [self.only]
        bounds = [self.bound(s, xs, gaussians) for s in starts]
        return torch.stack(bounds).mean()  # Eq. (2); eq. (11) for M = 3

    def forward(self, streams):
        """The loss of each stream (weight, xs): -weight * objective. -> (S,)"""
        return torch.stack([-weight * self.objective(*xs) for weight, xs in streams])

    def refuse_untrained(self, masks):
        """A single direction s -> t trains nothing on examples without s."""
        if self.only is not None and not all(mask[self.only] for mask in masks):
            name = self.modalities[self.only].name
            raise ValueError(f"direction {name} needs {name} shown in every example")

    def posterior(self, *xs):
        """q(z|observed), which is p(z|observed) too: that encoder, or of several their mixture or
        product. Batch (B,), event (L,)."""
        seen = [gaussian for gaussian in self.encode(xs) if gaussian is not None]
        mu, logvar = self.conditional_prior(seen)  # (n, B, L)
        if len(mu) == 1:
            return normal(mu[0], logvar[0])
        return mixture(*(parameter.transpose(0, 1).contiguous() for parameter in (mu, logvar)))

    def prior(self, s=None):
        """p(z): the mixture over all pseudo-samples, our choice; with s: eq. (4)'s prior of
        examples that show s alone."""
        return mixture(*self.pseudo_prior(s))

    def decode(self, z):
        """The mean of each p(x_m|z): M tensors, z.shape[:-1] + x_m's shape."""
        return [nets.mean(m, decode(z)) for m, decode in zip(self.modalities, self.decoders)]

    @torch.no_grad()
    def log_likelihood(self, *xs, samples=1000, given=None):
        """log p(observed), or log p(observed|given) with given's posterior as the prior: importance
        sampling from the posterior of all; without weights. Memory grows with samples x B.
        -> (B,)"""
        seen = [m for m, x in enumerate(xs) if x is not None]
        if given is None:
            q, p = self.posterior(*xs), self.prior(seen[0] if len(seen) == 1 else None)
        else:
            known = [g if x is None else x for x, g in zip(xs, given)]
            q, p = self.posterior(*known), self.posterior(*given)
        z = q.sample((samples,))  # (K, B, L)
        log_p = [nets.log_prob(self.modalities[m], self.decoders[m](z), xs[m]) for m in seen]
        log_w = sum(log_p) + p.log_prob(z) - q.log_prob(z)
        return log_w.logsumexp(0) - math.log(samples)


MODEL = MEME


def options(flag):
    """The flags of this model: its constructor's keyword arguments."""
    flag("--samples", type=int, default=10, help="samples of z per example (K)")
    flag("--kl", default="closed", help="KL terms: closed, a formula, or sample, at one z, eq. (6)")
    flag("--classifier-scale", type=float, default=10.0, help="weight of predicting the others")
    flag("--full-gradient", action="store_true", help="train through the weights, eq. (10), too")
    flag("--direction", metavar="NAME", help="train to generate the others from NAME only")
    flag("--pseudo-samples", type=int, default=128, help="learned inputs in a missing one's place")
    flag("--explicit", default="mixture", help="p(z|several): mixture or product of their encoders")


# ----------------------------------------------------------- the loop: one text in all five scripts

import argparse
import os
import signal
import sys
import time
from pathlib import Path

import data

FREE = set("epochs lr clip device amp compile data out resume options".split())  # free on --resume
NAMED = "limit epochs batch_size lr clip latent_dim likelihoods weights width sampling standardise"


def parser(argv):
    """-> a parser whose defaults are those of argv's data set, the names of the common flags"""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--dataset", default="glyphs")
    chosen = first.parse_known_args(argv)[0].dataset
    p = data.Parser(__doc__.splitlines()[0], "[--dataset NAME] [--paired F] [options]", data.TERMS)
    flag, switch, count = p.add_argument, argparse.BooleanOptionalAction, data.at_least(1)
    flag("--dataset", default="glyphs", help=", ".join(data.DATASETS) + " or a path.npz")
    flag("--data", default="./data", help="folder of the data sets")
    flag("--paired", type=float, default=1.0, help="fraction of examples that show all modalities")
    flag("--unpaired", default="split", help="what the others show: see below")
    flag("--sampling", default="natural", choices=data.SAMPLING, help="of a batch, see below")
    flag("--epochs", type=count, help="passes over the training examples")
    flag("--batch-size", type=count, help="examples in a step, of all processes")
    flag("--lr", type=data.positive, help="learning rate of Adam")
    flag("--clip", type=data.norm, help="largest norm of a step's gradient; 0: any")
    flag("--latent-dim", type=count, help="dimensions of the latent variable z")
    flag("--likelihoods", help="p(x|z), one per modality, as in laplace,bernoulli: see below")
    flag("--weights", help="factors on log p(x|z) in training, one per modality, as in 3.9,1")
    flag("--standardise", action=switch, default=True, help="scale a path.npz's floats: see below")
    flag("--width", type=data.positive, default=1.0, help="of spectra: factor on the layers' sizes")
    flag("--seed", type=data.at_least(0), default=0, help="of pairs, weights, order and noise")
    flag("--limit", type=count, help="use the first LIMIT training examples only")
    usual = "cuda" if torch.cuda.is_available() else "cpu"
    flag("--device", default=usual, choices=["cuda", "cpu"], help="where to train")
    flag("--amp", action=switch, default=False, help="networks in bfloat16, faster on a GPU")
    flag("--compile", action=switch, default=False, help="torch.compile: a slow start, then faster")
    flag("--out", help="folder of the run, instead of runs/<model>-<dataset>-...")
    flag("--resume", action="store_true", help="continue the run in its folder")
    common = set(vars(p.parse_args([])))
    options(p.add_argument_group(f"options of {MODEL.__name__}").add_argument)
    p.set_defaults(**DEFAULTS.get(chosen, DEFAULTS["npz"]))
    return p, common


def run_folder(p, args, common):
    """Named after the model's own options, the data set, the pairing, the seed and what is NAMED
    and not as usual."""
    flags = {k: v for k, v in vars(args).items() if v != p.get_default(k)}
    flags = {k: f"no-{k}" if v is False else f"{k}={v}".replace("_", "-") for k, v in flags.items()}
    name = [Path(__file__).stem, *(text for k, text in flags.items() if k not in common)]
    pairs = ["masked"] if data.masked(args.dataset) else [f"paired{args.paired:g}", args.unpaired]
    name += [Path(args.dataset).stem, *pairs, f"seed{args.seed}"]
    name += [flags[k] for k in NAMED.split() if k in flags]
    return Path(args.out or Path("runs", "-".join(name)))


def build(p, args, common, world, saved):
    """-> dataset, streams, model, args.json. ValueError for what a user got wrong."""
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("this PyTorch finds no CUDA device: use --device cpu")
    here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
    if args.device == "cuda" and here > gpus:
        raise ValueError(f"{here} processes, but {gpus} CUDA devices: start {gpus} processes")
    if args.batch_size < world:
        raise ValueError(f"--batch-size {args.batch_size} is too small for {world} processes")
    given = {k: getattr(args, k).split(",") for k in ("likelihoods", "weights") if getattr(args, k)}
    known = saved.get("spec", {})  # a run goes on as it began, on any machine
    kinds = known.get("likelihoods", given.get("likelihoods"))
    constants = known.get("standardise") if args.standardise else {}
    dataset = data.load(args.dataset, args.data, args.limit, kinds, constants)
    asked = args.paired, args.unpaired
    if dataset.mask is not None and asked != (p.get_default("paired"), p.get_default("unpaired")):
        raise ValueError(f"{args.dataset} has a train_mask: leave out --paired and --unpaired")
    fixed = args.seed, dataset.mask, dataset.groups
    streams = data.pairing(len(dataset.train), dataset.names, *asked, *fixed)
    spec = dataset.spec | {"width": args.width} | given
    own = {key: value for key, value in vars(args).items() if key not in common}
    torch.manual_seed(args.seed)
    model = MODEL(nets.modalities(**spec), args.latent_dim, **own)
    data.refuse_values(dataset, model.modalities)
    if hasattr(model, "refuse_untrained"):
        model.refuse_untrained([shown for shown, _ in streams])
    record = {"version": 1, "script": Path(__file__).stem, "model": MODEL.__name__}
    record |= data.absolute(vars(args)) | {"options": own, "spec": spec, "note": dataset.note}
    return dataset, streams, model, record | {"examples": len(dataset.train)}


def start(args, model, split, streams, state, world):
    """Model and optimizer on the device, as new or as in state. -> net, optimizer"""
    if args.device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if world > 1 and not torch.distributed.is_initialized():
        torch.distributed.init_process_group("nccl" if args.device == "cuda" else "gloo")
    net = model.to(args.device)
    optimizer = torch.optim.Adam(model.parameters(), args.lr, fused=True)
    if "model" in state:
        try:
            model.load_state_dict(state.pop("model"))
            optimizer.load_state_dict(state.pop("optimizer"))
        except Exception as error:  # of other sizes or another model
            raise ValueError(f"checkpoint.pt does not fit: {data.one_line(error)}") from None
        optimizer.param_groups[0]["lr"] = args.lr
    elif hasattr(model, "start_pseudo"):
        model.start_pseudo(data.observed(split, streams, len(model.pseudo[0])))
    if world > 1:  # a stream of one modality leaves the other decoders unused
        net = nn.parallel.DistributedDataParallel(net, find_unused_parameters=True)
    return torch.compile(net) if args.compile else net, optimizer


def save(run, model, optimizer, state):
    """checkpoint.pt: tensors and numbers only; log.csv: its own log, a row per epoch."""
    state = state | {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    data.write_checkpoint(run / "checkpoint.pt", state)
    data.write_csv(run / "log.csv", state["log"])


@torch.no_grad()
def nats(model, xs):
    """log p(x_m|z), unweighted, at one z ~ q(z|observed), mean over the batch. -> M numbers.
    FloatingPointError when the weights, or the objective of 16 examples, are not finite."""
    model.eval()
    few = [None if x is None else x[:16] for x in xs]
    finite = all(tensor.isfinite().all() for tensor in model.state_dict().values())
    if not finite or not model([(1.0, few)]).isfinite():
        raise FloatingPointError("the objective is not finite after its last step")
    z, found = model.posterior(*xs).sample(), []
    for m, decode, x in zip(model.modalities, model.decoders, xs):
        found.append(math.nan if x is None else nets.log_prob(m, decode(z), x).mean().item())
    model.train()
    return found


def add(total, losses, step, names):
    """total + the losses of the last steps, up to `step`. FloatingPointError: not finite."""
    for at, (values, masks) in enumerate(losses, step + 1 - len(losses)):
        for value, shown in zip(values.tolist(), masks):
            total += value
            if not math.isfinite(value):
                what = "+".join(name for name, seen in zip(names, shown) if seen)
                raise FloatingPointError(f"the loss of {what} is {value} in step {at}")
    return total


def train(args, run, model, net, optimizer, dataset, streams, state, rank, world):
    """The epochs that are left. state: how many are done, and their log; kept up to date."""
    split, names = dataset.train.to(args.device), dataset.names
    sizes, steps = data.shares(streams, args.batch_size, args.sampling)
    shown, index = streams[0]
    sample = data.show(split, shown, index[:256].to(args.device))  # for the nats of each epoch
    done, since = state["epoch"], time.perf_counter()
    for epoch in range(done + 1, args.epochs + 1):
        seed = 1_000_003 * args.seed + epoch
        torch.manual_seed(4_099 * seed + rank)  # the noise
        order = torch.Generator().manual_seed(seed)  # the batches, the same on every rank
        if hasattr(model, "start_epoch"):
            model.start_epoch(epoch)
        how = args.batch_size, args.sampling, order, rank, world
        losses, total, began, tick = [], 0.0, time.perf_counter(), 0.0
        for step, batch in enumerate(data.batches(split, streams, *how), 1):
            with torch.autocast(args.device, torch.bfloat16, enabled=args.amp):
                loss = net(batch)  # (S,)
            optimizer.zero_grad(set_to_none=True)
            loss.sum().backward()
            if args.clip:
                nn.utils.clip_grad_norm_(model.parameters(), args.clip)
            optimizer.step()

            losses.append((loss.detach(), [[x is not None for x in xs] for _, xs in batch]))
            now = time.perf_counter()
            if now > tick + 1 or step == steps:  # read the losses: the only synchronisation
                total, losses, tick = add(total, losses, step, names), [], now
                if rank == 0 and sys.stdout.isatty():
                    left = (now - began) / step * (steps - step)
                    print(f"\repoch {epoch}, step {step} of {steps}, {left:.0f} s left", end=" ")
        if world > 1:  # the mean over ranks is the objective of the union of their batches
            total = torch.tensor(total, device=args.device)
            torch.distributed.all_reduce(total)
            total = total.item() / world
        if rank == 0:
            seconds = time.perf_counter() - began
            row = {"objective": -total / steps}
            row |= {f"nats_{n}": value for n, value in zip(names, nats(model, sample))}
            pace = {"examples_per_second": sum(sizes) * steps / seconds, "seconds": seconds}
            state["log"].append({"epoch": epoch, **row, **pace})
            save(run, model, optimizer, state | {"epoch": epoch})
            text = "  ".join(f"{key} {value:.2f}" for key, value in row.items())
            minutes = (time.perf_counter() - since) / (epoch - done) * (args.epochs - epoch) / 60
            text += f"  {pace['examples_per_second']:.0f} examples/s  {minutes:.1f} minutes left"
            print(f"\repoch {epoch} of {args.epochs}  {text}", flush=True)
        state["epoch"] = epoch


def main(argv=None):
    p, common = parser(argv)
    args = p.parse_args(argv)
    run, saved, state = run_folder(p, args, common), {}, {"epoch": 0, "log": []}
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    with data.ending(p, run, args, state):  # whatever stops it is said in a sentence
        try:  # what a user got wrong, before anything is written
            if args.resume:
                saved, before = data.read_run(run)
                state.update(before)
                kept = vars(args).keys() & saved.keys() - {"device", "out"}
                p.set_defaults(**{key: saved[key] for key in kept})
                vars(args).update(vars(p.parse_args(argv)))
            elif rank == 0 and os.path.exists(run / "checkpoint.pt"):  # False where no file can be
                raise ValueError(f"{run} holds a run: add --resume, or name another with --out")
            dataset, streams, model, record = build(p, args, common, world, saved)
            data.refuse_changes(run, saved, record, FREE)
            if state["epoch"] > args.epochs:
                raise ValueError(f"{run} has {state['epoch']} epochs, more than --epochs")
            net, optimizer = start(args, model, dataset.train, streams, state, world)
        except (ValueError, OSError) as error:
            p.error(data.sentence(error))
        if rank == 0:
            data.start_run(run, record)
            save(run, model, optimizer, state)
            size = f"{sum(w.numel() for w in model.parameters()):,} weights"
            print(run, size, f"{len(dataset.train):,} examples", dataset.note, sep="  ", flush=True)
            if state["epoch"] == args.epochs:
                print(f"nothing is left to do: it has its {args.epochs} epochs")
        train(args, run, model, net, optimizer, dataset, streams, state, rank, world)
        if world > 1:
            torch.distributed.destroy_process_group()
        if rank == 0:
            drawn = data.picture(model, dataset, run / "examples.png")
            print(*drawn, data.command("eval.py", run), sep="\n")


if __name__ == "__main__":
    main()
