"""Tensors stay on their device, and a training step waits for nothing. No GPU is needed.

The device is PyTorch's `meta`, with tensors that hold their values on the CPU after all. As on a
GPU they do not mix with the CPU's; it is counted how often one side would wait for the other.
"""

import copy
import itertools
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

import data
import nets
from eval import coherence, joint_coherence, latent_accuracy, log_likelihood, log_likelihoods
from eval import mutual_information, subsets
from evaluation import command, cub, fill, oracles, spectra
from helpers import SCRIPTS, every_pattern, save_arrays, toy
from loaders.cub import SPECIALS
from loaders.spectra import BINS, Challenges, Sparse

aten = torch.ops.aten
COPIES = aten.copy_.default, aten._to_copy.default
INDEXING = aten.index.Tensor, aten.index_put.default, aten.index_put_.default
READING = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


class There(torch.Tensor):
    """A tensor on the device; `held` are its values."""

    @staticmethod
    def __new__(cls, held):
        if held.layout is not torch.strided:
            return cls._make_wrapper_subclass(cls, held.shape, dtype=held.dtype, device="meta")
        place = dict(strides=held.stride(), storage_offset=held.storage_offset())
        return cls._make_wrapper_subclass(cls, held.shape, **place, dtype=held.dtype, device="meta")

    def __init__(self, held):
        self.held = held

    def tolist(self):
        return self.cpu().tolist()

    def to_dense(self):
        return There(self.held.to_dense())

    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None):
        raise AssertionError(f"{op} outside of the test")


def values(x):
    return x.held if isinstance(x, There) else x


class Device(TorchDispatchMode):
    """reads: how often a value came to the CPU, or a size that depends on values; writes: how often
    a tensor went from there to the device. A GPU's queue of work is waited for in both."""

    reads = writes = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        sides = {isinstance(x, There) for x in tensors}
        goes_there = True in sides
        if goes_there and op not in COPIES:
            self.check(op, args, [x for x in tensors if not isinstance(x, There)])
        if op is aten.copy_.default:
            goes_there = isinstance(args[0], There)
        elif kwargs.get("device") is not None:
            goes_there = torch.device(kwargs["device"]).type == "meta"
            kwargs["device"] = torch.device("cpu")
            assert not goes_there or kwargs.get("generator") is None, (
                f"{op}: a generator of the CPU"
            )
        if op in COPIES:
            self.reads += True in sides and not goes_there
            self.writes += False in sides and goes_there
        out = op(*tree_map(values, args), **tree_map(values, kwargs))
        if not goes_there:
            return out
        out = tree_map(lambda x: There(x) if isinstance(x, torch.Tensor) else x, out)
        return return_and_correct_aliasing(op, args, kwargs, out)

    def check(self, op, args, here):
        """An operation on the device, with tensors that are `here`, on the CPU."""
        if op in INDEXING:
            index = [i for i in args[1] if i is not None]
            here = [x for x in here if not any(x is i for i in index)]
            self.reads += any(i.dtype in (torch.bool, torch.uint8) for i in index)
            self.writes += any(not isinstance(i, There) for i in index)
        else:  # Cholesky's reads whether there is one
            self.reads += bool(READING & set(op.tags)) or "check_errors" in op.name()
        stray = [tuple(x.shape) for x in here if x.dim() or torch.Tag.pointwise not in op.tags]
        assert not stray, f"{op}: tensors of shape {stray} are left on the CPU"


@pytest.fixture
def device(monkeypatch):
    """A Device, without what PyTorch refuses to `meta` and not to CUDA."""
    for name in ("Adam", "AdamW"):
        plain = lambda *a, kind=getattr(torch.optim, name), fused=None, **k: kind(*a, **k)  # noqa: E731
        monkeypatch.setattr(torch.optim, name, plain)
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: nullcontext())
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    with Device() as device:
        yield device
    torch.__future__.set_overwrite_module_params_on_conversion(False)


