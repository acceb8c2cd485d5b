"""A user's own arrays: names, kinds, units, errors; counts and classes; features of one's own; how a
run is called, and what it says and draws at its end."""

import contextlib
import io
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import MOLECULES, ROOT, SCRIPTS, originals, record, refused, same, shi, train, weights
from PIL import Image
from torch.distributions import Categorical, Poisson
from torch.testing import assert_close

import data
import mvae
import nets
from benchmarks import cub, spectra

RNG = np.random.default_rng(0)
N = 40
ARRAYS = {  # name: array, its likelihood, the type that it is held in
    "photo": (RNG.integers(0, 256, (N, 3, 8, 9), np.uint8), "bernoulli", torch.uint8),
    "scan": (RNG.random((N, 9, 8)), "bernoulli", torch.float32),
    "drawing": (RNG.integers(0, 2, (N, 1, 8, 8)), "bernoulli", torch.bool),
    "table": (1000 + 300 * RNG.normal(size=(N, 4)), "laplace", torch.float32),
    "below": (RNG.integers(-5, 9, (N, 3)), "laplace", torch.float32),
    "words": (RNG.integers(0, 9, (N, 6)), "poisson", torch.float32),
    "bits": (RNG.random((N, 5)) > 0.5, "bernoulli", torch.bool),
    "bytes": (RNG.integers(0, 256, (N, 5), np.uint8), "bernoulli", torch.uint8),
    "species": (np.arange(N) % 4, "categorical", torch.int64),
}


def saved(path, arrays=None, **more):
    """An .npz with the same examples to train and to test with. -> its path, as text"""
    arrays = arrays or {name: array for name, (array, _, _) in ARRAYS.items()}
    both = {f"{part}_{name}": x for part in ("train", "test") for name, x in arrays.items()}
    np.savez(path, **{name: x for name, x in (both | more).items() if x is not None})
    return str(path)


@pytest.fixture
def own(tmp_path):
    return saved(tmp_path / "kinds.npz", train_labels=np.arange(N))


# ------------------------------------------------------------------------------- names, kinds, units


def test_arrays_are_modalities_in_the_order_of_the_archive_with_what_their_values_suggest(own):
    dataset = data.load(own)
    assert dataset.names == tuple(ARRAYS) == tuple(dataset.spec["shapes"])
    assert dataset.spec["likelihoods"] == [likelihood for _, likelihood, _ in ARRAYS.values()]
    assert [base.dtype for base in dataset.train.bases] == [kind for *_, kind in ARRAYS.values()]
    assert dataset.spec["shapes"]["scan"] == [1, 9, 8] and dataset.spec["shapes"]["species"] == []
    assert dataset.spec["classes"] == {"species": 4}
    assert dataset.train.labels.tolist() == list(range(N)) and dataset.test.labels is None
    for m, x in zip(nets.modalities(**dataset.spec), dataset.train[torch.arange(N)]):
        assert x.shape == (N, *m.shape)
    index = list(ARRAYS).index("words")
    assert (dataset.test.bases[index].numpy() == ARRAYS["words"][0]).all()


def test_a_likelihood_that_is_asked_for_says_what_the_values_are(tmp_path):
    x, y = RNG.integers(0, 2, (N, 3)), RNG.integers(0, 9, (N, 2)).astype(np.float32)
    path = saved(tmp_path / "a.npz", {"x": x, "y": y})
    assert data.load(path).spec["likelihoods"] == ["bernoulli", "laplace"]
    dataset = data.load(path, likelihoods=["normal", "poisson"])
    assert dataset.spec["likelihoods"] == ["normal", "poisson"]
    assert list(dataset.spec["standardise"]) == ["x"]
    assert (dataset.train.bases[1].numpy() == y).all()
    with pytest.raises(ValueError, match="train_y is to hold counts"):
        data.load(
            saved(tmp_path / "a.npz", {"x": x, "y": y / 2}), likelihoods=["laplace", "poisson"]
        )


