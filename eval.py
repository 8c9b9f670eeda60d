"""Evaluation of a trained CLIP: zero-shot classification, retrieval, linear probe, k-nearest neighbours.

    python eval.py runs/declip-toy/last.pt --data toy
    python eval.py runs/clip-cc3m/last.pt --data imagenet/val --probe --train imagenet/train --json results.json
    python eval.py runs/clip-cc3m/last.pt --images cat.jpg --texts "a cat" "a dog"

A test set is one of
    toy, cifar10, ... (see DATASETS)        drawn by code; torchvision's sets whose class names are usable
    a folder with one sub-folder a class    named by its classnames.txt (line i: i-th folder in order), else by them
    tars with .cls and a classnames.txt     CLIP_benchmark's layout; retrieval too where there is .txt, a caption a line
    tars, .tsv, .csv, .jsonl of captions    retrieval only

Protocol. The row of a class is the mean of the unit features of its prompts, made unit again. A picture's short side
is resized, its centre cropped. TEMPLATES are our own: say "own-8" beside a number. Published ones mostly use OpenAI's
80 or 7, which --templates takes from a file; the bare name costs 1 to 6 points on CC data. Probe and k-NN read what
encode_image returns, as OpenAI's README does (SLIP and the CLIP paper read the tower before its projection: several
points more). Scores are fp32 without TF32, results fractions in [0, 1]; ties go to the lower index.
"""
import argparse
import importlib.util
import json
import os
import re
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F

import data

TEMPLATES = (
    "{}", "a photo of a {}.", "a picture that shows the {}.", "a {} seen from close up.", "a small {} in the distance.",
    "one very large {}.", "a dark and blurry photo of the {}.", "a drawing of a {}.")

