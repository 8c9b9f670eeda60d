"""The arithmetic of tests/claims.py on made-up logs; its rows are commands that exist. Nothing is trained."""
import importlib
import json
import math
import re
import subprocess
import sys
import time
from pathlib import Path
from xml.etree import ElementTree

import pytest

import claims
import data


def write_log(folder, rows):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def evaluated(step, top1, tune):
    return {"step": step, "eval": {"toy-tune": {"top1": tune, "i2t@5": 0}, "toy": {"top1": top1, "i2t@5": 2 * top1}}}


def a_log(tmp_path, scores, speed=128.):
    """Log of a run that makes a step a second at speed 128, tested every 10 steps."""
    rows = []
    for i, (top1, tune) in enumerate(scores):
        rows += [{"step": 10 * i + 5, "pairs_per_second": speed}, {"step": 10 * i + 10, "pairs_per_second": speed},
                 evaluated(10 * i + 10, top1, tune)]
    return write_log(tmp_path, rows)


def test_last_best_and_equal_time(tmp_path):
    run = claims.read_run(a_log(tmp_path / "a", [(.10, .2), (.30, .4), (.20, .4), (.40, .3)]), "top1")
    assert run.steps == [10, 20, 30, 40] and run.seconds == pytest.approx([10, 20, 30, 40])
    assert run.last() == pytest.approx(40) and run.recall == pytest.approx(80) and run.probe is None
    assert run.best() == pytest.approx(30)  # the first of the two best by the tuning half, not the best reported one
    assert [run.after(t) for t in (0, 10, 15, 30, 35, 99)] == pytest.approx([10, 10, 20, 20, 30, 40])
    slow = claims.read_run(a_log(tmp_path / "b", [(.10, .2), (.30, .4)], speed=64.), "top1")
    assert slow.seconds == pytest.approx([20, 40]) and slow.after(30) == pytest.approx(20)


def test_the_seconds_are_those_of_training_and_of_clustering(tmp_path):
    rows = [{"step": 1, "extract_seconds": 3, "cluster_seconds": 2}, {"step": 10, "pairs_per_second": 256.},
            evaluated(10, .1, .1), {"step": 11, "extract_seconds": 4, "cluster_seconds": 1},
            {"step": 20, "pairs_per_second": 32.}, {"step": 30, "pairs_per_second": 256.}, evaluated(30, .2, .2)]
    # a step takes half a second; the window that another process slowed does not count
    assert claims.read_run(write_log(tmp_path, rows), "top1").seconds == pytest.approx([10, 25])


def test_a_set_without_captions_is_a_sentence(tmp_path):
    with pytest.raises(RuntimeError, match="need i2t@10 and i2t@5"):
        claims.read_run(a_log(tmp_path, [(.1, .1)]), "i2t@10")


def test_from_when_on_a_method_stays_above_a_baseline():
    baseline = [claims.Run([10, 20, 30], [2., 4., 6.], [5., 15., 9.], [0., 1., .5])]  # highest after 20 steps

    def said(scores):
        return claims.speed_up([claims.Run([10, 20, 30], [1., 3., 4.], scores, [0., 1., 2.])], baseline)

    assert "above the highest one of the baseline (15.0 after 20 steps) from step 20 on" in said([10., 20., 16.])
    assert "after 0.67 of the steps and 0.50 of the time" in said([10., 20., 16.])
    assert "from step 30 on" in said([20., 15., 16.])  # it was above once before, and came down again
    assert "from step 10 on" in said([16., 16., 16.])
    assert "does not end above the highest" in said([20., 20., 15.])


def test_pairs_for_the_same_accuracy():
    curve = {1000: 10., 2000: 20., 4000: 18., 8000: 30.}
    assert claims.pairs_for(curve, 15) == pytest.approx(1000 * math.sqrt(2))  # half way in the logarithm
    assert claims.pairs_for(curve, 20) == pytest.approx(2000)  # the first time
    assert claims.pairs_for(curve, 24) == pytest.approx(4000 * math.sqrt(2))
    assert claims.pairs_for(curve, 31) is None and claims.pairs_for(curve, 3) == pytest.approx(1000)
    assert claims.fewer_pairs(curve, 500, 20) == "4.0"
    assert claims.fewer_pairs(curve, 500, 31) == "> 16.0"
    assert claims.fewer_pairs(curve, 2000, 3) == "< 0.5"


