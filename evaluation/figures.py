"""Figures of a run and of several runs.

    draw(run, dataset, oracles, folder, seed, streams)    files RUN-....png of one run
    draw_results(results, pages, folder, against)         files DATA-....png that compare runs

A figure that cannot be drawn leaves the others. The figures that only cub and spectra have are in
the files of these data sets.

Shapes: N examples, B of a batch, L latent dimensions, M modalities, C classes. A mask is M booleans.
"""

import contextlib
import itertools
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

import data
from eval import (
    generate,
    predict,
    rows_with,
    subsets,
    view,
)
from evaluation import own, tables
from evaluation.curves import CHARTS, MIXED, curves, fraction, numbers_of
from evaluation.latent import (
    BINS,
    MOST_PAIRS,
    gradient_ratios,
    latent_points,
    posterior_distances,
    signal_to_noise,
    w2_overlap,
)

COLOURS = {  # of Okabe and Ito's palette, which is safe for the colour-blind
    "MEME": "#0072B2",
    "SVAE": "#E69F00",
    "VAEVAE": "#009E73",
    "MMVAE": "#CC79A7",
    "MVAE": "#D55E00",
}
BLUE, ORANGE, RED = "#56B4E9", "#E69F00", "#D55E00"
MODALITIES = ("#111111", "#FFC20A", "#00C9A7", "#C71585", "#7CFC00", "#4B0082", "#B0B0B0")
DASHES, MARKERS = ("-", "--", ":", "-."), "os^Dv"
DPI = 150
TILE = 112  # pixels of the shorter side of an image
MOST_POINTS = 2000  # of z in the plane


