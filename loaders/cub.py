"""cub: features of bird photos and their captions, ten per photo.

`python data.py cub` downloads the photos if they are not there and writes their features, of a
ResNet-101 trained on ImageNet or your own (--features), to cub/features.npz. Photos and captions
are read in two layouts, Shi et al.'s (train/, test/, text_trainvalclasses.txt,
text_testclasses.txt) and that of the original archives (CUB_200_2011/; text_c10/ and lists of
classes by Reed et al.).

Shapes: P photos, D features, N captions.
"""

import os
import re
import sys
import tarfile
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision import models, transforms
from torchvision.datasets.utils import calculate_md5, download_url

import data
import nets
from loaders.arrays import PARTS, feature_stats, standardise

CUB_PHOTOS = "https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz"
CUB_MD5 = "97eceeb196236b17998738112f37df78"
CUB_CAPTIONS = (
    "https://drive.google.com/file/d/0B0ywwgffWnLLZW9uVHNjb2JmNlE/view"
    "?resourcekey=0-8y2UVmBHAlG26HafWYNoFQ"
)
SPECIALS = ("<exc>", "<pad>", "<eos>")  # a word outside the vocabulary, padding, end of sentence
EXC, EOS = SPECIALS.index("<exc>"), SPECIALS.index("<eos>")


