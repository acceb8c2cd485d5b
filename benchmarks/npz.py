"""A user's own arrays: how well each modality is regenerated, a page of examples, gaps filled in.

Every data set that has neither oracles nor metrics of its own is judged like this; `fill` takes any
run. What is judged, drawn and filled in is the same: of a modality x_m, given what is shown,

    E[x_m|shown] = E_q(z|shown) E[x_m|z],    the mean over 20 draws of z

Shapes: N examples, B of a batch, K draws, L latent dimensions, M modalities.
"""

import itertools
import time
import zipfile
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

import data
import nets
from benchmarks import drawing

DRAWS, BATCH = 20, 100
NOTHING, ITSELF = "training mean", "test mean"  # of a modality, whatever is shown


def passes(model, n, show, draws=DRAWS, seed=0):
    """n examples of one pattern, a batch at a time; show(index) gives M tensors or None.
    -> index (B,), q(z|shown), draws of its z (K, B, L)"""
    torch.manual_seed(seed)
    for index in torch.arange(n).split(BATCH):
        q = model.posterior(*show(index))
        yield index, q, q.sample((draws,))


def batch(xs, index):
    return [None if x is None else x[index] for x in xs]


def sources(names):
    """What a modality is regenerated from: each by itself, then all. -> {name: M booleans}"""
    found = {a: tuple(a == b for b in names) for a in names}
    every = "all" if "all" not in names else "all modalities"
    return found | {every: (True,) * len(names)}


# ----------------------------------------------------------------------------------------- metrics


def guessed(modality, base):
    """Whether a modality is bits or classes, of which a share is right, and not numbers."""
    return modality.likelihood == "categorical" or base.dtype == torch.bool


def misses(modality, base, mean, x):
    """What is wrong in each feature, summed over a batch: wrong guesses, or squared errors.
    mean, x (B, ...) -> (...), float64"""
    if modality.likelihood == "categorical":
        return (mean.argmax(-1) != x).double().sum(0)
    if guessed(modality, base):
        return ((mean > 0.5) != (x > 0.5)).double().sum(0)
    return ((mean.double() - x.double()) ** 2).sum(0)


def score(modality, base, n, missed, spread):
    """The share of right guesses, or R²: missed is what `misses` sums up over n examples, spread
    the same of their own mean."""
    if guessed(modality, base):
        return 1 - missed.mean().item() / n
    if base.ndim == 4:  # an image has one R², of all its pixels
        return 1 - (missed.sum() / spread.sum()).item()
    varies = spread > 0
    return 1 - (missed[varies] / spread[varies]).mean().item()


def notes(results):
    """Lines below a table of these."""
    if not any("regenerated_log_p" in r for r in results):
        return []
    lines = [f"Regenerated is the mean over {DRAWS} draws of z, as --fill writes it."]
    standard = {name: None for r in results for name in r["run"]["spec"].get("standardise", {})}
    if standard:
        lines.append(f"Log-likelihoods of {', '.join(standard)} are of standardised features.")
    return lines


def average(modality, split, m, index, classes):
    """The mean of modality m over the examples `index`; of a class, how frequent each one is.
    -> float64"""
    total = 0
    for part in index.split(1000):
        x = split.take(m, part)
        x = F.one_hot(x, classes) if modality.likelihood == "categorical" else x
        total = total + x.double().sum(0)
    return total / len(index)


def parameter_of(modality, mean):
    """The decoder's parameter of which `mean` is the mean: the inverse of nets.mean."""
    if modality.likelihood == "bernoulli":
        return torch.logit(mean, eps=1e-6)
    logarithm = modality.likelihood in ("categorical", "poisson")
    return mean.clamp_min(1e-6).log() if logarithm else mean


