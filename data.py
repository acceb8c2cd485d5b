"""Data sets, pairing masks and batches. `python data.py mnist-svhn` prepares a data set and draws a
preview.

    dataset = load("mnist-svhn", "./data")         # .train, .test: splits; .spec: arguments for nets.modalities
    streams = pairing(len(dataset.train), dataset.names, paired=0.5, unpaired="split")
    for step in batches(dataset.train, streams, batch_size=128):
        for weight, xs in step: ...                # xs: one tensor per modality, None where it is hidden

What is random, and in what: glyphs and the MNIST-SVHN pairs are fixed (whatever --seed
says); which examples are paired depends on `pairing`'s seed alone; the order of the batches on
their generator. Images are float32 in [0, 1], captions int64 word indices, spectra and bits float32
in [0, 1]. Of a user's arrays, features are float32 of mean 0 and deviation 1, counts float32,
classes int64.
"""

import argparse
import contextlib
import csv
import difflib
import hashlib
import importlib
import io
import json
import lzma
import math
import os
import re
import shlex
import shutil
import sys
import tarfile
import tempfile
import time
import traceback
import urllib.request
import zipfile
import zlib
from http.client import HTTPException
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
BEFORE = {"standardise": False, "clip": None}  # what a run is without that is older than a flag
UNPAIRED = ("split", "all", "rest", "none")  # or a modality's name
SAMPLING = ("natural", "balanced")


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
    groups: torch.Tensor | None = None  # (N,) integers: training examples that are paired together
    words: list | None = None  # the vocabulary of captions
    note: str = ""  # what a reader of results must know, printed beside them


def load(name, root="./data", limit=None, likelihoods=None, constants=None):
    """A data set by name, or a user's path.npz. ValueError, in a sentence, for whatever is wrong
    with the files.

    limit: the first N training examples only. Of an .npz alone: likelihoods: one per modality,
    instead of those that its arrays suggest; constants: what its features are standardised with, as
    spec["standardise"] has it, {} for not at all, None for those of the training examples. A run's
    data as it saw them: likelihoods=spec["likelihoods"], constants=spec.get("standardise", {}).
    """
    if str(name).endswith(".npz"):
        dataset = load_npz(Path(name), limit, likelihoods, constants)
    elif name in DATASETS:
        dataset = benchmark(name).load(name, Path(root))
    else:
        choices = f"choose {', '.join(DATASETS)} or a path.npz"
        raise ValueError(f"there is no data set {name!r}: {nearest(name, DATASETS, choices)}")
    dataset = dataset._replace(spec=json.loads(json.dumps(dataset.spec)))  # as args.json has it
    if limit is None:
        return dataset
    mask, groups = (x if x is None else x[:limit] for x in (dataset.mask, dataset.groups))
    return dataset._replace(train=dataset.train.first(limit), mask=mask, groups=groups)


def nearest(word, known, otherwise):
    """What an error says after a word that is none of those known: the likest, if one is like."""
    found = difflib.get_close_matches(str(word), [str(one) for one in known], 1)
    return f"did you mean {found[0]!r}?" if found else otherwise


def standardise(x, constants):
    """Features with the training examples' mean 0 and deviation 1, each. x: numpy or torch,
    (..., *shape); constants {"mean": [...], "std": [...]}, of the flattened features, or None: x as
    it is."""
    if constants is None:
        return x
    mean, std = (shaped(constants[key], x) for key in ("mean", "std"))
    return (x - mean) / std


def unstandardise(x, constants):
    """The inverse of standardise: features in the units of the data."""
    if constants is None:
        return x
    mean, std = (shaped(constants[key], x) for key in ("mean", "std"))
    return x * std + mean


def shaped(values, x):
    """One number per feature, of x's kind and of the shape of its last axes, as many as hold them."""
    axes = next(
        (k for k in range(x.ndim + 1) if math.prod(x.shape[x.ndim - k :]) == len(values)), 0
    )
    shape = x.shape[x.ndim - axes :]
    if isinstance(x, torch.Tensor):
        return torch.tensor(values, dtype=x.dtype, device=x.device).view(shape)
    return np.asarray(values, x.dtype).reshape(shape)


