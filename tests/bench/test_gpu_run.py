"""`make gpu` without a GPU: stages that fail, hang or are refused, a missing compiler. test_gpu_rows.py: its rows."""

import re
import subprocess
import sys
import sysconfig
import time

import pytest
import torch

from bench import gpu
from tests import compat


def stage(name, code, limit=30.0, probe=""):
    return gpu.Stage(name, (sys.executable, "-c", code), limit, {}, (sys.executable, "-c", probe) if probe else ())


# Stages.


def test_a_stage_that_fails_or_hangs_is_recorded_and_the_next_one_runs(tmp_path):
    hangs = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    start = time.perf_counter()
    ends = gpu.Runner(tmp_path, "on a card").run((
        stage("good", "print('hello')"), stage("bad", "raise SystemExit(3)"), stage("hangs", hangs, 5.5),
        gpu.Stage("absent", ("no-such-tool",), 5.0), stage("last", "print('the end')")))
    assert time.perf_counter() - start < 40
    assert ends["good"].startswith("passed") and ends["last"].startswith("passed")
    assert "exit code 3" in ends["bad"] and "stopped after" in ends["hangs"] and "not installed" in ends["absent"]
    assert "hello" in (tmp_path / "gpu-run.log").read_text() and "the end" in (tmp_path / "gpu-run.log").read_text()
    assert gpu.failures(ends) == 2
    assert (tmp_path / "gpu-run.txt").read_text().splitlines() == ["on a card", *(f"{k}: {v}" for k, v in ends.items())]


def test_how_a_stage_ended_is_written_before_the_next_one_starts(tmp_path):
    look = f"print(open({str(tmp_path / 'gpu-run.txt')!r}).read())"
    gpu.Runner(tmp_path, "a card").run((stage("first", "raise SystemExit(7)"), stage("second", look)))
    assert "first: failed with exit code 7" in (tmp_path / "gpu-run.log").read_text()


def test_the_last_stage_keeps_its_time(tmp_path):
    ends = gpu.Runner(tmp_path).run((stage("first", "import time; time.sleep(60)"), stage("second", "pass"),
                                     stage("last", "pass", 20)), whole=26)
    assert "stopped" in ends["first"] and "no time" in ends["second"] and ends["last"].startswith("passed")


def test_a_sanitizer_that_refuses_the_device_is_recorded_with_its_words_and_runs_nothing(tmp_path):
    refuses = "\n".join(["print('========= COMPUTE-SANITIZER')",
                         "print('========= Error: Device not supported. Please refer to the manual')",
                         "raise SystemExit('cuMemAlloc returned error 999')"])
    ran = tmp_path / "ran"
    ends = gpu.Runner(tmp_path).run((stage("memcheck", f"open({str(ran)!r}, 'w')", 30, refuses),
                                     stage("racecheck", f"open({str(ran)!r}, 'w')", 30, "pass")))  # one tool, one probe
    words = "Error: Device not supported. Please refer to the manual"
    assert ends == {name: f"refused by {sys.executable}: {words}" for name in ("memcheck", "racecheck")}
    assert gpu.failures(ends) == 0 and not ran.exists()


def test_a_sanitizer_whose_probe_passes_runs_and_its_findings_fail(tmp_path):
    found = "print('========= Invalid __global__ read'); raise SystemExit(9)"
    refuses = "raise SystemExit('Device not supported')"
    ends = gpu.Runner(tmp_path).run((stage("memcheck", found, 30, "pass"), stage("racecheck", refuses, 30, "pass"),
                                     stage("initcheck", "pass", 30, "raise SystemExit(1)")))
    assert ends["memcheck"].startswith("failed with exit code 9")
    assert ends["racecheck"].startswith("refused by") and ends["racecheck"].endswith(": Device not supported")
    assert ends["initcheck"].startswith("passed")  # the tool's first probe counts
    assert gpu.failures(ends) == 1


def test_a_probe_that_hangs_is_a_refusal(tmp_path):
    ends = gpu.Runner(tmp_path).run((stage("memcheck", "pass", 5.2, "import time; time.sleep(60)"),))
    assert ends["memcheck"].endswith("it does not end") and not gpu.failures(ends)


def test_the_stages_fit_into_nine_minutes_and_the_first_into_four():
    assert gpu.WHOLE <= 540 and sum(s.limit for s in gpu.STAGES) <= gpu.WHOLE and gpu.STAGES[-1].name == "report"
    assert gpu.STAGES[:len(gpu.FIRST)] == gpu.FIRST and sum(s.limit for s in gpu.FIRST) <= gpu.USEFUL
    assert [s.name for s in gpu.FIRST] == ["tests", "bench-adamw", "bench-score", "bench-grad_norm", "bench-host"]
    assert {"memcheck", "racecheck", "initcheck"} <= {s.name for s in gpu.STAGES}
    assert len({s.name for s in gpu.STAGES}) == len(gpu.STAGES)


