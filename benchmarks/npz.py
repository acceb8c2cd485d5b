"""A user's own arrays: metrics of regenerated modalities, and --fill.

Every data set without oracles and metrics of its own is evaluated like this; `fill` works for any
run. All that is judged, drawn or filled in is, for a modality x_m given the modalities shown,

    E[x_m|shown] = E_p(z|shown) E[x_m|z],    the mean over 50 samples of z

These are samples of q(z|shown), corrected where that is possible (`corrected_samples`). NaN is a
missing entry of a table: it is not scored, and it is filled in. Intervals of filled numbers and
counts are split conformal.

Shapes: N examples, B of a batch, K samples, L latent dimensions, M modalities.
"""

import math
import sys
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

import data
import nets

DRAWS, BATCH = 50, 100
FEWEST = 20  # test rows from which an interval is taken; samples that weights are worth
TRAINING_MEAN = "training mean"  # the source that ignores the modalities shown
LATENT = ("latent_mean", "latent_std")


def passes(model, n, take, draws=DRAWS, seed=0):
    """The posterior of n examples with one mask, batch by batch; take(index) -> M tensors or None.
    -> index (B,), q(z|shown), samples of z (K, B, L)"""
    torch.manual_seed(seed)
    for index in torch.arange(n).split(BATCH):
        xs = take(index)
        q = model.posterior(*xs)
        yield index, q, corrected_samples(model, xs, q, draws)


@torch.no_grad()
def posterior_samples(model, xs, draws=1):
    """z ~ q(z|xs), xs being M tensors or None: of MEME, where several are shown, the resampled
    posterior of App. A. -> (draws, B, L)"""
    if hasattr(model, "resample"):
        return model.resample(*xs, samples=draws)
    return model.posterior(*xs).sample((draws,))


CANDIDATES = 200  # samples of q(z|shown), from which z is drawn


def log_weights(model, xs, p, q, z):
    """log p(xs|z) p(z) / q(z), the importance weights of z (K, B, L) ~ q, without the likelihoods'
    weights in training. -> (K, B)"""
    log_p = sum(
        nets.log_prob(modality, decode(z), x)
        for modality, decode, x in zip(model.modalities, model.decoders, xs)
        if x is not None
    )
    return log_p + p.log_prob(z) - q.log_prob(z)


@torch.no_grad()
def corrected_samples(model, xs, q, draws):
    """z ~ p(z|xs), the posterior of the trained decoders, which q(z|xs) only approximates: CANDIDATES
    samples of q, or as many as `draws`, resampled with weights p(xs|z) p(z) / q(z|xs) (sampling
    importance resampling, Rubin 1988; for VAEs: Mattei & Frellsen 2019).

    An example whose weights are worth fewer than FEWEST samples, 1 / Σ w², keeps those of q: with
    many features one sample has all the weight. Images, slow to decode, keep q, too, and MEME its
    resampled posterior. -> (draws, B, L)
    """
    if hasattr(model, "resample"):
        return model.resample(*xs, samples=draws)
    if any(x is not None and x.ndim == 4 for x in xs):
        return q.sample((draws,))
    z = q.sample((max(CANDIDATES, draws),))  # (K, B, L)
    w = log_weights(model, xs, model.prior(*xs), q, z).softmax(0)  # (K, B)
    w[:, ~(1 / (w**2).sum(0) >= FEWEST)] = 1  # also where they are no numbers
    k = torch.multinomial(w.T, draws, replacement=True).T  # (draws, B)
    return z.gather(0, k[..., None].expand(-1, -1, z.shape[-1]))


def spread(n, most):
    """At most `most` of the rows 0 to n - 1, at equal distances: a test set may be sorted."""
    return torch.linspace(0, n - 1, min(n, most)).long()


PAIRS = 128  # training pairs of the aggregate posterior


def aggregate_samples(model, train, n):
    """n samples of the aggregate posterior of training pairs, (1/PAIRS) Σ_i q(z|x_i): where the
    prior does not match it, samples of the two differ. -> (n, L)"""
    index = spread(len(train), PAIRS)
    xs = data.select(train, [True] * len(train.bases), index)
    z = posterior_samples(model, xs, math.ceil(n / len(index))).flatten(0, 1)
    return z[torch.randperm(len(z))[:n].to(z.device)]


def batch(xs, index):
    return [None if x is None else x[index] for x in xs]


