import json

import pytest
import torch
from mmengine.config import Config, ConfigDict
from mmengine.hub import get_config
from mmengine.registry import MODELS, DefaultScope

from mmvim.config.class_counts import set_num_classes
from mmvim.config.completion import complete_config
from mmvim.config.data import check_data_root
from mmvim.config.reading import read_config
from mmvim.datasets import annotations
from mmvim.errors import ConfigError, DataError

FOLDER = 'vim/cascade_mask_rcnn_vim_ti_folder.py'


@pytest.fixture
def files(tmp_path):
    content = dict(images=[], annotations=[], categories=[dict(id=9, name='fig'), dict(id=2, name='date')])
    (tmp_path / 'a.json').write_text(json.dumps(content))
    return dict(data_root=str(tmp_path), train_ann='a.json', val_ann='a.json', train_img='x', val_img='y')


def counts(model, path=''):
    """Every num_classes in a model config, by path."""
    if isinstance(model, list):
        model = dict(enumerate(model))
    found = {path: model['num_classes']} if 'num_classes' in model else {}
    for key, value in model.items():
        if isinstance(value, dict | list):
            found.update(counts(value, f'{path}.{key}'))
    return found


def test_one_class_count_reaches_every_head(load_config, files):
    cfg = load_config(FOLDER, **files)
    assert counts(cfg.model) == {'.roi_head': 2}
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        assert loader.dataset.metainfo.classes == ('fig', 'date')


def test_also_the_heads_of_a_cascade_of_mmdet():
    model = get_config('mmdet::cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco.py').model
    set_num_classes(model, 7)
    assert counts(model) == {f'.roi_head.bbox_head.{i}': 7 for i in range(3)} | {'.roi_head.mask_head': 7}


def test_backbone_and_proposal_head_keep_theirs():
    model = ConfigDict(backbone=dict(num_classes=1000), rpn_head=dict(num_classes=1), head=dict(num_classes=80))
    set_num_classes(model, 3)
    assert counts(model) == {'.backbone': 1000, '.rpn_head': 1, '.head': 3}


def others(model):
    return {path: count for path, count in counts(model).items() if count != 7}


@pytest.mark.parametrize(
    'config, stay',
    [
        ('mmseg::stdc/stdc1_4xb12-80k_cityscapes-512x1024.py', {'.auxiliary_head.2': 2}),
        ('mmseg::stdc/stdc1_in1k-pre_4xb12-80k_cityscapes-512x1024.py', {'.auxiliary_head.2': 2}),
        ('mmseg::knet/knet-s3_r50-d8_upernet_8xb2-adamw-80k_ade20k-512x512.py', {}),
        ('mmseg::point_rend/pointrend_r50_4xb2-80k_cityscapes-512x1024.py', {}),
        ('mmdet::htc/htc_r50_fpn_1x_coco.py', {'.roi_head.semantic_head': 183}),
        ('mmdet::scnet/scnet_r50_fpn_1x_coco.py', {'.roi_head.semantic_head': 183}),
        ('mmdet::seesaw_loss/mask-rcnn_r50_fpn_seesaw-loss_random-ms-2x_lvis-v1.py', {}),
        ('mmdet::seesaw_loss/cascade-mask-rcnn_r101_fpn_seesaw-loss_random-ms-2x_lvis-v1.py', {}),
        ('mmdet::faster_rcnn/faster-rcnn_r50_fpn_fcos-rpn_1x_coco.py', {'.rpn_head': 1}),
        ('mmdet::ms_rcnn/ms-rcnn_r50_fpn_1x_coco.py', {}),
        ('mmdet::lad/lad_r50-paa-r101_fpn_2xb8_coco_1x.py', {}),
        ('mmdet::strongsort/strongsort_yolox_x_8xb4-80e_crowdhuman-mot20train_test-mot20test.py', {'.reid.head': 380}),
    ],
)
def test_counts_of_other_things_stay_in_the_hosts_models(tmp_path, config, stay):
    (tmp_path / 'c.py').write_text(f"_base_ = '{config}'")
    model = Config.fromfile(tmp_path / 'c.py', import_custom_modules=False).model
    assert counts(model)
    set_num_classes(model, 7)
    assert others(model) == stay


