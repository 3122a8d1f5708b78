"""`alps patch`: head patches on checkpoint folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Optional

import typer

patch_app = typer.Typer(no_args_is_help=True, help="Head patches: the tuned slices of some heads, as a file of their own.")

Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs instead of text.")]
Out = Annotated[Path, typer.Option("-o", "--out", help="The new folder; it appears whole or not at all.")]
Config = Annotated[Optional[Path], typer.Option(help="config.json, where the checkpoint has none.")]
PatchFile = Annotated[Path, typer.Argument(help="A patch (.safetensors) that `alps patch make` or save_patch wrote.")]


@patch_app.command()
def make(
    base: Annotated[Path, typer.Argument(help="The checkpoint folder that was tuned.")],
    tuned: Annotated[Path, typer.Argument(help="The checkpoint folder after tuning.")],
    heads: Annotated[Path, typer.Option(help="The heads that were tuned (.json of alps score --heads).")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The patch to write (.safetensors).")],
    allow_outside_changes: Annotated[bool, typer.Option(help="Leave out what changed outside the heads instead of refusing.")] = False,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Write the slices in which TUNED differs from BASE; refused where something else differs too."""
    from ..patching import patch_from_checkpoints
    from ..selection import HeadSelection

    patch = patch_from_checkpoints(base, tuned, HeadSelection.load(heads), name=output.stem, config=config,
                                   allow_outside_changes=allow_outside_changes,
                                   provenance={"base": base.resolve().name, "tuned": tuned.resolve().name, "heads": heads.name})
    patch.save(output)
    left_out = (patch.provenance or {}).get("left_out", [])
    if as_json:
        typer.echo(json.dumps({**_described(patch), "file_bytes": output.stat().st_size, "left_out": left_out}))
        return
    typer.echo(str(patch))
    if left_out:
        typer.echo(f"left out: {len(left_out)} parameters that differ outside the heads, {left_out[0]} first", err=True)
    typer.echo(f"wrote {output}", err=True)


@patch_app.command()
def apply(
    checkpoint: Annotated[Path, typer.Argument(help="The base's checkpoint folder; it is left alone.")],
    patches: Annotated[list[Path], typer.Argument(help="One patch, or several on separate heads.")],
    out: Out,
    originals: Annotated[bool, typer.Option(help="Keep what is replaced in the new folder, for `alps patch revert`.")] = True,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Write a copy of CHECKPOINT with patches in it, everything else the same."""
    from ..patching import HeadPatch, apply_to_checkpoint

    loaded = [HeadPatch.load(path) for path in patches]
    apply_to_checkpoint(checkpoint, loaded, out, keep_originals=originals, config=config)
    _wrote(out, {"patches": [_described(patch) for patch in loaded]}, as_json)


@patch_app.command()
def revert(
    checkpoint: Annotated[Path, typer.Argument(help="A folder that `alps patch apply` wrote; it is left alone.")],
    out: Out,
    originals: Annotated[Optional[Path], typer.Option(help="What to put back; default: the latest that the folder keeps.")] = None,
    as_json: Json = False,
) -> None:
    """Write a copy of CHECKPOINT with the latest patch taken out, everything what it was before."""
    from ..patching import revert_checkpoint

    revert_checkpoint(checkpoint, out, originals)
    _wrote(out, {}, as_json)


@patch_app.command()
def info(
    patch: PatchFile,
    check: Annotated[Optional[Path], typer.Option(help="A checkpoint folder: see whether the patch fits it.")] = None,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Print what a patch holds; every value is checked against its digest."""
    from ..patching import HeadPatch

    loaded = HeadPatch.load(patch)
    if check is not None:
        from ..patching import CheckpointSource, check_fits

        check_fits(loaded, CheckpointSource(check, config))
    if as_json:
        typer.echo(json.dumps({**_described(loaded), "file_bytes": patch.stat().st_size}))
        return
    described = _described(loaded)
    typer.echo(f"{loaded}\n{loaded.selection}")
    for key in ("fingerprint", "base_fingerprint", "not_finite", "provenance"):
        typer.echo(f"{key.replace('_', ' ')}: {described[key]}")
    if check is not None:
        typer.echo(f"fits {check}")


@patch_app.command()
def diff(first: PatchFile, second: PatchFile, as_json: Json = False) -> None:
    """Compare two patches: their base, heads, and the values of slices that both hold."""
    from ..patching import HeadPatch, diff_patches

    found = diff_patches(HeadPatch.load(first), HeadPatch.load(second))
    typer.echo(json.dumps(found.to_json()) if as_json else str(found))


@patch_app.command()
def export(
    patch: PatchFile,
    base: Annotated[Path, typer.Option(help="The patch's base: a checkpoint folder.")],
    out: Out,
    lora: Annotated[bool, typer.Option("--lora", help="A PEFT LoRA adapter.")] = False,
    merged: Annotated[bool, typer.Option("--merged", help="The whole checkpoint with the patch in it.")] = False,
    sparse: Annotated[bool, typer.Option("--sparse", help="New rows and columns by the checkpoint's names.")] = False,
    rank: Annotated[Optional[int], typer.Option(help="Largest LoRA rank; default: as much as is exact.")] = None,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Write PATCH in a form that others take: one of --lora, --merged, --sparse."""
    from ..patching import export as exports

    if lora + merged + sparse != 1:
        raise ValueError("give one of --lora, --merged and --sparse")
    if rank is not None and not lora:
        raise ValueError("--rank goes with --lora")
    if lora:
        made = exports.export_lora(patch, base, out, rank=rank, config=config)
        _wrote(out, {"modules": {name: vars(module) for name, module in made.modules.items()}, "error": made.error,
                     "bytes": made.nbytes}, as_json, str(made))
    elif merged:
        exports.export_merged(patch, base, out, config=config)
        _wrote(out, {}, as_json)
    else:
        index = exports.export_sparse(patch, base, out, config=config)
        _wrote(out, {"tensors": sorted(index["tensors"])}, as_json, f"{len(index['tensors'])} tensors of the checkpoint change")


def _wrote(out: Path, document: dict, as_json: bool, text: str | None = None) -> None:
    if as_json:
        typer.echo(json.dumps({"out": str(out), **document}))
        return
    if text:
        typer.echo(text)
    typer.echo(f"wrote {out}", err=True)


def _described(patch) -> dict:
    return {
        "name": patch.name, "architecture": patch.architecture, "model_type": patch.model_type,
        "heads": [list(head) for head in patch.selection], "of": sum(patch.selection.heads_per_layer),
        "kv": patch.selection.kv, "parts": list(patch.selection.parts), "dtypes": patch.dtypes,
        "tensors": len(patch.cuts), "numel": patch.numel, "bytes": patch.nbytes,
        "not_finite": sum(int((~values.isfinite()).sum()) for values in patch.values.values()),
        "fingerprint": patch.fingerprint, "base_fingerprint": patch.base_fingerprint, "provenance": patch.provenance,
    }
