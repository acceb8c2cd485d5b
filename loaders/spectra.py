"""spectra: tandem mass spectra and the fingerprints of their molecules.

`python data.py spectra` reads spectra from MassBank's release, or from another file in its format,
computes the fingerprints with rdkit and writes both to spectra/spectra.npz.
"""

import csv
import gzip
import os
import re
import sys
import urllib.request
from collections import Counter, defaultdict
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import data

MASSBANK = "https://github.com/MassBank/MassBank-data/releases/latest/download/MassBank_NIST.msp"
MAX_MZ, BINS_PER_MZ = 1100, 10
BINS = MAX_MZ * BINS_PER_MZ
MACCS, MORGAN = 167, 1982  # our choice: [poe] only says that there are 2,149 bits
BITS = MACCS + MORGAN
CSR = ("offsets", "columns", "values")  # the arrays of a Sparse


class Sparse:
    """A sparse matrix (N, D) in CSR format. sparse[rows] is dense, float32, on the matrix's device;
    `rows` may be anything that indexes a tensor.

    offsets (N + 1,): row n has the columns columns[offsets[n] : offsets[n + 1]], each once; values:
    float32, as many as columns.
    """

    dtype, ndim = torch.float32, 2

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
        # Each row is read up to the length of the longest one: no shape depends on the data, which
        # would make the CPU wait for the GPU.
        at = start[..., None] + torch.arange(self.longest, device=self.device)  # (B, longest)
        inside = at < end[..., None]
        at = at.clamp(max=len(self.values) - 1)
        dense = torch.zeros(*start.shape, self.shape[1], device=self.device)  # (B, D)
        return dense.scatter_add_(-1, self.columns[at].long(), self.values[at] * inside)


# ------------------------------------------------------------------- files of spectra and molecules


def read_lines(path):
    """The lines of a text file, .gz or not."""
    try:
        with open(path, "rb") as file:
            compressed = file.read(2) == b"\x1f\x8b"
        opener = gzip.open if compressed else open
        with opener(path, "rt", encoding="utf-8-sig", errors="replace") as file:
            yield from file
    except Exception as error:  # not there, or a truncated .gz: gzip raises many kinds
        raise ValueError(f"{path} cannot be read: {error}") from None


def read_peaks(lines):
    """Peaks are written "m/z intensity", one per line, or several separated by ";", and may be
    followed by a quoted note. -> (n, 2), or None if they are not numbers"""
    words = []
    for line in lines:
        for peak in re.sub('"[^"]*"', "", line).split(";"):
            words += peak.split()[:2]
    try:
        return np.array(words, np.float64).reshape(-1, 2)
    except ValueError:
        return None


def read_msp(path):
    """The records of an MSP file (NIST's format, which MassBank and MoNA export), .gz or not.

    Yields fields {key in lower case: value}, with the first value of a repeated key, and peaks
    (n, 2), m/z and intensity, or None.
    """
    fields, peaks, in_peaks = {}, [], False
    for line in read_lines(path):
        line = line.strip()
        header = line[:1].isalpha() and ":" in line
        if fields and (not line or (in_peaks and header)):
            yield fields, read_peaks(peaks)
            fields, peaks, in_peaks = {}, [], False
        if header:
            key, _, value = line.partition(":")
            fields.setdefault(key.strip().lower(), value.strip())
            in_peaks = key.strip().lower() == "num peaks"
        elif line and in_peaks:
            peaks.append(line)
    if fields:
        yield fields, read_peaks(peaks)


def read_mgf(path):
    """The records of a Mascot generic file, .gz or not: (fields, peaks) as in read_msp."""
    fields, peaks = None, []
    for line in read_lines(path):
        line = line.strip()
        if line.upper() == "BEGIN IONS":
            fields, peaks = {}, []
        elif line.upper() == "END IONS" and fields is not None:
            yield fields, read_peaks(peaks)
            fields = None
        elif fields is not None and line[:1].isalpha() and "=" in line:
            key, _, value = line.partition("=")
            fields.setdefault(key.strip().lower(), value.strip())
        elif fields is not None and line and line[0] not in "#;!/":
            peaks.append(line)


