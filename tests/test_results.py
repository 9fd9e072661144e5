"""The pages' tables, the figures under results/ and their logs agree."""

import json
import re
import shutil

import pytest
from conftest import ROOT, fail, succeed

import analysis.report as report
from analysis.report import Goal
from analysis.table1 import markdown, shown, summary
from utils.checkpoint import sealed
from utils.errors import UserError
from utils.metrics import TABLE1_ROWS

RUNS = sorted(path.parent for path in (ROOT / "results").rglob("deposit_log.jsonl"))
STUDENTS = sorted(path.parent for path in (ROOT / "results").rglob("student_log.jsonl"))


def test_logs_ledger_and_pages_agree():
    assert "figures measured" in succeed("analysis/report.py", "--check")


@pytest.mark.parametrize("page", report.PAGES)
def test_links_lead_to_files_and_headings(page):
    for link in re.findall(r"\]\(([^)]+)\)", (ROOT / page).read_text()):
        if not link.startswith("http"):
            file, _, anchor = link.partition("#")
            found = (ROOT / page).parent / file if file else ROOT / page
            assert found.exists(), link
            if anchor:
                headings = re.findall(r"^#+ (.+)$", found.read_text(), re.MULTILINE)
                assert anchor in [re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings], link


@pytest.mark.parametrize("changed", ["results/ledger.json", "README.md", "results/quickstart/seed0/metrics.json"])
def test_a_changed_figure_is_noticed(tmp_path, monkeypatch, changed):
    for page in report.PAGES:
        (tmp_path / page).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / page, tmp_path / page)
    shutil.copytree(ROOT / "results", tmp_path / "results", dirs_exist_ok=True)
    monkeypatch.setattr(report, "ROOT", str(tmp_path))
    report.main(report.get_args_parser().parse_args(["--check"]))
    text = (tmp_path / changed).read_text()
    found = list(re.finditer(r"(?<=[ |])\d+\.\d\d(?= [|±])" if changed.endswith("md") else
                             r'(?<="mean": )[\d.]+|(?<="avg_acc": )[\d.]+', text))
    at = found[0]
    text = text[:at.start()] + "12.34" + text[at.end():]
    if changed.endswith("metrics.json"):  # by one who knows of the checksum, which is told otherwise
        text = json.dumps(sealed(json.loads(text)))
    (tmp_path / changed).write_text(text)
    with pytest.raises(UserError, match="does not agree"):
        report.main(report.get_args_parser().parse_args(["--check"]))
    report.main(report.get_args_parser().parse_args([]))  # what is written anew agrees
    report.main(report.get_args_parser().parse_args(["--check"]))


def test_every_entry_of_the_ledger_says_where_it_comes_from():
    for entry in json.loads((ROOT / report.LEDGER).read_text())["figures"]:
        assert set(entry) == {"table", "column", "row", "paper", "ours", "goal", "command", "data", "hardware",
                              "wall_time_s", "logs", "status"}
        assert entry["command"] and entry["data"] and entry["status"] in ("measured", "missed", "pending")
        assert (entry["status"] != "pending") == bool(entry["logs"] and entry["hardware"])
        assert all((ROOT / log).is_file() for log in entry["logs"])
        if entry["status"] == "pending":
            assert entry["ours"] is None


@pytest.mark.parametrize("run", STUDENTS, ids=lambda run: "-".join(run.parts[-3:]))
def test_students_are_backed_by_their_logs(run):
    records = [json.loads(line) for line in (run / "student_log.jsonl").read_text().splitlines()]
    last = [record for record in records if "epoch" in record][-1]
    assert last["epoch"] == records[0]["settings"]["epochs"]
    split = "val" if (run / "metrics_val.json").exists() else "test"
    student = json.loads((run / f"metrics{'_val' * (split == 'val')}.json").read_text())["student"]
    assert all(last[f"{split}_{key}"] == pytest.approx(student[key], abs=0.02) for key in ("pre_acc", "dep_acc"))


@pytest.mark.parametrize("run", RUNS, ids=lambda run: f"{run.parent.name}-{run.name}")
def test_figures_are_backed_by_their_logs(run):
    records = [json.loads(line) for line in (run / "deposit_log.jsonl").read_text().splitlines()]
    assert records[0]["commit"] and records[0]["command"][0] == "train_deposit.py"
    last = [record for record in records if "epoch" in record][-1]
    assert last["epoch"] == records[0]["settings"]["epochs"]
    assert list(run.glob("metrics*.json"))
    for path in run.glob("metrics*.json"):
        metrics = json.loads(path.read_text())
        assert metrics["partition_hash"] == records[0]["settings"]["partition"]
    if (run / "metrics.json").exists() and "target" in json.loads((run / "metrics.json").read_text()):
        assert "target_pre_acc" in last or ("val_target_pre_acc" in last and (run / "metrics_val.json").exists())
    for prefix, name in (("target", "metrics.json"), ("val_target", "metrics_val.json")):  # of test or held-out images
        if f"{prefix}_pre_acc" in last and (run / name).exists():
            target = json.loads((run / name).read_text()).get("target", {})  # a study measures held-out images alone
            assert all(last[f"{prefix}_{key}"] == pytest.approx(target[key], abs=0.02) for key in target
                       if key != "counts")


