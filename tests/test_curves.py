"""Figures of several runs: curves against a flag, the same images through every model."""

import itertools
import math

import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex

from evaluation import curves, figures
from helpers import SHAPES, Perfect, toy


@pytest.fixture
def shown(monkeypatch):
    """The figures, instead of files."""
    kept = []
    monkeypatch.setattr(figures, "finish", lambda figure, *_, **__: kept.append(figure))
    yield kept
    figures.pyplot().close("all")


def result(model="MEME", seed=0, paired=1.0, share=0.5, epochs=5, unpaired="split", **options):
    run = {"model": model, "dataset": "glyphs", "paired": paired, "unpaired": unpaired}
    run |= {"epochs": epochs, "seed": seed, "out": f"somewhere/{seed}", "options": options}
    run |= {"digest": "", "masked": False, "note": "", "spec": {"name": "glyphs"}}
    return {
        "cross_coherence": {"grey->colour": share, "colour->grey": 0.9},
        "latent_accuracy": {"grey": share / 2},
        "oracle": {"grey": 0.75, "colour": 0.625},
        "data": "glyphs",
        "run": run,
        "epoch": epochs,
        "folder": f"runs/{model}-{seed}-{paired}",
    }


def lines_of(results, against="paired"):
    """{label: {x: cross coherences}}"""
    return {
        line.label: {
            x: [r["cross_coherence"]["grey->colour"] for r in group]
            for x, group in sorted(line.results.items())
        }
        for line in curves.curves(results, against)
    }


def test_a_curve_has_a_line_per_model_and_setting():
    grid = itertools.product(("MEME", "MVAE"), (0, 2), (0.25, 1))
    results = [result(model, seed, f, f / 2 + seed / 100) for model, seed, f in grid]
    expected = {0.25: [0.125, 0.145], 1: [0.5, 0.52]}
    assert lines_of(results) == {"MEME, split": expected, "MVAE, split": expected}
    assert [line.model for line in curves.curves(results)] == ["MEME", "MVAE"]
    masked = [r | {"run": r["run"] | {"masked": True}} for r in results]
    assert not curves.curves(masked) and not curves.curves(results[1::2])  # f = 1 alone


def test_runs_at_one_end_all_lines_but_those_of_all():
    runs = [(1.0, 0.7, "none", 5), (0.5, 0.6, "none", 5), (1.0, 0.9, "all", 5)]
    runs += [(0.5, 0.8, "all", 5), (0.5, 0.1, "all", 1), (0.5, 0.2, "split", 5)]
    results = [result("SVAE", 0, f, share, unpaired=u, epochs=e) for f, share, u, e in runs]
    results += [result("MVAE", paired=0.5, share=0.3), result("MVAE", unpaired="rest", share=0.4)]
    assert lines_of(results) == {
        "SVAE, none, 5 epochs": {0.5: [0.6], 1: [0.7]},
        "SVAE, all, 5 epochs": {0.5: [0.8], 1: [0.9]},
        "SVAE, all, 1 epoch, f = 1/2 only": {0.5: [0.1]},
        "SVAE, split, 5 epochs": {0.5: [0.2], 1: [0.7]},  # the end is that of none
        "MVAE, split, 5 epochs": {0.5: [0.3], 1: [0.4]},
    }
    lone = [result(paired=0.5), result("VAEVAE", unpaired="all"), result("SVAE", unpaired="rest")]
    labels = [line.label for line in curves.curves(lone)]
    assert labels == ["MEME, split, f = 1/2 only", "VAEVAE, all, f = 1 only", "SVAE, f = 1 only"]


def test_labels_name_flags_where_they_are_the_same_without():
    results = [
        result(paired=f, kl=kl, unpaired="grey") for f in (0.5, 0.25) for kl in ("closed", "sample")
    ]
    assert list(lines_of(results)) == [
        "MEME kl=closed, grey always shown",
        "MEME kl=sample, grey always shown",
    ]
    different = [result(paired=0.5, kl="closed"), result(paired=0.25, kl="closed", unpaired="grey")]
    assert list(lines_of(different)) == [
        "MEME, split, f = 1/2 only",
        "MEME, grey always shown, f = 1/4 only",
    ]


def test_curves_against_a_flag_have_a_line_per_fraction():
    pseudo = [result(paired=f, share=f / n, pseudo_samples=n) for f in (0.25, 0.5) for n in (1, 10)]
    assert lines_of(pseudo, "pseudo_samples") == {
        "MEME, split, f = 1/4": {1: [0.25], 10: [0.025]},
        "MEME, split, f = 1/2": {1: [0.5], 10: [0.05]},
    }
    epochs = [result(share=0.1 * n, epochs=n) for n in (1, 2)]
    assert lines_of(epochs, "epochs") == {"MEME, split, f = 1": {1: [0.1], 2: [0.2]}}


