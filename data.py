"""Data sets, pairing masks and batches. `python data.py mnist-svhn` prepares a data set and draws a preview.

    dataset = load("mnist-svhn", "./data")         # .train, .test: splits; .spec: arguments for nets.modalities
    streams = pairing(len(dataset.train), dataset.names, paired=0.5, unpaired="split")
    for step in batches(dataset.train, streams, batch_size=128):
        for weight, xs in step: ...                # xs: one tensor per modality, None where it is hidden

What is random, and in what: glyphs and the MNIST-SVHN pairs are fixed (seed 0, whatever --seed says); which
examples are paired depends on `pairing`'s seed alone; the order of the batches on their generator.
Images are float32 in [0, 1], captions int64 word indices, spectra and bits float32 in [0, 1].
"""

import argparse
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

DATASETS = ("glyphs", "mnist-split", "mnist-split3", "mnist-svhn", "cub", "spectra")


class Split:
    """The examples of a split: base tensors held once and, per modality, the row of each example in its base."""

    def __init__(self, bases, rows=None, labels=None):
        self.bases = list(bases)
        self.rows = [torch.arange(len(b)) for b in self.bases] if rows is None else list(rows)
        self.labels = labels

    def __len__(self):
        return len(self.rows[0])

    def take(self, m, index):
        """Modality m of the examples `index`: bytes become [0, 1], bits 0 and 1, words stay int64."""
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
    mask: torch.Tensor | None = (
        None  # (N, M) booleans: what each training example shows, where the data say so
    )
    words: list | None = None  # the vocabulary of captions
    note: str = ""  # what a reader of results must know, printed beside them


