"""Metrics, tables and figures of trained models.

    python eval.py runs/a runs/b --figures figures             evaluate on the test examples
    python eval.py runs/a --fill new.npz --out filled.npz      fill in what new examples lack
    python eval.py results/glyphs.jsonl                        print a table of saved results

The first half is pure numpy, independent of the rest of the file:

    fit = cca(x, y); correlation(fit, x, y)           canonical correlation, [meme] App. G
    linear_probe(train_z, train_y, test_z, test_y)    accuracy of a linear classifier of samples
    w2(mean1, scale1, mean2, scale2)                  2-Wasserstein distance, [meme] App. F

The rest evaluates runs. z is one sample of the posterior per example (--seed fixes it); the
decoded mean is judged by oracles, classifiers of the real images, whose own test accuracy stands
under each table. Metrics and figures of a single data set are in its file in benchmarks/; those of
a user's own arrays, and --fill, in benchmarks/npz.py.

Shapes: N examples, B of a batch, K samples, L latent dimensions, M modalities, C classes. A mask is
M booleans, the modalities that are shown.
[meme] is Joy et al., ICLR 2022; [poe] is "In Defense of Product-of-Experts".
"""

import argparse
import importlib
import itertools
import json
import math
import sys
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

# -------------------------------------------------------------------- numpy: arrays in, numbers out


class CCA(NamedTuple):
    mean_x: np.ndarray  # (Dx,)
    mean_y: np.ndarray  # (Dy,)
    wx: np.ndarray  # (Dx, k)
    wy: np.ndarray  # (Dy, k)
    correlations: np.ndarray  # (k,) S below, decreasing; without a ridge those of the projections


