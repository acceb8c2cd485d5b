"""Tables and curves of results, and every table of results/README.md."""

import functools
import itertools
import json
import math
import re

import pytest

import eval as evaluation
from benchmarks import drawing, figures, tables
from helpers import ROOT


def test_a_number_is_mean_and_sample_deviation_of_finite_values():
    assert tables.number([0.1, 0.2, 0.6]) == "0.300 ± 0.265"  # √((.04 + .01 + .09) / 2)
    assert tables.number([-9.0, -10.0, math.nan]) == "-9.5 ± 0.7"
    assert tables.number([9.99]) == "9.990" and tables.number([-math.inf]) == "–"


def result(model="MEME", seed=0, paired=1.0, share=0.5, dataset="glyphs", **options):
    run = {"model": model, "dataset": dataset, "paired": paired, "unpaired": "split", "epochs": 5}
    run |= {"seed": seed, "out": f"somewhere/{seed}", "options": options, **options}
    metrics = {"cross_coherence": {"grey->colour": share}, "log_likelihood": {"grey": -123.44}}
    about = {"oracle": {"grey": 0.999}, "data": dataset, "run": run, "epoch": run["epochs"]}
    about |= {
        "folder": f"runs/{model}-{seed}",
        "minutes": 2 + seed,
        "samples": 1000,
        "examples": 100,
        "pseudo": True,
    }
    return metrics | about


def test_the_table_is_mean_and_std_over_the_seeds():
    results = [result(seed=0, share=0.5), result(seed=1, share=0.7), result("MVAE", share=0.1)]
    text = tables.table(results)
    assert "| paired | unpaired | epochs | seeds | minutes | grey→colour | log p(grey) |\n" in text
    assert "\n| MEME | 1 | split | 5 | 2 | 2.5 | 0.600 ± 0.141 | -123.4 ± 0.0 |\n" in text
    assert "\n| MVAE | 1 | split | 5 | 1 | 2.0 | 0.100 | -123.4 |\n" in text
    assert "grey 0.999" in text and "pseudo-likelihood" in text and "K = 1,000" in text


def test_rows_are_ordered_by_model_and_paired_fraction():
    found = [("MVAE", 0.25), ("MEME", 0.5), ("MVAE", 1), ("MEME", 1)]
    lines = tables.table([result(model, paired=f) for model, f in found]).splitlines()
    rows = [line.split(" | ")[:2] for line in lines if " | split | " in line]
    assert rows == [["| MVAE", "1"], ["| MVAE", "0.25"], ["| MEME", "1"], ["| MEME", "0.5"]]


def test_rows_are_named_after_the_options_that_differ():
    text = tables.table([result(kl="closed"), result(kl="sample"), result("MVAE", anneal=0)])
    assert "MEME kl=closed |" in text and "MEME kl=sample |" in text and "| MVAE |" in text
    assert "kl=" not in tables.table([result(kl="closed"), result(kl="closed", paired=0.5)])
    own, other = (result("VAEVAE", objective=o) for o in ("vaevae", "svae"))
    text = tables.table([other, own, result("MMVAE", objective="iwae")])
    assert re.findall(r"^\| (\S+) \| 1", text, re.M) == ["VAEVAE*", "VAEVAE", "MMVAE"]


def test_an_unset_flag_equals_a_missing_one():
    text = tables.table([result(clip=None), result(seed=1), result(seed=2, clip=9.0)])
    assert re.findall(r"^\| (MEME.*?) \|", text, re.M) == ["MEME", "MEME clip=9.0"]
    assert "| 5 | 2 | 2.5 |" in text


def test_the_accuracies_of_all_oracles_are_printed():
    other = result("MVAE") | {"oracle": {"grey": 0.99}}
    text = tables.table([result(), result(seed=1), other])
    assert "oracles: grey 0.999; or grey 0.990.\n" in text


def test_disagreement_is_printed_and_noted_above_5_percent():
    sure, unsure = (
        {"disagreement": {"cross_coherence": {"grey->colour": s}}} for s in (0.01, 0.07)
    )
    assert "| 0.500 (1.0%) |" in tables.table([result() | sure])
    assert "in doubt" not in tables.table([result() | sure])
    text = tables.table([result() | sure, result("MVAE") | unsure])
    assert "| 0.500 (7.0%) |" in text and "in doubt: grey→colour" in text
    assert "pseudo-samples" in tables.table([result() | {"prior": False}])


