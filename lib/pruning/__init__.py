"""SparC3's pruning: which neurons and weights go, taking them out of a loaded model, and a folder without them.

choose.contrast, choose            which neurons, controls, intervals (without torch)
neurons.Pruner                     neurons of a loaded model to 0 and back
weights.masks_by, WeightPruner     single weights by scores; sequential.sequential_wanda
checkpoint.save_pruned             a folder that loads anywhere (without torch)"""
