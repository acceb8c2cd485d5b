"""The pages against results/: every cell, verdict and command is recomputed from the runs.

A table whose first cell names a file of results/ holds numbers: its first cell and the titles of its
columns say which f (the paired fraction) and which metric. A table of claims has the columns claim,
runs and verdict; the rule of the verdict stands at the top of docs/gallery.md.
"""

import ast
import functools
import json
import os
import re
import statistics
import subprocess
import sys
import types

import pytest

import data
from evaluation import papers
from evaluation.command import parser as command_parser
from helpers import ROOT, SCRIPTS, train

RESULTS = {path.stem: path for path in sorted((ROOT / "results").glob("*.jsonl"))}
PAGES = [
    "README.md",
    "results/README.md",
    *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md")),
]
PLACE = {"seed", "out", "data", "device", "compile", "resume", "amp", "options", "spec", "script"}
PLACE |= {"model", "version", "note", "examples", "digest", "masked"}  # no part of a setting
RENAMED = {"posterior": "family"}  # flags of earlier versions, which lines of results/ still have


def page(name):
    return (ROOT / name).read_text(encoding="utf-8")


def tables(text):
    """The Markdown tables of a page. -> list of (head, rows), cells without their spaces"""
    blocks = re.findall(r"(?:^\|.*\n)+", text + "\n", re.M)
    for block in blocks:
        cells = [
            [cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]]
            for row in block.splitlines()
        ]
        yield cells[0], cells[2:]


# ------------------------------------------------------------------------------------------- runs


@functools.cache
def results(name):
    """The lines of a file; the options of a model stand beside the other flags of its run."""
    lines = map(json.loads, RESULTS[name].read_text(encoding="utf-8").splitlines())
    return [line | {"run": line["run"]["options"] | line["run"]} for line in lines]


def name_of(result):
    """The model, with a star where it has the other one's objective ([poe] 4)."""
    run = result["run"]
    other = {"SVAE": "vaevae", "VAEVAE": "svae"}.get(run["model"])
    return run["model"] + ("*" if other and run["objective"] == other else "")


def setting(result):
    """What the seeds of a row have in common. An unset flag equals a missing one."""
    run = {RENAMED.get(key, key): value for key, value in result["run"].items()}
    common = {k: v for k, v in run.items() if k not in PLACE and v not in (None, 0, False, "")}
    return json.dumps(common | {"epoch": result["epoch"]}, sort_keys=True)


def fraction(text):
    over, under = [*map(float, text.split("/")), 1.0][:2]
    return over / under


def value(result, title):
    """The metric that a column of this title shows."""
    sections = {
        "latent ": "latent_accuracy",
        "MI ": "mutual_information",
        "self ": "self_coherence",
        "corr. ": "correlation",
        "chance ": "chance_correlation",
        "W2 overlap ": "w2_overlap",
        "SNR ": "signal_to_noise",
    }
    title = title.replace("\\|", "|")
    whole = {"joint": "joint_coherence", "joint entropy": "joint_entropy"}
    whole |= {"aggregate": "aggregate_coherence", "aggregate entropy": "aggregate_entropy"}
    if title in whole:
        return result[whole[title]]
    if title.startswith("log p("):
        return result["log_likelihood"][title[6:-1]]
    for prefix, section in sections.items():
        if title.startswith(prefix):
            return result[section][title.removeprefix(prefix).replace("→", "->")]
    if "→" in title:
        return result["cross_coherence"][title.replace("→", "->")]
    return result["rank" if title.startswith(("top1", "top2", "top5", "median")) else "accuracy"][
        title
    ]


def pick(file, label, f):
    """The runs of a row: `SVAE`, or "SVAE `--unpaired all`" where the file has several settings."""
    model = re.match(r"\w+\*?", label.replace("\\", ""))[0]
    flags = dict(re.findall(r"--([\w-]+) ([^\s`]+)", label))
    chosen = []
    for result in results(file):
        run = {RENAMED.get(key, key): value for key, value in result["run"].items()}
        fits = all(str(run.get(key.replace("-", "_"))) == v for key, v in flags.items())
        if name_of(result) == model and run["paired"] == f and fits:
            chosen.append((setting(result), result))
    assert chosen, f"{file} has no run of {label} at f = {f}"
    if len({common for common, _ in chosen}) > 1:  # flags that are not named are unset
        fewest = min(len(json.loads(common)) for common, _ in chosen)
        chosen = [(common, r) for common, r in chosen if len(json.loads(common)) == fewest]
    assert len({common for common, _ in chosen}) == 1, f"{file}: several settings of {label}"
    return [result for _, result in chosen]


