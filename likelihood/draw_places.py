"""Where in a sample's stream the numbers of each use begin, so that none serves two.

A stream of `SampleStreams` has 2^32 draws. Those from where a user's streams are when they are given are a value's own: its
dequantisation noise, and a probe, or one a step, for each of its draws. Everything else that is drawn for the same sample under
the same seed begins here, and the values' part ends at `REPEATED`: room for a hundred draws of ten thousand steps.
"""

from __future__ import annotations

REPEATED = 1 << 20
"""Between a survey's value and its repetition. As far from `AGAIN` as from 0, also where a repetition is solved again."""

AGAIN = 1 << 26
"""Between a value's draws and those of its solution of twice the steps, of four times, ..."""

PREDICTORS = 1 << 28
"""The noise of a survey's denoising errors, one draw for each level."""

MOST_DOUBLINGS = PREDICTORS // AGAIN - 1
"""So many solutions of ever more steps have their draws before the next use begins."""

COMPARED = 3 << 27
"""Noise and probe of the images that show a survey what more steps change."""

ORDER = 1 << 29
"""The order in which a survey draws its images."""

COMPANIONS = 5 << 29
"""Probes of companions, beyond where the value's own stream is."""

PILOT = 7 << 29
"""The probe of the pilot that places a grid, and at the next draw that of the runs that choose its steps."""