def cca(x, y, k=40, ridge=1e-3, whiten=True):
    """Canonical correlation analysis, [meme] App. G: the k pairs of directions along which x
    (n, Dx) and y (n, Dy) correlate most. -> CCA

        Cxx^-½ Cxy Cyy^-½ = U S V',   wx = Cxx^-½ U,   wy = Cyy^-½ V,   correlations S

    ridge, times the mean variance, is added to the diagonals of Cxx and Cyy. whiten=True: every
    projection has variance 1, up to the ridge. False: every joint vector [wx; wy] has length 1, as
    in the published code, which takes the eigenvectors of the equivalent eigenproblem; the k
    components then have different weights in eq. (12).
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
    """(cov + ridge · mean variance · I)^-½ of centred x (n, D), zero along directions without
    variance. -> (D, D)"""
    cov = x.T @ x / (len(x) - 1)
    values, vectors = np.linalg.eigh(cov + ridge * np.trace(cov) / len(cov) * np.eye(len(cov)))
    kept = values > 1e-12 * values.max()
    return (vectors[:, kept] / np.sqrt(values[kept])) @ vectors[:, kept].T


def correlation(fit, x, y):
    """Cosine of the projections of each pair, centred by the means of the fit, [meme] eq. (12).
    -> (n,)"""
    x, y = projections(fit, x, y)
    return (x * y).sum(1)


def chance_correlation(fit, x, y):
    """The mean of eq. (12) over every x (n, Dx) with every y (n, Dy): the value, not always 0, that
    a generator reaches which ignores its input. -> a number"""
    x, y = projections(fit, x, y)
    return x.mean(0) @ y.mean(0)


def projections(fit, x, y):
    """Unit vectors along the projections of x and y, centred by the means of the fit.
    -> (n, k), (n, k)"""
    x, y = (x - fit.mean_x) @ fit.wx, (y - fit.mean_y) @ fit.wy
    return [p / np.maximum(np.linalg.norm(p, axis=1, keepdims=True), 1e-12) for p in (x, y)]


def correlations(pairs, judged):
    """[meme] Table 5: the mean correlation of each pair of arrays in `judged`, {name: (x, y)}, and
    that by chance, in a CCA (k = 40, whitened) that is fit to the pairs (x, y). -> metrics"""
    fit = cca(*pairs, k=40)
    return {
        "correlation": {k: float(correlation(fit, x, y).mean()) for k, (x, y) in judged.items()},
        "chance_correlation": {
            k: float(chance_correlation(fit, x, y)) for k, (x, y) in judged.items()
        },
    }


def logistic_regression(z, y, classes, l2=1e-4, tolerance=1e-6):
    """Multinomial logistic regression by Newton's method:

        argmin_W  mean_n -log softmax(W'[z_n; 1])_y_n + l2/2 |W|²,    biases not penalised

    z (n, L), y (n,) integers below `classes` -> W (L + 1, C). It stops when no entry of the
    gradient exceeds `tolerance`, after 100 steps, or when rounding ends the descent.
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
        # E[zz' ⊗ (diag(p) - pp')], in single precision: only the step depends on it, not the result
        pz = (z.astype("f4")[:, :, None] * p.astype("f4")[:, None]).reshape(n, -1)  # (n, d C)
        hessian = -(pz.T @ pz) / n
        for c in range(classes):
            hessian[c::classes, c::classes] += pz[:, c::classes].T @ z.astype("f4") / n
        hessian[np.diag_indices_from(hessian)] += np.repeat(penalty, classes) + 1e-6
        step = np.linalg.solve(hessian.astype(float), gradient.ravel()).reshape(w.shape)
        size = 1.0
        while (new := loss(w - size * step))[0] > value - 1e-4 * size * (step * gradient).sum():
            size /= 2
            if size < 1e-9:  # rounding: no step lowers the loss
                return w
        w, (value, p) = w - size * step, new
    return w


def linear_probe(train_z, train_y, test_z, test_y, l2=1e-4):
    """Test accuracy of multinomial logistic regression on z, standardised by the training examples.

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
    """2-Wasserstein distance of two Gaussians, [meme] App. F, whose ||m1 + m2|| is a misprint.

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

try:
    import torch
    from torch.distributions import MixtureSameFamily

    import data
    import nets
    from benchmarks import drawing, figures, npz
    from benchmarks.oracles import each, load_oracle
    from benchmarks.tables import read_results, report, save_metrics, save_result, table
except ModuleNotFoundError as error:  # without torch all above can be imported
    if error.name != "torch":
        raise


def subsets(names):
    """Every non-empty subset of the modalities: top, bottom, both; of three also top+middle, ...,
    all. -> {name: mask}"""
    masks = {}
    for size in range(1, len(names) + 1):
        for chosen in itertools.combinations(names, size):
            label = "+".join(chosen)
            if size == len(names):
                label = "both" if size == 2 else "all"
            masks[label] = tuple(name in chosen for name in names)
    return masks


def singles(names):
    """Every modality alone. -> {name: mask}"""
    return {name: mask for name, mask in subsets(names).items() if sum(mask) == 1}


def views(dataset):
    """The images that oracles judge, or, in a data set without oracles, every modality by itself.
    -> {name: function of the M modalities}"""
    benchmark = data.benchmark(dataset.name)
    return benchmark.views(dataset) if hasattr(benchmark, "views") else each(dataset.names)


def in_parts(dataset):
    """True where the modalities are parts of one image, which is judged as a whole."""
    return len(views(dataset)) == 1


def generate(model, split, mask, index):
    """One sample z ~ q(z|mask's modalities) per example, decoded. -> M means"""
    with torch.no_grad():
        (z,) = npz.posterior_samples(model, data.select(split, mask, index))
        return model.decode(z)


def predict(means, dataset, oracles):
    """The oracle of every view on decoded modalities.
    -> predicted digits, disagreement of its members, each (views, B)"""
    with torch.no_grad():
        outputs = [oracles[name](view(means)) for name, view in views(dataset).items()]
    return [torch.stack(parts) for parts in zip(*outputs)]


def judge(model, dataset, oracles, mask):
    """Generate from every test example, of which `mask` is shown, and let the oracles judge.
    -> {view: (accuracy, share of the images on which the oracle's members disagree)}"""
    correct, disagreement = [], []
    for index in torch.arange(len(dataset.test)).split(500):
        means = generate(model, dataset.test, mask, index)
        digits, doubt = predict(means, dataset, oracles)
        correct.append(digits == dataset.test.labels[index])
        disagreement.append(doubt)
    shares = [
        torch.cat(parts, 1).cpu().double().mean(1).tolist() for parts in (correct, disagreement)
    ]
    return dict(zip(views(dataset), zip(*shares)))


def split_accuracy(model, dataset, oracles):
    """[poe] Table 1: accuracy of the whole image, regenerated from every subset of its parts.
    -> metrics; the oracles' disagreement, in the same shape"""
    accuracy, disagreement = {}, {}
    for name, mask in subsets(dataset.names).items():
        (shares,) = judge(model, dataset, oracles, mask).values()
        accuracy[name], disagreement[name] = shares
    return {"accuracy": accuracy}, {"accuracy": disagreement}


def coherence(model, dataset, oracles):
    """[meme] Table 3: the share of images with the right digit, generated from one modality in the
    others (cross coherence) and in itself (self coherence).
    -> metrics; the oracles' disagreement, in the same shape"""
    metrics = {"cross_coherence": {}, "self_coherence": {}}
    disagreement = {"cross_coherence": {}, "self_coherence": {}}
    for source, mask in singles(dataset.names).items():
        for target, shares in judge(model, dataset, oracles, mask).items():
            section, key = "cross_coherence", f"{source}->{target}"
            if target == source:
                section, key = "self_coherence", source
            metrics[section][key], disagreement[section][key] = shares
    return metrics, disagreement


def joint_coherence(model, dataset, oracles, samples=10_000):
    """[poe] Fig. 8: the share of z in whose images all oracles predict the same digit: of samples
    of p(z) and, as aggregate_coherence, of the aggregate posterior. Priors differ between models
    (MEME's is itself a mixture of encodings), and a joint coherence of p(z) compares them, too.

    joint_entropy, in nats, is that of the digits on which they agree: log 10 = 2.30 if all are
    equally frequent, 0 if it is always the same one, which makes coherence meaningless. The members
    of the oracles disagree on a sample if those of any oracle do.
    -> metrics; the oracles' disagreement, in the same shape
    """
    with torch.no_grad():
        sources = {
            "joint": model.prior().sample((samples,)),
            "aggregate": npz.aggregate_samples(model, dataset.train, samples),
        }
    metrics, disagreement = {}, {}
    for name, z in sources.items():
        share, entropy, doubt = agreement(model, dataset, oracles, z)
        metrics |= {f"{name}_coherence": share, f"{name}_entropy": entropy}
        disagreement[f"{name}_coherence"] = doubt
    return metrics, disagreement


def agreement(model, dataset, oracles, z):
    """The share of z in whose images all oracles predict the same digit, the entropy of these
    digits in nats, and the share on which the members of an oracle disagree."""
    parts = []
    for part in z.split(500):
        with torch.no_grad():
            means = model.decode(part)
        parts.append(predict(means, dataset, oracles))
    digits, doubt = (torch.cat(outputs, 1) for outputs in zip(*parts))  # (views, samples)
    agreed = digits[0][(digits == digits[0]).all(0)]
    frequency = agreed.cpu().bincount().double() / max(1, len(agreed))
    entropy = torch.special.entr(frequency).sum().item()
    return len(agreed) / len(z), entropy, doubt.any(0).cpu().double().mean().item()


def mutual_information(model, dataset, oracles, examples=1000):
    """[meme] Table 6: I(label, oracle's weights | generated image), nats; low for realistic images.

    The paper has one number per modality and does not say from which source; here every source is
    listed: "svhn" is SVHN from itself, "mnist->svhn" SVHN from MNIST.
    """
    information, index = {}, torch.arange(min(examples, len(dataset.test)))
    for source, mask in singles(dataset.names).items():
        means = generate(model, dataset.test, mask, index)
        for target, view in views(dataset).items():
            key = target if target == source else f"{source}->{target}"
            with torch.no_grad():
                nats = oracles[target].information(view(means))
            information[key] = nats.cpu().double().mean().item()
    return {"mutual_information": information}


def latent_samples(model, split, mask, index):
    """z ~ q(z|mask's modalities), one per example of `index`. -> (n, L), numpy"""
    with torch.no_grad():
        parts = [model.posterior(*data.select(split, mask, i)).sample() for i in index.split(500)]
    return torch.cat(parts).cpu().double().numpy()


def latent_accuracy(model, dataset):
    """[meme] Table 4: accuracy of a linear classifier of z ~ q(z|x_m), fit on every training image
    once."""
    accuracy = {}
    for m, (name, mask) in enumerate(singles(dataset.names).items()):
        index = np.unique(dataset.train.rows[m].cpu(), return_index=True)[1]
        index = torch.from_numpy(index)
        if dataset.mask is not None:
            index = index[dataset.mask[index, m]]
        train_z = latent_samples(model, dataset.train, mask, index)
        shown = torch.arange(len(dataset.test))
        if dataset.test_mask is not None:
            shown = shown[dataset.test_mask[:, m]]
        test_z = latent_samples(model, dataset.test, mask, shown)
        train_y, test_y = dataset.train.labels.cpu()[index], dataset.test.labels.cpu()[shown]
        accuracy[name] = linear_probe(train_z, train_y.numpy(), test_z, test_y.numpy())
    return {"latent_accuracy": accuracy}


def log_likelihood(model, xs, samples=1000, given=None):
    """Importance-weighted log-likelihood of examples xs, M tensors or None, in nats. -> (B,)

        log p(xs)  ≈ log 1/K Σ_k p(xs|z_k) p(z_k) / q(z_k),    z_k ~ q

    q is the posterior of xs, p(z) the model's prior. With `given`, the other modalities, it is
    log p(xs|given): p(z) is the posterior of `given`, q that of both. The likelihoods' weights in
    training do not count. Memory grows with samples x B.
    """
    if given is None:
        q, p = model.posterior(*xs), model.prior(*xs)
    else:
        known = [g if x is None else x for x, g in zip(xs, given)]
        q, p = model.posterior(*known), model.posterior(*given)
    z = q.sample((samples,))  # (K, B, L)
    return npz.log_weights(model, xs, p, q, z).logsumexp(0) - math.log(samples)


def log_likelihoods(model, dataset, examples=100, samples=1000, priors=None):
    """[meme] Table 2: means over test examples, spread over the test set, of log p(x_m),
    log p(x_1, ..., x_M) and log p(x_m|all others), in nats.

    log_likelihood_rise says how far each may be too low: its rise from K/10 to K samples, K being
    `samples`. priors: the modalities whose prior was trained; None: all. log p(x_m) is left out for
    the others, log p(x_1, ..., x_M) where they are fewer than two.
    """
    names = dataset.names
    priors = names if priors is None else priors
    cases = {name: (mask, None) for name, mask in singles(names).items() if name in priors}
    if len(priors) > 1:
        cases[",".join(names)] = ((True,) * len(names), None)
    for name, mask in singles(names).items():
        others = tuple(not shown for shown in mask)
        cases[f"{name}|{','.join(n for n in names if n != name)}"] = (mask, others)
    with torch.no_grad():
        prior = model.prior()
        z = prior.sample((1,))
        features = [math.prod(x.shape[1:]) for x in model.decode(z)]
    components = 0  # of the prior, each evaluated at every z
    if isinstance(prior, MixtureSameFamily):
        components = prior.mixture_distribution.probs.shape[-1]
    rows = torch.arange(len(dataset.test))
    if dataset.test_mask is not None:  # the examples that show everything
        rows = rows[dataset.test_mask.all(1)]
    if not len(rows):
        progress("no log-likelihoods: no test example shows every modality")
        return {}
    rows = rows[npz.spread(len(rows), examples)]
    budget = 2**20 if z.device.type == "cpu" else 2**26  # numbers that fit the cache, or the GPU
    tenths = [len(part) for part in torch.arange(samples).tensor_split(min(10, samples))]
    likelihoods, rises = {}, {}
    for case, (mask, others) in cases.items():
        size = sum(n for n, shown in zip(features, mask) if shown)  # per sample and example
        if others is None:
            size = max(size, components * z.shape[-1])
        block = min(tenths[0], max(1, budget // size))  # samples
        nats, fewer = [], []
        chunk = max(1, budget // (block * size))  # examples
        for index in rows.split(chunk):
            given = None if others is None else data.select(dataset.test, others, index)
            xs = data.select(dataset.test, mask, index)
            sums = []  # of the weights of each tenth of the samples, in logs
            for count in tenths:
                blocks = [len(part) for part in torch.arange(count).split(block)]
                with torch.no_grad():
                    parts = [log_likelihood(model, xs, k, given) + math.log(k) for k in blocks]
                sums.append(torch.stack(parts).logsumexp(0))
            nats.append(torch.stack(sums).logsumexp(0) - math.log(samples))
            means = [total - math.log(count) for total, count in zip(sums, tenths)]
            fewer.append(torch.stack(means).mean(0))
        likelihoods[case] = torch.cat(nats).cpu().double().mean().item()
        rises[case] = likelihoods[case] - torch.cat(fewer).cpu().double().mean().item()
    return {"log_likelihood": likelihoods, "log_likelihood_rise": rises}


def trained_priors(model, args, dataset):
    """The names of the modalities whose own prior p(z) the run has trained: all, unless the model
    says otherwise, as MEME does (eq. 4)."""
    if not hasattr(model, "trained_priors"):
        return dataset.names
    return model.trained_priors([mask for mask, _ in training_streams(args, dataset)])


def training_streams(args, dataset):
    """The streams that a run with these args was trained on."""
    return data.pairing(
        len(dataset.train),
        dataset.names,
        args["paired"],
        args["unpaired"],
        seed=args.get("seed", 0),
        mask=dataset.mask,
        groups=dataset.groups,
    )


MOST_LABELS = 200  # the memory of a logistic regression grows with their square


def evaluate(
    model,
    dataset,
    oracles,
    examples=100,
    samples=1000,
    seed=0,
    root="./data",
    priors=None,
    streams=None,
):
    """All metrics that apply to the data set, or its own, if its file in benchmarks/ has some.

    oracles: {view: Oracle}; examples, samples: N and K of the likelihoods, examples=0: none;
    priors: see log_likelihoods; streams: see npz.evaluate.
    "disagreement" holds the shares of images on which the members of an oracle disagree, under the
    names of the metrics.
    """
    torch.manual_seed(seed)
    model.eval()
    benchmark = data.benchmark(dataset.name)
    if hasattr(benchmark, "evaluate"):
        progress("the metrics of its benchmark")
        return benchmark.evaluate(model, dataset, root, seed)
    if hasattr(benchmark, "correlated"):
        progress("correlations of generated pairs")
        return correlations(*benchmark.correlated(model, dataset, root))
    metrics = {}
    if oracles and in_parts(dataset):
        progress("accuracy of regenerated images")
        metrics, disagreement = split_accuracy(model, dataset, oracles)
        metrics["disagreement"] = disagreement
    elif oracles:
        progress("coherence of generated images")
        metrics, disagreement = coherence(model, dataset, oracles)
        joint, doubt = joint_coherence(model, dataset, oracles)
        metrics |= joint
        metrics["disagreement"] = disagreement | doubt
        progress("mutual information of label and oracle")
        metrics |= mutual_information(model, dataset, oracles)
    elif is_own(dataset):
        progress("regenerated examples")
        metrics |= npz.evaluate(model, dataset, seed, streams)
    labelled = dataset.train.labels is not None and dataset.test.labels is not None
    if labelled and len(dataset.train.labels.unique()) > MOST_LABELS:
        progress(f"no classifier of z: there are more than {MOST_LABELS} label values")
    elif labelled:
        progress("a linear classifier of z")
        metrics |= latent_accuracy(model, dataset)
    if examples:
        progress(f"log-likelihoods of {examples:,} examples, {samples:,} samples of z each")
        metrics |= log_likelihoods(model, dataset, examples, samples, priors)
    return metrics


def progress(task):
    print(f"evaluating: {task} ...", file=sys.stderr)


def is_own(dataset):
    """True for a data set with neither oracles nor metrics of its own, as a user's arrays."""
    benchmark = data.benchmark(dataset.name)
    return not any(hasattr(benchmark, hook) for hook in ("views", "evaluate", "correlated"))


# --------------------------------------------------------------------------------- runs and results

SCRIPTS = ("meme", "svae", "vaevae", "mmvae", "mvae")


class Run(NamedTuple):
    folder: Path
    args: dict  # args.json
    epoch: int  # epochs of training
    minutes: float  # of training
    model: "torch.nn.Module"
    log: tuple = ()  # the rows of log.csv


def load_run(folder, device="cpu"):
    """The trained model of a run folder, in eval mode. ValueError where it cannot be read."""
    args, state = data.read_run(folder, device)
    try:
        if args["script"] not in SCRIPTS:  # nothing else is imported
            raise ValueError(
                f"the script must be one of {', '.join(SCRIPTS)}, not {args['script']}"
            )
        cls = getattr(importlib.import_module(args["script"]), args["model"])
        model = cls(nets.modalities(**args["spec"]), args["latent_dim"], **args["options"])
        model.load_state_dict(state["model"])
        log = [
            {key.replace("nats_", "log_p_", 1): value for key, value in row.items()}
            for row in state["log"]
        ]
        minutes = sum(row["seconds"] for row in log) / 60
    except Exception as error:  # args.json and checkpoint.pt do not fit together
        reason = " ".join(str(error).split())  # torch's have several lines
        raise ValueError(f"{folder} cannot be loaded: {reason}") from None
    return Run(Path(folder), args, int(state["epoch"]), minutes, model.to(device).eval(), log)


def prepare(name, root, device, spec, limit=None):
    """A data set as a run with this spec was trained on it, on the device, with its oracles. limit:
    the first N training examples of an .npz.
    -> Dataset, {view: Oracle}, {view: test accuracy}"""
    arrays = spec.get("arrays", {}) if name.endswith(".npz") else {}
    stats = {key: array.get("stats", {}) for key, array in arrays.items()}
    likelihoods = [array["likelihood"] for array in arrays.values()] or spec.get("likelihoods")
    dataset = data.load(name, root, limit, likelihoods, stats)
    dataset = dataset._replace(train=dataset.train.to(device), test=dataset.test.to(device))
    oracles, accuracies = {}, {}
    if hasattr(data.benchmark(name), "views"):
        for view in views(dataset):
            oracles[view], accuracies[view] = load_oracle(dataset, view, root)
    return dataset, oracles, accuracies


def measure(run, dataset, oracles, accuracies, root, examples=100, samples=1000, seed=0):
    """The contents of metrics.json. ValueError for a run that was trained on other data."""
    same = [
        run.args["spec"].get(k) == dataset.spec.get(k) for k in ("arrays", "shapes", "vocabulary")
    ]
    same.append([m.name for m in run.model.modalities] == list(dataset.names))
    if not all(same) or run.args.get("note", "") != dataset.note:
        raise ValueError(f"{run.folder} was trained on other data than {dataset.name} holds now")
    print(f"evaluating {run.folder} ...", file=sys.stderr)
    examples = min(examples, len(dataset.test))
    priors = trained_priors(run.model, run.args, dataset)
    streams = training_streams(run.args, dataset) if is_own(dataset) else None
    metrics = evaluate(run.model, dataset, oracles, examples, samples, seed, root, priors, streams)
    return metrics | {
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


def grey_bernoulli(model, dataset):
    """True where a Bernoulli likelihood scores values between 0 and 1."""
    return any(
        modality.likelihood == "bernoulli" and base.dtype != torch.bool
        for modality, base in zip(model.modalities, dataset.test.bases)
    )


# -------------------------------------------------------------------------- python eval.py runs/...


def fill(run, args):
    """--fill: writes args.out and prints its contents."""
    dataset = None
    if "arrays" in run.args["spec"] and args.samples is None:
        try:
            dataset, _, _ = prepare_run(run, args)
        except (ValueError, OSError) as error:
            print(f"no intervals, since they need the run's data: {error}", file=sys.stderr)
    mask = npz.fill(
        run.model,
        run.args["spec"],
        args.fill,
        args.out,
        draws=args.samples,
        seed=args.seed,
        dataset=dataset,
        level=args.interval,
    )
    print(f"{args.out} has latent_mean and latent_std of {len(mask):,} examples, and of each")
    for modality, shown in zip(run.model.modalities, mask.T):
        name = drawing.label(modality.name)
        print(f"    {name}, shown in {shown.sum():,} rows, filled in in {(~shown).sum():,}")


def prepare_run(run, args):
    """`prepare` for a run, whose .npz may have moved (--dataset) and must have the same contents."""
    name = args.dataset or run.args["dataset"]
    limit = run.args.get("limit") if name.endswith(".npz") else None
    if name.endswith(".npz") and not Path(name).exists():
        raise ValueError(f"there is no {name}: --dataset NEW.npz says where it lies now")
    root = args.data or run.args["data"]
    prepared = prepare(name, root, args.device, run.args["spec"], limit)
    if run.args.get("digest", prepared[0].digest) != prepared[0].digest:
        raise ValueError(f"{name} does not hold the data that {run.folder} was trained on")
    return prepared


def draw(run, dataset, oracles, folder, root, seed=0):
    """Draw the figures of a run. -> generations' rows, or None; paths that could not be drawn"""
    return figures.draw(
        run,
        dataset,
        folder,
        root,
        seed,
        masks=subsets(dataset.names),
        views=views(dataset),
        predict=partial(predict, dataset=dataset, oracles=oracles) if oracles else None,
        latent_samples=latent_samples,
        w2=w2,
        has_prior=len(trained_priors(run.model, run.args, dataset)) > 1,
        own=is_own(dataset),
    )


def evaluate_run(run, args, prepared):
    """Measure a run, write its metrics.json, draw its figures. prepared: the data sets of runs
    before, each with its oracles.
    -> metrics; generations' rows, or None; paths of figures that could not be drawn"""
    name, spec = args.dataset or run.args["dataset"], run.args["spec"]
    root = args.data or run.args["data"]
    kept = [spec.get(k) for k in ("arrays", "likelihoods")]
    key = name, root, json.dumps([*kept, run.args.get("limit"), run.args.get("digest")])
    if key not in prepared:
        prepared[key] = prepare_run(run, args)
    dataset, oracles, accuracies = prepared[key]
    examples = len(dataset.test) if args.full else 100
    if args.no_likelihoods:
        examples = 0
    samples = args.samples or 1000
    metrics = measure(run, dataset, oracles, accuracies, root, examples, samples, args.seed)
    save_metrics(run.folder / "metrics.json", metrics)
    if args.save:
        save_result(args.save, metrics, run.log)
    if not args.figures:
        return metrics, None, []
    return metrics, *draw(run, dataset, oracles, args.figures, root, args.seed)


def parser():
    p = argparse.ArgumentParser(
        description="Evaluate trained models on test examples, or fill in what new examples lack.",
        epilog="""Writes metrics.json into each folder and prints one table of all runs; runs that
        differ in --seed alone share a row. NEW.npz has arrays named like the modalities of the run,
        each absent or hidden row by row by an array `mask` (examples, modalities). FILLED.npz gets
        latent_mean, latent_std and the mean of every modality given what a row shows, in the units
        and shapes of the data.""",
        allow_abbrev=False,
    )
    p.suggest_on_error = True  # Python 3.14 and newer
    flag = p.add_argument
    cuda = "cuda" if torch.cuda.is_available() else "cpu"
    flag("runs", nargs="+", type=Path, help="run folders, or a .jsonl of saved results")
    flag("--figures", metavar="DIR", type=Path, help="draw figures into this folder")
    flag("--save", metavar="FILE.jsonl", type=Path, help="append results and logs to this file")
    flag("--data", metavar="DIR", help="folder of the data sets (default: that of the training)")
    flag("--dataset", metavar="NEW.npz", help="where a run's .npz lies now, if it has moved")
    flag("--seed", type=int, default=0, help="random seed of the samples of z (default: 0)")
    samples = "samples of z per log-likelihood (default: 1000); with --fill: write N draws of x"
    flag("--samples", metavar="N", type=int, help=samples)
    flag("--full", action="store_true", help="log-likelihoods of all test examples, not of 100")
    flag("--no-likelihoods", action="store_true", help="no log-likelihoods, the slowest metric")
    flag("--paper", action="store_true", help="print the papers' numbers under ours")
    flag("--against", metavar="FLAG", default="paired", help="x-axis of curves (default: paired)")
    flag("--device", default=cuda, help=f"a torch device: cuda, cuda:1, mps, cpu (default: {cuda})")
    flag("--fill", metavar="NEW.npz", help="new examples to fill in, with --out")
    flag("--out", metavar="FILLED.npz", help="the file that --fill writes")
    interval = "level of the intervals NAME_low, NAME_high that --fill writes (default: 0.9)"
    flag("--interval", metavar="P", type=float, default=0.9, help=interval)
    return p


def main(argv=None):
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal may lack the arrows of a table
    p = parser()
    args = p.parse_args(argv)
    if bool(args.fill) != bool(args.out):
        p.error("--fill NEW.npz and --out FILLED.npz must be given together")
    if args.fill and len(args.runs) > 1:
        p.error(f"--fill must be given one run, not {len(args.runs)}")
    if not 0 < args.interval < 1:
        p.error(f"--interval must be between 0 and 1, not {args.interval}")
    if args.samples is not None and args.samples < 1:
        p.error(f"--samples must be 1 or more, not {args.samples}")
    try:
        torch.zeros(1, device=args.device)
    except (RuntimeError, AssertionError):  # torch was built without it, or it is not there
        p.error(f"--device {args.device} is not available here")
    if args.figures:
        try:
            drawing.pyplot()
        except ValueError as error:
            p.error(str(error))

    results, pages, errors, prepared = [], {}, [], {}
    for path in dict.fromkeys(args.runs):
        try:
            if args.fill:
                fill(load_run(path, args.device), args)
            elif path.suffix == ".jsonl":
                results += read_results(path)
            elif not (path / "checkpoint.pt").exists() and (path / "metrics.json").exists():
                print(f"{path} has no checkpoint: shown from its metrics.json", file=sys.stderr)
                results += read_results(path)
            else:
                metrics, rows, failed = evaluate_run(load_run(path, args.device), args, prepared)
                results.append(metrics)
                pages[metrics["folder"]] = rows
                errors += failed
        except (ValueError, OSError) as error:  # the other runs are evaluated all the same
            print(f"{p.prog}: {error}", file=sys.stderr)
            errors.append(error)

    if results:
        single = len(args.runs) == len(results) == 1
        print(report(results[0], args.paper) if single else table(results, args.paper))
    if results and args.figures:
        against = args.against.replace("-", "_")
        try:
            errors += figures.draw_results(results, pages, args.figures, against)
        except ValueError as error:  # --against is no flag with numbers
            print(f"{p.prog}: {error}", file=sys.stderr)
            errors.append(error)
    if errors:
        sys.exit(2)


if __name__ == "__main__":
    main()