def load(name, root):
    """Photo features (D,) and captions (32,). The ten examples of a photo share one row of the
    features. The vocabulary comes from the training captions. Features are extracted first if
    cub/features.npz is not there."""
    cub = root / "cub"
    unpack_captions(cub)
    path = cub / "features.npz"
    cache = read_features(path) if path.exists() else write_features(root)
    captions, splits = {}, {}
    for part in PARTS:
        tens = read_captions(cub, part, cache[f"{part}_files"].tolist())
        tens = [ten for ten, readable in zip(tens, cache[f"{part}_readable"]) if readable]
        captions[part] = [tokenize(line) for ten in tens for line in ten]
    words = vocabulary(captions["train"])
    for part in PARTS:
        index = torch.arange(len(captions[part]))
        bases = [torch.from_numpy(cache[f"{part}_x"]), encode_captions(captions[part], words)]
        splits[part] = data.Split(bases, rows=[index // 10, index])
    notes, width = [], cache["train_x"].shape[1]
    if cache["own"]:
        notes.append(f"{width:,} features per photo, from {cache['source']}, standardised")
    elif not cache["normalise"]:
        notes.append("features without ImageNet normalisation")
    unreadable = sum((~cache[f"{part}_readable"]).sum() for part in PARTS)
    if unreadable:
        notes.append(f"unreadable photos left out: {unreadable}")
    return data.Dataset(
        name=name,
        train=splits["train"],
        test=splits["test"],
        spec={"name": name, "vocabulary": len(words), "features": width},
        names=("image", "caption"),
        words=words,
        note="; ".join(notes),
    )


def flags(flag):
    flag("--no-normalise", action="store_true", help="skip ImageNet's normalisation of photos")
    flag("--features", help="an .npz with your own features x (photos, D) and, optionally, files")


def prepare(root, args):
    cache = write_features(root, features=args.features, normalise=not args.no_normalise)
    for part in PARTS:
        for file in cache[f"{part}_files"][~cache[f"{part}_readable"]]:
            print(f"unreadable photo, left out with its captions: {file}")


def write_features(root, features=None, normalise=True):
    """Write cub/features.npz, unless it is there: the features of all photos, of ResNet-101 or from
    a user's .npz, `features`.

    -> what read_features returns. ValueError for missing captions or photos, a photo without ten
    captions, weights that cannot be downloaded, a features.npz that was made from something else.
    """
    cub = Path(root) / "cub"
    path = cub / "features.npz"
    unpack_captions(cub)  # first, since only the user can download them
    source = "ResNet-101, IMAGENET1K_V1"
    if features is not None:
        source = f"{Path(features).name} (MD5 {calculate_md5(features)[:8]})"
    if path.exists():
        cache = read_features(path)
        if (cache["source"], cache["normalise"]) != (source, normalise):
            raise ValueError(f"{path} was made from {cache['source']}: delete it to make it again")
        return cache
    net = resnet() if features is None else None
    download_photos(cub)
    files = {part: list_photos(cub, part) for part in PARTS}
    for part in PARTS:  # ten captions per photo? Better known before hours of extraction
        read_captions(cub, part, files[part])
    arrays = {"source": source, "own": features is not None, "normalise": normalise}
    own = own_features(features, files) if features is not None else {}
    for part in PARTS:
        if features is None:
            x, readable = extract(net, cub, files[part], normalise)
        else:
            x, readable = own[part], np.ones(len(files[part]), bool)
        arrays[f"{part}_files"] = np.array(files[part])
        arrays[f"{part}_readable"] = readable
        arrays[f"{part}_x"] = x
    data.save_npz(path, arrays)
    return read_features(path)


def cub_photos(root):
    """The paths of the photos, one for each row of a split's features.
    -> {"train": [...], "test": [...]}"""
    cub = Path(root) / "cub"
    cache, paths = read_features(cub / "features.npz"), {}
    for part in PARTS:
        files = cache[f"{part}_files"][cache[f"{part}_readable"]]
        paths[part] = [cub / file for file in files]
    return paths


# ----------------------------------------------------------------------------------------- captions


def tokenize(text):
    """Lower-case words, punctuation marks and clitics ("bird", "'s"); hyphens stay ("red-eyed")."""
    return re.findall(r"\w+(?:-\w+)*|'\w+|[^\w\s]", text.lower())


def vocabulary(captions, above=3):
    """<exc>, <pad>, <eos>, then the words that occur more than `above` times, in order of first
    appearance. -> list"""
    counts = Counter(word for tokens in captions for word in tokens)
    return [*SPECIALS, *(word for word, n in counts.items() if n > above)]


def encode_captions(captions, words):
    """The first 31 words and <eos>, padded; a word outside the vocabulary is <exc>.
    -> int64 (N, 32)"""
    index = {word: i for i, word in enumerate(words)}
    rows = []
    for tokens in captions:
        row = [index.get(word, EXC) for word in tokens[: nets.WORDS - 1]] + [EOS]
        rows.append(row + [nets.PAD] * (nets.WORDS - len(row)))
    return torch.tensor(rows).view(-1, nets.WORDS)


def shi_layout(cub):
    return (cub / "text_trainvalclasses.txt").exists()


def read_captions(cub, part, files):
    """The ten captions of each photo. files: the sorted names of the photos of a split ("train" or
    "test"). -> list of lists of 10 strings"""
    if shi_layout(cub):  # one file, in the order of the photos
        path = cub / ("text_trainvalclasses.txt" if part == "train" else "text_testclasses.txt")
        lines = read_lines(path)
        if len(lines) != 10 * len(files):
            raise ValueError(
                f"{path} must have ten captions per photo, {10 * len(files)} lines for"
                f" {len(files)} photos, not {len(lines)}"
            )
        return [lines[i : i + 10] for i in range(0, len(lines), 10)]
    captions, folder = [], text_folder(cub) / "text_c10"
    for name in files:
        path = folder / Path(name).parent.name / f"{Path(name).stem}.txt"
        captions.append(read_lines(path))
        if len(captions[-1]) != 10:
            raise ValueError(f"{path} must have ten captions, not {len(captions[-1])}")
    return captions


def read_lines(path):
    """Lines end with a newline only: captions contain other control characters."""
    try:
        text = path.read_bytes().decode("utf-8", errors="replace").rstrip()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    return [line.strip() for line in text.split("\n")] if text else []


def text_folder(cub):
    """The folder of text_c10/ and the lists of classes: cub/, or cub/cvpr2016_cub/, which their
    archive unpacks to; None if neither has them."""
    for folder in (cub, cub / "cvpr2016_cub"):
        if (folder / "text_c10").is_dir():
            return folder
    return None


def unpack_captions(cub):
    if shi_layout(cub) or text_folder(cub):
        return
    archive = cub / "cvpr2016_cub.tar.gz"
    if not archive.exists():
        raise ValueError(
            f"{cub} has no captions. They must be downloaded by hand, from Google Drive:"
            f" put cvpr2016_cub.tar.gz ({CUB_CAPTIONS}) into {cub}"
        )
    unpack(archive, ".txt")


def unpack(archive, suffix):
    """Extract the files with this suffix from an archive, whose one folder is named like it
    (NAME.tgz: NAME/). The folder appears beside the archive when it is complete."""
    name = archive.name.partition(".")[0]
    print(f"unpacking {archive} ...", file=sys.stderr)
    with tempfile.TemporaryDirectory(prefix=f".{name}.", dir=archive.parent) as part:
        try:
            with tarfile.open(archive) as tar:
                files = (member for member in tar if member.name.endswith(suffix))
                tar.extractall(part, files, filter="data")
        except Exception as error:  # truncated or no archive: tarfile raises many kinds
            raise ValueError(f"{archive} cannot be read: {error}") from None
        if not Path(part, name).is_dir():
            raise ValueError(f"{archive} must hold {suffix} files in a folder {name}/")
        os.replace(Path(part, name), archive.with_name(name))


# ------------------------------------------------------------------------------------------- photos


def download_photos(cub):
    if shi_layout(cub) or (cub / "CUB_200_2011" / "images").is_dir():
        return
    archive = cub / "CUB_200_2011.tgz"
    try:
        download_url(CUB_PHOTOS, cub, archive.name, CUB_MD5)  # an intact one is not fetched again
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"{CUB_PHOTOS} cannot be downloaded: {error}. Put it at {archive} by hand"
        ) from None
    unpack(archive, ".jpg")


def list_photos(cub, part):
    """The names of a split's photos relative to cub/, sorted by class and file, as torchvision's
    ImageFolder sorts them."""
    if shi_layout(cub):
        folder = cub / part
        classes = [path.name for path in folder.iterdir() if path.is_dir()]
    else:
        folder = cub / "CUB_200_2011" / "images"
        classes = read_classes(cub, part)
    files = []
    for name in sorted(classes):
        if not (folder / name).is_dir():
            raise ValueError(f"{folder} has no photos of {name}, a class of the {part} split")
        for file in sorted(path.name for path in (folder / name).iterdir()):
            if file.lower().endswith((".jpg", ".jpeg", ".png")) and not file.startswith("."):
                files.append((folder / name / file).relative_to(cub).as_posix())
    if not files:
        raise ValueError(f"{folder} must have a folder of .jpg files for each class")
    return files


def read_classes(cub, part):
    """The classes of a split, the zero-shot one of Reed et al. (2016): none is in both splits."""
    folder = text_folder(cub)
    if part == "test":
        lists = ["testclasses.txt"]
    elif (folder / "trainvalclasses.txt").exists():
        lists = ["trainvalclasses.txt"]
    else:
        lists = ["trainclasses.txt", "valclasses.txt"]
    return {name for path in lists for name in read_lines(folder / path) if name}


# ----------------------------------------------------------------------------------------- features


def resnet():
    """ResNet-101 without its last layer: 2,048 features."""
    try:
        net = models.resnet101(weights="IMAGENET1K_V1")
    except Exception as error:  # no network, or a truncated file
        raise ValueError(
            f"{models.ResNet101_Weights.IMAGENET1K_V1.url} cannot be downloaded: {error}. Put it "
            f"into {Path(torch.hub.get_dir()) / 'checkpoints'} by hand, or give features of "
            "another network with --features"
        ) from None
    net.fc = torch.nn.Identity()
    return net.eval()


def extract(net, cub, files, normalise, batch_size=32):
    """Features of the photos `files` that can be read. -> x (P, 2048), readable (len(files),)"""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    steps = [transforms.Resize(224), transforms.CenterCrop(224), transforms.ToTensor()]
    if normalise:
        steps.append(transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    transform = transforms.Compose(steps)
    net.to(device)
    x, readable = [], []

    def read(file):
        try:
            with Image.open(cub / file) as image:
                return transform(image.convert("RGB"))
        except (OSError, SyntaxError, ValueError):  # Pillow's errors for damaged files
            return None

    with ThreadPoolExecutor() as pool, torch.inference_mode():
        for start in range(0, len(files), batch_size):
            photos = list(pool.map(read, files[start : start + batch_size]))
            readable += [photo is not None for photo in photos]
            photos = [photo for photo in photos if photo is not None]
            if photos:
                x.append(net(torch.stack(photos).to(device)).cpu())
            print(f"features of photos: {len(readable)} of {len(files)}", file=sys.stderr)
    return torch.cat(x).numpy(), np.array(readable)


def own_features(path, files):
    """A user's features of the photos `files`, standardised with the training photos'.

    The .npz holds x (P, D), in the order of the training and then the test photos, or in any order
    with the photos' names in its array `files`, of which class folder and file name are compared.
    -> {"train": float32 (P, D), "test": ...}
    """
    arrays, order = data.read_npz(path, ("x",)), files["train"] + files["test"]
    x, names = arrays["x"], arrays.get("files")
    if x.ndim != 2 or x.dtype.kind not in "fiu":
        raise ValueError(f"{path}: x must be numeric (photos, features), not {x.dtype} {x.shape}")
    if names is not None:
        if names.dtype.kind != "U" or names.shape != x.shape[:1]:
            raise ValueError(f"{path}: files must hold a name for each of the {len(x)} rows of x")
        rows = {Path(name).parts[-2:]: row for row, name in enumerate(names.tolist())}
        missing = [file for file in order if Path(file).parts[-2:] not in rows]
        if missing:
            raise ValueError(
                f"{path} has no features of {len(missing)} of the {len(order)} photos, such as"
                f" {missing[0]}"
            )
        x = x[[rows[Path(file).parts[-2:]] for file in order]]
    elif len(x) != len(order):
        raise ValueError(
            f"{path} must have features of the {len(order)} photos, not of {len(x)}, or their names"
            " in an array files"
        )
    x = x.astype(np.float64)
    if not np.isfinite(x).all():
        raise ValueError(f"{path}: x must be finite")
    n = len(files["train"])
    x = standardise(x, feature_stats(x[:n])).astype(np.float32)
    return {"train": x[:n], "test": x[n:]}


def read_features(path):
    """features.npz: source, the name of the network or of a user's file; own, true for a user's;
    normalise; for both parts {part}_files (P,), {part}_readable (P,) booleans, {part}_x (readable
    photos, D) float32. -> {name: array}, those without axes as Python's values"""
    keys = [f"{part}_{key}" for part in PARTS for key in ("files", "readable", "x")]
    arrays = data.read_npz(path, ("source", "own", "normalise", *keys))
    return {name: x if x.ndim else x.item() for name, x in arrays.items()}
