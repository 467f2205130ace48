"""Results on scratch: HDF5 shards that are never half there, their markers, exact merge.
Knows no model, no torch."""

from lib.store.columns import Column, read_columns
from lib.store.merge import merge
from lib.store.raw import read_array
from lib.store.shards import Cell, Marker, commit, gaps, plan_shards, scan

__all__ = ["Cell", "Column", "Marker", "commit", "gaps", "merge", "plan_shards", "read_array", "read_columns", "scan"]
