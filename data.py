"""Data sets, pairing masks and batches. `python data.py mnist-svhn` prepares a data set and draws a
preview.

    dataset = load("mnist-svhn", "./data")         # .train, .test: splits; .spec: arguments for nets.modalities
    streams = pairing(len(dataset.train), dataset.names, paired=0.5, unpaired="split")
    for step in batches(dataset.train, streams, batch_size=128):
        for weight, xs in step: ...                # xs: one tensor per modality, None where it is hidden

What is random, and in what: glyphs and the MNIST-SVHN pairs are fixed (whatever --seed
says); which examples are paired depends on `pairing`'s seed alone; the order of the batches on
their generator. Images are float32 in [0, 1], captions int64 word indices, spectra and bits float32
in [0, 1].
"""

import argparse
import csv
import gzip
import hashlib
import lzma
import os
import re
import shutil
import sys
import tarfile
import tempfile
import time
import urllib.request
import zipfile
import zlib
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

DATASETS = ("glyphs", "mnist-split", "mnist-split3", "mnist-svhn", "cub", "spectra")


class Split:
    """The examples of a split: base tensors held once and, per modality, the row of each example in
    its base."""

    def __init__(self, bases, rows=None, labels=None):
        self.bases = list(bases)
        self.rows = [torch.arange(len(b)) for b in self.bases] if rows is None else list(rows)
        self.labels = labels

    def __len__(self):
        return len(self.rows[0])

    def take(self, m, index):
        """Modality m of the examples `index`: bytes become [0, 1], bits 0 and 1, words stay
        int64."""
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
    words: list | None = None  # the vocabulary of captions
    note: str = ""  # what a reader of results must know, printed beside them


def load(name, root="./data", limit=None):
    """A data set by name, or a user's path.npz. ValueError, in a sentence, for whatever is wrong
    with the files.

    limit: the first N training examples only.
    """
    root = Path(root)
    if str(name).endswith(".npz"):
        dataset = load_npz(Path(name))
    elif name in LOADERS:
        dataset = LOADERS[name](root)
    else:
        raise ValueError(
            f"there is no data set {name!r}; choose {', '.join(DATASETS)} or a path.npz"
        )
    if limit is None:
        return dataset
    mask = None if dataset.mask is None else dataset.mask[:limit]
    return dataset._replace(train=dataset.train.first(limit), mask=mask)


# ------------------------------------------------------------------------------ pairing and batches


def pairing(n, names, paired=1.0, unpaired="split", seed=0, mask=None):
    """Who shows what in training: a list of streams (shown, index), a pure function of its
    arguments.

    shown: M booleans, index: the examples (LongTensor). round(paired * n) random examples are shown
    whole; the rest as `unpaired` says: split (one modality each, equal shares: [meme] SPLIT), a
    modality's name (only that one), all (one stream per modality over all n, as [poe]'s code), rest
    (the same over the rest, as its text), none. With `mask` (n, M), the streams are its patterns.
    ValueError for what cannot be done.
    """
    if mask is not None:
        return patterns(mask)
    if not 0 < paired <= 1:
        raise ValueError(f"--paired is the fraction of whole examples, in (0, 1], not {paired:g}")
    if unpaired not in ("split", "all", "rest", "none", *names):
        raise ValueError(
            f"--unpaired is split, all, rest, none or one of {', '.join(names)}, not {unpaired!r}"
        )
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    count = round(paired * n)
    if count == 0:
        raise ValueError(f"--paired {paired:g} of {n} examples leaves none paired: raise it")
    whole, rest = order[:count], order[count:]
    alone = [tuple(a == b for b in names) for a in names]
    streams = [((True,) * len(names), whole)]
    if unpaired == "split":
        streams += zip(alone, rest.tensor_split(len(names)))
    elif unpaired == "all":
        streams += [(shown, torch.arange(n)) for shown in alone]
    elif unpaired == "rest":
        streams += [(shown, rest) for shown in alone]
    elif unpaired != "none":
        streams += [(alone[list(names).index(unpaired)], rest)]
    return [(shown, index) for shown, index in streams if len(index)]


def patterns(mask):
    """The distinct rows of an (n, M) mask, the fullest first, each with its examples."""
    if not mask.any(1).all():
        raise ValueError(
            f"train_mask hides everything of example {int((~mask.any(1)).nonzero()[0])}"
        )
    rows, which = mask.unique(dim=0, return_inverse=True)
    order = rows.sum(1).argsort(descending=True, stable=True).tolist()
    return [(tuple(rows[k].tolist()), (which == k).nonzero()[:, 0]) for k in order]


