"""Each paper's claim beside what these scripts measure: trains every row, prints tables, draws a picture.

    python tests/claims.py --seeds 3                         the drawn scenes; says beforehand how long it will take
    python tests/claims.py --quick                           one seed, only the rows that a claim cannot do without
    python tests/claims.py --data emoji/train --seeds 3      real pictures, with the test sets in emoji/test

Every row is a command, trained once a seed, one process a core. A finished run is skipped and an unfinished one goes
on, so the command may be stopped and given again. --out keeps the runs, the tables (claims.md) and the picture
(claims.svg); both are written anew after each run. Flags that are not listed by --help go to every script.

Four scores of a run are reported, all on pictures that no choice was made by. "Last" is the score after the last step.
"Best" is the score at the step where the tuning set's is highest. "Equal time" is the score after as many seconds as
the first row of the table takes, or the fastest of the methods that make the claim if it takes fewer. It is read
between tests along a straight line; the seconds are the log's own, without those of tests. "Recall at 5" is how often,
after the last step, a picture's own caption is among the five that the model ranks highest; another seed moves it less.
The probe, where there is one, is trained and tested on other pictures of the kinds that training names. "Object kept"
is how much of the object A-CLIP's masks keep at the end of a run, and by another picture's attention. Where a run has
other masks, it is what these masks would keep.
"""
import argparse
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import mean, stdev

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import curves  # noqa: E402

BATCH = 128
EVERY = 2, 4, 8  # the shares of real data: every second pair, ...

# Name, minutes on one slow core, command. A name in braces is the last.pt of that row's run with the same seed, which
# has to stand above; every-4 is a file with the keys of every fourth pair.
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
    ("slip", 20, "slip.py --data toy-busy --model tiny-4 --limit 4096 --epochs 12"),
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
    ("attentive-eff", 12, "aclip.py --data toy-busy --model tiny-4 --limit 4096 --epochs 12 --ema-size 16"),
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
    ("slip", 16, "slip.py --subset {every-4} --epochs 12 --model tiny-4"),
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
    ("attentive-eff", 11, "aclip.py --subset {every-4} --epochs 12 --ema-size 16"),
]
LAST_OF_QUICK = "slip"
PROBED = ("clip-1024", "protoclip", "protoclip-off", "protoclip-captions")

# Title, the paper's claim, rows (the first one is the baseline), the methods that make the claim
CLAIMS = [
    ("DeCLIP", "CLIP's accuracy from 7.1 times fewer pairs; each part adds",
     ["clip-1024", "clip-4", "clip-longer", "declip-views", "declip-no-neighbors", "declip-1024", "declip-4"],
     ["declip-1024", "declip-4"]),
    ("ProtoCLIP", "CLIP's accuracy in a third of its time; better zero-shot and probe, most with an external teacher",
     ["clip-1024", "clip-proto", "protoclip-off", "protoclip", "protoclip-captions"],
     ["protoclip", "protoclip-captions"]),
    ("A-CLIP", "attentive masks are better than random ones, and these are better than none",
     ["none", "random", "attentive-eff", "attentive"], ["attentive", "random"]),
    ("A-CLIP against SLIP", "2.3 times SLIP's speed, and 1.1 points better",
     ["slip", "attentive-eff", "attentive"], ["attentive", "attentive-eff"]),
    ("TinyCLIP", "the accuracy of training from scratch in 1/1.4 to 1/7.8 of the steps",
     ["scratch", "inherit", "mimic", "starved-teacher", "tinyclip", "teacher"], ["tinyclip", "starved-teacher"]),
]


# what a run's log says

