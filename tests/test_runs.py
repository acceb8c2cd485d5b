"""What runs survive: kills, failing writes, damaged files, any command line; and whether what the
pages show, commands and numbers, is true. `pytest -m slow` tries each some hundred times."""

import contextlib
import csv
import gzip
import importlib
import io
import json
import math
import os
import pickle
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import types
import zipfile
from collections import Counter
from pathlib import Path

import helpers
import numpy as np
import pytest
import torch
from helpers import ROOT, SCRIPTS, archive, checkpoint, ended, forked, free_port, refused, same
from helpers import save_arrays, shi, train, weights
from PIL import Image
from torchvision import transforms

import data
import eval as evaluation
import mvae
import nets
from benchmarks import cub, digits, spectra

slow = pytest.mark.slow
FILES = ["args.json", "checkpoint.pt", "log.csv"]


def many(few, often):
    return pytest.mark.parametrize("count", [few, pytest.param(often, marks=slow)])


def listing(folder):
    return sorted(path.name for path in folder.iterdir())


def finite(run, line):
    """The numbers of a line of log.csv, which have to be finite."""
    values = [float(value) for value in (run / "log.csv").read_text().splitlines()[line].split(",")]
    assert all(map(math.isfinite, values))
    return values


# ---------------------------------------------------------------------------------- killed, stopped


def die_inside(moment, call):
    """In the call-th write of a file: in the middle of it, or around its renaming."""
    sync, replace, count = os.fsync, os.replace, [0]

    def here(now):
        return (now, count[0]) == (moment, call)

    def torn(file):
        count[0] += 1
        if here("middle"):
            os.ftruncate(file, os.fstat(file).st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        sync(file)

    def renamed(a, b):
        if not here("before"):
            replace(a, b)
        if here("before") or here("after"):
            os.kill(os.getpid(), signal.SIGKILL)

    os.fsync, os.replace = torn, renamed


def one_rank(rank, world, port, point, script, run, *flags):
    sys.stdout, sys.stderr = open(os.devnull, "w"), open(f"{run}.err", "a")
    if world > 1:
        os.environ |= dict(RANK=str(rank), WORLD_SIZE=str(world))
        os.environ |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    if rank == 0 and point:
        die_inside(*point)
    train(script, *flags, out=run)


def content(run):
    saved = checkpoint(run)
    log = [[v for k, v in row.items() if "second" not in k] for row in saved["log"]]
    tensors = [*saved["model"].values()]
    tensors += [t for state in saved["optimizer"]["state"].values() for t in state.values()]
    return dict(enumerate(tensors)), [saved["epoch"], log]


def killed_and_resumed(script, arrays, how, kills, world=1):
    """`kills` runs, killed and resumed, that have to end with the bits of one that was not.
    -> killed before their end, exit codes, all that was said"""
    import torch._dynamo  # Adam does: once, before the forks

    flags = f"--dataset {arrays} --paired 0.5 --batch-size 8 --epochs 4".split()
    out, rng, killed, codes, said = arrays.parent, random.Random(kills + world), 0, [], ""

    def start(run, *more, point=None):
        of = world, free_port(), point, script, run, *flags, *more
        return [forked(one_rank, rank, *of) for rank in range(world)]

    began = time.time()
    assert ended(*start(out / "whole")) == [0] * world
    (whole, log), seconds = content(out / "whole"), time.time() - began
    for k in range(kills):
        run, found = out / str(k), []
        point = (["middle", "before", "after"][k % 3], 1 + k // 3 % 9) if how == "inside" else None
        ranks = start(run, point=point)
        if point:
            found += ended(ranks[0])
        else:
            time.sleep(rng.uniform(0, seconds))
        for pid in ranks[len(found) :]:
            os.kill(pid, signal.SIGTERM if how == "term" else signal.SIGKILL)
            found += ended(pid)
        killed += any(found)
        codes.append(found)
        end = ended(*start(run, *(["--resume"] if (run / "args.json").exists() else [])))
        said += (out / f"{k}.err").read_text()
        assert end == [0] * world, said[-2000:]
        assert same(content(run)[0], whole) and content(run)[1] == log, (run, found)
        assert listing(run) == FILES, (run, found)
    print(f"{script}, {world} rank(s), {how}: {kills} held, {killed} killed before the end")
    return killed, codes, said


def test_a_run_killed_in_a_write_and_resumed_ends_with_the_same_bits(arrays):
    assert killed_and_resumed("mvae", arrays, "inside", 3)[0] == 3


@slow
@pytest.mark.parametrize("how", ["moment", "inside"])
@pytest.mark.parametrize("script, world", [*((name, 1) for name in SCRIPTS), ("mvae", 2)])
def test_thirty_runs_killed_and_resumed_end_with_the_same_bits(script, world, how, arrays):
    assert killed_and_resumed(script, arrays, how, 30, world)[0] >= 15  # the others were faster


@slow
def test_a_terminated_run_says_so_and_goes_on_to_the_same_bits(arrays):
    killed, codes, said = killed_and_resumed("mvae", arrays, "term", 30)
    assert "Traceback" not in said and killed >= 15
    assert said.count("stopped") == codes.count([130]) >= 15


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_says_how_to_go_on(number, arrays, tmp_path, capsys, monkeypatch):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job has none
    flags, drawn, count = dict(dataset=arrays, batch_size=8, epochs=3), data.batches, []
    train("mvae", **flags, out=tmp_path / "whole")

    def struck(*args):
        for batch in drawn(*args):
            count.append(1)
            if len(count) == 20:
                signal.raise_signal(number)
            yield batch

    monkeypatch.setattr(data, "batches", struck)
    refused("mvae", **flags, out=tmp_path / "run", code=130)
    signal.signal(signal.SIGINT, before)
    said = capsys.readouterr().err
    assert "stopped in epoch 2" in said and "--resume" in said and "Traceback" not in said
    train("mvae", **flags, out=tmp_path / "run", resume=True)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "run"))


