"""No file of weights runs code, whatever it holds and whichever function or tool reads it.

Every payload makes a folder. Every way of reading is first shown to read at all: a file that does not exist is named.
"""

import builtins
import contextlib
import io
import os
import pickle
import tarfile
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.logging import HistoryBuffer
from mmengine.model import BaseModel
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import CheckpointLoader, Runner, load_checkpoint
from mmengine.runner import checkpoint as host
from safetensors.torch import save_file
from torch import nn

from mmvim.compat.stored_configs import parse_config
from mmvim.config.completion import complete_config
from mmvim.config.reading import read_config
from mmvim.engine.runner import Runner as OurRunner
from mmvim.errors import CheckpointError, ConfigError, InputError
from mmvim.tools import command_line, test, train, verify, visualize
from mmvim.weights.reading import read_checkpoint

CONFIG_FOLDER = Path(__file__).parents[2] / 'configs'
BACKBONE = dict(type='mmvim.VisionMamba', arch=dict(embed_dims=16, depth=1, d_state=2), img_size=32)

MODEL = dict(type='ModelOfPayloads', backbone=BACKBONE)


class Runs:
    """Calls a function with arguments when it is unpickled."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


@pytest.fixture(scope='module')
def weights():
    return ModelOfPayloads().state_dict()


def made(marker):
    return Runs(os.mkdir, str(marker))


def whole(weights, **entries):
    """What mmengine saves, with entries replaced."""
    return dict(
        dict(meta=dict(epoch=0, iter=1), state_dict=weights, message_hub={}, optimizer={}, param_schedulers=[]),
        **entries,
    )


def in_tar(path, marker, weights):
    with tarfile.open(path, 'w') as tar:
        for name in ('sys_info', 'pickle', 'storages', 'tensors'):
            content = pickle.dumps(made(marker))
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def script(path, marker, weights):
    torch.jit.trace(nn.Linear(2, 2), torch.rand(1, 2)).save(path, _extra_files={'data.pkl': pickle.dumps(made(marker))})


def in_metadata(path, marker, weights):
    save_file(
        {name: x.clone() for name, x in weights.items()}, path, {'cfg': f'__import__("os").mkdir({str(marker)!r})'}
    )


def kept(**where):
    """Save the whole of mmengine's entries, some of which are made by functions of the marker."""

    def save(path, marker, weights):
        torch.save(whole(weights, **{name: value(marker) for name, value in where.items()}), path)

    return save


def config(text):
    """A config in all entries that mmengine reads one from."""

    def save(path, marker, weights):
        base = path.with_suffix('.py')
        base.write_text(f'import os\nos.mkdir({str(marker)!r})\nx = 1\n')
        code = text.format(marker=str(marker), base=str(base), module=base.stem)
        meta = dict(epoch=0, iter=1, config=code, cfg=code)
        torch.save(whole(weights, meta=meta, message_hub=dict(runtime_info=dict(cfg=code))), path)

    return save


