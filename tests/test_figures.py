"""Figures of a run: their contents, and what stands beside them."""

import sys
import types

import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex
from PIL import Image
from torch.distributions import Independent, Normal

import data
import nets
from evaluation import figures
from evaluation.latent import posterior_distances, signal_to_noise, w2_overlap
from helpers import READERS, SHAPES, Perfect, every_pattern, toy


@pytest.fixture
def shown(monkeypatch):
    """The figures and their headings, instead of files."""
    kept = []
    monkeypatch.setattr(
        figures, "finish", lambda figure, path, heading=None, **_: kept.append((figure, heading))
    )
    yield kept
    figures.pyplot().close("all")


def legend(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def run_of(network, **args):
    """An eval.py run that was not trained."""
    args = {"model": "MEME", "dataset": "toy", "paired": 1.0, "unpaired": "split"} | args
    network.modalities = nets.modalities("mnist-svhn")
    return types.SimpleNamespace(
        folder=types.SimpleNamespace(resolve=lambda: types.SimpleNamespace(name="run")),
        args=args | {"masked": False} | args,
        log=[{"epoch": 1, "objective": -3.0, "log_p_mnist": -2.0, "log_p_svhn": -1.0}],
        model=network,
    )


# ------------------------------------------------------------------------------------------ images


def test_tiles_keep_the_shape_of_an_image():
    for height, width in ((28, 28), (32, 32), (224, 224)):
        x = figures.fit(torch.zeros(2, 1, height, width), 112, 112)
        assert x.shape == (2, 3, 112, 112) and not x.any()
    wide = figures.fit(torch.zeros(2, 3, 8, 16), 112, 112)
    assert not wide[:, :, 28:84].any() and (wide[:, :, :28] == 1).all()
    tall = figures.fit(torch.zeros(2, 3, 40, 20), 112, 200)
    assert not tall[..., 72:128].any() and (tall[..., :72] == 1).all()


@pytest.mark.parametrize(
    "name, count", [("mnist-svhn", 6), ("mnist-split", 6), ("mnist-split3", 14)]
)
def test_generations_have_a_column_per_digit_in_order(name, count):
    dataset = toy(name)
    rows = figures.generations(
        Perfect([x.shape[1:] for x in dataset.test.bases]), dataset, torch.arange(300)
    )
    assert len(rows) == count
    for row in rows:
        if row.target:
            assert torch.allclose(
                255 * row.images[:, 0, 14, 14], 25 * torch.arange(10.0), atol=1e-3
            )
    if name != "mnist-svhn":
        assert {row.target for row in rows} == {"", "image"}
        top, whole = rows[0].images, rows[1].images
        assert top.shape == whole.shape  # the hidden parts are grey
        assert (top[:, :, -1] == 0.5).all() and torch.allclose(
            top[:, :, 0], whole[:, :, 0], atol=1e-3
        )


def test_generations_take_examples_that_show_everything():
    dataset, mask = toy(n=3000), torch.from_numpy(every_pattern(1500, 2))
    rows = figures.generations(Perfect(SHAPES), dataset, mask.all(1).nonzero()[:, 0])
    labels = dataset.test.labels.tolist()
    complete = [k for k in range(1500) if mask[k].all()]
    complete = [next(k for k in complete if labels[k] == digit) for digit in range(10)]
    assert complete != [labels.index(digit) for digit in range(10)]
    assert torch.equal(rows[0].images, dataset.test[torch.tensor(complete)][0])


def test_models_are_compared_on_the_same_inputs():
    rows = torch.arange(300)
    right = figures.generations(Perfect(SHAPES), toy(), rows)
    wrong = figures.generations(Perfect(SHAPES, lambda m, digit: 9 - digit), toy(), rows)
    compared = figures.side_by_side({"A": right, "B": wrong})
    assert [(row.source, row.target) for row in compared] == [
        ("mnist", ""),
        ("A", "svhn"),
        ("B", "svhn"),
        ("svhn", ""),
        ("A", "mnist"),
        ("B", "mnist"),
    ]
    for k, digits in enumerate((range(10), range(10), range(9, -1, -1))):
        grey = 255 * compared[k].images[:, 0, 9, 9] / 25
        assert grey.round().tolist() == list(digits)


def test_joint_samples_have_the_oracles_predictions():
    second = Perfect(SHAPES, lambda m, digit: digit if m == 0 else torch.full_like(digit, 3))
    rows = figures.joint_samples(second, toy(), READERS, columns=20, lines=2)
    assert [row.target for row in rows] == ["mnist", "svhn"] * 2
    for row in rows:
        assert torch.equal((255 * row.images[:, 0, 9, 9] / 25).round().long(), row.digits)
    assert (rows[1].digits == 3).all() and not torch.equal(rows[0].images, rows[2].images)
    for row in rows[:2]:
        assert torch.equal(row.agreement, rows[0].digits == 3)
    assert figures.joint_samples(second, toy(), {})[0].digits is None


def test_a_page_marks_digits_that_disagree(shown):
    digits, agreement = torch.tensor([4, 7]), torch.tensor([True, False])
    x = torch.rand(2, 1, 8, 8)
    rows = [figures.Row("", "a", x, digits, agreement), figures.Row("", "b", x, digits, agreement)]
    figures.page(rows, "heading", None)
    ax = shown[0][0].axes[0]
    height, width = ax.images[0].get_array().shape[:2]  # and room for the margins, inches
    inches = [width / figures.DPI + 1.3, height / figures.DPI + 0.4]
    assert height < width and shown[0][0].get_size_inches().tolist() == pytest.approx(inches)
    texts = [(t.get_text(), t.get_weight(), to_hex(t.get_color()).upper()) for t in ax.texts]
    assert texts == [("4", "normal", "#000000"), ("7", "bold", figures.RED)] * 2
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["a", "b"]
    middle = [4 + 56, 4 + 56 + 116]  # tiles of 112 pixels with 4 between them
    assert list(ax.get_yticks()) == middle == [t.get_position()[1] for t in ax.texts[::2]]
    assert [t.get_position()[0] for t in ax.texts] == [128, 128 + 112 + 24 + 4] * 2
    assert "bold and orange where" in ax.get_title()


def test_a_page_has_the_images_of_its_rows_below_each_other(tmp_path):
    black, white = torch.zeros(3, 1, 28, 28), torch.ones(3, 3, 32, 32)
    rows = [figures.Row("grey", "", black), figures.Row("grey", "colour", white)]
    figures.page(rows, "heading", tmp_path / "page.png")
    image = np.asarray(Image.open(tmp_path / "page.png").convert("L"), float)
    dark = (image < 50).any(1).nonzero()[0]
    assert (image < 50).sum() > 3 * 100**2  # three tiles of 112 pixels, and letters
    assert dark.mean() < image.shape[0] / 2  # above those of the second row


# ------------------------------------------------------------------------------ charts of one run


def test_charts_stand_in_columns_with_few_empty_places():
    for n, rows, columns in ((1, 1, 1), (4, 1, 4), (5, 2, 3), (7, 2, 4), (9, 3, 3)):
        figure, axes = figures.grid(n, 2.0, 3.0)
        assert len(axes) == len(figure.axes) == n
        assert figure.get_size_inches().tolist() == [2 * columns, 3 * rows]
        assert axes[0].get_gridspec().get_geometry() == (rows, columns)
    figures.pyplot().close("all")


def test_training_curves_have_the_rows_of_the_log(shown):
    log = [{"epoch": e, "objective": -e, "log_p_a": e / 2, "log_p_b": None} for e in (1, 2, 3)]
    log[1]["objective"] = None  # a pattern-dependent objective is not logged
    log[2]["log_p_b"] = 7.0
    figures.training(log, ("a", "b"), "heading", None)
    lines = [ax.lines[0].get_xydata().tolist() for ax in shown[0][0].axes]
    assert lines == [[[1, -1], [3, -3]], [[1, 0.5], [2, 1], [3, 1.5]], [[3, 7]]]
    labels = [ax.get_ylabel() for ax in shown[0][0].axes]
    assert labels == ["objective, nats ↑", "log p(a|z), nats ↑", "log p(b|z), nats ↑"]


def test_class_means_average_every_pair_of_examples():
    labels = np.array([3, 1, 3, 1, 1])
    d = np.arange(25.0).reshape(5, 5)
    pairs = [(a, b) for a in (1, 3) for b in (1, 3)]
    members = {c: [i for i in range(5) if labels[i] == c] for c in (1, 3)}
    means = [np.mean([d[i, j] for i in members[a] for j in members[b]]) for a, b in pairs]
    assert figures.class_means(d, labels).flatten() == pytest.approx(means)
    assert means[1] != means[2]


def test_the_tree_joins_the_nearest_classes_first():
    ax = figures.pyplot().figure().add_subplot()
    means = np.full((4, 4), 9.0)
    means[0, 2], means[2, 0] = 1, 3  # 2 on average; the diagonal is not read
    means[1, 3], means[3, 1] = 4, 4
    order = figures.dendrogram(means, np.array([10, 11, 12, 13]), ax)
    assert sorted(map(sorted, (order[:2], order[2:]))) == [[10, 12], [11, 13]]
    heights = sorted(
        {y for line in ax.collections for path in line.get_paths() for y in path.vertices[:, 1]}
    )
    assert heights == [0, 2, 4, 9]
    low, high = ax.get_ylim()
    assert 0 < low < 2 and 9 < high < 11  # the axis begins at the data
    figures.pyplot().close("all")


def distances_of(*pairs):
    """Distances between 40 examples of four classes: 1 to 2 within a class, up to 9 between."""
    rng, labels = np.random.default_rng(0), np.arange(40) % 4
    same = labels[:, None] == labels
    return [
        (names, np.where(same, 1, 3) + rng.random((40, 40)) * 6 ** (~same), labels)
        for names in pairs
    ]


def test_relatedness_has_histograms_distances_and_a_tree(shown):
    figures.relatedness(distances_of(("a", "b"), ("a", "c")), "digit", "heading", None)
    axes = [ax for ax in shown[0][0].axes if ax.get_xlabel()]
    assert [ax.get_xlabel() for ax in axes[::3]] == [
        "W2 of q(z|a) and q(z|b)",
        "W2 of q(z|a) and q(z|c)",
    ]
    first = axes[0]
    assert legend(first) == ["unrelated: other digit", "related: same digit"]
    assert first.get_legend().get_title().get_text() == "overlap 0.00"
    assert first.get_xlim()[0] > 1  # the axis begins at the data
    assert len({ax.get_xlim() for ax in axes[::3]}) == len({ax.get_ylim() for ax in axes[::3]}) == 1
    blue = [
        patch for patch in first.patches if to_hex(patch.get_facecolor()).upper() == figures.BLUE
    ]
    assert sum(p.get_height() > 0 and p.get_x() < 2.9 for p in blue) == 0  # the unrelated are far
    labels = [(ax.get_xlabel(), ax.get_ylabel()) for ax in axes[1:3]]
    assert labels == [
        ("digit, q(z|b)", "digit, q(z|a)"),
        ("digit", "mean W2 of two groups"),
    ]
    assert sorted(tick.get_text() for tick in axes[2].get_xticklabels()) == list("0123")
    pairs = distances_of(("a", "b"), ("a", "c"))
    means = [figures.class_means(d, labels) for _, d, labels in pairs]
    limits = np.min(means), np.max(means)
    assert axes[1].images[0].get_clim() == axes[4].images[0].get_clim() == limits
    matrix = axes[1].images[0].get_array()
    assert np.allclose(matrix, figures.class_means(*distances_of(("a", "b"))[0][1:]))


def test_the_overlap_beside_a_histogram_is_the_metric_and_that_of_its_bars(shown):
    (first, d, labels), (second, other, _) = distances_of(("a", "b"), ("a", "c"))
    pairs = [(first, d % 4, labels), (second, 10 + other % 7, labels)]
    figures.relatedness(pairs, "digit", "heading", None)
    axes = [ax for ax in shown[0][0].axes if ax.get_ylabel() == "density"]
    shares = list(w2_overlap(pairs).values())
    assert 0.1 < shares[1] < shares[0] - 0.02
    for ax, share in zip(axes, shares, strict=True):
        assert ax.get_legend().get_title().get_text() == f"overlap {share:.2f}"
        bars = [(bar.get_height(), bar.get_width()) for bar in ax.patches]
        pairs_of_bars = zip(bars[:50], bars[50:], strict=True)
        area = sum(min(p, q) * width for (p, width), (q, _) in pairs_of_bars)
        assert area == pytest.approx(share)


def test_relatedness_of_unlabelled_examples_is_a_histogram(shown):
    names, d, _ = distances_of(("a", "b"))[0]
    figures.relatedness([(names, d, np.arange(40))], "example", "heading", None)
    (ax,) = shown[0][0].axes
    assert legend(ax) == ["unrelated: other example", "related: same example"]


class Wide(Perfect):
    """q(z|x_m) = N(digit, m + 1) for modality m."""

    def posterior(self, *xs):
        (m,) = [k for k, x in enumerate(xs) if x is not None]
        mean = super().posterior(*xs).mean
        return Independent(Normal(mean, torch.full_like(mean, m + 1.0)), 1)


def test_six_pairs_of_modalities_at_most_are_drawn(shown):
    x = torch.arange(8.0)[:, None, None, None].expand(8, 1, 4, 4) * 25 / 255
    dataset = data.Dataset("own.npz", data.Split([x] * 5), data.Split([x] * 5), {}, tuple("abcde"))
    pairs = posterior_distances(Wide([(1, 4, 4)] * 5), dataset)
    assert [a + b for (a, b), _, _ in pairs] == ["ab", "ac", "ad", "ae", "bc", "bd"]
    figures.relatedness(pairs, "example", "heading", None)
    assert "at most 6 pairs" in shown[0][1]


@pytest.mark.parametrize("shape, method", [((2, 3), "PCA"), ((40, 1), "PCA"), ((6, 3), "t-SNE")])
def test_few_points_or_dimensions_are_projected_by_pca(shape, method, monkeypatch):
    class TSNE:
        def __init__(self, perplexity, random_state):
            self.perplexity = perplexity

        def fit_transform(self, z):
            if self.perplexity >= len(z):  # as scikit-learn does
                raise ValueError("perplexity must be less than n_samples")
            return z[:, :2]

    monkeypatch.setitem(sys.modules, "sklearn", types.SimpleNamespace())
    monkeypatch.setitem(sys.modules, "sklearn.manifold", types.SimpleNamespace(TSNE=TSNE))
    plane, texts = figures.project(np.random.default_rng(0).normal(size=shape))
    assert plane.shape == (shape[0], 2) and all(text.startswith(method) for text in texts)


def test_pca_names_the_shares_of_the_variance(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.manifold", None)
    angle = 2 * np.pi * np.arange(100) / 100
    z = np.stack([np.zeros(100), 3 * np.cos(angle), np.sin(angle)], 1) + 5  # variances 9 : 1
    plane, texts = figures.project(z)
    assert texts == [
        f"PCA, component {k}: {share} of the variance" for k, share in ((1, "90%"), (2, "10%"))
    ]
    assert np.allclose(np.abs(plane), np.abs(z[:, 1:] - 5))


def test_a_latent_map_has_a_colour_per_modality_and_label(shown, monkeypatch):
    monkeypatch.setattr(figures, "project", lambda z: (z, ["first", "second"]))
    z, labels = np.random.default_rng(0).normal(size=(60, 2)), np.tile([4, 5, 5, 9], 15)
    figures.latent_map(z, labels, ("0", "1", "2"), "digit", "heading", None)
    left, right = shown[0][0].axes
    assert legend(left) == ["modality 0", "modality 1", "modality 2"] and legend(right) == [
        "4",
        "5",
        "9",
    ]
    for k, points in enumerate(left.collections):
        assert np.array_equal(points.get_offsets(), z[20 * k : 20 * (k + 1)])
    for label, points in zip((4, 5, 9), right.collections):
        assert np.array_equal(points.get_offsets(), z[labels == label])
    hues = [to_hex(points.get_facecolor()[0]) for points in left.collections + right.collections]
    assert len(set(hues)) == 6
    assert left.get_xlabel() == right.get_xlabel() == "first" and left.get_ylabel() == "second"
    figures.latent_map(z, np.arange(60), ("0", "1", "2"), "row label", "heading", None)
    assert shown[1][0].axes[2].get_ylabel() == "row label"  # too many labels: a colour bar
    figures.latent_map(z, np.arange(60) // 3, ("0", "1", "2"), "row label", "heading", None)
    _, right = shown[2][0].axes
    assert legend(right) == [str(n) for n in range(20)]
    hues = {to_hex(points.get_facecolor()[0]) for points in right.collections}
    assert len(hues) == 20
    figures.latent_map(z[:55], np.arange(55) % 11, ("0",), "row label", "heading", None)
    hues = {to_hex(points.get_facecolor()[0]) for points in shown[3][0].axes[1].collections}
    assert len(hues) == 11
    figures.latent_map(z, np.arange(60) % 21, ("0", "1", "2"), "row label", "heading", None)
    assert shown[4][0].axes[2].get_ylabel() == "row label"


def test_gradient_histograms_name_their_medians(shown):
    detached = {"encoders": torch.tensor([-1.0, 0, 3]), "decoders": torch.tensor([2.0, 1, -1])}
    whole = {"encoders": torch.tensor([-4.0, -1, 2]), "decoders": torch.tensor([-2.5, -2, 2])}
    ratios = {"w detached": detached, "eq. (7)": whole}
    figures.gradient_histogram(ratios, "heading", None)
    left, right = shown[0][0].axes
    assert legend(left) == ["without the gradient of w, median 1", "all of Eq. (7), median 0.1"]
    assert legend(right) == ["without the gradient of w, median 10", "all of Eq. (7), median 0.01"]
    assert list(signal_to_noise(ratios).values()) == pytest.approx([1, 0.1, 10, 0.01])
    assert [ax.get_title() for ax in (left, right)] == ["encoders", "decoders"]
    assert left.get_xlim() == right.get_xlim() and left.get_ylim() == right.get_ylim()


def test_features_are_beside_ridge_and_sorted_if_many(shown):
    many = np.linspace(0, 1, 80)[np.random.default_rng(0).permutation(80)]
    few = {"model": np.array([0.5, np.nan, -4.0]), "ridge": np.array([0.25, np.nan, 0.75])}
    scores = {"few": few, "bits": {"model": many, "ridge": None}}
    kinds = [
        types.SimpleNamespace(name=name, kind=kind, likelihood="")
        for name, kind in (("few", "numbers"), ("bits", "bits"))
    ]
    figures.features(scores, kinds, "heading", None)
    left, right = shown[0][0].axes
    ridge, model = (line.get_xydata() for line in left.lines)
    assert ridge[[0, 2]].tolist() == [[1, 0.25], [3, 0.75]]
    assert model[[0, 2]].tolist() == [[1, 0.5], [3, -1]]  # R² of -4
    assert np.allclose(
        right.lines[0].get_xydata(), np.stack([np.arange(1, 81), np.linspace(1, 0, 80)], 1)
    )
    assert (left.get_ylabel(), right.get_ylabel()) == ("R² ↑", "accuracy ↑")
    assert (left.get_xlabel(), right.get_xlabel()) == ("feature", "feature, best first")
    titles = [ax.get_title() for ax in (left, right)]
    assert titles == ["few, mean: model -1.75, ridge 0.50", "bits, mean: model 0.50"]


# ---------------------------------------------------------------------------------- the whole run


@pytest.fixture
def unsaved(monkeypatch):
    """Empty files in place of figures."""
    monkeypatch.setattr(figures, "finish", lambda figure, path, *_, **__: path.touch())
    monkeypatch.setattr(figures, "project", lambda z: (z, ["first", "second"]))
    yield
    figures.pyplot().close("all")


def drawn(tmp_path, dataset, oracles=READERS, model="MVAE"):
    """-> generations' rows, names of the figures that failed, names of the files"""
    run, streams = run_of(Perfect(SHAPES), model=model), dataset.streams()
    rows, failed = figures.draw(run, dataset, oracles, tmp_path, 0, streams)
    return rows, [path.name for path in failed], sorted(path.name for path in tmp_path.iterdir())


def test_a_run_on_digits_has_five_figures(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "project", lambda z: (z, ["first", "second"]))
    rows, failed, files = drawn(tmp_path, toy())
    names = ("generation", "joint", "latent", "relatedness", "training")
    assert files == [f"run-{name}.png" for name in names] and not failed
    assert [row.source for row in rows] == ["mnist"] * 3 + ["svhn"] * 3


def test_pictures_have_the_examples_of_the_metrics(tmp_path, monkeypatch, unsaved):
    """500 of 600 at random."""
    found, dataset, model = [], toy(n=1200), Perfect(SHAPES)
    monkeypatch.setattr(figures, "relatedness", lambda pairs, *_: found.append(pairs[0][1]))
    run, streams = run_of(model), dataset.streams()
    samples = []
    monkeypatch.setattr(figures, "page", lambda rows, *_: samples.append(rows[0].digits))
    for seed in (5, 6):
        figures.draw(run, dataset, READERS, tmp_path, seed, streams)
        torch.manual_seed(seed)  # what comes first: samples of p(z)
        (first, *_) = figures.joint_samples(model, dataset, READERS)
        assert torch.equal(samples[-2], first.digits)
        torch.manual_seed(seed)
        assert np.array_equal(found[-1], posterior_distances(model, dataset)[0][1])
    assert not np.array_equal(*found)


def test_a_failing_figure_leaves_the_others(tmp_path, capsys, monkeypatch, unsaved):
    def failing(*args):
        raise RuntimeError("no plane")

    monkeypatch.setattr(figures, "latent_map", failing)
    _, failed, files = drawn(tmp_path, toy())
    assert failed == ["run-latent.png"] and len(files) == 4
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"{tmp_path / 'run-latent.png'} cannot be drawn: RuntimeError: no plane"


def test_samples_of_an_untrained_prior_are_called_so(tmp_path, monkeypatch, unsaved):
    headings, run, streams = [], run_of(Perfect(SHAPES)), toy().streams()
    monkeypatch.setattr(figures, "page", lambda rows, heading, path: headings.append(heading))
    for priors in (("mnist",), ("mnist", "svhn")):
        monkeypatch.setattr(run.model, "trained_priors", lambda masks, priors=priors: priors)
        figures.draw(run, toy(), READERS, tmp_path, 0, streams)
    joint = [heading for heading in headings if "samples of p(z)" in heading]
    assert ["a mixture of pseudo-samples" in heading for heading in joint] == [True, False]


def test_a_label_is_called_what_it_is(tmp_path, monkeypatch, unsaved):
    words, points = [], []
    monkeypatch.setattr(figures, "MOST_POINTS", 92)  # of all three modalities
    for other in ("joint_samples", "page"):
        monkeypatch.setattr(figures, other, lambda *_: None)
    monkeypatch.setattr(figures, "relatedness", lambda pairs, word, *_: words.append(word))
    monkeypatch.setattr(figures, "latent_map", lambda z, *_: points.append(len(z)))
    dataset = toy("mnist-split3")
    unlabelled = data.Split(dataset.test.bases)
    model = Perfect([x.shape[1:] for x in dataset.test.bases])
    for each, oracles in (dataset, READERS), (dataset, {}), (dataset._replace(test=unlabelled), {}):
        _, failed = figures.draw(
            run_of(model, model="MVAE"), each, oracles, tmp_path, 0, each.streams()
        )
        assert not failed
    assert words == ["digit", "row label", "example"]
    assert points == [90, 90]


def test_images_without_labels_or_views_have_no_generations(tmp_path, unsaved):
    dataset = toy()
    splits = {part: data.Split(getattr(dataset, part).bases) for part in ("train", "test")}
    rows, failed, files = drawn(tmp_path, dataset._replace(**splits, views={}), oracles={})
    assert rows is None and not failed
    assert files == [f"run-{name}.png" for name in ("joint", "relatedness", "training")]


def test_a_table_beside_an_image_is_not_drawn_as_one(tmp_path, monkeypatch, unsaved):
    monkeypatch.setattr(figures, "posterior_distances", lambda *_: [])
    table = data.Split([toy().test.bases[0], torch.rand(300, 4)])
    _, failed, files = drawn(tmp_path, toy()._replace(train=table, test=table, views={}), {})
    assert files == ["run-training.png"] and not failed


def test_without_complete_rows_nothing_is_generated(tmp_path, unsaved):
    mask = torch.tensor([[True, False], [False, True]]).repeat(150, 1)
    rows, failed, files = drawn(tmp_path, toy()._replace(test_mask=mask))
    assert rows is None and not failed
    assert files == [f"run-{name}.png" for name in ("joint", "latent", "training")]


def test_the_gradient_is_that_of_meme_where_it_has_ratios(tmp_path, monkeypatch, unsaved):
    asked, part, dataset = [], {"encoders": torch.zeros(3), "decoders": torch.ones(3)}, toy()
    for other in ("page", "training", "latent_map", "relatedness"):
        monkeypatch.setattr(figures, other, lambda *_: None)
    for ratios in ({"w detached": part, "eq. (7)": part}, {}):
        (tmp_path / str(len(ratios))).mkdir()

        def recorded(model, dataset, ratios=ratios):
            asked.append(dataset)
            return ratios

        monkeypatch.setattr(figures, "gradient_ratios", recorded)
        _, failed, files = drawn(tmp_path / str(len(ratios)), dataset, model="MEME")
        assert ("run-gradient.png" in files) == bool(ratios) and not failed
    assert len(asked) == 2 and all(x.test is dataset.test for x in asked)


def test_the_title_names_what_is_always_shown():
    model = Perfect(SHAPES)
    always = run_of(model, paired=0.25, unpaired="svhn", dataset="there/own.npz")
    assert figures.title(always) == "MEME · own.npz · f = 0.25, svhn always shown"
    assert figures.title(run_of(model, unpaired="svhn")) == "MEME · toy · f = 1"
    assert figures.title(run_of(model, paired=0.5)) == "MEME · toy · f = 0.5, split"
    assert figures.title(run_of(model, masked=True)) == "MEME · toy · masked"
