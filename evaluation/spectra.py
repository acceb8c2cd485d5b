"""spectra: fingerprints predicted from spectra, and the ranks of true molecules, [poe] 4.4.

Shapes: N spectra, D = 2,149 bits of a fingerprint, n challenges, each with a list of candidates.
"""

from pathlib import Path

import numpy as np
import torch

import nets
from evaluation import figures, tables
from loaders.spectra import MAX_MZ, bit_frequencies, load_challenges

CERTAIN = 1e-4  # probabilities are clipped to [1e-4, 1 - 1e-4]: a wrong bit costs at most 9.2 nats
TOPS = 1, 5, 10, 20


# ----------------------------------------------------------------------------------------- metrics


def bit_cross_entropy(probabilities, packed, block=2048):
    """-Σ_d [c_d log p_d + (1 - c_d) log(1 - p_d)] of each candidate's bits c, in nats.

    probabilities (D,); packed (n, ceil(D / 8)) uint8, by np.packbits -> (n,)
    """
    p = np.clip(np.asarray(probabilities, np.float64), CERTAIN, 1 - CERTAIN)
    log_odds = np.log(p) - np.log1p(-p)
    no_bits = -np.log1p(-p).sum()  # the value where all bits are 0
    parts = []
    for i in range(0, len(packed), block):  # in blocks of 35 MB as float64
        bits = np.unpackbits(packed[i : i + block], axis=1, count=len(p)).astype(np.float64)
        parts.append(no_bits - bits @ log_odds)
    return np.concatenate(parts)


def rank_of(scores, true):
    """The rank of scores[true] among scores (n,), 1 for the lowest; equal scores have their mean
    rank."""
    gap = scores - scores[true]
    return 1 + (gap < -1e-9).sum() + ((abs(gap) <= 1e-9).sum() - 1) / 2


def challenge_ranks(probabilities, challenges):
    """The rank of each true molecule by cross entropy. probabilities (n, D) -> (n,)"""
    lists = np.split(challenges.bits, challenges.offsets[1:-1])
    ranks = []
    for p, packed, true in zip(probabilities, lists, challenges.truth):
        ranks.append(rank_of(bit_cross_entropy(p, packed), true))
    return np.array(ranks)


def top_k(ranks, ks):
    """The share of challenges with the true molecule among the first k. ranks (n,), ks (K,)
    -> (K,)"""
    return (np.asarray(ranks)[:, None] <= np.asarray(ks)).mean(0)


def random_top_k(sizes, ks):
    """The expectation of top_k if the candidates, `sizes` (n,) of them, are in random order.
    -> (K,)"""
    return np.minimum(np.asarray(ks) / np.asarray(sizes)[:, None], 1).mean(0)


def tanimoto(a, b):
    """|a and b| / |a or b| of bits (N, D), 1 where both are empty. -> (N,)"""
    union = (a | b).sum(1)
    return np.where(union, (a & b).sum(1) / np.maximum(union, 1), 1.0)


def bit_scores(probabilities, bits):
    """Accuracy and Tanimoto similarity of the bits p > 1/2 with bits (N, D), and the cross entropy
    in nats per example."""
    predicted = probabilities > 0.5
    p = np.clip(probabilities, CERTAIN, 1 - CERTAIN)
    return {
        "accuracy": float((predicted == bits).mean()),
        "tanimoto": float(tanimoto(predicted, bits).mean()),
        "cross_entropy": float(-np.log(np.where(bits, p, 1 - p)).sum(1).mean()),
    }


@torch.no_grad()
def predict_bits(model, take, n, samples, batch_size=128):
    """p(bit = 1) given the spectrum: the mean probability over samples of q(z|spectrum).

    take(index): the spectra (B, 11000) of some of the n examples. -> float32 (n, 2149)
    """
    device, parts = next(model.parameters()).device, []
    for index in torch.arange(n).split(batch_size):
        z = model.posterior(take(index).to(device), None).sample((samples,))  # (samples, B, L)
        p = nets.mean(model.modalities[1], model.decoders[1](z))
        parts.append(p.mean(0).float().cpu())
    return torch.cat(parts).numpy()


