"""Calibrations that give every answer of a reading the same confidence."""

from __future__ import annotations

from dataclasses import replace

from gistrag.answering.confidence import Again, Calibration, logit

SURE = Calibration(
    adapter="a",
    heads=(),
    weights={},
    bias=logit(0.91),
    again=Again(),
    sure=0.8,
    found=0.2,
    doubtful=0.5,
    measured={},
)
UNSURE = replace(SURE, bias=logit(0.43))
NOT_FOUND = replace(SURE, bias=logit(0.1))
