"""Pictures with captions: where they lie, the order in which they come, and how they become tensors.

    python data.py PATH      says what is there, what was left out and why; writes a sheet of samples

One string names a data set: "toy" (drawn by code, no files); cc3m, cc12m, yfcc15m (folders under --data-root);
webdataset tars (a folder, a pattern such as "cc3m/{0000..0575}.tar", several joined by "::"); a .tsv or .csv with the
columns filepath and title; a .jsonl with filename and caption. All are read by position and not as a stream, so that an
epoch is a plain permutation, the same for any number of ranks and workers, and after a restart.
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

warnings.filterwarnings("ignore", module="PIL")  # odd pictures are dealt with here

# pictures

MEAN, STD = (.48145466, .4578275, .40821073), (.26862954, .26130258, .27577711)  # OpenAI's
MAX_PIXELS = 50_000_000


def open_image(image):
    """PIL picture of bytes, a path or a PIL picture; reads no more than the header. ValueError above 50 megapixels."""
    if not isinstance(image, Image.Image):
        image = Image.open(io.BytesIO(image) if isinstance(image, bytes) else image)
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"{image.width} x {image.height} pixels, more than {MAX_PIXELS:,}")
    return image


def decode(image, enough=None):
    """RGB picture (PIL) of bytes, a path or a PIL picture: first frame, no EXIF rotation, 16 bits scaled to 8.

    enough: (width, height); a JPEG is decoded at 1/2, 1/4 or 1/8 if that is no smaller, 5 times faster at 1600 pixels.
    """
    image = open_image(image)
    if enough:
        image.draft("RGB", enough)
    image.load()
    if image.mode.startswith("I"):  # 16-bit grey, which convert() would turn white
        image = Image.fromarray((np.asarray(image) // 257).clip(0, 255).astype(np.uint8))
    return image if image.mode == "RGB" else image.convert("RGB")


def crop_box(width, height, scale, rng, ratio=(3 / 4, 4 / 3)):
    """(top, left, height, width) of a crop: area U(scale) of the picture, log-uniform ratio (torchvision's rule)."""
    for _ in range(10):
        area, aspect = width * height * rng.uniform(*scale), math.exp(rng.uniform(*map(math.log, ratio)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return rng.randint(0, height - h), rng.randint(0, width - w), h, w
    w, h = min(width, round(height * ratio[1])), min(height, round(width / ratio[0]))  # the middle of a long picture
    return (height - h) // 2, (width - w) // 2, h, w


def resize_crop(image, box, size):
    """uint8 [3, size, size] of a box (top, left, height, width) of an RGB picture (PIL), bicubic with antialiasing.

    PyTorch's resize of uint8 pixels that lie channels last: PIL's result to 1/255, at twice the speed.
    """
    top, left, h, w = box
    pixels = torch.from_numpy(np.array(image.crop((left, top, left + w, top + h)))).permute(2, 0, 1)[None]
    return F.interpolate(pixels, (size, size), mode="bicubic", antialias=True)[0].contiguous()


def random_resized_crop(image, size, scale, rng, ratio=(3 / 4, 4 / 3)):
    """uint8 [3, size, size]: a crop_box of bytes, a path or a PIL picture. rng: random.Random."""
    image = open_image(image)
    width, height = image.size
    top, left, h, w = crop_box(width, height, scale, rng, ratio)
    image = decode(image, (math.ceil(width * size / w), math.ceil(height * size / h)))
    x, y = image.width / width, image.height / height  # below 1 where it was decoded at a fraction
    return resize_crop(image, (int(top * y), int(left * x), max(1, round(h * y)), max(1, round(w * x))), size)


def center_crop(image, size):
    """uint8 [3, size, size] of bytes, a path or a PIL picture: torchvision's Resize, bicubic, and CenterCrop."""
    image = decode(image)
    x, y = (max(0, side - 32 * min(image.size)) // 2 for side in image.size)
    if x or y:  # a thread of pixels would grow to gigabytes: take its middle
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
        dtype = torch.promote_types(images.dtype, torch.float32)
        top = 255 if images.dtype == torch.uint8 else 1
        # filled on the device, since copying constants to it would wait; one pass over the images
        shift = torch.stack([images.new_full((1, 1), -m / s, dtype=dtype) for m, s in zip(self.mean, self.std)])
        scale = torch.stack([images.new_full((1, 1), 1 / (top * s), dtype=dtype) for s in self.std])  # [3, 1, 1]
        return torch.addcmul(shift, images, scale)


# colours: parameters drawn in the worker, one row a sample; applied on the device

def color_params(rng, flip=0., jitter=(0, 0, 0, 0, 0), grey=0., blur=0., solarize=0.):
    """float32 [8]: flip, brightness, contrast, saturation, hue, grey, blur sigma, solarize. Identity: 0 1 1 1 0 0 0 0.

    flip, grey, blur, solarize: probabilities. jitter: (probability, brightness, contrast, saturation, hue), with the
    ranges of torchvision's ColorJitter. sigma ~ U(.1, 2) in pixels of a picture of 224.
    """
    probability, *ranges, hue = jitter
    factors = [1, 1, 1, 0]
    if rng.random() < probability:
        factors = [rng.uniform(max(0, 1 - r), 1 + r) for r in ranges] + [rng.uniform(-hue, hue)]
    sigma = rng.uniform(.1, 2) if rng.random() < blur else 0
    return torch.tensor([rng.random() < flip, *factors, rng.random() < grey, sigma, rng.random() < solarize]).float()


def augment(images, params):
    """uint8 [B, 3, S, S] and color_params [B, 8], on one device -> float32 [B, 3, S, S] in [0, 1]. No host sync.

    Order: brightness, contrast, saturation, hue, grey, blur, solarize (torchvision shuffles the first four). The time
    goes into passes over memory, so they are few. A picture whose parameters are the identity keeps its pixels exactly.
    """
    flip, brightness, contrast, saturation, hue, grey, sigma, solarize = params[..., None, None, None].unbind(1)
    images = torch.where(flip > 0, images.flip(-1), images)  # while a pixel is a byte
    x = (images / (255 / brightness)).clamp_(max=1)
    x.lerp_(luma(x.mean((2, 3), keepdim=True)), 1 - contrast).clamp_(0, 1)
    x.lerp_(luma(x), 1 - saturation).clamp_(0, 1)
    x = torch.where(hue == 0, x, shift_hue(x, hue))
    x.lerp_(luma(x), grey)
    x = gaussian_blur(x, sigma * x.shape[-1] / 224)
    return torch.minimum(x, 2 - solarize - x)  # solarize inverts what is above a half; 2 - x is above all


def luma(x):
    """Brightness [B, 1, S, S] of colours [B, 3, S, S]."""
    r, g, b = x.split(1, 1)
    return (.2989 * r).add_(g, alpha=.587).add_(b, alpha=.114)


def shift_hue(x, turns):
    """x [B, 3, S, S] in [0, 1] with the hue moved by turns [B, 1, 1, 1]."""
    r, g, b = x.split(1, 1)
    top, low = x.amax(1, keepdim=True), x.amin(1, keepdim=True)  # [B, 1, S, S]
    span = top - low
    red, green = top == r, top == g  # which colour is the largest
    hue = torch.where(red, g - b, torch.where(green, b - r, r - g)).div_(span.clamp(min=1e-12))
    hue += torch.where(red, 0., torch.where(green, 2., 4.))
    hue = hue.add_(6 * turns).remainder_(6)  # in sixths of a turn
    shares = torch.cat([(hue - 3).abs_().sub_(1), 2 - (hue - 2).abs_(), 2 - (hue - 4).abs_()], 1).clamp_(0, 1)
    return torch.addcmul(low, span, shares)


def gaussian_blur(x, sigma):
    """x [B, 3, S, S] with its own sigma [B, 1, 1, 1] in pixels, mirrored at the edges: a banded matrix, used twice.
    Where sigma is 0 the result is x itself."""
    S, radius = x.shape[-1], max(1, round(x.shape[-1] / 22.4))  # a kernel of 21 pixels at S = 224
    offset, at = torch.arange(-radius, radius + 1, device=x.device), torch.arange(S, device=x.device)
    source = (S - 1) - ((S - 1) - (at[:, None] + offset).abs()).abs()  # [S, 2 radius + 1]
    with torch.autocast(x.device.type, enabled=False):
        # below 1e-3 the neighbours' weights are 0 in fp32, and the matrix is the identity
        kernel = torch.softmax(-offset ** 2 / (2 * sigma.flatten(1).clamp(min=1e-3) ** 2), 1)  # [B, 2 radius + 1]
        matrix = torch.einsum("bk,ikj->bij", kernel, (source[..., None] == at).to(kernel.dtype))  # [B, S, S]
        x = (x.flatten(1, 2) @ matrix.mT).view_as(x)  # along the width
        return matrix[:, None] @ x


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


# tokens: CLIP's byte-pair encoding (Radford et al. 2021, clip/simple_tokenizer.py) by the standard library alone

BPE_FILE = "bpe_simple_vocab_16e6.txt.gz"
BPE_URL = "https://github.com/openai/CLIP/raw/main/clip/" + BPE_FILE
BPE_SHA256 = "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"
SOT, EOT = "<|startoftext|>", "<|endoftext|>"
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]  # bytes that stand for themselves
BYTES = PRINTABLE + [b for b in range(256) if b not in PRINTABLE]
SYMBOL = dict(zip(BYTES, map(chr, PRINTABLE + [*range(256, 324)])))  # the other 68 have characters of their own
BYTE = {symbol: b for b, symbol in SYMBOL.items()}


@lru_cache
def plain_characters():
    """Table for str.translate: what ftfy makes of ligatures, full-width forms, curly quotes, control characters."""
    wide = [0x132, 0x133, 0x149, *range(0x1C4, 0x1CD), *range(0x1F1, 0x1F4), *range(0xFB00, 0xFB07), 0x3000]
    gone = [*range(9), 0xB, *range(0xE, 0x20), 0x7F, *range(0x206A, 0x2070), 0xFEFF, *range(0xFFF9, 0xFFFD)]
    return ({c: unicodedata.normalize("NFKC", chr(c)) for c in wide + [*range(0xFF01, 0xFFF0)]} | dict.fromkeys(gone)
            | {c: bytes([c]).decode("cp1252", "ignore") or chr(c) for c in range(0x80, 0xA0)} | {0xFB05: "ſt"}
            | dict.fromkeys([0x2BC, *range(0x2018, 0x201C)], "'") | dict.fromkeys(range(0x201C, 0x2020), '"'))


def clean(text):
    """Lower case, single spaces, entities resolved, typographic characters made plain, as CLIP does with ftfy."""
    if "&" in text or not (text.isascii() and text.isprintable()):
        entities, before = "<" not in text, None
        while text != before:
            before, text = text, html.unescape(text) if entities else text
            text = unicodedata.normalize("NFC", text.translate(plain_characters()))
        text = html.unescape(html.unescape(text))
    return " ".join(text.split()).lower()


@lru_cache
def piece_pattern():
    """Pieces that are encoded on their own: contractions, letters, one digit, the rest. re has no \\p{N}: spelt out."""
    every = map(chr, range(sys.maxunicode + 1))
    runs = "".join(c if unicodedata.category(c) in ("Nl", "No") else " " for c in every).split()
    number = "".join(f"{run[0]}-{run[-1]}" for run in runs)
    return re.compile(rf"<\|startoftext\|>|<\|endoftext\|>|'[sſ]|'t|'re|'ve|'m|'ll|'d"
                      rf"|[^\W\d_{number}]+|[\d{number}]|(?:[^\w\s]|_)+")


def spell(piece):
    """Tuple of the symbols of a piece before any merge; the last one bears the mark of the end."""
    *head, last = (SYMBOL[b] for b in piece.encode())
    return (*head, last + "</w>")


def join(word, pair):
    """The word, a tuple of symbols, with every occurrence of the pair, from the left, made one symbol."""
    joined, i = [], 0
    while i < len(word):
        found = word[i:i + 2] == pair
        joined.append(pair[0] + pair[1] if found else word[i])
        i += 1 + found
    return tuple(joined)


class Tokenizer:
    """tokenizer(["a red circle"]) -> int64 [n, context]: SOT, ids, EOT, zeros; what is too long ends in EOT as well.

    merges: a file in OpenAI's format (.txt or .gz; SystemExit if it is not) or a list of pairs. Ids: 256 bytes, 256 bytes
    that end a word, the merges, SOT, EOT, the largest. Equals the released code but for texts in a broken encoding, which
    ftfy would mend.
    """

    def __init__(self, merges, context=77):
        if isinstance(merges, (str, os.PathLike)):
            try:
                with (gzip.open if str(merges).endswith(".gz") else open)(merges, "rt", encoding="utf-8") as file:
                    lines = file.read().split("\n")[1:49152 - 256 - 2 + 1]  # after the header; the rest is unused
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
        """Ids of a piece: the pair learnt first is joined wherever it occurs, again and again."""
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
        """Text of ids, a list or a tensor [n], up to EOT and without SOT."""
        words = [self.symbols[i] for i in takewhile(lambda i: i != self.eot, map(int, ids)) if i != self.sot]
        words = [bytes(BYTE[c] for c in word.removesuffix("</w>")) + b" " * word.endswith("</w>") for word in words]
        return b"".join(words).decode("utf-8", "replace").strip()

    def __call__(self, texts):
        tokens = torch.zeros(len(texts), self.context, dtype=torch.int64)
        for row, text in zip(tokens, texts):
            ids = self.encode(text[:100 * self.context])[:self.context - 2]  # 1 MB without a space would take hours
            row[:len(ids) + 2] = torch.tensor([self.sot, *ids, self.eot])
        return tokens


def train_bpe(captions, size):
    """Merges (list of pairs) for a vocabulary of `size` ids, 514 of which are bytes, SOT and EOT.

    Sennrich et al. 2016: the most frequent pair first, of equal ones the smallest. Only the words that hold a pair are
    counted anew; outdated counts stay in the heap and are passed over as they come up.
    """
    pieces = Counter(p for text in captions for p in piece_pattern().findall(clean(text)) if p not in (SOT, EOT))
    words, counts = [spell(piece) for piece in pieces], list(pieces.values())
    total, holders = Counter(), defaultdict(set)  # of each pair: its count, the words that hold it

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
        while heap and (not heap[0][0] or -heap[0][0] != total[heap[0][1]]):
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
    """Tokenizer for the data set `spec`. bpe: a path; "train": made from its captions; None: so for toy, else OpenAI's,
    from $CLIP_BPE, beside this file, the user's cache or the net. SystemExit if it cannot be had."""
    if bpe == "train" or (bpe is None and spec == "toy"):
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
    """Writes OpenAI's merges to `path`, or SystemExit with the ways out."""
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

def cache(name):
    """Path of a file in the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "data-efficient-clip", name)


@contextmanager
def locked(path):
    """One process at a time: the others wait, then find what the first has made."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(f"{path}.lock", "w")
    except OSError as error:
        raise SystemExit(f"the cache cannot be written ({error}): set $XDG_CACHE_HOME to a folder that can") from None
    with file:
        fcntl.lockf(file, fcntl.LOCK_EX)  # unlike flock's it is not inherited by the processes of make_index, which outlive a kill
        yield


def make_index(paths, scan, kind):
    """Folder in the cache with what scan(path) -> rows int64 [n, k], text bytes, Counter of what was left out, finds:
    rows.npy (first column: place in the joined text; a last one is added: which path), text.npy, skipped.json."""
    state = [(os.path.abspath(path), os.path.getsize(path), os.stat(path).st_mtime_ns) for path in paths]
    folder = cache("index-" + hashlib.sha256(json.dumps([1, kind, state]).encode()).hexdigest()[:24])
    opened.cache_clear()  # a path may name another file by now
    with locked(folder):
        if folder.exists():
            return folder
        with ProcessPoolExecutor(min(len(paths), os.cpu_count())) as pool:
            scans = (pool.map if len(paths) > 1 else map)(scan, paths)
            parts = list(tqdm(scans, "index", len(paths), leave=False, disable=None))
        rows, texts, skipped = zip(*parts)
        number = np.repeat(np.arange(len(paths)), [len(part) for part in rows])
        rows = np.column_stack([np.concatenate(rows), number])
        rows[:, 0] += np.cumsum([0, *map(len, texts)])[number]
        part = folder.with_suffix(".part")
        part.mkdir(exist_ok=True)
        np.save(part / "rows.npy", rows)
        np.save(part / "text.npy", np.frombuffer(b"".join(texts), np.uint8))
        (part / "skipped.json").write_text(json.dumps(sum(skipped, Counter())))
        os.replace(part, folder)
    return folder


@lru_cache
def mapped(path):
    """Array in a .npy file; all processes share its pages."""
    return np.asarray(np.load(path, mmap_mode="r"))


@lru_cache(256)
def opened(path):
    """The file, which is closed as it falls out of the cache."""
    return open(path, "rb", buffering=0)


def read(path, offset, size):
    """Bytes of a file, by pread, which has no position to quarrel about; OSError if the file ends before."""
    content = os.pread(opened(path).fileno(), size, offset)
    if len(content) < size:
        raise OSError(f"{path} ends before byte {offset + size}")
    return content


# data sets

class Unreadable(RuntimeError):
    """Eleven samples failed, one after the other."""


class Pairs(Dataset):
    """Pictures with captions. dataset[index, seed] is the dict of transform(image bytes, caption, rng: random.Random).

    A sample that fails is replaced by the one 7919 further on, ten times at most (then: Unreadable); "index" (of the
    sample used) and "skipped" (number of failures) are added to the dict. `keep`: numbers of the samples in use;
    `skipped`: counts, by reason, of what the files hold beside them. A subclass has captions(i) -> list of str,
    image(i) -> bytes, path or PIL picture, key(i) -> str.
    """
    keep, skipped, classnames = range(0), {}, None

    def __len__(self):
        return len(self.keep)

    def __getitem__(self, sample):
        index, seed = sample
        for skipped in range(11):
            try:
                rng, texts = random.Random(seed), self.captions(index)
                text = rng.choice(texts) if len(texts) > 1 else "".join(texts)
                return self.transform(self.image(index), text, rng) | {"index": index, "skipped": skipped}
            except Exception as error:
                cause, index = f"{self.key(index)}: {error!r}", (index + 7919) % len(self)
        raise Unreadable(f"eleven samples failed one after the other; the last was {cause}")

    def label(self, i):
        """Number of the class, or None."""


class Indexed(Pairs):
    """Pairs in files. What travels to a worker is the path of the index; the arrays are mapped where they are used."""

    def set_index(self, paths, scan, kind):
        self.index = make_index(paths, scan, kind)
        self.keep = range(len(mapped(self.index / "rows.npy")))
        self.skipped = json.loads((self.index / "skipped.json").read_text())
        if not self.keep:
            why = ", ".join(f"{n} x {reason}" for reason, n in self.skipped.items()) or "it is empty"
            more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
            raise SystemExit(f"no picture with a {'class' if kind == 'cls' else 'caption'} in {paths[0]}{more}: {why}")

    def row(self, i):
        return mapped(f"{self.index}/rows.npy")[self.keep[i]].tolist()

    def text(self, i):
        offset, size, *_ = self.row(i)
        return mapped(f"{self.index}/text.npy")[offset:offset + size].tobytes().decode("utf-8", "surrogateescape")


def expand(spec):
    """List of paths: "a{08..11}.tar::b{x,y}.tar::folder/*.tar::folder"; a folder stands for its tars."""
    paths = []
    for part in spec.split("::"):
        part = os.path.expanduser(part)
        if brace := re.search(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}", part):
            low, high, names = brace.groups()
            names = names.split(",") if names else [f"{n:0{len(low)}d}" for n in range(int(low), int(high) + 1)]
            paths += [path for name in names for path in expand(part[:brace.start()] + name + part[brace.end():])]
        elif os.path.isdir(part):
            paths += sorted(map(str, Path(part).glob("*.tar")))
        else:
            paths += sorted(glob.glob(part)) if glob.has_magic(part) else [part]
    return paths


def scan_tar(path, require):
    """Rows (key's offset, size, picture's offset, size, caption's offset, size, class) of a tar; keys; what is not in.

    A sample is a run of members whose names agree up to the first dot, as in webdataset; an extension that comes again
    begins a new one, as in open_clip.
    """
    groups, rows, keys, skipped = [], [], bytearray(), Counter()
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
            if tar.fileobj.read(512) != bytes(512):  # the mark of the end
                raise tarfile.ReadError
    except tarfile.TarError:
        skipped["damaged or truncated tar"] += 1
    for key, group in groups:
        image = next((group[e] for e in ("jpg", "png", "jpeg", "webp") if e in group), None)
        text, label = group.get("txt", (0, 0)), group.get("cls", (0, 0))
        try:
            if max(offset + size for offset, size in group.values()) > os.path.getsize(path):
                raise ValueError("cut off by the end of the tar")
            if not image:
                raise ValueError("no picture")
            if require == "txt" and not read(path, *text).decode().strip():
                raise ValueError("blank or no caption")
            label = read(path, *label).strip()
            label = int(label) if label.isdigit() else -1
            if require == "cls" and label < 0:
                raise ValueError("no class")
        except ValueError as error:
            skipped["caption not UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)] += 1
            continue
        key = key.encode("utf-8", "surrogateescape")
        rows.append((len(keys), len(key), *image, *text, label))
        keys += key
    return np.array(rows, np.int64).reshape(-1, 7), bytes(keys), skipped


class TarDataset(Indexed):
    """webdataset tars: key.jpg (.png, .jpeg, .webp), key.txt and, in test sets, key.cls, with a file classnames.txt.

    require: "txt" (training: the text is one caption) or "cls" (tests: each line of a text is a caption). SystemExit if
    there is no such file, or nothing in it.
    """

    def __init__(self, spec, transform, require="txt"):
        self.paths, self.transform, self.require = expand(spec), transform, require
        missing = [path for path in self.paths if not os.path.isfile(path)] if self.paths else [f"tar in {spec}"]
        if missing:
            raise SystemExit(f"there is no {missing[0]}; data are a folder or pattern of tars, a .tsv, .csv or .jsonl")
        self.set_index(self.paths, partial(scan_tar, require=require), require)
        names = Path(self.paths[0]).with_name("classnames.txt")
        self.classnames = names.read_text("utf-8").splitlines() if names.exists() else None

    def key(self, i):
        return os.path.splitext(os.path.basename(self.paths[self.row(i)[-1]]))[0] + "/" + self.text(i)

    def captions(self, i):
        *_, offset, size, _, number = self.row(i)
        text = read(self.paths[number], offset, size).decode("utf-8", "replace")
        return [text] if self.require == "txt" else [line for line in text.splitlines() if line.strip()]

    def image(self, i):
        _, _, offset, size, *_, number = self.row(i)
        return read(self.paths[number], offset, size)

    def label(self, i):
        label = self.row(i)[-2]
        return None if label < 0 else label


def scan_table(path):
    """Rows (offset, size) into the text of JSON records [file name, captions] of a table; what is left out."""
    rows, text, skipped = [], bytearray(), Counter()
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="\n") as file:
        if path.endswith(".jsonl"):
            lines, name, title = map(json.loads, file), "filename", "caption"
        else:
            first = file.readline()
            split = csv.reader if "\t" not in first else partial(map, lambda line: line.rstrip("\r\n").split("\t"))
            header, lines = next(split([first]), []), split(file)  # tabs: a quote is a quote
            if not {"filepath", "title"} <= {*header}:
                raise SystemExit(f"{path}: the first line must name the columns filepath and title, not {header}")
            name, title = header.index("filepath"), header.index("title")
        while True:
            try:
                line = next(lines)
                found = [line[title]] if isinstance(line[title], str) else line[title]
                found = [caption for caption in found if caption.strip()]
                record = json.dumps([line[name], found], ensure_ascii=False).encode()
                if not found or not isinstance(line[name], str):
                    raise ValueError("blank or no caption")
            except StopIteration:
                break
            except UnicodeEncodeError:
                skipped["caption not UTF-8"] += 1
            except (ValueError, LookupError, TypeError, AttributeError, csv.Error):
                skipped["no file name or no caption"] += 1
            else:
                rows.append((len(text), len(record)))
                text += record
    return np.array(rows, np.int64).reshape(-1, 2), bytes(text), skipped


class TableDataset(Indexed):
    """.tsv or .csv with the columns filepath and title, or .jsonl with filename and caption, a text or a list of texts.
    Pictures lie relative to the table. SystemExit if there is no such file, or no such columns, or nothing in it."""

    def __init__(self, path, transform):
        self.path, self.transform = path, transform
        if not os.path.isfile(path):
            raise SystemExit(f"there is no {path}")
        self.set_index([path], scan_table, "table")

    def key(self, i):
        return json.loads(self.text(i))[0]

    def captions(self, i):
        return json.loads(self.text(i))[1]

    def image(self, i):
        return Path(self.path).parent.joinpath(self.key(i)).read_bytes()


# the built-in data

def arc(radius, start, end, n=24, center=0):
    """n + 1 points, as complex numbers, of an arc between two angles in turns."""
    return [center + cmath.rect(radius, math.tau * (start + (end - start) * k / n)) for k in range(n + 1)]


COLORS = {"red": (0, "crimson", "scarlet"), "orange": (28, "tangerine", "amber"), "yellow": (54, "golden", "lemon"),
          "green": (120, "emerald", "lime"), "cyan": (180, "turquoise", "teal"), "blue": (225, "azure", "navy"),
          "purple": (272, "violet", "lilac"), "pink": (325, "rose", "magenta")}  # hue in degrees, synonyms
SHAPES = {"circle": (arc(1, 0, 1), "disc", "dot"), "ring": (arc(1, 0, 1) + arc(.55, 1, 0), "hoop", "donut"),
          "square": (arc(1.1, 0, 1, 4), "box", "block"), "triangle": (arc(1.15, 0, 1, 3), "wedge", "pyramid"),
          "star": ([cmath.rect(1 - k % 2 * .58, math.tau * k / 10) for k in range(10)], "starlet", "asterisk"),
          "cross": ([z * 1j ** n for n in range(4) for z in (1 - .3j, 1 + .3j, .3 + .3j)], "plus", "crucifix"),
          "crescent": (arc(1, .12, .88) + arc(.8, .85, .15, 24, .42), "moon", "sickle"),
          "heart": (arc(.5, .5, 1, 12, -.5) + arc(.5, .5, 1, 12, .5) + [1.15j], "valentine", "sweetheart")}  # polygon
KINDS = [(color, shape) for color in COLORS for shape in SHAPES]
HELD_OUT = [kind for i, kind in enumerate(KINDS) if i // 8 % 2 == i % 8 % 2 == 0]  # 4 colours x 4 shapes
TRAINED = [kind for kind in KINDS if kind not in HELD_OUT]
BESIDE = {(c, s): [kind for kind in TRAINED if not {(c, kind[1]), (kind[0], s)} & {*HELD_OUT}] for c, s in KINDS}
OPENINGS = ["a", "a", "the", "my", "one", "nice", "a photo of a", "picture of a", "this is a", "stock image :"]
CHATTER = ["free download", "holiday 2014", "for sale", "vector clip art", "made by anna", "img 0042", "best price",
           "from our trip to paris", "with dog", "new in shop", "# art", "( signed print )", "cat not included"]
TOY = {"pairs": 24_576, "side": 40, "radius": (.3, .45), "shift": .08, "turn": .05, "hue": 9, "patches": .2,
       "noise": .2, "second": .1,  # above: the picture; below: probabilities in a caption
       "mismatch": .1, "color": .65, "shape": .7, "synonym": .5, "chatter": .35}


class ToyDataset(Pairs):
    """Small scenes, each a function of (seed, split, number) alone, with captions like those of the web: synonyms,
    attributes left out, words about nothing in the picture, a tenth of them of another picture.

    Of the 64 kinds (colour, shape) 16 are in no training picture or caption. The split "test" shows these alone: their
    class is among all 64, their caption is clean and full.
    """
    classnames = [" ".join(kind) for kind in KINDS]

    def __init__(self, length, transform, split="train", seed=0):
        self.keep, self.transform, self.split, self.seed = range(length), transform, split, seed

    def rng(self, what, number):
        return random.Random(f"{self.seed} {self.split} {what} {number}")

    def scene(self, number):
        """Dict of what is in a picture. A second object makes no held-out kind with the first one, however combined."""
        rng = self.rng("scene", number)
        kind = rng.choice(HELD_OUT if self.split == "test" else TRAINED)
        size, x, y = rng.random(), *(.5 + rng.uniform(-1, 1) * TOY["shift"] for _ in "xy")
        other = rng.choice(BESIDE[kind]) if rng.random() < TOY["second"] else None
        return {"kind": kind, "other": other, "x": x, "y": y,
                "radius": TOY["radius"][0] * (1 - size) + TOY["radius"][1] * size,
                "size": "large" if size > .5 else "small", "light": rng.choice(["dark", "bright"])}

    def key(self, i):
        return f"toy-{self.split}/{self.keep[i]:08d}"

    def label(self, i):
        return KINDS.index(self.scene(self.keep[i])["kind"])

    def captions(self, i):
        rng, scene = self.rng("caption", self.keep[i]), self.scene(self.keep[i])
        if self.split == "test":
            return [f"a {scene['size']} {' '.join(scene['kind'])} on a {scene['light']} background"]
        if rng.random() < TOY["mismatch"]:
            scene = self.scene(self.keep[i] + 1)

        def some(probability, text, otherwise=""):
            return text if rng.random() < probability else otherwise

        def name(color, shape):
            color, shape = (some(TOY["synonym"], rng.choice(names[word][1:]), word)
                            for names, word in [(COLORS, color), (SHAPES, shape)])
            return some(TOY["color"], color) + " " + some(TOY["shape"], shape, rng.choice(["thing", "object"]))

        words = [rng.choice(OPENINGS), some(.4, scene["size"]), name(*scene["kind"]),
                 some(.6, f"with a {name(*scene['other'])}") if scene["other"] else "",
                 some(.2, f"on a {scene['light']} background"),
                 some(TOY["chatter"], rng.choice(CHATTER)), some(TOY["chatter"], rng.choice(CHATTER))]
        return [" ".join(" ".join(words).split())]

    def image(self, i):
        rng, scene, side = self.rng("picture", self.keep[i]), self.scene(self.keep[i]), TOY["side"]
        tone = [rng.randint(*{"dark": (5, 45), "bright": (60, 100)}[scene["light"]]) for _ in range(3)]
        patches = Image.frombytes("RGB", (6, 6), rng.randbytes(108)).resize((side, side), Image.BICUBIC)
        picture = Image.blend(Image.new("RGB", (side, side), tuple(tone)), patches, rng.uniform(0, TOY["patches"]))
        second = (scene["other"], .15 if scene["x"] > .5 else .85, rng.choice([.15, .85]), .11)
        for kind, x, y, radius in [(scene["kind"], scene["x"], scene["y"], scene["radius"]), second]:
            if kind:
                hue = (COLORS[kind[0]][0] + rng.uniform(-1, 1) * TOY["hue"]) / 360 % 1
                tone = colorsys.hsv_to_rgb(hue, rng.uniform(.6, 1), rng.uniform(.75, 1))
                turn = cmath.rect(3 * side * radius, math.tau * rng.uniform(-1, 1) * TOY["turn"])
                points = [3 * side * complex(x, y) + turn * z for z in SHAPES[kind[1]][0]]
                mask = Image.new("L", (3 * side, 3 * side))
                ImageDraw.Draw(mask).polygon([(z.real, z.imag) for z in points], 255)
                picture.paste(tuple(int(255 * t) for t in tone), (0, 0), mask.reduce(3))
        noise = Image.frombytes("RGB", (side, side), rng.randbytes(3 * side * side))
        file = io.BytesIO()
        Image.blend(picture, noise, rng.uniform(0, TOY["noise"])).save(file, "JPEG", quality=90)
        return file.getvalue()


def open_dataset(spec, transform, limit=None, subset=None, root=None):
    """Pairs that the string `spec` names (see the top). limit: the first n; subset: a file with the key of a sample a
    line; root: the folder of the named sets, else $CLIP_DATA, else ./datasets. SystemExit if nothing is there."""
    if spec in ("cc3m", "cc12m", "yfcc15m"):
        spec = os.path.join(root or os.environ.get("CLIP_DATA") or "datasets", spec)
        if not os.path.isdir(spec):
            raise SystemExit(f"--data: there is no folder {spec}; its parent is set by --data-root or $CLIP_DATA")
    if spec == "toy":
        dataset = ToyDataset(limit or TOY["pairs"], transform)
    else:
        dataset = (TableDataset if spec.endswith((".tsv", ".csv", ".jsonl")) else TarDataset)(spec, transform)
    if subset:
        if not os.path.isfile(subset):
            raise SystemExit(f"--subset: there is no file {subset}")
        first, keys = dataset.key(0), {*Path(subset).read_text("utf-8", "surrogateescape").splitlines()}
        dataset.keep = np.array([i for i in range(len(dataset)) if dataset.key(i) in keys], np.int64)
        if not len(dataset):
            raise SystemExit(f"--subset: {subset} names no sample (one is {first})")
    dataset.keep = dataset.keep[:limit]
    return dataset


def captions(spec, limit=None, root=None):
    """Iterates (key, caption) over a data set; no picture is read."""
    dataset = open_dataset(spec, None, limit, root=root)
    return ((dataset.key(i), text) for i in range(len(dataset)) for text in dataset.captions(i))


# order and batches

class EpochBatches:
    """Batch sampler of one rank: lists of (index, seed). Set `epoch`, and `start` (steps to leave out) to resume.

    Step k of rank r is perm[(k W + r) B :][:B], perm a function of (seed, epoch): the ranks side by side are the batch
    of one process. The tail of an epoch is dropped. A sample's seed is a function of (seed, epoch, stream, place in
    perm): another stream is another pass in the same order. indices: numbers of samples, repeats allowed, to permute
    instead of range(length). SystemExit if they do not fill a batch.
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
        seeds = np.random.PCG64([1, self.seed, self.epoch, self.stream]).random_raw(len(perm)) >> np.uint64(1)
        for step in range(self.start, len(self)):
            first = (step * self.world + self.rank) * self.batch_size
            here = slice(first, first + self.batch_size)
            yield list(zip(self.indices[perm[here]].tolist(), seeds[here].tolist()))


def collate(samples):
    """Dict of stacked tensors; "tokens" [..., L] are cut to the shortest of a few lengths that holds them all."""
    batch = default_collate(samples)
    if "tokens" in batch:
        used = int(batch["tokens"].flatten(0, -2).any(0).nonzero().max()) + 1  # padding is 0, EOT never is
        length = next(n for n in (16, 24, 32, 48, 64, batch["tokens"].shape[-1]) if n >= used)
        batch["tokens"] = batch["tokens"][..., :length].contiguous()
    return batch


def deaf(worker):
    """A worker leaves SIGTERM, which torchrun and SLURM send to all processes, to the training loop: it saves first."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


@atexit.register
def kill_workers():
    """At exit multiprocessing sends SIGTERM to workers that an exception has left behind, and would wait for the deaf."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for worker in multiprocessing.active_children():
        if worker.daemon:
            worker.kill()


class Loader(DataLoader):
    """Where Pairs is Unreadable, SystemExit with its sentence alone."""

    def __iter__(self):
        try:
            yield from super().__iter__()
        except Unreadable as error:  # a worker's brings its traceback
            raise SystemExit(f"{str(error).rpartition('Unreadable: ')[2].strip()}; see: python data.py PATH") from None


def loader(dataset, batches, workers, device=None):
    """Loader of Pairs over EpochBatches; its workers live on between epochs. torch's global RNG is left alone."""
    cuda = device is not None and torch.device(device).type == "cuda"
    return Loader(dataset, batch_sampler=batches, num_workers=workers, collate_fn=collate, pin_memory=cuda,
                  persistent_workers=workers > 0, worker_init_fn=deaf, generator=torch.Generator())


def check_skipped(skipped, seen):
    """SystemExit if more than 5 % failed, of the first thousand samples or of all so far. Counts of all ranks."""
    if skipped > .05 * max(seen, 1000):
        raise SystemExit(f"{skipped} pictures failed in {seen} samples: a wrong path or format? See: python data.py PATH")


def main(argv=None):
    parser = argparse.ArgumentParser(description="Says what is in a data set and draws a sheet of samples.")
    parser.add_argument("data", help="toy, cc3m, cc12m, yfcc15m; folder or pattern of tars; a .tsv, .csv or .jsonl")
    parser.add_argument("--limit", type=int, help="the first N pairs alone")
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
    print("left out:", ", ".join(f"{n:,} x {reason}" for reason, n in dataset.skipped.items()) or "nothing")
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
