"""Readers: one file per source, each turning what lies on disk into tasks or models that the rest can use."""
