"""Metrics of trained models.

    python eval.py runs/a runs/b --figures pictures            evaluate on the test examples
    python eval.py runs/a --fill new.npz --out filled.npz      fill in what new examples lack

The first part is pure numpy, independent of the rest of the file:

    fit = cca(x, y); correlation(fit, x, y)           canonical correlation, [meme] App. G
    linear_probe(train_z, train_y, test_z, test_y)    accuracy of a linear classifier of samples
    w2(mean1, scale1, mean2, scale2)                  2-Wasserstein distance, [meme] App. F

The second part samples z from a model. The third holds the metrics that several data sets share;
those of one data set, the oracles that classify images, and the command are in evaluation/.

Shapes: N examples, B of a batch, K samples, L latent dimensions, M modalities, C classes. A mask is
M booleans, True for the modalities that are observed.
[meme] is Joy et al., ICLR 2022; [poe] is "In Defense of Product-of-Experts".
"""

import itertools
import math
from typing import NamedTuple

import numpy as np


class CCA(NamedTuple):
    mean_x: np.ndarray  # (Dx,)
    mean_y: np.ndarray  # (Dy,)
    wx: np.ndarray  # (Dx, k)
    wy: np.ndarray  # (Dy, k)
    correlations: np.ndarray  # (k,) S below, decreasing; without a ridge those of the projections


def cca(x, y, k=40, ridge=1e-3, whiten=True):
    """Canonical correlation analysis, [meme] App. G: the k pairs of directions along which x
    (n, Dx) and y (n, Dy) correlate most; min(Dx, Dy) pairs if that is less. -> CCA

        Cxx^-½ Cxy Cyy^-½ = U S V',   wx = Cxx^-½ U,   wy = Cyy^-½ V,   correlations S

    ridge, times the mean variance of the columns, is added to the diagonals of Cxx and Cyy. So the
    units of single columns matter (not those of a whole table): a column whose variance is far
    below the mean hardly counts. whiten=True: every projection has variance 1, up to the ridge.
    False: every joint vector [wx; wy] has length 1, as in the published code, which takes the
    eigenvectors of the equivalent eigenproblem; the components then have different weights in
    eq. (12)."""
    x = finite("x", x, ("n", "Dx"))
    y = finite("y", y, (len(x), "Dy"))
    if (x == x[0]).all() or (y == y[0]).all():
        raise ValueError("x and y must have at least two different rows each")
    k, ridge = finite("k", k, ()), finite("ridge", ridge, ())
    if k < 1 or k % 1 or ridge < 0:
        raise ValueError(f"k must be 1, 2, ... and ridge 0 or more, not {k} and {ridge}")
    mean_x, mean_y = x.mean(0), y.mean(0)
    x, y = x - mean_x, y - mean_y
    root_x, root_y = inverse_root(x, ridge), inverse_root(y, ridge)
    u, s, vt = np.linalg.svd(root_x @ (x.T @ y / (len(x) - 1)) @ root_y, full_matrices=False)
    k = min(int(k), len(s))
    wx, wy = root_x @ u[:, :k], root_y @ vt[:k].T
    if not whiten:
        length = np.sqrt((wx**2).sum(0) + (wy**2).sum(0))
        length[length < 1e-9 * length.max()] = 1  # no direction: without a ridge, beyond the rank
        wx, wy = wx / length, wy / length
    return CCA(mean_x, mean_y, wx, wy, s[:k])


def inverse_root(x, ridge):
    """(cov + ridge · mean variance · I)^-½ of centred x (n, D), zero along directions without
    variance. -> (D, D)"""
    cov = x.T @ x / (len(x) - 1)
    values, vectors = np.linalg.eigh(cov + ridge * np.trace(cov) / len(cov) * np.eye(len(cov)))
    positive = values > 1e-12 * values.max()
    return (vectors[:, positive] / np.sqrt(values[positive])) @ vectors[:, positive].T


