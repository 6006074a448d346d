"""The benchmark of a GPU, dry: every part runs on a CPU, none stops another, and the time is kept."""

import importlib
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def benchmarks_on_path(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    # As in the process of a part without a GPU.
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def all_results(results):
    for result in results.values():
        yield result
        yield from all_results({key: value for key, value in result.items() if isinstance(value, dict)})


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of TRL
@pytest.mark.parametrize("name", ["attention", "head", "step", "generation", "resume", "cache", "qlora"])
def test_every_part_runs_dry(name, tmp_path):
    pytest.importorskip("trl")
    gpu = importlib.import_module("gpu")
    out = tmp_path / "part.json"
    gpu.run_part(name, 600, out, dry=True)
    cases = json.loads(out.read_text())
    assert [case for case, result in cases.items() if "failed" in result] == []
    not_run = [result["not_run"] for result in cases.values() if "not_run" in result]
    assert all(reason.endswith("is not installed") for reason in not_run)
    assert len(not_run) < len(cases)
    assert all(result.get("passed", True) for result in all_results(cases))


@pytest.mark.slow
def test_a_part_has_a_process_of_its_own_that_is_stopped(tmp_path):
    gpu = importlib.import_module("gpu")
    results = gpu.run_all(["cache"], 120, tmp_path / "gpu.json", dry=True)
    assert results["parts"]["cache"]["cases"]["bf16"]["passed"]
    assert "| bf16 |" in gpu.markdown(results)
    stopped = gpu.in_own_process("cache", 1, dry=True)
    assert (stopped["failed"], stopped["cases"]) == ("stopped: time", {})
    # A dry run writes nothing, and what a GPU's run writes are these two files.
    assert not (tmp_path / "gpu.json").exists()
    gpu.write(results, tmp_path / "gpu.json")
    assert json.loads((tmp_path / "gpu.json").read_text()) == results
    assert (tmp_path / "gpu.md").read_text() == gpu.markdown(results)


def test_a_case_that_fails_or_has_no_time_does_not_stop_the_others(monkeypatch):
    from gpu_parts import cases as module

    clock = [0.0]
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock[0]))

    def takes_long():
        clock[0] += 10
        return {"ms": 1}

    def fails():
        raise RuntimeError("broken")

    def needs_another_package():
        module.require("json", "no_such_package")

    reports = []
    cases = {"a": fails, "b": needs_another_package, "c": takes_long, "d": fails}
    results = module.run_cases(cases, 10, lambda results: reports.append(json.loads(json.dumps(results))))
    assert results["a"]["failed"] == "RuntimeError: broken"
    assert results["b"]["not_run"] == "no_such_package is not installed"
    assert results["c"] == {"ms": 1, "seconds": 10}
    assert results["d"] == {"not_run": "time"}
    # While a case runs, the file says that it was stopped.
    assert reports[0] == {"a": {"failed": "stopped: time"}} | {name: {"not_run": "time"} for name in "bcd"}


def test_parts_exist_and_share_all_of_the_time():
    gpu = importlib.import_module("gpu")
    assert sum(part.share for part in gpu.PARTS.values()) == pytest.approx(1)
    for part in gpu.PARTS.values():
        module = part.cases.split(":")[0]
        assert (ROOT / "benchmarks" / "gpu_parts" / f"{module}.py").exists()


def test_peaks_of_data_sheets_give_the_utilization():
    from speed.report import utilization

    result = {"useful_flops": {"bfpo": [989e12, 989e12, 989e12]}, "seconds": {"bfpo": [2.0, 4.0, 5.0]}}
    assert utilization(result, "bfpo", "NVIDIA H200") == pytest.approx(0.25)
    assert utilization(result, "bfpo", "another") is None
