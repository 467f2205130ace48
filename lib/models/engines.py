"""The engine that a word stands for."""

from lib.models.engine import Engine, Setting


def make_engine(word: str, setting: Setting, count: int) -> Engine:
    """vllm in `count` processes, or transformers in this one."""
    if word == "vllm":
        from lib.models.engine_process import Engines

        return Engines(setting, count)
    from lib.models.engine_transformers import TransformersEngine

    return TransformersEngine(setting)
