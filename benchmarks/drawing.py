"""Figures: arrays in, image files out. Nothing that a table reports is computed here.

matplotlib, scipy (the dendrogram) and scikit-learn (t-SNE) are imported by the functions that use
them, so that nothing else needs them.
"""

import math
import textwrap
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

COLOURS = {  # of Okabe and Ito's palette, which is safe for the colour-blind
    "MEME": "#0072B2",
    "SVAE": "#E69F00",
    "VAEVAE": "#009E73",
    "MMVAE": "#CC79A7",
    "MVAE": "#D55E00",
}
UNPAIRED, PAIRED, WRONG = "#56B4E9", "#E69F00", "#D55E00"
MODALITIES = "#E69F00", "#56B4E9", "#CC79A7", "#D55E00", "#8B5A2B", "#F0A8D0", "#B5A642"
DASHES, MARKERS = ("-", "--", ":", "-."), "os^Dv"
DPI = 150
TILE, SMALLEST, GAP, TITLE = 112, 70, 12, 50  # pixels: a tile, its shorter side, margins
BARS = 64  # vectors of up to 64 features are drawn as bars


def pyplot():
    try:
        import matplotlib
    except ImportError:
        raise ValueError("figures need matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def panels(rows, columns, width, height, extra=0, **options):
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


def finish(figure, path, heading=None, **options):
    """Save a figure to an image file and close it."""
    if heading:
        figure.suptitle(heading)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, **{"dpi": DPI, **options})
    pyplot().close(figure)


def title(run):
    """The heading of a run's figures: model, data set, pairs."""
    return f"{run.args['model']} · {Path(run.args['dataset']).name} · {pairs(run.args)}"


def pairs(args):
    """The modalities that training examples showed, as text: "f = 0.5, split"."""
    if is_masked(args):
        return "masked"
    return f"f = {args['paired']:g}" + (f", {args['unpaired']}" if args["paired"] < 1 else "")


def is_masked(args):
    """True for a run whose .npz has a train_mask: `paired` and `unpaired` do not apply to it."""
    return "train_mask" in args.get("note", "")


def label(name):
    """A modality's name beside class labels, which are numbers."""
    return f"modality {name}" if name.isdigit() else name


def hue(k):
    """The colour of modality k, different from all colours of classes."""
    return MODALITIES[k % len(MODALITIES)]


# ------------------------------------------------------------------------------------------- images


def page(rows, heading, path, read=None):
    """A grid of images, all in tiles of one size. rows: list of (label, images (n, C, H, W)).

    read: for each row the digits to write beside its images, and whether the other modalities of
    the same z agree, both (n,); bold and red where they do not.
    """
    from torchvision.utils import make_grid

    ratio = max(images.shape[3] / images.shape[2] for _, images in rows)
    height, width = TILE, round(TILE * max(1, ratio))
    margin = 0 if read is None else 24
    tiles = torch.cat([fit(images, height, width) for _, images in rows])
    tiles = F.pad(tiles, (0, margin), value=1)
    grid = make_grid(tiles, nrow=len(rows[0][1]), padding=4, pad_value=1).permute(1, 2, 0).cpu()
    figure, ax = pyplot().subplots(figsize=(grid.shape[1] / DPI + 1.3, grid.shape[0] / DPI + 0.4))
    ax.imshow(grid.numpy())
    middle = [4 + height / 2 + (height + 4) * k for k in range(len(rows))]
    ax.set_yticks(middle, [label for label, _ in rows])
    ax.set_xticks([])
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    for y, (digits, agree) in zip(middle, read or []):
        for k, (digit, agrees) in enumerate(zip(digits.tolist(), agree.tolist())):
            ax.text(
                x=(width + margin + 4) * k + width + 16,
                y=y,
                s=digit,
                ha="center",
                va="center",
                size=8,
                color="k" if agrees else WRONG,
                weight="normal" if agrees else "bold",
            )
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


