"""Results as text, and every table of results/README.md."""

import functools
import json
import math
import re
import statistics

import pytest

from evaluation import command, papers, tables
from helpers import ROOT, SCRIPTS, train

RESULTS = ROOT / "results"


def result(model="MEME", seed=0, share=0.5, options=None, epoch=5, **flags):
    """A result on glyphs; flags: of its run."""
    run = {"script": model.lower(), "model": model, "dataset": "glyphs", "data": "/data"}
    run |= {"paired": 1.0, "unpaired": "split", "epochs": 5, "batch_size": 64, "seed": seed}
    run |= {"limit": None, "weights": None, "out": f"runs/{model}-{seed}", "device": "cpu"}
    run |= {"amp": False, "compile": False, "resume": None, "decay": 0.0, "clip": 0.0}
    run |= {"options": options or {}, "spec": {"name": "glyphs"}, "masked": False, "note": ""}
    run |= {"examples": 100, "digest": ""} | flags
    return {
        "cross_coherence": {"grey->colour": share},
        "log_likelihood": {"grey": -123.44, "grey|colour": -10.0},
        "log_likelihood_rise": {"grey": 0.3, "grey|colour": 0.96},
        "prior": True,
        "oracle": {"grey": 0.999},
        "data": run["dataset"],
        "run": run,
        "folder": f"runs/{model}-{seed}",
        "epoch": epoch,
        "minutes": 2.0,
        "samples": 1000,
        "examples": 100,
        "pseudo": True,
    }


