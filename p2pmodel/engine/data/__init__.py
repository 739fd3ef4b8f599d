"""Training data: a user's files, checked, encoded, and packed into blocks of tokens."""

from p2pmodel.engine.data.corpus import Corpus, Parts, Source, load, split
from p2pmodel.engine.data.packing import IGNORED, Blocks
from p2pmodel.engine.data.texts import TextFile, read_texts

__all__ = ["IGNORED", "Blocks", "Corpus", "Parts", "Source", "TextFile", "load", "read_texts", "split"]
