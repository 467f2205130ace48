"""The engine for machines without vLLM: transformers' generate, in batches of one shape. The noise of a draw is a hash
of a row's seed, the step and the token (lib.models.gumbel), so an answer depends on no other of its batch."""

import time
from collections.abc import Callable, Sequence
from contextlib import suppress

import torch
import transformers

from lib.base.errors import UserError, one_line
from lib.inputs.tokenizer import load_tokenizer
from lib.models.engine import Adapter, Answer, Made, Probe, Sampling, Setting, Work, turns
from lib.models.gumbel import Gumbel
from lib.models.load import device_name, load_model, visible_devices
from lib.models.merged import Merging
from lib.models.sample import continuations


class TransformersEngine:
    def __init__(self, setting: Setting) -> None:
        self.setting, devices = setting, visible_devices()
        self.model = load_model(setting.folder, setting.dtype, "sdpa", devices)
        self.tokenizer = load_tokenizer(setting.folder)
        self.worn: Adapter | None = None
        self.merging = Merging(setting.folder, self.model.dtype, devices[0]) if setting.merged else None
        self.about = {"engine": f"transformers {transformers.__version__}", "device": device_name(devices[0])}

    def begin(self, work: Work) -> Callable[[], Made]:
        """Computed when it is waited for."""

        def wait() -> Made:
            began, answers, said = time.monotonic(), list[Answer](), list[tuple[int, list[float]]]()
            width = max(map(len, work.prompts))
            for adapter, rows, before in turns(work):
                self._wear(adapter)
                said += [(number, self._say(work.probes[number])) for number in before]
                if rows:
                    own = slice(rows.start, rows.stop)
                    answers += self._generate(work.prompts[own], work.how, work.seeds[own], width)
            return Made(answers, time.monotonic() - began, said)

        return wait

    @torch.no_grad()
    def _wear(self, adapter: Adapter | None) -> None:
        if self.merging:
            for name, tensor in self.merging.turn(adapter):
                self.model.get_parameter(name).copy_(tensor)
            return
        if adapter == self.worn:
            return
        if self.worn:
            self.model.delete_adapter("worn")
            self.worn = None
        if adapter:
            try:
                self.model.load_adapter(adapter.folder, adapter_name="worn")
            except Exception as e:
                with suppress(Exception):  # what of it is there already
                    self.model.delete_adapter("worn")
                raise UserError(
                    f"the adapter {adapter.folder} cannot be loaded ({one_line(e)}); run `make verify`"
                ) from None
        self.worn = adapter

    @torch.inference_mode()
    def _say(self, probe: Probe) -> list[float]:
        ids = torch.tensor([[*probe.context, *probe.answer]], device=self.model.device)
        logits_TV = self.model(ids).logits[0, len(probe.context) - 1 : -1].float()
        return logits_TV.log_softmax(-1).gather(1, ids[0, len(probe.context) :, None])[:, 0].tolist()

    def _generate(
        self, prompts: Sequence[Sequence[int]], how: Sampling, seeds: Sequence[int], width: int
    ) -> list[Answer]:
        rows = min(self.setting.at_once, len(prompts))
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
