"""The contents of figures: samples of a model as labelled rows, arrays, lines.

    draw(run, dataset, folder, ...)                    all figures of one run
    draw_results(results, pages, folder, against)      figures that compare runs

drawing.py makes image files of them. Metrics come from eval.py, as arguments: nothing here
imports it. One figure that fails leaves the others.

Shapes: N examples, B of a batch, L latent dimensions, M modalities. A mask is M booleans.
"""

import contextlib
import copy
import itertools
import math
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import data
from benchmarks import drawing, npz
from benchmarks.tables import columns, grouped, row_names, setting


@contextlib.contextmanager
def attempt(path, failed):
    """The context in which the figure `path` is drawn: an exception is printed, not raised, and the
    path added to `failed`."""
    print(f"drawing {path} ...", file=sys.stderr)
    try:
        yield
    except Exception as error:
        print(f"{path} cannot be drawn: {error}", file=sys.stderr)
        failed.append(path)


# ------------------------------------------------------------------------------- figures of one run


def draw(
    run, dataset, folder, root, seed, *, masks, views, predict, latent_samples, w2, has_prior, own
):
    """All figures of an eval.Run, named after it.

    masks: {name: mask} of every subset of the modalities; views: {name: function of the M
    modalities}, the images to draw; predict(means) -> digits, disagreement, or None without
    oracles; latent_samples(model, split, mask, index) -> (n, L); w2: the distance of two Gaussians;
    has_prior: False where p(z) was not trained; own: True without metrics of the data set's own.
    -> generations' rows, None if the data are no labelled images; paths that could not be drawn
    """
    torch.manual_seed(seed)
    model, test, names = run.model, dataset.test, dataset.names
    whole = complete(dataset)
    benchmark, heading = data.benchmark(dataset.name), drawing.title(run)
    are_images, labelled = all(map(data.is_image, test.bases)), test.labels is not None
    rows, failed = None, []

    def path(figure):
        return folder / f"{run.folder.resolve().name}-{figure}.png"

    if are_images:
        with attempt(path("joint"), failed):
            above = f"{heading} · samples of p(z)"
            if not has_prior:
                above += "\n(of pseudo-samples, which only single modalities train)"
            samples, digits = joint_samples(model, views, predict)
            drawing.page(samples, above, path("joint"), digits)
    if are_images and labelled and len(whole.test):
        rows = generations(model, whole, masks, views)
    if rows and not own:
        with attempt(path("generation"), failed):
            drawing.page(rows, heading, path("generation"))
    if labelled:
        with attempt(path("latent"), failed):
            z, labels = latent_points(model, dataset, masks, latent_samples)
            drawing.latent_map(z, labels, names, heading, path("latent"))
    if hasattr(benchmark, "draw"):
        with attempt(path("generation"), failed):
            benchmark.draw(run, dataset, root, path("generation"))
    elif own and not len(whole.test):
        print("no test example shows every modality: none is drawn", file=sys.stderr)
    elif own:
        with attempt(path("generation"), failed):
            blocks, hues = regenerated(run, whole, seed)
            drawing.examples(blocks, hues, f"{heading} · test examples", path("generation"))
    if hasattr(benchmark, "evaluate"):  # its own metrics and figures replace all others
        return rows, failed
    with attempt(path("relatedness"), failed):
        pairs = []
        for a, b in itertools.combinations(range(len(names)), 2):
            shown = npz.rows_that_show(dataset.test_mask, (a, b), len(test))
            if not len(shown):
                continue
            d, index = distances(model, test, a, b, w2, shown)
            labels = test.labels[index].cpu().numpy() if labelled else np.arange(len(d))
            pairs.append(((names[a], names[b]), d, labels))
        drawing.relatedness(pairs, heading, path("relatedness"))
    if hasattr(model, "full_gradient") and len(whole.test):
        with attempt(path("gradient"), failed):
            xs = whole.test[torch.arange(min(64, len(whole.test)))]
            drawing.gradient_histogram(gradient_ratios(model, xs), heading, path("gradient"))
    return rows, failed


def complete(dataset):
    """The data set with the test examples that show every modality alone."""
    if dataset.test_mask is None:
        return dataset
    test, rows = dataset.test, dataset.test_mask.all(1).nonzero()[:, 0]
    labels = None if test.labels is None else test.labels[rows]
    return dataset._replace(
        test=data.Split(test.bases, [row[rows] for row in test.rows], labels), test_mask=None
    )


@torch.no_grad()
def generations(model, dataset, masks, views):
    """Test images, a column per label, at most ten. For each modality the rows: input, generated
    from itself, generated in the others ([meme] Figs. 3, 11-17). Where the modalities are parts of
    one image, the only view, for each subset of the parts: input, regenerated image ([poe] Figs. 3,
    4). -> list of (label, images (n, C, H, W))"""
    split, names, rows = dataset.test, dataset.names, []
    labels = split.labels.tolist()
    index = torch.tensor([labels.index(label) for label in sorted(set(labels))[:10]])
    xs = split[index]
    for name, mask in masks.items():
        (z,) = npz.posterior_samples(model, data.select(split, mask, index))
        means = model.decode(z)
        if len(views) == 1:
            ((view, whole),) = views.items()
            shown = [x if s else torch.full_like(x, 0.5) for x, s in zip(xs, mask)]
            rows += [(name, whole(shown)), (f"→ {view}", whole(means))]
        elif sum(mask) == 1:
            m = mask.index(True)
            rows += [(name, xs[m]), (f"{name} → {name}", means[m])]
            rows += [(f"{name} → {names[k]}", means[k]) for k in range(len(names)) if k != m]
    return rows


