"""Parameters and floating-point operations of a model, by part and by kind of operator.

python tools/get_flops.py configs/vim/vim-ti_8xb128_in1k.py --sizes 224 512 1024
"""

from _process import start


def main() -> None:
    """Run the tool."""
    start('flops')


if __name__ == '__main__':
    main()