# ---------------------------------------------------------------------- writes, losses, checkpoints


@pytest.mark.parametrize("module, name", [(data, "open"), (os, "fsync"), (os, "replace")])
def test_a_write_that_fails_keeps_the_last_checkpoint(
    module, name, arrays, tmp_path, capsys, monkeypatch
):
    flags, run = dict(dataset=arrays, batch_size=48, epochs=3), tmp_path / "run"
    train("mvae", **flags, out=tmp_path / "whole")
    train("mvae", **flags | dict(epochs=1), out=tmp_path / "first")
    usual = getattr(module, name, open)
    for at in range(1, 8):  # args.json; then checkpoint.pt and log.csv, at first and in each epoch
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(tmp_path / "first", run)
        count = []

        def fails(*args, at=at, count=count):
            count += [1] if name != "open" or args[1] == "wb" else []
            if len(count) >= at:
                raise OSError(28, "No space left")
            return usual(*args)

        monkeypatch.setattr(module, name, fails, raising=False)
        refused("mvae", **flags, out=run, resume=True)
        monkeypatch.setattr(module, name, usual, raising=False)
        said, kept = capsys.readouterr().err, checkpoint(run)
        assert str(run) in said and "No space left" in said and "Traceback" not in said
        assert kept["epoch"] == 1 + max(0, (at - 3) // 2) == len(kept["log"])
        assert listing(run) == FILES
    train("mvae", **flags, out=run, resume=True)
    assert same(weights(tmp_path / "whole"), weights(run))


@contextlib.contextmanager
def limited(what, size):
    limits = resource.getrlimit(what)
    try:
        resource.setrlimit(what, (size, limits[1]))
        yield
    finally:
        resource.setrlimit(what, limits)


@contextlib.contextmanager
def read_only(folder):
    user, _ = os.geteuid(), folder.chmod(0o555)
    try:
        os.seteuid(user or 65534)  # mode bits do not bind root
        yield
    finally:
        os.seteuid(user)
        folder.chmod(0o755)


def test_a_folder_that_takes_no_more_is_named_and_keeps_the_last_checkpoint(arrays, capsys):
    with tempfile.TemporaryDirectory() as folder:  # below tmp_path others may not read
        os.chmod(folder, 0o755)
        run, own = Path(folder, "run"), Path(shutil.copy(arrays, folder))
        own.chmod(0o644)
        train("mvae", dataset=own, epochs=1, out=run)
        before = (run / "checkpoint.pt").read_bytes()
        half = limited(resource.RLIMIT_FSIZE, len(before) // 2)  # refused in the middle of the file
        for bar, reason in ((half, "File too large"), (read_only(run), "Permission denied")):
            with bar:
                refused("mvae", dataset=own, epochs=2, out=run, resume=True)
            said = capsys.readouterr().err
            assert str(run) in said and reason in said and "Traceback" not in said
            assert (run / "checkpoint.pt").read_bytes() == before and listing(run) == FILES
    refused("mvae", dataset=arrays, out=arrays / "run")
    assert str(arrays / "run") in capsys.readouterr().err


def test_a_run_older_than_a_flag_goes_on_as_it_began(arrays, tmp_path):
    train("mvae", dataset=arrays, epochs=1, out=tmp_path)
    args = json.loads((tmp_path / "args.json").read_text())
    del args["clip"], args["standardise"]
    (tmp_path / "args.json").write_text(json.dumps(args))
    saved, _ = data.read_run(tmp_path)
    assert saved["clip"] is None and saved["standardise"] is False


DIVERGES = dict(meme=1e20, vaevae=1e3, mmvae=1e3, svae=1e5, mvae=1e20)


@pytest.mark.parametrize("script", DIVERGES)
def test_a_run_that_diverges_goes_on_from_its_last_finite_epoch(script, arrays, tmp_path, capsys):
    flags = dict(dataset=arrays, paired=0.5, unpaired="all", batch_size=16, out=tmp_path / "run")
    train(script, **flags, epochs=1)
    good = weights(tmp_path / "run")
    refused(script, **flags, epochs=8, lr=DIVERGES[script], resume=True)
    said = r"epoch 2: the loss of (0|1|0\+1) is -?(nan|inf) in step \d+; "
    said += r"go on with --out \S+ --resume "
    assert re.search(said, capsys.readouterr().err)
    kept = checkpoint(tmp_path / "run")
    assert kept["epoch"] == 1 and same(kept["model"], good)
    train(script, **flags, epochs=3, lr=1e-4, resume=True)
    assert [finite(tmp_path / "run", k)[0] for k in (1, 2, 3)] == [1, 2, 3]


def test_a_loss_that_is_not_finite_is_named(arrays, tmp_path, capsys, monkeypatch):
    objective, count = mvae.MVAE.objective, []

    def poisoned(self, *xs):
        count.append(xs[0] is None)
        return objective(self, *xs) * (math.nan if sum(count) == 14 and xs[0] is None else 1)

    monkeypatch.setattr(mvae.MVAE, "objective", poisoned)
    flags = dict(dataset=arrays, paired=0.5, batch_size=8, epochs=2)
    refused("mvae", **flags, out=tmp_path / "run")  # twelve steps an epoch
    assert "epoch 2: the loss of 1 is nan in step 2;" in capsys.readouterr().err
    assert checkpoint(tmp_path / "run")["epoch"] == 1


def test_a_checkpoint_of_another_model_is_refused(arrays, tmp_path, capsys):
    for name, script, size in [("run", "mvae", 4), ("size", "mvae", 5), ("other", "mmvae", 4)]:
        train(script, dataset=arrays, epochs=1, latent_dim=size, out=tmp_path / name)
    for name, words in [("size", "size mismatch"), ("other", "Missing key")]:
        shutil.copy(tmp_path / name / "checkpoint.pt", tmp_path / "run")
        refused("mvae", dataset=arrays, out=tmp_path / "run", resume=True)
        said = capsys.readouterr().err
        assert "does not fit" in said and words in said and len(said.splitlines()) == 2


@many(20, 1000)
def test_a_checkpoint_with_a_flipped_bit_is_refused_or_the_same(count, arrays, tmp_path):
    run, rng, refusals = tmp_path / "run", np.random.default_rng(0), 0
    train("mvae", dataset=arrays, epochs=1, out=run)
    good, before = (run / "checkpoint.pt").read_bytes(), weights(run)
    for _ in range(count):
        bad = bytearray(good)
        bad[rng.integers(len(bad))] ^= 1 << rng.integers(8)
        (run / "checkpoint.pt").write_bytes(bad)
        try:
            train("mvae", dataset=arrays, epochs=1, out=run, resume=True)
            assert same(weights(run), before)
        except SystemExit as stopped:
            assert stopped.code == 2
            refusals += 1
    assert refusals > 0.8 * count


class Code:
    """Pickled, it makes a folder when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_nothing_that_is_loaded_executes_code(runs, arrays, tmp_path, capsys):
    run, bad = tmp_path / "run", Code(tmp_path / "executed")
    train("mvae", dataset=arrays, epochs=1, out=run)
    state = checkpoint(run)
    for put in (lambda f: torch.save(state | {"log": bad}, f), lambda f: pickle.dump(bad, f)):
        with open(run / "checkpoint.pt", "wb") as file:
            put(file)
        refused("mvae", dataset=arrays, out=run, resume=True)
        assert f"{run} holds no run to resume" in capsys.readouterr().err
        with pytest.raises(ValueError, match="cannot be loaded"):
            evaluation.load_run(run)
    args = runs[0] / "args.json"
    args.write_text(args.read_text().replace('"mvae"', '"this"'))
    with pytest.raises(ValueError, match="no script 'this'"):
        evaluation.load_run(runs[0])
    assert "this" not in sys.modules

    (tmp_path / "spectra").mkdir(), (tmp_path / "cub").mkdir()
    sparse = [f"{p}_{k}" for p in ("train", "test") for k in (*spectra.CSR, "rows", "bits")]
    for path, keys, load in [
        ("own.npz", ["train_0", "train_1", "test_0", "test_1"], data.load_npz),
        ("svhn.npz", ["train_x", "train_y", "test_x", "test_y"], lambda _: digits.svhn(tmp_path)),
        ("features.npz", "weights normalise files train readable x".split(), cub.read_features),
        ("spectra/spectra.npz", ["version", *sparse], lambda _: spectra.read_spectra(tmp_path)),
    ]:
        np.savez(tmp_path / path, **dict.fromkeys(keys, np.array([bad], object)))
        with pytest.raises(ValueError, match="plain arrays"):
            load(tmp_path / path)
    np.savez(tmp_path / "cub" / "words.npz", **dict.fromkeys(["digest", "vectors"], [bad]))
    captions = torch.tensor([[3, 4, 3, 4, 2] + [1] * 27] * 20)
    cub.cached_word_vectors(tmp_path, captions, [*cub.SPECIALS, "a", "b"])
    assert not (tmp_path / "executed").exists()


def npy(shape, dtype="<f4", content=b""):
    file, header = io.BytesIO(), {"descr": dtype, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    return file.getvalue() + content


def test_bombs_are_refused_before_they_fill_the_memory(tmp_path, monkeypatch):
    path, good = tmp_path / "own.npz", npy((4, 4), content=bytes(64))
    for shape in [(1 << 40, 4), (1 << 31, 1 << 31, 1 << 31), (1 << 28, 1)]:
        with zipfile.ZipFile(path, "w") as packed:
            for name in ("train_0", "train_1", "test_0", "test_1"):
                packed.writestr(f"{name}.npy", npy(shape) if name == "train_1" else good)
        with pytest.raises(ValueError, match="own.npz"):
            data.load(str(path))
    monkeypatch.setattr(data, "MOST_BYTES", 2**20)
    arrays = dict(train_0=np.zeros((1024, 1024), np.float32), train_1=np.zeros((1024, 1)))
    np.savez_compressed(path, **arrays, test_0=np.zeros((2, 1024)), test_1=np.zeros((2, 1)))
    assert path.stat().st_size < 6000
    with pytest.raises(ValueError, match="unpack to 4,"):
        data.load(str(path))
    monkeypatch.setattr(data, "MOST_UNPACKED", 100_000)
    info = tarfile.TarInfo("a.txt")
    info.size = 200_000
    archive(tmp_path / "bomb.tgz", None, [(info, bytes(info.size))])
    with pytest.raises(ValueError, match="unpacks to more than"):
        data.unpack(tmp_path / "bomb.tgz", tmp_path / "cub" / "x", ".", ".txt")
    assert not list((tmp_path / "cub").iterdir())
    Image.new("1", (1, 60_000)).save(tmp_path / "strip.png")  # scaled to 224 pixels' width: 9 GB
    assert cub.read_photo(tmp_path / "strip.png", lambda image: 1 / 0) is None


# --------------------------------------------------------------- prepared at once, and killed in it


@pytest.fixture
def packed_birds(tmp_path, small_net, monkeypatch):
    """Two archives in cub/, whose features are saved after each batch of two photos. -> function
    that makes a fresh copy, function that prepares it"""
    source, root, extract = helpers.packed_originals(tmp_path), tmp_path / "root", cub.extract
    (root / "cub").mkdir(parents=True)
    archive(root / "cub" / "cvpr2016_cub.tar.gz", source / "cvpr2016_cub")
    archive(root / "cub" / "CUB_200_2011.tgz", source / "CUB_200_2011")
    monkeypatch.setattr(cub, "CUB_MD5", data.md5(root / "cub" / "CUB_200_2011.tgz"))
    monkeypatch.setattr(cub, "extract", lambda *a, **k: extract(*a, **k, every=-1, batch_size=2))

    def fresh():
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        return Path(shutil.copytree(root, tmp_path / "copy"), "cub")

    return fresh, lambda: cub.prepare_cub(tmp_path / "copy", "none")


@many(3, 30)
def test_processes_that_prepare_the_same_data_at_once_all_end_with_it(count, packed_birds):
    fresh, prepare = packed_birds
    for _ in range(count):
        folder = fresh()
        made = {*listing(folder), "CUB_200_2011", "cvpr2016_cub", "features.npz"}
        assert ended(*[forked(prepare) for _ in range(3)]) == [0, 0, 0]
        assert set(listing(folder)) - {"features.partial.npz"} == made
        assert len(data.load("cub", folder.parent).train) == 40


@many(5, 60)
def test_a_preparation_killed_at_any_moment_leaves_a_whole_file_or_none(count, packed_birds):
    (fresh, prepare), rng, began = packed_birds, np.random.default_rng(0), time.perf_counter()
    folder = fresh()
    assert ended(forked(prepare)) == [0]
    seconds, whole = time.perf_counter() - began, cub.read_features(folder / "features.npz")
    for _ in range(count):
        fresh()
        pid = forked(prepare)
        time.sleep(rng.uniform(0, seconds))
        os.kill(pid, signal.SIGKILL)
        ended(pid)
        for path in folder.glob("features*.npz"):
            cub.read_features(path)
        for name, files in (("CUB_200_2011", "images/*/*.jpg"), ("cvpr2016_cub", "text_c10/*/*")):
            assert len(list((folder / name).glob(files))) in (0, 6)
        prepare()
        again = cub.read_features(folder / "features.npz")
        assert all(np.array_equal(whole[key], again[key]) for key in whole)


def test_mnist_appears_when_all_of_it_is_there(small_root, tmp_path, monkeypatch):
    source = {p.name: p.read_bytes() for p in (small_root / "MNIST" / "raw").iterdir()}
    made, root, mnist = [], tmp_path / "new", "torchvision.datasets.MNIST."

    def slowly(self):
        for name, content in source.items():
            (Path(self.raw_folder) / name).write_bytes(content[: len(content) // 2])
            if len(made) == 2 and name == list(source)[2]:
                raise KeyboardInterrupt
            (Path(self.raw_folder) / name).write_bytes(content)
            made.append(name)

    monkeypatch.setattr(mnist + "download", slowly)
    monkeypatch.setattr(mnist + "_check_exists", lambda self: True)
    monkeypatch.setattr(mnist + "_load_data", lambda self: (None, None))
    with pytest.raises(KeyboardInterrupt):
        data.load("mnist-split", root)
    assert not [p for p in root.rglob("*") if p.is_file()]
    assert len(data.load("mnist-split", root).train) == 60
    assert listing(root / "MNIST" / "raw") == sorted(source)


# --------------------------------------- whatever the arguments and the files, a step or a sentence

NUMBERS = """1 2 3 7 0 -1 2147483647 2147483648 1e3 x 1_0 99999999999999999999 nan inf -inf 1e-320
1e320 1e38 0.5 0.1""".split() + [""]  # fmt: skip
WORDS = {  # of the flags that do not take a number
    "dataset": """own.npz own.npz three.npz mask.npz cut.npz dir.npz none.npz nope glyphs
               mnist-split mnist-svhn cub spectra""".split() + ["", "a" * 300 + ".npz"],
    "data": [".", "none", "file", "", "a" * 300], "device": ["cpu", "cuda", "x"],
    "unpaired": ["split", "all", "rest", "none", "0", "1", "2", "nope", "", "a/b", "--"],
    "sampling": ["natural", "balanced", "x"], "direction": ["0", "1", "2", "x", ""],
    "likelihoods": ["laplace,laplace", "bernoulli,bernoulli", "normal", "categorical,laplace", "",
                    ",", "laplace,normal,laplace", "x,y", "poisson,poisson", "laplace,poisson"],
    "weights": ["1,1", "0,0", "nan,1", "1", "-1,1", "", "1e38,1e38", "x,1", "1,2,3", "inf,1"],
    "out": ["file", "file/x", "a" * 300, "", "dir.npz", "deep/er/x", "new"],
    "kl": ["closed", "sample", "x"], "explicit": ["mixture", "product", "x"],
    "objective": ["svae", "vaevae", "iwae", "elbo", "dreg", "x"], "variant": ["a", "b", "x"],
    "experts": ["bounded", "exact", "x"], "posterior": ["normal", "laplace", "x"],
}  # fmt: skip


def choices_of(script):
    """What may follow each flag of a script, and what is no flag."""
    found = {"--nope": [None, "1"], "stray": [None]}
    for action in SCRIPTS[script].parser([])[0]._actions[1:]:
        values = [None] if action.nargs == 0 else WORDS.get(action.dest, NUMBERS)
        assert action.nargs == 0 or action.type or action.dest in WORDS, action.dest
        found |= {flag: values for flag in action.option_strings}
    return found


@pytest.fixture
def odd_folder(tmp_path, monkeypatch):
    """Data sets good and bad in the current folder; no network; runs that end after a step."""
    rng, mask = np.random.default_rng(0), np.array([[1, 1], [1, 0], [0, 1]] * 8, bool)
    xs = rng.normal(size=(24, 5)), rng.random((24, 4)) > 0.5, rng.normal(size=(24, 3))
    save_arrays(tmp_path / "own.npz", *xs[:2])
    save_arrays(tmp_path / "three.npz", *xs)
    save_arrays(tmp_path / "mask.npz", *xs[:2], train_mask=mask)
    (tmp_path / "cut.npz").write_bytes((tmp_path / "own.npz").read_bytes()[:200])
    (tmp_path / "dir.npz").mkdir()
    (tmp_path / "file").write_text("")
    glyphs, drawn, made = data.benchmark("glyphs"), data.batches, {}
    draw = glyphs.glyphs

    def one(*args):
        yield next(drawn(*args))
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "batches", one)
    monkeypatch.setattr(glyphs, "glyphs", lambda n, seed: made.setdefault(seed, draw(40, seed)))
    monkeypatch.setattr(torch, "compile", lambda net: net)
    for name in ("MNIST", "SVHN"):
        monkeypatch.setattr(f"torchvision.datasets.{name}.download", helpers.offline)


@many(25, 1000)
@pytest.mark.parametrize("script", SCRIPTS)
def test_any_command_line_trains_a_step_or_ends_in_a_sentence(script, count, odd_folder, capsys):
    rng, ends, flags = random.Random(count), Counter(), choices_of(script)
    for k in range(count):
        argv = ["--dataset", rng.choice(["own.npz", "own.npz", "three.npz", "mask.npz"])]
        for flag in rng.sample(list(flags), rng.choice([0, 1, 1, 2, 2, 3, 5])):
            value = rng.choice(flags[flag])
            argv += [flag] if value is None else [flag, value]
        argv += [] if "--out" in argv else ["--out", f"run{k}"]
        with limited(resource.RLIMIT_AS, 16 << 30), pytest.raises(SystemExit) as stopped:
            SCRIPTS[script].main(argv)
        said = [line for line in capsys.readouterr().err.splitlines() if line]
        said = [line for line in said if not line.startswith("usage:")]
        assert stopped.value.code in (2, 130) and len(said) == 1, (argv, said)
        assert (stopped.value.code == 130) == ("stopped in epoch" in said[0]), argv
        ends[stopped.value.code] += 1
    assert min(ends[2], ends[130]) > 0.1 * count
    print(f"{script}: {count} command lines, {ends[130]} trained, {ends[2]} refused")


def mutated(content, rng):
    """Bytes with a few changes: bits flipped, cut, doubled, left out, put in."""
    content = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 5])):
        k, n = rng.randrange(len(content) + 1), rng.choice([1, 1, 4, 50])
        how = rng.choice(["flip", "flip", "head", "cut", "copy", "drop", "insert"])
        if how == "cut":
            del content[k:]
        elif how == "copy":
            content[k:k] = content[k : k + n] * rng.choice([1, 3])
        elif how == "drop":
            del content[k : k + n]
        elif how == "insert":
            odd = [b"9" * n, b"\0" * n, b"\n", b'"', b",", b"e308", b"-1", b"nan"]
            content[k:k] = rng.choice([bytes(rng.randrange(256) for _ in range(n)), *odd])
        elif content:
            k %= min(len(content), 64) if how == "head" else len(content)
            content[k] ^= 1 << rng.randrange(8)
    return bytes(content)


def mutated_arrays(arrays, rng):
    """Arrays of which one has another type, shape or entry, or is gone."""
    arrays = dict(arrays)
    key = rng.choice(sorted(arrays))
    array = np.asarray(arrays.pop(key))
    how = rng.choice("gone type entry entry less more axis scalar bytes none".split())
    with contextlib.suppress(ValueError, TypeError, OverflowError):
        if how == "type":
            array = array.astype(rng.choice("u1 i8 >i4 f2 >f8 ? c8 U3 S2 f8 u4 M8[s] g".split()))
        elif how == "entry" and array.size and array.dtype.kind in "buif":
            array, odd = array.copy(), [-1, 0, 1, 2, 127, 200, 1 << 40, math.nan, math.inf, 1e300]
            array.reshape(-1)[rng.randrange(array.size)] = rng.choice([*odd, -math.inf])
        elif how in ("less", "more") and array.ndim:
            array = array[:-1] if how == "less" else np.concatenate([array, array[:1]])
        elif how == "axis" and array.ndim:
            views = array[None], array[..., None], array.reshape(-1), array[..., :0], array.T
            array = rng.choice(views)
        elif how == "scalar":
            array = np.array(rng.choice([0, 1.5, "x"]))
        elif how == "none":
            array = array[:0] if array.ndim else array
    if how != "gone":
        arrays[rng.choice([key] * 9 + ["other"])] = array
    np.savez(file := io.BytesIO(), **arrays)
    if how == "bytes":  # a member that is no array, its check sum right
        with zipfile.ZipFile(file, "a") as packed:
            packed.writestr(f"{key}.npy", mutated(npy((2, 3), content=bytes(24)), rng))
    return file.getvalue()


def mutations(path, count):
    """`count` times another file in the place of a good one."""
    rng, good = random.Random(0), path.read_bytes()
    arrays = dict(np.load(path)) if path.suffix == ".npz" else None
    for k in range(count):
        path.write_bytes(mutated_arrays(arrays, rng) if arrays and k % 2 else mutated(good, rng))
        yield k


PHOTO = [transforms.Resize(224), transforms.CenterCrop(224), transforms.ToTensor()]


def good_file(kind, name, root):
    """-> the path of a good file of this kind"""
    path, rng = root / kind / name, np.random.default_rng(0)
    if kind == "own":
        xs, more = (rng.normal(size=(6, 3)), rng.random((6, 4)) > 0.5), {}
        if "images" in name:
            xs = rng.integers(0, 256, (6, 1, 8, 8), np.uint8), rng.random((6, 3, 8, 9))
            more = {"train_labels": np.arange(6), "test_labels": np.arange(6)}
        if "kinds" in name:
            xs = rng.integers(-9, 9, (6, 3)), rng.integers(0, 9, (6, 2)), np.arange(6) % 3
        if "mask" in name:
            more = {"train_mask": np.array([[1, 1], [1, 0], [0, 1]] * 2, bool)}
        path.parent.mkdir()
        save_arrays(path, *xs, **more)
    elif kind == "cub":
        shi(root)
        cub.prepare_cub(root, "none")
    elif kind == "cub/test/003.Auklet":
        shi(root)
        with Image.open(path.with_name("0.jpg")) as image:
            image.save(path)
    elif kind == "packed":
        path.parent.mkdir()
        with tarfile.open(path, "w" if name == "a.tar" else f"w:{name[6:]}") as tar:
            tar.add(helpers.originals(root) / "text_c10", "text_c10")
    elif kind in ("in", "spectra"):
        pytest.importorskip("rdkit")
        (root / "in").mkdir()
        peaks = ["57.07 100\n71.08 25", "57.07 10; 71.1 2;", '80.1 5 "note"\n99 1']
        records = [helpers.record(s, peaks[k % 3]) for k, s in enumerate(helpers.MOLECULES)]
        (root / "in" / "a.msp").write_text("".join(2 * records))
        helpers.challenge_files(root / "in")
        if name.endswith(".gz"):
            path.write_bytes(gzip.compress(path.with_suffix("").read_bytes()))
        if kind == "spectra":
            read(root / "in" / "a.msp", "in", root)
    return path


def used(*dataset):
    """Reads every example of a data set, as training and evaluation do. -> the data set"""
    dataset = data.load(*dataset)
    for split in (dataset.train, dataset.test):
        for x in split[torch.arange(len(split))]:
            assert len(x) == len(split)
            assert dataset.mask is not None or not x.is_floating_point() or x.isfinite().all()
    return dataset


def read(path, kind, root):
    if kind in ("MNIST/raw", ""):
        used("mnist-split" if kind else "mnist-svhn", root)
    elif kind == "own":
        dataset = used(str(path))
        streams = data.pairing(len(dataset.train), dataset.names, mask=dataset.mask)
        few = [(1.0, data.show(dataset.train, shown, index[:2])) for shown, index in streams]
        mvae.MVAE(nets.modalities(**dataset.spec), 2)(few)
    elif kind == "cub/test/003.Auklet":
        x = cub.read_photo(path, transforms.Compose(PHOTO))
        if x is None:
            raise ValueError("skipped")
        assert x.shape == (3, 224, 224)
    elif kind == "packed":
        try:
            data.unpack(path, root / "out" / "x", "text_c10", ".txt")
        finally:
            assert listing(root / "out") in ([], ["x"])
            shutil.rmtree(root / "out")
    elif kind == "in":
        files = {key: root / "in" / f"{key}.csv" for key in ("candidates", "truth")}
        files |= {"msp": root / "in" / "a.msp", "mgf": root / "in" / "c.mgf"}
        files |= {key: path for key, file in files.items() if file.name == path.stem}  # packed
        shutil.rmtree(root / "spectra", ignore_errors=True)
        found = spectra.prepare_spectra(root, **files)
        kept = found["train"] + found["test"]
        assert kept + sum(found["skipped"].values()) == found["records"]
        used("spectra", root)
    else:
        used(kind, root)
        found = spectra.load_challenges(root) if kind == "spectra" else None
        if found is not None:
            assert found.spectra[torch.arange(len(found.ids))].isfinite().all()
            assert [found.bits[found.offsets[k] + t].shape for k, t in enumerate(found.truth)]


MUTATED = [  # the folder, which says the kind, the files, the least shares refused and read
    ("MNIST/raw", ["train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"], 0.1, 0.02),
    ("", ["svhn.npz"], 0.5, 0),
    ("own", ["floats.npz", "images.npz", "kinds.npz", "mask.npz"], 0.3, 0.05),
    ("cub", ["features.npz"], 0.5, 0),
    ("cub", ["text_testclasses.txt"], 0.05, 0.3),
    ("cub/test/003.Auklet", ["0.jpg", "2.png"], 0.1, 0),
    ("packed", ["a.tar", "a.tar.gz", "a.tar.xz"], 0.1, 0),
    ("in", ["a.msp", "c.mgf", "candidates.csv", "truth.csv"], 0, 0.1),
    ("in", ["a.msp.gz", "c.mgf.gz", "candidates.csv.gz", "truth.csv.gz"], 0.1, 0),
    ("spectra", ["spectra.npz"], 0.3, 0),
]
MUTATED = [(kind, name, *least) for kind, names, *least in MUTATED for name in names]


@many(40, 1000)
@pytest.mark.filterwarnings("ignore")  # of Pillow on sizes, of zipfile on names
@pytest.mark.parametrize("kind, name, least_refused, least_read", MUTATED)
def test_a_file_with_mutations_is_read_or_refused_in_a_sentence(
    kind, name, least_refused, least_read, count, small_root, small_net, capsys
):
    """None takes long, much memory or leaves a file."""
    path = good_file(kind, name, small_root)
    ends, before = Counter(), listing(path.parent)
    for k in mutations(path, count):
        began = time.perf_counter()
        try:
            with limited(resource.RLIMIT_AS, 8 << 30):
                read(path, kind, small_root)
            ends["read"] += 1
        except ValueError as error:
            said = str(error)
            assert said and "\n" not in said and len(said) < 700, said
            ends["refused"] += 1
        assert time.perf_counter() - began < 20, k
    assert listing(path.parent) == before
    assert ends["refused"] >= least_refused * count and ends["read"] >= least_read * count
    print(f"{name}: {count} mutations, {dict(ends)}")


# ---------------------------------------------------------------------------------------- odd cases

MOST_ARE_SLOW = ["mvae", *(pytest.param(name, marks=slow) for name in SCRIPTS if name != "mvae")]


@pytest.mark.parametrize("script", MOST_ARE_SLOW)
def test_constant_data_gives_finite_numbers(script, tmp_path):
    xs = np.zeros((12, 1, 8, 8), np.uint8), np.full((12, 3, 8, 8), 255, np.uint8)
    own = save_arrays(tmp_path / "c.npz", *xs)
    flags = dict(dataset=own, epochs=30, batch_size=4, lr=1e-2, latent_dim=1)
    flags |= dict(samples=1) if script in ("meme", "mmvae") else {}
    train(script, **flags, out=tmp_path / "run")
    first, last = finite(tmp_path / "run", 1), finite(tmp_path / "run", -1)
    assert last[2] > first[2] and last[3] > first[3]
    assert last[3] > -10  # nats of 192 pixels that are always 1


@pytest.mark.parametrize("script", MOST_ARE_SLOW)
def test_captions_of_unknown_words_alone_train(script, tmp_path, small_net):
    folder = shi(tmp_path)
    for name, photos in (("text_trainvalclasses.txt", 4), ("text_testclasses.txt", 2)):
        (folder / name).write_text("\n".join(f"word{k}" for k in range(10 * photos)) + "\n")
    cub.prepare_cub(tmp_path)
    dataset = data.load("cub", tmp_path)
    assert dataset.words == list(cub.SPECIALS)
    assert (dataset.train[torch.arange(40)][1][:, :3] == torch.tensor([0, 2, 1])).all()
    flags = dict(dataset="cub", data=tmp_path, epochs=1, batch_size=20, latent_dim=2)
    train(script, **flags, out=tmp_path / "run")
    finite(tmp_path / "run", 1)


def test_a_digit_that_the_test_split_lacks_leaves_the_other_numbers_as_they_are(small_root):
    raw = small_root / "MNIST" / "raw" / "t10k-labels-idx1-ubyte"
    raw.write_bytes(raw.read_bytes()[:8] + raw.read_bytes()[8:].replace(b"\3", b"\4"))
    test = data.load("mnist-svhn", small_root).test
    assert set(test.labels.tolist()) == {*range(10)} - {3} and len(test) == 2 * 8 + 3
    whole = helpers.toy()
    index = (whole.test.labels != 3).nonzero()[:, 0]
    rows = [r[index] for r in whole.test.rows]
    lacking = whole._replace(test=data.Split(whole.test.bases, rows, whole.test.labels[index]))
    metrics = evaluation.evaluate(helpers.Perfect(helpers.SHAPES), lacking, helpers.READERS)
    assert metrics["cross_coherence"] == {"mnist->svhn": 1, "svhn->mnist": 1}
    assert metrics["joint_coherence"] == 1 and min(metrics["latent_accuracy"].values()) > 0.99


# ------------------------------------------------------------ the commands and numbers of the pages


def page(name):
    return (ROOT / name).read_text()


def commands(kind):
    """-> (script, flags) of each command line that trains, of those that README.md and reproduce.md
    show, that make results/ (as a shell expands them), or that make the papers' tables"""
    results, reproduce = page("results/README.md"), page("docs/reproduce.md")
    if kind == "shown":
        typed = r"^    (?:pip .* && )?(?:python|torchrun \S+ \d+) (.*)"
        lines = re.findall(typed, page("README.md") + reproduce, re.M)
    elif kind == "results":
        shell = 'python() { echo "$@"; }\n' + "".join(re.findall(r"^    .*\n", results, re.M))
        done = subprocess.run(["bash", "-euc", shell], cwd=ROOT, capture_output=True, text=True)
        lines = done.stdout.splitlines()
    else:
        rows = "".join(re.findall(r"^\| \[(?:MEME|PoE)\] .*", reproduce, re.M))
        lines = dict.fromkeys(re.findall(r"`python (\w+\.py [^`]*)`", rows))
    for script, *flags in map(str.split, lines):
        if script.removesuffix(".py") in SCRIPTS:
            yield script.removesuffix(".py"), flags


def test_every_table_and_figure_of_the_papers_has_its_command():
    named, rows = set(), r"^\| \[(MEME|PoE)\] ([^|]*) \|"
    for paper, results in re.findall(rows, page("docs/reproduce.md"), re.M):
        for kind, numbers in re.findall(r"(Table|Fig\.) (\d+(?:, \d+)*)", results):
            named |= {(paper, kind, int(n)) for n in numbers.split(", ")}
    expected = [("MEME", "Table", range(2, 8)), ("MEME", "Fig.", range(3, 23)),
                ("PoE", "Table", [1]), ("PoE", "Fig.", range(3, 12))]  # fmt: skip
    assert named == {(paper, kind, n) for paper, kind, numbers in expected for n in numbers}


def test_every_result_has_its_command_and_its_whole_log():
    asked = {}
    for script, flags in commands("results"):
        new = vars(SCRIPTS[script].parser(flags)[0].parse_args(flags))
        out, resumed = new["out"], new["resume"]
        assert resumed == (out in asked)
        free = SCRIPTS[script].FREE & new.keys() if resumed else new  # what --resume may change
        asked[out] = asked.get(out, {"script": script}) | {k: new[k] for k in free}
    folders = (ROOT / "results").glob("*/metrics.json")
    assert asked.keys() == {f"results/{path.parent.name}" for path in folders}
    for out, flags in asked.items():
        args, metrics = (json.loads(page(f"{out}/{name}.json")) for name in ("args", "metrics"))
        usual = SCRIPTS[flags["script"]].parser(["--dataset", flags["dataset"]])[0].get_default
        local = {"device", "resume", "data", "out"}  # two are paths, made absolute
        for key in flags.keys() - local:
            said = args.get(key, usual(key))  # or younger than the run
            assert said == flags[key], f"{out}: {key}"
        rows = list(csv.DictReader(page(f"{out}/log.csv").splitlines()))
        assert [int(row["epoch"]) for row in rows] == [*range(1, args["epochs"] + 1)]
        assert metrics["run"] == args and metrics["epoch"] == args["epochs"]
        minutes = sum(float(row["seconds"]) for row in rows) / 60
        assert metrics["minutes"] == pytest.approx(minutes)


def rows_of(text):
    return [line for line in text.splitlines() if line.startswith("|")]


def test_the_tables_of_results_are_what_eval_prints_of_their_metrics():
    text, groups, found = page("results/README.md"), {}, {}
    for path in sorted((ROOT / "results").glob("*/metrics.json")):
        group = groups.setdefault(path.parent.name.split("-")[0], [])
        group.append(json.loads(path.read_text()))
    for name, results in groups.items():
        table = "\n".join(rows_of(evaluation.table(results, paper=True)))
        assert table in text, f"results/README.md has another table for results/{name}-*"
    for row in rows_of(text):
        model, *cells = row.strip("| ").split(" | ")
        found.setdefault(model.split()[0], set()).update(cells)
    for row in rows_of(page("README.md").split("\n## Results\n")[1])[2:]:
        model, *cells = row.strip("| ").split(" | ")
        ours = {cell for cell in cells if "." in cell and model in found}
        assert ours <= found.get(model, set()), f"README.md has other numbers of {model}"


@pytest.fixture
def run_briefly(small_root, small_net, tmp_path, monkeypatch):
    """Trains as commands say, on 256 examples at most. -> how many did"""
    shi(small_root)
    cub.prepare_cub(small_root, "none")
    monkeypatch.chdir(tmp_path)

    def run(commands):
        found = [(s, f) for s, f in commands if "spectra" not in f and "--compile" not in f]
        for k, (script, flags) in enumerate(found):
            train(script, *flags, epochs=1, limit=256, data=small_root, out=f"run{k}")
        return len(found)

    return run


def test_the_commands_of_the_first_page_train(run_briefly, arrays, tmp_path):
    os.rename(arrays, tmp_path / "my.npz")
    assert run_briefly(commands("shown")) >= 5


def test_one_command_of_each_kind_of_the_papers_tables_trains(run_briefly):
    kinds = {}  # those of one script with the same flags differ in their values
    for script, flags in commands("tables"):
        if "cub" not in flags:
            kinds.setdefault((script, *flags[::2]), (script, flags))
    assert run_briefly(kinds.values()) >= 10


@slow
def test_every_command_of_the_papers_tables_trains(run_briefly):
    assert run_briefly(commands("tables")) >= 40


def code_of(name):
    return re.findall(r"```python\n(.*?)```", page(name), re.S)


def test_the_code_of_the_first_page_runs():
    ours, own = code_of("README.md")
    exec(ours, found := {})
    assert found["loss"].isfinite() and found["generated"].shape == (8, 3, 32, 32)
    assert found["nats"].shape == (8,)
    exec(own, found := {})  # own networks: tables that are guessed from texts
    tables = found["numbers"][500:]
    missed, spread = ((tables - x) ** 2 for x in (found["guessed"], tables.mean(0)))
    assert missed.sum() < 0.4 * spread.sum()


def test_the_data_set_of_docs_extend_trains_as_any_other(tmp_path, monkeypatch):
    (code,) = code_of("docs/extend.md")
    exec(code, vars(module := types.ModuleType("benchmarks.shapes")))
    monkeypatch.setitem(sys.modules, "benchmarks.shapes", module)
    monkeypatch.setitem(data.DATASETS, "shapes", "shapes")
    train("svae", dataset="shapes", epochs=1, out=tmp_path / "run")
    finite(tmp_path / "run", 1)


def test_the_scripts_on_oracles_and_experts_print_what_they_measure(
    small_root, tmp_path, monkeypatch, capsys
):
    def printed(script, *argv):
        monkeypatch.setattr(sys, "argv", [script.__name__, *map(str, argv)])
        capsys.readouterr()
        script.main()
        return [line.strip("| ").split(" | ") for line in rows_of(capsys.readouterr().out)]

    def reader(dataset, view, folder, seed):  # reads at random, of that seed
        def read(x):
            digits = torch.randint(10, (len(x),), generator=torch.Generator().manual_seed(seed))
            return digits, digits == 0

        return read, 0.1

    monkeypatch.syspath_prepend(ROOT / "docs")
    pages = [importlib.import_module(name) for name in ("oracles", "experts")]
    digits, glyphs = [tmp_path / name for name in ("digits", "glyphs")]
    train("mvae", dataset="mnist-split", data=small_root, epochs=1, out=digits)
    train("mvae", limit=64, epochs=2, out=glyphs)
    monkeypatch.setattr(pages[0], "load_oracle", reader)
    head, _, *rows = printed(pages[0], digits, "--seeds", 3)
    assert head == ["model", "number", "seed 0", "seed 1", "seed 2", "moves by"]
    assert [row[:2] for row in rows] == [["MVAE", part] for part in ("top", "bottom", "both")]
    assert any(float(row[-1]) for row in rows)
    for a, b, c, moved in (map(float, row[2:]) for row in rows):
        assert moved == pytest.approx(max(a, b, c) - min(a, b, c), abs=2e-4)
    head, _, row = printed(pages[1], glyphs, "--no-oracles")
    found = dict(zip(head, row))
    last = checkpoint(glyphs)["log"][-1]["objective"]
    assert float(found["objective"]) == pytest.approx(last, abs=0.05)
    assert 0 <= float(found["alive"]) <= 20 and float(found["logvar"]) != 0
