import ast
import json
from importlib.util import find_spec
from pathlib import Path

import pytest
from mmengine.config import Config

from mmvim.config.files import (
    PLACEHOLDER,
    config_files,
    follow_validation,
)
from mmvim.config.unread import COMPLETED_KEYS, RUNNER_KEYS, completed_keys, runner_keys, unread
from mmvim.engine.runner import Runner
from mmvim.errors import ConfigError
from mmvim.tools import train
from mmvim.tools.command_line import load_config

CONFIGS = Path(__file__).parents[2] / 'configs'
NAMES = sorted(str(path.relative_to(CONFIGS)) for path in CONFIGS.rglob('*.py'))
HOSTS = ('mmdet', 'mmseg', 'mmpretrain')


def host_files():
    """Every tenth config of each host that inherits, of them every fourth without the marker, and some with helpers,
    in-place changes and dead keys.
    """
    for host in HOSTS:
        folder = Path(find_spec(host).origin).parent / '.mim' / 'configs'
        tenth = [path for path in sorted(folder.rglob('*.py')) if '_base_' not in path.parts][::10]
        slow = pytest.mark.slow  # python -m pytest tests/engine -m slow
        yield from [pytest.param(path, marks=slow if i % 4 else (), id=path.stem) for i, path in enumerate(tenth)]
    mmdet = Path(find_spec('mmdet').origin).parent / '.mim' / 'configs'
    yield mmdet / 'fpg' / 'faster-rcnn_r50_fpg-chn128_crop640-50e_coco.py'
    yield mmdet / 'v3det' / 'fcos_r50_fpn_8x4_sample1e-3_mstrain_v3det_2x.py'
    yield mmdet / 'fpg' / 'mask-rcnn_r50_fpn_crop640-50e_coco.py'


@pytest.fixture
def child(tmp_path):
    """Function (base below configs, text) that writes a config of one's own and gives its path."""

    def write(base, text, name='mine.py'):
        (tmp_path / name).write_text(
            f"_base_ = '{CONFIGS / base if '::' not in base and base[0] != '.' else base}'\n{text}\n"
        )
        return str(tmp_path / name)

    return write


def load(path, *options):
    return load_config(train.parser().parse_args([path, *(['--cfg-options', *options] if options else [])]))


COCO = 'vim/cascade_mask_rcnn_vim_ti_coco.py'
ADE = 'vim/upernet_vim-s_8xb4-60k_ade20k-512x512.py'
DEMO = 'demo/cascade_mask_rcnn_vim_ti_shapes.py'
STALE = [
    (COCO, 'num_classes = 3', 'num_classes=3', 'model.roi_head.num_classes'),
    (COCO, 'image_size = (512, 512)', 'image_size="(512,512)"', 'model.backbone.img_size'),
    (COCO, "data_root = 'data/mine/'", 'data_root=data/mine/', 'train_dataloader.dataset.data_root'),
    (COCO, 'max_iters = 10', 'max_iters=10', 'train_cfg.max_iters'),
    (COCO, "train_pipeline = [dict(type='PackDetInputs')]", None, 'train_dataloader.dataset.pipeline'),
    (COCO, 'test_pipeline = []', None, 'val_dataloader.dataset.pipeline'),
    (COCO, 'norm_cfg = dict(eps=1e-5)', None, 'model.neck.norm_cfg'),
    (COCO, "classes = ('a', 'b')", 'classes="[a,b]"', None),
    (COCO, 'frobnicate = 1', 'frobnicate=1', None),
    (ADE, 'embed_dims = 768', 'embed_dims=768', 'model.neck.embed_dim'),
    (ADE, 'crop_size = (256, 256)', 'crop_size="(256,256)"', 'model.data_preprocessor.size'),
    (ADE, 'data_preprocessor = dict(size=(256, 256))', 'data_preprocessor.size="(256,256)"', 'model.data_preprocessor'),
    (ADE, 'max_iters = 10', 'max_iters=10', 'train_cfg.max_iters'),
    (DEMO, 'width = 64', 'width=64', 'model.neck.in_channels'),
    (DEMO, 'strides = [4, 8, 16]', None, 'model.rpn_head.anchor_generator.strides'),
]


