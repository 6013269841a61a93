"""Kill training runs with SIGKILL at random moments, resume them, and compare them with unbroken ones.

    python tests/engine/kill_runs.py [--kills 60] [--runs 10] [--seed 0] [--folder FOLDER]

Every run is killed several times, each third time while a file is being written, and then left to end. After each kill
the run must go on at the newest checkpoint that was complete, or at a later one; and its end must be that of the
unbroken run bit for bit. Runs are by iterations and by epochs, and keep 1 or 3 checkpoints. Each is a process of its
own, forked from this one after its imports.
"""

import argparse
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

import small_run
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

KINDS = [(by_epoch, keep) for keep in (1, 3) for by_epoch in (False, True)]
INFINITE = dict(sampler=dict(type='InfiniteSampler'))


@HOOKS.register_module()
class StartHook(Hook):
    """Writes down at which iteration a run starts."""

    def before_train(self, runner):
        Path(runner.work_dir, 'started').write_text(str(runner.iter))


def settings(by_epoch, keep, seed):
    end = 10 if by_epoch else 50
    hook = dict(type='CheckpointHook', interval=1 if by_epoch else 3, by_epoch=by_epoch, max_keep_ckpts=keep)
    return dict(
        by_epoch=by_epoch,
        end=end,
        seed=seed,
        workers=seed % 2,
        sampler=None if by_epoch else INFINITE,
        train_cfg=dict(
            by_epoch=by_epoch, val_interval=2 if by_epoch else 9, **{'max_epochs' if by_epoch else 'max_iters': end}
        ),
        default_hooks=dict(logger=dict(type='LoggerHook', interval=1000), checkpoint=dict(hook, save_best='acc')),
        custom_hooks=[dict(type='EMAHook', momentum=0.1), dict(type='StartHook')],
    )


def start(folder, options):
    """A process that trains, from the newest checkpoint in the folder if there is one."""
    process = os.fork()
    if process == 0:
        status = 1
        try:
            log = os.open(folder.with_suffix('.log'), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            os.setpgid(0, 0)
            small_run.train(folder, **options, resume='auto')
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(status)
    return process


def ended(process):
    """The exit status of a process, None while it runs."""
    done, status = os.waitpid(process, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if done else None


def position(name):
    """Iterations that a checkpoint's name tells of; an epoch has 5."""
    kind, _, number = name.removesuffix('.pth').rpartition('_')
    return int(number) * (5 if kind.endswith('epoch') else 1)


def complete(folder):
    """Iteration of the newest checkpoint that has its name; 0 if there is none."""
    names = [name for name in os.listdir(folder) if name.endswith('.pth') and not name.startswith('best')]
    return max((position(name) for name in names), default=0)


def unfinished(folder):
    return [name for name in os.listdir(folder) if name.endswith('.unfinished')]


def run_until_killed(folder, options, delay, writing):
    """Start a run and kill it. Returns where it began, what was complete and what half-written; None if it ended."""
    (folder / 'started').unlink(missing_ok=True)
    process = start(folder, options)
    while not (folder / 'started').exists() and ended(process) is None:
        time.sleep(0.01)
    begun = time.time()
    while True:
        if ended(process) is not None:
            return None
        late = time.time() - begun > delay
        if late and not writing:
            break
        if late and unfinished(folder):
            break
        if not writing:
            time.sleep(0.002)
    before = complete(folder)
    try:
        os.kill(process, signal.SIGKILL)
    except ProcessLookupError:
        return None
    os.waitpid(process, 0)
    text = (folder / 'started').read_text() if (folder / 'started').exists() else ''
    return int(text or -1), before, unfinished(folder)


def finish(folder, options):
    (folder / 'started').unlink(missing_ok=True)
    process = start(folder, options)
    _, status = os.waitpid(process, 0)
    assert status == 0, folder.with_suffix('.log').read_text()[-3000:]
    return int((folder / 'started').read_text())


def last(folder):
    return max((file for file in folder.glob('*.pth') if 'best' not in file.name), key=lambda file: position(file.name))


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('--kills', type=int, default=60)
    parser.add_argument('--runs', type=int, default=10)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--folder', type=Path)
    args = parser.parse_args()
    chance = random.Random(args.seed)
    root = args.folder or Path(tempfile.mkdtemp(prefix='kill_runs_'))
    warm = small_run.config(root / 'warm', **settings(False, 1, 0))  # imports what a run needs, and runs no kernel
    small_run.Runner.from_cfg(warm).build_train_loop(warm.train_cfg)
    kills = writing = compared = number = 0
    while kills < args.kills or compared < args.runs:
        by_epoch, keep = KINDS[number % len(KINDS)]
        options = settings(by_epoch, keep, seed=args.seed * 1000 + number)
        folder = root / f'run_{number}'
        folder.mkdir(parents=True)
        whole = root / f'whole_{number}'
        whole.mkdir()
        finish(whole, options)
        duration = max(file.stat().st_mtime for file in whole.iterdir()) - (whole / 'started').stat().st_mtime
        expected, of_run = 0, 0
        while of_run < -(-args.kills // args.runs) and kills < args.kills:
            killed = run_until_killed(folder, options, chance.uniform(0, duration / 3), writing=kills % 3 == 0)
            if killed is None:
                break
            began, before, half = killed
            assert began < 0 or began >= expected, f'{folder} went on at {began}, {expected} was complete'
            expected = max(before, expected)
            kills, of_run, writing = kills + 1, of_run + 1, writing + bool(half)
            print(f'{folder.name}: began at {began}, killed with {before} complete, writing {half}', flush=True)
        began = finish(folder, options)
        assert began >= expected, f'{folder} went on at {began}, {expected} was complete'
        differ = small_run.differences(last(folder), last(whole))
        assert last(folder).name == last(whole).name and not differ, (folder, differ)
        kept = sorted(file.name for file in folder.glob('*.pth'))
        assert len(kept) == keep + 1, kept
        assert not unfinished(folder)
        compared, number = compared + (of_run > 0), number + 1
        print(f'{folder.name}: by_epoch={by_epoch}, keep {keep}: {of_run} kills, equal to the unbroken run', flush=True)
    print(
        f'{kills} kills, {writing} of them while a file was written: all resumed, nothing complete was lost, '
        f'{compared} runs equal to the unbroken one bit for bit (seed {args.seed})'
    )


if __name__ == '__main__':
    main()
