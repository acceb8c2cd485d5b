"""Runs: the loop against a plain loop written out here, runs that are killed and resumed, mistakes of
a user, and whether the commands and the code that the pages show work. `pytest -m slow` kills at
every moment and trains with every command."""

import ast
import copy
import csv
import itertools
import json
import math
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import types
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import ROOT, SCRIPTS, checkpoint, ended, forked, free_port, images, refused, same
from helpers import shi, tiny, train, weights
from torch import nn
from torch.testing import assert_close

import data
import nets
from benchmarks import cub

slow = pytest.mark.slow
MODELS = pytest.mark.parametrize("script", SCRIPTS)
FILES = ["args.json", "checkpoint.pt", "log.csv"]


def files_of(run):
    return sorted(path.name for path in run.iterdir())


def log_of(run):
    """The rows of log.csv, as numbers."""
    with open(run / "log.csv", encoding="utf-8") as file:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]


def sentence(capsys):
    """The only line on stderr beside argparse's usage."""
    lines = capsys.readouterr().err.strip().splitlines()
    lines = [line for line in lines if not line.startswith("usage:")]
    assert len(lines) == 1, lines
    return lines[0]


# ---------------------------------------------------------- the loop, and the same loop written out

OPTIONS = {
    "meme": dict(samples=3, pseudo_samples=16),
    "svae": dict(experts="exact"),
    "vaevae": dict(variant="a"),
    "mmvae": dict(samples=3),
    "mvae": dict(anneal=2),
}
FLAGS = dict(paired=0.5, unpaired="split", sampling="natural", batch_size=64, epochs=3, seed=7)
FLAGS |= dict(lr=3e-3, decay=0.5, clip=20, latent_dim=3, weights="2,0.5")


@pytest.fixture
def own(tmp_path):
    """An .npz whose 600 examples are more than log.csv looks at and no multiple of a batch."""
    rng, found = np.random.default_rng(1), {}
    for part, n in (("train", 600), ("test", 20)):
        z = rng.normal(size=(n, 1))
        found[f"{part}_0"] = (z + 0.3 * rng.normal(size=(n, 5))).astype(np.float32)
        found[f"{part}_1"] = z + 0.3 * rng.normal(size=(n, 4)) > 0
    np.savez(tmp_path / "own.npz", **found)
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


def plain_loop(script, path, world=1):
    """The run of FLAGS and OPTIONS, step by step. -> model, optimizer, the rows of its log"""
    dataset = data.load(path)
    streams = data.pairing(len(dataset.train), ("0", "1"), 0.5, "split", seed=7)
    torch.manual_seed(7)
    modalities = nets.modalities(**dataset.spec, weights=[2, 0.5])
    model, log = SCRIPTS[script].MODEL(modalities, 3, **OPTIONS[script]), []
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3, fused=True)
    if script == "meme":
        model.init_pseudo_samples(data.observed(dataset.train, streams, 16))
    ranks = [model] + [copy.deepcopy(model) for _ in range(1, world)]
    for epoch in (1, 2, 3):
        seed, total, examples, noise, batches = 1_000_003 * 7 + epoch, 0.0, 0, [], []
        for rank, replica in enumerate(ranks):
            torch.manual_seed(4_099 * seed + rank)
            noise.append(torch.get_rng_state())
            order = torch.Generator().manual_seed(seed)
            batches.append(data.batches(dataset.train, streams, 64, "natural", order, rank, world))
            if script == "mvae":
                replica.start_epoch(epoch)
        optimizer.param_groups[0]["lr"] = 3e-3 * (1, 1, 2 / 3)[epoch - 1]  # the last 1.5 of 3
        for steps, step in enumerate(zip(*batches, strict=True), 1):
            for replica in ranks[1:]:  # weights, and rank 0's BatchNorm statistics
                replica.load_state_dict(model.state_dict())
            for rank, (replica, batch) in enumerate(zip(ranks, step)):
                torch.set_rng_state(noise[rank])
                loss = replica(batch)
                replica.zero_grad()
                loss.sum().backward()
                noise[rank] = torch.get_rng_state()
                total += loss.sum().item()
                examples += sum(len(next(x for x in xs if x is not None)) for _, xs in batch)
            for same_weight in zip(*(replica.parameters() for replica in ranks)):
                gradients = [w.grad for w in same_weight if w.grad is not None]
                same_weight[0].grad = sum(gradients) / world if gradients else None
            nn.utils.clip_grad_norm_(model.parameters(), 20)
            optimizer.step()

        torch.set_rng_state(noise[0])
        model.eval()
        row = {"epoch": epoch, "objective": -total / steps / world}
        with torch.no_grad():
            xs = dataset.train[streams[0][1][:256]]
            model.objective(*xs)  # its noise comes first
            z = model.posterior(*xs).sample()
            for m, decoder, x in zip(modalities, model.decoders, xs):
                row[f"log_p_{m.name}"] = nets.log_prob(m, decoder(z), x).mean().item()
        model.train()
        log.append(row | {"examples": examples})
    return model, optimizer, log


