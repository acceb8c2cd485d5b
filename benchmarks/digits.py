"""mnist-split, mnist-split3: the bands of MNIST's images. mnist-svhn: pairs of the same digit.

MNIST and SVHN are read from, or downloaded to, the folder of the data sets. The pairs are fixed,
whatever --seed says.
"""

import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch
from torchvision.datasets import MNIST, SVHN
from torchvision.datasets.mnist import read_image_file, read_label_file

import data
import nets
from benchmarks import oracles


ORACLE_STEPS = {"image": 2000, "mnist": 1000, "svhn": 1500}


def load(name, root):
    return load_mnist_svhn(root) if name == "mnist-svhn" else load_bands(root, name)


def views(dataset):
    """What the oracles judge: the bands put together, else each image."""
    if dataset.name in nets.BANDS:
        return {"image": lambda xs: torch.cat(xs, -2)}
    return oracles.each(dataset.names)


def load_bands(root, name):
    """MNIST images cut into equal bands: 14 rows each, or 9 each of the first 27."""
    names = nets.BANDS[name]
    height = 28 // len(names)

    def cut(images, labels):
        return data.Split(
            [images[:, :, i * height : (i + 1) * height] for i in range(len(names))], labels=labels
        )

    return data.Dataset(
        name, cut(*mnist(root, True)), cut(*mnist(root, False)), {"name": name}, names
    )


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
        splits.append(data.Split([images, x], rows, digits[rows[0]]))
    n = len(crops["train_x"])
    note = "" if n == 73257 else f"SVHN with {n:,} training crops, not the standard 73,257"
    return data.Dataset("mnist-svhn", *splits, {"name": "mnist-svhn"}, ("mnist", "svhn"), note=note)


def mnist(root, train):
    """-> images (N, 1, 28, 28) bytes, labels (N,), from root/MNIST/raw; downloaded if missing."""
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
    path = data.prepared(root, "svhn.npz")
    if not path.exists():
        arrays, folder = {}, path.with_name("svhn")
        for part in ("train", "test"):
            raw = downloaded(
                lambda part=part: SVHN(folder, part, download=True),
                folder,
                "SVHN's train_32x32.mat and test_32x32.mat",
            )
            arrays |= {f"{part}_x": raw.data, f"{part}_y": raw.labels}
        data.save_npz(path, **arrays)
    arrays = data.read_npz(path, ("train_x", "train_y", "test_x", "test_y"))
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


