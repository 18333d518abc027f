"""Images: folders with one sub-folder per class, and arrays of pixels."""

from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from otad.data.parts import Parts
from otad.errors import DataError

__all__ = ["as_images", "read_image_folder", "to_unit"]

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".pgm", ".ppm", ".tif", ".tiff", ".webp"}
GREY_MODES = {"1", "L"}
COLOUR_MODES = {"RGB", "RGBA", "P"}


def read_image_folder(folder: Path, *, label_required: bool = True) -> Parts:
    """Read folder/CLASS/*.png and the like.

    folder/train/CLASS/ and folder/test/CLASS/ are the folder's own division. Grey where every image is grey,
    else colour. Files that are not images are passed over.

    Args:
        folder: the folder.
        label_required: whether images straight in the folder, without classes, are an error.

    Raises:
        DataError: no images, an unreadable one, or images of different sizes.
    """
    folders = _sub_folders(folder)
    if {f.name for f in folders} == {"train", "test"}:
        train, test = _by_class(folder / "train"), _by_class(folder / "test")
        files, is_test = train + test, np.arange(len(train) + len(test)) >= len(train)
    elif folders:
        files, is_test = _by_class(folder), None
    else:
        files, is_test = [(path, "") for path in _image_files(folder)], None
        if files and label_required:
            raise DataError(f"{folder}: images without a class; put them into one sub-folder per class")
    if not files:
        raise DataError(
            f"{folder}: no images; expected files such as {folder}/CLASS/0001.png, one sub-folder per class"
        )
    x = _stack([path for path, _ in files])
    y = np.array([label for _, label in files]) if folders else None
    return Parts(x=x, y=y, is_test=is_test, split="the folders train and test")


def as_images(x: np.ndarray, where: str) -> np.ndarray:
    """An array of pixels as (n, channels, height, width): uint8, or float32 in [0, 1].

    Args:
        x: (n, height, width), or four axes with 1 or 3 channels first or last.
        where: the source, for messages.

    Raises:
        DataError: other shapes, or values that are neither uint8 nor in [0, 1].
    """
    if x.ndim == 3:
        x = x[:, None]
    if x.ndim != 4 or 0 in x.shape:
        raise DataError(
            f"{where}: the samples have shape {x.shape}; expected (n, features) or images (n, channels, h, w)"
        )
    if x.shape[1] not in (1, 3) and x.shape[3] in (1, 3):
        x = x.transpose(0, 3, 1, 2)
    if x.dtype == np.uint8:
        return x
    if x.dtype.kind != "f":
        raise DataError(f"{where}: the images are {x.dtype}; expected uint8 (0 to 255) or floats in [0, 1]")
    if not ((x >= 0) & (x <= 1)).all():
        bad = int(np.argwhere(~((x >= 0) & (x <= 1)))[0][0])
        raise DataError(
            f"{where}: image {bad + 1} has values outside [0, 1] (or NaN); save uint8, or divide by the maximum"
        )
    return x.astype(np.float32)


def to_unit(x: np.ndarray) -> np.ndarray:
    """Pixels as float32 in [0, 1], contiguous."""
    x = np.ascontiguousarray(x)
    return x.astype(np.float32) / np.float32(255) if x.dtype == np.uint8 else x


def _by_class(folder: Path) -> list[tuple[Path, str]]:
    files = []
    for sub_folder in _sub_folders(folder):
        found = _image_files(sub_folder)
        if not found:
            raise DataError(f"{sub_folder}: no images of this class; add some or remove the folder")
        files += [(path, sub_folder.name) for path in found]
    return files


def _sub_folders(folder: Path) -> list[Path]:
    return sorted(f for f in folder.iterdir() if f.is_dir() and not f.name.startswith("."))


def _image_files(folder: Path) -> list[Path]:
    return sorted(f for f in folder.iterdir() if f.suffix.lower() in SUFFIXES and not f.name.startswith("."))


def _stack(files: list[Path]) -> np.ndarray:
    images = [_read(path) for path in files]
    for path, image in zip(files, images):
        if image.shape[:2] != images[0].shape[:2]:
            raise DataError(
                f"{path}: the image is {_size(image)} and {files[0].name} is {_size(images[0])} "
                "(width x height); bring all images to one size first"
            )
    if any(image.ndim == 3 for image in images):
        images = [image if image.ndim == 3 else np.repeat(image[:, :, None], 3, axis=2) for image in images]
        return np.stack(images).transpose(0, 3, 1, 2)
    return np.stack(images)[:, None]


def _read(path: Path) -> np.ndarray:
    """Pixels as uint8, (h, w) or (h, w, 3)."""
    try:
        with Image.open(path) as image:
            image.load()
            if image.mode in GREY_MODES:
                return np.asarray(image.convert("L"))
            if image.mode not in COLOUR_MODES:
                raise DataError(f"{path}: pixel format {image.mode} is not read; save the image as 8-bit grey or RGB")
            rgba = np.asarray(image.convert("RGBA"))
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        # Pillow reports some damaged files as SyntaxError.
        raise DataError(f"{path}: not a readable image; replace or remove it") from error
    if (rgba[:, :, 3] < 255).any():
        raise DataError(f"{path}: the image is partly transparent; save it on a background, as RGB")
    return rgba[:, :, :3]


def _size(image: np.ndarray) -> str:
    return f"{image.shape[1]} x {image.shape[0]}"