@pytest.mark.parametrize('base, text, option, instead', STALE)
def test_a_key_that_nothing_reads_gets_the_answer_of_the_command_line(child, base, text, option, instead):
    path = child(base, f'# mine\n{text}')
    key = text.partition(' ')[0]
    with pytest.raises(ConfigError) as refused:
        load(path)
    message = str(refused.value)
    assert message.startswith(f"config '{path}', line 3: nothing in this config takes its value from '{key}'; ")
    assert '\n' not in message and (
        f'set {instead}' in message or f'and {instead}' in message if instead else 'delete it'
    )
    if option:
        with pytest.raises(ConfigError, match=f'--cfg-options {key}'):
            load(str(CONFIGS / base), option)


@pytest.mark.parametrize('base, text, option, instead', STALE)
def test_so_do_the_runner_of_the_hosts_tools_and_a_config_between(child, base, text, option, instead):
    path = child('./mine.py', "work_dir = 'x'", 'last.py') if child(base, text) else None
    with pytest.raises(ConfigError, match=r"mine\.py', line 2: nothing in this config takes its value from"):
        load(path)
    with pytest.raises(ConfigError, match=r"mine\.py', line 2: nothing in this config takes its value from"):
        Runner.from_cfg(Config.fromfile(path))


@pytest.mark.parametrize(
    'base, text',
    [
        (COCO, 'num_classes = 3\nmodel = dict(roi_head=dict(num_classes=num_classes))'),
        (
            COCO,
            'train_pipeline = []\ntrain_dataloader = dict(dataset=dict(pipeline=train_pipeline))',
        ),
        (COCO, 'train_pipeline = _base_.train_pipeline\ntrain_pipeline.pop(3)'),
        (COCO, '_base_.train_pipeline[5].prob = 0.1'),
        (COCO, 'a, b = 1, 2\noptim_wrapper = dict(optimizer=dict(lr=a * b))'),
        (COCO, 'def rate(n):\n    return lr / n\n\n\nlr = 1\noptim_wrapper = dict(optimizer=dict(lr=rate(2)))'),
        (COCO, 'sizes = [1, 2]\nrandomness = dict(seed=sum(s for s in sizes))'),
        (COCO, 'custom_hooks = []\nfor i in range(3):\n    custom_hooks.append(dict(type="EmptyCacheHook"))'),
        (COCO, "_of_my_hook = 3\nwork_dir = 'x'\nresume = True\nload_from = None\nmodel_wrapper_cfg = None"),
        (COCO, 'import math\nfrom math import pi'),
        (COCO, "data_root = 'data/coco/'\nimage_size = (1024, 1024)  # what they are anyway"),
        (DEMO, "data_root = 'data/other'\nmax_iters = 7"),
        ('vim/cascade_mask_rcnn_vim_ti_folder.py', "data_root = 'gone'\ntrain_ann = 'x.json'\nnum_classes = 3"),
        (
            'vim/upernet_vim-ti_folder.py',
            "classes = ['a', 'b']\ncrop_size = None\nimg_suffix = '.tif'\nimage_size = 64",
        ),
        ('vim/upernet_vim-ti_folder.py', "img_suffix = '.tif'  # the classes come from the command line"),
    ],
)
def test_keys_that_are_read_are_left_alone(child, base, text):
    load(child(base, text))


@pytest.mark.parametrize('value', ['None', '0', 'False', '()', "''", '[]', "'x'"])
def test_a_file_may_say_again_what_it_inherits_and_only_that(child, tmp_path, value):
    (tmp_path / 'base.py').write_text(f'spare = {value}\n')
    load(child('./base.py', f'spare = {value}'))
    for text in ('spare = 1', f'other = {value}'):
        with pytest.raises(ConfigError, match=f"takes its value from '{text.split()[0]}'"):
            load(child('./base.py', text))


def test_a_none_that_a_host_sets_may_be_said_again(child):
    base = 'mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py'
    assert load(child(base, 'backend_args = None')).backend_args is None


