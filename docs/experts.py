"""What became of the experts of SVAE and MVAE. `python docs/experts.py RUN...`

Prints a row per setting, mean ± standard deviation over the runs' seeds: the objective of the last
epoch; how many dimensions of z are alive, their KL to the prior above 0.05 nats in q(z|all), mean
over 1,000 training examples; the median logvar that the unimodal encoders give, before any bound;
and what the oracles read.
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data  # noqa: E402
import eval as evaluation  # noqa: E402
from benchmarks import tables  # noqa: E402
from oracles import shares  # noqa: E402


@torch.no_grad()
def alive(model, xs):
    """Dimensions of z whose KL to N(0, 1) is above 0.05 nats. -> a number"""
    q = model.posterior(*xs)
    kl = 0.5 * (q.mean**2 + q.variance - q.variance.log() - 1)
    return (kl.mean(0) > 0.05).sum().item()


@torch.no_grad()
def flatness(model, xs):
    """The median logvar of q_m(z|x_m), over modalities, examples and dimensions. -> a number"""
    own = [e[m] if isinstance(e, torch.nn.ModuleList) else e for m, e in enumerate(model.encoders)]
    return torch.cat([encode(x)[1] for encode, x in zip(own, xs)]).median().item()


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("runs", nargs="+", help="run folders of svae.py and mvae.py, of one data set")
    p.add_argument("--no-oracles", action="store_true", help="without what they read")
    args = p.parse_args()
    runs = [evaluation.load_run(folder) for folder in args.runs]
    name, root = runs[0].args["dataset"], runs[0].args["data"]
    if args.no_oracles:
        dataset = data.load(name, root)
    else:
        dataset, oracles, _ = evaluation.prepare(name, root, "cpu", runs[0].args["spec"])
    xs, rows = dataset.train[torch.arange(1000)], {}
    for run in runs:
        options = run.args["options"]
        anneal = f", --anneal {options['anneal']}" if options.get("anneal") else ""
        setting = run.args["model"], f"{run.args['lr']:g}", options["experts"] + anneal
        log = data.read_checkpoint(run.folder / "checkpoint.pt")["log"]
        numbers = {"objective": log[-1]["objective"]}
        numbers |= {"alive": alive(run.model, xs), "logvar": flatness(run.model, xs)}
        read = {} if args.no_oracles else shares(run, dataset, oracles)
        numbers |= {key: share for key, share in read.items() if "self" not in key}
        for key, number in numbers.items():
            rows.setdefault(setting, {}).setdefault(key, []).append(number)
    titles = list(next(iter(rows.values())))
    lines = [
        [*setting, len(numbers["objective"]), *map(tables.number, numbers.values())]
        for setting, numbers in rows.items()
    ]
    print(tables.markdown(["model", "lr", "experts", "seeds", *titles], lines))


if __name__ == "__main__":
    main()