def test_a_seesaw_loss_trains_with_the_new_number():
    head = get_config(
        'mmdet::seesaw_loss/mask-rcnn_r50_fpn_seesaw-loss_random-ms-2x_lvis-v1.py'
    ).model.roi_head.bbox_head
    model = ConfigDict(bbox_head=head)
    set_num_classes(model, 7)
    with DefaultScope.overwrite_default_scope('mmdet'):
        built = MODELS.build(model.bbox_head)
    scores, _ = built(torch.randn(5, 256, 7, 7))
    loss = built.loss_cls(scores, torch.tensor([0, 3, 6, 7, 7]))
    assert all(torch.isfinite(value) for value in loss.values())
    model.bbox_head.update(num_classes=80)
    model.bbox_head.loss_cls.num_classes = 1203  # not its head's: it does not follow
    set_num_classes(model, 7)
    assert (model.bbox_head.num_classes, model.bbox_head.loss_cls.num_classes) == (7, 1203)


def test_a_panoptic_head_without_stuff_counts_things_and_one_with_stuff_is_refused():
    model = get_config('mmdet::mask2former/mask2former_r50_8xb2-lsj-50e_coco.py').model
    set_num_classes(model, 7)
    for head in (model.panoptic_head, model.panoptic_fusion_head):
        assert (head.num_things_classes, head.num_stuff_classes) == (7, 0)
    assert model.panoptic_head.loss_cls.class_weight == [1.0] * 7 + [0.1]
    with DefaultScope.overwrite_default_scope('mmdet'):
        model.panoptic_head.update(train_cfg=None, test_cfg=None)
        assert MODELS.build(model.panoptic_head).cls_embed.out_features == 8
    for name in ('panoptic_fpn/panoptic-fpn_r50_fpn_1x_coco.py', 'maskformer/maskformer_r50_ms-16xb1-75e_coco.py'):
        model = get_config(f'mmdet::{name}').model
        with pytest.raises(ConfigError, match=r'num_stuff_classes=53, but the data set has objects only: set it to 0'):
            set_num_classes(model, 7)
    left_out = ConfigDict(panoptic_head=dict(type='MaskFormerHead', num_things_classes=80))
    with pytest.raises(ConfigError, match=r'panoptic_head\.num_stuff_classes=None, .* set it to 0'):
        set_num_classes(left_out, 7)


def test_weights_of_classes_follow_if_they_are_alike():
    alike = dict(type='CrossEntropyLoss', class_weight=[1.0] * 19 + [0.1])
    model = ConfigDict(
        decode_head=dict(num_classes=19, loss_decode=[dict(alike), dict(alike, class_weight=[2.0] * 19)])
    )
    set_num_classes(model, 3)
    assert [loss.class_weight for loss in model.decode_head.loss_decode] == [[1.0, 1.0, 1.0, 0.1], [2.0] * 3]
    model = ConfigDict(decode_head=dict(num_classes=2, loss_decode=dict(class_weight=[1.0, 3.0])))
    set_num_classes(model, 2)
    assert model.decode_head.loss_decode.class_weight == [1.0, 3.0]
    with pytest.raises(ConfigError, match=r'model\.decode_head\.loss_decode\.class_weight has a weight for each of 2'):
        set_num_classes(model, 3)


def test_paths_go_to_the_loaders_and_validation_serves_as_test(load_config, files):
    cfg = load_config(FOLDER, **files, skip_bad_images=True)
    train, val, test = (cfg[f'{split}_dataloader'].dataset for split in ('train', 'val', 'test'))
    assert (train.ann_file, train.data_prefix.img) == ('a.json', 'x')
    assert (val.ann_file, val.data_prefix.img) == (test.ann_file, test.data_prefix.img) == ('a.json', 'y')
    assert train.skip_bad_images and test.skip_bad_images
    assert train.data_root == files['data_root']


def test_a_test_split_of_its_own(load_config, files):
    cfg = load_config(FOLDER, **files, test_ann='b.json', test_img='')
    assert (cfg.test_dataloader.dataset.ann_file, cfg.test_dataloader.dataset.data_prefix.img) == ('b.json', '')


def test_what_a_data_set_says_itself_stays(load_config, files):
    cfg = load_config(FOLDER, **files, **{'val_dataloader.dataset.ann_file': 'mine.json'})
    assert cfg.val_dataloader.dataset.ann_file == 'mine.json'
    assert cfg.train_dataloader.dataset.ann_file == 'a.json'


def test_image_size_and_iterations_are_stated_once(load_config, files):
    cfg = load_config(FOLDER, **files, image_size=320, max_iters=70)
    assert cfg.model.backbone.img_size == (320, 320)
    steps = {step.type.split('.')[-1]: step for step in cfg.train_dataloader.dataset.pipeline}
    assert steps['RandomResize'].scale == (533, 320)
    assert steps['RandomCrop'].crop_size == (533, 533)
    assert cfg.test_dataloader.dataset.pipeline[1].scale == (533, 320)
    assert cfg.train_cfg.max_iters == cfg.param_scheduler[-1].end == 70


