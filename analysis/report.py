"""The ledger of the figures that the pages show, and the pages' tables from it. Writes results/ledger.json from the
files under results/logs/, then the tables of the pages; --check writes nothing and fails where the three differ."""

import glob
import json
import os
import re

from analysis.tables import TABLES
from utils.cli import make_parser, run
from utils.errors import UserError
from utils.files import load_json, read_head, save_json, write_atomically
from utils.tables import markdown

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
LEDGER = "results/ledger.json"
# <!-- table NAME --> or <!-- table NAME: row; row --> ... <!-- end -->
_SLOT = re.compile(r"(<!-- table ([\w.]+)(?:: ([^>]*?))? -->\n).*?(<!-- end -->)", re.DOTALL)


def get_args_parser():
    parser = make_parser(__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail where ledger, pages and logs differ")
    return parser


def pages():
    """The Markdown files that may show tables, relative to the root."""
    return sorted(os.path.relpath(path, ROOT) for pattern in ("README.md", "*/README.md", "results/*.md")
                  for path in glob.glob(os.path.join(ROOT, pattern)))


def entry(name):
    """The ledger's entry of a table; None while it has no runs."""
    table = TABLES[name]
    paths = [path for pattern in table.runs.split()
             for path in sorted(glob.glob(os.path.join(ROOT, "results", "logs", pattern), recursive=True))]
    if not paths:
        return None
    folders = sorted({os.path.dirname(path) for path in paths}) if table.logs else []
    patterns = [*(os.path.join(folder, table.logs) for folder in folders),
                *(os.path.join(ROOT, "results", "logs", pattern) for pattern in table.further.split())]
    logs = {pattern: glob.glob(pattern) for pattern in patterns}
    missing = [os.path.relpath(pattern, ROOT) for pattern, found in logs.items() if not found]
    if missing:
        raise UserError(f"there is no log {missing[0]}: copy the run's records again (scripts/collect.sh)")
    heads = [read_head(log) for log in sorted({log for found in logs.values() for log in found})]
    return {"data": table.data, "command": table.command, "runs": len(paths),
            "logs": [f"results/logs/{pattern}" for pattern in f"{table.runs} {table.further}".split()],
            "hardware": sorted({head["hardware"] for head in heads}),
            "commits": sorted({head["commit"] or "unknown" for head in heads}), "rows": table.rows(paths)}


def fill(text, ledger, page):
    """A page with its tables as the ledger has them."""
    def table(match):
        start, name, wanted, end = match.groups()
        if name not in ledger:
            raise UserError(f"{page} shows the table '{name}', which has no runs: declare it in analysis/tables.py")
        rows = ledger[name]["rows"]
        if wanted:
            chosen = [row.strip() for row in wanted.split(";")]
            if not set(chosen) <= rows.keys():
                raise UserError(f"{page}: the table '{name}' has no row '{sorted(set(chosen) - rows.keys())[0]}'")
            rows = {row: rows[row] for row in chosen}
        return start + markdown(_without_empty_columns(rows), TABLES[name].corner) + end

    return _SLOT.sub(table, text)


def _without_empty_columns(rows):
    """Rows without the columns of which none has a figure."""
    shown = {column for cells in rows.values() for column, value in cells.items() if value not in (None, "-")}
    return {name: {column: value for column, value in cells.items() if column in shown} for name, cells in rows.items()}


def main(args):
    ledger = {name: found for name in TABLES if (found := entry(name)) is not None}
    path = os.path.join(ROOT, LEDGER)
    if args.check:
        if load_json(path) != json.loads(json.dumps(ledger)):
            raise UserError(f"{LEDGER} is not what the logs give: run python -m analysis.report")
    else:
        save_json(path, ledger)
    for page in pages():
        name = os.path.join(ROOT, page)
        with open(name, encoding="utf-8") as file:
            text = file.read()
        filled = fill(text, ledger, page)
        if filled == text:
            continue
        if args.check:
            raise UserError(f"a table of {page} is not what the ledger holds: run python -m analysis.report")
        write_atomically(name, lambda file: file.write(filled.encode()))
    print(f"{len(ledger)} tables, {sum(len(cells) for found in ledger.values() for cells in found['rows'].values())} "
          f"figures")


if __name__ == "__main__":
    run(main, get_args_parser())
