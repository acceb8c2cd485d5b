"""python eval.py: runs in, tables and figures out.

A run is loaded with its data set (`load_run`, `load_benchmark`), judged (`metrics_json`), and its
metrics printed and kept before its figures are drawn. What is specific to a data set stands in
EXTRAS; data sets without an entry are judged by oracles, where they have views, or as a user's own
arrays.
"""

import argparse
import importlib
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

import data
import nets
from eval import (
    coherence,
    joint_coherence,
    latent_accuracy,
    log_likelihoods,
    mutual_information,
    split_accuracy,
)
from evaluation import cub, figures, fill, latent, oracles, own, spectra, tables

SCRIPTS = ("meme", "svae", "vaevae", "mmvae", "mvae")
MOST_LABELS = 200  # the memory of a logistic regression grows with their square


class Extra(NamedTuple):
    """The functions of a data set in place of the metrics and the figure of digits and own arrays."""

    evaluate: Callable  # (model, dataset, root, seed) -> sections of metrics.json
    draw: Callable  # (run, dataset, root, path): the figure of a run
    compare: Callable | None = None  # (results, folder): a figure of several runs
    notes: Callable = lambda results: []  # lines below the numbers of these results


EXTRAS = {
    "cub": Extra(cub.evaluate, cub.draw),
    "spectra": Extra(spectra.evaluate, spectra.draw, spectra.compare, spectra.notes),
}


class Run(NamedTuple):
    folder: Path
    args: dict  # args.json
    epoch: int  # epochs of training
    minutes: float  # of training
    model: torch.nn.Module
    log: list  # the rows of log.csv


class Benchmark(NamedTuple):
    """A data set as a run was trained on it, and what judges images of it."""

    dataset: data.Dataset
    oracles: dict  # {view: Oracle}
    accuracies: dict  # {view: its test accuracy}
    root: str  # the folder of the data sets


class Progress:
    """with Progress("reading glyphs") as report: says on stderr what is being done, and again every
    five seconds until it is done. report(share done) adds the time left."""

    first, later = 2.0, 4.5  # seconds until the first of these lines, and between them

    def __init__(self, task):
        self.task, self.share, self.finished = task, 0.0, threading.Event()
        self.thread = threading.Thread(target=self.repeat, daemon=True)

    def __enter__(self):
        print(f"{self.task} ...", file=sys.stderr)
        self.started = time.perf_counter()
        self.thread.start()
        return self.report

    def __exit__(self, *error):
        self.finished.set()
        self.thread.join()

    def report(self, share):
        self.share = share

    def repeat(self):
        pause = self.first
        while not self.finished.wait(pause):
            seconds, pause = time.perf_counter() - self.started, self.later
            text = f"{data.duration(seconds)} so far"
            if self.share:
                left = data.duration(seconds / self.share * (1 - self.share))
                text = f"{self.share:.0%} done, {left} left"
            print(f"{self.task}: {text}", file=sys.stderr)


# --------------------------------------------------------------------------------- runs and their data


def load_run(folder, device="cpu"):
    """The trained model of a run folder, in eval mode. ValueError where it cannot be read."""
    args, state = data.read_run(folder, device)
    if args["script"] not in SCRIPTS:  # nothing else is imported
        raise ValueError(f"{folder} is no run of {', '.join(SCRIPTS)}, but of {args['script']}")
    cls = getattr(importlib.import_module(args["script"]), args["model"])
    try:
        model = cls(nets.modalities(**args["spec"]), args["latent_dim"], **args["options"])
        model.load_state_dict(state["model"])
    except (RuntimeError, TypeError) as error:  # other networks, say, than those of the training
        reason = " ".join(str(error).split())  # torch's have several lines
        raise ValueError(f"{folder} cannot be loaded: {reason}") from None
    minutes = sum(row["seconds"] for row in state["log"]) / 60
    return Run(
        folder=Path(folder),
        args=args,
        epoch=int(state["epoch"]),
        minutes=minutes,
        model=model.to(device).eval(),
        log=state["log"],
    )


def load_dataset(run, name, root, device):
    """The data set of a run, on the device. ValueError where it is not what the run was trained on."""
    args = run.args
    if name.endswith(".npz") and not Path(name).exists():
        raise ValueError(f"there is no {name}: --dataset NEW.npz says where it lies now")

    def load(limit):
        return data.load(
            name,
            root,
            limit=limit,
            likelihoods=args["likelihoods"],
            standardise=args["standardise"],
            spec=args["spec"],
        )

    with Progress(f"reading {name}"):
        dataset = load(args["limit"])
        if args["limit"] and not is_own(dataset):  # oracles and CCA are fitted to all examples
            dataset = load(None)
    if not is_data_of(run, dataset):
        raise ValueError(f"{name} does not hold the data that {run.folder} was trained on")
    return dataset._replace(train=dataset.train.to(device), test=dataset.test.to(device))


