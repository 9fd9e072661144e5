"""Tables of scripts/9_methods.sh: the methods of forgetting, what each leaves of the deposit classes, and the figure of
that beside the bytes that bring them back, over the draws that all methods have. With --choose, the trial at which a
method is frozen."""

import glob
import itertools
import os
import statistics

import matplotlib.pyplot as plt

from datasets import read_partition
from utils.cli import make_parser, path, run
from utils.errors import UserError
from utils.files import load_json, read_log
from utils.metrics import harmonic_mean
from utils.tables import markdown, minus, print_table, summary

DEEP = 91.0  # H Mean that a deep deposit must have
COLUMNS = {"pre": "Pre", "dep": "Dep", "h_mean": "H Mean", "probe": "probe Dep"}


def get_args_parser():
    parser = make_parser(__doc__)
    parser.add_argument("--runs", type=path, default=None,
                        help="folder of <method>/seed<k>/*_residual_*.json; gets methods.md and methods.png")
    parser.add_argument("--trade", type=path, default=None,
                        help="a like folder, <setting>/seed<k>/: further points of methods.png")
    parser.add_argument("--choose", type=path, nargs="+", default=[],
                        help="the trials of a method, folders with target_residual_*.json: beside them go choice.md "
                             "and, with the name of the trial that --rule chooses, choice.txt")
    parser.add_argument("--rule", choices=["h_mean", "probe"], default="h_mean",
                        help="on held-out images. h_mean: the highest H Mean; probe: of H Mean from "
                             f"{DEEP:.0f}, the least Dep of the probe. Where no trial fits that: h_mean")
    return parser


def h_mean(measured, original):
    """H Mean of T, of its measures and T0's; None where its answers were not measured."""
    answers = measured.get("answers", {})
    return harmonic_mean(answers.get("pre"), minus(original.get("answers", {}).get("dep"), answers.get("dep")))


def h_means(runs):
    """Summary of H Mean over residual records, a draw each."""
    return summary([h_mean(run["measures"], run["reference"]["original"]) for run in runs])


def read_record(file):
    """What `analysis.residual` wrote. Raises UserError when the file is none of it."""
    record = load_json(file)
    if not {"settings", "original", "network", "measures"} <= record.keys():
        raise UserError(f"{file} holds no measures: name a file <network>_residual_<draw>.json of analysis.residual")
    return record


def usable_rho(found):
    """rho of a measure's entry in a record; None where it means nothing."""
    return None if found.get("usable") is False else found.get("rho")


def grounds(record):
    """(split, partition, T0) on which a residual record was measured."""
    return record["settings"]["eval_split"], record["settings"]["partition"], record["original"]


def refuse_another_retrained(records):
    """Raise UserError when the records {method: [residual record, a draw each]} of a draw take rho by different R."""
    of_draws = {}
    for method, runs in records.items():
        for run in runs:
            of_r = run.get("reference", {}).get("retrained")
            if not of_r:  # and so no rho
                continue
            other, first = of_draws.setdefault(run["settings"]["partition"], (method, of_r))
            if len(first) != len(of_r) or any(a[name] != b[name] for a, b in zip(first, of_r) for name in a.keys() & b):
                raise UserError(f"{other} and {method} take the rho of a draw by different R: measure both with the "
                                f"same --retrained, in the same order")


def choose(folders):
    """({rule: the trial that it chooses}, {trial: {figure: summary or text}}) of the folders of a method's trials,
    measured on held-out images. Of equals the first name is chosen; a rule that none satisfies chooses none. Raises
    UserError when a trial is not measured, when test images were measured, or when the trials lie in several folders or
    are of several partitions or originals."""
    if len({os.path.dirname(os.path.abspath(folder)) for folder in folders}) > 1:
        raise UserError(f"{', '.join(folders)} do not lie in one folder: name the trials of one method")
    trials, measured_on = {}, set()
    for folder in sorted(folders):
        names = glob.glob(os.path.join(glob.escape(folder), "target_residual_*.json"))
        if len(names) != 1:
            raise UserError(f"{folder} holds {len(names)} files target_residual_*.json, where one is wanted: run "
                            f"scripts/9_methods.sh")
        record = read_record(names[0])
        measured_on.add(grounds(record))
        found, original = record["measures"], record.get("reference", {}).get("original", {})
        if not {"answers", "probe"} <= found.keys() or "answers" not in original:
            raise UserError(f"{names[0]} lacks answers or probe: measure them by analysis.residual")
        trials[os.path.basename(os.path.normpath(folder))] = {
            **found["answers"], "h_mean": h_mean(found, original), "probe": found["probe"]["dep"]}
    if len(measured_on) > 1 or measured_on.pop()[0] != "val":
        raise UserError(f"{', '.join(folders)} were not all measured on the same held-out images: measure them with "
                        f"--eval_split val, of one partition and T0")
    chosen = {"h_mean": max(trials, key=lambda trial: trials[trial]["h_mean"])}
    if deep := [trial for trial in trials if trials[trial]["h_mean"] >= DEEP]:
        chosen["probe"] = min(deep, key=lambda trial: trials[trial]["probe"])
    rows = {trial: {**{column: summary([figures[key]]) for key, column in COLUMNS.items()},
                    "chosen by": ", ".join(rule for rule in chosen if chosen[rule] == trial) or "-"}
            for trial, figures in trials.items()}
    return chosen, rows


