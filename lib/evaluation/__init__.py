"""What a model does, measured: the toxicity of texts, its own responses to prompts. Knows no results, no Slurm.
Public: toxicity.Toxicity, responses.answerer."""
