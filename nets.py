"""Encoders, decoders and likelihoods: plain layers, the same for all five models. Readers of the
models may skip this file.

A model is built from a list of `Modality`, one per modality, which `modalities(name)` returns. The
layers are those of the papers' tables (MEME, Table 8; "In Defense of Product-of-Experts", Tables
A.2-A.9), with their misprints corrected. A 4x4 convolution on a 4x4 map, or from a 1x1 map, is
written as the equivalent linear layer.

Shapes: B examples, K samples, L latent dimensions, V words.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

LIKELIHOODS = ("bernoulli", "laplace", "normal", "poisson", "negative-binomial", "categorical")
PAD = 1  # the index of <pad> in every vocabulary: padding is not scored
WORDS = 32  # the length of a caption
MIN_LOGVAR = 2 * math.log(1e-3)  # posterior scales stay above 1e-3, or a KL of 1/scale^2 explodes


class Modality(NamedTuple):
    """One modality, as a model sees it, and what its values are.

    encoder(latent_dim) builds a module from x to (mu, logvar), each (B, L); decoder(latent_dim) one
    from z, with any leading axes, to the likelihood's parameter: logits (bernoulli, categorical),
    the location (laplace, normal) or the log rate (poisson). `weight` multiplies the log-likelihood
    in a model's objective; `scale` is the scale of laplace and normal. With scale None it is
    learned: the parameter has one more axis, of length 2, for location and log scale. That of
    negative-binomial has it, too, for log rate and log dispersion.

    kind: class, words, bits, bytes, greys, counts or numbers; see KINDS in loaders/arrays.py. A
    class, one of `classes` per example, has the shape () and the likelihood categorical: x is int64
    (B,), its parameter (..., B, classes); of words `classes` is the size of the vocabulary. Counts
    are whole numbers from 0 on, as floats. stats: {"mean", "std"}, nested lists of x's shape, with
    which numbers were standardised; None: they were not. unseen: features of a table that no
    training example shows, always NaN.
    """

    name: str
    shape: tuple[int, ...]
    encoder: Callable
    decoder: Callable
    likelihood: str
    weight: float = 1.0
    scale: float | None = 1.0
    kind: str = "numbers"
    classes: int | None = None
    stats: dict | None = None
    unseen: tuple[int, ...] = ()


def observed(modalities, xs):
    """The indices of the modalities that xs, M tensors or None, shows. ValueError where xs does not
    fit: a wrong number of entries, none shown, no examples, a wrong shape or dtype and, on a CPU,
    values that a likelihood does not take."""
    if len(xs) != len(modalities):
        raise ValueError(f"the model has {len(modalities)} modalities, not {len(xs)}")
    indices = [m for m, x in enumerate(xs) if x is not None]
    if not indices:
        raise ValueError("no modality is observed: at least one must be a tensor, not None")
    for m in indices:
        check_values(modalities[m], xs[m])
    return indices


def check_values(modality, x):
    """ValueError unless x is (B, *shape) with B > 0, of the likelihood's dtype and, on a CPU, in its
    range: elsewhere reading the values would make the CPU wait for the device."""
    name, likelihood = modality.name, modality.likelihood
    if x.shape[1:] != torch.Size(modality.shape) or not len(x):
        expected = ("B > 0", *modality.shape)
        raise ValueError(f"{name} must have the shape {expected}, not {tuple(x.shape)}")
    integers = likelihood == "categorical"
    if x.is_floating_point() == integers or x.dtype == torch.bool:
        kind = "integers" if integers else "floats"
        raise ValueError(f"{name} must hold {kind} ({likelihood}), not {x.dtype}")
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return
    last = math.inf if modality.classes is None else modality.classes - 1
    ranges = {
        "bernoulli": (1.0, "values in [0, 1]"),
        "poisson": (math.inf, "counts from 0 on"),
        "negative-binomial": (math.inf, "counts from 0 on"),
        "categorical": (last, f"integers from 0 to {last}"),
    }
    if likelihood in ranges:
        highest, values = ranges[likelihood]
        low, high = torch.aminmax(x)
        if low < 0 or high > highest:
            raise ValueError(f"{name} must hold {values} ({likelihood}), not {low:g} to {high:g}")


def log_prob(modality, parameter, x):
    """log p(x|z), summed over the features, constants kept, unweighted, in nats.

    parameter (..., B, *shape), for categorical (..., B, *shape, V), for a learned scale or
    dispersion (..., B, *shape, 2); x (B, *shape) -> (..., B), float32 or wider. Padding in a caption is not
    scored, nor is NaN, a missing entry, under a learned scale. Bernoulli also takes greys in
    [0, 1], which makes it a pseudo-likelihood. ValueError where a shape does not fit: nothing is
    broadcast.
    """
    check_shapes(modality, parameter, x)
    parameter = at_least_float32(parameter)
    features = tuple(range(-len(modality.shape), 0))
    if modality.likelihood == "categorical":
        x = x.expand(parameter.shape[:-1])
        nats = -F.cross_entropy(
            parameter.flatten(0, -2),
            x.flatten(),
            ignore_index=PAD if modality.shape else -100,  # -100: every class is scored
            reduction="none",
        ).view(x.shape)
        return nats.sum(features) if features else nats
    if modality.likelihood == "bernoulli":
        x = x.expand_as(parameter)
        cross_entropy = F.binary_cross_entropy_with_logits(parameter, x, reduction="none")
        return -cross_entropy.sum(features)
    if modality.likelihood == "poisson":
        return (x * parameter - torch.exp(parameter) - torch.lgamma(x + 1)).sum(features)
    if modality.likelihood == "negative-binomial":
        log_rate, log_r = parameter.unbind(-1)
        r = torch.exp(log_r)
        log_total = torch.logaddexp(log_rate, log_r)
        choose = torch.lgamma(x + r) - torch.lgamma(r) - torch.lgamma(x + 1)
        return (choose + r * (log_r - log_total) + x * (log_rate - log_total)).sum(features)
    if modality.likelihood not in ("laplace", "normal"):
        raise ValueError(
            f"the likelihood must be one of {', '.join(LIKELIHOODS)}, not {modality.likelihood!r}"
        )
    laplace = modality.likelihood == "laplace"
    if modality.scale is not None:
        error = (x - parameter) / modality.scale
        constant = math.log(modality.scale * (2 if laplace else math.sqrt(2 * math.pi)))
        return ((-error.abs() if laplace else -0.5 * error**2) - constant).sum(features)
    location, log_scale = parameter.unbind(-1)
    missing = x.isnan()
    error = torch.where(missing, 0.0, x - location) * torch.exp(-log_scale)
    constant = log_scale + (math.log(2) if laplace else 0.5 * math.log(2 * math.pi))
    nats = (-error.abs() if laplace else -0.5 * error**2) - constant
    return torch.where(missing, 0.0, nats).sum(features)


def extra_axis(modality):
    """True where the parameter has one more axis than x."""
    learned = modality.likelihood in ("laplace", "normal") and modality.scale is None
    return learned or modality.likelihood in ("categorical", "negative-binomial")


def check_shapes(modality, parameter, x):
    """ValueError unless x is (B, *shape) and the decoder's parameter (..., B, *shape), or one axis
    more: (B,) against (B, 1) would be broadcast to (B, B)."""
    own = parameter.shape[:-1] if extra_axis(modality) else parameter.shape
    if x.shape[1:] != torch.Size(modality.shape) or own[len(own) - x.ndim :] != x.shape:
        raise ValueError(
            f"{modality.name} must have the shape {('B', *modality.shape)}, not {tuple(x.shape)}; "
            f"the decoder's parameter is {tuple(parameter.shape)}"
        )


def mean(modality, parameter):
    """E[x|z] from the decoder's parameter: probabilities for bernoulli and categorical, the rate for
    poisson and negative-binomial, else the location."""
    if modality.likelihood == "bernoulli":
        return torch.sigmoid(parameter)
    if modality.likelihood == "categorical":
        return parameter.softmax(-1)
    if extra_axis(modality):
        parameter = parameter[..., 0]
    counts = modality.likelihood in ("poisson", "negative-binomial")
    return torch.exp(parameter) if counts else parameter


def dispersion(mean, variance):
    """r of the negative binomial with these moments: its variance is mean + mean² / r."""
    return (mean**2 / (variance - mean).clamp_min(1e-6)).clamp(1e-2, 1e4)


def sample(modality, parameter):
    """One draw from p(x|z), of x's shape: classes and words as integers."""
    if modality.likelihood == "categorical":
        return torch.distributions.Categorical(logits=parameter).sample()
    if modality.likelihood == "bernoulli":
        return torch.bernoulli(torch.sigmoid(parameter))
    if modality.likelihood == "poisson":
        return torch.poisson(torch.exp(parameter))
    if modality.likelihood == "negative-binomial":  # a Poisson whose rate is gamma distributed
        log_rate, log_r = parameter.unbind(-1)
        rate = torch.distributions.Gamma(torch.exp(log_r), torch.exp(log_r - log_rate)).sample()
        return torch.poisson(rate)
    if modality.scale is None:
        location, log_scale = parameter.unbind(-1)
    else:
        location, log_scale = parameter, torch.tensor(math.log(modality.scale))
    family = {"normal": torch.distributions.Normal, "laplace": torch.distributions.Laplace}
    return family[modality.likelihood](location, torch.exp(log_scale)).sample()