def examples(blocks, hues, heading, path, across=3000):
    """Test examples and their reconstructions: a block per modality, a row per source, a column per
    example, as many as fit into `across` pixels.

    blocks: {title: [(label, values), ...]}, the input first. values: images (n, C, H, W), or
    vectors (n, D), drawn as bars, or from 65 features on as a square of pixels in reading order.
    hues: {label: colour of the bars in its rows}
    """
    tiles = [tile(rows[0][1]) for rows in blocks.values()]
    column = max(width for width, _ in tiles) + 2 * GAP
    n = max(1, min(across // column, *(len(x) for rows in blocks.values() for _, x in rows)))
    margin = 30 + 10 * max(len(name) for rows in blocks.values() for name, _ in rows)
    width = margin + n * column
    heights = [(h + GAP) * len(rows) + TITLE for (_, h), rows in zip(tiles, blocks.values())]
    top = sum(heights)
    total = top + TITLE
    figure = pyplot().figure(figsize=(width / DPI, total / DPI))
    for (_, h), (title, rows) in zip(tiles, blocks.items()):
        values = [x[:n].detach().cpu().float() for _, x in rows]
        low, high = axis_range(values)
        if values[0].ndim == 2:
            title += f": {low:.3g} to {high:.3g}"
            title += ", dark to bright" if values[0].shape[1] > BARS else ""
        top -= TITLE
        figure.text(8 / width, (top + 8) / total, title, size=9, weight="bold")
        for (name, _), x in zip(rows, values):
            top -= h + GAP
            box = margin / width, top / total, n * column / width, (h + GAP) / total
            ax = figure.add_axes(box, xticks=[], yticks=[])
            ax.spines[:].set_visible(False)
            ax.set_ylabel(name, rotation=0, ha="right", va="center", size=8)
            for k, one in enumerate(x):
                left, room = k * column + GAP, column - 2 * GAP
                if one.ndim == 1 and len(one) <= BARS:
                    bars(ax, one.numpy(), left, room, h, low, high, hues[name])
                else:
                    picture(ax, one, left, room, h, low, high)
            ax.set(xlim=(0, n * column), ylim=(-4, h + GAP - 4))  # pixels
    finish(figure, path, heading)


def tile(x):
    """The width and the height in pixels of an example of x (n, ...)."""
    if x.ndim == 2:
        return (130, 80) if x.shape[1] <= BARS else (130, 130)
    height, width = x.shape[2], x.shape[3] * (1 if x.shape[1] in (1, 3) else x.shape[1])
    scale = max(SMALLEST / min(height, width), 100 / max(height, width))
    return round(scale * width), round(scale * height)


def axis_range(values):
    """The common range of several rows: [0, 1] for images and probabilities, else from the smallest
    to the largest value, with 0."""
    low, high = min(x.min().item() for x in values), max(x.max().item() for x in values)
    if values[0].ndim == 4 or 0 <= low <= high <= 1:
        return 0.0, 1.0
    return min(low, 0.0), max(high, 0.0)


def picture(ax, x, left, width, height, low, high):
    """Draw an image (C, H, W) in a box of pixels, with its channels side by side unless there are
    one or three; or a vector (D,), folded to a square."""
    if x.ndim == 1:
        side = math.ceil(len(x) ** 0.5)
        x = F.pad(x, (0, side * side - len(x)), value=math.nan).view(1, side, side)
    x = x.clamp(0, 1).permute(1, 2, 0) if len(x) == 3 else torch.cat(list(x), 1)
    scale = min(width / x.shape[1], height / x.shape[0])
    wide, tall = scale * x.shape[1], scale * x.shape[0]
    left, bottom = left + (width - wide) / 2, (height - tall) / 2
    extent = left, left + wide, bottom, bottom + tall
    ax.imshow(x.numpy(), cmap="gray", vmin=low, vmax=high, extent=extent, aspect="auto")


def bars(ax, values, left, width, height, low, high, colour):
    """Draw a bar per value, from 0, in a box of pixels."""
    scale = height / ((high - low) or 1)
    x = left + (np.arange(len(values)) + 0.5) * width / len(values)
    zero = -low * scale
    ax.bar(x, values * scale, 0.8 * width / len(values), zero, color=colour, lw=0)
    ax.plot((left, left + width), (zero, zero), color="0.6", lw=0.5)


def side_by_side(pages):
    """Rows of a page that compare models on the same test images: each input, then one row per
    model with what it generates from it.

    pages: {model: rows of its page}, labelled "a" for inputs, "a → b" or "→ b" for generated images
    -> list of (label, images (n, C, H, W))
    """
    rows = []
    for k, (label, images) in enumerate(next(iter(pages.values()))):
        source, arrow, target = label.partition("→")
        if not arrow:
            rows.append((label, images))
        elif source.strip() != target.strip():
            rows += [(f"{target.strip()}, {name}", page[k][1]) for name, page in pages.items()]
    return rows


def sheet(columns, heading, path):
    """Columns of photos and texts. columns: list of (title, contents), contents of equal length: a
    Path is drawn as a photo, a string as text."""
    from PIL import Image

    rows = len(columns[0][1])
    figure, axes = panels(rows, len(columns), 2.2, 2.2, extra=0.6)
    for column, (head, contents) in zip(axes.T, columns):
        column[0].set_title(head)
        for ax, content in zip(column, contents):
            ax.axis("off")
            if not isinstance(content, Path):
                text = textwrap.fill(content, 24, max_lines=9, placeholder=" …")
                ax.text(0.5, 0.5, text, ha="center", va="center", size=9)
                continue
            try:
                with Image.open(content) as photo:
                    ax.imshow(photo.convert("RGB")).axes.set_adjustable("datalim")
            except OSError:  # features.npz can be used without the photos
                ax.text(0.5, 0.5, f"{content.name}\nnot found", ha="center", size=7)
    finish(figure, path, heading, dpi=120, bbox_inches="tight")


# ------------------------------------------------------------------------------------------- charts


def relatedness(pairs, heading, path):
    """[meme] Figs. 8 and 9: for each pair of modalities a row with histograms of the distances of
    q(z|x_a) and q(z|x_b), the mean distances between classes, and their dendrogram.

    pairs: list of (names of a and b, d (n, n), labels (n,)); examples with the same label are
    related
    """
    counts = [len(np.unique(labels)) for _, _, labels in pairs]
    by_class = all(1 < count <= 20 for count in counts)
    figure, axes = panels(len(pairs), 3 if by_class else 1, 4.5, 3.8)
    most = max(d.max() for _, d, _ in pairs)
    for ax in axes[1:, 0]:
        ax.sharey(axes[0, 0])
    for ((a, b), d, labels), ax in zip(pairs, axes[:, 0]):
        same = labels[:, None] == labels
        for mask, name, colour in ((~same, "unrelated", UNPAIRED), (same, "related", PAIRED)):
            ax.hist(d[mask], 50, range=(0, most), density=True, alpha=0.7, label=name, color=colour)
        ax.set(xlabel=f"W2 of q(z|{label(a)}), q(z|{label(b)})", ylabel="density")
        ax.ticklabel_format(useOffset=False)
        ax.legend()
    if by_class:
        means = [class_means(d, labels) for _, d, labels in pairs]
        low, high = min(x.min() for x in means), max(x.max() for x in means)
        for ((a, b), _, labels), mean, (_, middle, right) in zip(pairs, means, axes):
            classes = np.unique(labels)
            image = middle.imshow(mean, cmap="cividis", vmin=low, vmax=high)
            middle.set(xlabel=f"class of {label(b)}", ylabel=f"class of {label(a)}")
            middle.set_xticks(range(len(classes)), classes)
            middle.set_yticks(range(len(classes)), classes)
            figure.colorbar(image, ax=middle, label="mean W2")
            dendrogram(mean, classes, right)
            right.set_ylim(0, 1.05 * high)
    finish(figure, path, heading)


def class_means(d, labels):
    """The mean of distances d (n, n) for each pair of classes. -> (C, C)"""
    members = [labels == c for c in np.unique(labels)]
    return np.array([[d[np.ix_(i, j)].mean() for j in members] for i in members])


def dendrogram(means, classes, ax):
    """Average linkage of the classes, by the mean of the distances a -> b and b -> a."""
    try:
        from scipy.cluster import hierarchy
    except ImportError:
        raise ValueError("the dendrogram needs scipy: pip install scipy") from None
    symmetric = (means + means.T) / 2
    condensed = symmetric[np.triu_indices(len(classes), 1)]
    tree = hierarchy.linkage(condensed, "average")
    hierarchy.dendrogram(tree, labels=classes, ax=ax, link_color_func=lambda _: "k")
    ax.set_ylabel("mean W2")


def project(z):
    """Points z (n, L) in the plane, by t-SNE; by PCA without scikit-learn or for too few points or
    dimensions. -> (n, 2), the method"""
    n, dimensions = z.shape
    if n >= 5 and dimensions > 1:
        try:
            from sklearn.manifold import TSNE

            perplexity = min(30, (n - 1) / 3)  # must be below n
            return TSNE(perplexity=perplexity, random_state=0).fit_transform(z), "t-SNE"
        except ImportError:
            pass
    centred = z - z.mean(0)
    plane = centred @ np.linalg.svd(centred, full_matrices=False)[2][:2].T
    return np.pad(plane, ((0, 0), (0, 2 - plane.shape[1]))), "PCA"


def latent_map(z, labels, names, heading, path):
    """[meme] Figs. 19, 20: posterior samples in the plane, coloured by modality and by label.

    z (M n, L): those of the first modality, then of the second, ...; labels (M n,); names: of the M
    modalities
    """
    plane, method = project(z)
    figure, ((left, right),) = panels(1, 2, 5.5, 5, sharex=True, sharey=True)
    for k, (name, part) in enumerate(zip(names, np.split(plane, len(names)))):
        left.scatter(*part.T, 8, color=hue(k), alpha=0.6, lw=0, label=label(name))
    left.legend(markerscale=2)
    left.set_title("modality")
    classes = np.unique(labels)
    if len(classes) > 20:  # too many to tell apart by marker and colour
        points = right.scatter(*plane.T, 8, c=labels, cmap="viridis", alpha=0.6, lw=0)
        figure.colorbar(points, ax=right, label="label")
    else:
        shades = pyplot().get_cmap("viridis")(np.linspace(0, 0.9, len(classes)))
        for one, colour in zip(classes, shades):
            points = plane[labels == one].T
            right.scatter(*points, 25, color=colour, marker=f"${one}$", lw=0, alpha=0.8)
    right.set_title("label")
    for ax in (left, right):
        ax.ticklabel_format(useOffset=False)
    finish(figure, path, f"{heading} · samples of the posterior of each modality, {method}")


def gradient_histogram(ratios, heading, path):
    """[meme] Fig. 10. ratios: {"w detached": {"encoders": (n,), "decoders": (n,)}, "eq. (7)": ...},
    tensors of log10 |mean| / std of the entries of the gradient"""
    figure, (axes,) = panels(1, 2, 4.5, 3.5, sharey=True)
    for (name, parts), colour in zip(ratios.items(), (UNPAIRED, PAIRED)):
        for ax, (part, ratio) in zip(axes, parts.items()):
            text = f"{name}, median {10 ** ratio.median().item():.2g}"
            ax.hist(ratio, 60, alpha=0.7, label=text, color=colour, density=True)
            ax.set(xlabel="log10 |mean| / std of a gradient entry", title=part)
            ax.legend(loc="upper left", fontsize=8)
    axes[0].set_ylabel("density")
    finish(figure, path, f"{heading} · signal to noise of the gradient")


def fraction(x):
    """A number as short text: 1/64 rather than 0.015625."""
    return f"1/{1 / x:g}" if 0 < x < 1 and math.log2(x).is_integer() else f"{x:g}"


def curves(lines, heading, path, xlabel="paired fraction f"):
    """A panel per metric: a line per setting, mean ± standard deviation over seeds.

    lines: list of (model, label, {x: {metric: values of the runs}})
    """
    ticks = sorted({x for _, _, line in lines for x in line})
    metrics = list(dict.fromkeys(t for _, _, line in lines for at in line.values() for t in at))
    columns = min(4, len(metrics))
    rows = -(-len(metrics) // columns)
    legend_rows = -(-len(lines) // columns)  # a column of the legend is as wide as a panel
    width = 3.4 if columns > 1 else 5
    figure, axes = panels(rows, columns, width, 2.8, extra=0.5 + 0.25 * legend_rows)
    for ax, metric in zip(axes.flat, metrics):
        drawn = {}  # the number of lines of each model: they share its colour
        for model, text, line in lines:
            k = drawn[model] = drawn.get(model, -1) + 1
            x = sorted(value for value in line if metric in line[value])
            values = [line[value][metric] for value in x]
            mean = np.array([np.mean(v) for v in values])
            std = np.array([np.std(v, ddof=1) if len(v) > 1 else 0 for v in values])
            colour = COLOURS.get(model, "k")
            style = MARKERS[k % 5] + DASHES[k % 4]
            ax.plot(x, mean, style, color=colour, ms=4, label=text)
            ax.fill_between(x, mean - std, mean + std, color=colour, alpha=0.2, lw=0)
        ax.ticklabel_format(useOffset=False)
        low, high = ax.get_ylim()
        if high - low < 0.01:  # the same number, but for rounding
            ax.set_ylim((low + high) / 2 - 0.005, (low + high) / 2 + 0.005)
        ax.set(xscale="log", xlabel=xlabel, ylabel=metric.replace("\\", ""))
        ax.set_xticks(ticks, [fraction(tick) for tick in ticks])
        ax.minorticks_off()
    for ax in axes.flat[len(metrics) :]:
        ax.set_axis_off()
    handles, texts = axes[0, 0].get_legend_handles_labels()
    texts = [textwrap.fill(text, 40) for text in texts]
    figure.legend(handles, texts, loc="outside lower center", ncols=columns, fontsize=8)
    finish(figure, path, f"{heading}\nmean ± std over seeds", bbox_inches="tight")


def fingerprints(spectra, most, bits, p, scores, heading, path):
    """[poe] Fig. 11 A-C. Left: spectra (n, bins) from m/z 0 to `most`; right: their molecules' bits
    (n, D) upwards, predicted probabilities p (n, D) downwards; scores (n,): Tanimoto."""
    figure, axes = panels(len(spectra), 2, 5.5, 1.9, extra=0.5)
    for (left, right), spectrum, bit, guess, score in zip(axes, spectra, bits, p, scores):
        peaks, ones = spectrum.nonzero()[0], bit.nonzero()[0]
        left.vlines((peaks + 0.5) * most / len(spectrum), 0, spectrum[peaks], color="k", lw=0.8)
        left.set(xlim=(0, most), ylim=(0, 1.05), ylabel="√ intensity")
        right.vlines(ones, 0, 1, color=PAIRED, lw=0.7, label="bits of the molecule")
        right.vlines(range(len(guess)), 0, -guess, color=UNPAIRED, lw=0.7, label="predicted p")
        right.axhline(0, color="k", lw=0.5)
        right.set(ylim=(-1.05, 1.05), yticks=[-1, 0, 1], yticklabels=[1, 0, 1])
        right.set_title(f"Tanimoto {score:.2f}", loc="right", size=9)
    axes[-1, 0].set_xlabel("m/z")
    axes[-1, 1].set_xlabel("bit of the fingerprint")
    figure.legend(*axes[0, 1].get_legend_handles_labels(), loc="outside lower right", ncols=2)
    finish(figure, path, heading)


def top_k(ks, runs, frequency, random, heading, path):
    """[poe] Fig. 11 D: fractions (K,) of challenges with the true molecule among the first ks (K,).
    runs: {label: fractions}, labels begin with the model; frequency, random: the baselines"""
    figure, ((ax,),) = panels(1, 1, 7, 4.5)
    drawn = {}
    for text, shares in runs.items():
        model = text.split()[0].rstrip("*,")
        k = drawn[model] = drawn.get(model, -1) + 1
        colour = COLOURS.get(model, "k")
        ax.step(ks, shares, where="post", color=colour, ls=DASHES[k % 4], label=text)
    ax.step(ks, frequency, "--", where="post", color="0.45", label="bit frequencies")
    ax.plot(ks, random, ":", color="black", label="random order")
    ax.set(xscale="log", xlabel="k", ylabel="true molecule among the first k", ylim=(0, 1.02))
    ax.legend(frameon=False, loc="upper left", fontsize=8)
    finish(figure, path, heading)
