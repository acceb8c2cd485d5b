"""SVAE: a product of experts with a replacement for each missing one (Kutuzova et al., 2021).

    p(x_1..M, z)  = p(z) Π_m p(x_m|z),  p(z) = N(0, I)                     generative model
    q(z|x_1, x_2) ∝ q_1(z|x_1) q_2(z|x_2)                                                 Eq. (3)
    q(z|x_1)      ∝ q_1(z|x_1) q_2*(z|x_1), the second stands in for q_2   Eq. (4), (5) mirrored
    L(x_1, x_2)   = E_q(z|x_1,x_2)[ log p(x_1|z) + log p(x_2|z) ]
                    - Σ_m KL(q(z|x_1, x_2) || q(z|x_m)) + L(x_1) + L(x_2)                 Eq. (19)
    L(x_m)        = E_q(z|x_m)[ log p(x_m|z) ] - KL(q(z|x_m) || p(z))               Eq. (20), (21)

In eq. (19) q(z|x_m) stands for p(z|x_m), as set below eq. (28). Three modalities: eq. (29)-(38).
Shapes: B examples, L latent dimensions. A missing modality is None. Every q_m is an `expert`.
Run:    python svae.py     # 1-2 minutes on two CPU cores; eval.py: cross coherence .91 .91
"""

import argparse
import csv
import io
import itertools
import json
import math
import os
import signal
import sys
import time
from pathlib import Path

import torch
from torch import nn
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

import data
import nets

DEFAULTS = {
    "glyphs": dict(epochs=5, batch_size=64, lr=1e-3, latent_dim=20),
    "mnist-split": dict(epochs=200, batch_size=100, lr=2e-4, latent_dim=64),
    "mnist-split3": dict(epochs=50, batch_size=100, lr=2e-4, latent_dim=64),
    "mnist-svhn": dict(epochs=50, batch_size=256, lr=1e-4, latent_dim=20),
    "cub": dict(epochs=200, batch_size=100, lr=1e-4, latent_dim=64),
    "spectra": dict(epochs=140, batch_size=100, lr=1e-4, latent_dim=300),
    "npz": dict(epochs=100, batch_size=100, lr=1e-3, latent_dim=20),
}
for row in DEFAULTS.values():
    row |= dict(unpaired="all", sampling="balanced")  # as the paper's code trains


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


def expert(mu, logvar):
    """A factor of a product. Of variance exp(logvar) a flat one would get almost no gradient, and
    stay flat: hence 1 + logvar where logvar > 0, and 0.1 more precision. -> mu, logvar"""
    variance = torch.where(logvar > 0, 1 + logvar, torch.exp(logvar.clamp(max=1)))
    return mu, -(1 / variance + 0.1).log()


def product(gaussians):
    """The normalised product of Gaussians: precisions add. -> mu, logvar"""
    precision = sum(torch.exp(-logvar) for _, logvar in gaussians)
    mu = sum(mu * torch.exp(-logvar) for mu, logvar in gaussians) / precision
    return mu, -precision.log()


class SVAE(nn.Module):
    """objective: "svae", eq. (19), or "vaevae", without its L(x_1) + L(x_2) (SVAE*);
    prior_expert: p(z) as one more expert of every product, as in the released code."""

    def __init__(self, modalities, latent_dim, objective="svae", prior_expert=False):
        super().__init__()
        self.modalities, self.latent_dim = modalities, latent_dim
        self.marginals, self.prior_expert = objective == "svae", prior_expert
        self.encoders = nn.ModuleList(  # [i][j]: q_i^j(z|x_j), for i != j the replacement of q_i
            nn.ModuleList(m.encoder(latent_dim) for m in modalities) for _ in modalities
        )
        self.decoders = nn.ModuleList(m.decoder(latent_dim) for m in modalities)  # p(x_m|z)
        self.register_buffer("zero", torch.zeros(latent_dim))

    def encode(self, xs):
        """The posteriors of all subsets of the observed modalities, each a product of M experts.
        -> {subset: [(mu, logvar), ...]}"""
        every = range(len(xs))
        seen = [m for m in every if xs[m] is not None]
        experts = {(i, j): expert(*self.encoders[i][j](xs[j])) for i in every for j in seen}
        prior = [(self.zero, self.zero)] if self.prior_expert else []
        q = {}
        for size in range(1, len(seen) + 1):
            for subset in itertools.combinations(seen, size):
                own = [experts[m, m] for m in subset] + prior
                missing = [m for m in every if m not in subset]
                # who stands in for the missing: any one j of the observed. Eq. (4), (5); (35)-(37)
                stand_ins = subset if missing else subset[:1]
                q[subset] = [product(own + [experts[m, j] for m in missing]) for j in stand_ins]
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
                    f"--objective vaevae draws q(z|{modality.name}) to p(z) by {modality.name} "
                    "alone, and no stream shows that: use --objective svae or, without a train_mask, "
                    "--unpaired all"
                )

    def posterior(self, *xs):
        """q(z|observed); of two in three the equal mixture of eq. (35) and (36). Batch (B,),
        event (L,)."""
        seen = tuple(m for m, x in enumerate(xs) if x is not None)
        found = self.encode(xs)[seen]
        if len(found) == 1:
            return normal(*found[0])
        return mixture(*(torch.stack(parameters, 1) for parameters in zip(*found)))

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


