"""Pairs of a picture and a caption: where they come from, in which order, and how they become tensors.

    python data.py PATH      says what is there and what was left out, and writes a sheet of samples

One text, `--data` in all scripts, names a data set:

    toy, toy-busy, toy-zipf       small scenes that are drawn by code, without files
    cc3m, cc12m, yfcc15m          the folder of that name under --data-root
    a folder, or a pattern        webdataset tars (key.jpg beside key.txt); patterns such as cc3m/{0000..0575}.tar are
                                  expanded as by bash, and "::" joins several
    a .tsv or .csv                a table with the columns filepath and title
    a .jsonl                      one JSON object a line, with filename and caption (a text or a list of texts)

Files are indexed once, and the index is kept in the user's cache. A sample is then read by its number. So an epoch is a
permutation of numbers, and which samples a step sees does not depend on the number of ranks or workers, or on restarts.
Each sample gets a seed of its own for its crops and colours. A picture that cannot be read is replaced and counted.

The sections of this file: pictures, colours, tokens, what is made once for all ranks, data sets, the built-in data,
order and batches.
"""
import argparse
import atexit
import cmath
import colorsys
import csv
import fcntl
import glob
import gzip
import hashlib
import heapq
import html
import io
import json
import math
import multiprocessing
import os
import random
import re
import signal
import sys
import tarfile
import textwrap
import time
import unicodedata
import urllib.request
import warnings
from collections import Counter, defaultdict
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import lru_cache, partial
from itertools import takewhile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch.utils.data import DataLoader, Dataset, default_collate
from tqdm import tqdm

warnings.filterwarnings("ignore", module="PIL")  # decode and Pairs deal with odd pictures

# pictures

MEAN, STD = (.48145466, .4578275, .40821073), (.26862954, .26130258, .27577711)  # OpenAI's
MAX_PIXELS = 50_000_000


def open_image(image):
    """PIL picture from bytes, a path or a PIL picture. Only the header is read. ValueError above 50 megapixels."""
    if not isinstance(image, Image.Image):
        image = Image.open(io.BytesIO(image) if isinstance(image, bytes) else image)
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"{image.width} x {image.height} pixels, more than {MAX_PIXELS:,}")
    return image


