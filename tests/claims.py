"""Each paper's claim beside what these scripts measure: trains every row, prints tables (markdown), draws a picture (SVG).

    python tests/claims.py --seeds 3                         the drawn scenes; says beforehand how long it will take
    python tests/claims.py --quick                           one seed, only the rows that a claim cannot do without
    python tests/claims.py --data emoji/train --seeds 3      real pictures, with the test sets in emoji/test

Every row is a command, trained once a seed, one process a core. A finished run is skipped and an unfinished one goes on,
so the command may be stopped and given again. --out keeps the runs, claims.md and claims.svg, which are written anew after
each run.

Three scores of a run are reported, all on pictures that no choice was made by. "Last" is the score after the last step.
"Best" is the score at the step where the tuning set's is highest. "Equal time" is the score after as many seconds as the
first row of the table takes, read between tests along a straight line; the seconds are the log's own, without tests.
"""
import argparse
import json
import math
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from statistics import mean, stdev

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import curves  # noqa: E402
import data  # noqa: E402

BATCH = 128

# Name, minutes on one slow core, command. A name in braces is the last.pt of that row's run with the same seed, which has
# to stand above; every-4 is a file with the keys of every fourth pair.
TOY = [
    ("clip-1024", 4, "clip.py --limit 1024 --epochs 48"),
    ("declip-1024", 11, "declip.py --limit 1024 --epochs 48"),
    ("clip-4096", 4, "clip.py --limit 4096 --epochs 12"),
    ("clip-8192", 4, "clip.py --limit 8192 --epochs 6"),
    ("teacher", 8, "clip.py --limit 24576 --epochs 4"),
    ("tinyclip", 4, "tinyclip.py --limit 1024 --epochs 48 --teacher {teacher}"),
    ("scratch", 3, "tinyclip.py --limit 1024 --epochs 48 --teacher {teacher} --init none --alpha 0 --logit-scale 0"),
    ("protoclip-captions", 6, "protoclip.py --limit 1024 --epochs 48 --teacher-features captions"),
    ("attentive", 15, "aclip.py --data toy-busy --model tiny-4 --limit 4096 --epochs 12"),
    ("random", 12, "aclip.py --data toy-busy --model tiny-4 --limit 4096 --epochs 12 --mask random"),
    ("none", 9, "aclip.py --data toy-busy --model tiny-4 --limit 4096 --epochs 12 --mask none --views 1 --ssl 0"),
    # the rows above are those of --quick
    ("clip-512", 4, "clip.py --limit 512 --epochs 96"),
    ("clip-2048", 4, "clip.py --limit 2048 --epochs 24"),
    ("clip-24576", 4, "clip.py --limit 24576 --epochs 2"),
    ("declip-512", 11, "declip.py --limit 512 --epochs 96"),
    ("declip-2048", 11, "declip.py --limit 2048 --epochs 24"),
    ("declip-4096", 11, "declip.py --limit 4096 --epochs 12"),
    ("declip-8192", 11, "declip.py --limit 8192 --epochs 6"),
    ("clip-longer", 10, "clip.py --limit 1024 --epochs 120"),
    ("declip-views", 9, "declip.py --limit 1024 --epochs 48 --w-nns 0 --w-ssl 0 --w-mlm 0"),
    ("declip-no-neighbors", 11, "declip.py --limit 1024 --epochs 48 --w-nns 0"),
    ("protoclip", 6, "protoclip.py --limit 1024 --epochs 48"),
    ("protoclip-off", 5, "protoclip.py --limit 1024 --epochs 48 --w-proto 0"),
    ("inherit", 3, "tinyclip.py --limit 1024 --epochs 48 --teacher {teacher} --alpha 0 --logit-scale 0"),
    ("mimic", 4, "tinyclip.py --limit 1024 --epochs 48 --teacher {teacher} --init none"),
    ("starved-teacher", 4, "tinyclip.py --limit 1024 --epochs 48 --teacher {clip-1024}"),
]
REAL = [
    ("clip-4", 11, "clip.py --subset {every-4} --epochs 32 --augment declip"),
    ("declip-4", 24, "declip.py --subset {every-4} --epochs 32"),
    ("clip-2", 11, "clip.py --subset {every-2} --epochs 16 --augment declip"),
    ("clip-1", 11, "clip.py --epochs 8 --augment declip"),
    ("teacher", 11, "clip.py --epochs 8"),
    ("tinyclip", 5, "tinyclip.py --subset {every-4} --epochs 16 --shrink .5 --teacher {teacher}"),
    ("scratch", 4, "tinyclip.py --subset {every-4} --epochs 16 --shrink .5 --teacher {teacher} --init none --alpha 0 "
                   "--logit-scale 0"),
    ("clip-proto", 6, "clip.py --subset {every-4} --epochs 16 --augment protoclip"),
    ("protoclip-captions", 8, "protoclip.py --subset {every-4} --epochs 16 --teacher-features captions"),
    ("attentive", 12, "aclip.py --subset {every-4} --epochs 12"),
    ("random", 10, "aclip.py --subset {every-4} --epochs 12 --mask random"),
    ("none", 8, "aclip.py --subset {every-4} --epochs 12 --mask none --views 1 --ssl 0"),
    # the rows above are those of --quick
    ("clip-8", 11, "clip.py --subset {every-8} --epochs 64 --augment declip"),
    ("declip-8", 24, "declip.py --subset {every-8} --epochs 64"),
    ("declip-2", 24, "declip.py --subset {every-2} --epochs 16"),
    ("declip-1", 24, "declip.py --epochs 8"),
    ("clip-longer", 25, "clip.py --subset {every-4} --epochs 74 --augment declip"),
    ("declip-views", 20, "declip.py --subset {every-4} --epochs 32 --w-nns 0 --w-ssl 0 --w-mlm 0"),
    ("declip-no-neighbors", 24, "declip.py --subset {every-4} --epochs 32 --w-nns 0"),
    ("protoclip", 8, "protoclip.py --subset {every-4} --epochs 16"),
    ("protoclip-off", 7, "protoclip.py --subset {every-4} --epochs 16 --w-proto 0"),
    ("starved-teacher", 5, "tinyclip.py --subset {every-4} --epochs 16 --shrink .5 --teacher {clip-4}"),
]
LAST_OF_QUICK = "none"
PROBED = ("clip-1024", "clip-proto", "protoclip", "protoclip-off", "protoclip-captions")