@dataclass
class Run:
    """n tests of one run, in order: steps [n], seconds [n] of training before each, score and tune [n] in per cent.
    recall: at 5, captions of pictures, of the last test, in per cent. probe: accuracy in per cent. kept: shares of
    the object in A-CLIP's masks, by the picture's own attention and by another's, in per cent."""
    steps: list
    seconds: list
    score: list
    tune: list
    recall: float | None = None
    probe: float | None = None
    kept: list | None = None

    def last(self):
        return self.score[-1]

    def last_recall(self):
        return self.recall

    def best_place(self):
        """Number of the test where the tuning set's score is highest; the first of equal ones."""
        return self.tune.index(max(self.tune))

    def best(self):
        return self.score[self.best_place()]

    def after(self, seconds):
        """Score after so many seconds of training, on straight lines between tests; beyond the ends that of the end."""
        return between(self.seconds, self.score, seconds)

    def reach(self, score):
        """(steps, seconds) at which the score is first reached, those of the first test if it is there already; None if
        it never is."""
        place = first_reach(self.score, score)
        return None if place is None else tuple(between(range(len(x)), x, place) for x in (self.steps, self.seconds))


def between(x, y, at):
    """y at the place `at` on straight lines through the points (x, y), x rising; beyond the ends the y of the end."""
    if at <= x[0]:
        return y[0]
    for (x0, y0), (x1, y1) in pairwise(zip(x, y)):
        if at <= x1:
            return y0 + (y1 - y0) * (at - x0) / (x1 - x0)
    return y[-1]


def first_reach(y, target):
    """Place, a fraction, where straight lines through y[0], y[1], ... first come to the target; None if nowhere."""
    if y[0] >= target:
        return 0.
    for i, (a, b) in enumerate(pairwise(y)):
        if b >= target:
            return i + (target - a) / (b - a)
    return None


def pairs_for(curve, score):
    """Pairs that a method needs for a score: curve {pairs: score}, straight lines over the logarithm of the pairs. None
    if the curve nowhere comes so high; its fewest pairs if it begins there."""
    pairs = sorted(curve)
    place = first_reach([curve[n] for n in pairs], score)
    return None if place is None else math.exp(between(range(len(pairs)), [math.log(n) for n in pairs], place))


def read_run(folder, metric):
    """Run of the log in a folder. The first test set of the run is the one for tuning, the second is reported."""
    run, seconds, step = Run([], [], [], []), 0., 0
    for row in map(json.loads, (folder / "log.jsonl").read_text().splitlines()):
        seconds += row.get("extract_seconds", 0) + row.get("cluster_seconds", 0)  # between ProtoCLIP's episodes
        if "pairs_per_second" in row:
            seconds += (row["step"] - step) * BATCH / row["pairs_per_second"]
            step = row["step"]
        elif "eval" in row:
            tune, score, *_ = (100 * result[metric] for result in row["eval"].values())
            run.steps.append(row["step"])
            run.seconds.append(seconds)
            run.score.append(score)
            run.recall = 100 * [*row["eval"].values()][1]["i2t@5"]
            run.tune.append(tune)
        elif "object_kept" in row:
            run.kept = [100 * row["object_kept"], 100 * row["object_kept_by_chance"]]
    if (folder / "probe.json").exists():
        result, = json.loads((folder / "probe.json").read_text()).values()
        run.probe = 100 * result["probe"]
    return run


def average(runs):
    """The Run of the means over seeds, whose tests were at the same steps."""
    seconds, score, tune = ([mean(v) for v in zip(*(getattr(run, name) for run in runs))]
                            for name in ("seconds", "score", "tune"))
    return Run(runs[0].steps, seconds, score, tune)


# tables

def with_spread(values):
    return f"{mean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")


def share(x):
    return f"{x:.2f}" if x < 1 else f"{x:.1f}"


def verdict(method, baseline, seconds):
    """What stands out between two lists of runs: is the method's worst seed above the baseline's best one?"""
    parts = []
    for name, score in (("last", Run.last), ("best", Run.best), ("equal time", lambda run: run.after(seconds)),
                        ("recall at 5", Run.last_recall)):
        worst, best = min(map(score, method)), max(map(score, baseline))
        parts.append(f"{name} {worst:.1f} against {best:.1f}" + (" (above)" if worst > best else " (not above)"))
    return ", ".join(parts)


