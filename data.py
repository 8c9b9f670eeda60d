"""Pictures with captions: where they lie, in which order they come, how they become tensors.

    python data.py PATH        # what is there: pairs, what was left out and why, speed, and a sheet of samples

A data set is one string: "toy" (drawn by code), a name (cc3m, cc12m, yfcc15m: a folder under --data-root), webdataset
tars (a folder, a pattern such as "cc3m-{0000..0575}.tar", several joined by "::"), a .tsv/.csv with the columns filepath
and title, or a .jsonl with filename and caption. Everything is read by position, so the order of an epoch is a plain
permutation: exact for any number of ranks and workers, and after a restart.
"""
import argparse, collections, colorsys, concurrent.futures, contextlib, csv, fcntl, functools, glob, gzip, hashlib, heapq
import html, io, itertools, json, math, os, random, re, sys, tarfile, textwrap, time, unicodedata, urllib.request, warnings

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch.utils.data import DataLoader, Dataset, default_collate
from tqdm import tqdm

warnings.filterwarnings("ignore", module="PIL")              # odd pictures are dealt with here, not on the terminal

# pictures: decode, crop, normalise

MEAN, STD = (.48145466, .4578275, .40821073), (.26862954, .26130258, .27577711)      # OpenAI's
MAX_PIXELS = 50_000_000


def open_image(image):
    """PIL picture from bytes, a path or itself; reads the header only. ValueError above 50 megapixels."""
    if not isinstance(image, Image.Image):
        image = Image.open(io.BytesIO(image) if isinstance(image, bytes) else image)
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"{image.width} x {image.height} pixels are more than {MAX_PIXELS}")
    return image


