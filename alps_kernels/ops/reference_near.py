"""Heads that moved little, in float32 passes over stretches of cache size: the CPU's fast path.

A score is the sum of tiny differences of probabilities, which are never subtracted (DESIGN, Numerics).
With x = (t - b) / tau, G = exp((b + t) / 2 tau) and y = x - log(Z_T / Z_B), about the middle of both:

    P_T - P_B = 2 G sinh(y / 2) / N,  N = sum G cosh(y / 2) = sqrt(Z_B Z_T)
    log(Z_T / Z_B) = 2 atanh(sum 2 G sinh(x / 2) / (2 sum G cosh(x / 2)))

The series of these need one or two terms where expm1 is a costly call, and every divergence is a sum
of products of the same few arrays: KL of y exp(y/2) - 2 sinh(y/2), JS of h sinh h - cosh h log cosh h
with h = y / 2, both times G / N.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence, Set
from typing import Any

import torch
from torch import Tensor

from .workers import Workers

ELEMENTS = 2**18  # of a stretch of some heads: short enough for the caches, long enough for Python
LOG2E = 1.4426950408889634  # exp2 takes a quarter of exp's time
# Factors of w = y^2 and w^2, after a leading 1, of 2 sinh(y/2) / y, of cosh(y/2), of the odd part of KL's
# sum / (y^3 / 12) and of JS's / (w / 8). FAR is the |y| beyond which these are not enough.
SINH, COSH, ODD, JS = (1 / 24, 1 / 1920), (1 / 8, 1 / 384), (1 / 40, 1 / 4480), (0.0, 1 / 1152)
FAR = 0.25
NEGLIGIBLE = 2e-8  # a term this small beside the leading 1 is left out
LARGE_LOGIT = 24.0  # |log2| up to which a head's largest exp needs no shift by the maximum
# A sum of exp(logit - max) below the first means that few weights hold the softmax. Of a vector whose part across
# is below the second share, sums in float32 leave that part to rounding.
CONCENTRATED, CANCELLED = 8.0, 0.01
TINY = 1e-30  # a mean square below it may be without squares that underflowed
RESIDUE = 3e-7  # of the mean CDF difference: what taking off the rest in a straight line may miss
SAMPLES = 1024  # of G, to see how far from a straight line its sum runs
PADS = ("pad", "pad_index")
OF_WEIGHTS = ("cosine_weights", "euclidean", "relative")


def near(stretches: Iterable[tuple[Tensor, Tensor]], wanted: Set[str], tau: float,
         workers: Workers) -> tuple[dict[str, Tensor], Tensor]:
    """Metrics between rows of weights and the same rows moved.

    Args:
        stretches: of the rows of some heads, one after the other, the base times `scale(tau)` and
            the difference; float32 [heads, width], all in memory at once and overwritten. Each is
            asked for when the one before has been read: it is still in the cache.
        wanted: names of metrics; for "pad_values" the rows must be sorted.

    Returns:
        float64 [heads] per metric, and for which heads they hold, bool [heads]: finite, not far
        from their base, not concentrated in few weights, no sum left to rounding.
    """
    passes = _Passes(wanted, tau, workers)
    passes.weigh(stretches)
    passes.move()
    if wanted & set(PADS):
        passes.step()
    return passes.scores(), passes.good()


def scale(tau: float) -> float:
    """What the base is multiplied by, so that exp2 does for exp."""
    return LOG2E / tau


class _Passes:
    """The passes over rows of some heads, and the sums [heads] that they leave."""

    def __init__(self, wanted: Set[str], tau: float, workers: Workers) -> None:
        self.wanted, self.tau, self.workers, self.held = wanted, tau, workers, []
        self._memory: Sequence[Tensor] = (torch.empty(0),)
        self.sums: dict[str, Any] = defaultdict(list)  # of stretches in float32, then of all in float64

    def _scratch(self, like: Tensor) -> Sequence[Tensor]:
        if self._memory[0].shape != like.shape:
            self._memory = self.workers.scratch("passes", 4, *like.shape, device=like.device).unbind()
        return self._memory

    def _close(self) -> None:
        self.sums |= {name: torch.stack(parts, 1).double().sum(1) for name, parts in self.sums.items() if isinstance(parts, list)}
        self.n = sum(y.shape[1] for _, y in self.held)

    def weigh(self, stretches: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Turn the base into G, and find log(Z_T / Z_B)."""
        sums, tops, far = self.sums, [], []
        for weight, x in stretches:
            w, out, spare, _ = self._scratch(x)
            if self.wanted & set(OF_WEIGHTS):
                for name, left, right in (("bb", weight, weight), ("bd", weight, x), ("dd", x, x)):
                    sums[name].append(torch.mul(left, right, out=out).sum(1))
            if self.tau != 1:
                x.div_(self.tau)
            tops.append(weight.amax(1))
            far += x.amax(1), x.amin(1).neg_()  # vectorised, which aminmax is not
            most = float(torch.maximum(*far[-2:]).amax()) ** 2
            weight.add_(x, alpha=LOG2E / 2).exp2_()
            torch.mul(x, x, out=w)
            sums["middle"].append(_times(weight, w, COSH, most, spare, out).sum(1))
            sums["moved"].append(torch.mul(_times(x, w, SINH, most, spare, out), weight, out=out).sum(1))
            self.held.append((weight, x))
        self._close()
        middle, half, top = sums["middle"], sums["moved"] / 2, torch.stack(tops).amax(0).double()
        self.norm = (middle.square() - half.square()).sqrt()
        self.growth = 2 * torch.atanh(half / middle)
        self.far = torch.stack(far).amax(0).double() + self.growth.abs()
        self.concentrated = (self.norm < CONCENTRATED * top.exp2()) | (top.abs() > LARGE_LOGIT)

    def move(self) -> None:
        """Turn the differences into d = (P_T - P_B) N and sum what needs no order; then, for PADS, into CDFs."""
        sums, growth, most = self.sums, self.growth.float()[:, None], float(self.far.max()) ** 2
        self.end = torch.zeros_like(growth)
        for weight, y in self.held:
            w, out, spare, g = self._scratch(y)
            torch.mul(y.sub_(growth), y, out=w)
            if self.wanted & {"kl", "js"}:
                torch.mul(weight, y, out=g)
            if "kl" in self.wanted:
                sums["odd"].append(torch.mul(_times(g, w, ODD, most, spare, out), w, out=out).sum(1))
                sums["even"].append(torch.mul(_times(g, w, SINH, most, spare, out), y, out=out).sum(1))
            if "js" in self.wanted:
                sums["js"].append(torch.mul(_times(g, w, JS, most, spare, out), y, out=out).sum(1))
            d = _times(y, w, SINH, most, spare, y).mul_(weight)
            if "cosine" in self.wanted:
                cosh = _times(weight, w, COSH, most, spare, out)
                for name, left, right in (("cc", cosh, cosh), ("cd", cosh, d), ("ddp", d, d)):
                    sums[name].append(torch.mul(left, right, out=spare).sum(1))
            if "pad_values" in self.wanted:
                sums["values"].append(torch.abs(d, out=spare).sum(1))
            if self.wanted & set(PADS):
                d[:, :1] += self.end
                self.end = torch.cumsum(d, 1, out=d)[:, -1:].clone()  # sums in float64, and rounds what it stores
        self._close()

    def step(self) -> None:
        """Sum the CDF differences. What rounding left at the last element, where they are 0, is taken off along the way."""
        index = self.workers.counted(self.n, self.end.device).split([cdf.shape[1] for _, cdf in self.held])
        for (_, cdf), numbers in zip(self.held, index, strict=True):
            self.sums["steps"].append(cdf.addcmul_(numbers, self.end / -self.n).abs_().sum(1))
        self._close()
        self.sums["steps"] -= cdf[:, -1].double()  # the last CDF is 1 on both sides
        shares = torch.cat([weight[:, ::max(1, self.n // SAMPLES)] for weight, _ in self.held], 1).cumsum(1)
        line = self.workers.counted(shares.shape[1], shares.device) / shares.shape[1]
        self.bent = (shares / shares[:, -1:] - line).abs().amax(1)

    def good(self) -> Tensor:
        """Which heads the passes are enough for."""
        s = self.sums
        good = (self.far <= FAR) & ~self.concentrated & self.norm.isfinite()
        for total in s.values():
            good &= total.isfinite()
        for name in s.keys() & {"even", "js", "ddp", "bb", "dd"}:
            good &= s[name] / self.n > TINY
        if "steps" in s:
            good &= self.bent * self.end.squeeze(1).abs() <= RESIDUE / self.n * s["steps"]
        for name, (a, ad, d) in (("cosine", ("cc", "cd", "ddp")), ("cosine_weights", ("bb", "bd", "dd"))):
            if name in self.wanted:
                good &= s[d] * s[a] - s[ad].square() >= CANCELLED * s[d] * s[a]
        return good

    def scores(self) -> dict[str, Tensor]:
        s, norm = self.sums, self.norm
        every = {
            "pad_index": lambda: s["steps"] / norm,
            "pad": lambda: s["steps"] / norm / max(self.n - 1, 1),
            "pad_values": lambda: s["values"] / norm / self.n,
            "kl": lambda: (s["even"] / 2 + s["odd"] / 12) / norm,
            "js": lambda: s["js"] / 8 / norm,
            # With c = G cosh(y/2), P_B and P_T are c - d/2 and c + d/2.
            "cosine": lambda: cosine_distance(s["cc"] - s["cd"] + s["ddp"] / 4, s["cd"] - s["ddp"] / 2, s["ddp"]),
            "cosine_weights": lambda: cosine_distance(s["bb"], s["bd"] * scale(self.tau), s["dd"] * scale(self.tau) ** 2),
            "euclidean": lambda: s["dd"].sqrt(),
            "relative": lambda: (s["dd"] / s["bb"]).sqrt() * LOG2E / self.tau,
        }
        return {name: every[name]() for name in self.wanted}


def _times(a: Tensor, w: Tensor, factors: Sequence[float], most: float, spare: Tensor, out: Tensor) -> Tensor:
    """a (1 + factors[0] w + factors[1] w^2 + ...) without the terms that are negligible up to w = `most`."""
    kept = [k for k, factor in enumerate(factors, 1) if factor * most**k > NEGLIGIBLE]
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
