"""Runs: the loop against a plain loop written out here, runs that are killed and resumed, what
stops them, and mistakes of a user. `pytest -m slow` kills at every moment."""

import copy
import io
import itertools
import json
import math
import os
import pickle
import re
import runpy
import shlex
import signal
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import data
import nets
from helpers import ROOT, SCRIPTS, checkpoint, content, ended, error_of, every_pattern, forked
from helpers import free_port, images, log_of, refused, same, train, user_arrays, weights

MODELS = pytest.mark.parametrize("script", SCRIPTS)
FILES = ["args.json", "checkpoint.pt", "log.csv"]


def files_of(run):
    return sorted(path.name for path in run.iterdir())


# ---------------------------------------------------------- the loop, and the same loop written out

OPTIONS = {
    "meme": dict(samples=3, pseudo_samples=16),
    "svae": dict(experts="exact"),
    "vaevae": dict(variant="a"),
    "mmvae": dict(samples=3),
    "mvae": dict(anneal=2),
}
FLAGS = dict(paired=0.5, unpaired="split", sampling="natural", batch_size=64, epochs=3, seed=7)
FLAGS |= dict(lr=3e-3, decay=0.5, clip=2, latent_dim=3, weights="2,0.5")
OTHERS = dict(paired=0.25, unpaired="all", sampling="balanced", batch_size=96, epochs=2, seed=3)
OTHERS |= dict(lr=1e-3, decay=0, clip=0, latent_dim=2, likelihoods="laplace,bernoulli")
RATES = {3: (3e-3, 3e-3, 2e-3), 2: (1e-3, 1e-3)}  # in the last 1.5 of 3 epochs the rate falls


@pytest.fixture
def own(tmp_path):
    """An .npz whose 600 examples are more than log.csv looks at and no multiple of a batch."""
    np.savez(tmp_path / "own.npz", **user_arrays((600, 20), noise=0.3, seed=1))
    return tmp_path / "own.npz"


@pytest.fixture
def batchnorm(monkeypatch):
    """The networks of an .npz have BatchNorm: training and evaluation mode differ."""
    for name in ("mlp_encoder", "mlp_decoder"):
        monkeypatch.setattr(nets, name, partial(getattr(nets, name), norm=True))


@pytest.fixture
def clock(monkeypatch):
    """A clock that only training steps move, by clock.step seconds each."""
    clock, batches = SimpleNamespace(now=1000.0, step=0.4), data.batches

    def timed(*args):
        for batch in batches(*args):
            clock.now += clock.step
            yield batch

    monkeypatch.setattr(data, "batches", timed)
    for script in SCRIPTS.values():
        time = SimpleNamespace(perf_counter=lambda: clock.now)
        monkeypatch.setattr(script, "time", time)
    return clock


def plain_loop(script, path, flags, world=1, **more):
    """The run of these flags, step by step. more: how data.load reads the .npz.
    -> model, optimizer, the rows of its log"""
    f, dataset = SimpleNamespace(**flags), data.load(path, **more)
    streams = data.pairing(
        len(dataset.train), dataset.names, f.paired, f.unpaired, f.seed, dataset.mask
    )
    torch.manual_seed(f.seed)
    factors = [float(factor) for factor in flags.get("weights", "1,1").split(",")]
    modalities = nets.modalities(**dataset.spec, weights=factors if "weights" in flags else None)
    model, log = SCRIPTS[script].MODEL(modalities, f.latent_dim, **OPTIONS[script]), []
    optimizer = torch.optim.Adam(model.parameters(), lr=f.lr, fused=True)
    if script == "meme":
        model.init_pseudo_samples(dataset.train.distinct_examples(streams, 16))
    ranks = [model] + [copy.deepcopy(model) for _ in range(1, world)]
    for epoch in range(1, f.epochs + 1):
        seed, noise, batches = 1_000_003 * f.seed + epoch, [], []
        total, examples = [0.0] * world, 0
        for rank, replica in enumerate(ranks):
            torch.manual_seed(4_099 * seed + rank)
            noise.append(torch.get_rng_state())
            order = torch.Generator().manual_seed(seed)
            size = f.batch_size, f.sampling, order, rank, world
            batches.append(data.batches(dataset.train, streams, *size))
            if script == "mvae":
                replica.start_epoch(epoch)
        optimizer.param_groups[0]["lr"] = RATES[f.epochs][epoch - 1]
        for steps, step in enumerate(zip(*batches, strict=True), 1):
            for replica in ranks[1:]:  # weights, and rank 0's BatchNorm statistics
                replica.load_state_dict(model.state_dict())
            for rank, (replica, batch) in enumerate(zip(ranks, step)):
                torch.set_rng_state(noise[rank])
                loss = replica(batch)
                replica.zero_grad()
                loss.sum().backward()
                noise[rank] = torch.get_rng_state()
                total[rank] += loss.sum().detach()
                examples += sum(len(next(x for x in xs if x is not None)) for _, xs in batch)
            for same_weight in zip(*(replica.parameters() for replica in ranks)):
                gradients = [w.grad for w in same_weight if w.grad is not None]
                same_weight[0].grad = sum(gradients) / world if gradients else None
            if f.clip:
                nn.utils.clip_grad_norm_(model.parameters(), f.clip)
            optimizer.step()

        torch.set_rng_state(noise[0])
        row = {"epoch": epoch, "objective": -sum(total).item() / world / steps}
        model.eval()
        with torch.no_grad():
            mask, index = streams[0]
            xs = data.select(dataset.train, mask, index[:256])
            model.objective(*xs)  # is checked; its noise comes first
            z = model.posterior(*xs).sample()
            for m, decoder, x in zip(modalities, model.decoders, xs):
                row[f"log_p_{m.name}"] = nets.log_prob(m, decoder(z), x).mean().item()
        model.train()
        log.append(row | {"examples": examples, "seconds": 0.4 * steps})
    return model, optimizer, log


