"""The command line `alps`: score, heads, plot, demo, bench.

A user's mistake ends with one line on standard error and exit code 2; nothing else is caught.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Optional

import typer

from .patch import patch_app
from .shared import Config, Json, show

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False,
                  help="ALPS: score attention heads, keep the top ones, train those alone.")
heads_app = typer.Typer(no_args_is_help=True, help="Look at files of selected heads.")
app.add_typer(heads_app, name="heads")
app.add_typer(patch_app, name="patch")


@app.command()
def score(
    base: Annotated[str, typer.Argument(help="The base model: a checkpoint folder or file.")],
    task: Annotated[str, typer.Argument(help="The task model, of the same architecture.")],
    output: Annotated[Optional[Path], typer.Option(
        "-o", "--output", help="Write the scores (.json or .safetensors).")] = None,
    plot: Annotated[Optional[Path], typer.Option(help="Write the layer x head heat map (.png, .pdf).")] = None,
    top: Annotated[float, typer.Option(help="Ratio of heads to keep.")] = 0.10,
    heads: Annotated[Optional[Path], typer.Option(help="Write the kept heads (.json).")] = None,
    metric: Annotated[str, typer.Option(
        help="pad, pad_index, pad_values, kl, js, cosine, cosine_weights, euclidean, relative.")] = "pad",
    representation: Annotated[str, typer.Option(help="projection, qkv, q, k, v, o, qkvo.")] = "projection",
    temperature: Annotated[float, typer.Option(help="tau of the softmax.")] = 1.0,
    attention: Annotated[str, typer.Option(
        help="Which attention: all, self, cross, or a tower such as decoder.")] = "all",
    scope: Annotated[str, typer.Option(help="Rank over the whole model, or within each layer.")] = "model",
    kv: Annotated[str, typer.Option(help="When a shared key/value group trains: any, none, all.")] = "any",
    config: Config = None,
    device: Annotated[Optional[str], typer.Option(help="cpu or cuda; default cpu.")] = None,
    as_json: Json = False,
) -> None:
    """Score every attention head by how far TASK moved its weights from BASE.

    Under torchrun every rank reads and scores some of the layers, and rank 0 writes and prints.
    """
    from ..scoring import score_heads
    from ..tensors import ranks_of_torchrun

    with ranks_of_torchrun() as rank:
        scores = score_heads(base, task, metric=metric, representation=representation, temperature=temperature,
                             attention=attention, device=device, config=config, progress=sys.stderr.isatty(),
                             distributed=rank is not None)
    if rank:
        return
    selection = scores.top(top, scope=scope, kv=kv)
    if output:
        scores.save(output)
    if heads:
        selection.save(heads)
    if plot:
        scores.plot(plot, heads=selection)
    show(as_json, {"scores": scores.rows(), "heads": [list(head) for head in selection]}, f"{scores}\n{selection}",
         filter(None, (output, heads, plot)))


@heads_app.command("show")
def heads_show(
    path: Annotated[Path, typer.Argument(help="A file that `alps score --heads` or HeadSelection.save wrote.")],
    as_json: Json = False,
) -> None:
    """Print the selected heads and the honest share of parameters that train."""
    from ..selection import HeadSelection

    selection = HeadSelection.load(path)
    count = selection.count() if selection.summary is not None else None
    show(as_json, {
        "heads": [list(head) for head in selection], "of": sum(selection.heads_per_layer),
        "kv": selection.kv, "parts": list(selection.parts),
        "trained": count and count.trained, "total": count and count.total, "share_qkv": count and count.share(),
    }, str(selection))


@app.command()
def plot(
    path: Annotated[Path, typer.Argument(help="A file that `alps score -o` or HeadScores.save wrote.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The picture (.png, .pdf, .svg).")],
    kind: Annotated[str, typer.Option(help="heatmap, histogram; overlap with --other.")] = "heatmap",
    other: Annotated[Optional[Path], typer.Option(help="Scores of another task, for the overlap.")] = None,
    heads: Annotated[Optional[Path], typer.Option(help="A file of selected heads to mark.")] = None,
    top: Annotated[float, typer.Option(help="Ratio of heads in each top of the overlap.")] = 0.10,
) -> None:
    """Draw scores: layer x head, how they are spread, or how far two tasks' top heads overlap."""
    from ..scoring import HeadScores
    from ..selection import HeadSelection

    HeadScores.load(path).plot(output, None if heads is None else HeadSelection.load(heads), kind=kind, ratio=top,
                               other=None if other is None else HeadScores.load(other))
    typer.echo(f"wrote {output}", err=True)


@app.command()
def demo(
    out: Annotated[Path, typer.Option("-o", "--out", help="The folder for results and pictures.")] = Path("out"),
    tiny: Annotated[bool, typer.Option(help="A tiny random model made on the spot; needs no network.")] = False,
    device: Annotated[Optional[str], typer.Option(help="cpu or cuda; default cuda where there is one.")] = None,
    as_json: Json = False,
) -> None:
    """Score, select and fine-tune SmolLM2-135M on short sums: the whole method in one run."""
    from ..demo import run_demo

    results = run_demo(out, tiny=tiny, device=device, say=lambda text: typer.echo(text, err=as_json))
    if as_json:
        typer.echo(json.dumps(results))


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def bench(context: typer.Context) -> None:
    """Run the microbenchmarks (from a checkout: they live in the folder bench)."""
    try:
        from bench.__main__ import main as run
    except ModuleNotFoundError as error:
        raise FileNotFoundError("the benchmarks are in the repository's folder bench: "
                                "run this from a checkout") from error
    raise typer.Exit(run(context.args))


def main() -> None:
    """Entry point: a user's mistake costs one line, not a traceback."""
    from ..demo import AssetUnavailable

    try:
        app()
    except (ValueError, TypeError, OSError, ImportError, AssetUnavailable) as error:
        typer.echo(f"alps: {error}", err=True)
        sys.exit(2)
    except KeyboardInterrupt:
        typer.echo("alps: interrupted", err=True)
        sys.exit(130)
