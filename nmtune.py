"""NMTune: what wrong captions in pre-training do to the features of an encoder, and how to mend them afterwards.

The idea. Captions from the web are often wrong. Chen et al. trained encoders on data with a known share of wrong labels
or swapped captions, and linear classifiers on the frozen features. A little noise (5 to 10 %) helped on test pictures
of the classifier's own domain ("in domain"). Any noise hurt on others ("out of domain"). Noise also flattened the
spectrum of the features: their singular values became more equal. NMTune leaves the encoder as it is. It trains a small
residual MLP and a classifier on the features. Three regularisers act on the MLP's output.

The loss. f is a frozen feature with D entries; z = f + scale * MLP(f) is transformed. The classifier is linear in
z. A batch holds two augmented views of B pictures, so 2B rows. The singular values of the matrix of all rows z, divided
by their sum, are p_1 >= p_2 >= ...

    L = cross-entropy + w_mse mse + w_cov cov - w_top top
    mse = mean of (z / |z| of the second view - f / |f| of the first)^2      z keeps the direction of f
    cov = 1/D sum of the squared covariances of different entries of z       no two entries say the same
    top = mean of p_1 .. p_k                                                 few directions dominate

Two numbers describe the spectrum of a test set's features: the singular value entropy, SVE = -sum_i p_i log p_i, and
the largest singular value's ratio, LSVR = -log p_1. Both are high for a flat spectrum, and LSVR is never above SVE.

What it brought, by reviews and summaries of the paper. For Swin-L of ImageNet-21k, a linear probe has 81.9 % in domain
and 50.9 % out of domain; NMTune has 84.2 and 52.4 %. A reviewer saw about 1 point between a plain MLP and NMTune, so
much of the gain is the MLP's. The script prints both, on identical inputs. Each view of a picture passes the encoder
once; features stay in --out. Training the classifiers takes minutes.

How to run.
    python nmtune.py runs/clip-toy/last.pt                           shapes of the toy, in known and new combinations
    python nmtune.py CHECKPOINT --train SET --test SET --ood SETS    sets as eval.py takes them
    python nmtune.py --swap .1 --data PATH > noisy.tsv               a tenth of the captions wrong; then
    python clip.py --data PATH --subset noisy.tsv
SET@PATTERN: the pictures of a set whose key (in folders: path) matches a regular expression. Here artists are domains:
    --train "everyday@/noto_.*[0-9ab]$" --test "everyday@/noto_.*[c-f]$" --ood "everyday@/fluent-3d_,everyday@/fxemoji_"

Sources: Chen et al. 2024 (arXiv 2309.17002); github.com/Hhhhhhao/Noisy-Model-Learning.
"""
import argparse
import hashlib
import json
import math
import os
import random
import re
import sys
import time
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import data
import eval as evaluator


# the regularisers, the spectrum

def singular_values(x):
    """x [n, D] -> its min(n, D) singular values, float64, ascending.

    They are the roots of the eigenvalues of the smaller Gram matrix. Values and gradient equal those of
    torch.linalg.svdvals, which takes longer. What is 0 up to rounding becomes exactly 0 and gets no gradient. Float64,
    because a root turns a rounding error of 1e-7 into 3e-4. If an entry of x is not finite, all are NaN.
    """
    x = x.double()
    if not x.isfinite().all():
        return x.new_full((min(x.shape),), math.nan)
    squares = torch.linalg.eigvalsh(x @ x.T if len(x) < x.shape[1] else x.T @ x)
    positive = squares > len(squares) * torch.finfo(x.dtype).eps * squares[-1]
    return squares.where(positive, 1).sqrt().where(positive, 0)  # the slope of a root at 0 is infinite


