"""Evaluation of CLIP models: zero-shot classification, retrieval, linear probe, k nearest neighbours.

    python eval.py runs/declip-toy/last.pt --data toy
    python eval.py runs/clip-cc3m/last.pt ViT-B-32.pt --data imagenet/val --json results.json
    python eval.py runs/clip-cc3m/last.pt --data imagenet/val --probe --train imagenet/train
    python eval.py runs/clip-cc3m/last.pt --images cat.jpg --texts "a cat" "a dog"

A model is a checkpoint of these scripts, a file of OpenAI's (TorchScript archive or state dict) or of open_clip's
(state dict or .safetensors). A file that is not ours gets clip.py's classes and OpenAI's merges, mean and standard
deviation. Such a file does not say whether its model was trained with GELU or QuickGELU. The wrong choice lowers the
results by some points, without an error. OpenAI's own files get QuickGELU. For others GELU is assumed and a printed
line says so; --quick-gelu changes that.

A test set is one of
    toy, toy-seen, ...                   drawn by code; data.TOY_TESTS has all names
    cifar10, pets, ...                   torchvision's sets whose class names fit into a prompt; DATASETS lists them all
    a folder with a sub-folder a class   zero-shot; class names from its classnames.txt, else from the sub-folders
    tars with .cls and a classnames.txt  CLIP_benchmark's layout; also retrieval if there are .txt, one caption a line
    other tars, .tsv, .csv or .jsonl     retrieval; table rows that name the same picture give it several captions

Line i of classnames.txt names class i. Sub-folders are counted in the order of their names, or in the order of the
numbers if all names are numbers.

Zero-shot: each class name is written into all prompts. The features of a class's prompts are made unit vectors and
averaged, and the mean is made a unit vector again. A picture's short side is resized to the model's size, and then the
centre is cropped. The eight prompts in TEMPLATES are our own: report a result with them as "own-8". Most published
results use OpenAI's 80 or 7 prompts, which --templates reads from a file. With models trained on CC3M or CC12M, the
bare class name as the only prompt is 1 to 6 points worse.

Retrieval: at most the first five captions of a picture count, as is usual for COCO. Captions get no prompt.

The probe and k-NN use what encode_image returns, as OpenAI's README does. SLIP and the CLIP paper use the tower's
output before its projection, which gives several points more.

Scores are computed in fp32 without TF32. Results are fractions in [0, 1]. Of equal scores the lower index comes first.
"""
import argparse
import importlib.util
import json
import math
import os
import re
import warnings
import zipfile
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F

import data

TEMPLATES = (
    "{}", "a photo of a {}.", "a picture that shows the {}.", "a {} seen from close up.", "a small {} in the distance.",
    "one very large {}.", "a dark and blurry photo of the {}.", "a drawing of a {}.")

# torchvision's class, arguments of its test and of its train split, usual metric, what replaces {} in our prompts ({}
# there is the class name)
DATASETS = {
    "cifar10": ("CIFAR10", dict(train=False), dict(train=True), "top1", "{}"),
    "cifar100": ("CIFAR100", dict(train=False), dict(train=True), "top1", "{}"),
    "stl10": ("STL10", dict(split="test"), dict(split="train"), "top1", "{}"),
    "food101": ("Food101", dict(split="test"), dict(split="train"), "top1", "{}, a kind of food"),
    "pets": ("OxfordIIITPet", dict(split="test"), dict(split="trainval"), "mean_per_class", "{}, a kind of pet"),
    "dtd": ("DTD", dict(split="test"), dict(split="train"), "top1", "{} texture"),
    "aircraft": ("FGVCAircraft", dict(split="test"), dict(split="trainval"), "mean_per_class", "{}, an aircraft"),
}


# metrics: tensors in, fractions out

@contextmanager
def full_fp32():
    """Matrix products in full fp32. TF32 rounds to 10 bits after the point, so different scores could become equal.

    It is used by `with` and as a decorator.
    """
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)


def at_least_fp32(x):
    """x as float32; float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


@full_fp32()
def ranks(queries, candidates, pairs):
    """Rank of each query's best positive among all candidates, by inner product. The best rank is 0.

    queries [n, D], candidates [m, D], pairs [p, 2] of (query, positive candidate) -> int64 [n]. A query that has no
    positive, or a positive with the score NaN, gets rank m.
    """
    queries, candidates = at_least_fp32(queries), at_least_fp32(candidates)
    chunks, column = [], torch.arange(len(candidates), device=queries.device)
    chunk = max(1, 2 ** 25 // len(candidates))
    for start in range(0, len(queries), chunk):
        scores = queries[start:start + chunk] @ candidates.T  # [chunk, m]
        positive = torch.zeros_like(scores, dtype=torch.bool)
        row, positive_column = pairs[(pairs[:, 0] >= start) & (pairs[:, 0] < start + chunk)].T
        positive[row - start, positive_column] = True
        best, where = scores.masked_fill(~positive, -torch.inf).max(1, keepdim=True)
        # Count what beats the best positive: higher scores, and equal scores at a lower index. It is "not <=" rather
        # than ">" because every comparison with NaN is false: so a NaN counts against the query.
        chunks.append((~(scores <= best) | ((scores == best) & (column < where))).sum(1))
    return torch.cat(chunks)


def accuracy(right, y, num_classes):
    """right bool [n], labels y [n] -> dict: top1, mean_per_class, per_class and n.

    per_class is the accuracy of each class, and None for a class that does not occur in y. mean_per_class is the mean
    over the others.
    """
    # a class that does not occur gets 0 / 0, which is NaN
    recall = torch.bincount(y[right], minlength=num_classes).double() / torch.bincount(y, minlength=num_classes)
    return {"top1": right.double().mean().item(), "mean_per_class": recall.nanmean().item(),
            "per_class": [None if math.isnan(r) else r for r in recall.tolist()], "n": len(y)}


def zero_shot(x, y, classifier):
    """Image features x [n, D], labels y [n], text_classifier's rows [C, D] -> what accuracy returns, and top5."""
    rank = ranks(x, classifier, torch.stack([torch.arange(len(y), device=y.device), y], 1))
    return accuracy(rank == 0, y, len(classifier)) | {"top5": (rank < min(5, len(classifier))).double().mean().item()}