DATASETS = {  # torchvision's class, arguments of its test and its train split, usual metric, what the names are
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
    """Matrix products without TF32, which rounds to 10 bits and so makes ties. Used as a decorator."""
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
    """Place (from 0) of the best positive of each query among all candidates, by inner product: queries [n, D],
    candidates [m, D], pairs [p, 2] of (query, candidate) -> int64 [n]; m without a positive or for a NaN."""
    queries, candidates = at_least_fp32(queries), at_least_fp32(candidates)
    places, column = [], torch.arange(len(candidates), device=queries.device)
    chunk = max(1, 2 ** 25 // len(candidates))
    for start in range(0, len(queries), chunk):
        scores = queries[start:start + chunk] @ candidates.T  # [chunk, m]
        positive = torch.zeros_like(scores, dtype=torch.bool)
        row, positive_column = pairs[(pairs[:, 0] >= start) & (pairs[:, 0] < start + chunk)].T
        positive[row - start, positive_column] = True
        best, where = scores.masked_fill(~positive, -torch.inf).max(1, keepdim=True)
        places.append((~(scores <= best) | (scores == best) & (column < where)).sum(1))
    return torch.cat(places)


def accuracy(right, y, num_classes):
    """right bool [n], labels y [n] -> top1, mean_per_class (of classes that occur), per_class (None: not in y), n."""
    recall = torch.bincount(y[right], minlength=num_classes).double() / torch.bincount(y, minlength=num_classes)
    return {"top1": right.double().mean().item(), "mean_per_class": recall.nanmean().item(),
            "per_class": [None if r != r else r for r in recall.tolist()], "n": len(y)}


def zero_shot(x, y, classifier):
    """Image features x [n, D], labels y [n], text_classifier's rows [C, D] -> what accuracy returns, and top5."""
    place = ranks(x, classifier, torch.stack([torch.arange(len(y), device=y.device), y], 1))
    return accuracy(place == 0, y, len(classifier)) | {"top5": (place < min(5, len(classifier))).double().mean().item()}


def retrieval(image_features, text_features, pairs, ks=(1, 5, 10)):
    """Recall both ways: image_features [n, D], text_features [m, D], pairs [p, 2] of (image, text), any number for each
    -> {"i2t@1": ..., "t2i@10": ...}: the share of images (texts) with any of their texts (images) among the k largest
    inner products. Rows are taken as given: unit rows for cosines. One in no pair is a candidate, not a query."""
    x, t, result = image_features, text_features, {}
    pairs = torch.as_tensor(pairs, device=x.device)
    for way, queries, candidates, positives in (("i2t", x, t, pairs), ("t2i", t, x, pairs.flip(1))):
        place = ranks(queries, candidates, positives)[positives[:, 0].unique()]
        result |= {f"{way}@{k}": (place < min(k, len(candidates))).double().mean().item() for k in ks}
    return result


@full_fp32()
@torch.no_grad()
def linear_probe(x, y, l2, num_classes):
    """Multinomial logistic regression: features x [n, D], labels y [n] -> W [C, D], b [C], the minimum of
    mean cross-entropy(x W^T + b) + l2/2 |W|^2 with b free, which is scikit-learn's LogisticRegression(C=1 / (l2 * n)).

    L-BFGS with strong Wolfe line search, matrix products in x's precision (at least fp32), softmax in float64. float64
    ends at gradients near 1e-9, fp32 where rounding stops the line search, near 1e-6. Rows come in chunks (ImageNet's
    logits are 5 GB), centred, which b absorbs, and scaled, which l2 absorbs: same optimum, a fifth of the work."""
    x, n = at_least_fp32(x), len(x)
    mean, scale = x.mean(0), (x.var(0, correction=0).mean() + l2) ** -.5
    W = x.new_zeros(num_classes, x.shape[1])
    b = torch.bincount(y, minlength=num_classes).add(.5).log().to(x.dtype)  # the answer for W = 0
    optimizer = torch.optim.LBFGS([W, b], max_iter=1000, history_size=10, tolerance_grad=1e-10,
                                  tolerance_change=torch.finfo(x.dtype).eps ** 2, line_search_fn="strong_wolfe")

    def closure():  # gradients by hand: autograd is not there under inference_mode
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
    """The l2 for linear_probe that does best on a fixed tenth of the rows: of 1e2, 1, .. 1e-6, then steps of 10, 3."""
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0)).to(x.device)
    held, rest = order.tensor_split([max(1, len(x) // 10)])
    found = {}  # {log10 of l2: accuracy}; of equals the one tried first, the stronger, counts
    for step in (2, 1, .5):
        best = max(found, key=found.get, default=None)
        for exponent in range(2, -7, -2) if best is None else (best + step, best - step):
            W, b = linear_probe(x[rest], y[rest], 10 ** exponent, num_classes)
            found[exponent] = (predict(x[held], W, b) == y[held]).double().mean().item()
    return 10 ** max(found, key=found.get)


@full_fp32()
def knn(train, y, test, k=20, temperature=.07):
    """Weighted nearest neighbours, DINO's protocol: train [n, D] with labels y [n], test [m, D] -> predictions [m].
    The k largest cosines vote with exp(cosine / temperature). Rows are made unit here; train is streamed in blocks."""
    train, test = (F.normalize(at_least_fp32(x), dim=1) for x in (train, test))
    predictions = []
    for rows in test.split(1024):
        top, labels = rows.new_empty(len(rows), 0), y.new_empty(len(rows), 0)
        for block, block_y in zip(train.split(2 ** 16), y.split(2 ** 16)):
            cosine, where = (rows @ block.T).topk(min(k, len(block)), 1)  # [1024, k]
            top, labels = torch.cat([top, cosine], 1), torch.cat([labels, block_y[where]], 1)
            top, where = top.topk(min(k, top.shape[1]), 1)
            labels = labels.gather(1, where)
        votes = top.new_zeros(len(rows), int(y.max()) + 1).scatter_add_(1, labels, ((top - 1) / temperature).exp())
        predictions.append(votes.argmax(1))
    return torch.cat(predictions)


# features

class Pictures(torch.utils.data.Dataset):
    """Item i: the picture, uint8 [3, S, S], and i; or zeros and -1 if it cannot be read or i is beyond the end."""

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
    """Features of the readable pictures x [n, D], fp32, not normalised, and their places in the data set, index [n].

    dataset: anything with len() and image(i) -> bytes, path or PIL picture. amp: dtype of autocast, or None. The model
    is used in the mode it is in. Every rank calls it: rank r encodes r, r + W, ..., and all get all rows, in order."""
    device, (rank, world) = next(model.parameters()).device, rank_and_world()
    mine, rows = range(rank, -(-len(dataset) // world) * world, world), []  # equally many on all ranks
    loader = torch.utils.data.DataLoader(
        Pictures(dataset, preprocess.size), batch_size, sampler=mine, num_workers=workers,
        pin_memory=device.type == "cuda", worker_init_fn=data.deaf,
        generator=torch.Generator())  # its own, so that the global one stays as it is
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
    order = index.argsort()[(index < 0).sum():]
    return x[order], index[order]


@torch.no_grad()
def encode_texts(model, tokenizer, texts, amp=None, batch_size=1024):
    """Features [m, D] of m texts, fp32, not normalised. A batch is cut to its longest text."""
    device, rows = next(model.parameters()).device, []
    for start in range(0, len(texts), batch_size):
        tokens = tokenizer(texts[start:start + batch_size])
        tokens = tokens[:, :int(tokens.any(0).nonzero().max()) + 1].to(device)  # padding is 0, an end token never
        with torch.autocast(device.type, amp, enabled=amp is not None):
            x = model.encode_text(tokens)
        rows.append(at_least_fp32(x))
    return torch.cat(rows)


def text_classifier(model, tokenizer, classnames, templates=TEMPLATES, amp=None):
    """Unit rows [C, D], one a class: mean of the unit features of its prompts, made unit. A class of several names
    writes them "cat|kitten"; a template holds {} where the name goes. Prompts of many classes share a batch."""
    prompts = [[t.replace("{}", name.strip()) for name in names.split("|") for t in templates] for names in classnames]
    x = F.normalize(encode_texts(model, tokenizer, [p for of_class in prompts for p in of_class], amp), dim=1)
    return F.normalize(torch.stack([rows.mean(0) for rows in x.split([len(of_class) for of_class in prompts])]), dim=1)


# test sets

class Labelled:
    """A torchvision data set of pictures with classes, read as those of data.py are."""

    def __init__(self, pictures, classnames=None):
        self.pictures = pictures
        self.classnames = classnames or [name.replace("_", " ") for name in pictures.classes]
        self.labels = next(vars(pictures)[name] for name in ("targets", "labels", "_labels") if name in vars(pictures))

    def __len__(self):
        return len(self.labels)

    def image(self, i):
        return self.pictures[i][0]

    def label(self, i):
        return int(self.labels[i])

    def captions(self, i):
        return []


def read_lines(path):
    """Lines of a text file without blank ones at its end; None if there is no such file."""
    return Path(path).read_text("utf-8", "replace").rstrip().splitlines() if os.path.isfile(path) else None


def open_test(spec, split="test", root=None, download=False, classnames=None):
    """The test set `spec` (see the top of the file); split="train": the training split of toy and of torchvision's.
    root: folder of torchvision's files (else $CLIP_DATA, else ./datasets); classnames: in place of the folders' names.
    SystemExit if there is no such set."""
    if not spec:
        raise SystemExit("a test set without a name: is there a comma too many?")
    if spec in data.TOY_TESTS:
        variant, kinds = data.TOY_TESTS[spec]
        return data.ToyDataset(2048, None, kinds, int(split == "train"), variant)  # train: others of the same kinds
    if spec in DATASETS:
        import torchvision
        (name, *arguments), root = DATASETS[spec], root or os.environ.get("CLIP_DATA") or "datasets"
        try:
            return Labelled(getattr(torchvision.datasets, name)(root, download=download, **arguments[split == "train"]))
        except Exception as error:
            raise SystemExit(f"{spec} cannot be opened in {root} ({error}); eval.py has --download, and "
                             "--data-root for another folder") from None
    folder = Path(spec).expanduser()
    if any(folder.glob("test/*.tar")):  # CLIP_benchmark's
        folder = folder / "test"
    if folder.is_dir() and not any(folder.glob("*.tar")):
        import torchvision
        try:
            pictures = torchvision.datasets.ImageFolder(folder, loader=str, allow_empty=True)
        except FileNotFoundError:
            pictures = ()
        if not len(pictures):
            raise SystemExit(f"{spec} holds neither tars nor a sub-folder of pictures for each class")
        names = classnames or read_lines(folder / "classnames.txt")
        if names and len(names) != len(pictures.classes) or any(name.startswith(".") for name in pictures.classes):
            raise SystemExit(f"{spec} holds {len(pictures.classes)} folders, hidden ones too, for {len(names or ())} names: each must be "
                             "a class, see --classnames")
        if split == "test" and not names and all(re.fullmatch(r"n\d{8}", name) for name in pictures.classes):
            raise SystemExit(f"{spec}: its folders have WordNet's numbers, as ImageNet's, and no names: put a classnames.txt beside "
                             "them, whose line i names the i-th folder")
        return Labelled(pictures, names)
    if not any(map(os.path.exists, data.expand(str(folder)))):
        raise SystemExit(f"there is no test set {spec}; give a path, or one of toy, {', '.join(DATASETS)}")
    if folder.suffix in (".tsv", ".csv", ".jsonl"):
        return data.TableDataset(str(folder), None)
    try:
        tars = data.TarDataset(str(folder), None, require="cls")
    except SystemExit:
        tars = data.TarDataset(str(folder), None)  # captions without classes
    tars.classnames = tars.classnames or read_lines(Path(tars.paths[0]).parent.parent / "classnames.txt")
    return tars


def labels_of(dataset, index, names, spec):
    """Classes [n] of the pictures index [n]; SystemExit if one has none, or one that no name belongs to."""
    y = [dataset.label(i) for i in index.tolist()]
    if not y or None in y or max(y) >= len(names or ()):
        raise SystemExit(f"{spec}: no readable picture, or one whose class is none of the {len(names or ())} that have "
                         "names; see --classnames")
    return torch.tensor(y, device=index.device)


def captions_of(dataset, index):
    """The different captions of the pictures index [n], up to five a picture, and pairs [(row of index, caption)]."""
    texts, pairs = {}, []
    for row, i in enumerate(index.tolist()):
        lines = [line.strip() for text in dataset.captions(i) for line in text.splitlines() if line.strip()]
        pairs += [(row, texts.setdefault(line, len(texts))) for line in lines[:5]]
    return list(texts), pairs


# evaluation

def evaluate(model, tokenizer, preprocess, tests, amp=None, workers=0, templates=TEMPLATES, classnames=None,
             probe=False, download=False, neighbors=False, train=None, root=None, batch_size=256):
    """Tests a model on the test sets -> {short name of the test: {metric: value}}. All ranks call it and get the same.

    With class names: what zero_shot returns; with captions: what retrieval does, where equal captions are one text of
    all its pictures; with probe: probe and its probe_l2; with neighbors: knn, both in the usual metric. Always metric
    (the name of the usual one), n pictures, and the number of unreadable ones, which are left out. amp: dtype of
    autocast, or None. train: training sets, one a test, for probe and neighbors (toy and torchvision's have their own).
    Leaves parameters, modes and random state as they are; buffers of all ranks become rank 0's. SystemExit if a test is
    not there or cannot be done with what it has."""
    train = train or tests
    if (probe or neighbors) and (len(train) != len(tests) or set(train) & set(tests) - {*data.TOY_TESTS, *DATASETS}):
        raise SystemExit("--probe and --knn need --train: a training set for each test, other than the test itself")
    sets = [open_test(spec, "test", root, download, classnames) for spec in tests]  # all at once: a wrong name is to cost no hour
    train_sets = [open_test(spec, "train", root, download) for spec in train if probe or neighbors]
    for a, b in zip(sets, train_sets):
        if isinstance(a, Labelled) and isinstance(b, Labelled) and a.pictures.classes != b.pictures.classes:
            raise SystemExit("--train: its folders are not those of the test, so the numbers of the classes differ")
    box, modes = [{}], [(module, module.training) for module in model.modules()]
    if distributed := rank_and_world()[1] > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
    model.eval()
    try:
        with torch.inference_mode():
            for number, (spec, dataset) in enumerate(zip(tests, sets)):
                *_, metric, phrase = DATASETS.get(spec, ("top1", "{}"))
                x, index = encode_images(model, dataset, preprocess, amp, batch_size, workers)
                unit, (texts, pairs) = F.normalize(x, dim=1), captions_of(dataset, index)
                names = classnames or dataset.classnames
                if not names and not texts:
                    raise SystemExit(f"{spec}: no picture with a caption, no class names; see --classnames")
                result = {"metric": metric if names else "i2t@1", "n": len(x), "unreadable": len(dataset) - len(x)}
                if names:
                    y = labels_of(dataset, index, names, spec)
                    prompts = [t.replace("{}", phrase) for t in templates] if templates is TEMPLATES else templates
                    result |= zero_shot(unit, y, text_classifier(model, tokenizer, names, prompts, amp))
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
                *_, name = spec, *(p for p in Path(spec).parts if p not in ("val", "test") and ".tar" not in p)
                box[0][spec if name in box[0] else name] = result
    finally:
        for module, training in modes:
            module.training = training
    if distributed:
        dist.broadcast_object_list(box, 0)
    return box[0]


def summary(results):
    """One line a test, in per cent, the usual metric first."""
    lines = []
    for test, r in results.items():
        keys = [key for key in (r["metric"], "top1", "mean_per_class", "top5", "knn", "probe") if key in r]
        keys += [key for key in r if "@" in key]
        values = ", ".join(f"{key} {100 * r[key]:.1f}" for key in dict.fromkeys(keys))
        lines.append(f"{test}: {values} ({r['n']} pictures, {r['unreadable']} unreadable)")
    return "\n".join(lines)


# a trained model

def load(path, device="cpu", weights="model"):
    """A checkpoint of one of the scripts -> model in eval mode, tokenizer, preprocess (data.Preprocess). The file is
    read as data (weights_only), its script must be a file beside this one; SystemExit for any other file. weights:
    "model", or "ema", an average that a script keeps."""
    if not os.path.isfile(path):
        raise SystemExit(f"there is no checkpoint {path}")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise SystemExit(f"{path} is not a whole checkpoint of these scripts ({type(error).__name__})") from None
    keys = {"script", weights, "sizes", "preprocess", "merges", "context"}
    if not isinstance(checkpoint, dict) or keys - set(checkpoint):
        raise SystemExit(f"{path} is no checkpoint of these scripts with {weights!r}; other CLIP weights enter by a script's --init")
    script = str(checkpoint["script"])
    file = Path(__file__).resolve().parent / f"{script}.py"
    found = re.fullmatch("[a-z]+", script) and file.is_file() and importlib.util.find_spec(script)  # runs nothing yet
    if not found or Path(found.origin).resolve() != file:
        raise SystemExit(f"{path} was written by a script {script!r}, which is not the one beside eval.py")
    module = importlib.import_module(script)
    cls = next((c for name, c in vars(module).items() if name.lower() == script and isinstance(c, type)), None)
    if cls is None:
        raise SystemExit(f"{path}: there is no model in {file.name}")
    model = module.build(checkpoint[weights], cls, **checkpoint["sizes"]).to(device).eval()
    merges = [tuple(line.split(" ")) for line in checkpoint["merges"].split("\n") if line]
    return model, data.Tokenizer(merges, checkpoint["context"]), data.Preprocess(**checkpoint["preprocess"])


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("checkpoint", help="last.pt or best.pt of a run")
    add("--weights", choices=("model", "ema"), default="model", help="ema: the average, where a script keeps one")
    add("--data", metavar="TESTS", help="comma list of test sets: paths, or " + ", ".join(["toy", *DATASETS]))
    add("--data-root", metavar="DIR", help="folder of torchvision's files (default $CLIP_DATA or ./datasets)")
    add("--download", action="store_true", help="let torchvision download what is missing")
    add("--classnames", metavar="FILE", help="names of the classes, a line each; two names of one class as cat|kitten")
    add("--templates", metavar="FILE", help="prompts, a line each, with {} for the name (such as OpenAI's 80)")
    add("--probe", action="store_true", help="also a linear probe, its l2 chosen on a tenth of the training set")
    add("--knn", action="store_true", help="also the vote of the 20 nearest neighbours in the training set")
    add("--train", metavar="SETS", help="the training set of each test, a comma list (not for toy and torchvision's)")
    add("--json", metavar="FILE", help="write all results, accuracies by class included")
    add("--images", nargs="+", metavar="IMAGE", help="rank the --texts for each of these pictures")
    add("--texts", nargs="+", metavar="TEXT")
    add("--batch-size", type=int, default=256)
    add("--workers", type=int, default=min(8, os.cpu_count()))
    add("--amp", choices=("bf16", "fp16", "off"), help="default: bf16 where the GPU has it, else off")
    args = parser.parse_args(argv)
    if not args.data and not (args.images and args.texts):
        parser.error("give --data, or --images and --texts")
    templates, classnames = (read_lines(path) if path else None for path in (args.templates, args.classnames))
    if args.templates and not all("{}" in line for line in templates or " ") or args.classnames and not classnames:
        raise SystemExit("--templates must be a file of lines that hold {}, --classnames one of names, a line each")
    if args.json and (Path(args.json).is_dir() or not Path(args.json).resolve().parent.is_dir()):
        raise SystemExit(f"--json {args.json} cannot be written: a folder, or in none")
    if args.batch_size < 1 or args.workers < 0:
        raise SystemExit("--batch-size begins at 1, --workers at 0")
    cuda = torch.cuda.is_available()
    amp = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[
        args.amp or ("bf16" if cuda and torch.cuda.is_bf16_supported(including_emulation=False) else "off")]
    model, tokenizer, preprocess = load(args.checkpoint, "cuda" if cuda else "cpu", args.weights)
    if args.data:
        tests, train = (names and names.split(",") for names in (args.data, args.train))
        results = evaluate(model, tokenizer, preprocess, tests, amp, args.workers, templates or TEMPLATES, classnames,
                           args.probe, args.download, args.knn, train, args.data_root, args.batch_size)
        print(summary(results))
        if args.json:
            Path(args.json).write_text(json.dumps(results, indent=1))
    for path in args.images or ():
        try:
            image = preprocess(path)[None].to(model.logit_scale.device)
        except Exception as error:
            raise SystemExit(f"--images: {path} cannot be read ({error})") from None
        with torch.no_grad():
            x, t = F.normalize(model.encode_image(image)), F.normalize(encode_texts(model, tokenizer, args.texts))
            p = (model.logit_scale.exp() * x @ t.T).softmax(1)[0]
        print(path, *(f"{100 * p[i]:6.1f} %  {args.texts[i]}" for i in p.argsort(descending=True)), sep="\n")


if __name__ == "__main__":
    main()