# ---------------------------------------------------------------------------------- building blocks


def at_least_float32(x):
    """bfloat16 and float16, which autocast returns, as float32."""
    return x if x.dtype == torch.float64 else x.float()


def gaussian(h):
    """(B, 2L) -> mu, logvar, each (B, L), the scale smoothly floored at 1e-3."""
    mu, logvar = at_least_float32(h).chunk(2, -1)
    return mu, MIN_LOGVAR + F.softplus(logvar - MIN_LOGVAR)


def apply(net, x, running=False):
    """net(x), x being a tensor or a list of tensors. BatchNorm takes its running statistics with
    running=True, and for a batch of one, which has no variance: a copy of them, since a later batch
    changes them before the backward pass."""
    norms = [
        m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training
    ]
    examples = len(x) if isinstance(x, torch.Tensor) else len(x[0])
    if not norms or not (running or examples == 1):
        return net(x)
    for norm in norms:
        norm.eval()
    copies = {name: buffer.clone() for name, buffer in net.named_buffers()}
    h = torch.func.functional_call(net, copies, (x,))
    for norm in norms:
        norm.train()
    return h


class Encoder(nn.Module):
    """x -> mu, logvar of a Gaussian over z: a trunk with `width` outputs, one linear head for
    both. Models take any other module from x to mu and logvar, too."""

    def __init__(self, trunk, width, latent_dim):
        super().__init__()
        self.trunk, self.width = trunk, width
        self.head = nn.Linear(width, 2 * latent_dim)

    def forward(self, x):
        return gaussian(self.head(self.trunk(x)))


