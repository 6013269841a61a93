"""Which layers of BatchNorm use the statistics of one process; tests/tools/test_processes.py has the real runs."""

from mmengine.model import revert_sync_batchnorm
from torch import nn

from mmvim.engine.batch_norm import per_process


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.GroupNorm(2, 4))
        self.frozen = nn.Sequential(nn.BatchNorm2d(4), nn.SyncBatchNorm(4))
        self.neck, self.head = nn.SyncBatchNorm(4), nn.BatchNorm1d(4)

    def train(self, mode=True):
        super().train(mode)
        self.frozen.eval()
        return self


def test_layers_that_train_are_found_after_synchronised_ones_were_turned_into_plain_ones():
    model = Model().train()
    assert per_process(model) == ['backbone.1', 'head']
    model = revert_sync_batchnorm(model).train()
    assert per_process(model) == ['backbone.1', 'neck', 'head']
    assert per_process(model.eval()) == []
