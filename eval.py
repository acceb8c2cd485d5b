"""Metrics, tables and figures of trained models. `python eval.py runs/a runs/b --figures figures`
evaluates; `python eval.py runs/a --fill new.npz --out filled.npz` fills in what new examples lack.

    fit = cca(x, y); correlation(fit, x, y)           canonical correlation, [meme] App. G
    linear_probe(train_z, train_y, test_z, test_y)    accuracy of a linear classifier of samples
    w2(mean1, std1, mean2, std2)                      2-Wasserstein distance, [meme] App. F

These are numpy on arrays and know nothing of what follows them: the evaluation of run folders on
their test split. There z is one sample of the posterior per example (--seed fixes it) and the
decoded mean is judged by an oracle, classifiers of the real images, whose own test accuracy stands
under every table. Metrics and figures that one data set alone has are in its file in benchmarks/,
those of a user's own arrays, and the filling in, in benchmarks/npz.py.

Shapes: N examples, B of a batch, K samples, L latent dimensions, M modalities, C classes.
[meme] is Joy et al., ICLR 2022; [poe] is "In Defense of Product-of-Experts".
"""

import importlib
import itertools
import json
import math
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

import data
import nets
from benchmarks import drawing, npz
from benchmarks.oracles import each, load_oracle
from benchmarks.tables import columns, grouped, listing, row_names, setting, table

# -------------------------------------------------------------------- numpy: arrays in, numbers out


class CCA(NamedTuple):
    mean_x: np.ndarray  # (Dx,)
    mean_y: np.ndarray  # (Dy,)
    wx: np.ndarray  # (Dx, k)
    wy: np.ndarray  # (Dy, k)
    correlations: np.ndarray  # (k,) S below: of the fit's projections if there is no ridge, falling


def cca(x, y, k=40, ridge=1e-3, whiten=True):
    """The k pairs of directions along which x (n, Dx), y (n, Dy) correlate most, [meme] App. G.
    -> CCA

        Cxx^-½ Cxy Cyy^-½ = U S V',   wx = Cxx^-½ U,   wy = Cyy^-½ V,   correlations S

    ridge, times the mean variance, is added to the diagonals of Cxx and Cyy. whiten=True: every
    projection has variance 1, up to the ridge. False: every joint vector [wx; wy] has length 1, as
    numerical solvers of the equivalent eigenproblem return it and the published code takes it; its
    k components then do not count alike in eq. (12).
    """
    x, y = np.asarray(x, float), np.asarray(y, float)
    mean_x, mean_y = x.mean(0), y.mean(0)
    x, y = x - mean_x, y - mean_y
    root_x, root_y = inverse_root(x, ridge), inverse_root(y, ridge)
    u, s, vt = np.linalg.svd(root_x @ (x.T @ y / (len(x) - 1)) @ root_y, full_matrices=False)
    wx, wy = root_x @ u[:, :k], root_y @ vt[:k].T
    if not whiten:
        length = np.sqrt((wx**2).sum(0) + (wy**2).sum(0))
        wx, wy = wx / length, wy / length
    return CCA(mean_x, mean_y, wx, wy, s[:k])


def inverse_root(x, ridge):
    """(cov + ridge · mean variance · I)^-½ of centred x (n, D); what has no variance drops out."""
    cov = x.T @ x / (len(x) - 1)
    values, vectors = np.linalg.eigh(cov + ridge * np.trace(cov) / len(cov) * np.eye(len(cov)))
    kept = values > 1e-12 * values.max()
    return (vectors[:, kept] / np.sqrt(values[kept])) @ vectors[:, kept].T


def correlation(fit, x, y):
    """Cosine of each pair's projections, centred by the fit's means, [meme] eq. (12). -> (n,)"""
    x, y = directions(fit, x, y)
    return (x * y).sum(1)


def chance_correlation(fit, x, y):
    """The mean of eq. (12) over all x (n, Dx) with all y (n, Dy), paired or not: what is generated
    without a look at the other has this, which need not be 0. -> a number"""
    x, y = directions(fit, x, y)
    return x.mean(0) @ y.mean(0)


def directions(fit, x, y):
    """The projections of x and of y, centred by the fit's means, of length 1. -> (n, k), (n, k)"""
    x, y = (x - fit.mean_x) @ fit.wx, (y - fit.mean_y) @ fit.wy
    return [p / np.maximum(np.linalg.norm(p, axis=1, keepdims=True), 1e-12) for p in (x, y)]