def test_what_a_child_or_an_option_sets_itself_does_not_make_its_bases_wrong(child):
    """The base's `max_iters` would have filled `train_cfg.max_iters`."""
    camvid = 'vim/upernet_vim-ti_camvid-240x180.py'
    assert load(str(CONFIGS / camvid), 'train_cfg.max_iters=2').train_cfg.max_iters == 2
    assert load(child(camvid, 'train_cfg = dict(max_iters=3)')).train_cfg.max_iters == 3
    mine = child(camvid, 'max_iters = 4')
    assert load(mine, 'train_cfg.max_iters=5').train_cfg.max_iters == 5


NESTED = [
    'if True:\n    num_classes = 3',
    'if False:\n    pass\nelif True:\n    num_classes = 3',
    'for _i in (3,):\n    num_classes = _i',
    'while True:\n    num_classes = 3\n    break',
    "with open(__import__('os').devnull) as num_classes:\n    num_classes = 3",
    'try:\n    num_classes = 3\nfinally:\n    pass',
    'try:\n    raise KeyError\nexcept KeyError:\n    num_classes = 3',
    '_ = (num_classes := 3)',
]


@pytest.mark.parametrize('text', NESTED)
def test_a_key_that_a_statement_sets_inside_is_a_key_too(child, text):
    with pytest.raises(ConfigError, match=r"line \d: nothing in this config takes its value from 'num_classes'"):
        load(child(COCO, text))
    load(child(COCO, f'{text}\nmodel = dict(roi_head=dict(num_classes=num_classes))'))
    load(child(COCO, f'{text}\ndel num_classes'))


def test_names_of_scopes_of_their_own_are_no_keys(child):
    text = 'def _make():\n    count = 3\n    return count\n\n\nclass _Make:\n    other = 1\n\n\n'
    load(child(COCO, text + "randomness = dict(seed=sum(1 for _ in [size for size in {1: 2 for key in 'ab'}]))"))


def write_data(path, keys):
    """JSON, which is YAML too, indented as many write it."""
    path.write_text(json.dumps(keys, indent='\t' if path.suffix == '.json' else 2))
    return str(path)


@pytest.mark.parametrize('suffix', ['.yml', '.yaml', '.json'])
def test_children_in_yaml_and_json_get_the_same_answers(tmp_path, suffix):
    path = tmp_path / f'mine{suffix}'
    base = {'_base_': str(CONFIGS / COCO)}
    for key in ('num_classes', 'max_iters', 'frobnicate'):
        write_data(path, {**base, 'model': {}, key: 3})
        last = write_data(tmp_path / f'last{suffix}', {'_base_': path.name, 'work_dir': 'x'})
        for config in (str(path), last):
            with pytest.raises(ConfigError, match=f"mine{suffix}', line 4: nothing .* takes its value from '{key}'"):
                load(config)
    load(write_data(path, {**base, 'data_root': 'data/coco/', 'image_size': [1024, 1024]}))
    load(write_data(path, {'_base_': 'mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py', 'backend_args': None}))
    cfg = load(write_data(path, {**base, 'val_evaluator': {'metric': ['bbox']}}))
    assert cfg.test_evaluator == cfg.val_evaluator and cfg.test_evaluator.metric == ['bbox']
    write_data(path, {**base, '_num': 3, 'seed': 1})
    last = tmp_path / 'last.py'
    last.write_text(f"_base_ = '{path.name}'\nrandomness = dict(seed=_base_.seed)\n")
    assert load(str(last)).randomness.seed == 1


@pytest.mark.parametrize('name', ['last.py', 'last.yml', 'last.json'])
def test_placeholders_of_mmengine_are_understood_in_each_format(tmp_path, name):
    (tmp_path / 'mine.py').write_text(f"_base_ = '{CONFIGS / COCO}'\nnum = 3\n")
    base, text = '{{ fileDirname }}/mine.py', ' "randomness": {"seed": {{ _base_.num }}}, "spare": 1}'
    text = f'{{"_base_": "{base}",\n{text}'
    if name.endswith('.py'):
        text = f'_base_ = "{base}"\nrandomness = dict(seed={{{{ _base_.num }}}})\nspare = 1\n'
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=rf"{name}', line \d: nothing in this config takes its value from 'spare'"):
        load(str(tmp_path / name))
    (tmp_path / name).write_text(text.replace('spare', '_spare'))
    assert load(str(tmp_path / name)).randomness.seed == 3


