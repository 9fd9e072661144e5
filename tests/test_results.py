"""The pages: their tables are what the logs under results/ give, their links lead somewhere, their program runs."""

import ast
import json
import re
import shutil

import pytest
from conftest import ROOT, fail, succeed

from analysis import report
from utils.errors import UserError

PROGRAMS = [program for program in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
            if "load_network" in program]


def test_logs_ledger_and_pages_agree():
    assert "figures" in succeed("analysis/report.py", "--check")


@pytest.mark.parametrize("page", report.pages())
def test_links_lead_to_files_and_headings(page):
    for link in re.findall(r"\]\(([^)]+)\)", (ROOT / page).read_text()):
        if not link.startswith("http"):
            file, _, anchor = link.partition("#")
            found = (ROOT / page).parent / file if file else ROOT / page
            assert found.exists(), link
            if anchor:
                headings = re.findall(r"^#+ (.+)$", found.read_text(), re.MULTILINE)
                assert anchor in [re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings], link


def test_the_readme_measures_a_network_as_the_stages_do(chain, tmp_path, monkeypatch, capsys):
    save, data = chain
    (tmp_path / "run").symlink_to(save)
    (tmp_path / "data").symlink_to(data)
    monkeypatch.chdir(tmp_path)
    exec(PROGRAMS[0], {})
    figures = json.loads((save / "metrics.json").read_text())["target"]
    assert ast.literal_eval(capsys.readouterr().out) == {
        key: figures[key] for key in ("pre_acc", "dep_acc", "forgetting", "h_mean", "avg_acc")}


@pytest.fixture
def tree(chain, tmp_path, monkeypatch):
    """A small results/ of the chain's own run, whose table a page shows twice: (root, a function: flags -> report)."""
    run = tmp_path / "results" / "logs" / "quickstart"
    run.mkdir(parents=True)
    for name in ("metrics.json", "original_log.jsonl", "deposit_log.jsonl"):
        shutil.copy(chain[0] / name, run)
    (tmp_path / "README.md").write_text("Before.\n\n<!-- table quickstart -->\n<!-- end -->\n\n"
                                        "<!-- table quickstart: Deposit (T) -->\nold\n<!-- end -->\nAfter.\n")

    monkeypatch.setattr(report, "ROOT", str(tmp_path))

    def reported(*flags):
        report.main(report.get_args_parser().parse_args(flags))

    reported()
    return tmp_path, reported


def test_a_page_gets_its_tables_and_nothing_else_is_changed(chain, tree):
    root, reported = tree
    reported("--check")
    text = (root / "README.md").read_text()
    dep = json.loads((chain[0] / "metrics.json").read_text())["target"]["dep_acc"]
    assert text.startswith("Before.\n\n<!-- table quickstart -->\n| ") and text.endswith("<!-- end -->\nAfter.\n")
    assert text.count("| Deposit (T)") == 2 and text.count("| Original (T0)") == 1 and f"{dep:.2f}" in text
    entry = json.loads((root / report.LEDGER).read_text())["quickstart"]
    assert set(entry) == {"data", "command", "runs", "logs", "hardware", "commits", "rows"} and entry["runs"] == 1


@pytest.mark.parametrize("changed,old", [("results/ledger.json", r'"mean": [\d.]+'), ("README.md", r"\d+\.\d\d"),
                                         ("results/logs/quickstart/metrics.json", r'"avg_acc": [\d.]+')])
def test_a_changed_figure_is_noticed(tree, changed, old):
    root, reported = tree
    text = (root / changed).read_text()
    (root / changed).write_text(re.sub(old, lambda found: re.sub(r"[\d.]+$", "12.34", found[0]), text, count=1))
    assert (root / changed).read_text() != text
    with pytest.raises(UserError, match="is not what the"):
        reported("--check")
    reported()  # what is written anew agrees
    reported("--check")


def test_a_table_without_runs_or_logs_is_refused_in_one_line(tree):
    root, _ = tree
    (root / report.LEDGER).unlink()
    assert "ledger.json)" in fail("analysis/report.py", "--check")
    for text, word in (("table other", "has no runs"), ("table quickstart: Nobody", "has no row 'Nobody'")):
        (root / "README.md").write_text(f"<!-- {text} -->\n<!-- end -->\n")
        assert word in fail("analysis/report.py")
    for log in (root / "results" / "logs").rglob("*.jsonl"):
        log.write_text("")
    assert "holds no record of a run" in fail("analysis/report.py")
    for log in (root / "results" / "logs").rglob("*.jsonl"):
        log.unlink()
    assert "there is no log" in fail("analysis/report.py")
