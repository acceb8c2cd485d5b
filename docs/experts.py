"""Which experts of SVAE and MVAE are alive after training. `python docs/experts.py RUN...`

Prints a row per setting, mean ± sample standard deviation over the runs' seeds: the objective of
the last epoch; the number of dimensions of z that are alive, whose KL to the prior is above 0.05
nats in q(z|all), mean over 1,000 training examples; the median logvar that the unimodal encoders
give, before any bound; and the metrics that oracles judge.
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data  # noqa: E402
import eval as evaluation  # noqa: E402
from benchmarks import tables  # noqa: E402
from oracles import judged  # noqa: E402


@torch.no_grad()
def alive(model, xs):
    """The number of dimensions of z whose KL to N(0, 1) is above 0.05 nats."""
    q = model.posterior(*xs)
    kl = 0.5 * (q.mean**2 + q.variance - q.variance.log() - 1)
    return (kl.mean(0) > 0.05).sum().item()


@torch.no_grad()
def median_logvar(model, xs):
    """The median logvar of q_m(z|x_m), over modalities, examples and dimensions."""
    own = [e[m] if isinstance(e, torch.nn.ModuleList) else e for m, e in enumerate(model.encoders)]
    return torch.cat([encode(x)[1] for encode, x in zip(own, xs)]).median().item()


def setting(run):
    """The cells that name a row: model, learning rate, kind of experts."""
    options = run.args["options"]
    experts = options["experts"]
    if options.get("anneal"):
        experts += f", --anneal {options['anneal']}"
    return run.args["model"], f"{run.args['lr']:g}", experts


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("runs", nargs="+", help="run folders of svae.py and mvae.py, of one data set")
    p.add_argument("--no-oracles", action="store_true", help="leave out what oracles judge")
    args = p.parse_args()
    oracles = None
    try:
        runs = [evaluation.load_run(folder) for folder in args.runs]
        name, root = runs[0].args["dataset"], runs[0].args["data"]
        if args.no_oracles:
            dataset = data.load(name, root)
        else:
            dataset, oracles, _ = evaluation.prepare(name, root, "cpu", runs[0].args["spec"])
    except (ValueError, OSError) as error:
        p.error(str(error))
    for run in runs:
        if "experts" not in run.args["options"] or not run.log:
            p.error(f"{run.folder} must be a trained run of svae.py or mvae.py")
    xs = dataset.train[torch.arange(min(1000, len(dataset.train)))]
    rows = {}  # {setting: {column: one number per run}}
    for run in runs:
        numbers = {
            "objective": run.log[-1]["objective"],
            "alive": alive(run.model, xs),
            "logvar": median_logvar(run.model, xs),
        }
        if oracles:
            metrics = judged(run, dataset, oracles)
            numbers |= {title: value for title, value in metrics.items() if "self" not in title}
        columns = rows.setdefault(setting(run), {})
        for title, value in numbers.items():
            columns.setdefault(title, []).append(value)
    titles = list(next(iter(rows.values())))
    lines = [
        [*names, len(columns["objective"]), *map(tables.number, columns.values())]
        for names, columns in rows.items()
    ]
    print(tables.markdown(["model", "lr", "experts", "seeds", *titles], lines))


if __name__ == "__main__":
    main()
