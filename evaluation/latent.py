"""Distances between posteriors, points of z and ratios of the gradient, for which no oracle is needed
([meme] Figs. 8 to 10, 19 and 20).

Shapes: N examples, L latent dimensions, M modalities.
"""

import copy
import itertools

import numpy as np
import torch

import data
from eval import latent_samples, rows_with, singles, w2

MOST_PAIRS = 6  # of modalities whose posteriors are compared
BINS = 50  # of a histogram of distances
MOST_WEIGHTS = 20_000_000  # of a model whose gradients are compared: 1 GB


def distances(model, split, a, b, rows=None, n=500):
    """W2 between q(z|x_a) and q(z|x_b) of n random examples that differ in x_a, out of `rows`.
    -> (n, n), index"""
    rows = torch.arange(len(split)) if rows is None else rows
    index = rows[np.unique(split.rows[a].cpu()[rows], return_index=True)[1]]
    index, moments = index[torch.randperm(len(index))[:n]], []
    for m in (a, b):
        mask = [k == m for k in range(len(split.bases))]
        with torch.no_grad():
            q = model.posterior(*data.select(split, mask, index))
        moments += [q.mean.cpu().double().numpy(), q.stddev.cpu().double().numpy()]
    mean_a, std_a, mean_b, std_b = moments  # (n, L)
    d = [w2(mu, std, mean_b, std_b, covariance=False) for mu, std in zip(mean_a, std_a)]
    return np.stack(d), index


def posterior_distances(model, dataset):
    """W2 between the posteriors of two modalities, of the first MOST_PAIRS pairs of modalities that
    test examples show together. -> list of (names, d (n, n), labels (n,)); without labels every
    example has its own"""
    test, names, pairs = dataset.test, dataset.names, []
    for a, b in itertools.combinations(range(len(names)), 2):
        rows = rows_with(dataset.test_mask, (a, b), len(test))
        if len(rows) and len(pairs) < MOST_PAIRS:
            d, index = distances(model, test, a, b, rows=rows)
            labels = index if test.labels is None else test.labels.cpu()[index]
            pairs.append(((names[a], names[b]), d, labels.numpy()))
    return pairs


def w2_overlap(pairs):
    """[meme] Fig. 8: the overlap Σ_bins min(p, q) of the histograms of the distances between related
    examples, which have the same label, and between unrelated ones: 0 if disjoint, 1 if equal. The
    bins divide the range of all distances. pairs: see posterior_distances. -> {"a,b": share}"""
    shares = {}
    for names, d, labels in pairs:
        same, limits = labels[:, None] == labels, (d.min(), d.max())
        p, q = (np.histogram(x, BINS, limits)[0] / x.size for x in (d[same], d[~same]))
        shares[",".join(names)] = float(np.minimum(p, q).sum())
    return shares


def latent_points(model, dataset, n=1000):
    """z ~ q(z|x_m) of n test examples, for one modality m after the other.
    -> (M n, L), their labels (M n,)"""
    test = dataset.test
    rows = [rows_with(dataset.test_mask, [m], len(test)) for m in range(len(dataset.names))]
    n = min(n, *map(len, rows))
    rows, masks = [index[:n] for index in rows], singles(dataset.names).values()
    z = [latent_samples(model, test, mask, index) for mask, index in zip(masks, rows)]
    return np.concatenate(z), np.concatenate([test.labels.cpu()[index] for index in rows])


def gradient_ratios(model, dataset, examples=64, draws=30):
    """[meme] Fig. 10: log10 |mean| / std of every entry of MEME's gradient, with and without that
    of w, clamped to [-4, 2]; mean and std are over draws of z, on the first test examples that show
    every modality. -> {"w detached": {"encoders": (n,), "decoders": (n,)}, "eq. (7)": ...}; {}
    without such examples, or of a model with more than MOST_WEIGHTS weights"""
    rows = rows_with(dataset.test_mask, range(len(dataset.names)), len(dataset.test))
    if not len(rows) or sum(weight.numel() for weight in model.parameters()) > MOST_WEIGHTS:
        return {}
    xs, model = dataset.test[rows[:examples]], copy.deepcopy(model)
    model.kl = "sample"  # eq. (6), whose gradient is eq. (7)
    parts = {"encoders": model.encoders, "decoders": model.decoders}
    sizes = [sum(weight.numel() for weight in part.parameters()) for part in parts.values()]
    weights, ratios = [w for part in parts.values() for w in part.parameters()], {}
    for name, full in (("w detached", False), ("eq. (7)", True)):
        model.full_gradient, total, squares = full, 0, 0
        for _ in range(draws):
            gradient = torch.autograd.grad(model.objective(*xs), weights)
            gradient = torch.cat([g.flatten() for g in gradient]).cpu().double()
            total, squares = total + gradient, squares + gradient**2
        mean = total / draws
        std = (squares / draws - mean**2).clamp_min(0).sqrt()
        ratio = (mean.abs() / std).log10().clamp(-4, 2).split(sizes)
        varies = (std > 0).split(sizes)
        ratios[name] = {part: r[v] for part, r, v in zip(parts, ratio, varies)}
    return ratios


def signal_to_noise(ratios):
    """[meme] Fig. 10: the median of |mean| / std over the entries. ratios: see gradient_ratios.
    -> {"encoders, w detached": number, "encoders, eq. (7)": ..., "decoders, w detached": ...}"""
    parts = itertools.product(("encoders", "decoders"), ratios)
    return {f"{part}, {name}": 10 ** ratios[name][part].median().item() for part, name in parts}
