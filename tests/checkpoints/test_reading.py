import argparse
import http.server
import io
import multiprocessing
import os
import threading
import warnings
from collections import OrderedDict
from datetime import timedelta
from functools import partial

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.model import BaseModel
from mmengine.optim import OptimWrapper
from mmengine.optim.scheduler.param_scheduler import OneCycleParamScheduler
from mmengine.registry import PARAM_SCHEDULERS
from mmengine.runner import Runner
from mmengine.runner.checkpoint import CheckpointLoader
from safetensors.torch import save_file
from torch import nn

from mmvim.checkpoints import find_state_dict, read_checkpoint, read_state_dict
from mmvim.errors import CheckpointError

WEIGHTS = {'a.weight': torch.arange(6.0).reshape(2, 3), 'a.bias': torch.ones(2)}


def same(found, expected=WEIGHTS):
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize('suffix', ['.pth', '.pt', '.tar'])
@pytest.mark.parametrize('zipped', [True, False], ids=['zip format', 'format before torch 1.6'])
def test_published_files_with_a_namespace(tmp_path, suffix, zipped):
    path = tmp_path / f'published{suffix}'
    args = argparse.Namespace(model='vim_tiny', lr=5e-4)
    saved = {
        'model': WEIGHTS,
        'model_ema': {'a.weight': torch.zeros(2, 3)},
        'optimizer': {},
        'epoch': 299,
        'args': args,
    }
    torch.save(saved, path, _use_new_zipfile_serialization=zipped)
    assert same(read_state_dict(path))
    assert read_checkpoint(str(path))['args'] == args


@pytest.mark.parametrize(
    'args, name',
    [
        (argparse.Namespace(model='vim_tiny'), 'vim_tiny'),
        (dict(model='vim_tiny'), 'vim_tiny'),
        (argparse.Namespace(model=['vim_tiny']), None),
        (argparse.Namespace(lr=1), None),
        ('vim_tiny', None),
        (None, None),
    ],
)
@pytest.mark.parametrize('key', ['model', 'state_dict'])
def test_the_name_of_the_model_goes_with_the_weights(tmp_path, args, name, key):
    path = tmp_path / 'published.pth'
    torch.save({key: OrderedDict(WEIGHTS), 'args': args}, path)
    loaded = CheckpointLoader.load_checkpoint(str(path))['state_dict']
    for metadata in (loaded._metadata[''], loaded._metadata['backbone'], read_meta(path)):
        assert metadata.get('model_name') == name


def read_meta(path):
    return getattr(read_state_dict(path), '_metadata', {}).get('', {})


def test_safetensors(tmp_path):
    save_file(WEIGHTS, tmp_path / 'w.safetensors')
    assert same(read_state_dict(tmp_path / 'w.safetensors'))
    os.rename(tmp_path / 'w.safetensors', tmp_path / 'renamed.bin')
    assert same(read_state_dict(tmp_path / 'renamed.bin', map_location=torch.device('cpu')))


def test_safetensors_without_the_package(tmp_path, monkeypatch):
    save_file(WEIGHTS, tmp_path / 'w.safetensors')
    monkeypatch.setitem(__import__('sys').modules, 'safetensors', None)
    with pytest.raises(CheckpointError, match='pip install safetensors'):
        read_state_dict(tmp_path / 'w.safetensors')


@pytest.mark.parametrize(
    'checkpoint',
    [
        WEIGHTS,
        {'state_dict': WEIGHTS, 'optimizer': {'state': {}}},
        {'model': {'state_dict': WEIGHTS}},
        {'model_ema': WEIGHTS},
        {'state_dict': {f'module.{name}': value for name, value in WEIGHTS.items()}},
        {'model': {f'module._orig_mod.{name}': value for name, value in WEIGHTS.items()}},
        {**WEIGHTS, 'epoch': 3},
    ],
)
def test_weights_are_found(checkpoint):
    assert same(find_state_dict(checkpoint))


def test_a_prefix_that_not_all_names_have_belongs_to_the_names():
    weights = {'module.a': torch.ones(1), 'head.b': torch.ones(1)}
    assert same(find_state_dict(weights), weights)


