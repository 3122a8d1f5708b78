"""`import alps_kernels` costs no more than `import torch` and brings nothing heavy along."""

import subprocess
import sys

import alps_kernels

HEAVY = ("triton", "transformers", "matplotlib", "rich", "typer", "tqdm", "safetensors", "scipy")


def run(code):
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def test_it_imports_nothing_heavy_of_its_own():
    code = f"import sys, alps_kernels; print([m for m in {HEAVY!r} if m in sys.modules])"
    assert run(code).strip() == "[]"


def test_the_names_that_need_torch_need_neither_triton_nor_transformers():
    code = ("import sys, alps_kernels as a; a.HeadSelection, a.HeadLayout, a.find_heads;"
            "print([m for m in ('triton', 'transformers') if m in sys.modules])")
    assert run(code).strip() == "[]"


def test_it_costs_at_most_a_tenth_more_than_torch():
    timed = "import time; t = time.perf_counter(); import {}; print(time.perf_counter() - t)"
    ours, torchs = [], []
    for _ in range(10):  # in turn, and the quickest of each: the cores are shared, the noise only adds
        ours.append(float(run(timed.format("torch, alps_kernels"))))
        torchs.append(float(run(timed.format("torch"))))
        if len(ours) >= 3 and min(ours) <= 1.1 * min(torchs):
            break
    assert min(ours) <= 1.1 * min(torchs), (ours, torchs)


def test_every_public_name_is_there():
    for name in alps_kernels.__all__:
        assert getattr(alps_kernels, name) is not None
    assert set(alps_kernels.__all__) <= set(dir(alps_kernels))
