"""Table 3 as Markdown: what students learn from T0, from T trained without L_at and from T trained with it, mean and
standard deviation over runs (a metrics.json each), the paper's values beside them."""

import os
import re
import sys

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..")
sys.path.insert(0, ROOT)
from analysis.table1 import load_runs, markdown, print_table, summary
from utils.cli import make_parser, run
from utils.errors import UserError

STUDENTS = {"cnn": "CNN", "resnet18": "ResNet-18"}
ACCURACIES = {"pre_acc": "Pre Acc", "dep_acc": "Dep Acc"}
CORNER = "student, distillation"

# Ye et al., ECCV 2022, Table 3: Pre Acc and Dep Acc of the student
TEACHERS = ("T0", "T without L_at", "T with L_at")
_VALUES = {
    "CNN, logits": ((85.38, 86.15), (85.97, 84.26), (85.70, 82.75)),
    "CNN, attention": ((85.27, 85.94), (86.01, 85.72), (85.54, 81.83)),
    "ResNet-18, logits": ((94.26, 95.73), (94.55, 92.70), (94.64, 91.49)),
    "ResNet-18, attention": ((94.09, 95.24), (94.15, 94.61), (93.85, 88.76)),
}
PAPER = {teacher: {f"{row}: {accuracy}": value for row, pairs in _VALUES.items()
                   for accuracy, value in zip(ACCURACIES.values(), pairs[i])}
         for i, teacher in enumerate(TEACHERS)}


def get_args_parser():
    parser = make_parser(__doc__)
    parser.add_argument("--metrics", nargs="+", required=True,
                        help="metrics files of students: <student>_<distillation>/<original or lambda_at_WEIGHT>/"
                             "seed<k>/metrics.json, as scripts/3_table3_transferability.sh lays them")
    parser.add_argument("--out", default=None, help="Markdown file to write as well")
    return parser


def table3_columns(paths):
    """{teacher: {row: summary}}, T0 first, then T by the weight of L_at; None where a student had no such teacher."""
    cells = {}
    for path in paths:
        place = re.search(r"(\w+)_(none|logits|attention)/(?:original|lambda_at_([\d.e-]+))/seed\d+/[^/]+$", path)
        if place is None:
            raise UserError(f"{path} does not lie in <student>_<distillation>/<original or lambda_at_WEIGHT>/seed<k>/")
        student, distillation, weight = place.groups()
        cells.setdefault((STUDENTS.get(student, student), distillation, weight), []).append(path)
    weights = sorted({weight for *_, weight in cells}, key=lambda weight: -1 if weight is None else float(weight))
    columns = {}
    for weight in weights:
        teacher = TEACHERS[0] if weight is None else TEACHERS[1] if float(weight) == 0 else f"{TEACHERS[2]} ({weight})"
        columns[teacher] = column = {}
        for student in sorted({student for student, *_ in cells}):
            for distillation in ("none", "logits", "attention"):
                runs = [metrics["student"] for metrics in
                        load_runs(cells.get((student, distillation, weight), []), ("student",))]
                for key, accuracy in ACCURACIES.items():
                    row = f"{student}, {distillation.replace('none', 'labels alone')}: {accuracy}"
                    column[row] = summary([figures[key] for figures in runs])
    return {teacher: {row: column[row] for row in column if any(c[row] for c in columns.values())}
            for teacher, column in columns.items()}


def main(args):
    print_table(markdown(table3_columns(args.metrics), PAPER, CORNER), args.out)


if __name__ == "__main__":
    run(main, get_args_parser())