@torch.no_grad()
def evaluate(model, dataset, seed=0):
    """Every modality of the test examples from itself, from each other one and from all; and as
    "training mean": the mean of the training examples that show it, whatever is given.

    Numbers: R² of each feature, 1 - Σ (x - regenerated)² / Σ (x - test mean)², averaged over those
    that vary; an image has one R², of all its pixels. Bits and classes: the share guessed right.
    log_p: the mean of log p(x_m|z) over draws of z and examples, nats, of standardised features.
    -> {"regenerated_r2": {"a->b": number}, "regenerated_accuracy": ..., "regenerated_log_p": ...}
    """
    split, n, names = dataset.test, len(dataset.test), dataset.names
    missed, nats = defaultdict(float), defaultdict(float)

    def tally(source, m, x, mean, log_p):
        modality = model.modalities[m]
        missed[source, m] = missed[source, m] + misses(modality, split.bases[m], mean, x)
        nats[source, m] += log_p.double().sum().item()

    decoded = model.decode(model.prior().sample((1,)))
    for m, (modality, like) in enumerate(zip(model.modalities, decoded)):
        rows = torch.arange(len(dataset.train))
        rows = rows if dataset.mask is None else rows[dataset.mask[:, m]]
        means = {NOTHING: average(modality, dataset.train, m, rows, like.shape[-1])}
        means[ITSELF] = average(modality, split, m, torch.arange(n), like.shape[-1])
        for index, (source, mean) in itertools.product(torch.arange(n).split(BATCH), means.items()):
            x = split.take(m, index)
            parameter = parameter_of(modality, mean).expand(len(x), *mean.shape)
            tally(source, m, x, mean.expand_as(parameter), nets.log_prob(modality, parameter, x))
    start, total = time.monotonic(), n * len(sources(names))
    for k, (source, shown) in enumerate(sources(names).items()):
        for index, _, z in passes(model, n, partial(data.show, split, shown), seed=seed):
            for m, (modality, decode) in enumerate(zip(model.modalities, model.decoders)):
                parameter, x = decode(z), split.take(m, index)  # (K, B, ...), (B, ...)
                log_p = nets.log_prob(modality, parameter, x).mean(0)
                tally(source, m, x, nets.mean(modality, parameter).mean(0), log_p)
            done = k * n + int(index[-1]) + 1
            data.progress("evaluating: regenerated examples", done, len(index), total, start)
    found = {f"regenerated_{what}": {} for what in ("r2", "accuracy", "log_p")}
    for m, (modality, base) in enumerate(zip(model.modalities, split.bases)):
        section = f"regenerated_{'accuracy' if guessed(modality, base) else 'r2'}"
        others = [source for source in sources(names) if source != names[m]]
        for source in (names[m], *others, NOTHING):
            share = missed[source, m], missed[ITSELF, m]
            key = f"{source}->{names[m]}"
            found[section][key] = score(modality, base, n, *share)
            found["regenerated_log_p"][key] = nats[source, m] / n
    return {section: numbers for section, numbers in found.items() if numbers}


# ------------------------------------------------------------------------------ a page of examples


def few(labels, n, most=10):
    """The rows of at most ten of n examples: with labels as many of each class as fit."""
    if labels is None:
        return torch.arange(min(n, most))
    labels, seen, turns = labels.tolist(), defaultdict(int), []
    for row, label in enumerate(labels):
        turns.append((seen[label], label, row))
        seen[label] += 1
    return torch.tensor([row for _, _, row in sorted(sorted(turns)[:most], key=lambda t: t[1:])])


@torch.no_grad()
def draw(run, dataset, path, seed=0):
    """The same test examples of every modality: as they are, from itself, each other one, all."""
    model, split, names = run.model, dataset.test, dataset.names
    index, standard = few(split.labels, len(split)), dataset.spec.get("standardise", {})
    xs, means = split[index], {}
    for source, shown in sources(names).items():
        seen = [x if shows else None for x, shows in zip(xs, shown)]
        ((_, _, z),) = passes(model, len(index), partial(batch, seen), seed=seed)
        means[source] = [x.mean(0) for x in model.decode(z)]
    labels = {source: f"from {drawing.label(source)}" for source in means}
    hues = {label: drawing.hue(k) for k, label in enumerate(labels.values())}
    hues |= {"input": "black", labels[list(labels)[-1]]: "gray"}
    blocks = {}
    for m, (modality, x) in enumerate(zip(model.modalities, xs)):
        if modality.likelihood == "categorical":
            x = F.one_hot(x, means[names[m]][m].shape[-1]).float()
        order = names[m], *(source for source in means if source != names[m])
        rows, unit = {"input": x} | {labels[source]: means[source][m] for source in order}, ""
        if modality.likelihood == "poisson":
            rows, unit = {label: x.sqrt() for label, x in rows.items()}, ", square roots"
        elif names[m] in standard:
            unit = ", in standard deviations from the training mean"
        blocks[drawing.label(names[m]) + unit] = [
            (label, x.flatten(1) if x.ndim != 4 else x) for label, x in rows.items()
        ]
    drawing.examples(blocks, hues, f"{drawing.title(run)} · test examples", path)