def assert_is(run, model, optimizer, log):
    """Weights, BatchNorm statistics and the optimizer to the bit, and every column of the log."""
    state, expected = checkpoint(run), optimizer.state_dict()
    assert same(state["model"], model.state_dict())
    assert state["optimizer"]["param_groups"] == expected["param_groups"]
    for moments, others in zip(state["optimizer"]["state"].values(), expected["state"].values()):
        assert same(moments, others)
    rows = log_of(run)
    assert rows == state["log"] and state["epoch"] == len(rows)
    for row, other in zip(rows, log, strict=True):
        speed = other.pop("examples") / other["seconds"]
        assert list(row) == [*list(other)[:-1], "examples_per_second", "seconds"]
        assert row.pop("examples_per_second") == pytest.approx(speed)
        assert row.pop("seconds") == pytest.approx(other.pop("seconds"))
        assert row == other


@MODELS
def test_a_run_is_a_plain_loop_to_the_bit(script, own, batchnorm, clock, tmp_path):
    train(script, dataset=own, **FLAGS, **OPTIONS[script], out=tmp_path / "run")
    assert_is(tmp_path / "run", *plain_loop(script, own, FLAGS))


def test_with_other_flags_it_is_that_plain_loop(own, batchnorm, clock, tmp_path):
    arrays = dict(np.load(own))
    for name in ("train_0", "train_1"):
        arrays[name] = arrays[name][:384]
    np.savez(tmp_path / "short.npz", **arrays)
    more = "--no-standardise", "--limit", 384
    train("mvae", *more, dataset=own, **OTHERS, **OPTIONS["mvae"], out=tmp_path / "run")
    likelihoods = ["laplace", "bernoulli"]
    plain = plain_loop(
        "mvae", tmp_path / "short.npz", OTHERS, likelihoods=likelihoods, standardise=False
    )
    assert_is(tmp_path / "run", *plain)


def test_a_mask_of_many_patterns_trains_one_per_step(own, clock, tmp_path, capsys):
    arrays = dict(np.load(own))
    arrays |= {f"{part}_2": -arrays[f"{part}_0"][:, :3] for part in ("train", "test")}
    np.savez(own, **arrays, train_mask=every_pattern(600, 3))
    flags = FLAGS | dict(paired=1.0, epochs=2, lr=1e-3, weights="2,1,0.5", decay=0)
    train("mvae", dataset=own, **flags, **OPTIONS["mvae"], out=tmp_path / "run")
    assert "objective" not in capsys.readouterr().out  # a few patterns' is not the next epoch's
    assert_is(tmp_path / "run", *plain_loop("mvae", own, flags))


