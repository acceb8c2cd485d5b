"""The house: which file may import which, and which files stand alone."""

import ast
import re
import shutil
import subprocess
import sys
from functools import cache

import data
from helpers import ROOT, SCRIPTS

FILES = [*ROOT.glob("*.py"), *ROOT.glob("loaders/*.py"), *ROOT.glob("evaluation/*.py")]
ROOMS = {
    path.relative_to(ROOT).with_suffix("").as_posix().replace("/", "."): path for path in FILES
}
ROOMS = {
    name.removesuffix(".__init__"): path for name, path in ROOMS.items() if name != "test_models"
}
LATE = {"matplotlib", "rdkit", "scipy", "sklearn", "torchvision"}  # imported where they are used


@cache
def trees():
    return {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in ROOMS.items()}


def imports(tree, nested=True):
    """The modules that a file imports: when it is imported itself and, with nested, later."""
    nodes = [tree]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        later = isinstance(node, ast.FunctionDef) or is_main(node)
        if nested or not later:
            nodes += ast.iter_child_nodes(node)


def is_main(node):
    return isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"


def imports_by_name(name, tree):
    """Those that importlib finds by a name: the files of loaders/ in data.py, the scripts in
    evaluation/command.py."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    calls = [
        ast.unparse(node) for node in calls if ast.unparse(node.func).endswith("import_module")
    ]
    if name == "data":
        assert calls == ["importlib.import_module(f'loaders.{file}')"]
        return [f"loaders.{file}" for file in {*data.DATASETS.values(), *data.PREPARED, "arrays"}]
    if name == "evaluation.command":
        assert calls == ["importlib.import_module(args['script'])"]
        return list(SCRIPTS)
    assert not calls, name
    return []


def arrows(nested=True):
    """{room: the rooms that it imports}"""
    graph = {}
    for name, tree in trees().items():
        modules = {*imports(tree, nested), *(imports_by_name(name, tree) if nested else [])}
        graph[name] = {module for module in modules if module in ROOMS} - {name}
    return graph


def test_no_imports_go_in_a_circle():
    graph, done = arrows(nested=False), set()
    while len(done) < len(graph):
        ready = {name for name, others in graph.items() if others <= done} - done
        assert ready, {name: others - done for name, others in graph.items() if name not in done}
        done |= ready


def test_every_arrow_goes_down():
    floors = {"nets": 0, "data": 1, "loaders": 2, "eval": 3, "evaluation": 4}
    floors |= dict.fromkeys(SCRIPTS, 3)
    every = arrows()
    for name, others in every.items():
        room = name.partition(".")[0]
        for other in others:
            arrow = room, other.partition(".")[0]
            asked = arrow in [("data", "loaders"), ("eval", "evaluation")]
            inside = arrow[0] == arrow[1] and room in ("loaders", "evaluation")
            assert inside or asked or floors[arrow[0]] > floors[arrow[1]], (name, other)
    at_import = arrows(nested=False)
    assert at_import["nets"] == at_import["data"] == set()  # loaders when asked for a data set
    assert at_import["eval"] == {"data", "nets"}
    for script in SCRIPTS:
        assert every[script] == {"data", "nets"}


def test_only_the_last_lines_of_eval_know_of_the_evaluation():
    last = trees()["eval"].body[-1]
    assert is_main(last) and len(last.body) <= 3
    inside = {module for module in imports(last) if module.startswith("evaluation")}
    everywhere = {module for module in imports(trees()["eval"]) if module.startswith("evaluation")}
    assert inside == everywhere and "evaluation.command" in inside


def test_packages_that_may_be_missing_are_imported_where_used():
    for name, tree in trees().items():
        packages = {module.partition(".")[0] for module in imports(tree, nested=False)}
        late = LATE - ({"torchvision"} if name.startswith("loaders") else set())
        assert not packages & late, name
    for script in SCRIPTS:
        above, below = ({*imports(ast.parse(text))} for text in halves(script))
        assert {module.partition(".")[0] for module in above} <= {
            "torch",
            "nets",
            "math",
            "itertools",
        }
        assert {module.partition(".")[0] for module in below} <= {"data"} | sys.stdlib_module_names


def test_no_interface_is_probed_for():
    for name, tree in trees().items():
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
        probes = [ast.unparse(node) for node in calls if ast.unparse(node.func) == "hasattr"]
        assert [probe for probe in probes if not probe.startswith("hasattr(sys.")] == [], name


# ---------------------------------------------------------------------------------- the text itself


def halves(script):
    """The text of a script, above its line and below it."""
    text = ROOMS[script].read_text(encoding="utf-8")
    line = r"^# -+ the training loop, identical in five scripts\n"
    above, below = re.split(line, text, flags=re.M)
    return above, below


def test_the_loop_is_one_text_in_five_files():
    texts = {halves(script)[1] for script in SCRIPTS}
    assert len(texts) == 1
    assert "# ---" not in halves("meme")[0]  # the one line that divides a script


# -------------------------------------------------------------------------------- what stands alone

UPPER_HALVES = """
import argparse, importlib, sys, torch
import nets
for name in sys.argv[1:]:
    script, p = importlib.import_module(name), argparse.ArgumentParser()
    script.options(p.add_argument)
    p.set_defaults(**script.MODEL.__init__.__kwdefaults__)
    torch.manual_seed(0)
    model = script.MODEL(nets.modalities("glyphs"), 4, **vars(p.parse_args([])))
    xs = [torch.rand(4, *m.shape) for m in model.modalities]
    streams = [(0.5, xs), (0.25, [xs[0], None]), (0.25, [None, xs[1]])]
    weights, losses = list(model.parameters()), []
    for step in range(4):
        torch.manual_seed(1)  # the same noise, so that the loss falls
        loss = model(streams).sum()
        gradients = torch.autograd.grad(loss, weights, allow_unused=True)
        with torch.no_grad():
            for w, g in zip(weights, gradients):
                w -= 0 if g is None else 1e-3 * g.sign()
        losses.append(loss.item())
    assert losses[-1] < losses[0], (name, losses)
