"""Reads the PTX of one Triton kernel: parameters, registers and instructions, each with its line in PTX and Python."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

BYTES = {'pred': 1, '8': 1, '16': 2, '32': 4, '64': 8}


@dataclass(frozen=True)
class Statement:
    """An instruction, or a label, whose text ends in a colon."""

    text: str
    line: int  # in the PTX
    source: str  # file:line of the Python that it was compiled from, where the compiler says so


@dataclass
class Kernel:
    """The one entry of a PTX module."""

    name: str = ''
    threads: int = 0
    params: list[int] = field(default_factory=list)  # sizes in bytes
    registers: dict[str, int] = field(default_factory=dict)  # name -> bytes, 1 for a predicate
    statements: list[Statement] = field(default_factory=list)


def read_head(ptx: str) -> tuple[Kernel, int]:
    """The kernel without its body, and where the body begins."""
    entries = list(re.finditer(r'\.entry\s+(\S+?)\s*\((.*?)\)(.*?)\{', ptx, re.S))
    if len(entries) != 1:
        raise NotImplementedError(f'a PTX module with {len(entries)} entries; exactly 1 can be run')
    (head,) = entries
    threads = [int(x) for x in re.search(r'\.reqntid\s+([\d, ]+)', head[3])[1].split(',')]
    if any(n != 1 for n in threads[1:]):
        raise NotImplementedError(f'{head[1]}: a block of {threads} threads; only the x dimension can be run')
    params = [BYTES[size] for size in re.findall(r'\.param\s+\.[busf](\d+)', head[2])]
    return Kernel(head[1], threads[0], params), head.end()


def read_register(text: str, registers: dict[str, int]) -> None:
    """Enters what one ``.reg`` declares."""
    kind, names = re.match(r'\.reg\s+\.(\w+)\s+(.*)', text).groups()
    size = BYTES[kind.lstrip('busf') or kind]
    for name in names.split(','):
        many = re.match(r'(.*)<(\d+)>', name.strip())
        registers.update({f'{many[1]}{i}': size for i in range(int(many[2]))} if many else {name.strip(): size})


def parse(ptx: str) -> Kernel:
    """The kernel of a PTX module.

    Raises:
        NotImplementedError: if the module is no single kernel of a one-dimensional block.
    """
    kernel, start = read_head(ptx)
    files = {n: Path(path).name for n, path in re.findall(r'^\s*\.file\s+(\d+)\s+"([^"]*)"', ptx, re.M)}
    first = ptx.count('\n', 0, start) + 1
    depth, source = 1, ''
    for line, row in enumerate(ptx[start:].split('\n'), first):
        rest = row.split('//')[0].strip()
        if place := re.match(r'\.loc\s+(\d+)\s+(\d+)', rest):
            source = f'{files.get(place[1], "?")}:{place[2]}'
        if re.match(r'\.(loc|file|section|pragma)\b', rest):
            continue
        while rest:
            if rest[0] in '{};':  # braces of a vector of registers never begin a statement
                depth += {'{': 1, '}': -1, ';': 0}[rest[0]]
                rest = rest[1:].strip()
            elif label := re.match(r'(\$?[A-Za-z_][\w$]*:)\s*', rest):
                kernel.statements.append(Statement(label[1], line, source))
                rest = rest[label.end() :]
            else:
                text, _, rest = rest.partition(';')
                text, rest = ' '.join(text.split()), rest.strip()
                if text.startswith('.reg'):
                    read_register(text, kernel.registers)
                else:
                    kernel.statements.append(Statement(text, line, source))
            if depth == 0:
                return kernel
    raise NotImplementedError(f'{kernel.name}: the PTX of its body has no end')
