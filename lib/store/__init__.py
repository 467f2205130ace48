"""Results on scratch: HDF5 shards that are never half there, their markers, exact merge, export; and fetched inputs.
Public: Cell, Column, commit, scan, gaps, plan_shards, merge, dataset_input, model_input. Knows no model, no torch."""

from lib.store.inputs import DatasetInput, ModelInput, dataset_input, model_input
from lib.store.merge import merge
from lib.store.shards import Cell, Column, Marker, commit, gaps, plan_shards, read_columns, scan

__all__ = [
    "Cell",
    "Column",
    "DatasetInput",
    "Marker",
    "ModelInput",
    "commit",
    "dataset_input",
    "gaps",
    "merge",
    "model_input",
    "plan_shards",
    "read_columns",
    "scan",
]
