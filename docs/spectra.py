"""What q(z|spectrum) knows of the molecule, beside a plain network. `python docs/spectra.py RUN...`

For each run, a row for training and one for test examples: what the fingerprint costs,
-log p(bits|z) in nats, for one z from the posterior of both, of the fingerprint and of the
spectrum, and for the latter's mean; then KL(q(z|both) || q(z|spectrum)), the only term of eq. (19)
by which q(z|spectrum) hears of the fingerprint. A second table has the ranks of the challenges, by
the mean over 20 z, as eval.py has them, and by z at the mean of q(z|spectrum).

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
    """The spectrum's encoder, of which the mean alone is trained, and the fingerprint's decoder."""

    def __init__(self, modalities, latent_dim):
        super().__init__()
        self.modalities = modalities
        self.encoder = modalities[0].encoder(latent_dim)
        bits = modalities[1].decoder(latent_dim)
        self.decoders = torch.nn.ModuleList([torch.nn.Identity(), bits])

    def loss(self, spectrum, bits):
        """Nats of the bits, the mean over the batch."""
        logits = self.decoders[1](self.encoder(spectrum)[0])
        return -nets.log_prob(self.modalities[1], logits, bits).mean()

    def posterior(self, spectrum, _):
        return normal(*self.encoder(spectrum))


class AtMean:
    """What spectra.scores asks of a model, with the mean of q(z|spectrum) in its place."""

    def __init__(self, model):
        self.model = model
        self.modalities, self.decoders = model.modalities, model.decoders
        self.eval, self.parameters = model.eval, model.parameters

    def posterior(self, spectrum, _):
        mean = self.model.posterior(spectrum, None).mean
        return Independent(Normal(mean, torch.full_like(mean, 1e-6)), 1)


@torch.no_grad()
def nats(model, split, n=1000):
    """-> what the bits cost, for z from each of four, and the KL: means over n examples"""
    spectrum, bits = split[torch.linspace(0, len(split) - 1, n).long()]
    both, alone = model.posterior(spectrum, bits), model.posterior(spectrum, None)
    draws = {
        "both": both.sample(),
        "fingerprint": model.posterior(None, bits).sample(),
        "spectrum": alone.sample(),
        "its mean": alone.mean,
    }
    found = {
        name: -nets.log_prob(model.modalities[1], model.decoders[1](z), bits).mean().item()
        for name, z in draws.items()
    }
    return found | {"KL": kl_divergence(both, alone).mean().item()}


def train(model, loss, dataset, epochs, seed):
    """Steps down loss(spectra, bits), nats. Yields the number of each epoch after it."""
    optimizer = torch.optim.Adam(model.parameters(), 1e-3, fused=True)
    for epoch in range(1, epochs + 1):
        model.train()
        torch.manual_seed(1_000_003 * seed + epoch)  # spectra.scores sets one, too
        for index in torch.randperm(len(dataset.train)).split(100):
            xs = dataset.train[index]
            with torch.autocast("cpu", torch.bfloat16):
                cost = loss(*xs)
            optimizer.zero_grad()
            cost.backward()
            optimizer.step()
        yield epoch


def started(plain, width):
    """SVAE whose experts of the spectrum and whose decoder of bits are those of a plain network."""
    model = SVAE(nets.modalities("spectra", width=width), latent_dim=300)
    for experts in model.encoders:  # the spectrum's own, and the one that stands in for the bits
        experts[0].load_state_dict(plain.encoder.state_dict())
    model.decoders[1].load_state_dict(plain.decoders[1].state_dict())
    return model


def ranks(model, dataset, challenges, samples):
    found = spectra.scores(model, dataset, challenges, samples=samples)
    return found["rank"] | {"nats": found["bits"]["cross_entropy"]}


def show(rows):
    """A Markdown table of {title: [{column: number}, ...]}, mean ± deviation over each list."""
    titles = list(next(iter(rows.values()))[0])
    cells = [
        [name, *(tables.number([numbers[title] for numbers in found]) for title in titles)]
        for name, found in rows.items()
    ]
    print("", tables.markdown(["network", *titles], cells), sep="\n")


def both_ways(model, dataset, challenges):
    """-> {how z is taken from q(z|spectrum): the ranks}"""
    return {
        "": ranks(model, dataset, challenges, 20),
        ", z at the mean": ranks(AtMean(model), dataset, challenges, 1),
    }


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("runs", nargs="*", help="run folders of svae.py, vaevae.py or mvae.py")
    p.add_argument("--data", default="./data", help="folder of the data sets")
    p.add_argument("--plain", type=int, nargs="*", default=[], help="seeds of plain networks")
    p.add_argument("--epochs", type=int, default=8, help="of each")
    p.add_argument("--then", type=int, default=4, help="epochs of the SVAE that starts from it")
    p.add_argument("--width", type=float, default=0.1, help="of their layers")
    args = p.parse_args()
    if not args.runs and not args.plain:
        p.error("there is nothing to do: name runs, or seeds after --plain")
    dataset, challenges = data.load("spectra", args.data), spectra.load_challenges(args.data)
    costs, ranked = {}, {}  # {row: numbers of each seed}
    for folder in args.runs:
        run = evaluation.load_run(folder)
        name = f"{run.args['model']}, {run.args['epochs']} epochs"
        for part, split in (("training", dataset.train), ("test", dataset.test)):
            torch.manual_seed(0)
            costs.setdefault(f"{name}, {part}", []).append(nats(run.model, split))
        for how, found in both_ways(run.model, dataset, challenges).items():
            ranked.setdefault(name + how, []).append(found)
    for seed in args.plain:
        torch.manual_seed(seed)
        plain = Plain(nets.modalities("spectra", width=args.width), latent_dim=300)
        for epoch in train(plain, plain.loss, dataset, args.epochs, seed):
            found = ranks(AtMean(plain), dataset, challenges, 1)
            ranked.setdefault(f"plain, epoch {epoch}", []).append(found)
        model = started(plain, args.width)
        for epoch in train(model, lambda *xs: -model.objective(*xs), dataset, args.then, seed):
            for how, found in both_ways(model, dataset, challenges).items():
                ranked.setdefault(f"SVAE from it, epoch {epoch}{how}", []).append(found)
    for rows in filter(None, (costs, ranked)):
        show(rows)


if __name__ == "__main__":
    main()
