"""Results on scratch: shards and folders that are never half there, their markers, exact merge.
Knows no model, no torch."""

from lib.store.columns import Column, read_columns
from lib.store.folders import Folder, commit_folder, scan_folders
from lib.store.markers import Piece, needed, retire
from lib.store.merge import merge, read_cell, read_done
from lib.store.raw import read_array
from lib.store.shards import Cell, Marker, commit, gaps, plan_shards, scan

__all__ = [
    "Cell",
    "Column",
    "Folder",
    "Marker",
    "Piece",
    "commit",
    "commit_folder",
    "gaps",
    "merge",
    "needed",
    "plan_shards",
    "read_array",
    "read_cell",
    "read_columns",
    "read_done",
    "retire",
    "scan",
    "scan_folders",
]
