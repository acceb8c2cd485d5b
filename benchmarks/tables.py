"""Results as Markdown: a table of several runs, or a report of one.

    table(results, paper=False), report(result, paper=False), markdown(head, rows)    -> text

A result is the contents of a run's metrics.json. A .jsonl holds one per line, with the rows of its
log.csv as "log". Runs that differ in the seed alone share a row: mean ± sample standard deviation.
"""

import json
import math
import textwrap
from pathlib import Path

import numpy as np

import data
from benchmarks import drawing, npz

SECTIONS = {  # key of metrics.json: column of the table, None without one; definition
    "cross_coherence": (
        "{}",
        "Cross coherence: the share of test images whose digit the oracle predicts for the image "
        "generated from them in the other modality; by chance 0.1",
    ),
    "self_coherence": ("self {}", "Self coherence: the same for the image regenerated from itself"),
    "joint_coherence": (
        "joint",
        "Joint coherence: the share of samples of p(z) that give images of the same digit",
    ),
    "joint_entropy": (
        "joint entropy",
        "Entropy of those digits, nats: 2.303 if all are equally frequent, 0 if it is always the "
        "same one",
    ),
    "aggregate_coherence": (
        "aggregate",
        "The same for samples of the aggregate posterior, the mixture of q(z|pair) over 128 "
        "training pairs, which does not depend on the model's choice of p(z)",
    ),
    "aggregate_entropy": ("aggregate entropy", "Entropy of those digits, nats"),
    "accuracy": (
        "{}",
        "Accuracy: the share of test images whose digit the oracle predicts for the whole image, "
        "regenerated from these parts",
    ),
    "regenerated_r2": (
        "R² {}",
        "R² of regenerated numbers, mean over features, or over all pixels: 1 is exact, 0 the test "
        "mean",
    ),
    "regenerated_accuracy": ("right {}", "Accuracy of regenerated bits or classes"),
    "ridge_r2": ("ridge R² {}", "R² of ridge regression from the same inputs, to compare with"),
    "ridge_accuracy": ("ridge right {}", "Accuracy of ridge regression from the same inputs"),
    "regenerated_log_p": (
        None,
        "log p(x|z), nats, of the modality right of the arrow, for z given what is left of it",
    ),
    "latent_accuracy": (
        "latent {}",
        "Latent accuracy: test accuracy of a linear classifier of z ~ q(z|modality)",
    ),
    "mutual_information": (
        "MI {}",
        "Mutual information of digit and oracle, nats: lower for images that look more real",
    ),
    "correlation": (
        "corr. {}",
        "Correlation of photo and caption, one of them generated; truth: of the test pairs",
    ),
    "chance_correlation": ("chance {}", "The same over every photo with every caption"),
    "rank": ("{}", "Rank of the true candidate: the share among the first k, the median"),
    "bits": ("bit {}", "Bits of fingerprints, predicted from spectra"),
    "log_likelihood": (
        "log p({})",
        "Log-likelihood of test examples, nats, importance-weighted: higher is better; x|y is the "
        "integral of p(x|z) q(z|y)",
    ),
}


# ------------------------------------------------------------------------------------------- files


def finite(value):
    """JSON has no NaN: None in its place."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_results(path):
    """The results of a .jsonl, or of a run folder's metrics.json. -> list of dict"""
    file = path if path.suffix == ".jsonl" else path / "metrics.json"
    try:
        text = file.read_text(encoding="utf-8")
        if path.suffix == ".jsonl":
            return [json.loads(line) for line in text.splitlines()]
        return [json.loads(text) | {"folder": str(path)}]
    except ValueError as error:
        raise ValueError(f"{file} cannot be read: {error}") from None


def save_metrics(path, metrics):
    """Write metrics.json."""
    text = json.dumps(finite(metrics), indent=1, ensure_ascii=False)
    data.atomic_write(path, lambda file: file.write(text.encode()))


def save_result(path, metrics, log):
    """Append a run's metrics and log to a .jsonl, or replace the line of the same folder name."""
    name = Path(metrics["folder"]).name
    lines = {r["folder"]: r for r in read_results(path)} if path.exists() else {}
    lines[name] = finite(metrics | {"folder": name, "log": list(log)})
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines.values())
    path.parent.mkdir(parents=True, exist_ok=True)
    data.atomic_write(path, lambda file: file.write(text.encode()))


# ------------------------------------------------------------------------------------ rows, columns


def by_key(section):
    """A section of metrics.json, which may be one number. -> {key: number}"""
    return section if isinstance(section, dict) else {"": section}


def heading(title, key):
    return title.format(key.replace("->", "→").replace("|", "\\|"))  # a bar would end the column


