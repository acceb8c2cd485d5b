"""Spectra: files of spectra and molecules, their preparation and split, what is read again."""

import gzip
import sys
import urllib.error
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import data
from helpers import MOLECULES, challenge_files, record
from loaders import spectra


def sparse_of(dense):
    rows = [(np.flatnonzero(x).astype(np.int16), x[x > 0].astype(np.float32)) for x in dense]
    return spectra.Sparse(*map(torch.from_numpy, spectra.csr(rows)), dense.shape[1])


def test_sparse_rows_equal_the_dense_matrix():
    generator = np.random.default_rng(0)
    dense = generator.random((9, 40)).astype(np.float32) * (generator.random((9, 40)) < 0.2)
    dense[[0, 4, 8]] = 0
    sparse, dense = sparse_of(dense), torch.from_numpy(dense)
    assert sparse.shape == (9, 40) and len(sparse) == 9
    lists = torch.tensor([3, 0, 8, 3]), torch.tensor([], dtype=torch.long)
    for rows in (*lists, slice(2, 7), slice(None), torch.arange(9) % 2 == 0, 5, torch.tensor(5)):
        assert sparse[rows].equal(dense[rows]) and sparse.to("cpu")[rows].equal(dense[rows])
    assert sparse_of(np.zeros((3, 7), np.float32))[torch.tensor([2, 1])].equal(torch.zeros(2, 7))
    assert sparse_of(np.zeros((0, 7), np.float32)).shape == (0, 7)


@pytest.mark.parametrize("between", ["\n", "", "\r\n\n"])
def test_every_way_of_writing_an_msp_reads_the_same(tmp_path, between):
    bodies = (
        "41.5 10\n57.07 2e3\n71.1 .5\n",
        "41.5\t10\n57.07\t2e3\n71.1\t.5\n",
        '41.5 10 "C3H5+; 2 ppm"\n57.07 2e3\n71.1 .5 "?"\n',
        "41.5 10; 57.07 2e3; 71.1 .5;\n",
        "41.5 10;\n57.07 2e3;\n71.1 .5;\n",
    )
    text = between.join(f"Name: x\nNum Peaks: 3\n{body}" for body in bodies).encode()
    for content in (text, gzip.compress(text)):
        (tmp_path / "a.msp").write_bytes(content)
        found = list(spectra.read_msp(tmp_path / "a.msp"))
        assert len(found) == len(bodies)
        for fields, peaks in found:
            assert fields == {"name": "x", "num peaks": "3"}
            assert peaks.tolist() == [[41.5, 10], [57.07, 2e3], [71.1, 0.5]]


def test_an_msp_record_may_lack_peaks_or_have_words(tmp_path):
    path = tmp_path / "a.msp"
    path.write_text("Name: a\nNum Peaks: 0\n\nName: b\nNum Peaks: 1\n5 many\n\nName: c\nName: d\n")
    (a, none), (b, words), (c, last) = spectra.read_msp(path)
    assert none.shape == (0, 2) and words is None and last.shape == (0, 2)
    assert a["name"] == "a" and c["name"] == "c"  # the first of a repeated key


def test_the_smiles_of_mona_is_in_the_comments():
    comments = '"SMILES=CCO" "author=A, B" "computed SMILES=OCC"'
    assert spectra.smiles_of({"comments": comments}) == "CCO"
    assert spectra.smiles_of({"smiles": "N/A", "comments": '"computed SMILES=C=C"'}) == "C=C"
    assert spectra.smiles_of({"comments": "Parent=57.1"}) == ""


def test_an_mgf_has_fields_and_peaks(tmp_path):
    text = "# made up\n\nBEGIN IONS\nTITLE=one=1\nCHARGE=1+\n50.5 3\n# 55 5\n60 4\nEND IONS\n"
    text += "BEGIN IONS\nTITLE=two\nEND IONS\nBEGIN IONS\nTITLE=cut off\n50 1\n"
    (tmp_path / "a.mgf").write_text(text)
    (one, peaks), (two, none) = spectra.read_mgf(tmp_path / "a.mgf")
    assert one == {"title": "one=1", "charge": "1+"} and peaks.tolist() == [[50.5, 3], [60, 4]]
    assert two == {"title": "two"} and none.shape == (0, 2)


