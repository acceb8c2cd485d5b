"""Results as text: a report of one run, tables of several, and the files that hold them.

    report(result, paper=False)      the metrics of one run, one per line, below their definitions
    table(results, paper=False)      Markdown: the tables of one data set, a row per setting
    notes(results)                   what to know of these numbers, as lines

A result is the contents of a run's metrics.json. A .jsonl holds one per line, with the rows of the
run's log.csv as "log". Runs that differ in the seed alone share a row: mean ± sample standard
deviation.
"""

import json
import math
import textwrap
from pathlib import Path

import numpy as np

import data
from evaluation import papers

WIDTH, COLUMNS = 120, 9  # of a printed line, in characters; of a table
OTHERS, TRAINING_MEAN = "the others", "training mean"  # sources beside the modalities, of own.py

SECTIONS = {  # key of metrics.json: its column in a table, None without one; its definition
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
    "effective_sample_size": (
        None,
        "Effective sample size of the candidates from which MEME's posterior of several modalities "
        "is resampled",
    ),
    "regenerated_r2": (
        "R² {}",
        "R² of regenerated numbers, mean over features, or over all pixels: 1 is exact, 0 the test "
        "mean",
    ),
    "ridge_r2": ("ridge R² {}", "R² of ridge regression from the same inputs, to compare with"),
    "regenerated_accuracy": ("accuracy {}", "Accuracy of regenerated bits or classes"),
    "ridge_accuracy": (
        "ridge accuracy {}",
        "Accuracy of ridge regression, of classes logistic regression, from the same inputs",
    ),
    "regenerated_log_loss": (
        "log loss {}",
        "Log loss of regenerated classes, nats: -log of the probability of the true class, lower is "
        "better",
    ),
    "ridge_log_loss": ("ridge log loss {}", "Log loss of logistic regression from the same inputs"),
    "regenerated_log_p": (
        None,
        "Log predictive density, nats, of the modality right of the arrow given what is left of it",
    ),
    "latent_accuracy": (
        "latent {}",
        "Latent accuracy: test accuracy of a linear classifier of z ~ q(z|modality)",
    ),
    "mutual_information": (
        "MI {}",
        "Mutual information of digit and oracle, nats: lower for images that look more real",
    ),
    "w2_overlap": (
        "W2 overlap {}",
        "Relatedness: the overlap of the histograms of W2 between the posteriors of two modalities "
        "of test images, of the same digit and of different ones; 0 if disjoint, 1 if equal",
    ),
    "signal_to_noise": (
        "SNR {}",
        "Signal-to-noise of MEME's gradient: the median over its entries of |mean| / std, over "
        "samples of z; eq. (7) has the gradient of the weight w, too",
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

TABLES = {  # of several runs: the heading and the sections of each
    "Coherence": ("cross_coherence", "self_coherence"),
    "Accuracy of the whole image": ("accuracy",),
    "Joint samples": (
        "joint_coherence",
        "joint_entropy",
        "aggregate_coherence",
        "aggregate_entropy",
    ),
    "Latent accuracy": ("latent_accuracy",),
    "Mutual information, nats": ("mutual_information",),
    "Relatedness": ("w2_overlap",),
    "Signal-to-noise of the gradient": ("signal_to_noise",),
    "Correlation": ("correlation",),
    "Correlation by chance": ("chance_correlation",),
    "Rank of the true candidate": ("rank",),
    "Bits of the fingerprint": ("bits",),
    "Log-likelihood, nats": ("log_likelihood",),
}


# ------------------------------------------------------------------------------------------- files


def finite(value):
    """JSON has no NaN: None in its place."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def renamed(result):
    """A result with today's names for the flags of its run: lines of results/ are older."""
    run = dict(result["run"])
    options = dict(run["options"])
    for key in ["version", *options]:  # options stood there twice
        run.pop(key, None)
    if "posterior" in options:
        options["family"] = options.pop("posterior")
    if run["model"] in ("SVAE", "VAEVAE"):
        options["terms"] = options.pop("subsets", options.get("terms", 0))
    if run["model"] == "MVAE":
        options.setdefault("subsets", 0)
    if isinstance(run["weights"], str):
        run["weights"] = [float(weight) for weight in run["weights"].split(",")]
    run["clip"] = run.get("clip") or 0.0
    defaults = {"decay": 0.0, "digest": "", "masked": False}
    return result | {"run": defaults | run | {"options": options}}


def read_results(path):
    """The results of a .jsonl, or of a run folder's metrics.json. -> list of dict"""
    file = path if path.suffix == ".jsonl" else path / "metrics.json"
    text = file.read_text(encoding="utf-8")
    try:
        if path.suffix == ".jsonl":
            return [renamed(json.loads(line)) for line in text.splitlines() if line.strip()]
        return [renamed(json.loads(text) | {"folder": str(path)})]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} cannot be read as results: {error}") from None


def save_metrics(path, metrics):
    """Write metrics.json."""
    text = json.dumps(finite(metrics), indent=1, ensure_ascii=False)
    data.atomic_write(path, lambda file: file.write(text.encode()))


def save_result(path, metrics, log):
    """Append a run's metrics and log to a .jsonl, or replace the line of the same run."""
    result = finite(metrics | {"folder": Path(metrics["folder"]).resolve().name, "log": list(log)})
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    lines = [line for line in lines if line.strip()]
    saved = [identity(renamed(json.loads(line))) for line in lines]
    place = saved.index(identity(result)) if identity(result) in saved else len(lines)
    lines[place : place + 1] = [json.dumps(result, ensure_ascii=False)]
    text = "".join(f"{line}\n" for line in lines)
    data.atomic_write(path, lambda file: file.write(text.encode()))


# ---------------------------------------------------------------------------------- runs and rows


def flags(result):
    """All flags of a run and the options of its model, without where its files lie. The data set is
    its digest, where it has one: the same data at another place are the same data. -> dict"""
    run = result["run"]
    places = ("out", "data", "resume", "options", "spec")
    named = {key: value for key, value in run.items() if key not in places}
    return named | run["options"] | {"dataset": run["digest"] or run["dataset"]}


def identity(result):
    """Equal for two results of the same run, in whichever folder or file they are found."""
    return json.dumps(flags(result), sort_keys=True)


def setting(result):
    """The flags that the runs of a row have in common: all that are set, and the epochs of training,
    without the seed and the machine. -> dict"""
    free = ("seed", "device", "amp", "compile", "graph")
    named = {key: x for key, x in flags(result).items() if key not in free}
    return {key: x for key, x in named.items() if x is not None and x is not False} | {
        "epoch": result["epoch"]
    }


def distinct(results):
    """Each run once: its last result, where it is given several times."""
    return list({identity(result): result for result in results}.values())


def by_data(results):
    """Lists of results on the same data."""
    lists = {}
    for result in results:
        lists.setdefault(result["run"]["digest"] or result["data"], []).append(result)
    return list(lists.values())


def grouped(results):
    """Lists of results that differ in the seed alone."""
    groups = {}
    for result in results:
        groups.setdefault(json.dumps(setting(result), sort_keys=True), []).append(result)
    return list(groups.values())


def in_order(groups):
    """Models in order of appearance; of each, first those with most pairs."""
    models = list(dict.fromkeys(papers.starred(group[0]["run"]) for group in groups))

    def place(group):
        run = group[0]["run"]
        return models.index(papers.starred(run)), run["unpaired"], -run["paired"]

    return sorted(groups, key=place)


def row_names(groups, hidden=("paired", "unpaired", "epoch")):
    """The model of each group and the flags in which a model's groups differ: MEME kl=sample.
    hidden: flags that have columns of their own."""
    hidden = {*hidden, "epochs", "dataset", "examples", "note", "digest"}
    models = [papers.starred(group[0]["run"]) for group in groups]
    settings = [setting(group[0]) for group in groups]
    names = []
    for model, flags_of in zip(models, settings):
        rivals = [other for name, other in zip(models, settings) if name == model]
        differ = [
            key
            for key, value in flags_of.items()
            if key not in hidden
            if any(rival.get(key) != value for rival in rivals)
        ]
        names.append(" ".join([model, *(f"{key}={as_typed(flags_of[key])}" for key in differ)]))
    return names


def as_typed(value):
    """A flag's value as on the command line: 3.9,1"""
    if isinstance(value, list):
        return ",".join(map(as_typed, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def pairs(args):
    """The modalities that the training examples of a run showed, as text: "f = 0.5, split"."""
    if args["masked"]:
        return "masked"
    return f"f = {args['paired']:g}" + (f", {args['unpaired']}" if args["paired"] < 1 else "")


def label(name):
    """A modality's name beside class labels, which are numbers."""
    return f"modality {name}" if name.isdigit() else name


# ----------------------------------------------------------------------------------------- columns


def by_key(section):
    """A section of metrics.json, which may be one number. -> {key: number}"""
    return section if isinstance(section, dict) else {"": section}


def heading(section, key):
    """The column of a number: "self grey"."""
    return SECTIONS[section][0].format(key.replace("->", "→"))


def columns(metrics, sections=SECTIONS):
    """metrics.json, or some of its sections, as the columns of a table; None for NaN.
    -> {title: number}"""
    cells = {}
    for section in sections:
        if SECTIONS[section][0] and section in metrics:
            for key, score in by_key(metrics[section]).items():
                cells[heading(section, key)] = score
    return cells


def rises(result):
    """The rise of each log-likelihood from K/10 to K samples. -> {title: nats}"""
    return columns({"log_likelihood": result.get("log_likelihood_rise", {})})


def number(values):
    """Mean ± sample standard deviation of finite values, without None; one digit from 10 on, else
    three."""
    values = [v for v in values if v is not None and math.isfinite(v)]
    if not values:
        return "–"
    digits = 1 if max(abs(v) for v in values) >= 10 else 3
    spread = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{spread}"


def cell(group, title):
    """A number of the runs of one setting; in brackets the share of images on which the oracle's
    members disagree, or the rise of a likelihood."""
    text = number([columns(result).get(title) for result in group])
    if text == "–":
        return text
    disagreement = [columns(result.get("disagreement", {})) for result in group]
    shares = [shares[title] for shares in disagreement if title in shares]
    if shares:
        text += f" ({np.mean(shares):.1%})"
    nats = [rises(result)[title] for result in group if title in rises(result)]
    if nats:
        text += f" (+{np.mean(nats):.1f})"
    return text


# ------------------------------------------------------------------------------------------ tables

HEAD = ["model", "paired", "unpaired", "epochs", "seeds"]


def markdown(head, rows):
    """A table of cells, which may be numbers, in columns of equal width."""
    rows = [[str(cell).replace("|", "\\|") for cell in row] for row in (head, *rows)]
    widths = [max(3, *map(len, column)) for column in zip(*rows)]
    rows.insert(1, ["-" * width for width in widths])
    lines = [" | ".join(map(str.ljust, row, widths)) for row in rows]
    return "\n".join(f"| {line} |" for line in lines)


def first_cells(name, group):
    """The cells of a row below HEAD."""
    run, epoch = group[0]["run"], group[0]["epoch"]
    paired, unpaired = f"{run['paired']:g}", run["unpaired"]
    if run["masked"]:
        paired, unpaired = "masked", "–"
    epochs = run["epochs"] if epoch == run["epochs"] else f"{epoch} of {run['epochs']}"
    return [name, paired, unpaired, epochs, len({result["run"]["seed"] for result in group})]


def compact(result):
    """A result as the tables of several runs show it: of a user's own arrays, which have too many
    numbers, only what `predictions` selects and the latent accuracy."""
    if not predictions(result)["model"]:
        return result
    return {key: x for key, x in result.items() if not key.startswith("log_likelihood")}


def table(results, paper=False):
    """Markdown: the tables of a data set, with a row per setting, over its seeds."""
    groups = in_order(grouped(results))
    names = row_names(groups)
    blocks = [f"**{results[0]['data']}**", *prediction_tables(names, groups)]
    for caption, sections in TABLES.items():
        every = sorted((list(columns(r, sections)) for r in results), key=len, reverse=True)
        titles = list(dict.fromkeys(title for some in every for title in some))
        if not titles:
            continue
        tables = math.ceil(len(titles) / (COLUMNS - len(HEAD)))
        for part in map(list, np.array_split(titles, tables)):
            rows = []
            for name, group in zip(names, groups):
                cells = [cell(group, title) for title in part]
                if set(cells) != {"–"}:
                    rows.append([*first_cells(name, group), *cells])
                    rows += paper_rows(group[0]["run"], part) if paper else []
            blocks += [caption, markdown([*HEAD, *part], rows)]
    return "\n\n".join(blocks)


def paper_rows(run, titles):
    """The row of the papers' numbers in these columns; none without a number."""
    numbers = papers.paper_numbers(run)
    cells = [numbers.get(title, "") for title in titles]
    if not any(cells):
        return []
    other = " (other data)" if run["note"] or run["limit"] else ""
    name = f"{papers.model_name(run)}, paper{other}"
    return [[name, f"{run['paired']:g}", "", "", "", *cells]]


PREDICTED = """Every modality, predicted from all the others: R² of numbers (1 is exact, 0 the test mean),
accuracy of bits and classes, log loss of classes in nats. All numbers of a run: eval.py RUN"""
PREDICTIONS = {  # sections of a user's own arrays: column; the section of ridge regression
    "regenerated_r2": ("R² {}", "ridge_r2"),
    "regenerated_accuracy": ("accuracy {}", "ridge_accuracy"),
    "regenerated_log_loss": ("log loss {}", "ridge_log_loss"),
}


def predictions(result):
    """The accuracy or R² of every modality of a user's own arrays, predicted from all the others by
    the model and by its two baselines. -> {"model", "ridge", "training mean": {title: number}}"""
    modalities = {key.split("->")[1] for section in PREDICTIONS for key in result.get(section, {})}
    rows = {"training mean": {}, "ridge": {}, "model": {}}
    for section, (title, ridge) in PREDICTIONS.items():
        for key, score in result.get(section, {}).items():
            source, target = key.split("->")
            column = title.format(label(target))
            if source == TRAINING_MEAN:
                rows["training mean"][column] = score
            elif source == OTHERS or (len(modalities) == 2 and source != target):
                rows["model"][column] = score
                rows["ridge"][column] = result.get(ridge, {}).get(key)
    return rows


def prediction_tables(names, groups):
    """Markdown: the predictions of several runs, with a row per setting. The baselines stand above
    the models, once for all runs that were shown the same pairs. -> list, empty for other data"""
    results = [result for group in groups for result in group]
    titles = list(dict.fromkeys(title for r in results for title in predictions(r)["model"]))
    if not titles:
        return []

    def cells(who, members):
        scores = [predictions(result)[who] for result in members]
        columns = [[score.get(title) for score in scores] for title in titles]
        if who != "model":  # one number, run after run
            columns = map(set, columns)
        return list(map(number, columns))

    alike, rows = {}, []
    for result in results:
        alike.setdefault((pairs(result["run"]), result["run"]["limit"]), []).append(result)
    for (_, limit), members in alike.items():
        _, paired, unpaired, *_ = first_cells("", members)
        if paired == "1":  # --unpaired does not matter
            unpaired = ""
        for who in ("training mean", "ridge"):
            name = who if limit is None else f"{who} limit={limit}"
            rows.append([name, paired, unpaired, "", "", *cells(who, members)])
    for name, group in zip(names, groups):
        rows.append([*first_cells(name, group), *cells("model", group)])
    return [PREDICTED, *fitted([*HEAD, *titles], rows)]


def fitted(head, rows):
    """Markdown: as many tables as it takes for none to be wider than WIDTH; each has the columns of
    HEAD. -> list"""
    first = len(HEAD)
    widths = [3 + max(len(str(cell)) for cell in column) for column in zip(head, *rows)]
    parts, room = [], 0
    for k in range(first, len(head)):
        if widths[k] > room:
            parts.append([*range(first)])
            room = WIDTH - 1 - sum(widths[:first])
        parts[-1].append(k)
        room -= widths[k]
    return [
        markdown([head[k] for k in part], [[row[k] for k in part] for row in rows])
        for part in parts
    ]


def report(result, paper=False):
    """The metrics of one run, one per line, below their definitions."""
    run = result["run"]
    theirs = papers.paper_numbers(run) if paper else {}
    options = [
        f"{key}={value}" for key, value in run["options"].items() if value not in (None, False)
    ]
    about = [pairs(run), f"seed {run['seed']}", count(result["epoch"], "epoch")]
    about += [data.duration(60 * result["minutes"]), *options]
    lines = [f"{result['folder']}: {run['model']} on {result['data']}", ", ".join(about)]
    for section, (title, definition) in SECTIONS.items():
        if section not in result:
            continue
        lines += ["", *textwrap.wrap(definition, 100)]
        scores = by_key(result[section])
        disagreement = by_key(result.get("disagreement", {}).get(section, {}))
        rise = result.get("log_likelihood_rise", {}) if section == "log_likelihood" else {}
        names = {key: " → ".join(map(label, key.split("->"))) or title for key in scores}
        width = max(map(len, names.values()))
        for key, score in scores.items():
            line = f"    {names[key]:<{width}} {number([score]):>9}"
            if key in disagreement:
                line += f"   (oracle's members disagree on {disagreement[key]:.1%})"
            if key in rise:
                line += f"   (rises by {rise[key]:.2f} from K/10 to K samples)"
            if title and heading(section, key) in theirs:
                line += f"   paper {theirs[heading(section, key)]}"
            lines.append(line)
    return "\n".join(lines)


def count(n, noun):
    """1 epoch, 2 epochs"""
    return f"{n:,} {noun}" if n == 1 else f"{n:,} {noun}s"


def notes(results):
    """Notes for a reader of these results. -> paragraphs"""
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
    limited = [r for r in results if r["run"]["limit"]]
    for limit in sorted({r["run"]["limit"] for r in limited}):
        folders = ", ".join(Path(r["folder"]).name for r in limited if r["run"]["limit"] == limit)
        lines.append(f"Trained on the first {count(limit, 'example')} only (--limit): {folders}.")
    for k, n in sorted({(r["samples"], r["examples"]) for r in results if "log_likelihood" in r}):
        lines.append(
            f"log p: nats, importance-weighted, K = {k:,}, {count(n, 'test example')}, spread over "
            "the test set; in brackets the rise from K/10 to K."
        )
    low = sorted({title for r in results for title, nats in rises(r).items() if nats and nats > 1})
    if low:
        lines.append(
            f"Where it is above 1 nat, the number is a loose lower bound: {', '.join(low)}."
        )
    if any("log_likelihood" in r and r["pseudo"] for r in results):
        lines.append("Bernoulli on grey values is a pseudo-likelihood: no density of the images.")
    if any("w2_overlap" in r for r in results):
        lines.append(
            "W2 overlap: of related (same digit) and unrelated pairs of test examples, all pairs of "
            "at most 500; histograms of 50 bins."
        )
    if any("signal_to_noise" in r for r in results):
        lines.append(
            "SNR: signal-to-noise ratio of an entry of the gradient, the median, at the end of "
            "training; 30 samples of z, the first 64 test examples."
        )
    return lines


def wrapped(lines):
    """Lines as text, none longer than WIDTH."""
    return "\n".join(textwrap.fill(line, WIDTH) for line in lines)