def correlation(fit, x, y):
    """Cosine of the projections of each pair of rows of x (n, Dx) and y (n, Dy), centred by the
    means of the fit, [meme] eq. (12). -> (n,)"""
    x = projection("x", x, fit.mean_x, fit.wx)
    y = projection("y", y, fit.mean_y, fit.wy, rows=len(x))
    return (x * y).sum(1)


def chance_correlation(fit, x, y):
    """The mean of eq. (12) over every x (n, Dx) with every y (m, Dy): the value, not always 0, of
    a generator that ignores its input. -> a number"""
    x, y = projection("x", x, fit.mean_x, fit.wx), projection("y", y, fit.mean_y, fit.wy)
    return x.mean(0) @ y.mean(0)


def projection(name, x, mean, w, rows="n"):
    """Unit vectors along the projections of x (n, D), centred by the means of the fit. -> (n, k)"""
    p = (finite(name, x, (rows, len(mean))) - mean) @ w
    return p / np.maximum(np.linalg.norm(p, axis=1, keepdims=True), 1e-12)


def correlations(pairs, generated):
    """[meme] Table 5: the mean correlation of each pair of arrays in `generated`, {name: (x, y)},
    and that by chance, in a CCA (k = 40, whitened) that is fit to the pairs (x, y). -> metrics"""
    fit, means, chance = cca(*pairs, k=40), {}, {}
    for name, (x, y) in generated.items():
        means[name] = float(correlation(fit, x, y).mean())
        chance[name] = float(chance_correlation(fit, x, y))
    return {"correlation": means, "chance_correlation": chance}


def linear_probe(train_z, train_y, test_z, test_y, l2=1e-4):
    """Test accuracy of multinomial logistic regression on z, standardised by the training rows.

    z (n, L); y: n labels, text or whole numbers, also as a column (n, 1). A test label that
    training lacks counts as an error. l2 as in logistic_regression."""
    train_z = finite("train_z", train_z, ("n", "L"))
    test_z = finite("test_z", test_z, ("m", train_z.shape[1]))
    train_y = class_labels("train_y", train_y, len(train_z))
    test_y = class_labels("test_y", test_y, len(test_z))
    if (train_y.dtype.kind == "U") != (test_y.dtype.kind == "U"):
        raise ValueError("train_y and test_y must both be text or both be numbers")
    classes, y = np.unique(train_y, return_inverse=True)
    if len(classes) < 2:
        raise ValueError(f"train_y must have at least two classes, not {len(classes)}")
    if finite("l2", l2, ()) < 0:
        raise ValueError(f"l2 must be 0 or more, not {l2}")
    mean, std = train_z.mean(0), train_z.std(0)
    std[std <= len(train_z) * np.finfo(float).eps * np.abs(mean)] = 1  # constant up to rounding
    w = logistic_regression((train_z - mean) / std, y, len(classes), l2)
    prediction = ((test_z - mean) / std) @ w[:-1] + w[-1]
    return float((classes[prediction.argmax(1)] == test_y).mean())


def logistic_regression(z, y, classes, l2=1e-4, tolerance=1e-6):
    """Multinomial logistic regression by Newton's method:

        argmin_W  mean_n -log softmax(W'[z_n; 1])_y_n + l2/2 |W|²,    biases not penalised

    z (n, L), y (n,) integers below `classes` -> W (L + 1, C). It stops when no entry of the
    gradient exceeds `tolerance`, after 100 steps, or when rounding ends the descent."""
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
        # E[zz' ⊗ (diag(p) - pp')], in single precision: only the step depends on it, not the result
        pz = (z.astype("f4")[:, :, None] * p.astype("f4")[:, None]).reshape(n, -1)  # (n, d C)
        hessian = -(pz.T @ pz) / n
        for c in range(classes):
            hessian[c::classes, c::classes] += pz[:, c::classes].T @ z.astype("f4") / n
        hessian[np.diag_indices_from(hessian)] += np.repeat(penalty, classes) + 1e-6
        step = np.linalg.solve(hessian.astype(float), gradient.ravel()).reshape(w.shape)
        size = 1.0
        while (new := loss(w - size * step))[0] > value - 1e-4 * size * (step * gradient).sum():
            size /= 2
            if size < 1e-9:  # rounding: no step lowers the loss
                return w
        w, (value, p) = w - size * step, new
    return w


