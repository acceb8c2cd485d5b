"""cub: photos of birds, as features of a network that has seen ImageNet, and their captions.

`python data.py cub` finds or downloads the photos and writes their features to cub/features.npz;
with --features, those of a file, of any network and any width.
Captions come from Shi et al.'s text_*.txt or from Reed et al.'s text_c10/. What is generated is
judged by how a photo's features and a sentence's word vectors correlate, [meme] App. G.

Shapes: N captions, V words, D of a word vector, G n-grams.
"""

import hashlib
import math
import os
import re
import time
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision import models, transforms

import data
from benchmarks import drawing

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
OWN = (
    "from "  # how the origin of one's own features begins, where torchvision's weights would stand
)
SPECIALS = ("<exc>", "<pad>", "<eos>")  # a word outside the vocabulary, padding, the end
EXC, PAD, EOS = range(3)
WORDS = 32  # a caption's length, <eos> included


def load(name, root):
    """CUB's features (2048,), or as many as one's own have, and captions (32,), ten per photo; makes
    cub/features.npz first where it is missing.

    A photo's ten examples share one row of the features. The vocabulary is that of the training
    captions.
    """
    cub, made = Path(root) / "cub", data.prepared(root, "cub", "features.npz")
    need_captions(cub)
    if not made.exists():  # as it will be on the first run
        prepare_cub(root)
    cache = read_features(made)
    files, readable, n = cache["files"].tolist(), cache["readable"], int(cache["train"])
    tokens = {}  # of the photos that could be read
    for split, part in (("train", slice(n)), ("test", slice(n, None))):
        photos = zip(read_captions(cub, split, files[part]), readable[part])
        tokens[split] = [tokenize(line) for ten, ok in photos if ok for line in ten]
    words = vocabulary(tokens["train"])
    bases = np.split(cache["x"], [len(tokens["train"]) // 10])
    splits = {}
    for (split, captions), x in zip(tokens.items(), bases):
        index = torch.arange(len(captions))
        found = [torch.from_numpy(x), encode_captions(captions, words)]
        splits[split] = data.Split(found, [index // 10, index])
    notes, width = [], cache["x"].shape[1]
    spec = {"name": "cub", "vocabulary": len(words)}
    if str(cache["weights"]).startswith(OWN):
        notes.append(f"{width:,} features per photo, {cache['weights']}, standardised")
        spec["shapes"] = {"image": [width], "caption": [WORDS]}
    if str(cache["weights"]) == "none":
        notes.append(
            "features of a randomly initialised ResNet-101: a check of the path, no result"
        )
    if not cache["normalise"]:
        notes.append("features without ImageNet normalisation")
    if not readable.all():
        notes.append(f"unreadable photos left out: {(~readable).sum()}")
    return data.Dataset(
        name=name,
        **splits,
        spec=spec,
        names=("image", "caption"),
        words=words,
        note="; ".join(notes),
    )


def flags(flag):
    flag("--weights", default="IMAGENET1K_V1", help="of the ResNet-101 for features; none: random")
    flag("--no-normalise", action="store_true", help="do not normalise photos as ImageNet's were")
    flag("--features", help="your own in its place: .npz with x (photos, D), also files")


def prepare(root, args):
    weights, own = args.weights, args.features
    if own is not None:
        data.read_npz(own, ("x",))
        weights = f"{OWN}{Path(own).name} (MD5 {data.md5(own)[:8]})"
    found = prepare_cub(root, weights, not args.no_normalise, features=own)
    for name in found["unreadable"]:
        print(f"unreadable, left out: {name}")


def prepare_cub(root, weights="IMAGENET1K_V1", normalise=True, device=None, features=None):
    """Finds or downloads the photos and writes their features to cub/features.npz; resumes where it
    was interrupted.

    weights: a name of torchvision's ResNet101_Weights, or none for a randomly initialised network;
    features: a file that own_features reads, in place of a network, weights being its name.
    -> dict of sizes. ValueError, in a sentence: no captions, not ten captions per photo, no
    weights, a folder that cannot be written to, a cache made with other settings.
    """
    cub, made = Path(root) / "cub", data.prepared(root, "cub", "features.npz")
    need_captions(cub)  # first of all: they are what cannot be had without the user
    cache = read_features(made) if made.exists() else None
    if cache:
        need_same(cache, weights, normalise, made)
    else:
        net = resnet(weights) if features is None else None
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
        if features is None:
            cache = extract(cub, made, train + test, len(train), net, weights, normalise, device)
        else:
            x = own_features(features, train + test, len(train))
            cache = {"weights": weights, "normalise": normalise, "x": x, "train": len(train)}
            cache |= {"files": np.array(train + test), "readable": np.ones(len(x), bool)}
        data.save_npz(made, **cache)
        made.with_name("features.partial.npz").unlink(missing_ok=True)
    dataset = load("cub", root)
    return {
        "weights": str(cache["weights"]),
        "photos": {"train": len(dataset.train.bases[0]), "test": len(dataset.test.bases[0])},
        "captions": {"train": len(dataset.train), "test": len(dataset.test)},
        "vocabulary": len(dataset.words),
        "unreadable": [f for f, ok in zip(cache["files"].tolist(), cache["readable"]) if not ok],
    }


def need_same(cache, weights, normalise, path):
    asked = ((str(cache["weights"]), cache["normalise"]), (weights, normalise))
    has, want = (f"weights {name}, {'' if yes else 'not '}normalised" for name, yes in asked)
    if has != want:
        raise ValueError(
            f"{path} was made with {has}, and {want} is asked for: delete it to have it made"
            " again, or ask for what it has"
        )


def cub_photos(root):
    """The files of the photos, one for each row of a split's features.
    -> {"train": [...], "test": [...]}"""
    cub = Path(root) / "cub"
    cache = read_features(data.prepared(root, "cub", "features.npz"))
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
    """<exc>, <pad>, <eos>, then the words seen more than `above` times, as they first appear.
    -> list"""
    counts = Counter(word for tokens in captions for word in tokens)
    return [*SPECIALS, *(word for word, n in counts.items() if n > above)]


def encode_captions(captions, words):
    """The first 31 words and <eos>, padded; a word outside the vocabulary is <exc>.
    -> int64 (N, 32)"""
    index = {word: i for i, word in enumerate(words)}
    rows = []
    for tokens in captions:
        row = [index.get(word, EXC) for word in tokens[: WORDS - 1]] + [EOS]
        rows.append(row + [PAD] * (WORDS - len(row)))
    return torch.tensor(rows).view(-1, WORDS)


def read_captions(cub, split, files):
    """The ten captions of each photo. files: the photos' names in sorted order.
    -> list of lists of 10 strings"""
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
    data.unpack(archive, cub / "cvpr2016_cub", "text_c10", ".txt")


# Photos


def fetch_photos(cub):
    """Unpacks, and downloads where it must, the originals: only for captions in their layout."""
    if (cub / "text_trainvalclasses.txt").exists() or (cub / "CUB_200_2011" / "images").is_dir():
        return
    archive = cub / "CUB_200_2011.tgz"
    if not archive.exists():
        data.download(CUB_PHOTOS, archive, CUB_MD5)
    elif data.md5(archive) != CUB_MD5:
        raise ValueError(f"{archive} is damaged, its MD5 is not {CUB_MD5}: delete it")
    data.unpack(archive, cub / "CUB_200_2011", "images", ".jpg")


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


# Features: torchvision's ResNet-101 without its last layer, 2,048 per photo


def resnet(weights):
    """ResNet-101 without its last layer, in eval mode. weights: torchvision's name, or none:
    random, seed 0."""
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
    """Freezes a random network's BatchNorm at the statistics of `images`, batches of
    (B, 3, 224, 224), in place.

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

    `every`: seconds between two saves; an interrupted run loses no more. A photo that `read_photo`
    cannot read is skipped and counted.
    -> what read_features returns
    """
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
            data.progress("features of photos", len(readable), len(which), len(files), start, first)
            if time.monotonic() - saved > every:
                data.save_npz(partial, **{**cache, "x": np.concatenate(x), "readable": readable})
                saved = time.monotonic()
    for split, ok in (("training", readable[:train]), ("test", readable[train:])):
        if not any(ok):
            raise ValueError(f"none of the {len(ok)} {split} photos in {cub} can be read")
    return {**cache, "x": np.concatenate(x), "readable": np.array(readable)}


def read_photo(path, transform):
    """(3, 224, 224), or None for a file that is no image, a damaged one or one without measure."""
    try:
        with Image.open(path) as image:
            if max(image.size) > min(8192, 20 * min(image.size)):  # a strip would fill the memory
                return None
            photo = image.convert("RGB")
    except MemoryError:
        raise
    except Exception:  # Pillow's readers raise whatever a damaged file leads to
        return None
    return transform(photo)


def resume(partial, cache):
    """What an interrupted run with the same settings and photos has left.
    -> list of arrays, list of booleans"""
    try:
        left = read_features(partial) if partial.exists() else {}
    except ValueError:
        left = {}
    if any(not np.array_equal(left.get(key), cache[key]) for key in cache):
        return [np.empty((0, 2048), np.float32)], []
    return [left["x"]], left["readable"].tolist()


def read_features(path):
    """The arrays weights, normalise, files (N,), train: how many of them train, readable (N,),
    x (readable, D)."""
    cache = data.read_npz(path, ("weights", "normalise", "files", "train", "readable", "x"))
    x, readable = cache["x"], cache["readable"]
    files, train = cache["files"], cache["train"]
    good = files.dtype.kind == "U" and files.ndim == readable.ndim == 1 and readable.dtype == bool
    good = good and train.ndim == 0 and train.dtype.kind in "iu" and 0 < train < len(files)
    good = good and cache["weights"].ndim == cache["normalise"].ndim == 0
    width = x.shape[1:] if str(cache["weights"]).startswith(OWN) else (2048,)
    good = good and x.dtype == np.float32 and x.shape == (readable.sum(), *width)
    good = good and x.ndim == 2 and x.size
    if not (good and len(readable) <= len(files) and np.isfinite(x).all()):
        raise ValueError(f"{path} does not hold features of CUB's photos: delete it")
    return cache


def own_features(path, files, train):
    """A user's features of CUB's photos, standardised as the training photos are, the first `train`
    of files.

    The .npz holds x (photos, D), in the order of the photos, or with their names in `files` in any
    order, of which the species' folder and the file's own name count. -> float32 (len(files), D)
    """
    arrays = data.read_npz(path, ("x",))
    x, names = arrays["x"], arrays.get("files")
    if x.ndim != 2 or x.dtype.kind not in "fiu" or not x.size:
        raise ValueError(f"{path}: x {x.shape} is to be numbers, (photos, features)")
    if names is not None:
        if names.dtype.kind != "U" or names.shape != x.shape[:1]:
            raise ValueError(f"{path}: files {names.shape} is to hold a name for each row of x")
        rows = {Path(name).parts[-2:]: row for row, name in enumerate(names.tolist())}
        missing = [file for file in files if Path(file).parts[-2:] not in rows]
        if missing:
            raise ValueError(
                f"{path} has no features of {len(missing)} of the {len(files)} photos, the first of "
                f"them {missing[0]}"
            )
        x = x[[rows[Path(file).parts[-2:]] for file in files]]
    elif len(x) != len(files):
        raise ValueError(
            f"{path} has features of {len(x)} photos, there are {len(files)}: name them in files"
        )
    x = x.astype(np.float64)
    if not np.isfinite(x).all():
        raise ValueError(f"{path}: x has values that are not finite")
    return data.standardise(x, data.constants_of(x[:train])).astype(np.float32)


# What is generated, measured and drawn


def caption_text(tokens, words):
    """Word indices (32,) -> the caption as text: words joined, cut at <eos>."""
    tokens = np.asarray(tokens).tolist()
    end = tokens.index(EOS) if EOS in tokens else len(tokens)
    return " ".join(words[t] for t in tokens[:end])


def character_ngrams(words, shortest=3, longest=6):
    """FastText's units: each word itself and the n-grams of <word>, numbered as they occur.

    -> (V, G) 0/1 sparse CSR, its transpose; the specials have none.
    """
    index, rows, columns = {}, [], []
    for row, word in enumerate(words):
        if word in SPECIALS:
            continue
        text = f"<{word}>"
        starts = ((n, a) for n in range(shortest, longest + 1) for a in range(len(text) - n + 1))
        for gram in (text, *sorted({text[a : a + n] for n, a in starts} - {text})):
            rows.append(row)
            columns.append(index.setdefault(gram, len(index)))
    where = torch.tensor([rows, columns])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that CSR is in beta, and not checked
        units = torch.sparse_coo_tensor(where, torch.ones(len(rows)), (len(words), len(index)))
        return units.coalesce().to_sparse_csr(), units.t().coalesce().to_sparse_csr()


def skipgram_counts(captions, n_words, window=3, sample=1e-3, draws=10, seed=0):
    """How often word i has word j in its window, per epoch, as word2vec draws it: frequent words
    dropped at random before the window is laid, a neighbour at distance d inside the random window
    with probability 1 - (d - 1)/window.

    captions: int64 (N, 32) -> pairs (V, V), frequencies (V,), float64. The specials never count.
    """
    generator = torch.Generator().manual_seed(seed)
    captions = torch.as_tensor(captions).cpu()
    sentence, at = (captions >= len(SPECIALS)).nonzero(as_tuple=True)
    word = captions[sentence, at]
    frequency = torch.bincount(word, minlength=n_words).double()
    threshold = sample * len(word) / frequency
    keep = (threshold.sqrt() + threshold).clamp(max=1)
    pairs = torch.zeros(n_words * n_words, dtype=torch.float64)
    for _ in range(draws):
        kept = torch.rand(len(word), generator=generator) < keep[word]
        w, s = word[kept], sentence[kept]
        for d in range(1, window + 1):
            same = s[d:] == s[:-d]
            pair = w[d:][same] * n_words + w[:-d][same]
            weight = 1 - (d - 1) / window
            pairs += weight * torch.bincount(pair, minlength=n_words * n_words)
    pairs = pairs.view(n_words, n_words) / draws
    return pairs + pairs.t(), frequency


def word_vectors(
    captions, words, dim=300, window=3, negative=5, epochs=10, lr=0.025, seed=0, device="cpu"
):
    """FastText [Bojanowski et al. 2017]: a word is the mean of its own vector and its n-grams'.

    Skip-gram with negative sampling. The vocabulary is small, so each step of gradient descent
    takes the expectation over words and negatives in place of a sample: it climbs

        Σ_ij n_ij log σ(h_i·o_j) + m_ij log σ(-h_i·o_j),    m_ij = negative (Σ_k n_ik) p_j

    with n_ij the pairs that a step would see, p_j ∝ frequency^.75.
    captions (N, 32) -> float32 (V, dim), zeros for specials
    """
    units, transposed = (m.to(device) for m in character_ngrams(words))
    share = 1 / units.sum(1, keepdim=True).to_dense().clamp(min=1)  # (V, 1)
    pairs, frequency = skipgram_counts(captions, len(words), window, draws=epochs, seed=seed)
    noise = frequency**0.75 / (frequency**0.75).sum()
    n = pairs.float().to(device)  # (V, V)
    m = (negative * pairs.sum(1, keepdim=True) * noise).float().to(device)
    steps = max(1, math.ceil(float(pairs.sum()) / 4000))  # per epoch: 4,000 pairs each
    # The summed gradient of a word in very many pairs of a step overshoots: it moves as by 4 / lr
    # pairs at most.
    most_h = 4 / (n + m).sum(1, keepdim=True).clamp(min=1e-9)
    most_o = 4 / (n + m).sum(0).unsqueeze(1).clamp(min=1e-9)
    generator = torch.Generator().manual_seed(seed)
    start = torch.rand(units.shape[1], dim, generator=generator)
    e = ((2 * start - 1) / dim).to(device)  # (G, D) the units' vectors
    o = torch.zeros(len(words), dim, device=device)  # (V, D) the words' as context
    for step in range(epochs * steps):
        rate = lr * (1 - step / (epochs * steps)) / steps
        h = share * (units @ e)  # (V, D)
        p = torch.sigmoid(h @ o.t())
        residual = n * (1 - p) - m * p  # (V, V)
        grad_h, grad_o = residual @ o, residual.t() @ h
        # each unit takes the whole step, as FastText does
        e += transposed @ (grad_h * most_h.clamp(max=rate))
        o += grad_o * most_o.clamp(max=rate)
    return (share * (units @ e)).cpu().numpy()


def cached_word_vectors(root, captions, words, device="cpu"):
    """word_vectors of the training captions, kept in cub/words.npz beside a digest of those."""
    captions = captions.cpu().numpy()
    digest = hashlib.sha256(captions.tobytes() + "\n".join(words).encode()).hexdigest()
    path = data.prepared(root, "cub", "words.npz")
    try:
        cache = data.read_npz(path, ("digest", "vectors"))
        if str(cache["digest"]) == digest and cache["vectors"].shape == (len(words), 300):
            return cache["vectors"]
    except ValueError:  # missing, damaged, another format: trained again
        pass
    vectors = word_vectors(captions, words, device=device)
    try:
        data.replace(path, lambda file: np.savez(file, vectors=vectors, digest=digest))
    except OSError as error:
        print(f"word vectors are not kept: {path.parent} cannot be written to ({error.strerror})")
    return vectors


def sentence_vectors(tokens, words, vectors):
    """The average over a caption's words up to <eos>, specials not counted; of no word at all, 0.

    tokens (N, 32), vectors (V, D) -> float32 (N, D)
    """
    tokens = np.asarray(tokens)
    special = np.array([word in SPECIALS for word in words])
    counted = ~special[tokens] & ((tokens == EOS).cumsum(1) == 0)
    total = np.zeros((len(tokens), vectors.shape[1]), np.float32)
    for column, use in zip(tokens.T, counted.T):
        total += vectors[column] * use[:, None]
    return total / np.maximum(counted.sum(1, keepdims=True), 1)


@torch.no_grad()
def cross_generate(model, split, batch_size=256):
    """Each test pair the other way round: one z per input, the decoded mean, the likeliest words.

    -> features from the captions (N, D), captions from the images int64 (N, 32)
    """
    device = next(model.parameters()).device
    split, features, captions = split.to(device), [], []
    for index in torch.arange(len(split), device=device).split(batch_size):
        image, caption = split[index]
        captions.append(model.decode(model.posterior(image, None).sample())[1].argmax(-1).cpu())
        features.append(model.decode(model.posterior(None, caption).sample())[0].cpu())
    return torch.cat(features).numpy(), torch.cat(captions).numpy()


@torch.no_grad()
def joint_generate(model, n=1000, batch_size=250):
    """n samples of the prior -> features (n, D), captions int64 (n, 32)"""
    features, captions = [], []
    for k in range(0, n, batch_size):
        image, caption = model.decode(model.prior().sample((min(batch_size, n - k),)))
        features.append(image.cpu())
        captions.append(caption.argmax(-1).cpu())
    return torch.cat(features).numpy(), torch.cat(captions).numpy()


def correlated(model, dataset, root="./data", samples=1000, batch_size=256):
    """[meme] Table 5: photos' features and sentences' vectors that should correlate.

    -> (x, y) of the training pairs, to fit a CCA to, and {"image->caption": (x, y), ...}: what is
    generated from one modality with what it was shown, from the prior ("joint"), and the test pairs
    as they are ("truth"); x (n, features), y (n, D)
    """
    device = next(model.parameters()).device
    vectors = cached_word_vectors(root, dataset.train.bases[1], dataset.words, device)

    def embed(tokens):
        return sentence_vectors(tokens, dataset.words, vectors)

    def real(split):
        return [base[rows].cpu().numpy() for base, rows in zip(split.bases, split.rows)]

    train_image, train_caption = real(dataset.train)
    image, caption = real(dataset.test)
    features, captions = cross_generate(model, dataset.test, batch_size)
    joint_features, joint_captions = joint_generate(model, samples)
    pairs = {
        "image->caption": (image, captions),
        "caption->image": (features, caption),
        "joint": (joint_features, joint_captions),
        "truth": (image, caption),
    }
    fit = train_image, embed(train_caption)
    return fit, {name: (x, embed(tokens)) for name, (x, tokens) in pairs.items()}


def nearest_photos(features, photos):
    """The row of `photos` (P, D) nearest to each of `features` (N, D), Euclidean.
    -> int64 (N,)"""
    features, photos = torch.as_tensor(features), torch.as_tensor(photos)
    rows = [torch.cdist(x, photos.to(x.device)).argmin(1) for x in features.split(1000)]
    return torch.cat(rows).cpu().numpy()


@torch.no_grad()
def draw(run, dataset, root, path, n=6):
    """Photos and captions of n test pairs with what each generates ([meme] Fig. 4, [poe] Fig. 10),
    to an image file.

    A generated photo is the training photo whose features are nearest to the generated ones.
    """
    device = next(run.model.parameters()).device
    files, test, words = cub_photos(root), dataset.test, dataset.words
    chosen = torch.linspace(0, len(test.bases[0]) - 1, n).long()  # photos, evenly over the species
    index = torch.tensor([int((test.rows[0].cpu() == row).nonzero()[0, 0]) for row in chosen])
    image, caption = test.to(device)[index.to(device)]
    shown = {
        "photo": ((image, None), [files["test"][row] for row in chosen]),
        "caption": ((None, caption), [caption_text(t.cpu(), words) for t in caption]),
    }
    columns = []
    for name, (xs, contents) in shown.items():
        features, tokens = run.model.decode(run.model.posterior(*xs).sample())
        nearest = nearest_photos(features, dataset.train.bases[0])
        columns += [
            (name, contents),
            (f"{name} → photo", [files["train"][row] for row in nearest]),
            (f"{name} → caption", [caption_text(t, words) for t in tokens.argmax(-1).cpu()]),
        ]
    drawing.sheet(columns, drawing.title(run), path)


PAPER = [  # data set, model, unpaired, column, numbers at f = 1, 1/2, 1/4, 1/8, 1/16
    # [meme] Table 5
    ("cub", "MEME", "image", "corr. image→caption", ".064 .042 .026 .029"),
    ("cub", "MEME", "caption", "corr. image→caption", ".064 .062 .048 .052"),
    ("cub", "MEME", "split", "corr. image→caption", ".064 .046 .031 .027"),
    ("cub", "MEME", "image", "corr. caption→image", ".074 .058 .051 .046"),
    ("cub", "MEME", "caption", "corr. caption→image", ".074 .059 .050 .053"),
    ("cub", "MEME", "split", "corr. caption→image", ".074 .061 .047 .049"),
    ("cub", "MMVAE", "", "corr. image→caption", ".060"),
    ("cub", "MMVAE", "", "corr. caption→image", ".058"),
    ("cub", "MVAE", "image", "corr. image→caption", "-.002 -.000 .001 -.001"),
    ("cub", "MVAE", "caption", "corr. image→caption", "-.002 -.000 .000 .001"),
    ("cub", "MVAE", "split", "corr. image→caption", "-.002 .000 .000 -.001"),
    ("cub", "MVAE", "image", "corr. caption→image", "-.002 -.002 -.002 -.001"),
    ("cub", "MVAE", "caption", "corr. caption→image", "-.002 -.001 -.003 -.002"),
    ("cub", "MVAE", "split", "corr. caption→image", "-.002 -.002 -.002 -.002"),
    *(("cub", m, "", "corr. truth", ".106") for m in ("MEME", "MMVAE", "MVAE")),
]
