"""Results on scratch: HDF5 shards that are never half there, their markers, exact merge, export; and fetched inputs.
Public: Cell, Column, commit, scan, gaps, plan_shards, merge, read_array, dataset_input, model_input,
samples_input, read_samples. Knows no model, no torch."""

from lib.inputs.records import DatasetInput, ModelInput, dataset_input, model_input
from lib.inputs.samples import Samples, SamplesInput, read_samples, samples_input, save_samples
from lib.store.columns import Column, read_columns
from lib.store.merge import merge
from lib.store.raw import read_array
from lib.store.shards import Cell, Marker, commit, gaps, plan_shards, scan

__all__ = [
    "Cell",
    "Column",
    "DatasetInput",
    "Marker",
    "ModelInput",
    "Samples",
    "SamplesInput",
    "commit",
    "dataset_input",
    "gaps",
    "merge",
    "model_input",
    "plan_shards",
    "read_array",
    "read_columns",
    "read_samples",
    "samples_input",
    "save_samples",
    "scan",
]
