"""Every code block of README.md and docs/ is run: Python in one process a page, shell lines one by one."""

import re
import shlex
import subprocess
from importlib.metadata import metadata
from pathlib import Path

import pytest
from typer.testing import CliRunner

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.S | re.M)


def blocks(page, *languages):
    return [text for language, text in FENCE.findall(page.read_text()) if language in languages]


def with_blocks(*languages):
    return [pytest.param(page, id=page.stem) for page in PAGES if blocks(page, *languages)]


@pytest.fixture
def desk(tmp_path, monkeypatch):
    """A folder with what the pages speak of: two checkpoints and the selections and scores made from them."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from alps_kernels import score_heads
    from alps_kernels.demo.run import tiny_model

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_DISABLED", "true")
    _, tokenizer = tiny_model()
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
                         pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id)
    base = LlamaForCausalLM(config)
    base.save_pretrained("base-checkpoint")
    tokenizer.save_pretrained("base-checkpoint")
    for name in ("task-checkpoint", "other-checkpoint"):
        with torch.no_grad():
            for layer in base.model.layers:
                layer.self_attn.q_proj.weight.add_(torch.randn_like(layer.self_attn.q_proj.weight), alpha=1e-3)
        base.save_pretrained(name)
        tokenizer.save_pretrained(name)
    scores = score_heads("base-checkpoint", "task-checkpoint")
    scores.save("scores.json")
    score_heads("base-checkpoint", "other-checkpoint").save("other.json")
    heads = scores.top(0.25)
    heads.save("heads.json")
    tuned = LlamaForCausalLM.from_pretrained("base-checkpoint")
    with torch.no_grad():
        for part in heads.bind(tuned).params:
            for block in part.blocks(part.param):
                block.add_(0.01)
    tuned.save_pretrained("tuned-checkpoint")
    return tmp_path


def names(folder):
    """What a page may use without making it: a model, its tokenizer, batches and a data set."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import alps_kernels as alps

    tokenizer = AutoTokenizer.from_pretrained(folder / "base-checkpoint")
    texts = ["1 + 2 = 3", "4 + 4 = 8", "7 + 1 = 8", "2 + 2 = 4"] * 4
    rows = [tokenizer(text, padding="max_length", max_length=12)["input_ids"] for text in texts]
    batches = [{"input_ids": torch.tensor(rows[at:at + 2]), "labels": torch.tensor(rows[at:at + 2])} for at in range(0, 8, 2)]
    return {"__name__": "__page__", "alps": alps, "alps_kernels": alps, "torch": torch, "tokenizer": tokenizer,
            "model": AutoModelForCausalLM.from_pretrained(folder / "base-checkpoint"), "batches": batches,
            "dataset": [{"input_ids": row, "labels": row, "attention_mask": [1] * len(row)} for row in rows],
            "texts": [{"text": text} for text in texts]}


@pytest.mark.parametrize("page", with_blocks("python", "diff"))
@pytest.mark.filterwarnings("ignore")
def test_python_blocks_run(page, desk):
    scope = names(desk)
    for number, text in enumerate(blocks(page, "python", "diff"), start=1):
        if text.startswith(("-", "+")):
            text = "\n".join(line[2:] for line in text.splitlines() if line.startswith("+"))
        exec(compile(text, f"{page.name}, block {number}", "exec"), scope)


def commands(page):
    for text in blocks(page, "sh"):
        for line in text.replace("\\\n", " ").splitlines():
            if words := shlex.split(line, comments=True):
                yield words


@pytest.mark.parametrize("page", with_blocks("sh"))
def test_shell_lines_run(page, desk):
    from alps_kernels.cli.commands import app

    for words in commands(page):
        if words[0] == "alps" and words[1] not in ("demo", "bench"):
            result = CliRunner().invoke(app, words[1:])
            assert result.exit_code == 0, (words, result.output, result.exception)
        elif words[0] == "make":
            subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, check=True, capture_output=True)
        elif words[:3] == ["python", "-m", "bench"]:
            from bench.__main__ import NAMES

            assert {word for word in words[3:] if not word.startswith("-")} <= set(NAMES), words
        elif words[:3] == ["python", "-m", "bench.study"]:
            from bench.study.cells import Study

            assert words[3] in ("run", "list", "report", "rerun")
            Study.load(words[words.index("--profile") + 1] if "--profile" in words else "cpu")
        elif words[:2] == ["pip", "install"]:
            extras = re.fullmatch(r"alps-kernels(?:\[(.*)\])?", words[-1]).group(1)
            assert extras is None or set(extras.split(",")) <= set(metadata("alps-kernels").get_all("Provides-Extra")), words
        else:  # examples have a test of their own
            scripts = [word for word in words if word.endswith(".py")]
            assert words[0] in ("python", "torchrun", "accelerate") and scripts, words
            for script in scripts:
                assert (ROOT / script).exists(), words
                tests = (path.read_text() for path in (ROOT / "tests").rglob("test_*.py") if path != Path(__file__))
                assert any(Path(script).name in text for text in tests), f"{script} has no test"


def test_the_pages_link_to_what_exists():
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
