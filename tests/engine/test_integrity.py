"""A checkpoint of our own carries a digest, and damage in any region of its file is noticed."""

import random
import zipfile

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer

from mmvim.engine.integrity import DigestHook
from mmvim.errors import CheckpointError
from mmvim.tools import command_line, verify
from mmvim.weights.integrity import DIGEST, damaged_entries, digest
from mmvim.weights.reading import read_checkpoint

SEED = 0


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    """A file with everything that mmengine saves, and what went in."""
    from mmvim.models import VisionMamba

    torch.manual_seed(SEED)
    model = VisionMamba(arch=dict(embed_dims=16, depth=1, d_state=2), img_size=32)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.rand(1, 3, 32, 32))[-1].sum().backward()
    optimizer.step()
    losses = HistoryBuffer([1.0, 2.0], [1, 1])
    checkpoint = dict(
        meta=dict(iter=4, seed=np.int64(3), classes=('a', 'b')),
        state_dict=model.state_dict(),
        message_hub=dict(log_scalars=dict(loss=losses), runtime_info=dict(rate=np.float64(0.1), none=None)),
        optimizer=optimizer.state_dict(),
        param_schedulers=[dict(last_step=3, betas=(0.9, 0.99), flag=True)],
        random_states=dict(numpy=np.arange(5, dtype=np.uint32), python=(3, (1, 2), None)),
    )
    DigestHook().before_save_checkpoint(None, checkpoint)
    path = tmp_path_factory.mktemp('saved') / 'iter_4.pth'
    torch.save(checkpoint, path)
    return path, checkpoint


def test_the_digest_survives_being_saved_in_any_format(saved, tmp_path):
    path, checkpoint = saved
    assert set(checkpoint['meta'][DIGEST]) == set(checkpoint) - {'meta'}
    read = read_checkpoint(path)
    assert damaged_entries(read) == [] and digest(read) == digest(checkpoint)
    torch.save(read, tmp_path / 'legacy.pth', _use_new_zipfile_serialization=False)
    assert damaged_entries(read_checkpoint(tmp_path / 'legacy.pth')) == []
    del read['optimizer']  # as published
    assert damaged_entries(read) == []


CHANGES = {
    'a weight': lambda c: next(iter(c['state_dict'].values())).view(-1)[:1].add_(1e-6),
    'a name': lambda c: c['state_dict'].update(other=c['state_dict'].popitem()[1]),
    'a dtype': lambda c: c['state_dict'].update({name: x.double() for name, x in c['state_dict'].items()}),
    'a shape': lambda c: c['state_dict'].update({name: x[None] for name, x in c['state_dict'].items()}),
    'a moment': lambda c: c['optimizer']['state'][0]['exp_avg'].view(-1)[:1].add_(1),
    'a rate': lambda c: c['optimizer']['param_groups'][0].update(lr=1.0),
    'a number in a log': lambda c: c['message_hub']['log_scalars']['loss'].update(3.0),
    'a schedule': lambda c: c['param_schedulers'][0].update(last_step=4),
    'a random state': lambda c: c['random_states']['numpy'].__setitem__(0, 9),
}


@pytest.mark.parametrize('change', CHANGES)
def test_every_change_is_noticed(saved, change):
    read = read_checkpoint(saved[0])
    CHANGES[change](read)
    assert len(damaged_entries(read)) == 1


def test_a_file_that_holds_itself_ends():
    inner = []
    inner.append(inner)
    assert digest(dict(x=inner, y=dict(z=inner)))


def regions(path):
    """Byte ranges of a zip file by kind: headers, what is in the records, directory."""
    found = {'headers': [], 'weights': [], 'pickle': []}
    with zipfile.ZipFile(path) as archive:
        for record in archive.infolist():
            with path.open('rb') as file:
                file.seek(record.header_offset + 26)
                name, extra = np.frombuffer(file.read(4), '<u2').astype(int)
            start = record.header_offset + 30 + name + extra
            found['headers'].append((record.header_offset, start))
            kind = 'weights' if '/data/' in record.filename else 'pickle'
            found[kind].append((start, start + record.file_size))
        found['directory'] = [(archive.start_dir, path.stat().st_size)]
    return {kind: [r for r in ranges if r[1] > r[0]] for kind, ranges in found.items()}


def intact_or_refused(path, checkpoint):
    """What a damaged file gives: 'refused', 'intact' where the byte means nothing, else fails."""
    try:
        read = read_checkpoint(path)
    except CheckpointError as error:
        assert str(path) in str(error) and '\n' not in str(error)
        return 'refused'
    assert digest(read) == digest(checkpoint)
    return 'intact'


@pytest.mark.parametrize('region', ['headers', 'weights', 'pickle', 'directory'])
def test_flipped_bytes_are_noticed_wherever_they_are(saved, region, tmp_path):
    path, checkpoint = saved
    dice, content, file = random.Random(SEED), path.read_bytes(), tmp_path / 'flipped.pth'
    outcomes = []
    for _ in range(20):
        start, end = dice.choice(regions(path)[region])
        flipped = bytearray(content)
        flipped[dice.randrange(start, end)] ^= 1 << dice.randrange(8)
        file.write_bytes(flipped)
        outcomes.append(intact_or_refused(file, checkpoint))
    if region in ('weights', 'pickle'):
        assert set(outcomes) == {'refused'}


def test_a_file_cut_off_anywhere_is_refused(saved, tmp_path):
    content, file = saved[0].read_bytes(), tmp_path / 'cut.pth'
    for length in (1, 50, 1000, len(content) // 2, len(content) - 1000, len(content) - 22, len(content) - 1):
        file.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match=r'cut\.pth'):
            read_checkpoint(file)


def test_a_file_that_unpacks_to_far_more_is_refused(tmp_path):
    torch.save(dict(x=torch.zeros(10_000_000)), tmp_path / 'plain.pth')
    with zipfile.ZipFile(tmp_path / 'plain.pth') as plain:
        with zipfile.ZipFile(tmp_path / 'bomb.pth', 'w', zipfile.ZIP_DEFLATED) as bomb:
            for name in plain.namelist():
                bomb.writestr(name, plain.read(name))
    with pytest.raises(CheckpointError, match=r'bomb\.pth.*unpacks to more than 100 times its size'):
        read_checkpoint(tmp_path / 'bomb.pth')


def report(capsys, path):
    try:
        command_line.run(verify, [path, '--no-forward'])
        code = 0
    except SystemExit as end:
        code = end.code
    return code, capsys.readouterr()


def test_verify_says_what_it_compared(saved, tmp_path, capsys):
    path, checkpoint = saved
    code, printed = report(capsys, path)
    assert code == 0 and 'checksums of the file are right, the digest of what it holds fits' in printed.out
    old = {**checkpoint, 'meta': dict(iter=4)}
    torch.save(old, tmp_path / 'old.pth')
    code, printed = report(capsys, tmp_path / 'old.pth')
    assert code == 0 and 'checksums of the file are right, it has no digest' in printed.out
    changed = read_checkpoint(path)
    CHANGES['a weight'](changed)
    torch.save(changed, tmp_path / 'changed.pth')
    code, printed = report(capsys, tmp_path / 'changed.pth')
    assert code == 1 and printed.err.startswith('error: ') and 'state_dict differ' in printed.err


def test_a_file_saved_without_checksums_is_read(saved, tmp_path):
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(saved[1], tmp_path / 'plain.pth')
    finally:
        torch.serialization.set_crc32_options(before)
    assert read_checkpoint(tmp_path / 'plain.pth').keys() == saved[1].keys()
