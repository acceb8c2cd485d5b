"""Small data sets, runs and models that several files of tests need. The splits of each data set
have different statistics: a number of the wrong split is another number."""

import csv
import itertools
import os
import socket
import sys
import tarfile
import traceback
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.distributions import Independent, Normal

import data
import meme
import mmvae
import mvae
import nets
import svae
import vaevae

ROOT = Path(__file__).parent.parent
SCRIPTS = {script.__name__: script for script in (meme, svae, vaevae, mmvae, mvae)}
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the same bits everywhere; CUDA cannot be forked
torch.set_num_threads(1)  # the models are tiny


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


# ---------------------------------------------------------------------------------------- the loop


def train(script, *flags, **named):
    """Run a script's main. Flags: as typed, or by name: batch_size=8, resume=True."""
    for key, value in named.items():
        flags += (f"--{key.replace('_', '-')}", *(() if value is True else (value,)))
    SCRIPTS[script].main([str(flag) for flag in flags])


def refused(script, *flags, **named):
    """The script ends with exit code 2."""
    with pytest.raises(SystemExit) as stopped:
        train(script, *flags, **named)
    assert stopped.value.code == 2


def checkpoint(run):
    return torch.load(Path(run) / "checkpoint.pt", weights_only=True)


def weights(run):
    return checkpoint(run)["model"]


def same(a, b):
    """Equal weights, to the bit."""
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def log_of(run):
    """The rows of log.csv, as numbers."""
    with open(Path(run) / "log.csv", encoding="utf-8") as file:
        return [{key: float(x) for key, x in row.items()} for row in csv.DictReader(file)]


def content(run):
    """The parts of a run that must be the same to the bit: weights, optimizer, epoch and log."""
    state = checkpoint(run)
    log = [{key: x for key, x in row.items() if "second" not in key} for row in state["log"]]
    tensors = [moments.values() for moments in state["optimizer"]["state"].values()]
    tensors = state["model"] | dict(enumerate(itertools.chain(*tensors)))
    return tensors, state["epoch"], log


def error_of(capsys):
    """The only line on stderr beside argparse's usage."""
    lines = capsys.readouterr().err.strip().splitlines()
    lines = [line for line in lines if not line.startswith("usage:")]
    assert len(lines) == 1, lines
    return lines[0]


def forked(call, *args):
    """call(*args) in a new process. -> its id"""
    pid = os.fork()
    if not pid:
        code = 1
        try:
            torch.set_num_threads(1)  # a fork does not keep it
            call(*args)
            code = 0
        except SystemExit as end:
            code = end.code
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    return pid


def ended(*pids):
    """Wait for processes. -> their exit codes"""
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


# -------------------------------------------------------------------------------------- data sets


def user_arrays(sizes=(96, 32), noise=0.1, seed=0):
    """The arrays of a user's .npz: 5 floats and 4 bits that depend on one latent number, whose mean
    is 0 in training and 1 in the test split."""
    rng, contents = np.random.default_rng(seed), {}
    for part, n, mean in zip(("train", "test"), sizes, (0, 1)):
        z = mean + rng.normal(size=(n, 1))
        contents[f"{part}_0"] = (z + noise * rng.normal(size=(n, 5))).astype(np.float32)
        contents[f"{part}_1"] = z + noise * rng.normal(size=(n, 4)) > 0
    return contents


@pytest.fixture
def arrays(tmp_path):
    np.savez(tmp_path / "own.npz", **user_arrays())
    return tmp_path / "own.npz"


def every_pattern(n, count):
    """A mask (n, count) whose rows show the 2^count - 1 patterns in turn, those of least first: the
    rows that show all, any and one given modality are different ones."""
    patterns = [p for p in itertools.product((True, False), repeat=count) if any(p)]
    patterns.sort(key=sum)
    return np.resize(np.array(patterns), (n, count))


