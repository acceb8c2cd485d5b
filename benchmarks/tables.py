"""Metrics as text: a table of several runs, or the list of one. What is in it was computed elsewhere.

    table(results, paper=False), listing(result, paper=False), markdown(head, rows)    -> text

A result is what metrics.json of a run holds. Runs of one setting, which differ in the seed alone,
are one row, mean ± standard deviation.
"""

import json
import math
import textwrap
from pathlib import Path

import numpy as np

import data
from benchmarks import drawing, npz

SECTIONS = {  # the keys of metrics.json: a column of the table, if it has one, and its meaning
    "cross_coherence": (
        "{}",
        "Cross coherence: the share of test images whose digit the oracle reads in the image that is "
        "generated from them in the other modality; by chance 0.1",
    ),
    "self_coherence": ("self {}", "Self coherence: the same, in the image regenerated from itself"),
    "joint_coherence": (
        "joint",
        "Joint coherence: the share of samples of p(z) that give images of the same digit",
    ),
    "joint_entropy": (
        "joint entropy",
        "Entropy of those digits, nats: 2.303 if all come up alike, 0 if it is always the same one",
    ),
    "accuracy": (
        "{}",
        "Accuracy: the share of test images whose digit the oracle reads in the whole image that is "
        "regenerated from these parts",
    ),
    "regenerated_r2": (
        "R² {}",
        "R² of regenerated numbers, mean over features, or of all pixels: 1 is exact, 0 their test mean",
    ),
    "regenerated_accuracy": (
        "right {}",
        "Accuracy of regenerated bits or classes: the share that is right",
    ),
    "regenerated_log_p": (
        None,
        "log p(x|z), nats, of x right of the arrow, z from what is left of it: how likely x is found",
    ),
    "latent_accuracy": (
        "latent {}",
        "Latent accuracy: the share of labels that a linear classifier reads in z ~ q(z|modality)",
    ),
    "mutual_information": (
        "MI {}",
        "Mutual information of digit and oracle, nats: lower where an image looks more real",
    ),
    "correlation": (
        "corr. {}",
        "Correlation of photo and caption, one of them generated; truth: of the test pairs",
    ),
    "chance_correlation": (
        "chance {}",
        "The same of all photos with all captions, whether they belong together or not",
    ),
    "rank": ("{}", "Rank of the true candidate: the share among the first so many, the median"),
    "bits": ("bit {}", "Bits of fingerprints, predicted from spectra"),
    "log_likelihood": (
        "log p({})",
        "Log-likelihood of test examples, nats, importance-weighted: higher is better; x|y: given y",
    ),
}


def by_key(value):
    """A section of metrics.json, which may be one number. -> {key: number}"""
    return value if isinstance(value, dict) else {"": value}


def heading(title, key):
    return title.format(key.replace("->", "→").replace("|", "\\|"))  # a bar would end the column


def columns(metrics):
    """metrics.json as the columns of a table, in order. -> {title: number}"""
    found = {}
    for section, (title, _) in SECTIONS.items():
        for key, score in by_key(metrics.get(section, {})).items() if title else ():
            found[heading(title, key)] = math.nan if score is None else score
    return found


def setting(result):
    """What two runs in one row of a table share: all but the seed and where it ran; without flags
    that are not set, as those younger than a run. -> dict"""
    free = ("seed", "out", "data", "device", "amp", "compile", "resume", "options")
    found = result["run"] | {"epoch": result["epoch"]}
    return {key: value for key, value in found.items() if key not in free and value is not None}


def grouped(results):
    """Lists of results of the same setting, which differ in the seed alone."""
    groups = {}
    for result in results:
        key = json.dumps(setting(result), sort_keys=True)
        groups.setdefault(key, []).append(result)
    return list(groups.values())


def starred(run):
    """The model of a run, with a star if it has the other's bounds, as in [poe]: VAEVAE*."""
    star = {"SVAE": "vaevae", "VAEVAE": "svae"}.get(run["model"], "")
    return run["model"] + "*" * (run.get("objective") == star)


