"""Exams: a lineage's suite of held-out texts and questions, and the scores of a state on them (docs/exams.md)."""

from p2pmodel.engine.exams.alpha import search_alpha
from p2pmodel.engine.exams.examiner import Examiner
from p2pmodel.engine.exams.suite import Suite
from p2pmodel.engine.exams.texts import Domain

__all__ = ["Domain", "Examiner", "Suite", "search_alpha"]