def test_a_modality_that_no_logged_example_shows_is_nan(arrays, tmp_path):
    mask = np.arange(96)[:, None] % 3 == [0, 1]  # none shows both, a third the first
    mask[~mask.any(1)] = [True, False]
    np.savez(arrays, **np.load(arrays), train_mask=mask)
    train("mvae", dataset=arrays, batch_size=48, epochs=1, out=tmp_path / "run")
    (row,) = log_of(tmp_path / "run")
    finite = {key: math.isfinite(row[key]) for key in ("objective", "log_p_0", "log_p_1")}
    streams = data.load(arrays).streams()
    assert finite == {"objective": True, "log_p_0": streams[0][0][0], "log_p_1": streams[0][0][1]}


def one_rank(rank, world, port, script, flags):
    sys.stdout = open(os.devnull, "w")
    os.environ |= dict(RANK=str(rank), WORLD_SIZE=str(world))
    os.environ |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    train(script, **flags)


def ranks(world, script, flags):
    """The processes of a run, as torchrun starts them. -> their ids"""
    import torch._dynamo  # as Adam does: once, before the forks  # noqa: F401

    port = free_port()
    return [forked(one_rank, rank, world, port, script, flags) for rank in range(world)]


def test_two_processes_are_a_plain_loop_to_the_bit(own, batchnorm, clock, tmp_path):
    flags = dict(dataset=own, **FLAGS, **OPTIONS["meme"], out=tmp_path / "run")
    assert ended(*ranks(2, "meme", flags)) == [0, 0]
    assert_is(tmp_path / "run", *plain_loop("meme", own, FLAGS, world=2))


# ------------------------------------------------------------------------------------- its flags


def test_flags_reach_the_data_and_the_model(arrays):
    flags = f"--dataset {arrays} --limit 40 --seed 5 --paired 0.5 --unpaired 1 --weights 2,0.5"
    flags += (
        " --likelihoods laplace,bernoulli --width 0.5 --latent-dim 3 --experts exact --anneal 9"
    )
    p, args = SCRIPTS["mvae"].parse_args([*flags.split(), "--no-standardise"])
    dataset, streams, model, record = SCRIPTS["mvae"].build(args, {})
    assert len(dataset.train) == record["examples"] == 40 and record["spec"]["width"] == 0.5
    assert np.allclose(dataset.train.bases[0][:40], np.load(arrays)["train_0"][:40])
    expected = data.pairing(40, ("0", "1"), 0.5, "1", seed=5)
    for (mask, index), (other, ours) in zip(streams, expected, strict=True):
        assert mask == other and torch.equal(index, ours)
    assert [m.likelihood for m in model.modalities] == ["laplace", "bernoulli"]
    assert [m.weight for m in model.modalities] == [2, 0.5]
    assert (model.latent_dim, model.experts, model.anneal) == (3, "exact", 9)
    assert record["options"] == dict(subsets=0, anneal=9, experts="exact")
    assert args.epochs == record["epochs"] == 1500  # of 40 examples, one step each
    torch.manual_seed(5)
    again = SCRIPTS["mvae"].MODEL(nets.modalities(**record["spec"]), 3, **record["options"])
    assert same(model.state_dict(), again.state_dict())


def test_amp_and_compile_act_when_asked_and_only_then(arrays, tmp_path, monkeypatch):
    compiled, autocast, model = [], [], SCRIPTS["mvae"].MODEL

    def watched(self, streams, forward=model.forward):
        autocast.append(torch.is_autocast_enabled("cpu"))
        return forward(self, streams)

    monkeypatch.setattr(model, "forward", watched)
    monkeypatch.setattr(torch, "compile", lambda net, **options: compiled.append(net) or net)
    flags = dict(dataset=arrays, batch_size=96, epochs=1)
    for name, more in [("plain", {}), ("amp", dict(amp=True)), ("compile", dict(compile=True))]:
        train("mvae", **flags, **more, out=tmp_path / name)
    assert autocast == [False, True, False] and len(compiled) == 1
    assert same(weights(tmp_path / "plain"), weights(tmp_path / "compile"))


def test_amp_is_within_one_percent_of_float32():
    model = SCRIPTS["meme"].MODEL(nets.modalities("glyphs"), 4, samples=3)
    xs, losses = images("glyphs", 8), []
    for mixed in (False, True):
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            losses.append(model([(1.0, xs)]))
    assert losses[1].dtype == torch.float32
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=0.01)


def test_nothing_is_hidden_clipped_or_chosen_unless_asked():
    args = vars(SCRIPTS["mvae"].parse_args([])[1])
    off = dict(paired=1.0, unpaired="split", sampling="natural", decay=0.0, clip=0.0, width=1.0)
    off |= dict(likelihoods=None, weights=None, limit=None, seed=0, resume=None, standardise=True)
    off |= dict(amp=False, compile=False, device="cpu", data=os.path.abspath("data"))
    assert {key: args[key] for key in off} == off


