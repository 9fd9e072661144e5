"""Accuracy per sample, the figures of Table 1, and tables of them."""

import types

import pytest
import torch

from datasets import ImageSet, batches
from utils.metrics import evaluate, harmonic_mean, percent, table1
from utils.tables import above, as_text, markdown, minus, summary, table1_rows

PARTITION = types.SimpleNamespace(preserved_classes=[0, 1], deposit_classes=[2])


def counts(correct, total):
    return {"correct": correct, "total": total}


def test_accuracies_are_shares_of_all_images_whatever_the_batch_size():
    generator = torch.Generator().manual_seed(0)
    images = ImageSet(torch.randint(0, 256, (11, 3, 8, 8), dtype=torch.uint8, generator=generator),
                      torch.arange(11) % 3, [0.5] * 3, [0.25] * 3, flip=True)

    def forward(x, y):
        return {"network": x.mean((2, 3)), "oracle": torch.nn.functional.one_hot(y, 3),
                "diverged": torch.full((len(y), 3), torch.nan)}

    results = [evaluate(forward, batches(images, batch_size), 3) for batch_size in (1, 4, 11, 100)]
    assert all(result == results[0] for result in results)
    assert results[0]["oracle"] == counts([4, 4, 3], [4, 4, 3])
    assert results[0]["diverged"] == counts([0, 0, 0], [4, 4, 3])
    assert sum(results[0]["network"]["total"]) == 11
    assert percent(counts([3, 3, 3], [4, 3, 3])) == pytest.approx(90)


def test_what_is_unknown_is_none_and_the_original_has_forgotten_nothing():
    row = table1(counts([1, 0, 0], [2, 2, 0]), PARTITION)
    assert row["dep_acc"] is None and row["forgetting"] is None and row["h_mean"] is None
    assert row["pre_acc"] == pytest.approx(25)
    assert above({"recover": {}, "original": row}, "concat") is None
    t0 = counts([90, 80, 95], [100, 100, 100])
    row = table1(t0, PARTITION, original=t0)
    assert harmonic_mean(50, 100) == pytest.approx(200 / 3) and harmonic_mean(50, -1) == 0
    assert row["forgetting"] == row["h_mean"] == 0 and row["avg_acc"] == pytest.approx(100 * 265 / 300)


@pytest.mark.parametrize("t0_dep,pre,dep,forgetting,h", [
    (94.60, 93.41, 15.00, 79.60, 85.95),   # CIFAR-10, Table 1 of the paper
    (48.60, 51.64, 1.18, 47.42, 49.44),    # CUB200-2011
])
def test_the_papers_own_deposit_rows(t0_dep, pre, dep, forgetting, h):
    t0 = counts([10_000, 0, round(100 * t0_dep)], [10_000, 0, 10_000])
    t = counts([round(100 * pre), 0, round(100 * dep)], [10_000, 0, 10_000])
    row = table1(t, PARTITION, original=t0)
    assert round(row["pre_acc"], 2) == pre and round(row["dep_acc"], 2) == dep
    assert round(row["forgetting"], 2) == forgetting and round(row["h_mean"], 2) == h


def test_the_papers_own_average_row():
    column = counts([round(700 * 94.56), 0, round(300 * 97.92)], [70_000, 0, 30_000])
    assert round(table1(column, PARTITION)["avg_acc"], 2) == 95.57


def test_mean_and_deviation():
    assert as_text(summary([1.0, 3.0])) == "2.00 ± 1.41" and summary([1.0, 3.0])["n"] == 2
    assert as_text(summary([1.0])) == "1.00" and as_text(summary([1.0, None])) == "-" == as_text(summary([]))
    assert minus(3, 1) == 2 and minus(None, 1) is None


def test_a_table_is_markdown_of_even_columns():
    rows = {"ours": {"Avg Acc": summary([1.0]), "F": None}, "paper": {"Avg Acc": "94.06"}}
    assert markdown(rows, "network") == ("| network | Avg Acc | F   |\n| ------- | ------- | --- |\n"
                                         "| ours    | 1.00    | -   |\n| paper   | 94.06   | -   |\n")


def test_table1_leaves_out_networks_that_a_run_lacks_and_says_how_far_t_is_from_the_original():
    t0, t = table1(counts([9, 9, 9], [10] * 3), PARTITION), table1(counts([9, 9, 0], [10] * 3), PARTITION)
    whole = {"original": t0, "target": t, "recover": {"concat": t0, "difference": t}}
    rows = table1_rows([whole, {**whole, "recover": {"difference": t0}}])
    assert list(rows) == ["Original (T0)", "Deposit (T)", "Withdrawal, difference"]
    assert rows["Withdrawal, difference"]["Avg - Original"] == {"mean": -15.0, "deviation": 21.2132, "n": 2}
    assert rows["Withdrawal, difference"]["H Mean"] is None
