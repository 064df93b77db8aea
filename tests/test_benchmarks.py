"""The benchmark suite: which samples count, what is refused, and what is written; no timing decides anything here."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import subprocess
import sys
import types

import pytest
import torch
from rich.console import Console
from torch.profiler import ProfilerActivity, profile

import natrpb
from benchmarks import __main__ as command
from benchmarks import machine, peers, plots, report
from benchmarks.cases import all_workloads, quick_workloads
from benchmarks.harness import (
    OURS,
    Contender,
    Line,
    Problem,
    Runner,
    Unavailable,
    Workload,
    autograd_results,
    exact_results,
    measure,
)
from benchmarks.models import attention_share, make_problem
from benchmarks.problems import (
    attention_bytes,
    block_problem,
    cosine_problem,
    neighborhood_problem,
    pairs_of,
    projected_problem,
    unfused_problem,
    useful_flops,
    window_problem,
)  # fmt: skip
from benchmarks.report import Results
from benchmarks.timing import Pace, Sample, Timing, interleave, is_disturbed, peak_memory, summarize, take_sample

from .cases import Case
from .support import needs_compiled

SMALL = Case((9, 8), 3, heads=2, head_dim=8)


class TestSummarize:
    def test_median_and_minimum(self):
        timing = summarize([Sample(seconds, 0) for seconds in (3.0, 2.0, 2.5, 2.2)], calls=7, peak_bytes=5)
        assert (timing.minimum, timing.median, timing.rejected, timing.samples) == (2.0, 2.35, 0, 4)
        assert (timing.calls, timing.peak_bytes) == (7, 5)

    def test_samples_far_above_the_minimum_do_not_count(self):
        timing = summarize([Sample(seconds, 0) for seconds in (1.0, 1.2, 1.4, 9.0, 2.1)])
        assert (timing.median, timing.rejected) == (1.2, 2)
        assert timing.median_of_all == 1.4

    def test_a_context_switch_makes_a_slow_sample_suspect_and_a_fast_one_not(self):
        assert is_disturbed(Sample(1.2, 1), minimum=1.0)
        assert not is_disturbed(Sample(1.05, 1), minimum=1.0)
        assert not is_disturbed(Sample(1.2, 0), minimum=1.0)

    def test_the_minimum_always_counts(self):
        assert summarize([Sample(1.0, 5)]).median == 1.0


class Clock:
    """Takes samples without time: every call costs what it is told to."""

    def __init__(self, costs: dict[str, float]) -> None:
        self.costs, self.order = costs, []

    def calls(self):
        return {name: lambda name=name: name for name in self.costs}

    def sample(self, call, calls: int) -> Sample:
        self.order.append((call(), calls))
        return Sample(self.costs[call()], 0)


class TestInterleave:
    def test_samples_below_full_pace_do_not_count(self):
        pace = Pace()
        pace.fastest = 1.0
        samples = [Sample(1.0, 0, 1.1), Sample(1.2, 0, 1.0), Sample(0.9, 0, 2.0), Sample(1.5, 0, 1.9)]
        timing = summarize(samples, pace=pace)
        assert (timing.median, timing.minimum, timing.samples, timing.rejected) == (1.1, 1.0, 4, 2)

    def test_without_any_at_full_pace_all_are_used_and_called_rejected(self):
        pace = Pace()
        pace.fastest = 1.0
        timing = summarize([Sample(1.5, 0, 2.0), Sample(1.7, 0, 3.0)], pace=pace)
        assert (timing.median, timing.samples, timing.rejected) == (1.6, 2, 2)

    def test_pace_remembers_its_fastest(self):
        pace = Pace()
        times = [pace() for _ in range(5)]
        assert pace.fastest == min(times) > 0

    def test_takes_turns_and_gives_fast_calls_more_of_them(self):
        clock = Clock({"fast": 0.01, "slow": 0.1})
        timings = interleave(clock.calls(), budget=1.0, sample=clock.sample)
        names = "".join(name[0] for name, _ in clock.order)
        assert re.search("f{10}s+f{10}s", names.replace("ss", "s")), names
        assert timings["slow"].samples == 5 and timings["fast"].samples >= 50
        assert timings["fast"].median == 0.01

    def test_repeats_short_calls_within_a_sample(self):
        clock = Clock({"short": 0.0001, "long": 0.2})
        timings = interleave(clock.calls(), budget=0.1, sample=clock.sample)
        assert timings["short"].calls == 20 and timings["long"].calls == 1

    def test_keeps_to_its_budget_but_for_a_few_samples(self):
        clock = Clock({"a": 0.4, "b": 2.0})
        timings = interleave(clock.calls(), budget=0.1, sample=clock.sample)
        assert 3 <= timings["a"].samples <= 10
        assert timings["b"].samples == 2

    def test_with_the_real_clock(self):
        timing = interleave({"sum": lambda: sum(range(100))}, budget=0.01)["sum"]
        assert 0 < timing.minimum <= timing.median and timing.samples >= 3
        assert take_sample(lambda: None).seconds >= 0


def test_peak_memory_sees_what_a_call_allocates():
    grown = peak_memory(lambda: torch.ones(1 << 22).sum())  # 16 MiB
    if grown is None:
        pytest.skip("only Linux tells the high-water mark")
    assert 12 << 20 < grown < 64 << 20


def double(x):
    return x * 2


def problem_of(*contenders: Contender, dout=None) -> Problem:
    return Problem(
        tensors={"x": torch.arange(1.0, 5)},
        dout=dout,
        exact=autograd_results(double),
        contenders=[Contender(OURS, lambda: double), *contenders],
        flops=4,
        bytes=32,
        tolerance=1e-5,
    )


def fixed_timer(runners, budget, peaks) -> dict[str, Timing]:
    """Every call takes a second, the next one a second more."""
    return {name: Timing(i, i, i, samples=3, rejected=0, calls=1, peak_bytes=peaks[name]) for i, name in enumerate(runners, 1)}


def measured(problem: Problem, timer=fixed_timer) -> Line:
    threads = torch.get_num_threads()
    workload = Workload("a case", "A group", lambda: problem)
    line = measure(workload, threads, 0.0, problem, exact_results(problem), timer)
    assert torch.get_num_threads() == threads
    return line


def unavailable():
    raise Unavailable("no such thing here")


class TestMeasure:
    def test_times_what_is_right(self):
        line = measured(problem_of(Contender("peer", lambda: lambda x: x + x)))
        assert list(line.timings) == [OURS, "peer"] and not line.absent and not line.refused
        assert line.ratio("peer") == 2.0

    def test_a_wrong_peer_is_not_timed(self):
        line = measured(problem_of(Contender("peer", lambda: lambda x: x * 2.001)))
        assert list(line.timings) == [OURS]
        assert "wrong result" in line.absent["peer"]

    @pytest.mark.parametrize("wrong", [lambda x: x * 2.001, lambda x: x * math.nan, lambda x: (x * 2)[:2]])
    def test_ours_being_wrong_refuses_the_line(self, wrong):
        problem = problem_of(Contender("peer", lambda: double))
        problem.contenders[0] = Contender(OURS, lambda: wrong)
        line = measured(problem, timer=None)  # never called
        assert "wrong result" in line.refused and not line.timings

    def test_a_wrong_gradient_counts(self):
        detached = Contender("peer", lambda: lambda x: (x * 2).detach() + x - x.detach())
        assert "peer" in measured(problem_of(detached)).timings
        assert "wrong result" in measured(problem_of(detached, dout=torch.ones(4))).absent["peer"]

    def test_a_peer_that_cannot_run_is_listed_with_the_reason(self):
        def fails():
            return lambda x: x @ torch.ones(3)

        line = measured(problem_of(Contender("peer", unavailable), Contender("other", fails)))
        assert line.absent["peer"] == "no such thing here"
        assert line.absent["other"].startswith("RuntimeError: ")


@needs_compiled
class TestProblems:
    """Every contender that runs here passes the check that precedes timing."""

    @pytest.mark.parametrize("train", [False, True], ids=["forward", "backward"])
    @pytest.mark.parametrize(
        "problem",
        [
            pytest.param(lambda train: neighborhood_problem(SMALL, torch.float32, train, PEERS), id="neighborhood"),
            pytest.param(
                lambda train: neighborhood_problem(
                    Case((9, 8), (3, 2), is_causal=(True, False), dilation=(2, 1)),
                    torch.float32,
                    train,
                    ("gather", "SDPA"),
                ),
                id="causal",
            ),
            pytest.param(
                lambda train: neighborhood_problem(Case((5, 6, 4), 3), torch.bfloat16, train, ("in fp32", *PEERS)), id="bf16"
            ),
            pytest.param(lambda train: window_problem(Case((8, 12), 4, shift=0), torch.float32, train), id="window"),
            pytest.param(lambda train: window_problem(Case((8, 12), 4, shift=2, batch=2), torch.float32, train), id="shifted"),
            pytest.param(lambda train: window_problem(Case((8, 12), 4, shift=2), torch.bfloat16, train), id="window-bf16"),
            pytest.param(lambda train: projected_problem(Case((9, 8), 3), torch.float32, train), id="projected"),
            pytest.param(
                lambda train: projected_problem(Case((8, 12), 4, shift=2, batch=2), torch.float32, train),
                id="projected-window",
            ),
            pytest.param(lambda train: block_problem(Case((8, 12), 4, shift=2, batch=2), torch.float32, train), id="block"),
            pytest.param(lambda train: cosine_problem(Case((8, 12), 4, shift=2, batch=2), torch.float32, train), id="cosine"),
            pytest.param(lambda train: cosine_problem(Case((8, 12), 4, shift=2), torch.bfloat16, train), id="cosine-bf16"),
            pytest.param(lambda train: unfused_problem(SMALL, torch.float32, train, "qk"), id="qk"),
            pytest.param(lambda train: unfused_problem(SMALL, torch.float32, train, "av"), id="av"),
        ],
    )
    def test_contenders_agree(self, problem, train):
        line = measured(problem(train))
        assert not line.refused
        assert len(line.timings) > 1
        assert {name for name in line.absent if name not in ("NATTEN", "timm")} == set()

    def test_a_whole_model(self):
        problem = make_problem("nat_mini", 1, train=True, side=32, embed_dim=16, depths=(1, 1, 1, 1))
        line = measured(problem)
        assert list(line.timings) == [OURS, "gather"] and 0 < line.attention_share < 1

    def test_a_whole_model_with_the_plain_op_runs_none_of_ours(self):
        problem = make_problem("nat_mini", 1, train=True, side=32, embed_dim=16, depths=(1, 1, 1, 1))
        ours, gather = (Runner(contender, problem) for contender in problem.contenders)
        seen = []
        for run in (ours, gather):
            with profile(activities=[ProfilerActivity.CPU]) as profiled:
                run()
            seen.append({event.name for event in profiled.events() if event.name.startswith("natrpb::")})
        assert "natrpb::local_attention_qkvpacked_backward" in seen[0] and not seen[1]

    @pytest.mark.parametrize("train", [False, True], ids=["forward", "backward"])
    def test_a_whole_swin(self, train):
        pytest.importorskip("timm", exc_type=ImportError)
        small = dict(embed_dim=16, depths=(2, 2), num_heads=(1, 2), window_size=4, num_classes=5)
        line = measured(make_problem("swin_tiny_patch4_window7_224", 2, train, side=64, **small))
        assert list(line.timings) == [OURS, "gather", "timm"] and 0 < line.attention_share < 1

    def test_natten_by_its_own_names(self, monkeypatch):
        module = types.ModuleType("natten.functional")
        module.na2d_qk, module.na2d_av = natrpb.na2d_qk, natrpb.na2d_av
        monkeypatch.setitem(sys.modules, "natten", types.ModuleType("natten"))
        monkeypatch.setitem(sys.modules, "natten.functional", module)
        assert "NATTEN" in measured(neighborhood_problem(SMALL, torch.float32, True, ("NATTEN",))).timings
        del module.na2d_qk
        with pytest.raises(Unavailable, match=r"0\.20"):
            peers.natten(SMALL).build()

    def test_attention_share_of_a_call_that_is_nothing_else(self):
        query = torch.randn(1, 28, 28, 2, 32)
        assert 0 < attention_share(lambda: natrpb.na2d(query, query, query, 7)) <= 1

    def test_yardsticks(self):
        limits = machine.yardsticks(1, seconds=0.001)
        assert set(limits) == {"fma_gflops", "copy_gbytes", "triad_gbytes"} and min(limits.values()) > 0


PEERS = ("gather", "unfold", "SDPA", "NATTEN")


def test_timm_is_a_peer_outside_of_the_tests_too():
    """There it must be imported beside a CPU torch without the help of conftest.py."""
    pytest.importorskip("timm", exc_type=ImportError)
    script = "from benchmarks.timm_import import timm_module; print(timm_module('timm.models.swin_transformer').__name__)"
    process = subprocess.run([sys.executable, "-c", script], cwd=machine.ROOT, capture_output=True, text=True)
    assert process.stdout.strip() == "timm.models.swin_transformer", process.stderr


def test_without_timm_its_lines_say_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm.models.swin_transformer", None)
    line = measured(block_problem(Case((8, 12), 4, shift=2), torch.float32, False))
    assert line.absent["timm"] == "timm does not import (ModuleNotFoundError)"


def test_flops_and_bytes():
    assert useful_flops(10, 32, train=False) == 4 * 10 * 32
    assert useful_flops(10, 32, train=True) == 3.5 * 4 * 10 * 32
    assert attention_bytes(10, 4, train=False) == 160
    assert pairs_of(Case((14, 14), 7, batch=3, heads=2)) == 3 * 2 * 196 * 49
    assert pairs_of(Case((5,), 3, is_causal=True, heads=1)) == 1 + 2 + 3 + 3 + 3


def test_workloads_have_distinct_names():
    for workloads in (all_workloads(), quick_workloads()):
        names = [workload.name for workload in workloads]
        assert len(set(names)) == len(names)


def sample_results() -> Results:
    timing = Timing(0.002, 0.0015, 0.0021, samples=9, rejected=1, calls=2, peak_bytes=3_000_000)
    slow = Timing(0.2, 0.19, 0.2, samples=3, rejected=0, calls=1)
    lines = [
        Line("na one", "First", threads, 10**8, 10**7, timings={OURS: timing, "SDPA": slow}, absent={"NATTEN": "not | here"})
        for threads in (1, 2)
    ]
    lines += [
        Line(f"map {x}", "Scaling", 1, 10**8, 10**7, "map side", float(x), {OURS: Timing(x**2, x**2, x**2, 3, 0, 1)})
        for x in (7, 14, 28)
    ]
    lines.append(Line("na two", "First", 1, refused="wrong result"))
    limits = {"fma_gflops": 100.0, "copy_gbytes": 10.0, "triad_gbytes": 20.0}
    return Results("2026-01-02", "abc+", machine.describe(), {"torch": "2.x"}, {1: limits, 2: limits}, lines)


class TestReport:
    def test_json_round_trip(self, tmp_path):
        results = sample_results()
        results.save(tmp_path / "deeper" / "results.json")
        assert Results.load(tmp_path / "deeper" / "results.json") == results

    @pytest.mark.parametrize("text", ["{}", "[]", "nonsense", '{"lines": [], "yardsticks": {}, "extra": 1}'])
    def test_other_files_are_no_results(self, text, tmp_path):
        (tmp_path / "other.json").write_text(text)
        with pytest.raises(ValueError, match=r"other\.json must be a results file"):
            Results.load(tmp_path / "other.json")

    def test_of_a_limit_the_larger_reading_counts(self):
        results = dataclasses.replace(sample_results(), yardsticks={})
        results.add_yardsticks(2, {"fma_gflops": 90.0, "copy_gbytes": 11.0})
        results.add_yardsticks(2, {"fma_gflops": 100.0, "copy_gbytes": 10.0})
        results.add_yardsticks(1, {"fma_gflops": 50.0, "copy_gbytes": 9.0})
        assert results.yardsticks == {
            2: {"fma_gflops": 100.0, "copy_gbytes": 11.0},
            1: {"fma_gflops": 50.0, "copy_gbytes": 9.0},
        }

    def test_a_row(self):
        results = sample_results()
        assert report.cells(results.lines[0], results.yardsticks[1]) == [
            "na one", "1", "2 (1.5)", "50 (50%)", "5 (25%)", "3.0"
        ]  # fmt: skip
        assert report.peers_of(results.lines[0]) == ["SDPA 100x (200 ms, - MB)"]

    def test_page(self, tmp_path):
        page = tmp_path / "page.md"
        page.write_text("before\n<!-- cpu results: begin -->\nold\n<!-- cpu results: end -->\nafter\n")
        results = sample_results()
        report.write_docs(results, page, "![a plot](plot.svg)\n")
        once = page.read_text()
        report.write_docs(results, page, "![a plot](plot.svg)\n")
        assert page.read_text() == once, "writing twice changes nothing"
        assert once.startswith("before\n") and once.endswith("\nafter\n") and "old" not in once
        assert "| na one | 1 | 2 (1.5) | 50 (50%) | 5 (25%) | 3.0 | SDPA 100x (200 ms, - MB) |" in once
        assert "NATTEN did not run na one: not | here" in once
        assert "refused: wrong result" in once and "![a plot](plot.svg)" in once

    def test_page_without_markers(self, tmp_path):
        (tmp_path / "page.md").write_text("nothing")
        with pytest.raises(ValueError, match=r"page\.md must hold"):
            report.write_docs(sample_results(), tmp_path / "page.md")

    def test_the_real_page_has_its_markers(self):
        text = command.PAGE.read_text()
        assert text.count("<!-- cpu results: begin -->") == text.count("<!-- cpu results: end -->") == 1

    def test_names_lines_measured_under_disturbance(self):
        line = Line("noisy", "First", 2, timings={OURS: Timing(1, 1, 1, samples=10, rejected=5, calls=1)})
        assert report.disturbance([line]) == (10, 5, ["noisy, 2 threads"])

    def test_the_machine_is_described_without_naming_it(self):
        text = json.dumps([machine.describe(), machine.versions(), machine.commit()])
        assert machine.platform.node() not in text and str(machine.ROOT) not in text

    def test_kept_memory_costs_no_page_faults(self):
        script = (
            "import resource, torch\nfrom benchmarks import machine\n"
            "faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
            "assert machine.keep_freed_memory()\nfor _ in range(3): torch.ones(1 << 22)\nbefore = faults()\n"
            "for _ in range(5): torch.ones(1 << 22)\nprint(faults() - before)"
        )
        process = subprocess.run([sys.executable, "-c", script], cwd=machine.ROOT, capture_output=True, text=True)
        assert process.returncode == 0, process.stderr
        assert int(process.stdout) < 1000  # of 4096 pages that each tensor takes

    @needs_compiled
    def test_memory_that_cannot_be_kept_is_not_measured_silently(self, monkeypatch, capsys):
        monkeypatch.setattr(machine, "keep_freed_memory", lambda: False)
        assert command.main(["--keep-memory", "--quick", "--case", "na-14x14"]) == 2
        assert "--keep-memory needs" in capsys.readouterr().out

    def test_file_name_of_a_machine(self):
        given = {"device": "cpu", "name": "Intel(R) Xeon(R) CPU @ 2.10GHz", "cores": 2, "isa": "avx512"}
        assert machine.slug(given) == "intel-xeon-2.10ghz-2c-avx512"


class TestPlots:
    def test_slope(self):
        assert plots.slope([(x, 3 * x**2) for x in (1, 2, 5)]) == pytest.approx(2)
        with pytest.raises(ValueError, match="two different x"):
            plots.slope([(1, 2), (1, 3)])

    def test_one_file_for_every_quantity_the_same_every_time(self, tmp_path):
        written = plots.draw(sample_results(), tmp_path)
        assert [path.name for path in written] == ["scaling-map-side.svg", "scaling-threads.svg"]
        first = written[0].read_text()
        plots.draw(sample_results(), tmp_path)
        assert "grows with tokens to the power 1.00" in first
        assert written[0].read_text() == first


class TestCommand:
    def test_list(self, capsys):
        assert command.main(["--list", "--case", "K13"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines and all("K13" in line for line in lines)

    def test_patterns(self):
        workloads = [Workload(name, "", lambda: None) for name in ("na-7 forward", "window-7 forward")]
        assert command.chosen(workloads, None) == workloads
        assert command.chosen(workloads, ["na-*"]) == workloads[:1]
        assert command.chosen(workloads, ["dow", "na-7 f"]) == workloads

    def test_no_such_case(self):
        assert command.main(["--case", "no such case"]) == 2

    def test_thread_counts(self, capsys):
        assert command.thread_counts("2,1,2") == [1, 2]
        for wrong in ("0", "1,x", ""):
            with pytest.raises(SystemExit):
                command.main(["--threads", wrong])
        assert "positive integers" in capsys.readouterr().err

    def test_write_docs(self, tmp_path, monkeypatch):
        (tmp_path / "page.md").write_text("<!-- cpu results: begin -->\n<!-- cpu results: end -->")
        monkeypatch.setattr(command, "PAGE", tmp_path / "page.md")
        sample_results().save(tmp_path / "results.json")
        assert command.main(["--write-docs", str(tmp_path / "results.json")]) == 0
        text = (tmp_path / "page.md").read_text()
        assert "![scaling map side](images/benchmarks/scaling-map-side.svg)" in text
        assert (tmp_path / "images/benchmarks/scaling-map-side.svg").exists()

    def test_limits_are_read_before_every_group(self, monkeypatch):
        readings = iter((90.0, 100.0))
        monkeypatch.setattr(machine, "yardsticks", lambda threads: {"fma_gflops": next(readings)})
        monkeypatch.setattr(command, "exact_results", lambda problem: {})
        monkeypatch.setattr(command, "measure", lambda workload, *_: sample_results().lines[0])
        workloads = [Workload(name, group, lambda: None) for name, group in (("a", "one"), ("b", "one"), ("c", "two"))]
        results = command.run(workloads, [1], 0.1, Console(quiet=True))
        assert results.yardsticks == {1: {"fma_gflops": 100.0}} and len(results.lines) == 3
        assert next(readings, None) is None

    def test_a_refused_line_ends_in_an_error(self, monkeypatch, tmp_path, capsys):
        results = sample_results()
        monkeypatch.setattr(command, "run", lambda *_: results)
        monkeypatch.setattr(command.natrpb, "info", lambda: {"reason": None})
        assert command.main(["--quick", "--json", str(tmp_path / "results.json")]) == 1
        assert "refused: wrong result" in capsys.readouterr().out
        assert Results.load(tmp_path / "results.json").refused