PICKLES = {
    'in the weights': lambda path, marker, weights: torch.save(whole({**weights, 'x': made(marker)}), path),
    'in meta': kept(meta=lambda marker: dict(epoch=0, iter=1, x=made(marker))),
    'in the optimiser': kept(optimizer=lambda marker: dict(state=made(marker))),
    'in the message hub': kept(message_hub=lambda marker: dict(log_scalars=dict(x=made(marker)))),
    'of the old format': lambda path, marker, weights: torch.save(
        whole(weights, x=made(marker)), path, _use_new_zipfile_serialization=False
    ),
    'a plain pickle': lambda path, marker, weights: path.write_bytes(pickle.dumps(made(marker))),
    'in a tar': in_tar,
    'TorchScript': script,
    'metadata of safetensors': in_metadata,
    'eval': kept(x=lambda marker: Runs(builtins.eval, f'__import__("os").mkdir({str(marker)!r})')),
    'getattr': kept(x=lambda marker: Runs(builtins.getattr, HistoryBuffer, '__init__')),
    'getattr of a result': kept(x=lambda marker: Runs(builtins.getattr, Runs(__import__, 'os'), 'mkdir')),
    'array of objects': kept(x=lambda marker: np.array([made(marker)], dtype=object)),
    'scalar of objects': kept(x=lambda marker: dict(a=[made(marker)] * 2)),
}
CONFIGS = {
    'import': 'import os\nos.mkdir({marker!r})\nmodel = dict(type="x")\n',
    'import in a value': 'model = dict(type=__import__("os").mkdir({marker!r}))\n',
    'import in a key': 'model = dict(**{{__import__("os").mkdir({marker!r}) or "a": 1}})\n',
    'import in a formatted string': 'model = f"""{{__import__("os").mkdir({marker!r})}}"""\n',
    'comprehension': 'model = [x for x in [__import__("os").mkdir({marker!r})]]\n',
    'base': '_base_ = {base!r}\n',
    'base in a with': 'from mmengine.config import read_base\nwith read_base():\n    from .{module} import *\n',
    'custom_imports': 'custom_imports = dict(imports=[{module!r}])\nmodel = dict(type="x")\n',
    'type': 'model = dict(type="os.mkdir", path={marker!r})\n',
    'type of a pipeline': 'model = dict(type="mmvim.VisionMamba", arch="tiny")\n'
    'test_dataloader = dict(dataset=dict(pipeline=[dict(type="os.mkdir", path={marker!r})]))\n',
    'variable of the environment': 'model = dict(type="{{{{$HOME:x}}}}")\nimport os; os.mkdir({marker!r})\n',
}
PAYLOADS = PICKLES | {f'config: {name}': config(text) for name, text in CONFIGS.items()}


@MODELS.register_module()
class ModelOfPayloads(BaseModel):
    def __init__(self, backbone=None, **kwargs):
        super().__init__()
        self.backbone = MODELS.build(BACKBONE)

    def forward(self, inputs, mode='tensor', **kwargs):
        return dict(loss=self.backbone(torch.stack(inputs))[-1].mean())


def runner(cls, path, resume):
    loader = dict(
        dataset=[dict(inputs=torch.rand(3, 32, 32))],
        sampler=dict(type='DefaultSampler', shuffle=False),
        batch_size=1,
        collate_fn=dict(type='pseudo_collate'),
    )
    cfg = dict(
        train_cfg=dict(type='IterBasedTrainLoop', max_iters=2), optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.1))
    )
    run = cls(
        ModelOfPayloads(), str(path.parent / 'work'), loader, **cfg, load_from=str(path), resume=resume,
        experiment_name=f'{path.parent.parent.name}{path.parent.name}{cls.__module__}{resume}',
        log_level='ERROR', default_hooks=dict(checkpoint=None),
    )  # fmt: skip
    run._train_loop = run.build_train_loop(run._train_loop)
    run.load_or_resume()


def pretrained(path, **options):
    model = MODELS.build(dict(BACKBONE, init_cfg=dict(type='Pretrained', checkpoint=str(path), **options)))
    model.init_weights()


def inferencer(name, package, with_config):
    def read(path):
        module = __import__(f'{package}.apis', fromlist=[name])
        model = Config(dict(model=MODEL)) if with_config else None
        getattr(module, name)(model, str(path), device='cpu')

    return read


def api(package, name):
    def read(path):
        function = getattr(__import__(f'{package}.apis', fromlist=[name]), name)
        function(
            Config(dict(model=MODEL, test_dataloader={})),
            str(path),
            device='cpu',
        )

    return read


def get_model(path):
    from mmpretrain import get_model

    get_model(Config(dict(model=MODEL)), pretrained=str(path))


def of_a_built_model(name):
    def read(path):
        from mmpretrain import apis

        getattr(apis, name)(ModelOfPayloads(), pretrained=str(path), device='cpu')

    return read


def verified(path):
    verify.main(verify.parser().parse_args([str(path), '--no-forward']))


