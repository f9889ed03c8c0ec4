"""From the bytes of an image file to pixels of the size that is wanted."""

from __future__ import annotations

from typing import IO, TYPE_CHECKING

from PIL import Image, ImageOps

from stepdistill.errors import UserError
from stepdistill.framing import Size, centred_box


if TYPE_CHECKING:
    from pathlib import Path

    Readable = Path | IO[bytes]

# What Pillow raises for files that are damaged, cut off, huge or no images.
BROKEN = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)
SIDEWAYS = (5, 6, 7, 8)  # values of the EXIF orientation that exchange height and width
ORIENTATION = 0x0112


def read_pixels(file: Readable, name: str, target: Size) -> Image.Image:
    """Reads one image: turned upright, transparency on white, cropped at the centre, resized with Lanczos.

    Args:
        file: a path or an open file.
        name: what messages call it.
        target: size of the result.

    Raises:
        UserError: the file is missing, damaged or no image.
    """
    try:
        with Image.open(file) as opened:
            return fit(_flatten(ImageOps.exif_transpose(opened)), target)
    except BROKEN as error:
        raise unreadable(name, error) from error


def read_size(file: Readable, name: str) -> Size:
    """The size of an image as it is shown; reads the header alone.

    A damaged file is so named before training starts and not hours later.

    Raises:
        UserError: the file is missing, damaged or no image.
    """
    try:
        with Image.open(file) as image:
            width, height = image.size
            # Without the mark among its first chunks, a PNG would be decoded to the end in search of one.
            told = image.format != "PNG" or "exif" in image.info
            turned = told and image.getexif().get(ORIENTATION) in SIDEWAYS
    except BROKEN as error:
        raise unreadable(name, error) from error
    return Size(width, height) if turned else Size(height, width)


def fit(image: Image.Image, target: Size) -> Image.Image:
    """Crops at the centre to the target's aspect ratio, then resizes to the target."""
    box = centred_box(Size(image.height, image.width), target)
    # Two calls: ImageOps.fit would let pixels from outside the box bleed in.
    cut = image if box == (0, 0, *image.size) else image.crop(box)
    wanted = (target.width, target.height)
    return cut if cut.size == wanted else cut.resize(wanted, Image.Resampling.LANCZOS)


def unreadable(name: str, error: Exception) -> UserError:
    """The error that names a broken image."""
    return UserError(f"{name}: cannot be read as an image ({error}); repair or remove the file")


def _flatten(image: Image.Image) -> Image.Image:
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