def test_no_case_is_timed_in_two_stages():
    cases = [("float32" in s.command, word) for s in gpu.STAGES if "bench.bench_adamw" in s.command
             for word in s.command[s.command.index("--ratio") + 1:]]
    assert len(cases) == len(set(cases)) == 5  # a page shows the last run of a case alone


def test_the_small_tests_and_the_others_are_all_of_them():
    selections = [s.command[s.command.index("-k") + 1] for s in gpu.STAGES if s.name.startswith("tests")]
    assert selections == ["sanitizer", "not sanitizer"]
    assert all("-rfEP" in s.command for s in gpu.STAGES if "tests/gpu" in s.command)


def test_every_selection_of_tests_selects_some():
    """And by the names that pytest gives them: of dtypes those are dtype0, dtype1 ..."""
    ran = subprocess.run([sys.executable, "-m", "pytest", "--collect-only", "-q", "-o", "addopts=", "tests/gpu"],
                         cwd=gpu.ROOT, capture_output=True, text=True)
    names = [line.split("::")[1] for line in ran.stdout.splitlines() if "::" in line]
    for expression in {s.command[s.command.index("-k") + 1] for s in gpu.STAGES if "tests/gpu" in s.command}:
        code = re.sub(r"\b(?!and\b|or\b|not\b)(\w+)", r"('\1' in name)", expression)
        assert sum(eval(code, {"name": name}) for name in names) >= 5, expression


def test_the_paths_of_tests_that_tools_run_exist():
    staged = [word for stage in gpu.STAGES for word in stage.command if word.startswith("tests/")]
    assert staged and all((gpu.ROOT / path).exists() for path in [*staged, *compat.TESTS])


def test_what_passing_tests_print_is_in_the_log(tmp_path):
    (tmp_path / "test_prints.py").write_text("def test_it():\n    print('host time: 55.0 us')\n")
    command = tuple(str(tmp_path) if word == "tests/gpu" else word for word in gpu.PYTEST)
    assert gpu.Runner(tmp_path).run((gpu.Stage("tests", command, 60),))["tests"].startswith("passed")
    assert "host time: 55.0 us" in (tmp_path / "gpu-run.log").read_text()


# The compiler.


def test_a_machine_with_a_compiler_and_headers_lacks_nothing(tmp_path, monkeypatch):
    (tmp_path / "Python.h").write_text("")
    monkeypatch.setattr(sysconfig, "get_paths", lambda scheme=None: {"include": str(tmp_path)})
    monkeypatch.setattr(gpu.shutil, "which", lambda name: "/usr/bin/" + name)
    monkeypatch.setattr(gpu.subprocess, "run", lambda *a, **k: subprocess.CompletedProcess(a, 0, "", ""))
    monkeypatch.delenv("CC", raising=False)
    assert gpu.toolchain() == ""
    monkeypatch.setattr(gpu.subprocess, "run", lambda *a, **k: subprocess.CompletedProcess(
        a, 1, "", "In file included\nPython.h:3: fatal error: stdio.h: No such file\nmore"))
    assert "gcc does not compile a file that includes Python.h: Python.h:3: fatal error: stdio.h" in gpu.toolchain()


@pytest.mark.parametrize("cc, expected", [(None, "neither gcc nor clang is on the PATH and CC is not set"),
                                          ("no-such-cc", "CC is 'no-such-cc', which cannot be run"),
                                          ("", "CC is ''")])
def test_a_missing_compiler_is_named_in_one_line(cc, expected, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    if cc is not None:
        monkeypatch.setenv("CC", cc)
    missing = gpu.toolchain()
    assert expected in missing and "Triton compiles" in missing and "\n" not in missing


def test_missing_headers_are_named_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("CC", sys.executable)
    monkeypatch.setattr(sysconfig, "get_paths", lambda scheme=None: {"include": str(tmp_path)})
    missing = gpu.toolchain()
    assert missing.startswith(f"no Python.h in {tmp_path}") and "-dev" in missing and "\n" not in missing


def test_nothing_runs_without_a_compiler(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "environment", dict)
    monkeypatch.setattr(gpu, "toolchain", lambda: "no C compiler: none")
    monkeypatch.setattr(gpu, "STAGES", (stage("tests", "open('ran', 'w')"),))
    assert gpu.main() == 1
    assert "toolchain: failed: no C compiler: none" in (tmp_path / "gpu-run.txt").read_text()
    assert "tests" not in (tmp_path / "gpu-run.txt").read_text() and "no C compiler: none" in capsys.readouterr().out


def test_without_a_device_nothing_runs(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main() == 1 and "no CUDA device" in capsys.readouterr().err
