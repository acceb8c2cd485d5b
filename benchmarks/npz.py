"""A user's own arrays: metrics of regenerated modalities, and --fill.

Every data set without oracles and metrics of its own is evaluated like this; `fill` works for any
run. All that is judged, drawn or filled in is, for a modality x_m given the modalities shown,

    E[x_m|shown] = E_q(z|shown) E[x_m|z],    the mean over 20 samples of z

Shapes: N examples, B of a batch, K samples, L latent dimensions, M modalities.
"""

from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

import data
import nets

DRAWS, BATCH = 20, 100
TRAINING_MEAN, TEST_MEAN = "training mean", "test mean"  # sources that ignore the modalities shown
LATENT = ("latent_mean", "latent_std")


def passes(model, n, take, draws=DRAWS, seed=0):
    """The posterior of n examples with one mask, batch by batch; take(index) -> M tensors or None.
    -> index (B,), q(z|shown), samples of z (K, B, L)"""
    torch.manual_seed(seed)
    for index in torch.arange(n).split(BATCH):
        q = model.posterior(*take(index))
        yield index, q, q.sample((draws,))


def batch(xs, index):
    return [None if x is None else x[index] for x in xs]


def sources(names):
    """The masks from which modalities are regenerated: each alone, then all. -> {name: mask}"""
    masks = {a: tuple(a == b for b in names) for a in names}
    every = "all" if "all" not in names else "all modalities"
    return masks | {every: (True,) * len(names)}


def few(labels, n, most=10):
    """The rows of at most ten of n examples, with labels balanced over the classes."""
    if labels is None:
        return torch.arange(min(n, most))
    labels, count, turns = labels.tolist(), defaultdict(int), []
    for row, label in enumerate(labels):
        turns.append((count[label], label, row))
        count[label] += 1
    first = sorted(turns)[:most]
    return torch.tensor([row for _, _, row in sorted(first, key=lambda turn: turn[1:])])


# ----------------------------------------------------------------------------------------- metrics


class Score:
    """The errors and log-likelihoods of one modality from one source, summed over batches."""

    def __init__(self):
        self.errors, self.nats = 0.0, 0.0

    def add(self, modality, base, x, mean, log_p):
        """x, mean (B, ...); log_p (B,)"""
        self.errors = self.errors + errors(modality, base, x, mean)
        self.nats += log_p.double().sum().item()


def is_guessed(modality, base):
    """True for bits and classes, scored by accuracy; False for numbers and images, scored by R²."""
    return modality.likelihood == "categorical" or base.dtype == torch.bool


def errors(modality, base, x, mean):
    """Wrong guesses, or squared errors, of each feature, summed over a batch. x, mean (B, ...)
    -> (...), float64"""
    if modality.likelihood == "categorical":
        return (mean.argmax(-1) != x).double().sum(0)
    if is_guessed(modality, base):
        return ((mean > 0.5) != (x > 0.5)).double().sum(0)
    return ((mean.double() - x.double()) ** 2).sum(0)


def accuracy_or_r2(modality, base, n, errors, spread):
    """errors: the sums over n examples; spread: those of the test mean in the model's place."""
    if is_guessed(modality, base):
        return 1 - errors.mean().item() / n
    if base.ndim == 4:  # an image has one R², over all its pixels
        return 1 - (errors.sum() / spread.sum()).item()
    varies = spread > 0
    return 1 - (errors[varies] / spread[varies]).mean().item()


def average(modality, split, m, index, classes):
    """The mean of modality m over the examples `index`; of a class the frequencies. -> float64"""
    total = 0
    for part in index.split(1000):
        x = split.take(m, part)
        x = F.one_hot(x, classes) if modality.likelihood == "categorical" else x
        total = total + x.double().sum(0)
    return total / len(index)


def parameter_of(modality, mean):
    """The decoder's parameter with this mean: the inverse of nets.mean."""
    if modality.likelihood == "bernoulli":
        return torch.logit(mean, eps=1e-6)
    if modality.likelihood in ("categorical", "poisson"):
        return mean.clamp_min(1e-6).log()
    return mean