def sources(names):
    """The masks from which modalities are regenerated: each alone, then all. -> {name: mask}"""
    masks = {a: tuple(a == b for b in names) for a in names}
    every = "all" if "all" not in names else "all modalities"
    return masks | {every: (True,) * len(names)}


def few(labels, n, most=10):
    """The rows of at most ten of n examples, with labels balanced over the classes."""
    if labels is None:
        return torch.arange(min(n, most))
    labels, count, turns = labels.tolist(), defaultdict(int), []
    for row, label in enumerate(labels):
        turns.append((count[label], label, row))
        count[label] += 1
    first = sorted(turns)[:most]
    return torch.tensor([row for _, _, row in sorted(first, key=lambda turn: turn[1:])])


# ----------------------------------------------------------------------------------------- metrics


class Score:
    """The errors of one modality from one source, and its log-likelihood, summed over batches."""

    def __init__(self):
        self.examples, self.nats, self.centre = 0, 0.0, None
        self.n, self.sum, self.squares, self.errors = 0.0, 0.0, 0.0, 0.0  # of each feature

    def add(self, modality, base, x, mean, log_p=None):
        """x, mean (B, ...), log_p (B,); NaN in x is not scored"""
        x, mean = x.cpu().double(), mean.cpu().double()
        observed = ~x.isnan()
        if modality.likelihood == "categorical":
            errors, x = (mean.argmax(-1) != x).double(), torch.zeros_like(x)
        elif is_guessed(modality, base):
            errors = ((mean > 0.5) != (x > 0.5)).double()
        else:
            errors = (mean - x) ** 2
        if self.centre is None:  # squares are summed about it: the mean may be large
            self.centre = x.nanmean(0).nan_to_num(0.0)
        x, errors = (x - self.centre).nan_to_num(0.0), errors.nan_to_num(0.0)
        self.n = self.n + observed.double().sum(0)
        self.sum, self.squares = self.sum + x.sum(0), self.squares + (x**2).sum(0)
        self.errors = self.errors + errors.sum(0)
        self.examples += len(x)
        if log_p is not None:
            self.nats += log_p.cpu().double().sum().item()

    def accuracy_or_r2(self, modality, base, stats=None):
        """Bits and classes: accuracy. Numbers and counts: R² of each feature, 1 - Σ (x - mean)² / Σ
        (x - average x)², averaged over those that vary by more than the rounding of their values;
        an image has one, over all its pixels. stats: those that the numbers were standardised
        with."""
        if is_guessed(modality, base):
            return 1 - (self.errors.sum() / self.n.sum()).item()
        n = self.n.clamp_min(1)
        spread = self.squares - self.sum**2 / n
        if base.ndim == 4:
            return 1 - (self.errors.sum() / spread.sum()).item()
        size = self.centre.abs()
        if stats:  # a feature that was constant in training has deviation 1
            mean, std = (torch.tensor(stats[key], dtype=torch.float64) for key in ("mean", "std"))
            size = size + torch.where(std == 1, mean.abs(), 0.0)
        varies = (spread / n).clamp_min(0).sqrt() > torch.finfo(torch.float32).eps * size
        return 1 - (self.errors[varies] / spread[varies]).mean().item()


def is_guessed(modality, base):
    """True for bits and classes, scored by accuracy; False for numbers and images, scored by R²."""
    return modality.likelihood == "categorical" or base.dtype == torch.bool


def rows_that_show(mask, index, n):
    """The rows of n examples whose mask (N, M) shows every modality of `index`."""
    rows = torch.arange(n)
    return rows if mask is None else rows[mask[:, list(index)].all(1)]


def average(modality, split, m, rows, classes):
    """Mean and variance of modality m over examples, without NaN; of a class the frequencies.
    -> float64"""
    n, total, squares = 0, 0, 0
    for part in rows.split(1000):
        x = split.take(m, part)
        x = F.one_hot(x, classes) if modality.likelihood == "categorical" else x
        x = x.cpu().double()
        n = n + (~x.isnan()).double().sum(0)
        total, squares = total + x.nansum(0), squares + (x**2).nansum(0)
    mean = total / n.clamp_min(1)
    return mean, squares / n.clamp_min(1) - mean**2


