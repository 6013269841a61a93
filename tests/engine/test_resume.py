"""A run that was interrupted ends with the very weights of one that was not, where data and model are not random."""

import shutil

import pytest
import torch
from mmengine.config import Config
from mmengine.model import BaseModel
from torch import nn

from mmvim.engine.runner import Runner
from mmvim.models import VisionMamba


class Classifier(BaseModel):
    def __init__(self):
        super().__init__()
        arch = dict(embed_dims=16, depth=2, d_state=2)
        self.backbone = VisionMamba(arch=arch, img_size=(32, 48), cls_token='head')
        self.head = nn.Linear(16, 3)

    def forward(self, inputs, labels, mode='tensor'):
        scores = self.head(self.backbone(torch.stack(inputs))[-1])
        return dict(loss=nn.functional.cross_entropy(scores, torch.stack(labels)))


def train(work_dir, **settings):
    random = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    images = [dict(inputs=torch.randn(3, 32, 48, generator=random), labels=torch.tensor(i % 3)) for i in range(4)]
    # not in the config, which mmengine prints at every turn
    loader = dict(
        dataset=images,
        sampler=dict(type='DefaultSampler', shuffle=False),
        batch_size=2,
        collate_fn=dict(type='pseudo_collate'),
    )
    config = Config(
        dict(
            work_dir=str(work_dir),
            train_cfg=dict(type='IterBasedTrainLoop', max_iters=4),
            optim_wrapper=dict(
                optimizer=dict(type='AdamW', lr=0.01, weight_decay=0.1),
                constructor='mmvim.LayerDecayOptimWrapperConstructor',
                paramwise_cfg=dict(decay_rate=0.8),
            ),
            param_scheduler=[
                dict(type='LinearLR', begin=0, end=3, by_epoch=False, start_factor=0.1),
                dict(type='CosineAnnealingLR', T_max=6, by_epoch=False),
            ],
            default_hooks=dict(checkpoint=dict(type='CheckpointHook', interval=2, by_epoch=False)),
            custom_hooks=[dict(type='EMAHook', momentum=0.1)],
            experiment_name=f'{work_dir.parent.name}-{work_dir.name}',
        )
    )
    model = Classifier()
    if not settings:
        model.backbone.init_weights()
    Runner(model=model, cfg=config, train_dataloader=loader, log_level='ERROR', **{**config, **settings}).train()
    return torch.load(work_dir / 'iter_4.pth', weights_only=False)


@pytest.mark.parametrize('resume', ['by name', 'the last one'])
def test_a_resumed_run_ends_as_one_without_a_break(tmp_path, resume):
    whole = train(tmp_path / 'whole')
    (tmp_path / 'broken').mkdir()
    file = shutil.copy(tmp_path / 'whole' / 'iter_2.pth', tmp_path / 'broken')
    (tmp_path / 'broken' / 'last_checkpoint').write_text(file)
    half = torch.load(file, weights_only=False)
    resumed = train(tmp_path / 'broken', resume=True, load_from=file if resume == 'by name' else None)
    for key in ('state_dict', 'ema_state_dict'):
        assert resumed[key].keys() == whole[key].keys()
        assert all(torch.equal(resumed[key][name], value) for name, value in whole[key].items()), key
        assert not all(torch.equal(half[key][name], value) for name, value in whole[key].items()), key
    assert resumed['param_schedulers'] == whole['param_schedulers']
    ours, theirs = resumed['optimizer'], whole['optimizer']
    assert ours['param_groups'] == theirs['param_groups']
    for index, state in theirs['state'].items():
        assert state['step'] == 4
        assert all(torch.equal(ours['state'][index][name], value) for name, value in state.items())
