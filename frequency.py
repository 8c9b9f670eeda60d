"""Concept frequency: how often do training captions name a test concept, and how does accuracy grow with that?

The paper, "No 'Zero-Shot' Without Exponential Data", trains nothing. A concept is a class of a test, given by its name.
The paper counts how many training pairs mention each concept, and compares this count with the accuracy of trained
models on that class. Accuracy grows with the logarithm of the count: for every further gain of the same size, a concept
needs ten times as many pairs. This script prints the comparison for any number of checkpoints, one column each. Its
question is: do data-efficient methods have a flatter slope, and are they better on rare concepts?

n is the number of captions that mention a concept. a is the accuracy on it in per cent. The script prints the mean of a
for each decade of n (1-9, 10-99, ...). It also fits the line

    a = slope * log10(n) + constant

twice. One fit is to the concepts with n > 0. The other is to the means of bins of n, the points of the paper's figures.
Averaging removes the scatter within a bin, so bins have a much higher correlation r: .96 against about .4 for RN50 on
CC3M, where the slopes are 9.3 (bins) and 10.5 (concepts) points a decade. Both are always printed, with the number of
points and the p value of r.

A caption mentions a concept if it holds all words of the name, in any order. The paper also asks a tagger what the
picture shows, and counts a pair only if caption and picture agree. Such counts, called integrated, get a second table
here, if --tags says what pictures show; the toy's scenes say it themselves. Counts by captions only give slopes of the
same sign, but smaller: .4 to .9 times as large on ImageNet, by bin.

How to run.
    python clip.py --data toy-zipf --epochs 12        4,096 pairs, kinds by Zipf's law; the commonest is named 87 times
    python frequency.py runs/clip-toy-zipf/last.pt
    python frequency.py runs/clip-cc3m/last.pt runs/declip-cc3m/last.pt --eval imagenet/val,wag --csv cc3m.csv
    python tests/curves.py cc3m.csv imagenet/val > picture.svg       accuracy against count, one curve a checkpoint
The folder wag is "Let it Wag!", the authors' test of 290 rare concepts, with a sub-folder for each.

Sources: Udandarao et al. 2024 (arXiv 2404.04125); github.com/bethgelab/frequency_determines_performance. The numbers
above come from the counts and accuracies that are published there.
"""
import argparse
import csv
import hashlib
import json
import math
import os
import re
from collections import Counter, namedtuple
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import data
import eval as evaluator


# counts

def words(text):
    """Words of a caption or a name, lower-case runs of a-z and digits: "Boeing_737-200" -> ["boeing", "737", "200"].

    Here captions and names go through the same function. The released index of captions keeps upper case and drops
    digits, but is asked for lower-case words with digits. So it finds "Austria" once in the 12 M captions of CC12M, and
    cannot find "737-200". The paper's code also lemmatises. That changes r little, and mostly for the worse."""
    return re.findall("[a-z0-9]+", text.lower())


def mentions(captions, names):
    """Yields for each caption (iterable of str) the names that it mentions, as a set of places in `names` (list of
    str).

    A caption must hold all words of a name. The released code skips words that its index lacks, so its "polar bear"
    counts every bear. A name such as "crane, bird", "cat|kitten" or "Myanmar (Burma)" has two parts, of which one is
    enough."""
    index = {}  # {longest word of a part: [(place, its other words)]}
    for place, name in enumerate(names):
        for part in filter(None, map(words, re.split(r"[,/()|]", name))):  # a name without words is in no caption
            longest = max(part, key=len)  # long words are rare, so the other words are seldom looked for
            index.setdefault(longest, []).append((place, {*part} - {longest}))
    for caption in captions:
        found = set(words(caption))
        yield {place for word in found if word in index for place, others in index[word] if others <= found}


def count(captions, names):
    """Number of captions (iterable of str) that mention each of C names -> int64 [C]."""
    found = Counter(place for mentioned in mentions(captions, names) for place in mentioned)
    return np.array([found[place] for place in range(len(names))], np.int64)


def integrated(captions, pictures, names):
    """Counts over pairs of a caption (str) and a picture, which is given as the set of what it shows, by place in
    `names`. Returns counts, both, misaligned.

    counts: int64 [C], the pairs whose caption and picture both have the concept. both: the number of pairs whose
    caption has some concept and whose picture has some. misaligned: the number of those that have none in common. The
    released code divides misaligned by the size of the data, not by both. For CC3M, CC12M and YFCC15M it also looks up
    names of several words among single words. So its 16.8, 17.3 and 36.5 % do not compare with ours."""
    counts, both, misaligned = [0] * len(names), 0, 0
    for said, shown in zip(mentions(captions, names), pictures):
        both += bool(said and shown)
        misaligned += bool(said and shown and not said & shown)
        for place in said & shown:
            counts[place] += 1
    return np.array(counts, np.int64), both, misaligned


