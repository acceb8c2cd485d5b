"""MMVAE: the joint posterior is a mixture of experts (Shi et al., NeurIPS 2019).

    p(x_1..M, z) = p(z) Π_m p(x_m|z),  p(z) of learned scale               generative model
    q(z|X)       = 1/M Σ_m q_m(z|x_m)                                      over the observed m
    w_r          = p(z_r) Π_m p(x_m|z_r) / q(z_r|X),  z_r ~ q_r(z|x_r)     a sample of expert r
    L(X)         = 1/M Σ_r E[ log 1/K Σ_k w_r,k ]                          "iwae", looser (default)
                   E[ log 1/MK Σ_r Σ_k w_r,k ]                             --tight
                   1/M Σ_r E[ log w_r ]                                    "elbo"

"dreg" has the value of "iwae" and the doubly reparameterised gradient of Tucker et al. (2019) as
published.
Shapes: B examples, K samples, R experts, L latent dimensions. A missing modality is None.
Run:    python mmvae.py    # 1-2 minutes on two CPU cores; eval.py: cross coherence .990 .982
"""

import math

import torch
from torch import nn
from torch.distributions import Categorical, Independent, Laplace, MixtureSameFamily, Normal

import nets

DEFAULTS = {
    "glyphs": dict(epochs=5, batch_size=64, lr=1e-3, latent_dim=20, samples=3),
    "mnist-split": dict(epochs=100, batch_size=128, lr=1e-3, latent_dim=64),
    "mnist-split3": dict(epochs=50, batch_size=128, lr=1e-3, latent_dim=64),
    "mnist-svhn": dict(epochs=30, batch_size=128, lr=1e-3, latent_dim=20, samples=30),
    "cub": dict(epochs=50, batch_size=64, lr=1e-3, latent_dim=64, samples=50),
    "spectra": dict(epochs=140, batch_size=128, lr=1e-4, latent_dim=300),
    "npz": dict(batch_size=128, lr=1e-3, decay=0.3, latent_dim=20, samples=3),
}
DEFAULTS["mnist-svhn"] |= dict(weights=[3072 / 784, 1.0])  # as if MNIST had as many values as SVHN


