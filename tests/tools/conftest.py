import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent.parent
TINY = """
_base_ = '{repository}/configs/demo/cascade_mask_rcnn_vim_ti_shapes.py'

max_iters = 4
shapes = dict(num_train=6, num_val=3, image_size=(64, 64), size_range=(16, 40))
model = dict(
    backbone=dict(arch=dict(embed_dims=16, depth=1, d_state=2), img_size=64),
    neck=dict(in_channels=16),
    test_cfg=dict(rcnn=dict(max_per_img=10)),
)
train_dataloader = dict(batch_size=2, num_workers=0, persistent_workers=False, dataset=dict(shapes=shapes))
val_dataloader = dict(batch_size=2, num_workers=0, persistent_workers=False, dataset=dict(shapes=shapes))
test_dataloader = val_dataloader
train_cfg = dict(val_interval=2)
default_hooks = dict(logger=dict(interval=1), checkpoint=dict(interval=2))
"""


@pytest.fixture(scope='session')
def tiny_folder(tmp_path_factory):
    """A folder with tiny.py, a config of a few seconds' training."""
    folder = tmp_path_factory.mktemp('tiny')
    (folder / 'tiny.py').write_text(TINY.format(repository=REPOSITORY))
    return folder


@pytest.fixture(scope='session')
def run_tool(run_script):
    """Run a tool as a user does, in several processes if asked; returns the finished process."""

    def run(name, *arguments, cwd, processes=1):
        tool = REPOSITORY / 'tools' / f'{name}.py'
        if processes == 1:
            return run_script(tool, *arguments, cwd=cwd)
        start = ('-W', 'ignore', '-m', 'torch.distributed.run', f'--nproc_per_node={processes}', '--standalone')
        command = [sys.executable, *start, tool, *map(str, arguments)]
        return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=600)

    return run


@pytest.fixture(scope='session')
def trained(tiny_folder, run_tool):
    """The folder of the tiny config trained for 4 iterations, with two checkpoints in work/, and what was printed."""
    finished = run_tool('train', 'tiny.py', '--work-dir', 'work', cwd=tiny_folder)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return tiny_folder, finished.stdout
