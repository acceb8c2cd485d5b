"""Figures: arrays in, image files out. What stands in them was computed elsewhere.

matplotlib, scipy (the dendrogram) and scikit-learn (t-SNE) are imported where they are used: who
draws nothing needs none of them.
"""

import math
import textwrap
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

COLOURS = {  # Okabe and Ito's palette: told apart by the colour-blind too
    "MEME": "#0072B2",
    "SVAE": "#E69F00",
    "VAEVAE": "#009E73",
    "MMVAE": "#CC79A7",
    "MVAE": "#D55E00",
}
UNPAIRED, PAIRED, WRONG = "#56B4E9", "#E69F00", "#D55E00"
MODALITIES = "#E69F00", "#56B4E9", "#CC79A7", "#D55E00", "#8B5A2B", "#F0A8D0", "#B5A642"
DPI, SMALLEST, GAP, TITLE = 150, 70, 12, 50  # pixels: an inch, a tile's shorter side, ...
BARS = 64  # features of a vector that are drawn as bars


def pyplot():
    try:
        import matplotlib
    except ImportError:
        raise ValueError("the charts need matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def finish(figure, path, heading=None, **options):
    """A figure -> an image file, in a folder that is made if need be; the figure is closed."""
    if heading:
        figure.suptitle(heading)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, **{"dpi": DPI, **options})
    pyplot().close(figure)


def title(run):
    """The heading of a figure of one run."""
    return f"{run.args['model']} · {Path(run.args['dataset']).name} · {pairs(run.args)}"


def pairs(args):
    """What the training examples of a run showed: f = 0.5, split."""
    if is_masked(args):
        return "masked"
    return f"f = {args['paired']:g}" + (f", {args['unpaired']}" if args["paired"] < 1 else "")


def is_masked(args):
    """Whether a train_mask said what each training example of a run showed."""
    return "train_mask" in args.get("note", "")


def label(name):
    """What a modality is called beside labels of classes, which are numbers."""
    return f"modality {name}" if name.isdigit() else name


def hue(k):
    """The colour of modality k; colours of classes are none of these."""
    return MODALITIES[k % len(MODALITIES)]


# ------------------------------------------------------------------------------------------- images