def grid(text):
    """The Markdown tables of a text. -> list of rows, each a list of cells"""
    blocks = re.findall(r"(?:^\|.*\n)+", text + "\n", re.M)
    return [
        [[cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in block.splitlines()]
        for block in blocks
    ]


def rows(results, index=0, **options):
    """The rows of a table of these results, without its head."""
    return grid(tables.table(results, **options))[index][2:]


# ------------------------------------------------------------------------------------ cells and rows


def test_a_number_is_mean_and_sample_deviation_of_finite_values():
    assert tables.number([0.1, 0.2, 0.6]) == "0.300 ± 0.265"  # √((.04 + .01 + .09) / 2)
    assert tables.number([-9.0, -10.0, math.nan]) == "-9.5 ± 0.7"
    assert tables.number([9.99]) == "9.990" and tables.number([-math.inf]) == "–"


def test_a_row_is_mean_and_deviation_over_the_seeds():
    results = [result(seed=0, share=0.5), result(seed=1, share=0.7), result("MVAE", share=0.1)]
    coherence, likelihoods = grid(tables.table(results))
    head = ["model", "paired", "unpaired", "epochs", "seeds"]
    assert coherence[0] == [*head, "grey→colour"]
    assert coherence[2:] == [
        ["MEME", "1", "split", "5", "2", "0.600 ± 0.141"],
        ["MVAE", "1", "split", "5", "1", "0.100"],
    ]
    assert likelihoods[0] == [*head, "log p(grey)", r"log p(grey\|colour)"]
    assert likelihoods[2] == [
        "MEME",
        "1",
        "split",
        "5",
        "2",
        "-123.4 ± 0.0 (+0.3)",
        "-10.0 ± 0.0 (+1.0)",
    ]


def test_rows_are_ordered_by_model_and_paired_fraction():
    results = [
        result(model, paired=f)
        for model, f in (("MVAE", 0.25), ("MEME", 0.5), ("MVAE", 1), ("MEME", 1))
    ]
    assert [row[:2] for row in rows(results)] == [
        ["MVAE", "1"],
        ["MVAE", "0.25"],
        ["MEME", "1"],
        ["MEME", "0.5"],
    ]


def test_an_interrupted_run_has_a_row_of_its_own():
    results = [result(seed=0), result(seed=1, epoch=3), result(seed=2)]
    assert [row[3:5] for row in rows(results)] == [["5", "2"], ["3 of 5", "1"]]


@pytest.mark.parametrize(
    "flags, shared",
    [
        (dict(out="elsewhere", data="elsewhere", device="cuda", amp=True, resume=""), True),
        (dict(options={"full_gradient": False, "direction": None}), True),  # as missing ones
        (dict(spec={"name": "glyphs", "more": 1}), True),  # follows from the data and the flags
        (dict(batch_size=32), False),
        (dict(limit=50), False),
        (dict(note="other photos"), False),
        (dict(examples=99), False),
        (dict(decay=0.3), False),
        (dict(options={"kl": "sample"}), False),
    ],
)
def test_runs_share_a_row_when_only_seed_and_machine_differ(flags, shared):
    groups = tables.grouped([result(seed=0), result(seed=1, **flags)])
    assert len(groups) == (1 if shared else 2)


def test_zero_is_a_value_of_a_flag():
    assert tables.setting(result())["decay"] == 0.0 and "weights" not in tables.setting(result())


def test_the_same_data_at_another_place_are_the_same_data():
    here, there = result(dataset="/here/own.npz"), result(seed=1, dataset="/there/own.npz")
    assert len(tables.by_data([here, there])) == len(tables.grouped([here, there])) == 2
    for one in (here, there):
        one["run"]["digest"] = "d1"
    assert len(tables.by_data([here, there])) == len(tables.grouped([here, there])) == 1
    there["run"]["digest"] = "d2"
    assert len(tables.by_data([here, there])) == len(tables.grouped([here, there])) == 2


def test_rows_are_named_after_the_flags_that_differ():
    closed, sample = ({"kl": kl, "full_gradient": False} for kl in ("closed", "sample"))
    results = [
        result(options=closed),
        result(options=sample),
        result("MVAE", options={"anneal": 0}),
    ]
    assert [row[0] for row in rows(results)] == ["MEME kl=closed", "MEME kl=sample", "MVAE"]
    same = [result(options=closed), result(options=closed, paired=0.5)]
    assert [row[0] for row in rows(same)] == ["MEME", "MEME"]
    weighted = [result(weights=[3.9183673469387754, 1.0]), result(options={"full_gradient": True})]
    assert [row[0] for row in rows(weighted)] == [
        "MEME weights=3.91837,1",
        "MEME full_gradient=True",
    ]


def test_a_star_marks_the_other_models_objective():
    other, own, elbo = (
        result(model, options={"objective": objective})
        for model, objective in (("VAEVAE", "svae"), ("VAEVAE", "vaevae"), ("MMVAE", "elbo"))
    )
    assert [row[0] for row in rows([other, own, elbo, result()])] == [
        "VAEVAE*",
        "VAEVAE",
        "MMVAE",
        "MEME",
    ]


def test_missing_numbers_leave_a_dash_and_empty_rows_are_left_out():
    both, one, none = result(), result(paired=0.5), result(paired=0.25)
    one["log_likelihood"] = {"grey": None}
    del none["log_likelihood"]
    both["log_likelihood"] = {"grey": -1.0, "colour": math.nan}
    found = rows([one, none, both], index=1)
    assert [row[1:2] + row[5:] for row in found] == [["1", "-1.000 (+0.3)", "–"]]
    one["log_likelihood"] = {"colour": -2.0}
    found = rows([one, none, both], index=1)
    assert [row[1:2] + row[5:] for row in found][1] == ["0.5", "–", "-2.000"]


def test_saved_results_have_no_nan():
    found = tables.finite({"a": math.nan, "b": [(math.inf, 1.0)], "c": {"d": 2}})
    assert found == {"a": None, "b": [[None, 1.0]], "c": {"d": 2}}


def test_a_table_has_at_most_nine_columns():
    keys = [f"k{k}" for k in range(11)]
    results = [result() | {"accuracy": dict.fromkeys(keys, 0.5)} for _ in range(2)]
    results[0]["accuracy"] = {"k3": 0.1}  # the columns are in the order of the fullest result
    parts = [
        table for table in grid(tables.table(results)) if "k0" in table[0] or "k" in table[0][5]
    ]
    heads = [table[0] for table in parts if table[0][5].startswith("k")]
    assert [head[5:] for head in heads] == [keys[:4], keys[4:8], keys[8:]]


def test_each_table_of_the_papers_is_one_table():
    sections = [section for names in tables.TABLES.values() for section in names]
    with_columns = [name for name, (title, _) in tables.SECTIONS.items() if title]
    own = {"regenerated_r2", "regenerated_accuracy", "regenerated_log_loss"}
    own |= {"ridge_r2", "ridge_accuracy", "ridge_log_loss"}
    assert sorted(sections) == sorted(set(with_columns) - own)
    whole = result() | {"self_coherence": {"grey": 0.9}, "latent_accuracy": {"grey": 0.8}}
    whole |= {"joint_coherence": 0.7, "joint_entropy": 2.3, "w2_overlap": {"grey,colour": 0.25}}
    whole["signal_to_noise"] = {"encoders, w detached": 1.2, "decoders, eq. (7)": 0.14}
    text = tables.table([whole])
    heads = [table[0][5:] for table in grid(text)]
    assert heads[:3] == [["grey→colour", "self grey"], ["joint", "joint entropy"], ["latent grey"]]
    assert heads[3:5] == [
        ["W2 overlap grey,colour"],
        ["SNR encoders, w detached", "SNR decoders, eq. (7)"],
    ]
    captions = re.findall(r"^(\w.*)\n\n\|", text, re.M)
    assert captions == [
        "Coherence",
        "Joint samples",
        "Latent accuracy",
        "Relatedness",
        "Signal-to-noise of the gradient",
        "Log-likelihood, nats",
    ]


def test_markdown_aligns_its_columns_and_escapes_bars():
    text = tables.markdown(["a|b", "c"], [["long cell", 1]])
    assert text == "| a\\|b      | c   |\n| --------- | --- |\n| long cell | 1   |"


# -------------------------------------------------------------------------------------------- notes


def test_disagreement_is_printed_and_noted_above_5_percent():
    certain, uncertain = (
        {"disagreement": {"cross_coherence": {"grey->colour": share}}} for share in (0.05, 0.051)
    )
    assert rows([result() | certain])[0][5] == "0.500 (5.0%)"
    assert "in doubt" not in " ".join(tables.notes([result() | certain]))
    results = [result() | certain, result("MVAE") | uncertain]
    assert rows(results)[1][5] == "0.500 (5.1%)"
    assert "Above 5 % a number is in doubt: grey→colour." in tables.notes(results)
    names = "bcdefgha"
    all_doubted = {"disagreement": {"accuracy": dict.fromkeys(names, 0.06)}}
    line = f"Above 5 % a number is in doubt: {', '.join(sorted(names))}."
    assert line in tables.notes([result() | all_doubted])
    both = [result(seed=k) | share for k, share in enumerate((certain, uncertain))]
    assert rows(both)[0][5] == "0.500 ± 0.000 (5.1%)"  # the mean of 5.00 and 5.10


def test_a_likelihood_that_still_rises_is_a_loose_bound():
    loose, tight = result(), result("MVAE")
    assert not [line for line in tables.notes([tight]) if "loose" in line]
    loose["log_likelihood_rise"] = {"grey": 0.99, "grey|colour": 1.01}
    (line,) = [line for line in tables.notes([tight, loose]) if "loose" in line]
    assert line.endswith("a loose lower bound: log p(grey|colour).")


def test_notes_name_what_the_numbers_depend_on():
    other = result("MVAE", limit=256) | {"oracle": {"grey": 0.99}, "samples": 50, "examples": 1}
    other |= {"prior": False, "folder": "runs/few"}
    more = [result() | {"samples": k, "examples": 1} for k in (9, 3000, 70, 11)]
    text = "\n".join(tables.notes([result(), result(seed=1), other, *more]))
    sizes = re.findall(r"K = ([\d,]*\d)", text)
    assert sizes == ["9", "11", "50", "70", "1,000", "3,000"]
    assert "Test accuracy of the oracles: grey 0.999; or grey 0.990.\n" in text
    assert "Trained on the first 256 examples only (--limit): few.\n" in text
    assert "K = 50, 1 test example, spread" in text and "K = 1,000, 100 test examples" in text
    assert "MEME's p(z) is trained by single modalities" in text and "pseudo-likelihood" in text
    plain = result() | {"pseudo": False, "oracle": {}}
    del plain["prior"]  # of cub and spectra
    del plain["log_likelihood"], plain["log_likelihood_rise"]
    assert tables.notes([plain]) == []
    for section, start in (("w2_overlap", "W2 overlap: "), ("signal_to_noise", "SNR: ")):
        (line,) = tables.notes([plain, plain | {section: {"a,b": 0.5}}])
        assert line.startswith(start)


def test_notes_are_120_columns_wide():
    text = tables.wrapped(["word " * 100, "short"])
    assert max(map(len, text.splitlines())) <= 120 and text.endswith("\nshort")
    assert len(text.splitlines()) == 6


# -------------------------------------------------------------------------------- a user's own arrays


def own_result(model="MVAE", seed=0, names="xy", shift=0.0, **flags):
    """Numbers x, z, ... and classes y; every number tells which one it is."""
    found = result(model, seed, dataset="own.npz", digest="d1", **flags)
    for key in ("cross_coherence", "log_likelihood_rise"):
        del found[key]
    found |= {key: {} for key in ("regenerated_r2", "regenerated_accuracy", "regenerated_log_loss")}
    found |= {"ridge_r2": {}, "ridge_accuracy": {}, "ridge_log_loss": {}, "oracle": {}}
    for target in names:
        sources = [*names, *(["the others"] if len(names) > 2 else []), "training mean"]
        for k, source in enumerate(sources):
            ours, theirs = 0.01 * k + shift, 0.5 + 0.01 * k
            scores = ["r2"] if target != "y" else ["accuracy", "log_loss"]
            for score in scores:
                key = f"{source}->{target}"
                is_model = source != "training mean"
                found[f"regenerated_{score}"][key] = ours if is_model else -0.1
                if is_model and source != target:
                    found[f"ridge_{score}"][key] = theirs
    found["latent_accuracy"] = {"x": 0.9}
    return found


def test_several_own_runs_have_a_row_each_below_the_baselines():
    results = [own_result(seed=0), own_result(seed=1, shift=0.1), own_result("SVAE", shift=0.2)]
    text = tables.table([tables.compact(r) for r in results])
    predicted, latent = grid(text)
    assert predicted[0] == [
        "model",
        "paired",
        "unpaired",
        "epochs",
        "seeds",
        "R² x",
        "accuracy y",
        "log loss y",
    ]
    assert predicted[2:] == [
        ["training mean", "1", "", "", "", "-0.100", "-0.100", "-0.100"],
        ["ridge", "1", "", "", "", "0.510", "0.500", "0.500"],
        ["MVAE", "1", "split", "5", "2", "0.060 ± 0.071", "0.050 ± 0.071", "0.050 ± 0.071"],
        ["SVAE", "1", "split", "5", "1", "0.210", "0.200", "0.200"],
    ]
    assert latent[0][5:] == ["latent x"] and len(grid(text)) == 2


def test_of_three_modalities_all_others_together_predict():
    found = rows([own_result(names="xyz")])
    assert [row[0] for row in found] == ["training mean", "ridge", "MVAE"]
    assert found[1][5:] == ["0.530", "0.530", "0.530", "0.530"]  # the fourth source of each
    assert found[2][5:] == ["0.030", "0.030", "0.030", "0.030"]
    hidden = own_result(names="xyz")  # no test row shows all three
    for section in ("regenerated_r2", "ridge_r2"):
        del hidden[section]["the others->x"]
    assert tables.predictions(hidden)["model"].keys() == {"R² z", "accuracy y", "log loss y"}


def test_baselines_are_those_of_the_pairs_that_a_run_saw():
    results = [own_result(paired=0.5, seed=k) for k in range(2)] + [own_result(paired=1.0)]
    results[1]["ridge_r2"]["y->x"] = 0.4
    found = {(row[0], row[1]): row[5] for row in rows(results)}
    assert found["ridge", "0.5"] == "0.455 ± 0.078"  # of both seeds, whose pairs differ
    assert found["ridge", "1"] == "0.510" and found["training mean", "0.5"] == "-0.100"
    whole = rows([own_result(unpaired=unpaired) for unpaired in ("split", "all")])
    assert [row[0] for row in whole] == ["training mean", "ridge", "MVAE", "MVAE"]
    masked = rows([own_result(masked=True, unpaired=unpaired) for unpaired in ("split", "all")])
    assert [row[1:3] for row in masked] == [["masked", "–"]] * 4
    limited = rows([own_result(), own_result(limit=9)])
    assert [row[0] for row in limited][2:] == [
        "training mean limit=9",
        "ridge limit=9",
        "MVAE",
        "MVAE limit=9",
    ]


def test_tables_of_own_arrays_are_120_columns_wide():
    names = "abcdefghijk"
    results = [own_result(seed=k, names=names, shift=k / 3) for k in range(2)]
    text = tables.table([tables.compact(r) for r in results])
    assert max(map(len, text.splitlines())) <= 120
    parts = grid(text)[:-1]
    assert [title for part in parts for title in part[0][5:]] == [f"R² {name}" for name in names]
    assert len(parts) == 3
    for part in parts:
        assert [row[0] for row in part[2:]] == ["training mean", "ridge", "MVAE"]


def test_a_column_moves_to_the_next_table_when_the_line_is_full():
    head = [*tables.HEAD, "c", "d"]
    cells = ["MVAE", 1, "split", 5, 1, "0.5"]
    fixed = sum(len(title) + 3 for title in tables.HEAD) + 1 + len("0.5") + 3
    for length, count in ((120 - fixed - 3, 1), (120 - fixed - 2, 2)):
        parts = tables.fitted(head, [[*cells, "x" * length]])
        assert len(parts) == count
    assert [len(part.splitlines()[0]) for part in tables.fitted(head, [[*cells, "x" * 3]])] == [
        fixed + 6
    ]


# ------------------------------------------------------------------------------------------- reports


def test_a_report_explains_each_number_of_one_run():
    one = own_result(
        names=("0", "y"), epoch=1, options={"anneal": 5, "tight": False, "direction": None}
    )
    one |= {"log_likelihood": {"0|y": -20.04}, "log_likelihood_rise": {"0|y": 1.234}}
    one |= {"effective_sample_size": {"both": 11.4}, "minutes": 0.5}
    lines = tables.report(one).splitlines()
    assert lines[:2] == ["runs/MVAE-0: MVAE on own.npz", "f = 1, seed 0, 1 epoch, 30 s, anneal=5"]
    found = [" ".join(line.split()) for line in lines]
    assert "y → modality 0 0.010" in found and "training mean → modality 0 -0.100" in found
    arrows = [line for line in lines if " → modality 0" in line][:3]  # one section
    assert len(arrows) == 3 and len(set(map(len, arrows))) == 1  # its numbers are aligned
    assert "0|y -20.0 (rises by 1.23 from K/10 to K samples)" in found
    assert "both 11.4" in found and "\\" not in "".join(lines)
    place = found.index("y → modality 0 0.510")  # ridge regression, below its definition
    assert (
        found[found.index("R² of ridge regression from the same inputs, to compare with") + 1]
        == found[place]
    )
    assert max(map(len, lines)) <= 120
    disagreement = {"disagreement": {"cross_coherence": {"grey->colour": 0.071}}}
    text = tables.report(result(epoch=2, paired=0.5) | disagreement | {"minutes": 90.0})
    assert "f = 0.5, split, seed 0, 2 epochs, 90 min" in text
    assert re.search(r"grey → colour +0.500 +\(oracle's members disagree on 7.1%\)", text)


def test_pairs_and_names_are_text():
    assert tables.pairs({"masked": False, "paired": 1.0, "unpaired": "all"}) == "f = 1"
    assert tables.pairs({"masked": False, "paired": 0.25, "unpaired": "all"}) == "f = 0.25, all"
    assert tables.pairs({"masked": True, "paired": 1.0, "unpaired": "split"}) == "masked"
    assert tables.label("7") == "modality 7" and tables.label("rna") == "rna"


# ------------------------------------------------------------------------------------ the papers' rows


def test_the_papers_rows_stand_under_ours():
    run = result("SVAE", dataset="mnist-split", options={"objective": "svae"})
    run["accuracy"] = {"top": 0.5, "bottom": 0.5, "both": 0.5}
    theirs = ["SVAE, paper", "1", "", "", "", "0.872", "0.816", "0.948"]
    assert rows([run], index=1, paper=True)[1] == theirs
    assert "paper" not in tables.table([run])
    assert re.search(r"both +0.500 +paper 0.948\n", tables.report(run, paper=True))
    for flags in (dict(limit=256), dict(note="other images")):
        other = run | {"run": run["run"] | flags}
        assert rows([other], index=1, paper=True)[1][0] == "SVAE, paper (other data)"


@pytest.mark.parametrize(
    "setting, expected",
    [
        (dict(), {"mnist→svhn": "0.625", "latent mnist": "0.908", "MI mnist": "0.075"}),
        (dict(paired=0.25), {"mnist→svhn": "0.503", "latent mnist": "0.893", "MI mnist": None}),
        (dict(paired=0.25, unpaired="mnist"), {"mnist→svhn": "0.485", "MI mnist": "0.101"}),
        (dict(paired=0.5), {"latent mnist": "0.914"}),
        (dict(paired=0.125, unpaired="svhn"), {"MI svhn": "–", "latent mnist": "0.815"}),
        (dict(paired=0.0625), {"latent mnist": "0.856", "latent svhn": "0.316"}),
        (dict(paired=0.25, unpaired="none"), {"mnist→svhn": None}),  # in a figure alone
        (dict(paired=0.3), {"mnist→svhn": None}),
        (dict(options={"direction": "mnist"}), {"mnist→svhn": None}),
        (dict(options={"kl": "sample"}), {"mnist→svhn": None}),
        (dict(model="MMVAE"), {"mnist→svhn": "0.581", "latent mnist": "0.886"}),
        (dict(model="MMVAE", options={"objective": "elbo"}), {"mnist→svhn": None}),
        (
            dict(model="MMVAE", options={"family": "laplace"}),
            {"mnist→svhn": "0.652", "latent mnist": None},
        ),
        (dict(model="SVAE"), {"mnist→svhn": None}),
        (
            dict(model="MVAE", dataset="cub"),
            {"corr. image→caption": "-0.002", "corr. truth": "0.106"},
        ),
        (
            dict(model="VAEVAE", dataset="mnist-split", options={"objective": "svae"}),
            {"both": "0.958"},
        ),
        (
            dict(model="VAEVAE", dataset="mnist-split", options={"variant": "a"}),
            {"both": None},
        ),
        (
            dict(model="SVAE", dataset="mnist-split", options={"prior_expert": True}),
            {"both": None},
        ),
    ],
)
def test_the_papers_numbers_are_those_of_the_setting(setting, expected):
    run = result(**{"dataset": "mnist-svhn"} | setting)["run"]
    found = papers.paper_numbers(run)
    assert {column: found.get(column) for column in expected} == expected


# --------------------------------------------------------------------------------------------- files


def test_a_file_of_results_is_read_line_by_line(tmp_path):
    path = tmp_path / "some.jsonl"
    lines = [json.dumps(result(seed=k)) for k in range(2)]
    path.write_text("\n" + lines[0] + "\n\n" + lines[1] + "\n\n", encoding="utf-8")
    assert tables.read_results(path) == [result(seed=0), result(seed=1)]
    path.write_text(lines[0] + "\n{}\n")
    with pytest.raises(ValueError, match="some.jsonl cannot be read as results"):
        tables.read_results(path)


def test_saving_leaves_all_other_lines_as_they_are(tmp_path):
    path, old = tmp_path / "some.jsonl", json.dumps(result("SVAE"), indent=None, separators=",:")
    path.write_text(f"{old}\n\n{json.dumps(result(seed=1))}\n", encoding="utf-8")
    tables.save_result(path, result(seed=1, share=0.75), log=[{"epoch": 1}])
    other = result(seed=2) | {"folder": "elsewhere/MEME-1"}  # of another run of this name
    tables.save_result(path, other, log=[])
    lines = path.read_text(encoding="utf-8").splitlines()
    assert lines[0] == old and len(lines) == 3
    second = json.loads(lines[1])
    assert second["cross_coherence"] == {"grey->colour": 0.75} and second["log"] == [{"epoch": 1}]
    assert second["folder"] == json.loads(lines[2])["folder"] == "MEME-1"
    assert json.loads(lines[2])["run"]["seed"] == 2


@pytest.mark.parametrize(
    "flags, same",
    [
        (dict(out="elsewhere", data="elsewhere", resume="elsewhere"), True),
        (dict(spec={"name": "glyphs", "stats": math.nan}), True),
        (dict(seed=1), False),
        (dict(paired=0.5), False),
        (dict(amp=True), False),
        (dict(options={"kl": "sample"}), False),
        (dict(dataset="mnist-svhn"), False),
    ],
)
def test_a_run_is_told_by_its_arguments(flags, same):
    one, other = result(), result(**{"model": "MEME"} | flags)
    other["epoch"], other["folder"] = 3, "runs/elsewhere"  # it was resumed in between
    assert len(tables.distinct([one, other])) == (1 if same else 2)
    assert tables.distinct([one, other])[-1]["folder"] == "runs/elsewhere"


def test_flags_of_older_lines_have_todays_names():
    older = {
        "model": "MMVAE",
        "posterior": "laplace",
        "dataset": "glyphs",
        "weights": "3.5,1",
        "clip": None,
    }
    older |= {"options": {"posterior": "laplace", "tight": False}, "tight": False}
    found = tables.renamed({"run": older})["run"]
    assert found["options"] == {"family": "laplace", "tight": False}
    assert "posterior" not in found and "tight" not in found
    assert found["weights"] == [3.5, 1.0] and found["clip"] == 0.0 and found["decay"] == 0.0
    assert found["masked"] is False and found["digest"] == ""
    for model, options, expected in (
        ("VAEVAE", {"subsets": 3}, {"terms": 3}),
        ("SVAE", {}, {"terms": 0}),
        ("MVAE", {}, {"subsets": 0}),
        ("MVAE", {"subsets": 2}, {"subsets": 2}),
        ("SVAE", {"terms": 4}, {"terms": 4}),
    ):
        run = {"model": model, "options": options, "weights": [1.0]}
        assert tables.renamed({"run": run})["run"]["options"] == expected
    assert tables.renamed(result()) == result()


@pytest.mark.parametrize("script", SCRIPTS)
def test_older_lines_are_settings_of_the_same_flags(script, arrays, tmp_path):
    train(script, dataset=arrays, epochs=1, out=tmp_path / "run")
    today = command.load_run(tmp_path / "run").args | {"digest": ""}
    (older, *_) = [
        r
        for r in tables.read_results(RESULTS / "glyphs-joint.jsonl")
        if r["run"]["script"] == script
    ]
    assert tables.setting({"run": today, "epoch": 1}).keys() == tables.setting(older).keys()


# -------------------------------------------------------------------------------- the tables of results/


def commands_and_tables():
    """results/README.md's eval.py commands, each with the tables below it."""
    text = (RESULTS / "README.md").read_text(encoding="utf-8")
    parts = re.split(r"^    python eval\.py (results/\S+\.jsonl --paper)$", text, flags=re.M)
    return list(zip(parts[1::2], parts[2::2]))


@pytest.mark.parametrize("line, text", commands_and_tables(), ids=lambda x: x.split()[0])
def test_the_tables_of_results_are_what_their_command_prints(line, text, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    command.main(line.split())
    printed, stated = grid(capsys.readouterr().out), grid(text)
    assert len(printed) == len(stated)
    for ours, theirs in zip(printed, stated):
        assert ours[0] == theirs[0] and ours[2:] == theirs[2:]


def test_every_file_of_results_has_its_tables():
    files = [line.split()[0] for line, _ in commands_and_tables()]
    assert sorted(files) == sorted(f"results/{path.name}" for path in RESULTS.glob("*.jsonl"))


def test_cells_of_a_table_are_those_of_its_runs():
    """Mean, sample deviation and disagreement, from their definitions."""
    results = tables.read_results(RESULTS / "glyphs.jsonl")
    sections = {
        "grey→colour": ("cross_coherence", "grey->colour"),
        "colour→grey": ("cross_coherence", "colour->grey"),
        "self grey": ("self_coherence", "grey"),
        "self colour": ("self_coherence", "colour"),
        "joint": ("joint_coherence",),
    }
    checked = 0
    for head, _, *found in grid(tables.table(results)):
        for row in found:
            of_row = [
                r
                for r in results
                if [r["run"]["model"], f"{r['run']['paired']:g}", r["run"]["unpaired"]] == row[:3]
            ]
            assert len({r["run"]["seed"] for r in of_row}) == len(of_row) == int(row[4])
            for title in set(head) & sections.keys():
                values = [functools.reduce(dict.get, sections[title], r) for r in of_row]
                shares = [
                    functools.reduce(dict.get, sections[title], r["disagreement"]) for r in of_row
                ]
                numbers = [float(x) for x in re.findall(r"[\d.]+", row[head.index(title)])]
                expected = statistics.mean(values), statistics.stdev(values)
                assert numbers[:2] == pytest.approx(expected, abs=5.1e-4)
                assert numbers[2] == pytest.approx(100 * statistics.mean(shares), abs=0.051)
                checked += 1
    assert checked == 31 * 5


def test_saved_results_are_whole_and_rounded_nowhere():
    for path in RESULTS.glob("*.jsonl"):
        results = tables.read_results(path)
        assert len({r["folder"] for r in results}) == len(tables.distinct(results)) == len(results)
        for r in results:
            assert [row["epoch"] for row in r["log"]] == list(range(1, r["epoch"] + 1))
            assert sum(row["seconds"] for row in r["log"]) / 60 == pytest.approx(r["minutes"])
            assert {"model", "dataset", "options", "spec", "seed"} <= set(r["run"])
            logged = [key for key in r["log"][0] if key.startswith("log_p_")]
            assert len(logged) >= 2