READERS = {
    'read_checkpoint': read_checkpoint,
    'load_checkpoint': lambda path: load_checkpoint(nn.Linear(2, 2), str(path)),
    'CheckpointLoader': lambda path: CheckpointLoader.load_checkpoint(str(path)),
    '_load_checkpoint': lambda path: host._load_checkpoint(str(path)),
    '_load_checkpoint_with_prefix': lambda path: host._load_checkpoint_with_prefix('backbone', str(path)),
    '_safe_torch_load': lambda path: host._safe_torch_load(str(path)),
    'in memory, as from s3': lambda path: host._safe_torch_load(io.BytesIO(path.read_bytes())),
    'load_from_local': lambda path: host.load_from_local(str(path), 'cpu'),
    'init_cfg': pretrained,
    'init_cfg with a prefix': lambda path: pretrained(path, prefix='backbone'),
    'load_from': lambda path: runner(Runner, path, False),
    'load_from, our runner': lambda path: runner(OurRunner, path, False),
    'resume': lambda path: runner(Runner, path, True),
    'resume, our runner': lambda path: runner(OurRunner, path, True),
    'DetInferencer': inferencer('DetInferencer', 'mmdet', True),
    'DetInferencer without a config': inferencer('DetInferencer', 'mmdet', False),
    'MMSegInferencer': inferencer('MMSegInferencer', 'mmseg', True),
    'MMSegInferencer without a config': inferencer('MMSegInferencer', 'mmseg', False),
    'init_detector': api('mmdet', 'init_detector'),
    'init_model': api('mmseg', 'init_model'),
    'get_model': get_model,
    'ImageClassificationInferencer': of_a_built_model('ImageClassificationInferencer'),
    'FeatureExtractor': of_a_built_model('FeatureExtractor'),
    'verify_checkpoint': verified,
}
NO_PATH = ('in memory, as from s3',)


def attempt(reader, path):
    """The error, if any; what is no input error is let through only from a host."""
    try:
        reader(path)
    except Exception as error:
        return error
    return None


