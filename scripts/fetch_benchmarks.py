"""Fetches the data sets of mteb's benchmarks and tasks into a folder from which they can be evaluated offline.

    python scripts/fetch_benchmarks.py --benchmark "MTEB(eng, v2)" --output snapshot
    python eval/run.py --model runs/mini --benchmark "MTEB(eng, v2)" --snapshot snapshot

Each data set is fetched at the revision that mteb names, and entered into manifest.json with the size and SHA-256 of
every file when it is whole. Those entered are not fetched again: after an interruption the same command goes on.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from eval.benchmark import add_task_options, chosen_tasks
from eval.snapshot import Snapshot, parts_of
from lens.locks import alone
from lens.program import interruptible


def fetch(name: str, revision: str, place: Path) -> None:
    """Downloads a data set's repository into a folder; what is there in full is not downloaded again."""
    from huggingface_hub import HfApi, snapshot_download

    try:
        snapshot_download(name, repo_type="dataset", revision=revision, local_dir=place)
        facts = HfApi().dataset_info(name, revision=revision, files_metadata=True)
    except Exception as error:  # of the hub, of its HTTP library, of the disk: whatever it is, the name helps
        raise OSError(f"{name} at revision {revision} could not be fetched: {error}") from error
    for file in facts.siblings or []:  # without a network a folder that is there in part counts as downloaded
        path = place / file.rfilename
        if file.size is not None and (not path.is_file() or path.stat().st_size != file.size):
            raise OSError(f"{name} at revision {revision} came in part: {file.rfilename} should have {file.size} bytes")


@interruptible("scripts/fetch_benchmarks.py", "the same command goes on with the data set it was at")
def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the program; returns 0, or 2 after one line on standard error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_task_options(parser)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder of the snapshot")
    options = parser.parse_args(arguments)
    try:
        wanted: dict[tuple[str, str], set[str]] = {}
        for task in chosen_tasks(options):
            for part in parts_of(task):
                data = part.metadata.dataset
                wanted.setdefault((data["path"], data["revision"]), set()).add(task.metadata.name)
        with alone(options.output / "data"):
            snapshot = Snapshot(options.output, create=True)
            for number, ((name, revision), tasks) in enumerate(sorted(wanted.items()), 1):
                place = snapshot.place(name, revision)
                try:
                    snapshot.check(name, revision, verify=True)
                    snapshot.lend(name, revision, sorted(tasks))
                    state = "there"
                except (FileNotFoundError, ValueError):
                    if f"{name}@{revision}" in snapshot.datasets:  # damaged since, which a download may not notice
                        shutil.rmtree(place, ignore_errors=True)
                    fetch(name, revision, place)
                    snapshot.add(name, revision, sorted(tasks))
                    state = "fetched"
                print(f"[{number}/{len(wanted)}] {name} at {revision[:8]}: {state}", flush=True)
    except (OSError, ValueError, ImportError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
