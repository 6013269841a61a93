"""Speed and memory of backbones by resolution.

python tools/benchmark.py vim-tiny deit-tiny --attention both --baseline deit-tiny --out work_dirs/benchmark
"""

from _process import start


def main() -> None:
    """Run the tool."""
    start('benchmark')


if __name__ == '__main__':
    main()
