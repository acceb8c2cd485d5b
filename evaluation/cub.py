"""cub: correlations of generated photos and captions, [meme] App. G, and a sheet of examples.

Pairs are compared by a canonical correlation analysis of photo features and sentence vectors, the
means of word vectors that FastText's objective fits to the training captions.

Shapes: N captions, V words, D dimensions of a word vector, G subword units, P photos.
"""

import hashlib
import math
import sys
import textwrap
import warnings
from pathlib import Path

import numpy as np
import torch

import data
from eval import aggregate_samples, correlations
from evaluation import figures
from loaders.cub import EOS, SPECIALS, cub_photos

# ------------------------------------------------------------------------------------ word vectors


def caption_text(tokens, words):
    """Word indices (32,) -> the words up to <eos>, joined by spaces."""
    tokens = np.asarray(tokens).tolist()
    end = tokens.index(EOS) if EOS in tokens else len(tokens)
    return " ".join(words[t] for t in tokens[:end])


def character_ngrams(words, shortest=3, longest=6):
    """FastText's subword units: each <word> and its character n-grams, numbered in order of first
    appearance; special tokens have none. -> 0/1 matrix (V, G), sparse CSR, and its transpose"""
    index, rows, columns = {}, [], []
    for row, word in enumerate(words):
        if word in SPECIALS:
            continue
        text = f"<{word}>"
        spans = ((n, a) for n in range(shortest, longest + 1) for a in range(len(text) - n + 1))
        for gram in (text, *sorted({text[a : a + n] for n, a in spans} - {text})):
            rows.append(row)
            columns.append(index.setdefault(gram, len(index)))
    entries = torch.tensor([rows, columns])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # "sparse CSR is in beta"
        units = torch.sparse_coo_tensor(entries, torch.ones(len(rows)), (len(words), len(index)))
        return units.coalesce().to_sparse_csr(), units.t().coalesce().to_sparse_csr()


def skipgram_counts(captions, n_words, window=3, sample=1e-3, draws=10, seed=0):
    """Expected number of times per epoch that word j is in the window of word i, as in word2vec:
    frequent words are dropped at random first, and a neighbour at distance d is in the window,
    whose size is random, with probability 1 - (d - 1) / window. Special tokens do not count.

    captions: int64 (N, 32) -> pairs (V, V), word frequencies (V,), both float64
    """
    generator = torch.Generator().manual_seed(seed)
    captions = torch.as_tensor(captions).cpu()
    sentence, position = (captions >= len(SPECIALS)).nonzero(as_tuple=True)
    word = captions[sentence, position]
    frequency = torch.bincount(word, minlength=n_words).double()
    threshold = sample * len(word) / frequency
    keep = (threshold.sqrt() + threshold).clamp(max=1)
    pairs = torch.zeros(n_words * n_words, dtype=torch.float64)
    for _ in range(draws):
        rest = torch.rand(len(word), generator=generator) < keep[word]
        w, s = word[rest], sentence[rest]
        for d in range(1, window + 1):
            same = s[d:] == s[:-d]
            pair = w[d:][same] * n_words + w[:-d][same]
            weight = 1 - (d - 1) / window
            pairs += weight * torch.bincount(pair, minlength=n_words * n_words)
    pairs = pairs.view(n_words, n_words) / draws
    return pairs + pairs.t(), frequency


