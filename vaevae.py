"""VAEVAE: a network for every subset of modalities (Wu & Goodman, 2019; Kutuzova et al., 2021).

    p(x_1..M, z)  = p(z) Π_m p(x_m|z),  p(z) = N(0, I)                     generative model
    q(z|x_1, x_2), q(z|x_1), q(z|x_2)                                      networks: variant (b)
    q(z|x_1, x_2) ∝ q(z|x_1) q(z|x_2)                                      variant (a)
    L(x_1, x_2)   = E_q(z|x_1,x_2)[ log p(x_1|z) + log p(x_2|z) ]
                    - Σ_m KL(q(z|x_1, x_2) || q(z|x_m))                    Eq. (19), its first part
    L(x_m)        = E_q(z|x_m)[ log p(x_m|z) ] - KL(q(z|x_m) || p(z))               Eq. (20), (21)

In eq. (19) q(z|x_m) stands for p(z|x_m), as set below eq. (28). Three modalities: eq. (29)-(32).
Shapes: B examples, L latent dimensions. A missing modality is None.
Run:    python vaevae.py   # 1-2 minutes on two CPU cores; eval.py: cross coherence .83 .82
"""

import itertools
import math

import torch
from torch import nn
from torch.distributions import Independent, Normal

import nets

DEFAULTS = {
    "glyphs": dict(epochs=5, batch_size=64, lr=1e-3, latent_dim=20),
    "mnist-split": dict(epochs=200, batch_size=100, lr=2e-4, latent_dim=64),
    "mnist-split3": dict(epochs=50, batch_size=100, lr=2e-4, latent_dim=64),
    "mnist-svhn": dict(epochs=50, batch_size=256, lr=1e-3, latent_dim=20),
    "cub": dict(epochs=200, batch_size=100, lr=1e-4, latent_dim=64),
    "spectra": dict(epochs=140, batch_size=100, lr=1e-4, latent_dim=300),
    "npz": dict(epochs=100, batch_size=100, lr=1e-3, latent_dim=20),
}
STREAMS = dict(unpaired="all", sampling="balanced")  # as the paper's code trains
DEFAULTS = {name: row | STREAMS for name, row in DEFAULTS.items()}


def normal(mu, logvar):
    """A diagonal Gaussian as a distribution: event (L,)."""
    return Independent(Normal(mu, torch.exp(0.5 * logvar), validate_args=False), 1)


def kl_normal(mu, logvar, prior_mu, prior_logvar):
    """KL of one diagonal Gaussian to another, summed over L."""
    error = ((mu - prior_mu) ** 2 + torch.exp(logvar)) * torch.exp(-prior_logvar)
    return 0.5 * (prior_logvar - logvar + error - 1).sum(-1)


def product(gaussians):
    """The normalised product of Gaussians: precisions add. -> mu, logvar"""
    precision = sum(torch.exp(-logvar) for _, logvar in gaussians)
    mu = sum(mu * torch.exp(-logvar) for mu, logvar in gaussians) / precision
    return mu, -precision.log()


