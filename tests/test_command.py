"""python eval.py: its options, what it refuses, keeps and prints."""

import errno
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import data
import eval as metrics
from evaluation import command, figures, own, tables
from helpers import READERS, ROOT, SHAPES, Perfect, log_of, same, toy, train, weights

# ------------------------------------------------------------------------------- runs, trained once


def table_arrays(train_rows=60, test_rows=120):
    """Two tables that share z, and the labels; in the test split with other means and spreads."""
    rng, arrays = np.random.default_rng(0), {}
    for part, n, mean in (("train", train_rows, 0.0), ("test", test_rows, 0.7)):
        labels = rng.integers(3, size=n) if part == "train" else rng.integers(2, size=n)
        z = labels[:, None] + mean + 0.3 * rng.standard_normal((n, 1))
        arrays[f"{part}_labels"] = labels
        arrays[f"{part}_a"] = z + 0.5 * rng.standard_normal((n, 3))
        arrays[f"{part}_b"] = 5 - 2 * z + (1 + mean) * rng.standard_normal((n, 4))
    return arrays


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """here/own.npz and runs of mvae on it: run0, run1 with another seed, half with half of the
    pairs and seed 1, few with --limit 30."""
    root = tmp_path_factory.mktemp("trained")
    (root / "here").mkdir()
    np.savez(root / "here" / "own.npz", **table_arrays())
    flags = dict(dataset=root / "here" / "own.npz", latent_dim=2, epochs=2, lr=1e-2, batch_size=20)
    train("mvae", **flags, data=root, out=root / "run0")
    train("mvae", **flags, data=root, out=root / "run1", seed=1)
    train("mvae", **flags, data=root, out=root / "half", seed=1, paired=0.5)
    train("mvae", **flags, data=root, out=root / "few", limit=30)
    return root


@pytest.fixture
def folder(trained, tmp_path):
    """A copy of these files."""
    shutil.copytree(trained, tmp_path / "runs")
    return tmp_path / "runs"


def evaluate(*arguments, likelihoods=False):
    command.main(
        [*map(str, arguments), "--device", "cpu"] + ["--no-likelihoods"] * (not likelihoods)
    )


def stopped(*arguments, **options):
    """`evaluate` ends with exit code 2."""
    with pytest.raises(SystemExit) as stop:
        evaluate(*arguments, **options)
    assert stop.value.code == 2


def read(run):
    return json.loads((run / "metrics.json").read_text(encoding="utf-8"))


def rows_of(text):
    """The rows of MVAE in the tables of a text, as lists of cells."""
    rows = [line for line in text.splitlines() if line.startswith("| MVAE")]
    return [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows]


# ------------------------------------------------------------------------------------ metrics.json


def test_metrics_json_says_what_was_evaluated(folder):
    evaluate(folder / "half", "--samples", 7, likelihoods=True)
    found, log = read(folder / "half"), log_of(folder / "half")
    assert found["run"] == json.loads((folder / "half" / "args.json").read_text())
    assert found["folder"] == str(folder / "half") and found["epoch"] == 2
    assert found["minutes"] == pytest.approx(sum(row["seconds"] for row in log) / 60)
    assert (found["samples"], found["examples"]) == (7, 100)
    assert found["oracle"] == {} and found["prior"] and not found["pseudo"]
    assert found["data"] == found["run"]["dataset"]
    assert set(found["log_likelihood"]) == {"a", "b", "a,b", "a|b", "b|a"}


def test_baselines_see_the_pairs_of_the_runs_own_seed(folder):
    evaluate(folder / "half")
    arrays, scores = table_arrays(), {}
    for seed in (0, 1):
        streams = data.pairing(60, ("a", "b"), paired=0.5, seed=seed)
        for m, name in enumerate("ab"):
            rows = np.concatenate([index.numpy() for mask, index in streams if mask[m]])
            x, mean = arrays[f"test_{name}"], arrays[f"train_{name}"][rows].mean(0)
            ratio = ((x - mean) ** 2).sum(0) / ((x - x.mean(0)) ** 2).sum(0)
            scores[seed, name] = 1 - ratio.mean()
    for name in "ab":
        found = read(folder / "half")["regenerated_r2"][f"training mean->{name}"]
        assert found == pytest.approx(scores[1, name], abs=1e-5)
        assert abs(found - scores[0, name]) > 1e-3