@pytest.mark.parametrize("flag", ["options", "nothing", "unpaired"])
def test_curves_need_a_flag_with_numbers(flag):
    with pytest.raises(ValueError, match="--against must be a flag with numbers .*paired"):
        curves.curves([result(paired=f) for f in (0.5, 1.0)], flag)


def test_numbers_of_a_result_stand_beside_chance_and_real_data():
    numbers, levels = curves.numbers_of(result(share=0.5) | {"joint_coherence": None})
    assert numbers == {
        ("cross_coherence", "grey->colour"): 0.5,
        ("cross_coherence", "colour->grey"): 0.9,
        ("latent_accuracy", "grey"): 0.25,
    }
    assert levels["cross_coherence", "grey->colour"] == {"chance": 0.1, "real images": 0.625}
    assert levels["cross_coherence", "colour->grey"] == {"chance": 0.1, "real images": 0.75}
    assert levels["latent_accuracy", "grey"] == {"chance": 0.1}
    halves = {"accuracy": {"top": 0.3}, "oracle": {"image": 0.875}, "run": result()["run"]}
    assert curves.numbers_of(halves)[1]["accuracy", "top"] == {"chance": 0.1, "real images": 0.875}
    birds = {
        "correlation": {"joint": 0.2, "truth": 0.5},
        "chance_correlation": {"joint": 0.1, "truth": 0},
    }
    numbers, levels = curves.numbers_of(birds | {"oracle": {}, "run": result()["run"]})
    assert numbers == {("correlation", "joint"): 0.2}
    assert levels["correlation", "joint"] == {"chance": 0.1, "real pairs": 0.5}


def test_own_arrays_are_drawn_as_predicted_from_all_others():
    own = {
        "regenerated_r2": {
            "a->a": 0.9,
            "b->a": 0.3,
            "the others->a": 0.5,
            "training mean->a": -0.1,
        },
        "regenerated_accuracy": {"the others->b": 0.7, "training mean->b": 0.6},
        "ridge_r2": {"the others->a": 0.4},
    }
    own["regenerated_r2"] |= {"the others->c": 0.2, "training mean->c": 0.0}
    numbers, levels = curves.numbers_of(own | {"oracle": {}, "run": result()["run"]})
    assert numbers == {
        ("predictions", "R² a"): 0.5,
        ("predictions", "R² c"): 0.2,
        ("predictions", "accuracy b"): 0.7,
    }
    assert levels["predictions", "R² a"] == {"training mean": -0.1, "ridge": 0.4}


def curve_axes(shown, results, against="paired"):
    lines = curves.curves(results, against)
    figures.draw_curves(lines, "glyphs", "paired fraction f", None)
    return shown[-1]


def test_points_are_means_with_deviations_side_by_side(shown):
    shares = {
        ("MEME", 0.25): (0.2, 0.4),
        ("MEME", 1): (0.5, 0.5),
        ("MVAE", 0.25): (0.2, 0.4),
        ("MVAE", 1): (0.6,),
    }
    results = [result(m, seed, f, x) for (m, f), xs in shares.items() for seed, x in enumerate(xs)]
    first, second, third = curve_axes(shown, results).axes
    assert first.get_ylabel() == "cross coherence grey→colour ↑"
    assert first.get_xlabel() == "paired fraction f"
    assert [tick.get_text() for tick in first.get_xticklabels()] == ["1/4", "1"]
    (left, right), found = np.log10([0.25, 1]), {}
    for model, (points, _, (bars,)) in zip(("MEME", "MVAE"), first.containers):
        found[model] = points.get_xdata()
        assert to_hex(points.get_color()).upper() == figures.COLOURS[model].upper()
        means = [np.mean(shares[model, f]) for f in (0.25, 1)]
        assert points.get_ydata() == pytest.approx(means)
        spread = [segment[1, 1] - segment[0, 1] for segment in bars.get_segments()]
        assert spread == pytest.approx([2 * math.sqrt(0.02), 0], abs=1e-9)
    shift = found["MVAE"] - found["MEME"]
    assert shift == pytest.approx([shift[0]] * 2) and 0 < shift[0] < 0.2 * (right - left)
    assert (found["MVAE"] + found["MEME"]) / 2 == pytest.approx([left, right])
    assert first.get_ylim() == second.get_ylim() != third.get_ylim()  # the same section