def benchmark(name):
    """The module of a data set in benchmarks/, whose __init__.py says what may stand in it; None
    for a user's own arrays."""
    if name not in DATASETS:
        return None
    try:
        return importlib.import_module(f"benchmarks.{DATASETS[name]}")
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("benchmarks"):
            raise
        raise ValueError(
            f"{name} is read by benchmarks/{DATASETS[name]}.py, which is not beside data.py: "
            "copy the folder, or train on a path.npz"
        ) from None


# ------------------------------------------------------------------------------ pairing and batches


def pairing(n, names, paired=1.0, unpaired="split", seed=0, mask=None, groups=None):
    """Who shows what in training: a list of streams (shown, index), a pure function of its
    arguments.

    shown: M booleans, index: the examples (LongTensor). round(paired * n) random examples are shown
    whole; the rest as `unpaired` says: split (one modality each, equal shares: [meme] SPLIT), a
    modality's name (only that one), all (one stream per modality over all n, as [poe]'s code), rest
    (the same over the rest, as its text), none. With `mask` (n, M), the streams are its patterns.
    With `groups` (n,), groups are drawn in place of examples, and none is cut in two: the counts are
    the nearest that this allows. ValueError for what cannot be done.
    """
    if mask is not None:
        return patterns(mask)
    if not 0 < paired <= 1:
        raise ValueError(f"--paired is the fraction of whole examples, in (0, 1], not {paired:g}")
    if unpaired not in (*UNPAIRED, *names):
        raise ValueError(
            f"--unpaired is split, all, rest, none or one of {', '.join(names)}, not {unpaired!r}"
        )
    order, ends = shuffled(n, seed, groups)
    count = nearest_end(ends, round(paired * n))
    if count == 0:
        raise ValueError(f"--paired {paired:g} of {n} examples leaves none paired: raise it")
    whole, rest = order[:count], order[count:]
    alone = [tuple(a == b for b in names) for a in names]
    streams = [((True,) * len(names), whole)]
    if unpaired == "split":
        equal = torch.tensor([len(part) for part in rest.tensor_split(len(names))]).cumsum(0)
        cuts = [nearest_end(ends, count + k) - count for k in equal[:-1].tolist()]
        streams += zip(alone, rest.tensor_split(cuts))
    elif unpaired == "all":
        streams += [(shown, torch.arange(n)) for shown in alone]
    elif unpaired == "rest":
        streams += [(shown, rest) for shown in alone]
    elif unpaired != "none":
        streams += [(alone[list(names).index(unpaired)], rest)]
    return [(shown, index) for shown, index in streams if len(index)]


def shuffled(n, seed, groups=None):
    """Examples in random order, those of a group together. -> order (n,), and where a group ends
    in it, None where every example is one"""
    chance = torch.Generator().manual_seed(seed)
    if groups is None:
        return torch.randperm(n, generator=chance), None
    _, group, sizes = groups.cpu().unique(return_inverse=True, return_counts=True)
    drawn = torch.randperm(len(sizes), generator=chance)
    ends = torch.cat([torch.zeros(1, dtype=torch.long), sizes[drawn].cumsum(0)])
    return drawn.argsort()[group].argsort(stable=True), ends


def nearest_end(ends, at):
    return at if ends is None else int(ends[(ends - at).abs().argmin()])


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


# ------------------------------------------------- flags, numbers and files, safely; what is said

TERMS = """\
What the examples show that --paired leaves over (--unpaired):
  split        one modality each, an equal share for each
  NAME         always the modality NAME, as svhn
  rest         every modality, but apart: the pairs are broken up
  all          the same, and the paired examples once more in this way
  none         nothing, they are left out

What a step has of the paired examples and of those that show one modality alone (--sampling):
  natural      shares of a batch as large as their shares of the data
  balanced     a batch of each, small ones repeated

How the values of a modality are distributed given z, p(x|z) (--likelihoods):
  bernoulli    values in [0, 1]: images, bits, mass spectra have it by default
  laplace      any numbers, absolute errors: features have it
  normal       any numbers, squared errors
  poisson      counts: your own whole numbers from 0 on have it
  categorical  one of several: words of captions and your own classes have it

Your own data (--dataset path.npz) are arrays train_NAME and test_NAME for each modality, a row per
example: floats (n, features), whole numbers (n, features) for counts, (n,) for classes, images
(n, height, width) or (n, channels, height, width), bytes or floats in [0, 1]. train_labels and
test_labels (n,) are for the evaluation; train_mask (n, modalities) is true where an example shows a
modality, in place of --paired. Each feature of floats is scaled to mean 0 and deviation 1, unless
--no-standardise is given.

The defaults above are those of glyphs, or of the --dataset that stands beside --help.
"""