def speed_up(method, baseline):
    """When the mean method comes to the mean baseline's best score, in steps and in time."""
    method, baseline = average(method), average(baseline)
    at, reached = baseline.best_place(), method.reach(baseline.best())
    if not reached:
        return f"never reaches the baseline's best ({baseline.best():.1f} after {baseline.steps[at]} steps)"
    steps, seconds = reached
    early = "(its first test) " if steps == method.steps[0] else ""
    return (f"reaches the baseline's best ({baseline.best():.1f} after {baseline.steps[at]} steps) after {steps:.0f} "
            f"steps {early}- in {share(steps / baseline.steps[at])} of the steps, "
            f"{share(seconds / baseline.seconds[at])} of the time, and {share(seconds / baseline.seconds[-1])} of the "
            "time that the whole baseline takes")


def fewer_pairs(curve, pairs, score):
    """How many times fewer pairs than a baseline's curve {pairs: score} needs for the same score; > or < a number where
    the curve ends before it comes there."""
    needed = pairs_for(curve, score)
    if needed is None:
        return f"> {max(curve) / pairs:.1f}"
    return ("< " if score <= curve[min(curve)] else "") + f"{needed / pairs:.1f}"


def by_pairs(found, method):
    """{pairs: runs} of the rows "<method>-<number>"; of real data the number divides the pairs."""
    return {int(name.rpartition("-")[2]): runs for name, runs in found.items() if re.fullmatch(rf"{method}-\d+", name)}


def declip_table(found, pairs_of):
    clip, declip = ({pairs_of(n): runs for n, runs in by_pairs(found, name).items()} for name in ("clip", "declip"))
    if len(clip) < 2 or not declip:
        return
    scores = Run.last, Run.best, Run.last_recall
    yield ("| pairs | CLIP: last | best | recall at 5 | DeCLIP: last | best | recall at 5 | times fewer pairs: last | "
           "best | recall at 5 | last, by seed |")
    yield "|" + "---|" * 11
    for n in sorted({*clip, *declip}):
        cells = [f"{n:,}"]
        for runs in (clip.get(n), declip.get(n)):
            cells += [with_spread([score(run) for run in runs]) if runs else "" for score in scores]
        if n in declip:
            for score in scores:
                curve = {m: mean(map(score, runs)) for m, runs in clip.items()}
                cells.append(fewer_pairs(curve, n, mean(map(score, declip[n]))))
            shared = min(map(len, [*clip.values(), declip[n]]))
            cells.append("; ".join(fewer_pairs({m: runs[i].last() for m, runs in clip.items()}, n, declip[n][i].last())
                                   for i in range(shared)))
        yield "| " + " | ".join(cells + [""] * (11 - len(cells))) + " |"
    yield ("\nTimes fewer pairs: the pairs that CLIP needs for DeCLIP's score, over DeCLIP's; > or < where CLIP's "
           "curve ends before it comes there.")


def tables(found, rows, pairs_of):
    """Lines of markdown. found: {name of a row: Runs of its seeds}, only of rows that have any."""
    commands = {name: command for name, _, command in rows}
    for title, claim, names, methods in CLAIMS:
        names = [name for name in names if name in found]
        if len(names) < 2:
            continue
        baseline = found[names[0]]
        seconds = min(max(run.seconds[-1] for run in found[name]) for name in {names[0], *methods} & {*names})
        yield f"\n### {title}\n\nThe paper: {claim}.\n"
        if title == "DeCLIP":
            yield from declip_table(found, pairs_of)
            yield ""
        extra = {"probe": lambda run: [run.probe], "object kept": lambda run: run.kept or [None]}
        extra = {title: part for title, part in extra.items()  # only where a row has it
                 if any(None not in part(run) for name in names for run in found[name])}
        titles = ["", "command", "seeds", "last", "best", "equal time", "recall at 5", *extra, "pairs/s"]
        yield "| " + " | ".join(titles) + " |"
        yield "|" + "---|" * len(titles)
        for name in names:
            runs = found[name]
            speed = mean(BATCH * run.steps[-1] / run.seconds[-1] for run in runs)
            cells = [name, f"`{commands[name]}`", str(len(runs)), with_spread([run.last() for run in runs]),
                     with_spread([run.best() for run in runs]), with_spread([run.after(seconds) for run in runs]),
                     with_spread([run.recall for run in runs])]
            for part in extra.values():
                values = [part(run) for run in runs if None not in part(run)]
                cells.append("; ".join(map(with_spread, zip(*values))))
            cells.append(f"{speed:.0f}")
            yield "| " + " | ".join(cells) + " |"
        yield ""
        for name in (name for name in methods if name in names):
            yield (f"{name}: its worst seed against the best of {names[0]}: {verdict(found[name], baseline, seconds)}. "
                   f"It {speed_up(found[name], baseline)}.\n")
        if title == "TinyCLIP" and {"tinyclip", "teacher"} <= {*names}:
            student, teacher = (mean(map(Run.last, found[name])) for name in ("tinyclip", "teacher"))
            yield f"tinyclip has half of the teacher's size and {student / teacher:.2f} of its last score.\n"


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
    inside = [panel.replace("<svg ", f'<svg x="{i % 2 * width}" y="{i // 2 * height}" ', 1)
              for i, panel in enumerate(panels)]
    return (f'<svg xmlns="http://www.w3.org/2000/svg" width="{2 * width}" height="{-(-len(panels) // 2) * height}">\n'
            + "\n".join(inside) + "\n</svg>\n")