def test_worst_seed_against_best():
    low, high = ([claims.Run([1], [1.], [x], [0.], 2 * x) for x in scores] for scores in ((10., 12.), (12.5, 20.)))
    said = claims.verdict(high, low, 1)
    assert "last 12.5 against 12.0" in said and "recall at 5 25.0 against 24.0" in said
    assert "above" not in said  # two seeds are too few
    low, high = low + low, high + high
    assert claims.verdict(high, low, 1).count("(above)") == 4
    assert claims.verdict(low, high, 1).count("(not above)") == 4


def test_report(tmp_path, monkeypatch, capsys):
    """Of runs that are finished: a table for each claim, the factor in pairs, a picture that is XML; no training."""
    args = claims.parse_args(["--seeds", "2", "--out", str(tmp_path)])
    for job in claims.jobs_of(claims.TOY, args, 2):
        score = .2 + .01 * job.seed + (.1 if job.name.startswith(("declip", "tiny", "attentive")) else 0)
        score += .02 * math.log2(int(job.name[5:]) / 512) if re.fullmatch(r"clip-\d+", job.name) else 0
        a_log(job.out, [(score / 2, .1), (score, .2)])
        if job.name == "attentive":
            with open(job.out / "log.jsonl", "a") as file:
                kept = {"object_kept": .6 + .1 * job.seed, "object_kept_by_chance": .5}
                file.write(json.dumps(kept) + "\n")
        (job.out / "done").write_text(" ".join(job.words))
    monkeypatch.setattr(claims, "ask", None)
    claims.main(["--seeds", "2", "--out", str(tmp_path)])
    text = (tmp_path / "claims.md").read_text()
    assert f"0 of {2 * len(claims.TOY)} runs" in capsys.readouterr().out and text.count("### ") == len(claims.CLAIMS)
    assert ("| 1,024 | 22.5 ± 0.7 | 21.2 ± 0.4 | 22.5 ± 0.7 | 45.0 ± 1.4 | 30.5 ± 0.7 | 25.2 ± 0.4 | 30.5 ± 0.7 | "
            "61.0 ± 1.4 | 16.0 | 16.0 | 16.0 | 16.0 | 16.0; 16.0 |") in text
    assert "- declip-1024 against clip-1024: last 30.0 against 23.0, best" in text
    assert "- attentive against random: " in text and "- declip-1024 against declip-no-neighbors: " in text
    assert text.count("object kept") == 2  # against CLIP and against SLIP
    assert text.count(" | 65.0 ± 7.1; 50.0 ± 0.0 | ") == 2
    assert "| probe |" not in text
    assert len(ElementTree.parse(tmp_path / "claims.svg").getroot()) == len(claims.CLAIMS)
    claims.main(["--quick", "--out", str(tmp_path)])  # asks for fewer rows and seeds, and still reports all
    assert (tmp_path / "claims.md").read_text() == text


def test_equal_time_is_that_of_the_faster_one():
    """SLIP, the baseline, takes 40 s; A-CLIP, which claims to be faster, 20 s: then SLIP is at its second test."""
    found = {"slip": {0: claims.Run([10, 20], [20., 40.], [30., 50.], [0., 0.], 9.)},
             "attentive": {0: claims.Run([10, 20], [10., 20.], [20., 40.], [0., 0.], 9.)}}
    text = "\n".join(claims.tables(found, claims.TOY, int))
    assert "| 1 | 50.0 | 30.0 | 30.0 | 9.0 |" in text and "| 1 | 40.0 | 20.0 | 40.0 | 9.0 |" in text
    assert text.count("### ") == 1  # against CLIP there is no table, because that baseline is missing


def test_the_clock_of_a_row_is_that_of_its_fastest_seed(tmp_path, monkeypatch):
    args = claims.parse_args(["--seeds", "3", "--out", str(tmp_path)])
    for job in claims.jobs_of(claims.TOY, args, 3):
        if job.name in ("slip", "attentive"):
            a_log(job.out, [(.1, .1)], speed=(64., 128., 32.)[job.seed])
            (job.out / "done").write_text(" ".join(job.words))
    monkeypatch.setattr(claims, "train", lambda job, futures: None)
    claims.main(["--out", str(tmp_path)])
    assert (tmp_path / "claims.md").read_text().count(" | 128 |\n") == 2