def w2(mean1, scale1, mean2, scale2, covariance=None):
    """2-Wasserstein distance of two Gaussians, [meme] App. F, whose ||m1 + m2|| is a misprint.

        d² = ||m1 - m2||² + Tr(Σ1 + Σ2 - 2 (Σ1^½ Σ2 Σ1^½)^½)
        d² = ||m1 - m2||² + ||std1 - std2||²                          where both are diagonal

    means (..., d); scales: standard deviations (..., d) or covariances (..., d, d); leading axes
    broadcast, a single number stands for d equal ones. covariance: True: both scales are; False:
    neither is; None: a scale with more axes than its mean is. Where that leaves the choice open, as
    with scales (d, d) of d means (d, d), it is a ValueError. -> (...)"""
    arguments = {"mean1": mean1, "scale1": scale1, "mean2": mean2, "scale2": scale2}
    arrays = [finite(name, x) for name, x in arguments.items()]
    lengths = {x.shape[-1] for x in arrays if x.ndim} or {1}
    if len(lengths) > 1:
        raise ValueError(f"the last axes of means and scales must be equal, not {sorted(lengths)}")
    d = lengths.pop()
    mean1, scale1, mean2, scale2 = (x if x.ndim else np.full(d, x) for x in arrays)
    full1 = is_covariance("scale1", scale1, mean1, covariance)
    full2 = is_covariance("scale2", scale2, mean2, covariance)
    squared = ((mean1 - mean2) ** 2).sum(-1)
    if not full1 and not full2:
        return np.sqrt(squared + ((scale1 - scale2) ** 2).sum(-1))
    scale1 = scale1 if full1 else scale1[..., None] ** 2 * np.eye(d)
    scale2 = scale2 if full2 else scale2[..., None] ** 2 * np.eye(d)
    traces = np.trace(scale1, axis1=-2, axis2=-1) + np.trace(scale2, axis1=-2, axis2=-1)
    values, vectors = np.linalg.eigh(scale1)
    root = (vectors * np.sqrt(np.maximum(values, 0))[..., None, :]) @ np.swapaxes(vectors, -1, -2)
    cross = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ scale2 @ root), 0)).sum(-1)
    return np.sqrt(np.maximum(squared + traces - 2 * cross, 0))


def is_covariance(name, scale, mean, covariance):
    """True for covariances (..., d, d), False for standard deviations (..., d), of means (..., d).
    ValueError where that is open, and for values that are neither."""
    square = scale.shape[-2:] == 2 * mean.shape[-1:]
    if covariance is None:
        covariance = scale.ndim > mean.ndim
        if square and not covariance:
            raise ValueError(f"{name} may hold deviations or covariances: set covariance=")
    if not covariance and (scale < 0).any():
        raise ValueError(f"{name} must not hold negative standard deviations")
    if covariance and not square:
        raise ValueError(f"{name} must have the shape (..., d, d), not {scale.shape}")
    if covariance:
        asymmetry, rounding = abs(scale - np.swapaxes(scale, -1, -2)).max(), 1e-5 * abs(scale).max()
        if asymmetry > rounding or np.linalg.eigvalsh(scale).min() < -rounding:
            raise ValueError(f"{name} must hold symmetric matrices without negative eigenvalues")
    return covariance


def finite(name, x, shape=None):
    """x as an array of finite float64. ValueError unless it has this shape, where text stands for
    any length but 0."""
    try:
        array = np.asarray(x, float)
    except (TypeError, ValueError, RuntimeError) as error:  # RuntimeError: a tensor with a gradient
        raise ValueError(f"{name} must be an array of numbers: {error}") from None
    if shape is not None:
        fits = [n > 0 if isinstance(s, str) else n == s for n, s in zip(array.shape, shape)]
        if array.ndim != len(shape) or not all(fits):
            shape = ", ".join(map(str, shape))
            raise ValueError(f"{name} must have the shape ({shape}), not {array.shape}")
    if np.ma.is_masked(x) or not np.isfinite(array).all():
        raise ValueError(f"{name} must not hold NaN, infinite or masked values")
    return array


