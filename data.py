"""Data sets, pairing masks, batches and the files of a run. `python data.py mnist-svhn` prepares a
data set and draws a preview.

    dataset = load("mnist-svhn", "./data")    # .train, .test: splits; .spec: see nets.modalities
    streams = dataset.streams(paired=0.5, unpaired="split")
    for step in batches(dataset.train, streams, batch_size=128):
        for weight, xs in step: ...           # xs: a tensor per modality, None where it is hidden

How a data set is read is in its file in loaders/.

Randomness. Glyphs and the MNIST-SVHN pairs are fixed. Which examples are paired depends only on
`pairing`'s seed, the batch order only on the generator.
Ranges. Images, spectra and bits are float32 in [0, 1], captions int64 word indices. A user's own
arrays: features are float32, standardised; counts float32; classes int64.
"""

import argparse
import csv
import importlib
import io
import json
import math
import os
import sys
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

DATASETS = {  # name: its file in loaders/, which has load(name, root) -> Dataset
    "glyphs": "glyphs",
    "mnist-split": "digits",
    "mnist-split3": "digits",
    "mnist-svhn": "digits",
    "cub": "cub",
    "spectra": "spectra",
}
PREPARED = ("cub", "spectra")  # loaders with flags and preparation for `python data.py NAME`
UNPAIRED = ("split", "all", "rest", "none")  # or the name of a modality
SAMPLING = ("natural", "balanced")
LEAST_EPOCHS, LEAST_STEPS = 100, 1500  # of a path.npz, where --epochs is not given


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

    def distinct_examples(self, streams, n):
        """Up to n different examples of each modality among those that the streams show, spread over
        the rows of its base. -> M tensors"""
        examples = []
        for m in range(len(self.bases)):
            parts = [index for mask, index in streams if mask[m]]
            index = torch.cat(parts or [torch.empty(0).long()])
            rows = self.rows[m].cpu()[index]
            first = torch.from_numpy(np.unique(rows, return_index=True)[1])  # examples share images
            at = torch.linspace(0, len(first) - 1, min(n, len(first))).long()
            x = self.take(m, index[first[at]].to(self.rows[m].device))
            examples.append(x.nan_to_num(0.0) if x.is_floating_point() else x)  # missing: the mean
        return examples


class Dataset(NamedTuple):
    name: str
    train: Split
    test: Split
    spec: dict  # the arguments of nets.modalities, plain enough for JSON
    names: tuple  # of the modalities
    mask: torch.Tensor | None = None  # (N, M) booleans: what each training example shows
    test_mask: torch.Tensor | None = None  # the same for the test examples
    groups: torch.Tensor | None = None  # (N,) integers: training examples that are paired together
    views: dict = {}  # images that oracles judge: {name: the modalities stacked to it}; see loaders/
    words: list | None = None  # the vocabulary of captions
    note: str = ""  # what a reader of results must know; printed beside them
    digest: str = ""  # of the contents of an .npz, which may be moved
    lines: tuple = ()  # printed when training starts: what each array of an .npz was taken for

    def streams(self, paired=1.0, unpaired="split", seed=0):
        """The streams of training; see `pairing`."""
        return pairing(
            len(self.train),
            self.names,
            paired=paired,
            unpaired=unpaired,
            seed=seed,
            mask=self.mask,
            groups=self.groups,
        )


def load(name, root="./data", limit=None, likelihoods=None, standardise=True, spec=None):
    """A data set by name, or a user's path.npz.

    limit: the first N training examples only. likelihoods: one per modality, in place of the
    defaults. standardise: an .npz's numbers get mean 0 and deviation 1. spec: that of an earlier
    run, whose kinds, likelihoods and statistics an .npz takes over.
    ValueError for an unknown name, files that cannot be read, values that a likelihood does not
    take.
    """
    if str(name).endswith(".npz"):
        dataset = loader("arrays").load(Path(name), limit, likelihoods, standardise, spec)
    elif name in DATASETS:
        dataset = loader(DATASETS[name]).load(name, Path(root))
        if likelihoods:
            check_bernoulli(dataset, likelihoods)
            dataset.spec["likelihoods"] = list(likelihoods)
    else:
        raise ValueError(f"--dataset must be {', '.join(DATASETS)} or a path.npz, not {name!r}")
    if limit is None:
        return dataset
    mask, groups = (x if x is None else x[:limit] for x in (dataset.mask, dataset.groups))
    return dataset._replace(train=dataset.train.first(limit), mask=mask, groups=groups)


