"""Table 3 as Markdown: what students learn from T0, from T trained without L_at and with it, and from R, which never
saw the deposit classes: mean and standard deviation over runs (a metrics.json each), the paper's values below."""

import os
import re

from analysis.table1 import load_runs, of_common_draws
from utils.cli import make_parser, path, run
from utils.errors import UserError
from utils.tables import markdown, print_table, summary

STUDENTS = {"cnn": "CNN", "resnet18": "ResNet-18", "resnet20": "ResNet-20"}
ACCURACIES = {"pre_acc": "Pre Acc", "dep_acc": "Dep Acc"}
CORNER = "student, distillation"

# Ye et al., ECCV 2022, Table 3: Pre Acc and Dep Acc of the student
TEACHERS = ("T0", "T without L_at", "T with L_at", "R")
_VALUES = {
    "CNN, logits": ((85.38, 86.15), (85.97, 84.26), (85.70, 82.75)),
    "CNN, attention": ((85.27, 85.94), (86.01, 85.72), (85.54, 81.83)),
    "ResNet-18, logits": ((94.26, 95.73), (94.55, 92.70), (94.64, 91.49)),
    "ResNet-18, attention": ((94.09, 95.24), (94.15, 94.61), (93.85, 88.76)),
}
PAPER = {f"{row}: {accuracy}": {teacher: f"{pair[i]:.2f}" for teacher, pair in zip(TEACHERS, pairs)}
         for row, pairs in _VALUES.items() for i, accuracy in enumerate(ACCURACIES.values())}


def get_args_parser():
    parser = make_parser(__doc__)
    parser.add_argument("--metrics", nargs="+", type=path, required=True,
                        help="metrics files of students: <student>_<distillation>/<original, retrained or "
                             "lambda_at_WEIGHT>/seed<k>/metrics.json, as scripts/3_table3_transferability.sh lays them")
    parser.add_argument("--out", type=path, default=None, help="Markdown file to write as well")
    return parser


def _place(path):
    """(student and distillation, teacher) of a metrics file."""
    found = re.search(r"(\w+)_(none|logits|attention)/(original|retrained|lambda_at_[\d.e+-]+)/seed\d+/[^/]+$",
                      path.replace(os.sep, "/"))
    if found is None:
        raise UserError(f"{path} does not lie in <student>_<distillation>/<teacher>/seed<k>/")
    student, distillation, folder = found.groups()
    teacher = {"original": TEACHERS[0], "retrained": TEACHERS[3]}.get(folder)
    if teacher is None:
        weight = folder.removeprefix("lambda_at_")
        teacher = TEACHERS[1] if float(weight) == 0 else f"{TEACHERS[2]} ({weight})"
    return f"{STUDENTS.get(student, student)}, {distillation.replace('none', 'labels alone')}", teacher


def load_students(paths):
    """The contents of metrics files of students. Raises UserError for those of others."""
    for path, metrics in zip(paths, runs := load_runs(paths)):
        if "student" not in metrics:
            raise UserError(f"{path} has no figures of a student: name files of analysis.train_student")
    return runs


def table3_rows(paths):
    """{student and accuracy: {teacher: summary}}, over the draws that all teachers of a student have; with one weight
    of L_at, the paper's rows of these students too."""
    cells = {}
    for path in sorted(paths):
        student, teacher = _place(path)
        cells.setdefault(student, {}).setdefault(teacher, []).append(path)
    teachers = sorted({teacher for of_student in cells.values() for teacher in of_student},
                      key=lambda teacher: (TEACHERS.index(teacher.split(" (")[0]), teacher))
    # several weights of L_at stand in the headings, and the paper's column fits none of them
    several = sum(teacher.startswith(TEACHERS[2]) for teacher in teachers) > 1
    rows = {}
    for student, of_student in cells.items():
        of_student = of_common_draws(of_student)
        runs = {teacher: load_students(of_student.get(teacher, [])) for teacher in teachers}
        for key, accuracy in ACCURACIES.items():
            rows[f"{student}: {accuracy}"] = {
                teacher if several else teacher.split(" (")[0]: summary([run["student"][key] for run in of_teacher])
                for teacher, of_teacher in runs.items()}
    return {**rows, **{f"paper: {row}": PAPER[row] for row in rows if row in PAPER and not several}}


def main(args):
    print_table(markdown(table3_rows(args.metrics), CORNER), args.out)


if __name__ == "__main__":
    run(main, get_args_parser())