@pytest.mark.parametrize("read", [spectra.read_msp, spectra.read_mgf])
def test_a_truncated_or_absent_file_gets_one_sentence(tmp_path, read):
    (tmp_path / "cut.gz").write_bytes(gzip.compress(record("CCO").encode() * 50)[:-20])
    for name in ("cut.gz", "absent", "."):
        with pytest.raises(ValueError, match="cannot be read") as error:
            list(read(tmp_path / name))
        assert str(tmp_path / name) in str(error.value) and "\n" not in str(error.value)


def test_peaks_are_binned_added_and_square_rooted():
    peaks = np.array([[57.07, 60], [57.01, 40], [0, 25], [1099.99, 4]])
    beyond, nothing = [[1100, 9], [-1, 9], [np.nan, 9]], [[80, 0], [81, -3]]
    outside = np.array([*beyond, *nothing, [82, np.inf], [83, np.nan]])
    for given in peaks, np.concatenate([outside, peaks]):
        bins, values = spectra.bin_peaks(given)
        assert bins.tolist() == [0, 570, 10999]
        assert values == pytest.approx([0.5, 1, 0.2])
        assert bins.dtype == np.int16 and values.dtype == np.float32
    assert len(spectra.bin_peaks(outside)[0]) == 0
    (low, high), values = spectra.bin_peaks(
        np.array([[100.05, 0.045], [100.1, 0.18], [100.19, 0.32]])
    )
    assert (low, high) == (1000, 1001) and values == pytest.approx([0.3, 1])  # √(.045 / .5)


def test_a_compound_is_the_first_block_of_the_inchikey():
    assert spectra.compound_of("LFQSCWFLJHTTHZ-UHFFFAOYSA-N", "not read") == "LFQSCWFLJHTTHZ"
    assert spectra.compound_of("LFQSCWFLJHTTHZ", "not read") == "LFQSCWFLJHTTHZ"
    pytest.importorskip("rdkit")
    for bad in (None, "", "qtbsbxvteameqo-A", "QTBSBXVTEAMEQOO"):
        assert spectra.compound_of(bad, "CCO") == "LFQSCWFLJHTTHZ"
    assert spectra.compound_of("", "C1CC(") == ""


# ---------------------------------------------------------------------------------------- preparing


def prepare(root, msp=None, instrument="LC-ESI-QFT", mgf=None, candidates=None, truth=None):
    spectra.prepare(
        root,
        SimpleNamespace(
            msp=msp, instrument=instrument, mgf=mgf, candidates=candidates, truth=truth
        ),
    )


def test_without_rdkit_the_error_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "rdkit", None)
    with pytest.raises(ValueError, match="pip install rdkit"):
        prepare(tmp_path, tmp_path / "a.msp")
    assert not list(tmp_path.iterdir())


def test_fingerprints_are_maccs_keys_and_morgan_bits_without_stereochemistry(capfd):
    pytest.importorskip("rdkit")
    from rdkit import Chem
    from rdkit.Chem import AllChem, MACCSkeys

    bits = spectra.fingerprint("c1ccccc1O")
    assert bits.shape == (167 + 1982,) and bits.dtype == bool
    assert bits[162] and bits[165]  # MACCS: aromatic, a ring
    keys = MACCSkeys.GenMACCSKeys(Chem.MolFromSmiles("c1ccccc1O"))
    assert np.array_equal(np.flatnonzero(bits[:167]), list(keys.GetOnBits()))
    old = AllChem.GetMorganFingerprintAsBitVect(Chem.MolFromSmiles("c1ccccc1O"), 2, nBits=1982)
    assert np.array_equal(np.flatnonzero(bits[167:]), list(old.GetOnBits()))
    left, right = (spectra.fingerprint(s) for s in ("C[C@H](N)C(=O)O", "C[C@@H](N)C(=O)O"))
    assert np.array_equal(left, right) and not np.array_equal(left, bits)
    capfd.readouterr()
    assert all(spectra.fingerprint(s) is None for s in ("", "C1CC(", "c1ccc1c", "N/A"))
    assert capfd.readouterr() == ("", "")