@torch.no_grad()
def evaluate(model, dataset, seed=0):
    """Every modality of the test examples from itself, from each other one and from all; as
    "training mean" the mean of the training examples that show it, without a model.

    Numbers: R² of each feature, 1 - Σ (x - regenerated)² / Σ (x - test mean)², averaged over those
    that vary; an image has one R², over all its pixels. Bits and classes: accuracy.
    log_p: the mean of log p(x_m|z) over samples of z and examples, nats, of standardised features.
    -> {"regenerated_r2": {"a->b": number}, "regenerated_accuracy": ..., "regenerated_log_p": ...}
    """
    split, n, names = dataset.test, len(dataset.test), dataset.names
    scores = defaultdict(Score)  # {(source, m): Score}

    decoded = model.decode(model.prior().sample((1,)))
    for m, (modality, base) in enumerate(zip(model.modalities, split.bases)):
        rows = torch.arange(len(dataset.train))
        if dataset.mask is not None:
            rows = rows[dataset.mask[:, m]]
        classes = decoded[m].shape[-1]
        means = {
            TRAINING_MEAN: average(modality, dataset.train, m, rows, classes),
            TEST_MEAN: average(modality, split, m, torch.arange(n), classes),
        }
        for source, mean in means.items():
            for index in torch.arange(n).split(BATCH):
                x = split.take(m, index)
                parameter = parameter_of(modality, mean).expand(len(x), *mean.shape)
                log_p = nets.log_prob(modality, parameter, x)
                scores[source, m].add(modality, base, x, mean.expand_as(parameter), log_p)

    for source, mask in sources(names).items():
        for index, _, z in passes(model, n, partial(data.select, split, mask), seed=seed):
            for m, (modality, base) in enumerate(zip(model.modalities, split.bases)):
                parameter, x = model.decoders[m](z), split.take(m, index)  # (K, B, ...), (B, ...)
                log_p = nets.log_prob(modality, parameter, x).mean(0)
                mean = nets.mean(modality, parameter).mean(0)
                scores[source, m].add(modality, base, x, mean, log_p)

    metrics = {f"regenerated_{section}": {} for section in ("r2", "accuracy", "log_p")}
    for m, (modality, base) in enumerate(zip(model.modalities, split.bases)):
        section = f"regenerated_{'accuracy' if is_guessed(modality, base) else 'r2'}"
        others = [source for source in sources(names) if source != names[m]]
        spread = scores[TEST_MEAN, m].errors
        for source in (names[m], *others, TRAINING_MEAN):
            score, key = scores[source, m], f"{source}->{names[m]}"
            metrics[section][key] = accuracy_or_r2(modality, base, n, score.errors, spread)
            metrics["regenerated_log_p"][key] = score.nats / n
    return {section: numbers for section, numbers in metrics.items() if numbers}


def notes(results):
    """The lines below a table of these results."""
    if not any("regenerated_log_p" in r for r in results):
        return []
    lines = [f"Regenerated is the mean over {DRAWS} samples of z, as --fill writes it."]
    arrays = [item for r in results for item in r["run"]["spec"].get("arrays", {}).items()]
    standardised = dict.fromkeys(name for name, array in arrays if array.get("stats"))
    if standardised:
        names = ", ".join(standardised)
        lines.append(f"Log-likelihoods of {names} are of standardised features.")
    return lines


# ------------------------------------------------------------------------------------------ --fill


class Given(NamedTuple):
    """An array of new examples."""

    x: torch.Tensor  # (N, *shape of the modality), as the model takes it
    shape: tuple  # of an example in the file: a grey image may lack its channel
    dtype: np.dtype  # of the filled array


@torch.no_grad()
def fill(model, spec, path, out, draws=None, seed=0):
    """Fill in new examples: every modality of each given what its row shows.

    spec: that of the run's args.json. path: an .npz of arrays named like the modalities,
    (N, *shape), each of which may be absent; `mask` (N, M), in the order of the modalities, hides
    entries where it is 0. out: an .npz with latent_mean, latent_std (N, L) of q(z|shown) and each
    modality's mean, (N, *shape), or with `draws` its mean given each of that many samples of z,
    (draws, N, *shape), in the units and shapes of the input. Bytes stay bytes; absent images become
    floats in [0, 1]; bits become the probability of 1, classes the most likely one, beside
    NAME_probabilities.
    -> the mask of what is shown, (N, M). ValueError, and nothing written, for an unsuitable input
    """
    if Path(out).exists():
        raise ValueError(f"{out} exists: choose another --out")
    model.eval()
    arrays = spec.get("arrays", {})
    given, mask = read_new(model, arrays, path)
    device = next(model.parameters()).device
    lead = () if draws is None else (draws,)
    filled = {key: np.zeros((len(mask), model.latent_dim), "f4") for key in LATENT}
    for pattern, rows in data.patterns(torch.from_numpy(mask)):
        shown = [old.x[rows].to(device) if s else None for old, s in zip(given, pattern)]
        for index, q, z in passes(model, len(rows), partial(batch, shown), draws or DRAWS, seed):
            at = rows[index].numpy()
            for key, value in zip(LATENT, (q.mean, q.stddev)):
                filled[key][at] = value.cpu().numpy()
            for first, part in zip(range(0, len(z), DRAWS), z.split(DRAWS)):
                where = at if draws is None else (slice(first, first + len(part)), at)
                for modality, old, mean in zip(model.modalities, given, model.decode(part)):
                    mean = (mean.mean(0) if draws is None else mean).double().cpu().numpy()
                    stats = arrays.get(modality.name, {}).get("stats")
                    for name, values in in_units(modality, old, stats, mean).items():
                        if name not in filled:
                            shape = *lead, len(mask), *values.shape[len(lead) + 1 :]
                            filled[name] = np.zeros(shape, values.dtype)
                        filled[name][where] = values
    data.save_npz(Path(out), **filled)
    return mask