def in_order(groups):
    """Models as they come first; of each, whole pairs first."""
    models = list(dict.fromkeys(starred(group[0]["run"]) for group in groups))

    def place(group):
        run = group[0]["run"]
        return models.index(starred(run)), run["unpaired"], -run["paired"]

    return sorted(groups, key=place)


def row_names(groups, shown=("paired", "unpaired", "epoch")):
    """The model of each group and the flags in which a model's groups differ: MEME kl=sample.

    shown: the flags that are told elsewhere, in columns of their own.
    """
    shown = {*shown, "epochs", "spec", "examples", "note"}
    settings, names = [setting(group[0]) for group in groups], []
    for own in settings:
        rivals = [other for other in settings if starred(other) == starred(own)]
        flags = [k for k in own if k not in shown and own[k] is not False]
        flags = [k for k in flags if any(rival.get(k) != own[k] for rival in rivals)]
        names.append(" ".join([starred(own), *(f"{k}={own[k]}" for k in flags)]))
    return names


def paper_name(run):
    """What the papers call a run's model. None: they have no such model."""
    options = run["options"]
    others = ("variant", "a"), ("prior_expert", True), ("objective", "elbo"), ("kl", "sample")
    if options.get("direction") or any(options.get(k) == value for k, value in others):
        return None
    if options.get("posterior") == "laplace":
        return f"{run['model']}, Laplace"
    return starred(run)


def paper_row(run, titles):
    """What the papers report for the setting of a run, in the columns of its table; [] if nothing.

    With every pair complete `unpaired` does not count, and the first of what they give is taken.
    """
    cells, name = {}, paper_name(run)
    rows = getattr(data.benchmark(run["dataset"]), "PAPER", ())
    for dataset, model, unpaired, column, numbers in rows:
        series = dict(zip((1, 1 / 2, 1 / 4, 1 / 8, 1 / 16), numbers.split()))
        same = run["paired"] == 1 or unpaired == run["unpaired"]
        if (dataset, model) == (run["dataset"], name) and same and run["paired"] in series:
            cells.setdefault(column, series[run["paired"]].replace(".", "0.", 1))
    shown = [cells.get(t, "") for t in titles]
    head = [f"{name}, paper", f"{run['paired']:g}", "", "", "", ""]
    return head + shown if any(shown) else []


def number(values):
    """Mean ± standard deviation of the runs' values, nats with one digit, shares with three."""
    values = [v for v in values if math.isfinite(v)]
    if not values:
        return "–"
    digits = 1 if max(abs(v) for v in values) >= 10 else 3
    spread = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{spread}"


