"""Heads that moved little, in float32 passes over stretches of cache size: the CPU's fast path.

A score is the sum of tiny differences of probabilities, which are never subtracted (docs/how-it-works.md).
With x = (t - b) / tau, G = exp((b + t) / 2 tau) and y = x - log(Z_T / Z_B), about the middle of both:

    P_T - P_B = 2 G sinh(y / 2) / N,  N = sum G cosh(y / 2) = sqrt(Z_B Z_T)
    log(Z_T / Z_B) = 2 atanh(sum 2 G sinh(x / 2) / (2 sum G cosh(x / 2)))

The series of these need one or two terms where expm1 is a costly call, and every divergence is a sum
of products of the same few arrays: KL of y exp(y/2) - 2 sinh(y/2), JS of h sinh h - cosh h log cosh h
with h = y / 2, both times G / N. Work that is done once for all heads is left to the end, and to few operators.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence, Set

import torch
from einops import rearrange
from torch import Tensor

from .workers import Workers

ELEMENTS = 2**18  # of a stretch of some heads: short enough for the caches, long enough for Python
LOG2E = 1.4426950408889634  # exp2 takes a quarter of exp's time
# Factors of w = y^2 and w^2, after a leading 1, of 2 sinh(y/2) / y and of cosh(y/2); and, as shares of
# d = 2 G sinh(y/2), of the odd part of KL's terms, d w / 12, and of JS's terms, d y / 8. FAR is the |y|
# beyond which these are not enough.
SINH, COSH, ODD, JS = (1 / 24, 1 / 1920), (1 / 8, 1 / 384), (-1 / 60, 1 / 2520), (-1 / 24, 1 / 480)
FAR = 0.25
NEGLIGIBLE = 2e-8  # a term this small beside the leading 1 is left out
LARGE_LOGIT = 24.0  # |log2| up to which a head's largest exp needs no shift by the maximum
# A sum of exp(logit - max) below the first means that few weights hold the softmax. Of a vector whose part across
# is below the second share, sums in float32 leave that part to rounding.
CONCENTRATED, CANCELLED = 8.0, 0.01
TINY = 1e-30  # a mean square below it may be without squares that underflowed
RESIDUE = 3e-7  # of the mean CDF difference: what taking off the rest in a straight line may miss
SAMPLES = 1024  # of G, to see how far from a straight line its sum runs
# The sums over a head's elements that a metric is made of.
SUMS = {
    "pad": {"steps"}, "pad_index": {"steps"}, "pad_values": {"values"}, "kl": {"even", "odd"}, "js": {"js"},
    "cosine": {"cc", "cd", "ddp"}, "cosine_weights": {"bb", "bd", "dd"},
    "euclidean": {"dd"}, "relative": {"bb", "dd"},
}


def sums_of(stretches: Iterable[tuple[Tensor, Tensor]], wanted: Set[str], tau: float,
            workers: Workers) -> dict[str, Tensor]:
    """The sums that `metrics_of` needs, over rows of weights and the same rows moved.

    Args:
        stretches: of the rows of some heads, one after the other, the base times `scale(tau)` and
            the difference; float32 [heads, width], all in memory at once and overwritten. Each is
            asked for when the one before has been read: it is still in the cache.
        wanted: names of metrics; for "pad_values" the rows must be sorted.

    Returns:
        float64 [heads] by name.
    """
    passes = _Passes(set().union(*(SUMS[name] for name in wanted)), tau, workers)
    passes.weigh(stretches)
    if passes.needed - {"bb", "bd", "dd"}:
        passes.move()
    if "steps" in passes.needed:
        passes.step()
    return passes.sums


def scale(tau: float) -> float:
    """What the base is multiplied by, so that exp2 does for exp."""
    return LOG2E / tau


class _Passes:
    """The passes over rows of some heads, and the sums [heads] that they leave."""

    def __init__(self, needed: Set[str], tau: float, workers: Workers) -> None:
        self.needed, self.tau, self.workers, self.held = needed, tau, workers, []
        self._memory: Sequence[Tensor] = (torch.empty(0, dtype=torch.float32, device="cpu"),)
        self._parts: dict[str, list[Tensor]] = defaultdict(list)  # by stretch, float32
        self.sums: dict[str, Tensor] = {}  # float64

    def _scratch(self, like: Tensor) -> Sequence[Tensor]:
        if self._memory[0].shape != like.shape:
            self._memory = self.workers.scratch("passes", 4, *like.shape, device=like.device).unbind()
        return self._memory

    def _dot(self, name: str, left: Tensor, right: Tensor, out: Tensor) -> None:
        if name in self.needed:
            self._parts[name].append(torch.mul(left, right, out=out).sum(1))

    def _close(self) -> None:
        parts = [part for each in self._parts.values() for part in each]
        sums = rearrange(parts, "(name stretch) head -> name stretch head", name=len(self._parts)).double().sum(1)
        self.sums |= zip(self._parts, sums, strict=True)
        self._parts.clear()

    def weigh(self, stretches: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Turn the base into G, and find log(Z_T / Z_B)."""
        parts, tops, far = self._parts, [], []
        for weight, x in stretches:
            w, out, spare, _ = self._scratch(x)
            if self.tau != 1:
                x.div_(self.tau)
            torch.mul(x, x, out=w)
            self._dot("bb", weight, weight, out)
            self._dot("bd", weight, x, out)
            if "dd" in self.needed:
                parts["dd"].append(w.sum(1))
            tops.append(weight.amax(1))
            far.append(w.amax(1))
            most = float(far[-1].amax())
            weight.add_(x, alpha=LOG2E / 2).exp2_()
            parts["middle"].append(_times(weight, w, COSH, most, spare, out).sum(1))
            parts["moved"].append(torch.mul(_times(x, w, SINH, most, spare, out), weight, out=out).sum(1))
            self.held.append((weight, x))
        self._close()
        s, half = self.sums, self.sums["moved"] / 2
        s["norm"] = (s["middle"].square() - half.square()).sqrt()
        s["growth"] = 2 * torch.atanh(half / s["middle"])
        s["top"] = torch.stack(tops).amax(0).double()
        s["far"] = torch.stack(far).amax(0).double().sqrt() + s["growth"].abs()
        self.n = sum(x.shape[1] for _, x in self.held)
        s["n"] = torch.full_like(half, self.n)

    def move(self) -> None:
        """Turn the differences into d = (P_T - P_B) N and sum what needs no order; then, for PAD, into CDFs."""
        parts, growth, most = self._parts, self.sums["growth"].float()[:, None], float(self.sums["far"].max()) ** 2
        self.end = torch.zeros_like(growth)
        for weight, y in self.held:
            w, out, spare, g = self._scratch(y)
            torch.mul(y.sub_(growth), y, out=w)
            d = g if self.needed & {"even", "js"} else y
            torch.mul(_times(y, w, SINH, most, spare, d), weight, out=d)
            if "odd" in self.needed:
                parts["odd"].append(_times(torch.mul(d, w, out=out), w, ODD, most, spare, out).sum(1))
            self._dot("even", d, y, out)
            if "js" in self.needed:
                product = out if "even" in self.needed else torch.mul(d, y, out=out)
                parts["js"].append(_times(product, w, JS, most, spare, out).sum(1))
            if "cd" in self.needed:
                cosh = _times(weight, w, COSH, most, spare, out)
                for name, left, right in (("cc", cosh, cosh), ("cd", cosh, d), ("ddp", d, d)):
                    self._dot(name, left, right, spare)
            if "values" in self.needed:
                parts["values"].append(torch.abs(d, out=out).sum(1))
            if "steps" in self.needed:
                d[:, :1] += self.end
                self.end = torch.cumsum(d, 1, out=y)[:, -1:].clone()  # sums in float64, and rounds what it stores
        if parts:  # PAD alone sums nothing here
            self._close()

    def step(self) -> None:
        """Sum the CDF differences. What rounding left at the last, which is 0, is taken off along the way."""
        n, widths = self.n, [cdf.shape[1] for _, cdf in self.held]
        index = self.workers.counted(n, self.end.device).split(widths)
        for (_, cdf), numbers in zip(self.held, index, strict=True):
            self._parts["steps"].append(cdf.addcmul_(numbers, self.end / -n).abs_().sum(1))
        self._close()
        self.sums["steps"] -= cdf[:, -1].double()  # the last CDF is 1 on both sides
        shares = torch.cat([weight[:, ::max(1, n // SAMPLES)] for weight, _ in self.held], 1).cumsum(1)
        line = self.workers.counted(shares.shape[1], shares.device) / shares.shape[1]
        self.sums["rest"] = ((shares / shares[:, -1:] - line).abs().amax(1) * self.end.squeeze(1).abs()).double()


def metrics_of(s: Mapping[str, Tensor], wanted: Set[str], tau: float) -> tuple[dict[str, Tensor], Tensor]:
    """The metrics of heads with these sums, float64 [heads]; and for which heads they hold, bool [heads].

    Those are finite, not far from their base, not concentrated in few weights, no sum left to rounding.
    """
    norm, n = s["norm"], s["n"]
    good = torch.stack(list(s.values())).isfinite().all(0) & (s["far"] <= FAR) & (s["top"].abs() <= LARGE_LOGIT)
    good &= norm >= CONCENTRATED * s["top"].exp2()
    for name in s.keys() & {"even", "js", "ddp", "bb", "dd"}:
        good &= s[name] / n > TINY
    if "rest" in s:
        good &= s["rest"] <= RESIDUE / n * s["steps"]
    for name, (a, ad, d) in (("cosine", ("cc", "cd", "ddp")), ("cosine_weights", ("bb", "bd", "dd"))):
        if name in wanted:
            good &= s[d] * s[a] - s[ad].square() >= CANCELLED * s[d] * s[a]
    every = {
        "pad_index": lambda: s["steps"] / norm,
        "pad": lambda: s["steps"] / norm / (n - 1).clamp(min=1),
        "pad_values": lambda: s["values"] / norm / n,
        "kl": lambda: (s["even"] / 2 + s["odd"] / 12) / norm,
        "js": lambda: s["js"] / 8 / norm,
        # With c = G cosh(y/2), P_B and P_T are c - d/2 and c + d/2.
        "cosine": lambda: cosine_distance(s["cc"] - s["cd"] + s["ddp"] / 4, s["cd"] - s["ddp"] / 2, s["ddp"]),
        "cosine_weights": lambda: cosine_distance(s["bb"], s["bd"] * LOG2E, s["dd"] * LOG2E**2),
        "euclidean": lambda: s["dd"].sqrt() * tau,
        "relative": lambda: (s["dd"] / s["bb"]).sqrt() * LOG2E,
    }
    return {name: every[name]() for name in wanted}, good


def _times(a: Tensor, w: Tensor, factors: Sequence[float], most: float, spare: Tensor, out: Tensor) -> Tensor:
    """a (1 + factors[0] w + factors[1] w^2 + ...) without the terms that are negligible up to w = `most`."""
    kept = [k for k, factor in enumerate(factors, 1) if abs(factor) * most**k > NEGLIGIBLE]
    if not kept:
        return a
    first, *rest = factors[:kept[-1]]
    if not rest:
        return torch.addcmul(a, a, w, value=first, out=out)
    torch.mul(w, rest[-1], out=spare)
    for factor in (*reversed(rest[:-1]), first):
        spare.add_(factor).mul_(w)
    return torch.addcmul(a, a, spare, out=out)


def cosine_distance(squares: Tensor, dots: Tensor, moved: Tensor) -> Tensor:
    """1 - cos(a, a + d) from the sums of a^2, a d and d^2, float64."""
    return cosine(squares, dots, (moved - torch.where(squares > 0, dots.square() / squares, 0.0)).clamp(min=0))


def cosine(squares: Tensor, dots: Tensor, across: Tensor) -> Tensor:
    """1 - cos(a, a + d); `across`: the squared length of d's part across a.

    A zero vector is at 0 from itself, at 1 from any other.
    """
    norm = squares.sqrt()
    alpha = norm + dots / norm  # length of a + d along a
    length = (alpha.square() + across).sqrt()
    exact = torch.where(alpha > 0, across / (length * (length + alpha)), 1 - alpha / length)
    degenerate = torch.where((squares == 0) & (across == 0), 0.0, 1.0)
    return torch.where((squares == 0) | (length == 0), degenerate, exact)
