"""Folders of images: which file belongs to which class and to which part, what is passed over."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fastmp.data.dataset import DataError

Classes = dict[str, list[str]]  # paths: of a million images, so no objects of pathlib

# Formats of Pillow that are no pixels here: stubs without a decoder, films, what only Windows draws
# (WMF), and what would start Ghostscript (EPS).
_NOT_READ = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
# Folders that systems and programs leave behind; some hold small copies of the images.
_OF_SYSTEMS = {
    "__macosx", "__pycache__", "@eadir", "lost+found", "$recycle.bin", "system volume information",
}  # fmt: skip
_OF_A_RUN = "metrics.jsonl"  # in the folder of a run, whose curves.png is no image of a class
_TRAIN = ("train", "training")
_TEST = ("val", "valid", "validation", "test", "testing")
_HOLD_OUT = 10  # every tenth image of a class


@functools.cache
def formats() -> tuple[str, ...]:
    """The formats that are read, by Pillow's names, the common ones first."""
    from PIL import Image  # the extra [data]

    Image.init()
    return tuple(name for name in Image.ID if name not in _NOT_READ)


def suffixes() -> frozenset[str]:
    """The endings of files of these formats, in lower case, with the dot."""
    from PIL import Image

    readable = {*formats(), "MPO"}  # which the reader of JPEG opens
    return frozenset(
        ending for ending, name in Image.registered_extensions().items() if name in readable
    )


def shown(name: str | os.PathLike[str]) -> str:
    """A name for messages and reports: bytes that are no UTF-8 as escapes."""
    return os.fspath(name).encode("utf-8", "backslashreplace").decode()


def few(names: Sequence[str], most: int = 3) -> str:
    """Names for a message, the first ``most`` of many."""
    return ", ".join(map(shown, names[:most])) + (", ..." if len(names) > most else "")


@dataclass(frozen=True)
class Split:
    """Paths with labels for training and for validation, and what the user should know of them."""

    train: list[tuple[str, int]]
    test: list[tuple[str, int]]
    classes: tuple[str, ...]
    notes: tuple[str, ...]


def split(folder: Path) -> Split:
    """The images of ``folder`` as ``fastmp.data.load`` describes.

    Raises:
        DataError: fewer than two classes, too few images, a validation class without training
            images, validation without a folder for training, or both in one folder.
    """
    train, test, notes = _parts(folder)
    listing = list_classes(train)
    notes += listing.notes(train)
    found = listing.classes
    if test is not None:
        listing = list_classes(test)
        notes += listing.notes(test)
        found_test = listing.classes
    else:
        found, found_test = _hold_out(found)
        if not found_test:
            raise DataError(f"{shown(train)}: expected at least 2 images in a class, got 1 in each")
        held, rest = (sum(map(len, images.values())) for images in (found_test, found))
        notes.append(
            f"no folder for validation: every tenth image of a class, by name, is held out for it, "
            f"{held:,} of {held + rest:,}"
        )
    classes = sorted(found)
    unknown = sorted(found_test.keys() - found.keys())
    if unknown:
        raise DataError(
            f"{shown(test or folder)} has classes without images in {shown(train)}: "
            f"{', '.join(map(shown, unknown))}; the folders must have the same names"
        )
    if len(classes) < 2:
        raise DataError(
            f"{shown(train)}: expected one subfolder per class, at least 2, "
            f"found images in {shown(classes[0])!r} only"
        )
    parts = [
        [(path, label) for label, name in enumerate(classes) for path in images.get(name, [])]
        for images in (found, found_test)
    ]
    return Split(parts[0], parts[1], tuple(map(shown, classes)), tuple(notes))


def for_evaluation(folder: Path) -> tuple[Classes, list[str]]:
    """The images of the folder's ``val``, or of its own classes where there is none, and notes.

    Raises:
        DataError: a folder that cannot be read, or no images.
    """
    chosen = _named(_below(folder), _TEST) or folder
    listing = list_classes(chosen)
    return listing.classes, listing.notes(chosen)


def images_in(folder: Path) -> list[str]:
    """The paths of the images in a folder and below it.

    Raises:
        DataError: a folder that cannot be read, or no images.
    """
    found = _images(os.fspath(folder), suffixes(), Listing(), [])
    if not found:
        raise DataError(f"{shown(folder)}: expected images, found none")
    return found


def _below(folder: Path) -> list[Path]:
    return [Path(entry.path) for entry in _entries(folder, Listing()) if _is_folder(entry)]


def _named(below: list[Path], names: Sequence[str]) -> Path | None:
    """The folder of a part; without folders in it, it is a class that is called so."""
    found = {path.name.casefold(): path for path in below}
    parts = (found[name] for name in names if name in found)
    return next((path for path in parts if _below(path)), None)


