"""Tables of scripts/8_methods.sh: the methods of forgetting, what each leaves of the deposit classes, and that beside
the bytes that bring them back. With --choose, the cell of a grid that a method is frozen at."""

import glob
import os
import statistics

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from analysis.table1 import load_runs, print_table
from datasets import read_partition
from utils.cli import make_parser, path, run
from utils.errors import UserError
from utils.files import load_json, read_log, write_atomically
from utils.tables import COLUMNS, above, markdown, summary

COSTS = {"seconds": "seconds", "images": "images", "passes": "passes", "trained_parameters": "trained parameters"}
REFERENCES = {"original": "T0", "retrained": "R"}


def get_args_parser():
    parser = make_parser(__doc__)
    parser.add_argument("--runs", type=path, default=None,
                        help="folder of <method>/seed<k>/ with metrics.json and residual.json; gets methods.md, "
                             "residual.md and bytes_and_rho.png")
    parser.add_argument("--choose", type=path, default=None,
                        help="folder of <cell>/metrics_val.json: prints the name of the cell of the highest H Mean on "
                             "held-out images, and writes all to choice.md")
    return parser


def choose(folder):
    """(the chosen cell, {cell: {figure: summary or text}}) of a grid that was measured on held-out images.

    A: the highest H Mean; equal ones: the first name. B, beside it: of the cells whose Dep Acc on held-out images of
    D_r is at most 10 %, the least KL of T's preserved answers from T0's on them, which asks no preserved image.
    """
    rows, found = {}, {}
    for name in sorted(glob.glob(os.path.join(folder, "*", "metrics_val.json"))):
        cell = os.path.dirname(name)
        target, residual = load_runs([name])[0]["target"], os.path.join(cell, "residual.json")
        drift = {"held_out_dep": 100, "kl": None}
        if os.path.exists(residual):
            drift = load_json(residual)["measures"]["drift"]
        found[os.path.basename(cell)] = target["h_mean"], drift
        rows[os.path.basename(cell)] = {**{label: summary([target[key]]) for key, label in COLUMNS.items()
                                           if key in target}, "KL": summary([drift["kl"]]), "chosen by": "-"}
    if not found:
        raise UserError(f"{folder} holds no cell with metrics_val.json: run scripts/8_methods.sh")
    chosen = max(found, key=lambda cell: found[cell][0])
    strict = [cell for cell, (_, drift) in found.items() if drift["held_out_dep"] <= 10 and drift["kl"] is not None]
    if strict:
        rows[min(strict, key=lambda cell: found[cell][1]["kl"])]["chosen by"] = "B"
    rows[chosen]["chosen by"] = {"B": "A and B"}.get(rows[chosen]["chosen by"], "A")
    return chosen, rows


def _by_method(paths):
    """{method: [paths]} of <method>/seed<k>/<file>."""
    found = {}
    for name in sorted(paths):
        found.setdefault(name.split(os.sep)[-3], []).append(name)
    return found


def _costs(name, metrics):
    """What a run cost: as analysis.forget noted it or, of train_deposit.py, what its log and its partition tell."""
    log, partition = (os.path.join(os.path.dirname(name), file) for file in ("deposit_log.jsonl", "partition.json"))
    if "forget" in metrics or not os.path.exists(log):
        return metrics.get("forget", {})
    lines = [line for line in read_log(log) if "epoch" in line]
    images = read_partition(partition).counts()["train"]["deposit"] if os.path.exists(partition) else None
    return {"seconds": sum(line["seconds"] for line in lines), "passes": len(lines), "images": images}


def method_rows(paths):
    """{method: {column: summary}} of metrics files: T of each method; T0 and R once, R from its own folder."""
    rows = {}
    for method, names in _by_method(paths).items():
        runs = load_runs(names)
        for key, label in (("original", "T0"), ("retrained", "R"), ("target", method)):
            if label not in rows and all(key in run for run in runs):
                costs = [_costs(name, run) if key == "target" else {} for name, run in zip(names, runs)]
                rows[label] = {
                    **{COLUMNS[c]: summary([run[key][c] for run in runs]) for c in ("pre_acc", "dep_acc", "h_mean")},
                    **{column: summary([cost.get(c) for cost in costs]) for c, column in COSTS.items()}}
        if all("difference" in run.get("recover", {}) for run in runs):
            rows[method]["T~ - T0, difference"] = summary([above(run, "difference") for run in runs])
    return {name: rows[name] for name in sorted(rows, key=lambda name: (name not in REFERENCES.values(), name))}


