"""cub: features of bird photos and their captions.

`python data.py cub` downloads the photos if they are not there and writes their features, of a
ResNet-101 trained on ImageNet or your own (--features), to cub/features.npz. Photos and captions
are read in two layouts, Shi et al.'s (train/, test/, text_trainvalclasses.txt,
text_testclasses.txt) and that of the original archives (CUB_200_2011/; text_c10/ and lists of
classes by Reed et al.).
Generated pairs are judged by the correlation of photo features and sentence vectors, [meme] App. G.

Shapes: N captions, V words, D dimensions of a word vector, G n-grams.
"""

import hashlib
import math
import os
import re
import sys
import tarfile
import tempfile
import time
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision import models, transforms
from torchvision.datasets.utils import calculate_md5, download_url

import data
from benchmarks import drawing, npz

CUB_PHOTOS = "https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz"
CUB_MD5 = "97eceeb196236b17998738112f37df78"
CUB_CAPTIONS = (
    "https://drive.google.com/file/d/0B0ywwgffWnLLZW9uVHNjb2JmNlE/view"
    "?resourcekey=0-8y2UVmBHAlG26HafWYNoFQ"
)
OWN = "from "  # the `weights` of a user's own features begin with this
SPECIALS = ("<exc>", "<pad>", "<eos>")  # a word outside the vocabulary, padding, end of sentence
EXC, PAD, EOS = range(3)
WORDS = 32  # the length of a caption, <eos> included


