"""Spectra: their files, preparation and split; scores of bits, ranks of candidates."""

import gzip
import sys
import types
import urllib.error

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributions import Normal

import data
import eval as evaluation
import nets
from benchmarks import drawing, spectra
from helpers import MOLECULES, challenge_files, record


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
    text = "# made up\n\nBEGIN IONS\nTITLE=one=1\nCHARGE=1+\n50.5 3\n60 4\nEND IONS\n"
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
    for bad in (None, "", "lfqscwfljhtthz-A", "LFQSCWFLJHTTHZZ"):
        assert spectra.compound_of(bad, "CCO") == "LFQSCWFLJHTTHZ"
    assert spectra.compound_of("", "C1CC(") == ""


# ---------------------------------------------------------------------------------------- preparing


def test_without_rdkit_the_error_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "rdkit", None)
    with pytest.raises(ValueError, match="pip install rdkit"):
        spectra.prepare_spectra(tmp_path, tmp_path / "a.msp")
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


def test_spectra_are_split_by_compound_and_skipped_ones_counted(tmp_path, capsys):
    pytest.importorskip("rdkit")
    good = "".join(record(s, f"57.07 100\n{80 + k} 25") for s in MOLECULES for k in range(3))
    bad = {  # by the reason to skip it
        "without peaks": record("CCO", ""),
        "with peaks that are no numbers": record("CCO", "5 many"),
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
    files = challenge_files(tmp_path, candidate_ids=("A", "B", "unknown"))
    counts = spectra.prepare_spectra(new, path, **files)
    assert [p.name for p in (new / "spectra").iterdir()] == ["spectra.npz"]
    assert counts["records"] == 18 + 11 + 2 and counts["peaks_beyond_range"] == 1
    more = {"with an invalid SMILES": 2, "of the challenges' compounds": 4}
    assert counts["skipped"] == dict.fromkeys(bad, 1) | more  # 4: ethanol, once without its key
    assert counts["compounds"] == 5 and counts["removed_compounds"] == 1
    assert counts["train"] + counts["test"] == 16 and counts["challenges"] == 2
    reasons = ("of an unknown id", "of a compound listed before", "with an invalid SMILES")
    skipped = dict(zip((f"candidates {reason}" for reason in reasons), (5, 2, 2)))
    assert counts["challenges_skipped"] == skipped
    assert "skipped 4 of the challenges' compounds" in capsys.readouterr().out

    dataset, arrays = data.load("spectra", new), spectra.read_spectra(new)
    train, test = set(arrays["train_compounds"]), set(arrays["test_compounds"])
    assert not train & test and len(test) == 1  # max(1, a tenth)
    assert train | test == {key[:14] for s, key in MOLECULES.items() if s != "CCO"}
    assert len(dataset.train.bases[1]) == 4  # fingerprints are held once per compound
    x, fingerprints = dataset.train[torch.arange(len(dataset.train))]
    assert x.shape == (counts["train"], 11000) and x.dtype == torch.float32
    assert x.amax(1).eq(1).all() and x[:, 570].eq(1).all()
    expected = {spectra.fingerprint(s).tobytes() for s in MOLECULES}
    assert {bits.numpy().astype(bool).tobytes() for bits in fingerprints} < expected

    # The decoder of bits starts at their frequencies over the spectra, not over the compounds
    start = nets.modalities(**dataset.spec, width=0.001)[1].decoder(2).net[-1].bias
    frequency = fingerprints.mean(0).clamp(1e-3, 1 - 1e-3)
    torch.testing.assert_close(torch.sigmoid(start), frequency, atol=5e-4, rtol=0)

    challenges = spectra.load_challenges(new)
    assert challenges.ids == ["A", "B"] and challenges.offsets.tolist() == [0, 3, 6]
    assert challenges.truth.tolist() == [1, 1] and challenges.bits.shape == (6, 269)
    bits = np.unpackbits(challenges.bits, axis=1, count=2149).astype(bool)
    assert np.array_equal(bits[4], spectra.fingerprint("CCO"))
    assert challenges.spectra[:].nonzero().tolist() == [[0, 570], [1, 570]]
    undecided = Lookup(torch.full((571, 2149), 0.5))
    found = evaluation.evaluate(undecided, dataset, {}, root=new)
    assert found["sizes"] == {"A": 3, "B": 3} and found["ranks"] == {"A": 2, "B": 2}


def test_the_split_depends_on_compounds_and_seed_alone(tmp_path):
    pytest.importorskip("rdkit")
    records, held_out = [record(s) for s in MOLECULES], []
    for order, seed in (records, 0), (records[::-1] + records, 0), (records, 1), (records, 2):
        (tmp_path / "a.msp").write_text("".join(order))
        spectra.prepare_spectra(tmp_path, tmp_path / "a.msp", seed=seed)
        held_out.append(spectra.read_spectra(tmp_path)["test_compounds"].tolist())
    assert held_out[0] == held_out[1] and len({*map(tuple, held_out)}) > 1
    assert spectra.load_challenges(tmp_path) is None


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
        spectra.prepare_spectra(tmp_path / "out", **files)
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_a_prepared_file_that_cannot_be_used_says_why(source, tmp_path):
    path = tmp_path / "spectra" / "spectra.npz"
    with pytest.raises(ValueError, match="make it with python data.py spectra"):
        data.load("spectra", tmp_path)
    path.parent.mkdir()
    np.savez(path, version=0)
    with pytest.raises(ValueError, match="spectra.npz must have version 1, not 0"):
        data.load("spectra", tmp_path)
    spectra.prepare_spectra(tmp_path, source / "a.msp")
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ValueError, match="spectra.npz cannot be read"):
        spectra.load_challenges(tmp_path)


