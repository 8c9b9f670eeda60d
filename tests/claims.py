"""Each paper's claim beside what these scripts measure: trains every row, prints tables, draws a picture.

    python tests/claims.py --seeds 3                         the drawn scenes; says beforehand how long it will take
    python tests/claims.py --quick                           one seed, only the rows that a claim cannot do without
    python tests/claims.py --data emoji/train --seeds 3      real pictures, with the test sets in emoji/test

Every row is a command, trained once a seed, one process a core. A finished run is skipped and an unfinished one goes
on, so the command may be stopped and given again. --out keeps the runs, the tables (claims.md) and the picture
(claims.svg) of all finished runs; both are written anew after each run. Flags that are not listed by --help go to every
script.

Scores are on pictures that no choice was made by, unless it is said. "Last" is the score after the last step. "Best" is
the score at the step where the tuning set's is highest. "Equal time" is the score after as many seconds as the first
row of the table takes, or the fastest of the methods that make the claim if it takes fewer; it is read between tests
along a straight line. "Recall at 5" is how often, after the last step, a picture's own caption is among the five that
the model ranks highest. On drawn scenes it is 15.6 % by chance, 62.5 % by the colour alone, and 100 % by the colour and
the background, dark or bright, so it says little about shapes. "Both sets" is the mean of the last scores on the
reported and the tuning set. It counts more pictures, but the recipes were chosen by the tuning set.

Seconds are those of training, without tests. Other work on the machine slows some runs. So a step takes as long as the
median of the log's windows says, and all seeds of a row have the clock of the fastest one.

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
from statistics import mean, median, stdev

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
    ("random-one-view", 8, "aclip.py --data toy-busy --model tiny-4 --limit 4096 --epochs 12 --mask random "
                           "--views 1 --ssl 0"),
    ("attentive-one-view", 10, "aclip.py --data toy-busy --model tiny-4 --limit 4096 --epochs 12 --views 1 --ssl 0"),
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
    ("scratch-24576", 3, "tinyclip.py --limit 24576 --epochs 2 --teacher {teacher} --init none --alpha 0 "
                         "--logit-scale 0"),
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
OWN = "--batch-size --epochs --seed --limit --subset --eval --eval-every --restart".split()  # flags not to be handed on
PROBED = ("clip-1024", "protoclip", "protoclip-off", "protoclip-captions")

# Title, the paper's claim, rows (the first one is the baseline), which rows the claim says are above which
CLAIMS = [
    ("DeCLIP", "CLIP's accuracy from 7.1 times fewer pairs; each part adds",
     ["clip-1024", "clip-4", "clip-longer", "declip-views", "declip-no-neighbors", "declip-1024", "declip-4"],
     [("declip-1024", "clip-1024"), ("declip-1024", "clip-longer"), ("declip-4", "clip-4"), ("declip-4", "clip-longer"),
      ("declip-views", "clip-1024"), ("declip-views", "clip-4"), ("declip-no-neighbors", "declip-views"),
      ("declip-1024", "declip-no-neighbors"), ("declip-4", "declip-no-neighbors")]),
    ("ProtoCLIP", "CLIP's accuracy in a third of its time; better zero-shot and probe, most with an external teacher",
     ["clip-1024", "clip-proto", "protoclip-off", "protoclip", "protoclip-captions"],
     [("protoclip", "clip-1024"), ("protoclip", "clip-proto"), ("protoclip", "protoclip-off"),
      ("protoclip-captions", "clip-1024"), ("protoclip-captions", "clip-proto"), ("protoclip-captions", "protoclip")]),
    ("A-CLIP", "attentive masks are better than none; without self-supervision 3.3 to 4.5 points above random ones",
     ["none", "random-one-view", "attentive-one-view", "random", "attentive-eff", "attentive"],
     [("attentive-one-view", "random-one-view"), ("attentive", "random"), ("random", "none"), ("attentive", "none")]),
    ("A-CLIP against SLIP", "2.3 times SLIP's speed, and 1.1 points better",
     ["slip", "attentive-eff", "attentive"], [("attentive", "slip"), ("attentive-eff", "slip")]),
    ("TinyCLIP", "the accuracy of training from scratch in 1/1.4 to 1/7.8 of the steps",
     ["scratch", "scratch-24576", "inherit", "mimic", "starved-teacher", "tinyclip", "teacher"],
     [("tinyclip", "scratch"), ("tinyclip", "scratch-24576"), ("inherit", "scratch"), ("mimic", "scratch"),
      ("starved-teacher", "scratch")]),
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

    def both(self):
        """The mean of the last scores on the reported and the tuning set."""
        return (self.score[-1] + self.tune[-1]) / 2

    def best_place(self):
        """Number of the test where the tuning set's score is highest; the first of equal ones."""
        return self.tune.index(max(self.tune))

    def best(self):
        return self.score[self.best_place()]

    def after(self, seconds):
        """Score after so many seconds of training, on straight lines between tests; beyond the ends that of the end."""
        return between(self.seconds, self.score, seconds)


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
    """Run of the log in a folder. The first test set of the run is the one for tuning, the second is reported.
    RuntimeError if its tests do not have the metric."""
    run, between_steps, paces, waited = Run([], [], [], []), [], [], 0.
    for row in map(json.loads, (folder / "log.jsonl").read_text().splitlines()):
        waited += row.get("extract_seconds", 0) + row.get("cluster_seconds", 0)  # between ProtoCLIP's episodes
        if "pairs_per_second" in row:
            paces.append(BATCH / row["pairs_per_second"])
        elif "eval" in row:
            tune, report, *_ = row["eval"].values()
            if not {metric, "i2t@5"} <= {*tune} & {*report}:
                raise RuntimeError(f"{folder}: both test sets need {metric} and i2t@5, so classes and captions")
            run.steps.append(row["step"])
            between_steps.append(waited)
            run.score.append(100 * report[metric])
            run.tune.append(100 * tune[metric])
            run.recall = 100 * report["i2t@5"]
        elif "object_kept" in row:
            run.kept = [100 * row["object_kept"], 100 * row["object_kept_by_chance"]]
    run.seconds = [step * median(paces) + seconds for step, seconds in zip(run.steps, between_steps)]
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
    """Of two lists of runs: the method's worst seed beside the baseline's best one, and with three seeds of each,
    whether it is above."""
    parts = []
    for name, score in (("last", Run.last), ("best", Run.best), ("equal time", lambda run: run.after(seconds)),
                        ("recall at 5", Run.last_recall)):
        worst, best = min(map(score, method)), max(map(score, baseline))
        word = " (above)" if worst > best else " (not above)"
        parts.append(f"{name} {worst:.1f} against {best:.1f}" + (word if min(len(method), len(baseline)) > 2 else ""))
    return ", ".join(parts)


