"""The spread of a metric over the oracles' seed. `python docs/oracles.py RUN... [--seeds 5]`

Trains the oracles of the runs' data set with each seed, without keeping them, and prints the
accuracy or coherence of each run as each oracle judges it; the last column is the largest
difference.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data  # noqa: E402
import eval as evaluation  # noqa: E402
from benchmarks import tables  # noqa: E402
from benchmarks.oracles import load_oracle  # noqa: E402


def judged(run, dataset, oracles):
    """The metrics that oracles judge, on the same samples of z for every oracle.
    -> {column of the table: number}"""
    torch.manual_seed(0)
    if evaluation.in_parts(dataset):
        metrics, _ = evaluation.split_accuracy(run.model, dataset, oracles)
        return tables.columns(metrics)
    metrics, _ = evaluation.coherence(run.model, dataset, oracles)
    if len(evaluation.trained_priors(run.model, run.args, dataset)) > 1:
        joint, _ = evaluation.joint_coherence(run.model, dataset, oracles)
        metrics["joint_coherence"] = joint["joint_coherence"]
    return tables.columns(metrics)


def train_oracles(dataset, seed):
    """-> {view: Oracle}"""
    with tempfile.TemporaryDirectory() as folder:
        names = evaluation.views(dataset)
        return {name: load_oracle(dataset, name, folder, seed)[0] for name in names}


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("runs", nargs="+", help="run folders, of one data set")
    p.add_argument("--seeds", type=int, default=5, help="number of oracles to train (default: 5)")
    args = p.parse_args()
    if args.seeds < 2:
        p.error(f"--seeds must be 2 or more, not {args.seeds}")
    try:
        runs = [evaluation.load_run(folder) for folder in args.runs]
        dataset = data.load(runs[0].args["dataset"], runs[0].args["data"])
    except (ValueError, OSError) as error:
        p.error(str(error))
    if not hasattr(data.benchmark(dataset.name), "views"):
        p.error(f"{dataset.name} has no oracles")
    numbers = {}  # {(model, column): one number per seed}
    for seed in range(args.seeds):
        oracles = train_oracles(dataset, seed)
        for run in runs:
            for title, number in judged(run, dataset, oracles).items():
                numbers.setdefault((run.args["model"], title), []).append(number)
    head = ["model", "number", *(f"seed {k}" for k in range(args.seeds)), "moves by"]
    rows = []
    for (model, title), values in numbers.items():
        cells = *values, max(values) - min(values)
        rows.append([model, title, *(f"{value:.4f}" for value in cells)])
    print(tables.markdown(head, rows))


if __name__ == "__main__":
    main()