def _text(figures):
    """'Pre / Dep' of a measure of both, which are never shown apart, or its first figure."""
    if "pre" in figures[0]:
        return " / ".join(f"{statistics.fmean(run[key] for run in figures):.1f}" for key in ("pre", "dep"))
    return f"{statistics.fmean(next(iter(run.values())) for run in figures):.3g}"


def residual_rows(paths):
    """{method: {measure: text, measure's rho: summary}} of residual.json files; T0 and R are those they refer to."""
    rows = {}
    for method, names in _by_method(paths).items():
        runs = [load_json(name) for name in names]
        tables = {method: [run["measures"] for run in runs]}
        if method not in REFERENCES:
            tables.update(T0=[run["reference"]["original"] for run in runs],
                          R=[figures for run in runs for figures in run["reference"]["retrained"]])
        for label, measures in tables.items():
            if label in rows or not measures:
                continue
            rows[label] = {}
            for name in measures[0]:
                if all(name in of_run for of_run in measures):
                    rows[label][name] = _text([of_run[name] for of_run in measures])
                if label == method and all(name in run["rho"] for run in runs):
                    rows[label][f"rho, {name}"] = summary([run["rho"][name]["rho"] for run in runs])
            steps = [[of_run.get("relearn", {}).get("steps") for of_run in of] for of in (
                measures, [figures for run in runs for figures in run["reference"]["retrained"]])]
            if label == method and steps[1] and all(steps[1]) and None not in steps[0]:
                rows[label]["anamnesis index"] = summary([step * len(steps[1]) / sum(steps[1]) for step in steps[0]])
    return {name: rows[name] for name in sorted(rows, key=lambda name: (name not in REFERENCES.values(), name))}


def draw(paths, out, measure="probe"):
    """A point a method: bytes that bring the classes back, against rho of a measure; bars: a deviation over draws."""
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for method, names in _by_method(paths).items():
        runs = [load_json(name) for name in names]
        if all("recovery" in run["measures"] and measure in run["rho"] for run in runs):
            size = summary([run["measures"]["recovery"]["bytes"] / 1000 for run in runs])
            value = summary([run["rho"][measure]["rho"] for run in runs])
            if value is not None:
                axes.errorbar(size["mean"], value["mean"], value["deviation"] or 0, size["deviation"] or 0, marker="o",
                              capsize=3, label=method)
    axes.axhline(0, color="grey", linewidth=0.8)
    axes.axhline(1, color="grey", linewidth=0.8, linestyle="--")
    axes.set(xscale="log", xlabel="kept to get the deposit classes back (KB, whole file)",
             ylabel=f"rho of the {measure}: 1 knows what T0 knows, 0 what R knows")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8)
    figure.savefig(out, dpi=150)
    plt.close(figure)


def main(args):
    if (args.runs is None) == (args.choose is None):
        raise UserError("name either --runs or --choose")
    if args.choose:
        chosen, rows = choose(args.choose)
        table = markdown(rows, "cell").encode()
        write_atomically(os.path.join(args.choose, "choice.md"), lambda file: file.write(table))
        print(chosen)
        return
    metrics, residual = (glob.glob(os.path.join(args.runs, "*", "seed*", f"{name}.json"))
                         for name in ("metrics", "residual"))
    if not metrics:
        raise UserError(f"{args.runs} holds no <method>/seed<k>/metrics.json: run scripts/8_methods.sh")
    print_table(markdown(method_rows(metrics), "method"), os.path.join(args.runs, "methods.md"))
    if residual:
        print_table(markdown(residual_rows(residual), "Pre / Dep, or the figure"),
                    os.path.join(args.runs, "residual.md"))
        draw(residual, os.path.join(args.runs, "bytes_and_rho.png"))


if __name__ == "__main__":
    run(main, get_args_parser())
