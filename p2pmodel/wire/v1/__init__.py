"""Generated from proto/p2pmodel/wire/v1 by scripts/proto: never edit it here."""