def test_massbank_is_downloaded_once_and_whole(source, tmp_path, monkeypatch):
    asked = []

    def urlretrieve(url, path):
        asked.append(url)
        path.write_text((source / "a.msp").read_text()[: 200 if len(asked) == 1 else None])
        if len(asked) == 1:
            raise urllib.error.ContentTooShortError("200 out of 1000 bytes", None)

    monkeypatch.setattr("urllib.request.urlretrieve", urlretrieve)
    with pytest.raises(ValueError, match="cannot be downloaded: .*200 out of.*MassBank_NIST.msp"):
        spectra.prepare_spectra(tmp_path)
    assert not list((tmp_path / "spectra").iterdir())
    for _ in range(2):
        assert spectra.prepare_spectra(tmp_path)["records"] == len(MOLECULES)
    assert asked == 2 * [spectra.MASSBANK]


# ------------------------------------------------------------------------------------------ ranking


def test_cross_entropy_and_tanimoto_equal_their_formulas():
    generator = np.random.default_rng(0)
    p, bits = generator.random(21), generator.random((5, 21)) < 0.5
    found = spectra.bit_cross_entropy(p.astype("f4"), np.packbits(bits, axis=1), block=2)
    assert found == pytest.approx(-np.log(np.where(bits, p, 1 - p)).sum(1), rel=1e-5)
    assert found.dtype == np.float64
    certain = spectra.bit_cross_entropy(np.ones(3), np.packbits([[1, 1, 0]], axis=1))
    assert certain == pytest.approx(-np.log(spectra.CERTAIN), abs=1e-3)
    a, b = np.array([[[1, 1, 0], [0, 0, 0], [1, 0, 0]], [[1, 0, 1], [0, 0, 0], [0, 1, 0]]], bool)
    assert spectra.tanimoto(a, b) == pytest.approx([1 / 3, 1, 0])
    assert spectra.tanimoto(a[2:], a[2:]) == 1


def test_a_wrong_bit_costs_at_most_9_nats():
    found = spectra.bit_cross_entropy(np.array([1.0, 0.0, 1.0]), np.packbits([[1, 1, 0]], axis=1))
    # one bit is right, two are wrong, each with probability 1 - 1e-4
    assert found == pytest.approx([-np.log(1 - 1e-4) - 2 * np.log(1e-4)])
    one = spectra.bit_scores(np.array([[1.0, 0.0]]), np.array([[True, True]]))
    assert one["cross_entropy"] == pytest.approx(-np.log(1 - 1e-4) - np.log(1e-4))


def test_bits_are_scored_by_accuracy_tanimoto_and_cross_entropy():
    p = np.array([[0.9, 0.2, 0.5, 0.6], [0.7, 0.1, 0.8, 0.3], [0.1, 0.1, 0.1, 0.4]])
    bits = np.array([[1, 0, 1, 0], [1, 0, 1, 1], [0, 0, 0, 0]], bool)
    found = spectra.bit_scores(p, bits)  # predicts 1001, 1010, 0000: p = 1/2 is a 0
    assert found["accuracy"] == pytest.approx((2 + 3 + 4) / 12)
    assert found["tanimoto"] == pytest.approx((1 / 3 + 2 / 3 + 1) / 3)
    nats = [0.9 * 0.8 * 0.5 * 0.4, 0.7 * 0.9 * 0.8 * 0.3, 0.9 * 0.9 * 0.9 * 0.6]
    assert found["cross_entropy"] == pytest.approx(-np.log(nats).mean())