def read_table(path, columns):
    """The rows of a CSV file, .gz or not, that must have these columns. Yields dictionaries."""
    reader = csv.DictReader(read_lines(path))
    for column in columns:
        if column not in (reader.fieldnames or []):
            raise ValueError(f"{path} must have the columns {', '.join(columns)}: no {column!r}")
    yield from reader


def bin_peaks(peaks):
    """Peaks (n, 2) of m/z and intensity -> the non-empty bins, int16, and their values in (0, 1],
    float32.

    Bins of 0.1 from m/z 0 to 1100. Intensities in a bin are summed, divided by the largest sum, and
    square-rooted. Peaks beyond the range or without a positive, finite intensity are left out.
    """
    intensity = peaks[:, 1]
    mz, intensity = peaks[in_range(peaks) & (intensity > 0) & np.isfinite(intensity)].T
    bins, which = np.unique((mz * BINS_PER_MZ).astype(np.int16), return_inverse=True)
    total = np.bincount(which, intensity, minlength=len(bins))
    return bins, np.sqrt(total / total.max(initial=0)).astype(np.float32)


def in_range(peaks):
    return (peaks[:, 0] >= 0) & (peaks[:, 0] < MAX_MZ)


def molecule(smiles):
    """rdkit's molecule, or None if the SMILES is invalid. ValueError without rdkit."""
    try:
        from rdkit import Chem, rdBase
    except ImportError:
        raise ValueError("fingerprints of molecules need rdkit: pip install rdkit") from None
    with rdBase.BlockLogs():
        mol = Chem.MolFromSmiles(smiles)
    return mol if mol is not None and mol.GetNumAtoms() else None


def fingerprint(smiles):
    """167 MACCS keys, then 1,982 Morgan bits of radius 2. -> (2149,) bool, or None if the SMILES is
    invalid"""
    mol = molecule(smiles)
    if mol is None:
        return None
    from rdkit.Chem import rdFingerprintGenerator, rdMolDescriptors

    morgan = rdFingerprintGenerator.GetMorganGenerator(radius=2, fpSize=MORGAN)
    bits = np.zeros(BITS, bool)
    bits[list(rdMolDescriptors.GetMACCSKeysFingerprint(mol).GetOnBits())] = True
    bits[MACCS:] = morgan.GetFingerprintAsNumPy(mol)
    return bits


@cache
def inchikey_of(smiles):
    from rdkit import Chem, rdBase

    mol = molecule(smiles)
    with rdBase.BlockLogs():
        return "" if mol is None else Chem.MolToInchiKey(mol)


def compound_of(inchikey, smiles):
    """The first block of the InChIKey, the same for all stereoisomers; computed from the SMILES if
    the InChIKey is missing, "" if that is invalid too."""
    if not re.match(r"[A-Z]{14}(-|$)", inchikey or ""):
        inchikey = inchikey_of(smiles)
    return inchikey[:14]


def smiles_of(fields):
    """The SMILES of an MSP record, "" if there is none. MoNA has it in the comments."""
    comments = dict(re.findall(r'"([^"=]+)=([^"]*)"', fields.get("comments", "")))
    for smiles in (fields.get("smiles"), comments.get("SMILES"), comments.get("computed SMILES")):
        if smiles and smiles.upper() != "N/A":
            return smiles
    return ""


def reason_to_skip(fields, peaks, instrument):
    """None for an [M+H]+ MS2 spectrum of this instrument with a SMILES, else why it is skipped."""
    if fields.get("instrument_type", "").lower() != instrument.lower():
        return "of another instrument"
    if fields.get("precursor_type", "").replace(" ", "") != "[M+H]+":
        return "with another precursor than [M+H]+"
    # [M+H]+ implies positive mode, a precursor implies MS2: records may lack these two fields
    if not (fields.get("ion_mode") or "P").upper().startswith("P"):
        return "in negative mode"
    if (fields.get("spectrum_type") or "MS2").upper() not in ("MS2", "MS/MS", "MSMS"):
        return "that are not MS2"
    if not smiles_of(fields):
        return "without a SMILES"
    return bad_peaks(peaks, fields.get("num peaks", ""))


