"""The test suite against the newest versions of the stack, in an environment of its own; lists what breaks.

    make canary                                   all newest versions, upper bounds of pyproject.toml left out
    .ci/canary.py transformers==5.25.0            the same with some versions given
    .ci/canary.py --tests tests/models            only some tests

Nothing else is touched: the environment is `.canary/` in the repository. torch keeps its bounds, because its next
version would bring another build (GBs on a machine without a GPU). Exit code 1 where tests break.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import re
import subprocess
import sys
import tomllib
import venv
import xml.etree.ElementTree as xml
from pathlib import Path

ROOT = Path(__file__).parents[1]
HOME = ROOT / ".canary"
KEPT = ("torch",)  # keeps its bounds


def main() -> int:
    """Install, test, list; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("versions", nargs="*", metavar="NAME==VERSION", help="instead of the newest")
    parser.add_argument("--tests", nargs="+", default=["tests"], help="which tests (default: all that are not slow)")
    args = parser.parse_args()
    python = HOME / "bin" / "python"
    if not python.exists():
        venv.create(HOME, with_pip=True)
    wanted = requirements(tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8")), args.versions)
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--upgrade", *wanted], check=True)
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", "--editable", ROOT], check=True)
    report = HOME / "report.xml"
    report.unlink(missing_ok=True)
    tests = [python, "-m", "pytest", "-q", "-m", "not slow", "-n", "2", "--dist", "loadfile", f"--junitxml={report}"]
    subprocess.run([*tests, *args.tests], cwd=ROOT, check=False)
    if not report.exists():
        print("pytest did not come to its end")
        return 1
    print("\nversions: " + ", ".join(differing(wanted)))
    failed = broken(report)
    print("\n".join([f"{len(failed)} tests break:", *failed]) if failed else "nothing breaks")
    return bool(failed)


def requirements(project: dict, given: list[str]) -> list[str]:
    """What is installed: the project's dependencies and those of its tests, without bounds but for `KEPT`."""
    extras = project["project"]["optional-dependencies"]
    lines = [*project["project"]["dependencies"], *extras["test"], *extras["feedback"]]
    lines = [line for line in lines if not line.startswith(project["project"]["name"])]
    named = {re.split(r"[=<>!~]", line)[0] for line in given}
    bare = {re.match(r"[\w.-]+", line)[0]: line for line in lines}
    return [*(line if name in KEPT else name for name, line in bare.items() if name not in named), *given]


def differing(wanted: list[str]) -> list[str]:
    """`NAME VERSION` of what was installed, with this environment's version where that is another."""
    found = []
    for name in (re.match(r"[\w.-]+", line)[0] for line in wanted):
        new = next(
            iter(importlib.metadata.distributions(name=name, path=[str(p) for p in HOME.glob("lib/*/site-packages")])),
            None,
        )
        if new is None:
            continue
        try:
            here = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            here = "not here"
        found.append(f"{name} {new.version}" + (f" (here {here})" if here != new.version else ""))
    return found


def broken(report: Path) -> list[str]:
    """Each test that failed, with the first line of why."""
    found = []
    for case in xml.parse(report).iter("testcase"):  # noqa: S314  written by pytest just now
        for outcome in (*case.findall("failure"), *case.findall("error")):
            reason = (outcome.get("message") or "").strip().splitlines() or [""]
            found.append(f"  {case.get('classname', '').replace('.', '/')}.py::{case.get('name')}: {reason[0][:160]}")
    return found


if __name__ == "__main__":
    sys.exit(main())