def test_missing_numbers_leave_a_dash():
    bare, broken = result(seed=3, paired=0.25), result(paired=0.5, share=math.nan)
    del bare["log_likelihood"]
    lines = tables.table([result(), bare, broken]).splitlines()
    assert "| MEME | 0.25 | split | 5 | 1 | 5.0 | 0.500 | – |" in lines
    assert "| MEME | 0.5 | split | 5 | 1 | 2.0 | – | -123.4 |" in lines
    assert json.loads(json.dumps(tables.finite(broken | {"log": [broken]}), allow_nan=False))


def test_the_papers_rows_stand_under_ours():
    run = result("SVAE", dataset="mnist-split")
    run["accuracy"] = {"top": 0.5, "bottom": 0.5, "both": 0.5}
    row = [x for x in tables.table([run], paper=True).splitlines() if "SVAE, paper" in x]
    assert row == ["| SVAE, paper | 1 |  |  |  |  |  | 0.872 | 0.816 | 0.948 |  |"]
    assert "paper" not in tables.table([run])
    run |= {"run": run["run"] | {"limit": 256}, "folder": "runs/few"}
    text = tables.table([run], paper=True)
    assert "SVAE, paper (other data)" in text and "first 256 examples only (--limit): few." in text


@pytest.mark.parametrize(
    "setting, shown",
    [
        (dict(), "MEME, paper 1 0.625 0.908"),
        (dict(paired=0.25), "MEME, paper 0.25 0.503 0.893"),
        (dict(paired=0.25, unpaired="mnist"), "MEME, paper 0.25 0.485 0.844"),
        (dict(paired=0.25, unpaired="none"), ""),  # in a figure alone
        (dict(paired=0.3), ""),
        (dict(options={"direction": "mnist"}), ""),
        (dict(model="MMVAE"), "MMVAE, paper 1 0.581 0.886"),
        (dict(model="MMVAE", options={"posterior": "laplace"}), "MMVAE, Laplace, paper 1 0.652 "),
        (dict(model="SVAE"), ""),
    ],
)
def test_the_papers_row_is_that_of_the_setting(setting, shown):
    run = result(dataset="mnist-svhn")["run"] | setting
    row = tables.paper_row(run, ["mnist→svhn", "latent mnist"])
    assert " ".join(row[:2] + row[6:]) == shown


# --------------------------------------------------------------------- the tables of results/

RESULTS = ROOT / "results"


def printed_tables(text):
    """The tables in Markdown. -> list of rows, each a list of cells"""
    blocks = re.findall(r"(?:^\|.*\n)+", text + "\n", re.M)
    return [[re.split(r"(?<!\\)\|", row)[1:-1] for row in block.splitlines()] for block in blocks]


def commands_and_tables():
    """results/README.md's tables, each with the last eval.py command above it."""
    text = (RESULTS / "README.md").read_text(encoding="utf-8")
    pattern = r"^    python eval\.py (results/\S+\.jsonl --paper)$|((?:^\|.*\n)+)"
    command, found = None, []
    for match in re.finditer(pattern, text, re.M):
        if match[1]:
            command = match[1]
        else:
            found.append((command, match[2]))
            command = None
    return found