def marginal_parameter(modality, mean, variance):
    """The decoder's parameter with this mean and, where the likelihood learns it, variance."""
    if modality.likelihood == "bernoulli":
        return torch.logit(mean, eps=1e-6)
    if modality.likelihood in ("categorical", "poisson"):
        return mean.clamp_min(1e-6).log()
    if modality.likelihood == "negative-binomial":
        log_r = nets.dispersion(mean, variance).log()
        return torch.stack([mean.clamp_min(1e-6).log(), log_r], -1)
    if not nets.extra_axis(modality):
        return mean
    if modality.likelihood == "laplace":
        variance = variance / 2  # of a Laplace distribution it is twice the squared scale
    return torch.stack([mean, 0.5 * variance.clamp_min(1e-4).log()], -1)


@torch.no_grad()
def evaluate(model, dataset, seed=0, streams=None):
    """Every modality of the test examples from itself, from each other one and, of three or more,
    from all the others together, scored over the examples that show them.

    "training mean" is the mean of the training examples that show the modality, ridge_* is ridge
    regression from the same inputs (`ridge`), both of what `streams`, those of the training, show;
    None: all that the data set does. log_p is the mean of log p(x_m|z) over samples of z
    and examples, in nats, of standardised features.
    -> {"regenerated_r2": {"a->b": number}, "regenerated_accuracy": ..., "regenerated_log_p": ...,
    "ridge_r2": ..., "ridge_accuracy": ...}
    """
    split, names = dataset.test, dataset.names
    every = range(len(names))
    sections = ("regenerated_r2", "regenerated_accuracy", "regenerated_log_p")
    metrics = {section: {} for section in (*sections, "ridge_r2", "ridge_accuracy")}
    decoded = model.decode(model.prior().sample((1,)))
    if streams is None:
        streams = data.pairing(len(dataset.train), names, mask=dataset.mask)
    seen, together = shown_in(streams, len(dataset.train))

    def keep(key, m, score, prefix="regenerated"):
        modality, base = model.modalities[m], split.bases[m]
        what = "accuracy" if is_guessed(modality, base) else "r2"
        metrics[f"{prefix}_{what}"][key] = score.accuracy_or_r2(
            modality, base, dataset.spec.get("arrays", {}).get(names[m], {}).get("stats")
        )
        if prefix == "regenerated":
            metrics["regenerated_log_p"][key] = score.nats / score.examples

    # every modality from z of each single one; of three or more, one from z of all the others
    scores = {}  # {(inputs, m): Score}
    for k in every:
        scores |= regenerate(model, dataset, (k,), list(every), seed)
    for m in every if len(names) > 2 else ():
        scores |= regenerate(model, dataset, tuple(k for k in every if k != m), [m], seed)

    for m, (name, modality, base) in enumerate(zip(names, model.modalities, split.bases)):
        sources = {name: (m,)} | {a: (k,) for k, a in enumerate(names) if k != m}
        if len(names) > 2:
            sources["the others"] = tuple(k for k in every if k != m)
        for source, inputs in sources.items():
            if (inputs, m) not in scores:  # no test example shows both
                continue
            keep(f"{source}->{name}", m, scores[inputs, m])
            guess = None
            if source != name:
                rows = rows_that_show(dataset.test_mask, {*inputs, m}, len(split))
                guess = ridge(dataset, model.modalities, list(inputs), m, together, rows)
            if guess is not None:
                score = Score()
                score.add(modality, base, split.take(m, rows), guess)
                keep(f"{source}->{name}", m, score, "ridge")
        rows = rows_that_show(seen, {m}, len(dataset.train))
        mean, variance = average(modality, dataset.train, m, rows, decoded[m].shape[-1])
        parameter, score = marginal_parameter(modality, mean, variance).float(), Score()
        for index in rows_that_show(dataset.test_mask, {m}, len(split)).split(BATCH):
            x = split.take(m, index)
            marginal = parameter.to(x.device).expand(len(x), *parameter.shape)
            log_p = nets.log_prob(modality, marginal, x)
            score.add(modality, base, x, mean.expand(len(x), *mean.shape), log_p)
        keep(f"{TRAINING_MEAN}->{name}", m, score)
    return {section: numbers for section, numbers in metrics.items() if numbers}


