"""Data sets, pairing masks and batches. `python data.py mnist-svhn` prepares a data set and draws a
preview.

    dataset = load("mnist-svhn", "./data")         # .train, .test: splits; .spec: arguments of nets.modalities
    streams = pairing(len(dataset.train), dataset.names, paired=0.5, unpaired="split")
    for step in batches(dataset.train, streams, batch_size=128):
        for weight, xs in step: ...                # xs: one tensor per modality, None where it is hidden

Randomness. Glyphs and the MNIST-SVHN pairs are fixed. Which examples are paired depends only on
`pairing`'s seed, the batch order only on the generator.
Ranges. Images, spectra and bits are float32 in [0, 1], captions int64 word indices. A user's own
arrays: features are float32, standardised; counts float32; classes int64.
"""

import argparse
import csv
import hashlib
import importlib
import io
import json
import math
import os
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

DATASETS = {  # name: its file in benchmarks/, which has load(name, root) -> Dataset
    "glyphs": "glyphs",
    "mnist-split": "digits",
    "mnist-split3": "digits",
    "mnist-svhn": "digits",
    "cub": "cub",
    "spectra": "spectra",
}
UNPAIRED = ("split", "all", "rest", "none")  # or the name of a modality
SAMPLING = ("natural", "balanced")


class Split:
    """The examples of a split: base tensors, held once, and for each modality the row of each
    example in its base."""

    def __init__(self, bases, rows=None, labels=None):
        self.bases = list(bases)
        self.rows = [torch.arange(len(b)) for b in self.bases] if rows is None else list(rows)
        self.labels = labels

    def __len__(self):
        return len(self.rows[0])

    def take(self, m, index):
        """Modality m of the examples `index`, as a model takes it: bytes become floats in [0, 1],
        bits 0. and 1.; words and classes stay int64."""
        x = self.bases[m][self.rows[m][index]]
        if x.dtype == torch.uint8:
            return x.float() / 255
        return x.float() if x.dtype == torch.bool else x

    def __getitem__(self, index):
        return [self.take(m, index) for m in range(len(self.bases))]

    def to(self, device):
        labels = None if self.labels is None else self.labels.to(device)
        return Split([b.to(device) for b in self.bases], [r.to(device) for r in self.rows], labels)

    def first(self, n):
        labels = None if self.labels is None else self.labels[:n]
        return Split(self.bases, [r[:n] for r in self.rows], labels)


class Dataset(NamedTuple):
    name: str
    train: Split
    test: Split
    spec: dict  # the arguments of nets.modalities, plain enough for JSON
    names: tuple  # of the modalities
    mask: torch.Tensor | None = None  # (N, M) booleans: what each training example shows
    test_mask: torch.Tensor | None = None  # the same for the test examples
    groups: torch.Tensor | None = None  # (N,) integers: training examples that are paired together
    words: list | None = None  # the vocabulary of captions
    note: str = ""  # what a reader of results must know; printed beside them
    digest: str = ""  # of the contents of an .npz, which may be moved


def load(name, root="./data", limit=None, likelihoods=None, stats=None):
    """A data set by name, or a user's path.npz.

    limit: the first N training examples only. likelihoods: one per modality, in place of the
    defaults. stats: {modality: {"mean", "std"}} that standardise an .npz's numbers; None: those of
    the training examples; {}: numbers stay as they are.
    ValueError for an unknown name, files that cannot be read, values that a likelihood does not
    take.
    """
    if str(name).endswith(".npz"):
        dataset = load_npz(Path(name), limit, likelihoods, stats)
    elif name in DATASETS:
        dataset = benchmark(name).load(name, Path(root))
        if likelihoods:
            check_bernoulli(dataset, likelihoods)
            dataset.spec["likelihoods"] = list(likelihoods)
    else:
        raise ValueError(f"--dataset must be {', '.join(DATASETS)} or a path.npz, not {name!r}")
    dataset = dataset._replace(spec=json.loads(json.dumps(dataset.spec)))  # as args.json has it
    if limit is None:
        return dataset
    mask, groups = (x if x is None else x[:limit] for x in (dataset.mask, dataset.groups))
    return dataset._replace(train=dataset.train.first(limit), mask=mask, groups=groups)