def loader(file):
    """The module of a file in loaders/."""
    if not Path(__file__).with_name("loaders").is_dir():
        raise ValueError("data.py needs the folder loaders/ beside it")
    return importlib.import_module(f"loaders.{file}")


def check_bernoulli(dataset, likelihoods):
    """ValueError where a Bernoulli likelihood is asked for values outside [0, 1]. nets.modalities
    checks which likelihoods the networks accept."""
    for m, (name, likelihood) in enumerate(zip(dataset.names, likelihoods)):
        for split in (dataset.train, dataset.test):
            x = split.bases[m]
            floats = isinstance(x, torch.Tensor) and x.is_floating_point()
            if likelihood == "bernoulli" and floats and not (x.min() >= 0 and x.max() <= 1):
                raise ValueError(f"--likelihoods: {name} must be in [0, 1] for bernoulli")


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
    group_order = torch.randperm(len(sizes), generator=generator)
    ends = torch.cat([torch.zeros(1, dtype=torch.long), sizes[group_order].cumsum(0)])
    place = group_order.argsort()[group]  # of each example's group in that order
    return place.argsort(stable=True), ends


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


def default_epochs(streams, batch_size, sampling):
    """The epochs of an .npz without --epochs: small tables need more passes."""
    _, steps = batch_sizes(streams, batch_size, sampling)
    return max(LEAST_EPOCHS, -(-LEAST_STEPS // steps))


def select(split, mask, index):
    """The examples `index`, without the modalities that `mask` hides: M tensors or None."""
    return [split.take(m, index) if shows else None for m, shows in enumerate(mask)]


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
    weights = [1.0] * len(streams)
    visits = [range(len(streams))] * steps  # the streams of each step
    if one_pattern_per_step(streams, sampling):
        shares = counts / counts.sum()
        visits = torch.multinomial(shares, steps, replacement=True, generator=generator)
        visits = visits[:, None].tolist()
        sizes = [min(batch_size, n) for n in counts.tolist()]
    elif sampling == "natural":
        weights = [n / int(counts.sum()) for n in counts.tolist()]
    queues = []
    for k, ((_, index), size) in enumerate(zip(streams, sizes)):
        visited = sum(k in step for step in visits)
        needed = visited * size
        if sampling == "balanced" and len(index) == max(counts):
            needed = len(index)  # one pass, whose last batch may be smaller
        passes = max(1, -(-needed // len(index)))
        order = [torch.randperm(len(index), generator=generator) for _ in range(passes)]
        order = index[torch.cat(order)].to(split.rows[0].device)
        queues.append(iter(order.split(size)))
    for step in visits:
        parts = [(streams[k][0], weights[k], next(queues[k])) for k in step]
        batch, first = [], rank
        for mask, weight, index in parts:
            mine = index[first % world :: world]  # the next part begins with the next rank
            first -= len(index)
            if len(mine):
                share = world * len(mine) / len(index)
                batch.append((weight * share, select(split, mask, mine)))
        if not batch:  # fewer examples than ranks: one example with weight 0
            mask, _, index = parts[0]
            batch.append((0.0, select(split, mask, index[:1])))
        yield batch


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


def save_npz(path, arrays):
    """An .npz of {name: array}. Unlike np.savez, it takes every name, `file` included."""

    def write(file):
        with zipfile.ZipFile(file, "w") as archive:
            for name, x in arrays.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, np.asarray(x), allow_pickle=False)

    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, write)


def atomic_write(path, write):
    """write(file) to a temporary name beside `path`, then rename: after a kill there is the old
    file or the new one, never a part."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as file:
            write(file)
        os.replace(part, path)
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        if part.exists():
            part.unlink()


def write_csv(path, rows):
    """rows: dictionaries with the same keys; no rows: the header of an empty log."""
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, rows[0] if rows else ["epoch"])
    writer.writeheader()
    writer.writerows(rows)
    atomic_write(path, lambda file: file.write(table.getvalue().encode()))


def save_run(folder, model, optimizer, epoch, log):
    """checkpoint.pt, tensors and numbers only, which torch.load reads with weights_only=True;
    log.csv, a row per epoch."""
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    state |= {"epoch": epoch, "log": log}
    atomic_write(folder / "checkpoint.pt", lambda file: torch.save(state, file))
    write_csv(folder / "log.csv", log)


def read_run(folder, device="cpu"):
    """args.json and checkpoint.pt of a run folder. -> args, state {"model", "optimizer", "epoch",
    "log"}; ValueError where there is no run that can be read"""
    folder = Path(folder)
    if not (folder / "checkpoint.pt").is_file() or not (folder / "args.json").is_file():
        raise ValueError(f"{folder} holds no run: it has no args.json and checkpoint.pt")
    try:
        args = json.loads((folder / "args.json").read_text(encoding="utf-8"))
        state = torch.load(folder / "checkpoint.pt", map_location=device, weights_only=True)
    except Exception as error:  # truncated, damaged, or not a run's
        reason = str(error).split("\n")[0]
        raise ValueError(f"{folder} cannot be read as a run: {reason}") from None
    if "masked" not in args:
        raise ValueError(f"{folder} is a run of an earlier version: train again")
    return args, state


# ------------------------------------------------------------------------------------- command line


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, except those that are None."""

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


def count(text):
    """An argparse type: a whole number above 0."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"must be a whole number above 0, not {text}")
    return int(text)


def factor(text):
    """An argparse type: a finite number that is not negative."""
    if not 0 <= float(text) < math.inf:
        raise argparse.ArgumentTypeError(f"must be finite and not negative, not {text}")
    return float(text)


def names(text):
    """An argparse type: a,b -> ["a", "b"]"""
    return text.split(",")


def factors(text):
    """An argparse type: 3.9,1 -> [3.9, 1.0]"""
    return [factor(part) for part in text.split(",")]


def find_device(name):
    """ValueError unless torch has the device here. -> torch.device"""
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError):  # torch was built without it, or it is not there
        raise ValueError(f"--device {name} is not available here") from None
    return torch.device(name)


def duration(seconds):
    """As text, at most three digits: 45 s, 12 min, 3.5 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


# ----------------------------------------------------------------------------------------- pictures


def is_image(x):
    """True for images, grey or in colour: (N, 1 or 3, H, W)."""
    return x.ndim == 4 and x.shape[1] in (1, 3)


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


@torch.no_grad()
def save_examples(model, dataset, path, n=10):
    """A PNG with a column for each of n test examples, one per label where there are as few labels.
    Rows: the images of each modality and what one z of that modality alone generates. Prints what
    the rows are."""
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
    rows = {name: x for name, x in rows.items() if is_image(x)}
    if rows and save_grid(list(rows.values())[:12], path):
        print(f"{path}, from the top: {', '.join(list(rows)[:12])}")


# --------------------------------------------------------------------------- python data.py DATASET


def main(argv=None):
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("dataset", nargs="?")
    name = first.parse_known_args(argv)[0].dataset
    p = argparse.ArgumentParser(
        description="Prepare a data set, print its sizes and draw a preview.",
        usage="%(prog)s DATASET [--data DIR] [options]",
        formatter_class=Help,
    )
    p.add_argument("dataset", help=f"{', '.join(DATASETS)} or a path.npz")
    p.add_argument("--data", default="./data", help="folder of the data sets")
    for prepared in PREPARED:
        if name in (prepared, None):  # None: --help
            loader(prepared).flags(p.add_argument_group(prepared).add_argument)
    args = p.parse_args(argv)
    try:
        if args.dataset in PREPARED:
            loader(args.dataset).prepare(args.data, args)
        dataset = load(args.dataset, args.data)
    except (ValueError, OSError) as error:
        p.error(str(error))
    for line in dataset.lines:
        print(line)
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
    sys.stdout.reconfigure(errors="replace")  # a terminal may lack some characters
    main()