def regenerate(model, dataset, inputs, targets, seed):
    """The modalities `targets` from z ~ q(z|inputs), over the test examples that show all `inputs`
    and the target. -> {(inputs, m): Score}, without targets that no such example shows"""
    split, scores = dataset.test, {}
    rows = rows_that_show(dataset.test_mask, inputs, len(split))
    mask = [k in inputs for k in range(len(dataset.names))]

    def take(index):
        return data.select(split, mask, rows[index])

    for index, _, z in passes(model, len(rows), take, seed=seed):
        for m in targets:
            at = torch.arange(len(index))  # those of the batch that show the target
            if dataset.test_mask is not None:
                at = at[dataset.test_mask[rows[index], m]]
            if not len(at):
                continue
            modality, x = model.modalities[m], split.take(m, rows[index[at]])
            parameter = model.decoders[m](z[:, at])  # (K, B, ...)
            log_p = nets.log_prob(modality, parameter, x).mean(0)
            score = scores.setdefault((inputs, m), Score())
            score.add(modality, split.bases[m], x, nets.mean(modality, parameter).mean(0), log_p)
    return scores


def shown_in(streams, n):
    """The modalities that n training examples show in the streams of a training, and those that they
    show together with another. -> two masks (n, M)"""
    seen = torch.zeros(n, len(streams[0][0]), dtype=torch.bool)
    together = seen.clone()
    for mask, index in streams:
        mask = torch.tensor(mask)
        seen[index] |= mask
        if mask.sum() > 1:
            together[index] |= mask
    return seen, together


PENALTIES = np.logspace(-2, 5, 15)
LARGEST = 4000  # features of an input or a target that ridge regression takes
WORK = 4e9  # rows times squared input features: seconds of an SVD


def ridge(dataset, modalities, inputs, m, mask, rows):
    """Ridge regression of modality m on the modalities `inputs` at the test examples `rows`: what
    a table would be filled in with without a VAE. Fitted to the training examples that show m and
    any of `inputs` together, mask (N, M); of large data sets to as many, at random, as take seconds.

    Inputs and targets are standardised, classes one-hot; what is missing of an input is 0, its
    mean. The penalty is the one with the least generalised cross-validation error.
    -> predictions (len(rows), *shape), as nets.mean has them; None for arrays that are too wide
    """
    arrays = [dataset.spec.get("arrays", {}).get(name, {}) for name in dataset.names]
    widths = [arrays[k].get("classes") or math.prod(modalities[k].shape) for k in (*inputs, m)]
    fitted = (mask[:, m] & mask[:, inputs].any(1)).nonzero()[:, 0]
    if max(widths) > LARGEST or len(fitted) < 2:
        return None
    fewer = int(min(1e5, max(1000, WORK / sum(widths[:-1]) ** 2)))
    if len(fitted) > fewer:
        fitted = torch.from_numpy(np.random.default_rng(0).permutation(fitted.numpy())[:fewer])

    def features(split, k, index, shown=None):
        """Modality k of the examples `index`, NaN where it is missing. -> (n, D)"""
        x = split.take(k, index.to(split.rows[k].device)).cpu()
        if modalities[k].likelihood == "categorical":
            x = F.one_hot(x, arrays[k]["classes"]).float()
        x = x.flatten(1).numpy()
        if shown is not None:
            x = np.where(shown[index, k, None].numpy(), x, np.float32("nan"))
        return x

    def stats_of(k, x):
        return None if arrays[k].get("stats") else data.feature_stats(x)

    xs, news = [], []
    for k in inputs:
        x = features(dataset.train, k, fitted, mask)
        new, stats = features(dataset.test, k, rows), stats_of(k, x)
        xs.append(data.standardise(x.astype(float), stats))
        news.append(data.standardise(new.astype(float), stats))
    x, new = np.nan_to_num(np.hstack(xs)), np.nan_to_num(np.hstack(news))
    y = features(dataset.train, m, fitted)
    stats = stats_of(m, y)
    y = data.standardise(y.astype(float), stats)
    centre_x, centre_y = x.mean(0), np.nan_to_num(np.nanmean(y, 0))
    x, new, y = x - centre_x, new - centre_x, np.nan_to_num(y - centre_y)
    u, sizes, vt = np.linalg.svd(x, full_matrices=False)
    uy, best = u.T @ y, (np.inf, None)
    for penalty in PENALTIES:
        shrunk = sizes**2 / (sizes**2 + penalty)
        error = ((y - u @ (shrunk[:, None] * uy)) ** 2).mean() / (1 - shrunk.sum() / len(x)) ** 2
        if error < best[0]:
            best = error, vt.T @ ((sizes / (sizes**2 + penalty))[:, None] * uy)
    guess = data.unstandardise(new @ best[1] + centre_y, stats)
    shape = guess.shape[1:] if modalities[m].likelihood == "categorical" else modalities[m].shape
    return torch.from_numpy(guess).reshape(len(rows), *shape)


