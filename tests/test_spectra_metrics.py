"""spectra: scores of predicted bits, ranks of candidates, their notes and figures."""

import types

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributions import Normal

import data
from evaluation import figures, spectra
from loaders import spectra as files


def sparse_of(dense):
    rows = [(np.flatnonzero(x).astype(np.int16), x[x > 0].astype(np.float32)) for x in dense]
    return files.Sparse(*map(torch.from_numpy, files.csr(rows)), dense.shape[1])


# ---------------------------------------------------------------------------------- bits and ranks


def test_cross_entropy_and_tanimoto_equal_their_formulas():
    generator = np.random.default_rng(0)
    p, bits = generator.random(21), generator.random((5, 21)) < 0.5
    found = spectra.bit_cross_entropy(p.astype("f4"), np.packbits(bits, axis=1), block=2)
    assert found == pytest.approx(-np.log(np.where(bits, p, 1 - p)).sum(1), rel=1e-5)
    assert found.dtype == np.float64
    a, b = np.array([[[1, 1, 0], [0, 0, 0], [1, 0, 0]], [[1, 0, 1], [0, 0, 0], [0, 1, 0]]], bool)
    assert spectra.tanimoto(a, b) == pytest.approx([1 / 3, 1, 0])
    assert spectra.tanimoto(a[2:], a[2:]) == 1


def test_a_wrong_bit_costs_at_most_9_nats():
    found = spectra.bit_cross_entropy(np.array([1.0, 0.0, 1.0]), np.packbits([[1, 1, 0]], axis=1))
    # one bit is right, two are wrong, each with probability 1 - 1e-4
    assert found == pytest.approx([-np.log(1 - 1e-4) - 2 * np.log(1e-4)])
    one = spectra.bit_scores(np.array([[1.0, 0.0]]), np.array([[True, True]]))
    assert one["cross_entropy"] == pytest.approx(-np.log(1 - 1e-4) - np.log(1e-4))


def test_bits_are_scored_by_accuracy_tanimoto_and_cross_entropy():
    p = np.array([[0.9, 0.2, 0.5, 0.6], [0.7, 0.1, 0.8, 0.3], [0.1, 0.1, 0.1, 0.4]])
    bits = np.array([[1, 0, 1, 0], [1, 0, 1, 1], [0, 0, 0, 0]], bool)
    found = spectra.bit_scores(p, bits)  # predicts 1001, 1010, 0000: p = 1/2 is a 0
    assert found["accuracy"] == pytest.approx((2 + 3 + 4) / 12)
    assert found["tanimoto"] == pytest.approx((1 / 3 + 2 / 3 + 1) / 3)
    nats = [0.9 * 0.8 * 0.5 * 0.4, 0.7 * 0.9 * 0.8 * 0.3, 0.9 * 0.9 * 0.9 * 0.6]
    assert found["cross_entropy"] == pytest.approx(-np.log(nats).mean())


def test_equal_scores_have_their_mean_rank():
    scores = np.array([3.0, 1.0, 3.0, 2.0, 3.0])
    assert [spectra.rank_of(scores, k) for k in range(5)] == [4, 1, 4, 2, 4]
    assert spectra.rank_of(np.zeros(10), 7) == 5.5
    near = np.array([0, 1.5e-9, 0.7e-9])  # up to 1e-9 apart they are equal
    assert [spectra.rank_of(near, k) for k in range(3)] == [1.5, 2.5, 2]


def test_a_challenge_is_ranked_among_its_own_candidates():
    bits = np.random.default_rng(0).random((9, 16)) < 0.5
    offsets, truth, p = np.array([0, 2, 6, 9]), np.array([1, 0, 2]), np.full((3, 16), 0.5)
    packed = np.packbits(bits, axis=1)
    challenges = files.Challenges(["a", "b", "c"], None, truth, offsets, packed)
    p[1] = bits[2]  # the true one of the second challenge
    p[2] = 1 - bits[8]  # all but the true one of the third
    assert spectra.challenge_ranks(p, challenges).tolist() == [1.5, 1, 3]


