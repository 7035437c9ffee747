"""Python and packages against the ranges that this project was tested with."""

from __future__ import annotations

import platform
import tomllib
from importlib import metadata

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from mirage_dist import __version__
from mirage_dist.config import REPOSITORY
from mirage_dist.doctor.checks import Context, Verdict, failed, not_here, ok, warning

PROJECT = "mirage-dist"
# What each extra is for, where a user would miss it.
PURPOSES = {
    "flash": "flash-attention; without it attention is PyTorch's own (sdpa)",
    "tensorboard": "monitor.tensorboard=true",
    "real": "mirage demo --real",
}
# What pip does not install together with this package, and what it is for (docs/evaluation.md, "Engines").
BESIDE = {"vllm>=0.32,<0.33": "generation.backend=vllm of an evaluation"}


def declared() -> tuple[str, list[str]] | None:
    """Python's range and the requirements of the installed project, or of its checkout; None where neither is here."""
    try:
        given = metadata.metadata(PROJECT)
        return given["Requires-Python"], metadata.requires(PROJECT) or []
    except metadata.PackageNotFoundError:
        return of_checkout()


def of_checkout() -> tuple[str, list[str]] | None:
    """The same by the pyproject.toml of the code that runs, in the spelling of installed metadata."""
    file = REPOSITORY / "pyproject.toml"
    if not file.is_file():
        return None
    project = tomllib.loads(file.read_text())["project"]
    extras = [
        _of_extra(requirement, extra)
        for extra, requirements in project["optional-dependencies"].items()
        for requirement in requirements
    ]
    return project["requires-python"], [*project["dependencies"], *extras]


def _of_extra(requirement: str, extra: str) -> str:
    condition, own = f'extra == "{extra}"', Requirement(requirement)
    own_marker = own.marker
    own.marker = None
    return f"{own} ; {condition}" if own_marker is None else f"{own} ; ({own_marker}) and {condition}"


def python(_: Context) -> Verdict:
    version, given = platform.python_version(), declared()
    if given is None:
        return not_here(f"{version}; this code is neither installed nor a checkout", "install it: make setup")
    if Version(version) in SpecifierSet(given[0], prereleases=True):
        return ok(f"{version} ({given[0]})", version=version)
    return failed(f"{version}, but {given[0]} is needed", "make .venv with another one: make setup PYTHON=python3.12")


def packages(_: Context) -> Verdict:
    """Those that every run needs."""
    if (given := declared()) is None:
        return not_here("the tested ranges are unknown here", "install this project: make setup")
    needed = [r for r in map(Requirement, given[1]) if r.marker is None or r.marker.evaluate({"extra": ""})]
    return compared(needed)


def compared(needed: list[Requirement]) -> Verdict:
    """A package that is missing, too old or not the pinned one fails; one that is newer than the tested ones warns."""
    versions = {r.name: installed(r.name) for r in needed}
    wrong, newer = [], []
    for requirement in needed:
        version = versions[requirement.name]
        if version is None:
            wrong.append((requirement, f"{requirement.name} is missing"))
        elif not requirement.specifier.contains(version, prereleases=True):
            kept = [s for s in requirement.specifier if s.operator not in ("<", "<=")]
            too_new = all(s.contains(version, prereleases=True) for s in kept)
            line = f"{requirement.name} {version} (tested: {requirement.specifier})"
            (newer if too_new else wrong).append((requirement, line))
    text = "; ".join(line for _, line in (*wrong, *newer))
    if wrong or newer:
        remedy = "pip install " + " ".join(f"'{r.name}{r.specifier}'" for r, _ in (*wrong, *newer))
        return (failed if wrong else warning)(text, remedy, **versions)
    return ok(", ".join(f"{name} {version}" for name, version in versions.items()), **versions)


def installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def optional(_: Context) -> Verdict:
    """Those of the extras and vLLM: what is missing, and what for."""
    if (given := declared()) is None:
        return not_here("the extras are unknown here", "install this project: make setup")
    here, missing, untested, values = [], [], [], {}
    purposes = {Requirement(text): purpose for text, purpose in BESIDE.items()}
    for requirement in map(Requirement, given[1]):
        extra = next((extra for extra in PURPOSES if _wanted(requirement, extra)), None)
        if requirement.marker is not None and extra is not None:
            purposes[requirement] = PURPOSES[extra]
    for requirement, purpose in purposes.items():
        values[requirement.name] = version = installed(requirement.name)
        if version is None:
            missing.append(f"{requirement.name} ({purpose})")
        elif not requirement.specifier.contains(version, prereleases=True):
            untested.append(f"{requirement.name} {version} (tested: {requirement.specifier})")
        else:
            here.append(f"{requirement.name} {version}")
    text = "; ".join([*untested, *here, *(["missing: " + ", ".join(missing)] if missing else [])])
    if untested:
        return warning(text, "pip install the tested version where you use it", **values)
    return (
        not_here(text, f"pip install '{PROJECT}[NAME]' brings those that you want; vLLM: docs/evaluation.md", **values)
        if missing
        else ok(text)
    )


def _wanted(requirement: Requirement, extra: str) -> bool:
    """Whether an extra brings a requirement that nothing else does."""
    if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
        return False
    return requirement.marker.evaluate({"extra": extra})


def checkout(_: Context) -> Verdict:
    """Whether the code that runs is the one whose requirements are installed."""
    own, given, here = installed(PROJECT), of_checkout(), REPOSITORY
    if given is None:
        return ok(f"mirage-dist {__version__}, installed", version=__version__)
    if own is None:
        return warning(
            f"{here} runs without being installed, so nothing has checked its requirements", "make setup installs it"
        )
    ranges = declared()
    assert ranges is not None
    changed = _normal(given[1]) ^ _normal(ranges[1])
    if own != __version__ or given[0].strip() != ranges[0].strip() or changed:
        return warning(
            f"{here} runs as {__version__}, and its pyproject.toml is not the one that was installed (as {own})",
            "make setup installs the requirements of this checkout",
            differing=sorted(changed),
        )
    return ok(f"mirage-dist {__version__} in {here}", version=__version__)


def _normal(requirements: list[str]) -> set[str]:
    return {str(Requirement(r)).replace('"', "'") for r in requirements}
