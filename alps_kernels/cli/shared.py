"""What several commands share: options, arguments, and how results are printed."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs instead of text.")]
Config = Annotated[Optional[Path], typer.Option(help="config.json, where a checkpoint has none.")]
NewFolder = Annotated[Path, typer.Option("-o", "--out", help="The new folder; it appears whole or not at all.")]
PatchFile = Annotated[Path, typer.Argument(help="A patch (.safetensors) that `alps patch make` or save_patch wrote.")]


def show(as_json: bool, document: dict[str, Any], text: str = "", wrote: Iterable[Path] = ()) -> None:
    """Print the document as JSON, or the text and, on standard error, the files that were written."""
    if as_json or text:
        typer.echo(json.dumps(document) if as_json else text)
    for path in () if as_json else wrote:
        typer.echo(f"wrote {path}", err=True)