def written(counts):
    """{"without peaks": 2, ...} as it is printed."""
    return [f"{n} {reason}" for reason, n in counts.items()]


def test_records_that_do_not_fit_are_skipped_and_counted(tmp_path, capsys):
    pytest.importorskip("rdkit")
    good = "".join(record(s, f"57.07 100\n{80 + k} 25") for s in MOLECULES for k in range(3))
    bad = {  # by the reason to skip it
        "without peaks": record("CCO", ""),
        "with peaks that are not numbers": record("CCO", "5 many"),
        "with fewer peaks than announced": record("CCO", "57 1", **{"Num Peaks": 3}),
        "without peaks in the range": record("CCO", "1500 7"),
        "without a SMILES": record(""),
        "in negative mode": record("CCO", Ion_mode="N"),
        "of another instrument": record("CCO", Instrument_type="LC-ESI-QTOF"),
        "with another precursor than [M+H]+": record("CCO", Precursor_type="[M+Na]+"),
        "that are not MS2": record("CCO", Spectrum_type="MS3"),
    }
    refused = record("C1CC(") + record("C1CC(", key="ABCDEFGHIJKLMN-UHFFFAOYSA-N")
    # Kept: without an InChIKey (taken from the SMILES), with a peak beyond the range, and without
    # what [M+H]+ implies.
    kept = record("OCC", key="") + record("CC(C)=O", "1100.5 7\n57.07 7")
    kept = kept.replace("Ion_mode: P\nNum", "Num").replace("Spectrum_type: MS2\n", "")
    path, new = tmp_path / "a.msp.gz", tmp_path / "new"
    path.write_bytes(gzip.compress((good + "".join(bad.values()) + refused + kept).encode()))
    prepare(new, path, **challenge_files(tmp_path, candidate_ids=("A", "B", "unknown")))
    assert [p.name for p in (new / "spectra").iterdir()] == ["spectra.npz"]
    records, test, train, challenges = capsys.readouterr().out.splitlines()[:4]
    assert f"{18 + 11 + 2} records, skipped" in records
    assert records.endswith("; 1 peaks beyond m/z 1100 left out")
    more = {"with an invalid SMILES": 2, "of the challenges' compounds": 4}
    assert all(count in records for count in written(dict.fromkeys(bad, 1) | more))
    assert train.endswith("spectra of 4 compounds") and test.endswith("spectra of 1 compounds")
    reasons = {"of an unknown id": 5, "of a compound listed before": 2, "with an invalid SMILES": 2}
    skipped = {f"candidates {reason}": n for reason, n in reasons.items()}
    assert challenges.startswith("2 challenges with 6 candidates of 15; skipped")
    assert all(count in challenges for count in written(skipped))
    arrays = spectra.read_spectra(new)
    assert len(arrays["train_rows"]) + len(arrays["test_rows"]) == 16  # 18 + 2 less ethanol's 4


MANY = [f"COMPOUND{k:06d}" for k in range(25)]


def compounds(names=MANY):
    """Compound k has k % 4 + 1 spectra, whose bins say whose they are, and the bit k.
    -> what read_compounds returns"""
    numbers = {name: MANY.index(name) for name in names}
    columns = {
        name: [
            (np.array([k, 100 + n], np.int16), np.array([1, 0.5], "f4")) for n in range(k % 4 + 1)
        ]
        for name, k in numbers.items()
    }
    return columns, {name: np.arange(spectra.BITS) == k for name, k in numbers.items()}


def save(root, arrays):
    data.save_npz(root / "spectra" / "spectra.npz", arrays)