def regularisers(f, z, k=5):
    """The terms mse, cov and top of the loss, not weighted: scalars in at least fp32. A loss subtracts top.

    f [2B, D]: frozen features, which get no gradient. z [2B, D]: transformed features. In both, the first B rows are
    the first view, which the released code calls weak, and the last B the second, strong. k: how many values top
    averages. All is scaled as in the released code. In the paper, as others describe it, mse is the squared norm of the
    difference between z and f of the same view, so D times as large, and top is p_1. ValueError for other shapes or k.
    """
    if z.shape != f.shape or len(z) % 2 or not len(z) or k < 1:
        raise ValueError(f"f {[*f.shape]} and z {[*z.shape]} must be [2B, D], and k = {k} at least 1")
    with torch.autocast(z.device.type, enabled=False):
        z = z.to(torch.promote_types(z.dtype, torch.float32))
        weak, strong = f.detach().to(z.dtype).chunk(2)[0], z.chunk(2)[1]  # [B, D] each
        mse = (F.normalize(strong, dim=1) - F.normalize(weak, dim=1)).square().mean()
        n, D = z.shape
        centred = (z - z.mean(0)).double()  # float64, because cov is a small difference of large sums
        # (n - 1) times the covariance matrix [D, D], or the smaller Gram matrix [n, n]: their squares have the same sum
        gram = centred @ centred.T if n < D else centred.T @ centred
        cov = (gram.square().sum() / (n - 1) ** 2 - centred.var(0).square().sum()) / D
        s = singular_values(z)  # of z as it is: the first direction is mostly the mean, which cov does not see
        top = s[-k:].mean() / s.sum().clamp(min=torch.finfo(s.dtype).tiny)
    return mse, cov.to(z.dtype), top.to(z.dtype)


def spectrum(x):
    """Features x [n, D], raw and not centred -> sve, lsvr: scalars in float64; 0 <= lsvr <= sve <= log min(n, D). Both
    are NaN if all features are 0.

    The released code computes neither. Its script that draws spectra scales rows to unit norm and subtracts from each
    row the mean of its own entries. That would change both numbers.
    """
    s = singular_values(x)
    p = s / s.sum()
    return torch.xlogy(p, 1 / p).sum(), (1 / p[-1]).log()


# the model and its training

class NMTune(nn.Module):
    """A residual MLP with a learned scale for each entry, and a linear classifier on its output. With linear=True only
    the classifier, on the features themselves. Parameters start as in the released code."""

    def __init__(self, dim, classes, linear=False):
        super().__init__()
        self.linear, self.head = linear, nn.Linear(dim, classes)
        nn.init.kaiming_uniform_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        if not linear:
            self.mlp = nn.Sequential(
                nn.Linear(dim, 4 * dim), nn.BatchNorm1d(4 * dim), nn.ReLU(), nn.Linear(4 * dim, dim))
            # as by the command in the released README; by default the released code starts at .5, without residual
            self.scale = nn.Parameter(torch.ones(dim))

    def forward(self, f):  # [n, D] -> z [n, D], logits [n, classes]
        z = f if self.linear else f + self.scale * self.mlp(f)
        return z, self.head(z)


def fit(model, x, y, weights=(0., 0., 0.), k=5, lr=1e-3, epochs=30, batch_size=64, seed=0):
    """Trains a model on features x [V, N, D] in V views with labels y [N]. weights: of mse, cov and top; all 0 is plain
    cross-entropy. k: of top. The order and the choice of views depend only on the seed. Returns [cross-entropy, mse,
    cov, top] of the first step and of the last; without weights the last three are NaN. SystemExit if the loss is not
    finite."""
    generator, history = torch.Generator().manual_seed(seed), []
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=1e-4)  # all parameters decay, as released
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * math.ceil(len(y) / batch_size))
    model.train()
    for epoch in range(epochs):
        for rows in torch.randperm(len(y), generator=generator).split(batch_size):
            # Two of the V views, or the same twice if V = 1. The released code encodes two new views at each step, but
            # only for the MLP: its linear probe sees the centre crop.
            weak, strong = torch.randperm(max(2, len(x)), generator=generator)[:2] % len(x)
            f = torch.cat([x[weak, rows], x[strong, rows]])  # [2B, D]
            z, logits = model(f)
            loss = ce = F.cross_entropy(logits, y[rows].repeat(2))
            mse = cov = top = ce.new_tensor(math.nan)
            if any(weights):
                mse, cov, top = regularisers(f, z, k)
                loss = ce + weights[0] * mse + weights[1] * cov - weights[2] * top
            if not loss.isfinite():
                raise SystemExit(f"the loss is not finite in epoch {epoch + 1} (features have norms up to "
                                 f"{x.norm(dim=-1).max():.3g}): is this checkpoint in order?")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            history = history[:1] + [torch.stack([ce, mse, cov, top]).detach()]  # of the first step and of this one
    return history[0].tolist(), history[-1].tolist()


@torch.no_grad()
def apply(model, x):
    """Features x [n, D] -> z [n, D], logits [n, classes] in eval mode, in which a row does not depend on others."""
    z, logits = zip(*map(model.eval(), x.split(4096)))
    return torch.cat(z), torch.cat(logits)


# the sets: pictures, views, features