def word_vectors(
    captions, words, dim=300, window=3, negative=5, epochs=10, lr=0.025, seed=0, device="cpu"
):
    """FastText [Bojanowski et al. 2017]: a word's vector is the mean over its subword units'.

    Skip-gram with negative sampling. The vocabulary is small, so that each gradient step uses the
    expectation over pairs and negatives instead of a sample. It maximises

        Σ_ij n_ij log σ(h_i·o_j) + m_ij log σ(-h_i·o_j),    m_ij = negative (Σ_k n_ik) p_j

    n_ij: expected number of pairs; p_j ∝ frequency^.75; h_i: word vectors; o_j: context vectors.
    captions (N, 32) -> float32 (V, dim), zeros for special tokens
    """
    units, transposed = (m.to(device) for m in character_ngrams(words))
    share = 1 / units.sum(1, keepdim=True).to_dense().clamp(min=1)  # (V, 1)
    pairs, frequency = skipgram_counts(captions, len(words), window, draws=epochs, seed=seed)
    noise = frequency**0.75 / (frequency**0.75).sum()
    n = pairs.float().to(device)  # (V, V)
    m = (negative * pairs.sum(1, keepdim=True) * noise).float().to(device)
    steps = max(1, math.ceil(float(pairs.sum()) / 4000))  # per epoch: 4,000 pairs each
    # The summed gradient of a very frequent word overshoots: its step is limited to that of 4 / lr
    # pairs.
    most_h = 4 / (n + m).sum(1, keepdim=True).clamp(min=1e-9)
    most_o = 4 / (n + m).sum(0).unsqueeze(1).clamp(min=1e-9)
    generator = torch.Generator().manual_seed(seed)
    start = torch.rand(units.shape[1], dim, generator=generator)
    e = ((2 * start - 1) / dim).to(device)  # (G, D) vectors of the units
    o = torch.zeros(len(words), dim, device=device)  # (V, D) context vectors
    for step in range(epochs * steps):
        rate = lr * (1 - step / (epochs * steps)) / steps
        h = share * (units @ e)  # (V, D)
        p = torch.sigmoid(h @ o.t())
        residual = n * (1 - p) - m * p  # (V, V)
        grad_h, grad_o = residual @ o, residual.t() @ h
        # as in FastText, each unit takes the whole step of its word
        e += transposed @ (grad_h * most_h.clamp(max=rate))
        o += grad_o * most_o.clamp(max=rate)
    return (share * (units @ e)).cpu().numpy()


def cached_word_vectors(root, captions, words, device="cpu"):
    """word_vectors of the training captions, cached in root/cub/words.npz with a digest of them."""
    captions = captions.cpu().numpy()
    digest = hashlib.sha256(captions.tobytes() + "\n".join(words).encode()).hexdigest()
    path = Path(root, "cub", "words.npz")
    try:
        cache = data.read_npz(path, ("digest", "vectors"))
        if str(cache["digest"]) == digest:
            return cache["vectors"]
    except ValueError:  # it does not exist yet, or is damaged
        pass
    print("training word vectors ...", file=sys.stderr)
    vectors = word_vectors(captions, words, device=device)
    data.save_npz(path, {"vectors": vectors, "digest": digest})
    return vectors


def sentence_vectors(tokens, words, vectors):
    """The mean of the vectors of a caption's words up to <eos>, without special tokens; 0 if there
    is no word. tokens (N, 32), vectors (V, D) -> float32 (N, D)"""
    tokens = np.asarray(tokens)
    special = np.array([word in SPECIALS for word in words])
    counted = ~special[tokens] & ((tokens == EOS).cumsum(1) == 0)
    total = np.zeros((len(tokens), vectors.shape[1]), np.float32)  # (N, D)
    for column, use in zip(tokens.T, counted.T):
        total += vectors[column] * use[:, None]
    return total / np.maximum(counted.sum(1, keepdims=True), 1)


# ------------------------------------------------------------------------------------ correlations


@torch.no_grad()
def cross_generate(model, split, batch_size=256):
    """Each modality of the test pairs generated from the other: one posterior sample z per input,
    the decoded mean of features, the most likely word at each position of captions.

    -> features from captions (N, 2048), captions from images int64 (N, 32)
    """
    device = next(model.parameters()).device
    split, features, captions = split.to(device), [], []
    for index in torch.arange(len(split), device=device).split(batch_size):
        image, caption = split[index]
        captions.append(model.decode(model.posterior(image, None).sample())[1].argmax(-1).cpu())
        features.append(model.decode(model.posterior(None, caption).sample())[0].cpu())
    return torch.cat(features).numpy(), torch.cat(captions).numpy()


@torch.no_grad()
def joint_generate(model, z, batch_size=250):
    """Pairs generated from z (n, L). -> features (n, 2048), captions int64 (n, 32)"""
    features, captions = [], []
    for part in z.split(batch_size):
        image, caption = model.decode(part)
        features.append(image.cpu())
        captions.append(caption.argmax(-1).cpu())
    return torch.cat(features).numpy(), torch.cat(captions).numpy()