def is_data_of(run, dataset):
    """True for the data that a run was trained on, with the same kinds, likelihoods and statistics."""
    facts = {key: run.args["spec"].get(key) for key in dataset.spec}
    trained_on = facts, run.args["note"], run.args["digest"]
    return trained_on == (dataset.spec, dataset.note, dataset.digest)


def load_benchmark(run, name, root, device):
    """The data set of a run with its oracles, which are trained where they are not cached."""
    dataset = load_dataset(run, name, root, device)
    judges, accuracies = {}, {}
    images = oracles.image_digest(dataset) if dataset.views else ""
    for view in dataset.views:
        with Progress(f"oracle of {dataset.name}, {view}") as report:
            judges[view], accuracies[view] = oracles.load_oracle(
                dataset, view, root, images=images, report=report
            )
    return Benchmark(dataset, judges, accuracies, root)


def is_own(dataset):
    """True for a data set without oracles and metrics of its own, as a user's arrays."""
    return not dataset.views and dataset.name not in EXTRAS


# --------------------------------------------------------------------------------------- metrics.json


def training_streams(run, dataset):
    return dataset.streams(run.args["paired"], run.args["unpaired"], run.args["seed"])


def trained_priors(run, dataset):
    """The names of the modalities whose own p(z) the run has trained."""
    return run.model.trained_priors([mask for mask, _ in training_streams(run, dataset)])


def evaluate(run, benchmark, examples=100, samples=1000, seed=0):
    """All metrics that apply to the data set.

    examples, samples: N and K of the likelihoods, examples=0: none. "disagreement" holds the shares
    of images on which the members of an oracle disagree, under the names of the metrics.
    -> sections of metrics.json
    """
    model, dataset, judges = run.model, benchmark.dataset, benchmark.oracles
    torch.manual_seed(seed)
    model.eval()
    if dataset.name in EXTRAS:
        with Progress(f"metrics of {dataset.name}"):
            return EXTRAS[dataset.name].evaluate(model, dataset, benchmark.root, seed)
    sections = {}
    if len(judges) == 1:  # the modalities are parts of one image, which is judged as a whole
        with Progress("accuracy of regenerated images"):
            sections, disagreement = split_accuracy(model, dataset, judges)
        sections["disagreement"] = disagreement
    elif judges:
        with Progress("coherence of generated images"):
            sections, disagreement = coherence(model, dataset, judges)
            joint, joint_disagreement = joint_coherence(model, dataset, judges)
        sections |= joint
        sections["disagreement"] = disagreement | joint_disagreement
        with Progress("mutual information of label and oracle"):
            sections |= mutual_information(model, dataset, judges)
    else:
        with Progress("regenerated examples"):
            sections |= own.evaluate(model, dataset, seed, training_streams(run, dataset))
    labelled = dataset.train.labels is not None and dataset.test.labels is not None
    if labelled and len(dataset.train.labels.unique()) > MOST_LABELS:
        print(
            f"no classifier of z: there are more than {MOST_LABELS} values of labels",
            file=sys.stderr,
        )
    elif labelled:
        with Progress("a linear classifier of z"):
            sections |= latent_accuracy(model, dataset)
    if examples:
        with Progress(f"log-likelihoods of {examples:,} examples, {samples:,} samples of z each"):
            sections |= log_likelihoods(
                model, dataset, examples, samples, trained_priors(run, dataset)
            )
    if len(judges) > 1:
        torch.manual_seed(seed)  # the same examples with and without likelihoods
        with Progress("distances of related and unrelated examples"):
            sections["w2_overlap"] = latent.w2_overlap(latent.posterior_distances(model, dataset))
        if run.args["model"] == "MEME":
            with Progress("signal-to-noise ratio of the gradient"):
                ratios = latent.gradient_ratios(model, dataset)
            if ratios:
                sections["signal_to_noise"] = latent.signal_to_noise(ratios)
    return sections


def metrics_json(run, benchmark, examples=100, samples=1000, seed=0):
    """The contents of metrics.json."""
    dataset = benchmark.dataset
    examples = min(examples, len(dataset.test))
    greys = [m.likelihood == "bernoulli" and m.kind != "bits" for m in run.model.modalities]
    return evaluate(run, benchmark, examples, samples, seed) | {
        "prior": len(trained_priors(run, dataset)) > 1,
        "oracle": benchmark.accuracies,
        "data": f"{dataset.name}: {dataset.note}" if dataset.note else str(dataset.name),
        "run": run.args,
        "folder": str(run.folder),
        "epoch": run.epoch,
        "minutes": run.minutes,
        "samples": samples,
        "examples": examples,
        "pseudo": any(greys),  # Bernoulli on values between 0 and 1
    }


