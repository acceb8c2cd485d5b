"""How well the five scripts fill in a user's own tables: the numbers of docs/own.md.

    python docs/own.py FOLDER/*.npz --seeds 0 1 2     trains, appends to docs/own.jsonl
    python docs/own.py                                prints the tables of docs/own.jsonl

Each .npz has train_mask. Of the test rows every modality is filled in from all others: R² averaged
over features, for classes and bits the share of right ones; cover: the share of true numbers and
counts inside the 90 % intervals, of the half of the test rows that the run does not have.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS, RESULTS = ("meme", "svae", "vaevae", "mmvae", "mvae"), ROOT / "docs" / "own.jsonl"


def call(script, *flags):
    """Run a script of the repository on one thread. -> seconds"""
    started = time.perf_counter()
    command = [sys.executable, ROOT / f"{script}.py", *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(map(str, command), check=True, stdout=subprocess.DEVNULL, env=environment)
    return time.perf_counter() - started


def score(truth, guess):
    if truth.ndim == 1:
        return (guess == truth).mean()
    if np.isin(truth, (0, 1)).all():
        return ((guess > 0.5) == truth).mean()
    spread = ((truth - truth.mean(0)) ** 2).sum(0)
    varies = spread > 0
    return (1 - (((truth - guess) ** 2).sum(0)[varies] / spread[varies])).mean()


def measure(path, script, seed, flags):
    """-> a line of docs/own.jsonl"""
    arrays = dict(np.load(path))
    test = {key[5:]: x for key, x in arrays.items() if key.startswith("test_")}
    names = [name for name in test if name not in ("labels", "mask")]
    half = len(test[names[0]]) // 2
    known = {key: x[:half] if key.startswith("test_") else x for key, x in arrays.items()}
    line = {"set": path.stem, "method": script, "seed": seed, "flags": flags}
    line |= {"score": {}, "cover": {}}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        np.savez(folder / path.name, **known)
        run, new, out = folder / "run", folder / "new.npz", folder / "filled.npz"
        train = ("--dataset", folder / path.name, "--seed", seed, "--out", run, *flags)
        line["seconds"] = round(call(script, *train))
        for name in names:
            np.savez(new, **{other: test[other] for other in names if other != name})
            call("eval", run, "--fill", new, "--out", out)
            filled, truth = dict(np.load(out)), test[name]
            out.unlink()
            line["score"][name] = round(float(score(truth, filled[name])), 4)
            if f"{name}_low" in filled:
                inside = (filled[f"{name}_low"] <= truth) & (truth <= filled[f"{name}_high"])
                line["cover"][name] = round(float(inside[half:].mean()), 4)
    return line


def cell(values):
    spread = f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
    return f"{np.mean(values):.3f}{spread}"


def tables(lines):
    """Markdown: a table per set, with a row per method, over its seeds."""
    for data in dict.fromkeys(line["set"] for line in lines):
        chosen = [line for line in lines if line["set"] == data]
        names = list(chosen[0]["score"])
        head = ["method", *names, "mean", "cover", "seconds", "seeds"]
        print(f"\n**{data}**\n\n| {' | '.join(head)} |\n|{' --- |' * len(head)}")
        rows = {}
        for line in chosen:
            rows.setdefault(" ".join([line["method"], *line.get("flags", [])]), []).append(line)
        for method, found in rows.items():
            cells = [method, *(cell([line["score"][name] for line in found]) for name in names)]
            cells.append(cell([np.mean(list(line["score"].values())) for line in found]))
            cover = [share for line in found for share in line.get("cover", {}).values()]
            cells.append(f"{min(cover):.2f} to {max(cover):.2f}" if cover else "")
            seconds = [line["seconds"] for line in found if "seconds" in line]
            cells += [f"{np.mean(seconds):.0f}" if seconds else "", str(len(found))]
            print(f"| {' | '.join(cells)} |")


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("sets", nargs="*", type=Path)
    p.add_argument("--scripts", nargs="+", default=SCRIPTS)
    p.add_argument("--seeds", nargs="+", type=int, default=[0])
    p.add_argument("--results", type=Path, default=RESULTS)
    args, flags = p.parse_known_args()
    for path in args.sets:
        for seed in args.seeds:
            for script in args.scripts:
                line = measure(path, script, seed, flags)
                with args.results.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
    if not args.sets:
        tables([json.loads(line) for line in args.results.read_text("utf-8").splitlines()])


if __name__ == "__main__":
    main()