def shares(streams, batch_size, sampling):
    """How many examples of each stream are in a step, and the steps of an epoch. -> sizes, steps"""
    counts = [len(index) for _, index in streams]
    if sampling == "balanced":
        return [min(batch_size, n) for n in counts], -(-max(counts) // batch_size)
    sizes = [min(n, max(1, round(batch_size * n / sum(counts)))) for n in counts]
    return sizes, -(-sum(counts) // batch_size)


def show(split, shown, index):
    """The examples `index` with what the mask `shown` hides left out: M tensors or None."""
    return [split.take(m, index) if seen else None for m, seen in enumerate(shown)]


def batches(split, streams, batch_size, sampling="natural", generator=None, rank=0, world=1):
    """One epoch: per step a list of (weight, xs), one entry per stream, xs with None for what its
    mask hides.

    natural: a stream's share of the batch is its share of the examples, its weight n_i / sum n: a
    step estimates eq. 5's mean over examples without bias. balanced: batch_size of each stream,
    weight 1, an epoch is one pass over the largest. A stream that runs out is shuffled again.
    `generator` shuffles, the same on every one of `world` ranks: each takes its part of every step,
    with weights under which the mean of the ranks' gradients is that of one process.
    """
    sizes, steps = shares(streams, batch_size, sampling)
    total = sum(len(index) for _, index in streams)
    largest = max(len(index) for _, index in streams)
    queues = []
    for (_, index), size in zip(streams, sizes):
        full = sampling == "balanced" and len(index) == largest
        need = largest if full else size * steps
        order = [
            torch.randperm(len(index), generator=generator) for _ in range(-(-need // len(index)))
        ]
        queues.append(index[torch.cat(order)].to(split.rows[0].device).split(size))
    for step in range(steps):
        batch, dealt = [], rank
        for (shown, index), queue in zip(streams, queues):
            drawn = queue[step]
            weight = 1.0 if sampling == "balanced" else len(index) / total
            chosen = drawn[dealt % world :: world]  # dealt like cards
            dealt -= len(drawn)
            if len(chosen):
                share = world * len(chosen) / len(drawn)
                batch.append((weight * share, show(split, shown, chosen)))
        if not batch:  # fewer examples than ranks: one again, of no weight
            batch.append((0.0, show(split, streams[0][0], queues[0][step][:1])))
        yield batch


def observed(split, streams, n):
    """Up to n different examples of each modality among the streams that show it, spread over its rows.
    -> M tensors"""
    found = []
    for m in range(len(split.bases)):
        index = torch.cat(
            [index for shown, index in streams if shown[m]] or [torch.empty(0).long()]
        )
        rows = split.rows[m].cpu()[index]
        first = torch.from_numpy(np.unique(rows, return_index=True)[1])  # examples share images
        at = torch.linspace(0, len(first) - 1, min(n, len(first))).long()
        found.append(split.take(m, index[first[at]].to(split.rows[m].device)))
    return found


# ------------------------------------------------------------------------------------------- digits


def load_glyphs(root):
    """Digits of a font that ships inside Pillow: grey 1x28x28 and coloured 3x32x32 of the same
    digit, 10,000 + 2,000."""
    train, test = glyphs(10_000, seed=0), glyphs(2_000, seed=1)
    return Dataset("glyphs", train, test, {"name": "glyphs"}, ("grey", "colour"))


def glyphs(n, seed):
    from PIL import Image, ImageDraw, ImageFont

    font, templates = ImageFont.load_default(56), []
    for digit in "0123456789":
        page = Image.new("L", (64, 64))
        ImageDraw.Draw(page).text((32, 32), digit, font=font, fill=255, anchor="mm", stroke_width=2)
        templates.append(torch.from_numpy(np.array(page)))
    templates = torch.stack(templates)[:, None].float() / 255  # (10, 1, 64, 64)
    generator = torch.Generator().manual_seed(seed)

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(n, *shape, generator=generator)

    def warped(labels, size):
        """Rotated by up to 9 degrees, sheared, 1 to 1.2 times as large, shifted by up to 4 %. ->
        (n, 1, size, size)"""
        angle, shear, zoom = uniform(-0.16, 0.16), uniform(-0.05, 0.05), uniform(1, 1.2)
        cos, sin = angle.cos() / zoom, angle.sin() / zoom
        across = torch.stack([cos, shear * cos - sin, uniform(-0.08, 0.08)], -1)
        down = torch.stack([sin, shear * sin + cos, uniform(-0.08, 0.08)], -1)
        pages = []
        for page, theta in zip(labels.split(1000), torch.stack([across, down], 1).split(1000)):
            grid = F.affine_grid(theta, (len(page), 1, size, size), align_corners=False)
            pages.append(F.grid_sample(templates[page], grid, align_corners=False))
        return torch.cat(pages)

    labels = torch.randint(10, (n,), generator=generator)
    grey, shape = warped(labels, 28), warped(labels, 32)
    ink, paper = uniform(0.6, 1, 3, 1, 1), uniform(0, 0.3, 3, 1, 1)
    colour = paper + (ink - paper) * shape
    colour = colour + 0.02 * torch.randn(colour.shape, generator=generator)
    bases = [(255 * x.clamp(0, 1)).round().byte() for x in (grey, colour)]
    return Split(bases, labels=labels)


def load_bands(root, name, names):
    """MNIST images cut into equal bands: 14 rows each, or 9 each of the first 27."""
    height = 28 // len(names)

    def cut(images, labels):
        return Split(
            [images[:, :, i * height : (i + 1) * height] for i in range(len(names))], labels=labels
        )

    return Dataset(name, cut(*mnist(root, True)), cut(*mnist(root, False)), {"name": name}, names)


def load_mnist_svhn(root, repeats=1):
    """Pairs of the same digit. Per class n = the fewer of both, each side permuted, `repeats` times
    (30 in MMVAE)."""
    crops = svhn(root)
    generator = torch.Generator().manual_seed(0)
    splits = []
    for part in ("train", "test"):
        images, digits = mnist(root, part == "train")
        x, y = crops[f"{part}_x"], crops[f"{part}_y"]
        rows = [], []
        for digit in range(10):
            members = [(labels == digit).nonzero()[:, 0] for labels in (digits, y)]
            n = min(len(m) for m in members)
            for side, m in zip(rows, members):
                side += [m[:n][torch.randperm(n, generator=generator)] for _ in range(repeats)]
        rows = [torch.cat(side) for side in rows]
        if not len(rows[0]):
            raise ValueError(f"MNIST and SVHN in {root} have no {part} digit in common")
        mixed = torch.randperm(len(rows[0]), generator=generator)
        rows = [side[mixed] for side in rows]
        splits.append(Split([images, x], rows, digits[rows[0]]))
    n = len(crops["train_x"])
    note = "" if n == 73257 else f"SVHN with {n:,} training crops, not the standard 73,257"
    return Dataset("mnist-svhn", *splits, {"name": "mnist-svhn"}, ("mnist", "svhn"), note=note)


def mnist(root, train):
    """-> images (N, 1, 28, 28) bytes, labels (N,), from root/MNIST/raw; downloaded if missing."""
    from torchvision.datasets import MNIST
    from torchvision.datasets.mnist import read_image_file, read_label_file

    folder, stem = root / "MNIST" / "raw", "train" if train else "t10k"
    files = [folder / f"{stem}-images-idx3-ubyte", folder / f"{stem}-labels-idx1-ubyte"]
    if not all(f.exists() for f in files):

        def fetch():  # beside its place and renamed: torchvision unpacks in place
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".MNIST.", dir=root) as part:
                shutil.copytree(folder, raw := Path(part, "MNIST", "raw"))
                MNIST(part, download=True)
                for file in raw.iterdir():
                    os.replace(file, folder / file.name)

        downloaded(fetch, folder, "MNIST's four idx files")
    found = []
    for file, read in zip(files, (read_image_file, read_label_file)):
        try:
            found.append(read(file))
        except Exception as error:  # torchvision asserts, or fails in frombuffer
            raise ValueError(
                f"{file} is damaged or no IDX file: delete it, and it is downloaded anew"
            ) from error
    images, labels = found
    if images.shape[1:] != (28, 28) or not 0 < len(images) == len(labels) or labels.max() > 9:
        raise ValueError(f"{files[0]} and {files[1].name} are not 28 x 28 images with their digits")
    return images[:, None], labels


def svhn(root):
    """root/svhn.npz, made from torchvision's SVHN at first, as tensors: train_x (N, 3, 32, 32)
    bytes, train_y, test_x, test_y."""
    path = prepared(root, "svhn.npz")
    if not path.exists():
        from torchvision.datasets import SVHN

        arrays, folder = {}, path.with_name("svhn")
        for part in ("train", "test"):
            raw = downloaded(
                lambda part=part: SVHN(folder, part, download=True),
                folder,
                "SVHN's train_32x32.mat and test_32x32.mat",
            )
            arrays |= {f"{part}_x": raw.data, f"{part}_y": raw.labels}
        save_npz(path, **arrays)
    arrays = read_npz(path, ("train_x", "train_y", "test_x", "test_y"))
    found = {}
    for part in ("train", "test"):
        x, y = arrays[f"{part}_x"], arrays[f"{part}_y"]
        good = x.dtype == np.uint8 and x.ndim == 4 and x.shape[1:] == (3, 32, 32) and len(x)
        good = good and y.shape == (len(x),) and y.dtype.kind in "iu"
        if not good or y.min() < 0 or y.max() > 10:  # SVHN's own files call the digit 0 10
            raise ValueError(
                f"{path}: {part}_x is to be uint8 (N, 3, 32, 32) with N digits in {part}_y"
            )
        found[f"{part}_x"] = torch.from_numpy(x)
        found[f"{part}_y"] = torch.from_numpy(y.astype(np.int64)) % 10
    return found


def downloaded(fetch, folder, what):
    """fetch(), into folder. Its failure leaves no empty folders behind and becomes a sentence."""
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        return fetch()
    except Exception as error:  # URLError, RuntimeError, OSError: whatever the download met
        for path in new:
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()
        reason = (str(error) or type(error).__name__).splitlines()[-1]
        raise ValueError(
            f"{what} are not in {folder} and could not be downloaded ({reason}): put them there, "
            "or name the folder of your data sets with --data"
        ) from None


# ----------------------------------------------------------------------------------- arrays on disk


MOST_BYTES, MOST_PACKED = 2**28, 500  # deflate packs zeros by 1,030: a bomb, and no data


def read_npz(path, required=()):
    """The arrays of an .npz, without unpickling anything. ValueError when it is damaged, lacks a
    required key, or is large and more than 500 times as large unpacked."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            missing = [key for key in required if key not in archive]
            if missing:
                raise ValueError(
                    f"{path} has no array {missing[0]!r}, only {', '.join(archive.files) or 'none'}"
                )
            packed, whole = os.path.getsize(path), sum(m.file_size for m in archive.zip.infolist())
            if whole > max(MOST_BYTES, MOST_PACKED * packed):
                raise ValueError(f"its {packed:,} bytes unpack to {whole:,}")
            arrays = {key: archive[key] for key in archive.files}
            odd = [key for key, array in arrays.items() if not isinstance(array, np.ndarray)]
            if odd:  # numpy hands out the bytes of what is no array
                raise ValueError(f"{odd[0]} is none")
            return arrays
    except FileNotFoundError:
        raise ValueError(f"there is no file {path}") from None
    except ValueError as error:
        if str(error).startswith(str(path)):
            raise
        what = "cannot be read as an .npz of plain arrays"
        raise ValueError(f"{path} {what} ({one_line(error)})") from None
    except Exception as error:  # BadZipFile, EOFError, zlib.error, MemoryError of a forged header
        raise ValueError(f"{path} is damaged or no .npz ({one_line(error)})") from None


def one_line(error):
    """What an error says, on one line, at most 300 characters of it."""
    return " ".join(str(error).split())[:300]


def read_checkpoint(path, device="cpu"):
    """What torch.save has written: tensors and numbers, no code is run. ValueError when a sum is
    wrong, which torch.load does not check; its errors and zipfile's for what is no checkpoint."""
    with zipfile.ZipFile(path) as archive:
        if archive.testzip():
            raise ValueError(f"{path.name} is damaged")
    return torch.load(path, map_location=device, weights_only=True)


def prepared(root, *parts):
    """Where a file that is made from a data set lies: below root or, if that is read-only,
    ./data."""
    path = Path(root, *parts)
    folder = next(parent for parent in path.parents if parent.exists())
    writable = os.access(folder, os.W_OK) and folder.stat().st_mode & 0o222  # asks root, too
    return path if path.exists() or writable else Path("data", *parts)


def refuse_values(dataset, modalities):
    """ValueError where a Bernoulli likelihood is asked for values outside [0, 1]."""
    for k, (m, base) in enumerate(zip(modalities, dataset.train.bases)):
        if (
            m.likelihood == "bernoulli"
            and isinstance(base, torch.Tensor)
            and base.dtype.is_floating_point
        ):
            seen = base if dataset.mask is None else base[: len(dataset.mask)][dataset.mask[:, k]]
            if len(seen) and not (seen.min() >= 0 and seen.max() <= 1):
                raise ValueError(
                    f"bernoulli takes values in [0, 1], {m.name} has others: choose another of "
                    "--likelihoods, or scale them"
                )


def replace(path, write):
    """write(file) beside its place, then rename, so that a reader finds a whole file or none."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as file:
            write(file)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def save_npz(path, **arrays):
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace(path, lambda file: np.savez(file, **arrays))
    except OSError as error:
        raise ValueError(
            f"{path} cannot be written ({error.strerror}): choose another --data"
        ) from None


def download(url, path, digest=None):
    """url -> path, unless it is there, by way of a temporary name; its MD5 is checked against
    `digest`. -> path"""
    if path.exists():
        return path
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(url, timeout=60) as source, open(part, "wb") as target:
            total, start = int(source.headers.get("Content-Length") or 0), time.monotonic()
            while block := source.read(1 << 22):
                target.write(block)
                progress(f"{path.name}, bytes", target.tell(), len(block), total, start)
            if target.tell() < total:
                raise OSError(f"it ended after {target.tell():,} of {total:,} bytes")
        if digest and md5(part) != digest:
            raise OSError(f"its MD5 is not {digest}")
        os.replace(part, path)
    except (OSError, HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise ValueError(
            f"{url} cannot be downloaded ({reason}): put it at {path} by hand"
        ) from None
    finally:
        part.unlink(missing_ok=True)
    return path


def progress(what, done, step, total, start, first=0):
    """After `step` more: a line on stderr with the time left, rewritten on a terminal, else one per
    tenth."""
    tenth = total and 10 * done // total > 10 * (done - step) // total
    if not (sys.stderr.isatty() or tenth):
        return
    left = (time.monotonic() - start) / max(done - first, 1) * (total - done)
    line = f"{what} {done}/{total}" + (f", {left / 60:.1f} min left" if total else "")
    if sys.stderr.isatty():
        print(f"\r{line} ", end="\n" if done == total else "", file=sys.stderr, flush=True)
    else:
        print(line, file=sys.stderr, flush=True)


def load_npz(path):
    """A user's arrays train_0, train_1, ..., test_0, ...; optionally train_labels, test_labels,
    train_mask (N, M)."""
    arrays = read_npz(path, ("train_0", "train_1", "test_0", "test_1"))
    m = next(k for k in range(len(arrays) + 1) if f"train_{k}" not in arrays)
    names = tuple(str(k) for k in range(m))
    known = {f"{part}_{key}" for part in ("train", "test") for key in (*names, "labels")} | {
        "train_mask"
    }
    if set(arrays) - known:
        raise ValueError(
            f"{path}: unknown array {min(set(arrays) - known)!r}; it takes {', '.join(sorted(known))}"
        )
    for key in sorted(arrays):  # test_0 and train_0 before those that are compared with them
        array = arrays[key]
        if array.dtype.kind not in "buif" or not array.ndim:
            raise ValueError(f"{path}: {key} is to be numbers, one row per example")
        first = f"{key.split('_')[0]}_0"
        if len(array) != len(arrays[first]):
            raise ValueError(
                f"{path}: {key} {array.shape} does not have the {len(arrays[first]):,} examples "
                f"of {first}"
            )
    mask = None
    if "train_mask" in arrays:
        mask = torch.from_numpy(arrays["train_mask"].astype(bool))
        if mask.shape != (len(arrays["train_0"]), m):
            raise ValueError(
                f"{path}: train_mask is {tuple(mask.shape)}, not (examples, modalities)"
            )
    splits, kinds = [], {}
    for part in ("train", "test"):
        bases = []
        for k, name in enumerate(names):
            key = f"{part}_{name}"
            if key not in arrays:
                raise ValueError(f"{path} has train_{name} but no {key}")
            shown = mask[:, k].numpy() if part == "train" and mask is not None else slice(None)
            base, kind = own_array(path, key, arrays[key], shown, kinds.get(name))
            found = kind, base.dtype, base.shape[1:]
            if found != kinds.setdefault(name, found) or not len(base):
                raise ValueError(f"{path}: {key} {tuple(base.shape)} does not fit the other arrays")
            bases.append(base)
        labels = arrays.get(f"{part}_labels")
        if labels is not None and (labels.ndim != 1 or labels.dtype.kind not in "iu"):
            raise ValueError(f"{path}: {part}_labels is to hold one integer per example")
        splits.append(
            Split(
                bases, labels=None if labels is None else torch.from_numpy(labels.astype(np.int64))
            )
        )
    shapes = {name: list(kinds[name][2]) for name in names}
    spec = {"name": "npz", "shapes": shapes, "likelihoods": [kinds[name][0] for name in names]}
    note = "" if mask is None else f"train_mask hides {1 - mask.double().mean():.0%} of the arrays"
    return Dataset(str(path), *splits, spec, names, mask, note=note)


def own_array(path, key, array, shown, decided):
    """A user's array as a base, and its likelihood: bits and bytes Bernoulli, floats Laplace. ->
    tensor, likelihood"""
    if array.ndim < 2 or 0 in array.shape[1:]:
        raise ValueError(
            f"{path}: {key} is to be numbers, (examples, features) or (examples, C, H, W)"
        )
    if array.dtype.kind == "f":
        with np.errstate(over="ignore"):  # what float32 cannot hold is not finite
            array = array.astype(np.float32, copy=False)
    if not np.isfinite(array[shown]).all():
        raise ValueError(f"{path}: {key} has values that are not finite")
    array = np.nan_to_num(array, posinf=0, neginf=0)  # what a mask hides may be anything
    if array.ndim == 3:
        array = array[:, None]  # grey images
    if array.ndim == 4 and min(array.shape[2:]) < 8:
        raise ValueError(
            f"{path}: {key} has images smaller than 8 x 8: (examples, C, H, W) is the order; or "
            "flatten them to (examples, features)"
        )
    binary = np.isin(array[shown], (0, 1)).all() if decided is None else decided[0] == "bernoulli"
    large = array.max(initial=0) > 1 if decided is None else decided[1] == torch.uint8
    if array.dtype == np.uint8 and large:
        return torch.from_numpy(array), "bernoulli"
    if binary and np.isin(array[shown], (0, 1)).all():
        return torch.from_numpy(array.astype(bool)), "bernoulli"
    if array.ndim == 4 and not (array[shown].min() >= 0 and array[shown].max() <= 1):
        raise ValueError(f"{path}: {key} has images that are neither bytes nor floats in [0, 1]")
    return torch.from_numpy(array.astype(np.float32)), "bernoulli" if array.ndim == 4 else "laplace"


# ---------------------------------------------------------------- CUB: photos of birds and captions

CUB_PHOTOS = "https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz"
CUB_MD5 = "97eceeb196236b17998738112f37df78"
CUB_CAPTIONS = (
    "https://drive.google.com/file/d/0B0ywwgffWnLLZW9uVHNjb2JmNlE/view"
    "?resourcekey=0-8y2UVmBHAlG26HafWYNoFQ"
)
CLASSES = {  # the zero-shot split of Reed et al. (2016): no species is in both
    "train": (("trainvalclasses.txt",), ("trainclasses.txt", "valclasses.txt")),
    "test": (("testclasses.txt",),),
}
SPECIALS = ("<exc>", "<pad>", "<eos>")  # a word outside the vocabulary, padding, the end
EXC, PAD, EOS = range(3)
WORDS = 32  # a caption's length, <eos> included


def load_cub(root):
    """CUB's features (2048,) and captions (32,), ten per photo; makes cub/features.npz first where
    it is missing.

    A photo's ten examples share one row of the features. The vocabulary is that of the training
    captions.
    """
    cub = Path(root) / "cub"
    need_captions(cub)
    made = prepared(root, "cub", "features.npz")
    if not made.exists():  # as it will be on the first run
        prepare_cub(root)
    cache = read_features(made)
    files, readable, n = cache["files"].tolist(), cache["readable"], int(cache["train"])
    texts = {  # of the photos that could be read
        "train": [t for t, ok in zip(read_captions(cub, "train", files[:n]), readable[:n]) if ok],
        "test": [t for t, ok in zip(read_captions(cub, "test", files[n:]), readable[n:]) if ok],
    }
    tokens = {
        split: [tokenize(line) for lines in ten for line in lines] for split, ten in texts.items()
    }
    words = vocabulary(tokens["train"])
    x = torch.from_numpy(cache["x"])
    features = {"train": x[: len(texts["train"])], "test": x[len(texts["train"]) :]}
    splits = {}
    for split in ("train", "test"):
        index = torch.arange(len(tokens[split]))
        bases = [features[split], encode_captions(tokens[split], words)]
        splits[split] = Split(bases, [index // 10, index])
    notes = []
    if str(cache["weights"]) == "none":
        notes.append(
            "features of a randomly initialised ResNet-101: a check of the path, no result"
        )
    if not cache["normalise"]:
        notes.append("features without ImageNet normalisation")
    if not readable.all():
        notes.append(f"unreadable photos left out: {(~readable).sum()}")
    return Dataset(
        name="cub",
        **splits,
        spec={"name": "cub", "vocabulary": len(words)},
        names=("image", "caption"),
        words=words,
        note="; ".join(notes),
    )


def prepare_cub(root, weights="IMAGENET1K_V1", normalise=True, device=None):
    """Finds or downloads the photos and writes their features to cub/features.npz; resumes where it
    was interrupted.

    weights: a name of torchvision's ResNet101_Weights, or none for a randomly initialised network.
    -> dict of sizes. ValueError, in a sentence: no captions, not ten captions per photo, no
    weights, a folder that cannot be written to, a cache made with other settings.
    """
    cub, made = Path(root) / "cub", prepared(root, "cub", "features.npz")
    need_captions(cub)  # first of all: they are what cannot be had without the user
    cache = read_features(made) if made.exists() else None
    if cache:
        need_same(cache, weights, normalise, made)
    else:
        net = resnet(weights)
        fetch_photos(cub)
    train, test = list_photos(cub, "train"), list_photos(cub, "test")
    for split, files in (("train", train), ("test", test)):
        read_captions(cub, split, files)  # ten for each, before hours of work
    if cache:
        if cache["files"].tolist() != train + test:
            raise ValueError(
                f"{made} has features of other photos ({len(cache['files'])}) than {cub} holds now"
                f" ({len(train + test)}): delete it to have it made again"
            )
    else:
        cache = extract(cub, made, train + test, len(train), net, weights, normalise, device)
        save_npz(made, **cache)
        made.with_name("features.partial.npz").unlink(missing_ok=True)
    dataset = load_cub(root)
    return {
        "weights": str(cache["weights"]),
        "photos": {"train": len(dataset.train.bases[0]), "test": len(dataset.test.bases[0])},
        "captions": {"train": len(dataset.train), "test": len(dataset.test)},
        "vocabulary": len(dataset.words),
        "unreadable": [f for f, ok in zip(cache["files"].tolist(), cache["readable"]) if not ok],
    }


def cub_photos(root):
    """The files of the photos, one for each row of a split's features. -> {"train": [...], "test":
    [...]}"""
    cub = Path(root) / "cub"
    cache = read_features(prepared(root, "cub", "features.npz"))
    files, n = cache["files"].tolist(), int(cache["train"])
    good = [cub / file if ok else None for file, ok in zip(files, cache["readable"])]
    return {"train": [f for f in good[:n] if f], "test": [f for f in good[n:] if f]}


# Captions: Shi et al.'s text_*.txt, ten lines per photo in sorted file order, or Reed et al.'s
# text_c10/, a file each.


def tokenize(text):
    """Lower-case words, hyphens kept ("red-eyed"), clitics apart ("bird", "'s"); every punctuation
    mark is a token."""
    return re.findall(r"\w+(?:-\w+)*|'\w+|[^\w\s]", text.lower())


def vocabulary(captions, above=3):
    """<exc>, <pad>, <eos>, then the words seen more than `above` times, in the order in which they
    appear. -> list"""
    counts = Counter(word for tokens in captions for word in tokens)
    return [*SPECIALS, *(word for word, n in counts.items() if n > above)]


def encode_captions(captions, words):
    """The first 31 words and <eos>, padded; a word outside the vocabulary is <exc>. -> int64 (N,
    32)"""
    index = {word: i for i, word in enumerate(words)}
    rows = []
    for tokens in captions:
        row = [index.get(word, EXC) for word in tokens[: WORDS - 1]] + [EOS]
        rows.append(row + [PAD] * (WORDS - len(row)))
    return torch.tensor(rows).view(-1, WORDS)


def read_captions(cub, split, files):
    """The ten captions of each photo. files: the photos' names in sorted order. -> list of N lists
    of 10 strings"""
    whole = cub / ("text_trainvalclasses.txt" if split == "train" else "text_testclasses.txt")
    if not files or not files[0].startswith("CUB_200_2011"):
        lines = read_lines(whole)
        if len(lines) != 10 * len(files):
            raise ValueError(
                f"{whole} has {len(lines)} captions for {len(files)} photos:"
                f" expected ten per photo, {10 * len(files)} lines"
            )
        return [lines[i : i + 10] for i in range(0, len(lines), 10)]
    captions, folder = [], text_folder(cub)
    if folder is None:
        raise ValueError(f"{cub / 'features.npz'} goes with captions in text_c10/, which is gone")
    for name in files:
        path = folder / "text_c10" / Path(name).parent.name / f"{Path(name).stem}.txt"
        captions.append(read_lines(path))
        if len(captions[-1]) != 10:
            raise ValueError(f"{path} has {len(captions[-1])} captions: expected ten per photo")
    return captions


def read_lines(path):
    """Lines end in a newline and in nothing else: captions hold stray control characters."""
    try:
        text = path.read_bytes().decode("utf-8", errors="replace").rstrip()
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: it should hold captions, ten per photo") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    return [line.strip() for line in text.split("\n")] if text else []


def text_folder(cub):
    """Where Reed et al.'s text_c10/ and class lists lie: cub/ or, as their archive unpacks,
    cub/cvpr2016_cub/."""
    return next((f for f in (cub, cub / "cvpr2016_cub") if (f / "text_c10").is_dir()), None)


def need_captions(cub):
    """Unpacks them where it must."""
    if (cub / "text_trainvalclasses.txt").exists() or text_folder(cub):
        return
    archive = cub / "cvpr2016_cub.tar.gz"
    if not archive.exists():
        raise ValueError(
            f"{cub} has no captions, and only a person can fetch them, from Google Drive:"
            f" put cvpr2016_cub.tar.gz ({CUB_CAPTIONS}) into {cub} and start again"
        )
    unpack(archive, cub / "cvpr2016_cub", "text_c10", ".txt")


# Photos


def fetch_photos(cub):
    """Unpacks, and downloads where it must, the originals: only for captions in their layout."""
    if (cub / "text_trainvalclasses.txt").exists() or (cub / "CUB_200_2011" / "images").is_dir():
        return
    archive = cub / "CUB_200_2011.tgz"
    if not archive.exists():
        download(CUB_PHOTOS, archive, CUB_MD5)
    elif md5(archive) != CUB_MD5:
        raise ValueError(f"{archive} is damaged, its MD5 is not {CUB_MD5}: delete it")
    unpack(archive, cub / "CUB_200_2011", "images", ".jpg")


def list_photos(cub, split):
    """Names of a split's photos relative to cub/, by class, then by file, as torchvision's
    ImageFolder sorts them."""
    if (cub / "text_trainvalclasses.txt").exists():
        folder = cub / split
        classes = [p.name for p in folder.iterdir() if p.is_dir()] if folder.is_dir() else []
    else:
        folder = cub / "CUB_200_2011" / "images"
        classes = read_classes(cub, split)
    files = []
    for name in sorted(classes):
        if not (folder / name).is_dir():
            raise ValueError(f"{folder} has no photos of {name}, which the list of classes names")
        found = sorted(p.name for p in (folder / name).iterdir())
        files += [
            (folder / name / file).relative_to(cub).as_posix()
            for file in found
            if file.lower().endswith((".jpg", ".jpeg", ".png")) and not file.startswith(".")
        ]
    if not files:
        raise ValueError(f"{folder} holds no photos: expected a folder of .jpg files per species")
    return files


def read_classes(cub, split):
    """The species of a split, from trainvalclasses.txt (or trainclasses.txt and valclasses.txt) and
    testclasses.txt."""
    found, folder = {}, text_folder(cub)
    for part, choices in CLASSES.items():
        lists = next((c for c in choices if all((folder / name).exists() for name in c)), None)
        if lists is None:
            raise ValueError(f"{folder} has no {choices[0][0]}, the list of the {part} species")
        found[part] = {name for path in lists for name in read_lines(folder / path) if name}
    both = found["train"] & found["test"]
    if both:
        raise ValueError(f"{min(both)} is in the training and in the test classes of {folder}")
    return found[split]


def md5(path):
    digest = hashlib.md5()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


MOST_UNPACKED = 2**33  # the photos are 1.2 GB


def unpack(archive, folder, holds, ending):
    """The plain files of a tar archive with this ending -> folder, which then has the folder
    `holds` in it.

    Links are neither made nor followed, a name that leaves the folder is an error, and the folder
    appears when all of it is there, by another process that did the same or by this one.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=folder.name + ".", dir=folder.parent))
    left = MOST_UNPACKED
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                path = Path(member.name)
                if path.anchor or ".." in path.parts:
                    raise ValueError(f"{archive} has a member outside its folder: {member.name}")
                if member.isfile() and path.name.endswith(ending) and path.name[0] != ".":
                    left -= member.size
                    if left < 0:
                        raise ValueError(f"{archive} unpacks to more than {MOST_UNPACKED:,} bytes")
                    (partial / path).parent.mkdir(parents=True, exist_ok=True)
                    with tar.extractfile(member) as source, open(partial / path, "wb") as target:
                        shutil.copyfileobj(source, target)
        inner = partial / folder.name  # the archive's own top folder, if it has one of that name
        found = inner if inner.is_dir() else partial
        if not (found / holds).is_dir():
            raise ValueError(f"{archive} has no {holds}/ with {ending} files: is it the right one?")
        os.chmod(found, 0o755)
        try:
            os.replace(found, folder)
        except OSError:
            if not (folder / holds).is_dir():  # it is, where another process was faster
                raise
    except (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, OSError) as error:
        raise ValueError(
            f"{archive} cannot be unpacked ({one_line(error)}): is it whole?"
        ) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