def columns(metrics):
    """metrics.json as the columns of a table, in order. -> {title: number}"""
    cells = {}
    for section, (title, _) in SECTIONS.items():
        if title and section in metrics:
            for key, score in by_key(metrics[section]).items():
                cells[heading(title, key)] = math.nan if score is None else score
    return cells


def rises_of(result):
    """The rise of each log-likelihood from K/10 to K samples, by its column. -> {title: nats}"""
    return columns({"log_likelihood": result.get("log_likelihood_rise", {})})


def setting(result):
    """The flags that runs in one row have in common: all that are set, without the seed and the
    place of the run, and the epochs that were trained. -> dict"""
    free = ("seed", "out", "data", "device", "amp", "compile", "resume", "options")
    later = {"decay": 0.0, "subsets": 0, "digest": ""}  # flags that earlier results do not have
    flags = later | result["run"] | {"epoch": result["epoch"]}
    return {key: value for key, value in flags.items() if key not in free and value is not None}


def grouped(results):
    """Lists of results that differ in the seed alone."""
    groups = {}
    for result in results:
        key = json.dumps(setting(result), sort_keys=True)
        groups.setdefault(key, []).append(result)
    return list(groups.values())


def starred(run):
    """The model of a run, with a star if its objective is the other's, as in [poe]: VAEVAE*."""
    star = {"SVAE": "vaevae", "VAEVAE": "svae"}.get(run["model"], "")
    return run["model"] + "*" * (run.get("objective") == star)


def in_order(groups):
    """Models in order of appearance; of each, first those with most pairs."""
    models = list(dict.fromkeys(starred(group[0]["run"]) for group in groups))

    def place(group):
        run = group[0]["run"]
        return models.index(starred(run)), run["unpaired"], -run["paired"]

    return sorted(groups, key=place)


def row_names(groups, hidden=("paired", "unpaired", "epoch")):
    """The model of each group and the flags in which a model's groups differ: MEME kl=sample.
    hidden: flags that have columns of their own."""
    hidden = {*hidden, "epochs", "spec", "examples", "note", "digest"}
    settings, names = [setting(group[0]) for group in groups], []
    for own in settings:
        rivals = [other for other in settings if starred(other) == starred(own)]
        flags = [k for k in own if k not in hidden and own[k] is not False]
        flags = [k for k in flags if any(rival.get(k) != own[k] for rival in rivals)]
        names.append(" ".join([starred(own), *(f"{k}={own[k]}" for k in flags)]))
    return names


def paper_name(run):
    """The papers' name for a run's model; None if they do not have it."""
    options = run["options"]
    others = ("variant", "a"), ("prior_expert", True), ("objective", "elbo"), ("kl", "sample")
    if options.get("direction") or any(options.get(k) == value for k, value in others):
        return None
    if options.get("posterior") == "laplace":
        return f"{run['model']}, Laplace"
    return starred(run)


def paper_row(run, titles):
    """The papers' numbers for a run's setting, in the columns of its table; [] if there are none.
    At f = 1 `unpaired` does not matter, and the first of their numbers is taken."""
    cells, name = {}, paper_name(run)
    for dataset, model, unpaired, column, numbers in getattr(
        data.benchmark(run["dataset"]), "PAPER", ()
    ):
        series = dict(zip((1, 1 / 2, 1 / 4, 1 / 8, 1 / 16), numbers.split()))
        same = run["paired"] == 1 or unpaired == run["unpaired"]
        if (dataset, model) == (run["dataset"], name) and same and run["paired"] in series:
            cells.setdefault(column, series[run["paired"]].replace(".", "0.", 1))
    row = [cells.get(t, "") for t in titles]
    return [f"{name}, paper", f"{run['paired']:g}", "", "", "", "", *row] if any(row) else []


# -------------------------------------------------------------------------------------------- text


def number(values):
    """Mean ± sample standard deviation of finite values; one digit from 10 on, else three."""
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


def row(name, group, titles):
    """The cells of the runs of one setting."""
    run, epoch, cells = group[0]["run"], group[0]["epoch"], [columns(r) for r in group]
    disagreement = [columns(r.get("disagreement", {})) for r in group]
    rises = [rises_of(r) for r in group]
    pairs = ["masked", "–"] if drawing.is_masked(run) else [f"{run['paired']:g}", run["unpaired"]]
    epochs = run["epochs"] if epoch == run["epochs"] else f"{epoch} of {run['epochs']}"
    seeds = len({r["run"]["seed"] for r in group})
    line = [name, *pairs, epochs, seeds, f"{np.mean([r['minutes'] for r in group]):.1f}"]
    for t in titles:
        cell = number([c.get(t, math.nan) for c in cells])
        shares = [d[t] for d in disagreement if t in d]
        if shares:
            cell += f" ({np.mean(shares):.1%})"
        rise = [found[t] for found in rises if t in found]
        if rise:
            cell += f" (+{np.mean(rise):.1f})"
        line.append(cell)
    return line


