"""The arithmetic of tests/claims.py on made-up logs, and that its tables hold only commands that exist. Nothing is trained."""
import importlib
import json
import math
import re

import pytest

import claims
import data
from conftest import ROOT


def write_log(folder, rows):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def evaluated(step, top1, tune):
    return {"step": step, "eval": {"toy-tune": {"top1": tune}, "toy": {"top1": top1}}}


def a_log(tmp_path, scores, speed=128.):
    """Log of a run that makes a step a second at speed 128, tested every 10 steps."""
    rows = []
    for i, (top1, tune) in enumerate(scores):
        rows += [{"step": 10 * i + 5, "pairs_per_second": speed}, {"step": 10 * i + 10, "pairs_per_second": speed},
                 evaluated(10 * i + 10, top1, tune)]
    return write_log(tmp_path, rows)


TOY = ("toy", "top1"), ("toy-tune", "top1")


def test_last_best_and_equal_time(tmp_path):
    run = claims.read_run(a_log(tmp_path / "a", [(.10, .2), (.30, .4), (.20, .4), (.40, .3)]), *TOY)
    assert run.steps == [10, 20, 30, 40] and run.seconds == pytest.approx([10, 20, 30, 40])
    assert run.last() == pytest.approx(40) and run.extra == {"pairs/s": pytest.approx(128)}
    assert run.best() == pytest.approx(30)  # chosen by the tuning half, of equal ones the first; not the best reported one
    assert [run.after(t) for t in (0, 10, 15, 30, 35, 99)] == pytest.approx([10, 10, 20, 20, 30, 40])
    slow = claims.read_run(a_log(tmp_path / "b", [(.10, .2), (.30, .4)], speed=64.), *TOY)
    assert slow.seconds == pytest.approx([20, 40]) and slow.after(30) == pytest.approx(20)


def test_the_seconds_are_those_of_training_and_of_clustering(tmp_path):
    rows = [{"step": 1, "extract_seconds": 3, "cluster_seconds": 2}, {"step": 10, "pairs_per_second": 256.}, evaluated(10, .1, .1),
            {"step": 11, "extract_seconds": 4, "cluster_seconds": 1}, {"step": 30, "pairs_per_second": 128.}, evaluated(30, .2, .2)]
    assert claims.read_run(write_log(tmp_path, rows), *TOY).seconds == pytest.approx([10, 35])


def test_when_a_score_is_reached():
    run = claims.Run([10, 20, 30], [1., 3., 4.], [10., 20., 15.], [0., 1., 2.])
    assert run.reach(15) == pytest.approx((15, 2)) and run.reach(20) == pytest.approx((20, 3)) and run.reach(20.1) is None
    assert run.reach(5) == pytest.approx((10, 1))  # it was there at its first test
    assert "never reaches" in claims.speed_up([run], [claims.Run([10, 20], [1., 2.], [10., 30.], [0., 1.])])
    said = claims.speed_up([run], [claims.Run([10, 20, 30], [2., 4., 6.], [5., 15., 9.], [0., 1., .5])])
    assert "(15.0 after 20 steps) after 15 steps, 0.75 of the steps and 0.50 of the time" in said and "whole time 0.33" in said


def test_pairs_for_the_same_accuracy():
    curve = {1000: 10., 2000: 20., 4000: 18., 8000: 30.}
    assert claims.pairs_for(curve, 15) == pytest.approx(1000 * math.sqrt(2))  # half way in the logarithm
    assert claims.pairs_for(curve, 20) == pytest.approx(2000) and claims.pairs_for(curve, 24) == pytest.approx(4000 * math.sqrt(2))
    assert claims.pairs_for(curve, 31) is None and claims.pairs_for(curve, 3) == pytest.approx(1000)
    assert claims.fewer_pairs(curve, 500, 20) == "4.0" and claims.fewer_pairs(curve, 500, 31).startswith("more than 16.0")
    assert claims.fewer_pairs(curve, 2000, 3) == "at most 0.5"