def test_a_tenth_of_the_compounds_is_tested_with_all_spectra(tmp_path):
    save(tmp_path, spectra.split_compounds(*compounds()))
    dataset, arrays = data.load("spectra", tmp_path), spectra.read_spectra(tmp_path)
    train, test = set(arrays["train_compounds"]), set(arrays["test_compounds"])
    assert not train & test and train | test == set(MANY) and len(test) == 2  # round(2.5)
    for split, part in (dataset.train, train), (dataset.test, test):
        x, bits = split[torch.arange(len(split))]
        assert x.dtype == bits.dtype == torch.float32
        assert (x.shape[1], bits.shape[1]) == (11000, 2149)
        assert len(split.bases[1]) == len(part)  # fingerprints are held once per compound
        owner = bits.argmax(1)
        assert torch.equal(owner, x[:, :25].argmax(1)) and bits.sum(1).eq(1).all()
        for name in part:
            k = MANY.index(name)
            mine = x[owner == k]
            assert len(mine) == k % 4 + 1 and mine[:, 100:104].sum(0).count_nonzero() == len(mine)
            assert mine[:, k].eq(1).all() and mine.sum(1).eq(1.5).all()
    assert torch.equal(dataset.groups, dataset.train.rows[1])
    assert dataset.train.rows[1].diff().abs().max() > 1  # the spectra are in random order
    assert len(data.load("spectra", tmp_path, limit=12).groups) == 12
    assert spectra.load_challenges(tmp_path) is None


def test_the_split_depends_on_compounds_and_seed_alone():
    parts = []
    for names, seed in (MANY, 0), (MANY[::-1], 0), (MANY, 1), (MANY, 2):
        parts.append(spectra.split_compounds(*compounds(names), seed=seed)["test_compounds"])
    assert parts[0].tolist() == parts[1].tolist() and len({*map(tuple, parts)}) > 1


def test_bit_frequencies_are_over_training_spectra(tmp_path):
    save(tmp_path, spectra.split_compounds(*compounds()))
    dataset = data.load("spectra", tmp_path)
    bits = dataset.train[torch.arange(len(dataset.train))][1]
    assert torch.equal(spectra.bit_frequencies(dataset.train).float(), bits.mean(0))
    assert dataset.spec["frequencies"] == pytest.approx(bits.mean(0).tolist(), abs=5e-4)
    assert len({*dataset.spec["frequencies"]}) == 5  # by the number of spectra, 1 to 4, and 0


def test_a_fingerprint_is_hidden_in_all_spectra_of_its_compound(tmp_path):
    save(tmp_path, spectra.split_compounds(*compounds()))
    dataset = data.load("spectra", tmp_path)
    (_, pairs), (_, alone) = dataset.streams(paired=0.5, unpaired="spectrum")
    with_bits, without = (set(dataset.train.rows[1][index].tolist()) for index in (pairs, alone))
    assert len(pairs) + len(alone) == len(dataset.train) and not with_bits & without


def test_challenges_rank_the_true_compound_among_its_candidates(tmp_path):
    pytest.importorskip("rdkit")
    (tmp_path / "a.msp").write_text("".join(map(record, MOLECULES)))
    prepare(tmp_path, tmp_path / "a.msp", **challenge_files(tmp_path))
    challenges, arrays = spectra.load_challenges(tmp_path), spectra.read_spectra(tmp_path)
    assert challenges.ids == ["A", "B"] and challenges.offsets.tolist() == [0, 3, 6]
    assert challenges.truth.tolist() == [1, 1] and challenges.bits.shape == (6, 269)
    bits = np.unpackbits(challenges.bits, axis=1, count=2149).astype(bool)
    for row, smiles in enumerate(["CC(N)C(=O)O", "CCO", "c1ccccc1"] * 2):
        assert np.array_equal(bits[row], spectra.fingerprint(smiles))
    assert challenges.spectra[:].nonzero().tolist() == [[0, 570], [1, 570]]
    known = {*arrays["train_compounds"], *arrays["test_compounds"]}
    assert known == {key[:14] for s, key in MOLECULES.items() if s != "CCO"}