def logistic_regression(z, y, classes, l2=1e-4, tolerance=1e-6):
    """Newton's method for

        argmin_W  mean_n -log softmax(W'[z_n; 1])_y_n + l2/2 |W|²,    biases not penalised

    z (n, L), y (n,) integers below `classes` -> W (L + 1, C), at which no entry of the gradient
    exceeds `tolerance`, or after 100 steps, or where rounding ends the descent.
    """
    z = np.hstack([z, np.ones((len(z), 1))])
    n, d = z.shape
    penalty = np.full((d, 1), l2)
    penalty[-1] = 0
    truth = np.eye(classes)[y]  # (n, C)

    def loss(w):
        logits = z @ w
        logits -= logits.max(1, keepdims=True)
        p = np.exp(logits)
        total = p.sum(1, keepdims=True)
        cross_entropy = np.log(total).mean() - (logits * truth).sum() / n
        return cross_entropy + 0.5 * (penalty * w**2).sum(), p / total

    w = np.zeros((d, classes))
    value, p = loss(w)
    for _ in range(100):
        gradient = z.T @ (p - truth) / n + penalty * w
        if np.abs(gradient).max() < tolerance:
            break
        # E[zz' ⊗ (diag(p) - pp')]. It only steers the step, the gradient decides: single precision
        # will do
        pz = (z.astype("f4")[:, :, None] * p.astype("f4")[:, None]).reshape(n, -1)  # (n, d C)
        hessian = -(pz.T @ pz) / n
        for c in range(classes):
            hessian[c::classes, c::classes] += pz[:, c::classes].T @ z.astype("f4") / n
        hessian[np.diag_indices_from(hessian)] += np.repeat(penalty, classes) + 1e-6
        step = np.linalg.solve(hessian.astype(float), gradient.ravel()).reshape(w.shape)
        size = 1.0
        while (new := loss(w - size * step))[0] > value - 1e-4 * size * (step * gradient).sum():
            size /= 2
            if size < 1e-9:  # rounding: nothing is left to gain
                return w
        w, (value, p) = w - size * step, new
    return w


def linear_probe(train_z, train_y, test_z, test_y, l2=1e-4):
    """Test accuracy of multinomial logistic regression on z, scaled to variance 1 in training.

    z (n, L), y (n,) any labels; l2 as in logistic_regression.
    """
    train_z, test_z = np.asarray(train_z, float), np.asarray(test_z, float)
    mean, std = train_z.mean(0), train_z.std(0)
    std[std == 0] = 1
    classes, y = np.unique(train_y, return_inverse=True)
    w = logistic_regression((train_z - mean) / std, y, len(classes), l2)
    guess = ((test_z - mean) / std) @ w[:-1] + w[-1]
    return float((classes[guess.argmax(1)] == np.asarray(test_y)).mean())


def w2(mean1, scale1, mean2, scale2):
    """2-Wasserstein distance of two Gaussians ([meme] App. F, whose ||m1 + m2|| is a misprint).

        d² = ||m1 - m2||² + Tr(Σ1 + Σ2 - 2 (Σ1^½ Σ2 Σ1^½)^½)
        d² = ||m1 - m2||² + ||std1 - std2||²                          where both are diagonal

    means (..., d); scales: standard deviations (..., d) or covariances (..., d, d); leading axes
    broadcast. -> (...)
    """
    squared = ((mean1 - mean2) ** 2).sum(-1)
    if scale1.ndim == mean1.ndim:
        return np.sqrt(squared + ((scale1 - scale2) ** 2).sum(-1))
    values, vectors = np.linalg.eigh(scale1)
    root = (vectors * np.sqrt(np.maximum(values, 0))[..., None, :]) @ np.swapaxes(vectors, -1, -2)
    cross = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ scale2 @ root), 0)).sum(-1)
    traces = np.trace(scale1, axis1=-2, axis2=-1) + np.trace(scale2, axis1=-2, axis2=-1)
    return np.sqrt(np.maximum(squared + traces - 2 * cross, 0))


# ------------------------------------------------------------------------------- metrics of a model


def subsets(names):
    """What can be shown, as M booleans by name: top, bottom, both; of three also top+middle, ...,
    all."""
    found = {}
    for size in range(1, len(names) + 1):
        for chosen in itertools.combinations(names, size):
            label = "+".join(chosen)
            if size == len(names):
                label = "both" if size == 2 else "all"
            found[label] = tuple(name in chosen for name in names)
    return found


def singles(names):
    return {name: shown for name, shown in subsets(names).items() if sum(shown) == 1}


def views(dataset):
    """What is judged and drawn: what the data set's oracles see, else every modality by itself.
    -> {name: function of the M modalities}"""
    benchmark = data.benchmark(dataset.name)
    return benchmark.views(dataset) if hasattr(benchmark, "views") else each(dataset.names)


def in_parts(dataset):
    """Whether the modalities are parts of one image, which is judged as a whole."""
    return len(views(dataset)) == 1


def readings(means, dataset, oracles):
    """What the oracle of every view reads in the decoded modalities, and whether its members
    disagree. -> digits, disputed, each (views, B)"""
    read = [oracles[name](view(means)) for name, view in views(dataset).items()]
    return [torch.stack(parts) for parts in zip(*read)]


@torch.no_grad()
def judged(model, dataset, oracles, shown):
    """Every test example: z ~ q(z|shown), all modalities decoded, and what the oracles read.
    -> {view: (share that is the example's digit, share that is in dispute)}"""
    right, disputed = [], []
    for index in torch.arange(len(dataset.test)).split(500):
        means = model.decode(model.posterior(*data.show(dataset.test, shown, index)).sample())
        read, doubt = readings(means, dataset, oracles)
        right.append(read == dataset.test.labels[index])
        disputed.append(doubt)
    shares = [torch.cat(parts, 1).double().mean(1).tolist() for parts in (right, disputed)]
    return dict(zip(views(dataset), zip(*shares)))