def assert_is(run, model, optimizer, log):
    """Weights, BatchNorm statistics and the optimizer to the bit, and every column of the log."""
    state, expected = checkpoint(run), optimizer.state_dict()
    assert same(state["model"], model.state_dict())
    assert state["optimizer"]["param_groups"] == expected["param_groups"]
    for of, moments in zip(state["optimizer"]["state"].values(), expected["state"].values()):
        assert same(of, moments)
    rows = log_of(run)
    assert rows == state["log"] and state["epoch"] == len(rows)
    for row, wanted in zip(rows, log, strict=True):
        assert list(row) == [*list(wanted)[:-1], "examples_per_second", "seconds"]
        drawn = row.pop("examples_per_second") * row["seconds"]
        assert drawn == pytest.approx(wanted.pop("examples"))
        assert row.pop("seconds") == pytest.approx(10 * 0.4)
        assert row == pytest.approx(wanted, rel=1e-6)


@MODELS
def test_a_run_is_a_plain_loop_to_the_bit(script, own, batchnorm, clock, tmp_path):
    train(script, dataset=own, **FLAGS, **OPTIONS[script], out=tmp_path / "run")
    assert_is(tmp_path / "run", *plain_loop(script, own))


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


@pytest.mark.parametrize("script", ["meme", "mvae"])
def test_two_processes_are_a_plain_loop_to_the_bit(script, own, batchnorm, clock, tmp_path):
    flags = dict(dataset=own, **FLAGS, **OPTIONS[script], out=tmp_path / "run")
    assert ended(*ranks(2, script, flags)) == [0, 0]
    assert_is(tmp_path / "run", *plain_loop(script, own, world=2))


def gradients_of_one_rank(rank, world, url, out):
    torch.distributed.init_process_group("gloo", init_method=url, rank=rank, world_size=world)
    torch.randn_like = torch.zeros_like
    split, streams = tiny(11), data.pairing(11, ("0", "1"), 0.5, "split")
    layers = partial(nets.mlp_encoder, (1, 8)), partial(nets.mlp_decoder, (8, 1), (1,))
    modalities = [nets.Modality(name, (1,), *layers, "normal") for name in ("0", "1")]
    torch.manual_seed(0)
    model = SCRIPTS["mvae"].MODEL(modalities, 2)
    net = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    order = torch.Generator().manual_seed(1)
    for batch in data.batches(split, streams, 7, "natural", order, rank, world):
        net(batch).sum().backward()
    if rank == 0:
        torch.save([w.grad for w in model.parameters()], out)


def test_two_processes_give_the_gradients_of_one(tmp_path):
    for world in (1, 2):
        of = world, f"tcp://127.0.0.1:{free_port()}", tmp_path / f"{world}.pt"
        pids = [forked(gradients_of_one_rank, rank, *of) for rank in range(world)]
        assert ended(*pids) == [0] * world
    one, two = (torch.load(tmp_path / f"{world}.pt", weights_only=True) for world in (1, 2))
    assert_close(one, two, atol=1e-5, rtol=1e-4)


# -------------------------------------------------------------------------- one line of it at a time


@pytest.fixture
def steps(monkeypatch):
    """The state of a model of mvae or meme in each of its steps."""
    found = []
    for script in ("mvae", "meme"):
        model = SCRIPTS[script].MODEL

        def watched(self, streams, forward=model.forward):
            step = SimpleNamespace(training=self.training, noise=torch.get_rng_state())
            step.autocast = torch.is_autocast_enabled("cpu")
            step.examples = torch.cat([xs[0].flatten() for _, xs in streams if xs[0] is not None])
            step.state = copy.deepcopy(self.state_dict())
            found.append(step)
            return forward(self, streams)

        monkeypatch.setattr(model, "forward", watched)
    return found


def all_differ(tensors):
    return all(not torch.equal(a, b) for a, b in itertools.combinations(tensors, 2))


def test_every_step_is_in_training_mode_after_a_log_too(arrays, tmp_path, steps):
    train("mvae", dataset=arrays, batch_size=48, epochs=3, out=tmp_path / "run")
    assert [step.training for step in steps] == [True] * 6


def test_every_epoch_has_its_own_order_and_noise(arrays, tmp_path, steps):
    flags = dict(dataset=arrays, batch_size=96)  # an epoch is one step
    train("mvae", **flags, epochs=3, out=tmp_path / "a")
    train("mvae", **flags, epochs=1, seed=1, out=tmp_path / "b")
    assert len(steps) == 4
    assert all_differ([step.examples for step in steps])
    assert all_differ([step.noise for step in steps])


