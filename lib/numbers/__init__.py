"""Subliminal learning: traits and their system prompts, number prompts.
Public: ANIMALS, ANIMAL_NAMES, NEUTRAL, Trait, trait, sample_prompts, load_pools, NumberPrompt."""

from lib.numbers.number_prompts import NumberPrompt, load_pools, sample_prompts
from lib.numbers.traits import ANIMAL_NAMES, ANIMALS, NEUTRAL, Trait, trait

__all__ = ["ANIMALS", "ANIMAL_NAMES", "NEUTRAL", "NumberPrompt", "Trait", "load_pools", "sample_prompts", "trait"]