def test_points_of_near_ticks_stay_apart(shown):
    fractions = (0.6, 1 / 64, 0.5, 1, 0.1, 0.25, 0.125)
    results = [result(m, paired=f) for m in ("MEME", "MVAE", "SVAE") for f in fractions]
    ax = curve_axes(shown, results).axes[0]
    assert ax.get_xticks() == pytest.approx(np.log10(sorted(fractions)))
    lines = [points.get_xdata() for points, _, _ in ax.containers]
    for k in range(len(fractions) - 1):
        assert max(x[k] for x in lines) < min(x[k + 1] for x in lines)


def with_coherence(shares):
    """Results at f = 1/4 and 1/2 with one cross coherence each, and a latent accuracy of 1/4."""
    results = [result(paired=f) for f in (0.25, 0.5)]
    return [r | {"cross_coherence": {"grey->colour": share}} for r, share in zip(results, shares)]


def test_levels_are_drawn_where_the_points_come_near(shown):
    figure = curve_axes(shown, with_coherence((0.25, 0.5)))
    ax = figure.axes[0]
    lines = {line.get_label(): line for line in ax.lines}
    levels = {name: lines[name].get_ydata()[0] for name in ("chance", "real images")}
    assert levels == {"chance": 0.1, "real images": 0.625}
    assert (lines["chance"].get_linestyle(), lines["real images"].get_linestyle()) == (":", "-.")
    low, high = ax.get_ylim()
    assert low < 0.1 and high > 0.625
    texts = {text.get_text() for text in figure.legends[0].get_texts()}
    assert texts == {"MEME, split", "chance", "real images"}
    ax = curve_axes(shown, with_coherence((0.99, 0.995))).axes[0]
    assert ax.get_ylim()[0] > 0.9  # chance would leave no room for the points


def test_the_legend_of_many_curves_fits_the_figure(shown):
    results = [
        result(paired=f, kl=f"a long name {k}", unpaired="grey")
        for k in range(20)
        for f in (0.5, 1)
    ]
    figure = curve_axes(shown, results)
    markers = [points.get_marker() for points, _, _ in figure.axes[0].containers]
    assert markers[:6] == [*figures.MARKERS, figures.MARKERS[0]]  # lines of one colour
    figure.canvas.draw()
    box = figure.legends[0].get_window_extent()
    assert box.x0 >= 0 and box.x1 <= figure.bbox.x1 and box.y0 >= 0
    assert not any(ax.get_window_extent().overlaps(box) for ax in figure.axes)


def test_pages_of_most_pairs_and_first_seeds_are_compared():
    found = [
        ("MEME", 1, 1.0),
        ("MEME", 0, 1.0),
        ("MVAE", 2, 1.0),
        ("MVAE", 0, 0.5),
        ("SVAE", 0, 1.0),
    ]
    results = [result(*run) for run in found]
    pages = {r["folder"]: r["folder"] for r in results[:4]}  # of SVAE there are no images
    rows, pairs = figures.compare_models(results, pages)
    assert rows == {"MEME": "runs/MEME-0-1.0", "MVAE": "runs/MVAE-2-1.0"} and pairs == "f = 1"
    assert figures.compare_models(results, {}) == ({}, "")


def test_results_of_a_data_set_have_curves_and_a_page(tmp_path):
    results = [result("MEME"), result("MVAE"), result("MVAE", paired=0.5)]
    rows = figures.generations(Perfect(SHAPES), toy(), torch.arange(300))
    pages = {r["folder"]: rows for r in results}
    assert not figures.draw_results(results, pages, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"glyphs-paired.png", "glyphs-models.png"}
    assert not figures.draw_results(results[:1], pages, tmp_path / "one")
    assert not (tmp_path / "one").exists()  # nothing to compare


def test_the_axis_of_curves_has_the_name_of_the_flag(monkeypatch, tmp_path):
    axes = []
    monkeypatch.setattr(figures, "draw_curves", lambda lines, name, *where: axes.append(where))
    for against in ("paired", "pseudo_samples"):
        results = [result("MEME", **{against: value}) for value in (1, 0.5)]
        assert not figures.draw_results(results, {}, tmp_path, against)
    assert axes == [("paired fraction f", tmp_path / "glyphs-paired.png"),
                    ("pseudo-samples", tmp_path / "glyphs-pseudo-samples.png")]  # fmt: skip


def test_small_powers_of_two_are_written_as_fractions():
    numbers = (0, 0.015625, 0.1, 0.5, 1, 30)
    assert [*map(curves.fraction, numbers)] == "0 1/64 0.1 1/2 1 30".split()
