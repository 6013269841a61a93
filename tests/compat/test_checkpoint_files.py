"""Files of weights load the same way before and after a backbone is built, whatever is imported first."""

import json

import pytest

FIRST = {
    'mmvim first': 'import mmvim, mmengine.runner',
    'runner first': 'import mmengine.runner, mmvim',
    'runner by its parts': 'import mmvim\nfrom mmengine.runner.checkpoint import load_checkpoint',
}
FAST = ('mmvim first', 'runner first')
SCRIPT = """
import functools, json, os, sys
import torch
from torch import nn
{first}
from mmengine.runner import load_checkpoint, load_state_dict
from mmengine.runner.checkpoint import CheckpointLoader, _load_checkpoint_with_prefix
from safetensors.torch import save_file

class Odd:
    def __reduce__(self):
        return os.mkdir, ('ran',)

weights = {{'weight': torch.full((2, 2), 3.0), 'bias': torch.ones(2)}}
torch.save(weights, 'plain.pth')
torch.save({{'state_dict': weights, 'meta': dict(epoch=1), 'more': Odd()}}, 'odd.pth')
torch.save({{'state_dict': {{'backbone.' + key: value for key, value in weights.items()}}}}, 'whole.pth')
torch.save(torch.ones(3), 'table.pth')
save_file(weights, 'weights.safetensors')

def outcome(load):
    try:
        return load()
    except Exception as error:
        return type(error).__name__

def into_model(file):
    model = nn.Linear(2, 2)
    load_checkpoint(model, file, strict=True)
    return model.weight.tolist()

def outcomes():
    files = ('plain.pth', 'odd.pth', 'weights.safetensors', 'gone.pth')
    found = {{file: outcome(lambda: into_model(file)) for file in files}}
    found['table.pth'] = CheckpointLoader.load_checkpoint('table.pth').tolist()
    found['prefix'] = sorted(_load_checkpoint_with_prefix('backbone', 'whole.pth'))
    model = nn.Linear(2, 2)
    load_state_dict(model, weights)
    found['load_state_dict'] = model.weight.tolist(), load_state_dict is sys.modules['mmengine.runner'].load_state_dict
    return found

before = outcomes()
from mmvim.registry import MODELS
MODELS.build(dict(type='mmvim.VisionMamba', arch=dict(embed_dims=16, depth=1), img_size=32))
import mmvim.checkpoints, mmvim.compat
mmvim.compat.install()
print(json.dumps([before, outcomes(), os.path.exists('ran')]))
"""
WEIGHT = [[3.0, 3.0], [3.0, 3.0]]


@pytest.mark.parametrize(
    'first', [pytest.param(FIRST[key], id=key, marks=[pytest.mark.slow] * (key not in FAST)) for key in FIRST]
)
def test_a_foreign_checkpoint_does_not_depend_on_the_order_of_imports(run_python, first):
    before, after, ran = json.loads(run_python(SCRIPT.format(first=first)).splitlines()[-1])
    assert before == after and not ran
    assert before == {
        'plain.pth': WEIGHT,
        'odd.pth': 'CheckpointError',
        'weights.safetensors': WEIGHT,
        'gone.pth': 'CheckpointError',
        'table.pth': [1.0, 1.0, 1.0],
        'prefix': ['bias', 'weight'],
        'load_state_dict': [WEIGHT, True],
    }


def test_importing_mmvim_leaves_the_runner_alone_until_it_is_imported(run_python):
    out = run_python(
        """
import sys
import mmvim
assert not [name for name in sys.modules if name.startswith(('mmengine.runner', 'mmvim.weights', 'mmvim.models'))]
import mmengine.runner
from mmengine.runner.checkpoint import CheckpointLoader
print(CheckpointLoader._get_checkpoint_loader('file.pth').__module__)
"""
    )
    assert out.splitlines()[-1] == 'mmvim.weights.reading'
