"""Tell which model a checkpoint is of, how its weights fit, and which configs are for it.

python tools/verify_checkpoint.py FILE
"""

import argparse
import os


def hide_gpus() -> None:
    """Obey --device cpu before mmengine looks for a GPU, which it does when it is imported."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument('--device')
    if parser.parse_known_args()[0].device == 'cpu':
        os.environ['CUDA_VISIBLE_DEVICES'] = '-1'


def main() -> None:
    hide_gpus()
    from mmvim import cli
    from mmvim.analysis import verify

    cli.run(verify.verify, verify.parser().parse_args())


if __name__ == '__main__':
    main()