def test_features_have_the_training_examples_mean_and_deviation_taken_out(tmp_path):
    x, y = RNG.normal(size=(N, 3)) * [300, 1e-3, 1] + [1000, 0, 0], RNG.normal(size=(N, 2))
    x[:, 2] = 7  # constant
    mask = np.ones((N, 2), bool)
    mask[:5, 0] = False
    hidden = np.where(mask[:, :1], x, np.nan)
    path = saved(tmp_path / "a.npz", {"x": x, "y": y}, train_x=hidden, train_mask=mask)
    dataset = data.load(path, limit=30)
    constants, seen = dataset.spec["standardise"]["x"], x[5:30]
    assert_close(torch.tensor(constants["mean"]), torch.tensor(seen.mean(0).tolist()))
    assert_close(torch.tensor(constants["std"]), torch.tensor([*seen.std(0)[:2].tolist(), 1.0]))
    base = dataset.train.bases[0][5:30]
    assert_close(base[:, :2].mean(0), torch.zeros(2), atol=1e-5, rtol=0)
    assert_close(base[:, :2].std(0, correction=0), torch.ones(2))
    assert (base[:, 2] == 0).all() and dataset.train.bases[0].isfinite().all()
    test = dataset.test.bases[0]
    for held in (test, test.numpy(), test.expand(2, N, 3)):  # in its units again, and back
        back = data.unstandardise(held, constants)
        assert type(back) is type(held) and back.shape == held.shape
        assert np.allclose(back, x, rtol=1e-5)
        assert np.allclose(data.standardise(back, constants), held, atol=1e-3)
    assert data.standardise(test, None) is test is data.unstandardise(test, None)
    as_they_are = data.load(path, constants={})
    assert "standardise" not in as_they_are.spec
    assert np.allclose(as_they_are.test.bases[0], x)
    again = data.load(path, constants=dataset.spec["standardise"])  # as eval.py does, without limit
    assert torch.equal(again.test.bases[0], test)
    assert again.spec["standardise"] == dataset.spec["standardise"]


X, TWO = np.zeros((4, 3), "f4"), {"x": np.ones((4, 3)) / 2, "y": np.ones((4, 2)) / 2}


@pytest.mark.parametrize(
    "change, says",
    [
        ({"train_x": None, "tran_x": X}, "unknown array 'tran_x': did you mean 'train_x'?"),
        ({"train_label": X, "test_labels": X[:, 0]}, "'train_label' but no 'test_label': did you"),
        ({"test_x": None, "test_xx": X}, "'train_x' but no 'test_x': did you mean 'test_xx'?"),
        ({"train_split": X, "test_split": X}, "cannot be called 'split'"),
        ({"train_a,b": X, "test_a,b": X}, "cannot be called 'a,b'"),
        ({"train_y": None, "test_y": None}, "two modalities or more"),
        ({"train_y": X[:, 0]}, "train_y is to be (examples, features), or a class"),
        (
            {"train_y": np.array([0, 1, -1, 2]), "test_y": np.arange(4)},
            "train_y is to hold classes",
        ),
        ({"train_y": np.arange(4), "test_y": np.ones((4, 2), int)}, "does not fit"),
        ({"train_y": np.ones((4, 2), int) * 3, "test_y": TWO["y"]}, "counts, whole numbers from 0"),
        ({"train_y": np.ones((4, 2), int)}, "test_y is not 0 and 1 alone, unlike train_y"),
        ({"train_y": np.zeros((0, 2))}, "train_y is to be numbers"),
        ({"train_mask": np.array([[1, 0]] * 4)}, "no example to train with shows y"),
        ({"train_mask": np.array([[1, 1]] * 3)}, "train_mask (3, 2) does not have the 4 examples"),
        ({"test_mask": np.array([[1, 1]] * 4)}, "unknown array 'test_mask'"),
    ],
)
def test_what_is_wrong_with_an_array_is_said_in_a_sentence(change, says, tmp_path):
    with pytest.raises(ValueError) as error:
        data.load(saved(tmp_path / "bad.npz", TWO, **change))
    assert says in str(error.value) and "bad.npz" in str(error.value)
    assert "\n" not in str(error.value)


