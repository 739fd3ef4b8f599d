"""Training a patch: data in, values, Fisher and checkpoints out."""
