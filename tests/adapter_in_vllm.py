"""What vLLM's build for CPUs says with an adapter and without: greedy tokens and their log-probabilities, as JSON.

python adapter_in_vllm.py MODEL ADAPTER '[token ids]'"""

import json
import os
import sys

SETTINGS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
os.environ |= SETTINGS | {"HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR", "OMP_NUM_THREADS": "1"}


def main(model: str, adapter: str, ids: str) -> None:
    import vllm
    from vllm.lora.request import LoRARequest

    how = {"dtype": "float32", "max_model_len": 128, "max_num_seqs": 2, "max_num_batched_tokens": 512}
    lora = {"enable_lora": True, "max_lora_rank": 8, "max_loras": 1}
    plain = {"skip_tokenizer_init": True, "generation_config": "vllm", "enforce_eager": True}
    llm = vllm.LLM(model=model, enable_chunked_prefill=False, **plain, **how, **lora)
    greedy = vllm.SamplingParams(temperature=0, max_tokens=8, logprobs=1, ignore_eos=True, detokenize=False)
    found = []
    for request in (None, LoRARequest("student", 1, adapter)):
        asked = [{"prompt_token_ids": json.loads(ids)}]
        [made] = llm.generate(asked, greedy, use_tqdm=False, lora_request=request)[0].outputs
        logs = [step[token].logprob for step, token in zip(made.logprobs, made.token_ids, strict=True)]
        found.append([list(made.token_ids), logs])
    print("found", json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
