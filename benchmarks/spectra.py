"""spectra: tandem mass spectra and the fingerprints of their molecules.

`python data.py spectra` reads them from MassBank's release, or from any file in its format, and
writes spectra/spectra.npz. The bits are rdkit's.
"""

import csv
import gzip
import re
import sys
import zlib
from collections import Counter, defaultdict
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import data
import nets
from benchmarks import drawing

MASSBANK = "https://github.com/MassBank/MassBank-data/releases/latest/download/MassBank_NIST.msp"
MAX_MZ, BINS_PER_MZ = 1100, 10
BINS = MAX_MZ * BINS_PER_MZ
MACCS, MORGAN = 167, 1982  # [poe] only says that there are 2,149 bits
BITS = MACCS + MORGAN
SPECTRA_VERSION = 1
CSR = "offsets", "columns", "values"  # a Sparse in the .npz


class Sparse:
    """A sparse matrix (N, D), row by row (CSR). sparse[rows] is dense, float32, on the matrix's
    device.

    offsets (N + 1,): row n holds columns[offsets[n] : offsets[n + 1]], each column once; values:
    float32, as columns. `rows` may be all that indexes a tensor: a LongTensor, a slice, a mask, one
    integer.
    """

    dtype = torch.float32

    def __init__(self, offsets, columns, values, width):
        self.offsets, self.columns, self.values = offsets, columns, values
        self.shape = (len(offsets) - 1, width)
        self.longest = int(offsets.diff().max()) if len(self) else 0

    def __len__(self):
        return self.shape[0]

    @property
    def device(self):
        return self.values.device

    def to(self, device):
        tensors = (t.to(device) for t in (self.offsets, self.columns, self.values))
        return Sparse(*tensors, self.shape[1])

    def __getitem__(self, rows):
        start, end = self.offsets[:-1][rows], self.offsets[1:][rows]  # (B,)
        # Every row is read to the longest one's length: no size depends on the data, so a GPU is
        # never waited for.
        at = start[..., None] + torch.arange(self.longest, device=self.device)  # (B, longest)
        inside = at < end[..., None]
        at = at.clamp(max=len(self.values) - 1)
        dense = torch.zeros(*start.shape, self.shape[1], device=self.device)  # (B, D)
        return dense.scatter_add_(-1, self.columns[at].long(), self.values[at] * inside)