def costs(folder):
    """{"seconds", "passes" over D_r} of the run in a folder, from its log; {} where there is none."""
    for name in ("forget_log.jsonl", "deposit_log.jsonl"):
        log = os.path.join(folder, name)
        if os.path.exists(log):
            lines = [line for line in read_log(log) if "epoch" in line]
            return {"seconds": sum(line["seconds"] for line in lines),
                    "passes": sum(line.get("passes", 1) for line in lines)}
    return {}


def measures_of(records):
    """{network: [its measures, a draw each]} of the methods and T0, and of R, a draw and seed each."""
    of_0, of_r = {}, {}  # of each draw, from all methods: each was measured beside others
    for run in itertools.chain.from_iterable(records.values()):
        draw, reference = run["settings"]["partition"], run["reference"]
        of_0[draw] = {**of_0.get(draw, {}), **reference["original"]}
        pairs = itertools.zip_longest(of_r.get(draw, []), reference["retrained"], fillvalue={})
        of_r[draw] = [{**before, **figures} for before, figures in pairs]
    return {"T0": list(of_0.values()), "R": [figures for of_draw in of_r.values() for figures in of_draw],
            **{method: [run["measures"] for run in runs] for method, runs in records.items()}}


def anamnesis(run):
    """T's steps of relearning over the mean of R's, of a residual record. None without R, where R takes no step, and
    where a network was not measured, gave up or learned at another rate."""
    found = [network.get("relearn") for network in (run["measures"], *run["reference"]["retrained"])]
    if any(one is None or one["censored"] for one in found) or len({one.get("lr") for one in found}) > 1:
        return None
    of_t, *of_r = (one["steps"] for one in found)
    return of_t / statistics.fmean(of_r) if any(of_r) else None


def rows_of(records):
    """({network: {figure: text or summary}}, {method: {measure: summary of rho}}) of {method: [residual record, a draw
    each]}: means over draws, Pre / Dep of a measure of both. A rho is "-" where that of a draw is not usable."""
    def text(figures):
        shown = ("pre", "dep") if "pre" in figures[0] else [next(iter(figures[0]))]
        at_least = "> " if any(run.get("censored") for run in figures) else ""  # relearn gave up in an order
        return at_least + " / ".join(f"{statistics.fmean(run[key] for run in figures):.4g}" for key in shown)

    tables = measures_of(records)
    values = {name: {measure: text([run[measure] for run in runs]) for measure in runs[0]
                     if measure != "recovery" and all(measure in run for run in runs)}
              for name, runs in tables.items() if runs}
    rhos = {}
    for method, runs in records.items():
        kept = [{**run["measures"].get("recovery", {}), **run.get("costs", {})} for run in runs]
        values[method] = {"H Mean": h_means(runs), **values[method],
                          **{key: summary([of_run.get(key) for of_run in kept])
                             for key in ("bytes", "parameters", "seconds", "passes")}}
        rhos[method] = {measure: summary([usable_rho(run["rho"].get(measure, {})) for run in runs])
                        for measure in runs[0]["rho"]}
        indices = [anamnesis(run) for run in runs]
        if None not in indices:
            rhos[method]["Anamnesis index"] = summary(indices)
    return values, rhos


def forgetting_rows(records):
    """{network: {figure: summary}} of what `records_of` gives: a row for T0, R and each method."""
    rows = {name: {title: summary([measures["answers"][key] for measures in runs])
                   for key, title in (("pre", "Pre"), ("dep", "Dep"))} for name, runs in measures_of(records).items()}
    for method, runs in records.items():
        rows[method]["H Mean"] = h_means(runs)
        for key, title in (("seconds", "seconds"), ("passes", "passes over D_r")):
            rows[method][title] = summary([run["costs"].get(key) for run in runs])
    return rows