def test_the_size_of_the_model_follows_the_files_and_not_what_a_config_states_itself(load_config, files, tmp_path):
    assert load_config(FOLDER, **files).model.backbone.img_size == (1024, 1024)
    own = load_config(FOLDER, **files, image_size=320, **{'model.backbone.img_size': 256})
    assert own.model.backbone.img_size == 256
    child = tmp_path / 'child.py'
    child.write_text(f"_base_ = '{load_config(FOLDER, **files).filename}'\nimage_size = 640\n")
    for size, options in ((640, {}), (320, dict(image_size=320))):
        cfg = load_config(child, **files, **options)
        assert cfg.model.backbone.img_size == (size, size)


def test_the_annotations_are_read_once_before_there_is_a_data_set(files, tmp_path, monkeypatch):
    read, paths = annotations.read_json, []
    monkeypatch.setattr(annotations, 'read_json', lambda path, *args: paths.append(path) or read(path, *args))
    child = tmp_path / 'child.py'
    child.write_text(f"_base_ = 'mmvim::{FOLDER}'\nspare = 1\n")  # a key whose reader is looked for
    keys = {**files, 'data_root': str(tmp_path)}
    for _ in range(2):
        with pytest.raises(ConfigError, match="nothing in this config takes its value from 'spare'"):
            read_config(str(child), keys)
    child.write_text(f"_base_ = 'mmvim::{FOLDER}'\n")
    cfg = read_config(str(child), keys)
    complete_config(cfg)
    assert paths.count(str(tmp_path / 'a.json')) == 1 and cfg.model.roi_head.num_classes == 2
    content = json.loads((tmp_path / 'a.json').read_text())
    content['categories'].append(dict(id=4, name='nut'))
    (tmp_path / 'a.json').write_text(json.dumps(content))
    cfg = read_config(str(child), keys)
    complete_config(cfg)
    assert paths.count(str(tmp_path / 'a.json')) == 2 and cfg.model.roi_head.num_classes == 3


def test_completing_twice_changes_nothing(load_config, files):
    cfg = load_config(FOLDER, **files)
    before = cfg.to_dict()
    complete_config(cfg)
    assert cfg.to_dict() == before


def test_given_class_names_and_counts(load_config, files):
    cfg = load_config(FOLDER, **files, classes=['date', 'fig'], num_classes=2)
    assert cfg.val_dataloader.dataset.metainfo == dict(classes=('date', 'fig'))
    assert counts(cfg.model) == {'.roi_head': 2}
    with pytest.raises(ConfigError, match=r'num_classes=5, but the annotation file has 2 classes \(fig, date\)'):
        load_config(FOLDER, **files, num_classes=5)
    with pytest.raises(DataError, match=r"gone\.json' does not exist"):
        load_config(FOLDER, **{**files, 'train_ann': 'gone.json', 'val_ann': 'gone.json'})


LABEL_MAPS = ('vim/upernet_vim-ti_folder.py', 'mambavision/upernet_mambavision-t_folder.py')


@pytest.mark.parametrize('name', LABEL_MAPS)
def test_a_folder_of_label_maps_is_described_in_one_place(load_config, name):
    keys = dict(data_root='d', train_img='i', train_ann='a', val_img='j', val_ann='b', img_suffix='.tif')
    cfg = load_config(name, **keys, classes=['road', 'sky', 'car'], ignore_index=9, image_size=96, max_iters=70)
    loaders = (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader)
    assert [loader.dataset.data_prefix for loader in loaders] == [
        dict(img_path=img, seg_map_path=ann) for img, ann in ('ia', 'jb', 'jb')
    ]
    for loader in loaders:
        dataset = loader.dataset
        assert (dataset.data_root, dataset.img_suffix, dataset.seg_map_suffix) == ('d', '.tif', '.png')
        assert dataset.metainfo.classes == ('road', 'sky', 'car') and not dataset.reduce_zero_label
    assert counts(cfg.model) == {'.decode_head': 3, '.auxiliary_head': 3}
    train, test = cfg.train_dataloader.dataset.pipeline, cfg.test_dataloader.dataset.pipeline
    parts = [cfg.model.decode_head, cfg.model.auxiliary_head, cfg.val_evaluator, cfg.test_evaluator, train[3]]
    parts += [loader.dataset for loader in loaders]
    assert {part.ignore_index for part in parts} == {cfg.model.data_preprocessor.seg_pad_val} == {9}
    assert train[2].scale == test[1].scale == (384, 96)
    assert train[3].crop_size == cfg.model.data_preprocessor['size'] == (96, 96)
    assert cfg.model.backbone.get('img_size', (96, 96)) == (96, 96)
    assert cfg.train_cfg.max_iters == cfg.param_scheduler[-1].end == 70
    assert (cfg.train_pipeline, cfg.test_pipeline) == (train, test)  # where MMSegmentation's inference_model looks
    before = cfg.to_dict()
    complete_config(cfg)
    assert cfg.to_dict() == before


