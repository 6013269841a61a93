"""Test a trained detector, segmentor or classifier.

python tools/test.py configs/demo/cascade_mask_rcnn_vim_ti_shapes.py work_dirs/cascade_mask_rcnn_vim_ti_shapes
"""

from _process import start


def main() -> None:
    """Run the tool."""
    start('test')


if __name__ == '__main__':
    main()