def records_of(names):
    """{method: [residual record and its "costs", a draw each]} of files <method>/seed<k>/*_residual_*.json, over the
    draws that all methods have. Raises UserError when there is none, or where one was not measured alike."""
    records = {}
    for name in sorted(names):
        record, folder = read_record(name), os.path.dirname(name)
        manifest = os.path.join(folder, "partition.json")
        of_draw = not os.path.exists(manifest) or read_partition(manifest).hash == record["settings"]["partition"]
        if "rho" in record and of_draw:  # neither R's nor of another draw
            runs = records.setdefault(name.split(os.sep)[-3], [])
            if record["settings"]["partition"] in {run["settings"]["partition"] for run in runs}:
                raise UserError(f"{name} is a second network of its draw and method: put it into a folder of its own")
            runs.append({**record, "costs": costs(folder)})
    draws = [{run["settings"]["partition"] for run in runs} for runs in records.values()]
    common = set.intersection(*draws) if draws else set()
    measured_on = {grounds(run) for runs in records.values() for run in runs}
    if any(sum(draw == other for _, other, _ in measured_on) > 1 for draw in common):
        raise UserError("a draw was measured on two splits, or beside two T0: measure all methods likewise")
    if not common:
        raise UserError("there is no draw with <method>/seed<k>/*_residual_*.json of every method that is there: run "
                        "scripts/9_methods.sh")
    records = {method: [run for run in runs if run["settings"]["partition"] in common]
               for method, runs in records.items()}
    refuse_another_retrained(records)
    return records


def print_tables(records, out=None):
    """Print the tables of `rows_of` and, unless `out` is None, write them there too."""
    values, rhos = rows_of(records)
    rho = "\n" + markdown(rhos, "rho") if any(rhos.values()) else ""  # there is none without R
    print_table(markdown(values, "Pre / Dep, or the figure") + rho, out)


def plot(records, trade, out):
    """rho of the probe against the bytes that bring the classes back, and against H Mean: a point a method; bars: a
    deviation over draws. trade: records of further settings, small points of the second panel."""
    figure, (by_bytes, by_h_mean) = plt.subplots(1, 2, figsize=(10, 4.5), sharey=True, layout="constrained")

    def place(axes, x, runs, **style):
        """A point at the summary x of the runs, if they have both."""
        rho = summary([usable_rho(run["rho"].get("probe", {})) for run in runs])
        if x and rho:
            axes.errorbar(x["mean"], rho["mean"], rho["deviation"], x["deviation"], capsize=3, ls="none", **style)

    for i, (method, runs) in enumerate(records.items()):
        style = {"marker": "osD^vPX*h<>dp"[i % 13], "color": f"C{i}", "label": method}
        size = [run["measures"].get("recovery", {}).get("bytes") for run in runs]
        place(by_bytes, summary([None if of_run is None else of_run / 1000 for of_run in size]), runs, **style)
        place(by_h_mean, h_means(runs), runs, **style)
    for runs in trade.values():
        place(by_h_mean, h_means(runs), runs, marker=".", color="grey")
    by_bytes.set(xscale="log", xlabel="kept to get the deposit classes back (KB, whole file)",
                 ylabel="rho of the probe (1: as T0, 0: as R)")
    by_h_mean.set(xlabel="H Mean of T")
    for axes in (by_bytes, by_h_mean):
        axes.axhline(0, color="grey", linewidth=0.8)
        axes.axhline(1, color="grey", linewidth=0.8, linestyle="--")
    handles, labels = by_h_mean.get_legend_handles_labels()
    if handles:
        by_bytes.legend(handles, labels, fontsize=8, loc="center left")
    figure.savefig(out, dpi=150)
    plt.close(figure)


def main(args):
    if (args.runs is None) == (not args.choose) or args.trade and not args.runs:
        raise UserError("name either --runs, to which --trade may be added, or --choose")
    if args.choose:
        chosen, rows = choose(args.choose)
        parent = os.path.dirname(os.path.normpath(args.choose[0]))
        print_table(markdown(rows, "trial"), os.path.join(parent, "choice.md"))
        if args.rule not in chosen:
            print(f"no trial reaches H Mean {DEEP:.0f}: the highest is chosen")
        print_table(chosen.get(args.rule, chosen["h_mean"]) + "\n", os.path.join(parent, "choice.txt"))
        return
    records, trade = (
        records_of(glob.glob(os.path.join(glob.escape(folder), "*", "seed*", "*_residual_*.json"))) if folder else {}
        for folder in (args.runs, args.trade))
    known, wanted = ({grounds(run) for runs in found.values() for run in runs} for found in (records, trade))
    if wanted - known:
        raise UserError(f"{args.trade} was measured on other draws, images or T0 than {args.runs}: measure it likewise")
    refuse_another_retrained({**records, **{f"--trade {setting}": runs for setting, runs in trade.items()}})
    print_tables(records, os.path.join(args.runs, "methods.md"))
    plot(records, trade, os.path.join(args.runs, "methods.png"))


if __name__ == "__main__":
    run(main, get_args_parser())
