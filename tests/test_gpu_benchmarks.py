"""The GPU part of the benchmark suite, as far as it goes without one: floors, peers, goals, tables, runs cut short, options."""

from __future__ import annotations

import re
import sys
import types
from dataclasses import replace

import pytest
import torch
from rich.console import Console

import natrpb
from benchmarks import __main__ as command
from benchmarks import flex, gpu, gpu_cases, gpu_check, gpu_report, gpu_run, machine, report, windows
from benchmarks.harness import OURS, Contender, Line, Problem, Runner, Workload, autograd_results, exact_results, measure
from benchmarks.problems import window_problem
from benchmarks.report import Results
from benchmarks.timing import Timing

from .cases import Case
from .support import close, needs_compiled

LIMITS = {"copy_gbytes": 4000.0, "matmul_tflops": 700.0}
GPU = {
    "device": "cuda",
    "name": "NVIDIA H200",
    "compute_capability": "9.0",
    "multiprocessors": 132,
    "memory_gib": 139.8,
    "l2_mib": 60,
    "driver": "580.1",
    "cuda": "13.0",
    "architectures": ["sm_90"],
    "host": "a processor",
    "idle": {"sm_mhz": 345.0, "celsius": 30.0},
}


def timing(seconds: float, peak: int | None = 10**6) -> Timing:
    return Timing(seconds, seconds, seconds, samples=5, rejected=0, calls=1, peak_bytes=peak)


def line_of(**changes) -> Line:
    """Ours takes 100 us for 200 MB, half the floor."""
    seconds = {OURS: 1e-4, "FlexAttention": 9e-4, "FlexAttention (8x8 tiles)": 6e-4, gpu_report.NO_BIAS: 9e-5}
    line = Line("na", "First", 1, 2 * 10**9, 2 * 10**8, timings={name: timing(s) for name, s in seconds.items()})
    return replace(line, result_bytes=5 * 10**5, state={"sm_mhz": 1980.0}, **changes)


def sample_results() -> Results:
    goals = {"floor": 0.45, "FlexAttention": 7.0, "bias": 1.15, "NATTEN, no bias": 1.5}
    lines = [
        line_of(goals=goals, absent={"NATTEN": "not here"}),
        Line("model", "Models", 1, items=128, timings={OURS: timing(0.02, None)}, goals={"images": 6000.0}),
        Line("wrong", "First", 1, refused="wrong result", goals={"floor": 0.5}),
    ]
    return Results("2026-01-02", "abc", GPU, {"torch": "2.x"}, {1: LIMITS}, lines)


class TestCosts:
    """Floors at an H200's 4.3 TB/s, in microseconds."""

    @pytest.mark.parametrize(
        "case, mode, microseconds",
        [
            *[(case, gpu_cases.FORWARD, us) for case, us in zip(gpu_cases.NA_STAGES, (48, 24, 12, 6))],
            *[(case, gpu_cases.BACKWARD, us) for case, us in zip(gpu_cases.NA_STAGES, (96, 48, 24, 12))],
            (gpu_cases.FAR, gpu_cases.FORWARD, 48),
            (gpu_cases.SWIN_STAGES[0], gpu_cases.FORWARD, 72),
            (gpu_cases.SHIFTED[0], gpu_cases.BACKWARD, 144),
        ],
        ids=str,
    )
    def test_floors(self, case, mode, microseconds):
        cost = gpu_cases.work(case, torch.bfloat16, mode)
        assert cost["bytes"] / gpu_report.GOAL_RATE * 1e6 == pytest.approx(microseconds, rel=0.02)

    def test_flops_of_both_passes_add_up(self):
        case = gpu_cases.NA_STAGES[3]
        forward, backward, both = (gpu_cases.work(case, torch.float32, mode)["flops"] for mode in gpu_cases.FLOPS_PER_PAIR)
        assert forward + backward == both and forward == 4 * 32 * 49 * 49 * 16 * 128

    def test_workloads(self):
        for workloads in (gpu_cases.all_workloads(), gpu_cases.quick_workloads()):
            names = [workload.name for workload in workloads]
            assert len(names) == len(set(names))
        assert set(gpu_check.WATCHED) <= {workload.name for workload in gpu_cases.all_workloads()}


SMALL = Case((8, 12), 3, batch=2, head_dim=16)
SMALL_WINDOWS = replace(SMALL, kernel_size=4, shift=2)


