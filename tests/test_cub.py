"""CUB's files: photos and captions in two layouts, features and where they are kept."""

import os
import re
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import models
from torchvision.datasets.utils import calculate_md5

import data
import nets
from helpers import Pooled, archive, originals, packed_originals, shi
from loaders import cub


def own_features(folder, x=None, **more):
    """An .npz with features of the six photos. -> its path"""
    x = np.arange(12.0).reshape(6, 2) ** 2 if x is None else x
    np.savez(folder / "own.npz", x=x, **more)
    return folder / "own.npz"


# ----------------------------------------------------------------------------------------- captions


def test_captions_are_32_tokens_of_words_seen_four_times():
    tokens = ["the", "bird", "'s", "red-eyed", ",", "3", "inches", "!"]
    assert cub.tokenize("The bird's red-eyed, 3 inches!") == tokens
    words = cub.vocabulary([["red", "bird"]] * 3 + [["bird", "owl"]] * 4)
    assert words == ["<exc>", "<pad>", "<eos>", "bird", "owl"]  # red: three times only
    assert words[nets.PAD] == "<pad>"
    x = cub.encode_captions([["red", "bird"], ["owl"] * 40, ["bird"] * 31], words)
    assert x.dtype == torch.int64 and x.shape == (3, 32)
    assert x[0].tolist() == [0, 3, 2] + [1] * 29
    assert x[1].tolist() == [4] * 31 + [2]
    assert x[2].tolist() == [3] * 31 + [2]


@pytest.mark.parametrize("layout", [shi, originals])
def test_each_photo_has_its_ten_captions_in_both_layouts(tmp_path, layout):
    folder = layout(tmp_path)
    x = np.arange(18.0).reshape(6, 3)
    cub.write_features(tmp_path, features=own_features(tmp_path, x))
    dataset = data.load("cub", tmp_path)
    assert dataset.names == ("image", "caption") and not dataset.views
    assert (len(dataset.train), len(dataset.test)) == (40, 20)
    assert dataset.spec == {"name": "cub", "vocabulary": len(dataset.words), "features": 3}
    for split, photos in (dataset.train, 4), (dataset.test, 2):
        assert split.bases[0].shape == (photos, 3)
        assert split.rows[0].tolist() == [row // 10 for row in range(10 * photos)]
    names = [p.relative_to(folder).as_posix() for p in cub.cub_photos(tmp_path)["train"]]
    assert names == sorted(names) and len(names) == 4
    caption = dataset.train[torch.arange(40)][1]
    assert caption.shape == (40, 32)
    if layout is originals:  # its captions name the photo they belong to
        text = [dataset.words[token] for token in caption[10]]
        assert text[:6] == ["001", ".", "albatross", "1", "this", "bird"]


def test_the_vocabulary_is_that_of_the_training_captions(tmp_path):
    folder = shi(tmp_path)
    path = folder / "text_testclasses.txt"
    path.write_text(path.read_text().replace("small", "blue\v"))  # \v does not end a line
    cub.write_features(tmp_path, features=own_features(tmp_path))
    dataset = data.load("cub", tmp_path)
    assert "small" in dataset.words and "blue" not in dataset.words
    assert (dataset.test.bases[1] == 0).any(1).sum() == 10  # <exc>


# ------------------------------------------------------------------------------------------- photos


def test_features_are_those_of_each_cropped_and_normalised_photo(
    tmp_path, small_net, monkeypatch, capsys
):
    monkeypatch.setattr(cub.extract, "__defaults__", (3,))  # photos of a batch
    folder = shi(tmp_path)
    bad = folder / "train" / "001.Albatross" / "1.jpg"
    bad.write_bytes(bad.read_bytes()[:300])
    (bad.parent / "._0.jpg").write_bytes(b"macOS's, no photo")
    lines = [f"caption {i // 10}" for i in range(40)]
    (folder / "text_trainvalclasses.txt").write_text("\n".join(lines))
    data.main(["cub", "--data", str(tmp_path)])
    assert "left out with its captions: train/001.Albatross/1.jpg" in capsys.readouterr().out
    dataset = data.load("cub", tmp_path)
    assert len(dataset.train.bases[0]) == 3 and len(dataset.train) == 30
    assert dataset.note == "unreadable photos left out: 1"
    texts = {dataset.words[caption[1]] for caption in dataset.train.bases[1]}
    assert texts == {"0", "2", "3"}
    names = ["001.Albatross/0.jpg", "002.Ani/0.jpg", "002.Ani/1.jpg"]
    paths = cub.cub_photos(tmp_path)
    assert [path.relative_to(folder / "train").as_posix() for path in paths["train"]] == names
    for part, split in ("train", dataset.train), ("test", dataset.test):
        for path, x in zip(paths[part], split.bases[0], strict=True):
            assert torch.allclose(x, pooled(path), atol=1e-5)
    os.remove(folder / "features.npz")
    data.main(["cub", "--data", str(tmp_path), "--no-normalise"])
    dataset = data.load("cub", tmp_path)
    assert "without ImageNet normalisation" in dataset.note
    assert torch.allclose(dataset.test.bases[0][0], pooled(paths["test"][0], 0, 1), atol=1e-5)
    with pytest.raises(ValueError, match="features.npz was made from ResNet-101"):
        cub.write_features(tmp_path)


def pooled(path, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)):
    """What the small network makes of a photo, as ImageNet's networks are shown it."""
    with Image.open(path) as image:
        width, height = image.size
        size = 224 * width // height, 224
        image = image.convert("RGB").resize(size, Image.Resampling.BILINEAR)
    left = round((size[0] - 224) / 2)
    x = np.asarray(image)[:, left : left + 224] / 255
    x = torch.from_numpy((x - mean) / std).permute(2, 0, 1)[None].float()
    return Pooled().eval()(x)[0].detach()