def text(path):
    """The lines of a text file, packed (.gz) or not."""
    try:
        with open(path, "rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
        with (gzip.open if packed else open)(
            path, "rt", encoding="utf-8-sig", errors="replace"
        ) as file:
            yield from file
    except (EOFError, zlib.error, gzip.BadGzipFile):
        raise ValueError(f"{path} is a truncated or damaged .gz file: get it again") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None


def peak_list(lines):
    """'m/z intensity' per line, also several in a line divided by ';' and followed by a "note". ->
    (n, 2), or None"""
    joined = " ".join(lines)
    words = joined.split()
    if len(words) != 2 * len(lines) or ";" in joined:
        bare = (re.sub('"[^"]*"', "", line) for line in lines)
        words = [w for line in bare for peak in line.split(";") for w in peak.split()[:2]]
    try:
        return np.array(words, np.float64).reshape(-1, 2)
    except ValueError:
        return None


def read_msp(path):
    """The records of an MSP file (NIST's format, as MassBank and MoNA export it), one after the
    other; .gz too.

    -> (fields, peaks) each: fields {key in lower case: value}, the first one where a key is
    repeated; peaks (n, 2), m/z and intensity, or None where they cannot be read. ValueError for a
    file that cannot be read.
    """
    fields, peaks, in_peaks = {}, [], False
    for line in text(path):
        line = line.strip()
        header = line[:1].isalpha() and ":" in line
        if fields and (not line or (in_peaks and header)):
            yield fields, peak_list(peaks)
            fields, peaks, in_peaks = {}, [], False
        if header:
            key, _, value = line.partition(":")
            fields.setdefault(key.strip().lower(), value.strip())
            in_peaks = key.strip().lower() == "num peaks"
        elif line and in_peaks:
            peaks.append(line)
    if fields:
        yield fields, peak_list(peaks)


def read_mgf(path):
    """The records of a Mascot generic file, one after the other; .gz too. -> (fields, peaks) as
    read_msp's."""
    fields, peaks = None, []
    for line in text(path):
        line = line.strip()
        if line.upper() == "BEGIN IONS":
            fields, peaks = {}, []
        elif line.upper() == "END IONS" and fields is not None:
            yield fields, peak_list(peaks)
            fields = None
        elif fields is not None and line[:1].isalpha() and "=" in line:
            key, _, value = line.partition("=")
            fields.setdefault(key.strip().lower(), value.strip())
        elif fields is not None and line and line[0] not in "#;!/":
            peaks.append(line)


def read_table(path, columns):
    """The rows of a CSV file (.gz too), as dictionaries."""
    try:
        reader = csv.DictReader(text(path), restval="")
        missing = [column for column in columns if column not in (reader.fieldnames or [])]
        if missing:
            raise ValueError(f"{path} has no column {missing[0]!r}: it needs {', '.join(columns)}")
        yield from reader
    except csv.Error as error:
        raise ValueError(f"{path} is not a CSV file ({error})") from None


def bin_peaks(peaks):
    """Peaks (n, 2) of m/z and intensity -> the bins that are not empty, int16, and their values in
    (0, 1], float32.

    Bins of 0.1 from m/z 0 to 1100; the intensities in a bin are added, then divided by the largest
    bin, then the square root is taken. Peaks beyond the range and those without a positive
    intensity below 1e300, whose sums are finite, are left out.
    """
    mz, intensity = peaks[in_range(peaks) & (peaks[:, 1] > 0) & (peaks[:, 1] < 1e300)].T
    bins, where = np.unique((mz * BINS_PER_MZ).astype(np.int16), return_inverse=True)
    total = np.bincount(where, intensity, minlength=len(bins))
    return bins, np.sqrt(total / total.max(initial=0)).astype(np.float32)


def in_range(peaks):
    return (peaks[:, 0] >= 0) & (peaks[:, 0] < MAX_MZ)


def molecule(smiles):
    """rdkit's molecule, or None where rdkit refuses the SMILES. ValueError without rdkit."""
    try:
        from rdkit import Chem, rdBase
    except ImportError:
        raise ValueError("molecules' fingerprints need rdkit: pip install rdkit") from None
    with rdBase.BlockLogs():
        found = Chem.MolFromSmiles(smiles)
    return found if found is not None and found.GetNumAtoms() else None


def fingerprint(smiles):
    """167 MACCS keys, then 1,982 Morgan bits of radius 2. -> (2149,) bool, or None where rdkit
    refuses the SMILES"""
    found = molecule(smiles)
    if found is None:
        return None
    from rdkit.Chem import rdFingerprintGenerator, rdMolDescriptors

    morgan = rdFingerprintGenerator.GetMorganGenerator(radius=2, fpSize=MORGAN)
    bits = np.zeros(BITS, bool)
    bits[list(rdMolDescriptors.GetMACCSKeysFingerprint(found).GetOnBits())] = True
    bits[MACCS:] = morgan.GetFingerprintAsNumPy(found)
    return bits


@cache
def inchikey_of(smiles):
    from rdkit import Chem, rdBase

    found = molecule(smiles)
    with rdBase.BlockLogs():
        return "" if found is None else Chem.MolToInchiKey(found)


def compound_of(inchikey, smiles):
    """The first block of the InChIKey, which names the compound without its stereochemistry; "" if
    there is none."""
    if not re.match(r"[A-Z]{14}(-|$)", inchikey or ""):
        inchikey = inchikey_of(smiles)
    return inchikey[:14]


def smiles_of(fields):
    """The SMILES of an MSP record. MoNA's export has it among the comments."""
    noted = dict(re.findall(r'"([^"=]+)=([^"]*)"', fields.get("comments", "")))
    found = (fields.get("smiles"), noted.get("SMILES"), noted.get("computed SMILES"))
    return next((smiles for smiles in found if smiles and smiles.upper() != "N/A"), "")


def refusal(fields, peaks, instrument):
    """Why a record is no [M+H]+ tandem spectrum of the instrument with a known structure, or
    None."""
    has = fields.get
    if has("instrument_type", "").lower() != instrument.lower():
        return "of another instrument"
    if has("precursor_type", "").replace(" ", "") != "[M+H]+":
        return "with another precursor than [M+H]+"
    # A record that lacks one of these two is kept: [M+H]+ is positive, and a precursor makes it a
    # tandem spectrum.
    if not (has("ion_mode") or "P").upper().startswith("P"):
        return "in negative mode"
    if (has("spectrum_type") or "MS2").upper() not in ("MS2", "MS/MS", "MSMS"):
        return "that are not MS2"
    if not smiles_of(fields):
        return "without a SMILES"
    return bad_peaks(peaks, has("num peaks", ""))


def bad_peaks(peaks, announced=""):
    if peaks is None:
        return "with peaks that are no numbers"
    if re.fullmatch("[0-9]{1,9}", announced) and len(peaks) < int(announced):
        return "with fewer peaks than announced"
    if not len(peaks):
        return "without peaks"
    if not len(bin_peaks(peaks)[0]):
        return "without peaks in the range"
    return None


def csr(spectra):
    """[(bins, values), ...] -> offsets (N + 1,), columns, values."""
    offsets = np.cumsum([0, *(len(bins) for bins, _ in spectra)])
    columns = np.concatenate([np.zeros(0, np.int16), *(bins for bins, _ in spectra)])
    return offsets, columns, np.concatenate([np.zeros(0, np.float32), *(v for _, v in spectra)])


def listed(counts):
    """{"without peaks": 2, ...} -> "2 without peaks, ..."."""
    return ", ".join(f"{n:,} {reason}" for reason, n in counts.most_common()) or "none"


def flags(flag):
    flag("--msp", help="file of spectra (NIST's format), instead of MassBank's, which it downloads")
    flag("--instrument", default="LC-ESI-QFT", help="use spectra with this Instrument_type only")
    flag("--mgf", help="file of spectra whose molecules are to be found among candidates")
    flag("--candidates", help="CSV file: id (a TITLE in --mgf), inchikey, smiles of each candidate")
    flag("--truth", help="CSV file: id, inchikey of the true molecule of each spectrum in --mgf")


def prepare(root, args):
    prepare_spectra(root, args.msp, args.instrument, args.mgf, args.candidates, args.truth)


def prepare_spectra(
    root, msp=None, instrument="LC-ESI-QFT", mgf=None, candidates=None, truth=None, seed=0
):
    """Reads the spectra of an MSP file and writes root/spectra/spectra.npz, for load and
    load_challenges.

    msp to truth: as the flags; the three files of challenges, or none of them; id is the MGF's
    TITLE. A tenth of the compounds, drawn with `seed`, is the test split; the challenges' compounds
    are in neither.
    -> {"train": spectra, "test": spectra, "compounds": .., "challenges": .., "candidates": ..,
    "skipped": {...}}. Records that do not fit are skipped and counted; ValueError, and nothing
    written, for what leaves no data.
    """
    if None in (mgf, candidates, truth) and (mgf, candidates, truth) != (None, None, None):
        raise ValueError("challenges need all three: --mgf, --candidates and --truth")
    molecule("C")  # without rdkit or a place to write, say so before the work
    target = data.prepared(root, "spectra", "spectra.npz")
    answers = {}
    if truth is not None:
        for row in read_table(truth, ("id", "inchikey")):
            answers[row["id"]] = compound_of(row["inchikey"], row.get("smiles") or "")
    msp = msp or data.download(MASSBANK, target.with_name("MassBank_NIST.msp"))
    arrays, counts = spectrum_arrays(msp, instrument, set(answers.values()), seed)
    if truth is not None:
        more, found = challenge_arrays(mgf, candidates, answers)
        arrays, counts = arrays | more, counts | found
    data.save_npz(target, version=SPECTRA_VERSION, **arrays)
    print(f"wrote {target} ({target.stat().st_size / 2**20:.1f} MiB)")
    return counts


def spectrum_arrays(msp, instrument, forbidden, seed):
    """The MSP's part of the .npz: train_* and test_*; the compounds in `forbidden` are left out.
    -> arrays, counts"""
    spectra, names, beyond = defaultdict(list), defaultdict(dict), 0
    instruments, skipped = Counter(), Counter()
    for fields, peaks in read_msp(msp):
        instruments[fields.get("instrument_type", "not said")] += 1
        reason, smiles = refusal(fields, peaks, instrument), smiles_of(fields)
        compound = "" if reason else compound_of(fields.get("inchikey"), smiles)
        if not compound:
            skipped[reason or "whose SMILES rdkit refuses"] += 1
            continue
        beyond += int((~in_range(peaks)).sum())
        spectra[compound].append(bin_peaks(peaks))
        names[compound][smiles] = None  # an ordered set
    total, removed = sum(instruments.values()), forbidden & set(spectra)
    for compound in removed:
        skipped["of the challenges' compounds"] += len(spectra.pop(compound))
    bits = {}
    for compound in sorted(spectra):
        bits[compound] = next((b for b in map(fingerprint, names[compound]) if b is not None), None)
        if bits[compound] is None:
            skipped["whose SMILES rdkit refuses"] += len(spectra.pop(compound))
    if len(spectra) < 2:
        kinds = ", ".join(kind for kind, _ in instruments.most_common(5))
        raise ValueError(
            f"{msp} leaves {len(spectra)} compounds, too few for a split: of {total:,} records "
            f"were skipped {listed(skipped)} (--instrument is {instrument}; the file has "
            f"{kinds or 'none'})"
        )

    compounds = np.array(sorted(spectra))
    generator = np.random.default_rng(seed)
    shuffled = generator.permutation(compounds)
    held_out = max(1, round(0.1 * len(compounds)))
    arrays, sizes = {}, {}
    for part, chosen in ("test", shuffled[:held_out]), ("train", shuffled[held_out:]):
        pairs = [(k, spectrum) for k, c in enumerate(chosen) for spectrum in spectra[c]]
        order = generator.permutation(len(pairs))  # so that --limit takes spectra of many compounds
        arrays |= zip((f"{part}_{key}" for key in CSR), csr([pairs[i][1] for i in order]))
        arrays |= {
            f"{part}_rows": np.array([pairs[i][0] for i in order]),
            f"{part}_bits": np.packbits([bits[compound] for compound in chosen], axis=1),
            f"{part}_compounds": chosen,
        }
        sizes[part] = len(order)
    print(
        f"{msp}: {total:,} records, skipped {listed(skipped)}; "
        f"{beyond:,} peaks beyond m/z {MAX_MZ} left out\n"
        f"{sizes['train']:,} spectra of {len(compounds) - held_out:,} compounds to train, "
        f"{sizes['test']:,} of {held_out:,} to test; "
        f"{len(removed)} compounds of the challenges removed"
    )
    counts = sizes | {"compounds": len(compounds), "removed_compounds": len(removed)}
    counts |= {"records": total, "skipped": dict(skipped), "peaks_beyond_range": beyond}
    return arrays, counts


def challenge_arrays(mgf, candidates, answers):
    """The challenges' part of the .npz. Stereoisomers among the candidates count once, as one
    compound.
    -> arrays, counts"""
    skipped, spectra, beyond = Counter(), {}, 0
    for fields, peaks in read_mgf(mgf):
        name = fields.get("title", "")
        reason = "without a TITLE" if not name else bad_peaks(peaks)
        reason = reason or ("whose TITLE came before" if name in spectra else None)
        if reason is not None:
            skipped[f"spectra {reason}"] += 1
            continue
        beyond += int((~in_range(peaks)).sum())
        spectra[name] = bin_peaks(peaks)
    lists, bits, rows = {name: {} for name in spectra}, {}, 0
    for row in read_table(candidates, ("id", "inchikey", "smiles")):
        rows += 1
        if rows % 10_000 == 0 and sys.stderr.isatty():
            print(f"\r{rows:,} candidates", end="", file=sys.stderr, flush=True)
        name, smiles = row["id"], row["smiles"] or ""
        if name not in lists:
            skipped["candidates of an unknown id"] += 1
            continue
        compound = compound_of(row["inchikey"], smiles)
        if compound in lists[name]:
            skipped["candidates of a compound listed before"] += 1
            continue
        if compound not in bits:
            found = fingerprint(smiles) if compound else None
            if found is None:
                skipped["candidates whose SMILES rdkit refuses"] += 1
                continue
            bits[compound] = np.packbits(found)  # (269,)
        lists[name][compound] = len(lists[name])
    if rows >= 10_000 and sys.stderr.isatty():
        print(file=sys.stderr)

    kept = []
    for name in spectra:
        if name not in answers:
            skipped["spectra that the truth does not name"] += 1
        elif not lists[name]:
            skipped["spectra without candidates"] += 1
        elif answers[name] not in lists[name]:
            skipped["spectra whose candidates lack the true one"] += 1
        else:
            kept.append(name)
    if not kept:
        raise ValueError(
            f"no id of {mgf} has both candidates in {candidates} and an answer in the truth: "
            f"skipped {listed(skipped)}"
        )
    packed = [bits[compound] for name in kept for compound in lists[name]]
    print(
        f"{len(kept)} challenges with {len(packed):,} candidates of {rows:,}; "
        f"skipped {listed(skipped)}; {beyond:,} peaks beyond m/z {MAX_MZ} left out"
    )
    arrays = dict(zip((f"challenge_{key}" for key in CSR), csr([spectra[name] for name in kept])))
    arrays |= {
        "challenge_ids": np.array(kept),
        "challenge_compounds": np.array([answers[name] for name in kept]),
        "challenge_truth": np.array([lists[name][answers[name]] for name in kept]),
        "candidate_offsets": np.cumsum([0, *(len(lists[name]) for name in kept)]),
        "candidate_bits": np.stack(packed),  # (all candidates, 269)
    }
    counts = {"challenges": len(kept), "candidates": len(packed)}
    return arrays, counts | {"challenges_skipped": dict(skipped)}


def read_spectra(root):
    """The arrays of root/spectra/spectra.npz."""
    path = data.prepared(root, "spectra", "spectra.npz")
    if not path.exists():
        raise ValueError(f"there is no {path}: make it with python data.py spectra --data {root}")
    parts = [f"{part}_{key}" for part in ("train", "test") for key in (*CSR, "rows", "bits")]
    arrays = data.read_npz(path, ("version", *parts))
    if not np.array_equal(arrays["version"], SPECTRA_VERSION):
        raise ValueError(f"{path} is of another version: make it anew with python data.py spectra")
    try:
        sound = all(whole_spectra(arrays, p) for p in ("train", "test", "challenge"))
    except (KeyError, TypeError, ValueError, IndexError):  # an array is absent or of another shape
        sound = False
    if not sound:
        raise ValueError(f"{path} is damaged: make it anew with python data.py spectra")
    return arrays


def whole_spectra(arrays, part):
    """Whether the arrays of a part fit each other, and no index leaves what it points into."""
    if part == "challenge" and "challenge_ids" not in arrays:
        return True

    def within(index, end):
        whole = index.ndim == 1 and index.dtype.kind == "i" and index.dtype.isnative
        return whole and ((index >= 0) & (index < end)).all()

    def cut(offsets, n):  # n rows, one after the other
        rising = within(offsets, n + 1) and (np.diff(offsets) >= 0).all()
        return rising and len(offsets) > 1 and (offsets[0], offsets[-1]) == (0, n)

    offsets, columns, values = (arrays[f"{part}_{key}"] for key in CSR)
    n, good = len(offsets) - 1, cut(offsets, len(columns)) and within(columns, BINS)
    good = good and values.dtype == np.float32 and values.shape == columns.shape
    good = good and ((values >= 0) & (values <= 1)).all()
    if part != "challenge":
        bits, rows = arrays[f"{part}_bits"], arrays[f"{part}_rows"]
        good = good and len(rows) == n and within(rows, len(bits))
    else:
        bits, truth = arrays["candidate_bits"], arrays["challenge_truth"]
        good = good and cut(lists := arrays["candidate_offsets"], len(bits)) and len(lists) == n + 1
        good = good and within(truth, len(bits)) and (truth < np.diff(lists)).all()
        good = good and arrays["challenge_ids"].shape == (n,) == truth.shape
    return good and bits.dtype == np.uint8 and bits.shape[1:] == (-(-BITS // 8),)


def sparse_from(arrays, part):
    return Sparse(*(torch.from_numpy(arrays[f"{part}_{key}"]) for key in CSR), BINS)


def load(name, root):
    """spectrum: 11,000 bins in [0, 1]; fingerprint: 2,149 bits, held once per compound. All spectra
    of a compound are paired together, so that a fingerprint which is hidden is hidden in all."""
    arrays, splits = read_spectra(root), []
    for part in ("train", "test"):
        spectra = sparse_from(arrays, part)
        bits = np.unpackbits(arrays[f"{part}_bits"], axis=1, count=BITS).astype(bool)
        rows = [torch.arange(len(spectra)), torch.from_numpy(arrays[f"{part}_rows"])]
        splits.append(data.Split([spectra, torch.from_numpy(bits)], rows))
    names, compounds = ("spectrum", "fingerprint"), splits[0].rows[1]
    return data.Dataset(name, *splits, {"name": name}, names, groups=compounds)


class Challenges(NamedTuple):
    """Spectra to name, each with a list of candidate molecules."""

    ids: list
    spectra: Sparse  # (n, 11000)
    truth: np.ndarray  # (n,): the place of the true one among its candidates
    offsets: np.ndarray  # (n + 1,): challenge i has the candidates offsets[i] : offsets[i + 1]
    bits: np.ndarray  # (candidates, 269) uint8: fingerprints, eight bits to a byte (np.packbits)


def load_challenges(root):
    """-> Challenges, or None if none were given when the spectra were prepared."""
    arrays = read_spectra(root)
    if "challenge_ids" not in arrays:
        return None
    return Challenges(
        arrays["challenge_ids"].tolist(),
        sparse_from(arrays, "challenge"),
        arrays["challenge_truth"],
        arrays["candidate_offsets"],
        arrays["candidate_bits"],
    )


# What is predicted, measured and drawn

# predicted probabilities stay this far from 0 and 1: one wrong bit costs at most 9.2 nats
CERTAIN = 1e-4
TOPS = 1, 5, 10, 20


def bit_cross_entropy(probabilities, packed, block=2048):
    """-Σ_d [c_d log p_d + (1 - c_d) log(1 - p_d)] of each candidate's bits c, in nats.

    probabilities (D,); packed (n, ceil(D / 8)) uint8, as np.packbits -> (n,)
    """
    p = np.clip(np.asarray(probabilities, np.float64), CERTAIN, 1 - CERTAIN)
    log_odds, none = np.log(p) - np.log1p(-p), -np.log1p(-p).sum()
    parts = [packed[i : i + block] for i in range(0, len(packed), block)]  # 35 MB each as float64
    bits = (np.unpackbits(part, axis=1, count=len(p)).astype(np.float64) for part in parts)
    return np.concatenate([none - c @ log_odds for c in bits])


def rank_of(scores, true):
    """The rank of scores[true] among scores (n,), 1 for the lowest; ties share their mean rank."""
    gap = scores - scores[true]
    return 1 + (gap < -1e-9).sum() + ((abs(gap) <= 1e-9).sum() - 1) / 2


def challenge_ranks(probabilities, challenges):
    """The rank of each challenge's true candidate by cross entropy. probabilities (n, D) -> (n,)"""
    lists = np.split(challenges.bits, challenges.offsets[1:-1])
    each = zip(probabilities, lists, challenges.truth)
    return np.array([rank_of(bit_cross_entropy(p, packed), true) for p, packed, true in each])


def top_k(ranks, ks):
    """The share of challenges whose true candidate is among the first k.

    ranks (n,), ks (K,) -> (K,)
    """
    return (np.asarray(ranks)[:, None] <= np.asarray(ks)).mean(0)


def random_top_k(sizes, ks):
    """What top_k is on average when the candidates, `sizes` (n,) of them, are in random order.
    -> (K,)"""
    return np.minimum(np.asarray(ks) / np.asarray(sizes)[:, None], 1).mean(0)


def tanimoto(a, b):
    """|a and b| / |a or b| of bits (N, D), 1 where both are empty. -> (N,)"""
    union = (a | b).sum(1)
    return np.where(union, (a & b).sum(1) / np.maximum(union, 1), 1.0)


def bit_scores(probabilities, bits):
    """How well bits (N, D) are predicted: accuracy and Tanimoto of p > 1/2, nats per example."""
    predicted = probabilities > 0.5
    p = np.clip(probabilities, CERTAIN, 1 - CERTAIN)
    return {
        "accuracy": float((predicted == bits).mean()),
        "tanimoto": float(tanimoto(predicted, bits).mean()),
        "cross_entropy": float(-np.log(np.where(bits, p, 1 - p)).sum(1).mean()),
    }


@torch.no_grad()
def predict_bits(model, take, n, samples=1, batch_size=128):
    """p(bit = 1) from the spectrum alone, the mean over samples of q(z | spectrum).

    take(index): the spectra (B, 11000) of some of the n examples. -> float32 (n, 2149)
    """
    device, found = next(model.parameters()).device, []
    for index in torch.arange(n).split(batch_size):
        z = model.posterior(take(index).to(device), None).sample((samples,))  # (samples, B, L)
        p = nets.mean(model.modalities[1], model.decoders[1](z))
        found.append(p.mean(0).float().cpu())
    return torch.cat(found).numpy()


def evaluate(model, dataset, root="./data", seed=0):
    """Fingerprints from spectra, [poe] 4.4: `scores`, with the challenges below root, if any."""
    return scores(model, dataset, load_challenges(root), seed=seed)


def scores(model, dataset, challenges=None, samples=20, seed=0, batch_size=128):
    """Bits of the test split, ranks of the challenges' true candidates.

    challenges: load_challenges(root), or None. samples: of z, whose predictions are averaged.
    "frequency" predicts for all spectra how often each bit is set in the training examples; it
    ranks the same candidates. "random" is the expectation over random orders; its median is the k
    at which its top-k curve reaches one half.
    -> {"bits": {"accuracy", "tanimoto", "cross_entropy"}, "frequency": {"bits": {...}}} and, with
    challenges, {"rank": {"top1", "top5", "top10", "top20", "median"}, "random": {"rank"}, "ranks":
    {id: rank}, "sizes": {id: n}}, with "rank" and "ranks" in "frequency" too. Tops are shares of
    the challenges, ties have their mean rank.
    """
    torch.manual_seed(seed)
    model.eval()
    test, train = dataset.test, dataset.train
    bits = torch.cat([test.take(1, i).cpu() for i in torch.arange(len(test)).split(4096)]) > 0.5
    bits = bits.numpy()  # (N, 2149)
    count = torch.bincount(train.rows[1].cpu(), minlength=len(train.bases[1])).double()
    frequency = (count @ train.bases[1].cpu().double() / count.sum()).numpy()  # (2149,)

    def predict(take, n):
        return predict_bits(model, take, n, samples, batch_size)

    result = {
        "bits": bit_scores(predict(lambda index: test.take(0, index), len(test)), bits),
        "frequency": {"bits": bit_scores(np.broadcast_to(frequency, bits.shape), bits)},
    }
    if challenges is None:
        return result

    def by_id(values):
        return dict(zip(challenges.ids, values.tolist()))

    def ranking(probabilities):
        ranks = challenge_ranks(probabilities, challenges)
        return {"rank": tops(top_k, ranks, np.median(ranks)), "ranks": by_id(ranks)}

    sizes = np.diff(challenges.offsets)
    ks = np.arange(1, sizes.max() + 1)
    half = ks[np.argmax(random_top_k(sizes, ks) >= 0.5)]
    predicted = predict(lambda index: challenges.spectra[index], len(sizes))
    result["frequency"] |= ranking(np.broadcast_to(frequency, predicted.shape))
    result["random"] = {"rank": tops(random_top_k, sizes, half)}
    return result | ranking(predicted) | {"sizes": by_id(sizes)}


def tops(share, values, median):
    found = {f"top{k}": float(share(values, [k])[0]) for k in TOPS}
    return found | {"median": float(median)}


def notes(results):
    """What has to be known to read a table of these results: the ranks that they compare with."""
    lines, ranked = [], [r for r in results if "ranks" in r]
    what = {"frequency": "Every bit by its frequency in training", "random": "Random order"}
    for name in what if ranked else ():
        rank = ranked[0][name]["rank"]
        shares = ", ".join(f"top {k} {rank[f'top{k}']:.3f}" for k in TOPS)
        lines.append(f"{what[name]}: {shares}, median rank {rank['median']:.1f}.")
    for r in ranked:
        ranks = ", ".join(f"{rank:g}" for rank in sorted(r["ranks"].values()))
        lines.append(f"Ranks of the true candidates, {Path(r['folder']).name}: {ranks}.")
    return lines


@torch.no_grad()
def draw(run, dataset, root, path, n=4):
    """[poe] Fig. 11 A-C: test spectra, and below each molecule's bits those that are predicted."""
    index = torch.linspace(0, len(dataset.test) - 1, n).long()
    spectra, bits = (dataset.test.take(m, index).cpu().numpy() for m in (0, 1))
    p = predict_bits(run.model, lambda k: dataset.test.take(0, index[k]), n, samples=20)
    scores = tanimoto(p > 0.5, bits > 0.5)
    heading = f"{drawing.title(run)} · test spectra and fingerprints"
    drawing.fingerprints(spectra, MAX_MZ, bits, p, scores, heading, path)


def compare(results, folder):
    """[poe] Fig. 11 D: top-k curves of runs, of the bit frequencies and of random order."""
    ranked = [r for r in results if "ranks" in r]
    if not ranked:
        return
    sizes = np.array(list(ranked[0]["sizes"].values()))
    ks = np.unique(np.geomspace(1, sizes.max(), 400).round().astype(int))
    runs = {Path(r["folder"]).name: top_k(list(r["ranks"].values()), ks) for r in ranked}
    frequency = top_k(list(ranked[0]["frequency"]["ranks"].values()), ks)
    heading = f"{len(sizes)} challenges, {sizes.min():,} to {sizes.max():,} candidates"
    random, path = random_top_k(sizes, ks), folder / "spectra-top-k.png"
    drawing.top_k(ks, runs, frequency, random, heading, path)
