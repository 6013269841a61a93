"""The README's commands install a tested set of exact versions, the same one next month."""

import re
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement

tomllib = pytest.importorskip('tomllib', reason='Python 3.10 reads no TOML')

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
EXTRAS = PROJECT['optional-dependencies']
REQUIREMENTS = [Requirement(line) for line in (*PROJECT['dependencies'], *EXTRAS['all'], *EXTRAS['test'])]
PINS = [Requirement(line) for line in (ROOT / 'constraints.txt').read_text().splitlines()]
PYTHONS = ('3.10', '3.11', '3.12', '3.13', '3.14')


@pytest.mark.parametrize('python', PYTHONS)
@pytest.mark.parametrize('requirement', REQUIREMENTS, ids=lambda requirement: requirement.name)
def test_one_exact_version_of_each_requirement(requirement, python):
    environment = default_environment() | dict(
        python_version=python,
        python_full_version=f'{python}.1',
        sys_platform='linux',
        platform_system='Linux',
        platform_machine='x86_64',
    )
    (pin,) = (
        pin for pin in PINS if pin.name == requirement.name and (pin.marker is None or pin.marker.evaluate(environment))
    )
    (specifier,) = pin.specifier
    assert specifier.operator == '==' and '*' not in specifier.version
    assert requirement.specifier.contains(specifier.version)


@pytest.mark.parametrize('requirement', REQUIREMENTS, ids=lambda requirement: requirement.name)
def test_every_requirement_has_a_lower_bound_to_test(requirement):
    """By which .ci/lowest installs it; pip may take any version of one without."""
    assert [specifier.operator for specifier in requirement.specifier] == ['>=']


def test_the_commands_of_the_readme_use_the_set():
    quick = (ROOT / 'README.md').read_text().split('\n## Quick start\n')[1].split('\n## ')[0]
    commands = re.findall(r'^python -m pip install .*', quick, re.MULTILINE)
    assert len(commands) == 2
    assert all(command.startswith('python -m pip install -c constraints.txt -e ') for command in commands)