def test_every_rank_draws_its_own_noise(arrays, tmp_path, steps, monkeypatch):
    for name in ("init_process_group", "all_reduce", "destroy_process_group"):
        monkeypatch.setattr(torch.distributed, name, lambda *args: None)
    parallel = lambda net, find_unused_parameters: net  # noqa: E731
    monkeypatch.setattr(nn.parallel, "DistributedDataParallel", parallel)
    for rank in (0, 1):
        monkeypatch.setenv("RANK", str(rank)), monkeypatch.setenv("WORLD_SIZE", "2")
        train("mvae", dataset=arrays, batch_size=96, epochs=2, out=tmp_path / str(rank))
    first, second = steps[:2], steps[2:]
    assert all_differ([step.noise for step in steps])
    for a, b in zip(first, second):  # the same order, from which each takes its half
        assert len(a.examples.view(-1, 5)) == len(b.examples.view(-1, 5)) == 48
        assert len(torch.cat([a.examples, b.examples]).view(-1, 5).unique(dim=0)) == 96
    assert files_of(tmp_path / "0") == FILES and files_of(tmp_path / "1") == []


def test_pseudo_samples_start_as_observed_examples_and_once(arrays, tmp_path, steps):
    flags = dict(dataset=arrays, paired=0.5, batch_size=96, pseudo_samples=10, out=tmp_path / "a")
    train("meme", **flags, epochs=1)
    train("meme", **flags, epochs=2, resume=True)
    streams = data.pairing(96, ("0", "1"), 0.5)
    expected = data.observed(data.load(arrays).train, streams, 10)
    pseudo = [[step.state[f"pseudo.{m}"] for m in (0, 1)] for step in steps]
    assert len(expected[0]) == 10 and torch.equal(pseudo[0][0], expected[0])
    bits = expected[1]  # of four bits there are ten different rows, or fewer
    assert torch.equal(pseudo[0][1][: len(bits)], bits)
    assert not torch.equal(pseudo[1][0], expected[0])  # resumed, they are those of the checkpoint


def test_a_model_is_told_every_epoch_before_its_first_step(arrays, tmp_path, steps):
    flags = dict(dataset=arrays, batch_size=96, anneal=4, out=tmp_path / "run")
    train("mvae", **flags, epochs=2)
    train("mvae", **flags, epochs=5, resume=True)
    assert [step.state["beta"].item() for step in steps] == [0.25, 0.5, 0.75, 1, 1]


def test_logging_leaves_statistics_and_training_mode_as_they_were(own, batchnorm):
    dataset = data.load(own)
    model = SCRIPTS["meme"].MODEL(nets.modalities(**dataset.spec), 3)
    xs = dataset.train[torch.arange(50)]
    model.objective(*xs)
    before = copy.deepcopy(model.state_dict())
    torch.manual_seed(1)
    objective, log_px = SCRIPTS["meme"].log_px_z(model, xs)
    assert same(model.state_dict(), before) and model.training
    model.eval()
    torch.manual_seed(1)
    assert objective == model.objective(*xs).item()
    assert list(log_px) == ["log_p_0", "log_p_1"]


def test_what_a_log_draws_changes_no_later_epoch(arrays, tmp_path, monkeypatch):
    flags, log_px_z = dict(dataset=arrays, batch_size=48, epochs=2), SCRIPTS["mvae"].log_px_z
    train("mvae", **flags, out=tmp_path / "a")

    def and_more(model, xs):
        torch.rand(5), np.random.rand(5), random.random()
        return log_px_z(model, xs)

    monkeypatch.setattr(SCRIPTS["mvae"], "log_px_z", and_more)
    train("mvae", **flags, out=tmp_path / "b")
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))


def test_a_modality_missing_from_the_logged_examples_is_nan(arrays, tmp_path):
    found = dict(np.load(arrays))
    mask = np.arange(96)[:, None] % 3 == [0, 1]
    mask[mask.sum(1) == 0] = [True, False]  # two thirds show the first alone, a third the second
    np.savez(arrays, **found, train_mask=mask)
    train("mvae", dataset=arrays, batch_size=48, epochs=1, out=tmp_path / "run")
    (row,) = log_of(tmp_path / "run")
    shown = [math.isfinite(row[f"log_p_{m}"]) for m in (0, 1)]
    assert sorted(shown) == [False, True] and math.isfinite(row["objective"])


def test_flags_reach_the_data_and_the_model(arrays):
    flags = f"--dataset {arrays} --limit 40 --seed 5 --paired 0.5 --unpaired 1 --weights 2,0.5"
    flags += " --likelihoods normal,bernoulli --width 0.5 --latent-dim 3 --experts exact --anneal 9"
    p, args = SCRIPTS["mvae"].parse_args([*flags.split(), "--no-standardise"])
    dataset, streams, model, record = SCRIPTS["mvae"].build(args, {})
    assert len(dataset.train) == record["examples"] == 40 and record["spec"]["width"] == 0.5
    assert np.allclose(dataset.train.bases[0][:40], np.load(arrays)["train_0"][:40])
    expected = data.pairing(40, ("0", "1"), 0.5, "1", seed=5)
    for (mask, index), (other, ours) in zip(streams, expected, strict=True):
        assert mask == other and torch.equal(index, ours)
    assert [m.likelihood for m in model.modalities] == ["normal", "bernoulli"]
    assert [m.weight for m in model.modalities] == [2, 0.5]
    assert (model.latent_dim, model.experts, model.anneal) == (3, "exact", 9)
    assert record["options"] == dict(subsets=0, anneal=9, experts="exact")
    torch.manual_seed(5)
    again = SCRIPTS["mvae"].MODEL(nets.modalities(**record["spec"]), 3, **record["options"])
    assert same(model.state_dict(), again.state_dict())