# trend

def binned(count, acc, bins=12):
    """The paper's bins of concepts, of equal width in ln(max(count, 1)). count [C], acc [C] -> x [bins], the upper
    edges of the bins in natural logarithm; mean [bins] of acc; n [bins], how many concepts. Bin 0 holds only the
    smallest count, where counts 0 and 1 are the same.

    The mean of an empty bin is NaN. The released code leaves empty bins out, so it shifts the others or raises."""
    log_count, acc = np.log(np.maximum(np.asarray(count), 1)), np.asarray(acc, np.float64)
    x = np.linspace(log_count.min(), log_count.max(), bins)
    place = np.digitize(log_count, x, right=True)  # x[place - 1] < log_count <= x[place]
    groups = [acc[place == i] for i in range(bins)]
    return x, np.array([g.mean() if len(g) else math.nan for g in groups]), np.array([len(g) for g in groups])


def pearson(x, y):
    """Correlation r of x [n] and y [n], and its two-tailed p value; NaN for both if n < 2 or if x or y is constant.

    For independent normal x and y, r has a density proportional to (1 - r^2)^((n-4)/2). p is the part of its integral
    beyond |r|. With r = sin(t) the integrand is cos(t)^(n-3) dt, which has no pole at n = 3. The sum has 100 Gauss
    nodes and ends where the integrand has fallen by e^-40."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    n = len(x)
    if n < 2 or (x == x[0]).all() or (y == y[0]).all():
        return math.nan, math.nan
    x, y = x - x.mean(), y - y.mean()
    r = float(np.clip(x / np.linalg.norm(x) @ (y / np.linalg.norm(y)), -1, 1))
    if n == 2:
        return r, 1.  # two points always lie on a line
    power, low = n - 3, math.asin(abs(r))
    width = min(math.pi / 2 - low, 40 / max(power * math.tan(low), 1e-9), math.sqrt(80 / max(power, 1e-9)))
    nodes, weights = np.polynomial.legendre.leggauss(100)
    tail = weights @ np.cos(low + width * (nodes + 1) / 2) ** power * width / 2
    # the integral of all positive r, from t = 0 to pi/2, in closed form
    half = math.sqrt(math.pi) / 2 * math.exp(math.lgamma(power / 2 + .5) - math.lgamma(power / 2 + 1))
    return r, min(1., float(tail / half))


def trend(x, y):
    """Slope of y per tenfold count by least squares, r, p and number of points. x: natural logarithms of counts. Points
    whose y is NaN are left out."""
    x, y = x[~np.isnan(y)], y[~np.isnan(y)]
    slope = np.polyfit(x, y, 1)[0] * math.log(10) if len({*x}) > 1 else math.nan
    return slope, *pearson(x, y), len(x)


# report

PUBLISHED = """Published, ImageNet / Let it Wag!, OpenAI's 80 prompts:
RN50      CC3M 20.1 / 3.7   CC12M 33.1 / 8.9    YFCC15M 31.9 / 13.2
ViT-B-16  CC3M 17.1 / 3.0   CC12M 37.4 / 11.5   YFCC15M 37.9 / 19.3"""
COUNTS = {"count": "captions that mention the concept (text only)",
          "integrated": "pairs whose caption and picture agree on the concept"}
Row = namedtuple("Row", "checkpoint test concept count integrated accuracy")  # integrated: may be None; accuracy: %


def table(rows, kind):
    """Lines of a table of Rows, one column a checkpoint. kind: which of COUNTS."""
    columns = {}  # {checkpoint: array [2, C] of counts and accuracies}
    for name in dict.fromkeys(row.checkpoint for row in rows):
        columns[name] = np.array([(getattr(row, kind), row.accuracy) for row in rows if row.checkpoint == name]).T
    lines = [["", *columns], ["all"] + [f"{acc.mean():.1f} ({len(acc)})" for _, acc in columns.values()]]
    lines.append(["never mentioned"] + [f"{100 * (n == 0).mean():.0f} %" for n, _ in columns.values()])
    low, high = 0, 0  # then 1-9, 10-99, ...
    while low <= max(n.max() for n, _ in columns.values()):
        groups = [acc[(low <= n) & (n <= high)] for n, acc in columns.values()]
        cells = [f"{group.mean():.1f} ({len(group)})" if len(group) else "-" for group in groups]
        lines.append([f"{low:,}-{high:,}" if high else "0", *cells])
        low, high = high + 1, 10 * high + 9
    by_concept = [trend(np.log(n[n > 0]), acc[n > 0]) for n, acc in columns.values()]
    # The paper drops the first and the last bin, too, but fits no line. Its p takes the ten means that are left for ten
    # samples. Each is the mean of many concepts, so the trend looks surer than it is. r and p by concept do not have
    # this fault.
    by_bin = [trend(x[1:-1], mean[1:-1]) for x, mean, _ in (binned(n, acc) for n, acc in columns.values())]
    for way, fits in (("concept", by_concept), ("bin", by_bin)):
        lines.append([f"slope by {way}"] + [f"{slope:+.1f}" for slope, *_ in fits])
        lines.append(["  r (n, p)"] + [f"{r:.2f} ({n}, {p:.1g})" for _, r, p, n in fits])
    widths = [max(map(len, cells)) for cells in zip(*lines)]
    yield f"by number of {COUNTS[kind]}"
    for label, *cells in lines:
        yield label.ljust(widths[0]) + "".join("  " + cell.rjust(width) for cell, width in zip(cells, widths[1:]))
    if np.isnan(by_concept + by_bin).any():
        yield "nan: a slope needs two different counts above 0, or two inner bins; r also two different accuracies"


def main(argv=None):
    args = parse_args(argv)
    runs = [read_run(path, args) for path in args.checkpoints]
    names = {test: evaluator.open_test(test, root=run["root"]).classnames for run in runs for test in run["tests"]}
    for test in names:
        if not names[test]:
            raise SystemExit(f"{test} has no class names: name tests that have some by --eval")
    concepts = sorted({name for test in names for name in names[test]})
    for name in concepts:
        if not words(name):
            print(f"{name!r} holds no letter from a to z and no digit, so no caption can mention it")

    rows = []
    for run in runs:
        found = counts_of(run, concepts, args)
        print(f"{run['name']}: {found['about']}")
        for test, accuracies in accuracies_of(run, names, args).items():
            rows += [Row(run["name"], test, name, found["count"][name], found["integrated"].get(name), 100 * accuracy)
                     for name, accuracy in zip(names[test], accuracies) if accuracy is not None]  # None: no picture
    for test in [*names, "all tests"] if len(names) > 1 else names:  # a name in two tests counts twice, as in the paper
        print(f"\n{test}: accuracy in % (number of concepts)")
        for kind in COUNTS:
            chosen = [row for row in rows if test in (row.test, "all tests") and getattr(row, kind) is not None]
            if chosen:
                print(*table(chosen, kind), sep="\n")
    if 290 in map(len, names.values()):
        print("\nOne of the tests has 290 names, as Let it Wag! has.", PUBLISHED)
    if args.csv:
        with open(args.csv, "w", newline="") as file:
            csv.writer(file).writerows([Row._fields, *rows])


# flags, counts and accuracies of the runs

def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("checkpoints", nargs="+", metavar="CHECKPOINT", help="last.pt or best.pt of runs; they name data and tests")
    add("--data", help="count in these captions (default: those that each checkpoint was trained on)")
    add("--data-root", metavar="DIR", help="folder of the named sets (default: the checkpoint's)")
    add("--subset", metavar="FILE", help="count only these pairs, as the training scripts' --subset")
    add("--eval", metavar="TESTS", help="comma list of tests with class names (default: the checkpoint's, or toy-seen)")
    add("--json", nargs="+", metavar="FILE", help="accuracies that eval.py --json wrote: one file, or one a checkpoint")
    add("--counts", metavar="FILE", help="JSON {concept: count}: used if the file is there, else written")
    add("--tags", metavar="FILE", help="what pictures show: lines of a key, a tab and a concept; several lines a key")
    add("--csv", metavar="FILE", help="write counts and accuracies of all concepts, for tests/curves.py")
    add("--workers", type=int, default=0, help="processes that read test pictures")
    args = parser.parse_args(argv)
    if len({*args.checkpoints}) < len(args.checkpoints) or len(args.json or "1") not in (1, len(args.checkpoints)):
        raise SystemExit("give each checkpoint once, and to --json one file or as many as there are checkpoints")
    if args.counts and not args.data and len(args.checkpoints) > 1 and not os.path.isfile(args.counts):
        raise SystemExit(f"there is no --counts {args.counts}; to write one for several checkpoints, give --data too")
    for flag, path in (("--counts", args.counts), ("--csv", args.csv)):
        if path and (os.path.isdir(path) or not Path(path).resolve().parent.is_dir()):
            raise SystemExit(f"{flag} {path} cannot be written: it is a folder, or its folder does not exist")
    return args


def read_run(path, args):
    """Dict of a run: path of the checkpoint and its name in tables, data, limit, subset, root (--data-root), tests.
    Flags of this script come before those of the run."""
    flags = evaluator.read_checkpoint(path).get("flags", {})  # weights from elsewhere have none
    own = {} if args.data else flags
    tests = args.eval or flags.get("eval")
    if not args.eval and own.get("data") in data.TOYS and tests and {*tests.split(",")} <= {*data.TOY_TESTS}:
        tests = f"{own['data']}-seen"  # the toy's usual tests show kinds that no caption mentions
    if not tests:
        raise SystemExit(f"{path} was trained without tests: name some by --eval")
    return {"path": path, "name": path.removesuffix("/last.pt"), "data": args.data or own.get("data"),
            "limit": own.get("limit"), "subset": args.subset or own.get("subset"),
            "root": args.data_root or flags.get("data_root"), "tests": tests.split(",")}


def counts_of(run, concepts, args):
    """Dict of "count" and "integrated", each {concept: number}, the second empty without tags; and "about", a sentence
    for the terminal. It is read from --counts, or else counted once and cached, under a hash of data, concepts and
    tags."""
    if args.counts and os.path.isfile(args.counts):
        try:
            counts = json.loads(Path(args.counts).read_text())
            counts = {name: int(counts[name]) for name in concepts}
        except Exception as error:
            raise SystemExit(f"--counts {args.counts} has no number for each concept ({error!r})") from None
        return {"count": counts, "integrated": {}, "about": f"counts from {args.counts}"}
    if not run["data"]:
        raise SystemExit(f"{run['path']} does not say what it was trained on: give --data or --counts")
    dataset = data.open_dataset(run["data"], None, run["limit"], run["subset"], run["root"])
    tags = data.read_lines(args.tags, "--tags") if args.tags else []
    if not tags and hasattr(dataset, "tags"):  # a drawn scene says itself what it shows
        tags = [f"{dataset.key(i)}\t{kind}" for i in range(len(dataset)) for kind in dataset.tags(i)[0]]
    state = json.dumps([data.fingerprint(dataset), concepts, tags]).encode()
    path = data.cache(f"counts-{hashlib.sha256(state).hexdigest()[:24]}.json")
    with data.locked(path):
        if not path.exists():
            path.with_suffix(".part").write_text(json.dumps(count_pairs(dataset, concepts, tags)))
            os.replace(path.with_suffix(".part"), path)
    found = json.loads(path.read_text())
    if args.counts:
        Path(args.counts).write_text(json.dumps(found["count"], indent=1))
    return found


def count_pairs(dataset, concepts, tags):
    """Counts for counts_of, which says what is returned. tags: lines, each a key of the data, a tab, and a concept that
    its picture shows."""
    def captions():
        places = tqdm(range(len(dataset)), "captions", leave=False, disable=None)
        return (text for i in places for text in dataset.captions(i))

    found = {"count": dict(zip(concepts, count(captions(), concepts).tolist())), "integrated": {}}
    found["about"] = f"{len(dataset):,} pairs"
    if tags:
        keys, kinds = zip(*(line.partition("\t")[::2] for line in tags))
        shown = {}  # {key: places in concepts}
        for key, places in zip(keys, mentions(kinds, concepts)):
            shown.setdefault(key, set()).update(places)
        pictures = (shown.get(dataset.key(i), set()) for i in range(len(dataset)) for _ in dataset.captions(i))
        counts, both, misaligned = integrated(captions(), pictures, concepts)
        found["integrated"] = dict(zip(concepts, counts.tolist()))
        found["about"] += (f"; in {both:,} caption and picture have a concept, and in {misaligned:,} of these none in "
                           f"common ({100 * misaligned / max(1, both):.1f} % misaligned)")
    return found


def accuracies_of(run, names, args):
    """{test: list of the accuracy on each class}, computed or read from --json. An accuracy is from 0 to 1, or None for
    a class without pictures."""
    if args.json:
        several = len(args.json) == len(args.checkpoints)
        file = args.json[args.checkpoints.index(run["path"]) if several else 0]
        try:
            results = json.loads(Path(file).read_text())
            # eval.py writes {test: results} of one checkpoint, or {checkpoint: {test: results}} of several
            results = results.get(run["path"], results) if several else results[run["path"]]
            found = {test: results[evaluator.short_name(test)]["per_class"] for test in run["tests"]}
        except Exception as error:
            raise SystemExit(f"--json {file} has no results by eval.py of {run['path']} on {', '.join(run['tests'])} "
                             f"({error!r})") from None
    else:
        cuda = torch.cuda.is_available()
        amp = torch.bfloat16 if cuda and torch.cuda.is_bf16_supported(including_emulation=False) else None
        model = evaluator.load(run["path"], "cuda" if cuda else "cpu")
        results = evaluator.evaluate(*model, run["tests"], amp, args.workers, root=run["root"])
        found = {test: result["per_class"] for test, result in zip(run["tests"], results.values())}
    for test, accuracies in found.items():
        if len(accuracies) != len(names[test]):
            raise SystemExit(f"{test} has {len(names[test])} names, but results of {len(accuracies)} in {args.json}")
    return found


if __name__ == "__main__":
    main()
