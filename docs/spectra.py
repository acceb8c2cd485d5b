"""Comparison of SVAE's q(z|spectrum) with a feed-forward network. `python docs/spectra.py RUN...`

For each run, a row for training and one for test examples: the cost of the fingerprint,
-log p(bits|z) in nats, for one z from the posterior of both modalities, of the fingerprint and of
the spectrum, and for the mean of the last; then KL(q(z|both) || q(z|spectrum)), the only term of
eq. (19) through which q(z|spectrum) depends on the fingerprint. A second table has the ranks of the
challenges, by the mean over 20 samples of z, as in eval.py, and with z at the mean of
q(z|spectrum).

--plain: for each of these seeds a feed-forward network of the same layers, spectrum to bits, and
after it an SVAE whose q(z|spectrum) and decoder of bits start from its weights. Both are ranked
after every epoch.
"""

import argparse
import sys
from pathlib import Path

import torch
from torch.distributions import Independent, Normal, kl_divergence

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data  # noqa: E402
import eval as evaluation  # noqa: E402
import nets  # noqa: E402
from benchmarks import spectra, tables  # noqa: E402
from svae import SVAE, normal  # noqa: E402


class Plain(torch.nn.Module):
    """The spectrum's encoder, of which only the mean is trained, and the fingerprint's decoder."""

    def __init__(self, modalities, latent_dim):
        super().__init__()
        self.modalities = modalities
        self.encoder = modalities[0].encoder(latent_dim)
        bits = modalities[1].decoder(latent_dim)
        self.decoders = torch.nn.ModuleList([torch.nn.Identity(), bits])

    def loss(self, spectrum, bits):
        """-log p(bits) in nats, mean over the batch."""
        logits = self.decoders[1](self.encoder(spectrum)[0])
        return -nets.log_prob(self.modalities[1], logits, bits).mean()

    def posterior(self, spectrum, _):
        return normal(*self.encoder(spectrum))


class AtMean:
    """A model for spectra.scores whose posterior is concentrated at the mean of q(z|spectrum)."""

    def __init__(self, model):
        self.model = model
        self.modalities, self.decoders = model.modalities, model.decoders
        self.eval, self.parameters = model.eval, model.parameters

    def posterior(self, spectrum, _):
        mean = self.model.posterior(spectrum, None).mean
        return Independent(Normal(mean, torch.full_like(mean, 1e-6)), 1)


@torch.no_grad()
def cost_of_bits(model, split, n=1000):
    """-log p(bits|z) for z from each posterior, and the KL, means over n examples spread over the
    split. -> {column: nats}"""
    spectrum, bits = split[torch.linspace(0, len(split) - 1, n).long()]
    both, alone = model.posterior(spectrum, bits), model.posterior(spectrum, None)
    samples = {
        "both": both.sample(),
        "fingerprint": model.posterior(None, bits).sample(),
        "spectrum": alone.sample(),
        "its mean": alone.mean,
    }
    cost = {}
    for name, z in samples.items():
        logits = model.decoders[1](z)
        cost[name] = -nets.log_prob(model.modalities[1], logits, bits).mean().item()
    return cost | {"KL": kl_divergence(both, alone).mean().item()}


def train(model, loss, dataset, epochs, seed):
    """Minimise loss(spectrum, bits). Yields the number of each epoch after it."""
    optimizer = torch.optim.Adam(model.parameters(), 1e-3, fused=True)
    for epoch in range(1, epochs + 1):
        model.train()
        torch.manual_seed(1_000_003 * seed + epoch)  # spectra.scores sets one, too
        for index in torch.randperm(len(dataset.train)).split(100):
            xs = dataset.train[index]
            with torch.autocast("cpu", torch.bfloat16):
                value = loss(*xs)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
        yield epoch


def start_from(plain, width):
    """An SVAE whose experts of the spectrum and whose decoder of bits are a plain network's."""
    model = SVAE(nets.modalities("spectra", width=width), latent_dim=300)
    for experts in model.encoders:  # the spectrum's own, and the one that replaces the bits'
        experts[0].load_state_dict(plain.encoder.state_dict())
    model.decoders[1].load_state_dict(plain.decoders[1].state_dict())
    return model


def ranks(model, dataset, challenges, samples):
    """-> {column: number}"""
    scores = spectra.scores(model, dataset, challenges, samples=samples)
    return scores["rank"] | {"nats": scores["bits"]["cross_entropy"]}


def ranks_both_ways(model, dataset, challenges):
    """The ranks by 20 samples of z and with z at the mean. -> {suffix of the row's name: ranks}"""
    return {
        "": ranks(model, dataset, challenges, 20),
        ", z at the mean": ranks(AtMean(model), dataset, challenges, 1),
    }


def show(rows):
    """Print {name of a row: [{column: number}, one per seed]} as a Markdown table."""
    titles = list(next(iter(rows.values()))[0])
    cells = [
        [name, *(tables.number([numbers[title] for numbers in seeds]) for title in titles)]
        for name, seeds in rows.items()
    ]
    print("", tables.markdown(["network", *titles], cells), sep="\n")


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("runs", nargs="*", help="run folders of svae.py, on spectra")
    p.add_argument("--data", default="./data", help="folder of the data sets")
    p.add_argument("--plain", type=int, nargs="*", default=[], help="seeds of plain networks")
    p.add_argument("--epochs", type=int, default=8, help="epochs of each plain network")
    p.add_argument("--then", type=int, default=4, help="epochs of the SVAE that starts from it")
    p.add_argument("--width", type=float, default=0.1, help="factor on the layer sizes")
    args = p.parse_args()
    if not args.runs and not args.plain:
        p.error("name run folders, or seeds after --plain")
    try:
        runs = [evaluation.load_run(folder) for folder in args.runs]
        dataset, challenges = data.load("spectra", args.data), spectra.load_challenges(args.data)
    except (ValueError, OSError) as error:
        p.error(str(error))
    if challenges is None:
        p.error("the prepared spectra have no challenges: see docs/reproduce.md")
    for run in runs:
        if run.args["dataset"] != "spectra":
            p.error(f"{run.folder} must be a run on spectra, not on {run.args['dataset']}")
    costs, ranked = {}, {}  # {name of a row: numbers of each seed}
    for run in runs:
        name = f"{run.args['model']}, {run.args['epochs']} epochs"
        for part, split in (("training", dataset.train), ("test", dataset.test)):
            torch.manual_seed(0)
            costs.setdefault(f"{name}, {part}", []).append(cost_of_bits(run.model, split))
        for suffix, numbers in ranks_both_ways(run.model, dataset, challenges).items():
            ranked.setdefault(name + suffix, []).append(numbers)
    for seed in args.plain:
        torch.manual_seed(seed)
        plain = Plain(nets.modalities("spectra", width=args.width), latent_dim=300)
        for epoch in train(plain, plain.loss, dataset, args.epochs, seed):
            numbers = ranks(AtMean(plain), dataset, challenges, 1)
            ranked.setdefault(f"plain, epoch {epoch}", []).append(numbers)
        model = start_from(plain, args.width)
        for epoch in train(model, lambda *xs: -model.objective(*xs), dataset, args.then, seed):
            for suffix, numbers in ranks_both_ways(model, dataset, challenges).items():
                name = f"SVAE from it, epoch {epoch}{suffix}"
                ranked.setdefault(name, []).append(numbers)
    if costs:
        show(costs)
    show(ranked)


if __name__ == "__main__":
    main()