# runs

@dataclass
class Job:
    """A row with a seed: the names of rows and files that it reads, the words of its command, the folder it writes."""
    name: str
    seed: int
    minutes: float
    needs: list
    words: list
    out: Path

    def finished(self):
        done = self.out / "done"
        return done.exists() and done.read_text() == " ".join(self.words)


def jobs_of(rows, args):
    """Jobs of all rows and seeds, in the order in which they start."""
    jobs = []
    for seed in range(args.seeds):
        for name, minutes, command in rows:
            needs, out = re.findall(r"{([^}]*)}", command), args.out / f"{name}-{seed}"
            files = {row: args.out / f"{row}-{seed}" / "last.pt" for row, *_ in rows}
            files |= {f"every-{step}": args.out / f"every-{step}.txt" for step in EVERY}
            words = command.format_map(files).split()
            words += [] if "--data" in words else ["--data", args.data]
            spec, epochs = words[words.index("--data") + 1], int(words[words.index("--epochs") + 1])
            tests = f"{spec}-tune,{spec}" if args.data == "toy" else args.tests
            words += (f"--batch-size {BATCH} --workers 0 --eval-every {-(-epochs // 8)} --seed {seed}".split()
                      + ["--eval", tests, "--out", str(out), *args.flags])
            jobs.append(Job(name, seed, minutes, needs, words, out))
    return jobs


def train(job, futures):
    """Trains a job, or does nothing where it is finished -> the seconds it took, or None. futures: those of the jobs
    before it, by (name, seed). RuntimeError with the last line of its output if it fails."""
    for name in job.needs:
        if (name, job.seed) in futures:
            futures[name, job.seed].result()
    start = time.time()
    if job.finished():
        return None
    ask(job.words, job.out)
    if job.name in PROBED and "toy-tune,toy" in job.words:
        last, probe = (str(job.out / name) for name in ("last.pt", "probe.json"))
        ask(["eval.py", last, "--data", "toy-seen", "--workers", "0", "--probe", "--json", probe], job.out)
    (job.out / "done").write_text(" ".join(job.words))
    return time.time() - start


running = []  # processes


