"""Evaluation: measures of samples against data, with errors, beside what held-out data score; and pictures.

report = evaluation.evaluate_samples(transform.to_data(result.x), dataset)
print(report)                             # FD[clf-digits-1a2b]  1.23 ± 0.04   0.71 ± 0.03   ...
report["FD"].score.value, report["FD"].floor.value, report["FD"].errors_from_floor
"""

from __future__ import annotations

from evaluation.attack import ProjectedGradient
from evaluation.attributes import AttributeClassifier, train_attribute_classifier
from evaluation.calibration import Calibration, calibration, share
from evaluation.classifier import Classifier, train_classifier
from evaluation.detection import auroc
from evaluation.estimate import Estimate
from evaluation.features import Coordinates, Extracted, Features, Pixels, RandomConvolutions
from evaluation.frechet import Moments, frechet_distance, frechet_distance_of_moments
from evaluation.inception import Inception, load_inception
from evaluation.inception_score import class_score
from evaluation.kernel import kernel_distance, mmd
from evaluation.neighbours import Manifold, Memorisation, manifold, memorisation, nearest
from evaluation.pictures import (
    Panel,
    make_grid,
    save_captioned,
    save_gif,
    save_grid,
    save_histogram,
    save_lines,
    save_plot,
    save_scatter,
    save_surfaces,
)
from evaluation.plane import GridLaw, Plane
from evaluation.posterior import PosteriorErrors, as_mixture, exact_posterior, posterior_errors
from evaluation.report import EvaluationReport, Measure, default_features, evaluate_samples
from evaluation.sampler_comparison import Comparison, compare_samplers, dataset_quality, flow_error
from evaluation.sliced import sliced_wasserstein
from evaluation.straightness import straightness

__all__ = [
    "AttributeClassifier",
    "Calibration",
    "Classifier",
    "Comparison",
    "Coordinates",
    "Estimate",
    "EvaluationReport",
    "Extracted",
    "Features",
    "GridLaw",
    "Inception",
    "Manifold",
    "Measure",
    "Memorisation",
    "Moments",
    "Panel",
    "Pixels",
    "PosteriorErrors",
    "Plane",
    "ProjectedGradient",
    "RandomConvolutions",
    "auroc",
    "calibration",
    "as_mixture",
    "class_score",
    "compare_samplers",
    "dataset_quality",
    "default_features",
    "evaluate_samples",
    "exact_posterior",
    "flow_error",
    "frechet_distance",
    "frechet_distance_of_moments",
    "kernel_distance",
    "load_inception",
    "make_grid",
    "manifold",
    "memorisation",
    "mmd",
    "nearest",
    "posterior_errors",
    "save_captioned",
    "save_gif",
    "save_grid",
    "save_histogram",
    "save_lines",
    "save_plot",
    "save_scatter",
    "share",
    "save_surfaces",
    "sliced_wasserstein",
    "straightness",
    "train_attribute_classifier",
    "train_classifier",
]