def test_an_alias_reads_the_key_of_its_anchor(tmp_path):
    path = tmp_path / 'mine.yml'
    path.write_text(f"_base_: '{CONFIGS / COCO}'\nnum: &num 3\nmodel: {{roi_head: {{num_classes: *num}}}}\n")
    assert load(str(path)).model.roi_head.num_classes == 3
    path.write_text(f"_base_: '{CONFIGS / COCO}'\nnum: &num 3\nother: *num\n")
    with pytest.raises(ConfigError, match="line 3: nothing in this config takes its value from 'other'"):
        load(str(path))


def test_a_helper_for_files_that_inherit_is_read(child):
    child(COCO, 'num = 3\nname = "x"\nother = 1')
    text = "model = dict(roi_head=dict(num_classes=_base_.num))\nwork_dir = _base_['name']\n"
    text += 'randomness = dict(seed={{_base_.other}})'
    assert load(child('./mine.py', text, 'last.py')).model.roi_head.num_classes == 3


def test_a_config_that_training_saved_is_read_again(tmp_path, child):
    for name in (COCO, ADE, DEMO):
        Config.fromfile(CONFIGS / name).dump(tmp_path / 'saved.py')
        load(str(tmp_path / 'saved.py'))
    with pytest.raises(ConfigError, match="line 2: nothing in this config takes its value from 'width'"):
        load(child('./saved.py', 'width = 3'))


@pytest.mark.parametrize('name', NAMES)
def test_no_false_alarm_in_the_configs_of_mmvim(name):
    cfg = Config.fromfile(CONFIGS / name)
    completed = completed_keys(cfg) if 'model' in cfg else COMPLETED_KEYS
    files = config_files(str(CONFIGS / name))
    assert not files[-1].is_hosts
    assert unread(files, runner_keys(cfg) | completed) == []
    before = cfg.to_dict()
    follow_validation(cfg, files)
    assert cfg.to_dict() == before


@pytest.mark.parametrize('path', host_files(), ids=lambda path: path.stem)
def test_no_false_alarm_in_the_configs_of_hosts(path, tmp_path):
    """A key that would be refused in a file of one's own changes nothing indeed: the config is the same without it."""
    files = config_files(str(path))
    assert all(file.is_hosts for file in files) and unread(files, ()) == []
    text = path.read_text()
    lines = text.splitlines()
    for key, _ in unread([files[-1]._replace(is_hosts=False)], RUNNER_KEYS - {'data_preprocessor'}):
        kept = list(lines)
        for node in ast.parse(PLACEHOLDER.sub('None', text)).body:
            if isinstance(node, ast.Assign) and any(ast.unparse(target) == key for target in node.targets):
                kept[node.lineno - 1 : node.end_lineno] = [''] * (node.end_lineno - node.lineno + 1)
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == '_base_':
                kept[node.lineno - 1 : node.end_lineno] = [''] * (node.end_lineno - node.lineno + 1)
                kept[node.lineno - 1] = f'_base_ = {files[-1].bases}'
        (tmp_path / 'without.py').write_text('\n'.join(kept))
        without = Config.fromfile(tmp_path / 'without.py', import_custom_modules=False).to_dict()
        assert {**without, key: None} == {**Config.fromfile(path, import_custom_modules=False).to_dict(), key: None}


@pytest.mark.parametrize('base', [COCO, 'mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py'])
@pytest.mark.parametrize('package', [None, 'mine', 'mmvim', *HOSTS])
def test_an_index_above_a_config_does_not_make_it_a_hosts(tmp_path, package, base):
    """But in a checkout of a host that is so, unless the config inherits one of mmvim's."""
    (tmp_path / 'model-index.yml').write_text('Import: []\n')
    if package:
        (tmp_path / package).mkdir()
        (tmp_path / package / '__init__.py').touch()
    (tmp_path / 'configs').mkdir()
    path, last = tmp_path / 'configs' / 'mine.py', tmp_path / 'configs' / 'last.py'
    base = base if '::' in base else CONFIGS / base
    path.write_text(f"_base_ = '{base}'\nnum_classes = 3\nval_evaluator = dict(metric=['bbox'])\n")
    last.write_text("_base_ = 'mine.py'\nwork_dir = 'x'\n")
    for config in (path, last):
        if package in HOSTS and base != CONFIGS / COCO:
            assert load(str(config)).test_evaluator.metric == ['bbox', 'segm']
            continue
        with pytest.raises(ConfigError, match="line 2: nothing in this config takes its value from 'num_classes'"):
            load(str(config))
    path.write_text(path.read_text().replace('num_classes', '_num'))
    if package not in HOSTS or base == CONFIGS / COCO:
        assert load(str(last)).test_evaluator.metric == ['bbox']


