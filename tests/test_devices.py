"""Tensors stay on their device, and a training step waits for nothing. No GPU is needed.

The device is PyTorch's `meta`, with tensors that hold their values on the CPU after all. As on a GPU
they do not mix with the CPU's; it is counted how often one side would wait for the other.
"""

import copy
import itertools
import tempfile
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

import data
import eval as evaluation
import nets
from benchmarks import cub, figures, npz, oracles, spectra
from helpers import SCRIPTS, save_arrays, toy

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


# ---------------------------------------------------------------------------------------- the models


def own_arrays(n=40):
    """The spec of a user's .npz: numbers, counts, classes."""
    rng = np.random.default_rng(0)
    xs = rng.normal(size=(n, 4)), rng.integers(0, 9, (n, 6)), np.arange(n) % 5
    with tempfile.TemporaryDirectory() as folder:
        return data.load(str(save_arrays(Path(folder, "own.npz"), *xs))).spec


SPECS = {name: {} for name in ("glyphs", "mnist-split", "mnist-split3")}
SPECS |= {
    "cub": {"vocabulary": 50},
    "spectra": {"width": 0.01},
    "npz": {"arrays": own_arrays()["arrays"]},
}
OPTIONS = [(name, "npz", {}) for name in SCRIPTS] + [
    ("mvae", name, {}) for name in SPECS if name != "npz"
]
OPTIONS += [
    ("meme", "cub", {}),
    ("meme", "glyphs", dict(kl="sample", full_gradient=True)),
    ("meme", "glyphs", dict(direction="colour", samples=1)),
    ("meme", "npz", dict(explicit="product")),
    ("svae", "glyphs", dict(objective="vaevae", prior_expert=True, experts="exact")),
    ("vaevae", "npz", dict(objective="svae", variant="a")),
    ("mmvae", "glyphs", dict(objective="elbo", posterior="laplace")),
    ("mmvae", "glyphs", dict(objective="dreg")),
    ("mmvae", "glyphs", dict(objective="dreg", tight=True)),
    ("mvae", "npz", dict(subsets=2, anneal=3, experts="exact")),
]
CASES = pytest.mark.parametrize("name, dataset, options", OPTIONS)
MODELS = pytest.mark.parametrize("name", SCRIPTS)


def built(name, dataset, options, n=2):
    """A model, n random examples of the data set's shapes, and the masks of the streams."""
    modalities = nets.modalities(dataset, **SPECS[dataset])
    model = SCRIPTS[name].MODEL(modalities, 8, **options)
    xs = [torch.rand(n, *m.shape) for m in modalities]
    xs = [(5 * x).long() if m.likelihood == "categorical" else x for m, x in zip(modalities, xs)]
    masks = evaluation.subsets([m.name for m in modalities]).values()
    return model, xs, [mask for mask in masks if "direction" not in options or mask[1]]


def losses(model, xs, masks):
    torch.manual_seed(1)
    return model([(0.5, [x if s else None for x, s in zip(xs, mask)]) for mask in masks])


@CASES
def test_a_step_stays_on_the_device_and_waits_for_nothing(name, dataset, options, device):
    model, xs, masks = built(name, dataset, options)
    plain = losses(copy.deepcopy(model), xs, masks)
    model, xs = model.to("meta"), [x.to("meta") for x in xs]
    device.reads = device.writes = 0
    if hasattr(model, "start_epoch"):
        model.start_epoch(1), model.start_epoch(3)
    found = losses(model, xs, masks)
    found.sum().backward()
    assert isinstance(found, There) and torch.equal(found.held, plain)
    assert {type(w.grad) for w in model.parameters()} <= {There, type(None)}
    for mask in masks:
        shown = [x if s else None for x, s in zip(xs, mask)]
        assert all(isinstance(x, There) for x in model.decode(model.posterior(*shown).sample()))
    assert isinstance(evaluation.log_likelihood(model, xs, samples=2), There)
    assert isinstance(model.prior(xs[0], *[None] * (len(xs) - 1)).sample((2,)), There)
    if name == "meme":
        model.init_pseudo_samples(xs)
    assert isinstance(model.prior().sample((2,)), There)
    assert device.reads == device.writes == 0


COMPILED = [pytest.param(*case, marks=pytest.mark.slow) for case in [
    ("meme", dict(kl="sample", full_gradient=True)), ("meme", dict(direction="colour")),
    ("svae", dict(objective="vaevae", prior_expert=True, experts="exact")),
    ("vaevae", dict(objective="svae", variant="a")), ("mvae", dict(experts="exact", anneal=3)),
    ("mmvae", dict(objective="elbo", posterior="laplace")), ("mmvae", dict(objective="dreg")),
    ("mmvae", dict(objective="dreg", tight=True)), ("mmvae", dict(tight=True)),
    *((name, {}) for name in SCRIPTS),
]]  # fmt: skip