def pyplot():
    try:
        import matplotlib
    except ImportError:
        raise ValueError("figures need matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def panels(rows, columns, width, height, extra=0.0, **options):
    """A figure of rows x columns panels of width x height inches, and `extra` inches below them.
    -> figure, axes (rows, columns)"""
    return pyplot().subplots(
        rows,
        columns,
        figsize=(columns * width, rows * height + extra),
        squeeze=False,
        layout="constrained",
        **options,
    )


def grid(n, width, height, extra=0.0):
    """`panels` for n charts, in 3 or 4 columns, with fewer empty places. -> figure, axes (n,)"""
    columns = n if n <= 4 else min((4, 3), key=lambda columns: -n % columns)
    figure, axes = panels(-(-n // columns), columns, width, height, extra)
    for ax in axes.flat[n:]:
        ax.remove()
    return figure, axes.flat[:n]


def finish(figure, path, heading=None, **options):
    """Save a figure to an image file and close it."""
    figure.suptitle(heading, size=11)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, **{"dpi": DPI, **options})
    pyplot().close(figure)


def title(run):
    """The heading of a run's figures: model, data set, pairs."""
    pairs, args = tables.pairs(run.args), run.args
    if args["paired"] < 1 and not args["masked"] and args["unpaired"] not in data.UNPAIRED:
        pairs += " always shown"
    return f"{args['model']} · {Path(args['dataset']).name} · {pairs}"


@contextlib.contextmanager
def attempt(path, failed):
    """The context in which the figure `path` is drawn: an exception ends this figure alone, with
    one sentence. The path is added to `failed`."""
    try:
        yield
    except Exception as error:
        print(f"{path} cannot be drawn: {type(error).__name__}: {error}", file=sys.stderr)
        failed.append(path)


# ------------------------------------------------------------------------------- figures of one run


def draw(run, dataset, oracles, folder, seed, streams):
    """The figures of a command.Run, named after its folder.

    oracles: {view: Oracle}, {} for data without; streams: those of the training.
    -> generations' rows, None if the data are no labelled images; paths that could not be drawn
    """
    torch.manual_seed(seed)
    model, test, names, heading = run.model, dataset.test, dataset.names, title(run)
    complete = rows_with(dataset.test_mask, range(len(names)), len(test))
    are_images, labelled = all(map(data.is_image, test.bases)), test.labels is not None
    word = "digit" if oracles else "row label" if labelled else "example"
    rows, failed = None, []
    if not dataset.views:  # every modality is an image by itself
        dataset = dataset._replace(views={name: (m,) for m, name in enumerate(names)})

    def path(figure):
        return folder / f"{run.folder.resolve().name}-{figure}.png"

    with attempt(path("training"), failed):
        training(run.log, names, heading, path("training"))
    if are_images:
        with attempt(path("joint"), failed):
            above = f"{heading} · samples of p(z), decoded"
            if len(model.trained_priors([mask for mask, _ in streams])) < 2:
                above += "\np(z): a mixture of pseudo-samples, which only single modalities train"
            page(joint_samples(model, dataset, oracles), above, path("joint"))
    if are_images and labelled and len(complete):
        with attempt(path("generation"), failed):
            rows = generations(model, dataset, complete)
            page(rows, f"{heading} · test images, and what is generated", path("generation"))
    if labelled:
        with attempt(path("latent"), failed):
            z, labels = latent_points(model, dataset, n=MOST_POINTS // len(names))
            latent_map(z, labels, names, word, heading, path("latent"))
    if dataset.spec["name"] == "npz":
        with attempt(path("features"), failed):
            scores = own.feature_scores(model, dataset, seed, streams)
            features(scores, model.modalities, heading, path("features"))
    torch.manual_seed(seed)  # the numbers in the next two figures are those of metrics.json
    if dataset.groups is None:  # else other examples of a group are related, too
        with attempt(path("relatedness"), failed):
            pairs = posterior_distances(model, dataset)
            if pairs:
                relatedness(pairs, word, heading, path("relatedness"))
    if run.args["model"] == "MEME":
        with attempt(path("gradient"), failed):
            ratios = gradient_ratios(model, dataset)
            if ratios:
                gradient_histogram(ratios, heading, path("gradient"))
    return rows, failed


class Row(NamedTuple):
    """A row of a page of images. Inputs have no target, samples of p(z) no source."""

    source: str  # what z is inferred from: a modality, or several
    target: str  # what is generated
    images: torch.Tensor  # (n, channels, height, width)
    digits: torch.Tensor | None = None  # (n,): predictions of the oracle of these images
    agreement: torch.Tensor | None = None  # (n,): the oracles of all images of one z predict it


def generations(model, dataset, complete):
    """Test images, a column per label, at most ten, out of the examples `complete`, which show all.
    For each modality the rows: input, generated from itself, generated in the others ([meme] Figs.
    3, 11-17). Where the modalities are parts of one image, for each subset of the parts: input,
    regenerated image ([poe] Figs. 3, 4). -> list of Row"""
    names, views, rows = dataset.names, dataset.views, []
    labels = dataset.test.labels[complete].tolist()
    index = complete[[labels.index(label) for label in sorted(set(labels))[:10]]]
    xs = dataset.test[index]
    for source, mask in subsets(names).items():
        means = generate(model, dataset.test, mask, index)
        if len(views) == 1:
            ((target, parts),) = views.items()
            grey = [x if observed else torch.full_like(x, 0.5) for x, observed in zip(xs, mask)]
            rows.append(Row(source, "", view(grey, parts)))
            rows.append(Row(source, target, view(means, parts)))
        elif sum(mask) == 1:
            m = mask.index(True)
            rows += [Row(source, "", xs[m]), Row(source, source, means[m])]
            rows += [Row(source, name, means[k]) for k, name in enumerate(names) if k != m]
    return rows


@torch.no_grad()
def joint_samples(model, dataset, oracles, columns=10, lines=5):
    """Samples of the prior, the images of one z below each other ([poe] Figs. 3, 5), with the
    digits that the oracles, if there are any, predict. -> list of Row"""
    views, rows = dataset.views, []
    for _ in range(lines):
        means = model.decode(model.prior().sample((columns,)))
        digits, agreement = [None] * len(views), None
        if oracles:
            digits, _ = predict(means, views, oracles)
            agreement = (digits == digits[0]).all(0)
        for (name, parts), digit in zip(views.items(), digits):
            rows.append(Row("", name, view(means, parts), digit, agreement))
    return rows


def side_by_side(pages):
    """Rows that compare models on the same test images: each input, then a row per model with what
    it generates from it, other than the input itself. pages: {model: rows} -> list of Row"""
    rows = []
    for k, row in enumerate(next(iter(pages.values()))):
        if not row.target:
            rows.append(row)
        elif row.source != row.target:
            rows += [Row(name, row.target, page[k].images) for name, page in pages.items()]
    return rows


def page(rows, heading, path):
    """A grid of images, all in tiles of one size, a line per Row. Beside an image stands the digit
    that its oracle predicts, bold and orange where another image of the same z is read otherwise."""
    from torchvision.utils import make_grid

    ratio = max(row.images.shape[3] / row.images.shape[2] for row in rows)
    height, width = TILE, round(TILE * max(1, ratio))
    margin = 0 if rows[0].digits is None else 24  # beside each image, for its digit
    tiles = torch.cat([fit(row.images, height, width) for row in rows])
    tiles = F.pad(tiles, (0, margin), value=1)
    image = make_grid(tiles, nrow=len(rows[0].images), padding=4, pad_value=1).permute(1, 2, 0)
    figure, ax = pyplot().subplots(figsize=(image.shape[1] / DPI + 1.3, image.shape[0] / DPI + 0.4))
    ax.imshow(image.cpu().numpy())
    middle = [4 + height / 2 + (height + 4) * k for k in range(len(rows))]
    ax.set_yticks(middle, [" → ".join(filter(None, (row.source, row.target))) for row in rows])
    ax.set_xticks([])
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    if margin:
        heading += (
            "\nnumerals: the oracles' predictions, bold and orange where those of one z differ"
        )
        for y, row in zip(middle, rows):
            for k, (digit, agrees) in enumerate(zip(row.digits.tolist(), row.agreement.tolist())):
                look = {"color": "k"} if agrees else {"color": RED, "weight": "bold"}
                x = (width + margin + 4) * k + width + 16
                ax.text(x, y, digit, ha="center", va="center", size=8, **look)
    ax.set_title(heading, size=10)
    finish(figure, path, bbox_inches="tight")


def fit(images, height, width):
    """Grey or colour images (n, C, h, w), scaled to fit height x width and centred on white.
    -> (n, 3, height, width)"""
    scale = min(height / images.shape[2], width / images.shape[3])
    size = round(scale * images.shape[2]), round(scale * images.shape[3])
    mode = "nearest-exact" if scale > 1 else "area"
    x = F.interpolate(images.clamp(0, 1).expand(-1, 3, -1, -1), size, mode=mode)
    down, across = height - size[0], width - size[1]
    return F.pad(x, (across // 2, across - across // 2, down // 2, down - down // 2), value=1)


def training(log, names, heading, path):
    """The rows of log.csv against the epoch: the objective, and log p of each modality."""
    charts = {"objective": "objective, nats ↑"}
    charts |= {f"log_p_{name}": f"log p({name}|z), nats ↑" for name in names}
    figure, axes = grid(len(charts), 3.4, 2.6)
    for ax, (key, text) in zip(axes, charts.items()):
        rows = [row for row in log if row.get(key) is not None]
        ax.plot([r["epoch"] for r in rows], [r[key] for r in rows], "o-", color="k", ms=3, lw=1)
        ax.set(xlabel="epoch", ylabel=text)
        ax.ticklabel_format(useOffset=False)
        ax.xaxis.get_major_locator().set_params(integer=True)
    finish(figure, path, f"{heading} · training: the objective of an epoch, log p after it")


def relatedness(pairs, word, heading, path):
    """[meme] Figs. 8 and 9: histograms of the distances of q(z|x_a) and q(z|x_b), with their
    overlap, and, of 2 to 20 classes, the mean distances between them and their tree.

    pairs: see latent.posterior_distances; word: what related examples have in common
    """
    n, sizes = len(pairs), [len(np.unique(labels)) for _, _, labels in pairs]
    by_class, height = all(1 < size <= 20 for size in sizes), 3.6 if n < 3 else 2.7
    figure, axes = panels(n, 3 if by_class else 1, 4.3, height)
    limits = min(d.min() for _, d, _ in pairs), max(d.max() for _, d, _ in pairs)
    for ((a, b), d, labels), share, ax in zip(pairs, w2_overlap(pairs).values(), axes[:, 0]):
        same, edges = labels[:, None] == labels, np.linspace(d.min(), d.max(), BINS + 1)
        ax.hist(d[~same], edges, density=True, color=BLUE, label=f"unrelated: other {word}")
        text = f"related: same {word}"
        ax.hist(d[same], edges, density=True, color=ORANGE, alpha=0.7, label=text)
        ax.legend(fontsize=8, title=f"overlap {share:.2f}", title_fontsize=8)
        ax.set(xlabel=f"W2 of q(z|{a}) and q(z|{b})", ylabel="density", xlim=limits)
        ax.ticklabel_format(useOffset=False)
    share_limits(axes[:, 0])
    if by_class:
        for ax, text in zip(
            axes[0], ("distances", "mean W2 of two classes", "tree of the classes")
        ):
            ax.set_title(text, size=10)
        means = [class_means(d, labels) for _, d, labels in pairs]
        low, high = min(x.min() for x in means), max(x.max() for x in means)
        for ((a, b), _, labels), mean, (_, middle, right) in zip(pairs, means, axes):
            classes = np.unique(labels)
            image = middle.imshow(mean, cmap="cividis", vmin=low, vmax=high)
            middle.set(xlabel=f"{word}, q(z|{b})", ylabel=f"{word}, q(z|{a})")
            middle.set_xticks(range(len(classes)), classes)
            middle.set_yticks(range(len(classes)), classes)
            figure.colorbar(image, ax=middle)
            dendrogram(mean, classes, right)
            right.set(xlabel=word, ylabel="mean W2 of two groups")
        share_limits(axes[:, 2])
    if n == MOST_PAIRS:
        heading += f"\nat most {MOST_PAIRS} pairs of modalities are drawn"
    finish(figure, path, heading)


def share_limits(axes):
    """Give all panels the same range of y."""
    limits = np.array([ax.get_ylim() for ax in axes])
    for ax in axes:
        ax.set_ylim(limits[:, 0].min(), limits[:, 1].max())


def class_means(d, labels):
    """The mean of distances d (n, n) for each pair of classes. -> (C, C)"""
    members = [labels == c for c in np.unique(labels)]
    return np.array([[d[np.ix_(i, j)].mean() for j in members] for i in members])


def dendrogram(means, classes, ax):
    """Average linkage of the classes, by the mean of the distances a -> b and b -> a. The axis
    begins just below the first two that join. -> the classes from left to right"""
    from scipy.cluster import hierarchy

    symmetric = (means + means.T) / 2
    tree = hierarchy.linkage(symmetric[np.triu_indices(len(classes), 1)], "average")
    plot = hierarchy.dendrogram(tree, labels=classes, ax=ax, link_color_func=lambda _: "k")
    low, high = tree[:, 2].min(), tree[:, 2].max()
    margin = 0.1 * (high - low or high)
    ax.set_ylim(low - 2 * margin, high + margin)
    ax.tick_params(axis="x", labelsize=10)
    return plot["ivl"]


def project(z):
    """Points z (n, L) in the plane, by t-SNE; by PCA without scikit-learn or for too few points or
    dimensions. -> (n, 2), the names of the two axes"""
    n, dimensions = z.shape
    if n >= 5 and dimensions > 1:
        try:
            from sklearn.manifold import TSNE

            perplexity = min(30, (n - 1) / 3)  # must be below n
            plane = TSNE(perplexity=perplexity, random_state=0).fit_transform(z)
            return plane, ["t-SNE, first axis (no unit)", "t-SNE, second axis (no unit)"]
        except ImportError:
            pass
    _, s, vt = np.linalg.svd(z - z.mean(0), full_matrices=False)
    plane = np.pad((z - z.mean(0)) @ vt[:2].T, ((0, 0), (0, max(0, 2 - len(vt)))))
    shares = np.pad(s**2 / (s**2).sum(), (0, 1))
    return plane, [f"PCA, component {k + 1}: {shares[k]:.0%} of the variance" for k in (0, 1)]


def latent_map(z, labels, names, word, heading, path):
    """[meme] Figs. 19, 20: posterior samples in the plane, coloured by modality and by label.

    z (M n, L): those of the first modality, then of the second, ...; labels (M n,); names: of the M
    modalities; word: what a label is
    """
    plane, texts = project(z)
    figure, ((left, right),) = panels(1, 2, 6, 5, sharex=True, sharey=True)
    points = {"s": 8, "alpha": 0.6, "lw": 0}
    for name, part, colour in zip(names, np.split(plane, len(names)), itertools.cycle(MODALITIES)):
        left.scatter(*part.T, color=colour, label=tables.label(name), **points)
    classes = np.unique(labels)
    palette = pyplot().get_cmap("tab10" if len(classes) <= 10 else "tab20").colors
    if len(classes) <= 20:
        for one, colour in zip(classes, palette):
            right.scatter(*plane[labels == one].T, color=colour, label=one, **points)
    else:  # too many for colours that can be told apart
        image = right.scatter(*plane.T, c=labels, cmap="viridis", **points)
        figure.colorbar(image, ax=right, label=word)
    for ax, text in (left, "modality"), (right, word):
        ax.set_xlabel(texts[0])
        ax.ticklabel_format(useOffset=False)
        if ax.get_legend_handles_labels()[0]:
            ax.legend(title=text, loc="upper left", bbox_to_anchor=(1, 1), markerscale=2)
    left.set_ylabel(texts[1])
    finish(figure, path, f"{heading} · test examples, a sample of q(z|x) of each modality")


def gradient_histogram(ratios, heading, path):
    """[meme] Fig. 10. ratios: see latent.gradient_ratios"""
    texts = {"w detached": "without the gradient of w", "eq. (7)": "all of Eq. (7)"}
    figure, (axes,) = panels(1, 2, 4.5, 3.5, sharex=True, sharey=True)
    medians = signal_to_noise(ratios)
    for (name, parts), colour in zip(ratios.items(), (BLUE, ORANGE)):
        for ax, (part, ratio) in zip(axes, parts.items()):
            text = f"{texts[name]}, median {medians[f'{part}, {name}']:.2g}"
            ax.hist(ratio, 60, alpha=0.7, label=text, color=colour, density=True)
            ax.set(xlabel="log10 |mean| / std of an entry", ylabel="density")
            ax.set_title(part, size=10)
            ax.legend(loc="upper left", fontsize=8)
    axes[0].set_ylim(0, 1.25 * axes[0].get_ylim()[1])  # room for the legend
    about = "signal-to-noise ratio of the gradient: Eq. (7), and without that of the weight w"
    finish(figure, path, f"{heading}\n{about}")


def features(scores, modalities, heading, path):
    """The features of each modality of the test examples, predicted from all the other modalities.

    scores: {modality: {"model": (D,), "ridge": (D,) or None}}, R² or accuracy, NaN where a feature
    is not scored; more than 60 features are in the order of the model's scores
    """
    figure, axes = grid(len(scores), 3.6, 2.6, extra=0.3)
    by_name, legend = {modality.name: modality for modality in modalities}, {}
    texts = {"ridge": "ridge regression (of classes: logistic)", "model": "model"}
    for ax, (name, values) in zip(axes, scores.items()):
        n, means, low = values["model"].size, [], 0
        order = np.argsort(-values["model"].ravel()) if n > 60 else np.arange(n)
        for who, colour in (("ridge", ORANGE), ("model", "k")):
            if values[who] is not None:
                y = values[who].ravel()[order].clip(-1)
                size = 2 if n > 60 else 6
                (legend[texts[who]],) = ax.plot(1 + np.arange(n), y, ".", color=colour, ms=size)
                means.append(f"{who} {np.nanmean(values[who]):.2f}")
                low = min(low, np.nanmin(y))
        ax.set(xlim=(0.5, n + 0.5), ylim=(low - 0.05, 1.05))
        ax.set_ylabel("accuracy ↑" if own.by_accuracy(by_name[name]) else "R² ↑")
        ax.set_xlabel("feature, best first" if n > 60 else "feature" if n > 1 else "")
        ax.set_title(f"{tables.label(name)}, mean: {', '.join(reversed(means))}", size=10)
        ax.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    figure.legend(legend.values(), legend, loc="outside lower center", ncols=2, fontsize=8)
    about = "features of test examples, predicted from all other modalities (R² below -1: at -1)"
    finish(figure, path, f"{heading}\n{about}")


# ------------------------------------------------------------------------- figures of several runs


def draw_results(results, pages, folder, against="paired"):
    """Figures that compare runs: the same test images through every model, and curves.

    pages: {folder of a run: generations' rows}; against: the flag on the x-axis of the curves.
    ValueError for a flag without numbers. -> paths that could not be drawn
    """
    failed = []
    for chosen in tables.by_data(results):
        name = Path(chosen[0]["run"]["dataset"]).name
        path = folder / f"{Path(name).stem}-models.png"
        compared, pairs = compare_models(chosen, pages)
        if len(compared) > 1:
            with attempt(path, failed):
                heading = f"{name} · {pairs} · test images, and what each model generates"
                page(side_by_side(compared), heading, path)
        path = folder / f"{Path(name).stem}-{against.replace('_', '-')}.png"
        lines = curves(chosen, against)
        if lines:
            with attempt(path, failed):
                axis = "paired fraction f" if against == "paired" else against.replace("_", "-")
                draw_curves(lines, name, axis, path)
    return failed


def compare_models(results, pages):
    """The pages of a data set's models with most pairs, of each its first seed.
    -> {name: generations' rows}, the pairs as text"""
    results = [r for r in results if pages.get(r["folder"])]
    most = max((r["run"]["paired"] for r in results), default=1)
    groups = tables.grouped([r for r in results if r["run"]["paired"] == most])
    firsts = [min(group, key=lambda r: r["run"]["seed"]) for group in groups]
    rows = {name: pages[first["folder"]] for name, first in zip(tables.row_names(groups), firsts)}
    pairs = dict.fromkeys(tables.pairs(first["run"]) for first in firsts)
    return rows, "; ".join(pairs)


def draw_curves(lines, name, axis, path):
    """A panel per number: a point per setting, mean ± standard deviation over seeds; those of one
    value of the flag stand side by side, so that none covers another. lines: list of Line"""
    scores, levels = {}, {}  # {(section, key): {(line, value): numbers}}; {(section, key): levels}
    for n, line in enumerate(lines):
        for value, group in line.results.items():
            for numbers, known in map(numbers_of, group):
                for chart, number in numbers.items():
                    scores.setdefault(chart, {}).setdefault((n, value), []).append(number)
                    levels.setdefault(chart, []).append(known[chart])
    values = sorted({value for line in lines for value in line.results})
    places = np.log10(values) if values[0] > 0 else np.array(values, float)
    width = min(0.6 * np.diff(places).min(), 0.15 * np.ptp(places))  # of the points at a tick
    figure, axes = grid(len(scores), 3.4, 2.6, extra=0.6 + 0.07 * len(lines))
    for ax, ((section, key), points) in zip(axes, scores.items()):
        models = []  # lines of a model share its colour
        for n, line in enumerate(lines):
            found = [value for value in values if (n, value) in points]
            shift = width * ((n + 0.5) / len(lines) - 0.5)
            k = models.count(line.model)
            ax.errorbar(
                [places[values.index(value)] + shift for value in found],
                [np.mean(points[n, value]) for value in found],
                [deviation(points[n, value]) for value in found],
                fmt=MARKERS[k % len(MARKERS)] + DASHES[k % len(DASHES)],
                color=COLOURS.get(line.model, "k"),
                label=line.label,
                ms=4,
                lw=1.2,
                capsize=2,
            )
            models.append(line.model)
        ax.set_ylabel(CHARTS[section].format(key.replace("->", "→")))
        ax.ticklabel_format(useOffset=False)
        ax.set_xticks(places, [fraction(value) for value in values])
        ax.set_xlabel(axis)
    legend = {}
    for section in dict.fromkeys(section for section, _ in scores):
        group = [(ax, chart) for ax, chart in zip(axes, scores) if chart[0] == section]
        if section not in MIXED:
            share_limits([ax for ax, _ in group])
        for ax, chart in group:
            draw_levels(ax, levels[chart])
            for handle, text in zip(*ax.get_legend_handles_labels()):
                legend.setdefault(text, handle)
    inches = 0.6 + 0.065 * max(map(len, legend))  # of a column of the legend
    columns = max(1, int(figure.get_figwidth() / inches))
    figure.legend(legend.values(), legend, loc="outside lower center", ncols=columns, fontsize=8)
    heading = f"{name} · mean ± std over seeds; the points at a tick stand side by side"
    finish(figure, path, heading)


def deviation(numbers):
    """The sample standard deviation; 0 of a single number."""
    return np.std(numbers, ddof=1) if len(numbers) > 1 else 0


def draw_levels(ax, levels):
    """Horizontal lines at the means of levels, {name: number} of each result, where they are not
    further from the points than these are spread."""
    low, high = ax.get_ylim()
    for name in levels[0]:
        numbers = [level[name] for level in levels if level[name] is not None]
        if numbers and 2 * low - high <= np.mean(numbers) <= 2 * high - low:
            dashes = "-." if name.startswith("real") else "--" if name == "ridge" else ":"
            ax.axhline(np.mean(numbers), ls=dashes, color="0.4", lw=1, label=name)
            low, high = min(low, np.mean(numbers)), max(high, np.mean(numbers))
    margin = 0.03 * (high - low)
    ax.set_ylim(low - margin, high + margin)