@pytest.fixture
def runs(tmp_path):
    """Short runs of mvae on a labelled .npz: two with all pairs, one with half of them."""
    rng, contents = np.random.default_rng(0), {}
    for part, shift in (("train", 0), ("test", 1)):
        labels = rng.integers(3, size=60)
        contents[f"{part}_labels"] = labels
        for m in range(2):
            noise = rng.standard_normal((60, 3 + 2 * m)).astype("f4")
            contents[f"{part}_{m}"] = noise + 3 * labels[:, None] + shift
    np.savez(tmp_path / "own.npz", **contents)
    flags = dict(dataset=tmp_path / "own.npz", latent_dim=4, epochs=2, lr=1e-6)
    folders = [tmp_path / f"run{k}" for k in range(3)]
    for run, seed, paired in zip(folders, (0, 1, 0), (1.0, 1.0, 0.5)):
        train("mvae", **flags, data=tmp_path, seed=seed, paired=paired, out=run)
    return folders


def tiny(n=10):
    """n examples of two modalities: k and 100 + k."""
    return data.Split([torch.arange(n).float()[:, None], 100 + torch.arange(n).float()[:, None]])


def images(name, n=2):
    """Random images of a data set's shapes."""
    return [torch.rand(n, *m.shape) for m in nets.modalities(name)]


def offline(*args, **kwargs):
    raise OSError("no network")


def save_arrays(path, *xs, test=None, **more):
    """An .npz of the arrays xs; test: those of the test split, by default the same. -> its path"""
    parts = {f"train_{k}": x for k, x in enumerate(xs)}
    parts |= {f"test_{k}": x for k, x in enumerate(test or xs)}
    np.savez(path, **parts, **more)
    return path


def write_idx(folder, stem, images, labels):
    """MNIST's two files."""
    folder.mkdir(parents=True, exist_ok=True)
    heads = [0x803, *images.shape], [0x801, len(labels)]
    for what, head, array in zip(("images-idx3", "labels-idx1"), heads, (images, labels)):
        content = np.array(head, ">i4").tobytes() + array.tobytes()
        (folder / f"{stem}-{what}-ubyte").write_bytes(content)


@pytest.fixture
def small_root(tmp_path):
    """A data folder with 60 + 20 digits of noise, as MNIST and SVHN are laid out; those of the test
    splits are paler."""
    rng, crops = np.random.default_rng(0), {}
    for stem, n, white in (("train", 60, 256), ("t10k", 20, 128)):
        labels = np.arange(n, dtype=np.uint8) % 10
        noise = rng.integers(0, white, (n, 28, 28), np.uint8)
        write_idx(tmp_path / "MNIST" / "raw", stem, noise, labels)
    for part, n, white in (("train", 45, 256), ("test", 30, 128)):
        crops[f"{part}_x"] = rng.integers(0, white, (n, 3, 32, 32), np.uint8)
        crops[f"{part}_y"] = np.arange(n) % 10
    np.savez(tmp_path / "svhn.npz", **crops)
    return tmp_path


def archive(path, folder):
    """A .tgz of a folder."""
    with tarfile.open(path, "w:gz") as tar:
        tar.add(folder, folder.name)


# -------------------------------------------------------------------------------------- networks


class PlainEncoder(nn.Module):
    """A user's own network, with BatchNorm and nothing of nets.py: x -> mu, logvar."""

    def __init__(self, latent_dim, size):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(size, 5), nn.BatchNorm1d(5), nn.Tanh())
        self.mu = nn.Linear(5, latent_dim)
        self.logvar = nn.Linear(5, latent_dim)

    def forward(self, x):
        h = self.body(x)
        return self.mu(h), self.logvar(h)


def plain_modality(name, size, likelihood, **more):
    encoder = partial(PlainEncoder, size=size)
    decoder = lambda latent_dim: nn.Sequential(  # noqa: E731
        nn.Linear(latent_dim, 5), nn.Tanh(), nn.Linear(5, size)
    )
    return nets.Modality(name, (size,), encoder, decoder, likelihood, **more)


# --------------------------------------------------------------------------------------------- CUB

CAPTIONS = ["this bird has a Red belly, and red-tipped wings.", "the bird's beak is small."]
SPECIES = [("train", "001.Albatross"), ("train", "002.Ani"), ("test", "003.Auklet")]