def test_groups_of_a_data_set_are_paired_whole(arrays, monkeypatch):
    groups = torch.arange(96) // 7
    dataset = data.load(arrays)._replace(groups=groups)
    monkeypatch.setattr(data, "load", lambda *args: dataset)
    _, args = SCRIPTS["mvae"].parse_args(["--dataset", str(arrays), "--paired", "0.5"])
    _, streams, _, _ = SCRIPTS["mvae"].build(args, {})
    members = [set(groups[index].tolist()) for _, index in streams]
    assert len(streams) == 3 and sum(map(len, members)) == len(groups.unique())


def test_clip_is_the_norm_of_all_gradients_together(arrays, tmp_path):
    def gradient(name, **clip):  # of a run's only step: a tenth of it is Adam's first mean
        flags = dict(dataset=arrays, limit=16, batch_size=16, epochs=1, out=tmp_path / name)
        train("mvae", **flags, **clip)
        moments = checkpoint(tmp_path / name)["optimizer"]["state"].values()
        return torch.cat([10 * of["exp_avg"].flatten() for of in moments])

    free = gradient("none")
    assert torch.equal(gradient("above", clip=1.01 * free.norm().item()), free)
    assert torch.equal(gradient("zero", clip=0), free)
    assert_close(gradient("half", clip=0.5), 0.5 * free / free.norm())


def test_amp_and_compile_act_when_asked_and_only_then(arrays, tmp_path, steps, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda net: compiled.append(net) or net)
    flags = dict(dataset=arrays, batch_size=96, epochs=1)
    for name, more in [("plain", {}), ("amp", dict(amp=True)), ("compile", dict(compile=True))]:
        train("mvae", **flags, **more, out=tmp_path / name)
    assert [step.autocast for step in steps] == [False, True, False]
    assert len(compiled) == 1
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


def test_a_terminal_shows_the_step_and_the_time_left(arrays, tmp_path, clock, capsys, monkeypatch):
    clock.step = 60
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    train("mvae", dataset=arrays, batch_size=32, epochs=3, out=tmp_path / "run")
    shown = re.split("[\r\n]+", capsys.readouterr().out)
    assert [f"epoch {e}, step {s} of 3, {60 * (3 - s)} s left " for e, s in ((1, 1), (2, 3))] == [
        line for line in shown if line.startswith(("epoch 1, step 1", "epoch 2, step 3"))
    ]
    ends = [line.rpartition("  ")[2] for line in shown if re.match(r"epoch \d of 3  ", line)]
    assert ends == ["6.0 minutes left", "3.0 minutes left", "0.0 minutes left"]
    row = log_of(tmp_path / "run")[1]
    numbers = "  ".join(f"{k} {row[k]:.2f}" for k in ("objective", "log_p_0", "log_p_1"))
    assert any(line.startswith(f"epoch 2 of 3  {numbers}  1 examples/s") for line in shown)


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

    def drawn(*args):
        for batch in batches(*args):
            tick()
            yield batch

    os.replace, data.batches = renamed, drawn


def dying(moment, rank, *of):
    if rank == 0:
        die_at(moment)
    one_rank(rank, *of)


def content(run):
    """The parts of a run that must be the same to the bit."""
    state = checkpoint(run)
    log = [{k: v for k, v in row.items() if "second" not in k} for row in state["log"]]
    assert [row["epoch"] for row in log_of(run)] == [row["epoch"] for row in log]
    tensors = [of.values() for of in state["optimizer"]["state"].values()]
    return state["model"] | dict(enumerate(itertools.chain(*tensors))), state["epoch"], log


MOMENTS = 6 + 4 * 9  # three files at first; three batches and three files in each of four epochs


@pytest.mark.parametrize("moments", [2, pytest.param(MOMENTS, marks=slow)])
@pytest.mark.parametrize(
    "script, world", [*((name, 1) for name in SCRIPTS), pytest.param("mvae", 2, marks=slow)]
)
def test_a_killed_and_resumed_run_ends_with_the_same_bits(script, world, moments, arrays, tmp_path):
    flags = dict(dataset=arrays, paired=0.5, batch_size=32, epochs=4)
    assert ended(*ranks(world, script, flags | dict(out=tmp_path / "whole"))) == [0] * world
    whole, *rest = content(tmp_path / "whole")
    for moment in random.Random(script).sample(range(1, MOMENTS + 1), moments):
        run, port = tmp_path / str(moment), free_port()
        own = flags | dict(out=run)
        of = world, port, script, own
        first, *others = [forked(dying, moment, rank, *of) for rank in range(world)]
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
        assert [name for name in files_of(run) if not name.endswith(".part")] == FILES


