"""Floor 2: the model on a device: stages, the client's head, caches, training, exams."""
