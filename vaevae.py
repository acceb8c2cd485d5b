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
    "npz": dict(
        batch_size=128, lr=1e-3, decay=0.3, latent_dim=20, sampling="natural", subsets=4
    ),
}
STREAMS = dict(unpaired="all", sampling="balanced")  # as the paper's code trains
DEFAULTS = {name: STREAMS | row for name, row in DEFAULTS.items()}


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


def all_subsets(seen):
    """Every non-empty subset of the modalities `seen`, small ones first."""
    sizes = range(1, len(seen) + 1)
    return [subset for size in sizes for subset in itertools.combinations(seen, size)]


class VAEVAE(nn.Module):
    """objective: "vaevae", or "svae", with L(x_1) + L(x_2) on complete examples (VAEVAE*, eq. 19);
    variant: "b", a network per subset, or "a", the product of the unimodal ones; subsets: for
    four modalities or more, which the paper does not have: so many terms of the objective per step,
    drawn at random, instead of all 2^M - 1, with the same expectation; 0: all."""

    def __init__(self, modalities, latent_dim, *, objective="vaevae", variant="b", subsets=0):
        super().__init__()
        if objective not in ("svae", "vaevae") or variant not in ("a", "b"):
            raise ValueError("objective must be svae or vaevae, variant a or b")
        if subsets < 0:
            raise ValueError("subsets must be 0 or more")
        self.modalities, self.latent_dim = modalities, latent_dim
        self.objective_name, self.variant, self.subsets = objective, variant, subsets
        self.encoders = nn.ModuleList(m.encoder(latent_dim) for m in modalities)  # q(z|x_m)
        self.joints = nn.ModuleDict()  # q(z|x_i, x_j, ...), the key is the subset
        for size in range(2, len(modalities) + 1) if variant == "b" else ():
            for subset in itertools.combinations(range(len(modalities)), size):
                self.joints[str(subset)] = nets.Joint([modalities[m] for m in subset], latent_dim)
        self.decoders = nn.ModuleList(m.decoder(latent_dim) for m in modalities)  # p(x_m|z)
        self.register_buffer("zero", torch.zeros(latent_dim))

    def encode(self, xs, subsets):
        """The posteriors of these subsets of the observed modalities. -> {subset: [(mu, logvar)]}"""
        joints = self.variant == "b"
        alone = {m for subset in subsets for m in subset if len(subset) == 1 or not joints}
        each = enumerate(zip(self.encoders, xs, strict=True))
        q = {(m,): [encode(x)] for m, (encode, x) in each if m in alone}
        for subset in subsets:
            if len(subset) > 1 and joints:
                q[subset] = [self.joints[str(subset)]([xs[m] for m in subset])]
            elif len(subset) > 1:
                q[subset] = [product([q[m,][0] for m in subset])]
        return q

    def log_p(self, m, z, x):
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
        """The term of `subset`: E_q[Σ log p] minus the KLs to the distributions that q is regularised
        towards. M = 2, both observed: KL(q12 || q1) + KL(q12 || q2). -> (B,), nats"""
        seen = [m for m, x in enumerate(xs) if x is not None]
        priors = [gaussian for s in self.regularisers(subset, seen) for gaussian in q[s]]
        if len(subset) < len(xs):
            priors.append((self.zero, self.zero))  # p(z)
        total = 0
        for mu, logvar in q[subset]:
            z = mu + torch.exp(0.5 * logvar) * torch.randn_like(mu)
            log_p = sum(self.log_p(m, z, xs[m]) for m in subset)
            kl = sum(kl_normal(mu, logvar, *prior) for prior in priors)
            if len(xs) > 3:  # the paper ends at 3. The sum, up to M + 1 KLs, leaves z uninformed
                kl = kl / len(priors)
            total = total + log_p - kl
        return total

    def objective(self, *xs):
        """The objective of examples of one pattern, to be maximised: mean over the batch, nats, scalar."""
        seen = [m for m, x in enumerate(xs) if x is not None]
        terms = needed = all_subsets(seen)
        if self.objective_name == "vaevae" and len(seen) > 1:  # no marginal bounds
            terms = [subset for subset in terms if len(subset) > 1]
        every = len(terms)
        if len(xs) > 3 and 0 < self.subsets < every:
            terms = [terms[k] for k in torch.randperm(every)[: self.subsets]]
            needed = dict.fromkeys(s for t in terms for s in (t, *self.regularisers(t, seen)))
        q = self.encode(xs, needed)
        total = sum(self.bound(subset, xs, q) for subset in terms).mean()  # Eq. (19)-(21); eq. (32)
        return total * (every / len(terms))  # of some terms the expectation is that of all

    def forward(self, streams):
        """The loss of each stream (weight, xs): -weight * objective; in sum eq. (22). -> (S,)"""
        return torch.stack([-weight * self.objective(*xs) for weight, xs in streams])

    def check_streams(self, masks):
        """ValueError where a posterior would not be trained: without L(x_m) on pairs only a stream
        of x_m alone regularises q(z|x_m) towards p(z)."""
        for k, modality in enumerate(self.modalities):
            alone = any(mask[k] and sum(mask) == 1 for mask in masks)
            if self.objective_name == "vaevae" and not alone:
                raise ValueError(
                    f"the objective vaevae trains q(z|{modality.name}) on examples that show only "
                    f"{modality.name}, and there are none: use --objective svae or --unpaired all"
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
        return normal(*self.encode(xs, [seen])[seen][0])

    def prior(self, *xs):
        """p(z) = N(0, I) for all xs, event (L,)."""
        return normal(self.zero, self.zero)

    def decode(self, z):
        """The mean of each p(x_m|z): M tensors of shape z.shape[:-1] + x_m's shape."""
        return [nets.mean(m, decode(z)) for m, decode in zip(self.modalities, self.decoders)]


MODEL = VAEVAE


def options(flag):
    """The flags of this model: the keyword arguments of its constructor, which have the defaults."""
    flag("--objective", choices=["vaevae", "svae"], help="svae: VAEVAE*, with L(x_m) on pairs")
    flag("--variant", choices=["b", "a"], help="b: a network per subset; a: a product of encoders")
    flag("--subsets", type=int, help="random terms per step, for four modalities or more; 0: all")


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
