"""Pictures as vLLM hands them to a model's processor: upright, in RGB, on white where they are transparent.

What is measured must be what is served, so a picture is opened by the rules of vLLM's server, and one that the server
would refuse or spoil is refused here. `runtimes/vllm/child_serve.py` opens what it sends by the same rules.

Source: vLLM 0.32, vllm/multimodal/image.py (formats, EXIF orientation, transparency) and multimodal/media/image.py.
"""

import base64
import binascii
import contextlib
import io
import stat
import urllib.parse
import urllib.request
import warnings
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from bitladder.errors import DataError
from bitladder.reading import read_bytes

_WHITE = (255, 255, 255)
# Formats that vLLM's allowlist leaves out: they start other programs, or only name what they hold.
_REFUSED_FORMATS = frozenset({"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"})
_SHOWN, _SHOWN_URI = 200, 40  # characters of a path and of a data: URI in a message


def resolved(image: str, folder: Path) -> str:
    """Return the absolute path of a picture that a data file in `folder` names; a `data:` URI as it is.

    Raises:
        DataError: the reference is a URL of another machine, or of a scheme that no picture has.
    """
    scheme = urllib.parse.urlsplit(image).scheme.lower() if "://" in image else ""
    if image.startswith("data:"):
        return image
    if not scheme:
        return str((folder / image).absolute())
    parts = urllib.parse.urlsplit(image)
    if scheme == "file" and parts.netloc in ("", "localhost"):
        return urllib.request.url2pathname(parts.path)
    if scheme == "file":
        raise _error(image, f"names the machine {parts.netloc}", "write file:///absolute/path, or the path alone")
    raise _error(image, "is a URL, and nothing is fetched over the network", "download it and give its path")


def shown(image: str) -> str:
    """Return a reference as a message shows it: one line, and short."""
    words = image.encode("unicode_escape").decode() if not image.isprintable() else image
    limit = _SHOWN_URI if image.startswith("data:") else _SHOWN
    return words if len(words) <= limit else words[:limit] + "…"


def open_picture(image: str) -> Image.Image:
    """Return a picture in RGB, upright by its EXIF orientation, on white; the first frame of several.

    Args:
        image: a path, or a `data:` URI in base64.

    Raises:
        DataError: it is missing, damaged or no picture, or vLLM would refuse or clip it.
    """
    raw = _from_uri(image) if image.startswith("data:") else _from_file(image)
    try:
        with warnings.catch_warnings():
            # Pillow warns at half of what it refuses; vLLM's limit is the upper one.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            picture = Image.open(io.BytesIO(raw))
        return _converted(picture, image)
    except UnidentifiedImageError:
        raise _error(
            image, "can't be read: it is in no format that Pillow knows", "save it as PNG or JPEG (render an SVG)"
        ) from None
    except Image.DecompressionBombError as error:
        raise _error(image, f"is larger than Pillow and vLLM open ({error})", "make it smaller") from error
    except DataError:
        raise
    except Exception as error:  # Pillow's readers raise whatever a damaged file leads them to
        raise _error(image, f"can't be read ({error})", "fix or remove the sample") from error


def _error(image: str, what: str, remedy: str) -> DataError:
    return DataError(f"picture {shown(image)} {what}; {remedy}")


def _from_uri(image: str) -> bytes:
    head, comma, payload = image.partition(",")
    remedy = "write data:image/png;base64,<the file in base64 without line breaks>"
    if not comma or not head.lower().endswith(";base64"):
        raise _error(image, "can't be read: it is no data: URI in base64", remedy)
    try:
        return base64.b64decode(payload, validate=True)
    except (binascii.Error, ValueError) as error:
        raise _error(image, f"can't be read: it is no base64 ({error})", remedy) from error


def _from_file(image: str) -> bytes:
    try:
        mode = Path(image).stat().st_mode
        if not stat.S_ISREG(mode):  # a pipe would be waited for, a device read for ever
            what = "is a directory" if stat.S_ISDIR(mode) else "is no regular file"
            raise _error(image, f"can't be read: it {what}", "give the path of a picture")
        raw = read_bytes(Path(image))
    except FileNotFoundError:
        raise _error(image, "can't be read: it does not exist", "paths are relative to the data file") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise _error(image, f"can't be read ({reason})", "fix or remove the sample") from error
    if not raw:
        raise _error(image, "can't be read: it is empty", "fix or remove the sample")
    return raw


def _converted(picture: Image.Image, image: str) -> Image.Image:
    if picture.format in _REFUSED_FORMATS:
        raise _error(image, f"is in the format {picture.format}, which vLLM refuses", "save it as PNG or JPEG")
    if picture.mode.startswith(("I", "F")):
        raise _error(
            image,
            f"has more than 8 bits a channel (mode {picture.mode}), which vLLM would clip to black and white",
            "scale its values to 0 to 255 and save it with 8 bits",
        )
    with contextlib.suppress(Exception):  # a damaged EXIF block turns nothing, as in vLLM
        picture = ImageOps.exif_transpose(picture)
    picture.load()
    if picture.mode == "RGB":
        return picture
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        ground = Image.new("RGB", picture.size, _WHITE)
        ground.paste(picture, mask=picture.getchannel("A"))
        return ground
    return picture.convert("RGB")