def test_the_seed_of_eval_is_that_of_all_its_samples(folder):
    evaluate(folder / "run0", "--seed", 3, "--samples", 5, likelihoods=True)
    run, dataset = command.load_run(folder / "run0"), data.load(str(folder / "here" / "own.npz"))
    torch.manual_seed(3)
    expected = own.evaluate(run.model, dataset, 3, dataset.streams())
    expected |= metrics.latent_accuracy(run.model, dataset)
    expected |= metrics.log_likelihoods(run.model, dataset, 100, 5)
    found = read(folder / "run0")
    assert {key: found[key] for key in expected} == tables.finite(expected)
    evaluate(folder / "run0", "--seed", 4)
    assert read(folder / "run0")["regenerated_r2"] != found["regenerated_r2"]


SIZES = {(): (100, 1000), ("--full",): (120, 1000), ("--samples", 9): (100, 9)}


@pytest.mark.parametrize("flags, expected", SIZES.items())
def test_likelihoods_are_of_as_many_examples_and_samples(folder, monkeypatch, flags, expected):
    calls = []
    monkeypatch.setattr(command, "log_likelihoods", lambda *x: calls.append(x[2:]) or {})
    evaluate(folder / "run0", *flags, likelihoods=True)
    assert calls == [(*expected, ("a", "b"))]
    assert (read(folder / "run0")["examples"], read(folder / "run0")["samples"]) == expected
    evaluate(folder / "run0", *flags)
    assert len(calls) == 1


def test_each_run_is_evaluated_with_its_own_limit(folder):
    alone = {}
    for name in ("run0", "few"):
        evaluate(folder / name)
        alone[name] = read(folder / name)
    evaluate(folder / "run0", folder / "few")
    for name, expected in alone.items():
        assert read(folder / name) == expected
    means = [alone[name]["regenerated_r2"]["training mean->a"] for name in alone]
    assert abs(means[0] - means[1]) > 1e-3  # of 60 and of 30 rows


def test_a_loaded_run_is_in_eval_mode(folder):
    run = command.load_run(folder / "run0")
    assert not any(module.training for module in run.model.modules())
    assert same(run.model.state_dict(), weights(folder / "run0"))


# -------------------------------------------------------------------------- what data sets are judged by


class Stub(Perfect):
    def trained_priors(self, masks):
        return ("mnist",) if (True, False) in [tuple(mask) for mask in masks] else ()


def sections(dataset, oracles, monkeypatch, model="MVAE", ratios=True, **options):
    """command.evaluate with stubs for all metrics. -> its sections, the calls"""
    calls = {}
    judged = ("split_accuracy", "coherence", "joint_coherence")

    def metric(name):
        def call(model, *arguments, **_):
            assert not model.training
            calls[name] = (*arguments, torch.rand(1).item())
            return ({name: 1}, {name: 0.5}) if name in judged else {name: 1}

        return call

    for name in (*judged, "mutual_information", "latent_accuracy", "log_likelihoods"):
        monkeypatch.setattr(command, name, metric(name))
    monkeypatch.setattr(command.latent, "posterior_distances", metric("posterior_distances"))
    monkeypatch.setattr(command.latent, "gradient_ratios", metric("gradient_ratios"))
    for section in ("w2_overlap", "signal_to_noise"):
        monkeypatch.setattr(command.latent, section, lambda found: found)
    if not ratios:
        monkeypatch.setattr(command.latent, "gradient_ratios", lambda *_: {})
    monkeypatch.setattr(own, "evaluate", metric("regenerated"))
    extra = command.Extra(metric("spectra"), draw=None)
    monkeypatch.setitem(command.EXTRAS, "spectra", extra)
    args = {"model": model, "paired": 0.5, "unpaired": "mnist", "seed": 1}
    run = SimpleNamespace(model=Stub(SHAPES).train(), args=args)
    benchmark = command.Benchmark(dataset, oracles, {}, "there")
    return command.evaluate(run, benchmark, **options), calls


def test_digits_are_judged_by_oracles(monkeypatch):
    dataset = toy(n=20)
    found, calls = sections(dataset, READERS, monkeypatch, examples=7, samples=8, seed=9)
    every = ["coherence", "joint_coherence", "mutual_information", "latent_accuracy"]
    assert sorted(found) == sorted([*every, "log_likelihoods", "disagreement", "w2_overlap"])
    assert found["disagreement"] == {"coherence": 0.5, "joint_coherence": 0.5}
    for name in every[:3]:
        assert calls[name][:2] == (dataset, READERS)
    likelihoods = (dataset, 7, 8, ("mnist",))  # of the priors that are trained
    assert calls["log_likelihoods"][:-1] == likelihoods
    torch.manual_seed(9)
    assert calls["coherence"][-1] == torch.rand(1).item()


