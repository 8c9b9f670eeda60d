"""Pictures, formats, order, augmentation, toy data. All files are made here, in tmp_path."""
import csv
import io
import json
import math
import multiprocessing
import os
import pickle
import random
import struct
import subprocess
import sys
import tarfile
import time
import warnings
import zlib
from collections import Counter
from functools import partial

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
from PIL import Image
from torchvision.transforms import InterpolationMode

import data
from conftest import ROOT


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("CLIP_DATA", "CLIP_BPE"):
        monkeypatch.delenv(name, raising=False)


def picture(width=40, height=30, mode="RGB", number=0):
    """A smooth colour ramp, different for each number."""
    y, x = np.mgrid[:height, :width]
    ramp = np.stack([x * 200 / width + number % 50, y * 200 / height, (x + y) * 100 / (width + height) + number % 7],
                    -1)
    return Image.fromarray(ramp.astype(np.uint8)).convert(mode)


def encoded(image, form="PNG", **options):
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def write_tar(path, members, form=tarfile.USTAR_FORMAT):
    """members: list of (name, bytes or str)."""
    with tarfile.open(path, "w", format=form) as tar:
        for name, content in members:
            content = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return str(path)


def samples(keys):
    return [m for i, key in enumerate(keys) for m in [(f"{key}.jpg", encoded(picture(number=i), "JPEG")),
                                                      (f"{key}.txt", caption_of(key))]]


def caption_of(key):
    return f"caption {key}".encode("utf-8", "replace").decode()


def crop_16(image, caption, rng):
    """A transform that can be pickled."""
    tokens = torch.tensor([len(caption), rng.randrange(99) + 1] + [0] * 75)
    return {"images": data.random_resized_crop(image, 16, (.5, 1), rng), "tokens": tokens}


def texts(dataset):
    return [text for i in range(len(dataset)) for text in dataset.captions(i)]


# pictures

def png_header(width, height):
    """A PNG that says how large it is and holds nothing."""
    chunk = lambda kind, body: struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"")


EXIF = Image.Exif()
EXIF[0x0112] = 6
GREY_16 = Image.fromarray((np.arange(1200).reshape(30, 40) * 54).astype(np.uint16))
GOOD = {
    "grey jpeg": encoded(picture(mode="L"), "JPEG"), "cmyk jpeg": encoded(picture(mode="CMYK"), "JPEG"),
    "progressive jpeg": encoded(picture(), "JPEG", progressive=True),
    "exif jpeg": encoded(picture(), "JPEG", exif=EXIF),
    "rgba png": encoded(picture(mode="RGBA")), "palette png": encoded(picture(mode="P")),
    "la png": encoded(picture(mode="LA")),
    "transparent palette png": encoded(picture(mode="P"), transparency=bytes(range(256))),
    "1-bit png": encoded(picture(mode="1")), "16-bit png": encoded(GREY_16), "bmp": encoded(picture(), "BMP"),
    "animated gif": encoded(picture(), "GIF", save_all=True, append_images=[picture(number=9)]),
    "animated webp": encoded(picture(), "WEBP", save_all=True, append_images=[picture(number=9)], lossless=True),
    "tiff": encoded(picture(), "TIFF"), "1x1": encoded(picture(1, 1)), "3000x1": encoded(picture(3000, 1)),
    "1x3000": encoded(picture(1, 3000)), "5x400": encoded(picture(5, 400))}
NOISE = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)), "JPEG")
BAD = {"truncated jpeg": NOISE[:len(NOISE) // 2], "truncated png": encoded(picture())[:-40],
       "html": b"<html>404</html>", "empty": b"",
       "huge": png_header(8000, 6251), "bomb": png_header(60_000, 60_000), "header alone": png_header(20, 20)}


@pytest.mark.filterwarnings("ignore:Palette images")
@pytest.mark.parametrize("name", GOOD)
def test_decode_good(name):
    image = data.decode(GOOD[name])
    assert image.mode == "RGB" and image.size == Image.open(io.BytesIO(GOOD[name])).size
    plain = {"grey jpeg": "L", "la png": "L", "1-bit png": "1"}.get(name)
    if image.size == (40, 30) and name not in ("16-bit png", "palette png", "transparent palette png", "animated gif"):
        expected = picture(mode=plain).convert("RGB") if plain else picture()
        assert np.abs(np.asarray(image, int) - np.asarray(expected, int)).mean() < 6
    for crop in (data.center_crop(GOOD[name], 24), data.random_resized_crop(GOOD[name], 24, (.5, 1), random.Random(0))):
        assert crop.shape == (3, 24, 24) and crop.dtype == torch.uint8 and crop.is_contiguous()


def test_decode_16_bit():
    assert np.array_equal(np.asarray(data.decode(GOOD["16-bit png"]))[..., 0], np.asarray(GREY_16) // 257)
    assert np.asarray(data.decode(encoded(GREY_16, "TIFF"))).max() == 1199 * 54 // 257
    assert np.asarray(data.decode(encoded(Image.new("I", (4, 4), 70_000), "TIFF"))).min() == 255


@pytest.mark.parametrize("pixels, expected", [
    ([0, .5, 1], [0, 128, 255]), ([0, .1, .2], [0, 26, 51]),  # what lies in [0, 1] is taken as it is
    ([0, 100, 200], [0, 128, 255]), ([-100, 0, 100], [0, 128, 255]), ([0, math.nan, math.inf], [0, 0, 0])])
def test_decode_float(pixels, expected):
    image = encoded(Image.fromarray(np.array([pixels], np.float32)), "TIFF")
    assert Image.open(io.BytesIO(image)).mode == "F"
    assert np.asarray(data.decode(image))[0].tolist() == [[value] * 3 for value in expected]


@pytest.mark.parametrize("name", BAD)
def test_decode_bad(name):
    with pytest.raises(Exception):
        data.decode(BAD[name])


def test_size_is_checked_before_decoding():
    with pytest.raises(ValueError, match="8000 x 6251"):
        data.open_image(BAD["huge"])
    assert data.open_image(png_header(8000, 6250)).size == (8000, 6250)  # 50 megapixels are allowed
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(Exception):
            data.decode(png_header(10_000, 10_000))


def test_decode_takes_what_comes(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded(picture()))
    expected = np.asarray(picture())
    for image in (encoded(picture()), tmp_path / "a.png", str(tmp_path / "a.png"), picture()):
        assert np.array_equal(np.asarray(data.decode(image)), expected)


def test_crop_box_statistics():
    rng = random.Random(0)
    boxes = [data.crop_box(1000, 900, (.2, .7), rng) for _ in range(4000)]
    area = np.array([h * w / 9e5 for _, _, h, w in boxes])
    ratio = np.log([w / h for _, _, h, w in boxes]) / math.log(4 / 3)
    for values, low, high in ((area, .2, .7), (ratio, -1, 1)):  # uniform: compare with its quantiles
        found, expected = np.quantile(values, np.linspace(.1, .9, 9)), np.linspace(low, high, 11)[1:-1]
        assert np.abs(found - expected).max() < .05 * (high - low)
    assert all(t >= 0 and l >= 0 and t + h <= 900 and l + w <= 1000 for t, l, h, w in boxes)
    for place in ([t / (900 - h) for t, _, h, _ in boxes if h < 800],
                  [l / (1000 - w) for _, l, _, w in boxes if w < 900]):
        assert abs(np.mean(place) - .5) < .03 and min(place) < .02 and max(place) > .98
    assert data.crop_box(1000, 10, (.9, 1), rng) == (0, 493, 10, 13)  # too long for any try: the middle
    assert data.crop_box(10, 1000, (.9, 1), rng) == (493, 0, 13, 10)
    assert data.crop_box(1, 1, (.5, 1), rng) == (0, 0, 1, 1)


def test_resize_crop_equals_torchvision():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8))
    for box in ((0, 0, 90, 120), (10, 20, 31, 47), (5, 6, 64, 64), (3, 4, 5, 6)):
        expected = TF.resized_crop(image, *box, [64, 64], InterpolationMode.BICUBIC)
        found = data.resize_crop(image, box, 64)
        assert (found.int() - TF.pil_to_tensor(expected).int()).abs().max() <= 1
    assert torch.equal(data.resize_crop(image, (5, 6, 64, 64), 64), TF.pil_to_tensor(image)[:, 5:69, 6:70])