@MODELS
def test_a_run_in_parts_is_a_run_in_one(script, arrays, tmp_path):
    flags = dict(dataset=arrays, paired=0.5, batch_size=32, lr=1e-2, clip=5)
    train(script, **flags, epochs=3, out=tmp_path / "a")
    train(script, **flags, epochs=1, out=tmp_path / "b")
    train(script, "--resume", dataset=arrays, epochs=3, out=tmp_path / "b")
    (whole, *rest), (again, *log) = content(tmp_path / "a"), content(tmp_path / "b")
    assert same(whole, again) and rest == log
    train(script, **flags, epochs=3, out=tmp_path / "c", seed=1)
    a, c = weights(tmp_path / "a"), weights(tmp_path / "c")
    assert not any(torch.equal(a[key], c[key]) for key in a if key.startswith("encoders"))
    args, state = data.read_run(tmp_path / "b")
    model = SCRIPTS[script].MODEL(nets.modalities(**args["spec"]), 20, **args["options"])
    model.load_state_dict(state["model"])
    assert (args["version"], args["script"], args["examples"]) == (1, script, 96)


def test_resume_takes_the_new_learning_rate(arrays, tmp_path):
    flags = dict(dataset=arrays, batch_size=32, anneal=0, out=tmp_path / "run")
    train("mvae", **flags, epochs=1)
    before = weights(tmp_path / "run")
    train("mvae", **flags, epochs=2, lr=1e-30, resume=True)
    assert same(weights(tmp_path / "run"), before)
    assert checkpoint(tmp_path / "run")["optimizer"]["param_groups"][0]["lr"] == 1e-30
    assert json.loads((tmp_path / "run" / "args.json").read_text())["lr"] == 1e-30
    train("mvae", **flags, epochs=3, resume=True)  # and keeps it
    assert same(weights(tmp_path / "run"), before)


def test_resume_keeps_all_but_a_few_settings(arrays, tmp_path, capsys):
    flags = ["--dataset", str(arrays), "--out", str(tmp_path)]
    meme, saved = SCRIPTS["meme"], {}
    p, args = meme.parse_args(flags)
    saved = {"version": 1, "script": "meme"} | vars(args) | dict(direction="0", limit=9)
    taken = set()
    for action in p._actions[1:]:
        old = saved[action.dest]
        value = ["1"] if old is None or isinstance(old, str) else [str(old + 1)]
        if action.dest == "decay":
            value = ["1"]
        if action.choices:
            value = [next(c for c in action.choices if c != old)]
        if isinstance(old, bool):
            value = []
        flag = action.option_strings[-1 if old is True else 0]
        if action.dest in ("out", "resume", "help"):
            continue
        try:
            meme.parse_args([*flags, flag, *value], saved)
            taken.add(action.dest)
        except SystemExit as stopped:
            assert stopped.code == 2
            said = sentence(capsys)
            assert action.option_strings[0] in said and str(old) in said and "--resume" in said
    # a moved .npz is found by --dataset, its contents are checked
    changed = {"epochs", "lr", "decay", "clip", "device", "amp", "compile", "dataset", "data"}
    assert taken == changed
    elsewhere = saved | dict(device="cuda:3", lr=0.5, data="/other", epochs=7, kl="sample")
    _, args = meme.parse_args(flags, elsewhere)
    assert (args.device, args.lr, args.data, args.epochs) == (
        p.get_default("device"),
        0.5,
        "/other",
        7,
    )
    assert args.kl == "sample" and args.direction == "0"


