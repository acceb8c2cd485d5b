"""--fill: fill in what new examples lack.

What a row shows stays as it is. A missing modality, or a missing entry of a table, becomes its mean
given the modalities x_S that the row shows,

    E[x_m|x_S] = E_p(z|x_S) E[x_m|z],    the mean over 50 samples of z (eval.posterior_batches)

with intervals by split conformal prediction for numbers and counts.

Shapes: N examples, B of a batch, K samples, L latent dimensions, M modalities, D features. A
pattern is M booleans, the modalities that a row shows.
"""

import math
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import data
import nets
from eval import DRAWS, posterior_batches, rows_with, spread
from evaluation.own import decoded, expectation
from loaders.arrays import KINDS, check_rows, row_blocks, row_mask, standardise, unstandardise

INTERVALS = ("numbers", "counts")  # the kinds of arrays that get NAME_low and NAME_high


class Filled(NamedTuple):
    """The values that are filled in of a modality."""

    rows: int  # that lack it or an entry of it
    cells: int  # the entries that they lack, which have a value now
    unseen: int  # and those that stay NaN: of features that no training example shows


@torch.no_grad()
def fill(model, path, out, draws=None, reconstruct=False, seed=0, dataset=None, level=0.9):
    """Complete the examples of an .npz.

    path: an .npz of arrays named like the modalities, (N, *shape), each of which may be absent;
    `mask` (N, M), in the order of the modalities, hides rows where it is 0; NaN in a table of
    numbers is a missing entry.

    out: an .npz with latent_mean and latent_std (N, L) of q(z|x_S), and with every modality,
    (N, *shape), in the units of the input. What a row shows stays, to the bit, in the input's dtype
    (numbers given as integers: in float64). What is missing is the mean, of bits, bytes and counts
    rounded where the dtype is one of integers; where the array is absent, bits are the probability
    of 1 and images floats in [0, 1]. A class is the most probable one, beside NAME_probabilities
    (N, C), 1 for a class that is shown. A feature of modality.unseen is NaN unless it is shown.

    dataset: that of the run; with it numbers and counts also have NAME_low and NAME_high, (N, D),
    the `level` intervals of `half_widths` around the mean. For an entry that is shown, both are its
    value. draws: what is missing is instead x ~ p(x|z), (draws, N, *shape), one for each of that
    many samples of z (of images the mean at each z), without intervals. reconstruct: every entry is
    the mean, or a draw, those that are shown, too; counts and bits are floats.

    -> {modality: Filled}. ValueError, and nothing written, for an unsuitable input
    """
    new, mask, visible = check(model, path, out)
    model.eval()
    device = next(model.parameters()).device
    intervals = dataset is not None and draws is None
    columns = [
        Column(modality, new.pop(modality.name, None), mask[:, m], draws, reconstruct, intervals)
        for m, modality in enumerate(model.modalities)
    ]
    latent = np.zeros((2, len(mask), model.latent_dim), "f4")
    for pattern, rows in data.patterns(torch.from_numpy(visible)):
        widths, gap_widths = {}, {}
        if intervals:
            every = [m for m, c in enumerate(columns) if c.low is not None]
            hidden = [m for m in every if reconstruct or not pattern[m]]
            gaps = [m for m in every if pattern[m] and columns[m].incomplete[rows.numpy()].any()]
            widths = half_widths(model, dataset, pattern, hidden, level, seed)
            gap_widths = half_widths(model, dataset, pattern, gaps, level, seed, gaps=True)

        def take(index):
            at = rows[index].numpy()
            return [c.take(at).to(device) if shows else None for c, shows in zip(columns, pattern)]

        for index, q, z in posterior_batches(model, len(rows), take, draws or DRAWS, seed):
            at = rows[index].numpy()
            latent[0, at], latent[1, at] = q.mean.cpu().numpy(), q.stddev.cpu().numpy()
            for m, column in enumerate(columns):
                column.fill(at, model.decoders[m], z, widths.get(m), gap_widths.get(m))
    filled = {"latent_mean": latent[0], "latent_std": latent[1]}
    for column in columns:
        filled |= column.arrays()
    data.save_npz(Path(out), filled)
    return {column.modality.name: column.filled for column in columns}


# -------------------------------------------------------------------------------------------- input