def test_distances_and_gradients_leave_the_random_numbers_of_other_metrics(monkeypatch):
    dataset = toy(n=20)
    found, calls = sections(dataset, READERS, monkeypatch, model="MEME", seed=9)
    assert found["w2_overlap"] == {"posterior_distances": 1}
    assert found["signal_to_noise"] == {"gradient_ratios": 1}
    names = ["coherence", "joint_coherence", "mutual_information", "latent_accuracy"]
    last = ["posterior_distances", "gradient_ratios"]
    assert list(calls) == [*names, "log_likelihoods", *last]
    torch.manual_seed(9)
    expected = [torch.rand(1).item() for _ in range(5)]
    assert [call[-1] for call in calls.values()] == [*expected, *expected[:2]]
    _, fewer = sections(dataset, READERS, monkeypatch, model="MEME", seed=9, examples=0)
    assert [fewer[name] for name in last] == [calls[name] for name in last]
    assert all(calls[name][:1] == (dataset,) for name in last)


@pytest.mark.parametrize("model, ratios", [("MMVAE", True), ("MEME", False)])
def test_the_signal_to_noise_is_of_meme_and_of_gradients(monkeypatch, model, ratios):
    found, _ = sections(toy(n=20), READERS, monkeypatch, model=model, ratios=ratios)
    assert "signal_to_noise" not in found and "w2_overlap" in found


def test_a_split_image_is_judged_as_a_whole(monkeypatch):
    dataset, oracles = toy("mnist-split", n=20), {"image": None}
    found, calls = sections(dataset, oracles, monkeypatch, model="MEME", examples=0)
    assert sorted(found) == ["disagreement", "latent_accuracy", "split_accuracy"]
    assert found["disagreement"] == {"split_accuracy": 0.5}


def test_own_arrays_are_regenerated_with_the_streams_of_training(monkeypatch):
    dataset = toy(n=20)._replace(name="own.npz", views={})
    found, calls = sections(dataset, {}, monkeypatch, examples=0, seed=9)
    assert sorted(found) == ["latent_accuracy", "regenerated"]
    assert calls["regenerated"][:2] == (dataset, 9)
    streams = dataset.streams(0.5, "mnist", 1)
    for (mask, index), (other, rows) in zip(calls["regenerated"][2], streams, strict=True):
        assert mask == other and torch.equal(index, rows)
    bare = dataset._replace(test=data.Split(dataset.test.bases))
    assert list(sections(bare, {}, monkeypatch, examples=0)[0]) == ["regenerated"]


@pytest.mark.parametrize("values", [200, 201])
def test_more_label_values_than_200_are_not_classified(monkeypatch, capsys, values):
    dataset = toy(n=402)._replace(name="own.npz", views={})
    dataset.train.labels = torch.arange(402) % values
    found, _ = sections(dataset, {}, monkeypatch, examples=0)
    assert ("latent_accuracy" in found) == (values == 200)
    assert ("more than 200 values of labels" in capsys.readouterr().err) == (values == 201)


def test_metrics_of_a_data_sets_own_replace_all_others(monkeypatch):
    dataset = toy(n=20)._replace(name="spectra", views={})
    found, calls = sections(dataset, {}, monkeypatch, seed=9)
    assert found == {"spectra": 1} and calls["spectra"][:-1] == (dataset, "there", 9)


@pytest.mark.parametrize("likelihood", ["bernoulli", "normal"])
@pytest.mark.parametrize("kind", ["bytes", "greys", "bits"])
def test_a_bernoulli_of_greys_is_a_pseudo_likelihood(monkeypatch, likelihood, kind):
    monkeypatch.setattr(command, "evaluate", lambda *_: {})
    model, args = Stub(SHAPES), {"paired": 1.0, "unpaired": "split", "seed": 0}
    model.modalities = [SimpleNamespace(likelihood=likelihood, kind=kind)]
    run = command.Run(Path("run"), args, 1, 1.0, model, [])
    found = command.metrics_json(run, command.Benchmark(toy(n=4), {}, {}, "data"))
    assert found["pseudo"] == (likelihood == "bernoulli" and kind != "bits")
    assert not found["prior"]  # pairs alone
    assert (found["data"], found["examples"]) == ("mnist-svhn", 2)


