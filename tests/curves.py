"""Curves from the logs of runs as an SVG: recall at 10 on a test set, mean and standard deviation over runs.

    python tests/curves.py concept "CLIP=runs/a,runs/b" "Proto=runs/c,runs/d" > steps.svg    each evaluation, over steps
    python tests/curves.py concept "CLIP:1389=runs/a" "CLIP:2778=runs/b,runs/c" > pairs.svg   the last one, over pairs
    python tests/curves.py counts.csv toy-seen "CLIP=runs/a,runs/b" > counts.svg
                                            accuracy over the counts of concepts, from frequency.py --csv
"""
import csv
import json
import math
import sys
from itertools import cycle
from pathlib import Path
from statistics import mean, stdev

WIDTH, HEIGHT = 384, 280  # of the axes
# Okabe and Ito's, which the colour-blind tell apart
COLORS = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"


def recalls(run, test):
    """{step: per cent} of a run."""
    rows = [json.loads(line) for line in (Path(run) / "log.jsonl").read_text().splitlines()]
    return {row["step"]: 100 * row["eval"][test]["i2t@10"] for row in rows if "eval" in row}


def read(test, specs):
    """{name: {x: values of all runs}}, and whether x is a number of pairs."""
    curves = {}
    for spec in specs:
        name, _, runs = spec.partition("=")
        name, _, pairs = name.partition(":")
        points = curves.setdefault(name, {})
        for curve in (recalls(run, test) for run in runs.split(",")):
            for step in [max(curve)] if pairs else curve:
                points.setdefault(int(pairs or step), []).append(curve[step])
    return curves, bool(pairs)


def frequencies(path, test, specs):
    """{name: {count of a bin's upper edge: mean accuracies in the bin, one a checkpoint}} from frequency.py's --csv;
    a curve for each checkpoint if there are no specs."""
    sys.path.insert(0, str(Path(__file__).parent.parent))
    import frequency  # only here, since it takes seconds
    with open(path) as file:
        rows = [row for row in csv.DictReader(file) if row["test"] == test]
    curves = {}
    for spec in specs or dict.fromkeys(row["checkpoint"] for row in rows):
        name, _, checkpoints = spec.partition("=")
        points = curves.setdefault(name, {})
        for checkpoint in (checkpoints or name).split(","):
            mine = [(int(row["count"]), float(row["accuracy"])) for row in rows if row["checkpoint"] == checkpoint]
            if not mine:
                raise SystemExit(f"{path} has no rows of {checkpoint} on {test}")
            edges, means, _ = frequency.binned(*zip(*mine))
            for edge, value in zip(edges, means):
                if not math.isnan(value):  # an empty bin
                    points.setdefault(math.exp(edge), []).append(value)
    if not curves:
        raise SystemExit(f"{path} has no rows on {test}")
    return curves


def svg(title, curves, pairs, label=None):
    """Lines of an SVG. curves: {name: {x: values of all runs}}, in per cent. pairs: x is a number of pairs, on a
    logarithmic axis, else of steps. label: what x is, if it is neither."""
    ticks = sorted({x for points in curves.values() for x in points})
    every = [values for points in curves.values() for values in points.values()]
    low = max(0, 5 * math.floor(min(mean(v) - spread(v) for v in every) / 5))
    high = max(low + 5, 5 * math.ceil(max(mean(v) + spread(v) for v in every) / 5))
    scale = math.log if pairs else float

    def right(x):
        return 60 + (WIDTH - 20) * (scale(x) - scale(ticks[0])) / (scale(ticks[-1]) - scale(ticks[0]) or 1)

    def down(y):
        return 34 + HEIGHT * (high - y) / (high - low)

    yield (f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH + 260}" height="{HEIGHT + 80}" '
           'font-family="sans-serif" font-size="12">')
    yield f'<rect width="100%" height="100%" fill="white"/><text x="50" y="20" font-size="14">{title}</text>'
    for y in range(low, high + 1, 5):
        yield f'<path d="M50 {down(y):.1f}h{WIDTH}" stroke="#ddd"/>'
        yield f'<text x="44" y="{down(y) + 4:.1f}" text-anchor="end">{y}</text>'
    shown = -math.inf
    for x in ticks:
        if right(x) - shown > 44:  # else the numbers would overlap
            shown = right(x)
            yield f'<path d="M{shown:.1f} {HEIGHT + 34}v4" stroke="black"/>'
            yield f'<text x="{shown:.1f}" y="{HEIGHT + 51}" text-anchor="middle">{x:,.0f}</text>'
    yield f'<path d="M50 34v{HEIGHT}h{WIDTH}" fill="none" stroke="black"/>'
    yield (f'<text x="{50 + WIDTH / 2}" y="{HEIGHT + 72}" text-anchor="middle">'
           f'{label or ("training pairs" if pairs else "steps")}</text>')
    ends = []  # where the names of the curves stand
    for (name, points), color in zip(curves.items(), cycle(COLORS)):
        places = [(right(x), down(mean(v)), HEIGHT * spread(v) / (high - low)) for x, v in sorted(points.items())]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y, _ in places)
        yield f'<polyline fill="none" stroke="{color}" stroke-width="2" points="{line}"/>'
        for x, y, s in places:
            yield f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{color}"/>'
            yield f'<path d="M{x:.1f} {y - s:.1f}V{min(y + s, down(low)):.1f}" stroke="{color}"/>'
        ends.append((y, name, color))
    free = -math.inf
    for y, name, color in sorted(ends):  # from the top down, a line apart
        free = max(y + 4, free + 14)
        yield f'<text x="{WIDTH + 58}" y="{free:.1f}" fill="{color}">{name}</text>'
    yield "</svg>"


def spread(values):
    return stdev(values) if len(values) > 1 else 0.


if __name__ == "__main__":
    if len(sys.argv) < 3:
        raise SystemExit(__doc__)
    if sys.argv[1].endswith(".csv"):
        curves, label = frequencies(sys.argv[1], sys.argv[2], sys.argv[3:]), "captions that mention the concept"
        print(*svg(f"Accuracy on {sys.argv[2]}, %", curves, True, label), sep="\n")
    else:
        print(*svg(f"Recall at 10 on {sys.argv[1]}, %", *read(sys.argv[1], sys.argv[2:])), sep="\n")
