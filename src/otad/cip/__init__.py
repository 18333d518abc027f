"""Convex integration: potentials through given points and gradients, and their interpolation."""

from otad.cip.brenier import BrenierPotential
from otad.cip.interpolation import interpolate
from otad.cip.neighborhood import interpolate_neighborhood
from otad.cip.potentials import feasible_potentials, smallest_smoothness
from otad.cip.power_diagram import PowerDiagram
from otad.cip.regularity import Regularity, potential_gaps
from otad.cip.solution import Solution, Status

__all__ = [
    "BrenierPotential",
    "PowerDiagram",
    "Regularity",
    "Solution",
    "Status",
    "feasible_potentials",
    "interpolate",
    "interpolate_neighborhood",
    "potential_gaps",
    "smallest_smoothness",
]