# ----------------------------------------------------------------------------------- a run counts once


def test_a_run_in_a_file_and_as_a_folder_counts_once(folder, capsys, monkeypatch):
    saved = folder / "all.jsonl"
    evaluate(folder / "run0", "--save", saved)
    line = saved.read_text()
    (folder / "twice.jsonl").write_text(line + "\n" + line + "\n")
    shutil.copytree(folder / "run0", folder / "copy")
    monkeypatch.chdir(folder)
    for runs, evaluated in (
        (["twice.jsonl"], 0),
        ([saved, "run0"], 1),
        (["run0", folder / "run0", "run0/../run0"], 1),
        (["run0", "copy"], 2),
    ):
        capsys.readouterr()
        evaluate(*runs)
        out, err = capsys.readouterr()
        row = rows_of(out)[0]
        assert row[4] == "1" and "±" not in "".join(row) and err.count("evaluating") == evaluated


def test_a_saved_run_is_appended_or_replaces_its_line(folder):
    saved = folder / "results" / "own.jsonl"
    for run in ("run0", "run1"):
        evaluate(folder / run, "--save", saved)
    first = [json.loads(line) for line in saved.read_text().splitlines()]
    assert [r["folder"] for r in first] == ["run0", "run1"]
    logs = [[row["log_p_a"] for row in log] for log in (first[0]["log"], log_of(folder / "run0"))]
    assert logs[0] == logs[1]
    written = read(folder / "run0")
    assert written.pop("folder") == str(folder / "run0")
    assert written == {key: x for key, x in first[0].items() if key not in ("log", "folder")}
    evaluate(folder / "run0", "--seed", 1, "--save", saved)
    again = [json.loads(line) for line in saved.read_text().splitlines()]
    assert [r["folder"] for r in again] == ["run0", "run1"] and again[1] == first[1]
    assert again[0]["regenerated_r2"] != first[0]["regenerated_r2"]


def test_the_same_data_at_two_places_share_a_row(folder, capsys):
    (folder / "there").mkdir()
    shutil.copy(folder / "here" / "own.npz", folder / "there" / "own.npz")
    args = json.loads((folder / "run1" / "args.json").read_text())
    args["dataset"] = str(folder / "there" / "own.npz")
    (folder / "run1" / "args.json").write_text(json.dumps(args))
    evaluate(folder / "run0", folder / "run1")
    printed = capsys.readouterr().out
    first = rows_of(printed)[0]
    assert first[:5] == ["MVAE", "1", "split", "2", "2"] and first[5].count("±") == 1
    assert len(rows_of(printed)) == 2  # of the predictions and of the latent accuracy