class Moments(nn.Module):
    """x -> [mu, logvar] of an encoder, (B, 2L): the features of one without a trunk."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, x):
        return torch.cat(self.encoder(x), -1)


class Joint(nn.Module):
    """[x_1, ..., x_M] -> mu, logvar of q(z|x_1..M): its own trunks, a layer of 512 for each, one
    head ([poe] App. A)."""

    def __init__(self, modalities, latent_dim):
        super().__init__()
        encoders = [m.encoder(latent_dim) for m in modalities]
        trunks = [e.trunk if isinstance(e, Encoder) else Moments(e) for e in encoders]
        widths = [e.width if isinstance(e, Encoder) else 2 * latent_dim for e in encoders]
        self.trunks = nn.ModuleList(trunks)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 512), nn.ReLU()) for width in widths
        )
        self.head = nn.Linear(512 * len(encoders), 2 * latent_dim)

    def forward(self, xs):
        h = [layer(trunk(x)) for trunk, layer, x in zip(self.trunks, self.layers, xs)]
        return gaussian(self.head(torch.cat(h, -1)))


class Decoder(nn.Module):
    """z (..., L) -> the likelihood's parameter (..., *shape); the leading axes are flattened into
    one batch."""

    def __init__(self, net, shape):
        super().__init__()
        self.net, self.shape = net, shape

    def forward(self, z):
        h = apply(self.net, z.reshape(-1, z.shape[-1]))
        return at_least_float32(h).view(*z.shape[:-1], *self.shape)


class Map(nn.Module):
    """(B, height * width * channels) -> (B, channels, height, width), channels last in memory, with
    which transposed convolutions take a fifth less time on the CPU."""

    def __init__(self, channels, height, width):
        super().__init__()
        self.size = height, width, channels

    def forward(self, x):
        return x.view(-1, *self.size).permute(0, 3, 1, 2)


class Crop(nn.Module):
    """The upper left corner of a feature map, for images whose sides are not multiples of 8."""

    def __init__(self, height, width):
        super().__init__()
        self.height, self.width = height, width

    def forward(self, x):
        return x[..., : self.height, : self.width]


class WordEmbedding(nn.Module):
    """Words (B, 32) or, for pseudo-samples, their logits (B, 32, V) -> (B, 1, 32, 128)."""

    def __init__(self, weight):
        super().__init__()
        self.weight = weight  # (V, 128)

    def forward(self, x):
        if x.is_floating_point():
            return (x.softmax(-1) @ self.weight).unsqueeze(1)
        return F.embedding(x, self.weight).unsqueeze(1)


class WordLogits(nn.Module):
    """(B, 1, 32, 128) -> logits (B, 32, V), through the transpose of the encoder's embedding."""

    def __init__(self, weight):
        super().__init__()
        self.weight = weight  # (V, 128)
        self.bias = nn.Parameter(torch.zeros(len(weight)))

    def forward(self, h):
        return F.linear(h.squeeze(1), self.weight, self.bias)


