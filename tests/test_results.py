"""The pages' tables, the figures under results/ and their logs agree."""

import json

import pytest
from conftest import ROOT, fail, succeed

from analysis.table1 import PAGES, cell, with_tables

RUNS = sorted(path.parent for path in (ROOT / "results").rglob("deposit_log.jsonl"))


@pytest.mark.parametrize("page", PAGES)
def test_tables_are_those_of_the_metrics_files(page):
    text = (ROOT / page).read_text()
    assert "<!-- table" in text and with_tables(text) == text


def test_a_changed_figure_is_noticed():
    text = (ROOT / "README.md").read_text()
    start = text.index("| Avg Acc |")
    assert with_tables(text[:start] + text[start:].replace("9", "8", 1)) == text


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
    assert cell([1.0, 3.0]) == "2.00 ± 1.41" and cell([1.0]) == "1.00" and cell([1.0, None]) == "-"


def test_table1_from_the_command_line(chain, tmp_path):
    save, _ = chain
    out = succeed("analysis/table1.py", "--metrics", save / "metrics.json", save / "metrics.json", "--out",
                  tmp_path / "t.md")
    assert (tmp_path / "t.md").read_text() == out and "| 93.77 | 93.41 | 94.56 |" in out and "± 0.00" in out
    (tmp_path / "m.json").write_text("{}")
    assert "lacks a column" in fail("analysis/table1.py", "--metrics", tmp_path / "m.json")
