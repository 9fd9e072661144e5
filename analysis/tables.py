"""The tables of the pages: what each shows, what makes it, and which files under results/logs/ are behind it."""

import os
import statistics
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from analysis.ablation import FIGURES, by_variant, named, overview, variant_rows
from analysis.bank import bank_rows, module_rows
from analysis.methods import choose, forgetting_rows, measures_of, records_of, rows_of
from analysis.recovery import recovery_rows
from analysis.robustness import average_rows
from analysis.table1 import load_runs, paper_rows
from analysis.table3 import CORNER, table3_rows
from analysis.tsne import NETWORKS
from utils.files import load_json, read_head
from utils.tables import above, summary, table1_rows


class Table(NamedTuple):
    """data: what was measured on; command: what makes it; runs: patterns of its metrics files below results/logs/;
    rows: those files -> {row: {column: summary}}; corner: heading of the first column; logs: pattern of the logs beside
    a metrics file, "" for none; further: patterns below results/logs/ of the logs of other networks in the table."""

    data: str
    command: str
    runs: str
    rows: Callable
    corner: str = ""
    logs: str = "*_log.jsonl"
    further: str = ""


def ablation(split):
    """All axes that were run, a row each value, from metrics files <folder>/<default or axis/value>/seed<k>/<file>."""
    return lambda paths: named(overview(os.path.commonpath(paths), split))


def table1(*, paper=None):
    """Table 1 over metrics files, the paper's rows below."""
    return lambda paths: {**table1_rows(load_runs(paths)), **paper_rows(paper)}


def variants(paths):
    """Deposits by other terms or another cut, from metrics files <variant>/seed<k>/<file>: Pre and Dep Acc of T, and
    Avg Acc of each withdrawal minus that of T0."""
    withdrawals = {merge: partial(above, key=merge) for merge in ("concat", "tr_alone", "released", "difference")}
    return variant_rows(by_variant(paths), {**{key: FIGURES[key] for key in ("T: Pre", "T: Dep")}, **withdrawals})


def trials(paths):
    """Deposits by other settings, from metrics files <setting>/seed<k>/<file>."""
    return variant_rows(by_variant(paths))


def bank(paths):
    """The states of several banks, by the number of deposits away."""
    return bank_rows([load_json(path) for path in paths])


def banks(paths):
    """{bank: its draws} of files <bank>/bank<k>.json."""
    found = {}
    for path in paths:
        found.setdefault(path.split(os.sep)[-2].replace("_", ", "), []).append(load_json(path))
    return found


def bank_settings(paths):
    """Banks by another setting each: all states together."""
    return {name: bank_rows(runs)["any"] for name, runs in banks(paths).items()}


def recovery(paths):
    """What is kept beside T, over draws, from what analysis.recovery wrote."""
    return recovery_rows(load_json(paths[0]))


def tsne(paths):
    """Shares of nearest neighbours of the own class, files <architecture>.json of analysis.tsne."""
    rows = {title: {} for title in NETWORKS.values()}
    for path in paths:
        arch = os.path.splitext(os.path.basename(path))[0]
        for name, of_network in load_json(path)["neighbour_accuracy"].items():
            for key, classes in (("pre", "preserved"), ("dep", "deposit")):
                rows[NETWORKS[name]][f"{arch}: {classes}"] = summary([of_network[key]])
    return rows


# Those of which rho means something.
SHOWN = {"probe": "probe", "probe_cut": "probe at the cut", "means": "class means", "told": "told (AUC)",
         "named": "named"}


def residual(paths):
    """What networks still tell of the deposit classes: the first figure of the measures SHOWN, and of membership."""
    return {name: {title: summary([next(iter(measures[key].values())) for measures in runs])
                   for key, title in {**SHOWN, "membership": "member (AUC)"}.items()}
            for name, runs in measures_of(records_of(paths)).items()}


def rhos(paths):
    """The same relative to T0 and R."""
    _, found = rows_of(records_of(paths))
    return {method: {title: rho[key] for key, title in SHOWN.items()} for method, rho in found.items()}