def bad_peaks(peaks, announced=""):
    if peaks is None:
        return "with peaks that are not numbers"
    if re.fullmatch("[0-9]{1,9}", announced) and len(peaks) < int(announced):
        return "with fewer peaks than announced"
    if not len(peaks):
        return "without peaks"
    if not len(bin_peaks(peaks)[0]):
        return "without peaks in the range"
    return None


def csr(spectra):
    """[(bins, values), ...] -> offsets (N + 1,), columns, values"""
    offsets = np.cumsum([0, *(len(bins) for bins, _ in spectra)])
    columns = np.concatenate([np.zeros(0, np.int16), *(bins for bins, _ in spectra)])
    return offsets, columns, np.concatenate([np.zeros(0, np.float32), *(v for _, v in spectra)])


def as_text(counts):
    """{"without peaks": 2, ...} -> "2 without peaks, ..." """
    return ", ".join(f"{n:,} {reason}" for reason, n in counts.most_common()) or "none"


# --------------------------------------------------------------------------- python data.py spectra


def flags(flag):
    flag("--msp", help="a file of spectra in NIST's format, instead of MassBank's release")
    flag("--instrument", default="LC-ESI-QFT", help="use only spectra with this Instrument_type")
    flag("--mgf", help="challenges: spectra whose molecules are ranked among candidates")
    flag("--candidates", help="challenges: CSV with id (a TITLE of --mgf), inchikey, smiles")
    flag("--truth", help="challenges: CSV with id, inchikey of the true molecules")


def prepare(root, args):
    """Read the spectra of an MSP file, and challenges if any, and write spectra/spectra.npz.

    args: what flags adds; challenges need all three files. A tenth of the compounds is the test
    split; compounds of challenges are in neither split. Records that do not fit are skipped and
    counted. ValueError if a file cannot be read or no data are left.
    """
    challenges = (args.mgf, args.candidates, args.truth)
    if None in challenges and challenges != (None, None, None):
        raise ValueError("challenges need all three of --mgf, --candidates and --truth")
    molecule("C")  # raises at once if rdkit is missing
    path = Path(root, "spectra", "spectra.npz")
    answers = {}
    if args.truth is not None:
        for row in read_table(args.truth, ("id", "inchikey")):
            answers[row["id"]] = compound_of(row["inchikey"], row.get("smiles") or "")
    msp = args.msp or download_massbank(path.parent)
    spectra, bits = read_compounds(msp, args.instrument, excluded=set(answers.values()))
    arrays = split_compounds(spectra, bits)
    if args.truth is not None:
        arrays |= challenge_arrays(args.mgf, args.candidates, answers)
    data.save_npz(path, arrays)
    print(f"wrote {path} ({path.stat().st_size / 2**20:.1f} MiB)")


def download_massbank(folder):
    """MassBank's latest release, downloaded if it is not there. It has no fixed digest; urlretrieve
    raises an error for an incomplete download. -> its path"""
    path = folder / "MassBank_NIST.msp"
    if not path.exists():
        print(f"downloading {MASSBANK} ...", file=sys.stderr)
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / ".MassBank_NIST.msp.part"
        try:
            urllib.request.urlretrieve(MASSBANK, part)
            os.replace(part, path)
        except OSError as error:
            raise ValueError(
                f"{MASSBANK} cannot be downloaded: {error}. Put it at {path} by hand"
            ) from None
        finally:
            part.unlink(missing_ok=True)
    return path