@pytest.mark.parametrize("script, typed, name", [
    ("mvae", "", "mvae-glyphs-paired1-split-seed0"),
    ("svae", "", "svae-glyphs-paired1-all-seed0"),
    ("meme", "--dataset a/b.npz --paired 0.25 --unpaired x --seed 3 --device cpu --compile",
     "meme-b-paired0.25-x-seed3"),
    ("mmvae", "--tight --samples 5 --weights 2,1 --no-standardise --epochs 7 --width 1",
     "mmvae-glyphs-paired1-split-seed0-epochs=7-weights=2.0,1.0-no-standardise-tight=True-samples=5"),
])  # fmt: skip
def test_another_setting_is_another_folder(script, typed, name):
    folder = Path(SCRIPTS[script].parse_args(typed.split())[1].out)
    assert folder.parent.name == "runs"
    assert sorted(folder.name.split("-")) == sorted(name.split("-"))


# ------------------------------------------------------------------------------- killed and resumed


def die_at(moment):
    """SIGKILL at one of the moments before or after a file is renamed, or when a batch is drawn."""
    count, replace, batches = itertools.count(1), os.replace, data.batches

    def tick():
        if next(count) == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    def renamed(a, b):
        tick()
        replace(a, b)
        tick()

    def counted(*args):
        for batch in batches(*args):
            tick()
            yield batch

    os.replace, data.batches = renamed, counted


def dying(moment, rank, *run):
    if rank == 0:
        die_at(moment)
    one_rank(rank, *run)


EPOCH = 7  # moments: three batches, checkpoint.pt and log.csv are renamed
MOMENTS = 6 + 4 * EPOCH  # the three files at first
SOME = [2, 5, 6 + 2, 6 + EPOCH + 5]  # each between two steps that belong together


@pytest.mark.parametrize("script, world, moments", [
    ("meme", 1, SOME),
    *(pytest.param(name, 1, range(1, MOMENTS + 1), marks=pytest.mark.slow) for name in SCRIPTS),
    pytest.param("mvae", 2, range(1, MOMENTS + 1), marks=pytest.mark.slow),
])  # fmt: skip
def test_a_killed_and_resumed_run_ends_with_the_same_bits(script, world, moments, arrays, tmp_path):
    flags = dict(dataset=arrays, paired=0.5, batch_size=32, epochs=4)
    assert ended(*ranks(world, script, flags | dict(out=tmp_path / "whole"))) == [0] * world
    whole, *rest = content(tmp_path / "whole")
    for moment in moments:
        run, port = tmp_path / str(moment), free_port()
        own = flags | dict(out=run)
        first, *others = [
            forked(dying, moment, rank, world, port, script, own) for rank in range(world)
        ]
        assert ended(first) == [-signal.SIGKILL]
        for pid in others:
            os.kill(pid, signal.SIGKILL)
            ended(pid)
        if (run / "checkpoint.pt").exists():
            checkpoint(run)  # whole, at every moment
            own["resume"] = True
        assert ended(*ranks(world, script, own)) == [0] * world
        again, *log = content(run)
        assert same(again, whole) and log == rest, moment
        assert [row["epoch"] for row in log_of(run)] == [1, 2, 3, 4]
        assert [name for name in files_of(run) if not name.endswith(".part")] == FILES


@pytest.mark.parametrize("decay", [0, 0.5])
def test_resume_takes_the_new_learning_rate(decay, arrays, tmp_path):
    flags = dict(dataset=arrays, batch_size=32, anneal=0, decay=decay, out=tmp_path / "run")
    train("mvae", **flags, epochs=1)
    before = weights(tmp_path / "run")
    train("mvae", **flags, epochs=2, lr=1e-30, resume=True)
    assert same(weights(tmp_path / "run"), before)
    rate = checkpoint(tmp_path / "run")["optimizer"]["param_groups"][0]["lr"]
    assert rate == pytest.approx(1e-30, rel=1e-6)
    assert json.loads((tmp_path / "run" / "args.json").read_text())["lr"] == 1e-30
    train("mvae", **flags, epochs=3, resume=True)  # and keeps it
    assert same(weights(tmp_path / "run"), before)


