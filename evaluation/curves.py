"""Results of several runs against a flag, such as the paired fraction: what figures.py draws.

    for line in curves(results, against="paired"): line.model, line.label, line.results
    numbers_of(result)    the numbers that have a panel, and the levels to compare them with

A result is the contents of a run's metrics.json; see tables.py.
"""

import math
from typing import NamedTuple

import data
from evaluation import papers, tables

CHARTS = {  # section of metrics.json: the label of its numbers, with the better direction
    "cross_coherence": "cross coherence {} ↑",
    "self_coherence": "self coherence {} ↑",
    "accuracy": "accuracy from {} ↑",
    "joint_coherence": "joint coherence, z of p(z) ↑",
    "joint_entropy": "entropy of its digits, nats ↑",
    "aggregate_coherence": "joint coherence, aggregate z ↑",
    "aggregate_entropy": "entropy of its digits, nats ↑",
    "latent_accuracy": "latent accuracy {} ↑",
    "mutual_information": "mutual information, nats\n{} ↓",
    "correlation": "correlation {} ↑",
    "rank": "rank of the true candidate, {}",
    "bits": "bits, {}",
    "predictions": "{}, from all others",
    "log_likelihood": "log p({}), nats ↑",
}
MIXED = ("rank", "bits", "predictions", "log_likelihood")  # their numbers differ in unit or size


def numbers_of(result):
    """The finite numbers of a result, and the levels to compare each with; of a user's own arrays
    how well each modality is predicted from all the others.
    -> {(section, key): number}, {(section, key): {name of a level: number}}"""
    baselines = tables.predictions(result)
    sections = result | {"predictions": baselines.pop("model")}
    numbers, levels = {}, {}
    for section in CHARTS:
        for key, number in tables.by_key(sections.get(section, {})).items():
            if number is None or not math.isfinite(number) or key == "truth":
                continue
            numbers[section, key] = number
            levels[section, key] = levels_of(result, section, key)
            if section == "predictions":
                levels[section, key] = {name: row.get(key) for name, row in baselines.items()}
    return numbers, levels


def levels_of(result, section, key):
    """The values of chance and of real data. -> {name: number}"""
    oracles, levels = result["oracle"], {}
    if oracles and section.endswith(("coherence", "accuracy")):
        levels["chance"] = 0.1  # of ten digits
    if section in ("cross_coherence", "self_coherence"):
        levels["real images"] = oracles[key.split("->")[-1]]
    if section == "accuracy":
        (levels["real images"],) = oracles.values()
    if section == "correlation":
        levels["chance"] = result["chance_correlation"][key]
        levels["real pairs"] = result["correlation"]["truth"]
    return levels


class Line(NamedTuple):
    model: str
    label: str
    results: dict  # {value of the flag: results of the seeds}


def curves(results, against="paired"):
    """The runs of a data set against a flag: [meme] Figs. 5-7, 21, 22; [poe] Figs. 6-9. ValueError
    for a flag without numbers. -> a Line per model and setting; none if the flag has one value"""
    if against == "paired":
        results = [r for r in results if not r["run"]["masked"]]
    groups = tables.grouped(results)
    settings = [tables.setting(group[0]) for group in groups]
    values = {flags.get(against) for flags in settings} - {None}
    if groups and not (values and all(isinstance(value, int | float) for value in values)):
        numbers = [key for key, value in settings[0].items() if isinstance(value, int | float)]
        flags = ", ".join(key.replace("_", "-") for key in numbers)
        raise ValueError(f"--against must be a flag with numbers ({flags}), not {against!r}")
    if len(values) < 2:
        return []
    hidden = ("paired", "unpaired", "epoch" if against == "epochs" else against)
    lines = {}  # {(model and flags that differ, unpaired, f): {value of the flag: group}}
    for name, flags, group in zip(tables.row_names(groups, hidden), settings, groups):
        if flags.get(against) is not None:
            f = None if against == "paired" else flags["paired"]
            lines.setdefault((name, flags["unpaired"], f), {})[flags[against]] = group
    if against == "paired":
        share_ends(lines)
    runs = [next(iter(line.values()))[0]["run"] for line in lines.values()]
    labels = label(lines, "f" if against == "paired" else against.replace("_", "-"))
    return [Line(run["model"], *line) for run, *line in zip(runs, labels, lines.values())]


def share_ends(lines):
    """At f = 1 `unpaired` makes no difference but for "all", which has single streams too: a run at
    f = 1 is the end of every line of its model, and no line by itself if there is another."""
    same = [key for key in lines if key[1] != "all"]
    ends = {key[0]: lines[key][1] for key in same if 1 in lines[key]}
    longer = [key for key in same if set(lines[key]) != {1}]
    for key in longer:
        if key[0] in ends:
            lines[key].setdefault(1, ends[key[0]])
    for key in set(same) - set(longer):
        if any(other[0] == key[0] for other in longer):
            del lines[key]


def label(lines, axis):
    """Short labels: the model, then `unpaired`, f and the epochs where these matter. The flags in
    which the lines of a model differ are added where two labels are the same without. -> list"""
    firsts = [next(iter(line.values()))[0] for line in lines.values()]
    epochs = {first["epoch"] for first in firsts}
    short, long = [], []
    for (name, unpaired, f), line, first in zip(lines, lines.values(), firsts):
        words = []
        if set(line) != {1} or unpaired == "all":
            words.append(unpaired if unpaired in data.UNPAIRED else f"{unpaired} always shown")
        if f is not None:
            words.append(f"f = {fraction(f)}")
        if len(epochs) > 1:
            words.append(tables.count(first["epoch"], "epoch"))
        if len(line) == 1:
            words.append(f"{axis} = {fraction(min(line))} only")
        short.append(", ".join([papers.starred(first["run"]), *words]))
        long.append(", ".join([name, *words]))
    return [x if short.count(x) == 1 else y for x, y in zip(short, long)]


def fraction(x):
    """A number as short text: 1/64 rather than 0.015625."""
    return f"1/{1 / x:g}" if 0 < x < 1 and math.log2(x).is_integer() else f"{x:g}"