def speed_up(method, baseline):
    """From which test on the mean of a method stays above the highest mean of a baseline, at whichever test that is."""
    method, baseline = average(method), average(baseline)
    highest = max(baseline.score)
    at = baseline.steps[baseline.score.index(highest)]
    target = f"the highest one of the baseline ({highest:.1f} after {at} steps)"
    below = [i for i, score in enumerate(method.score) if score <= highest]
    first = below[-1] + 1 if below else 0
    if first == len(method.score):
        return f"does not end above {target}"
    return (f"stays above {target} from step {method.steps[first]} on, after "
            f"{share(method.steps[first] / baseline.steps[-1])} of the steps and "
            f"{share(method.seconds[first] / baseline.seconds[-1])} of the time of the whole baseline")


def fewer_pairs(curve, pairs, score):
    """How many times fewer pairs than a baseline's curve {pairs: score} needs for the same score; > or < a number where
    the curve ends before it comes there."""
    needed = pairs_for(curve, score)
    if needed is None:
        return f"> {max(curve) / pairs:.1f}"
    return ("< " if score <= curve[min(curve)] else "") + f"{needed / pairs:.1f}"


def by_pairs(found, method):
    """{pairs: {seed: run}} of the rows "<method>-<number>"; of real data the number divides the pairs."""
    return {int(name.rpartition("-")[2]): runs for name, runs in found.items() if re.fullmatch(rf"{method}-\d+", name)}