# Title, the paper's claim, rows (the first one is the baseline, which sets the equal time), the method that claims
CLAIMS = [
    ("DeCLIP", "CLIP's accuracy from 7.1 times fewer pairs; each part adds",
     ["clip-1024", "clip-4", "clip-longer", "declip-views", "declip-no-neighbors", "declip-1024", "declip-4"],
     ["declip-1024", "declip-4"]),
    ("ProtoCLIP", "CLIP's accuracy in a third of its time; better zero-shot and probe, most with an external teacher",
     ["clip-1024", "clip-proto", "protoclip-off", "protoclip", "protoclip-captions"], ["protoclip", "protoclip-captions"]),
    ("A-CLIP", "attentive masks over random ones over none; 2.3 times faster than SLIP, and 1.1 points better",
     ["none", "random", "attentive"], ["attentive", "random"]),
    ("TinyCLIP", "the accuracy of training from scratch in 1/1.4 to 1/7.8 of the steps",
     ["scratch", "inherit", "mimic", "starved-teacher", "tinyclip", "teacher"], ["tinyclip", "starved-teacher"]),
]


# what a run's log says

class Run:
    """Tests of one run, in order: steps [n]; seconds [n] of training before them; score and tune [n], in per cent."""

    def __init__(self, steps, seconds, score, tune, extra=None):
        self.steps, self.seconds, self.score, self.tune, self.extra = steps, seconds, score, tune, extra or {}

    def last(self):
        return self.score[-1]

    def best_place(self):
        """Number of the test where the tuning set's score is highest; the first of equal ones."""
        return self.tune.index(max(self.tune))

    def best(self):
        return self.score[self.best_place()]

    def after(self, seconds):
        """Score after so many seconds of training, on straight lines between tests; the last one if it had ended by then,
        the first one if no test had been made."""
        return between(self.seconds, self.score, seconds)

    def reach(self, score):
        """(steps, seconds) at which the score is first reached; None if it never is. At the first test already: of it."""
        place = first_reach(self.score, score)
        return place and tuple(between(range(len(x)), x, place[0]) for x in (self.steps, self.seconds))


def between(x, y, at):
    """y at the place `at` on straight lines through (x, y), x rising; beyond the ends the y of the end."""
    if at <= x[0]:
        return y[0]
    for (x0, y0), (x1, y1) in pairwise(zip(x, y)):
        if at <= x1:
            return y0 + (y1 - y0) * (at - x0) / (x1 - x0)
    return y[-1]


def first_reach(y, target):
    """[place], a fraction, where straight lines through y[0], y[1], ... first come to the target; None if nowhere."""
    if y[0] >= target:
        return [0.]
    for i, (a, b) in enumerate(pairwise(y)):
        if b >= target:
            return [i + (target - a) / (b - a)]
    return None