def test_worst_seed_against_best():
    low, high = ([claims.Run([1], [1.], [x], [0.]) for x in scores] for scores in ((10., 12.), (12.5, 20.)))
    assert claims.verdict(high, low, 1).count("(above)") == 3 and "last 12.5 against 12.0" in claims.verdict(high, low, 1)
    assert claims.verdict(low, high, 1).count("(not above)") == 3


def test_report(tmp_path, monkeypatch, capsys):
    """From finished runs alone: nothing is trained, a table for each claim, the factor in pairs, a picture that is XML."""
    for name, _, command in claims.TOY:
        test = "toy-busy" if "toy-busy" in command else "toy"
        for seed in (0, 1):
            score = .2 + .01 * seed + (.1 if name.startswith(("declip", "tiny", "attentive")) else 0)
            score += .02 * math.log2(int(name[5:]) / 512) if re.fullmatch(r"clip-\d+", name) else 0
            text = a_log(tmp_path / f"{name}-{seed}", [(score / 2, .1), (score, .2)]) / "log.jsonl"
            text.write_text(text.read_text().replace('"toy', f'"{test}'))
            (tmp_path / f"{name}-{seed}" / "done").write_text(command)
    monkeypatch.setattr(claims, "ask", None)
    claims.main(["--seeds", "2", "--out", str(tmp_path)])
    text = (tmp_path / "claims.md").read_text()
    assert f"0 of {2 * len(claims.TOY)} runs" in capsys.readouterr().out and text.count("### ") == len(claims.CLAIMS)
    assert "| 1,024 | 22.5 ± 0.7 | 22.5 ± 0.7 | 30.5 ± 0.7 | 30.5 ± 0.7 | 16.0 | 16.0 | 16.0; 16.0 |" in text
    assert "declip-1024: its worst seed against the best of clip-1024: last 30.0 against 23.0 (above)" in text
    from xml.etree import ElementTree
    assert len(ElementTree.parse(tmp_path / "claims.svg").getroot()) == len(claims.CLAIMS)


def test_a_failure_says_where_and_the_other_rows_go_on(tmp_path, monkeypatch):
    asked = []

    def ask(words, out):
        asked.append(words)
        if out.name == "clip-1024-0":
            raise RuntimeError("no room")
        a_log(out, [(.1, .1)])

    monkeypatch.setattr(claims, "ask", ask)
    monkeypatch.setattr(claims, "TOY", [row for row in claims.TOY if row[0] in ("clip-1024", "teacher", "tinyclip", "starved-teacher")])
    with pytest.raises(SystemExit, match="(?s)clip-1024-0 failed. no room.*starved-teacher-0 failed. no room"):
        claims.main(["--out", str(tmp_path), "--processes", "2"])
    student = next(words for words in asked if words[0] == "tinyclip.py")
    assert str(tmp_path / "teacher-0" / "last.pt") in student and "toy-tune,toy" in student and len(asked) == 3


@pytest.mark.parametrize("rows", (claims.TOY, claims.REAL))
def test_rows_are_commands_that_their_scripts_accept(rows):
    names = [name for name, *_ in rows]
    assert len({*names}) == len(names) and claims.LAST_OF_QUICK in names
    for i, (_, _, command) in enumerate(rows):
        script, *flags = re.sub(r"{[^}]*}", "x", command).split()
        importlib.import_module(script.removesuffix(".py")).parse_args(flags)
        assert all(part in names[:i] or part in ("every-2", "every-4", "every-8") for part in re.findall(r"{([^}]*)}", command))
    assert 3 * sum(minutes for _, minutes, _ in claims.TOY) / 2 / 60 < 8  # hours for three seeds on two cores
    assert {row[0] for row in claims.TOY + claims.REAL} >= {name for _, _, of, methods in claims.CLAIMS for name in of + methods}
    assert all((ROOT / row[2].split()[0]).exists() for row in rows) and {"toy", "toy-busy"} <= {*data.TOYS}