def table(results, paper=False):
    """Markdown: a table per data set, with a row per setting, over its seeds."""
    lines = []
    for name in dict.fromkeys(r["data"] for r in results):
        chosen = [r for r in results if r["data"] == name]
        groups = in_order(grouped(chosen))
        titles = list(dict.fromkeys(t for r in chosen for t in columns(r)))
        rows = []
        for model, group in zip(row_names(groups), groups):
            rows.append(row(model, group, titles))
            theirs = paper_row(group[0]["run"], titles) if paper else []
            if theirs:
                other_data = ":" in name or group[0]["run"].get("limit")
                theirs[0] += " (other data)" if other_data else ""
                rows.append(theirs)
        head = ["model", "paired", "unpaired", "epochs", "seeds", "minutes", *titles]
        lines += [f"**{name}**", "", markdown(head, rows), "", *notes(chosen), ""]
    return "\n".join(lines)


def report(result, paper=False):
    """The metrics of one run, one per line, below their definitions."""
    run, own = result["run"], columns(result)
    theirs = dict(zip(own, paper_row(run, list(own))[6:])) if paper else {}
    flags = [f"{k}={v}" for k, v in run["options"].items() if v not in (None, False)]
    about = [drawing.pairs(run), f"seed {run['seed']}", f"{result['epoch']} epochs"]
    about += [f"{result['minutes']:.1f} minutes", *flags]
    lines = [f"{result['folder']}: {run['model']} on {result['data']}", ", ".join(about)]
    for section, (title, definition) in SECTIONS.items():
        if section not in result:
            continue
        lines += ["", *textwrap.wrap(definition, 100)]
        scores = by_key(result[section])
        disagreement = by_key(result.get("disagreement", {}).get(section, {}))
        rises = result.get("log_likelihood_rise", {}) if section == "log_likelihood" else {}
        names = {key: " → ".join(map(drawing.label, key.split("->"))) or title for key in scores}
        width = max(map(len, names.values()))
        for key, score in scores.items():
            cell = number([math.nan if score is None else score])
            line = f"    {names[key]:<{width}} {cell:>9}"
            if key in disagreement:
                line += f"   (oracle's members disagree on {disagreement[key]:.1%})"
            if key in rises:
                line += f"   (rises by {rises[key]:.2f} from K/10 to K samples)"
            if title and theirs.get(heading(title, key)):
                line += f"   paper {theirs[heading(title, key)]}"
            lines.append(line)
    return "\n".join([*lines, "", *notes([result])])


def notes(results):
    """The lines below a table of these results."""
    lines = []
    oracles = [
        ", ".join(f"{view} {accuracy:.3f}" for view, accuracy in r["oracle"].items())
        for r in results
        if r["oracle"]
    ]
    if oracles:
        accuracies = "; or ".join(dict.fromkeys(oracles))
        lines.append(f"Test accuracy of the oracles: {accuracies}.")
    disagreement = [columns(r["disagreement"]) for r in results if "disagreement" in r]
    if disagreement:
        share = "the share of the judged images on which an oracle's three classifiers disagree"
        lines.append(f"In brackets: {share}.")
        doubt = sorted({t for shares in disagreement for t, s in shares.items() if s > 0.05})
        if doubt:
            lines.append(f"Above 5 % a number is in doubt: {', '.join(doubt)}.")
    if any(not r.get("prior", True) for r in results):
        lines.append(
            "MEME's p(z) is trained by single modalities. Without them its pseudo-samples stay the "
            "training examples they started as, and there is no log-likelihood of p(z)."
        )
    limited = [r for r in results if r["run"].get("limit")]
    for limit in sorted({r["run"]["limit"] for r in limited}):
        folders = ", ".join(Path(r["folder"]).name for r in limited if r["run"]["limit"] == limit)
        lines.append(f"Trained on the first {limit:,} examples only (--limit): {folders}.")
    for k, n in sorted({(r["samples"], r["examples"]) for r in results if "log_likelihood" in r}):
        lines.append(
            f"log p: nats, importance-weighted, K = {k:,}, {n:,} test examples, spread over the "
            "test set; in brackets the rise from K/10 to K."
        )
    rises = [rises_of(r) for r in results]
    low = sorted({t for found in rises for t, rise in found.items() if rise > 1})
    if low:
        lines.append(f"Where it is above 1 nat, the number is a loose lower bound: {', '.join(low)}.")
    if any("log_likelihood" in r and r["pseudo"] for r in results):
        lines.append("Bernoulli on grey values is a pseudo-likelihood: no density of the images.")
    lines += npz.notes(results)
    benchmark = data.benchmark(results[0]["run"]["dataset"])
    if hasattr(benchmark, "notes"):
        lines += benchmark.notes(results)
    return lines
