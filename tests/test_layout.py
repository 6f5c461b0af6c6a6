"""What is run by `python -m` from the repository's root is what lies there."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name", ["benchmarks", "examples"])
def test_a_package_of_that_name_elsewhere_does_not_shadow_it(name, tmp_path):
    """Opacus installs both names; a folder without __init__.py would give way to any package."""
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").touch()
    command = f"import sys; sys.path.append({str(tmp_path)!r}); import {name}; print({name}.__path__[0])"
    done = subprocess.run([sys.executable, "-c", command], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == f"{ROOT / name}\n"