def test_random_top_k_is_the_mean_over_random_orders():
    sizes, ks = np.array([3, 10, 200]), [1, 5, 20]
    expected = [np.mean([min(k / n, 1) for n in sizes]) for k in ks]
    assert spectra.random_top_k(sizes, ks) == pytest.approx(expected)
    assert spectra.top_k([1, 5, 5.5, 21], [1, 5, 20]) == pytest.approx([1 / 4, 1 / 2, 3 / 4])
    tops = {"top1": 1, "top5": 5, "top10": 10, "top20": 20}
    found = spectra.tops(spectra.random_top_k, np.array([1, 2, 7, 14]), 3)
    assert list(found) == [*tops, "median"] and found["median"] == 3
    for key, k in tops.items():
        assert found[key] == pytest.approx(np.mean([min(k / n, 1) for n in (1, 2, 7, 14)]))


# ------------------------------------------------------------------------------ scores of a model


class Lookup(nn.Module):
    """A model with Bernoulli bits: z is the first bin of the spectrum, plus noise, and decodes to
    the logits of row z of `answers` (n, 2149), probabilities."""

    def __init__(self, answers, noise=0.0):
        super().__init__()
        self.answers = nn.Parameter(answers)
        self.modalities = [types.SimpleNamespace(name=m, likelihood="bernoulli") for m in "ab"]
        self.decoders = [None, lambda z: torch.logit(self.answers[z[..., 0].round().long()])]
        self.noise = noise

    def posterior(self, x, missing):
        assert missing is None and not self.training
        return Normal(x.argmax(1, keepdim=True).float(), self.noise + 1e-6)


@pytest.fixture
def known():
    """Spectrum i has its one peak in bin i; fingerprints are random. Training shows the first
    compound three times and the last never; it is tested. -> Dataset, Challenges, bits (4, 2149)"""
    generator, n, candidates = np.random.default_rng(0), 4, 30
    x = sparse_of(np.eye(n, files.BINS, dtype=np.float32))
    bits = torch.from_numpy(generator.random((n, files.BITS)) < 0.1)
    train = data.Split([x, bits], [torch.tensor([0, 0, 0, 1, 2])] * 2)
    tested = torch.tensor([2, 1, 3])
    test = data.Split([x, bits[tested]], [tested, torch.arange(3)])
    names, spec = ("spectrum", "fingerprint"), {"name": "spectra"}
    dataset = data.Dataset("spectra", train, test, spec, names)
    lists = generator.random((n, candidates, files.BITS)) < 0.1
    lists[:, 3] = bits
    packed = np.packbits(lists.reshape(-1, files.BITS), axis=1)
    ids, offsets = [f"c{i}" for i in range(n)], np.arange(n + 1) * candidates
    return dataset, files.Challenges(ids, x, np.full(n, 3), offsets, packed), bits.float()


def test_scores_compare_predicted_bits_with_their_training_frequencies(known):
    dataset, challenges, bits = known
    challenges = challenges._replace(truth=np.array([3, 3, 3, 7]))
    p = 0.2 + 0.6 * torch.rand(4, 2149)
    model = Lookup(p).eval()
    found = spectra.scores(model, dataset, challenges, samples=2, batch_size=2)
    p, bits = p.numpy(), bits.numpy() > 0.5
    often = np.tile(bits[[0, 0, 0, 1, 2]].mean(0), (4, 1))
    assert found["bits"] == pytest.approx(spectra.bit_scores(p[[2, 1, 3]], bits[[2, 1, 3]]))
    expected = spectra.bit_scores(often[:3], bits[[2, 1, 3]])
    assert found["frequency"]["bits"] == pytest.approx(expected)
    for part, predicted in (found, p), (found["frequency"], often):
        ranks = spectra.challenge_ranks(predicted, challenges)
        assert list(part["ranks"].items()) == list(zip(challenges.ids, ranks))
        assert part["rank"]["median"] == np.median(ranks)
        assert part["rank"]["top1"] == (ranks <= 1).mean()
        assert part["rank"]["top5"] == (ranks <= 5).mean()
    assert len({*found["ranks"].values()}) > 1
    assert found == spectra.scores(model, dataset, challenges, samples=2)  # for any batch
    noisy = Lookup(torch.rand(9, 2149), noise=0.3).eval()
    found = spectra.scores(noisy, dataset)
    assert "rank" not in found  # without challenges
    assert found == spectra.scores(noisy, dataset, seed=0) != spectra.scores(noisy, dataset, seed=1)