def eager(monkeypatch) -> None:
    """Takes the compiler's part: what would be compiled runs as it is."""
    monkeypatch.setattr(torch, "compile", lambda function=None, **_: function or (lambda each: each))


def verdicts(problem: Problem) -> Line:
    workload = Workload("a case", "A group", lambda: problem)
    return measure(
        workload, 1, 0.0, problem, exact_results(problem), lambda runners, *_: {name: timing(1.0) for name in runners}
    )


def but_for_timm(line: Line) -> dict[str, str]:
    """Who is absent and why, without timm where it is not installed."""
    return {name: reason for name, reason in line.absent.items() if not reason.startswith("timm does not import")}


@needs_compiled
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
class TestPeers:
    """Every contender that can run here passes the check that precedes timing."""

    def test_neighborhoods(self, monkeypatch):
        eager(monkeypatch)
        monkeypatch.setitem(gpu_cases.FLEX, (8, 12), [{}, {"tile": (4, 4)}, {"tile": (4, 4), "block": 64}])
        line = verdicts(gpu_cases.neighborhood(SMALL, torch.float32, gpu_cases.FORWARD))
        assert not line.refused and all(name.startswith("NATTEN") for name in line.absent), line.absent
        assert {"FlexAttention (4x4 tiles, blocks of 64)", gpu_report.NO_BIAS, "SDPA", "torch.compile"} <= set(line.timings)

    @pytest.mark.parametrize(
        "case", [replace(SMALL, kernel_size=4, shift=2), Case((6, 4, 6), 2, shift=1, head_dim=16)], ids=str
    )
    def test_windows(self, case, monkeypatch):
        eager(monkeypatch)
        line = verdicts(gpu_cases.window(case, torch.float32, gpu_cases.FORWARD))
        assert not line.refused
        assert set(but_for_timm(line).values()) == (set() if case.ndim == 2 else {"timm's windows have two axes"})
        wanted = {"FlexAttention (windows as batch)", "FlexAttention (windows as blocks)", "Swin's path, compiled"}
        assert wanted <= set(line.timings)

    @pytest.mark.parametrize("make", [gpu_cases.neighborhood, gpu_cases.window])
    def test_training(self, make, monkeypatch):
        eager(monkeypatch)
        case = SMALL if make is gpu_cases.neighborhood else SMALL_WINDOWS
        monkeypatch.setitem(gpu_cases.FLEX, (8, 12), [{}])
        line = verdicts(make(case, torch.float32, gpu_cases.BACKWARD))
        assert not line.refused
        assert {reason for name, reason in line.absent.items() if "Flex" in name} == {"FlexAttention has no backward on CPUs"}
        assert {name for name in but_for_timm(line) if "Flex" not in name and "NATTEN" not in name} == set()

    def test_three_axes(self):
        for train in (False, True):
            line = verdicts(window_problem(Case((4, 6, 6), (2, 3, 2), shift=(1, 0, 1), batch=2), torch.float32, train))
            assert set(line.timings) == {OURS, "Swin's path", "SDPA per window"}

    def test_natten_without_bias_by_its_own_names(self, monkeypatch):
        module = types.ModuleType("natten")
        module.na2d = lambda *tensors, backend, **pattern: natrpb.na2d(*tensors, **pattern)
        monkeypatch.setitem(sys.modules, "natten", module)
        problem = gpu_cases.neighborhood(SMALL, torch.float32, gpu_cases.BACKWARD, compiled=False, plain=False)
        line = verdicts(problem)
        assert {f"NATTEN, no bias ({backend})" for backend in gpu_cases.NATTEN_BACKENDS} <= set(line.timings)
        del module.na2d
        assert "older than 0.20" in verdicts(problem).absent["NATTEN, no bias (cutlass-fna)"]

    def test_a_whole_model(self, monkeypatch):
        eager(monkeypatch)
        monkeypatch.setattr(gpu_cases, "Captured", lambda runner: runner)
        problem = gpu_cases.model("nat_mini", torch.float32, 3, side=32, embed_dim=16, depths=(1, 1, 1, 1))
        line = verdicts(problem)
        assert not line.refused and not line.absent and line.items == 3
        assert set(line.timings) == {OURS, gpu_cases.GRAPH, "natrpb, compiled", "gather"}

    def test_a_whole_swin(self, monkeypatch):
        pytest.importorskip("timm", exc_type=ImportError)
        eager(monkeypatch)
        monkeypatch.setattr(gpu_cases, "Captured", lambda runner: runner)
        small = dict(embed_dim=16, depths=(1, 2), num_heads=(1, 2), window_size=4, num_classes=5)
        line = verdicts(gpu_cases.model("swin_tiny_patch4_window7_224", torch.float32, 3, side=64, **small))
        assert not line.refused and not line.absent
        assert {"timm", "timm, compiled", "gather"} <= set(line.timings)

    def test_a_contender_may_leave_inputs_out(self):
        problem = Problem(
            tensors={"x": torch.arange(1.0, 5), "bias": torch.ones(4)},
            dout=torch.ones(4),
            exact=autograd_results(lambda x, bias=0.0: 2 * x + bias),
            contenders=[
                Contender(OURS, lambda: lambda x, bias: 2 * x + bias),
                Contender("less", lambda: lambda x: 2 * x, without=("bias",)),
                Contender("wrong", lambda: lambda x: 2 * x + 1, without=("bias",)),
            ],
            flops=0,
            bytes=0,
            tolerance=1e-5,
        )
        line = verdicts(problem)
        assert set(line.timings) == {OURS, "less"} and "wrong result" in line.absent["wrong"]

    def test_the_gradients_alone(self):
        case = replace(SMALL, batch=1)
        problem = gpu_cases.neighborhood(case, torch.float64, gpu_cases.BACKWARD, compiled=False)
        assert problem.backward_alone
        runner = Runner(problem.contenders[0], problem)
        whole = runner()
        for name, gradient in zip(runner.leaves, runner.prepare()()):
            close(gradient, whole[name])


