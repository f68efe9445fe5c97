"""How programs end early."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from conftest import ROOT

from lens.program import interruptible

PROGRAM = """
import signal, sys, time
sys.path.insert(0, sys.argv[1])
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
from lens.files import atomic_folder
from lens.program import interruptible

@interruptible("slow.py", "start it again")
def main():
    with atomic_folder(sys.argv[2]) as folder:
        (folder / "half").touch()
        print("writing", flush=True)
        time.sleep(60)
    return 0

sys.exit(main())
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_unfinished_output_vanishes(number: signal.Signals, tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir()
    command = [sys.executable, "-c", PROGRAM, str(ROOT), str(place / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "writing\n"
        assert len(list(place.iterdir())) == 1
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert errors == ("slow.py: interrupted; start it again\n" if number == signal.SIGINT else "")
    assert list(place.iterdir()) == []


def test_results_errors_and_handlers_pass_through(capsys: pytest.CaptureFixture[str]) -> None:
    def main(status: int) -> int:
        if status == 130:
            raise KeyboardInterrupt
        if status < 0:
            raise ValueError("negative")
        return status

    before = signal.getsignal(signal.SIGTERM)
    program = interruptible("p")(main)
    assert [program(status) for status in (0, 2, 130)] == [0, 2, 130]
    assert capsys.readouterr().err == "p: interrupted\n"
    with pytest.raises(ValueError, match="negative"):
        program(-1)
    assert signal.getsignal(signal.SIGTERM) is before
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(program(7)))  # where no handler can be set
    thread.start()
    thread.join()
    assert found == [7]
