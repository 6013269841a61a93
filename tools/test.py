"""Test a trained detector, segmentor or classifier.

python tools/test.py configs/demo/cascade_mask_rcnn_vim_ti_shapes.py work_dirs/cascade_mask_rcnn_vim_ti_shapes
"""

from _process import prepare


def main() -> None:
    prepare()
    from mmvim import cli

    cli.run(cli.test, cli.test_parser().parse_args())


if __name__ == '__main__':
    main()