def decode(image, enough=None):
    """RGB picture (PIL) from bytes, a path or a PIL picture.

    enough: (width, height); a JPEG may then be decoded at 1/2, 1/4 or 1/8, but not below this size (four times faster
    for photographs from a camera). First frame of an animation, EXIF rotation ignored, 16 bits scaled to 8.
    """
    image = open_image(image)
    if enough:
        image.draft("RGB", enough)
    image.load()
    if image.mode.startswith("I"):                                                   # 16-bit grey: convert() would saturate
        image = Image.fromarray((np.asarray(image) // 257).clip(0, 255).astype(np.uint8))
    return image if image.mode == "RGB" else image.convert("RGB")


def crop_box(width, height, scale, rng, ratio=(3 / 4, 4 / 3)):
    """(top, left, height, width) of a random crop: area U(scale) of the picture, log-uniform ratio (as torchvision)."""
    for _ in range(10):
        area, aspect = width * height * rng.uniform(*scale), math.exp(rng.uniform(*map(math.log, ratio)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return rng.randint(0, height - h), rng.randint(0, width - w), h, w
    w, h = min(width, round(height * ratio[1])), min(height, round(width / ratio[0]))  # largest centre crop of that shape
    return (height - h) // 2, (width - w) // 2, max(h, 1), max(w, 1)


def resize_crop(image, box, size):
    """uint8 [3, size, size]: box (top, left, height, width; may be fractions) of a PIL RGB picture, bicubic."""
    top, left, h, w = box
    image = image.resize((size, size), Image.BICUBIC, box=(left, top, left + w, top + h))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def random_resized_crop(image, size, scale, rng, ratio=(3 / 4, 4 / 3)):
    """uint8 [3, size, size] from bytes, a path or a PIL picture; rng: random.Random."""
    image = open_image(image)
    width, height = image.size
    top, left, h, w = crop_box(width, height, scale, rng, ratio)
    image = decode(image, (math.ceil(width * size / w), math.ceil(height * size / h)))
    x, y = image.width / width, image.height / height                               # below 1 after a reduced decoding
    return resize_crop(image, (top * y, left * x, h * y, w * x), size)


def center_crop(image, size):
    """uint8 [3, size, size]: short side to size, then the centre; equals torchvision's Resize and CenterCrop."""
    image = decode(image)
    width, height = image.size
    short = min(width, height)
    x, y = width / int(size * width / short), height / int(size * height / short)   # source pixels per pixel
    left, top = round((width / x - size) / 2), round((height / y - size) / 2)
    return resize_crop(image, (top * y, left * x, size * y, size * x), size)


class Preprocess:
    """The test-time transform of a model. __call__: bytes, path or PIL picture -> float32 [3, size, size], normalised."""

    def __init__(self, size, mean=MEAN, std=STD):
        self.size, self.mean, self.std = size, tuple(mean), tuple(std)

    def __call__(self, image):
        return self.normalize(center_crop(image, self.size))

    def normalize(self, images):
        """[..., 3, S, S] uint8, or float in [0, 1] -> float32 (float64 stays), on the device of the images."""
        x = images / 255 if images.dtype == torch.uint8 else images.to(torch.promote_types(images.dtype, torch.float32))
        return torch.stack([(x.select(-3, c) - self.mean[c]) / self.std[c] for c in range(3)], -3)


# colour augmentation: parameters drawn in the worker, applied on the device

def color_params(rng, flip=0., jitter=(0, 0, 0, 0, 0), grey=0., blur=0., solarize=0.):
    """float32 [8]: flip, brightness, contrast, saturation, hue, grey, blur sigma, solarize; identity 0 1 1 1 0 0 0 0.

    flip, grey, blur, solarize: probabilities; sigma ~ U(.1, 2) in pixels of a 224-pixel picture. jitter: (probability,
    brightness, contrast, saturation, hue) with the ranges of torchvision's ColorJitter.
    """
    p, *ranges, hue = jitter
    if rng.random() < p:
        color = [rng.uniform(max(0, 1 - r), 1 + r) for r in ranges] + [rng.uniform(-hue, hue)]
    else:
        color = [1, 1, 1, 0]
    sigma = rng.uniform(.1, 2) if rng.random() < blur else 0
    return torch.tensor([rng.random() < flip, *color, rng.random() < grey, sigma, rng.random() < solarize],
                        dtype=torch.float32)


def augment(images, params):
    """uint8 [B, 3, S, S], color_params [B, 8] on the same device -> float32 [B, 3, S, S] in [0, 1]. Never waits for the host.

    Fixed order: brightness, contrast, saturation, hue, grey, blur, solarize (torchvision shuffles the first four).
    """
    B, _, S, _ = images.shape
    flip, brightness, contrast, saturation, hue, grey, sigma, solarize = params.float().view(B, 8, 1, 1, 1).unbind(1)
    x = images / 255
    x = torch.where(flip > 0, x.flip(-1), x)
    luma = lambda x: .2989 * x[:, :1] + .587 * x[:, 1:2] + .114 * x[:, 2:]            # [B, 1, S, S]
    x = (brightness * x).clamp(0, 1)
    x = (contrast * x + (1 - contrast) * luma(x).mean((2, 3), keepdim=True)).clamp(0, 1)
    x = (saturation * x + (1 - saturation) * luma(x)).clamp(0, 1)
    x = torch.where(hue == 0, x, shift_hue(x, hue))
    x = torch.where(grey > 0, luma(x), x)
    x = torch.where(sigma > 0, gaussian_blur(x, sigma.clamp(min=.1) * S / 224), x)
    return torch.where((solarize > 0) & (x >= .5), 1 - x, x)


def shift_hue(x, shift):
    """x [B, 3, S, S] in [0, 1] with its hue (in turns) moved by shift [B, 1, 1, 1]."""
    r, g, b = x.split(1, 1)
    top, span = x.amax(1, keepdim=True), x.amax(1, keepdim=True) - x.amin(1, keepdim=True)
    d = span.clamp(min=1e-12)
    h = torch.where(top == r, (g - b) / d, torch.where(top == g, 2 + (b - r) / d, 4 + (r - g) / d)) + 6 * shift
    k = (torch.cat([5 + h, 3 + h, 1 + h], 1)) % 6                                    # [B, 3, S, S]: the HSV hexagon
    return top - span * torch.minimum(k, 4 - k).clamp(0, 1)


def gaussian_blur(x, sigma):
    """x [B, 3, S, S] blurred with its own sigma [B, 1, 1, 1] in pixels; edges mirrored; kernel of S / 11 pixels."""
    S, radius = x.shape[-1], max(1, round(x.shape[-1] / 22.4))
    away, at = torch.arange(-radius, radius + 1, device=x.device), torch.arange(S, device=x.device)
    kernel = torch.softmax(-away ** 2 / (2 * sigma.flatten(1) ** 2), 1)              # [B, 2 radius + 1]
    source = (S - 1) - ((S - 1) - (at[:, None] + away).abs()).abs()                  # mirrored at both edges
    with torch.autocast(x.device.type, enabled=False):
        matrix = torch.einsum("bk,skt->bst", kernel, (source[..., None] == at).to(kernel.dtype))[:, None]
        return matrix @ x @ matrix.mT


def grid(images, captions, path, columns=4):
    """Writes a PNG of pictures with their captions. images: list of uint8 [3, h, w]; small ones are enlarged."""
    width = max(160, *(image.shape[2] for image in images))
    font, cells = ImageFont.load_default(), []
    for image, caption in zip(images, captions):
        factor = max(1, width // image.shape[2])
        image = image.repeat_interleave(factor, 1).repeat_interleave(factor, 2)
        text = "\n".join(textwrap.wrap(caption, width // 6)[:5]).encode("latin-1", "replace").decode("latin-1")
        cell = Image.new("RGB", (width + 8, image.shape[1] + 80), "white")
        cell.paste(Image.fromarray(image.permute(1, 2, 0).cpu().numpy()), (4, 4))
        ImageDraw.Draw(cell).text((4, image.shape[1] + 8), text, "black", font)
        cells.append(cell)
    height, rows = max(cell.height for cell in cells), math.ceil(len(cells) / columns)
    sheet = Image.new("RGB", (cells[0].width * min(columns, len(cells)), height * rows), "white")
    for i, cell in enumerate(cells):
        sheet.paste(cell, (i % columns * cell.width, i // columns * height))
    sheet.save(path, "PNG")


# tokens: the byte-pair encoding of CLIP (Radford et al. 2021), exact, by the standard library

BPE_FILE, BPE_URL = "bpe_simple_vocab_16e6.txt.gz", "https://github.com/openai/CLIP/raw/main/clip/bpe_simple_vocab_16e6.txt.gz"
BPE_SHA256 = "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"
SOT, EOT = "<|startoftext|>", "<|endoftext|>"


@functools.lru_cache(None)
def character_table():
    """What ftfy does to single characters: ligatures, full-width forms, curly quotes, control characters."""
    table = {c: unicodedata.normalize("NFKC", chr(c)) for c in [0x132, 0x133, 0x149, *range(0x1C4, 0x1CD), *range(0x1F1, 0x1F4),
                                                                *range(0xFB00, 0xFB07), 0x3000, *range(0xFF01, 0xFFF0)]}
    table |= dict.fromkeys([0x2BC, *range(0x2018, 0x201C)], "'") | dict.fromkeys(range(0x201C, 0x2020), '"')
    gone = [*range(9), 0xB, *range(0xE, 0x20), 0x7F, *range(0x206A, 0x2070), 0xFEFF, *range(0xFFF9, 0xFFFD)]
    return table | dict.fromkeys(gone)


def clean(text):
    """The text in lower case, with single spaces, entities resolved and typographic characters made plain."""
    if not text.isascii() or "&" in text or not text.isprintable():
        entities, before = "<" not in text, None
        while text != before:
            before = text
            text = unicodedata.normalize("NFC", (html.unescape(text) if entities else text).translate(character_table()))
        text = html.unescape(html.unescape(text))
    return " ".join(text.split()).lower()


@functools.lru_cache(None)
def pieces():
    """Compiled pattern of the pieces that are merged on their own: contractions, letters, one digit, the rest."""
    number = "".join(c for c in map(chr, range(sys.maxunicode + 1)) if unicodedata.category(c) in ("Nl", "No"))
    return re.compile(rf"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d"
                      rf"|[^\W\d_{number}]+|[\d{number}]|(?:[^\w\s]|_)+", re.IGNORECASE)


def byte_symbols():
    """The 256 printable characters that stand for bytes, in the order of their ids, and the byte of each."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(others)}


def symbols(piece, characters):
    """Tuple of the symbols of a piece before any merge; the last one carries the end-of-word mark."""
    *head, last = (characters[b] for b in piece.encode())
    return (*head, last + "</w>")


class Tokenizer:
    """tokens = tokenizer(["a red circle"]): int64 [n, context]: SOT, ids, EOT, then 0; too long texts end in EOT too.

    merges: file in OpenAI's format (.txt or .gz) or a list of pairs. Ids: 256 bytes, 256 bytes at the end of a word, the
    merges, SOT, EOT (the largest). Equal to the released code but for what its ftfy repairs in broken encodings.
    """

    def __init__(self, merges, context=77):
        if isinstance(merges, (str, os.PathLike)):
            with (gzip.open if str(merges).endswith(".gz") else open)(merges, "rt", encoding="utf-8") as file:
                lines = file.read().split("\n")[1:49152 - 256 - 2 + 1]                # a header first; rare merges unused
            merges = [tuple(line.split()) for line in lines if line.strip()]
        self.merges, self.context = [tuple(pair) for pair in merges], context
        if any(len(pair) != 2 for pair in self.merges):
            raise SystemExit("the merges of the tokenizer must be lines of two symbols (OpenAI's bpe_simple_vocab format)")
        self.bytes = byte_symbols()
        self.characters = {b: c for c, b in self.bytes.items()}
        self.vocabulary = [*self.bytes, *(c + "</w>" for c in self.bytes), *map("".join, self.merges), SOT, EOT]
        self.ids = {symbol: i for i, symbol in enumerate(self.vocabulary)}
        self.ranks = {pair: rank for rank, pair in enumerate(self.merges)}
        self.vocab_size, self.sot, self.eot = len(self.vocabulary), len(self.vocabulary) - 2, len(self.vocabulary) - 1
        self.cache = {}

    def merge(self, piece):
        """Ids of a piece: the earliest learnt pair is joined everywhere, again and again."""
        if piece in (SOT, EOT):
            return [self.ids[piece]]
        word = symbols(piece, self.characters)
        while len(word) > 1:
            pair = min(zip(word, word[1:]), key=lambda pair: self.ranks.get(pair, math.inf))
            if pair not in self.ranks:
                break
            word = join(word, pair)
        return [self.ids[symbol] for symbol in word]

    def encode(self, text):
        """List of ids of a text, without SOT and EOT."""
        ids = []
        for piece in pieces().findall(clean(text)):
            if piece not in self.cache:
                if len(self.cache) >= 50_000:
                    self.cache.clear()
                self.cache[piece] = self.merge(piece)
            ids += self.cache[piece]
        return ids

    def decode(self, ids):
        """Text of ids (list or tensor [n]), up to EOT; SOT is left out."""
        ids = list(itertools.takewhile(lambda i: i != self.eot, map(int, ids)))
        text = "".join(self.vocabulary[i] for i in ids if i != self.sot).replace("</w>", " ")
        return bytes(self.bytes.get(c, 32) for c in text).decode("utf-8", "replace").strip()

    def __call__(self, texts):
        tokens = torch.zeros(len(texts), self.context, dtype=torch.int64)
        for row, text in zip(tokens, texts):
            ids = [self.sot, *self.encode(text)[:self.context - 2], self.eot]
            row[:len(ids)] = torch.tensor(ids)
        return tokens


def join(word, pair):
    """The word (tuple of symbols) with each occurrence of the pair, from the left, made one symbol."""
    joined, i = [], 0
    while i < len(word):
        if word[i:i + 2] == pair:
            joined.append(pair[0] + pair[1])
            i += 2
        else:
            joined.append(word[i])
            i += 1
    return tuple(joined)


def train_bpe(captions, size):
    """Merges (list of pairs) for a vocabulary of `size` ids, 514 of which are bytes, SOT and EOT.

    The most frequent pair first, of equal ones the smallest (Sennrich et al. 2016). Only words that hold the merged pair
    are counted again; outdated entries of the heap are dropped as they come up.
    """
    characters = {b: c for c, b in byte_symbols().items()}
    counted = collections.Counter(p for caption in captions for p in pieces().findall(clean(caption)) if p not in (SOT, EOT))
    words, counts = [symbols(piece, characters) for piece in counted], list(counted.values())
    pairs, where = collections.Counter(), collections.defaultdict(set)
    for i, word in enumerate(words):
        for pair in zip(word, word[1:]):
            pairs[pair] += counts[i]
            where[pair].add(i)
    heap, merges = [(-count, pair) for pair, count in pairs.items()], []
    heapq.heapify(heap)
    while heap and len(merges) < size - 514:
        count, pair = heapq.heappop(heap)
        if -count != pairs[pair] or not count:
            continue
        merges.append(pair)
        changed = set()
        for i in where.pop(pair):
            old, words[i] = words[i], join(words[i], pair)
            for p in zip(old, old[1:]):
                pairs[p] -= counts[i]
                changed.add(p)
            for p in zip(words[i], words[i][1:]):
                pairs[p] += counts[i]
                where[p].add(i)
                changed.add(p)
        for p in changed:
            heapq.heappush(heap, (-pairs[p], p))
    return merges


def find_tokenizer(bpe, spec, root=None):
    """Tokenizer for a data set. bpe: None (the toy data: trained on it; else OpenAI's merges from $CLIP_BPE, beside this
    file, the cache, or the net), "train" (on the captions of spec), or a path. SystemExit if there is none."""
    if bpe == "train" or (bpe is None and spec == "toy"):
        return Tokenizer(train_bpe((text for _, text in captions(spec, 200_000 if bpe else 10_000, root)), 8192))
    here = os.path.join(os.path.dirname(os.path.abspath(__file__)), BPE_FILE)
    for path in [bpe] if bpe else [os.environ.get("CLIP_BPE"), here, cache(BPE_FILE)]:
        if path and os.path.exists(path):
            return Tokenizer(path)
        if path and path in (bpe, os.environ.get("CLIP_BPE")):
            raise SystemExit(f"--bpe or $CLIP_BPE: there is no file {path}")
    with locked(path):
        if not os.path.exists(path):
            try:
                with urllib.request.urlopen(BPE_URL, timeout=20) as reply:
                    content = reply.read()
            except OSError as error:
                raise SystemExit(f"no tokenizer: {BPE_URL} cannot be reached ({error}); put {BPE_FILE} (sha256 {BPE_SHA256}) "
                                 f"beside data.py, name it by --bpe or $CLIP_BPE, or use --bpe train") from None
            if hashlib.sha256(content).hexdigest() != BPE_SHA256:
                raise SystemExit(f"{BPE_URL} sent a file with another sha256 than {BPE_SHA256}; try again or use --bpe train")
            with open(path + ".part", "wb") as file:
                file.write(content)
            os.replace(path + ".part", path)
    return Tokenizer(path)


# files: what is made once for all ranks, where a data set lies

def cache(name):
    """Path of a file of this project in the user's cache."""
    return os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "data-efficient-clip", name)


@contextlib.contextmanager
def locked(path):
    """One process at a time makes `path`; the others wait here, then find it."""
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        file = open(path + ".lock", "w")
    except OSError as error:
        raise SystemExit(f"cannot write the cache ({error}); let $XDG_CACHE_HOME name a folder that can be written") from None
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def expand(spec):
    """Paths of "a{00..11}.tar::b{x,y}.tar::folder::*.tar", in order; a folder stands for its *.tar."""
    paths = []
    for part in spec.split("::"):
        brace = re.search(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}", part)
        if brace:
            low, high, names = brace.groups()
            names = names.split(",") if names else [f"{n:0{len(low)}d}" for n in range(int(low), int(high) + 1)]
            paths += [p for name in names for p in expand(part[:brace.start()] + name + part[brace.end():])]
        elif os.path.isdir(os.path.expanduser(part)):
            paths += sorted(glob.glob(os.path.join(glob.escape(os.path.expanduser(part)), "*.tar")))
        elif glob.has_magic(part):
            paths += sorted(glob.glob(os.path.expanduser(part)))
        else:
            paths.append(os.path.expanduser(part))
    return paths


@functools.lru_cache(256)
def opened(path):
    return open(path, "rb", buffering=0)                     # closed as it falls out of the cache; pread shares no position


def read(path, offset, size):
    """bytes at offset; OSError if the file has become shorter."""
    content = os.pread(opened(path).fileno(), size, offset)
    if len(content) != size:
        raise OSError(f"{path} ends before byte {offset + size}")
    return content


# data sets

class Pairs(Dataset):
    """Pictures with captions. A sample is asked for by (index, seed) and comes as the dict of the transform.

    transform(image bytes, caption, rng: random.Random) -> dict of tensors; "index" (of the sample used) and "skipped" (how
    many failed before it) are added. A sample that fails is replaced by the one 7919 further, at most ten times.
    `rows` has a row a sample: to select rows is to select samples. `skipped` counts by reason what was left out.
    """
    rows, classnames, skipped = (), None, {}

    def __len__(self):
        return len(self.rows)

    def key(self, i): ...                                    # str, the same wherever the data lies
    def captions(self, i): ...                               # list of str
    def image(self, i): ...                                  # bytes

    def label(self, i):
        return None

    def __getitem__(self, sample):
        index, seed = sample
        for skipped in range(11):
            try:
                rng, texts = random.Random(seed), self.captions(index)
                text = rng.choice(texts) if len(texts) > 1 else "".join(texts)
                return self.transform(self.image(index), text, rng) | {"index": index, "skipped": skipped}
            except Exception as error:
                cause, index = f"{self.key(index)}: {error!r}", (index + 7919) % len(self)
        raise RuntimeError(f"eleven samples in a row failed; the last was {cause}")


def scan(path, require):
    """Index of a tar: rows int64 [n, 7] (image offset, size, text offset, size, label, key offset, size), keys as bytes,
    Counter of what was left out. Groups as webdataset and open_clip do: neighbours with the same name up to the first dot."""
    groups, skipped, length = [], collections.Counter(), os.path.getsize(path)
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                folder, slash, base = member.name.rpartition("/")
                stem, dot, extension = base.partition(".")
                extension = extension.lower()
                if not member.isreg() or member.issparse() or not stem or not dot or re.fullmatch("__.*__", base):
                    continue
                key = folder + slash + stem
                if not groups or groups[-1][0] != key or extension in groups[-1][1]:
                    groups.append((key, {}))
                groups[-1][1][extension] = member.offset_data, member.size
    except tarfile.ReadError:
        skipped["damaged or truncated tar"] += 1
    rows, keys = [], bytearray()
    for key, group in groups:
        image = next((group[e] for e in ("jpg", "png", "jpeg", "webp") if e in group), None)
        text, label = group.get("txt", (0, 0)), group.get("cls")
        if any(offset + size > length for offset, size in group.values()):
            skipped["past the end of a truncated tar"] += 1
            continue
        if image is None:
            skipped["no picture"] += 1
            continue
        try:
            label = int(read(path, *label)) if label else -1
        except ValueError:
            label = -1
        try:
            blank = not read(path, *text).decode().strip()
            reason = "blank or no caption" if blank else None
        except UnicodeDecodeError:
            reason = "caption is not UTF-8"
        if require == "cls":
            text = (0, 0) if reason else text
            reason = "no class" if label < 0 else None
        if reason:
            skipped[reason] += 1
            continue
        rows.append((*image, *text, label, len(keys), len(key.encode("utf-8", "surrogateescape"))))
        keys += key.encode("utf-8", "surrogateescape")
    return np.array(rows, dtype=np.int64).reshape(-1, 7), bytes(keys), skipped


class TarDataset(Pairs):
    """webdataset tars: key.jpg (png, jpeg, webp) with key.txt, and key.cls in test sets.

    require: "txt" (training; the text is one caption) or "cls" (tests; each line of the text, if any, is a caption). The
    tars are indexed once, in parallel, into the user's cache; processes share the index by memory map, and read by pread.
    """

    def __init__(self, spec, transform, require="txt"):
        self.paths, self.transform, self.require = expand(spec), transform, require
        missing = [path for path in self.paths if not os.path.isfile(path)]
        if missing or not self.paths:
            raise SystemExit(f"no such data: {missing[0]}" if missing else f"no .tar files in {spec}")
        state = [(os.path.abspath(p), os.path.getsize(p), os.stat(p).st_mtime_ns) for p in self.paths]
        self.index = cache("index-" + hashlib.sha256(json.dumps([1, require, state]).encode()).hexdigest()[:32])
        with locked(self.index):
            if not os.path.exists(self.index):
                self.build()
        with open(os.path.join(self.index, "skipped.json")) as file:
            self.skipped = json.load(file)
        self.keep = slice(None)
        self.map()
        if not len(self):
            why = ", ".join(f"{reason}: {n}" for reason, n in self.skipped.items()) or "no files in it"
            raise SystemExit(f"{spec} holds no picture with a {'caption (.txt)' if require == 'txt' else 'class (.cls)'} ({why})")
        names = os.path.join(os.path.dirname(self.paths[0]), "classnames.txt")
        if os.path.exists(names):
            with open(names, encoding="utf-8") as file:
                self.classnames = file.read().splitlines()

    def build(self):
        job = functools.partial(scan, require=self.require)
        if len(self.paths) == 1:
            parts = [job(self.paths[0])]
        else:
            with concurrent.futures.ProcessPoolExecutor(min(len(self.paths), os.cpu_count(), 32)) as pool:
                parts = list(tqdm(pool.map(job, self.paths), "index", len(self.paths), disable=None, leave=False))
        shard = np.repeat(np.arange(len(parts)), [len(rows) for rows, _, _ in parts])
        start = np.cumsum([0] + [len(keys) for _, keys, _ in parts])[shard]
        rows = np.column_stack([np.concatenate([rows for rows, _, _ in parts]), shard])
        rows[:, 5] += start
        os.makedirs(self.index + ".part", exist_ok=True)
        np.save(self.index + ".part/rows.npy", rows)
        np.save(self.index + ".part/keys.npy", np.frombuffer(b"".join(keys for _, keys, _ in parts), np.uint8))
        with open(self.index + ".part/skipped.json", "w") as file:
            json.dump(sum((skipped for _, _, skipped in parts), collections.Counter()), file)
        os.replace(self.index + ".part", self.index)

    def map(self):
        self.rows = np.load(os.path.join(self.index, "rows.npy"), mmap_mode="r")[self.keep]
        self.keys = np.load(os.path.join(self.index, "keys.npy"), mmap_mode="r")

    def __getstate__(self):                                  # a spawned worker maps the index itself
        return {name: value for name, value in vars(self).items() if name not in ("rows", "keys")}

    def __setstate__(self, state):
        vars(self).update(state)
        self.map()

    def key(self, i):
        *_, start, size, shard = self.rows[i].tolist()
        shard = os.path.basename(self.paths[shard]).removesuffix(".tar")
        return shard + "/" + self.keys[start:start + size].tobytes().decode("utf-8", "surrogateescape")

    def captions(self, i):
        _, _, offset, size, _, _, _, shard = self.rows[i].tolist()
        text = read(self.paths[shard], offset, size).decode()
        return [text] if self.require == "txt" else [line for line in text.splitlines() if line.strip()]

    def image(self, i):
        offset, size, *_, shard = self.rows[i].tolist()
        return read(self.paths[shard], offset, size)

    def label(self, i):
        label = int(self.rows[i, 4])
        return None if label < 0 else label


class TableDataset(Pairs):
    """.tsv or .csv with the columns filepath and title, or .jsonl with filename and caption (str or list of str).

    Pictures lie relative to the table. Only the place of each line is kept. Lines of a table with tabs are split at the
    tabs and nothing else: a caption may begin with a quote.
    """

    def __init__(self, path, transform):
        self.path, self.transform, self.keep = path, transform, slice(None)
        if not os.path.isfile(path):
            raise SystemExit(f"no such data: {path}")
        with open(path, "rb") as file:
            first = file.readline().removeprefix(b"\xef\xbb\xbf").decode("utf-8", "replace").rstrip("\r\n")
        self.form = "json" if path.endswith("l") else "tab" if "\t" in first or path.endswith(".tsv") else "csv"
        if self.form != "json":
            header = first.split("\t") if self.form == "tab" else next(csv.reader([first]))
            if not {"filepath", "title"} <= set(header):
                raise SystemExit(f"{path}: the header must name the columns filepath and title, not {header}")
            self.columns = header.index("filepath"), header.index("title")
        self.rows, self.skipped = self.lines()
        if not len(self):
            raise SystemExit(f"{path} holds no picture with a caption ({dict(self.skipped)})")

    def lines(self):
        """int64 [n, 2]: offset and size of each record that has a caption; Counter of the others."""
        rows, skipped, start, end = [], collections.Counter(), 0, 0
        with open(self.path, "rb") as file:
            record = b""
            for line in file:
                start, end, record = end if not record else start, end + len(line), record + line
                if self.form == "csv" and record.count(b'"') % 2:                      # a quoted line break
                    continue
                content, record = record, b""
                if start == 0 and self.form != "json":
                    continue
                try:
                    _, texts = self.parse(content)
                except UnicodeDecodeError:
                    skipped["caption is not UTF-8"] += 1
                except (ValueError, IndexError, KeyError, TypeError):
                    skipped["line without the columns"] += 1
                else:
                    if texts:
                        rows.append((start, end - start))
                    else:
                        skipped["blank or no caption"] += 1
        return np.array(rows, dtype=np.int64).reshape(-1, 2), skipped

    def parse(self, line):
        """(file name, non-blank captions) of a record."""
        line = line.removeprefix(b"\xef\xbb\xbf").decode().rstrip("\r\n")
        if self.form == "json":
            record = json.loads(line)
            name, texts = record["filename"], record["caption"]
            texts = [texts] if isinstance(texts, str) else texts
        else:
            fields = line.split("\t") if self.form == "tab" else next(csv.reader(io.StringIO(line, newline="")))
            name, texts = fields[self.columns[0]], [fields[self.columns[1]]]
        return name, [text for text in texts if text.strip()]

    def record(self, i):
        return self.parse(read(self.path, *self.rows[i].tolist()))

    def key(self, i):
        return self.record(i)[0]

    def captions(self, i):
        return self.record(i)[1]

    def image(self, i):
        with open(os.path.join(os.path.dirname(self.path), self.key(i)), "rb") as file:
            return file.read()


# the built-in data

COLORS = {"red": (0, "crimson scarlet ruby"), "orange": (28, "tangerine amber"), "yellow": (54, "golden lemon"),
          "green": (120, "emerald lime"), "cyan": (180, "turquoise teal"), "blue": (225, "azure navy"),
          "purple": (272, "violet lilac"), "pink": (325, "rose magenta")}               # hue in degrees, synonyms
SHAPES = {"circle": "disc dot ball", "square": "box block", "triangle": "wedge pyramid", "star": "asterisk starlet",
          "cross": "plus crucifix", "ring": "hoop donut", "crescent": "moon sickle", "heart": "valentine lovesign"}
TOY = dict(pairs=50_000, side=40, mismatch=.1, no_color=.25, no_shape=.15, synonym=.5, second=.3, noise=.35, hue=9, small=.16,
           large=.36)
CLASSES = [(color, shape) for color in COLORS for shape in SHAPES]
HELD_OUT = {(c, s) for i, c in enumerate(COLORS) for j, s in enumerate(SHAPES) if (i - j) % 8 in (0, 3)}    # 2 a row, 2 a column


@functools.lru_cache(None)
def outline(shape):
    """Polygon [(x, y)] of a shape around 0, of radius 1."""
    arc = lambda r, a, b, n, x=0: [(x + r * math.cos(math.tau * (a + (b - a) * k / n)), r * math.sin(math.tau * (a + (b - a) * k / n)))
                                   for k in range(n + 1)]
    if shape == "star":
        return [(r * math.cos(math.tau * k / 10), r * math.sin(math.tau * k / 10)) for k, r in enumerate([1, .42] * 5)]
    if shape == "cross":
        quarter = [(1, -.3), (1, .3), (.3, .3)]
        return [(x * c - y * s, x * s + y * c) for c, s in [(1, 0), (0, 1), (-1, 0), (0, -1)] for x, y in quarter]
    if shape == "heart":
        turns = [math.tau * k / 32 for k in range(32)]
        return [(math.sin(t) ** 3, -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 16) for t in turns]
    return {"circle": arc(1, 0, 1, 32), "square": arc(1.1, 0, 1, 4), "triangle": arc(1.15, 0, 1, 3),
            "ring": arc(1, 0, 1, 32) + arc(.55, 1, 0, 32), "crescent": arc(1, .12, .88, 24) + arc(.8, .85, .15, 24, .42)}[shape]


class ToyDataset(Pairs):
    """Small scenes drawn on demand, a function of (seed, split, index) alone, with captions as the web writes them:
    synonyms, attributes left out, words about nothing in the picture, a tenth of them of another picture.

    16 of the 64 combinations of colour and shape appear in no training picture or caption; the split "test" shows only
    these, with their label among all 64 names, and one full clean caption each.
    """

    def __init__(self, length, transform, split="train", seed=0):
        self.rows, self.transform, self.split, self.seed = np.arange(length), transform, split, seed
        self.keep = slice(None)
        self.classnames = [f"{color} {shape}" for color, shape in CLASSES]

    def key(self, i):
        return f"toy-{self.split}/{self.rows[i]:08d}"

    def scene(self, number):
        """(rng, dict of what is in picture `number`)."""
        rng = random.Random(f"{self.seed} {self.split} {number}")
        main = rng.choice([c for c in CLASSES if (c in HELD_OUT) == (self.split == "test")])
        size, x, y = rng.uniform(TOY["small"], TOY["large"]), rng.uniform(.3, .7), rng.uniform(.3, .7)
        other = None
        if rng.random() < TOY["second"]:
            other = rng.choice([(c, s) for c, s in CLASSES if not {(c, s), (main[0], s), (c, main[1])} & HELD_OUT and c != main[0]
                                and s != main[1]])if self.split == "train" else rng.choice([c for c in CLASSES if c not in HELD_OUT])
        return rng, dict(main=main, size=size, x=x, y=y, other=other, background=rng.choice(["plain", "rough", "striped"]),
                         light=rng.choice(["dark", "bright"]))

    def label(self, i):
        return CLASSES.index(self.scene(self.rows[i])[1]["main"])

    def captions(self, i):
        rng, scene = self.scene(self.rows[i])
        if self.split == "test":
            return [self.full(scene)]
        rng = random.Random(f"{self.seed} words {self.rows[i]}")
        if rng.random() < TOY["mismatch"]:
            scene = self.scene(self.rows[i] + 1)[1]
        return [self.caption(scene, rng)]

    def full(self, scene):
        color, shape = scene["main"]
        other = f" and a tiny {' '.join(scene['other'])}" if scene["other"] else ""
        return f"a {size_word(scene)} {color} {shape} {place(scene)}{other} on a {scene['light']} {scene['background']} background"

    def caption(self, scene, rng):
        def name(color, shape):
            color = rng.choice(COLORS[color][1].split()) if rng.random() < TOY["synonym"] else color
            shape = rng.choice(SHAPES[shape].split()) if rng.random() < TOY["synonym"] else shape
            words = [] if rng.random() < TOY["no_color"] else [color]
            return " ".join(words + [rng.choice(["thing", "object", "one"]) if rng.random() < TOY["no_shape"] else shape])
        words = [rng.choice(["a photo of a", "a", "the", "my", "one", "picture of a", "this is a", "stock image:", "nice", ""])]
        words += [size_word(scene)] * (rng.random() < .4) + [name(*scene["main"])] + [place(scene)] * (rng.random() < .3)
        words += ["with a " + name(*scene["other"])] if scene["other"] and rng.random() < .6 else []
        words += [f"on a {scene['light']} background"] * (rng.random() < .2) + [scene["background"]] * (rng.random() < .1)
        extra = ["free download", "holiday 2014", "for sale", "vector clip art", "made by anna", "img 0042", "best price", "wallpaper hd",
                 "from our trip to paris", "with dog", "new in shop", "logo design", "#art", "(signed print)", "cat not included"]
        return " ".join([w for w in words if w] + [rng.choice(extra) for _ in range(2) if rng.random() < .35])

    def image(self, i):
        rng, scene = self.scene(self.rows[i])
        side = TOY["side"]
        low, high = (.1, .45) if scene["light"] == "dark" else (.55, .95)
        tone = [int(255 * rng.uniform(low, high)) for _ in range(3)]
        picture = Image.new("RGB", (side, side), tuple(tone))
        if scene["background"] == "striped":
            draw, step, other = ImageDraw.Draw(picture), rng.randint(4, 9), tuple(min(255, t + 40) for t in tone)
            for x in range(rng.randint(-step, 0), 2 * side, 2 * step):
                draw.polygon([(x, 0), (x + step, 0), (x + step - side, side), (x - side, side)], other)
        if scene["background"] == "rough":
            patches = Image.frombytes("RGB", (6, 6), rng.randbytes(108)).resize((side, side), Image.BICUBIC)
            picture = Image.blend(picture, patches, .35)
        paste(picture, scene["main"], scene["x"], scene["y"], scene["size"], rng)
        if scene["other"]:
            x, y = (.85 if scene["x"] < .5 else .15), rng.choice([.15, .85])
            paste(picture, scene["other"], x, y, .11, rng)
        noise = Image.frombytes("RGB", (side, side), rng.randbytes(3 * side * side))
        picture = Image.blend(picture, noise, rng.uniform(.03, TOY["noise"]))
        stream = io.BytesIO()
        picture.save(stream, "JPEG", quality=90)
        return stream.getvalue()


def paste(picture, kind, x, y, size, rng):
    """Draws a (colour, shape) into a PIL picture at (x, y), radius `size`, in parts of its side; any rotation and shade."""
    (hue, _), side = COLORS[kind[0]], picture.width
    tone = colorsys.hsv_to_rgb((hue + rng.uniform(-1, 1) * TOY["hue"]) % 360 / 360, rng.uniform(.55, 1), rng.uniform(.55, 1))
    c, s, r = math.cos(turn := rng.uniform(0, math.tau)), math.sin(turn), size * 3 * side
    mask = Image.new("L", (3 * side, 3 * side))
    ImageDraw.Draw(mask).polygon([(3 * side * x + r * (a * c - b * s), 3 * side * y + r * (a * s + b * c)) for a, b in outline(kind[1])], 255)
    picture.paste(tuple(int(255 * t) for t in tone), (0, 0), mask.reduce(3))


def size_word(scene):
    return "large" if scene["size"] > (TOY["small"] + TOY["large"]) / 2 else "small"


def place(scene):
    return f"at the {'top' if scene['y'] < .5 else 'bottom'} {'left' if scene['x'] < .5 else 'right'}"


def open_dataset(spec, transform, limit=None, subset=None, root=None):
    """The data set that the string `spec` names; see the top of the file. limit: the first n pairs; subset: a file with one
    sample key a line; root: where the folders of named sets lie (else $CLIP_DATA, else ./datasets)."""
    if spec == "toy":
        return ToyDataset(limit or TOY["pairs"], transform)
    if spec in ("cc3m", "cc12m", "yfcc15m"):
        spec = os.path.join(root or os.environ.get("CLIP_DATA") or "datasets", spec)
        if not os.path.isdir(spec):
            raise SystemExit(f"--data: there is no folder {spec}; put the tars there, or say where by --data-root or $CLIP_DATA")
    table = spec.endswith((".tsv", ".csv", ".jsonl"))
    dataset = TableDataset(spec, transform) if table else TarDataset(spec, transform)
    if subset:
        if not os.path.isfile(subset):
            raise SystemExit(f"--subset: there is no file {subset}")
        with open(subset, encoding="utf-8", errors="surrogateescape") as file:
            keys = set(file.read().splitlines())
        dataset.keep = np.array([i for i in range(len(dataset)) if dataset.key(i) in keys], dtype=np.int64)[:limit]
        if not len(dataset.keep):
            raise SystemExit(f"--subset: no line of {subset} is the key of a sample (the first key is {dataset.key(0)})")
    else:
        dataset.keep = slice(limit)
    dataset.rows = dataset.rows[dataset.keep]
    return dataset


def captions(spec, limit=None, root=None):
    """Iterates (key, caption) over a data set; no picture is read."""
    dataset = open_dataset(spec, None, limit, root=root)
    return ((dataset.key(i), text) for i in range(len(dataset)) for text in dataset.captions(i))


# order and batches

class EpochBatches:
    """Batch sampler: lists of (index, seed) for this rank. Set `epoch`, and `start` (steps to leave out) to resume.

    Step k of rank r takes perm[(k W + r) B :][:B] of one permutation a (seed, epoch), so ranks side by side are the batch of
    one process; the tail of an epoch is dropped. A sample's seed is a function of (seed, epoch, stream, position in the
    epoch); another `stream` is another pass over the same order. indices: sampled positions instead of range(length).
    """

    def __init__(self, length, batch_size, seed=0, rank=0, world=1, indices=None, stream=0):
        self.length, self.batch_size, self.seed, self.rank, self.world = length, batch_size, seed, rank, world
        self.indices, self.stream, self.epoch, self.start = indices, stream, 0, 0
        if not len(self):
            raise SystemExit(f"--batch-size {batch_size * world} is more than the {self.count()} pairs there are")

    def count(self):
        return self.length if self.indices is None else len(self.indices)

    def __len__(self):
        return self.count() // (self.batch_size * self.world)

    def __iter__(self):
        order = np.random.default_rng([0, self.seed, self.epoch]).permutation(self.count())
        seeds = np.random.PCG64([1, self.seed, self.epoch, self.stream]).random_raw(self.count())
        if self.indices is not None:
            order = np.asarray(self.indices)[order]
        for step in range(self.start, len(self)):
            at = (step * self.world + self.rank) * self.batch_size
            yield list(zip(order[at:at + self.batch_size].tolist(), seeds[at:at + self.batch_size].tolist()))


def collate(samples):
    """Dict of stacked tensors; "tokens" [..., L] is cut to the shortest of a few lengths that holds all texts."""
    batch = default_collate(samples)
    if "tokens" in batch:
        tokens = batch["tokens"]
        used = int(tokens.flatten(0, -2).any(0).nonzero().max()) + 1                  # padding is 0, EOT never is
        length = next(n for n in (16, 24, 32, 48, 64, tokens.shape[-1]) if n >= min(used, tokens.shape[-1]))
        batch["tokens"] = tokens[..., :length].contiguous()
    return batch


def loader(dataset, batches, workers, device=None):
    """DataLoader over the batches of an EpochBatches; workers live on from epoch to epoch."""
    cuda = device is not None and torch.device(device).type == "cuda"
    return DataLoader(dataset, batch_sampler=batches, num_workers=workers, collate_fn=collate, pin_memory=cuda,
                      persistent_workers=workers > 0, prefetch_factor=4 if workers else None)


def check_skipped(skipped, seen):
    """SystemExit when more than 5 % of the first thousand samples (or of all so far) failed. Counts of all ranks."""
    if skipped > .05 * max(seen, 1000):
        raise SystemExit(f"{skipped} samples failed while {seen} were read: wrong path or format? python data.py PATH shows the data")


def main(argv=None):
    parser = argparse.ArgumentParser(description="Shows what is in a data set.")
    parser.add_argument("data", help="toy, a name, a path or a pattern")
    parser.add_argument("--bpe", help="merges of the tokenizer, or train")
    parser.add_argument("--limit", type=int, help="the first N pairs only")
    parser.add_argument("--out", default="data.png", help="where the sheet of samples goes")
    flags = parser.parse_args(argv)
    transform = lambda image, text, rng: {"image": random_resized_crop(image, 224, (.5, 1), rng)}
    dataset = open_dataset(flags.data, transform, flags.limit)
    print(f"{len(dataset):,} pairs" + (f" in {len(dataset.paths):,} tars" if isinstance(dataset, TarDataset) else ""))
    for reason, n in dataset.skipped.items():
        print(f"left out: {n:,} ({reason})")


if __name__ == "__main__":
    main()