def load(name, root="./data", limit=None):
    """A data set by name, or a user's path.npz. ValueError, in a sentence, for whatever is wrong with the files.

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


# ------------------------------------------------------------------------------------------ pairing and batches


def pairing(n, names, paired=1.0, unpaired="split", seed=0, mask=None):
    """Who shows what in training: a list of streams (mask, index), a pure function of its arguments.

    mask: M booleans, index: the examples (LongTensor). round(paired * n) random examples are shown whole; the rest as
    `unpaired` says: split (one modality each, equal shares: [meme] SPLIT), a modality's name (only that one),
    all (one stream per modality over all n, as [poe]'s code), rest (the same over the rest, as its text), none.
    With `mask` (n, M), the streams are its patterns. ValueError for what cannot be done.
    """
    generator = torch.Generator().manual_seed(seed)
    if mask is not None:
        return patterns(mask)
    if not 0 < paired <= 1:
        raise ValueError(f"--paired is the fraction of whole examples, in (0, 1], not {paired:g}")
    if unpaired not in ("split", "all", "rest", "none", *names):
        raise ValueError(
            f"--unpaired is split, all, rest, none or one of {', '.join(names)}, not {unpaired!r}"
        )
    order = torch.randperm(n, generator=generator)
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
    """One epoch: per step a list of (weight, xs), one entry per stream, xs with None for what its mask hides.

    natural: a stream's share of the batch is its share of the examples, its weight n_i / sum n: a step estimates
    eq. 5's mean over examples without bias. balanced: batch_size of each stream, weight 1, an epoch is one pass over
    the largest. A stream that runs out is shuffled again. `generator` shuffles, the same on every one of `world` ranks:
    each takes its part of every step, with weights under which the mean of the ranks' gradients is that of one process.
    """
    sizes, steps = shares(streams, batch_size, sampling)
    total = sum(len(index) for _, index in streams)
    draws = [endless(index, generator, split.rows[0].device) for _, index in streams]
    largest = max(len(index) for _, index in streams)
    for step in range(steps):
        batch, dealt = [], rank
        for (shown, index), size, draw in zip(streams, sizes, draws):
            if sampling == "balanced" and len(index) == largest:
                size = min(size, largest - step * batch_size)  # the last step of the pass
            weight = 1.0 if sampling == "balanced" else len(index) / total
            chosen = draw(size)[
                dealt % world :: world
            ]  # dealt like cards, so that no rank goes without
            dealt -= size
            if len(chosen):
                batch.append((weight * world * len(chosen) / size, show(split, shown, chosen)))
        yield batch


def endless(index, generator, device):
    """A function n -> the next n of the shuffled index, which is shuffled again whenever it runs out."""
    queue = torch.empty(0, dtype=torch.long, device=device)

    def draw(n):
        nonlocal queue
        while len(queue) < n:
            again = index[torch.randperm(len(index), generator=generator)].to(device)
            queue = torch.cat([queue, again])
        taken, queue = queue[:n], queue[n:]
        return taken

    return draw


def observed(split, streams, n):
    """Up to n training examples of each modality, from the streams that show it. -> list of M tensors"""
    found = []
    for m in range(len(split.bases)):
        index = torch.cat(
            [index for shown, index in streams if shown[m]] or [torch.empty(0).long()]
        )
        found.append(split.take(m, index.unique()[:n].to(split.rows[0].device)))
    return found


# ------------------------------------------------------------------------------------------ digits


def load_glyphs(root):
    """Digits of a font that ships inside Pillow: grey 1x28x28 and coloured 3x32x32 of the same digit, 10,000 + 2,000."""
    train, test = glyphs(10_000, seed=0), glyphs(2_000, seed=1)
    return Dataset("glyphs", train, test, {"name": "glyphs"}, ("grey", "colour"))


def glyphs(n, seed):
    from PIL import Image, ImageDraw, ImageFont

    font, templates = ImageFont.load_default(44), []
    for digit in "0123456789":
        page = Image.new("L", (64, 64))
        ImageDraw.Draw(page).text((32, 32), digit, font=font, fill=255, anchor="mm")
        templates.append(torch.from_numpy(np.array(page)))
    templates = torch.stack(templates)[:, None].float() / 255  # (10, 1, 64, 64)
    generator = torch.Generator().manual_seed(seed)

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(n, *shape, generator=generator)

    def warped(labels, size):
        """Rotated by up to 9 degrees, sheared, 1 to 1.2 times as large, shifted by up to 4 %. -> (n, 1, size, size)"""
        angle, shear, zoom = uniform(-0.16, 0.16), uniform(-0.15, 0.15), uniform(1, 1.2)
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
    """Pairs of the same digit. Per class n = the fewer of both, each side permuted, `repeats` times (30 in MMVAE)."""
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
        mixed = torch.randperm(len(rows[0]), generator=generator)
        rows = [side[mixed] for side in rows]
        splits.append(Split([images, x], rows, digits[rows[0]]))
    n = len(crops["train_x"])
    note = "" if n == 73257 else f"SVHN with {n:,} training crops, not the standard 73,257"
    return Dataset("mnist-svhn", *splits, {"name": "mnist-svhn"}, ("mnist", "svhn"), note=note)


def mnist(root, train):
    """-> images (N, 1, 28, 28) bytes, labels (N,), from root/MNIST/raw, downloaded when they are not there."""
    from torchvision.datasets import MNIST
    from torchvision.datasets.mnist import read_image_file, read_label_file

    folder, stem = root / "MNIST" / "raw", "train" if train else "t10k"
    files = [folder / f"{stem}-images-idx3-ubyte", folder / f"{stem}-labels-idx1-ubyte"]
    if not all(f.exists() for f in files):
        there = folder.exists()
        try:
            MNIST(root, download=True)
        except Exception as error:  # URLError, RuntimeError, OSError: whatever the download met
            if not there and folder.exists() and not any(folder.iterdir()):
                folder.rmdir()
                folder.parent.rmdir()
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise ValueError(
                f"MNIST is not in {folder} and could not be downloaded ({reason}): put its four "
                "idx files there, or name the folder that has MNIST/raw with --data"
            ) from None
    found = []
    for file, read in zip(files, (read_image_file, read_label_file)):
        try:
            found.append(read(file))
        except (
            Exception
        ) as error:  # torchvision asserts, or fails in frombuffer, on what is no IDX file
            raise ValueError(
                f"{file} is damaged or no IDX file: delete it, to download it anew"
            ) from error
    images, labels = found
    if images.shape[1:] != (28, 28) or len(images) != len(labels) or labels.max() > 9:
        raise ValueError(
            f"{files[0]} and {files[1].name} are not images of 28 x 28 with a digit each"
        )
    return images[:, None], labels


def svhn(root):
    """root/svhn.npz as tensors: train_x (N, 3, 32, 32) bytes, train_y, test_x, test_y. Made from torchvision's SVHN."""
    path = root / "svhn.npz"
    if not path.exists():
        from torchvision.datasets import SVHN

        arrays = {}
        for part in ("train", "test"):
            try:
                raw = SVHN(root / "svhn", part, download=True)
            except Exception as error:
                reason = (str(error) or type(error).__name__).splitlines()[0]
                raise ValueError(
                    f"there is no {path}, and SVHN could not be downloaded ({reason}): put train_32x32.mat and "
                    f"test_32x32.mat into {root / 'svhn'}, or name another folder with --data"
                ) from None
            arrays |= {f"{part}_x": raw.data, f"{part}_y": raw.labels}
        save_npz(path, **arrays)
    arrays = read_npz(path, ("train_x", "train_y", "test_x", "test_y"))
    for part in ("train", "test"):
        x, y = arrays[f"{part}_x"], arrays[f"{part}_y"]
        if x.dtype != np.uint8 or x.shape[1:] != (3, 32, 32) or y.shape != (len(x),):
            raise ValueError(
                f"{path}: {part}_x is to be uint8 (N, 3, 32, 32) with N labels in {part}_y"
            )
    return {
        k: torch.from_numpy(a if k.endswith("x") else a.astype(np.int64) % 10)
        for k, a in arrays.items()
    }


# ------------------------------------------------------------------------------------------ arrays on disk


def read_npz(path, required=()):
    """The arrays of an .npz, without unpickling anything. ValueError when it is damaged or lacks a required key."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            missing = [key for key in required if key not in archive]
            if missing:
                raise ValueError(
                    f"{path} has no array {missing[0]!r}, only {', '.join(archive.files) or 'none'}"
                )
            return {key: archive[key] for key in archive.files}
    except FileNotFoundError:
        raise ValueError(f"there is no file {path}") from None
    except ValueError as error:
        if str(error).startswith(str(path)):
            raise
        raise ValueError(f"{path} cannot be read as an .npz of plain arrays ({error})") from None
    except (
        Exception
    ) as error:  # zipfile.BadZipFile, EOFError, zlib.error, MemoryError of a forged header
        raise ValueError(f"{path} is damaged or no .npz ({error})") from None


def save_npz(path, **arrays):
    """Written beside its place and renamed, so that a reader finds a whole file or none."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as file:
            np.savez_compressed(file, **arrays)
        os.replace(part, path)
    except OSError as error:
        raise ValueError(
            f"{path} cannot be written ({error.strerror}): choose another --data"
        ) from None
    finally:
        part.unlink(missing_ok=True)


def load_npz(path):
    """A user's arrays train_0, train_1, ..., test_0, ...; optionally train_labels, test_labels, train_mask (N, M)."""
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
    mask = None
    if "train_mask" in arrays:
        mask = torch.from_numpy(arrays["train_mask"]).bool()
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
            kinds.setdefault(name, (kind, base.shape[1:]))
            if (
                base.shape[1:] != kinds[name][1]
                or len(base) != len(arrays[f"{part}_0"])
                or not len(base)
            ):
                raise ValueError(f"{path}: {key} {tuple(base.shape)} does not fit the other arrays")
            bases.append(base)
        labels = arrays.get(f"{part}_labels")
        if labels is not None and (
            labels.shape != (len(bases[0]),) or labels.dtype.kind not in "iu"
        ):
            raise ValueError(f"{path}: {part}_labels is to hold one integer per example")
        splits.append(
            Split(
                bases, labels=None if labels is None else torch.from_numpy(labels.astype(np.int64))
            )
        )
    shapes = {name: list(kinds[name][1]) for name in names}
    spec = {"name": "npz", "shapes": shapes, "likelihoods": [kinds[name][0] for name in names]}
    return Dataset(str(path), *splits, spec, names, mask)


def own_array(path, key, array, shown, decided):
    """A user's array as a base, and its likelihood: bits and bytes Bernoulli, floats Laplace. -> tensor, likelihood"""
    if array.dtype.kind not in "buif" or array.ndim < 2:
        raise ValueError(
            f"{path}: {key} is to be numbers, (examples, features) or (examples, C, H, W)"
        )
    if not np.isfinite(array[shown]).all():
        raise ValueError(f"{path}: {key} has values that are not finite")
    array = np.nan_to_num(array, posinf=0, neginf=0)  # what a mask hides may be anything
    if array.ndim == 3:
        array = array[:, None]  # grey images
    if array.ndim == 4 and min(array.shape[2:]) < 8:
        raise ValueError(
            f"{path}: {key} has images smaller than 8 x 8; flatten them to (examples, features)"
        )
    binary = np.isin(array[shown], (0, 1)).all() if decided is None else decided[0] == "bernoulli"
    if array.dtype == np.uint8 and array.max(initial=0) > 1:
        return torch.from_numpy(array), "bernoulli"
    if binary and np.isin(array[shown], (0, 1)).all():
        return torch.from_numpy(array.astype(bool)), "bernoulli"
    if array.ndim == 4 and not (array[shown].min() >= 0 and array[shown].max() <= 1):
        raise ValueError(f"{path}: {key} has images that are neither bytes nor floats in [0, 1]")
    return torch.from_numpy(array.astype(np.float32)), "bernoulli" if array.ndim == 4 else "laplace"


LOADERS = {
    "glyphs": load_glyphs,
    "mnist-split": lambda root: load_bands(root, "mnist-split", ("top", "bottom")),
    "mnist-split3": lambda root: load_bands(root, "mnist-split3", ("top", "middle", "bottom")),
    "mnist-svhn": load_mnist_svhn,
}


# ------------------------------------------------------------------------------------------ python data.py DATASET


def preview(dataset, path, n=10):
    """A PNG with n training examples, a row per modality that is an image."""
    from torchvision.utils import make_grid, save_image

    rows = []
    for x in dataset.train[torch.arange(min(n, len(dataset.train)))]:
        if x.ndim == 4:
            x = x.expand(-1, 3, -1, -1)
            rows.append(F.pad(x, (0, 32 - x.shape[3], 0, 32 - x.shape[2]), value=0.5))
    if rows:
        save_image(make_grid(torch.cat(rows), nrow=len(rows[0])), path)
    return bool(rows)


def main(argv=None):
    p = argparse.ArgumentParser(
        description="Prepare a data set, print its sizes and draw a preview."
    )
    p.add_argument("dataset", help=f"{', '.join(DATASETS)} or a path.npz")
    p.add_argument(
        "--data", default="./data", help="folder of the data sets (default: %(default)s)"
    )
    args = p.parse_args(argv)
    try:
        dataset = load(args.dataset, args.data)
    except ValueError as error:
        p.exit(2, f"{p.prog}: error: {error}\n")
    for m, name in enumerate(dataset.names):
        base = dataset.train.bases[m]
        print(
            f"{name}: {' x '.join(map(str, base.shape[1:]))} {str(base.dtype)[6:]}, {len(base):,} to train with"
        )
    print(f"{len(dataset.train):,} examples to train, {len(dataset.test):,} to test")
    if dataset.note:
        print(f"note: {dataset.note}")
    path = f"preview-{Path(args.dataset).stem}.png"
    if preview(dataset, path):
        print(f"preview: {path}")


if __name__ == "__main__":
    main()
