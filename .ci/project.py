"""Reads from the project's own files what must not be typed twice.

python .ci/project.py extra NAME            requirements of an extra of pyproject.toml, a line each
python .ci/project.py readme-command N      the README's Nth block of shell commands
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def extra(name: str) -> list[str]:
    """Requirements of the extra `name`."""
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    requirements: list[str] = project["optional-dependencies"][name]
    return requirements


def readme_command(number: int) -> str:
    """The README's `number`th bash block, counted from 1."""
    blocks = re.findall(r"^```bash\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    return blocks[number - 1].strip()


def main() -> None:
    """Prints what was asked for."""
    what, which = sys.argv[1:]
    print("\n".join(extra(which)) if what == "extra" else readme_command(int(which)))


if __name__ == "__main__":
    main()