def benchmark(name):
    """The module of a data set in benchmarks/, whose __init__.py says what it may hold; None for a
    user's own arrays."""
    if name not in DATASETS:
        return None
    if not Path(__file__).with_name("benchmarks").is_dir():
        raise ValueError(f"{name} needs the folder benchmarks/ beside data.py; a path.npz does not")
    return importlib.import_module(f"benchmarks.{DATASETS[name]}")


# ------------------------------------------------------------------------------ pairing and batches


def pairing(n, names, paired=1.0, unpaired="split", seed=0, mask=None, groups=None):
    """The streams of training: [(mask, index), ...], a pure function of the arguments.

    mask: M booleans, what a stream shows; index: its examples (LongTensor). round(paired * n)
    random examples show everything, the others what `unpaired` says: split (one modality each,
    equal shares: [meme] SPLIT), the name of a modality (only that one), all (one stream per
    modality over all n, as [poe]'s code), rest (the same over the others only, as its text), none.
    With `mask` (n, M) the streams are its patterns. With `groups` (n,) whole groups are drawn, so
    that the counts are the nearest possible.
    """
    if mask is not None:
        if paired != 1:
            raise ValueError("--paired must be left out: the data have a train_mask")
        return patterns(mask)
    if not 0 < paired <= 1:
        raise ValueError(f"--paired must be a fraction in (0, 1], not {paired:g}")
    if unpaired not in (*UNPAIRED, *names):
        choices = ", ".join((*UNPAIRED, *names))
        raise ValueError(f"--unpaired must be one of {choices}, not {unpaired!r}")
    order, ends = shuffle(n, seed, groups)
    count = nearest_end(ends, round(paired * n))
    if count == 0:
        raise ValueError(f"--paired {paired:g} of {n} examples leaves none paired")
    pairs, rest = order[:count], order[count:]
    alone = [tuple(a == b for b in names) for a in names]
    streams = [((True,) * len(names), pairs)]
    if unpaired == "split":
        shares = torch.tensor([len(part) for part in rest.tensor_split(len(names))]).cumsum(0)
        cuts = [nearest_end(ends, count + k) - count for k in shares[:-1].tolist()]
        streams += zip(alone, rest.tensor_split(cuts))
    elif unpaired == "all":
        streams += [(one, torch.arange(n)) for one in alone]
    elif unpaired == "rest":
        streams += [(one, rest) for one in alone]
    elif unpaired != "none":
        streams += [(alone[list(names).index(unpaired)], rest)]
    return [(mask, index) for mask, index in streams if len(index)]


def shuffle(n, seed, groups=None):
    """A random order of n examples that keeps groups together. -> order (n,), and the positions at
    which a group ends (None without groups)"""
    generator = torch.Generator().manual_seed(seed)
    if groups is None:
        return torch.randperm(n, generator=generator), None
    _, group, sizes = groups.cpu().unique(return_inverse=True, return_counts=True)
    drawn = torch.randperm(len(sizes), generator=generator)
    ends = torch.cat([torch.zeros(1, dtype=torch.long), sizes[drawn].cumsum(0)])
    return drawn.argsort()[group].argsort(stable=True), ends


def nearest_end(ends, position):
    return position if ends is None else int(ends[(ends - position).abs().argmin()])


def patterns(mask):
    """The distinct rows of an (n, M) mask, those that show most first, each with its examples."""
    if not mask.any(1).all():
        row = int((~mask.any(1)).nonzero()[0])
        raise ValueError(f"the mask hides everything in row {row}: leave that row out")
    rows, which = mask.unique(dim=0, return_inverse=True)
    order = rows.sum(1).argsort(descending=True, stable=True).tolist()
    return [(tuple(rows[k].tolist()), (which == k).nonzero()[:, 0]) for k in order]