@pytest.mark.parametrize("command, stated", commands_and_tables())
def test_a_table_of_results_is_what_its_command_prints(command, stated, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    evaluation.main(command.split())
    (printed,), (stated,) = printed_tables(capsys.readouterr().out), printed_tables(stated)
    assert len(printed) == len(stated)
    for ours, theirs in zip(printed, stated):
        assert ours == theirs


def test_every_file_of_results_has_its_table():
    files = [command.split()[0] for command, _ in commands_and_tables()]
    assert sorted(files) == sorted(f"results/{path.name}" for path in RESULTS.glob("*.jsonl"))


def cell(results, model, paired, keys):
    """The numbers in a table's cell, from their definitions: mean, sample deviation, disagreement
    in percent. keys: the path to a number in a result"""
    values, shares = [], []
    for r in results:
        if (r["run"]["model"], r["run"]["paired"]) == (model, paired):
            values.append(functools.reduce(dict.get, keys, r))
            shares.append(functools.reduce(dict.get, keys, r["disagreement"]))
    mean = sum(values) / len(values)
    deviation = (sum((x - mean) ** 2 for x in values) / (len(values) - 1)) ** 0.5
    return [mean, deviation, 100 * sum(shares) / len(shares)]


def test_cells_of_the_first_table_are_those_of_its_runs():
    results = tables.read_results(RESULTS / "glyphs.jsonl")
    (table,) = printed_tables(tables.table(results))
    head, _, *rows = table
    sections = {
        " grey→colour ": ("cross_coherence", "grey->colour"),
        " colour→grey ": ("cross_coherence", "colour->grey"),
        " self grey ": ("self_coherence", "grey"),
        " self colour ": ("self_coherence", "colour"),
        " joint ": ("joint_coherence",),
    }
    checked = 0
    for row in rows:
        model, paired = row[0].strip(), float(row[1])
        for title, keys in sections.items():
            text = row[head.index(title)]
            if text != " – " and (model, paired) != ("SVAE", 1):  # two rows: split and all
                numbers = [float(number) for number in re.findall(r"[\d.]+", text)]
                expected = cell(results, model, paired, keys)
                assert numbers[:2] == pytest.approx(expected[:2], abs=5.1e-4)
                assert numbers[2] == pytest.approx(expected[2], abs=0.051)
                checked += 1
    assert checked == 29 * 5 - 1  # MEME at f = 1 has no prior


def test_saved_results_are_whole_and_rounded_nowhere():
    for path in RESULTS.glob("*.jsonl"):
        results = tables.read_results(path)
        assert len({r["folder"] for r in results}) == len(results)
        for r in results:
            assert [row["epoch"] for row in r["log"]] == list(range(1, r["epoch"] + 1))
            assert sum(row["seconds"] for row in r["log"]) / 60 == pytest.approx(r["minutes"])
            assert {"model", "dataset", "options", "spec", "seed"} <= set(r["run"])
            logged = [key for key in r["log"][0] if key.startswith("log_p_")]
            assert len(logged) >= 2


# ----------------------------------------------------------------------------- curves


def test_a_curve_has_a_line_per_model_setting_and_fraction(tmp_path, monkeypatch):
    plt = pytest.importorskip("matplotlib.pyplot")
    monkeypatch.setattr(plt, "close", lambda figure: None)

    def lines(results, **options):
        assert not figures.draw_results(results, {}, tmp_path, **options)
        ax = plt.gcf().axes[0]
        return {a.get_label(): (a.get_color(), *map(tuple, a.get_data())) for a in ax.lines}

    grid = itertools.product(("MEME", "MVAE"), (0, 2), (0.25, 1))
    found = lines([result(model, seed, f, f / 2 + seed / 100) for model, seed, f in grid])
    assert found["MEME split"] == (drawing.COLOURS["MEME"], (0.25, 1), (0.135, 0.51))
    assert found["MVAE split"][0] == drawing.COLOURS["MVAE"] and len(found) == 2
    runs = [(1.0, 0.7, "none", 5), (0.5, 0.6, "none", 5), (1.0, 0.9, "all", 5)]
    runs += [(0.5, 0.8, "all", 5), (0.5, 0.1, "all", 1), (0.5, 0.2, "split", 5)]
    found = lines([result("SVAE", 0, f, share, unpaired=u, epochs=e) for f, share, u, e in runs])
    assert {label: line[1:] for label, line in found.items()} == {
        "SVAE epoch=5 all": ((0.5, 1), (0.8, 0.9)),
        "SVAE epoch=1 all": ((0.5,), (0.1,)),
        "SVAE epoch=5 none": ((0.5, 1), (0.6, 0.7)),
        "SVAE epoch=5 split": ((0.5, 1), (0.2, 0.7)),  # the end is that of none
    }
    pseudo = [result(paired=f, share=f / n, pseudo_samples=n) for f in (0.25, 0.5) for n in (1, 10)]
    found = lines(pseudo, against="pseudo_samples")
    assert found["MEME split f = 0.25"][1:] == ((1, 10), (0.25, 0.025))
    assert found["MEME split f = 0.5"][1:] == ((1, 10), (0.5, 0.05))
    epochs = [result(share=0.1 * n, epochs=n) for n in (1, 2)]
    assert lines(epochs, against="epochs")["MEME split f = 1"][1:] == ((1, 2), (0.1, 0.2))
    for flag in ("spec", "nothing", "unpaired"):
        with pytest.raises(ValueError, match="--against must be a flag with numbers"):
            lines(pseudo, against=flag)
    assert [*map(drawing.fraction, (0, 0.015625, 0.1, 0.5, 1, 30))] == "0 1/64 0.1 1/2 1 30".split()
    monkeypatch.undo()
    plt.close("all")
