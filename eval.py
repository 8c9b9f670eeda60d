"""Evaluation of a trained CLIP: zero-shot classification, retrieval, linear probe, k-nearest neighbours.

    python eval.py runs/declip-toy/last.pt --data toy                       zero-shot and retrieval
    python eval.py runs/clip-cc3m/last.pt --data cifar10,imagenet/val --probe --train cifar10,imagenet/train --json out.json
    python eval.py runs/clip-cc3m/last.pt --images cat.jpg --texts "a cat" "a dog"

A test set is one of
    toy, or a name in DATASETS            the drawn data; torchvision's sets whose class names are usable
    a folder with a sub-folder a class    names from classnames.txt in it (line i = i-th folder in order), else the folders' own
    tars with .cls and classnames.txt     CLIP_benchmark's layout: zero-shot, and retrieval where there is .txt (a caption a line)
    tars, .tsv, .csv, .jsonl of captions  retrieval only

Protocol. A class is the mean of the unit features of its prompts, made unit again. Pictures: short side to size, centre crop.
The templates are our own ("own-8" in tables): published numbers mostly use OpenAI's 80 or 7, which --templates takes from a
file; the bare class name costs 1 to 6 points on CC data. The probe and k-NN read encode_image, after the projection (OpenAI's
README does; SLIP and the CLIP paper read the tower before it, which gives several points more). All scores are fp32 without
TF32, all fractions in [0, 1]. Ties go to the lower index, so the numbers do not depend on the hardware's sort.

Under torchrun every rank calls evaluate(); each encodes its share of the pictures, once each, and all get the same numbers.
"""
import argparse
import importlib.util
import json
import os
import re
import sys
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F

import data

TEMPLATES = (
    "{}",
    "a photo of a {}.",
    "a picture that shows the {}.",
    "a {} seen from close up.",
    "a small {} in the distance.",
    "one very large {}.",
    "a dark and blurry photo of the {}.",
    "a drawing of a {}.",
)

DATASETS = {  # torchvision class, its test and train split, the usual metric, what the names are; underscores become spaces
    "cifar10": ("CIFAR10", dict(train=False), dict(train=True), "top1", "{}"),
    "cifar100": ("CIFAR100", dict(train=False), dict(train=True), "top1", "{}"),
    "stl10": ("STL10", dict(split="test"), dict(split="train"), "top1", "{}"),
    "food101": ("Food101", dict(split="test"), dict(split="train"), "top1", "{}, a kind of food"),
    "pets": ("OxfordIIITPet", dict(split="test"), dict(split="trainval"), "mean_per_class", "{}, a breed of cat or dog"),
    "dtd": ("DTD", dict(split="test"), dict(split="train"), "top1", "{} texture"),
    "aircraft": ("FGVCAircraft", dict(split="test"), dict(split="trainval"), "mean_per_class", "{}, a type of aircraft"),
}


# metrics: tensors in, fractions out