def compiled(model, batches):
    """The number of graphs that torch.compile makes of the steps; losses and gradients must be those
    without it."""
    torch.compiler.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    net = torch.compile(model, backend=backend, fullgraph=True)  # an error if it must be cut
    weights = list(model.parameters())
    for xs, masks in batches:
        found = [losses(each, xs, masks) for each in (net, model)]
        assert torch.equal(*found)
        found = [torch.autograd.grad(x.sum(), weights, allow_unused=True) for x in found]
        assert_close(*found, rtol=0, atol=0)
    return len(graphs)


@MODELS
def test_a_step_is_compiled_to_one_graph(name):
    model, xs, masks = built(name, "glyphs", {})
    assert compiled(model, [(xs, masks[-1:])] * 2) == 1


@pytest.mark.parametrize("name, options", COMPILED)
def test_a_smaller_batch_is_compiled_once_more(name, options):
    model, xs, masks = built(name, "glyphs", options, n=5)
    assert compiled(model, [([x[:n] for x in xs], masks) for n in (5, 5, 3, 5, 4)]) == 2


# ------------------------------------------------------------------------------------------ the loop


@pytest.mark.parametrize("name", ["meme", "mvae"])  # the loop is the same text in all
def test_nothing_waits_between_the_first_batch_and_the_last(
    name, arrays, tmp_path, device, monkeypatch
):
    script, batches, found, saved = SCRIPTS[name], data.batches, [], []

    def watched(*args):
        for batch in batches(*args):
            found.append((device.reads, device.writes))
            yield batch

    monkeypatch.setattr(data, "batches", watched)
    monkeypatch.setattr(script, "save", lambda *args: saved.append(args))
    ticks = itertools.count()  # the loop reads the losses once a second
    monkeypatch.setattr(script.time, "perf_counter", lambda: next(ticks) / 1e6)
    flags = f"--dataset {arrays} --paired 0.5 --unpaired all --batch-size 48 --epochs 1 --clip 1"
    script.main([*flags.split(), "--device", "meta", "--out", str(tmp_path / "run")])
    _, record, model, _, epoch, log = saved[-1]
    assert len(found) > 3 and len(set(found[1:])) == 1
    assert epoch == len(log) == 1  # with the objective and log p(x|z), which are read
    assert record["device"] == "meta"
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


def test_observed_examples_lie_where_their_split_does(device):
    split, streams = toy(n=40).train, data.pairing(40, ("mnist", "svhn"), 0.5)
    pairs = [data.observed(s, streams, 5) for s in (split, split.to("meta"))]
    assert all(torch.equal(a, b.held) for a, b in zip(*pairs))


# --------------------------------------------------------------------------------------- the metrics


def judges(dataset):
    """Oracles of every view, as they start."""
    xs = dataset.test[torch.arange(1)]
    found = {name: view(xs).shape[1] for name, view in evaluation.views(dataset).items()}
    return {name: oracles.Oracle(channels).eval() for name, channels in found.items()}


def both(device, call, model, dataset, judged=None):
    """call(model, dataset, judged) on the CPU and on the device, with the same noise.
    -> how often it reads there"""
    there = (
        copy.deepcopy(model).to("meta"),
        data.Dataset(*(x.to("meta") if isinstance(x, data.Split) else x for x in dataset)),
    )
    judged = judged or {}
    torch.manual_seed(0)
    plain = call(model, dataset, judged)
    judged = {name: copy.deepcopy(oracle).to("meta") for name, oracle in judged.items()}
    device.reads = 0
    torch.manual_seed(0)
    found = call(*there, judged)
    for a, b in zip(tree_leaves(found), tree_leaves(plain), strict=True):
        assert np.array_equal(values(a), b)
    return device.reads


def joint(model, dataset, judged):
    return evaluation.joint_coherence(model, dataset, judged, samples=len(dataset.test))


def latent(model, dataset, judged):
    index = torch.arange(len(dataset.test))
    return evaluation.latent_samples(model, dataset.test, (True, False), index)


@pytest.mark.parametrize("name, metric, n", [  # of 500 test examples at most
    ("mnist-split", evaluation.split_accuracy, 1002), ("mnist-svhn", evaluation.coherence, 40),
    ("mnist-svhn", evaluation.mutual_information, 40), ("mnist-svhn", joint, 1002),
    ("mnist-split", latent, 1002),
])  # fmt: skip
def test_a_metric_reads_its_result_and_no_batch(name, metric, n, device):
    model = SCRIPTS["meme"].MODEL(nets.modalities(name), 8)
    one, two = toy(name, 20), toy(name, n)
    judged = judges(one)
    assert both(device, metric, model, one, judged) == both(device, metric, model, two, judged)


