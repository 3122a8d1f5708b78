"""Read what the compiler made of a kernel: registers, spills, shared memory, machine code.

    built = launch.compile("sm_90")         # tests/support/launches.py
    resources(built)                        # Resources(registers=..., stack=..., spills=..., shared=...)
    resident(built)                         # programs that an SM holds at once
    in_flight(built)                        # bytes that their loads have on the way at once
    count(built, "LDG.E.128")
"""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pytest
import triton

NVIDIA = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
AMD = ("gfx942",)
TARGETS = (*NVIDIA, *AMD)


class Multiprocessor(NamedTuple):
    """What an SM (NVIDIA) or a compute unit (AMD) has for the programs that it holds at once.

    Sources: CUDA C++ Programming Guide, technical specifications by compute capability; AMD Instinct MI300 ISA;
    the vendors' data sheets for bandwidth.
    """

    registers: int  # of 32 bits
    warps: int
    programs: int
    shared: int  # bytes
    reserved: int  # bytes of shared memory that each program takes beside its own
    bandwidth: float  # bytes of memory a second that come to one of them


MULTIPROCESSORS = {
    "sm_80": Multiprocessor(65536, 64, 32, 164 * 1024, 1024, 2.04e12 / 108),  # A100 80 GB
    "sm_86": Multiprocessor(65536, 48, 16, 100 * 1024, 1024, 0.94e12 / 82),  # RTX 3090
    "sm_89": Multiprocessor(65536, 48, 24, 100 * 1024, 1024, 1.01e12 / 128),  # RTX 4090
    "sm_90": Multiprocessor(65536, 64, 32, 228 * 1024, 1024, 3.35e12 / 132),  # H100 SXM
    "sm_100": Multiprocessor(65536, 64, 32, 228 * 1024, 1024, 8.0e12 / 148),  # B200
    "sm_120": Multiprocessor(65536, 48, 24, 100 * 1024, 1024, 1.79e12 / 170),  # RTX 5090
    "gfx942": Multiprocessor(4 * 512 * 64, 32, 32, 64 * 1024, 0, 5.3e12 / 304),  # MI300X
}
LATENCY = 0.7e-6  # seconds from a load to its data, on a busy GPU: assumed, until it was measured on one


@dataclass(frozen=True)
class Resources:
    """Registers of a thread; bytes of its stack; accesses of memory for want of registers; bytes of shared memory."""

    registers: int
    stack: int
    spills: int
    shared: int


def resources(built) -> Resources:
    shared = built.metadata.shared
    if "cubin" not in built.asm:
        found = {key: int(value) for key, value in re.findall(
            r"\.(vgpr_count|vgpr_spill_count|private_segment_fixed_size):\s*(\d+)", built.asm["amdgcn"])}
        return Resources(found["vgpr_count"], found["private_segment_fixed_size"], found["vgpr_spill_count"], shared)
    usage = _tool("cuobjdump", built, "-res-usage")
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    spills = len(re.findall(r"\b(?:LDL|STL)\b", sass(built)))
    return Resources(found["REG"], found["STACK"] + found["LOCAL"], spills, shared)


def spill_free(built) -> bool:
    """No stack (on AMD: no scratch), and no access of it."""
    found = resources(built)
    return found.stack == found.spills == 0


def unit_of(built) -> Multiprocessor:
    target = built.metadata.target
    return MULTIPROCESSORS[target.arch if target.backend == "hip" else f"sm_{target.arch}"]