def published(dataset, label, title, f):
    """The number that a paper has for a setting."""
    model = re.match(r"\w+\*?", label.replace("\\", ""))[0]
    unpaired = (re.findall(r"--unpaired (\w+)", label) or ["split"])[0]
    for of, name, shown, column, numbers in papers.PAPER:
        if (of, name, column) == (dataset, model, title) and shown in ("", unpaired):
            return float(numbers.split()[[1, 0.5, 0.25, 0.125, 0.0625].index(f)])
    raise AssertionError(f"no paper has {title} of {label} on {dataset} at f = {f}")


def check_cell(text, values):
    """mean ± sample standard deviation, each rounded to the digits that it has"""
    expected = [statistics.mean(values)]
    if len(values) > 1:
        expected.append(statistics.stdev(values))
    stated = text.removesuffix("%").split(" ± ")
    assert len(stated) == len(expected), (text, expected)
    for number, exact in zip(stated, expected):
        digits = len(number.partition(".")[2])
        assert float(number) == pytest.approx(exact, abs=0.51 * 10**-digits), (text, expected)


def number_tables(name):
    """-> (file, the f and the metric in the first cell or None, titles, rows) of each table"""
    for head, rows in tables(page(name)):
        file, *rest = head[0].split(", ")
        if file in RESULTS:
            stated = [re.fullmatch(r"f = ([\d/.]+)", text) for text in rest]
            f = next((fraction(match[1]) for match in stated if match), None)
            metric = [text for text, match in zip(rest, stated) if not match]
            assert len(metric) <= 1, head
            yield file, f, metric[0] if metric else None, head[1:], rows


def check_table(file, f, metric, titles, rows):
    """-> the number of cells"""
    checked = 0
    for label, *cells in rows:
        of_paper = False
        for title, cell in zip(titles, cells, strict=True):
            match = re.fullmatch(r"(paper, |paper: |paper)?(?:f = ([\d/.]+))?:? ?(.*)", title)
            here = fraction(match[2]) if match[2] else f
            of_paper = bool(match[1]) or ", paper" in label
            if cell in ("", "–"):
                continue
            if title == "seeds":
                assert len(pick(file, label, f)) == int(cell), (file, label)
            elif of_paper:
                assert float(cell) == published(file, label, match[3] or metric, here)
            elif " " not in label or "`" in label or "," in label:
                check_cell(cell, [value(r, match[3] or metric) for r in pick(file, label, here)])
            else:
                continue  # a baseline that is no run
            checked += 1
    return checked


@pytest.mark.parametrize("name, least", [("README.md", 30), ("docs/gallery.md", 250)])
def test_every_cell_is_that_of_its_runs(name, least):
    assert sum(check_table(*table) for table in number_tables(name)) >= least


# ------------------------------------------------------------------------------------------ verdicts


def side(text, file, f, title):
    """One side of a claim: a label, then what differs from the cell "runs": "(gallery)", another
    file; "in self grey", another column; "at f = 1". -> its numbers"""
    match = re.fullmatch(r"(.*?)(?: \(([\w-]+)\))?(?: in (.*?))?(?: at f = ([\d/.]+))?", text)
    chosen = pick(match[2] or file, match[1], fraction(match[4]) if match[4] else f)
    return [value(result, match[3] or title) for result in chosen]


def verdict(file, claim, f, title):
    """By the rule at the top of docs/gallery.md. claim: "A above B" or "A below B" """
    left, order, right = re.fullmatch(r"(.*) (above|below) (.*)", claim).groups()
    sides = [side(text, file, f, title) for text in (left, right)]
    lead = statistics.mean(sides[0]) - statistics.mean(sides[1])
    lead *= 1 if order == "above" else -1
    seeds = min(map(len, sides))
    if seeds < 3:
        return (
            f"{'two seeds' if seeds == 2 else 'one run'}, {'as' if lead > 0 else 'not as'} claimed"
        )
    if abs(lead) <= sum(map(statistics.stdev, sides)):
        return "no order"
    return "holds" if lead > 0 else "does not hold"


