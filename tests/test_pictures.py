"""Pictures: what the model sees is what vLLM would hand it, in our evaluation and in the pictures that vLLM is sent."""

import base64
import hashlib
import json
import os
import struct
import subprocess
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import bitladder
from bitladder.data.pictures import open_picture, resolved
from bitladder.data.processors import load_processor
from bitladder.data.samples import load_data
from bitladder.errors import DataError
from bitladder.recipe import DataSpec
from bitladder.runtimes.vllm import child_serve as vllm_serve

MODEL = Path(bitladder.__file__).parent / "demo" / "qwen2_5_vl_digits"
RAMP = np.tile(np.linspace(0, 255, 112, dtype=np.uint8)[None, :, None], (56, 1, 3))  # [56, 112, 3], dark to the left


@pytest.fixture(scope="module")
def processor():
    return load_processor(MODEL)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """Pictures that vLLM takes, in all modes and some formats."""
    directory = tmp_path_factory.mktemp("pictures")
    rgb = Image.fromarray(RAMP)
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[274] = orientation
        rgb.save(directory / f"exif{orientation}.png", exif=exif)
    exif = Image.Exif()
    exif[274] = 6
    rgb.save(directory / "exif6.jpg", exif=exif)
    rgb.save(directory / "bad_exif.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    alpha = Image.new("L", rgb.size, 0)
    alpha.paste(255, (20, 20, 40, 40))
    black = Image.new("L", rgb.size, 0)
    Image.merge("RGBA", (black, black, black, alpha)).save(directory / "rgba.png")
    Image.merge("LA", (black, alpha)).save(directory / "la.png")
    rgb.quantize(16).save(directory / "palette.png")
    rgb.quantize(16).save(directory / "palette_transparent.png", transparency=0)
    rgb.convert("L").save(directory / "grey_transparent.png", transparency=0)
    rgb.save(directory / "rgb_transparent.png", transparency=(0, 0, 0))
    rgb.convert("L").save(directory / "grey.png")
    rgb.convert("1").save(directory / "bits.png")
    rgb.convert("CMYK").save(directory / "cmyk.jpg")
    rgb.convert("YCbCr").save(directory / "ycbcr.tif")
    rgb.convert("L").save(directory / "frames.gif", save_all=True, append_images=[Image.new("L", rgb.size, 255)])
    rgb.save(directory / "pages.tif", save_all=True, append_images=[Image.new("RGB", rgb.size, "white")])
    Image.fromarray(RAMP[:1, :1]).save(directory / "pixel.png")
    rgb.save(directory / "sp ace ü.webp", lossless=True)
    return directory


def pixels(path: Path) -> np.ndarray:
    picture = open_picture(str(path))
    assert picture.mode == "RGB"
    return np.asarray(picture)


def test_orientation_is_applied(files):
    turned = {
        1: RAMP,
        2: RAMP[:, ::-1],
        3: RAMP[::-1, ::-1],
        4: RAMP[::-1],
        5: RAMP.transpose(1, 0, 2),
        6: np.rot90(RAMP, -1),
        7: np.rot90(RAMP, -1)[:, ::-1][::-1, ::-1],
        8: np.rot90(RAMP),
    }
    for orientation, wanted in turned.items():
        assert np.array_equal(pixels(files / f"exif{orientation}.png"), wanted), orientation
    assert pixels(files / "exif6.jpg").shape == (112, 56, 3)
    assert pixels(files / "bad_exif.jpg").shape == (56, 112, 3)


def test_what_is_transparent_lies_on_white(files):
    for name in ("rgba.png", "la.png"):
        found = pixels(files / name)
        assert (found[0, 0] == 255).all(), name
        assert (found[30, 30] == 0).all(), name
    assert (pixels(files / "palette.png") != pixels(files / "palette_transparent.png")).any()
    assert (pixels(files / "grey_transparent.png")[RAMP[..., 0] == 0] == 255).all()


def test_the_first_frame_counts(files):
    assert np.array_equal(pixels(files / "frames.gif"), pixels(files / "grey.png"))
    assert np.array_equal(pixels(files / "pages.tif"), RAMP)


def test_vllm_is_sent_the_same_pictures(files):
    names = sorted(files.iterdir())
    assert len(names) > 20
    for path in names:
        assert np.array_equal(np.asarray(vllm_serve.open_image(str(path))), pixels(path)), path.name
    uri = "data:image/png;base64," + base64.b64encode((files / "exif6.png").read_bytes()).decode()
    assert np.array_equal(np.asarray(vllm_serve.open_image(uri)), np.asarray(open_picture(uri)))


def test_vllms_own_loader_gives_the_same_pictures(files, vllm_warm):
    script = """
import hashlib, json, pathlib, sys
from vllm.multimodal.media.image import ImageMediaIO
found = {}
for path in sorted(pathlib.Path(sys.argv[1]).iterdir()):
    image = ImageMediaIO().load_file(path).media
    found[path.name] = [image.mode, *image.size, hashlib.sha256(image.tobytes()).hexdigest()]
print(json.dumps(found))
"""
    done = subprocess.run(
        [vllm_warm, "-c", script, str(files)], capture_output=True, text=True, timeout=300, check=True
    )
    found = json.loads(done.stdout.splitlines()[-1])
    wanted = {}
    for path in sorted(files.iterdir()):
        image = open_picture(str(path))
        wanted[path.name] = [image.mode, *image.size, hashlib.sha256(image.tobytes()).hexdigest()]
    assert found == wanted


def test_references(tmp_path):
    assert resolved("a b.png", tmp_path) == str(tmp_path / "a b.png")
    assert resolved("/a/b.png", tmp_path) == "/a/b.png"
    assert resolved("file:///a/b%20c.png", tmp_path) == "/a/b c.png"
    for url, words in (
        ("http://127.0.0.1:9/x.png", "nothing is fetched over the network; download it"),
        ("HTTPS://example.org/x.png", "nothing is fetched"),
        ("file://host/x.png", "names the machine host"),
    ):
        with pytest.raises(DataError, match=words):
            resolved(url, tmp_path)


def load(processor, path: Path, samples: int = 1, **options):
    spec = DataSpec(kind="image_text", path=str(path))
    return load_data(spec, processor, samples=samples, sequence_length=64, batch_size=samples, seed=0, **options)


def bad_files(directory: Path) -> None:
    ramp = np.linspace(0, 65535, 56 * 56).reshape(56, 56)
    Image.fromarray(ramp.astype(np.uint16)).save(directory / "grey16.png")
    Image.fromarray(ramp.astype(np.int32)).save(directory / "int32.tif")
    Image.fromarray((ramp / 65535).astype(np.float32)).save(directory / "float.tif")
    rgb = Image.fromarray(RAMP)
    rgb.save(directory / "whole.jpg")
    (directory / "cut.jpg").write_bytes((directory / "whole.jpg").read_bytes()[:-200])
    (directory / "empty.png").write_bytes(b"")
    (directory / "page.jpg").write_text("<html>404</html>")
    (directory / "drawing.svg").write_text('<svg xmlns="http://www.w3.org/2000/svg"/>')
    rgb.save(directory / "post.eps")
    header = b"IHDR" + struct.pack(">IIBBBBB", 20000, 20000, 1, 0, 0, 0, 0)  # its head is all that may be read
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    (directory / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 0) + b"IDAT\0\0\0\0")
    rgb.resize((1000, 2)).save(directory / "ribbon.png")
    (directory / "folder.png").mkdir()
    os.mkfifo(directory / "pipe.png")
    (directory / "dangling.png").symlink_to(directory / "nowhere.png")


