"""Constraints for packages installed on top of an image: what its torch needs stays, of the rest our versions.

    python3 constraints_beside.py constraints.txt >constraints_here.txt

Prints the installed version of every kept package and of all that it needs, and the given line of every other one.
"""

import re
import sys
from importlib import metadata
from pathlib import Path

# Built against each other in the image; numpy because they were compiled with it.
KEPT = ("torch", "triton", "transformer-engine", "apex", "flash-attn", "numpy")


def main() -> None:
    kept = installed_closure(KEPT)
    lines = Path(sys.argv[1]).read_text().splitlines()
    ours = [line for line in lines if normalized(line.split("==")[0]) not in kept]
    print(*[f"{name}=={version}" for name, version in sorted(kept.items())], *ours, sep="\n")


def installed_closure(names: tuple[str, ...]) -> dict[str, str]:
    """Versions of the installed ones of these packages and of what they need, directly or not, without extras."""
    found: dict[str, str] = {}
    waiting = list(names)
    while waiting:
        name = normalized(waiting.pop())
        if name in found:
            continue
        try:
            package = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        found[name] = package.version
        needs = [need for need in package.requires or [] if "extra ==" not in need]
        waiting += [re.match(r"[\w.-]+", need)[0] for need in needs]  # type: ignore[index]
    return found


def normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name.strip()).lower()


if __name__ == "__main__":
    main()