def class_labels(name, y, rows):
    """Labels, text or whole numbers, one for each row, also as a column (rows, 1). -> (rows,)"""
    text = np.asarray(y)
    if text.shape not in ((rows,), (rows, 1)):
        raise ValueError(f"{name} must have one label for each of {rows} rows, not {text.shape}")
    if all(isinstance(label, str) for label in text.ravel().tolist()):
        return text.reshape(rows).astype(str)
    numbers = finite(name, y).reshape(rows)
    if (numbers % 1).any():
        raise ValueError(f"{name} must hold classes: text or whole numbers")
    return numbers


# ------------------------------------------------------------------------------------- samples of z

try:
    import torch

    import data
    import nets
except ModuleNotFoundError as error:  # without torch all above can be imported
    if error.name != "torch":
        raise

BATCH = 100  # examples whose posteriors are sampled at once
DRAWS = 50  # samples of z over which E[x|observed] is a mean
CANDIDATES = 200  # samples of q(z|observed) from which corrected_samples draws
MIN_EFFECTIVE = 20  # the effective sample size of these from which on it does
PAIRS = 128  # training pairs of the aggregate posterior
BUDGET = 2**22  # numbers of a block of decoded samples, also of wide tables


def posterior_batches(model, n, take, draws=DRAWS, seed=0):
    """The posterior of n examples with one mask, batch by batch; take(index) -> M tensors or None.
    -> index (B,), q(z|observed), samples of z (draws, B, L)"""
    torch.manual_seed(seed)
    for index in torch.arange(n).split(BATCH):
        xs = take(index)
        with torch.no_grad():
            q = model.posterior(*xs)
        yield index, q, corrected_samples(model, xs, q, draws)


def corrected_samples(model, xs, q, n):
    """n samples of p(z|xs), the posterior of the trained decoders, which q(z|xs) approximates:
    CANDIDATES samples of q, or n if that is more, resampled with weights p(xs|z) p(z) / q(z|xs)
    (sampling importance resampling, Rubin 1988; for VAEs: Mattei & Frellsen 2019).

    Where the effective sample size is below MIN_EFFECTIVE (with many features one sample has all
    the weight), and of images, slow to decode, they are samples of q; of a model that resamples
    those of its sample_posterior. -> (n, B, L)"""
    with torch.no_grad():
        if model.resamples:
            return model.sample_posterior(xs, n)
        if any(x is not None and x.ndim == 4 for x in xs):
            return q.sample((n,))
        z = q.sample((max(CANDIDATES, n),))  # (K, B, L)
        w = log_weights(model, xs, model.prior(*xs), q, z).softmax(0)  # (K, B)
        w[:, ~(1 / (w**2).sum(0) >= MIN_EFFECTIVE)] = 1  # also where they are NaN
        k = torch.multinomial(w.T, n, replacement=True).T  # (n, B)
        return z.gather(0, k[..., None].expand(-1, -1, z.shape[-1]))


def log_weights(model, xs, p, q, z):
    """log p(xs|z) p(z) / q(z), the importance weights of z (K, B, L) ~ q, in nats; the likelihoods'
    weights in training do not count. -> (K, B)"""
    observed = [part for part in zip(model.modalities, model.decoders, xs) if part[2] is not None]
    widths = [math.prod(m.shape) * (m.classes or 1) for m, _, _ in observed]
    for density in (p, q):
        if isinstance(density, torch.distributions.MixtureSameFamily):  # all components at every z
            widths.append(density.mixture_distribution.probs.shape[-1] * z.shape[-1])
    log_w = []
    for part in sample_blocks(z, max(widths)):
        log_p = sum(nets.log_prob(m, decode(part), x) for m, decode, x in observed)
        log_w.append(log_p + p.log_prob(part) - q.log_prob(part))
    return torch.cat(log_w)


