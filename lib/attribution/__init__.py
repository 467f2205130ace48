"""Which weights and neurons carry a prediction: relevance by LRP's rules (AttnLRP, CP-LRP), Wanda's statistics.

patch.patched          a scope in which one model instance's gradients follow the rules
attribute.Attributor   scores of many samples, a row a sample (neuron level) or summed (weight level)"""
