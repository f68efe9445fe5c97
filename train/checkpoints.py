"""Which checkpoints of a run are whole."""

from __future__ import annotations

from pathlib import Path

from lens.files import read_json, write_json

COMPLETE_FILE = "complete.json"  # the last file of a checkpoint; without it the checkpoint is not whole


def mark_whole(checkpoint: Path, step: int) -> None:
    """Writes the last file of a checkpoint, with the sizes of all others."""
    sizes = {str(f.relative_to(checkpoint)): f.stat().st_size for f in sorted(checkpoint.rglob("*")) if f.is_file()}
    write_json(checkpoint / COMPLETE_FILE, {"step": step, "files": sizes})


def whole_checkpoints(output: Path) -> list[Path]:
    """The whole checkpoints in `output`, lowest step first: those with every file that they were finished with."""
    numbered = [path for path in output.glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit()]
    whole = [path for path in numbered if (path / COMPLETE_FILE).is_file() and not damage(path)]
    return sorted(whole, key=lambda path: int(path.name.rpartition("-")[2]))


def damage(checkpoint: Path) -> list[str]:
    """Names of the files of a finished checkpoint that are missing or no longer of the size they were written with."""
    try:
        sizes: dict[str, int] = read_json(checkpoint / COMPLETE_FILE)["files"]
        return [name for name, size in sizes.items() if (checkpoint / name).stat().st_size != size]
    except FileNotFoundError as error:
        return [Path(error.filename).name]
    except (KeyError, ValueError):
        return [COMPLETE_FILE]
