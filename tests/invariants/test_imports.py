"""Who may know whom: the arrows of the architecture, read from the source."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from stepdistill.objectives import OBJECTIVES


ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "stepdistill"
FILES = sorted(PACKAGE.rglob("*.py"))
# module or package => what it must not import, at any depth of its functions; prefixes of module names
FORBIDDEN = {
    "objectives": ("trainer", "player", "recipe", "cli", "run", "finish", "export", "bench", "checkpoint", "console"),
    "families": ("objectives", "cast", "trainer", "player", "recipe", "cli", "run", "export", "bench", "data"),
    "bench": ("objectives", "cast", "trainer", "player", "adapters", "denoiser", "losses", "families", "run", "finish",
              "checkpoint", "export", "sampling"),
    "export": ("trainer", "player", "cast", "cli", "run", "finish", "checkpoint"),
    "data": ("trainer", "player", "cast", "recipe", "cli", "run", "export", "bench"),
    "schedule": ("prediction", "condition", "denoiser", "families", "objectives", "trainer", "recipe", "adapters"),
    "prediction": ("denoiser", "families", "objectives", "trainer", "recipe", "adapters", "condition"),
    "condition": ("schedule", "prediction", "denoiser", "families", "objectives", "trainer"),
    "denoiser": ("families", "objectives", "cast", "trainer", "recipe", "data"),
    "adapters": ("denoiser", "families", "objectives", "cast", "trainer", "recipe"),
    "attention": ("families", "objectives", "cast", "trainer", "recipe", "cli", "run", "data", "export", "bench"),
    "guidance": ("families", "objectives", "cast", "trainer", "recipe", "cli", "run", "data", "export", "bench"),
    "attention_processors": ("denoiser", "condition", "families", "objectives", "cast", "trainer", "recipe"),
    "losses": ("denoiser", "families", "objectives", "cast", "trainer", "recipe"),
    "sampling": ("families", "objectives", "cast", "trainer", "recipe"),
    "cast": ("trainer", "player", "recipe", "cli", "run", "losses", "data", "export", "bench"),
    "player": ("trainer", "cast", "objectives.", "recipe", "cli", "run", "losses"),
    "trainer": ("recipe", "cli", "run", "losses", "export", "bench", "families", "objectives.vsd", "objectives.dmd2",
                "objectives.denoising", "objectives.matching"),
    "health": ("trainer", "player", "recipe", "cli", "run", "families", "data", "export", "bench", "objectives.vsd",
               "objectives.dmd2", "objectives.denoising", "objectives.matching", "checkpoint", "previews"),
    "options": ("trainer", "player", "cast", "families", "recipe", "run", "export", "bench", "data"),
    "run_folder": ("trainer", "player", "cli", "run", "finish", "export", "streams"),
    "stages": ("trainer", "cast", "cli", "run", "run_folder", "finish", "export", "bench"),
    "recipe": ("trainer", "player", "cast", "families", "run", "export", "bench", "data"),
}  # fmt: skip

ORDINARY_WORDS = {"sum", "clip", "add", "guidance"}  # names of objectives that any program may contain


def module_of(file: Path) -> str:
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def runtime_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those under `if TYPE_CHECKING:`, which are never executed."""
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            continue
        yield child
        yield from runtime_nodes(child)


def imports_of(file: Path) -> set[str]:
    """Modules of this package that a file imports, without the package's name, also inside of functions."""
    found = set()
    for node in runtime_nodes(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            assert node.level == 0, f"{file}: relative imports hide who knows whom"
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return {name.removeprefix("stepdistill.") for name in found if name.startswith("stepdistill.")}


def is_under(module: str, prefix: str) -> bool:
    return module.startswith(prefix) if prefix.endswith(".") else module == prefix or module.startswith(f"{prefix}.")


@pytest.mark.parametrize("place", FORBIDDEN)
def test_imports_follow_the_arrows_only(place: str) -> None:
    files = [file for file in FILES if is_under(module_of(file), place)]
    assert files, f"nothing is called {place} any more; mend this test's table"
    for file in files:
        wrong = {m for m in imports_of(file) for prefix in FORBIDDEN[place] if is_under(m, prefix)}
        assert not wrong, f"{file.relative_to(ROOT)} must not know {', '.join(sorted(wrong))}"


def test_what_is_forbidden_exists() -> None:
    modules = {module_of(file) for file in FILES}
    for prefixes in FORBIDDEN.values():
        for prefix in prefixes:
            assert any(is_under(module, prefix) for module in modules), prefix


def test_an_import_that_breaks_the_rule_would_be_seen(tmp_path: Path) -> None:
    file = tmp_path / "x.py"
    file.write_text(
        "if TYPE_CHECKING:\n    from stepdistill.cast import Cast\n"
        "def f():\n    from stepdistill.trainer import Trainer\n    import stepdistill.run\n"
        "from stepdistill import recipe\n"
    )
    assert imports_of(file) >= {"trainer", "run", "recipe"}
    assert not any(is_under(module, "cast") for module in imports_of(file))


def test_only_the_adapters_module_touches_pefts_state() -> None:
    touching = []
    for file in FILES:
        text = file.read_text()
        if re.search(r"_active_adapter|_disable_adapters|set_adapter|disable_adapter|peft\.tuners", text):
            code = "\n".join(ast.unparse(node) for node in ast.parse(text).body if not isinstance(node, ast.Expr))
            if re.search(r"_active_adapter|_disable_adapters|\.set_adapter\(|\.disable_adapter|peft\.tuners", code):
                touching.append(module_of(file))
    assert touching == ["adapters"]


@pytest.mark.parametrize("name", ["trainer", "player", "cast", "checkpoint", "run_folder"])
def test_the_loop_knows_no_methods_name(name: str) -> None:
    text = (PACKAGE / f"{name}.py").read_text().lower()
    names = [rf"\b{method}\b" for method in OBJECTIVES if method not in ORDINARY_WORDS]
    modules = [place.partition(":")[0].removeprefix("stepdistill.") for place in OBJECTIVES.values()]
    for method in (*names, *modules, "swiftbrush", "critic", "distribution matching", r"isinstance\(self.objective"):
        assert not re.search(method, text), f"{name}.py mentions {method!r}"


def test_only_the_prediction_module_divides_by_alpha_or_sigma() -> None:
    """Losses weigh by SNR, which is a ratio of levels and no conversion of a prediction."""
    allowed = {"prediction", "schedule", "losses", "export.schedulers"}
    for file in FILES:
        if module_of(file) in allowed:
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
                divisor = ast.unparse(node.right)
                assert not re.search(r"\b(alpha|sigma)\b", divisor), f"{module_of(file)}: {ast.unparse(node)}"


def loaded_by(code: str) -> set[str]:
    script = f"import sys; {code}; print(' '.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "code",
    ["import stepdistill", "from stepdistill import Recipe", "import stepdistill.cli", "import stepdistill.run"],
)
def test_the_package_its_recipes_and_its_command_line_import_without_torch(code: str) -> None:
    loaded = loaded_by(code)
    assert "stepdistill" in loaded
    assert not loaded & {"torch", "diffusers", "transformers", "peft", "accelerate", "matplotlib"}


def test_every_public_name_is_there() -> None:
    import stepdistill

    for name in stepdistill.__all__:
        assert getattr(stepdistill, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'Nonsense'"):
        _ = stepdistill.Nonsense