def split_accuracy(model, dataset, oracles):
    """[poe] Table 1: the whole image from every subset of its parts; is it still the digit?
    -> metrics, and like them the shares in dispute"""
    accuracy, disputed = {}, {}
    for name, shown in subsets(dataset.names).items():
        (shares,) = judged(model, dataset, oracles, shown).values()
        accuracy[name], disputed[name] = shares
    return {"accuracy": accuracy}, {"accuracy": disputed}


def coherence(model, dataset, oracles):
    """[meme] Table 3: one modality is shown, each generated from it; is it the digit shown?
    -> metrics, and like them the shares in dispute"""
    found = [{"cross_coherence": {}, "self_coherence": {}} for _ in range(2)]
    for source, shown in singles(dataset.names).items():
        for target, shares in judged(model, dataset, oracles, shown).items():
            own = target == source
            section = "self_coherence" if own else "cross_coherence"
            for metrics, share in zip(found, shares):
                metrics[section][source if own else f"{source}->{target}"] = share
    return found


@torch.no_grad()
def joint_coherence(model, dataset, oracles, samples=10_000):
    """[poe] Fig. 8: the share of z ~ p(z) in whose images all oracles read the same digit.

    joint_entropy, in nats, is that of the digits they agree on: log 10 = 2.30 if all come up alike,
    0 if it is always the same one, which would make coherence meaningless. In dispute is a sample
    of which any image is.
    -> metrics, and like them the shares in dispute
    """
    parts = []
    for part in torch.arange(samples).split(500):
        means = model.decode(model.prior().sample((len(part),)))
        parts.append(readings(means, dataset, oracles))
    read, doubt = (torch.cat(found, 1) for found in zip(*parts))  # (views, samples)
    agreed = read[0][(read == read[0]).all(0)]
    frequency = agreed.bincount().double() / max(1, len(agreed))
    entropy = torch.special.entr(frequency).sum().item()
    metrics = {"joint_coherence": len(agreed) / samples, "joint_entropy": entropy}
    return metrics, {"joint_coherence": doubt.any(0).double().mean().item()}


@torch.no_grad()
def mutual_information(model, dataset, oracles, examples=1000):
    """[meme] Table 6: I(label, oracle's weights | generated image), nats; low where it looks real.

    The paper has a number per modality and does not say what from; here both: "svhn" from itself,
    "mnist->svhn".
    """
    found, index = {}, torch.arange(min(examples, len(dataset.test)))
    for source, shown in singles(dataset.names).items():
        means = model.decode(model.posterior(*data.show(dataset.test, shown, index)).sample())
        for target, view in views(dataset).items():
            key = target if target == source else f"{source}->{target}"
            found[key] = oracles[target].information(view(means)).double().mean().item()
    return {"mutual_information": found}


@torch.no_grad()
def latent_samples(model, split, shown, index):
    """z ~ q(z|shown), one per example of `index`. -> (n, L), numpy"""
    parts = [model.posterior(*data.show(split, shown, i)).sample() for i in index.split(500)]
    return torch.cat(parts).double().cpu().numpy()


def latent_accuracy(model, dataset):
    """[meme] Table 4: a linear classifier of z ~ q(z|x_m), fitted on every training image once."""
    accuracy = {}
    for m, (name, shown) in enumerate(singles(dataset.names).items()):
        index = np.unique(dataset.train.rows[m].cpu(), return_index=True)[1]
        index = torch.from_numpy(index)
        if dataset.mask is not None:
            index = index[dataset.mask[index, m]]
        train_z = latent_samples(model, dataset.train, shown, index)
        test_z = latent_samples(model, dataset.test, shown, torch.arange(len(dataset.test)))
        train_y, test_y = dataset.train.labels.cpu()[index], dataset.test.labels.cpu()
        accuracy[name] = linear_probe(train_z, train_y.numpy(), test_z, test_y.numpy())
    return {"latent_accuracy": accuracy}


