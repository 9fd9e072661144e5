"""Tables: Markdown that a terminal shows as well. Networks or settings are rows, figures are columns."""

import os
import statistics

from utils.files import write_atomically

COLUMNS = {"pre_acc": "Pre Acc", "dep_acc": "Dep Acc", "h_mean": "H Mean", "avg_acc": "Avg Acc",
           "above": "Avg - Original"}
WITHDRAWALS = {"concat": "concat (paper)", "sum": "sum", "tr_alone": "tr_alone (control)",
               "difference": "difference", "released": "released (reads label)"}


def printable(name):
    """A class name as figures and TensorBoard can hold it: bytes of a folder's name that are no UTF-8 as escapes."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def minus(a, b):
    """a - b; None if one is unknown."""
    return None if None in (a, b) else a - b


def summary(values):
    """{"mean", "deviation", "n"} of one figure over runs (deviation None for one run); None where it is not defined."""
    if not values or any(value is None for value in values):
        return None
    return {"mean": round(statistics.fmean(values), 4), "n": len(values),
            "deviation": round(statistics.stdev(values), 4) if len(values) > 1 else None}


def as_text(figure):
    """'mean ± deviation' of a summary; '-' of None."""
    if figure is None:
        return "-"
    return f"{figure['mean']:.2f}" + ("" if figure["deviation"] is None else f" ± {figure['deviation']:.2f}")


def table1_rows(runs):
    """{network: {column: summary}} of Table 1, over the contents of metrics files. A network that a run lacks is left
    out; the Independent networks, which script 1 trains for one draw, stand over the runs that have them. H Mean speaks
    of forgetting: it is T's alone."""
    networks, independent = {}, [{**run["independent"], "h_mean": None} for run in runs if run.get("independent")]
    if independent:
        networks["Independent"] = independent
    for name, key in (("Original (T0)", "original"), ("Deposit (T)", "target")):
        if all(run.get(key) for run in runs):
            networks[name] = [{**run[key], **({} if key == "target" else {"h_mean": None})} for run in runs]
    for key, name in WITHDRAWALS.items():
        if all(key in run.get("recover", {}) for run in runs):
            networks[f"Withdrawal, {name}"] = [
                {**run["recover"][key], "h_mean": None, "above": above(run, key)} for run in runs]
    return {name: {label: summary([column.get(key) for column in columns]) for key, label in COLUMNS.items()}
            for name, columns in networks.items()}


def above(run, key):
    """By how much Avg Acc of a recover network differs from that of the same run's original; None if unknown."""
    return minus(run["recover"].get(key, {}).get("avg_acc"), (run.get("original") or {}).get("avg_acc"))


def markdown(rows, corner=""):
    """A Markdown table of {row: {column: summary or text}}."""
    columns = list(dict.fromkeys(column for cells in rows.values() for column in cells))
    lines = [[corner, *columns]]
    for name, cells in rows.items():
        values = [cells.get(column) for column in columns]
        lines.append([name, *(value if isinstance(value, str) else as_text(value) for value in values)])
    widths = [max(3, *map(len, column)) for column in zip(*lines)]
    lines.insert(1, ["-" * width for width in widths])
    return "".join("| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |\n" for line in lines)


def print_table(text, out=None):
    """Print Markdown and, unless `out` is None, write it there as well."""
    print(text, end="")
    if out:
        write_atomically(out, lambda file: file.write(text.encode()))