class LogCounts(nn.Module):
    """log(1 + x) with about mean 0 and deviation 1, given the mean and deviation of the counts; for
    x < 0, which pseudo-samples may become, -log(1 - x)."""

    def __init__(self, mean, std):
        super().__init__()
        self.register_buffer("centre", torch.log1p(mean), persistent=False)
        self.register_buffer("factor", (1 + mean) / std.clamp_min(1e-6), persistent=False)

    def forward(self, x):
        below = x < 0  # abs and clamp have no gradient at 0, the most frequent count
        logs = torch.where(below, 0, x).log1p() - torch.where(below, -x, 0).log1p()
        return ((logs - self.centre) * self.factor).flatten(1)


class NaNToZero(nn.Module):
    """Numbers as they are, missing ones (NaN) as 0, the mean."""

    def forward(self, x):
        return x.nan_to_num(0.0).flatten(1)


class LearnedScale(nn.Module):
    """(B, *shape) -> (B, *shape, 2): the second is a learned number for each feature, the log of a
    scale or of a dispersion, which stays above `floor`."""

    def __init__(self, start, floor):
        super().__init__()
        self.value = nn.Parameter(start.clone())
        self.register_buffer("floor", torch.as_tensor(floor), persistent=False)

    def forward(self, h):
        value = self.floor + F.softplus(self.value - self.floor)
        return torch.stack([h, value.expand_as(h)], -1)


class OneHot(nn.Module):
    """A class (B,) or, for pseudo-samples, logits (B, C) -> (B, C)."""

    def __init__(self, classes):
        super().__init__()
        self.register_buffer("classes", torch.arange(float(classes)), persistent=False)

    def forward(self, x):
        if x.is_floating_point():
            return x.softmax(-1)
        return (x[:, None] == self.classes).to(self.classes.dtype)


# ----------------------------------------------------------------------------- the papers' networks


def mlp_encoder(sizes, latent_dim, activation=nn.ReLU, norm=False, first=nn.Flatten):
    """sizes: the input's width, then one per layer; first: the module that x passes first."""
    layers = [first()]
    for a, b in zip(sizes, sizes[1:]):
        layers += [nn.Linear(a, b), *([nn.BatchNorm1d(b)] if norm else []), activation()]
    return Encoder(nn.Sequential(*layers), sizes[-1], latent_dim)


def mlp_decoder(sizes, shape, latent_dim, activation=nn.ReLU, norm=False, squash=False):
    """sizes: one per layer, the output's width last; squash: a sigmoid, for a location in (0, 1)."""
    layers, a = [], latent_dim
    for b in sizes[:-1]:
        layers += [nn.Linear(a, b), *([nn.BatchNorm1d(b)] if norm else []), activation()]
        a = b
    layers += [nn.Linear(a, sizes[-1]), *([nn.Sigmoid()] if squash else [])]
    return Decoder(nn.Sequential(*layers), shape)


def marginal_decoder(sizes, shape, start, latent_dim, learned=None):
    """An mlp_decoder whose output starts at `start`, its last biases. learned: a function that
    builds the module after the output, a LearnedScale."""
    decoder = mlp_decoder(sizes, shape, latent_dim)
    decoder.net[-1].bias.data.copy_(start.flatten())
    if learned is not None:
        decoder.net.append(learned())
    return decoder


