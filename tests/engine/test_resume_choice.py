"""`--resume` goes on from the newest checkpoint that is of use, and says which it skipped."""

import os
import pickle
import shutil
import zipfile
from pathlib import Path

import pytest
import torch

from mmvim.engine.resume_choice import check_resumable, newest_checkpoint
from mmvim.errors import CheckpointError
from mmvim.tools.command_line import find_checkpoint
from mmvim.weights.reading import check_intact


def save(path, iteration, epoch=0, **changes):
    content = dict(
        meta=dict(iter=iteration, epoch=epoch),
        state_dict=dict(weight=torch.arange(3000.0)),
        optimizer=dict(state={}, param_groups=[]),
        param_schedulers=[],
    )
    content.update(changes)
    path.parent.mkdir(exist_ok=True)
    torch.save({key: value for key, value in content.items() if value is not None}, path)
    return path


def newest(*folders):
    found, skipped = newest_checkpoint(folders, lambda found: check_resumable(found.path, found.content, True))
    return found and found.path.name, skipped


def truncate(path):
    path.write_bytes(path.read_bytes()[:-500])


def zero_tail(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2] + bytes(len(content) // 2))


def zero_tensor(path):
    content = path.read_bytes()
    path.write_bytes(content[:4000] + bytes(4000) + content[8000:])


def zero_iteration(path):
    number = pickle.dumps(int(path.stem.removeprefix('iter_')), 2)[2:-1]
    path.write_bytes(path.read_bytes().replace(number, number[:1] + bytes(len(number) - 1)))


DAMAGE = dict(
    zero_for_the_iteration=zero_iteration,
    truncated=truncate,
    empty=lambda path: path.write_bytes(b''),
    zeros=lambda path: path.write_bytes(bytes(path.stat().st_size)),
    half_zeros=zero_tail,
    zeros_in_a_tensor=zero_tensor,
    text=lambda path: path.write_text('hello'),
    folder=lambda path: (path.unlink(), path.mkdir()),
    list=lambda path: torch.save([1], path),
    weights_alone=lambda path: save(path, 1000, optimizer=None),
    no_schedulers=lambda path: save(path, 1000, param_schedulers=None),
    no_meta=lambda path: save(path, 1000, meta=None),
    other_meta=lambda path: save(path, 1000, meta='x'),
    text_for_iteration=lambda path: save(path, 1000, meta=dict(iter='1000', epoch=0)),
    list_for_optimiser=lambda path: save(path, 1000, optimizer=[]),
    text_for_seed=lambda path: save(path, 1000, meta=dict(iter=1000, epoch=0, seed='x')),
    list_for_message_hub=lambda path: save(path, 1000, message_hub=[]),
    numbers_for_groups=lambda path: save(path, 1000, optimizer=dict(state={}, param_groups=[1])),
    numbers_for_schedulers=lambda path: save(path, 1000, param_schedulers=[1]),
    dangling_link=lambda path: (path.unlink(), path.symlink_to('gone')),
)


@pytest.mark.parametrize('damage', DAMAGE.values(), ids=DAMAGE)
def test_a_checkpoint_that_is_of_no_use_is_skipped_and_named(tmp_path, damage):
    for iteration in (200, 400, 1000):  # by name 1000 comes first, by time of writing last
        save(tmp_path / f'iter_{iteration}.pth', iteration)
    os.utime(tmp_path / 'iter_200.pth')
    assert newest(tmp_path) == ('iter_1000.pth', [])
    damage(tmp_path / 'iter_1000.pth')
    name, (line,) = newest(tmp_path)
    assert name == 'iter_400.pth'
    assert 'iter_1000.pth' in line and '\n' not in line
    for iteration in (200, 400):
        damage(tmp_path / f'iter_{iteration}.pth')
    with pytest.raises(CheckpointError, match='none of the 3 checkpoints') as error:
        newest(tmp_path)
    assert all(f'iter_{iteration}.pth' in str(error.value) for iteration in (200, 400, 1000))
    assert '\n' not in str(error.value) and 'Move them away' in str(error.value)


def test_what_counts_is_the_iteration_inside(tmp_path):
    save(tmp_path / 'epoch_9.pth', 90, 9)
    save(tmp_path / 'epoch_10.pth', 100, 10)
    save(tmp_path / 'iter_95.pth', 95, 9)
    save(tmp_path / 'best_acc_epoch_10.pth', 100, 10, optimizer=None, param_schedulers=None)
    save(tmp_path / 'epoch_10.pth.17.unfinished', 110, 11)
    assert newest(tmp_path) == ('epoch_10.pth', [])
    save(tmp_path / 'best_acc_epoch_11.pth', 110, 11, optimizer=None, param_schedulers=None)
    name, (line,) = newest(tmp_path)
    assert name == 'epoch_10.pth' and 'best_acc_epoch_11.pth' in line and 'no state of the optimiser' in line


@pytest.mark.parametrize('text', ['', '.', '\n', '\0' * 40, '/another/machine/work/iter_400.pth', 'iter_200.pth', None])
def test_last_checkpoint_is_not_needed(tmp_path, text):
    for iteration in (200, 400):
        save(tmp_path / 'work' / f'iter_{iteration}.pth', iteration)
    if text is not None:
        (tmp_path / 'work' / 'last_checkpoint').write_text(text)
    shutil.move(tmp_path / 'work', tmp_path / 'moved')
    assert newest(tmp_path / 'moved') == ('iter_400.pth', [])


def test_a_copied_work_directory_goes_on_by_itself(tmp_path):
    save(tmp_path / 'work' / 'iter_400.pth', 400)
    (tmp_path / 'work' / 'last_checkpoint').write_text(str(tmp_path / 'work' / 'iter_400.pth'))
    shutil.copytree(tmp_path / 'work', tmp_path / 'copy')
    save(tmp_path / 'work' / 'iter_600.pth', 600)
    found, _ = newest_checkpoint([tmp_path / 'copy'], lambda found: None)
    assert found.path == tmp_path / 'copy' / 'iter_400.pth'


def test_without_checkpoints_it_is_either_a_beginning_or_an_error(tmp_path):
    assert newest(tmp_path) == (None, [])
    (tmp_path / 'last_checkpoint').write_text('')
    assert newest(tmp_path) == (None, [])
    (tmp_path / 'last_checkpoint').write_text(str(tmp_path / 'elsewhere' / 'iter_2.pth'))
    with pytest.raises(CheckpointError, match='which does not exist, and no checkpoint lies beside it'):
        newest(tmp_path)
    save(tmp_path / 'elsewhere' / 'iter_2.pth', 2)
    assert newest(tmp_path) == ('iter_2.pth', [])


def test_another_format_of_torch_is_read(tmp_path):
    content = dict(meta=dict(iter=4, epoch=0), state_dict=dict(a=torch.ones(2)), optimizer={}, param_schedulers=[])
    torch.save(content, tmp_path / 'iter_4.pth', _use_new_zipfile_serialization=False)
    check_intact(tmp_path / 'iter_4.pth')
    assert newest(tmp_path) == ('iter_4.pth', [])


def test_a_file_saved_without_checksums_is_resumed(tmp_path):
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        save(tmp_path / 'iter_4.pth', 4)
    finally:
        torch.serialization.set_crc32_options(before)
    assert newest(tmp_path) == ('iter_4.pth', [])


def test_only_the_newest_of_many_large_files_is_read_as_a_whole(tmp_path, monkeypatch):
    read = []
    testzip = zipfile.ZipFile.testzip
    monkeypatch.setattr(zipfile.ZipFile, 'testzip', lambda file: read.append(Path(file.filename).name) or testzip(file))
    for iteration in range(5):
        save(tmp_path / f'iter_{iteration}.pth', iteration)
    assert newest(tmp_path) == ('iter_4.pth', []) and read == ['iter_4.pth']


def test_what_does_not_say_how_new_it_is_is_named(tmp_path):
    save(tmp_path / 'iter_200.pth', 200)
    save(tmp_path / 'a.pth', 0, meta=dict(iter='x'))
    name, (line,) = newest(tmp_path)
    assert name == 'iter_200.pth' and 'a.pth' in line


def test_a_test_takes_the_newest_of_a_moved_work_directory(tmp_path, capsys):
    for iteration in (200, 400, 1000):
        save(tmp_path / f'iter_{iteration}.pth', iteration, optimizer=None)
    (tmp_path / 'last_checkpoint').write_text('/gone/iter_1000.pth')
    assert find_checkpoint(str(tmp_path)) == str(tmp_path / 'iter_1000.pth')
    truncate(tmp_path / 'iter_1000.pth')
    assert find_checkpoint(str(tmp_path)) == str(tmp_path / 'iter_400.pth')
    assert 'iter_1000.pth' in capsys.readouterr().err
