"""The step replayed from CUDA graphs. Without a GPU a stand-in takes the place of `capture`: it keeps
the inputs, as a graph keeps their addresses, and repeats the step on them."""

import itertools

import pytest
import torch

import data
import mvae
import nets
import svae
import vaevae
from helpers import SCRIPTS, checkpoint, save_arrays, train, weights

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def stand_in(captured):
    """capture(step, inputs) without a GPU; the kinds of batch that it was called for are appended to
    `captured`."""

    def capture(step, inputs):
        captured.append(inputs)
        loss = torch.full((), torch.nan)
        return (lambda: loss.copy_(step(inputs))), loss

    return capture


def kinds(batches):
    """The distinct weights, masks and sizes among batches."""
    return {tuple((w, *(x is not None and len(x) for x in xs)) for w, xs in b) for b in batches}


@pytest.fixture
def epoch():
    """The batches of an epoch with three streams, the last one smaller; every value differs."""
    split = data.Split([torch.arange(100.0).view(50, 2), 1000 + torch.arange(150.0).view(50, 3)])
    streams = data.pairing(50, ("a", "b"), paired=0.5, unpaired="all")
    return list(data.batches(split, streams, 12, "balanced", torch.Generator().manual_seed(0)))


def total(batch):
    """A loss that tells every batch, and every weight, from every other."""
    return sum(w * (k + 1) * x.sum() for w, xs in batch for k, x in enumerate(xs) if x is not None)


def test_every_batch_is_replayed_with_its_own_data(epoch, monkeypatch):
    captured, calls = [], []

    def step(batch):
        calls.append(total(batch))
        return calls[-1].clone()

    monkeypatch.setattr(mvae, "capture", stand_in(captured))
    graphs = mvae.Graphs(step)
    batches = epoch * 4
    losses = [graphs(batch) for batch in batches]
    expected = [total(batch) for batch in batches]
    assert losses == expected and calls == expected  # once each, in order; losses are copies
    assert len(captured) == len(kinds(batches)) == 2


def test_the_first_three_batches_of_a_kind_run_as_they_are(epoch, monkeypatch):
    captured = []
    monkeypatch.setattr(mvae, "capture", stand_in(captured))
    graphs = mvae.Graphs(total)
    for count, batch in enumerate(itertools.repeat(epoch[0], 5), 1):
        graphs(batch)
        assert len(captured) == (count > 3)


@pytest.mark.parametrize("change", ["mask", "weight", "size"])
def test_another_mask_weight_or_size_has_its_own_graph(epoch, monkeypatch, change):
    captured, ((weight, xs), *_) = [], epoch[0]
    other = {
        "mask": [(weight, [xs[0], None])],
        "weight": [(2 * weight, xs)],
        "size": [(weight, [x[1:] for x in xs])],
    }[change]
    monkeypatch.setattr(mvae, "capture", stand_in(captured))
    graphs = mvae.Graphs(total)
    for batch in 4 * [[(weight, xs)]] + 5 * [other] + [[(weight, xs)]]:
        assert graphs(batch) == total(batch)
    assert len(captured) == 2


def test_no_more_than_32_kinds_are_captured(monkeypatch):
    captured = []
    monkeypatch.setattr(mvae, "capture", stand_in(captured))
    graphs = mvae.Graphs(total)
    for n in range(1, 36):
        batch = [(1.0, [torch.full((n, 1), 2.0)])]
        assert [graphs(batch) for _ in range(5)] == [2 * n] * 5
    assert len(captured) == 32


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_run_from_graphs_ends_with_the_weights_of_a_plain_one(name, tmp_path, monkeypatch):
    """With --decay, --clip, an annealed beta, three streams and a last batch that is smaller."""
    script, captured, optimizers = SCRIPTS[name], [], []
    x, y = torch.randn(90, 3), torch.randn(90, 2)
    save_arrays(tmp_path / "d.npz", x.numpy(), y.numpy())
    flags = dict(dataset=tmp_path / "d.npz", epochs=4, batch_size=20, unpaired="all", paired=0.5)
    flags |= dict(lr=2**-8, decay=0.5, clip=1)  # rates that float32 holds
    if name == "mvae":
        flags["anneal"] = 3
    train(name, **flags, out=tmp_path / "plain")
    adam = torch.optim.Adam

    def recorded(*args, capturable, **more):  # a CPU's Adam cannot be captured, nor need it be
        optimizers.append((adam(*args, **more), capturable))
        return optimizers[-1][0]

    monkeypatch.setattr(torch.optim, "Adam", recorded)
    monkeypatch.setattr(script, "can_capture", lambda device: True)
    monkeypatch.setattr(script, "capture", stand_in(captured))
    rates = []
    fill = torch.Tensor.fill_
    monkeypatch.setattr(torch.Tensor, "fill_", lambda t, v: rates.append((t, v)) or fill(t, v))
    train(name, **flags, out=tmp_path / "graph", graph=True)
    assert captured
    plain, graph = weights(tmp_path / "plain"), weights(tmp_path / "graph")
    assert all(torch.equal(graph[key], plain[key]) for key in plain)
    ((optimizer, capturable),) = optimizers
    lr = optimizer.param_groups[0]["lr"]
    assert capturable and isinstance(lr, torch.Tensor)
    assert [v for t, v in rates if t is lr] == [2**-8, 2**-8, 2**-8, 2**-9]


def test_models_that_draw_on_the_host_are_not_captured():
    def modalities(count):
        rows = {f"x{k}": dict(kind="numbers", shape=[2], likelihood="normal") for k in range(count)}
        return nets.modalities("npz", arrays=rows)

    for cls, option, count in (
        (mvae.MVAE, "subsets", 3),
        (svae.SVAE, "terms", 4),
        (vaevae.VAEVAE, "terms", 4),
    ):
        for value in (0, 1):
            model = cls(modalities(count), 2, **{option: value})
            assert model.random_on_host == (value == 1)
    assert not svae.SVAE(modalities(3), 2, terms=1).random_on_host
    assert not vaevae.VAEVAE(modalities(3), 2, terms=1).random_on_host
    for name in ("meme", "mmvae"):
        assert not SCRIPTS[name].MODEL.random_on_host


@CUDA
@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize(
    "flags", [{}, dict(decay=0.5), dict(clip=1), dict(amp=True), dict(unpaired="all")]
)
def test_on_a_gpu_a_graph_has_the_losses_of_a_plain_run(name, flags, tmp_path):
    for graph in (False, True):
        out = tmp_path / f"graph{graph}"
        switch = "--graph" if graph else "--no-graph"
        train(name, switch, epochs=10, limit=320, paired=0.5, out=out, device="cuda", **flags)
    plain, graph = (
        [row["objective"] for row in checkpoint(tmp_path / f"graph{g}")["log"]]
        for g in (False, True)
    )
    torch.testing.assert_close(torch.tensor(graph), torch.tensor(plain), rtol=1e-4, atol=0)


@CUDA
def test_a_run_from_graphs_resumes_on_a_cpu_and_back(tmp_path):
    for epochs, device in ((2, "cuda"), (3, "cpu"), (4, "cuda")):
        resume = ["--resume"] if epochs > 2 else []
        train(
            "mvae", "--graph", *resume, epochs=epochs, limit=320, out=tmp_path / "r", device=device
        )
    assert checkpoint(tmp_path / "r")["epoch"] == 4