def test_a_run_is_resumed_by_its_folder_or_flags(arrays, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run = Path("runs/mvae-own-paired1-split-seed0")
    train("mvae", "--dataset", "own.npz", "--epochs", 1, out=run)
    train("mvae", epochs=2, resume=run)
    args = json.loads((run / "args.json").read_text())
    assert (args["dataset"], args["data"]) == (str(arrays), str(tmp_path / "data"))
    train("mvae", dataset="own.npz", epochs=3, out=run, resume=True)
    train("mvae", "--resume", "--dataset", "own.npz", epochs=3, out=run)
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"{run} is finished, with 3 epochs; --epochs N goes on to N"
    assert checkpoint(run)["epoch"] == 3
    train("mvae", resume=run)  # its own number of epochs is the default
    assert capsys.readouterr().out.splitlines() == [last]
    arrays.rename(tmp_path / "moved.npz")
    refused("mvae", epochs=4, resume=run)
    train("mvae", dataset="moved.npz", epochs=4, resume=run)
    assert json.loads((run / "args.json").read_text())["dataset"] == str(tmp_path / "moved.npz")


CHANGED = ["epochs", "lr", "decay", "clip", "device", "amp", "compile", "graph", "dataset", "data"]


def changes():
    """Every flag of meme, and another value than the default. -> (name, words)"""
    p, args = SCRIPTS["meme"].parse_args([])
    args.likelihoods, args.weights = ["a", "b"], [1.0, 1.0]
    for action in p._actions:
        name, old = action.dest, getattr(args, action.dest, None)
        if name in ("help", "out", "resume"):
            continue
        if isinstance(old, bool):
            yield name, [action.option_strings[-1 if old is True else 0]]
        elif action.choices:
            yield name, [action.option_strings[0], next(c for c in action.choices if c != old)]
        elif isinstance(old, list):
            yield name, [action.option_strings[0], "2,2"]
        else:
            value = "1" if old is None or isinstance(old, str) else str(old + 1)
            yield name, [action.option_strings[0], value]


@pytest.mark.parametrize("name, typed", list(changes()))
def test_resume_keeps_all_but_a_few_settings(name, typed, arrays, tmp_path, capsys):
    flags = ["--dataset", str(arrays), "--out", str(tmp_path)]
    meme = SCRIPTS["meme"]
    _, args = meme.parse_args(flags)
    saved = vars(args) | dict(direction="0", limit=9, likelihoods=["a", "b"], weights=[1.0, 1.0])
    meme.parse_args(flags, saved)
    if name in CHANGED:
        _, args = meme.parse_args([*flags, *typed], saved)
        assert getattr(args, name) != saved[name]
        return
    with pytest.raises(SystemExit) as stopped:
        meme.parse_args([*flags, *typed], saved)
    flag = f"--{name.replace('_', '-')}"
    assert stopped.value.code == 2
    assert f"{tmp_path} has {flag} {saved[name]}: --resume keeps it" in error_of(capsys)


def test_settings_of_a_run_are_the_defaults_at_resume(arrays, tmp_path):
    flags = ["--dataset", str(arrays), "--out", str(tmp_path)]
    p, args = SCRIPTS["meme"].parse_args(flags)
    saved = vars(args) | dict(device="cuda:3", lr=0.5, data="/other", epochs=7, kl="sample")
    _, args = SCRIPTS["meme"].parse_args(flags, saved)
    assert (args.lr, args.data, args.epochs, args.kl) == (0.5, "/other", 7, "sample")
    assert args.device == p.get_default("device")  # of this machine


def test_a_checkpoint_is_tensors_and_numbers_alone(arrays, tmp_path, capsys):
    class Code:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    run = tmp_path / "run"
    train("mvae", dataset=arrays, epochs=1, out=run)
    assert set(checkpoint(run)) == {"model", "optimizer", "epoch", "log"}
    for contents in (
        pickle.dumps(Code(), protocol=2),
        (run / "checkpoint.pt").read_bytes()[:-500],
        b"",
    ):
        (run / "checkpoint.pt").write_bytes(contents)
        refused("mvae", dataset=arrays, out=run, resume=True)
        assert f"{run} cannot be read as a run" in error_of(capsys)
        assert (run / "checkpoint.pt").read_bytes() == contents
    assert not (tmp_path / "executed").exists()


# ------------------------------------------------------------------------------ what stops a run

DIVERGES = dict(meme=1e20, svae=1e5, mvae=1e20)


@pytest.mark.parametrize("script", DIVERGES)
def test_a_run_that_diverged_continues_from_its_last_checkpoint(script, arrays, tmp_path, capsys):
    flags = dict(dataset=arrays, paired=0.5, unpaired="all", batch_size=16, out=tmp_path / "run")
    train(script, **flags, epochs=1, decay=0)
    good = weights(tmp_path / "run")
    refused(script, **flags, epochs=8, lr=DIVERGES[script], decay=0, resume=True)
    first, last = capsys.readouterr().err.strip().splitlines()
    assert re.search(r"run: the loss is not finite in epoch 2, by step \d+$", first)
    assert last == f"go on with --out {tmp_path / 'run'} --resume and a lower --lr, or a --clip"
    saved = checkpoint(tmp_path / "run")
    assert saved["epoch"] == 1 and same(saved["model"], good)
    train(script, **flags, epochs=3, lr=1e-4, decay=0, resume=True)
    rows = log_of(tmp_path / "run")
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    assert all(math.isfinite(value) for row in rows for value in row.values())


@pytest.mark.parametrize("step, by", [(1, 3), (2, 3), (9, 9), (12, 12)])
def test_a_loss_that_is_not_finite_names_its_epoch(
    step, by, arrays, tmp_path, clock, capsys, monkeypatch
):
    model, count = SCRIPTS["mvae"].MODEL, itertools.count(1)

    def poisoned(self, streams, forward=model.forward):
        return forward(self, streams) * (math.nan if next(count) == 12 + step else 1)

    monkeypatch.setattr(model, "forward", poisoned)
    refused("mvae", dataset=arrays, batch_size=8, epochs=2, out=tmp_path / "run")
    # the losses are read when more than a second has passed, here every third step
    assert f"the loss is not finite in epoch 2, by step {by}\n" in capsys.readouterr().err
    assert checkpoint(tmp_path / "run")["epoch"] == 1


def test_weights_that_the_last_step_spoils_are_not_saved(arrays, tmp_path, capsys):
    flags = dict(dataset=arrays, batch_size=96, decay=0, out=tmp_path / "run")  # one step an epoch
    refused("mvae", **flags, epochs=1, lr=1e30)
    assert "in epoch 1, by step 1\n" in capsys.readouterr().err
    assert checkpoint(tmp_path / "run")["epoch"] == 0
    assert all(w.isfinite().all() for w in weights(tmp_path / "run").values())
    train("mvae", **flags, epochs=1, lr=1e-3, resume=True)


def run_as_script(monkeypatch, script, *typed):
    """python SCRIPT.py ..., in this process."""
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *map(str, typed)])
    runpy.run_path(str(ROOT / f"{script}.py"), run_name="__main__")


