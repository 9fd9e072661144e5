"""The tables of the pages: what each shows, what makes it, and which files under results/logs/ are behind it."""

from collections.abc import Callable
from typing import NamedTuple

from analysis.table1 import load_runs, paper_rows
from utils.tables import table1_rows


class Table(NamedTuple):
    """data: what was measured on; command: what makes it; runs: pattern of its metrics files below results/logs/;
    rows: those files -> {row: {column: summary}}; corner: heading of the first column; logs: pattern of the logs beside
    a metrics file."""

    data: str
    command: str
    runs: str
    rows: Callable
    corner: str = ""
    logs: str = "*_log.jsonl"


def table1(*, paper=None):
    """Table 1 over metrics files, the paper's rows below."""
    return lambda paths: {**table1_rows(load_runs(paths)), **paper_rows(paper)}


TABLES = {
    "quickstart": Table("digits, test set, one run", "bash scripts/0_quickstart.sh", "quickstart/metrics.json",
                        table1()),
}