BAD = {
    "grey16.png": r"more than 8 bits a channel .*save it with 8 bits",
    "int32.tif": "more than 8 bits",
    "float.tif": "more than 8 bits",
    "cut.jpg": "truncated",
    "empty.png": "it is empty",
    "page.jpg": "no format that Pillow knows; save it as PNG",
    "drawing.svg": r"render an SVG",
    "post.eps": "format EPS, which vLLM refuses",
    "bomb.png": "400000000 pixels.*make it smaller",
    "ribbon.png": r"1000 x 2 pixels .*aspect ratio must be smaller than 200.*change or remove",
    "folder.png": "is a directory",
    "pipe.png": "is no regular file",
    "dangling.png": "does not exist",
    "a\0b.png": "null byte",
    "a" * 5000: "too long",
    "http://127.0.0.1:9/x.png": "nothing is fetched",
    "data:image/png;base64,@@@@": "is no base64",
    "data:image/png": r"no data: URI in base64; write data:image/png;base64,",
    "data:image/svg+xml,%3Csvg/%3E": "no data: URI in base64",
    "data:image/png;base64,iVBORw0K": "no format that Pillow knows",
}


def test_bad_pictures_are_one_line_with_the_place(processor, tmp_path):
    bad_files(tmp_path)
    path = tmp_path / "pairs.jsonl"
    for name, words in BAD.items():
        path.write_text("\n" + json.dumps({"image": name, "text": "3", "prompt": "Which?"}) + "\n")
        with pytest.raises(DataError, match=words) as caught:
            load(processor, path, 1)
        message = str(caught.value)
        assert message.startswith(f"{path} line 2: "), message
        assert "\n" not in message
        assert len(message) < 600


def test_a_processor_of_another_model_is_refused_before_the_model_runs(processor, tmp_path):
    Image.fromarray(RAMP).save(tmp_path / "good.png")
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"image": "good.png", "text": "3", "prompt": "?"}) + "\n")
    own = processor.tokenizer.convert_tokens_to_ids(processor.image_token)
    load(processor, path, image_tokens=[own])
    with pytest.raises(DataError, match=r"no token that config\.json names for pictures \(5: .*of one model"):
        load(processor, path, image_tokens=[5])


def test_the_pair_at_fault_is_named_among_its_batch(processor, tmp_path):
    Image.fromarray(RAMP).save(tmp_path / "good.png")
    Image.fromarray(RAMP).resize((1000, 2)).save(tmp_path / "ribbon.png")
    lines = [{"image": f"{name}.png", "text": "3", "prompt": "?"} for name in ("good", "ribbon", "good")]
    lines[2]["text"] = "4"
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(DataError, match=r"pairs\.jsonl line 2: .*ribbon\.png of 1000 x 2 pixels"):
        load(processor, path, 3)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": None}, "'prompt' is null; make it a string"),
        ({"prompt": 3}, "'prompt' is 3"),
        ({"prompt": "<|image_pad|> what?"}, r"holds <\|image_pad\|>.*remove it"),
        ({"text": "a <|image_pad|>"}, r"holds <\|image_pad\|>"),
        ({"text": "  "}, "has no 'text'"),
    ],
)
def test_bad_rows(processor, tmp_path, row, words):
    Image.fromarray(RAMP).save(tmp_path / "good.png")
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"image": "good.png", "text": "3", "prompt": "?", **row}) + "\n")
    with pytest.raises(DataError, match=rf"line 1.*{words}"):
        load(processor, path, 1)


def test_a_large_picture_warns_nobody(tmp_path):
    Image.new("1", (9500, 9500)).save(tmp_path / "large.png")  # between Pillow's warning and its error
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert open_picture(str(tmp_path / "large.png")).size == (9500, 9500)
