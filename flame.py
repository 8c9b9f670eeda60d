"""FLAME: a frozen language model writes the text vectors once, and only an image tower is trained to meet them.

The idea. A language model already knows what words mean, so no text tower is trained. A prompt asks the model to put a
caption "in just one word". The hidden state at the end of the prompt is a vector of the caption. Seven such questions,
the facets, ask for the caption, for kind and pattern of the main and of the minor object, for the event and the mood.
One forward pass gives all facets; an attention mask keeps them from seeing each other. This is done once, before the
training (`flame.py embed`). Long captions and other languages work too, since the language model reads them.

The rows. The authors have three captions of a picture: its own with facet 1, a short rewritten one with facets 1 to 3,
and a long rewritten one with all seven: M = 11 unit rows of width D. Without rewritten captions M is 8: one row by
facet 1, and seven by the long prompt. A step draws K = 6 of the M rows, anew for each picture.

The training. The image tower is a ViT. An MLP that ends in a layer norm maps each patch to width D. v_i is the mean of
picture i's patches, made a unit vector. t_nj is the j-th drawn row of picture n; all ranks together have N pictures.
The factor s = exp(logit_scale) and the bias b are learned.

    z_inj = s <v_i, t_nj> + b,    y_in = 1 if i = n, else -1
    L     = 1 / (K N)  sum_inj log(1 + exp(-y_in z_inj))         --loss sigmoid, as in the released code
    L     = mean over j of CLIP's loss on the pairs v_i, t_ij    --loss nce, the formula of the paper, without b

What it brought, with rewritten captions and a language model of 12 B parameters (authors): on ImageNet after CC3M 4.9
points more than the best earlier result; on long captions (Urban-1k) after YFCC15M 87.9 % recall at 1 (OpenAI's CLIP:
53.3). By our count a step takes 1.15 times CLIP's FLOPs (ViT-B-16): the MLP costs more than a text tower. CC3M's
vectors take 327 GB.

How to run. The first command needs no files: on the toy, random vectors of words replace the language model.
    python flame.py
    python flame.py embed --lm FOLDER --data cc3m --tests imagenet/val --out texts     # needs transformers
    torchrun --nproc_per_node=8 flame.py --data cc3m --texts texts --eval imagenet/val

Sources: Cao et al. 2024 (arXiv 2411.11927), github.com/MIV-XJTU/FLAME. Ours: --centre, the width of the MLP, vectors of
words, rows of captions that were not rewritten.
"""
import argparse
import hashlib
import json
import math
import os
import re
import signal
import sys
import time
from collections import OrderedDict
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import data
import eval as evaluator


# losses

class Gather(torch.autograd.Function):
    """all_gather along dimension 0. The backward pass gives each rank the sum of all ranks' gradients for its rows."""

    @staticmethod
    def forward(ctx, x):
        rows = x.new_empty(dist.get_world_size() * len(x), *x.shape[1:])
        dist.all_gather(list(rows.chunk(dist.get_world_size())), x.contiguous())  # fills rows, as chunks are views
        return rows

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)
        return grad.chunk(dist.get_world_size())[dist.get_rank()]


def gather(x):
    """Rows of all ranks, rank 0's first: [B, ...] -> [N, ...], with gradient. Without a process group it returns x."""
    return Gather.apply(x) if dist.is_available() and dist.is_initialized() else x


def gather_constant(x):
    """Starts an all_gather of rows that need no gradient: x [B, ...] -> (rows [N, ...], wait). Call wait() before the
    rows are read. Rank 0's rows come first. Without a process group the rows are x."""
    if not (dist.is_available() and dist.is_initialized()):
        return x, lambda: None
    rows = x.new_empty(dist.get_world_size() * len(x), *x.shape[1:])
    work = dist.all_gather(list(rows.chunk(dist.get_world_size())), x.contiguous(), async_op=True)  # fills rows
    return rows, work.wait


def sigmoid_loss(image_features, text, logit_scale, bias, all_text=None):
    """FLAME's sigmoid loss with several positives (released code, multi_positive_loss.py) over the pairs of all ranks.

    image_features [B, D]: unit rows. text [B, K, D]: K unit rows for each image, constants. all_text [N, K, D]: text of
    all ranks, if the caller has it already. logit_scale, bias: scalars. Each image is scored against the K N rows of
    all ranks, of which its own K are right. Returns the sum of -log sigmoid(+-logit) divided by K B, in at least fp32.
    The mean over the ranks is the loss of the whole batch. K = 1 is SigLIP's loss (arXiv 2303.15343). If all cosines
    are 0, the loss is softplus(-bias) + (N - 1) softplus(bias).
    """
    with torch.autocast(image_features.device.type, enabled=False):
        x = image_features.to(torch.promote_types(image_features.dtype, torch.float32))
        all_text = (gather(text.detach()) if all_text is None else all_text.detach()).to(x.dtype)
        N, K, _ = all_text.shape
        rank = dist.get_rank() if N > len(x) else 0
        labels = torch.arange(len(x), device=x.device) + rank * len(x)
        logits = (logit_scale * x @ all_text.flatten(0, 1).T + bias).unflatten(1, (N, K))  # [B, N, K]
        minus_y = 1 - 2. * (labels[:, None] == torch.arange(N, device=x.device))  # [B, N]: -1 for the image's own rows
        return F.softplus(minus_y[..., None] * logits).sum() / (K * len(x))


def nce_loss(image_features, text, logit_scale, all_text=None):
    """The paper's InfoNCE with several positives over the pairs of all ranks: the mean of CLIP's loss over K slots.

    image_features [B, D]: unit rows. text [B, K, D]: K unit rows for each image, constants. all_text [N, K, D]: text of
    all ranks, if the caller has it already. Slot j is text[:, j]. A softmax runs over the N rows, or N images, of one
    slot. Returns a scalar in at least fp32. The mean over the ranks is the loss of the whole batch. K = 1 is CLIP's
    loss. If all logits are equal, the loss is ln N.
    """
    with torch.autocast(image_features.device.type, enabled=False):
        x = image_features.to(torch.promote_types(image_features.dtype, torch.float32))
        text = text.detach()
        all_text = (gather(text) if all_text is None else all_text.detach()).to(x.dtype)
        # Images are gathered with gradient, so that the gradients are those of one process. In the released code they
        # have none, and each of W ranks computes the loss of the whole batch: its tower gets 1/W of the gradient.
        all_x = gather(x)  # [N, D]
        rank = dist.get_rank() if len(all_x) > len(x) else 0
        labels = (torch.arange(len(x), device=x.device) + rank * len(x))[:, None].expand(-1, text.shape[1])  # [B, K]
        image_logits = logit_scale * torch.einsum("bd,nkd->bnk", x, all_text)  # [B, N, K]
        text_logits = logit_scale * torch.einsum("bkd,nd->bnk", text.to(x.dtype), all_x)  # [B, N, K]
        return (F.cross_entropy(image_logits, labels) + F.cross_entropy(text_logits, labels)) / 2


# prompts and facets

FACETS = (  # counted from 1; in the paper 2 to 5 are the level of entities, 6 is interaction, 7 is the scene
    "this image description",
    "the category of the main object in this image",
    "the prominent characteristic or pattern of the main object in this image",
    "the category of the minor object in this image",
    "the prominent characteristic or pattern of the minor object in this image",
    "the primary action or event taking place in this image",
    "the overall atmosphere or emotion of this image")
FACET = ' {} means in just one word:"'  # the vector is the hidden state at the last token
PROMPTS = {  # {kind of prompt: (prefix, number of facets that follow it)}
    "raw": ('Image description : "{}" . After thinking step by step ,', 1),
    "short": ('Image description : "{}" . After thinking step by step ,', 3),
    "long": ('Detailed Image description : "{}" . After thinking step by step ,', 7)}


def tidy(text):
    """A text as it goes into a prompt (released code, model.py). A full stop is added if none of . ? ' " ends the text,
    double quotes become single ones, and a question mark at the end becomes a full stop."""
    text = " ".join(text.split())
    text = (text if text[-1:] in '.?"\'' else text + ".").replace('"', "'")
    return text[:-1] + "." if text.endswith("?") else text


def facet_mask(prefix, facets):
    """Facet-decoupled attention: bool [T, T], true where a query (row) may look at a key (column).

    prefix: number of tokens before the facets. facets: list of the facets' lengths. T = prefix + sum(facets). No token
    looks ahead. A token of a facet looks at the prefix and at its own facet, but not at other facets. So one pass over
    a caption serves all facets (released code, multiprompteol_embeddings.py). It equals separate prompts only if the
    positions of each facet begin anew after the prefix.
    """
    group = torch.repeat_interleave(torch.tensor([prefix, *facets]))  # [T]: 0 in the prefix, i in facet i
    place = torch.arange(len(group))
    return (place[:, None] >= place) & ((group == 0) | (group[:, None] == group))