# --------------------------------------------------------------------------- python eval.py runs/...


def parser():
    p = argparse.ArgumentParser(
        description="Evaluate trained models on test examples, or fill in what new examples lack.",
        epilog="""Writes metrics.json into each folder and prints a table of all runs; runs that
        differ in --seed alone share a row. NEW.npz has arrays named like the modalities of the run,
        each absent, hidden row by row by an array `mask` (examples, modalities), or entry by entry
        by NaN. FILLED.npz gets latent_mean, latent_std and every modality, with what was missing
        filled in, in the units and shapes of the data.""",
        allow_abbrev=False,
        formatter_class=data.Help,
    )
    p.suggest_on_error = True  # Python 3.14 and newer
    flag = p.add_argument
    cuda = "cuda" if torch.cuda.is_available() else "cpu"
    flag("runs", nargs="+", type=Path, help="run folders, or a .jsonl of saved results")
    flag("--figures", metavar="DIR", type=Path, help="draw figures into this folder")
    flag("--save", metavar="FILE.jsonl", type=Path, help="append results and logs to this file")
    flag("--data", metavar="DIR", help="folder of the data sets, if not that of the training")
    flag("--dataset", metavar="NEW.npz", help="where a run's .npz lies now, if it has moved")
    flag("--seed", type=int, default=0, help="random seed of the samples of z")
    samples = "samples of z per log-likelihood (1000); with --fill: write N draws of x"
    flag("--samples", metavar="N", type=data.count, help=samples)
    flag("--full", action="store_true", help="log-likelihoods of all test examples, not of 100")
    flag("--no-likelihoods", action="store_true", help="no log-likelihoods, the slowest metric")
    flag("--paper", action="store_true", help="print the papers' numbers under ours")
    flag("--against", metavar="FLAG", default="paired", help="x-axis of curves")
    flag("--device", default=cuda, help="a torch device: cuda, cuda:1, mps, cpu")
    flag("--fill", metavar="NEW.npz", type=Path, help="new examples to fill in, with --out")
    flag("--out", metavar="FILLED.npz", type=Path, help="the file that --fill writes")
    flag("--reconstruct", action="store_true", help="--fill: the mean of known entries, too")
    interval = "--fill: level of the intervals NAME_low, NAME_high"
    flag("--interval", metavar="P", type=float, default=0.9, help=interval)
    return p


def check(args):
    """Refuse what would stop the command after its work. ValueError, OSError"""
    data.find_device(args.device)
    if bool(args.fill) != bool(args.out):
        raise ValueError("--fill NEW.npz and --out FILLED.npz must be given together")
    if args.fill and len(args.runs) > 1:
        raise ValueError(f"--fill must be given one run, not {len(args.runs)}")
    if args.reconstruct and not args.fill:
        raise ValueError("--reconstruct belongs to --fill")
    if not 0 < args.interval < 1:
        raise ValueError(f"--interval must be between 0 and 1, not {args.interval}")
    if args.save:
        if args.save.suffix != ".jsonl":
            raise ValueError(f"--save must end in .jsonl, not {args.save}")
        check_folder(args.save.parent)
        if args.save.exists():
            tables.read_results(args.save)
    if args.figures:
        figures.pyplot()  # ValueError without matplotlib
        check_folder(args.figures)


def check_folder(folder):
    """Make a folder; OSError where it cannot be written to."""
    folder.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=folder).close()


def place(run, args):
    """The place of a run's data set: its name or path, and the folder of the data sets."""
    return args.dataset or run.args["dataset"], args.data or run.args["data"]


def fill_in(args):
    """--fill: writes args.out and prints its contents."""
    run = load_run(args.runs[0], args.device)
    fill.check(run.model, args.fill, args.out)
    dataset = None
    if args.samples is None:
        try:
            dataset = load_dataset(run, *place(run, args), args.device)
        except (ValueError, OSError) as error:
            print(f"no intervals, since they need the run's data: {error}", file=sys.stderr)
    with Progress(f"filling in {args.fill}"):
        filled = fill.fill(
            run.model,
            args.fill,
            args.out,
            draws=args.samples,
            reconstruct=args.reconstruct,
            seed=args.seed,
            dataset=dataset,
            level=args.interval,
        )
    print(f"{args.out}: latent_mean, latent_std and every modality. Filled in:")
    for name, column in filled.items():
        line = f"    {tables.label(name)}: {tables.count(column.cells, 'value')}"
        line += f" in {tables.count(column.rows, 'row')}"
        if column.unseen:
            line += f"; {column.unseen:,} stay NaN, of features that no training example shows"
        print(line)


