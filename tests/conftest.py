import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mmengine.registry import DefaultScope

import mmvim  # noqa: F401  (before any host: it serves the ops that mmcv was installed without)


def pytest_configure(config: pytest.Config) -> None:
    """Share the cores among the workers of `pytest -n`, and with the processes that they start."""
    if workers := getattr(config, 'workerinput', {}).get('workercount'):
        threads = max(1, (os.cpu_count() or 1) // workers)
        os.environ.setdefault('OMP_NUM_THREADS', str(threads))
        torch.set_num_threads(threads)


def accelerator() -> str | None:
    if torch.cuda.is_available():
        return 'cuda'
    return 'xpu' if torch.xpu.is_available() else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if accelerator() is None:
        for item in items:
            if 'gpu' in item.keywords:
                item.add_marker(pytest.mark.skip(reason='no CUDA, ROCm or XPU device'))


@pytest.fixture(autouse=True)
def default_scope_of_its_own():
    """A Runner sets mmengine's default scope for the whole process: give every test the one that it started with."""
    before = dict(DefaultScope._instance_dict)
    yield
    DefaultScope._instance_dict.clear()
    DefaultScope._instance_dict.update(before)


@pytest.fixture(scope='session')
def run_script(tmp_path_factory):
    """Run a Python script with arguments; returns the finished process.

    It starts as a fork of `forks.py`, as fresh as a new interpreter but for the libraries that are there already.
    """
    server = subprocess.Popen(
        [sys.executable, '-W', 'ignore', Path(__file__).parent / 'forks.py'],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    files = [tmp_path_factory.mktemp('forks') / name for name in ('input', 'output', 'errors')]

    def run(*command, cwd, given: str = '') -> subprocess.CompletedProcess:
        for file, text in zip(files, (given, '', ''), strict=True):
            file.write_text(text)
        names = [str(word) for word in command]
        request = dict(command=names, folder=str(cwd), files=[str(f) for f in files], environment=dict(os.environ))
        print(json.dumps(request), file=server.stdin, flush=True)
        status = int(server.stdout.readline())
        return subprocess.CompletedProcess(names, status, files[1].read_text(), files[2].read_text())

    yield run
    server.kill()
    server.wait()


@pytest.fixture
def run_python(tmp_path, run_script):
    """Run a script outside the source tree and return what it prints; in a new interpreter if one is named."""

    def run(script: str, *, python: str | None = None, env: dict[str, str] | None = None) -> str:
        path = tmp_path / 'script.py'
        path.write_text(script)
        if python is None and env is None:
            result = run_script(path, cwd=tmp_path)
        else:
            command = [python or sys.executable, '-W', 'ignore', str(path)]
            result = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, f'{result.stdout}\n{result.stderr}'
        return result.stdout

    return run


@pytest.fixture(scope='session')
def load_config():
    """Read a config of this project by its path below configs, set top-level keys, and complete it."""
    from mmengine.config import Config

    from mmvim.config.completion import complete_config

    def load(name: str, **keys) -> Config:
        cfg = Config.fromfile(Path(__file__).parent.parent / 'configs' / name)
        cfg.merge_from_dict(keys)
        complete_config(cfg)
        return cfg

    return load
