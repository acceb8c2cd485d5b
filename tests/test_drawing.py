"""Figures: points of few examples, tiles, the legend and the axes of curves."""

import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import drawing


@pytest.fixture
def figures(monkeypatch):
    """The figures that are drawn, instead of their files."""
    pytest.importorskip("matplotlib")
    drawn = []
    monkeypatch.setattr(drawing, "finish", lambda figure, *_, **__: drawn.append(figure))
    yield drawn
    drawing.pyplot().close("all")


@pytest.mark.parametrize("shape, method", [((2, 3), "PCA"), ((40, 1), "PCA"), ((6, 3), "t-SNE")])
def test_a_latent_map_is_drawn_of_few_points(shape, method, figures, monkeypatch):
    class TSNE:
        def __init__(self, perplexity, random_state):
            self.perplexity = perplexity

        def fit_transform(self, z):
            if self.perplexity >= len(z):  # as scikit-learn does
                raise ValueError("perplexity must be less than n_samples")
            return z[:, :2]

    monkeypatch.setitem(sys.modules, "sklearn", types.SimpleNamespace())
    monkeypatch.setitem(sys.modules, "sklearn.manifold", types.SimpleNamespace(TSNE=TSNE))
    z = np.random.default_rng(0).normal(size=shape)
    plane, used = drawing.project(z)
    assert plane.shape == (shape[0], 2) and used == method
    labels = np.arange(shape[0]) % 2
    drawing.latent_map(z, labels, ("a", "b"), "heading", None)
    points = [len(c.get_offsets()) for c in figures[0].axes[0].collections]
    assert points == [shape[0] // 2] * 2


def test_all_tiles_of_a_page_have_one_size(tmp_path):
    pytest.importorskip("matplotlib")
    for height, width in ((28, 28), (32, 32), (224, 224)):
        x = drawing.fit(torch.zeros(2, 1, height, width), 112, 112)
        assert x.shape == (2, 3, 112, 112) and not x.any()
    wide = drawing.fit(torch.zeros(2, 3, 8, 16), 112, 112)
    assert not wide[:, :, 28:84].any() and (wide[:, :, :28] == 1).all()
    rows = [("grey", torch.rand(10, 1, 28, 28)), ("colour", torch.rand(10, 3, 224, 224))]
    drawing.page(rows, "page", tmp_path / "page.png")
    width, height = Image.open(tmp_path / "page.png").size
    assert 1120 < width < 1500 and 224 < height < 400


def test_the_legend_of_many_curves_fits_the_figure(figures):
    lines = [
        ("MEME", f"MEME sampling=balanced kl=sample {k}", {1: {"a": [1.0]}}) for k in range(20)
    ]
    drawing.curves(lines, "heading", None)
    (figure,) = figures
    figure.canvas.draw()
    box = figure.legends[0].get_window_extent()
    assert box.x0 >= 0 and box.x1 <= figure.bbox.x1 and box.y0 >= 0
    assert not figure.axes[0].get_window_extent().overlaps(box)


def test_curves_have_labelled_axes_without_offsets(figures):
    values = {f: {"mnist→svhn": [0.061 + 1e-8 * f, 0.061]} for f in (0.5, 1)}
    drawing.curves([("MEME", "MEME", values)], "heading", None, xlabel="epochs")
    (figure,) = figures
    figure.canvas.draw()
    ax = figure.axes[0]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("epochs", "mnist→svhn")
    assert ax.yaxis.get_offset_text().get_text() == ""
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["1/2", "1"]