@pytest.mark.parametrize("size", [(64, 64), (100, 64), (64, 131), (97, 211), (333, 250), (40, 30), (60, 130), (7, 200)])
def test_center_crop_equals_torchvision(size):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))
    expected = TF.pil_to_tensor(TF.center_crop(TF.resize(image, 64, InterpolationMode.BICUBIC), 64))
    assert torch.equal(data.center_crop(image, 64), expected)


def test_center_crop_of_a_long_picture_takes_no_memory():
    assert data.center_crop(Image.new("RGB", (1_000_000, 2)), 224).shape == (3, 224, 224)  # resized whole: 75 GB


def test_random_resized_crop():
    image = picture(64, 64)
    assert torch.equal(data.random_resized_crop(image, 64, (1, 1), random.Random(0), (1, 1)), TF.pil_to_tensor(image))
    box = data.crop_box(64, 64, (.3, .6), random.Random(5))
    assert torch.equal(data.random_resized_crop(encoded(image), 20, (.3, .6), random.Random(5)),
                       data.resize_crop(image, box, 20))


@pytest.mark.parametrize("size", [(64, 50), (300, 400)])
def test_several_crops_are_those_of_several_calls(size, monkeypatch):
    """The same pixels from the same random numbers, but decoded once."""
    image, one, many = encoded(picture(*size), "JPEG"), random.Random(3), random.Random(3)
    expected = torch.stack([data.random_resized_crop(image, 48, (.3, 1), one) for _ in range(3)])
    decode, calls = data.decode, []
    monkeypatch.setattr(data, "decode", lambda *args: calls.append(args) or decode(*args))
    found = data.random_resized_crops(image, 48, (.3, 1), many, 3)
    assert found.shape == (3, 3, 48, 48) and found.dtype == torch.uint8 and len(calls) == 1
    assert many.random() == one.random()
    if size[0] == 64:  # decoded whole in both cases
        assert torch.equal(found, expected)
    assert (found.float() - expected.float()).abs().mean() < 3


def test_several_crops_are_decoded_for_the_smallest(monkeypatch):
    boxes = iter([(0, 0, 800, 800), (10, 20, 100, 200)])
    monkeypatch.setattr(data, "crop_box", lambda *args: next(boxes))
    decode, asked = data.decode, []
    monkeypatch.setattr(data, "decode", lambda image, enough: asked.append(enough) or decode(image, enough))
    data.random_resized_crops(encoded(picture(800, 800), "JPEG"), 50, (0, 1), None, 2)
    assert asked == [(200, 400)]


def test_reduced_decoding():
    image = encoded(picture(1601, 1200), "JPEG", quality=95)
    assert data.decode(image, (200, 150)).size == (201, 150) and data.decode(image, (202, 150)).size == (401, 300)
    for seed in range(8):
        quick = data.random_resized_crop(image, 64, (.1, 1), random.Random(seed))
        full = data.random_resized_crop(data.decode(image), 64, (.1, 1), random.Random(seed))
        assert (quick.float() - full.float()).abs().mean() < 3


def test_preprocess():
    preprocess = data.Preprocess(24)
    assert (preprocess.size, preprocess.mean, preprocess.std) == (24, data.MEAN, data.STD)
    pixels = data.center_crop(picture(), 24)
    expected = TF.normalize(pixels / 255, data.MEAN, data.STD)
    assert torch.allclose(preprocess(picture()), expected, atol=1e-6)
    assert preprocess(encoded(picture())).dtype == torch.float32
    batch = torch.stack([pixels, pixels.flip(0)])[None]  # any leading dimensions
    for images in (batch, batch / 255, batch.double() / 255):
        found = preprocess.normalize(images)
        assert torch.allclose(found[0, 0].float(), expected, atol=1e-5)
        assert found.dtype == (torch.float64 if images.dtype == torch.float64 else torch.float32)
    assert data.Preprocess(8, (0, 0, 0), (1, 1, 1)).normalize(pixels).max() <= 1


# colours

def one_by_one(image, params):
    """The same by torchvision's functions on one float picture."""
    flip, brightness, contrast, saturation, hue, grey, sigma, solarize = params.tolist()
    x = image / 255
    x = TF.hflip(x) if flip else x
    x = TF.adjust_contrast(TF.adjust_brightness(x, brightness), contrast)
    x = TF.adjust_hue(TF.adjust_saturation(x, saturation), hue)
    x = TF.rgb_to_grayscale(x, 3) if grey else x
    radius = max(1, round(image.shape[-1] / 22.4))
    x = TF.gaussian_blur(x, [2 * radius + 1] * 2, [sigma * image.shape[-1] / 224] * 2) if sigma else x
    return TF.solarize(x, .5) if solarize else x


@pytest.mark.parametrize("size", [16, 33, 112])
def test_augment_equals_torchvision(size):
    images = torch.randint(0, 256, (24, 3, size, size), dtype=torch.uint8,
                           generator=torch.Generator().manual_seed(size))
    images[:4] = images[:4, :1]  # grey pictures: no hue
    rng = random.Random(size)
    params = torch.stack([data.color_params(rng, .5, (.8, .4, .4, .4, .3), .3, .5, .3) for _ in images])
    params[0] = torch.tensor([1, .3, 1.9, 0, -.5, 0, 2, 1])
    found = data.augment(images, params)
    assert found.dtype == torch.float32 and found.min() >= 0 and found.max() <= 1
    for image, row, x in zip(images, params, found):
        expected = one_by_one(image, row)
        near_threshold = ((one_by_one(image, row * torch.tensor([1.] * 7 + [0])) - .5).abs() < 1e-4) & (row[7] > 0)
        assert (x - expected).abs().masked_fill(near_threshold, 0).max() < 2e-5
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(data.augment(images, params), found)


