"""MTEB tasks on mirrored data, with per-query scores."""