class Trap:
    def __reduce__(self):
        return os.system, ('touch trap-was-sprung',)


class Harmless:
    pass


@pytest.mark.parametrize(
    ('extra', 'named'),
    [(Trap(), 'system'), (Harmless(), 'Harmless'), (getattr, 'getattr'), (partial(print), 'partial')],
)
@pytest.mark.parametrize('zipped', [True, False])
def test_other_pickled_classes_are_refused_and_never_run(tmp_path, monkeypatch, extra, named, zipped):
    monkeypatch.chdir(tmp_path)
    torch.save({'model': WEIGHTS, 'extra': extra}, 'w.pth', _use_new_zipfile_serialization=zipped)
    if extra is getattr:  # harmless in itself: only what is called with it counts
        assert same(read_state_dict('w.pth'))
        return
    for read in (read_state_dict, CheckpointLoader.load_checkpoint):
        with pytest.raises(CheckpointError, match=f"'w.pth' holds pickled objects .*{named}.*save the weights alone"):
            read('w.pth')
    assert not os.path.exists('trap-was-sprung')


@pytest.mark.parametrize(
    ('owner', 'name'),
    [(np.ndarray, 'tofile'), (OneCycleParamScheduler, 'build_iter_from_epoch'), (OneCycleParamScheduler, '__init__')],
)
def test_getattr_reaches_nothing_but_methods_that_runs_save(tmp_path, owner, name):
    class Reach:
        def __reduce__(self):
            return getattr, (owner, name)

    torch.save({'model': WEIGHTS, 'extra': Reach()}, tmp_path / 'w.pth')
    with pytest.raises(CheckpointError, match=f'getattr of .*{owner.__name__}'):
        read_state_dict(tmp_path / 'w.pth')


def test_the_class_of_a_schedule_is_not_called(tmp_path):
    class Called:
        def __reduce__(self):
            return OneCycleParamScheduler, ()

    torch.save({'model': WEIGHTS, 'extra': Called()}, tmp_path / 'w.pth')
    with pytest.raises(CheckpointError, match="'str' object is not callable"):
        read_state_dict(tmp_path / 'w.pth')


ARGUMENTS = dict(  # of schedules that need some
    CosineAnnealing=dict(T_max=5),
    CosineRestart=dict(periods=[2, 2], restart_weights=[1, 1], eta_min=0),
    Exponential=dict(gamma=0.9),
    MultiStep=dict(milestones=[2]),
    OneCycle=dict(eta_max=0.1, total_steps=9),
    ReduceOnPlateau=dict(monitor='acc'),
    Step=dict(step_size=2),
)


@pytest.mark.parametrize('zipped', [True, False])
@pytest.mark.parametrize('name', [name for name in PARAM_SCHEDULERS.module_dict if name.endswith('LR')])
def test_the_state_of_every_schedule_is_read(tmp_path, name, zipped):
    kind = PARAM_SCHEDULERS.get(name)
    optimizer = torch.optim.SGD([torch.ones(2, requires_grad=True)], lr=0.1)
    state = kind(OptimWrapper(optimizer), **ARGUMENTS.get(name.removesuffix('LR'), {})).state_dict()
    torch.save({'a': WEIGHTS['a.bias'], 'state': state}, tmp_path / 'w.pth', _use_new_zipfile_serialization=zipped)
    assert read_checkpoint(tmp_path / 'w.pth')['state'] == state