def check(model, path, out):
    """Read the new examples, and refuse all that --fill would stumble over after its work.
    -> {name: array}, those that are there; two masks (N, M): what a row shows, and what of it the
    model sees, not a table with unseen features alone. ValueError for an unsuitable input or an
    output that cannot be written"""
    out = Path(out)
    if out.exists():
        raise ValueError(f"{out} exists: choose another --out")
    if out.suffix != ".npz":
        raise ValueError(f"--out must end in .npz, not {out}")
    folder = next(folder for folder in out.absolute().parents if folder.exists())
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(f"{out} cannot be written: {folder}: {error.strerror}") from None
    new, names = data.read_npz(path), [m.name for m in model.modalities]
    mask = new.pop("mask", None)
    unknown = [key for key in new if key not in names]
    if unknown or not new:
        raise ValueError(
            f"{path} must hold arrays named {', '.join(names)}, and may hold mask, not "
            f"{', '.join(unknown) or 'none'}"
        )
    check_rows(path, new)
    mask = row_mask(path, "mask", names, new, mask)
    visible = mask.copy()
    for m, modality in enumerate(model.modalities):
        if modality.name in new:
            where, x = f"{path}: {modality.name}", new[modality.name]
            visible[:, m] = check_values(where, modality, x, mask[:, m])
    data.patterns(torch.from_numpy(visible))
    return new, mask, visible


def check_values(where, modality, x, mask):
    """ValueError unless x has the shape of the modality and, in the rows where mask (N,) is true,
    its kind of values. -> mask without rows in which unseen features alone are shown"""
    grey = len(modality.shape) == 3 and modality.shape[0] == 1 and x.shape[1:] == modality.shape[1:]
    if x.shape[1:] != modality.shape and not grey:
        expected = ", ".join(map(str, ("examples", *modality.shape)))
        raise ValueError(f"{where} must have the shape ({expected}), not {x.shape}")
    kind, visible = KINDS[kind_of(modality, x)], mask.copy()
    for rows, block in row_blocks(x, mask):
        if not kind.valid(block):
            raise ValueError(f"{where} must hold {kind.values}; mask can hide rows")
        if modality.classes and block.max() >= modality.classes:
            highest = block.max()
            raise ValueError(
                f"{where} must be below {modality.classes}, as in training, not {highest}"
            )
        tensor = to_tensor(modality, block)
        if tensor.is_floating_point() and tensor.isinf().any():
            raise ValueError(f"{where} must hold {kind.values}")
        if modality.unseen:
            visible[rows] = ~tensor.isnan().all(1).numpy()
    return visible


def kind_of(modality, x):
    """The key of KINDS for new values: images may be bytes or floats, not only as in
    training, and words are counted from 0."""
    if modality.kind in ("bytes", "greys"):
        return "bytes" if x.dtype == np.uint8 else "greys"
    return "counts" if modality.kind == "words" else modality.kind


def to_tensor(modality, x):
    """Rows of an array as a model takes them. -> (n, *shape)"""
    x = x.reshape(len(x), *modality.shape)
    if modality.likelihood == "categorical":
        return torch.from_numpy(x.astype("i8"))
    if kind_of(modality, x) == "bytes":
        return torch.from_numpy(x.astype("f4") / 255)
    x = torch.from_numpy(standardise(x.astype("f8"), modality.stats)).float()
    if modality.unseen:
        x[:, list(modality.unseen)] = math.nan
    return x


# ------------------------------------------------------------------------------------------- output


