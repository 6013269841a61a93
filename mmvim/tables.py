"""Tables for the terminal and log files."""

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

RULED = box.Box('\n'.join(['    ', '    ', ' -- ', *['    '] * 5]) + '\n', ascii=True)  # a line below the header only


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Aligned columns of plain text, never wrapped: the first to the left, the others to the right."""
    found = Table(box=RULED, show_edge=False, pad_edge=False)
    for i, name in enumerate(header):
        found.add_column(name, justify='right' if i else 'left', no_wrap=True)
    for row in rows:
        found.add_row(*map(str, row))
    console = Console(width=1000, color_system=None, highlight=False, markup=False, emoji=False)
    with console.capture() as captured:
        console.print(found)
    return captured.get().rstrip()