def fit(path, flags, out):
    """R² of y, the mean over its features, regenerated from x alone by a run of svae."""
    train("svae", *flags, dataset=path, out=out, epochs=60, batch_size=50, lr=3e-3, latent_dim=4)
    args = json.loads((out / "args.json").read_text())
    model = SCRIPTS["svae"].SVAE(nets.modalities(**args["spec"]), 4)
    model.load_state_dict(weights(out))
    constants = args["spec"].get("standardise", {})
    dataset = data.load(path, constants=constants)
    x, _ = dataset.test[torch.arange(len(dataset.test))]
    with torch.no_grad():
        found = model.decode(model.posterior(x, None).mean)[1]
    y = np.load(path)["test_y"]
    error = ((y - data.unstandardise(found, constants.get("y")).numpy()) ** 2).sum(0)
    return 1 - (error / ((y - y.mean(0)) ** 2).sum(0)).mean()


def test_features_around_1000_and_of_size_a_thousandth_train(tmp_path, capsys):
    rng, found = np.random.default_rng(1), {}
    turn = rng.normal(size=(2, 9))
    for part, n in (("train", 400), ("test", 200)):
        z = rng.normal(size=(n, 2)) @ turn + 0.1 * rng.normal(size=(n, 9))
        found |= {f"{part}_x": 1000 + 300 * z[:, :5], f"{part}_y": 1e-3 * z[:, 5:]}
    np.savez(tmp_path / "own.npz", **found)
    assert fit(tmp_path / "own.npz", [], tmp_path / "run") > 0.9
    assert fit(tmp_path / "own.npz", ["--no-standardise"], tmp_path / "raw") < 0.1


# --------------------------------------------------------------------------------- counts and classes


def test_counts_and_classes_have_the_probabilities_of_their_distributions():
    words = nets.own_array("words", (6,), "poisson")
    species = nets.own_array("species", (), "categorical", classes=4)
    x, rate = torch.poisson(3 * torch.rand(5, 6)), torch.randn(7, 5, 6)
    expected = Poisson(rate.exp()).log_prob(x).sum(-1)
    assert_close(nets.log_prob(words, rate, x), expected)  # (7, 5)
    assert_close(nets.mean(words, rate), rate.exp())
    x, logits = torch.tensor([0, 1, 2, 3, 1]), torch.randn(7, 5, 4)  # 1 is no padding here
    assert_close(nets.log_prob(species, logits, x), Categorical(logits=logits).log_prob(x))
    assert_close(nets.mean(species, logits), logits.softmax(-1))
    assert nets.log_prob(species, logits[0], x).shape == (5,)


def test_their_encoders_take_what_stands_in_for_a_missing_modality():
    words = nets.own_array("words", (6,), "poisson").encoder(3)
    counts = torch.tensor([[0, 1, 2, 3, 100, 1e6]])
    assert_close(nets.LogCounts()(counts), counts.log1p())
    u = torch.tensor([[-5.0, -1, -0.5, 0, 1, 2]], requires_grad=True)
    torch.cat(words(u)).sum().backward()
    assert u.grad.isfinite().all() and (u.grad != 0).all()
    one_hot = nets.OneHot(4)
    assert one_hot(torch.tensor([2, 0])).tolist() == [[0, 0, 1, 0], [1, 0, 0, 0]]
    logits = torch.randn(2, 4)
    assert_close(one_hot(logits), logits.softmax(-1))


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_model_trains_on_every_kind_and_with_any_of_them_missing(script, own):
    dataset = data.load(own)
    few = [m for m, name in enumerate(dataset.names) if name in ("table", "words", "species")]
    modalities = [nets.modalities(**dataset.spec)[m] for m in few]
    whole = dataset.train[torch.arange(8)]
    xs = [whole[m] for m in few]
    model = SCRIPTS[script].MODEL(modalities, 3)
    if script == "meme":
        model.start_pseudo([whole[m] for m in few])
        assert_close(model.pseudo[2][:8].argmax(-1), xs[2])  # a class as logits
    alone = [[x if k == m else None for k, x in enumerate(xs)] for m in range(3)]
    model([(1.0, xs), *((1.0, each) for each in alone)]).sum().backward()
    assert all(w.grad is None or w.grad.isfinite().all() for w in model.parameters())
    for each in (xs, *alone):
        z = model.posterior(*each).sample((2,))
        assert [x.shape for x in model.decode(z)] == [(2, 8, 4), (2, 8, 6), (2, 8, 4)]
        assert model.log_likelihood(*each, samples=3).isfinite().all()