class Column:
    """A modality of the new examples: what is given, what is filled in, and the intervals."""

    def __init__(self, modality, x, mask, draws, reconstruct, intervals):
        """x: the input, or None; mask (N,): the rows that show it; intervals: they are wanted"""
        n = len(mask)
        self.modality, self.mask, self.reconstruct = modality, mask, reconstruct
        self.shape = modality.shape if x is None else x.shape[1:]  # grey images may lack an axis
        self.x = x if x is None else x.reshape(n, *modality.shape)
        self.incomplete = np.zeros(n, bool)  # rows that show the modality without some entry
        if x is not None and modality.kind == "numbers":
            for rows, block in row_blocks(self.x, mask):
                self.incomplete[rows] = np.isnan(block).any(1)
        if x is None or reconstruct:
            self.values = np.zeros((n, *modality.shape), self.dtype())
        else:  # in place: rows are read before they are filled in
            self.values = self.x.astype(self.dtype(), copy=False)
        if draws is not None:
            self.values = np.repeat(self.values[None], draws, 0)
        self.probabilities = self.low = self.high = None
        if modality.kind == "class" and draws is None:
            self.probabilities = np.zeros((n, modality.classes), "f4")
            if x is not None:
                rows = np.flatnonzero(mask)
                self.probabilities[rows, self.x[rows].astype("i8")] = 1
        if intervals and modality.kind in INTERVALS:
            dtype = self.values.dtype if self.values.dtype.kind == "f" else np.float64
            self.low, self.high = self.values.astype(dtype), self.values.astype(dtype)
        self.filled = Filled(0, 0, 0)

    def dtype(self):
        """That of the filled array."""
        modality, given = self.modality, None if self.x is None else self.x.dtype
        if modality.likelihood == "categorical":
            return np.dtype("i8") if given is None or self.reconstruct else given
        if given is None:
            return np.dtype("f8" if modality.stats else "f4")
        if kind_of(modality, self.x) == "bytes":
            return given
        if given.kind != "f" and modality.kind in ("numbers", "greys"):
            return np.dtype("f8")
        return np.dtype("f4") if given.kind != "f" and self.reconstruct else given

    def take(self, rows):
        """These rows as a model takes them."""
        return to_tensor(self.modality, self.x[rows])

    def missing(self, rows):
        """The entries that are filled in. -> (B, *shape) booleans"""
        missing = np.full((len(rows), *self.modality.shape), self.reconstruct)
        missing[~self.mask[rows]] = True
        if self.incomplete[rows].any():
            missing |= np.isnan(self.x[rows])
        return missing

    def fill(self, rows, decoder, z, width=None, gap_width=None):
        """Write what these rows lack: the mean over the samples of z (K, B, L) with its intervals,
        or K draws. gap_width (D,): half the width of the interval of an entry that a row lacks of
        a modality that it shows; width (D,): of all others"""
        missing = self.missing(rows)
        if not missing.any():
            return
        self.count(missing)
        if self.values.ndim > missing.ndim:
            self.write_draws(rows, missing, decoder, z)
            return
        mean = expectation(self.modality, decoder, z).cpu().double().numpy()
        if self.probabilities is not None:
            self.probabilities[rows[missing]] = mean[missing]
        x = self.in_units(mean.argmax(-1) if self.modality.classes else mean)
        put(self.values, rows, missing, x)
        if self.low is not None:
            if width is None:
                width = gap_width
            elif gap_width is not None:
                width = np.where(np.isnan(self.x[rows]), gap_width, width)
            low = x - width
            put(self.low, rows, missing, low.clip(0) if self.modality.kind == "counts" else low)
            put(self.high, rows, missing, x + width)

    def write_draws(self, rows, missing, decoder, z):
        draw, first = nets.mean if len(self.modality.shape) == 3 else nets.sample, 0
        for parameter in decoded(self.modality, decoder, z):
            x = self.in_units(draw(self.modality, parameter).cpu().double().numpy())
            put(self.values, (slice(first, first + len(x)), rows), missing, x)
            first += len(x)

    def in_units(self, x):
        """The model's values in the units of the filled array, float64, NaN where it has none."""
        x = unstandardise(x, self.modality.stats)
        if self.modality.kind in ("bytes", "greys") and self.values.dtype == np.uint8:
            x = 255 * x
        if self.modality.unseen:
            x[..., list(self.modality.unseen)] = np.nan
        return x

    def count(self, missing):
        unseen = missing[:, list(self.modality.unseen)].sum() if self.modality.unseen else 0
        rows, cells = missing.reshape(len(missing), -1).any(1).sum(), missing.sum() - unseen
        counts = zip(self.filled, (rows, cells, unseen))
        self.filled = Filled(*(int(total + more) for total, more in counts))

    def arrays(self):
        """The arrays to write. -> {name: array}"""
        name, lead = self.modality.name, self.values.shape[: -len(self.modality.shape) or None]
        values = {name: self.values.reshape(*lead, *self.shape)}
        more = {"probabilities": self.probabilities, "low": self.low, "high": self.high}
        return values | {f"{name}_{k}": x for k, x in more.items() if x is not None}


def put(array, where, missing, x):
    """array[where] = x in the entries that are missing, rounded where the array holds integers."""
    if array.dtype.kind in "iu":
        x = np.rint(x).clip(np.iinfo(array.dtype).min, np.iinfo(array.dtype).max)
    elif array.dtype == bool:
        x = x > 0.5
    array[where] = np.where(missing, x.astype(array.dtype), array[where])


# ---------------------------------------------------------------------------------------- intervals

FEWEST = 20  # test rows from which an interval is taken
GAPS = 10  # passes in which the entries of a table are hidden
RESIDUALS = 2**26  # residuals that are held at once