def everything(model, dataset, judged):
    """The outputs of an evaluation and its figures, except the metrics above."""
    views, masks = evaluation.views(dataset), evaluation.subsets(dataset.names)
    predict = lambda means: evaluation.predict(means, dataset, judged)  # noqa: E731
    yield evaluation.evaluate(model, dataset, {}, examples=3, samples=40)
    yield figures.generations(model, dataset, masks, views)
    yield figures.joint_samples(model, views, predict)
    yield figures.distances(model, dataset.test, 0, 1, evaluation.w2)
    yield figures.latent_points(model, dataset, masks, evaluation.latent_samples)
    yield figures.gradient_ratios(model, dataset.test[torch.arange(5)], draws=3)


def test_an_evaluation_and_its_figures_stay_on_the_device(device):
    dataset = toy(n=40)
    model = SCRIPTS["meme"].MODEL(nets.modalities(dataset.name), 8)
    both(device, lambda *given: list(everything(*given)), model, dataset, judges(dataset))


@pytest.mark.parametrize("name", ["meme", "svae"])
def test_own_arrays_are_scored_and_filled_in_on_the_device(name, device, tmp_path):
    rng, n = np.random.default_rng(0), 60
    a, b, c = rng.normal(size=(n, 4)), rng.integers(0, 9, (n, 6)), np.arange(n) % 3
    a[5:20, 2] = np.nan
    mask = rng.random((n, 3)) > 0.2
    mask[~mask.any(1)] = True
    path = save_arrays(tmp_path / "own.npz", a, b, c, train_mask=mask, test_mask=mask)
    np.savez(new := tmp_path / "new.npz", **{"0": a[:9], "1": b[:9], "mask": mask[:9]})
    dataset = data.load(str(path))
    model = SCRIPTS[name].MODEL(nets.modalities(**dataset.spec), 4)
    files = (tmp_path / f"{k}.npz" for k in itertools.count())

    def outputs(model, dataset, _):
        yield npz.evaluate(model, dataset)
        for draws in (None, 3):
            npz.fill(model, dataset.spec, new, out := next(files), draws, dataset=dataset)
            yield dict(np.load(out))

    both(device, lambda *of: list(outputs(*of)), model, dataset)


def test_an_oracle_waits_for_its_gaussian_process_alone(device):
    dataset, waited = toy("mnist-split", 60), []
    split, (view,) = dataset.train.to("meta"), evaluation.views(dataset).values()
    for steps in (2, 4):
        device.reads = device.writes = 0
        oracle = oracles.train_oracle(split, view, steps)
        waited.append((device.reads, device.writes))
    assert {type(w) for w in oracle.state_dict().values()} == {There}
    assert waited[1] == (waited[0][0] + 2, waited[0][1])  # whether its Cholesky factor exists


def test_an_oracle_is_loaded_on_a_device(device, tmp_path, monkeypatch):
    def accuracy(model, dataset, judged):
        return oracles.load_oracle(dataset, "image", tmp_path, steps=2)[1]

    monkeypatch.setattr(data, "atomic_write", lambda *args: None)
    both(device, accuracy, nn.Identity(), toy("mnist-split", 60))


def words_and_photos():
    """20 + 10 captions of 4 + 2 photos."""
    words = [*cub.SPECIALS, *"the a bird red wing".split()]
    splits = []
    for n in (4, 2):
        captions = torch.randint(3, len(words), (5 * n, 32))
        rows = [torch.arange(n).repeat_interleave(5), torch.arange(5 * n)]
        splits.append(data.Split([torch.rand(n, 2048), captions], rows))
    spec = {"name": "cub", "vocabulary": len(words)}
    return data.Dataset("cub", *splits, spec, ("image", "caption"), words=words)


def molecules():
    """20 + 10 spectra of as many molecules, and 3 to be named among 4 candidates each."""

    def peaks(n):
        columns = torch.arange(5 * n, dtype=torch.int32) * 7 % spectra.BINS
        return spectra.Sparse(5 * torch.arange(n + 1), columns, torch.rand(5 * n), spectra.BINS)

    splits = [data.Split([peaks(n), torch.rand(n, 2149) > 0.5]) for n in (20, 10)]
    bits = np.random.default_rng(0).integers(0, 256, (12, 269), np.uint8)
    challenges = spectra.Challenges(list("ABC"), peaks(3), np.arange(3), 4 * np.arange(4), bits)
    spec = {"name": "spectra", "width": 0.01}
    return data.Dataset("spectra", *splits, spec, ("spectrum", "fingerprint")), challenges


def test_metrics_of_cub_and_spectra_stay_on_the_device(device, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "atomic_write", lambda *args: None)
    dataset = words_and_photos()
    model = SCRIPTS["meme"].MODEL(nets.modalities(**dataset.spec), 8).eval()
    both(device, lambda m, d, _: cub.correlated(m, d, tmp_path, 30), model, dataset)
    dataset, challenges = molecules()
    model = SCRIPTS["meme"].MODEL(nets.modalities(**dataset.spec), 8).eval()
    both(device, lambda m, d, _: spectra.scores(m, d, challenges), model, dataset)