def image_encoder(shape, channels, latent_dim):
    """4x4 convolutions of stride 2. SVHN, [poe] Table A.4: 3x32x32, 32x16x16, 64x8x8, 128x4x4,
    2L."""
    layers, (a, height, width) = [], shape
    for b in channels:
        layers += [nn.Conv2d(a, b, 4, 2, 1), nn.ReLU()]
        a, height, width = b, height // 2, width // 2
    layers += [nn.Flatten()]
    return Encoder(nn.Sequential(*layers), a * height * width, latent_dim)


def image_decoder(shape, channels, latent_dim, squash=False):
    """The mirror of image_encoder. SVHN: L, 128x4x4, 64x8x8, 32x16x16, 3x32x32."""
    scale = 2 ** len(channels)
    height, width = math.ceil(shape[1] / scale), math.ceil(shape[2] / scale)
    a, *rest = reversed(channels)
    layers = [
        nn.Linear(latent_dim, a * height * width),
        nn.ReLU(),
        Map(a, height, width),
    ]
    for b in rest:
        layers += [nn.ConvTranspose2d(a, b, 4, 2, 1), nn.ReLU()]
        a = b
    layers += [nn.ConvTranspose2d(a, shape[0], 4, 2, 1), Crop(*shape[1:])]
    return Decoder(nn.Sequential(*layers, *([nn.Sigmoid()] if squash else [])), shape)


def band_encoder(latent_dim):
    """[poe] Tables A.2, A.7, in the sizes of its code: 1x14x28, 64x7x14, 128x3x7, 256x1x3 = 768,
    512, 2L (1x9x28: 64x4x14, 128x2x7, the same)."""
    layers, a = [], 1
    for b in (64, 128, 256):
        layers += [nn.Conv2d(a, b, 4, 2, 1, bias=False), nn.ReLU()]
        a = b
    return Encoder(
        nn.Sequential(*layers, nn.Flatten(), nn.Linear(768, 512), nn.ReLU()), 512, latent_dim
    )


def band_decoder(shape, latent_dim, squash=False):
    """[poe] Tables A.2, A.7, in the sizes of its code: L, 512, 112x1x1, 56x3x5, 28x7x13, 1x14x28
    (1x9x28: 56x2x5, 28x4x13, 1x9x28)."""
    kernels = {14: ((3, 5), (3, 5), (2, 4)), 9: ((2, 5), (2, 5), (3, 4))}[shape[1]]
    layers = [
        nn.Linear(latent_dim, 512),
        nn.ReLU(),
        nn.Linear(512, 112),
        nn.ReLU(),
        Map(112, 1, 1),
    ]
    layers += [nn.ConvTranspose2d(112, 56, kernels[0], 2), nn.ReLU()]
    layers += [nn.ConvTranspose2d(56, 28, kernels[1], 2), nn.ReLU()]
    layers += [nn.ConvTranspose2d(28, 1, kernels[2], 2)]
    return Decoder(nn.Sequential(*layers, *([nn.Sigmoid()] if squash else [])), shape)


CAPTION_LAYERS = [  # channels in, channels out, kernel, stride, padding: [poe] Table A.5
    (1, 32, 4, 2, 1),  # 1x32x128 -> 32x16x64
    (32, 64, 4, 2, 1),  # 64x8x32
    (64, 128, 4, 2, 1),  # 128x4x16
    (128, 256, (1, 4), (1, 2), (0, 1)),  # 256x4x8
    (256, 512, (1, 4), (1, 2), (0, 1)),  # 512x4x4
]


def caption_encoder(embedding, latent_dim):
    layers = [WordEmbedding(embedding)]
    for a, b, *geometry in CAPTION_LAYERS:
        layers += [nn.Conv2d(a, b, *geometry, bias=False), nn.BatchNorm2d(b), nn.ReLU()]
    return Encoder(nn.Sequential(*layers, nn.Flatten()), 512 * 4 * 4, latent_dim)