class TestOrders:
    def test_tile_after_tile(self):
        order = flex.Order((4, 6), (2, 3))
        rows, columns = (x.tolist() for x in order.coordinates(torch.arange(24)))
        assert rows[:12] == [0, 0, 0, 1, 1, 1] * 2 and columns[:12] == [0, 1, 2, 0, 1, 2, 3, 4, 5, 3, 4, 5]
        assert sorted(zip(rows, columns)) == [(i, j) for i in range(4) for j in range(6)]

    def test_layout_is_undone(self):
        x = torch.randn(2, 4, 6, 3, 5)
        layout = flex.Order((4, 6), (2, 3)).layout()
        packed = layout.pack({"query": x, "rpb": x})
        assert packed["rpb"] is x and packed["query"].shape == (2, 3, 24, 5)
        assert torch.equal(packed["query"][0, 1, 3], x[0, 1, 0, 1])
        assert torch.equal(layout.unpack({"query": packed["query"]})["query"], x)

    def test_tiles_must_divide_the_map(self):
        with pytest.raises(ValueError, match="tile must divide the map"):
            flex.Order((4, 6), (3, 3))

    @pytest.mark.parametrize("shift", [(0, 0, 0), (1, 0, 2)], ids=str)
    def test_partition_is_undone(self, shift):
        x = torch.randn(2, 4, 6, 9, 5)
        parts = windows.partition(x, (2, 3, 3), shift)
        assert parts.shape == (2 * 12, 18, 5)
        assert torch.equal(windows.reverse(parts, (2, 3, 3), shift, (4, 6, 9)), x)


class FakeClock:
    """A GPU's clock without one: a call takes what its name says, and a tenth of it to launch."""

    def __init__(self, costs: dict[str, float]) -> None:
        self.costs, self.order = costs, []

    def flush_for(self, runner):
        return 2

    def take(self, runner, count: int, passes: int) -> list[float]:
        assert passes == 2
        self.order.append((runner, count))
        return [self.costs[runner]] * count

    def take_together(self, runner, calls: int) -> float:
        self.order.append((runner, calls))
        return self.costs[runner]