PAPER = [  # data set, model, unpaired, column, numbers at f = 1, 1/2, 1/4, 1/8, 1/16
    # [poe] Table 1
    ("mnist-split", "MMVAE", "", "both", ".539"),
    ("mnist-split", "MMVAE", "", "top", ".221"),
    ("mnist-split", "MMVAE", "", "bottom", ".283"),
    ("mnist-split", "SVAE", "", "both", ".948"),
    ("mnist-split", "SVAE", "", "top", ".872"),
    ("mnist-split", "SVAE", "", "bottom", ".816"),
    ("mnist-split", "VAEVAE", "", "both", ".956"),
    ("mnist-split", "VAEVAE", "", "top", ".887"),
    ("mnist-split", "VAEVAE", "", "bottom", ".830"),
    ("mnist-split", "VAEVAE*", "", "both", ".958"),
    ("mnist-split", "VAEVAE*", "", "top", ".863"),
    ("mnist-split", "VAEVAE*", "", "bottom", ".778"),
    # [meme] Table 3; Table 7, which does not say where from: taken as what is generated
    ("mnist-svhn", "MEME", "svhn", "mnist→svhn", ".625 .551 .323 .172 .143"),
    ("mnist-svhn", "MEME", "mnist", "mnist→svhn", ".625 .572 .485 .470 .451"),
    ("mnist-svhn", "MEME", "split", "mnist→svhn", ".625 .625 .503 .467 .387"),
    ("mnist-svhn", "MEME", "svhn", "svhn→mnist", ".752 .726 .652 .557 .477"),
    ("mnist-svhn", "MEME", "mnist", "svhn→mnist", ".752 .715 .603 .546 .446"),
    ("mnist-svhn", "MEME", "split", "svhn→mnist", ".752 .718 .621 .568 .503"),
    ("mnist-svhn", "MMVAE", "", "mnist→svhn", ".581"),
    ("mnist-svhn", "MMVAE", "", "svhn→mnist", ".735"),
    ("mnist-svhn", "MMVAE, Laplace", "", "mnist→svhn", ".652"),
    ("mnist-svhn", "MMVAE, Laplace", "", "svhn→mnist", ".918"),
    ("mnist-svhn", "MVAE", "svhn", "mnist→svhn", ".123 .110 .112 .105 .105"),
    ("mnist-svhn", "MVAE", "mnist", "mnist→svhn", ".123 .111 .112 .116 .116"),
    ("mnist-svhn", "MVAE", "split", "mnist→svhn", ".123 .108 .101 .101 .101"),
    ("mnist-svhn", "MVAE", "svhn", "svhn→mnist", ".498 .305 .268 .220 .188"),
    ("mnist-svhn", "MVAE", "mnist", "svhn→mnist", ".498 .365 .350 .302 .249"),
    ("mnist-svhn", "MVAE", "split", "svhn→mnist", ".498 .338 .273 .249 .169"),
    # [meme] Table 4
    ("mnist-svhn", "MEME", "svhn", "latent mnist", ".908 .881 .870 .815 .795"),
    ("mnist-svhn", "MEME", "mnist", "latent mnist", ".908 .882 .844 .824 .807"),
    ("mnist-svhn", "MEME", "split", "latent mnist", ".908 .914 .893 .883 .856"),
    ("mnist-svhn", "MEME", "svhn", "latent svhn", ".648 .549 .295 .149 .113"),
    ("mnist-svhn", "MEME", "mnist", "latent svhn", ".648 .581 .398 .384 .362"),
    ("mnist-svhn", "MEME", "split", "latent svhn", ".648 .675 .507 .432 .316"),
    ("mnist-svhn", "MMVAE", "", "latent mnist", ".886"),
    ("mnist-svhn", "MMVAE", "", "latent svhn", ".499"),
    ("mnist-svhn", "MVAE", "svhn", "latent mnist", ".892 .895 .890 .887 .880"),
    ("mnist-svhn", "MVAE", "mnist", "latent mnist", ".892 .895 .898 .896 .895"),
    ("mnist-svhn", "MVAE", "split", "latent mnist", ".892 .898 .895 .894 .898"),
    ("mnist-svhn", "MVAE", "svhn", "latent svhn", ".131 .106 .107 .105 .102"),
    ("mnist-svhn", "MVAE", "mnist", "latent svhn", ".131 .106 .106 .107 .101"),
    ("mnist-svhn", "MVAE", "split", "latent svhn", ".131 .107 .109 .104 .100"),
    # [meme] Table 6; its MEME_SPLIT rows repeat Table 4 and are left out
    ("mnist-svhn", "MEME", "svhn", "MI mnist", ".075 .086 .101 .102 .103"),
    ("mnist-svhn", "MEME", "mnist", "MI mnist", ".073 .087 .101 .099 .104"),
    ("mnist-svhn", "MEME", "svhn", "MI svhn", ".036 .047 .071 – .134"),
    ("mnist-svhn", "MEME", "mnist", "MI svhn", ".036 .048 .085 .111 .142"),
    ("mnist-svhn", "MMVAE", "", "MI mnist", ".105"),
    ("mnist-svhn", "MMVAE", "", "MI svhn", ".042"),
    ("mnist-svhn", "MVAE", "svhn", "MI mnist", ".110 .107 .106 .106 .142"),
    ("mnist-svhn", "MVAE", "mnist", "MI mnist", ".102 .093 .110 .100 .100"),
    ("mnist-svhn", "MVAE", "split", "MI mnist", ".110 .104 .099 .100 .098"),
    ("mnist-svhn", "MVAE", "svhn", "MI svhn", ".163 .166 .165 .164 .176"),
    ("mnist-svhn", "MVAE", "mnist", "MI svhn", ".163 .175 .170 .174 .182"),
    ("mnist-svhn", "MVAE", "split", "MI svhn", ".163 .165 .172 .173 .179"),
]