def test_ctrl_c_says_how_to_go_on(arrays, tmp_path, monkeypatch, capsys):
    run, batches, count = tmp_path / "a run", data.batches, itertools.count(1)

    def interrupted(*args):
        for batch in batches(*args):
            if next(count) == 5:  # in the second of four epochs of three steps
                raise KeyboardInterrupt
            yield batch

    monkeypatch.setattr(data, "batches", interrupted)
    typed = ["--dataset", arrays, "--batch-size", 32, "--epochs", 4, "--out", run]
    with pytest.raises(SystemExit) as stopped:
        run_as_script(monkeypatch, "mvae", *typed)
    assert stopped.value.code == 130
    start = "interrupted; to go on from the last whole epoch: "
    line = error_of(capsys)
    assert line.startswith(start) and checkpoint(run)["epoch"] == 1
    python, script, *again = shlex.split(line.removeprefix(start))
    assert (python, script) == ("python", str(ROOT / "mvae.py")) and again.count("--resume") == 1
    run_as_script(monkeypatch, "mvae", *again)
    train("mvae", *typed[:-2], out=tmp_path / "whole")
    assert same(weights(run), weights(tmp_path / "whole"))
    count = itertools.count(1)
    with pytest.raises(SystemExit):  # a run that was resumed
        run_as_script(monkeypatch, "mvae", "--epochs", 8, "--resume", run)
    assert shlex.split(error_of(capsys))[-4:] == ["--epochs", "8", "--resume", str(run)]


