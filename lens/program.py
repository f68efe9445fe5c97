"""How the programs end early: by Ctrl-C, and by SIGTERM, which schedulers send."""

from __future__ import annotations

import functools
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any, ParamSpec

P = ParamSpec("P")


def interruptible(name: str, advice: str = "") -> Callable[[Callable[P, int]], Callable[P, int]]:
    """Decorates the main function of program `name`: Ctrl-C returns 130 after one line, which ends with `advice`, and
    SIGTERM leaves through SystemExit(143), so that unfinished outputs are removed on the way in both cases."""

    def decorate(main: Callable[P, int]) -> Callable[P, int]:
        @functools.wraps(main)
        def run(*args: P.args, **kwargs: P.kwargs) -> int:
            at_home = threading.current_thread() is threading.main_thread()  # elsewhere signals cannot be set
            before = signal.signal(signal.SIGTERM, _leave) if at_home else None
            try:
                return main(*args, **kwargs)
            except KeyboardInterrupt:
                print(f"{name}: interrupted{advice and '; ' + advice}", file=sys.stderr)
                return 130
            finally:
                if at_home:
                    signal.signal(signal.SIGTERM, before)

        return run

    return decorate


def _leave(number: int, frame: Any) -> None:
    raise SystemExit(128 + number)