def pairs_for(curve, score):
    """Pairs that a method needs for a score: curve {pairs: score}, straight lines over the logarithm of the pairs. None if
    the curve nowhere comes so high; its fewest pairs if it begins there."""
    pairs = sorted(curve)
    place = first_reach([curve[n] for n in pairs], score)
    return place and math.exp(between(range(len(pairs)), [math.log(n) for n in pairs], place[0]))


def read_run(folder, report, tune):
    """Run of a folder's log.jsonl; report, tune: (test, metric) each."""
    run, seconds, step = Run([], [], [], []), 0., 0
    for row in map(json.loads, (Path(folder) / "log.jsonl").read_text().splitlines()):
        seconds += row.get("extract_seconds", 0) + row.get("cluster_seconds", 0)  # between ProtoCLIP's episodes
        if "pairs_per_second" in row:
            seconds += (row["step"] - step) * BATCH / row["pairs_per_second"]
            step = row["step"]
        elif report[0] in row.get("eval", {}):
            run.steps.append(row["step"])
            run.seconds.append(seconds)
            for scores, (test, metric) in ((run.score, report), (run.tune, tune)):
                scores.append(100 * row["eval"][test][metric])
    run.extra = {"pairs/s": run.steps[-1] * BATCH / run.seconds[-1]}
    probe = Path(folder) / "probe.json"
    if probe.exists():
        run.extra["probe"] = 100 * next(iter(json.loads(probe.read_text()).values()))["probe"]
    return run


def average(runs):
    """The Run of the means over seeds, whose tests were at the same steps."""
    return Run(runs[0].steps, *([mean(v) for v in zip(*(getattr(run, name) for run in runs))]
                                for name in ("seconds", "score", "tune")))


# tables

def spread(values):
    return f"{mean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")


def share(x):
    return f"{x:.2f}" if x < 1 else f"{x:.1f}"


def verdict(method, baseline, seconds):
    """What stands out between two lists of runs: is the method's worst seed above the baseline's best one?"""
    parts = []
    for name, score in (("last", Run.last), ("best", Run.best), ("equal time", lambda run: run.after(seconds))):
        worst, best = min(map(score, method)), max(map(score, baseline))
        parts.append(f"{name} {worst:.1f} against {best:.1f}" + (" (above)" if worst > best else " (not above)"))
    return ", ".join(parts)


def speed_up(method, baseline):
    """When the mean method comes to the mean baseline's best score, in steps and in time."""
    method, baseline = average(method), average(baseline)
    at, reached = baseline.best_place(), method.reach(baseline.best())
    if not reached:
        return f"never reaches the baseline's best ({baseline.best():.1f} after {baseline.steps[at]} steps)"
    early = "at the latest, since it is there at its first test, " if reached[0] == method.steps[0] else ""
    return (f"reaches the baseline's best ({baseline.best():.1f} after {baseline.steps[at]} steps) after {reached[0]:.0f} steps, "
            f"{early}{share(reached[0] / baseline.steps[at])} of the steps and {share(reached[1] / baseline.seconds[at])} of the "
            f"time; of the baseline's whole time {share(reached[1] / baseline.seconds[-1])}")


def fewer_pairs(curve, pairs, score):
    """In words: how many times fewer pairs than a baseline's curve {pairs: score} needs for the same score."""
    needed = pairs_for(curve, score)
    if needed is None:
        return f"more than {max(curve) / pairs:.1f} (the baseline does not get there)"
    return ("at most " if score <= curve[min(curve)] else "") + f"{needed / pairs:.1f}"


def by_pairs(found, method):
    """{pairs: runs} of the rows "<method>-<number>"; of real data the number divides the pairs."""
    return {int(name.rpartition("-")[2]): runs for name, runs in found.items() if re.fullmatch(rf"{method}-\d+", name)}


def declip_table(found, pairs_of):
    clip, declip = ({pairs_of(n): runs for n, runs in by_pairs(found, name).items()} for name in ("clip", "declip"))
    if len(clip) < 2 or not declip:
        return
    yield "| pairs | CLIP, last | best | DeCLIP, last | best | times fewer pairs, last | best | by seed, last |\n|" + "---|" * 8
    for n in sorted({*clip, *declip}):
        cells = [f"{n:,}"]
        for runs in (clip.get(n), declip.get(n)):
            cells += [spread([run.last() for run in runs]), spread([run.best() for run in runs])] if runs else ["", ""]
        if n in declip:
            for score in (Run.last, Run.best):
                curve = {m: mean(map(score, runs)) for m, runs in clip.items()}
                cells.append(fewer_pairs(curve, n, mean(map(score, declip[n]))))
            shared = min(map(len, [*clip.values(), declip[n]]))
            cells.append("; ".join(fewer_pairs({m: runs[i].last() for m, runs in clip.items()}, n, declip[n][i].last())
                                   for i in range(shared)))
        yield "| " + " | ".join(cells + [""] * (8 - len(cells))) + " |"


