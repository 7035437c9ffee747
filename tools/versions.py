"""The lowest and the highest versions that pyproject.toml allows, each installed in an environment and tested.

    .venv/bin/python -m tools.versions             # both, all unit tests; `make test-versions`
    .venv/bin/python -m tools.versions lowest tests/unit/model

pip chooses the packages, by this machine's configuration: set PIP_EXTRA_INDEX_URL to PyTorch's CPU index where the
default would bring CUDA libraries. `lowest` installs every direct dependency at its lower bound, and what those bring
at the newest version that fits. The results go to benchmarks/results/versions.json and docs/versions.md; `highest` also
writes requirements.lock. An environment takes 3 GB of disk and is removed afterwards, unless --keep names its folder.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
import tomllib
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results/versions.json"
PAGE = ROOT / "docs/versions.md"
LOCK = ROOT / "requirements.lock"
SETS = ("lowest", "highest")
# Extras that install on a CPU, whose packages have lowest versions too. What `dev` and `docs` bring is the newest.
EXTRAS = ("tensorboard", "real", "qlora")
TOOLS = ("dev", "docs")
UNTESTED = {
    "flash": "no: flash-attn is compiled by CUDA's compiler when it is installed",
}
MARKS = ("<!-- tools/versions.py writes from here -->", "<!-- to here -->")
LOCK_HEAD = """\
# The versions that passed as `highest` in docs/versions.md, as constraints: pip install -c requirements.lock .
# Written by tools/versions.py. Without hashes: torch's file depends on the index (CPU or CUDA) that pip takes it from.
"""
# Imports every module of the distributions named on the command line; prints those without a module of their own.
IMPORTS = """\
import importlib, importlib.metadata as metadata, re, sys
owners = metadata.packages_distributions()
plain = lambda name: re.sub(r"[-_.]+", "-", name).lower()
for name in sys.argv[1:]:
    metadata.version(name)
    modules = [m for m, own in owners.items() if m.isidentifier() and m[0] != "_" and plain(name) in map(plain, own)]
    for module in modules:
        importlib.import_module(module)
