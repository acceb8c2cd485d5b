"""mnist-split, mnist-split3: horizontal bands of MNIST images. mnist-svhn: pairs of the same digit.

torchvision reads MNIST and SVHN from the folder of the data sets, or downloads them into it. The
pairs do not depend on --seed.
"""

import numpy as np
import torch
from torchvision.datasets import MNIST, SVHN

import data
import nets
from benchmarks import oracles

ORACLE_STEPS = {"image": 2000, "mnist": 1000, "svhn": 1500}


def load(name, root):
    return load_mnist_svhn(root) if name == "mnist-svhn" else load_bands(root, name)


def views(dataset):
    """The images that oracles judge: the bands stacked to one image, or each modality by itself."""
    if dataset.name in nets.BANDS:
        return {"image": lambda xs: torch.cat(xs, -2)}
    return oracles.each(dataset.names)


def load_bands(root, name):
    """MNIST images cut into equal bands: two of 14 rows, or three of 9 (the 28th is left out)."""
    names = nets.BANDS[name]
    height = 28 // len(names)
    splits = []
    for train in (True, False):
        images, labels = mnist(root, train)
        bands = [images[:, :, k * height : (k + 1) * height] for k in range(len(names))]
        splits.append(data.Split(bands, labels=labels))
    return data.Dataset(name, *splits, spec={"name": name}, names=names)


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
        note="" if n == 73257 else f"SVHN with {n:,} training crops, not the standard 73,257",
    )


def mnist(root, train):
    """-> images (N, 1, 28, 28) uint8, labels (N,) int64, from root/MNIST/raw"""
    try:
        mnist = MNIST(root, train, download=True)  # downloads only what is not there
        images, labels = mnist.data, mnist.targets
        if images.shape != (len(labels), 28, 28) or labels.max() > 9:
            raise ValueError(f"images {tuple(images.shape)}, {len(labels)} labels")
    except Exception as error:  # no network, or a damaged file: torchvision raises many kinds
        raise unreadable(root / "MNIST" / "raw", error, "MNIST's four idx files") from None
    return images[:, None], labels


def svhn(root):
    """root/svhn.npz, made from torchvision's SVHN if it is not there.
    -> {"train_x": (N, 3, 32, 32) uint8, "train_y": (N,) int64, "test_x": ..., "test_y": ...}"""
    path = data.prepared(root, "svhn.npz")
    if not path.exists():
        folder = path.with_name("svhn")
        try:
            train, test = SVHN(folder, "train", download=True), SVHN(folder, "test", download=True)
        except Exception as error:
            raise unreadable(folder, error, "SVHN's train_32x32.mat and test_32x32.mat") from None
        data.save_npz(
            path, train_x=train.data, train_y=train.labels, test_x=test.data, test_y=test.labels
        )
    arrays = data.read_npz(path, ("train_x", "train_y", "test_x", "test_y"))
    tensors = {}
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
    """The one sentence for images that can be neither read nor downloaded."""
    reason = (str(error) or type(error).__name__).splitlines()[-1]
    return ValueError(
        f"{folder} cannot be read: {reason}. It must hold {files}: put them there (delete damaged "
        "ones, and they are downloaded), or name another folder with --data"
    )


PAPER = [  # data set, model, --unpaired, column, values at f = 1, 1/2, 1/4, 1/8, 1/16
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
    # [meme] Table 3 and Table 7, whose values per modality are read as those of the generated one
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
    # [meme] Table 6, without its MEME_SPLIT rows, which repeat Table 4
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
