"""From a problem and its contenders to a line of the table: everything is checked first, then timed side by side."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .timing import Timing, interleave, peak_memory

OURS = "natrpb"
Tensors = dict[str, Tensor]
# Largest absolute error over largest absolute value, each tensor for itself. Peers add up in other orders.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3}


class Unavailable(Exception):
    """A peer cannot run a case; the message says why."""


@dataclass(frozen=True)
class Layout:
    """How a contender wants its tensors: `pack` makes them from the problem's, `unpack` returns results to that form.

    `pack` gets the inputs and the output's gradient, "dout"; `unpack` gets "out" and the inputs' gradients. Neither is timed.
    """

    pack: Callable[[Tensors], Tensors]
    unpack: Callable[[Tensors], Tensors]


AS_IS = Layout(dict, dict)


@dataclass(frozen=True)
class Contender:
    """One way to compute a problem.

    Attributes:
        name: as it stands in the table.
        build: returns the function to time, called with the packed inputs by name; may raise `Unavailable`.
        layout: the form of its tensors.
        without: inputs that it does not take; it computes, and is checked for, the same function without them.
        wrap: makes what is checked and timed of its `Runner`.
        checked: whether its results must be right; False for a yardstick that leaves a part of the work out.
    """

    name: str
    build: Callable[[], Callable[..., Tensor]]
    layout: Layout = AS_IS
    without: tuple[str, ...] = ()
    wrap: Callable[[Runner], Runner] | None = None
    checked: bool = True


@dataclass(frozen=True)
class Problem:
    """What the contenders compute.

    Attributes:
        tensors: inputs by name, in one floating dtype.
        dout: the output's gradient; None to time the forward pass alone.
        exact: fp64 inputs and dout to "out" and, with a dout, the gradients of all inputs.
        contenders: ours first.
        flops: multiply-adds that the result needs, counted twice.
        bytes: what must be read and written at least.
        tolerance: largest relative error allowed.
        attention_share: the part of our time that is spent in the library's ops; None where it is nothing else.
        backward_alone: time the gradients without the forward pass that comes before them (on GPUs only).
        exposed: time calls back to back, with the time that it takes to launch them (on GPUs only).
        items: images of a batch; None where throughput says nothing.
    """

    tensors: Tensors
    dout: Tensor | None
    exact: Callable[[Tensors, Tensor | None], Tensors]
    contenders: list[Contender]
    flops: int
    bytes: int
    tolerance: float
    attention_share: Callable[[Callable[[], object]], float] | None = None
    backward_alone: bool = False
    exposed: bool = False
    items: int | None = None


@dataclass(frozen=True)
class Workload:
    """An entry of the benchmark: how to make its problem, and where it stands in the report."""

    name: str
    group: str
    make: Callable[[], Problem]
    sweep: str | None = None  # the quantity that a scaling plot varies
    x: float | None = None  # its value here
    goals: Mapping[str, float] = field(default_factory=dict)  # what is to be reached here, see `benchmarks.gpu_report`


def chosen(workloads: list[Workload], patterns: Sequence[str] | None) -> list[Workload]:
    """The workloads whose name matches, or contains, one of the patterns; all without patterns."""

    def matches(name: str) -> bool:
        return any(pattern in name or fnmatch.fnmatchcase(name, pattern) for pattern in patterns)

    return [workload for workload in workloads if not patterns or matches(workload.name)]


@dataclass
class Line:
    """One workload at one thread count."""

    name: str
    group: str
    threads: int
    flops: int = 0
    bytes: int = 0
    sweep: str | None = None
    x: float | None = None
    timings: dict[str, Timing] = field(default_factory=dict)  # ours and the peers that ran
    absent: dict[str, str] = field(default_factory=dict)  # peers that did not, and why
    refused: str | None = None  # why nothing is reported
    attention_share: float | None = None
    items: int | None = None  # images of a batch
    result_bytes: int = 0  # of our output and gradients
    goals: dict[str, float] = field(default_factory=dict)
    state: dict[str, float] = field(default_factory=dict)  # of the GPU while it was timed: clocks, temperature, power

    @property
    def ours(self) -> Timing:
        return self.timings[OURS]

    def ratio(self, peer: str) -> float:
        """How many times as long as ours the peer takes, median over median."""
        return self.timings[peer].median / self.ours.median

    @classmethod
    def from_dict(cls, given: dict) -> Line:
        return cls(**{**given, "timings": {name: Timing(**timing) for name, timing in given["timings"].items()}})

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)


class Runner:
    """A contender with its own copy of the inputs; calling it computes the result, and the gradients if there is a dout."""

    def __init__(self, contender: Contender, problem: Problem) -> None:
        given = {name: x for name, x in problem.tensors.items() if name not in contender.without}
        if problem.dout is not None:
            given["dout"] = problem.dout
        with next(iter(given.values())).device:
            self.function = contender.build()
        self.layout = contender.layout
        self.backward_alone = problem.backward_alone
        packed = self.layout.pack(given)
        self.dout = packed.pop("dout", None)
        self.leaves = {name: tensor.detach().requires_grad_(self.dout is not None) for name, tensor in packed.items()}

    def __call__(self) -> Tensors:
        if self.dout is None:
            with torch.no_grad():
                return {"out": self.function(**self.leaves)}
        out = self.function(**self.leaves)
        gradients = torch.autograd.grad(out, list(self.leaves.values()), self.dout)
        return {"out": out.detach(), **dict(zip(self.leaves, gradients))}

    def prepare(self) -> Callable[[], object]:
        """What is to be timed; where that is the gradients alone, the forward pass has then been done."""
        if not self.backward_alone:
            return self
        out, leaves = self.function(**self.leaves), list(self.leaves.values())
        return lambda: torch.autograd.grad(out, leaves, self.dout)

    def error(self, exact: Tensors) -> float:
        """The largest error of any result, relative to the largest value of the same tensor; inf for NaN."""
        results = self.layout.unpack(self())
        return max(relative_error(results[name], exact[name]) for name in exact)


def relative_error(given: Tensor, exact: Tensor) -> float:
    if given.shape != exact.shape:
        return float("inf")
    finite = exact.isfinite()  # a score may be -inf where a slot holds no key
    if not torch.equal(given.double()[~finite], exact[~finite]):
        return float("inf")
    error = ((given.double() - exact)[finite].abs().max() / exact[finite].abs().max().clamp(min=1e-30)).item()
    return error if error == error else float("inf")


def exact_results(problem: Problem, without: tuple[str, ...] = ()) -> Tensors:
    """The fp64 answer for the problem's (already rounded) inputs, or for those of them that are not left out."""
    tensors = {name: tensor.double() for name, tensor in problem.tensors.items() if name not in without}
    with next(iter(tensors.values())).device:  # index tables, too
        return problem.exact(tensors, None if problem.dout is None else problem.dout.double())


