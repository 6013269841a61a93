"""A run whose losses, gradients or weights are not finite stops before it writes a checkpoint."""

import pytest
import torch
from tiny_training import CLIP, EPOCHS, ITERATIONS, Classifier, build, validation

from mmvim.errors import ConfigError, RunError

VALUE = dict(clip_grad=dict(type='value', clip_value=1.0))
FLOAT16 = dict(type='mmvim.AmpOptimWrapper', dtype='float16', parts=('layers',))


def stops(tmp_path, **settings):
    with pytest.raises(RunError) as raised:
        build(tmp_path, **settings).train()
    text = str(raised.value)
    assert '\n' not in text and 'lower optim_wrapper.optimizer.lr' in text
    files = sorted(tmp_path.glob('*.pth'))
    for file in files:
        state = torch.load(file, weights_only=False)['state_dict']
        assert all(value.isfinite().all() for name, value in state.items() if name != 'mask')
    return text, [file.name for file in files]


@pytest.mark.parametrize('wrapper', [{}, CLIP, VALUE, dict(accumulative_counts=2)])
def test_a_loss_ends_the_run_in_its_iteration(tmp_path, wrapper):
    text, files = stops(tmp_path, model=Classifier('loss'), wrapper=wrapper)
    assert 'loss is nan, loss_cls is nan in iteration 3 (images photos/0.jpg, photos/1.jpg' in text
    assert files == ['iter_1.pth', 'iter_2.pth']


def test_gradients_end_the_run_in_their_iteration_if_clipped(tmp_path):
    text, files = stops(tmp_path, model=Classifier('gradients'))
    assert 'the norm of the gradients is nan in iteration 3 (images photos/0.jpg, photos/1.jpg)' in text
    assert files == ['iter_1.pth', 'iter_2.pth']


def test_gradients_that_nobody_looked_at_end_the_run_with_the_next_loss(tmp_path):
    text, _ = stops(tmp_path, model=Classifier('gradients'), wrapper={}, checkpoint=dict(interval=10))
    assert 'in iteration 4 (images photos/2.jpg, photos/3.jpg; one iteration before photos/0.jpg, photos/1.jpg)' in text


@pytest.mark.parametrize('breaks', ['gradients', 'weights'])
@pytest.mark.parametrize('loop', [ITERATIONS, EPOCHS])
def test_weights_never_replace_good_ones(tmp_path, breaks, loop):
    """With max_keep_ckpts=1 the hook deletes the last file before it writes the next one."""
    by_epoch = loop is EPOCHS
    model = Classifier(breaks, at=4 if by_epoch else 3)
    text, files = stops(tmp_path, model=model, train_cfg=loop, wrapper={}, checkpoint=dict(max_keep_ckpts=1))
    assert f'weights are not finite after iteration {model.at} (head.' in text
    assert files == ['epoch_1.pth' if by_epoch else 'iter_2.pth']


def test_weights_are_looked_at_before_a_validation_and_its_best_checkpoint(tmp_path):
    checkpoint = dict(interval=10, save_best='count', rule='greater', save_last=False)
    loop = dict(ITERATIONS, val_interval=1)
    settings = dict(train_cfg=loop, wrapper={}, checkpoint=checkpoint, **validation())
    text, files = stops(tmp_path, model=Classifier('weights'), **settings)
    assert 'weights are not finite after iteration 3 (head.bias)' in text
    assert files == ['best_count_iter_1.pth']


def test_moving_averages_are_looked_at(tmp_path):
    class Breaks(Classifier):
        def train_step(self, data, optim_wrapper):
            if self.steps == 2:
                ema.ema_model.module.head.weight.data[0, 0] = torch.nan
            return super().train_step(data, optim_wrapper)

    runner = build(tmp_path, model=Breaks(), custom_hooks=[dict(type='EMAHook', momentum=0.1)])
    ema = next(hook for hook in runner.hooks if type(hook).__name__ == 'EMAHook')
    with pytest.raises(RunError, match='state_dict: head.weight'):
        runner.train()
    assert [file.name for file in sorted(tmp_path.glob('*.pth'))] == ['iter_1.pth', 'iter_2.pth']


def test_weights_that_are_broken_from_the_start_are_refused(tmp_path):
    model = Classifier()
    model.head.weight.data[0] = torch.nan
    with pytest.raises(RunError, match=r'not finite before training \(head.weight\): check its initialisation'):
        build(tmp_path, model=model).train()


def test_a_sound_run_ends_and_a_mask_may_be_infinite(tmp_path):
    build(tmp_path).train()
    assert (tmp_path / 'iter_4.pth').is_file()


@pytest.mark.parametrize(
    ('breaks', 'allowed', 'ends'), [('loss', None, True), ('loss', 0, False), ('always', 1, False)]
)
def test_with_loss_scaling_so_many_in_a_row_are_allowed(tmp_path, breaks, allowed, ends):
    model = Classifier(breaks, at=2, layers=lambda: torch.nn.Linear(8, 8))
    hooks = [] if allowed is None else [dict(type='mmvim.FiniteHook', allowed=allowed)]
    settings = dict(model=model, wrapper=FLOAT16, custom_hooks=hooks)
    if ends:
        build(tmp_path, **settings).train()
        assert (tmp_path / 'iter_4.pth').is_file()
    else:
        text, files = stops(tmp_path, **settings)
        assert f'in iteration {2 + allowed} ' in text
        assert len(files) == 1 + allowed


def test_a_loss_scale_that_only_goes_down_ends_the_run(tmp_path):
    class Overflows(Classifier):
        def forward(self, *args, **kwargs):
            losses = super().forward(*args, **kwargs)
            if isinstance(losses, dict):
                self.head.weight.register_hook(lambda gradient: gradient * torch.inf) if self.steps == 1 else None
            return losses

    model = Overflows(layers=lambda: torch.nn.Linear(8, 8))
    text, _ = stops(tmp_path, model=model, wrapper=FLOAT16, train_cfg=dict(ITERATIONS, max_iters=40))
    assert 'the gradients are not finite with a loss scale of ' in text and 'in iteration 21 ' in text


def test_iterations_are_allowed_only_where_their_step_is_skipped(tmp_path):
    with pytest.raises(ConfigError, match='FiniteHook.allowed=3 is for loss scaling'):
        build(tmp_path, custom_hooks=[dict(type='mmvim.FiniteHook', allowed=3)]).train()