def test_a_goal_that_is_not_met_is_missed():
    column = {"Original": {"Avg Acc": summary([80.0])}}
    goal = Goal(">=", -0.3, "Original")
    assert str(goal) == ">= Original -0.3" and str(Goal("<=", 15)) == "<= 15"
    assert goal.met(summary([79.7]), column, "Avg Acc") and not goal.met(summary([79.6]), column, "Avg Acc")
    with pytest.raises(UserError, match="no runs"):
        goal.met(summary([79.7]), {"Original": {"Avg Acc": None}}, "Avg Acc")
    assert Goal("<=", 15).met(summary([15.0]), {}, "") and not Goal("<", 15).met(summary([15.0]), {}, "")
    status = {(e["table"], e["column"], e["row"]): e["status"] for e in
              json.loads((ROOT / report.LEDGER).read_text())["figures"]}
    assert status["cifar10_resnet20", "Deposit", "Dep Acc"] == "measured"
    assert status["cifar10_resnet20", "Deposit", "H Mean"] == "missed"


def test_a_table_is_pending_until_its_runs_are_there(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "ROOT", str(tmp_path))
    pending = report.entries_of("table3")
    assert len(pending) == 3 * 8 and {entry["status"] for entry in pending} == {"pending"}
    assert {(e["paper"], e["goal"]) for e in pending if e["row"] == "CNN, logits: Dep Acc"} == {
        (86.15, None), (84.26, None), (82.75, "< T without L_at +0")}
    text = report.as_markdown("table3", pending)
    assert text.startswith("Ours is pending.") and "| CNN, logits: Dep Acc | 86.15 | 84.26 | 82.75 |" in text
    for teacher, dep in (("original", 90.0), ("lambda_at_0", 80.0), ("lambda_at_100", 81.0)):
        student = tmp_path / "results" / "table3" / "cnn_logits" / teacher / "seed0"
        student.mkdir(parents=True)
        figures = {"pre_acc": 85.0, "dep_acc": dep, "avg_acc": 84.0}
        (student / "metrics.json").write_text(json.dumps({"student": figures}))
        shutil.copy(RUNS[0] / "deposit_log.jsonl", student / "student_log.jsonl")
    measured = {(e["column"], e["row"]): e for e in report.entries_of("table3")}
    of_t = measured["T with L_at (100)", "CNN, logits: Dep Acc"]
    assert of_t["status"] == "missed" and of_t["paper"] == 82.75 and len(of_t["logs"]) == 3
    assert measured["T with L_at (100)", "CNN, logits: Pre Acc"]["status"] == "measured"
    assert "| CNN, logits: Dep Acc | 90.00 | 80.00 | 81.00 | 86.15 | 84.26 | 82.75 |" in report.as_markdown(
        "table3", measured.values())


def test_a_study_shows_its_variants_and_not_their_originals(tmp_path):
    paths = [tmp_path / name / "seed0" / "metrics_val.json" for name in ("original", "paper")]
    figures = dict.fromkeys(TABLE1_ROWS, 50.0)
    for path, content in zip(paths, ({}, {"target": figures, "recover": {"concat": {**figures, "avg_acc": 49.0}}})):
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps({"original": figures, **content}))
    column = report.study_columns([str(path) for path in paths])["concat: Avg - Original"]
    assert list(column) == ["paper"] and column["paper"]["mean"] == -1


def test_students_elsewhere_are_refused(tmp_path):
    assert "does not lie in" in fail("analysis/table3.py", "--metrics", tmp_path / "metrics.json")
    assert "holds no finished runs" in fail("analysis/ablation.py", "--runs", tmp_path)


def test_mean_and_deviation():
    assert shown(summary([1.0, 3.0])) == "2.00 ± 1.41" and summary([1.0, 3.0])["n"] == 2
    assert shown(summary([1.0])) == "1.00" and shown(summary([1.0, None])) == "-"
    assert markdown({"ours": {"Avg Acc": summary([1.0])}}, {"theirs": {"Avg Acc": 2.0}}) == (
        "| | ours | paper: theirs |\n|---|---|---|\n| Avg Acc | 1.00 | 2.00 |\n")


def test_table1_from_the_command_line(chain, tmp_path):
    save, _ = chain
    out = succeed("analysis/table1.py", "--metrics", save / "metrics.json", save / "metrics.json", "--out",
                  tmp_path / "t.md")
    assert (tmp_path / "t.md").read_text() == out and "| 93.77 | 93.41 | 94.56 |" in out and "± 0.00" in out
    (tmp_path / "m.json").write_text("{}")
    assert "lacks a column" in fail("analysis/table1.py", "--metrics", tmp_path / "m.json")
    metrics = json.loads((save / "metrics.json").read_text())
    del metrics["recover"]["sum"]["pre_acc"]
    (tmp_path / "m.json").write_text(json.dumps(sealed(metrics)))
    assert "a figure of recover is missing" in fail("analysis/table1.py", "--metrics", tmp_path / "m.json")
