"""What a model does, measured: the toxicity of texts. Knows no files, no configs, no Slurm.
Public: toxicity.Toxicity."""