def test_the_network_is_imagenet_s_without_its_last_layer(monkeypatch):
    asked = []

    def small(weights):
        asked.append(weights)
        return models.resnet18()

    monkeypatch.setattr(cub.models, "resnet101", small)
    net = cub.resnet()
    assert asked == ["IMAGENET1K_V1"] and not net.training
    assert net(torch.rand(1, 3, 64, 64)).shape == (1, 512)


def test_features_and_captions_are_read_once(tmp_path, monkeypatch):
    folder, opened = shi(tmp_path), []
    cub.write_features(tmp_path, features=own_features(tmp_path))
    read_npz, read_lines = data.read_npz, cub.read_lines
    monkeypatch.setattr(
        data, "read_npz", lambda path, *a: opened.append(path) or read_npz(path, *a)
    )
    monkeypatch.setattr(cub, "read_lines", lambda path: opened.append(path) or read_lines(path))
    data.load("cub", tmp_path)
    names = "features.npz", "text_trainvalclasses.txt", "text_testclasses.txt"
    assert opened == [folder / name for name in names]


# -------------------------------------------------------------------------------- a user's features


@pytest.mark.parametrize("layout", [shi, originals])
def test_cub_takes_a_user_s_own_features_of_any_width(layout, tmp_path, capsys):
    folder, rng = layout(tmp_path), np.random.default_rng(0)
    files = cub.list_photos(folder, "train") + cub.list_photos(folder, "test")
    x = rng.normal(size=(6, 5)).astype(np.float16) * 100 + 30
    path = own_features(tmp_path, x)
    command = ["cub", "--data", str(tmp_path), "--features", str(path)]
    data.main(command)
    assert "5 features per photo, from own.npz (MD5 " in capsys.readouterr().out
    dataset = data.load("cub", tmp_path)
    wide = x.astype(np.float64)
    expected = (wide - wide[:4].mean(0)) / wide[:4].std(0)  # of the training photos
    assert np.allclose(dataset.train.bases[0], expected[:4], atol=1e-5)
    assert np.allclose(dataset.test.bases[0], expected[4:], atol=1e-5)
    assert nets.modalities(**dataset.spec)[0].shape == (5,)
    assert dataset.note.endswith(f"{calculate_md5(path)[:8]}), standardised")
    data.main(command)  # the same again
    order = rng.permutation(6)  # named, they may be in any order, and in another folder
    names = np.array(["elsewhere/" + "/".join(Path(files[k]).parts[-2:]) for k in order])
    own_features(tmp_path, x[order], files=names)
    with pytest.raises(SystemExit):
        data.main(command)
    error = capsys.readouterr().err
    assert "features.npz was made from own.npz (MD5" in error and "delete it" in error
    os.remove(folder / "features.npz")
    data.main(command)
    assert torch.equal(data.load("cub", tmp_path).train.bases[0], dataset.train.bases[0])


@pytest.mark.parametrize(
    "arrays, error",
    [
        ({"y": np.ones((6, 2))}, "no array 'x'"),
        ({"x": np.ones(6)}, "x must be numeric .photos, features."),
        ({"x": np.ones((5, 2))}, "features of the 6 photos, not of 5, or their names"),
        ({"x": np.ones((6, 2)), "files": np.array(["a/b.jpg"] * 6)}, "no features of 6 of the 6"),
        ({"x": np.ones((6, 2)), "files": np.arange(6)}, "a name for each of the 6 rows"),
        ({"x": np.full((6, 2), np.nan)}, "x must be finite"),
    ],
)
def test_features_that_do_not_fit_the_photos_are_refused(arrays, error, tmp_path, capsys):
    shi(tmp_path)
    np.savez(tmp_path / "own.npz", **arrays)
    with pytest.raises(SystemExit) as stopped:
        data.main(["cub", "--data", str(tmp_path), "--features", str(tmp_path / "own.npz")])
    assert stopped.value.code == 2
    assert re.search(error, capsys.readouterr().err.splitlines()[-1])
    assert not (tmp_path / "cub" / "features.npz").exists()


