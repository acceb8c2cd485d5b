"""Metrics, tables and figures of trained models. `python eval.py runs/a runs/b --figures figures`

    fit = cca(x, y); correlation(fit, x, y)           canonical correlation, [meme] App. G
    linear_probe(train_z, train_y, test_z, test_y)    accuracy of a linear classifier of samples
    w2(mean1, std1, mean2, std2)                      2-Wasserstein distance, [meme] App. F

These are numpy on arrays and know nothing of what follows them: the evaluation of run folders on
their test split. There z is one sample of the posterior per example (--seed fixes it) and the
decoded mean is judged by an oracle, a classifier of the real images, whose own test accuracy stands
under every table.

Shapes: N examples, B of a batch, K samples, L latent dimensions, M modalities, C classes.
[meme] is Joy et al., ICLR 2022; [poe] is "In Defense of Product-of-Experts".
"""

import argparse
import hashlib
import importlib
import itertools
import json
import math
import sys
import textwrap
import time
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import data
import nets

# -------------------------------------------------------------------- numpy: arrays in, numbers out


class CCA(NamedTuple):
    mean_x: np.ndarray  # (Dx,)
    mean_y: np.ndarray  # (Dy,)
    wx: np.ndarray  # (Dx, k)
    wy: np.ndarray  # (Dy, k)
    correlations: np.ndarray  # (k,) S below: of the fit's projections if there is no ridge, falling


def cca(x, y, k=40, ridge=1e-3, whiten=True):
    """The k pairs of directions along which x (n, Dx), y (n, Dy) correlate most, [meme] App. G.
    -> CCA

        Cxx^-½ Cxy Cyy^-½ = U S V',   wx = Cxx^-½ U,   wy = Cyy^-½ V,   correlations S

    ridge, times the mean variance, is added to the diagonals of Cxx and Cyy. whiten=True: every
    projection has variance 1, up to the ridge. False: every joint vector [wx; wy] has length 1, as
    numerical solvers of the equivalent eigenproblem return it and the published code takes it; its
    k components then do not count alike in eq. (12).
    """
    x, y = np.asarray(x, float), np.asarray(y, float)
    mean_x, mean_y = x.mean(0), y.mean(0)
    x, y = x - mean_x, y - mean_y
    root_x, root_y = inverse_root(x, ridge), inverse_root(y, ridge)
    u, s, vt = np.linalg.svd(root_x @ (x.T @ y / (len(x) - 1)) @ root_y, full_matrices=False)
    wx, wy = root_x @ u[:, :k], root_y @ vt[:k].T
    if not whiten:
        length = np.sqrt((wx**2).sum(0) + (wy**2).sum(0))
        wx, wy = wx / length, wy / length
    return CCA(mean_x, mean_y, wx, wy, s[:k])


def inverse_root(x, ridge):
    """(cov + ridge · mean variance · I)^-½ of centred x (n, D); what has no variance drops out."""
    cov = x.T @ x / (len(x) - 1)
    values, vectors = np.linalg.eigh(cov + ridge * np.trace(cov) / len(cov) * np.eye(len(cov)))
    kept = values > 1e-12 * values.max()
    return (vectors[:, kept] / np.sqrt(values[kept])) @ vectors[:, kept].T


def correlation(fit, x, y):
    """Cosine of each pair's projections, centred by the fit's means, [meme] eq. (12). -> (n,)"""
    x, y = (x - fit.mean_x) @ fit.wx, (y - fit.mean_y) @ fit.wy  # (n, k)
    lengths = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
    return (x * y).sum(1) / np.maximum(lengths, 1e-12)


def logistic_regression(z, y, classes, l2=1e-4, tolerance=1e-6):
    """Newton's method for

        argmin_W  mean_n -log softmax(W'[z_n; 1])_y_n + l2/2 |W|²,    biases not penalised

    z (n, L), y (n,) integers below `classes` -> W (L + 1, C), at which no entry of the gradient
    exceeds `tolerance`, or after 100 steps, or where rounding ends the descent.
    """
    z = np.hstack([z, np.ones((len(z), 1))])
    n, d = z.shape
    penalty = np.full((d, 1), l2)
    penalty[-1] = 0
    truth = np.eye(classes)[y]  # (n, C)

    def loss(w):
        logits = z @ w
        logits -= logits.max(1, keepdims=True)
        p = np.exp(logits)
        total = p.sum(1, keepdims=True)
        cross_entropy = np.log(total).mean() - (logits * truth).sum() / n
        return cross_entropy + 0.5 * (penalty * w**2).sum(), p / total

    w = np.zeros((d, classes))
    value, p = loss(w)
    for _ in range(100):
        gradient = z.T @ (p - truth) / n + penalty * w
        if np.abs(gradient).max() < tolerance:
            break
        # E[zz' ⊗ (diag(p) - pp')]. It only steers the step, the gradient decides: single precision
        # will do
        pz = (z.astype("f4")[:, :, None] * p.astype("f4")[:, None]).reshape(n, -1)  # (n, d C)
        hessian = -(pz.T @ pz) / n
        for c in range(classes):
            hessian[c::classes, c::classes] += pz[:, c::classes].T @ z.astype("f4") / n
        hessian[np.diag_indices_from(hessian)] += np.repeat(penalty, classes) + 1e-6
        step = np.linalg.solve(hessian.astype(float), gradient.ravel()).reshape(w.shape)
        size = 1.0
        while (new := loss(w - size * step))[0] > value - 1e-4 * size * (step * gradient).sum():
            size /= 2
            if size < 1e-9:  # rounding: nothing is left to gain
                return w
        w, (value, p) = w - size * step, new
    return w


def linear_probe(train_z, train_y, test_z, test_y, l2=1e-4):
    """Test accuracy of multinomial logistic regression on z, scaled to variance 1 in training.

    z (n, L), y (n,) any labels; l2 as in logistic_regression.
    """
    train_z, test_z = np.asarray(train_z, float), np.asarray(test_z, float)
    mean, std = train_z.mean(0), train_z.std(0)
    std[std == 0] = 1
    classes, y = np.unique(train_y, return_inverse=True)
    w = logistic_regression((train_z - mean) / std, y, len(classes), l2)
    guess = ((test_z - mean) / std) @ w[:-1] + w[-1]
    return float((classes[guess.argmax(1)] == np.asarray(test_y)).mean())


def w2(mean1, scale1, mean2, scale2):
    """2-Wasserstein distance of two Gaussians ([meme] App. F, whose ||m1 + m2|| is a misprint).

        d² = ||m1 - m2||² + Tr(Σ1 + Σ2 - 2 (Σ1^½ Σ2 Σ1^½)^½)
        d² = ||m1 - m2||² + ||std1 - std2||²                          where both are diagonal

    means (..., d); scales: standard deviations (..., d) or covariances (..., d, d); leading axes
    broadcast. -> (...)
    """
    squared = ((mean1 - mean2) ** 2).sum(-1)
    if scale1.ndim == mean1.ndim:
        return np.sqrt(squared + ((scale1 - scale2) ** 2).sum(-1))
    values, vectors = np.linalg.eigh(scale1)
    root = (vectors * np.sqrt(np.maximum(values, 0))[..., None, :]) @ np.swapaxes(vectors, -1, -2)
    cross = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ scale2 @ root), 0)).sum(-1)
    traces = np.trace(scale1, axis1=-2, axis2=-1) + np.trace(scale2, axis1=-2, axis2=-1)
    return np.sqrt(np.maximum(squared + traces - 2 * cross, 0))


# ------------------------------------------------------------------------------------------ oracles


RECIPE = 1  # to be raised when what follows changes: oracles kept from before are trained anew


class Oracle(nn.Module):
    """A digit classifier: images (B, channels, H, W) in [0, 1] -> logits (B, 10). H, W >= 24.

    Every image is scaled to one contrast first. `information` replaces the last layer by a Gaussian
    process, which knows what it has not seen.
    """

    def __init__(self, channels):
        super().__init__()
        layers, a, width = [], channels, 16 if channels == 1 else 32
        for b in (width, 2 * width, 4 * width):
            layers += [nn.Conv2d(a, b, 3, padding=1, bias=False), nn.MaxPool2d(2)]
            layers += [nn.BatchNorm2d(b), nn.ReLU()]
            a = b
        self.trunk = nn.Sequential(*layers, nn.AdaptiveMaxPool2d(3), nn.Flatten())
        self.head = nn.Sequential(nn.Dropout(0.3), nn.Linear(9 * a, 10))
        self.process = GaussianProcess(9 * a)

    def features(self, x):
        x = x - x.mean((1, 2, 3), keepdim=True)
        return self.trunk(x / (x.std((1, 2, 3), keepdim=True) + 0.1))  # (B, D)

    def forward(self, x):
        return self.head(self.features(x))

    def information(self, x):
        return self.process.information(self.features(x))