def caption_decoder(embedding, latent_dim):
    """The mirror of caption_encoder, from 512x4x4 to 1x32x128, then to 32xV by the transpose of the
    encoder's embedding."""
    layers = [nn.Linear(latent_dim, 512 * 4 * 4), nn.ReLU(), Map(512, 4, 4)]
    for a, b, *geometry in reversed(CAPTION_LAYERS[1:]):
        layers += [nn.ConvTranspose2d(b, a, *geometry, bias=False), nn.BatchNorm2d(a), nn.ReLU()]
    layers += [nn.ConvTranspose2d(32, 1, 4, 2, 1), nn.ReLU(), WordLogits(embedding)]
    return Decoder(nn.Sequential(*layers), (WORDS, len(embedding)))


# --------------------------------------------------------------------------- data set -> modalities

BANDS = {"mnist-split": ("top", "bottom"), "mnist-split3": ("top", "middle", "bottom")}


def modalities(name, likelihoods=None, weights=None, width=1.0, **facts):
    """The modalities of a data set, from which a model is built.

    name: glyphs, mnist-split, mnist-split3, mnist-svhn, cub, spectra, or npz for a user's own
    arrays. likelihoods, weights: one per modality, in place of the defaults. width: factor on the
    layer sizes of spectra. facts: of cub `vocabulary`, the number of words, and `features`, those
    of a photo, where they are not 2,048; of spectra `frequencies`, those of each bit in training,
    at which the output starts; of npz `arrays`, {modality: arguments of array_modality}.
    Call it once per model: the caption networks of one list share an embedding. ValueError for an
    unknown name, likelihood or weight.
    """
    if name == "glyphs":
        chosen = [flat("grey", (1, 28, 28)), flat("colour", (3, 32, 32))]
    elif name == "mnist-svhn":
        chosen = [flat("mnist", (1, 28, 28)), conv("svhn", (3, 32, 32), (32, 64, 128))]
    elif name in BANDS:
        chosen = [band(part, (1, 28 // len(BANDS[name]), 28)) for part in BANDS[name]]
    elif name == "cub":
        chosen = [bird_features(facts.get("features", 2048)), captions(facts["vocabulary"])]
    elif name == "spectra":
        chosen = [spectra(width), fingerprints(facts.get("frequencies"))]
    elif name == "npz":
        chosen = [array_modality(key, **array) for key, array in facts["arrays"].items()]
    else:
        raise ValueError(f"there are no networks for a data set called {name!r}")
    for flag, values in (("likelihoods", likelihoods), ("weights", weights)):
        if values and len(values) != len(chosen):
            names = ", ".join(m.name for m in chosen)
            raise ValueError(f"--{flag} needs one for each of {names}, not {len(values)}")
    if likelihoods:
        chosen = [with_likelihood(m, likelihood) for m, likelihood in zip(chosen, likelihoods)]
    if weights:
        if not all(0 <= weight < math.inf for weight in weights):
            raise ValueError(f"likelihood weights must be finite and not negative, not {weights}")
        chosen = [m._replace(weight=weight) for m, weight in zip(chosen, weights)]
    return chosen


def flat(name, shape):
    """[poe] Table A.3: 784, 400, 2L and L, 400, 784."""
    size = math.prod(shape)
    return Modality(
        name,
        shape,
        partial(mlp_encoder, (size, 400)),
        partial(mlp_decoder, (400, size), shape),
        "bernoulli",
        kind="bytes",
    )


def conv(name, shape, channels):
    encoder = partial(image_encoder, shape, channels)
    decoder = partial(image_decoder, shape, channels)
    return Modality(name, shape, encoder, decoder, "bernoulli", kind="bytes")


def band(name, shape):
    decoder = partial(band_decoder, shape)
    return Modality(name, shape, band_encoder, decoder, "bernoulli", kind="bytes")


def bird_features(size):
    """[poe] Table A.6, with 2048 features. Laplace with scale .01 and weight .002, as in [poe]'s code
    and MMVAE's."""
    encoder = partial(mlp_encoder, (size, 1024, 512, 256), activation=nn.ELU)
    decoder = partial(mlp_decoder, (256, 512, 1024, size), (size,), activation=nn.ELU)
    return Modality("image", (size,), encoder, decoder, "laplace", weight=0.002, scale=0.01)


def captions(words):
    embedding = nn.Parameter(torch.randn(words, 128))
    encoder, decoder = partial(caption_encoder, embedding), partial(caption_decoder, embedding)
    return Modality(
        "caption", (WORDS,), encoder, decoder, "categorical", kind="words", classes=words
    )


def spectra(width):
    """[poe] Table A.8, the hidden layers scaled by `width`."""
    down = (11000, *(max(1, round(width * n)) for n in (10000, 5000, 2048)))
    up = (*(max(1, round(width * n)) for n in (3000, 5000, 10000)), 11000)
    encoder = partial(mlp_encoder, down, norm=True)
    decoder = partial(mlp_decoder, up, (11000,), norm=True)
    return Modality("spectrum", (11000,), encoder, decoder, "bernoulli", kind="greys")


def fingerprints(frequencies=None):
    """[poe] Table A.9. Most bits are rare: the output starts at their frequencies, if given."""
    sizes, shape = (500, 1024, 2149), (2149,)
    encoder = partial(mlp_encoder, (2149, 1024, 1000))
    decoder = partial(mlp_decoder, sizes, shape)
    if frequencies is not None:
        decoder = partial(marginal_decoder, sizes, shape, log_odds(torch.tensor(frequencies)))
    return Modality("fingerprint", shape, encoder, decoder, "bernoulli", kind="bits")


def log_odds(frequencies):
    """The biases with which an output of bits starts at these frequencies, clamped off 0 and 1."""
    return torch.logit(frequencies.clamp(1e-3, 1 - 1e-3))


def array_modality(
    name, kind, shape, likelihood, classes=None, stats=None, marginal=None, unseen=()
):
    """A user's own array. Images (C, H, W) get SVHN's networks, all others two hidden layers as wide
    as the array, from 64 to 512. The output starts at the marginal of the training examples, and
    numbers and counts learn a scale or dispersion per feature, which starts there, too.

    kind, likelihood: a key of KINDS in loaders/arrays.py and one of its likelihoods; classes,
    stats, unseen: see Modality; marginal: {"mean", "std"} of all tables but standardised ones, of a
    class {"mean": frequencies}.
    """
    shape = tuple(shape)
    if len(shape) == 3:
        image = conv(name, shape, (32, 64, 128))._replace(kind=kind)
        return with_likelihood(image, likelihood)
    size = classes or math.prod(shape)
    hidden = min(max(size, 64), 512)
    marginal = marginal or {"mean": torch.zeros(shape).tolist(), "std": torch.ones(shape).tolist()}
    mean, std = torch.tensor(marginal["mean"]), torch.tensor(marginal.get("std", 1.0))
    first, learned, scale, parameter = nn.Flatten, None, 1.0, shape
    if kind == "class":
        first, start = partial(OneHot, classes), mean.clamp_min(1e-3).log()
        parameter = (classes,)
    elif kind == "counts":
        first, start = partial(LogCounts, mean, std), mean.clamp_min(1e-3).log()
        if likelihood == "negative-binomial":
            log_r = dispersion(mean, std**2).log()
            learned, parameter = partial(LearnedScale, log_r, torch.tensor(-10.0)), (*shape, 2)
    elif kind == "numbers":
        first, start, scale = NaNToZero, mean, None
        floor = std.log() + math.log(1e-2)
        learned, parameter = partial(LearnedScale, std.log(), floor), (*shape, 2)
    else:
        start = log_odds(mean)
    sizes = (hidden, hidden, size)
    return Modality(
        name,
        shape,
        encoder=partial(mlp_encoder, (size, hidden, hidden), first=first),
        decoder=partial(marginal_decoder, sizes, parameter, start, learned=learned),
        likelihood=likelihood,
        scale=scale,
        kind=kind,
        classes=classes,
        stats=stats,
        unseen=tuple(unseen),
    )


def with_likelihood(modality, likelihood):
    """The modality with another likelihood. ValueError where its networks do not fit that."""
    if likelihood not in LIKELIHOODS:
        choices = ", ".join(LIKELIHOODS)
        raise ValueError(f"the likelihood must be one of {choices}, not {likelihood!r}")
    fits = (likelihood == "categorical") == (modality.likelihood == "categorical")
    if not fits or likelihood in ("poisson", "negative-binomial"):
        raise ValueError(f"{modality.name} cannot have the likelihood {likelihood}")
    decoder = modality.decoder
    if modality.likelihood == "bernoulli" and likelihood != "bernoulli":
        decoder = partial(decoder, squash=True)  # a location in (0, 1), as in the papers' tables
    return modality._replace(likelihood=likelihood, decoder=decoder)