class VAEVAE(nn.Module):
    """objective: "vaevae", or "svae" with L(x_1) + L(x_2) on whole examples too (VAEVAE*, eq. 19);
    variant: "b", a network per subset, or "a", the product of the unimodal ones."""

    def __init__(self, modalities, latent_dim, objective="vaevae", variant="b"):
        super().__init__()
        if objective not in ("svae", "vaevae") or variant not in ("a", "b"):
            raise ValueError("objective is svae or vaevae, variant is a or b")
        self.modalities, self.latent_dim = modalities, latent_dim
        self.marginals, self.variant = objective == "svae", variant
        self.encoders = nn.ModuleList(m.encoder(latent_dim) for m in modalities)  # q(z|x_m)
        self.joints = nn.ModuleDict()  # q(z|x_i, x_j, ...), the key is the subset
        for size in range(2, len(modalities) + 1) if variant == "b" else ():
            for subset in itertools.combinations(range(len(modalities)), size):
                self.joints[str(subset)] = nets.Joint([modalities[m] for m in subset], latent_dim)
        self.decoders = nn.ModuleList(m.decoder(latent_dim) for m in modalities)  # p(x_m|z)
        self.register_buffer("zero", torch.zeros(latent_dim))

    def encode(self, xs):
        """The posteriors of all subsets of the observed modalities. -> {subset: [(mu, logvar)]}"""
        every = range(len(self.modalities))
        seen = [m for m, x in zip(every, xs, strict=True) if x is not None]
        q = {(m,): [self.encoders[m](xs[m])] for m in seen}
        for size in range(2, len(seen) + 1):
            for subset in itertools.combinations(seen, size):
                if self.variant == "b":
                    q[subset] = [self.joints[str(subset)]([xs[m] for m in subset])]
                else:
                    q[subset] = [product([q[m,][0] for m in subset])]
        return q

    def log_p(self, m, z, x):
        """log p(x_m|z), times the likelihood's weight. z (..., B, L) -> (..., B)"""
        modality = self.modalities[m]
        return modality.weight * nets.log_prob(modality, self.decoders[m](z), x)

    def bound(self, subset, xs, q):
        """The term of `subset`: E_q[Σ log p] - Σ KL(q || what q is drawn to). -> (B,), nats"""
        seen = [m for m, x in enumerate(xs) if x is not None]
        if len(subset) == 1:
            priors = [(self.zero, self.zero)]  # Eq. (20), (21), (31)
        elif len(subset) == len(xs):  # Eq. (19), its joint part; eq. (29) for M = 3
            smaller = itertools.combinations(subset, len(subset) - 1)
            priors = [gaussian for s in smaller for gaussian in q[s]]
        else:  # Eq. (30), for the observed x_k
            priors = [gaussian for k in seen for gaussian in q[k,]] + [(self.zero, self.zero)]
        total = 0
        for mu, logvar in q[subset]:
            z = mu + torch.exp(0.5 * logvar) * torch.randn_like(mu)
            log_p = sum(self.log_p(m, z, xs[m]) for m in subset)
            total = total + log_p - sum(kl_normal(mu, logvar, *prior) for prior in priors)
        return total

    def objective(self, *xs):
        """What is maximised for examples of one pattern: the mean over the batch, nats, scalar."""
        q = self.encode(xs)
        seen = sum(x is not None for x in xs)
        terms = [s for s in q if self.marginals or len(s) > 1 or seen == 1]
        return sum(self.bound(subset, xs, q) for subset in terms).mean()  # Eq. (19)-(21); eq. (32)

    def forward(self, streams):
        """The loss of each stream (weight, xs): -weight * objective; in sum eq. (22). -> (S,)"""
        return torch.stack([-weight * self.objective(*xs) for weight, xs in streams])

    def refuse_untrained(self, masks):
        """Without L(x_m) on pairs only a stream of x_m alone draws q(z|x_m) to p(z)."""
        for k, modality in enumerate(self.modalities):
            alone = any(mask[k] and sum(mask) == 1 for mask in masks)
            if not self.marginals and not alone:
                raise ValueError(
                    f"the objective vaevae draws q(z|{modality.name}) to p(z) where "
                    f"{modality.name} is shown alone, and it never is: use svae, or show it"
                )
        names = [m.name for m in self.modalities]
        for size in range(2, len(names) + 1) if self.variant == "b" else ():
            for subset in itertools.combinations(range(len(names)), size):
                if not any(all(mask[m] for m in subset) for mask in masks):
                    shown = " and ".join(names[m] for m in subset)
                    raise ValueError(f"no example shows {shown} together: use variant a")

    def posterior(self, *xs):
        """q(z|observed). Batch (B,), event (L,)."""
        seen = tuple(m for m, x in enumerate(xs) if x is not None)
        return normal(*self.encode(xs)[seen][0])

    def prior(self):
        """p(z) = N(0, I), event (L,)."""
        return normal(self.zero, self.zero)

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
            q, p = self.posterior(*xs), self.prior()
        else:
            known = [g if x is None else x for x, g in zip(xs, given)]
            q, p = self.posterior(*known), self.posterior(*given)
        z = q.sample((samples,))  # (K, B, L)
        log_p = [nets.log_prob(self.modalities[m], self.decoders[m](z), xs[m]) for m in seen]
        log_w = sum(log_p) + p.log_prob(z) - q.log_prob(z)
        return log_w.logsumexp(0) - math.log(samples)


MODEL = VAEVAE


def options(flag):
    """The flags of this model: its constructor's keyword arguments."""
    flag("--objective", default="vaevae", help="vaevae, or svae: of pairs each one's bound, too")
    flag("--variant", default="b", help="b: a joint encoder network; a: the product of the others")


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