class GaussianProcess(nn.Module):
    """A sparse variational Gaussian process as the last layer of a classifier ([meme] App. H.2).

        f_c ~ GP(0, k),  k(h, h') = s² exp(-|h - h'|² / 2l²),  p(y|f) = softmax(f)_y,  c = 1..10
        q(f_c(Z)) = N(L m_c, L S_c S_c' L'),  LL' = k(Z, Z)
        ELBO = N E_q(f)[ log p(y|f) ] - Σ_c KL( N(m_c, S_c S_c') || N(0, I) )

    h (B, D): features; Z: the inducing points. What the paper leaves open: 100 inducing points,
    started at training features and learned; one s and one l, started at 3 and the median distance;
    5 samples of f in training; the features stay as the oracle has learned them.
    """

    def __init__(self, features, classes=10, points=100):
        super().__init__()
        self.inducing = nn.Parameter(torch.zeros(points, features))  # Z
        self.mean = nn.Parameter(torch.zeros(classes, points))  # m
        self.root = nn.Parameter(torch.eye(points).repeat(classes, 1, 1))  # S, its lower triangle
        self.log_scale = nn.Parameter(torch.tensor(math.log(3.0)))  # log s
        self.log_length = nn.Parameter(torch.tensor(0.0))  # log l

    def kernel(self, a, b):
        centre = self.inducing.mean(0)  # near zero the next line cancels less
        a, b = a - centre, b - centre
        squared = ((a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T).clamp_min(0)
        return torch.exp(2 * self.log_scale - 0.5 * squared * torch.exp(-2 * self.log_length))

    def forward(self, h):
        """Mean and standard deviation of every f_c(h), each (B, C)."""
        z, s2 = self.inducing, torch.exp(2 * self.log_scale)
        jitter = 1e-4 * s2 * torch.eye(len(z), device=h.device)
        chol = torch.linalg.cholesky(self.kernel(z, z) + jitter)  # L
        a = torch.linalg.solve_triangular(chol, self.kernel(z, h), upper=False)  # (P, B)
        variance = s2 - (a**2).sum(0) + ((self.root.tril().mT @ a) ** 2).sum(1)  # (C, B)
        return (self.mean @ a).T, variance.clamp_min(1e-6).sqrt().T

    def elbo(self, h, y, n, samples=5):
        mean, std = self(h)
        f = mean + std * torch.randn(samples, *mean.shape, device=h.device)  # (K, B, C)
        log_p = f.log_softmax(-1).mean(0)[torch.arange(len(y)), y].mean()
        root = self.root.tril()
        log_det = root.diagonal(dim1=1, dim2=2).abs().log().sum()
        kl = 0.5 * ((self.mean**2).sum() + (root**2).sum() - self.mean.numel()) - log_det
        return n * log_p - kl

    def fit(self, h, y, steps=500, batch_size=500):
        """Features h (N, D) and labels y (N,) of the training images."""
        chosen = h[torch.randperm(len(h))[: len(self.inducing)]]
        self.inducing.data[: len(chosen)] = chosen
        self.log_length.data = torch.pdist(chosen).median().clamp_min(1).log()
        optimizer = torch.optim.Adam(self.parameters(), 0.01)
        for _ in range(steps):
            index = torch.randint(len(h), (batch_size,))
            loss = -self.elbo(h[index], y[index], len(h)) / len(h)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    def information(self, h, samples=100):
        """I(y, f|h) = H[E p(y|f)] - E H[p(y|f)], nats: high where f is in doubt. -> (B,)"""
        mean, std = self(h)
        p = (mean + std * torch.randn(samples, *mean.shape, device=h.device)).softmax(-1)
        entropy = torch.special.entr(p).sum(-1).mean(0)
        return torch.special.entr(p.mean(0)).sum(-1) - entropy


def views(dataset):
    """What is judged, as functions of the M modalities: each image, or the parts put together."""
    if dataset.name in nets.BANDS:
        return {"image": lambda xs: torch.cat(xs, -2)}
    return {name: lambda xs, m=m: xs[m] for m, name in enumerate(dataset.names)}


def train_oracle(split, view, steps=1000, batch_size=128):
    """Adam with one rise and fall of the step size, on images shifted by up to 2 pixels.
    -> Oracle in eval mode"""
    torch.manual_seed(0)
    device = split.labels.device
    oracle = Oracle(view(split[torch.arange(1)]).shape[1]).to(device)
    optimizer = torch.optim.AdamW(oracle.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, steps)
    start = time.monotonic()
    for step in range(1, steps + 1):
        index = torch.randint(len(split), (batch_size,))
        x = F.pad(view(split[index]), (2, 2, 2, 2), mode="replicate")
        top, left = torch.randint(5, (2,)).tolist()
        x = x[..., top : top + x.shape[-2] - 4, left : left + x.shape[-1] - 4]
        loss = F.cross_entropy(oracle(x), split.labels[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        data.progress("oracle", step, 1, steps, start)
    oracle.eval()
    index = torch.randperm(len(split))[:10_000]
    with torch.no_grad():
        h = torch.cat([oracle.features(view(split[i])) for i in index.split(500)])
    oracle.process.fit(h, split.labels[index], min(steps, 500))
    return oracle


def load_oracle(dataset, name, root, steps=1000):
    """The oracle of a view, from root/oracles, where it is kept once trained.
    -> Oracle, its test accuracy

    The file holds a digest of all that it was made from: other images, labels or settings, and it
    is made anew.
    """
    view, path = views(dataset)[name], data.prepared(root, "oracles", f"{dataset.name}-{name}.pt")
    device = dataset.test.labels.device
    digest = hashlib.sha256(f"recipe {RECIPE}, {steps} steps".encode())
    for split in (dataset.train, dataset.test):
        for tensor in (*split.bases, *split.rows, split.labels):
            digest.update(tensor.cpu().contiguous().numpy())
    try:
        saved = data.read_checkpoint(path, device)
        if saved["digest"] == digest.hexdigest():
            oracle = Oracle(view(dataset.test[torch.arange(1)]).shape[1])
            oracle.load_state_dict(saved["oracle"])
            return oracle.to(device).eval(), float(saved["accuracy"])
    except Exception:  # there is none yet, or it is damaged
        pass
    print(f"training the oracle of {dataset.name}, {name} ...", file=sys.stderr)
    oracle = train_oracle(dataset.train, view, steps)
    accuracy = shared(digits(oracle, view, dataset.test), dataset.test.labels)
    saved = {"digest": digest.hexdigest(), "accuracy": accuracy, "oracle": oracle.state_dict()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        data.replace(path, lambda file: torch.save(saved, file))
    except OSError as error:
        print(f"{path} cannot be written ({error.strerror}): not kept", file=sys.stderr)
    return oracle, accuracy


@torch.no_grad()
def digits(oracle, view, split):
    """What the oracle reads in the real images of a split. -> (N,)"""
    parts = torch.arange(len(split)).split(500)
    return torch.cat([oracle(view(split[index])).argmax(-1) for index in parts])


def shared(a, b):
    """The share of equal entries."""
    return (a == b).double().mean().item()


# ------------------------------------------------------------------------------- metrics of a model


def subsets(names):
    """What can be shown, as M booleans by name: top, bottom, both; of three also top+middle, ...,
    all."""
    found = {}
    for size in range(1, len(names) + 1):
        for chosen in itertools.combinations(names, size):
            label = "+".join(chosen)
            if size == len(names):
                label = "both" if size == 2 else "all"
            found[label] = tuple(name in chosen for name in names)
    return found


def singles(names):
    return {name: shown for name, shown in subsets(names).items() if sum(shown) == 1}


def readings(means, dataset, oracles):
    """What the oracle of every view reads in the decoded modalities. -> (views, B)"""
    return torch.stack([oracles[n](view(means)).argmax(-1) for n, view in views(dataset).items()])


@torch.no_grad()
def generated_digits(model, dataset, oracles, shown):
    """Every test example: z ~ q(z|shown), all modalities decoded, and what the oracles read.
    -> {view: (N,)}"""
    read = []
    for index in torch.arange(len(dataset.test)).split(500):
        means = model.decode(model.posterior(*data.show(dataset.test, shown, index)).sample())
        read.append(readings(means, dataset, oracles))
    return dict(zip(views(dataset), torch.cat(read, 1)))


def split_accuracy(model, dataset, oracles):
    """[poe] Table 1: the whole image from every subset of its parts; is it still the digit?"""
    accuracy = {}
    for name, shown in subsets(dataset.names).items():
        read = generated_digits(model, dataset, oracles, shown)["image"]
        accuracy[name] = shared(read, dataset.test.labels)
    return {"accuracy": accuracy}


def coherence(model, dataset, oracles):
    """[meme] Table 3: one modality is shown, each generated from it; is it the digit shown?"""
    cross, own = {}, {}
    for source, shown in singles(dataset.names).items():
        for target, read in generated_digits(model, dataset, oracles, shown).items():
            share = shared(read, dataset.test.labels)
            if target == source:
                own[source] = share
            else:
                cross[f"{source}->{target}"] = share
    return {"cross_coherence": cross, "self_coherence": own}


@torch.no_grad()
def joint_coherence(model, dataset, oracles, samples=10_000):
    """[poe] Fig. 8: the share of z ~ p(z) in whose images all oracles read the same digit.

    joint_entropy, in nats, is that of the digits they agree on: log 10 = 2.30 if all come up alike,
    0 if it is always the same one, which would make coherence meaningless.
    """
    agreed = []
    for part in torch.arange(samples).split(500):
        means = model.decode(model.prior().sample((len(part),)))
        read = readings(means, dataset, oracles)
        agreed.append(read[0][(read == read[0]).all(0)])
    agreed = torch.cat(agreed)
    frequency = agreed.bincount().double() / max(1, len(agreed))
    entropy = torch.special.entr(frequency).sum().item()
    return {"joint_coherence": len(agreed) / samples, "joint_entropy": entropy}


@torch.no_grad()
def mutual_information(model, dataset, oracles, examples=1000):
    """[meme] Table 6: I(label, oracle's weights | generated image), nats; low where it looks real.

    The paper has a number per modality and does not say what from; here both: "svhn" from itself,
    "mnist->svhn".
    """
    found, index = {}, torch.arange(min(examples, len(dataset.test)))
    for source, shown in singles(dataset.names).items():
        means = model.decode(model.posterior(*data.show(dataset.test, shown, index)).sample())
        for target, view in views(dataset).items():
            key = target if target == source else f"{source}->{target}"
            found[key] = oracles[target].information(view(means)).double().mean().item()
    return {"mutual_information": found}


@torch.no_grad()
def latent_samples(model, split, shown, index):
    """z ~ q(z|shown), one per example of `index`. -> (n, L), numpy"""
    parts = [model.posterior(*data.show(split, shown, i)).sample() for i in index.split(500)]
    return torch.cat(parts).double().cpu().numpy()


def latent_accuracy(model, dataset):
    """[meme] Table 4: a linear classifier of z ~ q(z|x_m), fitted on every training image once."""
    accuracy = {}
    for m, (name, shown) in enumerate(singles(dataset.names).items()):
        index = np.unique(dataset.train.rows[m].cpu(), return_index=True)[1]
        index = torch.from_numpy(index)
        if dataset.mask is not None:
            index = index[dataset.mask[index, m]]
        train_z = latent_samples(model, dataset.train, shown, index)
        test_z = latent_samples(model, dataset.test, shown, torch.arange(len(dataset.test)))
        train_y, test_y = dataset.train.labels.cpu()[index], dataset.test.labels.cpu()
        accuracy[name] = linear_probe(train_z, train_y.numpy(), test_z, test_y.numpy())
    return {"latent_accuracy": accuracy}


@torch.no_grad()
def log_likelihood(model, dataset, examples=100, samples=1000):
    """[meme] Table 2: the means of log p(x_m), log p(x_1, ..., x_M) and log p(x_m|all others).

    Nats, importance-weighted, log 1/K Σ_k w_k, without the weights of the likelihoods in training.
    """
    names, everything = dataset.names, (True,) * len(dataset.names)
    cases = {name: (shown, None) for name, shown in singles(names).items()}
    cases[",".join(names)] = (everything, None)
    for name, shown in singles(names).items():
        others = tuple(not seen for seen in shown)
        cases[f"{name}|{','.join(n for n in names if n != name)}"] = (shown, others)
    z = model.prior().sample((1,))
    features = [math.prod(x.shape[1:]) for x in model.decode(z)]
    at_once = 2**20 if z.device.type == "cpu" else 2**26  # numbers: what a cache, or a GPU, holds
    found = {}
    for case, (shown, others) in cases.items():
        decoded = sum(n for n, seen in zip(features, shown) if seen)
        block = min(samples, max(1, at_once // decoded))  # of samples
        blocks = [len(part) for part in torch.arange(samples).split(block)]
        nats, size = [], max(1, at_once // (block * decoded))
        for index in torch.arange(min(examples, len(dataset.test))).split(size):
            given = None if others is None else data.show(dataset.test, others, index)
            xs = data.show(dataset.test, shown, index)
            parts = [
                model.log_likelihood(*xs, samples=k, given=given) + math.log(k) for k in blocks
            ]
            nats.append(torch.stack(parts).logsumexp(0) - math.log(samples))
        found[case] = torch.cat(nats).double().mean().item()
    return {"log_likelihood": found}


def evaluate(model, dataset, oracles, examples=100, samples=1000, seed=0, root="./data"):
    """All metrics that apply to the data set.

    oracles: {view: Oracle}; examples, samples: N and K of the likelihoods, 0 examples: none.
    """
    torch.manual_seed(seed)
    model.eval()
    if dataset.name == "cub":
        return evaluate_cub(model, dataset, root)
    if dataset.name == "spectra":
        return evaluate_spectra(model, dataset, data.load_challenges(root), seed=seed)
    metrics = {}
    if dataset.name in nets.BANDS:
        metrics |= split_accuracy(model, dataset, oracles)
    elif oracles:
        metrics |= coherence(model, dataset, oracles)
        metrics |= joint_coherence(model, dataset, oracles)
        metrics |= mutual_information(model, dataset, oracles)
    if dataset.train.labels is not None and dataset.test.labels is not None:
        metrics |= latent_accuracy(model, dataset)
    if examples:
        metrics |= log_likelihood(model, dataset, examples, samples)
    return metrics


# ---------------------------------------------------- CUB: word vectors, CCA correlations, captions


def caption_text(tokens, words):
    """Word indices (32,) -> the caption as text: words joined, cut at <eos>."""
    tokens = np.asarray(tokens).tolist()
    end = tokens.index(data.EOS) if data.EOS in tokens else len(tokens)
    return " ".join(words[t] for t in tokens[:end])


def character_ngrams(words, shortest=3, longest=6):
    """FastText's units: each word itself and the n-grams of <word>, numbered as they occur.

    -> (V, G) 0/1 sparse CSR, its transpose; the specials have none.
    """
    index, rows, columns = {}, [], []
    for row, word in enumerate(words):
        if word in data.SPECIALS:
            continue
        text = f"<{word}>"
        grams = {
            text[a : a + n]
            for n in range(shortest, longest + 1)
            for a in range(len(text) - n + 1)
            if text[a : a + n] != text
        }
        for gram in (text, *sorted(grams)):
            rows.append(row)
            columns.append(index.setdefault(gram, len(index)))
    where = torch.tensor([rows, columns])
    units = torch.sparse_coo_tensor(where, torch.ones(len(rows)), (len(words), len(index)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that CSR is in beta
        return units.coalesce().to_sparse_csr(), units.t().coalesce().to_sparse_csr()


def skipgram_counts(captions, n_words, window=3, sample=1e-3, draws=10, seed=0):
    """How often word i has word j in its window, per epoch, as word2vec draws it: frequent words
    dropped at random before the window is laid, a neighbour at distance d inside the random window
    with probability 1 - (d - 1)/window.

    captions: int64 (N, 32) -> pairs (V, V), frequencies (V,), float64. The specials never count.
    """
    generator = torch.Generator().manual_seed(seed)
    captions = torch.as_tensor(captions).cpu()
    sentence, at = (captions >= len(data.SPECIALS)).nonzero(as_tuple=True)
    word = captions[sentence, at]
    frequency = torch.bincount(word, minlength=n_words).double()
    threshold = sample * len(word) / frequency
    keep = (threshold.sqrt() + threshold).clamp(max=1)
    pairs = torch.zeros(n_words * n_words, dtype=torch.float64)
    for _ in range(draws):
        kept = torch.rand(len(word), generator=generator) < keep[word]
        w, s = word[kept], sentence[kept]
        for d in range(1, window + 1):
            same = s[d:] == s[:-d]
            pair = w[d:][same] * n_words + w[:-d][same]
            weight = 1 - (d - 1) / window
            pairs += weight * torch.bincount(pair, minlength=n_words * n_words)
    pairs = pairs.view(n_words, n_words) / draws
    return pairs + pairs.t(), frequency


def word_vectors(
    captions, words, dim=300, window=3, negative=5, epochs=10, lr=0.025, seed=0, device="cpu"
):
    """FastText [Bojanowski et al. 2017]: a word is the mean of its own vector and its n-grams'.

    Skip-gram with negative sampling. The vocabulary is small, so each step of gradient descent
    takes the expectation over words and negatives in place of a sample: it climbs

        Σ_ij n_ij log σ(h_i·o_j) + m_ij log σ(-h_i·o_j),    m_ij = negative (Σ_k n_ik) p_j

    with n_ij the pairs that a step would see, p_j ∝ frequency^.75.
    captions (N, 32) -> float32 (V, dim), zeros for specials
    """
    units, transposed = (m.to(device) for m in character_ngrams(words))
    share = 1 / units.sum(1, keepdim=True).to_dense().clamp(min=1)  # (V, 1)
    pairs, frequency = skipgram_counts(captions, len(words), window, draws=epochs, seed=seed)
    noise = frequency**0.75 / (frequency**0.75).sum()
    n = pairs.float().to(device)  # (V, V)
    m = (negative * pairs.sum(1, keepdim=True) * noise).float().to(device)
    steps = max(1, math.ceil(float(pairs.sum()) / 4000))  # per epoch: 4,000 pairs each
    # The summed gradient of a word in very many pairs of a step overshoots: it moves as by 4 / lr
    # pairs at most.
    most_h = 4 / (n + m).sum(1, keepdim=True).clamp(min=1e-9)
    most_o = 4 / (n + m).sum(0).unsqueeze(1).clamp(min=1e-9)
    generator = torch.Generator().manual_seed(seed)
    start = torch.rand(units.shape[1], dim, generator=generator)
    e = ((2 * start - 1) / dim).to(device)  # (G, D) the units' vectors
    o = torch.zeros(len(words), dim, device=device)  # (V, D) the words' as context
    for step in range(epochs * steps):
        rate = lr * (1 - step / (epochs * steps)) / steps
        h = share * (units @ e)  # (V, D)
        p = torch.sigmoid(h @ o.t())
        residual = n * (1 - p) - m * p  # (V, V)
        grad_h, grad_o = residual @ o, residual.t() @ h
        # each unit takes the whole step, as FastText does
        e += transposed @ (grad_h * most_h.clamp(max=rate))
        o += grad_o * most_o.clamp(max=rate)
    return (share * (units @ e)).cpu().numpy()


def cached_word_vectors(root, captions, words, device="cpu"):
    """word_vectors of the training captions, kept in cub/words.npz beside a digest of those."""
    captions = captions.cpu().numpy()
    digest = hashlib.sha256(captions.tobytes() + "\n".join(words).encode()).hexdigest()
    path = data.prepared(root, "cub", "words.npz")
    try:
        cache = data.read_npz(path, ("digest", "vectors"))
        if str(cache["digest"]) == digest and cache["vectors"].shape == (len(words), 300):
            return cache["vectors"]
    except ValueError:  # missing, damaged, another format: trained again
        pass
    vectors = word_vectors(captions, words, device=device)
    try:
        data.replace(path, lambda file: np.savez(file, vectors=vectors, digest=digest))
    except OSError as error:
        print(f"word vectors are not kept: {path.parent} cannot be written to ({error.strerror})")
    return vectors


def sentence_vectors(tokens, words, vectors):
    """The average over a caption's words up to <eos>, specials not counted; of no word at all, 0.

    tokens (N, 32), vectors (V, D) -> float32 (N, D)
    """
    tokens = np.asarray(tokens)
    special = np.array([word in data.SPECIALS for word in words])
    counted = ~special[tokens] & ((tokens == data.EOS).cumsum(1) == 0)
    total = np.zeros((len(tokens), vectors.shape[1]), np.float32)
    for column, use in zip(tokens.T, counted.T):
        total += vectors[column] * use[:, None]
    return total / np.maximum(counted.sum(1, keepdims=True), 1)


@torch.no_grad()
def cross_generate(model, split, batch_size=256):
    """Each test pair the other way round: one z per input, the decoded mean, the likeliest words.

    -> features from the captions (N, 2048), captions from the images int64 (N, 32)
    """
    device = next(model.parameters()).device
    split, features, captions = split.to(device), [], []
    for index in torch.arange(len(split), device=device).split(batch_size):
        image, caption = split[index]
        captions.append(model.decode(model.posterior(image, None).sample())[1].argmax(-1).cpu())
        features.append(model.decode(model.posterior(None, caption).sample())[0].cpu())
    return torch.cat(features).numpy(), torch.cat(captions).numpy()


@torch.no_grad()
def joint_generate(model, n=1000, batch_size=250):
    """n samples of the prior -> features (n, 2048), captions int64 (n, 32)"""
    features, captions = [], []
    for k in range(0, n, batch_size):
        image, caption = model.decode(model.prior().sample((min(batch_size, n - k),)))
        features.append(image.cpu())
        captions.append(caption.argmax(-1).cpu())
    return torch.cat(features).numpy(), torch.cat(captions).numpy()


def evaluate_cub(model, dataset, root="./data", samples=1000, batch_size=256):
    """[meme] Table 5, App. G: the mean correlation (eq. 12) of photos' features and sentences.

    CCA, k = 40, whitened, is fit on the training pairs; `truth` is that of the test pairs.
    """
    model.eval()
    device = next(model.parameters()).device
    vectors = cached_word_vectors(root, dataset.train.bases[1], dataset.words, device)

    def embed(tokens):
        return sentence_vectors(tokens, dataset.words, vectors)

    def arrays(split):
        (image, caption), (i, j) = split.bases, split.rows
        return image[i].cpu().numpy(), caption[j].cpu().numpy()

    image, caption = arrays(dataset.train)
    fit = cca(image, embed(caption), k=40)
    image, caption = arrays(dataset.test)
    features, captions = cross_generate(model, dataset.test, batch_size)
    joint_features, joint_captions = joint_generate(model, samples)
    pairs = {
        "image->caption": (image, captions),
        "caption->image": (features, caption),
        "joint": (joint_features, joint_captions),
        "truth": (image, caption),
    }
    return {
        "correlation": {
            key: float(correlation(fit, x, embed(tokens)).mean())
            for key, (x, tokens) in pairs.items()
        }
    }


def nearest_photos(features, photos):
    """The row of `photos` (P, 2048) nearest to each of `features` (N, 2048), Euclidean.
    -> int64 (N,)"""
    features, photos = torch.as_tensor(features), torch.as_tensor(photos)
    rows = [torch.cdist(x, photos.to(x.device)).argmin(1) for x in features.split(1000)]
    return torch.cat(rows).cpu().numpy()


# ----------------------------------------------------------------------- spectra: ranking molecules

# predicted probabilities stay this far from 0 and 1: one wrong bit costs at most 9.2 nats
CERTAIN = 1e-4


def bit_cross_entropy(probabilities, packed, block=2048):
    """-Σ_d [c_d log p_d + (1 - c_d) log(1 - p_d)] of each candidate's bits c, in nats.

    probabilities (D,); packed (n, ceil(D / 8)) uint8, as np.packbits -> (n,)
    """
    p = np.clip(np.asarray(probabilities, np.float64), CERTAIN, 1 - CERTAIN)
    log_odds, none = np.log(p) - np.log1p(-p), -np.log1p(-p).sum()
    parts = [packed[i : i + block] for i in range(0, len(packed), block)]  # 35 MB each as float64
    bits = (np.unpackbits(part, axis=1, count=len(p)).astype(np.float64) for part in parts)
    return np.concatenate([none - c @ log_odds for c in bits])


def rank_of(scores, true):
    """The rank of scores[true] among scores (n,), 1 for the lowest; ties share their mean rank."""
    gap = scores - scores[true]
    return 1 + (gap < -1e-9).sum() + ((abs(gap) <= 1e-9).sum() - 1) / 2


def challenge_ranks(probabilities, challenges):
    """The rank of each challenge's true candidate by cross entropy. probabilities (n, D) -> (n,)"""
    lists = np.split(challenges.bits, challenges.offsets[1:-1])
    each = zip(probabilities, lists, challenges.truth)
    return np.array([rank_of(bit_cross_entropy(p, packed), true) for p, packed, true in each])


def top_k(ranks, ks):
    """The share of challenges whose true candidate is among the first k.

    ranks (n,), ks (K,) -> (K,)
    """
    return (np.asarray(ranks)[:, None] <= np.asarray(ks)).mean(0)


def random_top_k(sizes, ks):
    """What top_k is on average when the candidates, `sizes` (n,) of them, are in random order.
    -> (K,)"""
    return np.minimum(np.asarray(ks) / np.asarray(sizes)[:, None], 1).mean(0)


def tanimoto(a, b):
    """|a and b| / |a or b| of bits (N, D), 1 where both are empty. -> (N,)"""
    union = (a | b).sum(1)
    return np.where(union, (a & b).sum(1) / np.maximum(union, 1), 1.0)


def bit_scores(probabilities, bits):
    """How well bits (N, D) are predicted: accuracy and Tanimoto of p > 1/2, nats per example."""
    predicted = probabilities > 0.5
    p = np.clip(probabilities, CERTAIN, 1 - CERTAIN)
    return {
        "accuracy": float((predicted == bits).mean()),
        "tanimoto": float(tanimoto(predicted, bits).mean()),
        "cross_entropy": float(-np.log(np.where(bits, p, 1 - p)).sum(1).mean()),
    }


def rank_scores(ranks):
    tops = {f"top{k}": float(top_k(ranks, [k])[0]) for k in (1, 5, 10, 20)}
    return tops | {"median": float(np.median(ranks))}


@torch.no_grad()
def predict_bits(model, take, n, samples=1, batch_size=128):
    """p(bit = 1) from the spectrum alone, the mean over samples of q(z | spectrum).

    take(index): the spectra (B, 11000) of some of the n examples. -> float32 (n, 2149)
    """
    device, found = next(model.parameters()).device, []
    for index in torch.arange(n).split(batch_size):
        z = model.posterior(take(index).to(device), None).sample((samples,))  # (samples, B, L)
        p = nets.mean(model.modalities[1], model.decoders[1](z))
        found.append(p.mean(0).float().cpu())
    return torch.cat(found).numpy()


def evaluate_spectra(model, dataset, challenges=None, samples=20, seed=0, batch_size=128):
    """Fingerprints from spectra: bits of the test split, ranks of the true candidates ([poe] 4.4).

    challenges: data.load_challenges(root), or None. samples: of z, whose predictions are averaged.
    "frequency" predicts for all spectra how often each bit is set in the training examples; it
    ranks the same candidates. "random" is the expectation over random orders; its median is the k
    at which its top-k curve reaches one half.
    -> {"bits": {"accuracy", "tanimoto", "cross_entropy"}, "frequency": {"bits": {...}}} and, with
    challenges, {"rank": {"top1", "top5", "top10", "top20", "median"}, "random": {"rank"}, "ranks":
    {id: rank}, "sizes": {id: n}}, with "rank" and "ranks" in "frequency" too. Tops are shares of
    the challenges, ties have their mean rank.
    """
    torch.manual_seed(seed)
    model.eval()
    test, train = dataset.test, dataset.train
    bits = torch.cat([test.take(1, i).cpu() for i in torch.arange(len(test)).split(4096)]) > 0.5
    bits = bits.numpy()  # (N, 2149)
    count = torch.bincount(train.rows[1].cpu(), minlength=len(train.bases[1])).double()
    frequency = (count @ train.bases[1].cpu().double() / count.sum()).numpy()  # (2149,)

    predicted = predict_bits(
        model, lambda index: test.take(0, index), len(test), samples, batch_size
    )
    result = {
        "bits": bit_scores(predicted, bits),
        "frequency": {"bits": bit_scores(np.broadcast_to(frequency, bits.shape), bits)},
    }
    if challenges is None:
        return result
    n, sizes = len(challenges.ids), np.diff(challenges.offsets)
    predicted = predict_bits(model, lambda index: challenges.spectra[index], n, samples, batch_size)
    ranks = challenge_ranks(predicted, challenges)
    baseline = challenge_ranks(np.broadcast_to(frequency, predicted.shape), challenges)
    ks = np.arange(1, sizes.max() + 1)
    chance = random_top_k(sizes, ks)
    result["rank"] = rank_scores(ranks)
    result["frequency"] |= {"rank": rank_scores(baseline), "ranks": by_id(challenges, baseline)}
    tops = {f"top{k}": float(random_top_k(sizes, [k])[0]) for k in (1, 5, 10, 20)}
    result["random"] = {"rank": tops | {"median": float(ks[np.argmax(chance >= 0.5)])}}
    result |= {"ranks": by_id(challenges, ranks), "sizes": by_id(challenges, sizes)}
    return result


def by_id(challenges, values):
    return dict(zip(challenges.ids, values.tolist()))


# ---------------------------------------------------------------------------------- runs and tables


SCRIPTS = ("meme", "svae", "vaevae", "mmvae", "mvae")
REQUIRED = dict(script=str, model=str, dataset=str, data=str, spec=dict, latent_dim=int)
REQUIRED |= dict(options=dict, paired=(int, float), unpaired=str, epochs=int, seed=int)


class Run(NamedTuple):
    folder: Path
    args: dict  # args.json
    epoch: int  # how far it was trained
    minutes: float  # how long that took, where it was trained
    model: nn.Module


def load_run(folder, device="cpu"):
    """The trained model of a run folder. ValueError, in a sentence, when it is not whole."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"there is no run folder {folder}")
    for name in ("args.json", "checkpoint.pt"):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} is no run folder, or was never trained: it has no {name}")
    try:
        args = json.loads((folder / "args.json").read_text())
        version = args["version"]
        whole = all(isinstance(args.get(key), kind) for key, kind in REQUIRED.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        version, whole = 1, False
    if version != 1:
        raise ValueError(f"{folder} was written by another version ({version}, not 1)")
    if not whole:
        raise ValueError(f"{folder / 'args.json'} is damaged: train the model again")
    if not (folder / "checkpoint.pt").stat().st_size:
        raise ValueError(f"{folder / 'checkpoint.pt'} is empty: train the model again")
    try:
        if args["script"] not in SCRIPTS:  # nothing else is imported
            raise ValueError(f"there is no script {args['script']!r}")
        saved = data.read_checkpoint(folder / "checkpoint.pt", device)
        cls = getattr(importlib.import_module(args["script"]), args["model"])
        model = cls(nets.modalities(**args["spec"]), args["latent_dim"], **args["options"])
        model.load_state_dict(saved["model"])
        minutes = sum(row["seconds"] for row in saved["log"]) / 60
        return Run(folder, args, int(saved["epoch"]), minutes, model.to(device).eval())
    except Exception as error:  # whatever a damaged file or a changed class leads to
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{folder} cannot be loaded: {reason}") from None


SECTIONS = {  # the keys of metrics.json: how a column of the table is called
    "cross_coherence": "{}",
    "self_coherence": "self {}",
    "joint_coherence": "joint",
    "joint_entropy": "joint entropy",
    "accuracy": "{}",
    "latent_accuracy": "latent {}",
    "mutual_information": "MI {}",
    "correlation": "corr. {}",
    "rank": "{}",
    "bits": "bit {}",
    "log_likelihood": "log p({})",
}


def columns(metrics):
    """metrics.json as the columns of a table, in order. -> {title: number}"""
    found = {}
    for section, title in SECTIONS.items():
        value = metrics.get(section, {})
        for key, score in (value if isinstance(value, dict) else {"": value}).items():
            key = key.replace("->", "→").replace("|", "\\|")  # a bar would end the column
            found[title.format(key)] = math.nan if score is None else score
    return found


def setting(result):
    """What two runs in one row of a table share: all but the seed and where it ran. -> dict"""
    free = ("seed", "out", "data", "device", "amp", "compile", "resume")
    run = {k: v for k, v in result["run"].items() if k not in free}
    return run | run["options"] | {"epoch": result["epoch"]}


def grouped(results):
    """Lists of results of the same setting, which differ in the seed alone."""
    groups = {}
    for result in results:
        key = json.dumps(setting(result), sort_keys=True)
        groups.setdefault(key, []).append(result)
    return list(groups.values())


def row_names(groups, shown=("paired", "unpaired", "epoch")):
    """The model of each group and the flags in which a model's groups differ: MEME kl=sample.

    shown: the flags that are told elsewhere, in columns of their own.
    """
    shown = {*shown, "epochs", "spec", "options", "examples", "note"}
    settings, names = [setting(group[0]) for group in groups], []
    for own in settings:
        rivals = [other for other in settings if other["model"] == own["model"]]
        flags = [k for k in own if k not in shown and own[k] not in (None, False)]
        flags = [k for k in flags if any(rival.get(k) != own[k] for rival in rivals)]
        names.append(" ".join([own["model"], *(f"{k}={own[k]}" for k in flags)]))
    return names


PAPER = [  # data set, model, unpaired, column, numbers at f = 1, 1/2, 1/4, 1/8, 1/16
    # [poe] Table 1
    ("mnist-split", "MMVAE", "", "both", ".539"),
    ("mnist-split", "MMVAE", "", "top", ".221"),
    ("mnist-split", "MMVAE", "", "bottom", ".283"),
    ("mnist-split", "SVAE", "", "both", ".948"),
    ("mnist-split", "SVAE", "", "top", ".872"),
    ("mnist-split", "SVAE", "", "bottom", ".816"),
    ("mnist-split", "VAEVAE", "", "both", ".956"),
    ("mnist-split", "VAEVAE", "", "top", ".887"),
    ("mnist-split", "VAEVAE", "", "bottom", ".830"),
    ("mnist-split", "VAEVAE*", "", "both", ".958"),
    ("mnist-split", "VAEVAE*", "", "top", ".863"),
    ("mnist-split", "VAEVAE*", "", "bottom", ".778"),
    # [meme] Table 3; Table 7, which does not say where from: taken as what is generated
    ("mnist-svhn", "MEME", "svhn", "mnist→svhn", ".625 .551 .323 .172 .143"),
    ("mnist-svhn", "MEME", "mnist", "mnist→svhn", ".625 .572 .485 .470 .451"),
    ("mnist-svhn", "MEME", "split", "mnist→svhn", ".625 .625 .503 .467 .387"),
    ("mnist-svhn", "MEME", "svhn", "svhn→mnist", ".752 .726 .652 .557 .477"),
    ("mnist-svhn", "MEME", "mnist", "svhn→mnist", ".752 .715 .603 .546 .446"),
    ("mnist-svhn", "MEME", "split", "svhn→mnist", ".752 .718 .621 .568 .503"),
    ("mnist-svhn", "MMVAE", "", "mnist→svhn", ".581"),
    ("mnist-svhn", "MMVAE", "", "svhn→mnist", ".735"),
    ("mnist-svhn", "MMVAE, Laplace", "", "mnist→svhn", ".652"),
    ("mnist-svhn", "MMVAE, Laplace", "", "svhn→mnist", ".918"),
    ("mnist-svhn", "MVAE", "svhn", "mnist→svhn", ".123 .110 .112 .105 .105"),
    ("mnist-svhn", "MVAE", "mnist", "mnist→svhn", ".123 .111 .112 .116 .116"),
    ("mnist-svhn", "MVAE", "split", "mnist→svhn", ".123 .108 .101 .101 .101"),
    ("mnist-svhn", "MVAE", "svhn", "svhn→mnist", ".498 .305 .268 .220 .188"),
    ("mnist-svhn", "MVAE", "mnist", "svhn→mnist", ".498 .365 .350 .302 .249"),
    ("mnist-svhn", "MVAE", "split", "svhn→mnist", ".498 .338 .273 .249 .169"),
    # [meme] Table 4
    ("mnist-svhn", "MEME", "svhn", "latent mnist", ".908 .881 .870 .815 .795"),
    ("mnist-svhn", "MEME", "mnist", "latent mnist", ".908 .882 .844 .824 .807"),
    ("mnist-svhn", "MEME", "split", "latent mnist", ".908 .914 .893 .883 .856"),
    ("mnist-svhn", "MEME", "svhn", "latent svhn", ".648 .549 .295 .149 .113"),
    ("mnist-svhn", "MEME", "mnist", "latent svhn", ".648 .581 .398 .384 .362"),
    ("mnist-svhn", "MEME", "split", "latent svhn", ".648 .675 .507 .432 .316"),
    ("mnist-svhn", "MMVAE", "", "latent mnist", ".886"),
    ("mnist-svhn", "MMVAE", "", "latent svhn", ".499"),
    ("mnist-svhn", "MVAE", "svhn", "latent mnist", ".892 .895 .890 .887 .880"),
    ("mnist-svhn", "MVAE", "mnist", "latent mnist", ".892 .895 .898 .896 .895"),
    ("mnist-svhn", "MVAE", "split", "latent mnist", ".892 .898 .895 .894 .898"),
    ("mnist-svhn", "MVAE", "svhn", "latent svhn", ".131 .106 .107 .105 .102"),
    ("mnist-svhn", "MVAE", "mnist", "latent svhn", ".131 .106 .106 .107 .101"),
    ("mnist-svhn", "MVAE", "split", "latent svhn", ".131 .107 .109 .104 .100"),
    # [meme] Table 6; its MEME_SPLIT rows repeat Table 4 and are left out
    ("mnist-svhn", "MEME", "svhn", "MI mnist", ".075 .086 .101 .102 .103"),
    ("mnist-svhn", "MEME", "mnist", "MI mnist", ".073 .087 .101 .099 .104"),
    ("mnist-svhn", "MEME", "svhn", "MI svhn", ".036 .047 .071 – .134"),
    ("mnist-svhn", "MEME", "mnist", "MI svhn", ".036 .048 .085 .111 .142"),
    ("mnist-svhn", "MMVAE", "", "MI mnist", ".105"),
    ("mnist-svhn", "MMVAE", "", "MI svhn", ".042"),
    ("mnist-svhn", "MVAE", "svhn", "MI mnist", ".110 .107 .106 .106 .142"),
    ("mnist-svhn", "MVAE", "mnist", "MI mnist", ".102 .093 .110 .100 .100"),
    ("mnist-svhn", "MVAE", "split", "MI mnist", ".110 .104 .099 .100 .098"),
    ("mnist-svhn", "MVAE", "svhn", "MI svhn", ".163 .166 .165 .164 .176"),
    ("mnist-svhn", "MVAE", "mnist", "MI svhn", ".163 .175 .170 .174 .182"),
    ("mnist-svhn", "MVAE", "split", "MI svhn", ".163 .165 .172 .173 .179"),
    # [meme] Table 5
    ("cub", "MEME", "image", "corr. image→caption", ".064 .042 .026 .029"),
    ("cub", "MEME", "caption", "corr. image→caption", ".064 .062 .048 .052"),
    ("cub", "MEME", "split", "corr. image→caption", ".064 .046 .031 .027"),
    ("cub", "MEME", "image", "corr. caption→image", ".074 .058 .051 .046"),
    ("cub", "MEME", "caption", "corr. caption→image", ".074 .059 .050 .053"),
    ("cub", "MEME", "split", "corr. caption→image", ".074 .061 .047 .049"),
    ("cub", "MMVAE", "", "corr. image→caption", ".060"),
    ("cub", "MMVAE", "", "corr. caption→image", ".058"),
    ("cub", "MVAE", "image", "corr. image→caption", "-.002 -.000 .001 -.001"),
    ("cub", "MVAE", "caption", "corr. image→caption", "-.002 -.000 .000 .001"),
    ("cub", "MVAE", "split", "corr. image→caption", "-.002 .000 .000 -.001"),
    ("cub", "MVAE", "image", "corr. caption→image", "-.002 -.002 -.002 -.001"),
    ("cub", "MVAE", "caption", "corr. caption→image", "-.002 -.001 -.003 -.002"),
    ("cub", "MVAE", "split", "corr. caption→image", "-.002 -.002 -.002 -.002"),
    *(("cub", m, "", "corr. truth", ".106") for m in ("MEME", "MMVAE", "MVAE")),
]


def paper_name(run):
    """What the papers call a run's model. None: they have no such model."""
    model, options = run["model"], run["options"]
    others = ("variant", "a"), ("prior_expert", True), ("objective", "elbo"), ("kl", "sample")
    if options.get("direction") or any(options.get(k) == value for k, value in others):
        return None
    if options.get("posterior") == "laplace":
        return f"{model}, Laplace"
    return model + "*" * (
        options.get("objective", "") == {"SVAE": "vaevae", "VAEVAE": "svae"}.get(model)
    )


def paper_row(run, titles):
    """What the papers report for the setting of a run, in the columns of its table; [] if nothing.

    With every pair complete `unpaired` does not count, and the first of what they give is taken.
    """
    cells, name = {}, paper_name(run)
    for dataset, model, unpaired, column, numbers in PAPER:
        series = dict(zip((1, 1 / 2, 1 / 4, 1 / 8, 1 / 16), numbers.split()))
        same = run["paired"] == 1 or unpaired == run["unpaired"]
        if (dataset, model) == (run["dataset"], name) and same and run["paired"] in series:
            cells.setdefault(column, series[run["paired"]].replace(".", "0.", 1))
    shown = [cells.get(t, "") for t in titles]
    head = [f"{name}, paper", f"{run['paired']:g}", "", "", "", ""]
    return head + shown if any(shown) else []


def number(values):
    """Mean ± standard deviation of the runs' values, nats with one digit, shares with three."""
    values = [v for v in values if math.isfinite(v)]
    if not values:
        return "–"
    digits = 1 if max(abs(v) for v in values) >= 10 else 3
    spread = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{spread}"


def table(results, paper=False):
    """Markdown: for each data set one table, a row for the runs of a setting, over their seeds."""
    lines = []
    for name in dict.fromkeys(r["data"] for r in results):
        chosen = [r for r in results if r["data"] == name]
        groups = grouped(chosen)
        titles = list(dict.fromkeys(t for r in chosen for t in columns(r)))
        head = ["model", "paired", "unpaired", "epochs", "seeds", "minutes", *titles]
        lines += [f"**{name}**", "", "| " + " | ".join(head) + " |", "| --- " * len(head) + "|"]
        for model, group in zip(row_names(groups), groups):
            run, cells = group[0]["run"], [columns(r) for r in group]
            epoch, epochs = group[0]["epoch"], str(run["epochs"])
            epochs = epochs if epoch == run["epochs"] else f"{epoch} of {epochs}"
            minutes = f"{np.mean([r['minutes'] for r in group]):.1f}"
            seeds = len({r["run"]["seed"] for r in group})
            row = [model, f"{run['paired']:g}", run["unpaired"], epochs, seeds, minutes]
            row += [number([c.get(t, math.nan) for c in cells]) for t in titles]
            lines.append("| " + " | ".join(map(str, row)) + " |")
            if paper and (row := paper_row(run, titles)):
                row[0] += " (other data)" if ":" in name or run.get("limit") else ""
                lines.append("| " + " | ".join(row) + " |")
        lines += ["", *notes(chosen), ""]
    return "\n".join(lines)


def notes(results):
    """What has to be known to read a table of these results. -> list of lines"""
    lines = []
    if oracle := results[0].get("oracle"):
        accuracy = ", ".join(f"{view} {share:.3f}" for view, share in oracle.items())
        lines.append(f"Test accuracy of the oracles: {accuracy}.")
    limited = [r for r in results if r["run"].get("limit")]
    for limit in sorted({r["run"]["limit"] for r in limited}):
        folders = ", ".join(Path(r["folder"]).name for r in limited if r["run"]["limit"] == limit)
        lines.append(f"Trained on the first {limit:,} examples only (--limit): {folders}.")
    for k, n in sorted({(r["samples"], r["examples"]) for r in results if "log_likelihood" in r}):
        lines.append(f"log p: nats, importance-weighted, K = {k:,}, the first {n:,} test examples.")
    if "ranks" in results[0]:
        for name in ("frequency", "random"):
            rank = results[0][name]["rank"]
            tops = ", ".join(f"top {k} {rank[f'top{k}']:.3f}" for k in (1, 5, 10, 20))
            what = {"frequency": "Every bit by its frequency in training", "random": "Random order"}
            lines.append(f"{what[name]}: {tops}, median rank {rank['median']:.1f}.")
        for r in results:
            ranks = ", ".join(f"{rank:g}" for rank in sorted(r["ranks"].values()))
            lines.append(f"Ranks of the true candidates, {Path(r['folder']).name}: {ranks}.")
    if any("log_likelihood" in r and r["pseudo"] for r in results):
        lines.append("Bernoulli on grey values is a pseudo-likelihood: no density of the images.")
    return lines


# ------------------------------------------------------------------------------------------ figures

COLOURS = {  # Okabe and Ito's palette: told apart by the colour-blind too
    "MEME": "#0072B2",
    "SVAE": "#E69F00",
    "VAEVAE": "#009E73",
    "MMVAE": "#CC79A7",
    "MVAE": "#D55E00",
}
UNPAIRED, PAIRED, WRONG = "#56B4E9", "#E69F00", "#D55E00"


def pyplot():
    try:
        import matplotlib
    except ImportError:
        raise ValueError("the charts need matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def title(run):
    return f"{run.args['model']} · {run.args['dataset']} · f = {run.args['paired']:g}"


def canvas(images, height, width):
    """Grey or coloured images (n, C, H, W) in the middle of height x width, in colour."""
    x = images.clamp(0, 1).expand(-1, 3, -1, -1)
    tall, wide = height - x.shape[2], width - x.shape[3]
    return F.pad(x, (wide // 2, wide - wide // 2, tall // 2, tall - tall // 2), value=1)


def page(rows, heading, path, read=None):
    """An image file with a row per (label, images (n, C, H, W)).

    read: per row the digits to write beside the images and whether the other modality of the same
    z agrees, both (n,); bold and red where it does not.
    """
    from torchvision.utils import make_grid

    plt = pyplot()
    height, width = (max(images.shape[k] for _, images in rows) for k in (2, 3))
    margin, columns = 0 if read is None else 12, len(rows[0][1])
    tiles = torch.cat([canvas(images, height, width) for _, images in rows])
    tiles = F.pad(tiles, (0, margin), value=1)
    grid = make_grid(tiles, nrow=columns, pad_value=1).permute(1, 2, 0).cpu()
    down, across = height + 2, width + margin + 2
    size = 0.014 * grid.shape[1] + 1.3, 0.014 * grid.shape[0] + 0.4
    figure, ax = plt.subplots(figsize=size)
    ax.imshow(grid.numpy())
    middle = [2 + height / 2 + down * k for k in range(len(rows))]
    ax.set_yticks(middle, [label for label, _ in rows])
    ax.set_xticks([])
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    for y, (digits, agree) in zip(middle, read or []):
        for k, (digit, fits) in enumerate(zip(digits.tolist(), agree.tolist())):
            style = dict(color="k") if fits else dict(color=WRONG, weight="bold")
            ax.text(across * k + width + 8, y, digit, ha="center", va="center", size=8, **style)
    ax.set_title(heading, size=10)
    figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(figure)


@torch.no_grad()
def generations(model, dataset):
    """A column per digit, and per modality shown the rows input, generated from itself, generated
    in the others: [meme] Figs. 3, 11-17. -> list of (label, images (n, C, H, W))

    Split images: two rows per subset of the parts, what is shown and the image regenerated from
    it: [poe] Figs. 3, 4.
    """
    split, names, rows = dataset.test, dataset.names, []
    labels = split.labels.tolist()
    index = torch.tensor([labels.index(digit) for digit in sorted(set(labels))])
    xs = split[index]
    for name, shown in subsets(names).items():
        means = model.decode(model.posterior(*data.show(split, shown, index)).sample())
        if dataset.name in nets.BANDS:
            whole = views(dataset)["image"]
            seen = [x if s else torch.full_like(x, 0.5) for x, s in zip(xs, shown)]
            rows += [(name, whole(seen)), ("→ image", whole(means))]
        elif sum(shown) == 1:
            m = shown.index(True)
            rows += [(name, xs[m]), (f"{name} → {name}", means[m])]
            rows += [(f"{name} → {names[k]}", means[k]) for k in range(len(names)) if k != m]
    return rows


def side_by_side(pages):
    """The same test images through several models, a row each: what is shown, then what every model
    makes of it in another modality, or of the parts.

    pages: {model: generations' rows} -> list of (label, images (n, C, H, W))
    """
    rows = []
    for k, (label, images) in enumerate(next(iter(pages.values()))):
        source, arrow, target = label.partition("→")
        if not arrow:
            rows.append((label, images))
        elif source.strip() != target.strip():
            rows += [(f"{target.strip()}, {name}", page[k][1]) for name, page in pages.items()]
    return rows


@torch.no_grad()
def joint_samples(model, dataset, oracles, columns=10, lines=5):
    """Samples of the prior, what is made from one z one below the other: [poe] Figs. 3, 5.

    -> list of (label, images (n, C, H, W)), and for each what the oracle reads and whether all
    oracles read that, both (n,); None without oracles
    """
    rows, read = [], []
    for _ in range(lines):
        means = model.decode(model.prior().sample((columns,)))
        rows += [(name, view(means)) for name, view in views(dataset).items()]
        if oracles:
            digits = readings(means, dataset, oracles)
            agree = (digits == digits[0]).all(0)
            read += [(digit, agree) for digit in digits]
    return rows, read or None


@torch.no_grad()
def distances(model, split, a, b, n=500):
    """W2 between q(z|x_a) and q(z|x_b) of n random examples that differ in x_a. -> (n, n), index"""
    index = torch.from_numpy(np.unique(split.rows[a].cpu(), return_index=True)[1])
    index, moments = index[torch.randperm(len(index))[:n]], []
    for m in (a, b):
        shown = [k == m for k in range(len(split.bases))]
        q = model.posterior(*data.show(split, shown, index))
        moments += [q.mean.double().cpu().numpy(), q.stddev.double().cpu().numpy()]
    mean_a, std_a, mean_b, std_b = moments  # each (n, L)
    return np.stack([w2(mu, std, mean_b, std_b) for mu, std in zip(mean_a, std_a)]), index


def relatedness(run, dataset, path):
    """[meme] Figs. 8 and 9 for the first two modalities: W2 of related and unrelated pairs, between
    the classes, and the classes' average-linkage tree. Related: the same label, or, without labels,
    the same example."""
    plt = pyplot()
    a, b = dataset.names[:2]
    d, index = distances(run.model, dataset.test, 0, 1)
    labels = np.arange(len(d))
    if dataset.test.labels is not None:
        labels = dataset.test.labels[index].cpu().numpy()
    same, classes = labels[:, None] == labels, np.unique(labels)
    panels = 3 if 1 < len(classes) <= 20 else 1
    size = (4.5 * panels, 3.8)
    figure, axes = plt.subplots(1, panels, figsize=size, squeeze=False, layout="constrained")
    for pairs, label, colour in ((~same, "unrelated", UNPAIRED), (same, "related", PAIRED)):
        axes[0, 0].hist(d[pairs], 50, density=True, alpha=0.7, label=label, color=colour)
    axes[0, 0].set(xlabel=f"W2 of q(z|{a}), q(z|{b})", ylabel="density")
    axes[0, 0].legend()
    if panels == 3:
        members = [labels == c for c in classes]
        between = np.array([[d[np.ix_(i, j)].mean() for j in members] for i in members])
        image = axes[0, 1].imshow(between, cmap="cividis")
        axes[0, 1].set(xlabel=b, ylabel=a, xticks=range(len(classes)), yticks=range(len(classes)))
        axes[0, 1].set(xticklabels=classes, yticklabels=classes)
        figure.colorbar(image, ax=axes[0, 1], label="mean W2")
        tree(between, classes, axes[0, 2])
    figure.suptitle(title(run))
    figure.savefig(path, dpi=150)
    plt.close(figure)


def tree(between, classes, ax):
    """A dendrogram of the classes; the distances a -> b and b -> a are averaged."""
    try:
        from scipy.cluster.hierarchy import dendrogram, linkage
    except ImportError:
        raise ValueError("the dendrogram needs scipy: pip install scipy") from None
    symmetric = (between + between.T) / 2
    condensed = symmetric[np.triu_indices(len(classes), 1)]
    dendrogram(linkage(condensed, "average"), labels=classes, ax=ax, link_color_func=lambda _: "k")
    ax.set_ylabel("mean W2")


@torch.no_grad()
def latent_map(run, dataset, path, n=1000):
    """[meme] Figs. 19, 20: z ~ q(z|x_m) of every modality in the plane, by t-SNE, or, without
    scikit-learn, PCA."""
    plt = pyplot()
    index = torch.arange(min(n, len(dataset.test)))
    shown = singles(dataset.names).values()
    z = np.concatenate([latent_samples(run.model, dataset.test, s, index) for s in shown])
    try:
        from sklearn.manifold import TSNE

        plane, method = TSNE(random_state=0).fit_transform(z), "t-SNE"
    except ImportError:
        centred = z - z.mean(0)
        plane, method = centred @ np.linalg.svd(centred, full_matrices=False)[2][:2].T, "PCA"
    labels = np.tile(dataset.test.labels[index].cpu(), len(dataset.names))
    size = dict(figsize=(11, 5), sharex=True, sharey=True, layout="constrained")
    figure, (left, right) = plt.subplots(1, 2, **size)
    colours = (PAIRED, *COLOURS.values())[: len(dataset.names)]
    for name, part, colour in zip(dataset.names, np.split(plane, len(dataset.names)), colours):
        left.scatter(*part.T, 8, color=colour, alpha=0.6, lw=0, label=name)
    left.legend(markerscale=2)
    left.set_title("modality")
    for k, label in enumerate(np.unique(labels)):  # a label is its own marker
        colour, marker = plt.get_cmap("tab10")(k % 10), f"${label}$"
        right.scatter(*plane[labels == label].T, 25, color=colour, marker=marker, lw=0, alpha=0.8)
    right.set_title("label")
    figure.suptitle(f"{title(run)} · samples of the posterior of each modality, {method}")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def gradient_noise(run, dataset, path, draws=30, examples=64):
    """[meme] Fig. 10: |mean| / std of every entry of MEME's gradient, with and without that of w.

    Mean and std are over draws of z, for one batch of test examples.
    """
    plt = pyplot()
    model, xs = run.model, dataset.test[torch.arange(min(examples, len(dataset.test)))]
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.5), sharey=True, layout="constrained")
    parts = [list(getattr(model, part).parameters()) for part in ("encoders", "decoders")]
    sizes = [sum(weight.numel() for weight in part) for part in parts]
    model.kl = "sample"  # eq. (6) as printed, of which eq. (7) is the gradient
    for full in (False, True):
        model.full_gradient = full
        name, colour = ("eq. (7)", PAIRED) if full else ("w detached", UNPAIRED)
        total, squares = 0, 0
        for _ in range(draws):
            gradient = torch.autograd.grad(model.objective(*xs), sum(parts, []))
            gradient = torch.cat([g.flatten() for g in gradient]).double()
            total, squares = total + gradient, squares + gradient**2
        mean = total / draws
        std = (squares / draws - mean**2).clamp_min(0).sqrt()
        for ax, m, s in zip(axes, mean.split(sizes), std.split(sizes)):
            ratio = (m.abs() / s)[s > 0].log10().cpu().clamp(-4, 2)
            label = f"{name}, median {10 ** ratio.median().item():.2g}"
            ax.hist(ratio, 60, alpha=0.7, label=label, color=colour, density=True)
    for ax, part in zip(axes, ("encoders", "decoders")):
        ax.set(xlabel="log10 |mean| / std of a gradient entry", title=part)
        ax.legend(loc="upper left", fontsize=8)
    model.full_gradient, model.kl = (run.args["options"][k] for k in ("full_gradient", "kl"))
    axes[0].set_ylabel("density")
    figure.suptitle(f"{title(run)} · signal to noise of the gradient")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def curves(results, folder, against="paired"):
    """Every metric against a flag, the paired fraction: a line per model and setting, mean and
    spread over seeds.

    One figure per data set with two values of the flag or more ([meme] Figs. 5-7, 21, 22; [poe]
    Figs. 6-9).
    """
    plt = pyplot()
    for name in dict.fromkeys(r["run"]["dataset"] for r in results):
        groups = grouped(r for r in results if r["run"]["dataset"] == name)
        settings = [setting(group[0]) for group in groups]
        values = [s[against] for s in settings if s.get(against) is not None]
        if not values or not all(isinstance(value, int | float) for value in values):
            raise ValueError(f"--against {against}: no flag of these runs with numbers as values")
        ticks = set(values)
        if len(ticks) < 2:
            continue
        lines = {}  # (model and flags, unpaired, f): {value of the flag: {title: numbers}}
        told = ("paired", "unpaired", "epoch" if against == "epochs" else against)
        labels = row_names(groups, told)
        for label, own, group in zip(labels, settings, groups):
            if against in own:
                cells = [columns(r) for r in group]
                points = {t: [c.get(t, math.nan) for c in cells] for t in cells[0]}
                f = None if against == "paired" else own["paired"]
                lines.setdefault((label, own["unpaired"], f), {})[own[against]] = points
        if against == "paired":  # a run on whole pairs is the end of every line of its model but
            same = [key for key in lines if key[1] != "all"]  # "all", which has single streams too
            ends = {key[0]: lines[key][1] for key in same if 1 in lines[key]}
            whole = [key for key in same if set(lines[key]) == {1}]
            for key in same:
                if key not in whole and key[0] in ends:
                    lines[key].setdefault(1, ends[key[0]])
            for key in whole:  # drawn as the end of another line
                if any(other[0] == key[0] for other in same if other not in whole):
                    del lines[key]
        titles = list(dict.fromkeys(t for line in lines.values() for p in line.values() for t in p))
        width = min(4, len(titles))
        height = -(-len(titles) // width)
        size = dict(figsize=(3.2 * width, 2.6 * height + 0.6), layout="constrained")
        figure, axes = plt.subplots(height, width, squeeze=False, **size)
        for ax, metric in zip(axes.flat, titles):
            of_model = {}  # how many lines of a model, which has one colour, are drawn
            for (label, unpaired, f), line in lines.items():
                model = label.split()[0]
                k = of_model[model] = of_model.get(model, -1) + 1
                x = sorted(value for value in line if metric in line[value])
                mean = np.array([np.mean(line[value][metric]) for value in x])
                spread = [line[value][metric] for value in x]
                std = np.array([np.std(v, ddof=1) if len(v) > 1 else 0 for v in spread])
                colour, dash = COLOURS.get(model, "k"), ("-", "--", ":", "-.")[k % 4]
                name_of_line = " ".join([label, unpaired, *([] if f is None else [f"f = {f:g}"])])
                ax.plot(x, mean, "os^Dv"[k % 5], ls=dash, color=colour, ms=4, label=name_of_line)
                ax.fill_between(x, mean - std, mean + std, color=colour, alpha=0.2, lw=0)
            ax.set(xscale="log", title=metric.replace("\\", ""))
            ax.set_xticks(sorted(ticks), [f"{tick:g}" for tick in sorted(ticks)])
            ax.minorticks_off()
        for ax in axes.flat[len(titles) :]:
            ax.set_axis_off()
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
        axis = "the paired fraction f" if against == "paired" else against.replace("_", "-")
        figure.suptitle(f"{Path(name).stem} · against {axis}, mean ± std over seeds")
        figure.savefig(folder / f"{Path(name).stem}-{against.replace('_', '-')}.png", dpi=150)
        plt.close(figure)


@torch.no_grad()
def draw_spectra(run, dataset, path, n=4):
    """[poe] Fig. 11 A-C: test spectra, and below each molecule's bits those that are predicted."""
    plt = pyplot()
    index = torch.linspace(0, len(dataset.test) - 1, n).long()
    spectra, bits = (dataset.test.take(m, index).cpu().numpy() for m in (0, 1))
    p = predict_bits(run.model, lambda k: dataset.test.take(0, index[k]), n, samples=20)
    scores = tanimoto(p > 0.5, bits > 0.5)
    size = dict(figsize=(11, 1.9 * n + 0.5), squeeze=False, layout="constrained")
    figure, axes = plt.subplots(n, 2, **size)
    for (left, right), spectrum, bit, guess, score in zip(axes, spectra, bits, p, scores):
        peaks, ones = spectrum.nonzero()[0], bit.nonzero()[0]
        left.vlines((peaks + 0.5) / 10, 0, spectrum[peaks], color="k", lw=0.8)
        left.set(xlim=(0, 1100), ylim=(0, 1.05), ylabel="√ intensity")
        right.vlines(ones, 0, 1, color=PAIRED, lw=0.7, label="the molecule's")
        right.vlines(range(len(guess)), 0, -guess, color=UNPAIRED, lw=0.7, label="predicted, p")
        right.axhline(0, color="k", lw=0.5)
        right.set(ylim=(-1.05, 1.05), yticks=[-1, 0, 1], yticklabels=[1, 0, 1])
        right.set_title(f"Tanimoto {score:.2f}", loc="right", size=9)
    axes[-1, 0].set_xlabel("m/z")
    axes[-1, 1].set_xlabel("bit of the fingerprint")
    lines = axes[0, 1].get_legend_handles_labels()
    figure.legend(*lines, loc="outside lower right", ncols=2)
    figure.suptitle(f"{title(run)} · test spectra and fingerprints")
    figure.savefig(path, dpi=150)
    plt.close(figure)


@torch.no_grad()
def draw_cub(run, dataset, path, root="./data", n=6):
    """Photos and captions of n test pairs with what each generates ([meme] Fig. 4, [poe] Fig. 10),
    to an image file.

    A generated photo is the training photo whose features are nearest to the generated ones.
    """
    from PIL import Image

    plt, model = pyplot(), run.model
    device = next(model.parameters()).device
    files, test, words = data.cub_photos(root), dataset.test, dataset.words
    chosen = torch.linspace(0, len(test.bases[0]) - 1, n).long()  # photos, evenly over the species
    index = torch.tensor([int((test.rows[0].cpu() == row).nonzero()[0, 0]) for row in chosen])
    image, caption = test.to(device)[index.to(device)]
    columns = [("photo", "photo", [files["test"][row] for row in chosen])]
    for xs, name in (((image, None), "photo"), ((None, caption), "caption")):
        features, tokens = model.decode(model.posterior(*xs).sample())
        nearest = nearest_photos(features, dataset.train.bases[0])
        if name == "caption":
            columns.append(("caption", "text", [caption_text(t.cpu(), words) for t in caption]))
        columns.append((f"{name} → photo", "photo", [files["train"][row] for row in nearest]))
        texts = [caption_text(t, words) for t in tokens.argmax(-1).cpu()]
        columns.append((f"{name} → caption", "text", texts))
    rows, size = len(chosen), (2.2 * len(columns), 2.2 * len(chosen))
    figure, axes = plt.subplots(rows, len(columns), figsize=size, squeeze=False)
    figure.suptitle(title(run))
    for column, (head, kind, contents) in zip(axes.T, columns):
        column[0].set_title(head)
        for axis, content in zip(column, contents):
            axis.axis("off")
            if kind == "text":
                text = textwrap.fill(content, 24, max_lines=9, placeholder=" …")
                axis.text(0.5, 0.5, text, ha="center", va="center", size=9)
                continue
            try:
                with Image.open(content) as photo:
                    axis.imshow(photo.convert("RGB")).axes.set_adjustable("datalim")
            except OSError:
                axis.text(0.5, 0.5, f"{content.name}\nis not there", ha="center", size=7)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)


def top_k_figure(results, path):
    """[poe] Fig. 11 D: top-k curves of runs, of the bit frequencies and of random order."""
    plt = pyplot()
    first = next(iter(results.values()))
    sizes = np.array(list(first["sizes"].values()))
    ks = np.unique(np.geomspace(1, sizes.max(), 400).round().astype(int))
    figure, axes = plt.subplots(figsize=(6, 4))
    for name, result in results.items():
        axes.step(ks, top_k(list(result["ranks"].values()), ks), where="post", label=name)
    baseline = top_k(list(first["frequency"]["ranks"].values()), ks)
    axes.step(ks, baseline, "--", where="post", color="0.45", label="bit frequencies")
    axes.plot(ks, random_top_k(sizes, ks), ":", color="black", label="random order")
    axes.set(xscale="log", xlabel="k", ylabel="true candidate among the first k", ylim=(0, 1.02))
    axes.set_title(f"{len(sizes)} challenges, {sizes.min():,} to {sizes.max():,} candidates")
    axes.legend(frameon=False, loc="upper left")
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw(run, dataset, oracles, folder, root, seed=0):
    """All figures of one run, named after it. -> generations' rows, of labelled images"""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    name, rows = run.folder.resolve().name, []
    images = all(len(b.shape) == 4 and b.shape[1] in (1, 3) for b in dataset.test.bases)
    if images:
        joint, read = joint_samples(run.model, dataset, oracles)
        heading = f"{title(run)} · samples of p(z)"
        pairs = run.args["paired"] == 1 and run.args["unpaired"] != "all" and dataset.mask is None
        if run.args["model"] == "MEME" and pairs:
            heading += "\n(of pseudo-samples, which whole pairs do not train)"
        page(joint, heading, folder / f"{name}-joint.png", read)
    if dataset.test.labels is not None:
        if images:
            rows = generations(run.model, dataset)
            page(rows, title(run), folder / f"{name}-generation.png")
        latent_map(run, dataset, folder / f"{name}-latent.png")
    if dataset.name == "cub":
        draw_cub(run, dataset, folder / f"{name}-generation.png", root)
    if dataset.name == "spectra":
        draw_spectra(run, dataset, folder / f"{name}-generation.png")
        return rows
    relatedness(run, dataset, folder / f"{name}-relatedness.png")
    if hasattr(run.model, "full_gradient"):
        gradient_noise(run, dataset, folder / f"{name}-gradient.png")
    return rows


def draw_models(results, pages, folder):
    """A page per data set with a row per model, of its runs with most pairs and their first seed.

    pages: {folder of a run: generations' rows}
    """
    for name in dict.fromkeys(r["run"]["dataset"] for r in results if pages.get(r["folder"])):
        found = [r for r in results if r["run"]["dataset"] == name and pages.get(r["folder"])]
        most = max(r["run"]["paired"] for r in found)
        groups = grouped(r for r in found if r["run"]["paired"] == most)
        firsts = [min(group, key=lambda r: r["run"]["seed"])["folder"] for group in groups]
        rows = dict(zip(row_names(groups, ["paired"]), (pages[folder] for folder in firsts)))
        if len(rows) > 1:
            heading = f"{name} · f = {most:g}"
            page(side_by_side(rows), heading, folder / f"{Path(name).stem}-models.png")


# -------------------------------------------------------------------------- python eval.py runs/...

DIGITS = ("glyphs", "mnist-svhn", *nets.BANDS)  # the data sets that oracles judge


def prepare(name, root, device):
    """A data set on the device, with its oracles.
    -> Dataset, {view: Oracle}, {view: test accuracy}"""
    dataset = data.load(name, root)
    dataset = dataset._replace(train=dataset.train.to(device), test=dataset.test.to(device))
    found = {}
    if name in DIGITS:
        found = {view: load_oracle(dataset, view, root) for view in views(dataset)}
    oracles = {view: oracle for view, (oracle, _) in found.items()}
    return dataset, oracles, {view: accuracy for view, (_, accuracy) in found.items()}


def grey_bernoulli(model, dataset):
    """Whether a Bernoulli likelihood scores values between 0 and 1."""
    pairs = zip(model.modalities, dataset.test.bases)
    return any(m.likelihood == "bernoulli" and base.dtype != torch.bool for m, base in pairs)


def finite(value):
    """JSON has no NaN: None in its place."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def count(text):
    """An argparse type."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not an integer from 1 on")
    return int(text)


def main(argv=None):
    p = argparse.ArgumentParser(
        description="Evaluate runs: writes metrics.json into each, prints a table, draws figures.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    p.add_argument("runs", nargs="+", help="run folders")
    p.add_argument("--figures", metavar="DIR", type=Path, help="draw the figures into this folder")
    p.add_argument("--data", metavar="DIR", help="folder of the data sets, if not that of the run")
    p.add_argument("--seed", type=int, default=0, help="of the latent samples")
    p.add_argument("--samples", type=count, default=1000, help="K of the likelihoods")
    p.add_argument("--full", action="store_true", help="likelihoods of all test examples, not 100")
    p.add_argument("--no-likelihoods", action="store_true", help="leave them out: they are slow")
    p.add_argument("--paper", action="store_true", help="the papers' numbers in the table, too")
    p.add_argument("--against", default="paired", help="the flag on the curves' x-axis")
    usual = "cuda" if torch.cuda.is_available() else "cpu"
    p.add_argument("--device", default=usual, choices=["cuda", "cpu"])
    args = p.parse_args(argv)
    if args.device == "cuda" and usual == "cpu":
        p.error("this PyTorch finds no CUDA device: use --device cpu")

    prepared, results, pages, failed = {}, [], {}, False
    for folder in {Path(folder).resolve(): folder for folder in args.runs}.values():
        try:
            run = load_run(folder, args.device)
            where = run.args["dataset"], args.data or run.args["data"]
            if where not in prepared:
                prepared[where] = prepare(*where, args.device)
            dataset, oracles, accuracies = prepared[where]
            fits = [
                run.args["spec"].get(k) == dataset.spec.get(k) for k in ("shapes", "vocabulary")
            ]
            if not all(fits) or run.args.get("note", "") != dataset.note:
                raise ValueError(f"{folder} was trained on other data than {where[0]} holds now")
            print(f"evaluating {folder} ...", file=sys.stderr)
            examples = len(dataset.test) if args.full else min(100, len(dataset.test))
            examples = 0 if args.no_likelihoods else examples
            options = examples, args.samples, args.seed, where[1]
            metrics = evaluate(run.model, dataset, oracles, *options)
            metrics |= {
                "oracle": accuracies,
                "data": f"{dataset.name}: {dataset.note}" if dataset.note else dataset.name,
                "run": run.args,
                "folder": str(run.folder),
                "epoch": run.epoch,
                "minutes": run.minutes,
                "samples": args.samples,
                "examples": examples,
                "pseudo": grey_bernoulli(run.model, dataset),
            }
            results.append(metrics)
            text = json.dumps(finite(metrics), indent=1, ensure_ascii=False)
            data.replace(run.folder / "metrics.json", lambda file: file.write(text.encode()))
            if args.figures:
                options = dataset, oracles, args.figures, where[1], args.seed
                pages[metrics["folder"]] = draw(run, *options)
        except KeyboardInterrupt:
            p.exit(130, f"\n{p.prog}: stopped; metrics.json of the runs before is written\n")
        except (ValueError, OSError, RuntimeError, MemoryError) as error:  # of a Cholesky, say
            print(f"{p.prog}: {error}", file=sys.stderr)
            failed = True
    if results:
        print(table(results, args.paper))
    try:
        if results and args.figures:
            draw_models(results, pages, args.figures)
            curves(results, args.figures, args.against.replace("-", "_"))
            ranked = {Path(r["folder"]).name: r for r in results if "ranks" in r}
            if ranked:
                top_k_figure(ranked, args.figures / "spectra-top-k.png")
    except (ValueError, OSError) as error:
        print(f"{p.prog}: {error}", file=sys.stderr)
        failed = True
    if failed:
        sys.exit(2)


if __name__ == "__main__":
    main()