def evaluate_run(folder, args, benchmarks):
    """Judge a run. benchmarks: those of earlier runs, by place and --limit.
    -> Run, Benchmark, the contents of metrics.json"""
    print(f"evaluating {folder} ...", file=sys.stderr)
    run = load_run(folder, args.device)
    name, root = place(run, args)
    key = name, root, run.args["limit"]
    if key not in benchmarks or not is_data_of(run, benchmarks[key].dataset):
        benchmarks[key] = load_benchmark(run, name, root, args.device)
    examples = len(benchmarks[key].dataset.test) if args.full else 100
    result = metrics_json(
        run,
        benchmarks[key],
        examples=0 if args.no_likelihoods else examples,
        samples=args.samples or 1000,
        seed=args.seed,
    )
    return run, benchmarks[key], result


def draw(run, benchmark, folder, seed):
    """The figures of a run. -> generations' rows, or None; paths that could not be drawn"""
    dataset, judges = benchmark.dataset, benchmark.oracles
    streams = training_streams(run, dataset)
    with Progress(f"drawing {run.folder}"):
        rows, failed = figures.draw(run, dataset, judges, folder, seed, streams)
        if dataset.name in EXTRAS:
            path = folder / f"{run.folder.resolve().name}-generation.png"
            with figures.attempt(path, failed):
                EXTRAS[dataset.name].draw(run, dataset, benchmark.root, path)
    return rows, failed


def show(results, paper=False, single=False):
    """Print results: a report of a single one, else the tables of each data set; and notes."""
    for same in tables.by_data(results):
        if single:
            text, lines = tables.report(same[0], paper), own.notes(same)
        else:
            same = [tables.compact(result) for result in same]
            text, lines = tables.table(same, paper), []
        if same[0]["run"]["dataset"] in EXTRAS:
            lines += EXTRAS[same[0]["run"]["dataset"]].notes(same)
        print(f"{text}\n\n{tables.wrapped(tables.notes(same) + lines)}".rstrip() + "\n")


def reason(error):
    """An error that a user can do something about, as a sentence; None for a fault of the program, of which
    Python's traceback says more."""
    text = " ".join(str(error).split())
    if isinstance(error, MemoryError) or "allocate" in text or "out of memory" in text:
        return f"there is not enough memory: {text}"
    return text if isinstance(error, ValueError | OSError) else None


def main(argv=None):
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal may lack the arrows of a table
    p = parser()
    args = p.parse_args(argv)
    try:
        check(args)
        if args.fill:
            return fill_in(args)
    except Exception as error:
        if reason(error) is None:
            raise
        p.error(reason(error))

    results, failures, evaluated, benchmarks = [], [], [], {}

    def attempt(task, *arguments):
        """-> task(*arguments); None where it fails, which leaves all other results"""
        try:
            return task(*arguments)
        except Exception as error:
            if reason(error) is None:
                raise
            failures.append(reason(error))

    # evaluate
    folders = list({path.resolve(): path for path in args.runs}.values())
    try:
        for folder in folders:
            if folder.suffix == ".jsonl":
                results += attempt(tables.read_results, folder) or []
            elif is_bare(folder):
                print(f"{folder} has no checkpoint: shown from its metrics.json", file=sys.stderr)
                results += attempt(tables.read_results, folder) or []
            elif judged := attempt(evaluate_run, folder, args, benchmarks):
                run, benchmark, result = judged
                results.append(result)
                evaluated.append((folder, benchmark))
                attempt(tables.save_metrics, folder / "metrics.json", result)
                if args.save:
                    attempt(tables.save_result, args.save, result, run.log)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    finally:  # what was computed is shown, after a fault, too
        single = len(args.runs) == len(results) == 1
        results = tables.distinct(results)
        show(results, args.paper, single)

    # figures
    pages, missing = {}, []  # missing: files that could not be drawn
    for folder, benchmark in evaluated if args.figures else ():
        run = attempt(load_run, folder, args.device)  # again: not all models fit in memory at once
        drawn = run and attempt(draw, run, benchmark, args.figures, args.seed)
        if drawn:
            pages[str(folder)] = drawn[0]
            missing += drawn[1]
    if args.figures:
        against = args.against.replace("-", "_")
        missing += attempt(figures.draw_results, results, pages, args.figures, against) or []
        for same in tables.by_data(results):
            name = same[0]["run"]["dataset"]
            if name in EXTRAS and EXTRAS[name].compare:
                path = args.figures / f"{name}-top-k.png"
                with figures.attempt(path, missing):
                    EXTRAS[name].compare(same, path)

    for sentence in failures:
        print(f"{p.prog}: {sentence}", file=sys.stderr)
    if failures or missing:
        sys.exit(2)


def is_bare(folder):
    """True for a run folder whose metrics.json is kept without its checkpoint."""
    return (folder / "metrics.json").exists() and not (folder / "checkpoint.pt").exists()