class TestClock:
    def run(self, monkeypatch, costs, **options):
        clock, now = FakeClock(costs), [0.0]

        def elapsed(call):
            before = len(clock.order)
            result = call()
            seconds = sum(costs[name] * count for name, count in clock.order[before:])
            now[0] += seconds
            return result, seconds

        monkeypatch.setattr(gpu, "elapsed", elapsed)
        return clock, gpu.interleave({name: name for name in costs}, peaks={"fast": 7}, clock=clock, **options), now[0]

    def test_takes_turns_within_the_budget(self, monkeypatch):
        clock, timings, seconds = self.run(monkeypatch, {"fast": 0.001, "slow": 0.2}, budget=2.0)
        assert timings["fast"].samples == gpu.MOST_SAMPLES and timings["slow"].samples == gpu.LEAST_SAMPLES
        assert timings["fast"].median == 0.001 and timings["fast"].peak_bytes == 7 and timings["slow"].peak_bytes is None
        assert clock.order[2:6] == [("fast", 10), ("slow", 1)] * 2
        assert seconds < 2.0

    def test_exposed_calls_come_together(self, monkeypatch):
        clock, timings, _ = self.run(monkeypatch, {"fast": 0.00001, "slow": 1.0}, budget=0.1, exposed=True)
        assert timings["fast"].calls == 500 and timings["slow"].calls == 1
        assert ("fast", 500) in clock.order

    def test_what_nvidia_smi_does_not_tell_is_left_out(self):
        class Query:
            returncode = 0

            def communicate(self):
                return ("1980, [N/A], 41, 320.5\n", None)

        assert gpu.state_of(Query()) == {"sm_mhz": 1980.0, "celsius": 41.0, "watts": 320.5}
        assert gpu.state_of(None) == {}


class TestReport:
    def test_a_row(self):
        results = sample_results()
        assert gpu_report.cells(results.lines[0], LIMITS) == [
            "na", "100 (100)", "20", "2000", "50% (47%)", "1.0 (0.5)", "1980, -"
        ]  # fmt: skip
        assert gpu_report.cells(results.lines[1], LIMITS)[1:5] == ["20000 (20000)", "6400 images/s", "-", "-"]
        assert gpu_report.peers_of(results.lines[0]) == [
            "FlexAttention (8x8 tiles) 6x (600 us, 1.0 MB)",
            "natrpb, no bias 0.9x (90 us, 1.0 MB)",
        ]

    def test_goals(self):
        rows = {(name, goal): (measured, reached) for name, goal, measured, reached in gpu_report.goal_rows(sample_results())}
        assert rows == {
            ("na", "at least 45% of the floor"): ("50%", "yes"),
            ("na", "at least 7x as fast as FlexAttention"): ("6x", "**no**"),
            ("na", "at most 1.15x the time without a bias"): ("1.11x", "yes"),
            ("na", "at least 1.5x as fast as NATTEN, no bias"): ("not measured", "-"),
            ("model", "at least 6000 images/s"): ("6400 images/s", "yes"),
            ("wrong", "at least 50% of the floor"): ("refused", "-"),
        }

    def test_json_round_trip(self, tmp_path):
        results = sample_results()
        results.save(tmp_path / "results.json")
        assert Results.load(tmp_path / "results.json") == results

    def test_page(self, tmp_path, monkeypatch):
        page = tmp_path / "page.md"
        page.write_text("<!-- cpu results: begin -->\nold\n<!-- cpu results: end -->\n" * 2)
        page.write_text(page.read_text().replace("cpu", "cuda", 2))
        monkeypatch.setattr(command, "PAGE", page)
        sample_results().save(tmp_path / "results.json")
        assert command.main(["--write-docs", str(tmp_path / "results.json")]) == 0
        text = page.read_text()
        assert "| na | 100 (100) | 20 | 2000 | 50% (47%) |" in text and "| wrong | refused: wrong result |" in text
        assert "copy 4000 GB/s" in text and "before the run: SM 345 MHz, 30 °C" in text
        assert "| na | at least 45% of the floor | 50% | yes |" in text and "NATTEN did not run na: not here" in text
        rows = [row for row in text.splitlines() if row.startswith("| ")]
        assert {row.count(" | ") for row in rows} == {len(gpu_report.HEADINGS) - 1, len(gpu_report.GOAL_HEADINGS) - 1}
        assert text.count("old") == 1 and list(report.terminal_tables(sample_results()))

    def test_the_real_page_has_its_markers(self):
        text = command.PAGE.read_text()
        assert text.count("<!-- cuda results: begin -->") == text.count("<!-- cuda results: end -->") == 1

    def test_file_name(self):
        assert machine.slug(GPU) == "nvidia-h200"


