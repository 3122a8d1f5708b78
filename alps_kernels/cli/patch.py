"""`alps patch`: head patches on checkpoint folders."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from .shared import Config, Json, NewFolder, PatchFile, show

patch_app = typer.Typer(no_args_is_help=True,
                        help="Head patches: the tuned slices of some heads, as a file of their own.")


@patch_app.command()
def make(
    base: Annotated[Path, typer.Argument(help="The checkpoint folder that was tuned.")],
    tuned: Annotated[Path, typer.Argument(help="The checkpoint folder after tuning.")],
    heads: Annotated[Path, typer.Option(help="The heads that were tuned (.json of alps score --heads).")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The patch to write (.safetensors).")],
    allow_outside_changes: Annotated[bool, typer.Option(
        help="Leave out what changed outside the heads instead of refusing.")] = False,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Write the slices in which TUNED differs from BASE; refused where something else differs too."""
    from ..patching import patch_from_checkpoints
    from ..selection import HeadSelection

    provenance = {"base": base.resolve().name, "tuned": tuned.resolve().name, "heads": heads.name}
    patch = patch_from_checkpoints(base, tuned, HeadSelection.load(heads), name=output.stem, config=config,
                                   allow_outside_changes=allow_outside_changes, provenance=provenance)
    patch.save(output)
    left_out = (patch.provenance or {}).get("left_out", [])
    if left_out and not as_json:
        typer.echo(f"left out: {len(left_out)} parameters that differ outside the heads, {left_out[0]} first",
                   err=True)
    document = {**_described(patch), "file_bytes": output.stat().st_size, "left_out": left_out}
    show(as_json, document, str(patch), (output,))


@patch_app.command()
def apply(
    checkpoint: Annotated[Path, typer.Argument(help="The base's checkpoint folder; it is left alone.")],
    patches: Annotated[list[Path], typer.Argument(help="One patch, or several on separate heads.")],
    out: NewFolder,
    originals: Annotated[bool, typer.Option(
        help="Keep what is replaced in the new folder, for `alps patch revert`.")] = True,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Write a copy of CHECKPOINT with patches in it, everything else the same."""
    from ..patching import HeadPatch, apply_to_checkpoint

    loaded = [HeadPatch.load(path) for path in patches]
    apply_to_checkpoint(checkpoint, loaded, out, keep_originals=originals, config=config)
    show(as_json, {"out": str(out), "patches": [_described(patch) for patch in loaded]}, wrote=(out,))


@patch_app.command()
def revert(
    checkpoint: Annotated[Path, typer.Argument(help="A folder that `alps patch apply` wrote; it is left alone.")],
    out: NewFolder,
    originals: Annotated[Optional[Path], typer.Option(
        help="What to put back; default: the latest that the folder keeps.")] = None,
    as_json: Json = False,
) -> None:
    """Write a copy of CHECKPOINT with the latest patch taken out, everything what it was before."""
    from ..patching import revert_checkpoint

    revert_checkpoint(checkpoint, out, originals)
    show(as_json, {"out": str(out)}, wrote=(out,))


@patch_app.command()
def info(
    patch: PatchFile,
    check: Annotated[Optional[Path], typer.Option(help="A checkpoint folder: see whether the patch fits it.")] = None,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Print what a patch holds; every value is checked against its digest."""
    from ..patching import HeadPatch, check_fits, whole_weights

    loaded = HeadPatch.load(patch)
    if check is not None:
        check_fits(loaded, whole_weights(check, config))
    described = {**_described(loaded), "file_bytes": patch.stat().st_size}
    lines = [str(loaded), str(loaded.selection)]
    lines += [f"{key.replace('_', ' ')}: {described[key]}"
              for key in ("fingerprint", "base_fingerprint", "not_finite", "provenance")]
    show(as_json, described, "\n".join(lines if check is None else [*lines, f"fits {check}"]))


@patch_app.command()
def diff(first: PatchFile, second: PatchFile, as_json: Json = False) -> None:
    """Compare two patches: their base, heads, and the values of slices that both hold."""
    from ..patching import HeadPatch, diff_patches

    found = diff_patches(HeadPatch.load(first), HeadPatch.load(second))
    show(as_json, found.to_json(), str(found))


@patch_app.command()
def export(
    patch: PatchFile,
    base: Annotated[Path, typer.Option(help="The patch's base: a checkpoint folder.")],
    out: NewFolder,
    lora: Annotated[bool, typer.Option("--lora", help="A PEFT LoRA adapter.")] = False,
    merged: Annotated[bool, typer.Option("--merged", help="The whole checkpoint with the patch in it.")] = False,
    sparse: Annotated[bool, typer.Option("--sparse", help="New rows and columns by the checkpoint's names.")] = False,
    rank: Annotated[Optional[int], typer.Option(help="Largest LoRA rank; default: as much as is exact.")] = None,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Write PATCH in a form that others take: one of --lora, --merged, --sparse."""
    from ..patching import export_lora, export_merged, export_sparse

    if lora + merged + sparse != 1:
        raise ValueError("give one of --lora, --merged and --sparse")
    if rank is not None and not lora:
        raise ValueError("--rank goes with --lora")
    if lora:
        made = export_lora(patch, base, out, rank=rank, config=config)
        modules = {name: vars(module) for name, module in made.modules.items()}
        document, text = {"modules": modules, "error": made.error, "bytes": made.nbytes}, str(made)
    elif merged:
        export_merged(patch, base, out, config=config)
        document, text = {}, ""
    else:
        tensors = sorted(export_sparse(patch, base, out, config=config)["tensors"])
        document, text = {"tensors": tensors}, f"{len(tensors)} tensors of the checkpoint change"
    show(as_json, {"out": str(out), **document}, text, (out,))


def _described(patch) -> dict:
    return {
        "name": patch.name, "architecture": patch.architecture, "model_type": patch.model_type,
        "heads": [list(head) for head in patch.selection], "of": sum(patch.selection.heads_per_layer),
        "kv": patch.selection.kv, "parts": list(patch.selection.parts), "dtypes": patch.dtypes,
        "tensors": len(patch.cuts), "numel": patch.numel, "bytes": patch.nbytes,
        "not_finite": sum(int((~values.isfinite()).sum()) for values in patch.values.values()),
        "fingerprint": patch.fingerprint, "base_fingerprint": patch.base_fingerprint, "provenance": patch.provenance,
    }
