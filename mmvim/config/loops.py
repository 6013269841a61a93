"""The length of a run, as its config states it."""

from mmvim.compat.types import kind_of
from mmvim.errors import ConfigError

LENGTHS = dict(EpochBasedTrainLoop='max_epochs', IterBasedTrainLoop='max_iters')


def check_length(train_cfg: dict | None) -> None:
    """Refuse a training loop of mmengine whose length is missing, in another unit, or no whole number above 0.

    Raises:
        ConfigError: naming the key.
    """
    if not train_cfg:
        return
    if 'type' in train_cfg and 'by_epoch' in train_cfg:
        raise ConfigError("train_cfg has both 'type' and 'by_epoch', which say the same: leave out by_epoch")
    kind = kind_of(train_cfg)
    if not kind:
        kind = 'EpochBasedTrainLoop' if train_cfg.get('by_epoch', True) else 'IterBasedTrainLoop'
    if kind not in LENGTHS:
        return
    key = LENGTHS[kind]
    for other in set(LENGTHS.values()) - {key}:
        if train_cfg.get(other) is not None:
            raise ConfigError(
                f"train_cfg.{other}={train_cfg[other]} is not for {kind}, which needs {key}: set train_cfg.type='"
                f"{next(loop for loop, length in LENGTHS.items() if length == other)}' or {key} alone, in a config "
                'file with _delete_=True'
            )
    value = train_cfg.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f'train_cfg.{key} must be a whole number of at least 1, got {value!r}')