def test_flags_of_the_rows_are_not_to_be_given():
    for flag in ("--epochs=1", "--lim", "--seed", "--eval-every"):
        with pytest.raises(SystemExit, match=f"{flag.partition('=')[0]}: the rows"):
            claims.parse_args([flag, "3"])
    assert claims.parse_args(["--amp", "off"]).flags == ["--amp", "off"]


def test_finished_runs_are_skipped_and_a_failure_stops_only_what_needs_it(tmp_path, monkeypatch):
    asked = []

    def ask(words, out):
        asked.append(words)
        if out.name == "clip-1024-0":
            raise RuntimeError("no room")
        a_log(out, [(.1, .1)])

    some = "clip-1024", "teacher", "tinyclip", "starved-teacher"
    monkeypatch.setattr(claims, "ask", ask)
    monkeypatch.setattr(claims, "TOY", [row for row in claims.TOY if row[0] in some])
    with pytest.raises(SystemExit, match="clip-1024, seed 0, failed; no room\nstarved-teacher, seed 0, failed; no"):
        claims.main(["--out", str(tmp_path), "--processes", "2"])
    student = next(words for words in asked if words[0] == "tinyclip.py")
    assert str(tmp_path / "teacher-0" / "last.pt") in student and "toy-tune,toy" in student and len(asked) == 3
    with pytest.raises(SystemExit):
        claims.main(["--out", str(tmp_path)])
    assert [words[0] for words in asked[3:]] == ["clip.py"]  # the one that had failed


def test_sigterm_stops_the_scripts_too(tmp_path):
    """Else they would go on by themselves, and the next start would train the same run a second time."""
    script = tmp_path / "sleep.py"
    script.write_text("import time; print('on', flush=True); time.sleep(60)")
    code = f"""if True:
        import claims
        claims.TOY = [("clip-1024", 1, "{script} --epochs 1")]
        claims.main(["--out", "{tmp_path}", "--processes", "1"])"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=Path(claims.__file__).parent, stderr=subprocess.PIPE)
    output = tmp_path / "clip-1024-0" / "output.txt"
    while not (output.exists() and "on" in output.read_text()):
        assert process.poll() is None
        time.sleep(.1)
    process.terminate()
    _, said = process.communicate(timeout=30)  # it waits for the script, which would sleep for a minute
    assert process.returncode == 1 and b"stopped; the same command goes on from here" in said


def test_real_data_need_two_test_sets(tmp_path):
    for flags, said in (([], "no .*vendor; there is no .*concept"), (["--tests", str(tmp_path)], "two test sets")):
        with pytest.raises(SystemExit, match=said):
            claims.main(["--data", str(tmp_path / "train"), "--out", str(tmp_path / "out"), *flags])
    (tmp_path / "test" / "vendor").mkdir(parents=True)
    (tmp_path / "test" / "concept").mkdir()
    args = claims.parse_args(["--data", str(tmp_path / "train")])
    job = next(job for job in claims.jobs_of(claims.REAL, args, 1) if job.name == "starved-teacher")
    assert {"runs/claims-real/every-4.txt", "runs/claims-real/clip-4-0/last.pt", args.tests, args.data} <= {*job.words}


@pytest.mark.parametrize("rows", (claims.TOY, claims.REAL))
def test_rows_are_commands_that_their_scripts_accept(rows):
    names = [name for name, *_ in rows]
    assert len({*names}) == len(names) and claims.LAST_OF_QUICK in names
    for i, (_, _, command) in enumerate(rows):
        script, *flags = re.sub(r"{[^}]*}", "x", command).split()
        importlib.import_module(script.removesuffix(".py")).parse_args(flags)
        files = {*names[:i], "every-2", "every-4", "every-8"}
        assert {*re.findall(r"{([^}]*)}", command)} <= files and "--epochs" in flags
        assert "--data" not in flags or flags[flags.index("--data") + 1] in data.TOYS


def test_the_tables_hold_all_that_claims_need_and_three_seeds_take_a_night():
    assert {row[0] for row in claims.TOY + claims.REAL} >= {
        name for *_, names, pairs in claims.CLAIMS for name in [*names, *(name for pair in pairs for name in pair)]}
    assert 3 * sum(minutes for _, minutes, _ in claims.TOY) / 2 / 60 < 8  # hours on two cores