# Features: torchvision's ResNet-101 without its last layer, 2,048 per photo


def resnet(weights):
    """ResNet-101 without its last layer, in eval mode. weights: torchvision's name, or none:
    random, seed 0."""
    from torchvision import models

    choices = models.ResNet101_Weights
    if weights == "none":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            net = models.resnet101()
    elif weights not in (names := [choice.name for choice in choices]):
        raise ValueError(f"--weights is none or {' or '.join(names)}, not {weights!r}")
    else:
        try:
            net = models.resnet101(weights=choices[weights])
        except Exception as error:  # no network, or a file cut short
            raise ValueError(
                f"the ImageNet weights cannot be had ({getattr(error, 'reason', error)}): put"
                f" {choices[weights].url} into {Path(torch.hub.get_dir()) / 'checkpoints'} by hand,"
                " or pass --weights none for features of a randomly initialised network"
            ) from None
    net.fc = torch.nn.Identity()
    return net.eval()


def estimate_batchnorm(net, images, device):
    """Freezes a random network's BatchNorm at the statistics of `images`, batches of (B, 3, 224,
    224), in place.

    With those it starts with, features of all photos are alike (cosine .9997).
    """
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None  # the plain average over the batches
    net.train()
    for x in images:
        net(x.to(device))
    net.eval()