# --------------------------------------------------------------------------------------- the models

TABLE = {  # a user's .npz
    "numbers": dict(kind="numbers", shape=[4], likelihood="normal"),
    "counts": dict(kind="counts", shape=[6], likelihood="negative-binomial"),
    "class": dict(kind="class", shape=[], likelihood="categorical", classes=5),
}
SPECS = {"cub": dict(vocabulary=50), "spectra": dict(width=0.01), "npz": dict(arrays=TABLE)}
CASES = [(name, "npz", {}) for name in ("meme", "vaevae", "mmvae", "mvae")]
CASES += [("svae", "glyphs", {})]
CASES += [("mvae", name, {}) for name in ("glyphs", "mnist-split", "mnist-split3", "spectra")]
CASES += [
    ("meme", "cub", {}),
    ("meme", "glyphs", dict(kl="sample", full_gradient=True)),
    ("meme", "npz", dict(explicit="product")),
    ("svae", "glyphs", dict(objective="vaevae", prior_expert=True, experts="exact")),
    ("vaevae", "npz", dict(objective="svae", variant="a")),
    ("mmvae", "glyphs", dict(objective="elbo", family="laplace")),
    ("mmvae", "glyphs", dict(objective="dreg", tight=True)),
    ("mvae", "npz", dict(subsets=2, anneal=3, experts="exact")),
]


def build(name, dataset, options, n=2):
    """A model, n random examples of the data set's shapes, and the masks of the streams."""
    modalities = nets.modalities(dataset, **SPECS.get(dataset, {}))
    model = SCRIPTS[name].MODEL(modalities, 8, **options)
    xs = [torch.rand(n, *m.shape) for m in modalities]
    xs = [(5 * x).long() if m.likelihood == "categorical" else x for m, x in zip(modalities, xs)]
    return model, xs, list(subsets([m.name for m in modalities]).values())


def losses(model, xs, masks):
    torch.manual_seed(1)
    return model([(0.5, [x if s else None for x, s in zip(xs, mask)]) for mask in masks])


@pytest.mark.parametrize("name, dataset, options", CASES)
def test_a_step_stays_on_the_device_and_waits_for_nothing(name, dataset, options, device):
    model, xs, masks = build(name, dataset, options)
    plain = losses(copy.deepcopy(model), xs, masks)
    model, xs = model.to("meta"), [x.to("meta") for x in xs]
    device.reads = device.writes = 0
    model.start_epoch(1), model.start_epoch(3)
    there = losses(model, xs, masks)
    there.sum().backward()
    assert isinstance(there, There) and torch.equal(there.held, plain)
    assert {type(w.grad) for w in model.parameters()} <= {There, type(None)}
    for mask in masks:
        inputs = [x if s else None for x, s in zip(xs, mask)]
        assert all(isinstance(x, There) for x in model.decode(model.posterior(*inputs).sample()))
    assert isinstance(log_likelihood(model, xs, samples=2), There)
    assert isinstance(model.prior(xs[0], *[None] * (len(xs) - 1)).sample((2,)), There)
    assert isinstance(model.prior().sample((2,)), There)
    assert device.reads == device.writes == 0
    assert isinstance(model.sample_posterior(xs, 2), There)


def compiled(model, batches):
    """The number of graphs that torch.compile makes of the steps; losses and gradients must be
    those without it."""
    torch.compiler.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    net = torch.compile(model, backend=backend, fullgraph=True)  # an error if it must be cut
    weights = list(model.parameters())
    for xs, masks in batches:
        pair = [losses(each, xs, masks) for each in (net, model)]
        assert torch.equal(*pair)
        pair = [torch.autograd.grad(x.sum(), weights, allow_unused=True) for x in pair]
        assert_close(*pair, rtol=0, atol=0)
    return len(graphs)