def test_a_run_is_resumed_by_a_relative_path(arrays, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train("mvae", dataset="own.npz", epochs=1)
    train("mvae", dataset="own.npz", epochs=1, resume=True)
    args = json.loads(Path("runs/mvae-own-paired1-split-seed0-epochs=1/args.json").read_text())
    assert (args["dataset"], args["data"]) == (str(arrays), str(tmp_path / "data"))


def test_a_checkpoint_is_tensors_and_numbers_alone(arrays, tmp_path, capsys):
    class Code:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    run = tmp_path / "run"
    train("mvae", dataset=arrays, epochs=1, out=run)
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    assert set(state) == {"model", "optimizer", "epoch", "log"}
    for content in (pickle.dumps(Code()), (run / "checkpoint.pt").read_bytes()[:-500], b""):
        (run / "checkpoint.pt").write_bytes(content)
        refused("mvae", dataset=arrays, out=run, resume=True)
        assert f"{run} cannot be read as a run" in capsys.readouterr().err
        assert (run / "checkpoint.pt").read_bytes() == content
    assert not (tmp_path / "executed").exists()
    (run / "args.json").write_text("{")
    refused("mvae", dataset=arrays, out=run, resume=True)
    assert f"{run} cannot be read as a run" in sentence(capsys)


# ---------------------------------------------------------------------------- losses that are not finite

DIVERGES = dict(meme=1e20, vaevae=1e3, mmvae=1e3, svae=1e5, mvae=1e20)


@pytest.mark.parametrize("script", DIVERGES)
def test_a_run_that_diverged_continues_from_its_last_checkpoint(script, arrays, tmp_path, capsys):
    flags = dict(dataset=arrays, paired=0.5, unpaired="all", batch_size=16, out=tmp_path / "run")
    train(script, **flags, epochs=1)
    good = weights(tmp_path / "run")
    refused(script, **flags, epochs=8, lr=DIVERGES[script], resume=True)
    said = capsys.readouterr().err.strip()
    assert re.search(r"run: the loss is -?(nan|inf) in epoch 2, step \d+\n.* --resume .*--lr", said)
    kept = checkpoint(tmp_path / "run")
    assert kept["epoch"] == 1 and same(kept["model"], good)
    train(script, **flags, epochs=3, lr=1e-4, resume=True)
    rows = log_of(tmp_path / "run")
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    assert all(math.isfinite(value) for row in rows for value in row.values())


@pytest.mark.parametrize("step", [1, 2, 9, 12])
def test_a_loss_that_is_not_finite_names_its_step(
    step, arrays, tmp_path, clock, capsys, monkeypatch
):
    model, count = SCRIPTS["mvae"].MODEL, itertools.count(1)

    def poisoned(self, streams, forward=model.forward):
        losses = forward(self, streams)
        return losses * (math.nan if next(count) == 12 + step else 1)

    monkeypatch.setattr(model, "forward", poisoned)
    refused("mvae", dataset=arrays, batch_size=8, epochs=2, out=tmp_path / "run")
    assert f"the loss is nan in epoch 2, step {step}\n" in capsys.readouterr().err
    assert checkpoint(tmp_path / "run")["epoch"] == 1


def test_weights_that_the_last_step_spoils_are_not_kept(arrays, tmp_path, capsys):
    flags = dict(dataset=arrays, batch_size=96, out=tmp_path / "run")  # an epoch is one step
    refused("mvae", **flags, epochs=1, lr=1e30)
    assert "in epoch 1, step 1\n" in capsys.readouterr().err
    assert checkpoint(tmp_path / "run")["epoch"] == 0
    assert all(w.isfinite().all() for w in weights(tmp_path / "run").values())
    train("mvae", **flags, epochs=1, lr=1e-3, resume=True)


# ------------------------------------------------------------------------------ mistakes of the user

MISTAKES = [
    ("--paired 0", "--paired must be a fraction"), ("--paired 1.5", "--paired"),
    ("--paired nan", "--paired"), ("--paired 0.001", "none paired"), ("--paired x", "--paired"),
    ("--unpaired nope", "--unpaired must be one of split, all, rest, none, 0, 1"),
    ("--sampling nope", "--sampling"), ("--epochs 0", "--epochs must be above 0"),
    ("--epochs 1.5", "--epochs"), ("--lr inf", "--lr"), ("--lr -1", "--lr"),
    ("--decay 2", "--decay must be from 0 to 1"), ("--decay nan", "--decay"),
    ("--batch-size 0", "--batch-size"), ("--latent-dim 0", "--latent-dim"),
    ("--limit 0", "--limit"), ("--weights 1,x", "x"), ("--weights 1,-1", "not negative"),
    ("--weights 1", "--weights needs one for each of 0, 1"),
    ("--likelihoods laplace", "--likelihoods"), ("--likelihoods laplace,nope", "nope"),
    ("--likelihoods bernoulli,bernoulli", "0"), ("--likelihoods laplace,categorical", "1"),
    ("--nope", "--nope"), ("--kl nope", "--kl"), ("--samples 0", "samples"),
    ("--direction nope", "direction must be one of 0, 1, not 'nope'"),
    ("--direction 0 --paired 0.5", "direction 0"), ("--device nope", "--device nope"),
    ("--device cuda", "--device cuda is not available here"), ("--device cuda:9", "cuda:9"),
    ("--dataset nope", "--dataset must be glyphs, mnist-split"), ("--dataset none.npz", "none.npz"),
    ("--dataset cut.npz", "cut.npz cannot be read"), ("--dataset text.npz", "text.npz cannot be"),
    ("--dataset dir.npz", "dir.npz cannot be read"),
    ("--out file", "file"), ("--out file/run", "file"),
    ("--out run", "run holds a run: add --resume, or name another folder"),
    ("--out absent --resume", "absent holds no run"), ("--resume", "new holds no run"),
    ("--out run --seed 1 --resume", "--seed 0"),
    ("--out run --resume --latent-dim 5", "--latent-dim 20"),
    ("--out run --resume --limit 20", "--limit None"),
    ("--out run --resume --samples 4", "--samples"),
    ("--out run --resume --dataset other.npz", "run"),
]  # fmt: skip


@pytest.fixture
def mistaken(arrays, tmp_path, monkeypatch):
    """A folder with a run of meme and files that are no data. -> function that reads all of it"""
    monkeypatch.chdir(tmp_path)
    train("meme", dataset=arrays, epochs=1, out="run")
    np.savez("other.npz", **{name: x + x for name, x in np.load(arrays).items()})
    Path("cut.npz").write_bytes(arrays.read_bytes()[:200])
    Path("text.npz").write_text("train_0")
    Path("dir.npz").mkdir()
    Path("file").write_text("kept")
    return lambda: {p: p.is_file() and p.read_bytes() for p in tmp_path.rglob("*")}


def test_a_mistake_is_one_sentence_and_nothing_is_written(mistaken, arrays, capsys):
    capsys.readouterr()
    before = mistaken()
    others = [
        ("mvae", "--out run --resume", "run"),
        ("vaevae", "--unpaired split", "--unpaired all"),
        ("mvae", "--subsets 1", "subsets must be from 0 to 0"),
        ("mmvae", "--tight --objective elbo", "tight needs iwae or dreg"),
    ]
    for script, typed, says in [*(("meme", *mistake) for mistake in MISTAKES), *others]:
        refused(script, "--dataset", arrays, "--out", "new", *typed.split())
        assert says in sentence(capsys) and mistaken() == before, typed


def test_a_folder_that_cannot_be_written_is_named(arrays, tmp_path, capsys, monkeypatch):
    def denied(*args, **kwargs):
        raise PermissionError(13, "Permission denied", "runs/x")

    monkeypatch.setattr(Path, "mkdir", denied)
    refused("mvae", dataset=arrays, out=tmp_path / "run")
    assert "Permission denied" in sentence(capsys) and not (tmp_path / "run").exists()


@pytest.mark.parametrize("unpaired, size", [("split", 5), ("0", 1), ("all", 1), ("none", 5)])
@MODELS
def test_one_pair_in_a_hundred_trains_or_is_refused(
    script, unpaired, size, arrays, tmp_path, capsys
):
    flags = dict(dataset=arrays, paired=0.01, unpaired=unpaired, batch_size=size, epochs=1)
    if size == 1:  # the smallest of everything
        flags |= dict(paired=0.1, limit=10, latent_dim=1)
        flags |= dict(samples=1) if script in ("meme", "mmvae") else {}
    if script == "vaevae" and unpaired in ("0", "none"):  # no stream of modality 1 alone
        refused(script, **flags, out=tmp_path / "run")
        assert "--objective svae" in sentence(capsys)
    else:
        train(script, **flags, out=tmp_path / "run")
        assert all(w.isfinite().all() for w in weights(tmp_path / "run").values())
        assert all(map(math.isfinite, log_of(tmp_path / "run")[0].values()))


# ---------------------------------------------------------------------------------- the text itself


def halves(script):
    """The text of a script, above its line and below it."""
    text = (ROOT / f"{script}.py").read_text(encoding="utf-8")
    line = r"^# -+ the training loop, identical in five scripts\n"
    above, below = re.split(line, text, flags=re.M)
    return above, below


def test_the_lower_halves_are_one_text_in_short_functions():
    [loop] = {halves(script)[1] for script in SCRIPTS}
    functions = [node for node in ast.parse(loop).body if isinstance(node, ast.FunctionDef)]
    assert max(node.end_lineno - node.lineno + 1 for node in functions) <= 110


def imported(text, everywhere=True):
    """The names of the modules that a text imports, anywhere or at its top level."""
    tree, found = ast.parse(text), set()
    for node in ast.walk(tree) if everywhere else tree.body:
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module.split(".")[0])
    return found