def test_equal_scores_have_their_mean_rank():
    scores = np.array([3.0, 1.0, 3.0, 2.0, 3.0])
    assert [spectra.rank_of(scores, k) for k in range(5)] == [4, 1, 4, 2, 4]
    assert spectra.rank_of(np.zeros(10), 7) == 5.5
    near = np.array([0, 1.5e-9, 0.7e-9])  # up to 1e-9 apart they are equal
    assert [spectra.rank_of(near, k) for k in range(3)] == [1.5, 2.5, 2]


def test_a_challenge_is_ranked_among_its_own_candidates():
    bits = np.random.default_rng(0).random((9, 16)) < 0.5
    offsets, truth, p = np.array([0, 2, 6, 9]), np.array([1, 0, 2]), np.full((3, 16), 0.5)
    packed = np.packbits(bits, axis=1)
    challenges = spectra.Challenges(["a", "b", "c"], None, truth, offsets, packed)
    p[1] = bits[2]  # the true one of the second challenge
    p[2] = 1 - bits[8]  # all but the true one of the third
    assert spectra.challenge_ranks(p, challenges).tolist() == [1.5, 1, 3]


def test_random_top_k_is_the_mean_over_random_orders():
    sizes, ks = np.array([3, 10, 200]), [1, 5, 20]
    expected = [np.mean([min(k / n, 1) for n in sizes]) for k in ks]
    assert spectra.random_top_k(sizes, ks) == pytest.approx(expected)
    assert spectra.random_top_k(sizes, [200]) == [1]
    assert spectra.top_k([1, 5, 5.5, 21], [1, 5, 20]) == pytest.approx([1 / 4, 1 / 2, 3 / 4])
    sizes, tops = np.array([1, 2, 7, 14]), {"top1": 1, "top5": 5, "top10": 10, "top20": 20}
    found = spectra.tops(spectra.random_top_k, sizes, 3)
    assert list(found) == [*tops, "median"] and found["median"] == 3
    for key, k in tops.items():
        assert found[key] == pytest.approx(np.mean([min(k / n, 1) for n in sizes]))


class Lookup(nn.Module):
    """A model with Bernoulli bits: z is the first bin of the spectrum, plus noise, and decodes to
    the logits of row z of `answers` (n, 2149), probabilities."""

    def __init__(self, answers, noise=0.0):
        super().__init__()
        self.answers = nn.Parameter(answers)
        self.modalities = [types.SimpleNamespace(likelihood="bernoulli") for _ in range(2)]
        self.decoders = [None, lambda z: torch.logit(self.answers[z[..., 0].round().long()])]
        self.noise = noise

    def posterior(self, x, missing):
        assert missing is None and not self.training
        return Normal(x.argmax(1, keepdim=True).float(), self.noise + 1e-6)


def spectra_to_name(n=4, candidates=30):
    """Spectrum i has its one peak in bin i; fingerprints are random. -> Dataset, Challenges,
    fingerprints (n, 2149)"""
    generator, bins = np.random.default_rng(0), spectra.BINS
    x = sparse_of(np.eye(n, bins, dtype=np.float32))
    bits = torch.from_numpy(generator.random((n, spectra.BITS)) < 0.1)
    names, split = ("spectrum", "fingerprint"), data.Split([x, bits])
    dataset = data.Dataset("spectra", split, split, {"name": "spectra"}, names)
    lists = generator.random((n, candidates, spectra.BITS)) < 0.1
    lists[:, 3] = bits
    packed = np.packbits(lists.reshape(-1, spectra.BITS), axis=1)
    offsets, truth = np.arange(n + 1) * candidates, np.full(n, 3)
    ids = [f"c{i}" for i in range(n)]
    return dataset, spectra.Challenges(ids, x, truth, offsets, packed), bits.float()