def retrieval(image_features, text_features, pairs, ks=(1, 5, 10)):
    """Recall at k, from images to texts and from texts to images.

    image_features [n, D], text_features [m, D]: the rows are taken as given, so give unit rows for cosines.
    pairs [p, 2] of (image, text): an image may have several texts and a text several images.
    Returns {"i2t@1": ..., "t2i@10": ...}: the share of images (texts) that have any of their texts (images) among the k
    largest inner products. An image or text that is in no pair is a candidate, but not a query.
    """
    pairs = torch.as_tensor(pairs, device=image_features.device)
    ways = {"i2t": (image_features, text_features, pairs), "t2i": (text_features, image_features, pairs.flip(1))}
    result = {}
    for way, (queries, candidates, positives) in ways.items():
        rank = ranks(queries, candidates, positives)[positives[:, 0].unique()]
        result |= {f"{way}@{k}": (rank < min(k, len(candidates))).double().mean().item() for k in ks}
    return result


@full_fp32()
@torch.no_grad()
def linear_probe(x, y, l2, num_classes):
    """Multinomial logistic regression: features x [n, D], labels y [n] -> W [C, D], b [C].

    W and b minimise mean cross-entropy(x W^T + b) + l2/2 |W|^2. The bias b is not penalised. This is scikit-learn's
    LogisticRegression(C=1 / (l2 * n)).

    The solver is L-BFGS with a strong Wolfe line search. Matrix products have the precision of x (at least fp32). The
    softmax is float64. With float64 the gradient ends near 1e-9. With fp32 it ends near 1e-6, where rounding stops the
    line search. Rows are read in chunks, because ImageNet's logits are 5 GB. The solver sees rows that are centred and
    scaled, and takes a fifth of the steps. This does not move the optimum: the last line takes scale and centre back.
    """
    x, n = at_least_fp32(x), len(x)
    mean, scale = x.mean(0), (x.var(0, correction=0).mean() + l2) ** -.5
    W = x.new_zeros(num_classes, x.shape[1])
    b = torch.bincount(y, minlength=num_classes).add(.5).log().to(x.dtype)  # nearly the best b for W = 0
    optimizer = torch.optim.LBFGS([W, b], max_iter=1000, history_size=10, tolerance_grad=1e-10,
                                  tolerance_change=torch.finfo(x.dtype).eps ** 2, line_search_fn="strong_wolfe")

    def closure():  # gradients by hand, because autograd does not work under inference_mode
        # W belongs to the scaled rows: scale * W is the W of the docstring, so that is what is penalised
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


@full_fp32()
def predict(x, W, b):
    """Features x [n, D] and linear_probe's W, b -> predicted labels [n]."""
    return (x @ W.T + b).argmax(1)


