"""What keeps the house small: lines, columns, imports between stages, and how files are read."""

import ast
import os
import re

import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
LINES = {"bpe.py": 750, "model.py": 1200, "train.py": 550, "kernels.py": 880, "ddp.py": 830,
         "scaling.py": 500, "curate.py": 950, "align.py": 1100, "README.md": 260}
IMPORTS = {"bpe": set(), "kernels": {"model", "train"}, "model": {"bpe", "kernels"},
           "curate": {"bpe", "model"}, "train": {"bpe", "model", "kernels"}, "scaling": {"model"},
           "ddp": {"bpe", "model", "train", "kernels"},
           "align": {"bpe", "model", "train", "curate"}}
SCRIPTS = [name for name in LINES if name.endswith(".py")]
OURS = [*SCRIPTS, *(f"tests/{name}" for name in os.listdir(os.path.join(ROOT, "tests"))
                    if name.endswith(".py"))]

def read(name):
    with open(os.path.join(ROOT, name), encoding="utf-8") as file:
        return file.read()

@pytest.mark.parametrize("name", LINES)
def test_files_are_within_their_budgets(name):
    assert read(name).count("\n") <= LINES[name]

def test_the_suite_and_the_benches_are_within_theirs():
    for kind, most in (("test_", 3600), ("bench_", 1300)):
        assert sum(read(name).count("\n") for name in OURS if f"/{kind}" in name) <= most, kind

@pytest.mark.parametrize("name", OURS)
def test_lines_are_short_and_hold_one_statement(name):
    text = read(name)
    assert not [line for line in text.splitlines() if len(line) > 100]
    starts = [node.lineno for node in ast.walk(ast.parse(text)) if isinstance(node, ast.stmt)]
    assert len(starts) == len(set(starts))

@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_say_how_to_run_them_and_import_only_what_they_may(name):
    tree, text = ast.parse(read(name)), read(name)
    assert f"    python {name}" in ast.get_docstring(tree) or "torchrun" in ast.get_docstring(tree)
    found = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import)
             for alias in node.names}
    found |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert found & IMPORTS.keys() <= IMPORTS[name[:-3]]
    assert not re.search(r"\bimport pickle\b|\bpickle\.load|(?<![\w.])eval\(", text)
    loads = re.findall(r"torch\.load\((?:[^()]|\([^()]*\))*\)", text)
    assert all("weights_only=True" in call for call in loads)
    assert name == "align.py" or not re.search(r"(?<![\w.])exec\(", text)
