"""The fast tests in fresh environments of other versions: python -m tests.compat [NAME ...].

Each environment is a folder under --folder (default: a temporary one, removed at the end). Where no CPU
build of a torch is at hand, pip takes a CUDA build of several GB: name what you want.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# name: (python, what pip is asked for beside the package and its tests' own needs)
ENVIRONMENTS = {
    "newest": ("python3.11", ["torch==2.13.0", "transformers"]),
    "oldest-transformers": ("python3.11", ["torch==2.13.0", "transformers==5.0.0"]),
    "oldest-torch": ("python3.11", ["torch==2.9.1", "triton==3.6.0", "transformers"]),
    "oldest-of-all": ("python3.10", ["torch==2.9.1", "triton==3.6.0", "transformers==5.0.0"]),
    "python3.12": ("python3.12", ["torch", "transformers"]),
    "python3.13": ("python3.13", ["torch", "transformers"]),
}
TESTS = ["tests/selection", "tests/scoring/test_scores.py", "tests/layout/test_find_heads.py",
         "tests/optim/test_head_adamw.py", "tests/optim/test_state_dict.py", "tests/slicing/test_slice_heads.py",
         "tests/patching/test_apply.py", "tests/house/test_import_cost.py", "tests/reliability/test_guard.py",
         "tests/reliability/test_bad_input.py"]


def attempt(name: str, folder: Path, tests: list[str]) -> bool:
    python, wanted = ENVIRONMENTS[name]
    environment = folder / name
    made = subprocess.run([python, "-m", "venv", environment])
    inside = environment / "bin" / "python"
    pip = [inside, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    if made.returncode or subprocess.run([*pip, wanted[0]]).returncode \
            or subprocess.run([*pip, "--editable", f"{ROOT}[test]", *wanted]).returncode:
        print(f"{name}: cannot be installed here")
        return False
    subprocess.run([inside, "-c", "import sys, torch, transformers; print(sys.version.split()[0], torch.__version__, "
                                  "transformers.__version__)"])
    ran = subprocess.run([inside, "-m", "pytest", "-q", "-m", "not slow and not real", *tests], cwd=ROOT)
    print(f"{name}: {'passed' if ran.returncode == 0 else 'FAILED'}")
    return ran.returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(ENVIRONMENTS))
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--tests", nargs="+", default=TESTS)
    options = parser.parse_args()
    if unknown := [name for name in options.names if name not in ENVIRONMENTS]:
        parser.error(f"no environment called {unknown[0]!r}; there is {', '.join(ENVIRONMENTS)}")
    folder = options.folder or Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    results = [attempt(name, folder, options.tests) for name in options.names or ENVIRONMENTS]
    if options.folder is None:
        shutil.rmtree(folder)
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
