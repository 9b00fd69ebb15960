"""Measures, value by value, and the statistics that tell a difference from luck.

Intervals of means are Student's, those of statistics of a whole set percentile bootstraps (Efron 1979; for search:
Sakai 2006); p-values are two-sided paired randomisation tests (Smucker, Allan and Carterette 2007). Most measures are
means over queries; correlations, the v-measure and those of pair classification are statistics over a whole set.
"""

from __future__ import annotations

from kinvec.metrics.clusterings import bootstrap_v_measure, cluster_purity, randomisation_v_measure, v_measure
from kinvec.metrics.correlations import (
    CORRELATIONS,
    bootstrap_correlation,
    pearson,
    randomisation_correlation,
    spearman,
)
from kinvec.metrics.pairs import (
    TOLD_APART,
    best_threshold,
    bootstrap_told_apart,
    randomisation_told_apart,
    right_side,
    told_apart,
)
from kinvec.metrics.rankings import parse_measures, retrieval, search_depth
from kinvec.metrics.resampling import CONFIDENCE, RESAMPLES, mean, mean_interval, randomisation_p
from kinvec.metrics.several import crossed_interval, holm

__all__ = [
    "CONFIDENCE", "CORRELATIONS", "RESAMPLES", "TOLD_APART", "best_threshold", "bootstrap_correlation",
    "bootstrap_told_apart", "bootstrap_v_measure", "cluster_purity", "crossed_interval", "holm", "mean",
    "mean_interval", "parse_measures", "pearson", "randomisation_correlation", "randomisation_p",
    "randomisation_told_apart", "randomisation_v_measure", "retrieval", "right_side", "search_depth", "spearman",
    "told_apart", "v_measure",
]  # fmt: skip
