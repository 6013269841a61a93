"""Runs scripts in forks of a process that has loaded what is slow to import and none of the OpenMMLab packages.

Each line on standard input is a request in JSON: the script with its arguments, the folder to run it in, its
environment, and the files for its standard input, output and errors. The answer is a line with its exit status.
"""

import atexit
import contextlib
import importlib
import json
import os
import runpy
import signal
import sys
import threading
import traceback
import warnings

LIBRARIES = (
    'cv2',
    'imgaug',
    'matplotlib.pyplot',
    'numba',
    'scipy.stats',
    'torch.distributed.fsdp',
    'torchvision',
)


def run(request: dict) -> None:
    """Be the script, in the fork."""
    for target, path, flags in zip((0, 1, 2), request['files'], (os.O_RDONLY, os.O_WRONLY, os.O_WRONLY), strict=True):
        os.dup2(os.open(path, flags), target)
    os.environ.clear()
    os.environ.update(request['environment'])
    os.chdir(request['folder'])
    sys.argv = request['command']
    sys.path[0] = os.path.dirname(sys.argv[0])
    status = 0
    try:
        runpy.run_path(sys.argv[0], run_name='__main__')
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        status = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def main() -> None:
    """Answer requests until standard input ends."""
    warnings.simplefilter('ignore')
    answers = os.fdopen(os.dup(1), 'w')
    os.dup2(2, 1)  # nothing that a library prints is an answer
    for name in LIBRARIES:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    for line in sys.stdin:
        child = os.fork()
        if not child:
            signal.alarm(300)
            run(json.loads(line))
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), file=answers, flush=True)


if __name__ == '__main__':
    main()