def declip_table(found, pairs_of):
    clip, declip = ({pairs_of(n): runs for n, runs in by_pairs(found, name).items()} for name in ("clip", "declip"))
    if len(clip) < 2 or not declip:
        return
    scores = Run.last, Run.both, Run.best, Run.last_recall
    yield ("| pairs | CLIP: last | both sets | best | recall at 5 | DeCLIP: last | both sets | best | recall at 5 | "
           "times fewer pairs: last | both sets | best | recall at 5 | both sets, by seed |")
    yield "|" + "---|" * 14
    for n in sorted({*clip, *declip}):
        cells = [f"{n:,}"]
        for runs in (clip.get(n), declip.get(n)):
            cells += [with_spread(list(map(score, runs.values()))) if runs else "" for score in scores]
        if n in declip:
            for score in scores:
                curve = {m: mean(map(score, runs.values())) for m, runs in clip.items()}
                cells.append(fewer_pairs(curve, n, mean(map(score, declip[n].values()))))
            shared = [seed for seed in declip[n] if all(seed in runs for runs in clip.values())]
            cells.append("; ".join(fewer_pairs({m: runs[seed].both() for m, runs in clip.items()}, n,
                                               declip[n][seed].both()) for seed in shared))
        yield "| " + " | ".join(cells + [""] * (14 - len(cells))) + " |"
    yield ("\nTimes fewer pairs: the pairs that CLIP needs for DeCLIP's score, over DeCLIP's; > or < where CLIP's "
           "curve ends before it comes there.")


def tables(found, rows, pairs_of):
    """Lines of markdown. found: {name of a row: {seed: Run}}, only of rows that have any. A claim is left out as long
    as its baseline is missing."""
    commands = {name: command for name, _, command in rows}
    for title, claim, names, pairs in CLAIMS:
        names = [name for name in names if name in commands]
        if len({*names} & {*found}) < 2 or names[0] not in found:
            continue
        names = [name for name in names if name in found]
        runs_of = {name: list(found[name].values()) for name in names}
        pairs = [pair for pair in pairs if {*pair} <= {*names}]
        seconds = min(runs_of[name][0].seconds[-1] for name in {names[0], *(method for method, _ in pairs)})
        yield f"\n### {title}\n\nThe paper: {claim}.\n"
        if title == "DeCLIP":
            yield from declip_table(found, pairs_of)
            yield ""
        extra = {"probe": lambda run: [run.probe], "object kept": lambda run: run.kept or [None]}
        extra = {title: part for title, part in extra.items()  # only where a row has it
                 if any(None not in part(run) for runs in runs_of.values() for run in runs)}
        titles = ["", "command", "seeds", "last", "best", "equal time", "recall at 5", *extra, "pairs/s"]
        yield "| " + " | ".join(titles) + " |"
        yield "|" + "---|" * len(titles)
        for name, runs in runs_of.items():
            cells = [name, f"`{commands[name]}`", str(len(runs)), with_spread([run.last() for run in runs]),
                     with_spread([run.best() for run in runs]), with_spread([run.after(seconds) for run in runs]),
                     with_spread([run.recall for run in runs])]
            for part in extra.values():
                values = [part(run) for run in runs if None not in part(run)]
                cells.append("; ".join(map(with_spread, zip(*values))))
            cells.append(f"{BATCH * runs[0].steps[-1] / runs[0].seconds[-1]:.0f}")
            yield "| " + " | ".join(cells) + " |"
        yield "\nThe worst seed of a row against the best seed of another:\n"
        for method, baseline in pairs:
            yield (f"- {method} against {baseline}: {verdict(runs_of[method], runs_of[baseline], seconds)}. "
                   f"The mean {speed_up(runs_of[method], runs_of[baseline])}.")
        if title == "TinyCLIP" and {"tinyclip", "teacher"} <= {*names}:
            student, teacher = (mean(map(Run.last, runs_of[name])) for name in ("tinyclip", "teacher"))
            yield f"- tinyclip has half of the teacher's size and {student / teacher:.2f} of its last score."