def test_types_may_be_classes(load_config):
    import mmcv
    from mmseg.datasets import BaseSegDataset, transforms
    from mmseg.evaluation import IoUMetric

    keys = dict(data_root='d', classes=['road', 'sky'], ignore_index=9, image_size=96)
    named = load_config(LABEL_MAPS[0], **keys)
    kinds = dict(BaseSegDataset=BaseSegDataset, IoUMetric=IoUMetric, Resize=mmcv.transforms.Resize)
    kinds |= dict(RandomCrop=transforms.RandomCrop, RandomResize=mmcv.transforms.RandomResize)

    def with_classes(part):
        if isinstance(part, list):
            return [with_classes(value) for value in part]
        if not isinstance(part, dict):
            return kinds.get(part, part) if isinstance(part, str) else part
        return {key: with_classes(value) for key, value in part.items()}

    def with_names(part):
        if isinstance(part, list):
            return [with_names(value) for value in part]
        return (
            {key: with_names(value) for key, value in part.items()}
            if isinstance(part, dict)
            else (part.__name__ if isinstance(part, type) else part)
        )

    cfg = Config.fromfile(named.filename)
    cfg = Config(with_classes(cfg.to_dict()) | keys, filename=named.filename)
    assert cfg.train_dataloader.dataset.type is BaseSegDataset
    complete_config(cfg)
    assert with_names(cfg.to_dict()) == named.to_dict()


def test_a_missing_folder_that_the_data_set_downloads_is_no_error(tmp_path):
    gone = str(tmp_path / 'gone')
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        check_data_root(dict(type='CIFAR10', data_root=gone))
        with pytest.raises(DataError, match=f"data folder '{gone}' of ImageNet does not exist: put the data there"):
            check_data_root(dict(type='ImageNet', data_root=gone))


def test_frames_and_crops_of_label_maps(load_config):
    cfg = load_config(LABEL_MAPS[0], classes='road', image_size=(64, 48), crop_size=(32, 40), test_img='t')
    assert cfg.test_dataloader.dataset.data_prefix == dict(img_path='t', seg_map_path='annotations/val')
    train = cfg.train_dataloader.dataset
    assert train.metainfo.classes == ('road',)
    assert train.pipeline[2].scale == (64, 48) and train.pipeline[3].crop_size == (32, 40)
    assert cfg.model.backbone.img_size == cfg.model.data_preprocessor['size'] == (32, 40)
    cfg = load_config(LABEL_MAPS[0], classes=['road', 'sky'], image_size=(64, 48))
    assert cfg.train_dataloader.dataset.pipeline[3].crop_size == cfg.model.backbone.img_size == (48, 64)


def test_label_maps_need_names_for_their_values(load_config):
    with pytest.raises(ConfigError, match=r'no class names: .* --cfg-options classes="\[road,sky\]"'):
        load_config(LABEL_MAPS[0])
    with pytest.raises(ConfigError, match=r'num_classes=5, but classes names 2 classes \(road, sky\)'):
        load_config(LABEL_MAPS[0], classes=['road', 'sky'], num_classes=5)


def test_classes_that_a_data_set_of_label_maps_has_stay_and_so_do_its_heads(load_config):
    own = {f'{split}_dataloader.dataset.metainfo': dict(classes=('a', 'b')) for split in ('train', 'val', 'test')}
    cfg = load_config(LABEL_MAPS[0], classes=['road', 'sky', 'car'], **own, **{'model.decode_head.num_classes': 2})
    assert cfg.val_dataloader.dataset.metainfo.classes == ('a', 'b')
    assert counts(cfg.model) == {'.decode_head': 2, '.auxiliary_head': 150}


def test_other_configs_are_left_alone(load_config):
    cfg = load_config('vim/cascade_mask_rcnn_vim_ti_coco.py')
    assert cfg.train_dataloader.dataset.data_root == 'data/coco/'
    assert counts(cfg.model) == {'.roi_head': 80}