# --------------------------------------------------------------------- refused before the work is done


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (["--save", "results.json"], "--save must end in .jsonl, not results.json"),
        (["--save", "file/results.jsonl"], "file"),
        (["--save", "broken.jsonl"], "broken.jsonl cannot be read as results"),
        (["--figures", "file"], "file"),
        (["--fill", "new.npz"], "--fill NEW.npz and --out FILLED.npz must be given together"),
        (["--out", "filled.npz"], "--fill NEW.npz and --out FILLED.npz must be given together"),
        (["run", "--fill", "a.npz", "--out", "b.npz"], "--fill must be given one run, not 2"),
        (["--reconstruct"], "--reconstruct belongs to --fill"),
        (["--interval", "1"], "--interval must be between 0 and 1, not 1.0"),
        (["--interval", "0"], "--interval must be between 0 and 1, not 0.0"),
        (["--samples", "0"], "--samples: must be a whole number above 0, not 0"),
        (["--device", "nowhere"], "--device nowhere is not available here"),
    ],
)
def test_what_can_be_refused_is_refused_at_once(flags, sentence, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "load_run", None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("no folder")
    (tmp_path / "broken.jsonl").write_text('{"run": ')
    with pytest.raises(SystemExit) as stop:
        command.main(["some-run", *flags])
    assert stop.value.code == 2 and sentence in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken.jsonl", "file"]


def test_without_matplotlib_nothing_is_evaluated(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command, "load_run", None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    stopped("some-run", "--figures", tmp_path)
    assert "pip install matplotlib" in capsys.readouterr().err


def edit(name, change):
    return lambda run: (run / name).write_bytes(change((run / name).read_bytes()))


def swap(old, new):
    return edit("args.json", lambda content: content.replace(old, new))


DAMAGE = {
    "no folder": (shutil.rmtree, "holds no run"),
    "cut checkpoint": (edit("checkpoint.pt", lambda content: content[:1000]), "cannot be read"),
    "cut args": (edit("args.json", lambda content: content[:40]), "cannot be read"),
    "other networks": (swap(b'"latent_dim": 2', b'"latent_dim": 5'), "cannot be loaded"),
    "unknown script": (swap(b'"mvae"', b'"nope"'), "no run of meme"),
    "moved data": (swap(b"own.npz", b"gone.npz"), "--dataset NEW.npz says where it lies now"),
    "other data": (swap(b'"digest": "', b'"digest": "0'), "does not hold the data"),
    "other kinds": (swap(b'"note": "', b'"note": "no '), "does not hold the data"),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_a_bad_run_leaves_the_others(folder, capsys, how):
    damage, sentence = DAMAGE[how]
    damage(folder / "run0")
    stopped(folder / "run0", folder / "run1")
    out, err = capsys.readouterr()
    assert sentence in err.splitlines()[-1]
    assert rows_of(out) and (folder / "run1" / "metrics.json").exists()
    assert not (folder / "run0" / "metrics.json").exists()


def test_a_moved_npz_is_found_by_dataset(folder):
    (folder / "here").rename(folder / "there")
    evaluate(folder / "run0", "--dataset", folder / "there" / "own.npz")
    found = read(folder / "run0")
    assert found["data"] == str(folder / "there" / "own.npz")


def test_help_tells_what_each_flag_does():
    assert all(flag.help for flag in command.parser()._actions)


@pytest.mark.parametrize("typed, root", [(None, "of training"), ("there", "there")])
@pytest.mark.parametrize("views, limits", [({}, [3]), ({"image": (0,)}, [3, None])])
def test_data_and_limit_are_those_of_the_run(monkeypatch, typed, root, views, limits):
    calls = []

    def load(name, root, limit, **facts):
        assert facts == {key: args[key] for key in ("likelihoods", "standardise", "spec")}
        calls.append((name, root, limit))
        return toy(n=4)._replace(views=views)

    monkeypatch.setattr(data, "load", load)
    args = {"dataset": "mnist-svhn", "data": "of training", "limit": 3, "note": "", "digest": ""}
    args |= {"likelihoods": ["laplace"], "standardise": False, "spec": {"name": "mnist-svhn"}}
    run = command.Run(Path("run"), args, 1, 1.0, None, [])
    where = command.place(run, SimpleNamespace(dataset=None, data=typed))
    command.load_dataset(run, *where, "cpu")
    assert calls == [("mnist-svhn", root, limit) for limit in limits]  # oracles see all images


# ----------------------------------------------------------------------- nothing computed is lost


def test_numbers_are_printed_where_metrics_json_cannot_be_kept(folder, capsys):
    (folder / "run0" / "metrics.json").mkdir()
    stopped(folder / "run0", "--save", folder / "all.jsonl")
    out, err = capsys.readouterr()
    saved = tables.read_results(folder / "all.jsonl")
    assert f"{saved[0]['regenerated_r2']['a->b']:.3f}" in out
    assert f"{folder / 'run0' / 'metrics.json'} cannot be written" in err.splitlines()[-1]


def test_a_full_disk_is_named(folder, capsys, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    stopped(folder / "run0", "--save", folder / "all.jsonl")
    out, err = capsys.readouterr()
    assert "a → b" in out
    for path in (folder / "run0" / "metrics.json", folder / "all.jsonl"):
        assert f"{path} cannot be written: No space left on device" in err


def failing(error):
    """command.evaluate, but for the run with seed 1."""
    whole = command.evaluate

    def evaluate_one(run, *arguments):
        if run.args["seed"] == 1:
            raise error
        return whole(run, *arguments)

    return evaluate_one


@pytest.mark.parametrize("text", ["can't allocate memory", "CUDA out of memory", ""])
def test_lack_of_memory_leaves_the_other_runs(folder, capsys, monkeypatch, text):
    error = RuntimeError(text) if text else MemoryError()
    monkeypatch.setattr(command, "evaluate", failing(error))
    stopped(folder / "run1", folder / "run0")
    out, err = capsys.readouterr()
    assert len(rows_of(out)) == 2 and "there is not enough memory" in err.splitlines()[-1]


@pytest.mark.parametrize(
    "error, stop", [(KeyError("a fault"), KeyError), (KeyboardInterrupt(), SystemExit)]
)
def test_numbers_are_printed_before_the_end(folder, capsys, monkeypatch, error, stop):
    monkeypatch.setattr(command, "evaluate", failing(error))
    with pytest.raises(stop) as ended:
        evaluate(folder / "run0", folder / "run1")
    assert rows_of(capsys.readouterr().out)
    assert stop is KeyError or ended.value.code == 130


def test_figures_are_drawn_of_each_run_after_the_numbers(folder, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    calls, several = [], []

    def draw(run, dataset, oracles, path, seed, streams):
        assert "MVAE" in capsys.readouterr().out or calls
        calls.append((run.folder, len(dataset.test), oracles, path, seed, streams[0][1]))
        if run.folder.name == "run0":
            raise MemoryError("too large")
        return ["rows"], []

    def draw_results(results, pages, path, against):
        several.append((len(results), pages, path, against))
        return []

    monkeypatch.setattr(figures, "draw", draw)
    monkeypatch.setattr(figures, "draw_results", draw_results)
    where = folder / "new" / "figures"
    stopped(folder / "run0", folder / "half", "--figures", where, "--against", "batch-size")
    assert [call[:4] for call in calls] == [
        (folder / name, 120, {}, where) for name in ("run0", "half")
    ]
    pairs = data.pairing(60, ("a", "b"), paired=0.5, seed=1)[0][1]
    assert torch.equal(calls[1][5], pairs)
    assert several == [(2, {str(folder / "half"): ["rows"]}, where, "batch_size")]
    assert "there is not enough memory" in capsys.readouterr().err.splitlines()[-1]


def test_figures_of_a_data_sets_own_are_drawn(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    calls = []
    extra = command.Extra(
        evaluate=None,
        draw=lambda run, dataset, root, path: calls.append((dataset.name, root, path)),
        compare=lambda results, path: calls.append((len(results), path)),
        notes=lambda results: [f"notes of {len(results)}"],
    )
    monkeypatch.setitem(command.EXTRAS, "spectra", extra)
    monkeypatch.setattr(figures, "draw", lambda *_: (None, []))
    benchmark = command.Benchmark(toy(n=4)._replace(name="spectra"), {}, {}, "there")
    args = {"paired": 1, "unpaired": "split", "seed": 0}
    run = command.Run(tmp_path / "one", args, 1, 1.0, Stub(SHAPES), [])
    command.draw(run, benchmark, tmp_path, seed=0)
    evaluate(ROOT / "results" / "spectra.jsonl", "--figures", tmp_path)
    top_k = (18, tmp_path / "spectra-top-k.png")
    assert calls == [("spectra", "there", tmp_path / "one-generation.png"), top_k]
    assert "\nnotes of 18\n" in capsys.readouterr().out


def test_results_alone_give_a_table_and_curves(folder, capsys):
    pytest.importorskip("matplotlib")
    evaluate(folder / "run0", folder / "half", "--save", folder / "all.jsonl")
    table = capsys.readouterr().out
    for name in ("run0", "half"):
        (folder / name / "checkpoint.pt").unlink()
    for runs in ([folder / "run0", folder / "half"], [folder / "all.jsonl"]):
        evaluate(*runs, "--figures", folder / "figures")
        assert capsys.readouterr().out == table
    assert [path.name for path in (folder / "figures").iterdir()] == ["own-paired.png"]


def test_against_is_a_flag_with_numbers(folder, capsys):
    pytest.importorskip("matplotlib")
    evaluate(folder / "run0", "--save", folder / "all.jsonl")
    stopped(folder / "all.jsonl", "--figures", folder / "figures", "--against", "unpaired")
    assert "--against" in capsys.readouterr().err.splitlines()[-1]


# ------------------------------------------------------------------------------------------- --fill


def fill_rows(folder, *flags, **arrays):
    np.savez(folder / "rows.npz", **arrays)
    evaluate(folder / "run0", "--fill", folder / "rows.npz", "--out", folder / "out.npz", *flags)


def test_fill_gets_its_options(folder, monkeypatch, capsys):
    calls = []

    def fill(model, path, out, **options):
        calls.append((path, out, options))
        filled = {"a": (1, 1200, 2), "7": (0, 0, 0)}
        return {k: SimpleNamespace(cells=x, rows=y, unseen=z) for k, (x, y, z) in filled.items()}

    monkeypatch.setattr(command.fill, "check", lambda model, path, out: None)
    monkeypatch.setattr(command.fill, "fill", fill)
    fill_rows(folder)
    fill_rows(folder, "--samples", 3, "--reconstruct", "--seed", 4, "--interval", 0.5)
    assert [call[:2] for call in calls] == [(folder / "rows.npz", folder / "out.npz")] * 2
    assert len(calls[0][2].pop("dataset").test) == 120
    assert calls[0][2] == dict(draws=None, reconstruct=False, seed=0, level=0.9)
    assert calls[1][2] == dict(draws=3, reconstruct=True, seed=4, level=0.5, dataset=None)
    out = capsys.readouterr().out
    assert "a: 1 value in 1,200 rows; 2 stay NaN" in out and "7: 0 values in 0 rows\n" in out


def test_without_the_runs_data_there_are_no_intervals(folder, capsys):
    swap(b"own.npz", b"gone.npz")(folder / "run0")
    fill_rows(folder, a=np.zeros((2, 3)))
    assert "no intervals, since they need the run's data" in capsys.readouterr().err
    assert sorted(np.load(folder / "out.npz")) == ["a", "b", "latent_mean", "latent_std"]


def test_an_unsuitable_file_is_refused_before_data_are_read(folder, monkeypatch):
    monkeypatch.setattr(data, "load", None)
    with pytest.raises(SystemExit):
        fill_rows(folder, c=np.zeros((2, 3)))


# ------------------------------------------------------------------------------- progress, encodings


def test_progress_is_said_every_few_seconds(monkeypatch, capsys):
    assert command.Progress.first <= 5 and command.Progress.later <= 5
    monkeypatch.setattr(command.Progress, "first", 0.05)
    monkeypatch.setattr(command.Progress, "later", 0.01)
    times = itertools.chain([100.0, 104.0, 110.0], itertools.repeat(110.0))
    monkeypatch.setattr(command, "time", SimpleNamespace(perf_counter=lambda: next(times)))
    with command.Progress("reading") as report:
        time.sleep(0.3)
        report(0.25)
        time.sleep(0.3)
    lines = capsys.readouterr().err.splitlines()
    assert lines[:3] == ["reading ...", "reading: 4 s so far", "reading: 10 s so far"]
    assert lines[-1] == "reading: 25% done, 30 s left"  # 3 times 10 s
    time.sleep(0.1)
    assert not capsys.readouterr().err


def test_training_of_oracles_reports_its_share(tmp_path, monkeypatch):
    asked, reports = [], []

    class Said(command.Progress):
        def report(self, share):
            reports.append(share)

    def load_oracle(dataset, view, root, images, report):
        asked.append((view, root, images))
        report(0.5)
        return f"oracle of {view}", 0.9

    monkeypatch.setattr(command, "Progress", Said)
    monkeypatch.setattr(command.oracles, "load_oracle", load_oracle)
    monkeypatch.setattr(command, "load_dataset", lambda *_: toy(n=4))
    found = command.load_benchmark(None, "mnist-svhn", tmp_path, "cpu")
    images = command.oracles.image_digest(toy(n=4))
    assert asked == [("mnist", tmp_path, images), ("svhn", tmp_path, images)]
    assert found.oracles == {"mnist": "oracle of mnist", "svhn": "oracle of svhn"}
    assert found.accuracies == {"mnist": 0.9, "svhn": 0.9} and reports == [0.5, 0.5]


def test_any_terminal_and_locale_shows_the_metrics(folder):
    evaluate(folder / "run0")
    file = folder / "run0" / "metrics.json"
    text = file.read_text(encoding="utf-8").replace("own.npz", "größe.npz")
    file.write_text(text, encoding="utf-8")
    (folder / "run0" / "checkpoint.pt").unlink()
    locale = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "eval.py"), str(folder / "run0")],
        env=os.environ | locale | {"PYTHONIOENCODING": "cp1252", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        check=True,
    )
    printed = done.stdout.decode("cp1252")
    assert "größe.npz" in printed and "a ? b" in printed  # cp1252 has no arrow