@torch.no_grad()
def joint_samples(model, views, predict=None, columns=10, lines=5):
    """Samples of the prior, the images of one z below each other: [poe] Figs. 3, 5.

    -> list of (label, images (n, C, H, W)); for each the digits that its oracle predicts and True
    where all oracles predict the same, both (n,), or None without oracles
    """
    rows, read = [], []
    for _ in range(lines):
        means = model.decode(model.prior().sample((columns,)))
        rows += [(name, view(means)) for name, view in views.items()]
        if predict:
            digits, _ = predict(means)
            agree = (digits == digits[0]).all(0)
            read += [(digit, agree) for digit in digits]
    return rows, read or None


@torch.no_grad()
def distances(model, split, a, b, w2, rows=None, n=500):
    """W2 between q(z|x_a) and q(z|x_b) of n random examples that differ in x_a, out of `rows`.
    -> (n, n), index"""
    rows = torch.arange(len(split)) if rows is None else rows
    index = rows[np.unique(split.rows[a].cpu()[rows], return_index=True)[1]]
    index, moments = index[torch.randperm(len(index))[:n]], []
    for m in (a, b):
        mask = [k == m for k in range(len(split.bases))]
        q = model.posterior(*data.select(split, mask, index))
        moments += [q.mean.cpu().double().numpy(), q.stddev.cpu().double().numpy()]
    mean_a, std_a, mean_b, std_b = moments  # each (n, L)
    return np.stack([w2(mu, std, mean_b, std_b) for mu, std in zip(mean_a, std_a)]), index


def latent_points(model, dataset, masks, latent_samples, n=1000):
    """z ~ q(z|x_m) of n test examples, for one modality m after the other.
    -> (M n, L), their labels (M n,)"""
    alone, test = [mask for mask in masks.values() if sum(mask) == 1], dataset.test
    rows = [npz.rows_that_show(dataset.test_mask, [mask.index(True)], len(test)) for mask in alone]
    n = min(n, *map(len, rows))
    z = [latent_samples(model, test, mask, index[:n]) for mask, index in zip(alone, rows)]
    return np.concatenate(z), np.concatenate([test.labels[index[:n]].cpu() for index in rows])


def gradient_ratios(model, xs, draws=30):
    """[meme] Fig. 10: log10 |mean| / std of every entry of MEME's gradient, with and without that
    of w, clamped to [-4, 2]; mean and std are over draws of z.
    -> {"w detached": {"encoders": (n,), "decoders": (n,)}, "eq. (7)": ...}"""
    model = copy.deepcopy(model)
    model.kl = "sample"  # eq. (6), whose gradient is eq. (7)
    encoders, decoders = list(model.encoders.parameters()), list(model.decoders.parameters())
    sizes = [sum(weight.numel() for weight in part) for part in (encoders, decoders)]
    ratios = {}
    for name, full in (("w detached", False), ("eq. (7)", True)):
        model.full_gradient, total, squares = full, 0, 0
        for _ in range(draws):
            gradient = torch.autograd.grad(model.objective(*xs), encoders + decoders)
            gradient = torch.cat([g.flatten() for g in gradient]).cpu().double()
            total, squares = total + gradient, squares + gradient**2
        mean = total / draws
        std = (squares / draws - mean**2).clamp_min(0).sqrt()
        ratios[name] = {
            part: (m.abs() / s)[s > 0].log10().cpu().clamp(-4, 2)
            for part, m, s in zip(("encoders", "decoders"), mean.split(sizes), std.split(sizes))
        }
    return ratios


@torch.no_grad()
def regenerated(run, dataset, seed=0):
    """A few test examples of a user's arrays: the input, and its mean given each modality alone and
    all of them. -> blocks and hues of drawing.examples"""
    model, split, names = run.model, dataset.test, dataset.names
    index, arrays = npz.few(split.labels, len(split)), dataset.spec.get("arrays", {})
    xs, means = split[index], {}
    for source, mask in npz.sources(names).items():
        shown = [x if s else None for x, s in zip(xs, mask)]
        ((_, _, z),) = npz.passes(model, len(index), partial(npz.batch, shown), seed=seed)
        means[source] = [x.mean(0) for x in model.decode(z)]
    labels = {source: f"from {drawing.label(source)}" for source in means}
    hues = {label: drawing.hue(k) for k, label in enumerate(labels.values())}
    hues |= {"input": "black", list(labels.values())[-1]: "gray"}
    blocks = {}
    for m, (modality, x) in enumerate(zip(model.modalities, xs)):
        if modality.likelihood == "categorical":
            x = F.one_hot(x, means[names[m]][m].shape[-1]).float()
        x = x.nan_to_num(0.0)  # a missing entry is drawn as the mean
        order = [names[m], *(source for source in means if source != names[m])]
        rows = {"input": x} | {labels[source]: means[source][m] for source in order}
        unit = ""
        if modality.likelihood in ("poisson", "negative-binomial"):
            rows = {label: x.sqrt() for label, x in rows.items()}
            unit = ", square roots"
        elif arrays.get(names[m], {}).get("stats"):
            unit = ", in standard deviations from the training mean"
        blocks[drawing.label(names[m]) + unit] = [
            (label, x if x.ndim == 4 else x.flatten(1)) for label, x in rows.items()
        ]
    return blocks, hues