class Parser(argparse.ArgumentParser):
    """Flags that are not shortened; a help that shows the defaults there are; errors that ask what
    was meant."""

    def __init__(self, description, usage=None, epilog=None):
        usage = usage and f"%(prog)s {usage}"
        more = dict(description=description, usage=usage, epilog=epilog)
        super().__init__(**more, formatter_class=Help, allow_abbrev=False)

    def error(self, message):
        flag = re.search(r"unrecognized arguments: (--[\w-]+)", message)
        value = re.search(r"(?:invalid choice: |not )'([^']+)'", message)
        word, known = "", ()
        if flag:
            word, known = flag[1], self._option_string_actions
        elif value and "did you mean" not in message:  # the message says what there is
            word = value[1]
            known = set(re.findall(r"[\w.-]+", message.replace(f"'{word}'", "")))
        found = nearest(word, known, "")
        super().error(f"{message}: {found}" if found else message)


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Leaves out defaults that say nothing, and the epilog's lines as they are."""

    def __init__(self, prog):
        super().__init__(prog, max_help_position=32)

    def _get_help_string(self, action):
        if action.default is None or action.default is False:
            return action.help.replace(" (default: %(default)s)", "")
        return super()._get_help_string(action)


@contextlib.contextmanager
def ending(p, run, args, state):
    """Around the whole of a run: what stops it is said in a sentence, with how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        kept = os.path.exists(run / "args.json")
        how = "add --resume to go on" if kept else "nothing is kept"
        p.exit(130, f"\n{run}: stopped in epoch {state['epoch'] + 1}: {how}\n")
    except FloatingPointError as error:
        where = f"{run}: epoch {state['epoch'] + 1}"
        how = f"--out {run} --resume and a lower --lr, or a --clip"
        p.exit(2, f"\n{where}: {error}; go on with {how}\n")
    except OSError as error:
        how = "; go on with --resume" if os.path.exists(run / "args.json") else ""
        p.exit(2, f"\n{run} cannot be written ({error}){how}\n")
    except RuntimeError as error:
        if "allocate" in str(error):  # a CPU without memory raises no class of its own
            p.exit(2, f"\n{run}: not enough memory: a smaller --batch-size, another --out\n")
        if args.compile:
            p.exit(2, f"\n{run}: {one_line(error)}; go on with --resume --no-compile\n")
        raise


def sentence(error):
    """What an error says that a user may have caused; and where, if no line raised it with a
    sentence of its own: then it may be the code that is wrong."""
    frames = traceback.extract_tb(error.__traceback__)
    if isinstance(error, OSError) or frames[-1].line.startswith("raise"):
        return str(error)
    ours = [f for f in frames if Path(f.filename).parent == Path(__file__).parent] or frames
    where = f"{Path(ours[-1].filename).name}, line {ours[-1].lineno}, in {ours[-1].name}"
    return f"{one_line(error)} ({type(error).__name__} from {where})"


def absolute(flags):
    """A run's flags (a dict) with the paths as they hold from any folder."""
    paths = [key for key in ("data", "out") if flags.get(key)]
    paths += ["dataset"] if str(flags["dataset"]).endswith(".npz") else []
    return flags | {key: os.path.abspath(flags[key]) for key in paths}


def masked(path):
    """Whether a user's .npz has a train_mask."""
    try:
        with zipfile.ZipFile(path) as archive:
            return "train_mask.npy" in archive.namelist()
    except (OSError, ValueError, zipfile.BadZipFile):
        return False  # it is the name of a data set, or load will say what is wrong with it