# ------------------------------------------------------------------------------ what cannot be read


def holds(name, text):
    return lambda folder: (folder / name).write_text(text)


def lacks(name):
    return lambda folder: (folder / name).unlink()


DRIVE = ["0B0ywwgffWnLLZW9uVHNjb2JmNlE", "0-8y2UVmBHAlG26HafWYNoFQ"]  # where captions are
TRAIN, NINE, OTHERS = "text_trainvalclasses.txt", "a bird\n" * 9, "003.Auklet\n004.Crow\n"


@pytest.mark.parametrize(
    "layout, spoil, words",
    [
        (shi, lacks("text_testclasses.txt"), ["text_testclasses.txt cannot be read"]),
        (shi, holds(TRAIN, "a bird\n" * 39), [TRAIN, "40 lines for 4 photos, not 39"]),
        (shi, holds("features.npz", "PK\x03\x04 and no more"), ["features.npz cannot be read"]),
        (originals, holds("text_c10/002.Ani/1.txt", NINE), ["1.txt must have ten", "not 9"]),
        (originals, lacks("text_c10/002.Ani/1.txt"), ["1.txt cannot be read"]),
        (originals, lacks("testclasses.txt"), ["testclasses.txt cannot be read"]),
        (originals, holds("testclasses.txt", OTHERS), ["004.Crow"]),
        (lambda root: (root / "cub").mkdir(), lambda at: None, DRIVE),
    ],
)
def test_bad_folders_get_one_sentence(tmp_path, small_net, layout, spoil, words):
    spoil(layout(tmp_path))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError) as error:
        cub.write_features(tmp_path)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_missing_weights_get_one_sentence(tmp_path, monkeypatch):
    shi(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    for name in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with pytest.raises(ValueError, match="another network with --features") as error:
        cub.write_features(tmp_path)
    assert str(tmp_path / "home" / "hub" / "checkpoints") in str(error.value)
    assert not (tmp_path / "cub" / "features.npz").exists()


def test_archives_are_downloaded_checked_and_unpacked(tmp_path, small_net, monkeypatch):
    source, folder, photos = packed_originals(tmp_path), tmp_path / "cub", tmp_path / "photos.tgz"
    folder.mkdir()
    archive(folder / "cvpr2016_cub.tar.gz", source / "cvpr2016_cub")
    archive(photos, source / "CUB_200_2011")
    monkeypatch.setattr(cub, "CUB_PHOTOS", photos.as_uri())
    retrieve = "torchvision.datasets.utils._urlretrieve"  # the one that shows progress by HTTP
    monkeypatch.setattr(retrieve, lambda url, path: urllib.request.urlretrieve(url, path))
    with pytest.raises(ValueError, match="orrupted"):
        cub.write_features(tmp_path)
    monkeypatch.setattr(cub, "CUB_MD5", calculate_md5(photos))
    (folder / "CUB_200_2011.tgz").write_bytes(photos.read_bytes()[:-9])  # it is fetched again
    dataset = data.load("cub", tmp_path)  # as if the data set was prepared
    assert [len(split.bases[0]) for split in (dataset.train, dataset.test)] == [4, 2]
    names = {"CUB_200_2011", "CUB_200_2011.tgz", "cvpr2016_cub", "cvpr2016_cub.tar.gz"}
    assert {p.name for p in folder.iterdir()} == names | {"features.npz"}


@pytest.mark.parametrize("spoiled", ["truncated", "another"])
def test_a_bad_archive_leaves_no_folder(spoiled, tmp_path):
    source, folder = packed_originals(tmp_path), tmp_path / "cub"
    folder.mkdir()
    path = folder / "cvpr2016_cub.tar.gz"
    if spoiled == "truncated":
        archive(path, source / "cvpr2016_cub")
        path.write_bytes(path.read_bytes()[:-100])
    else:
        archive(path, source / "CUB_200_2011")
    with pytest.raises(ValueError, match="cvpr2016_cub.tar.gz (cannot be read|must hold)"):
        data.load("cub", tmp_path)
    assert list(folder.iterdir()) == [path]
