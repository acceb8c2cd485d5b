"""How much a number moves with the oracles' seed. `python docs/oracles.py RUN... [--seeds 5]`

Trains the oracles of the runs' data set anew for every seed and prints the accuracy or coherence of
each run, read by each; the last column is their largest difference. It keeps no oracle.
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


def shares(run, dataset, oracles):
    """-> {column of the table: share}, of the same samples of z for every oracle"""
    torch.manual_seed(0)
    judge = evaluation.split_accuracy if evaluation.in_parts(dataset) else evaluation.coherence
    metrics, _ = judge(run.model, dataset, oracles)
    priors = evaluation.trained_priors(run.model, run.args, dataset)
    if judge is evaluation.coherence and len(priors) > 1:
        metrics |= evaluation.joint_coherence(run.model, dataset, oracles)[0]
        metrics.pop("joint_entropy")
    return evaluation.columns(metrics)


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("runs", nargs="+", help="run folders, of one data set")
    p.add_argument("--seeds", type=data.at_least(2), default=5, help="how many to try")
    args = p.parse_args()
    runs = [evaluation.load_run(folder) for folder in args.runs]
    dataset, found = data.load(runs[0].args["dataset"], runs[0].args["data"]), {}
    for seed in range(args.seeds):
        with tempfile.TemporaryDirectory() as folder:
            views = evaluation.views(dataset)
            oracles = {view: load_oracle(dataset, view, folder, seed)[0] for view in views}
        for run in runs:
            for title, share in shares(run, dataset, oracles).items():
                found.setdefault((run.args["model"], title), []).append(share)
    head = ["model", "number", *(f"seed {k}" for k in range(args.seeds)), "moves by"]
    rows = [
        [*name, *(f"{share:.4f}" for share in (*values, max(values) - min(values)))]
        for name, values in found.items()
    ]
    print(tables.markdown(head, rows))


if __name__ == "__main__":
    main()
