"""Bytes of an image file to RGB pixels, or a sentence that says why not.

Invariant: the pixels are those of `PIL.Image.open(file).convert("RGB")`, which is what users of the exported model feed
it. So an alpha channel is dropped and an EXIF rotation is not applied; both are reported.
"""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, UnidentifiedImageError

# Fixed, as other Pillow plug-ins start external programs (EPS) or read what is not a photograph (PSD, ICNS, FITS, ...).
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "GIF", "PPM", "JPEG2000", "AVIF")
_EXIF_ORIENTATION = 0x0112
_TIFF_BITS_PER_SAMPLE = 258


class ImageFaultError(Exception):
    """An image that cannot be used; the text says what was found and what would work."""


@dataclass(frozen=True)
class Decoded:
    """Pixels of one image, uint8 (height, width, 3), and what was dropped on the way."""

    pixels: NDArray[np.uint8]
    alpha: bool
    rotated: bool


@contextmanager
def strict_pillow() -> Iterator[None]:
    """Make Pillow refuse giant and truncated images while the block runs.

    Enter it once around a pool of threads, not inside each: warning filters are global to the process.
    """
    tolerant = ImageFile.LOAD_TRUNCATED_IMAGES
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        with warnings.catch_warnings():
            # Pillow only warns between its limit (89 Mpx) and twice of it.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            # Odd palettes and EXIF blocks; the pixels are right.
            warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
            yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = tolerant


def decode(data: bytes) -> Decoded:
    """Decode one image completely; call it inside `strict_pillow`.

    Raises:
        ImageFaultError: Not an image, truncated, giant, or of more than 8 bits a channel.
    """
    if not data:
        raise ImageFaultError("an empty file")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _refuse_deep(image, data)
            rgb = image.convert("RGB")
            pixels = np.asarray(rgb, np.uint8)
            rotated = image.getexif().get(_EXIF_ORIENTATION, 1) not in (0, 1)
            return Decoded(pixels, image.has_transparency_data, rotated)
    except ImageFaultError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageFaultError(f"a giant image ({_first_sentence(error)}); shrink it or leave it out") from error
    except UnidentifiedImageError as error:
        raise ImageFaultError(f"not an image of a known format ({', '.join(FORMATS)}); remove it") from error
    except MemoryError:
        raise
    except (
        Exception
    ) as error:  # Decoders meet damaged bytes with nearly any exception: OSError, SyntaxError, struct.error
        raise ImageFaultError(f"a damaged or truncated image ({_first_sentence(error)}); replace it") from error


def _refuse_deep(image: Image.Image, data: bytes) -> None:
    """Refuse more than 8 bits a channel: `convert("RGB")` saturates them (or drops bits) without a word."""
    deep = image.mode.startswith("I") or image.mode == "F"
    if image.format == "PNG":
        deep = deep or data[24] > 8  # Bit depth in the header chunk, which is always first.
    elif image.format == "TIFF":
        bits = image.tag_v2.get(_TIFF_BITS_PER_SAMPLE, (8,))  # type: ignore[attr-defined]
        deep = deep or any(b > 8 for b in (bits if isinstance(bits, tuple) else (bits,)))
    if deep:
        raise ImageFaultError(
            f"more than 8 bits a channel (mode {image.mode}); the network is fed 8-bit images, and a silent conversion "
            "would saturate: scale it to 8 bits first"
        )


def _first_sentence(error: BaseException) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__