class WordVectors:
    """A stand-in for a language model, for the toy and for tests: a weighted sum of fixed vectors of a text's words.

    lm(kind, texts) -> unit rows fp32 [n, facets, D]. A word seeds the Gaussian entries of its vector, and for each
    facet a weight from .5 to 1.5. The kind of the prompt says only how many facets there are. This is not in the paper.
    """
    name, dim, context = "words", 64, math.inf

    def __init__(self):
        weights = hashlib.sha256(self.word("a").tobytes()).hexdigest()[:16]  # names this version of the vectors
        self.about = {"lm": self.name, "weights": weights, "layer": None, "restart_positions": None, "dim": self.dim}

    @staticmethod
    @lru_cache(2 ** 16)
    def word(word):
        """A word's vectors for all seven facets, float64 [7, D]."""
        rng = np.random.default_rng(int.from_bytes(hashlib.md5(word.encode()).digest()[:8], "little"))
        vector = rng.standard_normal(WordVectors.dim)
        return rng.uniform(.5, 1.5, (len(FACETS), 1)) * vector

    def __call__(self, kind, texts):
        count = PROMPTS[kind][1]
        rows = [sum(self.word(word)[:count] for word in re.findall(r"\w+", text.lower()) or [text]) for text in texts]
        return F.normalize(torch.from_numpy(np.stack(rows)).float(), dim=-1)

    def length(self, kind, text):
        """Number of tokens of the whole prompt with this text in it."""
        return len(text.split())