def refuse_changes(run, saved, record, free):
    """ValueError where args.json of a run to resume, if any, says otherwise than what is asked
    for."""
    for key, new in record.items() if saved else ():
        old = saved.get(key, new)
        if key not in free and old != new:
            raise ValueError(
                f"{run} has {key} {one_line(old)}, which --resume cannot make {one_line(new)}"
            )


def command(program, run):
    """The line that calls a program beside this file on a run, from where the user stands."""
    path = Path(__file__).with_name(program)
    if not path.exists():
        return f"run: {run}"
    near = os.path.relpath(path)
    return shlex.join(["python", near if len(near) <= len(str(path)) else str(path), str(run)])


def at_least(low):
    """An argparse type: an integer from `low` on."""

    def integer(text):
        if not low <= int(text) < 2**31:
            raise argparse.ArgumentTypeError(f"{text} is not an integer from {low} on")
        return int(text)

    return integer


def positive(text):
    """An argparse type: a finite number above 0."""
    if not 0 < float(text) < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a finite number above 0")
    return float(text)


def norm(text):
    """An argparse type: a finite number above 0, or 0, which stands for any."""
    return positive(text) if float(text) else 0.0


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


def write_checkpoint(path, state):
    """By way of memory: torch.save makes something else of the OSError of a disk that is full."""
    whole = io.BytesIO()
    torch.save(state, whole)
    replace(path, lambda file: file.write(whole.getbuffer()))


def read_run(run):
    """args.json and checkpoint.pt of a run folder, which may have been stopped before it had the
    second. -> args, state. ValueError, in a sentence, when there is nothing to go on from."""
    try:
        args, state = json.loads((run / "args.json").read_text()), {"epoch": 0, "log": []}
        if not isinstance(args, dict) or not isinstance(args.get("spec"), dict):
            raise ValueError("args.json is not from a run")
        if (run / "checkpoint.pt").exists():
            state = read_checkpoint(run / "checkpoint.pt")
            if set(state) != {"model", "optimizer", "epoch", "log"}:
                raise ValueError("checkpoint.pt is not from a run")
        return BEFORE | absolute(args), state
    except FileNotFoundError:
        others = [path.parent for path in run.parent.glob("*/args.json")]
        meant = nearest(run, others, "start without --resume")
        raise ValueError(f"{run} holds no run to resume (--out names another): {meant}") from None
    except Exception as error:  # cut short, never a run, or with code in it
        reason = str(error).split("\n")[0].split(". ")[0]
        why = f"{run} holds no run to resume ({type(error).__name__}: {reason})"
        raise ValueError(why) from None


def start_run(run, args):
    """Makes the folder of a run, clears what a kill may have left half written, writes args.json."""
    run.mkdir(parents=True, exist_ok=True)
    for part in run.glob(".*.part"):
        part.unlink()
    replace(run / "args.json", lambda file: file.write(json.dumps(args, indent=1).encode()))