def read_new(model, arrays, path):
    """-> for each modality Given or None; the mask of what is shown, (N, M)"""
    new, names = data.read_npz(path), [m.name for m in model.modalities]
    unknown = [key for key in new if key not in (*names, "mask")]
    present = [name for name in names if name in new]
    if unknown or not present:
        raise ValueError(
            f"{path} must hold arrays named {', '.join(names)}, and may hold mask, not "
            f"{', '.join(unknown) or 'none'}"
        )
    for key, x in new.items():
        if x.dtype.kind not in "buif" or not x.ndim or not x.size:
            raise ValueError(f"{path}: {key} must be numeric, with one row per example")
    rows = {key: len(x) for key, x in new.items()}
    if len(set(rows.values())) > 1:
        raise ValueError(f"{path}: arrays must have as many rows each, not {rows}")
    shape = len(new[present[0]]), len(names)
    mask = new.get("mask", np.ones(shape, bool))
    if mask.shape != shape or not np.isin(mask, (0, 1)).all():
        raise ValueError(
            f"{path}: mask must hold 0 and 1 with shape {shape} (examples, modalities: "
            f"{', '.join(names)}), not {mask.shape}"
        )
    mask = mask.astype(bool) & [name in new for name in names]
    decoded = model.decode(model.prior().sample((1,)))
    given = []
    for m, (modality, name) in enumerate(zip(model.modalities, names)):
        old = None
        if name in new:
            classes = decoded[m].shape[-1] if modality.likelihood == "categorical" else None
            array = arrays.get(name, {})
            old = take_array(f"{path}: {name}", modality, new[name], mask[:, m], array, classes)
        given.append(old)
    return given, mask


def take_array(where, modality, x, shown, array, classes):
    """An array of new examples as the model takes it. shown (N,): rows that are hidden may hold
    anything; array: its entry in the run's spec["arrays"], {} for a data set's own; classes: their
    number, or that of words. -> Given"""
    shape, dtype = x.shape[1:], x.dtype
    if len(modality.shape) == 3 and modality.shape[0] == 1 and x.ndim == 3:
        x = x[:, None]  # grey images
    if x.shape[1:] != tuple(modality.shape):
        expected = ", ".join(map(str, ("examples", *modality.shape)))
        raise ValueError(f"{where} must have the shape ({expected}), not {(len(x), *shape)}")
    kind = array.get("kind") or data.kind_of(x[shown], modality.likelihood)
    if kind in ("bytes", "greys"):
        kind = "bytes" if dtype == np.uint8 else "greys"
    if shown.any():
        finite = np.isfinite(x).reshape(len(x), -1).all(1)
        if not finite[shown].all():
            row = int((shown & ~finite).argmax())
            raise ValueError(
                f"{where} has values that are not finite, in row {row}; mask can hide it"
            )
        data.check_array(where, x[shown], kind)
        if classes and x[shown].max() >= classes:
            raise ValueError(
                f"{where} must be below {classes}, as in training, not {x[shown].max()}"
            )
    if classes:
        return Given(torch.from_numpy(x.astype("i8")), shape, np.dtype("i8"))
    if kind == "bytes":
        return Given(torch.from_numpy(x.astype("f4") / 255), shape, dtype)
    x = data.standardise(x.astype("f8"), array.get("stats")).astype("f4")
    floats = np.result_type(dtype, "f4") if dtype.kind == "f" else np.dtype("f4")
    return Given(torch.from_numpy(x), shape, floats)


def in_units(modality, given, stats, mean):
    """A modality's mean as it is written. given: its array in the input, or None; mean
    ([K,] B, *shape), float64. -> {name: array}"""
    if modality.likelihood == "categorical":
        filled = {modality.name: mean.argmax(-1)}
        if not modality.shape:  # a class, not the words of a caption
            filled[f"{modality.name}_probabilities"] = mean.astype("f4")
        return filled
    x = data.unstandardise(mean, stats)
    if given is None:
        return {modality.name: x if stats else x.astype("f4")}
    if given.dtype == np.uint8:
        x = np.rint(255 * x)
    lead = x.shape[: x.ndim - len(modality.shape)]
    return {modality.name: x.reshape(*lead, *given.shape).astype(given.dtype)}