def saved_bytes(zipped):
    buffer = io.BytesIO()
    torch.save({'model': {'a': torch.randn(300, 30)}}, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


@pytest.mark.parametrize('zipped', [True, False])
@pytest.mark.parametrize('part', [0.001, 0.01, 0.3, 0.9, 0.9999])
def test_truncated_files(tmp_path, zipped, part):
    content = saved_bytes(zipped)
    (tmp_path / 'cut.pth').write_bytes(content[: max(int(len(content) * part), 1)])
    with pytest.raises(
        CheckpointError, match=r"cut\.pth' is no checkpoint, or a damaged or incomplete one \(.+\): download"
    ):
        read_state_dict(tmp_path / 'cut.pth')


def test_truncated_safetensors(tmp_path):
    save_file({'a': torch.randn(300, 30)}, tmp_path / 'w.safetensors')
    content = (tmp_path / 'w.safetensors').read_bytes()
    for length in (5, 60, 1000, len(content) - 1):
        (tmp_path / 'w.safetensors').write_bytes(content[:length])
        with pytest.raises(CheckpointError, match='damaged or incomplete'):
            read_state_dict(tmp_path / 'w.safetensors')


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        (b'', 'is empty: download'),
        (b'\n<!DOCTYPE html><html>Not found</html>', 'is a web page, not a checkpoint'),
        (b'version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n', 'is a Git LFS pointer.*git lfs pull'),
        (b'{"images": []}', 'is no checkpoint, or a damaged'),
        (b'hello\nworld\n', 'is no checkpoint, or a damaged'),
        (bytes(range(256)) * 40, 'is no checkpoint, or a damaged'),
        (b'\x89PNG\r\n\x1a\n' + bytes(500), 'is no checkpoint, or a damaged'),
    ],
)
def test_files_that_are_no_checkpoints(tmp_path, content, message):
    (tmp_path / 'x.pth').write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"x\.pth' {message}"):
        read_state_dict(tmp_path / 'x.pth')


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(CheckpointError, match=r"none\.pth' does not exist: give the path"):
        read_state_dict(tmp_path / 'none.pth')
    with pytest.raises(CheckpointError, match='is a folder: give the path'):
        read_state_dict(tmp_path)


@pytest.mark.parametrize('checkpoint', [{}, [1, 2], {'epoch': 3, 'args': 'x'}, {'model': {}}, 'text', torch.ones(3)])
def test_checkpoints_without_weights(tmp_path, checkpoint):
    torch.save(checkpoint, tmp_path / 'x.pth')
    with pytest.raises(CheckpointError, match=r"x\.pth' holds no weights: found .*Give a checkpoint of a model"):
        read_state_dict(tmp_path / 'x.pth')


class Toy(BaseModel):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def forward(self, inputs, mode='tensor'):
        return {'loss': self.layer(torch.stack(inputs)).square().mean()}


def toy_runner(work_dir, epochs, **settings):
    config = Config(
        dict(
            work_dir=str(work_dir),
            train_dataloader=dict(
                dataset=[dict(inputs=torch.ones(2) * i) for i in range(4)],
                sampler=dict(type='DefaultSampler', shuffle=False),
                batch_size=2,
                collate_fn=dict(type='pseudo_collate'),
            ),
            train_cfg=dict(by_epoch=True, max_epochs=epochs),
            optim_wrapper=dict(optimizer=dict(type='AdamW', lr=0.1)),
            param_scheduler=[
                dict(type='LinearLR', begin=0, end=4, by_epoch=False),
                dict(type='MultiStepLR', milestones=[2]),
            ],
            default_hooks=dict(logger=dict(type='LoggerHook', interval=1)),
            custom_hooks=[dict(type='EMAHook')],
            experiment_name=f'epochs{epochs}',
        )
    )
    return Runner(model=Toy(), cfg=config, log_level='ERROR', **{**config, **settings})


def test_checkpoints_of_a_run_load_safely_and_resume(tmp_path, capfd):
    first = toy_runner(tmp_path, 1)
    first.train()
    path = tmp_path / 'epoch_1.pth'
    checkpoint = read_checkpoint(path)
    buffers = checkpoint['message_hub']['log_scalars']
    assert buffers['train/loss'].mean() == first.message_hub.get_scalar('train/loss').mean()
    assert find_state_dict(checkpoint).keys() == first.model.state_dict().keys()

    capfd.readouterr()
    with warnings.catch_warnings():
        warnings.simplefilter('error', FutureWarning)
        second = toy_runner(tmp_path, 2, load_from=str(path), resume=True)
        second.train()
    assert 'weights_only' not in ''.join(capfd.readouterr())
    assert second.iter == 4
    assert len(second.message_hub.get_scalar('train/loss').data[0]) == 4


@pytest.fixture
def address(tmp_path, monkeypatch):
    """Address of a server of the files in `served`; downloads go to `cache`."""
    (tmp_path / 'served').mkdir()
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'cache'))
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path / 'served')
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f'http://127.0.0.1:{server.server_port}'
        server.shutdown()