def sample_blocks(z, width):
    """z (K, B, L) in blocks of samples, such that arrays (block, B, width) keep to the BUDGET."""
    return z.split(max(1, BUDGET // (z.shape[1] * width)))


def aggregate_samples(model, train, n):
    """n samples of the aggregate posterior of training pairs, (1/PAIRS) Σ_i q(z|x_i): where the
    prior does not match it, samples of the two differ. -> (n, L)"""
    index = spread(len(train), PAIRS)
    xs = data.select(train, [True] * len(train.bases), index)
    with torch.no_grad():
        z = model.sample_posterior(xs, math.ceil(n / len(index))).flatten(0, 1)
    return z[torch.randperm(len(z))[:n].to(z.device)]


def spread(n, most):
    """At most `most` of the rows 0 to n - 1, at equal distances: a test set may be sorted."""
    return torch.linspace(0, n - 1, min(n, most)).long()


def rows_with(mask, modalities, n):
    """The rows of n examples that have all these modalities; mask (n, M), or None: all have."""
    rows = torch.arange(n)
    return rows if mask is None else rows[mask[:, list(modalities)].all(1)]


# ------------------------------------------------------------------------------- metrics of a model


def subsets(names):
    """Every non-empty subset of the modalities: top, bottom, both; of three also top+middle, ...,
    all. -> {name: mask}"""
    masks = {}
    for size in range(1, len(names) + 1):
        for chosen in itertools.combinations(names, size):
            label = "+".join(chosen) if size < len(names) else "both" if size == 2 else "all"
            masks[label] = tuple(name in chosen for name in names)
    return masks


def singles(names):
    """Every modality alone. -> {name: mask}"""
    return {name: mask for name, mask in subsets(names).items() if sum(mask) == 1}


def view(means, parts):
    """The modalities `parts`, indices, stacked to one image. means: M images (..., H, W)"""
    return torch.cat([means[m] for m in parts], -2)


def generate(model, split, mask, index):
    """One sample z ~ q(z|the modalities of the mask) per example, decoded. -> M means"""
    with torch.no_grad():
        (z,) = model.sample_posterior(data.select(split, mask, index), 1)
        return model.decode(z)


def predict(means, views, oracles):
    """The oracle of every view (see data.Dataset) on decoded modalities.
    -> predicted digits, disagreement of its members, each (views, B)"""
    with torch.no_grad():
        outputs = [oracles[name](view(means, parts)) for name, parts in views.items()]
    return [torch.stack(columns) for columns in zip(*outputs)]


def judge(model, dataset, oracles, mask):
    """Generate an image of every view from the modalities of the mask, for every test example.
    -> {view: (accuracy, share of the images on which the oracle's members disagree)}"""
    parts = []
    for index in torch.arange(len(dataset.test)).split(500):
        means = generate(model, dataset.test, mask, index)
        digits, disagree = predict(means, dataset.views, oracles)
        parts.append((digits == dataset.test.labels[index], disagree))
    shares = [torch.cat(columns, 1).cpu().double().mean(1).tolist() for columns in zip(*parts)]
    return dict(zip(dataset.views, zip(*shares)))


def split_accuracy(model, dataset, oracles):
    """[poe] Table 1: accuracy of the whole image, regenerated from every subset of its parts; the
    effective_sample_size of models that resample the posterior of several.
    -> metrics; the oracles' disagreement, in the same shape"""
    metrics, disagreement = {"accuracy": {}}, {}
    for name, mask in subsets(dataset.names).items():
        (shares,) = judge(model, dataset, oracles, mask).values()
        metrics["accuracy"][name], disagreement[name] = shares
        if model.resamples and sum(mask) > 1:
            sizes = metrics.setdefault("effective_sample_size", {})
            sizes[name] = effective_sample_size(model, dataset.test, mask)
    return metrics, {"accuracy": disagreement}


def effective_sample_size(model, split, mask, examples=500):
    """The median over examples of 1 / Σ_k w_k², w being the weights with which a model resamples
    its posterior of the mask's modalities: 1 if one of the candidates has all the weight."""
    sizes = []
    for index in spread(len(split), examples).split(BATCH):
        xs = data.select(split, mask, index)
        for source in np.flatnonzero(mask).tolist():
            w = model.candidates(xs, source)[1].softmax(0)  # (K, B)
            sizes.append(1 / (w**2).sum(0))
    return torch.cat(sizes).median().item()


def coherence(model, dataset, oracles):
    """[meme] Table 3: the share of images with the right digit, generated from one modality in the
    others (cross coherence) and in itself (self coherence).
    -> metrics; the oracles' disagreement, in the same shape"""
    metrics = {"cross_coherence": {}, "self_coherence": {}}
    disagreement = {"cross_coherence": {}, "self_coherence": {}}
    for source, mask in singles(dataset.names).items():
        for target, shares in judge(model, dataset, oracles, mask).items():
            section, key = "cross_coherence", f"{source}->{target}"
            if target == source:
                section, key = "self_coherence", source
            metrics[section][key], disagreement[section][key] = shares
    return metrics, disagreement


def joint_coherence(model, dataset, oracles, samples=10_000):
    """[poe] Fig. 8: `agreement` of samples of p(z) and, as aggregate_coherence, of the aggregate
    posterior. Priors differ between models (MEME's is itself a mixture of encodings), and a joint
    coherence of p(z) compares them, too.
    -> metrics; the oracles' disagreement, in the same shape"""
    with torch.no_grad():
        joint = model.prior().sample((samples,))
    sources = {"joint": joint, "aggregate": aggregate_samples(model, dataset.train, samples)}
    metrics, disagreement = {}, {}
    for name, z in sources.items():
        share, entropy, disagree = agreement(model, dataset, oracles, z)
        metrics |= {f"{name}_coherence": share, f"{name}_entropy": entropy}
        disagreement[f"{name}_coherence"] = disagree
    return metrics, disagreement


def agreement(model, dataset, oracles, z):
    """The share of z in whose images all oracles predict the same digit; the entropy of these
    digits in nats: log 10 = 2.30 if all are equally frequent, 0 if it is always the same one, which
    makes coherence meaningless; the share of z on which the members of any oracle disagree."""
    parts = []
    for part in z.split(500):
        with torch.no_grad():
            parts.append(predict(model.decode(part), dataset.views, oracles))
    digits, disagree = (torch.cat(outputs, 1) for outputs in zip(*parts))  # (views, samples)
    agreed = digits[0][(digits == digits[0]).all(0)]
    frequency = agreed.cpu().bincount().double() / max(1, len(agreed))
    entropy = torch.special.entr(frequency).sum().item()
    return len(agreed) / len(z), entropy, disagree.any(0).cpu().double().mean().item()


def mutual_information(model, dataset, oracles, examples=1000):
    """[meme] Table 6: I(label, oracle's weights | generated image), nats; low for realistic images.
    Of every source, which the paper does not name: "svhn" is SVHN from itself, "mnist->svhn" SVHN
    from MNIST. -> metrics"""
    information, index = {}, torch.arange(min(examples, len(dataset.test)))
    for source, mask in singles(dataset.names).items():
        means = generate(model, dataset.test, mask, index)
        for target, parts in dataset.views.items():
            key = target if target == source else f"{source}->{target}"
            with torch.no_grad():
                nats = oracles[target].information(view(means, parts))
            information[key] = nats.cpu().double().mean().item()
    return {"mutual_information": information}


def latent_samples(model, split, mask, index):
    """z ~ q(z|the modalities of the mask), one per example of `index`. -> (n, L), numpy"""
    z = []
    for part in index.split(BATCH):
        with torch.no_grad():
            z.append(model.sample_posterior(data.select(split, mask, part), 1)[0])
    return torch.cat(z).cpu().double().numpy()


def latent_accuracy(model, dataset):
    """[meme] Table 4: accuracy of a linear classifier of z ~ q(z|x_m), fit on every training image
    once. Modalities are left out where training shows fewer than two classes, or test none.
    -> metrics"""
    accuracy = {}
    for m, (name, mask) in enumerate(singles(dataset.names).items()):
        train = rows_with(dataset.mask, [m], len(dataset.train))
        train = train[np.unique(dataset.train.rows[m].cpu()[train], return_index=True)[1]]
        test = rows_with(dataset.test_mask, [m], len(dataset.test))
        train_y, test_y = dataset.train.labels.cpu()[train], dataset.test.labels.cpu()[test]
        if len(train_y.unique()) < 2 or not len(test_y):
            continue
        train_z = latent_samples(model, dataset.train, mask, train)
        test_z = latent_samples(model, dataset.test, mask, test)
        accuracy[name] = linear_probe(train_z, train_y.numpy(), test_z, test_y.numpy())
    return {"latent_accuracy": accuracy} if accuracy else {}


def log_likelihood(model, xs, samples=1000, given=None):
    """Importance-weighted log-likelihood of examples xs, M tensors or None, in nats. -> (B,)

        log p(xs)  ≈ log 1/K Σ_k p(xs|z_k) p(z_k) / q(z_k),    z_k ~ q

    q is the posterior of xs, p(z) the model's prior. With `given`, the other modalities, it is
    log p(xs|given): p(z) is the posterior of `given`, q that of both. The likelihoods' weights in
    training do not count."""
    with torch.no_grad():
        if given is None:
            q, p = model.posterior(*xs), model.prior(*xs)
        else:
            both = [g if x is None else x for x, g in zip(xs, given)]
            q, p = model.posterior(*both), model.posterior(*given)
        log_w = log_weights(model, xs, p, q, q.sample((samples,)))
    return log_w.logsumexp(0) - math.log(samples)


def log_likelihoods(model, dataset, examples=100, samples=1000, priors=None):
    """[meme] Table 2: means over test examples, spread over those that show every modality, of
    log p(x_m), log p(x_1, ..., x_M) and log p(x_m|all others), in nats.

    log_likelihood_rise says how far each may be too low: its rise from K/10 to K samples, K being
    `samples`. priors: the modalities whose prior was trained; None: all. log p(x_m) is left out for
    the others, log p(x_1, ..., x_M) where they are fewer than two.
    -> metrics; {} where no test example shows every modality"""
    names = dataset.names
    priors = names if priors is None else priors
    cases = {name: (mask, None) for name, mask in singles(names).items() if name in priors}
    if len(priors) > 1:
        cases[",".join(names)] = ((True,) * len(names), None)
    for name, mask in singles(names).items():
        others = tuple(not target for target in mask)
        cases[f"{name}|{','.join(n for n in names if n != name)}"] = (mask, others)
    rows = rows_with(dataset.test_mask, range(len(names)), len(dataset.test))
    if not len(rows):
        return {}
    rows = rows[spread(len(rows), examples)]
    tenths = [len(part) for part in torch.arange(samples).tensor_split(min(10, samples))]
    shares = torch.tensor(tenths)[:, None] / samples
    likelihoods, rises = {}, {}
    for case, (mask, others) in cases.items():
        nats, fewer = [], []
        for index in rows.split(BATCH):
            xs = data.select(dataset.test, mask, index)
            given = None if others is None else data.select(dataset.test, others, index)
            parts = [log_likelihood(model, xs, k, given).cpu().double() for k in tenths]
            fewer.append(torch.stack(parts))  # (10, B)
            nats.append((fewer[-1] + shares.log()).logsumexp(0))
        likelihoods[case] = torch.cat(nats).mean().item()
        rises[case] = likelihoods[case] - torch.cat(fewer, 1).mean().item()
    return {"log_likelihood": likelihoods, "log_likelihood_rise": rises}


if __name__ == "__main__":
    from evaluation.command import main

    main()