def notes(results):
    """The lines below a table of these results."""
    if not any("regenerated_log_p" in r for r in results):
        return []
    lines = [f"Regenerated is the mean over {DRAWS} samples of z, as --fill writes it."]
    arrays = [item for r in results for item in r["run"]["spec"].get("arrays", {}).items()]
    standardised = dict.fromkeys(name for name, array in arrays if array.get("stats"))
    if standardised:
        names = ", ".join(standardised)
        lines.append(f"Log-likelihoods of {names} are of standardised features.")
    return lines


# ------------------------------------------------------------------------------------------ --fill


class Given(NamedTuple):
    """An array of new examples."""

    x: torch.Tensor  # (N, *shape of the modality), as the model takes it
    shape: tuple  # of an example in the file: a grey image may lack its channel
    dtype: np.dtype  # of the filled array


@torch.no_grad()
def fill(model, spec, path, out, draws=None, seed=0, dataset=None, level=0.9):
    """Fill in new examples: every modality of each given what its row shows.

    spec: that of the run's args.json. path: an .npz of arrays named like the modalities,
    (N, *shape), each of which may be absent; `mask` (N, M), in the order of the modalities, hides
    rows where it is 0; NaN in a table of numbers is a missing entry. out: an .npz with latent_mean,
    latent_std (N, L) of q(z|shown) and each modality's mean, (N, *shape), in the units and shapes of
    the input. Bytes stay bytes; absent images become floats in [0, 1]; bits become the probability
    of 1, classes the most likely one, beside NAME_probabilities. With `dataset`, the run's, numbers
    and counts also have NAME_low and NAME_high, around the mean, the `level` intervals of
    `half_widths`. With `draws` all arrays are (draws, N, *shape) instead: x ~ p(x|z), one for each of
    that many samples of z, except images, which are the mean at each z.
    -> the mask of what is shown, (N, M). ValueError, and nothing written, for an unsuitable input
    """
    if Path(out).exists():
        raise ValueError(f"{out} exists: choose another --out")
    model.eval()
    arrays = spec.get("arrays", {})
    given, mask = read_new(model, arrays, path)
    device = next(model.parameters()).device
    lead = () if draws is None else (draws,)
    filled = {key: np.zeros((len(mask), model.latent_dim), "f4") for key in LATENT}

    def store(name, where, values):
        if name not in filled:
            shape = *lead, len(mask), *values.shape[len(lead) + 1 :]
            filled[name] = np.zeros(shape, values.dtype)
        filled[name][where] = values

    for pattern, rows in data.patterns(torch.from_numpy(mask)):
        shown = [old.x[rows].to(device) if s else None for old, s in zip(given, pattern)]
        widths, gap_widths = {}, {}
        if dataset is not None and draws is None:
            widths = half_widths(model, dataset, pattern, level, seed)
            gaps = [x is not None and bool(x.isnan().any()) for x in shown]
            if any(gaps):
                gap_widths = half_widths(model, dataset, pattern, level, seed, gaps)
        for index, q, z in passes(model, len(rows), partial(batch, shown), draws or DRAWS, seed):
            at = rows[index].numpy()
            for key, value in zip(LATENT, (q.mean, q.stddev)):
                filled[key][at] = value.cpu().numpy()
            for first, part in zip(range(0, len(z), DRAWS), z.split(DRAWS)):
                where = at if draws is None else (slice(first, first + len(part)), at)
                for m, (modality, old) in enumerate(zip(model.modalities, given)):
                    parameter = model.decoders[m](part)
                    x = nets.mean(modality, parameter)
                    if draws is None:
                        x = x.mean(0)
                    elif len(modality.shape) != 3:
                        x = nets.sample(modality, parameter)
                    x = x.cpu().double().numpy()
                    stats = arrays.get(modality.name, {}).get("stats")
                    for name, values in in_units(modality, old, stats, x, draws).items():
                        store(name, where, values)
                    if modality.name in widths:
                        x, width = data.unstandardise(x, stats), widths[modality.name]
                        if modality.name in gap_widths:
                            missing = shown[m][index].isnan().cpu().numpy()
                            width = np.where(missing, gap_widths[modality.name], width)
                        low, high = x - width, x + width
                        if modality.likelihood in data.KINDS["counts"].likelihoods:
                            low = np.maximum(low, 0)
                        store(f"{modality.name}_low", where, low)
                        store(f"{modality.name}_high", where, high)
    data.save_npz(Path(out), **filled)
    return mask


