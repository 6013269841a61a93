"""Translates the statements of a kernel into the instructions of machine.c, and says what it cannot translate."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Mapping
from dataclasses import dataclass

from .ptx import BYTES, Kernel, Statement


class Instruction(ctypes.Structure):
    """As in machine.c."""

    _fields_ = (
        ('op', ctypes.c_uint16),
        *((name, ctypes.c_uint8) for name in ('width', 'count', 'guarded', 'flags')),
        *((name, ctypes.c_uint32) for name in ('guard', 'dst', 'a', 'b', 'c')),
        ('vector', ctypes.c_uint32 * 8),
        ('offset', ctypes.c_int64),
    )


@dataclass
class Operation:
    """What machine.c says of an instruction: its number, and the sizes of result and operands if it is elementwise."""

    number: int
    sizes: tuple[int, ...]


@dataclass
class Program:
    """A kernel as machine.c runs it."""

    kernel: Kernel
    code: ctypes.Array
    statements: list[Statement]  # of each instruction
    register_bytes: int  # of all rows of registers
    constants: bytes  # the rows after them
    specials: dict[str, int]  # rows of %ctaid and %nctaid


# of kinds that only move bits the type does not matter, only its size; an absent one matters
BITS_ONLY = {'mov', 'and', 'or', 'xor', 'not', 'selp', 'shl'}
UNSIGNED_NAMES = {'lo': 'lt', 'ls': 'le', 'hi': 'gt', 'hs': 'ge'}
DEFAULTS = {'rn', 'uni'}  # rounding to nearest; a branch that the compiler knows to be uniform
CACHE_HINTS = re.compile(r'nc$|L1::\w+$|L2::(?!cache_hint)\w+$')
MODES = {'bfly': 0, 'up': 1, 'down': 2, 'idx': 3}
OPERAND = re.compile(r'\{[^}]*\}|\[[^\]]*\]|[^\s,{}\[\]][^,{}\[\]]*')


def normal_type(kind: str, name: str) -> str:
    """A type as operations.h writes it for this kind of instruction."""
    if name == 'pred':
        return 'pred' if kind == 'not' else 'u8'
    if kind in BITS_ONLY and re.fullmatch(r'[busf](16|32|64)', name):
        return 'u' + name[1:]
    return 'u' + name[1:] if re.fullmatch(r'b(16|32|64)', name) and kind in ('setp', 'shr', 'add', 'sub') else name


def operation_name(parts: list[str]) -> str:
    """The name that an instruction has in operations.h."""
    kind = parts[0]
    words = [
        normal_type(kind, UNSIGNED_NAMES.get(p, p) if kind == 'setp' else p) for p in parts[1:] if p not in DEFAULTS
    ]
    return '_'.join([kind, *words])


class Decoder:
    """Translates one kernel. Rows of registers come first, then those of constants."""

    def __init__(self, kernel: Kernel, operations: Mapping[str, Operation]) -> None:
        self.kernel, self.operations, self.threads = kernel, operations, kernel.threads
        self.known: dict[tuple[int | str, int], int] = {}
        self.specials: dict[str, int] = {}
        self.code: list[Instruction] = []
        self.where: list[Statement] = []
        self.labels: dict[str, int] = {}
        self.jumps: list[tuple[int, str]] = []
        self.rows: dict[str, int] = {}
        self.base = 8 * self.threads  # row 0 serves operands that an instruction does not have
        for name, size in (kernel.registers | {'_': 8}).items():  # _ takes what nobody wants
            self.rows[name] = self.base
            self.base += -(-size * self.threads // 8) * 8
        self.constants = bytearray()

    def program(self) -> Program:
        """The kernel, translated.

        Raises:
            NotImplementedError: at a statement that cannot be translated, with kernel and line.
        """
        for statement in self.kernel.statements:
            if statement.text.endswith(':'):
                self.labels[statement.text[:-1]] = len(self.code)
                continue
            try:
                self._decode(statement)
            except (NotImplementedError, KeyError, ValueError, IndexError, TypeError) as error:
                raise NotImplementedError(
                    f'{self.kernel.name}, PTX line {statement.line} ({statement.source}): cannot translate '
                    f'`{statement.text}`: {error!s}'
                ) from error
        for at, label in self.jumps:
            self.code[at].offset = self.labels[label]
        code = (Instruction * len(self.code))(*self.code)
        return Program(self.kernel, code, self.where, self.base, bytes(self.constants), self.specials)

    def _decode(self, statement: Statement) -> None:
        text, guard = statement.text, {}
        if prefix := re.match(r'@(!?)(%\w+)\s+', text):
            guard = {'guarded': 2 if prefix[1] else 1, 'guard': self._register(prefix[2], 1)}
            text = text[prefix.end() :]
        op, _, rest = text.partition(' ')
        parts, args = op.split('.'), [x.strip() for x in OPERAND.findall(rest)]
        before = len(self.code)
        translate = getattr(self, '_' + parts[0], self._elementwise)
        translate(parts, args)
        for instruction in self.code[before:]:
            for name, value in guard.items():
                setattr(instruction, name, value)
            self.where.append(statement)
        if guard and parts[0] in ('bar', 'barrier', 'shfl', 'ldmatrix', 'stmatrix', 'ret'):
            raise NotImplementedError('only some threads would take part in it')

    def _emit(self, name: str, **fields: object) -> None:
        if name not in self.operations:
            raise NotImplementedError(f'no instruction {name} in operations.h')
        vector = fields.pop('vector', ())
        instruction = Instruction(op=self.operations[name].number, **fields)
        instruction.vector[: len(vector)] = vector
        self.code.append(instruction)

    # ---- operands

    def _register(self, name: str, size: int) -> int:
        if self.kernel.registers[name] != size:
            raise NotImplementedError(f'{name} has {self.kernel.registers[name]} bytes, not {size}')
        return self.rows[name]

    def _add_row(self, row: bytes) -> int:
        self.constants += row + bytes(-len(row) % 8)
        return self.base + len(self.constants) - len(row) - (-len(row) % 8)

    def _constant(self, value: int, size: int) -> int:
        value &= (1 << 8 * size) - 1
        if (value, size) not in self.known:
            self.known[value, size] = self._add_row(value.to_bytes(size, 'little') * self.threads)
        return self.known[value, size]

    def _special(self, name: str) -> int:
        kind, _, axis = name.lstrip('%').partition('.')
        if kind in ('ctaid', 'nctaid'):
            if name not in self.specials:
                self.specials[name] = self._add_row(bytes(4 * self.threads))
            return self.specials[name]
        if kind == 'ntid' or (kind == 'tid' and axis != 'x'):
            return self._constant({'ntid': self.threads if axis == 'x' else 1, 'tid': 0}[kind], 4)
        value = {'tid': lambda t: t, 'laneid': lambda t: t % 32, 'warpid': lambda t: t // 32}[kind]
        if (kind, -1) not in self.known:
            self.known[kind, -1] = self._add_row(b''.join(value(t).to_bytes(4, 'little') for t in range(self.threads)))
        return self.known[kind, -1]

    def _operand(self, text: str, size: int) -> int:
        """The row of a register, a special register or a constant of so many bytes."""
        if text in self.rows:
            return self._register(text, size)
        if text.startswith('%'):
            return self._special(text)
        if text == 'global_smem':  # Triton's shared memory begins at 0
            return self._constant(0, size)
        if bits := re.fullmatch(r'0[fd]([0-9A-Fa-f]{8}|[0-9A-Fa-f]{16})', text):
            return self._constant(int(bits[1], 16), size)
        value = int(text.removesuffix('U'), 0)
        return self._constant(int(value != 0) if size == 1 else value, size)

    def _address(self, text: str, size: int) -> dict[str, int]:
        base, sign, offset = re.fullmatch(r'\[\s*([%\w]+)\s*(?:([+-])\s*(-?\d+))?\s*\]', text).groups()
        return {'a': self._operand(base, size), 'offset': int(offset or 0) * (-1 if sign == '-' else 1)}

    def _vector(self, text: str, size: int, store: bool) -> list[int]:
        names = [x.strip() for x in text.strip('{}').split(',')]
        return [self._operand(x, size) if store else self._result(x, size) for x in names]

    def _result(self, name: str, size: int) -> int:
        return self.rows['_'] if name == '_' else self._register(name, size)

    # ---- instructions

    def _elementwise(self, parts: list[str], args: list[str]) -> None:
        name = operation_name(parts)
        if name not in self.operations or not self.operations[name].sizes:
            raise NotImplementedError(f'no elementwise instruction {name} in operations.h')
        result, *sizes = self.operations[name].sizes
        rows = {key: self._operand(x, size) for key, x, size in zip('abc', args[1:], sizes, strict=False)}
        if len(args) > 4:
            raise NotImplementedError(f'{len(args)} operands')
        self._emit(name, width=result, dst=self._result(args[0], result), **rows)

    def _mov(self, parts: list[str], args: list[str]) -> None:
        if '{' not in ''.join(args):
            return self._elementwise(parts, args)
        size = BYTES[parts[1][1:]]
        whole, halves = (args[0], args[1]) if '{' in args[1] else (args[1], args[0])
        halves = [x.strip() for x in halves.strip('{}').split(',')]
        if len(halves) != 2:
            raise NotImplementedError(f'{len(halves)} parts of a register')
        if whole == args[0]:
            rows = dict(zip('ab', (self._operand(x, size // 2) for x in halves), strict=True))
            return self._emit(f'join_u{8 * size}', width=size, dst=self._result(whole, size), **rows)
        for name, x in zip(('low', 'high'), halves, strict=True):
            if x != '_':
                row, dst = self._operand(whole, size), self._result(x, size // 2)
                self._emit(f'{name}_u{8 * size}', width=size // 2, dst=dst, a=row)

    def _setp(self, parts: list[str], args: list[str]) -> None:
        if len(parts) == 3 and len(args) == 3 and '|' not in args[0]:
            return self._elementwise(parts, args)
        if len(parts) != 4 or len(args) != 4 or parts[2] not in ('and', 'or', 'xor') or '|' in args[0]:
            raise NotImplementedError('this form of setp')
        third = self._operand(args[3], 1)
        if args[3] == args[0]:  # the comparison must not overwrite it
            raise NotImplementedError('setp with its own result as an operand')
        self._elementwise([parts[0], parts[1], parts[3]], args[:3])
        dst = self._result(args[0], 1)
        self._emit(f'{parts[2]}_u8', width=1, dst=dst, a=dst, b=third)

    def _bra(self, parts: list[str], args: list[str]) -> None:
        self.jumps.append((len(self.code), args[0]))
        self._emit('bra')

    def _ret(self, parts: list[str], args: list[str]) -> None:
        self._emit('ret')

    def _bar(self, parts: list[str], args: list[str]) -> None:
        if parts[1:] == ['warp', 'sync'] and int(args[0], 0) & 0xFFFFFFFF == 0xFFFFFFFF:
            return self._emit('bar_warp_sync')
        if parts[1:] != ['sync'] or (len(args) > 1 and int(args[1], 0) != self.threads):
            raise NotImplementedError('a barrier of some of the threads')
        self._emit('bar_sync')

    _barrier = _bar

    def _memory(self, parts: list[str], args: list[str]) -> None:
        kind, *words, kind_of_value = parts
        words = [w.removesuffix('::cta') for w in words if not CACHE_HINTS.match(w)]
        count = next((int(w[1:]) for w in words if re.fullmatch(r'v\d', w)), 1)
        space = [w for w in words if not re.fullmatch(r'v\d', w)]
        if space not in (['param'], ['global'], ['shared']) or len(args) != 2:
            raise NotImplementedError('this form of access to memory')
        size, store = BYTES[kind_of_value[1:]], kind == 'st'
        address, value = args if store else args[::-1]
        if space == ['param']:
            index = int(re.search(r'_param_(\d+)\]', address)[1])
            if size != self.kernel.params[index]:
                raise NotImplementedError(f'the parameter has {self.kernel.params[index]} bytes')
            held = self.kernel.registers[value]  # a narrower parameter is extended
            extended = {
                'dst': self._result(value, held),
                'width': held,
                'flags': size if kind_of_value[0] == 's' else 0,
            }
            return self._emit('ld_param', offset=index, **extended)
        if space == ['global'] and size == 1:
            raise NotImplementedError('races are checked for values of 2 bytes and more')
        vector = self._vector(value, size, store)
        if len(vector) != count:
            raise NotImplementedError(f'{len(vector)} registers')
        where = self._address(address, 8 if space == ['global'] else 4)
        self._emit(f'{kind}_{space[0]}', width=size, count=count, vector=vector, **where)

    _ld = _st = _memory

    def _matrix(self, parts: list[str], args: list[str]) -> None:
        kind, *words = parts
        count = next((int(w[1]) for w in words if re.fullmatch(r'x[124]', w)), 0)
        known = {'sync', 'aligned', 'm8n8', f'x{count}', 'trans', 'shared', 'shared::cta', 'b16'}
        if not count or set(words) - known:
            raise NotImplementedError(f'modifiers {sorted(set(words) - known)}')
        address, value = args if kind == 'stmatrix' else args[::-1]
        vector = self._vector(value, 4, kind == 'stmatrix')
        self._emit(kind, count=count, flags='trans' in words, vector=vector, **self._address(address, 4))

    _ldmatrix = _stmatrix = _matrix

    def _shfl(self, parts: list[str], args: list[str]) -> None:
        if parts[1] != 'sync' or parts[3:] != ['b32'] or int(args[4], 0) & 0xFFFFFFFF != 0xFFFFFFFF:
            raise NotImplementedError('a shuffle of some of the lanes')
        to, *inside = args[0].split('|')
        vector = [self._result(inside[0], 1)] if inside else []
        a, b, c = (self._operand(x, 4) for x in args[1:4])
        self._emit('shfl', flags=MODES[parts[2]], dst=self._result(to, 4), a=a, b=b, c=c, vector=vector)
