"""Patches: trained, shown, audited, moved, and exchanged with other programs."""