@pytest.mark.parametrize(
    "sizes, median",  # the k at which this reaches .5: Σ_i min(k / n_i, 1) / 4
    [((10, 10, 40, 60), 9), ((2, 30, 30, 58), 12), ((1, 1, 1, 1), 1), ((2, 2, 2, 2), 1)],
)
def test_random_ranks_follow_from_the_numbers_of_candidates(sizes, median, known):
    dataset, challenges, bits = known
    offsets = np.cumsum([0, *sizes])
    challenges = challenges._replace(offsets=offsets, truth=np.array([0] * 4))
    found = spectra.scores(Lookup(bits).eval(), dataset, challenges, samples=1)
    assert found["sizes"] == dict(zip(challenges.ids, sizes))
    assert found["random"]["rank"]["median"] == median
    top_5 = np.mean([min(5 / n, 1) for n in sizes])
    assert found["random"]["rank"]["top5"] == pytest.approx(top_5)


def test_evaluation_takes_twenty_samples_and_the_challenges_in_root(known, monkeypatch):
    dataset, challenges, _ = known
    model, sizes, roots = Lookup(torch.rand(9, 2149), noise=0.3), [], []
    decode = model.decoders[1]
    model.decoders[1] = lambda z: sizes.append(z.shape[:2]) or decode(z)
    monkeypatch.setattr(spectra, "load_challenges", lambda root: roots.append(root) or challenges)
    found = spectra.evaluate(model.train(), dataset, "there", seed=7)
    assert roots == ["there"] and sizes == [(20, 3), (20, 4)]  # test spectra, challenges
    assert found == spectra.scores(model, dataset, challenges, seed=7)
    assert found != spectra.scores(model, dataset, challenges, seed=0)


def test_a_model_that_knows_the_fingerprints_ranks_first(known):
    dataset, challenges, bits = known
    found = spectra.scores(Lookup(bits).eval(), dataset, challenges, batch_size=3)
    assert found["rank"] == {"top1": 1, "top5": 1, "top10": 1, "top20": 1, "median": 1}
    assert found["bits"]["accuracy"] == 1 and found["bits"]["tanimoto"] == 1
    assert found["bits"]["cross_entropy"] == pytest.approx(2149e-4, rel=1e-2)
    random = {"top1": 1 / 30, "top5": 5 / 30, "top10": 1 / 3, "top20": 2 / 3, "median": 15}
    assert found["random"]["rank"] == pytest.approx(random)
    half = spectra.scores(Lookup(torch.full_like(bits, 0.5)).eval(), dataset, challenges)
    assert half["rank"]["median"] == 15.5  # all equal: everyone has the mean rank
    assert half["bits"]["cross_entropy"] == pytest.approx(2149 * np.log(2))


def test_probabilities_are_averaged_over_samples_not_logits(known):
    dataset, _, bits = known
    p = 0.01 + 0.98 * torch.cat([bits, bits.flip(0)])[:, :8]
    noisy, z = Lookup(p, noise=0.7).eval(), Normal(1.0, 0.7)
    found = spectra.predict_bits(noisy, lambda i: dataset.train.bases[0][[1]], 1, samples=999)
    edges = z.cdf(torch.arange(9) - 0.5)
    weights = edges.diff()[:4]  # P(z is rounded to k); -1 is the last row, as Python has it
    below = z.cdf(torch.tensor(-0.5)) * p[-1]
    expected, logits = weights @ p[:4] + below, weights @ torch.logit(p[:4])
    assert found[0] == pytest.approx(expected.numpy(), abs=0.04)
    assert (expected - torch.sigmoid(logits)).abs().max() > 0.15  # what the other mean would give


# ---------------------------------------------------------------------------------- notes, figures


def result(model, seed, ranks, paired=1):
    run = dict(model=model, dataset="spectra", paired=paired, unpaired="all", seed=seed)
    run |= {"options": {}, "digest": "", "masked": False}
    ranks, sizes = dict(zip("abcde", ranks)), dict.fromkeys("abcde"[: len(ranks)], 9)
    frequency = {"ranks": dict.fromkeys(ranks, 9)}
    return dict(
        run=run, epoch=1, ranks=ranks, frequency=frequency, sizes=sizes, folder=f"runs/{model}"
    )


