"""Oracles: classifiers of digits that judge generated images.

A classifier with perfect accuracy on real images can misread a blurred or pale one that any person
reads, and the same classifier trained with another seed reads it correctly. An oracle is therefore
an ensemble, trained on real images with the corruptions that generated ones show. The share of
images on which its members disagree is reported beside every metric. Oracles are trained once per
data set and cached in root/oracles.

Shapes: B images, N examples of a split, D features, P inducing points, C = 10 classes, K samples.
"""

import hashlib
import math
import pickle
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import data
from eval import view

RECIPE = 2  # part of the cache's digest: raise it when the training below changes
MEMBERS = 3
STEPS = {"grey": 200, "colour": 200, "image": 2000, "mnist": 1000, "svhn": 1500}  # of a member
PROCESS_STEPS = 500


class Classifier(nn.Module):
    """Images (B, channels, H, W) in [0, 1], H, W >= 24 -> logits (B, 10). Every image is first
    normalised to the same contrast."""

    def __init__(self, channels):
        super().__init__()
        layers, a, width = [], channels, 16
        for b in (width, 2 * width, 4 * width):
            layers += [nn.Conv2d(a, b, 4, 2, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU()]
            a = b
        self.trunk = nn.Sequential(*layers, nn.AdaptiveMaxPool2d(3), nn.Flatten())
        self.head = nn.Sequential(nn.Dropout(0.3), nn.Linear(9 * a, 10))

    def features(self, x):
        x = x - x.mean((1, 2, 3), keepdim=True)
        return self.trunk(x / (x.std((1, 2, 3), keepdim=True) + 0.05))  # (B, D)

    def forward(self, x):
        return self.head(self.features(x))


class Oracle(nn.Module):
    """An ensemble of classifiers, and a Gaussian process on the features of its first member, which
    measures how unlike the training images an image is."""

    def __init__(self, channels):
        super().__init__()
        self.members = nn.ModuleList(Classifier(channels) for _ in range(MEMBERS))
        self.process = GaussianProcess(self.members[0].head[-1].in_features)

    def forward(self, x):
        """-> prediction (B,): the digit with the largest mean probability; disagreement (B,): True
        where any two members predict different digits"""
        p = torch.stack([member(x).softmax(-1) for member in self.members])  # (members, B, 10)
        digit = p.argmax(-1)
        return p.mean(0).argmax(-1), (digit != digit[0]).any(0)

    def information(self, x):
        """GaussianProcess.information of images. -> (B,)"""
        return self.process.information(self.members[0].features(x))


def corrupt(x):
    """Images (B, C, H, W) with the defects of generated ones: changed or lost colours, blur, low
    contrast, noise, a shift of up to 2 pixels."""
    b, channels, height, width = x.shape

    def uniform(low, high):
        return low + (high - low) * torch.rand(b, 1, 1, 1, device=x.device)

    x = x[:, torch.randperm(channels, device=x.device)]
    grey = x.mean(1, keepdim=True)
    x = grey + uniform(0, 1) * (x - grey)
    sigma = uniform(0.1, 2.4)  # pixels
    x = gaussian_blur(height, sigma) @ x @ gaussian_blur(width, sigma).mT
    mean = x.mean((1, 2, 3), keepdim=True)
    x = mean + uniform(0.2, 1) * (x - mean)
    x = x + uniform(0, 0.1) * torch.randn_like(x)
    top, left = torch.randint(5, (2,)).tolist()
    return F.pad(x, (2, 2, 2, 2), mode="replicate")[..., top : top + height, left : left + width]


def gaussian_blur(n, sigma):
    """The matrix that blurs n pixels with standard deviation sigma (B, 1, 1, 1). -> (B, 1, n, n)"""
    pixel = torch.arange(n, device=sigma.device)
    weights = torch.exp(-0.5 * ((pixel[:, None] - pixel) / sigma) ** 2)
    return weights / weights.sum(-1, keepdim=True)


class GaussianProcess(nn.Module):
    """A sparse variational Gaussian process as the last layer of a classifier, [meme] App. H.2.

        f_c ~ GP(0, k),  k(h, h') = s² exp(-|h - h'|² / 2l²),  p(y|f) = softmax(f)_y,  c = 1..10
        q(f_c(Z)) = N(L m_c, L S_c S_c' L'),  LL' = k(Z, Z)
        ELBO = N E_q(f)[ log p(y|f) ] - Σ_c KL( N(m_c, S_c S_c') || N(0, I) )

    h (B, D): features; Z: inducing points. Our choices where the paper is silent: 100 inducing
    points, initialised at training features and learned; one s and one l for all classes,
    initialised at 3 and the median distance; 5 samples of f in training; the oracle's features are
    not fine-tuned.
    """

    def __init__(self, features, classes=10, points=100):
        super().__init__()
        self.inducing = nn.Parameter(torch.zeros(points, features))  # Z
        self.mean = nn.Parameter(torch.zeros(classes, points))  # m
        self.root = nn.Parameter(torch.eye(points).repeat(classes, 1, 1))  # S, its lower triangle
        self.log_scale = nn.Parameter(torch.tensor(math.log(3.0)))  # log s
        self.log_length = nn.Parameter(torch.tensor(0.0))  # log l

    def kernel(self, a, b):
        centre = self.inducing.mean(0)  # less cancellation in the next line
        a, b = a - centre, b - centre
        squared = ((a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T).clamp_min(0)
        return torch.exp(2 * self.log_scale - 0.5 * squared * torch.exp(-2 * self.log_length))

    def forward(self, h):
        """Mean and standard deviation of f_c(h), each (B, C)."""
        z, s2 = self.inducing, torch.exp(2 * self.log_scale)
        jitter = 1e-4 * s2 * torch.eye(len(z), device=h.device)
        chol = torch.linalg.cholesky(self.kernel(z, z) + jitter)  # L
        a = torch.linalg.solve_triangular(chol, self.kernel(z, h), upper=False)  # (P, B)
        variance = s2 - (a**2).sum(0) + ((self.root.tril().mT @ a) ** 2).sum(1)  # (C, B)
        return (self.mean @ a).T, variance.clamp_min(1e-6).sqrt().T

    def elbo(self, h, y, n, samples=5):
        """The ELBO in nats, estimated from a batch h (B, D), y (B,) of n training images."""
        mean, std = self(h)
        f = mean + std * torch.randn(samples, *mean.shape, device=h.device)  # (K, B, C)
        log_p = f.log_softmax(-1).mean(0).gather(1, y[:, None]).mean()
        root = self.root.tril()
        log_det = root.diagonal(dim1=1, dim2=2).abs().log().sum()
        kl = 0.5 * ((self.mean**2).sum() + (root**2).sum() - self.mean.numel()) - log_det
        return n * log_p - kl

    def fit(self, h, y, steps=PROCESS_STEPS, batch_size=500, step_done=lambda: None):
        """h (N, D), y (N,): features and labels of the training images; step_done() is called after
        each step."""
        chosen = h[torch.randperm(len(h))[: len(self.inducing)]]
        self.inducing.data[: len(chosen)] = chosen
        self.log_length.data = torch.pdist(chosen).median().clamp_min(1).log()
        optimizer = torch.optim.Adam(self.parameters(), 0.01)
        for _ in range(steps):
            index = torch.randint(len(h), (batch_size,), device=h.device)
            loss = -self.elbo(h[index], y[index], len(h)) / len(h)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step_done()

    def information(self, h, samples=100):
        """I(y, f|h) = H[E p(y|f)] - E H[p(y|f)] in nats: high where f is uncertain. -> (B,)"""
        mean, std = self(h)
        p = (mean + std * torch.randn(samples, *mean.shape, device=h.device)).softmax(-1)
        entropy = torch.special.entr(p).sum(-1).mean(0)
        return torch.special.entr(p.mean(0)).sum(-1) - entropy


def train_oracle(split, parts, steps, seed=0, batch_size=128, report=lambda share: None):
    """Trains each member on its own random batches of corrupted images, those of the modalities
    `parts`, then the process. report(share of the steps that are done) -> Oracle, in eval mode"""
    torch.manual_seed(seed)
    device, done = split.labels.device, 0
    process_steps = min(steps, PROCESS_STEPS)
    total = MEMBERS * steps + process_steps

    def step_done():
        nonlocal done
        done += 1
        report(done / total)

    oracle = Oracle(view(split[torch.arange(1)], parts).shape[1]).to(device)
    for member in oracle.members:
        optimizer = torch.optim.AdamW(member.parameters(), fused=True)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, steps)
        for _ in range(steps):
            index = torch.randint(len(split), (batch_size,), device=device)
            x = corrupt(view(split[index], parts))
            loss = F.cross_entropy(member(x), split.labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            step_done()
    oracle.eval()
    index = torch.randperm(len(split))[:10_000]
    with torch.no_grad():
        features = oracle.members[0].features
        h = torch.cat([features(view(split[i], parts)) for i in index.split(500)])
    oracle.process.fit(h, split.labels[index], process_steps, step_done=step_done)
    return oracle


def image_digest(dataset):
    """The SHA-256 of all images and labels, which a cached oracle was trained and tested on."""
    digest = hashlib.sha256()
    for split in (dataset.train, dataset.test):
        for tensor in (*split.bases, *split.rows, split.labels):
            digest.update(tensor.cpu().contiguous().numpy())
    return digest.hexdigest()


def load_oracle(dataset, name, root, seed=0, steps=None, images=None, report=lambda share: None):
    """The oracle of the view `name` of a data set, from the cache in root/oracles; trained where the
    cache has none, or one of other images, labels or settings. images: image_digest(dataset);
    report: see train_oracle. -> Oracle, its test accuracy. ValueError where the cache is damaged"""
    parts, device = dataset.views[name], dataset.test.labels.device
    steps = steps or STEPS.get(name, 1000)
    images = images or image_digest(dataset)
    digest = f"{images}, recipe {RECIPE}, {steps} steps, seed {seed}"
    path = Path(root, "oracles", f"{dataset.name}-{name}.pt")
    saved = read_cache(path, device)
    if saved and saved["digest"] == digest:
        oracle = Oracle(view(dataset.test[torch.arange(1)], parts).shape[1])
        oracle.load_state_dict(saved["oracle"])
        return oracle.to(device).eval(), saved["accuracy"]
    oracle = train_oracle(dataset.train, parts, steps, seed, report=report)
    correct = oracle_predictions(oracle, parts, dataset.test) == dataset.test.labels
    accuracy = correct.double().mean().item()
    saved = {"digest": digest, "accuracy": accuracy, "oracle": oracle.state_dict()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        data.atomic_write(path, lambda file: torch.save(saved, file))
    except (OSError, RuntimeError) as error:  # torch's, where the disk is full
        print(f"{path} cannot be written, so it is trained each time: {error}", file=sys.stderr)
    return oracle, accuracy


def read_cache(path, device):
    """The contents of an oracle's file, None where there is none."""
    if not path.exists():
        return None
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError):
        raise ValueError(f"{path} is damaged: delete it, and it is trained again") from None


@torch.no_grad()
def oracle_predictions(oracle, parts, split):
    """The digits that the oracle predicts for the real images of a split. -> (N,)"""
    indices = torch.arange(len(split)).split(500)
    return torch.cat([oracle(view(split[index], parts))[0] for index in indices])