def picture(found, pairs_of, metric):
    """SVG: DeCLIP and CLIP over pairs, and each other claim's rows over steps, side by side in twos."""
    panels = []
    over_pairs = {name: {pairs_of(n): [run.last() for run in runs.values()]
                         for n, runs in by_pairs(found, name.lower()).items()} for name in ("CLIP", "DeCLIP")}
    if all(over_pairs.values()):
        panels.append("".join(curves.svg(f"DeCLIP: {metric} after the last step", over_pairs, True)))
    for title, _, names, _ in CLAIMS[1:]:
        shown = {name: {step: [run.score[i] for run in found[name].values()]
                        for i, step in enumerate(next(iter(found[name].values())).steps)}
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
    """A row with a seed: the names of rows and files that it reads, the words of its command, the folder it writes, and
    what counts there."""
    name: str
    seed: int
    minutes: float
    needs: list
    words: list
    out: Path
    metric: str

    def finished(self):
        done = self.out / "done"
        return done.exists() and done.read_text() == " ".join(self.words)


def jobs_of(rows, args, seeds):
    """Jobs of all rows and seeds, in the order in which they start."""
    jobs = []
    for seed in range(seeds):
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
            jobs.append(Job(name, seed, minutes, needs, words, out, "top1" if args.data == "toy" else "i2t@10"))
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
    read_run(job.out, job.metric)
    (job.out / "done").write_text(" ".join(job.words))
    return time.time() - start


running = []  # processes


def ask(words, out):
    """Runs one of the scripts on one core; what it prints goes to out/output.txt."""
    out.mkdir(parents=True, exist_ok=True)
    output = out / "output.txt"
    with open(output, "a") as file:
        process = subprocess.Popen([sys.executable, str(ROOT / words[0]), *words[1:]], stdout=file,
                                   stderr=subprocess.STDOUT, env=os.environ | {"OMP_NUM_THREADS": "1"},
                                   start_new_session=True)  # a Ctrl-C reaches it as a SIGTERM, at which it saves
        running.append(process)
        code = process.wait()
        running.remove(process)
    if code:
        raise RuntimeError(f"{output}: {(output.read_text().strip() or f'exit status {code}').splitlines()[-1]}")


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--seeds", type=int, default=1, help="runs a row, seeds 0, 1, ... (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="only the rows that a claim cannot do without")
    parser.add_argument("--data", default="toy", help="toy (default), or training pairs as the scripts take them")
    parser.add_argument("--tests", metavar="A,B", help="test sets for --data: A chooses the step, B is reported "
                                                       "(default: test/vendor and test/concept beside the data)")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parser.add_argument("--processes", type=int, default=cores, help="runs at a time (default: one a core)")
    parser.add_argument("--out", type=Path, help="default: runs/claims, for other --data runs/claims-real")
    args, args.flags = parser.parse_known_args(argv)
    if min(args.seeds, args.processes) < 1:
        raise SystemExit("--seeds and --processes begin at 1")
    for flag in (flag.partition("=")[0] for flag in args.flags if flag.startswith("--")):
        if any(own.startswith(flag) for own in OWN):
            raise SystemExit(f"{flag}: the rows of this script give {', '.join(OWN)} themselves")
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
    all_rows = TOY if toy else REAL
    rows = all_rows[:1 + [name for name, *_ in all_rows].index(LAST_OF_QUICK)] if args.quick else all_rows
    args.out.mkdir(parents=True, exist_ok=True)
    if not toy:
        import data  # only here, as it imports torch
        keys = list(dict.fromkeys(key for key, _ in data.captions(args.data)))
        total = len(keys)
        for step in EVERY:
            (args.out / f"every-{step}.txt").write_text("\n".join(keys[::step]), "utf-8", "surrogateescape")
    jobs = jobs_of(rows, args, args.seeds)

    def pairs_of(number):
        """Pairs of a row "...-<number>"."""
        return number if toy else -(-total // number)

    def report():
        """Writes claims.md and claims.svg of all finished runs, also of rows and seeds not asked for now -> the text of
        claims.md."""
        seeds = [int(done.parent.name.rpartition("-")[2]) for done in args.out.glob("*-[0-9]/done")]
        found = {}
        for job in jobs_of(all_rows, args, max(seeds, default=0) + 1):
            if job.finished():
                found.setdefault(job.name, {})[job.seed] = read_run(job.out, job.metric)
        for runs in found.values():
            fastest = min((run.seconds for run in runs.values()), key=lambda seconds: seconds[-1])
            for run in runs.values():
                run.seconds = fastest
        metric = "top-1, %" if toy else f"recall at 10 on {Path(args.tests.split(',')[1]).name}, %"
        flags = f" All commands with `{' '.join(args.flags)}`." if args.flags else ""
        text = "\n".join([f"Scores: {metric}.{flags}", *tables(found, all_rows, pairs_of)])
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
            pool.shutdown(wait=False, cancel_futures=True)
            for process in running:
                process.terminate()
            raise SystemExit("stopped; the same command goes on from here") from None
    print(report())
    print(f"The same stands in {args.out / 'claims.md'}, with curves in {args.out / 'claims.svg'}.")
    if failed:
        raise SystemExit("\n".join(failed))


if __name__ == "__main__":
    main()