def read_compounds(msp, instrument, excluded):
    """The spectra of an MSP file and the fingerprints of their molecules, without the compounds in
    `excluded`. -> {compound: [(bins, values), ...]}, {compound: (2149,) bool}"""
    spectra, smiles_of_compound, beyond = defaultdict(list), defaultdict(dict), 0
    instruments, skipped = Counter(), Counter()
    for fields, peaks in read_msp(msp):
        instruments[fields.get("instrument_type", "not said")] += 1
        reason = reason_to_skip(fields, peaks, instrument)
        smiles = smiles_of(fields)
        compound = "" if reason else compound_of(fields.get("inchikey"), smiles)
        if not compound:
            skipped[reason or "with an invalid SMILES"] += 1
            continue
        beyond += int((~in_range(peaks)).sum())
        spectra[compound].append(bin_peaks(peaks))
        smiles_of_compound[compound][smiles] = None  # a dict as an ordered set
    for compound in excluded & set(spectra):
        skipped["of the challenges' compounds"] += len(spectra.pop(compound))
    bits = {}
    for compound in list(spectra):
        valid = (b for b in map(fingerprint, smiles_of_compound[compound]) if b is not None)
        bits[compound] = next(valid, None)
        if bits[compound] is None:
            skipped["with an invalid SMILES"] += len(spectra.pop(compound))
    records = f"{instruments.total():,} records, skipped {as_text(skipped)}"
    if len(spectra) < 2:
        names = ", ".join(name for name, _ in instruments.most_common(5))
        raise ValueError(
            f"{msp} must have spectra of two compounds or more, not {len(spectra)}: of {records} "
            f"(--instrument is {instrument}; the file has {names or 'none'})"
        )
    print(f"{msp}: {records}; {beyond:,} peaks beyond m/z {MAX_MZ} left out")
    return spectra, bits


def split_compounds(spectra, bits, seed=0):
    """A tenth of the compounds, at random, with all their spectra, is the test split. spectra,
    bits: see read_compounds. -> the arrays train_* and test_* of spectra.npz"""
    compounds = np.array(sorted(spectra))
    generator = np.random.default_rng(seed)
    shuffled = generator.permutation(compounds)
    held_out = max(1, round(0.1 * len(compounds)))
    arrays = {}
    for part, chosen in ("test", shuffled[:held_out]), ("train", shuffled[held_out:]):
        pairs = [(k, spectrum) for k, c in enumerate(chosen) for spectrum in spectra[c]]
        order = generator.permutation(len(pairs))  # so that --limit takes many compounds
        for key, array in zip(CSR, csr([pairs[i][1] for i in order])):
            arrays[f"{part}_{key}"] = array
        arrays[f"{part}_rows"] = np.array([pairs[i][0] for i in order])
        arrays[f"{part}_bits"] = np.packbits([bits[compound] for compound in chosen], axis=1)
        arrays[f"{part}_compounds"] = chosen
        print(f"{part}: {len(order):,} spectra of {len(chosen):,} compounds")
    return arrays