@torch.no_grad()
def log_likelihood(model, dataset, examples=100, samples=1000, priors=None):
    """[meme] Table 2: the means of log p(x_m) of the modalities named in `priors`, whose p(z) is
    trained (None: all), of log p(x_1, ..., x_M) if they are two or more, of log p(x_m|all others).

    Nats, importance-weighted, log 1/K Σ_k w_k, without the weights of the likelihoods in training.
    """
    names, everything = dataset.names, (True,) * len(dataset.names)
    priors = names if priors is None else priors
    cases = {name: (shown, None) for name, shown in singles(names).items() if name in priors}
    if len(priors) > 1:
        cases[",".join(names)] = (everything, None)
    for name, shown in singles(names).items():
        others = tuple(not seen for seen in shown)
        cases[f"{name}|{','.join(n for n in names if n != name)}"] = (shown, others)
    z = model.prior().sample((1,))
    features = [math.prod(x.shape[1:]) for x in model.decode(z)]
    mixture = sum(map(len, getattr(model, "pseudo", ()))) * z.shape[-1]  # of p(z), if it is one
    at_once = 2**20 if z.device.type == "cpu" else 2**26  # numbers: what a cache, or a GPU, holds
    found = {}
    for case, (shown, others) in cases.items():
        decoded = sum(n for n, seen in zip(features, shown) if seen)
        held = max(decoded, mixture if others is None else 0)  # per sample and example
        block = min(samples, max(1, at_once // held))  # of samples
        blocks = [len(part) for part in torch.arange(samples).split(block)]
        nats, size = [], max(1, at_once // (block * held))
        for index in torch.arange(min(examples, len(dataset.test))).split(size):
            given = None if others is None else data.show(dataset.test, others, index)
            xs = data.show(dataset.test, shown, index)
            parts = [
                model.log_likelihood(*xs, samples=k, given=given) + math.log(k) for k in blocks
            ]
            nats.append(torch.stack(parts).logsumexp(0) - math.log(samples))
        found[case] = torch.cat(nats).double().mean().item()
    return {"log_likelihood": found}


def correlations(pairs, judged):
    """[meme] Table 5: the mean correlation, eq. (12), of every pair of arrays (x, y) in `judged`,
    {name: (x, y)}, in a CCA, k = 40, whitened, that is fit to the pairs (x, y); and by chance."""
    fit = cca(*pairs, k=40)
    found = {name: float(correlation(fit, x, y).mean()) for name, (x, y) in judged.items()}
    chance = {name: float(chance_correlation(fit, x, y)) for name, (x, y) in judged.items()}
    return {"correlation": found, "chance_correlation": chance}


def trained_priors(model, args, dataset):
    """The modalities whose own p(z) was trained. MEME's, eq. (4), is where examples show only that
    modality: they train the pseudo-samples of all others. With two or more every pseudo-sample, and
    the p(z) that is made of all, is trained. -> names"""
    names, pairs = dataset.names, (args["paired"], args["unpaired"])
    if not hasattr(model, "pseudo"):
        return names
    fixed = dict(mask=dataset.mask, groups=dataset.groups)
    streams = [shown for shown, _ in data.pairing(len(dataset.train), names, *pairs, **fixed)]
    return tuple(name for name, alone in singles(names).items() if alone in streams)


def evaluate(
    model, dataset, oracles, examples=100, samples=1000, seed=0, root="./data", priors=None
):
    """All metrics that apply to the data set, or, where it has its own, those.

    oracles: {view: Oracle}; examples, samples: N and K of the likelihoods, 0 examples: none;
    priors: as trained_priors gives them, None: all; what needs another is left out. "disputed"
    holds the shares of images on which the members of an oracle disagree, by the names of the
    metrics. What is under way is said on stderr.
    """
    torch.manual_seed(seed)
    model.eval()
    joint_prior = priors is None or len(priors) > 1
    benchmark = data.benchmark(dataset.name)
    if hasattr(benchmark, "evaluate"):
        say("what its benchmark measures")
        return benchmark.evaluate(model, dataset, root, seed)
    if hasattr(benchmark, "correlated"):
        say("correlations of what is generated")
        pairs, judged = benchmark.correlated(model, dataset, root)
        return correlations(pairs, {k: v for k, v in judged.items() if joint_prior or k != "joint"})
    metrics = {}
    if oracles:
        say("what the oracles read in generated images")
        judge = split_accuracy if in_parts(dataset) else coherence
        metrics, disputed = judge(model, dataset, oracles)
        if judge is coherence and joint_prior:
            joint, doubt = joint_coherence(model, dataset, oracles)
            metrics, disputed = metrics | joint, disputed | doubt
        metrics["disputed"] = disputed
        if judge is coherence:
            say("mutual information, how real images look")
            metrics |= mutual_information(model, dataset, oracles)
    elif is_own(dataset):
        metrics |= npz.evaluate(model, dataset, seed)
    if dataset.train.labels is not None and dataset.test.labels is not None:
        say("a linear classifier of z")
        metrics |= latent_accuracy(model, dataset)
    if examples:
        say(f"log-likelihoods of {examples:,} examples, {samples:,} samples of z each")
        metrics |= log_likelihood(model, dataset, examples, samples, priors)
    return metrics


def say(what):
    print(f"evaluating: {what} ...", file=sys.stderr)


def is_own(dataset):
    """Whether a data set has neither oracles nor metrics of its own: a user's arrays, say."""
    benchmark = data.benchmark(dataset.name)
    return not any(hasattr(benchmark, hook) for hook in ("views", "evaluate", "correlated"))


# ---------------------------------------------------------------------------- what figures show


@torch.no_grad()
def generations(model, dataset):
    """A column per label, of ten at most, and per modality shown the rows input, generated from
    itself, generated in the others: [meme] Figs. 3, 11-17. -> list of (label, images (n, C, H, W))

    Split images: two rows per subset of the parts, what is shown and the image regenerated from
    it: [poe] Figs. 3, 4.
    """
    split, names, rows = dataset.test, dataset.names, []
    labels = split.labels.tolist()
    index = torch.tensor([labels.index(label) for label in sorted(set(labels))[:10]])
    xs = split[index]
    for name, shown in subsets(names).items():
        means = model.decode(model.posterior(*data.show(split, shown, index)).sample())
        if in_parts(dataset):
            ((view, whole),) = views(dataset).items()
            seen = [x if s else torch.full_like(x, 0.5) for x, s in zip(xs, shown)]
            rows += [(name, whole(seen)), (f"→ {view}", whole(means))]
        elif sum(shown) == 1:
            m = shown.index(True)
            rows += [(name, xs[m]), (f"{name} → {name}", means[m])]
            rows += [(f"{name} → {names[k]}", means[k]) for k in range(len(names)) if k != m]
    return rows


@torch.no_grad()
def joint_samples(model, dataset, oracles, columns=10, lines=5):
    """Samples of the prior, what is made from one z one below the other: [poe] Figs. 3, 5.

    -> list of (label, images (n, C, H, W)), and for each what the oracle reads and whether all
    oracles read that, both (n,); None without oracles
    """
    rows, read = [], []
    for _ in range(lines):
        means = model.decode(model.prior().sample((columns,)))
        rows += [(name, view(means)) for name, view in views(dataset).items()]
        if oracles:
            digits, _ = readings(means, dataset, oracles)
            agree = (digits == digits[0]).all(0)
            read += [(digit, agree) for digit in digits]
    return rows, read or None


@torch.no_grad()
def distances(model, split, a, b, n=500):
    """W2 between q(z|x_a) and q(z|x_b) of n random examples that differ in x_a. -> (n, n), index"""
    index = torch.from_numpy(np.unique(split.rows[a].cpu(), return_index=True)[1])
    index, moments = index[torch.randperm(len(index))[:n]], []
    for m in (a, b):
        shown = [k == m for k in range(len(split.bases))]
        q = model.posterior(*data.show(split, shown, index))
        moments += [q.mean.double().cpu().numpy(), q.stddev.double().cpu().numpy()]
    mean_a, std_a, mean_b, std_b = moments  # each (n, L)
    return np.stack([w2(mu, std, mean_b, std_b) for mu, std in zip(mean_a, std_a)]), index


def latent_points(model, dataset, n=1000):
    """z ~ q(z|x_m) of n test examples for every modality m, one after the other.
    -> (M n, L), their labels (M n,)"""
    index = torch.arange(min(n, len(dataset.test)))
    shown = singles(dataset.names).values()
    z = np.concatenate([latent_samples(model, dataset.test, s, index) for s in shown])
    return z, np.tile(dataset.test.labels[index].cpu(), len(dataset.names))


def gradient_ratios(model, xs, draws=30):
    """[meme] Fig. 10: log10 |mean| / std of every entry of MEME's gradient, with and without that
    of w, clamped to [-4, 2]; mean and std are over draws of z.
    -> {"w detached": {"encoders": (n,), "decoders": (n,)}, "eq. (7)": ...}"""
    parts = [list(getattr(model, part).parameters()) for part in ("encoders", "decoders")]
    sizes = [sum(weight.numel() for weight in part) for part in parts]
    found, trained = {}, (model.kl, model.full_gradient)
    model.kl = "sample"  # the form of eq. (6), of which eq. (7) is the gradient
    for name, full in (("w detached", False), ("eq. (7)", True)):
        model.full_gradient, total, squares = full, 0, 0
        for _ in range(draws):
            gradient = torch.autograd.grad(model.objective(*xs), sum(parts, []))
            gradient = torch.cat([g.flatten() for g in gradient]).double()
            total, squares = total + gradient, squares + gradient**2
        mean = total / draws
        std = (squares / draws - mean**2).clamp_min(0).sqrt()
        ratios = [
            (m.abs() / s)[s > 0].log10().cpu().clamp(-4, 2)
            for m, s in zip(mean.split(sizes), std.split(sizes))
        ]
        found[name] = dict(zip(("encoders", "decoders"), ratios))
    model.kl, model.full_gradient = trained
    return found


# ---------------------------------------------------------------------------------- runs and tables


SCRIPTS = ("meme", "svae", "vaevae", "mmvae", "mvae")
HOW = "train one, as with `python meme.py`, and name the folder that it prints"
REQUIRED = dict(script=str, model=str, dataset=str, data=str, spec=dict, latent_dim=int)
REQUIRED |= dict(options=dict, paired=(int, float), unpaired=str, epochs=int, seed=int)


class Run(NamedTuple):
    folder: Path
    args: dict  # args.json
    epoch: int  # how far it was trained
    minutes: float  # how long that took, where it was trained
    model: nn.Module


def load_run(folder, device="cpu"):
    """The trained model of a run folder. ValueError, in a sentence, when it is not whole."""
    folder = Path(folder)
    if not folder.is_dir():
        beside = [path for path in folder.parent.glob("*") if path.is_dir()]
        raise ValueError(f"there is no run folder {folder}: {data.nearest(folder, beside, HOW)}")
    for name in ("args.json", "checkpoint.pt"):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} is no run folder, or was never trained: it has no {name}")
    try:
        args = json.loads((folder / "args.json").read_text())
        version = args["version"]
        whole = all(isinstance(args.get(key), kind) for key, kind in REQUIRED.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        version, whole = 1, False
    if version != 1:
        raise ValueError(f"{folder} was written by another version ({version}, not 1)")
    if not whole:
        raise ValueError(f"{folder / 'args.json'} is damaged: train the model again")
    if not (folder / "checkpoint.pt").stat().st_size:
        raise ValueError(f"{folder / 'checkpoint.pt'} is empty: train the model again")
    try:
        if args["script"] not in SCRIPTS:  # nothing else is imported
            raise ValueError(f"there is no script {args['script']!r}")
        saved = data.read_checkpoint(folder / "checkpoint.pt", device)
        cls = getattr(importlib.import_module(args["script"]), args["model"])
        model = cls(nets.modalities(**args["spec"]), args["latent_dim"], **args["options"])
        model.load_state_dict(saved["model"])
        minutes = sum(row["seconds"] for row in saved["log"]) / 60
        return Run(folder, args, int(saved["epoch"]), minutes, model.to(device).eval())
    except Exception as error:  # whatever a damaged file or a changed class leads to
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{folder} cannot be loaded: {reason}") from None


def read_metrics(folder):
    """metrics.json of a run folder, as `measure` makes it. ValueError when it is not whole."""
    try:
        found = json.loads((folder / "metrics.json").read_text())
        whole = all(isinstance(found["run"].get(k), kind) for k, kind in REQUIRED.items())
        whole = whole and {"data", "epoch", "minutes", "samples", "examples", "pseudo"} <= {*found}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        whole = False
    if not whole:
        raise ValueError(f"{folder / 'metrics.json'} is damaged: evaluate the run again")
    print(f"{folder} has no checkpoint: shown from its metrics.json", file=sys.stderr)
    return found | {"folder": str(folder)}


# ------------------------------------------------------------------------------- figures of runs


def draw(run, dataset, oracles, folder, root, seed=0):
    """All figures of one run, named after it. -> generations' rows, of labelled images"""
    torch.manual_seed(seed)
    heading, rows = drawing.title(run), []

    def path(what):
        found = folder / f"{run.folder.resolve().name}-{what}.png"
        print(f"drawing {found} ...", file=sys.stderr)
        return found

    images = all(map(data.drawable, dataset.test.bases))
    labelled = dataset.test.labels is not None
    if images:
        joint, read = joint_samples(run.model, dataset, oracles)
        above = f"{heading} · samples of p(z)"
        if len(trained_priors(run.model, run.args, dataset)) < 2:
            above += "\n(of pseudo-samples, which only single modalities train)"
        drawing.page(joint, above, path("joint"), read)
    if images and labelled:
        rows = generations(run.model, dataset)
        if not is_own(dataset):
            drawing.page(rows, heading, path("generation"))
    if labelled:
        z, labels = latent_points(run.model, dataset)
        drawing.latent_map(z, labels, dataset.names, heading, path("latent"))
    benchmark = data.benchmark(dataset.name)
    if hasattr(benchmark, "draw"):
        benchmark.draw(run, dataset, root, path("generation"))
    elif is_own(dataset):
        npz.draw(run, dataset, path("generation"), seed)
    if hasattr(benchmark, "evaluate"):  # what is measured and shown there is all its own
        return rows
    pairs = []
    for a, b in itertools.combinations(range(len(dataset.names)), 2):
        d, index = distances(run.model, dataset.test, a, b)
        same = dataset.test.labels[index].cpu().numpy() if labelled else np.arange(len(d))
        pairs.append(((dataset.names[a], dataset.names[b]), d, same))
    drawing.relatedness(pairs, heading, path("relatedness"))
    if hasattr(run.model, "full_gradient"):
        xs = dataset.test[torch.arange(min(64, len(dataset.test)))]
        drawing.gradient_histogram(gradient_ratios(run.model, xs), heading, path("gradient"))
    return rows


def draw_models(results, pages, folder):
    """A page per data set with a row per model, of its runs with most pairs and their first seed.

    pages: {folder of a run: generations' rows}
    """
    for name in dict.fromkeys(r["run"]["dataset"] for r in results if pages.get(r["folder"])):
        found = [r for r in results if r["run"]["dataset"] == name and pages.get(r["folder"])]
        most = max(r["run"]["paired"] for r in found)
        groups = grouped(r for r in found if r["run"]["paired"] == most)
        of = "masked" if drawing.is_masked(groups[0][0]["run"]) else f"f = {most:g}"
        firsts = [min(group, key=lambda r: r["run"]["seed"])["folder"] for group in groups]
        rows = dict(zip(row_names(groups, ["paired"]), (pages[folder] for folder in firsts)))
        if len(rows) > 1:
            path = folder / f"{Path(name).stem}-models.png"
            drawing.page(drawing.side_by_side(rows), f"{Path(name).name} · {of}", path)


def curves(results, folder, against="paired"):
    """Every metric against a flag, the paired fraction: a line per model and setting, mean and
    spread over seeds.

    One figure per data set with two values of the flag or more ([meme] Figs. 5-7, 21, 22; [poe]
    Figs. 6-9).
    """
    flag = against.replace("_", "-")
    axis = "the paired fraction f" if against == "paired" else flag
    if against == "paired":
        results = [r for r in results if not drawing.is_masked(r["run"])]
    for name in dict.fromkeys(r["run"]["dataset"] for r in results):
        groups = grouped(r for r in results if r["run"]["dataset"] == name)
        values = [value for g in groups if (value := setting(g[0]).get(against)) is not None]
        if not values or not all(isinstance(value, int | float) for value in values):
            own = [k for k, v in setting(groups[0][0]).items() if isinstance(v, int | float)]
            near = data.nearest(against, own, f"they have {', '.join(own)}")
            what = f"--against {against}: no flag of these runs with numbers as values"
            raise ValueError(f"{what}: {near}")
        if len(set(values)) > 1:
            lines, stem = lines_of(groups, against), Path(name).stem
            drawing.curves(lines, f"{stem} · against {axis}", folder / f"{stem}-{flag}.png")


def lines_of(groups, against):
    """The runs of a data set by model and setting. groups: of grouped
    -> list of (model, label, {value of the flag: {title of a column: numbers}})"""
    lines = {}  # (model and flags, unpaired, f): {value of the flag: ...}
    told = ("paired", "unpaired", "epoch" if against == "epochs" else against)
    for label, group in zip(row_names(groups, told), groups):
        own, cells = setting(group[0]), [columns(r) for r in group]
        if own.get(against) is not None:
            points = {t: [c.get(t, math.nan) for c in cells] for t in cells[0]}
            f = None if against == "paired" else own["paired"]
            lines.setdefault((label, own["unpaired"], f), {})[own[against]] = points
    if against == "paired":  # a run on whole pairs is the end of every line of its model but
        same = [key for key in lines if key[1] != "all"]  # "all", which has single streams too
        ends = {key[0]: lines[key][1] for key in same if 1 in lines[key]}
        whole = [key for key in same if set(lines[key]) == {1}]
        for key in same:
            if key not in whole and key[0] in ends:
                lines[key].setdefault(1, ends[key[0]])
        for key in whole:  # drawn as the end of another line
            if any(other[0] == key[0] for other in same if other not in whole):
                del lines[key]
    found = []
    for (label, unpaired, f), line in lines.items():
        words = [label, unpaired, *([] if f is None else [f"f = {f:g}"])]
        found.append((label.split()[0].rstrip("*"), " ".join(words), line))
    return found


def compare(results, folder):
    """The figures that a data set has of its own for several runs."""
    for name in dict.fromkeys(r["run"]["dataset"] for r in results):
        benchmark = data.benchmark(name)
        if hasattr(benchmark, "compare"):
            benchmark.compare([r for r in results if r["run"]["dataset"] == name], folder)


# -------------------------------------------------------------------------- python eval.py runs/...


def prepare(name, root, device, spec):
    """A data set as a run of this spec saw it, on the device, with its oracles.
    -> Dataset, {view: Oracle}, {view: test accuracy}"""
    constants = spec.get("standardise", {})
    dataset = data.load(name, root, likelihoods=spec.get("likelihoods"), constants=constants)
    dataset = dataset._replace(train=dataset.train.to(device), test=dataset.test.to(device))
    found = {}
    if hasattr(data.benchmark(name), "views"):
        found = {view: load_oracle(dataset, view, root) for view in views(dataset)}
    oracles = {view: oracle for view, (oracle, _) in found.items()}
    return dataset, oracles, {view: accuracy for view, (_, accuracy) in found.items()}


def grey_bernoulli(model, dataset):
    """Whether a Bernoulli likelihood scores values between 0 and 1."""
    pairs = zip(model.modalities, dataset.test.bases)
    return any(m.likelihood == "bernoulli" and base.dtype != torch.bool for m, base in pairs)


def measure(run, dataset, oracles, accuracies, root, args):
    """What metrics.json of a run holds. ValueError if it was trained on other data. -> dict"""
    kinds = ("shapes", "vocabulary", "classes")
    fits = [run.args["spec"].get(k) == dataset.spec.get(k) for k in kinds]
    fits.append([m.name for m in run.model.modalities] == list(dataset.names))
    if not all(fits) or run.args.get("note", "") != dataset.note:
        raise ValueError(f"{run.folder} was trained on other data than {dataset.name} holds now")
    print(f"evaluating {run.folder} ...", file=sys.stderr)
    examples = len(dataset.test) if args.full else min(100, len(dataset.test))
    examples = 0 if args.no_likelihoods else examples
    samples, priors = args.samples or SAMPLES, trained_priors(run.model, run.args, dataset)
    options = examples, samples, args.seed, root, priors
    return evaluate(run.model, dataset, oracles, *options) | {
        "prior": len(priors) > 1,
        "oracle": accuracies,
        "data": f"{dataset.name}: {dataset.note}" if dataset.note else dataset.name,
        "run": run.args,
        "folder": str(run.folder),
        "epoch": run.epoch,
        "minutes": run.minutes,
        "samples": samples,
        "examples": examples,
        "pseudo": grey_bernoulli(run.model, dataset),
    }


def finite(value):
    """JSON has no NaN: None in its place."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def parser(usual):
    p = data.Parser(
        "Measures what trained models do with test examples, or has one fill in what new ones lack.",
        "runs/RUN [runs/RUN ...] [--figures DIR] [options]",
        TERMS,
    )
    flag = p.add_argument
    flag("runs", nargs="+", help="folders of runs, as the training scripts print them")
    flag("--figures", metavar="DIR", type=Path, help="draw what is measured, into this folder")
    flag("--data", metavar="DIR", help="folder of the data sets, if it is not that of the training")
    flag("--seed", type=data.at_least(0), default=0, help="fixes the random draws of z")
    what = f"draws of z for each log-likelihood (default: {SAMPLES:,}); with --fill: see below"
    flag("--samples", metavar="N", type=data.at_least(1), help=what)
    flag("--full", action="store_true", help="log-likelihoods of all test examples, not of 100")
    flag("--no-likelihoods", action="store_true", help="no log-likelihoods, which take longest")
    flag("--paper", action="store_true", help="beside ours, what the two papers report")
    flag("--against", metavar="FLAG", default="paired", help="x-axis of the curves: see below")
    flag("--device", default=usual, choices=["cuda", "cpu"], help="where to compute")
    group = p.add_argument_group("to fill in what new examples lack, instead of measuring")
    group.add_argument("--fill", metavar="NEW.npz", help="the new examples: see below")
    group.add_argument("--out", metavar="FILLED.npz", help="file to write")
    return p


SAMPLES = 1000  # K of a log-likelihood
TERMS = """\
z is a model's latent variable, q(z|x) its encoder, a distribution over z given what is shown of an
example, p(x|z) its decoder. Test examples are those that the data set keeps back from training.

Measuring writes metrics.json into the folder of each run. Of one run every metric is printed with its
meaning; of several a table, in Markdown, a row for all runs that differ in --seed alone. A folder
without a checkpoint is shown from its metrics.json. --figures draws test examples beside what is
generated from them, and where their z lie; of several runs also a curve of every metric against a
flag of training: `paired`, the fraction of examples that show all modalities, or another, as in
--against epochs.

NEW.npz has arrays named like the modalities of the run, a row per example. Any may be absent; where
an array `mask`, examples x modalities, is false, an entry counts as missing. FILLED.npz gets the
mean and the deviation of q(z|what a row shows), latent_mean and latent_std, and of every modality
the mean given what the row shows, whether it is missing or not, in the data's own shapes and units.
With --samples N it is N values instead, one for each draw of z: how far they differ tells how
certain the model is."""


def fill(run, args):
    """--fill: writes args.out and says what is in it."""
    standard = run.args["spec"].get("standardise", {})
    shown = npz.fill(run.model, standard, args.fill, args.out, args.samples, args.seed)
    print(f"{args.out} has latent_mean and latent_std of {len(shown):,} examples, and of each")
    for modality, seen in zip(run.model.modalities, shown.T):
        name = drawing.label(modality.name)
        print(f"    {name}, shown in {seen.sum():,} rows, filled in in {(~seen).sum():,}")


def main(argv=None):
    usual = "cuda" if torch.cuda.is_available() else "cpu"
    p = parser(usual)
    args = p.parse_args(argv)
    if args.device == "cuda" and usual == "cpu":
        p.error("this PyTorch finds no CUDA device: use --device cpu")
    if bool(args.fill) != bool(args.out):
        p.error("--fill NEW.npz and --out FILLED.npz go together")
    folders = list({Path(folder).resolve(): Path(folder) for folder in args.runs}.values())
    if args.fill and len(folders) > 1:
        p.error(f"--fill is by one run, not by {len(folders)}")
    prepared, results, pages, failed = {}, [], {}, False
    for folder in folders:
        try:
            if args.fill:
                fill(load_run(folder, args.device), args)
                continue
            if not (folder / "checkpoint.pt").exists() and (folder / "metrics.json").exists():
                results.append(read_metrics(folder))
                continue
            run = load_run(folder, args.device)
            name, root, spec = run.args["dataset"], args.data or run.args["data"], run.args["spec"]
            seen = name, root, json.dumps([spec.get(k) for k in ("likelihoods", "standardise")])
            if seen not in prepared:
                prepared[seen] = prepare(name, root, args.device, spec)
            metrics = measure(run, *prepared[seen], root, args)
            results.append(metrics)
            text = json.dumps(finite(metrics), indent=1, ensure_ascii=False)
            data.replace(run.folder / "metrics.json", lambda file: file.write(text.encode()))
            if args.figures:
                dataset, oracles, _ = prepared[seen]
                shown = draw(run, dataset, oracles, args.figures, root, args.seed)
                pages[metrics["folder"]] = shown
        except KeyboardInterrupt:
            p.exit(130, f"\n{p.prog}: stopped; metrics.json of the runs before is written\n")
        except (ValueError, OSError, RuntimeError, MemoryError) as error:  # of a Cholesky, say
            print(f"{p.prog}: {data.sentence(error)}", file=sys.stderr)
            failed = True
    if results:
        single = len(folders) == 1
        print(listing(results[0], args.paper) if single else table(results, args.paper))
    try:
        if results and args.figures:
            draw_models(results, pages, args.figures)
            curves(results, args.figures, args.against.replace("-", "_"))
            compare(results, args.figures)
    except (ValueError, OSError) as error:
        print(f"{p.prog}: {data.sentence(error)}", file=sys.stderr)
        failed = True
    if failed:
        sys.exit(2)


if __name__ == "__main__":
    main()