def test_a_full_disk_is_one_sentence(arrays, tmp_path, monkeypatch, capsys):
    run, save, count = tmp_path / "run", torch.save, itertools.count(1)

    def full(state, file):
        if next(count) == 3:  # at the end of the second epoch
            file.write(b"half")
            raise OSError(28, "No space left on device")
        save(state, file)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(SystemExit) as stopped:
        run_as_script(monkeypatch, "mvae", "--dataset", arrays, "--epochs", 3, "--out", run)
    assert stopped.value.code == 2
    assert error_of(capsys) == f"{run / 'checkpoint.pt'} cannot be written: No space left on device"
    assert checkpoint(run)["epoch"] == 1 and files_of(run) == FILES
    train("mvae", epochs=3, resume=run)
    assert checkpoint(run)["epoch"] == 3


# ------------------------------------------------------------------------------ what it prints


def test_a_terminal_shows_the_step_and_the_time_left(arrays, tmp_path, clock, capsys, monkeypatch):
    clock.step = 60
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    train("mvae", dataset=arrays, batch_size=32, epochs=3, out=tmp_path / "run")
    text = capsys.readouterr().out.replace(str(tmp_path), "")
    assert max(len(line) for line in re.split("[\r\n]", text)) <= 79
    lines = [line.rstrip() for line in re.split("[\r\n]+", text)]
    steps = [line for line in lines if line.startswith("epoch") and "step" in line]
    left = ["8 min", "7 min", "6 min", "5 min", "4 min", "3 min", "2 min", "60 s", "0 s"]
    places = itertools.product((1, 2, 3), (1, 2, 3))
    assert steps == [f"epoch {e}, step {k} of 3, {t} left" for (e, k), t in zip(places, left)]
    whole = [line for line in lines if re.match(r"epoch \d/3: ", line)]
    assert len(whole) == 3
    for row, line, time in zip(log_of(tmp_path / "run"), whole, ("6 min", "3 min", "0 s")):
        nats = f"0 {row['log_p_0']:.1f}, 1 {row['log_p_1']:.1f}"
        stated = f"objective {row['objective']:.1f}, log p: {nats}, {time} left"
        assert line == f"epoch {row['epoch']:.0f}/3: {stated}"


def test_a_file_has_one_line_an_epoch(arrays, tmp_path, clock, capsys):
    run = tmp_path / "run"
    clock.step = 60
    train("mvae", dataset=arrays, batch_size=32, epochs=3, out=run)
    out = capsys.readouterr().out
    assert "\r" not in out and out == "".join(line.rstrip() + "\n" for line in out.splitlines())
    first, numbers, bits, *epochs, last = out.splitlines()
    size = sum(w.numel() for w in weights(run).values()) - 1  # β is no weight
    assert first == f"{run}: {size:,} weights, 96 examples"
    assert numbers.startswith("0: numbers (5), normal") and bits.startswith(
        "1: bits (4), bernoulli"
    )
    assert [line.partition(":")[0] for line in epochs] == ["epoch 1/3", "epoch 2/3", "epoch 3/3"]
    assert last == f"python eval.py {run}"
    train("mvae", dataset=arrays, batch_size=32, epochs=4, out=run, resume=True)
    epochs = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch")]
    assert len(epochs) == 1 and epochs[0].startswith("epoch 4/4: ")
    assert epochs[0].endswith(", 0 s left")


def test_a_terminal_without_a_letter_stops_no_run(arrays, tmp_path, monkeypatch):
    arrays.rename(tmp_path / "новые.npz")
    monkeypatch.chdir(tmp_path)
    out = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr(sys, "stdout", out)
    run_as_script(monkeypatch, "mvae", "--dataset", "новые.npz", "--epochs", 1)
    [run] = (tmp_path / "runs").iterdir()
    assert "новые" in run.name and checkpoint(run)["epoch"] == 1
    out.flush()
    assert "mvae-?????-paired1" in out.buffer.getvalue().decode("cp1252")


# ----------------------------------------------------------------------------- mistakes of the user