# --------------------------------------------------------------- the loop, one text in five scripts

FREE = set("epochs lr device amp compile data out resume".split())  # may change on --resume


def at_least(low):
    """An argparse type: an integer from `low` on."""

    def integer(text):
        if not low <= int(text) < 2**31:
            raise argparse.ArgumentTypeError(f"{text} is not an integer from {low} on")
        return int(text)

    return integer


def positive(text):
    """An argparse type: a finite number above 0."""
    if not 0 < float(text) < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a finite number above 0")
    return float(text)


def write(path, content):
    """Write bytes beside their place and rename, so that a kill leaves the old file or the new."""
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def save(run, model, optimizer, epoch, log):
    """checkpoint.pt: tensors and numbers only; log.csv: its own log, a row per epoch."""
    checkpoint, table = io.BytesIO(), io.StringIO()
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(state | {"epoch": epoch, "log": log}, checkpoint)
    write(run / "checkpoint.pt", checkpoint.getbuffer())
    rows = csv.DictWriter(table, log[0] if log else ["epoch"])
    rows.writeheader()
    rows.writerows(log)
    write(run / "log.csv", table.getvalue().encode())


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


def main(argv=None):
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--dataset", default="glyphs")
    chosen = first.parse_known_args(argv)[0].dataset
    p = argparse.ArgumentParser(
        prog=Path(__file__).name,
        description=__doc__.splitlines()[0],
        usage="%(prog)s [--dataset NAME] [--paired F] [options]",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    flag = p.add_argument
    flag("--dataset", default="glyphs", help=", ".join(data.DATASETS) + " or a path.npz")
    flag("--data", default="./data", help="folder of the data sets")
    flag("--paired", type=float, default=1.0, help="fraction of the examples shown whole")
    flag("--unpaired", default="split", help="the others: split, NAME, all, rest or none")
    flag("--sampling", default="natural", choices=["natural", "balanced"], help="of the streams")
    flag("--epochs", type=at_least(1), help="passes over the data")
    flag("--batch-size", type=at_least(1), help="examples in a step, of all processes")
    flag("--lr", type=positive, help="learning rate of Adam")
    flag("--latent-dim", type=at_least(1), help="dimensions of z")
    flag("--likelihoods", help="one per modality, as in laplace,laplace")
    flag("--weights", help="of the log-likelihoods, one per modality, as in 3.9,1")
    flag("--width", type=positive, default=1.0, help="scales the layers of spectra")
    flag("--seed", type=at_least(0), default=0, help="of pairing, weights, order and noise")
    flag("--limit", type=at_least(1), help="only the first N training examples")
    usual = "cuda" if torch.cuda.is_available() else "cpu"
    flag("--device", default=usual, choices=["cuda", "cpu"], help="where to train")
    flag("--amp", action=argparse.BooleanOptionalAction, default=False, help="bfloat16 networks")
    flag("--compile", action=argparse.BooleanOptionalAction, default=False, help="torch.compile")
    flag("--out", help="the run folder, instead of runs/<model>-<dataset>-...")
    flag("--resume", action="store_true", help="continue the run in its folder")
    common = set(vars(p.parse_args([])))
    flag = p.add_argument_group("options of SVAE").add_argument  # this script only
    terms = dict(default="svae", choices=["svae", "vaevae"])  # this script only
    flag("--objective", **terms, help="svae: L(x_m) on pairs, too")  # this script only
    flag("--prior-expert", action="store_true", help="N(0, I) in the products")  # this script only
    p.set_defaults(**DEFAULTS.get(chosen, DEFAULTS["npz"]))
    args = p.parse_args(argv)

    # The run folder is named after what makes the run, and a run in it is never overwritten.
    name = [Path(__file__).stem]
    for key, value in vars(args).items():
        if key not in common and value != p.get_default(key):
            name.append(f"{key}={value}".replace("_", "-"))
    name += [Path(args.dataset).stem, f"paired{args.paired:g}", args.unpaired, f"seed{args.seed}"]
    run = Path(args.out or Path("runs", "-".join(name)))
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    saved, state = {}, {}
    if args.resume:
        try:
            saved = json.loads((run / "args.json").read_text())
            p.set_defaults(
                **{k: saved[k] for k in vars(args).keys() & saved.keys() - {"device", "out"}}
            )
            if (run / "checkpoint.pt").exists():  # else it was stopped before there was one
                state = data.read_checkpoint(run / "checkpoint.pt")
                if set(state) != {"model", "optimizer", "epoch", "log"}:
                    raise ValueError("checkpoint.pt is not from a run")
        except Exception as error:  # missing, cut short, never a run, or with code in it
            reason = str(error).split("\n")[0].split(". ")[0]
            p.error(f"{run} holds no run to resume ({type(error).__name__}: {reason})")
        args = p.parse_args(argv)
    elif rank == 0 and os.path.exists(run / "checkpoint.pt"):  # False where no file can be
        p.error(f"{run} holds a run: continue it with --resume, or name another folder with --out")

    # Data and model. What a user got wrong is said in one sentence, before anything is written.
    options = {key: value for key, value in vars(args).items() if key not in common}
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    try:
        if args.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("this PyTorch finds no CUDA device: use --device cpu")
        if args.batch_size < world:
            raise ValueError(f"--batch-size {args.batch_size} is too small for {world} processes")
        dataset = data.load(args.dataset, args.data, args.limit)
        usual = p.get_default("paired"), p.get_default("unpaired")
        if dataset.mask is not None and (args.paired, args.unpaired) != usual:
            raise ValueError(f"{args.dataset} has a train_mask: leave out --paired and --unpaired")
        asked = args.paired, args.unpaired, args.seed, dataset.mask
        streams = data.pairing(len(dataset.train), dataset.names, *asked)
        spec = dataset.spec | {"width": args.width}
        for key in ("likelihoods", "weights"):
            spec |= {key: getattr(args, key).split(",")} if getattr(args, key) else {}
        torch.manual_seed(args.seed)
        model = SVAE(nets.modalities(**spec), args.latent_dim, **options)  # this script only
        data.refuse_values(dataset, model.modalities)
        model.refuse_untrained([shown for shown, _ in streams])  # this script only
    except (ValueError, OSError) as error:
        p.error(str(error))
    except RuntimeError as error:
        if "allocate" not in str(error):  # a CPU without memory raises no class of its own
            raise
        p.error("there is not enough memory for a model of these sizes")
    except KeyboardInterrupt:
        p.exit(130, f"\n{run}: stopped before its first step\n")
    record = {
        "version": 1,
        "script": Path(__file__).stem,
        "model": type(model).__name__,
        **vars(args),
    }
    record |= {
        "options": options,
        "spec": spec,
        "note": dataset.note,
        "examples": len(dataset.train),
    }
    record = json.loads(json.dumps(record))
    for key in record:
        if args.resume and key not in FREE and saved.get(key) != record[key]:
            p.error(
                f"{run} has {key} {saved.get(key)}, not {record[key]}, which --resume cannot change"
            )

    start, log = state.get("epoch", 0), state.get("log", [])
    if start > args.epochs:
        p.error(f"{run} has {start} epochs already, more than --epochs {args.epochs}")
    epoch = start
    try:
        if args.device == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        if world > 1 and not torch.distributed.is_initialized():
            torch.distributed.init_process_group("nccl" if args.device == "cuda" else "gloo")
        train, net = dataset.train.to(args.device), model.to(args.device)
        optimizer = torch.optim.Adam(model.parameters(), args.lr, fused=True)
        if state:
            try:
                model.load_state_dict(state["model"])
                optimizer.load_state_dict(state["optimizer"])
            except Exception as error:  # of other sizes or another model
                reason = " ".join(str(error).split("\n\t")[:2])[:300]  # the first of what differs
                p.error(f"{run / 'checkpoint.pt'} does not fit this model: {reason}")
            optimizer.param_groups[0]["lr"] = args.lr
        if world > 1:  # a stream of one modality leaves the other decoders unused
            net = nn.parallel.DistributedDataParallel(net, find_unused_parameters=True)
        if args.compile:
            net = torch.compile(net)

        sizes, steps = data.shares(streams, args.batch_size, args.sampling)
        fullest, index = streams[0]
        sample = data.show(
            train, fullest, index[:256].to(args.device)
        )  # for the nats of each epoch

        began = time.perf_counter()
        if rank == 0:
            run.mkdir(parents=True, exist_ok=True)
            write(run / "args.json", json.dumps(record, indent=1).encode())
            save(run, model, optimizer, start, log)
            weights = sum(w.numel() for w in model.parameters())
            print(f"{run}: {weights:,} weights, {len(train):,} examples", dataset.note, flush=True)
        for epoch in range(start + 1, args.epochs + 1):
            seed = 1_000_003 * args.seed + epoch
            torch.manual_seed(4_099 * seed + rank)  # the noise
            order = torch.Generator().manual_seed(seed)  # the batches, the same on every rank
            losses, total, epoch_began, tick = [], 0.0, time.perf_counter(), 0.0
            loader = data.batches(
                train, streams, args.batch_size, args.sampling, order, rank, world
            )
            for step, batch in enumerate(loader, 1):
                with torch.autocast(args.device, torch.bfloat16, enabled=args.amp):
                    loss = net(batch)  # (S,)
                optimizer.zero_grad(set_to_none=True)
                loss.sum().backward()
                optimizer.step()

                losses.append((loss.detach(), [[x is not None for x in xs] for _, xs in batch]))
                now = time.perf_counter()
                if now > tick + 1 or step == steps:  # read the losses: the only synchronisation
                    for at, (values, masks) in enumerate(losses, step + 1 - len(losses)):
                        for value, shown in zip(values.tolist(), masks):
                            total += value
                            if not math.isfinite(value):
                                what = "+".join(n for n, seen in zip(dataset.names, shown) if seen)
                                raise FloatingPointError(
                                    f"the loss of {what} is {value} in step {at}"
                                )
                    losses, tick = [], now
                    if rank == 0 and sys.stdout.isatty():
                        left = (now - epoch_began) / step * (steps - step)
                        print(
                            f"\repoch {epoch}, step {step} of {steps}, {left:.0f} s left", end=" "
                        )

            if world > 1:  # the mean over ranks is the objective of the union of their batches
                total = torch.tensor(total, device=args.device)
                torch.distributed.all_reduce(total)
                total = total.item() / world
            if rank == 0:
                seconds = time.perf_counter() - epoch_began
                speed = sum(sizes) * steps / seconds
                row = {"epoch": epoch, "objective": -total / steps}
                row |= {f"nats_{n}": value for n, value in zip(dataset.names, nats(model, sample))}
                log.append(row | {"examples_per_second": speed, "seconds": seconds})
                save(run, model, optimizer, epoch, log)
                left = (time.perf_counter() - began) / (epoch - start) * (args.epochs - epoch)
                text = "  ".join(
                    f"{key} {value:.2f}" for key, value in row.items() if key != "epoch"
                )
                text += f"  {speed:.0f} examples/s  {left / 60:.1f} minutes left"
                print(f"\repoch {epoch} of {args.epochs}  {text}", flush=True)
    except FloatingPointError as error:
        p.exit(
            2, f"\n{run}: epoch {epoch}: {error}; epoch {epoch - 1} is kept: --resume --lr less\n"
        )
    except RuntimeError as error:
        if "allocate" in str(error):
            why = f"not enough memory for a step in epoch {epoch}: smaller --batch-size"
        elif args.compile:
            why = f"with --compile: {data.one_line(error)}; go on without: --resume --no-compile"
        else:
            raise
        p.exit(2, f"\n{run}: {why}\n")
    except OSError as error:
        p.exit(2, f"\n{run} cannot be written ({error}); what it held is kept: --resume\n")
    except KeyboardInterrupt:
        p.exit(130, f"\n{run}: stopped in epoch {epoch}; add --resume to go on\n")
    if world > 1:
        torch.distributed.destroy_process_group()
    if rank == 0:
        print(f"python eval.py {run}")


if __name__ == "__main__":
    main()
