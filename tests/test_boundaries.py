"""Dependencies point one way, and heavy imports stay where they are needed (DESIGN: the arrows between packages)."""

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

# What may import what across packages; within a package everything may.
ALLOWED = {
    "services": {"serving", "chatforge"},
    "services/cli.py": {"serving", "chatforge", "training"},
    "services/demo.py": {"serving", "chatforge", "training"},
    "services/client.py": {"chatforge"},
    "services/replies.py": {"chatforge"},
    "services/transport.py": set(),
    "serving": set(),
    "training": set(),
    "training/rank.py": {"serving"},
    "training/evaluate.py": {"serving"},
    "training/translation.py": {"serving"},
    "training/image.py": {"serving"},
    "training/image_data.py": {"serving"},
    "training/image_parts.py": {"serving"},
    "training/data/pairs.py": {"serving"},
}
MEASURES = ("training/ppo", "training/measure", "training/exam")  # stages split along their seams
PACKAGES = {"training", "serving", "services", "chatforge"}


def imported_packages(path):
    tree = ast.parse(path.read_text("utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.split(".")[0]


def allowed(relative):
    name = relative.as_posix()
    package = relative.parts[0]
    if name.startswith(MEASURES):
        return {"serving"}
    if name.startswith(("services/cli", "services/bench")):
        return ALLOWED["services/cli.py"]
    return ALLOWED.get(name, ALLOWED[package])


def test_arrows_between_packages_point_one_way():
    wrong = []
    for package in ("training", "serving", "services"):
        for path in sorted((ROOT / package).rglob("*.py")):
            relative = path.relative_to(ROOT)
            others = set(imported_packages(path)) & PACKAGES - {package}
            wrong += [f"{relative} imports {other}" for other in sorted(others - allowed(relative))]
    assert not wrong


def loaded(statement):
    code = f"import sys; {statement}; print(' '.join(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    return set(out.stdout.split())


def test_recipes_and_plans_need_no_torch():
    assert not {"torch", "ray", "transformers", "datasets"} & loaded("import training.pipeline")


def test_the_scheduler_needs_no_torch():
    assert "torch" not in set(imported_packages(ROOT / "serving/engine/scheduler.py"))


def test_a_servers_config_needs_no_torch():
    assert not {"torch", "ray", "transformers", "numpy"} & loaded("import services.config")