@pytest.mark.parametrize("column, value", [(0, 1), (1, .6), (2, 1.4), (3, 0), (4, .2), (5, 1), (6, 1.5), (7, 1)])
def test_augment_one_at_a_time(column, value):
    """Each parameter does something, to its own picture alone."""
    images = torch.randint(0, 256, (3, 3, 56, 56), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    identity = torch.tensor([0., 1, 1, 1, 0, 0, 0, 0]).repeat(3, 1)
    assert torch.equal(data.augment(images, identity), images / 255)
    identity[1, column] = value
    found = data.augment(images, identity)
    assert torch.equal(found[::2], images[::2] / 255)
    assert (found[1] - images[1] / 255).abs().mean() > .02
    assert (found[1] - one_by_one(images[1], identity[1])).abs().max() < 2e-5


def test_color_params():
    rng = random.Random(0)
    assert data.color_params(rng).tolist() == [0, 1, 1, 1, 0, 0, 0, 0] and data.color_params(rng).dtype == torch.float32
    rows = torch.stack([data.color_params(rng, .5, (.8, .4, .3, 1.5, .1), .2, .3, .4) for _ in range(4000)])
    share = (rows != torch.tensor([0., 1, 1, 1, 0, 0, 0, 0])).float().mean(0)
    assert torch.allclose(share, torch.tensor([.5, .8, .8, .8, .8, .2, .3, .4]), atol=.03)
    jittered, blurred = rows[rows[:, 1] != 1], rows[rows[:, 6] > 0, 6]
    for column, low, high in ((1, .6, 1.4), (2, .7, 1.3), (3, 0, 2.5), (4, -.1, .1)):
        values = jittered[:, column]
        assert low <= values.min() < low + .02 * (high - low) and high - .02 * (high - low) < values.max() <= high
        assert abs(values.mean() - (low + high) / 2) < .03 * (high - low)
    assert .1 <= blurred.min() < .13 and 1.97 < blurred.max() <= 2
    twice = [data.color_params(random.Random(7), .5, (1, .4, .4, .4, .1)) for _ in range(2)]
    assert torch.equal(*twice)


@pytest.mark.gpu
def test_augment_on_the_device_without_a_sync():
    images, rng = torch.randint(0, 256, (16, 3, 64, 64), dtype=torch.uint8), random.Random(0)
    params = torch.stack([data.color_params(rng, .5, (.8, .4, .4, .4, .1), .2, .5, .2) for _ in images])
    expected, on_device = data.Preprocess(64).normalize(data.augment(images, params)), (images.cuda(), params.cuda())
    data.Preprocess(64).normalize(data.augment(*on_device))  # libraries are loaded
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.autocast("cuda", torch.bfloat16):
            found = data.Preprocess(64).normalize(data.augment(*on_device))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    difference = (found.cpu() - expected).abs()
    assert difference.median() < 1e-5 and (difference > 1e-3).float().mean() < 1e-3


def test_grid(tmp_path):
    images = [torch.full((3, 20, 20), 10 * i, dtype=torch.uint8) for i in range(6)]
    images.append(torch.zeros(3, 30, 100, dtype=torch.uint8))
    captions = ["short", "a longer caption " * 9, "日本語 🙂", "", "two\nlines", "é", "wide"]
    data.grid(images, captions, tmp_path / "grid.png", columns=3)
    sheet = np.asarray(Image.open(tmp_path / "grid.png"))
    assert sheet.shape[1] == 3 * 168 and sheet.shape[0] % 3 == 0
    assert (sheet[4:164, 168 + 4:168 + 164] == 10).all() and (sheet[4:164, 168 + 164:168 + 168] == 255).all()
    assert (sheet[165:175, :168] < 128).any()  # letters below the first picture
    data.grid([torch.zeros(3, 300, 200, dtype=torch.uint8)], ["one"], tmp_path / "one.png")
    assert Image.open(tmp_path / "one.png").width == 4 * 208


# small text files

def test_read_lines(tmp_path):
    path = tmp_path / "lines"
    for content, lines in ((b"a\nb\n", ["a", "b"]), ("\ufeffa\r\nb".encode(), ["a", "b"]), (b"a\rb\r", ["a", "b"]),
                           (b"a\n\nb\n\n \n\t\n", ["a", "", "b"]), (b"", []), (b"\n \n", []), (b" a \n", [" a "]),
                           ("a\x0bb\x85c\u2028d\x0ce\n".encode(), ["a\x0bb\x85c\u2028d\x0ce"])):
        path.write_bytes(content)
        assert data.read_lines(path, "--x") == lines
    for content in ("café".encode("latin-1"), "a".encode("utf-16"), "ab".encode("utf-16-le"), b"PK\3\4\0\0"):
        path.write_bytes(content)
        with pytest.raises(SystemExit, match="--x: the file .*lines is not UTF-8; save it as UTF-8"):
            data.read_lines(path, "--x")
    with pytest.raises(SystemExit, match="--x: the file .*none cannot be read: No such file"):
        data.read_lines(tmp_path / "none", "--x")
    with pytest.raises(SystemExit, match="--x: the file .* cannot be read: Is a directory"):
        data.read_lines(tmp_path, "--x")


def test_classnames_beside_a_tar(tmp_path):
    image = encoded(picture())
    write_tar(tmp_path / "0.tar", [("a.png", image), ("a.cls", "1")])
    for content, names in (("\ufeffcat\r\ndog\r\n\r\n", ["cat", "dog"]), ("cat\rdog\n \n", ["cat", "dog"])):
        (tmp_path / "classnames.txt").write_bytes(content.encode())
        assert data.TarDataset(str(tmp_path), None, "cls").classnames == names
    for content, message in ((b"cat\n\ndog", "blank line between names"),
                             ("café".encode("latin-1"), "classnames.txt is not UTF-8")):
        (tmp_path / "classnames.txt").write_bytes(content)
        with pytest.raises(SystemExit, match=message):
            data.TarDataset(str(tmp_path), None, "cls")


# tars

def test_expand(tmp_path):
    assert data.expand("a{08..11}.tar::b.tar") == ["a08.tar", "a09.tar", "a10.tar", "a11.tar", "b.tar"]
    assert data.expand("{x,y/z}-{0..1}.tar") == ["x-0.tar", "x-1.tar", "y/z-0.tar", "y/z-1.tar"]
    for name in ("b.tar", "a.tar", "c.txt", "[d].tar"):
        (tmp_path / name).touch()
    names = [str(tmp_path / name) for name in ("[d].tar", "a.tar", "b.tar")]
    assert data.expand(str(tmp_path)) == data.expand(f"{tmp_path}/*.tar") == sorted(names)
    assert data.expand(f"{tmp_path}/*.zip") == [f"{tmp_path}/*.zip"]  # so that it is missed by its name, as in bash


@pytest.mark.parametrize("pattern, paths", [  # each list is bash's
    ("{a/{0..1},b/{0..2}}.tar", "a/0.tar a/1.tar b/0.tar b/1.tar b/2.tar"),
    ("{a,b}{1,2}", "a1 a2 b1 b2"), ("{a,{b,c}d,e}", "a bd cd e"), ("x{,y}", "x xy"), ("{1..2,a}", "1..2 a"),
    ("{8..11}", "8 9 10 11"), ("{08..11}", "08 09 10 11"), ("{1..010}", "001 002 003 004 005 006 007 008 009 010"),
    ("{3..1}", "3 2 1"), ("{0..10..5}", "0 5 10"), ("{10..00..4}", "10 06 02"), ("{-02..1}", "-02 -01 000 001"),
    ("{a..e..2}", "a c e"), ("{c..a}", "c b a"), ("{0..1}-{01..02}", "0-01 0-02 1-01 1-02"), ("{5..5..0}", "5"),
    ("{a}", "{a}"), ("a{}b", "a{}b"), ("{a{0..1}}", "{a0} {a1}"), ("{a,b", "{a,b"), ("a,b}", "a,b}"),
    ("{a}{b,c}", "{a}b {a}c"),
    ("{a,{b,c}", "{a,b {a,c"), ("{a,b}}", "a} b}"), ("{1..b}", "{1..b}"), ("{1.2}", "{1.2}"),
    ("{..}{0..1}", "{..}0 {..}1"),
    ("{{0..1}..c}", "{{0..1}..c}"), ("{{a,b}..c}", "a..c b..c"), ("a.{x,y}.{00..01}", "a.x.00 a.x.01 a.y.00 a.y.01")])
def test_braces_as_in_bash(pattern, paths):
    assert data.braces(pattern) == paths.split()
    assert data.expand(f"no/{pattern}::z") == [f"no/{path}" for path in paths.split()] + ["z"]


def test_paths_with_any_characters(tmp_path, monkeypatch):
    """What exists as it is written is read, also below or beside a pattern."""
    for name in ("{a,b} {0..1}", "cut [0-9]", "a::b", "é\n~*?"):
        (tmp_path / name).mkdir()
        for number in "01":
            write_tar(tmp_path / name / f"{number}.tar", samples(number))
        folder = str(tmp_path / name)
        assert data.expand(f"{folder}/0.tar") == [f"{folder}/0.tar"]
        assert data.expand(folder) == [f"{folder}/0.tar", f"{folder}/1.tar"]
        assert texts(data.open_dataset(folder, None)) == ["caption 0", "caption 1"]
    assert data.expand(f"{tmp_path}/cut [0-9]/*.tar") == [f"{tmp_path}/cut [0-9]/{n}.tar" for n in "01"]
    assert data.expand(f"{tmp_path}/cut [0-9]/{{1..0}}.tar") == [f"{tmp_path}/cut [0-9]/{n}.tar" for n in "10"]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert data.expand("~/cut [0-9]/0.tar::~/x*.tar") == [f"{tmp_path}/cut [0-9]/0.tar", f"{tmp_path}/x*.tar"]
    (tmp_path / "t.CSV").write_text("filepath,title\n0.png,one\n")
    (tmp_path / "0.png").write_bytes(encoded(picture()))
    dataset = data.open_dataset("~/t.CSV", crop_16)
    assert texts(dataset) == ["one"] and dataset[0, 0]["skipped"] == 0


def test_grouping(tmp_path):
    image = encoded(picture(), "JPEG")
    path = write_tar(tmp_path / "0.tar", [
        ("a.jpg", image), ("a.json", "{}"), ("a.txt", "plain"),
        ("dir.v1/b.PNG", image), ("dir.v1/b.TXT", "upper case, a dot in the folder"),
        ("c.d.jpg", image), ("c.txt", "the picture's extension is d.jpg"),
        ("./e.webp", image), ("./e.txt", "dot slash"),
        ("f.txt", "text first"), ("f.jpeg", image),
        ("__meta__.jpg", image), ("__a.b__", "metadata"), ("README", "no dot"), (".hidden", "a dot first"),
        ("x/.jpg", image),
        ("g.jpg", image), ("._g.jpg", b"junk of a mac"), ("g.txt", "something skipped between"),
        ("h.jpg", image), ("i.jpg", image), ("h.txt", "not its neighbour"),
        ("j.jpg", image), ("j.txt", "once"), ("j.jpg", image), ("j.txt", "twice"),
        ("k.png", b"png"), ("k.jpg", b"jpg"), ("k.webp", b"webp"), ("k.txt", "jpg goes first"),
        ("l.gif", image), ("l.txt", "no such picture"),
        ("m.jpg", image), ("m.txt", ""), ("n.jpg", image), ("n.txt", " \n\u3000"),
        ("o.jpg", image), ("o.txt", "café".encode("latin-1")),
        ("p.jpg", image), ("p.txt", "  kept as it is \n"), ("q.txt", "no picture")])
    dataset = data.TarDataset(path, None)
    assert texts(dataset) == ["plain", "upper case, a dot in the folder", "dot slash", "text first",
                              "something skipped between",
                              "once", "twice", "jpg goes first", "  kept as it is \n"]
    keys = ("a", "dir.v1/b", "./e", "f", "g", "j", "j", "k", "p")
    assert [dataset.key(i) for i in range(9)] == ["0/" + key for key in keys]
    assert dataset.image(0) == image and dataset.image(7) == b"jpg" and dataset.label(0) is None
    hint = " (the members of a sample must stand next to each other, and its key ends at the first dot)"
    assert dataset.skipped == {
        "no picture beside .txt" + hint: 2, "no picture beside .gif .txt" + hint: 1, "no caption beside .jpg" + hint: 3,
        "no picture beside .*.jpg .txt" + hint: 1, "blank caption": 2, "caption not UTF-8": 1}


def test_reasons_stay_few(tmp_path):
    path = write_tar(tmp_path / "0.tar", samples("a") + [(f"{i}.x{i}", b"") for i in range(50)])
    skipped = data.TarDataset(path, None).skipped
    assert len(skipped) == 10 and sum(skipped.values()) == 50 and skipped["other reasons"] == 41


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_tar_flavours(tmp_path, form):
    """Long and non-ASCII names, a folder, a link: offsets are those at which the bytes lie."""
    long = "folder/" * (12 if form == tarfile.USTAR_FORMAT else 40) + "n" * 90
    keys = ["plain", long, "caf\udce9"]  # \udce9: latin-1
    if form != tarfile.USTAR_FORMAT:
        keys += ["ünï/日本", "x" * 300]
    path = write_tar(tmp_path / "0.tar", samples(keys), form)
    with tarfile.open(path, "a", format=form) as tar:
        for name, kind in (("f.jpg", tarfile.DIRTYPE), ("g.jpg", tarfile.SYMTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "plain.jpg"
            tar.addfile(info)
    dataset = data.TarDataset(path, None)
    assert [dataset.key(i) for i in range(len(dataset))] == ["0/" + key for key in keys]
    assert texts(dataset) == [caption_of(key) for key in keys]
    images = [content for name, content in samples(keys) if name.endswith("jpg")]
    assert [dataset.image(i) for i in range(len(keys))] == images


@pytest.mark.parametrize("cut", [10, 700, 1500, 2000])
def test_truncated_tar(tmp_path, cut):
    """Only samples that are there whole are kept, wherever the end is: in data, padding or a header."""
    path = write_tar(tmp_path / "0.tar", samples("abcd"))
    with tarfile.open(path) as tar:
        ends = [m.offset_data + m.size for m in tar.getmembers()]
        start = tar.getmember("c.jpg").offset
    os.truncate(path, start + cut)
    dataset = data.TarDataset(path, None)
    assert texts(dataset) == ["caption a", "caption b"] + ["caption c"] * (ends[5] <= start + cut)
    assert dataset.skipped["damaged, truncated or compressed tar"] == 1
    two = data.TarDataset(write_tar(tmp_path / "1.tar", samples("a")) + "::" + path, None)
    assert len(two) == len(dataset) + 1 and two.skipped == dataset.skipped


def test_truncated_in_the_picture(tmp_path):
    path = write_tar(tmp_path / "0.tar", samples("a") + samples("b")[::-1])  # b's caption comes first
    with tarfile.open(path) as tar:
        os.truncate(path, tar.getmember("b.jpg").offset_data + 300)
    dataset = data.TarDataset(path, None)
    assert texts(dataset) == ["caption a"] and dataset.skipped["cut off by the end of the tar"] == 1


def test_damaged_shard_is_left_out(tmp_path):
    (tmp_path / "0.tar").write_bytes(b"<html>not found</html>" * 100)
    (tmp_path / "1.tar").write_bytes(b"")
    write_tar(tmp_path / "2.tar", samples("ab"))
    dataset = data.TarDataset(str(tmp_path), None)
    assert texts(dataset) == ["caption a", "caption b"]
    assert dataset.skipped == {"damaged, truncated or compressed tar": 2}
    assert dataset.key(1) == "2/b"


@pytest.mark.parametrize("make, message", [
    (lambda p: p / "nowhere", "no .*nowhere"), (lambda p: p / "nowhere.tsv", "no .*nowhere.tsv"),
    (lambda p: p, r"no .*/\*\.tar; data are"),
    (lambda p: write_tar(p / "empty.tar", []), "it is empty"), (lambda p: f"{p}/a{{0..3}}.tar", "no .*a0.tar"),
    (lambda p: write_tar(p / "pictures.tar", [("a.jpg", b"."), ("b.jpg", b".")]),
     "2 x no caption beside .jpg .*next to")])
def test_nothing_there(tmp_path, make, message):
    with pytest.raises(SystemExit, match=message):
        data.open_dataset(str(make(tmp_path)), None)


def test_class_tars(tmp_path):
    image = encoded(picture())
    write_tar(tmp_path / "0.tar", [("a.png", image), ("a.cls", "1\n"), ("a.txt", "one\n\ntwo\n"),
                                   ("b.png", image), ("b.cls", "0"),
                                   ("c.png", image), ("c.txt", "no class"), ("d.png", image), ("d.cls", "cat")])
    (tmp_path / "classnames.txt").write_text("cat\ndog\n")
    dataset = data.TarDataset(str(tmp_path), None, require="cls")
    assert [dataset.label(i) for i in range(len(dataset))] == [1, 0] and dataset.classnames == ["cat", "dog"]
    assert dataset.captions(0) == ["one", "two"] and dataset.captions(1) == [] and [*dataset.skipped.values()] == [1, 1]
    assert any(reason.startswith("no class beside .png .txt") for reason in dataset.skipped)
    # the other way to read the same files
    assert texts(data.TarDataset(str(tmp_path), None)) == ["one\n\ntwo\n", "no class"]
    with pytest.raises(SystemExit, match="class"):
        data.TarDataset(write_tar(tmp_path / "1.tar", samples("a")), None, require="cls")


def test_index_is_made_once_and_anew_for_new_files(tmp_path, monkeypatch):
    path = write_tar(tmp_path / "0.tar", samples("ab"))
    data.TarDataset(path, None)
    with monkeypatch.context() as context:
        context.setattr(data, "scan_tar", lambda path, require: pytest.fail("scanned again"))
        assert texts(data.TarDataset(path, None)) == ["caption a", "caption b"]
    os.replace(write_tar(tmp_path / "new.tar", samples("xyz")), path)
    dataset = data.TarDataset(path, None)
    assert texts(dataset) == ["caption x", "caption y", "caption z"]
    assert Image.open(io.BytesIO(dataset.image(2))).size == (40, 30)


def slow_scan(path, log):
    with open(log, "a") as file:
        file.write("scan\n")
    time.sleep(.5)
    return data.scan_tar(path, "txt")


def make_slowly(path, log, results):
    results.put(str(data.make_index([path], partial(slow_scan, log=log), "slow")))


def test_two_processes_make_one_index(tmp_path):
    path, log = write_tar(tmp_path / "0.tar", samples("ab")), tmp_path / "log"
    fork = multiprocessing.get_context("fork")
    results = fork.Queue()
    processes = [fork.Process(target=make_slowly, args=(path, log, results)) for _ in range(2)]
    [process.start() for process in processes]
    [process.join() for process in processes]
    assert results.get(timeout=5) == results.get(timeout=5) and log.read_text() == "scan\n"


def test_cache_that_cannot_be_written(tmp_path, monkeypatch):
    path = write_tar(tmp_path / "0.tar", samples("ab"))
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(SystemExit, match="XDG_CACHE_HOME"):
        data.TarDataset(path, None)


def test_no_home(tmp_path, monkeypatch):
    def home():
        raise RuntimeError("Could not determine home directory.")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(data.Path, "home", home)
    with pytest.raises(SystemExit, match="no home folder.*XDG_CACHE_HOME"):
        data.TarDataset(write_tar(tmp_path / "0.tar", samples("a")), None)


@pytest.mark.parametrize("name", ["0.tar", "0.csv"])
def test_a_file_that_must_not_be_read(tmp_path, monkeypatch, name):
    def refuse(path, *_):
        raise PermissionError(13, "Permission denied", path)
    monkeypatch.setattr(data, "scan_table", refuse)
    monkeypatch.setattr(data.tarfile, "open", refuse)
    (tmp_path / name).touch()
    with pytest.raises(SystemExit, match=f"--data: a file cannot be read: .*Permission denied.*{name}"):
        data.open_dataset(str(tmp_path / name), None)


def test_a_folder_named_as_a_tar(tmp_path):
    (tmp_path / "x.tar").mkdir()
    with pytest.raises(SystemExit, match=r"there is no .*x.tar"):
        data.open_dataset(str(tmp_path), None)


def test_dataset_travels_light(tmp_path):
    """What a spawned worker gets is paths: the size of the pickle does not grow with the data."""
    dataset = data.open_dataset(write_tar(tmp_path / "0.tar", samples(range(400))), crop_16)
    parcel = pickle.dumps(dataset)
    assert len(parcel) < 2000 and pickle.loads(parcel).key(399) == "0/399"
    assert torch.equal(pickle.loads(parcel)[7, 5]["images"], dataset[7, 5]["images"])
    assert pickle.loads(pickle.dumps(data.collate)) is data.collate
    assert isinstance(data.mapped(dataset.index / "rows.npy").base, np.memmap)


# tables

@pytest.mark.parametrize("name, lines, expected", [
    ("a.tsv", 'title\tfilepath\n"quoted\tp/0.jpg\nplain,\rwith "quotes"\tp/1.jpg\n \tp/2.jpg\nno path\n',
     [("p/0.jpg", ['"quoted']), ("p/1.jpg", ['plain,\rwith "quotes"'])]),
    ("b.csv", 'filepath,title,other\r\np/0.jpg,"a, b ""c""\nand more",1\r\np/1.jpg,two,2\r\np/2.jpg,,3\r\np/3.jpg\r\n',
     [("p/0.jpg", ['a, b "c"\nand more']), ("p/1.jpg", ["two"])]),
    ("tabs.csv", "\ufefffilepath\ttitle\np/0.jpg\tone,\"\np/1.jpg\ttwo\r\n\tp/2.jpg\np/2.jpg\n",
     [("p/0.jpg", ['one,"']), ("p/1.jpg", ["two"])]),
    ("c.jsonl", '{"filename": "p/0.jpg", "caption": "one"}\n'
     '{"filename": "p/1.jpg", "caption": ["é", "", "two"], "url": ""}\n'
     '{"filename": "p/2.jpg", "caption": []}\nnot json\n', [("p/0.jpg", ["one"]), ("p/1.jpg", ["é", "two"])])])
def test_tables(tmp_path, name, lines, expected):
    (tmp_path / name).write_bytes(lines.encode())
    (tmp_path / "p").mkdir()
    (tmp_path / "p/1.jpg").write_bytes(encoded(picture(), "JPEG"))
    dataset = data.open_dataset(str(tmp_path / name), crop_16)
    assert [(dataset.key(i), dataset.captions(i)) for i in range(len(dataset))] == expected
    assert sum(dataset.skipped.values()) == 4 - len(expected)
    assert dataset[1, 5]["skipped"] == 0 and dataset[1, 5]["images"].shape == (3, 16, 16) and dataset.label(0) is None
    assert pickle.loads(pickle.dumps(dataset)).captions(1) == expected[1][1]


def read_table(path, content):
    """[(key, caption)] of a table, and what was left out."""
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    dataset = data.open_dataset(str(path), None)
    return [(dataset.key(i), *dataset.captions(i)) for i in range(len(dataset))], dataset.skipped


TSV = "title\tfilepath\n"


@pytest.mark.parametrize("name, content, rows", [
    ("pandas.tsv", TSV + 'plain\ta.jpg\n"a 12"" record"\tb.jpg\n"two\nlines"\tc.jpg\n"tab\there"\td.jpg\n'
     '"a\tb\nc"\te.jpg\n"""all"""\tf.jpg\n',
     [("a.jpg", "plain"), ("b.jpg", 'a 12" record'), ("c.jpg", "two\nlines"), ("d.jpg", "tab\there"),
      ("e.jpg", "a\tb\nc"),
      ("f.jpg", '"all"')]),
    ("quoted.tsv", '"title"\t"filepath"\r\n"one, \r\ntwo"\t"a.jpg"\r\n"x"\t"b.jpg"',
     [("a.jpg", "one, \r\ntwo"), ("b.jpg", "x")]),
    ("path_first.tsv", 'filepath\ttitle\na.jpg\t"x\ny\tz"\nb.jpg\t"\n\nq"\n',
     [("a.jpg", "x\ny\tz"), ("b.jpg", "\n\nq")]),
    # raw quotes, as in open_clip's table of CC3M: no row is swallowed
    ("raw.tsv", TSV + '"open\ta.jpg\nsay "hi" now\tb.jpg\n"to" be "\tc.jpg\nends"\td.jpg\n"\te.jpg\n""x\tf.jpg\n',
     [("a.jpg", '"open'), ("b.jpg", 'say "hi" now'), ("c.jpg", '"to" be "'), ("d.jpg", 'ends"'), ("e.jpg", '"'),
      ("f.jpg", '""x')]),
    ("apart.tsv", TSV + '"begins\ta.jpg\nplain\tb.png\nends"\tc.jpg\nlast\td.jpg\n',
     [("a.jpg", '"begins'), ("b.png", "plain"), ("c.jpg", 'ends"'), ("d.jpg", "last")]),
    ("no_extension.tsv", TSV + '"begins\ta/1\nends"\ta/2\n', [("a/1", '"begins'), ("a/2", 'ends"')]),
    ("mixed.tsv", TSV + '"two\nlines"\ta.jpg\n"open\tb.jpg\na "raw" one\tc.jpg\n"three\n\nlines"\td.jpg\n',
     [("a.jpg", "two\nlines"), ("b.jpg", '"open'), ("c.jpg", 'a "raw" one'), ("d.jpg", "three\n\nlines")]),
    ("open.csv", 'filepath,title\na.jpg,"never closed\nb.jpg,two\nc.jpg,"three, 3"\n',
     [("a.jpg", '"never closed'), ("b.jpg", "two"), ("c.jpg", "three, 3")]),
    ("index.csv", ',filepath,title\n0,a.jpg,one\n1,b.jpg,two,\n', [("a.jpg", "one"), ("b.jpg", "two")]),
    ("excel.csv", "\ufefffilepath;title\r\na.jpg;one, two\r\nb.jpg;\"x;y\"\r\n",
     [("a.jpg", "one, two"), ("b.jpg", "x;y")]),
    ("mac.csv", 'filepath,title\ra.jpg,one\rb.jpg,"two\nlines"\r', [("a.jpg", "one"), ("b.jpg", "two\rlines")]),
    ("nul.csv", "filepath,title\na.jpg,o\0ne\n\n \n\nb.jpg,\u2028two\x85\n",
     [("a.jpg", "o\0ne"), ("b.jpg", "\u2028two\x85")]),
    ("LOUD.JSONL", '\ufeff{"filename": "a.jpg", "caption": "one"}\r\n\r\n{"filename": "b.jpg", "caption": "two"}\n',
     [("a.jpg", "one"), ("b.jpg", "two")]),
    ("mac.jsonl", '{"filename": "a.jpg", "caption": "one"}\r{"filename": "b.jpg", "caption": "two"}',
     [("a.jpg", "one"), ("b.jpg", "two")])])
def test_tables_as_others_write_them(tmp_path, name, content, rows):
    found, skipped = read_table(tmp_path / name, content)
    assert found == rows and sum(skipped.values()) == (name == "nul.csv")  # a line of one space


def test_any_cell_survives_csv(tmp_path):
    """What the csv module writes, by tabs or commas, comes back."""
    rng = random.Random(0)
    rows = [(f"{i}.jpg", "x" + "".join(rng.choices('ab",;\t\n\' ', k=rng.randint(1, 12)))) for i in range(2000)]
    for name, delimiter in (("a.tsv", "\t"), ("a.csv", ",")):
        for order in (1, -1):
            text = io.StringIO()
            csv.writer(text, delimiter=delimiter, lineterminator="\n").writerows(
                row[::order] for row in [("filepath", "title"), *rows])
            assert read_table(tmp_path / name, text.getvalue()) == (rows, {})


def test_rows_that_are_left_out_are_counted(tmp_path):
    found, skipped = read_table(tmp_path / "a.csv", "filepath,title\na.jpg,one\nb.jpg,a man, smiling\nc.jpg\n,four\n")
    assert found == [("a.jpg", "one")] and skipped == {
        "more cells than the header has: a caption with a delimiter must stand in quotes": 1,
        "no file name or no caption": 2}
    found, skipped = read_table(tmp_path / "a.jsonl", '{"filename": "a.jpg", "caption": "one"}\n{"filename": "b.jpg"')
    assert found == [("a.jpg", "one")] and skipped == {"damaged or truncated line of JSON": 1}


@pytest.mark.parametrize("name, content, message", [
    ("a.csv", b"", "it is empty"), ("a.tsv", b"\n \n", "it is empty"), ("a.jsonl", b"\n", "it is empty"),
    ("a.csv", "filepath,title\na.jpg,x\n".encode("utf-16"), "is not UTF-8"),
    ("a.json", b"[{}]", "is no tar; data are .*jsonl"),
    ("a.parquet", b"PAR1", "is no tar; data are"), ("a.tar.gz", b"\x1f\x8b", r"a.tar.gz is no tar; .*uncompressed"),
    ("a.zip", b"PK", "is no tar"), ("a.arrow", b"", "is no tar"), ("a.tar", b"\x1f\x8b", "compressed tar")])
def test_other_formats(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SystemExit, match=message):
        data.open_dataset(str(tmp_path / name), None)


def test_table_with_bad_bytes_or_header(tmp_path):
    (tmp_path / "a.tsv").write_bytes(b"filepath\ttitle\n0.jpg\tcaf\xe9\n1.jpg\tgood\n")
    dataset = data.TableDataset(str(tmp_path / "a.tsv"), None)
    assert texts(dataset) == ["good"] and dataset.skipped == {"caption not UTF-8": 1}
    (tmp_path / "b.csv").write_text("path,caption\n0.jpg,one\n")
    with pytest.raises(SystemExit, match="filepath and title.*caption"):
        data.TableDataset(str(tmp_path / "b.csv"), None)
    (tmp_path / "c.tsv").write_text("filepath\ttitle\n0.jpg\t\n")
    with pytest.raises(SystemExit, match="caption"):
        data.TableDataset(str(tmp_path / "c.tsv"), None)


def test_one_of_several_captions(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"filename": "0.png", "caption": ["a", "bb", "ccc"]}) + "\n")
    (tmp_path / "0.png").write_bytes(encoded(picture()))
    dataset = data.TableDataset(str(tmp_path / "a.jsonl"), lambda image, caption, rng: {"n": len(caption)})
    seen = [dataset[0, seed]["n"] for seed in range(300)]
    assert min(Counter(seen).values()) > 60 and set(seen) == {1, 2, 3}
    assert seen == [dataset[0, seed]["n"] for seed in range(300)]


# what is asked for

def test_limit_and_subset(tmp_path):
    path = write_tar(tmp_path / "0.tar", samples("abcdef")) + "::" + write_tar(tmp_path / "1.tar", samples("ab"))
    assert [key for key, _ in data.captions(path, limit=3)] == ["0/a", "0/b", "0/c"]
    (tmp_path / "keys").write_text("1/a\n0/e\n0/c\nunknown\n")
    dataset = data.open_dataset(path, crop_16, subset=tmp_path / "keys")
    assert [dataset.key(i) for i in range(len(dataset))] == ["0/c", "0/e", "1/a"]
    assert texts(pickle.loads(pickle.dumps(dataset))) == ["caption c", "caption e", "caption a"]
    assert dataset[1, 0]["tokens"][0] == len("caption e")
    assert len(data.open_dataset(path, None, limit=2, subset=tmp_path / "keys")) == 2
    (tmp_path / "keys").write_text("a\nb\n")
    with pytest.raises(SystemExit, match="keys names no sample.*0/a"):
        data.open_dataset(path, None, subset=tmp_path / "keys")
    with pytest.raises(SystemExit, match="--subset"):
        data.open_dataset(path, None, subset=tmp_path / "none")
    assert len(data.open_dataset("toy", None, limit=7)) == 7
    assert len(data.open_dataset("toy", None)) == data.TOY["pairs"]


def test_subset_with_captions(tmp_path):
    path = write_tar(tmp_path / "0.tar", samples("abcdef"))
    lines = ["\ufeff0/e\tnew  ", "", "0/a\t", "0/c", "0/d\tone", "0/d\ttwo\tthree\u2028\x85!", "0/b\t", "0/b\tother",
             "0/c", "none\tx", ""]
    (tmp_path / "s").write_bytes("\r\n".join(lines).encode())
    dataset = data.open_dataset(path, crop_16, subset=tmp_path / "s")
    expected = {"0/a": ["caption a"], "0/b": ["caption b", "other"], "0/c": ["caption c"],
                "0/d": ["one", "two\tthree\u2028\x85!"], "0/e": ["new"]}
    for dataset in (dataset, pickle.loads(pickle.dumps(dataset))):
        assert {dataset.key(i): dataset.captions(i) for i in range(len(dataset))} == expected
    assert dataset.skipped == {"key of --subset that is not in the data": 1}
    drawn = {int(dataset[3, seed]["tokens"][0]) for seed in range(30)}
    assert drawn == {3, 12} and dataset[4, 0]["tokens"][0] == 3
    flat = [(key, text) for key, texts in expected.items() for text in texts]
    assert list(data.captions(path, subset=tmp_path / "s")) == flat
    assert list(data.captions(path, 2, None, tmp_path / "s")) == flat[:3]


def test_subset_of_a_table_and_of_the_toy(tmp_path):
    (tmp_path / "t.csv").write_text("filepath,title\na.jpg,one\nb.jpg,two\na.jpg,three\n")
    (tmp_path / "s").write_text("a.jpg\n")
    assert list(data.captions(str(tmp_path / "t.csv"), subset=tmp_path / "s")) == [("a.jpg", "one"), ("a.jpg", "three")]
    (tmp_path / "s").write_text("a.jpg\tnew\na.jpg\n")
    found = [text for _, text in data.captions(str(tmp_path / "t.csv"), subset=tmp_path / "s")]
    assert found == ["new", "one", "new", "three"]
    keys = [key for key, _ in data.captions("toy", 9)]
    (tmp_path / "s").write_text("".join(data.subset_lines([(keys[3], "a new one"), (keys[5], "")])))
    (key, new), (other, own) = data.captions("toy", 9, subset=tmp_path / "s")
    assert (key, new, other) == (keys[3], "a new one", keys[5]) and own == dict(data.captions("toy", 9))[keys[5]]


def test_subset_lines():
    assert [*data.subset_lines([("a b", " x\t y\n\u2028z "), ("é", "")])] == ["a b\tx y z\n", "é\t\n"]
    for key in ("a\tb", "a\nb", "a\rb", " ", "caf\udce9"):
        with pytest.raises(SystemExit, match="--subset: the key"):
            list(data.subset_lines([("good", ""), (key, "")]))


def test_keys_are_those_of_key(tmp_path):
    path = write_tar(tmp_path / "0.tar", samples(["a", "é/b", "caf\udce9"]))
    path += "::" + write_tar(tmp_path / "1.tar", samples("xy"))
    for dataset in (data.open_dataset(path, None), data.open_dataset("toy", None, 5)):
        dataset.keep = np.array([4, 0, 2])
        assert list(dataset.keys()) == [dataset.key(i) for i in range(3)]


# what the data are

def test_fingerprint(tmp_path, monkeypatch):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        for name in "01":
            write_tar(tmp_path / folder / f"{name}.tar", samples([name + "a", name + "b", name + "c"]))
    (tmp_path / "s").write_text("0/0b\n1/1a\n")
    (tmp_path / "all").write_text("".join(f"{key}\n" for key, _ in data.captions(str(tmp_path / "one"))))
    (tmp_path / "new").write_text("0/0b\tx\n1/1a\n")
    (tmp_path / "newer").write_text("0/0b\ty\n1/1a\n")

    def of(spec, **options):
        return data.fingerprint(data.open_dataset(spec, None, **options))
    one, two = f"{tmp_path}/one", f"{tmp_path}/two"
    monkeypatch.chdir(tmp_path)
    whole = of(one)
    assert {of(two), of("one"), of(f"{one}/{{0,1}}.tar"), of(f"{one}/0.tar::two/1.tar"), of(one, limit=6),
            of(one, subset=tmp_path / "all")} == {whole} and type(whole) is str
    assert of(one, limit=3) == of(f"{one}/0.tar")
    assert of(one, subset=tmp_path / "s") == of(two, subset=tmp_path / "s")
    others = [of(f"{one}/1.tar::{one}/0.tar"), of(one, limit=5), of(one, subset=tmp_path / "s"), of(f"{one}/0.tar"),
              of(one, subset=tmp_path / "new"), of(one, subset=tmp_path / "newer"),
              of(one, subset=tmp_path / "new", limit=1)]
    other_picture = ("1c.jpg", encoded(picture(41), "JPEG"))
    write_tar(tmp_path / "two/1.tar", samples(["1a", "1b"]) + [other_picture, ("1c.txt", "caption 1c")])
    others.append(of(two))  # another size of a picture
    write_tar(tmp_path / "two/1.tar", samples(["1a", "1b"]) + [samples(["1c"])[0], ("1c.txt", "caption 1cc")])
    others.append(of(two))
    assert len({whole, *others}) == len(others) + 1


def test_fingerprint_of_tables_and_of_the_toy(tmp_path):
    found = []
    for name, content in (("a.csv", "filepath,title\na.jpg,one\nb.jpg,two\n"),
                          ("b.tsv", "title\tfilepath\none\ta.jpg\ntwo\tb.jpg\n"),
                          ("c.csv", "filepath,title\na.jpg,one\nb.jpg,six\n"),
                          ("d.csv", "filepath,title\nb.jpg,two\na.jpg,one\n")):
        (tmp_path / name).write_text(content)
        found.append(data.fingerprint(data.open_dataset(str(tmp_path / name), None)))
    assert found[0] == found[1] and len({*found}) == 3
    key, _ = next(data.captions("toy"))
    (tmp_path / "s").write_text(key)
    toys = [data.ToyDataset(9, None), data.ToyDataset(8, None), data.ToyDataset(9, None, "test"),
            data.ToyDataset(9, None, seed=1),
            data.open_dataset("toy", None, 9, tmp_path / "s")]
    assert len({data.fingerprint(toy) for toy in toys}) == 5
    assert data.fingerprint(data.ToyDataset(9, crop_16)) == data.fingerprint(toys[0])


def test_names(tmp_path, monkeypatch):
    (tmp_path / "cc3m").mkdir()
    write_tar(tmp_path / "cc3m/0.tar", samples("ab"))
    assert len(data.open_dataset("cc3m", None, root=tmp_path)) == 2
    monkeypatch.setenv("CLIP_DATA", str(tmp_path))
    assert list(data.captions("cc3m")) == [("0/a", "caption a"), ("0/b", "caption b")]
    with pytest.raises(SystemExit, match="cc12m.*--data-root"):
        data.open_dataset("cc12m", None)


# samples that fail

@pytest.mark.filterwarnings("ignore:Palette images")
def test_run_over_every_kind_of_bad_sample(tmp_path):
    """Good, odd and bad pictures: batches keep their size, the count is right, two runs agree."""
    middle = bytearray(NOISE)
    middle[len(NOISE) // 2:len(NOISE) // 2 + 20] = b"\x55" * 20
    kinds = {**GOOD, **BAD, "corrupt": bytes(middle)}
    members = [m for i, (name, content) in enumerate(kinds.items())
               for m in [(f"{i}.jpg", content), (f"{i}.txt", name)]]
    path = write_tar(tmp_path / "0.tar", members + [("x.jpg", b""), ("x.txt", b"\xff\xfe")])
    dataset = data.open_dataset(path, crop_16)
    assert len(dataset) == len(kinds) and dataset.skipped == {"caption not UTF-8": 1}
    runs = []
    for workers in (0, 2):
        batches = data.EpochBatches(len(dataset), len(kinds) // 3)
        runs.append(list(data.loader(dataset, batches, workers)))
    for a, b in zip(*runs):
        assert a["images"].shape == (len(kinds) // 3, 3, 16, 16) and all(torch.equal(a[key], b[key]) for key in a)
    bad = {i for i, name in enumerate(kinds) if name in BAD}
    asked = [i for batch in data.EpochBatches(len(dataset), len(kinds) // 3) for i, _ in batch]
    used, skipped = (torch.cat([b[name] for b in runs[0]]).tolist() for name in ("index", "skipped"))
    assert not bad & {*used} and used != asked
    for i, j, n in zip(asked, used, skipped):
        steps = next(k for k in range(11) if (i + 7919 * k) % len(kinds) not in bad)
        assert (j, n) == ((i + 7919 * steps) % len(kinds), steps)


class Brittle(data.Pairs):
    """Numbers whose picture fails where told so."""

    def __init__(self, length, fails):
        self.keep, self.fails = range(length), fails
        self.transform = lambda image, caption, rng: {"value": torch.tensor(int(image)), "draw": rng.random()}

    def key(self, i):
        return f"key {i}"

    def captions(self, i):
        return ["one"]

    def image(self, i):
        if i in self.fails:
            raise OSError("unreadable")
        return str(i).encode()


def test_replacement_goes_on_ten_times():
    chain = [(3 + 7919 * k) % 1000 for k in range(11)]
    item = Brittle(1000, chain[:10])[3, 5]
    assert (item["index"], item["skipped"], item["value"]) == (chain[10], 10, chain[10])
    assert item["draw"] == random.Random(5).random()
    with pytest.raises(data.Unreadable, match=f"key {chain[10]}: OSError.*unreadable"):
        Brittle(1000, chain)[3, 5]


@pytest.mark.parametrize("length, fails, used, skipped", [
    (7919, [11], 12, 1), (7919, [11, 12], 13, 2), (7919, [7918], 0, 1),  # 7919 further on is itself
    (2 * 7919, [11], 11 + 7919, 1), (2 * 7919, [11, 11 + 7919], 12, 2), (2 * 7919, [11, 11 + 7919, 12], 12 + 7919, 3),
    (7920, [11], 10, 1), (3, [1], (1 + 7919) % 3, 1), (1000, [3], 922, 1)])  # the rule as it always was
def test_replacement_goes_round_no_circle(length, fails, used, skipped):
    item = Brittle(length, fails)[fails[0], 0]
    assert (item["index"], item["skipped"]) == (used, skipped)


@pytest.mark.parametrize("workers", (0, 1))
def test_unreadable_data_ends_with_a_sentence(workers):
    loader = data.loader(Brittle(1000, range(1000)), data.EpochBatches(1000, 8), workers)
    with pytest.raises(SystemExit, match="^eleven samples failed.*unreadable.*data.py PATH$"):
        next(iter(loader))


@pytest.mark.slow
def test_an_exception_ends_the_process_though_workers_are_deaf():
    code = ("import data\n"
            "batches = iter(data.loader(data.ToyDataset(64, lambda *a: {}), data.EpochBatches(64, 8), 1))\n"
            "next(batches)\n"
            "raise KeyError('the traceback keeps batches alive')")
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert process.returncode == 1 and process.stderr.rstrip().endswith("'the traceback keeps batches alive'")


@pytest.mark.parametrize("skipped, seen, stops", [(50, 100, False), (51, 100, True), (50, 1000, False),
                                                  (51, 1000, True),
                                                  (4000, 100_000, False), (5001, 100_000, True), (0, 0, False)])
def test_check_skipped(skipped, seen, stops):
    if stops:
        with pytest.raises(SystemExit, match=str(skipped)):
            data.check_skipped(skipped, seen)
    else:
        data.check_skipped(skipped, seen)


# order

def flat(batches):
    return [sample for batch in batches for sample in batch]


@pytest.mark.slow
def test_epoch():
    batches = data.EpochBatches(103, 10)
    first = flat(batches)
    indices, seeds = zip(*first)
    assert len(batches) == 10 == len(list(batches))
    assert len({*indices}) == 100 == len({*seeds}) and {*indices} <= {*range(103)}
    assert flat(batches) == first == flat(data.EpochBatches(103, 10)) and list(indices) != sorted(indices)
    batches.epoch = 1
    second = flat(batches)
    assert not {*seeds} & {seed for _, seed in second} and [i for i, _ in second] != list(indices)
    other = flat(data.EpochBatches(103, 10, seed=1))
    assert not {*seeds} & {seed for _, seed in other}
    assert [i for i, _ in other] not in (list(indices), [i for i, _ in second])
    assert all(type(n) is int and 0 <= n < 2 ** 63 for sample in first for n in sample)
    with pytest.raises(SystemExit, match="--batch-size 20 .* 19 pairs"):
        data.EpochBatches(19, 10, world=2)


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_side_by_side_are_one_process(world):
    ranks = [data.EpochBatches(103, 12 // world, 3, rank, world) for rank in range(world)]
    joined = [sum(parts, []) for parts in zip(*ranks, strict=True)]
    assert joined == list(data.EpochBatches(103, 12, 3))


def test_resume_at_a_step():
    batches = data.EpochBatches(50, 4, rank=1, world=2)
    batches.epoch = 2
    whole = list(batches)
    batches.start = 4
    assert list(batches) == whole[4:] and len(batches) == len(whole) == 6


def test_indices_and_stream():
    indices = np.array([7, 7, 3, 100, 5, 9, 2, 7])
    one, two = (flat(data.EpochBatches(200, 2, indices=indices, stream=stream)) for stream in (0, 1))
    assert sorted(i for i, _ in one) == sorted(indices) and [i for i, _ in one] == [i for i, _ in two]
    assert not {seed for _, seed in one} & {seed for _, seed in two} and len({seed for _, seed in one}) == 8
    positions = [i for i, _ in flat(data.EpochBatches(8, 2))]
    assert [i for i, _ in one] == indices[positions].tolist()


# loader

@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_workers_make_no_difference(tmp_path):
    """0, 1, 3 workers, over two epochs with workers that live on, and after a resume: the same tensors."""
    path = write_tar(tmp_path / "0.tar", samples(range(30)))
    dataset, runs = data.open_dataset(path, crop_16), []
    for workers in (0, 1, 3):
        batches, run = data.EpochBatches(len(dataset), 4), []
        loader = data.loader(dataset, batches, workers)
        assert loader.persistent_workers == (workers > 0)
        for batches.epoch in range(2):
            run += list(loader)
        batches.start = 5
        runs.append(run + list(loader))
    assert len(runs[0]) == 7 + 7 + 2
    for run in runs:
        for a, b in zip(runs[0], run, strict=True):
            assert a.keys() == b.keys() == {"images", "tokens", "index", "skipped"}
            assert all(torch.equal(a[key], b[key]) for key in a)
    for a, b in zip(runs[0][12:14], runs[0][14:]):
        assert torch.equal(a["images"], b["images"])
    first, second = ({i: image for batch in runs[0][at:at + 7]
                      for i, image in zip(batch["index"].tolist(), batch["images"])} for at in (0, 7))
    assert all(not torch.equal(first[i], second[i]) for i in {*first} & {*second})  # another epoch, other crops


@pytest.mark.parametrize("used, context, length", [(2, 77, 16), (16, 77, 16), (17, 77, 24), (32, 77, 32), (33, 77, 48),
                                                   (64, 77, 64),
                                                   (65, 77, 77), (77, 77, 77), (18, 20, 20), (9, 12, 12)])
def test_tokens_are_cut(used, context, length):
    tokens = torch.zeros(context, dtype=torch.int64)
    tokens[[0, used - 1]] = 5
    short = torch.zeros(context, dtype=torch.int64)
    short[:2] = 5
    batch = data.collate([{"tokens": short, "index": 1}, {"tokens": tokens, "index": 2}])
    assert batch["tokens"].shape == (2, length) and batch["tokens"].sum() == 20 and batch["index"].tolist() == [1, 2]
    views = data.collate([{"tokens": torch.stack([short, tokens])}] * 3)["tokens"]
    assert views.shape == (3, 2, length) and views.is_contiguous()


def test_default_workers(monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setattr(data.os, "cpu_count", lambda: 64)
    for cores, ranks, cpu, cuda, toy_cuda in ((64, 1, 12, 12, 12), (64, 8, 8, 8, 8), (4, 1, 4, 4, 4), (4, 8, 0, 1, 1),
                                              (1, 1, 1, 1, 1)):
        monkeypatch.setattr(data.os, "sched_getaffinity", lambda pid: range(cores), raising=False)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
        assert data.default_workers("cc3m", "cpu") == cpu
        assert data.default_workers("cc3m", torch.device("cuda", 1)) == cuda
        assert data.default_workers("toy", "cuda") == toy_cuda
        assert data.default_workers("toy", torch.device("cpu")) == data.default_workers("toy-busy", "cpu") == 0
    monkeypatch.delattr(data.os, "sched_getaffinity")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert data.default_workers("x.csv", "cpu") == 8


def test_loader_pins_for_cuda_alone():
    batches = data.EpochBatches(8, 2)
    devices = (None, "cpu", torch.device("cuda", 0))
    assert [data.loader([], batches, 0, device).pin_memory for device in devices] == [False, False, True]


# command line

def test_command_line(tmp_path, capsys, monkeypatch):
    path = write_tar(tmp_path / "0.tar", samples("abcde") + [("x.jpg", b""), ("y.jpg", BAD["html"]),
                                                             ("y.txt", "a caption")])
    data.main([path, "--bpe", "train", "--out", str(tmp_path / "sheet.png")])
    text = capsys.readouterr().out
    assert all(part in text for part in ("6 pairs in 1 tars", "1 x no caption beside .jpg", "pairs/s", "1 failed"))
    assert "all up to" in text and Image.open(text.split()[-1]).size[0] > 600
    monkeypatch.setattr(data, "BPE_URL", (tmp_path / "none").as_uri())
    monkeypatch.setattr(data, "BPE_FILE", "none")
    data.main([path, "--limit", "2", "--out", str(tmp_path / "sheet.png")])
    text = capsys.readouterr().out
    assert "2 pairs" in text and "cannot be downloaded" in text and "tokens" not in text
    with pytest.raises(SystemExit, match=f"there is no {tmp_path}/nowhere; data are"):
        data.main([str(tmp_path / "nowhere")])
    with pytest.raises(SystemExit, match="^0$"):
        data.main(["--help"])
