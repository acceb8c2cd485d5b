"""A user's own arrays: how well every modality is predicted from the others.

Each modality of a test example is predicted by its mean given the modalities x_S,

    E[x_m|x_S] = E_p(z|x_S) E[x_m|z],    the mean over 50 samples of z (eval.posterior_batches)

and scored by R² (numbers, counts, images), by accuracy (bits, classes) and by the log loss
(classes). Beside it stand the training mean and a linear prediction from the same inputs, ridge
regression, both of what the run was trained on and nothing else. NaN is a missing entry, which is
not scored.

Shapes: N examples, B of a batch, K samples, L latent dimensions, M modalities, D features, C
classes.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

import nets
from data import select
from eval import BUDGET, DRAWS, posterior_batches, rows_with, sample_blocks
from loaders.arrays import feature_stats

TRAINING_MEAN = "training mean"  # the source that ignores the inputs


# ------------------------------------------------------------------------------ predictions of x_m


def decoded(modality, decoder, z):
    """The decoder's parameter for z (K, B, L), in blocks of samples (k, B, ...)."""
    width = math.prod(modality.shape) * (modality.classes or 2)
    return (decoder(part) for part in sample_blocks(z, width))


@torch.no_grad()
def expectation(modality, decoder, z):
    """The mean of E[x|z] over samples of z (K, B, L). -> (B, *shape), of classes (B, C)"""
    return sum(nets.mean(modality, part).sum(0) for part in decoded(modality, decoder, z)) / len(z)


@torch.no_grad()
def expectation_and_density(modality, decoder, z, x):
    """`expectation`, and log 1/K Σ_k p(x|z_k), the log of the predictive density of x (B, *shape).
    -> (B, *shape), of classes (B, C); (B,) in nats"""
    total, log_p = 0.0, []
    for parameter in decoded(modality, decoder, z):
        total = total + nets.mean(modality, parameter).sum(0)
        log_p.append(nets.log_prob(modality, parameter, x))
    return total / len(z), torch.cat(log_p).logsumexp(0) - math.log(len(z))


class Prediction(NamedTuple):
    """A modality of several test examples, predicted from the same source."""

    rows: torch.Tensor  # of the test split
    errors: torch.Tensor  # (*shape) their sum over the rows: see `errors`
    log_p: torch.Tensor | None  # (N,) log predictive density; None for predictions without one


def regenerate(model, dataset, inputs, targets, seed=0):
    """Predict each modality m of `targets` from z ~ p(z|inputs), at the test examples that show it
    and all of `inputs`. -> {m: Prediction}, without those that no example shows"""
    split, test_mask = dataset.test, dataset.test_mask
    rows = rows_with(test_mask, inputs, len(split))
    mask = [k in inputs for k in range(len(dataset.names))]
    totals = {m: ([], [], []) for m in targets}

    def take(index):
        return select(split, mask, rows[index])

    for index, _, z in posterior_batches(model, len(rows), take, seed=seed):
        for m in targets:
            at = torch.arange(len(index))
            if test_mask is not None:
                at = at[test_mask[rows[index], m]]
            if not len(at):
                continue
            modality, x = model.modalities[m], split.take(m, rows[index[at]])
            mean, log_p = expectation_and_density(modality, model.decoders[m], z[:, at], x)
            batch = rows[index[at]], errors(modality, x, mean).nansum(0), log_p.cpu()
            for total, part in zip(totals[m], batch):
                total.append(part)
    return {
        m: Prediction(torch.cat(rows), torch.stack(sums).sum(0), torch.cat(log_p))
        for m, (rows, sums, log_p) in totals.items()
        if rows
    }


def predict_rows(modality, split, m, rows, mean_of):
    """Prediction of modality m at these rows by mean_of(index), its means (B, ...) as nets.mean has
    them; log_p of classes only."""
    sums, log_p = 0.0, []
    for index in blocks(modality, rows):
        x, mean = split.take(m, index).cpu(), mean_of(index)
        sums = sums + errors(modality, x, mean).nansum(0)
        if modality.kind == "class":
            log_p.append(mean.gather(1, x[:, None])[:, 0].log())
    return Prediction(rows, sums, torch.cat(log_p) if log_p else None)