def write_csv(path, rows):
    """rows: dictionaries with the same keys; without any, a table of no epochs."""
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, rows[0] if rows else ["epoch"])
    writer.writeheader()
    writer.writerows(rows)
    replace(path, lambda file: file.write(table.getvalue().encode()))


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
    """write(file) beside its place, then rename: after a kill there is the old file or the new."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
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


MOST_CLASSES = 2**16
KINDS = {  # of a user's arrays: how they are held, and the likelihood unless another is asked for
    "class": (np.int64, "categorical"),
    "bits": (np.bool_, "bernoulli"),
    "bytes": (np.uint8, "bernoulli"),
    "greys": (np.float32, "bernoulli"),
    "counts": (np.float32, "poisson"),
    "numbers": (np.float64, "laplace"),
}


def load_npz(path, limit=None, likelihoods=None, constants=None):
    """A user's arrays train_NAME, ..., test_NAME, ..., a modality each, in the archive's order;
    optionally train_labels, test_labels, train_mask (N, M): which arrays an example shows. limit,
    likelihoods, constants: as load has them."""
    arrays = read_npz(path)
    names = own_names(path, arrays)
    for part in ("train", "test"):
        refuse_rows(path, part, names, arrays)
    shape = len(arrays[f"train_{names[0]}"]), len(names)
    mask = arrays.get("train_mask", np.ones(shape, bool)).astype(bool)
    if mask.shape != shape:
        raise ValueError(f"{path}: train_mask is {mask.shape}, not (examples, modalities), {shape}")
    asked = [*(likelihoods or []), *[None] * len(names)]
    bases, kinds, shapes, classes, scaled = ([], []), [], {}, {}, {}
    for name, shown, likelihood in zip(names, mask.T, asked):
        if not shown[:limit].any():
            raise ValueError(f"{path}: no example to train with shows {name}")
        both, likelihood = own_array(path, name, arrays, shown, likelihood)
        shapes[name] = list(both[0].shape[1:])
        kinds.append(likelihood)
        if not shapes[name]:
            classes[name] = 1 + int(max(x.max() for x in both))
        elif likelihood in ("laplace", "normal") and both[0].ndim != 4:
            train = both[0][:limit][shown[:limit]]
            own = constants_of(train) if constants is None else constants.get(name)
            both = [standardise(x.astype(np.float64), own) if own else x for x in both]
            scaled |= {name: own} if own else {}
        for found, x in zip(bases, both):
            found.append(torch.from_numpy(x.astype(np.float32) if x.dtype.kind == "f" else x))
    labels = [arrays.get(f"{part}_labels") for part in ("train", "test")]
    labels = [None if x is None else torch.from_numpy(x.astype(np.int64)) for x in labels]
    spec = {"name": "npz", "shapes": shapes, "likelihoods": kinds}
    spec |= {"classes": classes} if classes else {}
    spec |= {"standardise": scaled} if scaled else {}
    masked = "train_mask" in arrays
    return Dataset(
        str(path),
        *(Split(found, labels=x) for found, x in zip(bases, labels)),
        spec,
        tuple(names),
        torch.from_numpy(mask) if masked else None,
        note=f"train_mask hides {1 - mask.mean():.0%} of the arrays" if masked else "",
    )


def own_names(path, arrays):
    """The names of the modalities, in the archive's order. ValueError where an array is none that
    load_npz takes, or lacks its counterpart in the other split."""
    named = {key: key.partition("_")[2] for key in arrays if re.match("(train|test)_", key)}
    names = [name for name in dict.fromkeys(named.values()) if name not in ("labels", "mask")]
    known = [f"{part}_{name}" for name in (*names, "labels") for part in ("train", "test")]
    known.append("train_mask")
    for key in arrays:
        if key not in known:
            takes = "it takes train_NAME, test_NAME, train_labels, test_labels, train_mask"
            raise ValueError(f"{path}: unknown array {key!r}: {nearest(key, known, takes)}")
    for key, name in named.items():
        other = f"{'test' if key[:5] == 'train' else 'train'}_{name}"
        if name in names and other not in arrays:
            others = [k for k in arrays if k[:5] == other[:5]]
            raise ValueError(
                f"{path} has {key!r} but no {other!r}: {nearest(other, others, 'add it')}"
            )
    for name in names:
        if not re.fullmatch(r"\w[\w .-]*", name) or name in UNPAIRED:
            raise ValueError(
                f"{path}: a modality cannot be called {name!r}: letters, digits, _ . - and spaces, "
                f"and none of {', '.join(UNPAIRED)}"
            )
    if len(names) < 2:
        raise ValueError(
            f"{path} has {len(names) or 'no'} array to train with: it is to have train_NAME and "
            "test_NAME of two modalities or more"
        )
    return names


def refuse_rows(path, part, names, arrays):
    """ValueError unless all arrays of a split are numbers with the same number of rows."""
    n = len(np.atleast_1d(arrays[f"{part}_{names[0]}"]))
    for key, array in arrays.items():
        if not key.startswith(f"{part}_"):
            continue
        if array.dtype.kind not in "buif" or not array.ndim or 0 in array.shape:
            raise ValueError(f"{path}: {key} is to be numbers, one row per example")
        if len(array) != n:
            raise ValueError(
                f"{path}: {key} {array.shape} does not have the {n:,} examples of {part}_{names[0]}"
            )
    labels = arrays.get(f"{part}_labels")
    if labels is not None and (labels.ndim != 1 or labels.dtype.kind not in "iu"):
        raise ValueError(f"{path}: {part}_labels is to hold one integer per example")


def own_array(path, name, arrays, shown, asked):
    """A modality's two arrays, as they are held but for standardisation, and its likelihood: the one
    asked for, or what the training examples that show it suggest.

    Integers (examples,) are a class: categorical. 0 and 1 alone are bits, bytes are greys:
    Bernoulli. Other integers from 0 on are counts: Poisson. Images, (examples, H, W) or (examples,
    C, H, W), are bits, bytes or floats in [0, 1]: Bernoulli. All else is numbers: Laplace.
    -> [train, test], likelihood
    """
    both, kind = [], None
    for part in ("train", "test"):
        array, where = arrays[f"{part}_{name}"], f"{path}: {part}_{name}"
        seen = shown if part == "train" else np.ones(len(array), bool)
        if array.ndim == 1 and array.dtype.kind == "f":
            raise ValueError(f"{where} is to be (examples, features), or a class: whole numbers")
        with np.errstate(over="ignore"):  # what float32 cannot hold is not finite
            if not np.isfinite(array[seen].astype(np.float32)).all():
                raise ValueError(f"{where} has values that are not finite")
        if not seen.all():  # what a mask hides may be anything
            array = np.where(seen.reshape(-1, *[1] * (array.ndim - 1)), array, array.dtype.type(0))
        array = array[:, None] if array.ndim == 3 else array  # grey images
        if array.ndim == 4 and min(array.shape[2:]) < 8:
            raise ValueError(
                f"{where} has images smaller than 8 x 8: (examples, C, H, W) is the order; or "
                "flatten them to (examples, features)"
            )
        kind = kind or kind_of(array[seen], asked)
        wrong = misfit(array, kind)
        if both and array.shape[1:] != both[0].shape[1:]:
            wrong = f"{array.shape} does not fit {both[0].shape}"
        if wrong:
            raise ValueError(f"{where} {wrong}" + (f", unlike train_{name}" if both else ""))
        both.append(array.astype(KINDS[kind][0]))
    return both, asked or KINDS[kind][1]


def kind_of(array, asked):
    """Which of KINDS the training examples of an array are."""
    if array.ndim == 1:
        return "class"
    if array.ndim != 4 and asked == "poisson":
        return "counts"
    if array.dtype != np.uint8 and array.ndim != 4 and asked in ("laplace", "normal"):
        return "numbers"
    if np.isin(array, (0, 1)).all():
        return "bits"
    if array.dtype == np.uint8:
        return "bytes"
    if array.ndim == 4:
        return "greys"
    return "counts" if array.dtype.kind in "iu" and array.min() >= 0 else "numbers"


def misfit(array, kind):
    """What is wrong with an array of a kind, or None."""
    if kind == "class" and (
        array.dtype.kind == "f" or not 0 <= array.min() <= array.max() < MOST_CLASSES
    ):
        return f"is to hold classes, whole numbers from 0 to {MOST_CLASSES - 1:,}"
    if kind == "bits" and not np.isin(array, (0, 1)).all():
        return "is not 0 and 1 alone"
    if kind == "bytes" and array.dtype != np.uint8:
        return "is not of bytes"
    if kind == "greys" and not 0 <= array.min() <= array.max() <= 1:
        return "has images that are neither bytes nor floats in [0, 1]"
    if kind == "counts" and (array.min() < 0 or (array != np.floor(array)).any()):
        return "is to hold counts, whole numbers from 0 on"
    return None


def constants_of(x):
    """Mean and deviation of each feature of x (N, ...), flattened; of a constant one 1, so that it
    becomes 0. Plain enough for JSON."""
    x = x.reshape(len(x), -1).astype(np.float64)
    std = np.where(np.ptp(x, 0) > 0, x.std(0), 1.0)
    return {"mean": x.mean(0).tolist(), "std": np.where(std > 0, std, 1.0).tolist()}


# ----------------------------------------------------------------------------------------- pictures


def drawable(x):
    """Whether x (N, ...) are images, grey or in colour."""
    return len(x.shape) == 4 and x.shape[1] in (1, 3)


def draw_rows(rows, path):
    """A PNG of rows of images in [0, 1], each (n, 1 or 3, H, W), tiles of 64 pixels or more. ->
    whether there is what it takes: torchvision, with Pillow"""
    try:
        from torchvision.utils import make_grid, save_image
    except (ImportError, RuntimeError):  # of one that was built for another torch
        return False
    rows = [x.float().cpu().clamp(0, 1).expand(-1, 3, -1, -1) for x in rows]
    height, width = (max(x.shape[d] for x in rows) for d in (2, 3))
    rows = [F.pad(x, (0, width - x.shape[3], 0, height - x.shape[2]), value=0.5) for x in rows]
    grid = make_grid(torch.cat(rows), nrow=len(rows[0]))
    times = math.ceil(64 / min(height, width))
    grid = grid.repeat_interleave(times, 1).repeat_interleave(times, 2)
    replace(Path(path), lambda file: save_image(grid, file, format="png"))
    return True


@torch.no_grad()
def picture(model, dataset, path, n=10, most=12):
    """A PNG of n test examples, one per label where there are n labels or fewer: of each modality, its
    images, and what is generated from one z of it alone, itself first; `most` rows. -> [a line that
    says so], or [] where no modality is an image"""
    test, device = dataset.test, next(model.parameters()).device
    shown = [m for m, base in enumerate(test.bases) if drawable(base)]
    index = torch.linspace(0, len(test) - 1, min(n, len(test))).long()
    if test.labels is not None:
        firsts = np.unique(test.labels.cpu(), return_index=True)[1]
        index = torch.from_numpy(firsts) if len(firsts) <= n else index
    xs = [x.to(device) for x in test[index.to(test.rows[0].device)]] if shown else []
    rows = {}
    model.eval()
    for m, name in enumerate(dataset.names if shown else ()):
        alone = [x if k == m else None for k, x in enumerate(xs)]
        means = model.decode(model.posterior(*alone).sample())
        rows |= {name: xs[m]} if m in shown else {}
        for k in sorted(shown, key=lambda k: k != m):
            rows[f"{name} -> {dataset.names[k]}"] = means[k]
    rows = dict(list(rows.items())[:most])
    if rows and draw_rows(list(rows.values()), path):
        return [f"{path} has rows of test examples: {', '.join(rows)}"]
    return []


# --------------------------------------------------------------------------- python data.py DATASET


def preview(dataset, path, n=10):
    """A PNG with n training examples, a row per modality that is an image. -> whether there is
    one"""
    xs = dataset.train[torch.arange(min(n, len(dataset.train)))]
    rows = [x for x in xs if drawable(x)]
    return bool(rows) and draw_rows(rows, path)


def main(argv=None):
    p = Parser("Prepare a data set, print its sizes and draw a preview.")
    p.add_argument("dataset", help=f"{', '.join(DATASETS)} or a path.npz")
    p.add_argument("--data", default="./data", help="folder of the data sets")
    alone = not Path(__file__).with_name("benchmarks").is_dir()
    modules = {} if alone else {file: benchmark(name) for name, file in DATASETS.items()}
    for file, module in modules.items():
        if hasattr(module, "flags"):
            module.flags(p.add_argument_group(file).add_argument)
    args = p.parse_args(argv)
    try:
        module = modules.get(DATASETS.get(args.dataset))
        if hasattr(module, "prepare"):
            module.prepare(args.data, args)
        dataset = load(args.dataset, args.data)
        path = f"preview-{Path(args.dataset).stem}.png"
        drawn = preview(dataset, path)
    except (ValueError, OSError) as error:
        p.exit(2, f"{p.prog}: error: {error}\n")
    except KeyboardInterrupt:
        p.exit(130, f"\n{p.prog}: stopped; what is finished is kept, start again to go on\n")
    for name, base in zip(dataset.names, dataset.train.bases):
        shape = " x ".join(map(str, base.shape[1:])) or f"one of {int(base.max()) + 1}"
        print(f"{name}: {shape} {str(base.dtype)[6:]}, {len(base):,} to train with")
    print(f"{len(dataset.train):,} examples to train, {len(dataset.test):,} to test")
    if dataset.note:
        print(f"note: {dataset.note}")
    if drawn:
        print(f"preview: {path}")


if __name__ == "__main__":
    main()