def test_imports_go_one_way():
    standard, late = set(sys.stdlib_module_names), {"matplotlib", "rdkit", "scipy", "sklearn"}
    ours = {*SCRIPTS, "nets", "data", "eval", "benchmarks"}
    texts = {path.stem: path.read_text(encoding="utf-8") for path in ROOT.glob("*.py")}
    for script in SCRIPTS:
        assert imported(halves(script)[0]) <= {"torch", "nets", "math", "itertools"}
        assert imported(halves(script)[1]) <= {"data"} | standard
    assert imported(texts["nets"]) <= {"torch"} | standard
    assert imported(texts["data"], False) <= {"torch", "numpy"} | standard
    assert not imported(texts["data"]) & ours
    for path in (ROOT / "benchmarks").glob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert imported(text) & ours <= {"nets", "data", "benchmarks"}, path
        assert not imported(text, False) & late, path
    assert imported(texts["eval"], False) <= {"numpy"} | standard
    assert not imported(texts["eval"]) & set(SCRIPTS)


ALONE = """
import argparse, importlib, sys, torch
import nets
for name in sys.argv[1:]:
    script, p = importlib.import_module(name), argparse.ArgumentParser()
    script.options(p.add_argument)
    p.set_defaults(**script.MODEL.__init__.__kwdefaults__)
    torch.manual_seed(0)
    model = script.MODEL(nets.modalities("glyphs"), 4, **vars(p.parse_args([])))
    xs = [torch.rand(4, *m.shape) for m in model.modalities]
    streams = [(0.5, xs), (0.25, [xs[0], None]), (0.25, [None, xs[1]])]
    weights, losses = list(model.parameters()), []
    for step in range(4):
        torch.manual_seed(1)  # the same noise, so that the loss falls
        loss = model(streams).sum()
        gradients = torch.autograd.grad(loss, weights, allow_unused=True)
        with torch.no_grad():
            for w, g in zip(weights, gradients):
                w -= 0 if g is None else 1e-3 * g.sign()
        losses.append(loss.item())
    assert losses[-1] < losses[0], (name, losses)
assert not {"data", "eval", "benchmarks"} & set(sys.modules)
"""
BARE = """
import sys
sys.modules |= dict.fromkeys("scipy matplotlib sklearn rdkit torchvision PIL".split())
import meme
try:
    meme.main(["--dataset", "glyphs"])
except SystemExit as stopped:
    assert stopped.code == 2
meme.main(sys.argv[1:])
"""