ATTACKS = {"preserved_only": "preserved images alone", "k_shot_1": "1 image a class", "k_shot_5": "5 images",
           "k_shot_25": "25 images"}


def attacks(paths):
    """What the attacks that train give back: Pre / Dep after each, means over draws, and rho of the last one's Dep."""
    records = records_of(paths)
    rho = rows_of(records)[1]
    return {name: {**{title: " / ".join(f"{statistics.fmean(run[key][figure] for run in runs):.1f}"
                                        for figure in ("pre", "dep")) for key, title in ATTACKS.items()},
                   "rho, 25 images": rho.get(name, {}).get("k_shot_25")}
            for name, runs in measures_of(records).items()}


def relearning(paths):
    """Steps of training on all classes that bring D_r back, over orders, and those of T over those of R."""
    records = records_of(paths)
    steps, rho = rows_of(records)
    spread = {name: statistics.fmean(run["relearn"]["deviation"] for run in runs)
              for name, runs in measures_of(records).items()}
    return {name: {"steps": f"{steps[name]['relearn']} ± {of_orders:.0f}",
                   "Anamnesis index": rho.get(name, {}).get("Anamnesis index")}
            for name, of_orders in spread.items()}


def method_trials(paths):
    """H Mean / Dep of the probe, on held-out images, of the trials of scripts/9_methods.sh, from what analysis.residual
    wrote: a row a method and value of its second setting, rates rising from left to right. Bold: the frozen trial."""
    folders, rows = {}, {}
    for folder in map(os.path.dirname, paths):
        folders.setdefault(folder.split(os.sep)[-2], []).append(folder)
    for method, of_method in folders.items():
        with open(os.path.join(os.path.dirname(of_method[0]), "choice.txt"), encoding="utf-8") as file:
            frozen = file.read().strip()
        _, figures = choose(of_method)
        settings = {trial: trial.removeprefix("lr").split("_", 1) for trial in figures}
        by_rate = sorted(settings.items(), key=lambda found: (float(found[1][0]), len(found[1][1]), found[1][1]))
        for trial, (rate, second) in by_rate:
            row = rows.setdefault(f"{method}, {second}", {})
            text = " / ".join(f"{figures[trial][key]['mean']:.1f}" for key in ("H Mean", "probe Dep")) + f" at {rate}"
            row[("lowest rate", "second", "third")[len(row)]] = f"**{text}**" if trial == frozen else text
    return rows


def trade(paths):
    """Settings of one method, from what analysis.residual wrote: what T keeps, and what its features still tell: the
    probe, and rho of it after the upper part and at the cut."""
    records = records_of(paths)
    forgotten, (_, rho) = forgetting_rows(records), rows_of(records)
    return {setting: {"Pre": forgotten[setting]["Pre"], "H Mean": forgotten[setting]["H Mean"],
                      "probe": summary([run["measures"]["probe"]["dep"] for run in runs]),
                      "rho": rho[setting]["probe"], "rho at the cut": rho[setting]["probe_cut"]}
            for setting, runs in records.items()}


def speed(paths):
    """Images per second of a training step, from what analysis.speed wrote."""
    rows = {}
    for record in map(read_head, paths):
        row = f"{record['arch']}, {record['hardware']}, {record['threads']} threads, {record['precision']}"
        rows[row] = {side: summary([rate]) for side, rate in record["images_per_s"].items()}
    return rows


def published(arch, script="1_table1_cifar10.sh 0 1 2", variables=""):
    """The command of a script whose original is a published network."""
    return f"PUBLISHED={arch} {variables}bash scripts/{script}"


