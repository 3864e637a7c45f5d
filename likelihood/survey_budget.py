r"""What a survey may spend on finding out, so that it never takes much more than scoring the set whole.

All N images take N c passes, c those of an exact value with all the steps. A pilot's values are no loss, whatever it finds:
they are a part of the sample, and of the whole. What is lost where all images are scored in the end are the trial of half the
steps, what corrects the mean, the repetitions that tell the values' noise, and the pilot's predictors. Of these a set is given
as many as a tenth of N c has room for (`SHARE`), in this order:

    at most 80 images      all are scored at once: the pilot of a survey, 64 of them, and a prediction for each
                           would leave next to nothing to save. Of 20 and more a tenth is scored twice,
                           unless values have no noise
    trial of half steps    8 images, 1.5 c each: from 240 images on
    predictors             N c / 100 passes on the pilot's images
    repetitions            at most 24, c each, and none where there is room for one only
    correction             8 images, 3.5 c each, where all the steps are taken; where half of them are, N c / 2 pays for it,
                           and for 8 to 40 more, 1.5 c each.
                           Of 378 images and more that have no room for it four say what the solver errs by

A survey is chosen only where it is expected to take at most 95 % of N c: up to 5 % of a set may turn out to be suspect, and are
scored in any case. So no set takes more than 1.1 N c, but for images of which a value takes more than of the pilot's. (The
choice of the steps comes before, alike for a survey and for the whole. Where the images fail that were to correct half the
steps, up to 40 values are lost besides.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from likelihood.step_correction import DOUBLED, LEAST_DIFFERENCES, TRIAL, Correction

SHARE = 0.1
"""What a survey may take above scoring all images, as a share of that."""

AT_ONCE = 80
PILOT, LARGEST_PILOT = 64, 200
REPEATS, _FEWEST_REPEATS = 24, 8
TRIED_FROM = 240
CANDIDATES_PART = 0.01
_HALVING, _DIFFERENCE = 1.5, 3.5  # in exact values with all the steps


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Of a set of `size` images."""

    size: int

    @property
    def at_once(self) -> bool:
        """Are all images scored before anything else is asked?"""
        return self.size <= AT_ONCE

    @property
    def pilot(self) -> int:
        """Images of the pilot: 64 to 200, a twentieth of a set; of one that is scored at once those that are scored
        twice, or two."""
        if self.at_once:
            return max(min(self.size, 2), int(SHARE * self.size))
        return max(PILOT, min(LARGEST_PILOT, self.size // 20))

    @property
    def tries_half(self) -> bool:
        """Is it worth asking whether half the steps will do?"""
        return self.size >= TRIED_FROM

    @property
    def halved(self) -> int:
        """Images that tell what half the steps lose, 16 to 48: the sample is the larger the less of the precision they leave,
        and of a small set it is small itself."""
        return max(16, min(48, self.size // 64))

    @property
    def corrects_all_steps(self) -> bool:
        """Is there room to see what more steps would change, where values have them all?"""
        return self._left(_HALVING * TRIAL) >= REPEATS + _DIFFERENCE * DOUBLED

    @property
    def states_all_steps(self) -> bool:
        """Is there room to see on the fewest images, beside eight repetitions, how much more steps would change?"""
        return self._left(_HALVING * TRIAL) >= _FEWEST_REPEATS + _DIFFERENCE * LEAST_DIFFERENCES

    def repeats(self, tried: bool, correction: Correction) -> int:
        """How many of the pilot's images are scored twice: of a set that is not scored at once two at least, even where the
        images that were to correct half the steps have failed, and taken the room."""
        taken = 0.0
        if not correction.half:
            halved = correction.compared - correction.doubled
            taken = _HALVING * (TRIAL * tried + halved) + _DIFFERENCE * correction.doubled
        room = min(REPEATS, int(self._left(taken)), self.pilot)
        if self.at_once:
            return room if room > 1 else 0
        return max(room, 2)

    def candidates(self, cost: float, available: int) -> list[int]:
        """Which of the `available` predictors the pilot may ask, evenly spaced, where an exact value takes `cost` passes."""
        k = 0 if self.at_once else min(available, int(CANDIDATES_PART * self.size * cost / self.pilot))
        return [int((i + 0.5) * available / k) for i in range(k)]

    def _left(self, taken: float) -> float:
        """Exact values that the share has room for, besides `taken` and the predictors."""
        return SHARE * self.size - taken - (0.0 if self.at_once else math.ceil(CANDIDATES_PART * self.size))