def markdown(head, rows):
    """A table of cells, which may be numbers."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, cells)) + " |" for cells in lines)


def table(results, paper=False):
    """Markdown: for each data set one table, a row for the runs of a setting, over their seeds."""
    lines = []
    for name in dict.fromkeys(r["data"] for r in results):
        chosen = [r for r in results if r["data"] == name]
        groups = in_order(grouped(chosen))
        titles = list(dict.fromkeys(t for r in chosen for t in columns(r)))
        head, rows = ["model", "paired", "unpaired", "epochs", "seeds", "minutes", *titles], []
        for model, group in zip(row_names(groups), groups):
            run, cells = group[0]["run"], [columns(r) for r in group]
            epoch, epochs = group[0]["epoch"], str(run["epochs"])
            epochs = epochs if epoch == run["epochs"] else f"{epoch} of {epochs}"
            minutes = f"{np.mean([r['minutes'] for r in group]):.1f}"
            seeds = len({r["run"]["seed"] for r in group})
            pairs = [f"{run['paired']:g}", run["unpaired"]]
            pairs = ["masked", "–"] if drawing.is_masked(run) else pairs
            row = [model, *pairs, epochs, seeds, minutes]
            disputed = [columns(r.get("disputed", {})) for r in group]
            for t in titles:
                cell = number([c.get(t, math.nan) for c in cells])
                shares = [d[t] for d in disputed if t in d]
                row.append(f"{cell} ({np.mean(shares):.1%})" if shares else cell)
            rows.append(row)
            if paper and (row := paper_row(run, titles)):
                row[0] += " (other data)" if ":" in name or run.get("limit") else ""
                rows.append(row)
        lines += [f"**{name}**", "", markdown(head, rows), "", *notes(chosen), ""]
    return "\n".join(lines)


def listing(result, paper=False):
    """The metrics of one run, a line each, below what they are. -> text"""
    run, own, lines = result["run"], columns(result), []
    papers = dict(zip(own, paper_row(run, list(own))[6:])) if paper else {}
    flags = [f"{k}={v}" for k, v in run["options"].items() if v not in (None, False)]
    about = [drawing.pairs(run), f"seed {run['seed']}", f"{result['epoch']} epochs"]
    about += [f"{result['minutes']:.1f} minutes", *flags]
    lines.append(f"{result['folder']}: {run['model']} on {result['data']}")
    lines.append(", ".join(about))
    for section, (title, meaning) in SECTIONS.items():
        scores = by_key(result.get(section, {}))
        disputed = by_key(result.get("disputed", {}).get(section, {}))
        names = {key: " → ".join(map(drawing.label, key.split("->"))) or title for key in scores}
        lines += ["", *textwrap.wrap(meaning, 100)] if scores else []
        for key, score in scores.items():
            cell = number([math.nan if score is None else score])
            line = f"    {names[key]:<{max(map(len, names.values()))}} {cell:>9}"
            line += f"   ({disputed[key]:.1%} in dispute)" if key in disputed else ""
            there = papers.get(heading(title, key)) if title else None
            lines.append(line + (f"   paper {there}" if there else ""))
    return "\n".join([*lines, "", *notes([result])])


def accuracies(result):
    """The test accuracy of the oracles that read a result, as text."""
    return ", ".join(f"{view} {share:.3f}" for view, share in result["oracle"].items())


def notes(results):
    """What has to be known to read a table of these results. -> list of lines"""
    lines = []
    if oracles := list(dict.fromkeys(accuracies(r) for r in results if r.get("oracle"))):
        lines.append(f"Test accuracy of the oracles: {'; or '.join(oracles)}.")
    if shares := [columns(r["disputed"]) for r in results if r.get("disputed")]:
        why = "the share of the judged images on which an oracle's three classifiers disagree"
        lines.append(f"In brackets: {why}.")
        if doubt := sorted({t for found in shares for t, share in found.items() if share > 0.05}):
            lines.append(f"Above 5 % a number is in doubt: {', '.join(doubt)}.")
    if any(not r.get("prior", True) for r in results):
        why = "MEME's p(z), of pseudo-samples, is trained by single modalities"
        lines.append(f"{why}: a dash without.")
    limited = [r for r in results if r["run"].get("limit")]
    for limit in sorted({r["run"]["limit"] for r in limited}):
        folders = ", ".join(Path(r["folder"]).name for r in limited if r["run"]["limit"] == limit)
        lines.append(f"Trained on the first {limit:,} examples only (--limit): {folders}.")
    for k, n in sorted({(r["samples"], r["examples"]) for r in results if "log_likelihood" in r}):
        lines.append(f"log p: nats, importance-weighted, K = {k:,}, the first {n:,} test examples.")
    lines += npz.notes(results)
    benchmark = data.benchmark(results[0]["run"]["dataset"])
    if hasattr(benchmark, "notes"):
        lines += benchmark.notes(results)
    if any("log_likelihood" in r and r["pseudo"] for r in results):
        lines.append("Bernoulli on grey values is a pseudo-likelihood: no density of the images.")
    return lines