class TestRun:
    @pytest.fixture
    def fake(self, monkeypatch):
        """A run that measures nothing: one line for every workload, and which were asked for."""
        asked = []

        def measure_one(workload, budget, without, clock):
            asked.append(workload.name)
            left = {name: gpu_run.LEFT_OUT for name in ("FlexAttention", "SDPA") if gpu_run.is_left_out(name, without)}
            return replace(line_of(), name=workload.name, absent=left)

        monkeypatch.setattr(gpu_run, "measure_one", measure_one)
        monkeypatch.setattr(gpu, "describe", lambda: GPU)
        monkeypatch.setattr(gpu, "yardsticks", lambda: LIMITS)
        monkeypatch.setattr(gpu, "Clock", lambda: None)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
        return asked

    workloads = [Workload(name, "First", lambda: None) for name in ("one", "two", "three")]
    console = Console(quiet=True)

    def test_is_continued(self, fake, tmp_path):
        path = tmp_path / "results.json"
        results, left = gpu_run.run(self.workloads[:2], 0.1, self.console, path)
        assert not left and results == Results.load(path)
        results, _ = gpu_run.run(self.workloads, 0.1, self.console, path)
        assert fake == ["one", "two", "three"] and [line.name for line in results.lines] == fake

    def test_lines_with_peers_left_out_are_measured_again(self, fake, tmp_path):
        path = tmp_path / "results.json"
        results, _ = gpu_run.run(self.workloads[:1], 0.1, self.console, path, without=["Flex", OURS])
        assert results.lines[0].absent == {"FlexAttention": gpu_run.LEFT_OUT}
        gpu_run.run(self.workloads[:1], 0.1, self.console, path, without=["FlexAttention"])
        assert fake == ["one"]
        results, _ = gpu_run.run(self.workloads[:1], 0.1, self.console, path)
        assert fake == ["one", "one"] and len(results.lines) == 1 and not results.lines[0].absent

    @pytest.mark.parametrize("failure", [ValueError("no such map\nat all"), torch.OutOfMemoryError("CUDA out of memory")])
    def test_a_line_that_fails_is_refused(self, failure):
        def make():
            raise failure

        line = gpu_run.measure_one(Workload("one", "First", make, goals={"floor": 0.5}), 0.1, (), None)
        assert line.refused == f"{type(failure).__name__}: {str(failure).splitlines()[0]}" and line.goals == {"floor": 0.5}

    def test_a_gpu_that_has_failed_ends_the_run(self):
        def make():
            raise RuntimeError("CUDA error: an illegal access")

        with pytest.raises(RuntimeError, match="an illegal access"):
            gpu_run.measure_one(Workload("one", "First", make), 0.1, (), None)

    def test_ends_in_time(self, fake):
        results, left = gpu_run.run(self.workloads, 0.1, self.console, minutes=-1.0)
        assert left == ["one", "two", "three"] and not results.lines

    def test_other_machines_and_commits_are_not_continued(self, fake, tmp_path, monkeypatch):
        path = tmp_path / "results.json"
        gpu_run.run(self.workloads[:1], 0.1, self.console, path)
        monkeypatch.setattr(machine, "commit", lambda: "another")
        with pytest.raises(ValueError, match=r"results\.json must be of this commit"):
            gpu_run.run(self.workloads, 0.1, self.console, path)

    def test_larger_yardsticks_count(self, fake, tmp_path, monkeypatch):
        path = tmp_path / "results.json"
        gpu_run.run(self.workloads[:1], 0.1, self.console, path)
        monkeypatch.setattr(gpu, "yardsticks", lambda: {"copy_gbytes": 4200.0, "matmul_tflops": 600.0})
        results, _ = gpu_run.run(self.workloads, 0.1, self.console, path)
        assert set(map(tuple, map(dict.values, results.yardsticks.values()))) == {(4200.0, 700.0)}

    def test_command(self, fake, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr(natrpb, "info", lambda: {"cuda": {"reason": None}, "build": None})
        monkeypatch.setattr(gpu_cases, "all_workloads", lambda: self.workloads)
        arguments = ["--device", "cuda", "--json", str(tmp_path / "results.json")]
        assert command.main([*arguments, "--minutes", "-1"]) == command.INCOMPLETE
        assert "not begun, for lack of time: one, two, three" in capsys.readouterr().out
        assert command.main(arguments) == 0 and fake == ["one", "two", "three"]

    @pytest.mark.parametrize(
        "arguments", [["--minutes", "3"], ["--without", "SDPA"], ["--device", "cuda", "--threads", "1"], ["--device", "tpu"]]
    )
    def test_wrong_options(self, arguments, capsys):
        with pytest.raises(SystemExit):
            command.main(arguments)
        assert re.search("go with --device|invalid choice: 'tpu'", capsys.readouterr().err)

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
    def test_without_a_gpu(self, capsys):
        assert command.main(["--device", "cuda", "--case", "forward"]) == 2
        assert "nothing to time: " in capsys.readouterr().out