@pytest.mark.parametrize('reader', READERS)
def test_nothing_runs(reader, weights, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    if reader not in NO_PATH:
        error = attempt(READERS[reader], tmp_path / 'gone.pth')
        assert isinstance(error, InputError) and 'gone.pth' in str(error), repr(error)
    marker = tmp_path / 'marker'
    for number, (name, save) in enumerate(PAYLOADS.items()):
        folder = tmp_path / str(number)
        folder.mkdir()
        path = folder / f'file{number}.pth'
        monkeypatch.syspath_prepend(folder)
        save(path, marker, weights)
        error = attempt(READERS[reader], path)
        assert not marker.exists(), name
        if isinstance(error, InputError):
            assert '\n' not in str(error), name
        if reader.startswith('resume') and name == 'config: import':  # a run gets as far as the config
            assert 'kept as text' in str(error), repr(error)


TINY = """
_base_ = '{configs}/demo/cascade_mask_rcnn_vim_ti_shapes.py'

max_iters = 1
shapes = dict(num_train=1, num_val=1, image_size=(64, 64), size_range=(16, 40))
model = dict(
    backbone=dict(arch=dict(embed_dims=16, depth=1, d_state=2), img_size=64),
    neck=dict(in_channels=16),
    test_cfg=dict(rcnn=dict(max_per_img=10)),
)
train_dataloader = dict(batch_size=1, num_workers=0, persistent_workers=False, dataset=dict(shapes=shapes))
val_dataloader = dict(batch_size=1, num_workers=0, persistent_workers=False, dataset=dict(shapes=shapes))
test_dataloader = val_dataloader
train_cfg = dict(val_interval=1)
default_hooks = dict(logger=dict(interval=1), checkpoint=dict(interval=1))
"""
TOOLS = {
    'train --resume FILE': (train, '{file}', ['tiny.py', '--resume', '{file}']),
    'train --resume': (train, 'work_dirs/tiny/iter_1.pth', ['tiny.py', '--resume']),
    'train, load_from': (train, '{file}', ['tiny.py', '--cfg-options', 'load_from={file}']),
    'test FILE': (test, '{file}', ['tiny.py', '{file}']),
    'test FOLDER': (test, 'work_dirs/tiny/iter_1.pth', ['tiny.py', 'work_dirs/tiny']),
    'visualize': (visualize, '{file}', ['photo.png', 'tiny.py', '{file}']),
}
AT_TOOLS = ('config: import', 'in the weights', 'config: custom_imports', 'config: type')
FAST = 'train --resume FILE'


@pytest.mark.parametrize('name', [pytest.param(n, marks=[pytest.mark.slow] * (n != FAST)) for n in TOOLS])
def test_nothing_runs_in_tools(name, tmp_path, monkeypatch, capsys):
    """With weights that fit the model, so that a run gets beyond them."""
    monkeypatch.chdir(tmp_path)
    Path('tiny.py').write_text(TINY.format(configs=CONFIG_FOLDER))
    cv2.imwrite('photo.png', np.zeros((64, 64, 3), np.uint8))
    cfg = read_config('tiny.py', {})
    complete_config(cfg)
    init_default_scope('mmdet')
    fitting = MODELS.build(cfg.model).state_dict()
    module, target, arguments = TOOLS[name]
    for number, payload in enumerate(AT_TOOLS[:1] if name == FAST else AT_TOOLS):
        folder = tmp_path / f'folder{number}'
        folder.mkdir()
        monkeypatch.syspath_prepend(folder)
        path = Path(target.format(file=folder / f'file{number}.pth'))
        path.parent.mkdir(parents=True, exist_ok=True)
        PAYLOADS[payload](path, tmp_path / 'marker', fitting)
        Path(path.parent, 'last_checkpoint').write_text(str(path))
        options = [a.format(file=path) for a in arguments]
        with contextlib.suppress(SystemExit, Exception):  # a payload makes no run that ends well
            command_line.run(module, options)
        printed = capsys.readouterr()
        assert not (tmp_path / 'marker').exists(), payload
        if payload in ('in the weights', 'config: import') and (payload == 'in the weights' or 'resume' in name):
            last = printed.err.splitlines()[-1]
            assert last.startswith('error: ') and ('checkpoint' in last or 'kept as text' in last), printed.err[-2000:]


def test_only_known_payloads_are_harmless(weights, tmp_path):
    """Files of weights alone, or with texts that nothing reads, are read; all others are refused."""
    for number, (name, save) in enumerate(PAYLOADS.items()):
        path = tmp_path / f'{number}.pth'
        save(path, tmp_path / 'marker', weights)
        harmless = name.startswith('config') or name == 'metadata of safetensors'
        error = attempt(read_checkpoint, path)
        assert (error is None) == harmless and (error is None or isinstance(error, CheckpointError)), name


@pytest.mark.parametrize('text', CONFIGS.values(), ids=CONFIGS)
def test_what_is_no_value_is_refused(text, tmp_path):
    text = text.format(marker=str(tmp_path / 'marker'), base='/base.py', module='module')
    if text.startswith(('custom_imports', 'model = dict(type="os', 'model = dict(type="mmvim')):
        assert Config.fromstring(text, file_format='.py').model.type
    else:
        with pytest.raises(ConfigError, match=r'^line \d+ of a config kept as text, .* is code'):
            Config.fromstring(text, file_format='.py')
    assert not (tmp_path / 'marker').exists()


def test_a_config_is_read_back_as_it_was_written(load_config):
    cfg = load_config('vim/cascade_mask_rcnn_vim_ti_coco.py')
    cfg.merge_from_dict({'a.1x': float('inf'), 'b': (1,), 'c': {'d': -1.5e-3, 'e': None, 'f-g': [True]}})
    assert parse_config(cfg.pretty_text) == cfg._cfg_dict.to_dict()


@pytest.mark.parametrize(
    'text', ['(' * 1000, 'a' * 10 + '\0', 'x = ' + '-' * 20000 + '1', 'x = ' + '[' * 150 + ']' * 150]
)
def test_a_config_that_python_cannot_parse_is_an_error_of_one_line(text):
    try:
        parse_config(text)
    except ConfigError as error:
        assert '\n' not in str(error)
