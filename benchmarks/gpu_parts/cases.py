"""Cases of a part: independent measurements that run one after the other until the time is over."""

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from statistics import median
from typing import Any, TypeAlias

import torch

Result: TypeAlias = dict[str, Any]
Cases: TypeAlias = Mapping[str, Callable[[], Result]]


class NotRun(Exception):
    """A case that can't be measured here; the message says why."""


@dataclass(frozen=True)
class Setting:
    """Where and at what size cases run.

    Args:
        dry: Whether sizes are tiny and the device is the CPU.
        seed: Seed of weights and data.
    """

    dry: bool
    seed: int

    @property
    def device(self) -> torch.device:
        """Device of the measurements."""
        return torch.device("cpu" if self.dry else "cuda")

    @property
    def dtype(self) -> torch.dtype:
        """Data type of weights where one is measured."""
        return torch.float32 if self.dry else torch.bfloat16


def require(*packages: str) -> None:
    """Raise `NotRun` if a package is missing."""
    if missing := [package for package in packages if find_spec(package) is None]:
        raise NotRun(f"{', '.join(missing)} is not installed")


def run_cases(cases: Cases, seconds: float, report: Callable[[dict[str, Result]], None]) -> dict[str, Result]:
    """Run cases in order, none of which stops the others, and report after each what is known of all.

    Args:
        cases: The cases.
        seconds: No case is started after this time.
        report: Function that gets the result of each case, `{"not_run": reason}` or `{"failed": message}`.
    """
    start = time.monotonic()
    results: dict[str, Result] = {name: {"not_run": "time"} for name in cases}
    for name, measure in cases.items():
        began = time.monotonic()
        if began - start >= seconds:
            break
        # What the file says if the process is stopped during the case.
        results[name] = {"failed": "stopped: time"}
        report(results)
        try:
            result = measure()
        except NotRun as reason:
            result = {"not_run": str(reason)}
        except (Exception, SystemExit) as error:  # whatever it is, the other cases go on
            result = {"failed": f"{type(error).__name__}: {str(error)[:500]}"}
        results[name] = result | {"seconds": round(time.monotonic() - began, 2)}
        report(results)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return results


def time_and_peak(run: Callable[[], object], *, repeats: int = 5) -> Result:
    """Return the median time of a call after an uncounted one, and the peak of memory above what was there before."""
    on_gpu = torch.cuda.is_available()
    run()
    times = []
    gc.collect()
    before = torch.cuda.memory_allocated() if on_gpu else 0
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    for _ in range(repeats):
        _wait()
        start = time.perf_counter()
        run()
        _wait()
        times.append(time.perf_counter() - start)
    result: Result = {"ms": round(1000 * median(times), 2)}
    if on_gpu:
        result["peak_gib"] = round((torch.cuda.max_memory_allocated() - before) / 2**30, 2)
    return result


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