# ----------------------------------------------------------------------------- gaps are filled in

LATENT = "latent_mean", "latent_std"


class Given(NamedTuple):
    """An array of new examples."""

    x: torch.Tensor  # (N, *shape of the modality), as the model takes it
    shape: tuple  # of an example in the file: a grey image may do without its channel
    dtype: np.dtype  # of what is written of it: uint8 where x was 0 to 255


@torch.no_grad()
def fill(model, standard, path, out, draws=None, seed=0):
    """New examples -> an .npz with every modality of each, from what its row shows.

    path: an .npz of arrays named like the modalities, (N, *shape). Any may be absent; `mask`
    (N, M), in the order of the modalities, is false where a row's array is not to be looked at.
    standard: {modality: constants}, the spec["standardise"] of the run.
    Written: latent_mean, latent_std (N, L) of q(z|shown); each modality's mean given what is shown,
    (N, *shape), or with `draws` its mean given each of as many draws of z, (draws, N, *shape), in
    units and shapes of the input. Bytes stay bytes; images that are absent become floats in [0, 1];
    of bits it is the probability of 1; of a class the likeliest one, beside NAME_probabilities.
    -> what is shown, booleans (N, M). ValueError, in a sentence, and nothing written, for an input
    that does not fit.
    """
    if Path(out).exists():
        raise ValueError(f"{out} is there already: choose another --out")
    given, shown = read_new(model, standard, path)
    device, lead = next(model.parameters()).device, () if draws is None else (draws,)
    filled = {key: np.zeros((len(shown), model.latent_dim), "f4") for key in LATENT}
    done, start = 0, time.monotonic()
    for pattern, rows in data.patterns(torch.from_numpy(shown)):
        seen = [old.x[rows].to(device) if s else None for old, s in zip(given, pattern)]
        for index, q, z in passes(model, len(rows), partial(batch, seen), draws or DRAWS, seed):
            at, done = rows[index].numpy(), done + len(index)
            data.progress("rows filled in", done, len(index), len(shown), start)
            for key, value in zip(LATENT, (q.mean, q.stddev)):
                filled[key][at] = value.cpu().numpy()
            for first, part in zip(range(0, len(z), DRAWS), z.split(DRAWS)):
                where = at if draws is None else (slice(first, first + len(part)), at)
                for modality, old, mean in zip(model.modalities, given, model.decode(part)):
                    mean = (mean.mean(0) if draws is None else mean).double().cpu().numpy()
                    units = in_units(modality, old, standard.get(modality.name), mean)
                    for name, values in units.items():
                        if name not in filled:
                            shape = *lead, len(shown), *values.shape[len(lead) + 1 :]
                            filled[name] = np.zeros(shape, values.dtype)
                        filled[name][where] = values
    write(Path(out), filled)
    return shown


def read_new(model, standard, path):
    """-> per modality Given or None, what is shown (N, M). ValueError, in a sentence."""
    arrays, names = data.read_npz(path), [m.name for m in model.modalities]
    for key in arrays:
        if key not in (*names, "mask"):
            takes = f"the run has {', '.join(names)}, and mask may be there"
            near = data.nearest(key, (*names, "mask"), takes)
            raise ValueError(f"{path}: unknown array {key!r}: {near}")
    present = [name for name in names if name in arrays]
    if not present:
        raise ValueError(f"{path} has none of the run's modalities, {', '.join(names)}")
    for key, array in arrays.items():
        first = arrays[present[0]]
        if array.dtype.kind not in "buif" or not array.ndim or not first.ndim or not len(array):
            raise ValueError(f"{path}: {key} is to be numbers, one row per example")
        if len(array) != len(first):
            what = f"has {len(array):,} rows, {present[0]} {len(first):,}: they are to be the same"
            raise ValueError(f"{path}: {key} {what} examples")
    shape = len(arrays[present[0]]), len(names)
    shown = arrays.get("mask", np.ones(shape, bool)).astype(bool)
    if shown.shape != shape:
        order = ", ".join(names)
        what = f"mask is {shown.shape}, not {shape}: a row per example, a column per modality"
        raise ValueError(f"{path}: {what}, {order}")
    shown = shown & [name in arrays for name in names]
    if not shown.any(1).all():
        row = int((~shown.any(1)).argmax())
        raise ValueError(f"{path}: row {row} shows nothing: leave it out, or show a modality of it")
    given, last = [], model.decode(model.prior().sample((1,)))
    for modality, seen, like in zip(model.modalities, shown.T, last):
        array, where = arrays.get(modality.name), f"{path}: {modality.name}"
        classes = like.shape[-1] - 1 if like.ndim else 0  # of a class or a word, the last
        about = where, modality, array, seen, standard.get(modality.name), classes
        given.append(None if array is None else as_given(*about))
    return given, shown


