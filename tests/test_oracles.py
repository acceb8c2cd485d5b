"""Oracles: the classifiers, their training and cache, the Gaussian process."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import Categorical, MultivariateNormal, kl_divergence

import data
from evaluation import oracles
from loaders.glyphs import glyphs


def test_an_oracle_predicts_by_its_members_mean():
    class Says(nn.Module):
        def __init__(self, p):
            super().__init__()
            self.logits = torch.tensor(p).log()

        def forward(self, x):
            return self.logits

    oracle = oracles.Oracle(1)
    assert len(oracle.members) == 3
    sure, other, weak = [0.79, 0.2, 0.01], [0.02, 0.97, 0.01], [0.55, 0.44, 0.01]
    examples = [  # the probabilities of the three members
        (other, sure, sure),  # mean .53 .46: 0, against the first member and the mean of logs
        (weak, weak, other),  # mean .37 .62: 1, against the first member and the majority
        (sure, sure, sure),
        (other, other, [0.1, 0.1, 0.8]),
    ]
    oracle.members = nn.ModuleList(map(Says, map(list, zip(*examples))))
    digits, disagreement = oracle(None)
    assert digits.tolist() == [0, 1, 0, 1]
    assert disagreement.tolist() == [True, True, False, True]


def test_a_classifier_sees_one_contrast_through_three_convolutions():
    net, x = oracles.Classifier(2).double().eval(), torch.rand(3, 2, 28, 30).double()
    for weight in net.state_dict().values():
        if weight.is_floating_point():
            weight.uniform_(0.1, 1) if weight.ndim < 2 else weight.normal_()
    h = torch.stack([(image - image.mean()) / (image.std() + 0.05) for image in x])
    for convolution, norm, width in zip(net.trunk[0:9:3], net.trunk[1:9:3], (16, 32, 64)):
        assert convolution.weight.shape[0] == width and convolution.bias is None
        h = F.conv2d(h, convolution.weight, stride=2, padding=1)  # 4 x 4 pixels
        assert convolution.weight.shape[2:] == (4, 4)
        mean, var = norm.running_mean[:, None, None], norm.running_var[:, None, None]
        h = (h - mean) / (var + norm.eps).sqrt() * norm.weight[:, None, None]
        h = (h + norm.bias[:, None, None]).relu()
    assert h.shape == (3, 64, 3, 3)  # of 28 x 30 pixels; of more, the largest in each ninth
    dropout, linear = net.head
    assert torch.allclose(net.features(x), h.flatten(1)) and dropout.p == 0.3
    assert torch.allclose(net(x), h.flatten(1) @ linear.weight.T + linear.bias)
    assert net(x).shape == (3, 10)
    large = torch.rand(1, 2, 48, 48).double()
    ninths = net.trunk[:9]((large - large.mean()) / (large.std() + 0.05))[0].unfold(1, 2, 2)
    ninths = ninths.unfold(2, 2, 2).amax((3, 4))
    assert torch.allclose(net.features(large)[0], ninths.flatten())


@pytest.mark.parametrize("seed", range(8))  # of various shifts
def test_corrupt_images_are_blurred_faded_noisy_and_shifted(seed):
    x = torch.rand(4, 3, 9, 7)
    torch.manual_seed(seed)
    found = oracles.corrupt(x)
    torch.manual_seed(seed)  # the same draws, used image by image
    order, keep, sigma = torch.randperm(3), torch.rand(4), 0.1 + 2.3 * torch.rand(4)
    fade, loud, noise = 0.2 + 0.8 * torch.rand(4), 0.1 * torch.rand(4), torch.randn(4, 3, 9, 7)
    top, left = torch.randint(5, (2,)) - 2
    for k, y in enumerate(x[:, order]):
        y = y.mean(0) + keep[k] * (y - y.mean(0))
        for axis in (1, 2):  # a mean of all places, weighted by exp(-distance²/2σ²)
            at = torch.arange(y.shape[axis])
            weights = torch.exp(-((at[:, None] - at) ** 2) / (2 * sigma[k] ** 2))
            weights = weights / weights.sum(1, keepdim=True)
            y = torch.tensordot(weights, y, ([1], [axis])).movedim(0, axis)
        y = y.mean() + fade[k] * (y - y.mean()) + loud[k] * noise[k]
        rows, columns = (torch.arange(9) + top).clamp(0, 8), (torch.arange(7) + left).clamp(0, 6)
        assert torch.allclose(found[k], y[:, rows][:, :, columns], atol=1e-5)


def test_each_member_is_trained_on_its_own_corrupt_images(monkeypatch):
    class Tiny(nn.Module):
        def __init__(self, channels):
            super().__init__()
            self.gain = nn.Parameter(torch.rand(channels))
            self.head = nn.Sequential(nn.Dropout(0.5), nn.Linear(channels, 10))

        def features(self, x):
            return self.gain * x.mean((2, 3))

        def forward(self, x):
            return self.head(self.features(x))

    labels, fits = torch.randint(10, (10_050,)), []
    digits = (25 * labels).byte()[:, None, None, None]
    split = data.Split([digits, digits.expand(-1, 3, 2, 2)], labels=labels)
    monkeypatch.setattr(oracles, "Classifier", Tiny)
    monkeypatch.setattr(oracles, "corrupt", lambda x: x + torch.rand(len(x), 3, 1, 1))
    monkeypatch.setattr(oracles.GaussianProcess, "fit", lambda self, *xs, **_: fits.append(xs))
    torch.manual_seed(1)
    shares = []
    found = oracles.train_oracle(split, (1,), steps=9, report=shares.append)
    assert shares == pytest.approx([k / 36 for k in range(1, 28)])  # and 9 of the process, below
    torch.manual_seed(0)
    replayed = oracles.Oracle(3)
    for member in replayed.members:
        optimizer = torch.optim.AdamW(member.parameters())
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.01, total_steps=9)
        for _ in range(9):
            index = torch.randint(10_050, (128,))
            optimizer.zero_grad()
            logits = member(split.take(1, index) + torch.rand(128, 3, 1, 1))
            F.cross_entropy(logits, split.labels[index]).backward()
            optimizer.step()
            schedule.step()
    for key, value in replayed.state_dict().items():
        assert torch.allclose(found.state_dict()[key], value, atol=1e-6)
    assert not found.training
    ((h, y, steps),) = fits  # the process on the first's features of 10,000 images, not corrupt
    assert steps == 9 and len(h) == len(y) == 10_000 and y.bincount().min() > 800
    assert torch.allclose(h, found.members[0].gain * (y[:, None] * 25 / 255), atol=1e-4)


# ------------------------------------------------------------------------------------- the cache


def halves(n=40):
    """Two bands of random digits; the test split has other images and other frequencies."""
    generator, splits = torch.Generator().manual_seed(0), []
    for size, digits in ((n, 10), (n // 2, 4)):
        bands = [
            torch.randint(256, (size, 1, 14, 28), generator=generator, dtype=torch.uint8)
            for _ in range(2)
        ]
        labels = torch.randint(digits, (size,), generator=generator)
        splits.append(data.Split(bands, labels=labels))
    return data.Dataset(
        "mnist-split", *splits, spec={}, names=("top", "bottom"), views={"image": (0, 1)}
    )


def load(dataset, root, **options):
    return oracles.load_oracle(dataset, "image", root, **{"steps": 2} | options)


def test_an_oracle_is_trained_on_training_images_and_tested_on_the_others(tmp_path, monkeypatch):
    dataset, used = halves(), []

    class Always(nn.Module):
        def forward(self, x):
            return torch.full((len(x),), 3), torch.zeros(len(x))

    def train_oracle(split, *settings, report):
        used.append((split, *settings))
        return Always()

    monkeypatch.setattr(oracles, "train_oracle", train_oracle)
    _, accuracy = load(dataset, tmp_path, seed=5)
    ((split, *settings),) = used
    assert split is dataset.train and settings == [dataset.views["image"], 2, 5]
    shares = [(each.labels == 3).double().mean() for each in (dataset.test, dataset.train)]
    assert accuracy == shares[0] != shares[1]


def test_a_cached_oracle_is_the_trained_one(tmp_path, monkeypatch):
    dataset, x = halves(), torch.rand(5, 1, 28, 28)
    trained, accuracy = load(dataset, tmp_path)
    monkeypatch.setattr(oracles, "train_oracle", None)
    again, same = load(dataset, tmp_path)
    assert same == accuracy and not again.training
    for member, other in zip(trained.members, again.members, strict=True):
        assert torch.equal(member(x), other(x))
    assert torch.equal(trained.process.inducing, again.process.inducing)
    assert [path.name for path in tmp_path.rglob("*.*")] == ["mnist-split-image.pt"]


def test_the_accuracy_is_that_of_the_test_images(tmp_path):
    dataset = halves()
    oracle, accuracy = load(dataset, tmp_path)
    with torch.no_grad():
        stacked = torch.cat(dataset.test[torch.arange(20)], 2)  # the top above the bottom
        p = torch.stack([member(stacked).softmax(1) for member in oracle.members]).mean(0)
    right = (p.argmax(1) == dataset.test.labels).sum().item()
    assert accuracy == pytest.approx(right / 20)


def change_image(dataset, split):
    getattr(dataset, split).bases[1][7, 0, 3, 3] += 1


def change_label(dataset, split):
    getattr(dataset, split).labels[7] += 1


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("change", [change_image, change_label])
def test_other_images_or_labels_need_another_oracle(change, split, tmp_path, monkeypatch):
    dataset = halves()
    load(dataset, tmp_path)
    change(dataset, split)
    calls = []
    train = oracles.train_oracle
    monkeypatch.setattr(oracles, "train_oracle", lambda *xs, **_: calls.append(xs) or train(*xs))
    load(dataset, tmp_path)
    assert len(calls) == 1


@pytest.mark.parametrize("options", [dict(steps=3), dict(seed=1)])
def test_other_settings_need_another_oracle(options, tmp_path):
    dataset = halves()
    first, second = (load(dataset, tmp_path, **chosen)[0] for chosen in ({}, options))
    weights = (oracle.members[0].head[-1].weight for oracle in (first, second))
    assert not torch.equal(*weights)


def test_images_are_hashed_once_for_all_views(tmp_path, monkeypatch):
    dataset = halves()
    images = oracles.image_digest(dataset)
    load(dataset, tmp_path)
    monkeypatch.setattr(oracles, "train_oracle", None)
    monkeypatch.setattr(oracles, "image_digest", None)
    load(dataset, tmp_path, images=images)  # the cached one


def test_a_damaged_cache_is_named(tmp_path):
    dataset, path = halves(), tmp_path / "oracles" / "mnist-split-image.pt"
    load(dataset, tmp_path)
    for content in (path.read_bytes()[:1000], b"", b"no zip"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="mnist-split-image.pt is damaged: delete it"):
            load(dataset, tmp_path)


def test_an_oracle_that_cannot_be_cached_is_returned(tmp_path, capsys):
    (tmp_path / "oracles").write_text("no folder")
    oracle, _ = load(halves(), tmp_path)
    assert isinstance(oracle, oracles.Oracle)
    assert "oracles/mnist-split-image.pt cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name, n, steps, off, times",
    [
        ("grey", 600, 25, 0.03, 2),
        pytest.param("grey", 10_000, None, 0.01, 4, marks=pytest.mark.slow),
        pytest.param("colour", 10_000, None, 0.01, 4, marks=pytest.mark.slow),
    ],
)
def test_the_process_predicts_as_its_oracle_and_doubts_noise(name, n, steps, off, times, tmp_path):
    train, test = glyphs(n, seed=0), glyphs(max(300, n // 10), seed=1)
    views = {"grey": (0,), "colour": (1,)}
    dataset = data.Dataset("glyphs", train, test, {}, ("grey", "colour"), views=views)
    oracle, accuracy = oracles.load_oracle(dataset, name, tmp_path, steps=steps)
    x, test_x = (s[torch.arange(len(s))][dataset.names.index(name)] for s in (train, test))
    if steps == 25:  # too few for the process
        oracle.process.fit(oracle.members[0].features(x).detach(), train.labels, steps=40)
    with torch.no_grad():
        guess = oracle.process(oracle.members[0].features(test_x))[0].argmax(-1)
        seen, noise = oracle.information(test_x), oracle.information(torch.rand_like(test_x))
    assert accuracy > 0.9 and abs((guess == test.labels).double().mean() - accuracy) < off
    assert seen.min() > -1e-6 and noise.max() < math.log(10)
    assert noise.mean() > times * seen.mean() and noise.min() > seen.median()


def process(points):
    """A Gaussian process of two classes, all of its parameters random, in float64."""
    found = oracles.GaussianProcess(3, classes=2, points=points).double()
    for parameter in found.parameters():
        parameter.data.normal_()
    return found


def kl_to_the_prior(some):
    """Σ_c KL( N(m_c, S_c S_c') || N(0, I) )"""
    root, points = some.root.tril(), len(some.inducing)
    q = MultivariateNormal(some.mean, scale_tril=root * root.diagonal(0, 1, 2).sign()[:, None])
    p = MultivariateNormal(torch.zeros(points).double(), torch.eye(points).double())
    return kl_divergence(q, p).sum()


@torch.no_grad()
def test_the_gaussian_process_predicts_by_its_formula():
    """N(k_hZ K⁻¹ L m,  k_hh - k_hZ K⁻¹ k_Zh + k_hZ K⁻¹ L S S' L' K⁻¹ k_Zh),  K = k_ZZ = L L'"""
    some, h = process(4), torch.randn(7, 3).double()
    z, s2, l2 = some.inducing, some.log_scale.exp() ** 2, some.log_length.exp() ** 2

    def k(a, b):  # s² exp(-|a - b|² / 2l²)
        return s2 * torch.exp(-((a[:, None] - b) ** 2).sum(-1) / (2 * l2))

    assert torch.allclose(some.kernel(h, z), k(h, z))
    mean, std = some(h)
    kzz = k(z, z) + 1e-4 * s2 * torch.eye(4).double()  # the jitter
    factor = torch.linalg.cholesky(kzz)  # L
    gain = k(h, z) @ torch.linalg.inv(kzz)  # k_hZ K⁻¹
    for c in range(2):
        root = factor @ some.root[c].tril()  # L S
        cov = k(h, h) - gain @ k(z, h) + gain @ root @ root.T @ gain.T
        assert torch.allclose(mean[:, c], gain @ factor @ some.mean[c])
        assert torch.allclose(std[:, c], cov.diagonal().sqrt(), rtol=1e-4)
    some.log_scale.fill_(-9), some.root.zero_()
    assert some(z)[1].eq(1e-3).all()  # rounding must not leave a negative variance
    new = oracles.GaussianProcess(3)
    mean, std = new(h.float())
    assert new.mean.shape == (10, 100) and not mean.any()  # q is the prior
    assert torch.allclose(std, torch.full((7, 10), 3.0), atol=1e-3)


def test_the_elbo_of_the_process_is_its_formula():
    """N E_q(f)[ log softmax(f)_y ] - Σ_c KL( N(m_c, S_c S_c') || N(0, I) )"""
    some, h, y = process(4), torch.randn(7, 3).double(), torch.arange(7) % 2
    torch.manual_seed(3)
    found = some.elbo(h, y, 50)
    torch.manual_seed(3)
    mean, std = some(h)
    f = mean + std * torch.randn(5, 7, 2)  # five samples
    log_p = sum(f[k, b].softmax(0)[y[b]].log() for k in range(5) for b in range(7)) / (5 * 7)
    assert torch.isclose(found, 50 * log_p - kl_to_the_prior(some))
    assert torch.isclose(some.elbo(h, y, n=0), -kl_to_the_prior(some))


@torch.no_grad()
def test_information_is_entropy_of_the_mean_less_mean_entropy():
    """H[ E p(y|f) ] - E H[ p(y|f) ], over 100 samples of f"""
    oracle, x = oracles.Oracle(1).eval(), torch.rand(5, 1, 28, 28)
    oracle.process.mean.normal_()
    h = oracle.members[0].features(x)
    oracle.process.inducing.copy_(h[torch.arange(100) % 4] + torch.randn(100, 576))
    oracle.process.log_length.fill_(3)
    torch.manual_seed(1)
    found = oracle.information(x)
    torch.manual_seed(1)
    mean, std = oracle.process(h)
    p = (mean + std * torch.randn(100, 5, 10)).softmax(-1)
    expected = Categorical(p.mean(0)).entropy() - Categorical(p).entropy().mean(0)
    assert torch.allclose(found, expected, atol=1e-5) and found.max() > found.min() + 0.1


def test_the_process_is_fit_by_adam_on_its_elbo():
    h, y = torch.randn(40, 3).double(), torch.arange(40) % 2
    for points in (50, 20):
        some, replayed = process(points), process(points)
        replayed.load_state_dict(some.state_dict())
        torch.manual_seed(2)
        calls = []
        some.fit(h, y, steps=3, step_done=lambda: calls.append(1))
        assert len(calls) == 3
        torch.manual_seed(2)
        chosen = h[torch.randperm(40)[:points]]
        replayed.inducing.data[:40] = chosen  # the rest stay
        distances = [(a - b).norm() for a, b in itertools.combinations(chosen, 2)]
        replayed.log_length.data = torch.stack(distances).median().log()
        optimizer = torch.optim.Adam(replayed.parameters(), lr=0.01)
        for _ in range(3):
            index = torch.randint(40, (500,))
            optimizer.zero_grad()
            (-replayed.elbo(h[index], y[index], n=40) / 40).backward()
            optimizer.step()
        for key, value in replayed.state_dict().items():
            assert torch.allclose(some.state_dict()[key], value)
    some.fit(h / 1000, y, steps=0)
    assert some.log_length == 0  # at least 1
