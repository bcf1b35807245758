"""Write constraints for packages on top of an image: keep what its torch requires, use our versions of the rest.

    python3 constraints_beside.py constraints.txt >constraints_here.txt

Prints the installed versions of the kept packages and their dependencies, and the given lines of all others.
"""

import re
import sys
from importlib import metadata
from pathlib import Path

# Built for each other in the image; numpy because they were compiled with it.
KEPT = ("torch", "triton", "transformer-engine", "apex", "flash-attn", "numpy")


def main() -> None:
    kept = installed_closure(KEPT)
    lines = Path(sys.argv[1]).read_text().splitlines()
    ours = [line for line in lines if normalized(line.split("==")[0]) not in kept]
    print(*[f"{name}=={version}" for name, version in sorted(kept.items())], *ours, sep="\n")


def installed_closure(names: tuple[str, ...]) -> dict[str, str]:
    """Versions of those packages that are installed and of their direct and indirect dependencies, without extras."""
    versions: dict[str, str] = {}
    waiting = list(names)
    while waiting:
        name = normalized(waiting.pop())
        if name in versions:
            continue
        try:
            package = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        versions[name] = package.version
        needs = [need for need in package.requires or [] if "extra ==" not in need]
        waiting += [re.match(r"[\w.-]+", need)[0] for need in needs]  # type: ignore[index]
    return versions


def normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name.strip()).lower()


if __name__ == "__main__":
    main()