def run_alone(folder, code, *argv):
    """Python in a folder that has no other of our files beside it."""
    command = [sys.executable, "-c", code, *map(str, argv)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)


def test_the_upper_half_and_nets_alone_train_a_model(tmp_path):
    shutil.copy(ROOT / "nets.py", tmp_path)
    for script in SCRIPTS:
        (tmp_path / f"{script}.py").write_text(halves(script)[0], encoding="utf-8")
    done = run_alone(tmp_path, ALONE, *SCRIPTS)
    assert done.returncode == 0, done.stderr


def test_three_files_alone_train_without_optional_packages(arrays, tmp_path):
    (folder := tmp_path / "alone").mkdir()
    for file in ("meme.py", "nets.py", "data.py"):
        shutil.copy(ROOT / file, folder)
    done = run_alone(folder, BARE, "--dataset", arrays, "--epochs", 1, "--out", "run")
    assert done.returncode == 0, done.stderr
    assert files_of(folder / "run") == FILES
    said = [line for line in done.stderr.splitlines() if not line.startswith("usage:")]
    assert len(said) == 1 and "glyphs needs the folder benchmarks/" in said[0]


# ---------------------------------------------------------------- the commands and code of the pages


def page(name):
    return (ROOT / name).read_text(encoding="utf-8")


def commands(kind):
    """The command lines that train, of README.md and docs/reproduce.md or of the papers' tables.
    -> (script, flags) of each"""
    reproduce = page("docs/reproduce.md")
    if kind == "shown":
        typed = r"^    (?:pip .* && )?(?:python|torchrun \S+ \d+) (.*)"
        lines = re.findall(typed, page("README.md") + reproduce, re.M)
    else:
        rows = "".join(re.findall(r"^\| \[(?:MEME|PoE)\] .*", reproduce, re.M))
        lines = dict.fromkeys(re.findall(r"`python (\w+\.py [^`]*)`", rows))
    for script, *flags in (line.partition("#")[0].split() for line in lines):
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


@pytest.fixture
def run_briefly(small_root, small_net, tmp_path, monkeypatch):
    """Trains as commands say, on few examples. -> how many did"""
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


def test_every_command_of_the_papers_tables_builds_its_model(small_root, small_net, monkeypatch):
    shi(small_root)
    cub.prepare_cub(small_root, "none")
    load, loaded, built = data.load, {}, set()

    def load_once(*args):
        if str(args) not in loaded:
            loaded[str(args)] = load(*args)
        return loaded[str(args)]

    monkeypatch.setattr(data, "load", load_once)
    for script, flags in commands("tables"):
        if "spectra" not in flags:
            flags = [*flags, "--data", str(small_root), "--limit", "40"]
            _, args = SCRIPTS[script].parse_args(flags)
            dataset, streams, model, record = SCRIPTS[script].build(args, {})
            xs = data.select(dataset.train, streams[0][0], streams[0][1][:2])
            assert model([(1.0, xs)]).isfinite().all(), flags
            built.add((script, *flags))
    assert len(built) >= 40


@slow
def test_every_command_of_the_papers_tables_trains(run_briefly):
    assert run_briefly(commands("tables")) >= 40


def code_of(name):
    return re.findall(r"```python\n(.*?)```", page(name), re.S)


def test_the_code_of_the_first_page_runs():
    blocks = [block for block in code_of("README.md") if "import" in block]
    assert len(blocks) >= 2
    for block in blocks:
        exec(block, {})


def test_the_data_set_of_docs_extend_trains_as_any_other(tmp_path, monkeypatch):
    (code,) = code_of("docs/extend.md")
    exec(code, vars(module := types.ModuleType("benchmarks.shapes")))
    monkeypatch.setitem(sys.modules, "benchmarks.shapes", module)
    monkeypatch.setitem(data.DATASETS, "shapes", "shapes")
    train("svae", dataset="shapes", epochs=1, out=tmp_path / "run")
    assert all(map(math.isfinite, log_of(tmp_path / "run")[0].values()))