def test_scores_compare_predicted_bits_with_their_training_frequencies():
    dataset, challenges, bits = spectra_to_name()
    rows = torch.tensor([0, 0, 0, 1, 2])  # of the training examples; no spectrum of the fourth
    spectrum, fingerprint = dataset.train.bases
    train = data.Split([spectrum, fingerprint], [torch.zeros(5).long(), rows])
    shown = torch.tensor([2, 1, 3])
    test = data.Split([spectrum, fingerprint[shown]], [shown, torch.arange(3)])
    dataset, p = dataset._replace(train=train, test=test), 0.2 + 0.6 * torch.rand(4, 2149)
    challenges = challenges._replace(truth=np.array([3, 3, 3, 7]))
    model = Lookup(p)
    model.train()
    found = spectra.scores(model, dataset, challenges, samples=2, batch_size=2)
    assert not model.training
    p, bits = p.numpy(), bits.numpy() > 0.5
    frequency = bits[[0, 0, 0, 1, 2]].mean(0)
    assert found["bits"] == pytest.approx(spectra.bit_scores(p[[2, 1, 3]], bits[[2, 1, 3]]))
    often = np.tile(frequency, (4, 1))
    expected = spectra.bit_scores(often[:3], bits[[2, 1, 3]])
    assert found["frequency"]["bits"] == pytest.approx(expected)
    for part, predicted in (found, p), (found["frequency"], often):
        ranks = spectra.challenge_ranks(predicted, challenges)
        assert list(part["ranks"].items()) == list(zip(challenges.ids, ranks))
        assert part["rank"]["median"] == np.median(ranks)
        assert part["rank"]["top1"] == (ranks <= 1).mean()
        assert part["rank"]["top5"] == (ranks <= 5).mean()
    assert len({*found["ranks"].values()}) > 1
    assert found == spectra.scores(model, dataset, challenges, samples=2)  # for any batch
    noisy = Lookup(torch.rand(9, 2149), noise=0.3)
    found = spectra.scores(noisy, dataset)
    assert found == spectra.scores(noisy, dataset, seed=0) != spectra.scores(noisy, dataset, seed=1)


@pytest.mark.parametrize(
    "sizes, median",  # the k at which this reaches .5: Σ_i min(k / n_i, 1) / 4
    [((10, 10, 40, 60), 9), ((2, 30, 30, 58), 12), ((1, 1, 1, 1), 1), ((2, 2, 2, 2), 1)],
)
def test_random_ranks_follow_from_the_numbers_of_candidates(sizes, median):
    dataset, challenges, bits = spectra_to_name()
    offsets = np.cumsum([0, *sizes])
    challenges = challenges._replace(offsets=offsets, truth=np.array([0] * 4))
    found = spectra.scores(Lookup(bits), dataset, challenges, samples=1)
    assert found["sizes"] == dict(zip(challenges.ids, sizes))
    assert found["random"]["rank"]["median"] == median
    top_5 = np.mean([min(5 / n, 1) for n in sizes])
    assert found["random"]["rank"]["top5"] == pytest.approx(top_5)


def test_evaluation_takes_twenty_samples_and_the_challenges_in_root(monkeypatch):
    asked = []
    monkeypatch.setattr(spectra, "load_challenges", lambda root: f"of {root}")
    monkeypatch.setattr(spectra, "scores", lambda *xs, **options: asked.append((xs, options)))
    spectra.evaluate("model", "dataset", "there", 7)
    spectra.evaluate("model", "dataset")
    assert asked == [
        (("model", "dataset", "of there"), {"seed": 7}),
        (("model", "dataset", "of ./data"), {"seed": 0}),
    ]
    monkeypatch.undo()
    dataset, challenges, bits = spectra_to_name(n=3)
    model, shapes = Lookup(bits), []
    decode = model.decoders[1]
    model.decoders[1] = lambda z: shapes.append(z.shape[:2]) or decode(z)
    spectra.scores(model, dataset, challenges)
    assert shapes == [(20, 3)] * 2  # samples of the test split, samples of the challenges
    spectra.predict_bits(model, lambda index: dataset.test.take(0, index), 3)
    assert shapes[2:] == [(1, 3)]