def evaluate(model, dataset, root="./data", seed=0):
    """`scores` of a model, in eval mode, with the challenges in root/spectra."""
    model.eval()
    return scores(model, dataset, load_challenges(root), seed=seed)


def scores(model, dataset, challenges=None, samples=20, seed=0, batch_size=128):
    """Scores of the predicted bits of the test split; ranks of the true molecules of challenges.

    challenges: load_challenges(root), or None; samples: of z, whose predictions are averaged.
    "frequency" is the baseline that predicts, for every spectrum, the frequency of each bit in the
    training examples; "random" the expectation over random orders of the candidates, its median the
    k at which top_k reaches one half. rank's top1, ...: shares of the challenges.
    -> {"bits": {"accuracy", "tanimoto", "cross_entropy"}, "frequency": {"bits": {...}}} and, with
    challenges, "rank": {"top1", "top5", "top10", "top20", "median"}, "ranks": {id: rank} (both in
    "frequency" too), "random": {"rank"}, "sizes": {id: number of candidates}
    """
    torch.manual_seed(seed)
    test, train = dataset.test, dataset.train
    bits = torch.cat([test.take(1, i).cpu() for i in torch.arange(len(test)).split(4096)]) > 0.5
    bits = bits.numpy()  # (N, 2149)
    frequency = bit_frequencies(train).numpy()

    def predict(take, n):
        return predict_bits(model, take, n, samples, batch_size)

    result = {
        "bits": bit_scores(predict(lambda index: test.take(0, index), len(test)), bits),
        "frequency": {"bits": bit_scores(np.broadcast_to(frequency, bits.shape), bits)},
    }
    if challenges is None:
        return result

    def by_id(values):
        return dict(zip(challenges.ids, values.tolist()))

    def ranking(probabilities):
        ranks = challenge_ranks(probabilities, challenges)
        return {"rank": tops(top_k, ranks, np.median(ranks)), "ranks": by_id(ranks)}

    sizes = np.diff(challenges.offsets)
    ks = np.arange(1, sizes.max() + 1)
    half = ks[np.argmax(random_top_k(sizes, ks) >= 0.5)]
    predicted = predict(lambda index: challenges.spectra[index], len(sizes))
    result["frequency"] |= ranking(np.broadcast_to(frequency, predicted.shape))
    result["random"] = {"rank": tops(random_top_k, sizes, half)}
    return result | ranking(predicted) | {"sizes": by_id(sizes)}


def tops(share, values, median):
    """share: top_k of ranks, or random_top_k of numbers of candidates. -> metrics["rank"]"""
    rank = {f"top{k}": float(share(values, [k])[0]) for k in TOPS}
    return rank | {"median": float(median)}


def notes(results):
    """Lines below the table of these results: the baselines, and how the ranks of each run
    spread."""
    lines, ranked = [], [r for r in results if "ranks" in r]
    for r in results[:1]:
        bits = r["frequency"]["bits"]
        lines.append(
            f"Bit frequencies in training as the prediction: bit accuracy {bits['accuracy']:.3f}, "
            f"Tanimoto {bits['tanimoto']:.3f}, cross entropy {bits['cross_entropy']:.1f}."
        )
    if not ranked:
        return lines
    baselines = {"frequency": "Bit frequencies in training", "random": "Random order"}
    for key, name in baselines.items():
        rank = ranked[0][key]["rank"]
        shares = ", ".join(f"top {k} {rank[f'top{k}']:.3f}" for k in TOPS)
        lines.append(f"{name}: {shares}, median rank {rank['median']:.1f}.")
    for r in ranked:
        best, low, high, worst = np.quantile(list(r["ranks"].values()), (0, 0.25, 0.75, 1))
        lines.append(
            f"Ranks of the {len(r['ranks'])} true molecules, {Path(r['folder']).name}: half of them"
            f" from {low:.0f} to {high:.0f}, all from {best:.0f} to {worst:,.0f}."
        )
    return lines


# ----------------------------------------------------------------------------------------- figures