def verdicts(name):
    """-> (stated, file, claim, f, title) of each claim, f and metric"""
    for head, rows in tables(page(name)):
        if head == ["claim", "runs", "verdict"]:
            for claim, runs, stated in rows:
                match = re.fullmatch(r"([\w-]+)(?:, f = ([\d/., ]+))?(?:: (.*))?", runs)
                for f in match[2].split(", ") if match[2] else [None]:
                    for title in match[3].split(", ") if match[3] else [None]:
                        yield stated, match[1], claim, f and fraction(f), title


@pytest.mark.parametrize("name, least", [("README.md", 15), ("docs/gallery.md", 150)])
def test_a_verdict_follows_from_the_runs_by_the_rule(name, least):
    stated = list(verdicts(name))
    wrong = [row for row in stated if row[0] != verdict(*row[1:])]
    assert not wrong and len(stated) >= least


def test_the_rule_needs_three_seeds_and_more_than_both_deviations(monkeypatch):
    def runs(model, *values):
        run = {"model": model, "paired": 1.0, "objective": ""}
        return [{"run": run, "epoch": 1, "accuracy": {"top": v}} for v in values]

    def judge(*others):
        rows = runs("MEME", 0.8, 0.9, 1.0) + runs("MVAE", *others)  # .9 ± .1
        monkeypatch.setitem(globals(), "results", lambda file: rows)
        return verdict("any", "MEME above MVAE", 1.0, "top")

    assert judge(0.6, 0.7, 0.68) == "holds"  # .66 ± .05
    assert judge(0.65, 0.75, 0.85) == "no order"  # .75 ± .1
    assert judge(1.1, 1.2, 1.15) == "does not hold"
    assert judge(0.1, 0.2) == "two seeds, as claimed" and judge(1.5) == "one run, not as claimed"


# ------------------------------------------------------------------------------ prose, own tables


def test_every_number_with_a_deviation_is_that_of_some_runs():
    groups = {}
    for name in RESULTS:
        for result in results(name):
            groups.setdefault((name, setting(result)), []).append(result)
    known = own_cells().union(*(spreads(group) for group in groups.values() if len(group) > 1))
    cell = r"(-?\d*\.\d+)\s±\s(\d*\.\d+)"
    known |= {(float(m), float(s)) for m, s in re.findall(cell, page("docs/spectra.md"))}  # older
    for name in ("README.md", "results/README.md", "docs/gallery.md", "docs/own.md"):
        prose = re.sub(r"^[|].*$", "", page(name), flags=re.M)
        for mean, spread in re.findall(cell, prose):
            assert (float(mean), float(spread)) in known, (name, mean, spread)


def spreads(group):
    """Every mean and deviation of a group of runs, as tables round them."""
    for values in zip(*map(numbers, group)):
        if all(isinstance(v, (int, float)) for v in values):
            digits = 1 if max(map(abs, values)) >= 10 else 3
            yield round(statistics.mean(values), digits), round(statistics.stdev(values), digits)


def numbers(result):
    sections = ("cross_coherence", "self_coherence", "joint_coherence", "joint_entropy")
    sections += ("aggregate_coherence", "aggregate_entropy", "accuracy", "latent_accuracy")
    sections += ("mutual_information", "log_likelihood", "correlation", "chance_correlation")
    for section in (*sections, "rank", "bits", "w2_overlap", "signal_to_noise"):
        part = result.get(section)
        yield from part.values() if isinstance(part, dict) else [part]


def own_lines():
    lines = page("docs/own.jsonl").splitlines()
    groups = {}
    for line in map(json.loads, lines):
        label = " ".join([line["method"], *line.get("flags", [])])
        groups.setdefault((line["set"], label), []).append(line)
    return groups


def own_cells():
    cells = set()
    for group in own_lines().values():
        if len(group) > 1:
            rows = [[*r["score"].values(), statistics.mean(r["score"].values())] for r in group]
            for values in zip(*rows):
                mean, spread = statistics.mean(values), statistics.stdev(values)
                cells.add((round(mean, 3), round(spread, 3)))
    return cells


