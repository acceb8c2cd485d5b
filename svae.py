"""SVAE: a product of experts with a replacement for each missing one (Kutuzova et al., 2021).

    p(x_1..M, z)  = p(z) Π_m p(x_m|z),  p(z) = N(0, I)                     generative model
    q(z|x_1, x_2) ∝ q_1(z|x_1) q_2(z|x_2)                                                 Eq. (3)
    q(z|x_1)      ∝ q_1(z|x_1) q_2*(z|x_1), the second stands in for q_2   Eq. (4), (5) mirrored
    L(x_1, x_2)   = E_q(z|x_1,x_2)[ log p(x_1|z) + log p(x_2|z) ]
                    - Σ_m KL(q(z|x_1, x_2) || q(z|x_m)) + L(x_1) + L(x_2)                 Eq. (19)
    L(x_m)        = E_q(z|x_m)[ log p(x_m|z) ] - KL(q(z|x_m) || p(z))               Eq. (20), (21)

In eq. (19) q(z|x_m) stands for p(z|x_m), as set below eq. (28). Three modalities: eq. (29)-(38).
Shapes: B examples, L latent dimensions. A missing modality is None. Every q_m is
N(mu, exp(logvar)) or, with --experts bounded, a `bounded_expert`.
Run:    python svae.py     # 1-2 minutes on two CPU cores; eval.py: cross coherence .69 .76
"""

import itertools
import math

import torch
from torch import nn
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

import nets

DEFAULTS = {
    "glyphs": dict(epochs=5, batch_size=64, lr=1e-3, latent_dim=20, experts="exact"),
    "mnist-split": dict(epochs=200, batch_size=100, lr=2e-4, latent_dim=64, experts="exact"),
    "mnist-split3": dict(epochs=50, batch_size=100, lr=2e-4, latent_dim=64),
    "mnist-svhn": dict(epochs=50, batch_size=256, lr=1e-4, latent_dim=20),
    "cub": dict(epochs=200, batch_size=100, lr=1e-4, latent_dim=64),
    "spectra": dict(epochs=140, batch_size=100, lr=1e-4, latent_dim=300),
    "npz": dict(batch_size=128, lr=1e-3, decay=0.3, latent_dim=20, sampling="natural", terms=2),
}
STREAMS = dict(unpaired="all", sampling="balanced")  # as the paper's code trains
DEFAULTS = {name: STREAMS | row for name, row in DEFAULTS.items()}


def normal(mu, logvar):
    """A diagonal Gaussian as a distribution: event (L,)."""
    return Independent(Normal(mu, torch.exp(0.5 * logvar), validate_args=False), 1)


def mixture(mu, logvar):
    """The equal mixture of the Gaussians along the axis before the last: event (L,)."""
    weights = Categorical(torch.ones_like(mu[..., 0]), validate_args=False)
    return MixtureSameFamily(weights, normal(mu, logvar), validate_args=False)


def kl_normal(mu, logvar, prior_mu, prior_logvar):
    """KL of one diagonal Gaussian to another, summed over L."""
    error = ((mu - prior_mu) ** 2 + torch.exp(logvar)) * torch.exp(-prior_logvar)
    return 0.5 * (prior_logvar - logvar + error - 1).sum(-1)


def bounded_expert(mu, logvar):
    """Gaussian with variance 1 / (1/var + 0.1), var = exp(logvar) up to 1 and 1 + logvar above. A
    very wide expert gets no gradient and stays dead. -> mu, logvar"""
    variance = torch.where(logvar > 0, 1 + logvar, torch.exp(logvar.clamp(max=1)))
    return mu, -(1 / variance + 0.1).log()


def product(gaussians):
    """The normalised product of Gaussians: precisions add. -> mu, logvar"""
    precision = sum(torch.exp(-logvar) for _, logvar in gaussians)
    mu = sum(mu * torch.exp(-logvar) for mu, logvar in gaussians) / precision
    return mu, -precision.log()


