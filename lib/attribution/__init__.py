"""Which weights and neurons carry a prediction: relevance by LRP's rules (AttnLRP, CP-LRP), Wanda's statistics.

patched      a scope in which one model instance's gradients follow the rules
Attributor   scores of many samples, a row a sample (neuron level) or summed (weight level)"""

from lib.attribution.attribute import Attributor, Scores
from lib.attribution.patch import RULES, patched

__all__ = ["RULES", "Attributor", "Scores", "patched"]
