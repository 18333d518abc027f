"""Rivals: classifiers to compare with, on the same data and under the same attacks."""

from otad.baselines.nearest import NearestNeighbor

__all__ = ["NearestNeighbor"]