def challenge_arrays(mgf, candidates, answers):
    """The arrays challenge_* and candidate_* of spectra.npz. Stereoisomers among the candidates
    count once, as one compound."""
    skipped, spectra, beyond = Counter(), {}, 0
    for fields, peaks in read_mgf(mgf):
        name = fields.get("title", "")
        reason = bad_peaks(peaks) if name else "without a TITLE"
        if name in spectra:
            reason = "with a repeated TITLE"
        if reason is not None:
            skipped[f"spectra {reason}"] += 1
            continue
        beyond += int((~in_range(peaks)).sum())
        spectra[name] = bin_peaks(peaks)
    lists, bits, rows = {name: {} for name in spectra}, {}, 0
    print(f"computing fingerprints of the candidates in {candidates} ...", file=sys.stderr)
    for row in read_table(candidates, ("id", "inchikey", "smiles")):
        rows += 1
        name, smiles = row["id"], row["smiles"] or ""
        if name not in lists:
            skipped["candidates of an unknown id"] += 1
            continue
        compound = compound_of(row["inchikey"], smiles)
        if compound in lists[name]:
            skipped["candidates of a compound listed before"] += 1
            continue
        if compound not in bits:
            bit = fingerprint(smiles) if compound else None
            if bit is None:
                skipped["candidates with an invalid SMILES"] += 1
                continue
            bits[compound] = np.packbits(bit)  # (269,)
        lists[name][compound] = len(lists[name])

    complete = []
    for name in spectra:
        if name not in answers:
            skipped["spectra without a true molecule"] += 1
        elif not lists[name]:
            skipped["spectra without candidates"] += 1
        elif answers[name] not in lists[name]:
            skipped["spectra without the true molecule among the candidates"] += 1
        else:
            complete.append(name)
    if not complete:
        raise ValueError(
            f"no id of {mgf} has candidates in {candidates} and a true molecule: "
            f"skipped {as_text(skipped)}"
        )
    packed = [bits[compound] for name in complete for compound in lists[name]]
    print(
        f"{len(complete)} challenges with {len(packed):,} candidates of {rows:,}; "
        f"skipped {as_text(skipped)}; {beyond:,} peaks beyond m/z {MAX_MZ} left out"
    )
    arrays = {
        "challenge_ids": np.array(complete),
        "challenge_compounds": np.array([answers[name] for name in complete]),
        "challenge_truth": np.array([lists[name][answers[name]] for name in complete]),
        "candidate_offsets": np.cumsum([0, *(len(lists[name]) for name in complete)]),
        "candidate_bits": np.stack(packed),  # (all candidates, 269)
    }
    for key, array in zip(CSR, csr([spectra[name] for name in complete])):
        arrays[f"challenge_{key}"] = array
    return arrays


# -------------------------------------------------------------------------------------- spectra.npz


def read_spectra(root):
    """The arrays of spectra/spectra.npz."""
    path = Path(root, "spectra", "spectra.npz")
    if not path.exists():
        raise ValueError(f"there is no {path}: make it with python data.py spectra --data {root}")
    return data.read_npz(path)


def sparse_from(arrays, part):
    return Sparse(*(torch.from_numpy(arrays[f"{part}_{key}"]) for key in CSR), BINS)


def load(name, root):
    """spectrum: 11,000 bins in [0, 1]; fingerprint: 2,149 bits, one row per compound. All spectra
    of a compound are paired together, so that a hidden fingerprint is hidden in all of them."""
    arrays, splits = read_spectra(root), []
    for part in ("train", "test"):
        spectra = sparse_from(arrays, part)
        bits = np.unpackbits(arrays[f"{part}_bits"], axis=1, count=BITS).astype(bool)
        rows = [torch.arange(len(spectra)), torch.from_numpy(arrays[f"{part}_rows"])]
        splits.append(data.Split([spectra, torch.from_numpy(bits)], rows))
    frequencies = [round(p, 3) for p in bit_frequencies(splits[0]).tolist()]
    return data.Dataset(
        name=name,
        train=splits[0],
        test=splits[1],
        spec={"name": name, "frequencies": frequencies},
        names=("spectrum", "fingerprint"),
        groups=splits[0].rows[1],
    )


def bit_frequencies(split):
    """The share of the spectra whose fingerprint has each bit. -> (2149,), float64"""
    bits = split.bases[1].cpu().double()
    count = torch.bincount(split.rows[1].cpu(), minlength=len(bits)).double()
    return count @ bits / count.sum()


class Challenges(NamedTuple):
    """Spectra of unknown molecules, each with a list of candidates."""

    ids: list
    spectra: Sparse  # (n, 11000)
    truth: np.ndarray  # (n,): the position of the true molecule among its candidates
    offsets: np.ndarray  # (n + 1,): challenge i has the candidates offsets[i] : offsets[i + 1]
    bits: np.ndarray  # (candidates, 269) uint8: fingerprints, packed by np.packbits


def load_challenges(root):
    """-> Challenges, or None if spectra.npz was prepared without any"""
    arrays = read_spectra(root)
    if "challenge_ids" not in arrays:
        return None
    return Challenges(
        ids=arrays["challenge_ids"].tolist(),
        spectra=sparse_from(arrays, "challenge"),
        truth=arrays["challenge_truth"],
        offsets=arrays["candidate_offsets"],
        bits=arrays["candidate_bits"],
    )