def tables(found, rows, pairs_of):
    """Lines of markdown. found: {name of a row: Runs of its seeds}, only of rows that have any."""
    commands = {name: command for name, _, command in rows}
    for title, claim, names, methods in CLAIMS:
        names = [name for name in names if name in found]
        if len(names) < 2:
            continue
        baseline = found[names[0]]
        seconds = mean(run.seconds[-1] for run in baseline)
        yield f"\n### {title}\n\nThe paper: {claim}.\n"
        if title == "DeCLIP":
            yield from declip_table(found, pairs_of)
            yield ""
        yield "| | command | seeds | last | best | equal time | probe | pairs/s |\n|" + "---|" * 8
        for name in names:
            runs = found[name]
            probes = [run.extra["probe"] for run in runs if "probe" in run.extra]
            cells = [name, f"`{commands[name]}`", str(len(runs))]
            cells += [spread([*map(score, runs)]) for score in (Run.last, Run.best, lambda run: run.after(seconds))]
            cells += [spread(probes) if probes else "", f"{mean(run.extra['pairs/s'] for run in runs):.0f}"]
            yield "| " + " | ".join(cells) + " |"
        yield ""
        for name in (name for name in methods if name in names):
            yield (f"{name}: its worst seed against the best of {names[0]}: {verdict(found[name], baseline, seconds)}. "
                   f"It {speed_up(found[name], baseline)}.\n")


def picture(found, pairs_of, metric):
    """SVG: DeCLIP and CLIP over pairs, and each other claim's rows over steps, side by side in twos."""
    panels = []
    over_pairs = {name: {pairs_of(n): [run.last() for run in runs] for n, runs in by_pairs(found, name.lower()).items()}
                  for name in ("CLIP", "DeCLIP")}
    if all(over_pairs.values()):
        panels.append("".join(curves.svg(f"DeCLIP: {metric} after the last step", over_pairs, True)))
    for title, _, names, _ in CLAIMS[1:]:
        shown = {name: {step: [run.score[i] for run in found[name]] for i, step in enumerate(found[name][0].steps)}
                 for name in names if name in found and name != "teacher"}
        if len(shown) > 1:
            panels.append("".join(curves.svg(f"{title}: {metric}", shown, False)))
    width, height = curves.WIDTH + 260, curves.HEIGHT + 80
    inside = [panel.replace("<svg ", f'<svg x="{i % 2 * width}" y="{i // 2 * height}" ', 1) for i, panel in enumerate(panels)]
    return (f'<svg xmlns="http://www.w3.org/2000/svg" width="{2 * width}" height="{-(-len(panels) // 2) * height}">\n'
            + "\n".join(inside) + "\n</svg>\n")


# runs