def decode(image, enough=None):
    """RGB picture (PIL) from bytes, a path or a PIL picture: the first frame, without EXIF rotation.

    enough: (width, height) in pixels. A JPEG is decoded at 1/2, 1/4 or 1/8 of its size if the result is still at least
    this large. For a picture of 1600 pixels that is five times faster.
    """
    image = open_image(image)
    if enough:
        image.draft("RGB", enough)
    image.load()
    if image.mode.startswith("I"):  # 16-bit grey, which convert() would turn white
        image = Image.fromarray((np.asarray(image) // 257).clip(0, 255).astype(np.uint8))
    if image.mode == "F":  # floats, which convert() would clip
        # the range [low, high] becomes [0, 255]: it holds all pixels, and also 0 and 1
        pixels = np.nan_to_num(np.asarray(image, np.float64), posinf=0, neginf=0)
        low, high = min(0, pixels.min()), max(1, pixels.max())
        image = Image.fromarray(((pixels - low) / (high - low) * 255).round().astype(np.uint8))
    return image if image.mode == "RGB" else image.convert("RGB")


def crop_box(width, height, scale, rng, ratio=(3 / 4, 4 / 3)):
    """(top, left, height, width) of a random crop in pixels, by the rule of torchvision's RandomResizedCrop.

    scale: range of the crop's share of the area; ratio: range of width / height, drawn evenly on a log scale.
    """
    for _ in range(10):  # until a crop fits into the picture
        area, aspect = width * height * rng.uniform(*scale), math.exp(rng.uniform(*map(math.log, ratio)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return rng.randint(0, height - h), rng.randint(0, width - w), h, w
    # no crop did, which happens with long pictures: take the largest one in the middle that keeps within `ratio`
    w, h = min(width, round(height * ratio[1])), min(height, round(width / ratio[0]))
    return (height - h) // 2, (width - w) // 2, h, w


def resize_crop(image, box, size):
    """uint8 [3, size, size]: a box (top, left, height, width) of an RGB picture (PIL), resized bicubically.

    PyTorch can resize uint8 pixels that lie in memory in channels-last order. No value of the result differs from PIL's
    by more than 1 (of 255), and it takes half the time.
    """
    top, left, h, w = box
    pixels = torch.from_numpy(np.array(image.crop((left, top, left + w, top + h)))).permute(2, 0, 1)[None]
    return F.interpolate(pixels, (size, size), mode="bicubic", antialias=True)[0].contiguous()


def random_resized_crop(image, size, scale, rng, ratio=(3 / 4, 4 / 3)):
    """One crop, uint8 [3, size, size]: see random_resized_crops."""
    return random_resized_crops(image, size, scale, rng, 1, ratio)[0]


def random_resized_crops(image, size, scale, rng, count, ratio=(3 / 4, 4 / 3)):
    """uint8 [count, 3, size, size]: independent crops of one picture, which is bytes, a path or a PIL picture.

    crop_box draws them from rng, a random.Random. The picture is decoded once, at the fraction of its size that the
    smallest crop allows.
    """
    image = open_image(image)
    width, height = image.size
    boxes = [crop_box(width, height, scale, rng, ratio) for _ in range(count)]
    h, w = min(box[2] for box in boxes), min(box[3] for box in boxes)
    image = decode(image, (math.ceil(width * size / w), math.ceil(height * size / h)))
    x, y = image.width / width, image.height / height  # below 1 if decode has made the picture smaller
    boxes = [(int(top * y), int(left * x), max(1, round(h * y)), max(1, round(w * x))) for top, left, h, w in boxes]
    return torch.stack([resize_crop(image, box, size) for box in boxes])


def center_crop(image, size):
    """uint8 [3, size, size] from bytes, a path or a PIL picture, by torchvision's bicubic Resize and CenterCrop."""
    image = decode(image)
    x, y = (max(0, side - 32 * min(image.size)) // 2 for side in image.size)
    if x or y:  # one side is over 32 times the other: all of it, resized, may take gigabytes, so keep the middle
        image = image.crop((x, y, image.width - x, image.height - y))
    width, height = (int(size * side / min(image.size)) for side in image.size)
    left, top = round((width - size) / 2), round((height - size) / 2)
    image = image.resize((width, height), Image.BICUBIC).crop((left, top, left + size, top + size))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


class Preprocess:
    """The test-time transform of a model: bytes, a path or a PIL picture -> float32 [3, size, size], normalised."""

    def __init__(self, size, mean=MEAN, std=STD):
        self.size, self.mean, self.std = size, tuple(mean), tuple(std)

    def __call__(self, image):
        return self.normalize(center_crop(image, self.size))

    def normalize(self, images):
        """[..., 3, S, S], uint8 or float in [0, 1] -> float32 (float64 stays), on the device of the images."""
        x = images / 255 if images.dtype == torch.uint8 else images.to(torch.promote_types(images.dtype, torch.float32))
        # mean and std are made on the device, because the host would wait while it copies them there
        mean, std = (torch.stack([x.new_full((1, 1), value) for value in row]) for row in (self.mean, self.std))
        return (x - mean) / std  # mean and std are [3, 1, 1]


# colours: the worker draws parameters, one row a sample; the device applies them

def color_params(rng, flip=0., jitter=(0, 0, 0, 0, 0), grey=0., blur=0., solarize=0.):
    """float32 [8] for augment: flip, brightness, contrast, saturation, hue, grey, sigma of the blur, solarize.

    The row 0 1 1 1 0 0 0 0 changes nothing. The arguments flip, grey, blur and solarize are the probabilities of these
    four. jitter holds a probability, and then the ranges of brightness, contrast, saturation and hue as in
    torchvision's ColorJitter. With probability `blur`, sigma is drawn evenly from .1 to 2, in pixels of a picture of
    224 pixels. Otherwise sigma is 0, which means no blur.
    """
    probability, *ranges, hue = jitter
    factors = [1, 1, 1, 0]
    if rng.random() < probability:
        factors = [rng.uniform(max(0, 1 - r), 1 + r) for r in ranges] + [rng.uniform(-hue, hue)]
    sigma = rng.uniform(.1, 2) if rng.random() < blur else 0
    return torch.tensor([rng.random() < flip, *factors, rng.random() < grey, sigma, rng.random() < solarize]).float()


def augment(images, params):
    """uint8 [B, 3, S, S] and color_params [B, 8], on one device -> float32 [B, 3, S, S] in [0, 1]. No host sync.

    Order: brightness, contrast, saturation, hue, grey, blur, solarize (torchvision shuffles the first four). Most time
    is spent on reading and writing pixels, so the code makes few passes over them. A picture whose row of parameters
    changes nothing keeps its pixels exactly.
    """
    flip, brightness, contrast, saturation, hue, grey, sigma, solarize = params[..., None, None, None].unbind(1)
    images = torch.where(flip > 0, images.flip(-1), images)  # flipped as uint8, a quarter of fp32's memory
    x = (images / (255 / brightness)).clamp_(max=1)
    x.lerp_(luma(x.mean((2, 3), keepdim=True)), 1 - contrast).clamp_(0, 1)
    x.lerp_(luma(x), 1 - saturation).clamp_(0, 1)
    x = torch.where(hue == 0, x, shift_hue(x, hue))
    x.lerp_(luma(x), grey)
    x = gaussian_blur(x, sigma * x.shape[-1] / 224)
    # solarize 1: min(x, 1 - x) inverts the values above a half; solarize 0: min(x, 2 - x) is x, since x is at most 1
    return torch.minimum(x, 2 - solarize - x)


def luma(x):
    """Brightness [B, 1, S, S] of colours [B, 3, S, S]."""
    r, g, b = x.split(1, 1)
    return (.2989 * r).add_(g, alpha=.587).add_(b, alpha=.114)


def shift_hue(x, turns):
    """x [B, 3, S, S] in [0, 1] with the hue moved by `turns` [B, 1, 1, 1]: 1 is the whole colour circle."""
    r, g, b = x.split(1, 1)
    top, low = x.amax(1, keepdim=True), x.amin(1, keepdim=True)  # [B, 1, S, S]
    span = top - low
    red, green = top == r, top == g  # whether red, or green, is the largest value of a pixel
    hue = torch.where(red, g - b, torch.where(green, b - r, r - g)).div_(span.clamp(min=1e-12))
    hue += torch.where(red, 0., torch.where(green, 2., 4.))
    hue = hue.add_(6 * turns).remainder_(6)  # in sixths of a turn: red is 0, green 2, blue 4
    # the share of the span that red, green and blue get: 1 up to one sixth from the own hue, 0 from two sixths on
    shares = torch.cat([(hue - 3).abs_().sub_(1), 2 - (hue - 2).abs_(), 2 - (hue - 4).abs_()], 1).clamp_(0, 1)
    return torch.addcmul(low, span, shares)


def gaussian_blur(x, sigma):
    """x [B, 3, S, S], blurred with a sigma [B, 1, 1, 1] in pixels for each picture and mirrored at the edges.

    A blur along one side is a product with a matrix [S, S] whose row i holds the weights of the pixels around i. Where
    sigma is 0 the result is x itself.
    """
    S, radius = x.shape[-1], max(1, round(x.shape[-1] / 22.4))  # a kernel of 21 pixels at S = 224
    offset = torch.arange(-radius, radius + 1, device=x.device)  # of each kernel weight from the kernel's middle
    at = torch.arange(S, device=x.device)  # places of the pixels
    # the place that each weight reads for each pixel: at + offset, mirrored at 0 and at S - 1
    source = (S - 1) - ((S - 1) - (at[:, None] + offset).abs()).abs()  # [S, 2 radius + 1]
    with torch.autocast(x.device.type, enabled=False):
        # at sigma 1e-3 the weights of all neighbours are 0 in fp32, so the matrix is the identity
        kernel = torch.softmax(-offset ** 2 / (2 * sigma.flatten(1).clamp(min=1e-3) ** 2), 1)  # [B, 2 radius + 1]
        matrix = torch.einsum("bk,ikj->bij", kernel, (source[..., None] == at).to(kernel.dtype))  # [B, S, S]
        x = (x.flatten(1, 2) @ matrix.mT).view_as(x)  # along the width
        return matrix[:, None] @ x  # along the height


def grid(images, captions, path, columns=4):
    """Writes a PNG of pictures with their captions. images: list of uint8 [3, h, w]; small ones are enlarged."""
    width, cells = max(160, *(image.shape[2] for image in images)), []
    for image, caption in zip(images, captions):
        picture = Image.fromarray(image.permute(1, 2, 0).cpu().numpy())
        picture = picture.resize([side * (width // picture.width) for side in picture.size], Image.NEAREST)
        text = "\n".join(part for line in caption[:300].splitlines() for part in textwrap.wrap(line, width // 6))
        cell = Image.new("RGB", (width + 8, picture.height + 15 * text.count("\n") + 35), "white")
        cell.paste(picture, (4, 4))
        ImageDraw.Draw(cell).text((4, picture.height + 8), text.encode("latin-1", "replace"), "black")  # PIL's own font
        cells.append(cell)
    rows, height = math.ceil(len(cells) / columns), max(cell.height for cell in cells)
    sheet = Image.new("RGB", (columns * (width + 8), rows * height), "white")
    for i, cell in enumerate(cells):
        sheet.paste(cell, (i % columns * (width + 8), i // columns * height))
    sheet.save(f"{path}.tmp", "PNG")
    os.replace(f"{path}.tmp", path)


# tokens: CLIP's byte-pair encoding (Radford et al. 2021, clip/simple_tokenizer.py), with the standard library only.
# CLIP repairs texts with the library ftfy first; clean does what ftfy does to a text that is properly encoded.

BPE_FILE = "bpe_simple_vocab_16e6.txt.gz"
BPE_URL = "https://github.com/openai/CLIP/raw/main/clip/" + BPE_FILE
BPE_SHA256 = "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"
SOT, EOT = "<|startoftext|>", "<|endoftext|>"
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]  # bytes whose symbol is their own character
BYTES = PRINTABLE + [b for b in range(256) if b not in PRINTABLE]
SYMBOL = dict(zip(BYTES, map(chr, PRINTABLE + [*range(256, 324)])))  # 256 to 323 for the 68 others
BYTE = {symbol: b for b, symbol in SYMBOL.items()}


@lru_cache
def plain_characters():
    """Table for str.translate that does what ftfy does to ligatures, wide forms, quotes and control characters.

    The ligatures and wide forms in `wide` become plain letters. The control characters in `gone` are deleted. The
    characters 0x80 to 0x9F are read as bytes of Windows' cp1252.
    """
    wide = [0x132, 0x133, 0x149, *range(0x1C4, 0x1CD), *range(0x1F1, 0x1F4), *range(0xFB00, 0xFB07), 0x3000]
    gone = [*range(9), 0xB, *range(0xE, 0x20), 0x7F, *range(0x206A, 0x2070), 0xFEFF, *range(0xFFF9, 0xFFFD)]
    return ({c: unicodedata.normalize("NFKC", chr(c)) for c in wide + [*range(0xFF01, 0xFFF0)]} | dict.fromkeys(gone)
            | {c: bytes([c]).decode("cp1252", "ignore") or chr(c) for c in range(0x80, 0xA0)} | {0xFB05: "ſt"}
            | dict.fromkeys([0x2BC, *range(0x2018, 0x201C)], "'") | dict.fromkeys(range(0x201C, 0x2020), '"'))


def clean(text):
    """The text in lower case, with single spaces, HTML entities resolved and typographic characters made plain."""
    if "&" in text or not (text.isascii() and text.isprintable()):
        entities = "<" not in text  # ftfy keeps the entities of a text that may be HTML
        before = None
        while text != before:  # ftfy repeats its steps until they change nothing
            before = text
            if entities:
                text = html.unescape(text)
            text = unicodedata.normalize("NFC", text.translate(plain_characters()))
        text = html.unescape(html.unescape(text))  # CLIP's own step after ftfy
    return " ".join(text.split()).lower()


@lru_cache
def piece_pattern():
    """Pattern of the pieces that are encoded on their own: a contraction, letters, one digit, or other characters.

    CLIP's pattern uses the class \\p{N} of all numbers, which Python's module re lacks. The class \\d of re has the
    decimal digits only, so `number` adds the ranges of the other numbers: Unicode's categories Nl and No, such as Roman
    numerals. CLIP's pattern ignores case, so 's may also have a long s.
    """
    every = map(chr, range(sys.maxunicode + 1))
    runs = "".join(c if unicodedata.category(c) in ("Nl", "No") else " " for c in every).split()
    number = "".join(f"{run[0]}-{run[-1]}" for run in runs)
    return re.compile(rf"<\|startoftext\|>|<\|endoftext\|>|'[sſ]|'t|'re|'ve|'m|'ll|'d"
                      rf"|[^\W\d_{number}]+|[\d{number}]|(?:[^\w\s]|_)+")


def spell(piece):
    """Tuple of the symbols of a piece before any merge, one a byte. The last one gets </w>, the mark of its end."""
    *head, last = (SYMBOL[b] for b in piece.encode())
    return (*head, last + "</w>")


def join(word, pair):
    """The word, a tuple of symbols, in which each occurrence of the pair has become one symbol, from the left."""
    joined, i = [], 0
    while i < len(word):
        found = word[i:i + 2] == pair
        joined.append(pair[0] + pair[1] if found else word[i])
        i += 1 + found
    return tuple(joined)


class Tokenizer:
    """Byte-pair encoding: tokenizer(["a red circle"]) -> int64 [n, context].

    A row is SOT, the ids of the text, EOT and zeros. Of a text that is too long the last ids before EOT are left out.
    The vocabulary is, in the order of the ids: 256 bytes, 256 bytes that end a word, the merges, SOT and EOT. `merges`
    is a file in OpenAI's format (.txt or .gz) or a list of pairs. SystemExit if the file cannot be read as merges. The
    ids equal OpenAI's, except for texts with a broken encoding, which ftfy would mend.
    """

    def __init__(self, merges, context=77):
        if isinstance(merges, (str, os.PathLike)):
            try:
                with (gzip.open if str(merges).endswith(".gz") else open)(merges, "rt", encoding="utf-8") as file:
                    lines = file.read().split("\n")[1:48_895]  # a header, then 48,894 merges; CLIP ignores the rest
            except (OSError, EOFError, UnicodeDecodeError) as error:
                raise SystemExit(f"--bpe: {merges} holds no merges: {error}") from None
            merges = [line.split() for line in lines]
        self.merges, self.context = [tuple(pair) for pair in merges if pair], context
        if any(len(pair) != 2 for pair in self.merges):
            raise SystemExit(f"--bpe: a line of the merges must hold two symbols, as in OpenAI's {BPE_FILE}")
        symbols = [*SYMBOL.values()]
        self.symbols = symbols + [s + "</w>" for s in symbols] + ["".join(pair) for pair in self.merges] + [SOT, EOT]
        self.ids = {symbol: i for i, symbol in enumerate(self.symbols)}
        self.ranks = {pair: rank for rank, pair in enumerate(self.merges)}
        self.vocab_size, self.sot, self.eot = len(self.symbols), len(self.symbols) - 2, len(self.symbols) - 1
        self.cache = {}

    def encode(self, text):
        """List of the ids of a text, without SOT and EOT."""
        return [i for piece in piece_pattern().findall(clean(text)) for i in self.cache.get(piece) or self.merge(piece)]

    def merge(self, piece):
        """List of the ids of a piece.

        Two neighbouring symbols are joined as long as such a pair is one of the merges. Of several such pairs, the one
        that was learnt first is joined first.
        """
        word = (piece,) if piece in (SOT, EOT) else spell(piece)
        while len(word) > 1:
            pair = min(zip(word, word[1:]), key=lambda pair: self.ranks.get(pair, math.inf))
            if pair not in self.ranks:
                break
            word = join(word, pair)
        if len(self.cache) >= 50_000:
            self.cache.clear()
        self.cache[piece] = [self.ids[symbol] for symbol in word]
        return self.cache[piece]

    def decode(self, ids):
        """The text of ids, a list or a tensor [n], up to EOT and without SOT."""
        words = [self.symbols[i] for i in takewhile(lambda i: i != self.eot, map(int, ids)) if i != self.sot]
        words = [bytes(BYTE[c] for c in word.removesuffix("</w>")) + b" " * word.endswith("</w>") for word in words]
        return b"".join(words).decode("utf-8", "replace").strip()

    def __call__(self, texts):
        tokens = torch.zeros(len(texts), self.context, dtype=torch.int64)
        for row, text in zip(tokens, texts):
            ids = self.encode(text[:100 * self.context])[:self.context - 2]  # 1 MB with no space would take hours
            row[:len(ids) + 2] = torch.tensor([self.sot, *ids, self.eot])
        return tokens


def train_bpe(captions, size):
    """List of the merges (pairs) for a vocabulary of `size` ids. 514 ids are no merges: 2 x 256 bytes, SOT and EOT.

    Each merge is the most frequent pair; of equally frequent ones, the smallest (Sennrich et al. 2016). After a merge
    only the words that hold the pair are counted again. The changed counts are pushed onto a heap. It keeps the
    outdated ones too, which are dropped when they reach its top. There are fewer merges if no pairs are left.
    """
    pieces = Counter(p for text in captions for p in piece_pattern().findall(clean(text)) if p not in (SOT, EOT))
    words, counts = [spell(piece) for piece in pieces], list(pieces.values())
    total, holders = Counter(), defaultdict(set)  # of each pair: its count; numbers of the words that hold or held it

    def count(i, sign):
        for pair in zip(words[i], words[i][1:]):
            total[pair] += sign * counts[i]
            holders[pair].add(i)
            changed.add(pair)

    merges, heap, changed = [], [], set()
    for i in range(len(words)):
        count(i, 1)
    while len(merges) < size - 514:
        for pair in changed:
            heapq.heappush(heap, (-total[pair], pair))
        while heap and (not heap[0][0] or -heap[0][0] != total[heap[0][1]]):  # the count is 0, or outdated
            heapq.heappop(heap)
        if not heap:
            break
        merges.append(heapq.heappop(heap)[1])
        changed.clear()
        for i in [*holders.pop(merges[-1])]:
            count(i, -1)
            words[i] = join(words[i], merges[-1])
            count(i, 1)
    return merges


def find_tokenizer(bpe, spec, root=None):
    """The tokenizer for the data set `spec`.

    bpe: the path of a file of merges; "train", to learn merges from the captions of the data set; or None for the
    default. The default for the toy is merges learnt from its captions. For other data it is OpenAI's file, which is
    looked for in $CLIP_BPE, beside this file and in the user's cache, and is downloaded if it is in none of them.
    SystemExit if the merges cannot be had.
    """
    if bpe == "train" or (bpe is None and spec in TOYS):
        return Tokenizer(train_bpe((text for _, text in captions(spec, 100_000 if bpe else 5_000, root)), 8192))
    path = Path(bpe or os.environ.get("CLIP_BPE") or Path(__file__).with_name(BPE_FILE))
    if not path.is_file():
        if bpe or os.environ.get("CLIP_BPE"):
            raise SystemExit(f"--bpe or $CLIP_BPE: there is no file {path}")
        path = cache(BPE_FILE)
        with locked(path):
            if not path.exists():
                download(path)
    return Tokenizer(path)


def download(path):
    """Writes OpenAI's merges to `path`. SystemExit if they cannot be downloaded."""
    try:
        content = urllib.request.urlopen(BPE_URL, timeout=20).read()
    except OSError as error:
        raise SystemExit(f"{BPE_URL} cannot be downloaded ({error}): put the file (sha256 {BPE_SHA256}) beside "
                         f"data.py, name it by --bpe or $CLIP_BPE, or take --bpe train") from None
    if hashlib.sha256(content).hexdigest() != BPE_SHA256:
        raise SystemExit(f"{BPE_URL} has not the sha256 {BPE_SHA256}; try again, or take --bpe train")
    path.with_suffix(".part").write_bytes(content)
    os.replace(path.with_suffix(".part"), path)


# what is made once for all ranks

def read_lines(path, flag):
    """Lines of a small text file that the user named by `flag`: UTF-8 with or without BOM, line ends of any system.

    Only \\n, \\r\\n and \\r end a line. Blank lines at the end of the file are dropped, others are kept. SystemExit if
    the file cannot be read or is not UTF-8.
    """
    try:
        text = Path(path).expanduser().read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise SystemExit(f"{flag}: the file {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        text = "\0"  # refused in the next line
    if "\0" in text:  # UTF-16 without a byte-order mark can pass for UTF-8, but it holds zeros
        raise SystemExit(f"{flag}: the file {path} is not UTF-8; save it as UTF-8")
    lines = re.split("\r\n|\n|\r", text)
    while lines and not lines[-1].strip():
        lines.pop()
    return lines


def cores():
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def cache(name):
    """Path of a file in the user's cache: $XDG_CACHE_HOME, else ~/.cache. SystemExit if there is no home either."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "data-efficient-clip", name)
    except RuntimeError:  # no home folder, as in some containers
        raise SystemExit("the cache cannot be written (there is no home folder): set $XDG_CACHE_HOME to a folder that "
                         "can") from None


@contextmanager
def locked(path):
    """Lets one process at a time make `path`. The others wait, and then find what the first one has made."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(f"{path}.lock", "w")
    except OSError as error:
        raise SystemExit(f"the cache cannot be written ({error}): set $XDG_CACHE_HOME to a folder that can") from None
    with file:
        # not flock: processes that are forked under its lock hold it too, and they may outlive this one if it is killed
        fcntl.lockf(file, fcntl.LOCK_EX)
        yield


def make_index(paths, scan, kind):
    """Folder in the cache with an index of the files `paths`. The index is made if it is not there.

    scan(path) indexes one file. It returns rows int64 [n, k], one a sample; a text, as bytes, in which the texts of the
    samples are joined; and a Counter of what was left out. Column 0 of the rows is where a sample's text begins.

    The folder holds three files. rows.npy has the rows of all files, with one column more, the number of the file.
    text.npy has their texts, joined. skipped.json has the sum of the Counters. `kind` is a name for what scan does,
    since another scan makes another index. SystemExit if a file cannot be read.
    """
    state = [(os.path.abspath(path), os.path.getsize(path), os.stat(path).st_mtime_ns) for path in paths]
    folder = cache("index-" + hashlib.sha256(json.dumps([2, kind, state]).encode()).hexdigest()[:24])
    opened.cache_clear()  # a path may name another file by now
    with locked(folder):
        if folder.exists():
            return folder
        try:
            with ProcessPoolExecutor(min(len(paths), cores())) as pool:
                scans = (pool.map if len(paths) > 1 else map)(scan, paths)
                parts = list(tqdm(scans, "index", len(paths), leave=False, disable=None))
        except OSError as error:
            raise SystemExit(f"--data: a file cannot be read: {error}") from None
        rows, texts, skipped = zip(*parts)
        skipped, others = Counter(), sum(skipped, Counter()).most_common()
        for rank, (reason, count) in enumerate(others):  # a reason may name any extension, so only nine are kept
            skipped[reason if rank < 9 else "other reasons"] += count
        number = np.repeat(np.arange(len(paths)), [len(part) for part in rows])
        rows = np.column_stack([np.concatenate(rows), number])
        rows[:, 0] += np.cumsum([0, *map(len, texts)])[number]  # where the file's text begins in the joined one
        part = folder.with_suffix(".part")
        part.mkdir(exist_ok=True)
        np.save(part / "rows.npy", rows)
        np.save(part / "text.npy", np.frombuffer(b"".join(texts), np.uint8))
        (part / "skipped.json").write_text(json.dumps(skipped))
        os.replace(part, folder)
    return folder


@lru_cache
def mapped(path):
    """The array in a .npy file. All processes share its pages of memory."""
    return np.asarray(np.load(path, mmap_mode="r"))


@lru_cache(256)
def opened(path):
    """The file, opened. It is closed when it falls out of this function's cache."""
    return open(path, "rb", buffering=0)


def read(path, offset, size):
    """`size` bytes of a file from `offset` on. OSError if the file ends before.

    pread keeps no position in the file, so forked workers may share it.
    """
    content = os.pread(opened(path).fileno(), size, offset)
    if len(content) < size:
        raise OSError(f"{path} ends before byte {offset + size}")
    return content


# data sets

TABLES = (".tsv", ".csv", ".jsonl")
FORMATS = "data are a folder or pattern of tars (uncompressed), a .tsv, .csv or .jsonl"


class Unreadable(RuntimeError):
    """Eleven samples failed one after the other."""


class Pairs(Dataset):
    """Pictures with captions. dataset[index, seed] is the dict of transform(image bytes, caption, rng: random.Random).

    A sample that fails is replaced by the one 7919 further on, ten times at most; then Unreadable is raised. The dict
    also gets "index", the number of the sample used, and "skipped", the number of failures. Sample i has the number
    keep[i] in the index or in the toy; --subset and --limit shorten `keep`. `skipped` counts, by reason, what was left
    out. A subclass has own_captions(i) -> list of str, image(i) -> bytes, path or PIL picture, and key(i) -> str.
    """
    keep, skipped, classnames = range(0), {}, None
    # With captions in --subset: (text, starts). text (uint8) joins the captions of all samples. Those of sample i are
    # the lines of text[starts[i]:starts[i + 1]], and an empty line stands for the sample's own captions.
    replaced = None

    def __len__(self):
        return len(self.keep)

    def __getitem__(self, sample):
        index, seed = sample
        first = index  # where the steps of 7919 began
        for skipped in range(11):
            try:
                rng, texts = random.Random(seed), self.captions(index)
                text = rng.choice(texts) if len(texts) > 1 else "".join(texts)  # "" if there is none
                return self.transform(self.image(index), text, rng) | {"index": index, "skipped": skipped}
            except Exception as error:
                cause = f"{self.key(index)}: {error!r}"
                index = (index + 7919) % len(self)
                if index == first:  # back at the first sample, if the length is small or a multiple of 7919
                    index = first = (first + 1) % len(self)
        raise Unreadable(f"eleven samples failed one after the other; the last was {cause}")

    def captions(self, i):
        """List of the captions of sample i: its own, or those that --subset gives."""
        if self.replaced is None:
            return self.own_captions(i)
        text, starts = self.replaced
        lines = text[starts[i]:starts[i + 1]].tobytes().decode().split("\n")
        return [caption for line in lines for caption in ([line] if line else self.own_captions(i))]

    def keys(self):
        """Iterates over the keys of all samples."""
        return map(self.key, range(len(self)))

    def label(self, i):
        """Number of the class, or None."""


class Indexed(Pairs):
    """Pairs in files, found by the index that make_index makes.

    A row of the index is a sample. Column 0 says where the sample's text begins. This text begins with the sample's
    key, whose size in bytes is column 1. The last column is the number of the sample's file. `sizes` lists the columns
    that do not change when a sample is moved to another place or file, for fingerprint. A worker is sent only the path
    of the index, and maps the arrays into memory when it needs them.
    """

    def set_index(self, paths, scan, kind):
        self.index = make_index(paths, scan, kind)
        self.keep = range(len(mapped(self.index / "rows.npy")))
        self.skipped = json.loads((self.index / "skipped.json").read_text())
        if not self.keep:
            why = "; ".join(f"{n} x {reason}" for reason, n in self.skipped.items()) or "it is empty"
            more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
            raise SystemExit(f"no picture with a {'class' if kind == 'cls' else 'caption'} in {paths[0]}{more}: {why}")

    def row(self, i):
        return mapped(f"{self.index}/rows.npy")[self.keep[i]].tolist()

    def text(self, offset, size):
        return mapped(f"{self.index}/text.npy")[offset:offset + size].tobytes().decode("utf-8", "surrogateescape")

    def key(self, i):
        offset, size, *_, number = self.row(i)
        return self.prefix(number) + self.text(offset, size)

    def keys(self):
        rows, text = mapped(self.index / "rows.npy"), memoryview(mapped(self.index / "text.npy"))
        prefix = lru_cache(self.prefix)
        for first in range(0, len(self), 2 ** 16):  # many rows at once: five times faster than key(i)
            part = rows[np.asarray(self.keep[first:first + 2 ** 16])][:, [0, 1, -1]]
            for offset, size, number in zip(*part.T.tolist()):
                yield prefix(number) + str(text[offset:offset + size], "utf-8", "surrogateescape")

    def prefix(self, number):
        """What all keys of the file of this number begin with."""
        return ""


def braces(text):
    """List of the texts that bash makes of one with patterns such as {00..11}, {a..c}, {1..9..2}, {a,b} and {a{1,2},b}.

    A brace that is part of no pattern stays.
    """
    for start in [i for i, c in enumerate(text) if c == "{" and (i or text[1:2] != "}")]:  # bash keeps {} at the start
        # Find i, where the pattern that opens at `start` closes. depth: inner braces that are open. cuts: places of the
        # opening brace and of the commas outside inner braces. dots: whether ".." stands outside inner braces.
        depth, cuts, dots = 0, [start], False
        for i in range(start + 1, len(text)):
            if text[i] == "{":
                depth += 1
            elif text[i] == "}" and depth:
                depth -= 1
            elif text[i] == "}" and (len(cuts) > 1 or dots):  # a list or a range; in others the search goes on
                break
            elif text[i] == "," and not depth:
                cuts.append(i)
            elif text[i:i + 2] == ".." and text[i + 2:i + 3] != "}" and not depth:
                dots = True
        else:
            continue  # never closed
        if "," in text[start:i]:
            # what stands between two cuts may hold patterns itself
            parts = [part for a, b in zip(cuts, [*cuts[1:], i]) for part in braces(text[a + 1:b])]
        else:
            parts = brace_range(text[start + 1:i]) or [text[start:i + 1]]
        return [text[:start] + part + rest for part in parts for rest in braces(text[i + 1:])]
    return [text]


def brace_range(text):
    """List of the numbers or letters of a range such as 08..11, c..a or 0..9..2; empty if the text is no range."""
    if not (found := re.fullmatch(r"(-?\d+|[A-Za-z])\.\.(-?\d+|[A-Za-z])(?:\.\.(-?\d+))?", text)):
        return []
    first, last, step = found.groups()
    if first.isalpha() != last.isalpha():
        return []
    low, high = (ord(first), ord(last)) if first.isalpha() else (int(first), int(last))
    step = max(1, abs(int(step or 1)))
    numbers = range(low, high + 1, step) if low <= high else range(low, high - 1, -step)
    if first.isalpha():
        return [chr(number) for number in numbers]
    padded = any(re.match(r"-?0\d", end) for end in (first, last))
    width = max(len(first), len(last)) if padded else 0
    return [f"{number:0{width}d}" for number in numbers]


def expand(spec):
    """List of the paths that a text such as "a{08..11}.tar::b{x,y}.tar::folder/*.tar::folder" stands for.

    "::" separates parts, and each part is expanded as by bash. A folder stands for its tars. A path that exists as it
    is written is no pattern. A pattern that matches no file stays in the list, as bash leaves it.
    """
    paths = []
    for part in map(os.path.expanduser, [spec] if os.path.exists(spec) else spec.split("::")):
        for path in [part] if os.path.exists(part) else braces(part):
            if os.path.isdir(path):
                path = os.path.join(path, "*.tar")
            folder = path if os.path.exists(path) else os.path.dirname(path)
            while folder and not os.path.exists(folder):
                folder = os.path.dirname(folder)
            pattern = glob.escape(folder) + path[len(folder):]  # [ and * in an existing folder's name are no pattern
            paths += sorted(glob.glob(pattern)) or [path]
    return paths


def scan_tar(path, require):
    """Index of a tar: rows int64 [n, 7], the keys joined as bytes, and a Counter of what was left out, by reason.

    A row is: offset and size of the key in the joined keys, offset and size of the picture in the tar, offset and size
    of the caption in the tar, and the class or -1. A sample is a run of members whose names agree up to the first dot,
    as in webdataset; an extension that comes again begins a new sample, as in open_clip. `require` is the extension
    ("txt" or "cls") without which a sample is left out.
    """
    groups, rows, keys, skipped = [], [], bytearray(), Counter()

    def lacks(what, group):
        # the member c.d.jpg has the key c and the extension d.jpg, which is shown as .*.jpg
        seen = sorted({"." + re.sub(r".*\.", "*.", extension) for extension in group})
        return ValueError(f"no {what} beside {' '.join(seen)} (the members of a sample must stand next to each other, "
                          "and its key ends at the first dot)")

    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                folder, slash, name = member.name.rpartition("/")
                stem, dot, extension = name.partition(".")
                key, extension = folder + slash + stem, extension.lower()
                if not (member.isreg() and stem and dot) or re.fullmatch("__.*__", name):
                    continue
                if not groups or groups[-1][0] != key or extension in groups[-1][1]:
                    groups.append((key, {}))
                groups[-1][1][extension] = member.offset_data, member.size
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(512) != bytes(512):  # a tar that is whole ends in zeros
                raise tarfile.ReadError
    except tarfile.TarError:
        if not groups and not path.lower().endswith(".tar"):
            raise SystemExit(f"--data: {path} is no tar; {FORMATS}") from None
        skipped["damaged, truncated or compressed tar"] += 1
    for key, group in groups:
        image = next((group[e] for e in ("jpg", "png", "jpeg", "webp") if e in group), None)
        text, label = group.get("txt", (0, 0)), group.get("cls", (0, 0))  # if there is none, the first 0 bytes
        try:
            if max(offset + size for offset, size in group.values()) > os.path.getsize(path):
                raise ValueError("cut off by the end of the tar")
            if not image:
                raise lacks("picture", group)
            if require == "txt" and "txt" not in group:
                raise lacks("caption", group)
            if require == "txt" and not read(path, *text).decode().strip():
                raise ValueError("blank caption")
            label = read(path, *label).strip()
            label = int(label) if label.isdigit() else -1
            if require == "cls" and label < 0:
                raise lacks("class", group) if "cls" not in group else ValueError("class that is no number")
        except ValueError as error:
            skipped["caption not UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)] += 1
            continue
        key = key.encode("utf-8", "surrogateescape")
        rows.append((len(keys), len(key), *image, *text, label))
        keys += key
    return np.array(rows, np.int64).reshape(-1, 7), bytes(keys), skipped


class TarDataset(Indexed):
    """webdataset tars. A sample is key.jpg (.png, .jpeg, .webp) with key.txt, in test sets with key.cls or both.

    A file classnames.txt beside the tars names the classes. require: "txt" for training, where all of key.txt is one
    caption, or "cls" for tests, where each line of key.txt is a caption. SystemExit if a file is missing, a file is no
    tar, or the tars hold no sample.
    """
    sizes = [1, 3, 5, 6]  # sizes of key, picture and caption, and the class

    def __init__(self, spec, transform, require="txt"):
        self.paths, self.transform, self.require = expand(spec), transform, require
        for path in self.paths:
            if not os.path.isfile(path):
                raise SystemExit(f"there is no {path}; {FORMATS}")
        names = Path(self.paths[0]).with_name("classnames.txt")
        if names.exists():
            self.classnames = read_lines(names, "--classnames")
            if not all(map(str.strip, self.classnames)):
                raise SystemExit(f"--classnames: {names} has a blank line between names; line i must name class i")
        self.set_index(self.paths, partial(scan_tar, require=require), require)

    def prefix(self, number):
        return os.path.splitext(os.path.basename(self.paths[number]))[0] + "/"

    def own_captions(self, i):
        *_, offset, size, _, number = self.row(i)
        text = read(self.paths[number], offset, size).decode("utf-8", "replace")
        return [text] if self.require == "txt" else [line for line in text.splitlines() if line.strip()]

    def image(self, i):
        _, _, offset, size, *_, number = self.row(i)
        return read(self.paths[number], offset, size)

    def label(self, i):
        label = self.row(i)[-2]
        return None if label < 0 else label


def table_rows(content, delimiter):
    """Iterates over the rows (lists of bytes) of a .tsv or .csv (bytes), the header first. Blank lines are left out.

    A cell that is wholly in quotes may hold delimiters, new lines and doubled quotes, as pandas and Excel write them.
    Any other quote is an ordinary character, as in open_clip's tables.
    """
    cell = re.compile(rb'(?:"([^"]*(?:""[^"]*)*)"|([^%s\n]*?))(%s|\r?\n|\r?\Z)' % (delimiter, delimiter))

    def row_at(content, at):
        """The row that begins at byte `at`, and where the next one begins."""
        row, ending = [], delimiter
        while ending == delimiter:
            quoted, plain, ending = (match := cell.match(content, at)).groups()
            row.append(plain if quoted is None else quoted.replace(b'""', b'"'))
            at = match.end()
        return row, at

    header, at = row_at(content, 0)
    yield header
    while at < len(content):
        line_end = content.find(b"\n", at) + 1 or len(content)
        row, after = row_at(content, at)
        rows = [row]
        if after > line_end:  # a cell in quotes with new lines in it, or two lines that each have one stray quote
            lines = [row_at(line, 0)[0] for line in content[at:after].removesuffix(b"\n").split(b"\n")]
            if all(len(line) == len(header) for line in lines):
                # Each line has the right number of cells, so lines and row are both possible. The lines are rows of
                # their own if all have an extension in the cell of the file name, or none has.
                if len({b"." in line[header.index(b"filepath")][-6:] for line in lines}) == 1:
                    rows = lines
            elif len(row) != len(header):
                rows, after = lines[:1], line_end  # a stray quote: only the first line is a row
        yield from (row for row in rows if row != [b""])
        at = after


def scan_table(path):
    """Index of a table: rows int64 [n, 3], their text as bytes, and a Counter of what was left out, by reason.

    The text of a sample is its file name and, behind it, the list of its captions as JSON. A row is: offset of this
    text, size of the file name, size of the list.
    """
    rows, text, skipped = [], bytearray(), Counter()
    content = Path(path).read_bytes().removeprefix(b"\xef\xbb\xbf")
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise SystemExit(f"--data: {path} is not UTF-8; save it as UTF-8")
    end = re.search(rb"\r\n?|\n", content)
    if end and end[0] == b"\r":  # line ends of an old Mac: swap \r and \n
        content = content.translate(bytes.maketrans(b"\r\n", b"\n\r"))
    if is_json := path.lower().endswith(".jsonl"):
        lines = filter(bytes.strip, io.BytesIO(content))
    elif content.strip():
        first = content.partition(b"\n")[0]
        delimiter = max(b"\t", b",", b";", key=first.count)
        lines = table_rows(content, delimiter)
        header = next(lines)
        if not {b"filepath", b"title"} <= {*header}:
            raise SystemExit(f"{path}: the first line must name the columns filepath and title, not {first[:200]!r}")
        name_column, title_column = header.index(b"filepath"), header.index(b"title")
    else:
        lines = []
    for line in lines:
        try:
            if is_json:
                record = json.loads(line.decode())
                name, found = record["filename"], record["caption"]
            elif any(line[len(header):]):
                skipped["more cells than the header has: a caption with a delimiter must stand in quotes"] += 1
                continue
            else:
                name, found = line[name_column].decode(), line[title_column].decode()
            found = [caption for caption in ([found] if isinstance(found, str) else found) if caption.strip()]
            name, record = name.encode(), json.dumps(found, ensure_ascii=False).encode()
            if not name or not found:
                raise ValueError
        except UnicodeError:
            skipped["caption not UTF-8"] += 1
        except json.JSONDecodeError:
            skipped["damaged or truncated line of JSON"] += 1
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            skipped["no file name or no caption"] += 1
        else:
            rows.append((len(text), len(name), len(record)))
            text += name + record
    return np.array(rows, np.int64).reshape(-1, 3), bytes(text), skipped


class TableDataset(Indexed):
    """A .tsv or .csv with the columns filepath and title, or a .jsonl with filename and caption (a text or a list).

    Names of pictures are relative to the folder of the table. SystemExit if the file is missing, lacks these columns or
    holds no sample.
    """
    sizes = [1, 2]  # of the file name and of the captions

    def __init__(self, path, transform):
        self.path, self.transform = os.path.expanduser(path), transform
        if not os.path.isfile(self.path):
            raise SystemExit(f"there is no {path}; {FORMATS}")
        self.set_index([self.path], scan_table, "table")

    def own_captions(self, i):
        offset, name, captions, _ = self.row(i)
        return json.loads(self.text(offset + name, captions))

    def image(self, i):
        return Path(self.path).parent.joinpath(self.key(i)).read_bytes()


# the built-in data

def arc(radius, start, end, n=24, center=0):
    """n + 1 points, as complex numbers, on an arc around `center`. start, end: angles in turns."""
    return [center + cmath.rect(radius, math.tau * (start + (end - start) * k / n)) for k in range(n + 1)]


COLORS = {"red": (0, "crimson", "scarlet"), "orange": (28, "tangerine", "amber"), "yellow": (54, "golden", "lemon"),
          "green": (120, "emerald", "lime"), "cyan": (180, "turquoise", "teal"), "blue": (225, "azure", "navy"),
          "purple": (272, "violet", "lilac"), "pink": (325, "rose", "magenta")}  # hue in degrees, synonyms
# outline (a polygon of complex numbers around 0), synonyms
SHAPES = {"circle": (arc(1, 0, 1), "disc", "dot"), "ring": (arc(1, 0, 1) + arc(.55, 1, 0), "hoop", "donut"),
          "square": (arc(1.1, 0, 1, 4), "box", "block"), "triangle": (arc(1.15, 0, 1, 3), "wedge", "pyramid"),
          "star": ([cmath.rect(1 - k % 2 * .58, math.tau * k / 10) for k in range(10)], "starlet", "asterisk"),
          "cross": ([z * 1j ** n for n in range(4) for z in (1 - .3j, 1 + .3j, .3 + .3j)], "plus", "crucifix"),
          "crescent": (arc(1, .12, .88) + arc(.8, .85, .15, 24, .42), "moon", "sickle"),
          "heart": (arc(.5, .5, 1, 12, -.5) + arc(.5, .5, 1, 12, .5) + [1.15j], "valentine", "sweetheart")}
KINDS = [(color, shape) for color in COLORS for shape in SHAPES]
# kind i has colour i // 8 and shape i % 8; held out is every second colour with every second shape, 4 x 4
HELD_OUT = [kind for i, kind in enumerate(KINDS) if i // 8 % 2 == i % 8 % 2 == 0]
TRAINED = [kind for kind in KINDS if kind not in HELD_OUT]
# half of the held-out kinds, like the black fields of a chess board: each colour and each shape comes twice
REPORTED = [kind for i, kind in enumerate(HELD_OUT) if (i // 4 + i % 4) % 2 == 0]
SPLITS = {"train": TRAINED, "seen": TRAINED, "test": REPORTED,
          "tune": [kind for kind in HELD_OUT if kind not in REPORTED]}
# kinds that may stand in a picture beside a kind (c, s): the colour of each with the other's shape is not held out
BESIDE = {(c, s): [kind for kind in TRAINED if not {(c, kind[1]), (kind[0], s)} & {*HELD_OUT}] for c, s in KINDS}
OPENINGS = ["a", "a", "the", "my", "one", "nice", "a photo of a", "picture of a", "this is a", "stock image :"]
CHATTER = ["free download", "holiday 2014", "for sale", "vector clip art", "made by anna", "img 0042", "best price",
           "from our trip to paris", "with dog", "new in shop", "# art", "( signed print )", "cat not included"]
TOY = {"pairs": 1024, "side": 40,  # side of a picture in pixels
       # the object: range of its radius, largest shift (both in sides), turn (in turns) and change of hue (in degrees)
       "radius": (.3, .45), "shift": .08, "turn": .05, "hue": 9,
       # the ground: its coloured patches a side, and the largest opacity of the patches and of the noise over all
       "grid": 6, "patches": .2, "noise": .2,
       # the second object: radius and probability; exponent of Zipf's law for the kinds (0: all equally often)
       "beside": .11, "second": .1, "zipf": 0,
       # probabilities in a caption: it is another picture's; it names the colour; it names the shape; it does so by a
       # synonym; it says something that is not in the picture (tried twice)
       "mismatch": .1, "color": .65, "shape": .7, "synonym": .5, "chatter": .35}
TOYS = {"toy": TOY,
        "toy-zipf": TOY | {"pairs": 4096, "zipf": 1},
        "toy-busy": TOY | {"radius": (.15, .225), "shift": .2, "beside": .07, "grid": 10, "patches": .6}}
TOY_TESTS = {variant + ending: (variant, split) for variant in TOYS
             for ending, split in (("", "test"), ("-tune", "tune"), ("-seen", "seen"))}


def toy_rng(split, seed, what, number):
    """random.Random for one part (`what`) of one sample: the same numbers in all variants."""
    return random.Random(f"{seed} {split} {what} {number}")


@lru_cache(2 ** 16)
def toy_scene(variant, split, seed, number):
    """Dict of what is in a picture: see ToyDataset.scene. The colour of one object and the shape of the other are never
    a held-out kind."""
    toy, rng = TOYS[variant], toy_rng(split, seed, "scene", number)
    kind = rng.choice(SPLITS[split])
    if toy["zipf"] and split == "train":
        order = random.Random(f"{seed} zipf").sample(TRAINED, len(TRAINED))
        weights = [1 / rank ** toy["zipf"] for rank in range(1, len(order) + 1)]
        kind = toy_rng(split, seed, "kind", number).choices(order, weights)[0]
    size = rng.random()
    x, y = (.5 + rng.uniform(-1, 1) * toy["shift"] for _ in range(2))
    other = rng.choice(BESIDE[kind]) if rng.random() < toy["second"] else None
    return {"kind": kind, "other": other, "x": x, "y": y,
            "radius": toy["radius"][0] * (1 - size) + toy["radius"][1] * size,
            "size": "large" if size > .5 else "small", "light": rng.choice(["dark", "bright"])}


@lru_cache(2 ** 16)
def toy_caption(variant, split, seed, number):
    """The caption of a picture, and whether it describes another picture instead."""
    toy, rng, scene = TOYS[variant], toy_rng(split, seed, "caption", number), toy_scene(variant, split, seed, number)
    if split != "train":
        return f"a {scene['size']} {' '.join(scene['kind'])} on a {scene['light']} background", False
    mismatch = rng.random() < toy["mismatch"]
    if mismatch:
        scene = toy_scene(variant, split, seed, number + 1)

    def some(probability, text, otherwise=""):
        """`text` with this probability, else `otherwise`."""
        return text if rng.random() < probability else otherwise

    def name(color, shape):
        color, shape = (some(toy["synonym"], rng.choice(names[word][1:]), word)
                        for names, word in [(COLORS, color), (SHAPES, shape)])
        return some(toy["color"], color) + " " + some(toy["shape"], shape, rng.choice(["thing", "object"]))

    words = [rng.choice(OPENINGS), some(.4, scene["size"]), name(*scene["kind"]),
             some(.6, f"with a {name(*scene['other'])}") if scene["other"] else "",
             some(.2, f"on a {scene['light']} background"),
             some(toy["chatter"], rng.choice(CHATTER)), some(toy["chatter"], rng.choice(CHATTER))]
    return " ".join(" ".join(words).split()), mismatch


@lru_cache(2 ** 16)  # at most some 80 MB
def toy_picture(variant, split, seed, number):
    """JPEG of a picture."""
    toy, rng, scene = TOYS[variant], toy_rng(split, seed, "picture", number), toy_scene(variant, split, seed, number)
    side, grid = toy["side"], toy["grid"]
    tone = [rng.randint(*{"dark": (5, 45), "bright": (60, 100)}[scene["light"]]) for _ in range(3)]
    patches = Image.frombytes("RGB", (grid, grid), rng.randbytes(3 * grid * grid)).resize((side, side), Image.BICUBIC)
    picture = Image.blend(Image.new("RGB", (side, side), tuple(tone)), patches, rng.uniform(0, toy["patches"]))
    # the second object stands in a corner, on the side where the first one leaves more room
    second = (scene["other"], .15 if scene["x"] > .5 else .85, rng.choice([.15, .85]), toy["beside"])
    for kind, x, y, radius in [(scene["kind"], scene["x"], scene["y"], scene["radius"]), second]:
        if kind:
            hue = (COLORS[kind[0]][0] + rng.uniform(-1, 1) * toy["hue"]) / 360 % 1
            tone = colorsys.hsv_to_rgb(hue, rng.uniform(.6, 1), rng.uniform(.75, 1))
            turn = cmath.rect(3 * side * radius, math.tau * rng.uniform(-1, 1) * toy["turn"])
            points = [3 * side * complex(x, y) + turn * z for z in SHAPES[kind[1]][0]]
            mask = Image.new("L", (3 * side, 3 * side))  # three times as large, so that reduce(3) smooths the edges
            ImageDraw.Draw(mask).polygon([(z.real, z.imag) for z in points], 255)
            picture.paste(tuple(int(255 * t) for t in tone), (0, 0), mask.reduce(3))
    noise = Image.frombytes("RGB", (side, side), rng.randbytes(3 * side * side))
    file = io.BytesIO()
    Image.blend(picture, noise, rng.uniform(0, toy["noise"])).save(file, "JPEG", quality=90)
    return file.getvalue()


class ToyDataset(Pairs):
    """Small scenes, each a function of (variant, split, seed, number). The variants stand in TOYS.

    The captions are like those of the web. They have synonyms, leave out attributes, and say things that are not in the
    picture. A tenth of the captions describe another picture. A scene is drawn once and kept.

    A kind is a colour and a shape. 16 of the 64 kinds are in no training picture or caption. Two splits show eight of
    these each: "tune", by which settings are chosen, and "test", which is reported. "seen" shows the 48 kinds of
    training. In these three splits the class of a picture is its number among all 64 kinds, and its caption is true and
    leaves nothing out.
    """
    classnames = [" ".join(kind) for kind in KINDS]

    def __init__(self, length, transform, split="train", seed=0, variant="toy"):
        self.keep, self.transform, self.source = range(length), transform, (variant, split, seed)

    def key(self, i):
        variant, split, _ = self.source
        return f"{variant}-{split}/{self.keep[i]:08d}"

    def scene(self, number):
        """Dict of what is in picture `number`: kind, other (kind of the second object, or None), x, y, radius (in sides
        of the picture), size ("large" or "small") and light ("dark" or "bright", of the background)."""
        return toy_scene(*self.source, number)

    def label(self, i):
        return KINDS.index(self.scene(self.keep[i])["kind"])

    def tags(self, i):
        """The names of the one or two kinds in picture i, the main one first; whether its caption is another's."""
        scene = self.scene(self.keep[i])
        kinds = [" ".join(kind) for kind in (scene["kind"], scene["other"]) if kind]
        return kinds, toy_caption(*self.source, self.keep[i])[1]

    def own_captions(self, i):
        return [toy_caption(*self.source, self.keep[i])[0]]

    def image(self, i):
        return toy_picture(*self.source, self.keep[i])


def run_name(spec):
    """The name of a data set in the names of runs: the last part of its path, without the extension.

    A pattern, or a name with characters that a shell treats specially, gets a hash of the whole spec as its end. So
    different patterns have different names.
    """
    stem = Path(spec).stem
    plain = re.sub(r"[^\w.+-]+", "-", stem).strip("-.")
    if plain and plain == stem:
        return plain
    return f"{plain or 'data'}-{hashlib.sha256(spec.encode()).hexdigest()[:6]}"


def open_dataset(spec, transform, limit=None, subset=None, root=None):
    """The Pairs that `spec` names (see the top of the file). SystemExit if there are none.

    subset: a file of keys and captions, as subset_lines makes it; limit: only the first n of these. root: the folder of
    the named sets (default: $CLIP_DATA, else ./datasets).
    """
    if spec in ("cc3m", "cc12m", "yfcc15m"):
        spec = os.path.expanduser(os.path.join(root or os.environ.get("CLIP_DATA") or "datasets", spec))
        if not os.path.isdir(spec):
            raise SystemExit(f"--data: there is no folder {spec}; its parent is set by --data-root or $CLIP_DATA")
    if spec in TOYS:
        dataset = ToyDataset(limit or TOYS[spec]["pairs"], transform, variant=spec)
    else:
        dataset = (TableDataset if spec.lower().endswith(TABLES) else TarDataset)(spec, transform)
    if subset:
        select(dataset, subset)
    dataset.keep = dataset.keep[:limit]
    return dataset


def select(dataset, file):
    """Keeps only the samples whose keys stand in `file`, with the captions that the file gives them.

    A line of the file is a key and, after a tab, a caption in place of the sample's own. Several lines with one key
    give its sample several captions. SystemExit if the file names no sample.
    """
    # said[key]: the captions of a key, joined by new lines; an empty one stands for the sample's own captions
    said, keep, texts = {}, [], []
    for line in read_lines(file, "--subset"):
        key, _, caption = line.partition("\t")
        caption = caption.strip()
        if key in said and caption != said[key]:
            caption = f"{said[key]}\n{caption}"
        if line.strip():
            said[key] = caption
    unknown, first = {*said}, dataset.key(0)  # first: an example of a key, for the error
    for i, key in enumerate(dataset.keys()):
        if key in said:
            keep.append(i)
            texts.append(said[key].encode())
            unknown.discard(key)
    if not keep:
        raise SystemExit(f"--subset: {file} names no sample (one is {first})")
    dataset.keep = np.array(keep, np.int64)
    if any(texts):
        starts = np.cumsum([0, *map(len, texts)])
        dataset.replaced = np.frombuffer(b"".join(texts), np.uint8), starts
    if unknown:
        dataset.skipped = dataset.skipped | {"key of --subset that is not in the data": len(unknown)}


def subset_lines(rows):
    """Lines of a file for --subset, from (key, caption) pairs; an empty caption stands for the sample's own.

    White space and NUL in a caption become single spaces. SystemExit if a key is blank, not UTF-8, or holds NUL, a tab
    or a new line.
    """
    for key, caption in rows:
        if not key.strip() or re.search(r"[\0\t\n\r\ud800-\udfff]", key):
            raise SystemExit(f"--subset: the key {key!a} is blank, not UTF-8, or holds NUL, a tab or a new line")
        words = caption.replace("\0", " ").split()
        yield f"{key}\t{' '.join(words)}\n"


def fingerprint(dataset):
    """Text that says what the data are: keys, sizes of pictures and captions, and their order.

    It does not depend on where the files lie, on how --data names them, or on the bytes of a picture.
    """
    digest = hashlib.sha256()
    if isinstance(dataset, Indexed):
        rows, text = mapped(dataset.index / "rows.npy"), mapped(dataset.index / "text.npy")
        starts = np.append(rows[:, 0], len(text))
        for first in range(0, len(dataset), 2 ** 16):
            keep = np.asarray(dataset.keep[first:first + 2 ** 16])
            lengths = starts[keep + 1] - starts[keep]
            # places in `text` of all bytes of these samples. In the samples' joined bytes, sample j begins at byte
            # cumsum(lengths)[j] - lengths[j]; in `text` it begins at starts[keep[j]]. The difference is added.
            places = np.arange(lengths.sum()) + np.repeat(starts[keep] - np.cumsum(lengths) + lengths, lengths)
            files, counts = np.unique(rows[keep, -1], return_counts=True)
            names = [[dataset.prefix(file), count] for file, count in zip(files.tolist(), counts.tolist())]
            digest.update(rows[keep][:, dataset.sizes].tobytes() + text[places].tobytes() + json.dumps(names).encode())
    else:  # drawn by code from a few parameters
        parameters = {k: v for k, v in vars(dataset).items() if k not in ("keep", "transform", "skipped", "replaced")}
        digest.update(repr([parameters, TOYS]).encode())
        digest.update(np.asarray(dataset.keep, np.int64))
    if dataset.replaced:
        text, starts = dataset.replaced
        digest.update(starts[:len(dataset) + 1].tobytes() + text[:starts[len(dataset)]].tobytes())
    return digest.hexdigest()[:32]


def captions(spec, limit=None, root=None, subset=None):
    """Iterates over (key, caption) of a data set, in its order. No picture is read."""
    dataset = open_dataset(spec, None, limit, subset, root)
    return ((dataset.key(i), text) for i in range(len(dataset)) for text in dataset.captions(i))


# order and batches

class EpochBatches:
    """Batch sampler of one rank: lists of (index, seed). Set `epoch`, and `start` (the steps to leave out) to resume.

    batch_size is that of one rank, B. An epoch is a permutation of the samples that depends on (seed, epoch) only. With
    W ranks a step takes the next B W samples of it: rank 0 gets the first B, rank 1 the next B, and so on. So all ranks
    together see the batch that one process would see. Samples at the end that fill no batch are dropped.

    A sample's seed depends on (seed, epoch, stream, place in the permutation). Another stream gives another pass over
    the samples, in the same order with other seeds. indices: numbers of samples, repeats allowed, to permute instead of
    range(length). SystemExit if they fill no batch.
    """

    def __init__(self, length, batch_size, seed=0, rank=0, world=1, indices=None, stream=0):
        self.indices = np.arange(length) if indices is None else np.asarray(indices)
        self.batch_size, self.seed, self.rank, self.world, self.stream = batch_size, seed, rank, world, stream
        self.epoch = self.start = 0
        if not len(self):
            raise SystemExit(f"--batch-size {batch_size * world} is more than the {len(self.indices)} pairs there are")

    def __len__(self):
        return len(self.indices) // (self.batch_size * self.world)

    def __iter__(self):
        perm = np.random.default_rng([0, self.seed, self.epoch]).permutation(len(self.indices))
        # 0 in the line above and 1 below keep the two sources of random numbers apart; >> makes seeds fit into int64
        seeds = np.random.PCG64([1, self.seed, self.epoch, self.stream]).random_raw(len(perm)) >> np.uint64(1)
        for step in range(self.start, len(self)):
            first = (step * self.world + self.rank) * self.batch_size
            here = slice(first, first + self.batch_size)
            yield list(zip(self.indices[perm[here]].tolist(), seeds[here].tolist()))


def collate(samples):
    """Dict of stacked tensors. "tokens" [..., L] are cut to the shortest of a few lengths that holds them all."""
    batch = default_collate(samples)
    if "tokens" in batch:
        used = int(batch["tokens"].flatten(0, -2).any(0).nonzero().max()) + 1  # padding is 0, EOT is not
        length = next(n for n in (16, 24, 32, 48, 64, batch["tokens"].shape[-1]) if n >= used)
        batch["tokens"] = batch["tokens"][..., :length].contiguous()
    return batch


def deaf(worker):
    """Lets a worker ignore SIGTERM, which torchrun and SLURM send to all processes.

    The training loop needs its workers until it has saved a checkpoint.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


@atexit.register
def kill_workers():
    """Kills workers that an exception has left behind.

    Without it multiprocessing would send them SIGTERM at exit, which they ignore, and wait for them.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise an error for each killed worker
    for worker in multiprocessing.active_children():
        if worker.daemon:
            worker.kill()


class Loader(DataLoader):
    """DataLoader that turns Unreadable into SystemExit with the same sentence."""

    def __iter__(self):
        try:
            yield from super().__iter__()
        except Unreadable as error:  # if a worker raised it, its sentence comes at the end of the worker's traceback
            raise SystemExit(f"{str(error).rpartition('Unreadable: ')[2].strip()}; see: python data.py PATH") from None


def default_workers(spec, device):
    """Number of workers for each rank: its share of the cores that this process may use, at most 12.

    It is 0 for the toy on a CPU, which draws a picture as fast as a worker hands one over, and at least 1 on a GPU.
    """
    on_cpu = torch.device(device).type == "cpu"
    if on_cpu and spec in TOYS:
        return 0
    return max(0 if on_cpu else 1, min(12, cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def loader(dataset, batches, workers, device=None):
    """Loader of Pairs over EpochBatches. Its workers live on between epochs. torch's global RNG is left as it is."""
    # Workers start at the first batch, in Python's default way: fork on Linux before Python 3.14, forkserver from 3.14
    # on, spawn on macOS. CUDA and NCCL are already at work then. A fork is still safe. Workers use neither CUDA nor the
    # process group, and NCCL calls ibv_fork_init: memory that it registers with InfiniBand does not go into a fork.
    cuda = device is not None and torch.device(device).type == "cuda"
    return Loader(dataset, batch_sampler=batches, num_workers=workers, collate_fn=collate, pin_memory=cuda,
                  persistent_workers=workers > 0, worker_init_fn=deaf, generator=torch.Generator())


def check_skipped(skipped, seen):
    """SystemExit if `skipped`, the number of failures, is more than 5 % of `seen`, the number of samples so far.

    Before sample 1,000 the limit is 5 % of 1,000, which is 50 failures. Both counts are sums over all ranks.
    """
    if skipped > .05 * max(seen, 1000):
        raise SystemExit(f"{skipped} pictures failed in {seen} samples: a wrong path or format? See: "
                         "python data.py PATH")


def main(argv=None):
    parser = argparse.ArgumentParser(description="Says what is in a data set and draws a sheet of samples.")
    parser.add_argument("data", help="toy, cc3m, cc12m, yfcc15m; a folder or pattern of tars; a .tsv, .csv or .jsonl")
    parser.add_argument("--limit", type=int, help="only the first N pairs")
    parser.add_argument("--bpe", help="merges of the tokenizer, or: train")
    parser.add_argument("--out", default="data.png", help="the sheet (default: %(default)s)")
    args = parser.parse_args(argv)
    if not Path(args.out).resolve().parent.is_dir():
        raise SystemExit(f"--out {args.out}: there is no such folder")

    def transform(image, caption, rng):
        crop = random_resized_crop(image, 224, (.5, 1), rng)
        return {"image": crop, "length": len(tokenizer.encode(caption)) + 2 if tokenizer else 0}

    dataset = open_dataset(args.data, transform, args.limit)
    print(f"{len(dataset):,} pairs" + (f" in {len(dataset.paths):,} tars" if isinstance(dataset, TarDataset) else ""))
    print("left out:", "; ".join(f"{n:,} x {reason}" for reason, n in dataset.skipped.items()) or "nothing")
    try:
        tokenizer = find_tokenizer(args.bpe, args.data)
    except SystemExit as error:
        tokenizer = None
        print(error)
    picked, start, items = np.random.default_rng(0).permutation(len(dataset)).tolist(), time.time(), []
    try:
        while len(items) < len(picked) and time.time() < start + 4:
            items.append(dataset[picked[len(items)], 0])
    except Unreadable as error:
        raise SystemExit(error) from None
    print(f"{len(items) / (time.time() - start):,.0f} pairs/s a worker, crops of 224 pixels; of {len(items):,} samples "
          f"{sum(item['skipped'] for item in items)} failed")
    if tokenizer:
        lengths = np.quantile([item["length"] for item in items], [.5, .9, 1]).astype(int)
        print("tokens of a caption: half of them up to {}, nine in ten up to {}, all up to {}".format(*lengths))
    sheet = items[:16]
    grid([item["image"] for item in sheet], [dataset.captions(item["index"])[0] for item in sheet], args.out)
    print(f"{len(sheet)} samples, as they are cropped: {args.out}")


if __name__ == "__main__":
    main()
