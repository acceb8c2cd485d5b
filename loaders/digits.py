"""mnist-split, mnist-split3: horizontal bands of MNIST images. mnist-svhn: pairs of the same digit.

torchvision reads MNIST and SVHN from the folder of the data sets, or downloads them into it. The
pairs do not depend on --seed.
"""

import numpy as np
import torch
from torchvision.datasets import MNIST, SVHN

import data
import nets


def load(name, root):
    return load_mnist_svhn(root) if name == "mnist-svhn" else load_bands(name, root)


def load_bands(name, root):
    """MNIST images cut into equal bands: two of 14 rows, or three of 9 (the 28th is left out)."""
    names = nets.BANDS[name]
    height, splits = 28 // len(names), []
    for train in (True, False):
        images, labels = mnist(root, train)
        bands = [images[:, :, k * height : (k + 1) * height] for k in range(len(names))]
        splits.append(data.Split(bands, labels=labels))
    return data.Dataset(
        name=name,
        train=splits[0],
        test=splits[1],
        spec={"name": name},
        names=names,
        views={"image": tuple(range(len(names)))},
    )


def load_mnist_svhn(root, repeats=1):
    """Pairs of an MNIST and an SVHN image of the same digit. For each digit, the first n images of
    both, n the smaller count, are permuted and paired, `repeats` times (MMVAE: 30)."""
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
        order = torch.randperm(len(rows[0]), generator=generator)
        rows = [side[order] for side in rows]
        splits.append(data.Split([images, x], rows, digits[rows[0]]))
    n = len(crops["train_x"])
    return data.Dataset(
        name="mnist-svhn",
        train=splits[0],
        test=splits[1],
        spec={"name": "mnist-svhn"},
        names=("mnist", "svhn"),
        views={"mnist": (0,), "svhn": (1,)},
        note="" if n == 73257 else f"SVHN with {n:,} training crops, not the standard 73,257",
    )


def mnist(root, train):
    """-> images (N, 1, 28, 28) uint8, labels (N,) int64, from root/MNIST/raw"""
    try:
        mnist = MNIST(root, train, download=True)  # downloads only what is not there
    except Exception as error:  # no network, or a damaged file: torchvision raises many kinds
        raise unreadable(root / "MNIST" / "raw", error, "MNIST's four idx files") from None
    if mnist.data.shape != (len(mnist.targets), 28, 28):
        raise ValueError(f"{root / 'MNIST' / 'raw'} has images {tuple(mnist.data.shape)}")
    return mnist.data[:, None], mnist.targets


def svhn(root):
    """root/svhn.npz, made from torchvision's SVHN if it is not there.
    -> {"train_x": (N, 3, 32, 32) uint8, "train_y": (N,) int64, "test_x": ..., "test_y": ...}"""
    path, keys = root / "svhn.npz", ("train_x", "train_y", "test_x", "test_y")
    if not path.exists():
        folder = root / "svhn"
        try:
            train, test = SVHN(folder, "train", download=True), SVHN(folder, "test", download=True)
        except Exception as error:
            raise unreadable(folder, error, "SVHN's train_32x32.mat and test_32x32.mat") from None
        arrays = (train.data, train.labels, test.data, test.labels)
        data.save_npz(path, dict(zip(keys, arrays)))
    arrays, tensors = data.read_npz(path, keys), {}
    for part in ("train", "test"):
        x, y = arrays[f"{part}_x"], arrays[f"{part}_y"]
        if x.dtype != np.uint8 or x.shape != (len(y), 3, 32, 32):
            raise ValueError(
                f"{path}: {part}_x must be uint8 (N, 3, 32, 32) with {part}_y (N,), not {x.dtype} "
                f"{x.shape} with {y.shape}"
            )
        tensors[f"{part}_x"] = torch.from_numpy(x)
        # SVHN's own files have 10 as the label of the digit 0
        tensors[f"{part}_y"] = torch.from_numpy(y.astype(np.int64)) % 10
    return tensors


def unreadable(folder, error, files):
    """A sentence for images that can be neither read nor downloaded."""
    reason = (str(error) or type(error).__name__).splitlines()[-1]
    return ValueError(
        f"{folder} cannot be read: {reason}. It must hold {files}: put them there (delete damaged "
        "ones, and they are downloaded), or name another folder with --data"
    )
