"""Every implementation against the maths of a Reduce in fp64, and bitwise the same on every rank."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from perf.kernels.ours import SITE, Ours
from perf.kernels.problem import Problem, drawn
from tokenweave.comm.group import Ranks
from tokenweave.comm.norm import Norm
from tokenweave.engine.fetch import Fetch
from tokenweave.weave.request import Reduce, Rows

# Of a few roundings, relative to the value or to its row's size, whichever is larger.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.06, torch.float16: 0.008}


class WrongResult(RuntimeError):
    """An implementation does not compute what it should. Raised on every rank, with the same words."""


@dataclass(frozen=True)
class Step:
    """One Reduce: which of its parts it has. kept: from here on only these rows of those alive."""

    bias: bool = False
    post_norm: bool = False
    norm: bool = True
    kept: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Case:
    """The sums of a half over `rows` rows; the first makes the residual. offset: of norm weights, 1 for Gemma."""

    layer: str
    rows: int
    num_sms: int
    steps: tuple[Step, ...]
    offset: float = 0.0

    def __str__(self) -> str:
        return f"{self.layer}, {self.rows} rows, {self.num_sms} SMs"


LAYERS = {
    "norm": Step(),
    "bias and norm": Step(bias=True),
    "post-norm and norm": Step(post_norm=True),
    "bias and post-norm alone": Step(bias=True, post_norm=True, norm=False),
}


def cases_of(layers: Iterable[str], rows: Iterable[int], num_sms: Iterable[int], cut: bool = True) -> list[Case]:
    return [case_of(*each, cut) for each in itertools.product(layers, rows, num_sms)]


def case_of(layer: str, rows: int, num_sms: int, cut: bool) -> Case:
    """First sum, layer, layer (cut: after which every third row and the last alone stay), layer."""
    step = LAYERS[layer]
    kept = tuple(sorted({*range(0, rows, 3), rows - 1})) if cut else None
    steps = (Step(), step, replace(step, kept=kept), step)
    return Case(layer, rows, num_sms, steps, offset=1.0 if step.post_norm else 0.0)


def check(ours: Ours, cases: Sequence[Case], problem: Problem, ranks: Ranks, done: Callable[[], object]) -> None:
    """Collective. Raises WrongResult on every rank at the first case that any finds wrong, PeerError for a hang."""
    for case in cases:
        if case.rows <= ours.most_rows:
            results = outcome(ours, case, problem, ranks.rank)
            Fetch((), ranks.device, ours.communicator.check, 2 * ranks.timeout_s).wait()
            fault = wrong(results, expected(case, problem, ranks.world_size), TOLERANCE[problem.dtype])
            if found := verdict(ranks.gather((digest(results), fault))):
                what = f"{ours.name}, {problem.dtype} x {problem.hidden_size}, {case}"
                raise WrongResult(f"wrong results of {what}: {found}; nothing was measured")
        done()


def verdict(reports: list[tuple[str, str | None]]) -> str | None:
    """What is wrong, from each rank's digest of its results and what it found."""
    for rank, (_, fault) in enumerate(reports):
        if fault is not None:
            return f"rank {rank}, {fault}"
    differing = [rank for rank, (digest_, _) in enumerate(reports) if digest_ != reports[0][0]]
    return f"rank {differing[0]} holds other bits than rank 0" if differing else None


def outcome(ours: Ours, case: Case, problem: Problem, rank: int) -> list[Tensor]:
    """The hidden states that each sum gives back, copied. Partials are overwritten as soon as each sum is queued."""
    channel, results = ours.open(case.rows, case.num_sms), []
    for number, (step, rows) in enumerate(alive(case)):
        lent = channel.partial(rows)
        lent.copy_(drawn(problem, f"partial {rank} {number}", rows))
        request = Reduce(lent, *parts(step, case, problem), rows=listed(step, problem), site=SITE)
        results.append(request.submit(channel).wait().data.clone())
        lent.fill_(torch.nan)
    if problem.device.type == "cuda":
        torch.cuda.synchronize(problem.device)
    return results


def alive(case: Case) -> list[tuple[Step, int]]:
    """Each step with the number of its rows."""
    counts = itertools.accumulate((step.kept for step in case.steps), rows_after, initial=case.rows)
    return list(zip(case.steps, itertools.islice(counts, 1, None)))


def rows_after(rows: int, kept: tuple[int, ...] | None) -> int:
    return rows if kept is None else len(kept)


def parts(step: Step, case: Case, problem: Problem) -> tuple[Tensor | None, Norm | None, Norm | None]:
    """(bias, post_norm, norm) of a Reduce."""
    norms = [Norm(drawn(problem, name), problem.eps, case.offset) for name in ("post-norm weight", "norm weight")]
    bias = drawn(problem, "bias") if step.bias else None
    return bias, norms[0] if step.post_norm else None, norms[1] if step.norm else None


def listed(step: Step, problem: Problem) -> Rows | None:
    return None if step.kept is None else Rows(step.kept, torch.tensor(step.kept, device=problem.device))


def expected(case: Case, problem: Problem, world_size: int) -> list[Tensor]:
    """The same in fp64, from all ranks' partials."""
    residual, results = None, []
    for number, (step, rows) in enumerate(alive(case)):
        bias, post_norm, norm = parts(step, case, problem)
        total = drawn(problem, f"partial 0 {number}", rows).double()
        for rank in range(1, world_size):
            total += drawn(problem, f"partial {rank} {number}", rows)
        total = total if bias is None else total + bias.double()
        total = total if post_norm is None else rms_norm(post_norm, total)
        if residual is not None:
            total = total + (residual if step.kept is None else residual[list(step.kept)])
        residual = total
        results.append(residual if norm is None else rms_norm(norm, residual))
    return results


def rms_norm(norm: Norm, x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.eps) * (norm.offset + norm.weight.double())


def wrong(results: list[Tensor], wanted: list[Tensor], tolerance: float) -> str | None:
    """Which sum is off, and by how much; None if none is."""
    for number, (ours, reference) in enumerate(zip(results, wanted, strict=True)):
        if ours.shape != reference.shape:
            return f"sum {number}: shape {list(ours.shape)}, expected {list(reference.shape)}"
        if (far := distance(ours, reference)) > tolerance:
            return f"sum {number}: off by {far:.3g} of a value, more than {tolerance:g}"
    return None


def distance(value: Tensor, wanted: Tensor) -> float:
    """The largest error, relative to the value or to its row's root mean square if that is larger. NaN is infinite."""
    if not value.numel():
        return 0.0
    size = torch.maximum(wanted.abs(), wanted.square().mean(-1, keepdim=True).sqrt())
    return float(((value.double() - wanted).abs() / size).nan_to_num(nan=torch.inf).max())


def digest(results: list[Tensor]) -> str:
    """Of every bit."""
    joined = hashlib.sha256()
    for result in results:
        joined.update(result.contiguous().view(torch.uint8).cpu().numpy().tobytes())
    return joined.hexdigest()