def compared_pairs(model, dataset, root, samples=1000):
    """[meme] Table 5: pairs of photo features x (n, 2048) and sentence vectors y (n, D).

    -> (x, y) of the training pairs, for the fit of the CCA, and {name: (x, y)}, whose correlations
    are measured: "image->caption" and "caption->image", where one is generated from the other;
    "joint" and "aggregate", both generated from the prior or the aggregate posterior; "truth", the
    test pairs.
    """
    device = next(model.parameters()).device
    vectors = cached_word_vectors(root, dataset.train.bases[1], dataset.words, device)

    def embed(tokens):
        return sentence_vectors(tokens, dataset.words, vectors)

    def real(split):
        return [base[rows].cpu().numpy() for base, rows in zip(split.bases, split.rows)]

    train_image, train_caption = real(dataset.train)
    image, caption = real(dataset.test)
    features, captions = cross_generate(model, dataset.test)
    pairs = {
        "image->caption": (image, captions),
        "caption->image": (features, caption),
        "joint": joint_generate(model, model.prior().sample((samples,))),
        "aggregate": joint_generate(model, aggregate_samples(model, dataset.train, samples)),
        "truth": (image, caption),
    }
    fit = train_image, embed(train_caption)
    return fit, {name: (x, embed(tokens)) for name, (x, tokens) in pairs.items()}


def evaluate(model, dataset, root="./data", seed=0):
    """The correlations of `compared_pairs`, and those by chance. -> metrics of eval.correlations"""
    torch.manual_seed(seed)
    model.eval()
    return correlations(*compared_pairs(model, dataset, root))


# ------------------------------------------------------------------------------------------ figure


def nearest_photos(features, photos):
    """The row of `photos` (P, 2048) with the smallest Euclidean distance to each of `features`
    (N, 2048). -> int64 (N,)"""
    features, photos = torch.as_tensor(features), torch.as_tensor(photos)
    rows = [torch.cdist(x, photos.to(x.device)).argmin(1) for x in features.split(1000)]
    return torch.cat(rows).cpu().numpy()


@torch.no_grad()
def draw(run, dataset, root, path, n=6):
    """[meme] Fig. 4, [poe] Fig. 10: n test pairs with what is generated from their photos and from
    their captions. Of generated features the training photo with the nearest features is shown."""
    device = next(run.model.parameters()).device
    files, test, words = cub_photos(root), dataset.test, dataset.words
    photos = torch.linspace(0, len(test.bases[0]) - 1, n).long()  # spread over the classes
    index = torch.tensor([int((test.rows[0].cpu() == row).nonzero()[0, 0]) for row in photos])
    image, caption = test.to(device)[index.to(device)]
    inputs = {
        "image": ((image, None), [files["test"][row] for row in photos]),
        "caption": ((None, caption), [caption_text(t.cpu(), words) for t in caption]),
    }
    columns = []
    for name, (xs, contents) in inputs.items():
        features, tokens = run.model.decode(run.model.posterior(*xs).sample())
        nearest = nearest_photos(features, dataset.train.bases[0])
        generated = [caption_text(t, words) for t in tokens.argmax(-1).cpu()]
        columns += [
            (f"test {name}", contents),
            (f"{name} → image:\nnearest training photo", [files["train"][row] for row in nearest]),
            (f"{name} → caption", generated),
        ]
    sheet(columns, figures.title(run), path)


def sheet(columns, heading, path):
    """Columns of photos and texts. columns: list of (title, contents), contents of equal length: a
    Path is drawn as a photo, a string as text."""
    from PIL import Image

    figure, axes = figures.panels(len(columns[0][1]), len(columns), width=2.2, height=2.2)
    for column, (head, contents) in zip(axes.T, columns):
        column[0].set_title(head, size=10)
        for ax, content in zip(column, contents):
            ax.axis("off")
            if not isinstance(content, Path):
                text = textwrap.fill(content, 24, max_lines=9, placeholder=" …")
                ax.text(0.5, 0.5, text, ha="center", va="center", size=9)
                continue
            try:
                with Image.open(content) as photo:
                    ax.imshow(photo.convert("RGB")).axes.set_adjustable("datalim")
            except OSError:  # features.npz can be used without the photos
                ax.text(0.5, 0.5, f"{content.name}\nnot found", ha="center", size=7)
    figures.finish(figure, path, heading, dpi=120, bbox_inches="tight")
