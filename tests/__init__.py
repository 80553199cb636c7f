"""Tests. A package, so that the folders below, named after ours, do not shadow them on sys.path."""