def test_challenges_that_cannot_be_ranked_are_skipped_and_counted(tmp_path, capsys):
    pytest.importorskip("rdkit")
    files = challenge_files(tmp_path, ids="ABCA", candidate_ids="ABD")
    text = files["candidates"].read_text().replace(f"B,{MOLECULES['CCO']}", "B,none")
    files["candidates"].write_text(text.replace("B,none,CCO", "B,none,CC"))
    other = files["mgf"].read_text()[::-1].replace("01 70.75", "01 70.85", 1)[::-1]
    files["mgf"].write_text(other)  # the second A has another peak than the first
    answers = dict.fromkeys("AB", MOLECULES["CCO"][:14])
    arrays = spectra.challenge_arrays(files["mgf"], files["candidates"], answers)
    assert arrays["challenge_ids"].tolist() == ["A"]
    assert arrays["challenge_columns"].tolist() == [570]
    report = capsys.readouterr().out
    for reason in (
        "1 spectra with a repeated TITLE",
        "1 spectra without a true molecule",
        "1 spectra without the true molecule among the candidates",
        "5 candidates of an unknown id",
    ):
        assert reason in report
    with pytest.raises(ValueError, match="1 spectra without candidates"):
        spectra.challenge_arrays(files["mgf"], files["candidates"], {"C": "x"})


@pytest.fixture
def source(tmp_path):
    """A folder with a.msp, the files of challenges, an empty file and a CSV without InChIKeys."""
    pytest.importorskip("rdkit")
    folder = tmp_path / "in"
    folder.mkdir()
    challenge_files(folder)
    (folder / "a.msp").write_text("".join(map(record, MOLECULES)))
    (folder / "empty").write_text("")
    (folder / "other.csv").write_text("id,smiles\nA,C\n")
    return folder


CHALLENGES = {"mgf": "c.mgf", "candidates": "candidates.csv", "truth": "truth.csv"}


@pytest.mark.parametrize(
    "match, changed",
    [
        ("6 of another instrument .* has LC-ESI-QFT", {"instrument": "LC-ESI-QTOF"}),
        ("absent.msp cannot be read", {"msp": "absent.msp"}),
        ("empty must have spectra of two compounds or more", {"msp": "empty"}),
        ("all three of --mgf, --candidates and --truth", {"mgf": "c.mgf"}),
        ("other.csv must have the columns .*'inchikey'", CHALLENGES | {"candidates": "other.csv"}),
        ("other.csv must have the columns .*'inchikey'", CHALLENGES | {"truth": "other.csv"}),
        ("no id of .*c.mgf .* skipped 15 candidates", CHALLENGES),
    ],
)
def test_files_without_usable_spectra_get_one_sentence(source, tmp_path, match, changed):
    if changed is CHALLENGES:
        challenge_files(source, candidate_ids="CDE")
    given = {"msp": "a.msp"} | changed
    files = {key: name if key == "instrument" else source / name for key, name in given.items()}
    with pytest.raises(ValueError, match=match) as error:
        prepare(tmp_path / "out", **files)
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_a_prepared_file_that_cannot_be_used_says_why(source, tmp_path):
    path = tmp_path / "spectra" / "spectra.npz"
    with pytest.raises(ValueError, match="make it with python data.py spectra"):
        data.load("spectra", tmp_path)
    prepare(tmp_path, source / "a.msp")
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ValueError, match="spectra.npz cannot be read"):
        spectra.load_challenges(tmp_path)


def test_massbank_is_downloaded_once_and_whole(source, tmp_path, monkeypatch, capsys):
    asked = []

    def urlretrieve(url, path):
        asked.append(url)
        path.write_text((source / "a.msp").read_text()[: 200 if len(asked) == 1 else None])
        if len(asked) == 1:
            raise urllib.error.ContentTooShortError("200 out of 1000 bytes", None)

    monkeypatch.setattr("urllib.request.urlretrieve", urlretrieve)
    with pytest.raises(ValueError, match="cannot be downloaded: .*200 out of.*MassBank_NIST.msp"):
        prepare(tmp_path)
    assert not list((tmp_path / "spectra").iterdir())
    for _ in range(2):
        prepare(tmp_path)
        assert f"{len(MOLECULES)} records, skipped none" in capsys.readouterr().out
    assert asked == 2 * [spectra.MASSBANK]