def canvas(images, height, width):
    """Grey or coloured images (n, C, H, W) in the middle of height x width, in colour, as many
    times as large as fits."""
    x = images.clamp(0, 1).expand(-1, 3, -1, -1)
    n = times(x, height, width)
    x = x.repeat_interleave(n, 2).repeat_interleave(n, 3)
    tall, wide = height - x.shape[2], width - x.shape[3]
    return F.pad(x, (wide // 2, wide - wide // 2, tall // 2, tall - tall // 2), value=1)


def times(images, height, width):
    """How many times as large as they are images (n, C, H, W) fit into height x width."""
    return min(height // images.shape[2], width // images.shape[3])


def page(rows, heading, path, read=None):
    """An image file with a row per (label, images (n, C, H, W)).

    read: per row the digits to write beside the images and whether the other modality of the same
    z agrees, both (n,); bold and red where it does not.
    """
    from torchvision.utils import make_grid

    height, width = (max(images.shape[k] for _, images in rows) for k in (2, 3))
    margin, columns = 0 if read is None else 12, len(rows[0][1])
    tiles = torch.cat([canvas(images, height, width) for _, images in rows])
    tiles = F.pad(tiles, (0, margin), value=1)
    grid = make_grid(tiles, nrow=columns, pad_value=1).permute(1, 2, 0).cpu()
    down, across = height + 2, width + margin + 2
    least = min(min(images.shape[2:]) * times(images, height, width) for _, images in rows)
    inches = SMALLEST / DPI / max(least, min(height, width) / 2)  # of a pixel of an image
    size = inches * grid.shape[1] + 1.3, inches * grid.shape[0] + 0.4
    figure, ax = pyplot().subplots(figsize=size)
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
    finish(figure, path, bbox_inches="tight")


def examples(blocks, hues, heading, path, across=3000):
    """Test examples of every modality and what becomes of them, one below the other; a column per
    example, as many as fit into `across` pixels.

    blocks: {title: rows (label, values)}, the input first: (n, C, H, W) are images, (n, D) bars,
    or, of more than 64 features, a square of brightness in reading order. hues: {label: colour}
    of the bars of a row
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
        top -= TITLE
        ends = "" if values[0].ndim == 4 else f": {low:.3g} to {high:.3g}"
        bright = ", dark to bright" if values[0].ndim == 2 and values[0].shape[1] > BARS else ""
        figure.text(8 / width, (top + 8) / total, title + ends + bright, size=9, weight="bold")
        for (name, _), x in zip(rows, values):
            top -= h + GAP
            box = margin / width, top / total, n * column / width, (h + GAP) / total
            ax = figure.add_axes(box, xticks=[], yticks=[])
            ax.spines[:].set_visible(False)
            ax.set_ylabel(name, rotation=0, ha="right", va="center", size=8)
            for k, one in enumerate(x):
                place = k * column + GAP, column - 2 * GAP, h
                if one.ndim == 1 and len(one) <= BARS:
                    bars(ax, one.numpy(), *place, low, high, hues[name])
                else:
                    picture(ax, one, *place, low, high)
            ax.set(xlim=(0, n * column), ylim=(-4, h + GAP - 4))  # in pixels
    finish(figure, path, heading)


def tile(x):
    """The pixels, across and down, that an example of x (n, ...) is drawn with."""
    if x.ndim == 2:
        return (130, 80) if x.shape[1] <= BARS else (130, 130)
    height, width = x.shape[2], x.shape[3] * (1 if x.shape[1] in (1, 3) else x.shape[1])
    scale = max(SMALLEST / min(height, width), 100 / max(height, width))
    return round(scale * width), round(scale * height)


def axis_range(values):
    """The smallest and the largest of all rows; 0 and 1 for images and probabilities."""
    low, high = min(x.min().item() for x in values), max(x.max().item() for x in values)
    if values[0].ndim == 4 or 0 <= low <= high <= 1:
        return 0.0, 1.0
    return min(low, 0.0), max(high, 0.0)


def picture(ax, x, left, width, height, low, high):
    """An example in the middle of a box of pixels: an image, whose channels stand side by side
    unless they are one or three; or a vector, folded to a square."""
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
    """A bar per value above and below the line of 0, in a box of pixels."""
    scale = height / ((high - low) or 1)
    at = left + (np.arange(len(values)) + 0.5) * width / len(values)
    zero = -low * scale
    ax.bar(at, values * scale, 0.8 * width / len(values), zero, color=colour, lw=0)
    ax.plot((left, left + width), (zero, zero), color="0.6", lw=0.5)


def side_by_side(pages):
    """The same test images through several models, a row each: what is shown, then what every model
    makes of it in another modality, or of the parts.

    pages: {model: rows of a page}, labelled "a" where shown, "a → b" or "→ b" where generated
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
    """An image file with columns of photos and texts. columns: list of (title, contents), the same
    number in each; a Path is a photo's, a string is text"""
    from PIL import Image

    rows = len(columns[0][1])
    size = dict(figsize=(2.2 * len(columns), 2.2 * rows + 0.6), layout="constrained")
    figure, axes = pyplot().subplots(rows, len(columns), squeeze=False, **size)
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
            except OSError:
                ax.text(0.5, 0.5, f"{content.name}\nis not there", ha="center", size=7)
    finish(figure, path, heading, dpi=120, bbox_inches="tight")


# ------------------------------------------------------------------------------------------- charts


def relatedness(pairs, heading, path):
    """[meme] Figs. 8 and 9: for each pair of modalities a, b a row with distances of q(z|x_a),
    q(z|x_b), of related and of unrelated examples, between the classes, and the classes'
    average-linkage tree.

    pairs: list of (names of a and b, d (n, n), labels (n,)); related are those with the same label
    """
    counts = [len(np.unique(labels)) for _, _, labels in pairs]
    panels = 3 if all(1 < count <= 20 for count in counts) else 1
    size = dict(figsize=(4.5 * panels, 3.8 * len(pairs)), squeeze=False, layout="constrained")
    figure, axes = pyplot().subplots(len(pairs), panels, **size)
    most, between = max(d.max() for _, d, _ in pairs), []
    for ax in axes[1:, 0]:
        ax.sharey(axes[0, 0])
    for (names, d, labels), row in zip(pairs, axes):
        same, (a, b) = labels[:, None] == labels, map(label, names)
        for shown, what, colour in ((~same, "unrelated", UNPAIRED), (same, "related", PAIRED)):
            options = dict(range=(0, most), density=True, alpha=0.7, label=what, color=colour)
            row[0].hist(d[shown], 50, **options)
        row[0].set(xlabel=f"W2 of q(z|{a}), q(z|{b})", ylabel="density")
        row[0].legend()
        members = [labels == c for c in np.unique(labels)] if panels == 3 else []
        between.append(np.array([[d[np.ix_(i, j)].mean() for j in members] for i in members]))
    for (names, _, labels), means, row in zip(pairs, between, axes if panels == 3 else ()):
        classes, (a, b) = np.unique(labels), map(label, names)
        low, high = min(map(np.min, between)), max(map(np.max, between))
        image = row[1].imshow(means, cmap="cividis", vmin=low, vmax=high)
        row[1].set(xlabel=f"class of {b}", ylabel=f"class of {a}")
        row[1].set_xticks(range(len(classes)), classes)
        row[1].set_yticks(range(len(classes)), classes)
        figure.colorbar(image, ax=row[1], label="mean W2")
        tree(means, classes, row[2])
        row[2].set_ylim(0, 1.05 * high)
    finish(figure, path, heading)


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


def latent_map(z, labels, names, heading, path):
    """[meme] Figs. 19, 20: points z (M n, L), those of one modality after those of another, in the
    plane, by t-SNE, or, without scikit-learn, PCA. labels (M n,); names: of the M modalities"""
    plt = pyplot()
    try:
        from sklearn.manifold import TSNE

        plane, method = TSNE(random_state=0).fit_transform(z), "t-SNE"
    except ImportError:
        centred = z - z.mean(0)
        plane, method = centred @ np.linalg.svd(centred, full_matrices=False)[2][:2].T, "PCA"
    size = dict(figsize=(11, 5), sharex=True, sharey=True, layout="constrained")
    figure, (left, right) = plt.subplots(1, 2, **size)
    for k, (name, part) in enumerate(zip(names, np.split(plane, len(names)))):
        left.scatter(*part.T, 8, color=hue(k), alpha=0.6, lw=0, label=label(name))
    left.legend(markerscale=2)
    left.set_title("modality")
    classes = np.unique(labels)
    if len(classes) > 20:  # too many to be read
        points = right.scatter(*plane.T, 8, c=labels, cmap="viridis", alpha=0.6, lw=0)
        figure.colorbar(points, ax=right, label="label")
        classes = ()
    shades = plt.get_cmap("viridis")(np.linspace(0, 0.9, len(classes)))  # no modality's colour
    for one, colour in zip(classes, shades):  # a label is its own marker
        right.scatter(*plane[labels == one].T, 25, color=colour, marker=f"${one}$", lw=0, alpha=0.8)
    right.set_title("label")
    finish(figure, path, f"{heading} · samples of the posterior of each modality, {method}")


def gradient_histogram(ratios, heading, path):
    """[meme] Fig. 10. ratios: {"w detached": {"encoders": (n,), "decoders": (n,)}, "eq. (7)": ...},
    tensors of log10 |mean| / std of the gradient's entries"""
    size = dict(figsize=(9, 3.5), sharey=True, layout="constrained")
    figure, axes = pyplot().subplots(1, 2, **size)
    for (name, parts), colour in zip(ratios.items(), (UNPAIRED, PAIRED)):
        for ax, (part, ratio) in zip(axes, parts.items()):
            label = f"{name}, median {10 ** ratio.median().item():.2g}"
            ax.hist(ratio, 60, alpha=0.7, label=label, color=colour, density=True)
            ax.set(xlabel="log10 |mean| / std of a gradient entry", title=part)
    for ax in axes:
        ax.legend(loc="upper left", fontsize=8)
    axes[0].set_ylabel("density")
    finish(figure, path, f"{heading} · signal to noise of the gradient")


def fraction(x):
    """A number as short text: 1/64 rather than 0.015625."""
    return f"1/{1 / x:g}" if 0 < x < 1 and math.log2(x).is_integer() else f"{x:g}"


def curves(lines, heading, path):
    """A panel per metric, against a number: a line per setting, mean and spread over its runs.

    lines: list of (model, label, {number: {metric: values of the runs}})
    """
    ticks = sorted({x for _, _, line in lines for x in line})
    metrics = list(dict.fromkeys(t for _, _, line in lines for at in line.values() for t in at))
    width = min(4, len(metrics))
    height = -(-len(metrics) // width)
    size = dict(figsize=(3.2 * width, 2.6 * height + 0.6), layout="constrained")
    figure, axes = pyplot().subplots(height, width, squeeze=False, **size)
    for ax, metric in zip(axes.flat, metrics):
        of_model = {}  # how many lines of a model, which has one colour, are drawn
        for model, label, line in lines:
            k = of_model[model] = of_model.get(model, -1) + 1
            x = sorted(value for value in line if metric in line[value])
            values = [line[value][metric] for value in x]
            mean = np.array([np.mean(v) for v in values])
            std = np.array([np.std(v, ddof=1) if len(v) > 1 else 0 for v in values])
            colour, dash = COLOURS.get(model, "k"), ("-", "--", ":", "-.")[k % 4]
            ax.plot(x, mean, "os^Dv"[k % 5], ls=dash, color=colour, ms=4, label=label)
            ax.fill_between(x, mean - std, mean + std, color=colour, alpha=0.2, lw=0)
        ax.set(xscale="log", title=metric.replace("\\", ""))
        ax.set_xticks(ticks, [fraction(tick) for tick in ticks])
        ax.minorticks_off()
    for ax in axes.flat[len(metrics) :]:
        ax.set_axis_off()
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    finish(figure, path, f"{heading}, mean ± std over seeds")


def fingerprints(spectra, most, bits, p, scores, heading, path):
    """[poe] Fig. 11 A-C: spectra (n, bins) from m/z 0 to `most`; beside each, above its molecule's
    bits (n, D), below their predicted probabilities p (n, D); scores (n,): their Tanimoto"""
    n = len(spectra)
    size = dict(figsize=(11, 1.9 * n + 0.5), squeeze=False, layout="constrained")
    figure, axes = pyplot().subplots(n, 2, **size)
    for (left, right), spectrum, bit, guess, score in zip(axes, spectra, bits, p, scores):
        peaks, ones = spectrum.nonzero()[0], bit.nonzero()[0]
        left.vlines((peaks + 0.5) * most / len(spectrum), 0, spectrum[peaks], color="k", lw=0.8)
        left.set(xlim=(0, most), ylim=(0, 1.05), ylabel="√ intensity")
        right.vlines(ones, 0, 1, color=PAIRED, lw=0.7, label="the molecule's")
        right.vlines(range(len(guess)), 0, -guess, color=UNPAIRED, lw=0.7, label="predicted, p")
        right.axhline(0, color="k", lw=0.5)
        right.set(ylim=(-1.05, 1.05), yticks=[-1, 0, 1], yticklabels=[1, 0, 1])
        right.set_title(f"Tanimoto {score:.2f}", loc="right", size=9)
    axes[-1, 0].set_xlabel("m/z")
    axes[-1, 1].set_xlabel("bit of the fingerprint")
    lines = axes[0, 1].get_legend_handles_labels()
    figure.legend(*lines, loc="outside lower right", ncols=2)
    finish(figure, path, heading)


def top_k(ks, runs, frequency, random, heading, path):
    """[poe] Fig. 11 D. runs: {name: shares (K,) at the ks (K,)}; frequency, random (K,): the shares
    that they are compared with"""
    figure, ax = pyplot().subplots(figsize=(6, 4))
    for name, shares in runs.items():
        ax.step(ks, shares, where="post", label=name)
    ax.step(ks, frequency, "--", where="post", color="0.45", label="bit frequencies")
    ax.plot(ks, random, ":", color="black", label="random order")
    ax.set(xscale="log", xlabel="k", ylabel="true candidate among the first k", ylim=(0, 1.02))
    ax.set_title(heading)
    ax.legend(frameon=False, loc="upper left")
    figure.tight_layout()
    finish(figure, path)
