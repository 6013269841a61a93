"""Tell which model a checkpoint is of, how its weights fit, and which configs are for it.

python tools/verify_checkpoint.py FILE
"""

from _process import start


def main() -> None:
    """Run the tool."""
    start('verify')


if __name__ == '__main__':
    main()