MISTAKES = [
    ("--paired 0", "--paired must be a fraction"), ("--paired 1.5", "--paired"),
    ("--paired nan", "--paired"), ("--paired 0.001", "none paired"), ("--paired x", "--paired"),
    ("--unpaired nope", "--unpaired must be one of split, all, rest, none, 0, 1"),
    ("--sampling nope", "--sampling"),
    ("--epochs 0", "--epochs: must be a whole number above 0"), ("--epochs 1.5", "--epochs"),
    ("--lr inf", "--lr"), ("--lr -1", "--lr"), ("--decay nan", "--decay"),
    ("--batch-size 0", "--batch-size"), ("--latent-dim 0", "--latent-dim"),
    ("--limit 0", "--limit"), ("--weights 1,x", "--weights"), ("--weights 1,-1", "not negative"),
    ("--weights 1", "--weights needs one for each of 0, 1"),
    ("--likelihoods laplace", "--likelihoods"), ("--likelihoods laplace,nope", "nope"),
    ("--likelihoods bernoulli,bernoulli", "0"), ("--likelihoods laplace,categorical", "1"),
    ("--nope", "--nope"), ("--kl nope", "--kl"), ("--samples 0", "samples"),
    ("--direction nope", "direction must be one of 0, 1, not 'nope'"),
    ("--direction 0 --paired 0.5", "direction 0"), ("--device nope", "--device nope"),
    ("--device cuda", "--device cuda is not available here"), ("--device cuda:9", "cuda:9"),
    ("--dataset nope", "--dataset must be glyphs, mnist-split"), ("--dataset none.npz", "none.npz"),
    ("--dataset cut.npz", "cut.npz cannot be read"), ("--dataset dir.npz", "dir.npz cannot be"),
    ("--out file", "file"), ("--out file/run", "file"),
    ("--out run", "run holds a run: add --resume, or name another folder"),
    ("--out absent --resume", "absent holds no run"), ("--resume", "new holds no run"),
    ("--resume absent", "absent holds no run"),
    ("--resume run --seed 1", "run has --seed 0: --resume keeps it"),
    ("--resume run --samples 4", "run has --samples 3: --resume keeps it"),
    ("--resume run --dataset other.npz", "other.npz does not hold the data that run began with"),
]  # fmt: skip


@pytest.fixture
def mistaken(arrays, tmp_path, monkeypatch):
    """A folder with a run of meme and files that are no data. -> function that reads all of it"""
    monkeypatch.chdir(tmp_path)
    train("meme", dataset=arrays, epochs=1, out="run")
    np.savez("other.npz", **{name: x + x for name, x in np.load(arrays).items()})
    Path("cut.npz").write_bytes(arrays.read_bytes()[:200])
    Path("dir.npz").mkdir()
    Path("file").write_text("text")
    return lambda: {p: p.is_file() and p.read_bytes() for p in tmp_path.rglob("*")}


def test_a_mistake_is_one_sentence_and_nothing_is_written(mistaken, arrays, capsys):
    capsys.readouterr()
    before = mistaken()
    others = [
        ("mvae", "--resume run", "run is a run of MEME, not of MVAE"),
        ("vaevae", "--unpaired split", "--unpaired all"),
        ("mvae", "--subsets 1", "subsets must be from 0 to 0"),
        ("mmvae", "--tight --objective elbo", "tight needs iwae or dreg"),
    ]
    for script, typed, words in [*(("meme", *mistake) for mistake in MISTAKES), *others]:
        place = [] if "--resume r" in typed else ["--dataset", arrays, "--out", "new"]
        refused(script, *place, *typed.split())
        assert words in error_of(capsys) and mistaken() == before, typed


def test_a_folder_that_cannot_be_written_is_named(arrays, tmp_path, capsys, monkeypatch):
    def denied(*args, **kwargs):
        raise PermissionError(13, "Permission denied", "runs/x")

    monkeypatch.setattr(Path, "mkdir", denied)
    refused("mvae", dataset=arrays, out=tmp_path / "run")
    assert "Permission denied" in error_of(capsys) and not (tmp_path / "run").exists()


@pytest.mark.parametrize("unpaired, size", [("split", 5), ("0", 1)])
@MODELS
def test_one_pair_in_a_hundred_trains_or_is_refused(
    script, unpaired, size, arrays, tmp_path, capsys
):
    flags = dict(dataset=arrays, paired=0.01, unpaired=unpaired, batch_size=size, epochs=1)
    if size == 1:  # the smallest of everything
        flags |= dict(paired=0.1, limit=10, latent_dim=1)
        flags |= dict(samples=1) if script in ("meme", "mmvae") else {}
    if script == "vaevae" and unpaired == "0":  # no stream of modality 1 alone
        refused(script, **flags, out=tmp_path / "run")
        assert "--objective svae" in error_of(capsys)
    else:
        train(script, **flags, out=tmp_path / "run")
        assert all(w.isfinite().all() for w in weights(tmp_path / "run").values())
        assert all(map(math.isfinite, log_of(tmp_path / "run")[0].values()))
