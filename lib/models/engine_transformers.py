"""The engine for machines without vLLM: transformers' generate, in batches of one shape. The noise of a draw is a hash
of a row's seed, the step and the token (lib.models.gumbel), so an answer depends on no other of its batch."""

import time
from collections.abc import Callable, Sequence

import transformers

from lib.inputs.tokenizer import load_tokenizer
from lib.models.engine import Answer, Made, Sampling, Setting
from lib.models.gumbel import Gumbel
from lib.models.load import device_name, load_model, visible_devices
from lib.models.sample import continuations


class TransformersEngine:
    def __init__(self, setting: Setting) -> None:
        self.setting, devices = setting, visible_devices()
        self.model = load_model(setting.folder, setting.dtype, "sdpa", devices)
        self.tokenizer = load_tokenizer(setting.folder)
        self.about = {"engine": f"transformers {transformers.__version__}", "device": device_name(devices[0])}

    def begin(self, prompts: Sequence[Sequence[int]], how: Sampling, seeds: Sequence[int]) -> Callable[[], Made]:
        """Computed when it is waited for."""

        def wait() -> Made:
            began = time.monotonic()
            return Made(self.generate(prompts, how, seeds), time.monotonic() - began)

        return wait

    def generate(self, prompts: Sequence[Sequence[int]], how: Sampling, seeds: Sequence[int]) -> list[Answer]:
        width, rows = max(map(len, prompts)), min(self.setting.at_once, len(prompts))
        answers: list[Answer] = []
        for start in range(0, len(prompts), rows):
            batch, own = list(prompts[start : start + rows]), list(seeds[start : start + rows])
            missing = rows - len(batch)  # filled up with the last one: one shape for all
            batch, numbers = batch + batch[-1:] * missing, [(one, 0) for one in own + own[-1:] * missing]
            noise = None
            if how.temperature:
                noise = Gumbel(0, numbers, width, how.max_tokens, how.temperature, self.model.device)
            made = continuations(self.model, self.tokenizer, batch, how.max_tokens, width, noise, how.ends)
            answers += [Answer(ids, len(ids) < how.max_tokens) for ids in made[: rows - missing]]
        return answers