@pytest.mark.parametrize('host', HOSTS)
def test_configs_in_the_source_of_a_host_are_its_own(host):
    for path in sorted((Path(find_spec(host).origin).parent / 'configs').rglob('*.py'))[::20]:
        assert all(file.is_hosts for file in config_files(str(path)))


def test_hosts_configs_load_as_they_are():
    mmdet = Path(find_spec('mmdet').origin).parent / '.mim' / 'configs'
    load(str(mmdet / 'fpg' / 'mask-rcnn_r50_fpn_crop640-50e_coco.py'))


# ---- the test follows the validation

BASES = ('_base_/datasets/coco_folder.py', '_base_/datasets/coco_instance_lsj.py', '_base_/datasets/shapes_instance.py')
BASES += ('_base_/datasets/label_maps_folder.py', '_base_/datasets/shapes_semantic.py')


@pytest.mark.parametrize('base', [*BASES, COCO, 'vim/vim-ti_8xb128_in1k.py', 'mmdet::_base_/datasets/coco_instance.py'])
def test_the_test_follows_the_validation(child, base):
    changes = 'val_evaluator = dict(prefix="own")\nval_dataloader = dict(num_workers=7)'
    cfg = load(child(base, changes))
    assert cfg.test_evaluator == cfg.val_evaluator and cfg.test_evaluator.prefix == 'own'
    assert cfg.test_dataloader == cfg.val_dataloader and cfg.test_dataloader.num_workers == 7
    again = load(child('./mine.py', 'val_dataloader = dict(num_workers=5)', 'last.py'))
    assert again.test_dataloader.num_workers == 5 and again.test_evaluator.prefix == 'own'


def test_what_the_test_says_itself_stays(child):
    text = 'val_evaluator = dict(metric=["bbox"])\n'
    assert load(child(COCO, text)).test_evaluator.metric == ['bbox']
    assert load(child(COCO, text + 'test_evaluator = dict(classwise=True)')).test_evaluator.metric == ['bbox', 'segm']
    assert load(child('./mine.py', 'val_evaluator = dict(metric="segm")', 'last.py')).test_evaluator.metric == [
        'bbox',
        'segm',
    ]
    cfg = load(child(COCO, 'val_dataloader = val_evaluator = val_cfg = None'))  # no validation, but a test
    assert cfg.val_evaluator is None and cfg.test_evaluator.metric == ['bbox', 'segm'] and cfg.test_dataloader


def test_options_count_for_the_test_too(child):
    cfg = load(str(CONFIGS / COCO), 'val_evaluator.metric=bbox')
    assert cfg.test_evaluator.metric == cfg.val_evaluator.metric == 'bbox'
    cfg = load(str(CONFIGS / COCO), 'val_evaluator.metric=bbox', 'test_evaluator.classwise=True')
    assert cfg.test_evaluator.metric == ['bbox', 'segm'] and cfg.test_evaluator.classwise
    path = child(COCO, 'val_evaluator = dict(metric=["bbox"])')
    assert load(path, 'test_evaluator.metric=segm').test_evaluator.metric == 'segm'


def test_the_runner_of_hosts_tools_follows_too(child):
    path = child(DEMO, 'val_evaluator = dict(metric=["bbox"])')
    for option, expected in ((None, ['bbox']), ('segm', 'segm')):
        cfg = Config.fromfile(path)
        if option:
            cfg.test_evaluator.metric = option
        follow_validation(cfg, config_files(path))
        assert cfg.test_evaluator.metric == expected
