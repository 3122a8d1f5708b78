"""One H100 in numbers, the arithmetic of a prediction, and the cells that put what was measured beside it.

Of the constants some were measured on such a card, some are read off compiled code, some are datasheet figures, and two
are assumed: each says which.
"""

from __future__ import annotations

from bench.shapes import Shape

# NVIDIA's datasheet figure of an H100 SXM; a device-to-device copy and an 8192^3 bf16 product measured on one.
DATASHEET, COPY, PRODUCTS = 3.35e12, 3.0e12, 798e12
SMALL_PRODUCTS = 590e12  # FLOP/s of 16-bit products of 64 rows on tensor cores: an assumption, not measured
L2 = 5.5e12  # bytes/s that SMs read from L2: an assumption, not measured on the card
SMS, CLOCK, ISSUES = 132, 1.755e9, 4  # datasheet: SMs, Hz, and instructions that an SM issues a clock
THREADS, REGISTERS = 128, 65536  # of a program; of an SM
LAUNCH = 3e-6  # s from one kernel's start to the next one's on an idle stream
FAR = 0.10  # difference from the prediction that wants an explanation
MEASURED = "ms measured | off by | why"
# Why a measured figure is more than FAR from its prediction: by table, model and variant. Empty: nothing was measured.
EXPLAINED: dict[tuple[str, str, str], str] = {}


def resident(registers: int, threads: int = THREADS) -> int:
    """Programs that the card holds at once: registers are given to a warp in units of 256."""
    return SMS * min(2048 // threads, 32, REGISTERS // (-(-registers // 8) * 8 * threads))


def streamed(n_bytes: float, programs: int, registers: int, threads: int = THREADS) -> tuple[float, float]:
    """Seconds of a kernel that reads and writes so many bytes, and how many times its programs fill the card.

    Bytes over the copy bandwidth; half of one filling more, for the last programs run while others have ended; one
    launch.
    """
    waves = programs / resident(registers, threads)
    return n_bytes / COPY * (1 + 0.5 / max(waves, 1)) + LAUNCH, waves


def gpu_row(rows: list[dict[str, str]], rival: str, *parts: str) -> dict[str, str]:
    """The last row of a rival taken on a GPU in a case that says all of `parts`; empty where there is none."""
    found = [row for row in rows if row["rival"] == rival and not row["device"].startswith("CPU")
             and all(part in row["case"] for part in parts) and row["median_ms"]]
    return found[-1] if found else {}


def on_gpu(rows: list[dict[str, str]], rival: str, *parts: str, column: str = "median_ms") -> str:
    """A figure of that row."""
    return gpu_row(rows, rival, *parts).get(column, "")


def compared(ms: float, measured: str, key: tuple[str, str, str]) -> str:
    """The last cells of a row: measured, how far that is from the prediction, and why."""
    if not measured:
        return " |  | "
    off = float(measured) / ms - 1
    why = EXPLAINED.get(key, "not explained yet") if abs(off) > FAR else ""
    return f"{float(measured):.4g} | {off:+.0%} | {why}"


def header(*names: str) -> list[str]:
    columns = " | ".join(names)
    return [f"| {columns} |", "|" + "---|" * (columns.count(" | ") + 1)]


def paragraph(text: str) -> list[str]:
    """One paragraph of a page, whatever the lines of the source."""
    return [" ".join(text.split()), ""]


def whole(shape: Shape) -> str:
    return f"{shape.layers} of {shape.layers} layers"