def as_given(where, modality, array, seen, constants, classes):
    """An array of new examples as the model takes it; seen (N,): what is not may be anything;
    classes: the last of them. -> Given"""
    shape, dtype = array.shape[1:], array.dtype
    if len(modality.shape) == 3 and modality.shape[0] == 1 and array.ndim == 3:
        array = array[:, None]  # grey images
    if array.shape[1:] != tuple(modality.shape):
        expected = ", ".join(map(str, ("examples", *modality.shape)))
        raise ValueError(f"{where} is {(len(array), *shape)}, not ({expected}) as in training")
    x = np.where(seen.reshape(-1, *[1] * (array.ndim - 1)), array, 0)
    if not np.isfinite(x).all():
        row = int((~np.isfinite(x)).reshape(len(x), -1).any(1).argmax())
        raise ValueError(f"{where} has values that are not finite, in row {row}: hide it by a mask")
    numbers = modality.likelihood not in ("categorical", "poisson")
    as_bytes = numbers and constants is None and dtype == np.uint8 and array.max() > 1
    x = x.astype("f4") / 255 if as_bytes else x
    ranges = {
        "bernoulli": ("in [0, 1], or bytes", (x < 0) | (x > 1)),
        "poisson": ("from 0 on, whole", (x < 0) | (x % 1 != 0)),
        "categorical": (f"from 0 to {classes}, whole", (x < 0) | (x % 1 != 0) | (x > classes)),
    }
    takes, wrong = ranges.get(modality.likelihood, ("", np.zeros(1, bool)))
    if wrong.any():
        raise ValueError(f"{where} is to have values {takes}, as in training, not {x[wrong][0]:g}")
    if modality.likelihood == "categorical":
        return Given(torch.from_numpy(x.astype("i8")), shape, np.dtype("i8"))
    x = torch.from_numpy(data.standardise(x.astype("f8"), constants).astype("f4"))
    floats = np.result_type(dtype, "f4") if dtype.kind == "f" else np.dtype("f4")
    return Given(x, shape, dtype if as_bytes else floats)


def in_units(modality, given, constants, mean):
    """The mean of a modality as it is written; given: its array in the input, or None.
    mean ([K,] B, *shape), float64 -> {name: array}"""
    if modality.likelihood == "categorical":
        found = {modality.name: mean.argmax(-1)}
        if modality.shape:  # the words of a caption
            return found
        return found | {f"{modality.name}_probabilities": mean.astype("f4")}
    x = data.unstandardise(mean, constants)
    if given is None:
        return {modality.name: x if constants else x.astype("f4")}
    x = np.rint(255 * x) if given.dtype == np.uint8 else x
    lead = x.shape[: x.ndim - len(modality.shape)]
    return {modality.name: x.reshape(*lead, *given.shape).astype(given.dtype)}


def write(path, arrays):
    """An .npz, whole or not at all; arrays may be called what numpy.savez calls its own."""

    def archive(file):
        with zipfile.ZipFile(file, "w") as members:
            for name, array in arrays.items():
                with members.open(f"{name}.npy", "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, array, allow_pickle=False)

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        data.replace(path, archive)
    except OSError as error:
        raise ValueError(
            f"{path} cannot be written ({error.strerror}): choose another --out"
        ) from None
