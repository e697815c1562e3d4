"""Folders of images: classes, parts, links, what is passed over and what is said of it."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from fastmp import data
from fastmp.data import DataError, folders
from tests.data.image_cases import Image, picture, write

JUNK = [
    ".ipynb_checkpoints/000-checkpoint.png", "__MACOSX/cat/._000.png", "cat/._000.png", ".DS_Store",
    "cat/Thumbs.db", "dog/desktop.ini", "@eaDir/000.png/SYNOPHOTO_THUMB_M.jpg",
    "cat/.thumbnails/000.png", "dog/notes.txt", "labels.csv",
]  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path, ("train", "val"))


def everything(source):
    return source.batch(range(len(source)))[0]


def test_the_results_of_runs_are_no_class(tmp_path, monkeypatch):
    """``fastmp train --data .`` writes into ./runs, and is called again."""
    for name in ("cat", "dog", "runs/first", "dog/runs/second"):
        (tmp_path / name).mkdir(parents=True)
        for i in range(3):
            picture(i).save(tmp_path / name / f"{i}.png")
    (tmp_path / "runs/first/metrics.jsonl").write_text("")
    (tmp_path / "dog/runs/second/metrics.jsonl").write_text("")
    monkeypatch.chdir(tmp_path)
    dataset = data.load(".", warn=False)
    assert dataset.classes == ("cat", "dog")
    assert len(dataset.train) + len(dataset.test) == 6
    assert dataset.notes[:2] == (
        "passed over in .: results of runs: 2 (dog/runs/second, runs/first)",
        "no classes, since without images in .: runs",
    )


def test_what_systems_leave_behind_is_no_class_and_no_error(folder):
    clean = data.load(str(folder))
    for name in JUNK:
        path = folder / "train" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"\x00\x05\x16\x07")  # AppleDouble
    dataset = data.load(str(folder), warn=False)
    assert dataset.classes == ("cat", "dog")
    assert torch.equal(everything(dataset.train), everything(clean.train))
    (note,) = dataset.notes
    assert note.startswith("passed over in train: hidden or a system's: 6 (.DS_Store, ")
    assert note.endswith(
        "; files that are no images: 3 (cat/Thumbs.db, dog/desktop.ini, dog/notes.txt); "
        "files outside the folder of a class: 1 (labels.csv)"
    )


def test_links_are_followed_and_circles_end(folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    for i in range(3):
        picture(50 + i).save(elsewhere / f"{i}.png")
    train = folder / "train"
    (train / "emu").symlink_to(elsewhere, target_is_directory=True)
    (train / "cat" / "linked.png").symlink_to(elsewhere / "0.png")
    (train / "cat" / "more").symlink_to(elsewhere, target_is_directory=True)
    (train / "cat" / "up").symlink_to(train, target_is_directory=True)  # all classes in one
    (elsewhere / "self").symlink_to(elsewhere, target_is_directory=True)
    (elsewhere / "gone.png").symlink_to(elsewhere / "nowhere.png")
    (elsewhere / "knot.png").symlink_to(elsewhere / "knot.png")
    dataset = data.load(str(folder), warn=False)
    assert dataset.classes == ("cat", "dog", "emu")
    assert torch.bincount(dataset.train.labels).tolist() == [4 + 1 + 3, 4, 3]
    emus = [np.asarray(picture(50 + i))[:, 4:20].transpose(2, 0, 1) for i in range(3)]
    np.testing.assert_array_equal(everything(dataset.train)[-3:].numpy(), emus)
    assert dataset.notes == (
        "passed over in train: broken links or no regular files: 4 "
        "(cat/more/gone.png, cat/more/knot.png, emu/gone.png, ...)",
        "1 of 3 classes have no validation images: emu",
    )


def test_a_pipe_and_a_folder_with_the_name_of_an_image(folder):
    os.mkfifo(folder / "train" / "cat" / "pipe.png")
    (folder / "train" / "dog" / "more.png").mkdir()
    picture(7).save(folder / "train" / "dog" / "more.png" / "0.png")
    dataset = data.load(str(folder), warn=False)
    assert torch.bincount(dataset.train.labels).tolist() == [4, 5]
    assert "broken links or no regular files: 1 (cat/pipe.png)" in dataset.notes[0]


@pytest.mark.parametrize(
    "suffix", ["pgm", "jfif", "webp", "tif", "TIFF", "JPG", "Jpeg", "bmp", "gif", "tga", "jp2",
               "ico", "pcx", "sgi", "dib", "pnm", "avif", "PNG", "mpo"]
)  # fmt: skip
def test_every_suffix_that_pillow_opens(folder, suffix):
    kind = Image.registered_extensions().get(f".{suffix.lower()}")
    if kind not in Image.SAVE:
        pytest.skip(f"this pillow cannot write .{suffix}")
    for part in ("train", "val"):
        for path in sorted((folder / part).rglob("*.png")):
            picture(3, size=(16, 16), mode="L").save(path.with_suffix(f".{suffix}"), kind)
            if suffix != "PNG":
                path.unlink()
    dataset = data.load(str(folder))
    assert len(dataset.train) == (16 if suffix == "PNG" else 8)
    image = dataset.test.batch([0])[0][0].float()
    assert (image - torch.tensor(np.asarray(picture(3, size=(16, 16), mode="L")))).std() < 60


def test_formats_that_are_no_images_or_start_programs_are_not_read(folder):
    """EPS starts Ghostscript, HDF5 has no decoder: neither by suffix nor under another one."""
    assert not {".eps", ".ps", ".h5", ".pdf", ".mpg", ".wmf"} & folders.suffixes()
    picture(1).save(folder / "train" / "cat" / "x.eps")
    dataset = data.load(str(folder), warn=False)
    assert dataset.notes[0].endswith("files that are no images: 1 (cat/x.eps)")
    (folder / "train" / "cat" / "x.eps").rename(folder / "train" / "cat" / "x.png")
    with pytest.raises(DataError, match=r"x\.png cannot be read: .* another kind"):
        data.load(str(folder))


@pytest.mark.parametrize("names", [("Train", "VAL"), ("training", "testing"), ("train", "Valid")])
def test_names_of_the_parts(tmp_path, names):
    """Taken for classes, they are a task that every model solves by chance."""
    dataset = data.load(str(write(tmp_path, names)), warn=False)
    assert dataset.classes == ("cat", "dog")
    assert (len(dataset.train), len(dataset.test), dataset.notes) == (8, 8, ())


def test_a_part_that_is_not_used_is_said(tmp_path):
    write(tmp_path, ("train", "val", "test"))
    (tmp_path / "masks").mkdir()
    assert data.load(str(tmp_path), warn=False).notes == ("read: train and val, not: masks, test",)


def test_a_class_may_be_called_train(tmp_path):
    write(tmp_path, (".",), per_class=4)
    (tmp_path / "dog").rename(tmp_path / "train")
    assert data.load(str(tmp_path), warn=False).classes == ("cat", "train")


def test_what_cannot_be_right_is_refused(tmp_path):
    write(tmp_path, ("val",))
    with pytest.raises(DataError, match=r"val: expected a folder .*/train beside it, found none"):
        data.load(str(tmp_path))
    (tmp_path / "train").symlink_to(tmp_path / "val", target_is_directory=True)
    with pytest.raises(DataError, match=r"val is the same folder as .*train"):
        data.load(str(tmp_path))
    (tmp_path / "train").unlink()
    write(tmp_path, ("train",))
    for part in ("train", "val"):
        for path in (tmp_path / part / "dog").iterdir():
            path.unlink()
    with pytest.raises(DataError, match="at least 2, found images in 'cat' only"):
        data.load(str(tmp_path))


def test_classes_without_images_are_said(folder):
    (folder / "train" / "emu").mkdir()
    (folder / "val" / "emu").mkdir()
    picture(1).save(folder / "val" / "dog" / "x.png")
    for path in (folder / "val" / "cat").iterdir():
        path.unlink()
    dataset = data.load(str(folder), warn=False)
    assert dataset.classes == ("cat", "dog")
    assert dataset.notes == (
        "no classes, since without images in train: emu",
        "no classes, since without images in val: cat, emu",
        "1 of 2 classes have no validation images: cat",
    )
    picture(1).save(folder / "val" / "emu" / "x.png")
    with pytest.raises(DataError, match=r"has classes without images in .*train: emu; the folders"):
        data.load(str(folder))


def test_a_hold_out_is_said_and_leaves_each_class_an_image(tmp_path):
    write(tmp_path, (".",), per_class=15)
    (tmp_path / "emu").mkdir()
    picture(1).save(tmp_path / "emu" / "only.png")
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        dataset = data.load(str(tmp_path))
    assert dataset.notes == (
        "no folder for validation: every tenth image of a class, by name, is held out for it, "
        "4 of 31",
        "1 of 3 classes have no validation images: emu",
    )
    assert [str(w.message) for w in warned] == [f"{tmp_path}: {note}" for note in dataset.notes]
    assert torch.bincount(dataset.train.labels).tolist() == [13, 13, 1]
    assert torch.bincount(dataset.test.labels).tolist() == [2, 2]
    for path in tmp_path.rglob("*.png"):
        path.unlink()
    for name in ("cat", "dog"):
        picture(1).save(tmp_path / name / "only.png")
    with pytest.raises(DataError, match="expected at least 2 images in a class, got 1 in each"):
        data.load(str(tmp_path))


@pytest.mark.skipif(sys.platform != "linux", reason="file names are UTF-8 there")
def test_names_that_are_no_utf_8(tmp_path):
    write(tmp_path, (".",))
    latin = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9")
    (tmp_path / "dog").rename(latin)
    picture(1).save(os.fsdecode(os.fsencode(latin) + b"/caf\xe9.png"))
    (Path(latin) / os.fsdecode(b"caf\xe9.txt")).touch()
    dataset = data.load(str(tmp_path), warn=False)
    assert dataset.classes == ("caf\\udce9", "cat")
    assert len(dataset.train) + len(dataset.test) == 9
    "".join([*dataset.classes, *dataset.notes]).encode()
    (Path(latin) / os.fsdecode(b"caf\xe9.png")).write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"caf\\udce9\.png cannot be read") as error:
        data.load(str(tmp_path), warn=False)
    str(error.value).encode()


def test_a_folder_that_cannot_be_listed():
    """By a name of 300 characters: to root, who may run this, every folder is readable."""
    with pytest.raises(DataError, match="cannot be listed: File name too long"):
        folders.list_classes(Path("x" * 300))