def test_notes_have_baselines_and_the_spread_of_the_ranks(known):
    dataset, challenges, bits = known
    found = spectra.scores(Lookup(bits).eval(), dataset, challenges, samples=1)
    shown = found | {"folder": "runs/one", "ranks": dict(zip("abcde", (4, 1, 1000, 20, 2)))}
    lines = spectra.notes([shown, {"folder": "runs/two"}])
    bit = found["frequency"]["bits"]
    assert f"bit accuracy {bit['accuracy']:.3f}, Tanimoto {bit['tanimoto']:.3f}" in lines[0]
    assert lines[2] == (
        "Random order: top 1 0.033, top 5 0.167, top 10 0.333, top 20 0.667, median rank 15.0."
    )
    assert lines[3:] == [
        "Ranks of the 5 true molecules, one: half of them from 2 to 20, all from 1 to 1,000."
    ]


@pytest.fixture
def shown(monkeypatch):
    """The axes and headings of figures, instead of their files."""
    kept = []
    monkeypatch.setattr(
        figures, "finish", lambda figure, path, heading, **_: kept.append((figure.axes, heading))
    )
    yield kept
    figures.pyplot().close("all")


def test_the_figure_has_spectra_bits_and_predictions(known, shown):
    dataset, _, bits = known
    args = dict(model="SVAE", dataset="spectra", paired=1, unpaired="none", masked=False)
    run = types.SimpleNamespace(args=args, model=Lookup(0.1 + 0.8 * bits).eval())
    spectra.draw(run, dataset, None, None, n=2)
    ((axes, heading),) = shown
    left, right = axes[:2]
    assert heading == "SVAE · spectra · f = 1 · test spectra and fingerprints"
    # spectra 2 and 3, with peaks in the middle of bins of a tenth
    assert left.collections[0].get_segments()[0] == pytest.approx(np.array([[0.25, 0], [0.25, 1]]))
    assert 0.4 <= left.get_xlim()[1] < 0.5  # up to the last peak of both
    assert right.get_title(loc="right") == "Tanimoto similarity 1.00"
    molecule, predicted = right.collections
    assert len(molecule.get_segments()) == bits[2].sum()
    depths = np.array([segment[1, 1] for segment in predicted.get_segments()])
    assert depths == pytest.approx(-(0.1 + 0.8 * bits[2]).numpy(), abs=1e-3)
    assert left.get_ylabel() and right.get_ylabel() and axes[3].get_xlabel()
    (legend,) = right.figure.legends
    names = [text.get_text() for text in legend.get_texts()]
    assert names == ["bits of the molecule", "predicted p(bit)"]


def test_top_k_curves_are_means_over_seeds(shown):
    results = [result("SVAE", 0, (1, 1)), result("SVAE", 1, (1, 3)), result("MVAE", 0, (2, 4))]
    spectra.compare(results, None)
    (((ax,), heading),) = shown
    assert ax.get_xlabel() == "k" and ax.get_xscale() == "log"
    lines = {line.get_label(): line for line in ax.lines}
    assert list(lines) == ["SVAE", "MVAE", "bit frequencies in training", "random order"]
    assert lines["SVAE"].get_ydata().tolist() == [0.75, 0.75, *[1] * 7]
    assert lines["MVAE"].get_ydata().tolist() == [0, 0.5, 0.5, *[1] * 6]
    assert [lines[m].get_color() for m in ("SVAE", "MVAE")] == [
        figures.COLOURS[m] for m in ("SVAE", "MVAE")
    ]
    assert lines["bit frequencies in training"].get_ydata().tolist() == [*[0] * 8, 1]
    assert lines["random order"].get_ydata().tolist() == [k / 9 for k in range(1, 10)]
    assert "2 challenges of 9 to 9 candidates · f = 1" in heading and "share" in ax.get_ylabel()
    spectra.compare([results[0], result("SVAE", 0, (2, 2), paired=0.5)], None)
    labels = [line.get_label() for line in shown[1][0][0].lines]
    assert labels[:2] == ["SVAE, f = 1", "SVAE, f = 0.5, all"]
    spectra.compare([{"folder": "runs/without"}], None)
    assert len(shown) == 2