def test_the_cells_of_docs_own_are_those_of_its_runs():
    parts = re.split(r"^\*\*(\w+)\*\*$", page("docs/own.md"), flags=re.M)
    groups, checked = own_lines(), 0
    for name, text in zip(parts[1::2], parts[2::2]):
        head, rows = next(tables(text))
        for label, *cells in rows:
            group = groups[name, label]
            for title, cell in zip(head[1:], cells, strict=True):
                if title in ("cover", "seconds"):
                    continue
                if title == "seeds":
                    assert int(cell) == len(group)
                elif title == "mean":
                    check_cell(cell, [statistics.mean(r["score"].values()) for r in group])
                else:
                    check_cell(cell, [r["score"][title] for r in group])
                checked += 1
    assert checked >= 150


# ----------------------------------------------------------------------------- commands, code, names

LINES = r"(?:python|pip|torchrun|for|done|  |[a-z]\w*=)"  # how a line of a shell command begins


def commands(name):
    """The commands of a page, loops and variables expanded by a shell in which python only prints its
    arguments. -> (script, arguments) of each"""
    text = re.sub(r"^```.*?^```", "", page(name), flags=re.S | re.M)
    lines = re.findall(rf"^    ({LINES}.*)$", text, re.M)
    shell = (
        'python() { printf "%s\\n" "$*"; }; pip() { :; }; torchrun() { shift 2; python "$@"; }\n'
    )
    shell += "cd /nowhere 2> /dev/null\nset -f\n" + "\n".join(lines)
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0 and not done.stderr, (name, done.stderr)
    for line in done.stdout.splitlines():
        script, *arguments = line.split()
        yield script, arguments
    for line in re.findall(r"^\| \[(?:MEME|PoE)\] .*", text, re.M):  # docs/reproduce.md's table
        for command in re.findall(r"`python (\w+\.py [^`]*)`", line):
            script, *arguments = command.split()
            yield script, arguments


@pytest.mark.parametrize("name, least", [("README.md", 6), ("results/README.md", 250),
                                         ("docs/gallery.md", 60), ("docs/reproduce.md", 50)])  # fmt: skip
def test_the_commands_of_a_page_parse(name, least):
    found = 0
    for script, arguments in commands(name):
        if script.startswith("docs/"):  # of an earlier commit, as the page says
            continue
        if script == "eval.py":
            args = command_parser().parse_args(arguments)
            kept = [args.save, args.figures, args.out]
            assert not any(str(path).startswith(("results/", "figures")) for path in kept if path)
        elif script == "data.py":
            assert arguments[0] in data.DATASETS
        else:
            SCRIPTS[script.removesuffix(".py")].parse_args(arguments)
        found += 1
    assert found >= least


def entries(name):
    """The tables and figures that a page treats, as it names them. -> (paper, title) of each"""
    if name == "docs/reproduce.md":
        return re.findall(r"^\| \[(MEME|PoE)\] ([^|]*) \|", page(name), re.M)
    paper, found = None, []
    for line in page(name).splitlines():
        if heading := re.fullmatch(r"## \[(\w+)\]", line):
            paper = heading[1]
        elif line.startswith("### "):
            found.append((paper, line))
    return found


@pytest.mark.parametrize("name", ["docs/reproduce.md", "docs/gallery.md"])
def test_every_table_and_figure_of_the_papers_is_there(name):
    named = set()
    for paper, title in entries(name):
        for kind, numbers in re.findall(r"(Table|Fig\.) (\d+(?:(?:, | to )\d+)*)", title):
            for part in numbers.split(", "):
                first, last = (part.split(" to ") * 2)[:2]
                named |= {(paper, kind, n) for n in range(int(first), int(last) + 1)}
    expected = [("MEME", "Table", range(2, 8)), ("MEME", "Fig.", range(3, 23))]
    expected += [("PoE", "Table", [1]), ("PoE", "Fig.", range(3, 12))]
    assert named == {(paper, kind, n) for paper, kind, numbers in expected for n in numbers}