@pytest.mark.parametrize("name", ["meme", "svae"])
def test_a_step_is_compiled_to_one_graph(name):
    model, xs, masks = build(name, "glyphs", {})
    assert compiled(model, [(xs, masks[-1:])] * 2) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, options", [(n, o) for n, d, o in CASES if d == "glyphs"] + [(n, {}) for n in SCRIPTS]
)
def test_a_smaller_batch_is_compiled_once_more(name, options):
    model, xs, masks = build(name, "glyphs", options, n=5)
    assert compiled(model, [([x[:n] for x in xs], masks) for n in (5, 5, 3, 5, 4)]) == 2


# ----------------------------------------------------------------------------------------- the loop


@pytest.mark.parametrize("name", ["meme", "mvae"])  # the loop is the same text in all
def test_nothing_waits_between_the_first_batch_and_the_last(
    name, arrays, tmp_path, device, monkeypatch
):
    script, batches, counts, saved = SCRIPTS[name], data.batches, [], []

    def watched(*args):
        for batch in batches(*args):
            counts.append((device.reads, device.writes))
            yield batch

    monkeypatch.setattr(data, "batches", watched)
    monkeypatch.setattr(data, "save_run", lambda *args: saved.append(args))
    ticks = itertools.count()  # the loop reads the losses once a second
    monkeypatch.setattr(script.time, "perf_counter", lambda: next(ticks) / 1e6)
    flags = f"--dataset {arrays} --paired 0.5 --unpaired all --batch-size 48 --epochs 1 --clip 1"
    script.main([*flags.split(), "--device", "meta", "--out", str(tmp_path / "run")])
    _, model, _, epoch, log = saved[-1]
    assert len(counts) > 3 and len(set(counts[1:])) == 1
    assert epoch == len(log) == 1  # with the objective and log p(x|z), which are read
    assert {type(w) for w in model.state_dict().values()} == {There}


@pytest.mark.parametrize("flag, index", [("cuda", None), ("cuda:0", 0), ("cuda:1", 1)])
def test_the_loop_selects_a_gpu_by_its_index_alone(flag, index, arrays, tmp_path, monkeypatch):
    class Reached(Exception):
        pass

    def to(self, device):
        raise Reached(device)

    zeros, selected = torch.zeros, []
    there = {"device": flag}
    monkeypatch.setattr(torch, "zeros", lambda *n, **on: zeros(*n, **({} if on == there else on)))
    monkeypatch.setattr(data.Split, "to", to)
    # torch's own check of the argument, which needs no GPU: a device without an index is refused
    select = torch.cuda._utils._get_device_index
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: selected.append(select(device)))
    with pytest.raises(Reached, match=flag):
        SCRIPTS["mvae"].main(["--dataset", str(arrays), "--device", flag, "--out", str(tmp_path)])
    assert selected == ([] if index is None else [index])


# -------------------------------------------------------------------------------- the evaluation


def digits(tmp_path):
    """The metrics that read images, an oracle's training, and the scores of a classifier of z."""
    dataset = toy(n=16)
    model = SCRIPTS["meme"].MODEL(nets.modalities(dataset.name), 8, pseudo_samples=4)
    channels = {"mnist": 1, "svhn": 3}
    plain = {view: oracles.Oracle(n).eval() for view, n in channels.items()}

    def outputs(model, dataset):
        place = dataset.train.labels.device
        judges = {view: copy.deepcopy(oracle).to(place) for view, oracle in plain.items()}
        yield coherence(model, dataset, judges)
        yield joint_coherence(model, dataset, judges, samples=8)
        yield mutual_information(model, dataset, judges, examples=5)
        yield latent_accuracy(model, dataset)
        yield log_likelihoods(model, dataset, examples=2, samples=20)
        yield oracles.load_oracle(dataset, "mnist", tmp_path / str(place), steps=2)[1]

    return model, dataset, lambda *pair: list(outputs(*pair))