# ------------------------------------------------------------------------- figures of several runs


def draw_results(results, pages, folder, against="paired"):
    """Figures that compare runs: the same test images through every model, curves, and those of the
    data sets' own. pages: {folder of a run: generations' rows}. -> paths that could not be drawn"""
    failed = []
    for name in dict.fromkeys(r["run"]["dataset"] for r in results):
        chosen, stem = [r for r in results if r["run"]["dataset"] == name], Path(name).stem
        path = folder / f"{stem}-models.png"
        rows, pairs = compare_models(chosen, pages)
        if len(rows) > 1:
            with attempt(path, failed):
                heading = f"{Path(name).name} · {pairs}"
                drawing.page(drawing.side_by_side(rows), heading, path)
        path = folder / f"{stem}-{against.replace('_', '-')}.png"
        axis = "paired fraction f" if against == "paired" else against.replace("_", "-")
        lines = curves(chosen, against)
        if lines:
            with attempt(path, failed):
                drawing.curves(lines, f"{stem} · against the {axis}", path, xlabel=axis)
        benchmark = data.benchmark(name)
        if hasattr(benchmark, "compare"):
            with attempt(folder / f"{stem}-*.png", failed):
                benchmark.compare(chosen, folder)
    return failed


def compare_models(results, pages):
    """The pages of a data set's models with most pairs, of each its first seed.
    -> {name: generations' rows}, the pairs as text"""
    results = [r for r in results if pages.get(r["folder"])]
    most = max((r["run"]["paired"] for r in results), default=1)
    groups = grouped([r for r in results if r["run"]["paired"] == most])
    firsts = [min(group, key=lambda r: r["run"]["seed"]) for group in groups]
    rows = {
        name: pages[first["folder"]] for name, first in zip(row_names(groups, ["paired"]), firsts)
    }
    masked = any(drawing.is_masked(first["run"]) for first in firsts)
    return rows, "masked" if masked else f"f = {most:g}"


def curves(results, against="paired"):
    """Every metric of a data set's runs against a flag: [meme] Figs. 5-7, 21, 22; [poe] Figs. 6-9.

    A line per model and setting. ValueError for a flag without numbers.
    -> list of (model, label, {value of the flag: {metric: values of the runs}}); [] if the flag has
    one value only
    """
    if against == "paired":
        results = [r for r in results if not drawing.is_masked(r["run"])]
    groups = grouped(results)
    values = {setting(group[0]).get(against) for group in groups} - {None}
    if groups and not (values and all(isinstance(value, int | float) for value in values)):
        numbers = [k for k, v in setting(groups[0][0]).items() if isinstance(v, int | float)]
        flags = ", ".join(k.replace("_", "-") for k in numbers)
        raise ValueError(f"--against must be a flag with numbers ({flags}), not {against!r}")
    if len(values) < 2:
        return []
    lines = {}  # (model and flags, unpaired, f): {value of the flag: {metric: values}}
    told = ("paired", "unpaired", "epoch" if against == "epochs" else against)
    for label, group in zip(row_names(groups, told), groups):
        own, cells = setting(group[0]), [columns(r) for r in group]
        if own.get(against) is not None:
            f = None if against == "paired" else own["paired"]
            points = {t: [c.get(t, math.nan) for c in cells] for t in cells[0]}
            lines.setdefault((label, own["unpaired"], f), {})[own[against]] = points
    if against == "paired":
        lines = share_ends(lines)
    named = []
    for (label, unpaired, f), line in lines.items():
        words = [label, unpaired] if f is None else [label, unpaired, f"f = {f:g}"]
        named.append((label.split()[0].rstrip("*"), " ".join(words), line))
    return named


def share_ends(lines):
    """At f = 1 `unpaired` makes no difference but for "all", which has single streams too: a run at
    f = 1 is the end of every line of its model, and no line by itself if there is another."""
    same = [key for key in lines if key[1] != "all"]
    ends = {key[0]: lines[key][1] for key in same if 1 in lines[key]}
    alone = [key for key in same if set(lines[key]) == {1}]
    longer = [key for key in same if key not in alone]
    for key in longer:
        if key[0] in ends:
            lines[key].setdefault(1, ends[key[0]])
    for key in alone:
        if any(other[0] == key[0] for other in longer):
            del lines[key]
    return lines
