"""The house keeps its own rules: imports, file lengths, torch-free C++, kernel lists, and docs that tell the truth."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from mnv4_kernels import environment
from mnv4_kernels.cli import parser

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "mnv4_kernels"
DOCS = ("README.md", "DESIGN.md", "csrc/DESIGN.md", "CONTRIBUTING.md", "CHANGELOG.md")

#: Rooms of DESIGN.md from the highest to the lowest; a room imports from its own and lower ones.
LEVELS = (
    ("__main__",),
    ("cli",),
    ("benchmark",),
    ("__init__",),
    ("engine",),
    ("patching",),
    ("compiler",),
    ("modules",),
    ("testing",),
    ("functional", "_arguments"),
    ("ops", "tuned"),
    ("backends",),
    ("environment", "tables"),
)
LEVEL = {room: len(LEVELS) - index for index, rooms in enumerate(LEVELS) for room in rooms}


@cache
def tracked(*patterns: str) -> list[Path]:
    """Files of the checkout, built and cached ones left out."""
    hidden = {"build", "dist", "__pycache__"}
    found = sorted({path for pattern in patterns for path in ROOT.rglob(pattern)})
    return [
        path
        for path in found
        if not any(part in hidden or part.startswith(".") for part in path.relative_to(ROOT).parent.parts)
    ]


def room_of(module: str) -> str:
    """The room of a dotted name below the package; the package itself is `__init__`."""
    return module.split(".")[1] if "." in module else "__init__"


def imported_modules(path: Path) -> set[str]:
    """Dotted names within the package that `path` imports, anywhere in the file."""
    package = ["mnv4_kernels", *path.relative_to(PACKAGE).parent.parts]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names if alias.name.split(".")[0] == "mnv4_kernels")
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            names = [*base, *(node.module.split(".") if node.module else [])]
            if names[:1] == ["mnv4_kernels"]:
                # `from . import x` may name a module of the package
                found.update(
                    ".".join([*names, alias.name]) if len(names) == 1 else ".".join(names) for alias in node.names
                )
    return found


@pytest.mark.parametrize(
    "path", tracked("mnv4_kernels/**/*.py", "mnv4_kernels/*.py"), ids=lambda path: path.relative_to(ROOT).as_posix()
)
def test_a_room_imports_only_from_itself_and_lower_rooms(path: Path) -> None:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    assert parts[0] in LEVEL, f"{parts[0]} is in no room of the list"
    for module in imported_modules(path):
        room = room_of(module)
        # `from mnv4_kernels import name`: a function of the package's front
        level = LEVEL.get(room, LEVEL["__init__"])
        assert level <= LEVEL[parts[0]], f"{path.name} imports {module} from a higher room"


def test_no_file_is_longer_than_600_lines() -> None:
    long = {
        path.relative_to(ROOT).as_posix(): lines
        for path in tracked("*.py", "*.cpp", "*.h", "*.inc", "*.md")
        if (lines := len(path.read_text().splitlines())) > 600
    }
    assert not long


def test_what_torch_does_not_promise_is_in_one_file() -> None:
    private = re.compile(
        r"torch\.(?:\w+\.)*_(?!_)\w+|TorchVersion|hasattr\(torch\b|torch\.__version__\.|[<>=] torch\.__version__"
    )
    for path in tracked("mnv4_kernels/**/*.py"):
        found = set(private.findall(path.read_text()))
        if path.parent.name in ("compiler", "benchmark"):
            found = {name for name in found if not name.startswith("torch._inductor")}
        assert not found or path.name == "torch_internals.py", f"{path.relative_to(ROOT)} names {sorted(found)}"


def test_only_ops_include_torch() -> None:
    for path in tracked("csrc/**/*.cpp", "csrc/**/*.h", "csrc/**/*.inc"):
        if path.relative_to(ROOT).parts[1] != "ops":
            assert "#include <torch" not in path.read_text(), f"{path} is torch-free by design"


def test_every_kernel_of_a_list_has_its_file_and_every_tier_file_its_row() -> None:
    lists = tracked("csrc/kernels/**/*.inc")
    assert lists
    for path in lists:
        # a row's kernel is its only name of words joined by underscores: `gemm_f32_avx512`
        rows = re.findall(r"^MNV4_\w+\(.*?\b([a-z0-9]+(?:_[a-z0-9]+)+)\b", path.read_text(), re.MULTILINE)
        listed = {name.rpartition("_")[2] for name in rows}
        present = {file.stem.rpartition("_")[2] for file in path.parent.glob(f"{path.stem}_*.cpp")}
        assert listed == present, f"{path.name} lists {sorted(listed)}, files are there for {sorted(present)}"
        for name in rows:
            (file,) = path.parent.glob(f"{path.stem}_{name.rpartition('_')[2]}.cpp")
            assert name in file.read_text(), f"{file.name} does not define {name}"


@pytest.mark.parametrize("doc", DOCS)
def test_the_links_of_a_doc_lead_somewhere(doc: str) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / doc).read_text()):
        if not target.startswith("https://"):
            assert (ROOT / target).exists(), f"{doc} links to {target}"


@pytest.mark.parametrize("doc", DOCS)
def test_the_files_that_a_doc_names_exist(doc: str) -> None:
    roots = "csrc|mnv4_kernels|tests|benchmarks|\\.ci"
    for name in re.findall(rf"`((?:{roots})/[\w./]+)`", (ROOT / doc).read_text()):
        assert (ROOT / name).exists(), f"{doc} names {name}"


def test_the_commands_of_the_readme_parse() -> None:
    text = (ROOT / "README.md").read_text().replace("\n", " ")
    commands = re.findall(r"mnv4-kernels ((?:info|demo|verify|bench|tune|run)\b[^`|]*)`", text)
    assert {command.split()[0] for command in commands} == {"info", "demo", "verify", "bench", "tune", "run"}
    for command in commands:
        parser().parse_args(shlex.split(command.replace("...", "")))


def test_the_readme_documents_every_environment_variable() -> None:
    text = (ROOT / "README.md").read_text()
    per_op = {environment.switch_of(op) for op in (*environment.OPS, *environment.TRAINING_OPS)}
    for name in set(environment.VARIABLES) - per_op:
        assert f"`{name}`" in text, f"the README does not mention {name}"
    assert f"`{environment.DISABLE}_<OP>`" in text


def test_no_file_mentions_an_environment_variable_that_does_not_exist() -> None:
    files = [
        ROOT / "setup.py",
        ROOT / ".ci" / "run",
        *tracked("*.md", "*.cpp", "*.h"),
        *tracked("mnv4_kernels/**/*.py"),
    ]
    # the op's own name is appended to the switch's where it is used
    known = {*environment.VARIABLES, f"{environment.DISABLE}_"}
    for path in files:
        for name in re.findall(r"MNV4_KERNELS_[A-Z_]+", path.read_text()):
            assert name in known, f"{path.relative_to(ROOT)} mentions {name}"


def test_the_first_two_commands_of_the_readme_install_and_test() -> None:
    commands = [
        subprocess.run(
            [sys.executable, ROOT / ".ci" / "project.py", "readme-command", str(number)],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for number in (1, 2)
    ]
    assert commands == ['pip install ".[demo]" && mnv4-kernels demo', 'pip install ".[test]" && pytest']


def test_the_results_of_the_readme_are_those_of_the_result_files() -> None:
    script = [sys.executable, ROOT / "benchmarks" / "readme_table.py", "--check"]
    assert subprocess.run(script).returncode == 0, "run `python benchmarks/readme_table.py`"