class MMVAE(nn.Module):
    """Options:
    objective  "iwae", "elbo" or "dreg"
    samples    K
    tight      the mean over experts inside the log
    family     of the encoders and the prior, "normal" or "laplace" (logvar is then 2 log b)
    """

    resamples = False  # samples of the posterior are those of `posterior`
    random_on_host = False  # a CUDA graph can replay the objective

    def __init__(
        self,
        modalities,
        latent_dim,
        *,
        objective="iwae",
        samples=10,
        tight=False,
        family="normal",
    ):
        super().__init__()
        if objective not in ("iwae", "elbo", "dreg") or family not in ("normal", "laplace"):
            raise ValueError("objective must be iwae, elbo or dreg, family normal or laplace")
        if samples < 1:
            raise ValueError(f"samples must be 1 or more, not {samples}")
        if tight and objective == "elbo":
            raise ValueError("tight needs iwae or dreg: the elbo has no mean inside a log")
        self.modalities, self.latent_dim = modalities, latent_dim
        self.objective_name = objective
        self.samples = samples
        self.tight = tight
        self.family = family
        self.encoders = nn.ModuleList(m.encoder(latent_dim) for m in modalities)  # q_m(z|x_m)
        self.decoders = nn.ModuleList(m.decoder(latent_dim) for m in modalities)  # p(x_m|z)
        self.prior_logvar = nn.Parameter(torch.zeros(latent_dim))

    def encode(self, xs):
        """The experts of the observed modalities. -> mu, logvar, each (R, B, L)"""
        seen = nets.observed(self.modalities, xs)
        experts = [nets.apply(self.encoders[m], xs[m]) for m in seen]
        return [torch.stack(parameters) for parameters in zip(*experts)]

    def log_density(self, z, mu, logvar):
        """log of a Gaussian, or Laplace, density, summed over L."""
        error = (z - mu) * torch.exp(-0.5 * logvar)
        if self.family == "laplace":
            return -(error.abs() + 0.5 * logvar + math.log(2)).sum(-1)
        return -0.5 * (error**2 + logvar + math.log(2 * math.pi)).sum(-1)

    def weighted_log_p(self, m, z, x):
        """log p(x_m|z), times the likelihood's weight. z (..., B, L) -> (..., B)"""
        modality = self.modalities[m]
        return modality.weight * nets.log_prob(modality, self.decoders[m](z), x)

    def log_weights(self, xs, z, mu, logvar):
        """log w of the samples z (R, K, B, L) of the experts mu, logvar. -> (R, K, B)"""
        log_p_x = sum(self.weighted_log_p(m, z, x) for m, x in enumerate(xs) if x is not None)
        log_p_z = self.log_density(z, torch.zeros_like(self.prior_logvar), self.prior_logvar)
        log_q_m = self.log_density(z, mu[:, None, None], logvar[:, None, None])  # (R, R, K, B)
        log_q_z = log_q_m.logsumexp(0) - math.log(len(mu))
        return log_p_x + log_p_z - log_q_z

    def objective(self, *xs):
        """The objective of examples with the same modalities observed, to be maximised: mean over the
        batch, nats, scalar."""
        mu, logvar = self.encode(xs)
        eps = self.noise(mu)  # (R, K, B, L)
        z = mu[:, None] + torch.exp(0.5 * logvar[:, None]) * eps
        if self.objective_name == "elbo":
            return self.log_weights(xs, z, mu, logvar).mean()
        if self.objective_name == "dreg":  # the encoders get their gradient through z alone
            mu, logvar = mu.detach(), logvar.detach()
        log_w = self.log_weights(xs, z, mu, logvar)  # (R, K, B)
        if self.tight:
            bound = log_w.logsumexp((0, 1)) - math.log(len(log_w) * self.samples)  # (B,)
            w = log_w.detach().flatten(0, 1).softmax(0).view_as(log_w)
        else:
            bound = log_w.logsumexp(1) - math.log(self.samples)  # (R, B)
            w = log_w.detach().softmax(1)
        if self.objective_name == "dreg" and z.requires_grad:
            # DReG weighs the gradient through z by w²; the bound's own gradient has one factor w
            z.register_hook(lambda gradient: w[..., None] * gradient)
        return bound.mean()

    def noise(self, mu):
        """Standard noise, K samples for each expert. mu (R, B, L) -> (R, K, B, L)"""
        shape = len(mu), self.samples, *mu.shape[1:]
        if self.family == "laplace":
            zero, one = torch.zeros_like(mu[0]), torch.ones_like(mu[0])
            return Laplace(zero, one, validate_args=False).sample(shape[:2])
        return torch.randn(shape, device=mu.device, dtype=mu.dtype)

    def start(self, train, streams):
        """Nothing to prepare, and any streams train this model."""

    def start_epoch(self, epoch):
        """Nothing of this model depends on the epoch."""

    def forward(self, streams):
        """The loss of each stream (weight, xs): -weight * objective. -> (S,)"""
        return torch.stack([-weight * self.objective(*xs) for weight, xs in streams])

    def trained_priors(self, masks):
        """The names of the modalities whose own p(z) streams with these masks train: all."""
        return tuple(m.name for m in self.modalities)

    def posterior(self, *xs):
        """q(z|observed): the equal mixture of the observed experts. Batch (B,), event (L,)."""
        mu, logvar = self.encode(xs)
        experts = self.distribution(mu.transpose(0, 1), logvar.transpose(0, 1))  # (B, R), L
        equal = Categorical(torch.ones_like(mu[..., 0].T), validate_args=False)
        return MixtureSameFamily(equal, experts, validate_args=False)

    @torch.no_grad()
    def sample_posterior(self, xs, n=1):
        """z ~ q(z|observed). -> (n, B, L)"""
        return self.posterior(*xs).sample((n,))

    def distribution(self, mu, logvar):
        family = {"normal": Normal, "laplace": Laplace}[self.family]
        return Independent(family(mu, torch.exp(0.5 * logvar), validate_args=False), 1)

    def prior(self, *xs):
        """p(z) with mean 0 and a learned scale, for all xs, event (L,)."""
        return self.distribution(torch.zeros_like(self.prior_logvar), self.prior_logvar)

    def decode(self, z):
        """The mean of each p(x_m|z): M tensors of shape z.shape[:-1] + x_m's shape."""
        return [nets.mean(m, decode(z)) for m, decode in zip(self.modalities, self.decoders)]


MODEL = MMVAE


def options(flag):
    """The flags of this model: its constructor's keyword arguments, whose defaults they have."""
    flag("--objective", choices=["iwae", "elbo", "dreg"], help="dreg: iwae with another gradient")
    flag("--samples", type=int, help="samples of z from each encoder (K)")
    flag("--tight", action="store_true", help="mean over encoders inside the log: a tighter bound")
    flag("--family", choices=["normal", "laplace"], help="of the encoders and the prior")


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
