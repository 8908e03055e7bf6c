"""What the scripts have in common is the same text in each, so that a diff of two of them shows the algorithm alone."""

import ast
import re
import sys
from itertools import combinations
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ("mrl_rl2", "mrl_maml", "mrl_actor_critic")
TEXTS = {script: (ROOT / f"{script}.py").read_text() for script in SCRIPTS}
SECTIONS = ["TASK FAMILIES", "AGENT", "ALGORITHM", "PLUMBING", "SETTINGS", "SETUP", "TRAINING", "LOGGING", "CLOSING"]
# What is the algorithm itself, and so differs: everything else of one name has one text.
DIFFERENT = {"Args", "Agent", "rollout", "compute_gae", "meta_loss", "evaluate"}
SIZES = {"mrl_rl2": (590, 23_000), "mrl_maml": (700, 26_000), "mrl_actor_critic": (690, 28_000)}  # lines, characters of code
each = pytest.mark.parametrize("script", SCRIPTS)
pairs = pytest.mark.parametrize("one, two", list(combinations(SCRIPTS, 2)))


def definitions(script):
    nodes = [x for x in ast.parse(TEXTS[script]).body if isinstance(x, ast.FunctionDef | ast.ClassDef)]
    return {node.name: ast.get_source_segment(TEXTS[script], node) for node in nodes}


@pairs
def test_functions_and_classes_of_one_name_have_one_text(one, two):
    first, second = definitions(one), definitions(two)
    common = (first.keys() & second.keys()) - DIFFERENT
    assert {"TaskVectorEnv", "make_envs", "sample_tasks", "step_envs", "seed_all", "average", "report"} <= common
    for name in sorted(common):
        assert first[name] == second[name], name


@pairs
def test_plumbing_flags_are_the_same(one, two):
    """The flags above `# Algorithm specific arguments` differ in their default values alone."""
    blocks = [definitions(script)["Args"].split("# Algorithm specific arguments")[0] for script in (one, two)]
    assert len({re.sub(r" = .*?(  #.*)?$", r"\1", block, flags=re.MULTILINE) for block in blocks}) == 1


@pairs
def test_main_is_plumbed_alike(one, two):
    """Settings, set-up, logging and closing are the same lines but for a few of the algorithm's own."""

    def parts(script):
        main = TEXTS[script].split('if __name__ == "__main__":')[1]
        pieces = re.split(r"^ +# ([A-Z]+)$", main, flags=re.MULTILINE)
        return dict(zip(pieces[1::2], pieces[2::2], strict=True))

    for name in ("SETTINGS", "SETUP", "LOGGING", "CLOSING"):
        lines = [{x.strip() for x in parts(script)[name].splitlines() if x.strip()} for script in (one, two)]
        assert len(lines[0] & lines[1]) > 0.6 * max(map(len, lines)), (name, lines[0] ^ lines[1])


@each
def test_sections_stand_in_one_order(script):
    assert re.findall(r"^ *# ([A-Z][A-Z ]+)(?:$|:)", TEXTS[script], flags=re.MULTILINE) == SECTIONS


@each
def test_script_stands_alone(script):
    modules = set()
    for node in ast.walk(ast.parse(TEXTS[script])):
        modules |= {alias.name for alias in node.names} if isinstance(node, ast.Import) else set()
        modules |= {node.module} if isinstance(node, ast.ImportFrom) else set()
    allowed = sys.stdlib_module_names | {"gymnasium", "numpy", "torch", "tqdm", "tyro", "mujoco"}
    assert {module.split(".")[0] for module in modules} <= allowed


@each
def test_script_pins_what_requirements_pin(script):
    pins = re.findall(r'"([^"]+==[^"]+)"', TEXTS[script].split("# ///")[1])
    assert sorted(pins) == sorted((ROOT / "requirements.txt").read_text().split())


@pytest.mark.parametrize("script", SIZES)
def test_scripts_stay_small(script):
    code = re.sub(r'^ *""".*?"""$|(^|  ) *# .*?$', "", TEXTS[script], flags=re.DOTALL | re.MULTILINE)
    size = len(TEXTS[script].splitlines()), sum(len(line.strip()) for line in code.splitlines())
    assert all(found <= most for found, most in zip(size, SIZES[script], strict=True)), size