def half_widths(model, dataset, pattern, targets, level, seed, gaps=False):
    """Half the width of the `level` interval of each feature of the modalities `targets`, in the
    data's units, for rows that show `pattern`.

    Split conformal prediction (Lei et al., JASA 2018): the ⌈(n + 1) level⌉-th smallest absolute
    residual of n test examples, on which the run was not trained, predicted from the same pattern.
    An interval covers a new value with probability `level` or more, on average over test and new
    examples, where these are exchangeable. With too few test rows that show the pattern the
    residuals are those of all test rows, each predicted from what it shows of the pattern, else
    from all that it shows, but for the target if the pattern hides it.
    gaps: the widths are for single entries that a row lacks of a target that it shows. Their
    residuals are those of test rows without this entry and a tenth of the others.
    -> {m: (D,)}
    """
    if not targets:
        return {}
    names, inputs = dataset.names, [m for m, shows in enumerate(pattern) if shows]
    rows = rows_with(dataset.test_mask, inputs, len(dataset.test))
    enough = len(rows) >= max(FEWEST, level / (1 - level))
    if not enough and not gaps:
        text = f"only {len(rows)} test rows show {', '.join(names[m] for m in inputs)}"
        print(f"{text}: their intervals are those of all test rows", file=sys.stderr)
    if enough and not gaps:  # all in one pass
        errors = residuals(model, dataset, pattern, rows, targets, seed)
        return {m: conformal(errors[m], level) for m in targets}
    widths = {}
    for m in targets:
        groups = [(pattern, rows)] if enough else groups_that_show(dataset, pattern, m)
        errors = [np.empty((0, *model.modalities[m].shape))]
        for mask, index in groups:
            errors.append(residuals(model, dataset, mask, index, [m], seed, gaps)[m])
        widths[m] = conformal(np.concatenate(errors), level)
    return widths


def groups_that_show(dataset, pattern, m):
    """Test rows that show modality m, by what they show of the pattern or, if that is nothing, of
    everything; without m unless it is in the pattern. -> [(mask, rows), ...]"""
    shown = torch.ones(len(dataset.test), len(pattern), dtype=torch.bool)
    if dataset.test_mask is not None:
        shown = dataset.test_mask.clone()
    rows = shown[:, m].nonzero()[:, 0]
    if not pattern[m]:
        shown[:, m] = False
    inputs = shown & torch.tensor(pattern)
    inputs = torch.where(inputs.any(1, keepdim=True), inputs, shown)[rows]
    some = inputs.any(1)
    rows, inputs = rows[some], inputs[some]
    return [(mask, rows[index]) for mask, index in data.patterns(inputs)] if len(rows) else []


def residuals(model, dataset, mask, rows, targets, seed, gaps=False):
    """Absolute errors of the modalities `targets` at the test examples `rows`, predicted from
    `mask`, in the data's units; NaN where the test example lacks the entry. Of very wide tables so
    many of the rows, spread evenly, that their residuals are RESIDUALS at most.
    gaps: in each of ten passes a tenth of the features of targets[0] is hidden; the errors are
    those of the hidden ones. -> {m: (n, D)}"""
    split, modalities = dataset.test, model.modalities
    width = sum(math.prod(modalities[m].shape) for m in targets)
    rows = rows[spread(len(rows), max(1, RESIDUALS // width))]
    errors = {m: np.full((len(rows), *modalities[m].shape), np.nan, "f4") for m in targets}
    turns = min(GAPS, *modalities[targets[0]].shape) if gaps else 1
    for turn in range(turns):
        features = slice(turn, None, turns)

        def take(index):
            xs = data.select(split, mask, rows[index])
            if gaps:
                xs[targets[0]][:, features] = math.nan
            return xs

        for index, _, z in posterior_batches(model, len(rows), take, seed=seed):
            for m in targets:
                x = split.take(m, rows[index]).cpu().double()
                mean = expectation(modalities[m], model.decoders[m], z).cpu().double()
                error = (x - mean).abs()
                if dataset.test_mask is not None:  # what a test row hides is stored as 0
                    error[~dataset.test_mask[rows[index], m]] = math.nan
                errors[m][index.numpy(), features] = error[:, features].numpy()
    for m in targets:
        if modalities[m].stats is not None:
            errors[m] *= np.array(modalities[m].stats["std"], "f4")
    return errors


def conformal(errors, level):
    """The ⌈(n + 1) level⌉-th smallest of the n errors of each feature, (N, D), without NaN;
    infinite where n is too small for that. -> (D,)"""
    n = (~np.isnan(errors)).sum(0)
    k = np.ceil((n + 1) * level).astype(int)
    if not len(errors):
        return np.full(n.shape, np.inf)
    ordered = np.sort(errors, 0)  # NaN last
    value = np.take_along_axis(ordered, np.clip(k - 1, 0, len(errors) - 1)[None], 0)[0]
    return np.where(k <= n, value, np.inf)
