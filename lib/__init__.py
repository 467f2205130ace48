"""The suite's library: experiments as configuration, kernels, shards on scratch, and what Slurm says."""