def test_mmengine_reads_published_files_by_path_and_by_url(tmp_path, address):
    path = tmp_path / 'served' / 'published.pth'
    torch.save({'model': WEIGHTS, 'args': argparse.Namespace()}, path)
    for source in (str(path), f'{address}/published.pth?download=true'):
        loaded = CheckpointLoader.load_checkpoint(source, map_location='cpu')
        assert isinstance(loaded['state_dict'], OrderedDict) and same(loaded['state_dict'])
    with pytest.raises(CheckpointError, match='cannot be downloaded .*give the path'):
        CheckpointLoader.load_checkpoint(f'{address}/gone.pth')
    (cached,) = (tmp_path / 'cache' / 'hub' / 'checkpoints').iterdir()
    assert cached.name.endswith('-published.pth')


def test_an_incomplete_download_says_which_file_to_delete(tmp_path, address):
    path = tmp_path / 'served' / 'w.pth'
    torch.save({'a': torch.ones(9999)}, path)
    whole = path.read_bytes()
    path.write_bytes(whole[:9999])
    for _ in range(2):  # downloaded, then from the cache
        with pytest.raises(
            CheckpointError, match='incomplete one .*download it again. .*/w.pth: delete it first'
        ) as told:
            CheckpointLoader.load_checkpoint(f'{address}/w.pth')
        path.write_bytes(whole)
    (cached,) = (tmp_path / 'cache' / 'hub' / 'checkpoints').iterdir()
    assert str(told.value).startswith(f"'{cached}' is no checkpoint")
    cached.unlink()
    assert CheckpointLoader.load_checkpoint(f'{address}/w.pth')['state_dict']['a'].sum() == 9999


def test_files_of_one_name_at_two_addresses_are_two(tmp_path, address):
    files = [f'{address}/{size}/model.safetensors' for size in ('tiny', 'small')]
    for number, size in enumerate(('tiny', 'small')):
        (tmp_path / 'served' / size).mkdir()
        save_file({'a': torch.full((2,), float(number))}, tmp_path / 'served' / size / 'model.safetensors')
    for _ in range(2):  # downloaded, then from the cache
        found = [CheckpointLoader.load_checkpoint(file)['state_dict']['a'].tolist() for file in files]
        assert found == [[0.0, 0.0], [1.0, 1.0]]
        for size in ('tiny', 'small'):
            (tmp_path / 'served' / size / 'model.safetensors').unlink(missing_ok=True)


def load_as_rank(rank, folder, urls, results):
    """One of two processes, each with a disk of its own if `folder` holds two."""
    os.environ.update(LOCAL_RANK='0', TORCH_HOME=str(folder / f'cache{rank}'))
    torch.distributed.init_process_group(
        'gloo', init_method=f'file://{folder}/store', rank=rank, world_size=2, timeout=timedelta(seconds=20)
    )
    for url in urls:
        try:
            results.put((rank, CheckpointLoader.load_checkpoint(url)['state_dict']['a'].tolist()))
        except CheckpointError as error:
            results.put((rank, str(error)))
    torch.distributed.destroy_process_group()


def test_nodes_with_disks_of_their_own_download_and_fail_together(tmp_path, address):
    torch.save({'a': torch.ones(2)}, tmp_path / 'served' / 'w.pth')
    context = multiprocessing.get_context('fork')
    results = context.Queue()
    urls = (f'{address}/gone.pth', f'{address}/w.pth')
    processes = [context.Process(target=load_as_rank, args=(rank, tmp_path, urls, results)) for rank in range(2)]
    for process in processes:
        process.start()
    found = sorted((results.get(timeout=60) for _ in range(4)), key=str)
    for process in processes:
        process.join(timeout=60)
        assert process.exitcode == 0
    failure = found[0][1]
    assert 'gone.pth' in failure and 'cannot be downloaded' in failure
    assert found == [(0, failure), (0, [1.0, 1.0]), (1, failure), (1, [1.0, 1.0])]
    for rank in range(2):
        assert [path.name[-6:] for path in (tmp_path / f'cache{rank}').rglob('*.pth')] == ['-w.pth']
