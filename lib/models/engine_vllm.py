"""vLLM in this process, by token ids alone: no tokenizer, no text, no defaults of the model's own.

Its scheduler runs in this process too (VLLM_ENABLE_V1_MULTIPROCESSING=0): one of its own begins with whatever has come
when it looks, so that the clock would decide which rows are computed together. For the same reason steps are not
scheduled ahead (async_scheduling): whether that looks before or after a row has ended is a matter of time as well. With
kernels that do not depend on the batch (exact) it may."""

import atexit
import json
import os
import shutil
import tempfile
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib.base.errors import UserError, one_line
from lib.base.loading import uncollected
from lib.checkpoint.families import family_in, last
from lib.checkpoint.headers import folder_bytes, folder_tensors
from lib.models.engine import Adapter, Answer, Probe, Sampling, Setting, Work, turns
from lib.models.tokens import must_know

if TYPE_CHECKING:
    from lib.models.merged import Merging

MEMORY = 0.9  # of a GPU's
PASSING = 6 << 30  # bytes of an engine among several: what a step computes, its logits, graphs, CUDA itself
STEP_TOKENS = 8192  # that a step computes at most, prompts and answers
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that it knows
AT_ONCE = 2  # adapters in a step: the last rows of one, and the first of the next; each slot more costs all kernels
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",  # of no use without top-k and top-p, and compiled at the first call
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    "HF_HUB_OFFLINE": "1",
    "TQDM_MININTERVAL": "60",  # of its bars, which are said to a log
}
# What a user may set: how much it says, and its runner. The newer one draws from a hash of seed and position, where the
# older takes a Python step a row. With adapters vLLM itself chooses: not every version's newer one has them.
DEFAULTS = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_USE_V2_MODEL_RUNNER": "1"}


class VllmEngine:
    def __init__(self, setting: Setting) -> None:
        self.broken = False  # rows of a batch that failed may still lie in it
        os.environ.update(ENVIRONMENT)
        os.environ["VLLM_BATCH_INVARIANT"] = str(int(setting.exact))
        import torch  # vLLM reads the environment when it is imported

        self.on_gpu = torch.cuda.is_available()
        for name, value in DEFAULTS.items():
            if name != "VLLM_USE_V2_MODEL_RUNNER" or (self.on_gpu and not setting.rank):
                os.environ.setdefault(name, value)
        if setting.exact and not self.on_gpu:
            raise UserError("generate.mode=exact takes a GPU: vLLM has batch-invariant kernels there alone")
        self.about = {"device": torch.cuda.get_device_name() if self.on_gpu else "cpu"}
        gpus = torch.cuda.device_count() if self.on_gpu else 1
        if setting.merged and gpus > 1:
            raise UserError(
                f"generate.adapters=merged takes an engine on one GPU, and this one has {gpus}: set run.gpus=1 where "
                "one holds the model, or generate.adapters=served"
            )
        try:
            with uncollected("vllm"):
                import vllm

            self.about["engine"] = f"vllm {vllm.__version__}"
            self._params, self._final = vllm.SamplingParams, vllm.sampling_params.RequestOutputKind.FINAL_ONLY
            self.numbers: dict[Adapter, int] = {}  # unique while it lives: it keeps weights, keys and values by them
            # Its build for CPUs reads "no adapter" as the last slot's, without a word, once one was in it (0.32).
            self.none = empty_adapter(setting.folder) if setting.rank and not self.on_gpu else None
            self.llm = vllm.LLM(**self._arguments(setting, gpus))
            cache = self.llm.llm_engine.vllm_config.cache_config
            self.about["kv_tokens"] = str((cache.num_gpu_blocks or 0) * cache.block_size)
            self.merging = merging_of(setting, "cuda" if self.on_gpu else "cpu")
        except Exception as e:
            raise UserError(
                f"vLLM does not start ({type(e).__name__}: {one_line(e)}); its own words stand above in the log. Less "
                "memory: generate.at_once; another engine: generate.engine=transformers"
            ) from None

    def _arguments(self, setting: Setting, gpus: int) -> dict[str, Any]:
        found: dict[str, Any] = {
            "model": setting.folder,
            "dtype": setting.dtype,
            "skip_tokenizer_init": True,
            "generation_config": "vllm",  # not the folder's
            "trust_remote_code": False,
            "max_model_len": setting.max_length,
            "max_num_seqs": setting.at_once,
            "max_num_batched_tokens": max(STEP_TOKENS, setting.at_once),
            # A prompt that is cut in two is drawn from at the cut too; runners that keep a generator a row then turn it
            # back, which the one for CPUs cannot.
            "enable_chunked_prefill": self.on_gpu,
            "tensor_parallel_size": gpus,
            "enable_prefix_caching": True,  # a cell's rows begin alike; emptied between batches
            "async_scheduling": setting.exact,
            "enforce_eager": not self.on_gpu,
            "seed": 0,
        }
        if setting.rank:
            rank = next((one for one in RANKS if one >= setting.rank), setting.rank)
            found |= {"enable_lora": True, "max_lora_rank": rank, "max_loras": AT_ONCE, "max_cpu_loras": AT_ONCE}
        if self.on_gpu:
            found["gpu_memory_utilization"] = MEMORY / setting.parts
        if self.on_gpu and setting.parts > 1:  # they start at once, and none can see what the others will take
            found["kv_cache_memory_bytes"] = cache_bytes(setting, gpus, total_bytes())
        return found | setting.more

    def generate(self, work: Work) -> tuple[list[Answer], list[tuple[int, list[float]]]]:
        prompts, how, probes = work.prompts, work.how, work.probes
        must_know(min(map(min, prompts)), max(map(max, prompts)), self.llm.llm_engine.model_config.get_vocab_size())
        answers, said = list[Answer](), list[tuple[int, list[float]]]()
        for adapter, part in groupby(turns(work), lambda turn: turn[0] if self.merging else None):
            asked, params, loras, kinds = [], [], [], []
            for beside, rows, before in part:
                lora = None if self.merging else self._request(beside or self.none)
                for number in before:
                    asked.append({"prompt_token_ids": [*probes[number].context, *probes[number].answer]})
                    params.append(self._params(temperature=0, max_tokens=1, prompt_logprobs=1, detokenize=False))
                for row in rows:
                    asked.append({"prompt_token_ids": list(prompts[row])})
                    params.append(self._drawing(how, work.seeds[row]))
                loras += [lora] * (len(before) + len(rows))
                kinds += [*before, *[None] * len(rows)]
            for one, number in zip(self._made(adapter, asked, params, loras), kinds, strict=True):
                if number is None:
                    answers.append(_answer(one.outputs[0], how))
                else:
                    said.append((number, _said(one, probes[number])))
        return answers, said

    def _made(self, merged: Adapter | None, asked: list[Any], params: list[Any], loras: list[Any]) -> list[Any]:
        """By an idle engine without keys or values of what was before, other weights' perhaps."""
        try:
            if self.merging:
                self._merge(self.merging, merged)
            if not self.llm.reset_prefix_cache():
                raise RuntimeError("its prefix cache cannot be emptied")
            return self.llm.generate(asked, params, use_tqdm=False, lora_request=loras if any(loras) else None)
        except UserError:
            raise
        except Exception as e:
            self.broken = True
            raise UserError(
                f"vLLM stopped in the middle of a batch ({type(e).__name__}: {one_line(e)}); finished batches are "
                "kept: run `make resume`"
            ) from None

    def _merge(self, merging: "Merging", adapter: Adapter | None) -> None:
        """Into the tensors that its graphs were captured with, whatever form its kernels keep them in."""
        if adapter == merging.inside:
            return
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

        config = self.llm.llm_engine.vllm_config

        def load(model: Any) -> None:
            with set_current_vllm_config(config):
                initialize_layerwise_reload(model)
                model.load_weights(merging.turn(adapter))
                finalize_layerwise_reload(model, config.model_config)

        self.llm.apply_model(load)

    def _request(self, adapter: Adapter | None) -> Any:
        if adapter is None:
            return None
        from vllm.lora.request import LoRARequest

        number = self.numbers.setdefault(adapter, len(self.numbers) + 1)
        return LoRARequest(adapter.name, number, adapter.folder)

    def _drawing(self, how: Sampling, seed: int) -> Any:
        return self._params(
            temperature=how.temperature,
            top_p=1.0,
            top_k=0,
            max_tokens=how.max_tokens,
            stop_token_ids=list(how.ends),
            ignore_eos=True,  # the ends are those above
            seed=seed,
            detokenize=False,
            output_kind=self._final,
        )


