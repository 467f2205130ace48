"""Log-likelihoods of responses and what a system prompt does to them. Tensors and arrays in and out.
Public: logprob.Scorer, shift.shift, shift.Status (these import torch); lls_plots (tables and pictures, no torch)."""