def best_l2(x, y, num_classes):
    """The l2 with which linear_probe does best on a tenth of the rows, always the same, after training on the others.

    It tries 1e2, 1, 1e-2, 1e-4 and 1e-6, then ten times and a tenth of the best, then about three times and a third of
    the best.
    """
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0)).to(x.device)
    held, rest = order.tensor_split([max(1, len(x) // 10)])
    found = {}  # {log10 of l2: accuracy}; of equal accuracies, max takes the one that was tried first
    for step in (2, 1, .5):
        best = max(found, key=found.get, default=None)
        for exponent in range(2, -7, -2) if best is None else (best + step, best - step):
            W, b = linear_probe(x[rest], y[rest], 10 ** exponent, num_classes)
            found[exponent] = (predict(x[held], W, b) == y[held]).double().mean().item()
    return 10 ** max(found, key=found.get)


@full_fp32()
def knn(train, y, test, k=20, temperature=.07):
    """Weighted nearest neighbours (the protocol of DINO): train [n, D], labels y [n], test [m, D] -> predictions [m].

    The k training rows with the largest cosines vote, each with the weight exp(cosine / temperature). Rows are made
    unit vectors here. The training rows are read in blocks, and the best k so far are kept.
    """
    train, test = (F.normalize(at_least_fp32(x), dim=1) for x in (train, test))
    predictions = []
    for rows in test.split(1024):
        top, labels = rows.new_empty(len(rows), 0), y.new_empty(len(rows), 0)
        for block, block_y in zip(train.split(2 ** 16), y.split(2 ** 16)):
            cosine, where = (rows @ block.T).topk(min(k, len(block)), 1)  # [1024, k]
            top, labels = torch.cat([top, cosine], 1), torch.cat([labels, block_y[where]], 1)
            top, where = top.topk(min(k, top.shape[1]), 1)
            labels = labels.gather(1, where)
        # cosine - 1 in place of the cosine: it scales all votes alike, and no exp can overflow
        votes = top.new_zeros(len(rows), int(y.max()) + 1).scatter_add_(1, labels, ((top - 1) / temperature).exp())
        predictions.append(votes.argmax(1))
    return torch.cat(predictions)


# features

class Pictures(torch.utils.data.Dataset):
    """Item i is picture i, uint8 [3, S, S], and the number i.

    If the picture cannot be read, or i is beyond the end, the item is a picture of zeros, and -1 in place of i.
    """

    def __init__(self, dataset, size):
        self.dataset, self.size = dataset, size

    def __getitem__(self, i):
        try:
            return data.center_crop(self.dataset.image(i), self.size), i if i < len(self.dataset) else -1
        except Exception:
            return torch.zeros(3, self.size, self.size, dtype=torch.uint8), -1


def rank_and_world():
    """Number of this process and how many there are; 0 and 1 without a process group."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


@torch.no_grad()
def encode_images(model, dataset, preprocess, amp=None, batch_size=256, workers=0):
    """Features of the n readable pictures: x [n, D], fp32, not normalised; index [n], their numbers in the data set.

    dataset: anything with len() and image(i) -> bytes, path or PIL picture. amp: dtype of autocast, or None.
    The model is used in the mode it is in. All ranks must call it: rank r of W encodes the pictures r, r + W, ..., and
    every rank gets all rows in the order of the data set.
    """
    device, (rank, world) = next(model.parameters()).device, rank_and_world()
    # rounded up, so that all ranks have equally many; Pictures gives -1 for numbers beyond the end
    mine, rows = range(rank, math.ceil(len(dataset) / world) * world, world), []
    loader = torch.utils.data.DataLoader(
        Pictures(dataset, preprocess.size), batch_size, sampler=mine, num_workers=workers,
        pin_memory=device.type == "cuda", worker_init_fn=data.deaf,
        generator=torch.Generator())  # the loader's own, so that torch's global generator stays as it is
    for images, index in loader:
        with torch.autocast(device.type, amp, enabled=amp is not None):
            x = model.encode_image(preprocess.normalize(images.to(device, non_blocking=True)))
        rows.append((at_least_fp32(x), index.to(device)))
    x, index = map(torch.cat, zip(*rows))
    if world > 1:
        all_x, all_index = ([torch.empty_like(t) for _ in range(world)] for t in (x, index))
        dist.all_gather(all_x, x)
        dist.all_gather(all_index, index)
        x, index = torch.cat(all_x), torch.cat(all_index)
    order = index.argsort()[(index < 0).sum():]  # all -1 sort to the front; the slice leaves them out
    return x[order], index[order]


@torch.no_grad()
def encode_texts(model, tokenizer, texts, amp=None, batch_size=1024):
    """Features [m, D] of m texts, in fp32 and not normalised. Each batch is cut to the length of its longest text."""
    device, rows = next(model.parameters()).device, []
    for start in range(0, len(texts), batch_size):
        tokens = tokenizer(texts[start:start + batch_size])
        tokens = tokens[:, :int(tokens.any(0).nonzero().max()) + 1].to(device)  # padding is 0, an end token is not
        with torch.autocast(device.type, amp, enabled=amp is not None):
            x = model.encode_text(tokens)
        rows.append(at_least_fp32(x))
    return torch.cat(rows)


def class_prompts(classnames, templates=TEMPLATES):
    """For each class the list of its prompts. Arguments: see text_classifier."""
    return [[t.replace("{}", name.strip()) for name in names.split("|") for t in templates] for names in classnames]


def text_classifier(model, tokenizer, classnames, templates=TEMPLATES, amp=None):
    """One unit row a class, [C, D]: the mean of the unit features of its prompts, made a unit vector.

    classnames: one string a class; a class with several names has them all in it, as "cat|kitten". templates: prompts
    with {} where the name goes. Every name of a class is written into every prompt, and all of these count equally.
    """
    prompts = class_prompts(classnames, templates)
    x = F.normalize(encode_texts(model, tokenizer, [p for of_class in prompts for p in of_class], amp), dim=1)
    return F.normalize(torch.stack([rows.mean(0) for rows in x.split([len(of_class) for of_class in prompts])]), dim=1)


# test sets

class Labelled:
    """One of torchvision's data sets with classes. It gets the methods of data.Pairs that evaluate needs."""

    def __init__(self, pictures, classnames=None):
        self.pictures = pictures
        self.classnames = classnames or [name.replace("_", " ") for name in pictures.classes]
        # torchvision's sets keep their labels under one of these three names
        self.labels = next(vars(pictures)[name] for name in ("targets", "labels", "_labels") if name in vars(pictures))

    def __len__(self):
        return len(self.labels)

    def image(self, i):
        return self.pictures[i][0]

    def label(self, i):
        return int(self.labels[i])

    def captions(self, i):
        return []


class CaptionTable:
    """A table of captions as a test set. Rows that name the same file are one picture with several captions."""
    classnames = None

    def __init__(self, table):
        self.table, rows = table, {}
        for row in range(len(table)):
            rows.setdefault(os.path.normpath(table.key(row)), []).append(row)
        self.rows = list(rows.values())  # of each picture: its rows in the table

    def __len__(self):
        return len(self.rows)

    def image(self, i):
        return self.table.image(self.rows[i][0])

    def label(self, i):
        return None

    def captions(self, i):
        """All captions of picture i, each on one line: white space inside a caption becomes single spaces."""
        return [" ".join(text.split()) for row in self.rows[i] for text in self.table.captions(row)]


def read_classnames(path, flag):
    """Names of the classes, one a line. SystemExit, which begins with the flag, if a line names no class."""
    names = data.read_lines(path, flag)
    for number, line in enumerate(names, 1):
        if not all(name.strip() for name in line.split("|")):
            raise SystemExit(f"{flag}: line {number} of {path} has a blank name; line i must name class i")
    if not names:
        raise SystemExit(f"{flag}: {path} is empty; line i must name class i")
    return names


def read_templates(path):
    """The prompts in the file of --templates, one a line; blank lines are ignored. SystemExit if one has no {}."""
    lines = data.read_lines(path, "--templates")
    for number, line in enumerate(lines, 1):
        if line.strip() and "{}" not in line:
            raise SystemExit(f"--templates: line {number} of {path} has no {{}}, the place where the name goes")
    templates = [line for line in lines if line.strip()]
    if not templates:
        raise SystemExit(f"--templates: {path} is empty; each line must be a prompt with {{}} where the name goes")
    return templates


def find_classnames(*folders):
    """The names in the first classnames.txt found in these folders; None if there is none."""
    for folder in folders:
        if (folder / "classnames.txt").is_file():
            return read_classnames(folder / "classnames.txt", "class names")
    return None


def class_folders(folder):
    """torchvision's ImageFolder, except that folders whose names are all numbers come in the order of the numbers.

    torchvision would put 10 before 2. FileNotFoundError if there are no sub-folders.
    """
    import torchvision
    pictures = torchvision.datasets.ImageFolder(folder, loader=str, allow_empty=True)  # str: an item is a path
    if all(name.isdecimal() for name in pictures.classes):
        old, pictures.classes = pictures.classes, sorted(pictures.classes, key=int)
        pictures.class_to_idx = {name: i for i, name in enumerate(pictures.classes)}
        pictures.samples = [(path, pictures.class_to_idx[old[label]]) for path, label in pictures.samples]
        pictures.imgs, pictures.targets = pictures.samples, [label for _, label in pictures.samples]
    return pictures


def open_folder(spec, folder, split, classnames):
    """The set in a folder with one sub-folder a class. SystemExit if its sub-folders cannot be classes."""
    try:
        pictures = class_folders(folder)
    except FileNotFoundError:
        pictures = ()
    if not len(pictures):
        raise SystemExit(f"{spec} holds neither tars nor a sub-folder of pictures for each class")
    folders = pictures.classes
    if hidden := [name for name in folders if name.startswith(".")]:
        raise SystemExit(f"{spec} holds the hidden folder {hidden[0]}, which would be a class; remove it")
    if len(folders) == 1 or {*folders} <= {"train", "val", "test"}:
        raise SystemExit(f"{spec} holds only the sub-folders {', '.join(folders)}, which would be the classes; "
                         "give the folder that holds one sub-folder for each of at least two classes")
    names = classnames or find_classnames(folder)
    if names and len(names) != len(folders):
        raise SystemExit(f"{spec} holds {len(folders)} folders for {len(names)} names: each folder must be a class "
                         "with a name; see --classnames")
    if split == "test" and not names and all(re.fullmatch(r"n\d{8}", name) for name in folders):
        raise SystemExit(f"{spec}: its folders have WordNet's numbers, as ImageNet's do, and no names; put a "
                         "classnames.txt beside them, whose line i names the i-th folder")
    if not names and any("\ud800" <= letter <= "\udfff" for name in folders for letter in name):  # bytes, no UTF-8
        raise SystemExit(f"{spec} holds a folder whose name is not UTF-8: rename it, or put a classnames.txt beside "
                         "the folders, whose line i names the i-th folder")
    return Labelled(pictures, names)


def open_test(spec, split="test", root=None, download=False, classnames=None):
    """The test set `spec` (see the top of the file). SystemExit if there is no such set.

    split: "train" opens the training split of the toy and of torchvision's sets. root: folder of torchvision's files,
    by default $CLIP_DATA, else ./datasets. classnames: list of names in place of those that come with the set.
    """
    if not spec:
        raise SystemExit("a test set without a name: is there a comma too many?")
    if spec in data.TOY_TESTS:
        variant, toy_split = data.TOY_TESTS[spec]
        seed = 1 if split == "train" else 0  # for training: other pictures of the same kinds
        return data.ToyDataset(2048, None, toy_split, seed, variant)
    if spec in DATASETS:
        import torchvision
        name, of_test, of_train, _, _ = DATASETS[spec]
        root = root or os.environ.get("CLIP_DATA") or "datasets"
        arguments = of_train if split == "train" else of_test
        try:
            return Labelled(getattr(torchvision.datasets, name)(root, download=download, **arguments), classnames)
        except Exception as error:
            raise SystemExit(f"{spec} cannot be opened in {root} ({error}); eval.py has --download, and "
                             "--data-root for another folder") from None
    folder = Path(spec).expanduser()
    if any(folder.glob("test/*.tar")):  # CLIP_benchmark's layout
        folder = folder / "test"
    if folder.is_dir() and not any(folder.glob("*.tar")):
        return open_folder(spec, folder, split, classnames)
    paths = data.expand(str(folder))
    if not any(map(os.path.exists, paths)):
        raise SystemExit(f"there is no test set {spec}; give a path, or one of "
                         + ", ".join([*data.TOY_TESTS, *DATASETS]))
    if folder.suffix.lower() in data.TABLES:
        return CaptionTable(data.TableDataset(str(folder), None))
    beside = Path(paths[0]).parent
    names = classnames or find_classnames(beside, beside.parent)
    try:
        tars = data.TarDataset(str(folder), None, require="cls")
    except SystemExit:
        tars = data.TarDataset(str(folder), None)  # captions without classes
    tars.classnames = names
    return tars


def labels_of(dataset, index, names, spec):
    """Classes [n] of the pictures whose numbers are index [n]. SystemExit if a picture has no class, or its class no
    name."""
    y = [dataset.label(i) for i in index.tolist()]
    if not y:
        raise SystemExit(f"{spec}: no readable picture")
    if None in y or max(y) >= len(names or ()):
        raise SystemExit(f"{spec}: a picture has no class, or one that is none of the {len(names or ())} classes with "
                         "a name; see --classnames")
    return torch.tensor(y, device=index.device)


def captions_of(dataset, index):
    """Captions of the pictures whose numbers are index [n], at most the first five of each -> texts, pairs.

    texts: list of the different captions. pairs: list of (place in index, place in texts). A caption with several lines
    counts as several captions.
    """
    texts, pairs = {}, []
    for row, i in enumerate(index.tolist()):
        lines = [line.strip() for text in dataset.captions(i) for line in re.split("[\r\n]", text) if line.strip()]
        pairs += [(row, texts.setdefault(line, len(texts))) for line in lines[:5]]  # a new line is put into texts
    return list(texts), pairs


def phrased(spec, templates):
    """The templates for a test. Only our own get the phrase of one of torchvision's sets; those of --templates are used
    as they are."""
    _, _, _, _, phrase = DATASETS.get(spec, (None, None, None, None, "{}"))
    return [t.replace("{}", phrase) for t in templates] if templates is TEMPLATES else templates


def texts_of(spec, dataset, templates=TEMPLATES, classnames=None):
    """All texts that evaluate encodes for a test: two lists, the prompts of its classes and its captions. They are for
    models whose texts are encoded in advance."""
    names = classnames or dataset.classnames or []
    prompts = [prompt for of_class in class_prompts(names, phrased(spec, templates)) for prompt in of_class]
    return prompts, captions_of(dataset, torch.arange(len(dataset)))[0]


# evaluation

def short_name(spec):
    """The last part of a path that is neither test, val nor a tar: a/cc3m/val gives cc3m."""
    parts = [part for part in Path(spec).parts if part not in ("val", "test") and ".tar" not in part]
    return parts[-1] if parts else spec


def evaluate(model, tokenizer, preprocess, tests, amp=None, workers=0, templates=TEMPLATES, classnames=None,
             probe=False, download=False, neighbors=False, train=None, root=None, batch_size=256):
    """Tests a model on the test sets -> {short name of the test: {metric: value}}.

    A test with class names gets what zero_shot returns. A test with captions gets what retrieval returns. In retrieval,
    the same caption of several pictures is one text that is right for all of them, and at most five captions of a
    picture count. probe adds "probe" and "probe_l2". neighbors adds "knn". "probe" and "knn" are in the usual metric of
    the test. Every test gets "metric" (the name of this metric), "n" (the number of pictures that were read) and
    "unreadable" (the number of pictures that were left out).

    amp: dtype of autocast, or None. train: training sets for probe and neighbors, one for each test. The toy and
    torchvision's sets have their own. classnames: names in place of those that come with the tests.

    All ranks must call it, and all get the same result. Parameters, modes and random state stay as they are. The
    buffers of all ranks become those of rank 0. SystemExit if a test set is missing or lacks what it needs.
    """
    train = train or tests
    without_split = set(tests) - {*data.TOY_TESTS, *DATASETS}  # tests that have no training split of their own
    if (probe or neighbors) and (len(train) != len(tests) or set(train) & without_split):
        raise SystemExit("--probe and --knn need --train: a training set for each test, other than the test itself")
    # all sets are opened first, so that a wrong name is found before an hour of work
    sets = [open_test(spec, "test", root, download, classnames) for spec in tests]
    train_sets = [open_test(spec, "train", root, download) for spec in train if probe or neighbors]
    for a, b in zip(sets, train_sets):
        if isinstance(a, Labelled) and isinstance(b, Labelled) and a.pictures.classes != b.pictures.classes:
            raise SystemExit("--train: its folders are not those of the test, so the numbers of the classes differ")
    results, modes = {}, [(module, module.training) for module in model.modules()]
    if distributed := rank_and_world()[1] > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
    model.eval()
    try:
        with torch.inference_mode():
            for number, (spec, dataset) in enumerate(zip(tests, sets)):
                _, _, _, metric, _ = DATASETS.get(spec, (None, None, None, "top1", None))
                x, index = encode_images(model, dataset, preprocess, amp, batch_size, workers)
                unit, (texts, pairs) = F.normalize(x, dim=1), captions_of(dataset, index)
                names = classnames or dataset.classnames
                if not names and not texts:
                    raise SystemExit(f"{spec}: no picture with a caption, no class names; see --classnames")
                result = {"metric": metric if names else "i2t@1", "n": len(x), "unreadable": len(dataset) - len(x)}
                if names:
                    y = labels_of(dataset, index, names, spec)
                    classifier = text_classifier(model, tokenizer, names, phrased(spec, templates), amp)
                    result |= zero_shot(unit, y, classifier)
                if texts:
                    result |= retrieval(unit, F.normalize(encode_texts(model, tokenizer, texts, amp), dim=1), pairs)
                if probe or neighbors:
                    train_x, index = encode_images(model, train_sets[number], preprocess, amp, batch_size, workers)
                    train_y = labels_of(train_sets[number], index, names, train[number])
                if neighbors:
                    result["knn"] = accuracy(knn(train_x, train_y, x) == y, y, len(names))[metric]
                if probe:
                    result["probe_l2"] = best_l2(train_x, train_y, len(names))
                    W, b = linear_probe(train_x, train_y, result["probe_l2"], len(names))
                    result["probe"] = accuracy(predict(x, W, b) == y, y, len(names))[metric]
                name = short_name(spec)
                results[spec if name in results else name] = result
    finally:
        for module, training in modes:
            module.training = training
    if distributed:
        box = [results]
        dist.broadcast_object_list(box, 0)
        results = box[0]
    return results


def summary(results):
    """One line a test, in per cent, with the usual metric first."""
    lines = []
    for test, r in results.items():
        keys = [key for key in (r["metric"], "top1", "mean_per_class", "top5", "knn", "probe") if key in r]
        keys += [key for key in r if "@" in key]
        values = ", ".join(f"{key} {100 * r[key]:.1f}" for key in dict.fromkeys(keys))
        lines.append(f"{test}: {values} ({r['n']} pictures, {r['unreadable']} unreadable)")
    return "\n".join(lines)


# a trained model

# first parts of the names of the towers' parameters in OpenAI's and open_clip's files, where dots separate the parts
ENCODERS = ("visual", "transformer", "token_embedding", "positional_embedding", "ln_final", "text_projection",
            "logit_scale")
PARTS = {*ENCODERS, *(  # all parts of these names, except for numbers
    "resblocks ln_1 ln_2 ln_pre ln_post attn in_proj_weight in_proj_bias out_proj mlp c_fc c_proj weight bias proj "
    "class_embedding conv1 conv2 conv3 bn1 bn2 bn3 running_mean running_var num_batches_tracked layer1 layer2 layer3 "
    "layer4 downsample attnpool q_proj k_proj v_proj").split()}
# parts that the following put in front of or between these, and that are left out
WRAPPERS = {"module", "_orig_mod", "text",  # DDP, torch.compile, open_clip's CustomTextCLIP,
            "_image_encoder", "_text_encoder", "_logit_scale"}  # TinyCLIP's released files


def read_safetensors(path):
    """{name: tensor} of a .safetensors file: 8 bytes with the length of the header, the header in JSON, the tensors."""
    content = bytearray(Path(path).read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    dtypes = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
              "I64": torch.int64}
    state = {}
    for name, entry in json.loads(content[8:start]).items():
        if name != "__metadata__":
            tensor = torch.frombuffer(content, dtype=dtypes[entry["dtype"]], count=math.prod(entry["shape"]),
                                      offset=start + entry["data_offsets"][0])
            state[name] = tensor.view(entry["shape"])
    return state


def read_torchscript(path):
    """{name: tensor} of a TorchScript archive such as OpenAI's.

    Such an archive may hold code, and torch.jit.load does not keep it out. This is the only kind of file that is not
    read as data only; torch.load is always called with weights_only=True.
    """
    if not hasattr(getattr(torch, "jit", None), "load"):
        raise SystemExit(f"{path} is a TorchScript archive, which torch {torch.__version__} no longer reads; take its "
                         "state dict, saved by an older torch, or open_clip's .safetensors of the same weights")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch 2.14 calls torch.jit.load deprecated
        return torch.jit.load(path, map_location="cpu").state_dict()


def is_torchscript(path):
    """Whether a file is a TorchScript archive."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as file:
        return any(name.endswith("/constants.pkl") for name in file.namelist())


def read_checkpoint(path):
    """What a file of weights holds, on the CPU, as a dict like the checkpoints of these scripts.

    "model" is {name: tensor}, with the names that the file has. For a checkpoint of these scripts the dict also has
    "script", "sizes", "merges" and more. For OpenAI's files it also has "sizes" = {"quick_gelu": True}. SystemExit for
    any other kind of file.
    """
    if not os.path.isfile(path):
        raise SystemExit(f"there is no checkpoint {path}")
    try:
        archive = is_torchscript(path)
        if archive:
            content = read_torchscript(path)
        elif str(path).endswith(".safetensors"):
            content = read_safetensors(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
        if "script" in content and "model" in content:
            return content
        state = content.get("model", content.get("state_dict", content))
        state = {name: tensor for name, tensor in state.items() if isinstance(tensor, torch.Tensor)}
    except Exception as error:
        raise SystemExit(f"{path} is no whole file of CLIP weights: neither a checkpoint of these scripts nor an "
                         "archive, state dict or .safetensors of OpenAI's or open_clip's "
                         f"({type(error).__name__})") from None
    if archive or "input_resolution" in state:  # one of three numbers that OpenAI keeps beside the weights
        return {"model": state, "sizes": {"quick_gelu": True}}
    return {"model": state}


def read_merges(checkpoint):
    """List of the pairs that a checkpoint stores as the merges of its tokenizer."""
    return [tuple(line.split(" ")) for line in checkpoint["merges"].split("\n") if line]


def tower_state(path, checkpoint):
    """The towers' weights, {open_clip's name: fp32 tensor}, from what read_checkpoint returned for the file `path`.

    SystemExit if the towers are not OpenAI's kind.
    """
    state, found = {}, checkpoint["model"]
    for name, tensor in found.items():
        parts = [part for part in name.split(".") if part not in WRAPPERS]
        # all that stands under "text" is kept, so that a name which is no part of our towers is found below, as odd
        if parts[0] in ENCODERS or ("text" in name.split(".") and parts[0] != "attn_mask"):
            state[".".join(parts)] = tensor.float() if tensor.is_floating_point() else tensor
    wanted = ["visual.conv1.weight", "token_embedding.weight", "positional_embedding", "text_projection", "logit_scale",
              "visual.attnpool.positional_embedding" if "visual.layer1.0.conv1.weight" in state else "visual.proj"]
    missing = [name for name in wanted if name not in state]
    odd = [name for name in state if not all(part.isdecimal() or part in PARTS for part in name.split("."))]
    if odd or missing:
        has = next(iter(odd or found), "no tensor")
        raise SystemExit(f"{path} holds no CLIP with OpenAI's towers under OpenAI's or open_clip's names: it has {has}"
                         f"{', but no ' + missing[0] if missing else ''}. Towers of timm, SigLIP, CoCa or transformers "
                         "cannot be loaded")
    if "script" not in checkpoint and "visual.proj" in state and len(state["visual.conv1.weight"]) > 1024:
        raise SystemExit(f"{path}: its image tower is {len(state['visual.conv1.weight'])} wide. Towers wider than 1024 "
                         "(ViT-H, ViT-g, ViT-bigG) have attention heads of another size than 64 and cannot be loaded")
    if state["logit_scale"].numel() == 1:  # some files store it as [1]
        state["logit_scale"] = state["logit_scale"].reshape(())
    if "merges" in checkpoint:  # rows beyond the vocabulary, such as DeCLIP's mask token, are no part of the towers
        vocabulary = data.Tokenizer(read_merges(checkpoint)).vocab_size
        state["token_embedding.weight"] = state["token_embedding.weight"][:vocabulary]
    return state


def load_clip_state(path, quick_gelu=None, merges=None):
    """The towers' weights {open_clip's name: fp32 tensor}, to start a training from or to distil.

    path: a checkpoint of these scripts, OpenAI's TorchScript archive or state dict, open_clip's state dict or
    .safetensors, or a released file of TinyCLIP's. The names may bear the prefixes of DDP, torch.compile and
    CustomTextCLIP. quick_gelu: the activation of the model that gets the weights. merges: those of its tokenizer, as
    one string with one pair a line. Each of the two must agree with the file, unless it is None or the file does not
    say. SystemExit if one of them does not agree, if the file is of another kind, or if it holds other towers (timm's,
    SigLIP's, CoCa's).
    """
    checkpoint = read_checkpoint(path)
    state = tower_state(path, checkpoint)
    trained_with = checkpoint.get("sizes", {}).get("quick_gelu")
    if None not in (trained_with, quick_gelu) and trained_with != quick_gelu:
        how = "with --quick-gelu: give it" if trained_with else "without --quick-gelu: leave it out"
        raise SystemExit(f"{path} was trained {how}")
    if None not in (checkpoint.get("merges"), merges) and checkpoint["merges"] != merges:
        raise SystemExit(f"{path} was trained with other merges of the tokenizer: see --bpe")
    return state


def image_size(state):
    """Side in pixels of the pictures for which a state of load_clip_state was trained."""
    if "visual.proj" in state:
        return math.isqrt(len(state["visual.positional_embedding"]) - 1) * state["visual.conv1.weight"].shape[-1]
    return math.isqrt(len(state["visual.attnpool.positional_embedding"]) - 1) * 32


def import_script(script, path):
    """The module of a script beside this file, which the checkpoint at path needs. SystemExit if there is none."""
    file = Path(__file__).resolve().parent / f"{script}.py"
    found = re.fullmatch("[a-z]+", script) and file.is_file() and importlib.util.find_spec(script)  # not yet run
    if not found or Path(found.origin).resolve() != file:
        raise SystemExit(f"{path} needs the script {script!r}, and the module of that name is not one beside eval.py")
    return importlib.import_module(script)


def load(path, device="cpu", weights="model", quick_gelu=None, bpe=None):
    """A file of weights -> model in eval mode, tokenizer, preprocess (data.Preprocess).

    path: a checkpoint of these scripts, OpenAI's TorchScript archive or state dict, or open_clip's state dict or
    .safetensors. A checkpoint of ours gets the classes of its script, which must be a file beside this one. Another
    file gets clip.py's classes, OpenAI's merges, mean and standard deviation. weights: "model", or "ema", an average
    of the weights that some scripts keep. quick_gelu and bpe are for files that do not say what they need. quick_gelu:
    whether the model has QuickGELU. If it is None, GELU is assumed, and a printed line says so. bpe: the path of the
    merges, if they are not OpenAI's. SystemExit if the file is none of these.
    """
    checkpoint = read_checkpoint(path)
    if "script" not in checkpoint:
        if weights != "model":
            raise SystemExit(f"{path} is no checkpoint of these scripts, so it has no {weights!r}: see --weights")
        return load_foreign(path, checkpoint, device, quick_gelu, bpe)
    if missing := {weights, "sizes", "preprocess", "merges", "context"} - set(checkpoint):
        raise SystemExit(f"{path} is a checkpoint without {', '.join(sorted(missing))}: see --weights")
    script = str(checkpoint["script"])
    module = import_script(script, path)
    cls = next((c for name, c in vars(module).items() if name.lower() == script and isinstance(c, type)), None)
    if cls is None:
        raise SystemExit(f"{path}: there is no model in {script}.py")
    if hasattr(cls, "restore"):  # a model that brings its own tokenizer, such as a table of texts encoded in advance
        model, tokenizer = cls.restore(checkpoint[weights], checkpoint["sizes"], Path(path).parent)
    else:
        model = module.build(checkpoint[weights], cls, **checkpoint["sizes"])
        tokenizer = data.Tokenizer(read_merges(checkpoint), checkpoint["context"])
    return model.to(device).eval(), tokenizer, data.Preprocess(**checkpoint["preprocess"])


def load_foreign(path, checkpoint, device, quick_gelu, bpe):
    """What load returns for a file of OpenAI's or open_clip's. checkpoint: what read_checkpoint returned for it."""
    state = tower_state(path, checkpoint)
    quick_gelu = checkpoint.get("sizes", {}).get("quick_gelu", quick_gelu)
    if quick_gelu is None:
        quick_gelu = False
        print(f"{path} does not say which activation it was trained with. GELU is assumed; --quick-gelu (in Python "
              "quick_gelu=True) takes QuickGELU, --no-quick-gelu silences this line")
    module = import_script("clip", path)
    try:
        model = module.build(state, module.CLIP, quick_gelu=quick_gelu)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise SystemExit(f"{path}: its weights do not make one of clip.py's models ({reason})") from None
    if bpe == "train":
        raise SystemExit(f"{path} was trained with merges that cannot be made anew: --bpe must name their file")
    tokenizer = data.find_tokenizer(bpe, "")
    tokenizer.context = len(state["positional_embedding"])
    if len(state["token_embedding.weight"]) != tokenizer.vocab_size:
        raise SystemExit(f"{path} has {len(state['token_embedding.weight'])} tokens and the merges make "
                         f"{tokenizer.vocab_size}; name the file of the merges that it was trained with by --bpe")
    return model.to(device).eval(), tokenizer, data.Preprocess(image_size(state))


def rank_texts(model, tokenizer, preprocess, images, texts):
    """Prints for each picture (a path) the texts with their probabilities, the likeliest first."""
    for path in images:
        try:
            image = preprocess(path)[None].to(model.logit_scale.device)
        except Exception as error:
            raise SystemExit(f"--images: {path} cannot be read ({error})") from None
        with torch.no_grad():
            x, t = F.normalize(model.encode_image(image)), F.normalize(encode_texts(model, tokenizer, texts))
            p = (model.logit_scale.exp() * x @ t.T).softmax(1)[0]
        print(path, *(f"{100 * p[i]:6.1f} %  {texts[i]}" for i in p.argsort(descending=True)), sep="\n")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("checkpoint", nargs="+", help="last.pt or best.pt of a run, or a file of OpenAI's or open_clip's")
    add("--weights", choices=("model", "ema"), default="model", help="ema: the average, where a script keeps one")
    add("--quick-gelu", action=argparse.BooleanOptionalAction,
        help="the activation of files that do not name theirs (default: GELU, and a line that says so)")
    add("--bpe", metavar="FILE", help="merges of files that do not hold theirs (default: $CLIP_BPE, else OpenAI's)")
    add("--data", metavar="TESTS", help="comma list of test sets: paths, or " + ", ".join([*data.TOY_TESTS, *DATASETS]))
    add("--data-root", metavar="DIR", help="folder of torchvision's files (default $CLIP_DATA or ./datasets)")
    add("--download", action="store_true", help="let torchvision download what is missing")
    add("--classnames", metavar="FILE", help="names of the classes, a line each; two names of one class as cat|kitten")
    add("--templates", metavar="FILE", help="prompts, a line each, with {} for the name (such as OpenAI's 80)")
    add("--probe", action="store_true", help="also a linear probe, its l2 chosen on a tenth of the training set")
    add("--knn", action="store_true", help="also the vote of the 20 nearest neighbours in the training set")
    add("--train", metavar="SETS", help="the training set of each test, a comma list (not for toy and torchvision's)")
    add("--json", metavar="FILE", help="write all results, accuracies by class included; by file if there are several")
    add("--images", nargs="+", metavar="IMAGE", help="rank the --texts for each of these pictures")
    add("--texts", nargs="+", metavar="TEXT")
    add("--batch-size", type=int, default=256)
    add("--workers", type=int, default=min(8, data.cores()))
    add("--amp", choices=("bf16", "fp16", "off"), help="default: bf16 where the GPU has it, else off")
    args = parser.parse_args(argv)
    if not args.data and not (args.images and args.texts):
        parser.error("give --data, or --images and --texts")
    templates = read_templates(args.templates) if args.templates else TEMPLATES
    classnames = read_classnames(args.classnames, "--classnames") if args.classnames else None
    if args.json and (Path(args.json).is_dir() or not Path(args.json).resolve().parent.is_dir()):
        raise SystemExit(f"--json {args.json} cannot be written: it is a folder, or its folder does not exist")
    if args.batch_size < 1 or args.workers < 0:
        raise SystemExit("--batch-size must be at least 1, --workers at least 0")
    for path in args.checkpoint:  # all of them, before the first one takes an hour
        if not os.path.isfile(path):
            raise SystemExit(f"there is no checkpoint {path}")
    cuda = torch.cuda.is_available()
    amp = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[
        args.amp or ("bf16" if cuda and torch.cuda.is_bf16_supported(including_emulation=False) else "off")]
    tests, train = (names and names.split(",") for names in (args.data, args.train))
    several, results = len(args.checkpoint) > 1, {}
    for path in args.checkpoint:
        model, tokenizer, preprocess = load(
            path, "cuda" if cuda else "cpu", args.weights, args.quick_gelu, args.bpe)
        if args.data:
            results[path] = evaluate(model, tokenizer, preprocess, tests, amp, args.workers, templates, classnames,
                                     args.probe, args.download, args.knn, train, args.data_root, args.batch_size)
            for line in summary(results[path]).splitlines():
                print(f"{path}: {line}" if several else line)
            if args.json:
                Path(args.json).write_text(json.dumps(results if several else results[path], indent=1))
        if args.images:
            if several:
                print(f"{path}:")
            rank_texts(model, tokenizer, preprocess, args.images, args.texts)


if __name__ == "__main__":
    main()