def photo(path, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 10, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((100, 80)).save(path)


def shi(root):
    """Three species with two photos each, Shi et al.'s layout."""
    cub = root / "cub"
    for split, name, k in [(split, name, k) for split, name in SPECIES for k in range(2)]:
        photo(cub / split / name / f"{k}.jpg", 10 * int(name[:3]) + k)
    (cub / "text_trainvalclasses.txt").write_text("\n".join(CAPTIONS * 20) + "\n")
    (cub / "text_testclasses.txt").write_text("\n".join(CAPTIONS * 10) + "\n")
    return cub


def originals(root):
    """The same in the layout of the original archives."""
    cub = root / "cub"
    for name, k in [(name, k) for _, name in SPECIES for k in range(2)]:
        photo(cub / "CUB_200_2011" / "images" / name / f"{k}.jpg", 10 * int(name[:3]) + k)
        text = cub / "text_c10" / name / f"{k}.txt"
        text.parent.mkdir(parents=True, exist_ok=True)
        text.write_text("\n".join(f"{name} {k} {line}" for line in CAPTIONS * 5) + "\n")
    (cub / "trainclasses.txt").write_text("001.Albatross\n")
    (cub / "valclasses.txt").write_text("002.Ani\r\n")
    (cub / "testclasses.txt").write_text("003.Auklet\n")
    return cub


def packed_originals(tmp_path):
    """The folders of the two original archives, as they unpack. -> the folder that holds both"""
    source = originals(tmp_path / "source")
    (source / "cvpr2016_cub").mkdir()
    for path in [source / "text_c10", *source.glob("*classes.txt")]:
        path.rename(source / "cvpr2016_cub" / path.name)
    return source


class Pooled(nn.Module):
    """Takes the place of ResNet-101: 2,048 features of a photo, with a BatchNorm."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.seen = 0

    def forward(self, x):
        self.seen += len(x)
        h = nn.functional.adaptive_avg_pool2d(self.norm(x), 26).flatten(1)
        return torch.cat([h, h[:, :20]], 1)


@pytest.fixture
def small_net(monkeypatch):
    monkeypatch.setattr("loaders.cub.resnet", lambda: Pooled().eval())


# ----------------------------------------------------------------------------------------- spectra

MOLECULES = {  # SMILES of small molecules with their real InChIKeys
    "CCO": "LFQSCWFLJHTTHZ-UHFFFAOYSA-N",
    "CC(=O)O": "QTBSBXVTEAMEQO-UHFFFAOYSA-N",
    "c1ccccc1": "UHOVQNZJYSORNB-UHFFFAOYSA-N",
    "CC(N)C(=O)O": "QNAYBMKLOCPYGJ-UHFFFAOYSA-N",
    "CN1C=NC2=C1C(=O)N(C(=O)N2C)C": "RYYVLZVUVIJVGH-UHFFFAOYSA-N",
    "CC(C)=O": "CSCPPACGZOOCGX-UHFFFAOYSA-N",
}
RECORD = """Name: made up
InChIKey: {key}
SMILES: {smiles}
Precursor_type: [M+H]+
Spectrum_type: MS2
Instrument_type: LC-ESI-QFT
Ion_mode: P
Num Peaks: {n}
{peaks}

"""


def record(smiles, peaks="57.07 100\n71.08 25", key=None, **changed):
    key = MOLECULES.get(smiles, "") if key is None else key
    text = RECORD.format(smiles=smiles, key=key, peaks=peaks, n=len(peaks.splitlines()))
    for field, value in changed.items():
        lines = text.splitlines(keepends=True)
        text = "".join(f"{field}: {value}\n" if x.startswith(f"{field}:") else x for x in lines)
    return text


def challenge_files(folder, ids=("A", "B"), candidate_ids=None, truth="CCO"):
    """Challenges of the true compound `truth`, each with three candidates, two of them
    stereoisomers."""
    files = {"mgf": folder / "c.mgf"}
    files |= {name: folder / f"{name}.csv" for name in ("candidates", "truth")}
    ions = "BEGIN IONS\nTITLE={}\nPEPMASS=47\n57.07 10\n1200 5\nEND IONS\n\n"
    files["mgf"].write_text("".join(map(ions.format, ids)))
    answers = "".join(f"{i},{MOLECULES[truth]}\n" for i in ids)
    files["truth"].write_text("id,inchikey\n" + answers)
    rows = [
        ("C[C@H](N)C(=O)O", "QNAYBMKLOCPYGJ-REOHCLBHSA-N"),
        (truth, MOLECULES[truth]),
        ("C[C@@H](N)C(=O)O", "QNAYBMKLOCPYGJ-UWTATZPHSA-N"),
        ("c1ccccc1", MOLECULES["c1ccccc1"]),
        ("C1CC(", "ZZZZZZZZZZZZZZ-UHFFFAOYSA-N"),
    ]
    lists = "".join(f"{i},{key},{s}\n" for i in candidate_ids or ids for s, key in rows)
    files["candidates"].write_text("id,inchikey,smiles\n" + lists)
    return files


# ----------------- a data set whose grey value is the label, its oracle, a model that knows both

SHAPES = [(1, 28, 28), (3, 32, 32)]
VIEWS = {"mnist-svhn": {"mnist": (0,), "svhn": (1,)}, "glyphs": {"grey": (0,), "colour": (1,)}}


def toy(name="mnist-svhn", n=600, seed=0):
    """n training examples, whose digits are equally frequent, and n // 2 for testing, whose small
    digits are more frequent."""
    shapes = [m.shape for m in nets.modalities(name)]

    def split(n, seed, draws):
        generator = torch.Generator().manual_seed(seed)
        labels = torch.randint(10, (draws, n), generator=generator).amin(0)
        digits = (25 * labels).byte()[:, None, None, None]
        return data.Split([digits.expand(-1, *s).clone() for s in shapes], labels=labels)

    return data.Dataset(
        name,
        train=split(n, seed, draws=1),
        test=split(n // 2, seed + 1, draws=2),
        spec={"name": name},
        names=tuple(m.name for m in nets.modalities(name)),
        views=VIEWS.get(name) or {"image": tuple(range(len(shapes)))},
    )


class Reader(nn.Module):
    """An oracle of toy images: mean grey / 25 * 255 is the digit. doubts: the digit on which its
    members disagree."""

    def __init__(self, doubts=None):
        super().__init__()
        self.doubts = doubts

    def forward(self, x):
        digit = (x.mean((1, 2, 3)) * 255 / 25).round().long()
        return digit, digit == (-1 if self.doubts is None else self.doubts)

    def information(self, x):
        return x.mean((1, 2, 3))


class Perfect(nn.Module):
    """z[0] is the label, exactly; `says` maps it to what modality m shows."""

    resamples = False

    def __init__(self, shapes, says=lambda m, digit: digit):
        super().__init__()
        self.shapes, self.says = shapes, says

    def posterior(self, *xs):
        x = next(x for x in xs if x is not None)
        digit = x.mean((1, 2, 3)) * 255 / 25
        mean = torch.stack([digit, torch.zeros_like(digit)], 1)
        return Independent(Normal(mean, torch.tensor([1e-3, 1.0]).expand_as(mean)), 1)

    def sample_posterior(self, xs, n=1):
        return self.posterior(*xs).sample((n,))

    def prior(self, *xs):
        digit = lambda shape: torch.randint(10, shape).float()  # noqa: E731
        return SimpleNamespace(sample=lambda s: torch.stack([digit(s), torch.randn(s)], -1))

    def trained_priors(self, masks):
        return tuple(str(m) for m in range(len(self.shapes)))

    def decode(self, z):
        grey = [self.says(m, z[..., 0].round()) * 25 / 255 for m in range(len(self.shapes))]
        return [x[..., None, None, None].expand(*x.shape, *s) for x, s in zip(grey, self.shapes)]


def pattern(xs):
    return tuple(x is not None for x in xs)


class Sampled(Perfect):
    """A sample of its posterior is the digit of the image, the mean is not. asked: the masks and
    sizes."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.asked = []

    def posterior(self, *xs):
        self.asked.append((pattern(xs), len(next(x for x in xs if x is not None))))
        z = super().posterior(*xs).mean
        return SimpleNamespace(sample=lambda shape: z.expand(*shape, *z.shape), mean=0 * z - 1)


READERS = {"mnist": Reader(), "svhn": Reader()}
