"""The examples, as a user runs them."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
WITH_OPTIONS = sorted(path for path in (ROOT / "examples").glob("*.py") if "argparse" in path.read_text())


@pytest.mark.slow
def test_quickstart_runs_and_stands_in_the_readme(tmp_path: Path) -> None:
    quickstart = (ROOT / "examples" / "quickstart.py").read_text()
    shown = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert shown is not None
    assert shown[1].strip() == quickstart.split('"""')[2].strip()
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / "quickstart.py"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    accuracy, certified = (
        float(share) for share in re.findall(r"^(?:accuracy|certified at 0.3:) (\S+)", done.stdout, re.M)
    )
    assert 0.5 < certified <= accuracy <= 1


@pytest.mark.parametrize("path", WITH_OPTIONS, ids=lambda path: path.stem)
def test_others_say_what_they_take(path: Path) -> None:
    done = subprocess.run([sys.executable, path, "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage:")