assert not {"data", "eval", "loaders", "evaluation"} & set(sys.modules)
"""
TRAINING = """
import sys
sys.modules |= dict.fromkeys("scipy matplotlib sklearn rdkit torchvision PIL".split())
import meme
meme.main(sys.argv[1:])
assert not {"eval", "evaluation"} & set(sys.modules)
"""
NUMPY_ALONE = """
import sys
sys.modules["torch"] = None
import numpy as np
from eval import cca, linear_probe, w2
x, rng = np.arange(12.0).reshape(6, 2) % 5, np.random.default_rng(0)
print(w2(np.zeros(2), np.ones(2), np.array([3.0, 4.0]), np.ones(2)))
z, y = rng.normal(size=(60, 3)), np.arange(60) % 2
z[:, 0] += 10 * y
print(linear_probe(z[:40], y[:40], z[40:], y[40:]), cca(z, 2 * z, k=1).correlations.round(3))
"""


def python(folder, code, *argv):
    """Python in a folder that has no other of our files beside it. -> its output"""
    command = [sys.executable, "-c", code, *map(str, argv)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_upper_half_and_nets_alone_train_a_model(tmp_path):
    shutil.copy(ROOT / "nets.py", tmp_path)
    for script in SCRIPTS:
        (tmp_path / f"{script}.py").write_text(halves(script)[0], encoding="utf-8")
    python(tmp_path, UPPER_HALVES, *SCRIPTS)


def test_three_files_and_the_loaders_train_on_an_npz(arrays, tmp_path):
    folder = tmp_path / "alone"
    shutil.copytree(ROOT / "loaders", folder / "loaders", ignore=shutil.ignore_patterns("__*__"))
    shutil.copy(ROOT / "loaders" / "__init__.py", folder / "loaders")
    for file in ("meme.py", "nets.py", "data.py"):
        shutil.copy(ROOT / file, folder)
    python(folder, TRAINING, "--dataset", arrays, "--epochs", 1, "--out", "run")
    assert sorted(path.name for path in (folder / "run").iterdir()) == [
        "args.json", "checkpoint.pt", "log.csv"
    ]  # fmt: skip


def test_the_numpy_part_of_eval_needs_numpy_alone(tmp_path):
    shutil.copy(ROOT / "eval.py", tmp_path)
    assert python(tmp_path, NUMPY_ALONE).split() == ["5.0", "1.0", "[1.]"]
