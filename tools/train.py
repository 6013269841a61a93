"""Train a detector, segmentor or classifier.

python tools/train.py configs/demo/cascade_mask_rcnn_vim_ti_shapes.py
"""

from _process import prepare


def main() -> None:
    prepare()
    from mmvim import cli

    cli.run(cli.train, cli.train_parser().parse_args())


if __name__ == '__main__':
    main()