class Crops:
    """Pictures of a data set, chosen by their places, in the form that eval.encode_images reads. With views > 0 each
    stands there as that many random crops: all of the first picture, then all of the second, ..."""

    def __init__(self, dataset, places, views, size):
        self.dataset, self.places, self.views, self.size = dataset, places, views, size

    def __len__(self):
        return len(self.places) * max(1, self.views)

    def image(self, j):
        i, view = divmod(j, max(1, self.views))
        image = self.dataset.image(self.places[i])
        if not self.views:
            return image
        # open_clip's crops, as by the command in the released README. The code's defaults add RandAugment(3, 5) to the
        # second view.
        crop = data.random_resized_crop(image, self.size, (.9, 1), random.Random(f"{view} {self.places[i]}"))
        return Image.fromarray(crop.permute(1, 2, 0).numpy())


def open_set(text, split, root, limit, classnames):
    """Opens a set of eval.py, or SET@PATTERN -> data set, places of the pictures chosen, and a str that differs between
    sets with different pictures. SystemExit if no picture is chosen."""
    spec, _, pattern = (text, "", "") if os.path.exists(text) else text.partition("@")
    dataset = evaluator.open_test(spec, split, root, classnames=classnames)
    files = [path for path, _ in getattr(getattr(dataset, "pictures", None), "samples", ())]  # if it is a folder
    places = range(len(dataset))
    if pattern:
        if not files and not hasattr(dataset, "key"):
            raise SystemExit(f"{text}: the pictures of {spec} have no keys for a pattern")
        try:
            places = [i for i in places if re.search(pattern, files[i] if files else dataset.key(i))]
        except re.error as error:
            raise SystemExit(f"{text}: what follows the @ is no regular expression ({error})") from None
        if not places:
            key = files[0] if files else dataset.key(0)
            raise SystemExit(f"{text}: no key matches the pattern; a key is, for example, {key}")
    n = min(limit or len(places), len(places))
    places = [places[i * len(places) // n] for i in range(n)]  # all over the set, as folders have class after class
    class_of(dataset, torch.tensor(places), text)  # a missing class is said before anything is encoded
    # The str holds, for tars, the path of their index; for folders, names, sizes and times of the files; else the name.
    state = [(os.path.abspath(path), os.path.getsize(path), os.stat(path).st_mtime_ns) for path in files]
    named = [spec, split, root or os.environ.get("CLIP_DATA"), data.TOYS.get(getattr(dataset, "source", [""])[0])]
    return dataset, places, str(getattr(dataset, "index", state or named))


def features(model, preprocess, dataset, places, views, path, workers):
    """Features x [V, n, D] of the readable pictures at `places`, and the places [n] of these. They are read from the
    file at path, which is made if it is not there. There are V = views random crops. With views = 0, V is 1: the
    picture as the preprocessing gives it."""
    if not path.exists():
        crops, V = Crops(dataset, places, views, preprocess.size), max(1, views)
        x, index = evaluator.encode_images(model, crops, preprocess, workers=workers)
        whole = torch.bincount(index // V, minlength=len(places)) == V  # which pictures were readable in every view
        x = x[whole[index // V]].unflatten(0, (int(whole.sum()), V)).transpose(0, 1)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save({"x": x.cpu().contiguous(), "places": torch.tensor(places)[whole.cpu()]}, f"{path}.tmp")
            os.replace(f"{path}.tmp", path)
        except (OSError, RuntimeError) as error:  # RuntimeError: on a full disk
            raise SystemExit(f"--out: {path} cannot be written ({error})") from None
    kept = torch.load(path, weights_only=True)
    return kept["x"], kept["places"]


def class_of(dataset, places, text):
    """Names of all classes, and the name of each picture's class. The toy's classes are shapes here, because its
    domains are combinations of colour and shape."""
    names, y = dataset.classnames, evaluator.labels_of(dataset, places, dataset.classnames, text).tolist()
    if isinstance(dataset, data.ToyDataset):
        return list(data.SHAPES), [names[number].split()[-1] for number in y]
    return names, [names[number] for number in y]


# caption noise

def swap(captions, share, seed):
    """captions {key: list of str} -> the same dict, but with wrong captions for round(share * n) of the n keys. The
    keys are chosen at random. Each gets the captions of another chosen key, none of which it had before. SystemExit if
    that is not possible.

    The released code (open_clip/shuffle_data.py) exchanges the captions of two random pairs int(share * n) times. A
    pair may be drawn again, and captions may be equal, so about 1 - exp(-2 share) of the pairs change: 18 % for .1.
    """
    chosen = random.Random(seed).sample(list(captions), round(share * len(captions)))
    if not share:
        return captions
    if len(chosen) < 2:
        raise SystemExit(f"--swap {share}: that is {len(chosen)} of {len(captions)} pairs, and a swap takes two")
    own, rank = {key: frozenset(map(data.clean, captions[key])) for key in chosen}, {}  # as the tokenizer reads them
    for key in chosen:
        rank.setdefault(own[key], len(rank))
    order = sorted(chosen, key=lambda key: rank[own[key]])  # equal captions stand side by side
    # If each key has one caption, and none belongs to more than half of the keys, the key `most` places further has
    # another. Where lists of captions overlap in spite of that, two keys exchange their donors.
    most = max(Counter(text for texts in own.values() for text in texts).values())
    donors = order[most:] + order[:most]
    for i, key in enumerate(order):
        if own[key] & own[donors[i]]:
            j = next((j for j, other in enumerate(order)
                      if not own[key] & own[donors[j]] and not own[other] & own[donors[i]]), None)
            if j is None:
                raise SystemExit(f"--swap {share}: too many of {len(chosen)} pairs share a caption, one is in {most}")
            donors[i], donors[j] = donors[j], donors[i]
    return captions | {key: captions[donor] for key, donor in zip(order, donors)}


def write_noise(args):
    """--swap: prints a file for --subset, in which each line is a key, a tab and a caption."""
    captions = {}
    for key, caption in data.captions(args.data, args.limit, args.data_root):
        captions.setdefault(key, []).append(" ".join(caption.split()))
    swapped = swap(captions, args.swap, args.seed)
    sys.stdout.reconfigure(encoding="utf-8")
    sys.stdout.writelines(data.subset_lines((key, text) for key, texts in swapped.items() for text in texts))


# weights, the table

WEIGHTS = {  # of mse, cov and top; then k, the number of singular values in top
    "released": (1., .04, .001, 5),  # README's command; top is at most 1/5, so it changes the loss by .0002 at most
    # One lambda for all terms, as a review quotes it. The paper's own text was not at hand, so the terms are as others
    # tell them. main multiplies mse by D, see regularisers. mse compares two views also here.
    "paper": (.01, .01, .01, 1),
}


def main(argv=None):
    args = parse_args(argv)
    if args.swap is not None:
        return write_noise(args)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer, preprocess = evaluator.load(args.checkpoint, device, "model", args.quick_gelu, args.bpe)
    checkpoint = [hashlib.sha256(Path(args.checkpoint).read_bytes()).hexdigest(), args.quick_gelu]

    # features of the training set, then of the test sets, of which only the classes of the training set are used
    ood = args.ood.split(",") if args.ood else ["toy"] if args.train == "toy-seen" else []
    specs = [args.train, args.test or args.train, *ood]
    given = evaluator.read_classnames(args.classnames, "--classnames") if args.classnames else None
    opened = [open_set(spec, "test" if i else "train", args.data_root, args.limit, given)
              for i, spec in enumerate(specs)]
    heads, sets = ["training", "in domain", *(f"out {i + 1}" for i in range(len(ood)))], []
    for head, spec, (dataset, places, state) in zip(heads, specs, opened):
        start, views = time.perf_counter(), 0 if sets else args.views
        if sets and state == opened[0][2] and {*places} & {*opened[0][1]}:
            raise SystemExit(f"{spec} has pictures that --train has too; SET@PATTERN parts them")
        name = hashlib.sha256(json.dumps([checkpoint, state, places, views]).encode()).hexdigest()[:24]
        asked = len(places)
        x, places = features(model, preprocess, dataset, places, views, Path(args.out) / f"{name}.pt", args.workers)
        if not x.isfinite().all():
            raise SystemExit(f"{args.checkpoint} gives features of {spec} that are not finite: did its training fail?")
        classnames, y = class_of(dataset, places, spec)
        if not sets:
            names = classnames  # of the training set; other sets may number the same classes differently
        known = torch.tensor([name in names for name in y])
        if not known.any():
            raise SystemExit(f"{spec} has no picture of a class of {args.train}, such as {names[0]!r}")
        y = torch.tensor([names.index(name) for name in y if name in names])
        sets.append((x[:, known].to(device), y.to(device)))
        print(f"{head}: {spec}, {len(y)} pictures (left out: {asked - len(known)} unreadable, {len(known) - len(y)} of "
              f"other classes), {time.perf_counter() - start:.1f} s")
    (x, y), *tests = sets
    rows, D = {}, x.shape[-1]

    def add_row(name, start, classify):
        rows[name] = {"seconds": time.perf_counter() - start, "tests": []}
        for spec, (test_x, test_y) in zip(specs[1:], tests):
            z, logits = classify(test_x[0])
            sve, lsvr = spectrum(z)
            rows[name]["tests"].append({"set": spec, "sve": sve.item(), "lsvr": lsvr.item()}
                                       | evaluator.accuracy(logits.argmax(1) == test_y, test_y, len(names)))

    # zero-shot, then three classifiers on the same inputs in the same order
    start = time.perf_counter()
    text = evaluator.text_classifier(model, tokenizer, names, evaluator.phrased(args.train, evaluator.TEMPLATES))
    add_row("zero-shot", start, lambda f: (f, F.normalize(f, dim=1) @ text.T))
    mse, cov, top, k = WEIGHTS["paper" if args.paper else "released"]
    tuned, plain = (mse * D if args.paper else mse, cov, top), (0, 0, 0)
    # the released learning rates
    for name, weights, lr in (("linear probe", plain, 1e-2), ("MLP", plain, 1e-3), ("NMTune", tuned, 1e-3)):
        torch.manual_seed(args.seed)
        start, classifier = time.perf_counter(), NMTune(D, len(names), linear=name == "linear probe").to(device)
        history = fit(classifier, x, y, weights, k, lr, args.epochs, seed=args.seed)
        add_row(name, start, lambda f: apply(classifier, f))

    print("accuracy in %; SVE and LSVR of the features, in domain, that the classifier of the row reads")
    print(" " * 12, *(f"{head:>9}" for head in [*heads[1:], "SVE", "LSVR", "seconds"]))
    for name, row in rows.items():
        first, accuracies = row["tests"][0], [f"{100 * test['top1']:9.1f}" for test in row["tests"]]
        print(f"{name:12}", *accuracies, f"{first['sve']:9.3f} {first['lsvr']:9.3f} {row['seconds']:9.1f}")
    for when, terms in zip(("first", "last"), history):
        print(f"NMTune's {when} step:", "cross-entropy {:.3g}, mse {:.3g}, cov {:.3g}, top {:.3g}".format(*terms))
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1))


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("checkpoint", nargs="?", help="last.pt or best.pt of a run, or a file of OpenAI's or open_clip's")
    add("--train", metavar="SET", default="toy-seen", help="training set of the classifiers (default: %(default)s)")
    add("--test", metavar="SET", help="test set of the same domain (default: the test split of --train)")
    add("--ood", metavar="SETS", help="comma list of test sets of other domains, without commas in patterns")
    add("--views", type=int, default=4, help="random crops of each training picture")
    add("--paper", action="store_true", help="the paper's weights of the regularisers in place of the released code's")
    add("--epochs", type=int, default=30, help="of the classifiers")
    add("--limit", type=int, help="only N pictures of a set, from all over it; with --swap the first N pairs")
    add("--classnames", metavar="FILE", help="names of the classes of all sets, a line each")
    add("--quick-gelu", action=argparse.BooleanOptionalAction,
        help="the activation of files that do not name theirs (default: GELU, and a line that says so)")
    add("--bpe", metavar="FILE", help="merges of files that do not hold theirs (default: $CLIP_BPE, else OpenAI's)")
    add("--out", default="runs/nmtune", help="folder for the features (default: %(default)s)")
    add("--json", metavar="FILE", help="write all results")
    add("--workers", type=int, default=min(8, data.cores()), help="processes that read pictures")
    add("--seed", type=int, default=0)
    add("--swap", type=float, metavar="SHARE", help="print a --subset file of --data in which this share has wrong "
        "captions, and do nothing else")
    add("--data", default="toy", help="for --swap: what clip.py's --data takes")
    add("--data-root", metavar="DIR", help="torchvision's files, cc3m (default $CLIP_DATA or ./datasets)")
    args = parser.parse_args(argv)
    if args.swap is None and not args.checkpoint:
        parser.error("give a checkpoint, or --swap")
    if args.swap is not None and not 0 <= args.swap <= 1:
        raise SystemExit("--swap is a share, from 0 to 1")
    if min(args.views, args.epochs, 1 if args.limit is None else args.limit) < 1 or min(args.workers, args.seed) < 0:
        raise SystemExit("--views, --epochs and --limit begin at 1, --workers and --seed at 0")
    if args.json and (Path(args.json).is_dir() or not Path(args.json).resolve().parent.is_dir()):
        raise SystemExit(f"--json {args.json} cannot be written: it is a folder, or its folder does not exist")
    return args


if __name__ == "__main__":
    main()
