"""Which of the two makes the difference with few pairs: how often a pair is drawn, or its weight?

    python docs/sampling.py SCRIPT --sampling natural --dataset mnist-split --paired 0.01 --out RUN

trains a script with the batches of one --sampling and the weights of the other: natural batches,
in which pairs are rare, with weight 1 for each stream, or balanced batches, with a batch of pairs
in each step, with the streams' shares of the examples as weights.
"""

import importlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data  # noqa: E402

batches = data.batches


def swapped(split, streams, batch_size, sampling, generator=None, rank=0, world=1):
    """data.batches with the weights of the other kind of sampling. For a single process, since
    several weigh their parts of a step."""
    total = sum(len(index) for _, index in streams)
    shares = [len(index) / total for _, index in streams]
    weights = [1.0] * len(streams) if sampling == "natural" else shares
    for batch in batches(split, streams, batch_size, sampling, generator, rank, world):
        yield [(weight, xs) for weight, (_, xs) in zip(weights, batch, strict=True)]


if __name__ == "__main__":
    data.batches = swapped
    importlib.import_module(sys.argv[1]).main(sys.argv[2:])