CIFAR10 = "CIFAR-10, test set, three draws"
TABLES = {
    "cifar10_resnet20": Table(CIFAR10, published("resnet20", variables="INDEPENDENT=1 RETRAIN_EPOCHS=30 "),
                              "table1/cifar10_resnet20/paper/seed*/metrics.json", table1(paper="cifar10")),
    "cifar10_resnet20_split2": Table(CIFAR10, published("resnet20", variables="VARIANTS=split2 "),
                                     "table1/cifar10_resnet20/split2/seed*/metrics.json", table1()),
    "cifar10_resnet20_authors": Table(CIFAR10, published("resnet20", variables="VARIANTS=authors "),
                                      "table1/cifar10_resnet20/authors/seed*/metrics.json", table1()),
    "variants_resnet20": Table(CIFAR10, published("resnet20", variables='VARIANTS="paper authors ours split2" '),
                               "table1/cifar10_resnet20/*/seed*/metrics.json", variants, "deposit by"),
    "cifar10_resnet18": Table(CIFAR10, "EPOCHS=70 INDEPENDENT=1 bash scripts/1_table1_cifar10.sh 0 1 2 (Independent in "
                              "part)", "table1/cifar10_resnet18/paper/seed*/metrics.json", table1(paper="cifar10")),
    "variants_resnet18": Table(CIFAR10, 'EPOCHS=70 VARIANTS="paper authors ours split2" bash '
                               "scripts/1_table1_cifar10.sh 0 1 2",
                               "table1/cifar10_resnet18/*/seed*/metrics.json", variants, "deposit by"),
    "cifar10_resnet18_24epochs": Table(CIFAR10, 'WEIGHTS=epoch14.pt EPOCHS=10 ORIGINAL_FLAGS="--lr 0.05 '
                                       '--warmup_epochs 0.5" bash scripts/1_table1_cifar10.sh 0 1 2',
                                       "table1/cifar10_resnet18_24epochs/paper/seed*/metrics.json", table1()),
    "cifar10_resnet56": Table(CIFAR10, published("resnet56"), "table1/cifar10_resnet56/paper/seed*/metrics.json",
                              table1(paper="cifar10")),
    "variants_resnet56": Table(CIFAR10, published("resnet56", variables='VARIANTS="paper authors ours split2" '),
                               "table1/cifar10_resnet56/*/seed*/metrics.json", variants, "deposit by"),
    "cub200": Table("CUB-200-2011, 128 pixels, test set, three draws", "INDEPENDENT=1 bash scripts/2_table1_cub200.sh",
                    "table1/cub200/paper/seed*/metrics.json", table1(paper="cub200")),
    "table3": Table("CIFAR-10, test set, draw of seed 0",
                    published("resnet20", "3_table3_transferability.sh 0",
                              "RETRAIN_EPOCHS=30 STUDENTS=cnn STUDENT_EPOCHS=8 ") + " (in part)",
                    "table3/resnet20/*/*/seed*/metrics.json", table3_rows, CORNER,
                    further="retrained_30/seed0/*_log.jsonl"),
    "table3_seed2": Table("CIFAR-10, test set, draw of seed 2",
                          published("resnet20", "3_table3_transferability.sh 2",
                                    "RETRAIN_EPOCHS=30 STUDENTS=cnn STUDENT_EPOCHS=8 ") + " (in part)",
                          "table3/resnet20_seed2/*/*/seed2/metrics.json", table3_rows, CORNER,
                          further="table3/resnet20_seed2/lambda_at_0/seed2/*_log.jsonl "
                          "ablation/default/seed2/*_log.jsonl"),
    "table3_20epochs": Table("CIFAR-10, test set, draw of seed 0",
                             published("resnet20", "3_table3_transferability.sh 0",
                                       "RETRAIN_EPOCHS=60 STUDENTS=cnn STUDENT_EPOCHS=20 ") + " (in part)",
                             "table3/resnet20_20epochs/*/*/seed*/metrics.json", table3_rows, CORNER,
                             further="table3/resnet20_20epochs/lambda_at_*/seed0/*_log.jsonl"),
    "tsne": Table("CIFAR-10, 3,000 test images, draw of seed 0", "SAVE=... bash scripts/4_figure_tsne.sh",
                  "tsne/*.json", tsne, "share (%)", "", "tsne/run_resnet18/*_log.jsonl "
                  "table1/cifar10_resnet20/paper/seed0/*_log.jsonl"),
    "bank_resnet20": Table("CIFAR-10, test set, three draws of five deposits of one class",
                           published("resnet20", "8_bank.sh 0 1 2"),
                           "bank/resnet20/bank?.json", bank, "deposits away", "bank?/*/deposit_log.jsonl"),
    "bank_resnet18": Table("CIFAR-10, test set, three draws of five deposits of one class",
                           'WEIGHTS=epoch14.pt ARCH=resnet18 EPOCHS=10 ORIGINAL_FLAGS="--lr 0.05 --warmup_epochs '
                           '0.5" bash scripts/8_bank.sh 0 1 2',
                           "bank/resnet18/bank?.json", bank, "deposits away", "bank?/*/deposit_log.jsonl"),
    "bank_resnet20_pairs": Table("CIFAR-10, test set, one draw of five deposits of two classes",
                                 published("resnet20", "8_bank.sh 0", "SAVE=checkpoints/bank_pairs SIZE=2 "),
                                 "bank/resnet20_pairs/bank?.json", bank, "deposits away", "bank?/*/deposit_log.jsonl"),
    "bank_resnet20_ten": Table("CIFAR-10, test set, ten deposits of one class, 50 states drawn",
                               published("resnet20", "8_bank.sh 0",
                                         "SAVE=checkpoints/bank_ten DEPOSITS=10 AWAY=7 STATES=50 "),
                               "bank/resnet20_ten/bank?.json", bank, "deposits away", "bank?/*/deposit_log.jsonl"),
    "bank_modules": Table("CIFAR-10, test set, the draws of the tables above", "bash scripts/8_bank.sh, as above",
                          "bank/resnet*/bank?.json", lambda paths: module_rows(banks(paths)), "deposits withdrawn",
                          "bank?/*/deposit_log.jsonl"),
    "bank_settings": Table("CIFAR-10, held-out images, draw of seed 10 of five deposits of one class",
                           'VAL_FRACTION=0.1 DEPOSIT_FLAGS="--lambda_kp ..." ... bash scripts/8_bank.sh 10',
                           "bank_settings/*/bank10.json", bank_settings, "original, setting",
                           "bank10/*/deposit_log.jsonl"),
    "recovery_resnet20": Table(CIFAR10, published("resnet20", "6_recovery_bytes.sh 0 1 2"),
                               "recovery/resnet20/recovery.json", recovery, "kept beside T",
                               "*/seed*/deposit_log.jsonl"),
    "recovery_resnet20_split2": Table(CIFAR10, published("resnet20", "6_recovery_bytes.sh 0 1 2",
                                                         'SAVE=checkpoints/recovery_split2 '
                                                         'DEPOSIT_FLAGS="--split_at 2" '),
                                      "recovery/resnet20_split2/recovery.json", recovery, "kept beside T",
                                      "*/seed*/deposit_log.jsonl"),
    "recovery_resnet56": Table(CIFAR10, published("resnet56", "6_recovery_bytes.sh 0 1 2", 'RATIOS="0.51" ')
                               + " (deposit and forms in part)", "recovery/resnet56/recovery.json", recovery,
                               "kept beside T", "", "table1/cifar10_resnet56/ours/seed*/*_log.jsonl"),
    **{name: Table(CIFAR10,
                   published("resnet20", "9_methods.sh 0 1 2",
                             'RETRAIN_EPOCHS=60 RETRAINED=0 MEASURES="answers probe ..." '),
                   "methods/resnet20/*/seed*/target_residual_*.json", rows, "network",
                   further="methods/resnet20/retrained_0/seed*/*_log.jsonl")
       for name, rows in (("methods", lambda paths: forgetting_rows(records_of(paths))), ("residual", residual),
                          ("rho", rhos))},
    **{name: Table("CIFAR-10, held-out images that T0 has not seen, draw of seed 10",
                   published("resnet20", "9_methods.sh trials", "RETRAIN_EPOCHS=60 "), runs, method_trials,
                   "H Mean / probe of", further="methods_trials/resnet20/original/*_log.jsonl")
       for name, runs in (("method_trials", "methods_trials/resnet20/*[!p]/*/target_residual_*.json"),  # all but deep's
                          ("deep_trials", "methods_trials/resnet20/deep/*/target_residual_*.json"))},
    "methods_probe": Table(CIFAR10,
                           "python -m analysis.forget, train_deposit.py --lr 0.03, analysis.residual (residual.md)",
                           "methods_probe/resnet20/*/seed*/target_residual_*.json "
                           "methods/resnet20/deep/seed*/target_residual_*.json", trade, "network",
                           further="methods/resnet20/retrained_0/seed*/*_log.jsonl"),
    "attacks": Table("CIFAR-10, test set, draws of seeds 1 and 2",
                     "python -m analysis.residual ... --measures preserved_only k_shot_1 k_shot_5 k_shot_25",
                     "attacks/resnet20/[dl]*/seed[12]/target_residual_*.json", attacks,
                     "network", further="attacks/resnet20/retrained_0/seed[12]/*_log.jsonl"),
    "relearn": Table("CIFAR-10, test set, draw of seed 2", "python -m analysis.residual ... --measures answers relearn",
                     "relearn/resnet20/*/seed2/target_residual_*.json", relearning, "network",
                     further="relearn/resnet20/retrained_0/seed2/*_log.jsonl"),
    "trade": Table("CIFAR-10, test set, draw of seed 0", "python train_deposit.py --preset deep ... (deep.md)",
                   "trade/*/seed*/target_residual_*.json", trade, "setting",
                   further="methods/resnet20/retrained_0/seed0/*_log.jsonl"),
    **{name: Table(CIFAR10, "python -m analysis.robustness --runs ...",
                   f"attacks/resnet20/{method}/seed*/robustness.json",
                   lambda paths: average_rows([load_json(path) for path in paths]), "Avg or Dep Acc after")
       for name, method in (("robustness", "lirf"), ("robustness_deep", "deep"))},
    "ablation": Table(CIFAR10, published("resnet20", "5_ablation.sh 0 1 2",
                                         'AXES="losses split temperature classes images epochs lambda_at" '),
                      "ablation/**/metrics.json", ablation("test"), "axis: value"),
    "settings": Table("CIFAR-10, held-out images of an own ResNet-20, draw of seed 10",
                      'EPOCHS=45 ORIGINAL_FLAGS="--warmup_epochs 1 --seed 10" VAL_FRACTION=0.1 AXES=... '
                      "bash scripts/5_ablation.sh 10 (at the commits below; defaults have changed since)",
                      "settings/**/metrics_val.json", ablation("val"),
                      "axis: value"),
    "settings_published": Table("CIFAR-10, held-out images of the published ResNet-20, draw of seed 10",
                                published("resnet20", "5_ablation.sh 10",
                                          'VAL_FRACTION=0.1 AXES="lambda_kp random_label" '),
                                "settings_published/**/metrics_val.json", ablation("val"), "axis: value"),
    "settings_cub": Table("CUB-200-2011 at 96 pixels, held-out images, draw of seed 7",
                          "python train_deposit.py --original original_wd2e-3/original.pt --seed 7 --batch_size 32 ...",
                          "settings_cub/deposit/*/seed7/metrics_val.json", trials, "setting"),
    "settings_cub_seen": Table("CUB-200-2011 at 128 pixels, held-out images that T0 has seen, draw of seed 7",
                               "python train_deposit.py --original original/original.pt --seed 7 --batch_size 32 ...",
                               "settings_cub_seen/*/seed7/metrics_val.json", trials, "setting"),
    "speed": Table("random images of 32 pixels, batches of 128", "ARCH=... STEPS=... bash scripts/7_benchmark.sh",
                   "speed/*_log.jsonl", speed, "images per second"),
    "quickstart": Table("digits, test set, one run", "bash scripts/0_quickstart.sh", "quickstart/metrics.json",
                        table1()),
}