def resident(built, shared: bool = True) -> int:
    """How many programs an SM or compute unit holds at once; not `shared`: if they took no shared memory."""
    unit, used, warps = unit_of(built), resources(built), built.metadata.num_warps
    of_warp = -(-used.registers // 8) * 8 * built.metadata.target.warp_size
    held = min(unit.registers // of_warp // 4 * 4, unit.warps)  # four schedulers have a quarter each
    room = unit.shared // (used.shared + unit.reserved) if shared and used.shared else unit.programs
    return min(held // warps, unit.programs, room)


def in_flight(built) -> int:
    """Bytes of data that an SM's programs ask for before they wait, at least (NVIDIA).

    Of each thread, what it loads ahead of the first instruction that takes a loaded value. Loads of data are
    those of 16 bytes and those under a mask; the others read tables.
    """
    asked, waiting = 0, set()
    for _, predicate, op, operands in lines(sass(built)):
        registers = [{int(at), int(at) + bool(pair)} for at, pair in re.findall(r"\bR(\d+)(\.64)?", operands)]
        load = op.startswith("LDG")
        if waiting & set().union(*registers[load:]):
            break
        if load and (".128" in op or predicate):
            size = next((size for name, size in SIZES.items() if name in op), 4)
            first = min(registers[0])
            waiting |= set(range(first, first + max(1, size // 4)))
            asked += size
    return asked * built.metadata.num_warps * 32 * resident(built)


SIZES = {".128": 16, ".64": 8, ".U16": 2, ".S16": 2, ".U8": 1, ".S8": 1}  # bytes of an access; without any, 4


def needed(built) -> float:
    """Bytes that an SM must have on the way at once to use all of the memory's bandwidth (Little's law)."""
    return unit_of(built).bandwidth * LATENCY


def sass(built) -> str:
    """The machine code of an NVIDIA build."""
    return _tool("cuobjdump", built, "-sass")


def count(built, opcode: str) -> int:
    """How many instructions of `sass(built)` begin with `opcode`."""
    return len(re.findall(rf"\b{re.escape(opcode)}\b", sass(built)))


def fast_path(built, op: str = "", times: int = 0) -> list[str]:
    """Opcodes on the shortest way from entry to exit: what runs where every branch is cheap.

    An EXIT under a predicate ends the way only if there are loads of 16 bytes, or barriers, ahead of it and behind it:
    all threads take it together, or the others read again. Any other may be of the lanes that have nothing to store.

    Args:
        op, times: the way goes through a loop, as often as it takes for `times` instructions whose opcodes begin with
            `op` on all of the way: however the compiler unrolled it, or took rounds out of it. By default, the way
            enters no loop.

    Raises:
        ValueError: no such way.
    """
    opcodes, after = _instructions(sass(built))
    loops = _loops(after)
    came = _came(after, 0, set() if op else set().union(*loops))
    works = [{i for i, name in enumerate(opcodes) if is_(name)} for is_ in (_is_wide_load, _is_barrier)]
    for i in came:
        way = _way(came, i) if END in after[i] or opcodes[i] == "EXIT" else []
        if way and (END in after[i] or any(kind & set(way) and kind & _came(after, i, set()).keys() for kind in works)):
            return [opcodes[j] for j in way] + (_rounds(way, loops, opcodes, after, op, times) if op else [])
    raise ValueError("every way to the end goes through a loop")


def _rounds(way: list[int], loops: list[set[int]], opcodes: list[str], after: list[set[int]], op: str,
            times: int) -> list[str]:
    """Opcodes of the further rounds of the loop on this way that has `op`, each on the shortest way round."""
    named = {i for i, name in enumerate(opcodes) if name.startswith(op)}
    if len(named & set(way)) == times:
        return []
    on_way = [loop for loop in loops if loop & named & set(way)]
    if len(on_way) != 1:
        raise ValueError(f"{len(on_way)} loops on the shortest way to the end have {op}; expected one")
    (loop,) = on_way
    came = _came([targets & loop for targets in after], head := next(i for i in way if i in loop), set())
    once = _way(came, next(i for i in came if head in after[i]))
    rounds, rest = divmod(times - len(named & set(way)), len(named & set(once)))
    if rounds < 0 or rest:
        raise ValueError(f"{times} {op}: {len(named & set(way))} are on the way, {len(named & set(once))} in a round")
    return rounds * [opcodes[i] for i in once]


def loop_path(built) -> list[str]:
    """Opcodes on the shortest way once round the longest loop that loads 16 bytes and enters no loop inside it."""
    opcodes, after = _instructions(sass(built))
    loop = max(_loops(after), key=len, default=set())
    heads = {j for i, targets in enumerate(after) if i not in loop for j in targets & loop}
    if len(heads) != 1:
        raise ValueError(f"the longest loop begins at {len(heads)} places; expected one")
    (head,), n = heads, len(after)
    body = [targets & loop - {head} if i in loop else set() for i, targets in enumerate(after)]
    inner = set().union(*_loops(body))
    # Each instruction twice: ahead of the first load of 16 bytes, and behind it.
    stays = [targets & loop - inner for targets in after]
    twice = [{j + n * _is_wide_load(op) for j in targets} for op, targets in zip(opcodes, stays, strict=True)]
    twice += [{j + n for j in targets} for targets in stays]
    came = _came(twice, head, set())
    if head + n not in came:
        raise ValueError("no way round the longest loop loads 16 bytes at a time and enters no loop inside it")
    return [opcodes[i % n] for i in _way(came, head + n)[:-1]]


def _is_wide_load(opcode: str) -> bool:
    return opcode.startswith("LDG") and ".128" in opcode


def _is_barrier(opcode: str) -> bool:
    return opcode.startswith("BAR.")


def _came(after: list[set[int]], start: int, avoided: set[int]) -> dict[int, int | None]:
    """Of all that a way from `start` reaches: what is before it on the shortest way, the nearest first."""
    came, queue = {start: None}, [start]
    for i in queue:
        for j in sorted(after[i] - came.keys() - avoided - {END}):
            came[j] = i
            queue.append(j)
    return came


def _way(came: dict[int, int | None], to: int) -> list[int]:
    way = [to]
    while came[way[-1]] is not None:
        way.append(came[way[-1]])
    return way[::-1]


def _loops(after: list[set[int]]) -> list[set[int]]:
    """The outermost loops: instructions that are reached from one another (Kosaraju's algorithm)."""
    order, seen, before = [], set(), [set() for _ in after]
    for i, targets in enumerate(after):
        for j in targets - {END}:
            before[j].add(i)
    for start in range(len(after)):
        stack = [] if start in seen else [(start, iter(after[start]))]
        seen.add(start)
        while stack:
            i, targets = stack[-1]
            if (j := next((j for j in targets if j != END and j not in seen), None)) is None:
                order.append(stack.pop()[0])
            else:
                seen.add(j)
                stack.append((j, iter(after[j])))
    loops, done = [], set()
    for i in reversed(order):
        if i not in done:
            loops.append(set(_came(before, i, done)))
            done |= loops[-1]
    return [loop for loop in loops if len(loop) > 1 or loop & after[min(loop)]]


END = 1 << 30


def lines(code: str) -> list[tuple[int, str, str, str]]:
    """Address, predicate, opcode and operands of every instruction."""
    return [(int(at, 16), predicate, op, operands) for at, predicate, op, operands in re.findall(
        r"/\*([0-9a-f]{4,5})\*/\s+(@!?U?P\w+\s+)?([A-Z0-9_.]+)([^;]*);", code)]


def _instructions(code: str) -> tuple[list[str], list[set[int]]]:
    """Opcodes, and of each instruction those that may come next; END after the whole warp's exit."""
    found = lines(code)
    place = {at: i for i, (at, *_) in enumerate(found)}
    after = []
    for i, (_, predicate, op, operands) in enumerate(found):
        # BRA.DIV is for threads that have parted. Before sm_90 loops are left by a CALL that counts no call; no way
        # goes through a function's RET, whose end is in a register.
        branch = op in ("BRA", "BRA.U", "CALL.REL.NOINC")
        jump = {place[int(re.search(r"0x([0-9a-f]+)", operands)[1], 16)]} if branch else set()
        jump |= {END} if op == "EXIT" and not predicate else set()
        sure = (jump or op.startswith("RET")) and not predicate and not re.match(r"\s*!?U?P\d", operands)
        after.append(jump | (set() if sure or i + 1 == len(found) else {i + 1}))
    return [op for _, _, op, _ in found], after


def unsafe_products(built) -> list[str]:
    """32-bit products of two values that are both unknown to the compiler: an offset may overflow in them."""
    found, known = [], set(re.findall(r"(%\S+) = arith\.constant", built.asm["ttir"]))
    for line in built.asm["ttir"].splitlines():
        if match := re.search(r"= arith\.muli (%\S+), (%[^\s,:]+).*: (?:tensor<[0-9x]*)?i32\b", line):
            if not known & set(match.groups()):
                found.append(line.strip())
    return found


def only_divides(line: str, built) -> bool:
    """All that is done with the value that a line of TTIR defines: others are divided by it."""
    ttir, name = built.asm["ttir"], line.split()[0]
    behind = ttir[ttir.index(line) + len(line):]
    uses = [use.strip() for use in behind.splitlines() if re.search(rf"{name}\b", use)]
    return all(only_divides(use, built) if "tt.splat" in use else re.search(rf"arith\.(div|rem)si %\w+, {name} :", use)
               for use in uses)


def _tool(name: str, built, flag: str) -> str:
    return _tool_output(name, bytes(built.asm["cubin"]), flag)


@functools.cache
def _tool_output(name: str, cubin: bytes, flag: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        return subprocess.run([tool_path(name), flag, str(path)], check=True, capture_output=True, text=True).stdout


def tool_path(name: str) -> str:
    """One of NVIDIA's binary tools: the Triton wheel ships them; skips the test where none is found."""
    shipped = sorted(Path(triton.__file__).parent.glob(f"backends/nvidia/**/{name}"))
    found = str(shipped[0]) if shipped else shutil.which(name)
    if not found:
        pytest.skip(f"{name} is neither in the Triton wheel nor on the PATH")
    return found