def test_a_likelihood_that_cannot_be_is_refused_with_those_there_are():
    shapes = {"words": [6], "species": [], "photo": [3, 8, 8]}

    def asked(*kinds):  # fmt: skip
        return nets.modalities("npz", shapes, likelihoods=kinds, classes={"species": 4})

    assert [m.likelihood for m in asked("poisson", "categorical", "normal")][2] == "normal"
    for kinds, says in [
        (("poison", "categorical", "normal"), "did you mean poisson"),
        (("x", "categorical", "normal"), "bernoulli, laplace, normal, poisson, categorical"),
        (("categorical", "categorical", "normal"), "words cannot have the likelihood categorical"),
        (("poisson", "laplace", "normal"), "species cannot have the likelihood laplace"),
        (("poisson", "categorical", "poisson"), "photo cannot have the likelihood poisson"),
        (("poisson", "categorical"), "needs 3 values .words, species, photo., not 2"),
    ]:
        with pytest.raises(ValueError, match=says):
            asked(*kinds)
    with pytest.raises(ValueError, match="grey cannot have the likelihood poisson"):
        nets.modalities("glyphs", likelihoods=["poisson", "normal"])


# ---------------------------------------------------------------------- how a run is called, and ends


def folder_of(script, *flags):
    p, common = SCRIPTS[script].parser(list(flags))
    return str(SCRIPTS[script].run_folder(p, p.parse_args(list(flags)), common))


def test_another_setting_is_another_folder(own, tmp_path):
    usual = "runs/meme-glyphs-paired1-split-seed0"
    assert folder_of("meme") == folder_of("meme", "--epochs", "5", "--data", "x") == usual
    typed = "--lr 0.01 --batch-size 8 --epochs 1 --limit 300 --latent-dim 3 --sampling balanced"
    shown = "-limit=300-epochs=1-batch-size=8-lr=0.01-latent-dim=3-sampling=balanced"
    assert folder_of("meme", *typed.split()) == usual + shown
    more = "--weights 2,1 --likelihoods normal,laplace --width 0.5 --no-standardise"
    shown = "-likelihoods=normal,laplace-weights=2,1-width=0.5-no-standardise"
    assert folder_of("meme", *more.split()) == usual + shown
    named = folder_of("meme", "--kl", "sample", "--paired", "0.25", "--unpaired", "grey")
    assert named == "runs/meme-kl=sample-glyphs-paired0.25-grey-seed0"
    assert folder_of("svae", "--dataset", own) == "runs/svae-kinds-paired1-all-seed0"
    mask = saved(tmp_path / "m.npz", TWO, train_mask=np.ones((4, 2), bool))
    assert folder_of("svae", "--dataset", mask, "--seed", "2") == "runs/svae-m-masked-seed2"


