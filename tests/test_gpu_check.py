"""`make gpu-check`: what it runs, in which order, and what it tells; no GPU is needed for that."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys

import pytest
import torch

from benchmarks import __main__ as command_line
from benchmarks import gpu_check, gpu_launch

NCU = """==PROF== Connected to process 1
na-56x56 forward
"ID","Process ID","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value","Rule Name"
"0","1","void natrpb::cuda::mma::forward_kernel<__half, (int)32>(natrpb::cuda::mma::Params)","Speed","Duration","us","71.2",""
"0","1","void natrpb::cuda::mma::forward_kernel<__half, (int)32>(natrpb::cuda::mma::Params)","Speed","","","","A rule"
"0","1","void natrpb::cuda::mma::forward_kernel<__half, (int)32>(natrpb::cuda::mma::Params)","Launch","Grid Size","","1,024",""
"1","1","natrpb::cuda::(anonymous namespace)::reduce(float *, int)","Speed","Duration","us","3.4",""
"""


class TestCheck:
    def test_counters(self):
        assert gpu_check.kernels_of(NCU) == [
            {"name": "mma::forward_kernel<__half, (int)32>", "Duration": "71.2 us", "Grid Size": "1,024"},
            {"name": "reduce", "Duration": "3.4 us"},
        ]
        assert gpu_check.kernels_of("==ERROR== nothing was profiled") == []

    @pytest.fixture
    def recorded(self, monkeypatch):
        """Commands that would have been run; those with one of the words in `bad` fail."""
        commands, bad = [], []

        def run(*command, seconds=None, **environment):
            settings = [f"{name}={value}" for name, value in environment.items()]
            commands.append(" ".join([*settings, *command, *([f"within {seconds:.0f}"] if seconds else [])]))
            return next((status for word, status in bad if word in commands[-1]), 0)

        monkeypatch.setattr(gpu_check, "run", run)
        monkeypatch.setattr(gpu_check, "tool", lambda name: None)
        monkeypatch.setattr(gpu_check, "PROBE", "print('9.0 NVIDIA H200')")
        return commands, bad

    def test_all_parts(self, recorded, tmp_path, capsys):
        commands, _ = recorded
        assert gpu_check.main(["--results", str(tmp_path), "--", "-k", "some"]) == 0
        text = " ; ".join(commands)
        for part in (
            "CUDA_ARCH_LIST=9.0 ",
            "build_ext",
            "--device cuda",
            "tests/test_cuda.py -k some",
            "benchmarks --device cuda --json",
        ):
            assert part in text
        assert f"{tmp_path}/nvidia-h200-" in text
        said = capsys.readouterr().out
        assert "not done: compute-sanitizer is not installed" in said and "not done: ncu is not installed" in said

    def test_no_benchmark_after_a_failed_test(self, recorded, capsys):
        commands, bad = recorded
        bad.append(("pytest", 1))
        assert gpu_check.main(["--part", "bench", "--part", "tests", "--part", "sanitize"]) == 1
        said = capsys.readouterr().out
        assert "failed: tests/test_cuda.py" in said and "not done: bench: not after tests failed" in said
        assert not any("benchmarks" in each for each in commands)

    def test_nothing_after_a_failed_build(self, recorded, capsys):
        commands, bad = recorded
        bad.append(("build_ext", 1))
        assert gpu_check.main([]) == 1
        assert len(commands) == 1 and capsys.readouterr().out.count("not after build failed") == 4

    def test_a_benchmark_cut_short_is_no_failure(self, recorded, capsys, tmp_path):
        recorded[1].append(("--minutes 8.0", gpu_check.INCOMPLETE))
        assert gpu_check.main(["--part", "bench", "--minutes", "8", "--results", str(tmp_path)]) == 0
        assert "not done: benchmarks: time ran out" in capsys.readouterr().out
        assert gpu_check.INCOMPLETE == command_line.INCOMPLETE

    def test_sanitizers(self, recorded, monkeypatch):
        commands, bad = recorded
        monkeypatch.setattr(gpu_check, "tool", lambda name: "/bin/echo")
        bad.append(("racecheck", gpu_check.SANITIZER_FAILED))
        assert gpu_check.main(["--part", "sanitize"]) == 1
        assert ["--tool memcheck" in commands[0], "--tool racecheck" in commands[1]] == [True, True]

    def test_time_for_a_tool(self, recorded, monkeypatch, capsys):
        commands, bad = recorded
        monkeypatch.setattr(gpu_check, "tool", lambda name: "/bin/echo")
        bad.append(("racecheck", gpu_check.INTERRUPTED))
        assert gpu_check.main(["--part", "sanitize", "--part", "tests", "--sanitizer", "racecheck", "--seconds", "70"]) == 0
        assert len(commands) == 4 and all(command.endswith("within 70") for command in commands)
        assert "not done: compute-sanitizer racecheck: not all cases in 70 s" in capsys.readouterr().out

    def test_what_takes_too_long_is_interrupted(self):
        assert gpu_check.run(sys.executable, "-c", "raise SystemExit(7)", seconds=60) == 7
        assert gpu_check.run(sys.executable, "-c", "import time; time.sleep(60)", seconds=1) == gpu_check.INTERRUPTED

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
    def test_without_a_gpu(self, capsys):
        assert gpu_check.main(["--part", "tests"]) == 2
        assert "torch finds no GPU" in capsys.readouterr().err

    @pytest.mark.parametrize("worker", [{}, {"PYTEST_XDIST_WORKER": "gw0"}], ids=["alone", "worker"])
    def test_a_gpu_that_has_failed_ends_the_tests(self, worker, tmp_path):
        """It answers nothing more: all that came after would fail as well."""
        path = tmp_path / "test_failing.py"
        failing = "def test_first():\n    raise RuntimeError('CUDA error: an illegal access')\n"
        path.write_text(f"{failing}\n\ndef test_second():\n    pass\n")
        command = [sys.executable, "-m", "pytest", "-v", "-p", "tests.conftest", "-p", "no:cacheprovider", str(path)]
        environment = {name: value for name, value in os.environ.items() if name != "PYTEST_XDIST_WORKER"} | worker
        run = subprocess.run(command, cwd=gpu_check.ROOT, capture_output=True, text=True, env=environment)
        assert run.returncode == 3 and "test_second" not in run.stdout
        assert "test_first: " in run.stderr and "an illegal access" in run.stderr

    def test_counters_are_kept(self, recorded, monkeypatch, tmp_path):
        monkeypatch.setattr(gpu_check, "tool", lambda name: "ncu")

        def run(*command, **environment):
            with open(command[command.index("--log-file") + 1], "w") as log:
                log.write(NCU)
            return 0

        monkeypatch.setattr(gpu_check, "run", run)
        assert gpu_check.main(["--part", "ncu", "--case", "a case", "--results", str(tmp_path / "new")]) == 0
        (path,) = (tmp_path / "new").iterdir()
        assert json.loads(path.read_text())["a case"][1] == {"name": "reduce", "Duration": "3.4 us"}

    def test_small_cases_have_every_feature(self):
        cases = gpu_launch.small_cases()
        patterns = [case.pattern for case in cases]
        assert {case.ndim for case in cases} == {1, 2, 3}
        assert any(math.prod(p.stride) > 1 for p in patterns) and any(math.prod(p.dilation) > 1 for p in patterns)
        assert {kind for pattern in patterns for kind in pattern.kind} == {0, 1, 2}
        assert any(case.kernel_size == 7 and case.head_dim == 32 for case in cases)

    def test_cases_by_name(self):
        name = gpu_check.WATCHED[0]
        assert [workload.name for workload in gpu_launch.named(name)] == [name]
        assert len(gpu_launch.named("K13")) == 2