def blocks(modality, rows):
    """The rows of a table in blocks that keep to the BUDGET."""
    return rows.split(max(1, BUDGET // (math.prod(modality.shape) * (modality.classes or 1))))


# ------------------------------------------------------------------------------------------ scores


def by_accuracy(modality):
    """True for bits, classes and words, scored by accuracy; False for those scored by R²."""
    return modality.kind == "bits" or modality.likelihood == "categorical"


def errors(modality, x, mean):
    """Of bits and classes: 1 where the more probable value is wrong; of all others: (x - mean)².
    x (B, *shape); mean as nets.mean has it. -> (B, *shape), float64, NaN where x is"""
    x, mean = x.cpu(), mean.cpu().double()
    if modality.likelihood == "categorical":
        return (mean.argmax(-1) != x).double()
    if modality.kind == "bits":
        return ((mean > 0.5) != (x > 0.5)).double()
    return (x.double() - mean) ** 2


def moments(modality, split, m, rows):
    """Modality m over all these rows, without NaN: the number of entries, their mean and the sum of
    their squared distances from it. -> n, mean, squares, each (*shape), float64"""
    n, total, squares = 0.0, 0.0, 0.0
    for index in blocks(modality, rows):
        x = split.take(m, index).cpu().double()
        n, total = n + (~x.isnan()).double().sum(0), total + x.nansum(0)
    mean = total / n.clamp_min(1)
    for index in blocks(modality, rows):
        squares = squares + ((split.take(m, index).cpu().double() - mean) ** 2).nansum(0)
    return n, mean, squares


def scores(modality, split, m, prediction):
    """The score of each feature over all predicted rows at once: of bits and classes the accuracy,
    of numbers and counts

        R² = 1 - Σ (x - prediction)² / Σ (x - mean of these rows)²

    and of an image one R², over all its pixels. NaN for a feature that is not scored: without an
    entry, as those in modality.unseen, or one that varies by no more than the rounding of its
    values. -> (D,), of classes and images (1,), float64
    """
    n, mean, squares = moments(modality, split, m, prediction.rows)
    if by_accuracy(modality):
        return (1 - prediction.errors / n).flatten()
    if len(modality.shape) == 3:
        return (1 - prediction.errors.sum() / squares.sum()).flatten()
    size = mean.abs()
    if modality.stats is not None:  # a feature that was constant in training has deviation 1
        shift, std = (torch.tensor(modality.stats[key]).double() for key in ("mean", "std"))
        size = size + torch.where(std == 1, shift.abs(), 0.0)
    varies = (squares / n.clamp_min(1)).sqrt() > torch.finfo(torch.float32).eps * size
    return torch.where(varies, 1 - prediction.errors / squares, torch.nan).flatten()


# --------------------------------------------------------------------------------------- baselines


def observed_in(streams, n):
    """The modalities that n training examples show in these streams, and those that they show
    together with another. -> two masks (n, M)"""
    observed = torch.zeros(n, len(streams[0][0]), dtype=torch.bool)
    together = observed.clone()
    for mask, index in streams:
        mask = torch.tensor(mask)
        observed[index] |= mask
        if mask.sum() > 1:
            together[index] |= mask
    return observed, together


def training_mean(modality, split, m, rows):
    """The mean of modality m over these rows, without NaN, as nets.mean has it. Of classes the
    frequencies, in which one that no row shows counts as a single row. -> float64"""
    if modality.likelihood != "categorical":
        return moments(modality, split, m, rows)[1]
    counts = 0
    for index in blocks(modality, rows):
        counts = counts + F.one_hot(split.take(m, index).cpu(), modality.classes).sum(0)
    return counts.double().clamp_min(1) / len(rows)


PENALTIES = np.logspace(-2, 5, 15)


def ridge(x, y, penalties=PENALTIES):
    """Ridge regression of y (n, q) on x (n, p), with an intercept that is not penalised, and the
    penalty of the least generalised cross-validation error (Golub, Heath & Wahba 1979),

        mean (y - Hy)² / (1 - tr H / n)²,    tr H = 1 + Σ_i s_i² / (s_i² + penalty)

    s: the singular values of centred x; the 1 is the intercept, without which a table wider than
    its rows is interpolated. -> weights (p, q), intercept (q,), the penalty
    """
    mean_x, mean_y = x.mean(0), y.mean(0)
    u, s, vt = np.linalg.svd(x - mean_x, full_matrices=False)
    uy = u.T @ (y - mean_y)
    squares = (uy**2).sum(1)  # of y along each direction of x, and outside all of them
    outside = max(0.0, ((y - mean_y) ** 2).sum() - squares.sum())
    errors = []
    for penalty in penalties:
        shrinkage = s**2 / (s**2 + penalty)
        error = outside + ((1 - shrinkage) ** 2 * squares).sum()
        errors.append(error / (1 - (1 + shrinkage.sum()) / len(x)) ** 2)
    penalty = penalties[np.argmin(errors)]
    weights = vt.T @ ((s / (s**2 + penalty))[:, None] * uy)
    return weights, mean_y - mean_x @ weights, penalty


def logistic(x, y, classes):
    """Multinomial logistic regression of y (n,) on x (n, p), the counterpart of ridge regression:

        argmin_w,b  Σ_n -log softmax(x_n w + b)_y_n + |w|²/2        (scikit-learn's default, C = 1)

    -> weights (p, classes), intercepts (classes,)
    """
    x, y = torch.from_numpy(x), torch.from_numpy(y)
    w = torch.zeros(x.shape[1], classes, dtype=torch.float64, requires_grad=True)
    b = torch.zeros(classes, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [w, b], max_iter=1000, tolerance_grad=1e-6, line_search_fn="strong_wolfe"
    )

    def loss():
        optimizer.zero_grad()
        value = F.cross_entropy(x @ w + b, y) + (w**2).sum() / (2 * len(x))
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)
    return w.detach().numpy(), b.detach().numpy()


LARGEST = 4000  # features of an input or a target that are regressed
WORK = 4e9  # operations, about, of a fit: seconds


class Ridge:
    """Modality m predicted linearly from the modalities `inputs`: what a table would be filled in
    with without a VAE. Classes by `logistic`, all others by `ridge`.

    It is fitted to the training examples that show m and any of `inputs` together, mask (N, M); of
    large data sets to as many, at random, as take seconds. Features are standardised by these
    examples; of classes, which are one-hot, the mean alone is subtracted. A missing input is at its
    mean.
    """

    def __init__(self, dataset, modalities, inputs, m, mask):
        self.split, self.modalities, self.inputs, self.m = dataset.test, modalities, inputs, m
        rows = (mask[:, m] & mask[:, list(inputs)].any(1)).nonzero()[:, 0]
        width, outputs = sum(features_of(modalities[k]) for k in inputs), features_of(modalities[m])
        work = width * (100 * outputs if modalities[m].kind == "class" else width)
        most = min(1e5, max(1000, WORK / work), 8 * BUDGET / outputs)
        if len(rows) > most:
            rows = torch.from_numpy(np.random.default_rng(0).permutation(rows.numpy())[: int(most)])
        tables = {}
        for k in inputs:
            tables[k] = features(modalities[k], dataset.train.take(k, rows))
            tables[k][~mask[rows, k].numpy()] = np.nan
        self.scales = {k: scale(modalities[k], x) for k, x in tables.items()}
        x = self.design(tables)
        y = dataset.train.take(m, rows)
        if modalities[m].kind == "class":
            self.weights, self.intercept = logistic(x, y.cpu().numpy(), modalities[m].classes)
            return
        y = features(modalities[m], y)
        mean, std = scale(modalities[m], y)
        weights, intercept, _ = ridge(x, np.nan_to_num((y - mean) / std))
        self.weights, self.intercept = weights * std, intercept * std + mean

    def design(self, tables):
        """The inputs' features, standardised, side by side. -> (n, p)"""
        columns = [(x - self.scales[k][0]) / self.scales[k][1] for k, x in tables.items()]
        return np.nan_to_num(np.hstack(columns))

    def __call__(self, index):
        """The predictions at these test examples, as nets.mean has them. -> (B, ...)"""
        modality = self.modalities[self.m]
        tables = {k: features(self.modalities[k], self.split.take(k, index)) for k in self.inputs}
        y = torch.from_numpy(self.design(tables) @ self.weights + self.intercept)
        if modality.kind == "class":
            return y.softmax(-1)
        words = (modality.classes,) if modality.likelihood == "categorical" else ()
        return y.reshape(len(index), *modality.shape, *words)


def ridge_of(dataset, modalities, inputs, m, mask):
    """A fitted Ridge; None for arrays that are too wide or without two examples to fit."""
    rows = mask[:, m] & mask[:, list(inputs)].any(1)
    if max(features_of(modalities[k]) for k in (*inputs, m)) > LARGEST or rows.sum() < 2:
        return None
    return Ridge(dataset, modalities, inputs, m, mask)


def features_of(modality):
    """The number of features of a modality in a linear model, in which classes are one-hot."""
    return math.prod(modality.shape) * (modality.classes or 1)


def features(modality, x):
    """x (n, *shape), classes one-hot. -> (n, D) float64"""
    if modality.likelihood == "categorical":
        x = F.one_hot(x, modality.classes)
    return x.flatten(1).cpu().double().numpy()


def scale(modality, x):
    """Mean and deviation of each column, without NaN; 1 in place of the deviation of classes and of
    numbers that the run has standardised. -> (D,), (D,)"""
    stats = feature_stats(x)
    mean, std = np.array(stats["mean"]), np.array(stats["std"])
    standardised = modality.likelihood == "categorical" or modality.stats is not None
    return mean, np.ones_like(std) if standardised else std


# ------------------------------------------------------------------------------------------ metrics


def sources(names, m):
    """The sources of modality m: itself, each other one and, of three or more, all others
    together. -> {name: indices}"""
    singles = {names[m]: (m,)} | {name: (k,) for k, name in enumerate(names) if k != m}
    others = tuple(k for k in range(len(names)) if k != m)
    return singles | {"the others": others} if len(names) > 2 else singles


def evaluate(model, dataset, seed=0, streams=None):
    """Every modality of the test examples, predicted from each of its `sources` and by the training
    mean, and from all sources but itself by ridge regression; streams: those of the run's training,
    None: all that the data set shows.

    -> metrics, {section: {"a->b": number}}:
    regenerated_r2, ridge_r2: R² of numbers and counts, averaged over features, and of images
    regenerated_accuracy, ridge_accuracy: of bits and classes; ridge: classes by `logistic`
    regenerated_log_loss, ridge_log_loss: of classes, -log of the true class's probability, nats
    regenerated_log_p: of all others, log predictive density, nats, of standardised features
    """
    split, names, modalities = dataset.test, dataset.names, model.modalities
    if streams is None:
        streams = dataset.streams()
    observed, together = observed_in(streams, len(dataset.train))
    parts = ("regenerated_r2", "regenerated_accuracy", "regenerated_log_loss", "regenerated_log_p")
    metrics = {section: {} for section in (*parts, "ridge_r2", "ridge_accuracy", "ridge_log_loss")}

    def keep(prefix, source, m, prediction):
        modality, key = modalities[m], f"{source}->{names[m]}"
        kind = "accuracy" if by_accuracy(modality) else "r2"
        score = scores(modality, split, m, prediction).nanmean()
        metrics[f"{prefix}_{kind}"][key] = score.item()
        if modality.kind == "class":
            metrics[f"{prefix}_log_loss"][key] = -prediction.log_p.double().mean().item()
        elif prediction.log_p is not None:
            metrics[f"{prefix}_log_p"][key] = prediction.log_p.double().mean().item()

    everything = range(len(names))
    predictions = {}  # {(inputs, m): Prediction}
    for k in everything:  # z of a single modality predicts all of them
        for m, prediction in regenerate(model, dataset, (k,), everything, seed).items():
            predictions[(k,), m] = prediction
    for m in everything if len(names) > 2 else ():
        others = sources(names, m)["the others"]
        for prediction in regenerate(model, dataset, others, [m], seed).values():
            predictions[others, m] = prediction

    for m, modality in enumerate(modalities):
        for source, inputs in sources(names, m).items():
            if (inputs, m) not in predictions:  # no test example shows both
                continue
            keep("regenerated", source, m, predictions[inputs, m])
            baseline = None
            if inputs != (m,):
                baseline = ridge_of(dataset, modalities, inputs, m, together)
            if baseline is not None:
                rows = predictions[inputs, m].rows
                keep("ridge", source, m, predict_rows(modality, split, m, rows, baseline))
        rows = rows_with(observed, (m,), len(dataset.train))
        mean = training_mean(modality, dataset.train, m, rows)
        rows = rows_with(dataset.test_mask, (m,), len(split))
        constant = predict_rows(
            modality, split, m, rows, lambda index: mean.expand(len(index), *mean.shape)
        )
        keep("regenerated", TRAINING_MEAN, m, constant)
    return {section: numbers for section, numbers in metrics.items() if numbers}


def feature_scores(model, dataset, seed=0, streams=None):
    """The `scores` of each modality, predicted from all others together, beside those of ridge
    regression (None where there is no regression).
    -> {modality: {"model": (D,), "ridge": (D,) or None}}, arrays with NaN for features that are not
    scored; without modalities that no test example shows together with all others"""
    if streams is None:
        streams = dataset.streams()
    _, together = observed_in(streams, len(dataset.train))
    found = {}
    for m, (name, modality) in enumerate(zip(dataset.names, model.modalities)):
        others = tuple(k for k in range(len(dataset.names)) if k != m)
        for prediction in regenerate(model, dataset, others, [m], seed).values():
            found[name] = {"model": scores(modality, dataset.test, m, prediction).numpy()}
            baseline, linear = ridge_of(dataset, model.modalities, others, m, together), None
            if baseline is not None:
                linear = predict_rows(modality, dataset.test, m, prediction.rows, baseline)
                linear = scores(modality, dataset.test, m, linear).numpy()
            found[name]["ridge"] = linear
    return found


def notes(results):
    """The lines below a table of these results."""
    results = [r for r in results if "regenerated_r2" in r or "regenerated_accuracy" in r]
    if not results:
        return []
    lines = [
        f"Regenerated is the mean over {DRAWS} samples of z, as --fill writes it. Ridge regression "
        "from what the run was trained on; of classes logistic regression."
    ]
    standardised = {}
    for result in results:
        arrays = result["run"]["spec"].get("arrays", {})
        standardised |= {name: True for name, array in arrays.items() if array.get("stats")}
    if standardised:
        names = ", ".join(standardised)
        lines.append(f"Log-likelihoods of {names} are of standardised features.")
    return lines