def autograd_results(function: Callable[..., Tensor]) -> Callable[[Tensors, Tensor | None], Tensors]:
    """Makes a `Problem.exact` of a differentiable function of the inputs."""

    def exact(tensors: Tensors, dout: Tensor | None) -> Tensors:
        leaves = {name: tensor.detach().requires_grad_(dout is not None) for name, tensor in tensors.items()}
        with torch.set_grad_enabled(dout is not None):
            out = function(**leaves)
        if dout is None:
            return {"out": out}
        gradients = torch.autograd.grad(out, list(leaves.values()), dout)
        return {"out": out.detach(), **dict(zip(leaves, gradients))}

    return exact


def measure(
    workload: Workload,
    threads: int,
    budget: float,
    problem: Problem,
    exact: Mapping[str, Tensor],
    timer: Callable[..., dict[str, Timing]] = interleave,
    memory: Callable[[Runner], int | None] = peak_memory,
) -> Line:
    """Checks every contender against the exact results, then times those that passed.

    Ours failing its check refuses the whole line; a peer that fails, or cannot run, is listed with the reason.
    """
    line = Line(workload.name, workload.group, threads, problem.flops, problem.bytes, workload.sweep, workload.x)
    line.goals, line.items = dict(workload.goals), problem.items
    torch.set_num_threads(threads)
    answers = {(): exact}
    runners: dict[str, Runner] = {}
    for contender in problem.contenders:
        try:
            if contender.without not in answers:
                answers[contender.without] = exact_results(problem, contender.without)
            runner = Runner(contender, problem)
            if contender.wrap:
                runner = contender.wrap(runner)
            error = runner.error(answers[contender.without]) if contender.checked else 0.0 * len(runner())
        except Unavailable as reason:
            verdict = str(reason)
        except Exception as failure:  # whatever stops a peer is news about the peer, not the end of the run
            verdict = f"{type(failure).__name__}: {first_line(failure)}"
        else:
            if error <= problem.tolerance:
                runners[contender.name] = runner
                continue
            verdict = f"wrong result, relative error {error:.1e} where {problem.tolerance:.0e} is allowed"
        if contender.name == OURS:
            line.refused = verdict
            return line
        line.absent[contender.name] = verdict
    line.result_bytes = sum(x.numel() * x.element_size() for x in runners[OURS]().values())
    peaks = {name: memory(runner) for name, runner in runners.items()}
    line.timings = timer(runners, budget, peaks)
    if problem.attention_share is not None:
        line.attention_share = problem.attention_share(runners[OURS])
    return line


def first_line(failure: Exception) -> str:
    lines = str(failure).strip().splitlines()
    return lines[0][:120] if lines else "no message"