def test_a_model_that_knows_the_fingerprints_ranks_first():
    dataset, challenges, bits = spectra_to_name()
    known = Lookup(bits)
    found = spectra.scores(known, dataset, challenges, batch_size=3)
    assert found["rank"] == {"top1": 1, "top5": 1, "top10": 1, "top20": 1, "median": 1}
    assert found["bits"]["accuracy"] == 1 and found["bits"]["tanimoto"] == 1
    assert found["bits"]["cross_entropy"] == pytest.approx(2149e-4, rel=1e-2)
    assert found["ranks"] == {f"c{i}": 1 for i in range(4)} and set(found["sizes"].values()) == {30}
    random = {"top1": 1 / 30, "top5": 5 / 30, "top10": 1 / 3, "top20": 2 / 3, "median": 15}
    assert found["random"]["rank"] == pytest.approx(random)
    constant = spectra.scores(Lookup(bits.mean(0).expand(4, -1)), dataset, challenges)
    for key in ("rank", "ranks", "bits"):
        assert constant[key] == pytest.approx(found["frequency"][key], rel=1e-4)
    half = spectra.scores(Lookup(torch.full_like(bits, 0.5)), dataset, challenges)
    assert half["rank"]["median"] == 15.5  # all equal: everyone has the mean rank
    assert half["bits"]["cross_entropy"] == pytest.approx(2149 * np.log(2))


def test_probabilities_are_averaged_over_samples_not_logits():
    dataset, challenges, bits = spectra_to_name()
    model = Lookup(bits.mean(0).expand(4, -1).contiguous())
    one, many = (spectra.scores(model, dataset, samples=samples) for samples in (1, 50))
    assert many["bits"] == pytest.approx(one["bits"]) and "rank" not in one
    torch.manual_seed(0)
    p = 0.01 + 0.98 * torch.cat([bits, bits.flip(0)])[:, :8]
    noisy, index, z = Lookup(p, noise=0.7).eval(), torch.tensor([1]), Normal(1.0, 0.7)
    found = spectra.predict_bits(noisy, lambda i: dataset.test.take(0, index), 1, samples=999)
    edges = z.cdf(torch.arange(9) - 0.5)
    weights = edges.diff()[:4]  # P(z is rounded to k); -1 is the last row, as Python has it
    below = z.cdf(torch.tensor(-0.5)) * p[-1]
    expected, logits = weights @ p[:4] + below, weights @ torch.logit(p[:4])
    assert found[0] == pytest.approx(expected.numpy(), abs=0.04)
    assert (expected - torch.sigmoid(logits)).abs().max() > 0.15  # what the other mean would give


@pytest.fixture
def axes(monkeypatch):
    """The axes of the last figure, instead of its file."""
    pytest.importorskip("matplotlib")
    drawn = []
    monkeypatch.setattr(drawing, "finish", lambda figure, *_, **__: drawn.append(figure.axes))
    yield drawn
    drawing.pyplot().close("all")


def test_the_figure_has_spectra_bits_and_predictions(axes, tmp_path):
    dataset, _, bits = spectra_to_name()
    args = dict(model="SVAE", dataset="spectra", paired=1)
    run = evaluation.Run(tmp_path, args, 0, 0.0, Lookup(bits).eval())
    spectra.draw(run, dataset, tmp_path, tmp_path / "spectra.png", n=2)
    left, right = axes[0][:2]
    assert left.collections[0].get_segments()[0][:, 0].tolist() == [0.05, 0.05]  # the first bin
    assert right.get_title(loc="right") == "Tanimoto 1.00"
    molecule, predicted = right.collections
    assert len(molecule.get_segments()) == bits[0].sum() and len(predicted.get_segments()) == 2149


def test_top_k_curves_are_means_over_seeds(axes, tmp_path):
    def result(model, seed, ranks):
        run = dict(model=model, dataset="spectra", paired=1, unpaired="all", seed=seed, options={})
        ranks, frequency = dict(zip("ab", ranks)), {"ranks": {"a": 9, "b": 9}}
        sizes = {"a": 9, "b": 9}
        return dict(run=run, epoch=1, ranks=ranks, frequency=frequency, sizes=sizes, folder="")

    results = [result("SVAE", 0, (1, 1)), result("SVAE", 1, (1, 3)), result("MVAE", 0, (2, 4))]
    spectra.compare(results, tmp_path)
    lines = {line.get_label(): line for line in axes[0][0].lines}
    assert list(lines) == ["SVAE, f = 1", "MVAE, f = 1", "bit frequencies", "random order"]
    assert lines["SVAE, f = 1"].get_ydata().tolist() == [0.75, 0.75, *[1] * 7]
    assert lines["MVAE, f = 1"].get_ydata().tolist() == [0, 0.5, 0.5, *[1] * 6]
    for model in ("SVAE", "MVAE"):
        assert lines[f"{model}, f = 1"].get_color() == drawing.COLOURS[model]
    assert lines["bit frequencies"].get_ydata().tolist() == [*[0] * 8, 1]
    assert lines["random order"].get_ydata().tolist() == [k / 9 for k in range(1, 10)]