@contextmanager
def full_fp32():
    """Matrix products without TF32, which would round scores to 10 bits and tie them. Also serves as a decorator."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)


def at_least_fp32(x):
    return x.to(torch.promote_types(x.dtype, torch.float32))


@full_fp32()
def ranks(queries, candidates, pairs):
    """Place of each query's best positive among all candidates, 0 the first: queries [n, D], candidates [m, D],
    pairs [p, 2] of (query, candidate) -> int64 [n]. Ties go to the lower index; a NaN score, or no positive, gives m."""
    queries, candidates = at_least_fp32(queries), at_least_fp32(candidates)
    n, m = len(queries), len(candidates)
    places, column = [], torch.arange(m, device=queries.device)
    for start in range(0, n, chunk := max(1, 2 ** 25 // m)):
        scores = queries[start:start + chunk] @ candidates.T  # [chunk, m]
        rows, columns = pairs[(pairs[:, 0] >= start) & (pairs[:, 0] < start + chunk)].T
        positive = torch.zeros_like(scores, dtype=torch.bool)
        positive[rows - start, columns] = True
        best, where = scores.masked_fill(~positive, -torch.inf).max(1, keepdim=True)
        places.append((~(scores <= best) | (scores == best) & (column < where)).sum(1))
    return torch.cat(places)


def class_recall(correct, y, num_classes):
    """correct bool [n], labels y [n] -> fraction correct of each class [num_classes], NaN for a class without pictures."""
    total, right = (torch.bincount(labels, minlength=num_classes) for labels in (y, y[correct]))
    return right.double() / total


def zero_shot(x, y, classifier):
    """Unit image features x [n, D], labels y [n], classifier [C, D] -> top1, top5, mean_per_class (mean recall of the classes
    that occur in y), per_class (list of C recalls, None for a class that does not occur), n."""
    place = ranks(x, classifier, torch.stack([torch.arange(len(y), device=y.device), y], 1))
    recall = class_recall(place == 0, y, len(classifier))
    return {"top1": (place == 0).double().mean().item(), "top5": (place < min(5, len(classifier))).double().mean().item(),
            "mean_per_class": recall.nanmean().item(), "per_class": [None if r != r else r for r in recall.tolist()], "n": len(y)}


def retrieval(image_features, text_features, pairs, ks=(1, 5, 10)):
    """Recall both ways: image_features [n, D], text_features [m, D], pairs [p, 2] of (image, text), any number a side ->
    {"i2t@1": ..., "t2i@10": ...}: the share of images (texts) with any of their texts (images) among the k highest inner
    products. Rows are taken as they are: give unit rows for cosines. Images (texts) in no pair are candidates, not queries."""
    pairs, result = torch.as_tensor(pairs, device=image_features.device), {}
    for way, queries, candidates, p in (("i2t", image_features, text_features, pairs), ("t2i", text_features, image_features, pairs.flip(1))):
        place = ranks(queries, candidates, p)[p[:, 0].unique()]
        result |= {f"{way}@{k}": (place < min(k, len(candidates))).double().mean().item() for k in ks}
    return result


@full_fp32()
@torch.no_grad()
def linear_probe(x, y, l2, num_classes):
    """Multinomial logistic regression: features x [n, D], labels y [n] -> W [C, D], b [C], the minimum of
    mean cross-entropy(x W^T + b) + l2/2 |W|^2 with b free; scikit-learn's LogisticRegression(C=1 / (l2 * n)).

    L-BFGS with strong Wolfe line search; matrix products in x's precision (fp32 at least), softmax and sums in float64;
    in chunks of rows, so that ImageNet's logits fit. Rows are centred, which b absorbs, and scaled, which l2 absorbs:
    the same optimum in a fifth of the iterations."""
    x, n = at_least_fp32(x), len(x)
    mean, scale = x.mean(0), (x.var(0).mean() + l2) ** -.5
    W, b = x.new_zeros(num_classes, x.shape[1]), torch.bincount(y, minlength=num_classes).add(.5).log().to(x.dtype)
    optimizer = torch.optim.LBFGS([W, b], max_iter=1000, history_size=10, tolerance_grad=1e-10, tolerance_change=0.,
                                  line_search_fn="strong_wolfe")

    def closure():  # the gradient by hand: also works under inference_mode
        loss = l2 * scale ** 2 / 2 * W.square().sum(dtype=torch.float64)
        W.grad, b.grad = l2 * scale ** 2 * W, torch.zeros_like(b)
        for rows, labels in zip(x.split(2 ** 14), y.split(2 ** 14)):
            rows = scale * (rows - mean)
            log_p = F.log_softmax((rows @ W.T + b).double(), 1)  # [chunk, C]
            nll = -log_p.gather(1, labels[:, None])  # [chunk, 1]
            loss += nll.sum() / n
            error = (log_p.exp().scatter_add(1, labels[:, None], -torch.ones_like(nll)) / n).to(x.dtype)
            W.grad += error.T @ rows
            b.grad += error.sum(0)
        return loss

    optimizer.step(closure)
    return scale * W, b - scale * W @ mean


def best_l2(x, y, num_classes):
    """The l2 of linear_probe, 1e-6 .. 1e2, that is best on a fixed tenth of the rows; steps of 100, then of 10, then of 3."""
    held, rest = torch.randperm(len(x), generator=torch.Generator().manual_seed(0)).to(x.device).tensor_split([max(1, len(x) // 10)])
    accuracy = {}  # of an exponent; among equals the first tried, hence the strongest of the coarse grid, stays
    for step in (2, 1, .5):
        best = max(accuracy, key=accuracy.get, default=None)
        for exponent in range(2, -7, -2) if best is None else (best + step, best - step):
            W, b = linear_probe(x[rest], y[rest], 10 ** exponent, num_classes)
            accuracy[exponent] = ((x[held] @ W.T + b).argmax(1) == y[held]).double().mean().item()
    return 10 ** max(accuracy, key=accuracy.get)


@full_fp32()
def knn(train, y, test, k=20, temperature=.07):
    """Weighted nearest neighbours (DINO's protocol): train [n, D] with labels y [n], test [m, D] -> predicted labels [m].
    The k highest cosines vote exp(cosine / temperature) each; rows are made unit here. Streams blocks of train."""
    train, test = (F.normalize(at_least_fp32(x), dim=1) for x in (train, test))
    predictions = []
    for rows in test.split(1024):
        top, labels = rows.new_empty(len(rows), 0), y.new_empty(len(rows), 0)
        for block, block_y in zip(train.split(2 ** 16), y.split(2 ** 16)):
            cosines, where = (rows @ block.T).topk(min(k, len(block)), 1)  # [1024, k]
            top, keep = torch.cat([top, cosines], 1).topk(min(k, top.shape[1] + len(block)), 1)
            labels = torch.cat([labels, block_y[where]], 1).gather(1, keep)
        votes = top.new_zeros(len(rows), int(y.max()) + 1)
        predictions.append(votes.scatter_add_(1, labels, ((top - 1) / temperature).exp()).argmax(1))
    return torch.cat(predictions)


# features

class Pictures(torch.utils.data.Dataset):
    """Item i: the picture as uint8 [3, S, S], and i; -1 for one that cannot be read, or for i beyond the last (filling)."""

    def __init__(self, dataset, size):
        self.dataset, self.size = dataset, size

    def __getitem__(self, i):
        try:
            return data.center_crop(self.dataset.image(min(i, len(self.dataset) - 1)), self.size), i if i < len(self.dataset) else -1
        except Exception:
            return torch.zeros(3, self.size, self.size, dtype=torch.uint8), -1


@torch.no_grad()
def encode_images(model, dataset, preprocess, amp=None, batch_size=256, workers=0):
    """Features of all readable pictures, x [n, D] (fp32, not normalised), and where they stand in the data set, index [n].

    dataset: anything with len() and image(i) -> bytes or PIL picture. amp: a dtype for autocast, or None. The model is used
    in the mode that it is in. All ranks call it; rank r encodes pictures r, r + W, ..., and all get all rows, in order."""
    device, rank, world = next(model.parameters()).device, *rank_and_world()
    mine = range(rank, -(-len(dataset) // world) * world, world)  # equally many on all ranks
    loader = torch.utils.data.DataLoader(Pictures(dataset, preprocess.size), batch_size, sampler=mine, num_workers=workers,
                                         pin_memory=device.type == "cuda", generator=torch.Generator())  # leaves the global RNG alone
    x, index = [], []
    for images, i in loader:
        images = preprocess.normalize(images.to(device, non_blocking=True))
        with torch.autocast(device.type, amp, enabled=amp is not None):
            x.append(at_least_fp32(model.encode_image(images)))
        index.append(i)
    x, index = gather_rows(torch.cat(x)), gather_rows(torch.cat(index).to(device))
    order = index.argsort()[(index < 0).sum():]
    return x[order], index[order]


def rank_and_world():
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


def gather_rows(x):
    """Rows of all ranks, equally many on each, without gradient: [n, ...] -> [W*n, ...]."""
    rows = [torch.empty_like(x) for _ in range(rank_and_world()[1])]
    if len(rows) == 1:
        return x
    dist.all_gather(rows, x.contiguous())
    return torch.cat(rows)


@torch.no_grad()
def encode_texts(model, tokenizer, texts, amp=None, batch_size=1024):
    """Texts (list of m str) -> features [m, D], fp32, not normalised. Every batch is cut to its longest text."""
    device, features = next(model.parameters()).device, []
    for start in range(0, len(texts), batch_size):
        tokens = tokenizer(texts[start:start + batch_size])
        tokens = tokens[:, :int(tokens.ne(0).any(0).nonzero().max()) + 1].to(device)  # 0 is padding, an end token never 0
        with torch.autocast(device.type, amp, enabled=amp is not None):
            features.append(at_least_fp32(model.encode_text(tokens)))
    return torch.cat(features)


def text_classifier(model, tokenizer, classnames, templates=TEMPLATES, amp=None):
    """One unit row a class [C, D]: the mean of the unit features of all its prompts, made unit. A class of several names
    writes them "cat|kitten|tomcat"; templates hold "{}" where the name goes. Prompts of all classes go in common batches."""
    prompts = [[t.replace("{}", name.strip()) for name in names.split("|") for t in templates] for names in classnames]
    x = F.normalize(encode_texts(model, tokenizer, sum(prompts, []), amp), dim=1)
    return F.normalize(torch.stack([rows.mean(0) for rows in x.split([len(p) for p in prompts])]), dim=1)
