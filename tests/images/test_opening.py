"""What comes in from files: masks by their alpha, ordinary files only, nothing without end."""

import os
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.errors import UserError
from ldm.files import is_remote
from ldm.images import opening
from ldm.images.fitting import fit_image, fit_mask, read_file, same_shape, take
from ldm.images.opening import open_picture, to_mask
from ldm.images.png import read_request

SIZE = (16, 16)  # (height, width)
PAINTED = torch.zeros(1, 1, *SIZE)
PAINTED[..., 4:12, 2:6] = 1


def layer(colour=(255, 255, 255), below=(0, 0, 0)):
    """A transparent layer with a painted part; what is not painted may have any colour."""
    image = Image.new("RGBA", SIZE[::-1], (*below, 0))
    image.paste((*colour, 255), (2, 4, 6, 12))
    return image


def forms():
    grey = np.where(PAINTED[0, 0] > 0, 255, 9).astype(np.uint16)
    yield "white on clear", layer(), {}
    yield "black on clear", layer((0, 0, 0)), {}
    yield "red on clear white", layer((255, 0, 0), (255, 255, 255)), {}
    yield "LA", layer().convert("LA"), {}
    yield "palette", layer((200, 0, 0)).quantize(4), {}
    yield "La", layer().convert("LA").convert("La"), {}
    yield "RGBa", layer().convert("RGBa"), {}
    yield "one transparent level", Image.fromarray(grey.astype(np.uint8)), {"transparency": 9}
    yield "one of 16 bits", Image.fromarray(grey * 4), {"transparency": 36}


@pytest.mark.parametrize(
    ("image", "options"), [form[1:] for form in forms()], ids=[form[0] for form in forms()]
)
def test_alpha_of_a_mask_is_what_is_painted(tmp_path, image, options):
    if not options:
        assert torch.equal(fit_mask(take(image, 1), SIZE), PAINTED)
    if image.mode in ("La", "RGBa"):
        return
    image.save(tmp_path / "a.png", **options)
    assert torch.equal(fit_mask(read_file(str(tmp_path / "a.png"), None, to_mask)[0], SIZE), PAINTED)


@pytest.mark.parametrize("name", ["a.webp", "a.tiff", "a.gif", "a.jp2", "a.avif"])
def test_in_every_kind_of_file_that_has_alpha(tmp_path, name):
    layer((90, 0, 0)).save(tmp_path / name, **({"lossless": True} if name == "a.webp" else {}))
    mask, _ = read_file(str(tmp_path / name), None, to_mask)
    assert torch.equal(fit_mask(mask, SIZE), PAINTED)


def test_a_mask_without_transparent_parts_is_its_luminance():
    levels = np.where(PAINTED[0, 0] > 0, 200, 90).astype(np.uint8)
    for mode in ("L", "RGB", "RGBA", "LA", "P"):
        assert torch.equal(fit_mask(take(Image.fromarray(levels).convert(mode), 1), SIZE), PAINTED)


def test_a_mask_is_turned_as_its_exif_says(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    layer().transpose(Image.Transpose.ROTATE_90).save(tmp_path / "a.png", exif=exif)
    assert torch.equal(fit_mask(open_picture(tmp_path / "a.png", None, to_mask), SIZE), PAINTED)


def test_an_image_is_laid_on_white_whatever_its_mode():
    white = torch.ones(1, 3, *SIZE)
    for image in (layer(), layer().convert("LA"), layer().quantize(4), layer().convert("LA").convert("La")):
        assert torch.equal(fit_image(take(image, 3), SIZE), white)


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        ((64, 64), (128, 128), True),
        ((667, 1000), (167, 250), True),  # 250.4 wide
        ((7, 10), (2, 3), True),  # 2.86 wide
        ((64, 64), (64, 128), False),
        ((64, 128), (128, 64), False),
        ((512, 512), (512, 519), False),
    ],
)
def test_the_same_shape_at_another_size(a, b, same):
    assert same_shape(a, b) == same_shape(b, a) == same


# --- files that are not to be opened, or not wholly --------------------------------------------------------


@pytest.mark.skipif(os.name != "posix", reason="devices and pipes are POSIX's")
@pytest.mark.parametrize("name", ["/dev/zero", "/dev/null", "pipe", "folder"])
def test_only_ordinary_files_are_read(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")  # to open it would wait for a writer
    os.mkdir("folder")
    with pytest.raises(UserError, match=f"cannot read the picture {name}: it is not an ordinary file"):
        read_file(name)


def test_no_more_is_read_than_the_limit(tmp_path, monkeypatch):
    with open(tmp_path / "a.png", "wb") as file:
        file.truncate(2**20 + 1)
    monkeypatch.setattr(opening, "MAX_BYTES", 2**20)
    with pytest.raises(UserError, match="it has more than 1 MiB"):
        read_file(str(tmp_path / "a.png"))


@pytest.mark.parametrize(
    "path", [r"\\host\share\a.png", "//host/share/a.png", r"\/host/a", r"\\?\UNC\host\a"]
)
def test_names_on_other_computers(path):
    assert is_remote(path)
    assert not is_remote(path[1:])
    assert not is_remote("")


def bomb(path):
    """A PNG of 200 bytes that claims 10^10 pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b""))
    return path


@pytest.mark.parametrize("read", [read_request, open_picture, read_file])
def test_a_picture_of_too_many_pixels_is_the_users_to_put_right(tmp_path, read):
    with pytest.raises(UserError, match=r"cannot read .*a.png"):
        read(bomb(tmp_path / "a.png"))


def test_a_damaged_image_of_memory(tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "a.bmp")
    (tmp_path / "a.bmp").write_bytes((tmp_path / "a.bmp").read_bytes()[:500])
    with pytest.raises(UserError, match=r"an image cannot be used: .*truncated"):
        take(Image.open(tmp_path / "a.bmp"), 3)