def ask(words, out):
    """Runs one of the scripts on one core; what it prints goes to out/output.txt."""
    out.mkdir(parents=True, exist_ok=True)
    output = out / "output.txt"
    with open(output, "a") as file:
        process = subprocess.Popen([sys.executable, str(ROOT / words[0]), *words[1:]], stdout=file,
                                   stderr=subprocess.STDOUT, env=os.environ | {"OMP_NUM_THREADS": "1"})
        running.append(process)
        code = process.wait()
        running.remove(process)
    if code:
        raise RuntimeError(f"{output}: {output.read_text().strip().splitlines()[-1]}")


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--seeds", type=int, default=1, help="runs a row, seeds 0, 1, ... (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="only the rows that a claim cannot do without")
    parser.add_argument("--data", default="toy", help="toy (default), or training pairs as the scripts take them")
    parser.add_argument("--tests", metavar="A,B", help="test sets for --data: A chooses the step, B is reported "
                                                       "(default: test/vendor and test/concept beside the data)")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="runs at a time (default: one a core)")
    parser.add_argument("--out", type=Path, help="default: runs/claims, for other --data runs/claims-real")
    args, args.flags = parser.parse_known_args(argv)
    if min(args.seeds, args.processes) < 1:
        raise SystemExit("--seeds and --processes begin at 1")
    if args.data != "toy":
        beside = Path(args.data).parent / "test"
        args.tests = args.tests or f"{beside / 'vendor'},{beside / 'concept'}"
        missing = [test for test in args.tests.split(",") if not os.path.exists(test)]
        if missing or args.tests.count(",") != 1:
            raise SystemExit("; ".join([f"--tests {args.tests}: two test sets are needed",
                                        *(f"there is no {test}" for test in missing)]))
    args.out = args.out or Path("runs/claims" if args.data == "toy" else "runs/claims-real")
    return args


def main(argv=None):
    args = parse_args(argv)
    toy, total = args.data == "toy", 0
    rows = TOY if toy else REAL
    if args.quick:
        rows = rows[:1 + [name for name, *_ in rows].index(LAST_OF_QUICK)]
    args.out.mkdir(parents=True, exist_ok=True)
    if not toy:
        import data  # only here, as it imports torch
        keys = [key for key, _ in data.captions(args.data)]
        total = len(keys)
        for step in EVERY:
            (args.out / f"every-{step}.txt").write_text("\n".join(keys[::step]), "utf-8", "surrogateescape")
    jobs = jobs_of(rows, args)

    def pairs_of(number):
        """Pairs of a row "...-<number>"."""
        return number if toy else -(-total // number)

    def report():
        """Writes claims.md and claims.svg of the jobs that are finished -> the text of claims.md."""
        found = {}
        for job in jobs:
            if job.finished():
                found.setdefault(job.name, []).append(read_run(job.out, "top1" if toy else "i2t@10"))
        metric = "top-1, %" if toy else f"recall at 10 on {Path(args.tests.split(',')[1]).name}, %"
        text = "\n".join([f"Scores: {metric}.", *tables(found, rows, pairs_of)])
        (args.out / "claims.md").write_text(text)
        (args.out / "claims.svg").write_text(picture(found, pairs_of, metric))
        return text

    left = sum(job.minutes for job in jobs if not job.finished())
    print(f"{sum(not job.finished() for job in jobs)} of {len(jobs)} runs to do, {args.processes} at a time: about "
          f"{left / args.processes / 60:.1f} hours on slow cores", flush=True)
    futures, failed, expected, spent = {}, [], 0, 0
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with ThreadPoolExecutor(args.processes) as pool:
        for job in jobs:
            futures[job.name, job.seed] = pool.submit(train, job, futures)
        try:
            for job in jobs:
                try:
                    seconds = futures[job.name, job.seed].result()
                except RuntimeError as error:
                    failed.append(f"{job.name}, seed {job.seed}, failed; {error}")
                    continue
                if seconds:
                    expected, spent, left = expected + job.minutes, spent + seconds / 60, left - job.minutes
                    print(f"{job.name}, seed {job.seed}: {seconds / 60:.1f} minutes; about "
                          f"{left * spent / expected / args.processes / 60:.1f} hours left", flush=True)
                    report()
        except KeyboardInterrupt:  # also SIGTERM's; the scripts save where they are
            for process in running:
                process.terminate()
            pool.shutdown(cancel_futures=True)
            raise SystemExit("stopped; the same command goes on from here") from None
    print(report())
    print(f"The same stands in {args.out / 'claims.md'}, with curves in {args.out / 'claims.svg'}.")
    if failed:
        raise SystemExit("\n".join(failed))


if __name__ == "__main__":
    main()
