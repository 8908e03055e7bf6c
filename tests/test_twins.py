"""What the scripts have in common is the same text in each, so that a diff of two of them shows the algorithm alone."""

import ast
import re
from itertools import combinations
from pathlib import Path

import pytest

SCRIPTS = sorted(Path(__file__).parent.parent.glob("mrl_*.py"))
# What is the algorithm itself, and so differs: everything else of one name has one text.
DIFFERENT = {"Args", "Agent", "rollout", "compute_gae", "adapt", "meta_loss", "evaluate", "print_table"}
pairs = pytest.mark.parametrize("one, two", list(combinations(SCRIPTS, 2)), ids=lambda path: path.stem)


def definitions(path):
    text = path.read_text()
    nodes = [node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    return {node.name: ast.get_source_segment(text, node) for node in nodes}


@pairs
def test_functions_and_classes_of_one_name_have_one_text(one, two):
    first, second = definitions(one), definitions(two)
    common = (first.keys() & second.keys()) - DIFFERENT
    assert {"make_envs", "load_checkpoint", "write_file", "stream", "require", "step_envs"} <= common
    for name in sorted(common):
        assert first[name] == second[name], name


@pairs
def test_plumbing_flags_are_the_same(one, two):
    """The flags above `# Algorithm specific arguments` differ in their default values alone."""

    def flags(path):
        block = definitions(path)["Args"].split("# Algorithm specific arguments")[0]
        return re.sub(r" = .*", "", block.split("\n", 1)[1])

    assert flags(one) == flags(two)


@pairs
def test_main_has_the_same_sections_in_the_same_order(one, two):
    def sections(path):
        return re.findall(r"^ *# ([A-Z][A-Z ]+)(?:$|:)", path.read_text(), flags=re.MULTILINE)

    assert sections(one) == sections(two)
    assert sections(one) == ["TASK FAMILIES", "AGENT", "ALGORITHM", "PLUMBING", "SETTINGS", "SETUP", "TRAINING", "LOGGING"]


@pairs
def test_main_is_plumbed_alike(one, two):
    """Of the lines of main, those that both have make up most: set-up, logging, saving and stopping are the same text."""
    mains = [path.read_text().split('if __name__ == "__main__":')[1].splitlines() for path in (one, two)]
    shared = [line for line in mains[0] if line.strip() and line in mains[1]]
    assert len(shared) > 0.5 * min(sum(bool(line.strip()) for line in main) for main in mains)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_script_stands_alone(path):
    allowed = {"gymnasium", "numpy", "torch", "tqdm", "tyro"}
    standard = {"importlib", "inspect", "io", "os", "signal", "sys", "time", "math", "dataclasses", "pathlib", "typing"}
    for node in ast.walk(ast.parse(path.read_text())):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) else []
        assert {name.split(".")[0] for name in names} <= allowed | standard


def test_scripts_pin_what_requirements_pin():
    requirements = (SCRIPTS[0].parent / "requirements.txt").read_text().split()
    for path in SCRIPTS:
        header = path.read_text().split("# ///")[1]
        assert set(re.findall(r'"([^"]+==[^"]+)"', header)) == set(requirements)
