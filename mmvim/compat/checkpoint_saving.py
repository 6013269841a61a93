"""mmengine replaces checkpoints so that a process killed at any moment leaves a complete one.

mmengine 0.10.12 writes files in place, deletes the old checkpoint before it writes the new one, and then empties
`last_checkpoint` to fill it again.
"""

import os
from types import ModuleType
from typing import Any

from mmvim.compat.import_hook import replace_everywhere, when_imported

WRITER = 'mmengine.runner.checkpoint'
HOOK = 'mmengine.hooks.checkpoint_hook'


def save_checkpoints_safely() -> None:
    """Put the functions below in place, whether mmengine's runner and hooks are imported already or only later."""
    when_imported(WRITER, _replace_writer)
    when_imported(HOOK, _replace_hook)


def _replace_writer(host: ModuleType) -> None:
    # here and not above, so that `import mmvim` stays light
    from mmengine.fileio import LocalBackend, get_file_backend

    from mmvim.weights.writing import save_atomically

    original = host.save_checkpoint

    def save_checkpoint(
        checkpoint: Any, filename: str, file_client_args: dict | None = None, backend_args: dict | None = None
    ) -> None:
        """mmengine's function, which replaces a local file as a whole."""
        filename = os.fspath(filename)
        local = not filename.startswith('pavi://') and isinstance(
            get_file_backend(filename, backend_args=backend_args), LocalBackend
        )
        if file_client_args is None and local:
            save_atomically(checkpoint, filename)
        else:
            original(checkpoint, filename, file_client_args, backend_args)

    replace_everywhere('save_checkpoint', original, save_checkpoint)


class _DeletingLater:
    """A file backend that keeps in mind what to delete; `finish` does it, but for the files that are in use again."""

    def __init__(self, backend: Any) -> None:
        self.backend = backend
        self.outdated: list[tuple[str, str]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.backend, name)

    def remove(self, path: str) -> None:
        self.outdated.append(('remove', path))

    def rmtree(self, path: str) -> None:
        self.outdated.append(('rmtree', path))

    def finish(self, in_use: set[str | None]) -> None:
        for method, path in self.outdated:
            if path not in in_use:
                getattr(self.backend, method)(path)


def _warn_unless_readable(hook: Any, runner: Any) -> None:
    """Say at the first checkpoint, not when it is needed, that its file will be refused."""
    from mmvim.errors import CheckpointError
    from mmvim.weights.reading import read_checkpoint

    if getattr(hook, 'read_once', False) or not os.path.isfile(hook.last_ckpt):  # remote, or a folder of DeepSpeed
        return
    hook.read_once = True
    try:
        read_checkpoint(hook.last_ckpt, map_location='meta')  # without the tensors
    except CheckpointError as error:
        runner.logger.warning(
            f'neither --resume nor a test will read what this run saves: {str(error).partition("; loading")[0]}; keep '
            'only tensors, numbers and text in the message hub, in meta, and in the states of hooks and schedulers'
        )


def _replace_hook(host: ModuleType) -> None:
    from mmengine.dist import is_main_process
    from mmengine.fileio import LocalBackend, get_file_backend

    from mmvim.weights.writing import remove_unfinished, replacing

    Hook = host.CheckpointHook
    start, save_best = Hook.before_train, Hook._save_best_checkpoint

    def before_train(self: Any, runner: Any) -> None:
        start(self, runner)
        if not is_main_process():
            return
        for folder in {runner.work_dir, self.out_dir}:
            if isinstance(get_file_backend(folder), LocalBackend):
                for name in remove_unfinished(folder):
                    runner.logger.warning(f'removed {name}, which an earlier run in {folder} was killed while writing')

    def save_with_step(self: Any, runner: Any, step: int, meta: dict) -> None:
        """mmengine's function with another order: new checkpoint, `last_checkpoint`, deletion of the old one."""
        backend = self.file_backend
        outdated = []
        if self.max_keep_ckpts > 0 and (not self.keep_ckpt_ids or self.keep_ckpt_ids[-1] != step):
            # the file's own list still has what is to be deleted: a resumed run goes on with that
            runner.message_hub.update_info('keep_ckpt_ids', [*self.keep_ckpt_ids, step])
            if len(self.keep_ckpt_ids) == self.max_keep_ckpts:
                outdated = [backend.join_path(self.out_dir, self.filename_tmpl.format(self.keep_ckpt_ids[0]))]
            self.keep_ckpt_ids.append(step)  # drops its first if it is full
        name = self.filename_tmpl.format(step)
        self.last_ckpt = backend.join_path(self.out_dir, name)
        runner.message_hub.update_info('last_ckpt', self.last_ckpt)
        runner.save_checkpoint(
            self.out_dir,
            name,
            self.file_client_args,
            save_optimizer=self.save_optimizer,
            save_param_scheduler=self.save_param_scheduler,
            meta=meta,
            by_epoch=self.by_epoch,
            backend_args=self.backend_args,
            **self.args,
        )
        if not is_main_process():
            return
        _warn_unless_readable(self, runner)
        with replacing(os.path.join(runner.work_dir, 'last_checkpoint')) as file:
            file.write(os.fspath(self.last_ckpt).encode())
        for path in outdated:
            if backend.isfile(path):
                backend.remove(path)
            elif backend.isdir(path):  # as DeepSpeed saves them
                backend.rmtree(path)

    def save_best_checkpoint(self: Any, runner: Any, metrics: dict) -> None:
        """mmengine's function, which deletes the former best checkpoint when the new one is complete."""
        self.file_backend = later = _DeletingLater(self.file_backend)
        try:
            save_best(self, runner, metrics)
        finally:
            self.file_backend = later.backend
        if is_main_process():
            several = getattr(self, 'best_ckpt_path_dict', {})
            later.finish({getattr(self, 'best_ckpt_path', None), *several.values()})

    Hook.before_train = before_train
    Hook._save_checkpoint_with_step = save_with_step
    Hook._save_best_checkpoint = save_best_checkpoint