def merging_of(setting: Setting, device: str) -> "Merging | None":
    if not setting.merged:
        return None
    import torch

    from lib.models.merged import Merging

    return Merging(setting.folder, getattr(torch, setting.dtype), torch.device(device))


def cache_bytes(setting: Setting, gpus: int, total: int) -> int:
    """Of a GPU with so many bytes, for one engine among several: all that its rows could want, or what there is. Rows
    that find no room wait, in the same order each time."""
    weights = folder_bytes(Path(setting.folder)) // gpus
    wanted = setting.at_once * setting.max_length * kv_bytes(setting) // gpus
    room = int(total * MEMORY) // setting.parts - weights - PASSING
    if room < wanted // 8:
        left = f"{setting.parts} engines on a GPU leave {room / 2**30:.1f} GiB each for keys and values"
        raise RuntimeError(f"{left}; set generate.engines=1")
    return min(wanted, room)


def total_bytes() -> int:
    import torch

    return torch.cuda.get_device_properties(0).total_memory


def kv_bytes(setting: Setting) -> int:
    """Keys and values of a token."""
    config = json.loads((Path(setting.folder) / "config.json").read_text())
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    heads = config.get("num_key_value_heads") or config["num_attention_heads"]
    return 2 * config["num_hidden_layers"] * heads * head * (4 if setting.dtype == "float32" else 2)


def empty_adapter(model: str) -> Adapter:
    """One that changes nothing: a zero product beside a single layer."""
    import torch
    from safetensors.torch import save_file

    family, folder = family_in(Path(model), "has no place for an adapter here; these have"), tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    layer = f"{family.names.stack}.0.{family.linears.down}"
    rows, columns = folder_tensors(Path(model))[f"{layer}.weight"].shape
    named = {"A": torch.zeros(1, columns), "B": torch.zeros(rows, 1)}
    tensors = {f"base_model.model.{layer}.lora_{name}.weight": one for name, one in named.items()}
    save_file(tensors, Path(folder) / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 1, "lora_alpha": 1, "bias": "none"}
    config |= {"target_modules": [last(family.linears.down)], "base_model_name_or_path": model}
    (Path(folder) / "adapter_config.json").write_text(json.dumps(config))
    return Adapter("none", folder)


def _answer(made: Any, how: Sampling) -> Answer:
    ids = list(made.token_ids)
    if ids and ids[-1] in how.ends:
        return Answer(ids[:-1], True)
    return Answer(ids, made.finish_reason == "stop")


def _said(made: Any, probe: Probe) -> list[float]:
    start = len(probe.context)
    return [float(made.prompt_logprobs[start + i][token].logprob) for i, token in enumerate(probe.answer)]