@torch.no_grad()
def draw(run, dataset, root, path, n=4):
    """[poe] Fig. 11 A-C: test spectra, the bits of their molecules and the predicted ones."""
    index = torch.linspace(0, len(dataset.test) - 1, n).long()
    spectra, bits = (dataset.test.take(m, index).cpu().numpy() for m in (0, 1))
    p = predict_bits(run.model, lambda k: dataset.test.take(0, index[k]), n, samples=20)
    heading = f"{figures.title(run)} · test spectra and fingerprints"
    fingerprints(spectra, bits > 0.5, p, heading, path)


def fingerprints(spectra, bits, p, heading, path):
    """Left: spectra (n, bins) from m/z 0 to MAX_MZ; right: their molecules' bits (n, D), boolean,
    upwards, predicted probabilities p (n, D) downwards."""
    figure, axes = figures.panels(len(spectra), 2, width=5.5, height=1.9, extra=0.5)
    width = MAX_MZ / spectra.shape[1]  # of a bin
    last = width * (1 + spectra.any(0).nonzero()[0].max())
    similarity = tanimoto(p > 0.5, bits)
    for (left, right), spectrum, bit, guess, score in zip(axes, spectra, bits, p, similarity):
        peaks = spectrum.nonzero()[0]
        left.vlines((peaks + 0.5) * width, 0, spectrum[peaks], color="k", lw=0.8)
        left.set(xlim=(0, 1.03 * last), ylim=(0, 1.05), ylabel="√ intensity")
        one, other = figures.ORANGE, figures.BLUE
        right.vlines(bit.nonzero()[0], 0, 1, color=one, lw=0.7, label="bits of the molecule")
        right.vlines(range(len(guess)), 0, -guess, color=other, lw=0.7, label="predicted p(bit)")
        right.axhline(0, color="k", lw=0.5)
        right.set(ylim=(-1.05, 1.05), yticks=[-1, 0, 1], yticklabels=[1, 0, 1])
        right.set_ylabel("p(bit) · bit")
        right.set_title(f"Tanimoto similarity {score:.2f}", loc="right", size=9)
    axes[-1, 0].set_xlabel("m/z")
    axes[-1, 1].set_xlabel("bit of the fingerprint")
    figure.legend(*axes[0, 1].get_legend_handles_labels(), loc="outside lower right", ncols=2)
    figures.finish(figure, path, heading)


def compare(results, path):
    """[poe] Fig. 11 D: the share of challenges with the true molecule among the first k, a line per
    setting, the mean over its seeds; bit frequencies; random order. Nothing without challenges."""
    ranked = [r for r in results if "ranks" in r]
    if not ranked:
        return
    sizes = np.array(list(ranked[0]["sizes"].values()))
    ks = np.unique(np.geomspace(1, sizes.max(), 400).round().astype(int))
    groups = tables.grouped(ranked)
    pairs = [tables.pairs(group[0]["run"]) for group in groups]
    figure, ((ax,),) = figures.panels(1, 1, width=7, height=4.5)
    count = {}  # lines of each model: they share its colour
    for name, text, group in zip(tables.row_names(groups), pairs, groups):
        model = group[0]["run"]["model"]
        k = count[model] = count.get(model, -1) + 1
        style = {"color": figures.COLOURS[model], "ls": figures.DASHES[k % len(figures.DASHES)]}
        shares = np.mean([top_k(list(r["ranks"].values()), ks) for r in group], axis=0)
        label = name if len(set(pairs)) == 1 else f"{name}, {text}"
        ax.step(ks, shares, where="post", label=label, **style)
    frequency = top_k(list(ranked[0]["frequency"]["ranks"].values()), ks)
    ax.step(ks, frequency, "--", where="post", color="0.45", label="bit frequencies in training")
    ax.plot(ks, random_top_k(sizes, ks), ":", color="black", label="random order")
    ax.set(xscale="log", xlabel="k", ylim=(0, 1.02))
    ax.set_ylabel("share with the true molecule among the first k")
    ax.legend(frameon=False, loc="upper left", fontsize=8)
    heading = f"spectra · {len(sizes)} challenges of {sizes.min():,} to {sizes.max():,} candidates"
    if len(set(pairs)) == 1:
        heading += f" · {pairs[0]}"
    figures.finish(figure, path, f"{heading} · mean over seeds")