def test_every_run_of_results_has_the_command_that_made_it():
    """Its flags, for the same name of the folder, are those of the run."""
    made = {}
    for script, arguments in commands("results/README.md"):
        if "--out" in arguments and not script.startswith("docs/"):
            _, args = SCRIPTS[script.removesuffix(".py")].parse_args(arguments)
            made[os.path.basename(args.out)] = vars(args) | {"script": script.removesuffix(".py")}
    checked = 0
    for name in set(RESULTS) - {"glyphs-weights", "mnist-split-weights"}:  # of docs/sampling.py
        for result in results(name):
            run = {RENAMED.get(key, key): value for key, value in result["run"].items()}
            args = made[result["folder"]]
            for key in {"script", "amp"} | (run.keys() & args.keys()) - PLACE:
                if key not in ("likelihoods", "weights", "decay") and key in run:
                    assert (run[key] or 0) == (args[key] or 0), (result["folder"], key)
            checked += 1
    assert checked >= 190


def test_the_transcript_of_the_first_page_is_what_a_run_prints(tmp_path, capsys):
    """Its form is that of a short run, its numbers those of the run of the same command."""
    transcript = re.search(r"^```\n(.*?\n)```", page("README.md"), re.S | re.M)[1]
    folder = tmp_path / "run"
    train("meme", epochs=1, limit=128, out=folder)
    stated = transcript.replace("runs/meme-glyphs-paired1-split-seed0", "RUN").splitlines()
    printed = capsys.readouterr().out.replace(str(folder), "RUN").splitlines()[-len(stated) :]
    form = r"[\d.]+(?: (?:s|min|h)\b)?"
    assert [re.sub(form, "#", line) for line in stated] == [
        re.sub(form, "#", line) for line in printed
    ]
    (run,) = [r for r in results("glyphs-joint") if r["folder"] == "glyphs-meme-0"]
    logged = [run["log"][-1][key] for key in ("objective", "log_p_grey", "log_p_colour")]
    numbers = [float(text) for text in re.findall(r"(?<= )-\d[\d.]*", stated[0])]
    assert numbers == pytest.approx(logged, rel=0.01)


def python_code(name):
    return re.findall(r"^```python\n(.*?)^```", page(name), re.S | re.M)


def test_the_code_of_the_first_page_runs():
    equation, *examples = python_code("README.md")
    assert len(examples) == 2
    for example in examples:
        exec(example, {})
    source = page("mvae.py")
    assert all(line in source for line in equation.splitlines())


def test_the_data_set_of_docs_extend_trains_as_any_other(tmp_path, monkeypatch):
    (code,) = python_code("docs/extend.md")
    exec(code, vars(module := types.ModuleType("loaders.shapes")))
    monkeypatch.setitem(sys.modules, "loaders.shapes", module)
    monkeypatch.setitem(data.DATASETS, "shapes", "shapes")
    train("svae", dataset="shapes", epochs=1, out=tmp_path / "run")
    assert (tmp_path / "run" / "checkpoint.pt").exists()


@functools.cache
def defined(file):
    """The names that a file defines, those of methods and fields as CLASS.NAME."""
    names = set()
    for node in ast.parse(page(file)).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
            for child in getattr(node, "body", []) if isinstance(node, ast.ClassDef) else ():
                if isinstance(child, ast.FunctionDef):
                    names.add(f"{node.name}.{child.name}")
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return names


def test_every_place_that_a_page_names_exists():
    places = {p for name in PAGES for p in re.findall(r"`([\w/]+\.py): ([\w.]+)`", page(name))}
    assert len(places) >= 60
    assert not [place for place in sorted(places) if place[1] not in defined(place[0])]


def anchor(title):
    """The anchor of a heading, as pages of repositories have it."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def test_every_link_between_pages_leads_somewhere():
    for name in PAGES:
        for path, _, title in re.findall(r"\]\((?!http)([^)#]*)(#([^)]*))?\)", page(name)):
            target = os.path.normpath(os.path.join(os.path.dirname(name), path)) if path else name
            assert (ROOT / target).exists(), (name, path)
            headings = re.findall(r"^#+ (.*)$", page(target), re.M) if title else []
            assert not title or title in map(anchor, headings), (name, path, title)
