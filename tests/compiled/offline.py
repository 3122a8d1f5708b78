"""Compile kernels for GPUs that are not here, and read what the compiler made of them.

    built = build(kernel, {"x_ptr": "*fp32", "n": "i64"}, {"BLOCK": 1024}, target="sm_90", aligned=("x_ptr",))
    resources(built)        # Resources(registers=..., stack=..., spills=...)
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

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

NVIDIA = ("sm_80", "sm_86", "sm_90", "sm_100", "sm_120")
TARGETS = (*NVIDIA, "gfx942")


def target_of(name: str) -> GPUTarget:
    return GPUTarget("hip", name, 64) if name.startswith("gfx") else GPUTarget("cuda", int(name[3:]), 32)


def build(kernel, signature: dict[str, str], constexprs: dict, *, target: str = "sm_90",
          aligned: tuple[str, ...] = (), num_warps: int = 4, num_stages: int = 2, fusion: bool = False):
    """The compiled kernel; each variant is compiled once per process.

    Args:
        signature: the Triton type of every argument that is not constexpr ("*bf16", "i64", "fp32").
        constexprs: the value of every constexpr argument.
        aligned: arguments known to be multiples of 16 (pointers: of 16 bytes).
    """
    return _build(kernel, tuple(signature.items()), tuple(constexprs.items()), target, tuple(aligned),
                  num_warps, num_stages, fusion)


@functools.cache
def _build(kernel, signature, constexprs, target, aligned, num_warps, num_stages, fusion):
    names = kernel.arg_names
    types, constants = dict(signature), dict(constexprs)
    if unknown := {*types, *constants} ^ set(names):
        raise TypeError(f"arguments of {kernel.__name__} and those given differ in {sorted(unknown)}")
    full = {name: types.get(name, "constexpr") for name in names}
    attrs = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(kernel, full, {(names.index(k),): v for k, v in constants.items()}, attrs)
    return triton.compile(source, target=target_of(target),
                          options={"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": fusion})


@dataclass(frozen=True)
class Resources:
    registers: int
    stack: int
    local: int


def resources(built) -> Resources:
    """Registers per thread, stack and local memory in bytes, as cuobjdump reports them."""
    text = _tool("cuobjdump", built, "-res-usage")
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return Resources(found["REG"], found["STACK"], found["LOCAL"])


def sass(built) -> str:
    """The machine code of an NVIDIA build."""
    return _tool("cuobjdump", built, "-sass")


def count(built, opcode: str) -> int:
    """How many instructions of `sass(built)` begin with `opcode`."""
    return len(re.findall(rf"\b{re.escape(opcode)}\b", sass(built)))


def fast_path(built) -> list[str]:
    """Opcodes on the shortest way from entry to exit that enters no loop: what runs where every branch is the cheap one."""
    opcodes, after = _instructions(sass(built))
    loops = {target for i, targets in enumerate(after) for target in targets if target <= i and i in _reached(after, {target})}
    came, queue = dict.fromkeys(loops) | {0: None}, [0]
    for i in queue:
        if END in after[i]:
            way = [i]
            while came[way[-1]] is not None:
                way.append(came[way[-1]])
            return [opcodes[j] for j in reversed(way)]
        for j in after[i] - came.keys():
            came[j] = i
            queue.append(j)
    raise ValueError("every way to the end goes through a loop")


END = 1 << 30


def _instructions(code: str) -> tuple[list[str], list[set[int]]]:
    """Opcodes, and of each instruction those that may come next; END after the whole warp's exit."""
    lines = [(int(at, 16), predicate, op, operands) for at, predicate, op, operands in re.findall(
        r"/\*([0-9a-f]{4,5})\*/\s+(@!?U?P\w+\s+)?([A-Z0-9_.]+)([^;]*);", code)]
    place = {at: i for i, (at, *_) in enumerate(lines)}
    after = []
    for i, (_, predicate, op, operands) in enumerate(lines):
        branch = op in ("BRA", "BRA.U")  # BRA.DIV is for threads that have parted
        jump = {place[int(re.search(r"0x([0-9a-f]+)", operands)[1], 16)]} if branch else set()
        jump |= {END} if op == "EXIT" and not predicate else set()
        sure = jump and not predicate and not re.match(r"\s*!?U?P\d", operands)
        after.append(jump | (set() if sure else {i + 1}))
    return [op for _, _, op, _ in lines], after


def _reached(after: list[set[int]], at: set[int]) -> set[int]:
    seen = set()
    while at:
        seen |= at
        at = {j for i in at for j in after[i] if j != END} - seen
    return seen


def unsafe_products(built) -> list[str]:
    """32-bit products of two values that are both unknown to the compiler: an offset may overflow in them."""
    found, known = [], set(re.findall(r"(%\S+) = arith\.constant", built.asm["ttir"]))
    for line in built.asm["ttir"].splitlines():
        if match := re.search(r"= arith\.muli (%\S+), (%[^\s,:]+).*: (?:tensor<[0-9x]*)?i32\b", line):
            if not known & set(match.groups()):
                found.append(line.strip())
    return found


def spill_free(built) -> bool:
    """No local-memory traffic: no stack, no LDL, no STL (NVIDIA); no scratch (AMD)."""
    if "cubin" not in built.asm:
        scratch = re.findall(r"\.private_segment_fixed_size:\s*(\d+)", built.asm["amdgcn"])
        return bool(scratch) and all(size == "0" for size in scratch)
    code = sass(built)
    return resources(built).stack == 0 and not re.search(r"\b(LDL|STL)\b", code)


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