"""


class Failed(Exception):
    """A step that must succeed before tests can run: its message is for the user."""


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def direct() -> dict[str, Requirement]:
    """Name -> requirement of what the package and the extras that install on a CPU ask for themselves."""
    lists = [project()["dependencies"], *(project()["optional-dependencies"][name] for name in EXTRAS)]
    return {canonicalize_name(r.name): r for r in map(Requirement, (text for each in lists for text in each))}


def bound(requirement: Requirement) -> str:
    """The lower bound as it is written. Raises Failed where there is none: no lowest version can be installed."""
    for specifier in requirement.specifier:
        if specifier.operator in (">=", "==", "~="):
            return specifier.version
    raise Failed(f"pyproject.toml: {requirement} has no lower bound; write >= and the lowest version that was tested")


def instead(words: Sequence[str]) -> dict[str, str]:
    """Name -> version of options `--instead NAME==VERSION`. Raises Failed for another form or a version not allowed."""
    chosen = {}
    for word in words:
        try:
            requirement = Requirement(word)
        except InvalidRequirement as error:
            raise Failed(f"--instead {word}: write NAME==VERSION") from error
        name = canonicalize_name(requirement.name)
        if name not in direct() or [s.operator for s in requirement.specifier] != ["=="]:
            raise Failed(f"--instead {word}: write NAME==VERSION with a direct dependency: {', '.join(direct())}")
        version = next(iter(requirement.specifier)).version
        if not direct()[name].specifier.contains(version):
            raise Failed(f"--instead {word}: pyproject.toml allows {direct()[name].specifier}")
        chosen[name] = version
    return chosen


def constraints(kind: str, chosen: Mapping[str, str]) -> list[str]:
    """Lines of a constraints file for pip."""
    lowest = {name: bound(requirement) for name, requirement in direct().items()} if kind == "lowest" else {}
    return [f"{name}=={version}" for name, version in {**lowest, **chosen}.items()]


def install(python: Path, lines: Sequence[str]) -> None:
    """This checkout with its extras, into an environment that is made first where it is not there."""
    environment = python.parents[1]
    if not python.is_file():
        subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
    (environment / "constraints.txt").write_text("".join(f"{line}\n" for line in lines))
    pip = [str(python), "-m", "pip", "--disable-pip-version-check"]
    source = f"{ROOT}[{','.join((*EXTRAS, *TOOLS))}]"
    options = ["--upgrade", "--upgrade-strategy", "eager", "--constraint", str(environment / "constraints.txt")]
    for step in (["install", "--quiet", *options, "--editable", source], ["check"]):
        if subprocess.run([*pip, *step]).returncode:
            raise Failed(f"pip {step[0]} failed in {environment}: its lines say which packages do not fit together")


def versions(python: Path) -> dict[str, str]:
    """Name -> version of everything that is installed there but this project, pip and what venv brings."""
    listed = subprocess.run(
        [str(python), "-m", "pip", "list", "--format", "json"], capture_output=True, text=True, check=True
    ).stdout
    installed = {canonicalize_name(row["name"]): row["version"] for row in json.loads(listed)}
    return {name: version for name, version in sorted(installed.items()) if name not in ("pip", "mirage-dist")}


def imported(python: Path) -> dict[str, str]:
    """Extra -> what came of importing its packages, or why that is not tried. Raises Failed where one cannot be."""
    outcomes = dict(UNTESTED)
    for extra in (*EXTRAS, *TOOLS):
        names = [Requirement(text).name for text in project()["optional-dependencies"][extra]]
        done = subprocess.run([str(python), "-c", IMPORTS, *names], capture_output=True, text=True)
        if done.returncode:
            raise Failed(f"extra {extra}: {done.stderr.strip().splitlines()[-1]}")
        outcomes[extra] = "imported"
    return outcomes


def tested(python: Path, tests: Sequence[str], processes: int) -> dict[str, int]:
    """Counts of a run of the tests, in that environment."""
    report = python.parents[1] / "tests.xml"
    report.unlink(missing_ok=True)
    path = f"{python.parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    parallel = ["--numprocesses", str(processes), "--dist", "loadfile"]
    command = [str(python), "-m", "pytest", "-m", "not gpu", "-p", "no:cacheprovider", *parallel, *tests]
    command += ["--ignore", "tests/unit/test_versions.py"]  # it compares the ranges with the results of this very run
    subprocess.run([*command, "--junitxml", str(report), "--quiet"], cwd=ROOT, env=environment)
    if not report.is_file():
        raise Failed("pytest ended before it wrote its report; see its lines above")
    return counted(report)


def counted(report: Path) -> dict[str, int]:
    """passed, failed and skipped of a JUnit file. Raises Failed where no test ran."""
    totals = {"tests": 0, "failures": 0, "errors": 0, "skipped": 0}
    for suite in ElementTree.parse(report).getroot().iter("testsuite"):
        for name in totals:
            totals[name] += int(suite.get(name, 0))
    failed = totals["failures"] + totals["errors"]
    if not totals["tests"]:
        raise Failed(f"{report}: no test ran")
    passed = totals["tests"] - failed - totals["skipped"]
    return {"passed": passed, "failed": failed, "skipped": totals["skipped"]}


def measured(
    kind: str, python: Path, tests: Sequence[str], processes: int, chosen: Mapping[str, str], reason: str
) -> dict[str, Any]:
    """One entry of benchmarks/results/versions.json. Raises Failed where the set cannot be installed or imported."""
    install(python, constraints(kind, chosen))
    installed = versions(python)
    for name, requirement in direct().items():
        if not requirement.specifier.contains(installed[name]):
            raise Failed(f"{name} {installed[name]} was installed, which pyproject.toml does not allow")
    return {
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "extras": imported(python),
        "tests": list(tests),
        **tested(python, tests, processes),
        "instead": dict.fromkeys(chosen, reason),
        "versions": installed,
    }


def table(results: Mapping[str, Any]) -> str:
    """The part of docs/versions.md that is made: ranges of pyproject.toml beside what was installed; runs; extras."""
    rows = [
        [name, f"`{_range(requirement)}`", *(_cell(results.get(kind), name) for kind in SETS)]
        for name, requirement in direct().items()
    ]
    packages = _markdown(("package", "allowed", "lowest tested", "highest tested"), rows)
    ran = {kind: results[kind] for kind in SETS if kind in results}
    counts = ("passed", "failed", "skipped")
    rows = [
        [kind, run["date"], run["python"], run["machine"], " ".join(f"`{t}`" for t in run["tests"])]
        + [str(run[name]) for name in counts]
        for kind, run in ran.items()
    ]
    runs = _markdown(("set", "date", "Python", "machine", "tests", *counts), rows)
    reasons = [f"¹ {name}: {why}." for run in ran.values() for name, why in run["instead"].items()]
    states = {extra: state for run in ran.values() for extra, state in run["extras"].items()}
    rows = [
        [f"`{extra}`", ", ".join(Requirement(text).name for text in requirements), states.get(extra, "not tried")]
        for extra, requirements in project()["optional-dependencies"].items()
    ]
    extras = _markdown(("extra", "packages", "tested"), rows)
    return "\n\n".join([packages, *reasons, runs, extras])


def _range(requirement: Requirement) -> str:
    """With the lower bound first."""
    return ",".join(sorted(map(str, requirement.specifier), key=lambda text: text.startswith("<")))


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def _cell(entry: Mapping[str, Any] | None, name: str) -> str:
    if entry is None or name not in entry["versions"]:
        return "not run"
    return entry["versions"][name] + ("¹" if name in entry["instead"] else "")


def page(text: str, results: Mapping[str, Any]) -> str:
    """The page with its made part renewed."""
    before, _, rest = text.partition(MARKS[0])
    return f"{before}{MARKS[0]}\n\n{table(results)}\n\n{MARKS[1]}{rest.partition(MARKS[1])[2]}"


def lock(installed: Mapping[str, str]) -> str:
    """Constraints; without the local part of a version (2.13.0+cpu), which is the index's, not the release's."""
    return LOCK_HEAD + "".join(f"{name}=={Version(version).public}\n" for name, version in sorted(installed.items()))


def write(kind: str, entry: Mapping[str, Any]) -> None:
    results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    results[kind] = entry
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    PAGE.write_text(page(PAGE.read_text(), results))
    if kind == "highest":
        LOCK.write_text(lock(entry["versions"]))


def main(words: Sequence[str] | None = None) -> int:
    """Exit status 0 where every test passed, 1 where one failed or an environment could not be made."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.versions",
        description="Test the lowest and the highest versions that pyproject.toml allows.",
    )
    parser.add_argument("kind", nargs="?", choices=[*SETS, "both"], default="both")
    parser.add_argument("tests", nargs="*", default=["tests/unit"], help="files or folders; default: tests/unit")
    parser.add_argument(
        "--instead",
        action="append",
        default=[],
        metavar="NAME==VERSION",
        help="as `lowest`, test this version and not the bound",
    )
    parser.add_argument("--reason", default="", help="why, for the page; needed with --instead")
    parser.add_argument(
        "--keep", type=Path, metavar="DIR", help="make the environments in DIR/lowest and DIR/highest, and leave them"
    )
    parser.add_argument("--processes", type=int, default=os.cpu_count(), metavar="N", help="of pytest; default: cores")
    options = parser.parse_args(words)
    if bool(options.instead) != bool(options.reason):
        parser.error("--instead and --reason belong together: the page says why another version was tested")
    kinds = SETS if options.kind == "both" else (options.kind,)
    failed = 0
    try:
        chosen = instead(options.instead)
        with tempfile.TemporaryDirectory(prefix="mirage-versions-") as temporary:
            for kind in kinds:
                python = (options.keep or Path(temporary)).absolute() / kind / "bin/python"
                replaced = chosen if kind == "lowest" else {}
                entry = measured(kind, python, options.tests, options.processes, replaced, options.reason)
                write(kind, entry)
                failed += entry["failed"]
                print(f"{kind}: {entry['passed']} passed, {entry['failed']} failed, {entry['skipped']} skipped")
    except Failed as error:
        print(error, file=sys.stderr)
        return 1
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
