"""How the code is laid out: arrows between packages lead one way, functions and lines are short."""

import ast

import pytest
from conftest import ROOT

# Each may import those before it: utils <- datasets <- models <- stages <- analysis <- tests.
STAGES = sorted(path.stem for path in ROOT.glob("*.py"))
LAYERS = [("utils",), ("datasets",), ("models",), tuple(STAGES), ("analysis",), ("tests", "fixtures", "conftest")]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
FILES = sorted(path for path in [*ROOT.glob("*.py"), *(file for name in RANK for file in (ROOT / name).rglob("*.py"))]
               if "__pycache__" not in path.parts)
LINES_OF_MAIN, LINES_OF_A_FUNCTION = 45, 60


def name_of(path):
    return str(path.relative_to(ROOT))


def imported(path):
    """The first words of what a file imports, wherever the import stands."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports by a relative name, whose package this test cannot read"
            yield node.module.split(".")[0]


def functions(path):
    """[(name, number of lines)] of all functions in a file."""
    return [(node.name, node.end_lineno - node.lineno + 1) for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.FunctionDef)]


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_no_import_leads_to_a_layer_above(path):
    mine = RANK[path.relative_to(ROOT).parts[0].removesuffix(".py")]
    above = [name for name in imported(path) if RANK.get(name, -1) > mine]
    assert not above, f"{name_of(path)} imports {above[0]}"
    if mine == RANK[STAGES[0]]:
        assert not set(STAGES) & set(imported(path)), f"{name_of(path)} imports another stage"


def test_functions_are_short():
    files = [path for path in FILES if path.relative_to(ROOT).parts[0] != "tests"]
    long = [(name_of(path), *function) for path in files for function in functions(path)
            if function[1] > LINES_OF_A_FUNCTION]
    assert len(files) > 30 and not long
    mains = {path.stem: dict(functions(path))["main"] for path in ROOT.glob("*.py")}
    assert len(mains) == 4 and max(mains.values()) <= LINES_OF_MAIN, mains
    assert dict(functions(ROOT / "models" / "lirf.py"))["forward"] <= 20


def test_no_line_is_longer_than_120_characters():
    lines = {f"{name_of(path)}:{n}": line for path in [*FILES, *ROOT.glob("scripts/*.sh")]
             for n, line in enumerate(path.read_text().splitlines(), 1)}
    assert len(lines) > 5000 and not [place for place, line in lines.items() if len(line) > 120]