def _parts(folder: Path) -> tuple[Path, Path | None, list[str]]:
    """The folders of the training and of the validation classes, and what else is there."""
    below = _below(folder)
    train, test = (_named(below, names) for names in (_TRAIN, _TEST))
    if train is None and test is not None:
        raise DataError(
            f"{shown(test)}: expected a folder {shown(folder / 'train')} beside it, found none"
        )
    if train is None:
        return folder, None, []
    if test is not None and train.samefile(test):
        raise DataError(
            f"{shown(test)} is the same folder as {shown(train)}: expected images of its own"
        )
    used = [path for path in (train, test) if path is not None]
    others = [path.name for path in below if path not in used]
    read = " and ".join(shown(path.name) for path in used)
    return train, test, [f"read: {read}, not: {few(others)}"] if others else []


def _hold_out(found: Classes) -> tuple[Classes, Classes]:
    """The rest, and every tenth image of each class; a class's only image stays in training."""
    kept = {
        name: [path for i, path in enumerate(paths) if i % _HOLD_OUT or len(paths) == 1]
        for name, paths in found.items()
    }
    held = {name: paths[::_HOLD_OUT] for name, paths in found.items() if len(paths) > 1}
    return kept, held


@dataclass
class Listing:
    """The images of a folder by class, sorted by path; classes without images; what was passed over
    and why, as paths by reason."""

    classes: Classes = field(default_factory=dict)
    empty: list[str] = field(default_factory=list)
    passed_over: dict[str, list[str]] = field(default_factory=dict)

    def pass_over(self, reason: str, path: str) -> None:
        """Note that this file or folder is not used."""
        self.passed_over.setdefault(reason, []).append(path)

    def notes(self, folder: Path) -> list[str]:
        """One line on what was passed over, one on empty classes, where there are any."""
        found, name = [], shown(folder.name or folder)
        for reason, paths in self.passed_over.items():
            examples = [os.path.relpath(path, folder) for path in paths[:4]]
            found.append(f"{reason}: {len(paths):,} ({few(examples)})")
        notes = [f"passed over in {name}: {'; '.join(found)}"] if found else []
        if self.empty:
            notes.append(f"no classes, since without images in {name}: {few(self.empty)}")
        return notes


def list_classes(folder: Path) -> Listing:
    """The images below each subfolder of ``folder``. Links are followed, each folder once a class.

    Raises:
        DataError: a folder that cannot be read, or no images.
    """
    result, endings = Listing(), suffixes()
    entries = list(_entries(folder, result))
    above = [_identity(path) for path in (folder, *folder.resolve().parents)]
    for entry in entries:
        if not _is_folder(entry):
            result.pass_over("files outside the folder of a class", entry.path)
            continue
        paths = _images(entry.path, endings, result, above)
        if paths:
            result.classes[entry.name] = paths
        else:
            result.empty.append(entry.name)
    if not result.classes:
        reasons = "; ".join(result.notes(folder))
        raise DataError(
            f"{shown(folder)}: expected one subfolder per class with images (.jpg, .png, .tif and "
            f"others that Pillow opens), found none{reasons and f'; {reasons}'}"
        )
    return result


def _entries(folder: str | Path, listing: Listing) -> Iterator[os.DirEntry[str]]:
    """What lies in a folder, by name, without what is hidden or a system's."""
    try:
        with os.scandir(folder) as entries:
            found = sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(f"{shown(folder)} cannot be listed: {error.strerror}") from error
    for entry in found:
        if entry.name.startswith(".") or entry.name.casefold() in _OF_SYSTEMS:
            listing.pass_over("hidden or a system's", entry.path)
        else:
            yield entry


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Also a link to a folder; a link to itself, for which ``entry.is_dir`` raises, is none."""
    return Path(entry.path).is_dir() if entry.is_symlink() else entry.is_dir()


def _is_file(entry: os.DirEntry[str]) -> bool:
    """Also a link to a file. A pipe is none: to open it is to wait for its writer."""
    return Path(entry.path).is_file() if entry.is_symlink() else entry.is_file()


def _identity(folder: str | Path) -> tuple[int, int]:
    state = Path(folder).stat()
    return state.st_dev, state.st_ino


def _images(
    top: str, endings: frozenset[str], listing: Listing, above: list[tuple[int, int]]
) -> list[str]:
    """The image files below a folder, in the order of their paths' parts.

    No folder comes twice, so that circles of links end; none above the classes comes at all, since
    the images of all classes would be in one.
    """
    found, waiting, seen = [], [top], set(above)
    while waiting:
        folder = waiting.pop()
        if _identity(folder) in seen:
            continue
        seen.add(_identity(folder))
        entries = list(_entries(folder, listing))
        if any(entry.name == _OF_A_RUN for entry in entries):
            listing.pass_over("results of runs", folder)
            continue
        for entry in entries:
            _, dot, ending = entry.name.rpartition(".")
            if _is_folder(entry):
                waiting.append(entry.path)
            elif not _is_file(entry):
                listing.pass_over("broken links or no regular files", entry.path)
            elif dot + ending.lower() not in endings:
                listing.pass_over("files that are no images", entry.path)
            else:
                found.append(entry.path)
    return sorted(found, key=lambda path: path.replace(os.sep, "\0"))