def test_paths_hold_from_any_folder_and_so_does_the_command_at_the_end(tmp_path, monkeypatch):
    folder = tmp_path / "my data"
    folder.mkdir()
    monkeypatch.chdir(folder)
    saved(folder / "own.npz", TWO)
    command = [sys.executable, ROOT / "mvae.py", "--dataset", "own.npz", "--epochs", "1"]
    done = subprocess.run([*command, "--out", "a run"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    args = json.loads((folder / "a run" / "args.json").read_text())
    paths = args["dataset"], args["data"], args["out"]
    assert paths == tuple(str(folder / name) for name in ("own.npz", "data", "a run"))
    python, program, run = shlex.split(done.stdout.splitlines()[-1])
    assert python == "python" and Path(program).resolve() == ROOT / "eval.py"
    assert Path(run).resolve() == folder / "a run"
    monkeypatch.chdir(ROOT)
    assert data.command("eval.py", Path("runs/a")) == "python eval.py runs/a"


def test_a_run_from_before_there_was_standardisation_goes_on_as_it_was(
    arrays, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    flags = dict(dataset=arrays.name, batch_size=16)
    train("mvae", "--no-standardise", **flags, epochs=2, out="whole")
    train("mvae", "--no-standardise", **flags, epochs=1, out="old")
    args = json.loads(Path("old/args.json").read_text())
    assert "standardise" not in args["spec"] and not args.pop("standardise")
    Path("old/args.json").write_text(json.dumps(args | {"dataset": arrays.name, "data": "./data"}))
    train("mvae", **flags, epochs=2, out="old", resume=True)
    assert same(weights("old"), weights("whole"))


def test_a_run_goes_on_with_the_likelihoods_that_it_began_with(tmp_path):
    own = saved(tmp_path / "own.npz", {"x": ARRAYS["words"][0], "y": ARRAYS["bits"][0]})
    flags = dict(dataset=own, batch_size=16, out=tmp_path / "run")
    train("mvae", "--likelihoods", "laplace,bernoulli", **flags, epochs=1)
    args = json.loads((tmp_path / "run" / "args.json").read_text())
    args["likelihoods"] = None  # as if nothing had been asked for, before there were counts
    (tmp_path / "run" / "args.json").write_text(json.dumps(args))
    train("mvae", **flags, epochs=2, resume=True)
    assert json.loads((tmp_path / "run" / "args.json").read_text())["spec"] == args["spec"]
    refused("mvae", "--likelihoods", "poisson,bernoulli", **flags, epochs=3, resume=True)


def test_a_run_goes_on_with_the_constants_that_it_began_with(arrays, tmp_path):
    run, flags = tmp_path / "run", dict(dataset=arrays, batch_size=16, out=tmp_path / "run")
    train("mvae", **flags, epochs=1)
    args = json.loads((run / "args.json").read_text())
    args["spec"]["standardise"]["0"]["mean"][0] += 1e-16  # as another machine's sum may have it
    (run / "args.json").write_text(json.dumps(args))
    train("mvae", **flags, epochs=2, resume=True)
    assert json.loads((run / "args.json").read_text())["spec"] == args["spec"]
    refused("mvae", "--no-standardise", **flags, epochs=3, resume=True)


def test_a_run_that_is_done_says_so_and_one_that_is_not_there_names_the_likest(
    arrays, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    train("mvae", dataset=arrays, epochs=1)
    assert "nothing is left" not in capsys.readouterr().out
    train("mvae", dataset=arrays, epochs=1, resume=True)
    assert "nothing is left to do" in capsys.readouterr().out
    refused("mvae", dataset=arrays, epochs=2, resume=True)
    said = capsys.readouterr().err
    assert "did you mean 'runs/mvae-own-paired1-split-seed0-epochs=1'?" in said


@pytest.mark.parametrize(
    "typed, says",
    [
        ("--dataset glyph", "did you mean 'glyphs'?"),
        ("--dataset mnist-svnh", "did you mean 'mnist-svhn'?"),
        ("--unpaired gray --paired 0.5", "did you mean 'grey'?"),
        ("--direction color", "did you mean 'colour'?"),
        ("--likelihoods bernouli,laplace", "did you mean bernoulli?"),
        ("--sampling natrual", "did you mean 'natural'?"),
        ("--epcohs 3", "did you mean '--epochs'?"),
        ("--epcohs=3", "did you mean '--epochs'?"),
        ("--dataset qqq", "choose glyphs, mnist-split"),
    ],
)
def test_a_near_miss_is_asked_about(typed, says, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data.benchmark("glyphs"), "glyphs", lambda n, seed: SMALL)
    refused("meme", *typed.split())
    said = capsys.readouterr().err.splitlines()
    assert says in said[-1] and sum(not line.startswith("usage:") for line in said) == 1
    assert not list(tmp_path.iterdir())


SMALL = data.Split(
    [torch.rand(20, 1, 28, 28), torch.rand(20, 3, 32, 32)], labels=torch.arange(20) % 5
)


def test_a_run_ends_with_a_picture_of_test_examples_and_what_is_made_of_them(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(data.benchmark("glyphs"), "glyphs", lambda n, seed: SMALL)
    out = tmp_path / "run"
    train("mvae", epochs=1, batch_size=10, out=out)
    *_, line, command = capsys.readouterr().out.splitlines()
    rows = "grey, grey -> grey, grey -> colour, colour, colour -> colour, colour -> grey"
    assert line == f"{out / 'examples.png'} has rows of test examples: {rows}"
    with Image.open(out / "examples.png") as image:
        pixels = np.asarray(image)
    assert pixels.shape == (2 * (6 * 34 + 2), 2 * (5 * 34 + 2), 3)  # a column for each label
    for k in range(5):  # the first of each, enlarged
        tile = pixels[4 : 4 + 56 : 2, 4 + 68 * k : 4 + 68 * k + 56 : 2]
        assert abs(tile[..., 0] / 255 - SMALL.bases[0][k, 0].numpy()).max() < 0.003
        colour = pixels[4 + 3 * 68 : 68 * 4 : 2, 4 + 68 * k : 68 + 68 * k : 2]
        assert abs(colour / 255 - SMALL.bases[1][k].numpy().transpose(1, 2, 0)).max() < 0.003


def test_nothing_is_drawn_without_images_or_torchvision(arrays, own, tmp_path, capsys, monkeypatch):
    train("mvae", dataset=arrays, epochs=1, out=tmp_path / "a")
    assert "rows of test" not in capsys.readouterr().out
    monkeypatch.setitem(sys.modules, "torchvision.utils", None)
    train("mvae", dataset=own, epochs=1, out=tmp_path / "b")
    assert "rows of test" not in capsys.readouterr().out
    for run in ("a", "b"):
        assert len(list((tmp_path / run).iterdir())) == 3


def test_an_unwritable_folder_holds_nothing_to_go_on_with(arrays, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    refused("mvae", dataset=arrays, epochs=1, out=tmp_path / "file" / "run")
    said = capsys.readouterr().err
    assert "cannot be written" in said and "resume" not in said and "kept" not in said


def test_an_error_of_the_code_says_where_it_is(arrays, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(mvae.MVAE, "__init__", lambda self, *a, **k: int("x"))
    refused("mvae", dataset=arrays, out=tmp_path / "run")
    said = capsys.readouterr().err.splitlines()[-1]
    assert "invalid literal" in said and "ValueError from mvae.py, line " in said
    monkeypatch.undo()
    refused("mvae", dataset=arrays, subsets=9, out=tmp_path / "run")
    assert capsys.readouterr().err.endswith("subsets is an integer from 0 to 0, anneal from 0 on\n")


def helps():
    """What the programs print with --help."""
    for program in (*SCRIPTS.values(), data):
        with contextlib.redirect_stdout(io.StringIO()) as text, pytest.raises(SystemExit):
            program.main(["--help"])
        yield text.getvalue()


def test_help_explains_every_flag_and_shows_the_defaults_there_are():
    for text in helps():
        assert "default: None" not in text and "default: False" not in text
        assert "(default: ./data)" in text
    assert "(default: 0)" in text or "--seed" not in text
    for script in SCRIPTS.values():
        for action in script.parser([])[0]._actions:
            assert action.help and len(action.help) > 8, action.dest
    unpaired = set(data.UNPAIRED) | {*nets.LIKELIHOODS} | {*data.SAMPLING}
    assert all(f"\n  {word} " in data.TERMS for word in unpaired)


# ----------------------------------------------------------------------- compounds, features of birds


@pytest.mark.parametrize("unpaired", ["split", "a", "none"])
def test_a_group_is_paired_whole_or_not_at_all(unpaired):
    groups = torch.tensor([k % 30 for k in range(200)])
    streams = data.pairing(200, ("a", "b"), 0.5, unpaired, seed=3, groups=groups)
    again = data.pairing(200, ("a", "b"), 0.5, unpaired, seed=3, groups=groups)
    other = data.pairing(200, ("a", "b"), 0.5, unpaired, seed=4, groups=groups)
    assert all(torch.equal(x, y) for (_, x), (_, y) in zip(streams, again))
    assert not torch.equal(streams[0][1].sort()[0], other[0][1].sort()[0])
    members = [set(groups[index].tolist()) for _, index in streams]
    assert sum(map(len, members)) == len(set.union(*members))  # none is in two streams
    for found, (_, index) in zip(members, streams):
        assert len(index) == sum(int((groups == group).sum()) for group in found)
    assert abs(len(streams[0][1]) - 100) <= 4  # as near as groups of 7 allow
    if unpaired == "split":
        assert abs(len(streams[1][1]) - len(streams[2][1])) <= 8


def test_a_hidden_fingerprint_is_hidden_in_all_spectra_of_its_compound(tmp_path):
    pytest.importorskip("rdkit")
    peaks = ["57.07 100\n71.08 25", "60.1 3\n99.2 9", "61.1 3\n98.2 9"]
    (tmp_path / "a.msp").write_text("".join(record(s, p) for p in peaks for s in MOLECULES))
    spectra.prepare_spectra(tmp_path, tmp_path / "a.msp")
    dataset = data.load("spectra", tmp_path)
    assert torch.equal(dataset.groups, dataset.train.rows[1])
    assert len(data.load("spectra", tmp_path, limit=12).groups) == 12
    fixed = 1, dataset.mask, dataset.groups
    (_, pairs), (_, alone) = data.pairing(15, dataset.names, 0.5, "spectrum", *fixed)
    shown, hidden = (set(dataset.train.rows[1][index].tolist()) for index in (pairs, alone))
    assert (len(pairs), len(alone)) == (9, 6) and not shown & hidden


def test_groups_of_one_are_what_no_groups_are():
    alone = data.pairing(50, ("a", "b"), 0.3, "split", 1)
    assert [len(index) for _, index in alone] == [15, 18, 17]
    single = data.pairing(50, ("a", "b"), 0.3, "split", 1, groups=torch.arange(50))
    assert [len(index) for _, index in single] == [15, 18, 17]


@pytest.mark.parametrize("layout", [shi, originals])
def test_cub_takes_features_of_one_s_own_of_any_width(layout, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder = layout(tmp_path)
    files = cub.list_photos(folder, "train") + cub.list_photos(folder, "test")
    x = RNG.normal(size=(6, 5)).astype(np.float16) * 100
    np.savez("own.npz", x=x)
    data.main(["cub", "--data", ".", "--features", "own.npz"])
    assert "5 features per photo, from own.npz (MD5 " in capsys.readouterr().out
    dataset = data.load("cub", ".")
    wide = x.astype(np.float64)
    expected = (wide - wide[:4].mean(0)) / wide[:4].std(0)
    assert np.allclose(dataset.train.bases[0], expected[:4], atol=1e-5)
    assert np.allclose(dataset.test.bases[0], expected[4:], atol=1e-5)
    model = mvae.MVAE(nets.modalities(**dataset.spec), 2)
    assert model.decode(torch.zeros(3, 2))[0].shape == (3, 5)
    train("mvae", dataset="cub", data=".", epochs=1, batch_size=20, latent_dim=2, out="run")
    assert json.loads(Path("run/args.json").read_text())["note"] == dataset.note
    os.remove("cub/features.npz")
    order = RNG.permutation(6)  # named, they may be in any order, and in another folder
    names = np.array(["elsewhere/" + "/".join(Path(files[k]).parts[-2:]) for k in order])
    np.savez("named.npz", x=x[order], files=names)
    cub.prepare_cub(tmp_path, "from named.npz", features="named.npz")
    assert torch.equal(data.load("cub", ".").train.bases[0], dataset.train.bases[0])


@pytest.mark.parametrize(
    "arrays, says",
    [
        ({"y": np.ones((6, 2))}, "no array 'x'"),
        ({"x": np.ones(6)}, "is to be numbers, .photos, features."),
        ({"x": np.ones((5, 2))}, "features of 5 photos, there are 6: name them"),
        ({"x": np.ones((6, 2)), "files": np.array(["a/b.jpg"] * 6)}, "no features of 6 of the 6"),
        ({"x": np.ones((6, 2)), "files": np.arange(6)}, "a name for each row"),
        ({"x": np.full((6, 2), np.nan)}, "not finite"),
    ],
)
def test_features_that_do_not_fit_the_photos_are_refused(arrays, says, tmp_path, capsys):
    shi(tmp_path)
    np.savez(tmp_path / "own.npz", **arrays)
    with pytest.raises(SystemExit) as stopped:
        data.main(["cub", "--data", str(tmp_path), "--features", str(tmp_path / "own.npz")])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1
    assert re.search(says, error)
    assert not (tmp_path / "cub" / "features.npz").exists()