def load(name, root):
    """Photo features (2048,), or as many as a user's own have, and captions (32,), ten per photo.

    The ten examples of a photo share one row of the features. The vocabulary comes from the
    training captions. Features are extracted first if cub/features.npz is not there.
    """
    cub, path = Path(root) / "cub", data.prepared(root, "cub", "features.npz")
    unpack_captions(cub)
    cache = read_features(path) if path.exists() else prepare_cub(root)
    files, readable, n = cache["files"].tolist(), cache["readable"], int(cache["train"])
    features = dict(zip(("train", "test"), np.split(cache["x"], [readable[:n].sum()])))
    captions = {}
    for part, photos in (("train", slice(n)), ("test", slice(n, None))):
        lists = read_captions(cub, part, files[photos])
        lists = [ten for ten, ok in zip(lists, readable[photos]) if ok]
        captions[part] = [tokenize(line) for ten in lists for line in ten]
    words = vocabulary(captions["train"])
    splits = {}
    for part in ("train", "test"):
        index = torch.arange(len(captions[part]))
        bases = [torch.from_numpy(features[part]), encode_captions(captions[part], words)]
        splits[part] = data.Split(bases, rows=[index // 10, index])
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
        train=splits["train"],
        test=splits["test"],
        spec=spec,
        names=("image", "caption"),
        words=words,
        note="; ".join(notes),
    )


def flags(flag):
    flag("--weights", default="IMAGENET1K_V1", help="weights of ResNet-101; none: random ones")
    flag("--no-normalise", action="store_true", help="skip ImageNet's normalisation of photos")
    flag("--features", help="an .npz with your own features x (photos, D) and, optionally, files")


def prepare(root, args):
    weights = args.weights
    if args.features is not None:
        digest = calculate_md5(args.features)[:8]
        weights = f"{OWN}{Path(args.features).name} (MD5 {digest})"
    cache = prepare_cub(root, weights, not args.no_normalise, features=args.features)
    for file in cache["files"][~cache["readable"]]:
        print(f"unreadable photo, left out with its captions: {file}")


def prepare_cub(root, weights="IMAGENET1K_V1", normalise=True, device=None, features=None):
    """Write cub/features.npz: extract the features of all photos, or copy a user's own; an
    interrupted extraction is resumed.

    weights: a name of torchvision's ResNet101_Weights, or none for random weights; with `features`,
    the path of a user's .npz, the name of these. -> what read_features returns
    ValueError for missing captions or photos, a photo without ten captions, weights that cannot be
    downloaded, a features.npz that was made with other settings or from other photos.
    """
    cub, path = Path(root) / "cub", data.prepared(root, "cub", "features.npz")
    unpack_captions(cub)  # first, since only the user can download them
    if path.exists():
        cache = read_features(path)
        settings = str(cache["weights"]), bool(cache["normalise"])
        files = list_photos(cub, "train") + list_photos(cub, "test")
        if settings != (weights, normalise):
            raise ValueError(
                f"{path} was made with (weights, normalise) = {settings}, not"
                f" {(weights, normalise)}: delete it to make it again"
            )
        if cache["files"].tolist() != files:
            raise ValueError(
                f"{path} holds features of {len(cache['files'])} photos, which must be the"
                f" {len(files)} in {cub}: delete it to make it again"
            )
        return cache
    net = resnet(weights) if features is None else None
    download_photos(cub)
    train, test = list_photos(cub, "train"), list_photos(cub, "test")
    read_captions(cub, "train", train)  # ten per photo? Better known before hours of extraction
    read_captions(cub, "test", test)
    if features is None:
        cache = extract(cub, path, train + test, len(train), net, weights, normalise, device)
    else:
        cache = {
            "weights": weights,
            "normalise": normalise,
            "files": np.array(train + test),
            "train": len(train),
            "readable": np.ones(len(train + test), bool),
            "x": own_features(features, train + test, len(train)),
        }
    data.save_npz(path, **cache)
    path.with_name("features.partial.npz").unlink(missing_ok=True)
    return cache


def cub_photos(root):
    """The paths of the photos, one for each row of a split's features.
    -> {"train": [...], "test": [...]}"""
    cub = Path(root) / "cub"
    cache = read_features(data.prepared(root, "cub", "features.npz"))
    n, paths = int(cache["train"]), [cub / file for file in cache["files"][cache["readable"]]]
    cut = cache["readable"][:n].sum()
    return {"train": paths[:cut], "test": paths[cut:]}


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
        row = [index.get(word, EXC) for word in tokens[: WORDS - 1]] + [EOS]
        rows.append(row + [PAD] * (WORDS - len(row)))
    return torch.tensor(rows).view(-1, WORDS)


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


# ----------------------------------------------- features: ResNet-101 without its last layer, 2,048


def resnet(weights):
    """ResNet-101 without its last layer, in eval mode. weights: a name of torchvision's, or none:
    random ones with seed 0."""
    choices = models.ResNet101_Weights
    names = [choice.name for choice in choices]
    if weights == "none":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            net = models.resnet101()
    elif weights not in names:
        raise ValueError(f"--weights must be none or {' or '.join(names)}, not {weights!r}")
    else:
        try:
            net = models.resnet101(weights=choices[weights])
        except Exception as error:  # no network, or a truncated file
            raise ValueError(
                f"{choices[weights].url} cannot be downloaded: {error}. Put it into"
                f" {Path(torch.hub.get_dir()) / 'checkpoints'} by hand, or use --weights none for"
                " features of a randomly initialised network"
            ) from None
    net.fc = torch.nn.Identity()
    return net.eval()


def estimate_batchnorm(net, images, device):
    """Fix the BatchNorm statistics of a random network at those of `images`, batches
    (B, 3, 224, 224).

    With the initial statistics, the features of all photos are nearly the same (cosine .9997).
    """
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None  # the plain average over the batches
    net.train()
    for x in images:
        net(x.to(device))
    net.eval()


def extract(cub, path, files, train, net, weights, normalise, device=None, batch_size=32, every=30):
    """Features of `files`, of which the first `train` are the training photos.

    Progress is saved beside `path`, in features.partial.npz, every `every` seconds, and resumed
    from there. -> what read_features returns
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    steps = [transforms.Resize(224), transforms.CenterCrop(224), transforms.ToTensor()]
    if normalise:
        steps.append(transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    transform, partial = transforms.Compose(steps), path.with_name("features.partial.npz")
    cache = {"weights": weights, "normalise": normalise, "files": np.array(files), "train": train}
    x, readable = resume(partial, cache)
    first, saved = len(readable), time.monotonic()
    net.to(device)
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool, torch.inference_mode():

        def read(names):
            """-> photos that can be read, and for each name whether it can"""
            photos = list(pool.map(lambda name: read_photo(cub / name, transform), names))
            return [p for p in photos if p is not None], [p is not None for p in photos]

        if weights == "none":
            sample = np.random.default_rng(0).permutation(train)[:256]
            groups = [[files[i] for i in sample[k : k + 32]] for k in range(0, len(sample), 32)]
            photos = (read(group)[0] for group in groups)
            estimate_batchnorm(net, (torch.stack(batch) for batch in photos if batch), device)
        for k in range(first, len(files), batch_size):
            photos, ok = read(files[k : k + batch_size])
            if photos:
                x.append(net(torch.stack(photos).to(device)).float().cpu().numpy())
            readable += ok
            if k // batch_size % 10 == 0:
                print(f"features of photos: {len(readable)} of {len(files)}", file=sys.stderr)
            if time.monotonic() - saved > every:
                data.save_npz(partial, **cache, x=np.concatenate(x), readable=np.array(readable))
                saved = time.monotonic()
    for part, ok in (("training", readable[:train]), ("test", readable[train:])):
        if not any(ok):
            raise ValueError(f"none of the {len(ok)} {part} photos in {cub} can be read")
    return {**cache, "x": np.concatenate(x), "readable": np.array(readable)}


def read_photo(path, transform):
    """-> (3, 224, 224), or None if it cannot be read: the photo is then skipped with its captions.

    `readable` marks it, `python data.py cub` prints its name, the data set's note the count.
    """
    try:
        with Image.open(path) as image:
            photo = image.convert("RGB")
    except Exception:  # Pillow raises many kinds for damaged files
        return None
    return transform(photo)


def resume(partial, cache):
    """The features and `readable` of an interrupted run with the same settings and photos, if any.
    -> list of arrays, list of booleans"""
    try:
        before = read_features(partial)
    except ValueError:  # not there, or damaged
        before = {}
    if any(not np.array_equal(before.get(key), cache[key]) for key in cache):
        return [np.empty((0, 2048), np.float32)], []
    return [before["x"]], before["readable"].tolist()


def read_features(path):
    """The arrays of features.npz: weights (its source), normalise, files (N,), train (the first so
    many files are training photos), readable (N,) booleans, x (readable photos, D) float32."""
    cache = data.read_npz(path, ("weights", "normalise", "files", "train", "readable", "x"))
    if cache["x"].ndim != 2 or len(cache["x"]) != cache["readable"].sum():
        raise ValueError(f"{path} must have a row of x for each readable photo: delete it")
    return cache


def own_features(path, files, train):
    """A user's features of the photos `files`, standardised with the first `train` of them.

    The .npz holds x (photos, D) in the order of `files`; or in any order with the photos' names in
    its array `files`, of which class folder and file name are compared. -> float32 (len(files), D)
    """
    arrays = data.read_npz(path, ("x",))
    x, names = arrays["x"], arrays.get("files")
    if x.ndim != 2 or x.dtype.kind not in "fiu":
        raise ValueError(f"{path}: x must be numeric (photos, features), not {x.dtype} {x.shape}")
    if names is not None:
        if names.dtype.kind != "U" or names.shape != x.shape[:1]:
            raise ValueError(f"{path}: files must hold a name for each of the {len(x)} rows of x")
        rows = {Path(name).parts[-2:]: row for row, name in enumerate(names.tolist())}
        missing = [file for file in files if Path(file).parts[-2:] not in rows]
        if missing:
            raise ValueError(
                f"{path} has no features of {len(missing)} of the {len(files)} photos, such as"
                f" {missing[0]}"
            )
        x = x[[rows[Path(file).parts[-2:]] for file in files]]
    elif len(x) != len(files):
        raise ValueError(
            f"{path} must have features of the {len(files)} photos, not of {len(x)}, or their names"
            " in an array files"
        )
    x = x.astype(np.float64)
    if not np.isfinite(x).all():
        raise ValueError(f"{path}: x must be finite")
    return data.standardise(x, data.feature_stats(x[:train])).astype(np.float32)


# ---------------------------------------------------------------------------------- word vectors


def caption_text(tokens, words):
    """Word indices (32,) -> the words up to <eos>, joined by spaces."""
    tokens = np.asarray(tokens).tolist()
    end = tokens.index(EOS) if EOS in tokens else len(tokens)
    return " ".join(words[t] for t in tokens[:end])


def character_ngrams(words, shortest=3, longest=6):
    """FastText's subword units: each <word> and its character n-grams, numbered in order of first
    appearance; special tokens have none. -> 0/1 matrix (V, G), sparse CSR, and its transpose"""
    index, rows, columns = {}, [], []
    for row, word in enumerate(words):
        if word in SPECIALS:
            continue
        text = f"<{word}>"
        spans = ((n, a) for n in range(shortest, longest + 1) for a in range(len(text) - n + 1))
        for gram in (text, *sorted({text[a : a + n] for n, a in spans} - {text})):
            rows.append(row)
            columns.append(index.setdefault(gram, len(index)))
    where = torch.tensor([rows, columns])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # "sparse CSR is in beta"
        units = torch.sparse_coo_tensor(where, torch.ones(len(rows)), (len(words), len(index)))
        return units.coalesce().to_sparse_csr(), units.t().coalesce().to_sparse_csr()


def skipgram_counts(captions, n_words, window=3, sample=1e-3, draws=10, seed=0):
    """Expected number of times per epoch that word j is in the window of word i, as in word2vec:
    frequent words are dropped at random first, and a neighbour at distance d is in the window,
    whose size is random, with probability 1 - (d - 1) / window. Special tokens do not count.

    captions: int64 (N, 32) -> pairs (V, V), word frequencies (V,), both float64
    """
    generator = torch.Generator().manual_seed(seed)
    captions = torch.as_tensor(captions).cpu()
    sentence, position = (captions >= len(SPECIALS)).nonzero(as_tuple=True)
    word = captions[sentence, position]
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
    """FastText [Bojanowski et al. 2017]: a word's vector is the mean over its subword units'.

    Skip-gram with negative sampling. The vocabulary is small, so that each gradient step uses the
    expectation over pairs and negatives instead of a sample. It maximises

        Σ_ij n_ij log σ(h_i·o_j) + m_ij log σ(-h_i·o_j),    m_ij = negative (Σ_k n_ik) p_j

    n_ij: expected number of pairs; p_j ∝ frequency^.75; h_i: word vectors; o_j: context vectors.
    captions (N, 32) -> float32 (V, dim), zeros for special tokens
    """
    units, transposed = (m.to(device) for m in character_ngrams(words))
    share = 1 / units.sum(1, keepdim=True).to_dense().clamp(min=1)  # (V, 1)
    pairs, frequency = skipgram_counts(captions, len(words), window, draws=epochs, seed=seed)
    noise = frequency**0.75 / (frequency**0.75).sum()
    n = pairs.float().to(device)  # (V, V)
    m = (negative * pairs.sum(1, keepdim=True) * noise).float().to(device)
    steps = max(1, math.ceil(float(pairs.sum()) / 4000))  # per epoch: 4,000 pairs each
    # The summed gradient of a very frequent word overshoots: its step is limited to that of 4 / lr
    # pairs.
    most_h = 4 / (n + m).sum(1, keepdim=True).clamp(min=1e-9)
    most_o = 4 / (n + m).sum(0).unsqueeze(1).clamp(min=1e-9)
    generator = torch.Generator().manual_seed(seed)
    start = torch.rand(units.shape[1], dim, generator=generator)
    e = ((2 * start - 1) / dim).to(device)  # (G, D) vectors of the units
    o = torch.zeros(len(words), dim, device=device)  # (V, D) context vectors
    for step in range(epochs * steps):
        rate = lr * (1 - step / (epochs * steps)) / steps
        h = share * (units @ e)  # (V, D)
        p = torch.sigmoid(h @ o.t())
        residual = n * (1 - p) - m * p  # (V, V)
        grad_h, grad_o = residual @ o, residual.t() @ h
        # as in FastText, each unit takes the whole step of its word
        e += transposed @ (grad_h * most_h.clamp(max=rate))
        o += grad_o * most_o.clamp(max=rate)
    return (share * (units @ e)).cpu().numpy()


def cached_word_vectors(root, captions, words, device="cpu"):
    """word_vectors of the training captions, cached in cub/words.npz with a digest of them."""
    captions = captions.cpu().numpy()
    digest = hashlib.sha256(captions.tobytes() + "\n".join(words).encode()).hexdigest()
    path = data.prepared(root, "cub", "words.npz")
    try:
        cache = data.read_npz(path, ("digest", "vectors"))
        if str(cache["digest"]) == digest:
            return cache["vectors"]
    except ValueError:  # not there, or damaged
        pass
    print("training word vectors ...", file=sys.stderr)
    vectors = word_vectors(captions, words, device=device)
    data.save_npz(path, vectors=vectors, digest=digest)
    return vectors


def sentence_vectors(tokens, words, vectors):
    """The mean of the vectors of a caption's words up to <eos>, without special tokens; 0 if there
    is no word. tokens (N, 32), vectors (V, D) -> float32 (N, D)"""
    tokens = np.asarray(tokens)
    special = np.array([word in SPECIALS for word in words])
    counted = ~special[tokens] & ((tokens == EOS).cumsum(1) == 0)
    total = np.zeros((len(tokens), vectors.shape[1]), np.float32)  # (N, D)
    for column, use in zip(tokens.T, counted.T):
        total += vectors[column] * use[:, None]
    return total / np.maximum(counted.sum(1, keepdims=True), 1)


# ------------------------------------------------------------- generated pairs: metric and figure


@torch.no_grad()
def cross_generate(model, split, batch_size=256):
    """Each modality of the test pairs generated from the other: one posterior sample z per input,
    the decoded mean of features, the most likely word at each position of captions.

    -> features from captions (N, 2048), captions from images int64 (N, 32)
    """
    device = next(model.parameters()).device
    split, features, captions = split.to(device), [], []
    for index in torch.arange(len(split), device=device).split(batch_size):
        image, caption = split[index]
        captions.append(model.decode(model.posterior(image, None).sample())[1].argmax(-1).cpu())
        features.append(model.decode(model.posterior(None, caption).sample())[0].cpu())
    return torch.cat(features).numpy(), torch.cat(captions).numpy()


@torch.no_grad()
def joint_generate(model, z, batch_size=250):
    """Pairs generated from z (n, L). -> features (n, 2048), captions int64 (n, 32)"""
    features, captions = [], []
    for part in z.split(batch_size):
        image, caption = model.decode(part)
        features.append(image.cpu())
        captions.append(caption.argmax(-1).cpu())
    return torch.cat(features).numpy(), torch.cat(captions).numpy()


def correlated(model, dataset, root="./data", samples=1000, batch_size=256):
    """[meme] Table 5: pairs of photo features x (n, 2048) and sentence vectors y (n, D).

    -> (x, y) of the training pairs, for the fit of the CCA, and {name: (x, y)}, whose correlations
    are measured: "image->caption" and "caption->image", where one is generated from the other;
    "joint" and "aggregate", both generated from the prior or the aggregate posterior; "truth", the
    test pairs.
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
    pairs = {
        "image->caption": (image, captions),
        "caption->image": (features, caption),
        "joint": joint_generate(model, model.prior().sample((samples,))),
        "aggregate": joint_generate(model, npz.aggregate_samples(model, dataset.train, samples)),
        "truth": (image, caption),
    }
    fit = train_image, embed(train_caption)
    return fit, {name: (x, embed(tokens)) for name, (x, tokens) in pairs.items()}


def nearest_photos(features, photos):
    """The row of `photos` (P, 2048) with the smallest Euclidean distance to each of `features`
    (N, 2048). -> int64 (N,)"""
    features, photos = torch.as_tensor(features), torch.as_tensor(photos)
    rows = [torch.cdist(x, photos.to(x.device)).argmin(1) for x in features.split(1000)]
    return torch.cat(rows).cpu().numpy()


@torch.no_grad()
def draw(run, dataset, root, path, n=6):
    """[meme] Fig. 4, [poe] Fig. 10: n test pairs with what is generated from their photos and from
    their captions. Generated features are drawn as the training photo with the nearest features."""
    device = next(run.model.parameters()).device
    files, test, words = cub_photos(root), dataset.test, dataset.words
    photos = torch.linspace(0, len(test.bases[0]) - 1, n).long()  # spread over the classes
    index = torch.tensor([int((test.rows[0].cpu() == row).nonzero()[0, 0]) for row in photos])
    image, caption = test.to(device)[index.to(device)]
    inputs = {
        "photo": ((image, None), [files["test"][row] for row in photos]),
        "caption": ((None, caption), [caption_text(t.cpu(), words) for t in caption]),
    }
    columns = []
    for name, (xs, contents) in inputs.items():
        features, tokens = run.model.decode(run.model.posterior(*xs).sample())
        nearest = nearest_photos(features, dataset.train.bases[0])
        columns += [
            (name, contents),
            (f"{name} → photo", [files["train"][row] for row in nearest]),
            (f"{name} → caption", [caption_text(t, words) for t in tokens.argmax(-1).cpu()]),
        ]
    drawing.sheet(columns, drawing.title(run), path)


PAPER = [  # data set, model, --unpaired, column, values at f = 1, 1/2, 1/4, 1/8, 1/16
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