def all_subsets(seen):
    """Every non-empty subset of the modalities `seen`, small ones first."""
    sizes = range(1, len(seen) + 1)
    return [subset for size in sizes for subset in itertools.combinations(seen, size)]


class SVAE(nn.Module):
    """Options:
    objective     "svae", eq. (19), or "vaevae", without its L(x_1) + L(x_2) (SVAE*; for three
                  modalities the printed eq. (32), which has them for unpaired data only)
    prior_expert  p(z) as one more expert of every product, as in the released code
    experts       "exact", N(mu, exp(logvar)), or "bounded", which train at high learning rates, too
    kl_terms      the "sum" of a bound's KLs, the paper's, or their "mean"; None: the mean from four
                  modalities on, which the paper does not have: there the sum left z unused
    terms         from four modalities on: random terms of the objective per step, in place of all
                  2^M - 1, with the same expectation; 0: all
    """

    resamples = False  # samples of the posterior are those of `posterior`

    def __init__(
        self,
        modalities,
        latent_dim,
        *,
        objective="svae",
        prior_expert=False,
        experts="bounded",
        kl_terms=None,
        terms=0,
    ):
        super().__init__()
        if objective not in ("svae", "vaevae") or experts not in ("exact", "bounded"):
            raise ValueError("objective must be svae or vaevae, experts exact or bounded")
        self.modalities, self.latent_dim = modalities, latent_dim
        self.objective_name = objective
        self.prior_expert = prior_expert
        self.experts = experts
        self.kl_terms = kl_terms or ("sum" if len(modalities) <= 3 else "mean")
        self.terms = terms
        self.random_on_host = terms > 0 and len(modalities) > 3  # a CUDA graph would freeze it
        self.encoders = nn.ModuleList(  # [i][j]: q_i^j(z|x_j), for i != j the replacement of q_i
            nn.ModuleList(m.encoder(latent_dim) for m in modalities) for _ in modalities
        )
        self.decoders = nn.ModuleList(m.decoder(latent_dim) for m in modalities)  # p(x_m|z)
        self.register_buffer("zero", torch.zeros(latent_dim))

    def encode(self, xs, subsets):
        """The posteriors of these subsets of the observed modalities, each a product of M experts.
        -> {subset: [(mu, logvar), ...]}"""
        every = range(len(self.modalities))
        seen = nets.observed(self.modalities, xs)
        experts = {(i, j): nets.apply(self.encoders[i][j], xs[j]) for i in every for j in seen}
        if self.experts == "bounded":
            experts = {which: bounded_expert(*expert) for which, expert in experts.items()}
        prior = [(self.zero, self.zero)] if self.prior_expert else []
        q = {}
        for subset in subsets:
            own = [experts[m, m] for m in subset] + prior
            missing = [m for m in every if m not in subset]
            # One observed j replaces all missing experts. Eq. (4), (5); (35)-(37)
            sources = subset if missing else subset[:1]
            q[subset] = [product(own + [experts[m, j] for m in missing]) for j in sources]
        return q

    def weighted_log_p(self, m, z, x):
        """log p(x_m|z), times the likelihood's weight. z (..., B, L) -> (..., B)"""
        modality = self.modalities[m]
        return modality.weight * nets.log_prob(modality, self.decoders[m](z), x)

    def regularisers(self, subset, seen):
        """The subsets of the observed modalities towards whose posteriors that of `subset` is
        regularised; all but the largest also towards p(z)."""
        if len(subset) == 1:
            return []  # Eq. (20), (21), (31)
        if len(subset) == len(self.modalities):  # Eq. (19), its joint part; eq. (29) for M = 3
            return list(itertools.combinations(subset, len(subset) - 1))
        return [(k,) for k in seen]  # Eq. (30), for the observed x_k

    def bound(self, subset, xs, q):
        """The term of `subset`: E_q[Σ log p] minus the KLs to the distributions towards which q is
        regularised. M = 2, both observed: KL(q12 || q1) + KL(q12 || q2). -> (B,), nats"""
        seen = [m for m, x in enumerate(xs) if x is not None]
        priors = [gaussian for s in self.regularisers(subset, seen) for gaussian in q[s]]
        if len(subset) < len(xs):
            priors.append((self.zero, self.zero))  # p(z)
        total = 0
        for mu, logvar in q[subset]:
            z = mu + torch.exp(0.5 * logvar) * torch.randn_like(mu)
            log_p = sum(self.weighted_log_p(m, z, xs[m]) for m in subset)
            kl = sum(kl_normal(mu, logvar, *prior) for prior in priors)
            if self.kl_terms == "mean":
                kl = kl / len(priors)
            total = total + log_p - kl
        return total

    def objective(self, *xs):
        """The objective of examples with the same modalities observed, to be maximised: mean over the
        batch, nats, scalar."""
        seen = nets.observed(self.modalities, xs)
        terms = needed = all_subsets(seen)
        if self.objective_name == "vaevae" and len(seen) > 1:  # no marginal bounds
            terms = [subset for subset in terms if len(subset) > 1]
        every = len(terms)
        if len(xs) > 3 and 0 < self.terms < every:
            terms = [terms[k] for k in torch.randperm(every)[: self.terms]]
            needed = dict.fromkeys(s for t in terms for s in (t, *self.regularisers(t, seen)))
        q = self.encode(xs, needed)
        total = sum(self.bound(subset, xs, q) for subset in terms).mean()  # Eq. (19)-(21); eq. (32)
        return total * (every / len(terms))  # of some terms the expectation is that of all

    def forward(self, streams):
        """The loss of each stream (weight, xs): -weight * objective; in sum eq. (22). -> (S,)"""
        return torch.stack([-weight * self.objective(*xs) for weight, xs in streams])

    def start(self, train, streams):
        """ValueError where a posterior would not be trained: without L(x_m) on pairs only a stream
        of x_m alone regularises q(z|x_m) towards p(z)."""
        for k, modality in enumerate(self.modalities):
            alone = any(mask[k] and sum(mask) == 1 for mask, _ in streams)
            if self.objective_name == "vaevae" and not alone:
                raise ValueError(
                    f"the objective vaevae trains q(z|{modality.name}) on examples that show only "
                    f"{modality.name}, and there are none: use --objective svae or --unpaired all"
                )

    def start_epoch(self, epoch):
        """Nothing of this model depends on the epoch."""

    def trained_priors(self, masks):
        """The names of the modalities whose own p(z) streams with these masks train: all."""
        return tuple(m.name for m in self.modalities)

    def posterior(self, *xs):
        """q(z|observed); of two in three the equal mixture of eq. (35) and (36). Batch (B,),
        event (L,)."""
        seen = tuple(nets.observed(self.modalities, xs))
        gaussians = self.encode(xs, [seen])[seen]
        if len(gaussians) == 1:
            return normal(*gaussians[0])
        return mixture(*(torch.stack(parameters, 1) for parameters in zip(*gaussians)))

    @torch.no_grad()
    def sample_posterior(self, xs, n=1):
        """z ~ q(z|observed). -> (n, B, L)"""
        return self.posterior(*xs).sample((n,))

    def prior(self, *xs):
        """p(z) = N(0, I) for all xs, event (L,)."""
        return normal(self.zero, self.zero)

    def decode(self, z):
        """The mean of each p(x_m|z): M tensors of shape z.shape[:-1] + x_m's shape."""
        return [nets.mean(m, decode(z)) for m, decode in zip(self.modalities, self.decoders)]


MODEL = SVAE


def options(flag):
    """The flags of this model: its constructor's keyword arguments, whose defaults they have."""
    flag("--objective", choices=["svae", "vaevae"], help="vaevae: SVAE*, no L(x_m) on pairs")
    flag("--prior-expert", action="store_true", help="multiply N(0, I) into products of encoders")
    flag("--experts", choices=["bounded", "exact"], help="bounded: variances cannot explode")
    flag("--kl-terms", choices=["sum", "mean"], help="of a bound; default: mean from 4 modalities")
    flag("--terms", type=int, help="random terms per step, for four modalities or more; 0: all")


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
