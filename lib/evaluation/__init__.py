"""What a model does, measured: perplexity, completions and their toxicity and repetition, tasks. Knows no results, no
Slurm. Public: perplexity.plan and perplexity, log_probs.by_decoder and by_model, completions.complete,
toxicity.Toxicity, statistics, tasks.Tasks, responses.answerer."""