GAPS = 10  # passes in which the entries of a table are hidden


def half_widths(model, dataset, pattern, level, seed, gaps=None):
    """Half the width of the `level` interval of each feature of numbers and counts, in the data's
    units, for rows that show `pattern`, M booleans.

    Split conformal prediction (Lei et al., JASA 2018): the ⌈(n + 1)·level⌉-th smallest absolute
    residual of n test examples that the run was not trained on, filled in under the same pattern.
    An interval covers a new value with probability `level` or more, on average over test and new
    examples, where these are exchangeable. With too few test rows that show the pattern the
    residuals are those of all test rows, each under what it shows of the pattern, else under all
    that it shows; what the pattern hides stays hidden.
    gaps: M booleans, tables of the pattern whose single entries are missing; their widths only. The
    residuals of an entry are those of test rows in which it and a tenth of its table are missing.
    -> {name: (features,)}
    """
    names, split = dataset.names, dataset.test
    kinds = [dataset.spec.get("arrays", {}).get(name, {}).get("kind") for name in names]
    targets = [m for m, kind in enumerate(kinds) if kind in ("numbers", "counts")]
    if gaps is not None:
        targets = [m for m in targets if gaps[m]]
    wanted = [m for m, shown in enumerate(pattern) if shown]
    rows = rows_that_show(dataset.test_mask, wanted, len(split))
    enough = len(rows) >= max(FEWEST, level / (1 - level))
    if not enough and gaps is None:
        text = f"only {len(rows)} test rows show {', '.join(names[m] for m in wanted)}"
        print(f"{text}: their intervals are those of all test rows", file=sys.stderr)
    if enough and gaps is None:  # all in one pass
        errors = residuals(model, dataset, pattern, rows, targets, seed)
        return {names[m]: conformal(errors[m], level) for m in targets}
    widths = {}
    for m in targets:
        groups = [(pattern, rows)] if enough else partly(dataset, pattern, m)
        parts = [
            residuals(model, dataset, shown, index, [m], seed, hidden=gaps is not None)[m]
            for shown, index in groups
        ]
        widths[names[m]] = conformal(np.concatenate(parts), level)
    return widths


def partly(dataset, pattern, m):
    """Test rows that show modality m, with what they show of the pattern, or of everything if that
    is nothing; without m unless it is in the pattern. -> [(mask, rows), ...]"""
    n = len(dataset.test)
    known = torch.ones(n, len(pattern), dtype=torch.bool)
    known = known if dataset.test_mask is None else dataset.test_mask.clone()
    rows = known[:, m].nonzero()[:, 0]
    if not pattern[m]:
        known[:, m] = False
    visible = known & torch.tensor(pattern)
    visible = torch.where(visible.any(1, keepdim=True), visible, known)[rows]
    some = visible.any(1)
    rows, visible = rows[some], visible[some]
    return [(shown, rows[index]) for shown, index in data.patterns(visible)]


def residuals(model, dataset, mask, rows, targets, seed, hidden=False):
    """Absolute errors of the modalities `targets` at the test examples `rows`, filled in given `mask`,
    in the data's units, NaN where an entry is missing. hidden: in each of ten passes a tenth of
    the features of targets[0] is hidden; the errors are those of the hidden ones.
    -> {m: (len(rows), features)}"""
    split, errors = dataset.test, {}
    for m in targets:
        errors[m] = np.full((len(rows), *model.modalities[m].shape), np.nan)
    turns = min(GAPS, *model.modalities[targets[0]].shape) if hidden else 1
    for turn in range(turns):
        features = slice(turn, None, turns)

        def take(index):
            xs = data.select(split, mask, rows[index])
            if hidden:
                xs[targets[0]][:, features] = math.nan
            return xs

        for index, _, z in passes(model, len(rows), take, seed=seed):
            for m in targets:
                x = split.take(m, rows[index]).cpu().double().numpy()
                if dataset.test_mask is not None:
                    x[~dataset.test_mask[rows[index], m].numpy()] = np.nan
                mean = nets.mean(model.modalities[m], model.decoders[m](z)).mean(0)
                error = np.abs(x - mean.cpu().double().numpy())
                errors[m][index.numpy(), features] = error[:, features]
    for m in targets:
        stats = dataset.spec["arrays"][dataset.names[m]].get("stats")
        errors[m] *= np.array(stats["std"]) if stats else 1
    return errors


