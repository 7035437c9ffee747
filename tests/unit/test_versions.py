"""What pyproject.toml allows was tested at both ends; the page, the lock and doctor say the same as it does."""

import json
import re
import subprocess
import sys

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from mirage_dist.doctor import software
from tools import versions

RESULTS = json.loads(versions.RESULTS.read_text())
DIRECT = versions.direct()
LOCKED = [line for line in versions.LOCK.read_text().splitlines() if not line.startswith("#")]


@pytest.mark.parametrize("name", DIRECT)
def test_both_ends_of_a_range_were_tested(name):
    lowest, highest = (RESULTS[kind] for kind in versions.SETS)
    assert DIRECT[name].specifier.contains(lowest["versions"][name])
    assert DIRECT[name].specifier.contains(highest["versions"][name])
    assert Version(lowest["versions"][name]) <= Version(highest["versions"][name])
    if name in lowest["instead"]:
        assert lowest["instead"][name], f"{name}: say why its lower bound was not tested"
    else:
        assert Version(lowest["versions"][name]) == Version(versions.bound(DIRECT[name]))
    assert not highest["instead"]


@pytest.mark.parametrize("kind", versions.SETS)
def test_no_test_failed_with_what_is_allowed(kind):
    assert RESULTS[kind]["failed"] == 0
    assert RESULTS[kind]["passed"] > 0


def test_the_page_is_made_from_the_ranges_and_the_results():
    text = versions.PAGE.read_text()
    assert versions.page(text, RESULTS) == text
    for name in DIRECT:
        assert re.search(rf"\n\| {name} \| `[>=~]=[^`]*` \| \S+ \| \S+ \|\n", text)


def test_doctor_compares_with_the_ranges_of_the_page():
    checkout = software.of_checkout()
    assert checkout is not None
    always = [r for r in map(Requirement, checkout[1]) if r.marker is None]
    assert {canonicalize_name(r.name): r.specifier for r in always} == {
        name: requirement.specifier
        for name, requirement in DIRECT.items()
        if name in map(canonicalize_name, (Requirement(text).name for text in versions.project()["dependencies"]))
    }


def test_the_lock_is_the_highest_set_and_satisfies_every_requirement():
    assert versions.LOCK.read_text() == versions.lock(RESULTS["highest"]["versions"])
    locked = dict(re.fullmatch(r"([a-z0-9-]+)==([0-9][\w.!]*)", line).groups() for line in LOCKED)  # no URL, no path
    extras = versions.project()["optional-dependencies"]
    lists = [versions.project()["dependencies"], *(extras[e] for e in (*versions.EXTRAS, *versions.TOOLS))]
    for requirement in map(Requirement, (text for each in lists for text in each)):
        assert requirement.specifier.contains(locked[canonicalize_name(requirement.name)]), requirement


def test_every_extra_was_imported_or_has_a_reason():
    extras = RESULTS["highest"]["extras"]
    assert extras.keys() == versions.project()["optional-dependencies"].keys()
    assert {extra for extra, state in extras.items() if state != "imported"} == versions.UNTESTED.keys()


def test_constraints_are_the_lower_bounds_or_what_is_chosen_instead():
    lines = [Requirement(line) for line in versions.constraints("lowest", {"torch": "2.12.1"})]
    assert [canonicalize_name(r.name) for r in lines] == list(DIRECT)
    for line in lines:
        (pinned,) = line.specifier
        assert pinned.operator == "=="
        if line.name != "torch":
            below = [s for s in DIRECT[canonicalize_name(line.name)].specifier if s.operator == ">="]
            assert all(Version(s.version) == Version(pinned.version) for s in below)
    assert "torch==2.12.1" in map(str, lines)
    assert versions.constraints("highest", {}) == []


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("torch>=2.12", "--instead torch>=2.12: write NAME==VERSION with a direct dependency: torch, transformers"),
        ("rich==14", "--instead rich==14: write NAME==VERSION with a direct dependency"),
        ("torch==1.13", "--instead torch==1.13: pyproject.toml allows"),
        ("torch=2.12", "--instead torch=2.12: write NAME==VERSION"),
    ],
)
def test_what_cannot_be_tested_instead_is_refused_by_name(word, message, capsys):
    assert versions.main(["lowest", "--instead", word, "--reason", "a test"]) == 1
    assert message in capsys.readouterr().err


def test_a_version_instead_of_the_bound_needs_a_reason(capsys):
    with pytest.raises(SystemExit):
        versions.main(["lowest", "--instead", "torch==2.13.0"])
    assert "--instead and --reason belong together" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["torch", "torch<3", "torch!=2.12"])
def test_a_requirement_without_a_lower_bound_is_refused(text):
    with pytest.raises(versions.Failed, match=re.escape(f"{text} has no lower bound")):
        versions.bound(Requirement(text))


def test_the_counts_are_those_of_pytest(tmp_path):
    (tmp_path / "test_four.py").write_text(
        "import pytest\n"
        "def test_passes(): pass\n"
        "def test_fails(): assert False\n"
        "@pytest.mark.skip\n"
        "def test_is_skipped(): pass\n"
        "@pytest.fixture\n"
        "def broken(): raise ValueError\n"
        "def test_has_an_error(broken): pass\n"
    )
    report = tmp_path / "report.xml"
    pytest_here = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--rootdir={tmp_path}"]
    subprocess.run([*pytest_here, "--junitxml", str(report), str(tmp_path)], capture_output=True, check=False)
    assert versions.counted(report) == {"passed": 1, "failed": 2, "skipped": 1}
    report.write_text('<testsuites><testsuite tests="0" failures="0" errors="0" skipped="0"/></testsuites>')
    with pytest.raises(versions.Failed, match="no test ran"):
        versions.counted(report)


@pytest.mark.parametrize(("name", "status"), [("hypothesis", 0), ("nothing-of-this-name", 1)])
def test_an_extra_that_is_not_there_is_no_imported_one(name, status):
    done = subprocess.run([sys.executable, "-c", versions.IMPORTS, name], capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stderr