def train(name, command, seed, args, earlier):
    """Trains a row, or does nothing where it is finished -> seconds, or None if it was; earlier: {(name, seed): Future}.
    RuntimeError with the last line of its output if it fails."""
    out = args.out / f"{name}-{seed}"
    places = {part: args.out / f"{part}-{seed}" / "last.pt" for part in re.findall(r"{([^}]*)}", command)}
    places |= {part: args.out / f"{part}.txt" for part in places if part.startswith("every-")}
    for part in places:
        if (part, seed) in earlier:
            earlier[part, seed].result()
    words = command.format_map(places).split()
    spec = words[words.index("--data") + 1] if "--data" in words else args.data
    epochs = int(words[words.index("--epochs") + 1])
    tests = f"{spec}-tune,{spec}" if args.data == "toy" else ",".join(args.tests)
    words += [] if "--data" in words else ["--data", args.data]
    words += ["--batch-size", BATCH, "--workers", 0, "--eval", tests, "--eval-every", -(-epochs // 8), "--seed", seed, "--out", out]
    done, start = out / "done", time.time()
    if done.exists() and done.read_text() == command:
        return None
    ask(words, out)
    if name in PROBED and args.data == "toy":
        ask(["eval.py", out / "last.pt", "--data", "toy", "--workers", 0, "--probe", "--json", out / "probe.json"], out)
    done.write_text(command)
    return time.time() - start


def ask(words, out):
    """Runs one of the scripts on one core, its output into out/output.txt."""
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "output.txt", "a") as file:
        code = subprocess.run([sys.executable, ROOT / words[0], *map(str, words[1:])], stdout=file, stderr=subprocess.STDOUT,
                              env=os.environ | {"OMP_NUM_THREADS": "1"}).returncode
    if code:
        raise RuntimeError(f"{out / 'output.txt'}: {(out / 'output.txt').read_text().strip().splitlines()[-1]}")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=1, help="runs a row, seeds 0, 1, ... (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="only the rows that a claim cannot do without")
    parser.add_argument("--data", default="toy", help="toy, or training pairs as the scripts take them")
    parser.add_argument("--tests", help="two test sets for --data: one to choose the step by, one to report "
                                        "(default: vendor and concept in the folder test beside the data)")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="runs at a time (default: one a core)")
    parser.add_argument("--out", type=Path, default=None, help="default: runs/claims, runs/claims-real for --data")
    args = parser.parse_args(argv)
    toy = args.data == "toy"
    beside = Path(args.data).parent / "test"
    args.tests = args.tests.split(",") if args.tests else [str(beside / "vendor"), str(beside / "concept")]
    missing = [test for test in args.tests if not toy and not os.path.exists(test)]
    if missing or len(args.tests) != 2:
        raise SystemExit(f"--tests must name two test sets, comma between them; there is no {missing[0] if missing else 'second'}")
    args.out = args.out or Path("runs/claims" if toy else "runs/claims-real")
    args.out.mkdir(parents=True, exist_ok=True)
    rows, total = TOY if toy else REAL, 0
    if args.quick:
        rows = rows[:1 + [name for name, *_ in rows].index(LAST_OF_QUICK)]
    if not toy:
        keys = [key for key, _ in data.captions(args.data)]
        total = len(keys)
        for step in (2, 4, 8):
            (args.out / f"every-{step}.txt").write_text("\n".join(keys[::step]), "utf-8", "surrogateescape")

    def pairs_of(n):
        return n if toy else -(-total // n)

    def report():
        """Writes claims.md and claims.svg of what is finished."""
        found = {}
        for name, _, command in rows:
            for seed in range(args.seeds):
                folder = args.out / f"{name}-{seed}"
                if (folder / "done").exists() and (folder / "done").read_text() == command:
                    spec = "toy-busy" if "toy-busy" in command else "toy"
                    report, tune = ((test, "top1" if toy else "i2t@10")
                                    for test in ([spec, spec + "-tune"] if toy else [Path(t).name for t in args.tests[::-1]]))
                    found.setdefault(name, []).append(read_run(folder, report, tune))
        metric = "top-1, %" if toy else f"recall at 10 on {Path(args.tests[1]).name}, %"
        text = f"Scores: {metric}." + "\n".join(["", *tables(found, rows, pairs_of)])
        (args.out / "claims.md").write_text(text)
        (args.out / "claims.svg").write_text(picture(found, pairs_of, metric))
        return text

    jobs = [(seed, *row) for seed in range(args.seeds) for row in rows]
    waiting = [job for job in jobs if not (args.out / f"{job[1]}-{job[0]}" / "done").exists()]
    minutes = sum(job[2] for job in waiting)
    print(f"{len(waiting)} of {len(jobs)} runs to do, {args.processes} at a time: about {minutes / args.processes / 60:.1f} hours on "
          "slow cores")
    earlier, failed, expected, spent = {}, [], 0, 0
    with ThreadPoolExecutor(args.processes) as pool:
        for seed, name, _, command in jobs:
            earlier[name, seed] = pool.submit(train, name, command, seed, args, earlier)
        try:
            for seed, name, cost, _ in jobs:
                try:
                    seconds = earlier[name, seed].result()
                except RuntimeError as error:
                    failed.append(f"{name}-{seed} failed. {error}")
                    print(failed[-1])
                    continue
                if seconds:
                    expected, spent, minutes = expected + cost, spent + seconds / 60, minutes - cost
                    left = minutes * spent / expected / args.processes
                    print(f"{name}, seed {seed}: {seconds / 60:.1f} minutes; about {left / 60:.1f} hours left", flush=True)
                    report()
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)
            raise SystemExit("stopped; the same command goes on from here") from None
    print(report())
    print(f"{args.out / 'claims.md'}, {args.out / 'claims.svg'}")
    if failed:
        raise SystemExit("\n".join(failed))


if __name__ == "__main__":
    main()