class LanguageModel:
    """A frozen causal language model, from a folder or the Hugging Face hub: lm(kind, texts) -> unit rows, fp32 [n,
    facets, D]. about: the entries of embeddings.json that tell models apart. SystemExit if it cannot be used.

    name: what transformers' from_pretrained takes. restart: if true, the positions of each facet begin right after the
    prefix, as in separate prompts; if false, as released, positions run on through all facets. amp: "bf16", "fp16" or
    "off" (fp32), the type of the whole model, without autocast. batch_tokens: about how many tokens a pass has.
    """
    KINDS = ("llama", "mistral", "qwen2")  # as transformers calls them; SmolLM2 is a llama

    def __init__(self, name, device, restart=False, amp="off", batch_tokens=16384):
        try:
            import transformers
        except ImportError:
            raise SystemExit("embed needs transformers: pip install 'transformers>=4.56' (training and testing do not "
                             "need it)") from None
        try:  # never with code from the model's folder
            config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
            if config.model_type not in self.KINDS:
                raise SystemExit(f"--lm {name} is a {config.model_type}; embed reads causal language models of the "
                                 f"kinds {', '.join(self.KINDS)} (SmolLM2 is a llama)")
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
            model = transformers.AutoModel.from_pretrained(
                name, dtype="auto", attn_implementation="sdpa", trust_remote_code=False)
        except Exception as error:  # transformers raises many kinds
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise SystemExit(f"--lm {name} cannot be loaded: {reason}") from None
        if len(model.layers) < 2:
            raise SystemExit(f"--lm {name} has one block; the vector is the output of the second-to-last one")
        # The vector is the output of the second-to-last block, without the final norm. The last block is removed.
        model.layers, model.norm = model.layers[:-1], nn.Identity()
        # some numbers of each matrix, enough to tell a model from its fine-tuned versions
        some = [p.detach().flatten()[::max(1, p.numel() // 64)].float() for p in model.parameters()]
        self.name, self.dim, self.context = str(name), config.hidden_size, config.max_position_embeddings
        self.about = {"lm": self.name, "weights": hashlib.sha256(torch.cat(some).numpy().tobytes()).hexdigest()[:16],
                      "layer": len(model.layers) - 1, "restart_positions": restart, "dim": self.dim}
        self.dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": torch.float32}[amp]
        self.model = model.to(device, self.dtype).eval()
        self.device, self.restart, self.batch_tokens = device, restart, batch_tokens
        # Some tokenizers put a space before every text. So a facet is cut into tokens behind a comma, whose ids go.
        comma = self.ids(",")
        facets = [self.ids("," + FACET.format(facet))[len(comma):] for facet in FACETS]
        bos = [self.tokenizer.bos_token_id] if self.tokenizer.bos_token_id is not None else []
        # as released: in a prompt with several facets, facet 1 begins with the start token
        self.facets = {kind: [(bos if i == 0 and count > 1 else []) + facets[i] for i in range(count)]
                       for kind, (_, count) in PROMPTS.items()}

    def ids(self, text):
        """List of a text's token ids, without the end token that some tokenizers put behind every text."""
        ids = self.tokenizer(text).input_ids
        return ids[:-1] if ids[-1:] == [self.tokenizer.eos_token_id] else ids

    def prefix(self, kind, text):
        """List of the ids of what stands before the facets."""
        return self.ids(PROMPTS[kind][0].format(tidy(text)))

    def length(self, kind, text):
        """Number of tokens of the whole prompt with this text in it."""
        return len(self.prefix(kind, text)) + sum(map(len, self.facets[kind]))

    @torch.inference_mode()
    def __call__(self, kind, texts):
        facets, prefixes = self.facets[kind], [self.prefix(kind, text) for text in texts]
        lengths = [len(facet) for facet in facets]
        ends = torch.tensor(lengths).cumsum(0) - 1  # places of the facets' last tokens, counted from the prefix's end
        rows = torch.empty(len(texts), len(facets), self.dim)
        order = sorted(range(len(texts)), key=lambda i: -len(prefixes[i]))  # so that a batch has few pads
        while order:
            T = len(prefixes[order[0]]) + sum(lengths)
            batch, order = order[:max(1, self.batch_tokens // T)], order[max(1, self.batch_tokens // T):]
            ids, positions = torch.zeros(len(batch), T, dtype=torch.int64), torch.arange(T).repeat(len(batch), 1)
            # Pads stand at the end. A pad sees only itself, and no other token sees a pad. In the released code pads
            # see all tokens and tokens see pads: there a vector depends on the other texts of its batch, and facets
            # see each other through the pads.
            seen = torch.eye(T, dtype=torch.bool).repeat(len(batch), 1, 1)
            for row, i in enumerate(batch):
                p, t = len(prefixes[i]), len(prefixes[i]) + sum(lengths)
                ids[row, :t] = torch.tensor([*prefixes[i], *(token for facet in facets for token in facet)])
                seen[row, :t, :t] = facet_mask(p, lengths)
                if self.restart:
                    positions[row, p:t] = torch.cat([p + torch.arange(length) for length in lengths])
            bias = torch.zeros(seen.shape, dtype=self.dtype).masked_fill(~seen, torch.finfo(self.dtype).min)
            try:
                hidden = self.model(
                    input_ids=ids.to(self.device), attention_mask=bias[:, None].to(self.device),
                    position_ids=positions.to(self.device), use_cache=False).last_hidden_state  # [b, T, D]
            except torch.OutOfMemoryError:
                raise SystemExit(f"{len(batch)} texts of {T} tokens do not fit: lower --batch-tokens") from None
            places = torch.tensor([len(prefixes[i]) for i in batch])[:, None] + ends  # [b, facets]
            found = hidden[torch.arange(len(batch), device=self.device)[:, None], places.to(self.device)]
            rows[torch.tensor(batch)] = F.normalize(found.float(), dim=-1).cpu()
        if not rows.isfinite().all():
            raise SystemExit(f"--lm {self.name} gives vectors that are not finite; fp16 may overflow: try --amp bf16")
        return rows


# the store: a folder with embeddings.npy (fp16 [n, M, D], unit rows), embeddings.json (what they are) and texts.npz
# (texts of tests)

def about_rows(lm, dataset, rewritten):
    """What embeddings.json says: the language model, the prompts of the M rows, the number of samples, the fingerprint
    of the data. prompts: M strings. caption_rows: numbers of the seven rows of the long prompt, whose mean stands for
    the caption of a test."""
    kinds = ("raw", "short", "long") if rewritten else ("raw", "long")
    prompts = [PROMPTS[kind][0] + FACET.format(facet) for kind in kinds for facet in FACETS[:PROMPTS[kind][1]]]
    return lm.about | {"prompts": prompts, "caption_rows": [*range(len(prompts) - PROMPTS["long"][1], len(prompts))],
                       "rewritten": rewritten, "count": len(dataset), "data": data.fingerprint(dataset)}


def read_about(path):
    """The dict in a file embeddings.json, or in embeddings.part.json. SystemExit if it is damaged."""
    try:
        about = json.loads(path.read_text())
    except ValueError:
        about = None
    keys = {"lm", "weights", "layer", "restart_positions", "dim", "prompts", "caption_rows", "count"}
    if not isinstance(about, dict) or not keys <= {*about}:
        raise SystemExit(f"{path} is damaged: delete its folder and embed the captions again")
    return about


def identity(about):
    """A hash of what makes a vector from a text: the language model, its layer, and the facets' positions."""
    made_by = [about[key] for key in ("weights", "layer", "restart_positions", "dim")]
    return hashlib.sha256(json.dumps(made_by).encode()).hexdigest()[:16]


def other(about, before):
    """Names of the entries in which two dicts of embeddings.json differ. "lm", a path, does not count, because
    "weights" tells language models apart."""
    return ", ".join(key for key in about if key != "lm" and about[key] != before.get(key))


def captions_to_embed(dataset, rewritten):
    """For each sample the texts that are embedded: a tuple (caption,), or (caption, short one, long one) if captions
    were rewritten. In that case SystemExit if a sample has not three captions."""
    found, several = [], 0
    for i in range(len(dataset)):
        texts = [" ".join(text.split()) for text in dataset.captions(i)]
        if rewritten and len(texts) != 3:
            raise SystemExit(f"--rewritten: {dataset.key(i)} has {len(texts)} captions in place of three: its own, a "
                             "short and a long rewritten one, in this order (a .jsonl with lists, or --subset with "
                             "three lines a key)")
        several += len(texts) > 1
        found.append(tuple(texts if rewritten else texts[:1]))
    if several and not rewritten:
        print(f"{several} of {len(dataset)} pairs have several captions; only the first is embedded (see --rewritten)")
    return found


def check_length(lm, kind, text):
    """SystemExit if a text is too long for the language model. A token is a byte or more, so the tokens need to be
    counted only if the model reads fewer tokens than the prompt has bytes."""
    prompt = 1000  # bytes, more than any prompt has without the text
    if len(text.encode()) + prompt > lm.context and (length := lm.length(kind, text)) > lm.context:
        raise SystemExit(f"the text {text[:40]!r}... has {length} tokens in its prompt, and {lm.name} reads "
                         f"{lm.context}: leave it out, or shorten it (a caption: by --subset)")


def embed_captions(lm, captions, about, folder, rank=0, world=1, chunk=128):
    """The offline step: writes the vectors of all captions into a folder and returns whether the store is whole.

    captions: list of n tuples, with one text for each kind of prompt or with one text for all (see captions_to_embed).
    about: what embeddings.json is to say (see about_rows). Equal captions are embedded once. Of W processes on one file
    system, rank r takes the chunks r, r + W and so on. The process that ends last renames the files to embeddings.npy
    and embeddings.json. An interrupted job goes on where it stopped, also with another W. SystemExit if the folder
    holds something else or cannot be written, or if a caption is too long for the language model.
    """
    numbers = {}  # {caption: its number}
    for caption in captions:
        numbers.setdefault(caption, len(numbers))
    unique, number = [*numbers], np.array([numbers[caption] for caption in captions])
    kinds = ("raw", "short", "long") if about["rewritten"] else ("raw", "long")
    for caption in unique:
        for k, kind in enumerate(kinds):
            check_length(lm, kind, caption[min(k, len(caption) - 1)])
    order = number.argsort(kind="stable")  # numbers of samples, grouped by caption
    starts = np.searchsorted(number[order], np.arange(len(unique) + 1))
    shape, size = (len(captions), len(about["prompts"]), about["dim"]), 2 * len(about["prompts"]) * about["dim"]
    vectors, done, part = folder / "embeddings.npy", folder / "done.part", folder / "embeddings.part.npy"
    chunks = math.ceil(len(unique) / chunk)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError("it cannot be written")
        with data.locked(folder / "embeddings"):
            whole = (folder / "embeddings.json").exists()
            if not whole and not done.exists():
                np.lib.format.open_memmap(part, "w+", np.float16, shape)  # a file full of zeros
                (folder / "embeddings.part.json").write_text(json.dumps(about, indent=1))
                (folder / "done.new").write_bytes(bytes(chunks))  # a byte for each chunk
                os.replace(folder / "done.new", done)
            before = read_about(folder / f"embeddings{'' if whole else '.part'}.json")
        if differ := other(about, before):
            raise SystemExit(f"{folder} holds vectors that differ in: {differ}; choose another --out, or delete it")
        if whole:
            return True
        with open(part, "r+b") as file, open(done, "r+b") as marks:
            offset = np.load(part, mmap_mode="r").offset
            mine = range(rank, chunks, world)
            todo = [c for c in mine if os.pread(marks.fileno(), 1, c) != b"\1"]
            bar = tqdm(total=len(mine) * chunk, initial=(len(mine) - len(todo)) * chunk, unit="caption",
                       disable=rank > 0, delay=1)
            for c in todo:
                part_of = unique[c * chunk:(c + 1) * chunk]
                rows = torch.cat([lm(kind, [caption[min(k, len(caption) - 1)] for caption in part_of])
                                  for k, kind in enumerate(kinds)], 1).half().numpy()  # [chunk, M, D]
                for j, row in enumerate(rows, c * chunk):
                    for sample in order[starts[j]:starts[j + 1]]:
                        if os.pwrite(file.fileno(), row.tobytes(), offset + int(sample) * size) < size:
                            raise OSError("the disk is full")
                os.fsync(file.fileno())
                os.pwrite(marks.fileno(), b"\1", c)
                bar.update(chunk)
            bar.close()
        with data.locked(folder / "embeddings"):
            if done.exists() and done.read_bytes() == b"\1" * chunks:
                os.replace(part, vectors)
                os.replace(folder / "embeddings.part.json", folder / "embeddings.json")
                done.unlink()
        return (folder / "embeddings.json").exists()
    except OSError as error:
        raise SystemExit(f"--out {folder}: {error.strerror or error}") from None
    except ValueError:  # of np.load
        raise SystemExit(f"{part} is damaged: delete {folder} and embed the captions again") from None


def embed_texts(lm, prompts, captions, folder, known=(), chunk=256):
    """Adds the texts of tests to texts.npz. prompts: list of texts that name classes ("a photo of a dog."); they get
    the row of the raw prompt. captions: list of texts that get the mean of the seven rows of the long prompt. A text in
    both lists counts as one that names a class. known: {caption: its vector, fp16 [D]}, those that are computed
    already."""
    names, vectors, raw = read_texts(folder, lm.about)
    where = {name: i for i, name in enumerate(names)}
    prompts, captions = ([*dict.fromkeys(" ".join(text.split()) for text in texts)] for texts in (prompts, captions))
    todo = [(text, True) for text in prompts if not (text in where and raw[where[text]])]
    chosen = {*prompts}
    todo += [(text, False) for text in captions if text not in where and text not in chosen]
    for text, is_raw in todo:
        check_length(lm, "raw" if is_raw else "long", text)
    vectors, raw, saved = [*vectors], [*raw], time.monotonic()
    bar = tqdm(total=len(todo), unit="text", desc="texts of tests", delay=1)
    for is_raw in (True, False):
        texts = [text for text, of in todo if of == is_raw]
        for start in range(0, len(texts), chunk):
            some = texts[start:start + chunk]
            new = [text for text in some if is_raw or text not in known]
            # The mean is one of unit rows, because training uses unit rows. The released code averages the hidden
            # states without normalising them.
            rows = dict(zip(new, lm("raw" if is_raw else "long", new).mean(1).half().numpy())) if new else {}
            for text in some:
                if text not in where:
                    where[text] = len(names)
                    names.append(text)
                    vectors.append(None)
                    raw.append(None)
                vectors[where[text]], raw[where[text]] = rows[text] if text in rows else known[text], is_raw
            bar.update(len(some))
            if time.monotonic() > saved + 60:  # so that a kill costs little
                write_texts(folder, names, vectors, raw, lm.about)
                saved = time.monotonic()
    bar.close()
    if todo:
        write_texts(folder, names, vectors, raw, lm.about)


def read_texts(folder, about):
    """The texts of tests in a store: list of m strings; vectors fp16 [m, D]; bool [m], true for texts that were
    embedded by the raw prompt. SystemExit if they are damaged or not of the language model that about tells of."""
    path = folder / "texts.npz"
    try:
        with np.load(path, allow_pickle=False) as file:
            names, vectors, raw = json.loads(file["names"].tobytes()), file["vectors"], file["raw"]
            made_by = file["identity"].tobytes().decode()
    except FileNotFoundError:
        return [], np.zeros((0, about["dim"]), np.float16), np.zeros(0, bool)
    except Exception as error:
        raise SystemExit(f"{path} is damaged ({type(error).__name__}): delete it and embed the texts of tests "
                         "again") from None
    if made_by != identity(about) or vectors.shape != (len(names), about["dim"]) or raw.shape != (len(names),):
        raise SystemExit(f"{path} is of another language model or other positions than embeddings.json: delete it and "
                         "embed the texts of tests again")
    return names, vectors, raw


def write_texts(folder, names, vectors, raw, about):
    """Writes texts.npz, the inverse of read_texts. The names are stored as JSON, because NumPy pads every string of an
    array to the longest one."""
    part = folder / "texts.part.npz"
    try:
        np.savez(part, names=np.frombuffer(json.dumps(names).encode(), np.uint8), vectors=np.stack(vectors),
                 raw=np.array(raw), identity=np.frombuffer(identity(about).encode(), np.uint8))
        os.replace(part, folder / "texts.npz")
    except OSError as error:
        raise SystemExit(f"--out {folder}: {error.strerror or error}") from None


class TextStore:
    """A folder that `flame.py embed` has made, opened without a language model. It also takes the place of a tokenizer
    in eval.py: store(texts) -> int64 [n, 1], the texts' numbers in texts.npz plus 1, because 0 means padding.

    about: what embeddings.json says. path: of embeddings.npy, fp16 [n, M, D]. digest: a hash of embeddings.json and of
    some rows. SystemExit if the folder holds no whole store, or rows that are not of unit norm.
    """
    merges, context = (), 1  # a checkpoint has these of every tokenizer; here they mean nothing

    def __init__(self, folder):
        self.folder, self.path = Path(folder), str(Path(folder, "embeddings.npy"))
        if not Path(folder, "embeddings.json").exists():
            unfinished = Path(folder, "done.part").exists()
            raise SystemExit(f"{folder} holds no embeddings.json: " + (
                "its embedding was interrupted; the same command goes on with it" if unfinished else
                "it must be a folder that python flame.py embed --lm ... --out FOLDER has made"))
        self.about = read_about(Path(folder, "embeddings.json"))
        try:
            vectors = np.load(self.path, mmap_mode="r", allow_pickle=False)
            shape = self.about["count"], len(self.about["prompts"]), self.about["dim"]
            if vectors.shape != shape or vectors.dtype != np.float16:
                raise ValueError(f"embeddings.npy has the shape {vectors.shape} in {vectors.dtype}, embeddings.json "
                                 f"says {shape} in float16")
        except Exception as error:
            raise SystemExit(f"{folder} is damaged ({error}): delete it and embed the captions again") from None
        some = np.array(vectors[::math.ceil(len(vectors) / 1000)])
        norms = np.linalg.norm(some.astype(np.float32), axis=-1)
        if not (abs(norms - 1) <= 1e-2).all():
            worst = np.nan_to_num(abs(norms - 1), nan=np.inf).argmax()
            raise SystemExit(f"{self.path} has a row of norm {norms.flat[worst]:.3f}, and all must have norm 1: delete "
                             f"{folder} and embed the captions again")
        self.digest = hashlib.sha256(json.dumps(self.about).encode() + some.tobytes()).hexdigest()
        self.names, self.vectors, self.raw = read_texts(self.folder, self.about)
        self.where = {name: i for i, name in enumerate(self.names)}

    def rows_of(self, dataset, spec, root):
        """The rows of embeddings.npy that belong to the samples of a data set: int64 [n]. spec, root: what
        data.open_dataset takes. SystemExit if the store is of other data."""
        if self.about["data"] == data.fingerprint(dataset):
            return np.arange(len(dataset))
        if not dataset.replaced:  # perhaps a part of the data that were embedded, which may be the first `count` pairs
            whole = data.open_dataset(spec, None, self.about["count"], None, root)
            if self.about["data"] == data.fingerprint(whole) and max(dataset.keep) < len(whole):
                return np.asarray(dataset.keep)
        raise SystemExit(f"--texts: {self.folder} holds the vectors of other data ({self.about['count']} pairs), not "
                         f"of these {len(dataset)} pairs: give --data, --subset and --limit as they were given to "
                         "embed, or embed these")

    def __call__(self, texts):
        texts = [" ".join(text.split()) for text in texts]
        if missing := [text for text in texts if text not in self.where]:
            raise SystemExit(f"{self.folder} holds no vector of the text {missing[0]!r} ({len(missing)} of "
                             f"{len(texts)} are missing): python flame.py embed --out {self.folder} --tests TEST adds "
                             "the texts of a test set, and --lines FILE those of a file, one a line")
        return torch.tensor([[1 + self.where[text]] for text in texts])


# encoders: OpenAI's towers under open_clip's parameter names

class QuickGELU(nn.Module):
    """OpenAI's approximation of GELU. OpenAI's weights need it; with plain GELU they load, but lose points."""

    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class Attention(nn.Module):
    """Multi-head self-attention with heads of width 64, under the parameter names of nn.MultiheadAttention."""

    def __init__(self, width):
        super().__init__()
        self.in_proj_weight = nn.Parameter(nn.init.xavier_uniform_(torch.empty(3 * width, width)))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x, causal=False):  # [B, L, C]
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias).unflatten(-1, (3, -1, 64))  # [B, L, 3, heads, 64]
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # [B, heads, L, 64] each
        x = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        return self.out_proj(x.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Pre-norm transformer block: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, width, quick_gelu=False):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = Attention(width)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(OrderedDict(
            c_fc=nn.Linear(width, 4 * width),
            gelu=QuickGELU() if quick_gelu else nn.GELU(),
            c_proj=nn.Linear(4 * width, width)))

    def forward(self, x, causal=False):  # [B, L, C]
        x = x + self.attn(self.ln_1(x), causal)
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """A stack of blocks. With checkpoint_activations the backward pass computes each block again, to save memory."""

    def __init__(self, width, layers, quick_gelu=False):
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width, quick_gelu) for _ in range(layers))
        self.checkpoint_activations = False

    def forward(self, x, causal=False):  # [B, L, C]
        for block in self.resblocks:
            if self.checkpoint_activations and torch.is_grad_enabled():
                x = checkpoint(block, x, causal, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, causal)
        return x


class VisionTransformer(nn.Module):
    """OpenAI's ViT: a class token and patches go through pre-norm blocks; the class token becomes the image feature."""

    def __init__(self, embed_dim, image_size, patch_size, width, layers, quick_gelu=False):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, patch_size, patch_size, bias=False)
        self.class_embedding = nn.Parameter(width ** -.5 * torch.randn(width))
        self.positional_embedding = nn.Parameter(width ** -.5 * torch.randn(1 + (image_size // patch_size) ** 2, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(width, layers, quick_gelu)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(width ** -.5 * torch.randn(width, embed_dim))

    def embed(self, images):
        """Tokens that enter the first block, class token first: [B, 3, S, S] -> [B, 1+P, C]."""
        patches = self.conv1(images).flatten(2).transpose(1, 2)  # [B, P, C]
        class_token = self.class_embedding.to(patches.dtype).expand(len(patches), 1, -1)
        return self.ln_pre(torch.cat([class_token, patches], 1) + self.positional_embedding)

    def forward(self, images):  # [B, 3, S, S] -> [B, D]
        return self.ln_post(self.transformer(self.embed(images))[:, 0]) @ self.proj


class FLAME(nn.Module):
    """A ViT, an MLP on its patches, the scale and, for the sigmoid loss, the bias. dim: D, the width of the language
    model. rows: M. store: the TextStore in which encode_text looks texts up.

    ln_post and proj of the ViT are not used and not trained, as released. They are kept so that weights of image towers
    can be exchanged with CLIP's checkpoints.
    """
    store = None

    def __init__(self, embed_dim, image_size, patch_size, vision_width, vision_layers, dim, rows, bias=True,
                 quick_gelu=False):
        super().__init__()
        self.visual = VisionTransformer(embed_dim, image_size, patch_size, vision_width, vision_layers, quick_gelu)
        for parameter in (*self.visual.ln_post.parameters(), self.visual.proj):
            parameter.requires_grad_(False)
        # The hidden width is D. The released code has max(D, 4096), which is D for its language model (5,120).
        self.projector = nn.Sequential(
            nn.Linear(vision_width, dim), nn.GELU(), nn.Linear(dim, dim), nn.LayerNorm(dim))
        self.logit_scale = nn.Parameter(torch.tensor(math.log(10 if bias else 1 / .07)))  # the log of s
        self.logit_bias = nn.Parameter(torch.tensor(-10.)) if bias else None
        # For --centre: the mean vector of each of the M rows. As a buffer it would be broadcast by DDP before the
        # forward pass, and the broadcast would wait for the gather of the texts.
        self.centre = nn.Parameter(torch.zeros(rows, dim), requires_grad=False)

    def encode_image(self, images):
        """Normalised pictures [B, 3, S, S] -> features [B, D], not of unit norm. The layer norm acts on each patch,
        before the mean. The class token takes part in attention, but its output is not used. For linear probes the
        authors take the mean of the patches before the MLP; eval.py takes what is returned here."""
        tokens = self.visual.transformer(self.visual.embed(images))  # [B, 1+P, C]
        return self.projector(tokens[:, 1:]).mean(1)

    def encode_text(self, tokens):
        """store(texts), int64 [n, 1] -> the texts' vectors [n, D], less the means of the training rows that were made
        by the same prompt (zeros without --centre). They are not of unit norm; eval.py makes them unit vectors."""
        rows = tokens[:, 0].cpu().numpy() - 1
        vectors, raw = (torch.from_numpy(x[rows]).to(tokens.device) for x in (self.store.vectors, self.store.raw))
        means = self.centre[0], self.centre[self.store.about["caption_rows"]].mean(0)
        return vectors.float() - torch.where(raw[:, None], *means)

    def centred(self, text, facets):
        """Subtracts from rows text [B, K, D] the means of their rows, whose numbers are facets [B, K], and makes them
        unit vectors again."""
        return F.normalize(text.float() - self.centre[facets], dim=-1).to(text.dtype)

    def forward(self, images):
        """Images [B, 3, S, S] -> unit image_features [B, D], the factor s, the bias or None."""
        x = self.encode_image(images)
        image_features = F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)
        return image_features, self.logit_scale.exp(), self.logit_bias

    @classmethod
    def restore(cls, state, sizes, folder):
        """(model, store): the model of a checkpoint in a folder, and the store in the place of its tokenizer. state,
        sizes: what the checkpoint holds under "model" and "sizes". $FLAME_TEXTS names a store that has moved."""
        sizes = dict(sizes)
        beside, made_by = os.path.normpath(Path(folder, sizes.pop("texts"))), sizes.pop("made_by")
        texts = os.environ.get("FLAME_TEXTS") or beside
        if not os.path.isdir(texts):
            raise SystemExit(f"the texts of this checkpoint are not in {texts}: name their folder by $FLAME_TEXTS")
        model = cls(**sizes)
        model.load_state_dict(state)
        model.store = TextStore(texts)
        if identity(model.store.about) != made_by or len(model.store.about["prompts"]) != sizes["rows"]:
            raise SystemExit(f"{texts} holds vectors of another language model or of other prompts than this "
                             "checkpoint was trained with: name the right folder by $FLAME_TEXTS")
        return model, model.store


MODELS = {  # OpenAI's and open_clip's sizes, tiny ones ours; 224 pixels and 12 text layers if none are given
    "ViT-B-32": dict(embed_dim=512, patch_size=32, vision_width=768, vision_layers=12, text_width=512),
    "ViT-B-16": dict(embed_dim=512, patch_size=16, vision_width=768, vision_layers=12, text_width=512),
    "ViT-S-16": dict(embed_dim=384, patch_size=16, vision_width=384, vision_layers=12, text_width=384),
    "RN50": dict(embed_dim=1024, patch_size=None, vision_width=64, vision_layers=(3, 4, 6, 3), text_width=512),
    "tiny": dict(embed_dim=128, image_size=32, patch_size=8, vision_width=128, vision_layers=4, text_width=128,
                 text_layers=4),
    "tiny-4": dict(embed_dim=128, image_size=32, patch_size=4, vision_width=128, vision_layers=4, text_width=128,
                   text_layers=4),  # 64 patches, where tiny has 16
}


# views and picture

AUGMENT = {  # Two entries for each method: how much of a picture's area a crop keeps (a range), and arguments of
    # data.color_params. jitter holds a probability and the ranges of brightness, contrast, saturation and hue. The
    # other arguments are probabilities.
    "clip": ((.5, 1.), dict()),  # as in SLIP's and DeCLIP's baselines; open_clip has (.9, 1.), and no colours either
    "declip": ((.2, 1.), dict(flip=.5, jitter=(.8, .4, .4, .4, .1), grey=.2, blur=.5)),  # MoCo v2's
    "protoclip": ((.5, 1.), dict(flip=.5, jitter=(.2, .8, .8, .8, .2), grey=.2, blur=.2)),
    # SLIP changes only the two crops that SimCLR compares
    "slip": ((.08, 1.), dict(flip=.5, jitter=(.8, .4, .4, .4, .1), grey=.2, blur=.5)),
    # no flip, so that a place in one crop is found in another by shift and scale
    "aclip": ((.5, 1.), dict(jitter=(.8, .4, .4, .2, .1), grey=.2, blur=.1, solarize=.2)),
    "flame": ((.9, 1.), dict()),
}


def flame_views(image, caption, rng, rows, facets, size, augment):
    """One sample, made in a worker from image bytes. Returns a dict: "images" is a crop, uint8 [3, S, S]; "colors" [8]
    are its colour parameters, if the augmentation changes colours; "facets" [K] are the numbers of K different rows,
    drawn at random. rows: M, the number of rows. facets: K. The caption is not used, because its vectors are stored.
    rng: random.Random."""
    area, colors = AUGMENT[augment]
    sample = {"images": data.random_resized_crop(image, size, area, rng),
              "facets": torch.tensor(rng.sample(range(rows), facets))}
    if colors:
        sample["colors"] = data.color_params(rng, **colors)
    return sample


def flame_collate(samples, path, rows):
    """A batch as data.collate makes it, and "texts" fp16 [B, K, D], the stored rows. path: of embeddings.npy. rows [n]:
    each sample's number there. Only the K rows are read from the disk."""
    batch = data.collate(samples)
    places = rows[batch["index"].numpy()][:, None]  # [B, 1]
    return batch | {"texts": torch.from_numpy(data.mapped(path)[places, batch["facets"].numpy()])}


def mean_rows(path, rows, most=2 ** 16):
    """Means of the M stored rows over these samples (evenly spaced ones, if there are more than `most`): [M, D]."""
    vectors, total = data.mapped(path), 0
    rows = rows[::math.ceil(len(rows) / most)]
    for some in np.array_split(rows, math.ceil(len(rows) / 256)):
        total = total + torch.from_numpy(vectors[some]).double().sum(0)
    return (total / len(rows)).float()


def facet_picture(path, model, preprocess, dataset, store, rows, count=64, show=12):
    """Writes a sheet of `show` training pictures. Below each stands, for each of the M rows, the caption that the model
    ranks first among those of `count` pictures. A star marks the picture's own caption."""
    device, training = model.logit_scale.device, model.training
    pictures = evaluator.Pictures(dataset, preprocess.size)
    places = range(0, len(dataset), max(1, len(dataset) // count))[:count]
    images = [(place, image) for image, place in (pictures[place] for place in places) if place >= 0][:show]
    captions = [(dataset.captions(place) or [""])[0] for place in places]
    model.eval()
    with torch.inference_mode():
        text = torch.from_numpy(data.mapped(store.path)[rows[list(places)]]).to(device)  # [count, M, D]
        text = model.centred(text, torch.arange(text.shape[1], device=device).expand(len(text), -1))
        x = model.encode_image(preprocess.normalize(torch.stack([image for _, image in images]).to(device)))
        x = F.normalize(x.float(), dim=-1)
        best = torch.einsum("bd,nmd->bmn", x, text.to(x.dtype)).argmax(2).tolist()  # [show, M]
    model.train(training)
    # 21 letters fit into a line
    lines = [[f"{j}{'*' if captions[k] == captions[places.index(place)] else ' '} {captions[k][:21]}"
              for j, k in enumerate(row, 1)] for row, (place, _) in zip(best, images)]
    data.grid([image for _, image in images], ["\n".join(line) for line in lines], path)


RECIPES = {  # batch_size is that of all ranks together, warmup counts steps
    # toy and small are ours. In few steps --loss nce is ahead: with 1,389 real pairs and 320 steps its recall at 10 on
    # unseen concepts was 22.6 % where sigmoid, whose bias has hardly moved by then, had 16.0 %.
    "toy": dict(
        model="tiny", batch_size=128, epochs=48, lr=1e-3, warmup=50, weight_decay=.1, augment="clip", facets=6,
        eval="toy-tune,toy", eval_every=6),
    "small": dict(
        model="tiny", batch_size=128, epochs=20, lr=1e-3, warmup=50, weight_decay=.1, augment="clip", facets=6),
    # as released (Training.md), with raw, short and long captions; we found no absolute accuracy on ImageNet
    "cc3m": dict(
        model="ViT-B-16", batch_size=3072, epochs=32, lr=5e-4, warmup=2000, weight_decay=.5, augment="flame", facets=6),
    # The authors published no command for YFCC15M or CC12M, so these are cc3m's values.
    "cc12m": dict(
        model="ViT-B-16", batch_size=3072, epochs=32, lr=5e-4, warmup=2000, weight_decay=.5, augment="flame", facets=6),
    "yfcc15m": dict(
        model="ViT-B-16", batch_size=3072, epochs=32, lr=5e-4, warmup=2000, weight_decay=.5, augment="flame", facets=6),
}


def stand_in(args, dataset, rank):
    """Embeds the toy's captions and the texts of its tests by WordVectors, in a folder under --out. Returns the
    folder."""
    lm = WordVectors()
    about = about_rows(lm, dataset, False)
    folder = Path(args.out, "words-" + hashlib.sha256(json.dumps(about).encode()).hexdigest()[:8])
    if rank == 0:
        print("no --texts: vectors of words stand in for a language model (WordVectors in flame.py)")
        embed_captions(lm, captions_to_embed(dataset, False), about, folder)
        texts = [evaluator.texts_of(test, evaluator.open_test(test)) for test in data.TOY_TESTS]
        embed_texts(lm, *([text for of_test in column for text in of_test] for column in zip(*texts)), folder)
    if dist.is_initialized():
        dist.barrier()
    return folder


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["embed"]:
        return embed(argv[1:])
    args = parse_args(argv)
    rank, world, device = init_distributed()

    # data
    dataset = data.open_dataset(args.data, None, args.limit, args.subset, args.data_root)
    steps = fill_in(args, dataset, world, device)  # steps of an epoch
    total = steps * args.epochs
    args.image_size = args.image_size or MODELS[args.model].get("image_size", 224)
    if not MODELS[args.model]["patch_size"]:
        raise SystemExit(f"--model {args.model}: the MLP reads the patches of a ViT; choose a ViT")
    if not args.texts and not isinstance(dataset, data.ToyDataset):
        raise SystemExit("--texts: give the folder of the stored vectors, which python flame.py embed --lm ... --data "
                         f"{args.data} --out FOLDER makes")
    args.texts = args.texts and os.path.normpath(args.texts)
    folder = Path(args.texts) if args.texts else stand_in(args, dataset, rank)
    store = TextStore(folder)
    rows = store.rows_of(dataset, args.data, args.data_root)
    for test in args.eval.split(",") if args.eval else ():
        for texts in evaluator.texts_of(test, evaluator.open_test(test, root=args.data_root)):
            store(texts)  # so that a text that is not stored is found now, not after an epoch
    M = len(store.about["prompts"])
    args.facets = min(args.facets, M)
    preprocess = data.Preprocess(args.image_size)
    dataset.transform = partial(flame_views, rows=M, facets=args.facets, size=args.image_size,
                                augment=args.augment)
    batches = data.EpochBatches(len(dataset), args.batch_size // world, args.seed, rank, world)
    loader = data.loader(dataset, batches, args.workers, device)
    loader.collate_fn = partial(flame_collate, path=store.path, rows=rows)

    # model
    torch.manual_seed(args.seed)
    sizes = {name: MODELS[args.model][name] for name in ("embed_dim", "patch_size", "vision_width", "vision_layers")}
    sizes |= dict(image_size=args.image_size, dim=store.about["dim"], rows=M, bias=args.loss == "sigmoid",
                  quick_gelu=args.quick_gelu)
    model = FLAME(**sizes).to(device)
    model.store = store
    about = describe(args, dataset, store, preprocess, sizes | {
        "texts": os.path.relpath(folder, args.out), "made_by": identity(store.about)})
    # a run resumes only with the same pairs and the same vectors
    about["data"] = hashlib.sha256((about["data"] + store.digest).encode()).hexdigest()[:32]
    saved = find_run(args, about, device)
    if args.init and not saved:
        load_visual(model, evaluator.load_clip_state(args.init, args.quick_gelu), args)
    if args.centre and not saved:
        model.centre.copy_(mean_rows(store.path, rows))
    for module in model.modules():
        if hasattr(module, "checkpoint_activations"):
            module.checkpoint_activations = args.checkpoint_activations
    # As released: positions decay; the class token, norms, biases, the scale s and the bias b do not.
    optimizer = torch.optim.AdamW(param_groups(model, args.weight_decay), args.lr, (.9, .95), eps=1e-8, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
    meter = Meter(args.out, args.batch_size, device)
    parts = dict(model=model, optimizer=optimizer, scaler=scaler, meter=meter)  # what is saved
    step, tested, best = 0, 0, -1.
    if saved:
        for name, part in parts.items():
            part.load_state_dict(saved[name])
        torch.set_rng_state(saved["rng"])
        step, tested, best = saved["step"], saved["tested"], saved["best"]
    augment = torch.compile(data.augment) if args.compile else data.augment
    if args.compile:
        torch._dynamo.config.optimize_ddp = False  # else DDP cuts the graph at its buckets
        model.compile()
    parallel = model if world == 1 else DistributedDataParallel(
        model, device_ids=[device] if device.type == "cuda" else None, gradient_as_bucket_view=True)
    # bf16 has the range of fp32. fp16 does not, so it needs a GradScaler, and large ViTs have diverged in it.
    amp = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[args.amp]
    if rank == 0:
        lm = f"{M} rows a picture by {store.about['lm']} ({store.about['dim']} wide)"
        start_log(args, saved, dataset, model, f"{lm}, {total} steps on {world} x {device.type}")
    saved = None  # gigabytes that nobody needs any more

    def save(name):
        if rank == 0:
            states = {name: part.state_dict() for name, part in parts.items()}
            save_checkpoint(Path(args.out, name), **about, **states, step=step, tested=tested, best=best,
                            rng=torch.get_rng_state())

    def evaluate():
        """Tests the model if tests are due after this epoch and were not made before the run was killed."""
        nonlocal tested, best
        due = step % steps == 0 and (step // steps % args.eval_every == 0 or step == total)
        if not due or step == tested:
            return
        tests = args.eval.split(",") if args.eval else []
        results = evaluator.evaluate(model, store, preprocess, tests, amp, args.workers, root=args.data_root)
        if rank == 0:
            facet_picture(Path(args.out, "facets.png"), model, preprocess, dataset, store, rows)
            tqdm.write(f"step {step} of {total}: {evaluator.summary(results) or 'no tests'}")
            write_log(args.out, step=step, eval=results)
        tested = step
        scores = [result[result["metric"]] for result in results.values()]  # each test names its usual metric
        if scores and scores[0] > best:  # the first test decides
            best = scores[0]
            save("best.pt")
        save("last.pt")

    # training
    with catch_sigterm() as stop:
        evaluate()
        bar = tqdm(total=total, initial=step, unit="step", disable=rank > 0, mininterval=1)
        meter.clear(step)
        for epoch in range(step // steps, args.epochs):
            batches.epoch, batches.start = epoch, step % steps
            for batch in meter.watch(loader):
                images, text, facets = (batch[name].to(device, non_blocking=True)
                                        for name in ("images", "texts", "facets"))
                if args.centre:
                    text = model.centred(text, facets)
                all_text, arrived = gather_constant(text)  # travels while the image tower works
                if "colors" in batch:
                    images = augment(images, batch["colors"].to(device, non_blocking=True))
                with torch.autocast(device.type, amp, enabled=amp is not None):
                    image_features, logit_scale, logit_bias = parallel(preprocess.normalize(images))
                arrived()
                if args.loss == "sigmoid":
                    loss = sigmoid_loss(image_features, text, logit_scale, logit_bias, all_text)
                else:
                    loss = nce_loss(image_features, text, logit_scale, all_text)
                losses = {"loss": loss}

                # the step. If the gradient is not finite, the step is bad: weights and moments stay as they are. DDP
                # has averaged the gradient, so all ranks agree on that.
                lr = lr_at(step, total, args.warmup, args.lr)
                for group in optimizer.param_groups:
                    group["lr"] = lr
                optimizer.zero_grad()
                scaler.scale(loss).backward()
                scaler.unscale_(optimizer)
                good = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]).isfinite()
                # Fused AdamW skips the step, on the device, if found_inf is 1. GradScaler uses this for overflows of
                # fp16; here it stands for any bad step.
                optimizer.found_inf = 1 - good.float()
                optimizer.step()
                scaler.update()
                with torch.no_grad():
                    model.logit_scale.clamp_(0, math.log(100))  # a clamp in the forward pass would stop the gradient
                step += 1

                # meter.row makes the host wait for the device, so it is not called in every step. After SIGTERM one
                # process stops at once. Several ranks tell each other in meter.row, so they stop at the next log line.
                meter.add(good, losses)
                if step % args.log_every == 0 or step % steps == 0 or (stop and world == 1):
                    row, stopped = meter.row(step, stop)
                    if rank == 0:
                        row |= dict(lr=lr, logit_scale=logit_scale.item())
                        if logit_bias is not None:
                            row["logit_bias"] = logit_bias.item()
                        write_log(args.out, step=step, epoch=epoch, **row)
                    bar.set_postfix_str(f"loss {row['loss'] or math.nan:.3f}, {row['pairs_per_second']:.0f} pairs/s")
                    bar.update(step - bar.n)
                    if stopped:
                        save("last.pt")
                        leave(f"stopped by SIGTERM and saved at step {step}; the same command goes on from there")
                if step % 1000 == 0 and step % steps:  # a multiple of steps is saved below
                    save("last.pt")
            save("last.pt")  # before the tests, which take their time
            evaluate()
            meter.clear(step)  # the time of the tests does not count
    bar.close()
    if rank == 0:
        print(f"finished {total} steps; {args.out} holds {', '.join(sorted(os.listdir(args.out)))}")
    if world > 1:
        dist.destroy_process_group()


def embed(argv):
    """The command embed: fills a folder with the vectors of a data set's captions and of the texts of tests."""
    args = parse_embed_args(argv)
    folder = Path(args.out)
    before = read_about(folder / "embeddings.json") if (folder / "embeddings.json").exists() else None
    if before:
        args.lm = args.lm or before["lm"]
        args.restart_positions = args.restart_positions or before["restart_positions"]
    if not args.lm:
        raise SystemExit(f"--lm: name the language model, since {folder} holds no vectors yet")
    if not args.data and not before:
        raise SystemExit(f"--data: name the data first, since {folder} holds no vectors of captions yet")
    if (args.templates or args.classnames) and not args.tests:
        raise SystemExit("--templates and --classnames are for the classes of --tests: give --tests, too")
    rank, world, device = init_distributed()
    dataset = data.open_dataset(args.data, None, args.limit, args.subset, args.data_root) if args.data else None
    tests = args.tests.split(",") if args.tests else []
    lines, prompts, captions = data.read_lines(args.lines, "--lines") if args.lines else [], [], []
    templates = evaluator.read_templates(args.templates) if args.templates else evaluator.TEMPLATES
    classnames = evaluator.read_classnames(args.classnames, "--classnames") if args.classnames else None
    for test in tests:
        more = evaluator.texts_of(test, evaluator.open_test(test, root=args.data_root), templates, classnames)
        prompts, captions = prompts + more[0], captions + more[1]
    lm = WordVectors() if args.lm == WordVectors.name else LanguageModel(
        args.lm, device, args.restart_positions, args.amp or ("fp16" if device.type == "cuda" else "off"),
        args.batch_tokens)
    whole, known = True, {}
    if dataset:
        own = captions_to_embed(dataset, args.rewritten)
        whole = embed_captions(lm, own, about_rows(lm, dataset, args.rewritten), folder, rank, world)
        if whole and not args.rewritten:  # a test's caption that is a training caption, too, has its rows already
            vectors = np.load(folder / "embeddings.npy", mmap_mode="r")
            rows = read_about(folder / "embeddings.json")["caption_rows"]
            place = {text: i for i, (text,) in enumerate(own)}
            known = {text: vectors[place[text], rows].astype(np.float32).mean(0).astype(np.float16)
                     for text in {" ".join(text.split()) for text in captions} & {*place}}
    elif differ := other(lm.about, before):
        raise SystemExit(f"--lm {args.lm}: {folder} holds vectors that differ in: {differ}; give the same language "
                         "model and --restart-positions as before, or another --out")
    if rank == 0:
        stored = {*read_texts(folder, lm.about)[0]}  # --lines does not change what a test has stored
        prompts += [line for line in lines if line.strip() and " ".join(line.split()) not in stored]
        embed_texts(lm, prompts, captions, folder, known)
        print(f"{folder} holds {', '.join(sorted(os.listdir(folder)))}" + (
            "" if whole else "; the other processes are still at work"))
    if world > 1:
        dist.destroy_process_group()


def load_visual(model, state, args):
    """Loads the image tower of a CLIP's state into a model. SystemExit if its names or shapes differ."""
    state = {key.removeprefix("visual."): value for key, value in state.items() if key.startswith("visual.")}
    if {key: value.shape for key, value in state.items()} != {
            key: value.shape for key, value in model.visual.state_dict().items()}:
        raise SystemExit(f"--init {args.init} has no image tower of a {args.model} of {args.image_size} pixels")
    model.visual.load_state_dict(state)


# the run: flags, schedule, parameter groups, resume, log, checkpoints, process group

def positive(text):
    """A whole number of at least 1, as a type for argparse."""
    if int(text) < 1:
        raise ValueError
    return int(text)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog="A flag that is not given takes the value of the recipe. The "
        "command embed, which comes before all flags, has flags of its own: python flame.py embed --help")
    add = parser.add_argument
    add("--data", default="toy",
        help="toy, cc3m, cc12m, yfcc15m, or a path: folder or pattern of webdataset tars, .tsv, .csv, .jsonl")
    add("--data-root", help="where the folders cc3m, cc12m and yfcc15m are (default: $CLIP_DATA or ./datasets)")
    add("--recipe", choices=RECIPES, help="default: the one named as --data; else small (under 100,000 pairs) or cc3m")
    add("--model", choices=MODELS)
    add("--image-size", type=positive, help="side of the pictures in pixels (default: the model's)")
    add("--quick-gelu", action="store_true", help="OpenAI's activation, for --init with weights trained with it")
    add("--batch-size", type=positive, help="pairs a step, all ranks together")
    add("--epochs", type=positive)
    add("--lr", type=float)
    add("--warmup", type=int, help="steps in which the learning rate rises")
    add("--weight-decay", type=float)
    add("--augment", choices=AUGMENT, help="the image augmentation of that method")
    add("--amp", choices=("bf16", "fp16", "off"), help="default: bf16 or else fp16 on a GPU, off on a CPU")
    add("--eval", help="comma list of tests: toy, folders, names in eval.py; best.pt is chosen by the first")
    add("--eval-every", type=positive, help="epochs from test to test (default: 1)")
    add("--init", help="start the image tower from a CLIP: a checkpoint of ours, OpenAI's or open_clip's")
    add("--compile", action="store_true", help="torch.compile the model and the augmentation")
    add("--checkpoint-activations", action="store_true", help="less memory, a third more computation in the towers")
    add("--workers", type=int,
        help="processes that read data for each rank (default: its share of the cores, at most 12; toy on a CPU: none)")
    add("--seed", type=int, default=0)
    add("--limit", type=positive, help="only the first N pairs")
    add("--subset", help="only pairs whose keys are in this file, one a line; a caption after a tab replaces their own")
    add("--log-every", type=positive, default=20, help="steps from log line to log line")
    add("--out", help="default: runs/<script>-<data>; a run that finds its own checkpoint there resumes")
    add("--restart", action="store_true", help="delete the checkpoints in --out and begin anew")
    add = parser.add_argument_group("FLAME").add_argument
    add("--texts", metavar="FOLDER", help="the stored vectors, made by python flame.py embed (default, for the toy "
        "only: vectors of words)")
    add("--facets", type=positive, help="K, rows of a picture used at a step, of the M that are stored")
    add("--loss", choices=("sigmoid", "nce"), default="sigmoid", help="default: %(default)s")
    add("--centre", action="store_true", help="subtract their mean from the vectors, also in tests (ours; for small "
        "language models)")
    return parser.parse_args(argv)


def parse_embed_args(argv):
    """The flags of the command embed."""
    parser = argparse.ArgumentParser(
        prog="flame.py embed", description="Stores the vectors that a frozen language model gives captions and texts "
        "of tests. An interrupted job goes on where it stopped. torchrun starts one process for each GPU.")
    add = parser.add_argument
    add("--lm", help="folder or hub's name of a causal language model of the Llama kind (SmolLM2, Llama, Mistral, "
        "Qwen2); or words, the toy's stand-in (default: the one that --out was made with)")
    add("--out", required=True, metavar="FOLDER", help="what --texts of the training will name")
    add("--data", help="the captions: what --data of the training will name")
    add("--data-root", help="where the folders cc3m, cc12m and yfcc15m are (default: $CLIP_DATA or ./datasets)")
    add("--limit", type=positive, help="only the first N pairs")
    add("--subset", help="only pairs whose keys are in this file, one a line; a caption after a tab replaces their own")
    add("--rewritten", action="store_true", help="each pair has three captions: its own, a short and a long rewritten "
        "one; this makes 11 rows a picture in place of 8")
    add("--tests", help="comma list of test sets, whose class prompts and captions are added: what --eval takes")
    add("--templates", metavar="FILE", help="prompts of the tests in place of eval.py's, a line each, with {}")
    add("--classnames", metavar="FILE", help="names of the classes in place of the tests' own, a line each")
    add("--lines", metavar="FILE", help="more texts to add, a line each; like the prompts of classes, "
        "they get the raw prompt")
    add("--restart-positions", action="store_true", help="each facet takes the positions that follow the caption, as "
        "if it were a prompt of its own (released: positions run on)")
    add("--amp", choices=("bf16", "fp16", "off"), help="precision of the language model (default: fp16 on a GPU, as "
        "released, off on a CPU)")
    add("--batch-tokens", type=positive, default=16384, help="tokens of a forward pass, about (default: %(default)s)")
    return parser.parse_args(argv)


def fill_in(args, dataset, world, device):
    """Sets each flag that the command line left open, by the recipe, the data and the machine. Returns the number of
    steps in an epoch. SystemExit if the values do not fit together."""
    if not args.recipe and args.data in RECIPES:
        args.recipe = args.data
    elif not args.recipe and isinstance(dataset, data.ToyDataset):
        args.recipe = "toy"
    elif not args.recipe:
        args.recipe = "small" if len(dataset) < 100_000 else "cc3m"
    for name, value in RECIPES[args.recipe].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.eval_every = args.eval_every or 1
    if not args.amp and device.type == "cpu":
        args.amp = "off"
    elif not args.amp:
        args.amp = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    args.out = args.out or f"runs/{Path(__file__).stem}-{data.run_name(args.data)}"
    if args.workers is None:
        args.workers = data.default_workers(args.data, device)
    if min(args.lr, args.warmup, args.weight_decay, args.workers, args.seed) < 0:
        raise SystemExit("--lr, --warmup, --weight-decay, --workers and --seed cannot be negative")
    if args.batch_size % world:
        raise SystemExit(f"--batch-size {args.batch_size} is not a multiple of the {world} ranks")
    least = MODELS[args.model]["patch_size"] or 32  # a ResNet makes 32 pixels one
    if (vars(args).get("image_size") or least) < least:  # a student has no such flag
        raise SystemExit(f"--image-size {args.image_size} is too small: {args.model} needs at least {least} pixels")
    steps = len(dataset) // args.batch_size
    if args.warmup >= steps * args.epochs:
        raise SystemExit(
            f"{len(dataset)} pairs make {steps * args.epochs} steps in {args.epochs} epochs of batches of "
            f"{args.batch_size}: too few for --warmup {args.warmup}; lower --batch-size or --warmup, or raise --epochs")
    if args.compile and args.checkpoint_activations and MODELS[args.model]["patch_size"] is None:
        raise SystemExit("--checkpoint-activations of a ResNet does not go with --compile, because torch.compile knows "
                         "no context_fn: leave one of them out")
    for test in args.eval.split(",") if args.eval else ():
        evaluator.open_test(test, root=args.data_root)  # so that a wrong name is found now, not after an epoch
    return steps


def lr_at(step, total, warmup, lr, start=0., end=0.):
    """Learning rate of a step; the first step is 0, the last total - 1. It rises on a straight line and is lr in the
    last warm-up step. Then it falls along half a cosine towards `end`. If start is 0, step 0 has lr / warmup,
    as in open_clip. If start is above 0, step 0 has start, as in SLIP and DeCLIP."""
    if step < warmup and start:
        return start + (lr - start) * (step / max(1, warmup - 1))
    if step < warmup:
        return lr * ((step + 1) / warmup)
    return end + (lr - end) * .5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


def param_groups(model, weight_decay, no_decay=()):
    """The trainable parameters in two groups for AdamW. The first has weight decay: all parameters of two or more
    dimensions, the token table and positions included (newer open_clip does not decay positions). The second has none:
    vectors and scalars, and parameters whose name starts with one of no_decay."""
    groups = [dict(params=[], weight_decay=weight_decay), dict(params=[], weight_decay=0.)]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.ndim >= 2 and not name.startswith(tuple(no_decay)):
            groups[0]["params"].append(parameter)
        elif parameter.requires_grad:
            groups[1]["params"].append(parameter)
    return groups


def describe(args, dataset, tokenizer, preprocess, sizes):
    """What a checkpoint holds beside the states: enough to use the model, and to know whether a run may go on from
    it."""
    merges = "\n".join(map(" ".join, tokenizer.merges))
    return dict(script=Path(__file__).stem, flags=vars(args), data=data.fingerprint(dataset), sizes=sizes,
                preprocess=vars(preprocess), merges=merges, context=tokenizer.context)


def find_run(args, about, device):
    """The checkpoint in --out from which this run goes on, or None. about: what describe returns. SystemExit if the
    checkpoint is of another script, of other flags or of other data, or if the ranks see different checkpoints or
    data."""
    path, saved = Path(args.out, "last.pt"), None
    # After a crash torchrun starts the same command again. A --restart in it was meant for the first start only.
    crashed = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    if path.exists() and (crashed or not args.restart):
        saved = load_checkpoint(path)
        # Flags that may differ. Pairs and merges may have another name or place, because their content is compared
        # below. A recipe only sets other flags, and these are compared.
        may_differ = ("epochs", "workers", "out", "restart", "recipe", "data", "data_root", "subset", "limit", "bpe")
        before = saved["flags"]
        changed = [f"--{name.replace('_', '-')} {value} (was {before.get(name)})"
                   for name, value in vars(args).items() if name not in may_differ and value != before.get(name)]
        for name, what in (("data", "other pairs"), ("merges", "other merges of the tokenizer")):
            if saved[name] != about[name]:
                changed.append(what)
        if saved["script"] != about["script"] or changed:
            raise SystemExit(
                f"{args.out} holds a run of {saved['script']}.py with other flags or data: {', '.join(changed)}; "
                "give the same ones to resume it, another --out, or --restart to begin anew")
    step, tested = (saved["step"], saved["tested"]) if saved else (0, 0)
    fingerprint = int(about["data"][:12], 16)  # the first 12 hexadecimal digits fit into int64
    everywhere = gather(torch.tensor([[step, tested, fingerprint]], device=device))  # [W, 3]
    if (everywhere != everywhere[0]).any():
        raise SystemExit(f"ranks disagree on (step, tested step, data): {everywhere.tolist()}; --out and --data must "
                         "be the same on all machines")
    return saved


def start_log(args, saved, dataset, model, plan):
    """Rank 0 calls it before the first step. It makes the folder --out. With --restart it deletes the checkpoints of an
    earlier run. If this run resumes, it cuts the log back to the checkpoint. Then it prints all values in force, the
    sizes of data and model, and plan, a text. SystemExit if --out cannot be written."""
    out = Path(args.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        rows = []
        if args.restart and not saved:
            (out / "last.pt").unlink(missing_ok=True)
            (out / "best.pt").unlink(missing_ok=True)
        if saved and (out / "log.jsonl").exists():
            # Keep rows of tests up to the step that was tested last, other rows up to the step of the checkpoint. A row
            # that a kill cut short goes too.
            rows = (out / "log.jsonl").read_text().splitlines(keepends=True)
            rows = [row for row in rows if row.endswith("}\n") and
                    json.loads(row).get("step", 0) <= (saved["tested"] if '"eval"' in row else saved["step"])]
        (out / "log.tmp").write_text("".join(rows))
        os.replace(out / "log.tmp", out / "log.jsonl")
    except OSError as error:
        raise SystemExit(f"--out {out}: {error.strerror}") from None
    print(" ".join(f"--{name.replace('_', '-')} {value}" for name, value in vars(args).items()
                   if value not in (None, "") and value is not False))
    print(f"{len(dataset)} pairs ({sum(dataset.skipped.values())} left out), {plan}, "
          f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters"
          + (f", resumed at step {saved['step']}" if saved else ""))
    if saved and saved["flags"]["epochs"] != args.epochs:
        print(f"--epochs {args.epochs} (was {saved['flags']['epochs']}): the learning rate follows the new schedule")


def write_log(out, **row):
    """Adds a line to log.jsonl in the folder out."""
    with open(Path(out, "log.jsonl"), "a") as file:
        file.write(json.dumps(row) + "\n")


class Meter:
    """Adds up what happens between two log lines. Losses are summed on the device, so that the host need not wait for
    the device in each step. Two numbers count from the start of the run: failed, the unreadable pictures, which the
    loader replaced by others; and bad, the steps whose gradient was not finite."""

    def __init__(self, out, batch_size, device):
        self.out, self.batch_size, self.device, self.failed, self.bad = out, batch_size, device, 0, 0
        self.streak = torch.zeros((), device=device)  # number of bad steps in a row, up to now
        self.clear(0)

    def state_dict(self):
        return {"failed": self.failed, "bad": self.bad}

    def load_state_dict(self, state):
        self.failed, self.bad = state["failed"], state["bad"]

    def clear(self, step):
        """Begins a new line after this step."""
        self.step, self.start = step, time.perf_counter()
        self.sums, self.skipped, self.waited = 0, 0, 0.

    def watch(self, loader):
        """Iterates over the loader. Adds up the seconds spent waiting for it, and the pictures that it replaced."""
        tick = time.perf_counter()
        for batch in loader:
            self.waited += time.perf_counter() - tick
            self.skipped += int(batch["skipped"].sum())
            yield batch
            tick = time.perf_counter()

    def add(self, good, losses):
        """Adds one step. good: bool tensor []; losses: {name: scalar tensor}. The losses of a bad step do not count."""
        self.names = list(losses)
        self.streak = (self.streak + 1).where(~good, 0)
        row = torch.stack([good, *losses.values()]).detach()  # its first number is 1 if the step was good
        self.sums = self.sums + row.where(good, 0)

    def row(self, step, stop):
        """Returns the log line of all ranks, a dict, and whether any rank was told to stop. A loss is its mean over the
        good steps, or None if all were bad. Begins a new line. SystemExit if too many pictures failed or 20 steps in a
        row were bad."""
        # of each rank: number of good steps, sum of each loss over them, streak, skipped, waited, signals to stop
        here = self.sums.new_tensor([self.skipped, self.waited, len(stop)])
        everywhere = gather(torch.cat([self.sums, self.streak[None], here])[None])  # [W, columns]
        columns = everywhere.mean(0).tolist()  # means over the ranks
        good_steps, sums = columns[0], columns[1:-4]
        streak, skipped, waited, stopped = columns[-4:]
        count, seconds = step - self.step, time.perf_counter() - self.start
        self.failed += round(skipped * len(everywhere))
        self.bad += round(count - good_steps)
        data.check_skipped(self.failed, step * self.batch_size)
        if streak >= 20:
            last = Path(self.out, "last.pt")
            raise SystemExit("20 steps in a row without a finite gradient; "
                             f"the last good weights are in {last if last.exists() else 'no file yet'}")
        row = {name: total / good_steps if good_steps else None for name, total in zip(self.names, sums)}
        row |= dict(pairs_per_second=count * self.batch_size / seconds, waited=waited)
        row |= dict(skipped=self.failed, bad_steps=self.bad)
        if self.device.type == "cuda":
            row["memory_gb"] = torch.cuda.max_memory_allocated() / 2 ** 30
        self.clear(step)
        return row, stopped > 0


def save_checkpoint(path, **state):
    """Writes state (tensors and plain Python values only) to a temporary file, then renames that to path. So a kill
    leaves the old file or the new one. SystemExit if it cannot be written."""
    try:
        torch.save(state, f"{path}.tmp")
        os.replace(f"{path}.tmp", path)
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError on a full disk
        Path(f"{path}.tmp").unlink(missing_ok=True)
        raise SystemExit(f"{path} cannot be written: {error}") from None


def load_checkpoint(path):
    """The state that save_checkpoint wrote, on the CPU. SystemExit with a sentence if the file is cut off or
    foreign."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not {"script", "model", "tested", "data"} <= set(state):
            raise KeyError
    except Exception as error:
        raise SystemExit(f"{path} is no whole checkpoint of these scripts ({type(error).__name__}): delete it, begin "
                         "anew with --restart, or choose another --out") from None
    return state


@contextmanager
def catch_sigterm():
    """Yields a list that is empty until SIGTERM arrives, which torchrun and SLURM send before they kill. However the
    block ends, the earlier handler is put back."""
    stop, handler = [], signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, handler)


def leave(message):
    """Waits until all ranks are here, so that rank 0 has saved. Then raises SystemExit with the message."""
    if dist.is_initialized():
        dist.barrier()
    raise SystemExit(message)


def init_distributed():
    """Rank, world size and device of this process, from the environment that torchrun sets. Without torchrun the rank
    is 0 and the world size 1."""
    rank, world, local = (int(os.environ.get(name, default)) for name, default in
                          (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        if local >= torch.cuda.device_count():
            raise SystemExit(f"--nproc_per_node: there are only {torch.cuda.device_count()} GPUs on this machine")
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
    if world > 1 and not dist.is_initialized():
        store = next(dist.rendezvous("env://"))[0]
        # torchrun's store keeps what a crashed attempt left in it, so each attempt gets a prefix of its own
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=rank, world_size=world)
    return rank, world, device


if __name__ == "__main__":
    main()