def one_pattern_per_step(streams, sampling):
    """True for natural sampling where a mask has more patterns than the papers' protocols have
    streams, M + 1: a step that showed all of them would cost a pass for each."""
    return sampling == "natural" and len(streams) > len(streams[0][0]) + 1


def batch_sizes(streams, batch_size, sampling):
    """The number of examples that a step takes from each stream, on average where it takes them from
    a single one, and of steps in an epoch."""
    counts = [len(index) for _, index in streams]
    total = sum(counts)
    if one_pattern_per_step(streams, sampling):
        return [min(batch_size, n) * n / total for n in counts], -(-total // batch_size)
    if sampling == "balanced":
        return [min(batch_size, n) for n in counts], -(-max(counts) // batch_size)
    sizes = [min(n, max(1, round(batch_size * n / total))) for n in counts]
    return sizes, -(-total // batch_size)


def select(split, mask, index):
    """The examples `index`, without the modalities that `mask` hides: M tensors or None."""
    return [split.take(m, index) if shown else None for m, shown in enumerate(mask)]


def batches(split, streams, batch_size, sampling="natural", generator=None, rank=0, world=1):
    """One epoch: per step a list of (weight, xs), one entry per stream; xs: M tensors, None for
    what the stream's mask hides.

    natural: a stream's share of the batch is its share of the examples, its weight n_i / sum n, so
    that a step estimates eq. (5)'s mean over examples without bias. With more than M + 1 streams,
    the patterns of a mask, a step takes batch_size examples of a single stream, drawn with
    probability n_i / sum n, weight 1: unbiased for the same mean. balanced: batch_size of each
    stream, weight 1; an epoch is one pass over the largest. An exhausted stream is shuffled again.
    `generator` shuffles, alike on every one of `world` ranks: each takes its part of every step,
    weighted so that the mean of the ranks' gradients is that of a single process.
    """
    sizes, steps = batch_sizes(streams, batch_size, sampling)
    counts = torch.tensor([len(index) for _, index in streams])
    total, largest = int(counts.sum()), int(counts.max())
    weights = [1.0 if sampling == "balanced" else len(index) / total for _, index in streams]
    visits = [range(len(streams))] * steps  # the streams of each step
    needed = [size * steps for size in sizes]
    if sampling == "balanced":
        needed = [largest if n == largest else k for n, k in zip(counts.tolist(), needed)]
    if one_pattern_per_step(streams, sampling):
        drawn = torch.multinomial(counts / total, steps, replacement=True, generator=generator)
        visits, weights = drawn[:, None].tolist(), [1.0] * len(streams)
        sizes = [min(batch_size, n) for n in counts.tolist()]
        needed = [size * k for size, k in zip(sizes, drawn.bincount(minlength=len(sizes)).tolist())]
    queues = []
    for (_, index), size, k in zip(streams, sizes, needed):
        passes = max(1, -(-k // len(index)))
        order = [torch.randperm(len(index), generator=generator) for _ in range(passes)]
        order = index[torch.cat(order)].to(split.rows[0].device)
        queues.append(iter(order.split(size)))
    for visited in visits:
        batch, first = [], rank
        parts = [(streams[k][0], weights[k], next(queues[k])) for k in visited]
        for mask, weight, drawn in parts:
            mine = drawn[first % world :: world]  # dealt like cards
            first -= len(drawn)
            if len(mine):
                share = world * len(mine) / len(drawn)
                batch.append((weight * share, select(split, mask, mine)))
        if not batch:  # fewer examples than ranks: one example with weight 0
            mask, _, drawn = parts[0]
            batch.append((0.0, select(split, mask, drawn[:1])))
        yield batch


def observed(split, streams, n):
    """Up to n different observed examples of each modality, spread over the rows of its base.
    -> M tensors"""
    examples = []
    for m in range(len(split.bases)):
        shown = [index for mask, index in streams if mask[m]]
        index = torch.cat(shown or [torch.empty(0).long()])
        rows = split.rows[m].cpu()[index]
        first = torch.from_numpy(np.unique(rows, return_index=True)[1])  # examples share images
        at = torch.linspace(0, len(first) - 1, min(n, len(first))).long()
        x = split.take(m, index[first[at]].to(split.rows[m].device))
        examples.append(x.nan_to_num(0.0) if x.is_floating_point() else x)  # missing: the mean
    return examples


# ------------------------------------------------------------------------------- a user's own arrays


class Kind(NamedTuple):
    """One kind of array: how it is stored, the likelihoods that fit (the default first), the values
    that it must have."""

    dtype: type
    likelihoods: tuple
    values: str
    valid: object  # function of an array, or of a block of its rows


KINDS = {
    "class": Kind(
        np.int64,
        ("categorical",),
        "integers from 0 to C - 1, one per example",
        lambda x: x.ndim == 1 and x.dtype.kind in "iub" and x.min() >= 0 and x.max() < 2**16,
    ),
    "bits": Kind(np.bool_, ("bernoulli",), "0 and 1", lambda x: ((x == 0) | (x == 1)).all()),
    "bytes": Kind(
        np.uint8,
        ("bernoulli", "laplace", "normal"),
        "bytes (uint8), 0 to 255",
        lambda x: x.dtype == np.uint8,
    ),
    "greys": Kind(
        np.float32,
        ("bernoulli", "laplace", "normal"),
        "bytes or floats in [0, 1]",
        lambda x: x.min() >= 0 and x.max() <= 1,
    ),
    "counts": Kind(
        np.float32,
        ("negative-binomial", "poisson"),
        "whole numbers from 0 on",
        lambda x: x.min() >= 0 and (x == np.floor(x)).all(),
    ),
    "numbers": Kind(
        np.float32,
        ("normal", "laplace"),
        "numbers that are finite in float32, or NaN where one is missing",
        lambda x: (np.abs(x[~np.isnan(x)]) <= np.finfo(np.float32).max).all(),
    ),
}


def kind_of(x, likelihood=None, shown=None):
    """The kind of an array (n,), (n, features) or (n, C, H, W), from its dtype, its shape, the
    likelihood asked for and the values of the rows that `shown` (n,) is true for.
    -> a key of KINDS"""
    if x.ndim == 1:
        return "class"
    if x.ndim == 4:
        return "bytes" if x.dtype == np.uint8 else "greys"
    if likelihood in KINDS["numbers"].likelihoods:
        return "numbers"
    if likelihood in KINDS["counts"].likelihoods:
        return "counts"
    if all(KINDS["bits"].valid(block) for block in row_blocks(x, shown)):
        return "bits"
    if likelihood == "bernoulli":
        return "bytes" if x.dtype == np.uint8 else "greys"
    integers = x.dtype.kind in "iu" and all(block.min() >= 0 for block in row_blocks(x, shown))
    return "counts" if integers else "numbers"


def row_blocks(x, shown=None, values=2**21):
    """Blocks of the rows of x, those where shown (n,) is true: nothing as large as x is made."""
    step = max(1, values // max(1, math.prod(x.shape[1:])))
    for start in range(0, len(x), step):
        block = x[start : start + step]
        if shown is not None:
            block = block[shown[start : start + step]]
        if len(block):
            yield block


def check_bernoulli(dataset, likelihoods):
    """ValueError where a Bernoulli likelihood is asked for values outside [0, 1]. nets.modalities
    checks which likelihoods the networks accept."""
    for m, (name, likelihood) in enumerate(zip(dataset.names, likelihoods)):
        for split in (dataset.train, dataset.test):
            x = split.bases[m]
            floats = isinstance(x, torch.Tensor) and x.is_floating_point()
            if likelihood == "bernoulli" and floats and not (x.min() >= 0 and x.max() <= 1):
                raise ValueError(f"--likelihoods: {name} must be in [0, 1] for bernoulli")


def load_npz(path, limit=None, likelihoods=None, stats=None):
    """A user's arrays train_NAME and test_NAME, one modality each, in the archive's order;
    optionally train_labels and test_labels (N,), train_mask and test_mask (N, M): which modalities
    an example shows. limit, likelihoods, stats: see load."""
    arrays = read_npz(path)
    names = modality_names(path, arrays)
    if likelihoods and len(likelihoods) != len(names):
        names = ", ".join(names)
        raise ValueError(f"--likelihoods needs one for each of {names}, not {len(likelihoods)}")
    masks = []
    for part in ("train", "test"):
        columns = {name: arrays[f"{part}_{name}"] for name in names}
        mask = arrays.pop(f"{part}_mask", None)
        masks.append(shown_rows(path, f"{part}_mask", names, columns, mask))
    del columns
    bases, specs = ([], []), {}
    for m, name in enumerate(names):
        pair = [arrays.pop(f"{part}_{name}") for part in ("train", "test")]
        if not masks[0][:limit, m].any() or not masks[1][:, m].any():
            raise ValueError(f"{path}: no training example, or no test example, shows {name}")
        tensors, specs[name] = user_array(
            f"{path}: {name}",
            pair,
            shown=[mask[:, m] for mask in masks],
            limit=limit,
            likelihood=likelihoods[m] if likelihoods else None,
            stats=None if stats is None else stats.get(name, {}),
        )
        for base, tensor in zip(bases, tensors):
            base.append(tensor)
    labels = [arrays.get(f"{part}_labels") for part in ("train", "test")]
    labels = [None if x is None else torch.from_numpy(x.astype(np.int64)) for x in labels]
    for part, mask in zip(("train", "test"), masks):
        if not mask.any(1).all():
            row = int((~mask.any(1)).argmax())
            raise ValueError(f"{path}: row {row} of the {part} split shows nothing: leave it out")
    train_mask, test_mask = (None if x.all() else torch.from_numpy(x) for x in masks)
    note = ""
    if train_mask is not None:
        note = f"train_mask hides {1 - masks[0].mean():.0%} of the arrays"
    with zipfile.ZipFile(path) as archive:
        sums = [(member.filename, member.CRC) for member in archive.infolist()]
    return Dataset(
        name=str(path),
        train=Split(bases[0], labels=labels[0]),
        test=Split(bases[1], labels=labels[1]),
        spec={"name": "npz", "arrays": specs},
        names=tuple(names),
        mask=train_mask,
        test_mask=test_mask,
        note=note,
        digest=hashlib.sha256(repr(sums).encode()).hexdigest(),
    )


def modality_names(path, arrays):
    """The names of an archive's modalities, in its order; both splits must have each of them, with
    one row per example."""
    extra = [f"{part}_{key}" for part in ("train", "test") for key in ("labels", "mask")]
    keys = [key for key in arrays if key not in extra]
    names = list(dict.fromkeys(key.partition("_")[2] for key in keys))
    for key in keys:
        part, _, name = key.partition("_")
        if part not in ("train", "test") or not name:
            raise ValueError(
                f"{path} has an array {key!r}; its arrays must be train_NAME and test_NAME, and may "
                f"be {', '.join(extra)}"
            )
    if len(names) < 2:
        raise ValueError(f"{path} must have two modalities or more, not {len(names)}")
    written = {f"{name}_{what}" for name in names for what in ("low", "high", "probabilities")}
    for name in names:
        if f"train_{name}" not in arrays or f"test_{name}" not in arrays:
            raise ValueError(f"{path} must have both train_{name} and test_{name}")
        if name in {*UNPAIRED, *written, "latent_mean", "latent_std"} or set(name) & set("/\\,:"):
            raise ValueError(f"{path}: a modality cannot be called {name!r}")
    for part in ("train", "test"):
        check_rows(path, {key: x for key, x in arrays.items() if key.startswith(f"{part}_")})
        labels = arrays.get(f"{part}_labels")
        if labels is not None and (labels.ndim != 1 or labels.dtype.kind not in "iu"):
            raise ValueError(f"{path}: {part}_labels must hold one integer per example")
    return names


def check_rows(path, arrays):
    """ValueError unless all arrays are numeric and have the same number of rows."""
    for key, x in arrays.items():
        if x.dtype.kind not in "buif" or not x.ndim or not x.size:
            raise ValueError(f"{path}: {key} must be numeric, with one row per example")
    if len({len(x) for x in arrays.values()}) > 1:
        rows = ", ".join(f"{key} has {len(x):,}" for key, x in arrays.items())
        raise ValueError(f"{path}: arrays must have as many rows each: {rows}")


def shown_rows(path, key, names, columns, mask=None):
    """Which modalities a row shows: `mask`, the archive's array `key`, all of them without it, less
    those with nothing but missing entries. columns: {modality: array}, which may lack some.
    -> (N, M) booleans"""
    shape = len(next(iter(columns.values()))), len(names)
    mask = np.ones(shape, bool) if mask is None else mask
    if mask.shape != shape or not KINDS["bits"].valid(mask):
        raise ValueError(
            f"{path}: {key} must hold 0 and 1 with shape {shape} (examples, modalities: "
            f"{', '.join(names)}), not {mask.shape}"
        )
    mask = mask.astype(bool) & [name in columns for name in names]
    for m, name in enumerate(names):
        x = columns.get(name)
        if x is not None and x.ndim == 2 and x.dtype.kind == "f":
            mask[:, m] &= ~np.isnan(x).all(1)
    return mask


def user_array(where, pair, shown, limit, likelihood, stats):
    """One modality of a user's .npz.

    pair: its training and its test array; shown: for each, (n,) booleans, the examples that show
    it, all others may hold anything; likelihood: the one asked for, or None; stats: to standardise
    numbers with, {}: not at all, None: those of the training examples.
    -> two tensors, {"kind", "shape", "likelihood", ...}: the arguments of nets.user_array. Numbers
    that are standardised have "stats", other tables and classes their "marginal"
    """
    pair = [x[:, None] if x.ndim == 3 else x for x in pair]  # grey images get a channel
    train, test = pair
    if train.shape[1:] != test.shape[1:]:
        raise ValueError(f"{where} is {train.shape} in training, {test.shape} in the test split")
    if train.ndim not in (1, 2, 4):
        raise ValueError(f"{where} must have one, two or four axes, not {train.ndim}")
    if train.ndim == 1 and train.dtype.kind == "f":
        raise ValueError(f"{where} must have the shape (examples, features); a class is an integer")
    if train.ndim == 4 and min(train.shape[2:]) < 8:
        raise ValueError(
            f"{where} has images {train.shape}, smaller than 8 x 8: the order must be (examples, "
            "channels, height, width); or flatten them to (examples, features)"
        )
    kind = kind_of(train, likelihood, shown[0])
    for part, x, seen in zip(("train", "test"), pair, shown):
        for block in row_blocks(x, seen):
            if not KINDS[kind].valid(block):
                raise ValueError(
                    f"{where} must hold {KINDS[kind].values}; the {part} split has other values, "
                    f"which {part}_mask can hide"
                )
    if likelihood and likelihood not in KINDS[kind].likelihoods:
        choices = " or ".join(KINDS[kind].likelihoods)
        raise ValueError(f"{where} ({kind}) needs the likelihood {choices}, not {likelihood!r}")
    likelihood = likelihood or KINDS[kind].likelihoods[0]
    spec = {"kind": kind, "shape": list(train.shape[1:]), "likelihood": likelihood}
    if stats and np.shape(stats["mean"]) != train.shape[1:]:
        raise ValueError(f"{where} does not have the features that the run began with")
    if kind == "class":
        spec["classes"] = 1 + max(int(x[seen].max()) for x, seen in zip(pair, shown))
        counts = np.bincount(train[:limit][shown[0][:limit]].astype(int), minlength=spec["classes"])
        spec["marginal"] = {"mean": (counts / counts.sum()).tolist()}
    elif kind == "numbers" and stats is None:
        spec["stats"] = feature_stats(train[:limit], shown[0][:limit])
    elif kind == "numbers" and stats:
        spec["stats"] = stats
    elif train.ndim == 2:
        spec["marginal"] = feature_stats(train[:limit], shown[0][:limit])
    tensors = []
    for x, seen in zip(pair, shown):
        stored = np.zeros(x.shape, KINDS[kind].dtype)  # zero where hidden
        start = 0
        for block in row_blocks(x):
            rows = slice(start, start + len(block))
            start += len(block)
            if "stats" in spec:
                block = standardise(block.astype(np.float64), spec["stats"])
            stored[rows][seen[rows]] = block[seen[rows]]
        tensors.append(torch.from_numpy(stored))
    return tensors, spec


def feature_stats(x, shown=None):
    """Mean and standard deviation of each feature of x (n, *shape), without NaN and without the rows
    that `shown` (n,) excludes; deviation 1 for a feature that is constant up to rounding.
    -> {"mean", "std"}, nested lists of x's feature shape"""
    n, total = 0, 0.0
    for block in row_blocks(x, shown):
        n = n + (~np.isnan(block)).sum(0)
        total = total + np.nansum(block, 0, dtype=np.float64)
    mean = total / np.maximum(n, 1)
    squares = 0.0
    for block in row_blocks(x, shown):
        squares = squares + np.nansum((block.astype(np.float64) - mean) ** 2, 0)
    std = np.sqrt(squares / np.maximum(n, 1))
    # the rounding of the values, and of sums of n of them as scikit-learn bounds it
    eps = np.finfo(x.dtype if x.dtype.kind == "f" else np.float64).eps
    rounding = np.maximum(eps, n * np.finfo(np.float64).eps) * np.abs(mean)
    std = np.where(std > rounding, std, 1.0)
    return {"mean": mean.tolist(), "std": std.tolist()}


def standardise(x, stats):
    """Features with mean 0 and deviation 1. x: numpy or torch, (..., *shape); stats as
    feature_stats returns them, or None: x as it is."""
    if not stats:
        return x
    return (x - like(stats["mean"], x)) / like(stats["std"], x)


def unstandardise(x, stats):
    """The inverse of standardise: features in the units of the data."""
    if not stats:
        return x
    return x * like(stats["std"], x) + like(stats["mean"], x)


def describe(spec):
    """One line per array of a user's .npz: the kind that it was taken for, and its likelihood."""
    lines = []
    for name, array in spec.get("arrays", {}).items():
        size = " x ".join(map(str, array["shape"])) or f"one of {array['classes']}"
        line = f"{name}: {array['kind']} ({size}), {array['likelihood']}"
        if array["kind"] == "numbers":
            line += ", standardised (--no-standardise)" if "stats" in array else ""
        if array["kind"] == "counts":
            line += "; a class must be integers of shape (examples,)"
        if len(array["shape"]) == 3:
            line += "; images must be (examples, channels, height, width)"
        lines.append(f"{line}; --likelihoods changes it")
    return lines


def like(values, x):
    """Nested lists as an array or tensor of x's dtype, on x's device."""
    if isinstance(x, torch.Tensor):
        return torch.tensor(values, dtype=x.dtype, device=x.device)
    return np.array(values, dtype=x.dtype)


# -------------------------------------------------------------------------------------------- files


def read_npz(path, required=()):
    """The arrays of an .npz, without pickles. ValueError where it cannot be read or lacks an array
    of `required`."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {key: archive[key] for key in archive.files}
    except Exception as error:  # missing, truncated or no .npz: numpy raises many kinds
        raise ValueError(f"{path} cannot be read: {error}") from None
    for key in required:
        if key not in arrays:
            raise ValueError(f"{path} has no array {key!r}, only {', '.join(arrays) or 'none'}")
    return arrays


def save_npz(path, **arrays):
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, lambda file: np.savez(file, **arrays))


def atomic_write(path, write):
    """write(file) to a temporary name beside `path`, then rename: after a kill there is the old
    file or the new one, never a part."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as file:
            write(file)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_csv(path, rows):
    """rows: dictionaries with the same keys; no rows: the header of an empty log."""
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, rows[0] if rows else ["epoch"])
    writer.writeheader()
    writer.writerows(rows)
    atomic_write(path, lambda file: file.write(table.getvalue().encode()))


def read_run(folder, device="cpu"):
    """args.json and checkpoint.pt of a run folder. -> args, state {"model", "optimizer", "epoch",
    "log"}; ValueError where there is no run that can be read"""
    folder = Path(folder)
    if not (folder / "checkpoint.pt").is_file() or not (folder / "args.json").is_file():
        raise ValueError(f"{folder} holds no run: it has no args.json and checkpoint.pt")
    try:
        args = json.loads((folder / "args.json").read_text(encoding="utf-8"))
        state = torch.load(folder / "checkpoint.pt", map_location=device, weights_only=True)
        spec, _, _ = args["spec"], state["model"], state["log"]
    except Exception as error:  # truncated, damaged, or not a run's
        reason = str(error).split("\n")[0]
        raise ValueError(f"{folder} cannot be read as a run: {reason}") from None
    if spec.get("name") == "npz" and "arrays" not in spec:
        raise ValueError(
            f"{folder} is of an earlier version, which read tables differently: train again"
        )
    return args, state


def prepared(root, *parts):
    """The path of a file that is made from a data set: below root or, where that is read-only,
    below ./data."""
    path = Path(root, *parts)
    folder = next(parent for parent in path.parents if parent.exists())
    writable = os.access(folder, os.W_OK) and folder.stat().st_mode & 0o222  # asks root, too
    return path if path.exists() or writable else Path("data", *parts)


# ----------------------------------------------------------------------------------------- pictures


def is_image(x):
    """True for images, grey or in colour: (N, 1 or 3, H, W)."""
    return len(x.shape) == 4 and x.shape[1] in (1, 3)


def save_grid(rows, path):
    """A PNG with rows of images in [0, 1], each (n, 1 or 3, H, W), in tiles of 64 pixels or more.
    -> False where torchvision, which draws it, is not installed"""
    try:
        from torchvision.utils import make_grid, save_image
    except (ImportError, RuntimeError):  # RuntimeError: it was built for another torch
        return False
    rows = [x.float().cpu().clamp(0, 1).expand(-1, 3, -1, -1) for x in rows]
    height, width = (max(x.shape[d] for x in rows) for d in (2, 3))
    rows = [F.pad(x, (0, width - x.shape[3], 0, height - x.shape[2]), value=0.5) for x in rows]
    grid = make_grid(torch.cat(rows), nrow=len(rows[0]))
    times = math.ceil(64 / min(height, width))
    grid = grid.repeat_interleave(times, 1).repeat_interleave(times, 2)
    atomic_write(Path(path), lambda file: save_image(grid, file, format="png"))
    return True


# --------------------------------------------------------------------------- python data.py DATASET


def main(argv=None):
    p = argparse.ArgumentParser(
        description="Prepare a data set, print its sizes and draw a preview.",
        usage="%(prog)s DATASET [--data DIR] [options]",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    p.add_argument("dataset", help=f"{', '.join(DATASETS)} or a path.npz")
    p.add_argument("--data", default="./data", help="folder of the data sets")
    modules = {DATASETS[name]: benchmark(name) for name in DATASETS}
    for file, module in modules.items():
        if hasattr(module, "flags"):
            module.flags(p.add_argument_group(file).add_argument)
    args = p.parse_args(argv)
    try:
        module = modules.get(DATASETS.get(args.dataset))
        if hasattr(module, "prepare"):
            module.prepare(args.data, args)
        dataset = load(args.dataset, args.data)
    except (ValueError, OSError) as error:
        p.error(str(error))
    for name, base in zip(dataset.names, dataset.train.bases):
        print(f"{name}: {tuple(base.shape[1:])} {str(base.dtype)[6:]}, {len(base):,} to train with")
    print(f"{len(dataset.train):,} examples to train, {len(dataset.test):,} to test")
    if dataset.note:
        print(f"note: {dataset.note}")
    xs = dataset.train[torch.arange(min(10, len(dataset.train)))]
    images = [x for x in xs if is_image(x)]
    path = f"preview-{Path(args.dataset).stem}.png"
    if images and save_grid(images, path):
        print(f"preview: {path}")


if __name__ == "__main__":
    main()