def own_arrays(tmp_path):
    """Scores of a user's arrays, with masks and missing entries, and what --fill writes."""
    n = 30
    x, mask = np.random.default_rng(0).normal(size=(n, 4)), every_pattern(n, 2)
    x[5:20, 2] = np.nan
    path = save_arrays(tmp_path / "own.npz", x, np.arange(n) % 3, train_mask=mask, test_mask=mask)
    np.savez(new := tmp_path / "new.npz", **{"0": x[2:8], "mask": np.ones((6, 2))})
    dataset, files = data.load(path), itertools.count()
    model = SCRIPTS["svae"].MODEL(nets.modalities(**dataset.spec), 4)
    args = dict(paired=1.0, unpaired="split", seed=0)

    def outputs(model, dataset):
        run = command.Run(tmp_path, args, epoch=1, minutes=0.0, model=model, log=[])
        benchmark = command.Benchmark(dataset, {}, {}, str(tmp_path))
        results = [command.evaluate(run, benchmark, examples=3, samples=40)]
        for draws in (None, 3):
            fill.fill(model, new, out := tmp_path / f"{next(files)}.npz", draws, dataset=dataset)
            results.append(dict(np.load(out)))
        return results

    return model, dataset, outputs


def words_and_photos(tmp_path):
    """CUB's correlations, of 20 + 10 captions of 4 + 2 photos."""
    words, splits = [*SPECIALS, *"the a bird red wing".split()], []
    for n in (4, 2):
        captions = torch.randint(3, len(words), (5 * n, 32))
        rows = [torch.arange(n).repeat_interleave(5), torch.arange(5 * n)]
        splits.append(data.Split([torch.rand(n, 2048), captions], rows))
    spec = {"name": "cub", "vocabulary": len(words)}
    dataset = data.Dataset("cub", *splits, spec, ("image", "caption"), words=words)
    model = SCRIPTS["meme"].MODEL(nets.modalities(**spec), 8, pseudo_samples=4).eval()
    return model, dataset, lambda model, dataset: cub.compared_pairs(model, dataset, tmp_path, 8)


def molecules(tmp_path):
    """Scores of 20 + 10 spectra, and of 3 molecules to be named among 4 candidates each."""

    def peaks(n):
        columns = torch.arange(5 * n, dtype=torch.int32) * 7 % BINS
        return Sparse(5 * torch.arange(n + 1), columns, torch.rand(5 * n), BINS)

    splits = [data.Split([peaks(n), torch.rand(n, 2149) > 0.5]) for n in (20, 10)]
    bits = np.random.default_rng(0).integers(0, 256, (12, 269), np.uint8)
    challenges = Challenges(list("ABC"), peaks(3), np.arange(3), 4 * np.arange(4), bits)
    spec = {"name": "spectra", "width": 0.01}
    dataset = data.Dataset("spectra", *splits, spec, ("spectrum", "fingerprint"))
    model = SCRIPTS["meme"].MODEL(nets.modalities(**spec), 8, pseudo_samples=4).eval()
    return model, dataset, lambda model, dataset: spectra.scores(model, dataset, challenges)


SLOW = pytest.param(words_and_photos, marks=pytest.mark.slow)


@pytest.mark.parametrize("case", [digits, own_arrays, molecules, SLOW])
def test_an_evaluation_is_the_same_on_the_device(case, device, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "atomic_write", lambda path, write: write(open(path, "wb"))
                        if Path(path).suffix == ".npz" else None)  # fmt: skip
    model, dataset, outputs = case(tmp_path)
    there = (
        copy.deepcopy(model).to("meta"),
        dataset._replace(train=dataset.train.to("meta"), test=dataset.test.to("meta")),
    )
    results = []
    for pair in ((model, dataset), there):
        torch.manual_seed(0)
        results.append(tree_leaves(outputs(*pair)))
    for a, b in zip(*results, strict=True):
        assert np.array_equal(values(b), a, equal_nan=not isinstance(a, str))
