"""The pages' tables, the figures under results/ and their logs agree."""

import json
import re
import shutil

import pytest
from conftest import ROOT, fail, succeed

import analysis.report as report
from analysis.table1 import markdown, shown, summary
from utils.errors import UserError

RUNS = sorted(path.parent for path in (ROOT / "results").rglob("deposit_log.jsonl"))


def test_logs_ledger_and_pages_agree():
    assert "figures measured" in succeed("analysis/report.py", "--check")


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
    (tmp_path / changed).write_text(text[:at.start()] + "12.34" + text[at.end():])
    with pytest.raises(UserError, match="does not agree"):
        report.main(report.get_args_parser().parse_args(["--check"]))
    report.main(report.get_args_parser().parse_args([]))  # what is written anew agrees
    report.main(report.get_args_parser().parse_args(["--check"]))


def test_every_entry_of_the_ledger_says_where_it_comes_from():
    for entry in json.loads((ROOT / report.LEDGER).read_text())["figures"]:
        assert set(entry) == {"table", "column", "row", "paper", "ours", "command", "data", "hardware", "wall_time_s",
                              "logs", "status"}
        assert entry["command"] and entry["data"]
        assert (entry["status"] == "measured") == bool(entry["logs"] and entry["hardware"])
        assert all((ROOT / log).is_file() for log in entry["logs"])
        if entry["status"] == "pending":
            assert entry["ours"] is None


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
    if (run / "metrics.json").exists():  # the log's figures are those of the test set
        target = json.loads((run / "metrics.json").read_text())["target"]
        assert all(last[f"target_{key}"] == pytest.approx(target[key], abs=0.02) for key in target if key != "counts")


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