def extract(cub, made, files, train, net, weights, normalise, device=None, batch_size=32, every=30):
    """Features of files (the first `train` of them are the training photos), kept in
    features.partial.npz as it goes.

    `every`: seconds between two saves; an interrupted run loses no more. An unreadable photo is
    skipped and counted.
    -> what read_features returns
    """
    from torchvision import transforms

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    steps = [transforms.Resize(224), transforms.CenterCrop(224), transforms.ToTensor()]
    if normalise:
        steps.append(transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    transform, partial = transforms.Compose(steps), made.with_name("features.partial.npz")
    cache = {"weights": weights, "normalise": normalise, "files": np.array(files), "train": train}
    x, readable = resume(partial, cache)
    first, start, saved = len(readable), time.monotonic(), time.monotonic()
    net.to(device)
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool, torch.inference_mode():

        def images(names):
            photos = list(pool.map(lambda name: read_photo(cub / name, transform), names))
            return [p for p in photos if p is not None], [p is not None for p in photos]

        if weights == "none":
            some = np.random.default_rng(0).permutation(train)[:256]
            groups = [[files[i] for i in some[k : k + 32]] for k in range(0, len(some), 32)]
            stacks = (good for good, _ in map(images, groups) if good)
            estimate_batchnorm(net, map(torch.stack, stacks), device)
            start = time.monotonic()
        for k in range(first, len(files), batch_size):
            good, which = images(files[k : k + batch_size])
            if good:
                x.append(net(torch.stack(good).to(device)).float().cpu().numpy())
            readable += which
            progress("features of photos", len(readable), len(which), len(files), start, first)
            if time.monotonic() - saved > every:
                save_npz(partial, **{**cache, "x": np.concatenate(x), "readable": readable})
                saved = time.monotonic()
    for split, ok in (("training", readable[:train]), ("test", readable[train:])):
        if not any(ok):
            raise ValueError(f"none of the {len(ok)} {split} photos in {cub} can be read")
    return {**cache, "x": np.concatenate(x), "readable": np.array(readable)}


def read_photo(path, transform):
    """(3, 224, 224), or None for a file that is no image, a damaged one or one without measure."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            if max(image.size) > min(8192, 20 * min(image.size)):  # a strip would fill the memory
                return None
            return transform(image.convert("RGB"))
    except Exception:  # Pillow's readers raise whatever a damaged file leads to
        return None


def resume(partial, cache):
    """What an interrupted run with the same settings and photos has left. -> list of arrays, list
    of booleans"""
    try:
        left = read_features(partial) if partial.exists() else {}
    except ValueError:
        left = {}
    if any(not np.array_equal(left.get(key), cache[key]) for key in cache):
        return [np.empty((0, 2048), np.float32)], []
    return [left["x"]], left["readable"].tolist()


def read_features(path):
    """weights, normalise, files (N,), train: how many of them train, readable (N,), x (readable,
    2048)."""
    cache = read_npz(path, ("weights", "normalise", "files", "train", "readable", "x"))
    x, readable = cache["x"], cache["readable"]
    files, train = cache["files"], cache["train"]
    good = files.dtype.kind == "U" and files.ndim == readable.ndim == 1 and readable.dtype == bool
    good = good and train.ndim == 0 and train.dtype.kind in "iu" and 0 < train < len(files)
    good = good and cache["weights"].ndim == cache["normalise"].ndim == 0
    good = good and x.dtype == np.float32 and x.shape == (readable.sum(), 2048)
    if not (good and len(readable) <= len(files) and np.isfinite(x).all()):
        raise ValueError(f"{path} does not hold features of CUB's photos: delete it")
    return cache


def need_same(cache, weights, normalise, path):
    def words(name, normalised):
        return f"weights {name}, {'' if normalised else 'not '}normalised"

    if (str(cache["weights"]), bool(cache["normalise"])) != (weights, normalise):
        raise ValueError(
            f"{path} was made with {words(cache['weights'], cache['normalise'])}, and {words(weights, normalise)} is"
            " asked for: delete it to have it made again, or ask for what it has"
        )


# ------------------------------------------------------------------------- spectra and fingerprints

MASSBANK = "https://github.com/MassBank/MassBank-data/releases/latest/download/MassBank_NIST.msp"
MAX_MZ, BINS_PER_MZ = 1100, 10
BINS = MAX_MZ * BINS_PER_MZ
MACCS, MORGAN = 167, 1982  # [poe] only says that there are 2,149 bits
BITS = MACCS + MORGAN
SPECTRA_VERSION = 1


class Sparse:
    """A sparse matrix (N, D), row by row (CSR). sparse[rows] is dense, float32, on the matrix's
    device.

    offsets (N + 1,): row n holds columns[offsets[n] : offsets[n + 1]], each column once; values:
    float32, as columns. `rows` may be all that indexes a tensor: a LongTensor, a slice, a mask, one
    integer.
    """

    dtype = torch.float32

    def __init__(self, offsets, columns, values, width):
        self.offsets, self.columns, self.values = offsets, columns, values
        self.shape = (len(offsets) - 1, width)
        self.longest = int(offsets.diff().max()) if len(self) else 0

    def __len__(self):
        return self.shape[0]

    @property
    def device(self):
        return self.values.device

    def to(self, device):
        tensors = (t.to(device) for t in (self.offsets, self.columns, self.values))
        return Sparse(*tensors, self.shape[1])

    def __getitem__(self, rows):
        start, end = self.offsets[:-1][rows], self.offsets[1:][rows]  # (B,)
        # Every row is read to the longest one's length: no size depends on the data, so a GPU is
        # never waited for.
        at = start[..., None] + torch.arange(self.longest, device=self.device)  # (B, longest)
        inside = at < end[..., None]
        at = at.clamp(max=len(self.values) - 1)
        dense = torch.zeros(*start.shape, self.shape[1], device=self.device)  # (B, D)
        return dense.scatter_add_(-1, self.columns[at].long(), self.values[at] * inside)


def text(path):
    """The lines of a text file, packed (.gz) or not."""
    try:
        with open(path, "rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
        with (gzip.open if packed else open)(
            path, "rt", encoding="utf-8-sig", errors="replace"
        ) as file:
            yield from file
    except (EOFError, zlib.error, gzip.BadGzipFile):
        raise ValueError(f"{path} is a truncated or damaged .gz file: get it again") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None


def peak_list(lines):
    """'m/z intensity' per line, also several in a line divided by ';' and followed by a "note". ->
    (n, 2), or None"""
    joined = " ".join(lines)
    words = joined.split()
    if len(words) != 2 * len(lines) or ";" in joined:
        bare = (re.sub('"[^"]*"', "", line) for line in lines)
        words = [w for line in bare for peak in line.split(";") for w in peak.split()[:2]]
    try:
        return np.array(words, np.float64).reshape(-1, 2)
    except ValueError:
        return None


def read_msp(path):
    """The records of an MSP file (NIST's format, as MassBank and MoNA export it), one after the
    other; .gz too.

    -> (fields, peaks) each: fields {key in lower case: value}, the first one where a key is
    repeated; peaks (n, 2), m/z and intensity, or None where they cannot be read. ValueError for a
    file that cannot be read.
    """
    fields, peaks, in_peaks = {}, [], False
    for line in text(path):
        line = line.strip()
        header = line[:1].isalpha() and ":" in line
        if fields and (not line or (in_peaks and header)):
            yield fields, peak_list(peaks) if peaks else np.zeros((0, 2))
            fields, peaks, in_peaks = {}, [], False
        if header:
            key, _, value = line.partition(":")
            fields.setdefault(key.strip().lower(), value.strip())
            in_peaks = key.strip().lower() == "num peaks"
        elif line and in_peaks:
            peaks.append(line)
    if fields:
        yield fields, peak_list(peaks) if peaks else np.zeros((0, 2))


def read_mgf(path):
    """The records of a Mascot generic file, one after the other; .gz too. -> (fields, peaks) as
    read_msp's."""
    fields, peaks = None, []
    for line in text(path):
        line = line.strip()
        if line.upper() == "BEGIN IONS":
            fields, peaks = {}, []
        elif line.upper() == "END IONS" and fields is not None:
            yield fields, peak_list(peaks) if peaks else np.zeros((0, 2))
            fields = None
        elif fields is not None and line[:1].isalpha() and "=" in line:
            key, _, value = line.partition("=")
            fields.setdefault(key.strip().lower(), value.strip())
        elif fields is not None and line and line[0] not in "#;!/":
            peaks.append(line)


def read_table(path, columns):
    """The rows of a CSV file (.gz too), as dictionaries."""
    try:
        reader = csv.DictReader(text(path), restval="")
        missing = [column for column in columns if column not in (reader.fieldnames or [])]
        if missing:
            raise ValueError(f"{path} has no column {missing[0]!r}: it needs {', '.join(columns)}")
        yield from reader
    except csv.Error as error:
        raise ValueError(f"{path} is not a CSV file ({error})") from None


def bin_peaks(peaks):
    """Peaks (n, 2) of m/z and intensity -> the bins that are not empty, int16, and their values in
    (0, 1], float32.

    Bins of 0.1 from m/z 0 to 1100; the intensities in a bin are added, then divided by the largest
    bin, then the square root is taken. Peaks beyond the range and those without a positive
    intensity below 1e300, whose sums are finite, are left out.
    """
    mz, intensity = peaks[in_range(peaks) & (peaks[:, 1] > 0) & (peaks[:, 1] < 1e300)].T
    bins, where = np.unique((mz * BINS_PER_MZ).astype(np.int16), return_inverse=True)
    total = np.bincount(where, intensity, minlength=len(bins))
    return bins, np.sqrt(total / total.max(initial=0)).astype(np.float32)


def in_range(peaks):
    return (peaks[:, 0] >= 0) & (peaks[:, 0] < MAX_MZ)


def molecule(smiles):
    """rdkit's molecule, or None where rdkit refuses the SMILES. ValueError without rdkit."""
    try:
        from rdkit import Chem, rdBase
    except ImportError:
        raise ValueError("molecules' fingerprints need rdkit: pip install rdkit") from None
    with rdBase.BlockLogs():
        found = Chem.MolFromSmiles(smiles)
    return found if found is not None and found.GetNumAtoms() else None


def fingerprint(smiles):
    """167 MACCS keys, then 1,982 Morgan bits of radius 2. -> (2149,) bool, or None where rdkit
    refuses the SMILES"""
    found = molecule(smiles)
    if found is None:
        return None
    from rdkit.Chem import rdFingerprintGenerator, rdMolDescriptors

    morgan = rdFingerprintGenerator.GetMorganGenerator(radius=2, fpSize=MORGAN)
    bits = np.zeros(BITS, bool)
    bits[list(rdMolDescriptors.GetMACCSKeysFingerprint(found).GetOnBits())] = True
    bits[MACCS:] = morgan.GetFingerprintAsNumPy(found)
    return bits


@cache
def inchikey_of(smiles):
    from rdkit import Chem, rdBase

    found = molecule(smiles)
    with rdBase.BlockLogs():
        return "" if found is None else Chem.MolToInchiKey(found)


def compound_of(inchikey, smiles):
    """The first block of the InChIKey, which names the compound without its stereochemistry; "" if
    there is none."""
    if not re.match(r"[A-Z]{14}(-|$)", inchikey or ""):
        inchikey = inchikey_of(smiles)
    return inchikey[:14]


def smiles_of(fields):
    """The SMILES of an MSP record. MoNA's export has it among the comments."""
    noted = dict(re.findall(r'"([^"=]+)=([^"]*)"', fields.get("comments", "")))
    found = (fields.get("smiles"), noted.get("SMILES"), noted.get("computed SMILES"))
    return next((smiles for smiles in found if smiles and smiles.upper() != "N/A"), "")


def refusal(fields, peaks, instrument):
    """Why a record is no [M+H]+ tandem spectrum of the instrument with a known structure, or
    None."""
    has = fields.get
    if has("instrument_type", "").lower() != instrument.lower():
        return "of another instrument"
    if has("precursor_type", "").replace(" ", "") != "[M+H]+":
        return "with another precursor than [M+H]+"
    # A record that lacks one of these two is kept: [M+H]+ is positive, and a precursor makes it a
    # tandem spectrum.
    if not (has("ion_mode") or "P").upper().startswith("P"):
        return "in negative mode"
    if (has("spectrum_type") or "MS2").upper() not in ("MS2", "MS/MS", "MSMS"):
        return "that are not MS2"
    if not smiles_of(fields):
        return "without a SMILES"
    return bad_peaks(peaks, has("num peaks", ""))


def bad_peaks(peaks, announced=""):
    if peaks is None:
        return "with peaks that are no numbers"
    if re.fullmatch("[0-9]{1,9}", announced) and len(peaks) < int(announced):
        return "with fewer peaks than announced"
    if not len(peaks):
        return "without peaks"
    if not len(bin_peaks(peaks)[0]):
        return "without peaks in the range"
    return None


def csr(spectra):
    """[(bins, values), ...] -> offsets (N + 1,), columns, values."""
    offsets = np.cumsum([0, *(len(bins) for bins, _ in spectra)])
    columns = np.concatenate([np.zeros(0, np.int16), *(bins for bins, _ in spectra)])
    return offsets, columns, np.concatenate([np.zeros(0, np.float32), *(v for _, v in spectra)])


def listed(counts):
    """{"without peaks": 2, ...} -> "2 without peaks, ..."."""
    return ", ".join(f"{n:,} {reason}" for reason, n in counts.most_common()) or "none"


def prepare_spectra(
    root, msp=None, instrument="LC-ESI-QFT", mgf=None, candidates=None, truth=None, seed=0
):
    """Reads the spectra of an MSP file and writes root/spectra/spectra.npz, for load_spectra and
    load_challenges.

    msp: MassBank's release is downloaded without it. instrument: the Instrument_type to keep. mgf,
    candidates (CSV with id, inchikey, smiles) and truth (CSV with id, inchikey): challenges for
    ranking, all three or none; id is the MGF's TITLE. A tenth of the compounds, drawn with `seed`,
    is the test split; the challenges' compounds are in neither.
    -> {"train": spectra, "test": spectra, "compounds": .., "challenges": .., "candidates": ..,
    "skipped": {...}}. Records that do not fit are skipped and counted; ValueError, and nothing
    written, for what leaves no data.
    """
    if None in (mgf, candidates, truth) and (mgf, candidates, truth) != (None, None, None):
        raise ValueError("challenges need all three: --mgf, --candidates and --truth")
    molecule("C")  # without rdkit or a place to write, say so before the work
    target = prepared(root, "spectra", "spectra.npz")
    answers = {}
    if truth is not None:
        for row in read_table(truth, ("id", "inchikey")):
            answers[row["id"]] = compound_of(row["inchikey"], row.get("smiles") or "")
    msp = msp or download(MASSBANK, target.with_name("MassBank_NIST.msp"))
    arrays, counts = spectrum_arrays(msp, instrument, set(answers.values()), seed)
    if truth is not None:
        more, found = challenge_arrays(mgf, candidates, answers)
        arrays, counts = arrays | more, counts | found
    save_npz(target, version=SPECTRA_VERSION, **arrays)
    print(f"wrote {target} ({target.stat().st_size / 2**20:.1f} MiB)")
    return counts


def spectrum_arrays(msp, instrument, forbidden, seed):
    """The MSP's part of the .npz: train_* and test_*; the compounds in `forbidden` are left out. ->
    arrays, counts"""
    spectra, skipped, beyond, total = defaultdict(list), Counter(), 0, 0
    names, instruments = defaultdict(dict), Counter()
    for fields, peaks in read_msp(msp):
        total += 1
        instruments[fields.get("instrument_type", "not said")] += 1
        reason = refusal(fields, peaks, instrument)
        if reason is None:
            smiles = smiles_of(fields)
            compound = compound_of(fields.get("inchikey"), smiles)
            reason = None if compound else "whose SMILES rdkit refuses"
        if reason is not None:
            skipped[reason] += 1
            continue
        beyond += int((~in_range(peaks)).sum())
        spectra[compound].append(bin_peaks(peaks))
        names[compound][smiles] = None  # an ordered set
    removed = sorted(forbidden & set(spectra))
    for compound in removed:
        skipped["of the challenges' compounds"] += len(spectra.pop(compound))
    bits = {}
    for compound in sorted(spectra):
        bits[compound] = next((b for b in map(fingerprint, names[compound]) if b is not None), None)
        if bits[compound] is None:
            skipped["whose SMILES rdkit refuses"] += len(spectra.pop(compound))
    if len(spectra) < 2:
        kinds = ", ".join(kind for kind, _ in instruments.most_common(5))
        raise ValueError(
            f"{msp} leaves {len(spectra)} compounds, too few for a split: of {total:,} records were skipped "
            f"{listed(skipped)} (--instrument is {instrument}; the file has {kinds or 'none'})"
        )

    compounds = np.array(sorted(spectra))
    generator = np.random.default_rng(seed)
    shuffled = generator.permutation(compounds)
    held_out = max(1, round(0.1 * len(compounds)))
    arrays, sizes = {}, {}
    for part, chosen in ("test", shuffled[:held_out]), ("train", shuffled[held_out:]):
        pairs = [(k, spectrum) for k, c in enumerate(chosen) for spectrum in spectra[c]]
        order = generator.permutation(len(pairs))  # so that --limit takes spectra of many compounds
        offsets, columns, values = csr([pairs[i][1] for i in order])
        arrays |= {
            f"{part}_offsets": offsets,
            f"{part}_columns": columns,
            f"{part}_values": values,
            f"{part}_rows": np.array([pairs[i][0] for i in order]),
            f"{part}_bits": np.packbits([bits[compound] for compound in chosen], axis=1),
            f"{part}_compounds": chosen,
        }
        sizes[part] = len(offsets) - 1
    print(
        f"{msp}: {total:,} records, skipped {listed(skipped)}; {beyond:,} peaks beyond m/z {MAX_MZ} left out"
    )
    print(
        f"{sizes['train']:,} spectra of {len(compounds) - held_out:,} compounds to train, "
        f"{sizes['test']:,} of {held_out:,} to test; {len(removed)} compounds of the challenges removed"
    )
    counts = sizes | {"compounds": len(compounds), "removed_compounds": len(removed)}
    counts |= {"records": total, "skipped": dict(skipped), "peaks_beyond_range": beyond}
    return arrays, counts


def challenge_arrays(mgf, candidates, answers):
    """The challenges' part of the .npz. Stereoisomers among the candidates count once, as one
    compound. -> arrays, counts"""
    skipped, spectra, beyond = Counter(), {}, 0
    for fields, peaks in read_mgf(mgf):
        name = fields.get("title", "")
        reason = "without a TITLE" if not name else bad_peaks(peaks)
        reason = reason or ("whose TITLE came before" if name in spectra else None)
        if reason is not None:
            skipped[f"spectra {reason}"] += 1
            continue
        beyond += int((~in_range(peaks)).sum())
        spectra[name] = bin_peaks(peaks)
    lists, bits, rows = {name: {} for name in spectra}, {}, 0
    for row in read_table(candidates, ("id", "inchikey", "smiles")):
        rows += 1
        if rows % 10_000 == 0 and sys.stderr.isatty():
            print(f"\r{rows:,} candidates", end="", file=sys.stderr, flush=True)
        name, smiles = row["id"], row["smiles"] or ""
        if name not in lists:
            skipped["candidates of an unknown id"] += 1
            continue
        compound = compound_of(row["inchikey"], smiles)
        if compound in lists[name]:
            skipped["candidates of a compound listed before"] += 1
            continue
        if compound not in bits:
            found = fingerprint(smiles) if compound else None
            if found is None:
                skipped["candidates whose SMILES rdkit refuses"] += 1
                continue
            bits[compound] = np.packbits(found)  # (269,)
        lists[name][compound] = len(lists[name])
    if rows >= 10_000 and sys.stderr.isatty():
        print(file=sys.stderr)

    kept = []
    for name in spectra:
        if name not in answers:
            skipped["spectra that the truth does not name"] += 1
        elif not lists[name]:
            skipped["spectra without candidates"] += 1
        elif answers[name] not in lists[name]:
            skipped["spectra whose candidates lack the true one"] += 1
        else:
            kept.append(name)
    if not kept:
        raise ValueError(
            f"no id of {mgf} has both candidates in {candidates} and an answer in the truth: "
            f"skipped {listed(skipped)}"
        )
    offsets, columns, values = csr([spectra[name] for name in kept])
    packed = [bits[compound] for name in kept for compound in lists[name]]
    print(
        f"{len(kept)} challenges with {len(packed):,} candidates of {rows:,}; skipped {listed(skipped)}; "
        f"{beyond:,} peaks beyond m/z {MAX_MZ} left out"
    )
    arrays = {
        "challenge_ids": np.array(kept),
        "challenge_compounds": np.array([answers[name] for name in kept]),
        "challenge_offsets": offsets,
        "challenge_columns": columns,
        "challenge_values": values,
        "challenge_truth": np.array([lists[name][answers[name]] for name in kept]),
        "candidate_offsets": np.cumsum([0, *(len(lists[name]) for name in kept)]),
        "candidate_bits": np.stack(packed),  # (all candidates, 269)
    }
    counts = {
        "challenges": len(kept),
        "candidates": len(packed),
        "challenges_skipped": dict(skipped),
    }
    return arrays, counts


def read_spectra(root):
    """The arrays of root/spectra/spectra.npz."""
    path = prepared(root, "spectra", "spectra.npz")
    if not path.exists():
        raise ValueError(f"there is no {path}: make it with python data.py spectra --data {root}")
    parts = [
        f"{p}_{k}"
        for p in ("train", "test")
        for k in ("offsets", "columns", "values", "rows", "bits")
    ]
    arrays = read_npz(path, ("version", *parts))
    if not np.array_equal(arrays["version"], SPECTRA_VERSION):
        raise ValueError(f"{path} is of another version: make it anew with python data.py spectra")
    try:
        sound = all(whole_spectra(arrays, p) for p in ("train", "test", "challenge"))
    except (KeyError, TypeError, ValueError, IndexError):  # an array is absent or of another shape
        sound = False
    if not sound:
        raise ValueError(f"{path} is damaged: make it anew with python data.py spectra")
    return arrays


def whole_spectra(arrays, part):
    """Whether the arrays of a part fit each other, and no index leaves what it points into."""
    if part == "challenge" and "challenge_ids" not in arrays:
        return True

    def within(index, end):
        whole = index.ndim == 1 and index.dtype.kind == "i" and index.dtype.isnative
        return whole and ((index >= 0) & (index < end)).all()

    def cut(offsets, n):  # n rows, one after the other
        rising = within(offsets, n + 1) and (np.diff(offsets) >= 0).all()
        return rising and len(offsets) > 1 and (offsets[0], offsets[-1]) == (0, n)

    offsets, columns, values = (arrays[f"{part}_{k}"] for k in ("offsets", "columns", "values"))
    n, good = len(offsets) - 1, cut(offsets, len(columns)) and within(columns, BINS)
    good = good and values.dtype == np.float32 and values.shape == columns.shape
    good = good and ((values >= 0) & (values <= 1)).all()
    if part != "challenge":
        bits, rows = arrays[f"{part}_bits"], arrays[f"{part}_rows"]
        good = good and len(rows) == n and within(rows, len(bits))
    else:
        bits, truth = arrays["candidate_bits"], arrays["challenge_truth"]
        good = good and cut(lists := arrays["candidate_offsets"], len(bits)) and len(lists) == n + 1
        good = good and within(truth, len(bits)) and (truth < np.diff(lists)).all()
        good = good and arrays["challenge_ids"].shape == (n,) == truth.shape
    return good and bits.dtype == np.uint8 and bits.shape[1:] == (-(-BITS // 8),)


def sparse_from(arrays, part):
    names = (f"{part}_offsets", f"{part}_columns", f"{part}_values")
    return Sparse(*(torch.from_numpy(arrays[name]) for name in names), BINS)


def load_spectra(root):
    """spectrum: 11,000 bins in [0, 1]; fingerprint: 2,149 bits, held once per compound."""
    arrays, splits = read_spectra(root), []
    for part in ("train", "test"):
        spectra = sparse_from(arrays, part)
        bits = np.unpackbits(arrays[f"{part}_bits"], axis=1, count=BITS).astype(bool)
        rows = [torch.arange(len(spectra)), torch.from_numpy(arrays[f"{part}_rows"])]
        splits.append(Split([spectra, torch.from_numpy(bits)], rows))
    return Dataset("spectra", *splits, {"name": "spectra"}, ("spectrum", "fingerprint"))


class Challenges(NamedTuple):
    """Spectra to name, each with a list of candidate molecules."""

    ids: list
    spectra: Sparse  # (n, 11000)
    truth: np.ndarray  # (n,): the place of the true one among its candidates
    offsets: np.ndarray  # (n + 1,): challenge i has the candidates offsets[i] : offsets[i + 1]
    bits: np.ndarray  # (candidates, 269) uint8: fingerprints, eight bits to a byte (np.packbits)


def load_challenges(root):
    """-> Challenges, or None if none were given when the spectra were prepared."""
    arrays = read_spectra(root)
    if "challenge_ids" not in arrays:
        return None
    return Challenges(
        arrays["challenge_ids"].tolist(),
        sparse_from(arrays, "challenge"),
        arrays["challenge_truth"],
        arrays["candidate_offsets"],
        arrays["candidate_bits"],
    )


LOADERS = {
    "glyphs": load_glyphs,
    "mnist-split": lambda root: load_bands(root, "mnist-split", ("top", "bottom")),
    "mnist-split3": lambda root: load_bands(root, "mnist-split3", ("top", "middle", "bottom")),
    "mnist-svhn": load_mnist_svhn,
    "cub": load_cub,
    "spectra": load_spectra,
}


# --------------------------------------------------------------------------- python data.py DATASET


def preview(dataset, path, n=10):
    """A PNG with n training examples, a row per modality that is an image."""
    from torchvision.utils import make_grid, save_image

    rows = []
    for x in dataset.train[torch.arange(min(n, len(dataset.train)))]:
        if x.ndim == 4 and x.shape[1] in (1, 3):
            x = x.expand(-1, 3, -1, -1)
            rows.append(x)
    if rows:
        height, width = (max(x.shape[d] for x in rows) for d in (2, 3))
        rows = [F.pad(x, (0, width - x.shape[3], 0, height - x.shape[2]), value=0.5) for x in rows]
        save_image(make_grid(torch.cat(rows), nrow=len(rows[0])), path)
    return bool(rows)


def main(argv=None):
    p = argparse.ArgumentParser(
        description="Prepare a data set, print its sizes and draw a preview.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    p.add_argument("dataset", help=f"{', '.join(DATASETS)} or a path.npz")
    p.add_argument("--data", default="./data", help="folder of the data sets")
    cub = p.add_argument_group("cub")
    cub.add_argument("--weights", default="IMAGENET1K_V1", help="of ResNet-101, or none: random")
    cub.add_argument(
        "--no-normalise", action="store_true", help="photos as they are, as MMVAE's code takes them"
    )
    spectra = p.add_argument_group("spectra")
    spectra.add_argument("--msp", help="spectra; MassBank's release is downloaded without it")
    spectra.add_argument("--instrument", default="LC-ESI-QFT", help="Instrument_type to keep")
    spectra.add_argument("--mgf", help="the spectra of challenges, for ranking")
    spectra.add_argument("--candidates", help="CSV with id, inchikey, smiles")
    spectra.add_argument("--truth", help="CSV with id, inchikey")
    args = p.parse_args(argv)
    try:
        if args.dataset == "cub":
            found = prepare_cub(args.data, args.weights, not args.no_normalise)
            for name in found["unreadable"]:
                print(f"unreadable, left out: {name}")
        if args.dataset == "spectra":
            challenges = args.mgf, args.candidates, args.truth
            prepare_spectra(args.data, args.msp, args.instrument, *challenges)
        dataset = load(args.dataset, args.data)
        path = f"preview-{Path(args.dataset).stem}.png"
        drawn = preview(dataset, path)
    except (ValueError, OSError) as error:
        p.exit(2, f"{p.prog}: error: {error}\n")
    except KeyboardInterrupt:
        p.exit(130, f"\n{p.prog}: stopped; what is finished is kept, start again to go on\n")
    for name, base in zip(dataset.names, dataset.train.bases):
        shape = " x ".join(map(str, base.shape[1:]))
        print(f"{name}: {shape} {str(base.dtype)[6:]}, {len(base):,} to train with")
    print(f"{len(dataset.train):,} examples to train, {len(dataset.test):,} to test")
    if dataset.note:
        print(f"note: {dataset.note}")
    if drawn:
        print(f"preview: {path}")


if __name__ == "__main__":
    main()
