"""Test a trained detector, segmentor or classifier.

python tools/test.py configs/demo/cascade_mask_rcnn_vim_ti_shapes.py work_dirs/cascade_mask_rcnn_vim_ti_shapes
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

    cli.run(cli.test, cli.test_parser().parse_args())


if __name__ == '__main__':
    main()
