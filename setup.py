import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
MIM_ENTRIES = ('configs', 'tools', 'model-index.yml')


class BuildPyWithMim(build_py):
    """Put configs, tools and the model index where mmengine and mim look for them: `mmvim/.mim`.

    A wheel gets copies. An editable install (PEP 660 runs this command with `editable_mode` set) gets links inside the
    source tree, so that edits of a config are seen at once.
    """

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            self._link(ROOT / 'mmvim' / '.mim')
        else:
            self._copy(Path(self.build_lib) / 'mmvim' / '.mim')

    def get_outputs(self, *args, **kwargs) -> list[str]:
        mim = Path(self.build_lib) / 'mmvim' / '.mim'
        copied = [] if self.editable_mode else [str(path) for path in mim.rglob('*') if path.is_file()]
        return [*super().get_outputs(*args, **kwargs), *copied]

    @staticmethod
    def _sources() -> list[Path]:
        return [ROOT / entry for entry in MIM_ENTRIES if (ROOT / entry).exists()]

    def _copy(self, mim: Path) -> None:
        shutil.rmtree(mim, ignore_errors=True)
        mim.mkdir(parents=True)
        for source in self._sources():
            if source.is_dir():
                shutil.copytree(source, mim / source.name, ignore=shutil.ignore_patterns('__pycache__', '*.pyc'))
            else:
                shutil.copy2(source, mim / source.name)

    def _link(self, mim: Path) -> None:
        shutil.rmtree(mim, ignore_errors=True)
        mim.mkdir()
        try:
            for source in self._sources():
                (mim / source.name).symlink_to(Path('..', '..', source.name), target_is_directory=source.is_dir())
        except OSError:  # Windows without the right to make links
            self._copy(mim)


setup(
    packages=[
        *find_packages(include=['mmvim', 'mmvim.*']),
        *find_packages('kernels', include=['ssm_kernels', 'ssm_kernels.*']),
    ],
    package_dir={'ssm_kernels': 'kernels/ssm_kernels'},
    package_data={'ssm_kernels': ['py.typed']},
    cmdclass={'build_py': BuildPyWithMim},
)
