import subprocess
import sys

import pytest
import torch

import mmvim  # noqa: F401  (before any host: it serves the ops that mmcv was installed without)


def accelerator() -> str | None:
    if torch.cuda.is_available():
        return 'cuda'
    return 'xpu' if torch.xpu.is_available() else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if accelerator() is None:
        for item in items:
            if 'gpu' in item.keywords:
                item.add_marker(pytest.mark.skip(reason='no CUDA, ROCm or XPU device'))


@pytest.fixture
def run_python(tmp_path):
    """Run a script in a fresh interpreter, outside the source tree, and return what it prints."""

    def run(script: str, *, python: str = sys.executable, env: dict[str, str] | None = None) -> str:
        path = tmp_path / 'script.py'
        path.write_text(script)
        result = subprocess.run(
            [python, '-W', 'ignore', str(path)], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300
        )
        assert result.returncode == 0, f'{result.stdout}\n{result.stderr}'
        return result.stdout

    return run