def conformal(errors, level):
    """The ceil((n + 1) level)-th smallest of the n errors of each feature, (N, ...), without NaN;
    infinite where n is too small for that. -> (...)"""
    n = (~np.isnan(errors)).sum(0)
    ordered = np.sort(errors, 0)  # NaN last
    k = np.ceil((n + 1) * level).astype(int)
    value = np.take_along_axis(ordered, np.clip(k - 1, 0, len(errors) - 1)[None], 0)[0]
    return np.where(k <= n, value, np.inf)


def read_new(model, arrays, path):
    """-> for each modality Given or None; the mask of what is shown, (N, M)"""
    new, names = data.read_npz(path), [m.name for m in model.modalities]
    unknown = [key for key in new if key not in (*names, "mask")]
    present = [name for name in names if name in new]
    if unknown or not present:
        raise ValueError(
            f"{path} must hold arrays named {', '.join(names)}, and may hold mask, not "
            f"{', '.join(unknown) or 'none'}"
        )
    data.check_rows(path, new)
    mask = data.shown_rows(path, "mask", names, {n: new[n] for n in present}, new.get("mask"))
    decoded = model.decode(model.prior().sample((1,)))
    given = []
    for m, (modality, name) in enumerate(zip(model.modalities, names)):
        old = None
        if name in new:
            classes = decoded[m].shape[-1] if modality.likelihood == "categorical" else None
            array = arrays.get(name, {})
            old = take_array(f"{path}: {name}", modality, new[name], mask[:, m], array, classes)
        given.append(old)
    return given, mask


def take_array(where, modality, x, shown, array, classes):
    """An array of new examples as the model takes it. shown (N,): rows that are hidden may hold
    anything; array: its entry in the run's spec["arrays"], {} for a data set's own; classes: their
    number, or that of words. -> Given"""
    shape, dtype = x.shape[1:], x.dtype
    if len(modality.shape) == 3 and modality.shape[0] == 1 and x.ndim == 3:
        x = x[:, None]  # grey images
    if x.shape[1:] != tuple(modality.shape):
        expected = ", ".join(map(str, ("examples", *modality.shape)))
        raise ValueError(f"{where} must have the shape ({expected}), not {(len(x), *shape)}")
    kind = array.get("kind") or data.kind_of(x, modality.likelihood, shown)
    if kind in ("bytes", "greys"):
        kind = "bytes" if dtype == np.uint8 else "greys"
    if shown.any():
        if not data.KINDS[kind].valid(x[shown]):
            raise ValueError(f"{where} must hold {data.KINDS[kind].values}, which mask can hide")
        if classes and x[shown].max() >= classes:
            raise ValueError(
                f"{where} must be below {classes}, as in training, not {x[shown].max()}"
            )
    x = np.where(shown.reshape(-1, *[1] * (x.ndim - 1)), x, x.dtype.type(0))
    if classes:
        return Given(torch.from_numpy(x.astype("i8")), shape, np.dtype("i8"))
    if kind == "bytes":
        return Given(torch.from_numpy(x.astype("f4") / 255), shape, dtype)
    x = data.standardise(x.astype("f8"), array.get("stats")).astype("f4")
    floats = np.result_type(dtype, "f4") if dtype.kind == "f" else np.dtype("f4")
    return Given(torch.from_numpy(x), shape, floats)


def in_units(modality, given, stats, x, draws=None):
    """A modality's mean, or draws of it, as it is written. given: its array in the input, or None;
    x ([K,] B, *shape), float64; probabilities of a class in place of draws. -> {name: array}"""
    if modality.likelihood == "categorical":
        if draws is not None:
            return {modality.name: x.astype("i8")}
        filled = {modality.name: x.argmax(-1)}
        if not modality.shape:  # a class, not the words of a caption
            filled[f"{modality.name}_probabilities"] = x.astype("f4")
        return filled
    x = data.unstandardise(x, stats)
    if given is None:
        return {modality.name: x if stats else x.astype("f4")}
    if given.dtype == np.uint8:
        x = np.rint(255 * x)
    lead = x.shape[: x.ndim - len(modality.shape)]
    return {modality.name: x.reshape(*lead, *given.shape).astype(given.dtype)}
