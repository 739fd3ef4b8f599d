"""The starter model: a small trained causal LM, its exam, and texts of the domains held out of its training.

Package data, made by scripts/train_starter_model.py; model/README.md is its card. Beside it a draft of the model for
speculative decoding, with the same tokenizer, made by scripts/train_draft_model.py.
"""

from pathlib import Path

FOLDER = Path(__file__).parent
MODEL = FOLDER / "model"
DRAFT = FOLDER / "draft"
EXAM = FOLDER / "exam"
DOMAINS = FOLDER / "domains"
NAME = "starter"
LICENCE = "Apache-2.0"
