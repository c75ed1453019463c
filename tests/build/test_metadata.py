"""The package's own requirements are lower bounds; the versions known to work are in constraints.txt."""

import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info < (3, 11):
    pytest.skip("tomllib came with Python 3.11", allow_module_level=True)
import tomllib

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]


def requirements() -> list[Requirement]:
    groups = [PYPROJECT["build-system"]["requires"], PROJECT["dependencies"]]
    groups += PROJECT["optional-dependencies"].values()
    parsed = [Requirement(line) for group in groups for line in group]
    return [requirement for requirement in parsed if requirement.name != PROJECT["name"]]


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    split = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in split}


@pytest.mark.parametrize("requirement", requirements(), ids=str)
def test_a_requirement_is_one_lower_bound_that_the_known_version_meets(requirement):
    assert [specifier.operator for specifier in requirement.specifier] == [">="]
    assert requirement.url is None and requirement.marker is None
    assert requirement.specifier.contains(pins()[canonicalize_name(requirement.name)])


def test_operators_need_torch_alone():
    assert [Requirement(line).name for line in PROJECT["dependencies"]] == ["torch"]
    assert pins()["torch"] == "2.13.0"


def test_own_extras_exist():
    for line in sum(PROJECT["optional-dependencies"].values(), []):
        requirement = Requirement(line)
        if requirement.name == PROJECT["name"]:
            assert requirement.extras and requirement.extras <= PROJECT["optional-dependencies"].keys()
