"""Checkpoints carry a digest of what they hold."""

from mmengine.hooks import Hook
from mmengine.runner import Runner

from mmvim.registry import HOOKS
from mmvim.weights.integrity import DIGEST, digest


@HOOKS.register_module()
class DigestHook(Hook):
    """Note the digest of every entry in a checkpoint's meta, which tools/verify_checkpoint.py compares."""

    priority = 'LOWEST'  # after those that exchange the weights, such as a moving average's

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Note it."""
        checkpoint['meta'][DIGEST] = digest(checkpoint)
